"""Weights that travel: an exported folder listens like its run, is small, and tells nothing of the machine."""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ssl_gpu import checkpoint, pretrained
from ssl_gpu.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from ssl_gpu.config import ConfigError, RunConfig, from_mapping, load_config, save_yaml, to_mapping
from ssl_gpu.evaluate import evaluate
from ssl_gpu.pretrained import (MAX_LOG_BYTES, build_localizer, export, load_localizer, load_pretrained, main, packed,
                                read_weights, thinned_log, training_record, without_places)
from ssl_gpu.simulator import SimulatorConfig

TINY = {"speech": {"clip_s": 0.5, "voices_speakers": 3, "voices_utterances": 1, "voices_duration_s": 0.6},
        "rir": {"num_images": [64, 128]}, "features": {"num_bands": 4, "num_delays": 17},
        "model": {"channels": 4, "dim": 16, "depth": 1, "heads": 2},
        "train": {"steps": 3, "device": "cpu"}, "eval": {"num_clips": 4}}
PLACES = {"speech": {**TINY["speech"], "train": "/home/me/speech/dev-clean/", "eval": "/home/me/speech/test-clean",
                     "cache_dir": "/home/me/.cache"},
          "train": {"steps": 3, "device": "cuda:1", "out": "/home/me/runs/a"}}


def log_line(step, **values):
    return json.dumps({"step": step, **values}) + "\n"


def make_run(folder, config=TINY, ema=True):
    """A finished run whose averaged weights differ from its last ones."""
    folder.mkdir()
    cfg = from_mapping(RunConfig, config)
    last, averaged = build_localizer(cfg), build_localizer(replace(cfg, train=replace(cfg.train, seed=1)))
    save_checkpoint(folder / "checkpoint.pt", model=last, optimizer=None, ema=averaged if ema else None, step=3,
                    config=to_mapping(cfg))
    save_yaml(folder / "config.yaml", cfg)
    (folder / "result.json").write_text(json.dumps({"steps": 3, "cone_mae_deg": [40.0, 41.0]}))
    lines = [log_line(1, loss=3.0), log_line(2, loss=2.0), log_line(3, loss=1.0), log_line(3, **{"eval/acc_at_5": 0.1})]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def exported(run):
    export(run, run.parent / "small")
    return run.parent / "small"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def logits_of(localizer):
    audio = torch.randn(2, 2, 8000, generator=torch.Generator().manual_seed(0))
    return localizer.eval()(audio).detach()


def test_export_holds_what_it_promises(run, exported):
    assert set(contents(exported)) == {"weights.safetensors", "config.yaml", "metrics.jsonl", "result.json"}
    assert json.loads((exported / "result.json").read_text()) == json.loads((run / "result.json").read_text())
    assert (exported / "metrics.jsonl").read_text() == (run / "metrics.jsonl").read_text()
    assert load_config(RunConfig, exported / "config.yaml") == load_config(RunConfig, run / "config.yaml",
                                                                           ["train.device=auto"])


@pytest.mark.parametrize("talkers", [["1272", "84"], [], None])
def test_talkers_of_the_training_travel_with_the_weights(talkers, tmp_path):
    """Of older checkpoints, and exports, that do not say: unknown, but for those of synthetic voices."""
    run, exported = make_run(tmp_path / "run", PLACES), tmp_path / "small"
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    content["extra"] = {} if talkers is None else {"talkers": talkers}
    torch.save(content, run / "checkpoint.pt")
    export(run, exported)
    assert read_weights(run).talkers == read_weights(exported).talkers == talkers
    with safetensors.safe_open(exported / "weights.safetensors", "pt") as file:
        about, state = json.loads(file.metadata()["ssl_gpu"]), {name: file.get_tensor(name) for name in file.keys()}
    del about["talkers"]
    safetensors.torch.save_file(state, exported / "weights.safetensors", {"ssl_gpu": json.dumps(about)})
    assert read_weights(exported).talkers is None
    assert read_weights(make_run(tmp_path / "voices")).talkers == []


def test_checkpoint_run_and_export_are_the_same_localizer(run, exported):
    """All three give the averaged weights, to the bit, for they are stored in float32 where that fits."""
    loaded = [load_pretrained(path) for path in (run / "checkpoint.pt", run, exported)]
    expected = load_checkpoint(run / "checkpoint.pt").ema
    for localizer, cfg, about in loaded:
        assert "3 steps" in about and cfg.model == loaded[0][1].model
        assert torch.equal(logits_of(localizer), logits_of(loaded[0][0]))
        assert all(torch.equal(value, expected[name]) for name, value in localizer.state_dict().items())
    assert not torch.equal(logits_of(loaded[0][0]), logits_of(build_localizer(loaded[0][1])))


def test_run_without_averages_gives_its_weights(tmp_path):
    run = make_run(tmp_path / "run", ema=False)
    expected = load_checkpoint(run / "checkpoint.pt").model
    assert all(torch.equal(value, expected[name]) for name, value in load_pretrained(run)[0].state_dict().items())


def test_overrides_change_the_configuration_of_an_export(exported):
    assert evaluate(str(exported), ["eval.num_clips=7"])["num_clips"] == 7


def test_an_export_may_be_read_otherwise_than_its_run(run, tmp_path):
    """By what is looked at in evaluation alone; weights are the same."""
    assert main([str(run), "target.offsets=2", "target.mirror=true", "--out", str(tmp_path / "read")]) == 0
    assert main([str(run), "--out", str(tmp_path / "plain")]) == 0
    read, plain = (contents(tmp_path / name) for name in ("read", "plain"))
    assert read["weights.safetensors"] == plain["weights.safetensors"]
    target = load_config(RunConfig, tmp_path / "read" / "config.yaml").target
    assert (target.offsets, target.mirror) == (2, True)
    with pytest.raises(ValueError, match="^an export may override target.decoding, target.mirror, target.offsets, got "
                                         "target.grid_deg=1$"):
        export(run, tmp_path / "other", overrides=["target.grid_deg=1"])
    assert not (tmp_path / "other").exists()


def test_evaluate_takes_an_export(run, exported):
    first, second = evaluate(str(run)), evaluate(str(exported))
    assert first == second and first["steps"] == 3 and first["num_clips"] == 4


def test_load_pretrained_listens_and_describes(exported):
    localizer, cfg, about = load_pretrained(exported)
    assert not localizer.training and cfg.model.dim == 16
    assert about == (f"{exported}: conformer model, 0.02 M parameters, 3 steps, for 2 talkers and microphones 10 cm "
                     f"apart")


def test_packaged_weights_are_the_default(exported, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGED", exported)
    localizer, _, about = load_pretrained()
    assert torch.equal(logits_of(localizer), logits_of(load_pretrained(exported)[0]))
    assert about.startswith("the packaged weights: ")


def test_package_without_weights_says_how_to_make_them(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "PACKAGED", tmp_path / "pretrained_weights")
    with pytest.raises(ValueError, match="without weights.*python -m ssl_gpu.pretrained RUN --out") as error:
        load_pretrained()
    assert "\n" not in str(error.value)


def test_packaged_weights_load_and_fit_where_there_are_any():
    if not pretrained.PACKAGED.exists():
        pytest.skip("no weights are packaged yet")
    localizer, cfg, _ = load_pretrained()
    sizes = {path.name: path.stat().st_size for path in pretrained.PACKAGED.iterdir()}
    assert sum(sizes.values()) <= 6_500_000 and sizes["weights.safetensors"] <= 6_000_000
    assert all(pretrained.OURS.fullmatch(name) for name in sizes)
    assert torch.isfinite(localizer(torch.randn(1, 2, round(cfg.speech.clip_s * cfg.rir.sample_rate)))).all()
    assert without_places(cfg) == cfg
    recipe = load_config(RunConfig, Path(__file__).parents[1] / "configs" / "patches.yaml")
    load_localizer(read_weights(pretrained.PACKAGED), recipe, "packaged", as_beginning=True)  # to go on with


# ---- what it tells ----


def test_export_tells_no_places(tmp_path):
    export(make_run(tmp_path / "run", TINY | PLACES), tmp_path / "small")
    cfg = load_config(RunConfig, tmp_path / "small" / "config.yaml")
    assert (cfg.speech.train, cfg.speech.eval, cfg.speech.cache_dir) == ("dev-clean", "test-clean", None)
    assert (cfg.train.out, cfg.train.device) == (None, "auto")
    for name, content in contents(tmp_path / "small").items():
        assert b"/home" not in content and str(tmp_path).encode() not in content, name


@pytest.mark.parametrize("folder, left", [(None, None), ("speech", "speech"), ("/", None), ("../a b/", "a b")])
def test_last_name_of_a_folder_is_left(folder, left):
    cfg = without_places(from_mapping(RunConfig, {"speech": {"train": folder, "eval": folder},
                                                  "train": {"steps": 1, "init": folder}}))
    assert (cfg.speech.train, cfg.speech.eval, cfg.train.init) == (left, left, left)


def test_export_has_no_choices_of_speed():
    """Which are of the machine that trained: another may have no Triton, and less memory."""
    cfg = from_mapping(RunConfig, {"simulator": {"chunk": 999, "compile": True, "fused": True}, "train": {"steps": 1}})
    assert without_places(cfg).simulator == SimulatorConfig()


def test_weights_are_known_by_their_digest(run):
    """Of names, shapes and values, whatever file they are in."""
    weights = read_weights(run)
    again = replace(weights, state=dict(reversed(weights.state.items())), step=weights.step + 1)
    assert weights.digest == read_weights(run / "checkpoint.pt").digest == again.digest
    name = next(name for name, values in weights.state.items() if values.ndim == 2)
    for other in (weights.state[name] + 1e-3, weights.state[name].T, weights.state[name].half()):
        assert replace(weights, state={**weights.state, name: other}).digest != weights.digest
    assert replace(weights, state={**weights.state, "x": weights.state[name]}).digest != weights.digest


def test_what_a_run_says_of_its_training_is_found_beside_its_weights(run):
    nothing = dict.fromkeys(("minutes", "precision", "steps_before", "examples_before"))
    told = {"minutes": 3.5, "precision": "float32", "steps_before": 0, "examples_before": 0}
    (run / "result.json").write_text(json.dumps(told | {"steps": 7}))
    assert training_record(run, 7) == training_record(run / "checkpoint.pt", 7) == told
    assert training_record(run, 8) == nothing                           # of another run, whose file lies there
    for text in ("[1]", "{"):
        (run / "result.json").write_text(text)
        assert training_record(run, 7) == nothing
    (run / "result.json").unlink()
    assert training_record(run, 7) == nothing


def test_evaluation_is_copied(run):
    (run.parent / "table.json").write_text('{"real": [1, 2]}')
    export(run, run.parent / "small", run.parent / "table.json")
    assert json.loads((run.parent / "small" / "evaluation.json").read_text()) == {"real": [1, 2]}


# ---- sizes ----


def test_float32_is_kept_where_it_fits_and_halved_where_not():
    small, large = torch.zeros(1000), torch.full((1_600_000,), 0.1)
    assert packed({"a": small})["a"].dtype == torch.float32
    stored = packed({"a": large, "count": torch.tensor(7)})
    assert stored["a"].dtype == torch.float16 and stored["count"].dtype == torch.int64
    assert len(safetensors.torch.save(stored)) < 6_000_000
    with pytest.raises(ValueError, match=r"must fit into 6 MB, got 8.0 MB in float16"):
        packed({"a": torch.zeros(4_000_000)})


@pytest.mark.parametrize("number, dtype", [(float("nan"), "float32"), (1e5, "float16")])
def test_weights_that_cannot_be_stored_are_refused(number, dtype):
    state = {"head": torch.tensor([number]), "rest": torch.zeros(1 if dtype == "float32" else 1_600_000)}
    with pytest.raises(ValueError, match=f"must be finite in {dtype}, head is not"):
        packed(state)


def test_half_precision_loads_into_float32(run, monkeypatch):
    monkeypatch.setattr(pretrained, "MAX_WEIGHTS_BYTES", 60_000)
    export(run, run.parent / "half")
    assert (run.parent / "half" / "weights.safetensors").stat().st_size < 60_000
    whole, half = load_pretrained(run)[0], load_pretrained(run.parent / "half")[0]
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32}
    for name, value in whole.state_dict().items():
        assert torch.equal(half.state_dict()[name], value.half().float()), name


def test_long_log_is_thinned_evenly():
    lines = [log_line(step, loss=1.0, lr=0.001, examples_per_s=80.0, elapsed_s=float(step))
             for step in range(10, 100_000, 10)]
    lines.insert(5000, log_line(50_000, **{"eval/acc_at_5": 0.5}))
    lines.append(log_line(99_990, **{"eval/acc_at_5": 0.9}))
    thinned = thinned_log("".join(lines))
    assert 0.5 * MAX_LOG_BYTES < len(thinned.encode()) <= MAX_LOG_BYTES
    rows = [json.loads(line) for line in thinned.splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps[-1] == 99_990 and len({b - a for a, b in zip(steps, steps[1:])}) == 1
    assert [row["step"] for row in rows if "loss" not in row] == [50_000, 99_990]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_log_of_many_evaluations_is_thinned_too():
    lines = [log_line(step, **{f"eval/{index}": 0.123456789 for index in range(20)}) for step in range(1000)]
    thinned = thinned_log("".join(lines))
    assert len(thinned.encode()) <= MAX_LOG_BYTES and json.loads(thinned.splitlines()[-1])["step"] == 999


def test_line_that_a_crash_cut_short_is_left_out():
    assert thinned_log(log_line(1, loss=1.0) + '{"step": 2, "lo' + "\n" + log_line(2, loss=0.5)) \
        == log_line(1, loss=1.0) + log_line(2, loss=0.5)


# ---- mistakes ----


def test_earlier_export_is_replaced_only_by_force(run, exported, capsys):
    before = contents(exported)
    assert main([str(run), "--out", str(exported)]) == 2
    assert "--force" in capsys.readouterr().err and contents(exported) == before
    (exported / "result.json").write_text("{}")
    assert main([str(run), "--out", str(exported), "--force"]) == 0
    assert contents(exported) == before
    assert sorted(path.name for path in exported.parent.iterdir()) == ["run", "small"]


def test_force_replaces_nothing_else(run, capsys):
    before = contents(run)
    assert main([str(run), "--out", str(run), "--force"]) == 2
    assert "holds checkpoint.pt" in capsys.readouterr().err and contents(run) == before


@pytest.mark.parametrize("function", ["save_yaml", "write_json"])
def test_failure_in_the_middle_leaves_nothing(run, monkeypatch, function, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrained, function, full)
    assert main([str(run), "--out", str(run.parent / "small")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_failed_replacement_keeps_the_earlier_export(run, exported, monkeypatch):
    before, rename = contents(exported), os.rename

    def fail_second(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "rename", fail_second)
    assert main([str(run), "--out", str(exported), "--force"]) == 2
    assert contents(exported) == before and len(list(exported.parent.iterdir())) == 2


BROKEN_RUNS = {
    "unfinished": (lambda run: (run / "result.json").unlink(), "finished run, it holds no result.json"),
    "no log": (lambda run: (run / "metrics.jsonl").unlink(), "cannot read"),
    "no checkpoint": (lambda run: (run / "checkpoint.pt").unlink(), "cannot read checkpoint"),
    "no json": (lambda run: (run / "result.json").write_text("{"), "must hold JSON"),
    "no utf-8": (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe"), "cannot read"),
    "no folder": (lambda run: run.rename(run.parent / "elsewhere"), "must be the folder of a finished run"),
}


@pytest.mark.parametrize("name", BROKEN_RUNS)
def test_unusable_run_is_one_line(run, name, capsys):
    damage, message = BROKEN_RUNS[name]
    damage(run)
    assert main([str(run), "--out", str(run.parent / "small")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (run.parent / "small").exists()


def test_command_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    """Of all files together, in MB of a million bytes."""
    def written(run, target, *_):
        folder = tmp_path / "small"
        folder.mkdir()
        (folder / "a").write_bytes(bytes(1_200_000))
        (folder / "b").write_bytes(bytes(34_000))

    monkeypatch.setattr(pretrained, "export", written)
    assert main(["run", "--out", str(tmp_path / "small")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'small'}: 1.23 MB\n"


def _rewrite(path, about=None, state=None):
    """The same file with other metadata or other tensors."""
    about = {"format": 1, "step": 3} if about is None else about
    state = safetensors.torch.load_file(path) if state is None else state
    safetensors.torch.save_file(state, path, {"ssl_gpu": json.dumps(about)})


def _add_key(path):
    """To the section train, as a newer ssl_gpu may have one."""
    path.write_text(path.read_text().replace("\ntrain:\n", "\ntrain:\n  foo: 1\n"))


BROKEN_EXPORTS = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), CheckpointError, "is cut short"),
    "foreign": (lambda path: path.write_bytes(b"not weights at all"), CheckpointError, "no safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), CheckpointError, "is cut short"),
    "of others": (lambda path: safetensors.torch.save_file({"a": torch.zeros(1)}, path), CheckpointError,
                  "holds no weights of ssl_gpu"),
    "of nobody": (lambda path: _rewrite(path, [1]), CheckpointError, "holds no weights of ssl_gpu"),
    "newer": (lambda path: _rewrite(path, {"format": 2, "step": 3}), CheckpointError, "is of format 2"),
    "a tensor missing": (lambda path: _rewrite(path, state={"network.fold.bias": torch.zeros(16)}), ValueError,
                         "does not fit the configuration"),
    "no config": (lambda path: path.with_name("config.yaml").unlink(), ConfigError, "cannot read configuration"),
    "another config": (lambda path: path.with_name("config.yaml").write_text("train: {steps: 1}"), ValueError,
                       "does not fit the configuration: size mismatch"),
    "a newer config": (lambda path: _add_key(path.with_name("config.yaml")), ConfigError,
                       "/config.yaml: unknown key train.foo, got 1; train has "),
}


@pytest.mark.parametrize("name", BROKEN_EXPORTS)
def test_unusable_export_is_one_line(exported, name):
    damage, kind, message = BROKEN_EXPORTS[name]
    damage(exported / "weights.safetensors")
    with pytest.raises(kind, match=message) as error:
        load_pretrained(exported)
    assert "\n" not in str(error.value) and str(exported) in str(error.value)


def test_unusable_configuration_of_a_checkpoint_names_it_and_an_override_does_not(run):
    with pytest.raises(ConfigError, match="^unknown key train.foo, got 1; train has "):
        evaluate(str(run), ["train.foo=1"])
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    content["config"]["train"]["foo"] = 1
    torch.save(content, run / "checkpoint.pt")
    for path in (run, run / "checkpoint.pt"):
        for read in (read_weights, load_pretrained, lambda path: evaluate(str(path), ["eval.num_clips=2"])):
            with pytest.raises(ConfigError) as error:
                read(path)
            assert str(error.value).startswith(f"{run / 'checkpoint.pt'}: unknown key train.foo, got 1; train has ")


def test_a_run_may_be_called_as_a_configuration_is(tmp_path):
    run = make_run(tmp_path / "run").rename(tmp_path / "run.yaml")
    assert read_weights(run).step == 3
    with pytest.raises(CheckpointError, match="run.yaml/config.yaml: that is a configuration$"):
        read_weights(run / "config.yaml")


def test_missing_checkpoint_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="^weights must be a run, .*nope: there is nothing of that name$"):
        load_pretrained(tmp_path / "nope")
