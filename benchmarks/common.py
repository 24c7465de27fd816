"""What the benchmarks share: the workload, the clock, the error against the float64 oracle, and the file of results."""
from __future__ import annotations

import argparse
import gc
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import date
from functools import lru_cache
from importlib.util import module_from_spec, spec_from_file_location
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import markdown
from ssl_gpu import rng, runtime
from ssl_gpu.checkpoint import write_json
from ssl_gpu.commandline import Parser, told
from ssl_gpu.outputs import output_file
from ssl_gpu.rir import ImageBatch
from ssl_gpu.scene import SceneBatch
from ssl_gpu.simulator import Draw, SimulatorConfig

ROOT = Path(__file__).parents[1]
CLIP_S = 3.0
WORKLOAD = ("2x2: 2 microphones 10 cm apart, 2 sources, rooms of 3 x 3 x 2.5 to 10 x 6 x 4 m, RT60 of 0.1 to 0.7 s, "
            "1024 to 4096 images, 16 kHz, 3 s of noise per source")
BURN_IN = 3  # calls before the clock starts: kernels are chosen, memory is had, tables are made
LEAST_CALLS = 5
COPIES = 5  # in a timed call: on a GPU a copy takes 0.5 ms, the launch and the wait for them some 0.02
CHOICES = {"no": (False,), "yes": (True,), "both": (False, True)}
UNFAITHFUL_TAPS = 6  # at its end an RIR differs from the reference's by design, see ssl_gpu.rir.render_rir


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median, 10th and 90th percentile of `calls` calls."""

    median_s: float
    p10_s: float
    p90_s: float
    calls: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """The summary of single calls."""
        p10, median, p90 = np.percentile(seconds, (10, 50, 90)).tolist()
        return cls(median, p10, p90, len(seconds))


def measure(function: Callable[[], Any], device: torch.device, seconds: float) -> Timing:
    """Time `function` for about `seconds` s after a burn-in, waiting for the device at the end of every call; on a
    GPU, peak_memory is then that of these calls, and of what was held before."""
    runtime.reset_peak_memory(device)
    for _ in range(BURN_IN):
        function()
    runtime.synchronize(device)
    times: list[float] = []
    while len(times) < LEAST_CALLS or sum(times) < seconds:
        begin = time.perf_counter()
        function()
        runtime.synchronize(device)
        times.append(time.perf_counter() - begin)
    return Timing.of(times)


def row(name: str, batch: int, timing: Timing, audio_s: float | None, device: torch.device,
        **more: Any) -> dict[str, Any]:
    """One line of results: `batch` scenes and `audio_s` seconds of audio (a clip counts once, however many microphones
    hear it) per call.

    peak_bytes is, on a CPU, that of the process so far, so rows must be made from small to large. reserved_bytes is
    what torch has taken of a GPU, with what only a captured graph may use, which peak_bytes leaves out; None on a CPU.
    """
    return {"name": name, "batch": batch, "calls": timing.calls, "median_s": timing.median_s, "p10_s": timing.p10_s,
            "p90_s": timing.p90_s, "scenes_per_s": batch / timing.median_s,
            "audio_s_per_s": None if audio_s is None else audio_s / timing.median_s,
            "peak_bytes": runtime.peak_memory(device), "reserved_bytes": runtime.peak_reserved(device), "error": None,
            **more}


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy too large for caches: 1 GiB on a GPU, 256 MiB on a CPU."""
    source = torch.ones((1 << (28 if runtime.is_gpu(device) else 26),), device=device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(COPIES):
            target.copy_(source)

    return COPIES * 2 * source.nbytes / measure(copies, device, 0.1).median_s


Check = Callable[[], float | None]


@dataclass(frozen=True)
class Task:
    """A row to be: make() measures it, and gives with it what compares it with the float64 oracle (None: nothing).

    That comparison, the relative L2, is called when everything is measured, which keeps the oracle's memory out of it;
    so it may hold on to a few scenes on the CPU, and to nothing on a GPU, where the next row's peak would count it.
    """

    name: str
    batch: int | None  # None: as the row says
    compiled: bool
    make: Callable[[], tuple[dict[str, Any], Check | None]]
    more: dict[str, Any] = field(default_factory=dict)  # of the row, if it fails


T = TypeVar("T")


def kept(value: T) -> T:
    """A tensor, or a dataclass of tensors, on the CPU and in memory of its own: no view that holds a whole batch."""
    if isinstance(value, Tensor):
        return value.cpu().clone()
    if is_dataclass(value):
        return replace(value, **{each.name: kept(getattr(value, each.name)) for each in fields(value) if each.init})
    return value


def generator(device: torch.device, step: int = 0) -> torch.Generator:
    """The random numbers of benchmarks, on `device`."""
    return rng.generator(0, rng.Split.TEST, rng.Stream.SCENE, step, device=device)


def noise(batch: int, num_src: int, num_samples: int, device: torch.device) -> Tensor:
    """White noise in place of speech, [batch, src, sample]; no step of the simulation depends on its values."""
    return 0.1 * torch.randn((batch, num_src, num_samples), generator=generator(device, 1), device=device)


# ---- the float64 oracle ----


@lru_cache(maxsize=None)
def oracle() -> ModuleType:
    """tests/oracle.py, slow, float64 and independent of the package. Loaded by its path: `tests` is no package."""
    spec = spec_from_file_location("oracle", ROOT / "tests" / "oracle.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def oracle_rir(scenes: SceneBatch, images: ImageBatch, index: int, sample_rate: int) -> np.ndarray:
    """The RIRs of scene `index` in float64, [mic, src, tap], from the same draws."""
    active = images.active[index].cpu()
    room, mic, src = (tensor[index].cpu().numpy() for tensor in (scenes.room_dim, scenes.mic_pos, scenes.src_pos))
    drawn = (tensor[index].cpu()[:, active].numpy() for tensor in (images.direction, images.ratio, images.perturbation))
    return oracle().fra_rir(room, float(scenes.rt60[index]), mic, src, *drawn, sample_rate=sample_rate)[0]


def rir_error(actual: Iterable[Tensor], scenes: SceneBatch, images: ImageBatch, sample_rate: int) -> float | None:
    """The largest relative L2 error of the RIRs [mic, src, tap] of the first scenes of a batch."""
    errors = []
    for index, rir in enumerate(actual):
        expected = oracle_rir(scenes, images, index, sample_rate)[..., :-UNFAITHFUL_TAPS]
        errors.append(relative_l2(rir[..., :expected.shape[-1]], expected))
    return max(errors, default=None)


def oracle_mixture(dry: Tensor, rir: Tensor | np.ndarray) -> np.ndarray:
    """dry [src, sample] through rir [mic, src, tap] in float64, by direct convolution, [mic, sample]."""
    rir = rir if isinstance(rir, np.ndarray) else rir.double().cpu().numpy()
    return oracle().mixture(dry.double().cpu().numpy(), rir, np.ones(len(dry)))


def oracle_noise(speech: np.ndarray, draw: Draw, index: int, sample_rate: int) -> np.ndarray:
    """speech [mic, sample] with the noise of example `index` of a draw on the CPU, in float64."""
    noises = draw.mixture
    parts = {} if noises.sensor is None else {"sensor": noises.sensor[index].double().numpy()}
    if noises.diffuse is not None:
        parts["diffuse"] = oracle().diffuse(noises.diffuse[index].double().numpy(),
                                            draw.scenes.mic_pos[index].double().numpy(), sample_rate)
    snr = {"sensor": float(noises.sensor_snr[index]), "diffuse": float(noises.diffuse_snr[index])}
    return speech + sum(oracle().at_snr(noise, speech, snr[kind]) for kind, noise in parts.items())


def relative_l2(actual: Tensor, expected: np.ndarray) -> float:
    """|actual - expected| / |expected| over all elements."""
    return float(np.linalg.norm(actual.double().cpu().numpy() - expected) / np.linalg.norm(expected))


# ---- command line and results ----


def parser(name: str, description: str, seconds: float | None = 3.0) -> argparse.ArgumentParser:
    """The options that every benchmark has; seconds None: no --seconds."""
    result = Parser(prog=f"python -m benchmarks.{name}", description=description.partition("\n\n")[0])
    result.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    result.add_argument("--threads", type=positive, metavar="N", help="CPU threads of torch (default: torch's choice)")
    if seconds is not None:
        result.add_argument("--seconds", type=duration, default=seconds,
                            help=f"measure a row so long (default {seconds:g})")
    result.add_argument("--json", metavar="FILE", help="write the results there as well")
    return result


def add_batch(arguments: argparse.ArgumentParser, default: str) -> None:
    """--batch, --compile and --check, of benchmarks of the simulation."""
    arguments.add_argument("--batch", type=positive, nargs="+", metavar="N", help=f"scenes per call ({default})")
    arguments.add_argument("--compile", choices=CHOICES, default="no", help="render through torch.compile (default no)")
    arguments.add_argument("--fused", choices=CHOICES,
                           help="by Triton kernels, which a CPU has not (default: yes where they work)")
    arguments.add_argument("--check", type=whole, default=2, metavar="N",
                           help="compare so many scenes with the float64 oracle (default 2)")


def ways(args: argparse.Namespace, device: torch.device) -> list[dict[str, bool]]:
    """What --compile, --fused and --graph ask for, as keys of a row: eager first, as compilation takes longest, fails
    most. Ends the program where a CPU is to capture, or to run Triton's kernels."""
    on_gpu, graph = runtime.is_gpu(device), getattr(args, "graph", "no")
    for option, value in (("--graph", graph), ("--fused", args.fused or "no")):
        if value != "no" and not on_gpu:
            refuse(f"{option} must be no on a {device.type}, got {value}")
    graphs = [{"graph": captured} for captured in CHOICES[graph]] if hasattr(args, "graph") else [{}]
    fused = CHOICES[args.fused] if args.fused else (SimulatorConfig().fused_on(device),)
    return [{"compiled": compiled, "fused": fuse, **captured} for compiled, fuse, captured in
            product(CHOICES[args.compile], fused, graphs)]


def told_command(benchmark: str, arguments: Sequence[str] | None) -> str:
    """The command line of a benchmark as its results have it. arguments: as main's."""
    return told(f"benchmarks.{benchmark}", sys.argv[1:] if arguments is None else arguments)


def refuse(problem: str) -> NoReturn:
    """Ends the program, with the status that argparse has for a command line that asks for what cannot be."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(2)


def positive(text: str) -> int:
    """A whole number >= 1 from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {number}")
    return number


def whole(text: str) -> int:
    """A whole number >= 0 from the command line."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {number}")
    return number


def duration(text: str) -> float:
    """Seconds or minutes >= 0 from the command line."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be >= 0, got {text}")
    return number


def start(args: argparse.Namespace) -> torch.device:
    """The device and the threads that the command line asks for. Ends the program where there is no such device, and
    where --json cannot be written."""
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        if getattr(args, "json", None) is not None:                     # benchmarks.all has none
            args.json = output_file("--json", args.json)
        return runtime.pick_device(args.device, "--device")
    except ValueError as error:
        refuse(str(error))


class Results:
    """The results of one benchmark, with everything that a number is worth nothing without and without names of hosts,
    users or folders. Its file is written anew after every row, so that whatever ends the program costs no row that is
    done; what fails is a row that says so, and the next one follows.
    """

    def __init__(self, benchmark: str, device: torch.device, arguments: Sequence[str] | None, path: str | None,
                 **more: Any):
        """arguments: as main's; path: of the file, if there is to be one; more: further keys of it."""
        name = runtime.device_name(device)
        machine = {"device": name, "slug": slug(name), "gpu": runtime.is_gpu(device), "cores": os.cpu_count(),
                   "threads": torch.get_num_threads(), "driver": runtime.driver(device)}
        self.path, self.device, self._checks = path, device, []
        self.rows: list[dict[str, Any]] = []
        self.content = {"benchmark": benchmark, "command": told_command(benchmark, arguments),
                        "date": date.today().isoformat(), "machine": machine, "versions": runtime.versions(),
                        "commit": commit(), "workload": WORKLOAD, "complete": False, **more, "rows": self.rows}

    def measure(self, tasks: Iterable[Task]) -> None:
        """The rows of the tasks, in their order."""
        for task in tasks:
            gc.collect()  # a cycle may still hold tensors of the row before, which would count in this one's peak
            try:
                runtime.release_memory(self.device)  # which fails, too, on a GPU that the row before has spoiled
                runtime.reset_peak_memory(self.device)
                row, check = task.make()
            except Exception as error:
                row, check = {"name": task.name, "batch": task.batch, "compiled": task.compiled, **task.more}, None
                self._fail(row, error)
            self.rows.append(row)
            if check is not None:
                self._checks.append((row, check))
            self.save()

    def save(self) -> None:
        """Writes the file as far as it goes. Ends the program where it cannot be written."""
        if self.path is None:
            return
        try:
            write_json(self.path, self.content)
        except OSError as error:
            sys.exit(f"error: cannot write {self.path}: {error.strerror}")

    def finish(self) -> int:
        """Compare with the oracle, print the table, write the file; returns the exit status, 1 where a row failed."""
        for row, check in self._checks:
            try:
                error = check()
                if error is not None and not math.isfinite(error):  # JSON has no word for it
                    raise ValueError(f"the error against the oracle must be finite, got {error}")
                row["error"] = error
            except Exception as error:  # its times stand, but nothing says that they are those of the right numbers
                self._fail(row, error)
            self.save()                                                 # each takes seconds: whatever ends them
        self.content["complete"] = True
        self.save()
        print(markdown(self.content))
        return int(any("failed" in row for row in self.rows))

    @staticmethod
    def _fail(row: dict[str, Any], error: Exception) -> None:
        lines = str(error).strip().splitlines()
        row["failed"] = f"{type(error).__name__}: {lines[0] if lines else ''}"[:200].removesuffix(": ")
        print(f"failed: {row['name']}, batch {row['batch']}: {row['failed']}", file=sys.stderr)


def slug(name: str) -> str:
    """The name of a device as part of a file's: NVIDIA H200 is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The git commit of the sources, "-dirty" where they differ from it; "unknown" outside a checkout."""
    command = ("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
