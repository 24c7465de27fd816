"""Scores for estimated angles, and how far from the truth the best guesses without a network must stay.

Two microphones observe the cone angle of a source, not its azimuth: cos(cone) = cos(azimuth) cos(elevation), and the
elevation is unknown. An estimate of one therefore becomes an estimate of the other only through the law of the scenes
(AngleMap), and even an exact cone angle leaves an error of several degrees in azimuth. All angles are in radians;
keys ending in _deg are in degrees.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssl_gpu.doa import NUM_CLASSES, angle_class, sorted_angles

SMOOTHING_DEG = 1.5       # kernel over the conditioning angle; of no effect on the oracle's error, steadies thin bins
SHIFTS_PER_CELL = 4       # the tables resolve the difference of the two angles four times finer than the angles
MAX_SHIFT = math.pi / 2   # |cone - folded azimuth| cannot exceed it
QUERY_CHUNK = 1024        # clips mapped at a time, about 50 MB for two sources


def localisation_metrics(azimuth_est: Tensor, azimuth_true: Tensor, cone_est: Tensor, cone_true: Tensor,
                         mask: Tensor | None = None) -> dict[str, Any]:
    """Score estimates [batch, src] rad against truths [batch, src] rad; clips with mask [batch] <= 0 do not count.

    Estimate and truth are each sorted by the angle in question, which is the optimal matching. Lists run over the
    sorted sources ([low, high] for two); all values are plain floats, ready for JSON:
    azimuth_class_mae_deg: the original's metric, 5 * mean |class - class|; azimuth_mae_deg, cone_mae_deg: continuous;
    acc_at_5, acc_at_10: fraction of sources with a cone error of at most 5 or 10 degrees; cone_median_deg: over all
    sources; num_clips. Raises ValueError for unequal shapes, for estimates that are not finite, or if no clip counts.
    """
    angles = (azimuth_est, azimuth_true, cone_est, cone_true)
    if azimuth_est.ndim != 2 or any(angle.shape != azimuth_est.shape for angle in angles):
        raise ValueError(f"all angles must be [batch, src] alike, got {[tuple(angle.shape) for angle in angles]}")
    if mask is not None:
        angles = tuple(angle[mask > 0] for angle in angles)
    azimuth_est, azimuth_true, cone_est, cone_true = (sorted_angles(angle.double()) for angle in angles)
    if len(azimuth_est) == 0:
        raise ValueError("localisation_metrics needs at least one clip that counts, got none")
    if not all(bool(torch.isfinite(angle).all()) for angle in angles):
        raise ValueError("all angles of the clips that count must be finite")
    class_error = (angle_class(azimuth_est) - angle_class(azimuth_true)).abs().double() * (180 / NUM_CLASSES)
    azimuth_error = torch.rad2deg((azimuth_est - azimuth_true).abs())
    cone_error = torch.rad2deg((cone_est - cone_true).abs())
    return {
        "azimuth_class_mae_deg": class_error.mean(0).tolist(),
        "azimuth_mae_deg": azimuth_error.mean(0).tolist(),
        "cone_mae_deg": cone_error.mean(0).tolist(),
        "acc_at_5": (cone_error <= 5).double().mean().item(),
        "acc_at_10": (cone_error <= 10).double().mean().item(),
        "cone_median_deg": cone_error.quantile(0.5).item(),
        "num_clips": len(cone_error),
    }


@dataclass(frozen=True, eq=False)
class Chance:
    """The best estimate without listening: one constant per sorted source."""

    azimuth: Tensor  # [src] rad, ascending; its class is also the best constant class
    cone: Tensor     # [src] rad, ascending


def chance(azimuth: Tensor, cone: Tensor) -> Chance:
    """Medians of the sorted angles over samples of the scene law, azimuth and cone [sample, src] rad.

    Repeat them for each clip (`.azimuth.expand(batch, -1)`) to score them. torch.median returns a sample, and taking
    classes keeps the order, so the class of the median is the median class.
    """
    return Chance(sorted_angles(azimuth).median(0).values, sorted_angles(cone).median(0).values)


@dataclass(frozen=True, eq=False)
class AngleMap:
    """Posterior law of azimuth given cone angle, and of cone angle given azimuth, one source at a time.

    Row i of a table is the CDF of (unknown - known) given that the known angle is i * step, at shifts from -pi/2 to
    pi/2. Tabulating the difference keeps the sharp edge of the law at elevation zero, where both angles agree: a
    kernel that averages neighbouring rows does not blur it.
    """

    azimuth_given_cone: Tensor  # [angle, shift]
    cone_given_azimuth: Tensor  # [angle, shift]

    def cone_to_azimuth(self, cone: Tensor) -> Tensor:
        """Cone angles [batch, src] rad -> posterior medians of the sorted azimuths [batch, src] rad.

        The medians are those of the order statistics under independent sources (for two, of the smaller and of the
        larger azimuth), not the sorted medians of each source.
        """
        return _map_angles(self.azimuth_given_cone, cone)

    def azimuth_to_cone(self, azimuth: Tensor) -> Tensor:
        """Azimuths [batch, src] rad -> posterior medians of the sorted cone angles [batch, src] rad."""
        return _map_angles(self.cone_given_azimuth, azimuth)


def build_angle_map(azimuth: Tensor, cone: Tensor, resolution_deg: float = 1.0) -> AngleMap:
    """Tabulate both posteriors from Monte Carlo samples of a scene law, azimuth and cone [sample, src] rad.

    Folded azimuths are expected, signed ones are folded. A Gaussian kernel of 1.5 degrees over the known angle
    steadies bins with few samples; 20,000 scenes are plenty, with 5,000 the error grows by 0.02 degrees.
    Raises ValueError if the pairs cannot be angles of one direction to a horizontal axis.
    """
    if azimuth.shape != cone.shape or azimuth.numel() == 0:
        raise ValueError("azimuth and cone must be samples of one shape, "
                         f"got {tuple(azimuth.shape)} and {tuple(cone.shape)}")
    intervals = round(180 / resolution_deg)
    if abs(intervals * resolution_deg - 180) > 1e-6 or intervals % 2:
        raise ValueError(f"resolution_deg must divide 90, got {resolution_deg}")
    azimuth, cone = azimuth.abs().flatten().double(), cone.flatten().double()
    if not bool(((azimuth - cone).abs() < MAX_SHIFT + 1e-3).all()):
        raise ValueError("azimuth and cone must not differ by more than 90 degrees, as no two angles of one direction "
                         f"do, got {math.degrees(float((azimuth - cone).abs().max())):.1f}")
    return AngleMap(_shift_cdf(cone, azimuth, intervals), _shift_cdf(azimuth, cone, intervals))


def _shift_cdf(known: Tensor, unknown: Tensor, intervals: int) -> Tensor:
    """Samples [sample] rad of both angles -> CDF of unknown - known given known, [intervals + 1, shift]."""
    step = math.pi / intervals
    num_shifts = SHIFTS_PER_CELL * intervals
    row = torch.round(known / step).long().clamp(0, intervals)
    column = torch.floor((unknown - known + MAX_SHIFT) * (num_shifts / math.pi)).long().clamp(0, num_shifts - 1)
    counts = torch.bincount(row * num_shifts + column, minlength=(intervals + 1) * num_shifts).double()
    node = torch.arange(intervals + 1, dtype=torch.float64, device=counts.device)
    distance = (node[:, None] - node) * (180 / intervals / SMOOTHING_DEG)
    # The faint tail lends an angle that no sample comes near the law of the nearest angle that has one.
    kernel = torch.exp(-0.5 * distance.square()) + 1e-9 / (1 + distance.square().square())
    cdf = (kernel @ counts.reshape(intervals + 1, num_shifts)).cumsum(-1)
    return torch.nn.functional.pad(cdf / cdf[:, -1:], (1, 0)).float()


def _map_angles(table: Tensor, known: Tensor) -> Tensor:
    """Known angles [batch, src] rad -> medians of the order statistics of the unknown ones [batch, src] rad."""
    chunks = [_map_chunk(table.to(known.device), chunk) for chunk in known.abs().split(QUERY_CHUNK)]
    return torch.cat(chunks).to(known)


def _map_chunk(table: Tensor, known: Tensor) -> Tensor:
    """_map_angles for a batch that fits into memory; float32 inside."""
    num_angles = table.shape[1]  # the unknown angle is resolved as finely as the shift
    unknown = torch.linspace(0, math.pi, num_angles, device=table.device)
    at_most = order_statistics(_interpolate(table, known.to(table), unknown))  # [batch, src, angle]
    # First point with at least half of the mass, then back along the straight line from the point before it.
    after = (at_most < 0.5).sum(-1, keepdim=True).clamp(1, num_angles - 1)
    high, low = at_most.gather(-1, after), at_most.gather(-1, after - 1)
    fraction = ((0.5 - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return ((after - 1 + fraction) * (math.pi / (num_angles - 1))).squeeze(-1)


def _interpolate(table: Tensor, known: Tensor, unknown: Tensor) -> Tensor:
    """P(unknown angle <= `unknown` [angle] rad | known [batch, src] rad), bilinear: [batch, src, angle]."""
    rows, shifts = table.shape[0] - 1, table.shape[1] - 1
    row = (known * (rows / math.pi)).clamp(0, rows)[..., None]
    column = ((unknown - known[..., None] + MAX_SHIFT) * (shifts / math.pi)).clamp(0, shifts)
    row_low, column_low = row.floor().clamp(max=rows - 1).long(), column.floor().clamp(max=shifts - 1).long()
    down, right = row - row_low, column - column_low
    upper = torch.lerp(table[row_low, column_low], table[row_low, column_low + 1], right)
    lower = torch.lerp(table[row_low + 1, column_low], table[row_low + 1, column_low + 1], right)
    return torch.lerp(upper, lower, down.expand_as(upper))


def order_statistics(cdf: Tensor) -> Tensor:
    """CDFs [batch, src, angle] of independent sources -> CDFs of the smallest .. largest of them, same shape.

    The k-th smallest is at most x when at least k sources are: the tail of a Poisson-binomial count, built up source
    by source. For two: F_min = F1 + F2 - F1 F2 and F_max = F1 F2.
    """
    at_least = [torch.zeros_like(cdf[:, 0]) for _ in range(cdf.shape[1])]
    for source in cdf.unbind(1):
        fewer = [torch.ones_like(source), *at_least[:-1]]
        at_least = [torch.lerp(same, less, source) for same, less in zip(at_least, fewer)]
    return torch.stack(at_least, 1)
