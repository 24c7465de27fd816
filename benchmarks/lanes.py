"""Training steps of the main recipe on a CPU: all cores on every operation, a lane for each (ssl_gpu.lanes), one core.

    python -m benchmarks.lanes [--cores N] [--steps N] [--compile]

The three take turns in one process, with --compile also with a compiled network; medians are printed.
"""
from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from benchmarks import common
from benchmarks.bench_train import prepare
from ssl_gpu import runtime
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.lanes import Lanes
from ssl_gpu.train import draw_batch, in_lanes, timed_draws

WARM_UP = 2  # steps


class Steps:
    """A run of the main recipe, and its steps: whole batches, or dealt out to so many lanes."""

    def __init__(self, cores: int, compiled: bool):
        self.cores, self.run = cores, prepare("librispeech", None, torch.device("cpu"), [])
        self.network = runtime.compiled(self.run.localizer, compiled)
        self.lanes = Lanes(self.network, self.run.localizer.training_losses, None)
        self.timer = runtime.StepTimer(self.run.device)
        self.draws = timed_draws(self.run, self.timer, self.lanes)
        self.done: Counter[Callable[[], object]] = Counter()  # each has its own, for what is drawn ahead

    def whole(self) -> None:
        """Gradients of a batch at once."""
        mixture = draw_batch(self.run, self.run.step)
        with runtime.autocast(self.run.device, None):
            heard = self.network(mixture.audio)
        self.run.localizer.training_losses(heard, mixture).sum().backward()

    def dealt(self) -> None:
        """The same in lanes."""
        in_lanes(self.run, self.lanes, self.draws, self.timer, self.cores)

    def seconds(self, gradients: Callable[[], object], threads: int) -> float:
        """What a step takes."""
        torch.set_num_threads(threads)
        self.run.step = self.done[gradients]
        self.done[gradients] += 1
        begin = time.perf_counter()
        self.run.optimizer.zero_grad(set_to_none=True)
        gradients()
        self.run.optimizer.step()
        return time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.lanes", description=__doc__)
    parser.add_argument("--cores", type=common.positive, default=torch.get_num_threads())
    parser.add_argument("--steps", type=common.positive, default=12, help="of each, after a warm-up (default 12)")
    parser.add_argument("--compile", action="store_true", help="measure a compiled network (train.compile), too")
    args = parser.parse_args(arguments)
    kinds = {}
    for compiled in [False, True] if args.compile else [False]:
        steps = Steps(args.cores, compiled)
        for name, kind in ((f"{args.cores} threads", (steps.whole, args.cores)),
                           (f"{args.cores} lanes", (steps.dealt, 1)), ("1 thread", (steps.whole, 1))):
            kinds[name + ", compiled" * compiled] = steps, *kind
    times = {name: [] for name in kinds}
    for _ in range(WARM_UP + args.steps):
        for name, (steps, gradients, threads) in kinds.items():
            times[name].append(steps.seconds(gradients, threads))
    for name, all_of_them in times.items():
        median = statistics.median(all_of_them[WARM_UP:])
        clips = kinds[name][0].run.cfg.train.batch_size
        print(f"{name:19} {1e3 * median:6.0f} ms per step, {clips / median:.1f} clips/s")
    return 0


if __name__ == "__main__":
    end_with(main)
