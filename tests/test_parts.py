"""A CPU simulates a batch in small parts: the same as at once, whoever is in a part."""
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ssl_gpu import runtime
from ssl_gpu.directivity import Pattern
from ssl_gpu.hybrid import find_hybrid_arrivals
from ssl_gpu.ism import IsmConfig, direct_images
from ssl_gpu.laws import Decay
from ssl_gpu.mixture import MixtureConfig, draw_mixture, mix
from ssl_gpu.rir import RirConfig, draw_images, find_arrivals, last_direct_slot, last_early_slot, render_rir
from ssl_gpu.rooms import draw_rooms, render_direct, render_rooms
from ssl_gpu.scene import SceneBatch, SceneConfig, make_scenes, original_scenes, sample_scenes
from ssl_gpu.simulator import Simulator, SimulatorConfig
from ssl_gpu.synthesis import PART

ISM = IsmConfig("eyring", hybrid_order=2)
FEW = RirConfig(num_images=(20, 300))
LAWS = {
    "reference": FEW,
    "patterns, measured decay": replace(FEW, decay=Decay.MEASURED, src_pattern=Pattern.CARDIOID),
    "octaves": replace(FEW, band_rt60_ratio=((0.5, 1.0),) * 7),
    "hybrid": RirConfig(method="hybrid"),
    "mixed": replace(FEW, hybrid_share=0.5),
    "mixed, exact rooms too": replace(FEW, hybrid_share=0.3, ism_share=0.2),
}
SCENE = SceneConfig(rt60_s=(0.1, 0.2), room_max_m=(5, 4, 3))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(law, count=2 * PART + 3):
    generator = seeded()
    scenes = sample_scenes(SCENE, count, generator=generator)
    return scenes, draw_rooms(ISM, law, scenes, generator=generator)


def assert_same(found, expected):
    for name in ("full", "early", "length"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("name", LAWS)
def test_rooms_do_not_depend_on_their_company(name):
    """To the last bit: scenes alone, and in another order."""
    scenes, draw = drawn(LAWS[name])
    whole = render_rooms(ISM, LAWS[name], scenes, draw)
    assert len(scenes) > 2 * PART
    for index in (0, 7, len(scenes) - 1):
        some = slice(index, index + 1)
        assert_same(render_rooms(ISM, LAWS[name], scenes[some], draw[some]), whole[some])
    order = torch.randperm(len(scenes), generator=seeded())
    assert_same(render_rooms(ISM, LAWS[name], scenes[order], draw[order]), whole[order])


@pytest.mark.parametrize("name", LAWS)
def test_parts_are_what_a_gpu_renders_at_once(name, monkeypatch):
    """There every scene has room for the images of the most, and both methods find arrivals for all."""
    scenes, draw = drawn(LAWS[name])
    parts = render_rooms(ISM, LAWS[name], scenes, draw)
    monkeypatch.setattr(runtime, "prefers_parts", lambda device: False)
    whole = render_rooms(ISM, LAWS[name], scenes, draw)
    scale = float(whole.full.abs().max())
    assert_close(parts.full, whole.full, rtol=0, atol=1e-7 * scale)
    assert_close(parts.early, whole.early, rtol=0, atol=1e-7 * scale)


def test_parts_are_rendered_with_no_more_images_than_they_have(monkeypatch):
    from ssl_gpu import rir
    scenes, draw = drawn(FEW, 3 * PART)
    rooms, find = [], rir.find_arrivals
    monkeypatch.setattr(rir, "find_arrivals", lambda cfg, scenes, images: (
        rooms.append((len(scenes), images.ratio.shape[-1])) or find(cfg, scenes, images)))
    render_rir(FEW, scenes, draw.images)
    counts = draw.images.active.sum(-1).sort().values.view(3, PART)
    assert rooms == [(PART, min(-(-int(most) // 64) * 64, 300)) for most in counts.amax(1)]
    assert rooms[0][1] < rooms[-1][1] == 300


def test_early_parts_beside_exact_rooms_do_not_depend_on_the_chunk():
    law = replace(LAWS["mixed, exact rooms too"], ism_share=0.15)
    dry, found = torch.randn(12, 2, 1500, generator=seeded()), []
    for chunk in (12, 2):
        simulator = Simulator(SCENE, law, MixtureConfig(), SimulatorConfig(chunk), ISM)
        found.append(simulator.render(dry, simulator.draw(12, 1500, generator=seeded())))
    assert torch.equal(found[0].audio, found[1].audio) and torch.equal(found[0].early, found[1].early)


def test_a_mixed_batch_finds_arrivals_by_those_methods_that_a_part_has(monkeypatch):
    from ssl_gpu import rooms
    law, found = LAWS["mixed"], {"find_arrivals": 0, "find_hybrid_arrivals": 0}
    scenes, draw = drawn(law, 64)

    def counting(name, function):
        def call(*arguments):
            arrivals = function(*arguments)
            found[name] += len(arrivals.slot)
            return arrivals

        monkeypatch.setattr(rooms, name, call)

    counting("find_arrivals", find_arrivals)
    counting("find_hybrid_arrivals", find_hybrid_arrivals)
    render_rooms(ISM, law, scenes, draw)
    assert sum(found.values()) <= 64 + PART and min(found.values()) > PART  # one part at most has both


@pytest.mark.parametrize("early", [False, True])
def test_mixtures_do_not_depend_on_the_parts(early, monkeypatch):
    law = replace(FEW, early=early)
    simulator = Simulator(SCENE, law, MixtureConfig(sensor_snr_db=(0, 20), diffuse_snr_db=(0, 20)),
                          SimulatorConfig(2 * PART))
    dry = torch.randn(2 * PART + 5, 2, 3000, generator=seeded())
    draw = simulator.draw(len(dry), 3000, generator=seeded())
    parts = simulator.render(dry, draw)
    assert parts.audio.is_contiguous() and (parts.early is None) == (not early)
    direct = simulator.render_direct(dry, draw)
    monkeypatch.setattr(runtime, "prefers_parts", lambda device: False)
    whole = simulator.render(dry, draw)
    scale = float(whole.audio.abs().max())
    assert_close(parts.audio, whole.audio, rtol=0, atol=1e-6 * scale)
    assert_close(direct, simulator.render_direct(dry, draw), rtol=0, atol=1e-6 * scale)
    if early:
        assert_close(parts.early, whole.early, rtol=0, atol=1e-6 * scale)


# ---- what is known of the distances, without asking a device ----


def batches():
    """Scenes by name: of laws with large arrays, of far and near sources, of one's own, and the original's."""
    for name, law in {"default": SceneConfig(), "wide": SceneConfig(num_mics=4, mic_spacing_m=0.5, rotate=True),
                      "ball": SceneConfig(array_radius_m=0.5, num_mics=3), "jitter": SceneConfig(spacing_jitter_m=0.01),
                      "no place": replace(SCENE, src_dist_m=(0.2, 0.3), room_min_m=(5, 4, 3))}.items():
        yield name, sample_scenes(law, 400, generator=seeded())
    yield "own", make_scenes([[6, 5, 3]], [0.4], [[[0.1, 0.1, 0.1]]], [[[5.9, 4.9, 2.9], [3, 3, 1]]])
    yield "original", original_scenes()[:500]


@pytest.mark.parametrize("window", [(-6, 50), (-1000, 1000), (-20, -10)])
def test_direct_and_early_arrivals_are_where_they_may_be(window):
    for name, scenes in batches():
        rir = RirConfig(num_images=(50, 50), early_window_ms=window)
        images = draw_images(rir, replace(scenes, num_images=None), generator=seeded())
        arrivals = find_arrivals(rir, scenes, images)
        direct, early = last_direct_slot(rir, scenes), last_early_slot(rir, scenes)
        assert int(arrivals.slot[..., 0].max()) <= direct, name
        assert not (arrivals.early & (arrivals.slot > early)).any(), name
        if name == "default":
            assert int(arrivals.slot[..., 0].max()) > 0.2 * direct      # the bound is one
        walls, _ = direct_images(ISM, rir, scenes)
        assert int(walls.max()) <= direct, name


def test_early_arrivals_of_hybrid_rooms_are_where_they_may_be():
    for name, scenes in batches():
        some = scenes[:50]
        law = RirConfig(method="hybrid")
        tail = draw_rooms(ISM, law, some, generator=seeded()).tail
        arrivals = find_hybrid_arrivals(replace(ISM, clamp_infeasible=True), law, some, tail)
        assert not (arrivals.early & (arrivals.slot > last_early_slot(law, some))).any(), name


def test_a_source_beyond_what_is_known_is_refused():
    mic, near, far = [[[1, 1, 1]]], [[[2, 1, 1]]], torch.tensor([[[14.0, 1.0, 1.0]]], dtype=torch.float64)
    scenes = make_scenes([[20, 5, 3]], [0.3], mic, near)
    assert scenes.max_dist == 5
    moved, told = replace(scenes, src_pos=far), "scenes.max_dist must be a distance that no source exceeds, or None"
    with pytest.raises(ValueError, match=f"^{told} where positions were replaced, got 5 m and a source 13 m from"):
        render_direct(ISM, FEW, moved, None)
    with pytest.raises(ValueError, match=f"^{told}"):
        render_rir(FEW, moved, draw_images(FEW, moved, generator=seeded()))
    for known in (replace(moved, max_dist=None), make_scenes([[20, 5, 3]], [0.3], mic, far)):
        assert render_direct(ISM, FEW, known, None).full[..., 600:700].abs().max() > 1e-4  # 13 m are 612 samples
    with pytest.raises(ValueError, match="^scene 0: source 0 must be within max_dist=3 m of microphone 0, got 13 m$"):
        make_scenes([[20, 5, 3]], [0.3], mic, far, max_dist=3)
    assert make_scenes([[20, 5, 3]], [0.3], mic, near, max_dist=15).max_dist == 15
    for wrong in (0, -1.0, math.nan, math.inf, "5", [5]):
        with pytest.raises(ValueError, match="^max_dist must be a finite number of m above 0, got "):
            make_scenes([[20, 5, 3]], [0.3], mic, near, max_dist=wrong)
        with pytest.raises(ValueError, match="^max_rt60 must be a finite number of s above 0, got "):
            make_scenes([[20, 5, 3]], [0.3], mic, near, max_rt60=wrong)


def test_the_distance_of_the_farthest_of_many_microphones_is_no_refusal():
    """Of more than 25 torch's distances are products of matrices, some digits off."""
    place = torch.rand(200, 31, 3, generator=seeded(), dtype=torch.float64) + 0.5
    for one in place.split(1):
        farthest = float((one[0, :1] - one[0, 1:]).norm(dim=-1).max())
        scenes = make_scenes([[4, 3, 3]], [0.3], one[:, 1:], one[:, :1], max_dist=farthest)
        assert last_direct_slot(FEW, scenes) > 0


def test_scenes_of_ones_own_have_alike_shapes():
    """Or a compiled simulator would be compiled anew for every batch of talkers who move."""
    found = {make_scenes([[6, 5, 3]], [0.3], [[[1, 1, 1]]], [[[1.2 + 0.1 * step, 1, 1]]]).max_dist
             for step in range(30)}
    assert found == {5.0}


def test_nothing_is_known_of_scenes_that_nothing_is_known_of():
    scenes = replace(sample_scenes(SCENE, 3, generator=seeded()), max_dist=None)
    assert last_direct_slot(FEW, scenes) is None and last_early_slot(FEW, scenes) is None
    known = replace(scenes, max_dist=3.0)
    assert SceneBatch.concatenate([scenes, known]).max_dist is None
    assert SceneBatch.concatenate([known, replace(known, max_dist=4.0)]).max_dist == 4.0


@pytest.mark.parametrize("name", ["octaves", "mixed, exact rooms too"])
def test_ends_are_said_of_no_rooms_that_ring_on_or_are_exact(name):
    """Of a bank, too, whose first chunk may have none."""
    scenes, draw = drawn(LAWS[name])
    assert render_rooms(ISM, LAWS[name], scenes, draw).early_end is None
    law = replace(LAWS[name], ism_share=0.1 if LAWS[name].ism_share else 0)
    simulator = Simulator(replace(SCENE, bank=12), law, MixtureConfig(), SimulatorConfig(2), ISM)
    simulator.fill_bank(generator=seeded(1))
    exact = (simulator.bank_method == 1).tolist() if law.ism_share else [True]
    assert any(exact) and simulator.bank[1].early_end is None and simulator.bank[1].early.shape[0] == 12
    assert not all(exact[:2]) or not law.ism_share                      # else the first chunk would have told


@pytest.mark.parametrize("unlike", [False, True])
def test_mixtures_hear_all_of_what_ends_early(unlike):
    """Convolved to their ends or to the last tap, by microphones that begin before 0, too."""
    scenes, draw = drawn(FEW, 3)
    rirs = render_rooms(ISM, FEW, scenes, draw)
    assert rirs.early_end < rirs.early.shape[-1]
    dry, mixing = torch.randn(3, 2, 2000, generator=seeded()), MixtureConfig(mic_phase_deg=20.0 * unlike)
    noise = draw_mixture(mixing, 3, 2, 2, 2000, generator=seeded())
    found, whole = (mix(dry, some, scenes, noise).early for some in (rirs, replace(rirs, early_end=None)))
    assert_close(found, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


@pytest.mark.parametrize("count", [1, PART + 2])
@pytest.mark.parametrize("name", ["reference", "hybrid", "mixed, exact rooms too"])
def test_gradients_reach_the_scenes_through_full_and_early(name, count):
    """Which transforms of parts of one tensor, one added to the other, might lose."""
    law = LAWS[name]
    scenes, draw = drawn(law, count)

    def slope(*kinds):
        place = scenes.src_pos.clone().requires_grad_()
        rirs = render_rooms(ISM, law, replace(scenes, src_pos=place), draw)
        sum(getattr(rirs, kind).square().sum() for kind in kinds).backward()
        return place.grad

    full, early, both = slope("full"), slope("early"), slope("full", "early")
    assert full.norm() > 0 and early.norm() > 0
    assert_close(both, full + early, rtol=1e-4, atol=1e-6 * float(both.norm()))


@pytest.mark.parametrize("noisy", [False, True])
def test_a_scene_without_places_is_silent_wherever_its_mixture_is_put(noisy):
    scenes, draw = drawn(FEW, 3)
    rirs = render_rooms(ISM, FEW, scenes, draw)
    rirs.full[1], rirs.early[1] = torch.nan, torch.nan
    scenes = replace(scenes, valid=torch.tensor([True, False, True]))
    dry, mixing = torch.randn(3, 2, 900, generator=seeded()), MixtureConfig(sensor_snr_db=(0, 9) if noisy else None)
    noise = draw_mixture(mixing, 3, 2, 2, 900, generator=seeded())
    plain = mix(dry, rirs, scenes, noise)
    room, early_room = torch.full((3, 5, 900), 7.0), torch.full((3, 4, 2, 900), 7.0)  # with gaps between the rows
    put = mix(dry, rirs, scenes, noise, out=room[:, 1:3], early_out=early_room[:, :2])
    for found, expected, there in ((put.audio, plain.audio, room[:, 1:3]), (put.early, plain.early, early_room[:, :2])):
        assert_close(found, expected, rtol=0, atol=0)
        assert_close(there, expected, rtol=0, atol=0)
        assert not expected[1].any() and expected[0].any()
    assert (room[:, 3:] == 7).all() and (early_room[:, 2:] == 7).all()


@pytest.mark.parametrize("name", ["reference", "hybrid", "mixed"])
def test_short_transforms_leave_out_what_rings_on_for_long(name):
    """Early parts and the direct sound, of a law whose RIRs are long: 1e-7 of them, and silence behind."""
    law, generator = LAWS[name], seeded()
    scenes = sample_scenes(replace(SCENE, rt60_s=(0.4, 0.6)), 5, generator=generator)
    draw, unknown = draw_rooms(ISM, law, scenes, generator=generator), replace(scenes, max_dist=None)
    short, long = (render_rooms(ISM, law, some, draw) for some in (scenes, unknown))
    assert short.full_end is None and long.early_end is None and short.early_end < 0.5 * short.early.shape[-1]
    direct, expected = (render_direct(ISM, law, some, draw.method) for some in (scenes, unknown))
    assert expected.full_end is None and direct.full_end < short.early_end
    for found, whole, end in ((short.early, long.early, short.early_end),
                              (direct.full, expected.full, direct.full_end)):
        assert found.shape == whole.shape and not found[..., end:].any()
        assert float((found.double() - whole).norm() / whole.double().norm()) < 3e-7
    assert torch.equal(short.full[..., short.early_end:], long.full[..., short.early_end:])
    assert (direct.full.abs().amax(-1) > 1e-3).all()                    # 1/64 at 1 m
