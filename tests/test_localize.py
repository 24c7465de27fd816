"""A recording from file to angles: what reaches the network, how it is read, and a line for every mistake.

No weights are trained here, so what is checked is everything around them, and the front end, which knows acoustics.
"""
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ssl_gpu import localize, pretrained
from ssl_gpu.checkpoint import save_checkpoint
from ssl_gpu.config import RunConfig, from_mapping, load_config, to_mapping
from ssl_gpu.doa import Decoding
from ssl_gpu.features import DelayMap
from ssl_gpu.localize import Recording, estimate, read_recording, read_tracks, tune, windows
from ssl_gpu.localizer import Localizer
from ssl_gpu.pretrained import build_localizer

TINY = {"speech": {"clip_s": 0.5}, "features": {"num_bands": 4},
        "model": {"channels": 4, "dim": 16, "depth": 1, "heads": 2}, "train": {"steps": 3}}
CFG = from_mapping(RunConfig, TINY)
RATE, CLIP, SHORTEST = 16000, 8000, 512


def save_run(folder, **sections):
    """A run of an untrained localiser."""
    folder.mkdir(exist_ok=True)
    cfg = from_mapping(RunConfig, TINY | sections)
    save_checkpoint(folder / "checkpoint.pt", model=build_localizer(cfg), optimizer=None, ema=None, step=3,
                    config=to_mapping(cfg))
    return folder


@pytest.fixture(autouse=True)
def no_bar(monkeypatch):
    """However slow the machine is."""
    monkeypatch.setattr(localize, "BAR_S", math.inf)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a run and a recording of a second."""
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    write("talk.wav", noise(RATE, 2))
    return tmp_path


def noise(samples, channels, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal((samples, channels)).astype(np.float32)


def write(path, audio, rate=RATE, subtype="FLOAT"):
    soundfile.write(path, audio, rate, subtype=subtype)


def start(*arguments):
    return localize.main([str(argument) for argument in arguments])


def found(*arguments):
    """The JSON of a recording."""
    assert start(*arguments, "--json", "out.json") == 0
    return json.loads(Path("out.json").read_text(encoding="utf-8"))


def from_direction(cone_deg, spacing_m, speed, seconds=1.0):
    """White noise from a far source, [mic, sample]: microphone 1, at +spacing/2, hears it earlier below 90 degrees."""
    samples = round(seconds * RATE)
    dry = torch.randn(samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    freq = torch.fft.rfftfreq(samples, 1 / RATE, dtype=torch.float64)
    lead = spacing_m * math.cos(math.radians(cone_deg)) / speed
    shift = torch.stack([torch.exp(-1j * math.pi * freq * lead), torch.exp(1j * math.pi * freq * lead)])
    return torch.fft.irfft(torch.fft.rfft(dry) * shift, samples).float()


# ---- what reaches the network ----


@pytest.mark.parametrize("spacing, speed", [(0.094, 343.0), (0.3, 355.0), (0.02, 331.0)])
def test_spacing_equals_a_front_end_built_for_it(spacing, speed):
    """The same weights in a localiser of another scene: equal to the bit."""
    scene = replace(CFG.scene, mic_spacing_m=spacing * 340 / speed)
    other = Localizer(CFG.model, CFG.features, CFG.target, scene, CFG.rir.sample_rate).eval()
    tuned = build_localizer(CFG).eval()
    other.load_state_dict(tuned.state_dict())
    audio = from_direction(50, 0.1, 340)[None]
    before = tuned(audio)
    tune(tuned, CFG, spacing, speed)
    assert torch.equal(tuned(audio), other(audio)) and not torch.equal(tuned(audio), before)


def test_only_travel_time_matters():
    localizer, steering = build_localizer(CFG), build_localizer(CFG).network.front.steering
    for spacing, speed in ((0.1, 340.0), (0.2, 680.0)):
        assert tune(localizer, CFG, spacing, speed) == []
        torch.testing.assert_close(localizer.network.front.steering, steering, rtol=0, atol=1e-6)


@pytest.mark.parametrize("cone_deg", [20.0, 60.0, 90.0, 145.0])
@pytest.mark.parametrize("spacing, speed", [(0.1, 340.0), (0.094, 343.0), (0.05, 331.0)])
def test_tuned_front_end_hears_an_angle_where_the_training_had_it(cone_deg, spacing, speed):
    """The delay maps peak at cos(cone) / 1.1 of their reach, whatever the spacing, once they are told of it."""
    localizer = build_localizer(CFG)
    tune(localizer, CFG, spacing, speed)
    maps, _ = localizer.network.front(from_direction(cone_deg, spacing, speed)[None])
    peak = int(maps[0].mean((0, 1)).argmax())
    expected = (math.cos(math.radians(cone_deg)) / 1.1 + 1) / 2 * (CFG.features.num_delays - 1)
    assert abs(peak - expected) <= 0.75


def test_swapped_channels_mirror_the_maps(folder):
    """Channel 2 first: what was towards one end of the line is towards the other."""
    front = DelayMap(CFG.features, RATE, 0.1)
    write("a.wav", from_direction(40, 0.1, 340).T.numpy())
    forth, back = (read_recording("a.wav", pair, RATE).audio[None] for pair in ((1, 2), (2, 1)))
    torch.testing.assert_close(front(back)[0], front(forth)[0].flip(-1), rtol=0, atol=1e-5)
    assert torch.equal(front(back)[1], front(forth)[1])


def test_channels_are_chosen_from_many(folder):
    audio = noise(RATE, 4)
    write("four.wav", audio)
    for pair in ((2, 4), (4, 1)):
        write("two.wav", audio[:, [number - 1 for number in pair]])
        many, two = found("four.wav", "run", "--channels", *pair), found("two.wav", "run")
        assert many["windows"] == two["windows"] and many["channels"] == list(pair)
        assert f"beyond that of channel {pair[1]}" in many["convention"]
    assert found("two.wav", "run", "--channels", 2, 1)["windows"] != two["windows"]


def test_samples_at_the_models_rate_come_through_unchanged(folder):
    audio = noise(1000, 2)
    write("a.wav", audio)
    recording = read_recording("a.wav", None, RATE)
    assert recording.audio.shape == (2, 1000) and recording.duration_s == 1000 / RATE
    np.testing.assert_array_equal(recording.audio.numpy(), audio.T)


def test_long_files_are_read_in_blocks(folder, monkeypatch):
    expected = read_recording("talk.wav", None, RATE)
    monkeypatch.setattr(localize, "BLOCK", 999)
    assert torch.equal(read_recording("talk.wav", None, RATE).audio, expected.audio)


@pytest.mark.parametrize("file_rate", [44100, 48000])
def test_other_rates_are_resampled(folder, file_rate):
    """Tones, another in each channel, come out as the same tones."""
    tones = [np.sin(2 * np.pi * hz * np.arange(file_rate) / file_rate) for hz in (440.0, 1000.0)]
    write("a.wav", 0.5 * np.stack(tones, 1), file_rate)
    recording = read_recording("a.wav", None, RATE)
    assert recording.audio.shape == (2, RATE) and recording.file_rate == file_rate and recording.warnings == ()
    expected = [0.5 * np.sin(2 * np.pi * hz * np.arange(RATE) / RATE) for hz in (440.0, 1000.0)]
    np.testing.assert_allclose(recording.audio[:, 500:-500], np.stack(expected)[:, 500:-500], atol=2e-3)


# ---- windows ----


@pytest.mark.parametrize("samples, length, hop, starts, used", [
    (8000, None, None, [0], 8000),                     # a clip
    (5000, None, None, [0], 5000),                     # less
    (16000, None, None, [0], 16000),                   # two clips: still one window
    (16001, None, None, [0, 4000, 8000, 8001], 8000),  # more: clips by half, and the last sample is heard
    (20000, None, None, [0, 4000, 8000, 12000], 8000),
    (12000, 6000, None, [0, 3000, 6000], 6000),
    (12000, 20000, None, [0], 12000),                  # a window longer than the recording
    (12000, None, 2000, [0, 2000, 4000], 8000),        # a hop alone: windows of a clip
    (10000, 2000, 2000, [0, 2000, 4000, 6000, 8000], 2000),    # one after the other
    (10001, 2000, 2000, [0, 2000, 4000, 6000, 8000, 8001], 2000),
    (7000, 8000, 8000, [0], 7000),                     # no hop is longer than the window that was asked for
    (1, None, None, [0], 1),
    (1, 1600, 160, [0], 1),
])
def test_windows(samples, length, hop, starts, used):
    assert windows(samples, CLIP, length, hop) == (starts, used)


def recording_of(audio):
    return Recording(torch.as_tensor(audio).T.contiguous(), RATE, RATE, (1, 2), ())


def test_every_window_is_the_network_on_its_samples(monkeypatch):
    """However many windows are in the network at a time."""
    localizer, recording = build_localizer(CFG).eval(), recording_of(noise(24000, 2))
    starts, length = windows(24000, CLIP, None, None)
    whole = estimate(localizer, recording, starts, length, SHORTEST)
    monkeypatch.setattr(localize, "FORWARD_S", 1.0)
    parts = estimate(localizer, recording, starts, length, SHORTEST)
    for index, first in enumerate(starts):
        angle, spread = read_tracks(localizer, localizer(recording.audio[None, :, first:first + length]))
        for result in (whole, parts):
            torch.testing.assert_close(result.angle_deg[index], angle[0].rad2deg(), rtol=0, atol=1e-3)
            torch.testing.assert_close(result.spread_deg[index], spread[0].rad2deg(), rtol=0, atol=1e-3)
    assert whole.start_s.tolist() == [0, 0.25, 0.5, 0.75, 1.0] and whole.end_s.tolist()[-1] == 1.5
    torch.testing.assert_close(whole.median_deg, whole.angle_deg.median(0).values)


@pytest.mark.parametrize("samples, filled", [(3000, 3000), (512, 512), (300, 512), (1, 512)])
def test_short_recording_is_filled_up_to_what_the_network_takes(samples, filled):
    localizer, audio = build_localizer(CFG).eval(), noise(samples, 2)
    result = estimate(localizer, recording_of(audio), [0], samples, SHORTEST)
    padded = torch.zeros(1, 2, filled)
    padded[0, :, :samples] = torch.from_numpy(audio.T - audio.T.mean(1, keepdims=True))  # or it would end in a step
    angle, _ = read_tracks(localizer, localizer(padded))
    torch.testing.assert_close(result.angle_deg, angle.rad2deg(), rtol=0, atol=1e-3)
    assert result.end_s.tolist() == [samples / RATE]


@pytest.mark.parametrize("kind", ["conformer", "original"])
def test_shortest_recording_is_long_enough(folder, kind):
    """A tenth of a second, for either network."""
    save_run(folder / "short", model={"kind": kind, "dim": 16, "heads": 2}, speech={"clip_s": 1.0})
    write("a.wav", noise(RATE // 10, 2))
    assert len(found("a.wav", "short")["median_deg"]) == 2


def test_quiet_windows_do_not_count(folder, capsys):
    audio = noise(3 * CLIP, 2)
    audio[CLIP:] *= 1e-3
    write("a.wav", audio)
    result = found("a.wav", "run", "--window", 0.5, "--hop", 0.5)
    assert [row["counts"] for row in result["windows"]] == [True, False, False]
    assert result["median_deg"] == result["windows"][0]["angle_deg"]
    first, second = (row["level_db"] for row in result["windows"][:2])
    assert abs(first - 10 * math.log10(2 * 0.01)) < 0.5 and abs(first - second - 60) < 0.5
    assert capsys.readouterr().out.count("quiet, not counted") == 2


def test_offset_is_no_sound(folder):
    """Of -40 dB, where speech has -17: pauses with it are as quiet as without."""
    audio = noise(3 * CLIP, 2)
    audio[CLIP:] = 0
    levels, angles = [], []
    for offset in ([0.0, 0.0], [0.01, -0.01]):
        write("a.wav", audio + offset)
        windows = found("a.wav", "run", "--window", 0.5, "--hop", 0.5)["windows"]
        assert [row["counts"] for row in windows] == [True, False, False]
        levels.append(windows[0]["level_db"])
        angles.append(windows[0]["angle_deg"])
    assert abs(levels[0] - levels[1]) < 0.01 and angles[1] == pytest.approx(angles[0], abs=0.01)


@pytest.mark.parametrize("kind, subtype, told", [
    ("OGG", "VORBIS", "Vorbis"), ("OGG", "OPUS", "Opus"), ("MP3", "MPEG_LAYER_III", "MP3"), ("FLAC", "PCM_16", None)])
def test_codecs_that_join_channels_are_told_of(folder, kind, subtype, told):
    if subtype not in soundfile.available_subtypes(kind):
        pytest.skip("this libsndfile does not write it")
    soundfile.write("a.audio", noise(RATE, 2), RATE, format=kind, subtype=subtype)
    warnings = found("a.audio", "run")["warnings"]
    assert warnings == [f"the recording is {told}, which codes two channels together and may move talkers, or put one "
                        "near 90 degrees, the more so the fewer bits it has: use wav or flac"] * (told is not None)


def test_a_recording_is_not_overwritten(folder, capsys):
    before = Path("talk.wav").read_bytes()
    assert start("talk.wav", "run", "--json", "talk.wav") == 2
    assert capsys.readouterr().err == ("error: --json must be a new file or one of JSON to be replaced, got talk.wav, "
                                       "which is something else\n")
    assert Path("talk.wav").read_bytes() == before


def test_long_work_has_a_bar(folder, monkeypatch, capsys):
    monkeypatch.setattr(localize, "BAR_S", 0.0)
    assert start("talk.wav", "run", "--window", 0.5) == 0
    assert "listening: 100%" in capsys.readouterr().err


def test_weights_that_give_nan_are_refused(folder, capsys):
    cfg, localizer = CFG, build_localizer(CFG)
    torch.nn.init.constant_(localizer.network.head[-1].bias, float("nan"))
    save_checkpoint("run/checkpoint.pt", model=localizer, optimizer=None, ema=None, step=1, config=to_mapping(cfg))
    assert start("talk.wav", "run") == 2
    assert "not finite" in capsys.readouterr().err


# ---- how distributions are read ----


def test_spread_is_half_of_the_central_80_percent():
    """Uniform over 20 degrees around 50: 50 +- 8. A spike: half a cell of 2 degrees, less a fifth."""
    localizer = build_localizer(CFG)
    grid = localizer.grid.rad2deg()
    uniform = torch.where((grid - 50).abs() < 9.5, 0.0, -1e9)
    spike = torch.where((grid - 120).abs() < 0.5, 0.0, -1e9)
    angle, spread = read_tracks(localizer, torch.stack([uniform, spike])[None])
    torch.testing.assert_close(angle.rad2deg(), torch.tensor([[50.0, 120.0]]), rtol=0, atol=1e-3)
    torch.testing.assert_close(spread.rad2deg(), torch.tensor([[0.4 * 18, 0.8]]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("decoding", list(Decoding))
def test_a_spread_stays_with_its_angle(decoding):
    """Tracks whose angles come out in the wrong order change places with all they say."""
    localizer = build_localizer(replace(CFG, target=replace(CFG.target, decoding=decoding)))
    grid = localizer.grid.rad2deg()
    wide, narrow = (torch.exp(-0.5 * ((grid - centre) / width) ** 2).log().clamp(min=-1e4)
                    for centre, width in ((130, 10.0), (40, 3.0)))
    angle, spread = read_tracks(localizer, torch.stack([wide, narrow])[None])
    torch.testing.assert_close(angle.rad2deg(), torch.tensor([[40.0, 130.0]]), rtol=0, atol=0.5)
    torch.testing.assert_close(spread.rad2deg(), 1.2816 * torch.tensor([[3.0, 10.0]]), rtol=0, atol=0.3)


# ---- the command ----


def test_json_says_everything(folder):
    result = found("talk.wav", "run", "--spacing", 0.095, "--speed-of-sound", 350)
    assert {key: result[key] for key in ("recording", "duration_s", "file_rate_hz", "channels", "spacing_m",
                                         "trained_spacing_m", "speed_of_sound_m_s", "talkers", "angle", "warnings")} \
        == {"recording": "talk.wav", "duration_s": 1.0, "file_rate_hz": RATE, "channels": [1, 2], "spacing_m": 0.095,
            "trained_spacing_m": 0.1, "speed_of_sound_m_s": 350.0, "talkers": 2, "angle": "cone", "warnings": []}
    assert result["model"].startswith("run: conformer model")
    assert "0 = on the line of the microphones beyond that of channel 2, 180 = beyond channel 1" in result["convention"]
    (row,) = result["windows"]
    assert set(row) == {"start_s", "end_s", "level_db", "counts", "angle_deg", "spread_deg"}
    assert (row["start_s"], row["end_s"], row["counts"]) == (0.0, 1.0, True)
    low, high = row["angle_deg"]
    assert 0 <= low <= high <= 180 and len(row["spread_deg"]) == 2 and result["median_deg"] == row["angle_deg"]


def test_text_says_the_same_and_what_is_assumed(folder, capsys):
    result = found("talk.wav", "run", "--window", 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "talk.wav: 1.00 s at 16000 Hz, microphones: channels 1 and 2, 10 cm apart, c = 343 m/s"
    assert lines[1:5] == [result["model"], "2 talkers are assumed, the spread is half of the central 80 %",
                          *result["convention"].split("; ")]
    assert lines[5].split() == ["from", "s", "to", "s", "talker", "1", "talker", "2"]
    for line, row in zip(lines[6:9], result["windows"], strict=True):
        pairs = [f"{angle:.1f} +- {spread:.1f}" for angle, spread in zip(row["angle_deg"], row["spread_deg"])]
        assert line.split() == f"{row['start_s']:.2f} {row['end_s']:.2f} {' '.join(pairs)}".split()
    assert lines[9].split() == ["median", "of", "3", *(f"{angle:.1f}" for angle in result["median_deg"])]


@pytest.mark.parametrize("spacing, said", [(0.003, "0.3 cm"), (0.094, "9.4 cm"), (1, "1 m"), (10, "10 m")])
def test_spacings_are_in_cm_up_to_a_metre(folder, spacing, said, capsys):
    """And those of the weights as well."""
    save_run(folder / "run", scene={"mic_spacing_m": min(spacing, 1.5)})
    assert start("talk.wav", "run", "--spacing", spacing, "--speed-of-sound", 340) == 0
    heading, weights = capsys.readouterr().out.splitlines()[:2]
    assert f"channels 1 and 2, {said} apart, c = 340 m/s" in heading
    assert weights.endswith(f"microphones {'1.5 m' if spacing == 10 else said} apart")


def test_default_is_the_spacing_of_the_training_in_air_of_20_degrees(folder):
    assert found("talk.wav", "run") == found("talk.wav", "run", "--spacing", 0.1, "--speed-of-sound", 343)
    assert found("talk.wav", "run")["windows"] != found("talk.wav", "run", "--speed-of-sound", 330)["windows"]


def test_jitter_does_not_change_the_spacing_of_the_training(folder):
    save_run(folder / "run", scene={"mic_spacing_m": 0.08, "spacing_jitter_m": 0.003})
    assert found("talk.wav", "run")["spacing_m"] == pytest.approx(0.08)


def test_as_many_talkers_as_were_trained(folder, capsys):
    save_run(folder / "three", scene={"num_src": 3})
    assert len(found("talk.wav", "three")["median_deg"]) == 3
    assert "3 talkers are assumed" in capsys.readouterr().out


def test_azimuths_are_called_azimuths(folder):
    save_run(folder / "azimuth", target={"angle": "azimuth"})
    result = found("talk.wav", "azimuth")
    assert result["angle"] == "azimuth" and result["convention"].startswith("azimuths in degrees, of talkers at")


def test_packaged_weights_are_the_default(folder, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "PACKAGED", folder / "nothing")
    assert start("talk.wav") == 2
    assert capsys.readouterr().err.startswith("error: this ssl_gpu was packaged without weights")
    (folder / "run" / "result.json").write_text("{}")
    (folder / "run" / "metrics.jsonl").write_text("")
    pretrained.export("run", "nothing")
    named, packaged = found("talk.wav", "run"), found("talk.wav")
    assert packaged["windows"] == named["windows"] and packaged["model"].startswith("the packaged weights")


# ---- warnings ----


def clipped():
    return np.clip(8 * noise(RATE, 2), -1, 1)


def copied():
    return noise(RATE, 1)[:, [0, 0]]


WARNINGS = {
    "identical": (copied(), RATE, [], "the two channels are identical"),
    "one voice panned": (copied() * [1.0, 0.3], RATE, [], "the two channels are identical"),
    "silent": (noise(RATE, 2) * [1.0, 0.0], RATE, [], "channel 2 is silent"),
    "nearly silent": (noise(RATE, 2) * [1e-4, 1.0], RATE, [], "channel 1 is silent"),
    "reversed": (copied() * [1.0, -0.5], RATE, [], "channel 2 is channel 1 with its polarity reversed: there is no"),
    "silent but for an offset": (noise(RATE, 2) * [0.0, 1.0] + [0.1, 0.0], RATE, [], "channel 1 is silent"),
    "identical but for an offset": (copied() + [0.0, 0.2], RATE, [], "the two channels are identical"),
    "clipped": (clipped(), RATE, [], "the recording clips: 2"),
    "clipped but for a sample": (np.concatenate([clipped(), [[1.01, 0]]]), RATE, [], "the recording clips: 2"),
    "a square wave": (np.sign(noise(RATE, 2)), RATE, [], "the recording clips: 100 % of its"),
    "short": (noise(4000, 2), RATE, [], "the recording of 0.25 s is shorter than the 0.5 s of the training"),
    "short windows": (noise(RATE, 2), RATE, ["--window", "0.3"], "the window of 0.3 s is shorter than the 0.5 s"),
    "narrow": (noise(8000, 2), 8000, [], "the recording ends at 4000 Hz, the model was trained up to 8000"),
    "wider": (noise(RATE, 2), RATE, ["--spacing", "0.16"],
              "--spacing 0.16 at --speed-of-sound 343 is 0.466 ms from microphone to microphone, as 0.159 m are at the "
              "340 m/s of the training, far from its 0.1 m; for better angles: python -m ssl_gpu.train "
              "configs/patches.yaml speech.train=DIR speech.eval=OTHER_DIR scene.mic_spacing_m=0.159 "),
    "closer": (noise(RATE, 2), RATE, ["--spacing", "0.075"], "--spacing 0.075 at --speed-of-sound 343 is 0.219 ms"),
    "slower": (noise(RATE, 2), RATE, ["--speed-of-sound", "220"],
               "--spacing 0.1 at --speed-of-sound 220 is 0.455 ms from microphone to microphone, as 0.155 m are at "
               "the 340 m/s of the training, far from its 0.1 m; for better angles: python -m ssl_gpu.train "
               "configs/patches.yaml speech.train=DIR speech.eval=OTHER_DIR scene.mic_spacing_m=0.155 "),
    "in water": (noise(RATE, 2), RATE, ["--speed-of-sound", "1500", "--spacing", "10"],
                 "--spacing 10 at --speed-of-sound 1500 is 6.67 ms from microphone to microphone, as 2.27 m are at "
                 "the 340 m/s of the training, far from its 0.1 m; training reaches from 0.0031 to 1.4 m; is it in "
                 "metres?"),
}


def test_training_that_is_advised_can_run():
    """At both ends of TRAINED_M, and not far beyond them."""
    recipe = Path(__file__).parents[1] / "configs" / "patches.yaml"
    low, high = localize.TRAINED_M
    for spacing in (low, high):
        load_config(RunConfig, recipe, [f"scene.mic_spacing_m={spacing}"])
    for spacing in (0.9 * low, 1.1 * high):
        with pytest.raises(ValueError, match="^scene.spacing_jitter_m must|^scene.room_min_m: "):
            load_config(RunConfig, recipe, [f"scene.mic_spacing_m={spacing}"])


@pytest.mark.parametrize("name", WARNINGS)
def test_what_may_spoil_the_result_is_one_line(folder, name, capsys):
    audio, rate, options, message = WARNINGS[name]
    write("a.wav", audio, rate)
    result = found("a.wav", "run", *options)
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"warning: {line}" for line in result["warnings"]]
    assert len(result["warnings"]) == 1 and result["warnings"][0].startswith(message)


@pytest.mark.parametrize("audio, options", [
    (noise(RATE, 2), []), (noise(RATE, 2), ["--spacing", 0.08]), (noise(RATE, 2), ["--spacing", 0.15]),
    (noise(RATE, 2) * [1.0, 0.01], []),                                 # a microphone 40 dB less sensitive
    (np.sin(0.1 * np.arange(RATE))[:, None] * [1.0, 0.5] + noise(RATE, 2), []),  # peaks at and over full scale
    (copied() + 0.01 * noise(RATE, 2, seed=1), []),                     # across, with noise 40 dB below
    (0.01 * noise(RATE, 2) + 0.5, []),                                  # on an offset of 54 dB more
    (np.rint(3e5 * noise(RATE, 2)), []),                                # floats in steps of 1, up to those of 16 bits
])
def test_good_recordings_pass_without_a_word(folder, audio, options, capsys):
    write("a.wav", audio)
    assert found("a.wav", "run", *options)["warnings"] == []
    assert capsys.readouterr().err == ""


def test_original_model_cannot_be_told_of_another_spacing(folder):
    """It has no grid of delays to rebuild; 0.9 % of the speed of sound pass."""
    cfg = from_mapping(RunConfig, {"model": {"kind": "original"}, "train": {"steps": 1}})
    assert tune(None, cfg, 0.1, 343.0) == []
    (warning,) = tune(None, cfg, 0.09, 343.0)
    assert warning == ("--spacing 0.09 at --speed-of-sound 343 is 0.262 ms from microphone to microphone, as 0.0892 m "
                       "are at the 340 m/s of the training: model.kind=original has learned 0.1 m and cannot be told "
                       "of another spacing, its angles are wrong")
    (warning,) = tune(None, cfg, 0.1, 300.0)
    assert "as 0.113 m are" in warning


# ---- mistakes ----


def put(name, content):
    return lambda: Path(name).write_bytes(content)


def put_audio(name, audio, rate=RATE):
    return lambda: write(name, audio, rate)


BAD = noise(RATE, 2)
BAD[100, 1] = np.nan
MISTAKES = {
    "missing": (None, ["nope.wav", "run"], "cannot read nope.wav: No such file"),
    "a folder": (None, ["run", "run"], "cannot read run: Is a directory"),
    "not audio": (put("a.wav", b"text"), ["a.wav", "run"], "a.wav is no audio that can be read"),
    "empty": (put("a.wav", b""), ["a.wav", "run"], "a.wav is no audio that can be read"),
    "raw": (put("a.raw", bytes(64)), ["a.raw", "run"], "a.raw is no audio that can be read (wav, flac, ogg, opus, "
                                                       "mp3): samplerate must be specified"),
    "no samples": (put_audio("a.wav", noise(0, 2)), ["a.wav", "run"], "a.wav holds no samples"),
    "cut off": (put_audio("a.wav", noise(1590, 2)), ["a.wav", "run"], "a.wav must be at least 0.1 s long, got 0.099 s"),
    "mono": (put_audio("a.wav", noise(RATE, 1)), ["a.wav", "run"], "must have two channels"),
    "four": (put_audio("a.wav", noise(RATE, 4)), ["a.wav", "run"], "has 4 channels, say by --channels I J"),
    "out of range": (None, ["talk.wav", "run", "--channels", 1, 3], "--channels must be from 1 to 2"),
    "from zero": (None, ["talk.wav", "run", "--channels", 0, 1], "--channels must be from 1 to 2"),
    "one twice": (None, ["talk.wav", "run", "--channels", 2, 2], "--channels must be two different ones"),
    "nan": (put_audio("a.wav", BAD), ["a.wav", "run"], "samples that are not finite, in channel 2"),
    "silence": (put_audio("a.wav", np.zeros((RATE, 2))), ["a.wav", "run"], "holds nothing but silence"),
    "odd rate": (put_audio("a.wav", noise(RATE, 2), 44101), ["a.wav", "run"], "44101 Hz has too small a common"),
    "spacing 0": (None, ["talk.wav", "run", "--spacing", 0], "--spacing must be from 0.001 to 10 m, got"),
    "spacing < 0": (None, ["talk.wav", "run", "--spacing=-0.1"], "--spacing must be from 0.001 to 10 m, got"),
    "spacing nan": (None, ["talk.wav", "run", "--spacing", "nan"], "--spacing must be from 0.001 to 10 m, got"),
    "speed 0": (None, ["talk.wav", "run", "--speed-of-sound", 0], "--speed-of-sound must be from 100 to 2000 m/s"),
    "speed inf": (None, ["talk.wav", "run", "--speed-of-sound", "inf"], "--speed-of-sound must be from 100 to 2000"),
    "spacing mm": (None, ["talk.wav", "run", "--spacing", 94], "--spacing must be from 0.001 to 10 m, got 94"),
    "speed of light": (None, ["talk.wav", "run", "--speed-of-sound", 3e8], "must be from 100 to 2000 m/s, got 3e+08"),
    "window 0": (None, ["talk.wav", "run", "--window", 0], "--window must be from 0.1 to 5 s"),
    "window long": (None, ["talk.wav", "run", "--window", 6], "--window must be from 0.1 to 5 s"),
    "hop 0": (None, ["talk.wav", "run", "--hop", 0], "--hop must be from 0.01 to 5 s"),
    "hop nan": (None, ["talk.wav", "run", "--hop", "nan"], "--hop must be from 0.01 to 5 s"),
    "hop beyond window": (None, ["talk.wav", "run", "--window", 0.2, "--hop", 0.3],
                          "--hop must be at most the window of 0.2 s, or what is between two windows is not heard, "
                          "got 0.3"),
    "hop beyond a clip": (None, ["talk.wav", "run", "--hop", 2], "--hop must be at most the window of 0.5 s, or"),
    "no checkpoint": (None, ["talk.wav", "nope"], "weights must be a run, its checkpoint.pt or a folder of "
                      "ssl_gpu.pretrained, got nope: there is nothing of that name"),
    "a configuration": (put("a.yaml", b"scene: {}"), ["talk.wav", "a.yaml"], "weights must be a run, its checkpoint.pt "
                        "or a folder of ssl_gpu.pretrained, got a.yaml: that is a configuration"),
    "an override": (None, ["talk.wav", "target.offsets=4"], "recording and checkpoint must be paths, no "
                    "section.key=value, got target.offsets=4"),
    "weights without their folder": (put("weights.safetensors", b"x"), ["talk.wav", "weights.safetensors"],
                                     "got weights.safetensors: name its folder"),
    "no such checkpoint": (None, ["talk.wav", "talk.wav"],
                           "talk.wav is no file that torch.save wrote, as checkpoint.pt of a run is"),
    # Found before anything is read, or the error would be another.
    "json nowhere": (None, ["nope.wav", "run", "--json", "no/out.json"],
                     "--json must be a file in an existing folder, got no/out.json"),
    "json a folder": (None, ["nope.wav", "run", "--json", "run"],
                      "--json must be a file that can be replaced, got the folder "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_is_one_line_and_writes_nothing(folder, name, capsys):
    prepare, arguments, message = MISTAKES[name]
    if prepare is not None:
        prepare()
    before = sorted(folder.rglob("*"))
    options = [] if "--json" in arguments else ["--json", "out.json"]
    assert start(*arguments, *options) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err
    assert captured.out == "" and sorted(folder.rglob("*")) == before


def test_result_is_printed_before_a_disk_can_refuse_it(folder, monkeypatch, capsys):
    """Which is an exit status of its own."""
    printed = []

    def full(*_):
        printed.append(capsys.readouterr().out)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(localize, "write_json", full)
    assert start("talk.wav", "run", "--json", "out.json") == 1
    assert capsys.readouterr().err == "error: cannot write out.json: No space left on device\n"
    (text,) = printed
    assert text.startswith("talk.wav: 1.00 s at 16000 Hz") and "median of 1" in text


def test_an_interruption_is_one_line(folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(localize, "localize", interrupted)
    assert start("talk.wav", "run") == 130
    assert capsys.readouterr().err == "interrupted before the results\n"


def test_help_describes_every_argument(capsys):
    with pytest.raises(SystemExit) as end:
        start("--help")
    text = capsys.readouterr().out
    assert end.value.code == 0
    for word in ("recording", "checkpoint", "--spacing M", "--channels I J", "--speed-of-sound C", "--window S",
                 "--hop S", "--json FILE", "0 degrees", "cone angle"):
        assert word in text, word
