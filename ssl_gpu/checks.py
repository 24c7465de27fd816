"""Checks that every section of a configuration shares, for those who write it in Python instead of YAML."""
from __future__ import annotations

from dataclasses import fields
from enum import Enum
from functools import lru_cache
from typing import Any, get_type_hints


def read_enums(config: Any, section: str) -> None:
    """Of a frozen dataclass, turn the values of Enum fields into members: "measured" into Decay.MEASURED.

    To be called at the start of __post_init__. Raises ValueError naming the field, its value and the choices.
    """
    for name, kind in _enum_fields(type(config)):
        value = getattr(config, name)
        if isinstance(value, kind):
            continue
        try:
            object.__setattr__(config, name, kind(value))
        except ValueError as error:
            choices = ", ".join(str(member.value) for member in kind)
            raise ValueError(f"{section}.{name} must be one of {choices}, got {value!r}") from error


def check_range(config: Any, section: str, *names: str) -> None:
    """Raises ValueError where a field is not a (low, high) of two numbers, nor None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not (isinstance(value, (tuple, list)) and len(value) == 2
                                      and all(isinstance(end, (int, float)) for end in value)):
            raise ValueError(f"{section}.{name} must be (low, high), got {value!r}")


def check_whole(config: Any, section: str, *names: str) -> None:
    """Raises ValueError where a field is no whole number."""
    for name in names:
        if not hasattr(getattr(config, name), "__index__"):
            raise ValueError(f"{section}.{name} must be whole, got {getattr(config, name)!r}")


@lru_cache(maxsize=None)
def _enum_fields(cls: type) -> tuple[tuple[str, type[Enum]], ...]:
    hints = get_type_hints(cls)
    return tuple((field.name, hints[field.name]) for field in fields(cls)
                 if isinstance(hints[field.name], type) and issubclass(hints[field.name], Enum))
