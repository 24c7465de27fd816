"""Hybrid rooms: exact images up to a low order, then a random isotropic tail.

What tells a shoebox from FRA-RIR is its first reflections, so these are exact, at the price of a few dozen images. The
rest is statistics. With one image per room volume V and amplitude 1 / distance, the images between distance r and
r + dr carry an energy of 4 pi / V dr, times the walls' losses, 60 dB at 340 m/s * RT60. A fixed number of plane waves
with random signs, uniform over that distance and over the sphere, gets this energy; all microphones hear the same
ones, so that the coherence of two of them is that of a diffuse field, sin(k d) / (k d).
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ssl_gpu import rng, runtime
from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.directivity import Pattern, look_vector, pattern_gain
from ssl_gpu.ism import IsmConfig, Shoebox, image_table, nearest_slot, shortest_rt60, trace_images
from ssl_gpu.rir import RirConfig, is_early, last_early_slot, unit_from_polar
from ssl_gpu.runtime import constant
from ssl_gpu.scene import SceneBatch
from ssl_gpu.synthesis import PART, Arrivals, RirBatch, in_parts, slots_in_rir, synthesize


@dataclass(frozen=True, eq=False)
class TailBatch:
    """The random part of a batch of hybrid RIRs and nothing else; every microphone hears the same arrivals.

    direction [batch, src, arrival, 3] float32: unit vector that the arrival comes from;
    place [batch, src, arrival] float32: 0 at the start of the tail, 1 at its end, ascending;
    sign [batch, src, arrival] float32: 1 or -1;
    src_cosine [batch, src, arrival] float32: cosine at which the arrival left its source, None for omni sources.
    """

    direction: Tensor
    place: Tensor
    sign: Tensor
    src_cosine: Tensor | None

    def __getitem__(self, index: slice | Tensor) -> "TailBatch":
        """The tails of a slice or of an index tensor [n] of scenes."""
        return TailBatch(*(None if (x := getattr(self, f.name)) is None else x[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> "TailBatch":
        """The same tails on another device."""
        return TailBatch(*(None if (x := getattr(self, f.name)) is None else x.to(device) for f in fields(self)))


def draw_tail(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, *, generator: torch.Generator) -> TailBatch:
    """Draw the tail of every source of every scene, without a device sync.

    Directions are uniform over the sphere, both at the microphones and at the source; places are uniform in equal
    strata, one in each, which keeps the energy of every stretch of the tail close to its mean.
    The generator must be on the scenes' device.
    """
    device, shape = scenes.rt60.device, (*scenes.src_pos.shape[:2], cfg.tail_arrivals)

    def uniform(low: float, high: float) -> Tensor:
        return rng.uniform(shape, low, high, generator=generator)

    direction = unit_from_polar(uniform(-math.pi, math.pi), torch.acos(uniform(-1, 1)))
    place = (torch.arange(shape[-1], device=device) + uniform(0, 1)) / shape[-1]
    sign = torch.where(uniform(-1, 1) < 0, -1.0, 1.0)
    src_cosine = None if rir_cfg.src_pattern is Pattern.OMNI else uniform(-1, 1)
    return TailBatch(direction, place, sign, src_cosine)


def render_hybrid(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, tail: TailBatch,
                  fused: bool = False) -> RirBatch:
    """RIRs of direct path, exact images up to cfg.hybrid_order and a tail already drawn. Deterministic. fused: as for
    scatter.add_kernels.

    Never waits for the device, so it cannot refuse an infeasible RT60 but takes walls of absorption 0.99 for it:
    check_law (as Simulator does) or check_feasible beforehand.
    """
    if runtime.prefers_parts(scenes.rt60.device) and len(scenes) > PART:
        return in_parts(lambda some: render_hybrid(cfg, rir_cfg, scenes[some], tail[some], fused),
                        torch.arange(len(scenes)))
    arrivals = find_hybrid_arrivals(cfg, rir_cfg, scenes, tail)
    slots = slots_in_rir(rir_cfg.sample_rate, scenes.rt60)
    return synthesize(rir_cfg.sample_rate, arrivals, slots, scenes.max_rt60, fused,
                      early_stop=last_early_slot(rir_cfg, scenes))


def find_hybrid_arrivals(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, tail: TailBatch) -> Arrivals:
    """When and how strongly the direct path, the exact images and the tail reach every microphone, in this order."""
    box = Shoebox.of(cfg, scenes, rir_cfg.look_vector)
    images = trace_images(rir_cfg, box, _table_on(cfg.hybrid_order, scenes.rt60.device))
    slot, amplitude = (torch.cat(parts, -1) for parts in zip(images, _trace_tail(cfg, rir_cfg, scenes, tail)))
    last = slots_in_rir(rir_cfg.sample_rate, scenes.rt60)[:, None, None, None] - 1
    amplitude = torch.where(slot <= last, amplitude, 0.0)
    direct_slot, slot = slot[..., :1], torch.minimum(slot, last)
    return Arrivals(slot, amplitude, is_early(rir_cfg, slot, direct_slot, last) if rir_cfg.early else None)


@constant
def _table_on(order: int, device: torch.device) -> Tensor:
    """The cells of image_table, [3, 1, 1, 1, image] int64, on the device."""
    return torch.tensor(image_table(order), device=device).T[:, None, None, None]


def _trace_tail(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, tail: TailBatch) -> tuple[Tensor, Tensor]:
    """Slot int64 and amplitude float32 [batch, mic, src, arrival] of the tail's arrivals."""
    reach = SPEED_OF_SOUND * scenes.rt60[:, None, None]                # [batch, src, arrival], like the next ones
    path = 2 / scenes.room_dim.reciprocal().sum(-1)[:, None, None]     # the mean free path 4 V / S
    to_mic = torch.cdist(scenes.mic_pos, scenes.src_pos)               # [batch, mic, src]
    direct = to_mic.amax(1)[..., None]
    begin, end = (direct + paths * path for paths in cfg.tail_fade)
    span = (reach - begin).clamp(min=0)
    dist = begin + span * tail.place
    fade = ((dist - begin) / (end - begin)).clamp(max=1)
    # 60 dB are lost on the way of one RT60; an infeasible RT60 is lengthened as its walls lengthen it.
    loss = dist / (SPEED_OF_SOUND * torch.maximum(scenes.rt60, shortest_rt60(cfg, scenes.room_dim)))[:, None, None]
    volume = scenes.room_dim.prod(-1)[:, None, None]
    energy = 4 * math.pi / volume * span / tail.place.shape[-1] * fade * 10 ** (-6 * loss)
    amplitude = (tail.sign * energy.sqrt().to(torch.float32))[:, None]
    offset = scenes.mic_pos - scenes.array_centre[:, None]
    ahead = sum(offset[..., axis, None, None] * tail.direction[:, None, ..., axis] for axis in range(3))
    if tail.src_cosine is not None:
        amplitude = amplitude * pattern_gain(rir_cfg.src_pattern, tail.src_cosine)[:, None]
    if rir_cfg.mic_pattern is not Pattern.OMNI:
        look = look_vector(scenes.mic_orientation, rir_cfg.look_vector).to(torch.float32)[:, :, None, None]
        amplitude = amplitude * pattern_gain(rir_cfg.mic_pattern, (look * tail.direction[:, None]).sum(-1))
    travelled = dist[:, None] - ahead
    # In an array some metres wide, or with a fade from 0 on, a wave may pass a microphone before its direct sound does.
    amplitude = torch.where(travelled >= to_mic[..., None], amplitude, 0.0)
    return nearest_slot(rir_cfg, travelled).clamp(min=0), amplitude
