"""Muon: the iteration against singular values, the optimiser against torch's, and which weights it takes."""
import copy
import math

import pytest
import torch
from torch import nn

from ssl_gpu.conformer import Conformer
from ssl_gpu.model import SSLModel
from ssl_gpu.muon import Muon, has_whole_products, hidden_matrices, orthogonalised
from ssl_gpu.optim import Optimizer, Together, TrainConfig, build_optimizer, restore_optimizer


def gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=generator)


def muon_config(**changes):
    return TrainConfig(steps=1, **{"lr": 0.01, "weight_decay": 0.3, "optimizer": Optimizer.MUON} | changes)


@pytest.mark.parametrize("shape", [(6, 6), (5, 40), (3, 5, 40)])
def test_singular_vectors_stay_and_singular_values_are_levelled(shape):
    """The update of an ill-conditioned matrix U S V': U' X V is diagonal, with values from 0.68 to 1.21."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64, generator=generator)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = torch.logspace(0, -2, values.shape[-1], dtype=torch.float64).expand(values.shape)
    result = orthogonalised(left * values[..., None, :] @ right)
    core = left.mT @ result @ right.mT
    found = core.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(core, torch.diag_embed(found), rtol=0, atol=1e-9)
    assert 0.68 < found.min() and found.max() < 1.21


def plain_iteration(matrix):
    """Jordan et al.'s, in float64."""
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def with_values(shape, values, seed=0):
    """A matrix of these singular values, in float64."""
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64, generator=generator),
                                      full_matrices=False)
    return left * values @ right


@pytest.mark.parametrize("shape", [(32, 96), (128, 512)])
@pytest.mark.parametrize("last, rank", [(0.1, 1.0), (1e-4, 1.0), (1e-4, 0.5), (0.1, 0.05)])
def test_wide_matrices_lose_little_in_float32(shape, last, rank):
    """They iterate on their products of rows: singular values from 1 to `last`, the lower ones 0 for a lower rank.
    Another coefficient, or one product less, is off by more than 0.1."""
    rows = shape[0]
    values = torch.logspace(0, math.log10(last), rows, dtype=torch.float64)
    matrix = with_values(shape, values * (torch.arange(rows) < rank * rows))
    expected = plain_iteration(matrix)
    assert (orthogonalised(matrix.float()) - expected).norm() < 6e-4 * expected.norm()


def test_wide_matrices_stay_whole_where_products_are_not():
    """In bfloat16, under autocast and with TF32 allowed: the products of rows alone would grow 2,000 times too large
    in the first, and in the last are not used."""
    matrix = with_values((32, 96), torch.logspace(0, -4, 32, dtype=torch.float64)).float()
    expected = plain_iteration(matrix)
    narrow = orthogonalised(matrix.bfloat16())
    assert narrow.dtype == torch.bfloat16 and (narrow - expected).norm() < 0.3 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        assert (orthogonalised(matrix) - expected).norm() < 6e-4 * expected.norm()
    exact = orthogonalised(matrix.double()).float()
    before = torch.get_float32_matmul_precision()
    assert has_whole_products(matrix) and has_whole_products(matrix.double())
    try:
        torch.set_float32_matmul_precision("high")
        assert not has_whole_products(matrix) and has_whole_products(matrix.double())
        torch.testing.assert_close(orthogonalised(matrix), exact, rtol=0, atol=1e-4)
    finally:
        torch.set_float32_matmul_precision(before)


def test_precision_set_for_one_backend_alone_is_taken_for_less():
    """torch then refuses to say what its older setting would be."""
    matrix = with_values((32, 96), torch.logspace(0, -4, 32, dtype=torch.float64)).float()
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert not has_whole_products(matrix) and has_whole_products(matrix.double())
        found = orthogonalised(matrix)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert has_whole_products(matrix)
    torch.testing.assert_close(found, plain_iteration(matrix).float(), rtol=0, atol=1e-4)


def test_zero_gradient_moves_nothing_but_the_decay():
    weight = nn.Parameter(torch.ones(4, 8))
    weight.grad = torch.zeros(4, 8)
    Muon([weight], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 8), 0.95))


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_steps_are_those_of_torch(shape):
    """Of two dimensions, where torch.optim.Muon serves: ten steps differ by what bfloat16 there takes off. The decay is
    strong enough that its place, before the update, matters more."""
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    options = dict(lr=0.1, momentum=0.95, weight_decay=2.0)
    mine, other = Muon([ours], **options), torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step(), other.step()
    difference = (ours - theirs).detach().norm() / ours.detach().norm()
    assert difference < 0.02, difference


def test_filters_are_taken_as_matrices_and_those_of_one_shape_together():
    """A pointwise convolution moves as the linear layer that it is, beside others of its shape or alone."""
    generator = torch.Generator().manual_seed(0)
    gradient = [torch.randn(8, 12, generator=generator) for _ in range(3)]
    weights = [nn.Parameter(torch.zeros(8, 12)), nn.Parameter(torch.zeros(8, 12, 1)), nn.Parameter(torch.zeros(12, 8))]
    alone = [nn.Parameter(torch.zeros(8, 12)) for _ in range(3)]
    for weight, single, grad in zip(weights, alone, gradient):
        weight.grad = (grad.T if weight.shape == (12, 8) else grad).reshape(weight.shape).clone()
        single.grad = grad
        Muon([single], lr=1.0).step()
    Muon(weights, lr=1.0).step()
    for weight, single in zip(weights, alone):
        found = weight.detach().T if weight.shape == (12, 8) else weight.detach().flatten(1)
        torch.testing.assert_close(found, single.detach(), rtol=1e-5, atol=1e-6)


def test_weights_move_together_as_each_by_itself():
    """Three steps of weights of several shapes, with decay; one has a gradient in the second step alone."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 12), (12, 8), (8, 12, 1), (6, 6), (8, 12)]
    together = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    alone = [nn.Parameter(weight.detach().clone()) for weight in together]
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}
    whole, parts = Muon(together, **settings), [Muon([weight], **settings) for weight in alone]
    for step in range(3):
        for index, (weight, single) in enumerate(zip(together, alone)):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.grad, single.grad = (None, None) if index == 4 and step != 1 else (gradient, gradient.clone())
        before = together[4].detach().clone()
        for optimizer in (whole, *parts):
            optimizer.step()
        assert torch.equal(together[4], before) == (step != 1)
    for weight, single in zip(together, alone):
        torch.testing.assert_close(weight, single, rtol=1e-5, atol=1e-6)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"^Muon takes weights of two dimensions or more, got shape \[3\]$"):
        Muon([nn.Parameter(torch.zeros(3))], lr=1.0)


def names_of(weights, model):
    return [name for name, weight in model.named_parameters() if any(weight is other for other in weights)]


def test_takes_the_matrices_inside_a_network():
    """Linear layers and pointwise convolutions; no table, depthwise filter, narrow or frozen one, nor the output: here
    all but the narrow one are wide enough."""
    conformer = Conformer(96, depth=1, heads=2, dim_head=64, conv_kernel_size=65)
    model = nn.Sequential(nn.Linear(8, 96), conformer, nn.Linear(96, 96), nn.Linear(96, 70))
    model[2].weight.requires_grad_(False)
    assert names_of(hidden_matrices(model), model) == [f"1.layers.0.{name}.weight" for name in (
        "ff1.fn.fn.net.0", "ff1.fn.fn.net.3", "attn.fn.to_q", "attn.fn.to_kv", "attn.fn.to_out", "conv.net.2",
        "conv.net.7", "ff2.fn.fn.net.0", "ff2.fn.fn.net.3")]
    assert hidden_matrices(nn.ReLU()) == []


def test_leaves_the_transform_of_the_original_alone():
    """Its filters of the waveform are 257 x 512, and the input."""
    model = SSLModel()
    names = names_of(hidden_matrices(model), model)
    assert not any(name.startswith("stft") for name in names) and "patch_embed.6.weight" in names
    assert len(names) == 8 * 9 + 2  # nine in every block; 8 to 32 channels are too narrow


def test_every_weight_has_one_optimiser():
    model = nn.Sequential(nn.Linear(80, 96), nn.LayerNorm(96), nn.Linear(96, 70))
    optimizer = build_optimizer(muon_config(), model)
    assert isinstance(optimizer, Together)
    parts = {name: [p for group in part.param_groups for p in group["params"]]
             for name, part in optimizer.parts.items()}
    assert [id(p) for p in parts["muon"]] == [id(model[0].weight)]
    assert {id(p) for p in parts["adamw"]} == {id(p) for p in model.parameters()} - {id(model[0].weight)}
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.01, 0.3), (0.01, 0.0), (0.01, 0.3)]


def test_a_network_without_such_matrices_is_refused():
    with pytest.raises(ValueError, match=r"^train.optimizer=muon needs a network with matrices of at least 64 rows"):
        build_optimizer(muon_config(), nn.Linear(300, 200))


def test_goes_on_from_its_state():
    """Three steps, saved, and three more: as six; of another optimiser's state it wants nothing."""
    def network():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(80, 96), nn.Linear(96, 70))
        return model, build_optimizer(muon_config(), model)

    whole, optimizer = network()
    for step in range(3):
        gradients(whole, step)
        optimizer.step()
    state, weights = copy.deepcopy((optimizer.state_dict(), whole.state_dict()))
    resumed, other = network()
    resumed.load_state_dict(weights)
    restore_optimizer(other, state)
    for step in range(3, 6):
        for model, parts in ((whole, optimizer), (resumed, other)):
            gradients(model, step)
            parts.step()
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in whole.parameters())
    adamw = build_optimizer(muon_config(optimizer=Optimizer.ADAMW), whole)
    for one, of_another in ((other, adamw.state_dict()), (adamw, state)):
        with pytest.raises(KeyError):
            restore_optimizer(one, of_another)
