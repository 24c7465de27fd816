"""Rooms rendered into files, as a user starts it: what is in them, that they repeat, and a line for every mistake."""
import contextlib
import json
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import soundfile
import torch

from ssl_gpu import plots, rng, simulate
from ssl_gpu.checkpoint import write_json
from ssl_gpu.config import RunConfig, load_config
from ssl_gpu.evaluate import eval_speech
from ssl_gpu.measure import measure_rirs
from ssl_gpu.rir import RirConfig, draw_images, render_rir
from ssl_gpu.scene import SceneConfig, make_scenes, original_scenes, sample_scenes
from ssl_gpu.scenelist import OPTIONAL, REQUIRED, SceneListError, read_scenes, scene_entries
from ssl_gpu.speech import draw_crops, gather_crops
from ssl_gpu.synthesis import RirBatch

SETTINGS = """
speech: {clip_s: 0.5, voices_speakers: 3, voices_utterances: 1, voices_duration_s: 0.6}
rir: {num_images: [64, 128]}
train: {steps: 1, device: cpu}
"""
TENSORS = ("room_dim", "rt60", "mic_pos", "src_pos", "mic_orientation", "src_orientation", "valid")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder, but for a configuration of seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SETTINGS)
    return tmp_path


def start(*arguments):
    return simulate.main(["tiny.yaml", *map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three scenes with mixtures, for reading only."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "tiny.yaml").write_text(SETTINGS)
    assert simulate.main([str(folder / "tiny.yaml"), "--num-scenes", "3", "--out", str(folder / "set"), "--wav"]) == 0
    return folder / "set"


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def entries_of(folder):
    return json.loads((Path(folder) / "scenes.json").read_text())


def test_set_holds_a_file_per_scene_and_their_list(made):
    names = {f"{kind}_{index}.{suffix}" for index in range(3) for kind, suffix in (("rir", "npy"), ("mix", "wav"))}
    assert set(contents(made)) == names | {"scenes.json", "config.yaml"}
    assert [entry["fname"] for entry in entries_of(made)] == ["rir_0.npy", "rir_1.npy", "rir_2.npy"]
    for entry in entries_of(made):
        rir = np.load(made / entry["fname"])
        assert rir.dtype == np.dtype("<f4") and rir.flags.c_contiguous
        assert rir.shape == (2, 2, math.ceil(np.float32(entry["rt60"]) * np.float32(16000)))


def test_rirs_belong_to_their_scenes(made):
    """Nothing before the direct path, which is at its place and as high as a path of that length is."""
    for entry in entries_of(made):
        rir = np.load(made / entry["fname"])
        for mic, mic_pos in enumerate(entry["mic_pos"]):
            for src, src_pos in enumerate(entry["src_pos"]):
                dist = math.sqrt(math.dist(mic_pos, src_pos) ** 2 + 1e-3)
                tap = round(dist / 340 * 16000)
                assert np.abs(rir[mic, src, :tap - 8]).max(initial=0) < 1e-4
                assert 0.58 < rir[mic, src, tap - 1:tap + 2].max() * dist / 0.0155 < 1.1  # 0.63: between two taps


def test_rirs_are_those_of_their_own_streams(made):
    """Rendered again in one batch of three, from each scene's own generator."""
    cfg, scenes = RirConfig(num_images=(64, 128), early=False), read_scenes(made / "scenes.json")
    for index in range(3):
        generator = rng.generator(0, rng.Split.VALIDATION, rng.Stream.IMAGES, index)
        images = draw_images(cfg, scenes[index:index + 1], generator=generator)
        expected = render_rir(cfg, scenes[index:index + 1], images).full[0].numpy()
        rir = np.load(made / f"rir_{index}.npy")
        np.testing.assert_allclose(rir, expected[..., :rir.shape[-1]], rtol=0, atol=1e-6 * np.abs(rir).max())
        assert not expected[..., rir.shape[-1]:].any()


def test_list_describes_scenes_and_rirs(made):
    for entry in entries_of(made):
        mics, sources, centre = np.array(entry["mic_pos"]), np.array(entry["src_pos"]), np.array(entry["array_pos"])
        np.testing.assert_allclose(centre, mics.mean(0, keepdims=True), rtol=0, atol=1e-12)
        offset = sources - centre
        azimuth = np.degrees(np.arctan2(offset[:, 1], offset[:, 0]))
        cone = np.degrees(np.arccos(offset[:, 0] / np.linalg.norm(offset, axis=1)))
        np.testing.assert_allclose(entry["azimuth_deg"], azimuth, rtol=0, atol=1e-9)
        np.testing.assert_allclose(entry["cone_angle_deg"], cone, rtol=0, atol=1e-6)
        direction = offset / np.linalg.norm(offset, axis=1, keepdims=True)
        np.testing.assert_allclose(entry["direction"], direction, rtol=0, atol=1e-12)
        assert all(3 <= side <= 10 for side in entry["room_dim"][:2]) and 0.1 <= entry["rt60"] <= 0.7
        rir = torch.from_numpy(np.load(made / entry["fname"]))[None]
        scene = make_scenes([entry["room_dim"]], [entry["rt60"]], mics[None], sources[None])
        measures = measure_rirs(RirBatch(rir, None, torch.tensor([rir.shape[-1]]), 16000), scene)
        for name in ("t20", "drr_db", "c50_db"):
            found = np.array(entry[name], np.float64)                   # None becomes NaN
            assert found.shape == (2, 2)
            np.testing.assert_allclose(found, getattr(measures, name)[0], rtol=1e-6)
        assert np.isfinite(np.array(entry["drr_db"])).all() and entry["seed"] == 0


def test_scenes_follow_the_law_of_the_configuration(folder):
    assert start("--num-scenes", 2, "--out", "set", "scene.num_mics=3", "scene.num_src=1", "scene.rt60_s=[0.2, 0.2]",
                 "rir.sample_rate=32000") == 0
    for entry in entries_of("set"):
        assert np.load(Path("set") / entry["fname"]).shape == (3, 1, 6400) and entry["rt60"] == 0.2


def test_mixtures_are_speech_through_the_rirs(made):
    """As loud as a direct path of 1 / distance makes it: 64 times the RIR's."""
    cfg = load_config(RunConfig, made.parent / "tiny.yaml")
    bank = eval_speech(cfg)
    for index in range(3):
        crops = draw_crops(bank, 1, 2, 8000, cfg.speech.crop,
                           generator=rng.generator(0, rng.Split.VALIDATION, rng.Stream.SPEECH, index))
        dry = gather_crops(bank, crops, 8000)[0].numpy()
        expected = 64 * oracle.mixture(dry, np.load(made / f"rir_{index}.npy"), np.ones(2))
        audio, rate = soundfile.read(made / f"mix_{index}.wav", dtype="float32")
        assert rate == 16000 and audio.shape == (8000, 2)
        assert soundfile.info(made / f"mix_{index}.wav").subtype == "FLOAT"
        np.testing.assert_allclose(audio.T, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        assert np.abs(audio).max() > 0.02


def test_list_says_what_mixtures_are_made_of_and_targets_are_their_early_parts(folder):
    """From the list alone: the utterances' samples at their gains, without the noise that its SNR tells."""
    noisy = ("mixture.level_difference_db=[-6,6]", "mixture.sensor_snr_db=[5,15]", "rir.early_window_ms=[-1000,1000]",
             "speech.crop=random")
    assert start("--num-scenes", 2, "--out", "targets", "--wav", "--targets", *noisy) == 0
    assert start("--num-scenes", 2, "--out", "none", "--wav", *noisy) == 0
    targets, none = contents("targets"), contents("none")
    assert {name: targets[name] for name in none} == none
    assert {*targets} - {*none} == {f"early_{index}_{src}.wav" for index in range(2) for src in range(2)}
    bank = eval_speech(load_config(RunConfig, "tiny.yaml"))
    for index, entry in enumerate(entries_of("targets")):
        rows = [bank.names.index(name) for name in entry["utterances"]]
        dry = [bank.samples[bank.start[row] + begin:][:min(8000, bank.length[row] - begin)].numpy() / 32768
               for row, begin in zip(rows, entry["offsets"])]
        dry = np.stack([np.pad(voice, (0, 8000 - len(voice))) for voice in dry])
        rir, gain = np.load(Path("targets") / f"rir_{index}.npy"), 10 ** (np.array(entry["gain_db"]) / 20)
        assert gain[0] == 1 and 0.5 <= gain[1] <= 2 and entry["diffuse_snr_db"] is None
        alone = [soundfile.read(Path("targets") / f"early_{index}_{src}.wav", dtype="float32")[0].T for src in (0, 1)]
        for src in (0, 1):                                              # by that window their whole RIR
            expected = 64 * gain[src] * oracle.mixture(dry[src:src + 1], rir[:, src:src + 1], np.ones(1))
            np.testing.assert_allclose(alone[src], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        noise = soundfile.read(Path("targets") / f"mix_{index}.wav", dtype="float32")[0].T - sum(alone)
        snr = 10 * np.log10(np.square(sum(alone)).mean() / np.square(noise).mean())
        assert 5 <= entry["sensor_snr_db"] <= 15 and snr == pytest.approx(entry["sensor_snr_db"], abs=0.01)
    assert start("--scenes", "targets/scenes.json", "--out", "again", "--wav", "--targets", *noisy) == 0
    assert contents("again") == targets


def test_early_parts_of_a_list_are_those_that_were_drawn(folder):
    """To the last bit, though its sources may be nearer than those of the law: transforms are as long as a scene
    alone needs."""
    assert start("--num-scenes", 2, "--out", "drawn", "--wav", "--targets") == 0
    assert start("--scenes", "drawn/scenes.json", "--out", "read", "--wav", "--targets") == 0
    assert contents("read") == contents("drawn") and "early_1_1.wav" in contents("read")


def test_microphones_that_differ_are_those_of_their_list_again(folder):
    """They follow from configuration, seed and number, as levels and noises do; scenes and RIRs do not know them."""
    mics = ("mixture.mic_gain_db=1", "mixture.mic_phase_deg=5")
    assert start("--num-scenes", 2, "--out", "a", "--wav", *mics) == 0
    assert start("--scenes", "a/scenes.json", "--out", "b", "--wav", *mics) == 0
    assert start("--scenes", "a/scenes.json", "--out", "alike", "--wav") == 0
    a, b, alike = (contents(name) for name in ("a", "b", "alike"))
    assert a == b
    assert {name for name in a if a[name] != alike[name]} == {"mix_0.wav", "mix_1.wav", "config.yaml"}


def test_wav_header_holds_no_time_of_day(made):
    header = (made / "mix_0.wav").read_bytes()[:64]
    assert b"PEAK" not in header and header.startswith(b"RIFF")


def test_wav_keeps_every_channel_and_level(tmp_path):
    """Also levels beyond full scale, which 16 bits would clip."""
    audio = torch.tensor([[0.1, -0.2, 3.5], [1e-9, 0.0, -7.25]])
    simulate.write_wav(tmp_path / "a.wav", audio, 44100)
    read, rate = soundfile.read(tmp_path / "a.wav", dtype="float32")
    assert rate == 44100
    np.testing.assert_array_equal(read.T, audio)


def test_second_run_writes_the_same_bytes(folder):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        assert start("--num-scenes", 1, "--out", name, "--wav", "--plot", "--seed", 7) == 0
    assert contents("a") == contents("b") and len(contents("a")) == 5


def test_a_scene_depends_on_seed_and_number_only(made, folder):
    assert start("--num-scenes", 1, "--out", "one", "--wav") == 0
    assert start("--num-scenes", 2, "--out", "other", "--wav", "--seed", 1) == 0
    three, one, other = contents(made), contents("one"), contents("other")
    assert entries_of("one") == entries_of(made)[:1] != entries_of("other")[:1]
    for name in ("rir_0.npy", "mix_0.wav"):
        assert one[name] == three[name] != other[name]
    rirs = [np.load(path / name) for path in (made, folder / "other") for name in ("rir_0.npy", "rir_1.npy")]
    starts = {rir[0, 0, :1000].tobytes() for rir in rirs}
    assert len(starts) == 4


def test_rooms_are_neither_trained_on_nor_evaluated_on(made):
    """Other draws than the first of any other split with the same seed."""
    positions = read_scenes(made / "scenes.json").src_pos
    for split in (rng.Split.TRAIN, rng.Split.TEST):
        for index in range(3):
            generator = rng.generator(0, split, rng.Stream.SCENE, index)
            assert not torch.isin(sample_scenes(SceneConfig(), 3, generator=generator).src_pos, positions).any()


DEFAULT = "rir.num_images=[1024, 4096]"  # a choice of method=fra, which tiny.yaml makes
HYBRID, ISM = (("rir.method=hybrid", DEFAULT), ("rir.method=ism", DEFAULT))


@pytest.mark.parametrize("change", [("rir.images_per_s=[500, 1000]",), HYBRID, ISM,
                                    ("rir.hybrid_share=0.4", "rir.ism_share=0.3", "rir.decay=measured"),
                                    ("rir.images_per_s=[500, 1000]", "rir.hybrid_share=0.5")])
def test_every_kind_of_set_renders_the_same_again(change, folder):
    """All of its list, and every scene in it alone: what others of the list hold does not matter."""
    change = (*change, "scene.rt60_s=[0.15, 0.3]", "ism.absorption=eyring")
    assert start("--num-scenes", 5, "--seed", 3, "--out", "a", *change) == 0
    assert start("--scenes", "a/scenes.json", "--seed", 3, "--out", "b", *change) == 0
    assert contents("a") == contents("b")
    entries = entries_of("a")
    entries[3]["num_images"] = 9000
    Path("many.json").write_text(json.dumps(entries))
    assert start("--scenes", "many.json", "--num-scenes", 3, "--seed", 3, "--out", "c", *change) == 0
    assert [contents("c")[f"rir_{i}.npy"] for i in range(3)] == [contents("a")[f"rir_{i}.npy"] for i in range(3)]


def test_another_method_than_a_lists_is_pointed_out(folder, capsys):
    assert start("--num-scenes", 2, "--out", "a") == 0
    capsys.readouterr()
    assert start("--scenes", "a/scenes.json", "--out", "b", *HYBRID, "ism.absorption=eyring") == 0
    assert "warning: 2 of 2 scenes of a/scenes.json were rendered by another method there" in capsys.readouterr().err
    assert start("--scenes", "a/scenes.json", "--out", "c") == 0
    assert "warning" not in capsys.readouterr().err


def test_given_list_renders_the_same_rirs_again(made, folder):
    """With the same seed, to the byte; with patterns too, whose orientations the list keeps."""
    assert start("--scenes", made / "scenes.json", "--out", "again", "--wav") == 0
    assert contents("again") == contents(made)
    patterns = ("rir.src_pattern=cardioid", "rir.mic_pattern=half_omni", "scene.rotate=true")
    assert start("--num-scenes", 2, "--out", "a", *patterns) == 0
    assert start("--scenes", "a/scenes.json", "--out", "b", *patterns) == 0
    assert contents("a") == contents("b")
    assert contents("a")["rir_0.npy"] != contents(made)["rir_0.npy"]


def test_first_scenes_of_a_list(made, folder):
    assert start("--scenes", made / "scenes.json", "--num-scenes", 2, "--out", "two", "--wav") == 0
    assert entries_of("two") == entries_of(made)[:2]


def test_the_originals_evaluation_rooms_can_be_rendered(folder):
    write_json("eval.json", scene_entries(original_scenes()[:2]))
    assert start("--scenes", "eval.json", "--out", "set") == 0
    known = json.loads((Path(__file__).parent / "golden/original_scenes.json").read_text())["eval"]
    assert [[entry["mic_pos"], entry["src_pos"]] for entry in entries_of("set")] == known[:2]
    assert [entry["num_images"] for entry in entries_of("set")] == original_scenes().num_images[:2].tolist()


def test_every_method_is_rendered(folder):
    """Hybrid rooms differ from FRA-RIR's, and are refused where their walls cannot have the RT60."""
    long = ("scene.rt60_s=[0.5, 0.7]",)
    for name, change in (("fra", ()), ("hybrid", HYBRID)):
        assert start("--num-scenes", 1, "--out", name, *long, *change) == 0
    assert entries_of("fra")[0]["src_pos"] == entries_of("hybrid")[0]["src_pos"]
    fra, hybrid = np.load("fra/rir_0.npy"), np.load("hybrid/rir_0.npy")
    assert fra.shape == hybrid.shape and not np.allclose(fra, hybrid, atol=0.1 * np.abs(fra).max())


def test_a_set_says_how_each_of_its_rooms_was_rendered(folder):
    """The number of images as drawn, the absorption of walls by Sabine's formula, and which had to be clamped."""
    assert start("--num-scenes", 3, "--out", "fra") == 0
    for entry in entries_of("fra"):
        assert entry["method"] == "fra" and 64 <= entry["num_images"] <= 128
        assert entry["absorption"] is entry["clamped"] is None and entry["sample_rate"] == 16000
    assert load_config(RunConfig, "fra/config.yaml") == load_config(RunConfig, "tiny.yaml")
    mixed = ("rir.hybrid_share=0.4", "rir.ism_share=0.4", "ism.clamp_infeasible=true", "ism.tail_arrivals=50",
             "scene.rt60_s=[0.05, 0.2]")
    assert start("--num-scenes", 12, "--out", "mixed", *mixed) == 0
    entries = entries_of("mixed")
    assert {entry["method"] for entry in entries} == {"fra", "ism", "hybrid"}
    walls = [entry for entry in entries if entry["method"] != "fra"]
    assert {entry["clamped"] for entry in walls} == {True, False}
    assert all((entry["num_images"] is None) == (entry["method"] != "fra") for entry in entries)
    for entry in walls:
        x, y, z = entry["room_dim"]
        sabine = 24 * math.log(10) / 340 * x * y * z / (2 * (x * y + y * z + z * x)) / entry["rt60"]
        assert entry["absorption"] == pytest.approx(min(sabine, 0.99)) and entry["clamped"] == (sabine > 0.99)
    assert start("--scenes", "mixed/scenes.json", "--out", "again", *mixed) == 0
    assert entries_of("again") == entries
    assert np.array_equal(np.load("again/rir_7.npy"), np.load("mixed/rir_7.npy"))


def test_a_list_may_say_how_many_images_a_scene_has(folder):
    """More than the configuration draws, too."""
    scenes = original_scenes()[:2]
    write_json("few.json", scene_entries(replace(scenes, num_images=torch.tensor([300, 1]))))
    assert torch.equal(read_scenes("few.json").num_images, torch.tensor([300, 1]))
    assert start("--scenes", "few.json", "--out", "set") == 0
    assert [entry["num_images"] for entry in entries_of("set")] == [300, 1]
    first, second = scene_entries(scenes)
    Path("some.json").write_text(json.dumps([first, {**second, "num_images": None}]))
    assert read_scenes("some.json").num_images.tolist() == [int(scenes.num_images[0]), 0]
    assert start("--scenes", "some.json", "--out", "drawn") == 0
    assert entries_of("drawn")[0]["num_images"] == int(scenes.num_images[0])
    assert 64 <= entries_of("drawn")[1]["num_images"] <= 128
    entries = scene_entries(replace(scenes, num_images=None))
    assert [entry["num_images"] for entry in entries] == [None, None]
    Path("none.json").write_text(json.dumps(entries))
    assert read_scenes("none.json").num_images is None


def test_infeasible_scene_of_a_list_is_named(folder, capsys):
    scenes = make_scenes([[6, 5, 3], [9, 6, 4]], [0.6, 0.05], [[[2, 2, 1], [2.1, 2, 1]]] * 2, [[[3, 3, 1.5]]] * 2)
    write_json("list.json", scene_entries(scenes))
    assert start("--scenes", "list.json", "--out", "set", *HYBRID) == 2
    assert capsys.readouterr().err.startswith("error: list.json: scene 1: rt60 = 0.05 s is infeasible")
    assert start("--scenes", "list.json", "--num-scenes", 1, "--out", "set", *HYBRID) == 0


def test_infeasible_law_matters_only_where_scenes_are_drawn(folder, capsys):
    """The default law asks for 0.1 s in 10 x 6 x 4 m, which no walls can do."""
    assert start("--num-scenes", 1, "--out", "drawn", *ISM) == 2
    assert "scene.rt60_s" in capsys.readouterr().err and not Path("drawn").exists()


def test_what_says_nothing_of_given_scenes_is_told(folder, capsys):
    """Nor has a line between microphones at one place, as of a coincident pair, any angle to it."""
    scenes = make_scenes([[6, 5, 3]] * 2, [0.4] * 2, [[[2, 2, 1], [2.1, 2, 1]], [[2, 2, 1]] * 2], [[[3, 3, 1.5]]] * 2)
    write_json("list.json", scene_entries(scenes))
    capsys.readouterr()
    assert start("--scenes", "list.json", "--out", "set", "scene.num_mics=4") == 0
    assert "warning: scene.num_mics has no effect: the scenes are those of --scenes\n" in capsys.readouterr().err
    line, place = entries_of("set")
    assert line["cone_angle_deg"] is not None and place["azimuth_deg"] is place["cone_angle_deg"] is None
    assert simulate.main(["scene.num_mics=4", "--num-scenes", "1", "--out", "x"]) == 2
    assert capsys.readouterr().err == "error: a configuration must come first, a YAML file, got scene.num_mics=4\n"


@pytest.mark.parametrize("wav", [False, True])
def test_settings_that_change_nothing_are_told(wav, folder, capsys):
    settings = ("train.steps=9", "mixture.sensor_snr_db=[0, 0]", "speech.train=x", "target.grid_deg=5", "scene.bank=2",
                "model.dropout=0", "features.hop=128", "simulator.chunk=1", "eval.num_clips=1", "rir.early=false")
    few = ("speech.voices_speakers=2", "speech.voices_utterances=1")
    assert start("--num-scenes", 1, "--out", "set", *settings, *(("--wav", *few) if wav else ())) == 0
    told = [line for line in re.split("[\r\n]", capsys.readouterr().err) if line.startswith("warning")]
    everywhere = ["warning: scene.bank has no effect: every scene is another room",
                  "warning: train.steps, speech.train, target.grid_deg, model.dropout, features.hop, simulator.chunk, "
                  "eval.num_clips, rir.early have no effect: scenes are rendered one by one on a CPU, by --seed, "
                  "--num-scenes and --targets, and nothing is trained"]
    assert told == everywhere + ([] if wav else ["warning: mixture.sensor_snr_db has no effect: there are mixtures "
                                                 "with --wav only"])


def test_every_method_has_its_own_decay_in_the_line_of_the_end(folder, capsys):
    assert start("--num-scenes", 8, "--out", "set", "rir.hybrid_share=0.5", "ism.absorption=eyring") == 0
    ratios = re.search(r", T20 (\S+) \(fra, rir.decay=nominal\) and (\S+) \(hybrid\) x rt60 in the median",
                       capsys.readouterr().out)
    assert float(ratios[1]) > 1.5 > float(ratios[2]) > 0.7


def test_a_single_microphone_has_no_angles(folder):
    assert start("--num-scenes", 1, "--out", "set", "scene.num_mics=1") == 0
    [entry] = entries_of("set")
    assert entry["azimuth_deg"] is None and entry["cone_angle_deg"] is None and len(entry["drr_db"]) == 1
    assert math.hypot(*entry["direction"][0]) == pytest.approx(1)


def test_measures_that_do_not_exist_are_null(made):
    """JSON has no word for NaN and infinity."""
    rir = torch.from_numpy(np.load(made / "rir_0.npy"))[None]
    scene = read_scenes(made / "scenes.json")[:1]
    measures = measure_rirs(RirBatch(rir, None, torch.tensor([rir.shape[-1]]), 16000), scene)
    nothing = torch.full_like(measures.t20, math.nan)
    measures = replace(measures, t20=nothing, c50_db=torch.full_like(nothing, -math.inf))
    entry = simulate.describe(scene, {}, measures, 0, 0)
    assert entry["t20"] == entry["c50_db"] == [[None, None], [None, None]]
    assert entry["drr_db"] == measures.drr_db[0].tolist()


# ---- lists of scenes ----


def test_list_gives_scenes_back_to_the_last_bit(tmp_path):
    scenes = sample_scenes(SceneConfig(rotate=True, num_mics=3, mic_orientation_deg=(10, 20)), 20,
                           generator=torch.Generator().manual_seed(0))
    write_json(tmp_path / "list.json", scene_entries(scenes))
    again = read_scenes(tmp_path / "list.json")
    for name in TENSORS:
        assert torch.equal(getattr(again, name), getattr(scenes, name)), name
    assert again.max_rt60 == float(scenes.rt60.max())


ENTRY = dict(room_dim=[6, 5, 3.0], rt60=0.3, mic_pos=[[1, 1, 1], [1.1, 1, 1]], src_pos=[[2, 2, 2]])


def test_smallest_list(tmp_path):
    """Four keys are enough, and others do not matter."""
    (tmp_path / "list.json").write_text(json.dumps([ENTRY, {**ENTRY, "rt60": 1, "comment": None, "array_pos": 3}]))
    scenes = read_scenes(tmp_path / "list.json")
    assert scenes.rt60.tolist() == [0.3, 1.0] and scenes.src_pos.tolist() == [[[2, 2, 2]]] * 2
    assert not scenes.mic_orientation.any() and scenes.src_orientation.shape == (2, 1, 2)


def test_orientations_of_some_scenes_only(tmp_path):
    """(0, 0) where they are missing or null, whichever scene comes first."""
    looking = {**ENTRY, "mic_orientation": [[1, 2], [3, 0.5]], "src_orientation": [[0.1, 0.2]]}
    neither = {**ENTRY, "mic_orientation": None, "src_orientation": None}
    (tmp_path / "list.json").write_text(json.dumps([ENTRY, looking, neither]))
    scenes = read_scenes(tmp_path / "list.json")
    assert scenes.mic_orientation.tolist() == [[[0, 0], [0, 0]], [[1, 2], [3, 0.5]], [[0, 0], [0, 0]]]
    assert scenes.src_orientation.tolist() == [[[0, 0]], [[0.1, 0.2]], [[0, 0]]]
    (tmp_path / "none.json").write_text(json.dumps([neither]))
    assert not read_scenes(tmp_path / "none.json").mic_orientation.any()


def test_keys_that_mean_nothing_are_pointed_out(folder, capsys):
    """In one line, each once; what scenes.json says of a scene beside what is read is known, by any method."""
    typo = {**ENTRY, "mic_orientaton": [[0, 1], [0, 1]]}
    Path("typo.json").write_text(json.dumps([ENTRY, typo, {**typo, "room\n": 1}]))
    assert start("--scenes", "typo.json", "--out", "set") == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert line == ("warning: typo.json: 'mic_orientaton', 'room\\n' are ignored; of a scene are read room_dim, rt60, "
                    "mic_pos, src_pos, mic_orientation, src_orientation, num_images")
    for method in ((), HYBRID):
        assert start("--scenes", "set/scenes.json", "--out", "again", "--force", *method, "ism.absorption=eyring") == 0
        assert "ignored" not in capsys.readouterr().err


CM = "warning: list.json: scene 1: a room of 600 x 500 x 300 m; lengths are in m\n"


@pytest.mark.parametrize("scale, rt60, count, said, refused", [
    (30.0, 1.0, None, "", ""), (100.0, 1.0, 2, CM, ""), (100.0, 1.0, 1, "", ""),
    (100.0, 1.0, None, CM.replace("1:", "1 and 1 more:"), ""),
    (100.0, 0.3, 2, CM, "340 m/s \\* rt60 = 102 m must exceed the distance")])
def test_rooms_in_cm_are_doubted(scale, rt60, count, said, refused, folder, capsys):
    lengths = {"room_dim": [6, 5, 3], "mic_pos": [[2, 2, 1.2], [2.1, 2, 1.2]], "src_pos": [[4, 3, 1.6]]}
    grown = {"rt60": rt60, **{key: (np.array(value) * scale).tolist() for key, value in lengths.items()}}
    Path("list.json").write_text(json.dumps([{"rt60": 0.4, **lengths}, grown, grown]))
    with pytest.raises(ValueError, match=refused) if refused else contextlib.nullcontext():
        simulate.given_scenes(load_config(RunConfig, "tiny.yaml"), "list.json", count)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("room", [None, True, "600", [600, 500], ["a", 500, 300], [600, [5], None], [600, 500, True],
                                  [10 ** 400, 500, 300], [-600, 500, 300], {"x": 600}])
def test_rooms_that_are_none_are_not_doubted_but_refused(room, folder, capsys):
    entry = {"rt60": 0.4, "mic_pos": [[2, 2, 1.2], [2.1, 2, 1.2]], "src_pos": [[4, 3, 1.6]], "room_dim": room}
    Path("list.json").write_text(json.dumps([entry]))
    with pytest.raises(ValueError, match="^list.json: scene 0"):
        simulate.given_scenes(load_config(RunConfig, "tiny.yaml"), "list.json", None)
    assert capsys.readouterr().err == ""


def test_readme_and_help_show_the_smallest_list(folder):
    """The same line, and it renders."""
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    [shown] = [line for line in simulate.__doc__.splitlines() if line.startswith("[{")]
    assert shown in readme.splitlines() and set(json.loads(shown)[0]) == set(REQUIRED)
    for name in OPTIONAL:
        assert name in simulate.__doc__ and f"`{name}`" in readme
    Path("list.json").write_text(shown)
    assert start("--scenes", "list.json", "--out", "set") == 0


def without(name):
    return {key: value for key, value in ENTRY.items() if key != name}


@pytest.mark.parametrize("entries, message", [
    ([], "must hold a list of scenes, got []"),
    ({"scenes": [ENTRY]}, 'must hold a list of scenes, got {"scenes": [{"room_dim": [6, 5, 3.0], "rt60": 0.3, '
                          '"mic_pos": [[1, 1, 1], [1....'),
    ([ENTRY, 3], "scene 1 must be a mapping of room_dim, rt60, mic_pos and src_pos, got 3"),
    ([ENTRY, without("rt60")], "scene 1 has no rt60, it has room_dim, mic_pos, src_pos"),
    ([without("room_dim")], "scene 0 has no room_dim, it has rt60, mic_pos, src_pos"),
    ([{}], "scene 0 has no room_dim, it has nothing"),
    ([{**ENTRY, "num_images": "3"}], 'scene 0: num_images must be a finite number, got "3"'),
    ([{**ENTRY, "num_images": 2.5}], "scene 0: num_images must be whole and in 0..1000000, 0 to be drawn, got 2.5"),
    ([{**ENTRY, "num_images": 1e19}], "scene 0: num_images must be whole and in 0..1000000, 0 to be drawn, got 1e+19"),
    ([{**ENTRY, "rt60": 1e9}], "scene 0: rt60 must be <= 100 s, got 1e+09"),
    ([{**ENTRY, "rt60": "0.3"}], 'scene 0: rt60 must be a finite number, got "0.3"'),
    ([{**ENTRY, "rt60": True}], "scene 0: rt60 must be a finite number, got true"),
    ([{**ENTRY, "rt60": [0.3]}], "scene 0: rt60 must be a finite number, got [0.3]"),
    ([{**ENTRY, "rt60": math.nan}], "scene 0: rt60 must be a finite number, got NaN"),
    ([{**ENTRY, "room_dim": [6, 5]}], "scene 0: room_dim must be [3] finite numbers, got [6, 5]"),
    ([{**ENTRY, "room_dim": [6, 5, math.inf]}], "scene 0: room_dim must be [3] finite numbers, got [6, 5, Infinity]"),
    ([{**ENTRY, "room_dim": None}], "scene 0: room_dim must be [3] finite numbers, got null"),
    ([{**ENTRY, "src_pos": [2, 2, 2]}], "scene 0: src_pos must be [src, 3] finite numbers, got [2, 2, 2]"),
    ([{**ENTRY, "src_pos": []}], "scene 0: src_pos must be [src, 3] finite numbers, got []"),
    ([{**ENTRY, "src_pos": [[2, 2, 2], [2, 2]]}], "scene 0: src_pos must be [src, 3] finite numbers, "
                                                  "got [[2, 2, 2], [2, 2]]"),
    ([ENTRY, {**ENTRY, "mic_pos": [[1, 1, 1]]}], "scene 1: mic_pos must be [mic=2, 3] finite numbers, as many as in "
                                                 "the scenes before, got [[1, 1, 1]]"),
    ([{**ENTRY, "mic_orientation": [[0, 0]]}], "scene 0: mic_orientation must be [mic=2, 2] finite numbers, "
                                               "got [[0, 0]]"),
    ([ENTRY, {**ENTRY, "rt60": 0}], "scene 1: rt60 must be > 0 s, got 0"),
    ([ENTRY, {**ENTRY, "src_pos": [[2, 7, 2]]}], "scene 1: source 0 must be inside the room [6.0, 5.0, 3.0], got "
                                                 "[2.0, 7.0, 2.0]"),
])
def test_list_that_cannot_be_used_is_refused_in_one_line(entries, message, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(entries))
    with pytest.raises(SceneListError) as error:
        read_scenes(path)
    assert str(error.value) in (f"{path} {message}", f"{path}: {message}")


@pytest.mark.parametrize("content, message", [
    (b"[{", "{path} is not JSON: line 1, column 3: Expecting property name enclosed in double quotes"),
    (b"[\n1,\n]", "{path} is not JSON: line "),
    (b"\xff\xfe\xfa", "{path} is not JSON: "),
    (b"[" * 100_000, "{path} is not JSON: "),
    (b"[" + b"1" * 5000 + b"]", "{path} is not JSON: "),  # more digits than Python converts
    (None, "cannot read scene list {path}: No such file or directory"),
])
def test_file_that_is_no_list_is_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "list.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SceneListError) as error:
        read_scenes(path)
    text = str(error.value)
    assert text.startswith(message.format(path=path)) and "\n" not in text and len(text) < 250


def test_entries_hold_plain_numbers():
    [entry] = scene_entries(original_scenes()[7:8])
    assert json.loads(json.dumps(entry)) == entry and entry["array_pos"][0][0] == pytest.approx(
        0.5 * (entry["mic_pos"][0][0] + entry["mic_pos"][1][0]))


def test_readme_and_help_name_every_file():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for name in ("rir_<i>.npy", "scenes.json", "config.yaml", "mix_<i>.wav", "early_<i>_<src>.wav", "scene_<i>.png"):
        assert simulate.OURS.fullmatch(name.replace("<i>", "0").replace("<src>", "0"))
        assert f"`{name}`" in readme and name in simulate.__doc__


# ---- mistakes, and what is left of a folder ----


@pytest.mark.parametrize("arguments, message", [
    (["--num-scenes", 0], "--num-scenes must be >= 1, got 0"),
    (["--num-scenes", 1, "--targets"], "--targets needs --wav, the mixtures that they belong to"),
    (["--num-scenes", -2], "--num-scenes must be >= 1, got -2"),
    ([], "--num-scenes N must say how many scenes to draw, unless --scenes FILE gives them"),
    (["--num-scenes", 1, "--seed", -1], "--seed must satisfy 0 <= seed <= 18446744073709551615, got -1"),
    (["--num-scenes", 1, "--seed", 2 ** 64], "--seed must satisfy 0 <= seed <= 18446744073709551615, got 1844674407370"
                                             "9551616"),
    (["--num-scenes", 1, "rir.rate=3"], "unknown key rir.rate, got 3; the configuration has"),
    (["--num-scenes", 1, "scene.num_src=0"], "scene.num_src must be >= 1, got 0"),
    (["--num-scenes", 1, "scene.pool=original", "scene.bank=5", "rir.num_images=[1024, 4096]"],
     "scene.pool must be law, others are for training; give other rooms by --scenes FILE, got original"),
    (["--num-scenes", 1, "--wav", "scene.num_src=5"],
     "speech.eval must hold at least 5 speakers, one per source, got 3 in the synthetic voices"),
    (["--num-scenes", 1, "--wav", "speech.eval=nowhere"], "speech.eval must be an existing folder, got 'nowhere'"),
    (["--num-scenes", 99, "scene.room_max_m=[3, 3, 2.5]", "scene.src_dist_m=[1.5, 5]"], "scene "),
    (["--scenes", "none.json"], "cannot read scene list none.json: No such file or directory"),
    (["--scenes", "one.json", "--num-scenes", 2], "--num-scenes must be <= 1, the scenes in one.json, got 2"),
])
def test_mistake_costs_one_line_and_writes_nothing(arguments, message, folder, capsys):
    write_json("one.json", scene_entries(original_scenes()[:1]))
    before = sorted(folder.iterdir())
    assert start(*arguments, "--out", "set") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {message}") or message.startswith("unknown") and "rir.rate" in last
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("out, message", [
    ("tiny.yaml", "--out must be a folder, got the file "),
    ("tiny.yaml/set", "cannot write "),
    ("/proc/none/set", "cannot write /proc/none/set: No such file or directory"),
    (".", "--out must be a new or empty folder, or one to replace by --force, got "),
])
def test_place_that_cannot_be_written_costs_one_line(out, message, folder, capsys):
    before = sorted(folder.iterdir())
    assert start("--num-scenes", 1, "--out", out) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith(f"error: {message}") and captured.out == ""
    assert sorted(folder.iterdir()) == before


def test_set_is_replaced_only_by_force_and_then_as_a_whole(folder, capsys):
    assert start("--num-scenes", 2, "--out", "set", "--wav") == 0
    before = contents("set")
    assert start("--num-scenes", 1, "--out", "set") == 2
    assert "with config.yaml" in capsys.readouterr().err and contents("set") == before
    assert start("--num-scenes", 1, "--out", "set", "--force") == 0
    assert sorted(contents("set")) == ["config.yaml", "rir_0.npy", "scenes.json"]
    assert sorted(path.name for path in folder.iterdir()) == ["set", "tiny.yaml"]


def test_force_spares_what_no_run_wrote(folder, capsys):
    (folder / "set").mkdir()
    (folder / "set" / "thesis.tex").write_text("x")
    assert start("--num-scenes", 1, "--out", "set", "--force") == 2
    assert "holds thesis.tex" in capsys.readouterr().err and list(contents("set")) == ["thesis.tex"]


def test_new_folders_are_made_and_empty_ones_filled(folder):
    (folder / "empty").mkdir()
    for out in ("empty", "a/b/c"):
        assert start("--num-scenes", 1, "--out", out) == 0
        assert len(contents(out)) == 3


@pytest.mark.parametrize("failure, status, message", [
    (OSError(28, "No space left on device"), 2, "error: cannot write "), (KeyboardInterrupt(), 130, "interrupted"),
])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_everything_as_it_was(failure, status, message, existing, folder, monkeypatch, capsys):
    if existing:
        assert start("--num-scenes", 1, "--out", "set", "--seed", 3) == 0
    before = [sorted(folder.iterdir()), contents("set") if existing else None]
    real = simulate.measure_rirs
    calls = []

    def fail_on_the_second(*arguments):
        calls.append(None)
        if len(calls) == 2:
            assert len(list(folder.glob(".set.*.tmp/rir_1.npy"))) == 1   # something is there by now, out of sight
            raise failure
        return real(*arguments)

    monkeypatch.setattr(simulate, "measure_rirs", fail_on_the_second)
    assert start("--num-scenes", 3, "--out", "set", "--force") == status
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert [sorted(folder.iterdir()), contents("set") if existing else None] == before


def test_old_set_comes_back_when_the_new_one_cannot_take_its_place(folder, monkeypatch):
    assert start("--num-scenes", 1, "--out", "set") == 0
    before, real = contents("set"), os.rename

    def refuse_the_new(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(16, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(os, "rename", refuse_the_new)
    assert start("--num-scenes", 2, "--out", "set", "--force") == 2
    assert contents("set") == before
    assert sorted(path.name for path in folder.iterdir()) == ["set", "tiny.yaml"]


def test_what_appeared_meanwhile_is_not_overwritten(folder, monkeypatch):
    """Two runs into the same folder: the second to finish gives way."""
    real = simulate.measure_rirs

    def appear(*arguments):
        (folder / "set").mkdir()
        (folder / "set" / "rir_0.npy").write_bytes(b"of another run")
        return real(*arguments)

    monkeypatch.setattr(simulate, "measure_rirs", appear)
    assert start("--num-scenes", 1, "--out", "set") == 2
    assert contents("set") == {"rir_0.npy": b"of another run"}
    assert sorted(path.name for path in folder.iterdir()) == ["set", "tiny.yaml"]


def test_progress_and_summary_are_shown(folder, capsys):
    assert start("--num-scenes", 2, "--out", "set") == 0
    captured = capsys.readouterr()
    assert "simulating" in captured.err and "2/2" in captured.err
    assert captured.out.startswith(f"{folder / 'set'}: 2 scenes, 2 mic x 2 src, at 16000 Hz, ")


# ---- pictures ----


def test_pictures_of_the_first_scenes_only(folder, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(simulate, "MAX_PLOTS", 1)
    assert start("--num-scenes", 2, "--out", "set", "--plot") == 0
    assert sorted(contents("set")) == ["config.yaml", "rir_0.npy", "rir_1.npy", "scene_0.png", "scenes.json"]
    assert contents("set")["scene_0.png"].startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(folder, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert start("--num-scenes", 1, "--out", "set", "--plot") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: plots need matplotlib, install it with pip install matplotlib")
    assert start("--num-scenes", 1, "--out", "set") == 0


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draws a scene as draw_scene does, and returns the matplotlib figure it saved."""
    matplotlib_figure = pytest.importorskip("matplotlib.figure")
    saved = []
    real = matplotlib_figure.Figure.savefig
    monkeypatch.setattr(matplotlib_figure.Figure, "savefig",
                        lambda self, *args, **kwargs: (saved.append(self), real(self, *args, **kwargs))[1])

    def draw(scene, **change):
        cfg = RirConfig(num_images=(64, 64), early=False)
        rirs = render_rir(cfg, scene, draw_images(cfg, scene, generator=torch.Generator().manual_seed(0)))
        plots.draw_scene(tmp_path / "scene.png", scene, rirs, replace(measure_rirs(rirs, scene), **change), "a title")
        return saved[-1], rirs

    return draw


def test_picture_shows_room_sources_and_decay(figure):
    scene = make_scenes([[6, 5, 3]], [0.3], [[[2, 2, 1], [2.1, 2, 1]]], [[[3, 3, 1.5], [1, 4, 2.5]]])
    drawn, rirs = figure(scene)
    plan, elevation, *rows, decay = [axes for part in drawn.subfigs for axes in part.axes]
    for view, up in ((plan, 1), (elevation, 2)):
        [room] = view.patches[:1]
        assert (room.get_width(), room.get_height()) == ((6, 5, 3)[0], (6, 5, 3)[up])
        dots = [line.get_xydata().tolist() for line in view.lines if line.get_marker() == "o"]
        assert dots == [[[3, (3, 3, 1.5)[up]]], [[1, (1, 4, 2.5)[up]]]]
    labels = plan.get_legend_handles_labels()[1]
    assert labels[0] == "source 0: azimuth 46°, cone 50°, 1.47 m away, 1.50 m high"
    assert labels[2] == "2 microphones, 1.00 m high"
    for src, row in enumerate(rows):
        np.testing.assert_array_equal(row.lines[0].get_ydata(), rirs.full[0, 0, src])
    curves = [line.get_ydata() for line in decay.lines if line.get_linestyle() == "-"]
    assert len(curves) == 2 and all(curve[0] == 0 and (np.diff(curve) <= 0).all() for curve in curves)
    assert "room 6.00 x 5.00 x 3.00 m" in drawn.subfigs[0].get_suptitle()


def test_line_of_t20_has_its_slope(figure):
    scene = make_scenes([[6, 5, 3]], [0.5], [[[2, 2, 1], [2.1, 2, 1]]], [[[4.5, 3, 1.5]]])
    drawn, rirs = figure(scene)
    [dotted] = [line for line in drawn.subfigs[1].axes[-1].lines if line.get_linestyle() == ":"]
    (x0, y0), (x1, y1) = dotted.get_xydata()
    t20 = float(measure_rirs(rirs, scene).t20[0, 0, 0])
    assert (x1 - x0) / (y0 - y1) * 60 == pytest.approx(1000 * t20)
    curve = next(line for line in drawn.subfigs[1].axes[-1].lines if line.get_linestyle() == "-")
    level = np.interp(0.5 * (x0 + x1), *curve.get_xydata().T)
    assert level == pytest.approx(-20, abs=3)


@pytest.mark.parametrize("mics, sources", [
    ([[2, 2, 1]], [[3, 3, 1.5]]),                                       # no axis
    ([[2, 2, 1], [2, 2, 1.3]], [[3, 3, 1.5]]),                          # an axis that the plan sees as a point
    ([[2, 2, 1], [2.1, 2, 1]], [[1 + i, 3, 1.5] for i in range(4)] + [[3, 1, 1]] * 3),  # more than there are colours
], ids=["one mic", "vertical", "many sources"])
def test_scenes_of_every_kind_can_be_drawn(mics, sources, figure):
    drawn, _ = figure(make_scenes([[6, 5, 3]], [0.1], [mics], [sources]))
    assert len(drawn.subfigs[1].axes) == min(len(sources), 4) + 1


def test_without_t20_there_is_no_line(figure):
    scene = make_scenes([[6, 5, 3]], [0.1], [[[2, 2, 1]]], [[[2.1, 2, 1]]])
    drawn, _ = figure(scene, t20=torch.full((1, 1, 1), math.nan))
    assert [line.get_linestyle() for line in drawn.subfigs[1].axes[-1].lines] == ["-"]
