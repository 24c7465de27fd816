"""Gradients of a batch dealt out to threads: those of the whole, and side by side; how many threads and lanes."""
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ssl_gpu import runtime
from ssl_gpu.doa import localisation_loss
from ssl_gpu.features import FeatureConfig
from ssl_gpu.lanes import Lanes, ThreadTuner, separable, slices
from ssl_gpu.model import ConformerLocalizer, ModelConfig, SSLModel

BATCH, GRID = 7, 10
CPU = torch.device("cpu")


def network():
    torch.manual_seed(0)
    return ConformerLocalizer(ModelConfig(channels=4, dim=16, depth=1, heads=2), FeatureConfig(num_bands=4), 16000, 0.1,
                              2, GRID)


def losses(logits, mixture):
    valid = mixture.scenes.valid.float()
    powers = logits.square().mean((1, 2))
    return torch.stack((localisation_loss(logits, mixture.scenes.labels, valid),
                        (powers * valid).sum() / valid.sum().clamp(min=1)))


def clips():
    generator = torch.Generator().manual_seed(1)
    valid = torch.tensor([True, False, True, True, True, True, False])
    return (torch.randn(BATCH, 2, 4000, generator=generator),
            torch.rand(BATCH, 2, GRID, generator=generator).softmax(-1), valid)


def mixtures(part):
    audio, labels, valid = clips()
    scenes = SimpleNamespace(labels=labels[part], valid=valid[part])
    return SimpleNamespace(audio=audio[part], scenes=scenes)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_gradients_are_those_of_the_whole_batch(count):
    """With scenes that do not count, also where a part has none that does. Gradients of nearly 0 differ by roundings of
    the largest, by 2e-6 of it on one CPU."""
    model = network()
    expected = losses(model(clips()[0]), mixtures(slice(None)))
    expected.sum().backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    parts, scale = slices(BATCH, count), max(float(gradient.abs().max()) for gradient in wanted.values())
    lanes = Lanes(model, losses, False)
    for _ in range(2):                                                  # the first time one by one, then side by side
        found = lanes.gradients([lambda part=part: mixtures(part) for part in parts],
                                [clips()[2][part] for part in parts])
        assert not found.requires_grad
        torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-6)
        for name, weight in model.named_parameters():
            if name in wanted:
                torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-4, atol=1e-5 * scale)
            else:
                assert weight.grad is None


def test_lanes_run_side_by_side_after_their_first_call_and_on_torchs_number_of_threads():
    """That first call is made where gradients() is called."""
    barrier, threads, before = threading.Barrier(2), [], torch.get_num_threads()
    model, parts = network(), slices(BATCH, 2)
    lanes = Lanes(model, losses, False)

    def make(part, wait):
        threads.append(torch.get_num_threads())
        assert (threading.current_thread() is threading.main_thread()) != wait
        if wait:
            barrier.wait(10)                                           # raises where the other lane waits for this one
        return mixtures(part)

    try:
        for number, wait in ((1, False), (1, True), (2, False), (2, True)):
            torch.set_num_threads(number)
            threads.clear()
            lanes.gradients([lambda part=part: make(part, wait) for part in parts],
                            [clips()[2][part] for part in parts])
            assert threads == [number, number]
    finally:
        torch.set_num_threads(before)


def test_work_beside_the_caller_has_a_thread_and_torchs_number_of_threads():
    lanes, begin, before = Lanes(network(), losses, False), threading.Event(), torch.get_num_threads()

    def work():
        assert begin.wait(10)
        return threading.current_thread(), torch.get_num_threads()

    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            begin.clear()
            found = lanes.beside(work)
            assert not found.done()
            begin.set()
            thread, threads = found.result(10)
            assert threads == number and thread is not threading.main_thread()
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_lane_is_raised():
    lanes = Lanes(network(), losses, False)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            lanes.gradients([lambda: mixtures(slice(0, 3)), lambda: 1 / 0], [clips()[2][:3], clips()[2][3:]])


class Transposed(torch.autograd.Function):
    """What it is given; the gradient lies in memory column by column."""

    @staticmethod
    def forward(ctx, weight):
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.mT.contiguous().mT


class Choosy(nn.Module):
    """One layer for loud clips and one for the others, and a third for none; its gradients come transposed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.soft, self.none = (nn.Parameter(torch.randn(4000, 2 * GRID) / 60) for _ in range(3))

    def forward(self, audio):
        weight = self.loud if audio.abs().max() > 10 else self.soft
        return (audio[:, 0] @ Transposed.apply(weight)).unflatten(-1, (2, GRID))


def test_parts_need_not_use_the_same_weights_and_gradients_lie_as_weights_do():
    """Fused optimisers read along the memory of both."""
    model, expected = Choosy(), Choosy()
    scale = torch.tensor([1.0] * 4 + [100.0] * 3)[:, None, None]

    def make(part):
        mixture = mixtures(part)
        return SimpleNamespace(audio=mixture.audio * scale[part], scenes=mixture.scenes)

    parts = [slice(0, 4), slice(4, 7)]
    for order in (parts, parts[::-1]):
        lanes = Lanes(model, losses, False)
        for _ in range(2):                                              # one by one, then side by side
            lanes.gradients([lambda part=part: make(part) for part in order], [clips()[2][part] for part in order])
            assert model.none.grad is None
            for name, part in (("soft", parts[0]), ("loud", parts[1])):
                share = clips()[2][part].sum() / clips()[2].sum()
                wanted, = torch.autograd.grad(share * losses(expected(make(part).audio), make(part)).sum(),
                                              getattr(expected, name))
                found = getattr(model, name).grad
                assert wanted.stride() != found.stride() == getattr(model, name).stride()
                torch.testing.assert_close(found, wanted)


def test_frozen_weights_get_no_gradient():
    model = network()
    model.fold.requires_grad_(False)
    Lanes(model, losses, False).gradients([lambda: mixtures(slice(None))], [clips()[2]])
    assert model.fold.weight.grad is None and model.head[0].weight.grad is not None


def test_networks_whose_examples_know_of_each_other_are_not_dealt_out():
    assert separable(network()) and not separable(SSLModel()) and not separable(nn.BatchNorm1d(3))


def test_parts_are_as_equal_as_can_be():
    assert slices(7, 3) == [slice(0, 2), slice(2, 4), slice(4, 7)]
    assert slices(2, 5) == [slice(0, 1), slice(1, 2)]
    assert slices(32, 1) == [slice(0, 32)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
def test_a_compiled_network_is_dealt_out_too():
    """Also with parts of two sizes, each compiled on its first call, and called side by side from then on."""
    model, plain = network(), network()
    compiled, parts = runtime.compiled(model, True), slices(BATCH, 2)
    lanes, reference = Lanes(compiled, losses, False), Lanes(plain, losses, False)
    for _ in range(3):
        for each in (lanes, reference):
            each.gradients([lambda part=part: mixtures(part) for part in parts], [clips()[2][part] for part in parts])
    scale = max(float(weight.grad.abs().max()) for weight in plain.parameters() if weight.grad is not None)
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-4 * scale)


class Machine:
    """A clock and a number of threads for ThreadTuner; `pace` gives the seconds of a step by its threads."""

    def __init__(self, monkeypatch, threads, pace):
        self.now, self.threads, self.pace, self.used = 0.0, threads, pace, []
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(self, "threads", count))
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def run(self, tuner, steps):
        for _ in range(steps):
            self.used.append(self.threads)
            self.now += self.pace[self.threads]
            tuner.step()


def test_idle_machine_uses_all_threads_and_busy_machine_fewer(monkeypatch):
    machine = Machine(monkeypatch, 4, {4: 0.1, 2: 0.2, 1: 0.4})
    tuner = ThreadTuner(CPU)
    machine.run(tuner, 40)
    assert set(machine.used) == {4, 2, 1} and machine.used[-20:] == [4] * 20
    machine.pace = {4: 6.0, 2: 3.0, 1: 0.8}
    machine.now += 60
    machine.run(tuner, 40)
    assert machine.used[-25:] == [1] * 25


def test_threads_are_tried_again_and_a_choice_that_lost_is_not_tried_to_the_end(monkeypatch):
    machine = Machine(monkeypatch, 2, {2: 0.1, 1: 9.0})
    tuner = ThreadTuner(CPU)
    machine.run(tuner, 20)
    assert machine.used.count(1) == 2                                   # the very first does not count
    machine.now += tuner.EVERY_S
    machine.run(tuner, 20)
    assert machine.used.count(1) == 3 and machine.threads == 2


def test_a_pause_is_no_step(monkeypatch):
    machine = Machine(monkeypatch, 2, {2: 0.1, 1: 0.2})
    tuner = ThreadTuner(CPU)
    machine.run(tuner, 2)
    machine.now += 500
    tuner.restart()
    machine.run(tuner, 20)
    assert machine.threads == 2


def test_cores_are_dealt_out_to_lanes_where_that_is_quicker(monkeypatch):
    machine, used = Machine(monkeypatch, 4, {}), []
    tuner = ThreadTuner(CPU, most_lanes=3)
    assert tuner.choices == [(4, 1), (2, 2), (2, 1), (1, 1)]           # three lanes would leave a core over
    pace = {(4, 1): 0.3, (2, 2): 0.2, (2, 1): 0.5, (1, 1): 0.9}
    for _ in range(40):
        used.append((machine.threads, tuner.lanes))
        first = used.count(used[-1]) == 1 and tuner.lanes > 1           # in which lanes run one after the other
        machine.pace = {machine.threads: (2 if first else 1) * pace[used[-1]]}
        machine.run(tuner, 1)
    assert set(used) == set(tuner.choices) and used[-15:] == [(2, 2)] * 15
    assert ThreadTuner(CPU, most_lanes=32).choices == [(4, 1), (2, 2), (1, 4), (2, 1), (1, 1)]


@pytest.mark.parametrize("device, enabled, threads", [(CPU, False, 2), (CPU, True, 1),
                                                      (torch.device("cuda", 0), True, 2)])
def test_threads_are_left_alone(monkeypatch, device, enabled, threads):
    machine = Machine(monkeypatch, threads, {2: 0.1, 1: 0.01})
    machine.run(ThreadTuner(device, enabled), 50)
    assert set(machine.used) == {threads}


@pytest.mark.parametrize("fixed, threads", [(1, 4), (2, 2), (3, 1), (8, 1)])
def test_lanes_that_are_asked_for_share_the_threads_without_a_trial(monkeypatch, fixed, threads):
    machine = Machine(monkeypatch, 4, {4: 0.1, 2: 0.2, 1: 0.4})
    tuner = ThreadTuner(CPU, most_lanes=32, fixed=fixed)
    machine.run(tuner, 20)
    assert set(machine.used) == {threads} and tuner.lanes == fixed
