"""Training steps of the main recipe on a CPU: all cores on every operation, a lane for each (ssl_gpu.lanes), one core.

    python -m benchmarks.lanes [--cores N] [--steps N]

The three take turns in one process; medians are printed.
"""
from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from benchmarks import common
from benchmarks.bench_train import prepare
from ssl_gpu import runtime
from ssl_gpu.lanes import Lanes
from ssl_gpu.train import draw_batch, in_lanes

WARM_UP = 2  # steps


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lanes", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=common.positive, default=torch.get_num_threads())
    parser.add_argument("--steps", type=common.positive, default=12, help="of each, after a warm-up (default 12)")
    args = parser.parse_args(arguments)
    run = prepare("librispeech", None, torch.device("cpu"), [])
    lanes, timer = Lanes(run.localizer, run.localizer.loss, None), runtime.StepTimer(run.device)

    def whole() -> None:
        mixture = draw_batch(run, run.step)
        with runtime.autocast(run.device, None):
            logits = run.localizer(mixture.audio)
        run.localizer.loss(logits, mixture.scenes).backward()

    def seconds(step: Callable[[], object], threads: int) -> float:
        torch.set_num_threads(threads)
        begin = time.perf_counter()
        run.optimizer.zero_grad(set_to_none=True)
        step()
        run.optimizer.step()
        run.step += 1
        return time.perf_counter() - begin

    kinds = {f"{args.cores} threads": (whole, args.cores),
             f"{args.cores} lanes": (lambda: in_lanes(run, lanes, timer, args.cores), 1), "1 thread": (whole, 1)}
    times = {name: [] for name in kinds}
    for _ in range(WARM_UP + args.steps):
        for name, kind in kinds.items():
            times[name].append(seconds(*kind))
    for name, all_of_them in times.items():
        median = statistics.median(all_of_them[WARM_UP:])
        print(f"{name:12} {1e3 * median:6.0f} ms per step, {run.cfg.train.batch_size / median:.0f} clips/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
