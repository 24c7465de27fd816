"""Localisers with their weights: of a run, or of a small folder that travels, as the one inside this package.

    python -m ssl_gpu.pretrained RUN [target.KEY=VALUE ...] --out DIR [--evaluation FILE] [--force]

makes such a folder of a finished run; target.decoding, target.mirror and target.offsets may be others than in training.

weights.safetensors   the averaged weights, or the weights themselves where none were averaged, in at most 6 MB: in
                      float32 if they fit, else in float16; with how many steps and on which talkers they were trained
config.yaml           the run's configuration, without the places of its files: of a speech folder the last name is left
metrics.jsonl         the run's training log, thinned to 200 kB
result.json           the run's own evaluation, read as in training
evaluation.json       with --evaluation: a copy of a JSON file, for example of what ssl_gpu.evaluate --json wrote
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from ssl_gpu.commandline import begin_command
    begin_command()                                                    # before torch is loaded

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ssl_gpu import rng
from ssl_gpu.checkpoint import (CheckpointError, check_replaceable, load_checkpoint, replacing, replacing_folder,
                                write_json, write_text)
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.config import (ConfigError, RunConfig, apply_overrides, from_mapping, load_yaml, save_yaml,
                            told_changes)
from ssl_gpu.features import DelayMap
from ssl_gpu.localizer import Localizer
from ssl_gpu.model import ModelKind
from ssl_gpu.optim import TrainConfig
from ssl_gpu.simulator import SimulatorConfig

PACKAGED = Path(__file__).with_name("pretrained_weights")
WEIGHTS, CONFIG, METRICS, RESULT, EVALUATION = (
    "weights.safetensors", "config.yaml", "metrics.jsonl", "result.json", "evaluation.json")
OURS = re.compile("|".join(map(re.escape, (WEIGHTS, CONFIG, METRICS, RESULT, EVALUATION))))
FORMAT = 1  # raise it when an older ssl_gpu could no longer make sense of the file
ABOUT = "ssl_gpu"  # the one key of the metadata: safetensors writes several in an order that changes from run to run
READING = ("target.decoding", "target.mirror", "target.offsets")  # what evaluation alone looks at
MAX_WEIGHTS_BYTES = 6_000_000
MAX_LOG_BYTES = 200_000


@dataclass(frozen=True, eq=False)
class Weights:
    """state: the state dict of a localiser, name -> tensor. config: the nested mapping of its run's configuration.
    step, examples: on how many steps and mixtures it was trained. talkers: labels of the talkers that it heard then, as
    ssl_gpu.speech tells them apart, none of synthetic voices; None where an older ssl_gpu did not write them."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    step: int
    examples: int
    talkers: list[str] | None

    @property
    def digest(self) -> str:
        """Of names and values as they are stored: an export in float16 has another than its run."""
        found = hashlib.blake2b(digest_size=8)
        for name in sorted(self.state):
            values = self.state[name].detach().cpu().contiguous()
            found.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
            found.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def build_localizer(cfg: RunConfig) -> Localizer:
    """The localiser of a run, its weights drawn from train.seed. Raises ValueError for a scene it cannot serve."""
    seed = rng.generator(cfg.train.seed, rng.Split.TRAIN, rng.Stream.MODEL, 0).initial_seed()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Localizer(cfg.model, cfg.features, cfg.target, cfg.scene, cfg.rir.sample_rate)


def load_localizer(weights: Weights, cfg: RunConfig, path: str | Path, as_beginning: bool = False) -> Localizer:
    """The localiser of a configuration with weights that read_weights found at `path`, in train mode, on the CPU.

    as_beginning: training is to go on from the weights, and the network may have a gate that they lack, since a new one
    changes nothing until it is trained.
    Raises ValueError, in one line that names the path, where they do not fit.
    """
    localizer, state = build_localizer(cfg), weights.state
    check_symmetry(weights.config, cfg, path)
    if as_beginning and gets_gate(weights, cfg):
        state = copy(state)                                              # which keeps what torch hangs on it
        state.update({name: own for name, own in localizer.state_dict().items() if name.startswith("network.gate.")})
    try:
        localizer.load_state_dict(state)
    except RuntimeError as error:
        added = ("features.gate_bands",) if as_beginning and gets_gate(weights, cfg) else ()
        why = misfit(error, weights.config, cfg, added)
        raise ValueError(f"{path} does not fit the configuration: {why}") from error
    return localizer


def check_symmetry(before: Mapping[str, Any], cfg: RunConfig, path: str | Path) -> None:
    """Raises ValueError, in one line that names the path, where a symmetric network is to have the weights of one that
    was not, of a run of the configuration `before`."""
    if cfg.model.symmetric and not from_mapping(RunConfig, before).model.symmetric:
        raise ValueError(f"{path} does not fit the configuration: model.symmetric=true (was false), and weights "
                         f"trained without it are not symmetric")


def gets_gate(weights: Weights, cfg: RunConfig) -> bool:
    """Whether the network of a configuration has a gate, and the weights have none."""
    has_one = cfg.features.gate_bands > 0 and cfg.model.kind is not ModelKind.ORIGINAL
    return has_one and from_mapping(RunConfig, weights.config).features.gate_bands == 0


def misfit(error: Exception, before: Mapping[str, Any], cfg: RunConfig, fine: Collection[str] = ()) -> str:
    """Why weights of a run of the configuration `before` do not fit: the keys that differ, but those that may (fine),
    where load_state_dict has found other shapes, else the last line of the error."""
    last, changed = str(error).strip().splitlines()[-1].strip(), ""
    if isinstance(error, RuntimeError) and "in loading state_dict" in str(error):
        old = from_mapping(RunConfig, before)
        both = [name for name in ("mask_width", "patch_width")
                if getattr(cfg.features, name) > 0 and getattr(old.features, name) > 0]
        changed = told_changes(old, cfg, lambda key: shapes_weights(key, both) and key not in fine)
    return changed or last


def shapes_weights(key: str, both: Collection[str]) -> bool:
    """Whether the shapes of a localiser's weights may follow from a key of the configuration. both: of mask_width and
    patch_width those that neither has as 0: it learns masks, by a network that has a weight for every bin of the
    transform, and that network is one of patches."""
    if key in ("features.window", "features.band_hz", "features.mask_layers", "rir.sample_rate"):
        return "mask_width" in both
    if key == "features.patch_blocks":
        return "patch_width" in both
    if key in ("model.dropout", "model.channels_last", "model.freeze_stft", "model.symmetric", "features.hop"):
        return False
    return key in ("target.labels", "target.grid_deg", "scene.num_src") or key.startswith(("model.", "features."))


def tell_spacing(localizer: Localizer, cfg: RunConfig, spacing_m: float) -> None:
    """Tells a localiser, in place, that its microphones are spacing_m m apart at the simulator's speed of sound: its
    grid of delays is built anew. The original model has none, it has learned the spacing of its training."""
    if cfg.model.kind is not ModelKind.ORIGINAL:
        localizer.network.front = DelayMap(cfg.features, cfg.rir.sample_rate, spacing_m).to(localizer.grid.device)


def load_pretrained(path: str | Path | None = None) -> tuple[Localizer, RunConfig, str]:
    """A localiser in eval mode on the CPU, its configuration, and a line that describes both.

    path: as for read_weights, or None for the weights in this package. Raises ValueError, in one line, when the package
    holds none, for what cannot be read, and for weights that do not fit their configuration.
    """
    weights = read_weights(packaged() if path is None else path)
    cfg = from_mapping(RunConfig, weights.config)
    localizer = load_localizer(weights, cfg, PACKAGED if path is None else path)
    millions = sum(p.numel() for p in localizer.parameters()) / 1e6
    line = (f"{'the packaged weights' if path is None else path}: {cfg.model.kind.value} model, {millions:.2f} M "
            f"parameters, {weights.step} step{'s' * (weights.step != 1)}, for {cfg.scene.num_src} talkers and "
            f"microphones {spacing_text(cfg.scene.aperture)} apart")
    return localizer.eval(), cfg, line


def spacing_text(spacing_m: float) -> str:
    """A spacing in m for people: in cm below 1 m."""
    return f"{100 * spacing_m:.3g} cm" if spacing_m < 1 else f"{spacing_m:.3g} m"


def packaged() -> Path:
    """The folder of the weights in this package. Raises ValueError, in one line, when it holds none."""
    if not (PACKAGED / WEIGHTS).is_file():
        raise ValueError(f"this ssl_gpu was packaged without weights: name a run or a checkpoint, or train one and "
                         f"put it there by python -m ssl_gpu.pretrained RUN --out {PACKAGED}")
    return PACKAGED


def read_weights(path: str | Path) -> Weights:
    """The weights at `path`, a checkpoint.pt, the folder of its run, or a folder of `export`; averaged ones where there
    are.

    Raises CheckpointError or ConfigError, both ValueErrors of one line that names the file, for what cannot be read,
    and for a configuration in it that this ssl_gpu refuses.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        return _read_folder(path)
    there = None
    if not os.path.lexists(path):
        there = "there is nothing of that name"
    elif not path.is_dir():
        there = "name its folder" if path.name == WEIGHTS else \
            "that is a configuration" if path.suffix in (".yaml", ".yml") else None
    if there is not None:
        raise CheckpointError(f"weights must be a run, its checkpoint.pt or a folder of ssl_gpu.pretrained, got "
                              f"{path}: {there}")
    path = path / "checkpoint.pt" if path.is_dir() else path
    checkpoint = load_checkpoint(path)
    _check_stored(checkpoint.config, path)
    return Weights(checkpoint.ema or checkpoint.model, checkpoint.config, checkpoint.step,
                   trained_examples(checkpoint.extra, checkpoint.config, checkpoint.step),
                   trained_talkers(checkpoint.extra, checkpoint.config))


def training_record(path: str | Path, step: int) -> dict[str, Any]:
    """Of the result.json beside the weights at `path`, which were trained for `step` steps, what it says of the
    training: minutes, precision, steps_before and examples_before (of what it went on from); each None where there is
    none, or one of other steps."""
    folder, found = Path(path), {}
    try:
        found = json.loads(((folder if folder.is_dir() else folder.parent) / RESULT).read_bytes())
    except (OSError, ValueError):                                       # of a run under way, or moved alone
        pass
    found = found if isinstance(found, dict) and found.get("steps") == step else {}
    return {key: found.get(key) for key in ("minutes", "precision", "steps_before", "examples_before")}


def _check_stored(config: Mapping[str, Any], path: Path) -> None:
    """Raises ConfigError, naming the file at `path`, for a configuration in it that is none: of a newer ssl_gpu, with a
    key that this one has not, its error would read as if the user had mistyped an override."""
    try:
        from_mapping(RunConfig, config)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def trained_examples(about: Mapping[str, Any], config: Mapping[str, Any], step: int) -> int:
    """Weights.examples, from what stands beside weights (of a checkpoint: extra), their configuration and step."""
    examples = about.get("examples")
    return step * from_mapping(RunConfig, config).train.batch_size if examples is None else examples


def trained_talkers(about: Mapping[str, Any], config: Mapping[str, Any]) -> list[str] | None:
    """Weights.talkers, from what stands beside weights (of a checkpoint: extra) and the configuration of their run."""
    return about.get("talkers", None if (config.get("speech") or {}).get("train") else [])


def _read_folder(folder: Path) -> Weights:
    """What `export` wrote, in the dtype it is stored in. Raises CheckpointError or ConfigError."""
    path = folder / WEIGHTS
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get(ABOUT, "null"))
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is cut short, or no safetensors file: {reason}") from error
    if not isinstance(about, dict) or type(about.get("step")) is not int:
        raise CheckpointError(f"{path} holds no weights of ssl_gpu, though it is a safetensors file")
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path} is of format {about.get('format')}, this ssl_gpu reads {FORMAT}")
    config = load_yaml(folder / CONFIG)
    _check_stored(config, folder / CONFIG)
    return Weights(state, config, about["step"], trained_examples(about, config, about["step"]),
                   trained_talkers(about, config))


def export(run_folder: str | Path, target_folder: str | Path, evaluation: str | Path | None = None,
           force: bool = False, overrides: Sequence[str] = ()) -> None:
    """Writes the folder described above from a finished run; it is whole or not there.

    evaluation: a JSON file to copy into it. force: replace an earlier export in `target_folder`. overrides:
    "section.key=value" of how the network is read, READING.
    Raises ValueError, in one line, for other overrides, a run that is not finished or unusable, weights that float16
    cannot hold or that are too large, and a target that holds something (without force) or something else (with it);
    OSError for a disk that refuses.
    """
    run, target = Path(run_folder), Path(target_folder).expanduser().resolve()
    for text in overrides:
        if text.partition("=")[0].strip() not in READING:
            raise ValueError(f"an export may override {', '.join(READING)}, got {text}")
    check_replaceable(target, OURS, force)
    if not (run / RESULT).is_file():
        lacks = f"it holds no {RESULT}: --resume finishes a run" if run.is_dir() else "there is no such folder"
        raise ValueError(f"{run} must be the folder of a finished run, {lacks}")
    weights = read_weights(run)
    cfg = from_mapping(RunConfig, apply_overrides(weights.config, overrides))
    about = {"format": FORMAT, "step": weights.step, "examples": weights.examples, "talkers": weights.talkers}
    content = safetensors.torch.save(packed(load_localizer(weights, cfg, run).state_dict()), {ABOUT: json.dumps(about)})
    result = _read_json(run / RESULT)
    log = thinned_log(_read_text(run / METRICS))
    table = None if evaluation is None else _read_json(Path(evaluation))
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(target) as folder:
        with replacing(folder / WEIGHTS) as file:
            file.write(content)
        save_yaml(folder / CONFIG, without_places(cfg))
        write_text(folder / METRICS, log)
        write_json(folder / RESULT, result)
        if table is not None:
            write_json(folder / EVALUATION, table)


def packed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as it is stored: floats in float32 if all fits into 6 MB, else in float16.

    Of the 1.6 M model without masks, on 60 recordings of 3 s in a real room, float16 moves an angle by 0.001 degrees in
    the mean and by 0.003 at most; bfloat16, which has 8 bits where float16 has 11, by 0.010 and 0.046.
    Raises ValueError for numbers that are not finite there, and where float16 is too large as well.
    """
    size = {dtype: sum(value.numel() * (dtype.itemsize if value.is_floating_point() else value.itemsize)
                       for value in state.values()) for dtype in (torch.float32, torch.float16)}
    dtype = torch.float32 if size[torch.float32] <= MAX_WEIGHTS_BYTES else torch.float16
    if size[dtype] > MAX_WEIGHTS_BYTES:
        raise ValueError(f"weights must fit into {MAX_WEIGHTS_BYTES / 1e6:g} MB, got {size[dtype] / 1e6:.1f} MB in "
                         f"float16")
    stored = {}
    for name, value in state.items():
        stored[name] = (value.to(dtype) if value.is_floating_point() else value).contiguous().cpu()
        if not torch.isfinite(stored[name]).all():
            raise ValueError(f"weights must be finite in {str(dtype).removeprefix('torch.')}, {name} is not")
    return stored


def without_places(cfg: RunConfig) -> RunConfig:
    """The configuration without what belongs to the machine it ran on: its folders, its device, what is quick there.

    The last name of a speech folder stays: it tells what was heard, and null would stand for the synthetic voices. So
    does that of train.init.
    """
    train, evaluation = (folder and (os.path.basename(os.path.normpath(folder)) or None)
                         for folder in (cfg.speech.train, cfg.speech.eval))
    init = cfg.train.init and (os.path.basename(os.path.normpath(cfg.train.init)) or None)
    return replace(cfg, speech=replace(cfg.speech, train=train, eval=evaluation, cache_dir=None),
                   simulator=SimulatorConfig(),
                   train=replace(cfg.train, out=None, device=TrainConfig.device, init=init))


def log_lines(text: str) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, without those that a crash cut short."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [values for values in found if isinstance(values, dict) and "step" in values]


def thinned_log(text: str) -> str:
    """A metrics.jsonl of at most MAX_LOG_BYTES: every k-th line of training, and every evaluation, or every k-th, too.

    The last line of either kind stays. Lines that a crash cut short are left out.
    """
    training, evaluations = [], []
    for values in log_lines(text):
        (evaluations if "loss" not in values else training).append((values["step"], json.dumps(values) + "\n"))
    evaluations = _every_kth(evaluations, MAX_LOG_BYTES // 2)
    left = MAX_LOG_BYTES - sum(len(line.encode()) for _, line in evaluations)
    rows = _every_kth(training, left) + evaluations
    return "".join(line for _, line in sorted(rows, key=lambda row: row[0]))


def _every_kth(rows: list[tuple[int, str]], budget: int) -> list[tuple[int, str]]:
    """The rows backwards from the last, with the smallest step that keeps them within `budget` bytes."""
    for k in range(1, len(rows) + 1):
        kept = rows[::-k][::-1]
        if sum(len(line.encode()) for _, line in kept) <= budget:
            return kept
    return []


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must hold JSON: {error}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m ssl_gpu.pretrained", description=__doc__)
    parser.add_argument("run", help="the folder of a finished run")
    parser.add_overrides(f"how the network is to be read: {', '.join(READING)}", metavar="target.key=value")
    parser.add_argument("--out", required=True, metavar="DIR",
                        help=f"a new or empty folder; ssl_gpu.localize looks into ssl_gpu/{PACKAGED.name}")
    parser.add_argument("--evaluation", metavar="FILE", help="a JSON file to put beside the weights")
    parser.add_argument("--force", action="store_true", help="replace a folder that an earlier export wrote")
    args = parser.parse_intermixed_args(arguments)
    try:
        export(args.run, args.out, args.evaluation, args.force, args.overrides)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{args.out}: {sum(path.stat().st_size for path in Path(args.out).expanduser().iterdir()) / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    end_with(main)
