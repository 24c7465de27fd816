"""Tables for people."""
from __future__ import annotations

from typing import Any

ROWS = (
    ("azimuth, class MAE", "azimuth_class_mae_deg", "deg"),
    ("azimuth, MAE", "azimuth_mae_deg", "deg"),
    ("cone angle, MAE", "cone_mae_deg", "deg"),
    ("cone angle, median error", "cone_median_deg", "deg"),
    ("cone angle within 5 deg", "acc_at_5", "%"),
    ("cone angle within 10 deg", "acc_at_10", "%"),
)


def metrics_table(columns: dict[str, dict[str, Any]]) -> str:
    """Metrics of several localisers side by side, a text table. Lists read low / high, over the sorted sources."""
    width = max(16, *(len(name) + 2 for name in columns))
    lines = [f"{'':28}" + "".join(f"{name:>{width}}" for name in columns)]
    for label, key, unit in ROWS:
        cells = (_cell(metrics[key], unit) for metrics in columns.values())
        lines.append(f"{label:28}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def _cell(value: float | list[float], unit: str) -> str:
    if isinstance(value, list):
        return " / ".join(f"{item:.2f}" for item in value)
    return f"{100 * value:.1f} %" if unit == "%" else f"{value:.2f}"


def result_table(result: dict[str, Any]) -> str:
    """The model of a result.json beside GCC-PHAT and chance, and what they were tested on."""
    table = metrics_table({"model": result, "GCC-PHAT": result["baseline"], "chance": result["chance"]})
    return (f"{result['num_clips']} clips, each in a room of its own that training never draws; evaluation set "
            f"{result['eval_digest']}\n"
            f"errors of the smaller / the larger angle in degrees; azimuth from the cone angle where only that is "
            f"estimated\n{table}")
