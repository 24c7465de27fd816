import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from oracle import delay_maps
from torch.testing import assert_close

from ssl_gpu.features import DelayMap, FeatureConfig, mel_bands

RATE, SPACING = 16000, 0.1
CFG = FeatureConfig(window=512, hop=256, num_bands=8, band_hz=(100.0, 7900.0), num_delays=49)
FRONT_END = DelayMap(CFG, RATE, SPACING)


def anechoic(cone, seed=0, samples=4000, rate=RATE, spacing=SPACING):
    """White noise from afar at cone angle (rad): microphone 1 hears it spacing cos(cone) / c earlier. [2, sample]."""
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(samples))
    delay = -spacing * math.cos(cone) / 340.0
    shifted = spectrum * np.exp(-2j * np.pi * np.fft.rfftfreq(samples, 1 / rate) * delay)
    return torch.tensor(np.stack([np.fft.irfft(s, samples) for s in (spectrum, shifted)]), dtype=torch.float32)


def delay_index(cone, num_delays=49):
    return (math.cos(cone) / 1.1 + 1) / 2 * (num_delays - 1)


@given(st.floats(0, math.pi), st.integers(0, 100))
@settings(deadline=None, max_examples=25)
def test_map_peaks_at_the_delay_of_the_source(cone, seed):
    """In each of the two maps, summed over bands and frames, to the nearest grid point."""
    maps, _ = FRONT_END(anechoic(cone, seed)[None])
    for part in maps[0].split(8):
        assert abs(int(part.sum((0, 1)).argmax()) - delay_index(cone)) <= 0.75
        assert float(part.mean((0, 1)).max()) > 0.9  # every band agrees


def test_source_beyond_the_last_microphone_is_at_the_high_end():
    maps, _ = FRONT_END(torch.stack((anechoic(0.0), anechoic(math.pi), anechoic(math.pi / 2))))
    assert maps.sum((1, 2)).argmax(-1).tolist() == [46, 2, 24]


@pytest.mark.parametrize("rate, spacing, cfg", [
    (8000, 0.3, FeatureConfig(window=256, hop=100, num_bands=4, band_hz=(200.0, 4000.0), num_delays=17)),
    (48000, 0.02, FeatureConfig(window=1000, hop=999, num_bands=3, band_hz=(50.0, 20000.0), num_delays=8)),
    (16000, 0.1, CFG),
])
def test_maps_equal_the_oracle(rate, spacing, cfg):
    audio = torch.randn(2, 2, 3000, generator=torch.Generator().manual_seed(0))
    maps, levels = DelayMap(cfg, rate, spacing)(audio)
    frames = (3000 - cfg.window) // cfg.hop + 1
    assert maps.shape == (2, 2 * cfg.num_bands, frames, cfg.num_delays) and levels.shape == (2, cfg.num_bands, frames)
    reach = 1.1 * spacing / 340
    freq = torch.arange(cfg.window // 2 + 1) * (rate / cfg.window)
    bands = mel_bands(cfg.num_bands, cfg.band_hz, freq).numpy()
    for row in range(2):
        expected = delay_maps(audio[row].double().numpy(), cfg.window, cfg.hop, bands,
                              np.linspace(-reach, reach, cfg.num_delays), rate)
        expected = torch.from_numpy(expected).flatten(0, 1)
        assert_close(maps[row].double(), expected, rtol=0, atol=2e-5)


def test_levels_are_log_band_powers_relative_to_the_clip():
    """Twice the amplitude in the second half: 4 times the power, 0.6 bel, in every band; and zero mean."""
    audio = torch.randn(1, 2, 64000, generator=torch.Generator().manual_seed(0))
    audio[..., 32000:] *= 2
    _, levels = FRONT_END(audio)
    rise = levels[0, :, 130:].mean(-1) - levels[0, :, :120].mean(-1)
    assert_close(rise, torch.full((8,), math.log10(4)), rtol=0, atol=0.08)
    assert abs(float(levels.mean())) < 1e-5


def test_swapping_the_microphones_mirrors_the_map():
    audio = torch.stack((anechoic(1.0), anechoic(2.5, 1))) + 0.3 * torch.randn(
        2, 2, 4000, generator=torch.Generator().manual_seed(0))
    maps, levels = FRONT_END(audio)
    swapped, same = FRONT_END(audio.flip(1))
    assert_close(swapped, maps.flip(-1), rtol=0, atol=1e-5)
    assert_close(same, levels, rtol=0, atol=1e-5)


def test_level_does_not_matter():
    audio = anechoic(1.0)[None] * torch.linspace(0.1, 1, 4000)
    maps, levels = FRONT_END(audio)
    for level in (1e-6, 1e-3, 1e4, 1e9):
        other, other_levels = FRONT_END(audio * level)
        assert_close(other, maps, rtol=0, atol=1e-4)
        assert_close(other_levels, levels, rtol=0, atol=1e-4)


def test_maps_lie_between_minus_one_and_one():
    audio = torch.randn(4, 2, 4000, generator=torch.Generator().manual_seed(0)) ** 3
    maps, _ = FRONT_END(audio)
    assert float(maps.abs().max()) <= 1 + 1e-5
    assert float(maps[:, :8].std()) > 0.05 and float(maps[:, 8:].std()) > 0.05


def test_silence_is_finite_and_empty():
    one_dead = anechoic(1.0)[None] * torch.tensor([1.0, 0.0])[:, None]
    half = anechoic(1.0)[None] * (torch.arange(4000) < 2000)
    for audio in (torch.zeros(1, 2, 4000), one_dead, half):
        maps, levels = FRONT_END(audio)
        assert torch.isfinite(maps).all() and torch.isfinite(levels).all()
    assert (FRONT_END(torch.zeros(1, 2, 4000))[0] == 0).all()
    assert (FRONT_END(half)[0][:, :, -5:] == 0).all()  # frames of digital silence


def test_magnitude_weighted_map_listens_to_the_loud_bins():
    """A loud low tone of one source, weak noise of another, in the one band: PHAT hears the many."""
    tone_free, freq = anechoic(0.4), np.fft.rfftfreq(4000, 1 / RATE)
    loud = np.fft.irfft(np.fft.rfft(anechoic(2.6, 1).double().numpy()) * ((freq > 1000) & (freq < 1500)), 4000)
    maps, _ = DelayMap(replace(CFG, num_bands=1), RATE, SPACING)((tone_free + 8 * torch.from_numpy(loud).float())[None])
    phat, weighted = maps[0].sum(1).argmax(-1).tolist()
    assert abs(phat - delay_index(0.4)) < 1.5 and abs(weighted - delay_index(2.6)) < 4


def test_first_frames_do_not_hear_later_samples():
    """No padding, no look-ahead beyond the window but for the common level."""
    audio = anechoic(1.0)[None]
    later = torch.cat((audio[..., :2048], -audio[..., 2048:].flip(1)), -1)
    maps, other = FRONT_END(audio)[0], FRONT_END(later)[0]
    assert_close(maps[:, :, :7], other[:, :, :7], rtol=0, atol=1e-5)  # frame 6 ends at 6 * 256 + 512 = 2048
    assert not torch.allclose(maps[:, :, 7], other[:, :, 7], atol=0.1)


def test_bands_cover_the_range_evenly_on_the_mel_scale():
    freq = torch.arange(0, 8001, 5.0)
    bands = mel_bands(8, (100.0, 7900.0), freq)
    assert (bands >= 0).all() and (bands <= 1).all() and (bands.amax(-1) > 0.97).all()
    mel = 2595 * torch.log10(1 + freq.double() / 700)
    low, high = (2595 * math.log10(1 + hz / 700) for hz in (100, 7900))
    step = (high - low) / 9
    centres = mel[bands.argmax(-1)]
    assert_close(centres, low + step * torch.arange(1, 9, dtype=torch.float64), rtol=0, atol=4.0)
    inner = (mel >= low + step) & (mel <= high - step)
    assert_close(bands.sum(0)[inner], torch.ones(int(inner.sum()), dtype=torch.float64))  # neighbours add up to one
    assert (bands[:, (freq <= 100) | (freq >= 7900)] == 0).all()
    assert (bands.sum(0)[(freq > 100) & (freq < 7900)] > 0).all()


def test_map_has_nothing_to_learn_and_nothing_to_save():
    assert not list(FRONT_END.parameters()) and not FRONT_END.state_dict()
    assert not FRONT_END(anechoic(1.0)[None].requires_grad_())[0].requires_grad


@pytest.mark.parametrize("shape", [(1, 3, 4000), (1, 1, 4000), (2, 4000), (1, 2, 511)])
def test_audio_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError) as error:
        FRONT_END(torch.zeros(shape))
    assert str(error.value) == f"audio must be [batch, mic=2, sample >= 512], got {list(shape)}"
    assert FRONT_END(torch.zeros(1, 2, 512))[0].shape == (1, 16, 1, 49)


@pytest.mark.parametrize("change, rate, spacing, message", [
    (dict(window=1), RATE, SPACING, "features.window must be >= 2, got 1"),
    (dict(hop=0), RATE, SPACING, "features.hop must be >= 1, got 0"),
    (dict(num_bands=0), RATE, SPACING, "features.num_bands must be >= 1, got 0"),
    (dict(num_delays=7), RATE, SPACING, "features.num_delays must be >= 8, got 7"),
    (dict(band_hz=(500.0, 500.0)), RATE, SPACING, "features.band_hz must satisfy 0 < low < high, got (500.0, 500.0)"),
    (dict(band_hz=(0.0, 500.0)), RATE, SPACING, "features.band_hz must satisfy 0 < low < high, got (0.0, 500.0)"),
    (dict(num_bands=200), RATE, SPACING, "features.num_bands must leave an STFT bin to every band, got 200 for "
                                         "256 bins of 31.25 Hz, enough for 136"),
    (dict(num_bands=10**6), RATE, SPACING, "features.num_bands must leave an STFT bin to every band, got 1000000 for "
                                           "256 bins of 31.25 Hz, enough for 136"),
    (dict(band_hz=(100.0, 120.0)), RATE, SPACING, "features.num_bands must leave an STFT bin to every band, got 8 for "
                                                  "256 bins of 31.25 Hz, none within (100.0, 120.0)"),
    (dict(), 8000, SPACING, "features.band_hz must end at or below half the sample rate of 8000 Hz, "
                            "got (100.0, 7900.0)"),
    (dict(), RATE, 0.0, "mic_spacing must be > 0 m, got 0.0"),
])
def test_a_front_end_that_cannot_be_is_refused_in_one_line(change, rate, spacing, message):
    with pytest.raises(ValueError) as error:
        DelayMap(replace(CFG, **change), rate, spacing)
    assert str(error.value) == message


CHANGES = dict(window=256, hop=200, num_bands=7, band_hz=(100.0, 7800.0), num_delays=50, gate_bands=6)


@pytest.mark.parametrize("name", [field.name for field in fields(FeatureConfig)
                                  if not field.name.startswith(("mask_", "patch_", "free_"))])
def test_every_field_changes_the_features(name):
    audio = anechoic(1.0)[None]
    pairs = zip(FRONT_END(audio), DelayMap(replace(CFG, **{name: CHANGES[name]}), RATE, SPACING)(audio))
    assert any(plain.shape != other.shape or not torch.allclose(plain, other, atol=1e-3) for plain, other in pairs)


def test_maps_are_as_narrow_as_autocast_wants_them():
    """Of all that the network holds they are the largest."""
    front = DelayMap(FeatureConfig(), 16000, 0.1)
    audio = torch.randn(2, 2, 4096, generator=torch.Generator().manual_seed(0))
    exact, _ = front(audio)
    with torch.autocast("cpu", torch.bfloat16):
        maps, _ = front(audio)
    assert maps.dtype == torch.bfloat16
    assert (maps - exact).norm() < 0.02 * exact.norm()


def test_levels_for_a_gate_are_those_of_a_front_end_with_as_many_bands():
    """They come behind the others, and change nothing else."""
    audio = anechoic(1.0)[None] * torch.linspace(0.1, 1, 4000)
    maps, levels = DelayMap(replace(CFG, gate_bands=10), RATE, SPACING)(audio)
    plain_maps, plain = FRONT_END(audio)
    finer = DelayMap(replace(CFG, num_bands=10), RATE, SPACING)(audio)[1]
    assert torch.equal(maps, plain_maps) and torch.equal(levels[:, :8], plain)
    assert levels.shape[1] == 18 and finer.std() > 0.1
    # These are means over a band where the others are sums: a constant each, which the mean over all bands shares.
    difference = levels[:, 8:] - finer
    assert_close(difference, difference.mean(-1, keepdim=True).expand_as(difference), rtol=0, atol=1e-3)


def test_gate_bands_need_a_bin_each():
    with pytest.raises(ValueError, match="^features.gate_bands must leave an STFT bin to every band, got 200 for"):
        DelayMap(replace(CFG, gate_bands=200), RATE, SPACING)
    DelayMap(replace(CFG, gate_bands=136), RATE, SPACING)
    with pytest.raises(ValueError, match="^features.gate_bands must be >= 0, got -1$"):
        replace(CFG, gate_bands=-1)
