"""Rooms by any method of simulation, and by several in one batch: what is drawn for them, and one call that renders.

Every scene of a batch has a method: that of rir.method, or one drawn by rir.hybrid_share and rir.ism_share.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ssl_gpu import runtime
from ssl_gpu.directivity import Pattern
from ssl_gpu.hybrid import TailBatch, draw_tail, find_hybrid_arrivals, render_hybrid
from ssl_gpu.ism import IsmConfig, check_feasible, direct_images, render_ism
from ssl_gpu.rir import (FRA_CHOICES, ImageBatch, Method, RirConfig, add_images, can_add_images, direct_arrivals,
                         draw_images, find_arrivals, last_direct_slot, last_early_slot, render_rir)
from ssl_gpu.scene import SceneBatch
from ssl_gpu.synthesis import MAIN_TAPS, Arrivals, RirBatch, in_parts, slots_in_rir, synthesize, synthesize_added

METHODS = tuple(Method)  # their order is that of RoomDraw.method


@dataclass(frozen=True, eq=False)
class RoomDraw:
    """Everything random about the RIRs of a batch of scenes, each part None where the configuration has no use for it.

    images: FRA-RIR's, and tail: of hybrid rooms, of all scenes, whichever the method of each;
    method [batch] int64: where methods are mixed, the index in METHODS of each scene's;
    law: what they were drawn by, None where that is not to be held against what they are rendered by.
    They belong to the scenes that they were drawn for: distances of FRA-RIR's images are multiples of their source's.
    """

    images: ImageBatch | None
    tail: TailBatch | None
    method: Tensor | None
    law: RirConfig | None = None

    def __getitem__(self, index: slice | Tensor) -> "RoomDraw":
        """The draws of a slice or of an index tensor [n] of scenes."""
        return self._map(lambda part: part[index])

    def to(self, device: torch.device | str) -> "RoomDraw":
        """The same draws on another device."""
        return self._map(lambda part: part.to(device))

    def _map(self, function: Callable[[Any], Any]) -> "RoomDraw":
        parts = (self.images, self.tail, self.method)
        return RoomDraw(*(None if part is None else function(part) for part in parts), self.law)


# Of RirConfig, what draws depend on, or what they mean. The rest, early parts, microphones and so on, is rendering, and
# so are patterns of sources, once cosines were drawn for them.
DRAWN_BY = ("method", "hybrid_share", "ism_share", "band_rt60_ratio", *FRA_CHOICES)


def _needed(rir_cfg: RirConfig) -> dict[str, bool]:
    """Which parts of a RoomDraw the methods of rir_cfg are rendered from."""
    return {"images": rir_cfg.method is Method.FRA, "method": rir_cfg.is_mixed,
            "tail": rir_cfg.method is Method.HYBRID or rir_cfg.hybrid_share > 0}


def check_drawn(rir_cfg: RirConfig, scenes: SceneBatch, draw: RoomDraw) -> None:
    """Raises ValueError for a draw that rir_cfg does not render: drawn by another law, which would give rooms of none,
    or for another number of scenes or sources, over which it would be spread. rir.method=ism needs nothing that is
    drawn, and takes any."""
    if rir_cfg.method is Method.ISM:
        return
    law, size = draw.law, (len(scenes), scenes.src_pos.shape[1])
    if law is not None:
        names = DRAWN_BY + (("src_pattern",) if law.src_pattern is Pattern.OMNI else ())
        for name in names:
            drawn, value = getattr(law, name), getattr(rir_cfg, name)
            if drawn != value:
                drawn, value = (x.value if isinstance(x, Enum) else x for x in (drawn, value))
                raise ValueError(f"rir.{name} must be {drawn}, by which these rooms were drawn, got {value}")
    sizes = {"images": None if draw.images is None else tuple(draw.images.ratio.shape[:2]),
             "tail": None if draw.tail is None else tuple(draw.tail.place.shape[:2]),
             "method": None if draw.method is None else (len(draw.method), size[1])}
    for name, there in _needed(rir_cfg).items():
        if there and sizes[name] is None:
            raise ValueError(f"RoomDraw.{name} must be there for rir.method={rir_cfg.method.value}, rir.hybrid_share="
                             f"{rir_cfg.hybrid_share:g}, rir.ism_share={rir_cfg.ism_share:g}, got a draw for others")
        if there and sizes[name] != size:
            raise ValueError(f"RoomDraw.{name} must be of batch={size[0]}, src={size[1]} as the scenes, got "
                             f"batch={sizes[name][0]}, src={sizes[name][1]}")


def draw_rooms(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, *, generator: torch.Generator) -> RoomDraw:
    """Draw what the methods of rir_cfg need, on the scenes' device, without a device sync; ism needs nothing.

    The generator must be on the scenes' device.
    """
    images = tail = method = None
    needed = _needed(rir_cfg)
    if needed["images"]:
        images = draw_images(rir_cfg, scenes, generator=generator)
    if needed["tail"]:
        tail = draw_tail(cfg, rir_cfg, scenes, generator=generator)
    if needed["method"]:
        draw = torch.rand(len(scenes), generator=generator, dtype=torch.float32, device=scenes.rt60.device)
        method = torch.full_like(draw, METHODS.index(Method.FRA), dtype=torch.int64)
        method = torch.where(draw < rir_cfg.hybrid_share, METHODS.index(Method.HYBRID), method)
        method = torch.where(draw >= 1 - rir_cfg.ism_share, METHODS.index(Method.ISM), method)
    return RoomDraw(images, tail, method, rir_cfg)


def render_rooms(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, draw: RoomDraw,
                 fused: bool = False) -> RirBatch:
    """RIRs of every scene by its method. Deterministic; waits for the device only where the exact method is asked for.
    fused: as for scatter.add_kernels, of all but exact rooms.

    In a mixed batch FRA-RIR and the hybrid method both find their arrivals for every scene, and `where` picks: finding
    them is a fraction of the cost, and shapes stay fixed whatever the draw. Only what was picked is synthesised. On a
    CPU, where shapes may differ, scenes of one method are rendered together. Exact rooms, whose cost is of another
    order, are rendered apart and put in their places.
    Raises ValueError as check_drawn does, and for a room with walls whose RT60 is infeasible, see IsmConfig; of hybrid
    rooms on a GPU, where that would wait for it, Simulator looks at the RT60 beforehand. Compiled, it checks nothing.
    """
    if not torch.compiler.is_compiling():
        check_drawn(rir_cfg, scenes, draw)
        if rir_cfg.uses_walls and scenes.rt60.device.type == "cpu":
            check_feasible(cfg, scenes)
    if rir_cfg.method is Method.ISM:
        return render_ism(cfg, rir_cfg, scenes)
    if rir_cfg.method is Method.HYBRID:
        return render_hybrid(cfg, rir_cfg, scenes, draw.tail, fused)
    if not rir_cfg.is_mixed:
        return render_rir(rir_cfg, scenes, draw.images, fused)
    slots = slots_in_rir(rir_cfg.sample_rate, scenes.rt60)
    if fused and draw.tail is not None and rir_cfg.ism_share == 0 and can_add_images(rir_cfg, scenes):
        return _render_added(cfg, rir_cfg, scenes, draw, slots)
    hybrid = torch.zeros_like(draw.method, dtype=torch.bool)
    if draw.tail is not None:
        hybrid = draw.method == METHODS.index(Method.HYBRID)
    if runtime.prefers_parts(scenes.rt60.device):
        count = draw.images.active.sum(-1) + hybrid * draw.images.active.shape[-1]
        rirs = in_parts(lambda some: _render_alike(cfg, rir_cfg, scenes[some], draw, hybrid[some], some),
                        count.argsort(stable=True))
    else:
        arrivals = find_arrivals(rir_cfg, scenes, draw.images)
        if draw.tail is not None:
            arrivals = _pick(hybrid, find_hybrid_arrivals(cfg, rir_cfg, scenes, draw.tail), arrivals)
        rirs = synthesize(rir_cfg.sample_rate, arrivals, slots, scenes.max_rt60, fused,
                          early_stop=last_early_slot(rir_cfg, scenes))
    return _with_exact_rooms(cfg, rir_cfg, scenes, draw.method, rirs) if rir_cfg.ism_share > 0 else rirs


def _render_alike(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, draw: RoomDraw, hybrid: Tensor,
                  some: Tensor) -> RirBatch:
    """On a CPU the RIRs of some of a mixed batch, exact rooms aside: scenes, and whether they are hybrid, of some [n],
    the draw of all. Arrivals are found by those methods alone that one of them has."""
    arrivals = None
    if not hybrid.all():
        arrivals = find_arrivals(rir_cfg, scenes, draw.images.without_padding(some))
    if hybrid.any():
        others, arrivals = arrivals, find_hybrid_arrivals(cfg, rir_cfg, scenes, draw.tail[some])
        arrivals = arrivals if others is None else _pick(hybrid, arrivals, others)
    return synthesize(rir_cfg.sample_rate, arrivals, slots_in_rir(rir_cfg.sample_rate, scenes.rt60), scenes.max_rt60,
                      early_stop=last_early_slot(rir_cfg, scenes))


def render_direct(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, method: Tensor | None,
                  fused: bool = False) -> RirBatch:
    """The direct path alone of what render_rooms renders, as RIRs of the same length: what is left of those of a room
    without it is reverberation. method: of RoomDraw, where methods are mixed; None: rir.method. Air and octave bands
    are left out. fused: as for render_rooms. Deterministic, and never waits for the device."""
    arrivals = direct_arrivals(rir_cfg, scenes)
    if rir_cfg.method is not Method.FRA:
        arrivals = Arrivals(*direct_images(cfg, rir_cfg, scenes), None)
    elif method is not None:
        walls = Arrivals(*direct_images(cfg, rir_cfg, scenes), None)    # its slots are rounded, those of FRA-RIR up
        arrivals = _pick(method != METHODS.index(Method.FRA), walls, arrivals)
    slots = slots_in_rir(rir_cfg.sample_rate, scenes.rt60)
    return synthesize(rir_cfg.sample_rate, arrivals, slots, scenes.max_rt60, fused,
                      last_direct_slot(rir_cfg, scenes))


def _render_added(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, draw: RoomDraw, slots: Tensor) -> RirBatch:
    """Of a batch of FRA-RIR and hybrid rooms each scene by its own method, where rir.can_add_images."""
    from ssl_gpu.fused import add_kernels_fused  # Triton is not everywhere where torch is
    hybrid = draw.method == METHODS.index(Method.HYBRID)
    arrivals = find_hybrid_arrivals(cfg, rir_cfg, scenes, draw.tail)
    amplitude = torch.where(hybrid[:, None, None, None], arrivals.amplitude, 0.0)  # nothing is added for a 0

    def add(total: Tensor, table: Tensor) -> None:
        add_images(rir_cfg, scenes, draw.images, total, table, ~hybrid)
        add_kernels_fused(total, table, arrivals.slot, amplitude, None, MAIN_TAPS)

    return synthesize_added(rir_cfg.sample_rate, tuple(amplitude.shape[:3]), add, slots, scenes.max_rt60)


def _pick(chosen: Tensor, first: Arrivals, second: Arrivals) -> Arrivals:
    """The arrivals of `first` in the scenes that are chosen [batch] bool, those of `second` in the others."""
    count = max(first.slot.shape[-1], second.slot.shape[-1])
    pairs = ((getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    return Arrivals(*(None if a is None else torch.where(chosen[:, None, None, None], _pad(a, count), _pad(b, count))
                      for a, b in pairs))


def _pad(tensor: Tensor, count: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, count - tensor.shape[-1]))


def _with_exact_rooms(cfg: IsmConfig, rir_cfg: RirConfig, scenes: SceneBatch, method: Tensor,
                      rirs: RirBatch) -> RirBatch:
    """The RIRs of all scenes, with those whose method is the exact one rendered by it; waits for the device."""
    rirs = replace(rirs, early_end=None)  # theirs end elsewhere; of all, or a room would depend on its company
    index = (method == METHODS.index(Method.ISM)).nonzero().squeeze(-1)
    if len(index) == 0:
        return rirs
    exact = render_ism(cfg, rir_cfg, scenes[index])
    full, early = (None if all_of is None else all_of.index_copy(0, index, part)
                   for all_of, part in ((rirs.full, exact.full), (rirs.early, exact.early)))
    return replace(rirs, full=full, early=early)
