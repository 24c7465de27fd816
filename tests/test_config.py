"""The strict loader: what it accepts, what it writes back, and the exact line it says when it refuses."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ssl_gpu.config import (ConfigError, RunConfig, apply_overrides, from_mapping, is_override, load_config, load_yaml,
                            main, save_yaml, to_mapping, to_yaml, walk_fields)


class Pattern(Enum):
    OMNI = "omni"
    CARDIOID = "cardioid"


@dataclass(frozen=True)
class Noise:
    snr_db: tuple[float, float] = (0.0, 30.0)
    colour: str = "pink"


@dataclass(frozen=True)
class Room:
    rt60_s: tuple[float, float] = (0.1, 0.7)
    num_src: int = 2
    wall_dist_m: float = 0.5
    rotate: bool = False
    pattern: Pattern = Pattern.OMNI
    bank: int | None = None
    mic_array_m: tuple[tuple[float, float, float], ...] | None = None
    weights: tuple[float, ...] = ()
    corners: tuple[str, int] = ("a", 1)
    noise: Noise = field(default_factory=Noise)

    def __post_init__(self):
        if not 0 < self.rt60_s[0] <= self.rt60_s[1]:
            raise ValueError(f"room.rt60_s must satisfy 0 < low <= high, got {self.rt60_s}")


@dataclass(frozen=True)
class Speech:
    folder: str
    pattern: Optional[Pattern] = None


@dataclass(frozen=True)
class Run:
    room: Room = field(default_factory=Room)
    speech: Speech | None = None
    seed: int = 0


@dataclass(frozen=True)
class NeedsSpeech:
    speech: Speech


def test_every_field_type_is_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("""
        room:
          rt60_s: [1e-1, 1]
          num_src: 3
          wall_dist_m: 2e-1
          rotate: true
          pattern: cardioid
          bank: 3000
          mic_array_m: [[-0.05, 0, 0], [0.05, 0, 0]]
          weights: [1, 2.5]
          corners: [b, 2]
          noise: {snr_db: [5, 5], colour: white}
        speech: {folder: data/speech, pattern: omni}
        seed: 7
    """)
    room = Room((0.1, 1.0), 3, 0.2, True, Pattern.CARDIOID, 3000, ((-0.05, 0.0, 0.0), (0.05, 0.0, 0.0)), (1.0, 2.5),
                ("b", 2), Noise((5.0, 5.0), "white"))
    config = load_config(Run, path)
    assert config == Run(room, Speech("data/speech", Pattern.OMNI), 7)
    assert all(type(number) is float for number in config.room.rt60_s + config.room.weights + config.room.noise.snr_db)


def test_what_is_left_out_has_its_default():
    assert from_mapping(Run, {}) == load_config(Run) == Run()
    assert from_mapping(Run, {"room": {"num_src": 1}}) == Run(room=Room(num_src=1))


def test_overrides_are_yaml_and_the_last_one_counts():
    config = load_config(Run, overrides=["room.rt60_s=[0.2, 0.4]", "room.noise.colour=white", "seed=1", "seed=2",
                                         "room.wall_dist_m=1e-3", "speech.folder=a=b", "room.weights=[1e1, -2E+0]"])
    assert config == Run(Room(rt60_s=(0.2, 0.4), noise=Noise(colour="white"), wall_dist_m=0.001, weights=(10.0, -2.0)),
                         Speech("a=b"), 2)


def test_override_sets_a_key_or_a_whole_section_to_null(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("{speech: {folder: x}, room: {bank: 3}}")
    assert load_config(Run, path, ["speech=null", "room.bank=null"]) == Run()
    assert load_config(Run, path, ["speech=null", "speech.folder=y"]).speech == Speech("y")
    assert load_config(Run, path, ["room={num_src: 4}"]).room == Room(num_src=4)


def test_overrides_leave_the_mapping_as_it_was():
    mapping = {"room": {"noise": {"colour": "pink"}}}
    assert apply_overrides(mapping, ["room.noise.colour=white"]) == {"room": {"noise": {"colour": "white"}}}
    assert mapping == {"room": {"noise": {"colour": "pink"}}}


def test_an_override_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.b=1").mkdir()
    array = f"scene.mic_array_m={[[0.1, 0.0, 0.0]] * 20}"  # longer than a file's name may be
    words = ("train.lr=1e-3", "a.b.c=", array, "a.b=1", "r=1", "runs/r.s=1", "run")
    assert [word for word in words if is_override(word)] == ["train.lr=1e-3", "a.b.c=", array]


numbers = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)
positive = st.floats(1e-300, 1e300)
rooms = st.builds(Room, rt60_s=positive.map(lambda low: (low, 2 * low)), num_src=st.integers(), wall_dist_m=numbers,
                  rotate=st.booleans(), pattern=st.sampled_from(Pattern), bank=st.none() | st.integers(),
                  mic_array_m=st.none() | st.lists(st.tuples(numbers, numbers, numbers), max_size=3).map(tuple),
                  weights=st.lists(numbers, max_size=3).map(tuple), corners=st.tuples(words, st.integers()),
                  noise=st.builds(Noise, snr_db=st.tuples(numbers, numbers), colour=words))
runs = st.builds(Run, room=rooms, seed=st.integers(), speech=st.none() | st.builds(
    Speech, folder=words | st.sampled_from(["1e-3", "null", "yes", "~", "1:30", "a: b", "0x1"]),
    pattern=st.none() | st.sampled_from(Pattern)))


@settings(max_examples=60, deadline=None)
@given(runs)
@example(Run(speech=Speech("\x85")))  # which PyYAML, asked for readable text, reads back as a space
def test_any_config_survives_being_written_and_read(config):
    assert from_mapping(Run, to_mapping(config)) == config
    assert from_mapping(Run, yaml.safe_load(to_yaml(config))) == config


def test_saved_file_is_readable_and_loads_equal(tmp_path):
    config = Run(Room(pattern=Pattern.CARDIOID, wall_dist_m=1e-5), Speech("data/ä"), 3)
    save_yaml(tmp_path / "config.yaml", config)
    assert load_config(Run, tmp_path / "config.yaml") == config
    text = (tmp_path / "config.yaml").read_text(encoding="utf-8")
    assert text.startswith("room:\n  rt60_s: [0.1, 0.7]\n  num_src: 2\n") and "  pattern: cardioid\n" in text
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_to_mapping_holds_plain_values_only():
    mapping = to_mapping(Run(Room(mic_array_m=((0.0, 0.0, 0.0),)), Speech("x", Pattern.CARDIOID)))
    assert mapping["room"]["mic_array_m"] == [[0.0, 0.0, 0.0]]
    assert mapping["speech"] == {"folder": "x", "pattern": "cardioid"}

    @dataclass(frozen=True)
    class Odd:
        limit: object = object

    with pytest.raises(TypeError, match=r"limit = <class 'object'> cannot be written"):
        to_mapping(Odd())


def test_walk_fields_names_every_leaf_once():
    walked = dict(walk_fields(Run(speech=Speech("x"))))
    assert walked["room.noise.snr_db"] == (0.0, 30.0) and walked["speech.folder"] == "x" and walked["seed"] == 0
    assert set(walked) == {"room.rt60_s", "room.num_src", "room.wall_dist_m", "room.rotate", "room.pattern",
                           "room.bank", "room.mic_array_m", "room.weights", "room.corners", "room.noise.snr_db",
                           "room.noise.colour", "speech.folder", "speech.pattern", "seed"}
    assert dict(walk_fields(Run()))["speech"] is None


REFUSED = [
    ({"rom": {"num_src": 1}}, "unknown section rom, got {'num_src': 1}; did you mean room?"),
    ({"optics": {}}, "unknown section optics, got {}; the configuration has room, speech, seed"),
    ({"sed": 1}, "unknown key sed, got 1; did you mean seed?"),
    ({"snr_db": [0, 1]}, "unknown key snr_db, got [0, 1]; did you mean room.noise.snr_db?"),
    ({"room": {"rt60": 0.3}}, "unknown key room.rt60, got 0.3; did you mean room.rt60_s?"),
    ({"room": {"noise": {"xyz": None}}}, "unknown key room.noise.xyz, got null; room.noise has snr_db, colour"),
    ({"room": {True: 1}}, "unknown key room.True, got 1; room has rt60_s, num_src, wall_dist_m, rotate, pattern, bank, "
                          "mic_array_m, weights, corners, noise"),
    ({"room": None}, "room must be a mapping of keys to values, got null (leave it out for its defaults)"),
    ({"room": [1]}, "room must be a mapping of keys to values, got [1]"),
    ({"room": {"num_src": "two"}}, "room.num_src must be a whole number, got 'two'"),
    ({"room": {"num_src": 2.0}}, "room.num_src must be a whole number, got 2.0"),
    ({"room": {"num_src": True}}, "room.num_src must be a whole number, got True"),
    ({"room": {"num_src": None}}, "room.num_src must be a whole number, got null"),
    ({"room": {"wall_dist_m": True}}, "room.wall_dist_m must be a finite number, got True"),
    ({"room": {"wall_dist_m": "0.5"}}, "room.wall_dist_m must be a finite number, got '0.5'"),
    ({"room": {"wall_dist_m": "nan"}}, "room.wall_dist_m must be a finite number, got 'nan'"),
    ({"room": {"wall_dist_m": math.nan}}, "room.wall_dist_m must be a finite number, got nan"),
    ({"room": {"wall_dist_m": math.inf}}, "room.wall_dist_m must be a finite number, got inf"),
    ({"room": {"wall_dist_m": "1e999"}}, "room.wall_dist_m must be a finite number, got '1e999'"),
    ({"room": {"wall_dist_m": 10**400}}, f"room.wall_dist_m must be a finite number, got 1{'0' * 76}..."),
    ({"room": {"rotate": 1}}, "room.rotate must be true or false, got 1"),
    ({"room": {"bank": "many"}}, "room.bank must be a whole number, or null, got 'many'"),
    ({"room": {"pattern": "cardoid"}},
     "room.pattern must be one of omni, cardioid, got 'cardoid'; did you mean cardioid?"),
    ({"room": {"pattern": False}}, "room.pattern must be one of omni, cardioid, got False "
                                   "(YAML reads an unquoted on, off, yes or no as true or false)"),
    ({"room": {"noise": {"colour": 3}}}, "room.noise.colour must be text, got 3"),
    ({"room": {"rt60_s": 0.3}}, "room.rt60_s must be a list of 2, each a finite number, got 0.3"),
    ({"room": {"rt60_s": "0.3"}}, "room.rt60_s must be a list of 2, each a finite number, got '0.3'"),
    ({"room": {"rt60_s": [0.3]}}, "room.rt60_s must be a list of 2, each a finite number, got [0.3]"),
    ({"room": {"rt60_s": [0.3, "x"]}}, "room.rt60_s[1] must be a finite number, got 'x'"),
    ({"room": {"rt60_s": [0.8, 0.2]}}, "room.rt60_s must satisfy 0 < low <= high, got (0.8, 0.2)"),
    ({"room": {"weights": 1.0}}, "room.weights must be a list, each a finite number, got 1.0"),
    ({"room": {"corners": [1]}}, "room.corners must be a list of 2: text; a whole number, got [1]"),
    ({"room": {"mic_array_m": [[0, 0, 0], [0, 0]]}},
     "room.mic_array_m[1] must be a list of 3, each a finite number, got [0, 0]"),
    ({"room": {"mic_array_m": 3}},
     "room.mic_array_m must be a list, each a list of 3, each a finite number, or null, got 3"),
    ({"speech": {}}, "speech.folder is missing, it must be text"),
    ({"speech": {"folder": "x", "pattern": 1}},
     "speech.pattern must be one of omni, cardioid, or null, got 1"),
]


@pytest.mark.parametrize("mapping, message", REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_refusal_names_the_key_the_value_and_the_rule(mapping, message):
    with pytest.raises(ValueError) as refusal:
        from_mapping(Run, mapping)
    assert str(refusal.value) == message


def test_true_is_not_the_enum_of_value_one():
    class Order(Enum):
        FIRST = 1

    @dataclass(frozen=True)
    class Filter:
        order: Order = Order.FIRST

    Filter.__annotations__["order"] = Order  # a local name, which the text of an annotation cannot reach
    assert from_mapping(Filter, {"order": 1}) == Filter()
    with pytest.raises(ConfigError, match="^order must be one of 1, got True"):
        from_mapping(Filter, {"order": True})


def test_section_error_passes_through_as_it_is():
    with pytest.raises(ValueError) as refusal:
        from_mapping(Run, {"room": {"rt60_s": [0.8, 0.2]}})
    assert type(refusal.value) is ValueError


def test_missing_section_is_named_by_its_missing_key():
    with pytest.raises(ConfigError, match=r"^speech\.folder is missing, it must be text$"):
        from_mapping(NeedsSpeech, {})


def test_field_that_no_yaml_can_hold_is_a_programming_error():
    @dataclass(frozen=True)
    class Odd:
        table: dict = field(default_factory=dict)
        either: int | str = 0

    with pytest.raises(TypeError, match="table is annotated"):
        from_mapping(Odd, {"table": {}})
    with pytest.raises(TypeError, match="X or X | None"):
        from_mapping(Odd, {"either": 1})


@pytest.mark.parametrize("override, message", [
    ("room.num_src", "override 'room.num_src' must be of the form section.key=value"),
    ("=3", "override '=3' must be of the form section.key=value"),
    ("room..num_src=3", "override 'room..num_src=3' must be of the form section.key=value"),
    ("--room.num_src=3", "override '--room.num_src=3' must be of the form section.key=value"),
    ("room.num_src=", "override 'room.num_src=' has no value; write room.num_src=null for none"),
    ("seed.x=1", "override 'seed.x=1': seed must be a section, got 5"),
    ("room.rt60_s=[1,", "override 'room.rt60_s=[1,', line 1: while parsing a flow node expected the node content, but "
                        "found '<stream end>'"),
    ("room={a: 1, a: 2}", "override 'room={a: 1, a: 2}', line 1: key 'a' is given twice, first in line 1"),
])
def test_malformed_override_is_refused(override, message):
    with pytest.raises(ConfigError) as refusal:
        apply_overrides({"seed": 5}, [override])
    assert str(refusal.value) == message


@pytest.mark.parametrize("content, message", [
    ("", " must hold a mapping, section: {key: value}, got nothing (write {} for all defaults)"),
    ("- a\n- b\n", " must hold a mapping, section: {key: value}, got ['a', 'b']"),
    ("room:\n  num_src: 1\n  bank: 2\n  num_src: 3\n", ", line 4: key 'num_src' is given twice, first in line 2"),
    ("room: {}\nseed: 1\nroom: {}\n", ", line 3: key 'room' is given twice, first in line 1"),
    ("room:\n  a: [1, 2\n  b: 3\n", ", line 3: while parsing a flow sequence expected ',' or ']', but got ':'"),
    ("room:\n\tnum_src: 1\n", ", line 2: while scanning for the next token found character '\\t' that cannot start any "
                              "token"),
    ("a: 2020-02-31\n", ": day is out of range for month"),
    ("a: !!python/name:os.system x\n", ", line 1: could not determine a constructor for the tag "
                                       "'tag:yaml.org,2002:python/name:os.system'"),
    ("a: 1\n---\nb: 2\n", ", line 2: expected a single document in the stream but found another document"),
    ("[" * 1000, ": nested too deeply"),
], ids=range(10))
def test_bad_yaml_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as refusal:
        load_yaml(path)
    assert str(refusal.value) == f"{path}{message}"


def test_unreadable_file_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError) as refusal:
        load_config(RunConfig, tmp_path)                                # where a run is, for one
    assert str(refusal.value) == f"a configuration must come first, a YAML file, got {tmp_path}"
    for path, reason in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError) as refusal:
            load_yaml(path)
        assert str(refusal.value) == f"cannot read configuration {path}: {reason}"
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9t\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: unacceptable character #x00e9[^\n]*$"):
        load_yaml(tmp_path / "latin.yaml")


def test_merged_mapping_may_repeat_a_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  a: 3\n")
    assert load_yaml(path)["other"] == {"a": 3, "b": 2}


def test_the_command_prints_every_key_and_where_it_is_described(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 3}\n")
    assert main([str(path), "train.lr=0.5"]) == 0
    printed = capsys.readouterr().out
    assert "# ssl_gpu.optim.TrainConfig\ntrain:\n" in printed and "\n  lr: 0.5\n" in printed
    (tmp_path / "all.yaml").write_text(printed)
    assert load_config(RunConfig, tmp_path / "all.yaml") == load_config(RunConfig, path, ["train.lr=0.5"])
    assert set(load_yaml(tmp_path / "all.yaml")["train"]) == set(to_mapping(load_config(RunConfig, path))["train"])
    comments = [line for line in printed.splitlines() if line.startswith("#")]
    assert len(comments) == sum(not line.startswith((" ", "#")) for line in printed.splitlines())


@pytest.mark.parametrize("arguments, message", [
    (["nowhere.yaml"], "error: cannot read configuration nowhere.yaml: No such file or directory"),
    (["{path}", "train.lr=0"], "error: train.lr must be > 0, got 0.0")])
def test_the_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("train: {steps: 3}\n")
    assert main([argument.format(path="run.yaml") for argument in arguments]) == 2
    assert capsys.readouterr().err == message + "\n"
