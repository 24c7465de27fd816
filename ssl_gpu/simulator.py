"""Simulator: dry speech in, microphone signals of rooms that never existed before out. Draws and rendering meet here.

    simulator = Simulator(SceneConfig(), RirConfig(early=False))
    mixture = simulator(dry, generator=generator)     # dry [batch, src, sample] -> mixture.audio [batch, mic, sample]
    mixture.scenes.cone_angle                         # the labels, [batch, src] rad
"""
from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ssl_gpu import runtime
from ssl_gpu.checks import check_class, check_fields
from ssl_gpu.directivity import Pattern
from ssl_gpu.ism import IsmConfig, check_feasible, check_law
from ssl_gpu.mixture import MixtureBatch, MixtureConfig, MixtureDraw, draw_mixture, mix
from ssl_gpu.pool import check_pool, draw_original_images
from ssl_gpu.rir import Method, RirConfig
from ssl_gpu.rooms import RoomDraw, check_drawn, draw_rooms, render_direct, render_rooms
from ssl_gpu.scene import Pool, SceneBatch, SceneConfig, check_places, original_scenes, sample_scenes
from ssl_gpu.synthesis import PART, RirBatch

BANK_BLOCK = 64  # rooms of a bank whose images are drawn at a time; fixed, or the rooms would depend on the chunk


@dataclass(frozen=True)
class SimulatorConfig:
    """chunk: scenes rendered at a time, which bounds the memory; the result does not depend on it. None: 1,024 of 2
    microphones x 2 sources, 64 on a CPU, of which eight at a time are rendered and mixed, and as many times fewer as
    there are more pairs.
    compile: render and mix every chunk by torch.compile, each as one graph, to a few roundings the same. It compiles
        for every size of chunk that occurs, eight at most, and what is left runs plainly: let the chunk divide the
        batch, and batches be alike. For a GPU; a CPU is twice as slow with it (docs/performance.md).
    fused: on a GPU by Triton kernels (ssl_gpu.fused, ssl_gpu.fused_convolve), to a few roundings the same; with compile
        or without; null: where Triton works. What they do: the scatter and filter of any RIRs but exact ones; finding
        FRA-RIR's images, without early RIRs (rir.early=false), octave bands, patterns and decay=measured; convolving,
        without early RIRs, microphones that differ and patterns of microphones, up to 65,536 samples with the RIR's.

    Raises ValueError when chunk < 1.
    """

    chunk: int | None = None
    compile: bool = False
    fused: bool | None = None

    def __post_init__(self):
        check_fields(self, "simulator")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"simulator.chunk must be >= 1 scene, got {self.chunk}")

    def fused_on(self, device: torch.device) -> bool:
        """What fused comes to on this device. Raises ValueError where it is true and Triton does not work there; warns
        where it is null and Triton is there and does not."""
        if not runtime.is_gpu(device) or self.fused is False:
            return False
        problem = triton_problem(device)
        if problem is not None and self.fused:
            raise ValueError(f"simulator.fused must be false or null where {problem}, got true")
        if problem not in (None, NO_TRITON):
            warnings.warn(f"rooms are simulated without our own kernels, as {problem}", stacklevel=2)
        return problem is None

    def chunk_on(self, device: torch.device, pairs: int = 4) -> int:
        """Scenes rendered at a time on this device; pairs: microphones x sources of each."""
        return self.chunk or max(1, (64 if device.type == "cpu" else 1024) * 4 // pairs)


NO_TRITON = "Triton is not installed"


@lru_cache(maxsize=None)
def triton_problem(device: torch.device) -> str | None:
    """Why our kernels do not run on a GPU, None where they do: found out once, by the smallest of them. Triton comes
    with torch, but wants a C compiler and a GPU that it knows."""
    try:
        from ssl_gpu.fused import filter_spectra
    except ImportError:
        return NO_TRITON
    try:
        filter_spectra(*torch.zeros(4, 3, 2, dtype=torch.float32, device=device))
    except torch.OutOfMemoryError:                                      # which passes, and this is remembered
        raise
    except Exception as error:
        return f"Triton does not work ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    return None


def check_tensor(dry: Tensor) -> None:
    """Raises ValueError for dry speech that is no tensor: an array has a shape, and in numpy 2 a device called cpu."""
    if not isinstance(dry, Tensor):
        raise ValueError(f"dry speech must be a torch tensor, got {type(dry).__module__}.{type(dry).__qualname__}")


def name_of_bank(scenes: SceneBatch, law: SceneConfig, rir: RirConfig, ism: IsmConfig) -> str:
    """Of a bank by its scenes and by what its RIRs were drawn by and made of, the same in any process: of one generator
    the same scenes are followed by the same images. Waits for the device."""
    how = (law, replace(rir, early=False, early_window_ms=RirConfig.early_window_ms), ism if rir.uses_walls else None)
    content = hashlib.sha256(repr(how).encode())
    for tensor in (scenes.room_dim, scenes.rt60, scenes.mic_pos, scenes.src_pos, scenes.mic_orientation,
                   scenes.src_orientation):
        content.update(tensor.cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class Draw:
    """Everything random about a batch of mixtures: of its RIRs, what their methods need; or, that being None, the rows
    `bank_row` [batch] of the bank that they are, and which bank that is (Simulator.bank_name)."""

    scenes: SceneBatch
    rooms: RoomDraw | None
    bank_row: Tensor | None
    mixture: MixtureDraw
    bank_name: str | None = None

    def _map(self, function: Callable[[Any], Any]) -> "Draw":
        parts = (self.scenes, self.rooms, self.bank_row, self.mixture)
        return Draw(*(None if part is None else function(part) for part in parts), self.bank_name)

    def __getitem__(self, index: slice) -> "Draw":
        """The same draw of some of the mixtures."""
        return self._map(lambda part: part[index])

    def to(self, device: torch.device | str) -> "Draw":
        """The same draw on another device."""
        return self._map(lambda part: part.to(device))


class Simulator:
    """Speech to microphone signals, usable alone in anyone's training loop.

    Holds no randomness: every call takes a torch.Generator, whose device is the device of the draws. `draw` and
    `render` are the two halves of a call; drawing on a CPU and rendering anywhere gives the same rooms everywhere.
    With scene.bank set, fill_bank draws and renders that many rooms once and every call picks among them.
    No gradient goes through it to the speech: for one, draw and render by the functions that it calls (rooms, mixture).
    Scenes whose sources found no place (SceneBatch.valid, one of 1e12 under the original law) come out silent.
    Raises ValueError when more than 1 % of the scenes of the law would, when rir.method, rir.hybrid_share or
    rir.ism_share need the walls of rooms whose RT60 can be infeasible, for simulator.compile with exact rooms, and for
    scene.pool=original with RIRs by another law than the original's.
    """

    def __init__(self, scene: SceneConfig = SceneConfig(), rir: RirConfig = RirConfig(),
                 mixture: MixtureConfig = MixtureConfig(), config: SimulatorConfig = SimulatorConfig(),
                 ism: IsmConfig = IsmConfig()):
        for name, value, kind in (("scene", scene, SceneConfig), ("rir", rir, RirConfig), ("ism", ism, IsmConfig),
                                  ("mixture", mixture, MixtureConfig), ("config", config, SimulatorConfig)):
            check_class(name, value, kind)
        check_pool(scene, rir)
        if rir.uses_walls:
            check_law(ism, scene)
        check_places(scene)
        if config.compile and (rir.method is Method.ISM or rir.ism_share > 0):
            raise ValueError(f"simulator.compile must be false where rooms are exact, which wait for the device, got "
                             f"true with rir.method={rir.method.value} and rir.ism_share={rir.ism_share}")
        self.scene, self.rir, self.mixture, self.config, self.ism = scene, rir, mixture, config, ism
        self.bank: tuple[SceneBatch, RirBatch] | None = None
        self.bank_name: str | None = None                               # another one for every other bank
        self.bank_method: Tensor | None = None                          # of each room, where methods are mixed
        self._compile()

    def _compile(self) -> None:
        self._render_rooms = runtime.compiled(render_rooms, self.config.compile)
        self._mix = runtime.compiled(mix, self.config.compile)

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled cannot be pickled, so that no worker process could have a simulator of simulator.compile.
        return {name: value for name, value in vars(self).items() if name not in ("_render_rooms", "_mix")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bank_method = None                                         # which older versions did not keep
        vars(self).update(state)
        if self.bank is not None and "bank_name" not in state:          # of an older version
            self.bank_name = name_of_bank(self.bank[0], self.scene, self.rir, self.ism)
        self._compile()

    @torch.no_grad()
    def __call__(self, dry: Tensor, *, generator: torch.Generator, scenes: SceneBatch | None = None,
                 noise_share: float | Tensor = 1.0) -> MixtureBatch:
        """dry [batch, src, sample] float32 -> MixtureBatch, a new room for every example, on the generator's device.

        scenes: rooms, arrays and talkers of your own (scene.make_scenes) instead of new ones. noise_share: factor of
        mixture.noise_probability, for a training that begins without noise, see mixture.draw_mixture.
        Raises ValueError when dry is not a tensor [batch, src, sample], as many as there are scenes and sources, and
        for a generator that is none.
        """
        check_tensor(dry)
        if not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator, got {generator!r}")
        num_src = self.scene.num_src if scenes is None else scenes.src_pos.shape[1]
        if dry.ndim != 3 or dry.shape[1] != num_src or 0 in dry.shape:
            raise ValueError(f"dry speech must be [batch, src={num_src}, sample], got {list(dry.shape)}")
        return self.render(dry, self.draw(dry.shape[0], dry.shape[-1], generator=generator, scenes=scenes,
                                          noise_share=noise_share))

    @torch.no_grad()
    def fill_bank(self, *, generator: torch.Generator) -> None:
        """Draw and render the scene.bank rooms that every later call picks from. They stay on the generator's device.

        With scene.pool=original nothing is drawn from the generator: those rooms and their images are always the same.
        Raises ValueError when scene.bank is None, when a room has no place for its sources, and as a call does for
        simulator.fused.
        """
        if self.scene.bank is None:
            raise ValueError("Simulator.fill_bank needs scene.bank to be a number of rooms, got None")
        device, original = generator.device, self.scene.pool is Pool.ORIGINAL
        if original:
            scenes = original_scenes()[:self.scene.bank]
        else:
            scenes = sample_scenes(self.scene, self.scene.bank, generator=generator)
        if not scenes.valid.all():
            raise ValueError(f"scene: {int((~scenes.valid).sum())} of scene.bank={self.scene.bank} rooms have no place "
                             f"for the sources, widen scene.src_dist_m={self.scene.src_dist_m} or scene.room_min_m")
        chunk = self.config.chunk_on(device, self.scene.mic_count * self.scene.num_src)
        rooms, methods = [], []
        fused = self.config.fused_on(device)
        for start in range(0, len(scenes), BANK_BLOCK):  # a large bank's images do not fit at once
            block = scenes[start:start + BANK_BLOCK].to(device)
            if original:
                images = draw_original_images(scenes, range(start, start + len(block)))
                drawn = RoomDraw(images, None, None, self.rir).to(device)
            else:
                drawn = draw_rooms(self.ism, self.rir, block, generator=generator)
            methods.append(drawn.method)
            rooms += [render_rooms(self.ism, self.rir, block[i:i + chunk], drawn[i:i + chunk], fused)
                      for i in range(0, len(block), chunk)]
        self.bank = scenes.to(device), RirBatch.concatenate(rooms)
        self.bank_name = name_of_bank(scenes, self.scene, self.rir, self.ism)
        self.bank_method = None if methods[0] is None else torch.cat(methods)

    @torch.no_grad()
    def draw(self, batch: int, num_samples: int, *, generator: torch.Generator,
             scenes: SceneBatch | None = None, noise_share: float | Tensor = 1.0) -> Draw:
        """Everything random about `batch` mixtures of `num_samples` samples, on the generator's device; in scenes of
        your own, on that device, if there are some. noise_share changes which examples are noisy, and nothing else.

        Raises ValueError when scene.bank is set and fill_bank was not called, for a batch or num_samples below 1, and
        for scenes of another batch or with an RT60 that their walls cannot have, where walls are asked for.
        """
        num_src, num_mics = self.scene.num_src, self.scene.mic_count
        if batch < 1 or num_samples < 1:
            raise ValueError(f"Simulator.draw needs batch >= 1 and num_samples >= 1, got {batch} and {num_samples}")
        if scenes is not None:
            if len(scenes) != batch:
                raise ValueError(f"scenes must be as many as the batch={batch}, got {len(scenes)}")
            num_mics, num_src = scenes.mic_pos.shape[1], scenes.src_pos.shape[1]
            if self.rir.uses_walls and not self.ism.clamp_infeasible:
                check_feasible(self.ism, scenes)                        # which waits for the device
        noise = draw_mixture(self.mixture, batch, num_src, num_mics, num_samples, generator=generator,
                             noise_share=noise_share)
        if scenes is not None or self.scene.bank is None:
            if scenes is None:
                scenes = sample_scenes(self.scene, batch, generator=generator)
            return Draw(scenes, draw_rooms(self.ism, self.rir, scenes, generator=generator), None, noise)
        if self.bank is None:
            raise ValueError(f"scene.bank={self.scene.bank} needs Simulator.fill_bank before the first draw")
        row = torch.randint(self.scene.bank, (batch,), generator=generator, device=generator.device)
        return Draw(self.bank[0][row], None, row, noise, self.bank_name)

    @torch.no_grad()
    def render(self, dry: Tensor, draw: Draw) -> MixtureBatch:
        """dry [batch, src, sample] float32, on the draw's device -> MixtureBatch; scenes that are not valid are silent.
        Deterministic, but for the last bits on a GPU, where arrivals that share a tap are added in any order.

        Raises ValueError when dry is no tensor or does not belong to the draw, for a draw from a bank that is not the
        one held, or of rooms by another law (rooms.check_drawn), and for simulator.fused on a GPU without Triton.
        """
        self._check(dry, draw)
        if draw.rooms is not None and self.config.compile and not torch.compiler.is_compiling():
            # Which render_rooms does, but compiled.
            check_drawn(self.rir, draw.scenes, draw.rooms)
        fused = self.config.fused_on(dry.device)
        # Two microphones share a transform there: one that hears nothing would hear 1e-7 of the other.
        fused_mix = fused and self.rir.mic_pattern is Pattern.OMNI
        chunks = [(chunk, self._parts(chunk, dry.device)) for chunk in self._chunks(dry, draw)]
        several = len(chunks) > 1 or len(chunks[0][1]) > 1
        whole = early = None                                            # where the parts go, if there are several
        for chunk, parts in chunks:
            scenes = draw.scenes[chunk]
            rirs = self.bank[1][draw.bank_row[chunk]] if draw.rooms is None else \
                self._render_rooms(self.ism, self.rir, scenes, draw.rooms[chunk], fused)
            if several and whole is None:
                dtype = torch.promote_types(dry.dtype, torch.float32)   # as of a gain times the speech
                whole = dry.new_empty(len(dry), rirs.full.shape[1], dry.shape[-1], dtype=dtype)
                if rirs.early is not None:
                    early = dry.new_empty(len(dry), *rirs.early.shape[1:3], dry.shape[-1], dtype=dtype)
            for part in parts:
                own = slice(part.start - chunk.start, part.stop - chunk.start)
                mixture = self._mix(dry[part], rirs[own], scenes[own], draw.mixture[part], fused_mix,
                                    None if whole is None else whole[part], None if early is None else early[part])
        if not several:
            return replace(mixture, scenes=draw.scenes)
        return MixtureBatch(whole, early, draw.scenes, self.rir.sample_rate, draw.mixture.sensor_snr,
                            draw.mixture.diffuse_snr)

    @torch.no_grad()
    def render_direct(self, dry: Tensor, draw: Draw) -> Tensor:
        """What reaches the microphones straight from the talkers, [batch, mic, sample]: the direct paths in
        `render(dry, draw).audio`, without reflections and noise, by the same microphones at the same levels; but for
        what air and octave bands take off it, 0.6 % with rir.air=[20, 50]. Deterministic, as `render` is.

        Raises ValueError as `render` does.
        """
        self._check(dry, draw)
        if draw.rooms is not None and not torch.compiler.is_compiling():
            check_drawn(self.rir, draw.scenes, draw.rooms)
        method = draw.rooms.method if draw.rooms is not None else \
            None if self.bank_method is None else self.bank_method[draw.bank_row]
        fused = self.config.fused_on(dry.device)
        fused_mix = fused and self.rir.mic_pattern is Pattern.OMNI      # as in render
        whole = dry.new_empty(len(dry), draw.scenes.mic_pos.shape[1], dry.shape[-1],
                              dtype=torch.promote_types(dry.dtype, torch.float32))
        quiet = replace(draw.mixture, sensor=None, diffuse=None)
        for chunk in self._chunks(dry, draw):
            for part in self._parts(chunk, dry.device):
                of_part = None if method is None else method[part]
                rirs = render_direct(self.ism, self.rir, draw.scenes[part], of_part, fused)
                self._mix(dry[part], rirs, draw.scenes[part], quiet[part], fused_mix, whole[part])
        return whole

    def _check(self, dry: Tensor, draw: Draw) -> None:
        check_tensor(dry)
        if dry.device != draw.scenes.rt60.device:
            raise ValueError(f"dry speech must be on the draw's {draw.scenes.rt60.device}, got {dry.device}")
        samples = [noise.shape[-1] for noise in (draw.mixture.sensor, draw.mixture.diffuse) if noise is not None]
        if dry.ndim != 3 or dry.shape[:1] != draw.scenes.rt60.shape or 0 in dry.shape \
                or any(count != dry.shape[-1] for count in samples):
            raise ValueError(f"dry speech must be [batch={len(draw.scenes)}, src, sample"
                             f"{f'={samples[0]}' if samples else ''}] for this draw, got {list(dry.shape)}")
        if draw.rooms is None and draw.bank_name != self.bank_name:
            raise ValueError(f"this draw must be of the rooms of the bank that this simulator holds, {self.bank_name}, "
                             f"got one of {draw.bank_name}: fill_bank came in between, or another simulator drew")

    def _chunks(self, dry: Tensor, draw: Draw) -> list[slice]:
        """The parts of a batch that are rendered at a time."""
        pairs = draw.scenes.mic_pos.shape[1] * draw.scenes.src_pos.shape[1]
        chunk = self.config.chunk_on(dry.device, pairs)
        return [slice(start, min(start + chunk, len(dry))) for start in range(0, len(dry), chunk)]

    def _parts(self, chunk: slice, device: torch.device) -> list[slice]:
        """Of a chunk what is mixed at a time: on a CPU a few scenes, see synthesis.PART."""
        step = PART if runtime.prefers_parts(device) and not self.config.compile else chunk.stop - chunk.start
        return [slice(start, min(start + step, chunk.stop)) for start in range(chunk.start, chunk.stop, step)]

    @torch.no_grad()
    def captured(self, batch: int, num_samples: int, *,
                 generator: torch.Generator) -> Callable[[Tensor], MixtureBatch]:
        """A call of this for `batch` mixtures of `num_samples` samples, on a GPU as one CUDA graph (runtime.Graphed).

        The GPU does what it does otherwise, and the CPU does nothing but start it: for batches so small that it cannot
        launch their kernels as fast as they run. The result takes dry [batch, src, sample] on the generator's device
        and returns mixtures that its next call overwrites; the first calls are plain, the fourth captures. Draws are
        the generator's, which is to live as long.
        Raises ValueError for exact rooms drawn anew, which wait for the device, for a batch or num_samples below 1, for
        a bank that is not filled; and in a call for another dry speech, and once the bank was filled anew, as the graph
        reads the one before.
        """
        if self.scene.bank is None and (self.rir.method is Method.ISM or self.rir.ism_share > 0):
            raise ValueError(f"Simulator.captured needs rooms that do not wait for the device, got rir.method="
                             f"{self.rir.method.value} and rir.ism_share={self.rir.ism_share}")
        if batch < 1 or num_samples < 1:
            raise ValueError(f"Simulator.captured needs batch >= 1 and num_samples >= 1, got {batch} and {num_samples}")
        if self.scene.bank is not None and self.bank is None:
            raise ValueError(f"scene.bank={self.scene.bank} needs Simulator.fill_bank before it is captured")
        with torch.inference_mode(False):                               # or no call outside of it could fill it
            speech = torch.zeros(batch, self.scene.num_src, num_samples, dtype=torch.float32, device=generator.device)
        graphed = runtime.Graphed(lambda: self(speech, generator=generator), generator.device, (generator,))
        bank = self.bank

        @torch.no_grad()                                                # or `speech` would remember every dry speech
        def call(dry: Tensor) -> MixtureBatch:
            check_tensor(dry)
            if (dry.shape, dry.dtype, dry.device) != (speech.shape, speech.dtype, speech.device):
                raise ValueError(f"dry speech must be float32 {list(speech.shape)} on {speech.device} for what was "
                                 f"captured, got {str(dry.dtype).removeprefix('torch.')} {list(dry.shape)} on "
                                 f"{dry.device}")
            if self.bank is not bank:
                raise ValueError("Simulator.captured must be called again after Simulator.fill_bank")
            # What is captured is for later calls, too, which may train on it: not as the caller is.
            with torch.inference_mode(False), torch.no_grad():
                speech.copy_(dry)
                return graphed()

        return call
