"""Whole mixtures, as a training step asks for them: endless rooms, with noise, and from a bank of rooms; and with more
microphones and sources.
"""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from benchmarks import common
from ssl_gpu.mixture import MixtureConfig
from ssl_gpu.rir import RirConfig
from ssl_gpu.scene import SceneConfig
from ssl_gpu.simulator import Simulator, SimulatorConfig

BANK = 64  # rooms; the time of a call does not depend on how many there are
RIR = replace(RirConfig(), early=False)
SAMPLES = round(common.CLIP_S * RIR.sample_rate)
NOISY = MixtureConfig(sensor_snr_db=(10.0, 30.0), diffuse_snr_db=(10.0, 30.0))


@torch.no_grad()
def rows_of(batch: int, compile: bool, device: torch.device, args) -> list[dict[str, Any]]:
    """The rows of one batch size, eager or compiled."""
    if compile:
        torch.compiler.reset()  # it keeps eight sizes of a function, and raises at the ninth
    generator, how = common.generator(device), SimulatorConfig(compile=compile)
    dry = common.noise(batch, 2, SAMPLES, device)
    endless, noisy = Simulator(rir=RIR, config=how), Simulator(rir=RIR, mixture=NOISY, config=how)
    bank = Simulator(replace(SceneConfig(), bank=BANK), RIR, config=how)
    bank.fill_bank(generator=generator)

    def error(simulator):
        """Against direct convolution in float64, of a bank's own RIRs or of those of the oracle."""
        few = min(args.check, batch)
        if few == 0:
            return None
        draw = simulator.draw(few, SAMPLES, generator=common.generator(device, 2))
        audio, errors = simulator.render(dry[:few], draw).audio, []
        for i in range(few):
            rirs = simulator.bank[1].full[draw.bank_row[i]] if simulator.bank is not None else \
                common.oracle_rir(draw.scenes, draw.rooms.images, i, RIR.sample_rate)
            errors.append(common.relative_l2(audio[i], common.oracle_mixture(dry[i], rirs)))
        return max(errors, default=None)

    def row(name, simulator, compare=True):
        timing = common.measure(lambda: simulator(dry, generator=generator), device, args.seconds)
        return common.row(name, batch, timing, batch * common.CLIP_S,
                          (lambda: error(simulator)) if compare else None, device, compiled=compile)

    return [row("endless rooms", endless),
            row("endless rooms, sensor and diffuse noise", noisy, compare=False),
            row("bank of rooms", bank)]


@torch.no_grad()
def row_of_array(array: str, batch: int, device: torch.device, args) -> dict[str, Any]:
    """Endless rooms with `array` microphones x sources, a name such as 2x4, eager: to be compared with 2x2."""
    mics, srcs = map(int, array.split("x"))
    generator, dry = common.generator(device), common.noise(batch, srcs, SAMPLES, device)
    simulator = Simulator(SceneConfig(num_mics=mics, num_src=srcs), RIR)
    timing = common.measure(lambda: simulator(dry, generator=generator), device, args.seconds)
    return common.row(f"endless rooms, {array}", batch, timing, batch * common.CLIP_S, None, device, compiled=False)


def array_name(text: str) -> str:
    """Microphones x sources from the command line."""
    if re.fullmatch(r"[1-9]\d?x[1-9]\d?", text) is None:
        raise argparse.ArgumentTypeError(f"must be MICROPHONESxSOURCES, for example 2x4, got {text!r}")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("bench_simulate", __doc__)
    common.add_batch(parser, "16 and 64 on a CPU, 64, 512 and 2048 on a GPU")
    parser.add_argument("--arrays", type=array_name, nargs="+", default=[], metavar="MxS",
                        help="endless rooms with so many microphones and sources, too, for example 2x4 4x4")
    parser.add_argument("--array-batch", type=common.positive, metavar="N",
                        help="scenes per call of these (default: the largest batch)")
    args = parser.parse_args(arguments)
    device = common.start(args)
    batches = sorted(args.batch or ([16, 64] if device.type == "cpu" else [64, 512, 2048]))
    rows = [row for batch, compile in product(batches, common.CHOICES[args.compile])
            for row in rows_of(batch, compile, device, args)]
    rows += [row_of_array(array, args.array_batch or batches[-1], device, args) for array in args.arrays]
    common.finish("bench_simulate", device, rows, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
