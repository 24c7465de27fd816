"""Each lever of the main recipe for itself: the same short training without it.

    python -m benchmarks.ablations speech.train=DIR speech.eval=OTHER_DIR --out FILE.jsonl
    python -m benchmarks.ablations --table FILE.jsonl

A run is configs/librispeech.yaml with the overrides of a variant, for as many mixtures as --steps steps of 32 have. It
is judged on clips like those of e1, e1p, e1n5 and e2, but with scenes from the stream of validation, and speech.eval
should hold other talkers than those that a recipe is evaluated with in the end.
One line of FILE per run, written when it is done; runs that are in FILE already are not done again. So several
processes can share the work: each takes the variants that it is given. A run is known by the digest of all that is set
for it but its length, seed and folders: after a change of the recipe its rows are others.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from ssl_gpu import rng, runtime
from ssl_gpu.checks import shown
from ssl_gpu.clips import Digest, Truth, without_audio
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.config import RunConfig, apply_overrides, from_mapping, load_config, load_yaml
from ssl_gpu.evaluate import NO_RUN, eval_speech
from ssl_gpu.localizer import scene_law
from ssl_gpu.pretrained import load_localizer, read_weights
from ssl_gpu.protocol import LAW, SetOptions, clips_of
from ssl_gpu.scoring import score_angles
from ssl_gpu.train import main as train

CONFIG = common.ROOT / "configs" / "librispeech.yaml"
BATCH = 32  # mixtures in a step that --steps counts, as the recipe once had
COUNTS = {"e1": 1000, "e1p": 1000, "e1n5": 1000, "e2": 200}  # clips; rows of older files have no e1p
KEPT = ("cone_mae_deg", "cone_median_deg", "acc_at_5", "acc_at_10", "azimuth_class_mae_deg")
COLUMNS = (("e1", "cone_mae_deg", "cone MAE"), ("e1", "azimuth_class_mae_deg", "azimuth class MAE"),
           ("e1p", "cone_mae_deg", "cone MAE"), ("e1n5", "cone_mae_deg", "cone MAE"),
           ("e1n5", "acc_at_10", "within 10 degrees, %"), ("e2", "cone_mae_deg", "cone MAE"))
QUIET = ("eval.num_clips=64", "train.evaluations=1", "train.log_every=50", "target.offsets=1")
NOT_RECIPE = ("speech.train", "speech.eval", "train.seed", "train.steps", "train.out")
LEAST = ("variant", "seed", "steps", "scores")  # keys that a row has had from the first file on

# What is changed in training, and in the reading of a trained network, which needs no training of its own.
VARIANTS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "noise from the start": ("train.noise_warmup=0",),
    "noise from the start, 0.3": ("train.noise_warmup=0", "mixture.noise_probability=0.3"),
    "no noise": ("mixture.diffuse_snr_db=null", "mixture.sensor_snr_db=null"),
    "FRA-RIR alone": ("rir.hybrid_share=0",),
    "hybrid alone": ("rir.hybrid_share=1",),
    "azimuth": ("target.angle=azimuth",),
    "hard labels": ("target.labels=hard",),
    "labels of 5 degrees": ("target.sigma_deg=5",),
    "a grid of 1 degree": ("target.grid_deg=1",),
    "first 3 s of every utterance": ("speech.crop=first",),
    "earth mover's distance": ("target.emd_weight=1.0",),
    "no spacing jitter": ("scene.spacing_jitter_m=0",),
    "unlike microphones": ("mixture.mic_gain_db=1", "mixture.mic_phase_deg=10"),
    "a third of the scenes planar": ("scene.planar_share=0.33",),
    "levels -6 to 6 dB": ("mixture.level_difference_db=[-6, 6]",),
    "no masks": ("features.mask_width=0",),
    "masks of 8 layers": ("features.mask_layers=8",),  # 2.87 M parameters
    "patches": ("features.mask_width=128", "features.patch_width=64", "features.free_masks=3",  # configs/patches.yaml
                "target.mask_weight=10"),
    "symmetric patches": ("features.mask_width=128", "features.patch_width=64", "features.free_masks=3",
                          "target.mask_weight=10", "model.symmetric=true"),
    "no gate": ("features.gate_bands=0",),
    "16 bands": ("features.num_bands=16",),
    "17 delays": ("features.num_delays=17",),
    "16 channels": ("model.channels=16",),
    "16 channels, 5 blocks": ("model.channels=16", "model.depth=5"),  # 2.5 M parameters
    "16 channels, 176 wide": ("model.channels=16", "model.dim=176"),  # 2.9 M
    "windows of 16 ms": ("features.window=256", "features.hop=128"),  # which doubles the frames, and most of the cost
    "windows of 64 ms": ("features.window=1024",),
    "no averaging": ("train.ema=null",),
    "no warm-up": ("train.warmup=0",),
    "constant rate": ("train.lr_end=1",),
    "AdamW": ("train.optimizer=adamw", "train.lr=1e-3"),  # the better of 1e-3 and 2e-3
    "batches of 32": ("train.batch_size=32",),
    "batches of 8": ("train.batch_size=8",),
    "twice the rate": ("train.lr=4e-3",),
    "half the rate": ("train.lr=1e-3",),
    "300 rooms": ("scene.bank=300",),
}
READINGS: dict[str, tuple[str, ...]] = {  # of the recipe
    "": (), "not mirrored": ("target.mirror=false",), "four framings": ("target.offsets=4",),
    "expectation": ("target.decoding=expectation",), "argmax": ("target.decoding=argmax",)}


class Sets:
    """The clips of every set, made once, and kept."""

    def __init__(self, overrides: Sequence[str]):
        cfg = from_mapping(RunConfig, apply_overrides(NO_RUN, overrides))
        speech = eval_speech(cfg)
        self.law = scene_law(LAW, 0)
        self.audio, self.truth, self.digest = {}, {}, {}
        for name, count in COUNTS.items():
            digest, parts, self.audio[name] = Digest(), [], []
            options = SetOptions(speech, torch.device("cpu"), count, split=rng.Split.VALIDATION)
            for clips in clips_of(name, options):
                digest.add(clips)
                self.audio[name].append(clips.audio)
                parts.append(without_audio(clips))
            self.truth[name], self.digest[name] = Truth.of(parts), str(digest)

    @torch.no_grad()
    def score(self, run: Path, reading: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of the run's averaged weights, read as `reading` says: for every set the metrics KEPT."""
        weights = read_weights(run)
        cfg = from_mapping(RunConfig, apply_overrides(weights.config, reading))
        localizer = load_localizer(weights, cfg, run).eval()
        found = {}
        for name, parts in self.audio.items():
            pairs = [localizer.estimate(audio, self.law) for audio in parts]
            scores = score_angles(*(torch.cat(column) for column in zip(*pairs)), self.truth[name])
            interval = scores["interval_95"]
            found[name] = {key: scores[key] for key in KEPT} | {"interval_95": interval and interval["cone_mae_deg"]}
        return found


def recipe_digest(name: str, overrides: Sequence[str]) -> str:
    """Of everything that CONFIG, the command line and the variant set for training, in 16 hexadecimal digits."""
    mapping = apply_overrides(load_yaml(CONFIG), [*QUIET, *overrides, *VARIANTS[name]])
    for key in NOT_RECIPE:
        section, _, field = key.partition(".")
        mapping.get(section, {}).pop(field, None)
    mapping = {section: values for section, values in mapping.items() if values}
    return hashlib.sha256(json.dumps(mapping, sort_keys=True).encode()).hexdigest()[:16]


def one(name: str, seed: int, steps: int, overrides: Sequence[str], sets: Sets, plain: bool) -> dict[str, Any]:
    """Trains and judges one run, the recipe in all READINGS unless plain. Raises RuntimeError where training fails; it
    has said why."""
    begin = time.time()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = [str(CONFIG), *QUIET, *overrides, *VARIANTS[name], f"train.seed={seed}", f"train.out={run}"]
        batch = load_config(RunConfig, CONFIG, arguments[1:]).train.batch_size
        arguments.append(f"train.steps={steps * BATCH // batch}")
        if (status := train(arguments)) == 130:                        # Ctrl-C, of which it has told
            raise KeyboardInterrupt
        if status:
            raise RuntimeError(f"training of {name!r} failed")
        minutes = (time.time() - begin) / 60
        readings = {"": ()} if VARIANTS[name] or plain else READINGS
        scores = {reading: sets.score(run, how) for reading, how in readings.items()}
    return {"variant": name, "seed": seed, "steps": steps, "overrides": list(VARIANTS[name]),
            "recipe": recipe_digest(name, overrides), "minutes": minutes,
            "date": date.today().isoformat(), "commit": common.commit(), "versions": runtime.versions(),
            "device": runtime.device_name(torch.device("cpu")), "eval_digest": sets.digest, "scores": scores}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: the errors COLUMNS, mean of both talkers; over seeds their mean and range."""
    lines = ["| variant | seeds | " + " | ".join(f"{name}: {what}" for name, _, what in COLUMNS) + " |",
             "|---" * (2 + len(COLUMNS)) + "|"]
    keys = dict.fromkeys((*_kind(row), reading) for row in rows for reading in row["scores"])
    for *kind, reading in keys:
        same = [row["scores"][reading] for row in rows if _kind(row) == tuple(kind) and reading in row["scores"]]
        variant = kind[0]
        cells = [_cell([score[name][key] for score in same if key in score.get(name, {})]) for name, key, _ in COLUMNS]
        lines.append(f"| {', '.join(filter(None, (variant, reading)))} | {len(same)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kind(row: dict[str, Any]) -> tuple[str, int, str | None]:
    """What seeds of one run have in common; older files have no digests."""
    return row["variant"], row["steps"], row.get("recipe")


def _cell(values: Sequence[float | list[float]]) -> str:
    """Of several seeds: the share in percent, or the error in degrees."""
    if not values:
        return ""
    scale, digits = (1.0, 2) if isinstance(values[0], list) else (100.0, 1)
    means = [scale * (statistics.mean(value) if isinstance(value, list) else value) for value in values]
    spread = f" ({min(means):.{digits}f} to {max(means):.{digits}f})" if len(means) > 1 else ""
    return f"{statistics.mean(means):.{digits}f}{spread}"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where it is not there. Raises ValueError for a line that is no row, as a crash leaves
    one, and OSError."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else (), 1):
        try:
            row = json.loads(line)
        except ValueError:                                              # no JSON, or bytes of no encoding
            row = None
        if not isinstance(row, dict) or not row.keys() >= set(LEAST):
            raise ValueError(f"{path}, line {number} must be a JSON mapping with {', '.join(LEAST)}, got "
                             f"{shown(line.decode(errors='replace'))}")
        rows.append(row)
    return rows


def append(path: Path, text: str) -> None:
    """Adds to the file, which is made where it is not there. Raises ValueError, in one line, where it cannot be
    written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"--out must be a file that can be appended to, got {path}: {error.strerror}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.ablations", description=__doc__)
    parser.add_overrides("of every run: speech.train=DIR speech.eval=OTHER_DIR, and speech.* alone for the clips "
                         "that it is judged on")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append one JSON line per run")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of such a file")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME",
                        help=f"of {', '.join(VARIANTS)} (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N")
    parser.add_argument("--plain", action="store_true", help="the recipe without its other readings, which take "
                        "as long as its training; they cannot be added to its row later")
    parser.add_argument("--steps", type=int, default=500, help="of 32 mixtures (default 500)")
    args = parser.parse_intermixed_args(arguments)
    if args.table is None and args.out is None:
        parser.error("--out or --table must be given")
    try:
        if args.table is not None:
            if not args.table.is_file():
                raise ValueError(f"--table must be a file of such results, got {args.table}")
            print(table(read(args.table)))
        else:
            work(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def work(args: argparse.Namespace) -> None:
    """Makes the rows that --out is to have and has not. Raises ValueError for what cannot be used, and what one
    raises."""
    out = Path(os.path.expanduser(args.out))
    append(out, "")                                                     # what cannot be, is told before a training
    read(out)
    sets = Sets([text for text in args.overrides if text.startswith("speech.")])
    for seed in args.seeds:
        for name in args.variants:
            wanted = (name, args.steps, recipe_digest(name, args.overrides))
            if any((wanted, seed) == (_kind(row), row["seed"]) for row in read(out)):
                continue
            row = one(name, seed, args.steps, args.overrides, sets, args.plain)
            print(table([row]), flush=True)
            append(out, json.dumps(row) + "\n")


if __name__ == "__main__":
    end_with(main)
