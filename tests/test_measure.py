"""Measures of signals whose measures are known, and of the golden cases' own RIRs against the stored figures."""
import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ssl_gpu.measure import (RirMeasures, clarity_db, decay_time, direct_path, drr_db, echo_density, energy_db,
                             energy_decay, last_significant_tap, late_coherence, late_spectra, measure_rirs,
                             spectral_tilt_db, time_difference)
from ssl_gpu.rir import RirConfig, draw_images, render_rir
from ssl_gpu.scene import SceneConfig, make_scenes, sample_scenes
from ssl_gpu.synthesis import RirBatch

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path for path in GOLDEN.glob("case_*.npz") if path.name != "case_stats.npz")
RATE = 16000
T20, T30, EDT = (-5, -25), (-5, -35), (0, -10)
NAN = float("nan")


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deltas(places, taps=4000):
    """{tap: height} -> [tap]"""
    signal = torch.zeros(taps)
    for tap, height in places.items():
        signal[tap] = height
    return signal


def pulse(delay, taps=1000, width=0.9):
    """Band-limited pulse of height `width`, at delay [...] samples: [..., tap]."""
    x = torch.arange(taps, dtype=torch.float64) - torch.as_tensor(delay, dtype=torch.float64)[..., None]
    return width * torch.sinc(width * x) * torch.exp(-0.5 * (x / 60) ** 2)


def taps(*values):
    return torch.tensor(values)


# Decay

@pytest.mark.parametrize("span", [T20, T30, EDT])
def test_exponential_decays_have_their_own_times(span):
    times = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    time = torch.arange(3 * RATE) / RATE
    rir = torch.exp(-math.log(1000) * time / times[:, None])
    decay = energy_decay(rir, torch.zeros(3, dtype=torch.int64))
    assert_close(decay_time(decay, torch.zeros(3, dtype=torch.int64), RATE, *span), times, rtol=1e-6, atol=0)


@pytest.mark.parametrize("span", [T20, T30, EDT])
def test_exponential_noise_of_any_level_has_its_time(span):
    """Mean of 100 within 1 %, whatever the level and however long the silence before the direct path."""
    time = torch.arange(RATE) / RATE
    rir = noise(100, RATE) * torch.exp(-math.log(1000) * time / 0.4) * torch.logspace(-6, 3, 100)[:, None]
    rir = torch.nn.functional.pad(rir, (700, 0))
    start = torch.full((100,), 700)
    measured = decay_time(energy_decay(rir, start), start, RATE, *span)
    assert abs(float(measured.mean()) / 0.4 - 1) < 0.01


def test_decay_is_what_is_left_relative_to_the_direct_path():
    rir = deltas({100: 2.0, 300: 2.0, 500: -1.0}, 600)
    decay = energy_decay(rir, torch.tensor(100))
    level = 10 * math.log10(5 / 9), 10 * math.log10(1 / 9)
    assert_close(decay[[0, 100, 101, 300, 301, 500]],
                 torch.tensor([0, 0, level[0], level[0], level[1], level[1]], dtype=torch.float64))
    assert decay[501:].isneginf().all()


def test_line_runs_from_the_first_sample_below_to_the_first_below():
    """A curve that falls by 1 dB per sample to -20 dB, then by 5, and stops at -40: the slopes by hand."""
    curve = torch.cat((torch.arange(0, -21, -1.0), torch.arange(-25, -41, -5.0))).to(torch.float64)

    def by_hand(first, last):
        x = np.arange(first, last + 1)
        return -60 / np.polyfit(x, curve[first:last + 1].numpy(), 1)[0]

    start = torch.tensor(0)
    assert_close(decay_time(curve, start, 1, *EDT).item(), by_hand(0, 10))
    assert_close(decay_time(curve, start, 1, *T20).item(), by_hand(5, 21))
    assert_close(decay_time(curve, start, 1, *T30).item(), by_hand(5, 23))
    assert_close(decay_time(curve, start, 1, -5.5, -25).item(), by_hand(6, 21))
    assert decay_time(curve, start, 1, -5, -41).isnan()


@pytest.mark.parametrize("places", [
    {100: 1.0, 500: 0.01},            # falls by 40 dB within a sample: fewer than three on the line
    {100: 1.0, 300: 0.5, 500: 0.25},  # falls to nothing before -35 dB
    {100: 1.0},
    {50: 1.0}])                       # nothing from the direct path on
def test_decay_time_is_undefined_without_a_decay(places):
    start = torch.tensor(100)
    assert decay_time(energy_decay(deltas(places), start), start, RATE, *T30).isnan()


# Direct path

def test_direct_path_is_found_between_the_samples():
    delay = 200 + torch.arange(0, 1, 0.05, dtype=torch.float64)
    sign = torch.where(torch.arange(20) % 2 == 0, 1.0, -1.0)
    tap, found, height = direct_path(pulse(delay) * sign[:, None], (delay + 0.3) / RATE, RATE)
    assert_close(tap, delay.round().to(torch.int64))
    assert (found * RATE - delay).abs().max() < 0.005
    assert (height - 0.9).abs().max() < 0.005


def test_direct_path_is_sought_within_three_samples_of_its_place():
    rir = deltas({96: 3.0, 97: 1.0, 103: 2.0, 104: 3.0})
    tap, _, _ = direct_path(rir, torch.tensor(100.4) / RATE, RATE)
    assert tap == 103


def test_direct_path_at_the_edges_of_the_rir():
    rir = torch.stack((deltas({0: 1.0}, 100), deltas({99: 1.0}, 100), deltas({50: 1.0}, 100)))
    tap, delay, _ = direct_path(rir, torch.tensor([1.0, 98.0, 200.0]) / RATE, RATE)
    assert tap.tolist() == [0, 99, 99]
    assert_close(delay[:2] * RATE, torch.tensor([0.0, 99.0], dtype=torch.float64))


def test_silence_has_no_delay():
    tap, delay, height = direct_path(torch.zeros(2, 300), torch.tensor([100.0, 120.0]) / RATE, RATE)
    assert tap.tolist() == [97, 117]
    assert delay.isnan().all() and height.isnan().all()


# Balance

def test_two_deltas_have_the_ratio_of_their_energies():
    rir = torch.stack([deltas({1000: 1.0, place: 0.1}) for place in (1040, 1041, 1800, 1801, 960, 959)])
    inf = math.inf
    assert_close(drr_db(rir, torch.full((6,), 1000), RATE), taps(inf, 20, 20, 20, inf, 20).double())
    assert_close(clarity_db(rir, torch.full((6,), 1000), RATE), taps(inf, inf, inf, 20, inf, inf).double())


def test_energy_is_in_decibels_of_the_sum_of_squares():
    assert_close(energy_db(torch.stack((deltas({3: 3.0, 7: -1.0}), deltas({})))), taps(10.0, -math.inf).double())


def test_no_direct_sound_is_minus_infinity_and_silence_undefined():
    start = taps(100, 100)
    rir = torch.stack((deltas({3000: 1.0}), deltas({})))
    assert_close(drr_db(rir, start, RATE), taps(-math.inf, NAN).double(), equal_nan=True)
    assert_close(clarity_db(rir, start, RATE), taps(-math.inf, NAN).double(), equal_nan=True)


# Texture and colour

def test_echo_density_of_noise_is_one_and_of_one_echo_its_share():
    rir = torch.stack((noise(RATE), deltas({8000: 1.0}, RATE).double()))
    density = torch.stack([echo_density(rir, taps(RATE, RATE), torch.full((2,), centre), RATE)
                           for centre in range(7900, 8100, 10)])
    assert abs(float(density[:, 0].mean()) - 1) < 0.05
    assert_close(density[:, 1], torch.full((20,), 1 / 320 / 0.3173105).double(), rtol=1e-6, atol=0)


def test_echo_density_is_undefined_beyond_the_rir_and_in_silence():
    rir = torch.cat((noise(1, 2000), torch.zeros(1, 1000)), 1).expand(4, 1, 3000)
    length = taps(2000, 2000, 2001, 3000)
    density = echo_density(rir, length, taps(1840, 1841, 1841, 2500)[:, None], RATE)[:, 0]
    assert density.isnan().tolist() == [False, True, False, True]
    assert echo_density(rir[:1], length[:1], taps(159)[:, None], RATE).isnan().all()


@pytest.mark.parametrize("slope_db", [0.0, -3.0103, 6.0206])
@pytest.mark.parametrize("rate", [8000, 16000, 48000])
def test_tilt_is_the_slope_of_the_spectrum(slope_db, rate):
    """A density that goes with a power of the frequency; the mean over a third octave changes the slope by nothing."""
    freq = torch.arange(4097, dtype=torch.float64).clamp(min=1)
    rir = torch.fft.irfft(freq ** (slope_db / 6.0206), 8192)
    assert abs(float(spectral_tilt_db(rir, rate)) - slope_db) < 0.01


def test_tilt_ignores_bands_where_the_decimator_rolls_off():
    """Above 0.41 of the rate a lot is missing, and nothing follows from it."""
    freq = torch.arange(4097, dtype=torch.float64) / 8192
    rir = torch.fft.irfft(torch.where(freq > 0.41, 0.1, 1.0).to(torch.complex128), 8192)
    assert abs(float(spectral_tilt_db(rir, 8000))) < 0.01


def test_silence_has_no_tilt():
    assert spectral_tilt_db(torch.zeros(8192), 8000).isnan()


def test_last_significant_tap_is_60_db_down():
    rir = torch.stack((deltas({10: -2.0, 500: 0.0021, 900: 0.0019}), deltas({})))
    assert last_significant_tap(rir).tolist() == [500, -1]


# What two microphones share

def test_time_difference_is_positive_when_the_last_microphone_hears_later():
    late = torch.tensor([-3.3, 0.0, 2.71], dtype=torch.float64)
    first, second = (pulse(torch.full((3,), place)) for place in (300.0, 500.0))
    rir = torch.stack((first, second, pulse(300 + late)), 1)[:, :, None]
    tap = torch.stack((taps(300, 300, 300), taps(500, 500, 500), (300 + late).round().long()), 1)[..., None]
    found = time_difference(rir, tap, torch.full((3,), 5 / RATE), RATE)
    assert (found[:, 0] * RATE - late).abs().max() < 0.01


def test_time_difference_is_not_sought_beyond_the_travel_between_microphones():
    """An echo that only the last microphone hears, louder than the direct sound, 20 samples later."""
    rir = torch.stack((pulse(300.0), pulse(302.0) + 2 * pulse(320.0)))[None, :, None]
    tap = taps(300, 302)[None, :, None]
    near, far = (float(time_difference(rir, tap, torch.tensor([reach / RATE]), RATE)) * RATE for reach in (4, 30))
    assert abs(near - 2) < 0.2 and abs(far - 20) < 0.2


def test_time_difference_hears_the_direct_sound_only():
    """Louder sounds long before and after it come from the other side."""
    other = [3 * pulse(place) + 3 * pulse(place + 500) for place in (100.0, 98.0)]
    rir = torch.stack((pulse(300.0) + other[0], pulse(302.0) + other[1]))[None, :, None]
    found = time_difference(rir, taps(300, 302)[None, :, None], torch.tensor([5 / RATE]), RATE)
    assert abs(float(found) * RATE - 2) < 0.01
    assert time_difference(rir * taps(1, 0)[None, :, None, None], taps(300, 302)[None, :, None],
                           torch.tensor([5 / RATE]), RATE).isnan()


def test_time_difference_may_exceed_the_travel_by_a_sample():
    rir = torch.stack((pulse(300.0), pulse(303.9)))[None, :, None]
    found = time_difference(rir, taps(300, 304)[None, :, None], torch.tensor([2.95 / RATE]), RATE)
    assert abs(float(found) * RATE - 3.9) < 0.01


def test_time_difference_does_not_wrap_round_a_short_rir():
    rir = torch.stack((deltas({10: 1.0}, 60), deltas({50: 1.0}, 60)))[None, :, None]
    found = time_difference(rir, taps(10, 50)[None, :, None], torch.tensor([50 / RATE]), RATE)
    assert abs(float(found) * RATE - 40) < 0.01


def late_pair(second, length=20000):
    """A microphone that hears exponentially decaying noise, and another: spectra and coherence of the pair."""
    decay = torch.exp(-torch.arange(length) / 3000.0)
    rir = (torch.stack((noise(length), second)) * decay)[None, :, None]
    return late_spectra(rir, taps(length), torch.zeros(1, 2, 1, dtype=torch.int64), RATE)[0, 0]


def test_coherence_of_equal_and_of_independent_noise():
    assert_close(late_coherence(late_pair(noise(20000))), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-9)
    assert late_coherence(late_pair(noise(20000, seed=1))).abs().max() < 0.1


def test_coherence_of_a_delay_is_the_cosine_of_its_phase():
    spectra = late_pair(noise(20000).roll(2))
    expected = torch.cos(2 * math.pi * 2 * torch.arange(129) / 256)
    assert (spectra[0] / (spectra[1] * spectra[2]).sqrt() - expected).abs().max() < 0.05
    assert_close(late_coherence(spectra), expected[:-1].view(8, 16).mean(-1).double(), rtol=0, atol=0.05)


def test_every_frame_counts_alike_and_once():
    """From 800 to 19990 there are 148 whole frames; the first, 60 dB louder than the last, weighs no more."""
    spectra = late_pair(noise(20000, seed=1))
    assert_close(0.5 * spectra[1:].sum(), torch.tensor(148.0, dtype=torch.float64))


def test_spectrum_of_a_tone_does_not_leak():
    """Between two bins, the worst place: 80 dB down 30 bins further on, where no window gives 40, Hamming's 60."""
    tone = torch.sin(2 * math.pi * 20.5 / 256 * torch.arange(20000)).expand(1, 2, 1, 20000)
    spectra = late_spectra(tone, taps(20000), torch.zeros(1, 2, 1, dtype=torch.int64), RATE)[0, 0]
    assert spectra[1, 50:].max() < 1e-8 * spectra[1].max()


def test_late_part_begins_after_the_later_and_ends_before_the_nearer_microphones_own():
    """Direct paths at 200 and 500: from 1300 to 210 before the end, which just holds 6 frames."""
    length = 1300 + 256 + 5 * 128 + 210
    for taps_in_rir, frames in ((length, 6), (length - 1, 5)):
        spectra = late_spectra(noise(1, 2, 1, length), taps(taps_in_rir), taps(200, 500)[None, :, None], RATE)
        assert_close(0.5 * spectra[0, 0, 1:].sum(), torch.tensor(float(frames), dtype=torch.float64))


def test_coherence_of_fewer_than_four_frames_is_undefined():
    frames = {length: late_coherence(late_pair(noise(length, seed=1), length)).isnan().all().item()
              for length in (800 + 256 + 3 * 128 + 10, 800 + 256 + 3 * 128 + 9)}
    assert list(frames.values()) == [False, True]


# Everything at once

def rendered(batch=5, **scene):
    generator = torch.Generator().manual_seed(3)
    scenes = sample_scenes(SceneConfig(**scene), batch, generator=generator)
    cfg = RirConfig(num_images=(300, 600))
    return render_rir(cfg, scenes, draw_images(cfg, scenes, generator=generator)), scenes


def measured(rirs, scenes, name):
    return getattr(measure_rirs(rirs, scenes), name)


@pytest.mark.parametrize("name", [field.name for field in fields(RirMeasures)])
def test_row_of_a_batch_equals_the_scene_alone(name):
    """Also cut to its own length: what the padding holds, and how much there is of it, does not matter."""
    rirs, scenes = rendered(num_src=3, num_mics=3, rt60_s=(0.1, 0.5))
    together = measured(rirs, scenes, name)
    shape = (5, 3) if name in ("itd", "late_coherence") else (5, 3, 3)
    assert together.shape[:len(shape)] == shape
    for row in range(5):
        alone, length = rirs[row:row + 1], int(rirs.length[row])
        alone = RirBatch(alone.full[..., :length], alone.early[..., :length], alone.length, RATE)
        assert_close(measured(alone, scenes[row:row + 1], name), together[row:row + 1], equal_nan=True,
                     rtol=1e-9, atol=1e-9)


def test_one_microphone_has_nothing_to_compare():
    rirs, scenes = rendered(num_mics=1)
    m = measure_rirs(RirBatch(rirs.full, None, rirs.length, RATE), scenes)
    assert m.itd is None and m.late_coherence is None and m.early_ratio_db is None
    assert RirMeasures.concatenate([m, m]).t30.shape == (10, 1, 2)


def test_a_batch_of_nothing_has_no_measures():
    rirs, scenes = rendered()
    nothing, some = measure_rirs(rirs[:0], scenes[:0]), measure_rirs(rirs, scenes)
    for field in fields(RirMeasures):
        value, other = getattr(nothing, field.name), getattr(some, field.name)
        assert value.shape == (0, *other.shape[1:]) and value.dtype == other.dtype
    for column in ("t20", "late_coherence"):
        assert torch.equal(getattr(RirMeasures.concatenate([nothing, some]), column).isnan(),
                           getattr(some, column).isnan())


def test_early_energy_is_relative_to_the_whole():
    rirs, scenes = rendered()
    ratio = measured(RirBatch(rirs.full, 0.5 * rirs.full, rirs.length, RATE), scenes, "early_ratio_db")
    assert_close(ratio, torch.full((5, 2, 2), 20 * math.log10(0.5), dtype=torch.float64))


def test_measuring_asks_the_device_nothing():
    """Tensors without values: whatever would wait for a value raises."""
    rirs, scenes = rendered()
    rirs = RirBatch(rirs.full.to("meta"), rirs.early.to("meta"), rirs.length.to("meta"), RATE)
    m = measure_rirs(rirs, scenes.to("meta"))
    assert all(getattr(m, field.name).device.type == "meta" for field in fields(m))


DIFFERENTIABLE = {
    "t30": lambda rir, tap: decay_time(energy_decay(rir, tap), tap, RATE, *T30),
    "drr": lambda rir, tap: drr_db(rir, tap, RATE),
    "c50": lambda rir, tap: clarity_db(rir, tap, RATE),
    "energy": lambda rir, tap: energy_db(rir),
    "tilt": lambda rir, tap: spectral_tilt_db(rir, RATE),
    "delay": lambda rir, tap: direct_path(rir, tap / RATE, RATE)[1] * RATE,
    "height": lambda rir, tap: direct_path(rir, tap / RATE, RATE)[2],
    "itd": lambda rir, tap: time_difference(rir.view(1, 2, 1, -1), tap.view(1, 2, 1), taps(0.001), RATE) * RATE,
    "coherence": lambda rir, tap: late_coherence(late_spectra(rir.view(1, 2, 1, -1), taps(2000), tap.view(1, 2, 1),
                                                              RATE)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_is_that_of_finite_differences(name):
    rir = noise(2, 2000) * torch.exp(-torch.arange(2000) / 150.0)
    rir[:, 30] = 5
    rir.requires_grad_()
    tap = taps(30, 30)
    torch.autograd.gradcheck(lambda x: DIFFERENTIABLE[name](x, tap), rir, fast_mode=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradient_of_the_undefined_is_zero(name):
    rir = torch.zeros(2, 2000, dtype=torch.float64, requires_grad=True)
    value = DIFFERENTIABLE[name](rir, taps(30, 30))
    assert not torch.isfinite(value).any()
    value.nan_to_num(0.0, 0.0, 0.0).sum().backward()
    assert (rir.grad == 0).all()


@pytest.mark.parametrize("deaf", [0, 1])
@pytest.mark.parametrize("name", ["t30", "edt", "drr_db", "c50_db", "energy_db", "tilt_db", "direct_delay",
                                  "direct_height", "itd", "late_coherence"])
def test_gradient_of_a_pair_of_which_one_hears_nothing_is_finite(name, deaf):
    """What the pair shares is undefined, with a gradient of 0 to both; the other microphone's own measures have one."""
    rirs, scenes = rendered(batch=1)
    full = rirs.full.double()
    full[:, deaf] = 0
    full.requires_grad_()
    value = measured(RirBatch(full, None, rirs.length, RATE), scenes, name)
    value.nan_to_num(0.0, 0.0, 0.0).sum().backward()
    assert (full.grad[:, deaf] == 0).all() and torch.isfinite(full.grad).all()
    if name in ("itd", "late_coherence"):
        assert value.isnan().all() and (full.grad == 0).all()
    else:
        assert full.grad.any()


def test_coherence_is_undefined_in_the_bands_that_one_microphone_does_not_hear():
    spectra = late_pair(noise(20000, seed=1))
    spectra[2, 16:32] = 0
    spectra.requires_grad_()
    found = late_coherence(spectra)
    assert found.isnan().tolist() == [False, True] + 6 * [False]
    found.nan_to_num().sum().backward()
    assert (spectra.grad[:, 16:32] == 0).all() and torch.isfinite(spectra.grad).all() and spectra.grad.any()


GOLDEN_NAMES = {"T20": "t20", "T30": "t30", "EDT": "edt", "DRR": "drr_db", "C50": "c50_db", "energy_db": "energy_db",
                "direct_delay_int": "direct_tap", "direct_delay": "direct_delay", "direct_peak_interp": "direct_height",
                "ned_halfT60": "echo_density_half", "tilt_db_oct": "tilt_db", "ned20": 0, "ned50": 1, "ned100": 2,
                "ned200": 3}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize("key", GOLDEN_NAMES)
def test_recorded_measures(path, key):
    """The stored figures were taken of these very RIRs, in float64: nothing but rounding lies between."""
    case, stats = np.load(path), np.load(GOLDEN / "case_stats.npz")
    rate, full = int(case["sr"]), torch.from_numpy(case["rir_f64"])[None]
    scenes = make_scenes(case["room_dim"][None], case["T60"][None], case["mic_pos"][None], case["src_pos"][None])
    rirs = RirBatch(full, None, torch.tensor([full.shape[-1]]), rate)
    m, name = measure_rirs(rirs, scenes), GOLDEN_NAMES[key]
    ours = (m.echo_density[..., name] if isinstance(name, int) else getattr(m, name))[0].numpy()
    expected = stats[f"{path.stem[-2:]}_{key}"]
    if key == "direct_delay":
        ours = ours * rate
    if key in ("direct_delay", "direct_peak_interp"):  # where a pattern's null faces the source the reference puts
        expected = np.where(stats[f"{path.stem[-2:]}_direct_peak_interp"] == 0, np.nan, expected)  # its first sample
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_recorded_decay_curve():
    stats = np.load(GOLDEN / "case_stats.npz")
    for path in CASES:
        case = np.load(path)
        full = torch.from_numpy(case["rir_f64"])
        tap = torch.from_numpy(stats[f"{path.stem[-2:]}_direct_delay_int"]).to(torch.int64)
        share = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)
        at = tap[..., None] + (share * float(case["T60"]) * int(case["sr"])).round().to(torch.int64)
        decay = energy_decay(full, tap).gather(-1, at)
        np.testing.assert_allclose(decay, stats[f"{path.stem[-2:]}_edc_frac"], rtol=1e-10, atol=1e-10)
