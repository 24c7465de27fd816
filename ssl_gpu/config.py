"""Run configurations: nested frozen dataclasses read strictly from YAML and `section.key=value`; errors of one line.

    python -m ssl_gpu.config FILE [section.key=value ...]     # all keys with their values, and where they are described

A field may be an int, float, bool, str, Enum (written as its value), a tuple of such (written as a list), a dataclass
(a section), or one of these | None. Ranges and relations are checked by each section's own __post_init__.
"""
from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

if __name__ == "__main__":
    from ssl_gpu.commandline import begin_command
    begin_command()                                                    # before torch is loaded

import yaml

from ssl_gpu.checkpoint import write_text
from ssl_gpu.checks import check_fields, is_enum, item_kinds, member_of, shown, values_of, without_none
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.evalset import EvalConfig
from ssl_gpu.features import FeatureConfig
from ssl_gpu.ism import IsmConfig
from ssl_gpu.localizer import TargetConfig
from ssl_gpu.mixture import MixtureConfig
from ssl_gpu.model import ModelConfig, shortest_clip
from ssl_gpu.optim import TrainConfig
from ssl_gpu.pool import check_pool
from ssl_gpu.rir import RirConfig
from ssl_gpu.scene import SceneConfig
from ssl_gpu.simulator import SimulatorConfig
from ssl_gpu.speech import SpeechConfig

Config = TypeVar("Config")

SCALARS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
# YAML 1.1 takes 1e-3 for text, it wants 1.0e-3.
EXPONENT_WITHOUT_POINT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line and names the key, the value and the rule."""


@dataclass(frozen=True)
class RunConfig:
    """Everything about a training run, section by section; each section is described beside its user."""

    scene: SceneConfig
    rir: RirConfig
    ism: IsmConfig
    mixture: MixtureConfig
    simulator: SimulatorConfig
    speech: SpeechConfig
    features: FeatureConfig
    model: ModelConfig
    target: TargetConfig
    train: TrainConfig
    eval: EvalConfig

    def __post_init__(self):
        check_fields(self, "")
        check_pool(self.scene, self.rir)
        rate, shortest = self.rir.sample_rate, shortest_clip(self.model, self.features)
        if round(self.speech.clip_s * rate) < shortest:
            raise ValueError(f"speech.clip_s must be >= {shortest / rate:g} s ({shortest} samples) for "
                             f"model.kind={self.model.kind.value}, got {self.speech.clip_s}")


def load_config(cls: type[Config], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """A `cls` from the YAML file at `path` (None: from the defaults), changed by `section.key=value` overrides.

    Raises ConfigError for what is not a `cls`, and lets through the ValueError of a section that refuses its values.
    """
    return from_mapping(cls, apply_overrides({} if path is None else load_first(path), overrides))


def load_first(path: str | Path) -> dict[str, Any]:
    """load_yaml of the first word of a command line. Raises ConfigError for an override, or a folder, as well."""
    if is_override(str(path)) or Path(path).is_dir():                   # as a run's folder, after --resume
        raise ConfigError(f"a configuration must come first, a YAML file, got {path}")
    return load_yaml(path)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if it cannot be read, is no mapping, or has a key twice."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read configuration {path}: {error.strerror}") from error
    mapping = _parse(content, str(path))
    if not isinstance(mapping, dict):
        found = "nothing (write {} for all defaults)" if mapping is None else _show(mapping)
        raise ConfigError(f"{path} must hold a mapping, section: {{key: value}}, got {found}")
    return mapping


def apply_overrides(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `mapping` with each "section.key=value" set, the value read as YAML; the last word on a key counts.

    Raises ConfigError for an override of another form, or one that reaches into something that is not a section.
    """
    result = copy.deepcopy(dict(mapping))
    for text in overrides:
        name, equals, value = text.partition("=")
        *sections, key = parts = name.strip().split(".")
        if not equals or not all(re.fullmatch(r"\w+", part) for part in parts):
            raise ConfigError(f"override {_show(text)} must be of the form section.key=value")
        if not value.strip():
            raise ConfigError(f"override {_show(text)} has no value; write {name.strip()}=null for none")
        target = result
        for depth, section in enumerate(sections):
            if target.get(section) is None:
                target[section] = {}
            target = target[section]
            if not isinstance(target, dict):
                raise ConfigError(f"override {_show(text)}: {'.'.join(parts[:depth + 1])} must be a section, "
                                  f"got {_show(target)}")
        target[key] = _parse(value, f"override {_show(text)}")
    return result


def is_override(text: str) -> bool:
    """Whether a word of a command line is a "section.key=value", not a path: what is there is a path, whatever its
    name, and r=1, a folder that is not there, is none either."""
    return re.match(r"\w+(\.\w+)+=", text) is not None and not os.path.exists(text)


def from_mapping(cls: type[Config], mapping: Mapping[str, Any], path: str = "") -> Config:
    """A `cls` of the values in `mapping`, its defaults where there are none; `path` is its name in error messages.

    Raises ConfigError for a key that `cls` has not, a value of another type, or a missing one. A ValueError from a
    section's __post_init__ passes unchanged.
    """
    if not isinstance(mapping, Mapping):
        hint = " (leave it out for its defaults)" if mapping is None else ""
        raise ConfigError(f"{path or 'the configuration'} must be a mapping of keys to values, got "
                          f"{_show(mapping)}{hint}")
    settable = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for name, value in mapping.items():
        if name not in settable:
            raise _unknown_key(cls, list(settable), name, value, path)
    kinds = typing.get_type_hints(cls)
    values = {}
    for name, field in settable.items():
        key = _join(path, name)
        if name in mapping:
            values[name] = _convert(kinds[name], mapping[name], key)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            if not dataclasses.is_dataclass(kinds[name]):
                raise ConfigError(f"{key} is missing, it must be {_rule(kinds[name])}")
            values[name] = from_mapping(kinds[name], {}, key)
    return cls(**values)


def to_mapping(config: Any) -> dict[str, Any]:
    """The plain mapping that from_mapping turns into an equal config: Enums as values, tuples as lists.

    Raises TypeError for a value that the loader has no type for.
    """
    return _plain(config, "")


def to_yaml(config: Any) -> str:
    """The YAML text of a configuration: a block per section, in the order of the fields."""
    # Not allow_unicode: with it PyYAML writes U+0085 such that it is read back as a space.
    return yaml.dump(to_mapping(config), Dumper=_Dumper, sort_keys=False, width=120)


def save_yaml(path: str | Path, config: Any) -> None:
    """Writes a configuration as YAML, atomically. Raises OSError if it cannot be written."""
    write_text(path, to_yaml(config))


def walk_fields(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field, those of sections in their place."""
    for name, value in _fields_of(config):
        if dataclasses.is_dataclass(value):
            yield from walk_fields(value, _join(path, name))
        else:
            yield _join(path, name), value


def told_changes(before: Any, now: Any, counts: Callable[[str], bool], was: str = "was ") -> str:
    """The values, of the keys for which counts(key), that are others in one configuration than in another of its class:
    "model.dim=8 (was 16), ..."; "" where there are none. was: what stands before those of `before`."""
    old = dict(walk_fields(before))
    return ", ".join(f"{key}={_told(value)} ({was}{_told(old[key])})" for key, value in walk_fields(now)
                     if counts(key) and value != old[key])


def _told(value: Any) -> str:
    """A value as a configuration has it."""
    value = value.value if isinstance(value, Enum) else value
    return str(value) if isinstance(value, str) else json.dumps(value, default=str)


def _fields_of(config: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config) if field.init]


# ---- values ----


def _convert(kind: Any, value: Any, key: str, expected: Any = None) -> Any:
    """`value` as the annotated type `kind`; `expected` is the type to name in the error, where it is wider."""
    expected = expected or kind
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        if value is None and type(None) in typing.get_args(kind):
            return None
        return _convert(without_none(kind), value, key, kind)
    if dataclasses.is_dataclass(kind):
        return from_mapping(kind, value, key)
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(kind, value, key, expected)
    if is_enum(kind):
        member = member_of(kind, value)
        if member is not None:
            return member
    elif kind is float:
        number = _as_float(value)
        if number is not None:
            return number
    elif kind not in SCALARS:
        raise TypeError(f"{key} is annotated {kind}, which no configuration can hold")
    elif type(value) is kind:
        return value
    raise ConfigError(f"{key} must be {_rule(expected)}, got {_show(value)}{_hint(kind, value)}")


def _convert_tuple(kind: Any, value: Any, key: str, expected: Any) -> tuple:
    items = item_kinds(kind, value)
    if items is not None:
        return tuple(_convert(item, element, f"{key}[{index}]")
                     for index, (item, element) in enumerate(zip(items, value)))
    raise ConfigError(f"{key} must be {_rule(expected)}, got {_show(value)}")


def _as_float(value: Any) -> float | None:
    """The finite number that `value` stands for, or None."""
    if isinstance(value, str) and EXPONENT_WITHOUT_POINT.fullmatch(value) is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int beyond the largest float
        return None
    return number if math.isfinite(number) else None


def _plain(value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(value):
        return {name: _plain(item, _join(key, name)) for name, item in _fields_of(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{key}[{index}]") for index, item in enumerate(value)]
    if value is None or type(value) in SCALARS:
        return value
    raise TypeError(f"{key} = {_show(value)} cannot be written to a configuration")


# ---- error texts ----


def _rule(kind: Any) -> str:
    """What a value of the type `kind` must be, in words."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return f"{_rule(without_none(kind))}, or null"
    if kind in SCALARS:
        return SCALARS[kind]
    if is_enum(kind):
        return f"one of {values_of(kind)}"
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if items[-1] is Ellipsis:
            return f"a list, each {_rule(items[0])}"
        if len(set(items)) == 1:
            return f"a list of {len(items)}, each {_rule(items[0])}"
        return f"a list of {len(items)}: {'; '.join(_rule(item) for item in items)}"
    return "a mapping of keys to values"


def _hint(kind: Any, value: Any) -> str:
    if isinstance(value, bool) and kind is not int and kind is not float:
        return " (YAML reads an unquoted on, off, yes or no as true or false)"
    if isinstance(value, str) and is_enum(kind):
        close = difflib.get_close_matches(value, [str(member.value) for member in kind], n=1)
        return f"; did you mean {close[0]}?" if close else ""
    return ""


def _unknown_key(cls: type, names: list[str], name: Any, value: Any, path: str) -> ConfigError:
    """The error for a key that `cls` has not, with the nearest name here, or the same name in a section below."""
    what = "section" if isinstance(value, Mapping) else "key"
    close = difflib.get_close_matches(str(name), names, n=1)
    below = [dotted for dotted in _dotted_names(cls) if dotted.rpartition(".")[2] == name]
    if close or below:
        advice = f"did you mean {_join(path, (close or below)[0])}?"
    else:
        advice = f"{path or 'the configuration'} has {', '.join(names)}"
    shown = name if isinstance(name, str) and name.isprintable() else repr(name)
    return ConfigError(f"unknown {what} {_join(path, shown)}, got {_show(value)}; {advice}")


def _dotted_names(cls: type) -> Iterator[str]:
    """The dotted names of all keys of `cls`, those of its sections too."""
    kinds = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = without_none(kinds[field.name])
        if dataclasses.is_dataclass(kind):
            yield from (f"{field.name}.{below}" for below in _dotted_names(kind))
        else:
            yield field.name


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _show(value: Any) -> str:
    return "null" if value is None else shown(value)


# ---- YAML ----


class _Loader(yaml.SafeLoader):
    """Plain YAML, but for a mapping that has a key twice: YAML forbids it, PyYAML keeps the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        first = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                earlier = first.setdefault((key.tag, key.value), key)
                if earlier is not key:
                    problem = f"key {key.value!r} is given twice, first in line {earlier.start_mark.line + 1}"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return node


class _Dumper(yaml.SafeDumper):
    """Sections as blocks, lists in one line."""

    def represent_list(self, data):
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)


def _parse(text: str | bytes, where: str) -> Any:
    """The content of a YAML text. Raises ConfigError, in one line, if it is not valid."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
    except RecursionError:
        line, problem = "", "nested too deeply"
    except (yaml.YAMLError, ValueError) as error:  # a byte that is not text; a date such as 2020-02-31
        line, problem = "", " ".join(str(error).split())
    raise ConfigError(f"{where}{line}: {' '.join(problem.split())}")


# ---- command line ----


def described(config: Any) -> str:
    """Its YAML; above every section a comment with the class whose docstring says what its keys mean."""
    lines = []
    for line in to_yaml(config).splitlines():
        name = line.partition(":")[0]
        if not line.startswith(" ") and dataclasses.is_dataclass(section := getattr(config, name, None)):
            lines.append(f"# {type(section).__module__}.{type(section).__name__}")
        lines.append(line)
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m ssl_gpu.config",
                    description="Prints all keys of a configuration with their values, as YAML, and where each section "
                                "is described.")
    parser.add_argument("config", help="a YAML file, for example configs/librispeech.yaml")
    parser.add_overrides("for example rir.sample_rate=48000")
    args = parser.parse_intermixed_args(arguments)
    try:
        print(described(load_config(RunConfig, args.config, args.overrides)), end="")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    end_with(main)
