"""A localiser on the evaluation sets, from the command line: numbers, files, and one line for every mistake."""
import json
import os
import re
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from test_protocol import folder, speech  # noqa: F401  fixtures

from ssl_gpu import assess as assessing
from ssl_gpu import evaluate as evaluate_cli
from ssl_gpu import protocol, webpage
from ssl_gpu.assess import Assessment, assess
from ssl_gpu.checkpoint import save_checkpoint
from ssl_gpu.clips import Truth
from ssl_gpu.config import RunConfig, from_mapping, to_mapping
from ssl_gpu.evaluate import eval_speech
from ssl_gpu.measured import read_measured
from ssl_gpu.pretrained import build_localizer, load_localizer, packaged, read_weights
from ssl_gpu.protocol import SetOptions
from ssl_gpu.runtime import versions

TINY = {"model": {"channels": 4, "dim": 16, "depth": 1, "heads": 2}, "features": {"num_bands": 4, "num_delays": 17},
        "train": {"device": "cpu", "steps": 1},
        "speech": {"voices_speakers": 6, "voices_utterances": 2, "voices_duration_s": 3.2}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of an untrained network."""
    cfg = from_mapping(RunConfig, TINY)
    path = tmp_path_factory.mktemp("run") / "checkpoint.pt"
    save_checkpoint(path, model=build_localizer(cfg), optimizer=None, ema=None, step=7, config=to_mapping(cfg),
                    extra={})
    return path


class Told:
    """In place of a localiser: answers with the true angles, and remembers what it was told."""

    def __init__(self, clips):
        self.clips, self.spacings, self.target = iter(clips), [], from_mapping(RunConfig, TINY).target

    def __call__(self, spacing):
        self.spacings.append(spacing)
        return self

    def estimate(self, audio, law):
        part = next(self.clips)
        assert torch.equal(part.audio, audio)
        return law.angle_map.cone_to_azimuth(part.cone.float()), part.cone.float()


def test_the_truth_scores_as_the_floor_and_nothing_else_does(speech, folder, monkeypatch):  # noqa: F811
    """Cone errors of nothing, azimuths as good as with the cone angles known; the classical ones and chance behind."""
    options = SetOptions(speech, torch.device("cpu"), 60, read_measured(str(folder)))
    known = {name: list(assessing.clips_of(name, options)) for name in ("e1", "e1p", "e3")}
    monkeypatch.setattr(assessing, "clips_of", lambda name, options: iter(known[name]))
    told = Told([part for name in ("e1", "e1p", "e3") for part in known[name]])
    found = dict(assess(["e1", "e0b", "e1p", "e3"], options, told))
    assert list(found) == ["e1", "e0b", "e1p", "e3"] and found["e0b"] is found["e1"]
    assert told.spacings == pytest.approx([0.1, 0.1, 0.09 * 340 / 343])
    for name, assessment in found.items():
        result = assessment.result
        assert result["cone_mae_deg"] == pytest.approx([0, 0], abs=1e-3) and result["num_clips"] == 60
        assert sum(result["chance"]["cone_mae_deg"]) > 20 and sum(result["baseline"]["cone_mae_deg"]) > 1
        assert assessment.cone.shape == (60, 2)
        if name in ("e1", "e0b"):
            assert result["azimuth_class_mae_deg"] == pytest.approx(result["floor"]["exact_cone"], abs=0.3)
        else:
            assert result["floor"] is None and result["azimuth_mae_deg"] == pytest.approx([0, 0], abs=1e-3)
    assert found["e1"].result["eval_digest"] != found["e1p"].result["eval_digest"]


def test_chance_has_not_seen_the_clips_that_it_is_scored_on(speech, folder):  # noqa: F811
    """It has the medians of the law, of e1p the planar law, so that one clip is off by its distance from these; e3 has
    no law."""
    options = SetOptions(speech, torch.device("cpu"), 1, read_measured(str(folder)))
    found = dict(assess(["e0", "e1", "e1p", "e1n5", "e3"], options, None))
    for name, assessment in found.items():
        scored = assessment.result["chance"]
        truth = torch.rad2deg(torch.stack((assessment.truth.cone[0], assessment.truth.azimuth[0])))
        medians = torch.tensor([[52.6, 125.6]] * 2 if name == "e1p" else [[60.7, 117.1], [52.6, 125.9]])
        expected = torch.zeros(2, 2) if name == "e3" else (truth - medians).abs()
        for error, key in zip(expected.tolist(), ("cone_mae_deg", "azimuth_mae_deg")):
            assert scored[key] == pytest.approx(error, abs=0.7)  # of 20,000 scenes, a standard error of 0.3


def run(*arguments):
    return evaluate_cli.main([str(argument) for argument in arguments])


def test_command_writes_numbers_and_manifests_the_same_every_time(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results = []
    for name in ("a", "b"):
        assert run(checkpoint, "--sets", "e1,e1n5", "--clips", 4, "--json", f"{name}.json", "--manifest", name) == 0
        results.append(json.loads(Path(f"{name}.json").read_text()))
        words = f"checkpoint.pt --sets e1,e1n5 --clips 4 --manifest {name}"  # of a file its name alone
        assert {result.pop("command") for result in results[-1].values()} == {f"python -m ssl_gpu.evaluate {words}"}
    assert results[0] == results[1] and list(results[0]) == ["e1", "e1n5"]
    assert results[0]["e1"]["leaked_rooms"] == results[0]["e1"]["leaked_talkers"] == 0
    cfg = from_mapping(RunConfig, TINY)
    about = {"target": "cone", "steps": 7, "examples": 7 * cfg.train.batch_size, "device": "cpu", "set_version": 1,
             "weights_digest": read_weights(checkpoint).digest, "minutes": None, "precision": None,
             "parameters": sum(p.numel() for p in build_localizer(cfg).parameters()), "versions": versions()}
    for result in results[0].values():
        assert {key: result[key] for key in about} == about | {"device": result["device"]} and result["device"]
    assert results[0]["e1"]["num_clips"] == 4
    assert {"baseline", "chance", "eval_digest", "cone_mae_deg", "acc_at_10", "floor"} <= set(results[0]["e1"])
    lines = Path("a/e1.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[0])["diffuse_snr_db"] is None
    assert json.loads(Path("b/e1n5.jsonl").read_text().splitlines()[3])["diffuse_snr_db"] == 5.0
    table = capsys.readouterr().out
    assert "LEAKED" not in table
    for shown in (results[0]["e1"]["eval_digest"], "GCC-PHAT, max", "best guess, cone angles known"):
        assert shown in table


@pytest.mark.parametrize("arguments, warnings", [
    (["--sets", "e1", "--clips", 2, "mixture.diffuse_snr_db=[0, 0]", "scene.mic_spacing_m=0.05", "e3.dir=x"],
     ["e3.dir has no effect: it goes with --sets e3",
      "mixture.diffuse_snr_db, scene.mic_spacing_m have no effect: what the sets are of is fixed, whatever the model "
      "was trained for"]),
    (["--sets", "e1", "--clips", 2, "eval.num_clips=3", "train.device=cpu", "train.seed=1", "speech.train=x"],
     ["train.seed, speech.train have no effect: nothing is trained",
      "eval.num_clips has no effect: it is of a run's own evaluation; with --sets there is --clips N"]),
    (["eval.num_clips=2", "mixture.sensor_snr_db=[0, 0]"],
     ["mixture.sensor_snr_db has no effect: the clips of a run's own evaluation are clean"]),
    (["eval.num_clips=2", "train.seed=1", "train.device=cpu", "train.steps=9"],
     ["train.steps has no effect: nothing is trained"]),
    (["eval.num_clips=2", "train={device: cpu, steps: 1}", "scene.bank=3", "speech.crop=first", "speech.crop=random"],
     ["scene.bank, speech.crop have no effect: an evaluation has rooms and clips of its own"]),
    (["--sets", "e1", "--clips", 2, "speech.clip_s=2", "train={steps: 3}", "mixture={}"],
     ["speech.clip_s, mixture have no effect: what the sets are of is fixed, whatever the model was trained for"]),
    (["eval.num_clips=2", "scene.rt60_s=[0.2, 0.3]"], []),
])
def test_what_changes_nothing_is_told(arguments, warnings, checkpoint, capsys):
    assert run(checkpoint, *arguments) == 0
    told = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.startswith("warning")]
    assert told == [f"warning: {warning}" for warning in warnings]


def test_a_manifest_has_the_name_of_its_set(tmp_path):
    """Also that of e0b, whose clips are those of e1."""
    few = ("speech.voices_speakers=4", "speech.voices_utterances=1", "train.device=cpu")
    assert run(*few, "--sets", "e0b,e1", "--baselines", "--clips", 2, "--manifest", tmp_path / "new" / "m") == 0
    assert sorted(path.name for path in (tmp_path / "new" / "m").iterdir()) == ["e0b.jsonl", "e1.jsonl"]
    first, second = ((tmp_path / "new" / "m" / name).read_text() for name in ("e0b.jsonl", "e1.jsonl"))
    assert first == second and first.count("\n") == 2


@pytest.mark.parametrize("failing", [[], ["a.json"], ["m/e1.jsonl", "a.html"]])
def test_a_file_that_cannot_be_written_costs_neither_the_table_nor_another(failing, checkpoint, tmp_path, monkeypatch,
                                                                           capsys):
    """Which is printed before the first file, and ~ is the user's home for all of them."""
    pytest.importorskip("matplotlib.figure")                            # which has a cache in the home
    monkeypatch.setenv("HOME", str(tmp_path))
    printed = []

    def full(write):
        def function(path, content):
            printed.append(capsys.readouterr())
            if str(Path(path).relative_to(tmp_path)) in failing:
                raise OSError(28, "No space left on device")
            write(path, content)
        return function

    for module, name in ((evaluate_cli, "write_json"), (evaluate_cli, "write_text"), (assessing, "write_text")):
        monkeypatch.setattr(module, name, full(getattr(module, name)))
    assert run(checkpoint, "--sets", "e1", "--clips", 2, "--json=~/a.json", "--html=~/a.html",
               "--manifest=~/m") == bool(failing)
    lines = "".join(parts.err for parts in (*printed, capsys.readouterr())).splitlines()
    assert [line for line in lines if line.startswith("error")] == [
        f"error: cannot write ~/{name}: No space left on device" for name in failing]
    assert len(printed) == 3 and "GCC-PHAT, max" in printed[0].out
    for name in ("a.json", "m/e1.jsonl", "a.html"):
        assert (tmp_path / name).exists() == (name not in failing)


def test_a_table_that_cannot_be_printed_costs_no_file(tmp_path, monkeypatch, capsys):
    """As where standard output is a pipe that nobody reads any more."""
    few = ("speech.voices_speakers=4", "speech.voices_utterances=1", "train.device=cpu")
    monkeypatch.setattr("builtins.print", closed(print))
    assert run(*few, "--sets", "e1", "--baselines", "--clips", 2, "--json", tmp_path / "a.json") == 1
    assert capsys.readouterr().err.endswith("error: cannot write the table: Broken pipe\n")
    assert list(json.loads((tmp_path / "a.json").read_text())) == ["e1"]


def closed(shown):
    """print, but for what goes to standard output."""
    def function(*words, file=None, **how):
        if file is None:
            raise BrokenPipeError(32, "Broken pipe")
        shown(*words, file=file, **how)
    return function


def test_the_network_is_built_once_and_told_every_spacing(checkpoint, folder, tmp_path, monkeypatch):  # noqa: F811
    """e3, after another spacing, has the result that it has alone."""
    monkeypatch.chdir(tmp_path)
    built = []
    monkeypatch.setattr(evaluate_cli, "load_localizer", lambda *a: built.append(load_localizer(*a)) or built[-1])
    arguments = (checkpoint, "--clips", 6, f"e3.dir={folder}", "--json", "a.json", "--sets")
    results = []
    for sets in ("e3", "e1,e3,e1p"):
        assert run(*arguments, sets) == 0
        results.append(json.loads(Path("a.json").read_text()))
        assert results[-1]["e3"].pop("command").endswith(f"--sets {sets}")
    assert len(built) == 2 and results[0]["e3"] == results[1]["e3"]
    assert sum(p.numel() for p in built[0].parameters()) == results[0]["e3"]["parameters"]


@pytest.fixture(scope="module")
def leaked(tmp_path_factory):
    """An untrained network whose configuration says that it was trained in 150 of the original's rooms."""
    cfg = from_mapping(RunConfig, {**TINY, "scene": {"pool": "original", "bank": 150}})
    path = tmp_path_factory.mktemp("leaked") / "checkpoint.pt"
    save_checkpoint(path, model=build_localizer(cfg), optimizer=None, ema=None, step=7, config=to_mapping(cfg),
                    extra={})
    return path


@pytest.mark.parametrize("overrides", [[], ["scene.pool=law"], ["scene.pool=law", "scene.bank=null"]])
def test_a_model_that_has_been_in_the_rooms_of_a_set_is_marked(overrides, leaked, tmp_path, monkeypatch, capsys):
    """In the numbers and in words; no override of an evaluation can undo what was trained."""
    monkeypatch.chdir(tmp_path)
    assert run(leaked, "--sets", "e0,e1", "--clips", 3, "--json", "a.json", *overrides) == 0
    result = json.loads(Path("a.json").read_text())
    assert (result["e0"]["leaked_rooms"], result["e1"]["leaked_rooms"]) == (150, 0)
    table = capsys.readouterr().out
    assert [line.split()[:3] for line in table.splitlines() if "model" in line][:2] == [
        ["e0", "model,", "LEAKED"], ["e1", "model", "3"]]
    assert table.splitlines()[-1] == ("e0 is LEAKED: the model was trained in 150 of its 200 rooms "
                                      "(scene.pool=original), this says nothing about other rooms")


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """A folder of four talkers in LibriSpeech's layout."""
    place = tmp_path_factory.mktemp("speech")
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 50000))
    for number, audio in enumerate(noise):
        (place / f"{number}" / "1").mkdir(parents=True)
        soundfile.write(place / f"{number}" / "1" / f"{number}-1-0001.wav", audio, 16000)
    return place


@pytest.mark.parametrize("talkers, expected", [(["9", "3", "1"], 2), (["7"], 0), (None, None)])
def test_a_model_that_has_heard_the_talkers_is_marked(talkers, expected, speakers, tmp_path, monkeypatch, capsys):
    """Whatever the set; of weights that do not say whom they heard, nothing is known."""
    monkeypatch.chdir(tmp_path)
    cfg = from_mapping(RunConfig, {**TINY, "speech": {"train": "there", "eval": "elsewhere"}})
    save_checkpoint("checkpoint.pt", model=build_localizer(cfg), optimizer=None, ema=None, step=7,
                    config=to_mapping(cfg), extra={} if talkers is None else {"talkers": talkers})
    folders = [f"speech.eval={speakers}", f"speech.cache_dir={tmp_path / 'cache'}"]
    assert run("checkpoint.pt", "--sets", "e1", "--clips", 2, "--json", "a.json", *folders) == 0
    captured, leaked = capsys.readouterr(), bool(expected)
    assert json.loads(Path("a.json").read_text())["e1"]["leaked_talkers"] == expected
    assert ("warning: 2 of 4 talkers of speech.eval were heard in training, 1 for one: the result is not one of unseen "
            "talkers\n" in captured.err) == leaked
    assert ("model, LEAKED" in captured.out) == leaked
    assert captured.out.endswith("e1 is LEAKED: the model was trained on 2 talkers of speech.eval, this says nothing "
                                 "about other talkers\n") == leaked
    few = ("speech.voices_speakers=4", "speech.voices_utterances=1")
    assert run("checkpoint.pt", "--sets", "e1", "--clips", 2, "--json", "a.json", "speech.eval=null", *few) == 0
    assert json.loads(Path("a.json").read_text())["e1"]["leaked_talkers"] == 0


def test_the_page_says_which_set_is_leaked(leaked, checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    for path, heading in ((leaked, "<h2>e0, LEAKED</h2>"), (checkpoint, "<h2>e0</h2>")):
        assert run(path, "--sets", "e0", "--clips", 3, "--html", tmp_path / "page.html") == 0
        text = (tmp_path / "page.html").read_text()
        assert heading in text and ("e0 is LEAKED" in text) == ("LEAKED" in heading)


def test_baselines_need_no_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    change = [f"speech.{key}={value}" for key, value in TINY["speech"].items()]
    assert run(*change, "train.device=cpu", "--sets", "e1p", "--baselines", "--clips", 3, "--json", "a.json") == 0
    [result] = json.loads(Path("a.json").read_text()).values()
    for key in ("leaked_rooms", "leaked_talkers", "target", "examples", "parameters"):
        assert result[key] is None
    assert result["versions"] == versions() and result["device"]
    assert "cone_mae_deg" not in result and result["baseline"]["num_clips"] == 3 and result["steps"] is None
    assert "model" not in capsys.readouterr().out


def test_clips_to_choose_by_are_of_no_published_set(checkpoint, tmp_path, monkeypatch, capsys):
    """Other scenes, images, pairs and noise, and both JSON and table say so; those of e1 are heard in e1n5, too."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for split, option in (("test", ()), ("validation", ("--validation",))):
        assert run(checkpoint, "--sets", "e1,e1n5", "--clips", 3, *option, "--json", "a.json", "--manifest", split) == 0
        found[split] = json.loads(Path("a.json").read_text())
        assert {result["split"] for result in found[split].values()} == {split}
        assert ("clips of validation" in capsys.readouterr().out) == bool(option)
        rows = [[json.loads(line) for line in Path(f"{split}/{name}.jsonl").read_text().splitlines()]
                for name in ("e1", "e1n5")]
        assert [row["room_dim"] for row in rows[0]] == [row["room_dim"] for row in rows[1]]
        found[split, "rooms"] = [row["room_dim"] for row in rows[0]]
    assert found["test"]["e1"]["eval_digest"] != found["validation"]["e1"]["eval_digest"]
    assert not any(room in found["test", "rooms"] for room in found["validation", "rooms"])
    assert "--validation" in found["validation"]["e1"]["command"]


def test_page_holds_tables_and_plots(checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    assert run(checkpoint, "--sets", "e1", "--clips", 9, "--html", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    assert text.startswith("<!doctype html>") and text.count("data:image/png;base64,iVBOR") == 2
    assert "GCC-PHAT, max" in text and "<h2>e1</h2>" in text and text.count("<tr><td>") == 8 and "by SNR" not in text


def test_page_says_whose_results_they_are_and_how_it_was_made(checkpoint, tmp_path, monkeypatch):
    """Also where nothing is given but an override with a blank, and where there are no weights."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, "--sets", "e1", "--clips", 2, "--html", "a page.html") == 0
    text = Path("a page.html").read_text()
    parameters = sum(p.numel() for p in build_localizer(from_mapping(RunConfig, TINY)).parameters())
    assert (f"<tr><th>weights</th><td>{checkpoint}: {parameters / 1e6:.2f} M parameters, 7 steps, "
            f"{7 * 32} examples</td></tr>") in text
    assert (f"<tr><th>command</th><td>python -m ssl_gpu.evaluate {checkpoint} --sets e1 --clips 2 --html "
            "&#x27;a page.html&#x27;</td></tr>") in text
    assert f"<tr><th>made</th><td>{datetime.now():%Y-%m-%d} " in text and f"torch {versions()['torch']}" in text
    few = ("speech.voices_speakers=4", "speech.voices_utterances=1")
    assert run("train.device=cpu", *few, "--sets", "e1", "--baselines", "--clips", 2, "--html", "b.html") == 0
    assert "<th>weights</th><td>none, the classical baselines alone</td>" in Path("b.html").read_text()


def test_bars_have_their_intervals(monkeypatch):
    """A line from end to end at the place of each bar, for those of enough sources."""
    figure = pytest.importorskip("matplotlib.figure")
    bins = [{"from": low, "to": low + 1, "num_sources": 9, "cone_mae_deg": 2.0 + low, "interval_95": interval}
            for low, interval in ((0, [1.5, 2.5]), (1, None), (2, [3.0, 4.8]))]
    drawn = []
    monkeypatch.setattr(webpage, "_png", drawn.append)
    webpage._by_condition({who: {"t20_s": bins} for who in ("model", "GCC-PHAT")})
    assert isinstance(drawn[0], figure.Figure)
    lines = [line.get_xydata().tolist() for line in drawn[0].axes[0].lines]
    assert [[y for _, y in line] for line in lines] == 2 * [[1.5, 2.5], [3.0, 4.8]]
    middles = [patch.get_x() + patch.get_width() / 2 for patch in drawn[0].axes[0].patches]
    assert [line[0][0] for line in lines] == pytest.approx([middles[i] for i in (0, 2, 3, 5)])


def test_bars_say_of_how_many_sources_they_are(monkeypatch):
    """And GCC-PHAT has its colour with a model beside it and without; the legend is none of a plot, whose bars it would
    cover."""
    pytest.importorskip("matplotlib")
    bins = [{"from": 0.5, "to": 2, "num_sources": 7, "cone_mae_deg": 2.0, "interval_95": None},
            {"from": 25.0, "to": None, "num_sources": 1234, "cone_mae_deg": 3.0, "interval_95": None}]
    drawn = []
    monkeypatch.setattr(webpage, "_png", drawn.append)
    for whose in (("model", "GCC-PHAT"), ("GCC-PHAT",)):
        webpage._by_condition({who: {"snr_db": bins} for who in whose})
    for figure in drawn:
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0.5..2\nn=7", "25..\nn=1234"]
        assert figure.axes[0].get_legend() is None and len(figure.legends) == 1
    both, alone = ([patch.get_facecolor() for patch in figure.axes[0].patches] for figure in drawn)
    assert both[2:] == alone and both[0] != both[2]


def test_estimates_are_told_apart_and_seen_however_few(monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(webpage, "_png", drawn.append)
    for clips in (1, 8, 2000):
        cone = torch.linspace(0.1, 3.0, 2 * clips, dtype=torch.float64).view(clips, 2)
        truth = Truth(cone, cone, torch.arange(clips), {})
        webpage._against_truth(Assessment({}, truth, cone, [], []))
    for figure in drawn:
        names = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names == ["talker at the smaller angle", "talker at the larger angle"]
        assert len({line.get_color() for line in figure.axes[0].lines[:2]}) == 2
    one, eight, many = (figure.axes[0].lines[0].get_markersize() for figure in drawn)
    assert one == eight == 9 and many < 2.1


def test_page_shows_examples_as_they_were_and_errors_by_snr(tmp_path):
    """One clip done by hand, its angles in the other order than its talkers; the bars of both sets in one picture."""
    pytest.importorskip("matplotlib")
    options = SetOptions(eval_speech(from_mapping(RunConfig, TINY)), torch.device("cpu"), 6)
    found = dict(assess(["e1", "e1n5"], options, None))
    [clips] = protocol.clips_of("e1", options)
    clip = next(row for row, cone in enumerate(clips.cone.tolist()) if cone[0] > cone[1])
    names, cone = clips.entries[clip]["utterances"][::-1], torch.rad2deg(clips.cone[clip]).tolist()[::-1]
    t20 = clips.conditions["t20_s"][clip].tolist()[::-1]
    expected = (f"<td>{names[0]}, {names[1]}</td><td>{cone[0]:.1f} / {cone[1]:.1f}°</td>"
                f"<td>{t20[0]:.2f} / {t20[1]:.2f} s</td>")
    text = webpage.page(found, "", {})
    assert expected in text and text.count('<img alt="errors by SNR"') == 1 and "off by" not in text
    heard = replace(found["e1"], cone=found["e1"].truth.cone + torch.deg2rad(torch.tensor([1.0, 2.0])))
    assert (f"<td>{cone[0] + 1:.1f} / {cone[1] + 2:.1f}°</td><td>1.0 / 2.0°</td>") in webpage.page(
        {"e1": heard}, "", {})


@pytest.mark.parametrize("arguments, message", [
    (["--sets", "e1,e9"], "--sets must be of e0, e0b, e1, e1p, e1n0, e1n5, e1n10, e1n20, e1w0, e1w5, e1w10, e1w20, e2, "
     "e3, got 'e9'"),
    (["--sets", "e1,", "e2"], "--sets must have a name between commas, as in e1,e2 without a blank, got 'e1,'"),
    (["--sets", "e1", "--clips", "0"], "--clips must be >= 1, got 0"),
    (["--sets", "e3"], "e3 needs a folder of measured RIRs: e3.dir=DIR"),
    (["--sets", "e3", "e3.dir=nowhere"], "e3.dir: cannot read nowhere/index.json: No such file or directory"),
    (["--sets", "e1", "--json", "nowhere/a.json"], "--json must be a file in an existing folder, got nowhere/a.json"),
    (["--sets", "e1", "--json", "a", "--html", "./a"], "--json and --html must be two files, got ./a twice"),
    (["--json", "nowhere/a.json"], "--json must be a file in an existing folder, got nowhere/a.json"),
    (["--sets", "e1", "--manifest", "/dev/null"],
     "--manifest must be a folder that can be written to, or a place where one can be made, got /dev/null"),
    (["--sets", "e1", "--manifest", "/dev/null/a"],
     "--manifest must be a folder that can be written to, or a place where one can be made, got /dev/null/a"),
    (["--sets", "e1", "--manifest", "m", "--clips", "0"], "--clips must be >= 1, got 0"),
    (["--clips", "3"], "--clips goes with --sets; without it the number of clips is eval.num_clips"),
    (["--baselines"], "--baselines goes with --sets"),
    (["--validation"], "--validation goes with --sets"),
    (["--validation", "--sets", "e1,e3"], "--validation must have sets of e0b, e1, e1p, e1n0, e1n5, e1n10, e1n20, "
     "e1w0, e1w5, e1w10, e1w20, e2, whose scenes are drawn, got 'e3'"),
    (["--clips", "0"], "--clips goes with --sets; without it the number of clips is eval.num_clips"),
    (["e3.dir=", "--sets", "e3"], "e3 has e3.dir=DIR, a folder of measured RIRs, and nothing else, got e3.dir="),
    (["e3.dirs=x"], "e3 has e3.dir=DIR, a folder of measured RIRs, and nothing else, got e3.dirs=x"),
    (["train.device=tpu"], "train.device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
    (["--sets", "e1", "scene.num_src=3"], "the evaluation sets have 2 talkers, the model's scene.num_src is 3"),
    (["--sets", "e1", "rir.sample_rate=8000", "features.band_hz=[100, 3900]"],
     "the evaluation sets are at 16000 Hz, the model's rir.sample_rate is 8000"),
])
def test_mistake_costs_one_line(arguments, message, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, *arguments) == 2
    assert capsys.readouterr().err == f"error: {message}\n"                # before voices are made, which says so
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_what_is_no_file_is_not_replaced(option, tmp_path, monkeypatch, capsys):
    """And refused before the work. A pipe stands for /dev/null here, which root would lose where this fails."""
    monkeypatch.setattr(evaluate_cli, "evaluate_sets", None)
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path, "folder"), (tmp_path / "pipe", "special file")):
        assert run("--sets", "e1", "--baselines", option, path) == 2
        assert capsys.readouterr().err == (f"error: {option} must be a file that can be replaced, got the {kind} "
                                           f"{path}\n")
    assert (tmp_path / "pipe").is_fifo()


def test_no_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(evaluate_cli, "run", lambda *_: torch.empty(1 << 60))
    assert run("--sets", "e1") == 1
    assert capsys.readouterr().err == ("error: out of memory; lower --clips, or eval.num_clips and speech.clip_s of a "
                                       "run's own evaluation\n")


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_cli, "run", interrupted)
    assert run("--sets", "e1") == 130
    assert capsys.readouterr().err == "interrupted before the results\n"


@pytest.mark.parametrize("name", ["r=1", "train.device=cpu"])
def test_a_checkpoint_may_have_an_equals_sign_in_its_name(name, checkpoint, tmp_path, monkeypatch, capsys):
    """Where there is none of it, only what has a section and a key is an override."""
    monkeypatch.chdir(tmp_path)
    Path(name).symlink_to(checkpoint.parent)
    assert run(name, "--sets", "e1", "--clips", 2, "--json", "a.json") == 0
    assert json.loads(Path("a.json").read_text())["e1"]["steps"] == 7
    assert run(f"{name}/checkpoint.pt", "--sets", "e1", "--baselines", "--clips", 2) == 2
    assert run("r=2", "--sets", "e1", "--clips", 2) == 2
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")] == [
        f"error: --baselines takes no checkpoint, got {name}/checkpoint.pt",
        "error: weights must be a run, its checkpoint.pt or a folder of ssl_gpu.pretrained, got r=2: there is nothing "
        "of that name"]


def test_without_checkpoint_or_sets_there_is_nothing_to_do(capsys):
    assert run() == 2
    assert capsys.readouterr().err == "error: a checkpoint is needed, or --sets for the packaged weights\n"


def test_packaged_weights_ask_for_speech_by_the_key_that_gives_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("--sets", "e1", "--clips", "2") == 2
    assert capsys.readouterr().err == ("error: speech.eval must be an existing folder, name one by speech.eval=DIR, "
                                       "or synthetic voices by speech.eval=null; the configuration of the weights has "
                                       "'test-clean'\n")
    assert run("--sets", "e1", "--clips", "2") == run(packaged()) == 2
    assert len(set(capsys.readouterr().err.splitlines())) == 1
