"""The fixed evaluation set: the same clips for every model and every device, with chance and baseline beside them."""
from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssl_gpu import rng
from ssl_gpu.baselines import gcc_phat
from ssl_gpu.checks import check_fields
from ssl_gpu.ism import IsmConfig
from ssl_gpu.localizer import Localizer, SceneLaw
from ssl_gpu.metrics import localisation_metrics
from ssl_gpu.mixture import MixtureBatch, MixtureConfig
from ssl_gpu.rir import RirConfig
from ssl_gpu.scene import Pool, SceneBatch, SceneConfig
from ssl_gpu.simulator import Simulator, SimulatorConfig
from ssl_gpu.speech import Crop, SpeechBank, draw_crops, gather_crops


@dataclass(frozen=True)
class EvalConfig:
    """num_clips: mixtures in the evaluation set, each in a room of its own. seed: of everything drawn for it.

    The rooms follow the scene law of the run, from a random stream that training never draws from; the clips are
    clean, start at the first sample of an utterance, and are never augmented.
    Raises ValueError naming the field, its value and the rule.
    """

    num_clips: int = 512
    seed: int = 0

    def __post_init__(self):
        check_fields(self, "eval")
        if self.num_clips < 1:
            raise ValueError(f"eval.num_clips must be >= 1, got {self.num_clips}")
        if not 0 <= self.seed <= rng.MAX_SEED:
            raise ValueError(f"eval.seed must satisfy 0 <= seed <= {rng.MAX_SEED}, got {self.seed}")


@dataclass(frozen=True, eq=False)
class EvalSet:
    """mixture: all clips on the device. law: of the scenes.
    digest: of speech, rooms, positions and the images' distances, the same on every device."""

    mixture: MixtureBatch
    law: SceneLaw
    digest: str


def build_eval_set(cfg: EvalConfig, scene: SceneConfig, rir: RirConfig, ism: IsmConfig, bank: SpeechBank,
                   clip_s: float, law: SceneLaw, device: torch.device) -> EvalSet:
    """Draw on the CPU, render on the device: the same rooms, images and crops whatever the device.

    bank: the evaluation speech, its tensors on the CPU. Raises ValueError when it has fewer speakers than sources.
    """
    num_samples = round(clip_s * rir.sample_rate)
    simulator = Simulator(replace(scene, bank=None, pool=Pool.LAW), replace(rir, early=False), MixtureConfig(),
                          SimulatorConfig(fused=False), ism)
    generator = rng.generator(cfg.seed, rng.Split.TEST, rng.Stream.SPEECH, 0)
    crops = draw_crops(bank, cfg.num_clips, scene.num_src, num_samples, Crop.FIRST, generator=generator)
    dry = gather_crops(bank, crops, num_samples)
    digest = hashlib.blake2b(digest_size=8)
    _digest(digest, dry)
    mixtures = []
    for index, start in enumerate(range(0, cfg.num_clips, 64)):        # the images of 64 scenes fit anywhere
        part = dry[start:start + 64]
        generator = rng.generator(cfg.seed, rng.Split.TEST, rng.Stream.SCENE, index)
        draw = simulator.draw(len(part), num_samples, generator=generator)
        images, tail, method = draw.rooms.images, draw.rooms.tail, draw.rooms.method
        random = () if images is None else (images.ratio, images.perturbation)
        random += () if tail is None else (tail.place, tail.sign)
        random += () if method is None else (method,)
        for tensor in (draw.scenes.room_dim, draw.scenes.rt60, draw.scenes.mic_pos, draw.scenes.src_pos, *random):
            _digest(digest, tensor)
        mixtures.append(simulator.render(part.to(device), draw.to(device)))
    audio, *snrs = (torch.cat([getattr(mixture, name) for mixture in mixtures])
                    for name in ("audio", "sensor_snr_db", "diffuse_snr_db"))
    scenes = SceneBatch.concatenate([mixture.scenes for mixture in mixtures])
    mixture = MixtureBatch(audio, None, scenes, rir.sample_rate, *snrs)
    return EvalSet(mixture, law, digest.hexdigest())


def _digest(digest, tensor: Tensor) -> None:
    digest.update(tensor.contiguous().numpy().tobytes())


def score(eval_set: EvalSet, azimuth: Tensor, cone: Tensor) -> dict[str, Any]:
    """localisation_metrics of estimates [clip, src] rad on the evaluation set, scenes that are not valid left out."""
    scenes = eval_set.mixture.scenes
    return localisation_metrics(azimuth, scenes.azimuth, cone, scenes.cone_angle, scenes.valid)


def score_model(eval_set: EvalSet, localizer: Localizer) -> dict[str, Any]:
    """Metrics of a localiser, which is put into eval mode for it and left as it was."""
    training = localizer.training
    localizer.eval()
    estimate = localizer.estimate(eval_set.mixture.audio, eval_set.law)
    localizer.train(training)
    return score(eval_set, *estimate)


def score_chance(eval_set: EvalSet) -> dict[str, Any]:
    """Metrics of the best constants, which listen to nothing."""
    clips = len(eval_set.mixture.scenes)
    constants = eval_set.law.constants
    device = eval_set.mixture.audio.device
    return score(eval_set, constants.azimuth.expand(clips, -1).to(device), constants.cone.expand(clips, -1).to(device))


def score_baseline(eval_set: EvalSet) -> dict[str, Any]:
    """Metrics of max-pooled GCC-PHAT, its cone angles turned into azimuths by the same map as the model's."""
    mixture = eval_set.mixture
    cone = gcc_phat(mixture.audio, mixture.scenes.mic_pos, mixture.sample_rate, mixture.scenes.src_pos.shape[1])
    return score(eval_set, eval_set.law.angle_map.cone_to_azimuth(cone), cone)
