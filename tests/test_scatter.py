"""Adding up the kernels of arrivals: against a loop, and the Triton kernel against the plain path, without a GPU."""
import importlib
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from ssl_gpu import rir as rir_module
from ssl_gpu import rooms, runtime
from ssl_gpu.directivity import Pattern
from ssl_gpu.ism import IsmConfig
from ssl_gpu.laws import Decay, ImageRange
from ssl_gpu.mixture import MixtureConfig
from ssl_gpu.rir import RirConfig, can_add_images, draw_images, find_arrivals, image_numbers
from ssl_gpu.scatter import add_kernels
from ssl_gpu.scene import SceneConfig, sample_scenes
from ssl_gpu.simulator import Simulator, SimulatorConfig, triton_problem
from ssl_gpu.synthesis import MAIN_TAPS, _kernel_on

LENGTH = 200  # samples
REFERENCE = RirConfig(early=False, num_images=(100, 150))
TABLE = _kernel_on(16000, torch.device("cpu"))


def arrivals(count=70, shape=(2, 2, 1)):
    """Slots, with several in one sample, amplitudes, of which some are 0, and flags."""
    generator = torch.Generator().manual_seed(count)
    slot = torch.randint(0, 64 * (LENGTH - 16), (*shape, count), generator=generator)
    slot[..., :5] = torch.tensor([0, 63, 64, 64, 64 * (LENGTH - 16) - 1])
    amplitude = torch.randn(slot.shape, generator=generator)
    amplitude[..., count // 2:count // 2 + 9] = 0
    return slot, amplitude, torch.rand(slot.shape, generator=generator) < 0.3


@pytest.fixture
def interpreted(monkeypatch):
    """ssl_gpu.fused, its programs to be run in Triton's interpreter by the name that is asked for."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    from ssl_gpu import fused
    for helper in ("_add_taps", "_distance"):
        monkeypatch.setattr(fused, helper, InterpretedFunction(getattr(fused, helper).fn))
    return fused, lambda name: InterpretedFunction(getattr(fused, name).fn)


@pytest.mark.parametrize("with_early", [False, True])
def test_kernels_are_added_up_where_the_arrivals_are(with_early):
    slot, amplitude, early = arrivals()
    expected = torch.zeros(2, 2, 2, 1, 2, LENGTH, dtype=torch.float64)
    for index in torch.cartesian_prod(*map(torch.arange, slot.shape)).tolist():
        *place, _ = index
        part = int(early[tuple(index)]) if with_early else 0
        begin, phase = divmod(int(slot[tuple(index)]), 64)
        for tap in range(16):
            expected[(int(tap >= MAIN_TAPS), *place, part, begin + tap)] += \
                TABLE[tap, phase].double() * amplitude[tuple(index)].double()
    lengths = (LENGTH, LENGTH)[:1 + with_early]
    found = add_kernels(TABLE, slot, amplitude, early if with_early else None, lengths, MAIN_TAPS)
    assert len(found) == 1 + with_early
    for part, sums in enumerate(found):
        assert_close(sums, expected[..., part, :].float(), rtol=0, atol=1e-7)
    if with_early:                                                      # the early ones in rows as long as they need
        slot = torch.where(early, slot % 640, slot)
        for part, short in zip(add_kernels(TABLE, slot, amplitude, early, lengths, MAIN_TAPS),
                               add_kernels(TABLE, slot, amplitude, early, (LENGTH, 26), MAIN_TAPS)):
            assert_close(short, part[..., :short.shape[-1]], rtol=0, atol=0)
            assert not part[..., short.shape[-1]:].any()


@pytest.mark.parametrize("count", [7, 64, 70])  # arrivals: less than a program takes, as many, more
@pytest.mark.parametrize("with_early", [False, True])
def test_triton_kernel_adds_the_same(count, with_early, interpreted):
    """In Triton's interpreter, also where slots and amplitudes are views."""
    fused, program = interpreted
    slot, amplitude, early = (x.transpose(0, 1) for x in arrivals(count, (2, 3, 1)))
    early = early if with_early else None
    lengths = (LENGTH,) if early is None else (LENGTH, LENGTH)
    expected = torch.cat(add_kernels(TABLE, slot, amplitude, early, lengths, MAIN_TAPS), -1)
    found = torch.zeros_like(expected)
    fused.launch(program("add_kernels_program"), found, TABLE.T.contiguous(), slot, amplitude, early, MAIN_TAPS)
    assert_close(found, expected, rtol=0, atol=1e-7)


def test_triton_kernel_writes_nowhere_else(interpreted):
    """Where a slot is outside the rows, as after a bug elsewhere: the sums of other rows stay as they are."""
    fused, program = interpreted
    slot = torch.tensor([-1, -64 * 30, 64 * (LENGTH - 15), 64 * 3 * LENGTH, 640]).expand(1, 3, 1, 5)
    found = torch.zeros(2, 1, 3, 1, LENGTH)
    fused.launch(program("add_kernels_program"), found, TABLE.T.contiguous(), slot, torch.ones(slot.shape), None,
                 MAIN_TAPS)
    only = add_kernels(TABLE, slot[..., 4:], torch.ones(1, 3, 1, 1), None, (LENGTH,), MAIN_TAPS)[0]
    assert_close(found, only, rtol=0, atol=0)


def tables(cfg, scenes, chosen, interpreted):
    fused, program = interpreted
    return fused.launch_tables(program("image_tables_program"), scenes.mic_pos, scenes.src_pos, scenes.room_dim,
                               scenes.rt60, chosen, image_numbers(cfg.sample_rate, torch.device("cpu")),
                               64.0 * cfg.sample_rate)


@pytest.mark.parametrize("mics, srcs", [(1, 1), (3, 2), (4, 5)])
@pytest.mark.parametrize("some", [False, True])
def test_triton_kernel_makes_the_tables_of_images(mics, srcs, some, interpreted):
    """Against loops in float64, in more pairs than a program takes. Of two microphones that are equally near the first
    counts; a hall is so dead that its coefficient is the least; and an RT60 ends a slot later in float32."""
    cfg = replace(REFERENCE, sample_rate=8000)
    scenes = sample_scenes(SceneConfig(array_radius_m=0.4, num_mics=mics, num_src=srcs), 40,
                           generator=torch.Generator().manual_seed(0))
    scenes.src_pos[3] = torch.tensor([2.0, 2.0, 1.0])
    scenes.mic_pos[3, 0], scenes.mic_pos[3, -1] = torch.tensor([[2.25, 2.0, 1.0], [1.75, 2.0, 1.0]])
    scenes.mic_pos[3, 1:-1] = 3.0
    scenes.room_dim[5], scenes.rt60[5] = 300.0, 0.15
    scenes.rt60[7] = next(slots / 512000 for slots in range(100000, 200000)
                          if np.float32(slots / 512000) * np.float32(512000) > slots)
    chosen = torch.arange(40) % 3 > 0
    places, rooms = tables(cfg, scenes, chosen if some else None, interpreted)
    assert places.dtype == rooms.dtype == torch.float64
    for batch in range(40):
        mic_pos, src_pos = scenes.mic_pos[batch], scenes.src_pos[batch]
        for mic in range(mics):
            for src in range(srcs):
                dist = [math.sqrt(float((place - src_pos[src]).square().sum()) + 1e-3) for place in mic_pos]
                nearest = dist.index(min(dist))
                expected = (*(mic_pos[nearest] - mic_pos[mic]).tolist(), dist[nearest], dist[mic])
                assert places[batch, mic, src].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        rt60, reach = float(scenes.rt60[batch]), 340 * float(scenes.rt60[batch])
        x, y, z = scenes.room_dim[batch].tolist()
        alpha = 1 - math.exp(-0.16 * x * y * z / (2 * (x * y + y * z + z * x)) / rt60)
        coefficient = max(math.sqrt(1 - alpha * alpha), 1e-8)
        most = (math.log10(reach) - 3) / math.log10(coefficient)
        last = math.ceil(float(np.float32(rt60) * np.float32(64 * 8000))) - 1
        last = -1 if some and not chosen[batch] else last
        expected = ((most - 1) / reach, math.log2(coefficient), last, 1e-3, 64 * 8000 / 340)
        assert rooms[batch].tolist() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("cfg, scene", [
    (REFERENCE, SceneConfig()),
    (replace(REFERENCE, image_range=ImageRange.FULL, perturbation_exponent=0.5, sample_rate=8000),
     SceneConfig(array_radius_m=0.4, num_mics=3, num_src=1))])
def test_triton_kernel_finds_the_images_and_adds_them(cfg, scene, some, interpreted):
    """What find_arrivals and add_kernels make of them, of all scenes or of some."""
    fused, program = interpreted
    generator = torch.Generator().manual_seed(0)
    scenes = sample_scenes(scene, 3, generator=generator)
    images, table = draw_images(cfg, scenes, generator=generator), _kernel_on(cfg.sample_rate, torch.device("cpu"))
    chosen = torch.tensor([True, False, True])
    arrivals, length = find_arrivals(cfg, scenes, images), int(scenes.max_rt60 * cfg.sample_rate) + 20
    expected = add_kernels(table, arrivals.slot, arrivals.amplitude, None, (length,), MAIN_TAPS)[0]
    if some:
        expected[:, ~chosen] = 0
    found = torch.zeros_like(expected)
    fused.launch_images(program("add_images_program"), found, table.T.contiguous(),
                        *tables(cfg, scenes, chosen if some else None, interpreted), images.direction, images.ratio,
                        images.perturbation, images.active, cfg.perturbation_exponent,
                        cfg.image_range is ImageRange.FULL, MAIN_TAPS)
    assert_close(found, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


@pytest.mark.parametrize("changes, fits", [
    ({}, True), ({"image_range": ImageRange.FULL}, True), ({"early": True}, False), ({"decay": Decay.MEASURED}, False),
    ({"mic_pattern": Pattern.CARDIOID}, False), ({"src_pattern": Pattern.CARDIOID}, False),
    ({"air": (20.0, 50.0)}, False)])
def test_kernel_of_images_serves_what_it_knows(changes, fits, monkeypatch):
    cfg, scenes = replace(REFERENCE, **changes), sample_scenes(SceneConfig(), 2,
                                                               generator=torch.Generator().manual_seed(0))
    assert not can_add_images(cfg, scenes)                              # on a CPU
    monkeypatch.setattr(runtime, "is_gpu", lambda device: True)
    assert can_add_images(cfg, scenes) == fits


@pytest.mark.parametrize("changes", [{}, {"hybrid_share": 0.5}])
def test_fused_rooms_are_those_of_the_plain_path(changes, interpreted, monkeypatch):
    """The way of a GPU through drawn rooms, alone and mixed with hybrid ones, in Triton's interpreter."""
    fused, program = interpreted
    cfg, ism = replace(REFERENCE, **changes), IsmConfig("eyring", tail_arrivals=50)
    simulator = Simulator(SceneConfig(rt60_s=(0.2, 0.3)), cfg, MixtureConfig(), SimulatorConfig(2), ism)
    draw = simulator.draw(4, 800, generator=torch.Generator().manual_seed(0))
    dry = torch.randn(4, 2, 800, generator=torch.Generator().manual_seed(1))
    expected, asked = simulator.render(dry, draw).audio, []
    monkeypatch.setattr(rir_module, "can_add_images", lambda *_: True)
    monkeypatch.setattr(rooms, "can_add_images", lambda *_: True)
    monkeypatch.setattr(SimulatorConfig, "fused_on", lambda self, device: bool(self.fused))
    monkeypatch.setattr(fused, "image_tables_fused", lambda *a: fused.launch_tables(
        program("image_tables_program"), *a))
    monkeypatch.setattr(fused, "add_images_fused", lambda *a: (asked.append("images"), fused.launch_images(
        program("add_images_program"), *a)))
    monkeypatch.setattr(fused, "add_kernels_fused", lambda *a: (asked.append("kernels"), fused.launch(
        program("add_kernels_program"), *a)))
    fast = Simulator(simulator.scene, cfg, MixtureConfig(), SimulatorConfig(2, fused=True), ism)
    found = fast.render(dry, draw).audio
    assert asked == (["images", "kernels"] if changes else ["images"]) * 2
    assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_triton_kernel_filters(interpreted):
    """Spectra of more rows and frequencies than a program takes, with responses that are views."""
    fused, program = interpreted
    first, second = torch.randn(2, 3, 5, 101, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    main, rest = torch.randn(2, 101, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    expected = first * main + second * rest
    fused.launch_filter(program("filter_program"), *map(torch.view_as_real, (first, second, main, rest)))
    assert_close(first, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


PHASES = {"phase_bits": 6, "taps": 16, "main_taps": MAIN_TAPS}
SUMS = {"total": "*fp32", "table": "*fp32"}
PROGRAMS = {  # name -> module, kinds of arguments, constants, shared memory in bytes
    "add_kernels_program": ("fused", {
        **SUMS, "slot": "*i64", "amplitude": "*fp32", "early": "*i64", "arrivals": "i32", "blocks": "i32",
        "row_length": "i32", "parts_apart": "i64"}, {**PHASES, "has_early": False, "block": 64}, 0),
    "add_images_program": ("fused", {
        **SUMS, "places": "*fp64", "rooms": "*fp64", "direction": "*fp32", "ratio": "*fp32", "perturbation": "*fp32",
        "active": "*u8", "images": "i32", "blocks": "i32", "mics": "i32", "srcs": "i32", "axis_stride": "i32",
        "row_length": "i32", "parts_apart": "i32", "perturbation_exponent": "fp32"},
        {**PHASES, "full_range": True, "block": 128}, 1024),
    "image_tables_program": ("fused", {
        **dict.fromkeys(("places", "rooms", "mic_pos", "src_pos", "room_dim", "rt60"), "*fp64"), "chosen": "*u8",
        "numbers": "*fp64", **dict.fromkeys(("pairs", "srcs"), "i32"), "slots_per_s": "fp32"},
        {"mics": 4, "has_chosen": True, "block": 128}, None),
    "filter_program": ("fused", {
        **dict.fromkeys(("first", "second", "first_response", "second_response"), "*fp32"), "freqs": "i32",
        "count": "i32"}, {"block": 512}, None),
    "split_program": ("fused_convolve", {
        **dict.fromkeys(("out", "signal", "gain", "twiddles"), "*fp32"), **dict.fromkeys(
            ("lanes", "pairs", "rows", "length", "batch_stride", "lane_stride", "row_stride", "sample_stride", "base",
             "blocks"), "i32")}, {"has_gain": True, "radix": 4, "present": 3, "block": 512}, None),
    "multiply_program": ("fused_convolve", {
        **dict.fromkeys(("out", "sources", "responses"), "*fp32"), "pairs": "i32", "base": "i32", "blocks": "i32",
        "scale": "fp32"}, {"srcs": 2, "radix": 4, "block": 512}, None),
    "merge_program": ("fused_convolve", {
        "out": "*fp32", "parts": "*fp32", "twiddles": "*fp32", "keep": "*u8", **dict.fromkeys(
            ("mics", "pairs", "length", "base", "blocks"), "i32")},
        {"has_keep": True, "radix": 4, "present": 3, "block": 512}, None)}


def compiled_for_hopper(name, **other_kinds):
    """Triton's module and the kernel of that name; other_kinds: of arguments."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    module, kinds, constants, _ = PROGRAMS[name]
    program = getattr(importlib.import_module(f"ssl_gpu.{module}"), name)
    source = ASTSource(program, {**kinds, **other_kinds, **dict.fromkeys(constants, "constexpr")}, constants)
    try:
        return triton, triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except (RuntimeError, OSError) as error:  # an installation without the assembler
        pytest.skip(f"Triton cannot compile for a GPU here: {error}")


@pytest.mark.parametrize("name, scalar, allowed", [
    ("image_tables_program", "slots_per_s", 0), ("add_images_program", "perturbation_exponent", 0),
    pytest.param("multiply_program", "scale", 2, marks=pytest.mark.slow)])  # half of it, once
def test_numbers_that_a_compiler_hands_over_as_float64_change_no_arithmetic(name, scalar, allowed):
    """As torch.compile's inductor does, where Triton's own launcher has float32: else slots of an RT60 were counted in
    float64, and some were one more than torch's."""
    plain, wide = (compiled_for_hopper(name, **{scalar: kind})[1].asm["ptx"] for kind in ("fp32", "fp64"))
    count = [len(re.findall(r"^\s*(?!cvt|ld|st|mov)[a-z0-9.]+\.f64\b", text, re.MULTILINE)) for text in (plain, wide)]
    assert count[0] <= count[1] <= count[0] + allowed


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if "image" in name else pytest.mark.slow)
                                  for name in PROGRAMS])
def test_triton_kernel_compiles_for_a_hopper_gpu(name, tmp_path):
    """To machine code, by Triton's own assembler: additions without an answer (RED), nothing spilled; and no square and
    its sum in one rounding, where torch has two."""
    triton, kernel = compiled_for_hopper(name)
    constants, shared = PROGRAMS[name][2:]
    tools, binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin", tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    code, use = (subprocess.run([tools / tool, *options, binary], capture_output=True, text=True, check=True).stdout
                 for tool, *options in (("nvdisasm",), ("cuobjdump", "-res-usage")))
    squares = re.search(r"fma\.rn\.f64\s+%\w+, (%\w+), \1, (?!\1)", kernel.asm["ptx"])
    assert name != "image_tables_program" or not squares
    assert "STACK:0" in use and "LOCAL:0" in use and (shared is None or f"SHARED:{shared} " in use)
    if shared is not None:                                              # those that add, each thread its part
        assert len(re.findall(r"\bREDG\.E\.ADD\.F32", code)) == constants["block"] * 16 // 128 and "ATOM" not in code


@pytest.mark.parametrize("with_early", [False, True])
def test_fused_scatter_is_taken_on_a_gpu_alone(with_early, monkeypatch):
    """On fake tensors: the operation that Triton has, and no scatter_add_; on a CPU as without."""
    pytest.importorskip("triton")
    from ssl_gpu import fused
    calls, real = [], fused.add_kernels_fused
    monkeypatch.setattr(fused, "add_kernels_fused", lambda *args: (calls.append(args), real(*args)))
    monkeypatch.setattr(torch.Tensor, "scatter_add_", None)
    slot, amplitude, early = arrivals()
    with FakeTensorMode(allow_non_fake_inputs=True):
        slot, amplitude, early, table = (torch.empty_like(x, device="cuda") for x in (slot, amplitude, early, TABLE))
        lengths = (LENGTH, LENGTH)[:1 + with_early]
        found = add_kernels(table, slot, amplitude, early if with_early else None, lengths, MAIN_TAPS, fused=True)
        assert len(found) == 1 + with_early and len(calls) == 1
        assert all(sums.shape == (2, 2, 2, 1, LENGTH) and sums.is_cuda for sums in found)
    monkeypatch.undo()
    dry, plain = torch.randn(2, 2, 400), Simulator(config=SimulatorConfig(fused=False))
    draw = plain.draw(2, 400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Simulator(config=SimulatorConfig(fused=True)).render(dry, draw).audio,
                       plain.render(dry, draw).audio)


@pytest.mark.parametrize("with_early", [False, True])
def test_fused_scatter_is_one_kernel_of_a_compiled_graph(with_early):
    """Of that of a GPU, traced on fake tensors down to what the compiler generates code of, which it does on a GPU
    alone (tests/test_gpu.py). It knows the kernel, and no view of flags as bytes, for which it has no code."""
    pytest.importorskip("triton")
    from torch._dynamo.backends.common import aot_autograd
    graphs = []
    backend = aot_autograd(fw_compiler=lambda module, inputs: graphs.append(module.graph) or module.forward)
    compiled = torch.compile(add_kernels, fullgraph=True, backend=backend)
    slot, amplitude, early = arrivals()
    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        slot, amplitude, early, table = (torch.empty_like(x, device="cuda") for x in (slot, amplitude, early, TABLE))
        lengths = (LENGTH, LENGTH)[:1 + with_early]
        compiled(table, slot, amplitude, early if with_early else None, lengths, MAIN_TAPS, True)
    (graph,) = graphs
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert len([call for call in calls if "triton_kernel_wrapper" in call]) == 1
    assert not [call for call in calls if "view.dtype" in call or "scatter" in call]


@pytest.fixture
def asked_anew():
    """triton_problem, which remembers its answer."""
    triton_problem.cache_clear()
    yield
    triton_problem.cache_clear()


def test_no_triton_is_one_line_and_on_a_gpu_alone(monkeypatch, asked_anew):
    """Weights whose training was fused are read and rendered with on a CPU without it."""
    monkeypatch.setitem(sys.modules, "ssl_gpu.fused", None)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    with pytest.raises(ValueError, match="^simulator.fused must be false or null where Triton is not installed, got t"):
        SimulatorConfig(fused=True).fused_on(gpu)
    assert not any(SimulatorConfig(fused=fused).fused_on(device)
                   for fused, device in ((None, gpu), (False, gpu), (True, cpu), (None, cpu)))
    simulator = Simulator(config=SimulatorConfig(fused=True))
    mixture = simulator(torch.randn(2, 2, 400), generator=torch.Generator().manual_seed(0))
    assert mixture.audio.isfinite().all()
    monkeypatch.setattr(SimulatorConfig, "fused_on", lambda self, device: 1 / 0)
    with pytest.raises(ZeroDivisionError):                              # it is asked
        simulator(torch.randn(2, 2, 400), generator=torch.Generator().manual_seed(0))


def test_triton_that_does_not_work_is_a_warning(monkeypatch, asked_anew):
    """As where there is no C compiler: found out by the smallest kernel, once."""
    pytest.importorskip("triton")
    from ssl_gpu import fused
    tried, gpu = [], torch.device("cuda", 0)

    def broken(*arguments):
        tried.append(arguments)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(fused, "filter_spectra", broken)
    with FakeTensorMode():
        with pytest.warns(UserWarning, match=r"^rooms are simulated without our own kernels, as Triton does not work "
                                             r"\(Failed to find C compiler.\)$"):
            assert not SimulatorConfig().fused_on(gpu)
    with pytest.raises(ValueError, match=r"^simulator.fused must be false or null where Triton does not work \(Failed"):
        SimulatorConfig(fused=True).fused_on(gpu)
    assert len(tried) == 1
