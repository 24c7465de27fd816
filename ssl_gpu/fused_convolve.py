"""convolve.convolve_sources for a GPU: every transform of cuFFT's quickest kind, and what is between them in Triton.

A transform of 65,536 points takes cuFFT several passes over memory, one of 16,384 a single pass. So the points of all
transforms here are radix * base, radix 1, 2 or 4 and base at most 16,384: the first step of a decimation in frequency
(Cooley and Tukey 1965) is done by hand, where signals are padded, scaled and read for the first time anyway, and the
last step of the inverse where the result is cut to its length. Spectrum K of a signal is element [K % radix, K //
radix] of [radix, base]. And two real signals travel as real and imaginary part of a complex one: two talkers, and what
two microphones hear, since a talker's real signal filters both alike. The price: roundings are those of the louder of
the two, 1e-7 of it, so that a microphone that hears nothing is not silent beside one that does.

Importing this needs Triton.
"""
from __future__ import annotations

import math
from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ssl_gpu import runtime

BASE = 16384  # points of the largest transform that cuFFT does in one pass, 3 ps a point on an H200, 4.6 for 65,536
MOST = 4 * BASE
BLOCK = 512  # points to a program, four to each of its threads: with eight they run out of registers


def split_size(length: int) -> tuple[int, int] | None:
    """radix and base of transforms with room for `length` samples; None where there is none."""
    points = max(1 << (length - 1).bit_length(), 256)
    return None if points > MOST else (max(1, points // BASE), min(points, BASE))


@runtime.constant
def _twiddles(points: int, base: int, device: torch.device) -> Tensor:
    """exp(-2 pi i n / points) for n below base, [base, 2] float32, on the device."""
    angle = -2 * math.pi / points * torch.arange(base, dtype=torch.float64)
    return torch.stack((angle.cos(), angle.sin()), -1).to(torch.float32).to(device)


@triton.jit
def _turned(re, im, quarters: tl.constexpr):
    """(re + i im) times i^quarters."""
    if quarters % 4 == 0:
        return re, im
    elif quarters % 4 == 1:
        return -im, re
    elif quarters % 4 == 2:
        return -re, -im
    else:
        return im, -re


@triton.jit
def split_program(out, signal, gain, twiddles, lanes, pairs, rows, length, batch_stride, lane_stride, row_stride,
                  sample_stride, base, blocks, has_gain: tl.constexpr, radix: tl.constexpr, present: tl.constexpr,
                  block: tl.constexpr):
    """signal [batch, lane, row, sample] with any strides, of `length` samples, those in `present` stretches of base;
    gain [batch, lane]; lanes 2p and 2p + 1 become the complex out [batch, pair, row, radix, base, 2], ready for
    transforms over base."""
    index = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    row, pair, batch = index % rows, index // rows % pairs, index // (rows * pairs)
    start = signal + batch * batch_stride + 2 * pair * lane_stride + row * row_stride
    both = 2 * pair + 1 < lanes
    first_gain, second_gain = 1.0, 1.0
    if has_gain:
        first_gain = tl.load(gain + batch * lanes + 2 * pair)
        second_gain = tl.load(gain + batch * lanes + 2 * pair + 1, mask=both, other=0.0)
    part = tl.arange(0, 2)[None, :]
    cosine, sine = tl.split(tl.load(twiddles + 2 * n[:, None] + part, mask=(n < base)[:, None], other=0.0))
    turn_re, turn_im = tl.full((block,), 1.0, tl.float32), tl.full((block,), 0.0, tl.float32)
    for r in tl.static_range(radix):
        sum_re, sum_im = tl.full((block,), 0.0, tl.float32), tl.full((block,), 0.0, tl.float32)
        for j in tl.static_range(present):
            sample = n + j * base
            there = (n < base) & (sample < length)
            place = start + sample.to(tl.int64) * sample_stride
            re = tl.load(place, mask=there, other=0.0) * first_gain
            im = tl.load(place + lane_stride, mask=there & both, other=0.0) * second_gain
            re, im = _turned(re, im, -j * r * (4 // radix))             # times exp(-2 pi i j r / radix)
            sum_re += re
            sum_im += im
        value = tl.join(sum_re * turn_re - sum_im * turn_im, sum_re * turn_im + sum_im * turn_re)
        tl.store(out + 2 * ((index * radix + r) * base + n)[:, None] + part, value, mask=(n < base)[:, None])
        turn_re, turn_im = turn_re * cosine - turn_im * sine, turn_re * sine + turn_im * cosine


@triton.jit
def multiply_program(out, sources, responses, pairs, base, blocks, scale, srcs: tl.constexpr, radix: tl.constexpr,
                     block: tl.constexpr):
    """Spectra of the talkers, two in one, sources [batch, ceil(srcs / 2), radix, base, 2], times those of their RIRs
    to two microphones each, responses [batch, pair, src, radix, base, 2], added up over the talkers and times `scale`,
    out [batch, pair, radix, base, 2]."""
    index = (tl.program_id(0) // blocks).to(tl.int64)
    k = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    r, pair, batch = index % radix, index // radix % pairs, index // (radix * pairs)
    mirrored_r = (radix - r) % radix                                    # of -(radix k + r)
    mirrored_k = tl.where(r == 0, (base - k) % base, base - 1 - k)
    part, inside = tl.arange(0, 2)[None, :], (k < base)[:, None]
    sum_re, sum_im = tl.full((block,), 0.0, tl.float32), tl.full((block,), 0.0, tl.float32)
    for src in tl.static_range(srcs):
        both = (batch * ((srcs + 1) // 2) + src // 2) * radix
        re, im = tl.split(tl.load(sources + 2 * ((both + r) * base + k)[:, None] + part, mask=inside, other=0.0))
        other_re, other_im = tl.split(tl.load(sources + 2 * ((both + mirrored_r) * base + mirrored_k)[:, None] + part,
                                              mask=inside, other=0.0))
        if src % 2 == 0:                                                # the even part, of the real signal
            source_re, source_im = re + other_re, im - other_im
        else:                                                           # the odd part over i, of the imaginary one
            source_re, source_im = im + other_im, other_re - re
        place = ((batch * pairs + pair) * srcs + src) * radix + r
        re, im = tl.split(tl.load(responses + 2 * (place * base + k)[:, None] + part, mask=inside, other=0.0))
        sum_re += source_re * re - source_im * im
        sum_im += source_re * im + source_im * re
    half = tl.full((block,), 0.5 * scale, tl.float32)                   # from inductor scale is float64
    value = tl.join(sum_re * half, sum_im * half)
    tl.store(out + 2 * (index * base + k)[:, None] + part, value, mask=inside)


@triton.jit
def merge_program(out, parts, twiddles, keep, mics, pairs, length, base, blocks, has_keep: tl.constexpr,
                  radix: tl.constexpr, present: tl.constexpr, block: tl.constexpr):
    """Inverse transforms over base, parts [batch, pair, radix, base, 2], to the first `length` samples of what each
    microphone hears, out [batch, mic, sample], those in `present` stretches of base; 0 where keep [batch] is 0."""
    index = (tl.program_id(0) // blocks).to(tl.int64)
    n = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    pair, batch = index % pairs, index // pairs
    part = tl.arange(0, 2)[None, :]
    cosine, sine = tl.split(tl.load(twiddles + 2 * n[:, None] + part, mask=(n < base)[:, None], other=0.0))
    kept = True
    if has_keep:
        kept = tl.load(keep + batch) != 0
    for j in tl.static_range(present):
        sum_re, sum_im = tl.full((block,), 0.0, tl.float32), tl.full((block,), 0.0, tl.float32)
        turn_re, turn_im = tl.full((block,), 1.0, tl.float32), tl.full((block,), 0.0, tl.float32)
        for r in tl.static_range(radix):
            re, im = tl.split(tl.load(parts + 2 * ((index * radix + r) * base + n)[:, None] + part,
                                      mask=(n < base)[:, None], other=0.0))
            re, im = re * turn_re + im * turn_im, im * turn_re - re * turn_im   # times the conjugate
            re, im = _turned(re, im, j * r * (4 // radix))
            sum_re += re
            sum_im += im
            turn_re, turn_im = turn_re * cosine - turn_im * sine, turn_re * sine + turn_im * cosine
        sample = n + j * base
        there = (n < base) & (sample < length)
        target = out + (batch * mics + 2 * pair) * length + sample
        tl.store(target, tl.where(kept, sum_re, 0.0), mask=there)
        tl.store(target + length, tl.where(kept, sum_im, 0.0), mask=there & (2 * pair + 1 < mics))


@library.triton_op("ssl_gpu::split", mutates_args={"out"})
def split(out: Tensor, signal: Tensor, gain: Optional[Tensor], twiddles: Tensor) -> None:
    """Runs split_program: signal [batch, lane, row, sample] float32 into out [batch, pair, row, radix, base, 2]."""
    with runtime.current_device(out.device):
        launch_split(library.wrap_triton(split_program), out, signal, gain, twiddles)


def launch_split(program, out: Tensor, signal: Tensor, gain: Optional[Tensor], twiddles: Tensor) -> None:
    """split, or the same in Triton's interpreter."""
    (batch, pairs, rows, radix, base, _), length = out.shape, signal.shape[-1]
    block = min(BLOCK, base)
    blocks = triton.cdiv(base, block)
    program[(batch * pairs * rows * blocks,)](
        out, signal, signal if gain is None else gain.contiguous(), twiddles, signal.shape[1], pairs, rows, length,
        *signal.stride(), base, blocks, has_gain=gain is not None, radix=radix, present=triton.cdiv(length, base),
        block=block)


@library.triton_op("ssl_gpu::multiply", mutates_args={"out"})
def multiply(out: Tensor, sources: Tensor, responses: Tensor, scale: float) -> None:
    """Runs multiply_program."""
    with runtime.current_device(out.device):
        launch_multiply(library.wrap_triton(multiply_program), out, sources, responses, scale)


def launch_multiply(program, out: Tensor, sources: Tensor, responses: Tensor, scale: float) -> None:
    """multiply, or the same in Triton's interpreter."""
    batch, pairs, radix, base, _ = out.shape
    block = min(BLOCK, base)
    blocks = triton.cdiv(base, block)
    program[(batch * pairs * radix * blocks,)](out, sources, responses, pairs, base, blocks, scale,
                                               srcs=responses.shape[2], radix=radix, block=block)


@library.triton_op("ssl_gpu::merge", mutates_args={"out"})
def merge(out: Tensor, parts: Tensor, twiddles: Tensor, keep: Optional[Tensor]) -> None:
    """Runs merge_program, into out [batch, mic, sample]; keep [batch] bool."""
    with runtime.current_device(out.device):
        launch_merge(library.wrap_triton(merge_program), out, parts, twiddles, keep)


def launch_merge(program, out: Tensor, parts: Tensor, twiddles: Tensor, keep: Optional[Tensor]) -> None:
    """merge, or the same in Triton's interpreter."""
    (batch, pairs, radix, base, _), (_, mics, length) = parts.shape, out.shape
    block = min(BLOCK, base)
    blocks = triton.cdiv(base, block)
    program[(batch * pairs * blocks,)](
        out, parts, twiddles, parts if keep is None else keep.to(torch.uint8), mics, pairs, length, base, blocks,
        has_keep=keep is not None, radix=radix, present=triton.cdiv(length, base), block=block)


def convolve_fused(signal: Tensor, gain: Tensor | None, rir: Tensor, num_samples: int, keep: Tensor | None = None,
                   out: Tensor | None = None) -> Tensor | None:
    """What convolve.convolve_sources makes of signal [batch, src, sample], each source times its gain [batch, src], and
    rir [batch, mic, src, tap]: [batch, mic, num_samples] float32, silent where keep [batch] is false. On a GPU; to a
    few roundings of the louder of two microphones the same; without gradients. out: where that is put, contiguous.
    None where transforms of MOST points are too few."""
    size = split_size(signal.shape[-1] + rir.shape[-1] - 1)
    if size is None:
        return None
    (radix, base), (batch, mics), device = size, rir.shape[:2], signal.device
    twiddles, pairs = _twiddles(radix * base, base, device), (mics + 1) // 2

    def spectra(signal: Tensor, gain: Tensor | None) -> Tensor:
        """[batch, lane, row, sample] -> [batch, pair, row, radix, base, 2]."""
        lanes, rows = signal.shape[1:3]
        out = torch.empty((batch, (lanes + 1) // 2, rows, radix, base, 2), dtype=torch.float32, device=device)
        split(out, signal, gain, twiddles)
        return torch.view_as_real(torch.fft.fft(torch.view_as_complex(out)))

    product = torch.empty((batch, pairs, radix, base, 2), dtype=torch.float32, device=device)
    multiply(product, spectra(signal[:, :, None], gain), spectra(rir, None), 1 / (radix * base))
    parts = torch.view_as_real(torch.fft.ifft(torch.view_as_complex(product), norm="forward"))
    heard = out
    if heard is None:
        heard = torch.empty((batch, mics, num_samples), dtype=torch.float32, device=device)
    merge(heard, parts, twiddles, keep)
    return heard
