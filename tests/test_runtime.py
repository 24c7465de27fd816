"""Devices, precision, memory and time. The GPU paths run on stand-ins, so that they are tested without a GPU too."""
import contextlib
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from ssl_gpu import __version__, runtime

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]
on_linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")


def pretend_gpus(monkeypatch, count, built_for_cuda=True):
    monkeypatch.setattr(torch.version, "cuda", "13.0" if built_for_cuda else None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("name, count, device", [
    ("auto", 0, "cpu"), ("auto", 2, "cuda:0"), ("cpu", 2, "cpu"), ("cuda", 1, "cuda:0"), ("cuda:1", 2, "cuda:1")])
def test_device_is_picked_by_name(monkeypatch, name, count, device):
    pretend_gpus(monkeypatch, count)
    assert runtime.pick_device(name) == torch.device(device)


@pytest.mark.parametrize("name, count, message", [
    ("gpu", 1, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    ("cuda:x", 1, "device must be auto, cpu, cuda or cuda:N, got 'cuda:x'"),
    ("cuda", 0, "device=cuda was asked for, but torch finds no GPU (nvidia-smi?); use auto or cpu"),
    ("cuda:2", 2, "device=cuda:2 was asked for, but there are 2 GPUs, cuda:0 to cuda:1"),
])
def test_missing_device_is_refused_in_one_line(monkeypatch, name, count, message):
    pretend_gpus(monkeypatch, count)
    with pytest.raises(ValueError) as refusal:
        runtime.pick_device(name)
    assert str(refusal.value) == message


def test_cpu_build_of_torch_is_named_as_the_cause(monkeypatch):
    pretend_gpus(monkeypatch, 0, built_for_cuda=False)
    with pytest.raises(ValueError, match=r"^device=cuda was .*, but torch [^ ]+ is built for CPUs only; [^\n]+"):
        runtime.pick_device("cuda")


@pytest.mark.parametrize("enabled, has, quicker, dtype", [
    (None, False, True, torch.float32), (None, True, True, torch.bfloat16), (None, True, False, torch.float32),
    (False, True, True, torch.float32), (True, False, False, torch.bfloat16)])
def test_cpu_computes_in_bfloat16_if_it_gains_or_is_told_to(enabled, has, quicker, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(runtime, "_quicker_in_bfloat16", lambda: quicker)
    x = torch.ones(2, 2)
    with runtime.autocast(CPU, enabled):
        assert (x @ x).dtype == dtype


def test_a_torch_that_does_not_tell_has_no_bfloat16(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name)
    assert not runtime.has_bfloat16(CPU)


@pytest.mark.parametrize("slow, quicker", [(torch.float32, True), (torch.bfloat16, False), (None, False)])
def test_bfloat16_is_tried_before_it_is_used(slow, quicker, monkeypatch):
    """By a clock that goes on with every layer, slower in one precision; a tie is float32's. Other work that takes a
    third of the passes much longer changes nothing."""
    now, linear, calls = [0.0], nn.functional.linear, []

    def timed(x, weight):
        out = linear(x, weight)
        calls.append(None)
        now[0] += (2.0 if out.dtype is slow else 1.0) * (50 if len(calls) % 14 in (0, 3, 8) else 1)
        return out

    monkeypatch.setattr(nn.functional, "linear", timed)
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: now[0])
    with torch.inference_mode():
        assert runtime._quicker_in_bfloat16.__wrapped__() is quicker


def test_autocast_can_be_switched_off_inside():
    x = torch.ones(2, 2)
    with runtime.autocast(CPU, True), runtime.autocast(CPU, False):
        assert (x @ x).dtype == torch.float32


def test_gpu_computes_in_bfloat16_by_default(monkeypatch):
    asked = {}
    monkeypatch.setattr(torch, "autocast", lambda kind, **options: asked.update(kind=kind, **options))
    runtime.autocast(torch.device("cuda", 0))
    assert asked == {"kind": "cuda", "dtype": torch.bfloat16, "enabled": True}


def test_compiled_module_keeps_the_names_of_its_state(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(options) or function)
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(options))
    module = nn.Linear(2, 2)
    assert runtime.compiled(module, enabled=False) is module and runtime.compiled(abs, enabled=False) is abs
    assert compiled == []
    assert list(runtime.compiled(module).state_dict()) == ["weight", "bias"] and runtime.compiled(abs)(-1) == 1
    assert compiled == [{"dynamic": False}, {"dynamic": False, "fullgraph": True}]


def test_synchronize_waits_for_a_gpu_only(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    runtime.synchronize(CPU)
    runtime.synchronize(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


def test_cpu_has_a_name_of_one_line():
    assert runtime.device_name(CPU).strip() and "\n" not in runtime.device_name(CPU)


@on_linux
def test_free_memory_lies_between_nothing_and_all():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**20 < runtime.free_bytes(CPU) <= total


def test_free_memory_of_a_gpu_counts_what_torch_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert runtime.free_bytes(torch.device("cuda", 0)) == 1200


def test_memory_is_unknown_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(runtime, "_read", lambda path: "")
    assert runtime.free_bytes(CPU) is None


@on_linux
def test_peak_memory_grows_with_what_is_held():
    """In a process of its own: the peak of this one may be gigabytes, and more would have to be touched."""
    program = ("import torch; from ssl_gpu import runtime; cpu = torch.device('cpu'); "
               "before = runtime.peak_memory(cpu); held = torch.ones((before + 2**26) // 4); "
               "print(runtime.peak_memory(cpu) - before)")
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, text=True, check=True)
    assert int(done.stdout) >= 2**25


@on_linux
def test_age_of_a_process_counts_its_imports():
    before = time.time()
    program = "from ssl_gpu import runtime; import time; print(time.time() - runtime.process_age_s())"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    after = time.time()  # the process runs by now, but it has hardly begun to import torch
    started = float(process.communicate()[0])
    assert before - 0.05 <= started <= after + 0.05


@pytest.fixture
def new_age():
    """The age is found out once for all: anew in a test, and after it."""
    runtime._age_when_imported.cache_clear()
    yield
    runtime._age_when_imported.cache_clear()


@on_linux
def test_age_of_a_process_is_read_past_any_name(monkeypatch, new_age):
    ticks = 100 * os.sysconf("SC_CLK_TCK")  # 100 s after boot
    monkeypatch.setattr(runtime, "_read", lambda path: f"12 (a) b (c) S {'0 ' * 18}{ticks} 5 6\n")
    imported = time.monotonic() - runtime.IMPORTED
    age = max(time.clock_gettime(time.CLOCK_BOOTTIME) - 100, imported)
    assert runtime.process_age_s() == pytest.approx(age, abs=0.5)
    assert age > imported + 1 or time.clock_gettime(time.CLOCK_BOOTTIME) < 200


@pytest.mark.parametrize("stat", ["", "12 (python) S 1", f"12 (python) S {'0 ' * 18}0 5"])
def test_age_of_a_process_is_at_least_that_of_the_import(monkeypatch, stat, new_age):
    monkeypatch.setattr(runtime, "_read", lambda path: stat)
    assert runtime.process_age_s() == pytest.approx(time.monotonic() - runtime.IMPORTED, abs=0.5)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self):
        self.now = 10.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds


def measure(timer, work):
    for _ in range(4):
        with timer.section("simulate"):
            work(1.0)
        work(2.0)
        with timer.section("simulate"), timer.section("speech"):
            work(1.0)
        timer.step()


def test_shares_of_a_step_on_a_cpu(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runtime.time, "perf_counter", clock)
    timer = runtime.StepTimer(CPU)
    measure(timer, clock.work)
    assert timer.read() == runtime.StepTimes(4, 4.0, {"simulate": 0.5, "speech": 0.25})


def test_every_reading_is_of_its_own_interval(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runtime.time, "perf_counter", clock)
    timer = runtime.StepTimer(CPU)
    measure(timer, clock.work)
    timer.read()
    with timer.section("validate"):
        clock.work(100.0)
    timer.restart()
    clock.work(3.0)
    timer.step()
    assert timer.read() == runtime.StepTimes(1, 3.0, {})
    with pytest.raises(ValueError, match="needs at least one step"):
        timer.read()


def test_of_a_section_that_was_open_already_an_interval_has_what_came_after_its_begin(monkeypatch):
    """As of one in another thread."""
    clock = Clock()
    monkeypatch.setattr(runtime.time, "perf_counter", clock)
    timer = runtime.StepTimer(CPU)
    with timer.section("simulate"):
        clock.work(50.0)
        timer.restart()
        clock.work(1.0)
    clock.work(3.0)
    timer.step()
    assert timer.read() == runtime.StepTimes(1, 4.0, {"simulate": 0.25})


def test_section_counts_when_its_block_fails(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(runtime.time, "perf_counter", clock)
    timer = runtime.StepTimer(CPU)
    with pytest.raises(KeyError), timer.section("simulate"):
        clock.work(1.0)
        raise KeyError
    clock.work(3.0)
    timer.step()
    assert timer.read().share == {"simulate": 0.25}


def test_gpu_is_waited_for_at_a_reading_alone_and_no_longer_than_for_its_marks(monkeypatch):
    clock, waits = Clock(), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.reached = False

        def record(self, stream):
            assert stream == "stream of cuda:0"
            self.at = clock.now

        def synchronize(self):
            self.reached = True
            waits.append(self.at)

        def elapsed_time(self, end):
            assert end.reached, "read before the GPU got there"
            return (end.at - self.at) * 1e3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.delattr(torch.cuda, "synchronize")  # it would wait for all that is queued behind the marks, too
    timer = runtime.StepTimer(torch.device("cuda", 0))
    measure(timer, clock.work)
    assert waits == []
    times = timer.read()
    assert max(waits) == clock.now
    assert (times.steps, times.step_s) == (4, 4.0) and times.share == {"simulate": 0.5, "speech": 0.25}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_time_is_that_of_its_kernels():
    device = runtime.pick_device("cuda")
    x = torch.randn(4096, 4096, device=device)
    for _ in range(2):  # the first time warms up
        timer = runtime.StepTimer(device)
        with timer.section("many"):
            for _ in range(30):
                x @ x
        with timer.section("few"):
            for _ in range(10):
                x @ x
        timer.step()
        times = timer.read()
    assert times.share["many"] / times.share["few"] == pytest.approx(3, rel=0.3)
    assert 0.9 < sum(times.share.values()) <= 1.001
    assert 0 < runtime.free_bytes(device) < torch.cuda.mem_get_info(device)[1]
    assert runtime.peak_memory(device) >= x.nbytes and runtime.device_name(device)


def test_versions_are_plain_text():
    found = runtime.versions()
    assert found["ssl_gpu"] == __version__ and found["torch"] == str(torch.__version__)
    assert found["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert set(found) == {"ssl_gpu", "python", "torch", "numpy", "cuda"}
    assert {type(value) for value in found.values()} == {str}


def made(log):
    """A make(step) that says when it is called; its result is a dataclass with a tensor."""
    def make(step):
        log.append(f"make {step}")
        return Made(step, torch.full((2,), float(step)))

    return make


@dataclass
class Made:
    step: int
    values: torch.Tensor


@pytest.mark.parametrize("overlap, order", [
    (None, ["make 3", "use 3", "make 4", "use 4", "make 5", "use 5"]),
    (True, ["make 3", "use 3", "make 4", "use 4", "make 5", "use 5", "make 6"])])
def test_results_are_those_of_their_steps_and_one_ahead_if_asked(overlap, order):
    log = []
    ahead = runtime.Ahead(made(log), CPU, overlap)
    ahead.prefetch()  # before anything was taken there is no next one
    for step in (3, 4, 5):
        assert ahead.take(step).values.tolist() == [step, step]
        log.append(f"use {step}")
        for _ in range(2):  # once is enough
            ahead.prefetch()
    assert log == order
    assert ahead.take(3).step == 3 and log[-1] == "make 3"  # out of turn: made anew


def test_results_ahead_may_be_made_in_another_thread():
    """Each once; the first, and one out of turn, where they are taken; an error is raised where its result is."""
    log = []

    def make(step):
        log.append((step, threading.current_thread() is threading.main_thread()))
        return 1 // (step - 6)

    with ThreadPoolExecutor(1) as pool:
        ahead = runtime.Ahead(make, CPU, beside=pool.submit)
        for step in (3, 4, 5, 3):
            assert ahead.take(step) == 1 // (step - 6)
            ahead.prefetch()
        assert ahead.take(4) == -1
        assert sorted(log) == [(3, True), (3, True), (4, False), (4, False), (5, False), (6, False)]
        assert ahead.take(5) == -1
        ahead.prefetch()
        with pytest.raises(ZeroDivisionError):
            ahead.take(6)


@pytest.fixture
def streams(monkeypatch):
    """Stand-ins for a GPU's streams: what happens on which, in the order in which it is queued."""
    log, current = [], ["main"]

    class Moment(int):
        def synchronize(self):
            log.append(f"CPU waits for {self}")

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            log.append(f"{self.name} gets to {len(log)}")
            return Moment(len(log) - 1)

        def wait_event(self, event):
            log.append(f"{self.name} waits for {event}")

    @contextlib.contextmanager
    def on(stream):
        before, current[0] = current[0], stream.name
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current[0]))
    monkeypatch.setattr(torch.cuda, "stream", on)

    def make(step):
        log.append(f"{step} on {current[0]}")
        return Made(step, torch.zeros(2))

    return log, make


def test_gpu_works_ahead_on_a_stream_of_its_own_from_where_the_last_result_was_taken(streams):
    log, make = streams
    ahead = runtime.Ahead(make, torch.device("cuda", 0))
    ahead.take(0)
    log.append("forward")
    ahead.prefetch()
    assert log == ["main gets to 0", "side waits for 0", "0 on side", "main waits for side", "main gets to 4",
                   "forward", "side waits for 4", "1 on side"]
    del log[:]
    assert ahead.take(1).step == 1
    assert log == ["main waits for side", "main gets to 1"]
    ahead.prefetch()
    assert log[2:] == ["side waits for 1", "2 on side"]
    del log[:]
    plain = runtime.Ahead(make, torch.device("cuda", 0), overlap=False)
    plain.take(7)
    plain.prefetch()
    assert log == ["7 on main"]


def test_memory_of_a_result_is_kept_for_the_stream_that_reads_it_and_no_longer(streams):
    """A result that is dropped at once could go to the next work on the side stream, which does not wait for what is
    queued behind the taking; at the next taking it must go, or batches would pile up."""
    _, make = streams
    ahead, alive = runtime.Ahead(make, torch.device("cuda", 0)), []
    for step in range(4):
        alive.append(weakref.ref(ahead.take(step)))
        assert [result() is not None for result in alive] == [False] * step + [True]
        ahead.prefetch()
        assert alive[-1]() is not None


@pytest.fixture
def graphs(streams, monkeypatch):
    """Stand-ins for CUDA graphs on those streams: a replay repeats what was captured, and says so."""
    log, _ = streams

    class Graph:
        def register_generator_state(self, generator):
            log.append(f"draws from {generator}")

        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def capture(graph, stream):
        log.append(f"capture on {stream.name}")
        try:
            with torch.cuda.stream(stream):
                yield
        except ValueError:
            raise RuntimeError("the capture was spoiled")
        log.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return streams


def test_gpu_repeats_what_was_captured_after_calls_that_count(graphs):
    log, make = graphs
    results = []
    graphed = runtime.Graphed(lambda: results.append(make(len(results))) or results[-1], torch.device("cuda", 0), ["A"])
    for call in range(runtime.Graphed.WARM_UP):
        del log[:]
        assert graphed() is results[call]
        assert log == ["side waits for main", f"{call} on side", "main waits for side"]
    del log[:]
    assert graphed() is results[3]
    assert log == ["draws from A", "capture on side", "3 on side", "captured", "replay", "main gets to 5"]
    del log[:]
    assert graphed() is results[3] is graphed()
    assert log == ["replay", "main gets to 1", "CPU waits for 5", "replay", "main gets to 4"]
    assert len(results) == 4


def test_what_cannot_be_captured_says_why(graphs):
    def function():
        if graphs[0][-1] == "capture on side":
            raise ValueError("it waits for the device")

    graphed = runtime.Graphed(function, torch.device("cuda", 0))
    for _ in range(runtime.Graphed.WARM_UP):
        graphed()
    with pytest.raises(runtime.CaptureError, match="^this cannot be captured as a CUDA graph: it waits for the device"):
        try:
            raise OSError("which the caller is dealing with")
        except OSError:
            graphed()


def test_on_a_cpu_every_call_is_plain():
    calls = []
    graphed = runtime.Graphed(lambda: calls.append(None) or len(calls), CPU)
    assert [graphed() for _ in range(6)] == [1, 2, 3, 4, 5, 6]
