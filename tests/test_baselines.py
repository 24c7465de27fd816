import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.baselines import Pooling, gcc_phat, pick_peaks, pool, positions_on_line, srp_frames, srp_phat, srp_phat_by
from ssl_gpu.doa import angle_grid
from ssl_gpu.geometry import linear_array, rotate_z

SAMPLE_RATE = 16_000
DIRECTION = torch.tensor([0.48, 0.64, 0.6], dtype=torch.float64)


def talker(rng: np.random.Generator, turn: int, num_sample: int) -> np.ndarray:
    """Noise in syllables of 0.1 s, half of them silent; of the first few, talker `turn` has one for itself."""
    gate = rng.random(-(-num_sample // 1600)) < 0.5
    gate[:4] = (np.arange(4) == turn)[:len(gate)]
    return rng.standard_normal(num_sample) * np.repeat(gate, 1600)[:num_sample]


def anechoic(cones: list[float], seed: int, num_mics: int = 2, spacing: float = 0.1,
             num_sample: int = 16_000) -> torch.Tensor:
    """Far sources at cone angles (rad) in free field, delays exact to a fraction of a sample: [mic, sample]."""
    rng = np.random.default_rng(seed)
    frequency = np.fft.rfftfreq(num_sample, 1 / SAMPLE_RATE)
    audio = np.zeros((num_mics, num_sample))
    for turn, cone in enumerate(cones):
        spectrum = np.fft.rfft(talker(rng, turn, num_sample))
        for mic in range(num_mics):
            # The later microphones lie towards cone angle 0: they hear such a source earlier.
            delay = 32 / SAMPLE_RATE - mic * spacing * math.cos(cone) / SPEED_OF_SOUND
            audio[mic] += np.fft.irfft(spectrum * np.exp(-2j * np.pi * frequency * delay), num_sample)
    return torch.tensor(audio, dtype=torch.float32)


def oracle(audio: np.ndarray, spacing: float, pooling: Pooling) -> tuple[np.ndarray, list[int]]:
    """GCC-PHAT of two microphones with loops, float64: the map [181] and the two angles in degrees, ascending."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = []
    for start in range(0, audio.shape[1] - 1023, 256):
        first, second = (np.fft.rfft(window * channel[start:start + 1024]) for channel in audio)
        response = np.zeros(181)
        bins = [k for k in range(513) if 200 <= k * SAMPLE_RATE / 1024 <= 7500]
        for k in bins:
            cross = second[k] * np.conj(first[k])
            if abs(cross) > 0:
                delay = spacing * np.cos(np.deg2rad(np.arange(181))) / 340.0
                response += np.real(cross / abs(cross) * np.exp(-2j * np.pi * k * SAMPLE_RATE / 1024 * delay))
        frames.append(response / len(bins))
    response = np.max(frames, 0) if pooling is Pooling.MAX else np.mean(frames, 0)
    maxima = [i for i in range(181) if (i == 0 or response[i] > response[i - 1])
              and (i == 180 or response[i] >= response[i + 1])]
    best = max(maxima, key=lambda i: response[i])
    others = [i for i in maxima if abs(i - best) >= 8]
    return response, sorted([best, max(others, key=lambda i: response[i]) if others else best])


def pair(batch: int, spacing: float = 0.1) -> torch.Tensor:
    return linear_array(2, spacing).expand(batch, 2, 3)


def degrees(cone: torch.Tensor) -> list[list[int]]:
    return torch.rad2deg(cone).round().int().tolist()


@pytest.mark.parametrize("pooling", Pooling)
def test_batched_map_and_angles_equal_the_slow_oracle(pooling):
    clips = [(0.3, 1.2), (2.9, 1.6), (1.5, 1.51)]
    audio = torch.stack([anechoic(list(cones), seed, num_sample=8000) for seed, cones in enumerate(clips)])
    audio = audio + 0.1 * torch.randn(audio.shape, generator=torch.Generator().manual_seed(1))
    expected = [oracle(clip.double().numpy(), 0.1, pooling) for clip in audio]
    response = pool(srp_frames(audio, positions_on_line(pair(3)), angle_grid(1.0), SAMPLE_RATE), pooling)
    assert_close(response.double(), torch.tensor(np.stack([e[0] for e in expected])), atol=1e-4, rtol=0)
    cone = gcc_phat(audio, pair(3), SAMPLE_RATE, 2, pooling=pooling, chunk=2)
    assert degrees(cone) == [e[1] for e in expected]


@given(st.floats(0, math.pi), st.floats(math.radians(20), math.pi), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_two_talkers_in_free_field_are_found(first, separation, seed):
    """To within the 1-degree grid, at endfire too, in whatever order they come."""
    cones = [first, (first + separation) % math.pi]
    low, high = sorted(cones)
    if high - low >= math.radians(20):
        cone = gcc_phat(anechoic(cones, seed)[None], pair(1), SAMPLE_RATE, 2)
        assert_close(cone.double(), torch.tensor([[low, high]], dtype=torch.float64), atol=math.radians(2), rtol=0)


def test_a_source_beyond_the_last_microphone_is_at_cone_angle_0():
    audio = torch.stack([anechoic([cone], seed=1, num_sample=4000) for cone in (0.0, math.pi)])
    assert degrees(gcc_phat(audio, pair(2), SAMPLE_RATE, 1)) == [[0], [180]]
    assert degrees(gcc_phat(audio.flip(1), pair(2), SAMPLE_RATE, 1)) == [[180], [0]]
    assert degrees(gcc_phat(audio, -pair(2), SAMPLE_RATE, 1)) == [[0], [180]]  # the axis runs from first to last


def test_more_microphones_on_a_rotated_tilted_line():
    """The pairs have different delays; only all of them together are right with a spacing of 0.1 m to 0.3 m."""
    audio = torch.stack([anechoic([1.0, 2.0], seed, num_mics=4) for seed in (1, 2)])
    tilted = linear_array(4, 0.1)[:, :1] * DIRECTION + 1.5
    turned = rotate_z(linear_array(4, 0.1)[None], torch.tensor([2.5], dtype=torch.float64))[0]
    cone = srp_phat(audio, torch.stack((tilted, turned)), SAMPLE_RATE, 2)
    assert_close(cone, torch.tensor([[1.0, 2.0]] * 2), atol=math.radians(1), rtol=0)
    place = positions_on_line(torch.stack((tilted, turned)))
    response = srp_frames(audio, place, angle_grid(1.0), SAMPLE_RATE).mean(-1)
    by_pair = [srp_frames(audio[:, [i, j]], torch.tensor([[0.0, 0.1 * (j - i)]] * 2), angle_grid(1.0), SAMPLE_RATE)
               .mean(-1) for i in range(4) for j in range(i + 1, 4)]
    assert_close(response, torch.stack(by_pair).mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("num_mics", [2, 3, 4])
def test_map_is_the_power_of_the_steered_array(num_mics):
    """SRP-PHAT as it is defined, by delay and sum of whitened microphones: their power, M + 2 sum over pairs. Of two
    microphones that sum is their GCC-PHAT."""
    audio = anechoic([1.0, 2.0], 1, num_mics=num_mics, num_sample=4000)
    audio = audio + 0.1 * torch.randn(audio.shape, generator=torch.Generator().manual_seed(1))
    place = torch.arange(num_mics) * 0.1
    found = srp_frames(audio[None], place[None], angle_grid(1.0), SAMPLE_RATE)[0]
    window, bins = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024), np.arange(13, 481)  # 203 to 7,500 Hz
    lead = 0.1 * np.arange(num_mics)[:, None] * np.cos(np.deg2rad(np.arange(181))) / SPEED_OF_SOUND  # [mic, angle]
    steering = np.exp(-2j * np.pi * (bins * SAMPLE_RATE / 1024)[:, None, None] * lead)  # [freq, mic, angle]
    for frame in range(found.shape[-1]):
        spectrum = np.fft.rfft(window * audio.double().numpy()[:, 256 * frame:256 * frame + 1024])[:, bins]
        beam = np.einsum("mf,fma->fa", spectrum / np.abs(spectrum), steering)
        power = (np.abs(beam) ** 2).mean(0)
        np.testing.assert_allclose(found[:, frame], (power - num_mics) / (num_mics * (num_mics - 1)), atol=1e-4)


def test_poolings_of_the_same_frames_are_those_of_each_alone():
    audio = torch.stack([anechoic([1.0, 2.0], seed) for seed in range(3)])
    both = srp_phat_by(audio, pair(3), SAMPLE_RATE, 2, chunk=2)
    assert list(both) == list(Pooling)
    for pooling, cone in both.items():
        assert torch.equal(cone, srp_phat(audio, pair(3), SAMPLE_RATE, 2, pooling=pooling))
    assert not torch.equal(*both.values())


def test_each_clip_has_its_own_array():
    audio = torch.stack([anechoic([1.0], 1, spacing=spacing) for spacing in (0.05, 0.1)])
    mic_pos = torch.stack((linear_array(2, 0.05), linear_array(2, 0.1)))
    assert degrees(gcc_phat(audio, mic_pos, SAMPLE_RATE, 1)) == [[57], [57]]
    assert degrees(gcc_phat(audio, mic_pos.flip(0), SAMPLE_RATE, 1)) != [[57], [57]]


def test_speed_of_sound_is_used():
    audio = anechoic([0.7], 1)[None]
    cone = gcc_phat(audio, pair(1), SAMPLE_RATE, 1, speed_of_sound=SPEED_OF_SOUND * 1.1)
    assert_close(cone.item(), math.acos(math.cos(0.7) * 1.1), atol=math.radians(1), rtol=0)


def test_maximum_over_frames_finds_the_talker_that_the_mean_misses():
    """One talker for a tenth of the time, against noise from elsewhere for all of it."""
    audio = anechoic([0.8], 1) * (torch.arange(16_000) < 1600) + 0.3 * anechoic([2.0], 2)
    audio = audio + 0.05 * torch.randn(audio.shape, generator=torch.Generator().manual_seed(1))
    found = gcc_phat(audio[None], pair(1), SAMPLE_RATE, 2, pooling=Pooling.MAX)
    assert_close(found, torch.tensor([[0.8, 2.0]]), atol=math.radians(2), rtol=0)


def test_level_does_not_matter_and_silence_is_harmless():
    audio = anechoic([1.0, 2.2], 3)[None]
    expected = gcc_phat(audio, pair(1), SAMPLE_RATE, 2)
    for level in (1e-18, 1e18):
        assert_close(gcc_phat(audio * level, pair(1), SAMPLE_RATE, 2), expected)
    padded = torch.cat((audio, torch.zeros(1, 2, 8000)), -1)
    assert_close(gcc_phat(padded, pair(1), SAMPLE_RATE, 2), expected)
    silent = torch.zeros(1, 2, 4000)
    place, grid = positions_on_line(pair(1)), angle_grid(1.0)
    assert (srp_frames(silent, place, grid, SAMPLE_RATE) == 0).all()
    assert gcc_phat(silent, pair(1), SAMPLE_RATE, 2).tolist() == [[0.0, 0.0]]
    one_dead = audio * torch.tensor([1.0, 0.0])[:, None]
    assert torch.isfinite(gcc_phat(one_dead, pair(1), SAMPLE_RATE, 2)).all()


@pytest.mark.parametrize("mics", [2, 4])
def test_no_clips_have_no_angles(mics):
    audio, mic_pos = torch.zeros(0, mics, 4000), linear_array(mics, 0.1).expand(0, mics, 3)
    some = srp_phat_by(audio.new_zeros(1, mics, 4000), linear_array(mics, 0.1)[None], SAMPLE_RATE, 3)
    for pooling, cone in srp_phat_by(audio, mic_pos, SAMPLE_RATE, 3).items():
        assert cone.shape == (0, 3) and cone.dtype == some[pooling].dtype
        assert srp_phat(audio, mic_pos, SAMPLE_RATE, 3, pooling=pooling).shape == (0, 3)
    if mics == 2:
        assert gcc_phat(audio, mic_pos, SAMPLE_RATE, 1).shape == (0, 1)
    with pytest.raises(ValueError, match=r"got \(0, \d, 4000\) and \(1, \d, 3\)"):
        srp_phat(audio, linear_array(mics, 0.1)[None], SAMPLE_RATE, 1)


def test_rounding_noise_in_silence_is_no_source():
    """The same 1e-7 in both channels is perfectly coherent from broadside, and must not win the maximum."""
    audio = anechoic([0.5], 3)[None] + 0.2 * torch.randn(1, 2, 16_000, generator=torch.Generator().manual_seed(1))
    hum = 1e-7 * torch.randn(1, 1, 8000, generator=torch.Generator().manual_seed(2)).expand(1, 2, 8000)
    cone = gcc_phat(torch.cat((audio, hum), -1), pair(1), SAMPLE_RATE, 1)
    assert_close(cone, torch.tensor([[0.5]]), atol=math.radians(2), rtol=0)


def test_what_is_no_sound_has_no_angle():
    """A NaN in one of two clips: that one's angles are NaN, not those of a talker at 0 degrees."""
    audio = anechoic([1.0, 2.2], 3)[None]
    spoiled = audio.clone()
    spoiled[0, 1, 3000] = math.nan
    found = gcc_phat(torch.cat((spoiled, audio)), pair(1).expand(2, -1, -1), SAMPLE_RATE, 2)
    assert found[0].isnan().all()
    assert_close(found[1:], gcc_phat(audio, pair(1), SAMPLE_RATE, 2))


def test_a_clip_shorter_than_a_frame_is_padded():
    audio = anechoic([1.0], 3, num_sample=1000)[None, :, :800]
    assert_close(gcc_phat(audio, pair(1), SAMPLE_RATE, 1), torch.tensor([[1.0]]), atol=math.radians(2), rtol=0)


def test_peaks():
    grid = angle_grid(1.0)
    response = torch.zeros(5, 181)
    response[0, [0, 100, 180]] = torch.tensor([3.0, 1.0, 2.0])     # both ends may be peaks
    response[1, [50, 57, 120]] = torch.tensor([3.0, 2.0, 1.0])     # 7 degrees apart is one peak
    response[2, [50, 58, 120]] = torch.tensor([3.0, 2.0, 1.0])     # 8 degrees are two
    response[3] = 1 - (torch.arange(181) - 77).abs() / 180         # a single peak is given twice
    response[4] = torch.where((torch.arange(181) - 60).abs() < 5, 1.0, -torch.arange(181) / 180)  # a plateau
    assert degrees(pick_peaks(response, grid, 2)) == [[0, 180], [50, 120], [50, 58], [77, 77], [0, 56]]
    assert degrees(pick_peaks(response, grid, 3))[:4] == [[0, 100, 180], [0, 50, 120], [50, 58, 120], [77, 77, 77]]


@pytest.mark.parametrize("mic_pos, message", [
    (torch.zeros(1, 1, 3), "at least 2 microphones"),
    (torch.tensor([[[0.0, 0, 0], [0.1, 0, 0], [0.05, 0.05, 0]]]), "on a line"),
    (torch.zeros(1, 2, 3), "apart"),
])
def test_arrays_without_a_cone_angle_are_refused(mic_pos, message):
    with pytest.raises(ValueError, match=message):
        srp_phat(torch.zeros(1, mic_pos.shape[1], 4000), mic_pos, SAMPLE_RATE, 2)


def test_gcc_phat_names_the_function_for_more_microphones():
    with pytest.raises(ValueError, match="exactly 2 microphones .* got 3"):
        gcc_phat(torch.zeros(1, 3, 4000), linear_array(3, 0.1)[None], SAMPLE_RATE, 2)
    with pytest.raises(ValueError, match="exactly 2 microphones .* got 1"):
        gcc_phat(torch.zeros(1, 1, 4000), linear_array(1, 0.1)[None], SAMPLE_RATE, 2)


def test_audio_and_microphones_must_agree():
    with pytest.raises(ValueError, match=r"got \(2, 2, 4000\) and \(1, 2, 3\)"):
        gcc_phat(torch.zeros(2, 2, 4000), pair(1), SAMPLE_RATE, 2)
    with pytest.raises(ValueError, match="sample_rate must be above 400 Hz, got 300"):
        gcc_phat(torch.zeros(1, 2, 4000), pair(1), 300, 2)
