"""What was drawn is rendered by the law and for the scenes that it was drawn by and for, or refused in one line."""
import math
import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ssl_gpu import runtime
from ssl_gpu.ism import IsmConfig
from ssl_gpu.mixture import MixtureConfig, draw_mixture, mix
from ssl_gpu.rir import RirConfig
from ssl_gpu.rooms import draw_rooms, render_rooms
from ssl_gpu.scene import SceneConfig, make_scenes, sample_scenes
from ssl_gpu.simulator import Simulator, SimulatorConfig
from ssl_gpu.synthesis import RirBatch

LAW, EYRING = SceneConfig(rt60_s=(0.2, 0.4), num_src=2), IsmConfig("eyring")
FEW = RirConfig(num_images=(50, 80), early=False)
OCTAVES = replace(FEW, band_rt60_ratio=((0.5, 1.0),) * 7)
MIXED = replace(FEW, hybrid_share=0.5)
HYBRID = RirConfig(method="hybrid", early=False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(cfg, batch=3, law=LAW):
    scenes = sample_scenes(law, batch, generator=seeded(1))
    return scenes, draw_rooms(EYRING, cfg, scenes, generator=seeded(2))


@pytest.mark.parametrize("by, rendered_by, told", [
    (replace(FEW, decay="measured"), FEW, "rir.decay must be measured, by which these rooms were drawn, got nominal"),
    (FEW, replace(FEW, decay="measured"), "rir.decay must be nominal, by which these rooms were drawn, got measured"),
    (FEW, replace(FEW, image_range="full"), "rir.image_range must be reference"),
    (FEW, replace(FEW, perturbation=(0, 0)), "rir.perturbation must be (-2.0, 2.0), by which these rooms were drawn, "
                                             "got (0, 0)"),
    (FEW, RirConfig(), "rir.num_images must be (50, 80)"),
    (MIXED, FEW, "rir.hybrid_share must be 0.5, by which these rooms were drawn, got 0.0"),
    (replace(FEW, hybrid_share=0.3, ism_share=0.3), replace(FEW, hybrid_share=0.3), "rir.ism_share must be 0.3"),
    (MIXED, HYBRID, "rir.method must be fra, by which these rooms were drawn, got hybrid"),
    (FEW, replace(FEW, src_pattern="cardioid"), "rir.src_pattern must be omni, by which these rooms were drawn, got "
                                                "cardioid"),
    (HYBRID, replace(HYBRID, src_pattern="cardioid"), "rir.src_pattern must be omni"),
    (FEW, OCTAVES, "rir.band_rt60_ratio must be None"),
    (OCTAVES, replace(FEW, air=(20, 50)), "rir.band_rt60_ratio must be ((0.5, 1.0),")])
@pytest.mark.parametrize("compile", [False, True])
def test_rooms_drawn_by_another_law_are_refused(compile, by, rendered_by, told):
    first, second = (Simulator(LAW, cfg, ism=EYRING, config=SimulatorConfig(compile=on and compile))
                     for cfg, on in ((by, False), (rendered_by, True)) if not (on and compile and cfg.ism_share))
    with pytest.raises(ValueError) as error:
        second.render(torch.randn(3, 2, 500), first.draw(3, 500, generator=seeded()))
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


@pytest.mark.parametrize("by, rendered_by", [
    (FEW, RirConfig(method="ism", early=False)), (MIXED, RirConfig(method="ism", early=False)),
    (FEW, replace(FEW, early=True, early_window_ms=(-1000, 1000), mic_pattern="cardioid", look_vector="exact")),
    (FEW, replace(FEW, sample_rate=8000)), (replace(FEW, src_pattern="cardioid"), FEW),
    (replace(FEW, src_pattern="cardioid"), replace(FEW, src_pattern="half_omni")), (FEW, replace(FEW, air=(20, 50)))])
def test_what_rendering_alone_decides_may_differ(by, rendered_by):
    """It is as if drawn by it, where that takes the same random numbers: all but those for a source's pattern."""
    scenes, draw = drawn(by)
    found = render_rooms(EYRING, rendered_by, scenes, draw).full
    if by.src_pattern is rendered_by.src_pattern:
        assert torch.equal(found, render_rooms(EYRING, rendered_by, *drawn(rendered_by)).full)
    else:
        patterned = render_rooms(EYRING, by, scenes, draw).full
        assert found.isfinite().all() and not torch.equal(found, patterned)


def test_draws_keep_their_law_wherever_they_go():
    scenes, draw = drawn(MIXED)
    for other in (draw[:2], draw[torch.tensor([2, 0])], draw.to("cpu")):
        assert other.law == MIXED
    assert_close(render_rooms(EYRING, MIXED, scenes[:2], draw[:2]).full,
                 render_rooms(EYRING, MIXED, scenes, draw).full[:2], rtol=0, atol=1e-7)


@pytest.mark.parametrize("cfg, name", [(FEW, "images"), (HYBRID, "tail"), (MIXED, "images")])
@pytest.mark.parametrize("batch, num_src", [(1, 2), (3, 1)])
def test_a_draw_is_not_spread_over_other_scenes(cfg, name, batch, num_src):
    """One room for all, or one talker's images for all, would pass for what it is not."""
    _, draw = drawn(cfg, batch, replace(LAW, num_src=num_src))
    scenes, _ = drawn(cfg)
    rule = f"RoomDraw.{name} must be of batch=3, src=2 as the scenes, got batch={batch}, src={num_src}"
    with pytest.raises(ValueError, match=f"^{re.escape(rule)}$"):
        render_rooms(EYRING, cfg, scenes, draw)


@pytest.mark.parametrize("cfg", [HYBRID, MIXED])
def test_walls_that_cannot_be_are_refused_on_a_cpu(cfg):
    """By Sabine, in rooms drawn for Eyring; or of RIRs alone, which no Simulator has looked at."""
    scenes = make_scenes([[10, 6, 4]], [0.1], [[[2, 2, 1.2]]], [[[4, 3, 1.6]]])
    draw = draw_rooms(EYRING, cfg, scenes, generator=seeded())
    assert render_rooms(EYRING, cfg, scenes, draw).full.isfinite().all()
    with pytest.raises(ValueError, match=r"^scene 0: rt60 = 0.1 s is infeasible in a room of \[10.0, 6.0, 4.0\] m"):
        render_rooms(IsmConfig(), cfg, scenes, draw)
    assert render_rooms(IsmConfig(clamp_infeasible=True), cfg, scenes, draw).full.isfinite().all()


@pytest.mark.parametrize("mics, told", [
    (1, "scenes and draw must be of mic=2 as the RIRs, got scenes of mic=2 and gains of microphones [3, 1]"),
    (4, "scenes and draw must be of mic=2 as the RIRs, got scenes of mic=4 and gains of microphones [3, 4]")])
def test_microphones_are_not_spread_over_others(mics, told):
    """One pair of gain and phase for both would be no mismatch; and noise would be that of another spacing."""
    rirs = RirBatch(torch.rand(3, 2, 1, 50), None, torch.full((3,), 50), 16000)
    scenes = sample_scenes(SceneConfig(num_mics=max(mics, 2), num_src=1), 3, generator=seeded())
    draw = draw_mixture(MixtureConfig(mic_gain_db=3, mic_phase_deg=5), 3, 1, mics, 500, generator=seeded())
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        mix(torch.rand(3, 1, 500), rirs, scenes, draw)


def test_looks_of_rotated_arrays_are_those_of_their_direction():
    """The reference's law of look vectors has no period: 300 degrees would look elsewhere than -60."""
    law = SceneConfig(rotate=True, mic_orientation_deg=(150, 45))
    azimuth = sample_scenes(law, 500, generator=seeded()).mic_orientation[..., 0]
    assert azimuth.abs().max() <= math.pi + 1e-6 and (azimuth < -1).any() and (azimuth > 1).any()


def test_tables_made_in_inference_mode_serve_training():
    @runtime.constant
    def table(length):
        return torch.arange(1.0, length)

    with torch.inference_mode():
        assert not table(4).is_inference()
    weight = torch.ones(3, requires_grad=True)
    (weight * table(4)).sum().backward()
    assert weight.grad.tolist() == [1, 2, 3]


@pytest.mark.parametrize("on_gpu", [False, True])
def test_products_are_exact_whatever_surrounds_them(on_gpu, monkeypatch):
    """On a GPU by float64, which TF32 does not touch; here on a CPU, which only claims to be one."""
    left, right = torch.randn(4, 5, generator=seeded()), torch.randn(5, 6, generator=seeded(1))
    expected = (left.double() @ right.double()).float()
    monkeypatch.setattr(runtime, "is_gpu", lambda device: on_gpu)
    with torch.autocast("cpu", torch.bfloat16):
        found = runtime.exact_product(left, right)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected) if on_gpu else float((found - expected).abs().max()) < 1e-5
