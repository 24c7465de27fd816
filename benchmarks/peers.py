"""Other room simulators on the scenes that ours renders: RIRs alone, and mixtures.

Whatever is installed takes part: pyroomacoustics, rir-generator, torchrir, gpuRIR; and the reference implementation of
FRA-RIR where the environment variable FRA_RIR_PATH names a checkout of github.com/tencent-ailab/FRA-RIR. Each gets one
scene at a time, for none takes more, on one CPU thread (--threads 1) or on the same GPU where it can use one; ours gets
the batch, again after every 16 scenes of the other. A tool that has taken --patience seconds takes no further scene;
ours then counts for the scenes that it took, at the mean of the batch that they are in. Our own image-source model
takes part as one of them.
"""
from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.bench_rir import render_chunks
from ssl_gpu import runtime
from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.commandline import end_with
from ssl_gpu.convolve import convolve_sources
from ssl_gpu.ism import IsmConfig, check_feasible
from ssl_gpu.mixture import MixtureConfig, draw_mixture
from ssl_gpu.rir import Method, RirConfig, draw_images
from ssl_gpu.rooms import RoomDraw, draw_rooms, render_rooms
from ssl_gpu.scene import SceneConfig, make_scenes, sample_scenes
from ssl_gpu.simulator import Draw, Simulator, SimulatorConfig

RATE = 16000
BOTH, FULL, MIXTURE = "RIRs, full and early", "RIRs", "RIRs and mixture"
COPIED = "RIRs, copied to the device"
STAGES = (BOTH, FULL, COPIED, MIXTURE)
TARGET = {BOTH: 20.0, FULL: 20.0, MIXTURE: 14.0}  # times the reference, on one CPU thread, in batches of 64
LATE_DB = 13.0  # where the diffuse tails of torchrir and gpuRIR take over, as in gpuRIR's examples
INTERLEAVE = 16  # scenes of another tool between two calls of ours, so that a busy moment hits both
CUT_ORDER = 17  # reflections that a truncated image-source model keeps
NOTES = (f"Times are wall-clock; \"ours is faster by\" is the ratio of total times over the same scenes, in brackets "
         f"that of CPU time. Only the reference computes what ours computes, and always the early part with it: it is "
         f"compared with ours with and without. The others are image-source models, exact for a shoebox and a harder "
         f"task, which ours does too (last rows): complete, cut at order {CUT_ORDER} (which loses the late tail), or "
         f"with a diffuse tail from -{LATE_DB:g} dB on. Scenes are refused where no absorption gives the RT60 by "
         f"Sabine's formula; those do not count for ours either. Mixtures are RIRs followed by "
         f"scipy.signal.fftconvolve, or on a GPU by our convolution; RIRs are left where the tool leaves them, and on "
         f"a GPU a row of their own has the copy to it, too.")

Seconds = tuple[float, float]  # wall-clock, and of the process on all CPU cores


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene as the others want it: room_dim [3], mic_pos [mic, 3], src_pos [src, 3] m, float64; rt60 s."""

    room_dim: np.ndarray
    rt60: float
    mic_pos: np.ndarray
    src_pos: np.ndarray


@dataclass(eq=False)
class Tool:
    """rirs: Scene -> [mic, src, tap], ValueError where the tool refuses it. stages: those that it can be timed in."""

    name: str
    on: str
    rirs: Callable[[Scene], np.ndarray | Tensor]
    stages: tuple[str, ...] = (FULL, MIXTURE)
    times: dict[str, list[Seconds]] = field(default_factory=lambda: defaultdict(list))  # of every scene
    ours: dict[str, list[list[Seconds]]] = field(default_factory=lambda: defaultdict(list))  # per scene, by batch
    taken: list[int] = field(default_factory=list)                                           # scenes of every batch
    refused: int = 0

    def spent_s(self) -> float:
        """Wall-clock seconds of all its scenes, RIRs and mixture, which every tool has."""
        return sum(wall for wall, _ in self.times.get(MIXTURE, []))

    def ratio(self, stage: str, clock: int) -> float:
        """How many times longer it takes than ours over the scenes that it took."""
        ours = sum(count * sum(seconds[clock] for seconds in calls) / len(calls)
                   for count, calls in zip(self.taken, self.ours[stage]))
        return sum(seconds[clock] for seconds in self.times[stage]) / ours


# ---- the others; each function raises ImportError where its package is missing ----


def reference(device: torch.device) -> list[Tool]:
    """FRAM_RIR of FRA_RIR_PATH, its defaults: as many images as ours, full and early RIR."""
    if "FRA_RIR_PATH" not in os.environ:
        raise ImportError("the environment variable FRA_RIR_PATH is not set")
    path = Path(os.environ["FRA_RIR_PATH"]) / "FRAM_RIR.py"
    if not path.is_file():
        raise ImportError("there is no FRAM_RIR.py in FRA_RIR_PATH")
    spec = spec_from_file_location("FRAM_RIR", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)

    def rirs(scene: Scene) -> np.ndarray:
        return module.FRAM_RIR(scene.mic_pos, RATE, scene.rt60, scene.room_dim, scene.src_pos)[0]

    return [Tool("FRA-RIR, the reference", "cpu", rirs, (BOTH, FULL, MIXTURE))]


def pyroomacoustics(device: torch.device) -> list[Tool]:
    """Image sources up to the order that the RT60 asks for, the same cut, and a few of them with ray tracing."""
    import pyroomacoustics as pra

    def with_order(limit: int | None, **options: Any) -> Callable[[Scene], np.ndarray]:
        def rirs(scene: Scene) -> np.ndarray:
            absorption, order = pra.inverse_sabine(scene.rt60, scene.room_dim)
            room = pra.ShoeBox(scene.room_dim, fs=RATE, materials=pra.Material(absorption),
                               max_order=order if limit is None else min(order, limit), **options)
            for position in scene.src_pos:
                room.add_source(position)
            room.add_microphone_array(scene.mic_pos.T)
            room.compute_rir()
            length = max(len(rir) for row in room.rir for rir in row)
            return np.array([[np.pad(rir, (0, length - len(rir))) for rir in row] for row in room.rir], np.float32)
        return rirs

    pra.constants.set("num_threads", torch.get_num_threads())
    name = f"pyroomacoustics {pra.__version__}"
    return [Tool(f"{name}, complete", "cpu", with_order(None)),
            Tool(f"{name}, order <= {CUT_ORDER}", "cpu", with_order(CUT_ORDER)),
            Tool(f"{name}, order <= 3 and ray tracing", "cpu", with_order(3, ray_tracing=True, air_absorption=True))]


def rir_generator(device: torch.device) -> list[Tool]:
    """All image sources within the RT60."""
    import rir_generator as generator

    def rirs(scene: Scene) -> np.ndarray:
        taps = int(np.ceil(scene.rt60 * RATE))
        return np.stack([generator.generate(SPEED_OF_SOUND, RATE, scene.mic_pos, src, scene.room_dim, nsample=taps,
                                            reverberation_time=scene.rt60).T for src in scene.src_pos],
                        1).astype(np.float32)

    return [Tool(f"rir-generator {generator.__version__}, complete", "cpu", rirs)]


def torchrir(device: torch.device) -> list[Tool]:
    """All image sources within the RT60, and those of the first decay with a diffuse tail."""
    from importlib.metadata import version

    from torchrir import MicrophoneArray, Room, Source, StaticScene
    from torchrir.config import SimulationConfig
    from torchrir.sim import simulate
    from torchrir.util.acoustics import attenuation_db_to_time_sabine, estimate_image_counts_from_tmax

    def until(late_db: float | None) -> Callable[[Scene], Tensor]:
        def rirs(scene: Scene) -> Tensor:
            room = Room.shoebox(scene.room_dim.tolist(), fs=RATE, c=SPEED_OF_SOUND, t60=scene.rt60, device=device)
            tdiff = None if late_db is None else attenuation_db_to_time_sabine(late_db, scene.rt60)
            counts = estimate_image_counts_from_tmax(tdiff or scene.rt60, torch.tensor(scene.room_dim), SPEED_OF_SOUND)
            cfg = SimulationConfig(nb_img=tuple(counts.tolist()), tmax=scene.rt60, tdiff=tdiff, device=device)
            simulated = simulate(StaticScene(
                room=room, sources=Source.from_positions(scene.src_pos.tolist(), device=device),
                mics=MicrophoneArray.from_positions(scene.mic_pos.tolist(), device=device)), cfg)
            return simulated.rirs.transpose(0, 1)  # [src, mic, tap] there
        return rirs

    name = f"torchrir {version('torchrir')}"
    return [Tool(f"{name}, complete", device.type, until(None)),
            Tool(f"{name}, {LATE_DB:g} dB and diffuse tail", device.type, until(LATE_DB))]


def gpu_rir(device: torch.device) -> list[Tool]:
    """As torchrir; gpuRIR wants a GPU and takes the first one."""
    if device.type == "cpu":
        raise ImportError("it needs a GPU")
    import gpuRIR

    def until(late_db: float | None) -> Callable[[Scene], np.ndarray]:
        def rirs(scene: Scene) -> np.ndarray:
            beta = gpuRIR.beta_SabineEstimation(scene.room_dim, scene.rt60)
            tdiff = None if late_db is None else gpuRIR.att2t_SabineEstimator(late_db, scene.rt60)
            images = gpuRIR.t2n(tdiff or scene.rt60, scene.room_dim)
            return gpuRIR.simulateRIR(scene.room_dim, beta, scene.src_pos, scene.mic_pos, images, scene.rt60, RATE,
                                      Tdiff=tdiff, c=SPEED_OF_SOUND).transpose(1, 0, 2)
        return rirs

    return [Tool("gpuRIR, complete", device.type, until(None)),
            Tool(f"gpuRIR, {LATE_DB:g} dB and diffuse tail", device.type, until(LATE_DB))]


def own_models(device: torch.device) -> list[Tool]:
    """Our image-source model and our hybrid, scene by scene as the others, who do the same task."""
    def by(method: Method) -> Callable[[Scene], Tensor]:
        cfg, ism, generator = RirConfig(early=False, method=method), IsmConfig(), common.generator(device)

        @torch.no_grad()
        def rirs(scene: Scene) -> Tensor:
            one = make_scenes(scene.room_dim[None], [scene.rt60], scene.mic_pos[None], scene.src_pos[None]).to(device)
            check_feasible(ism, one)
            return render_rooms(ism, cfg, one, draw_rooms(ism, cfg, one, generator=generator)).full[0]
        return rirs

    return [Tool("ours, method=ism, complete", device.type, by(Method.ISM)),
            Tool("ours, method=hybrid", device.type, by(Method.HYBRID))]


PEERS = {"reference": reference, "pyroomacoustics": pyroomacoustics, "rir-generator": rir_generator,
         "torchrir": torchrir, "gpuRIR": gpu_rir, "own-models": own_models}


# ---- the measurement ----


def timed(function: Callable[[], Any], device: torch.device) -> tuple[Any, Seconds]:
    """What the function returns, and the wall-clock and the CPU seconds that it takes."""
    runtime.synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    value = function()
    runtime.synchronize(device)
    return value, (time.perf_counter() - wall, time.process_time() - cpu)


class Ours:
    """Our three stages on one batch of scenes: the images are drawn anew in every call, as by the reference."""

    def __init__(self, batch: int, device: torch.device, step: int, chunk: int | None = None):
        self.generator = common.generator(device, step)
        self.scenes = sample_scenes(SceneConfig(), batch, generator=self.generator)
        self.dry = common.noise(batch, 2, round(common.CLIP_S * RATE), device)
        self.device, self.chunk = device, chunk

    def each(self) -> list[Scene]:
        """The scenes one by one."""
        parts = (self.scenes.room_dim, self.scenes.rt60, self.scenes.mic_pos, self.scenes.src_pos)
        room_dim, rt60, mic_pos, src_pos = (part.cpu().numpy() for part in parts)
        return [Scene(room_dim[i], float(rt60[i]), mic_pos[i], src_pos[i]) for i in range(len(rt60))]

    @torch.no_grad()
    def run(self, stage: str) -> Seconds:
        """Seconds of one call."""
        cfg = RirConfig(early=stage == BOTH)

        def rirs():
            images = draw_images(cfg, self.scenes, generator=self.generator)
            fused = SimulatorConfig().fused_on(images.ratio.device)
            return render_chunks(cfg, self.scenes, images, fused=fused, chunk=self.chunk)  # of COPIED, too

        def mixtures():
            images = draw_images(cfg, self.scenes, generator=self.generator)
            levels = draw_mixture(MixtureConfig(), *self.dry.shape[:2], 2, self.dry.shape[-1], generator=self.generator)
            draw = Draw(self.scenes, RoomDraw(images, tail=None, method=None), bank_row=None, mixture=levels)
            return Simulator(rir=cfg, config=SimulatorConfig(self.chunk)).render(self.dry, draw)

        return timed(mixtures if stage == MIXTURE else rirs, self.device)[1]


def convolve(dry: Tensor, rirs: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """dry [src, sample] through rirs [mic, src, tap] -> [mic, sample], on the device of dry."""
    if dry.device.type != "cpu":
        rirs = torch.as_tensor(rirs, dtype=dry.dtype, device=dry.device)
        return convolve_sources(dry[None], rirs[None], dry.shape[-1])[0]
    from scipy.signal import fftconvolve

    return fftconvolve(dry.numpy()[None], np.asarray(rirs), axes=-1).sum(1)[..., :dry.shape[-1]]


def time_scene(tool: Tool, scene: Scene, dry: Tensor, device: torch.device) -> dict[str, Seconds]:
    """Seconds of the stages of one scene: all kinds of RIR are the same call, and the copy and the mixture go on from
    it.

    Raises ValueError where the tool refuses the scene.
    """
    rirs, spent = timed(lambda: tool.rirs(scene), device)
    further = {MIXTURE: timed(lambda: convolve(dry, rirs), device)[1]}
    if COPIED in tool.stages:
        further[COPIED] = timed(lambda: torch.as_tensor(rirs, device=device), device)[1]
    return {stage: tuple(map(sum, zip(spent, further.get(stage, (0.0, 0.0))))) for stage in tool.stages}


def compare(tool: Tool, ours: Ours, record: bool, patience: float) -> str | None:
    """One batch, scene by scene by the tool, until it has taken `patience` s in all; and all of it by ours in between.
    To warm up: up to the first scene.

    Returns what went wrong, if the tool fails in another way than by refusing a scene.
    """
    scenes, dry = ours.each(), ours.dry.cpu() if tool.on == "cpu" else ours.dry
    spent, here, refused = [], {stage: [] for stage in tool.stages}, 0
    left_s = patience - tool.spent_s()
    for index, scene in enumerate(scenes):
        if index % INTERLEAVE == 0:
            for stage, calls in here.items():
                wall, cpu = ours.run(stage)
                calls.append((wall / len(scenes), cpu / len(scenes)))
        try:
            spent.append(time_scene(tool, scene, dry[index], ours.device))
        except ValueError:
            refused += 1
            continue
        except Exception as error:  # a broken package must not cost the others their measurement
            return f"{type(error).__name__}: {error}"
        left_s -= spent[-1][MIXTURE][0]
        if left_s < 0 or not record:
            break
    if record:
        tool.taken.append(len(spent))
        tool.refused += refused
        for stage, calls in here.items():
            tool.times[stage] += [seconds[stage] for seconds in spent]
            tool.ours[stage].append(calls)
    return None


def find_tools(names: Sequence[str], device: torch.device) -> tuple[list[Tool], dict[str, str]]:
    """What can be measured here, and why the rest cannot."""
    tools, skipped = [], {}
    for name in names:
        try:
            tools += PEERS[name](device)
        except ImportError as error:
            skipped[name] = str(error)
        except Exception as error:
            skipped[name] = f"{type(error).__name__} at import: {error}"
    if device.type != "cpu":
        for tool in tools:
            tool.stages = (*tool.stages[:-1], COPIED, tool.stages[-1])
    return tools, skipped


def measure(tools: list[Tool], skipped: dict[str, str], stopped: dict[str, str], args, device: torch.device,
            done: Callable[[], None]) -> None:
    """All scenes through all tools, batch after batch; what fails, or takes too long for another scene, drops out, and
    `skipped` or `stopped` says why. done is called after every batch of a tool."""
    for step in range(-1, -(-args.scenes // args.batch)):
        ours = Ours(args.batch, device, 2 + max(step, 0), args.chunk)
        for tool in tools:
            if tool.name in skipped or tool.name in stopped:
                continue
            wrong = compare(tool, ours, step >= 0, args.patience)
            if wrong is not None:
                skipped[tool.name] = wrong
            elif tool.spent_s() > args.patience:
                stopped[tool.name] = (f"out of patience ({args.patience:g} s) after {sum(tool.taken) + tool.refused} "
                                      f"scenes")
            if step >= 0:
                done()


def rows_of(tools: list[Tool], target: bool, batch: int, device: torch.device) -> list[dict[str, Any]]:
    """Ours from all its calls, then the others."""
    rows = []

    def row(name: str, stage: str, on: str, wall: list[float], **more: Any) -> None:
        timing = common.Timing.of(wall)
        rows.append({"name": name, "stage": stage, "on": on, "median_s": timing.median_s, "p10_s": timing.p10_s,
                     "p90_s": timing.p90_s, "mean_s": sum(wall) / len(wall), **more})

    for stage in STAGES:
        wall = [seconds[0] for tool in tools for calls in tool.ours[stage] for seconds in calls]
        if wall:
            row(f"ours, FRA-RIR, batches of {batch}", stage, device.type, wall, scenes=batch * len(wall), refused=0,
                ratio=None, ratio_cpu=None, target=None, met=None)
    for tool in tools:
        for stage, seconds in tool.times.items():
            ratio = tool.ratio(stage, 0)
            aim = TARGET[stage] if target and BOTH in tool.stages else None
            row(tool.name, stage, tool.on, [wall for wall, _ in seconds], scenes=len(seconds), refused=tool.refused,
                ratio=ratio, ratio_cpu=tool.ratio(stage, 1) if device.type == "cpu" else None, target=aim,
                met=None if aim is None else ratio >= aim)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("peers", __doc__, seconds=None)
    parser.add_argument("--scenes", type=common.positive, default=64, help="how many scenes (default 64)")
    parser.add_argument("--batch", type=common.positive, default=64, help="scenes per call of ours (default 64)")
    parser.add_argument("--chunk", type=common.positive, metavar="N",
                        help="scenes that ours renders at a time (default: the Simulator's choice)")
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    parser.add_argument("--patience", type=common.duration, default=60.0, metavar="S",
                        help="a tool that took longer in all takes no further scene (default 60)")
    args = parser.parse_args(arguments)
    device = common.start(args)
    torch.manual_seed(0)
    np.random.seed(0)  # the reference draws from the global generators
    tools, skipped = find_tools(args.only, device)
    stopped: dict[str, str] = {}
    results = common.Results("peers", device, arguments, args.json, skipped=skipped, stopped=stopped, notes=NOTES)
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1

    def done() -> None:
        results.rows[:] = rows_of([tool for tool in tools if tool.name not in skipped and sum(tool.taken)], one_thread,
                                  args.batch, device)
        results.save()

    measure(tools, skipped, stopped, args, device, done)
    return results.finish()


if __name__ == "__main__":
    end_with(main)
