"""Convolutions as products: those of torch in outputs and all gradients, and the networks that use them on a GPU."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ssl_gpu import products, runtime
from ssl_gpu.conformer import DepthWiseConv1d
from ssl_gpu.features import FeatureConfig
from ssl_gpu.model import STFT, ConformerLocalizer, ModelConfig, SSLModel

EXACT = dict(rtol=1e-11, atol=1e-12)  # of float64; sums of a few thousand products


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Sets whether the CPU counts as a device with matrix units."""
    def switch(on):
        monkeypatch.setattr(runtime, "prefers_products", lambda device: on)
    return switch


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
@pytest.mark.parametrize("channels_in, channels_out, pack, width", [
    (2, 4, 16, 32), (4, 8, 8, 32), (3, 5, 2, 32), (7, 8, 8, 29), (4, 3, 8, 33), (7, 2, 4, 3), (3, 2, 5, 7)])
def test_packed_convolution_is_that_of_torch(channels_in, channels_out, pack, width, channels_last, monkeypatch):
    """Of widths that no pack divides, too, and of channels for which no row of any reach is aligned."""
    rows, linear = [], products.linear
    monkeypatch.setattr(products, "linear", lambda x, *more: rows.append(x.shape[-1]) or linear(x, *more))
    x = noise(2, channels_in, 7, width)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    inputs = x, noise(channels_out, channels_in, 3, 3, seed=1), noise(channels_out, seed=2)
    found = with_gradients(lambda *args: products.conv3x3(*args, pack), *inputs)
    least = 3 * (pack + 2) * channels_in
    assert all(row % products.ALIGN == 0 and row >= least for row in rows) and rows
    assert (channels_in, pack) != (7, 8) or rows == [240]               # a channel of zeros
    assert found[0].stride(1) == 1 and (width % pack or found[0].is_contiguous(memory_format=torch.channels_last))
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
    (products.conv3x3, (2, 7, 9, 29), (8, 7, 3, 3), (8,)),
    (products.strided3x3, (2, 3, 5, 6), (4, 3, 3, 3), ((1, 2),)), (products.patches, (2, 3, 8, 8), (4, 3, 4, 4), ())])
def test_autocast_reaches_output_and_not_the_gradients_of_weights(function, shape, weight, more):
    inputs = [noise(*size, dtype=torch.float32) for size in (shape, weight, weight[:1])]
    results = []
    for bfloat16 in (False, True):
        leaves = [value.clone().requires_grad_() for value in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            out = function(*leaves, *more)
        out.backward(noise(*out.shape, dtype=torch.float32, seed=3).to(out.dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert [value.dtype for value in results[1]] == [torch.bfloat16] + [torch.float32] * 3
    for low, high in zip(*reversed(results)):
        assert (low - high).norm() < 0.01 * high.norm()


@pytest.mark.parametrize("first_bin", [0, 1])
def test_transform_by_a_product_is_that_of_the_convolutions(first_bin, as_on_a_gpu):
    stft, audio, results = STFT().double(), noise(2, 2, 2_000), []
    for on in (True, False):
        as_on_a_gpu(on)
        stft.zero_grad()
        heard = audio.clone().requires_grad_()
        real, imag = stft(heard, first_bin)
        (real * imag).sin().sum().backward()
        results.append((real, imag, heard.grad, stft.conv_real.weight.grad, stft.conv_imag.weight.grad))
    assert results[0][0].shape == (2, 2, 13, 257 - first_bin)
    assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens, by_product", [(14, True), (15, False)])
def test_few_tokens_are_twice_the_kernel(tokens, by_product, as_on_a_gpu, monkeypatch):
    as_on_a_gpu(True)
    calls, depthwise = [], products.depthwise
    monkeypatch.setattr(products, "depthwise", lambda *args: calls.append(args) or depthwise(*args))
    DepthWiseConv1d(6, 7).double()(noise(2, tokens, 6))
    assert bool(calls) == by_product


def original(**arguments):
    """One block, in float64."""
    torch.manual_seed(0)
    network = SSLModel(**arguments)
    network.backbone.layers = network.backbone.layers[:1]
    return network.double(), noise(2, 2, 11_000)


def small(**_):
    torch.manual_seed(0)
    return ConformerLocalizer(ModelConfig(depth=1), FeatureConfig(), 16_000, 0.08, 2, 36), noise(
        2, 2, 8_000, dtype=torch.float32)


def trained(network, audio, backend=None):
    """Logits, the gradients of all weights and all buffers, after one pass in training."""
    network = copy.deepcopy(network)
    function = network
    if backend:
        torch.compiler.reset()
        function = torch.compile(network, fullgraph=True, dynamic=False, backend=backend)
    logits = function(audio)
    logits = torch.stack(logits) if isinstance(logits, tuple) else logits
    logits.sin().sum().backward()
    gradients = {name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None}
    return logits.detach(), gradients, dict(network.named_buffers())


@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
@pytest.mark.parametrize("backend", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("build, most", [(original, 1e-10), (small, 1e-4)])
def test_network_by_products_is_the_plain_one(build, most, backend, as_on_a_gpu):
    """Logits, gradients and running statistics; compiled, as one graph."""
    network, audio = build()
    as_on_a_gpu(False)
    logits, gradients, buffers = trained(network, audio)
    as_on_a_gpu(True)
    found, others, statistics = trained(network, audio, backend)
    assert_close(found, logits, rtol=most, atol=most)
    assert_close(statistics, buffers, rtol=1e-6, atol=1e-6)
    assert others.keys() == gradients.keys()
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        # Of a bias before a norm the gradient is 0, and what is found are roundings.
        assert (others[name] - gradient).norm() < most * max(float(gradient.norm()), 1e-3 * scale), name


@pytest.mark.parametrize("channels_last, by_product", [(None, True), (True, True), (False, False)])
def test_maps_that_are_not_channels_last_are_left_to_the_convolutions(channels_last, by_product, as_on_a_gpu):
    as_on_a_gpu(True)
    network, audio = original(channels_last=channels_last)
    called = []
    for conv in (network.inter_conv[0], network.patch_embed[0]):
        conv.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        network(audio)
    assert bool(called) != by_product


def test_small_network_is_as_ever_without_gradients(as_on_a_gpu, monkeypatch):
    """Its maps by convolutions; depthwise filters are products there, too, to the bit on one CPU and not on another.
    """
    network, audio = small()
    as_on_a_gpu(False)
    with torch.no_grad():
        expected = network(audio)
        as_on_a_gpu(True)
        monkeypatch.delattr(products, "strided3x3")
        assert_close(network(audio), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(AttributeError, match="strided3x3"):
        network(audio)
