"""Adding up the kernels of arrivals: against a loop, and the Triton kernel against the plain path, without a GPU."""
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

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
from ssl_gpu.rir import RirConfig, can_add_images, draw_images, find_arrivals, image_tables
from ssl_gpu.scatter import add_kernels
from ssl_gpu.scene import SceneConfig, sample_scenes
from ssl_gpu.simulator import Simulator, SimulatorConfig
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
    monkeypatch.setattr(fused, "_add_taps", InterpretedFunction(fused._add_taps.fn))
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
    found = add_kernels(TABLE, slot, amplitude, early if with_early else None, LENGTH, MAIN_TAPS)
    assert_close(found, expected[..., :1 + with_early, :].float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("count", [7, 64, 70])  # arrivals: less than a program takes, as many, more
@pytest.mark.parametrize("with_early", [False, True])
def test_triton_kernel_adds_the_same(count, with_early, interpreted):
    """In Triton's interpreter, also where slots and amplitudes are views."""
    fused, program = interpreted
    slot, amplitude, early = (x.transpose(0, 1) for x in arrivals(count, (2, 3, 1)))
    early = early if with_early else None
    expected = add_kernels(TABLE, slot, amplitude, early, LENGTH, MAIN_TAPS)
    found = torch.zeros_like(expected).flatten(-2)
    fused.launch(program("add_kernels_program"), found, TABLE.T.contiguous(), slot, amplitude, early, MAIN_TAPS)
    assert_close(found.view_as(expected), expected, rtol=0, atol=1e-7)


def test_triton_kernel_writes_nowhere_else(interpreted):
    """Where a slot is outside the rows, as after a bug elsewhere: the sums of other rows stay as they are."""
    fused, program = interpreted
    slot = torch.tensor([-1, -64 * 30, 64 * (LENGTH - 15), 64 * 3 * LENGTH, 640]).expand(1, 3, 1, 5)
    found = torch.zeros(2, 1, 3, 1, LENGTH)
    fused.launch(program("add_kernels_program"), found, TABLE.T.contiguous(), slot, torch.ones(slot.shape), None,
                 MAIN_TAPS)
    only = add_kernels(TABLE, slot[..., 4:], torch.ones(1, 3, 1, 1), None, LENGTH, MAIN_TAPS)
    assert_close(found, only.squeeze(-2), rtol=0, atol=0)


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
    expected = add_kernels(table, arrivals.slot, arrivals.amplitude, None, length, MAIN_TAPS).squeeze(-2)
    if some:
        expected[:, ~chosen] = 0
    found = torch.zeros_like(expected)
    fused.launch_images(program("add_images_program"), found, table.T.contiguous(),
                        *image_tables(cfg, scenes, chosen if some else None), images.direction, images.ratio,
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


@pytest.mark.parametrize("with_early, offsets", [(False, "i32"), (True, "i32"), (True, "i64")])
def test_triton_kernel_compiles_for_a_hopper_gpu(with_early, offsets, tmp_path):
    """To machine code, by Triton's own assembler: additions without an answer (RED), nothing spilled."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ssl_gpu import fused
    constants = {"has_early": with_early, "phase_bits": 6, "taps": 16, "main_taps": MAIN_TAPS, "block": fused.BLOCK}
    kinds = {"total": "*fp32", "table": "*fp32", "slot": "*i64", "amplitude": "*fp32",
             "early": "*u8" if with_early else "*i64", "arrivals": "i32", "blocks": "i32", "row_length": "i32",
             "parts_apart": offsets}
    source = ASTSource(fused.add_kernels_program, {**kinds, **dict.fromkeys(constants, "constexpr")}, constants)
    try:
        kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    except (RuntimeError, OSError) as error:  # an installation without the assembler
        pytest.skip(f"Triton cannot compile for a GPU here: {error}")
    tools, binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin", tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    code, use = (subprocess.run([tools / tool, *options, binary], capture_output=True, text=True, check=True).stdout
                 for tool, *options in (("nvdisasm",), ("cuobjdump", "-res-usage")))
    assert len(re.findall(r"\bREDG\.E\.ADD\.F32", code)) == fused.BLOCK * 16 // 128 and "ATOM" not in code  # a thread's
    assert "STACK:0 SHARED:0 LOCAL:0" in use


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
        found = add_kernels(table, slot, amplitude, early if with_early else None, LENGTH, MAIN_TAPS, fused=True)
        assert found.shape == (2, 2, 2, 1, 1 + with_early, LENGTH) and found.is_cuda and len(calls) == 1
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
        compiled(table, slot, amplitude, early if with_early else None, LENGTH, MAIN_TAPS, True)
    (graph,) = graphs
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert len([call for call in calls if "triton_kernel_wrapper" in call]) == 1
    assert not [call for call in calls if "view.dtype" in call or "scatter" in call]


def test_no_triton_is_one_line_and_on_a_gpu_alone(monkeypatch):
    """Weights whose training was fused are read and rendered with on a CPU without it."""
    monkeypatch.setitem(sys.modules, "triton", None)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    with pytest.raises(ValueError, match="^simulator.fused must be false or null where Triton is not installed, got t"):
        SimulatorConfig(fused=True).check_device(gpu)
    SimulatorConfig(fused=True).check_device(cpu)
    SimulatorConfig(fused=False).check_device(gpu)
    simulator = Simulator(config=SimulatorConfig(fused=True))
    mixture = simulator(torch.randn(2, 2, 400), generator=torch.Generator().manual_seed(0))
    assert mixture.audio.isfinite().all()
    monkeypatch.setattr(SimulatorConfig, "check_device", lambda self, device: 1 / 0)
    with pytest.raises(ZeroDivisionError):                              # it is asked
        simulator(torch.randn(2, 2, 400), generator=torch.Generator().manual_seed(0))
