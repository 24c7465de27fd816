"""Convolutions as products: those of torch in outputs and all gradients, and the networks that use them on a GPU."""
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ssl_gpu import products

EXACT = dict(rtol=1e-11, atol=1e-12)  # of float64; sums of a few thousand products


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_gradients(function, *inputs):
    """The output and the gradients of all inputs, for an uneven gradient of the output."""
    inputs = [value.clone().requires_grad_() for value in inputs]
    out = function(*inputs)
    return out.detach(), *torch.autograd.grad(out.sin().sum(), inputs)


@pytest.mark.parametrize("rows, columns, taps, start", [(3, 7, 2, 1), (5, 8, 9, -4), (1, 8, 31, -15), (4, 4, 1, 0)])
def test_bands_lie_where_they_should(rows, columns, taps, start):
    filters = noise(2, 3, taps)
    expected = torch.zeros(2, 3, rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            if 0 <= column - row - start < taps:
                expected[..., row, column] = filters[..., column - row - start]
    assert_close(products.banded(filters, rows, columns, start), expected, rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 5, 16, 18])
@pytest.mark.parametrize("taps", [1, 2, 4, 31])
def test_depthwise_is_that_of_the_convolution(tokens, taps):
    before, after = taps // 2, (taps - 1) // 2

    def plain(x, weight, bias):
        return F.conv1d(F.pad(x.transpose(1, 2), (before, after)), weight, bias, groups=6).transpose(1, 2)

    inputs = noise(3, tokens, 6), noise(6, 1, taps, seed=1), noise(6, seed=2)
    found = with_gradients(lambda *args: products.depthwise(*args, before), *inputs)
    assert_close(found, with_gradients(plain, *inputs), **EXACT)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels_in, channels_out, pack", [(2, 4, 16), (4, 8, 8), (3, 5, 2)])
def test_packed_convolution_is_that_of_torch(channels_in, channels_out, pack, channels_last):
    x = noise(2, channels_in, 7, 32)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    inputs = x, noise(channels_out, channels_in, 3, 3, seed=1), noise(channels_out, seed=2)
    found = with_gradients(lambda *args: products.conv3x3(*args, pack), *inputs)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(found, with_gradients(lambda *args: F.conv2d(*args, padding=1), *inputs), **EXACT)


@pytest.mark.parametrize("stride", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("size", [(7, 9), (6, 8)])
def test_strided_convolution_is_that_of_torch(stride, size):
    inputs = noise(2, 3, *size), noise(5, 3, 3, 3, seed=1), noise(5, seed=2)
    found = with_gradients(lambda *args: products.strided3x3(*args, stride), *inputs)
    expected = with_gradients(lambda *args: F.conv2d(*args, stride, 1), *inputs)
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("channels_in, channels_out", [(8, 32), (32, 64)], ids=["small", "large"])
def test_patches_are_the_strided_convolution(channels_in, channels_out):
    inputs = noise(2, channels_in, 11, 9), noise(channels_out, channels_in, 4, 4, seed=1), noise(channels_out, seed=2)
    assert (inputs[1].numel() > products.SMALL_WEIGHT) == (channels_in == 32)
    found = with_gradients(products.patches, *inputs)
    assert_close(found, with_gradients(lambda *args: F.conv2d(*args, stride=4), *inputs), **EXACT)


@pytest.mark.parametrize("function, shape, weight, more", [
    (products.depthwise, (2, 18, 6), (6, 1, 7), (3,)), (products.conv3x3, (2, 4, 5, 16), (8, 4, 3, 3), (8,)),
    (products.strided3x3, (2, 3, 5, 6), (4, 3, 3, 3), ((1, 2),)), (products.patches, (2, 3, 8, 8), (4, 3, 4, 4), ())])
def test_autocast_reaches_output_and_not_the_gradients_of_weights(function, shape, weight, more):
    inputs = [noise(*size, dtype=torch.float32) for size in (shape, weight, weight[:1])]
    exact = with_gradients(lambda *args: function(*args, *more), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(lambda *args: function(*args, *more), *inputs)
    assert [value.dtype for value in found] == [torch.bfloat16] + [torch.float32] * 3
    for low, high in zip(found, exact):
        assert (low - high).norm() < 0.03 * high.norm()
