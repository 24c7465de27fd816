"""The tables of README, docs/accuracy.md and docs/masks.md from the results that the package and docs/results hold."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ablations import read
from benchmarks.ablations import table as ablation_table
from ssl_gpu.pretrained import EVALUATION, PACKAGED, RESULT, WEIGHTS
from ssl_gpu.protocol import NOISES
from ssl_gpu.report import is_leaked
from ssl_gpu.scoring import BINS

DOCS = Path(__file__).parents[1] / "docs" / "results"
SHORT = {"e1": "e1: FRA-RIR's rooms", "e1n5": "e1n5: these with diffuse noise at 5 dB",
         "e2": "e2: image-source rooms by pyroomacoustics",
         "e3": "e3: a real room, microphones 9.4 cm apart (trained for 10, told 9.4)"}
# Of the breakdowns, those that tell something of every set: lower and upper edge.
CIRCUMSTANCES = {"separation_deg": "{:g} to {:g} degrees apart", "angle_deg": "cone angle {:g} to {:g} degrees",
                 "t20_s": "T20 {:g} to {:g} s", "drr_db": "direct-to-reverberant ratio {:g} to {:g} dB",
                 "level_gap_db": "levels {:g} to {:g} dB apart"}
# The runs of docs/results/leak-<run>.json, in order.
LEAK = {"original-300": "small network, 300 of the original's rooms, with e0's 200",
        "law-300": "small network, 300 other rooms of the law",
        "original-h200": "57 M network, the original's 3,000 rooms, with e0's 200, all of its 1,000 steps",
        "original-h200-310-steps": "the same, ended after 310 steps",
        "law-h200": "57 M network, 3,000 other rooms of the law, ended after 356"}


@dataclass(frozen=True)
class Target:
    """What was aimed at on a set, and what is said of it: both cone MAEs at most `most` degrees, `aim` the hope beyond;
    at least `within` % within 10 degrees."""

    set: str
    most: float
    aim: float | None = None
    within: float | None = None

    def __str__(self):
        aim = "" if self.aim is None else f" (aim {self.aim:.1f})"
        within = "" if self.within is None else f", {self.within:g} % within 10 degrees"
        return f"cone MAE on {self.set} at most {self.most:.1f}{aim}{within}"

    def met(self, results: Mapping[str, Any]) -> bool:
        """By both angles, and the share; one angle alone does not meet a target, nor does the mean of both."""
        row = results[self.set]
        return at_most(max(row["cone_mae_deg"]), self.most) and not self.too_few(row)

    def too_few(self, row: Mapping[str, Any]) -> bool:
        """Whether the share within 10 degrees misses."""
        return self.within is not None and not at_most(self.within, 100 * row["acc_at_10"])

    def numbers(self, results: Mapping[str, Any]) -> str:
        """Both angles' errors and, where it has a target, the share within 10 degrees."""
        row = results[self.set]
        return beside(row["cone_mae_deg"], self.most, self.aim) + (
            "" if self.within is None else f", {beside([100 * row['acc_at_10']], self.within, digits=1)} %")

    def reached(self, results: Mapping[str, Any]) -> str:
        """The numbers, and what they are worth."""
        row = results[self.set]
        low, high = errors = row["cone_mae_deg"]
        said = self.numbers(results)
        if self.met(results):
            hope = [] if self.aim is None else [at_most(error, self.aim) for error in errors]
            return said + ": met" + (", the aim too" if hope and all(hope) else of_one(hope, ", the aim for {} only"))
        over = [not at_most(error, self.most) for error in errors]
        by = ["both angles"] if all(over) else [of_one(over, "{}")] if any(over) else []
        by += ["the share"] if self.too_few(row) else []
        return (f"{said}: **missed** by {' and '.join(by)}"
                + (f"; {(low + high) / 2:.3f} in the mean of both" if any(over) else ""))


def at_most(value: float, limit: float) -> bool:
    """value <= limit, but for what is beyond MOST_DIGITS of either."""
    return round(value, MOST_DIGITS) <= round(limit, MOST_DIGITS)


def beside(values: list[float], *limits: float | None, digits: int = 2) -> str:
    """Values with so many digits, or as many more as leave each of them on its side of every limit: 5.004 must not read
    as 5.00 where 5 is the most."""
    while digits < MOST_DIGITS and any(
            at_most(round(value, digits), limit) != at_most(value, limit) or
            at_most(limit, round(value, digits)) != at_most(limit, value)
            for value in values for limit in limits if limit is not None):
        digits += 1
    return pair(values, digits)


def of_one(true: list[bool], text: str) -> str:
    """text with the name of the only angle that it is true of, "" where it is of none or both."""
    return text.format(f"the {('smaller', 'larger')[true.index(True)]} angle") if sum(true) == 1 else ""


TARGETS = (Target("e1", 2.0, aim=1.2, within=98), Target("e2", 4.0, aim=2.5), Target("e1n5", 5.0),
           Target("e3", 3.0, aim=2.0, within=96))
FLOOR_WITHIN = 1.0       # degrees, of e0b's class error
MOST_DIGITS = 6          # of what is compared with a target: beyond are roundings of sums
MOST_PARAMETERS, MOST_BYTES, MOST_MINUTES, HOUR_MINUTES = 3e6, 6e6, 10, 60
HOUR = Target("e1", 2.5)
GPU_RUN = "h200-patches"  # from nothing; the packaged weights went on from its own
# docs/results/evaluation-<name>.json and result-<name>.json
HOURS = {"patches-hour": "by configs/patches.yaml",
         "masks-hour": "by configs/librispeech.yaml, on a slow machine",
         "hour-gated": "by that without masks, on another that was some three times as fast"}


@dataclass(frozen=True)
class Recipe:
    """A training by `settings`, from docs/results/evaluation-<name>.json and result-<name>.json, where no name is
    given from the package; cores: of a CPU, how many it had; after: the runs whose weights it went on from."""

    settings: str
    name: str | None = None
    cores: str = ""
    after: tuple[Recipe, ...] = ()

    def files(self, folder: Path) -> tuple[Path, Path]:
        """Evaluation and result."""
        if self.name is None:
            return PACKAGED / EVALUATION, PACKAGED / RESULT
        return folder / f"evaluation-{self.name}.json", folder / f"result-{self.name}.json"

    def took(self, folder: Path) -> str:
        """Minutes, device and precision, those of the runs before first."""
        run = json.loads(self.files(folder)[1].read_text(encoding="utf-8"))
        return ", then ".join([*(recipe.took(folder) for recipe in self.after),
                               f"{run['minutes']:.1f} of {self.cores or 'an '}{run['device']}, {run['precision']}"])


LIBRISPEECH, PATCHES, TWO_CORES = "`configs/librispeech.yaml`", "`configs/patches.yaml`", "two cores of an "
ON_A_GPU = Recipe(PATCHES, GPU_RUN)
RECIPES = (Recipe(f"the packaged weights: {PATCHES}, then with more noise", cores=TWO_CORES,
                  after=(ON_A_GPU, Recipe(PATCHES, "longer-cpu", "one or two cores of an "))),
           ON_A_GPU,
           Recipe(PATCHES, "patches-hour", TWO_CORES),
           Recipe(LIBRISPEECH, "masks-hour", "two slow cores of an "),
           Recipe(f"{LIBRISPEECH} `features.mask_width=0`", "hour-gated", TWO_CORES))
RECIPE_SETS = ("e1", "e1n5", "e2", "e3")


def targets(results: Mapping[str, Any], training: Mapping[str, Any], size: int, folder: Path) -> str:
    """What was aimed at and what the packaged weights have, of `size` bytes, whose last run had `training`; of hours on
    a CPU and of minutes on a GPU the files in `folder` say."""
    rows = {str(target): target.reached(results) for target in TARGETS}
    e0b = results["e0b"]
    heard, floor = e0b["azimuth_class_mae_deg"], e0b["floor"]["exact_cone_and_distance"]
    near = all(mine - least <= FLOOR_WITHIN for mine, least in zip(heard, floor))
    rows[f"azimuth class MAE on e0b within {FLOOR_WITHIN:.1f} of its floor"] = \
        f"{pair(heard)} with {pair(floor)}: {met(near)}"
    rows[f"within an hour on two CPU cores, {HOUR}"] = "; ".join(
        in_time(HOUR_MINUTES, HOUR, folder, name, how) for name, how in HOURS.items())
    rows[f"within {MOST_MINUTES} minutes on a GPU, {TARGETS[0]}"] = \
        in_time(MOST_MINUTES, TARGETS[0], folder, GPU_RUN, "the H200 weights", gpu=True)
    small = training["parameters"] <= MOST_PARAMETERS and size <= MOST_BYTES
    rows[f"at most {MOST_PARAMETERS / 1e6:.0f} M parameters, {MOST_BYTES / 1e6:.0f} MB of weights"] = \
        (f"{beside([training['parameters'] / 1e6], MOST_PARAMETERS / 1e6)} M, "
         f"{beside([size / 1e6], MOST_BYTES / 1e6, digits=1)} MB: {met(small)}")
    return "\n".join(["| target | reached |", "|---|---|", *(f"| {what} | {said} |" for what, said in rows.items())])


def in_time(minutes: float, target: Target, folder: Path, name: str, how: str, gpu: bool = False) -> str:
    """What the run of docs/results/evaluation-<name>.json and result-<name>.json, told as `how`, reached of a target
    within so many minutes: met if by a run from nothing, on a GPU or on a CPU."""
    found, run = (json.loads((folder / f"{kind}-{name}.json").read_text(encoding="utf-8"))
                  for kind in ("evaluation", "result"))
    good = at_most(run["minutes"], minutes) and not run["steps_before"]
    good = good and run["device"].startswith("NVIDIA") == gpu
    return (f"{how}, {target.numbers(found)} after {beside([run['minutes']], minutes, digits=1)} minutes from "
            f"{begun(run)}{', ' + run['device'] if gpu else ''}: {met(good and target.met(found))} "
            f"([evaluation](results/evaluation-{name}.json), [result.json](results/result-{name}.json))")


def recipes(folder: Path) -> str:
    """What each of RECIPES took and gave."""
    lines = ["| settings | minutes | mixtures | " + " | ".join(RECIPE_SETS) + " |",
             "|---" * (3 + len(RECIPE_SETS)) + "|"]
    for recipe in RECIPES:
        found, run = (json.loads(path.read_text(encoding="utf-8")) for path in recipe.files(folder))
        cells = " | ".join(pair(found[name]["cone_mae_deg"]) for name in RECIPE_SETS)
        lines.append(f"| {recipe.settings} | {recipe.took(folder)} | {run['examples']:,} | {cells} |")
    return "\n".join(lines)


def begun(run: Mapping[str, Any]) -> str:
    """What a run of this result.json began from."""
    return f"other weights of {run['steps_before']:,} steps" if run["steps_before"] else "nothing"


def met(yes: bool) -> str:
    """In a table."""
    return "met" if yes else "**missed**"


def pair(values: list[float], digits: int = 2) -> str:
    """Of the smaller and the larger angle."""
    return " / ".join(f"{value:.{digits}f}" for value in values)


def percent(row: Mapping[str, Any], *degrees: int) -> str:
    """Shares within so many degrees."""
    return ", ".join(f"{100 * row[f'acc_at_{limit}']:.1f}" for limit in degrees) + " %"


def evaluation(results: Mapping[str, Any]) -> str:
    """Every set, LEAKED where it is, the model above GCC-PHAT and chance, with the floors, and the digests."""
    lines = ["| set | clips | cone MAE | 95 % | median | within 5, 10, 15 degrees | both within 10 | azimuth class MAE "
             "| floors: cone angles known, distances, too |", "|---" * 9 + "|"]
    for names, result in by_digest(results).items():
        floor = "" if result["floor"] is None else ", ".join(
            pair(result["floor"][key], 1) for key in ("exact_cone", "exact_cone_and_distance"))
        rows = {f"**{names}**" + (", LEAKED" if is_leaked(result) else ""): result, **others(result)}
        for label, row in rows.items():
            first = row is result
            interval = " / ".join(f"{low:.1f} to {high:.1f}" for low, high in
                                  (row["interval_95"] or {"cone_mae_deg": ()})["cone_mae_deg"])
            lines.append(f"| {label} | {result['num_clips'] if first else ''} | {pair(row['cone_mae_deg'])} "
                         f"| {interval} | {row['cone_median_deg']:.2f} | {percent(row, 5, 10, 15)} "
                         f"| {100 * row['both_at_10']:.1f} % | {pair(row['azimuth_class_mae_deg'])} "
                         f"| {floor if first else ''} |")
    digests = ", ".join(f"{names} {result['eval_digest']}" for names, result in by_digest(results).items())
    return "\n".join(lines) + f"\n\nDigests, of version {next(iter(results.values()))['set_version']}: {digests}."


def by_digest(results: Mapping[str, Any]) -> dict[str, Any]:
    """Results by name, those of the same clips in one row: "e0b, e1"."""
    names: dict[str, list[str]] = {}
    for name, result in results.items():
        names.setdefault(result["eval_digest"], []).append(name)
    return {", ".join(alike): results[alike[0]] for alike in names.values()}


def others(result: Mapping[str, Any]) -> dict[str, Any]:
    """What stands below a model."""
    return {"GCC-PHAT": result["baseline"], "GCC-PHAT, mean": result["baseline_mean"], "chance": result["chance"]}


def azimuth(results: Mapping[str, Any]) -> str:
    """Every set: azimuth as an angle, and the talkers that were missed, by cone angle."""
    lines = ["| set | azimuth MAE | median | P90 | within 5, 10, 15 degrees | both within 10 | floor of the MAE "
             "| cone P90 | missed | found, off by |", "|---" * 10 + "|"]
    for names, result in by_digest(results).items():
        for label, row in {f"**{names}**": result, "GCC-PHAT": result["baseline"], "chance": result["chance"]}.items():
            angle, fine = row["azimuth"], row["detection_at_10"]["fine_error_deg"]
            floor = "" if row is not result or result["floor"] is None else pair(
                result["floor"]["exact_cone_and_distance_mae"], 1)
            within = ", ".join(f"{50 * sum(angle[f'acc_at_{limit}']):.1f}" for limit in (5, 10, 15)) + " %"
            lines.append(f"| {label} | {pair(angle['mae_deg'])} | {pair(angle['median_deg'])} "
                         f"| {pair(angle['p90_deg'], 1)} | {within} | {100 * angle['both_at_10']:.1f} % | {floor} "
                         f"| {pair(row['cone']['p90_deg'], 1)} | {100 * row['detection_at_10']['mdr']:.1f} % "
                         f"| {'' if fine is None else f'{fine:.2f}'} |")
    return "\n".join(lines)


def by_circumstance(results: Mapping[str, Any]) -> str:
    """Cone MAE of the model in every bin, sets side by side, and of how many sources."""
    shown = {names: result["by"] for names, result in by_digest(results).items()}
    lines = ["| | " + " | ".join(shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for name, label in CIRCUMSTANCES.items():
        for low, high in zip(BINS[name], BINS[name][1:]):
            found = [next((row for row in by.get(name, ()) if row["from"] == low), None) for by in shown.values()]
            if any(found):
                cells = ("" if row is None else f"{row['cone_mae_deg']:.2f} ({row['num_sources']})" for row in found)
                lines.append(f"| {label.format(low, high)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_snr(path: Path) -> str:
    """Of the sets with noise and e1 in a file of ssl_gpu.evaluate: the model and GCC-PHAT, white and diffuse."""
    results = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| | SNR | clips | cone MAE | median | within 5, 10 degrees | GCC-PHAT: cone MAE | within 10 |",
             "|---" * 8 + "|"]
    for name, mixture in NOISES.items():
        kind, snr = ("diffuse", mixture.diffuse_snr_db) if mixture.diffuse_snr_db else ("white", mixture.sensor_snr_db)
        lines.append(f"| {kind} | {snr[0]:.0f} dB {_snr_cells(results[name])}")
    return "\n".join((*lines, f"| none | {_snr_cells(results['e1'])}"))


def _snr_cells(row: Mapping[str, Any]) -> str:
    return (f"| {row['num_clips']} | {pair(row['cone_mae_deg'])} | {row['cone_median_deg']:.2f} "
            f"| {percent(row, 5, 10)} | {pair(row['baseline']['cone_mae_deg'])} | {percent(row['baseline'], 10)} |")


def short(results: Mapping[str, Any]) -> str:
    """The sets of SHORT, LEAKED where they are, for the README."""
    lines = ["| | clips | cone MAE | median | within 5, 10 degrees | GCC-PHAT: cone MAE | within 10 | chance |",
             "|---" * 8 + "|"]
    for name, label in SHORT.items():
        row, baseline = results[name], results[name]["baseline"]
        label += ", LEAKED" if is_leaked(row) else ""
        lines.append(f"| {label} | {row['num_clips']:,} | {pair(row['cone_mae_deg'])} | {row['cone_median_deg']:.2f} "
                     f"| {percent(row, 5, 10)} | {pair(baseline['cone_mae_deg'])} | {percent(baseline, 10)} "
                     f"| {pair(row['chance']['cone_mae_deg'], 1)} |")
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


def packaged_targets() -> str:
    """`targets` of the weights in the package."""
    training = json.loads((PACKAGED / RESULT).read_text(encoding="utf-8"))
    return targets(packaged(), training, (PACKAGED / WEIGHTS).stat().st_size, DOCS)


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
    "evaluation-azimuth": lambda: azimuth(packaged()), "evaluation-by": lambda: by_circumstance(packaged()),
    "targets": packaged_targets, "recipes": lambda: recipes(DOCS),
    "evaluation-snr": lambda: by_snr(DOCS / "evaluation-snr.json"),
    "ablations-masks": lambda: ablations(DOCS / "ablations-masks.jsonl"),
    "ablations-symmetric": lambda: ablations(DOCS / "ablations-symmetric.jsonl"),
    "ablations": lambda: ablations(DOCS / "ablations.jsonl"),
    "ablations-ungated": lambda: ablations(DOCS / "ablations-ungated.jsonl"),
    "ablations-before": lambda: ablations(DOCS / "ablations-before.jsonl"), "leak": lambda: leak(DOCS),
    "masks": lambda: masks(DOCS / "masks.json", packaged())}
