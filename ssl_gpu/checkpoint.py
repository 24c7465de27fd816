"""Files and folders that are whole or not there at all: checkpoints of a run, and the text and JSON beside them."""
from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ssl_gpu.runtime import versions

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

KIND = "ssl_gpu checkpoint"
FORMAT = 1  # raise it when an older ssl_gpu could no longer make sense of the file


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read; the message is one line and names the file."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on. It holds no random state: all draws follow from the step, see ssl_gpu.rng.

    model, optimizer, ema: state dicts, None where the run had none. step: steps done. config: the nested mapping of the
    run's configuration. versions: of ssl_gpu, torch, python and so on, when it was saved. extra: anything else, plain.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any] | None
    ema: dict[str, Any] | None
    step: int
    config: dict[str, Any]
    versions: dict[str, str]
    extra: dict[str, Any]


def save_checkpoint(path: str | Path, *, model: nn.Module, optimizer: Any | None,
                    ema: nn.Module | None, step: int, config: Mapping[str, Any],
                    extra: Mapping[str, Any] | None = None) -> None:
    """Writes a checkpoint to `path`, whose folder must exist; a failure leaves the old file, if any, as it was.

    model, optimizer and ema may be anything with a state_dict(). config and extra may hold numbers, text, None, lists,
    tuples, mappings and tensors: files are read with weights_only=True, which refuses anything else.

    Raises CheckpointError if something else is in there, or if the file cannot be written.
    """
    state = {name: None if owner is None else owner.state_dict()
             for name, owner in (("model", model), ("optimizer", optimizer), ("ema", ema))}
    state |= {"step": step, "config": dict(config), "versions": versions(), "extra": dict(extra or {})}
    for name, value in state.items():
        _check_plain(value, f"cannot write {path}: {name}")
    try:
        with replacing(path) as file:
            torch.save({"kind": KIND, "format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns some failures of the disk into RuntimeErrors
        raise CheckpointError(f"cannot write {path}: {_reason(error)}") from error


def load_checkpoint(path: str | Path, map_location: torch.device | str = "cpu") -> Checkpoint:
    """The checkpoint at `path`, its tensors on `map_location`.

    Raises CheckpointError if it is missing, damaged, not a checkpoint of ssl_gpu, or written by a newer ssl_gpu.
    """
    try:
        with open(path, "rb") as file:
            if not zipfile.is_zipfile(file):  # what torch.save writes; the end of the file is what makes it one
                file.seek(0)
                start = {b"": "empty", b"PK": "cut short"}
                raise CheckpointError(f"{path} is " + start.get(
                    file.read(2), "no file that torch.save wrote, as checkpoint.pt of a run is"))
            file.seek(0)
            content = torch.load(file, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {_reason(error)}") from error
    except UnpicklingError as error:  # torch's own text advises to load it unsafely
        raise CheckpointError(f"{path} is no checkpoint: it holds more than plain values and tensors") from error
    except Exception as error:  # a damaged file can make torch.load raise anything
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {_reason(error)}") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise CheckpointError(f"{path} is no checkpoint of ssl_gpu, though torch can read it")
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise CheckpointError(f"{path} is of checkpoint format {content['format']}; ssl_gpu {versions()['ssl_gpu']} "
                              f"reads formats up to {FORMAT}: install a newer ssl_gpu")
    kinds = {"format": int, "model": dict, "step": int, "config": dict, "versions": dict, "extra": dict}
    wrong = [name for name in (*kinds, "optimizer", "ema")
             if name not in content or not isinstance(content[name], kinds.get(name, object))]
    if wrong:
        raise CheckpointError(f"{path} is no usable checkpoint: it holds no {wrong[0]}")
    return Checkpoint(**{field.name: content[field.name] for field in fields(Checkpoint)})


def write_json(path: str | Path, obj: Any) -> None:
    """Writes `obj` as JSON, atomically. Raises ValueError or TypeError for what JSON has no word for, NaN included."""
    write_text(path, json.dumps(obj, indent=2, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Writes `text` in UTF-8, atomically. Raises OSError if it cannot be written; the old file is then as it was."""
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write in a `with` block that takes the place of `path` if the block succeeds, and vanishes if not.

    Readers see the old content or the new, even after a power failure, never a part. Raises OSError as open() does.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # same folder: a rename stays in one disk
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def clear_unfinished(path: str | Path) -> None:
    """Removes what `replacing` left beside `path` where the process was killed; for who alone writes there."""
    path = Path(path)
    for temporary in path.parent.glob(f".{path.name}.{'[0-9a-f]' * 8}.tmp"):
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """The folder as this process's own for the `with` block, against others that ask likewise; for nothing where the
    system has no such locks (Windows, some file systems). Raises ValueError where another process holds it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder} is being written to by another process: wait for it, or take another folder"
                             ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)                                            # and the lock with it, as when it is killed


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A new folder to fill in a `with` block that takes the place of `path` if the block succeeds, and vanishes if not.

    Whatever `path` held is gone then: ask first. Raises OSError where a folder cannot be made or renamed beside `path`.
    """
    path = Path(path)
    token = secrets.token_hex(4)
    temporary, old = (path.with_name(f".{path.name}.{token}.{suffix}") for suffix in ("tmp", "old"))
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.rename(path, old)  # a folder that holds files cannot be replaced in one step
        os.rename(temporary, path)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync_folder(path.parent)


def check_replaceable(folder: Path, ours: re.Pattern[str], force: bool) -> None:
    """Whether an output folder may be made or replaced: it is new or empty, or with --force holds only names that
    `ours` matches. Raises ValueError where it may not."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"--out must be a folder, got the file {folder}")
    names = sorted(path.name for path in folder.iterdir())
    if names and not force:
        raise ValueError(f"--out must be a new or empty folder, or one to replace by --force, got {folder} "
                         f"with {names[0]}")
    strange = [name for name in names if not ours.fullmatch(name)]
    if strange:
        raise ValueError(f"--force replaces only what an earlier run wrote, but {folder} holds {strange[0]}")


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlast a power failure, where the system can: some file systems do not, and a folder
    may be closed to readers. What was renamed is there all the same."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_plain(value: Any, place: str) -> None:
    """Raises CheckpointError where torch.load(weights_only=True) would refuse what torch.save had taken."""
    if isinstance(value, Tensor) or type(value) in (str, int, float, bool, type(None), torch.dtype, torch.device):
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"{place} has a key that")
            _check_plain(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple, torch.Size):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    else:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise CheckpointError(f"{place} must be a number, text, None, list, mapping or tensor, got {kind}")


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, short."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    first = text.strip().splitlines()[0]
    return first if len(first) <= 160 else first[:157] + "..."
