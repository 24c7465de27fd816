"""Training steps of the networks of configs/ in endless rooms: how long, and the share of simulation in it.

The shares are measured by ssl_gpu.runtime.StepTimer: by events on a GPU, which does not wait for them. With overlap the
next batch is simulated beside the step, on a stream of its own: "simulate" is how long that takes, in which it competes
with the step, and "wait" how long the step waits for it; without overlap the one is the other. Neither tells how much
the simulation slows the rest down: what it costs is the share of the step that goes when every step has the same batch.
Rows that are captured (train.graph) have steps that are one CUDA graph each, simulation included: they have no shares.
"""
from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from ssl_gpu import runtime
from ssl_gpu.commandline import end_with
from ssl_gpu.config import RunConfig, load_config
from ssl_gpu.mixture import MixtureBatch
from ssl_gpu.optim import Averaged, build_optimizer
from ssl_gpu.pretrained import build_localizer
from ssl_gpu.run import Run, training_speech, uses_bfloat16, uses_graph
from ssl_gpu.simulator import Simulator
from ssl_gpu.train import CapturedStep, gradients, timed_batches, update

# Few voices, for they take time to make; endless rooms for both networks, where original.yaml has a bank of 3,000.
OVERRIDES = ("speech.voices_speakers=4", "speech.voices_utterances=1", "scene.bank=null", "rir.early=false")
# Name of a row -> file in configs/, mixtures per step on a CPU (the original's 57 M parameters want a GPU; None: as
# configured), overrides.
NETWORKS = {"librispeech": ("librispeech", None, ()), "patches": ("patches", None, ()),
            "original": ("original", 2, ()),
            "original-fft": ("original", 2, ("model.freeze_stft=true",)),
            "original-nchw": ("original", 2, ("model.channels_last=false",))}
PROFILED = 3  # steps
BURN_IN = 3  # steps; compilation is in the first, and a capture follows them


def prepare(name: str, batch: int | None, device: torch.device, overrides: Sequence[str]) -> Run:
    """A run of one of NETWORKS without an evaluation set, on noise-free synthetic voices."""
    file, _, more = NETWORKS[name]
    batch_size = [] if batch is None else [f"train.batch_size={batch}"]
    cfg = load_config(RunConfig, common.ROOT / "configs" / f"{file}.yaml",
                      [*OVERRIDES, *more, *batch_size, *overrides])
    localizer = build_localizer(cfg).to(device).train()
    averaged = None if cfg.train.ema is None else Averaged(localizer, cfg.train.ema)
    speech = training_speech(cfg, device)
    return Run(cfg, Path(), device, speech, Simulator(cfg.scene, cfg.rir, cfg.mixture, cfg.simulator, cfg.ism), None,
               {}, localizer, averaged, build_optimizer(cfg.train, localizer),
               bfloat16=uses_bfloat16(cfg.train, device), graph=uses_graph(cfg, device, speech))


class Steps:
    """Steps of a run, those of ssl_gpu.train.train, with marks for a timer between the parts unless they are captured.
    """

    def __init__(self, run: Run, network: torch.nn.Module):
        self.run, self.network = run, network
        self.timer = runtime.StepTimer(run.device)
        self.batches = timed_batches(run, self.timer)
        self.captured = None
        if run.graph:
            self.captured = CapturedStep(run, network, torch.zeros((), dtype=torch.int64, device=run.device))

    def take(self, count: int) -> None:
        """`count` steps more."""
        run, timer = self.run, self.timer
        for _ in range(count):
            if self.captured is not None:
                self.captured.take(run.step, run.cfg.train.lr)
            else:
                with timer.section("wait"):
                    mixture = self.batches.take(run.step)
                gradients(run, self.network, mixture, timer.section)
                with timer.section("wait"):  # on a CPU; on a GPU as long as the GPU waits for this to be queued
                    self.batches.prefetch()
                with timer.section("update"):
                    update(run)
            run.step += 1
            timer.step()

    def keep_batch(self) -> None:
        """From now on all steps have the batch of the next one, and simulate nothing."""
        if self.captured is None:
            self.batches = OneBatch(self.batches.take(self.run.step))
        else:
            mixture = self.captured.mixtures()
            self.captured = CapturedStep(self.run, self.network, self.captured.invalid)
            gc.collect()  # it and its method refer to each other: until then the other one keeps its memory
            self.captured.mixtures = lambda: mixture


class OneBatch:
    """Stands in for runtime.Ahead: the same batch for every step, and no simulation."""

    def __init__(self, mixture: MixtureBatch):
        self.mixture = mixture

    def take(self, step: int) -> MixtureBatch:
        """The batch."""
        return self.mixture

    def prefetch(self) -> None:
        """Nothing is to be made."""


def fresh(name: str, batch: int | None, compile: bool, overlap: bool, device: torch.device, overrides: Sequence[str],
          graph: bool) -> Steps:
    """Steps of a run that begins."""
    if compile:
        torch.compiler.reset()  # a network of an earlier row counts towards the eight that the compiler keeps
    gc.collect()  # what an earlier row captured
    run = prepare(name, batch, device, [f"train.overlap={str(overlap).lower()}", f"train.graph={str(graph).lower()}",
                                        *overrides])
    return Steps(run, runtime.compiled(run.localizer, compile))


def burn_in(steps: Steps) -> None:
    """The steps that compile and capture."""
    steps.take(BURN_IN if steps.captured is None else runtime.Graphed.WARM_UP + BURN_IN)


def readings_of(steps: Steps, seconds: float, every: int) -> list[runtime.StepTimes]:
    """What the timer says, after a burn-in, of `every` steps each, for about `seconds` s."""
    burn_in(steps)
    steps.timer.read()
    readings, spent = [], 0.0
    while len(readings) < common.LEAST_CALLS or spent < seconds:
        steps.take(every)
        readings.append(steps.timer.read())
        spent += every * readings[-1].step_s
    return readings


def operations(steps: Steps, most: int) -> list[dict[str, Any]]:
    """The `most` dearest operations of a step: name, ms and calls a step, share of all of them. On a GPU kernels and
    copies, those of captured steps, too; on a CPU torch's own, each less what it calls. Measured by torch's profiler
    over PROFILED steps, which it makes longer."""
    on_gpu, kinds = runtime.is_gpu(steps.run.device), [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:  # or a second one warns
        steps.take(PROFILED)
        runtime.synchronize(steps.run.device)
    spent = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event)
             for event in profiler.key_averages() if not on_gpu or of_device(event)]
    total = sum(time for time, _ in spent)
    if not total:
        raise RuntimeError("torch's profiler saw nothing that the device did")
    return [{"name": event.key, "ms": time / 1e3 / PROFILED, "calls": event.count / PROFILED, "share": time / total}
            for time, event in sorted(spent, key=lambda pair: pair[0], reverse=True)[:most]]


def of_device(event: Any) -> bool:
    """Whether an entry of torch's profiler is what a GPU did, not a range of it that the optimiser or a compiled graph
    has a name for, in which everything would count twice."""
    return event.device_type.name == "CUDA" and not event.is_user_annotation


def profiled(row: dict[str, Any], most: int, make: Callable[[], Steps]) -> None:
    """Puts the operations of a row into it, of steps made anew; says so, and no more, where that fails."""
    try:
        steps = make()
        runtime.release_memory(steps.run.device)
        burn_in(steps)
        row["operations"] = operations(steps, most)
        print(listed(row))
    except Exception as error:                                          # the row stands
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(f"no operations of {row['name']}: {reason}", file=sys.stderr)


def listed(row: dict[str, Any]) -> str:
    """The operations of a row, a line each."""
    ways = [way for way in ("compiled", "overlap", "graph") if row.get(way)]
    return "\n".join([f"\n{', '.join([row['name'], *ways])}: ms, share and calls of a step",
                      *(f"{each['ms']:9.3f}  {100 * each['share']:4.1f} %  {each['calls']:7g}  {each['name'][:100]}"
                        for each in row["operations"])])


def measure(name: str, batch: int | None, compile: bool, overlap: bool, device: torch.device, seconds: float,
            every: int, overrides: Sequence[str] = (), graph: bool = False) -> tuple[dict[str, Any], None]:
    """The row of one network, eager or compiled, simulation overlapped or not, or steps captured: `every` steps from
    one reading of the timer to the next; and then as many with one batch again and again, to know what simulation
    costs."""
    steps = fresh(name, batch, compile, overlap, device, overrides, graph)
    run = steps.run
    runtime.reset_peak_memory(device)
    readings = readings_of(steps, seconds, every)
    share = {key: sum(r.share[key] for r in readings) / len(readings) for key in readings[0].share}
    cfg = run.cfg
    row = common.row(name, cfg.train.batch_size, common.Timing.of([r.step_s for r in readings]),
                     cfg.train.batch_size * cfg.speech.clip_s, device, compiled=compile, overlap=overlap, graph=graph,
                     share=share, parameters=sum(p.numel() for p in run.localizer.parameters()), bfloat16=run.bfloat16)
    steps.keep_batch()
    fixed_s = common.Timing.of([r.step_s for r in readings_of(steps, seconds, every)]).median_s
    return {**row, "fixed_step_s": fixed_s, "simulation_cost": (row["median_s"] - fixed_s) / row["median_s"]}, None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("bench_train", __doc__, seconds=10.0)
    parser.add_argument("--model", nargs="+", choices=NETWORKS, metavar="NAME",
                        help="librispeech, patches, original: the files in configs/ (default: the first and the last, "
                             "on a CPU librispeech only); original-fft: its transform frozen; "
                             "original-nchw: its maps not channels last")
    parser.add_argument("--batch", type=common.positive, metavar="N",
                        help="mixtures per step (default: the configuration's, and 2 for original on a CPU)")
    parser.add_argument("--compile", choices=common.CHOICES, default="both", help="torch.compile the network")
    parser.add_argument("--overlap", choices=common.CHOICES,
                        help="simulate the next batch beside the step (default no on a CPU, where there is nothing "
                             "beside it, both on a GPU)")
    parser.add_argument("--graph", choices=common.CHOICES,
                        help="steps as one CUDA graph each, which do not overlap (default no on a CPU, which has none, "
                             "both on a GPU)")
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE",
                        help="of the configurations, for example train.precision=bfloat16")
    parser.add_argument("--every", type=common.positive, metavar="N",
                        help="steps between two readings of the timer (default 1 on a CPU, 10 on a GPU)")
    parser.add_argument("--profile", type=common.positive, default=0, metavar="N",
                        help="list the N operations that take most of a step, kernels on a GPU, torch's on a CPU; each "
                             "row is prepared, and compiled, once more for it")
    args = parser.parse_args(arguments)
    device = common.start(args)
    on_cpu = device.type == "cpu"
    every, overlaps, graphs = args.every or (1 if on_cpu else 10), *(
        common.CHOICES[choice or ("no" if on_cpu else "both")] for choice in (args.overlap, args.graph))
    ways = [(overlap, False) for overlap in overlaps if False in graphs] + [(False, True)] * (True in graphs)
    results, tasks, again = common.Results("bench_train", device, arguments, args.json), [], []
    names = args.model or (["librispeech"] if on_cpu else ["librispeech", "original"])
    for name in names:                                                  # a wrong one is no measurement that fails
        try:
            load_config(RunConfig, common.ROOT / "configs" / f"{NETWORKS[name][0]}.yaml",
                        [*OVERRIDES, *NETWORKS[name][2], *args.set])
        except ValueError as error:
            common.refuse(f"--set: {error}")
    # Eager first: compilation takes longest, and fails most.
    for compile, name, (overlap, graph) in product(common.CHOICES[args.compile], names, ways):
        batch = args.batch or (NETWORKS[name][1] if on_cpu else None)
        make = partial(measure, name, batch, compile, overlap, device, args.seconds, every, args.set, graph)
        tasks.append(common.Task(name, batch, compile, make, {"overlap": overlap, "graph": graph}))
        again.append(partial(fresh, name, batch, compile, overlap, device, args.set, graph))
    results.measure(tasks)
    status = results.finish()
    if args.profile:                                                    # behind all rows, as it slows launches down
        for row, make in zip(results.rows, again):
            if "failed" not in row:
                profiled(row, args.profile, make)
                results.save()
    return status


if __name__ == "__main__":
    end_with(main)
