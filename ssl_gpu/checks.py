"""Checks that every section of a configuration shares, for those who write it in Python instead of YAML; and what the
reader of YAML (ssl_gpu.config) shares with them."""
from __future__ import annotations

import operator
import types
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from numbers import Real
from typing import Any, Union, get_args, get_origin, get_type_hints

FORMS = {bool: "true or false", int: "whole", float: "a number", str: "text"}


def check_fields(config: Any, section: str, **forms: str) -> None:
    """Of a frozen dataclass, bring every field to its annotated type: lists become tuples, values of an Enum its
    members, and whatever numpy or torch holds plain numbers. A whole number may stand for a float, but no bool for any.

    To be called at the start of __post_init__. forms: what a field "must be", for those that are more than their type,
    such as "(length, width, height)"; of a list of any length, what each of it must be.
    Infinity and NaN are floats: it is the rule of a field that refuses them, which knows what to ask for instead.
    Raises ValueError naming the field, its value and the rule.
    """
    for name, kind in _kinds(type(config)).items():
        key, value = f"{section}.{name}" if section else name, getattr(config, name)
        try:
            read = _read(kind, value, forms.get(name))
        except _Misfit as misfit:
            raise ValueError(f"{key} must {misfit.rule}, got {shown(misfit.value)}") from None
        if read is not value:
            object.__setattr__(config, name, read)


def check_class(name: str, value: Any, kind: type) -> None:
    """Raises ValueError where an argument is not of its class, as when two of them are swapped."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be of class {kind.__name__}, got {type(value).__name__}")


# ---- shared with the reader of YAML ----


def without_none(kind: Any) -> Any:
    """X of X | None, and any other type as it is. Raises TypeError for a choice between several types."""
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    options = [option for option in get_args(kind) if option is not type(None)]
    if len(options) != 1:
        raise TypeError(f"a configuration field may be X or X | None, not {kind}")
    return options[0]


def item_kinds(kind: Any, value: Any) -> tuple | None:
    """Of a tuple[..] type, the types of the items of `value`; None where that is no list, or not of so many."""
    if not isinstance(value, (list, tuple)):
        return None
    items = get_args(kind)
    if len(items) == 2 and items[1] is Ellipsis:
        return items[:1] * len(value)
    return items if len(items) == len(value) else None


def is_enum(kind: Any) -> bool:
    """Whether an annotated type is an Enum."""
    return isinstance(kind, type) and issubclass(kind, Enum)


def member_of(kind: type[Enum], value: Any) -> Enum | None:
    """The member that has this value, None where none has; True is not 1."""
    return next((member for member in kind if type(member.value) is type(value) and member.value == value), None)


def values_of(kind: type[Enum]) -> str:
    """The values of an Enum, as they are named in errors."""
    return ", ".join(str(member.value) for member in kind)


def shown(value: Any) -> str:
    """A value in an error: one line, not too long."""
    text = repr(value)
    if "\n" in text:
        text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


# ---- types ----


class _Misfit(Exception):
    """A value that is not of its type, and what it must do instead: "be whole", "hold (low, high)"."""

    def __init__(self, rule: str, value: Any):
        super().__init__(rule, value)
        self.rule, self.value = rule, value


@lru_cache(maxsize=None)
def _kinds(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _read(kind: Any, value: Any, form: str | None, verb: str = "be") -> Any:
    """`value` as the type `kind`. Raises _Misfit."""
    value, bare = _unwrapped(value), without_none(kind)
    if value is None and bare is not kind:
        return None
    null = "" if bare is kind else " or null"
    if get_origin(bare) is not tuple:
        read = _read_scalar(bare, value)
        if read is None:
            raise _Misfit(f"{verb} {form or _form(bare)}{null}", value)
        return read
    items, kinds = get_args(bare), item_kinds(bare, value)
    if items[-1] is Ellipsis:
        if kinds is None:
            raise _Misfit(f"be a list of {form or _form(items[0])}{null}", value)
        read = tuple(_read(items[0], item, form, "hold") for item in value)
    elif kinds is None:
        raise _Misfit(f"{verb} {form or _form(bare)}{null}", value)
    else:
        read = tuple(_read_scalar(item, _unwrapped(part)) for item, part in zip(kinds, value))
        if any(part is None for part in read):
            raise _Misfit("be whole" if set(kinds) == {int} else f"{verb} {form or _form(bare)}{null}", value)
    return value if isinstance(value, tuple) and all(a is b for a, b in zip(read, value)) else read


def _unwrapped(value: Any) -> Any:
    """Of an array, a tensor or a number of numpy's what it holds, in Python's own lists and numbers."""
    return value.tolist() if hasattr(type(value), "tolist") else value


def _read_scalar(kind: Any, value: Any) -> Any:
    """`value` as a type that is no tuple, None where it is not of it."""
    if is_enum(kind):
        return value if isinstance(value, kind) else member_of(kind, value)
    if kind is int and not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            return None
    if kind is float and isinstance(value, Real) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # a whole number beyond the largest float
            return None
        return value if type(value) is int else number  # equal to its float, and shown as it was written
    if kind not in FORMS and not is_dataclass(kind):
        raise TypeError(f"a field is annotated {kind}, which no configuration can hold")
    return value if kind not in (int, float) and isinstance(value, kind) else None


def _form(kind: Any) -> str:
    """What a value must be, in words."""
    if get_origin(kind) is tuple:
        return "(low, high)" if len(get_args(kind)) == 2 else f"{len(get_args(kind))} numbers"
    if is_enum(kind):
        return f"one of {values_of(kind)}"
    return FORMS[kind] if kind in FORMS else f"of class {kind.__name__}"
