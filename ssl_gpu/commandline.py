"""What the commands share: one line where a command line is wrong, one where Ctrl-C ends it."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


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


def end_with(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit status that main() returns; after Ctrl-C with a line instead of a traceback and
    130. What was written until then stays."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
