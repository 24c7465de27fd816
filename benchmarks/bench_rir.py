"""Room impulse responses: scenes and images drawn, RIRs rendered, with and without the early part."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from benchmarks import common
from ssl_gpu import runtime
from ssl_gpu.rir import ImageBatch, RirConfig, draw_images, render_rir
from ssl_gpu.scene import SceneBatch, SceneConfig, sample_scenes
from ssl_gpu.simulator import SimulatorConfig
from ssl_gpu.synthesis import RirBatch


def render_chunks(cfg: RirConfig, scenes: SceneBatch, images: ImageBatch, render=render_rir,
                  chunk: int | None = None) -> list[RirBatch]:
    """RIRs of a batch, `chunk` scenes at a time, or as many as the Simulator takes."""
    chunk = SimulatorConfig(chunk).chunk_on(scenes.rt60.device)
    return [render(cfg, scenes[i:i + chunk], images[i:i + chunk]) for i in range(0, len(scenes), chunk)]


@torch.no_grad()
def rows_of(batch: int, compile: bool, device: torch.device, args) -> list[dict[str, Any]]:
    """The rows of one batch size, eager or compiled."""
    scene, both, generator = SceneConfig(), RirConfig(), common.generator(device)
    full = replace(both, early=False)
    if compile:
        torch.compiler.reset()  # it keeps eight sizes of a function, and raises at the ninth
    render = runtime.compiled(render_rir, compile)
    scenes = sample_scenes(scene, batch, generator=generator)
    images = draw_images(full, scenes, generator=generator)

    def draw():
        drawn = sample_scenes(scene, batch, generator=generator)
        return drawn, draw_images(full, drawn, generator=generator)

    def error(cfg):
        few = slice(0, args.check)
        rirs = [rir for part in render_chunks(cfg, scenes[few], images[few], render) for rir in part.full]
        return common.rir_error(rirs, scenes, images, cfg.sample_rate)

    def row(name, function, audio_s, cfg):
        timing = common.measure(function, device, args.seconds)
        return common.row(name, batch, timing, audio_s, None if cfg is None else lambda: error(cfg), device,
                          compiled=compile and cfg is not None)

    audio_s = float(scenes.rt60.sum())
    drawing = [] if compile else [row("draw scenes and images", draw, None, None)]
    return [*drawing,
            row("render", lambda: render_chunks(full, scenes, images, render), audio_s, full),
            row("render, early part too", lambda: render_chunks(both, scenes, images, render), audio_s, both),
            row("draw and render", lambda: render_chunks(full, *draw(), render), audio_s, full)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("bench_rir", __doc__)
    common.add_batch(parser, "16 and 64 on a CPU, 64, 512 and 2048 on a GPU")
    args = parser.parse_args(arguments)
    device = common.start(args)
    batches = sorted(args.batch or ([16, 64] if device.type == "cpu" else [64, 512, 2048]))
    rows = [row for batch, compile in product(batches, common.CHOICES[args.compile])
            for row in rows_of(batch, compile, device, args)]
    common.finish("bench_rir", device, rows, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
