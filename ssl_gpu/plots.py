"""Pictures of scenes. matplotlib is imported where a picture is drawn, and only there."""
from __future__ import annotations

import math
from pathlib import Path

import torch

from ssl_gpu.measure import RirMeasures, energy_decay
from ssl_gpu.scene import SceneBatch
from ssl_gpu.synthesis import RirBatch

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for all kinds of eyes
GREY = "0.45"
MAX_SRC = 4         # RIRs shown one above the other
FLOOR_DB = -60.0
MARGIN = 0.04       # around the room, as a share of its longest side


def require_matplotlib() -> None:
    """Raises ValueError, in one line, where matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ValueError(f"plots need matplotlib, install it with pip install matplotlib (extra plot): "
                         f"{error}") from error


def draw_scene(path: str | Path, scene: SceneBatch, rirs: RirBatch, measures: RirMeasures, title: str) -> None:
    """A PNG of a single scene: the room from above and from the side, RIRs at the first microphone, their decays.

    At most 4 sources have their RIR shown. Raises ValueError without matplotlib, OSError if `path` cannot be written.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # not pyplot: no windows, no state, whatever backend the user has

    figure = Figure(figsize=(12, 7), dpi=100, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    sides = length, width, height = scene.room_dim[0].tolist()
    left.suptitle(f"{title}\nroom {length:.2f} x {width:.2f} x {height:.2f} m, "
                  f"RT60 asked for {float(scene.rt60[0]):.2f} s")
    margin = MARGIN * max(sides)
    plan, elevation = left.subplots(2, 1, sharex=True, height_ratios=[side + 2 * margin for side in sides[1:]])
    _draw_view(plan, scene, 1)
    _draw_view(elevation, scene, 2)
    elevation.set_xlabel("x (m)")
    left.legend(*plan.get_legend_handles_labels(), loc="outside lower center", frameon=False, fontsize=9)
    right.suptitle("at the first microphone")
    shown = min(rirs.full.shape[2], MAX_SRC)
    axes = right.subplots(shown + 1, 1, sharex=True, height_ratios=[1] * shown + [max(1.6, shown / 2)])
    _draw_rirs(axes[:-1], rirs, measures)
    _draw_decay(axes[-1], rirs, measures)
    figure.savefig(path, metadata={"Software": None})  # its version would make the same picture another file


def _draw_view(axes, scene: SceneBatch, up: int) -> None:
    """The room from above (up = 1: y) or from the side (up = 2: z), with a label for everything in it.

    The dashed arrow is the axis of the array, along which azimuth and cone angle are 0.
    """
    from matplotlib.patches import Rectangle

    sides, centre = scene.room_dim[0].tolist(), scene.array_centre[0].tolist()
    mics = scene.mic_pos[0].tolist()
    axes.add_patch(Rectangle((0, 0), sides[0], sides[up], fill=False, linewidth=2, edgecolor="black"))
    angles = [""] * scene.src_pos.shape[1]
    if len(mics) > 1:
        pairs = zip(torch.rad2deg(scene.azimuth[0]).tolist(), torch.rad2deg(scene.cone_angle[0]).tolist())
        angles = [f"azimuth {azimuth:.0f}°, cone {cone:.0f}°, " for azimuth, cone in pairs]
        tip = [middle + 0.12 * max(sides) * step for middle, step in zip(centre, _unit(mics[0], mics[-1]))]
        axes.annotate("", (tip[0], tip[up]), (centre[0], centre[up]),
                      arrowprops={"arrowstyle": "->", "linestyle": "--", "color": GREY, "shrinkA": 0})
    for src, (position, dist) in enumerate(zip(scene.src_pos[0].tolist(), scene.distance[0].tolist())):
        colour = COLOURS[src % len(COLOURS)]
        axes.plot((centre[0], position[0]), (centre[up], position[up]), color=colour, linewidth=1, alpha=0.6)
        axes.plot(position[0], position[up], "o", color=colour, markersize=9,
                  label=f"source {src}: {angles[src]}{dist:.2f} m away, {position[2]:.2f} m high")
    axes.plot([mic[0] for mic in mics], [mic[up] for mic in mics], "k.", markersize=5,
              label=f"{len(mics)} microphone{'s' * (len(mics) > 1)}, {centre[2]:.2f} m high")
    margin = MARGIN * max(sides)
    axes.set(xlim=(-margin, sides[0] + margin), ylim=(-margin, sides[up] + margin), aspect="equal",
             ylabel=f"{'xyz'[up]} (m)")
    axes.spines[:].set_visible(False)
    axes.grid(alpha=0.25)


def _unit(start: list[float], end: list[float]) -> list[float]:
    """The direction from one point to another, of length 1, or 0 where they are the same."""
    length = math.dist(start, end) or 1.0
    return [(b - a) / length for a, b in zip(start, end)]


def _draw_rirs(axes, rirs: RirBatch, measures: RirMeasures) -> None:
    """One above the other, each in its own scale."""
    rir = rirs.full[0, 0]
    time_ms = torch.arange(rir.shape[-1]) * (1e3 / rirs.sample_rate)
    for src, row in enumerate(axes):
        row.plot(time_ms.numpy(), rir[src].numpy(), color=COLOURS[src % len(COLOURS)], linewidth=0.7)
        t20, drr, c50 = (float(values[0, 0, src]) for values in (measures.t20, measures.drr_db, measures.c50_db))
        row.text(0.99, 0.93, f"source {src}: T20 {t20:.2f} s, DRR {drr:.1f} dB, C50 {c50:.1f} dB", fontsize=9,
                 transform=row.transAxes, ha="right", va="top")
        row.set_ylabel("RIR")
        row.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        row.grid(alpha=0.25)


def _draw_decay(axes, rirs: RirBatch, measures: RirMeasures) -> None:
    """Energy left after each moment, from the direct sound on; dotted: the line whose slope is T20."""
    decay = energy_decay(rirs.full, measures.direct_tap)[0, 0]
    taps = decay.shape[-1]
    for src in range(decay.shape[0]):
        colour, direct = COLOURS[src % len(COLOURS)], int(measures.direct_tap[0, 0, src])
        t20 = float(measures.t20[0, 0, src])
        time = torch.arange(direct, taps) / rirs.sample_rate
        level = decay[src, direct:]
        axes.plot(time.numpy() * 1e3, level.numpy(), color=colour, linewidth=1.4)
        if math.isfinite(t20):
            middle = float(time[(level <= -15).to(torch.int8).argmax()])
            ends = [middle + (drop - 15) / 60 * t20 for drop in (0, 40)]
            axes.plot([1e3 * end for end in ends], (0, -40), ":", color=colour, linewidth=1.2)
    axes.set(xlim=(0, 1e3 * taps / rirs.sample_rate), ylim=(FLOOR_DB, 3), xlabel="time (ms)",
             ylabel="energy decay (dB)")
    axes.grid(alpha=0.25)
    axes.text(0.01, 0.04, "dotted: T20", fontsize=9, transform=axes.transAxes)
