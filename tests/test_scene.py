import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from oracle import ks, ks_uniform
from torch.testing import assert_close

from ssl_gpu import geometry
from ssl_gpu.scene import SceneConfig, make_scenes, original_scenes, sample_scenes

CHANCE = 2.43  # KS distance, in its standard scale, exceeded by chance in 0.0015 % of the cases
TENSORS = ("room_dim", "rt60", "mic_pos", "src_pos", "mic_orientation", "src_orientation", "valid")


def draw(cfg=SceneConfig(), batch=500, seed=0):
    return sample_scenes(cfg, batch, generator=torch.Generator().manual_seed(seed))


def original_law(count, seed):
    """The original sampler, one draw at a time, redrawn until valid: room, rt60, centre, src [count, 2, 3]."""
    rng = np.random.default_rng(seed)
    rooms = []
    for _ in range(count):
        room = rng.uniform([3, 3, 2.5], [10, 6, 4])
        rt60 = rng.uniform(0.1, 0.7)
        centre = rng.uniform(0.5 + 0.05, room - 0.5 - 0.05)
        sources = []
        while len(sources) < 2:
            src = rng.uniform(0.5, room - 0.5)
            if 0.2 <= np.linalg.norm(src - centre) <= 5.0:
                sources.append(src)
        rooms.append((room, rt60, centre, np.array(sources)))
    return [np.array(column) for column in zip(*rooms)]


def original_rooms():
    """The original project's own 3,000 scenes, in the same form."""
    scenes = original_scenes()
    return [t.numpy() for t in (scenes.room_dim, scenes.rt60, scenes.array_centre, scenes.src_pos)]


@pytest.mark.parametrize("other", [lambda: original_law(4000, seed=2), original_rooms], ids=["sampler", "its rooms"])
def test_law_equals_the_original(other):
    """Two-sample KS on every marginal and on what the two sources have in common; 4000 of our scenes against others."""
    scenes = draw(batch=4000, seed=1)
    room, rt60, centre, src = other()
    offset = src - centre[:, None]
    separation = [np.einsum("bi,bi->b", *(o / np.linalg.norm(o, axis=-1, keepdims=True) for o in both.swapaxes(0, 1)))
                  for both in (offset, (scenes.src_pos - scenes.array_centre[:, None]).numpy())]
    pairs = {
        "rt60": (scenes.rt60, rt60), "separation": separation,
        "volume": (scenes.room_dim.prod(-1), room.prod(-1)),
        "distance": (scenes.distance[:, 0], np.linalg.norm(offset, axis=-1)[:, 0]),
        "second distance": (scenes.distance[:, 1], np.linalg.norm(offset, axis=-1)[:, 1]),
        "azimuth": (scenes.azimuth[:, 0], np.arctan2(offset[:, 0, 1], offset[:, 0, 0])),
        "elevation": (scenes.elevation[:, 1], np.arcsin(offset[:, 1, 2] / np.linalg.norm(offset[:, 1], axis=-1))),
        "cone": (torch.cos(scenes.cone_angle[:, 0]), offset[:, 0, 0] / np.linalg.norm(offset[:, 0], axis=-1)),
    }
    for axis, name in enumerate("xyz"):
        pairs["room " + name] = scenes.room_dim[:, axis], room[:, axis]
        pairs["array " + name] = scenes.array_centre[:, axis], centre[:, axis]
        pairs["array share " + name] = (scenes.array_centre / scenes.room_dim)[:, axis], (centre / room)[:, axis]
        pairs["source " + name] = scenes.src_pos[:, 0, axis], src[:, 0, axis]
        pairs["source offset " + name] = (scenes.src_pos[:, 1] - scenes.array_centre)[:, axis], offset[:, 1, axis]
    found = {name: ks(np.asarray(ours), theirs) for name, (ours, theirs) in pairs.items()}
    assert max(found.values()) < CHANCE, found


def test_ks_would_notice_a_law_slightly_off():
    """The yardstick of the test above: 6 % more range in rt60, or 4 m for the 5 m of the farthest source."""
    _, rt60, centre, src = original_law(4000, seed=2)
    assert ks(0.1 + (rt60 - 0.1) * 1.08, rt60) > CHANCE
    dist = np.linalg.norm(src - centre[:, None], axis=-1)[:, 0]
    assert ks(dist[dist < 4], dist) > CHANCE


@pytest.mark.parametrize("cfg", [
    SceneConfig(), SceneConfig(rotate=True, num_mics=6, wall_dist_m=0.3), SceneConfig(array_radius_m=0.4, num_mics=5),
    SceneConfig(mic_array_m=((0, 0, 0), (0.2, 0, 0), (0, 0.3, 0.1)), rotate=True, num_src=5),
    SceneConfig(room_min_m=(4, 4, 3), room_max_m=(4, 4, 3), src_dist_m=(0.5, 3.0), num_src=3),
], ids=["original", "rotated", "random", "given", "fixed room"])
def test_everything_is_where_the_law_allows(cfg):
    scenes = draw(cfg)
    wall = cfg.wall_dist_m - 1e-9
    for position in (scenes.mic_pos, scenes.src_pos):
        assert (position >= wall).all() and (position <= scenes.room_dim[:, None] - wall).all()
    assert (scenes.distance >= cfg.src_dist_m[0] - 1e-9).all() and (scenes.distance <= cfg.src_dist_m[1] + 1e-9).all()
    assert (torch.cdist(scenes.src_pos, scenes.mic_pos) >= 0.05).all()
    for axis in range(3):
        assert (scenes.room_dim[:, axis] >= cfg.room_min_m[axis]).all()
        assert (scenes.room_dim[:, axis] <= cfg.room_max_m[axis]).all()
    assert (scenes.rt60 >= cfg.rt60_s[0]).all() and (scenes.rt60 <= cfg.rt60_s[1]).all()
    assert scenes.max_rt60 == cfg.rt60_s[1] and scenes.valid.all()
    assert scenes.mic_pos.shape == (500, cfg.mic_count, 3) and scenes.src_pos.shape == (500, cfg.num_src, 3)
    assert len(scenes) == 500
    assert all(getattr(scenes, name).dtype == torch.float64 for name in TENSORS if name != "valid")


def test_margins_are_used_to_the_full():
    """5000 scenes come within 2 cm of each limit, so no margin is wider than asked."""
    scenes = draw(batch=5000)
    assert_close(scenes.src_pos.amin((0, 1)), torch.full((3,), 0.5, dtype=torch.float64), atol=0.02, rtol=0)
    assert_close(scenes.array_centre.amin(0), torch.full((3,), 0.55, dtype=torch.float64), atol=0.02, rtol=0)
    assert abs(float(scenes.distance.amax()) - 5) < 0.02
    assert abs(float((scenes.room_dim[:, None] - scenes.src_pos).min()) - 0.5) < 0.005


@pytest.mark.parametrize("num_mics", [1, 2, 4])
def test_linear_array_keeps_its_spacing_and_lies_along_x_unless_rotated(num_mics):
    for rotate in (False, True):
        scenes = draw(SceneConfig(num_mics=num_mics, mic_spacing_m=0.07, rotate=rotate))
        step = scenes.mic_pos[:, 1:] - scenes.mic_pos[:, :-1]
        assert_close(torch.linalg.vector_norm(step, dim=-1), torch.full(step.shape[:2], 0.07, dtype=torch.float64))
        assert step[..., 2].abs().max() < 1e-12 if num_mics > 1 else True
        along_x = (step[..., 1].abs() < 1e-12).all() and (step[..., 0] > 0).all()
        assert bool(along_x) == (not rotate) or num_mics == 1


def test_jitter_makes_the_spacing_uniform_about_its_nominal_one():
    """One spacing per scene, the same between all its microphones; what a localiser is told stays the nominal one."""
    cfg = SceneConfig(num_mics=3, spacing_jitter_m=0.004)
    scenes = draw(cfg, batch=4000)
    step = torch.linalg.vector_norm(scenes.mic_pos[:, 1:] - scenes.mic_pos[:, :-1], dim=-1)
    assert_close(step[:, 0], step[:, 1])
    assert ks_uniform(step[:, 0], 0.096, 0.104) < 2
    assert (cfg.aperture, cfg.radius, SceneConfig().aperture) == pytest.approx((0.2, 0.104, 0.1))
    assert SceneConfig(mic_array_m=((0, 0, 0), (0, 0.3, 0))).aperture == pytest.approx(0.3)
    assert float((scenes.mic_pos - scenes.array_centre[:, None]).norm(dim=-1).max()) <= cfg.radius


def test_rotation_makes_the_axis_uniform_over_the_circle():
    scenes = draw(SceneConfig(rotate=True), batch=4000)
    axis = geometry.azimuth(geometry.array_axis(scenes.mic_pos))
    assert ks_uniform(axis, -math.pi, math.pi) < 2


def test_labels_follow_a_rotated_array():
    """Turning array and sources together about the array's centre leaves every label as it was."""
    scenes = draw()
    turn = torch.linspace(-3, 3, 500, dtype=torch.float64)
    centre = scenes.array_centre[:, None]
    turned = replace(scenes, mic_pos=centre + geometry.rotate_z(scenes.mic_pos - centre, turn),
                     src_pos=centre + geometry.rotate_z(scenes.src_pos - centre, turn))
    assert_close(torch.cos(turned.azimuth - scenes.azimuth), torch.ones(500, 2, dtype=torch.float64))
    for label in ("cone_angle", "elevation", "distance"):
        assert_close(getattr(turned, label), getattr(scenes, label))
    only_array = replace(turned, src_pos=scenes.src_pos)
    assert_close(geometry.wrap_angle(scenes.azimuth - only_array.azimuth), turn[:, None].expand(500, 2))


def test_cosine_of_the_cone_is_that_of_azimuth_times_that_of_elevation():
    scenes = draw(SceneConfig(rotate=True))
    assert_close(torch.cos(scenes.cone_angle), torch.cos(scenes.azimuth) * torch.cos(scenes.elevation))
    assert (scenes.azimuth >= -math.pi).all() and (scenes.azimuth <= math.pi).all()


def test_planar_scenes_have_all_sources_at_the_height_of_the_array():
    """As many as are asked for; in the others nothing is so. Distances keep to the law, and angles near the line of the
    microphones become frequent."""
    mixed, none, every = (draw(SceneConfig(planar_share=share), batch=4000) for share in (0.3, 0.0, 1.0))
    flat = mixed.elevation.abs() < 1e-9
    planar = flat.all(1)
    assert torch.equal(planar, flat.any(1)) and abs(float(planar.double().mean()) - 0.3) < 5 * (0.21 / 4000) ** 0.5
    assert not (none.elevation.abs() < 1e-9).any() and (every.elevation.abs() < 1e-9).all() and every.valid.all()
    assert (every.distance >= 0.2).all() and (every.distance <= 5).all()
    assert_close(every.cone_angle, every.azimuth.abs(), rtol=0, atol=1e-6)
    ends = [float((scenes.cone_angle < math.radians(10)).double().mean()) for scenes in (none, every)]
    assert ends[1] > 3 * ends[0]


def test_labels_of_sources_in_known_places():
    """Array along +y: a source beyond the last microphone is at 0, to its left (-x) at 90 degrees, above it at 90."""
    scenes = make_scenes([[8, 8, 4]], [0.5], [[[4, 3.9, 2], [4, 4.1, 2]]],
                         [[[4, 6, 2], [2, 4, 2], [6, 4, 2], [4, 1, 2], [4, 5, 3]]])
    degrees = torch.tensor([[0, 90, -90, -180, 0.0]], dtype=torch.float64)
    assert_close(torch.rad2deg(scenes.azimuth), degrees)
    assert_close(torch.rad2deg(scenes.cone_angle), torch.tensor([[0, 90, 90, 180, 45.0]], dtype=torch.float64))
    assert_close(torch.rad2deg(scenes.elevation), torch.tensor([[0, 0, 0, 0, 45.0]], dtype=torch.float64))
    assert_close(scenes.distance, torch.tensor([[2, 2, 2, 3, 2 ** 0.5]], dtype=torch.float64))


def test_direction_is_a_unit_vector_in_the_axes_of_the_room():
    """From the centre of the array, whatever the order of its microphones, on which azimuth depends; about 0 at the
    centre, which has no direction."""
    corners = [[-0.05, -0.05, 0], [0.05, -0.05, 0], [0.05, 0.05, 0], [-0.05, 0.05, 0]]  # round the square
    square = [[2 + x, 2 + y, 1 + z] for x, y, z in corners]
    crossed = [square[0], square[1], square[3], square[2]]                              # the last opposite the first
    src = [[4, 2, 1], [2, 3, 1], [3, 2, 2], [2, 2, 1]]
    scenes = make_scenes([[6, 5, 3]] * 2, [0.3] * 2, [square, crossed], [src] * 2)
    half = 0.5 ** 0.5
    expected = torch.tensor([[1, 0, 0], [0, 1, 0], [half, 0, half], [0, 0, 0]], dtype=torch.float64)
    assert_close(scenes.direction, expected.expand(2, 4, 3), rtol=0, atol=1e-3)
    assert_close(scenes.direction[:, :3], expected[:3].expand(2, 3, 3), rtol=0, atol=1e-12)
    assert_close(torch.rad2deg(scenes.azimuth[:, 0]), torch.tensor([-90.0, -45.0], dtype=torch.float64))
    drawn = draw(SceneConfig(rotate=True))
    assert drawn.direction.dtype == torch.float64
    assert_close(drawn.array_centre[:, None] + drawn.distance[..., None] * drawn.direction, drawn.src_pos)
    axis = geometry.azimuth(geometry.array_axis(drawn.mic_pos))[:, None]
    assert_close(geometry.wrap_angle(geometry.azimuth(drawn.direction) - axis), drawn.azimuth)


def test_a_single_microphone_has_distance_and_elevation_but_no_angle_to_an_axis():
    scenes = draw(SceneConfig(num_mics=1))
    for label in ("distance", "elevation", "direction"):
        assert torch.isfinite(getattr(scenes, label)).all()
    for label in ("azimuth", "cone_angle"):
        with pytest.raises(ValueError, match="at least 2 microphones to define an array axis, got 1$"):
            getattr(scenes, label)


def test_given_array_is_placed_as_given_about_its_mean():
    layout = torch.tensor([[0, 0, 0], [0.2, 0, 0], [0.1, 0.3, 0.1]], dtype=torch.float64)
    scenes = draw(SceneConfig(mic_array_m=tuple(map(tuple, layout.tolist()))))
    assert_close(scenes.mic_pos - scenes.mic_pos[:, :1], layout.expand(500, 3, 3), atol=1e-12, rtol=0)


def test_random_arrays_differ_by_scene_and_stay_within_their_ball():
    scenes = draw(SceneConfig(array_radius_m=0.3, num_mics=4), batch=4000)
    offset = scenes.mic_pos - scenes.array_centre[:, None]
    radius = torch.linalg.vector_norm(offset, dim=-1)
    assert radius.max() <= 0.3 + 1e-12 and radius.max() > 0.29 and radius.min() < 0.1
    assert len(offset[:, 0, 0].unique()) == 4000
    azimuth = geometry.azimuth(offset[:, 0])
    assert ks_uniform(azimuth, -math.pi, math.pi) < 2  # no direction is preferred
    assert ks_uniform(offset[:, 2, 2] / radius[:, 2], -1, 1) < 2


def test_random_array_of_two_is_uniform_in_the_ball_but_for_the_centring():
    """Half the distance of two uniform points of a ball: mean 36/70 of the radius."""
    scenes = draw(SceneConfig(array_radius_m=0.3, num_mics=2), batch=4000)
    half = torch.linalg.vector_norm(geometry.array_axis(scenes.mic_pos), dim=-1) / 2
    assert abs(float(half.mean()) / 0.3 - 36 / 70) < 0.01


def test_orientations():
    """Sources look anywhere unless told; microphones along (0, 0); a rotated array turns its microphones with it."""
    scenes = draw(batch=4000)
    for angle in range(2):
        assert ks_uniform(scenes.src_orientation[..., angle], -math.pi, math.pi) < 2
    assert (scenes.mic_orientation == 0).all()
    told = draw(SceneConfig(src_orientation_deg=(90, 45), mic_orientation_deg=(-30, 60)))
    expected = torch.tensor([[math.pi / 2, math.pi / 4], [-math.pi / 6, math.pi / 3]], dtype=torch.float64)
    assert_close(told.src_orientation, expected[0].expand(500, 2, 2))
    assert_close(told.mic_orientation, expected[1].expand(500, 2, 2))
    turned = draw(SceneConfig(mic_orientation_deg=(0, 90), rotate=True))
    axis = geometry.azimuth(geometry.array_axis(turned.mic_pos))
    assert_close(geometry.wrap_angle(turned.mic_orientation[..., 0]), axis[:, None].expand(500, 2))
    assert (turned.mic_orientation[..., 1] == math.pi / 2).all()


def test_wide_arrays_keep_sources_off_the_microphones():
    """Sources anywhere from the centre of a 2 m array on: 5 cm from every microphone, not only from the centre."""
    scenes = draw(SceneConfig(num_mics=21, mic_spacing_m=0.1, src_dist_m=(0.001, 1.0), room_min_m=(4, 4, 3.1),
                              wall_dist_m=0.1), batch=2000)
    nearest = torch.cdist(scenes.src_pos, scenes.mic_pos).amin()
    assert 0.05 <= nearest < 0.06


def test_infeasible_law_is_flagged_scene_by_scene():
    """A distance of 1.5 m or more cannot be had in every 3 m room: the flag is right about each scene."""
    scenes = draw(SceneConfig(room_max_m=(3.0, 3.0, 2.5), src_dist_m=(1.5, 5.0)))
    met = (scenes.distance >= 1.5).all(-1)
    assert 0 < int(met.sum()) < 500
    assert torch.equal(scenes.valid, met)
    assert draw(SceneConfig(num_src=20)).valid.all()


def test_same_generator_same_scenes():
    first, again, other = draw(seed=3), draw(seed=3), draw(seed=4)
    for name in TENSORS:
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.isin(first.src_pos, other.src_pos).any()
    state = torch.get_rng_state()
    draw()
    assert torch.equal(state, torch.get_rng_state())


def test_slices_and_index_tensors_select_scenes():
    scenes = draw(batch=10)
    picked = scenes[torch.tensor([7, 2, 7])]
    assert len(picked) == 3 and picked.max_rt60 == scenes.max_rt60
    for name in TENSORS:
        assert torch.equal(getattr(picked, name)[1], getattr(scenes, name)[2])
        assert torch.equal(getattr(scenes[3:5].to("cpu"), name), getattr(scenes, name)[3:5])


def test_batches_of_different_laws_are_put_one_after_the_other():
    first, second = draw(batch=3), draw(SceneConfig(rt60_s=(0.1, 0.9)), batch=2, seed=1)
    both = type(first).concatenate([first, second])
    assert both.max_rt60 == 0.9 and len(both) == 5
    for name in TENSORS:
        assert torch.equal(getattr(both, name)[:3], getattr(first, name))
        assert torch.equal(getattr(both, name)[3:], getattr(second, name))
    assert both.num_images is None and both.max_images is None
    counted = [replace(batch, num_images=torch.full((len(batch),), count), max_images=count)
               for batch, count in ((first, 7), (second, 5))]
    both = type(first).concatenate(counted)
    assert both.num_images.tolist() == [7, 7, 7, 5, 5] and both.max_images == 7
    some = type(first).concatenate([first, counted[1]])
    assert some.num_images.tolist() == [0, 0, 0, 5, 5] and some.max_images == 5


CHANGES = dict(
    room_min_m=(4.0, 3.0, 2.5), room_max_m=(10.0, 6.0, 5.0), rt60_s=(0.2, 0.7), src_dist_m=(0.2, 2.0),
    planar_share=0.5, wall_dist_m=0.3, num_src=3, num_mics=3, mic_spacing_m=0.2, spacing_jitter_m=0.002,
    mic_array_m=((0.0, 0.0, 0.0), (0.0, 0.1, 0.0)), array_radius_m=0.2, rotate=True,
    src_orientation_deg=(10.0, 20.0), mic_orientation_deg=(10.0, 20.0))


IN_TEST_SIMULATOR = ("bank", "pool")


@pytest.mark.parametrize("name", [f.name for f in fields(SceneConfig) if f.name not in IN_TEST_SIMULATOR])
def test_every_field_changes_the_scenes(name):
    plain, changed = draw(batch=20), draw(replace(SceneConfig(), **{name: CHANGES[name]}), batch=20)
    same = [getattr(plain, t).shape == getattr(changed, t).shape and torch.equal(getattr(plain, t), getattr(changed, t))
            for t in TENSORS]
    assert not all(same)


NAN = float("nan")


@pytest.mark.parametrize("change, message", [
    (dict(room_min_m=(0.0, 3, 3)), "scene.room_min_m, scene.room_max_m must satisfy 0 < min <= max < inf, got 0.0 and "
                                   "10.0 for the length"),
    (dict(room_max_m=(10, 2.0, 4)), "scene.room_min_m, scene.room_max_m must satisfy 0 < min <= max < inf, got 3.0 and "
                                    "2.0 for the width"),
    (dict(room_max_m=(10, 6, math.inf)), "scene.room_min_m, scene.room_max_m must satisfy 0 < min <= max < inf, got "
                                         "2.5 and inf for the height"),
    (dict(room_max_m=(10, 6)), "scene.room_max_m must be (length, width, height), got (10, 6)"),
    (dict(rt60_s=(0.8, 0.2)), "scene.rt60_s must satisfy 0 < low <= high < inf, got (0.8, 0.2)"),
    (dict(rt60_s=(0.0, 0.2)), "scene.rt60_s must satisfy 0 < low <= high < inf, got (0.0, 0.2)"),
    (dict(rt60_s=(0.1, NAN)), "scene.rt60_s must satisfy 0 < low <= high < inf, got (0.1, nan)"),
    (dict(src_dist_m=(2.0, 1.0)), "scene.src_dist_m must satisfy 0 < low <= high, got (2.0, 1.0)"),
    (dict(src_dist_m=(0.0, 1.0)), "scene.src_dist_m must satisfy 0 < low <= high, got (0.0, 1.0)"),
    (dict(src_dist_m=(1.61, 5.0)), "scene.src_dist_m: the low end 1.61 m cannot be kept in the smallest room, where a "
                                   "source may be 1.6 m from the array at most"),
    (dict(num_src=0), "scene.num_src must be >= 1, got 0"),
    (dict(num_mics=0), "scene.num_mics must be >= 1, got 0"),
    (dict(bank=0), "scene.bank must be >= 1 room, or null for endless rooms, got 0"),
    (dict(pool="theirs"), "scene.pool must be one of law, original, got 'theirs'"),
    (dict(planar_share=1.1), "scene.planar_share must be in 0..1, got 1.1"),
    (dict(planar_share=NAN), "scene.planar_share must be in 0..1, got nan"),
    (dict(wall_dist_m=-0.1), "scene.wall_dist_m must be >= 0, got -0.1"),
    (dict(wall_dist_m=NAN), "scene.wall_dist_m must be >= 0, got nan"),
    (dict(wall_dist_m=1.25), "scene.room_min_m: a height of 2.5 m leaves no place for an array of radius 0.05 m at "
                             "scene.wall_dist_m=1.25, it must be >= 2.6 m"),
    (dict(array_radius_m=1.2), "scene.room_min_m: a length of 3.0 m leaves no place for an array of radius 1.2 m at "
                               "scene.wall_dist_m=0.5, it must be >= 3.4 m"),
    (dict(mic_spacing_m=0.0), "scene.mic_spacing_m must be > 0, got 0.0"),
    (dict(mic_spacing_m=NAN), "scene.mic_spacing_m must be > 0, got nan"),
    (dict(spacing_jitter_m=-0.001), "scene.spacing_jitter_m must satisfy 0 <= jitter < scene.mic_spacing_m=0.1, got "
                                    "-0.001"),
    (dict(spacing_jitter_m=0.1), "scene.spacing_jitter_m must satisfy 0 <= jitter < scene.mic_spacing_m=0.1, got 0.1"),
    (dict(spacing_jitter_m=0.001, array_radius_m=0.1), "scene.spacing_jitter_m must be left at 0.0 with "
                                                       "scene.mic_array_m or scene.array_radius_m, which do not have "
                                                       "it, got 0.001"),
    (dict(mic_spacing_m=0.05, array_radius_m=0.1), "scene.mic_spacing_m must be left at 0.1 with scene.mic_array_m or "
                                                   "scene.array_radius_m, which do not have it, got 0.05"),
    (dict(num_mics=4, mic_array_m=((0, 0, 0), (1, 0, 0))), "scene.num_mics must be the number of positions in "
                                                           "scene.mic_array_m, 2, or left out, got 4"),
    (dict(array_radius_m=-1.0), "scene.array_radius_m must be > 0, got -1.0"),
    (dict(mic_array_m=()), "scene.mic_array_m must hold at least one [x, y, z], got an empty list"),
    (dict(mic_array_m=((0, 0), (1, 1))), "scene.mic_array_m must hold [x, y, z] of finite numbers, got (0, 0)"),
    (dict(mic_array_m=((0, 0, NAN),)), "scene.mic_array_m must hold [x, y, z] of finite numbers, got (0, 0, nan)"),
    (dict(mic_array_m=((0, 0, 0), (0, 0, 0))), "scene.mic_array_m must not hold a position twice, got "
                                               "((0, 0, 0), (0, 0, 0))"),
    (dict(mic_array_m=((0, 0, 0),), array_radius_m=1.0), "scene.mic_array_m and scene.array_radius_m exclude each "
                                                         "other, got both"),
    (dict(mic_orientation_deg=(0, NAN)), "scene.mic_orientation_deg must be finite, got (0, nan)"),
    (dict(rt60_s=(0.01, 0.2)), "scene.rt60_s: 340 m/s * 0.01 s = 3.4 m must exceed the largest source distance, "
                               "5.05 m (scene.src_dist_m, scene.room_max_m)"),
    (dict(rt60_s=(0.014853, 0.2)), "scene.rt60_s: 340 m/s * 0.014853 s = 5.05 m must exceed the largest source "
                                   "distance, 5.05 m (scene.src_dist_m, scene.room_max_m)"),  # reads 5.0501 m
])
def test_a_law_that_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError) as error:
        SceneConfig(**change)
    assert str(error.value) == message


def test_laws_at_their_limits_are_accepted():
    for change in (dict(rt60_s=(0.3, 0.3)), dict(wall_dist_m=0.0), dict(src_dist_m=(0.2, math.inf)), dict(bank=1),
                   dict(src_dist_m=(1.59, 5.0)), dict(room_min_m=(3, 3, 1.1)), dict(mic_array_m=((9.0, 9.0, 9.0),)),
                   dict(mic_array_m=((0, 0, 0), (1, 0, 0), (0, 1, 0)), num_mics=3)):
        assert torch.isfinite(draw(SceneConfig(**change), batch=50).src_pos).all()


GOOD = dict(room_dim=[[6, 5, 3]], rt60=[0.3], mic_pos=[[[1, 1, 1], [1.1, 1, 1]]], src_pos=[[[2, 2, 2]]])


def test_made_scenes_hold_what_was_given():
    scenes = make_scenes(**GOOD, src_orientation=np.array([[[0.1, 0.2]]]))
    assert scenes.mic_pos.tolist() == [[[1, 1, 1], [1.1, 1, 1]]] and scenes.src_pos.tolist() == [[[2, 2, 2]]]
    assert scenes.src_orientation.tolist() == [[[0.1, 0.2]]] and scenes.mic_orientation.tolist() == [[[0, 0], [0, 0]]]
    assert scenes.room_dim.tolist() == [[6, 5, 3]] and scenes.rt60.tolist() == [0.3] and scenes.max_rt60 == 0.3
    assert scenes.valid.tolist() == [True]
    assert all(getattr(scenes, name).dtype == torch.float64 for name in TENSORS if name != "valid")


@pytest.mark.parametrize("change, message", [
    (dict(rt60=0.3), "rt60 must be [batch], got []"),
    (dict(rt60=[]), "rt60 must be [batch], got [0]"),
    (dict(rt60=[0.3, 0.3]), "room_dim must be [batch=2, 3], got [1, 3]"),
    (dict(room_dim=[6, 5, 3]), "room_dim must be [batch=1, 3], got [3]"),
    (dict(mic_pos=[[1, 1, 1]]), "mic_pos must be [batch=1, mic, 3], got [1, 3]"),
    (dict(mic_pos=[[[1, 1]]]), "mic_pos must be [batch=1, mic, 3], got [1, 1, 2]"),
    (dict(src_pos=np.zeros((1, 0, 3))), "src_pos must be [batch=1, src, 3], got [1, 0, 3]"),
    (dict(src_pos=[[[2, 2, 2], [2, 2]]]), "src_pos must be an array, or nested lists of numbers: "),
    (dict(src_pos=[[[2, 2, "x"]]]), "src_pos must be an array, or nested lists of numbers: "),
    (dict(src_pos=[[[2, 2, NAN]]]), "src_pos must be finite, got a NaN or an infinity"),
    (dict(rt60=[math.inf]), "rt60 must be finite, got a NaN or an infinity"),
    (dict(mic_orientation=[[[0, 0]]]), "mic_orientation must be [1, 2, 2], got [1, 1, 2]"),
    (dict(src_orientation=[[[0, NAN]]]), "src_orientation must be finite, got a NaN or an infinity"),
    (dict(num_images=[[5]]), "num_images must be [batch=1], got [1, 1]"),
    (dict(num_images=[-1]), "scene 0: num_images must be whole and in 0..1000000, 0 to be drawn, got -1"),
    (dict(num_images=[7.5]), "scene 0: num_images must be whole and in 0..1000000, 0 to be drawn, got 7.5"),
    (dict(rt60=[1e6]), "scene 0: rt60 must be <= 100 s, got 1e+06"),
    (dict(rt60=[0.0]), "scene 0: rt60 must be > 0 s, got 0"),
    (dict(rt60=[-0.1]), "scene 0: rt60 must be > 0 s, got -0.1"),
    (dict(room_dim=[[6, -5, 3]]), "scene 0: room_dim must be > 0 m, got [6.0, -5.0, 3.0]"),
    (dict(mic_pos=[[[1, 1, 1], [1, 5.1, 1]]]), "scene 0: microphone 1 must be inside the room [6.0, 5.0, 3.0], got "
                                               "[1.0, 5.1, 1.0]"),
    (dict(src_pos=[[[2, 2, -0.1]]]), "scene 0: source 0 must be inside the room [6.0, 5.0, 3.0], got [2.0, 2.0, -0.1]"),
    (dict(src_pos=[[[2, 2, 2], [1.1, 1, 1]]]), "scene 0: source 1 and microphone 1 must not coincide, got both at "
                                               "[1.1, 1.0, 1.0]"),
    (dict(rt60=[0.005]), "scene 0: 340 m/s * rt60 = 1.7 m must exceed the distance from source 0 to microphone 0, got "
                         "1.732 m"),
    (dict(rt60=[0.005095]), "scene 0: 340 m/s * rt60 = 1.732 m must exceed the distance from source 0 to microphone 0, "
                            "got 1.732 m"),  # by the reference's distance: sqrt(3.001) m, not sqrt(3) m
])
def test_scenes_that_cannot_be_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError) as error:
        make_scenes(**{**GOOD, **change})
    text = str(error.value)
    assert text.startswith(message) if message.endswith(": ") else text == message
    assert "\n" not in text


def test_the_refused_scene_is_named():
    batch = {name: value * 3 for name, value in GOOD.items()}
    batch["rt60"] = [0.3, 0.3, -1]
    with pytest.raises(ValueError, match="^scene 2: rt60"):
        make_scenes(**batch)


@pytest.mark.parametrize("batch", [-1, 2.0, True])
def test_number_of_scenes_is_a_whole_one(batch):
    with pytest.raises(ValueError, match=f"^batch must be a whole number >= 0, got {batch}$"):
        draw(SceneConfig(), batch)
