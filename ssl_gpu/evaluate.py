"""Evaluate a checkpoint: python -m ssl_gpu.evaluate CHECKPOINT [--sets e0,e1,...] [section.key=value ...].

Without --sets on the evaluation set of its run. With --sets on those of ssl_gpu.protocol, which are the same for every
model: e0 the original's protocol, e0b and e1 2,000 fresh rooms of its law, e1p with sources at the array's height, e1n5
with diffuse noise at 5 dB (and e1n0, e1n10, e1n20), e1w5 with white noise (and e1w0, e1w10, e1w20), e2 rooms by
pyroomacoustics, e3 measured rooms, a folder named by e3.dir=DIR. A model trained with scene.pool=original has been in
e0's rooms: its e0 is marked as leaked, in the table and as leaked_rooms in JSON. So is a result on talkers of the
training, leaked_talkers. With --validation on clips of the same kinds that no published set has, to choose between
weights by: "split" in JSON is then validation, otherwise test.
"""
from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from ssl_gpu.commandline import begin_command
    begin_command()                                                    # before torch is loaded

import torch

from ssl_gpu import rng, runtime
from ssl_gpu.assess import Assessment, assess, check_model, write_manifest
from ssl_gpu.checkpoint import write_json, write_text
from ssl_gpu.commandline import Parser, end_with, told
from ssl_gpu.config import RunConfig, apply_overrides, from_mapping, is_override
from ssl_gpu.evalset import EvalSet, build_eval_set, score_baseline, score_chance, score_model
from ssl_gpu.localizer import Localizer, SceneLaw, scene_law
from ssl_gpu.measured import read_measured
from ssl_gpu.outputs import output_file, output_folder, write_each
from ssl_gpu.plots import require_matplotlib
from ssl_gpu.pretrained import load_localizer, packaged, read_weights, tell_spacing, training_record
from ssl_gpu.protocol import FRESH, LAW, SETS, SetOptions, eval_rooms_trained_in, import_pyroomacoustics
from ssl_gpu.report import announced, result_table, sets_table
from ssl_gpu.scene import SceneConfig
from ssl_gpu.speech import SpeechBank, SpeechError, load_bank, voices_bank
from ssl_gpu.webpage import page

NO_RUN = {"train": {"steps": 1}}  # a configuration where there is no checkpoint to have one
# Sections of which an evaluation reads nothing, and why: of a run's own, and of sets.
UNTRAINED = ("train", "speech.train"), "nothing is trained"
IDLE_OWN = ("mixture", "simulator"), "the clips of a run's own evaluation are clean"
DRAWN_OWN = ("scene.bank", "scene.pool", "rir.early", "speech.crop"), "an evaluation has rooms and clips of its own"
IDLE_SETS = (("scene", "rir", "ism", "mixture", "simulator", "speech.clip_s", "speech.crop"),
             "what the sets are of is fixed, whatever the model was trained for")


def eval_speech(cfg: RunConfig, num_src: int = 1) -> SpeechBank:
    """The evaluation speech on the CPU: speech.eval, or voices of which none is heard in training.

    num_src: talkers of a mixture. Raises SpeechError for a folder that cannot be used, or of fewer.
    """
    if cfg.speech.eval is None:
        generator = rng.generator(cfg.eval.seed, rng.Split.TEST, rng.Stream.VOICES, 0)
        with announced("making synthetic voices, as speech.eval names no speech"):
            bank = voices_bank(cfg.speech, sample_rate=cfg.rir.sample_rate, generator=generator)
    else:
        bank = load_bank(cfg.speech.eval, cfg.speech, sample_rate=cfg.rir.sample_rate, device="cpu",
                         called="speech.eval")
    if bank.num_speakers < num_src:
        where = "the synthetic voices" if cfg.speech.eval is None else cfg.speech.eval
        raise SpeechError(f"speech.eval must hold at least {num_src} speakers, one per source, got {bank.num_speakers} "
                          f"in {where}")
    return bank


def check_speech_there(cfg: RunConfig, overrides: Sequence[str]) -> None:
    """Raises ValueError where the configuration of weights, and none of the overrides, names speech that is not there:
    it may be that of another machine."""
    folder = cfg.speech.eval
    if folder is not None and not Path(folder).expanduser().is_dir() and not any(
            text.partition("=")[0].strip() == "speech.eval" for text in overrides):
        raise ValueError(f"speech.eval must be an existing folder, name one by speech.eval=DIR, or synthetic voices by "
                         f"speech.eval=null; the configuration of the weights has {folder!r}")


def leaked_talkers(heard: Collection[str] | None, bank: SpeechBank) -> int | None:
    """How many talkers of evaluation speech were heard in training, with a line of warning when there are some.

    heard: labels of the training's talkers, None where they are unknown; then so is the number. Synthetic voices are
    drawn anew, from other random streams in training and evaluation: of them none. Outside LibriSpeech's layout files
    are compared by their bytes: the same recording in another coding, or one talker's files, are not recognised.
    """
    if not bank.talkers:
        return 0
    if heard is None:
        return None
    again = set(heard) & set(bank.talkers)
    if again:
        first = bank.talkers.index(min(again))
        called = bank.names[int(bank.speaker_start[first])] if ":" in min(again) else min(again)
        print(f"warning: {len(again)} of {bank.num_speakers} talkers of speech.eval were heard in training, {called} "
              f"for one: the result is not one of unseen talkers", file=sys.stderr)
    return len(again)


def prepare_eval(cfg: RunConfig, device: torch.device, bank: SpeechBank, heard: Collection[str] | None = None
                 ) -> tuple[EvalSet, dict[str, Any]]:
    """The evaluation set of speech `bank`, and the part of a result that no model changes: chance, baseline, digest and
    leaked_talkers.

    heard: as for leaked_talkers.
    Raises ValueError where the scene law is unusable.
    """
    leaked = leaked_talkers(heard, bank)
    with announced(f"making the evaluation set of {cfg.eval.num_clips} clips"):
        law: SceneLaw = scene_law(cfg.scene, cfg.train.seed)
        eval_set = build_eval_set(cfg.eval, cfg.scene, cfg.rir, cfg.ism, bank, cfg.speech.clip_s, law, device)
    with announced("GCC-PHAT on the evaluation set"):
        baseline = score_baseline(eval_set)
    fixed = {"baseline": baseline, "chance": score_chance(eval_set), "eval_digest": eval_set.digest,
             "leaked_talkers": leaked}
    return eval_set, fixed


def warn_of_idle(overrides: Sequence[str], idle: Collection[str], why: str, read: Collection[str] = ()) -> None:
    """A line where overrides are of keys that nothing reads, and why. idle: sections, and keys of others; read: the
    keys of these sections that have an effect, for which a whole section is not told either."""
    effective = {*read, *(key.partition(".")[0] for key in read)}
    keys = [key for key in dict.fromkeys(text.partition("=")[0].strip() for text in overrides)
            if (key in idle or key.partition(".")[0] in idle) and key not in effective]
    if keys:
        print(f"warning: {', '.join(keys)} {'has' if len(keys) == 1 else 'have'} no effect: {why}", file=sys.stderr)


def measured_folder(overrides: Sequence[str], names: Collection[str]) -> tuple[str | None, list[str]]:
    """The last e3.dir=DIR of the overrides, None without, and all others; names: the sets. A line where it has no use.
    Raises ValueError for an empty one, and for other keys of e3."""
    ours = [text for text in overrides if re.match(r"\s*e3\.", text)]
    for text in ours:
        key, _, value = text.partition("=")
        if key.strip() != "e3.dir" or not value.strip():
            raise ValueError(f"e3 has e3.dir=DIR, a folder of measured RIRs, and nothing else, got {text}")
    if ours and "e3" not in names:
        print("warning: e3.dir has no effect: it goes with --sets e3", file=sys.stderr)
    return ours[-1].partition("=")[2].strip() if ours else None, [text for text in overrides if text not in ours]


def evaluate(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The metrics of a checkpoint, of its averaged weights where it has them, with baseline and chance.

    Raises ValueError for an unusable checkpoint, configuration or speech folder.
    """
    weights = read_weights(path)
    _, overrides = measured_folder(overrides, ())
    cfg = from_mapping(RunConfig, apply_overrides(weights.config, overrides))
    warn_of_idle(overrides, *IDLE_OWN)
    warn_of_idle(overrides, *DRAWN_OWN)
    warn_of_idle(overrides, *UNTRAINED, read=("train.device", "train.seed"))
    check_speech_there(cfg, overrides)
    device = runtime.pick_device(cfg.train.device, "train.device")
    localizer = load_localizer(weights, cfg, path).to(device)
    eval_set, fixed = prepare_eval(cfg, device, eval_speech(cfg, cfg.scene.num_src), weights.talkers)
    with announced("the model on the evaluation set"):
        return {**score_model(eval_set, localizer), **fixed, "steps": weights.step}


def evaluate_sets(path: str | Path | None, sets: str, overrides: Sequence[str] = (), count: int | None = None,
                  validation: bool = False) -> dict[str, Assessment]:
    """A checkpoint on the sets named in `sets`, separated by commas; None: the baselines alone, on speech.eval.

    overrides: of the configuration, and e3.dir=DIR. count: clips of each set, its first ones. validation: of the same
    kinds, but with scenes, draws and pairs of utterances that no published set has.
    Results have what is known of the weights: target, steps and examples of their training, what training_record
    finds, parameters, weights_digest;
    leaked_rooms, how many rooms of the set they were trained in, and leaked_talkers, how many talkers of speech.eval,
    both by the checkpoint, whatever the overrides; all None for the baselines. Further device and versions.
    Raises ValueError for an unusable checkpoint, configuration, speech or set.
    """
    names = [name.strip() for name in sets.split(",")]
    unknown = [name for name in names if name not in SETS]
    if "" in unknown:                                                   # a shell parts "e1, e2" into two words
        raise ValueError(f"--sets must have a name between commas, as in e1,e2 without a blank, got {sets!r}")
    if unknown:
        raise ValueError(f"--sets must be of {', '.join(SETS)}, got {unknown[0]!r}")
    if count is not None and count < 1:
        raise ValueError(f"--clips must be >= 1, got {count}")
    if validation and (other := [name for name in names if name not in FRESH]):
        raise ValueError(f"--validation must have sets of {', '.join(FRESH)}, whose scenes are drawn, got {other[0]!r}")
    folder, overrides = measured_folder(overrides, names)
    weights = None if path is None else read_weights(path)
    cfg = from_mapping(RunConfig, apply_overrides(NO_RUN if weights is None else weights.config, overrides))
    device = runtime.pick_device(cfg.train.device, "train.device")
    about = dict.fromkeys(("target", "steps", "examples", "steps_before", "examples_before", "minutes", "precision",
                           "parameters", "weights_digest", "leaked_talkers"))
    check_speech_there(cfg, overrides)
    if weights is not None:
        check_model(cfg)
    if "e2" in names:
        import_pyroomacoustics()
    warn_of_idle(overrides, *IDLE_SETS)
    warn_of_idle(overrides, *UNTRAINED, read=("train.device",))
    if weights is None:
        warn_of_idle(overrides, ("model", "features", "target"), "there is no model")
    warn_of_idle(overrides, ("eval.num_clips",), "it is of a run's own evaluation; with --sets there is --clips N")
    measured = read_measured(folder) if "e3" in names else None
    localizer = None
    if weights is not None:
        localizer = load_localizer(weights, cfg, path).to(device).eval()
    speech = eval_speech(cfg, LAW.num_src)                              # last: it may take minutes
    if weights is not None:
        about = {"target": cfg.target.angle.value, "steps": weights.step, "examples": weights.examples,
                 "parameters": sum(p.numel() for p in localizer.parameters()),
                 "leaked_talkers": leaked_talkers(weights.talkers, speech), "weights_digest": weights.digest,
                 **training_record(path, weights.step)}
    about |= {"device": runtime.device_name(device), "versions": runtime.versions(),
              "split": "validation" if validation else "test"}

    def localizer_for(spacing: float) -> Localizer:
        tell_spacing(localizer, cfg, spacing)
        return localizer

    split = rng.Split.VALIDATION if validation else rng.Split.TEST
    options = SetOptions(speech, device, count, measured, split)
    found = dict(assess(names, options, None if weights is None else localizer_for))
    trained = None if weights is None else from_mapping(SceneConfig, weights.config.get("scene", {}), "scene")
    for name, assessment in found.items():
        assessment.result.update(about)
        assessment.result["leaked_rooms"] = None if trained is None else eval_rooms_trained_in(name, trained)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m ssl_gpu.evaluate", description=__doc__)
    parser.add_argument("checkpoint", nargs="?", help="checkpoint.pt of a run, the run's folder, or one of "
                        "ssl_gpu.pretrained; with --sets the packaged weights where it is left out")
    parser.add_overrides("for example speech.eval=DIR, eval.num_clips=2000, train.device=cpu, e3.dir=DIR")
    parser.add_argument("--sets", metavar="NAME,...", help=f"of {', '.join(SETS)}")
    parser.add_argument("--baselines", action="store_true", help="with --sets: no model, the classical baselines alone")
    parser.add_argument("--clips", type=int, metavar="N", help="with --sets: only the first N clips of each")
    parser.add_argument("--validation", action="store_true",
                        help="with --sets: other clips of the same kinds, to choose between weights by")
    parser.add_argument("--json", metavar="FILE", help="write the metrics there as well")
    parser.add_argument("--html", metavar="FILE", help="with --sets: a page with tables and plots; needs matplotlib")
    parser.add_argument("--manifest", metavar="DIR", help="with --sets: what each clip is made of, DIR/<set>.jsonl")
    args = parser.parse_intermixed_args(arguments)
    if args.checkpoint is not None and is_override(args.checkpoint):  # an override, since there is no checkpoint
        args.checkpoint, args.overrides = None, [args.checkpoint, *args.overrides]
    try:
        words = sys.argv[1:] if arguments is None else arguments
        table, files = run(args, words)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        print("error: out of memory; lower --clips, or eval.num_clips and speech.clip_s of a run's own evaluation",
              file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted before the results", file=sys.stderr)
        return 130
    # The table first: it may be the work of hours, and a full disk does not keep it from being read.
    return write_each([("the table", lambda: print(table, flush=True)), *files])


def about_page(path: str | Path | None, command: str, result: Mapping[str, Any]) -> dict[str, str]:
    """What the head of a page says: of which weights (None: of none) it is, made when and how. result: of any set."""
    weights = "none, the classical baselines alone"
    if path is not None:
        weights = (f"{Path(path).resolve()}: {result['parameters'] / 1e6:.2f} M parameters, {result['steps']} steps, "
                   f"{result['examples']} examples")
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return {"weights": weights, "command": command, "made": f"{datetime.now():%Y-%m-%d %H:%M}, on "
            f"{result['device']}, {versions}"}


def run(args: argparse.Namespace, words: Sequence[str]) -> tuple[str, list[tuple[str, Callable[[], None]]]]:
    """Does what the command line, of these words, says, and returns the table to be printed and the files to be
    written, for write_each. Raises ValueError and OSError."""
    command = told("ssl_gpu.evaluate", words)                           # now, before there are files to be named
    only = [f"--{name}" for name in ("baselines", "clips", "validation", "html", "manifest")
            if (value := getattr(args, name)) is not None and value is not False]
    if args.sets is None and only:
        instead = "; without it the number of clips is eval.num_clips" if only[0] == "--clips" else ""
        raise ValueError(f"{only[0]} goes with --sets{instead}")
    if args.checkpoint is None and args.sets is None:
        raise ValueError("a checkpoint is needed, or --sets for the packaged weights")
    if args.baselines and args.checkpoint is not None:
        raise ValueError(f"--baselines takes no checkpoint, got {args.checkpoint}")
    # Before minutes of work.
    numbers, html = output_file("--json", args.json), output_file("--html", args.html, "HTML")
    if html is not None and html == numbers:
        raise ValueError(f"--json and --html must be two files, got {args.html} twice")
    manifest = output_folder("--manifest", args.manifest)
    if args.sets is None:
        result, found = evaluate(args.checkpoint, args.overrides) | {"command": command}, {}
        table = result_table(result)
    else:
        if html is not None:
            require_matplotlib()
        path = None if args.baselines else args.checkpoint or packaged()
        found = evaluate_sets(path, args.sets, args.overrides, args.clips, args.validation)
        result = {name: assessment.result | {"command": command} for name, assessment in found.items()}
        table = sets_table(result)
    files = []
    if numbers is not None:
        files.append((args.json, partial(write_json, numbers, result)))
    if manifest is not None:
        files += [(f"{args.manifest}/{name}.jsonl", partial(write_manifest, manifest, name, assessment))
                  for name, assessment in found.items()]
    if html is not None:                                                # last, as it draws for a while
        files.append((args.html, lambda: write_text(html, page(
            found, table, about_page(path, shlex.join(["python", "-m", "ssl_gpu.evaluate", *words]),
                                     next(iter(result.values())))))))
    return table, files


if __name__ == "__main__":
    end_with(main)
