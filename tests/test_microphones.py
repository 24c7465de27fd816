import math

import numpy as np
import pytest
import torch
from oracle import ks_uniform
from torch.testing import assert_close

from ssl_gpu.convolve import convolve_sources
from ssl_gpu.microphones import PHASE_TERMS, REACH, Microphones, draw_microphones

BATCH, MICS = 3000, 3


def drawn(gain_db=1.0, phase_deg=5.0, batch=BATCH, mics=MICS, seed=0):
    return draw_microphones(gain_db, phase_deg, batch, mics, generator=torch.Generator().manual_seed(seed))


def curves(microphones, points=2000):
    """Phase in degrees by the formula, float64: [batch, mic, freq], freq from 0 to half the sample rate."""
    omega = np.linspace(0, math.pi, points)
    sines = np.sin(np.arange(1, PHASE_TERMS + 1)[:, None] * omega)
    return np.degrees(microphones.phase.double().numpy() @ sines)


def test_gain_is_uniform_in_db():
    level = 20 * torch.log10(drawn(gain_db=3.0).gain.double())
    assert level.abs().max() <= 3 + 1e-5
    for mic in range(MICS):
        assert ks_uniform(level[:, mic], -3 - 1e-5, 3 + 1e-5) < 2


def test_largest_phase_is_uniform_up_to_half_of_what_was_asked_and_two_microphones_differ_by_no_more_than_it():
    phase = curves(drawn(phase_deg=40.0))
    largest = np.abs(phase).max(-1)
    assert largest.max() <= 20 + 1e-4
    for mic in range(MICS):
        assert ks_uniform(torch.from_numpy(largest[:, mic]), 0, 20) < 2
    difference = np.abs(phase[:, :, None] - phase[:, None]).max(-1)
    assert 20 < difference.max() <= 40 + 1e-4
    assert np.abs(phase[..., [0, -1]]).max() < 1e-9                     # 0 Hz, and half the sample rate
    assert np.abs(phase.mean(0)).max() < 4 * phase.std(0).max() / math.sqrt(BATCH)  # of either sign alike


def test_microphones_are_independent():
    microphones = drawn(gain_db=3.0, phase_deg=40.0)
    rows = torch.cat((torch.log(microphones.gain), microphones.phase.flatten(1)), 1).T
    between = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(between.abs().max()) < 5 / math.sqrt(BATCH)


@pytest.mark.parametrize("n_fft", [256, 255])
def test_response_is_gain_and_phase_of_the_formula(n_fft):
    microphones = drawn(gain_db=3.0, phase_deg=40.0, batch=4)
    response = microphones.response(n_fft)
    omega = 2 * math.pi * np.arange(n_fft // 2 + 1) / n_fft
    phase = microphones.phase.double().numpy() @ np.sin(np.arange(1, PHASE_TERMS + 1)[:, None] * omega)
    expected = microphones.gain.double().numpy()[..., None] * np.exp(1j * phase)
    np.testing.assert_allclose(response.numpy(), expected, rtol=0, atol=2e-6)


def test_gain_and_phase_measured_from_an_impulse():
    """A click in mid-air is heard as real samples, whose spectrum has the microphone's gain and phase at every
    frequency; its response begins before the click, and is over 32 samples from it."""
    microphones = drawn(gain_db=3.0, phase_deg=5.0, batch=4, mics=2)
    click, at = torch.zeros(4, 1, 512), 200
    click[..., at] = 1
    heard = convolve_sources(click, torch.ones(4, 2, 1, 1), 512, microphones=microphones)
    assert heard.dtype == torch.float32
    found = np.fft.rfft(np.roll(heard.double().numpy(), -at, -1))
    gain = microphones.gain.double().numpy()[..., None]
    np.testing.assert_allclose(np.abs(found), np.broadcast_to(gain, found.shape), rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.degrees(np.angle(found)), curves(microphones, 257), rtol=0, atol=1e-3)
    near = heard[..., at - 32:at + 33]
    assert float(near[..., :32].abs().max()) > 1e-3
    assert_close(near.square().sum(-1), microphones.gain.square(), rtol=1e-5, atol=0)


def test_the_longest_response_ends_within_its_reach():
    microphones = drawn(phase_deg=180.0)
    microphones = Microphones(microphones.gain.double(), microphones.phase.double())
    taps = torch.fft.irfft(microphones.response(1024), 1024)
    beyond = taps[..., REACH + 1:1024 - REACH].square().sum(-1).sqrt()
    assert float(beyond.max()) < 1e-12


def test_nothing_wraps_round_the_ends_of_a_clip():
    """Loud at the very end and, by the RIR, beyond it: the front stays silent. And whole, not only cut."""
    microphones = drawn(phase_deg=180.0, batch=2, mics=2)
    dry, rir = torch.zeros(2, 1, 1000), torch.zeros(2, 2, 1, 400)
    dry[..., -1], rir[..., -1] = 1e6, 1
    for cut in (1000, None):
        heard = convolve_sources(dry, rir, cut, microphones=microphones)
        assert float(heard[..., :800].abs().max()) < 1
    assert float(heard[..., -1].abs().min()) > 1e4


def test_same_generator_same_microphones_and_slices_belong_to_their_rows():
    first, again, other = drawn(seed=1), drawn(seed=1), drawn(seed=2)
    assert torch.equal(first.phase, again.phase) and torch.equal(first.gain, again.gain)
    assert not torch.equal(first.phase, other.phase) and not torch.equal(first.gain, other.gain)
    part = first[2:4].to("cpu")
    assert_close(part.response(64), first.response(64)[2:4], rtol=0, atol=1e-6)


def test_each_kind_of_mismatch_alone():
    assert (drawn(gain_db=0.0).gain == 1).all() and (drawn(phase_deg=0.0).phase == 0).all()
    assert (drawn(gain_db=0.0).phase != 0).any() and (drawn(phase_deg=0.0).gain != 1).any()
