"""What people read: tables, and a line where they have to wait."""
from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ssl_gpu.original import NUM_EVAL_SCENES

QUIET_S = 1.0  # a wait that needs no words


@contextlib.contextmanager
def announced(what: str) -> Iterator[None]:
    """A line on stderr, "what ...", about a block that takes longer than QUIET_S, while it runs."""
    timer = threading.Timer(QUIET_S, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


ROWS = (
    ("azimuth, class MAE", "azimuth_class_mae_deg", "deg"),
    ("azimuth, MAE", "azimuth_mae_deg", "deg"),
    ("cone angle, MAE", "cone_mae_deg", "deg"),
    ("cone angle, median error", "cone_median_deg", "deg"),
    ("cone angle within 5 deg", "acc_at_5", "%"),
    ("cone angle within 10 deg", "acc_at_10", "%"),
)


def metrics_table(columns: dict[str, dict[str, Any]]) -> str:
    """Metrics of several localisers side by side, a text table. Lists read low / .. / high, over the sorted sources."""
    rows = [("", list(columns))]
    rows += [(label, [metrics_cell(metrics[key], unit) for metrics in columns.values()]) for label, key, unit in ROWS]
    width = max(16, *(len(cell) + 2 for _, cells in rows for cell in cells))  # a talker more makes every cell longer
    return "\n".join(f"{label:28}" + "".join(f"{cell:>{width}}" for cell in cells) for label, cells in rows)


def metrics_cell(value: float | list[float], unit: str = "deg") -> str:
    """A metric as text: of all talkers, "low / .. / high", or one number; unit "%" of a share."""
    if isinstance(value, list):
        return " / ".join(f"{item:.2f}" for item in value)
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.2f}"


def is_leaked(result: dict[str, Any]) -> bool:
    """Whether a model met rooms or talkers of a result in its training."""
    return bool(result.get("leaked_rooms") or result.get("leaked_talkers"))


def result_table(result: dict[str, Any]) -> str:
    """The model of a result.json beside GCC-PHAT and chance, and what they were tested on, whatever the number of
    talkers."""
    model = "model, LEAKED" if is_leaked(result) else "model"
    talkers = len(result["cone_mae_deg"])
    ends = {1: "", 2: " of the smaller / the larger angle"}.get(talkers, f" of the {talkers} angles, ascending,")
    table = metrics_table({model: result, "GCC-PHAT": result["baseline"], "chance": result["chance"]})
    return (f"{result['num_clips']} clips, each in a room of its own that training never draws; evaluation set "
            f"{result['eval_digest']}\n"
            f"errors{ends} in degrees; azimuth from the cone angle where only that is "
            f"estimated\n{table}")


SET_COLUMNS = (
    ("clips", lambda r: str(r["num_clips"])),
    ("cone MAE", lambda r: metrics_cell(r["cone_mae_deg"], "deg")),
    ("95 %", lambda r: "too few" if r["interval_95"] is None else " / ".join(
        f"{low:.1f}..{high:.1f}" for low, high in r["interval_95"]["cone_mae_deg"])),
    ("median", lambda r: metrics_cell(r["cone_median_deg"], "deg")),
    ("within 5, 10, 15", lambda r: " ".join(f"{100 * r[f'acc_at_{t}']:.1f}" for t in (5, 10, 15)) + " %"),
    ("both in 10", lambda r: metrics_cell(r["both_at_10"], "%")),
    ("azimuth class MAE", lambda r: metrics_cell(r["azimuth_class_mae_deg"], "deg")),
)
MORE_COLUMNS = (
    ("cone P90", lambda r: metrics_cell(r["cone"]["p90_deg"])),
    ("missed", lambda r: metrics_cell(r["detection_at_10"]["mdr"], "%")),
    ("found, off by", lambda r: "" if (fine := r["detection_at_10"]["fine_error_deg"]) is None else metrics_cell(fine)),
    ("azimuth MAE", lambda r: metrics_cell(r["azimuth"]["mae_deg"])),
    ("az. median", lambda r: metrics_cell(r["azimuth"]["median_deg"])),
    ("az. P90", lambda r: metrics_cell(r["azimuth"]["p90_deg"])),
    ("az. within 10", lambda r: " / ".join(f"{100 * share:.1f}" for share in r["azimuth"]["acc_at_10"]) + " %"),
    ("az. both in 10", lambda r: metrics_cell(r["azimuth"]["both_at_10"], "%")),
)


def sets_table(results: dict[str, dict[str, Any]]) -> str:
    """Results by evaluation set: the model, GCC-PHAT pooled by maximum and by mean, and chance, with the floors; and
    in a second table what else there is of them.

    A model that was trained in rooms of a set (leaked_rooms), or on its talkers (leaked_talkers), is LEAKED in its row
    and in a sentence below."""
    table, more = (_sets_table(results, columns, floor, suffix)
                   for columns, floor, suffix in ((SET_COLUMNS, "azimuth class MAE", ""),
                                                  (MORE_COLUMNS, "azimuth MAE", "_mae")))
    version = next(iter(results.values()))["set_version"]
    digests = ", ".join(f"{name} {result['eval_digest']}" for name, result in results.items())
    leaks = "".join(f"\n{name} is LEAKED: the model was trained in {result['leaked_rooms']} of its {NUM_EVAL_SCENES} "
                    f"rooms (scene.pool=original), this says nothing about other rooms"
                    for name, result in results.items() if result.get("leaked_rooms"))
    leaks += "".join(f"\n{name} is LEAKED: the model was trained on {result['leaked_talkers']} talkers of speech.eval, "
                     f"this says nothing about other talkers"
                     for name, result in results.items() if result.get("leaked_talkers"))
    own = ", of e3 those of its own clips" if "e3" in results else ""
    if next(iter(results.values())).get("split") == "validation":       # files before there was a choice do not say
        leaks += "\nclips of validation, which no published set has: to choose by, not to be published as the sets"
    return (f"{table}\n\n{more}\n\n"
            f"errors in degrees, of the smaller / the larger angle, in cone angle where nothing else is said; both in "
            f"10: both talkers within 10 degrees\n"
            f"missed: talkers who have no estimate of their own within 10 degrees, as many false alarms; found, off "
            f"by: mean error of the others\n"
            f"GCC-PHAT (of two microphones it is SRP-PHAT): its maximum, or mean, over frames; chance: the best "
            f"constants of the law{own}\n"
            f"best guess: the floor of azimuth; all is explained in docs/accuracy.md\n"
            f"digests, of version {version} of the sets: {digests}{leaks}")


def _sets_table(results: dict[str, dict[str, Any]], columns: Sequence[tuple[str, Callable[[dict[str, Any]], str]]],
                floor: str, suffix: str) -> str:
    """One of the tables of sets_table; in column `floor` stands that of the key with this suffix."""
    at = [name for name, _ in columns].index(floor)
    lines = [["set", "", *(name for name, _ in columns)]]
    for name, result in results.items():
        rows = {"GCC-PHAT, max": result["baseline"], "GCC-PHAT, mean": result["baseline_mean"],
                "chance": result["chance"]}
        if "cone_mae_deg" in result:
            rows = {"model, LEAKED" if is_leaked(result) else "model": result, **rows}
        for who, row in rows.items():
            lines.append([name if who == next(iter(rows)) else "", who, *(cell(row) for _, cell in columns)])
        if result["floor"] is not None:
            for label, key in (("best guess, cone angles known", "exact_cone"),
                               ("best guess, distances, too", "exact_cone_and_distance")):
                cells = [""] * len(columns)
                cells[at] = metrics_cell(result["floor"][key + suffix])
                lines.append(["", label, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
