"""Checkpoints: a run goes on from one as if it had never stopped, and a failure never costs the last good file."""
import json
import os
import pickle
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssl_gpu import checkpoint as module
from ssl_gpu.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_json, write_text
from ssl_gpu.rng import Split
from ssl_gpu.runtime import versions


def small_run(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train_step(model, optimizer, step):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def save(path, **changed):
    model, optimizer = small_run()
    save_checkpoint(path, **{"model": model, "optimizer": optimizer, "ema": None, "step": 0, "config": {}} | changed)


def test_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    model, optimizer = small_run()
    for step in range(4):
        if step == 2:
            save_checkpoint(tmp_path / "last.pt", model=model, optimizer=optimizer, ema=None, step=step, config={})
        train_step(model, optimizer, step)
    resumed, resumed_optimizer = small_run(seed=1)
    loaded = load_checkpoint(tmp_path / "last.pt")
    resumed.load_state_dict(loaded.model)
    resumed_optimizer.load_state_dict(loaded.optimizer)
    for step in range(loaded.step, 4):
        train_step(resumed, resumed_optimizer, step)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_everything_comes_back(tmp_path):
    model, optimizer = small_run()
    ema = torch.optim.swa_utils.AveragedModel(model)
    config = {"scene": {"rt60_s": [0.1, 0.7], "bank": None}, "seed": 3}
    extra = {"best": {"mae_deg": 3.5}, "curve": torch.arange(3), "seen": (1, "a", True)}
    save_checkpoint(tmp_path / "a.pt", model=model, optimizer=optimizer, ema=ema, step=7, config=config, extra=extra)
    loaded = load_checkpoint(tmp_path / "a.pt", map_location="cpu")
    assert (loaded.step, loaded.config, loaded.versions) == (7, config, versions())
    assert torch.equal(loaded.extra.pop("curve"), torch.arange(3))
    assert loaded.extra == {"best": {"mae_deg": 3.5}, "seen": (1, "a", True)}
    assert loaded.ema.keys() == ema.state_dict().keys()
    assert loaded.optimizer["param_groups"] == optimizer.state_dict()["param_groups"]


def test_run_without_optimizer_and_ema_has_none(tmp_path):
    save(tmp_path / "a.pt", optimizer=None)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.optimizer is None and loaded.ema is None and loaded.extra == {}


def test_tensors_land_on_the_device_asked_for(tmp_path):
    save(tmp_path / "a.pt")
    devices = {value.device.type for value in load_checkpoint(tmp_path / "a.pt", map_location="meta").model.values()}
    assert devices == {"meta"}


@pytest.mark.parametrize("failure, raised", [
    (KeyboardInterrupt(), KeyboardInterrupt),
    (OSError(28, "No space left on device"), CheckpointError),
    (RuntimeError("write failed\nlong C++ trace"), CheckpointError),
])
def test_failure_in_the_middle_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch, failure, raised):
    path = tmp_path / "last.pt"
    save(path, step=1)
    before = path.read_bytes()

    def half_a_save(content, file):
        file.write(b"half")
        file.flush()
        assert len(list(tmp_path.iterdir())) == 2  # the temporary file is in the same folder
        raise failure

    monkeypatch.setattr(module.torch, "save", half_a_save)
    with pytest.raises(raised) as error:
        save(path, step=2)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]
    assert raised is KeyboardInterrupt or (str(error.value).startswith(f"cannot write {path}: ")
                                           and "\n" not in str(error.value))


def test_failed_rename_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "config.yaml", "seed: 1\n")
    assert list(tmp_path.iterdir()) == []


def test_content_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        calls.append("fsync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else
                     f"fsync {os.fstat(descriptor).st_size} bytes")
        fsync(descriptor)

    def recorded_replace(source, target):
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(module.os, "fsync", recorded_fsync)
    monkeypatch.setattr(module.os, "replace", recorded_replace)
    write_text(tmp_path / "a.txt", "12345")
    assert calls == ["fsync 5 bytes", "replace", "fsync folder"]


def test_written_files_have_the_usual_permissions(tmp_path):
    umask = os.umask(0)
    os.umask(umask)
    write_text(tmp_path / "a.txt", "x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o666 & ~umask


def write_newer(path):
    torch.save({"kind": module.KIND, "format": module.FORMAT + 1}, path)


def write_truncated(path):
    save(path)
    path.write_bytes(path.read_bytes()[:-200])


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("write, message", [
    (lambda path: None, "cannot read checkpoint {path}: No such file or directory"),
    (Path.mkdir, "cannot read checkpoint {path}: Is a directory"),
    (Path.touch, "{path} is empty"),
    (write_truncated, "{path} is cut short"),
    (lambda path: path.write_text("hello"), "{path} is no file that torch.save wrote, as checkpoint.pt of a run is"),
    (lambda path: path.write_bytes(pickle.dumps(Payload())),
     "{path} is no file that torch.save wrote, as checkpoint.pt of a run is"),
    (lambda path: torch.save({"model": Payload()}, path),
     "{path} is no checkpoint: it holds more than plain values and tensors"),
    (lambda path: torch.save(small_run()[0].state_dict(), path),
     "{path} is no checkpoint of ssl_gpu, though torch can read it"),
    (lambda path: torch.save(torch.zeros(3), path), "{path} is no checkpoint of ssl_gpu, though torch can read it"),
    (write_newer, "{path} is of checkpoint format 2; ssl_gpu {version} reads formats up to 1: install a newer ssl_gpu"),
], ids=["missing", "folder", "empty", "truncated", "text", "pickle", "object", "state dict", "tensor", "newer"])
def test_unusable_file_is_refused_in_one_line(tmp_path, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    write(path)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(error.value) == message.format(path=path, version=versions()["ssl_gpu"])
    assert not Path("executed").exists()


def test_archive_of_something_else_is_refused_in_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("folder/readme.txt", "not from torch")
    with pytest.raises(CheckpointError, match=r"^.*a\.zip cannot be read as a checkpoint: [^\n]{5,160}$"):
        load_checkpoint(tmp_path / "a.zip")


@pytest.mark.parametrize("changed, message", [
    ({"extra": {"mae": np.float64(1)}}, "extra['mae'] must be a number, text, None, list, mapping or tensor, got "
                                        "numpy.float64"),
    ({"config": {"a": [1, Split.TEST]}}, "config['a'][1] must be a number, text, None, list, mapping or tensor, got "
                                         "ssl_gpu.rng.Split"),
    ({"step": np.int64(3)}, "step must be a number, text, None, list, mapping or tensor, got numpy.int64"),
])
def test_what_could_not_be_read_again_is_not_written(tmp_path, changed, message):
    with pytest.raises(CheckpointError) as error:
        save(tmp_path / "a.pt", **changed)
    assert str(error.value) == f"cannot write {tmp_path / 'a.pt'}: {message}"
    assert list(tmp_path.iterdir()) == []


def test_saving_into_a_missing_folder_is_refused_in_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"^cannot write .*none/a\.pt: No such file or directory$"):
        save(tmp_path / "none" / "a.pt")


def test_json_is_readable_and_ends_its_line(tmp_path):
    write_json(tmp_path / "a.json", {"mae_deg": [3.5, None], "name": "ä"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"mae_deg": [3.5, None], "name": "ä"}
    assert (tmp_path / "a.json").read_text().endswith("}\n")


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert (tmp_path / "a.json").read_text() == "1\n" and len(list(tmp_path.iterdir())) == 1
