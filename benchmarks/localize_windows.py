"""What backs the constants of ssl_gpu.localize: the error of any weights at other spacings than that of their training,
and in windows shorter than the clips of their training.

    python -m benchmarks.localize_windows [WEIGHTS] [section.key=value ...] [--clips N] [--json FILE]

Clips are clean, of the weights' own simulator, with rooms and talkers (speech.eval, or synthetic voices) that training
never meets. All rows have the same rooms, talkers and draws, so that they compare in pairs. Errors are of the cone
angle in degrees: mean of the smaller / of the larger +- standard error of their mean, and the share within 10.

off, %: the microphones stand further apart than in the training, or closer; told, the front end knows it (localize
--spacing), not told, it does not. window, s: the network hears the middle of each clip only, as it is or filled with
zeros up to a clip of the training; longer ones need speech as long, of speech.eval or speech.voices_duration_s.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from ssl_gpu import runtime
from ssl_gpu.checkpoint import write_json
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.config import RunConfig, apply_overrides, from_mapping, is_override
from ssl_gpu.doa import sorted_angles
from ssl_gpu.evalset import build_eval_set
from ssl_gpu.evaluate import check_speech_there, eval_speech
from ssl_gpu.localizer import scene_law
from ssl_gpu.model import shortest_clip
from ssl_gpu.outputs import output_file, write_each
from ssl_gpu.pretrained import load_localizer, packaged, read_weights, tell_spacing

OFF_PERCENT = (-50, -30, -20, -10, 0, 10, 20, 30, 50)
WINDOWS_S = (0.5, 1.0, 1.5, 2.0, 3.0)


class Measurement:
    """Weights, and clips of their own simulator for them. Raises ValueError for weights that cannot be used."""

    def __init__(self, path: str | None, overrides: Sequence[str], clips: int):
        path = packaged() if path is None else path
        weights = read_weights(path)
        self.cfg = from_mapping(RunConfig, apply_overrides(weights.config, overrides))
        if self.cfg.scene.mic_array_m is not None:
            raise ValueError("localize_windows needs weights of a scene.mic_spacing_m, these are of scene.mic_array_m")
        check_speech_there(self.cfg, overrides)
        self.device, self.clips = runtime.pick_device(self.cfg.train.device, "train.device"), clips
        self.localizer = load_localizer(weights, self.cfg, path).to(self.device).eval()
        self.step, self.speech = weights.step, eval_speech(self.cfg)
        self.shortest_s = shortest_clip(self.cfg.model, self.cfg.features) / self.cfg.rir.sample_rate
        self.law = scene_law(self.cfg.scene, self.cfg.train.seed)

    def hear(self, spacing_m: float, clip_s: float) -> tuple[Tensor, Tensor]:
        """audio [clip, mic, sample] and ascending cone angles [clip, src] rad of the scenes that are valid."""
        scene = replace(self.cfg.scene, mic_spacing_m=spacing_m, spacing_jitter_m=0.0)
        found = build_eval_set(replace(self.cfg.eval, num_clips=self.clips), scene, self.cfg.rir, self.cfg.ism,
                               self.speech, clip_s, self.law, self.device).mixture
        kept = found.scenes.valid.nonzero().squeeze(1)
        return found.audio[kept], sorted_angles(found.scenes.cone_angle)[kept]

    def errors(self, audio: Tensor, cone: Tensor) -> dict[str, Any]:
        """mae_deg [low, high], the standard error se_deg of the mean of both, and acc_at_10."""
        error = torch.rad2deg((self.localizer.estimate(audio, self.law)[1].double() - cone).abs())
        return {"mae_deg": error.mean(0).tolist(), "se_deg": float(error.mean(1).std() / len(error) ** 0.5),
                "acc_at_10": float((error <= 10).double().mean())}

    def by_spacing(self) -> list[dict[str, Any]]:
        """A row for each of OFF_PERCENT."""
        trained, rows = self.cfg.scene.mic_spacing_m, []
        for percent in OFF_PERCENT:
            spacing = trained * (1 + percent / 100)
            clips, row = self.hear(spacing, self.cfg.speech.clip_s), {"off_percent": percent}
            for name, known in (("told", spacing), ("not_told", trained)):
                tell_spacing(self.localizer, self.cfg, known)
                row[name] = self.errors(*clips)
            rows.append(row)
        tell_spacing(self.localizer, self.cfg, trained)
        return rows

    def by_window(self, lengths_s: Sequence[float]) -> list[dict[str, Any]]:
        """A row for each length, of the same clips."""
        rate, rows = self.cfg.rir.sample_rate, []
        audio, cone = self.hear(self.cfg.scene.mic_spacing_m, max(lengths_s))
        for length_s in lengths_s:
            length = round(length_s * rate)
            start = (audio.shape[-1] - length) // 2
            part, missing = audio[..., start:start + length], max(round(self.cfg.speech.clip_s * rate) - length, 0)
            rows.append({"window_s": length_s, "as_it_is": self.errors(part, cone),
                         "filled": self.errors(torch.nn.functional.pad(part, (0, missing)), cone)})
        return rows


def table(title: str, rows: list[dict[str, Any]]) -> str:
    """Rows as text: the number that each is of, and its errors."""
    first, *columns = rows[0]
    lines = [f"{title:<12}" + "".join(f"{name.replace('_', ' '):<34}" for name in columns).rstrip()]
    for row in rows:
        cells = (f"{found['mae_deg'][0]:.2f} / {found['mae_deg'][1]:.2f} +- {found['se_deg']:.2f}, "
                 f"{100 * found['acc_at_10']:.1f} %" for found in map(row.get, columns))
        lines.append(f"{row[first]:<12g}" + "".join(f"{cell:<34}" for cell in cells).rstrip())
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.localize_windows", description=__doc__)
    parser.add_argument("weights", nargs="?", help="as of evaluate; the packaged ones where they are left out")
    parser.add_overrides("for example speech.eval=DIR")
    parser.add_argument("--clips", type=common.positive, default=512, metavar="N", help="of a row, 512 by default")
    parser.add_argument("--windows", type=float, nargs="+", default=WINDOWS_S, metavar="SECONDS")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_intermixed_args(arguments)
    if args.weights is not None and is_override(args.weights):  # an override, since there are no weights
        args.weights, args.overrides = None, [args.weights, *args.overrides]
    try:
        target = output_file("--json", args.json)                       # before minutes of work
        if args.clips < 2:
            raise ValueError(f"--clips must be >= 2, for a standard error, got {args.clips}")
        found = Measurement(args.weights, args.overrides, args.clips)
        if min(args.windows) < found.shortest_s:
            raise ValueError(f"--windows must be >= {found.shortest_s:g} s, what the network takes, got "
                             f"{min(args.windows):g}")
        spacing, window = found.by_spacing(), found.by_window(args.windows)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table("off, %", spacing), "", table("window, s", window), sep="\n")
    if target is None:
        return 0
    content = {"command": common.told_command("localize_windows", arguments), "steps": found.step, "clips": args.clips,
               "spacing": spacing, "window": window}
    return write_each([(args.json, partial(write_json, target, content))])


if __name__ == "__main__":
    end_with(main)
