"""Random streams: (seed, split, stream, step, rank) -> torch.Generator, so that a run resumes from its step alone."""
from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

MAX_SEED = 2**64 - 1
MAX_INDEX = 2**32 - 1  # one 32-bit word each in the spawn key: longer words could make two keys alike


class Split(IntEnum):
    """Which part of an experiment draws. Never renumber: the numbers are part of every seed."""

    TRAIN = 0
    VALIDATION = 1
    TEST = 2


class Stream(IntEnum):
    """What the draws are for. Never renumber, only append: the numbers are part of every seed."""

    SCENE = 0
    IMAGES = 1
    SPEECH = 2
    MIXTURE = 3
    VOICES = 4
    MODEL = 5
    ANGLE_MAP = 6
    DROPOUT = 7


def generator(seed: int, split: Split, stream: Stream, step: int, rank: int = 0,
              device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` that belongs to these five numbers alone, by seed_of.

    The same numbers draw differently on a CPU and on a GPU; and torch's CPU generator keeps only 32 of the 64 bits, so
    there two of n generators agree with probability n^2 / 2^33 (1 % for 10^4), against n^2 / 2^65 on a GPU.

    Raises ValueError as seed_of does.
    """
    return torch.Generator(device).manual_seed(seed_of(seed, split, stream, step, rank))


def seed_of(seed: int, split: Split, stream: Stream, step: int, rank: int = 0) -> int:
    """64 bits for torch.Generator.manual_seed that belong to these five numbers alone.

    They are hashed by numpy's SeedSequence. A sum such as seed + step + rank collides: step 1 of rank 0 would be step 0
    of rank 1, and run 1 would be run 0 one step late.

    Raises ValueError where a number is negative, too large or not an int, or where split or stream is not of its Enum.
    """
    _check_member("split", split, Split)
    _check_member("stream", stream, Stream)
    for name, value, highest in (("seed", seed, MAX_SEED), ("step", step, MAX_INDEX), ("rank", rank, MAX_INDEX)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= highest:
            raise ValueError(f"{name} must be an int with 0 <= {name} <= {highest}, got {value!r}")
    sequence = np.random.SeedSequence(seed, spawn_key=(int(split), int(stream), step, rank))
    return int(sequence.generate_state(1, np.uint64)[0])


def uniform(shape: Sequence[int], low: float, high: float, *, generator: torch.Generator,
            dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Uniform numbers from low to high, on the generator's device."""
    device = generator.device
    if device.type != "cpu":                                            # one pass over memory instead of three
        return torch.empty(shape, dtype=dtype, device=device).uniform_(low, high, generator=generator)
    # On a CPU in these steps, by whose roundings evaluation sets are known.
    return torch.rand(shape, generator=generator, dtype=dtype, device=device).mul_(high - low).add_(low)


def _check_member(name: str, value: object, choices: type[IntEnum]) -> None:
    # A bare number would let a stream pass for a split.
    if not isinstance(value, choices):
        raise ValueError(f"{name} must be a {choices.__name__} ({', '.join(choices.__members__)}), got {value!r}")
