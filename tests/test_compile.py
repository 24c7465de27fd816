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
from ssl_gpu.runtime import constant
from ssl_gpu.scene import SceneConfig, sample_scenes
from ssl_gpu.simulator import Simulator, SimulatorConfig
from ssl_gpu.synthesis import RirBatch

EYRING = IsmConfig(Absorption.EYRING)
NOISY = MixtureConfig(level_difference_db=(-5.0, 5.0), sensor_snr_db=(0.0, 30.0), diffuse_snr_db=(0.0, 30.0),
                      mic_gain_db=1.0, mic_phase_deg=5.0)
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
    drawn = draw_mixture(NOISY, 4, 2, 2, 8000, generator=generator)
    dry = torch.randn(4, 2, 8000, generator=generator)
    expected, found = mix(dry, rirs, SCENES, drawn), whole(mix, backend)(dry, rirs, SCENES, drawn)
    assert_close(found.audio, expected.audio, rtol=0, atol=1e-6 * float(expected.audio.abs().max()))


@pytest.mark.parametrize("name", ["no early part", "hybrid", "mixed"])
def test_a_simulator_may_be_within_somebody_elses_graph(name):
    simulator = Simulator(SceneConfig(), ROOMS[name], NOISY, ism=EYRING)
    draw = simulator.draw(4, 8000, generator=torch.Generator().manual_seed(3), scenes=SCENES)
    dry = torch.randn(4, 2, 8000, generator=torch.Generator().manual_seed(4))
    expected, found = (render(dry) for render in (
        lambda dry: simulator.render(dry, draw).audio, whole(lambda dry: simulator.render(dry, draw).audio, "eager")))
    assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ROOMS)
def test_rooms_render_as_one_graph(name):
    compare_rooms(ROOMS[name], "eager")


def test_mixtures_are_one_graph():
    compare_mixtures(compare_rooms(FEW, "eager"), "eager")


def test_mixtures_for_four_microphones_are_one_graph():
    """Diffuse noise takes another path from the third on."""
    scenes = sample_scenes(SceneConfig(num_mics=4), 3, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    drawn = draw_mixture(NOISY, 3, 2, 4, 4000, generator=generator)
    dry, rirs = torch.randn(3, 2, 4000, generator=generator), torch.randn(3, 4, 2, 500, generator=generator)
    rirs = RirBatch(rirs, None, torch.full((3,), 500), 16000)
    expected, found = mix(dry, rirs, scenes, drawn), whole(mix, "eager")(dry, rirs, scenes, drawn)
    assert_close(found.audio, expected.audio, rtol=0, atol=1e-6 * float(expected.audio.abs().max()))


def simulate(rir, scene, compile):
    """Five mixtures in chunks of two; rooms of a bank where scene.bank says so."""
    simulator = Simulator(scene, rir, NOISY, SimulatorConfig(2, compile), EYRING)
    generator = torch.Generator().manual_seed(3)
    if scene.bank is not None:
        simulator.fill_bank(generator=generator)
    return simulator(torch.randn(5, 2, 4000, generator=generator), generator=generator)


@pytest.mark.parametrize("bank", [None, 3])
def test_compiled_simulator_gives_the_same_mixtures(bank, monkeypatch):
    calls, compile = [], torch.compile

    def by_eager(function, **options):
        calls.append((function, options))
        return compile(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", by_eager)
    torch.compiler.reset()
    law, rir = SceneConfig(rt60_s=(0.2, 0.4), bank=bank), replace(FEW, hybrid_share=0.5)
    expected, found = (simulate(rir, law, compile) for compile in (False, True))
    assert calls == [(part, {"dynamic": False, "fullgraph": True}) for part in (render_rooms, mix)]
    for kind in ("audio", "early"):
        peak = float(getattr(expected, kind).abs().max())
        assert_close(getattr(found, kind), getattr(expected, kind), rtol=0, atol=1e-6 * peak)
    assert torch.equal(found.scenes.src_pos, expected.scenes.src_pos)


@pytest.mark.parametrize("rir", [RirConfig(method=Method.ISM), replace(FEW, ism_share=0.25)])
def test_exact_rooms_are_not_compiled(rir):
    with pytest.raises(ValueError, match=r"^simulator.compile must be false where rooms are exact, which wait for the "
                                         r"device, got true with rir.method=\w+ and rir.ism_share=[0-9.]+$"):
        Simulator(SceneConfig(rt60_s=(0.2, 0.4)), rir, config=SimulatorConfig(compile=True), ism=EYRING)


def test_a_second_graph_is_noticed():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(lambda x: print(x), "eager")(torch.ones(2))


@constant
def table(first):
    return torch.arange(3.0) + first


@constant
def other_table(first):
    return torch.arange(3.0) - first


@constant
def tables(first):
    return torch.full((3,), first), (torch.full((3,), 2 * first),)


@constant
def size(number):
    return number + 1


def add_constants(x):
    """By methods: what operators make of constants alone is computed while tracing, so that they are not in the graph.
    """
    one, (two,) = tables(5.0)
    for part in (table(1), table(2), table(1), other_table(1), one, two, tables(7.0)[0]):
        x = x + part.exp() * size(2) / size(3)
    return x


@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
@pytest.mark.parametrize("function", [add_constants, lambda x: (x + table(1).exp() + size(2), table(3), tables(5.0))])
def test_constants_of_one_graph_are_told_apart(function):
    """Whatever functions, arguments or tuples they come from: aot_eager, a part of inductor, wants a name for each."""
    x = torch.randn(3, generator=torch.Generator().manual_seed(0))
    assert_close(whole(function, "aot_eager")(x), function(x), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
@pytest.mark.parametrize("name", ["reference", "hybrid"])
def test_generated_code_gives_the_same_rooms_and_mixtures(name):
    """The compiler that a GPU would use, here for the CPU: a minute each."""
    compare_mixtures(compare_rooms(ROOMS[name], "inductor"), "inductor")
