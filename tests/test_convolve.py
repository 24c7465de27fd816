import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from ssl_gpu.convolve import convolve_blocks, convolve_sources, fast_length

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


@given(**SHAPES, block=st.one_of(st.integers(1, 10), st.integers(1, 400)))
@settings(deadline=None, max_examples=60)
def test_blocks_equal_the_whole(block, **shape):
    signal, rir = draw(**shape, dtype=torch.float64)
    whole = convolve_sources(signal, rir)
    assert_close(convolve_blocks(signal, rir, block), whole, atol=1e-11, rtol=0)
    alone = convolve_sources(signal, rir, keep_src=True)
    assert_close(convolve_blocks(signal, rir, block, keep_src=True), alone, atol=1e-11, rtol=0)
    assert convolve_blocks(signal.float(), rir.float(), block).dtype == torch.float32
    finer = convolve_blocks(signal, rir.float(), block)                 # the finer of both, as at once
    assert finer.dtype == torch.float64
    assert_close(finer, whole, atol=1e-5 * float(whole.abs().max()), rtol=0)


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
        assert float(convolve_blocks(signal, rir, block)[..., :1300].abs().max()) < 100


def test_more_samples_than_the_convolution_has_are_refused():
    signal, rir = draw(1, 1, 1, 10, 5, 0)
    assert convolve_sources(signal, rir, 14).shape[-1] == 14
    for asked in (15, 0, -3):
        with pytest.raises(ValueError, match=f"^num_samples must be in 1..14 = sample \\+ tap - 1, got {asked}$"):
            convolve_sources(signal, rir, asked)


def test_block_below_one_is_refused():
    with pytest.raises(ValueError, match="^convolve_blocks: block must be >= 1 sample, got 0$"):
        convolve_blocks(*draw(1, 1, 1, 10, 5, 0), block=0)


def test_fast_length_is_the_least_even_number_without_large_primes():
    limit = 5000
    smooth = sorted(2 ** a * 3 ** b * 5 ** c for a in range(1, 14) for b in range(9) for c in range(7))
    expected = [next(n for n in smooth if n >= length) for length in range(1, limit + 1)]
    assert [fast_length(length) for length in range(1, limit + 1)] == expected
    with pytest.raises(ValueError, match="^fast_length: length must be >= 1, got 0$"):
        fast_length(0)


@pytest.mark.parametrize("convolve", [convolve_sources, convolve_blocks])
def test_signals_and_rirs_of_other_sources_are_refused(convolve):
    signal, _ = draw(2, 1, 1, 10, 5, 0)
    _, rir = draw(2, 3, 2, 10, 5, 0)
    with pytest.raises(ValueError, match=r"^signal must be \[batch, src, sample\] and rir \[batch, mic, src, tap\] of "
                                         r"the same batch and src, got \[2, 1, 10\] and \[2, 3, 2, 5\]$"):
        convolve(signal, rir)
