"""Audio to angles: the network, what it is taught, how its logits are read, and how cone angle and azimuth convert."""
from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from numbers import Integral

import torch
from torch import Tensor, nn

from ssl_gpu import rng, runtime
from ssl_gpu.checks import check_fields
from ssl_gpu.doa import (Decoding, angle_grid, class_grid, decode, hard_targets, localisation_loss, soft_targets,
                         sorted_angles)
from ssl_gpu.features import FeatureConfig
from ssl_gpu.metrics import AngleMap, Chance, build_angle_map, chance
from ssl_gpu.mixture import MixtureBatch
from ssl_gpu.model import FRAME_HOPS, HOP, ConformerLocalizer, ModelConfig, ModelKind, SSLModel
from ssl_gpu.scene import SceneBatch, SceneConfig, check_places, sample_scenes
from ssl_gpu.symmetry import Mirror

MOST_OFFSETS = 8  # framings to hear a clip in
CPU_CHUNK, GPU_CHUNK = 8, 64  # clips heard at a time: entry 60 of docs/performance.md
LAW_SAMPLES = 20_000  # scenes behind the angle map and the constants of chance; with 5,000 the map loses 0.02 degrees


class Target(Enum):
    """The angle that is learned. Two microphones observe the cone angle; azimuth needs the elevation as well."""

    CONE = "cone"
    AZIMUTH = "azimuth"


class Labels(Enum):
    """Gaussian labels on a fine grid, or the original's 36 classes of 5 degrees."""

    SOFT = "soft"
    HARD = "hard"


@dataclass(frozen=True)
class TargetConfig:
    """What the network is taught and how it is read.

    angle: cone or azimuth. labels: soft or hard.
    grid_deg, sigma_deg: spacing of the grid and width of the labels, for soft labels only.
    emd_weight: weight of the squared earth mover's distance beside the cross-entropy.
    mask_weight: weight of the masks' cross-entropy beside the loss of the angles; without features.free_masks they have
        no weights of the network in common, and it changes nothing but what gradients are clipped by.
    decoding: how a distribution becomes an angle.
    mirror: in evaluation, hear every clip a second time with its microphones exchanged, which mirrors all angles, and
        take the mean of both log-probabilities: twice the cost, and nothing with model.symmetric.
    offsets: in evaluation, hear every clip so many times, each time 1 / offsets of a frame later, and take the mean of
        the log-probabilities: so many times the cost. Zeros come before it, and its end, less than a frame, is lost. A
        frame is that of the conformer model's Conformer, two hops, or of the original's transform.

    Raises ValueError naming the field, its value and the rule.
    """

    angle: Target = Target.CONE
    labels: Labels = Labels.SOFT
    grid_deg: float = 2.0
    sigma_deg: float = 3.0
    emd_weight: float = 0.0
    mask_weight: float = 1.0
    decoding: Decoding = Decoding.MEDIAN
    mirror: bool = False
    offsets: int = 1

    def __post_init__(self):
        check_fields(self, "target")
        intervals = 180 / self.grid_deg if self.grid_deg > 0 else 0
        if not 0 < self.grid_deg <= 30 or abs(intervals - round(intervals)) > 1e-6:
            raise ValueError(f"target.grid_deg must divide 180 and be <= 30, got {self.grid_deg}")
        if not self.sigma_deg > 0:
            raise ValueError(f"target.sigma_deg must be > 0, got {self.sigma_deg}")
        for name in ("grid_deg", "sigma_deg"):
            value, unset = getattr(self, name), getattr(TargetConfig, name)
            if self.labels is Labels.HARD and value != unset:
                raise ValueError(f"target.{name} must be left at {unset} with target.labels=hard, which do not have "
                                 f"it, got {value}")
        if not self.emd_weight >= 0:
            raise ValueError(f"target.emd_weight must be >= 0, got {self.emd_weight}")
        if not self.mask_weight > 0:
            raise ValueError(f"target.mask_weight must be > 0, got {self.mask_weight}")
        if not 1 <= self.offsets <= MOST_OFFSETS:
            raise ValueError(f"target.offsets must be from 1 to {MOST_OFFSETS}, got {self.offsets}")


@dataclass(frozen=True, eq=False)
class SceneLaw:
    """What the law of the scenes alone tells: angle_map converts cone angle and azimuth, constants is chance."""

    angle_map: AngleMap
    constants: Chance


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # or what is kept could never be trained through
def scene_law(cfg: SceneConfig, seed: int) -> SceneLaw:
    """Monte Carlo of a scene law on the CPU, done once for each. Raises ValueError where the law has no angles, as with
    one microphone."""
    check_places(cfg)
    generator = rng.generator(seed, rng.Split.TRAIN, rng.Stream.ANGLE_MAP, 0)
    scenes = sample_scenes(cfg, LAW_SAMPLES, generator=generator)
    kept = scenes[scenes.valid.nonzero().squeeze(1)]
    azimuth, cone = sorted_angles(kept.azimuth), sorted_angles(kept.cone_angle)
    return SceneLaw(build_angle_map(kept.azimuth, kept.cone_angle), chance(azimuth, cone))


class Localizer(nn.Module):
    """A network with its grid and its decoding: audio [batch, mic=2, sample] -> logits [batch, track, angle].

    Track k speaks of the k-th smallest angle. `training_losses` trains it, `estimate` reads it. With
    features.mask_width the output in train mode is (logits, logits of the masks).
    Raises ValueError for a scene law that the network cannot serve: it hears two microphones, and the original model
    names two talkers.
    """

    def __init__(self, model: ModelConfig, features: FeatureConfig, target: TargetConfig, scene: SceneConfig,
                 sample_rate: int):
        super().__init__()
        if scene.mic_count != 2:
            raise ValueError(f"scene must have 2 microphones to train a localiser, got {scene.mic_count} "
                             f"(scene.num_mics or scene.mic_array_m)")
        if features.mask_width and model.kind is ModelKind.ORIGINAL:
            raise ValueError(f"features.mask_width must be 0 for model.kind=original, which has no masks, "
                             f"got {features.mask_width}")
        if target.mask_weight != TargetConfig.mask_weight and not features.mask_width:
            raise ValueError(f"target.mask_weight must be {TargetConfig.mask_weight:g} where features.mask_width is 0, "
                             f"as there are no masks, got {target.mask_weight}")
        if scene.array_radius_m is not None:
            raise ValueError(f"scene.array_radius_m must be null to train a localiser, whose microphones keep their "
                             f"spacing, got {scene.array_radius_m}")
        self.target, self.num_src = target, scene.num_src
        self.frame = HOP if model.kind is ModelKind.ORIGINAL else FRAME_HOPS * features.hop  # samples
        if target.offsets > self.frame:
            raise ValueError(f"target.offsets must be at most the {self.frame} samples of a frame, "
                             f"got {target.offsets}")
        grid = class_grid() if target.labels is Labels.HARD else angle_grid(target.grid_deg)
        self.register_buffer("grid", grid, persistent=False)
        if model.kind is ModelKind.ORIGINAL:
            if scene.num_src != 2:
                raise ValueError(f"scene.num_src must be 2 for model.kind=original, got {scene.num_src}")
            self.network = SSLModel(model.dropout, model.dropout, model.dropout, num_classes=len(grid),
                                    freeze_stft=model.freeze_stft, channels_last=model.channels_last)
        else:
            self.network = ConformerLocalizer(model, features, sample_rate, scene.aperture, scene.num_src, len(grid))

    @property
    def mirror(self) -> Mirror | None:
        """With model.symmetric, what keeps its weights their own mirror images, and None without."""
        return getattr(self.network, "mirror", None)

    @property
    def masks(self) -> bool:
        """Whether it learns masks, for which `training_losses` wants the direct sound in the mixtures."""
        return getattr(self.network, "mask", None) is not None

    def forward(self, audio: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        heard = self.network(audio)
        return torch.stack(heard, 1) if isinstance(self.network, SSLModel) else heard

    def training_losses(self, heard: Tensor | tuple[Tensor, Tensor], mixture: MixtureBatch) -> Tensor:
        """What training makes small the sum of, [1], or with masks [2]: `loss` of what forward heard in the mixtures'
        audio, in train mode, and target.mask_weight times the cross-entropy of the masks, in nats a bin.

        Raises ValueError where masks are learned and heard is not of train mode, or the mixtures are without direct.
        """
        if not self.masks:
            return self.loss(heard, mixture.scenes)[None]
        if not isinstance(heard, tuple) or mixture.direct is None:
            raise ValueError("a localiser that learns masks must be in train mode and have MixtureBatch.direct "
                             "(Simulator.render_direct) to be trained")
        logits, mask = heard
        of_masks = self.network.mask_loss(mask, mixture.audio, mixture.direct, mixture.scenes.valid.float())
        return torch.stack((self.loss(logits, mixture.scenes), self.target.mask_weight * of_masks))

    def loss(self, logits: Tensor, scenes: SceneBatch) -> Tensor:
        """Training loss, a scalar; scenes that are not valid do not count."""
        angle = scenes.cone_angle if self.target.angle is Target.CONE else scenes.azimuth
        angle = sorted_angles(angle.float())
        if self.target.labels is Labels.HARD:
            labels = hard_targets(angle, len(self.grid))
        else:
            labels = soft_targets(angle, self.grid, math.radians(self.target.sigma_deg))
        return localisation_loss(logits, labels, scenes.valid.float(), self.target.emd_weight)

    def angles(self, logits: Tensor, law: SceneLaw) -> tuple[Tensor, Tensor]:
        """Logits -> azimuth and cone angle, each [batch, track] rad ascending. The one that was not learned is the
        posterior median of the sorted angles under the scene law, given the one that was."""
        angle = decode(logits, self.grid, self.target.decoding)
        if self.target.angle is Target.CONE:
            return law.angle_map.cone_to_azimuth(angle), angle
        return angle, law.angle_map.azimuth_to_cone(angle)

    def hear(self, audio: Tensor) -> Tensor:
        """Logits [batch, track, angle] for evaluation: as they are, or the mean of the log-probabilities over
        target.offsets and, with target.mirror, those of the mirrored clip, where an angle a becomes pi - a, and the
        smallest the largest; with model.symmetric they are the same, and not computed."""
        heard = []
        for index in range(self.target.offsets):
            later = index * self.frame // self.target.offsets
            clip = nn.functional.pad(audio, (later, -later))            # of one length: nothing compiles again
            heard.append(self(clip))
            if self.target.mirror and self.mirror is None:
                heard.append(self(clip.flip(1)).flip(1, 2))
        return heard[0] if len(heard) == 1 else torch.stack([logits.log_softmax(-1) for logits in heard]).mean(0)

    @torch.no_grad()
    def estimate(self, audio: Tensor, law: SceneLaw, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """audio [batch, mic=2, sample], of any real dtype -> azimuth and cone angle of every talker, each [batch, src]
        rad ascending, float32.

        The module must be in eval mode. chunk: clips at a time, None for 8 on a CPU, 64 on a GPU. No clips have no
        angles: [0, src].
        Raises FloatingPointError when the network gives a NaN or an infinity, ValueError where the audio has one, and
        for a chunk that is no whole number of at least 1.
        """
        if chunk is None:
            chunk = CPU_CHUNK if runtime.prefers_parts(audio.device) else GPU_CHUNK
        if not isinstance(chunk, Integral) or chunk < 1:
            raise ValueError(f"chunk must be a whole number >= 1, got {chunk}")
        if len(audio) == 0:  # which MKL refuses to transform
            empty = self.grid.new_empty(0, self.num_src)
            return empty, empty.clone()
        audio = audio.float()
        logits = torch.cat([self.hear(part) for part in audio.split(int(chunk))])
        if not torch.isfinite(logits).all():
            finite = torch.isfinite(audio.flatten(1)).all(1)
            if not finite.all():
                raise ValueError(f"audio must be finite, that of clip {int(finite.long().argmin())} is not")
            raise FloatingPointError("the network's output is not finite: these weights cannot be used, in training "
                                     "lower train.lr")
        return self.angles(logits, law)
