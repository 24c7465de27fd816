"""Configurations written in Python: what YAML is told about a wrong value, Python is told, too."""
import pytest
import torch

from ssl_gpu.directivity import Pattern
from ssl_gpu.ism import Absorption, IsmConfig
from ssl_gpu.laws import Decay
from ssl_gpu.localizer import TargetConfig
from ssl_gpu.model import ModelConfig
from ssl_gpu.optim import TrainConfig
from ssl_gpu.rir import Method, RirConfig, draw_images, render_rir
from ssl_gpu.scene import SceneConfig, sample_scenes
from ssl_gpu.speech import SpeechConfig


def test_values_become_members():
    cfg = RirConfig(decay="measured", src_pattern="cardioid", mic_pattern=Pattern.OMNI)
    assert cfg.decay is Decay.MEASURED and cfg.src_pattern is Pattern.CARDIOID and cfg == RirConfig(
        decay=Decay.MEASURED, src_pattern=Pattern.CARDIOID)
    assert IsmConfig("eyring").absorption is Absorption.EYRING and RirConfig(method="ism").method is Method.ISM


@pytest.mark.parametrize("make, message", [
    (lambda: RirConfig(decay="mesured"), "rir.decay must be one of nominal, measured, got 'mesured'"),
    (lambda: RirConfig(method="hybird"), "rir.method must be one of fra, ism, hybrid, got 'hybird'"),
    (lambda: RirConfig(src_pattern=3), "rir.src_pattern must be one of omni, sub_cardioid, cardioid, hyper_cardioid, "
                                       "bidirectional, half_omni, got 3"),
    (lambda: IsmConfig("sabin"), "ism.absorption must be one of sabine, eyring, got 'sabin'"),
    (lambda: TargetConfig(angle="elevation"), "target.angle must be one of cone, azimuth, got 'elevation'"),
    (lambda: ModelConfig(kind="big"), "model.kind must be one of conformer, original, got 'big'"),
    (lambda: TrainConfig(precision="half", steps=1), "train.precision must be one of auto, float32, bfloat16, got "
                                                     "'half'"),
    (lambda: SpeechConfig(crop="last"), "speech.crop must be one of random, first, got 'last'"),
    (lambda: SceneConfig(rt60_s=0.3), "scene.rt60_s must be (low, high), got 0.3"),
    (lambda: SceneConfig(src_dist_m=(1, 2, 3)), "scene.src_dist_m must be (low, high), got (1, 2, 3)"),
    (lambda: SceneConfig(num_mics=2.5), "scene.num_mics must be whole, got 2.5"),
])
def test_a_wrong_value_is_one_line(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize("cfg", [RirConfig(method="ism"), RirConfig(method="hybrid"), RirConfig(hybrid_share=0.5),
                                 RirConfig(ism_share=1.0)])
def test_fra_alone_does_not_pass_for_another_method(cfg):
    scenes = sample_scenes(SceneConfig(), 2, generator=torch.Generator().manual_seed(0))
    images = draw_images(RirConfig(), scenes, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="^render_rir is of rir.method=fra alone, got "):
        render_rir(cfg, scenes, images)
    if cfg.method is not Method.FRA:
        with pytest.raises(ValueError, match="^draw_images is of rir.method=fra, got "):
            draw_images(cfg, scenes, generator=torch.Generator().manual_seed(0))
