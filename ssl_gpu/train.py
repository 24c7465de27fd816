"""Train a localiser in rooms that never existed before: python -m ssl_gpu.train CONFIG [section.key=value ...]."""
from __future__ import annotations

import argparse
import contextlib
import math
import shlex
import signal
import sys
import time
from dataclasses import replace
from typing import Any, Callable, Sequence

if __name__ == "__main__":
    from ssl_gpu.commandline import begin_command
    begin_command()                                                    # before torch is loaded

import torch

from ssl_gpu import rng, runtime
from ssl_gpu.checkpoint import CheckpointError, clear_unfinished, holding, write_json
from ssl_gpu.commandline import Parser, end_with, told, uninterrupted
from ssl_gpu.config import load_first, save_yaml
from ssl_gpu.lanes import Lanes, ThreadTuner, separable, slices
from ssl_gpu.mixture import MixtureBatch
from ssl_gpu.optim import learning_rate, noise_share, rate_on_device
from ssl_gpu.report import metrics_cell, result_table
from ssl_gpu.run import (Run, check_steps_left, claim_folder, elapsed_s, evaluate_now, prepare, save, setup,
                         told_finished, told_overlooked)
from ssl_gpu.simulator import Draw
from ssl_gpu.speech import draw_crops, gather_crops
from ssl_gpu.trainlog import Log


STREAMS = (rng.Stream.SPEECH, rng.Stream.SCENE)  # that the examples of a step are drawn from
EVALUATING = 0.1  # of a run's minutes at most, but for the evaluation at its end


def draw_examples(run: Run, step: int) -> tuple[torch.Tensor, Draw]:
    """Dry speech [batch, src, sample] and all that is random of the mixtures of one step: other talkers, crops, rooms,
    images and noise than at any other step."""
    generators = [rng.generator(run.cfg.train.seed, rng.Split.TRAIN, stream, step, device=device)
                  for stream, device in zip(STREAMS, (run.speech.samples.device, run.device))]
    return draw_from(run, *generators, noise_at(run, step))


def draw_from(run: Run, crop_generator: torch.Generator, scene_generator: torch.Generator,
              noise: float | torch.Tensor) -> tuple[torch.Tensor, Draw]:
    """The same from generators of STREAMS; noise: the factor of mixture.noise_probability."""
    cfg, bank = run.cfg, run.speech
    num_samples = round(cfg.speech.clip_s * cfg.rir.sample_rate)
    crops = draw_crops(bank, cfg.train.batch_size, cfg.scene.num_src, num_samples, cfg.speech.crop,
                       generator=crop_generator)
    dry = gather_crops(bank, crops, num_samples)
    return dry, run.simulator.draw(*dry.shape[::2], generator=scene_generator, noise_share=noise)


def noise_at(run: Run, step: int) -> float:
    """Factor of mixture.noise_probability at a step."""
    # Of a run counted in steps, so that a batch made ahead is the one that a resumed run makes; in one of so many
    # minutes it is the share when the batch is drawn.
    train = run.cfg.train
    return noise_share(train, run.share if train.max_minutes is not None else (step - run.first) / train.steps)


def draw_batch(run: Run, step: int) -> MixtureBatch:
    """The mixtures of one step."""
    return render(run, *draw_examples(run, step))


def render(run: Run, dry: torch.Tensor, draw: Draw) -> MixtureBatch:
    """The mixtures of a draw, with the direct sound in them where masks are learned from it."""
    mixture = run.simulator.render(dry, draw)
    return replace(mixture, direct=run.simulator.render_direct(dry, draw)) if run.localizer.masks else mixture


def timed_batches(run: Run, timer: runtime.StepTimer) -> runtime.Ahead:
    """The mixtures of step after step. The timer's section "simulate" is their simulation, wherever it runs."""
    def simulate(step: int) -> MixtureBatch:
        with timer.section("simulate"):
            return draw_batch(run, step)

    return runtime.Ahead(simulate, run.device, run.cfg.train.overlap)


def timed_draws(run: Run, timer: runtime.StepTimer, lanes: Lanes) -> runtime.Ahead:
    """What in_lanes draws for step after step, in one lane, since the draws of a batch are one sequence: beside the
    optimiser's update of the step before, which leaves the other lanes idle, unless train.overlap is false."""
    def draw(step: int) -> tuple[torch.Tensor, Draw]:
        with timer.section("simulate"):
            return draw_examples(run, step)

    overlap = run.cfg.train.overlap is not False and run.device.type == "cpu"
    return runtime.Ahead(draw, run.device, overlap, lanes.beside)


def in_lanes(run: Run, lanes: Lanes, draws: runtime.Ahead, timer: runtime.StepTimer,
             count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of one step and which of its scenes are valid; gradients are in place. The batch goes through
    simulation and network in `count` parts side by side, the first of which is timed; the next batch is being drawn by
    then."""
    run.optimizer.zero_grad(set_to_none=True)
    dry, draw = draws.take(run.step)

    def maker(index: int, part: slice) -> Callable[[], MixtureBatch]:
        def make() -> MixtureBatch:
            with timer.section("simulate") if index == 0 else contextlib.nullcontext():
                return render(run, dry[part], draw[part])
        return make

    parts, valid = slices(len(dry), count), draw.scenes.valid
    losses = lanes.gradients([maker(*pair) for pair in enumerate(parts)], [valid[part] for part in parts])
    draws.prefetch()
    return losses, valid


def gradients(run: Run, network: torch.nn.Module, mixture: MixtureBatch,
              section: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext) -> torch.Tensor:
    """The losses of a batch, [loss], without their autograd graph; gradients are in place. section:
    StepTimer's, of both halves."""
    with section("forward"):
        run.optimizer.zero_grad(set_to_none=True)
        with runtime.autocast(run.device, run.bfloat16):
            heard = network(mixture.audio)
        losses = run.localizer.training_losses(heard, mixture)
    with section("backward"):
        losses.sum().backward()
    return losses.detach()


def update(run: Run, average: torch.Tensor | None = None) -> None:
    """Weights and averaged weights one step on, by the gradients; average: the weight of optim.Averaged.update."""
    mirror = run.localizer.mirror
    if mirror is not None:
        mirror.keep([weight.grad for weight in mirror.of(run.localizer.network)])
    if run.cfg.train.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(run.localizer.parameters(), run.cfg.train.clip_norm)
    run.optimizer.step()
    if mirror is not None:
        mirror.keep(mirror.of(run.localizer.network))
    if run.averaged is not None:
        run.averaged.update(run.localizer, average)


class CapturedStep:
    """A whole step, from the draws to the averaged weights, that a GPU repeats as one CUDA graph (runtime.Graphed).

    With the main recipe and 128 mixtures it is some 1,300 kernels, 12 to 16 ms of an H200, where a slow CPU takes 40 to
    110 ms to launch them one by one. Draws are those of draw_examples. What differs from step to step is written to the
    device beforehand: seeds, learning rate, noise share and the weight of averaging. invalid: counts the scenes that
    broke their law.
    """

    def __init__(self, run: Run, network: torch.nn.Module, invalid: torch.Tensor):
        self.run, self.network, self.invalid = run, network, invalid
        self.generators = [torch.Generator(run.device) for _ in STREAMS]
        self.rate = rate_on_device(run.optimizer, run.device)
        self.noise = torch.ones((), dtype=torch.float64, device=run.device)
        self.average = torch.ones((), device=run.device)
        self.graphed = runtime.Graphed(self.step, run.device, self.generators)

    def take(self, step: int, rate: float) -> torch.Tensor:
        """That step at that learning rate; its losses, [loss], which the next step overwrites."""
        for generator, stream in zip(self.generators, STREAMS):
            generator.manual_seed(rng.seed_of(self.run.cfg.train.seed, rng.Split.TRAIN, stream, step))
        self.rate.fill_(rate)
        self.noise.fill_(noise_at(self.run, step))
        if self.run.averaged is not None:
            self.average.fill_(self.run.averaged.next_weight())
        try:
            return self.graphed()
        except runtime.CaptureError as error:
            raise runtime.CaptureError(f"{error}; train.graph=false does without") from error

    def mixtures(self) -> MixtureBatch:
        """Those of a step, by the generators as they are."""
        return render(self.run, *draw_from(self.run, *self.generators, self.noise))

    def step(self) -> torch.Tensor:
        """What is captured."""
        mixture = self.mixtures()
        losses = gradients(self.run, self.network, mixture)
        update(self.run, self.average)
        self.invalid.add_((~mixture.scenes.valid).sum())
        return losses


def progress(run: Run, step: int, began: tuple[float, float]) -> float:
    """Share of the run that is over, 1 when it is time to end: by train.steps, by train.max_minutes less what the
    end takes, or by whichever comes first. began: share and elapsed seconds at the first step of this process, so
    that the schedule starts at its start, and a resumed one where it was; where steps are compiled or captured, at
    the first one after that. (When it counted, in a run of five minutes a third of the schedule was over by step
    100, warm-up and all.)"""
    train, (share, started_s) = run.cfg.train, began
    by_step = 0.0 if train.steps is None else (step - run.first) / train.steps
    if train.max_minutes is None:
        return by_step
    left_s = max(60 * train.max_minutes - end_s(run) - started_s, 1e-3)
    return max(by_step, share + (1 - share) * (elapsed_s(run) - started_s) / left_s)


def end_s(run: Run) -> float:
    """Seconds of train.max_minutes kept for the step under way, the last evaluation and the checkpoint: twice the
    measured times, as machines are shared, and 100 MB/s for weights, averages and two moments."""
    return 2 * (run.eval_s + run.step_s) + 16e-8 * sum(p.numel() for p in run.localizer.parameters()) + 2


def evaluations_in(run: Run) -> int:
    """How often a run is evaluated: train.evaluations, or as often as those on the way take a tenth of
    train.max_minutes, by the time of one in this part of the run. (Once four of them and the preparation left time
    for only 36 steps of a run of ten minutes.)"""
    train = run.cfg.train
    if train.max_minutes is None:
        return train.evaluations
    return min(train.evaluations, 1 + math.floor(EVALUATING * 60 * train.max_minutes / max(run.eval_s, 1e-3)))


def short_of_time(run: Run, evaluations: int, steps: int, ready_s: float, step_s: float) -> str | None:
    """A line where less than half of what train.max_minutes left to this process is for its steps, and that ends the
    run before train.steps. evaluations: of the run; steps: done by this process; ready_s: elapsed at the end of its
    first; step_s: of its last."""
    train = run.cfg.train
    if train.max_minutes is None:
        return None
    budget_s, took_s = 60 * train.max_minutes - run.elapsed_s, ready_s - run.elapsed_s
    over, left_s = run.share >= 1, 60 * train.max_minutes - elapsed_s(run) - end_s(run)
    on_the_way = evaluations - 1 - math.floor(run.share * evaluations)  # but the last, which end_s has
    count = steps if over else steps + max(1, round((left_s - on_the_way * run.eval_s) / step_s))
    enough = train.steps is not None and run.step - run.first + count - steps >= train.steps
    if enough or took_s + end_s(run) <= 0.5 * budget_s:
        return None
    return (f"preparation and the first step took {took_s / 60:.2f} of the {max(budget_s, 0) / 60:.2f} min left in "
            f"train.max_minutes, the end {'took' if over else 'takes'} up to {end_s(run) / 60:.2f}: there "
            f"{'was time for only' if over else 'is time for about'} {count} step{'s' * (count > 1)}")


def train(run: Run, log: Log) -> int:
    """Train until the run is over or interrupted; returns the steps done. Everything is in the order it happens."""
    cfg = run.cfg.train
    network = runtime.compiled(run.localizer, cfg.compile)
    timer = runtime.StepTimer(run.device)
    lanes = Lanes(network, run.localizer.training_losses, run.bfloat16)
    tuner = ThreadTuner(run.device, enabled=cfg.max_minutes is not None,
                        most_lanes=cfg.batch_size if separable(network) else 1, fixed=cfg.lanes)
    batches, draws = timed_batches(run, timer), timed_draws(run, timer, lanes)
    step, began, saved = run.step, (run.share, elapsed_s(run)), time.monotonic()
    begun, ready_s = step, 0.0
    share = progress(run, step, began)
    run.invalid = invalid = torch.tensor(int(run.invalid), dtype=torch.int64, device=run.device)
    captured = CapturedStep(run, network, invalid) if run.graph else None
    # The first step that tells how long they take: kernels are compiled in the first, some are plain before one is
    # captured, which takes its time, too, and those after it are only queued, AHEAD of them at a time.
    usual = runtime.Graphed.WARM_UP + runtime.Graphed.AHEAD + 2 if run.graph else 2
    compiles = cfg.compile or run.graph
    if (evaluations := evaluations_in(run)) < cfg.evaluations:
        log.say(f"an evaluation takes {run.eval_s:.1f} s: there will be {evaluations} instead of train.evaluations="
                f"{cfg.evaluations}, the last one at the end")
    run.localizer.train()
    while share < 1:
        if run.cfg.model.dropout > 0:   # whose masks are of torch's own generators, in lanes of one for all of them
            torch.manual_seed(rng.seed_of(cfg.seed, rng.Split.TRAIN, rng.Stream.DROPOUT, step))
        step_began, rate = time.perf_counter(), learning_rate(cfg, step - run.first, share)
        if captured is None:
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            if tuner.lanes > 1:
                losses, valid = in_lanes(run, lanes, draws, timer, tuner.lanes)
            else:
                mixture = batches.take(step)
                losses, valid = gradients(run, network, mixture), mixture.scenes.valid
                batches.prefetch()                                     # behind what this step has queued
        with uninterrupted():                                          # or a checkpoint would have half of a step, or
            if captured is not None:                                   # a whole one that it does not count
                losses = captured.take(step, rate)
            else:
                update(run)
                invalid += (~valid).sum()
            step += 1
            run.step, run.examples = step, run.examples + cfg.batch_size
        timer.step()
        tuner.step()
        last_s = time.perf_counter() - step_began
        if step > begun + usual - 1 or not compiles:
            run.step_s = max(last_s, 0.9 * run.step_s)
        share = progress(run, step, began)
        if compiles and step < begun + usual and share < 1:            # which is no part of the schedule: see progress
            began = (began[0], elapsed_s(run))
            share = progress(run, step, began)
        run.share = share
        if step == begun + 1:
            ready_s = elapsed_s(run)                                   # with the compilation, where there is one
        if step == begun + usual or (step < begun + usual and share >= 1):
            if (short := short_of_time(run, evaluations, step - begun, ready_s, last_s)) is not None:
                log.warn(short)
        if step % cfg.log_every == 0 or share >= 1:
            log_step(run, log, step, share, rate, losses, invalid, timer.read())
        # An interruption may have come in between, hence not by the share before this step.
        if share < 1 and math.floor(share * evaluations) > math.floor(run.evaluated * evaluations):
            log_evaluation(run, log, step, share)
            run.evaluated = share
            log.skip(progress(run, step, began))
            timer.restart()
            tuner.restart()
        if time.monotonic() - saved > 60 * cfg.checkpoint_minutes:
            check_losses(losses, step)                                 # or a good checkpoint would be overwritten
            try:
                save(run, step)
            except CheckpointError as error:
                log.warn(f"{error}; the next one is due in {cfg.checkpoint_minutes:g} min")
            saved = time.monotonic()
            timer.restart()
            tuner.restart()
    return step


def check_losses(losses: torch.Tensor, step: int) -> list[float]:
    """The losses as numbers. Raises FloatingPointError when their sum is not finite."""
    values = losses.tolist()
    if not math.isfinite(sum(values)):
        raise FloatingPointError(f"the loss is {sum(values)} at step {step}: lower train.lr or set train.clip_norm")
    return values


def log_step(run: Run, log: Log, step: int, share: float, rate: float, losses: torch.Tensor, invalid: torch.Tensor,
             times: runtime.StepTimes) -> None:
    """One line of metrics.jsonl and the numbers behind the progress bar. Reading the losses is the interval's one sync:
    what is told is their sum and, where there are masks, theirs. Of steps that are a CUDA graph, in which there are no
    marks for a timer, no simulate_share is told.

    Raises FloatingPointError when the loss is not finite any more.
    """
    values = check_losses(losses, step)
    speed, simulate = run.cfg.train.batch_size / times.step_s, times.share.get("simulate", 0.0)
    log.write({"step": step, "loss": sum(values), **({"mask_loss": values[1]} if len(values) > 1 else {}), "lr": rate,
               "examples_per_s": speed, **({} if run.graph else {"simulate_share": simulate}),
               "invalid_scenes": int(invalid), "elapsed_s": elapsed_s(run)}, share)
    log.show(f"step {step}, loss {sum(values):.3f}, {speed:.0f} examples/s"
             + ("" if run.graph else f", {100 * simulate:.0f} % simulating"))


def log_evaluation(run: Run, log: Log, step: int, share: float) -> dict[str, Any]:
    """Evaluate, and write it to metrics.jsonl and above the progress bar."""
    metrics = evaluate_now(run)
    flat = {f"eval/{name}": value for name, value in metrics.items()}
    for name, value in metrics.items():
        if isinstance(value, list):
            flat[f"eval/{name}/mean"] = sum(value) / len(value)
    log.write({"step": step, **flat, "elapsed_s": elapsed_s(run)}, share)
    log.say(f"step {step}: azimuth class MAE {metrics_cell(metrics['azimuth_class_mae_deg'])}, "
            f"cone MAE {metrics_cell(metrics['cone_mae_deg'])} deg")
    return metrics


def precision_name(run: Run) -> str:
    """What train.precision has come to, in a word."""
    return "bfloat16" if run.bfloat16 else "float32"


def finish(run: Run, log: Log, step: int) -> dict[str, Any]:
    """The last evaluation, the last checkpoint, result.json."""
    metrics = log_evaluation(run, log, step, 1.0)
    save(run, step)
    parameters = sum(p.numel() for p in run.localizer.parameters())
    result = {**metrics, **run.fixed, "target": run.cfg.target.angle.value, "steps": step,
              "examples": run.examples, "steps_before": run.first, "examples_before": run.first_examples,
              "parameters": parameters,
              "precision": precision_name(run), "device": runtime.device_name(run.device),
              "versions": runtime.versions(), "command": run.command,
              "minutes": round(elapsed_s(run) / 60, 3)}
    write_json(run.out / "result.json", result)
    return result


def begin(args: argparse.Namespace, held: contextlib.ExitStack) -> Run | None:
    """The run that the command line asks for, its folder made and held; None where it is finished, which is told.
    Raises ValueError, OSError or FloatingPointError with a line for the user."""
    file = load_first(args.config)                                     # once: it may change while speech is decoded
    cfg, out, resumed = setup(args, held, file)
    finished = None if resumed is None else told_finished(cfg, out, resumed)
    overlooked = None if resumed is None else told_overlooked(args, file, cfg, resumed, finished is not None)
    if overlooked is not None:
        print(overlooked, file=sys.stderr)
    if finished is not None:
        print(finished)
        return None
    if resumed is not None:
        check_steps_left(cfg.train, resumed)
    run = prepare(cfg, out, resumed)
    if resumed is None:
        run.file = file
        try:
            claim_folder(run)
        except OSError as error:
            raise ValueError(f"train.out must be a folder that can be made, got {run.out}: {error.strerror}") from error
        held.enter_context(holding(run.out))
    else:
        clear_unfinished(run.out / "checkpoint.pt")
    save_yaml(run.out / "config.yaml", run.cfg)
    return run


def outcome(run: Run, log: Log, args: argparse.Namespace) -> tuple[dict[str, Any] | None, str, int]:
    """Trains to the end: the result, or a line that says what came in between; and the exit status."""
    try:
        with runtime.cpu_threads(run.threads):                          # and again behind it, whatever steps had
            steps = train(run, log)
        return finish(run, log, steps), "", 0
    except KeyboardInterrupt:
        return None, *interrupted(run, args)
    except (FloatingPointError, CheckpointError, OSError) as error:
        return None, f"error: {error}", 1
    except (MemoryError, RuntimeError) as error:
        if runtime.is_out_of_memory(error):
            return None, (f"error: out of memory with train.batch_size={run.cfg.train.batch_size}; lower it, or "
                          f"simulator.chunk"), 1
        if isinstance(error, runtime.CaptureError):
            return None, f"error: {error}", 1
        raise                                                          # a bug of ours, with its traceback


def interrupted(run: Run, args: argparse.Namespace) -> tuple[str, int]:
    """Saves the run; what to say, and the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)                          # a second Ctrl-C would cost the checkpoint
    try:
        save(run, run.step)
    except (CheckpointError, FloatingPointError) as error:
        return f"error: interrupted at step {run.step}, which is not saved: {error}", 1
    overrides = [o for o in args.overrides if not o.startswith("train.out=")]
    command = shlex.join([args.config, *overrides, f"train.out={run.out}", "--resume"])
    return f"interrupted at step {run.step}; go on with: python -m ssl_gpu.train {command}", 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m ssl_gpu.train", description=__doc__)
    parser.add_argument("config", help="a YAML file, for example configs/quickstart.yaml")
    parser.add_overrides("for example speech.train=DIR speech.eval=OTHER_DIR train.max_minutes=20")
    parser.add_argument("--resume", action="store_true",
                        help="go on from the checkpoint in train.out, or in the newest run of this configuration, with "
                             "the settings that it holds, which overrides alone change")
    args = parser.parse_intermixed_args(arguments)
    command = told("ssl_gpu.train", sys.argv[1:] if arguments is None else arguments)
    with contextlib.ExitStack() as held:
        try:
            run = begin(args, held)
            if run is None:
                return 0
            run.command = command
        except (ValueError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (MemoryError, RuntimeError) as error:
            if not runtime.is_out_of_memory(error):
                raise
            print("error: out of memory before the first step; lower eval.num_clips, speech.clip_s or scene.bank",
                  file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted before the first step", file=sys.stderr)
            return 130
        signal.signal(signal.SIGTERM, runtime.interrupt)
        try:
            print(headline(run))
            log = Log(run.out, run.share, run.step)                    # which imports TensorBoard, and takes its time
            (run.out / "result.json").unlink(missing_ok=True)          # of a resumed run: it will be another one
        except OSError as error:
            print(f"error: cannot write to {run.out}: {error.strerror}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            problem, status = interrupted(run, args)
            print(problem, file=sys.stderr)
            return status
        try:
            result, problem, status = outcome(run, log, args)
        finally:
            log.close()                                                # the bar is drawn once more, then the line
    if status:
        print(problem, file=sys.stderr)
        return status
    print(result_table(result))
    done = result["steps"] - run.first
    print(f"{done} step{'s' * (done != 1)}, {result['examples'] - run.first_examples} examples in "
          f"{result['minutes']:.1f} min; {run.out}/result.json")
    return 0


def headline(run: Run) -> str:
    """What is trained, where, on what."""
    return (f"{run.out}: {run.cfg.model.kind.value} model, "
            f"{sum(p.numel() for p in run.localizer.parameters()) / 1e6:.2f} M parameters, on "
            f"{runtime.device_name(run.device)} in {precision_name(run)}; {run.speech.num_speakers} "
            f"{'synthetic ' if run.cfg.speech.train is None else ''}talkers, "
            f"{run.speech.duration_s / 3600:.2f} h of speech"
            + (f"; its steps count on from the {run.first} of train.init={run.cfg.train.init}" if run.first else "")
            + (f"; it goes on from step {run.step} with {run.settings}" if run.step > run.first else ""))


if __name__ == "__main__":
    end_with(main)
