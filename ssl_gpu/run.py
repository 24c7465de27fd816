"""A training run: what it consists of, from the command line to the first step, and to and from its checkpoint."""
from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ssl_gpu import rng, runtime
from ssl_gpu.checkpoint import Checkpoint, CheckpointError, holding, load_checkpoint, save_checkpoint
from ssl_gpu.config import (ConfigError, RunConfig, apply_overrides, from_mapping, to_mapping, told_changes,
                            walk_fields)
from ssl_gpu.corpus import find_audio
from ssl_gpu.evalset import EvalSet, score_model
from ssl_gpu.evaluate import eval_speech, prepare_eval
from ssl_gpu.features import FeatureConfig
from ssl_gpu.lanes import separable
from ssl_gpu.localizer import Localizer
from ssl_gpu.optim import Averaged, Precision, Together, TrainConfig, build_optimizer, restore_optimizer
from ssl_gpu.original import NUM_EVAL_SCENES
from ssl_gpu.pool import eval_rooms_in
from ssl_gpu.pretrained import (Weights, build_localizer, check_symmetry, gets_gate, load_localizer, misfit, packaged,
                                read_weights, trained_examples, trained_talkers)
from ssl_gpu.report import announced
from ssl_gpu.rir import Method
from ssl_gpu.scene import SceneConfig
from ssl_gpu.simulator import Simulator
from ssl_gpu.speech import SpeechBank, SpeechConfig, SpeechError, load_bank, voices_bank

PACKAGED_WEIGHTS = "packaged"  # what train.init says for those in this package
WHICH_RUN = ("train.steps", "train.max_minutes", "train.out")  # where it is and how long; the rest is how it trains


@dataclass(eq=False)
class Run:
    """Everything that a run needs, made and checked before the first file is written."""

    cfg: RunConfig
    out: Path
    device: torch.device
    speech: SpeechBank
    simulator: Simulator
    eval_set: EvalSet
    fixed: dict[str, Any]
    localizer: Localizer
    averaged: Averaged | None
    optimizer: torch.optim.Optimizer | Together
    step: int = 0              # done, with those before train.init
    first: int = 0             # the step that the run began at: those before train.init
    examples: int = 0          # mixtures heard, with those before train.init
    first_examples: int = 0    # those before train.init
    share: float = 0.0         # of the run that is over
    evaluated: float = 0.0     # the share at which it was evaluated last
    invalid: int | torch.Tensor = 0  # scenes that broke their law, and did not count
    elapsed_s: float = 0.0     # of earlier parts of a resumed run
    eval_s: float = 0.0        # the longest that an evaluation took
    step_s: float = 0.0        # what a step takes, the slowest of late
    bfloat16: bool = False     # what train.precision has come to
    graph: bool = False        # what train.graph has come to
    command: str = ""          # the command line (commandline.told), that of the last part of a resumed run
    settings: str = ""         # of a resumed run: which it goes on with
    file: dict[str, Any] | None = None  # what stood in the configuration file, as the run began
    talkers: list[str] | None = None  # labels of those heard in training; None: unknown, of a run begun without them
    threads: int = field(default_factory=torch.get_num_threads)  # of the CPU, for evaluations


def newest_run(name: str) -> Path:
    """The run folder runs/<name>-<date> that was written last. Raises ValueError when there is none to resume."""
    ours = re.compile(re.escape(name) + r"-\d{8}-\d{6}(-\d+)?")
    found = [p.parent for p in Path("runs").glob("*/checkpoint.pt") if ours.fullmatch(p.parent.name)]
    if not found:
        raise ValueError(f"--resume found no runs/{name}-*/checkpoint.pt; name the folder with train.out=DIR")
    return max(found, key=lambda folder: (folder / "checkpoint.pt").stat().st_mtime)


def check_resumable(out: Path) -> None:
    """Raises ValueError for a folder without a checkpoint to go on from."""
    if not (out / "checkpoint.pt").is_file():
        emptied = " once it is empty" if out.exists() and (not out.is_dir() or any(out.iterdir())) else ""
        raise ValueError(f"--resume found nothing to resume in train.out={out}, which has no checkpoint.pt; the same "
                         f"command without --resume starts anew{emptied}")


def setup(args: argparse.Namespace, held: contextlib.ExitStack, file: Mapping[str, Any]
          ) -> tuple[RunConfig, Path, Checkpoint | None]:
    """What the command line asks for, whose configuration file holds `file`: configuration, run folder, and the
    checkpoint to resume, if any, whose folder is held from then on (checkpoint.holding). Raises ValueError with a line
    for the user.

    A resumed run keeps the configuration in its checkpoint, and only the overrides change it.
    """
    cfg = from_mapping(RunConfig, apply_overrides(file, args.overrides))
    name, resumed = Path(args.config).stem, None
    if args.resume:
        out = Path(cfg.train.out).expanduser() if cfg.train.out else newest_run(name)
        check_resumable(out)
        check_writable(out)
        held.enter_context(holding(out))                               # or another process may go on meanwhile
        resumed = load_checkpoint(out / "checkpoint.pt")
        try:
            before = from_mapping(RunConfig, resumed.config)
        except ValueError as error:
            raise ValueError(f"{out / 'checkpoint.pt'}: {error}") from error
        cfg = from_mapping(RunConfig, apply_overrides(resumed.config, args.overrides))
    if resumed is None:
        cfg = replace(cfg, train=replace(cfg.train, init=whole_path(cfg.train.init)))
    else:                                                              # nothing is read from there any more
        began = before.train.init
        if whole_path(cfg.train.init) != whole_path(began):
            raise ValueError(f"train.init must stay that of the run that --resume goes on with, "
                             f"{'null' if began is None else began}, got {cfg.train.init}")
        cfg = replace(cfg, train=replace(cfg.train, init=began))
    cfg = with_whole_folders(cfg)
    if resumed is not None:
        return cfg, out, resumed
    out = Path(cfg.train.out or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}").expanduser()
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"train.out must be a new or empty folder, or go on with --resume, got {out}")
    check_writable(out)
    return cfg, out, None


def with_whole_folders(cfg: RunConfig) -> RunConfig:
    """With speech as it is known from everywhere: a checkpoint is evaluated from anywhere."""
    folders = {key: str(Path(value).expanduser().resolve()) for key in ("train", "eval")
               if (value := getattr(cfg.speech, key)) is not None}
    return replace(cfg, speech=replace(cfg.speech, **folders))


def check_writable(out: Path) -> None:
    """Raises ValueError, before minutes of preparation, for a folder that can be neither written to nor made."""
    there = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"train.out must be a folder that can be written to, got {out}: no permission in {there}")


def claim_folder(run: Run) -> None:
    """Makes the folder of a new run; one without train.out counts up where others of its second have the name, as runs
    that are started together do. Raises ValueError where another run has begun in train.out, OSError as mkdir does."""
    run.out.parent.mkdir(parents=True, exist_ok=True)
    if run.cfg.train.out is not None:
        run.out.mkdir(exist_ok=True)
        if any(run.out.iterdir()):
            raise ValueError(f"train.out must be a new or empty folder, another run has begun in {run.out}")
        return
    first = run.out.name
    for number in itertools.count(2):
        try:
            run.out.mkdir()
            return
        except FileExistsError:
            run.out = run.out.with_name(f"{first}-{number}")


def whole_path(init: str | None) -> str | None:
    """train.init with a folder as it is known from everywhere."""
    return init if init in (None, PACKAGED_WEIGHTS) else str(Path(init).expanduser().resolve())


def told_finished(cfg: RunConfig, out: Path, resumed: Checkpoint) -> str | None:
    """A line where a run is over and has its result; None where there is something to do."""
    if share_done(cfg.train, resumed) < 1 or not (out / "result.json").is_file():
        return None
    steps, done = cfg.train.steps, resumed.step - resumed.extra.get("first", 0)
    by_time = steps is None or done < steps
    more = f"train.max_minutes > {cfg.train.max_minutes:g}" if by_time else f"train.steps > {done}"
    changed = list(changes(cfg, resumed))
    idle = f" ({', '.join(changed)}, given now, change{'s' * (len(changed) == 1)} nothing)" if changed else ""
    return (f"{out} is finished, after {done} step{'s' * (done != 1)}; {out}/result.json stays as it is{idle}. Go on "
            f"with {more}, or begin a new run with train.init={out}")


def changes(cfg: RunConfig, resumed: Checkpoint) -> Iterator[str]:
    """The keys, but those of WHICH_RUN, whose values are others than in the run that goes on."""
    before = dict(walk_fields(from_mapping(RunConfig, resumed.config)))
    return (key for key, value in walk_fields(cfg) if key not in WHICH_RUN and value != before[key])


def settings(cfg: RunConfig, resumed: Checkpoint) -> str:
    """With which settings a resumed run goes on, told to the user."""
    changed = told_changes(from_mapping(RunConfig, resumed.config), cfg, lambda key: key not in WHICH_RUN)
    return "the settings of its checkpoint" + (f", but {changed}" if changed else "")


def told_overlooked(args: argparse.Namespace, file: Mapping[str, Any], cfg: RunConfig, resumed: Checkpoint,
                    finished: bool) -> str | None:
    """A warning of what the configuration file says otherwise than the resumed run does, which goes by its checkpoint,
    and than the file did that it began with; None where there is nothing, or nothing that a finished run would do."""
    before = resumed.extra.get("file")                                  # none of a run begun without it
    if before is None:
        return None
    now, before = (dict(walk_raw(mapping)) for mapping in (file, before))
    changed = {key for key in {*now, *before} if key not in now or key not in before or now[key] != before[key]}
    changed -= {"train.out", "train.init"}                              # by which the run was found; which it had
    if finished:
        changed &= {*WHICH_RUN}
    asked = with_whole_folders(from_mapping(RunConfig, apply_overrides(file, args.overrides)))
    told = told_changes(asked, cfg, changed.__contains__, f"{args.config}: ")
    return f"warning: --resume keeps {told}, which the command line alone changes" if told else None


def walk_raw(mapping: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Keys and values as they stand in a configuration file."""
    return ((f"{section}.{key}", value) for section, values in mapping.items() if isinstance(values, Mapping)
            for key, value in values.items())


def check_steps_left(train: TrainConfig, resumed: Checkpoint) -> None:
    """Raises ValueError for train.steps that a run which is not over has more of."""
    done = resumed.step - resumed.extra.get("first", 0)
    if train.steps is not None and done > train.steps:
        raise ValueError(f"train.steps must be >= {done}, the steps that the run to --resume has taken, "
                         f"got {train.steps}")


def share_done(train: TrainConfig, resumed: Checkpoint) -> float:
    """The share of a run that was over at its checkpoint, by a configuration that may have given it more since."""
    by_step = 0.0 if train.steps is None else (resumed.step - resumed.extra.get("first", 0)) / train.steps
    if train.max_minutes is None:
        return by_step
    share, before = resumed.extra.get("share", 0.0), resumed.config["train"]
    if (train.steps, train.max_minutes) != (before.get("steps"), before.get("max_minutes")):
        share = min(share, resumed.extra.get("elapsed_s", 0.0) / (60 * train.max_minutes))
    return max(by_step, share)


def check_speech(cfg: SpeechConfig) -> None:
    """Raises SpeechError for only one of speech.train and speech.eval, and for a folder without audio: before minutes
    of decoding the other one."""
    named = {name: folder for name in ("train", "eval") if (folder := getattr(cfg, name)) is not None}
    for name, folder in named.items():
        find_audio(folder, f"speech.{name}")
    if len(named) == 1:
        missing = "eval" if "train" in named else "train"
        raise SpeechError(f"speech.{missing} must be a folder too when the other one is, got null")


def training_speech(cfg: RunConfig, device: torch.device, held_out: Collection[str] = ()) -> SpeechBank:
    """The training speech, on the device where it fits: speech.train without the talkers held_out, who are those of
    speech.eval; or the synthetic voices, which are no evaluation's.

    Raises SpeechError for an unusable folder, and for fewer speakers than sources.
    """
    if cfg.speech.train is None:
        generator = rng.generator(cfg.train.seed, rng.Split.TRAIN, rng.Stream.VOICES, 0, device=device)
        with announced("making synthetic voices to train with, as speech.train names no speech"):
            bank = voices_bank(cfg.speech, sample_rate=cfg.rir.sample_rate, generator=generator)
    else:
        bank = load_bank(cfg.speech.train, cfg.speech, sample_rate=cfg.rir.sample_rate, device=device,
                         free_bytes=runtime.free_bytes(device), called="speech.train", held_out=held_out)
    if bank.num_speakers < cfg.scene.num_src:
        which = ", one per source" + (" and none of them in speech.eval" if held_out else "")
        raise SpeechError(f"speech.train must hold at least {cfg.scene.num_src} speakers{which}, got "
                          f"{bank.num_speakers}")
    return bank


def initial_weights(cfg: RunConfig) -> Weights | None:
    """The weights that train.init names. Raises ValueError for some that cannot be read or hide a leak."""
    if cfg.train.init is None:
        return None
    try:
        weights = read_weights(packaged() if cfg.train.init == PACKAGED_WEIGHTS else cfg.train.init)
    except (CheckpointError, ConfigError) as error:
        raise ValueError(f"train.init: {error} ({PACKAGED_WEIGHTS} would be those of ssl_gpu)") from error
    check_rooms_kept(weights.config, cfg.scene)
    return weights


def begun_from(weights: Weights, cfg: RunConfig) -> Localizer:
    """The localiser of a run that starts from weights of train.init, and a line about what is not theirs. Raises
    ValueError where they do not fit."""
    localizer = load_localizer(weights, cfg, f"train.init={cfg.train.init}", as_beginning=True)
    if gets_gate(weights, cfg):
        print(f"the network gets a gate, features.gate_bands={cfg.features.gate_bands}, which the weights of "
              f"train.init={cfg.train.init} lack")
    if from_mapping(RunConfig, weights.config).model.symmetric and localizer.mirror is None:
        print(f"warning: the weights of train.init={cfg.train.init} are symmetric and will not stay so: "
              f"model.symmetric=true keeps them", file=sys.stderr)
    others = [name for name, made_for, asked in _meanings(from_mapping(RunConfig, weights.config), cfg)
              if made_for != asked and name != "features.gate_bands"]
    if others:
        print(f"warning: the weights of train.init={cfg.train.init} were trained for another {', '.join(others)}",
              file=sys.stderr)
    return localizer


def _meanings(first: RunConfig, second: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, value) of what a network's input and output mean, whatever the shapes of its weights."""
    for section, names in (("target", ("angle", "labels", "grid_deg")), ("rir", ("sample_rate",)),
                           ("features", [field.name for field in fields(FeatureConfig)])):
        for name in names:
            yield (f"{section}.{name}", *(getattr(getattr(cfg, section), name) for cfg in (first, second)))


def check_rooms_kept(before: Mapping[str, Any], scene: SceneConfig) -> None:
    """Raises ValueError for a run that goes on from one in the original's rooms without them: evaluation finds a leak
    by the configuration of the last, which this would hide."""
    trained, goes_on = map(eval_rooms_in, (from_mapping(SceneConfig, before.get("scene", {}), "scene"), scene))
    if goes_on < trained:
        raise ValueError(f"scene.pool and scene.bank must keep the {trained} rooms of e0 that it was trained in, "
                         f"got {goes_on} of them")


def prepare(cfg: RunConfig, out: Path, resumed: Checkpoint | None) -> Run:
    """Build everything. Raises ValueError, naming key, value and rule, for whatever cannot be used."""
    device = runtime.pick_device(cfg.train.device, "train.device")
    uses_graph(cfg, device, None)                                      # before anything that takes long, as is
    cfg.simulator.fused_on(device)
    initial = initial_weights(cfg) if resumed is None else None
    localizer = build_localizer(cfg) if initial is None else begun_from(initial, cfg)
    if resumed is not None:
        check_symmetry(resumed.config, cfg, out)
        check_optimizer(resumed, cfg)
        with fitting(cfg, out, resumed):                               # or it would be told after minutes
            localizer.load_state_dict(resumed.model)
    check_lanes(cfg.train.lanes, device, localizer)
    check_speech(cfg.speech)
    unheard = eval_speech(cfg, cfg.scene.num_src)                      # first: training is to leave its talkers out
    speech = training_speech(cfg, device, unheard.talkers)
    before = [] if initial is None else initial.talkers
    if resumed is not None:
        before = trained_talkers(resumed.extra, resumed.config)
    talkers = None if before is None else sorted({*before, *speech.talkers})
    eval_set, fixed = prepare_eval(cfg, device, unheard, talkers)
    simulator = Simulator(cfg.scene, replace(cfg.rir, early=False), cfg.mixture, cfg.simulator, cfg.ism)
    if eval_rooms_in(cfg.scene) > 0:
        print(f"warning: scene.pool=original trains in {eval_rooms_in(cfg.scene)} of the {NUM_EVAL_SCENES} rooms of "
              f"e0: results on e0 will be leaked", file=sys.stderr)
    if cfg.scene.bank is not None:
        generator = rng.generator(cfg.train.seed, rng.Split.TRAIN, rng.Stream.IMAGES, 0, device=device)
        with announced(f"rendering a bank of {cfg.scene.bank} rooms"):
            simulator.fill_bank(generator=generator)
    localizer.to(device)
    averaged = None if cfg.train.ema is None else Averaged(localizer, cfg.train.ema)
    optimizer = build_optimizer(cfg.train, localizer)
    run = Run(cfg, out, device, speech, simulator, eval_set, fixed, localizer, averaged, optimizer,
              bfloat16=uses_bfloat16(cfg.train, device, resumed), graph=uses_graph(cfg, device, speech),
              talkers=talkers)
    if initial is not None:
        run.step = run.first = initial.step
        run.examples = run.first_examples = initial.examples
    if resumed is not None:
        with fitting(cfg, out, resumed):
            restore(run, resumed)
    if cfg.train.max_minutes is not None:
        with announced("a first evaluation, for the time it takes"):
            evaluate_now(run)                                           # which is what the end of the run needs
    return run


def check_optimizer(resumed: Checkpoint, cfg: RunConfig) -> None:
    """Raises ValueError for another optimiser than that whose moments the checkpoint has."""
    before, now = from_mapping(RunConfig, resumed.config).train.optimizer, cfg.train.optimizer
    if now is not before:
        raise ValueError(f"train.optimizer must stay {before.value}, that of the run that --resume goes on with, got "
                         f"{now.value}")


@contextlib.contextmanager
def fitting(cfg: RunConfig, out: Path, resumed: Checkpoint) -> Iterator[None]:
    """Makes one line, a ValueError, of what goes wrong in the `with` block with a checkpoint that does not fit."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the checkpoint in {out} does not fit its configuration and the overrides: "
                         f"{misfit(error, resumed.config, cfg)}") from error


def restore(run: Run, resumed: Checkpoint) -> None:
    """Put a run that has the checkpoint's weights back to where it was saved. Raises whatever torch raises for one that
    does not fit."""
    check_rooms_kept(resumed.config, run.cfg.scene)
    run.settings = settings(run.cfg, resumed)
    run.step, run.share, run.elapsed_s = resumed.step, share_done(run.cfg.train, resumed), resumed.extra["elapsed_s"]
    run.first, run.first_examples, run.invalid = (resumed.extra.get(name, 0)
                                                  for name in ("first", "first_examples", "invalid"))
    run.file = resumed.extra.get("file")
    run.evaluated = min(resumed.extra.get("evaluated", run.share), run.share)  # the share falls where a run goes on
    run.examples = trained_examples(resumed.extra, resumed.config, resumed.step)
    restore_optimizer(run.optimizer, resumed.optimizer)
    if run.averaged is not None:
        run.averaged.model.load_state_dict(resumed.ema or resumed.model)
        run.averaged.updates = run.step - run.first


def elapsed_s(run: Run) -> float:
    """Wall-clock seconds of the run so far: since the process started, and those of the parts before a resumption."""
    return run.elapsed_s + runtime.process_age_s()


def evaluate_now(run: Run) -> dict[str, Any]:
    """Metrics of the averaged weights, or of the weights themselves where none are averaged."""
    begin = time.perf_counter()
    with runtime.cpu_threads(run.threads):  # as when it was timed first, whatever steps take (lanes.ThreadTuner)
        metrics = score_model(run.eval_set, run.localizer if run.averaged is None else run.averaged.model)
    run.eval_s = max(run.eval_s, time.perf_counter() - begin)
    return metrics


def save(run: Run, step: int) -> None:
    """checkpoint.pt of the run folder. Raises CheckpointError when it cannot be written, and FloatingPointError for
    weights that are not finite, so that the last good one stays."""
    if not all(bool(weight.isfinite().all()) for weight in run.localizer.parameters()):
        raise FloatingPointError(f"the weights are not finite at step {step}: lower train.lr or set train.clip_norm")
    averaged = None if run.averaged is None else run.averaged.model
    save_checkpoint(run.out / "checkpoint.pt", model=run.localizer, optimizer=run.optimizer, ema=averaged, step=step,
                    config=to_mapping(run.cfg),
                    extra={"elapsed_s": elapsed_s(run), "share": run.share, "talkers": run.talkers,
                           "evaluated": run.evaluated, "invalid": int(run.invalid), "file": run.file,
                           "first": run.first, "first_examples": run.first_examples, "examples": run.examples,
                           "bfloat16": {run.device.type: run.bfloat16}})


def check_lanes(lanes: int | None, device: torch.device, network: torch.nn.Module) -> None:
    """Raises ValueError for train.lanes where a batch cannot be dealt out."""
    if lanes in (None, 1):
        return
    if device.type != "cpu":
        raise ValueError(f"train.lanes must be 1 or null on a {device.type}, got {lanes}")
    if not separable(network):
        raise ValueError(f"train.lanes must be 1 or null for a network with batch norm, which is of the whole batch, "
                         f"got {lanes}")


def uses_bfloat16(train: TrainConfig, device: torch.device, resumed: Checkpoint | None = None) -> bool:
    """What train.precision comes to on a device. A resumed run keeps what auto came to on a device of this kind."""
    if train.precision is not Precision.AUTO:
        return train.precision is Precision.BFLOAT16
    before = None if resumed is None else resumed.extra.get("bfloat16", {}).get(device.type)
    return runtime.has_bfloat16(device) if before is None else before


def uses_graph(cfg: RunConfig, device: torch.device, speech: SpeechBank | None) -> bool:
    """What train.graph comes to; speech None: by all else. Raises ValueError where it is true and a step cannot be
    captured."""
    why_not = None
    if not runtime.is_gpu(device):
        why_not = f"on a {device.type}"
    elif cfg.scene.bank is None and (cfg.rir.method is Method.ISM or cfg.rir.ism_share > 0):
        why_not = (f"where rooms are exact, which wait for the device (rir.method={cfg.rir.method.value}, "
                   f"rir.ism_share={cfg.rir.ism_share})")
    elif speech is not None and speech.samples.device != device:
        why_not = f"where the speech, {speech.samples.nbytes / 1e9:.1f} GB, did not fit on the device"
    if cfg.train.graph and why_not is not None:
        raise ValueError(f"train.graph must be false or null {why_not}, got true")
    return cfg.train.graph is not False and why_not is None
