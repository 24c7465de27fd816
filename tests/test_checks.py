"""Configurations written in Python: what YAML is told about a wrong value, Python is told, too."""
import math
import re
from dataclasses import dataclass, fields, replace
from enum import Enum
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from ssl_gpu.checks import check_fields, without_none
from ssl_gpu.config import RunConfig, from_mapping, to_mapping
from ssl_gpu.directivity import Pattern
from ssl_gpu.features import FeatureConfig
from ssl_gpu.ism import Absorption, IsmConfig
from ssl_gpu.laws import Decay
from ssl_gpu.localizer import TargetConfig
from ssl_gpu.mixture import MixtureConfig
from ssl_gpu.model import ModelConfig
from ssl_gpu.optim import TrainConfig
from ssl_gpu.rir import Method, RirConfig, draw_images, render_rir
from ssl_gpu.scene import SceneConfig, sample_scenes
from ssl_gpu.simulator import Simulator, SimulatorConfig
from ssl_gpu.speech import SpeechConfig

SECTIONS = get_type_hints(RunConfig)
MAKE = {section: partial(kind, steps=1) if kind is TrainConfig else kind for section, kind in SECTIONS.items()}


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
    (lambda: SceneConfig(bank=2.5), "scene.bank must be whole or null, got 2.5"),
    (lambda: SceneConfig(room_min_m=3), "scene.room_min_m must be (length, width, height), got 3"),
    (lambda: SceneConfig(room_min_m=(3, 3, "2")), "scene.room_min_m must be (length, width, height), got (3, 3, '2')"),
    (lambda: SceneConfig(src_orientation_deg=90.0), "scene.src_orientation_deg must be (azimuth, polar angle) or null, "
                                                    "got 90.0"),
    (lambda: SceneConfig(mic_array_m=0.1), "scene.mic_array_m must be a list of [x, y, z] of finite numbers or null, "
                                           "got 0.1"),
    (lambda: SceneConfig(mic_array_m=[[0, 0, 0], 3]), "scene.mic_array_m must hold [x, y, z] of finite numbers, got 3"),
    (lambda: SceneConfig(mic_array_m=[[0, 0, 0], [0, 0]]), "scene.mic_array_m must hold [x, y, z] of finite numbers, "
                                                           "got [0, 0]"),
    (lambda: SceneConfig(mic_array_m=np.zeros((2, 2))), "scene.mic_array_m must hold [x, y, z] of finite numbers, "
                                                        "got [0.0, 0.0]"),
    (lambda: SceneConfig(mic_spacing_m=10 ** 400), f"scene.mic_spacing_m must be a number, got 1{'0' * 76}..."),
    (lambda: MixtureConfig(diffuse_snr_db=20.0), "mixture.diffuse_snr_db must be (low, high) or null, got 20.0"),
    (lambda: MixtureConfig(sensor_snr_db=(5,)), "mixture.sensor_snr_db must be (low, high) or null, got (5,)"),
    (lambda: MixtureConfig(sensor_snr_db=(0, 10, 30)), "mixture.sensor_snr_db must be (low, high) or null, "
                                                       "got (0, 10, 30)"),
    (lambda: MixtureConfig(noise_probability=True), "mixture.noise_probability must be a number, got True"),
    (lambda: RirConfig(num_images=2000), "rir.num_images must be (low, high), got 2000"),
    (lambda: RirConfig(num_images=(1, 2, 3)), "rir.num_images must be (low, high), got (1, 2, 3)"),
    (lambda: RirConfig(num_images=(1, True)), "rir.num_images must be whole, got (1, True)"),
    (lambda: RirConfig(air=20.0), "rir.air must be (temperature, humidity) or null, got 20.0"),
    (lambda: RirConfig(early="yes"), "rir.early must be true or false, got 'yes'"),
    (lambda: RirConfig(early=1), "rir.early must be true or false, got 1"),
    (lambda: RirConfig(band_rt60_ratio=0.5), "rir.band_rt60_ratio must be a list of (low, high) or null, got 0.5"),
    (lambda: RirConfig(band_rt60_ratio=[0.5] * 7), "rir.band_rt60_ratio must hold (low, high), got 0.5"),
    (lambda: IsmConfig(tail_fade=2.0), "ism.tail_fade must be (low, high), got 2.0"),
    (lambda: IsmConfig(tail_arrivals=100.5), "ism.tail_arrivals must be whole, got 100.5"),
    (lambda: SimulatorConfig(chunk=2.5), "simulator.chunk must be whole or null, got 2.5"),
    (lambda: SimulatorConfig(chunk=True), "simulator.chunk must be whole or null, got True"),
    (lambda: SimulatorConfig(fused="no"), "simulator.fused must be true or false or null, got 'no'"),
    (lambda: FeatureConfig(window=512.0), "features.window must be whole, got 512.0"),
    (lambda: FeatureConfig(num_delays=33.5), "features.num_delays must be whole, got 33.5"),
    (lambda: TrainConfig(steps=1, lr="1e-3"), "train.lr must be a number, got '1e-3'"),
    (lambda: TrainConfig(steps=1, lr=math.nan), "train.lr must be > 0, got nan"),
    (lambda: TrainConfig(steps=1, weight_decay=math.nan), "train.weight_decay must be >= 0, got nan"),
    (lambda: TrainConfig(steps=1, out=Path("runs")), f"train.out must be text or null, got {Path('runs')!r}"),
    (lambda: TrainConfig(steps=1, device=torch.device("cpu")), "train.device must be text, got device(type='cpu')"),
    (lambda: TargetConfig(sigma_deg=math.nan), "target.sigma_deg must be > 0, got nan"),
    (lambda: TargetConfig(labels="hard", grid_deg=5.0), "target.grid_deg must be left at 2.0 with target.labels=hard, "
                                                        "which do not have it, got 5.0"),
    (lambda: TargetConfig(labels="hard", sigma_deg=2.0), "target.sigma_deg must be left at 3.0 with "
                                                         "target.labels=hard, which do not have it, got 2.0"),
    (lambda: TargetConfig(offsets=None), "target.offsets must be whole, got None"),
    (lambda: ModelConfig(depth=torch.nn.Sequential(torch.nn.GELU())), "model.depth must be whole, got Sequential( (0): "
                                                                      "GELU(approximate='none') )"),
    (lambda: SpeechConfig(voices_speakers=True), "speech.voices_speakers must be an integer >= 1, got True"),
    (lambda: replace(from_mapping(RunConfig, {"train": {"steps": 1}}), eval=3), "eval must be of class EvalConfig, "
                                                                                "got 3"),
])
def test_a_wrong_value_is_one_line(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


def test_every_configuration_is_a_section():
    package = Path(__file__).parents[1] / "ssl_gpu"
    sources = "\n".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    found = set(re.findall(r"^class (\w+Config)\b", sources, re.MULTILINE))
    assert found == {kind.__name__ for kind in SECTIONS.values()} | {"RunConfig"}


def wrong_for(kind):
    """Values of other types than `kind`, among them those that are nearly of it."""
    bare, wrong = without_none(kind), [object(), {"a": 1}, b"x", 1j, {1, 2}, float]
    wrong += [None] if bare is kind else []
    if get_origin(bare) is tuple:
        items = [item for item in get_args(bare) if item is not Ellipsis]
        wrong += [1, 0.5, "12", (None,), range(2), [*[0] * len(items), 0]]
        if len(items) > 1:
            wrong += [(), (0,)] + [(item, *[0] * (len(items) - 1)) for item in (True, "0", None, (0, 1), object())]
        return wrong
    wrong += [(0,), [1], np.array([1.0]), torch.ones(2)]
    return wrong + {int: [True, 2.5, 2.0, "2", np.float64(2), np.True_, math.nan, math.inf],
                    float: [True, "0.1", np.False_, 10 ** 400, torch.tensor(True)],
                    bool: [0, 1, "true", 1.0, np.int64(1)],
                    str: [0, 1.5, True, Path("a")]}.get(bare, [True, 0, "no such value"])


@pytest.mark.parametrize("section, name", [(section, field.name) for section, kind in SECTIONS.items()
                                           for field in fields(kind)])
def test_a_wrong_type_in_any_field_names_it(section, name):
    kind = get_type_hints(SECTIONS[section])[name]
    for value in wrong_for(kind):
        with pytest.raises(ValueError, match=f"^{section}\\.{name} must (be|hold) [^\n]+, got [^\n]+$"):
            MAKE[section](**{name: value})


def with_nan(kind):
    """A value of this type with a NaN in it, None where it has no float."""
    kind = without_none(kind)
    if kind is float:
        return math.nan
    parts = [with_nan(item) for item in get_args(kind) if item is not Ellipsis]
    if None in parts or not parts:
        return None
    return (parts[0],) * (7 if get_args(kind)[-1] is Ellipsis else len(parts))


@pytest.mark.parametrize("section, name", [(section, field.name) for section, kind in SECTIONS.items()
                                           for field in fields(kind)
                                           if with_nan(get_type_hints(kind)[field.name]) is not None])
def test_nan_is_refused_by_the_rule_of_every_float(section, name):
    value = with_nan(get_type_hints(SECTIONS[section])[name])
    with pytest.raises(ValueError, match=rf"^{section}\.([a-z_0-9]+, scene\.)?{name}\b[^\n]* must [^\n]*\bnan"):
        MAKE[section](**{name: value})


def test_lists_arrays_and_numbers_of_other_libraries_are_taken():
    cfg = SceneConfig(room_min_m=np.array([4, 4, 3]), rt60_s=[np.float32(0.25), Fraction(1, 2)], num_src=np.int64(1),
                      mic_array_m=torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]]), rotate=np.True_,
                      src_orientation_deg=[torch.tensor(90.0), 45], bank=torch.tensor(3), wall_dist_m=1)
    assert cfg == SceneConfig((4, 4, 3), rt60_s=(0.25, 0.5), num_src=1, mic_array_m=((0, 0, 0), (0.5, 0, 0)),
                              rotate=True, src_orientation_deg=(90, 45), bank=3, wall_dist_m=1)
    assert hash(cfg) == hash(replace(cfg)) and cfg == from_mapping(SceneConfig, to_mapping(cfg))
    assert [type(cfg.num_src), type(cfg.bank), type(cfg.rotate)] == [int, int, bool]
    assert all(type(x) is float for x in (*cfg.rt60_s, *cfg.mic_array_m[1], cfg.src_orientation_deg[0]))
    assert MixtureConfig(sensor_snr_db=[0, 30]).sensor_snr_db == (0, 30)
    assert RirConfig(band_rt60_ratio=[[0.5, 1]] * 7).band_rt60_ratio == ((0.5, 1),) * 7


def test_a_list_is_its_default():
    assert RirConfig(method="ism", num_images=[1024, 4096], perturbation=[-2, 2]) == RirConfig(method="ism")


def test_what_is_of_its_type_stays_the_same_object():
    array, window = ((0.0, 0.0, 0.0), (0.1, 0.0, 0.0)), (-6, 50)
    assert SceneConfig(mic_array_m=array).mic_array_m is array
    assert RirConfig(early_window_ms=window).early_window_ms is window


class Order(Enum):
    FIRST = 1


@dataclass(frozen=True)
class Filter:
    order: Order | None = None

    def __post_init__(self):
        check_fields(self, "filter")


def test_true_is_not_the_member_of_value_one():
    assert Filter(1).order is Order.FIRST and Filter(np.int64(1)).order is Order.FIRST and Filter().order is None
    with pytest.raises(ValueError, match="^filter.order must be one of 1 or null, got True$"):
        Filter(True)


@pytest.mark.parametrize("make, message", [
    (lambda: Simulator(RirConfig(), SceneConfig()), "scene must be of class SceneConfig, got RirConfig"),
    (lambda: Simulator(SceneConfig(), MixtureConfig()), "rir must be of class RirConfig, got MixtureConfig"),
    (lambda: Simulator(mixture=SimulatorConfig()), "mixture must be of class MixtureConfig, got SimulatorConfig"),
    (lambda: Simulator(config=2), "config must be of class SimulatorConfig, got int"),
    (lambda: Simulator(ism=None), "ism must be of class IsmConfig, got NoneType"),
])
def test_arguments_of_the_simulator_in_another_order_are_named(make, message):
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
