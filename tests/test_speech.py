"""Folders of speech: decoding, the cache, who speaks, crops, the command line and the download."""
from __future__ import annotations

import dataclasses
import http.server
import io
import logging
import math
import os
import subprocess
import sys
import tarfile
import threading
import urllib.request
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ssl_gpu import corpus as corpus_module
from ssl_gpu import speech
from ssl_gpu.corpus import SpeechError, audio_files, load_corpus
from ssl_gpu.speech import (
    Crop, CropBatch, SpeechConfig, draw_crops, fits_on_device, gather_crops, load_bank, make_bank, voices_bank,
)

RATE = 16000


def tone(duration_s: float, freq_hz: float = 440.0, rate: int = RATE, level: float = 0.5) -> np.ndarray:
    return level * np.sin(2 * np.pi * freq_hz * np.arange(round(duration_s * rate)) / rate)


def write(path: Path, audio: np.ndarray, rate: int = RATE, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".opus":
        options = {"format": "OGG", "subtype": "OPUS"}
    soundfile.write(path, audio, rate, **options)
    return path


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(tmp_path: Path, **changes) -> SpeechConfig:
    return SpeechConfig(cache_dir=str(tmp_path / "cache"), **changes)


def bank_of(folder: Path, tmp_path: Path, rate: int = RATE, **changes):
    return load_bank(folder, config(tmp_path, **changes), sample_rate=rate, device="cpu", progress=False)


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def count_decodes(monkeypatch) -> list[str]:
    """The names of the files that are decoded from now on."""
    decoded, decode = [], corpus_module.decode
    monkeypatch.setattr(corpus_module, "decode", lambda path, *rest: decoded.append(path.name) or decode(path, *rest))
    return decoded


def ramp_bank(counts: list[int], length: int = 100):
    """Speakers with that many utterances; sample i of the bank is i, so that a crop shows where it comes from."""
    speaker = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    lengths = torch.full_like(speaker, length)
    samples = torch.arange(length * len(speaker)).to(torch.int16)
    return make_bank(samples, lengths, speaker, tuple(map(str, range(len(speaker)))), RATE)


# ---- decoding ----


def test_every_format_in_any_layout_is_decoded(tmp_path):
    folder = tmp_path / "speech"
    for index, name in enumerate(["a.flac", "b/c.wav", "b/d/e/f.ogg", "g h/i.OPUS", "j.opus"]):
        options = {"format": "OGG", "subtype": "OPUS"} if name.endswith("OPUS") else {}
        write(folder / name, tone(1.0, 300.0 + 200 * index), **options)
    (folder / "notes.txt").write_text("not audio")
    (folder / "._a.flac").write_bytes(b"resource fork")
    write(folder / ".dev-clean.partial" / "a.flac", tone(1.0))  # a download that was killed
    bank = bank_of(folder, tmp_path)
    assert bank.names == ("a.flac", "b/c.wav", "b/d/e/f.ogg", "g h/i.OPUS", "j.opus")
    assert bank.samples.dtype == torch.int16 and bank.sample_rate == RATE
    assert bank.length.tolist() == [RATE] * 5 and bank.start.tolist() == [RATE * i for i in range(5)]
    for index in range(5):
        audio = bank.samples[bank.start[index]:][:RATE].numpy() / 32768
        peak_hz = np.abs(np.fft.rfft(audio)).argmax()
        assert abs(peak_hz - (300 + 200 * index)) <= 1
        assert np.abs(audio[4000:12000]).max() == pytest.approx(0.5, abs=0.05)


def test_16_bit_files_come_through_unchanged(tmp_path):
    audio = np.random.default_rng(0).integers(-32768, 32768, RATE).astype(np.int16)
    write(tmp_path / "speech" / "a.flac", audio)
    write(tmp_path / "speech" / "b.wav", audio)
    bank = bank_of(tmp_path / "speech", tmp_path)
    assert np.array_equal(bank.samples.numpy(), np.tile(audio, 2))


def test_loud_float_files_are_clipped_not_wrapped(tmp_path):
    write(tmp_path / "speech" / "a.wav", tone(1.0, level=2.0), subtype="FLOAT")
    samples = bank_of(tmp_path / "speech", tmp_path).samples
    assert samples.max() == 32767 and samples.min() == -32768
    assert samples.int().diff().abs().max() < 2 * 32768 * 2 * np.pi * 440 / RATE * 1.01


def test_channels_are_averaged(tmp_path):
    left, right = tone(1.0, 500.0, level=0.4), tone(1.0, 1500.0, level=0.2)
    write(tmp_path / "speech" / "a.wav", np.stack([left, right], 1), subtype="FLOAT")
    samples = bank_of(tmp_path / "speech", tmp_path).samples.numpy() / 32768
    np.testing.assert_allclose(samples, (left + right) / 2, atol=1e-4)


def test_44100_hz_stereo_keeps_duration_and_pitch(tmp_path):
    audio = tone(1.5, 1000.0, rate=44100)
    write(tmp_path / "speech" / "a.wav", np.stack([audio, audio], 1), 44100, subtype="FLOAT")
    bank = bank_of(tmp_path / "speech", tmp_path)
    assert bank.length.tolist() == [24000]
    middle = bank.samples[2000:22000].numpy() / 32768
    np.testing.assert_allclose(middle, tone(1.5, 1000.0)[2000:22000], atol=2e-3)


def test_only_resampling_needs_torchaudio(tmp_path, monkeypatch):
    write(tmp_path / "same" / "a.wav", tone(1.0))
    write(tmp_path / "other" / "a.wav", tone(1.0, rate=8000), 8000)
    monkeypatch.setitem(sys.modules, "torchaudio.functional", None)
    assert len(bank_of(tmp_path / "same", tmp_path).samples) == RATE
    with pytest.raises(SpeechError, match="8000 Hz needs torchaudio to become 16000 Hz"):
        bank_of(tmp_path / "other", tmp_path)


@pytest.mark.parametrize("rates", [(48000, 16000), (44100, 16000), (8000, 16000), (16000, 44100), (22050, 16000)])
@pytest.mark.parametrize("num_samples", [1, 3000, 10_007])
def test_resampling_block_by_block_equals_the_whole(monkeypatch, rates, num_samples):
    from torchaudio.functional import resample
    audio = np.random.default_rng(0).standard_normal((2, num_samples)).astype(np.float32)
    monkeypatch.setattr(corpus_module, "RESAMPLE_BLOCK", 1000)
    expected = resample(torch.from_numpy(audio), *rates).numpy()
    found = corpus_module.resample(audio, *rates)
    assert found.shape == expected.shape == (2, math.ceil(num_samples * rates[1] / rates[0]))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_importing_needs_no_torchaudio_and_no_device():
    code = "import sys, ssl_gpu.speech, torch; sys.exit('torchaudio' in sys.modules or torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_files_are_decoded_at_the_same_time(tmp_path, monkeypatch):
    """Each decode waits until a second one has begun: one after the other would break the barrier."""
    for index in range(4):
        write(tmp_path / "speech" / f"{index}.wav", tone(0.6))
    barrier, read = threading.Barrier(2), soundfile.read

    def wait_and_read(*args, **options):
        barrier.wait(timeout=10)
        return read(*args, **options)

    monkeypatch.setattr(soundfile, "read", wait_and_read)
    monkeypatch.setattr(corpus_module, "_workers", lambda: 2)
    assert len(bank_of(tmp_path / "speech", tmp_path).names) == 4
    assert not barrier.broken


def test_there_are_at_least_two_workers():
    assert corpus_module._workers() >= 2


def test_progress_bar_counts_files(tmp_path, capsys):
    write(tmp_path / "speech" / "a.wav", tone(1.0))
    arguments = {"sample_rate": RATE, "device": "cpu"}
    load_bank(tmp_path / "speech", config(tmp_path), **arguments)
    error = capsys.readouterr().err
    assert "hashing speech" in error and "decoding speech" in error and "1/1" in error
    load_bank(tmp_path / "speech", config(tmp_path), **arguments, progress=False)
    assert capsys.readouterr().err == ""


def test_links_are_followed_but_not_round_in_circles(tmp_path):
    write(tmp_path / "elsewhere" / "a.wav", tone(1.0))
    folder = tmp_path / "speech"
    write(folder / "b.wav", tone(1.0))
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    assert audio_files(folder) == ["b.wav", "link/a.wav"]


# ---- who speaks ----


def test_librispeech_names_give_speakers_and_other_files_are_their_own(tmp_path):
    folder = tmp_path / "speech"
    for name in [
        "dev/84/121/84-121-0001.flac", "dev/84/121/84-121-0000.flac", "dev/84/300/84-300-0000.flac",
        "dev/7/1/7-1-0000.flac", "x/y/84-121-0000.flac", "84/121/other.flac", "z.wav", "84/121/84-122-0000.flac",
    ]:
        write(folder / name, tone(0.6))
    bank = bank_of(folder, tmp_path)
    of = dict(zip(bank.names, bank.speaker.tolist(), strict=True))
    eighty_four = {of[name] for name in bank.names if name.startswith("dev/84/")}
    assert len(eighty_four) == 1
    assert len(set(of.values())) == bank.num_speakers == 6
    # sorted by speaker, without gaps, and the tables say where each begins
    assert bank.speaker.tolist() == sorted(bank.speaker.tolist())
    for index in range(6):
        first, count = bank.speaker_start[index], bank.speaker_count[index]
        assert (bank.speaker[first:first + count] == index).all() and (bank.speaker == index).sum() == count


def test_speaker_is_known_from_a_folder_inside_the_layout(tmp_path):
    for number in range(2):
        write(tmp_path / "84" / "121" / f"84-121-000{number}.flac", tone(0.6))
    assert bank_of(tmp_path / "84", tmp_path).num_speakers == 1
    assert bank_of(tmp_path / "84" / "121", tmp_path).num_speakers == 1


# ---- bad files ----


def test_unusable_files_are_skipped_with_one_line(tmp_path, caplog):
    folder = tmp_path / "speech"
    write(folder / "good.wav", tone(1.0))
    write(folder / "b_short.wav", tone(0.3))
    write(folder / "c_empty.wav", np.zeros(0))
    write(folder / "d_nan.wav", np.full(RATE, np.nan), subtype="FLOAT")
    write(folder / "e_odd.wav", tone(1.0, rate=44101), 44101)
    (folder / "a_junk.flac").write_bytes(b"this is not audio\n" * 100)
    (folder / "f_nothing.ogg").write_bytes(b"")
    for _ in range(2):  # decoded, then from the cache: the warning must not be lost
        caplog.clear()
        assert bank_of(folder, tmp_path).names == ("good.wav",)
        [record] = caplog.records
        message = record.getMessage()
        assert "skipped 6 of 7 speech files" in message and "first: a_junk.flac (unreadable: " in message
        assert "\n" not in message


@pytest.mark.parametrize(
    ("audio", "rate", "reason"),
    [
        (np.zeros(0), RATE, "no samples"),
        (tone(0.25), RATE, "0.25 s, shorter than speech.min_duration_s = 0.5"),
        (np.full(RATE, np.inf), RATE, "not finite"),
        (np.full(RATE, 1e-6), RATE, "nothing but silence"),
        (tone(1.0, rate=44101), 44101, "44101 Hz has too small a common factor with 16000 Hz, 1: the filter must "
         "have at most 67.11 million taps, has 705.6; resample the audio beforehand"),
    ],
)
def test_skipping_says_why_and_nothing_left_is_refused(tmp_path, audio, rate, reason):
    write(tmp_path / "speech" / "a.wav", audio, rate, subtype="FLOAT")
    with pytest.raises(SpeechError, match="skipped all 1 files") as error:
        bank_of(tmp_path / "speech", tmp_path)
    assert reason in str(error.value) and "a.wav" in str(error.value) and "\n" not in str(error.value)


def test_min_duration_is_a_matter_of_configuration(tmp_path):
    write(tmp_path / "speech" / "a.wav", tone(0.3))
    write(tmp_path / "speech" / "b.wav", tone(1.0))
    assert len(bank_of(tmp_path / "speech", tmp_path).names) == 1
    assert len(bank_of(tmp_path / "speech", tmp_path, min_duration_s=0.1).names) == 2  # and not the cache of the other


def test_truncated_file_does_not_stop_the_rest(tmp_path):
    write(tmp_path / "speech" / "a.flac", np.random.default_rng(0).normal(0, 0.1, RATE * 4))
    write(tmp_path / "speech" / "b.wav", tone(1.0))
    whole = (tmp_path / "speech" / "a.flac").read_bytes()
    (tmp_path / "speech" / "a.flac").write_bytes(whole[:len(whole) // 50])
    assert "b.wav" in bank_of(tmp_path / "speech", tmp_path).names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "must be an existing folder, got '.*speech'"),
        (lambda folder: folder.write_text("a file"), "must be an existing folder, got '.*speech'"),
        (lambda folder: folder.mkdir(), r"must hold audio \(.flac, .ogg, .opus, .wav\), found none in '.*speech'"),
    ],
)
def test_missing_or_empty_folder_is_one_clear_line(tmp_path, make, message):
    make(tmp_path / "speech")
    with pytest.raises(SpeechError, match=message) as error:
        bank_of(tmp_path / "speech", tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cache").exists()


# ---- the cache ----


def test_cache_is_used_until_something_changes(tmp_path, monkeypatch):
    folder = tmp_path / "speech"
    for name in ("a.wav", "b.wav"):
        write(folder / name, tone(1.0))
    first = bank_of(folder, tmp_path)
    decoded = count_decodes(monkeypatch)
    second = bank_of(folder, tmp_path)
    assert decoded == []
    for field in dataclasses.fields(first):
        one, two = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, field.name

    os.utime(folder / "a.wav", (1, 1))  # the content is what counts
    bank_of(folder, tmp_path)
    assert decoded == []
    write(folder / "a.wav", tone(1.0, 441.0))  # the same size, another content
    changed = bank_of(folder, tmp_path)
    assert decoded == ["a.wav", "b.wav"] and not torch.equal(changed.samples, first.samples)
    bank_of(folder, tmp_path, rate=8000)
    assert len(decoded) == 4
    (folder / "b.wav").rename(folder / "c.wav")
    assert bank_of(folder, tmp_path).names == ("a.wav", "c.wav") and len(decoded) == 6
    assert len(cache_files(tmp_path)) == 4


def test_cache_moves_with_the_folder(tmp_path, monkeypatch):
    write(tmp_path / "speech" / "a.wav", tone(1.0))
    bank_of(tmp_path / "speech", tmp_path)
    (tmp_path / "speech").rename(tmp_path / "elsewhere")
    decoded = count_decodes(monkeypatch)
    bank_of(tmp_path / "elsewhere", tmp_path)
    assert decoded == []


def test_speakers_are_part_of_the_cache_key(tmp_path):
    """The same relative name and content below folders of other names is another speaker."""
    for folder in ("84/121", "x/121"):
        for number in range(2):
            write(tmp_path / folder / f"84-121-000{number}.wav", tone(0.6))
    assert bank_of(tmp_path / "84" / "121", tmp_path).num_speakers == 1
    assert bank_of(tmp_path / "x" / "121", tmp_path).num_speakers == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "lengths"])
def test_damaged_cache_is_rebuilt(tmp_path, monkeypatch, caplog, damage):
    write(tmp_path / "speech" / "a.wav", tone(1.0))
    first = bank_of(tmp_path / "speech", tmp_path)
    [path] = cache_files(tmp_path)
    whole = path.read_bytes()
    if damage == "flipped":
        broken = bytearray(whole)
        broken[len(whole) // 2] ^= 1
    elif damage == "lengths":
        with np.load(path) as file:
            content = dict(file)
        np.savez(path, samples=content["samples"][1:], meta=content["meta"])
        broken = path.read_bytes()
    else:
        broken = {"empty": b"", "cut": whole[:len(whole) // 2], "text": b"hello\n" * 100}[damage]
    path.write_bytes(broken)
    decoded = count_decodes(monkeypatch)
    assert torch.equal(bank_of(tmp_path / "speech", tmp_path).samples, first.samples)
    assert decoded == ["a.wav"]
    assert "rebuilding the damaged speech cache" in caplog.text
    assert path.read_bytes() == whole
    bank_of(tmp_path / "speech", tmp_path)
    assert decoded == ["a.wav"]


def test_cache_that_cannot_be_written_costs_a_warning_and_leaves_nothing(tmp_path, monkeypatch, caplog):
    write(tmp_path / "speech" / "a.wav", tone(1.0))

    def full_disk(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    assert len(bank_of(tmp_path / "speech", tmp_path).samples) == RATE
    assert "cannot be written (No space left on device); the speech is decoded again next time" in caplog.text
    assert cache_files(tmp_path) == []


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "speech" / "a.wav", tone(1.0))

    def interrupted(file, **arrays):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bank_of(tmp_path / "speech", tmp_path)
    assert cache_files(tmp_path) == []


def test_cache_folder_is_xdg_then_home(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/h")
    assert corpus_module.cache_folder(None) == Path("/x/ssl_gpu")
    assert corpus_module.cache_folder("/mine") == Path("/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert corpus_module.cache_folder(None) == Path("/h/.cache/ssl_gpu")


# ---- the bank ----


def test_bank_stays_on_the_host_when_it_would_fill_half_the_device():
    assert fits_on_device(10**12, None)
    assert fits_on_device(50, 100) and not fits_on_device(51, 100)


def test_bank_too_large_for_the_device_delivers_there(tmp_path, monkeypatch):
    """The meta device stands for any that is not the host."""
    write(tmp_path / "speech" / "a.wav", tone(1.0))
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    arguments = {"sample_rate": RATE, "device": "meta", "progress": False}
    large = load_bank(tmp_path / "speech", config(tmp_path), **arguments, free_bytes=2 * 2 * RATE - 1)
    assert large.samples.device.type == large.start.device.type == "cpu" and large.device.type == "meta"
    assert pinned == [(RATE,)]
    crops = draw_crops(large, 3, 1, 100, Crop.RANDOM, generator=generator())
    assert gather_crops(large, crops, 100).device.type == "meta"
    assert pinned == [(RATE,), (3, 1, 100)]
    small = load_bank(tmp_path / "speech", config(tmp_path), **arguments, free_bytes=2 * 2 * RATE)
    assert small.samples.device.type == small.start.device.type == "meta"
    with pytest.raises(ValueError, match="generator must be on the speech bank's meta, got cpu"):
        draw_crops(small, 3, 1, 100, Crop.RANDOM, generator=generator())


def test_to_moves_every_tensor():
    moved = ramp_bank([2, 3]).to("meta")
    assert moved.device.type == "meta"
    assert all(getattr(moved, f.name).device.type == "meta" for f in dataclasses.fields(moved)
               if isinstance(getattr(moved, f.name), torch.Tensor))
    assert moved.names == ("0", "1", "2", "3", "4")


# ---- crops ----


def test_crop_is_that_stretch_of_that_utterance_and_zero_after_its_end():
    speaker = torch.tensor([0, 1, 1])
    length = torch.tensor([10, 4, 6])
    samples = torch.arange(1, 21).to(torch.int16)
    bank = make_bank(samples, length, speaker, ("a", "b", "c"), RATE)
    crops = CropBatch(torch.tensor([[0, 1], [2, 0], [2, 2]]), torch.tensor([[2, 0], [1, 7], [0, 5]]))
    expected = torch.tensor([
        [[3, 4, 5, 6, 7], [11, 12, 13, 14, 0]],
        [[16, 17, 18, 19, 20], [8, 9, 10, 0, 0]],
        [[15, 16, 17, 18, 19], [20, 0, 0, 0, 0]],
    ])
    audio = gather_crops(bank, crops, 5)
    assert audio.dtype == torch.float32
    assert torch.equal(audio * 32768, expected.float())
    assert gather_crops(bank, crops, 50)[0, 0].count_nonzero() == 8  # longer than the whole bank


def test_full_scale_is_minus_one():
    samples, zero = torch.tensor([-32768, 32767], dtype=torch.int16), torch.zeros(1, 1, dtype=torch.int64)
    bank = make_bank(samples, torch.tensor([2]), torch.tensor([0]), ("a",), RATE)
    audio = gather_crops(bank, CropBatch(zero, zero), 2)
    assert audio.flatten().tolist() == [-1.0, 32767 / 32768]


def test_talkers_of_a_scene_always_differ():
    bank = ramp_bank([1, 40, 2, 1])
    crops = draw_crops(bank, 2000, 4, 10, Crop.RANDOM, generator=generator())
    speakers = bank.speaker[crops.utterance].sort(-1).values
    assert torch.equal(speakers, torch.arange(4).expand(2000, 4))
    crops = draw_crops(bank, 2000, 2, 10, Crop.RANDOM, generator=generator())
    first, second = bank.speaker[crops.utterance].unbind(-1)
    assert (first != second).all()


def test_too_few_speakers_is_one_clear_line():
    with pytest.raises(SpeechError, match="speech must have at least 3 speakers, one per source, got 2"):
        draw_crops(ramp_bank([5, 5]), 1, 3, 10, Crop.RANDOM, generator=generator())


def chi_square(counts: torch.Tensor, probability: torch.Tensor) -> float:
    expected = probability * counts.sum()
    return float(((counts - expected).square() / expected).sum())


def test_first_talker_is_of_an_utterance_drawn_uniformly():
    bank = ramp_bank([1, 2, 3, 6, 12])
    crops = draw_crops(bank, 24000, 2, 10, Crop.RANDOM, generator=generator(1))
    counts = torch.bincount(crops.utterance[:, 0], minlength=24).double()
    assert chi_square(counts, torch.full((24,), 1 / 24)) < 49.7  # 23 degrees of freedom, p = 0.001


def test_pairs_of_talkers_follow_drawing_without_replacement():
    count = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    crops = draw_crops(ramp_bank([1, 2, 5]), 24000, 2, 10, Crop.RANDOM, generator=generator(2))
    speaker = ramp_bank([1, 2, 5]).speaker[crops.utterance]
    pair = torch.bincount(3 * speaker[:, 0] + speaker[:, 1], minlength=9).double()
    expected = count[:, None] / 8 * count / (8 - count[:, None])
    expected.fill_diagonal_(0)
    used = expected.flatten() > 0
    assert pair[~used].sum() == 0
    assert chi_square(pair[used], expected.flatten()[used]) < 20.5  # 5 degrees of freedom, p = 0.001


def test_offsets_are_uniform_over_all_that_fit():
    crops = draw_crops(ramp_bank([3, 3], length=100), 20000, 2, 91, Crop.RANDOM, generator=generator(3))
    counts = torch.bincount(crops.offset.flatten(), minlength=10).double()
    assert len(counts) == 10  # 0 to 9: the last crop ends with the utterance
    assert chi_square(counts, torch.full((10,), 0.1)) < 27.9  # 9 degrees of freedom, p = 0.001


def test_first_crops_and_short_utterances_start_at_zero():
    first = draw_crops(ramp_bank([3, 3]), 100, 2, 10, Crop.FIRST, generator=generator())
    assert (first.offset == 0).all()
    short = draw_crops(ramp_bank([3, 3]), 100, 2, 101, Crop.RANDOM, generator=generator())
    assert (short.offset == 0).all()
    # which utterances speak does not depend on where they are cropped
    same = draw_crops(ramp_bank([3, 3]), 100, 2, 10, Crop.RANDOM, generator=generator())
    assert torch.equal(same.utterance, first.utterance)


def test_same_generator_same_crops():
    one, two, other = (draw_crops(ramp_bank([3, 3]), 9, 2, 10, Crop.RANDOM, generator=generator(s)) for s in (4, 4, 5))
    assert torch.equal(one.utterance, two.utterance) and torch.equal(one.offset, two.offset)
    assert not torch.equal(one.offset, other.offset)


def test_crops_need_nothing_from_the_device():
    """Fake tensors have no values: whatever would wait for the device to learn one raises here."""
    bank = ramp_bank([2, 3, 4])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = dataclasses.replace(bank, **{field.name: mode.from_tensor(getattr(bank, field.name))
                                            for field in dataclasses.fields(bank)
                                            if isinstance(getattr(bank, field.name), torch.Tensor)})
        crops = draw_crops(fake, 4, 2, 30, Crop.RANDOM, generator=generator())
        assert gather_crops(fake, crops, 30).shape == (4, 2, 30)
        with pytest.raises(Exception, match="item|nonzero|_local_scalar_dense"):
            crops.offset.max().item()


# ---- voices ----


def test_voices_bank_follows_its_configuration():
    cfg = SpeechConfig(voices_speakers=3, voices_utterances=2, voices_duration_s=0.25)
    bank = voices_bank(cfg, sample_rate=8000, generator=generator())
    assert bank.num_speakers == 3 and bank.length.tolist() == [2000] * 6 and bank.sample_rate == 8000
    assert bank.speaker.tolist() == [0, 0, 1, 1, 2, 2] and len(set(bank.names)) == 6
    assert bank.duration_s == 1.5 and bank.samples.dtype == torch.int16
    crops = draw_crops(bank, 4, 2, 1000, Crop.RANDOM, generator=generator())
    assert gather_crops(bank, crops, 1000).square().mean() > 1e-4


# ---- configuration ----


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train", "", "speech.train must be a folder name or null, got ''"),
        ("eval", 3, "speech.eval must be a folder name or null, got 3"),
        ("cache_dir", "", "speech.cache_dir must be a folder name or null, got ''"),
        ("crop", "last", "speech.crop must be one of random, first, got 'last'"),
        ("min_duration_s", -1, "speech.min_duration_s must be >= 0, got -1"),
        ("min_duration_s", float("nan"), "speech.min_duration_s must be >= 0, got nan"),
        ("voices_speakers", 0, "speech.voices_speakers must be an integer >= 1, got 0"),
        ("voices_utterances", 1.5, "speech.voices_utterances must be an integer >= 1, got 1.5"),
        ("voices_duration_s", 0.0, "speech.voices_duration_s must be > 0, got 0.0"),
    ],
)
def test_impossible_values_are_refused(field, value, message):
    with pytest.raises(ValueError) as error:
        SpeechConfig(**{field: value})
    assert str(error.value) == message


# ---- the command line ----


def run_cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ssl_gpu.speech", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, **environment},
    )


def test_info_counts_what_is_there(tmp_path, capsys):
    for speaker in (1, 2):
        for number in range(3):
            write(tmp_path / "speech" / f"{speaker}/5/{speaker}-5-000{number}.flac", tone(6.0))
    (tmp_path / "speech" / "z.wav").write_bytes(b"junk")
    assert speech.main(["info", str(tmp_path / "speech"), "--cache-dir", str(tmp_path / "cache")]) == 0
    output = capsys.readouterr().out
    assert output == "6 utterances, 2 speakers, 0.01 hours, 1.2 MB at 16000 Hz, 1 file skipped\n"
    assert len(cache_files(tmp_path)) == 1


def test_errors_name_the_setting_that_names_the_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, rule in (("nowhere", "be an existing folder"), ("empty", "hold audio")):
        with pytest.raises(SpeechError, match=f"^speech.train must {rule}"):
            load_bank(tmp_path / name, config(tmp_path), sample_rate=16000, device="cpu", called="speech.train")


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    """In a process of its own, as a user sees it: no traceback, no warning from running a module."""
    done = run_cli("info", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: speech folder must be an existing folder, got '{tmp_path}/nowhere'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["download", "dev-cleen"], "error: LibriSpeech subset must be one of dev-clean, dev-other, test-clean, "
         "test-other, train-clean-100, train-clean-360, train-other-500, got 'dev-cleen'\n"),
        (["info", ".", "--sample-rate", "0"], "error: --sample-rate must be >= 1 Hz, got 0\n"),
    ],
)
def test_wrong_arguments_are_one_line(capsys, arguments, message):
    assert speech.main(arguments) == 2
    assert capsys.readouterr().err == message


# ---- download ----


def librispeech_archive(top: str = "LibriSpeech") -> bytes:
    """dev-clean.tar.gz as OpenSLR packs it, with three utterances of two speakers."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for speaker, chapter, count in ((84, 121123, 2), (174, 50561, 1)):
            stem = f"{top}/dev-clean/{speaker}/{chapter}/{speaker}-{chapter}"
            members = [(f"{stem}.trans.txt", b"84-121123-0000 GO DO YOU HEAR\n")]
            for number in range(count):
                flac = io.BytesIO()
                soundfile.write(flac, tone(1.0), RATE, format="FLAC")
                members.append((f"{stem}-{number:04d}.flac", flac.getvalue()))
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def mirror(monkeypatch):
    """A local web server that answers for OpenSLR: torchaudio's address is fixed, but it goes through http_proxy."""
    served = {"content": librispeech_archive(), "status": 200, "requests": [], "cut": 0}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            served["requests"].append(self.path)
            self.send_response(served["status"])
            self.send_header("Content-Length", str(len(served["content"])))
            self.end_headers()
            self.wfile.write(served["content"][:len(served["content"]) - served["cut"]])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(urllib.request, "_opener", None)  # it would remember the proxy of the last test
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    librispeech = pytest.importorskip("torchaudio.datasets.librispeech")
    address = "http://www.openslr.org/resources/12/dev-clean.tar.gz"
    monkeypatch.setitem(librispeech._CHECKSUMS, address, sha256(served["content"]).hexdigest())
    yield served
    server.shutdown()
    server.server_close()


# Python 3.12 and 3.13 announce that unpacking will become stricter; the call is torchaudio's.
unpacks = pytest.mark.filterwarnings("ignore:.*tar:DeprecationWarning")


@unpacks
def test_download_gives_a_folder_the_loader_understands(tmp_path, mirror, capsys):
    out = tmp_path / "data" / "librispeech"
    assert speech.main(["download", "dev-clean", "--out", str(out)]) == 0
    assert mirror["requests"] == ["http://www.openslr.org/resources/12/dev-clean.tar.gz"]
    assert capsys.readouterr().out == f"{out}/LibriSpeech/dev-clean\n"
    bank = bank_of(out / "LibriSpeech" / "dev-clean", tmp_path)
    assert len(bank.names) == 3 and bank.num_speakers == 2
    assert [path.name for path in out.iterdir()] == ["LibriSpeech"]  # no archive, no temporary folder
    assert speech.main(["download", "dev-clean", "--out", str(out)]) == 0  # nothing to do
    assert len(mirror["requests"]) == 1


@unpacks
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"status": 404}, "HTTP Error 404"),
        ({"cut": 100}, "invalid hash value"),
        ({"content": b"something else"}, "invalid hash value"),
    ],
)
def test_failed_download_is_one_line_and_leaves_nothing(tmp_path, mirror, capsys, change, reason):
    mirror.update(change)
    out = tmp_path / "librispeech"
    assert speech.main(["download", "dev-clean", "--out", str(out)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # after the progress bar
    assert last.startswith(f"error: LibriSpeech dev-clean could not be fetched into '{out}': ") and reason in last
    assert list(out.iterdir()) == []


@unpacks
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"not a tar", "could not be opened"), (b"", "empty file"), ("cut", "ended before the end-of-stream"),
        (librispeech_archive("Other"), "the archive holds no utterances"),
    ],
    ids=["text", "empty", "cut", "other"],
)
def test_archive_that_does_not_unpack_leaves_nothing(tmp_path, mirror, monkeypatch, capsys, content, reason):
    """The checksum is right, the content is not: the folder must not appear half full."""
    librispeech = sys.modules["torchaudio.datasets.librispeech"]
    mirror["content"] = mirror["content"][:-3000] if content == "cut" else content
    address = "http://www.openslr.org/resources/12/dev-clean.tar.gz"
    monkeypatch.setitem(librispeech._CHECKSUMS, address, sha256(mirror["content"]).hexdigest())
    assert speech.main(["download", "dev-clean", "--out", str(tmp_path / "out")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: LibriSpeech dev-clean could not be fetched") and reason in last
    assert list((tmp_path / "out").iterdir()) == []


def test_no_network_is_one_line(tmp_path, mirror, monkeypatch, capsys):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # the discard port: nobody listens
    assert speech.main(["download", "dev-clean", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: LibriSpeech dev-clean could not be fetched") and error.count("\n") == 1
    assert "Connection refused" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_subsets_are_those_torchaudio_knows():
    librispeech = pytest.importorskip("torchaudio.datasets.librispeech")
    assert list(corpus_module.LIBRISPEECH_SUBSETS) == librispeech._DATA_SUBSETS


def test_corpus_of_the_cache_says_what_was_skipped(tmp_path):
    write(tmp_path / "speech" / "a.wav", tone(1.0))
    write(tmp_path / "speech" / "b.wav", tone(0.1))
    arguments = {"sample_rate": RATE, "min_duration_s": 0.5, "cache_dir": str(tmp_path / "cache"), "progress": False}
    for _ in range(2):
        corpus = load_corpus(tmp_path / "speech", **arguments)
        assert corpus.skipped == 1 and corpus.first_skipped.startswith("b.wav (0.1 s")
        assert corpus.talker == ("a.wav",)


def test_warnings_are_seen_without_any_logging_set_up(tmp_path):
    """A library's warnings reach standard error as one bare line."""
    write(tmp_path / "speech" / "a.wav", tone(1.0))
    write(tmp_path / "speech" / "b.wav", tone(0.1))
    done = run_cli("info", str(tmp_path / "speech"), XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert done.returncode == 0 and "1 utterance, 1 speaker, " in done.stdout
    line = f"warning: skipped 1 of 2 speech files in {tmp_path}/speech; first: b.wav (0.1 s, shorter than"
    assert any(text.startswith(line) for text in done.stderr.splitlines())
    assert len(list((tmp_path / "xdg" / "ssl_gpu").iterdir())) == 1
    assert logging.getLogger("ssl_gpu").handlers == []
