"""Convolution of sources with their RIRs: as it is, each source kept, in one block; torchaudio's for comparison."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchaudio.functional import fftconvolve

from benchmarks import common
from benchmarks.bench_rir import render_chunks
from ssl_gpu.commandline import end_with
from ssl_gpu.convolve import convolve_sources
from ssl_gpu.rir import RirConfig, draw_images
from ssl_gpu.scene import SceneConfig, sample_scenes

CFG = replace(RirConfig(), early=False)
LONG_S = 30.0
BLOCK = 65536
SAMPLES, LONG = round(common.CLIP_S * CFG.sample_rate), round(LONG_S * CFG.sample_rate)
WINDOW = 4000  # samples of the long signal that are compared with the oracle, across the end of the first BLOCK


def by_torchaudio(dry: Tensor, rir: Tensor) -> Tensor:
    """The first samples of every source's convolution, added up, as convolve_sources has them."""
    return fftconvolve(dry[:, None], rir).sum(2)[..., :SAMPLES]


# Name of a row -> what it measures, of dry speech [batch, src, sample] and RIRs [batch, mic, src, tap]; seconds of
# speech; first and last sample that are compared with the oracle.
KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float, int, int]] = {
    "3 s, sources added up": (lambda dry, rir: convolve_sources(dry, rir, SAMPLES), common.CLIP_S, 0, SAMPLES),
    "3 s, each source kept": (lambda dry, rir: convolve_sources(dry, rir, SAMPLES, keep_src=True), common.CLIP_S, 0,
                              SAMPLES),
    "3 s, in one block": (lambda dry, rir: convolve_sources(dry, rir, SAMPLES, block=SAMPLES), common.CLIP_S, 0,
                          SAMPLES),
    "3 s, torchaudio.functional.fftconvolve": (by_torchaudio, common.CLIP_S, 0, SAMPLES),
    "30 s": (lambda dry, rir: convolve_sources(dry, rir, LONG), LONG_S, BLOCK - WINDOW, BLOCK + WINDOW),
    "30 s, in blocks of 65,536": (lambda dry, rir: convolve_sources(dry, rir, LONG, block=BLOCK), LONG_S,
                                  BLOCK - WINDOW, BLOCK + WINDOW),
    "30 s, in one block": (lambda dry, rir: convolve_sources(dry, rir, LONG, block=LONG), LONG_S, BLOCK - WINDOW,
                           BLOCK + WINDOW),
}


@torch.no_grad()
def measure(name: str, batch: int, check: int, device: torch.device,
            seconds: float) -> tuple[dict[str, Any], common.Check | None]:
    """The row of one of KINDS, and the comparison of its first `check` scenes: of the samples from begin to end, which
    no input after them and none more than an RIR before them reaches."""
    function, duration_s, begin, end = KINDS[name]
    generator = common.generator(device)
    scenes = sample_scenes(SceneConfig(), batch, generator=generator)
    images = draw_images(CFG, scenes, generator=generator)
    rir = torch.cat([r.full for r in render_chunks(CFG, scenes, images)])
    dry = common.noise(batch, 2, round(duration_s * CFG.sample_rate), device)
    timing = common.measure(lambda: function(dry, rir), device, seconds)
    row = common.row(name, batch, timing, batch * duration_s, device)
    if check == 0:
        return row, None
    first = max(0, begin - rir.shape[-1])
    found = function(dry, rir)[:check, ..., begin:end].cpu()
    found, dry, rir = found.sum(2) if found.ndim == 4 else found, dry[:check, :, first:end].cpu(), rir[:check].cpu()
    return row, lambda: max(common.relative_l2(found[i], common.oracle_mixture(dry[i], rir[i])[:, begin - first:])
                            for i in range(len(found)))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("bench_convolve", __doc__)
    common.add_batch(parser, "16 on a CPU, 64 on a GPU")
    args = parser.parse_args(arguments)
    device = common.start(args)
    batches = sorted(args.batch or [16 if device.type == "cpu" else 64])
    results = common.Results("bench_convolve", device, arguments, args.json)
    results.measure(common.Task(name, batch, False, partial(measure, name, batch, args.check, device, args.seconds))
                    for batch in batches for name in KINDS)
    return results.finish()


if __name__ == "__main__":
    end_with(main)
