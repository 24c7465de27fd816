"""The evaluation sets: what they are made of, that they are the same everywhere, and that training never meets them."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

from ssl_gpu import protocol, rng
from ssl_gpu.clips import DERIVED, Digest, Truth
from ssl_gpu.config import RunConfig, from_mapping
from ssl_gpu.measured import read_measured
from ssl_gpu.pretrained import build_localizer
from ssl_gpu.protocol import (NUM_SAMPLES, SetOptions, clips_of, draw_fresh, draw_original, eval_rooms_trained_in,
                              num_clips)
from ssl_gpu.rir import RirConfig
from ssl_gpu.run import prepare, training_speech
from ssl_gpu.scene import Pool, SceneConfig, original_scenes, sample_scenes
from ssl_gpu.simulator import Simulator
from ssl_gpu.speech import make_bank
from ssl_gpu.train import draw_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def speech():
    """Noise of 5 speakers, 4 utterances each, a little less or more than 3 s."""
    length = torch.tensor([NUM_SAMPLES + 1000 * (k % 4) - 1500 for k in range(20)])
    samples = (3000 * torch.randn(int(length.sum()), generator=torch.Generator().manual_seed(0))).to(torch.int16)
    names = tuple(f"{k // 4}/{k}.flac" for k in range(20))
    return make_bank(samples, length, torch.arange(20) // 4, names, 16000)


def all_clips(name, speech, count, **options):
    return list(clips_of(name, SetOptions(speech, CPU, count, **options)))


def plain(entries):
    """Without what follows from the rest, whose last digits depend on how many clips are made at once."""
    return [{key: value for key, value in entry.items() if key not in DERIVED} for entry in entries]


def digest_of(parts):
    digest = Digest()
    for part in parts:
        digest.add(part)
    return str(digest)


def test_original_protocol_uses_its_rooms_and_every_utterance_once_as_the_first_talker(speech):
    scenes, crops, room = draw_original(SetOptions(speech, CPU))
    assert torch.equal(crops.utterance[:, 0], torch.arange(20)) and (crops.offset == 0).all()
    assert (speech.speaker[crops.utterance[:, 0]] != speech.speaker[crops.utterance[:, 1]]).all()
    assert room.min() >= 0 and room.max() < 200
    original = original_scenes()
    assert torch.equal(scenes.src_pos, original.src_pos[room])
    [clips] = all_clips("e0", speech, None)
    assert [entry["num_images"] for entry in clips.entries] == original.num_images[room].tolist()
    assert torch.equal(clips.scene, room) and clips.audio.shape == (20, 2, NUM_SAMPLES)


def test_rooms_of_the_original_protocol_have_one_rir_each_and_the_pools(speech, monkeypatch):
    """The leak itself: to the last bit, what e0 is heard through is what scene.pool=original trains in."""
    simulate = Simulator(SceneConfig(pool="original", bank=200), RirConfig(early=False))
    simulate.fill_bank(generator=torch.Generator().manual_seed(0))
    heard, render = [], protocol.render_rir
    monkeypatch.setattr(protocol, "render_rir", lambda *args: heard.append(render(*args)) or heard[-1])
    length = torch.full((60,), 2000)
    many = make_bank(speech.samples[:int(length.sum())], length, torch.arange(60) // 4,
                     tuple(map(str, range(60))), 16000)
    clips = all_clips("e0", many, None)
    full, room = torch.cat([rirs.full for rirs in heard]), torch.cat([part.scene for part in clips])
    assert len(full) == 60 and torch.equal(full, simulate.bank[1].full[room])
    assert len(room.unique()) < 60  # some room twice, in which only the speech is other
    assert [entry["image_seed"] for part in clips for entry in part.entries] == [[20231, n] for n in room.tolist()]
    fewer = all_clips("e0", many, 7)
    assert plain(fewer[0].entries) == plain(clips[0].entries)[:7]
    assert torch.equal(fewer[0].draws[1], clips[0].draws[1][:7])


@pytest.mark.parametrize("speaker", [[0] * 99 + [1], [0] + [1] * 99, [0] * 60 + [1, 2, 2] + [3] * 60])
def test_the_second_talker_of_the_original_protocol_is_another_one(speaker):
    """Even of a corpus that one talker has nearly to itself, where sixteen candidates may all be of its voice."""
    length = torch.full((len(speaker),), 10)
    bank = make_bank(torch.zeros(int(length.sum()), dtype=torch.int16), length, torch.tensor(speaker),
                     tuple(map(str, speaker)), 16000)
    _, crops, _ = protocol.draw_original(SetOptions(bank, CPU))
    first, second = bank.speaker[crops.utterance].T
    assert torch.equal(crops.utterance[:, 0], torch.arange(len(speaker))) and (first != second).all()


def test_sets_have_their_sizes(speech):
    sizes = dict.fromkeys(protocol.SETS, 2000) | {"e0": len(speech.length), "e2": 500, "e3": 300}
    for name, size in sizes.items():
        assert num_clips(name, SetOptions(speech, CPU)) == size and num_clips(name, SetOptions(speech, CPU, 7)) == 7


@pytest.mark.parametrize("name", ["e1", "e1p", "e1n5"])
def test_fewer_clips_are_the_first_ones_and_the_digest_knows_them(name, speech):
    some, more = (all_clips(name, speech, count) for count in (3, 55))
    assert [len(part.audio) for part in more] == [50, 5] and num_clips(name, SetOptions(speech, CPU, 55)) == 55
    assert_close(some[0].audio, more[0].audio[:3], rtol=0, atol=1e-5 * float(some[0].audio.abs().max()))
    assert plain(some[0].entries) == plain(more[0].entries)[:3]
    again = all_clips(name, speech, 3)
    assert digest_of(some) == digest_of(again) != digest_of(more)
    changed = replace(some[0], draws=(some[0].draws[0] + 1e-6, *some[0].draws[1:]))
    assert digest_of([changed]) != digest_of(some)
    other = [{**entry, "measured": None, "direction": None} for entry in some[0].entries]
    assert digest_of([replace(some[0], entries=other)]) == digest_of(some)
    assert json.loads(json.dumps(some[0].entries)) == some[0].entries


def test_sets_differ_in_what_they_say_they_differ_in(speech):
    [clean], [noisy], [planar], [b] = (all_clips(name, speech, 8) for name in ("e1", "e1n5", "e1p", "e0b"))
    assert torch.equal(clean.audio, b.audio) and torch.equal(clean.cone, noisy.cone)
    noise = noisy.audio - clean.audio
    snr = 10 * torch.log10(clean.audio.square().mean((1, 2)) / noise.square().mean((1, 2)))
    assert_close(snr, torch.full((8,), 5.0), rtol=0, atol=1e-3)
    assert (noisy.conditions["snr_db"] == 5).all() and clean.conditions["snr_db"].isinf().all()
    assert_close(planar.cone, planar.azimuth.abs(), rtol=0, atol=1e-6)
    assert not torch.allclose(clean.cone, clean.azimuth.abs(), atol=0.01)


def test_digest_is_of_speech_before_arithmetic_and_of_the_seed_of_the_noise(speech, folder):
    """A sum over samples, and normal numbers, have other last bits on another CPU: neither is hashed."""
    rirs = read_measured(str(folder))
    [clean], [noisy], [real] = (all_clips(name, speech, 3, measured=rirs) for name in ("e1", "e1n5", "e3"))
    for clips in (clean, noisy, real):
        whole = clips.draws[0] * 32768
        assert torch.equal(whole, whole.round()) and whole.abs().max() > 1000
    assert [entry["noise_seed"] for entry in noisy.entries] == [[protocol.SEEDS["e1"], 0]] * 3
    assert [entry["noise_seed"] for entry in clean.entries] == [None] * 3
    for clips in (clean, noisy):
        assert [entry["gains"] for entry in clips.entries] == [[1.0, 1.0]] * 3
        for change in ({"noise_seed": [1, 2]}, {"gains": [1.0, 0.5]}):
            other = replace(clips, entries=[entry | change for entry in clips.entries])
            assert digest_of([other]) != digest_of([clips])


def test_circumstances_are_those_of_the_clips(speech):
    [clips] = all_clips("e1", speech, 6)
    conditions = clips.conditions
    for row, entry in enumerate(clips.entries):
        src, centre = np.array(entry["src_pos"]), np.array(entry["array_pos"][0])
        np.testing.assert_allclose(conditions["distance_m"][row], np.linalg.norm(src - centre, axis=-1))
        cosine = (src - centre)[:, 0] / np.linalg.norm(src - centre, axis=-1)
        np.testing.assert_allclose(conditions["angle_deg"][row], np.degrees(np.arccos(cosine)), atol=1e-6)
        assert entry["measured"]["drr_db"] == conditions["drr_db"][row].tolist()
        first, second = map(speech.names.index, entry["utterances"])
        assert first // 4 != second // 4
    truth = Truth.of([clips])
    order = clips.cone.argsort(-1)
    assert torch.equal(truth.conditions["t20_s"], conditions["t20_s"].gather(-1, order))
    assert torch.equal(truth.conditions["separation_deg"], conditions["separation_deg"])


def test_no_scene_of_evaluation_occurs_in_training(speech):
    """Other random streams: not one position of a thousand scenes of any training seed is one of the sets'. The one
    exception has to be asked for, scene.pool=original: it trains in e0's rooms, and in no other set's."""
    def places(scenes):
        return {tuple(row) for row in scenes.mic_pos[:, 0].tolist()}

    fresh = set().union(*(places(draw_fresh(SetOptions(speech, CPU), planar)[0]) for planar in (False, True)))
    known = fresh | places(original_scenes())
    assert len(known) > 6000
    assert SceneConfig().pool is Pool.LAW
    leaking = Simulator(SceneConfig(pool="original", bank=3), RirConfig(early=False))
    leaking.fill_bank(generator=torch.Generator().manual_seed(0))
    trained = places(leaking.bank[0])
    assert trained == places(original_scenes()[:3]) and not trained & fresh
    assert [eval_rooms_trained_in(name, leaking.scene) for name in protocol.SETS] == [3] + [0] * 13
    assert not any(eval_rooms_trained_in(name, SceneConfig(bank=3000)) for name in protocol.SETS)
    for seed in (0, 1, *protocol.SEEDS.values()):
        for step in range(5):
            generator = rng.generator(seed, rng.Split.TRAIN, rng.Stream.SCENE, step)
            scenes = sample_scenes(SceneConfig(), 100, generator=generator)
            assert not places(scenes) & known


def test_training_asks_for_random_streams_of_training_alone(tmp_path, monkeypatch):
    """The trainer's own draws, speech and rooms and noise, whatever the seed; and so do its voices and its weights."""
    asked, generator = [], rng.generator

    def spy(seed, split, stream, *rest, **named):
        asked.append((seed, split, stream))
        return generator(seed, split, stream, *rest, **named)

    cfg = from_mapping(RunConfig, {
        "speech": {"clip_s": 0.5, "voices_speakers": 3, "voices_utterances": 1, "voices_duration_s": 0.6},
        "rir": {"num_images": [64, 128]}, "features": {"num_bands": 4, "num_delays": 17},
        "model": {"channels": 4, "dim": 16, "depth": 1, "heads": 2}, "eval": {"num_clips": 2},
        "mixture": {"diffuse_snr_db": [0, 20]},
        "train": {"steps": 3, "device": "cpu", "batch_size": 2, "seed": protocol.SEEDS["e1"]}})
    run = prepare(cfg, tmp_path, None)
    monkeypatch.setattr("ssl_gpu.rng.generator", spy)
    for step in range(3):
        draw_batch(run, step)
    training_speech(cfg, CPU)
    build_localizer(cfg)
    assert {stream for _, _, stream in asked} == {rng.Stream.SPEECH, rng.Stream.SCENE, rng.Stream.VOICES,
                                                  rng.Stream.MODEL}
    assert {(seed, split) for seed, split, _ in asked} == {(protocol.SEEDS["e1"], rng.Split.TRAIN)}


@pytest.fixture
def folder(tmp_path):
    """Four measured RIRs, each a delta per channel; a source beyond channel 2 reaches it first."""
    rirs = []
    for index, (cone, late) in enumerate(((0.0, 4), (90.0, 0), (60.0, 2), (180.0, -4))):
        audio = np.zeros((300 + index, 2), np.float32)
        audio[100, 1] = audio[100 + late, 0] = 0.5
        soundfile.write(tmp_path / f"{index}.wav", audio, 16000, subtype="FLOAT")
        rirs.append({"file": f"{index}.wav", "cone_deg": cone, "configuration": "a" if index < 3 else "b",
                     "rt60_s": 0.5, "distance_m": 1.0 + index})
    index = {"mic_spacing_m": 0.09, "speed_of_sound": 343.0, "rirs": rirs}
    (tmp_path / "index.json").write_text(json.dumps(index))
    return tmp_path


def test_measured_rooms_are_heard_as_their_index_says(folder, speech):
    """The only pairs are of the first three RIRs; each clip is two utterances of equal power through two of them."""
    [clips] = all_clips("e3", speech, 12, measured=read_measured(str(folder)))
    assert clips.audio.shape == (12, 2, NUM_SAMPLES)
    assert set(map(tuple, torch.rad2deg(clips.cone).round().tolist())) <= {
        (a, b) for a in (0.0, 60.0, 90.0) for b in (0.0, 60.0, 90.0) if a != b}
    drawn, response = clips.draws
    dry = drawn / drawn.square().mean(-1, keepdim=True).sqrt()
    expected = sum(torch.nn.functional.conv1d(torch.nn.functional.pad(dry[0, s], (responses.shape[-1] - 1, 0))[None],
                                              responses[None, None].flip(-1))[0]
                   for s, responses in enumerate(response[0, 1]))
    assert_close(clips.audio[0, 1], expected, rtol=0, atol=1e-4)
    assert clips.conditions["distance_m"].max() <= 3 and clips.conditions["t20_s"].isnan().all()  # of a single tap
    assert (clips.conditions["snr_db"] == math.inf).all() and clips.conditions["drr_db"].isposinf().all()
    assert_close(clips.conditions["level_gap_db"], torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-4)
    assert float((clips.mic_pos[0, 1] - clips.mic_pos[0, 0]).norm()) == pytest.approx(0.09)


def test_clips_in_measured_rooms_belong_to_two_loudspeaker_positions(folder, speech):
    """One angle and distance are one position in any configuration; without distances, one angle is."""
    index = json.loads((folder / "index.json").read_text())
    for rir, configuration, cone, distance in zip(index["rirs"], "aabb", (30, 60, 30, 30), (1, 1, 1, 2)):
        rir.update(configuration=configuration, cone_deg=cone, distance_m=distance)
    (folder / "index.json").write_text(json.dumps(index))
    [clips] = all_clips("e3", speech, 40, measured=read_measured(str(folder)))
    position = [[["0.wav", "1.wav", "2.wav", "3.wav"].index(file) for file in entry["rirs"]] for entry in clips.entries]
    assert clips.scene.shape == (40, 2)
    numbers = {}
    for files, row in zip(position, clips.scene.tolist()):
        for file, number in zip(files, row):
            assert numbers.setdefault(file, number) == number
    assert numbers[0] == numbers[2] and len({numbers[0], numbers[1], numbers[3]}) == 3
    assert torch.equal(Truth.of([clips, clips]).scene, torch.cat([clips.scene] * 2))
    for rir in index["rirs"]:
        del rir["distance_m"]
    (folder / "index.json").write_text(json.dumps(index))
    [clips] = all_clips("e3", speech, 40, measured=read_measured(str(folder)))
    assert len(clips.scene.unique()) == 2


@pytest.mark.parametrize("change, message", [
    (lambda index: index["rirs"].clear(), "rirs must be a list of at least 2 RIRs, got 0"),
    (lambda index: index.pop("rirs"), "rirs must be a list of at least 2 RIRs, got null"),
    (lambda index: index.update(rirs={"a": 1, "b": 2}), "rirs must be a list of at least 2 RIRs, got {"),
    (lambda index: index["rirs"].append(7), "rirs[4] must be an object with file and cone_deg, got 7"),
    (lambda index: index["rirs"][1].update(cone_deg=181), "cone_deg must be a number from 0 to 180, got 181"),
    (lambda index: index["rirs"][1].update(cone_deg="30"), 'cone_deg must be a number from 0 to 180, got "30"'),
    (lambda index: index["rirs"][1].update(cone_deg=True), "cone_deg must be a number from 0 to 180, got true"),
    (lambda index: index["rirs"][1].update(cone_deg=math.nan), "cone_deg must be a number from 0 to 180, got NaN"),
    (lambda index: index["rirs"][1].update(cone_deg=None), "cone_deg must be a number from 0 to 180, got null"),
    (lambda index: index["rirs"][1].pop("cone_deg"), "rirs[1]: cone_deg must be a number from 0 to 180, got nothing"),
    (lambda index: index["rirs"][3].pop("file"), "rirs[3]: file must be the name of a file, got nothing"),
    (lambda index: index["rirs"][3].update(file=3), "rirs[3]: file must be the name of a file, got 3"),
    (lambda index: index["rirs"][3].update(distance_m="far"),
     'rirs[3]: distance_m must be a finite number or null, got "far"'),
    (lambda index: index["rirs"][3].update(rt60_s=[0.5]), "rirs[3]: rt60_s must be a finite number or null, got [0.5]"),
    (lambda index: index.pop("mic_spacing_m"), "index.json: mic_spacing_m must be a finite number > 0, got nothing"),
    (lambda index: index.update(mic_spacing_m=0), "index.json: mic_spacing_m must be a finite number > 0, got 0"),
    (lambda index: index.update(speed_of_sound=0.0), "index.json: speed_of_sound must be a finite number > 0, got 0.0"),
    (lambda index: index.update(speed_of_sound="fast"), 'speed_of_sound must be a finite number > 0, got "fast"'),
    (lambda index: index.update(speed_of_sound=10 ** 400), "speed_of_sound must be a finite number > 0, got 1000"),
    (lambda index: index["rirs"][2].update(mic_spacing_m=-1), "rirs[2]: mic_spacing_m must be a finite number > 0"),
    (lambda index: index["rirs"][2].update(mic_spacing_m=0.2), "RIRs must have one mic_spacing_m, got 0.09 and 0.2"),
    (lambda index: index["rirs"][2].update(speed_of_sound=9), "RIRs must have one speed_of_sound, got 9 and 343"),
    (lambda index: [rir.update(configuration=k) for k, rir in enumerate(index["rirs"])],
     "index.json must hold two RIRs of one configuration"),
    (lambda index: index["rirs"][0].update(file="none.wav"), "none.wav"),
    (lambda index: index["rirs"][0].update(file="index.raw"), "index.raw: samplerate must be specified"),
])
def test_a_folder_that_cannot_be_is_refused_in_one_line(change, message, folder):
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.raw").write_bytes(bytes(64))
    change(index)
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError) as error:
        read_measured(str(folder))
    assert str(error.value).startswith("e3.dir: ") and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("[1, 2]", " must be an object with mic_spacing_m and speed_of_sound, got [1, 2]"),
    ("null", " must be an object with mic_spacing_m and speed_of_sound, got null"), ("{", " must hold JSON: Expecting"),
    ("[" * 100_000, " must hold JSON: "), ("\0", " must hold JSON: ")])
def test_an_index_that_is_none_is_refused_in_one_line(text, message, tmp_path):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_measured(str(tmp_path))
    assert str(error.value).startswith(f"e3.dir: {tmp_path / 'index.json'}{message}") and "\n" not in str(error.value)


def test_a_folder_of_measured_rirs_may_be_at_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert torch.equal(read_measured(f"~/{folder.name}")[0], read_measured(folder)[0])


def test_null_in_an_index_is_as_good_as_nothing(folder, speech):
    """Clips are the same, with positions by angles alone, and with nothing known of distances and reverberation."""
    found = []
    for value in ({}, {"distance_m": None, "rt60_s": None, "configuration": None, "mic_spacing_m": None}):
        index = json.loads((folder / "index.json").read_text())
        for rir in index["rirs"]:
            for key in ("distance_m", "rt60_s", "configuration"):
                del rir[key]
            rir.update(value)
        (folder / "null").mkdir(exist_ok=True)
        for number in range(4):
            (folder / "null" / f"{number}.wav").write_bytes((folder / f"{number}.wav").read_bytes())
        (folder / "null" / "index.json").write_text(json.dumps(index))
        found += all_clips("e3", speech, 12, measured=read_measured(str(folder / "null")))
    without, null = found
    assert torch.equal(without.audio, null.audio) and digest_of([without]) == digest_of([null])
    assert null.conditions["distance_m"].isnan().all() and null.conditions["t20_s"].isnan().all()
    assert torch.equal(without.scene, null.scene)


@pytest.mark.parametrize("spoil", [lambda audio: audio * np.nan, lambda audio: audio[:0], lambda audio: audio * [1, 0]])
def test_measured_rirs_without_sound_are_one_line(folder, spoil):
    """A NaN in one file was a training that had diverged, or without a model a table of numbers."""
    audio, rate = soundfile.read(folder / "1.wav")
    soundfile.write(folder / "1.wav", spoil(audio).astype(np.float32), rate, subtype="FLOAT")
    with pytest.raises(ValueError, match="^e3.dir: .*1.wav must hold finite samples and be silent in neither channel$"):
        read_measured(str(folder))


def test_what_a_set_has_not_got_is_one_line(tmp_path, speech):
    with pytest.raises(ValueError, match="^e3 needs a folder of measured RIRs: e3.dir=DIR$"):
        all_clips("e3", speech, 1)
    with pytest.raises(ValueError, match="^e3.dir: cannot read .*index.json: No such file or directory$"):
        read_measured(str(tmp_path))
    with pytest.raises(ValueError, match="^sets must be of e0, e0b, e1, e1p, e1n0, .*, e1w20, e2, e3, got 'e4'$"):
        all_clips("e4", speech, 1)
    with pytest.raises(ValueError, match="^the evaluation sets are made of speech at 16000 Hz, got 8000 Hz"):
        all_clips("e1", replace(speech, sample_rate=8000), 1)
    silence, pair = torch.zeros(10, dtype=torch.int16), torch.tensor([5, 5])
    lonely = make_bank(silence, pair, torch.tensor([0, 0]), ("a", "b"), 16000)
    with pytest.raises(ValueError, match="^e0 needs speech of at least 2 speakers, got 1$"):
        all_clips("e0", lonely, 1)


def test_rooms_of_the_other_simulator_are_those_of_e1(speech):
    """The same geometry and utterances; direct sound where 343 m/s puts it, and no RT60 it cannot have is an error."""
    pytest.importorskip("pyroomacoustics")
    [clips], [ours] = (all_clips(name, speech, 2) for name in ("e2", "e1"))
    assert torch.equal(clips.cone, ours.cone) and torch.equal(clips.draws[0], ours.draws[0])
    assert clips.entries[0]["simulator"].startswith("pyroomacoustics 0.10")
    rooms = draw_fresh(SetOptions(speech, CPU))[0][:1]
    rir = protocol._their_rirs(protocol.import_pyroomacoustics(), rooms, 0)
    dist = torch.linalg.vector_norm(rooms.src_pos[0][None] - rooms.mic_pos[0][:, None], dim=-1)
    for m, s in np.ndindex(2, 2):
        tap = float(dist[m, s]) / 343 * 16000
        near = np.abs(rir[m, s, int(tap) - 2:int(tap) + 4])
        assert near.max() == np.abs(rir[m, s, :int(tap) + 4]).max()
    dead = replace(rooms, rt60=torch.tensor([0.03], dtype=torch.float64))
    assert math.isfinite(np.abs(protocol._their_rirs(protocol.import_pyroomacoustics(), dead, 0)).max())
