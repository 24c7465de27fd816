"""Arrivals to RIRs, straight at the sample rate: the reference's chain of filters as a table and a response.

The reference of FRA-RIR puts every arrival on a grid of 64 slots per sample, decimates by 8, high-passes at 80 Hz, and
decimates by 8 again. All of that is linear and, in whole samples, shift-invariant, so here the final response of each
arrival is added at the sample rate: one in slot 64 b + phase contributes a tabulated 16-tap kernel at sample b. See
rir_kernel.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ssl_gpu import runtime
from ssl_gpu.convolve import transform_length
from ssl_gpu.runtime import constant, is_gpu
from ssl_gpu.scatter import add_kernels

OVERSAMPLING = 64  # slots per sample
HIGHPASS_HZ, HIGHPASS_Q = 80.0, 0.707
LEAD, TAIL = 6, 9  # samples before and after its own that an arrival reaches
MAIN_TAPS = 14     # taps of the kernel's main part; the two-tap remainder sits at 8 and 9 samples
# The high-pass rings on: 20/32/45 ms to fall to 1e-3/1e-5/1e-7. With 45 ms of padding what wraps round is below 2e-8.
RINGING_S = 0.045
PART = 8  # scenes rendered at a time on a CPU, whose temporaries then stay in its caches: entry 57 of performance.md


@dataclass(frozen=True, eq=False)
class RirBatch:
    """full, early [batch, mic, src, tap] float32 (early None unless asked for), zero from tap `length` on;
    length [batch] int64 taps: ceil(rt60 sample_rate), the product rounded to float32 as the reference does;
    sample_rate Hz; full_end, early_end: taps that full and early have nothing behind, in whichever scene, None where it
    is not known beforehand. The scale is the reference's: a direct path at d m peaks at about 0.0155 / d.
    """

    full: Tensor
    early: Tensor | None
    length: Tensor
    sample_rate: int
    full_end: int | None = None
    early_end: int | None = None

    def __getitem__(self, index: slice | Tensor) -> "RirBatch":
        """The RIRs of a slice or of an index tensor [n] of scenes."""
        early = None if self.early is None else self.early[index]
        return replace(self, full=self.full[index], early=early, length=self.length[index])

    @classmethod
    def concatenate(cls, batches: Sequence["RirBatch"]) -> "RirBatch":
        """Several batches of as many taps as one."""
        early = None if batches[0].early is None else torch.cat([batch.early for batch in batches])
        return cls(torch.cat([batch.full for batch in batches]), early, torch.cat([batch.length for batch in batches]),
                   batches[0].sample_rate, _last([batch.full_end for batch in batches]),
                   _last([batch.early_end for batch in batches]))


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Everything that reaches a microphone, the direct path first: slot [batch, mic, src, 1 + image] int64 on the
    64x grid, amplitude likewise float32, early likewise bool (None unless asked for)."""

    slot: Tensor
    amplitude: Tensor
    early: Tensor | None


def in_parts(render: Callable[[Tensor], RirBatch], order: Tensor) -> RirBatch:
    """The RIRs of a batch on a CPU, PART scenes at a time, of which render(index) renders some. order: an index tensor
    of all, in which those that cost alike follow one another."""
    whole, ends = None, []
    for index in order.split(PART):
        part = render(index)
        ends.append((part.full_end, part.early_end))
        if whole is None:
            full, early, length = (None if some is None else some.new_empty(len(order), *some.shape[1:])
                                   for some in (part.full, part.early, part.length))
            whole = replace(part, full=full, early=early, length=length)
        for there, some in ((whole.full, part.full), (whole.early, part.early), (whole.length, part.length)):
            if there is not None:
                there.index_copy_(0, index, some)
    full_end, early_end = map(_last, zip(*ends))
    return replace(whole, full_end=full_end, early_end=early_end)


def _last(ends: Sequence[int | None]) -> int | None:
    return None if None in ends else max(ends)


def slots_in_rir(sample_rate: int, rt60: Tensor) -> Tensor:
    """rt60 [batch] s -> length of the RIR [batch] int64 in slots; the product is in float32, as in the reference."""
    return (rt60.to(torch.float32) * float(OVERSAMPLING * sample_rate)).ceil().to(torch.int64)


def taps_in_rir(slots: Tensor) -> Tensor:
    """Slots [...] int64 -> taps: two decimations by 8, each rounding up, which is one by 64 rounding up."""
    return (slots + 63) // 64


@dataclass(frozen=True)
class Kernel:
    """The response of one arrival, by its slot within a sample, split so that float32 loses nothing.

    main [64, 14] (samples -6..7, to be filtered by (1 - z^-1)^2 / A8), remainder [64, 2] (samples 8 and 9, to be
    filtered by 1 / A8), poles [3]: the coefficients of A8. float64.
    """

    main: np.ndarray
    remainder: np.ndarray
    poles: np.ndarray


@lru_cache(maxsize=None)
def rir_kernel(sample_rate: int) -> Kernel:
    """The reference's chain, decimate by 8, high-pass, decimate by 8, as a table for arrivals on its 64x grid.

    The high-pass b(z)/A(z) runs at 8 times the target rate. With A8(z) having the 8th powers of its poles,
    q(z) = A8(z^8)/A(z) is a polynomial, so b/A = b q / A8(z^8): a finite filter before the decimator and an all-pole
    one after it. Decimator, finite filter and decimator together give 16 taps per slot within a sample, exactly.
    An all-pole 1/A8 (two poles near z = 1) costs 3e-5 in float32; dividing the taps by (1 - z^-1)^2, which leaves 14
    taps and a remainder below 1e-6 in the last two, and filtering by (1 - z^-1)^2/A8 costs 2e-7.
    """
    n = np.arange(-48, 49)
    decimator = 0.99 / 8 * np.sinc(0.99 * n / 8) * np.cos(math.pi * 0.99 * n / 96) ** 2  # torchaudio's, 8:1
    omega = 2 * math.pi * HIGHPASS_HZ / (8 * sample_rate)
    alpha = math.sin(omega) / (2 * HIGHPASS_Q)
    numerator = np.array([1, -2, 1]) * (1 + math.cos(omega)) / 2 / (1 + alpha)
    pole = np.roots([1 + alpha, -2 * math.cos(omega), 1 - alpha])[0]  # one of a complex pair
    powers = pole ** np.arange(8)
    finite = np.convolve(numerator, np.convolve(powers, powers.conj()).real)
    poles = np.array([1, -2 * (pole ** 8).real, abs(pole) ** 16])

    taps = np.zeros((OVERSAMPLING, LEAD + TAIL + 1))
    for phase in range(OVERSAMPLING):
        first = np.zeros(14 + 6 + len(finite))  # the 8x grid from -6 on
        index = np.arange(-6, 14)
        reached = np.abs(phase - 8 * index) <= 48
        first[:20][reached] = decimator[phase - 8 * index[reached] + 48]
        filtered = np.convolve(first, finite)
        for tap in range(-LEAD, TAIL + 1):
            at = np.arange(len(filtered)) - 6 - 8 * tap
            inside = np.abs(at) <= 48
            taps[phase, tap + LEAD] = filtered[inside] @ decimator[at[inside] + 48]
    main = np.cumsum(np.cumsum(taps, 1), 1)[:, :MAIN_TAPS]
    rest = taps.copy()
    for shift, weight in enumerate((1, -2, 1)):
        rest[:, shift:shift + MAIN_TAPS] -= weight * main
    return Kernel(main, rest[:, MAIN_TAPS:], poles)


@constant
def _kernel_on(sample_rate: int, device: torch.device) -> Tensor:
    """Main part and remainder of the kernel side by side, [tap=16, phase=64] float32, on the device."""
    kernel = rir_kernel(sample_rate)
    table = np.concatenate((kernel.main, kernel.remainder), 1).T
    return torch.tensor(table, dtype=torch.float32, device=device)


@constant
def _kernel_by_phase(sample_rate: int, device: torch.device) -> Tensor:
    """The same, [phase=64, tap=16]: in a row the taps that an arrival adds."""
    kernel = rir_kernel(sample_rate)
    return torch.tensor(np.concatenate((kernel.main, kernel.remainder), 1), dtype=torch.float32, device=device)


@constant
def _response_on(sample_rate: int, n_fft: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(1 - z^-1)^2 / A8 and 1 / A8 on the grid of an n_fft-point real FFT, complex64, on the device; on a GPU over
    n_fft, which its inverse transform is then spared."""
    z = np.exp(-2j * math.pi * np.arange(n_fft // 2 + 1) / n_fft)
    all_pole = (1 / n_fft if is_gpu(device) else 1.0) / np.polyval(rir_kernel(sample_rate).poles[::-1], z)
    responses = ((1 - z) ** 2 * all_pole, all_pole)
    main, rest = (torch.tensor(r, dtype=torch.complex64, device=device) for r in responses)
    return main, rest


@constant
def taps_for(sample_rate: int, max_rt60: float) -> int:
    """Taps of a batch of RIRs whose RT60 never exceeds max_rt60 s."""
    max_slots = math.ceil(np.float32(max_rt60) * np.float32(OVERSAMPLING * sample_rate))
    return -(-(-(-max_slots // 8)) // 8)


def synthesize(sample_rate: int, arrivals: Arrivals, slots: Tensor, max_rt60: float, fused: bool = False,
               stop: int | None = None, early_stop: int | None = None) -> RirBatch:
    """Arrivals to RIRs: scatter the kernel of each arrival at the target rate, then the high-pass in frequency.

    slots [batch] int64, the length of each RIR on the 64x grid; max_rt60 s fixes the number of taps. fused: as for
    scatter.add_kernels. stop, early_stop: slots that no arrival, and no early one, is behind, where that is known: what
    rings on for more than RINGING_S behind them is then left out, 1e-7 of it, for transforms of few points.
    """
    device, taps = slots.device, taps_for(sample_rate, max_rt60)
    lengths = (_fft_length(sample_rate, taps, device, stop),)
    if arrivals.early is not None:
        own = lengths[0] if fused and is_gpu(device) else _fft_length(sample_rate, taps, device, early_stop)
        lengths = (lengths[0], min(lengths[0], own))
    trains = add_kernels(_kernel_on(sample_rate, device), arrivals.slot, arrivals.amplitude, arrivals.early, lengths,
                         MAIN_TAPS, fused)
    return _filter(sample_rate, trains, taps, slots, fused)


def synthesize_added(sample_rate: int, shape: tuple[int, int, int], add: Callable[[Tensor, Tensor], None],
                     slots: Tensor, max_rt60: float) -> RirBatch:
    """What synthesize does, without an early part, of arrivals that add(total, table) adds up, as ssl_gpu.fused does:
    total [2, *shape, sample] for shape batch, mic, src, table [phase, tap]."""
    taps, device = taps_for(sample_rate, max_rt60), slots.device
    train = torch.zeros(2, *shape, _fft_length(sample_rate, taps, device), dtype=torch.float32, device=device)
    add(train, _kernel_by_phase(sample_rate, device))
    return _filter(sample_rate, (train,), taps, slots, fused=True)


def synthesize_dense(sample_rate: int, train: Tensor, slots: Tensor) -> RirBatch:
    """What synthesize does, from arrivals already added up on the 64x grid: cheaper once they outnumber the taps.

    train [batch, mic, src, part, 64 tap] float32; two parts, late and early, or one where no early RIR is asked for.
    """
    shape, taps = train.shape[:4], train.shape[-1] // OVERSAMPLING
    products = runtime.exact_product(train.view(*shape, taps, OVERSAMPLING), _kernel_on(sample_rate, train.device).T)
    spread = train.new_zeros(2, *shape, _fft_length(sample_rate, taps, train.device))  # main, remainder
    for tap in range(MAIN_TAPS + 2):
        spread[0 if tap < MAIN_TAPS else 1, ..., tap:tap + taps] += products[..., tap]
    return _filter(sample_rate, [spread[..., part, :] for part in range(shape[3])], taps, slots)


def _fft_length(sample_rate: int, taps: int, device: torch.device, stop: int | None = None) -> int:
    """Points of the transform that filters RIRs: their taps, what the kernel reaches beyond them, and its ringing; of
    those whose arrivals end before the slot `stop` no more than they need."""
    if stop is not None:
        taps = min(taps, stop // OVERSAMPLING + 1)
    return transform_length(taps + LEAD + TAIL + 1 + math.ceil(RINGING_S * sample_rate), device)


def _filter(sample_rate: int, trains: Sequence[Tensor], taps: int, slots: Tensor, fused: bool = False) -> RirBatch:
    """Kernels added up to RIRs: trains [main or remainder, batch, mic, src, sample] from LEAD samples before the first
    tap to the end of the transform, of all arrivals, or of the late ones and of the early ones, which may be shorter.
    fused: as for scatter.add_kernels, one pass over the spectra, not two."""
    length = taps_in_rir(slots)

    def finish(train: Tensor) -> tuple[Tensor, int | None]:
        n_fft, device = train.shape[-1], train.device
        main, rest = _response_on(sample_rate, n_fft, device)
        spectrum, other = (torch.fft.rfft(part).contiguous() for part in (train[0], train[1]))
        if fused and is_gpu(device):
            from ssl_gpu.fused import filter_spectra  # Triton is not everywhere where torch is
            filter_spectra(*map(torch.view_as_real, (spectrum, other, main, rest)))
        else:
            spectrum.mul_(main).addcmul_(other, rest)
        rir = torch.fft.irfft(spectrum, n_fft, norm="forward" if is_gpu(device) else "backward")[..., LEAD:LEAD + taps]
        end = rir.shape[-1]
        rir = torch.where(runtime.indices(end, device) < length[:, None, None, None], rir, 0.0)
        return (rir, None) if end == taps else (torch.nn.functional.pad(rir, (0, taps - end)), end)

    if len(trains) == 1:
        (full, full_end), early, early_end = finish(trains[0]), None, None
    else:
        late, first = trains
        # Before either is transformed, or a gradient would not find what was.
        late[..., :first.shape[-1]] += first                            # all of them, from here on
        (full, full_end), (early, early_end) = finish(late), finish(first)
    return RirBatch(full, early, length, sample_rate, full_end, early_end)
