"""Clips to be localised, with their truth and their circumstances: what every evaluation set is made of."""
from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields, replace
from typing import Any, Iterable

import torch
from torch import Tensor

from ssl_gpu.doa import sorted_angles

# Of an entry, what follows from the rest; its last digit depends on the machine. And which clip of its set it is.
DERIVED = {"clip", "measured", "azimuth_deg", "cone_angle_deg", "array_pos", "direction"}


@dataclass(frozen=True, eq=False)
class Clips:
    """Some clips of an evaluation set.

    audio [clip, mic, sample] float32; mic_pos [clip, mic, 3] m; azimuth, cone [clip, src] rad, seen from the array;
    scene [clip] or [clip, k] int64: numbers of the 1 or k clusters that a clip belongs to. Clips of one number share a
    room and positions, or, of k, one of them, so their errors are not independent;
    conditions: by name, [clip, src] or [clip] float64, what results are broken down by; NaN where unknown;
    entries: what each clip is made of, plain values ready for JSON; what was measured of it under "measured";
    draws: of what was drawn for them, on the CPU, that which is equal to the last bit on every machine: speech and
    uniform numbers, but not their cosines, logarithms or sums, nor normal numbers, of which entries have the seed.
    Entries and draws are what the digest of a set is taken of; derived: keys of entries that follow from these, and are
    left out of it, beside those of DERIVED.
    """

    audio: Tensor
    mic_pos: Tensor
    azimuth: Tensor
    cone: Tensor
    scene: Tensor
    conditions: dict[str, Tensor]
    entries: list[dict[str, Any]]
    draws: tuple[Tensor, ...]
    derived: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Truth:
    """Clips without audio, of a whole set: azimuth, cone [clip, src] rad, each ascending; scene [clip] or [clip, k]
    int64, as of Clips; conditions, those of sources [clip, src] in the order of their cone angles, those of clips
    [clip], or NaN; azimuth_order [clip, src] int64: of the sources by azimuth, their places by cone angle, None where
    both orders are one."""

    azimuth: Tensor
    cone: Tensor
    scene: Tensor
    conditions: dict[str, Tensor]
    azimuth_order: Tensor | None = None

    @classmethod
    def of(cls, parts: Iterable[Clips]) -> "Truth":
        """The truth of clips in parts."""
        parts = list(parts)
        cone = torch.cat([part.cone for part in parts]).double().cpu()
        order = cone.abs().argsort(-1)
        conditions = {}
        for name in parts[0].conditions:
            column = torch.cat([part.conditions[name] for part in parts]).double().cpu()
            conditions[name] = column.gather(-1, order) if column.ndim == 2 else column
        azimuth = torch.cat([part.azimuth for part in parts]).double().cpu()
        place = azimuth.abs().gather(-1, order).argsort(dim=-1, stable=True)
        return cls(sorted_angles(azimuth), sorted_angles(cone), torch.cat([part.scene for part in parts]), conditions,
                   place)

    def in_order_of_azimuth(self) -> "Truth":
        """The same, the conditions of sources in the order of their azimuths."""
        if self.azimuth_order is None:
            return self
        return replace(self, conditions={name: column.gather(-1, self.azimuth_order) if column.ndim == 2 else column
                                         for name, column in self.conditions.items()})


class Digest:
    """Of a set as it goes by: the same on every machine, as long as the same clips are asked for."""

    def __init__(self):
        self.hash = hashlib.blake2b(digest_size=8)

    def add(self, clips: Clips) -> None:
        """The next clips of the set."""
        for entry in clips.entries:
            plain = {key: value for key, value in entry.items() if key not in DERIVED | clips.derived}
            self.hash.update(json.dumps(plain, sort_keys=True).encode())
        for tensor in clips.draws:
            self.hash.update(tensor.contiguous().cpu().numpy().tobytes())

    def __str__(self) -> str:
        return self.hash.hexdigest()


def without_audio(clips: Clips) -> Clips:
    """The same clips, to be kept when their audio is no longer needed."""
    values = {field.name: getattr(clips, field.name) for field in fields(clips)}
    return Clips(**{**values, "audio": clips.audio[..., :0].clone(), "draws": ()})  # a view would keep all of it
