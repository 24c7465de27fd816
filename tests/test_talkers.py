"""Talkers of training and of evaluation: none is both, and whoever was heard in training is known ever after."""
import json

import numpy as np
import soundfile
import torch
from test_train import start, tiny, write_speech  # noqa: F401

from ssl_gpu import evaluate as evaluate_cli
from ssl_gpu.checkpoint import load_checkpoint
from ssl_gpu.config import RunConfig, load_config
from ssl_gpu.evaluate import eval_speech
from ssl_gpu.run import prepare, training_speech
from ssl_gpu.speech import Crop, draw_crops, load_bank


def test_weights_to_start_from_bring_their_talkers(tiny):  # noqa: F811
    for name, speakers in (("a", (0, 1, 2)), ("b", (3, 4, 5))):
        write_speech(tiny / name, speakers)
    speech = (f"speech.cache_dir={tiny / 'cache'}", "eval.num_clips=2", "train.steps=1")
    assert start("train.out=first", "speech.train=a", "speech.eval=b", *speech) == 0
    assert start("train.out=second", "speech.train=b", "speech.eval=a", "train.init=first", *speech) == 0
    assert json.loads((tiny / "second" / "result.json").read_text())["leaked_talkers"] == 3


def test_no_talker_of_evaluation_occurs_in_training(tiny, caplog):  # noqa: F811
    """Those of speech.eval are left out of speech.train, with a line; all that a run then draws is of the others."""
    for name, speakers in (("a", (0, 1, 2, 3)), ("b", (2, 9))):
        write_speech(tiny / name, speakers)
        write_speech(tiny / name / "more", speakers, 1.2)
    overrides = ["speech.train=a", "speech.eval=b", f"speech.cache_dir={tiny / 'cache'}", "eval.num_clips=2"]
    cfg = load_config(RunConfig, tiny / "tiny.yaml", overrides)
    run = prepare(cfg, tiny, None)
    assert [record.getMessage() for record in caplog.records] == [
        "warning: 1 of the 4 talkers of speech.train are in speech.eval, 2 for one, and are left out of training"]
    assert run.speech.talkers == ("0", "1", "3") and run.fixed["leaked_talkers"] == 0
    assert run.speech.names == ("0/1/0-1-0001.wav", "more/0/1/0-1-0001.wav", "1/1/1-1-0001.wav",
                                "more/1/1/1-1-0001.wav", "3/1/3-1-0001.wav", "more/3/1/3-1-0001.wav")
    whole = load_bank("a", cfg.speech, sample_rate=16000, device="cpu")
    for row, name in enumerate(run.speech.names):                       # every name with its own sound
        ours, theirs = (bank.samples[bank.start[at]:bank.start[at] + bank.length[at]]
                        for bank, at in ((run.speech, row), (whole, whole.names.index(name))))
        assert torch.equal(ours, theirs) and len(ours) > 0
    drawn = {run.speech.names[at] for step in range(60) for at in draw_crops(
        run.speech, 4, 2, 800, Crop.RANDOM, generator=torch.Generator().manual_seed(step)).utterance.flatten().tolist()}
    assert drawn == set(run.speech.names)


def test_a_folder_that_is_all_evaluations_is_one_line(tiny, capsys):  # noqa: F811
    write_speech(tiny / "a")
    write_speech(tiny / "b", (0, 1))
    cache = f"speech.cache_dir={tiny / 'cache'}"
    assert start("train.out=run", "speech.train=a", "speech.eval=a", cache) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: speech.train must hold talkers who are not in speech.eval, got 3, all of whom are")
    assert start("train.out=run", "speech.train=a", "speech.eval=b", cache) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: speech.train must hold at least 2 speakers, one per source and none of them in speech.eval, got 1")


def test_synthetic_voices_of_evaluation_are_not_those_of_training(tiny):  # noqa: F811
    """Other random streams, though both ask for the same seed: not one voice that either makes is another's."""
    cfg = load_config(RunConfig, tiny / "tiny.yaml", ["eval.seed=0", "train.seed=0"])
    heard, unheard = training_speech(cfg, torch.device("cpu")), eval_speech(cfg)
    voices = [{bank.samples[at:at + size].numpy().tobytes() for at, size in zip(bank.start, bank.length)}
              for bank in (heard, unheard)]
    assert len(voices[0]) == len(heard.start) and len(voices[1]) == len(unheard.start)
    assert not voices[0] & voices[1]


def test_talkers_that_were_heard_in_training_are_named_and_counted(tiny, capsys):  # noqa: F811
    """By an evaluation of a run on other speech than its own, and after it went on with other speech."""
    for name, speakers in (("a", (0, 1, 2)), ("b", (2, 3, 4)), ("c", (5, 6, 7))):
        write_speech(tiny / name, speakers)
    cache, few = f"speech.cache_dir={tiny / 'cache'}", ("eval.num_clips=2", "train.device=cpu")
    assert start("train.out=run", "train.steps=1", "speech.train=a", "speech.eval=c", cache) == 0
    capsys.readouterr()
    assert load_checkpoint(tiny / "run" / "checkpoint.pt").extra["talkers"] == ["0", "1", "2"]
    for name, count in (("a", 3), ("b", 1), ("c", 0)):
        assert evaluate_cli.evaluate("run", [f"speech.eval={name}", *few])["leaked_talkers"] == count
        assert ("heard in training" in capsys.readouterr().err) == (count > 0)
    assert evaluate_cli.evaluate("run", ["speech.eval=null", *few])["leaked_talkers"] == 0
    assert start("train.out=run", "train.steps=2", "speech.train=c", "speech.eval=b", "--resume") == 0
    assert ("warning: 1 of 3 talkers of speech.eval were heard in training, 2 for one: the result is not one of "
            "unseen talkers\n") in capsys.readouterr().err
    assert json.loads((tiny / "run" / "result.json").read_text())["leaked_talkers"] == 1
    assert evaluate_cli.evaluate("run", ["speech.eval=a", *few])["leaked_talkers"] == 3
    assert evaluate_cli.evaluate("run", ["speech.eval=c", *few])["leaked_talkers"] == 3


def test_files_that_were_heard_in_training_are_found_wherever_they_lie(tiny, capsys, caplog):  # noqa: F811
    """Without talkers' names it is what is in them that counts: one folder in the other, or a copy of another name."""
    for place, seeds in (("all", (0, 1)), ("all/test", (2, 3)), ("others", (0, 7))):
        (tiny / place).mkdir()
        for seed in seeds:
            soundfile.write(tiny / place / f"{place[-1]}{seed}.wav", np.random.default_rng(seed).normal(0, 0.1, 20_000),
                            16000)
    (tiny / "others" / "a1.wav").write_bytes((tiny / "others" / "s7.wav").read_bytes())  # the name alone is known
    cache = f"speech.cache_dir={tiny / 'cache'}"
    assert start("train.out=run", "train.steps=1", "speech.train=all", "speech.eval=all/test", cache) == 0
    assert "warning: 2 of the 4 talkers of speech.train are in speech.eval, test/t2.wav for one" in caplog.text
    assert json.loads((tiny / "run" / "result.json").read_text())["leaked_talkers"] == 0
    assert evaluate_cli.evaluate("run", ["speech.eval=others", "eval.num_clips=2"])["leaked_talkers"] == 1
    assert "warning: 1 of 3 talkers of speech.eval were heard in training, s0.wav for one" in capsys.readouterr().err


def test_talkers_of_an_older_checkpoint_are_unknown_unless_they_are_voices(tiny):  # noqa: F811
    write_speech(tiny / "a")
    write_speech(tiny / "b", (3, 4))
    speech = ("speech.train=a", "speech.eval=b", f"speech.cache_dir={tiny / 'cache'}")
    for out, overrides, expected in (("folder", speech, None), ("voices", (), 0)):
        assert start(f"train.out={out}", "train.steps=1", *overrides) == 0
        checkpoint = torch.load(tiny / out / "checkpoint.pt", weights_only=True)
        del checkpoint["extra"]["talkers"]
        torch.save(checkpoint, tiny / out / "checkpoint.pt")
        on_a = [*speech[1:], "eval.num_clips=2", "train.device=cpu"]
        assert evaluate_cli.evaluate(out, on_a)["leaked_talkers"] == expected
        assert start(f"train.out={out}", "train.steps=2", "--resume") == 0
        assert json.loads((tiny / out / "result.json").read_text())["leaked_talkers"] == expected
