"""Room impulse responses: scenes and images drawn, RIRs rendered, with and without the early part."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks import common
from ssl_gpu import runtime
from ssl_gpu.commandline import end_with
from ssl_gpu.rir import ImageBatch, RirConfig, draw_images, render_rir
from ssl_gpu.scene import SceneBatch, SceneConfig, sample_scenes
from ssl_gpu.simulator import SimulatorConfig
from ssl_gpu.synthesis import RirBatch

DRAW = "draw scenes and images"


def render_chunks(cfg: RirConfig, scenes: SceneBatch, images: ImageBatch, render=render_rir, fused: bool = False,
                  chunk: int | None = None) -> list[RirBatch]:
    """RIRs of a batch, `chunk` scenes at a time, or as many as the Simulator takes."""
    chunk = SimulatorConfig(chunk).chunk_on(scenes.rt60.device, scenes.mic_pos.shape[1] * scenes.src_pos.shape[1])
    return [render(cfg, scenes[i:i + chunk], images[i:i + chunk], fused) for i in range(0, len(scenes), chunk)]


@torch.no_grad()
def draw_rooms(batch: int, device: torch.device, seconds: float) -> tuple[dict[str, Any], None]:
    """The row of what the others render."""
    generator = common.generator(device)
    timing = common.measure(lambda: draw(batch, generator), device, seconds)
    return common.row(DRAW, batch, timing, None, device, compiled=False), None


def draw(batch: int, generator: torch.Generator) -> tuple[SceneBatch, ImageBatch]:
    """Scenes of the default law, and their images."""
    scenes = sample_scenes(SceneConfig(), batch, generator=generator)
    return scenes, draw_images(RirConfig(), scenes, generator=generator)


@torch.no_grad()
def render_rooms(name: str, batch: int, way: dict[str, bool], cfg: RirConfig, anew: bool, check: int,
                 device: torch.device, seconds: float) -> tuple[dict[str, Any], common.Check | None]:
    """The row of a name, batch size and way (common.ways), and the comparison of its first `check` scenes with the
    oracle; anew: draw them in every call."""
    render, generator = runtime.compiled(render_rir, way["compiled"]), common.generator(device)
    scenes, images = draw(batch, generator)
    audio_s = float(scenes.rt60.sum())

    def call() -> list[RirBatch]:
        return render_chunks(cfg, *(draw(batch, generator) if anew else (scenes, images)), render, way["fused"])

    row = common.row(name, batch, common.measure(call, device, seconds), audio_s, device, **way)
    if check == 0:
        return row, None
    found = render_chunks(cfg, scenes, images, render, way["fused"])[0].full[:check].cpu()
    few, their_images = scenes[:len(found)].to("cpu"), images[:len(found)].to("cpu")
    return row, lambda: common.rir_error(found, few, their_images, cfg.sample_rate)


def tasks(batch: int, way: dict[str, bool], first: bool, device: torch.device, args) -> list[common.Task]:
    """The rows of one batch size and way; with drawing, which all ways have in common, for the first."""
    both = RirConfig()
    full = replace(both, early=False)
    kinds = [("render", full, False), ("render, early part too", both, False), ("draw and render", full, True)]
    drawing = [common.Task(DRAW, batch, False, partial(draw_rooms, batch, device, args.seconds))]
    return drawing * first + [
        common.Task(name, batch, way["compiled"],
                    partial(render_rooms, name, batch, way, *kind, args.check, device, args.seconds),
                    {"fused": way["fused"]})
        for name, *kind in kinds]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("bench_rir", __doc__)
    common.add_batch(parser, "16 and 64 on a CPU, 64, 512 and 2048 on a GPU")
    args = parser.parse_args(arguments)
    device = common.start(args)
    batches = sorted(args.batch or ([16, 64] if device.type == "cpu" else [64, 512, 2048]))
    results = common.Results("bench_rir", device, arguments, args.json)
    ways = common.ways(args, device)
    for way, batch in product(ways, batches):
        if way["compiled"]:
            torch.compiler.reset()  # it keeps eight sizes of a function, and raises at the ninth
        results.measure(tasks(batch, way, way == ways[0], device, args))
    return results.finish()


if __name__ == "__main__":
    end_with(main)
