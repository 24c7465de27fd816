"""A whole training step as one CUDA graph: the same steps, on a CPU where nothing is captured, and who may have it."""
import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import yaml
from torch.testing import assert_close

from ssl_gpu import run as run_setup
from ssl_gpu import train
from ssl_gpu.config import RunConfig, from_mapping
from ssl_gpu.optim import build_optimizer, learning_rate, rate_on_device, restore_optimizer
from ssl_gpu.pretrained import build_localizer
from ssl_gpu.run import Run, training_speech, uses_graph
from ssl_gpu.simulator import Simulator

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
RATE, DECAY = 2.0 ** -9, 2.0 ** -5  # float32 holds them, and Muon's 1 - RATE * DECAY
TINY = {
    "speech": {"clip_s": 0.5, "voices_speakers": 4, "voices_utterances": 1, "voices_duration_s": 1.0},
    "scene": {"rt60_s": [0.1, 0.3]}, "rir": {"hybrid_share": 0.5, "early": False}, "ism": {"absorption": "eyring"},
    "mixture": {"diffuse_snr_db": [0, 10], "sensor_snr_db": [10, 20], "noise_probability": 0.5},
    "model": {"channels": 4, "dim": 64, "depth": 1, "heads": 2}, "features": {"num_bands": 4, "num_delays": 17},
    "train": {"steps": 8, "batch_size": 3, "noise_warmup": 1.0, "weight_decay": DECAY, "lr": RATE, "warmup": 0.0,
              "schedule": "step", "device": "cpu", "precision": "float32"}}


def config(symmetric=False, **changes):
    return from_mapping(RunConfig, {**TINY, "model": {**TINY["model"], "symmetric": symmetric},
                                    "train": {**TINY["train"], **changes}})


def run_of(cfg):
    torch.manual_seed(0)
    localizer = build_localizer(cfg).train()
    averaged = None if cfg.train.ema is None else run_setup.Averaged(localizer, cfg.train.ema)
    return Run(cfg, None, CPU, training_speech(cfg, CPU), Simulator(cfg.scene, cfg.rir, cfg.mixture, cfg.simulator,
                                                                    cfg.ism),
               None, {}, localizer, averaged, build_optimizer(cfg.train, localizer))


def step_by_step(run, count):
    """As the loop of train.train does without a graph."""
    losses = []
    for step in range(count):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(run.cfg.train, step, step / run.cfg.train.steps)
        losses.append(train.gradients(run, run.localizer, train.draw_batch(run, step)))
        train.update(run)
    return losses


@pytest.mark.parametrize("optimizer, ema, symmetric", [
    *[(optimizer, ema, False) for optimizer in ("adam", "adamw", "muon") for ema in (None, 0.9)], ("muon", 0.9, True)])
def test_steps_are_those_of_the_loop(optimizer, ema, symmetric):
    """To the bit where float32 holds the rate, as a graph reads it; averages to roundings."""
    cfg = config(symmetric, optimizer=optimizer, ema=ema)
    plain, run = run_of(cfg), run_of(cfg)
    expected, invalid = step_by_step(plain, 4), torch.zeros((), dtype=torch.int64)
    captured = train.CapturedStep(run, run.localizer, invalid)
    for step, loss in enumerate(expected):
        found = captured.take(step, learning_rate(cfg.train, step, step / 8))
        assert torch.equal(found, loss) and not found.requires_grad
    assert_close(run.localizer.state_dict(), plain.localizer.state_dict(), rtol=0, atol=0)
    assert any(not torch.equal(a, b) for a, b in zip(run.localizer.parameters(), run_of(cfg).localizer.parameters()))
    assert invalid == 0
    if ema is not None:
        assert run.averaged.updates == plain.averaged.updates == 4
        assert_close(run.averaged.model.state_dict(), plain.averaged.model.state_dict(), rtol=1e-6, atol=1e-6)


def test_rates_that_float32_rounds_change_roundings_alone():
    cfg = config(optimizer="muon", lr=3e-3, schedule="cosine", warmup=0.5)
    plain, run = run_of(cfg), run_of(cfg)
    step_by_step(plain, 3)
    captured = train.CapturedStep(run, run.localizer, torch.zeros((), dtype=torch.int64))
    for step in range(3):
        captured.take(step, learning_rate(cfg.train, step, step / 8))
    # As a whole: where a gradient is zero, as of biases before a norm, Adam makes a step of its rounding error.
    begin, expected, found = (torch.cat([weight.detach().flatten() for weight in one.localizer.parameters()])
                              for one in (run_of(cfg), plain, run))
    assert (found - expected).norm() < 0.01 * (expected - begin).norm()


def test_noise_share_may_be_a_tensor_whose_value_nobody_looks_at():
    run = run_of(config())
    _, number = train.draw_examples(run, 3)
    generators = [train.rng.generator(0, train.rng.Split.TRAIN, stream, 3) for stream in train.STREAMS]
    _, tensor = train.draw_from(run, *generators, torch.tensor(3 / 8, dtype=torch.float64))
    assert torch.equal(number.mixture.sensor_snr, tensor.mixture.sensor_snr)
    assert torch.equal(number.scenes.src_pos, tensor.scenes.src_pos)
    with pytest.raises(ValueError, match=r"^noise_share \* mixture.noise_probability must be in \[0, 1\], got 3.0"):
        run.simulator.draw(2, 100, generator=torch.Generator(), noise_share=3.0)


@pytest.mark.parametrize("optimizer, then, now", [("adam", False, True), ("adamw", True, False), ("muon", True, False),
                                                  ("muon", False, True), ("muon", True, True)])
def test_checkpoints_of_either_kind_load_in_either(optimizer, then, now):
    cfg = config(optimizer=optimizer)
    runs = [run_of(cfg) for _ in range(2)]
    for run, captured in zip(runs, (then, now)):
        if captured:
            rate = rate_on_device(run.optimizer, CPU).fill_(RATE)
    train.gradients(runs[0], runs[0].localizer, train.draw_batch(runs[0], 0))
    train.update(runs[0])
    restore_optimizer(runs[1].optimizer, deepcopy(runs[0].optimizer.state_dict()))
    runs[1].localizer.load_state_dict(runs[0].localizer.state_dict())
    for group in runs[1].optimizer.param_groups:
        assert not now or group["lr"] is rate                           # the very tensor that a graph reads
        assert isinstance(group["lr"], torch.Tensor) == now and group.get("capturable", now) == now
    for run in runs:
        train.gradients(run, run.localizer, train.draw_batch(run, 1))
        train.update(run)
    assert_close(runs[1].localizer.state_dict(), runs[0].localizer.state_dict(), rtol=0, atol=0)


def test_graph_is_for_a_gpu_that_nothing_waits_for(monkeypatch):
    speech = training_speech(config(), CPU)
    there = replace(speech, samples=torch.empty(0, dtype=torch.int16))
    object.__setattr__(there, "samples", type("Samples", (), {"device": GPU, "nbytes": 0}))
    assert not uses_graph(config(), CPU, speech) and uses_graph(config(), GPU, there)
    assert uses_graph(config(graph=True), GPU, there) and not uses_graph(config(graph=False), GPU, there)
    exact = replace(config(), rir=replace(config().rir, ism_share=0.5))
    alone = replace(config(), rir=replace(config().rir, hybrid_share=0.0, method=run_setup.Method.ISM))
    assert not any(uses_graph(*case) for case in ((exact, GPU, there), (alone, GPU, there), (config(), GPU, speech)))
    for cfg, device, bank, words in (
            (config(), CPU, speech, "on a cpu"),
            (exact, GPU, there, r"where rooms are exact, which wait for the device \(rir.method=fra, "
                                r"rir.ism_share=0.5\)"),
            (config(), GPU, speech, "where the speech, 0.0 GB, did not fit on the device")):
        cfg = replace(cfg, train=replace(cfg.train, graph=True))
        with pytest.raises(ValueError, match=f"^train.graph must be false or null {words}, got true$"):
            uses_graph(cfg, device, bank)


def test_user_who_asks_for_a_graph_on_a_cpu_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("train: {steps: 1, device: cpu, graph: true}\n")
    assert train.main(["tiny.yaml", "train.out=run", "speech.voices_speakers=4", "eval.num_clips=4"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: train.graph must be false or null on a cpu, got true"
    assert not (tmp_path / "run").exists()


def test_loop_with_captured_steps_writes_what_it_knows(tmp_path, monkeypatch, capsys):
    """On a CPU, where the calls of runtime.Graphed are plain. No share of simulation; checkpoints go on without."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "eval": {"num_clips": 4}}))
    common = ("tiny.yaml", "train.log_every=1", "train.evaluations=1", "train.noise_warmup=0")
    assert train.main([*common, "train.out=plain", "train.steps=4"]) == 0
    monkeypatch.setattr(run_setup, "uses_graph", lambda *_: True)
    assert train.main([*common, "train.out=captured", "train.steps=3"]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert train.main([*common, "train.out=captured", "train.steps=4", "--resume"]) == 0
    plain, captured = ([line for line in map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
                        if "loss" in line] for name in ("plain", "captured"))
    assert [line["loss"] for line in captured] == [line["loss"] for line in plain]
    assert [line["lr"] for line in captured] == [RATE] * 4
    assert ["simulate_share" in line for line in captured] == [False] * 3 + [True]
