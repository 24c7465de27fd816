"""Files that a command writes when its work is done: refused before the work where they cannot be written, and after it
a failure of one costs no other."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path


def output_file(option: str, text: str | None) -> Path | None:
    """The file that an option names, ~ and links followed, so that what is checked here is what is written later; None
    for None.

    What is there already is to be replaced by a rename, which a folder would refuse and /dev/null not survive.
    Raises ValueError, in one line, for something there that is no regular file, and for a folder around it that is not
    there or not to be written to.
    """
    if text is None:
        return None
    path = _followed(text)
    if os.path.exists(path) and not os.path.isfile(path):
        kind = "folder" if os.path.isdir(path) else "special file"
        raise ValueError(f"{option} must be a file that can be replaced, got the {kind} {path}")
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


def _takes_files(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)
