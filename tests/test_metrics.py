import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from ssl_gpu.metrics import build_angle_map, chance, localisation_metrics, order_statistics


def original_law(num_scenes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Azimuth and cone angle [scene, 2] rad under the original's scene law, microphones on the x axis."""
    rng = np.random.default_rng(seed)
    room = rng.uniform([3, 3, 2.5], [10, 6, 4], (num_scenes, 3))
    centre = rng.uniform(0.55, room - 0.55)
    offset = rng.uniform(0.5, room[:, None, None] - 0.5, (num_scenes, 2, 32, 3)) - centre[:, None, None]
    distance = np.linalg.norm(offset, axis=-1)
    first_valid = ((distance >= 0.2) & (distance <= 5)).argmax(-1)
    x, y, z = np.moveaxis(np.take_along_axis(offset, first_valid[..., None, None], 2)[:, :, 0], -1, 0)
    return torch.tensor(np.abs(np.arctan2(y, x))), torch.tensor(np.arctan2(np.hypot(y, z), x))


@pytest.fixture(scope="module")
def law():
    return original_law(30_000, seed=1)


@pytest.fixture(scope="module")
def angle_map(law):
    return build_angle_map(*law)


@pytest.fixture(scope="module")
def fresh():
    return original_law(2_000, seed=2)


def rad(*degrees: float) -> torch.Tensor:
    return torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))


# --- metrics

def test_metrics_of_a_case_done_by_hand():
    true = rad(11, 101).repeat(2, 1)
    azimuth_est = torch.stack((rad(119, 4), rad(12, 94)))  # the first in the wrong order, which must not matter
    cone_est = torch.stack((rad(11, 105), rad(3, 112)))
    score = localisation_metrics(azimuth_est, true, cone_est, true)
    assert score["azimuth_class_mae_deg"] == pytest.approx([5.0, 12.5])  # classes 0, 2 against 2; 23, 18 against 20
    assert score["azimuth_mae_deg"] == pytest.approx([4.0, 12.5])
    assert score["cone_mae_deg"] == pytest.approx([4.0, 7.5])
    assert (score["acc_at_5"], score["acc_at_10"]) == (0.5, 0.75)
    assert score["cone_median_deg"] == pytest.approx(6.0)
    assert score["num_clips"] == 2


def test_metrics_survive_json(fresh):
    azimuth, cone = (angle.float() for angle in fresh)
    score = localisation_metrics(cone, azimuth, azimuth, cone)
    assert json.loads(json.dumps(score)) == score


@given(st.lists(st.lists(st.floats(0, math.pi), min_size=4, max_size=4), min_size=1, max_size=4), st.booleans())
@settings(deadline=None, max_examples=40)
def test_metrics_do_not_see_the_order_of_sources(rows, flip_truth):
    est, true = torch.tensor(rows, dtype=torch.float64).split(2, -1)
    flipped = (est, true.flip(-1)) if flip_truth else (est.flip(-1), true)
    assert localisation_metrics(*flipped, *flipped) == localisation_metrics(est, true, est, true)


def test_masked_clips_do_not_count_even_if_they_hold_nan():
    est, true = rad(10, 50).repeat(3, 1), rad(11, 52).repeat(3, 1)
    est[1] = math.nan
    for mask in (torch.tensor([True, False, True]), torch.tensor([1.0, 0.0, 0.5])):
        score = localisation_metrics(est, true, est, true, mask)
        assert score["num_clips"] == 2 and score["cone_mae_deg"] == pytest.approx([1.0, 2.0])
    with pytest.raises(ValueError, match="finite"):
        localisation_metrics(est, true, est, true)
    with pytest.raises(ValueError, match="at least one clip"):
        localisation_metrics(est, true, est, true, torch.zeros(3))


def test_metrics_refuse_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"\(1, 2\)"):
        localisation_metrics(rad(1, 2)[None], *[rad(1, 2).repeat(3, 1)] * 3)


# --- what can be known

def test_exact_cone_angle_leaves_the_published_azimuth_error(angle_map, fresh):
    azimuth, cone = fresh
    as_azimuth = localisation_metrics(cone, azimuth, cone, cone)["azimuth_class_mae_deg"]
    assert as_azimuth == pytest.approx([8.1, 8.0], abs=0.5)  # standard error 0.2
    score = localisation_metrics(angle_map.cone_to_azimuth(cone), azimuth, cone, cone)
    assert score["azimuth_class_mae_deg"] == pytest.approx([6.9, 6.9], abs=0.5)
    assert all(mapped < raw - 0.8 for mapped, raw in zip(score["azimuth_class_mae_deg"], as_azimuth))


def test_map_beats_the_raw_angle_in_the_other_direction_too(angle_map, fresh):
    azimuth, cone = fresh
    raw = localisation_metrics(azimuth, azimuth, azimuth, cone)["cone_mae_deg"]
    mapped = localisation_metrics(azimuth, azimuth, angle_map.azimuth_to_cone(azimuth), cone)["cone_mae_deg"]
    assert all(a < b - 0.8 for a, b in zip(mapped, raw))


def test_joint_medians_beat_sorting_the_medians_of_each_source(angle_map):
    """Only where the two posteriors overlap does it matter, so only close pairs are asked."""
    azimuth, cone = original_law(20_000, seed=3)
    close = (cone[:, 0] - cone[:, 1]).abs() < math.radians(5)
    azimuth, cone = azimuth[close], cone[close]
    single = torch.cat([angle_map.cone_to_azimuth(angle) for angle in cone.split(1, -1)], -1)
    joint_error, single_error = (torch.rad2deg((est.sort(-1).values - azimuth.sort(-1).values).abs().mean())
                                 for est in (angle_map.cone_to_azimuth(cone), single))
    assert joint_error < single_error - 0.2


@given(st.lists(st.floats(0, math.pi), min_size=3, max_size=3))
@settings(deadline=None, max_examples=40)
def test_map_stays_in_range_sorted_and_monotone(angle_map, angles):
    angle = torch.tensor(angles, dtype=torch.float64)
    for function in (angle_map.cone_to_azimuth, angle_map.azimuth_to_cone):
        mapped = function(angle[None])
        assert mapped.dtype == torch.float64 and (mapped >= 0).all() and (mapped <= math.pi + 1e-6).all()
        assert (mapped.diff(dim=-1) >= 0).all()
        assert_close(function(angle.flip(0)[None]), mapped, rtol=0, atol=1e-5)  # float32 inside
        single = function(angle.sort().values[:, None])[:, 0]
        assert (single.diff() > -math.radians(0.3)).all()  # Monte Carlo noise of the table


def test_azimuth_lies_beyond_the_cone_angle_as_geometry_demands(angle_map):
    """|cos azimuth| >= |cos cone|: elevation can only pull the cone angle towards broadside."""
    cone = rad(*range(1, 180))[:, None]
    azimuth = angle_map.cone_to_azimuth(cone)
    assert (torch.cos(azimuth).abs() > torch.cos(cone).abs() - 1e-2).all()
    assert_close(azimuth.flip(0), math.pi - azimuth, atol=math.radians(1), rtol=0)  # the law is symmetric


def test_sources_at_array_height_are_mapped_to_themselves():
    angle = torch.rand(20_000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * math.pi
    angle_map = build_angle_map(angle, angle)
    query = rad(3, 47, 90, 133.3, 177)[:, None]
    assert_close(angle_map.cone_to_azimuth(query), query, atol=math.radians(0.3), rtol=0)
    assert_close(angle_map.azimuth_to_cone(query), query, atol=math.radians(0.3), rtol=0)


def test_an_angle_that_the_law_never_visits_takes_its_neighbours_law():
    angle = rad(*np.linspace(40, 60, 1000))[:, None]
    query = rad(10, 150)[:, None]
    assert_close(build_angle_map(angle, angle).cone_to_azimuth(query), query, atol=math.radians(0.3), rtol=0)


def test_map_resolves_a_tenth_of_a_degree():
    """Between the rows and columns of its tables too: a law without spread, azimuth = half the cone angle."""
    cone = torch.linspace(0.01, 1.5, 30_000, dtype=torch.float64)[:, None]
    angle_map = build_angle_map(cone / 2, cone)
    query = rad(20.5, 33.25, 47.8, 60.1)[:, None]
    assert_close(angle_map.cone_to_azimuth(query), query / 2, atol=math.radians(0.1), rtol=0)
    assert_close(angle_map.azimuth_to_cone(query / 2), query, atol=math.radians(0.1), rtol=0)
    assert_close(angle_map.azimuth_to_cone(-query / 2), angle_map.azimuth_to_cone(query / 2))  # folded


def test_smoothing_does_not_reach_beyond_a_few_degrees():
    """A law with a jump: sources at array height below a cone angle of 45 degrees, overhead beyond it."""
    cone = torch.linspace(0.01, 1.5, 30_000, dtype=torch.float64)[:, None]
    angle_map = build_angle_map(torch.where(cone < math.pi / 4, cone, cone - 0.7), cone)
    query = rad(42, 48)[:, None]
    expected = torch.stack((query[0], query[1] - 0.7))
    assert_close(angle_map.cone_to_azimuth(query), expected, atol=math.radians(0.3), rtol=0)


def test_map_of_many_clips_equals_that_of_each(angle_map, law):
    cone = law[1][:2100]
    assert_close(angle_map.cone_to_azimuth(cone)[[0, 1023, 1024, 2099]],
                 torch.cat([angle_map.cone_to_azimuth(cone[[i]]) for i in (0, 1023, 1024, 2099)]))


def test_map_refuses_angles_that_are_not_of_one_direction():
    with pytest.raises(ValueError, match="more than 90 degrees"):
        build_angle_map(rad(10, 170), rad(170, 10))
    with pytest.raises(ValueError, match="resolution_deg must divide 90, got 7"):
        build_angle_map(rad(10, 20), rad(10, 20), 7)


def test_order_statistics_are_those_of_the_sources():
    first, second, third = torch.rand(3, 4, 10, generator=torch.Generator().manual_seed(3)).unbind()
    two = order_statistics(torch.stack((first, second), 1))
    assert_close(two[:, 0], first + second - first * second)
    assert_close(two[:, 1], first * second)
    three = order_statistics(torch.stack((first, second, third), 1))
    assert_close(three[:, 0], 1 - (1 - first) * (1 - second) * (1 - third))
    assert_close(three[:, 1], first * second + first * third + second * third - 2 * first * second * third)
    assert_close(three[:, 2], first * second * third)


def test_constants_score_as_published(law, fresh):
    azimuth, cone = fresh
    constant = chance(*law)
    score = localisation_metrics(constant.azimuth.expand(2000, -1), azimuth, constant.cone.expand(2000, -1), cone)
    assert score["azimuth_class_mae_deg"] == pytest.approx([44.1, 44.3], abs=1.5)
    for offset in (-0.2, 0.2):
        other = localisation_metrics((constant.azimuth + offset).expand(2000, -1), azimuth,
                                     (constant.cone + offset).expand(2000, -1), cone)
        assert min(other["cone_mae_deg"]) > min(score["cone_mae_deg"])
        assert sum(other["azimuth_class_mae_deg"]) > sum(score["azimuth_class_mae_deg"])
