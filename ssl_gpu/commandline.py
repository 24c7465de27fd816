"""What the commands share: a line where a command line is wrong, and one where Ctrl-C ends them, but not anywhere."""
from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn


def begin_command() -> None:
    """What a command does before it imports torch, which takes seconds.

    Threads that wait at the end of a parallel region are to sleep instead of spinning, which OpenMP reads as it is
    loaded: on two cores that others use too, a step on two threads took 0.7 s instead of 3.7 s. And Ctrl-C ends it at
    once, until `end_with` has a line for it, instead of telling where in the imports it was.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as behind nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def bar_interval() -> float:
    """Seconds between two states of a progress bar on standard error, which a log file keeps one behind the other."""
    return 0.1 if sys.stderr.isatty() else 10.0


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that tells what is wrong in one line, as our errors are, where argparse writes the usage before
    it: of some commands that is ten lines, which --help has, too. Descriptions keep their line breaks."""

    def __init__(self, **kwargs):
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2 and a line on stderr."""
        self.exit(2, f"error: {message}; options are listed by {self.prog} --help\n")

    def add_overrides(self, example: str, metavar: str = "section.key=value") -> None:
        """The words of a command line, any number of them, that change a configuration."""
        # default: without it argparse calls them required where something else is missing.
        self.add_argument("overrides", nargs="*", default=[], metavar=metavar, help=example)


def told(module: str, arguments: Sequence[str]) -> str:
    """The command line `python -m module ARGUMENTS` as results have it that others may read: without --json, and of
    files and folders the last name, those that are not there yet, too."""
    words, shown = list(arguments), []
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        if not equals or os.sep in key or os.path.exists(word):         # no override, but perhaps a path
            key, equals, value = "", "", word
        if word == "--json":
            del words[:1]
        elif key != "--json":
            path = os.path.exists(value) or os.sep in value
            shown.append(key + equals + os.path.basename(os.path.abspath(value)) if path else word)
    return shlex.join(["python", "-m", module, *shown])


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A block that is done as a whole: Ctrl-C or SIGTERM, where they are handled in Python, come behind it. Nothing is
    done in another thread than the main one, in which Python handles signals."""
    came, before = [], {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in handlers.items() if callable(handler)}
    try:
        for number in before:
            signal.signal(number, lambda *arguments: came.append(arguments))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in came:
        before[number](number, frame)


def end_with(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit status that main() returns; after Ctrl-C with a line instead of a traceback and
    130. What was written until then stays."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:              # of `begin_command`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
