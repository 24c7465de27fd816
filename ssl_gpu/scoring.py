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
ACCURACY_DEG = (5, 10, 15)
QUANTILES = {"median_deg": 0.5, "p90_deg": 0.9}
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
    detection_at_10: of `angle_scores`, in cone angles;
    interval_95: of cone_mae_deg, azimuth_class_mae_deg (each [low, high] per source) and acc_at_10, by a bootstrap over
    scenes, or over what else clips share (truth.scene), None where there are fewer than 10 of these;
    by: `by_condition` of the errors in cone angle; cone, azimuth: everything per source, of either angle:
    `angle_scores`, and by of azimuth.
    """
    azimuth, cone = (sorted_angles(angle.double().cpu()) for angle in (azimuth, cone))
    error = torch.rad2deg((cone - truth.cone).abs())                    # [clip, src]
    classes = (angle_class(azimuth) - angle_class(truth.azimuth)).abs().double() * (180 / NUM_CLASSES)
    hit = error <= DETECTION_DEG
    result = localisation_metrics(azimuth, truth.azimuth, cone, truth.cone)
    by_cone, by_azimuth = angle_scores(cone, truth.cone, truth), angle_scores(azimuth, truth.azimuth, truth)
    by_azimuth["by"] = by_condition(torch.rad2deg((azimuth - truth.azimuth).abs()), truth.in_order_of_azimuth(),
                                    "azimuth")
    intervals = None
    if by_cone["interval_95"] is not None:
        whole = bootstrap(torch.cat((classes, hit.double().mean(-1, keepdim=True)), 1), truth.scene)
        intervals = {"cone_mae_deg": by_cone["interval_95"]["mae_deg"], "azimuth_class_mae_deg": whole[:-1],
                     "acc_at_10": whole[-1]}
    return result | {
        "acc_at_15": (error <= 15).double().mean().item(),
        "both_at_10": by_cone["both_at_10"],
        "cone_p90_deg": error.quantile(0.9).item(),
        "detection_at_10": by_cone["detection_at_10"],
        "interval_95": intervals,
        "by": by_condition(error, truth), "cone": by_cone, "azimuth": by_azimuth}


def angle_scores(heard: Tensor, true: Tensor, truth: Truth) -> dict[str, Any]:
    """Of one angle, estimates and truths [clip, src] rad, ascending, in order: mae_deg, median_deg, p90_deg, acc_at_5,
    acc_at_10, acc_at_15, lists over the sources; both_at_10: share of clips with all talkers within 10 degrees;
    detection_at_10: misses (mdr), false alarms (far), as many, and the mean error of hits (fine_error_deg, None without
    any), each talker matched to at most one estimate within 10 degrees;
    interval_95: of each of these, [low, high], by a bootstrap over truth.scene; None where there are fewer than 10."""
    error = torch.rad2deg((heard - true).abs())
    hits, fine = matches(heard, true)
    columns = {"mae_deg": error, **{f"acc_at_{limit}": (error <= limit).double() for limit in ACCURACY_DEG}}
    both, missed = (error <= DETECTION_DEG).all(-1, keepdim=True).double(), 1 - hits[:, None] / error.shape[1]
    point = {name: column.mean(0).tolist() for name, column in columns.items()}
    point |= {name: error.quantile(share, 0).tolist() for name, share in QUANTILES.items()}
    found = float(hits.sum())
    point |= {"both_at_10": both.mean().item(), "detection_at_10": _detection(
        missed.mean().item(), float(fine.sum()) / found if found else None)}
    if len(truth.scene.unique()) < LEAST_CLUSTERS:
        return point | {"interval_95": None}
    interval = {name: bootstrap(column, truth.scene) for name, column in columns.items()}
    interval |= {name: bootstrap_quantile(error, share, truth.scene) for name, share in QUANTILES.items()}
    # The fine error is a mean over what was found.
    interval |= {"both_at_10": bootstrap(both, truth.scene)[0], "detection_at_10": _detection(
        bootstrap(missed, truth.scene)[0], bootstrap(fine[:, None], truth.scene, hits[:, None])[0] if found else None)}
    return point | {"interval_95": interval}


def _detection(missed: Any, fine: Any) -> dict[str, Any]:
    """As there are as many estimates as talkers, misses and false alarms are equally many."""
    return {"mdr": missed, "far": missed, "fine_error_deg": fine}


def matches(heard: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """How many talkers of each clip were found within 10 degrees, and the sum of their errors in degrees, each [clip];
    heard, true [clip, src] rad.

    Every estimate is that of one talker at most: of all orders the one with the most hits, then with the least error.
    """
    gap = torch.rad2deg((heard[:, :, None] - true[:, None]).abs())      # [clip, estimate, talker]
    best = torch.full((len(heard),), -math.inf, dtype=torch.float64)
    hits, errors = torch.zeros_like(best), torch.zeros_like(best)
    for order in torch.cartesian_prod(*[torch.arange(heard.shape[1])] * heard.shape[1]).view(-1, heard.shape[1]):
        if len(order.unique()) < len(order):
            continue
        matched = gap[:, order, torch.arange(heard.shape[1])]
        near = matched <= DETECTION_DEG
        count, error = near.double().sum(-1), torch.where(near, matched, 0.0).sum(-1)
        value = count - 1e-6 * error
        better = value > best
        best, hits, errors = (torch.where(better, new, old) for new, old in
                              ((value, best), (count, hits), (error, errors)))
    return hits, errors


def bootstrap(values: Tensor, scene: Tensor, count: Tensor | None = None) -> list[list[float]]:
    """95 % intervals of the means of values [clip, column]: whole clusters are drawn, since the clips of one are alike.
    count [clip, column]: values are sums of so many, 0 and up, of which each column has some; None: of one each.

    scene [clip] int64, a cluster per clip; or [clip, k], all k of which it shares with others (two loudspeakers): a
    clip then counts as often as the product of how often each of its clusters was drawn (the crossed bootstrap of Owen,
    Annals of Applied Statistics 1(2), 2007). A draw without anything of a column does not count for it.
    [[low, high] per column]; the draws are always the same.
    """
    count = torch.ones_like(values) if count is None else count
    weight, cluster = cluster_weights(scene)
    if cluster.ndim == 1:
        empty = torch.zeros(weight.shape[1], values.shape[1], dtype=torch.float64)
        sums, counts = (empty.index_add(0, cluster, column) for column in (values, count))
    else:
        weight = weight[:, cluster].prod(-1)                            # [resample, clip]
        sums, counts = values, count
    means = (weight @ sums) / (weight @ counts)                         # NaN where there is nothing
    return torch.nanquantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0).T.tolist()


def bootstrap_quantile(values: Tensor, share: float, scene: Tensor) -> list[list[float]]:
    """As `bootstrap`, of a quantile of each column: the least value that at least `share` of a draw does not exceed."""
    weight, cluster = cluster_weights(scene)
    weight = weight[:, cluster] if cluster.ndim == 1 else weight[:, cluster].prod(-1)  # [resample, clip]
    weight = weight[weight.sum(-1) > 0]
    found = []
    for column in values.T:
        ordered, order = column.sort()
        below = weight[:, order].cumsum(-1)
        place = torch.searchsorted(below, share * below[:, -1:].contiguous()).squeeze(-1)
        found.append(ordered[place].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())
    return found


def cluster_weights(scene: Tensor) -> tuple[Tensor, Tensor]:
    """How often every cluster is in each of RESAMPLES draws of as many, [resample, cluster] float64, the same whenever
    it is asked for; and the clusters of each clip, numbered from 0, shaped as `scene`."""
    _, cluster = scene.unique(return_inverse=True)
    return _times_drawn(int(cluster.max()) + 1), cluster


@lru_cache(maxsize=4)  # for a set it is asked thirty times
@torch.inference_mode(False)
def _times_drawn(number: int) -> Tensor:
    """[resample, cluster] of cluster_weights; not to be written to."""
    chosen = torch.randint(number, (RESAMPLES, number), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(chosen, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, chosen, ones)


def by_condition(error: Tensor, truth: Truth, angle: str = "cone") -> dict[str, list[dict[str, Any]]]:
    """Errors [clip, src] degrees of an angle in the bins of every condition of BINS that the truth knows, sources in
    its order: from, to, num_sources, cone_mae_deg, cone_median_deg (or azimuth_...), acc_at_10, and interval_95 of the
    first of these, None where the clips of a bin are of fewer than 10 scenes, or of what else clips share. Bins that
    hold nothing are left out."""
    found, rows, clusters, sums, counts = {}, [], [], [], []
    for name, values in truth.conditions.items():
        if name in BINS:
            found[name] = []
            for row, inside in _bins(error, values, BINS[name], angle):
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


def _bins(error: Tensor, values: Tensor, edges: tuple[float, ...], angle: str
          ) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """Metrics of every bin of a condition [clip, src] or [clip] that holds something, and the sources in it
    [clip, src]."""
    values = values if values.ndim == 2 else values[:, None].expand_as(error)
    for low, high in zip(edges, edges[1:]):
        inside = (values >= low) & ((values < high) | ((values == high) & (high == edges[-1])))
        if inside.any():
            picked = error[inside]
            yield {"from": low, "to": high if math.isfinite(high) else None, "num_sources": len(picked),
                   f"{angle}_mae_deg": picked.mean().item(), f"{angle}_median_deg": picked.median().item(),
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
