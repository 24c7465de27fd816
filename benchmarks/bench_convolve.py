"""Convolution of sources with their RIRs: at once, each source kept, in blocks, and by torchaudio for comparison."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchaudio.functional import fftconvolve

from benchmarks import common
from benchmarks.bench_rir import render_chunks
from ssl_gpu.convolve import convolve_blocks, convolve_sources
from ssl_gpu.rir import RirConfig, draw_images
from ssl_gpu.scene import SceneConfig, sample_scenes

LONG_S = 30.0
BLOCK = 65536
WINDOW = 4000  # samples of the long signal that are compared with the oracle, across the end of the first block


@torch.no_grad()
def rows_of(batch: int, device: torch.device, args) -> list[dict[str, Any]]:
    """The rows of one batch size."""
    cfg, generator = replace(RirConfig(), early=False), common.generator(device)
    scenes = sample_scenes(SceneConfig(), batch, generator=generator)
    rir = torch.cat([r.full for r in render_chunks(cfg, scenes, draw_images(cfg, scenes, generator=generator))])
    samples = round(common.CLIP_S * cfg.sample_rate)
    dry = common.noise(batch, 2, samples, device)
    long = common.noise(batch, 2, round(LONG_S * cfg.sample_rate), device)

    def by_torchaudio() -> Tensor:
        return fftconvolve(dry[:, None], rir).sum(2)[..., :samples]

    def error(function, signal, begin, end):
        """Of the samples from begin to end, which no input after them and none more than an RIR before them reaches."""
        first = max(0, begin - rir.shape[-1])
        errors = []
        for index in range(min(args.check, batch)):
            heard = common.oracle_mixture(signal[index, :, first:end], rir[index])
            errors.append(common.relative_l2(function()[index, :, begin:end], heard[:, begin - first:]))
        return max(errors, default=None)

    def row(name, function, signal, begin, end):
        timing = common.measure(function, device, args.seconds)
        return common.row(name, batch, timing, batch * signal.shape[-1] / cfg.sample_rate,
                          lambda: error(lambda: total(function()), signal, begin, end), device)

    def total(out: Tensor) -> Tensor:
        return out.sum(2) if out.ndim == 4 else out

    return [row("3 s, sources added up", lambda: convolve_sources(dry, rir, samples), dry, 0, samples),
            row("3 s, each source kept", lambda: convolve_sources(dry, rir, samples, keep_src=True), dry, 0, samples),
            row("3 s, torchaudio.functional.fftconvolve", by_torchaudio, dry, 0, samples),
            row("30 s, at once", lambda: convolve_sources(long, rir), long, BLOCK - WINDOW, BLOCK + WINDOW),
            row("30 s, in blocks", lambda: convolve_blocks(long, rir, BLOCK), long, BLOCK - WINDOW, BLOCK + WINDOW)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("bench_convolve", __doc__)
    common.add_batch(parser, "16 on a CPU, 64 on a GPU")
    args = parser.parse_args(arguments)
    device = common.start(args)
    batches = sorted(args.batch or [16 if device.type == "cpu" else 64])
    rows = [row for batch in batches for row in rows_of(batch, device, args)]
    common.finish("bench_convolve", device, rows, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
