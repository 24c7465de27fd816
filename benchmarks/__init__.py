"""Benchmarks anyone can run, from the root of the repository: python -m benchmarks.bench_rir and its neighbours."""
from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


def command(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit status that main() returns; after Ctrl-C with a line instead of a traceback and
    130. What was written until then stays."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
