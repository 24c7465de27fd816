"""Rooms by any method, alone and several in one batch; and all of them through the simulator."""
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ssl_gpu.evalset import EvalConfig, build_eval_set
from ssl_gpu.hybrid import render_hybrid
from ssl_gpu.ism import Absorption, IsmConfig, render_ism
from ssl_gpu.mixture import MixtureConfig
from ssl_gpu.rir import Method, RirConfig, draw_images, render_rir
from ssl_gpu.rooms import METHODS as ORDER, draw_rooms, render_rooms
from ssl_gpu.scene import SceneConfig, sample_scenes
from ssl_gpu.simulator import Simulator, SimulatorConfig
from ssl_gpu.speech import SpeechConfig, voices_bank

EYRING = IsmConfig(Absorption.EYRING)
FEW = RirConfig(num_images=(40, 80))
LAW = SceneConfig(rt60_s=(0.2, 0.6), rotate=True)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def close(actual, expected, tolerance=5e-7):
    assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def test_shapes_are_known_without_looking_at_a_value():
    """On the device that has no values, where anything that waits for one raises."""
    mixed = replace(FEW, hybrid_share=0.5)
    scenes = sample_scenes(LAW, 3, generator=seeded(0))
    taps = render_rooms(EYRING, FEW, scenes, draw_rooms(EYRING, FEW, scenes, generator=seeded(1))).full.shape[-1]
    for cfg in (mixed, RirConfig(method=Method.HYBRID)):
        drawn = draw_rooms(EYRING, cfg, scenes, generator=seeded(1))
        assert render_rooms(EYRING, cfg, scenes.to("meta"), drawn.to("meta")).full.shape == (3, 2, 2, taps)


def test_each_method_is_the_one_asked_for():
    scenes = sample_scenes(LAW, 3, generator=seeded(0))
    for method in Method:
        cfg = FEW if method is Method.FRA else RirConfig(method=method)
        drawn = draw_rooms(EYRING, cfg, scenes, generator=seeded(1))
        assert (drawn.images is None) == (method is not Method.FRA) and drawn.method is None
        assert (drawn.tail is None) == (method is not Method.HYBRID)
        expected = {Method.FRA: lambda: render_rir(cfg, scenes, drawn.images),
                    Method.ISM: lambda: render_ism(EYRING, cfg, scenes),
                    Method.HYBRID: lambda: render_hybrid(EYRING, cfg, scenes, drawn.tail)}[method]()
        found = render_rooms(EYRING, cfg, scenes, drawn)
        assert torch.equal(found.full, expected.full) and torch.equal(found.early, expected.early)


def test_fra_draws_what_it_drew_before_there_were_other_methods():
    scenes = sample_scenes(LAW, 3, generator=seeded(0))
    first, second = seeded(1), seeded(1)
    drawn = draw_rooms(EYRING, FEW, scenes, generator=first)
    assert drawn.tail is None and drawn.method is None
    assert torch.equal(drawn.images.ratio, draw_images(FEW, scenes, generator=second).ratio)
    assert torch.equal(first.get_state(), second.get_state())


def is_method(drawn, method):
    return drawn.method == ORDER.index(method)


@pytest.mark.parametrize("arrivals", [10, 300])
@pytest.mark.parametrize("shares", [(0.5, 0.0), (0.0, 0.5), (0.4, 0.3)])
def test_a_mixed_batch_holds_each_scene_by_its_own_method(arrivals, shares):
    """Whichever has more arrivals; and the scenes of FRA-RIR are those of a batch that is not mixed."""
    cfg, mixed = replace(EYRING, tail_arrivals=arrivals), replace(FEW, hybrid_share=shares[0], ism_share=shares[1])
    scenes = sample_scenes(replace(LAW, rt60_s=(0.15, 0.25)), 24, generator=seeded(0))
    drawn = draw_rooms(cfg, mixed, scenes, generator=seeded(1))
    rirs = render_rooms(cfg, mixed, scenes, drawn)
    assert torch.equal(drawn.images.ratio, draw_images(FEW, scenes, generator=seeded(1)).ratio)
    by = {Method.FRA: render_rir(FEW, scenes, drawn.images), Method.ISM: render_ism(cfg, FEW, scenes)}
    if drawn.tail is not None:
        by[Method.HYBRID] = render_hybrid(cfg, FEW, scenes, drawn.tail)
    for method, share in ((Method.FRA, 1 - sum(shares)), (Method.HYBRID, shares[0]), (Method.ISM, shares[1])):
        rows = is_method(drawn, method).nonzero().squeeze(-1)
        assert abs(len(rows) - 24 * share) < 8 and (len(rows) > 0) == (share > 0)
        for kind in ("full", "early") if len(rows) else ():
            close(getattr(rirs, kind)[rows], getattr(by[method], kind)[rows])
    assert torch.equal(rirs.length, by[Method.FRA].length)


def test_a_mixed_batch_that_drew_no_exact_room_has_none():
    mixed = replace(FEW, ism_share=0.5)
    scenes = sample_scenes(LAW, 4, generator=seeded(0))
    drawn = draw_rooms(EYRING, mixed, scenes, generator=seeded(1))
    none = replace(drawn, method=torch.zeros_like(drawn.method))
    assert torch.equal(render_rooms(EYRING, mixed, scenes, none).full, render_rir(FEW, scenes, drawn.images).full)


@pytest.mark.parametrize("shares", [(0.2, 0.0), (0.0, 0.7), (0.3, 0.6), (0.4, 0.6), (1.0, 0.0), (0.0, 1.0)])
def test_methods_mix_by_their_probabilities(shares):
    cfg = replace(FEW, num_images=(1, 1), hybrid_share=shares[0], ism_share=shares[1])
    scenes = sample_scenes(replace(LAW, num_mics=1, num_src=1), 2000, generator=seeded(0))
    drawn = draw_rooms(replace(EYRING, tail_arrivals=1), cfg, scenes, generator=seeded(1))
    for method, share in zip((Method.HYBRID, Method.ISM), shares):
        found = float(is_method(drawn, method).double().mean())
        assert abs(found - share) <= 4 * math.sqrt(share * (1 - share) / 2000)
    part = drawn[5:9].to("cpu")
    assert torch.equal(part.method, drawn.method[5:9]) and torch.equal(part.images.ratio, drawn.images.ratio[5:9])


@pytest.mark.parametrize("change, message", [
    (dict(hybrid_share=1.5), "rir.hybrid_share must be in 0..1, got 1.5"),
    (dict(hybrid_share=math.nan), "rir.hybrid_share must be in 0..1, got nan"),
    (dict(hybrid_share=0.5, method=Method.ISM),
     "rir.hybrid_share must be 0 unless rir.method is fra, got 0.5 with ism"),
    (dict(ism_share=-0.1), "rir.ism_share must be in 0..1, got -0.1"),
    (dict(ism_share=0.5, method=Method.HYBRID),
     "rir.ism_share must be 0 unless rir.method is fra, got 0.5 with hybrid"),
    (dict(hybrid_share=0.6, ism_share=0.5), "rir.hybrid_share + rir.ism_share must be <= 1, got 0.6 + 0.5"),
])
def test_shares_that_cannot_be_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError) as error:
        RirConfig(**change)
    assert str(error.value) == message


# ---- in the simulator ----


SMALL = SceneConfig(rt60_s=(0.05, 0.12), room_max_m=(4.0, 4.0, 3.0), src_dist_m=(0.2, 3.0))
CHEAP = replace(EYRING, tail_arrivals=50)
METHODS = {"fra": FEW, "ism": RirConfig(method=Method.ISM), "hybrid": RirConfig(method=Method.HYBRID),
           "mixed": replace(FEW, hybrid_share=0.5), "all": replace(FEW, hybrid_share=0.3, ism_share=0.3)}


@pytest.mark.parametrize("bank", [None, 6])
@pytest.mark.parametrize("name", METHODS)
def test_simulator_renders_every_method_in_any_chunk_and_on_any_device(name, bank):
    dry, done = torch.randn(5, 2, 1000, generator=seeded(9)), []
    for chunk in (None, 2):
        simulate = Simulator(replace(SMALL, bank=bank), METHODS[name], MixtureConfig(), SimulatorConfig(chunk), CHEAP)
        if bank:
            simulate.fill_bank(generator=seeded(0))
        drawn = simulate.draw(5, 1000, generator=seeded(1))
        done += [simulate.render(dry, drawn.to("cpu")), simulate(dry, generator=seeded(1))]
    for other in done[1:]:
        assert torch.equal(other.scenes.src_pos, done[0].scenes.src_pos)
        close(other.audio, done[0].audio, 2e-6)
        close(other.early, done[0].early, 2e-6)
    assert done[0].audio.abs().max() > 0


def test_methods_differ_in_the_same_rooms():
    dry = torch.randn(4, 2, 1000, generator=seeded(9))
    audio = {name: Simulator(SMALL, cfg, ism=CHEAP)(dry, generator=seeded(1)).audio for name, cfg in METHODS.items()}
    assert not any(torch.equal(audio[a], audio[b]) for a in audio for b in audio if a < b)
    again = Simulator(SMALL, METHODS["ism"], ism=IsmConfig(Absorption.EYRING, max_order=1))(dry, generator=seeded(1))
    assert not torch.equal(again.audio, audio["ism"])


@pytest.mark.parametrize("name", ["ism", "hybrid", "mixed", "all"])
def test_simulator_refuses_a_law_with_infeasible_rooms_at_once(name):
    with pytest.raises(ValueError, match=r"^scene.rt60_s = 0.1 s is infeasible in a room of \[10.0, 6.0, 4.0\] m: by "
                                         r"ism.absorption=sabine it must be >= 0.1589 s"):
        Simulator(rir=METHODS[name])
    Simulator(rir=METHODS[name], ism=EYRING)
    Simulator(rir=METHODS[name], ism=IsmConfig(clamp_infeasible=True))
    Simulator(rir=METHODS["fra"])


def test_evaluation_set_is_in_the_rooms_of_the_method():
    """Its digest covers what each method draws; the exact one draws nothing but scenes."""
    bank = voices_bank(SpeechConfig(clip_s=0.2, voices_speakers=3, voices_utterances=1, voices_duration_s=0.3),
                       sample_rate=16000, generator=seeded(0))
    sets = {name: [build_eval_set(EvalConfig(num_clips=4), SMALL, cfg, CHEAP, bank, 0.2, None, torch.device("cpu"))
                   for _ in range(2)] for name, cfg in METHODS.items()}
    for first, again in sets.values():
        assert first.digest == again.digest and torch.equal(first.mixture.audio, again.mixture.audio)
        assert first.mixture.sensor_snr_db.tolist() == first.mixture.diffuse_snr_db.tolist() == [float("inf")] * 4
    assert len({first.digest for first, _ in sets.values()}) == len(METHODS)
    assert torch.equal(sets["ism"][0].mixture.scenes.src_pos, sets["fra"][0].mixture.scenes.src_pos)
    assert not torch.allclose(sets["ism"][0].mixture.audio, sets["fra"][0].mixture.audio)


def test_choices_of_fra_rir_are_refused_for_other_methods_in_their_own_words():
    with pytest.raises(ValueError, match="^rir.decay is a choice of rir.method=fra only, got measured with ism$"):
        RirConfig(method="ism", decay="measured")
