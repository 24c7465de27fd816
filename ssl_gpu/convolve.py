"""Linear convolution by FFT, batched, also in blocks for long signals."""
from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=None)
def fast_length(length: int) -> int:
    """The smallest even 2^a 3^b 5^c >= length: what MKL, pocketfft and cuFFT transform quickly.

    Raises ValueError when length < 1.
    """
    if length < 1:
        raise ValueError(f"fast_length: length must be >= 1, got {length}")
    best = 2 << (length - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            quotient = -(-length // three)
            candidate = three * max(2, 1 << (quotient - 1).bit_length())
            best = min(best, candidate)
            three *= 3
        five *= 5
    return best


def convolve_sources(signal: Tensor, rir: Tensor, num_samples: int | None = None, keep_src: bool = False) -> Tensor:
    """Every source through its RIR to every microphone, and the sources added up.

    signal [batch, src, sample], rir [batch, mic, src, tap] -> [batch, mic, num_samples], or with keep_src each source
    alone, [batch, mic, src, num_samples]. num_samples None means the whole linear convolution, sample + tap - 1; it
    may not be more. The spectrum of a source is shared by the microphones and the sources are added before the inverse
    transform: src (1 + mic) + mic transforms instead of 3 mic src.
    """
    total = signal.shape[-1] + rir.shape[-1] - 1
    # Not a sample less, even when the end is cut off: a shorter circular convolution wraps its end to the front.
    n_fft = fast_length(total)
    spectrum = torch.fft.rfft(signal, n_fft)[:, None] * torch.fft.rfft(rir, n_fft)
    if not keep_src:
        spectrum = spectrum.sum(2)
    return torch.fft.irfft(spectrum, n_fft)[..., :total if num_samples is None else min(num_samples, total)]


def convolve_blocks(signal: Tensor, rir: Tensor, block: int = 65536) -> Tensor:
    """convolve_sources for long signals by overlap-add: FFT memory is bounded by block + tap, whatever the length.

    signal [batch, src, sample], rir [batch, mic, src, tap] -> [batch, mic, sample + tap - 1].
    Raises ValueError when block < 1.
    """
    if block < 1:
        raise ValueError(f"convolve_blocks: block must be >= 1 sample, got {block}")
    batch, mics, _, taps = rir.shape
    samples = signal.shape[-1]
    n_fft = fast_length(min(block, samples) + taps - 1)
    response = torch.fft.rfft(rir, n_fft)
    out = signal.new_zeros(batch, mics, samples + taps - 1)
    for start in range(0, samples, block):
        piece = signal[..., start:start + block]
        length = piece.shape[-1] + taps - 1
        spectrum = torch.fft.rfft(piece, n_fft)[:, None] * response
        out[..., start:start + length] += torch.fft.irfft(spectrum.sum(2), n_fft)[..., :length]
    return out
