"""Linear convolution by FFT, batched; on a CPU block by block."""
from __future__ import annotations

import math

import torch
from torch import Tensor

from ssl_gpu import runtime
from ssl_gpu.microphones import REACH, Microphones
from ssl_gpu.runtime import constant

OTHER_LENGTHS = 1.3  # time per point of cuFFT's 2^a 3^b points over that of its 2^a, on an H200: 1.15 to 1.5
SHORTEST = 4096  # points of the transforms of a block: shorter ones would take longer to begin than to run


@constant
def fast_length(length: int) -> int:
    """The smallest multiple of 8 >= length, 2, 4 and 6 aside, that is 2^a 3^b 5^c: what MKL, pocketfft and cuFFT
    transform quickly. Of 2^a 3^b 5^c that are no multiples of 8 MKL's real transforms of 11,000 to 66,000 points take
    3.2 to 5.8 ns a point on an AMD EPYC, of the others 2.0 to 3.5. Raises ValueError when length < 1.
    """
    if length < 1:
        raise ValueError(f"fast_length: length must be >= 1, got {length}")
    least = 8 if length > 8 else 2
    best = 1 << max(least.bit_length() - 1, (length - 1).bit_length())
    five = 1
    while five < best:
        three = five
        while three < best:
            quotient = -(-length // three)
            candidate = three * max(least, 1 << (quotient - 1).bit_length())
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


def _check_shapes(signal: Tensor, rir: Tensor, gain: Tensor | None) -> None:
    right = signal.ndim == 3 and rir.ndim == 4 and signal.shape[:2] == (rir.shape[0], rir.shape[2])
    if not right:  # a single source would be broadcast to all
        raise ValueError(f"signal must be [batch, src, sample] and rir [batch, mic, src, tap] of the same batch and "
                         f"src, got {list(signal.shape)} and {list(rir.shape)}")
    if gain is not None and gain.shape != signal.shape[:2]:
        raise ValueError(f"gain must be [batch, src] = {list(signal.shape[:2])}, got {list(gain.shape)}")


@constant
def best_block(samples: int, reach: int, per_block: int, once: int) -> int:
    """Samples of a block of the convolution of `samples`, each of which needs `reach` more: those whose transforms,
    per_block in every block and `once` in all, cost the fewest points times the logarithm of their length."""
    most = fast_length(samples + reach)
    best, least, n_fft = samples, math.inf, min(fast_length(max(SHORTEST, reach + 1)), most)
    while n_fft <= most:
        block = n_fft - reach
        cost = (-(-samples // block) * per_block + once) * n_fft * math.log2(n_fft)
        if cost < least:
            best, least = min(block, samples), cost
        n_fft = fast_length(n_fft + 1)
    return best


def _padded(rir: Tensor, gain: Tensor | None, length: int) -> Tensor:
    """rir [batch, mic, src, tap] times gain [batch, src], perhaps with silence behind, [..., length]."""
    if gain is None:
        return rir
    gain = gain[:, None, :, None]
    if not runtime.prefers_parts(rir.device) or torch.is_grad_enabled():
        return rir * gain
    padded = rir.new_zeros(*rir.shape[:-1], length, dtype=torch.promote_types(rir.dtype, gain.dtype))
    torch.mul(rir, gain, out=padded[..., :rir.shape[-1]])               # on the way that it is copied anyway
    return padded


def convolve_sources(signal: Tensor, rir: Tensor, num_samples: int | None = None, keep_src: bool = False,
                     microphones: Microphones | None = None, block: int | None = None, out: Tensor | None = None,
                     gain: Tensor | None = None) -> Tensor:
    """Every source through its RIR to every microphone, and the sources added up.

    signal [batch, src, sample], rir [batch, mic, src, tap] -> [batch, mic, num_samples], or with keep_src each source
    alone, [batch, mic, src, num_samples]. num_samples None means the whole linear convolution, sample + tap - 1. The
    spectrum of a source is shared by the microphones and the sources are added before the inverse transform:
    src (1 + mic) + mic transforms instead of 3 mic src. microphones filter that spectrum, at no further transform: a
    linear convolution too, cut to the samples above (their responses begin before 0, which is cut off).
    block: samples that are convolved at a time (overlap-save), which bounds the memory by block + tap; None: on a CPU
    best_block, elsewhere all of them. out: where the result is put, without gradients, if there is such a place. gain
    [batch, src]: a factor of every source.
    Raises ValueError for shapes that do not belong together, those of gain and out among them, for num_samples above
    sample + tap - 1, and for block < 1.
    """
    _check_shapes(signal, rir, gain)
    samples, taps = signal.shape[-1], rir.shape[-1]
    total = samples + taps - 1
    if num_samples is not None and not 1 <= num_samples <= total:
        raise ValueError(f"num_samples must be in 1..{total} = sample + tap - 1, got {num_samples}")
    if block is not None and block < 1:
        raise ValueError(f"convolve_sources: block must be >= 1 sample, got {block}")
    num_samples = num_samples or total
    shape = [*(rir.shape[:3] if keep_src else rir.shape[:2]), num_samples]
    if out is not None and list(out.shape) != shape:
        raise ValueError(f"out must be {shape}, got {list(out.shape)}")
    around = 0 if microphones is None else REACH
    before, (mics, srcs) = taps - 1 + around, rir.shape[1:3]           # samples that a block hears before its own
    if block is None:
        outputs = mics * srcs if keep_src else mics
        in_blocks = runtime.prefers_parts(signal.device)
        least = min(num_samples, samples)
        block = best_block(least, before + around, srcs + outputs, mics * srcs) if in_blocks else num_samples
    # Not a sample less, even when the end is cut off: a shorter circular convolution wraps its end to the front. But
    # where all of the signal has room there is no end to cut, and otherwise few blocks are to be padded, and copied.
    n_fft = transform_length(min(block, num_samples, samples) + before + around, signal.device)
    block = num_samples if n_fft >= samples + before + around else min(n_fft - before - around, num_samples)
    responses = torch.fft.rfft(_padded(rir, gain, n_fft), n_fft)
    if microphones is not None:
        responses.mul_(microphones.response(n_fft)[:, :, None])
    for start in range(0, num_samples, block):
        first = max(0, start - before)                                  # what is before 0 is silence, and wraps round
        heard = signal[..., first:start + block + around]
        sources = torch.fft.rfft(heard, n_fft)[:, None]
        if keep_src:
            spectrum = sources * responses
        else:
            spectrum = sources[:, :, 0] * responses[:, :, 0]
            for src in range(1, srcs):                                  # sum(2) would write and read all products
                spectrum.addcmul_(sources[:, :, src], responses[:, :, src])
        stop = min(start + block, num_samples)
        found = torch.fft.irfft(spectrum, n_fft)[..., start - first:stop - first]
        if out is None and block == num_samples:
            return found
        if out is None:
            out = found.new_empty(*found.shape[:-1], num_samples)
        out[..., start:stop] = found
    return out
