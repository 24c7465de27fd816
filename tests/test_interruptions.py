"""What a run leaves behind, and how it goes on, where something stops it or stands in its way."""
import json
import os
import re
import signal
from contextlib import ExitStack
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from test_train import TINY

from ssl_gpu import checkpoint, runtime, trainlog
from ssl_gpu import run as run_setup
from ssl_gpu import train as train_cli
from ssl_gpu.checkpoint import Checkpoint, CheckpointError, clear_unfinished, holding, load_checkpoint, write_text
from ssl_gpu.config import load_first
from ssl_gpu.optim import TrainConfig

needs_locks = pytest.mark.skipif(checkpoint.fcntl is None, reason="has no locks of folders")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A configuration of seconds, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    smaller = TINY.replace("num_clips: 16", "num_clips: 2").replace("clip_s: 1.0", "clip_s: 0.3")
    (tmp_path / "tiny.yaml").write_text(smaller)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in before.items():                              # an interrupted run ignores both
        signal.signal(number, handler)


def start(*arguments):
    return train_cli.main(["tiny.yaml", *arguments])


def errors(capsys):
    return [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if line.startswith(("error: ", "warning: "))]


def logged(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def interrupt_after(steps, monkeypatch):
    """Ctrl-C while the step after that many is being done."""
    update = train_cli.update

    def interrupting(run, *args):
        if run.step == steps:
            raise KeyboardInterrupt
        update(run, *args)

    monkeypatch.setattr(train_cli, "update", interrupting)


def test_an_interrupted_run_goes_on_as_if_it_were_not(tiny, monkeypatch, capsys):
    """Schedule, averages, dropout and draws: six steps of a cosine, interrupted after three, are the six at once."""
    common = ("train.steps=6", "train.warmup=0.2", "train.evaluations=1", "model.dropout=0.3", "train.noise_warmup=0.5",
              "mixture.diffuse_snr_db=[0, 10]")
    assert start("train.out=whole", *common) == 0
    with monkeypatch.context() as patch:
        interrupt_after(3, patch)
        assert start("train.out=half", *common) == 130
    assert "go on with: python -m ssl_gpu.train tiny.yaml" in capsys.readouterr().err
    torch.manual_seed(1234)                                             # whatever another process has drawn by then
    assert start("train.out=half", *common, "--resume") == 0
    whole, half = (load_checkpoint(tiny / name / "checkpoint.pt") for name in ("whole", "half"))
    rates = [[line["lr"] for line in logged(tiny / name) if "lr" in line] for name in ("whole", "half")]
    assert rates[0] == pytest.approx(rates[1]) and len(set(rates[0])) > 3
    for part in ("model", "ema"):
        for key, value in getattr(whole, part).items():
            torch.testing.assert_close(getattr(half, part)[key], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_update_waits_for_its_end(number, tiny, monkeypatch):
    """Weights, moments and averages are ahead by then of the step that a checkpoint would be of."""
    signal.signal(number, runtime.interrupt)                            # in the background Ctrl-C may be ignored
    common = ("train.steps=4", "train.evaluations=1")
    assert start("train.out=whole", *common) == 0
    update = train_cli.update

    def signalled(run, *args):
        update(run, *args)
        if run.step == 2:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(train_cli, "update", signalled)
        assert start("train.out=half", *common) == 130
    assert load_checkpoint(tiny / "half" / "checkpoint.pt").step == 3
    assert start("train.out=half", *common, "--resume") == 0
    whole, half = (load_checkpoint(tiny / name / "checkpoint.pt") for name in ("whole", "half"))
    for part in ("model", "ema"):
        for key, value in getattr(whole, part).items():
            torch.testing.assert_close(getattr(half, part)[key], value, rtol=0, atol=1e-6)


def test_an_evaluation_that_was_interrupted_is_made_up(tiny, monkeypatch):
    """And what counts on from step to step does so."""
    common = ("train.out=run", "train.steps=4", "train.evaluations=2", "train.log_every=1")
    evaluate = train_cli.evaluate_now

    def once(run):
        monkeypatch.setattr(train_cli, "evaluate_now", evaluate)
        run.invalid += 5                                                # scenes, as if
        raise KeyboardInterrupt

    monkeypatch.setattr(train_cli, "evaluate_now", once)
    assert start(*common) == 130
    assert start(*common, "--resume") == 0
    lines = logged(tiny / "run")
    assert [line["step"] for line in lines if "eval/acc_at_10" in line] == [3, 4]
    assert [line["invalid_scenes"] for line in lines if "loss" in line] == [0, 0, 5, 5]
    assert start("train.out=run", "train.steps=8", "train.evaluations=2", "--resume") == 0  # at half of it already
    assert [line["step"] for line in logged(tiny / "run") if "eval/acc_at_10" in line] == [3, 4, 8]


def test_dropout_follows_the_seed(tiny):
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(losses))
        assert start(f"train.out={name}", "train.steps=1", "model.dropout=0.5", f"train.seed={seed}") == 0
        losses.append(logged(tiny / name)[0]["loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("failure, told", [
    (CheckpointError("cannot write run/checkpoint.pt: No space left on device"), "No space left on device"),
    (None, "the weights are not finite at step 2: lower train.lr or set train.clip_norm")])
def test_an_interrupted_run_that_cannot_be_saved_says_so_in_one_line(failure, told, tiny, monkeypatch, capsys):
    def spoil(run, step):
        if failure is not None:
            raise failure
        next(run.localizer.parameters()).data.view(-1)[0] = float("nan")
        run_setup.save(run, step)

    interrupt_after(2, monkeypatch)
    monkeypatch.setattr(train_cli, "save", spoil)
    assert start("train.out=run") == 1
    assert errors(capsys) == [f"error: interrupted at step 2, which is not saved: {failure or told}"]
    assert not (tiny / "run" / "checkpoint.pt").exists()


def test_checkpoints_in_between_are_saved_and_a_failure_is_only_told(tiny, monkeypatch, capsys):
    saved, save = [], train_cli.save

    def failing_once(run, step):
        saved.append(step)
        if step == 2:
            raise CheckpointError("cannot write run/checkpoint.pt: No space left on device")
        save(run, step)

    monkeypatch.setattr(train_cli, "save", failing_once)
    assert start("train.out=run", "train.checkpoint_minutes=1e-9") == 0
    assert saved == [1, 2, 3, 4, 4] and load_checkpoint(tiny / "run" / "checkpoint.pt").step == 4
    assert errors(capsys) == ["warning: cannot write run/checkpoint.pt: No space left on device; the next one is due "
                              "in 1e-09 min"]


def test_a_resumed_run_does_not_log_steps_twice(tiny):
    """A run that was killed has logged steps behind its last checkpoint, the last line perhaps in part."""
    assert start("train.out=run", "train.steps=2") == 0
    with open(tiny / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    (tiny / "run" / ".checkpoint.pt.0123abcd.tmp").write_bytes(b"half")
    assert start("train.out=run", "train.steps=4", "--resume") == 0
    assert [line["step"] for line in logged(tiny / "run") if "loss" in line] == [1, 2, 3, 4]
    assert sorted(path.name for path in (tiny / "run").glob(".*")) == []


def test_only_what_a_killed_process_left_is_cleared(tmp_path):
    names = [".last.pt.0123abcd.tmp", ".last.pt.0123abcdef.tmp", ".other.pt.0123abcd.tmp", "last.pt"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    clear_unfinished(tmp_path / "last.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_a_log_on_a_full_disk_does_not_end_the_run(tiny, monkeypatch, capsys):
    class Full:
        name, lines = "run/metrics.jsonl", 0

        def write(self, line):
            Full.lines += 1
            raise OSError(28, "No space left on device")

        def close(self):
            raise OSError(28, "No space left on device")

    init = train_cli.Log.__init__

    def full(self, *args):
        init(self, *args)
        self.file.close()
        self.file = Full()

    monkeypatch.setattr(train_cli.Log, "__init__", full)
    assert start("train.out=run") == 0 and Full.lines == 6
    assert errors(capsys) == ["warning: cannot write run/metrics.jsonl: No space left on device; training goes on"]


def test_events_on_a_full_disk_do_not_end_the_run(tiny, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    events, init = SimpleNamespace(add_scalar=full, close=full), train_cli.Log.__init__
    monkeypatch.setattr(train_cli.Log, "__init__",
                        lambda self, *args: (init(self, *args), setattr(self, "events", events))[0])
    assert start("train.out=run") == 0 and len(logged(tiny / "run")) == 6
    assert errors(capsys) == ["warning: cannot write TensorBoard's events: No space left on device; training goes on"]


def test_a_resumption_that_cannot_begin_keeps_the_result(tiny, monkeypatch, capsys):
    assert start("train.out=run", "train.steps=2") == 0
    before = (tiny / "run" / "result.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(trainlog, "write_text", full)
        assert start("train.out=run", "train.steps=4", "--resume") == 2
    assert errors(capsys) == ["error: cannot write to run: No space left on device"]
    assert (tiny / "run" / "result.json").read_bytes() == before and len(logged(tiny / "run")) == 4


def test_a_run_that_ended_without_its_result_is_evaluated_once_in_its_log(tiny, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(train_cli, "write_json", full)
        assert start("train.out=run", "train.steps=2") == 1
    assert start("train.out=run", "train.steps=2", "--resume") == 0
    assert [("loss" in line, line["step"]) for line in logged(tiny / "run")] == [
        (True, 1), (False, 1), (True, 2), (False, 2)]


@needs_locks
def test_a_run_is_not_resumed_from_a_checkpoint_that_another_process_moves_on_from(tiny, monkeypatch):
    """The folder is held before its checkpoint is read."""
    assert start("train.out=run", "train.steps=1") == 0
    load = run_setup.load_checkpoint

    def loading(path):
        with pytest.raises(ValueError, match="another process"), holding(tiny / "run"):
            pass
        return load(path)

    monkeypatch.setattr(run_setup, "load_checkpoint", loading)
    assert start("train.out=run", "train.steps=2", "--resume") == 0


def test_runs_begun_in_one_second_get_folders_of_their_own(tiny, monkeypatch):
    monkeypatch.setattr(run_setup, "datetime", SimpleNamespace(now=lambda: datetime(2026, 1, 2, 3, 4, 5)))
    setup = train_cli.setup                                             # asked for before either folder was there
    first = setup(SimpleNamespace(config="tiny.yaml", overrides=["train.steps=1"], resume=False), ExitStack(),
                  load_first("tiny.yaml"))
    monkeypatch.setattr(train_cli, "setup", lambda *arguments: first)
    for _ in range(3):
        train_cli.claim_folder(SimpleNamespace(cfg=first[0], out=first[1]))
    assert start("train.steps=1") == 0
    names = [f"tiny-20260102-030405{count}" for count in ("", "-2", "-3", "-4")]
    assert sorted(path.name for path in (tiny / "runs").iterdir()) == names
    assert run_setup.newest_run("tiny").name == names[3]


def test_a_folder_taken_by_another_run_since_the_start_is_left_alone(tiny, monkeypatch, capsys):
    claim = train_cli.claim_folder

    def late(run):
        run.out.mkdir()
        write_text(run.out / "config.yaml", "of the other")
        claim(run)

    monkeypatch.setattr(train_cli, "claim_folder", late)
    assert start("train.out=run") == 2
    assert errors(capsys) == ["error: train.out must be a new or empty folder, another run has begun in run"]
    assert [path.read_text() for path in (tiny / "run").iterdir()] == ["of the other"]


@needs_locks
def test_two_processes_do_not_write_to_one_folder(tiny, capsys):
    assert start("train.out=run", "train.steps=1") == 0
    before = {path: path.read_bytes() for path in (tiny / "run").iterdir()}
    with holding(tiny / "run"):
        assert start("train.out=run", "train.steps=2", "--resume") == 2
    assert errors(capsys) == ["error: run is being written to by another process: wait for it, or take another folder"]
    assert {path: path.read_bytes() for path in (tiny / "run").iterdir()} == before
    assert start("train.out=run", "train.steps=2", "--resume") == 0


@needs_locks
def test_a_system_without_locks_runs_as_before(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    with holding(tmp_path):
        pass
    monkeypatch.setattr(checkpoint, "fcntl", None)
    with holding(tmp_path):
        pass


def test_a_folder_that_cannot_be_synced_is_written_to(tmp_path, monkeypatch):
    """As on some network file systems, and in folders closed to readers."""
    opened = os.open

    def closed(path, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied")
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(checkpoint.os, "open", closed)
    write_text(tmp_path / "a.txt", "12345")
    assert (tmp_path / "a.txt").read_text() == "12345"


def test_the_folder_is_that_of_the_user(tiny, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny / "home"))
    assert start("train.out=~/run", "train.steps=1") == 0
    assert start("train.out=~/run", "train.steps=2", "--resume") == 0
    assert (tiny / "home" / "run" / "result.json").is_file() and not (tiny / "~").exists()


def test_a_folder_closed_to_writers_is_refused_before_the_preparation(tiny, monkeypatch, capsys):
    monkeypatch.setattr(run_setup.os, "access", lambda path, mode: False)
    monkeypatch.setattr(train_cli, "prepare", None)
    assert start("train.out=a/run") == 2
    assert errors(capsys) == [f"error: train.out must be a folder that can be written to, got a/run: no permission in "
                              f"{tiny}"]
    (tiny / "run").mkdir()
    (tiny / "run" / "checkpoint.pt").touch()
    assert start("train.out=run", "--resume") == 2
    assert errors(capsys) == [f"error: train.out must be a folder that can be written to, got run: no permission in "
                              f"{tiny / 'run'}"]


def test_a_link_to_nowhere_is_no_folder(tiny, monkeypatch, capsys):
    (tiny / "run").symlink_to("nowhere")
    monkeypatch.setattr(train_cli, "prepare", None)
    assert start("train.out=run") == 2
    assert errors(capsys) == ["error: train.out must be a new or empty folder, or go on with --resume, got run"]


def test_a_configuration_that_a_checkpoint_holds_is_named_with_it(tiny, capsys):
    assert start("train.out=run", "train.steps=1") == 0
    content = torch.load(tiny / "run" / "checkpoint.pt", weights_only=True)
    content["config"]["train"]["bells"] = 3                             # of a newer version
    torch.save(content, tiny / "run" / "checkpoint.pt")
    assert start("train.out=run", "train.steps=2", "--resume") == 2
    told = errors(capsys)
    assert len(told) == 1 and told[0].startswith("error: run/checkpoint.pt: ") and "train.bells" in told[0]


def test_evaluations_have_the_threads_that_the_first_was_timed_with(monkeypatch):
    used, before = [], torch.get_num_threads()
    monkeypatch.setattr(run_setup, "score_model", lambda *_: used.append(torch.get_num_threads()) or {})
    run = SimpleNamespace(threads=before + 1, eval_set=None, averaged=None, localizer=None, eval_s=0.0)
    run_setup.evaluate_now(run)
    assert used == [before + 1] and torch.get_num_threads() == before and run.eval_s > 0


def test_a_process_is_as_old_as_the_clock_that_nobody_sets_says(monkeypatch):
    age, now = runtime.process_age_s(), runtime.time.monotonic()
    monkeypatch.setattr(runtime.time, "monotonic", lambda: now + 50)
    monkeypatch.setattr(runtime.time, "time", lambda: 1e9)
    assert runtime.process_age_s() == pytest.approx(age + 50, abs=1)


# ---- what is over of a run that goes on ----


def train_config(**values):
    return TrainConfig(**{"steps": None, "max_minutes": None, **values})


@pytest.mark.parametrize("now, before, done, share", [
    ({"steps": 100}, {"steps": 100}, dict(step=25), 0.25),
    ({"steps": 200}, {"steps": 100}, dict(step=100), 0.5),              # more steps since
    ({"steps": 100}, {"steps": 100}, dict(step=1025, first=1000), 0.25),  # from the weights of another run
    ({"max_minutes": 10}, {"max_minutes": 10}, dict(step=7, share=0.6, elapsed_s=300), 0.6),
    ({"max_minutes": 20}, {"max_minutes": 10}, dict(step=7, share=1.0, elapsed_s=600), 0.5),  # more time since
    ({"max_minutes": 20}, {"max_minutes": 10}, dict(step=7, share=0.3, elapsed_s=600), 0.3),  # never more than it was
    ({"max_minutes": 10, "steps": 10}, {"max_minutes": 10, "steps": 10}, dict(step=8, share=0.5, elapsed_s=300), 0.8)])
def test_share_of_a_run_at_its_checkpoint(now, before, done, share):
    step, config = done.pop("step"), {"train": {"steps": None, "max_minutes": None, **before}}
    resumed = Checkpoint({}, None, None, step, config, {}, done)
    assert run_setup.share_done(train_config(**now), resumed) == pytest.approx(share)


@pytest.mark.parametrize("train, elapsed_s, began, step, share", [
    ({"steps": 100}, 0, (0.0, 0.0), 40, 0.4),
    ({"max_minutes": 2}, 56, (0.0, 0.0), 3, 0.5),                       # 120 s less 8 for the end
    ({"max_minutes": 2}, 76, (0.5, 40.0), 3, 0.75),                     # half of the 72 s left does half of the rest
    ({"max_minutes": 2}, 112, (0.5, 40.0), 3, 1.0),
    ({"max_minutes": 2, "steps": 100}, 56, (0.0, 0.0), 70, 0.7)])       # whichever comes first
def test_progress_reaches_the_end_with_the_time(train, elapsed_s, began, step, share, monkeypatch):
    monkeypatch.setattr(train_cli, "elapsed_s", lambda run: elapsed_s)
    run = SimpleNamespace(cfg=SimpleNamespace(train=train_config(**train)), first=0, eval_s=1.0, step_s=2.0,
                          localizer=torch.nn.Linear(1, 1))
    assert train_cli.progress(run, step, began) == pytest.approx(share, abs=1e-6)


def test_an_interruption_before_the_first_step_leaves_a_run_to_go_on_with(tiny, monkeypatch, capsys):
    """TensorBoard is imported by then, which takes seconds."""
    def interrupting(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_cli, "Log", interrupting)
        assert start("train.out=run", "train.steps=2") == 130
    assert "interrupted at step 0; go on with: python -m ssl_gpu.train" in capsys.readouterr().err
    assert start("train.out=run", "train.steps=2", "--resume") == 0
    assert [line["step"] for line in logged(tiny / "run") if "loss" in line] == [1, 2]


def test_a_resumed_run_says_where_and_with_which_settings_it_goes_on(tiny, capsys):
    assert start("train.out=run", "train.steps=1") == 0
    assert "goes on from" not in capsys.readouterr().out
    assert start("train.out=run", "train.steps=2", "--resume") == 0
    assert "; it goes on from step 1 with the settings of its checkpoint\n" in capsys.readouterr().out
    assert start("train.out=run", "train.steps=3", "--resume", "train.lr=0.1", "target.decoding=argmax",
                 "train.ema=null") == 0
    assert ("; it goes on from step 2 with the settings of its checkpoint, but target.decoding=argmax (was median), "
            "train.lr=0.1 (was 0.001), train.ema=null (was 0.99)\n") in capsys.readouterr().out


def test_a_configuration_file_that_has_changed_is_not_overlooked_in_silence(tiny, capsys):
    text, steps = (tiny / "tiny.yaml").read_text(), 0

    def warned(*overrides, file="tiny.yaml", more=1, **train):
        """Of `more` steps, with these keys of the section train in the file."""
        nonlocal steps
        steps += more
        section = "".join(f", {key}: {value}" for key, value in train.items())
        (tiny / file).write_text(text.replace("log_every: 1", "log_every: 1" + section))
        resume = ["--resume"] if (tiny / "run").exists() else []
        assert train_cli.main([file, "train.out=run", *resume, f"train.steps={steps}", *overrides]) == 0
        return [line.removeprefix("warning: --resume keeps ").removesuffix(", which the command line alone changes")
                for line in errors(capsys)]

    assert warned("train.lr=0.1") == warned() == []                     # an override is no change of the file
    assert warned(lr="2.0e-3") == ["train.lr=0.1 (tiny.yaml: 0.002)"]
    assert warned(more=0, lr="2.0e-3") == []                            # finished, nothing is done with a rate
    assert warned(" train.lr=3.0e-3", lr="2.0e-3") == []                # given
    assert warned("train={out: run, steps: 5, lr: 3.0e-3, batch_size: 4, log_every: 1, device: cpu}", lr="2.0e-3") == []
    assert warned(lr="3.0e-3") == []                                    # which it has by now
    assert warned(lr="2.0e-3", warmup=0.5, file="other.yaml") == [
        "train.lr=0.003 (other.yaml: 0.002), train.warmup=0.05 (other.yaml: 0.5)"]
    assert warned(out="./run", init="packaged") == []                   # by which it is found; which it had
    text = text.replace("dim: 16", "dim: 32").replace(", device: cpu", "")
    assert warned() == ["model.dim=16 (tiny.yaml: 32), train.device=cpu (tiny.yaml: auto)"]
    text = text.replace("dim: 32", "dim: 16").replace("steps: 4, ", "")   # no whole one without the command line
    assert warned("train.device=cpu", lr="2.0e-3") == ["train.lr=0.003 (tiny.yaml: 0.002)"]
    kept = torch.load(tiny / "run" / "checkpoint.pt", weights_only=True)
    del kept["extra"]["file"]
    torch.save(kept, tiny / "run" / "checkpoint.pt")
    assert warned() == []                                               # a run that was begun without it


def test_what_a_run_began_with_is_read_once(tiny, monkeypatch, capsys):
    """The file may change while speech is decoded, and a pipe has it once."""
    prepare = train_cli.prepare

    def meanwhile(*arguments):
        text = (tiny / "tiny.yaml").read_text()
        (tiny / "tiny.yaml").write_text(text.replace("log_every: 1", "log_every: 1, lr: 2.0e-3"))
        return prepare(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_cli, "prepare", meanwhile)
        assert start("train.out=run", "train.steps=1") == 0
    assert start("train.out=run", "train.steps=2", "--resume") == 0
    assert errors(capsys) == ["warning: --resume keeps train.lr=0.001 (tiny.yaml: 0.002), which the command line alone "
                              "changes"]


def test_a_run_that_is_not_over_is_not_cut_short_by_fewer_steps(tiny, capsys):
    """Which would have called it finished."""
    assert start("train.out=run", "train.steps=3") == 0
    (tiny / "run" / "result.json").unlink()
    capsys.readouterr()
    assert start("train.out=run", "train.steps=2", "--resume") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: train.steps must be >= 3, the steps that the run to --resume has taken, got 2")
    assert not (tiny / "run" / "result.json").exists()
