"""Rooms, microphone arrays and talkers: the law they are drawn from, and the batch they are drawn into."""
from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Callable, Sequence

import torch
from torch import Tensor

from ssl_gpu import geometry, rng, runtime
from ssl_gpu.acoustics import DISTANCE_EPSILON, SPEED_OF_SOUND, distance
from ssl_gpu.checks import check_fields
from ssl_gpu.original import NUM_IMAGES, RADIUS, RT60_S, replay

# Rejection sampling without a sync: draw this many candidates, take the first valid one. The distribution is exactly
# that of redrawing until valid; under the original law all 32 fail with probability 8e-13.
CANDIDATES = 32

# A source is never put closer than this to a microphone. The original law (0.2 m to the centre of a 0.1 m array)
# keeps 0.15 m by itself, so this changes nothing there; it matters for wide arrays.
MIN_SRC_MIC_DIST = 0.05  # m

# Of scenes that are given: what no room needs, and no memory holds.
MAX_RT60_S, MAX_NUM_IMAGES = 100.0, 1_000_000


class Pool(Enum):
    """Where the rooms of a bank come from: drawn by the law of the scenes; or the rooms that the original trained in,
    200 of which it was evaluated in, as the set e0 is."""

    LAW = "law"
    ORIGINAL = "original"


@dataclass(frozen=True)
class SceneConfig:
    """The law of the scenes; the defaults are the original project's. Lengths in m, times in s.

    room_min_m, room_max_m: corners of the uniform law of the room's (length, width, height).
    rt60_s: range of the uniform law of the nominal reverberation time.
    src_dist_m: range allowed for the distance from a source to the centre of the array.
    planar_share: probability that all sources of a scene are at the height of the centre of the array, as talkers at a
        table are; else each has a height of its own. Within 10 degrees of the line of the microphones are 5 % of the
        sources, where all are planar 17 %.
    wall_dist_m: the least distance of sources and microphones to the walls.
    num_src: talkers per scene.
    num_mics, mic_spacing_m: a uniform linear array along x; of another array, by mic_array_m or array_radius_m, there
        is no mic_spacing_m, and mic_array_m has a number of its own.
    spacing_jitter_m: its spacing is another in every scene, uniform within so much of mic_spacing_m: arrays are not
        built to the millimetre, and 3 % of the spacing stand for 3 % of the speed of sound, 17 degrees of temperature.
    mic_array_m: microphone positions, one [x, y, z] each; their mean is put at the centre of the array.
    array_radius_m: random arrays, another for every scene: num_mics microphones uniform in a ball of this radius, then
        moved so that their mean is its centre.
    rotate: turn the array about the vertical by an angle uniform over the circle.
    src_orientation_deg, mic_orientation_deg: (azimuth, polar angle) looked at by every source and every microphone.
        None: sources uniform over (-180, 180) in both angles, as the reference draws them; microphones (0, 0).
        rotate adds its angle to the azimuth of the microphones, which turns their look as far as the reference's law
        of looking lets it: fully at a polar angle of 90, not at all at 0 (directivity.look_vector); with
        rir.look_vector=exact the look turns like the array.
    bank: None for an endless supply of rooms; a number for a fixed bank of that many, drawn once, as the original had.
    pool: which rooms the bank holds: law, rooms of this law; original, the first of original_scenes(), with the RIRs
        that the evaluation set e0 has in its 200 rooms, the first of these: results on e0 are leaked then, and
        ssl_gpu.evaluate says so. It needs a bank of 1..3000 rooms and all other fields at their defaults, the
        original's law (pool.check_pool); of which the run's own evaluation set is, in rooms of its own.

    Raises ValueError naming the field, its value and the rule.
    """

    room_min_m: tuple[float, float, float] = (3.0, 3.0, 2.5)
    room_max_m: tuple[float, float, float] = (10.0, 6.0, 4.0)
    rt60_s: tuple[float, float] = (0.1, 0.7)
    src_dist_m: tuple[float, float] = (0.2, 5.0)
    planar_share: float = 0.0
    wall_dist_m: float = 0.5
    num_src: int = 2
    num_mics: int = 2
    mic_spacing_m: float = 0.1
    spacing_jitter_m: float = 0.0
    mic_array_m: tuple[tuple[float, float, float], ...] | None = None
    array_radius_m: float | None = None
    rotate: bool = False
    src_orientation_deg: tuple[float, float] | None = None
    mic_orientation_deg: tuple[float, float] | None = None
    bank: int | None = None
    pool: Pool = Pool.LAW

    def __post_init__(self):
        room, look = "(length, width, height)", "(azimuth, polar angle)"
        check_fields(self, "scene", room_min_m=room, room_max_m=room, mic_array_m="[x, y, z] of finite numbers",
                     src_orientation_deg=look, mic_orientation_deg=look)
        for low, high, axis in zip(self.room_min_m, self.room_max_m, ("length", "width", "height")):
            if not 0 < low <= high < math.inf:
                raise ValueError(f"scene.room_min_m, scene.room_max_m must satisfy 0 < min <= max < inf, "
                                 f"got {low} and {high} for the {axis}")
        if not 0 < self.rt60_s[0] <= self.rt60_s[1] < math.inf:
            raise ValueError(f"scene.rt60_s must satisfy 0 < low <= high < inf, got {self.rt60_s}")
        if not 0 < self.src_dist_m[0] <= self.src_dist_m[1]:
            raise ValueError(f"scene.src_dist_m must satisfy 0 < low <= high, got {self.src_dist_m}")
        for name in ("num_src", "num_mics"):
            if getattr(self, name) < 1:
                raise ValueError(f"scene.{name} must be >= 1, got {getattr(self, name)}")
        if self.bank is not None and self.bank < 1:
            raise ValueError(f"scene.bank must be >= 1 room, or null for endless rooms, got {self.bank}")
        if not 0 <= self.planar_share <= 1:
            raise ValueError(f"scene.planar_share must be in 0..1, got {self.planar_share}")
        if not self.wall_dist_m >= 0:
            raise ValueError(f"scene.wall_dist_m must be >= 0, got {self.wall_dist_m}")
        for name in ("src_orientation_deg", "mic_orientation_deg"):
            value = getattr(self, name)
            if value is not None and not all(map(math.isfinite, value)):
                raise ValueError(f"scene.{name} must be finite, got {value}")
        self._check_array()
        self._check_room()

    def _check_array(self):
        if self.mic_array_m is not None and self.array_radius_m is not None:
            raise ValueError("scene.mic_array_m and scene.array_radius_m exclude each other, got both")
        if self.array_radius_m is not None and not self.array_radius_m > 0:
            raise ValueError(f"scene.array_radius_m must be > 0, got {self.array_radius_m}")
        if self.mic_array_m is not None:
            if len(self.mic_array_m) == 0:
                raise ValueError("scene.mic_array_m must hold at least one [x, y, z], got an empty list")
            for position in self.mic_array_m:
                if not all(map(math.isfinite, position)):
                    raise ValueError(f"scene.mic_array_m must hold [x, y, z] of finite numbers, got {position}")
            if len(set(self.mic_array_m)) < len(self.mic_array_m):
                raise ValueError(f"scene.mic_array_m must not hold a position twice, got {self.mic_array_m}")
        if not self.mic_spacing_m > 0:
            raise ValueError(f"scene.mic_spacing_m must be > 0, got {self.mic_spacing_m}")
        if not 0 <= self.spacing_jitter_m < self.mic_spacing_m:
            raise ValueError(f"scene.spacing_jitter_m must satisfy 0 <= jitter < scene.mic_spacing_m="
                             f"{self.mic_spacing_m}, got {self.spacing_jitter_m}")
        if self.mic_array_m is not None or self.array_radius_m is not None:
            for name, unset in (("mic_spacing_m", SceneConfig.mic_spacing_m), ("spacing_jitter_m", 0.0)):
                if getattr(self, name) != unset:
                    raise ValueError(f"scene.{name} must be left at {unset} with scene.mic_array_m or "
                                     f"scene.array_radius_m, which do not have it, got {getattr(self, name)}")
        if self.mic_array_m is not None and self.num_mics not in (SceneConfig.num_mics, len(self.mic_array_m)):
            raise ValueError(f"scene.num_mics must be the number of positions in scene.mic_array_m, "
                             f"{len(self.mic_array_m)}, or left out, got {self.num_mics}")

    def _check_room(self):
        margin = self.wall_dist_m + self.radius
        for axis, low in zip(("length", "width", "height"), self.room_min_m):
            if low < 2 * margin:
                raise ValueError(f"scene.room_min_m: a {axis} of {low} m leaves no place for an array of radius "
                                 f"{self.radius:.3g} m at scene.wall_dist_m={self.wall_dist_m}, it must be >= "
                                 f"{2 * margin:.3g} m")
        # From the middle of the smallest room, the worst place, the corners of the sources' box are farthest.
        reach = 0.5 * math.dist((2 * self.wall_dist_m,) * 3, self.room_min_m)
        if self.src_dist_m[0] >= reach:
            raise ValueError(f"scene.src_dist_m: the low end {self.src_dist_m[0]} m cannot be kept in the smallest "
                             f"room, where a source may be {reach:.3g} m from the array at most")
        farthest = min(self.src_dist_m[1] + self.radius, self.max_dist)
        if SPEED_OF_SOUND * self.rt60_s[0] <= math.sqrt(farthest ** 2 + DISTANCE_EPSILON):
            raise ValueError(f"scene.rt60_s: {SPEED_OF_SOUND:g} m/s * {self.rt60_s[0]} s = "
                             f"{SPEED_OF_SOUND * self.rt60_s[0]:.3g} m must exceed the largest source distance, "
                             f"{farthest:.3g} m (scene.src_dist_m, scene.room_max_m)")

    @property
    def radius(self) -> float:
        """Distance in m from the centre of the array that no microphone exceeds."""
        if self.array_radius_m is not None:
            return self.array_radius_m
        if self.mic_array_m is not None:
            centre = [sum(axis) / len(self.mic_array_m) for axis in zip(*self.mic_array_m)]
            return max(math.dist(position, centre) for position in self.mic_array_m)
        return 0.5 * (self.num_mics - 1) * (self.mic_spacing_m + self.spacing_jitter_m)

    @property
    def max_dist(self) -> float:
        """Distance in m from a source to a microphone that none exceeds, be it in a scene that breaks the law."""
        return math.hypot(*(high - 2 * self.wall_dist_m for high in self.room_max_m))

    @property
    def aperture(self) -> float:
        """Length in m of a uniform linear array without its jitter, twice the radius of any other."""
        return 2 * self.radius - (self.num_mics - 1) * self.spacing_jitter_m

    @property
    def mic_count(self) -> int:
        """Microphones per scene, whichever way the array is given."""
        return self.num_mics if self.mic_array_m is None else len(self.mic_array_m)


@dataclass(frozen=True, eq=False)
class SceneBatch:
    """A batch of scenes. Positions and times are float64: float32 positions move hundreds of arrivals by a slot.

    room_dim [batch, 3] m, rt60 [batch] s (nominal), mic_pos [batch, mic, 3] m, src_pos [batch, src, 3] m;
    mic_orientation [batch, mic, 2], src_orientation [batch, src, 2] rad, (azimuth, polar angle from +z);
    valid [batch] bool: False where no candidate met the law, such a scene must not be used;
    max_rt60 s: a number no rt60 exceeds, known without asking the device, so that shapes are fixed by it;
    num_images [batch] int64: how many images FRA-RIR renders each with, 0 or None: as many as RirConfig draws;
    max_images: a number no num_images exceeds, None without them;
    max_dist m: a number that no distance from a source to a microphone exceeds, by which the direct sound and early
    parts are rendered in few taps; None where none is known, and for whoever replaces positions (a CPU
    refuses sources beyond it, a GPU does not look).
    """

    room_dim: Tensor
    rt60: Tensor
    mic_pos: Tensor
    src_pos: Tensor
    mic_orientation: Tensor
    src_orientation: Tensor
    valid: Tensor
    max_rt60: float
    num_images: Tensor | None = None
    max_images: int | None = None
    max_dist: float | None = None

    def __len__(self) -> int:
        return self.rt60.shape[0]

    def _map(self, function) -> "SceneBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if not f.name.startswith("max_")}
        return replace(self, **{name: None if x is None else function(x) for name, x in tensors.items()})

    def __getitem__(self, index: slice | Tensor) -> "SceneBatch":
        """The scenes of a slice or of an index tensor [n] int64."""
        return self._map(lambda tensor: tensor[index])

    def to(self, device: torch.device | str) -> "SceneBatch":
        """The same scenes on another device."""
        return self._map(lambda tensor: tensor.to(device))

    @classmethod
    def concatenate(cls, batches: Sequence["SceneBatch"]) -> "SceneBatch":
        """Several batches of the same numbers of microphones and sources as one."""
        if any(batch.num_images is not None for batch in batches):
            batches = [batch if batch.num_images is not None else
                       replace(batch, num_images=torch.zeros_like(batch.rt60, dtype=torch.int64), max_images=0)
                       for batch in batches]
        joined = {}
        for field in fields(cls):
            column = [getattr(batch, field.name) for batch in batches]
            join = max if field.name.startswith("max_") else torch.cat
            joined[field.name] = None if any(part is None for part in column) else join(column)
        return cls(**joined)

    @property
    def array_centre(self) -> Tensor:
        """Mean of the microphone positions, [batch, 3] m."""
        return self.mic_pos.mean(1)

    @property
    def _src_offset(self) -> Tensor:
        return self.src_pos - self.array_centre[:, None]

    @property
    def distance(self) -> Tensor:
        """From each source to the centre of the array, [batch, src] m."""
        return torch.linalg.vector_norm(self._src_offset, dim=-1)

    @property
    def direction(self) -> Tensor:
        """Unit vectors [batch, src, 3] in the room's axes from the centre of the array to each source; about 0 of a
        source at the very centre.

        What azimuth and cone_angle do not say: where a source is whatever the order of the microphones, in arrays that
        have no axis of their own, a single microphone too. geometry.azimuth(direction) is the azimuth from +x.
        """
        return torch.nn.functional.normalize(self._src_offset, dim=-1)

    @property
    def azimuth(self) -> Tensor:
        """Of each source, from the horizontal projection of the array's axis, [batch, src] rad in [-pi, pi).

        The axis is the line from the first to the last microphone, whatever lies between: in an array that is no line
        it is as arbitrary as their order: from a square a source along +x has any multiple of 45 degrees. Not from the
        axes of the room: for that see direction.
        Raises ValueError for a single microphone.
        """
        axis = geometry.azimuth(geometry.array_axis(self.mic_pos))
        return geometry.wrap_angle(geometry.azimuth(self._src_offset) - axis[:, None])

    @property
    def elevation(self) -> Tensor:
        """Of each source as seen from the centre of the array, [batch, src] rad in [-pi/2, pi/2]."""
        return geometry.elevation(self._src_offset)

    @property
    def cone_angle(self) -> Tensor:
        """Between each source's direction and the array's axis, [batch, src] rad in [0, pi].

        All that two microphones can observe. The axis is that of azimuth, arbitrary in an array that is no line: for
        those see direction. Raises ValueError for a single microphone.
        """
        return geometry.angle_between(self._src_offset, geometry.array_axis(self.mic_pos)[:, None])


@runtime.constant
def _table(values: tuple, device: torch.device) -> Tensor:
    """Numbers of a law, float64; copied once, not for every batch: a copy from memory that is not pinned may wait."""
    return torch.tensor(values, dtype=torch.float64).to(device)


@runtime.constant
def _linear_array(num_mics: int, spacing_m: float, device: torch.device) -> Tensor:
    """geometry.linear_array on the device, once."""
    return geometry.linear_array(num_mics, spacing_m).to(device)


def _uniform(shape: Sequence[int], low: Tensor | float, high: Tensor | float, generator: torch.Generator) -> Tensor:
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        return rng.uniform(shape, low, high, generator=generator, dtype=torch.float64)
    draw = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
    if runtime.is_gpu(draw.device):                                     # a kernel less, and maybe a rounding
        return torch.addcmul(low if isinstance(low, Tensor) else _table((low,), draw.device), high - low, draw)
    return low + (high - low) * draw


def _draw_array(cfg: SceneConfig, batch: int, generator: torch.Generator) -> Tensor:
    """Microphone positions relative to the centre of the array, [batch, mic, 3] m, not yet rotated."""
    device = generator.device
    if cfg.array_radius_m is not None:
        shape = (batch, cfg.num_mics, 3)
        direction = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        offset = direction * cfg.array_radius_m * _uniform((*shape[:2], 1), 0.0, 1.0, generator) ** (1 / 3)
        offset = offset - offset.mean(1, keepdim=True)
        # Centring can push a microphone out of the ball, then the whole layout is shrunk back into it.
        largest = torch.linalg.vector_norm(offset, dim=-1).amax(1)[:, None, None]
        return offset * (cfg.array_radius_m / largest.clamp(min=cfg.array_radius_m))
    if cfg.mic_array_m is not None:
        offset = _table(tuple(map(tuple, cfg.mic_array_m)), device)
        offset = offset - offset.mean(0)
    else:
        offset = _linear_array(cfg.num_mics, cfg.mic_spacing_m, device)
    offset = offset.expand(batch, -1, -1)
    if cfg.spacing_jitter_m > 0:
        jitter = cfg.spacing_jitter_m / cfg.mic_spacing_m
        offset = offset * _uniform((batch, 1, 1), 1 - jitter, 1 + jitter, generator)
    return offset


def _orientation(angles_deg: tuple[float, float] | None, shape: tuple[int, int], device: torch.device) -> Tensor:
    angles = _table(tuple(angle * (math.pi / 180) for angle in angles_deg or (0.0, 0.0)), device)
    return angles.expand(*shape, 2).clone()


def sample_scenes(cfg: SceneConfig, batch: int, *, generator: torch.Generator) -> SceneBatch:
    """Draw `batch` scenes on the generator's device, without a device sync.

    Room, RT60 and array centre are uniform; each source is uniform in the room less the walls' margin, redrawn until
    src_dist_m holds: the first valid of 32 candidates, whose distribution is that of the rejection loop exactly. Where
    a scene is planar its candidates are in one plane. A scene none of whose candidates hold breaks the law: `valid`
    is False there, and whoever renders it must look (check_places tells of laws of which that is more than a rarity).
    Raises ValueError for a batch that is no whole number of at least 0.
    """
    if isinstance(batch, bool) or not isinstance(batch, numbers.Integral) or batch < 0:
        raise ValueError(f"batch must be a whole number >= 0, got {batch}")
    device = generator.device
    low, high = (_table(tuple(corner), device) for corner in (cfg.room_min_m, cfg.room_max_m))
    room = _uniform((batch, 3), low, high, generator)
    rt60 = _uniform((batch,), *cfg.rt60_s, generator)
    margin = cfg.wall_dist_m + cfg.radius
    centre = _uniform((batch, 3), margin, room - margin, generator)
    offset = _draw_array(cfg, batch, generator)
    mic_orientation = _orientation(cfg.mic_orientation_deg, (batch, offset.shape[1]), device)
    if cfg.rotate:
        yaw = _uniform((batch,), -math.pi, math.pi, generator)
        offset = geometry.rotate_z(offset, yaw)
        # Wrapped: the reference's law of look vectors has no period (directivity.look_vector).
        mic_orientation[..., 0] = geometry.wrap_angle(mic_orientation[..., 0] + yaw[:, None])
    mic_pos = centre[:, None] + offset

    shape = (batch, cfg.num_src, CANDIDATES, 3)
    wall = cfg.wall_dist_m
    candidate = _uniform(shape, wall, room[:, None, None] - wall, generator)
    if cfg.planar_share > 0:
        planar = torch.rand((batch, 1, 1), generator=generator, dtype=torch.float32, device=device) < cfg.planar_share
        height = torch.where(planar, centre[:, None, None, 2], candidate[..., 2])
        candidate = torch.cat((candidate[..., :2], height[..., None]), -1)
    dist = torch.linalg.vector_norm(candidate - centre[:, None, None], dim=-1)
    to_mic = torch.linalg.vector_norm(candidate[:, :, :, None] - mic_pos[:, None, None], dim=-1).amin(-1)
    # By clamp it is one kernel less than by two comparisons: entry 55 of docs/performance.md.
    valid = (dist.clamp(*cfg.src_dist_m) == dist) & (to_mic >= MIN_SRC_MIC_DIST)
    first = valid.to(torch.uint8).argmax(-1)
    src_pos = candidate.gather(2, first[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)

    if cfg.src_orientation_deg is None:
        src_orientation = _uniform((batch, cfg.num_src, 2), -math.pi, math.pi, generator)
    else:
        src_orientation = _orientation(cfg.src_orientation_deg, (batch, cfg.num_src), device)
    return SceneBatch(room, rt60, mic_pos, src_pos, mic_orientation, src_orientation,
                      valid.any(-1).all(-1), cfg.rt60_s[1], max_dist=cfg.max_dist)


def check_places(cfg: SceneConfig, samples: int = 1000) -> None:
    """Raises ValueError for a law that leaves more than 1 % of its scenes without valid sources: sample_scenes marks
    these and whatever uses them must leave them out. On the CPU, the same draws every time, some milliseconds."""
    valid = sample_scenes(cfg, samples, generator=torch.Generator().manual_seed(0)).valid
    if 100 * int(valid.sum()) < 99 * samples:
        raise ValueError(f"scene: only {int(valid.sum())} of {samples} scenes found places for their sources among "
                         f"{CANDIDATES} candidates each, at least 99 % must: widen scene.src_dist_m={cfg.src_dist_m}")


def _as_tensor(name: str, value) -> Tensor:
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64).clone()    # or it would be the caller's, who may change it
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array, or nested lists of numbers: {error}") from error
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} must be finite, got a NaN or an infinity")
    return tensor


ROUNDING = 1 + 1e-9  # of a distance, by whoever reckons the largest of some in another way


def farthest_pair(src_pos: Tensor, mic_pos: Tensor) -> float:
    """A multiple of 5 m that no distance from a source [batch, src, 3] m to a microphone [batch, mic, 3] m of the same
    scene exceeds: alike for batches that are. Waits for the device."""
    return 5.0 * max(1, math.ceil(float(distances(src_pos, mic_pos).max()) / 5))


def distances(src_pos: Tensor, mic_pos: Tensor) -> Tensor:
    """From sources [batch, src, 3] m to microphones [batch, mic, 3] m, [batch, src, mic] m, to the last digits also of
    many, where torch would multiply matrices."""
    return torch.cdist(src_pos, mic_pos, compute_mode="donot_use_mm_for_euclid_dist")


def make_scenes(room_dim, rt60, mic_pos, src_pos, mic_orientation=None, src_orientation=None,
                num_images=None, max_rt60=None, max_dist=None) -> SceneBatch:
    """Scenes of your own, checked: arrays or nested lists as in SceneBatch, orientations (0, 0) when left out.

    max_rt60 s fixes how long the RIRs of a batch may become, the longest rt60 of it when left out, max_dist m how late
    direct sound may come, farthest_pair of it when left out: one number for all batches keeps shapes alike, which
    torch.compile and CUDA graphs want.

    Raises ValueError, naming the scene and the rule, for wrong shapes, numbers that are not finite, RT60 <= 0, a
    position outside its room, a source that coincides with a microphone (closer than 1 mm: the reference's directivity
    is then 0/0), 340 m/s * RT60 not above the distance of a source (the reference then returns NaN), an RT60 above
    100 s or max_rt60, a source beyond max_dist, or a number of images that is not whole or not in 0..1,000,000 (0: to
    be drawn).
    """
    room_dim, rt60 = _as_tensor("room_dim", room_dim), _as_tensor("rt60", rt60)
    mic_pos, src_pos = _as_tensor("mic_pos", mic_pos), _as_tensor("src_pos", src_pos)
    if rt60.ndim != 1 or len(rt60) == 0:
        raise ValueError(f"rt60 must be [batch], got {list(rt60.shape)}")
    batch = len(rt60)
    for name, tensor, axes in (("room_dim", room_dim, ""), ("mic_pos", mic_pos, " mic,"),
                               ("src_pos", src_pos, " src,")):
        right = tensor.ndim == (3 if axes else 2) and tensor.shape[0] == batch and tensor.shape[-1] == 3
        if not right or tensor.shape[1] == 0:
            raise ValueError(f"{name} must be [batch={batch},{axes} 3], got {list(tensor.shape)}")
    _check_positions(room_dim, rt60, mic_pos, src_pos)
    orientations = []
    for name, angles, positions in (("mic_orientation", mic_orientation, mic_pos),
                                    ("src_orientation", src_orientation, src_pos)):
        if angles is None:
            angles = positions.new_zeros(*positions.shape[:2], 2)
        angles = _as_tensor(name, angles)
        if angles.shape != (*positions.shape[:2], 2):
            raise ValueError(f"{name} must be {[*positions.shape[:2], 2]}, got {list(angles.shape)}")
        orientations.append(angles)
    for name, bound, unit in (("max_rt60", max_rt60, "s"), ("max_dist", max_dist, "m")):
        if bound is not None and not (isinstance(bound, numbers.Real) and 0 < bound < math.inf):
            raise ValueError(f"{name} must be a finite number of {unit} above 0, got {bound!r}")
    longest = float(rt60.max()) if max_rt60 is None else max_rt60
    _refuse(rt60 > longest, lambda b: f"rt60 must be <= max_rt60={longest:g} s, got {rt60[b]:g}")
    dist, farthest = distances(src_pos, mic_pos), max_dist or farthest_pair(src_pos, mic_pos)
    _refuse(dist > farthest * ROUNDING,
            lambda b, s, m: f"source {s} must be within max_dist={farthest:.6g} m of microphone {m}, "
                            f"got {dist[b, s, m]:.6g} m")
    scenes = SceneBatch(room_dim, rt60, mic_pos, src_pos, *orientations,
                        torch.ones_like(rt60, dtype=torch.bool), longest, max_dist=farthest)
    if num_images is None:
        return scenes
    num_images = _as_tensor("num_images", num_images)
    if num_images.shape != rt60.shape:
        raise ValueError(f"num_images must be [batch={batch}], got {list(num_images.shape)}")
    _refuse((num_images < 0) | (num_images > MAX_NUM_IMAGES) | (num_images != num_images.round()),
            lambda b: f"num_images must be whole and in 0..{MAX_NUM_IMAGES}, 0 to be drawn, got {num_images[b]:g}")
    return replace(scenes, num_images=num_images.to(torch.int64), max_images=int(num_images.max()))


def _refuse(bad: Tensor, rule: Callable[..., str]) -> None:
    """Raises ValueError for the first scene where `bad` [batch, ...] is True, with the rule of that place."""
    if bad.any():
        index = bad.nonzero()[0].tolist()
        raise ValueError(f"scene {index[0]}: {rule(*index)}")


def _check_positions(room_dim: Tensor, rt60: Tensor, mic_pos: Tensor, src_pos: Tensor) -> None:
    _refuse(rt60 <= 0, lambda b: f"rt60 must be > 0 s, got {rt60[b]:g}")
    _refuse(rt60 > MAX_RT60_S, lambda b: f"rt60 must be <= {MAX_RT60_S:g} s, got {rt60[b]:g}")
    _refuse(room_dim <= 0, lambda b, i: f"room_dim must be > 0 m, got {room_dim[b].tolist()}")
    for name, position in (("microphone", mic_pos), ("source", src_pos)):
        outside = ((position < 0) | (position > room_dim[:, None])).any(-1)
        _refuse(outside, lambda b, i: f"{name} {i} must be inside the room {room_dim[b].tolist()}, "
                                      f"got {position[b, i].tolist()}")
    offset = src_pos[:, None] - mic_pos[:, :, None]
    _refuse(torch.linalg.vector_norm(offset, dim=-1) < 1e-3,
            lambda b, m, s: f"source {s} and microphone {m} must not coincide, got both at {src_pos[b, s].tolist()}")
    reach, dist = SPEED_OF_SOUND * rt60, distance(offset)
    _refuse(reach[:, None, None] <= dist,
            lambda b, m, s: f"{SPEED_OF_SOUND:g} m/s * rt60 = {reach[b]:.4g} m must exceed the distance from source "
                            f"{s} to microphone {m}, got {dist[b, m, s]:.4g} m")


def original_scenes() -> SceneBatch:
    """The original project's 3,000 training scenes, equal to the last bit; [:200] are its 200 evaluation scenes.

    Two microphones, two sources, all omnidirectional; and the number of images it rendered each with.
    """
    room_dim, rt60, centre, src_pos, num_images = map(torch.from_numpy, replay())
    offset = torch.tensor([[-RADIUS, 0, 0], [RADIUS, 0, 0]], dtype=torch.float64)
    look = torch.zeros(len(rt60), 2, 2, dtype=torch.float64)
    valid = torch.ones(len(rt60), dtype=torch.bool)
    mic_pos = centre[:, None] + offset
    return SceneBatch(room_dim, rt60, mic_pos, src_pos, look, look.clone(), valid, RT60_S[1], num_images,
                      NUM_IMAGES[1] - 1, farthest_pair(src_pos, mic_pos))
