import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from ssl_gpu.doa import (Decoding, angle_class, angle_grid, cell_edges, class_grid, decode, hard_targets,
                         localisation_loss, soft_targets, sorted_angles)

angle_pair = st.lists(st.floats(0, math.pi), min_size=2, max_size=2)
SIGMA = math.radians(4)


def rad(*degrees: float) -> torch.Tensor:
    return torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))


def one_spike(degrees: float, grid: torch.Tensor) -> torch.Tensor:
    """Logits [1, 1, angle] of a distribution that sits on one grid point."""
    return 50.0 * (grid - math.radians(degrees)).abs().argmin().eq(torch.arange(len(grid))).float()[None, None]


def test_grid_covers_the_half_circle_with_both_ends():
    grid = angle_grid(2.0)
    assert_close(torch.rad2deg(grid), torch.arange(0, 181, 2).float())
    assert grid[-1] == np.float32(math.pi)
    assert_close(cell_edges(grid)[[0, 1, 2, -2, -1]].double(), rad(0, 1, 3, 179, 180), atol=1e-6, rtol=0)
    assert_close(cell_edges(class_grid()).double(), rad(*range(0, 181, 5)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("step", [0.0, -2.0, 7.0, 400.0])
def test_grid_refuses_a_step_that_does_not_fit(step):
    with pytest.raises(ValueError, match=f"step_deg must be positive and divide 180, got {step}"):
        angle_grid(step)


def test_classes_are_the_originals_and_180_degrees_stays_inside():
    angle = rad(0, 4.99, 5.01, 92, 179.9, 180)
    assert angle_class(angle).tolist() == [0, 0, 1, 18, 35, 35]
    assert angle_class(angle.float()).tolist() == [0, 0, 1, 18, 35, 35]
    borders = rad(*range(0, 180, 5))
    assert angle_class(borders).tolist() == angle_class(borders.float()).tolist() == list(range(36))
    assert hard_targets(angle[None]).argmax(-1).tolist() == [[0, 0, 1, 18, 35, 35]]


def test_sorting_folds_the_sign():
    assert_close(sorted_angles(rad(-100, 20)[None]), rad(20, 100)[None])


@given(angle_pair)
@settings(deadline=None, max_examples=50)
def test_median_undoes_soft_targets_everywhere(angles):
    """Within a tenth of a degree, and within one at the ends, where the tail fills the last half cell evenly."""
    grid, angle = angle_grid(2.0), sorted_angles(torch.tensor([angles], dtype=torch.float64))
    targets = soft_targets(angle, grid, SIGMA)
    assert_close(targets.sum(-1), torch.ones(1, 2))
    error_deg = torch.rad2deg((decode(targets.log(), grid, Decoding.MEDIAN).double() - angle).abs())
    near_end = torch.minimum(angle, math.pi - angle) < math.radians(2)
    assert (error_deg < torch.where(near_end, 0.9, 0.1)).all(), error_deg


@pytest.mark.parametrize("how, tolerance_deg", [(Decoding.ARGMAX, 1.01), (Decoding.EXPECTATION, 0.05)])
def test_other_decodings_undo_soft_targets_away_from_the_ends(how, tolerance_deg):
    grid, angle = angle_grid(2.0), rad(*np.linspace(20, 160, 50)).reshape(1, 50)
    angle_est = decode(soft_targets(angle, grid, SIGMA).log(), grid, how)
    assert torch.rad2deg((angle_est.double() - angle).abs()).max() < tolerance_deg


def test_argmax_of_the_original_classes_keeps_the_class():
    angle = rad(*range(181))[None]
    angle_est = decode(hard_targets(angle) * 10, class_grid(), Decoding.ARGMAX)
    assert_close(angle_class(angle_est), angle_class(angle))


def test_median_moves_continuously_between_grid_points():
    grid = angle_grid(2.0)
    angle = rad(*np.linspace(60, 70, 201))[:, None]
    step = decode(soft_targets(angle, grid, SIGMA).log(), grid)[:, 0].diff()
    assert step.min() > 0 and torch.rad2deg(step).max() < 0.1


def test_median_of_one_spike_is_its_grid_point():
    grid = angle_grid(2.0)
    angle_est = decode(torch.cat([one_spike(d, grid) for d in (130, 64)], 1), grid)
    assert_close(angle_est.double(), rad(64, 130)[None], atol=1e-5, rtol=0)  # and the tracks are put in order


def test_decoding_takes_half_precision_logits():
    grid = angle_grid(2.0)
    logits = one_spike(40, grid).bfloat16()
    assert_close(decode(logits, grid), decode(logits.float(), grid))


def test_loss_of_uniform_logits_is_log_of_the_class_count_per_track():
    targets = hard_targets(rad(10, 100).repeat(3, 1))
    loss = localisation_loss(torch.zeros(3, 2, 36), targets, torch.ones(3))
    assert_close(loss, torch.tensor(2 * math.log(36)))


def test_loss_matches_torch_cross_entropy():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 2, 91, generator=generator)
    targets = torch.softmax(torch.randn(5, 2, 91, generator=generator), -1)
    expected = sum(torch.nn.functional.cross_entropy(logits[:, track], targets[:, track]) for track in (0, 1))
    assert_close(localisation_loss(logits, targets, torch.ones(5)), expected)


def test_zero_weight_removes_an_example_whatever_it_holds():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 2, 36, generator=generator, requires_grad=True)
    targets = hard_targets(rad(10, 100).repeat(3, 1))
    targets[1] = math.nan
    loss = localisation_loss(logits, targets, torch.tensor([1.0, 0.0, 1.0]), emd_weight=1.0)
    loss.backward()
    expected = localisation_loss(logits.detach()[[0, 2]], targets[[0, 2]], torch.ones(2), emd_weight=1.0)
    assert_close(loss.detach(), expected)
    assert (logits.grad[1] == 0).all() and (logits.grad[[0, 2]] != 0).all()
    assert localisation_loss(logits, targets, torch.zeros(3), 1.0) == 0


def test_weights_weigh():
    targets = hard_targets(rad(10, 100).repeat(2, 1))
    logits = torch.stack((10 * targets[0], torch.zeros(2, 36)))
    low, high = (localisation_loss(logits[[i]], targets[[i]], torch.ones(1)) for i in (0, 1))
    assert_close(localisation_loss(logits, targets, torch.tensor([3.0, 1.0])), (3 * low + high) / 4)


def test_only_the_distance_term_grows_with_the_distance_of_a_miss():
    grid = angle_grid(2.0)
    targets = soft_targets(rad(40)[None], grid, math.radians(0.01))
    loss = {(d, w): localisation_loss(one_spike(d, grid), targets, torch.ones(1), w).item()
            for d in (50, 130) for w in (0.0, 2.0)}
    assert loss[50, 0.0] == pytest.approx(loss[130, 0.0])
    assert loss[50, 2.0] - loss[50, 0.0] == pytest.approx(2.0 * 5 / 91, rel=1e-4)   # 5 cells of 91 apart
    assert loss[130, 2.0] - loss[130, 0.0] == pytest.approx(2.0 * 45 / 91, rel=1e-4)
