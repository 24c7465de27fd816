"""What each choice against the reference's laws changes: python -m ssl_gpu.fidelity --out DIR [--rooms N] [--seed S].

Prints, for every choice of RirConfig, measures with the reference's law and with the choice, and for every method of
simulation measures of the same rooms, and draws them, one PNG each in DIR. docs/fidelity.md is about them. Takes half a
minute on a core, and matplotlib.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Callable, Sequence

if __name__ == "__main__":
    from ssl_gpu.commandline import begin_command
    begin_command()                                                    # before torch is loaded

from ssl_gpu import rng
from ssl_gpu.choices import CHOICES
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.methods import method
from ssl_gpu.outputs import output_folder
from ssl_gpu.plots import require_matplotlib

FIGURES: dict[str, tuple[int, Callable[[Sequence, int, int], list[str]]]] = {**CHOICES, "method": (2, method)}


def draw(name: str, path: Path, rooms: int, seed: int) -> list[str]:
    """One figure as a PNG, and its numbers as lines. Raises ValueError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    panels, function = FIGURES[name]
    figure = Figure(figsize=(4.6 * panels + 0.4, 3.4), dpi=80, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    lines = function(axes, rooms, seed)
    for panel in axes:
        panel.grid(alpha=0.25)
    figure.savefig(path, metadata={"Software": None})  # its version would make the same picture another file
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m ssl_gpu.fidelity", description=__doc__)
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a folder for the figures")
    parser.add_argument("--rooms", type=int, default=100, metavar="N", help="draws per point (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all draws (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        if args.rooms < 2:
            raise ValueError(f"--rooms must be >= 2, got {args.rooms}")
        if not 0 <= args.seed <= rng.MAX_SEED:
            raise ValueError(f"--seed must satisfy 0 <= seed <= {rng.MAX_SEED}, got {args.seed}")
        require_matplotlib()
        folder = output_folder("--out", str(args.out))
        folder.mkdir(parents=True, exist_ok=True)
        for name in FIGURES:
            for line in draw(name, folder / f"{name}.png", args.rooms, args.seed):
                print(f"{name}: {line}", flush=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    end_with(main)
