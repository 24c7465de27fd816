"""Device, precision, compilation, memory and time: the only module that names cuda, autocast and compile."""
from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ssl_gpu import __version__

IMPORTED = time.monotonic()  # the latest that the process can have started, see process_age_s

Compilable = TypeVar("Compilable", bound=Callable)


def pick_device(name: str = "auto", called: str = "device") -> torch.device:
    """The device of that name: auto (a GPU if there is one, else the CPU), cpu, cuda (the first GPU) or cuda:N. called:
    what errors call it.

    Raises ValueError for another name, or for a GPU that is not there.
    """
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise ValueError(f"{called} must be auto, cpu, cuda or cuda:N, got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if torch.version.cuda is None and torch.version.hip is None:
        raise ValueError(f"{called}={name} was asked for, but torch {torch.__version__} is built for CPUs only; "
                         "install a CUDA build of it, or use cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"{called}={name} was asked for, but torch finds no GPU (nvidia-smi?); use auto or cpu")
    torch.backends.cudnn.allow_tf32 = False  # torch's default there; float32 means float32, above all in evaluation
    index, count = int(match.group(1) or 0), torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"{called}={name} was asked for, but there are {count} GPUs, cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is quicker than float32 there: on a GPU, and on a CPU that has instructions for it and shows it.

    On two cores of an AMD EPYC with AVX512_BF16 a training step of the small model takes half the time, on an Intel
    Xeon with AVX512_BF16 and without AMX 1.25 times (650 and 815 ms for 32 mixtures on one thread). So it is tried.
    """
    if device.type == "cuda":
        return True
    # torch tells this in private functions only; one that is gone means no.
    tests = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in tests) and _quicker_in_bfloat16()


@functools.lru_cache(maxsize=1)
def _quicker_in_bfloat16() -> bool:
    """Whether the CPU is a tenth quicker with a feed-forward layer of the small model in bfloat16: the median ratio of
    24 pairs of forward and backward passes, 0.5 s in all. On that Xeon 22 and 36 ms for 3,000 frames. The quickest of
    eight each, as it was at first, was one time in six fooled by other work."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.enable_grad():
        frames, into, back = (torch.randn(shape, generator=generator) for shape in ((744, 128), (512, 128), (128, 512)))
        into.requires_grad_(), back.requires_grad_()

        def pass_s(bfloat16: bool) -> float:
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                out = nn.functional.linear(nn.functional.silu(nn.functional.linear(frames, into)), back)
            torch.autograd.grad(out.float().sum(), (into, back))
            return time.perf_counter() - begin

        ratios = [pass_s(True) / pass_s(False) for _ in range(24)]
    return statistics.median(ratios) < 0.9


def autocast(device: torch.device, enabled: bool | None = None) -> torch.autocast:
    """A context of bfloat16 arithmetic where torch holds it safe; by default wherever has_bfloat16."""
    if enabled is None:
        enabled = has_bfloat16(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def channels_last(maps: torch.Tensor, enabled: bool | None = None) -> torch.Tensor:
    """Maps [batch, channel, height, width] with their channels side by side in memory, in which convolutions and batch
    norm keep them; by default on a GPU, whose matrix units want it so, and else as they are.

    Weights stay as they are: checkpoints and moments of the optimiser would take over their layout. On one CPU thread,
    forward and backward, 68 ms as they are, 76 channels last, for the original's convolutions and 2 clips in float32,
    40 and 34 in bfloat16. Group norm on a GPU puts maps and gradients back as they were, so this is not for networks
    that have it.
    """
    if enabled is None:
        enabled = maps.device.type == "cuda"
    return maps.contiguous(memory_format=torch.channels_last) if enabled else maps


def compiled(function: Compilable, enabled: bool = True) -> Compilable:
    """`function` compiled on its first call, for fixed shapes: a module in place, so its state_dict keeps its names; a
    function as one graph, or its first call raises. torch keeps eight compilations of a function in a process: calls of
    shapes beyond these run as they are, with a warning."""
    if not enabled:
        return function
    if isinstance(function, nn.Module):
        function.compile(dynamic=False)
        return function
    quick = torch.compile(function, dynamic=False, fullgraph=True)
    plain: set[Any] = set()                                             # shapes that came too late

    @functools.wraps(function)
    def call(*arguments):
        # Asked for again, torch would say in five lines of its log, every time, that it has enough.
        if plain and _shapes(arguments) in plain:
            return function(*arguments)
        try:
            return quick(*arguments)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            if not plain:
                warnings.warn(f"{function.__name__} is not compiled for more shapes than the first eight, others run "
                              f"plainly", stacklevel=2)
            plain.add(_shapes(arguments))
            return function(*arguments)

    return call


def _shapes(value: Any) -> Any:
    """What a compilation is for: of tensors, whatever dataclass or tuple holds them, shape and dtype."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_shapes, value))
    if is_dataclass(value) and not isinstance(value, type):
        return tuple(_shapes(getattr(value, field.name)) for field in fields(value))
    return value


def constant(function: Compilable) -> Compilable:
    """`function` of hashable arguments, its results remembered, and constants to whatever is compiled around it.

    For tables and sizes that follow from a few numbers: torch compiles neither numpy nor what functools remembers.
    """
    @functools.lru_cache(maxsize=None)                                  # a CUDA graph may read a table for ever
    def remembered(*arguments):
        # Not as the caller is: a table made in inference mode could never be part of an autograd graph.
        # In a tuple, which the compiler gives a name of its own. A bare tensor it names after this code, whichever
        # function and arguments it came from, and then refuses a second one in the same graph.
        with torch.inference_mode(False):
            return (function(*arguments),)

    def boxed(*arguments):
        return remembered(*arguments)

    # What torch.compiler.assume_constant_result does, which imports the compiler: a second, and it makes folders.
    boxed._dynamo_marked_constant = True

    @functools.wraps(function)
    def look_up(*arguments):
        return boxed(*arguments)[0]

    look_up.is_constant = True                                          # by which tests/test_sync.py finds tables
    return look_up


@constant
def _arange(count: int, device: torch.device) -> torch.Tensor:
    return torch.arange(count).to(device)                               # complete for every stream, when it returns


def indices(count: int, device: torch.device) -> torch.Tensor:
    """torch.arange(count) on the device, of a table that is kept, which is a kernel less for every batch. Tables have
    powers of two, so that however many counts are asked for, all of them take what twice the longest does."""
    return _arange(1 << max(count - 1, 0).bit_length(), device)[:count]


def prefers_parts(device: torch.device) -> bool:
    """Whether a batch is simulated in small parts, whose shapes may follow from values: on a CPU, for its caches, but
    not for the compiler. A GPU wants all at once, and would have to be waited for."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def is_gpu(device: torch.device) -> bool:
    """Whether it is one that our kernels for GPUs run on."""
    return device.type == "cuda"


def prefers_products(device: torch.device) -> bool:
    """Whether convolutions of few channels, or over few tokens, are done as products of matrices (ssl_gpu.products): on
    any GPU. Measured on an H200."""
    return is_gpu(device)


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left [..., row, inner] @ right [..., inner, column], float32, whatever surrounds it: an autocast, off by 3e-3, or
    on a GPU products in TF32, off by 5e-4, which a training loop may have chosen for its network; float64 has neither.
    """
    with autocast(left.device, False):
        if is_gpu(left.device):
            return (left.double() @ right.double()).to(left.dtype)
        return left @ right


def current_device(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which what asks for the current GPU gets `device`; nothing for a CPU, and where no GPU is in use."""
    return torch.cuda.device(device) if is_gpu(device) and torch.cuda.is_initialized() else contextlib.nullcontext()


def synchronize(device: torch.device) -> None:
    """Waits for all work queued on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The maker's name of the GPU, or of the CPU where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = re.findall(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine() or "cpu"


def free_bytes(device: torch.device) -> int | None:
    """Memory that could still be had on `device`; None where the system does not tell (a CPU outside Linux)."""
    if device.type == "cuda":
        # torch keeps what it once had: what it holds and does not use is free to us.
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) \
            - torch.cuda.memory_allocated(device)
    available = re.search(r"^MemAvailable:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    return int(available.group(1)) * 1024 if available else None


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held so far: by torch's tensors on a GPU; by the process on a CPU (None on Windows, which has no
    such count)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # absent there, so not at the top

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_reserved(device: torch.device) -> int | None:
    """The most bytes that torch has taken of a GPU's memory, used or kept, those that only a CUDA graph may use among
    them; None on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None


def release_memory(device: torch.device) -> None:
    """Gives back what torch keeps of a GPU's memory without using it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def driver(device: torch.device) -> str | None:
    """The version of a GPU's driver, "unknown" where nvidia-smi does not tell; None on a CPU."""
    if device.type != "cuda":
        return None
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        found = []
    return found[0] if found else "unknown"


def reset_peak_memory(device: torch.device) -> None:
    """Lets peak_memory count from now on, on a GPU; the system counts for a process from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def process_age_s() -> float:
    """Seconds since this process started, or, where the system does not tell (outside Linux), since this module was
    imported. By a clock that nobody sets.

    A program that says how long it took must count the seconds of its own imports.
    """
    return _age_when_imported() + time.monotonic() - IMPORTED


@functools.lru_cache(maxsize=1)
def _age_when_imported() -> float:
    try:
        # proc(5): the 22nd field, in clock ticks since boot. The 2nd is a name that may hold spaces and brackets.
        ticks = int(_read("/proc/self/stat").rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (AttributeError, IndexError, OSError, ValueError):
        return 0.0
    # Some sandboxes give 0 ticks for every process.
    return max(age - (time.monotonic() - IMPORTED), 0.0) if ticks > 0 else 0.0


@contextlib.contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """torch on so many threads of the CPU for the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interrupt(signum, frame):
    """For signal.signal: SIGTERM, as batch systems send it, ends a program the way Ctrl-C does."""
    raise KeyboardInterrupt


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, as torch does it in several ways."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and re.search("out of memory|allocate memory", str(error)) is not None)


def versions() -> dict[str, str]:
    """What a result depends on: the versions of ssl_gpu, python, torch, numpy and of torch's CUDA ("none" without)."""
    return {"ssl_gpu": __version__, "python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": str(np.__version__), "cuda": str(torch.version.cuda or "none")}


@dataclass(frozen=True)
class StepTimes:
    """Means over the `steps` of one logging interval: seconds per step, and the share of them spent in each section."""

    steps: int
    step_s: float
    share: dict[str, float]


class StepTimer:
    """Where the time of a training step goes, without holding the GPU up: marks are queued, and read once per interval.

    for step in range(first, last):
        with timer.section("simulate"):
            mixture = simulator(...)
        ...
        timer.step()
        if step % log_every == 0:
            times = timer.read()  # the only wait; times.share["simulate"], times.step_s

    On a GPU a section lasts from the moment the GPU reaches its first kernel to the end of its last one, on the current
    stream, so that sections of several streams may add up to more than the step; on a CPU it is wall-clock time,
    of every thread's sections, which may add up to more likewise; of one that is open when an interval begins, what
    comes after that. Call `restart` after a pause that belongs to no step, such as a validation.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured; the interval begins now."""
        self._marks: list[tuple] = []                                  # a thread may append while another reads
        self._steps = 0
        self._begin = self._mark()

    @contextlib.contextmanager
    def section(self, name: str) -> Iterator[None]:
        """Counts the time of the `with` block under `name`; nested sections count in each of theirs."""
        begin = self._mark()
        try:
            yield
        finally:
            mark = name, begin, self._mark()
            self._marks.append(mark)

    def step(self) -> None:
        """Counts a step."""
        self._steps += 1

    def read(self) -> StepTimes:
        """The interval up to now, once the GPU has got here and to the end of every section; begins the next one.

        Raises ValueError if no step was counted since the interval began.
        """
        if self._steps == 0:
            raise ValueError("StepTimer.read needs at least one step() since the interval began, got 0")
        end, marks = self._mark(), tuple(self._marks)
        if self.device.type == "cuda":
            # Events, as the device may have more to do; those of sections too, which may be on streams of their own.
            for event in (end, *(mark for _, *pair in marks for mark in pair)):
                event.synchronize()
        total = self._seconds(self._begin, end)
        share: dict[str, float] = defaultdict(float)
        for name, begin, finish in marks:
            if self.device.type != "cuda":
                begin = max(begin, self._begin)
            share[name] += self._seconds(begin, finish) / total
        times = StepTimes(self._steps, total / self._steps, dict(share))
        self.restart()
        return times

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, begin, end) -> float:
        return begin.elapsed_time(end) * 1e-3 if self.device.type == "cuda" else end - begin


class Ahead:
    """Results of make(step), each asked for in turn by `take`; with `overlap`, `prefetch` makes the next one beside
    what is queued for this one.

    for step in range(first, last):
        batch = ahead.take(step)
        ...                        # the step's work, queued
        ahead.prefetch()           # after most of it: on the GPU it begins where take returned, not here
        ...

    On a GPU the work for step n + 1 is queued on a stream of its own, where it waits for the moment in the caller's
    stream at which step n was taken, and then runs beside whatever the caller has queued since. So the CPU queues the
    step first and the GPU is not idle meanwhile. On a CPU the work is done on the spot, in the same order, or handed to
    `beside`, which begins it in another thread. make must depend on its step alone: then results are the same with and
    without overlap, and a run that resumes at any step makes its first one anew. What it raises in another thread comes
    with the `take` of its step.

    make(step) may read tensors that live as long as this object. Whatever reads its result is to be queued before the
    next `take`, and the result may be dropped at any time. On a GPU no more than two that the caller does not keep are
    in memory, however far the CPU runs ahead.
    """

    def __init__(self, make: Callable[[int], Any], device: torch.device, overlap: bool | None = None,
                 beside: Callable[[Callable[[], Any]], Future] | None = None):
        """overlap None: on a GPU, and with `beside`, which is for a CPU."""
        self.make, self.device, self.beside = make, device, beside
        self.overlap = device.type == "cuda" or beside is not None if overlap is None else overlap
        self._stream = torch.cuda.Stream(device) if self.overlap and device.type == "cuda" else None
        self._pending: tuple[int, Any] | None = None
        self._taken: int | None = None
        self._begin = self._held = None

    def take(self, step: int) -> Any:
        """make(step), ready for the current stream."""
        if self._pending is None or self._pending[0] != step:
            self._pending, self._begin = None, self._now()
            self._start(step)
        (_, result), self._pending, self._taken = self._pending, None, step
        if isinstance(result, Future):
            result = result.result()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._begin = self._now()
            # Memory of a result belongs to the side stream, and the next work there may have it as soon as it is
            # dropped, while the caller's stream still reads it. No record_stream is needed, which would hand it back
            # late and let batches pile up: this result is held until the next one is taken, and all work on the side
            # stream after that waits for the event of that taking, behind everything that was queued to read this one.
            self._held = result
        return result

    def prefetch(self) -> None:
        """With overlap, makes or queues the result of the step behind the one taken last; else does nothing."""
        if self.overlap and self._taken is not None and self._pending is None:
            step = self._taken + 1
            if self.beside is not None:
                self._pending = step, self.beside(lambda: self.make(step))
            else:
                self._start(step)

    def _now(self) -> "torch.cuda.Event | None":
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def _start(self, step: int) -> None:
        if self._stream is None:
            self._pending = step, self.make(step)
            return
        self._stream.wait_event(self._begin)
        with torch.cuda.stream(self._stream):
            self._pending = step, self.make(step)


class CaptureError(RuntimeError):
    """What was to become a CUDA graph cannot."""


class Graphed:
    """function() as a CUDA graph: called a few times, then captured, and from then on the GPU repeats what it did, all
    of its kernels for one launch by the CPU.

    function takes nothing, never waits for the device, and does the same work with the same tensors every time: what is
    to differ it reads from tensors that the caller fills before a call, and from `generators`, which the caller may
    seed before a call and which live as long as this. Numbers and branches of Python are those of the capture. It
    returns tensors without a gradient (an autograd graph kept alive would tie the next call to this one), that the next
    call overwrites; those of every call are ready for the current stream. Every call counts, the first ones too, in
    which libraries and compilers get ready and whatever is made once is made: WARM_UP of them, on the stream that
    captures, as torch wants it for a backward pass. Once captured, no more than AHEAD calls are queued, so that a clock
    in the CPU tells how long calls take. On a CPU all calls are plain.

    Raises CaptureError where function cannot be captured; the process should not go on with the GPU after that.
    """

    WARM_UP = 3
    AHEAD = 2

    def __init__(self, function: Callable[[], Any], device: torch.device, generators: Sequence[torch.Generator] = ()):
        self.function, self.device, self.generators = function, device, generators
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graph = self._result = None
        self._plain_calls = 0
        self._queued: deque = deque()

    def __call__(self) -> Any:
        """What function returns."""
        if self._stream is None:
            return self.function()
        if self._plain_calls < self.WARM_UP:
            self._plain_calls += 1
            return self._plain()
        if self._graph is None:
            self._capture()
        if len(self._queued) == self.AHEAD:
            self._queued.popleft().synchronize()
        self._graph.replay()                                           # on the current stream
        self._queued.append(torch.cuda.current_stream(self.device).record_event())
        return self._result

    def _plain(self) -> Any:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = self.function()
        current.wait_stream(self._stream)
        return result

    def _capture(self) -> None:
        graph, handled = torch.cuda.CUDAGraph(), sys.exc_info()[1]      # what the caller is dealing with is not ours
        for generator in self.generators:                              # or a replay would draw what was captured
            graph.register_generator_state(generator)
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, stream=self._stream):
                self._result = self.function()
        except Exception as error:
            first = error                                               # the last is that the capture was spoiled
            while first.__context__ is not None and first.__context__ is not handled:
                first = first.__context__
            line = (str(first).strip().splitlines() or [type(first).__name__])[0]
            raise CaptureError(f"this cannot be captured as a CUDA graph: {line}") from error
        self._graph = graph


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
