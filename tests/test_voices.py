"""The synthetic voices: how much they are like speech, where it matters to a microphone array."""
from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ssl_gpu import voices
from ssl_gpu.voices import draw_talkers, draw_voices, glottal_pulse, render_voices, synthesize_voices

RATE = 16000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def rendered():
    """32 talkers, one utterance of 4 s each, and what they were drawn from."""
    source = generator()
    params = draw_voices(draw_talkers(32, generator=source), 4 * RATE, RATE, generator=source)
    return params, render_voices(params)


def octave_levels_db(audio: torch.Tensor) -> dict[int, float]:
    """Mean power density in octave bands, in dB re the one at 500 Hz."""
    power = torch.stft(audio, 512, window=torch.hann_window(512), return_complex=True).abs().square().mean((0, 2))
    freq_hz = torch.arange(257) * (RATE / 512)
    band = {f: power[(freq_hz >= f / 1.41) & (freq_hz < f * 1.41)].mean() for f in (125, 250, 500, 1000, 2000, 4000)}
    return {f: 10 * math.log10(level / band[500]) for f, level in band.items()}


def frame_levels_db(audio: torch.Tensor, frame: int = 320) -> torch.Tensor:
    """RMS of the 20 ms frames of each row, [row, frame], in dB re the loudest."""
    power = audio.unfold(-1, frame, frame).square().mean(-1)
    return 10 * torch.log10(power / power.amax(-1, keepdim=True) + 1e-12)


def pitch_hz(audio: torch.Tensor, low_hz: float, high_hz: float) -> np.ndarray:
    """Pitch of the clearly voiced 40 ms frames of [sample], by the peak of the normalised autocorrelation."""
    frames = audio.unfold(-1, 640, 320)
    frames = frames[frames.square().mean(-1) > 0.1 * frames.square().mean(-1).max()]
    frames = frames - frames.mean(-1, keepdim=True)
    correlation = torch.fft.irfft(torch.fft.rfft(frames, 2048).abs().square())[:, :640]
    correlation = correlation / correlation[:, :1] * (640 / (640 - torch.arange(640)))
    shortest, longest = int(RATE / high_hz), int(RATE / low_hz) + 1
    peak, lag = correlation[:, shortest:longest].max(-1)
    return RATE / (lag[peak > 0.75] + shortest).numpy()


def test_long_term_spectrum_falls_like_speech(rendered):
    """dev-clean of LibriSpeech has -0.6, 0.9, 0, -8.5, -14.4, -22.1 dB in these octaves; single talkers differ by 7."""
    level_db = octave_levels_db(rendered[1])
    assert abs(level_db[125]) < 4 and abs(level_db[250]) < 4
    assert -12 < level_db[1000] < -4
    assert -19 < level_db[2000] < -10
    assert -28 < level_db[4000] < -17


def test_spectrum_above_1_khz_falls_as_fast_as_speech(rendered):
    """-7.2 dB per octave from 1 to 7 kHz in dev-clean."""
    power = torch.stft(rendered[1], 512, window=torch.hann_window(512), return_complex=True).abs().square().mean((0, 2))
    freq_hz = np.arange(257) * (RATE / 512)
    high = (freq_hz >= 1000) & (freq_hz <= 7000)
    slope = np.polyfit(np.log2(freq_hz[high]), 10 * np.log10(power.numpy()[high]), 1)[0]
    assert -10 < slope < -4


def test_a_fifth_of_the_time_is_silent(rendered):
    """Frames 40 dB below the loudest: 15 % in dev-clean (26 % at 30 dB, where its noise no longer hides the pauses)."""
    silent = (frame_levels_db(rendered[1]) < -40).float()
    assert 0.15 < silent.mean() < 0.35
    assert (silent.mean(-1) < 0.6).all()


def test_syllables_make_the_level_rise_and_fall_3_to_7_times_a_second(rendered):
    envelope = rendered[1].unfold(-1, 320, 160).square().mean(-1).sqrt()
    spectrum = torch.fft.rfft(envelope - envelope.mean(-1, keepdim=True)).abs().square().mean(0)
    modulation_hz = torch.arange(len(spectrum)) * (100 / envelope.shape[-1])
    density = [spectrum[(modulation_hz >= low) & (modulation_hz < high)].mean() for low, high in ((2, 8), (12, 40))]
    assert density[0] > 10 * density[1]


def test_voiced_frames_have_the_pitch_of_their_talker(rendered):
    params, audio = rendered
    error = []
    for row in range(len(audio)):
        mean_hz = params.talkers.pitch_hz[row].item()
        heard = pitch_hz(audio[row], mean_hz / 1.5, mean_hz * 1.5)
        assert len(heard) > 15
        within = (heard > mean_hz / voices.PITCH_SPREAD) & (heard < mean_hz * voices.PITCH_SPREAD)
        assert within.mean() > 0.9
        assert heard.std() > 0.02 * mean_hz
        error.append(abs(np.median(heard) / mean_hz - 1))
    assert np.max(error) < 0.15


def test_pitch_track_stays_within_its_stated_range():
    source = generator(3)
    params = draw_voices(draw_talkers(64, generator=source), 4 * RATE, RATE, generator=source)
    time_s = torch.arange(params.jitter.shape[-1]) / voices.CONTROL_RATE
    ratio = voices._pitch(params, time_s) * params.jitter / params.talkers.pitch_hz[:, None]
    assert ratio.max() < voices.PITCH_SPREAD and ratio.min() > 1 / voices.PITCH_SPREAD
    assert ratio.max() > 1.1 and ratio.min() < 0.9


def test_men_women_and_children_are_drawn_at_their_rates_and_pitches():
    talkers = draw_talkers(4000, generator=generator())
    for low, high, probability in zip(voices.PITCH_LOW_HZ, voices.PITCH_HIGH_HZ, voices.KIND_PROBABILITY, strict=True):
        inside = (talkers.pitch_hz >= low) & (talkers.pitch_hz <= high)
        assert inside.float().mean() > probability - 4 * math.sqrt(probability * (1 - probability) / 4000)
    everyone = np.array(voices.PITCH_LOW_HZ).min(), np.array(voices.PITCH_HIGH_HZ).max()
    assert talkers.pitch_hz.min() >= everyone[0] and talkers.pitch_hz.max() <= everyone[1]
    # shorter tracts go with higher voices
    assert np.corrcoef(talkers.pitch_hz, talkers.formant_scale)[0, 1] > 0.7


def test_talkers_differ_more_than_their_utterances():
    audio = synthesize_voices(8, 6, 4 * RATE, RATE, generator=generator(5)).float() / 32768
    spectrum = torch.stft(audio.flatten(0, 1), 512, window=torch.hann_window(512), return_complex=True)
    level_db = 10 * torch.log10(spectrum.abs().square().mean(-1)[:, 4:160] + 1e-9).view(8, 6, -1)
    within = level_db.var(1).mean()
    between = level_db.mean(1).var(0).mean()
    assert between > within
    assert not torch.equal(audio[0, 0], audio[0, 1])


def test_hiss_of_fricatives_is_high():
    """The same utterance all fricative and with none at all: what is added lies above 2 kHz."""
    source = generator(1)
    params = draw_voices(draw_talkers(8, generator=source), 2 * RATE, RATE, generator=source)
    none = dataclasses.replace(
        params, fricative=torch.zeros_like(params.fricative), plosive=torch.zeros_like(params.plosive)
    )
    all_ = dataclasses.replace(none, fricative=torch.ones_like(params.fricative))
    high = {}
    for name, variant in (("none", none), ("all", all_)):
        power = torch.fft.rfft(render_voices(variant)).abs().square().sum(0)
        freq_hz = torch.arange(len(power)) / 2
        high[name] = (power[freq_hz > 4500].sum() / power.sum()).item()
    assert high["all"] > 10 * high["none"]


def test_plosives_close_then_burst():
    """Level in the middle of the closure, in the burst and in the vowel after it."""
    source = generator(9)
    params = draw_voices(draw_talkers(16, generator=source), 2 * RATE, RATE, generator=source)
    zero, one = torch.zeros_like(params.pause), torch.ones_like(params.pause)
    changes = {"pause": zero, "fricative": zero, "plosive": one, "gain": one, "onset_s": 0.1 * one}
    audio = render_voices(dataclasses.replace(params, **changes))
    start_s = params.end_s[:, 1] - params.lead_s
    level_db = {}
    for name, low_s, high_s in (("closure", 0.03, 0.06), ("burst", 0.08, 0.095), ("vowel", 0.12, 0.15)):
        pieces = [row[int((s + low_s) * RATE):int((s + high_s) * RATE)] for row, s in zip(audio, start_s, strict=True)]
        level_db[name] = 10 * math.log10(torch.cat(pieces).square().mean())
    assert level_db["closure"] < level_db["vowel"] - 60
    assert level_db["vowel"] - 25 < level_db["burst"] < level_db["vowel"] - 3


def test_vowels_swell_and_fade():
    """Vowels alone: the level dips between syllables, or there would be no onsets to hear a direction by."""
    source = generator(10)
    params = draw_voices(draw_talkers(16, generator=source), 2 * RATE, RATE, generator=source)
    zero, one = torch.zeros_like(params.pause), torch.ones_like(params.pause)
    audio = render_voices(dataclasses.replace(params, pause=zero, fricative=zero, plosive=zero, gain=one))
    power = {"dip": [], "middle": []}
    for row in range(16):
        for slot in range(1, 4):
            begin_s, end_s = (params.end_s[row, slot - 1:slot + 1] - params.lead_s[row]).tolist()
            for name, centre_s in (("dip", end_s), ("middle", (begin_s + end_s) / 2)):
                piece = audio[row, int((centre_s - 0.01) * RATE):int((centre_s + 0.01) * RATE)]
                power[name].append(piece.square().mean())
    assert np.mean(power["dip"]) < 0.25 * np.mean(power["middle"])


def test_shorter_tract_has_higher_formants():
    talkers = draw_talkers(16, generator=generator(11))
    centroid_hz = []
    for scale in (1.0, 1.3):
        scaled = dataclasses.replace(talkers, formant_scale=torch.full((16,), scale))
        params = draw_voices(scaled, RATE, RATE, generator=generator(12))
        quiet = dataclasses.replace(
            params, fricative=torch.zeros_like(params.pause), plosive=torch.zeros_like(params.pause)
        )
        power = torch.fft.rfft(render_voices(quiet)).abs().square().mean(0)
        centroid_hz.append((power * torch.arange(len(power))).sum() / power.sum())
    assert 1.1 < centroid_hz[1] / centroid_hz[0] < 1.45


def test_pauses_are_silent():
    source = generator(2)
    params = draw_voices(draw_talkers(4, generator=source), RATE, RATE, generator=source)
    pause = torch.zeros_like(params.pause)
    pause[:, 2:] = 1
    audio = render_voices(dataclasses.replace(params, pause=pause))
    end = ((params.end_s[:, 1] - params.lead_s) * RATE).long()
    for row in range(4):
        assert audio[row, :end[row]].abs().max() > 0.01
        assert audio[row, end[row] + 512:].abs().max() < 1e-5


def test_glottal_pulse_closes_where_it_should_and_is_continuous():
    phase = torch.linspace(0, 1, 2001)[:-1].expand(2, -1)
    pulse = glottal_pulse(phase, torch.tensor([0.5, 0.7]), torch.tensor([0.02, 0.05]))
    assert torch.allclose(phase.gather(1, pulse.argmin(1, keepdim=True)).flatten(), torch.tensor([0.5, 0.7]), atol=1e-3)
    assert torch.allclose(pulse.amin(1), torch.tensor(-1.0), atol=1e-3)
    assert pulse.diff().abs().max() < 0.05
    opening = pulse[0, phase[0] < 1 / 3].sum()
    closing = pulse[0, (phase[0] >= 1 / 3) & (phase[0] < 0.5)].sum()
    assert opening.item() == pytest.approx(-closing.item(), rel=0.01)  # the flow returns to zero


def test_level_is_set_and_never_clips(rendered):
    audio = rendered[1]
    assert torch.allclose(audio.square().mean(-1).sqrt(), torch.tensor(voices.LEVEL), rtol=1e-3)
    assert audio.abs().max() < 1
    assert audio.mean(-1).abs().max() < 1e-3
    loud = dataclasses.replace(rendered[0], pause=torch.ones_like(rendered[0].pause))
    loud.pause[:, 0] = 0  # one short syllable: the peak is the limit
    audio = render_voices(loud)
    assert audio.isfinite().all() and audio.abs().max() <= voices.PEAK + 1e-6
    assert audio.square().mean(-1).sqrt().max() <= voices.LEVEL * 1.001


def test_same_generator_same_voices():
    one, two, other = (synthesize_voices(3, 2, 4000, RATE, generator=generator(seed)) for seed in (7, 7, 8))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert one.shape == (3, 2, 4000) and one.dtype == torch.int16


def test_rendering_draws_nothing_and_rows_do_not_touch(rendered):
    params, audio = rendered
    state = torch.get_rng_state()
    assert torch.equal(render_voices(params), audio)
    assert torch.equal(torch.get_rng_state(), state)
    rows = slice(4, 6)
    picked = {
        field.name: getattr(params, field.name)[rows]
        for field in dataclasses.fields(params)
        if isinstance(getattr(params, field.name), torch.Tensor)
    }
    part = dataclasses.replace(params, talkers=params.talkers.rows(rows), **picked)
    torch.testing.assert_close(render_voices(part), audio[rows], rtol=0, atol=1e-5)


def test_parts_cover_every_row(monkeypatch):
    monkeypatch.setattr(voices, "ROWS_SAMPLES", 3 * 8000)
    audio = synthesize_voices(4, 2, 8000, RATE, generator=generator(1))
    assert (audio.float().std(-1) > 500).all()


@pytest.mark.parametrize(("num_samples", "sample_rate"), [(1, 16000), (100, 8000), (11025, 22050), (48000, 48000)])
def test_any_length_and_sample_rate(num_samples, sample_rate):
    source = generator(4)
    params = draw_voices(draw_talkers(3, generator=source), num_samples, sample_rate, generator=source)
    audio = render_voices(params)
    assert audio.shape == (3, num_samples) and audio.isfinite().all()
    assert (params.end_s[:, -1] - params.lead_s > num_samples / sample_rate).all()


def test_pitch_does_not_depend_on_the_sample_rate():
    source = generator(6)
    talkers = draw_talkers(1, generator=source)
    params = draw_voices(talkers, 3 * 48000, 48000, generator=source)
    audio = render_voices(params)[0, ::3]  # the voice has next to nothing above 8 kHz
    mean_hz = talkers.pitch_hz.item()
    assert np.median(pitch_hz(audio, mean_hz / 1.5, mean_hz * 1.5)) == pytest.approx(mean_hz, rel=0.15)
