"""The tables of README and docs/accuracy.md from the results that the package and docs/results hold."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.ablations import read
from benchmarks.ablations import table as ablation_table
from ssl_gpu.pretrained import EVALUATION, PACKAGED
from ssl_gpu.report import is_leaked

DOCS = Path(__file__).parents[1] / "docs" / "results"
SHORT = {"e1": "e1: FRA-RIR's rooms", "e1n5": "e1n5: these with diffuse noise at 5 dB",
         "e2": "e2: image-source rooms by pyroomacoustics",
         "e3": "e3: a real room, microphones 9.4 cm apart (trained for 10, told 9.4)"}
# The runs of docs/results/leak-<run>.json, in order.
LEAK = {"original-300": "small network, 300 of the original's rooms, with e0's 200",
        "law-300": "small network, 300 other rooms of the law",
        "original-h200": "57 M network, the original's 3,000 rooms, with e0's 200",
        "law-h200": "57 M network, 3,000 other rooms of the law"}


def pair(values: list[float], digits: int = 2) -> str:
    """Of the smaller and the larger angle."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


def percent(row: Mapping[str, Any], *degrees: int) -> str:
    """Shares within so many degrees."""
    return ", ".join(f"{100 * row[f'acc_at_{limit}']:.1f}" for limit in degrees) + " %"


def evaluation(results: Mapping[str, Any]) -> str:
    """Every set, LEAKED where it is, the model above GCC-PHAT, and the digests."""
    lines = ["| set | clips | cone MAE | 95 % | median | within 5, 10, 15 degrees | both within 10 | azimuth class MAE "
             "| floor |", "|---" * 9 + "|"]
    for name, result in results.items():
        floor = "" if result["floor"] is None else pair(result["floor"]["exact_cone_and_distance"], 1)
        mark = ", LEAKED" if is_leaked(result) else ""
        for label, row, last in ((f"**{name}**{mark}", result, floor), ("GCC-PHAT", result["baseline"], "")):
            interval = " / ".join(f"{low:.1f} to {high:.1f}" for low, high in row["interval_95"]["cone_mae_deg"])
            lines.append(f"| {label} | {result['num_clips'] if row is result else ''} | {pair(row['cone_mae_deg'])} "
                         f"| {interval} | {row['cone_median_deg']:.2f} | {percent(row, 5, 10, 15)} "
                         f"| {100 * row['both_at_10']:.1f} % | {pair(row['azimuth_class_mae_deg'])} | {last} |")
    digests = ", ".join(f"{name} {result['eval_digest']}" for name, result in results.items())
    return "\n".join(lines) + f"\n\nDigests: {digests}."


def short(results: Mapping[str, Any]) -> str:
    """The sets of SHORT, LEAKED where they are, for the README."""
    lines = ["| | clips | cone MAE | median | within 5, 10 degrees | GCC-PHAT: cone MAE | within 10 |",
             "|---" * 7 + "|"]
    for name, label in SHORT.items():
        row, baseline = results[name], results[name]["baseline"]
        label += ", LEAKED" if is_leaked(row) else ""
        lines.append(f"| {label} | {row['num_clips']:,} | {pair(row['cone_mae_deg'])} | {row['cone_median_deg']:.2f} "
                     f"| {percent(row, 5, 10)} | {pair(baseline['cone_mae_deg'])} | {percent(baseline, 10)} |")
    return "\n".join(lines)


def leak(folder: Path) -> str:
    """Of the runs LEAK in docs/results/leak-<run>.json: the class error in azimuth on e0, whose rooms leaked, and on
    e0b; a line that says so where no run has been made."""
    found = {label: json.loads(path.read_text(encoding="utf-8")) for name, label in LEAK.items()
             if (path := folder / f"leak-{name}.json").is_file()}
    if not found:
        return "These runs have not been made yet."
    lines = ["| trained in | e0: azimuth class MAE | e0b: azimuth class MAE | of e0's 200 rooms in training |",
             "|---" * 4 + "|"]
    for label, results in found.items():
        e0, e0b = (pair(results[name]["azimuth_class_mae_deg"]) + (", LEAKED" if is_leaked(results[name]) else "")
                   for name in ("e0", "e0b"))
        lines.append(f"| {label} | {e0} | {e0b} | {results['e0']['leaked_rooms']} |")
    any_of_them = next(iter(found.values()))
    floors = " and ".join(f"{pair(any_of_them[name]['floor']['exact_cone_and_distance'], 1)} on {name}"
                          for name in ("e0", "e0b"))
    return "\n".join(lines) + f"\n\nFloors: {floors}."


def packaged() -> dict[str, Any]:
    """What ssl_gpu.evaluate said of the weights in the package."""
    return json.loads((PACKAGED / EVALUATION).read_text(encoding="utf-8"))


def masks(path: Path, results: Mapping[str, Any]) -> str:
    """Of a file of benchmarks.masks, with the model's row of each set beside."""
    found = json.loads(path.read_text(encoding="utf-8"))["sets"]
    lines = ["| set | | cone MAE | median | within 5, 10 degrees |", "|---" * 5 + "|"]
    for name, rows in found.items():
        for label, row in {"the packaged weights": results[name], **rows}.items():
            lines.append(f"| {name} | {label} | {pair(row['cone_mae_deg'])} | {row['cone_median_deg']:.2f} "
                         f"| {percent(row, 5, 10)} |")
    return "\n".join(lines)


def ablations(path: Path) -> str:
    """Of a file of benchmarks.ablations. Raises ValueError for one that is not there: a table would lose its rows."""
    if not path.is_file():
        raise ValueError(f"the table of ablations needs {path}, which is not there")
    return ablation_table(read(path))


BLOCKS: dict[str, Callable[[], str]] = {
    "evaluation": lambda: evaluation(packaged()), "evaluation-short": lambda: short(packaged()),
    "ablations-masks": lambda: ablations(DOCS / "ablations-masks.jsonl"),
    "ablations": lambda: ablations(DOCS / "ablations.jsonl"),
    "ablations-ungated": lambda: ablations(DOCS / "ablations-ungated.jsonl"),
    "ablations-before": lambda: ablations(DOCS / "ablations-before.jsonl"), "leak": lambda: leak(DOCS),
    "masks": lambda: masks(DOCS / "masks.json", packaged())}
