"""Linear convolution by FFT, batched, also in blocks for long signals."""
from __future__ import annotations

import torch
from torch import Tensor

from ssl_gpu import runtime
from ssl_gpu.microphones import REACH, Microphones
from ssl_gpu.runtime import constant

OTHER_LENGTHS = 1.3  # time per point of cuFFT's 2^a 3^b points over that of its 2^a, on an H200: 1.15 to 1.5


@constant
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


@constant
def transform_length(length: int, device: torch.device) -> int:
    """fast_length, on a GPU the quicker of the next 2^a and the next even 2^a 3^b.

    Per point cuFFT's real transforms take, of 16,384, 32,768 and 65,536, 3.0, 3.9 and 5.3 ps on an H200, of 12,288,
    24,576 and 62,208 4.5, 5.1 and 7.0, and with a factor of five 5 to 12: 60,000 is dearer than 65,536.
    """
    if not runtime.is_gpu(device):
        return fast_length(length)
    two, best = 1 << max(1, (length - 1).bit_length()), 1 << 62
    three = 3
    while three < 2 * two:
        best = min(best, three * max(2, 1 << (-(-length // three) - 1).bit_length()))
        three *= 3
    return best if OTHER_LENGTHS * best < two else two


def _check_shapes(signal: Tensor, rir: Tensor) -> None:
    right = signal.ndim == 3 and rir.ndim == 4 and signal.shape[:2] == (rir.shape[0], rir.shape[2])
    if not right:  # a single source would be broadcast to all
        raise ValueError(f"signal must be [batch, src, sample] and rir [batch, mic, src, tap] of the same batch and "
                         f"src, got {list(signal.shape)} and {list(rir.shape)}")


def convolve_sources(signal: Tensor, rir: Tensor, num_samples: int | None = None, keep_src: bool = False,
                     microphones: Microphones | None = None) -> Tensor:
    """Every source through its RIR to every microphone, and the sources added up.

    signal [batch, src, sample], rir [batch, mic, src, tap] -> [batch, mic, num_samples], or with keep_src each source
    alone, [batch, mic, src, num_samples]. num_samples None means the whole linear convolution, sample + tap - 1. The
    spectrum of a source is shared by the microphones and the sources are added before the inverse transform:
    src (1 + mic) + mic transforms instead of 3 mic src. microphones filter that spectrum, at no further transform: a
    linear convolution too, cut to the samples above (their responses begin before 0, which is cut off).
    Raises ValueError for shapes that do not belong together, and for num_samples above sample + tap - 1.
    """
    _check_shapes(signal, rir)
    total = signal.shape[-1] + rir.shape[-1] - 1
    if num_samples is not None and not 1 <= num_samples <= total:
        raise ValueError(f"num_samples must be in 1..{total} = sample + tap - 1, got {num_samples}")
    # Not a sample less, even when the end is cut off: a shorter circular convolution wraps its end to the front.
    n_fft = transform_length(total if microphones is None else total + 2 * REACH, signal.device)
    sources, responses = torch.fft.rfft(signal, n_fft)[:, None], torch.fft.rfft(rir, n_fft)
    if microphones is not None:
        responses.mul_(microphones.response(n_fft)[:, :, None])
    if keep_src:
        return torch.fft.irfft(sources * responses, n_fft)[..., :num_samples or total]
    spectrum = sources[:, :, 0] * responses[:, :, 0]
    for src in range(1, signal.shape[1]):                              # sum(2) would write and read all products
        spectrum.addcmul_(sources[:, :, src], responses[:, :, src])
    return torch.fft.irfft(spectrum, n_fft)[..., :num_samples or total]


def convolve_blocks(signal: Tensor, rir: Tensor, block: int = 65536, keep_src: bool = False) -> Tensor:
    """convolve_sources for long signals by overlap-add: FFT memory is bounded by block + tap, whatever the length.

    signal [batch, src, sample], rir [batch, mic, src, tap] -> [batch, mic, sample + tap - 1], or with keep_src each
    source alone, [batch, mic, src, sample + tap - 1].
    Raises ValueError when block < 1, and for shapes that do not belong together.
    """
    _check_shapes(signal, rir)
    if block < 1:
        raise ValueError(f"convolve_blocks: block must be >= 1 sample, got {block}")
    batch, mics, srcs, taps = rir.shape
    samples = signal.shape[-1]
    n_fft = transform_length(min(block, samples) + taps - 1, signal.device)
    response = torch.fft.rfft(rir, n_fft)
    shape = (batch, mics, srcs) if keep_src else (batch, mics)
    # Speech may be int16.
    out = rir.new_zeros(*shape, samples + taps - 1, dtype=torch.promote_types(signal.dtype, rir.dtype))
    for start in range(0, samples, block):
        piece = signal[..., start:start + block]
        length = piece.shape[-1] + taps - 1
        spectrum = torch.fft.rfft(piece, n_fft)[:, None] * response
        piece = torch.fft.irfft(spectrum if keep_src else spectrum.sum(2), n_fft)[..., :length]
        out[..., start:start + length] += piece
    return out
