"""Arrivals to RIRs: the table of kernels against the reference's chain of filters, and the edges."""
import numpy as np
import pytest
import torch
from oracle import decimation_chain
from torch.testing import assert_close
from torchaudio.functional import lfilter

from ssl_gpu import synthesis
from ssl_gpu.synthesis import Arrivals, rir_kernel, slots_in_rir, synthesize, synthesize_dense, taps_in_rir

RATE = 16000
CUT = 7  # taps at the end that the reference's own truncation spoils: 6, by method; 7 to be clear of rounding up twice


@pytest.mark.parametrize("sample_rate", [8000, 16000, 22050, 44100, 48000])
def test_kernel_is_the_decimation_chain_exactly(sample_rate):
    """Each of the 64 phases: main (1 - z^-1)^2 / A8 plus remainder / A8, against the chain itself; float64."""
    kernel = rir_kernel(sample_rate)
    taps = np.zeros((64, 16))
    for shift, weight in enumerate((1, -2, 1)):
        taps[:, shift:shift + 14] += weight * kernel.main
    taps[:, 14:] += kernel.remainder
    train = np.zeros((64, 64 * 200))
    train[np.arange(64), 64 * 20 + np.arange(64)] = 1
    expected = decimation_chain(train, sample_rate)[:, :190]
    direct = np.zeros((64, 190))
    direct[:, 20 - synthesis.LEAD:36 - synthesis.LEAD] = taps
    direct = lfilter(torch.from_numpy(direct), torch.from_numpy(kernel.poles),
                     torch.tensor([1.0, 0, 0], dtype=torch.float64), clamp=False).numpy()
    assert np.abs(direct - expected).max() < 1e-11 * np.abs(expected).max()
    assert np.abs(kernel.remainder).max() < 1e-6


def test_poles_are_the_eighth_powers_of_the_high_pass_poles():
    np.testing.assert_allclose(rir_kernel(16000).poles, [1, -1.95557198010691, 0.9565372567954787], rtol=1e-12)


def test_high_pass_ringing_does_not_wrap_round(monkeypatch):
    """A single arrival near the end: what its ringing leaves at the start, against ten times the padding."""
    slot = torch.full((1, 1, 1, 1), 64 * 1592 - 1)
    found = Arrivals(slot, torch.ones(1, 1, 1, 1), None)
    slots = torch.tensor([64 * 1600])
    short = synthesize(RATE, found, slots, 0.1).full
    monkeypatch.setattr(synthesis, "RINGING_S", 0.45)
    padded = synthesize(RATE, found, slots, 0.1).full
    assert padded.abs().max() > 0.01
    assert float((short - padded)[..., :1500].abs().max()) < 1e-7 * float(padded.abs().max())
    monkeypatch.setattr(synthesis, "RINGING_S", 0.02)
    wrapped = synthesize(RATE, found, slots, 0.1).full
    assert float((wrapped - padded)[..., :1500].abs().max()) > 1e-6 * float(padded.abs().max())  # it can be seen


def test_arrivals_at_both_ends_stay_in_their_own_part():
    """Early and late arrivals are rendered side by side: neither may leak into the other."""
    slots = torch.tensor([64 * 100])
    for place in (0, 96, 64 * 80, 64 * 100 - 1):
        for is_early in (False, True):
            found = Arrivals(torch.full((1, 1, 1, 1), place), torch.ones(1, 1, 1, 1),
                             torch.full((1, 1, 1, 1), is_early))
            rirs = synthesize(RATE, found, slots, 100 / RATE)
            if 0 < place < 64 * 100 - 1:  # there, pre-ringing before the start or the cut at the end are left out
                train = np.zeros(64 * 100)
                train[place] = 1
                expected = torch.from_numpy(decimation_chain(train, RATE)).float()
                assert_close(rirs.full[0, 0, 0, :-CUT], expected[:-CUT], rtol=0, atol=1e-8)
            assert rirs.full.abs().max() > 1e-4
            assert_close(rirs.early[0, 0, 0], rirs.full[0, 0, 0] * is_early, rtol=0, atol=1e-9)


def test_arrivals_already_added_up_on_the_grid_give_the_same_rirs():
    generator = torch.Generator().manual_seed(0)
    slot = torch.randint(96, 64 * 300, (2, 2, 1, 50), generator=generator)
    amplitude = torch.randn(2, 2, 1, 50, generator=generator)
    early = slot < 64 * 100
    slots = torch.tensor([64 * 300, 64 * 280 - 5])
    for flags in (early, None):
        train = torch.zeros(2, 2, 1, 2, 64 * 300).flatten(-2)
        train.scatter_add_(-1, slot + (0 if flags is None else early * (64 * 300)), amplitude)
        train = train.unflatten(-1, (2, 64 * 300))[..., :1 if flags is None else 2, :]
        dense = synthesize_dense(RATE, train.contiguous(), slots)
        sparse = synthesize(RATE, Arrivals(slot, amplitude, flags), slots, 300 / RATE)
        assert torch.equal(dense.length, sparse.length) and dense.length.tolist() == [300, 280]
        assert_close(dense.full, sparse.full, rtol=0, atol=5e-7 * float(sparse.full.abs().max()))
        assert (dense.early is None) == (flags is None)
        if flags is not None:
            assert_close(dense.early, sparse.early, rtol=0, atol=5e-7 * float(sparse.full.abs().max()))


def test_length_rounds_up_twice_after_a_float32_product():
    rt60 = torch.tensor([0.1, 0.3, 0.30001, 1 / 1024000], dtype=torch.float64)
    assert slots_in_rir(RATE, rt60).tolist() == [102400, 307200, 307211, 1]  # float32(0.3) * 1024000 = 307200.01...
    assert taps_in_rir(torch.tensor([1, 64, 65, 102400, 307201])).tolist() == [1, 1, 2, 1600, 4801]
