"""The exact image-source method, against a slow one in another formulation, and against what can be said by hand."""
import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from oracle import absorption_of, cosine_between, decimation_chain, gain, look, mirror_images
from torch.testing import assert_close

from ssl_gpu import ism
from ssl_gpu.directivity import Pattern
from ssl_gpu.ism import (Absorption, IsmConfig, Shoebox, check_feasible, check_law, image_table, render_ism,
                         shortest_rt60, trace_images, wall_absorption)
from ssl_gpu.measure import measure_rirs
from ssl_gpu.rir import RirConfig, draw_images, find_arrivals, render_rir
from ssl_gpu.scene import SceneConfig, make_scenes, sample_scenes

P = Pattern
EYRING = IsmConfig(Absorption.EYRING)
CLAMPED = IsmConfig(clamp_infeasible=True)
SHORT = SceneConfig(room_min_m=(3.0, 2.6, 2.4), room_max_m=(3.4, 3.1, 2.7), rt60_s=(0.08, 0.1), rotate=True)
CUT = 7  # taps at the end that the reference's own truncation spoils


def draw(scene=SHORT, batch=3, seed=0):
    return sample_scenes(scene, batch, generator=torch.Generator().manual_seed(seed))


def oracle_rir(cfg, rir_cfg, scenes, index):
    """Full and early RIR [mic, src, tap] of one scene, on the 64x grid, through the slow chain."""
    room, rt60 = scenes.room_dim[index].tolist(), float(scenes.rt60[index])
    coefficient = math.sqrt(1 - absorption_of(cfg.absorption.value, room, rt60))
    grid = 64 * rir_cfg.sample_rate
    slots = math.ceil(np.float32(rt60) * np.float32(grid))
    mic_pos, src_pos = scenes.mic_pos[index].numpy(), scenes.src_pos[index].numpy()
    train = np.zeros((2, len(mic_pos), len(src_pos), slots))
    for m, s in np.ndindex(train.shape[1:3]):
        mic_look, src_look = look(scenes.mic_orientation[index, m].tolist()), \
            look(scenes.src_orientation[index, s].tolist())
        direct = round(float(np.linalg.norm(mic_pos[m] - src_pos[s])) * grid / 340)
        window = [direct + math.floor(grid * ms / 1000) for ms in rir_cfg.early_window_ms]
        for offset, signs, order in mirror_images(room, src_pos[s], mic_pos[m], 340 * rt60, cfg.max_order):
            dist = float(np.linalg.norm(offset))
            slot = round(dist * grid / 340)
            if slot < slots:
                amplitude = coefficient ** order / dist
                if rir_cfg.src_pattern is not P.OMNI:
                    amplitude *= gain(rir_cfg.src_pattern.value, cosine_between(src_look * signs, -offset))
                if rir_cfg.mic_pattern is not P.OMNI:
                    amplitude *= gain(rir_cfg.mic_pattern.value, cosine_between(mic_look, offset))
                train[0, m, s, slot] += amplitude
                train[1, m, s, slot] += amplitude * (window[0] <= slot < window[1])
    return decimation_chain(train, rir_cfg.sample_rate)


def relative_l2(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("cfg, rir_cfg, scene", [
    (IsmConfig(), RirConfig(), SHORT),
    (EYRING, RirConfig(sample_rate=8000, early_window_ms=(0, 10)), replace(SHORT, num_mics=1, num_src=3)),
    (IsmConfig(max_order=4), RirConfig(), replace(SHORT, num_mics=3, array_radius_m=0.4, num_src=1)),
    (IsmConfig(max_order=0), RirConfig(early_window_ms=(-2, 3)), SHORT),
    (EYRING, RirConfig(src_pattern=P.CARDIOID, mic_pattern=P.HYPER_CARDIOID),
     replace(SHORT, num_src=1, rt60_s=(0.05, 0.06), mic_orientation_deg=(30, 70))),
    (IsmConfig(), RirConfig(src_pattern=P.HALF_OMNI, mic_pattern=P.BIDIRECTIONAL),
     replace(SHORT, num_src=1, num_mics=1)),
])
def test_equals_the_slow_oracle(cfg, rir_cfg, scene):
    """To 5e-7, full and early, every pair of a ragged batch."""
    scenes = draw(scene, batch=2)
    rirs = render_ism(cfg, rir_cfg, scenes)
    for index in range(2):
        full, early = oracle_rir(cfg, rir_cfg, scenes, index)
        length = int(rirs.length[index])
        assert full.shape[-1] == length and rirs.sample_rate == rir_cfg.sample_rate
        assert relative_l2(rirs.full[index, ..., :length - CUT], full[..., :-CUT]) < 5e-7
        assert relative_l2(rirs.early[index, ..., :length - CUT], early[..., :-CUT]) < 5e-7
        assert (rirs.full[index, ..., length:] == 0).all() and (rirs.early[index, ..., length:] == 0).all()


ODD = {  # room, rt60, microphones, source, configuration
    "source on a wall": ([3, 2.6, 2.4], 0.06, [[1, 1, 1], [2.5, 1.1, 1.2]], [0, 1.3, 1.1], EYRING, RirConfig()),
    "source in a corner": ([3, 2.6, 2.4], 0.06, [[1, 1, 1]], [3, 2.6, 2.4], EYRING, RirConfig()),
    "both on a wall": ([3, 2.6, 2.4], 0.06, [[3, 1.2, 1]], [3, 1, 1], EYRING, RirConfig()),
    "cardioid on a wall": ([3, 2.6, 2.4], 0.05, [[1, 1.2, 0]], [3, 1, 1], EYRING,
                           RirConfig(src_pattern=P.CARDIOID, mic_pattern=P.BIDIRECTIONAL)),
    "middle of a cube": ([3, 3, 3], 0.06, [[1.5, 1.5, 1.5]], [1.5, 1.5, 2.0], EYRING, RirConfig()),
    "corridor": ([20, 2, 2.5], 0.07, [[1, 1, 1], [19, 1.9, 2.4]], [4, 1, 1], EYRING, RirConfig()),
    "long": ([3, 2.6, 2.4], 0.4, [[1, 1, 1]], [1.5, 1, 1], IsmConfig(max_order=3), RirConfig(sample_rate=2000)),
    "hardly longer than the direct path": ([3, 2.6, 2.4], 0.004, [[1, 1, 1]], [1.5, 1, 1],
                                           CLAMPED, RirConfig()),
    "48 kHz": ([3, 2.6, 2.4], 0.04, [[1, 1, 1]], [2, 2, 2], EYRING, RirConfig(sample_rate=48000)),
}


@pytest.mark.parametrize("name", ODD)
def test_equals_the_slow_oracle_in_odd_rooms_and_places(name):
    room, rt60, mics, src, cfg, rir_cfg = ODD[name]
    scenes = make_scenes([room], [rt60], [mics], [[src]])
    full, early = oracle_rir(cfg, rir_cfg, scenes, 0)
    rirs = render_ism(cfg, rir_cfg, scenes)
    assert relative_l2(rirs.full[0, ..., :-CUT], full[..., :-CUT]) < 5e-7
    assert relative_l2(rirs.early[0, ..., :-CUT], early[..., :-CUT]) < 5e-7


def test_images_as_near_as_they_can_be_are_found():
    """Source and microphone in opposite corners: cell (8, 8, 8) is 7 diagonals away, 1 % less than is heard."""
    room = [3.0, 2.6, 2.4]
    inside = [side - 0.001 for side in room]
    scenes = make_scenes([room], [1.01 * 7 * math.hypot(*room) / 340], [[inside]], [[[0.001] * 3]])
    full, _ = oracle_rir(EYRING, RirConfig(), scenes, 0)
    assert relative_l2(render_ism(EYRING, RirConfig(), scenes).full[0, ..., :-CUT], full[..., :-CUT]) < 5e-7


# ---- by hand ----


def trace(scenes, order, cfg=CLAMPED, rir_cfg=RirConfig()):
    """Distance in m, from the slot, and amplitude [mic, src, image] of the first scene."""
    table = torch.tensor(image_table(order)).T[:, None, None, None]
    slot, amplitude = trace_images(rir_cfg, Shoebox.of(cfg, scenes), table)
    return slot[0].double() * 340 / (64 * rir_cfg.sample_rate), amplitude[0].double()


def test_table_counts_the_images_of_every_order():
    """(2 n^3 + 3 n^2 + 4 n) 2/3 + 1 cells within n steps; sorted, the source's own first; none twice."""
    for order, count in enumerate((1, 7, 25, 63, 129, 231)):
        cells = image_table(order)
        assert len(cells) == len(set(cells)) == count
        orders = [sum(map(abs, cell)) for cell in cells]
        assert orders == sorted(orders) and orders[0] == 0 and orders[-1] == order


def test_first_reflections_are_where_mirrors_put_them():
    """6 x 5 x 3 m at 0.3 s, absorption 0.387 by Sabine; source (1, 2, 1), microphone (4, 2, 1): by hand."""
    scenes = make_scenes([[6, 5, 3]], [0.3], [[[4, 2, 1]]], [[[1, 2, 1]]])
    absorption = 24 * math.log(10) / 340 * 90 / 126 / 0.3
    kept = math.sqrt(1 - absorption)
    expected = {(0, 0, 0): (3, 1), (-1, 0, 0): (5, kept), (1, 0, 0): (7, kept), (0, -1, 0): (5, kept),
                (0, 1, 0): (math.sqrt(9 + 36), kept), (0, 0, -1): (math.sqrt(9 + 4), kept),
                (0, 0, 1): (math.sqrt(9 + 16), kept)}
    dist, amplitude = trace(scenes, 1)
    for index, cell in enumerate(image_table(1)):
        there, level = expected[cell]
        assert abs(float(dist[0, 0, index]) - there) <= 0.5 * 340 / 1024000 + 1e-12
        assert abs(float(amplitude[0, 0, index]) * there / level - 1) < 1e-6
    assert set(image_table(1)) == set(expected)


def test_second_reflections_are_mirrors_of_mirrors():
    """Straight there and back along x: cell 2 holds the source itself, two rooms on; cell 1 its mirror image."""
    scenes = make_scenes([[6, 5, 3]], [0.3], [[[4, 2, 1]]], [[[1, 2, 1]]])
    dist, _ = trace(scenes, 2)
    cells = image_table(2)
    assert_close(dist[0, 0, cells.index((2, 0, 0))].item(), 9.0, rtol=0, atol=2e-4)    # at x = 13
    assert_close(dist[0, 0, cells.index((-2, 0, 0))].item(), 15.0, rtol=0, atol=2e-4)  # at x = -11
    corner = math.hypot(5, 4)                                                            # at (-1, -2, 1)
    assert_close(dist[0, 0, cells.index((-1, -1, 0))].item(), corner, rtol=0, atol=2e-4)


def test_symmetric_places_hear_alike():
    """A source on the vertical axis of a square room: four microphones around it have one and the same RIR."""
    around = [[2 + x, 2 + y, 1.2] for x, y in ((0.5, 0.3), (-0.5, 0.3), (0.5, -0.3), (-0.3, 0.5))]
    rirs = render_ism(CLAMPED, RirConfig(), make_scenes([[4, 4, 3]], [0.2], [around], [[[2, 2, 1.9]]])).full[0, :, 0]
    for other in rirs[1:]:
        assert_close(other, rirs[0], rtol=0, atol=1e-6 * float(rirs[0].abs().max()))


def test_source_and_microphone_may_change_places():
    """Omnidirectional, any room: reciprocity. With a cardioid on one side it holds if the pattern moves along."""
    scenes = draw(replace(SHORT, num_mics=1, num_src=1, mic_orientation_deg=(40, 90)))
    swapped = replace(scenes, mic_pos=scenes.src_pos, src_pos=scenes.mic_pos, mic_orientation=scenes.src_orientation,
                      src_orientation=scenes.mic_orientation)
    for there, back in ((RirConfig(), RirConfig()),
                        (RirConfig(src_pattern=P.CARDIOID), RirConfig(mic_pattern=P.CARDIOID))):
        first, second = render_ism(CLAMPED, there, scenes).full, render_ism(CLAMPED, back, swapped).full
        assert_close(first, second, rtol=0, atol=2e-6 * float(first.abs().max()))


def test_walls_that_keep_everything_leave_1_over_distance():
    """RT60 of 1000 h: rigid walls; amplitudes up to order 5 are those of free space."""
    scenes = replace(make_scenes([[4, 3, 2.5]], [1.0], [[[1, 1, 1]]], [[[2, 2, 1.5]]]),
                     rt60=torch.tensor([3.6e6], dtype=torch.float64))
    dist, amplitude = trace(scenes, 5)
    assert_close(amplitude * dist, torch.ones_like(dist), rtol=1e-4, atol=0)


def test_walls_that_keep_a_hundredth_leave_the_direct_path():
    """Absorption 0.99 takes 20 dB at each reflection: nothing but the direct path is within 20 dB of it."""
    scenes = draw(replace(SHORT, rt60_s=(0.04, 0.04), src_dist_m=(0.2, 1.0)))
    whole, direct = (render_ism(replace(CLAMPED, max_order=order), RirConfig(), scenes).full for order in (None, 0))
    assert ((whole - direct).abs().amax(-1) < 0.1 * direct.abs().amax(-1)).all()
    assert ((whole - direct).abs().amax(-1) > 0).all()


def test_order_zero_is_the_direct_path_of_fra_rir():
    """But for the reference's 1e-3 m^2 under the root, d to sqrt(d^2 + 1e-3), and its rounding up to the next slot."""
    scenes = draw(SceneConfig(rt60_s=(0.3, 0.4), src_dist_m=(0.2, 5.0)), batch=20)
    images = draw_images(RirConfig(num_images=(1, 1)), scenes, generator=torch.Generator())
    fra = find_arrivals(RirConfig(), scenes, images)
    slot, amplitude = trace_images(RirConfig(), Shoebox.of(IsmConfig(), scenes), torch.zeros(3, 1, 1, 1, 1).long())
    dist = torch.cdist(scenes.mic_pos, scenes.src_pos)
    longer = (dist.square() + 1e-3).sqrt()
    apart = fra.slot[..., 0] - slot[..., 0] - (longer - dist) * 1024000 / 340
    assert (apart > -0.5 - 1e-6).all() and (apart < 1.5 + 1e-6).all()
    assert_close(amplitude[..., 0].double() * dist / longer, fra.amplitude[..., 0].double(), rtol=1e-6, atol=0)
    far = dist.amin((1, 2)) > 2                                        # where the two agree to 1/32 sample
    assert far.sum() > 2
    exact = render_ism(IsmConfig(max_order=0), RirConfig(), scenes).full[far]
    direct = render_rir(RirConfig(), scenes, replace(images, active=torch.zeros_like(images.active))).full[far]
    assert relative_l2(exact, direct) < 0.05


# ---- batches ----


def test_every_row_of_a_ragged_batch_is_the_scene_alone():
    scenes = draw(replace(SHORT, rt60_s=(0.06, 0.2), room_max_m=(6.0, 5.0, 3.5)), batch=5)
    cfg = RirConfig(src_pattern=P.CARDIOID)
    batch = render_ism(CLAMPED, cfg, scenes)
    for index in range(5):
        one = replace(scenes[index:index + 1], max_rt60=float(scenes.rt60[index]))
        alone = render_ism(CLAMPED, cfg, one)
        length = int(alone.length)
        assert alone.full.shape == (1, 2, 2, length) and int(batch.length[index]) == length
        for kind in ("full", "early"):
            assert_close(getattr(batch, kind)[index, ..., :length], getattr(alone, kind)[0], rtol=0,
                         atol=5e-7 * float(alone.full.abs().max()))
            assert (getattr(batch, kind)[index, ..., length:] == 0).all()


def test_blocks_bound_the_memory_and_change_nothing(monkeypatch):
    scenes = draw(batch=4)
    whole = render_ism(CLAMPED, RirConfig(), scenes)
    monkeypatch.setattr(ism, "CELLS", 997)
    monkeypatch.setattr(ism, "TRAIN_SLOTS", 1)
    parts = render_ism(CLAMPED, RirConfig(), scenes)
    for kind in ("full", "early"):
        expected = getattr(whole, kind)
        assert_close(getattr(parts, kind), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert torch.equal(parts.length, whole.length)


def test_no_early_rir_unless_asked_and_the_full_one_is_the_same():
    scenes = draw()
    without, both = (render_ism(CLAMPED, RirConfig(early=early), scenes) for early in (False, True))
    assert without.early is None
    assert_close(without.full, both.full, rtol=0, atol=1e-6 * float(both.full.abs().max()))


# ---- reverberation time ----


def test_absorption_of_a_known_room():
    room, rt60 = torch.tensor([[6.0, 5, 3]], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    assert abs(float(wall_absorption(IsmConfig(), room, rt60)) - 0.386989) < 1e-6
    assert abs(float(wall_absorption(EYRING, room, rt60)) - 0.320902) < 2e-6
    for kind in Absorption:
        for rate in (0.3, 1.1):
            assert abs(float(wall_absorption(IsmConfig(kind), room, rt60.new_tensor([rate])))
                       - absorption_of(kind.value, [6.0, 5, 3], rate)) < 1e-12


def test_shortest_rt60_has_walls_of_absorption_99_percent():
    room = torch.tensor([[6.0, 5, 3], [10, 6, 4]], dtype=torch.float64)
    for cfg in (IsmConfig(), EYRING):
        assert_close(wall_absorption(cfg, room, shortest_rt60(cfg, room)), torch.full((2,), 0.99).double())
    assert [round(float(t), 4) for t in shortest_rt60(IsmConfig(), room)] == [0.1173, 0.1589]
    assert [round(float(t), 4) for t in shortest_rt60(EYRING, room)] == [0.0252, 0.0342]


def test_an_infeasible_rt60_is_an_error_that_names_the_range():
    scenes = make_scenes([[4, 3, 2.5], [10, 6, 4]], [0.2, 0.12], [[[1, 1, 1]]] * 2, [[[2, 2, 1.5]]] * 2)
    message = ("scene 1: rt60 = 0.12 s is infeasible in a room of [10.0, 6.0, 4.0] m: by ism.absorption=sabine it must "
               "be >= 0.1589 s (eyring: >= 0.03416 s); take ism.absorption=eyring, ism.clamp_infeasible=true (walls of "
               "absorption 0.99) or a longer rt60")
    with pytest.raises(ValueError) as error:
        render_ism(IsmConfig(), RirConfig(), scenes)
    assert str(error.value) == message
    render_ism(EYRING, RirConfig(), scenes)
    check_feasible(IsmConfig(), scenes[:1])


def test_a_law_with_infeasible_rooms_is_refused_before_any_is_drawn():
    message = ("scene.rt60_s = 0.1 s is infeasible in a room of [10.0, 6.0, 4.0] m: by ism.absorption=sabine it must "
               "be >= 0.1589 s (eyring: >= 0.03416 s); take ism.absorption=eyring, ism.clamp_infeasible=true (walls of "
               "absorption 0.99) or a longer scene.rt60_s")
    with pytest.raises(ValueError) as error:
        check_law(IsmConfig(), SceneConfig())
    assert str(error.value) == message
    check_law(CLAMPED, SceneConfig())
    check_law(EYRING, SceneConfig())
    short = SceneConfig(rt60_s=(0.03, 0.04))  # where another formula is no way out
    for cfg, least in ((IsmConfig(), "sabine it must be >= 0.1589"), (EYRING, "eyring it must be >= 0.03416")):
        with pytest.raises(ValueError, match=rf"absorption={least} s \(eyring: >= 0.03416 s\); take "
                                             r"ism.clamp_infeasible=true \(walls of absorption 0.99\) or a longer "
                                             r"scene.rt60_s$"):
            check_law(cfg, short)
    fits = SceneConfig(rt60_s=(0.159, 0.7))
    check_law(IsmConfig(), fits)
    assert (draw(fits, 500).rt60 >= shortest_rt60(IsmConfig(), draw(fits, 500).room_dim)).all()


def test_a_clamped_room_has_walls_of_absorption_99_percent_and_keeps_its_length():
    short = make_scenes([[10, 6, 4]], [0.1], [[[1, 1, 1]]], [[[2, 2, 1.5]]])
    rirs = render_ism(CLAMPED, RirConfig(), short)
    assert float(wall_absorption(CLAMPED, short.room_dim, short.rt60)) == pytest.approx(0.99, abs=1e-12)
    assert rirs.full.shape[-1] == int(rirs.length) == 1600 and torch.isfinite(rirs.full).all()
    feasible = replace(short, rt60=shortest_rt60(CLAMPED, short.room_dim) + 1e-9)
    longer = render_ism(CLAMPED, RirConfig(), replace(feasible, max_rt60=0.2)).full[..., :1590]
    assert_close(rirs.full[..., :1590], longer, rtol=0, atol=1e-6 * float(rirs.full.abs().max()))


@pytest.mark.parametrize("kind, mean", [(Absorption.SABINE, 0.98), (Absorption.EYRING, 1.22)])
def test_measured_decay_is_about_the_rt60_asked_for(kind, mean):
    """T20 / rt60: 0.97 +- 0.19 by Sabine, 1.21 +- 0.13 by Eyring, over 100 rooms of the original law (30 here). The
    decay of a shoebox is not exponential, and slower than Eyring's formula, which supposes a diffuse field."""
    scenes = draw(SceneConfig(num_mics=1, num_src=1, rt60_s=(0.2, 0.5), src_dist_m=(0.5, 5.0)), batch=30, seed=7)
    rirs = render_ism(IsmConfig(kind), RirConfig(early=False), scenes)
    ratio = measure_rirs(rirs, scenes).t20[:, 0, 0] / scenes.rt60
    assert abs(float(ratio.mean()) - mean) < 0.1 and float(ratio.min()) > 0.4


# ---- configuration ----


def test_every_field_of_the_exact_method_changes_its_rir():
    scenes = draw(replace(SHORT, rt60_s=(0.09, 0.1)))
    plain = render_ism(IsmConfig(), RirConfig(), scenes).full
    for change in (dict(absorption=Absorption.EYRING), dict(max_order=2)):
        assert not torch.equal(render_ism(IsmConfig(**change), RirConfig(), scenes).full, plain)
    assert [f.name for f in fields(IsmConfig)] == ["absorption", "clamp_infeasible", "max_order", "hybrid_order",
                                                   "tail_arrivals", "tail_fade"]  # the rest: above, and test_hybrid


@pytest.mark.parametrize("change, message", [
    (dict(max_order=-1), "ism.max_order must be >= 0, or null for all images, got -1"),
    (dict(hybrid_order=-1), "ism.hybrid_order must be >= 0, got -1"),
    (dict(tail_arrivals=0), "ism.tail_arrivals must be >= 1, got 0"),
    (dict(tail_fade=(3.0, 1.0)), "ism.tail_fade must satisfy 0 <= low < high < inf, got (3.0, 1.0)"),
    (dict(tail_fade=(0.0, math.nan)), "ism.tail_fade must satisfy 0 <= low < high < inf, got (0.0, nan)"),
])
def test_a_configuration_that_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError) as error:
        IsmConfig(**change)
    assert str(error.value) == message
