"""What patches tell and are told, the programs in Triton's interpreter, against plain torch; without a GPU."""
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

SHAPES = [(2, 5, 3, 16, 4, 8), (2, 13, 3, 64, 4, 8), (1, 17, 2, 16, 3, 4), (2, 1, 2, 32, 1, 1), (1, 16, 1, 16, 8, 8)]


@pytest.fixture
def fused(in_interpreter, monkeypatch):
    """ssl_gpu.fused_pooling with programs that run on a CPU, and fewer of them than there are columns."""
    from ssl_gpu import fused_pooling as module
    in_interpreter(module)
    for name, number in (("LISTENING", 2), ("LEARNING", 4), ("TELLING", 3)):
        monkeypatch.setattr(module, name, number)
    return module


def normal(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in sizes]


def to_listen(batch, time, freq, width, passage, heads):
    outs = passage + heads
    x, gain, shift, weight, bias = normal((batch, time, freq, width), width, width, (outs, width), outs)
    return 2 * x + 0.5, 1 + 0.3 * gain, shift, 2 * weight / width**0.5, bias


def to_tell(batch, time, freq, width, passage):
    return normal((batch, time, freq, width), (batch, time, freq, passage), (width, passage), width,
                  (batch, freq, width))


def listen(x, gain, shift, weight, bias, heads):
    patch = F.layer_norm(x, x.shape[-1:], gain, shift)
    outs = F.linear(patch, weight, bias)
    share = outs[..., -heads:].softmax(1)
    pooled = torch.einsum("btfh,btfhc->bfhc", share, patch.unflatten(-1, (heads, -1))).flatten(-2)
    return outs[..., :-heads], pooled


def tell(x, back, weight, bias, clip):
    return x + F.linear(F.gelu(back), weight, bias) + clip[:, None]


def outcome(function, given, *rest):
    """What function returns, and the gradients of all of `given`, of a sum by weights of its own for every number."""
    given = [tensor.detach().requires_grad_() for tensor in given]
    outs = function(*given, *rest)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(out.shape, generator=generator).to(out.dtype) for out in outs]
    return outs, torch.autograd.grad(outs, given, weights)


def compare(fused, plain, given, rest=(), error=1e-5):
    """fused(*given) against plain, which gets the same in float64. error: of the greatest number."""
    (outs, grads), (exact, of_exact) = outcome(fused, given, *rest), outcome(plain, [t.double() for t in given], *rest)
    assert len(outs) == len(exact) and [grad.dtype for grad in grads] == [tensor.dtype for tensor in given]
    for number, (one, other) in enumerate(zip((*outs, *grads), (*exact, *of_exact))):
        assert one.is_contiguous() and one.shape == other.shape
        # Of numbers that cancel, as the gradient of a single frame's weight does, nothing is left to be relative to.
        assert_close(one.double(), other, rtol=0, atol=error * max(float(other.detach().abs().max()), 0.1),
                     msg=lambda text: f"{number}: {text}")


@pytest.mark.parametrize("shape", SHAPES)
def test_listening_is_as_plain_with_its_gradients(shape, fused):
    compare(fused.listen, listen, to_listen(*shape), (shape[-1],))


@pytest.mark.parametrize("shape", SHAPES)
def test_telling_is_as_plain_with_its_gradients(shape, fused):
    compare(fused.tell, tell, to_tell(*shape[:-1]))


def test_half_precision(fused):
    """float16 for patches, float32 for parameters and their gradients. Not bfloat16, whose bits Triton's interpreter
    multiplies as if they were numbers."""
    x, *parameters = to_listen(2, 13, 3, 32, 4, 8)
    compare(fused.listen, listen, (x.half(), *parameters), (8,), 0.002)
    x, back, weight, bias, clip = to_tell(2, 13, 3, 32, 4)
    compare(fused.tell, tell, (x.half(), back.half(), weight, bias, clip.half()), error=0.002)


def test_one_of_the_outcomes_is_not_used(fused):
    given = [tensor.requires_grad_() for tensor in to_listen(2, 5, 3, 16, 4, 8)]
    for used in (0, 1):
        found, expected = (torch.autograd.grad(function(*given, 8)[used].square().sum(), given, allow_unused=True,
                                               materialize_grads=True) for function in (fused.listen, listen))
        for one, other in zip(found, expected):
            assert_close(one, other, rtol=0, atol=1e-5 * max(float(other.abs().max()), 1))


def test_views_with_gaps(fused):
    """What is not contiguous, also of gradients, is as if it were."""
    x, *rest = to_listen(2, 5, 3, 16, 4, 8)
    for one, other in zip(fused.listen(x, *rest, 8), fused.listen(x.mT.contiguous().mT, *rest, 8)):
        assert other.is_contiguous()
        assert_close(other, one, rtol=0, atol=0)
    x, back, weight, bias, clip = given = to_tell(2, 5, 3, 16, 4)
    gaps = x.mT.contiguous().mT, back.mT.contiguous().mT, weight.T.contiguous().T, bias, clip.mT.contiguous().mT
    result = fused.tell(*gaps)
    assert result.is_contiguous()
    assert_close(result, fused.tell(*given), rtol=0, atol=0)
    of_gaps = fused.tell_backward(*gaps[:3], gaps[4])
    for one, other in zip(fused.tell_backward(x, back, weight, clip), of_gaps):
        assert other.is_contiguous()
        assert_close(other, one, rtol=0, atol=0)


def test_weights_of_loud_logits_and_a_constant_patch(fused):
    """A softmax of logits in the hundreds, and patches without any variance, come out as numbers."""
    x, gain, shift, weight, bias = to_listen(2, 5, 3, 16, 4, 8)
    x[0, 0] = 3.0
    given = x, gain, shift, 100 * weight, bias
    exact = [tensor.double() for tensor in given]
    for one, other in zip(fused.listen(*given, 8), listen(*exact, 8)):
        assert_close(one.double(), other, rtol=0, atol=1e-4 * float(other.abs().max()))
    assert all(grad.isfinite().all() for grad in outcome(fused.listen, given, 8)[1])


def test_shapes_that_a_compiler_is_told(fused):
    """Those, types and strides of what is really returned."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    x, gain, shift, weight, bias = to_listen(2, 5, 3, 16, 4, 8)
    x = x.bfloat16().mT.contiguous().mT
    back, widen, clip = normal((2, 5, 3, 4), (16, 4), (2, 3, 16))
    back, widen = back.bfloat16(), widen.T.contiguous().T
    squeezed, pooled = fused.listen(x, gain, shift, weight, bias, 8)
    calls = [(fused.listen, (x, gain, shift, weight, bias), (8,)),
             (fused.listen_backward, (squeezed, pooled, x, gain, shift, weight, bias), (8,)),
             (fused.tell, (x, back, widen, shift, clip), ()), (fused.tell_backward, (x, back, widen, clip), ())]
    for function, given, rest in calls:
        found = function(*given, *rest)
        with FakeTensorMode() as mode:
            told = function(*map(mode.from_tensor, given), *rest)
        found, told = ((out,) if isinstance(out, torch.Tensor) else out for out in (found, told))
        assert [(out.shape, out.dtype, out.stride()) for out in told] == [
            (out.shape, out.dtype, out.stride()) for out in found]


def test_which_shapes_there_are_kernels_for(fused):
    assert all(fused.fits(*shape) for shape in ((93, 64, 4, 8), (1, 16, 1, 1), (256, 64, 8, 8), (128, 128, 8, 8)))
    assert not any(fused.fits(*shape) for shape in (
        (257, 64, 4, 8), (129, 128, 4, 8), (0, 64, 4, 8), (93, 8, 4, 8), (93, 256, 4, 8), (93, 48, 4, 8),
        (93, 64, 9, 8), (93, 64, 4, 6), (93, 64, 0, 8), (93, 64, 4, 0)))
