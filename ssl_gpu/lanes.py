"""A training step on CPU cores: each takes a part of the batch through simulation, network and back, on its own.

Torch spreads every single operation over the cores and waits for the slowest at its end, a thousand times per step: two
cores trained the main recipe on 43 clips/s so, on 63 with a lane each (entry 41 of docs/performance.md). What serves
best depends on what else the machine does, so a run finds out.
"""
from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ssl_gpu import runtime
from ssl_gpu.mixture import MixtureBatch


class Lanes:
    """Gradients of a batch that is dealt out to threads.

    network: audio [batch, mic, sample] -> logits or more; losses: these and the mixtures -> means over the valid
    scenes, [loss], whose sum is differentiated; bfloat16: as for runtime.autocast. A network whose examples know of
    each other, as by batch norm, is none for this: see `separable`.
    """

    def __init__(self, network: nn.Module, losses: Callable[[Any, MixtureBatch], Tensor], bfloat16: bool | None):
        self.network, self.losses, self.bfloat16 = network, losses, bfloat16
        self.weights = [weight for weight in network.parameters() if weight.requires_grad]
        self._pool, self._size = ThreadPoolExecutor(1), 1
        self._used: set[tuple[int, ...]] = set()

    def gradients(self, make: Sequence[Callable[[], MixtureBatch]], valid: Sequence[Tensor]) -> Tensor:
        """Sets .grad of all weights to that of the whole batch, to a few roundings; returns its losses, [loss].

        make: gives the mixtures of each part; each is called, heard and differentiated in a lane of its own, or, the
        first time that there are parts of these sizes, one after the other in the calling thread. valid: which examples
        of each part count, [part batch] bool. Lanes use as many threads as torch is set to.
        """
        total = sum(int(part.sum()) for part in valid)
        shares = [int(part.sum()) / max(total, 1) for part in valid]
        if self._size < len(make):
            self._pool.shutdown()
            self._pool, self._size = ThreadPoolExecutor(len(make)), len(make)
        shape = (torch.get_num_threads(), *(len(part) for part in valid))
        if shape in self._used:
            lanes = [self.beside(functools.partial(self._lane, *lane)) for lane in zip(make, shares)]
            done = [lane.result() for lane in lanes]
        else:
            # A network that is compiled does so on its first call: not in several threads at once, and here, since
            # torch 2.11 crashes where the main thread compiles after another thread has (a segmentation fault in
            # FakeTensorMode; without this, by `pytest tests/test_lanes.py tests/test_compile.py`).
            done = [self._lane(*lane) for lane in zip(make, shares)]
            self._used.add(shape)
        # Laid out as the weights: fused optimisers on a CPU read both along memory, whatever their strides.
        whole, used = [torch.zeros_like(weight) for weight in self.weights], set()
        for _, gradients in done:
            had = [index for index, gradient in enumerate(gradients) if gradient is not None]
            if had:
                torch._foreach_add_([whole[index] for index in had], [gradients[index] for index in had])
            used.update(had)
        for index, weight in enumerate(self.weights):
            weight.grad = whole[index] if index in used else None
        return torch.stack([losses for losses, _ in done]).sum(0)

    def beside(self, work: Callable[[], Any]) -> Future:
        """Begins work() in the thread of a lane, on as many threads as torch is set to, while the caller goes on."""
        return self._pool.submit(self._on, torch.get_num_threads(), work)

    @staticmethod
    def _on(threads: int, work: Callable[[], Any]) -> Any:
        if torch.get_num_threads() != threads:  # each thread has a number of its own
            torch.set_num_threads(threads)
        return work()

    def _lane(self, make: Callable[[], MixtureBatch], share: float) -> tuple[Tensor, tuple]:
        mixture = make()
        with runtime.autocast(mixture.audio.device, self.bfloat16):
            heard = self.network(mixture.audio)
        losses = share * self.losses(heard, mixture)
        # Not backward(): it would add to .grad in several threads at once.
        return losses.detach(), torch.autograd.grad(losses.sum(), self.weights, allow_unused=True)


def separable(network: nn.Module) -> bool:
    """Whether every example is heard by itself, so that a batch may be dealt out."""
    return not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def slices(batch: int, count: int) -> list[slice]:
    """`count` parts of a batch, as equal as can be, or as many as there are examples."""
    edges = [batch * index // min(count, batch) for index in range(min(count, batch) + 1)]
    return [slice(first, last) for first, last in zip(edges, edges[1:])]


class ThreadTuner:
    """How to use the CPU's cores in a training step, found by trying: call `step` after every step.

    All cores on every operation is good on an idle machine and the worst choice on a busy one: a step has a thousand
    parallel regions, each of which then waits for a thread that something else has pushed off its core. On two cores
    under load, two threads trained on 5 examples/s where one trained on 35. `lanes` says how many parts of the batch
    are to go through the step side by side (Lanes), each on as many threads as torch is set to. All ways to
    deal the cores out, and half and one of the threads, are timed for PROBE_STEPS steps each, at the start and every
    EVERY_S seconds; the quickest serves until the next trial. The very first step of each does not count: threads are
    made in it, and lanes run one after the other (Lanes.gradients).
    It changes rounding, so a run that must repeat to the bit does without it (enabled=False), or is told `fixed`, how
    many lanes there are, without any trial.
    """

    PROBE_STEPS = 3
    EVERY_S = 60.0

    def __init__(self, device: torch.device, enabled: bool = True, most_lanes: int = 1, fixed: int | None = None):
        most = torch.get_num_threads()
        dealt = [(most // lanes, lanes) for lanes in range(1, min(most, most_lanes) + 1) if most % lanes == 0]
        self.choices = list(dict.fromkeys([*dealt, ((most + 1) // 2, 1), (1, 1)]))  # threads, lanes
        self.enabled = enabled and device.type == "cpu" and most > 1 and fixed is None
        self.lanes, self._known = 1, set()
        self.restart()
        self._probe()
        if fixed is not None:
            self._use((max(most // fixed, 1), fixed))

    def restart(self) -> None:
        """Forgets when the last step ended, after a pause that belongs to no step."""
        self._last = None

    def step(self) -> None:
        """Counts a step, and moves on to another number of threads when it is time to."""
        if not self.enabled:
            return
        now = time.perf_counter()
        took, self._last = None if self._last is None else now - self._last, now
        if not self._waiting and now >= self._next_probe:
            self._probe()
        elif self._waiting and took is not None:
            self._spent.append(took)
            # A choice that has already lost is not tried to the end: under load its steps take seconds.
            lost = self._means and sum(self._spent) > 2 * self.PROBE_STEPS * min(self._means.values())
            if lost or len(self._spent) == self.PROBE_STEPS:
                self._finish_choice()

    def _probe(self) -> None:
        self._waiting, self._means, self._spent = list(self.choices), {}, []
        self._next_probe = math.inf
        if self.enabled:
            self._use(self._waiting[0])

    def _finish_choice(self) -> None:
        self._means[self._waiting.pop(0)] = sum(self._spent) / len(self._spent)
        self._spent = []
        if not self._waiting:
            self._next_probe = time.perf_counter() + self.EVERY_S
        self._use(self._waiting[0] if self._waiting else min(self._means, key=self._means.get))

    def _use(self, choice: tuple[int, int]) -> None:
        threads, self.lanes = choice
        torch.set_num_threads(threads)
        if choice not in self._known:
            self._known.add(choice)
            self.restart()
