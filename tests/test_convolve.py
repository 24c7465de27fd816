import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from ssl_gpu.convolve import best_block, convolve_sources, fast_length
from ssl_gpu.microphones import draw_microphones

SHAPES = dict(batch=st.integers(1, 3), mics=st.integers(1, 3), srcs=st.integers(1, 3), samples=st.integers(1, 300),
              taps=st.integers(1, 200), seed=st.integers(0, 1000))


def draw(batch, mics, srcs, samples, taps, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, srcs, samples, generator=generator, dtype=dtype),
            torch.randn(batch, mics, srcs, taps, generator=generator, dtype=dtype))


def oracle(signal, rir):
    """Each source alone: [batch, mic, src, sample + tap - 1], float64."""
    return torch.tensor(np.array([[[np.convolve(x, h) for x, h in zip(dry, row)] for row in rows]
                                  for dry, rows in zip(signal.double().numpy(), rir.double().numpy())]))


@given(**SHAPES)
@settings(deadline=None, max_examples=60)
def test_equals_the_sum_of_direct_convolutions(**shape):
    signal, rir = draw(**shape)
    alone = oracle(signal, rir)
    tolerance = 1e-6 * float(alone.abs().max())
    assert_close(convolve_sources(signal, rir).double(), alone.sum(2), atol=tolerance, rtol=0)
    assert_close(convolve_sources(signal, rir, keep_src=True).double(), alone, atol=tolerance, rtol=0)


@given(**SHAPES, block=st.one_of(st.integers(1, 10), st.integers(1, 400)), cut=st.floats(0.01, 1),
       unlike=st.booleans())
@settings(deadline=None, max_examples=100)
def test_blocks_equal_the_whole(block, cut, unlike, **shape):
    signal, rir = draw(**shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    microphones = draw_microphones(3, 10, *rir.shape[:2], generator=generator) if unlike else None
    samples = math.ceil(cut * (signal.shape[-1] + rir.shape[-1] - 1))
    for keep_src in (False, True):
        whole = convolve_sources(signal, rir, samples, keep_src, microphones, block=samples)
        parts = convolve_sources(signal, rir, samples, keep_src, microphones, block=block)
        assert parts.shape == whole.shape and parts.dtype == torch.float64
        assert_close(parts, whole, atol=1e-11 if microphones is None else 1e-5, rtol=0)
        out = torch.full_like(whole, torch.nan)
        assert convolve_sources(signal, rir, samples, keep_src, microphones, block, out) is out
        assert_close(out, parts, atol=0, rtol=0)
    assert convolve_sources(signal.float(), rir.float(), block=block).dtype == torch.float32
    finer = convolve_sources(signal, rir.float(), samples, True, microphones, block)  # the finer of both
    assert finer.dtype == torch.float64
    assert_close(finer, whole, atol=1e-5 * float(whole.abs().max()) + 1e-5, rtol=0)


def test_whole_convolutions_have_transforms_no_longer_than_they_need(monkeypatch):
    """Sample + tap - 1 points hold all that there is; 72,000 for 59,199 were too many once."""
    asked, rfft = [], torch.fft.rfft
    monkeypatch.setattr(torch.fft, "rfft", lambda x, n: asked.append(n) or rfft(x, n))
    for samples, taps in ((8000, 8000), (500, 4800), (3000, 100)):
        signal, rir = draw(1, 1, 1, samples, taps, 0)
        whole = samples + taps - 1
        for num_samples, block in ((None, whole), (whole, whole), (whole - 10, whole), (samples, whole)):
            convolve_sources(signal, rir, num_samples, block=block)
            assert set(asked) == {fast_length(whole)}
            asked.clear()
        convolve_sources(signal, rir)
        assert max(asked) <= fast_length(whole)
        asked.clear()


def test_a_gain_is_that_of_its_source():
    signal, rir = draw(2, 3, 2, 300, 60, 0)
    gain = torch.tensor([[1.0, 0.5], [-2.0, 0.0]])
    expected = convolve_sources(signal * gain[..., None], rir, 310)
    assert_close(convolve_sources(signal, rir, 310, gain=gain), expected, atol=1e-5, rtol=0)
    with torch.no_grad():                                               # in place, on the way to the transform
        assert_close(convolve_sources(signal, rir, 310, gain=gain), expected, atol=1e-5, rtol=0)
    for wrong in (gain[:, :1], gain[0], torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"^gain must be \[batch, src\] = \[2, 2\], got \["):
            convolve_sources(signal, rir, 310, gain=wrong)
    with pytest.raises(ValueError, match=r"^out must be \[2, 3, 310\], got \[2, 3, 311\]$"):
        convolve_sources(signal, rir, 310, out=torch.zeros(2, 3, 311))
    slope = gain.clone().requires_grad_()                               # which no product in place would have
    convolve_sources(signal, rir, 310, gain=slope).square().sum().backward()
    again = gain.clone().requires_grad_()
    convolve_sources(signal * again[..., None], rir, 310).square().sum().backward()
    assert_close(slope.grad, again.grad, rtol=1e-4, atol=1e-2)


def test_blocks_have_gradients():
    signal, rir = draw(2, 2, 2, 300, 60, 0, dtype=torch.float64)
    found = []
    for block in (360, 50):
        inputs = signal.clone().requires_grad_(), rir.clone().requires_grad_()
        convolve_sources(*inputs, 310, block=block).square().sum().backward()
        found.append([x.grad for x in inputs])
    for whole, parts in zip(*found):
        assert_close(parts, whole, atol=1e-9, rtol=0)


def test_blocks_are_those_that_cost_least():
    """3 s and RIRs of 0.7 s, two of each: points times logarithms of 1 to 4 blocks are 7.62, 6.54, 6.53 and 6.77
    million, by 8 transforms of 60,000 points, 12 of 36,000, 16 of 27,648 and 20 of 23,328."""
    costs = {n_fft: count * n_fft * math.log2(n_fft) / 1e6 for count, n_fft in
             ((8, 60000), (12, 36000), (16, 27648), (20, 23328))}
    assert [round(cost, 2) for cost in costs.values()] == [7.62, 6.54, 6.53, 6.77]
    assert best_block(48000, 11199, 4, 4) == 27648 - 11199
    assert best_block(10, 11199, 4, 4) == 10                            # no longer than all
    assert best_block(48000, 11199, 1, 100) == 13824 - 11199            # RIRs weigh most, which are transformed once
    assert best_block(48000, 0, 4, 4) == 4096                           # a single tap: none is shorter


def test_cut_result_is_the_start_of_the_whole_and_does_not_wrap():
    """All energy at the end: whatever wraps round to the front is seen."""
    signal, rir = torch.zeros(1, 1, 1000), torch.zeros(1, 1, 1, 500)
    signal[..., -100:] = 1e6
    rir[..., -100:] = 1
    cut = convolve_sources(signal, rir, 1000)
    assert cut.shape == (1, 1, 1000)
    assert float(cut.abs().max()) < 100  # rounding of 1e8
    assert float(convolve_sources(signal, rir)[0, 0, -100]) == pytest.approx(1e8, rel=1e-3)
    for block in (100, 333, 1000):
        assert float(convolve_sources(signal, rir, block=block)[..., :1300].abs().max()) < 100


def test_more_samples_than_the_convolution_has_are_refused():
    signal, rir = draw(1, 1, 1, 10, 5, 0)
    assert convolve_sources(signal, rir, 14).shape[-1] == 14
    for asked in (15, 0, -3):
        with pytest.raises(ValueError, match=f"^num_samples must be in 1..14 = sample \\+ tap - 1, got {asked}$"):
            convolve_sources(signal, rir, asked)


def test_block_below_one_is_refused():
    with pytest.raises(ValueError, match="^convolve_sources: block must be >= 1 sample, got 0$"):
        convolve_sources(*draw(1, 1, 1, 10, 5, 0), block=0)


def test_fast_length_is_the_least_multiple_of_8_without_large_primes():
    limit = 5000
    smooth = [2, 4, 6, *sorted(2 ** a * 3 ** b * 5 ** c for a in range(3, 14) for b in range(9) for c in range(7))]
    expected = [next(n for n in smooth if n >= length) for length in range(1, limit + 1)]
    assert [fast_length(length) for length in range(1, limit + 1)] == expected
    with pytest.raises(ValueError, match="^fast_length: length must be >= 1, got 0$"):
        fast_length(0)


def test_signals_and_rirs_of_other_sources_are_refused():
    signal, _ = draw(2, 1, 1, 10, 5, 0)
    _, rir = draw(2, 3, 2, 10, 5, 0)
    with pytest.raises(ValueError, match=r"^signal must be \[batch, src, sample\] and rir \[batch, mic, src, tap\] of "
                                         r"the same batch and src, got \[2, 1, 10\] and \[2, 3, 2, 5\]$"):
        convolve_sources(signal, rir)
