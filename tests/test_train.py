"""The training run as a user starts it: files, numbers, resumption, and one line for every mistake."""
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml

from ssl_gpu import evaluate as evaluate_cli
from ssl_gpu import report
from ssl_gpu import run as run_setup
from ssl_gpu import train as train_cli
from ssl_gpu.checkpoint import load_checkpoint
from ssl_gpu.config import RunConfig, from_mapping, load_config, to_mapping
from ssl_gpu.evaluate import eval_speech, prepare_eval
from ssl_gpu.lanes import ThreadTuner
from ssl_gpu.localizer import Localizer
from ssl_gpu.pretrained import build_localizer, export, read_weights
from ssl_gpu.report import announced
from ssl_gpu.scene import Pool, SceneConfig, original_scenes
from ssl_gpu.simulator import Simulator, SimulatorConfig
from ssl_gpu.speech import SpeechConfig, SpeechError
from ssl_gpu.trainlog import Log

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
TINY = """
speech: {clip_s: 1.0, voices_speakers: 6, voices_utterances: 2, voices_duration_s: 1.2}
rir: {num_images: [64, 128]}
model: {channels: 4, dim: 16, depth: 1, heads: 2}
features: {num_bands: 4, num_delays: 17}
train: {steps: 4, batch_size: 4, log_every: 1, evaluations: 2, device: cpu}
eval: {num_clips: 16}
"""
KEYS = {"azimuth_class_mae_deg", "azimuth_mae_deg", "cone_mae_deg", "acc_at_5", "acc_at_10"}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A configuration of seconds, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path


def start(*arguments):
    return train_cli.main(["tiny.yaml", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished tiny run, for reading only."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY)
    assert train_cli.main([str(folder / "tiny.yaml"), f"train.out={folder / 'run'}"]) == 0
    return folder / "run"


def test_run_folder_holds_what_it_promises(finished):
    assert {"config.yaml", "metrics.jsonl", "checkpoint.pt", "result.json"} <= {p.name for p in finished.iterdir()}
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/acc_at_5" in line] == [2, 4]
    assert all(0 < line["simulate_share"] < 1 and line["examples_per_s"] > 0 for line in lines if "loss" in line)
    assert all(line["invalid_scenes"] == 0 for line in lines if "loss" in line)


def test_result_has_every_key_for_model_baseline_and_chance(finished):
    result = json.loads((finished / "result.json").read_text())
    for metrics in (result, result["baseline"], result["chance"]):
        assert KEYS <= set(metrics)
        for key in KEYS:
            values = metrics[key] if key.endswith("deg") else [metrics[key]]
            assert len(values) == (2 if key.endswith("deg") else 1)
            assert all(math.isfinite(value) and value >= 0 for value in values)
        assert 0 <= metrics["acc_at_5"] <= metrics["acc_at_10"] <= 1
    assert result["baseline"]["cone_mae_deg"] != result["cone_mae_deg"] != result["chance"]["cone_mae_deg"]
    assert result["steps"] == 4 and result["examples"] == 16 and result["target"] == "cone"
    assert result["command"] == "python -m ssl_gpu.train tiny.yaml train.out=run"


def test_saved_config_repeats_the_run(finished):
    cfg = load_config(RunConfig, finished / "config.yaml")
    assert cfg.train.steps == 4 and cfg.features.num_delays == 17
    assert load_checkpoint(finished / "checkpoint.pt").config == yaml.safe_load((finished / "config.yaml").read_text())


def test_evaluate_repeats_the_numbers(finished, tmp_path, capsys):
    capsys.readouterr()
    assert evaluate_cli.main([str(finished / "checkpoint.pt"), "--json", str(tmp_path / "again.json")]) == 0
    again, result = (json.loads(p.read_text()) for p in (tmp_path / "again.json", finished / "result.json"))
    assert {key: again[key] for key in KEYS} == {key: result[key] for key in KEYS}
    assert again["baseline"] == result["baseline"] and again["eval_digest"] == result["eval_digest"]
    table = capsys.readouterr().out
    low, high = result["azimuth_class_mae_deg"]
    assert f"{low:.2f} / {high:.2f}" in table and "GCC-PHAT" in table and "chance" in table


def test_evaluate_takes_overrides(finished):
    assert evaluate_cli.evaluate(str(finished / "checkpoint.pt"), ["eval.num_clips=5"])["num_clips"] == 5


def test_run_is_reproducible_and_seed_matters(tiny):
    losses = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert start(f"train.out={name}", f"train.seed={seed}", "train.steps=2") == 0
        lines = (tiny / name / "metrics.jsonl").read_text().splitlines()
        losses[name] = [json.loads(line)["loss"] for line in lines if "loss" in line]
    assert losses["a"] == losses["b"] != losses["c"]


def test_resume_goes_on_where_it_stopped(tiny):
    """Six steps at once equal three and three, by Muon and AdamW: weights, averages, optimisers and draws all continue.
    (By AdamW alone, through an interruption: tests/test_interruptions.py.)"""
    common = ("train.warmup=0", "train.lr_end=1", "train.evaluations=1", "target.angle=azimuth", "train.optimizer=muon",
              "model.dim=64", "features.num_bands=4", "features.gate_bands=5")
    assert start("train.out=whole", "train.steps=6", *common) == 0
    assert start("train.out=half", "train.steps=3", *common) == 0
    assert start("train.out=half", "train.steps=6", *common, "--resume") == 0
    whole, half = (load_checkpoint(tiny / name / "checkpoint.pt") for name in ("whole", "half"))
    assert half.step == 6
    for part in ("model", "ema"):
        for key, value in getattr(whole, part).items():
            torch.testing.assert_close(getattr(half, part)[key], value, rtol=0, atol=1e-6)


POOL = ("scene.pool=original", "scene.bank=3", "rir.num_images=[1024, 4096]", "eval.num_clips=4")


def test_run_in_the_original_rooms_resumes_like_any_other_and_says_that_it_leaks(tiny, capsys):
    common = (*POOL, "train.warmup=0", "train.lr_end=1", "train.evaluations=1", "target.angle=azimuth")
    assert start("train.out=whole", "train.steps=4", *common) == 0
    assert start("train.out=half", "train.steps=2", *common) == 0
    assert start("train.out=half", "train.steps=4", *common, "--resume") == 0
    error = capsys.readouterr().err
    warning = "warning: scene.pool=original trains in 3 of the 200 rooms of e0: results on e0 will be leaked\n"
    assert error.count(warning) == 3
    whole, half = (load_checkpoint(tiny / name / "checkpoint.pt") for name in ("whole", "half"))
    assert half.step == 4 and half.config["scene"]["pool"] == "original" and half.config["scene"]["bank"] == 3
    for key, value in whole.model.items():
        torch.testing.assert_close(half.model[key], value, rtol=0, atol=1e-6)
    cfg = load_config(RunConfig, tiny / "half" / "config.yaml")
    eval_set, _ = prepare_eval(cfg, torch.device("cpu"), eval_speech(cfg))
    known = set(original_scenes().rt60.tolist())
    assert not set(eval_set.mixture.scenes.rt60.tolist()) & known  # its own evaluation set is clean


@pytest.mark.parametrize("change", [("scene.pool=law",), ("scene.bank=2",), ("scene.pool=law", "scene.bank=null")])
def test_a_resumption_cannot_hide_the_rooms_that_were_trained_in(change, tiny, capsys):
    assert start("train.out=run", "train.steps=1", *POOL) == 0
    assert start("train.out=run", "train.steps=2", *POOL, *change, "--resume") == 2
    left = 2 if change == ("scene.bank=2",) else 0
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: the checkpoint in run does not fit its configuration and the overrides: scene.pool and scene.bank must "
        f"keep the 3 rooms of e0 that it was trained in, got {left} of them")
    assert start("train.out=run", "train.steps=2", "scene.bank=4", "--resume") == 0


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]


def test_a_run_from_the_weights_of_another_hears_other_rooms_and_counts_on(tiny, capsys):
    """Its first step is the third of a run that goes on: same weights, and not the draws of the first again."""
    plain = ("train.warmup=0", "train.lr_end=1", "train.ema=null")
    assert start("train.out=whole", "train.steps=4", *plain) == 0
    assert start("train.out=first", "train.steps=2", *plain) == 0
    more = ("train.init=first", "train.steps=3", *plain)
    assert start("train.out=second", *more) == 0
    assert losses(tiny / "second")[0] == pytest.approx(losses(tiny / "whole")[2], abs=1e-5)
    checkpoint = load_checkpoint(tiny / "second" / "checkpoint.pt")
    assert checkpoint.step == 5 and len(losses(tiny / "second")) == 3
    assert start("train.out=second", "train.steps=4", "train.batch_size=3", "--resume") == 0  # of its own steps
    result = json.loads((tiny / "second" / "result.json").read_text())
    assert (result["steps"], result["examples"]) == (6, 5 * 4 + 3) and len(losses(tiny / "second")) == 4
    assert (result["steps_before"], result["examples_before"]) == (2, 8)
    assert "\n4 steps, 15 examples in " in capsys.readouterr().out
    assert read_weights(tiny / "second").examples == 23
    export(tiny / "second", tiny / "small")
    assert read_weights(tiny / "small").examples == 23
    assert start("train.out=third", "train.steps=1", "train.init=small") == 0
    assert load_checkpoint(tiny / "third" / "checkpoint.pt").step == 7


def test_a_run_from_the_packaged_weights(tiny, monkeypatch):
    assert start("train.out=run", "train.steps=1") == 0
    monkeypatch.setattr(run_setup, "packaged", lambda: tiny / "run")
    assert start("train.out=more", "train.steps=1", "train.init=packaged", "scene.mic_spacing_m=0.08") == 0
    assert load_checkpoint(tiny / "more" / "checkpoint.pt").step == 2


def test_weights_of_another_meaning_are_told_and_cannot_be_claimed_later(tiny, capsys):
    assert start("train.out=run", "train.steps=1") == 0
    assert start("train.out=same", "train.steps=1", "train.init=run", "scene.mic_spacing_m=0.05") == 0
    assert "warning" not in capsys.readouterr().err
    assert start("train.out=other", "train.steps=1", "train.init=run", "target.angle=azimuth", "features.hop=128") == 0
    assert (f"warning: the weights of train.init={tiny / 'run'} were trained for another target.angle, features.hop\n"
            in capsys.readouterr().err)
    (tiny / "run").rename(tiny / "moved")
    assert start("train.out=same", "train.steps=2", "--resume") == 0    # it has what it needs
    config = load_checkpoint(tiny / "same" / "checkpoint.pt").config
    assert config["train"]["init"] == str(tiny / "run")
    assert start("train.out=same", "train.steps=3", "train.init=moved", "--resume") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: train.init must stay that of the run that --resume goes on with, {tiny / 'run'}, got moved")
    assert start("train.out=same", "train.steps=3", "train.init=run", "--resume") == 0    # the same command, longer
    (tiny / "run").symlink_to(tiny / "moved")
    assert start("train.out=same", "train.steps=4", "--resume") == 0
    assert load_checkpoint(tiny / "same" / "checkpoint.pt").config["train"]["init"] == str(tiny / "run")


def test_resumed_run_keeps_the_precision_that_it_began_with(tiny, monkeypatch, capsys):
    """Which auto finds by trying: not again, though it is asked for on another kind of device."""
    tried = []
    monkeypatch.setattr(train_cli.runtime, "has_bfloat16", lambda device: tried.append(device) or True)
    assert start("train.out=run", "train.steps=1") == 0
    assert " in bfloat16; 6 synthetic talkers" in capsys.readouterr().out
    monkeypatch.setattr(train_cli.runtime, "has_bfloat16", lambda device: tried.append(device) or False)
    assert start("train.out=run", "train.steps=2", "--resume") == 0 and len(tried) == 1
    assert json.loads((tiny / "run" / "result.json").read_text())["precision"] == "bfloat16"
    assert start("train.out=run", "train.steps=3", "train.precision=float32", "--resume") == 0 and len(tried) == 1
    assert " in float32; 6 synthetic talkers" in capsys.readouterr().out
    cfg = from_mapping(RunConfig, {"train": {"steps": 1}}).train
    saved = load_checkpoint(tiny / "run" / "checkpoint.pt")
    assert not run_setup.uses_bfloat16(cfg, torch.device("cuda", 0), saved) and len(tried) == 2


@pytest.mark.parametrize("change, rule", [
    (["model.dim=8"], "error: train.init={run} does not fit the configuration: model.dim=8 (was 16)"),
    (["model.dim=8", "features.hop=128", "features.band_hz=[100, 4000]"],
     "error: train.init={run} does not fit the configuration: model.dim=8 (was 16)"),
    (["train.init=nowhere"], "error: train.init: weights must be a run, its checkpoint.pt or "
     "a folder of ssl_gpu.pretrained, got {run.parent}/nowhere: there is nothing of that name"),
    (["scene.pool=law", "scene.bank=null"], "error: scene.pool and scene.bank must keep the 3 rooms of e0"),
])
def test_weights_that_cannot_be_started_from_are_one_line(change, rule, tiny, capsys):
    assert start("train.out=run", "train.steps=1", *POOL) == 0
    capsys.readouterr()
    assert start("train.out=more", "train.steps=1", *POOL, "train.init=run", *change) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(rule.format(run=tiny / "run"))
    assert not (tiny / "more").exists()


def test_a_gate_may_be_added_to_weights_without_one(tiny, capsys):
    """The rest goes on from theirs; to weights of a gate it has to stay, and keep its bands."""
    common = ("train.warmup=0", "train.evaluations=1", "features.num_bands=4")
    assert start("train.out=plain", "train.steps=1", *common) == 0
    capsys.readouterr()
    assert start("train.out=gated", "train.steps=1", *common, "train.init=plain", "features.gate_bands=5",
                 "train.lr=1e-9") == 0
    said = capsys.readouterr()
    assert "warning" not in said.err
    assert (f"the network gets a gate, features.gate_bands=5, which the weights of train.init={tiny / 'plain'} lack\n"
            in said.out)
    plain, gated = (load_checkpoint(tiny / name / "checkpoint.pt") for name in ("plain", "gated"))
    for key, value in plain.ema.items():
        torch.testing.assert_close(gated.model[key], value, rtol=0, atol=1e-6)
    assert len(gated.model) == len(plain.model) + 6
    for bands in (0, 6):
        assert start("train.out=another", "train.steps=1", *common, "train.init=gated",
                     f"features.gate_bands={bands}") == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: train.init={tiny / 'gated'} does not fit the configuration: features.gate_bands={bands} (was 5)")
    # Nor does a gate that is missing hide behind what does not fit, or is said to be there before that is found.
    assert start("train.out=another", "train.steps=1", *common, "train.init=plain", "features.gate_bands=5",
                 "model.dim=8", "features.mask_width=8") == 2
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == (f"error: train.init={tiny / 'plain'} does not fit the configuration: "
                                         "features.mask_width=8 (was 0), model.dim=8 (was 16)")
    assert "gate" not in said.out


def test_masks_may_not_be_added_to_weights_without_them(tiny, capsys):
    """Nor taken away, nor made wider, from a run or a resumed one: the maps behind them are others."""
    common = ("train.warmup=0", "train.evaluations=1", "features.num_bands=4")
    assert start("train.out=plain", "train.steps=1", *common) == 0
    assert start("train.out=masks", "train.steps=1", *common, "features.mask_width=8") == 0
    for begin, width, had in (("plain", 8, 0), ("masks", 0, 8), ("masks", 16, 8)):
        capsys.readouterr()
        assert start("train.out=another", "train.steps=1", *common, f"train.init={begin}",
                     f"features.mask_width={width}") == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: train.init={tiny / begin} does not fit the configuration: features.mask_width={width} (was {had})")
    capsys.readouterr()
    assert start("train.out=another", "train.steps=1", *common, "train.init=masks", "features.mask_width=8",
                 "features.band_hz=[100, 3000]", "rir.sample_rate=8000", "features.hop=128") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"error: train.init={tiny / 'masks'} does not fit the configuration: "
        "rir.sample_rate=8000 (was 16000), features.band_hz=[100.0, 3000.0] (was [100.0, 7900.0])")
    # Of masks of other layers that is told, too; where neither has masks their layers mean nothing.
    assert start("train.out=none", "train.steps=1", *common, "train.init=plain", "features.mask_layers=5") == 0
    for begin, more, told in (("masks", ["features.mask_width=8"], "features.mask_layers=5 (was 4)"),
                              ("plain", ["features.mask_width=0", "model.dim=8"], "model.dim=8 (was 16)")):
        capsys.readouterr()
        assert start("train.out=deeper", "train.steps=1", *common, f"train.init={begin}", "features.mask_layers=5",
                     *more) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"error: train.init={tiny / begin} does not fit the configuration: {told}")
    assert start("train.out=masks", "train.steps=2", "--resume") == 0


def test_the_loss_of_masks_is_told_beside_the_sum(tiny, monkeypatch):
    found, real = [], Localizer.training_losses
    monkeypatch.setattr(Localizer, "training_losses", lambda *args: found.append(real(*args)) or found[-1])
    for width in (8, 0):
        assert start("train.out=run", "train.steps=2", f"features.mask_width={width}") == 0
        lines = [json.loads(line) for line in (tiny / "run" / "metrics.jsonl").read_text().splitlines()]
        steps, losses = [line for line in lines if "loss" in line], [loss.tolist() for loss in found]
        assert [line["loss"] for line in steps] == pytest.approx([sum(values) for values in losses], rel=1e-6)
        assert [[line["mask_loss"]] if "mask_loss" in line else [] for line in steps] == [x[1:] for x in losses]
        assert all(len(values) == 1 + (width > 0) for values in losses)
        shutil.rmtree(tiny / "run")
        found.clear()


def test_an_evaluation_is_no_part_of_the_rate_that_tells_what_is_left(tmp_path):
    """A tenth of the run every 10 s, and 60 s of evaluation in between."""
    log, clock = Log(tmp_path), [0.0]
    log.bar._time, log.bar.start_t, log.bar.last_print_t = lambda: clock[0], 0.0, 0.0
    for step in range(1, 6):
        clock[0] += 10
        log.write({"step": step}, step / 10)
    clock[0] += 60
    log.skip(0.53)
    clock[0] += 10
    log.write({"step": 6}, 0.63)
    bar = str(log.bar)
    log.close()
    assert "02:00<00:37" in bar


def test_bar_is_seldom_written_to_a_file(tmp_path, capsys):
    """Twenty steps in no time: the first state, and the last when it is closed."""
    log = Log(tmp_path)
    for step in range(20):
        log.write({"step": step, "loss": 1.0}, step / 100)
        log.show(f"step {step}")
    log.close()
    states = [state for state in re.split(r"[\r\n]", capsys.readouterr().err) if state.strip()]
    assert len(states) <= 4 and "step 0" in " ".join(states[:-1]) and "19%" in states[-1] and "step 19" in states[-1]


@pytest.mark.parametrize("losses", [[1.0, math.nan], [math.nan, 1.0], [math.inf]])
def test_a_loss_that_is_not_finite_ends_the_run(losses):
    with pytest.raises(FloatingPointError, match="^the loss is (nan|inf) at step 3: lower train.lr"):
        train_cli.check_losses(torch.tensor(losses), 3)


def test_batches_made_ahead_are_the_same_and_resume(tiny):
    """One step ahead, as on a GPU: the weights of a run without, also where it stops and goes on."""
    common = ("train.warmup=0", "train.lr_end=1", "train.evaluations=1")
    assert start("train.out=plain", "train.steps=4", *common, "train.overlap=false") == 0
    assert start("train.out=ahead", "train.steps=2", *common, "train.overlap=true") == 0
    assert start("train.out=ahead", "train.steps=4", *common, "--resume") == 0
    plain, ahead = (load_checkpoint(tiny / name / "checkpoint.pt") for name in ("plain", "ahead"))
    assert (plain.config["train"]["overlap"], ahead.config["train"]["overlap"]) == (False, True)
    for key, value in plain.model.items():
        torch.testing.assert_close(ahead.model[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("width", [0, 8])
def test_lanes_train_the_same_weights(width, tiny, monkeypatch):
    """Two and three parts of a batch of four side by side, twice to the same bits. Adam makes a step of the rounding
    error of a gradient that is zero, so weights are compared as a whole with how far they have gone."""
    common = ("train.steps=4", "train.warmup=0", "mixture.diffuse_snr_db=[0, 10]", "train.precision=float32",
              f"features.mask_width={width}")
    dealt, in_lanes = [], train_cli.in_lanes
    monkeypatch.setattr(train_cli, "in_lanes", lambda *args: dealt.append(args[-1]) or in_lanes(*args))
    assert start("train.out=plain", *common) == 0 and not dealt
    plain = load_checkpoint(tiny / "plain" / "checkpoint.pt").model
    begin = build_localizer(load_config(RunConfig, tiny / "plain" / "config.yaml")).state_dict()
    moved = sum(float((plain[key] - begin[key]).square().sum()) for key in begin) ** 0.5
    for count in (2, 3):
        for name in ("lanes", "again"):
            assert start(f"train.out={name}{count}", f"train.lanes={count}", *common) == 0
        assert dealt == [count] * 8
        dealt.clear()
        again = load_checkpoint(tiny / f"again{count}" / "checkpoint.pt").model
        found = load_checkpoint(tiny / f"lanes{count}" / "checkpoint.pt").model
        assert all(torch.equal(found[key], again[key]) for key in found)
        assert 0.1 < moved and sum(float((found[k] - plain[k]).square().sum()) for k in plain) ** 0.5 < 0.05 * moved
        lines = [json.loads(line) for line in (tiny / f"lanes{count}" / "metrics.jsonl").read_text().splitlines()]
        assert all(0 < line["simulate_share"] < 1 for line in lines if "simulate_share" in line)


@pytest.mark.parametrize("overrides, rule", [
    (("train.lanes=5",), "train.lanes must be at most train.batch_size=4, got 5"),
    (("train.lanes=2", "model.kind=original"), "train.lanes must be 1 or null for a network with batch norm, which is "
                                               "of the whole batch, got 2")])
def test_lanes_that_cannot_be_are_one_line(overrides, rule, tiny, capsys):
    assert start("train.out=run", *overrides) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {rule}" and not (tiny / "run").exists()


def test_threads_are_those_of_before_when_a_run_is_over(tiny, monkeypatch):
    """Of four, of which two lanes have two each: the next run of the process has four again."""
    before, most = torch.get_num_threads(), []
    monkeypatch.setattr(train_cli, "ThreadTuner", lambda *args, most_lanes, **more: most.append(
        (torch.get_num_threads(), most_lanes)) or ThreadTuner(*args, most_lanes=most_lanes, **more))
    try:
        torch.set_num_threads(4)
        for name in ("first", "second"):
            assert start(f"train.out={name}", "train.steps=1", "train.lanes=2") == 0
            assert torch.get_num_threads() == 4
        assert most == [(4, 4), (4, 4)]                                 # as many lanes as a batch has clips, at most
    finally:
        torch.set_num_threads(before)


def test_kernels_that_cannot_be_had_are_told_before_speech_is_made(tiny, monkeypatch, capsys):
    def refuse(self, device):
        raise ValueError("simulator.fused must be false or null where Triton is not installed, got true")

    monkeypatch.setattr(SimulatorConfig, "fused_on", refuse)
    assert start("train.out=run") == 2
    assert tuple(capsys.readouterr()) == ("", "error: simulator.fused must be false or null where Triton is not "
                                              "installed, got true\n") and not (tiny / "run").exists()


def test_lanes_are_for_a_cpu():
    for lanes in (None, 1, 2):
        run_setup.check_lanes(lanes, torch.device("cpu"), torch.nn.Linear(1, 1))
    run_setup.check_lanes(1, torch.device("cuda", 0), torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="^train.lanes must be 1 or null on a cuda, got 2$"):
        run_setup.check_lanes(2, torch.device("cuda", 0), torch.nn.Linear(1, 1))


def test_noise_comes_with_the_warmup_whether_or_not_batches_are_made_ahead(tiny, monkeypatch):
    shares, draw = [], Simulator.draw
    monkeypatch.setattr(Simulator, "draw", lambda self, *args, noise_share=1.0, **kwargs: (
        shares.append(noise_share), draw(self, *args, noise_share=noise_share, **kwargs))[1])
    for name, overlap in (("plain", "false"), ("ahead", "true")):
        shares.clear()
        assert start(f"train.out={name}", "train.steps=4", f"train.overlap={overlap}", "train.noise_warmup=0.5",
                     "mixture.diffuse_snr_db=[0, 10]") == 0
        assert shares[1:5] == [0.0, 0.5, 1.0, 1.0]                      # the first draw is of the evaluation set
        assert len(shares) == (6 if name == "ahead" else 5)             # the batch of a step that does not come
    plain, ahead = (load_checkpoint(tiny / name / "checkpoint.pt") for name in ("plain", "ahead"))
    for key, value in plain.model.items():
        torch.testing.assert_close(ahead.model[key], value, rtol=0, atol=1e-6)


def test_resume_finds_the_newest_run(tiny):
    assert start("train.steps=2") == 0
    (run,) = (tiny / "runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", run.name)
    assert start("train.steps=3", "--resume") == 0
    assert load_checkpoint(run / "checkpoint.pt").step == 3


@pytest.mark.parametrize("content, left", [(None, ""), ("", ""), ("metrics.jsonl", " once it is empty")])
def test_a_folder_with_nothing_to_resume_says_how_to_start(content, left, tiny, capsys):
    """Also that of a run that was killed before its first checkpoint, which has begun a log."""
    if content is not None:
        (tiny / "run").mkdir()
    if content:
        (tiny / "run" / content).touch()
    assert start("train.out=run", "--resume") == 2
    assert capsys.readouterr().err == (
        "error: --resume found nothing to resume in train.out=run, which has no checkpoint.pt; the same command "
        f"without --resume starts anew{left}\n")


def test_resumed_run_keeps_its_configuration_and_takes_overrides(tiny):
    assert start("train.out=run", "train.steps=2", "train.seed=5", "scene.src_dist_m=[1, 2]") == 0
    assert start("train.out=run", "train.steps=3", "--resume") == 0
    cfg = load_config(RunConfig, tiny / "run" / "config.yaml")
    assert (cfg.train.seed, cfg.scene.src_dist_m, cfg.train.steps) == (5, (1.0, 2.0), 3)


def test_averages_can_begin_at_a_resumption(tiny):
    assert start("train.out=run", "train.steps=2", "train.ema=null") == 0
    assert start("train.out=run", "train.steps=3", "train.ema=0.9", "--resume") == 0


@pytest.mark.parametrize("before, change, told", [
    ((), "model.dim=8", "the checkpoint in run does not fit its configuration and the overrides: model.dim=8 (was 16)"),
    ((), "train.optimizer=adam",
     "train.optimizer must stay adamw, that of the run that --resume goes on with, got adam"),
    (("model.dim=64",), "train.optimizer=muon",
     "train.optimizer must stay adamw, that of the run that --resume goes on with, got muon")])
def test_what_does_not_fit_the_checkpoint_is_one_line(tiny, before, change, told, capsys):
    assert start("train.out=run", "train.steps=2", *before) == 0
    capsys.readouterr()
    assert start("train.out=run", "train.steps=3", *before, change, "--resume") == 2
    assert capsys.readouterr().err == f"error: {told}\n"


def test_resume_is_not_led_astray_by_a_longer_name(tiny):
    assert start("train.out=runs/tiny-big-20260101-000000", "train.steps=2") == 0
    assert start("train.steps=3", "--resume") == 2


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("by", ["steps", "max_minutes"])
def test_finished_run_is_left_as_it_is(by, tiny, capsys):
    """The same command with --resume says so and how to go on; without a result it evaluates, and that is all."""
    length = {"steps": ("train.steps=2",), "max_minutes": ("train.steps=null", "train.max_minutes=600")}[by]
    assert start("train.out=run", "train.steps=2") == 0
    if by == "max_minutes":
        checkpoint = torch.load(tiny / "run" / "checkpoint.pt", weights_only=True)
        checkpoint["extra"]["share"] = 1.0
        checkpoint["config"]["train"] |= {"steps": None, "max_minutes": 600.0}
        torch.save(checkpoint, tiny / "run" / "checkpoint.pt")
    before = contents(tiny / "run")
    capsys.readouterr()
    assert start("train.out=run", *length, "--resume") == 0
    more = {"steps": "train.steps > 2", "max_minutes": "train.max_minutes > 600"}[by]
    assert tuple(capsys.readouterr()) == (f"run is finished, after 2 steps; run/result.json stays as it is. Go on with "
                                          f"{more}, or begin a new run with train.init=run\n", "")
    assert contents(tiny / "run") == before
    assert start("train.out=run", *length, "target.offsets=2", "scene.spacing_jitter_m=0.01", "--resume") == 0
    assert ("run/result.json stays as it is (scene.spacing_jitter_m, target.offsets, given now, change nothing). Go on"
            in capsys.readouterr().out)
    (tiny / "run" / "result.json").unlink()
    assert start("train.out=run", *length, "--resume") == 0
    again, result = (json.loads(text) for text in ((tiny / "run" / "result.json").read_text(), before["result.json"]))
    assert again["cone_mae_deg"] == result["cone_mae_deg"]
    assert load_checkpoint(tiny / "run" / "checkpoint.pt").step == again["steps"] == 2


def test_a_run_that_reached_its_steps_before_its_minutes_takes_more_steps(tiny):
    assert start("train.out=run", "train.steps=2", "train.max_minutes=600") == 0
    assert start("train.out=run", "train.steps=3", "--resume") == 0
    assert load_checkpoint(tiny / "run" / "checkpoint.pt").step == 3
    lines = [json.loads(line) for line in (tiny / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3


def test_divergence_is_one_line(tiny, capsys):
    assert start("train.out=run", "train.lr=1e30", "train.warmup=0", "train.clip_norm=null", "train.steps=30") == 1
    error = capsys.readouterr().err
    assert "error: " in error and "lower train.lr" in error


def test_no_memory_for_the_preparation_is_one_line(tiny, monkeypatch, capsys):
    def refuse(*_):
        torch.empty(1 << 60)

    monkeypatch.setattr(train_cli, "prepare", refuse)
    assert start("train.out=run", "train.steps=1") == 1
    assert capsys.readouterr().err == (
        "error: out of memory before the first step; lower eval.num_clips, speech.clip_s or scene.bank\n")
    monkeypatch.setattr(train_cli, "prepare", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):                     # a mistake of ours keeps its traceback
        start("train.out=run", "train.steps=1")


def test_a_folder_that_cannot_be_made_is_one_line(tiny, monkeypatch, capsys):
    def refuse(run):
        raise FileNotFoundError(2, "No such file or directory", str(run.out))

    monkeypatch.setattr(train_cli, "claim_folder", refuse)
    assert start("train.out=run", "train.steps=1") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: train.out must be a folder that can be made, got run: No such file or directory")


def test_resuming_weights_that_diverged_is_one_line(tiny, capsys):
    assert start("train.out=run", "train.steps=1", "train.ema=null") == 0
    checkpoint = torch.load(tiny / "run" / "checkpoint.pt", weights_only=True)
    checkpoint["model"]["network.head.2.bias"][:] = float("nan")
    torch.save(checkpoint, tiny / "run" / "checkpoint.pt")
    assert start("train.out=run", "train.steps=null", "train.max_minutes=600", "--resume") == 2
    assert "error: the network's output is not finite" in capsys.readouterr().err


@pytest.mark.parametrize("change", [
    "target.angle=azimuth", "target.labels=hard", "target.decoding=argmax", "scene.bank=6", "scene.rotate=true",
    "mixture.diffuse_snr_db=[0, 20]", "mixture.sensor_snr_db=[0, 20]", "mixture.level_difference_db=[-6, 6]",
    "train.ema=null", "train.clip_norm=null", "train.optimizer=adam", "train.schedule=step", "scene.num_src=3",
    "speech.crop=first", "train.precision=bfloat16", "rir.src_pattern=cardioid", "scene.mic_spacing_m=0.08",
    "train.optimizer=muon model.dim=64 train.precision=bfloat16", "target.offsets=3"])
def test_every_kind_of_run_ends_with_finite_numbers(tiny, change):
    assert start("train.out=run", "train.steps=2", *re.split(r" (?=\w+\.)", change)) == 0
    result = json.loads((tiny / "run" / "result.json").read_text())
    assert KEYS <= set(result) and all(np.isfinite(np.ravel(result[key])).all() for key in KEYS)


@pytest.mark.alone
def test_budget_of_minutes_is_kept(tiny):
    """Wall-clock from the start of the process to result.json, imports included; the schedule reaches its end."""
    began = time.time()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "ssl_gpu.train", "tiny.yaml", "train.out=run", "train.steps=null",
                    "train.max_minutes=0.2"], check=True, capture_output=True, env=environment)
    written = (tiny / "run" / "result.json").stat().st_mtime
    assert written - began <= 0.2 * 60 + 2
    lines = [json.loads(line) for line in (tiny / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize("age_s, change, expected", [
    (100, (), r"took (1\.[6-9]|[2-9]\.)\d* of the 1\.00 min left in train.max_minutes, .* time for only 1 step$"),
    (100, ("train.steps=1",), None), (0, ("train.max_minutes=600", "train.steps=3"), None)])
def test_a_budget_eaten_by_preparation_is_told(age_s, change, expected, tiny, monkeypatch, capsys):
    """Of a process that is `age_s` old; not where train.steps ends the run anyway, nor in a budget with room."""
    began = time.time() - age_s
    monkeypatch.setattr(train_cli.runtime, "process_age_s", lambda: time.time() - began)
    assert start("train.out=run", "train.steps=null", "train.max_minutes=1", *change) == 0
    warnings = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("warning: ")]
    assert len(warnings) == (expected is not None)
    if expected is not None:
        assert re.search(expected, warnings[0]) and load_checkpoint(tiny / "run" / "checkpoint.pt").step == 1


@pytest.mark.parametrize("elapsed_s, before_s, change, expected", [
    (60, 0, {}, "preparation and the first step took 0.97 of the 2.00 min left in train.max_minutes, the end takes up "
                "to 0.13: there is time for about 26 steps"),           # 120 - 60 - 8 s, 3 of evaluation, and 2 done
    (360, 300, {"max_minutes": 7}, "preparation and the first step took 0.97 of the 2.00 min left in "
                                   "train.max_minutes, the end takes up to 0.13: there is time for about 26 steps"),
    (60, 0, {"steps": 26}, None), (60, 0, {"steps": 27}, "about 26 steps"),
    (60, 0, {"max_minutes": 2.5}, None),                                # 66 of 150 s: more than half is left
    (40, 0, {"max_minutes": 0.5}, "there is time for about 3 steps")])
def test_steps_that_there_is_time_for_are_counted(elapsed_s, before_s, change, expected, monkeypatch):
    """After two steps, of 2 s each."""
    monkeypatch.setattr(train_cli, "elapsed_s", lambda run: elapsed_s)
    train = replace(from_mapping(RunConfig, {"train": {"max_minutes": 2}}).train, **change)
    run = SimpleNamespace(cfg=SimpleNamespace(train=train), elapsed_s=before_s, eval_s=1.0, step_s=2.0, share=0.1,
                          step=12, first=10, localizer=torch.nn.Linear(1, 1))
    told = train_cli.short_of_time(run, train.evaluations, 2, elapsed_s - 2, 2.0)
    assert (told is None) if expected is None else told.endswith(expected)


@pytest.mark.parametrize("minutes, eval_s, count", [(None, 99.0, 4), (10, 15.0, 4), (10, 20.0, 4), (10, 20.1, 3),
                                                    (10, 45.0, 2), (10, 61.0, 1), (600, 45.0, 4)])
def test_evaluations_on_the_way_take_a_tenth_of_the_minutes_at_most(minutes, eval_s, count):
    train = SimpleNamespace(max_minutes=minutes, evaluations=4)
    assert train_cli.evaluations_in(SimpleNamespace(cfg=SimpleNamespace(train=train), eval_s=eval_s)) == count


def test_evaluations_that_there_is_no_time_for_are_left_out_and_told(tiny, monkeypatch, capsys):
    counts, short_of_time = [], train_cli.short_of_time
    monkeypatch.setattr(train_cli, "EVALUATING", 0.0)
    monkeypatch.setattr(train_cli, "short_of_time", lambda *args: counts.append(args[1]) or short_of_time(*args))
    assert start("train.out=run", "train.max_minutes=600") == 0 and counts == [1]
    lines = [json.loads(line) for line in (tiny / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/acc_at_5" in line] == [4]
    assert re.search(r"an evaluation takes \d+\.\d s: there will be 1 instead of train.evaluations=2, the last one at "
                     r"the end\n", capsys.readouterr().out)


@pytest.mark.parametrize("compile", [False, True])
def test_time_kept_for_the_end_is_not_that_of_a_compilation(compile, tiny, monkeypatch):
    """Which the first step contains, and no other: it was kept twice, and short runs ended after a step."""
    kept, progress = [], train_cli.progress
    monkeypatch.setattr(train_cli.runtime, "compiled", lambda network, enabled: network)
    monkeypatch.setattr(train_cli, "progress", lambda run, *args: kept.append(run.step_s) or progress(run, *args))
    assert start("train.out=run", "train.steps=2", "train.evaluations=1",
                 f"train.compile={str(compile).lower()}") == 0
    assert len(kept) == 3 + compile and kept[0] == 0 and (kept[1] == 0) == compile and kept[-1] > 0


@pytest.mark.parametrize("compile", [False, True])
def test_a_compilation_is_no_part_of_the_schedule(compile, tiny, monkeypatch):
    """Of 90 s the first step takes 40, all others 1: of a compilation the warm-up begins behind it."""
    clock, gradients = [0.0], train_cli.gradients
    monkeypatch.setattr(train_cli.runtime, "compiled", lambda network, enabled: network)
    monkeypatch.setattr(train_cli, "elapsed_s", lambda run: clock[0])
    monkeypatch.setattr(train_cli, "gradients", lambda *args: (
        clock.__setitem__(0, clock[0] + (1 if clock[0] else 40)), gradients(*args))[1])
    assert start("train.out=run", "train.steps=null", "train.max_minutes=1.5", "train.warmup=0.5",
                 f"train.compile={str(compile).lower()}") == 0
    lines = [json.loads(line) for line in (tiny / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert 40 < len(rates) < 60                                         # neither is longer than it may be
    assert (rates[1] < 0.1 * max(rates)) == compile and (rates[1] > 0.8 * max(rates)) == (not compile)


def test_what_takes_long_before_the_first_step_is_announced(tiny, monkeypatch):
    """Nothing else lies between the reading of the configuration and the progress bar, but for bars of their own."""
    told = []
    for module in (run_setup, evaluate_cli):
        monkeypatch.setattr(module, "announced", lambda what: told.append(what) or contextlib.nullcontext())
    assert start("train.out=run", "train.steps=1", "train.max_minutes=600", "scene.bank=5") == 0
    voices = "making synthetic voices, as speech.eval names no speech"
    evaluation = ["making the evaluation set of 16 clips", "GCC-PHAT on the evaluation set"]
    assert told == [voices, "making synthetic voices to train with, as speech.train names no speech", *evaluation,
                    "rendering a bank of 5 rooms", "a first evaluation, for the time it takes"]
    told.clear()
    evaluate_cli.evaluate("run")
    assert told == [voices, *evaluation, "the model on the evaluation set"]


def test_only_long_waits_are_announced(monkeypatch, capsys):
    with announced("this is quick"):
        pass
    with pytest.raises(KeyError), announced("this fails"):
        raise KeyError
    monkeypatch.setattr(report, "QUIET_S", 0.01)
    with announced("this takes long"):
        time.sleep(0.5)
    time.sleep(1.2)
    assert capsys.readouterr().err == "this takes long ...\n"


def test_interrupt_leaves_a_checkpoint_to_resume(tiny):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "ssl_gpu.train", "tiny.yaml", "train.out=run",
                                "train.steps=100000"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               env=environment, text=True)
    metrics = tiny / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    try:
        while time.time() < deadline and not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()                                                 # or it would train on, 100,000 steps
    assert process.returncode == 130
    assert "Traceback" not in stderr and "--resume" in stderr.splitlines()[-1]
    step = load_checkpoint(tiny / "run" / "checkpoint.pt").step
    assert step >= 1
    assert start("train.out=run", f"train.steps={step + 1}", "--resume") == 0


def test_invalid_scenes_are_reported_and_not_learned_from(tiny, monkeypatch):
    """Half of every batch breaks its law: the loss is that of the other half, and the number is in the log."""
    draw_batch = train_cli.draw_batch

    def spoiled(run, step):
        mixture = draw_batch(run, step)
        mixture.scenes.valid[:2] = False
        mixture.scenes.src_pos[:2] = float("nan")
        return mixture

    monkeypatch.setattr(train_cli, "draw_batch", spoiled)
    assert start("train.out=run") == 0
    lines = [json.loads(line) for line in (tiny / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["invalid_scenes"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def write_speech(folder, speakers=(0, 1, 2), seconds=1.5):
    for speaker in speakers:
        chapter = folder / str(speaker) / "1"
        chapter.mkdir(parents=True)
        soundfile.write(chapter / f"{speaker}-1-0001.wav", np.random.default_rng(speaker).normal(
            0, 0.1, int(seconds * 16000)), 16000)


def test_real_speech_folders_are_heard(tiny):
    write_speech(tiny / "a")
    write_speech(tiny / "b", (3, 4, 5))
    cache = f"speech.cache_dir={tiny / 'cache'}"
    assert start("train.out=run", "train.steps=1", "speech.train=a", "speech.eval=b", cache) == 0
    assert load_checkpoint(tiny / "run" / "checkpoint.pt").config["speech"]["eval"] == str(tiny / "b")


MISTAKES = {
    "missing folder": (["speech.train=nowhere", "speech.eval=alone"], "speech.train must be an existing folder"),
    "one folder only": (["speech.train=alone"], "speech.eval"),
    "empty folder": (["speech.train=empty", "speech.eval=alone"], "speech.train must hold audio"),
    "missing evaluation": (["speech.train=alone", "speech.eval=nowhere"], "speech.eval must be an existing folder"),
    "nothing readable": (["speech.train=broken", "speech.eval=broken"], "skipped all 2 files"),
    "one speaker": (["speech.train=alone", "speech.eval=alone"], "at least 2 speakers"),
    "small room": (["scene.room_min_m=[1, 1, 1]"], "scene.room_min_m"),
    "far sources": (["scene.src_dist_m=[4.9, 5.0]"], "scene.src_dist_m"),
    "no reverberation": (["scene.rt60_s=[0, 0.7]"], "scene.rt60_s"),
    "too little reverberation": (["scene.rt60_s=[0.01, 0.7]"], "340"),
    "one microphone": (["scene.num_mics=1"], "2 microphones"),
    "coincident": (["scene.src_dist_m=[0, 5]"], "scene.src_dist_m"),
    "unknown key": (["train.step=3"], "did you mean train.steps"),
    "unknown section": (["trian.steps=3"], "trian"),
    "wrong type": (["train.steps=many"], "train.steps"),
    "impossible": (["train.batch_size=0"], "train.batch_size"),
    "no override": (["train.steps"], "section.key=value"),
    "short clips": (["speech.clip_s=0.01"], "speech.clip_s"),
    "no such device": (["train.device=tpu"], "tpu"),
    "nothing to resume": (["--resume"], "--resume"),
    "original with three": (["model.kind=original", "scene.num_src=3"], "scene.num_src"),
    "pool without a bank": (["scene.pool=original"], "scene.bank must be in 1..3000 rooms"),
    "pool of another law": (["scene.pool=original", "scene.bank=3", "scene.rt60_s=[0.2, 0.7]"], "scene.rt60_s"),
    "pool by walls": (["scene.pool=original", "scene.bank=3", "rir.num_images=[1024, 4096]", "rir.hybrid_share=0.5"],
                      "rir.hybrid_share must be 0.0, got 0.5"),
    "pool with image counts": (["scene.pool=original", "scene.bank=3"], "rir.num_images must be (1024, 4096)"),
    "occupied folder": (["train.out=alone"], "train.out"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_costs_one_line_and_leaves_nothing(tiny, mistake, capsys):
    (tiny / "empty").mkdir()
    (tiny / "broken").mkdir()
    (tiny / "broken" / "a.wav").write_bytes(b"this is no audio")
    (tiny / "broken" / "b.flac").write_bytes(b"")
    write_speech(tiny / "alone", speakers=(0,))
    arguments, named = MISTAKES[mistake]
    before = sorted(p for p in tiny.rglob("*"))
    cache = [f"speech.cache_dir={tiny.parent / (tiny.name + '-cache')}"]
    assert start(*arguments, *cache) == 2
    stderr = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith("error: ")]
    assert len(stderr) == 1 and named in stderr[0]
    assert sorted(p for p in tiny.rglob("*")) == before


@pytest.mark.parametrize("given, other", [("train", "eval"), ("eval", "train")])
def test_speech_for_one_side_alone_is_refused_once_its_folder_is_known_to_be_there(given, other, tmp_path):
    with pytest.raises(SpeechError, match=f"^speech.{given} must be an existing folder, got '/nope'$"):
        run_setup.check_speech(SpeechConfig(**{given: "/nope"}))
    write_speech(tmp_path)
    with pytest.raises(SpeechError, match=f"^speech.{other} must be a folder too when the other one is, got null$"):
        run_setup.check_speech(SpeechConfig(**{given: str(tmp_path)}))


def test_a_missing_config_is_one_line(capsys):
    assert train_cli.main(["configs/nope.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read configuration configs/nope.yaml")


@pytest.mark.parametrize("path", ["nope.pt", "config.yaml"])
def test_evaluate_refuses_what_is_no_checkpoint(finished, path, capsys):
    assert evaluate_cli.main([str(finished / path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and path in error


@pytest.mark.parametrize("name", ["quickstart", "librispeech", "patches", "original"])
def test_shipped_configs_load(name):
    cfg = load_config(RunConfig, CONFIGS / f"{name}.yaml")
    assert cfg.train.batch_size >= 1 and cfg.scene.pool is Pool.LAW  # none trains in e0's rooms unless told to


def test_the_original_can_be_trained_in_its_own_rooms():
    """By one override of its configuration, which is written and read as it is."""
    cfg = load_config(RunConfig, CONFIGS / "original.yaml", ["scene.pool=original"])
    assert cfg.scene == SceneConfig(bank=3000, pool=Pool.ORIGINAL)
    assert from_mapping(RunConfig, to_mapping(cfg)) == cfg and to_mapping(cfg)["scene"]["pool"] == "original"


def test_default_model_is_small_and_the_original_is_the_originals():
    def parameters(name):
        cfg = load_config(RunConfig, CONFIGS / f"{name}.yaml")
        return sum(p.numel() for p in build_localizer(cfg).parameters())

    assert max(map(parameters, ("librispeech", "patches"))) <= 3_000_000
    assert parameters("original") == 57_102_224
