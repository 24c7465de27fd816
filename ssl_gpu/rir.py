"""FRA-RIR, the fast random approximation of room impulse responses, as batched tensor operations.

The method is that of arXiv 2208.04101 and its multi-channel form, arXiv 2304.08052: a direct path, and a few thousand
random images whose distances, directions and reflection counts follow simple laws. This module draws them and finds
when and how strongly each arrives; ssl_gpu.synthesis makes RIRs of the arrivals.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Sequence

import torch
from torch import Tensor

from ssl_gpu import rng, runtime
from ssl_gpu.acoustics import (DISTANCE_EPSILON, LEAST_COEFFICIENT, SABINE, SPEED_OF_SOUND, distance,
                               reflection_coefficient)
from ssl_gpu.bands import air_absorption_db, band_gain, decay_rate, join_bands, octave_centres
from ssl_gpu.checks import check_fields
from ssl_gpu.directivity import LookVector, Pattern, look_vector, pattern_gain
from ssl_gpu.laws import (Decay, ImageDirections, ImageRange, SrcDirections, diffuse_amplitude, perturbation_gain,
                          reverberation_gain)
from ssl_gpu.scene import ROUNDING, SceneBatch, distances
from ssl_gpu.synthesis import (MAIN_TAPS, OVERSAMPLING, Arrivals, RirBatch, in_parts, slots_in_rir,
                               synthesize, synthesize_added)


# Room for images on a CPU is a multiple of this many: at the end of other rows torch's loops take other instructions,
# by which some amplitudes are one bit off, and an RIR would depend on what it is rendered with.
ALIGNED = 64


class Method(Enum):
    """How rooms are simulated: FRA-RIR, this module; the exact image-source method, and its first orders with a random
    tail, both in ssl_gpu.ism."""

    FRA = "fra"
    ISM = "ism"
    HYBRID = "hybrid"


FRA_CHOICES = ("num_images", "perturbation", "perturbation_exponent", "images_per_s", "image_directions",
               "src_directions", "decay", "image_range")


@dataclass(frozen=True)
class RirConfig:
    """How RIRs are made, and what FRA-RIR may be told; the defaults are the reference's.

    method: the simulator of every room. ism is for cross-checks: exact, slow, and it waits for the device.
    hybrid_share, ism_share: with method=fra, the probabilities that a scene is rendered by hybrid or by ism instead.
        Their RT60 is that of the decay; FRA-RIR's is only with decay=measured, else its T20 is about twice as long.
    sample_rate: Hz.
    num_images: range of the uniform integer law of the number of images, both ends included.
    perturbation: range of the uniform law U in a reflection count's perturbation U ratio^perturbation_exponent.
    src_pattern, mic_pattern: polar patterns; orientations belong to the scene.
    early: render the early RIR as well; RirBatch.early is None otherwise.
    early_window_ms: the early part, whole ms relative to the direct path.

    Choices where the reference is wrong (ssl_gpu.laws, docs/fidelity.md):
    image_directions: images from above only, or from all round.
    src_directions: of patterned sources, in which directions images leave them.
    look_vector: what patterns look along, see directivity.look_vector; for ism and hybrid, too.
    image_range: how far images reach, short of the end of the RIR or up to it.
    images_per_s: range of the uniform integer law of the number of images per second of RT60; the batch has room for
        those of max_rt60. None: num_images, however long the RIR.
    decay: what RT60 means; measured makes it T20. Its reflections begin right behind the direct sound, without the gap
        of some ms that rooms have: where the direct sound matters, method=hybrid or a hybrid_share has that gap.
    band_rt60_ratio: for every octave band from 125 Hz to half the sample rate the range of the uniform law of its RT60
        over the scene's, in 0..1: the scene's is that of the slowest band. None: all bands alike.
    air: temperature in C and relative humidity in percent of air that absorbs sound (ISO 9613-1). None: it does not.
        This and band_rt60_ratio render every octave band on its own, as many times the cost.

    Raises ValueError naming the field, its value and the rule.
    """

    method: Method = Method.FRA
    hybrid_share: float = 0.0
    ism_share: float = 0.0
    sample_rate: int = 16000
    num_images: tuple[int, int] = (1024, 4096)
    perturbation: tuple[float, float] = (-2.0, 2.0)
    perturbation_exponent: float = 0.25
    src_pattern: Pattern = Pattern.OMNI
    mic_pattern: Pattern = Pattern.OMNI
    early: bool = True
    early_window_ms: tuple[int, int] = (-6, 50)
    image_directions: ImageDirections = ImageDirections.UPPER
    src_directions: SrcDirections = SrcDirections.PRODUCT
    look_vector: LookVector = LookVector.REFERENCE
    image_range: ImageRange = ImageRange.REFERENCE
    images_per_s: tuple[int, int] | None = None
    decay: Decay = Decay.NOMINAL
    band_rt60_ratio: tuple[tuple[float, float], ...] | None = None
    air: tuple[float, float] | None = None

    def __post_init__(self):
        check_fields(self, "rir", air="(temperature, humidity)")
        self._check_shares()
        if self.sample_rate < 1000:
            raise ValueError(f"rir.sample_rate must be >= 1000 Hz, got {self.sample_rate}")
        if not 1 <= self.num_images[0] <= self.num_images[1]:
            raise ValueError(f"rir.num_images must satisfy 1 <= low <= high, got {self.num_images}")
        if not -math.inf < self.perturbation[0] <= self.perturbation[1] < math.inf:
            raise ValueError(f"rir.perturbation must satisfy -inf < low <= high < inf, got {self.perturbation}")
        if not math.isfinite(self.perturbation_exponent):
            raise ValueError(f"rir.perturbation_exponent must be finite, got {self.perturbation_exponent}")
        if not self.early_window_ms[0] < self.early_window_ms[1]:
            raise ValueError(f"rir.early_window_ms must satisfy low < high, got {self.early_window_ms}")
        if self.images_per_s is not None and not 1 <= self.images_per_s[0] <= self.images_per_s[1]:
            raise ValueError(f"rir.images_per_s must satisfy 1 <= low <= high, got {self.images_per_s}")
        self._check_choices()
        self._check_bands()

    def _check_shares(self):
        for name in ("hybrid_share", "ism_share"):
            share = getattr(self, name)
            if not 0 <= share <= 1:
                raise ValueError(f"rir.{name} must be in 0..1, got {share}")
            if share > 0 and self.method is not Method.FRA:
                raise ValueError(f"rir.{name} must be 0 unless rir.method is fra, got {share} with {self.method.value}")
        if self.hybrid_share + self.ism_share > 1:
            raise ValueError(f"rir.hybrid_share + rir.ism_share must be <= 1, got {self.hybrid_share} + "
                             f"{self.ism_share}")

    def _check_choices(self):
        if self.method is Method.FRA:
            return
        for field in fields(self):  # which the images of the walls have no use for
            if field.name in FRA_CHOICES and getattr(self, field.name) != field.default:
                value = getattr(self, field.name)
                raise ValueError(f"rir.{field.name} is a choice of rir.method=fra only, got "
                                 f"{value.value if isinstance(value, Enum) else value} with {self.method.value}")

    def _check_bands(self):
        if self.uses_walls and self.in_bands:
            name = "air" if self.band_rt60_ratio is None else "band_rt60_ratio"
            raise ValueError(f"rir.{name} must be null unless rir.method is fra and rir.hybrid_share and rir.ism_share "
                             f"are 0, got {getattr(self, name)}")
        bands = octave_centres(self.sample_rate)
        if self.band_rt60_ratio is not None:
            if len(self.band_rt60_ratio) != len(bands):
                raise ValueError(f"rir.band_rt60_ratio must hold a range for each of {len(bands)} octaves, from "
                                 f"{bands[0]:g} to {bands[-1]:g} Hz, got {len(self.band_rt60_ratio)}")
            for ratio in self.band_rt60_ratio:
                if not 0 < ratio[0] <= ratio[1] <= 1:
                    raise ValueError(f"rir.band_rt60_ratio must satisfy 0 < low <= high <= 1, got {ratio}")
        if self.air is not None and not (-20 <= self.air[0] <= 50 and 10 <= self.air[1] <= 100):
            raise ValueError(f"rir.air must be a temperature in -20..50 C and a humidity in 10..100 %, got {self.air}")

    @property
    def in_bands(self) -> bool:
        """Whether every octave band is rendered on its own."""
        return self.band_rt60_ratio is not None or self.air is not None

    @property
    def uses_walls(self) -> bool:
        """Whether a room may be rendered from the images of its walls, so that its RT60 must be feasible."""
        return self.method is not Method.FRA or self.is_mixed

    @property
    def is_mixed(self) -> bool:
        """Whether every scene draws its own method."""
        return self.hybrid_share + self.ism_share > 0


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """The random part of a batch of RIRs and nothing else; every microphone hears the same images. It belongs to the
    scenes that it was drawn for: with its source moved away, an image would come after the end of the RIR.

    direction [batch, src, image, 3] float32: unit vector from the source's nearest microphone to the image;
    ratio [batch, src, image] float32: distance of the image over distance of the source, both to that microphone;
    perturbation [batch, src, image] float32: the raw U of the reflection count's perturbation;
    src_cosine [batch, src, image] float32: cosine at which the image leaves its source, None for omni sources;
    active [batch, image] bool: False pads a scene with fewer images than the batch has room for;
    band_ratio [batch, band] float32: RT60 of an octave band over the scene's, None where all are alike.
    """

    direction: Tensor
    ratio: Tensor
    perturbation: Tensor
    src_cosine: Tensor | None
    active: Tensor
    band_ratio: Tensor | None = None

    def __getitem__(self, index: slice | Tensor) -> "ImageBatch":
        """The images of a slice or of an index tensor [n] of scenes."""
        direction = self.direction.movedim(-1, 0)[:, index].movedim(0, -1)  # its axes stay apart in memory
        others = [getattr(self, f.name) for f in fields(self)[1:]]
        return ImageBatch(direction, *(None if x is None else x[index] for x in others))

    def without_padding(self, index: slice | Tensor) -> "ImageBatch":
        """The images of some scenes, with no more room than these need; waits for the device."""
        there = self.active[index].any(0).nonzero()
        most = -(-(int(there[-1]) + 1 if len(there) else 1) // ALIGNED) * ALIGNED
        cosine = None if self.src_cosine is None else self.src_cosine[..., :most]
        return ImageBatch(self.direction[:, :, :most], self.ratio[..., :most], self.perturbation[..., :most], cosine,
                          self.active[:, :most], self.band_ratio)[index]

    def to(self, device: torch.device | str) -> "ImageBatch":
        """The same images on another device."""
        return ImageBatch(*(None if (x := getattr(self, f.name)) is None else x.to(device) for f in fields(self)))

    @classmethod
    def concatenate(cls, batches: Sequence["ImageBatch"]) -> "ImageBatch":
        """The images of several batches, with room for as many images and by the same RirConfig, as one."""
        columns = ([getattr(batch, f.name) for batch in batches] for f in fields(cls))
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


def nearest_mic(scenes: SceneBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Offsets source to microphone [batch, mic, src, 3] m, their distances [batch, mic, src] m as the reference
    measures them, and the index of the microphone nearest to each source [batch, src]."""
    offset = scenes.src_pos[:, None] - scenes.mic_pos[:, :, None]
    direct = distance(offset)
    return offset, direct, direct.argmin(1)


def closest_mic(scenes: SceneBatch) -> Tensor:
    """How far every source is from the microphone nearest to it, [batch, src] m, as nearest_mic measures it; on a GPU
    in few kernels, and to a few roundings of float64."""
    if not runtime.is_gpu(scenes.rt60.device):
        return nearest_mic(scenes)[1].amin(1)
    dist = distances(scenes.src_pos, scenes.mic_pos).amin(-1)
    return (dist * dist + DISTANCE_EPSILON).sqrt()


def draw_images(cfg: RirConfig, scenes: SceneBatch, *, generator: torch.Generator) -> ImageBatch:
    """Draw the images of every source of every scene, on the scenes' device, without a device sync.

    One uniform number of images per scene, unless scenes.num_images says how many. Distance ratio
    r = 1 + (340 RT60 / d - 2) sqrt(U), the continuous form of the reference's P(k) proportional to k on a grid, or
    1 + (..) U for cfg.decay=measured; azimuth U(-pi, pi) and an angle U(-pi/2, pi/2) that is used as polar angle, so
    that all images lie in the upper half space, dense at the zenith: the reference's law. For the others see
    ssl_gpu.laws.
    The generator must be on the scenes' device. Raises ValueError for another cfg.method, which has no such images.
    """
    if cfg.method is not Method.FRA:
        raise ValueError(f"draw_images is of rir.method=fra, got {cfg.method.value}; rooms.draw_rooms draws for any")
    device, (batch, num_src) = scenes.rt60.device, scenes.src_pos.shape[:2]
    low, high = cfg.num_images if cfg.images_per_s is None else cfg.images_per_s
    most = high if cfg.images_per_s is None else math.ceil(high * scenes.max_rt60)
    most = max(most, scenes.max_images or 0)
    shape = (batch, num_src, most)

    def uniform(a: float, b: float) -> Tensor:
        return rng.uniform(shape, a, b, generator=generator)

    count = torch.randint(low, high + 1, (batch, 1), generator=generator, device=device)
    if cfg.images_per_s is not None:
        count = (count * scenes.rt60[:, None]).ceil()
    if scenes.num_images is not None:  # and yet it is drawn: or all that follows would be other numbers
        count = torch.where(scenes.num_images[:, None] > 0, scenes.num_images[:, None], count)
    span = image_span(cfg, scenes.rt60[:, None], closest_mic(scenes)).to(torch.float32)
    place = uniform(0, 1) if cfg.decay is Decay.MEASURED else rounded_root(uniform(0, 1))
    ratio = place.mul_(span[..., None]).add_(1)
    azimuth = uniform(-math.pi, math.pi)
    sphere = cfg.image_directions is ImageDirections.SPHERE
    polar = torch.acos(uniform(-1, 1)) if sphere else uniform(-math.pi / 2, math.pi / 2)
    perturbation = uniform(*cfg.perturbation)
    src_cosine = None
    if cfg.src_pattern is not Pattern.OMNI:
        src_cosine = uniform(-1, 1) if cfg.src_directions is SrcDirections.SPHERE else \
            torch.cos(uniform(-math.pi, math.pi)) * torch.cos(uniform(-math.pi, math.pi))
    active = runtime.indices(most, device) < count
    return ImageBatch(unit_from_polar(azimuth, polar), ratio, perturbation, src_cosine, active,
                      draw_band_ratio(cfg, batch, generator=generator))


def rounded_root(x: Tensor) -> Tensor:
    """Square root of x float32, correctly rounded, as it is on a GPU anyway: draws made on a CPU are to be the same on
    any. There torch leaves roots to MKL, by which 0.6 % of them came out one bit off on one CPU, and other ones on
    another; a float64 root that is one bit off rounds to another float32 once in 2^28 times. x may be overwritten."""
    return x.double().sqrt_().to(torch.float32) if x.device.type == "cpu" else x.sqrt_()


def draw_band_ratio(cfg: RirConfig, batch: int, *, generator: torch.Generator) -> Tensor | None:
    """RT60 of every octave band over the scene's, [batch, band] float32, on the generator's device, if they differ."""
    if cfg.band_rt60_ratio is None:
        return None
    draw = torch.rand(batch, len(cfg.band_rt60_ratio), generator=generator, dtype=torch.float32,
                      device=generator.device)
    return torch.stack([low + (high - low) * draw[:, band]
                        for band, (low, high) in enumerate(cfg.band_rt60_ratio)], -1)


def image_span(cfg: RirConfig, rt60: Tensor, closest: Tensor) -> Tensor:
    """rt60 [...] s, source distance closest [...] m -> largest distance ratio of an image, less 1."""
    return SPEED_OF_SOUND * rt60 / closest - (1 if cfg.image_range is ImageRange.FULL else 2)


def unit_from_polar(azimuth: Tensor, polar: Tensor) -> Tensor:
    """Azimuth and polar angle from +z [...] rad, of one shape -> unit vector [..., 3], in their dtype, its axes apart
    in memory; without gradients."""
    axes = torch.empty(3, *azimuth.shape, dtype=azimuth.dtype, device=azimuth.device)  # no copies to put them together
    torch.cos(azimuth, out=axes[0])
    torch.sin(azimuth, out=axes[1])
    axes[:2].mul_(torch.sin(polar))
    torch.cos(polar, out=axes[2])
    return axes.movedim(0, -1)


def find_arrivals(cfg: RirConfig, scenes: SceneBatch, images: ImageBatch) -> Arrivals:
    """When and how strongly the direct path and every image reach every microphone (arXiv 2208.04101, section 2).

    Distance to slot is float64, the amplitudes are float32: float32 geometry moves 1 to 8 % of the slots by one.
    """
    offset, direct, nearest = nearest_mic(scenes)
    closest = direct.gather(1, nearest[:, None])                       # [batch, 1, src]
    image_offset = _offset_to_images(scenes, images, nearest, closest)
    dist = distance(image_offset)
    direct_gain, image_gain = _pattern_gains(cfg, scenes, images, offset, image_offset)
    direct_amplitude = direct.to(torch.float32).reciprocal() * direct_gain
    amplitude = image_amplitude(cfg, scenes, images, dist, closest)
    if cfg.decay is Decay.MEASURED:
        images_there = amplitude.gather(1, nearest[:, None, :, None].expand(-1, -1, -1, amplitude.shape[-1]))
        amplitude = amplitude * reverberation_gain(closest.to(torch.float32).reciprocal(), images_there)[..., None]
    amplitude = amplitude * image_gain

    dist = torch.cat((direct[..., None], dist), -1)
    unclamped = torch.ceil(dist * (OVERSAMPLING * cfg.sample_rate) / SPEED_OF_SOUND).to(torch.int64)
    last = slots_in_rir(cfg.sample_rate, scenes.rt60)[:, None, None, None] - 1
    slot = torch.minimum(unclamped, last)
    if cfg.image_range is ImageRange.FULL:
        amplitude = torch.where(unclamped[..., 1:] <= last, amplitude, 0.0)
    early = is_early(cfg, slot, unclamped[..., :1], last) if cfg.early else None
    return Arrivals(slot, torch.cat((direct_amplitude[..., None], amplitude), -1), early)


def direct_arrivals(cfg: RirConfig, scenes: SceneBatch) -> Arrivals:
    """The first of find_arrivals alone, the direct path: [batch, mic, src, 1]."""
    offset, direct, _ = nearest_mic(scenes)
    slot = torch.ceil(direct * (OVERSAMPLING * cfg.sample_rate) / SPEED_OF_SOUND).to(torch.int64)
    last = slots_in_rir(cfg.sample_rate, scenes.rt60)[:, None, None] - 1
    amplitude = direct.to(torch.float32).reciprocal() * _direct_gain(cfg, scenes, offset)
    return Arrivals(torch.minimum(slot, last)[..., None], amplitude[..., None], None)


def _offset_to_images(scenes: SceneBatch, images: ImageBatch, nearest: Tensor, closest: Tensor) -> Tensor:
    """From every microphone to every image, [batch, mic, src, image, 3] m, x, y and z apart in memory.

    nearest [batch, src], closest [batch, 1, src] m: index and distance of the microphone that images are placed around.
    """
    to_nearest = scenes.mic_pos.gather(1, nearest[..., None].expand(-1, -1, 3))[:, None] - scenes.mic_pos[:, :, None]
    image_dist = closest.squeeze(1)[..., None] * images.ratio          # [batch, src, image]
    return torch.stack([to_nearest[..., axis, None] + (image_dist * images.direction[..., axis])[:, None]
                        for axis in range(3)]).movedim(0, -1)


def _pattern_gains(cfg: RirConfig, scenes: SceneBatch, images: ImageBatch, offset: Tensor,
                   image_offset: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Gains of the polar patterns, of the direct path [batch, mic, src] and of the images [batch, mic, src, image]
    float32, or 1; offset, image_offset [..., 3] m: from the microphones to the sources and to the images."""
    image = 1.0
    if images.src_cosine is not None:
        image = pattern_gain(cfg.src_pattern, images.src_cosine)[:, None]
    if cfg.mic_pattern is not Pattern.OMNI:
        look = scenes.mic_orientation[:, :, None, None]
        image = image * _gain(cfg.look_vector, cfg.mic_pattern, look, image_offset)
    return _direct_gain(cfg, scenes, offset), image


def _direct_gain(cfg: RirConfig, scenes: SceneBatch, offset: Tensor) -> Tensor | float:
    """Gain of the polar patterns on the direct path, [batch, mic, src] float32, or 1; offset as above."""
    gain = 1.0
    if cfg.src_pattern is not Pattern.OMNI:
        gain = _gain(cfg.look_vector, cfg.src_pattern, scenes.src_orientation[:, None], -offset)
    if cfg.mic_pattern is not Pattern.OMNI:
        gain = gain * _gain(cfg.look_vector, cfg.mic_pattern, scenes.mic_orientation[:, :, None], offset)
    return gain


def image_amplitude(cfg: RirConfig, scenes: SceneBatch, images: ImageBatch, dist: Tensor, closest: Tensor) -> Tensor:
    """Of images at dist [batch, mic, src, image] m, polar patterns aside, likewise float32.

    closest [batch, 1, src] m: distance of the source to its nearest microphone.
    """
    reach = SPEED_OF_SOUND * scenes.rt60[:, None, None, None]          # m travelled in one RT60
    coefficient = reflection_coefficient(scenes.room_dim, scenes.rt60)[:, None, None, None]
    max_reflections = (torch.log10(reach) - 3) / torch.log10(coefficient)
    widening = images.ratio ** cfg.perturbation_exponent
    spread = images.perturbation * widening
    reflections = ((dist / reach) * (max_reflections - 1) + 1).to(torch.float32) + spread[:, None]
    log2_coefficient = torch.log2(coefficient).to(torch.float32)
    if cfg.decay is Decay.MEASURED:
        spacing = (image_span(cfg, scenes.rt60[:, None, None], closest) * closest).abs()[..., None]
        spacing = spacing / images.active.sum(-1)[:, None, None, None]
        low, high = (reflections + (end * widening - spread)[:, None] for end in cfg.perturbation)
        decay = diffuse_amplitude(scenes.room_dim.prod(-1)[:, None, None, None], spacing, dist / reach)
        decay = decay * perturbation_gain(reflections, low, high, log2_coefficient)
    else:
        decay = torch.exp2(reflections.clamp(min=1) * log2_coefficient) / dist.to(torch.float32)
    return torch.where(images.active[:, None, None], decay, 0.0)


def last_direct_slot(cfg: RirConfig, scenes: SceneBatch) -> int | None:
    """The last slot that the direct path of one of the scenes may be in, None where nothing is known of them.

    Raises ValueError, on a CPU, where a source is beyond scenes.max_dist; a GPU would have to be waited for.
    """
    if scenes.max_dist is None:
        return None
    if runtime.prefers_parts(scenes.rt60.device):
        farthest = float(distances(scenes.src_pos.detach(), scenes.mic_pos.detach()).max())
        if farthest > scenes.max_dist * ROUNDING:
            raise ValueError(f"scenes.max_dist must be a distance that no source exceeds, or None where positions were "
                             f"replaced, got {scenes.max_dist:.6g} m and a source {farthest:.6g} m from a microphone")
    return math.ceil(math.hypot(scenes.max_dist, math.sqrt(DISTANCE_EPSILON)) / SPEED_OF_SOUND
                     * (OVERSAMPLING * cfg.sample_rate)) + 1


def last_early_slot(cfg: RirConfig, scenes: SceneBatch) -> int | None:
    """Likewise of what is_early; None without early parts, too."""
    direct = last_direct_slot(cfg, scenes) if cfg.early else None
    return None if direct is None else max(0, direct + math.floor(OVERSAMPLING * cfg.sample_rate
                                                                  * cfg.early_window_ms[1] / 1000))


def is_early(cfg: RirConfig, slot: Tensor, direct_slot: Tensor, last: Tensor) -> Tensor:
    """Which slots [..., image] int64 are in the early window after the direct path, and not behind the last slot."""
    start, stop = (math.floor(OVERSAMPLING * cfg.sample_rate * ms / 1000) for ms in cfg.early_window_ms)
    return (slot >= (direct_slot + start).clamp(min=0)) & (slot < torch.minimum(direct_slot + stop, last + 1))


def _gain(law: LookVector, pattern: Pattern, orientation: Tensor, offset: Tensor) -> Tensor:
    """Gain [...] float32 of a pattern that looks along orientation [..., 2] rad, towards offset [..., 3] m."""
    look = look_vector(orientation, law).to(torch.float32)
    towards = offset.to(torch.float32)
    cosine = (look * towards).sum(-1) / torch.linalg.vector_norm(towards, dim=-1)
    return pattern_gain(pattern, cosine)


def render_rir(cfg: RirConfig, scenes: SceneBatch, images: ImageBatch, fused: bool = False) -> RirBatch:
    """FRA-RIR of every source at every microphone of every scene, from images already drawn. fused: as for
    scatter.add_kernels.

    The whole RIR is within 3e-7 (relative L2) of the reference's chain computed in float64, with two exceptions: its
    last 6 taps, where the reference cuts its 8x signal (3e-6 of the peak in the median, 7e-5 at most; more where an
    array some metres wide has images in the last slot), and the reference's clamp to [-1, 1] at the 8x rate, which a
    source nearer than 0.12 m to a microphone can reach and which is left out.
    Raises ValueError for another cfg.method, or a share of another.
    """
    if cfg.method is not Method.FRA or cfg.is_mixed:
        raise ValueError(f"render_rir is of rir.method=fra alone, got {cfg.method.value} with rir.hybrid_share="
                         f"{cfg.hybrid_share}, rir.ism_share={cfg.ism_share}; rooms.render_rooms renders any")
    if fused and can_add_images(cfg, scenes):
        slots = slots_in_rir(cfg.sample_rate, scenes.rt60)
        return synthesize_added(cfg.sample_rate, (len(scenes), scenes.mic_pos.shape[1], scenes.src_pos.shape[1]),
                                lambda total, table: add_images(cfg, scenes, images, total, table), slots,
                                scenes.max_rt60)
    if not runtime.prefers_parts(scenes.rt60.device):
        return _render(cfg, scenes, images, fused)
    return in_parts(lambda some: _render(cfg, scenes[some], images.without_padding(some), fused),
                    images.active.sum(-1).argsort(stable=True))


def _render(cfg: RirConfig, scenes: SceneBatch, images: ImageBatch, fused: bool) -> RirBatch:
    """render_rir, all scenes at a time."""
    slots = slots_in_rir(cfg.sample_rate, scenes.rt60)
    arrivals = find_arrivals(cfg, scenes, images)
    if cfg.in_bands:
        return _render_bands(cfg, scenes, images, arrivals, slots, fused)
    return synthesize(cfg.sample_rate, arrivals, slots, scenes.max_rt60, fused,
                      early_stop=last_early_slot(cfg, scenes))


def can_add_images(cfg: RirConfig, scenes: SceneBatch) -> bool:
    """Whether add_images has a kernel for this: on a GPU, for the whole RIR of omni sources and microphones, by the
    reference's decay."""
    plain = cfg.src_pattern is cfg.mic_pattern is Pattern.OMNI and cfg.decay is Decay.NOMINAL
    return runtime.is_gpu(scenes.rt60.device) and plain and not cfg.early and not cfg.in_bands


def add_images(cfg: RirConfig, scenes: SceneBatch, images: ImageBatch, total: Tensor, table: Tensor,
               chosen: Tensor | None = None) -> None:
    """find_arrivals and scatter.add_kernels in two kernels, where can_add_images: adds to total [2, batch, mic, src,
    sample], of the scenes that are chosen [batch] bool (None: all); table [phase, tap]."""
    from ssl_gpu import fused  # Triton is not everywhere where torch is
    places, rooms = fused.image_tables_fused(
        scenes.mic_pos, scenes.src_pos, scenes.room_dim, scenes.rt60, chosen,
        image_numbers(cfg.sample_rate, scenes.rt60.device), float(OVERSAMPLING * cfg.sample_rate))
    fused.add_images_fused(total, table, places, rooms, images.direction, images.ratio, images.perturbation,
                           images.active, cfg.perturbation_exponent, cfg.image_range is ImageRange.FULL, MAIN_TAPS)


@runtime.constant
def image_numbers(sample_rate: int, device: torch.device) -> Tensor:
    """What fused.image_tables_program reckons with, [7] float64 on the device: DISTANCE_EPSILON; slots per metre;
    SPEED_OF_SOUND; 1; the factor of 1 / (1 / x + 1 / y + 1 / z) / RT60, which is half that of V / S / RT60, in the
    exponent of reflection_coefficient; LEAST_COEFFICIENT; log2 of 1000."""
    return torch.tensor((DISTANCE_EPSILON, OVERSAMPLING * sample_rate / SPEED_OF_SOUND, SPEED_OF_SOUND, 1.0,
                         -0.5 * SABINE, LEAST_COEFFICIENT, math.log2(1000)), dtype=torch.float64).to(device)


def _render_bands(cfg: RirConfig, scenes: SceneBatch, images: ImageBatch, arrivals: Arrivals, slots: Tensor,
                  fused: bool) -> RirBatch:
    """Every octave band on its own, its arrivals as much weaker as walls and air make them on their way."""
    reach = SPEED_OF_SOUND * scenes.rt60
    travelled = arrivals.slot / (scenes.rt60 * (OVERSAMPLING * cfg.sample_rate))[:, None, None, None]
    parts, rates, early_stop = [], [], last_early_slot(cfg, scenes)
    for band, freq in enumerate(octave_centres(cfg.sample_rate)):
        air = 0.0 if cfg.air is None else air_absorption_db(freq, *cfg.air)
        ratio = None if images.band_ratio is None else images.band_ratio[:, band]
        weaker = replace(arrivals, amplitude=arrivals.amplitude * band_gain(air, ratio, travelled, reach))
        parts.append(synthesize(cfg.sample_rate, weaker, slots, scenes.max_rt60, fused, early_stop=early_stop))
        rates.append(decay_rate(air, ratio, reach))
    inside = torch.arange(parts[0].full.shape[-1], device=slots.device) < parts[0].length[:, None, None, None]
    full, early = (None if columns[0] is None else torch.where(inside, join_bands(columns, rates, cfg.sample_rate), 0.0)
                   for columns in ([part.full for part in parts], [part.early for part in parts]))
    return replace(parts[0], full=full, early=early, early_end=None)    # bands ring on for longer
