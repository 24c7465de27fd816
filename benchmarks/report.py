"""The tables of README and docs from the files of results.

    python -m benchmarks.report                     print those of the benchmarks
    python -m benchmarks.report --write PAGES       put each between its markers in the files
    python -m benchmarks.report --check PAGES       exit status 1 if others are there

PAGES with tables are README.md docs/accuracy.md docs/masks.md docs/performance.md.
Markers are <!-- NAME:begin --> and <!-- NAME:end -->: benchmarks (those of CPUs), benchmarks-gpu, cpu-short, gpu-short,
and the names in benchmarks.accuracy_tables.
"""
from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssl_gpu.checkpoint import write_text
from ssl_gpu.commandline import Parser, end_with

RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+):begin -->\n).*?(<!-- (?P=name):end -->)", re.DOTALL)
ERROR = ("error: relative L2 against float64; of RIRs less their last 6 taps, where the reference cuts off its signal "
         "at 8 times the rate; mixtures hear those.")
PEAK = "peak MiB: on a CPU that of the process so far, so no row has less than the one before it."
TITLES = {"bench_rir": "Room impulse responses", "bench_convolve": "Convolution", "bench_simulate": "Mixtures",
          "bench_train": "Training steps", "peers": "Other simulators, on the same scenes"}

APART = ("bench_train", "bench_simulate")  # whose rows may come from several calls


def markdown(results: dict[str, Any]) -> str:
    """One file of results as a table with a heading, and what one must know to read it."""
    return "\n\n".join([titled_table(results), *notes(results)])


def titled_table(results: dict[str, Any]) -> str:
    """The heading, the table, and the conditions of the measurement."""
    kind = results["benchmark"]
    lines = {"bench_train": train_table, "peers": peers_table}.get(kind, simulation_table)(results)
    machine, versions = results["machine"], results["versions"]
    threads = f"{machine['threads']} CPU thread{'s' if machine['threads'] > 1 else ''}"
    driver = told_driver(machine)
    conditions = (f"{machine['device']}{driver}, {machine['cores']} cores, {threads}, torch {versions['torch']}, "
                  f"Python {versions['python']}, commit {results['commit']}, {results['date']}: `{results['command']}`"
                  + unfinished(results))
    return "\n".join([f"### {TITLES[kind]}: {machine['device']}", "", *lines, "", *floor(results), conditions])


def told_driver(machine: dict[str, Any]) -> str:
    """Of a GPU, where the file says which it is."""
    return f", driver {machine['driver']}" if machine.get("driver") else ""


def floor(results: dict[str, Any]) -> list[str]:
    """Of bench_simulate: the floor of the memory, and how far from it the best row of endless rooms is."""
    least = results.get("floor")
    times = [1e6 / row["scenes_per_s"] for row in results["rows"]
             if "failed" not in row and row["name"] == "endless rooms"] if least else []
    if not times:
        return []
    return [f"Memory floor: {least['bytes_per_scene'] / 1e6:.2f} MB a scene, to read the dry speech and write the "
            f"mixture, at {least['bytes_per_s'] / 1e9:,.0f} GB/s of a copy are {number(least['us_per_scene'])} us; "
            f"endless rooms take {number(min(times) / least['us_per_scene'])} times as long.", ""]


def unfinished(results: dict[str, Any]) -> str:
    """What is to be said of a file that is not complete."""
    return "" if results.get("complete", True) else ", stopped before it was done"


def notes(results: dict[str, Any]) -> list[str]:
    """The workload, and what the columns mean."""
    kind = results["benchmark"]
    return [results["workload"] + "."] + ([results["notes"]] if kind == "peers" else []) + \
        {"peers": [], "bench_train": [PEAK]}.get(kind, [ERROR])


WAYS = {"compiled": "compiled", "fused": "fused", "graph": "captured"}  # keys of a row, and what it is called for


def simulation_table(results: dict[str, Any]) -> list[str]:
    """Of bench_rir, bench_convolve and bench_simulate."""
    head = ["", "batch", "ms per scene (p10 to p90)", "scenes/s", "s of audio per s", "peak MiB", "error"]
    rows = []
    for row in results["rows"]:
        name = row["name"] + "".join(f", {word}" for key, word in WAYS.items() if row.get(key))
        rows.append(failure(name, row, head) if "failed" in row else [
            name, row["batch"], spread(row, 1e3 / row["batch"]), number(row["scenes_per_s"]),
            number(row["audio_s_per_s"]), mebibytes(row["peak_bytes"]),
            "-" if row["error"] is None else f"{row['error']:.1e}"])
    return table(head, rows)


def train_table(results: dict[str, Any]) -> list[str]:
    """Of bench_train; with a column of its own for the wait where some rows simulate beside the step, and for what
    simulation costs where that was measured. Captured steps have no shares."""
    parts, overlapped = ("simulate", "forward", "backward", "update"), any(r.get("overlap") for r in results["rows"])
    compared = any("simulation_cost" in row for row in results["rows"])
    head = ["network", "batch", "precision", "ms per step (p10 to p90)", "examples/s", f"{' / '.join(parts)}, %",
            *["waiting for the simulation, %"] * overlapped, *["simulation costs, %"] * compared, "peak MiB"]
    rows = []
    for row in results["rows"]:
        how = ", compiled" * row["compiled"] + ", overlapped" * row.get("overlap", False)
        how += ", captured" * row.get("graph", False)
        if "failed" in row:
            rows.append(failure(row["name"] + how, row, head))
            continue
        wait = [f"{100 * row['share']['wait']:.0f}" if row["share"] else "-"] if overlapped else []
        cost = [f"{100 * row['simulation_cost']:.1f}"] if compared else []
        shares = " / ".join(f"{100 * row['share'][part]:.0f}" for part in parts) if row["share"] else "-"
        rows.append([f"{row['name']}, {row['parameters'] / 1e6:.2f} M{how}", row["batch"],
                     "bfloat16" if row["bfloat16"] else "float32", spread(row, 1e3), number(row["scenes_per_s"]),
                     shares, *wait, *cost, mebibytes(row["peak_bytes"])])
    return table(head, rows)


def failure(name: str, row: dict[str, Any], head: list[str]) -> list[Any]:
    """The cells of a row that failed, under the head of its table."""
    return [name, row["batch"] or "-", f"failed: {row['failed']}".replace("|", "/"), *["-"] * (len(head) - 3)]


def peers_table(results: dict[str, Any]) -> list[str]:
    """Of peers: what each takes per scene, and how many times faster ours is over the same scenes."""
    rows = []
    for row in results["rows"]:
        target = "-" if row["target"] is None else f">= {row['target']:g}: {'yes' if row['met'] else 'no'}"
        rows.append([row["name"], row["stage"], row["on"], f"{row['scenes']} + {row['refused']}", spread(row, 1e3),
                     number(1e3 * row["mean_s"]), ratios(row), target])
    head = ["", "what", "on", "scenes + refused", "ms per scene (p10 to p90)", "mean", "ours is faster by", "target"]
    lead = ["Only the rows of FRA-RIR are of one task. The others are image-source models, a harder one, and ratios to "
            "them compare time, not work; with ray tracing pyroomacoustics has air absorption, too.", ""]
    skipped = [f"{word.capitalize()}: {name}, {reason}." for word in ("skipped", "stopped")
               for name, reason in results.get(word, {}).items()]
    return lead + table(head, rows) + ([""] + skipped if skipped else [])


def ratios(row: dict[str, Any]) -> str:
    """How many times faster ours is by the clock on the wall, in brackets by CPU time."""
    if row["ratio"] is None:
        return "1"
    return number(row["ratio"]) + ("" if row["ratio_cpu"] is None else f" ({number(row['ratio_cpu'])})")


def table(head: list[str], rows: list[list[Any]]) -> list[str]:
    """Markdown, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(map(str, cells)) + " |" for cells in (head, rule, *rows)]


def spread(row: dict[str, Any], scale: float) -> str:
    """The median, and p10 to p90 in brackets."""
    median, low, high = (scale * row[key] for key in ("median_s", "p10_s", "p90_s"))
    return f"{number(median)} ({number(low)} to {number(high)})"


def number(value: float | None) -> str:
    """Three digits, and no exponent."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def mebibytes(value: int | None) -> str:
    """Bytes in MiB."""
    return "-" if value is None else f"{value / 2**20:,.0f}"


def newest(folder: Path, gpu: bool) -> list[dict[str, Any]]:
    """Of every benchmark on every GPU, or on every CPU with so many threads, the newest results, in the order of
    TITLES; of training steps and mixtures an older file stays if it has networks, arrays or batches that no newer one
    has.

    Raises ValueError for a file that is not one of results.
    """
    found: dict[tuple, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):  # their names begin with the date
        results = json.loads(path.read_text(encoding="utf-8"))
        if results.get("benchmark") not in TITLES:
            raise ValueError(f"{path} must hold the results of one of {', '.join(TITLES)}")
        machine = results["machine"]
        if machine.get("gpu", False) != gpu:                            # older files, of CPUs all, do not say
            continue
        what = results["benchmark"], machine["device"], machine["threads"]
        rows = results["rows"] if results["benchmark"] in APART else ()
        measured = frozenset((row["name"], row["batch"]) for row in rows)
        for older in [key for key in found if key[:-1] == what and key[-1] < measured]:
            del found[older]
        found[(*what, measured)] = results
    return sorted(found.values(), key=lambda results: list(TITLES).index(results["benchmark"]))


def report(folder: Path, gpu: bool = False) -> str:
    """All tables of CPUs or of GPUs, under them every note once; of the peers' own, which files hold, the newest."""
    found = newest(folder, gpu)
    unique = {"the peers'" if note == results.get("notes") else note: note
              for results in sorted(found, key=lambda results: results["date"]) for note in notes(results)}
    return "\n\n".join([*map(titled_table, found), *unique.values()])


SHORT_STAGES = ("RIRs", "RIRs and mixture")  # of benchmarks.peers, which this module does without


def cpu_short(folder: Path) -> str:
    """What a scene takes by each simulator on CPUs, ours first, and how many times faster ours is: a row for each
    simulator, machine by machine."""
    rows, conditions = [], []
    for results in newest(folder, gpu=False):
        if results["benchmark"] != "peers":
            continue
        machine, simulators = results["machine"], {}
        for row in results["rows"]:
            if row["stage"] in SHORT_STAGES:
                simulators.setdefault(row["name"], {})[row["stage"]] = row
        for name, stages in simulators.items():
            known = [stages.get(stage) for stage in SHORT_STAGES]
            rows.append([name, machine["device"], "-" if known[0] is None else f"{known[0]['scenes']:,}",
                         *("-" if row is None else number(1e3 * row["mean_s"]) for row in known),
                         *("-" if row is None else number(row["ratio"]) for row in known)])
        conditions.append(f"{machine['device']}, {machine['threads']} CPU thread{'s' * (machine['threads'] > 1)}, "
                          f"commit {results['commit']}, {results['date']}: `{results['command']}`{unfinished(results)}")
    head = ["", "on", "scenes", "RIRs, ms a scene", "and mixture", "ours is faster by", "and mixture"]
    return "\n\n".join(["\n".join(table(head, rows)), *conditions])


def gpu_short(folder: Path) -> str:
    """Mixtures per second on a GPU, launched one kernel at a time and captured, side by side; of several files of a GPU
    the one of most rows, and of these the newest."""
    mixtures = [results for results in newest(folder, gpu=True) if results["benchmark"] == "bench_simulate"]
    fullest = {results["machine"]["device"]: results  # the last one of a device stays
               for results in sorted(mixtures, key=lambda results: (len(results["rows"]), results["date"]))}
    lines = []
    for results in fullest.values():
        rates: dict[tuple[str, int], dict[bool, dict[str, Any]]] = {}
        for row in results["rows"]:
            if "failed" not in row and row["fused"] and not row["compiled"]:
                rates.setdefault((row["name"], row["batch"]), {})[row["graph"]] = row
        reserved = any(True in ways and ways[True].get("reserved_bytes") for ways in rates.values())
        names, measured = list(dict.fromkeys(name for name, _ in rates)), {way for row in rates.values() for way in row}
        heads = {way: head for way, head in ((False, "by launches"), (True, "one CUDA graph")) if way in measured}
        rows = [[name, batch, *(number(ways[way]["scenes_per_s"]) if way in ways else "-" for way in heads),
                 *[mebibytes(ways[False]["peak_bytes"] if False in ways else None)] * (False in measured),
                 *[mebibytes(ways[True].get("reserved_bytes") if True in ways else None)] * reserved]
                for (name, batch), ways in sorted(rates.items(), key=lambda it: (names.index(it[0][0]), it[0][1]))]
        machine = results["machine"]
        head = ["mixtures/s", "batch", *heads.values(), *["MiB, by launches"] * (False in measured),
                *["MiB, one CUDA graph"] * reserved]
        lines += [*table(head, rows), "",
                  f"{machine['device']}{told_driver(machine)}, torch {results['versions']['torch']}, commit "
                  f"{results['commit']}, {results['date']}: `{results['command']}`{unfinished(results)}"]
    return "\n".join(lines)


def blocks(folder: Path) -> dict[str, Callable[[], str]]:
    """What goes between the markers of each name."""
    from benchmarks.accuracy_tables import BLOCKS  # here, as benchmarks.ablations takes its tables from this module

    return {"benchmarks": lambda: report(folder), "benchmarks-gpu": lambda: report(folder, gpu=True),
            "cpu-short": lambda: cpu_short(folder), "gpu-short": lambda: gpu_short(folder), **BLOCKS}


def insert(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """`text` with the tables between their markers. Raises ValueError where it has none, or others."""
    if not BLOCK.search(text):
        raise ValueError("it must hold a pair of markers, <!-- NAME:begin --> and <!-- NAME:end -->")

    def filled(match: re.Match) -> str:
        if match["name"] not in tables:
            raise ValueError(f"markers must be of {', '.join(tables)}, got {match['name']}")
        return f"{match[1]}{tables[match['name']]()}\n{match[3]}"

    return BLOCK.sub(filled, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", metavar="DIR", type=Path, default=RESULTS, help="default benchmarks/results")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--write", metavar="FILE", type=Path, nargs="+", help="put the tables between their markers")
    where.add_argument("--check", metavar="FILE", type=Path, nargs="+", help="fail if one of these has other tables")
    args = parser.parse_args(arguments)
    stale = []
    try:
        if not args.write and not args.check:
            print("\n\n".join(filter(None, (report(args.results, gpu) for gpu in (True, False)))))
        for target in args.write or args.check or []:
            text = target.read_text(encoding="utf-8")
            try:
                wanted = insert(text, blocks(args.results))
            except ValueError as error:
                raise ValueError(f"{target}: {error}") from error
            if args.write:
                write_text(target, wanted)
            elif text != wanted:
                stale.append(target)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for target in stale:
        print(f"{target} does not show the results: python -m benchmarks.report --write {target}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    end_with(main)
