"""The image-source method for shoebox rooms: every mirror image of a source that can be heard within one RT60.

A wall mirrors the room behind it, so in a rectangular room the images of a source fill a lattice (Allen and Berkley,
J. Acoust. Soc. Am. 65, 1979): cell n of an axis of length L holds the source at n L + x, or at n L + L - x where n is
odd, after |n| reflections by the two walls of that axis. An image of `order` reflections at `distance` arrives after
distance / 340 s with amplitude coefficient^order / distance.

All walls absorb alike, as much as the formula of Sabine or Eyring asks for the scene's RT60. Scale, high-pass, length
and early part of an RIR are those of ssl_gpu.rir. Two things differ on purpose, so that the method is exact: distances
are true, without the 1e-3 m^2 that the reference of FRA-RIR adds under the root (0.1 sample at 0.2 m, 0.01 at 2 m), and
arrivals go to the nearest 1/64 sample instead of the next.
"""
from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import torch
from torch import Tensor

from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.checks import check_fields
from ssl_gpu.directivity import LookVector, Pattern, look_vector, pattern_gain
from ssl_gpu.rir import RirConfig, is_early
from ssl_gpu.scene import SceneBatch, SceneConfig
from ssl_gpu.synthesis import OVERSAMPLING, RirBatch, slots_in_rir, synthesize_dense, taps_for

DECAY = 24 * math.log(10)  # the 60 dB of RT60, over the 1/4 of the mean free path 4 V / S
# At 1 a wall reflects nothing and no RT60 is left; what formulas say near it is no longer heard in the room.
MAX_ABSORPTION = 0.99
CELLS = 1 << 17            # of the lattice at a time: bounds the memory of the exact method
TRAIN_SLOTS = 1 << 24      # of the 64x grid at a time, 64 MiB: likewise


class Absorption(Enum):
    """RT60 to absorption: Sabine's 24 ln(10) V / (c S RT60), or Eyring's 1 - exp(-Sabine's), which fits any RT60."""

    SABINE = "sabine"
    EYRING = "eyring"


@dataclass(frozen=True)
class IsmConfig:
    """absorption: formula from RT60 to the walls' absorption.
    clamp_infeasible: render a room that cannot have an RT60 so short with walls of absorption 0.99, the shortest it can
        have; its RIRs are still RT60 long. False: an error that names the feasible range, by rooms.render_rooms (of
        hybrid rooms on a GPU by Simulator alone: hybrid.render_hybrid).
    max_order: of the images of the exact method, to bound its cost: reverberation then ends early. None: all images
        within 340 m/s * RT60, 2.5 million per source and microphone in 22 m^3 at 0.7 s.
    hybrid_order: of the exact images of hybrid rooms; 3 makes 63.
    tail_arrivals: random arrivals per source in the tail of hybrid rooms.
    tail_fade: mean free paths 4 V / S after the direct path between which the tail's energy rises from zero to all.
        The images of order 3 are not over after three: (1, 3) has 0.4 dB more reverberation than the exact method by
        Eyring and 1.1 dB by Sabine, (2, 4) -0.15 and 0.5 dB (docs/fidelity.md).

    Raises ValueError naming the field, its value and the rule.
    """

    absorption: Absorption = Absorption.SABINE
    clamp_infeasible: bool = False
    max_order: int | None = None
    hybrid_order: int = 3
    tail_arrivals: int = 2048
    tail_fade: tuple[float, float] = (1.0, 3.0)

    def __post_init__(self):
        check_fields(self, "ism")
        if self.max_order is not None and self.max_order < 0:
            raise ValueError(f"ism.max_order must be >= 0, or null for all images, got {self.max_order}")
        if self.hybrid_order < 0:
            raise ValueError(f"ism.hybrid_order must be >= 0, got {self.hybrid_order}")
        if self.tail_arrivals < 1:
            raise ValueError(f"ism.tail_arrivals must be >= 1, got {self.tail_arrivals}")
        if not 0 <= self.tail_fade[0] < self.tail_fade[1] < math.inf:
            raise ValueError(f"ism.tail_fade must satisfy 0 <= low < high < inf, got {self.tail_fade}")


# ---- absorption ----


def shortest_rt60(cfg: IsmConfig, room_dim: Tensor) -> Tensor:
    """Of rooms room_dim [..., 3] m, [...] s: their RT60, by the chosen formula, with walls of absorption 0.99."""
    volume_over_surface = 0.5 / room_dim.reciprocal().sum(-1)
    largest = MAX_ABSORPTION if cfg.absorption is Absorption.SABINE else -math.log1p(-MAX_ABSORPTION)
    return DECAY / SPEED_OF_SOUND / largest * volume_over_surface


def wall_absorption(cfg: IsmConfig, room_dim: Tensor, rt60: Tensor) -> Tensor:
    """Share of the energy that each wall takes, [batch]; for an infeasible rt60 [batch] s that is 0.99."""
    shortest = shortest_rt60(cfg, room_dim)
    if cfg.absorption is Absorption.SABINE:
        return MAX_ABSORPTION * shortest / torch.maximum(rt60, shortest)
    return -torch.expm1(math.log1p(-MAX_ABSORPTION) * shortest / torch.maximum(rt60, shortest))


def check_feasible(cfg: IsmConfig, scenes: SceneBatch) -> None:
    """Raises ValueError when a scene's RT60 is infeasible and is not to be clamped; waits for the device."""
    shortest = shortest_rt60(cfg, scenes.room_dim)
    bad = scenes.rt60 < shortest
    if not cfg.clamp_infeasible and bad.any():
        index = int(bad.nonzero()[0])
        _refuse(cfg, f"scene {index}: rt60", float(scenes.rt60[index]), scenes.room_dim[index].tolist())


def check_law(cfg: IsmConfig, law: SceneConfig) -> None:
    """check_feasible for all scenes of a law at once, without drawing any: the largest room is the worst."""
    if not cfg.clamp_infeasible and law.rt60_s[0] < float(shortest_rt60(cfg, torch.tensor(law.room_max_m).double())):
        _refuse(cfg, "scene.rt60_s", law.rt60_s[0], list(law.room_max_m))


def _refuse(cfg: IsmConfig, what: str, rt60: float, room: list[float]) -> None:
    ranges = {kind: float(shortest_rt60(IsmConfig(kind), torch.tensor(room).double())) for kind in Absorption}
    eyring = "ism.absorption=eyring, " if rt60 >= ranges[Absorption.EYRING] else ""  # named where it would help
    raise ValueError(f"{what} = {rt60:.4g} s is infeasible in a room of {room} m: by ism.absorption="
                     f"{cfg.absorption.value} it must be >= {ranges[cfg.absorption]:.4g} s (eyring: >= "
                     f"{ranges[Absorption.EYRING]:.4g} s); take {eyring}ism.clamp_infeasible=true (walls of absorption "
                     f"{MAX_ABSORPTION}) or a longer {what.split()[-1]}")


# ---- images ----


@lru_cache(maxsize=None)
def image_table(order: int) -> tuple[tuple[int, int, int], ...]:
    """Cells of the lattice with at most `order` reflections, by order, the source's own room first: 1, 7, 25, 63, .."""
    around = range(-order, order + 1)
    cells = [(x, y, z) for x in around for y in around for z in around if abs(x) + abs(y) + abs(z) <= order]
    return tuple(sorted(cells, key=lambda cell: sum(map(abs, cell))))


@dataclass(frozen=True, eq=False)
class Shoebox:
    """What the images of some scenes depend on, axis first, to broadcast against [..., mic, src, image] and cells.

    room [3, ..., 1, 1, image or 1] m, src, mic (positions) and src_look, mic_look (unit vectors) likewise, float64;
    log2_coefficient [..., 1, 1, image or 1]: of the amplitude kept at a reflection, sqrt(1 - absorption).
    """

    room: Tensor
    src: Tensor
    mic: Tensor
    src_look: Tensor
    mic_look: Tensor
    log2_coefficient: Tensor

    @classmethod
    def of(cls, cfg: IsmConfig, scenes: SceneBatch, look: LookVector = LookVector.REFERENCE) -> "Shoebox":
        """For [batch, mic, src, image]; look: the law of the look vectors, rir.look_vector."""
        kept = 0.5 * torch.log2(1 - wall_absorption(cfg, scenes.room_dim, scenes.rt60))
        src, src_look = (x.movedim(-1, 0)[:, :, None, :, None] for x in
                         (scenes.src_pos, look_vector(scenes.src_orientation, look)))
        mic, mic_look = (x.movedim(-1, 0)[:, :, :, None, None] for x in
                         (scenes.mic_pos, look_vector(scenes.mic_orientation, look)))
        return cls(scenes.room_dim.T[:, :, None, None, None], src, mic, src_look, mic_look, kept[:, None, None, None])

    def rows(self, index: Tensor) -> "Shoebox":
        """For [mic, src, image] where every image belongs to a scene of its own, index [image] int64."""
        vectors = (x[..., 0].movedim(1, -1)[..., index] for x in
                   (self.room, self.src, self.mic, self.src_look, self.mic_look))
        return Shoebox(*vectors, self.log2_coefficient[index, ..., 0].movedim(0, -1))


def trace_images(cfg: RirConfig, box: Shoebox, cell: Tensor) -> tuple[Tensor, Tensor]:
    """Slot int64 (not limited to the RIR) and amplitude float32 [..., mic, src, image] of the images in cells
    [3, ..., 1, 1, image] int64. A source's pattern is mirrored with it."""
    odd = cell % 2 == 1
    offset = cell * box.room + torch.where(odd, box.room - box.src, box.src) - box.mic
    dist = (offset[0].square() + offset[1].square() + offset[2].square()).sqrt()
    amplitude = torch.exp2(cell.abs().sum(0) * box.log2_coefficient).to(torch.float32) / dist.to(torch.float32)
    if cfg.src_pattern is not Pattern.OMNI:
        cosine = (torch.where(odd, offset, -offset) * box.src_look).sum(0) / dist
        amplitude = amplitude * pattern_gain(cfg.src_pattern, cosine.to(torch.float32))
    if cfg.mic_pattern is not Pattern.OMNI:
        cosine = (offset * box.mic_look).sum(0) / dist
        amplitude = amplitude * pattern_gain(cfg.mic_pattern, cosine.to(torch.float32))
    return nearest_slot(cfg, dist), amplitude


def direct_images(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch) -> tuple[Tensor, Tensor]:
    """Slot and amplitude [batch, mic, src, 1], as of trace_images, of the sources themselves, cut off with the RIR."""
    cell = torch.zeros(3, 1, 1, 1, 1, dtype=torch.int64, device=scenes.rt60.device)
    slot, amplitude = trace_images(rir_cfg, Shoebox.of(cfg, scenes, rir_cfg.look_vector), cell)
    last = slots_in_rir(rir_cfg.sample_rate, scenes.rt60)[:, None, None, None] - 1
    return torch.minimum(slot, last), torch.where(slot <= last, amplitude, 0.0)


def nearest_slot(cfg: RirConfig, dist: Tensor) -> Tensor:
    """Distance [...] m float64 -> slot int64 on the 64x grid, half a slot or 1/128 sample off at most."""
    return torch.round(dist * (OVERSAMPLING * cfg.sample_rate / SPEED_OF_SOUND)).to(torch.int64)


# ---- the exact method ----


def render_ism(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch) -> RirBatch:
    """RIRs of all images that arrive within RT60. Deterministic; for cross-checks: it costs up to seconds a scene.

    The rooms of a batch are traced together: their lattices one after the other make one list, done CELLS at a time,
    which is why the length of the list must be known and the device waited for.
    Raises ValueError for an infeasible RT60, see IsmConfig.
    """
    check_feasible(cfg, scenes)
    parts = 2 if rir_cfg.early else 1
    width = OVERSAMPLING * taps_for(rir_cfg.sample_rate, scenes.max_rt60)
    per_scene = scenes.mic_pos.shape[1] * scenes.src_pos.shape[1] * parts * width
    rooms = max(1, TRAIN_SLOTS // per_scene)
    done = []
    for start in range(0, len(scenes), rooms):
        some = scenes[start:start + rooms]
        done.append(synthesize_dense(rir_cfg.sample_rate, _trace_all(cfg, rir_cfg, some, parts, width),
                                     slots_in_rir(rir_cfg.sample_rate, some.rt60)))
    return RirBatch.concatenate(done)


def _trace_all(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, parts: int, width: int) -> Tensor:
    """All images within RT60 added up on the 64x grid, [batch, mic, src, part, slot] float32."""
    shape = (len(scenes), scenes.mic_pos.shape[1], scenes.src_pos.shape[1])
    device = scenes.rt60.device
    box, last = Shoebox.of(cfg, scenes, rir_cfg.look_vector), slots_in_rir(rir_cfg.sample_rate, scenes.rt60) - 1
    pair = torch.arange(shape[1] * shape[2], device=device).view(*shape[1:], 1)
    train = torch.zeros(shape[0] * pair.numel() * parts * width, dtype=torch.float32, device=device)
    direct, _ = trace_images(rir_cfg, box, torch.zeros(3, 1, 1, 1, 1, dtype=torch.int64, device=device))
    for scene, cell in _lattice(cfg, scenes):
        slot, amplitude = trace_images(rir_cfg, box.rows(scene), cell[:, None, None])
        amplitude = torch.where(slot <= last[scene], amplitude, 0.0)
        slot = torch.minimum(slot, last[scene])
        row = scene * pair.numel() + pair                               # [mic, src, image]
        if parts == 2:
            row = 2 * row + is_early(rir_cfg, slot, direct[scene, ..., 0].movedim(0, -1), last[scene])
        train.scatter_add_(0, (row * width + slot).flatten(), amplitude.flatten())
    return train.view(*shape, parts, width)


def _lattice(cfg: IsmConfig, scenes: SceneBatch) -> Iterator[tuple[Tensor, Tensor]]:
    """Scene [image] and cell [3, image], int64, of every image that may be heard within RT60, some thousands at a time.

    An image in cell n of an axis is at least |n| - 1 room lengths away.
    """
    reach = SPEED_OF_SOUND * scenes.rt60
    half = (reach[:, None] / scenes.room_dim).to(torch.int64) + 1
    if cfg.max_order is not None:
        half = half.clamp(max=cfg.max_order)
    side = 2 * half + 1
    count = side.prod(-1)
    end = count.cumsum(0)
    total = int(end[-1])                                                # waits for the device
    for start in range(0, total, CELLS):
        index = torch.arange(start, min(start + CELLS, total), device=end.device)
        scene = torch.searchsorted(end, index, right=True)
        index = index - (end - count)[scene]
        _, wide, high = side[scene].unbind(-1)
        cell = torch.stack((index // (wide * high), index // high % wide, index % high)) - half[scene].T
        nearest = ((cell.abs() - 1).clamp(min=0) * scenes.room_dim[scene].T).square().sum(0)
        heard = nearest <= reach[scene].square()
        if cfg.max_order is not None:
            heard &= cell.abs().sum(0) <= cfg.max_order
        heard = heard.nonzero().squeeze(-1)
        yield scene[heard], cell[:, heard]
