"""Angles as classes and back: grid, training targets, decoding of logits, and the loss.

A *track* is one output of the network; tracks are sorted by angle, so track 0 always means the smallest angle. For
scalar angles sorted matching is the optimal L1 assignment, so nothing is left for permutation-invariant training.
Folded azimuths and cone angles both live in [0, pi]. All angles are in radians.
"""
from __future__ import annotations

import enum
import math

import torch
from torch import Tensor

NUM_CLASSES = 36  # the original system's: 5 degrees each


class Decoding(enum.Enum):
    """How a distribution over the angle grid becomes one angle."""

    ARGMAX = "argmax"            # quantised to the grid; what the original does
    EXPECTATION = "expectation"  # least squared error; drawn inwards near 0 and pi
    MEDIAN = "median"            # least absolute error, the one the metrics count


def angle_grid(step_deg: float = 2.0) -> Tensor:
    """Angles from 0 to pi, both ends included, `step_deg` degrees apart: [angle] rad, float32.

    Raises ValueError if the step does not divide 180 degrees.
    """
    intervals = round(180 / step_deg) if step_deg > 0 else 0
    if intervals < 1 or abs(intervals * step_deg - 180) > 1e-6:
        raise ValueError(f"step_deg must be positive and divide 180, got {step_deg}")
    return torch.linspace(0, math.pi, intervals + 1, dtype=torch.float64).float()


def class_grid(num_classes: int = NUM_CLASSES) -> Tensor:
    """Centres of equal classes on [0, pi], the grid on which the original's logits decode: [angle] rad, float32."""
    return ((torch.arange(num_classes, dtype=torch.float64) + 0.5) * (math.pi / num_classes)).float()


def cell_edges(grid: Tensor) -> Tensor:
    """Borders of the cells around ascending grid points [angle] -> [angle + 1]: 0, the midpoints, pi."""
    midpoint = (grid[1:] + grid[:-1]) / 2
    return torch.cat((grid.new_zeros(1), midpoint, grid.new_full((1,), math.pi)))


def sorted_angles(angle: Tensor) -> Tensor:
    """Angles [batch, src] rad, in any order and of either sign -> folded to [0, pi], ascending along src."""
    return angle.abs().sort(-1).values


def angle_class(angle: Tensor, num_classes: int = NUM_CLASSES) -> Tensor:
    """Class of an angle [...] in [0, pi] rad: floor(angle / (pi / num_classes)), int64.

    Exactly pi falls into the last class; the original gives it class 36 of 0..35 and crashes. Everything outside
    [0, pi] goes to the nearest class. An angle on a border belongs above it: estimates on a grid of whole degrees
    often are, and float32 would throw dice, hence the 1e-5 of a class.
    """
    return torch.floor(angle * (num_classes / math.pi) + 1e-5).clamp(0, num_classes - 1).long()


def hard_targets(angle: Tensor, num_classes: int = NUM_CLASSES) -> Tensor:
    """The original's labels: sorted angles [batch, track] rad -> one-hot [batch, track, angle], float32."""
    return torch.nn.functional.one_hot(angle_class(angle, num_classes), num_classes).float()


def soft_targets(angle: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """Gaussian labels: sorted angles [batch, track] rad, grid [angle] rad, sigma rad -> [batch, track, angle].

    Each class gets the mass of N(angle, sigma^2) inside its cell, and the tails beyond 0 and pi go to the end
    classes, so a row sums to one and its median is the angle itself, at endfire too. Sampling the density and
    dividing by the sum would move the median inwards by up to 0.67 sigma there.
    """
    if sigma <= 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    inner = cell_edges(grid)[1:-1].to(angle)
    cdf = torch.special.ndtr((inner - angle[..., None]) / sigma)  # [batch, track, angle - 1]
    cdf = torch.cat((torch.zeros_like(cdf[..., :1]), cdf, torch.ones_like(cdf[..., :1])), -1)
    return cdf.diff(dim=-1).float()


def decode(logits: Tensor, grid: Tensor, how: Decoding = Decoding.MEDIAN) -> Tensor:
    """Logits [batch, track, angle] on grid [angle] rad -> angle [batch, track] rad, ascending along track, float32."""
    probability = torch.softmax(logits.float(), -1)
    grid = grid.to(probability)
    if how is Decoding.ARGMAX:
        angle = grid[probability.argmax(-1)]
    elif how is Decoding.EXPECTATION:
        angle = (probability * grid).sum(-1)
    elif how is Decoding.MEDIAN:
        angle = quantile(probability, cell_edges(grid), 0.5)
    else:
        raise ValueError(f"how must be a Decoding, got {how!r}")
    return sorted_angles(angle)


def quantile(probability: Tensor, edges: Tensor, share: float) -> Tensor:
    """Where `share` of histograms [..., angle] lies below, on edges [angle + 1], the mass spread evenly within each
    cell: [...], 0.5 for the median."""
    cdf = probability.cumsum(-1)
    cell = (cdf < share).sum(-1, keepdim=True).clamp(max=probability.shape[-1] - 1)
    mass = probability.gather(-1, cell)
    below = cdf.gather(-1, cell) - mass
    fraction = ((share - below) / mass.clamp(min=torch.finfo(mass.dtype).tiny)).clamp(0, 1)
    low, high = edges[cell], edges[cell + 1]
    return (low + fraction * (high - low)).squeeze(-1)


def localisation_loss(logits: Tensor, targets: Tensor, weight: Tensor, emd_weight: float = 0.0) -> Tensor:
    """Cross-entropy, plus emd_weight times the squared difference of the CDFs: a scalar, float32.

    logits, targets [batch, track, angle]; weight [batch], 0 for an example that must not count, whatever its targets
    hold. Both terms are summed over tracks (so the cross-entropy reads in nats per scene, as the original's two
    heads) and averaged over the batch by weight; 0 if all weights are 0.
    The second term is the mean over the grid of (CDF - CDF of the target)^2, the squared earth mover's distance of
    Hou, Yu and Samaras (2016), used for directions by Subramanian et al. (2021): cross-entropy alone costs a miss
    by one class as much as a miss by all; here two spikes cost their distance in units of the half circle.
    """
    log_probability = torch.log_softmax(logits.float(), -1)
    targets = torch.where((weight > 0)[:, None, None], targets.float(), 0)
    loss = -(targets * log_probability).sum(-1)  # [batch, track]
    if emd_weight:
        difference = (log_probability.exp() - targets).cumsum(-1)
        loss = loss + emd_weight * difference.square().mean(-1)
    weight = weight.to(loss)
    return (weight * loss.sum(-1)).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
