"""The branches of a block of patches, their programs in Triton's interpreter, against the plain ones; without a GPU."""
import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from ssl_gpu.masks import neighbours


@pytest.fixture
def fused(in_interpreter, monkeypatch):
    """ssl_gpu.fused_beside with programs that run on a CPU, few patches to each, and fewer programs than there is work
    for."""
    from ssl_gpu import fused_beside as module
    in_interpreter(module)
    monkeypatch.setattr(module, "ROWS", 16)
    monkeypatch.setattr(module, "PROGRAMS", 3)
    return module


def tensors(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    width = shape[-1]
    sizes = shape, (width,), (width,), (width, 3 * width), (width,)
    x, gain, shift, weight, bias = (torch.randn(size, generator=generator) for size in sizes)
    gain, weight = 1 + 0.3 * gain, weight / width**0.5
    return [tensor.requires_grad_() for tensor in (x.to(dtype), gain, shift, weight, bias)]


def plain(x, gain, shift, weight, bias, dim, reach):
    normed = F.layer_norm(x, x.shape[-1:], gain, shift)
    return x + F.gelu(F.linear(neighbours(normed, reach, dim), weight, bias))


@pytest.mark.parametrize("dim, reach", [(1, 1), (1, 2), (1, 8), (2, 1)])
@pytest.mark.parametrize("shape", [(2, 5, 3, 16), (1, 12, 7, 32), (3, 1, 1, 16)])
def test_it_is_the_plain_branch_with_its_gradients(shape, dim, reach, fused):
    given = tensors(shape)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    found, expected = fused.beside_fused(*given, dim, reach), plain(*exact, dim, reach)
    assert_close(found.double(), expected, rtol=0, atol=1e-5)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((found * weight).sum(), given)
    for name, grad, of_plain in zip(("x", "gain", "shift", "weight", "bias"), grads,
                                    torch.autograd.grad((expected * weight).sum(), exact)):
        assert grad.shape == of_plain.shape and grad.dtype == torch.float32
        assert_close(grad.double(), of_plain, rtol=0, atol=2e-5 * (1 + float(of_plain.abs().max())),
                     msg=lambda text: f"{name}: {text}")


def test_views_with_gaps(fused):
    given = tensors((2, 4, 6, 16))
    turned = given[0].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    expected, found = (fused.beside_fused(x, *given[1:], 1, 1) for x in (given[0], turned))
    assert_close(found, expected, rtol=0, atol=0)
    grad = torch.randn(2, 6, 4, 16).transpose(1, 2)
    expected, found = (torch.autograd.grad(out, x, grad)[0] for x, out in ((given[0], expected), (turned, found)))
    assert_close(found, expected, rtol=0, atol=0)


def test_which_widths_there_are_kernels_for(fused):
    assert [width for width in range(300) if fused.fits(width)] == [16, 32, 64, 128]
