"""Files that a command writes at its end: what cannot be written is told before the work, and costs no other file."""
import os
from pathlib import Path

import pytest

from ssl_gpu.outputs import output_file, output_folder, write_each


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder that is the user's home, too, with a file, a pipe and a folder nobody may write to. Root may
    write everywhere, so that it is os.access that says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "old.json").write_text("{}")
    (tmp_path / "locked").mkdir()
    os.mkfifo(tmp_path / "pipe")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (
        mode & os.W_OK and Path(path).name == "locked"))
    return tmp_path


@pytest.mark.parametrize("text, expected", [
    ("a.json", "a.json"), ("~/a.json", "a.json"), ("old.json", "old.json"), ("link.json", "old.json"),
    ("dangling.json", "new.json")])
def test_checked_path_is_the_one_to_write(text, expected, place):
    """Of a link the file behind it: a rename would take the link's place."""
    (place / "link.json").symlink_to("old.json")
    (place / "dangling.json").symlink_to("new.json")
    before = sorted(place.iterdir())
    assert output_file("--json", text) == place / expected
    assert sorted(place.iterdir()) == before


def test_an_option_that_is_not_given_names_nothing():
    assert output_file("--json", None) is None and output_folder("--manifest", None) is None


@pytest.mark.parametrize("text, message", [
    ("locked", "--json must be a file that can be replaced, got the folder {place}/locked"),
    ("", "--json must be a file that can be replaced, got the folder {place}"),
    ("~", "--json must be a file that can be replaced, got the folder {place}"),
    ("pipe", "--json must be a file that can be replaced, got the special file {place}/pipe"),
    ("nowhere/a.json", "--json must be a file in an existing folder, got nowhere/a.json"),
    ("old.json/a.json", "--json must be a file in an existing folder, got old.json/a.json"),
    ("~nobody-of-this-name/a.json", "--json must be a file in an existing folder, got ~nobody-of-this-name/a.json"),
    ("locked/a.json", "--json must be a file in a folder that can be written to, got locked/a.json"),
])
def test_file_that_cannot_be_written_is_named(text, message, place):
    with pytest.raises(ValueError) as error:
        output_file("--json", text)
    assert str(error.value) == message.format(place=place)


@pytest.mark.parametrize("content, kind, fits", [
    (b"", "JSON", True), (b"\n  [1]", "JSON", True), (b"\xef\xbb\xbf{", "JSON", True),
    (b"{", "HTML", False), (b"<!doctype html>", "HTML", True),
    (b"<p>", "JSON", False), (b"RIFF", "JSON", False), (b"PK", "HTML", False)])
def test_only_files_of_its_kind_are_replaced(content, kind, fits, place):
    (place / "there").write_bytes(content)
    if fits:
        assert output_file("--out", "there", kind) == place / "there"
        return
    with pytest.raises(ValueError) as error:
        output_file("--out", "there", kind)
    assert str(error.value) == (f"--out must be a new file or one of {kind} to be replaced, got there, which is "
                                "something else")


def test_log_of_a_run_is_not_replaced(place):
    (place / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="^--json must be a new file or one of JSON to be replaced, got metrics.jsonl"):
        output_file("--json", "metrics.jsonl")


def test_folder_is_there_or_can_be_made(place):
    """And is not made yet."""
    before = sorted(place.iterdir())
    for text, expected in ((".", place), ("~/a/b", place / "a" / "b"), ("a", place / "a")):
        assert output_folder("--manifest", text) == expected
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize("text", ["old.json", "old.json/a", "locked", "locked/a/b", "pipe"])
def test_folder_that_cannot_be_made_is_named(text, place):
    with pytest.raises(ValueError) as error:
        output_folder("--manifest", text)
    assert str(error.value) == ("--manifest must be a folder that can be written to, or a place where one can be made, "
                                f"got {text}")


def fail(error):
    raise error


def test_what_fails_is_named_and_costs_nothing_else(capsys):
    done = []
    assert write_each([("a", lambda: done.append("a")), ("b", lambda: fail(OSError(28, "No space left on device"))),
                       ("c", lambda: done.append("c"))]) == 1
    assert done == ["a", "c"]
    assert capsys.readouterr().err == "error: cannot write b: No space left on device\n"
    with pytest.raises(ZeroDivisionError):                              # a mistake of ours keeps its traceback
        write_each([("a", lambda: 1 / 0)])
    assert write_each([("a", lambda: done.append("a"))]) == 0 and write_each([]) == 0
    assert capsys.readouterr().err == ""


def test_an_interruption_ends_it(capsys):
    done = []
    assert write_each([("a", lambda: fail(KeyboardInterrupt())), ("b", lambda: done.append("b"))]) == 130
    assert done == [] and capsys.readouterr().err == "interrupted before a was written\n"
