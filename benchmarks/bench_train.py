"""Training steps of the networks of configs/ in endless rooms: how long, and the share of simulation in it.

The shares are measured by ssl_gpu.runtime.StepTimer: by events on a GPU, which does not wait for them.
"""
from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from ssl_gpu import runtime
from ssl_gpu.config import RunConfig, load_config
from ssl_gpu.optim import Averaged, Precision, build_optimizer
from ssl_gpu.pretrained import build_localizer
from ssl_gpu.simulator import Simulator
from ssl_gpu.train import Run, draw_batch, training_speech

# Few voices, for they take time to make; endless rooms for both networks, where original.yaml has a bank of 3,000.
OVERRIDES = ("speech.voices_speakers=4", "speech.voices_utterances=1", "scene.bank=null", "rir.early=false")
BATCH_ON_CPU = {"librispeech": None, "original": 2}  # the original's 57 M parameters want a GPU; None: as configured
BURN_IN = 3  # steps; compilation is in the first
BFLOAT16 = {Precision.AUTO: None, Precision.FLOAT32: False, Precision.BFLOAT16: True}


def prepare(name: str, batch: int | None, device: torch.device, overrides: Sequence[str]) -> Run:
    """A run of configs/<name>.yaml without an evaluation set, on noise-free synthetic voices."""
    batch_size = [] if batch is None else [f"train.batch_size={batch}"]
    cfg = load_config(RunConfig, common.ROOT / "configs" / f"{name}.yaml", [*OVERRIDES, *batch_size, *overrides])
    localizer = build_localizer(cfg).to(device).train()
    averaged = None if cfg.train.ema is None else Averaged(localizer, cfg.train.ema)
    return Run(cfg, Path(), device, training_speech(cfg, device),
               Simulator(cfg.scene, cfg.rir, cfg.mixture, cfg.simulator, cfg.ism), None, {}, localizer, averaged,
               build_optimizer(cfg.train, localizer))


def time_steps(run: Run, network: torch.nn.Module, timer: runtime.StepTimer, count: int) -> None:
    """`count` steps, those of ssl_gpu.train.train, with marks for the timer between the parts."""
    cfg = run.cfg.train
    for _ in range(count):
        with timer.section("simulate"):
            mixture = draw_batch(run, run.step)
        with timer.section("forward"):
            with runtime.autocast(run.device, BFLOAT16[cfg.precision]):
                logits = network(mixture.audio)
            loss = run.localizer.loss(logits, mixture.scenes)
        with timer.section("backward"):
            run.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        with timer.section("update"):
            if cfg.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(run.localizer.parameters(), cfg.clip_norm)
            run.optimizer.step()
            if run.averaged is not None:
                run.averaged.update(run.localizer)
        run.step += 1
        timer.step()


def row_of(name: str, batch: int | None, compile: bool, device: torch.device, seconds: float, every: int,
           overrides: Sequence[str] = ()) -> dict[str, Any]:
    """One network, eager or compiled: `every` steps from one reading of the timer to the next."""
    run = prepare(name, batch, device, overrides)
    network = runtime.compiled(run.localizer, compile)
    timer = runtime.StepTimer(device)
    time_steps(run, network, timer, BURN_IN)
    timer.read()
    readings, spent = [], 0.0
    while len(readings) < common.LEAST_CALLS or spent < seconds:
        time_steps(run, network, timer, every)
        readings.append(timer.read())
        spent += every * readings[-1].step_s
    share = {key: sum(r.share[key] for r in readings) / len(readings) for key in readings[0].share}
    cfg, bfloat16 = run.cfg, BFLOAT16[run.cfg.train.precision]
    return common.row(name, cfg.train.batch_size, common.Timing.of([r.step_s for r in readings]),
                      cfg.train.batch_size * cfg.speech.clip_s, None, device, compiled=compile, share=share,
                      parameters=sum(p.numel() for p in run.localizer.parameters()),
                      bfloat16=runtime.has_bfloat16(device) if bfloat16 is None else bfloat16)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.parser("bench_train", __doc__, seconds=10.0)
    parser.add_argument("--model", nargs="+", choices=BATCH_ON_CPU, metavar="NAME",
                        help="librispeech, original: the files in configs/ (default: both, on a CPU librispeech only)")
    parser.add_argument("--batch", type=common.positive, metavar="N",
                        help="mixtures per step (default: the configuration's, and 2 for original on a CPU)")
    parser.add_argument("--compile", choices=("no", "yes", "both"), default="both", help="torch.compile the network")
    parser.add_argument("--every", type=common.positive, metavar="N",
                        help="steps between two readings of the timer (default 1 on a CPU, 10 on a GPU)")
    args = parser.parse_args(arguments)
    device = common.start(args)
    on_cpu = device.type == "cpu"
    rows = []
    for name in args.model or (["librispeech"] if on_cpu else list(BATCH_ON_CPU)):
        batch = args.batch or (BATCH_ON_CPU[name] if on_cpu else None)
        for compile in {"no": (False,), "yes": (True,), "both": (False, True)}[args.compile]:
            rows.append(row_of(name, batch, compile, device, args.seconds, args.every or (1 if on_cpu else 10)))
    common.finish("bench_train", device, rows, arguments, args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
