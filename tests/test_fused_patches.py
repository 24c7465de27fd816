"""Blocks of patches by our kernels, in Triton's interpreter and as a GPU would get them; without a GPU."""
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ssl_gpu.patches import Block, PatchNetwork

MOST_SHARED = 227 * 1024  # bytes of shared memory to a program on a Hopper GPU


@pytest.fixture
def by_kernels(in_interpreter, monkeypatch):
    """Blocks go by kernels, on a CPU."""
    from ssl_gpu import fused_beside, fused_pooling
    in_interpreter(fused_beside, fused_pooling)
    monkeypatch.setattr(fused_beside, "ROWS", 16)
    monkeypatch.setattr(fused_beside, "PROGRAMS", 5)
    monkeypatch.setattr(fused_pooling, "LEARNING", 7)
    monkeypatch.setattr(Block, "has_kernels", lambda self, x: self.fused)


def outcome(network, spectra, compiled):
    """What it makes of spectra, and the gradients of its parameters, of a weighted sum of all of that."""
    run = torch.compile(network, backend="aot_eager") if compiled else network
    outs = run(spectra, spectra[:, 0] / spectra[:, 0].abs())
    generator = torch.Generator().manual_seed(1)
    total = sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outs)
    return outs, torch.autograd.grad(total, list(network.parameters()))


@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
@pytest.mark.parametrize("compiled", [False, True])
def test_the_network_by_kernels_is_the_plain_one(compiled, by_kernels):
    torch.manual_seed(0)
    network, plain = (PatchNetwork(11, 16, 2, 12, 3, fused=fused) for fused in (True, False))
    plain.load_state_dict(network.state_dict())
    spectra = torch.randn(2, 2, 13, 11, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
    (outs, grads), (expected, of_plain) = outcome(network, spectra, compiled), outcome(plain, spectra, False)
    for one, other in zip((*outs, *grads), (*expected, *of_plain)):
        assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.detach().abs().max())))


def test_kernels_are_asked_for_and_for_training_in_bfloat16_on_a_gpu(monkeypatch):
    pytest.importorskip("triton")
    from ssl_gpu import runtime
    x, blocks = torch.zeros(1, 2, 3, 16), [Block(3, 16, 8, 1, fused) for fused in (False, True)]
    assert not any(block.has_kernels(x.bfloat16()) for block in blocks)  # on a CPU
    monkeypatch.setattr(runtime, "is_gpu", lambda device: True)
    assert [block.has_kernels(x.bfloat16()) for block in blocks] == [False, True]
    assert not blocks[1].has_kernels(x)
    assert not Block(3, 24, 8, 1, True).has_kernels(torch.zeros(1, 2, 3, 24).bfloat16())
    assert not blocks[1].has_kernels(torch.zeros(1, 257, 3, 16).bfloat16())
    with torch.no_grad():
        assert not blocks[1].has_kernels(x.bfloat16())


class Recorder:
    """Stands for a program: what it is launched with."""

    def __init__(self, calls, program):
        self.calls, self.program = calls, program

    def __getitem__(self, grid):
        return lambda *args, **options: self.calls.append((self.program, args, options))


@pytest.fixture
def launches(monkeypatch):
    """Name of a program -> the program, arguments and options of its launch for 128 clips of 3 s."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from ssl_gpu import fused_beside, fused_pooling
    calls, shape = [], (128, 93, 128, 64)
    for module in (fused_beside, fused_pooling):
        for name, program in list(vars(module).items()):
            if isinstance(program, JITFunction) and name.endswith("_program"):
                monkeypatch.setattr(module, name, Recorder(calls, program))
    x, channels = torch.empty(shape, dtype=torch.bfloat16), torch.empty(64)
    back, clip = x.new_empty(*shape[:3], 4), x.new_empty(128, 128, 64)
    fused_beside.beside_fused(x, channels, channels, torch.empty(64, 192), channels, 1, 8)
    fused_beside.beside_backward(x, x, channels, channels, torch.empty(64, 192), channels, 1, 8)
    fused_pooling.listen(x, channels, channels, torch.empty(12, 64), torch.empty(12), 8)
    fused_pooling.listen_backward(back, clip, x, channels, channels, torch.empty(12, 64), torch.empty(12), 8)
    fused_pooling.tell(x, back, torch.empty(64, 4), channels, clip)
    fused_pooling.tell_backward(x, back, torch.empty(64, 4), clip)
    return {program.fn.__name__: (program, args, options) for program, args, options in calls}


@pytest.mark.parametrize("name", ["beside_program", "of_product_program", "of_norm_program", "listen_program",
                                  "listen_backward_program", "tell_program", "tell_backward_program"])
def test_they_compile_for_a_hopper_gpu(name, launches):
    """Within its shared memory, and without copies that are on their way while a turn is computed, as
    fused_pooling._shared has it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    program, args, options = launches[name]
    kinds, attributes = {}, {}
    for place, (argument, value) in enumerate(zip(program.arg_names, args)):
        kinds[argument] = "i32"
        if isinstance(value, torch.Tensor):
            kinds[argument] = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[value.dtype]
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[place,] = [["tt.divisibility", 16]]
    constants = {argument: value for argument, value in options.items() if argument in program.arg_names}
    source = ASTSource(program, {**kinds, **dict.fromkeys(constants, "constexpr")}, constants, attributes)
    how = {option: value for option, value in options.items() if option not in constants}
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas").exists():
        pytest.skip("Triton has no assembler here")
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=how)
    assert kernel.metadata.shared <= MOST_SHARED and "async_copy" not in kernel.asm["ttgir"]
    if name != "tell_program":                                          # it is additions
        assert kernel.asm["ptx"].count("wgmma.mma_async") > 0
