"""Files that a command writes when its work is done: refused before the work where they cannot be written, and after it
a failure of one costs no other."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


BEGINNINGS = {"JSON": (b"{", b"["), "HTML": (b"<",)}  # of the files that commands write, by kind


def output_file(option: str, text: str | None, kind: str = "JSON") -> Path | None:
    """The file that an option names, ~ and links followed, so that what is checked here is what is written later; None
    for None.

    kind: of BEGINNINGS, what will be written. What is there already is to be replaced by a rename, which a folder would
    refuse and /dev/null not survive, and should be of the kind, or an option that was given the file to be read would
    destroy it.
    Raises ValueError, in one line, for something there that is no regular file or, unless empty, begins as no file of
    the kind does, and for a folder around it that is not there or not to be written to.
    """
    if text is None:
        return None
    path = _followed(text)
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "folder" if os.path.isdir(path) else "special file"
        raise ValueError(f"{option} must be a file that can be replaced, got the {kind} {path}")
    first = _first_byte(path)
    if first is not None and (first not in BEGINNINGS[kind] or path.suffix == ".jsonl"):  # the log of a run, not JSON
        raise ValueError(f"{option} must be a new file or one of {kind} to be replaced, got {text}, which is something "
                         f"else")
    if not os.path.isdir(path.parent):
        raise ValueError(f"{option} must be a file in an existing folder, got {text}")
    if not _takes_files(path.parent):
        raise ValueError(f"{option} must be a file in a folder that can be written to, got {text}")
    return path


def output_folder(option: str, text: str | None) -> Path | None:
    """Likewise a folder for files, which is there or can be made; it is not made here. Raises ValueError where not."""
    if text is None:
        return None
    path = there = _followed(text)
    while not os.path.exists(there):
        there = there.parent
    if not os.path.isdir(there) or not _takes_files(there):
        raise ValueError(f"{option} must be a folder that can be written to, or a place where one can be made, got "
                         f"{text}")
    return path


def write_each(outputs: Iterable[tuple[str, Callable[[], None]]]) -> int:
    """Calls all of (name, write) in their order; of one that fails a line on stderr says so, and the next one follows.

    Returns the exit status: 0, 1 where one failed, 130 where Ctrl-C ended it.
    """
    status = 0
    for name, write in outputs:
        try:
            write()
        except OSError as error:
            print(f"error: cannot write {name}: {error.strerror or error}", file=sys.stderr)
            status = 1
        except KeyboardInterrupt:
            print(f"interrupted before {name} was written", file=sys.stderr)
            return 130
    return status


def _followed(text: str) -> Path:
    """A path of the command line as a whole one. Not by pathlib, which raises for the ~ of a user who is not there."""
    return Path(os.path.realpath(os.path.expanduser(text)))


def _first_byte(path: Path) -> bytes | None:
    """Of a text, behind its mark and white space; None of an empty file, and where there is none or none that can be
    read."""
    try:
        with open(path, "rb") as file:
            return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] or None
    except OSError:
        return None


def _takes_files(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)
