"""GCC-PHAT in the original's 200 evaluation rooms: clip by clip against its definition, and against a table of errors.

TABLE was measured independently of this package, before it had baselines: 600 mixtures, three in each of the rooms, two
LibriSpeech talkers for 3 s, no noise; rooms by FRA-RIR, and the same geometries by pyroomacoustics. A standard error is
about 0.9 degrees. Here the three are the first three of e0 in each room. LibriSpeech is not part of this package:

    SSL_GPU_SPEECH=/path/to/test-clean python -m pytest -m slow tests/test_baseline_table.py

Frames that lie within the clip, as ours do, gave 10.06 / 9.02 (maximum) and 21.39 / 18.37 (mean) for FRA-RIR, and 11.49
/ 10.04 and 23.32 / 19.26 for pyroomacoustics, where the maximum is 2.7 / 2.2 better than in the table. It is not for
the talkers: eight other draws of 600 pairs had 11.50 / 9.95 there, with a standard deviation of 0.5, and as many of
equal power 11.77 / 9.99. It is for the frames. torch.stft by its default centres them, so that the first and the last
hear the clip's ends mirrored, with directions of their own, of which a maximum is full and a mean is not; how full
depends on the floor for rounding noise, as clips end in silence. With such frames and a floor of 1e-8 of the loudest
bin everything is within 2 degrees of the table (maximum: 11.66 / 9.39, and 12.57 / 11.12), with 1e-7 added to every
|X0 X1| within 0.6 (11.43 / 9.92 and 13.65 / 12.24). So the table was most likely made with centred frames, and ours are
the better baseline. (Draws of other talkers, and other floors, by scripts that are not kept.)

Synthetic voices overlap less and are easier to tell apart. They cannot stand for the table: what they are held to are
their own errors, recorded in VOICES, and the definition.
"""
import os

import numpy as np
import pytest
import torch

from ssl_gpu import baselines, protocol, rng
from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.baselines import Pooling, srp_phat_by
from ssl_gpu.convolve import convolve_sources
from ssl_gpu.doa import sorted_angles
from ssl_gpu.original import NUM_EVAL_SCENES
from ssl_gpu.protocol import NUM_SAMPLES, SAMPLE_RATE, SEEDS, SetOptions, draw_original, fra_clips
from ssl_gpu.scene import original_scenes
from ssl_gpu.speech import CropBatch, SpeechConfig, gather_crops, load_bank, voices_bank

PER_ROOM = 3
FRA, ISM = "FRA-RIR", "pyroomacoustics"

# Mean error of the smaller and of the larger cone angle, median (degrees); share within 5, 10, 15 degrees (%).
TABLE = {FRA: {Pooling.MAX: ((11.3, 9.9), 1.1, (72, 77, 80)), Pooling.MEAN: ((20.8, 18.5), 7.3, (46, 54, 60))},
         ISM: {Pooling.MAX: ((14.2, 12.2), 3.1, (59, 69, 75)), Pooling.MEAN: ((22.8, 19.3), 7.9, (40, 56, 63))}}
VOICES = {Pooling.MAX: ((8.09, 6.00), 0.75, (80.6, 83.9, 86.0)),
          Pooling.MEAN: ((21.77, 16.72), 7.08, (44.6, 54.3, 60.5))}
OURS = {  # the same with frames within the clip
    FRA: {Pooling.MAX: ((10.06, 9.02), 1.08, (74, 79, 81)), Pooling.MEAN: ((21.39, 18.37), 7.42, (43, 53, 58))},
    ISM: {Pooling.MAX: ((11.49, 10.04), 2.74, (61, 72, 79)), Pooling.MEAN: ((23.32, 19.26), 8.28, (38, 54, 62))}}
TABLE_FLOOR = 1e-8  # of the loudest bin, for centred frames


def voices(speakers, utterances):
    generator = rng.generator(0, rng.Split.TEST, rng.Stream.VOICES, 0)
    cfg = SpeechConfig(voices_speakers=speakers, voices_utterances=utterances, voices_duration_s=3.2)
    return voices_bank(cfg, sample_rate=SAMPLE_RATE, generator=generator)


@pytest.fixture(scope="module")
def librispeech(tmp_path_factory):
    folder = os.environ.get("SSL_GPU_SPEECH")
    if not folder:
        pytest.skip("SSL_GPU_SPEECH names no folder of LibriSpeech test-clean")
    cache = str(tmp_path_factory.mktemp("speech"))
    return load_bank(folder, SpeechConfig(cache_dir=cache), sample_rate=SAMPLE_RATE, device="cpu", progress=False)


def drawn(speech, per_room=None):
    """Scenes, crops and rooms of e0; per_room: the first so many of each room alone."""
    scenes, crops, room = draw_original(SetOptions(speech, torch.device("cpu")))
    if per_room is not None:
        rows = torch.cat([(room == number).nonzero().squeeze(1)[:per_room] for number in range(NUM_EVAL_SCENES)])
        scenes, crops, room = scenes[rows], CropBatch(crops.utterance[rows], crops.offset[rows]), room[rows]
    return scenes, crops, room


def in_fra_rooms(speech, scenes, crops, room):
    """As e0 is heard: in the one RIR of each room."""
    options = SetOptions(speech, torch.device("cpu"))
    for clips in fra_clips(options, SEEDS["e0"], scenes, crops, room, pool=original_scenes()):
        yield clips.audio, clips.mic_pos, clips.cone


def in_ism_rooms(speech, scenes, crops, room):
    """One geometry at a time, with image-source RIRs as in e2."""
    pyroomacoustics = protocol.import_pyroomacoustics()
    for number in range(NUM_EVAL_SCENES):
        rows = (room == number).nonzero().squeeze(1)
        rirs = torch.from_numpy(protocol._their_rirs(pyroomacoustics, original_scenes(), number))
        dry = gather_crops(speech, CropBatch(crops.utterance[rows], crops.offset[rows]), NUM_SAMPLES)
        audio = convolve_sources(dry, rirs.expand(len(rows), -1, -1, -1), NUM_SAMPLES)
        yield audio, scenes.mic_pos[rows], scenes.cone_angle[rows]


def errors_of(blocks):
    """Degrees, [clip, src] of each pooling."""
    errors = {pooling: [] for pooling in Pooling}
    for audio, mic_pos, cone in blocks:
        for pooling, found in srp_phat_by(audio, mic_pos, SAMPLE_RATE, 2).items():
            errors[pooling].append(torch.rad2deg((found.double() - sorted_angles(cone)).abs()))
    return {pooling: torch.cat(parts).numpy() for pooling, parts in errors.items()}


def centred(blocks):
    """Clips mirrored at both ends by half a frame, whose frames are those of torch.stft by its default."""
    for audio, *others in blocks:
        yield torch.nn.functional.pad(audio, (baselines.N_FFT // 2,) * 2, mode="reflect"), *others


def compare(errors, expected, tolerance, num_clips, share=5):
    """Errors and median within `tolerance` degrees, shares within `share` of a hundred; 2 and 5 are two standard errors
    of the table."""
    for pooling, (mae, median, shares) in expected.items():
        error = errors[pooling]
        assert error.shape == (num_clips, 2)
        np.testing.assert_allclose(error.mean(0), mae, rtol=0, atol=tolerance)
        np.testing.assert_allclose(np.median(error), median, rtol=0, atol=tolerance)
        np.testing.assert_allclose([100 * (error <= limit).mean() for limit in (5, 10, 15)], shares, rtol=0, atol=share)


def by_definition(audio, pooling):
    """The two angles in whole degrees, ascending, of audio [mic=2, sample] in float64, as the table defines them.

    Hann STFT 1024/256, the phase of each bin within 200 to 7,500 Hz alone, delays 0.1 cos(angle) / 340 s every degree;
    mean over the band per frame, pooled over frames; of the local maxima, both ends among them, the highest and the
    next one at least 8 degrees away, or the same twice.
    """
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.lib.stride_tricks.sliding_window_view(audio.double().numpy(), 1024, -1)[:, ::256]
    first, second = np.fft.rfft(window * frames)                        # [frame, freq]
    hertz = np.arange(513) * SAMPLE_RATE / 1024
    band = (hertz >= 200) & (hertz <= 7500)
    cross = (second * first.conj())[:, band]
    delay = 0.1 * np.cos(np.deg2rad(np.arange(181))) / SPEED_OF_SOUND
    response = np.real(cross / np.abs(cross) @ np.exp(-2j * np.pi * hertz[band, None] * delay)) / band.sum()
    response = response.max(0) if pooling is Pooling.MAX else response.mean(0)
    padded = np.pad(response, 1, constant_values=-np.inf)
    maxima = np.flatnonzero((response > padded[:-2]) & (response >= padded[2:]))
    maxima = maxima[np.argsort(-response[maxima])]
    far = maxima[np.abs(maxima - maxima[0]) >= 8]
    return sorted((maxima[0], far[0] if len(far) else maxima[0]))


def test_angles_of_e0_are_those_of_the_definition(monkeypatch):
    """Of 24 clips all, but for the floor below which a bin's phase is rounding noise. The definition has none; with it
    5 of 50 differ (maximum; mean: 2), by 1 to 4 degrees. Rounding may one day make two peaks change places in a clip or
    so."""
    speech = voices(10, 5)
    audio, mic_pos = (each[:24] for each in next(in_fra_rooms(speech, *drawn(speech)))[:2])
    expected = {pooling: np.array([by_definition(clip, pooling) for clip in audio]) for pooling in Pooling}
    for floor, least in ((baselines.POWER_FLOOR, 0.8), (0.0, 0.98)):
        monkeypatch.setattr(baselines, "POWER_FLOOR", floor)
        for pooling, found in srp_phat_by(audio, mic_pos, SAMPLE_RATE, 2).items():
            gap = np.abs(torch.rad2deg(found).round().numpy() - expected[pooling]).max(1)
            assert len(gap) == 24 and (gap == 0).mean() >= least and (gap <= 5).mean() >= 0.95
            assert len(np.unique(found)) > 15


@pytest.mark.slow
def test_errors_with_synthetic_voices_are_those_recorded():
    """600 mixtures of e0, the voices being 600 utterances: another answer to a clip in ten would be noticed."""
    speech = voices(40, 15)
    compare(errors_of(in_fra_rooms(speech, *drawn(speech))), VOICES, 0.5, 600)


@pytest.mark.slow
@pytest.mark.parametrize("rooms", [FRA, ISM])
def test_errors_with_librispeech_are_those_of_the_table(librispeech, rooms, monkeypatch):
    if rooms == ISM:
        pytest.importorskip("pyroomacoustics")
    blocks = list((in_fra_rooms if rooms == FRA else in_ism_rooms)(librispeech, *drawn(librispeech, PER_ROOM)))
    compare(errors_of(blocks), OURS[rooms], 0.3, NUM_EVAL_SCENES * PER_ROOM, share=1)
    monkeypatch.setattr(baselines, "POWER_FLOOR", TABLE_FLOOR)
    compare(errors_of(centred(blocks)), TABLE[rooms], 2.0, NUM_EVAL_SCENES * PER_ROOM)
