"""Whole mixtures, as a training step asks for them: endless rooms, with noise, and from a bank of rooms; and with more
microphones and sources.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from ssl_gpu import runtime
from ssl_gpu.commandline import end_with
from ssl_gpu.mixture import MixtureBatch, MixtureConfig
from ssl_gpu.rir import RirConfig
from ssl_gpu.scene import SceneConfig
from ssl_gpu.simulator import Simulator, SimulatorConfig

BANK = 64  # rooms; the time of a call does not depend on how many there are
RIR = replace(RirConfig(), early=False)
SAMPLES = round(common.CLIP_S * RIR.sample_rate)
NOISY = MixtureConfig(sensor_snr_db=(10.0, 30.0), diffuse_snr_db=(10.0, 30.0))


@torch.no_grad()
def measure(name: str, batch: int, way: dict[str, bool], cfg: SceneConfig, mixture: MixtureConfig, compare: int,
            device: torch.device, seconds: float) -> tuple[dict[str, Any], common.Check | None]:
    """The row of a name, batch size and way (common.ways), and the comparison of its first `compare` scenes."""
    generator, dry = common.generator(device), common.noise(batch, cfg.num_src, SAMPLES, device)
    simulator = Simulator(cfg, RIR, mixture, SimulatorConfig(compile=way["compiled"], fused=way["fused"]))
    if cfg.bank is not None:
        simulator.fill_bank(generator=generator)
    call: Callable[[Tensor], MixtureBatch] = partial(simulator, generator=generator)
    if way["graph"]:
        call = simulator.captured(batch, SAMPLES, generator=generator)
        for _ in range(runtime.Graphed.WARM_UP + 1):                    # the last of these captures
            call(dry)
    timing = common.measure(lambda: call(dry), device, seconds)
    row = common.row(name, batch, timing, batch * common.CLIP_S, device, **way)
    return row, comparison(simulator, call, generator, dry, min(compare, batch)) if compare else None


def comparison(simulator: Simulator, call: Callable[[Tensor], MixtureBatch], generator: torch.Generator, dry: Tensor,
               few: int) -> common.Check:
    """The error of the first `few` mixtures of one more call of what was timed, by `generator`, against direct
    convolution and noise in float64, of a bank's own RIRs or of those of the oracle."""
    seeded = common.generator(dry.device, 2)
    generator.manual_seed(seeded.initial_seed())
    audio, here = common.kept(call(dry).audio[:few]), common.kept(dry[:few])
    draw = simulator.draw(len(dry), SAMPLES, generator=seeded)          # what that call has drawn
    rirs = None if simulator.bank is None else simulator.bank[1].full[draw.bank_row[:few]].cpu()
    draw = common.kept(draw[:few].to("cpu"))

    def error() -> float:
        errors = []
        for i in range(few):
            rir = common.oracle_rir(draw.scenes, draw.rooms.images, i, RIR.sample_rate) if rirs is None else rirs[i]
            speech = common.oracle_mixture(here[i], rir)
            errors.append(common.relative_l2(audio[i], common.oracle_noise(speech, draw, i, RIR.sample_rate)))
        return max(errors)

    return error


def floor(device: torch.device) -> dict[str, float]:
    """The least time of a scene of the workload, us_per_scene: to read its dry speech and write its mixture once
    (bytes_per_scene), at the speed of a copy (bytes_per_s, read and written)."""
    scenes = SceneConfig()
    size, speed = 4 * SAMPLES * (scenes.num_src + scenes.num_mics), common.copy_speed(device)
    return {"bytes_per_scene": size, "bytes_per_s": speed, "us_per_scene": 1e6 * size / speed}


def tasks(batch: int, way: dict[str, bool], device: torch.device, args) -> list[common.Task]:
    """The rows of one batch size and way."""
    kinds = [("endless rooms", SceneConfig(), MixtureConfig(), args.check),
             ("endless rooms, sensor and diffuse noise", SceneConfig(), NOISY, args.check),
             ("bank of rooms", SceneConfig(bank=BANK), MixtureConfig(), args.check)]
    return [common.Task(name, batch, way["compiled"], partial(measure, name, batch, way, *kind, device, args.seconds),
                        {key: way[key] for key in ("fused", "graph")}) for name, *kind in kinds]


def task_of_array(array: str, batch: int, way: dict[str, bool], device: torch.device, args) -> common.Task:
    """Endless rooms with `array` microphones x sources, a name such as 2x4, to be compared with 2x2."""
    mics, srcs = map(int, array.split("x"))
    name, cfg = f"endless rooms, {array}", SceneConfig(num_mics=mics, num_src=srcs)
    make = partial(measure, name, batch, way, cfg, MixtureConfig(), args.check, device, args.seconds)
    return common.Task(name, batch, way["compiled"], make, {key: way[key] for key in ("fused", "graph")})


def array_name(text: str) -> str:
    """Microphones x sources from the command line."""
    if re.fullmatch(r"[1-9]\d?x[1-9]\d?", text) is None:
        raise argparse.ArgumentTypeError(f"must be MICROPHONESxSOURCES, for example 2x4, got {text!r}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("bench_simulate", __doc__)
    common.add_batch(parser, "16 and 64 on a CPU, 64, 512 and 2048 on a GPU")
    parser.add_argument("--graph", choices=common.CHOICES, default="no",
                        help="a batch as one CUDA graph, which a CPU has not (default no)")
    parser.add_argument("--arrays", type=array_name, nargs="+", default=[], metavar="MxS",
                        help="endless rooms with so many microphones and sources, too, for example 2x4 4x4")
    parser.add_argument("--array-batch", type=common.positive, metavar="N",
                        help="scenes per call of these (default: the largest batch)")
    args = parser.parse_args(arguments)
    device = common.start(args)
    batches = sorted(args.batch or ([16, 64] if device.type == "cpu" else [64, 512, 2048]))
    results = common.Results("bench_simulate", device, arguments, args.json)
    for way in common.ways(args, device):
        for batch in batches:
            if way["compiled"]:
                torch.compiler.reset()  # it keeps eight sizes of a function, and raises at the ninth
            results.measure(tasks(batch, way, device, args))
        if not way["compiled"]:
            results.measure(task_of_array(array, args.array_batch or batches[-1], way, device, args)
                            for array in args.arrays)
    try:
        results.content["floor"] = floor(device)  # last: on a CPU every row after it would count its memory
    except RuntimeError as error:  # of a GPU that is full, or spoiled by a capture that failed: the rows are there
        print(f"no floor of the memory: {str(error).strip().splitlines()[0]}", file=sys.stderr)
    results.save()
    return results.finish()


if __name__ == "__main__":
    end_with(main)
