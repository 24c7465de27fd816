"""Evaluate a checkpoint on the fixed evaluation set of its run: python -m ssl_gpu.evaluate CHECKPOINT."""
from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Collection, Sequence

if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is loaded; the reason stands in ssl_gpu/train.py

import torch

from ssl_gpu import rng, runtime
from ssl_gpu.checkpoint import write_json
from ssl_gpu.config import RunConfig, apply_overrides, from_mapping
from ssl_gpu.evalset import EvalSet, build_eval_set, score_baseline, score_chance, score_model
from ssl_gpu.localizer import SceneLaw, scene_law
from ssl_gpu.pretrained import load_localizer, read_weights
from ssl_gpu.report import result_table
from ssl_gpu.speech import SpeechBank, load_bank, voices_bank


def eval_speech(cfg: RunConfig) -> SpeechBank:
    """The evaluation speech on the CPU: speech.eval, or voices of which none is heard in training.

    Raises SpeechError for a folder that cannot be used.
    """
    if cfg.speech.eval is not None:
        return load_bank(cfg.speech.eval, cfg.speech, sample_rate=cfg.rir.sample_rate, device="cpu")
    generator = rng.generator(cfg.eval.seed, rng.Split.TEST, rng.Stream.VOICES, 0)
    return voices_bank(cfg.speech, sample_rate=cfg.rir.sample_rate, generator=generator)


def prepare_eval(cfg: RunConfig, device: torch.device, heard: Collection[str] = ()) -> tuple[EvalSet, dict[str, Any]]:
    """The evaluation set, and the part of a result that no model changes: chance, baseline and digest.

    heard: names of the utterances in training; a line is printed when the evaluation speech holds some of them.
    Raises ValueError where speech or scene law are unusable.
    """
    law: SceneLaw = scene_law(cfg.scene, cfg.train.seed)
    bank = eval_speech(cfg)
    again = set(heard) & set(bank.names)
    if again:
        print(f"warning: {len(again)} of {len(bank.names)} files of speech.eval are in speech.train too, "
              f"{min(again)} for one: the result is not one of unseen talkers", file=sys.stderr)
    eval_set = build_eval_set(cfg.eval, cfg.scene, cfg.rir, cfg.ism, bank, cfg.speech.clip_s, law, device)
    fixed = {"baseline": score_baseline(eval_set), "chance": score_chance(eval_set), "eval_digest": eval_set.digest}
    return eval_set, fixed


def evaluate(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The metrics of a checkpoint, of its averaged weights where it has them, with baseline and chance.

    Raises ValueError for an unusable checkpoint, configuration or speech folder.
    """
    weights = read_weights(path)
    cfg = from_mapping(RunConfig, apply_overrides(weights.config, overrides))
    device = runtime.pick_device(cfg.train.device)
    localizer = load_localizer(weights, cfg, path).to(device)
    eval_set, fixed = prepare_eval(cfg, device)
    return {**score_model(eval_set, localizer), **fixed, "steps": weights.step}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ssl_gpu.evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="checkpoint.pt of a run, the run's folder, or one of ssl_gpu.pretrained")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="for example speech.eval=DIR, eval.num_clips=2000, train.device=cpu")
    parser.add_argument("--json", metavar="FILE", help="write the metrics there as well")
    args = parser.parse_intermixed_args(arguments)
    try:
        result = evaluate(args.checkpoint, args.overrides)
        if args.json:
            write_json(args.json, result)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(result_table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
