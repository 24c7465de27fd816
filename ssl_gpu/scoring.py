"""Results on an evaluation set: errors with confidence intervals, by circumstance, and the floors they stand on."""
from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ssl_gpu import rng
from ssl_gpu.clips import Truth
from ssl_gpu.doa import NUM_CLASSES, angle_class, sorted_angles
from ssl_gpu.metrics import localisation_metrics, order_statistics
from ssl_gpu.scene import SceneConfig, sample_scenes

DETECTION_DEG = 10.0      # within which an estimate counts as that of a talker
RESAMPLES = 1000          # of the bootstrap
LEAST_CLUSTERS = 10       # scenes or positions; of fewer a bootstrap says little, and of one that nothing varies
FLOOR_SAMPLES, NEIGHBOURS = 100_000, 300  # of the Bayes floor: with half of either it moves by less than 0.05 degrees
DISTANCE_WEIGHT_DEG = 15.0                # a factor e in distance counts as far as so many degrees of cone angle

# Bins of the breakdowns: edges, the last bin closed at its end.
BINS: dict[str, tuple[float, ...]] = {
    "separation_deg": (0, 10, 20, 40, 70, 180), "angle_deg": (0, 20, 40, 140, 160, 180),
    "t20_s": (0, 0.3, 0.6, 0.9, 10), "drr_db": (-40, -6, -2, 2, 60), "level_gap_db": (0, 3, 6, 10, 100),
    "snr_db": (-10, 2.5, 7.5, 12.5, 25, math.inf)}


def score_angles(azimuth: Tensor, cone: Tensor, truth: Truth) -> dict[str, Any]:
    """Metrics of estimates [clip, src] rad: the keys of localisation_metrics, and

    acc_at_15; both_at_10: share of clips with both talkers within 10 degrees; cone_p90_deg;
    detection_at_10: misses (mdr), false alarms (far) and the mean error of hits (fine_error_deg), each talker matched
    in order to at most one estimate within 10 degrees;
    interval_95: of cone_mae_deg, azimuth_class_mae_deg (each [low, high] per source) and acc_at_10, by a bootstrap over
    scenes, or over what else clips share (truth.scene); by: by circumstance, see BINS, with such an interval of
    cone_mae_deg, None where its clips are of fewer than 10 scenes, or of what else clips share.
    """
    azimuth, cone = (sorted_angles(angle.double().cpu()) for angle in (azimuth, cone))
    error = torch.rad2deg((cone - truth.cone).abs())                    # [clip, src]
    classes = (angle_class(azimuth) - angle_class(truth.azimuth)).abs().double() * (180 / NUM_CLASSES)
    hit = error <= DETECTION_DEG
    result = localisation_metrics(azimuth, truth.azimuth, cone, truth.cone)
    result |= {
        "acc_at_15": (error <= 15).double().mean().item(),
        "both_at_10": hit.all(-1).double().mean().item(),
        "cone_p90_deg": error.quantile(0.9).item(),
        "detection_at_10": detection(cone, truth.cone),
        "interval_95": {"cone_mae_deg": bootstrap(error, truth.scene),
                        "azimuth_class_mae_deg": bootstrap(classes, truth.scene),
                        "acc_at_10": bootstrap(hit.double().mean(-1, keepdim=True), truth.scene)[0]},
        "by": by_condition(error, truth)}
    return result


def detection(cone: Tensor, truth: Tensor) -> dict[str, float | None]:
    """Misses, false alarms and fine error at 10 degrees, None without a hit; cone, truth [clip, src] rad, ascending.

    Every estimate is that of one talker at most: of all orders the one with the most hits, then with the least error.
    As there are as many estimates as talkers, misses and false alarms are equally many.
    """
    gap = torch.rad2deg((cone[:, :, None] - truth[:, None]).abs())      # [clip, estimate, talker]
    best = torch.full((len(cone),), -math.inf, dtype=torch.float64)
    hits, errors = torch.zeros_like(best), torch.zeros_like(best)
    for order in torch.cartesian_prod(*[torch.arange(cone.shape[1])] * cone.shape[1]).view(-1, cone.shape[1]):
        if len(order.unique()) < len(order):
            continue
        matched = gap[:, order, torch.arange(cone.shape[1])]
        near = matched <= DETECTION_DEG
        count, error = near.double().sum(-1), torch.where(near, matched, 0.0).sum(-1)
        value = count - 1e-6 * error
        better = value > best
        best, hits, errors = (torch.where(better, new, old) for new, old in
                              ((value, best), (count, hits), (error, errors)))
    missed = 1 - float(hits.sum()) / cone.numel()
    fine = float(errors.sum() / hits.sum()) if hits.sum() > 0 else None
    return {"mdr": missed, "far": missed, "fine_error_deg": fine}


def bootstrap(values: Tensor, scene: Tensor, count: Tensor | None = None) -> list[list[float]]:
    """95 % intervals of the means of values [clip, column]: whole clusters are drawn, since the clips of one are alike.
    count [clip, column]: values are sums of so many, 0 and up, of which each column has some; None: of one each.

    scene [clip] int64, a cluster per clip; or [clip, k], all k of which it shares with others (two loudspeakers): a
    clip then counts as often as the product of how often each of its clusters was drawn (the crossed bootstrap of Owen,
    Annals of Applied Statistics 1(2), 2007). A draw without anything of a column does not count for it.
    [[low, high] per column]; the draws are always the same.
    """
    count = torch.ones_like(values) if count is None else count
    _, cluster = scene.unique(return_inverse=True)
    number = int(cluster.max()) + 1
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(number, (RESAMPLES, number), generator=generator)
    ones = torch.ones_like(chosen, dtype=torch.float64)
    weight = torch.zeros_like(ones).scatter_add_(1, chosen, ones)       # [resample, cluster]
    if cluster.ndim == 1:
        sums, counts = (torch.zeros(number, values.shape[1], dtype=torch.float64).index_add_(0, cluster, column)
                        for column in (values, count))
    else:
        weight = weight[:, cluster].prod(-1)                            # [resample, clip]
        sums, counts = values, count
    means = (weight @ sums) / (weight @ counts)                         # NaN where there is nothing
    return torch.nanquantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T.tolist()


def by_condition(error: Tensor, truth: Truth) -> dict[str, list[dict[str, Any]]]:
    """Cone errors [clip, src] degrees in the bins of every condition of BINS that the truth knows; bins that hold
    nothing are left out."""
    found, rows, clusters, sums, counts = {}, [], [], [], []
    for name, values in truth.conditions.items():
        if name in BINS:
            found[name] = []
            for row, inside in _bins(error, values, BINS[name]):
                found[name].append(row)
                rows.append(row)
                clusters.append(len(truth.scene[inside.any(-1)].unique()))
                sums.append(torch.where(inside, error, 0.0).sum(-1))
                counts.append(inside.double().sum(-1))
    # All bins at once: drawing the clusters takes longer than weighting their sums.
    intervals = bootstrap(torch.stack(sums, -1), truth.scene, torch.stack(counts, -1)) if rows else []
    for row, interval, distinct in zip(rows, intervals, clusters):
        row["interval_95"] = interval if distinct >= LEAST_CLUSTERS else None
    return found


def _bins(error: Tensor, values: Tensor, edges: tuple[float, ...]) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Metrics of every bin of a condition [clip, src] or [clip] that holds something, and the sources in it
    [clip, src]."""
    values = values if values.ndim == 2 else values[:, None].expand_as(error)
    for low, high in zip(edges, edges[1:]):
        inside = (values >= low) & ((values < high) | ((values == high) & (high == edges[-1])))
        if inside.any():
            picked = error[inside]
            yield {"from": low, "to": high if math.isfinite(high) else None, "num_sources": len(picked),
                   "cone_mae_deg": picked.mean().item(), "cone_median_deg": picked.median().item(),
                   "acc_at_10": (picked <= DETECTION_DEG).double().mean().item()}, inside


def bayes_azimuth(cfg: SceneConfig, truth: Truth) -> Tensor:
    """The best guess from each talker's cone angle and distance, exactly known: [clip, src] rad, ascending.

    The talkers are taken as independent, though they share the height of the array. Posterior medians of the sorted
    azimuths under the scene law, by Monte Carlo: of each talker, the azimuths of the 300 sampled sources nearest in
    (cone angle, 15 ln distance); of the pair, the medians of the smaller and the larger.
    """
    samples, azimuth = _sampled_sources(cfg)
    nearest = [azimuth[torch.cdist(part, samples).topk(NEIGHBOURS, largest=False).indices]
               for part in _place(truth.cone, truth.conditions["distance_m"]).split(200)]
    grid = torch.linspace(0, math.pi, 721)
    near = torch.cat(nearest).sort(-1).values.view(*truth.cone.shape, -1)
    cdf = torch.searchsorted(near, grid.expand(*near.shape[:2], -1).contiguous(), right=True) / NEIGHBOURS
    return grid[(order_statistics(cdf) < 0.5).sum(-1).clamp(max=len(grid) - 1)].double()


@lru_cache(maxsize=2)
@torch.inference_mode(False)  # or what is kept could never be trained through
def _sampled_sources(cfg: SceneConfig) -> tuple[Tensor, Tensor]:
    """_place and azimuth of sources of a law, [sample, 2] and [sample] rad."""
    generator = rng.generator(0, rng.Split.TEST, rng.Stream.ANGLE_MAP, 0)
    scenes = sample_scenes(cfg, FLOOR_SAMPLES // cfg.num_src, generator=generator)
    scenes = scenes[scenes.valid.nonzero().squeeze(-1)]
    return _place(scenes.cone_angle, scenes.distance), scenes.azimuth.abs().flatten().float()


def _place(cone: Tensor, distance: Tensor) -> Tensor:
    """What two microphones and a tape measure know of sources [scene, src], [scene * src, 2]."""
    return torch.stack((torch.rad2deg(cone), DISTANCE_WEIGHT_DEG * distance.log()), -1).flatten(0, 1).float()
