"""Whole mixtures, as a training step asks for them: endless rooms, with noise, and from a bank of rooms."""
from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks import common
from ssl_gpu.mixture import MixtureConfig
from ssl_gpu.rir import RirConfig
from ssl_gpu.scene import SceneConfig
from ssl_gpu.simulator import Simulator

BANK = 64  # rooms; the time of a call does not depend on how many there are
NOISY = MixtureConfig(sensor_snr_db=(10.0, 30.0), diffuse_snr_db=(10.0, 30.0))


@torch.no_grad()
def rows_of(batch: int, device: torch.device, args) -> list[dict[str, Any]]:
    """The rows of one batch size."""
    rir, generator = replace(RirConfig(), early=False), common.generator(device)
    samples = round(common.CLIP_S * rir.sample_rate)
    dry = common.noise(batch, 2, samples, device)
    endless, noisy = Simulator(rir=rir), Simulator(rir=rir, mixture=NOISY)
    bank = Simulator(replace(SceneConfig(), bank=BANK), rir)
    bank.fill_bank(generator=generator)

    def error(simulator):
        """Against direct convolution in float64, of a bank's own RIRs or of those of the oracle."""
        few = min(args.check, batch)
        draw = simulator.draw(few, samples, generator=common.generator(device, 2))
        audio, errors = simulator.render(dry[:few], draw).audio, []
        for i in range(few):
            rirs = simulator.bank[1].full[draw.bank_row[i]] if simulator.bank is not None else \
                common.oracle_rir(draw.scenes, draw.rooms.images, i, rir.sample_rate)
            errors.append(common.relative_l2(audio[i], common.oracle_mixture(dry[i], rirs)))
        return max(errors, default=None)

    def row(name, simulator, compare=True):
        timing = common.measure(lambda: simulator(dry, generator=generator), device, args.seconds)
        return common.row(name, batch, timing, batch * common.CLIP_S,
                          (lambda: error(simulator)) if compare else None, device)

    return [row("endless rooms", endless),
            row("endless rooms, sensor and diffuse noise", noisy, compare=False),
            row("bank of rooms", bank)]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("bench_simulate", __doc__)
    common.add_batch(parser, "16 and 64 on a CPU, 64, 512 and 2048 on a GPU")
    args = parser.parse_args(arguments)
    device = common.start(args)
    batches = sorted(args.batch or ([16, 64] if device.type == "cpu" else [64, 512, 2048]))
    rows = [row for batch in batches for row in rows_of(batch, device, args)]
    common.finish("bench_simulate", device, rows, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
