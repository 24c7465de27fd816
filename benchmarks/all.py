"""Everything that is to be known of a machine, in one call: the GPU's tests, every benchmark, and the targets.

    python -m benchmarks.all --device cuda --out benchmarks/results
    python -m benchmarks.all --device cpu --out DIR --quick      the smallest sizes, to see that it works

Each part runs in a process of its own, so that one that fails takes nothing along, and writes
<date>-<device>-<part>.json after every row; <date>-<device>-summary.md says how each ended and which targets are met.
Exit status 1 where a part failed, or a row of it, or its --limit was over, which costs the rows that were not measured
yet; a target that is missed is a result. --only runs some parts, where time is short; the
summary is of all of the day's files for this device in the folder.
"""
from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.report import WAYS
from ssl_gpu.checkpoint import write_text
from ssl_gpu.commandline import Parser, end_with

SCENES_PER_S, LEAST_BATCH = 150_000, 512
MEMORY_GB, MEMORY_BATCH = 8.0, 1024
EXAMPLES_PER_S, SIMULATION_SHARE = 10_000, 0.10
FLAT, FLAT_BATCHES = 0.20, (256, 4096)  # time per scene: largest over smallest less 1, between these batches
LINEAR = 0.20                           # time per RIR of 2x4 and 4x4 over that of 2x2, less 1
ARRAYS = ("2x4", "4x4")                 # 2x2 is what all else is measured with
TRAINED = ("original", "original-nchw")  # they train all that the original trains, original-fft not its transform
LIMIT_MIN = 10.0                        # of a part on a GPU


@dataclass(frozen=True)
class Part:
    """A process: `arguments` behind python, and whether it takes the options that every benchmark has."""

    name: str
    arguments: tuple[str, ...]
    benchmark: bool = True


def parts_of(on_gpu: bool, quick: bool) -> list[Part]:
    """What is run, in this order."""
    def benchmark(name: str, *arguments: str, module: str | None = None) -> Part:
        return Part(name, ("-m", f"benchmarks.{module or f'bench_{name}'}", *arguments))

    tests = Part("tests", ("-m", "pytest", "-m", "gpu", "tests"), benchmark=False)
    if quick:
        short = ("--seconds", "0", "--check", "1")
        return [tests,
                benchmark("rir", "--batch", "2", "--compile", "no", *short),
                benchmark("convolve", "--batch", "1", *short),
                benchmark("simulate", "--batch", "2", "4", "--arrays", *ARRAYS, "--array-batch", "4", "--compile", "no",
                          *short),
                benchmark("train", "--model", "librispeech", "--batch", "2", "--compile", "no", "--overlap", "both",
                          "--seconds", "0"),
                benchmark("peers", "--scenes", "2", "--batch", "2", "--patience", "0", module="peers")]
    if not on_gpu:
        return [tests, benchmark("rir"), benchmark("convolve"), benchmark("simulate", "--arrays", *ARRAYS),
                benchmark("train", "--model", "librispeech", "original"),
                benchmark("peers", "--scenes", "256", module="peers")]
    return [tests,
            benchmark("rir", "--batch", "64", "512", "2048", "--fused", "both"),
            benchmark("convolve", "--batch", "64", "512"),
            benchmark("simulate", "--batch", "64", "256", "512", "1024", "2048", "4096", "--arrays", *ARRAYS,
                      "--array-batch", "512", "--fused", "both", "--graph", "both"),
            benchmark("train", "--model", "librispeech", "original", "original-fft", "original-nchw", "--compile",
                      "both", "--overlap", "both", "--graph", "both", "--seconds", "5", "--set",
                      "train.precision=bfloat16"),
            benchmark("peers", "--scenes", "4096", "--batch", "1024", "--patience", "30", module="peers")]


def run(part: Part, out: Path, stem: str, device: str, threads: int | None,
        limit_min: float | None) -> tuple[bool, float]:
    """One part, its output passed on: whether it succeeded, and its seconds. Without a file it has not, nor when it
    had to be ended after limit_min minutes (None: never), which leaves the file as far as it got."""
    command, path = [sys.executable, *part.arguments], out / f"{stem}-{part.name}.json"
    if part.benchmark:
        path.unlink(missing_ok=True)  # an earlier one of today would pass for this one
        command += ["--device", device, "--json", str(path), *(["--threads", str(threads)] if threads else [])]
    print(f"\n== {part.name}: python {' '.join(part.arguments)}", flush=True)
    begin = time.perf_counter()
    try:
        status = subprocess.run(command, cwd=common.ROOT, timeout=limit_min and 60 * limit_min).returncode
    except subprocess.TimeoutExpired:
        print(f"{part.name}: ended after --limit {limit_min:g} min", file=sys.stderr)
        status = 1
    return status == 0 and (path.is_file() or not part.benchmark), time.perf_counter() - begin


def name_of(device: torch.device) -> str:
    """runtime.device_name, asked for by another process: in this one it would take hold of the GPU, and of some of its
    memory for as long as the parts run."""
    program = ("import sys; from ssl_gpu import runtime; "
               "print(runtime.device_name(runtime.pick_device(sys.argv[1])))")
    return subprocess.run([sys.executable, "-c", program, str(device)], cwd=common.ROOT, stdout=subprocess.PIPE,
                          text=True, check=True).stdout.strip()


# ---- targets ----


@dataclass(frozen=True)
class Verdict:
    """A target, what was measured (None: nothing that tells), and whether that meets it."""

    target: str
    measured: str | None
    met: bool


def verdicts(results: dict[str, dict[str, Any]]) -> list[Verdict]:
    """What the files of results, by the name of their part, say of the targets."""
    rows = {part: [row for row in results.get(part, {}).get("rows", []) if "failed" not in row]
            for part in ("simulate", "train")}
    mixtures = [row for row in rows["simulate"] if row["name"].startswith("endless rooms")]
    plain = [row for row in mixtures if row["name"] == "endless rooms"]
    trained = [row for row in rows["train"] if row["name"] in TRAINED and row["bfloat16"]]
    return [speed(plain), memory(plain), *flat(plain), *linear(mixtures), *training(trained)]


def best(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of most scenes per second."""
    return max(rows, key=lambda row: row["scenes_per_s"], default=None)


def speed(rows: list[dict[str, Any]]) -> Verdict:
    """Mixtures per second in large batches."""
    target, row = (f">= {SCENES_PER_S:,} scenes/s in batches of {LEAST_BATCH} or more",
                   best([row for row in rows if row["batch"] >= LEAST_BATCH]))
    if row is None:
        return Verdict(target, None, False)
    return Verdict(target, f"{row['scenes_per_s']:,.0f} scenes/s, batch {row['batch']}{compiled(row)}",
                   row["scenes_per_s"] >= SCENES_PER_S)


def memory(rows: list[dict[str, Any]]) -> Verdict:
    """Of a GPU: what torch's tensors held at most, dry speech included; of captured batches, which keep more than
    these, what torch has taken."""
    target = f"simulator <= {MEMORY_GB:g} GB at batch {MEMORY_BATCH:,}"
    held = [row.get("reserved_bytes") if row.get("graph") else row["peak_bytes"] for row in rows
            if row["batch"] == MEMORY_BATCH]
    peaks = [size / 1e9 for size in held if size is not None]
    return Verdict(target, f"{max(peaks):.2f} GB", max(peaks) <= MEMORY_GB) if peaks else Verdict(target, None, False)


def flat(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Time per scene over the batch size, by each way."""
    found = []
    for kind in sorted({compiled(row) for row in rows}) or [""]:
        low, high = FLAT_BATCHES
        same = [row for row in rows if compiled(row) == kind and low <= row["batch"] <= high]
        target = f"time per scene flat to {100 * FLAT:.0f} % for batches of {low} to {high:,}"
        if len({row["batch"] for row in same} & set(FLAT_BATCHES)) < 2:
            found.append(Verdict(target, None, False))
            continue
        times = {row["batch"]: 1e6 * row["median_s"] / row["batch"] for row in same}
        text = ", ".join(f"{batch}: {time:.3g} us" for batch, time in sorted(times.items()))
        found.append(Verdict(target, text + kind, max(times.values()) <= (1 + FLAT) * min(times.values())))
    return found


def linear(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Time per microphone and source of larger scenes, over that of 2x2 in the same batch, by each way."""
    found = []
    for name in ARRAYS:
        target = f"{name} microphones x sources at most {100 * LINEAR:.0f} % above 2x2, per pair"
        pairs = [(wide, base) for wide in rows if wide["name"] == f"endless rooms, {name}"
                 for base in rows if base["name"] == "endless rooms" and base["batch"] == wide["batch"]
                 and compiled(base) == compiled(wide)]
        if not pairs:
            found.append(Verdict(target, None, False))
        for wide, base in pairs:
            mics, srcs = map(int, name.split("x"))
            ratio = wide["median_s"] / base["median_s"] / (mics * srcs / 4)
            found.append(Verdict(target, f"{ratio:.2f} times, batch {base['batch']}{compiled(wide)}",
                                 ratio <= 1 + LINEAR))
    return found


def training(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Steps of the original's network in bfloat16: the quickest row, and what its simulation costs."""
    targets = (f">= {EXAMPLES_PER_S:,} examples/s training the original in bfloat16",
               f"of which at most {100 * SIMULATION_SHARE:.0f} % are simulation")
    row = best(rows)
    if row is None:
        return [Verdict(target, None, False) for target in targets]
    where = f"{row['name']}, batch {row['batch']}{compiled(row)}{', overlapped' if row['overlap'] else ''}"
    share, cost = row["share"], row["simulation_cost"]
    parts = (f" ({100 * share['wait']:.1f} % waiting, {100 * share['simulate']:.1f} % of the step's time on its "
             f"stream)") if share else ""                               # captured steps have no shares
    return [Verdict(targets[0], f"{row['scenes_per_s']:,.0f} examples/s, {where}",
                    row["scenes_per_s"] >= EXAMPLES_PER_S),
            Verdict(targets[1], f"{100 * cost:.1f} % over steps with one batch{parts}", cost <= SIMULATION_SHARE)]


def compiled(row: dict[str, Any]) -> str:
    """What is said of a row that is compiled, fused or captured."""
    return "".join(f", {word}" for key, word in WAYS.items() if row.get(key))


def summary(name: str, outcomes: dict[str, tuple[bool, float]], found: list[Verdict]) -> str:
    """How every part ended, and the targets, as Markdown."""
    lines = [f"# {name}, {date.today().isoformat()}, commit {common.commit()}", "", "| part | ended | s |",
             "| --- | --- | ---: |"]
    lines += [f"| {part} | {'well' if well else 'FAILED'} | {seconds:.0f} |"
              for part, (well, seconds) in outcomes.items()]
    lines += ["", "| target | measured | met |", "| --- | --- | --- |"]
    lines += [f"| {v.target} | {v.measured or 'not measured'} | {'yes' if v.met else 'no' if v.measured else '-'} |"
              for v in found]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.all", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--threads", type=common.positive, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes; its numbers mean nothing")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[p.name for p in parts_of(True, False)],
                        help="some parts: tests, rir, convolve, simulate, train, peers")
    parser.add_argument("--limit", type=common.duration, metavar="MIN",
                        help=f"minutes for each part (default {LIMIT_MIN:g} on a GPU, none on a CPU)")
    args = parser.parse_args(arguments)
    device = common.start(args)
    limit_min = LIMIT_MIN if args.limit is None and device.type == "cuda" else args.limit
    out = args.out.resolve()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        common.refuse(f"--out must be a folder, cannot make {args.out}: {error.strerror}")
    name = name_of(device)
    stem = f"{date.today().isoformat()}-{common.slug(name)}"
    outcomes = {part.name: run(part, out, stem, args.device, args.threads, limit_min)
                for part in parts_of(device.type == "cuda", args.quick)
                if args.only is None or part.name in args.only}
    results = {path.stem.removeprefix(f"{stem}-"): json.loads(path.read_text(encoding="utf-8"))
               for path in sorted(out.glob(f"{stem}-*.json"))}
    text = summary(name, outcomes, verdicts(results))
    write_text(out / f"{stem}-summary.md", text)
    print(f"\n{text}")
    failed = [part for part, (well, _) in outcomes.items() if not well]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    end_with(main)
