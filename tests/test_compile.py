"""Rendering and mixing as one graph: nothing in them that torch.compile must leave to Python, and the same result."""
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ssl_gpu.directivity import Pattern
from ssl_gpu.ism import Absorption, IsmConfig
from ssl_gpu.laws import Decay, ImageRange
from ssl_gpu.mixture import MixtureConfig, draw_mixture, mix
from ssl_gpu.rir import Method, RirConfig
from ssl_gpu.rooms import draw_rooms, render_rooms
from ssl_gpu.scene import SceneConfig, sample_scenes

EYRING = IsmConfig(Absorption.EYRING)
FEW = RirConfig(num_images=(64, 128))
SCENES = sample_scenes(SceneConfig(rt60_s=(0.2, 0.4)), 4, generator=torch.Generator().manual_seed(0))
ROOMS = {
    "reference": FEW, "no early part": replace(FEW, early=False),
    "measured decay": replace(FEW, decay=Decay.MEASURED, image_range=ImageRange.FULL),
    "patterns": replace(FEW, src_pattern=Pattern.CARDIOID, mic_pattern=Pattern.CARDIOID),
    "octaves": replace(FEW, band_rt60_ratio=((0.5, 1.0),) * 7, air=(20.0, 50.0)),
    "hybrid": RirConfig(method=Method.HYBRID), "mixed": replace(FEW, hybrid_share=0.5)}


def whole(function, backend):
    """Compiled for fixed shapes; anything that would need a second graph raises."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)


def compare_rooms(cfg, backend):
    drawn = draw_rooms(EYRING, cfg, SCENES, generator=torch.Generator().manual_seed(1))
    expected = render_rooms(EYRING, cfg, SCENES, drawn)
    found = whole(render_rooms, backend)(EYRING, cfg, SCENES, drawn)
    assert torch.equal(found.length, expected.length) and (found.early is None) == (expected.early is None)
    for kind in ("full", "early") if cfg.early else ("full",):
        peak = float(getattr(expected, kind).abs().max())
        assert_close(getattr(found, kind), getattr(expected, kind), rtol=0, atol=1e-6 * peak)
    return expected


def compare_mixtures(rirs, backend):
    generator = torch.Generator().manual_seed(2)
    cfg = MixtureConfig(level_difference_db=(-5.0, 5.0), sensor_snr_db=(0.0, 30.0), diffuse_snr_db=(0.0, 30.0),
                        mic_gain_db=1.0, mic_phase_deg=5.0)
    drawn = draw_mixture(cfg, 4, 2, 2, 8000, generator=generator)
    dry = torch.randn(4, 2, 8000, generator=generator)
    expected, found = mix(dry, rirs, SCENES, drawn), whole(mix, backend)(dry, rirs, SCENES, drawn)
    assert_close(found.audio, expected.audio, rtol=0, atol=1e-6 * float(expected.audio.abs().max()))


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_render_as_one_graph(name):
    compare_rooms(ROOMS[name], "eager")


def test_mixtures_are_one_graph():
    compare_mixtures(compare_rooms(FEW, "eager"), "eager")


def test_a_second_graph_is_noticed():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(lambda x: print(x), "eager")(torch.ones(2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
@pytest.mark.parametrize("name", ["reference", "hybrid"])
def test_generated_code_gives_the_same_rooms_and_mixtures(name):
    """The compiler that a GPU would use, here for the CPU: a minute each."""
    compare_mixtures(compare_rooms(ROOMS[name], "inductor"), "inductor")
