"""What a training run says while it goes on: metrics.jsonl, a progress bar, TensorBoard where it is installed."""
from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssl_gpu.checkpoint import write_text
from ssl_gpu.commandline import bar_interval
from ssl_gpu.pretrained import log_lines


class Log:
    """metrics.jsonl, the progress bar, and TensorBoard events where TensorBoard is installed."""

    def __init__(self, out: Path, share: float = 0.0, step: int = 0):
        """share: of the run, that is over as it begins, or goes on; step: done by then. What was logged of later ones,
        which a run that was killed did and that will be done again, is taken out, and so is the last evaluation of a
        run that ended before it had written its result."""
        path = out / "metrics.jsonl"
        if path.exists():
            kept = [line for line in log_lines(path.read_text(encoding="utf-8", errors="replace"))
                    if line["step"] < step or (line["step"] == step and (share < 1 or "loss" in line))]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file, self.full, self.shown = open(path, "a", encoding="utf-8", buffering=1), False, -math.inf
        self.bar = tqdm(total=100, initial=100 * min(share, 1.0), mininterval=max(0.5, bar_interval()),
                        bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}<{remaining}{postfix}")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.events = None
        else:
            self.events = SummaryWriter(out, purge_step=step + 1 if step else None)

    def write(self, values: dict[str, Any], share: float) -> None:
        """One line of metrics; numbers become TensorBoard scalars. A line that cannot be written is told of once: a
        disk that is full must not end a run."""
        try:
            self.file.write(json.dumps(values) + "\n")
        except OSError as error:
            if not self.full:
                self.warn(f"cannot write {self.file.name}: {error.strerror}; training goes on")
            self.full = True
        self.bar.update(100 * min(share, 1.0) - self.bar.n)
        if self.events is not None and not self.full:
            try:
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self.events.add_scalar(name, value, values["step"])
            except OSError as error:
                self.full = True
                self.warn(f"cannot write TensorBoard's events: {error.strerror}; training goes on")

    def skip(self, share: float) -> None:
        """The share of the run after an evaluation, of whose time the bar is to conclude nothing: with it 45 minutes
        that were left became 134."""
        self.bar.n = self.bar.last_print_n = 100 * min(share, 1.0)
        self.bar.last_print_t = self.bar._time()

    def show(self, text: str) -> None:
        """What stands behind the progress bar, at once but in a log file, which has a state of it every ten seconds."""
        due = time.monotonic() - self.shown >= bar_interval()
        self.bar.set_postfix_str(text, refresh=due)
        if due:
            self.shown = time.monotonic()

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        self.bar.write(text)

    def warn(self, text: str) -> None:
        """The same on stderr, as a warning."""
        self.bar.write(f"warning: {text}", file=sys.stderr)

    def close(self) -> None:
        """Closes the files and leaves the bar on the screen."""
        self.bar.close()
        with contextlib.suppress(OSError):                             # of which write has told
            self.file.close()
        if self.events is not None:
            with contextlib.suppress(OSError):
                self.events.close()
