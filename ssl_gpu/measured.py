"""Measured two-microphone RIRs in a folder with an index.json: what e3 is made of."""
from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_gpu.measure import decay_time, drr_db, energy_db, energy_decay
from ssl_gpu.scenelist import shown_json

SAMPLE_RATE = 16000  # Hz, as of all evaluation sets
PLACE_OPTIONAL = ("configuration", "distance_m", "rt60_s")  # what index.json may say of an RIR
NO_RIRS = "e3 needs a folder of measured RIRs: e3.dir=DIR"


def read_measured(folder: str | Path | None) -> tuple[Tensor, list[dict[str, Any]]]:
    """Measured RIRs [rir, mic=2, tap] float32, and what index.json says of each.

    index.json: {"mic_spacing_m": m, "speed_of_sound": m/s, "rirs": [{"file": name, "cone_deg": angle from the axis from
    channel 1 to channel 2, ...}, ...]}; optional of an RIR: configuration, distance_m, rt60_s, mic_spacing_m; null is
    as good as nothing. Every RIR is given back with those of these keys that it has, with spacing and speed of sound.
    Raises ValueError, in one line that names entry and key, for a folder that is none of this.
    """
    if folder is None:
        raise ValueError(NO_RIRS)
    folder = Path(folder).expanduser()
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"e3.dir: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"e3.dir: {path} must hold JSON: {error}") from error
    common = _known(index, f"e3.dir: {path}", ("mic_spacing_m", "speed_of_sound"))
    rirs = index.get("rirs")
    if not isinstance(rirs, list) or len(rirs) < 2:
        raise ValueError(f"e3.dir: {path}: rirs must be a list of at least 2 RIRs, got "
                         f"{len(rirs) if isinstance(rirs, list) else shown_json(rirs)}")
    places = [common | _known(rir, f"e3.dir: {path}: rirs[{number}]", ("file", "cone_deg"),
                              (*PLACE_OPTIONAL, *common)) for number, rir in enumerate(rirs)]
    for key in common:
        found = sorted({place[key] for place in places})
        if len(found) > 1:
            raise ValueError(f"e3.dir: {path}: all RIRs must have one {key}, got {found[0]} and {found[1]}")
    pairs_of(places)
    return _read_channels(folder, [place["file"] for place in places]), places


def _known(entry: Any, where: str, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Any]:
    """Of a JSON object, the needed keys, and those optional ones that are there and not null, as they are: digests are
    of them. Raises ValueError that begins with `where`."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be an object with {' and '.join(needed)}, got {shown_json(entry)}")
    found = {}
    for key in (*needed, *optional):
        value, (rule, holds) = entry.get(key), INDEX_RULES[key]
        if value is not None and holds(value):
            found[key] = value
        elif value is not None or key in needed:
            raise ValueError(f"{where}: {key} must be {rule}, got {shown_json(value) if key in entry else 'nothing'}")
    return found


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number, which true and 1e999 are not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


INDEX_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "file": ("the name of a file", lambda value: isinstance(value, str) and value != ""),
    "cone_deg": ("a number from 0 to 180", lambda value: _is_number(value) and 0 <= value <= 180),
    "mic_spacing_m": ("a finite number > 0", lambda value: _is_number(value) and value > 0),
    "speed_of_sound": ("a finite number > 0", lambda value: _is_number(value) and value > 0),
    "distance_m": ("a finite number or null", _is_number), "rt60_s": ("a finite number or null", _is_number),
    "configuration": ("anything", lambda value: True)}


def _read_channels(folder: Path, names: list[str]) -> Tensor:
    """[file, 2, tap] float32, zero behind the end of shorter ones."""
    import soundfile

    channels = []
    for name in names:
        try:
            audio, rate = soundfile.read(folder / name, dtype="float32", always_2d=True)
        except (OSError, RuntimeError, TypeError) as error:             # TypeError: a .raw file, which says no rate
            raise ValueError(f"e3.dir: cannot read {folder / name}: {error}") from error
        if rate != SAMPLE_RATE or audio.shape[1] != 2:
            raise ValueError(f"e3.dir: {folder / name} must have 2 channels at {SAMPLE_RATE} Hz, got "
                             f"{audio.shape[1]} at {rate}")
        if not np.isfinite(audio).all() or not audio.any(0).all():
            raise ValueError(f"e3.dir: {folder / name} must hold finite samples and be silent in neither channel")
        channels.append(torch.from_numpy(audio.T))
    length = max(channel.shape[-1] for channel in channels)
    return torch.stack([torch.nn.functional.pad(channel, (0, length - channel.shape[-1])) for channel in channels])


def pairs_of(places: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """All ordered pairs of RIRs of one configuration. Raises ValueError where there are none."""
    pairs = [(i, j) for i, a in enumerate(places) for j, b in enumerate(places)
             if i != j and a.get("configuration") == b.get("configuration")]
    if not pairs:
        raise ValueError("e3.dir: index.json must hold two RIRs of one configuration")
    return pairs


def measure_alone(rirs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T20 (s), direct-to-reverberant ratio and energy (dB) of RIRs [rir, tap], each [rir] float64, NaN where undefined.
    Where they are from is not known: the largest tap counts as the direct sound."""
    direct = rirs.abs().argmax(-1)
    decay = energy_decay(rirs, direct)
    return (decay_time(decay, direct, SAMPLE_RATE, -5, -25), drr_db(rirs, direct, SAMPLE_RATE), energy_db(rirs))
