"""Schedules, optimisers and averaged weights."""
import math

import pytest
import torch
from torch import nn

from ssl_gpu.optim import (Averaged, Optimizer, Schedule, TrainConfig, build_optimizer, learning_rate, noise_share,
                           restore_optimizer)


def cosine(**changes):
    return TrainConfig(steps=1, **{"lr": 1.0, "warmup": 0.1, "lr_end": 0.1, **changes})


def test_rate_rises_over_the_warmup_and_falls_to_its_end():
    rates = [learning_rate(cosine(), step, step / 100) for step in range(101)]
    assert 0 < rates[0] < 0.02
    assert all(a < b for a, b in zip(rates[:9], rates[1:10]))
    assert all(a > b for a, b in zip(rates[11:100], rates[12:101]))
    assert rates[100] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.55)


def test_no_warmup_starts_at_the_full_rate():
    assert learning_rate(cosine(warmup=0.0), 0, 0.0) == 1.0


def test_rate_does_not_rise_again_after_the_end():
    assert learning_rate(cosine(), 500, 1.7) == pytest.approx(0.1)


def test_noise_rises_over_its_warmup():
    assert [noise_share(cosine(noise_warmup=0.4), progress) for progress in (0.0, 0.1, 0.4, 1.0)] == [0, 0.25, 1, 1]
    assert noise_share(cosine(), 0.0) == 1.0
    with pytest.raises(ValueError, match=r"^train.noise_warmup must be in \[0, 1\], got 1.5$"):
        cosine(noise_warmup=1.5)


def test_step_schedule_is_the_originals():
    cfg = TrainConfig(steps=1000, lr=2e-4, warmup=0.0, schedule=Schedule.STEP, lr_every=200, lr_gamma=0.2)
    rates = [learning_rate(cfg, step, step / 1000) for step in (0, 199, 200, 400, 600, 999)]
    assert rates == pytest.approx([2e-4, 2e-4, 4e-5, 8e-6, 1.6e-6, 3.2e-7])


def test_adamw_spares_vectors_the_weight_decay():
    optimizer = build_optimizer(cosine(weight_decay=0.3), nn.Linear(3, 2))
    decay = {tuple(p.shape): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {(2, 3): 0.3, (2,): 0.0}


def test_adam_puts_the_l2_term_into_the_gradient_of_everything():
    """With a zero gradient, Adam moves weights by the L2 term alone, bias included, and AdamW shrinks them in
    proportion: two different things under one name."""
    def moved(kind):
        model = nn.Linear(3, 2)
        nn.init.constant_(model.weight, 0.5)
        nn.init.constant_(model.bias, 0.5)
        optimizer = build_optimizer(cosine(optimizer=kind, weight_decay=0.05, lr=0.01), model)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        return model.weight.detach().mean().item(), model.bias.detach().mean().item()

    assert moved(Optimizer.ADAM) == pytest.approx((0.49, 0.49), abs=1e-6)
    assert moved(Optimizer.ADAMW) == pytest.approx((0.5 - 0.01 * 0.05 * 0.5, 0.5), abs=1e-6)


@pytest.mark.parametrize("kind", [Optimizer.ADAMW, Optimizer.ADAM])
def test_fused_steps_are_those_of_the_plain_optimiser(kind):
    """Twenty steps of both: to a few roundings of the weights, and with the same moments to go on from."""
    fused, plain = (nn.Linear(30, 20) for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    cfg = cosine(optimizer=kind, weight_decay=0.3, lr=0.01)
    ours, other = build_optimizer(cfg, fused), build_optimizer(cfg, plain)
    for group in other.param_groups:
        group |= {"fused": False, "foreach": False}
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        for first, second in zip(fused.parameters(), plain.parameters()):
            first.grad = torch.randn(first.shape, generator=generator)
            second.grad = first.grad.clone()
        ours.step(), other.step()
    torch.testing.assert_close(fused.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)
    for first, second in zip(ours.state.values(), other.state.values(), strict=True):
        torch.testing.assert_close(first["exp_avg_sq"], second["exp_avg_sq"], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", list(Optimizer))
def test_a_restored_optimiser_has_the_weight_decay_of_now(kind):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2))
    then = build_optimizer(cosine(optimizer=kind, weight_decay=0.1), model)
    now, fresh = (build_optimizer(cosine(optimizer=kind, weight_decay=0.3), model) for _ in range(2))
    restore_optimizer(now, then.state_dict())
    decays = [group["weight_decay"] for group in now.param_groups]
    assert 0.3 in decays and decays == [group["weight_decay"] for group in fresh.param_groups]


def test_state_of_a_plain_optimiser_goes_on_fused():
    """As checkpoints of before have it: the moments and the count of steps are theirs, the way of computing is ours."""
    model, cfg = nn.Linear(3, 2), cosine()
    old = torch.optim.AdamW(build_optimizer(cfg, model).param_groups, 1.0, betas=(0.9, 0.98), fused=False)
    for group in old.param_groups:
        group["fused"] = None
    model(torch.ones(1, 3)).sum().backward()
    old.step()
    ours = build_optimizer(cfg, model)
    restore_optimizer(ours, old.state_dict())
    assert all(group["fused"] for group in ours.param_groups)
    assert [float(state["step"]) for state in ours.state.values()] == [1, 1]
    torch.testing.assert_close(ours.state[model.weight]["exp_avg"], old.state[model.weight]["exp_avg"])
    ours.step()
    with pytest.raises(ValueError):
        restore_optimizer(ours, build_optimizer(cosine(optimizer=Optimizer.ADAM), model).state_dict())


def test_frozen_parameters_are_left_out():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = build_optimizer(cosine(), model)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 6


@pytest.mark.parametrize("updates, expected", [
    (0, [0.9, 0.98181818, 0.99545455]),  # decays 1/10, 2/11 and 3/12
    (79, [0.1011236, 0.19101124, 0.27191011]),  # 80/89, which is less than 0.9, and then 0.9
    (1000, [0.1, 0.19, 0.271])])
def test_averaged_weights_follow_and_forget_the_start(updates, expected):
    """From 0 to 1: what is left of the 0 is the product of the decays."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 0.0)
    averaged = Averaged(model, 0.9, updates)
    nn.init.constant_(model.weight, 1.0)
    found = []
    for _ in range(3):
        averaged.update(model)
        found.append(averaged.model.weight.item())
    assert found == pytest.approx(expected, abs=1e-6) and averaged.updates == updates + 3


def test_averaged_model_takes_over_buffers_and_needs_no_gradient():
    model = nn.BatchNorm1d(2)
    averaged = Averaged(model, 0.9)
    model(torch.randn(8, 2) + 5)
    averaged.update(model)
    torch.testing.assert_close(averaged.model.running_mean, model.running_mean)
    assert not any(p.requires_grad for p in averaged.model.parameters())


@pytest.mark.parametrize("field, value", [
    ("steps", 0), ("batch_size", 0), ("lr", 0.0), ("max_minutes", -1.0), ("clip_norm", 0.0), ("weight_decay", -0.1),
    ("ema", 1.0), ("warmup", 1.5), ("lr_end", -0.1), ("evaluations", 0), ("log_every", 0), ("checkpoint_minutes", 0.0),
    ("seed", -1), ("lr_every", 0), ("lr_gamma", 2.0), ("lanes", 0)])
def test_impossible_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError) as error:
        TrainConfig(**{"steps": 1, field: value})
    assert f"train.{field}" in str(error.value) and str(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_needs_a_length():
    with pytest.raises(ValueError, match="train.steps or train.max_minutes"):
        TrainConfig()
    assert math.isclose(TrainConfig(max_minutes=4).max_minutes, 4)
