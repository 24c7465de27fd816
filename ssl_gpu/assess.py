"""A localiser on the evaluation sets of ssl_gpu.protocol, beside chance, classical baselines and floors."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.baselines import Pooling, srp_phat_by
from ssl_gpu.checkpoint import write_text
from ssl_gpu.clips import Clips, Digest, Truth, without_audio
from ssl_gpu.commandline import bar_interval
from ssl_gpu.config import RunConfig
from ssl_gpu.localizer import Localizer, SceneLaw, Target, scene_law
from ssl_gpu.metrics import Chance, chance, localisation_metrics
from ssl_gpu.protocol import (LAW, PLANAR, SAME_CLIPS, SAMPLE_RATE, VERSION, SetOptions, clips_of, measured_of,
                              num_clips)
from ssl_gpu.scoring import bayes_azimuth, score_angles

BASELINES = {Pooling.MAX: "gcc_phat_max", Pooling.MEAN: "gcc_phat_mean"}


@dataclass(frozen=True, eq=False)
class Assessment:
    """What there is to say of a localiser on one set: result, plain values ready for JSON; the truth; the cone angles
    that it heard, [clip, src] rad, ascending, None where no localiser was asked; names of the utterances, of each
    clip in the order of their cone angles, as the truth is; and entries, what each clip is made of, as of Clips."""

    result: dict[str, Any]
    truth: Truth
    cone: Tensor | None
    utterances: list[list[str]]
    entries: list[dict[str, Any]]


def assess(names: Iterable[str], options: SetOptions, localizer_for: Callable[[float], Localizer] | None
           ) -> Iterator[tuple[str, Assessment]]:
    """The assessment of every set, one by one; sets of the same clips are made and heard once.

    localizer_for: spacing of the microphones in m, at 340 m/s -> localiser in eval mode on options.device; None for
    the baselines alone. "chance" of a result is of the constants that best_constants has for its set.
    Raises ValueError for what a set needs and has not got, FloatingPointError when the network gives a NaN.
    """
    law, done = scene_law(LAW, 0), {}
    for name in names:
        key = SAME_CLIPS.get(name, name)
        if key not in done:
            done[key] = _assess(key, options, localizer_for, law)
        yield name, done[key]


def spacing_told(name: str, options: SetOptions) -> float:
    """Spacing in m that stands, at 340 m/s, for the travel time between the microphones of a set."""
    if name != "e3":
        return LAW.aperture
    place = measured_of(options)[1][0]
    return place["mic_spacing_m"] * SPEED_OF_SOUND / place["speed_of_sound"]


@torch.no_grad()
def _assess(name: str, options: SetOptions, localizer_for: Callable[[float], Localizer] | None,
            law: SceneLaw) -> Assessment:
    spacing = spacing_told(name, options)
    localizer = None if localizer_for is None else localizer_for(spacing)
    digest, parts, heard = Digest(), [], {key: [] for key in ("model", *BASELINES.values())}
    with tqdm(desc=name, total=num_clips(name, options), unit="clip", mininterval=bar_interval()) as bar:
        for clips in clips_of(name, options):
            digest.add(clips)
            audio = clips.audio.to(options.device)
            if localizer is not None:
                heard["model"].append(localizer.estimate(audio, law))
            for pooling, cone in _gcc(audio, clips, spacing).items():
                heard[BASELINES[pooling]].append((law.angle_map.cone_to_azimuth(cone), cone))
            parts.append(without_audio(clips))
            bar.update(len(audio))
    truth = Truth.of(parts)
    estimates = {key: tuple(torch.cat(column).cpu() for column in zip(*columns))
                 for key, columns in heard.items() if columns}
    if name in PLANAR:  # one angle, whichever the model learned
        learned = 1 if localizer is None or localizer.target.angle is Target.CONE else 0
        estimates = {key: (pair[learned if key == "model" else 1],) * 2 for key, pair in estimates.items()}
    constants = best_constants(name, truth, law)
    guesses = (constants.azimuth.expand_as(truth.azimuth), constants.cone.expand_as(truth.cone))
    scores = {key: score_angles(*pair, truth) for key, pair in estimates.items()}
    result = scores.pop("model", {}) | {
        "baseline": scores["gcc_phat_max"], "baseline_mean": scores["gcc_phat_mean"],
        "chance": score_angles(*guesses, truth), "floor": floors(name, truth, law), "eval_digest": str(digest),
        "set_version": VERSION, "num_clips": len(truth.cone), "num_scenes": len(truth.scene.unique())}
    utterances = [[entry["utterances"][src] for src in order] for part in parts
                  for entry, order in zip(part.entries, part.cone.argsort(-1).tolist())]
    return Assessment(result, truth, estimates["model"][1] if "model" in estimates else None, utterances,
                      [entry for part in parts for entry in part.entries])


def write_manifest(folder: Path, name: str, assessment: Assessment) -> None:
    """`folder`/<name>.jsonl, a line for each clip of a set; makes the folder. Raises OSError where it cannot be
    written."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry) + "\n" for entry in assessment.entries)
    write_text(folder / f"{name}.jsonl", lines)


def _gcc(audio: Tensor, clips: Clips, spacing: float) -> dict[Pooling, Tensor]:
    """Cone angles by GCC-PHAT, told the travel time between the microphones, pooled in either way."""
    mic_pos = clips.mic_pos.to(audio.device)
    actual = float(torch.linalg.vector_norm(clips.mic_pos[0, 1] - clips.mic_pos[0, 0]))
    return srp_phat_by(audio, mic_pos, SAMPLE_RATE, clips.cone.shape[1], poolings=tuple(BASELINES),
                       speed_of_sound=SPEED_OF_SOUND * actual / spacing)


def best_constants(name: str, truth: Truth, law: SceneLaw) -> Chance:
    """The best guess without listening on a set, as in a run's own evaluation: the constants of the law that its scenes
    are drawn from, of e1p of the planar one. Not of its clips, which these constants would know: of a single clip they
    would be the truth. e3 alone has no law but its RIRs, and constants of the very clips that they are scored on."""
    if name == "e3":
        return chance(truth.azimuth, truth.cone)
    return scene_law(replace(LAW, planar_share=1.0), 0).constants if name in PLANAR else law.constants


def floors(name: str, truth: Truth, law: SceneLaw) -> dict[str, list[float]] | None:
    """Errors in azimuth, [low, high] degrees, of the best guess from each talker's cone angle, exactly known
    (exact_cone), and from cone angle and distance (exact_cone_and_distance): by class, and with _mae behind the name
    as they are. None where the sources' height is known.

    Two microphones hear no more of a direction, but these are errors of one estimator on the scenes of a set: it takes
    the talkers as independent, though they share the height of the array, and on a finite set a system may be below it
    by luck.
    """
    if name in PLANAR:
        return None
    guesses = {"exact_cone": law.angle_map.cone_to_azimuth(truth.cone),
               "exact_cone_and_distance": bayes_azimuth(LAW, truth)}
    found = {}
    for key, azimuth in guesses.items():
        errors = localisation_metrics(azimuth, truth.azimuth, truth.cone, truth.cone)
        found |= {key: errors["azimuth_class_mae_deg"], f"{key}_mae": errors["azimuth_mae_deg"]}
    return found


def check_model(cfg: RunConfig) -> None:
    """Raises ValueError for a model that the sets' clips are not for."""
    if cfg.rir.sample_rate != SAMPLE_RATE:
        raise ValueError(f"the evaluation sets are at {SAMPLE_RATE} Hz, the model's rir.sample_rate is "
                         f"{cfg.rir.sample_rate}")
    if cfg.scene.num_src != LAW.num_src:
        raise ValueError(f"the evaluation sets have {LAW.num_src} talkers, the model's scene.num_src is "
                         f"{cfg.scene.num_src}")
