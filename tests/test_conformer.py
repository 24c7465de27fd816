"""The Conformer against the package conformer 0.3.2, which the original system used, with every weight random."""
import conformer as package
import pytest
import torch
import torch.nn.functional as F
from conformer.conformer import Attention as PackageAttention
from torch.testing import assert_close

from ssl_gpu.conformer import Attention, Conformer, ConformerConvModule, ConvNorm, attention_written_out

SIZES = dict(dim=24, depth=2, dim_head=5, heads=3, ff_mult=2, conv_expansion_factor=3, conv_kernel_size=7)
# Sums of at most 72 products in another order: 2 blocks leave some 10 roundings.
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=2e-6), torch.float64: dict(rtol=1e-13, atol=1e-14)}


def randomised(module, dtype, seed=0):
    """The module in dtype, parameters and running statistics redrawn: a fresh norm's 1 and 0 would hide a lost one."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        key: value if value.dtype == torch.int64 else 0.3 * torch.randn(value.shape, generator=generator).abs()
        for key, value in module.state_dict().items()
    }
    for key in state:
        if key.endswith("weight") and state[key].ndim > 1:
            state[key] *= torch.randn(state[key].shape, generator=generator).sign()
    module.load_state_dict(state)
    return module.to(dtype)


def pair(dtype, **changes):
    """The package's Conformer and ours with the same random weights."""
    sizes = {**SIZES, **changes}
    theirs = randomised(package.Conformer(**sizes), dtype)
    ours = Conformer(**sizes).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def tokens(num_tokens, dtype, batch=3, dim=24):
    return torch.randn(batch, num_tokens, dim, generator=torch.Generator().manual_seed(num_tokens), dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 18, 61])
def test_output_equals_the_package(num_tokens, dtype):
    theirs, ours = pair(dtype)
    x = tokens(num_tokens, dtype)
    assert_close(ours.eval()(x), theirs.eval()(x), **TOLERANCE[dtype])


@pytest.mark.parametrize("kernel_size", [1, 4, 31])
def test_every_kernel_size_equals_the_package(kernel_size):
    theirs, ours = pair(torch.float64, conv_kernel_size=kernel_size)
    x = tokens(18, torch.float64)
    assert_close(ours.eval()(x), theirs.eval()(x), **TOLERANCE[torch.float64])


def test_training_output_gradients_and_statistics_equal_the_package():
    theirs, ours = pair(torch.float64)
    results = []
    for model in (theirs, ours):
        x = tokens(18, torch.float64).requires_grad_()
        model.train()(x).sin().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((x.grad, gradients, model.state_dict()))
    assert_close(results[1], results[0], rtol=1e-11, atol=1e-12)


def test_distances_beyond_the_table_share_its_end_rows():
    theirs = randomised(PackageAttention(24, heads=3, dim_head=5, max_pos_emb=8), torch.float64)
    ours = Attention(24, heads=3, dim_head=5, max_pos_emb=8).double()
    ours.load_state_dict(theirs.state_dict())
    x = tokens(30, torch.float64)
    assert_close(ours(x), theirs(x), **TOLERANCE[torch.float64])


def test_more_tokens_than_the_default_table_equal_the_package():
    theirs, ours = pair(torch.float64, depth=1)
    x = tokens(600, torch.float64, batch=1)
    assert_close(ours.eval()(x), theirs.eval()(x), **TOLERANCE[torch.float64])


def test_attention_under_bfloat16_autocast():
    theirs = randomised(PackageAttention(24, heads=3, dim_head=8), torch.float32)
    ours = Attention(24, heads=3, dim_head=8)
    ours.load_state_dict(theirs.state_dict())
    x = tokens(18, torch.float32)
    exact = theirs(x)
    with torch.autocast("cpu", torch.bfloat16):
        low = ours(x)
    assert low.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; a lost relative term is an error of 0.4 of the largest output.
    assert (low - exact).abs().max() < 0.03 * exact.abs().max()


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-13), (torch.bfloat16, 0.02)])
def test_attention_written_out_is_that_of_one_call(dtype, most):
    """Outputs, and gradients of queries, keys, values and the bias."""
    generator = torch.Generator().manual_seed(0)
    sizes, results = [(2, 3, 18, 8)] * 3 + [(2, 3, 18, 18)], []
    parts = [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]
    for ours in (True, False):
        query, key, value, bias = leaves = [part.clone().requires_grad_() for part in parts]
        out = (attention_written_out(*leaves) if ours else
               F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0))
        out.sin().sum().backward()
        results.append((out.detach(), *(leaf.grad for leaf in leaves)))
    for ours, theirs in zip(*results):
        assert (ours - theirs).double().norm() < most * theirs.double().norm()


def test_attention_is_the_same_without_gradients():
    attention = randomised(Attention(24, heads=3, dim_head=5), torch.float64)
    x = tokens(30, torch.float64)
    with torch.no_grad():
        heard = attention(x)
    assert_close(heard, attention(x).detach(), **TOLERANCE[torch.float64])


def test_dropout_arguments_arrive():
    model = Conformer(**SIZES, attn_dropout=0.1, ff_dropout=0.2, conv_dropout=0.3)
    for block in model.layers:
        assert block.attn.fn.dropout.p == 0.1
        assert [block.ff1.fn.fn.net[i].p for i in (2, 4)] == [0.2, 0.2]
        assert [block.ff2.fn.fn.net[i].p for i in (2, 4)] == [0.2, 0.2]
        assert block.conv.net[9].p == 0.3


@pytest.mark.parametrize("name", ["attn_dropout", "ff_dropout", "conv_dropout"])
def test_each_dropout_changes_training_and_not_evaluation(name):
    plain, dropped = Conformer(**SIZES), Conformer(**SIZES, **{name: 0.5})
    dropped.load_state_dict(plain.state_dict())
    x = tokens(18, torch.float32)
    assert_close(dropped.eval()(x), plain.eval()(x), rtol=0, atol=0)
    assert (dropped.train()(x) - plain.train()(x)).abs().max() > 0.1


@pytest.mark.parametrize("name", SIZES)
def test_every_size_arrives(name):
    def shapes(**sizes):
        with torch.device("meta"):
            return {key: value.shape for key, value in Conformer(**sizes).state_dict().items()}

    larger = {**SIZES, name: SIZES[name] + 2}
    with torch.device("meta"):
        expected = {key: value.shape for key, value in package.Conformer(**larger).state_dict().items()}
    assert shapes(**larger) == expected != shapes(**SIZES)


def test_layer_norm_makes_training_independent_of_the_batch():
    x = tokens(18, torch.float64)
    for conv_norm, independent in ((ConvNorm.LAYER, True), ("layer", True), (ConvNorm.BATCH, False)):
        model = Conformer(**SIZES, conv_norm=conv_norm).double()
        difference = (model(x)[:1] - model(x[:1])).abs().max()
        assert (difference < 1e-12) == independent


def test_layer_norm_is_over_the_channels_of_one_token():
    """The module of the main recipe, step by step with channels first, as the package has all but the norm."""
    module = randomised(ConformerConvModule(24, kernel_size=7, conv_norm=ConvNorm.LAYER), torch.float64)
    first, _, widen, _, depthwise, norm, _, narrow, _, _ = module.net
    results = []
    for ours in (True, False):
        x = tokens(18, torch.float64).requires_grad_()
        module.zero_grad()
        if ours:
            out = module(x)
        else:
            inner = F.glu(widen(first(x).transpose(1, 2)), dim=1)
            inner = F.conv1d(F.pad(inner, (3, 3)), depthwise.conv.weight, depthwise.conv.bias, groups=48)
            inner = F.layer_norm(inner.transpose(1, 2), (48,), norm[1].weight, norm[1].bias, 1e-5).transpose(1, 2)
            out = narrow(inner * inner.sigmoid()).transpose(1, 2)
        out.sin().sum().backward()
        results.append((out.detach(), x.grad, {name: weight.grad for name, weight in module.named_parameters()}))
    assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    "argument, message",
    [
        (dict(depth=0), "depth must be at least 1, got 0"),
        (dict(heads=-1), "heads must be at least 1, got -1"),
        (dict(conv_kernel_size=0), "conv_kernel_size must be at least 1, got 0"),
        (dict(ff_dropout=1.0), "ff_dropout must satisfy 0 <= p < 1, got 1.0"),
        (dict(conv_norm="group"), "conv_norm must be one of batch, layer, got 'group'"),
    ],
)
def test_wrong_arguments_are_named(argument, message):
    with pytest.raises(ValueError) as error:
        Conformer(**{**SIZES, **argument})
    assert str(error.value) == message


def test_wrong_input_shape_is_named():
    with pytest.raises(ValueError, match=r"x must be \[batch, token, 24\], got shape \[3, 18, 25\]"):
        Conformer(**SIZES)(tokens(18, torch.float32, dim=25))
