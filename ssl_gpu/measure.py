"""Batched measurement of room impulse responses: decay, balance, direct path, texture, colour, and what mics share.

Everything takes rir [batch, ..., tap], zero from its length on, and answers in float64 on the RIRs' device: energies
span more than 60 dB, and float32 sums would show in a reverberation time. No device sync, no loop over the batch. NaN
where a measure is undefined, with gradient 0. The gradient with respect to the RIR is exact wherever the samples that
a measure picks (a peak, a -5 dB point) stay the same; counts and indices have none.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ssl_gpu.acoustics import SPEED_OF_SOUND, distance
from ssl_gpu.convolve import fast_length
from ssl_gpu.scene import SceneBatch
from ssl_gpu.synthesis import RirBatch

PEAK_SEARCH = 3             # samples around its expected place in which the direct path's peak is sought
FINE, FINE_REACH = 32, 1.5  # points per sample at which a peak is interpolated, and how far to both sides in samples
SINC_TAPS = 32              # of the interpolating windowed sinc, to each side
DRR_S, CLARITY_S = 0.0025, 0.05
DENSITY_WINDOW_S = 0.02
ECHO_DENSITY_S = (0.02, 0.05, 0.1, 0.2)  # after the direct path
OUTSIDE_ONE_RMS = math.erfc(math.sqrt(0.5))  # of Gaussian noise: the density that is called 1
TILT_FROM_HZ, TILT_BANDS, TILT_TO = 250.0, 15, 0.4  # third octaves, up to this share of the sample rate
FRAME, NUM_BANDS, MIN_FRAMES = 256, 8, 4            # of the late coherence


def _db(power: Tensor) -> Tensor:
    """Power [...] -> dB, -inf at 0. The inner where keeps the gradient there 0 instead of NaN."""
    positive = power > 0
    return torch.where(positive, 10 * torch.log10(torch.where(positive, power, 1.0)), -torch.inf)


def _energy(rir: Tensor) -> Tensor:
    return rir.to(torch.float64).square()


def _rfft(signal: Tensor, n_fft: int) -> Tensor:
    """float64 [..., tap] -> complex128 [..., freq], also of a batch of nothing, which MKL refuses to transform."""
    if signal.numel() == 0:
        return signal.new_zeros((*signal.shape[:-1], n_fft // 2 + 1), dtype=torch.complex128)
    return torch.fft.rfft(signal, n_fft)


def _irfft(spectrum: Tensor, n_fft: int) -> Tensor:
    """complex128 [..., freq] -> float64 [..., tap], likewise."""
    if spectrum.numel() == 0:
        return spectrum.new_zeros((*spectrum.shape[:-1], n_fft), dtype=torch.float64)
    return torch.fft.irfft(spectrum, n_fft)


def _within(energy: Tensor, first: Tensor | int, last: Tensor) -> Tensor:
    """Energy [..., tap] summed from tap `first` to tap `last` [...], both included."""
    tap = torch.arange(energy.shape[-1], device=energy.device)
    inside = (tap >= (first[..., None] if isinstance(first, Tensor) else first)) & (tap <= last[..., None])
    return torch.where(inside, energy, 0.0).sum(-1)


def _samples_at(signal: Tensor, index: Tensor) -> Tensor:
    """signal [..., tap] at index [..., k], 0 outside of it."""
    taps = signal.shape[-1]
    inside = (index >= 0) & (index < taps)
    return torch.where(inside, signal.gather(-1, index.clamp(0, taps - 1)), 0.0)


def energy_db(rir: Tensor) -> Tensor:
    """Total energy, dB, [...]; -inf for silence."""
    return _db(_energy(rir).sum(-1))


def energy_decay(rir: Tensor, direct_tap: Tensor) -> Tensor:
    """Schroeder's backward-integrated energy, dB relative to its value at direct_tap [...]: [..., tap].

    -inf where nothing is left, above 0 before direct_tap. No correction for noise or truncation: there is no noise.
    """
    left = _energy(rir).flip(-1).cumsum(-1).flip(-1)
    return _db(left) - _db(left.gather(-1, direct_tap[..., None]))


def decay_time(decay: Tensor, direct_tap: Tensor, sample_rate: int, high_db: float, low_db: float) -> Tensor:
    """Time in s, [...], that a fall by 60 dB takes at the slope of the least-squares line through decay [..., tap].

    The line runs from the first sample at or below high_db to the first at or below low_db, both included: (-5, -25)
    is T20, (-5, -35) T30, (0, -10) EDT (ISO 3382-1). NaN when the decay does not get there, falls to nothing on the
    way, or leaves fewer than three samples, as behind a strong direct path.
    """
    taps = decay.shape[-1]
    tap = torch.arange(taps, device=decay.device)
    end = (decay > low_db).sum(-1, keepdim=True)                        # it only falls, and is above 0 before
    used = (tap >= direct_tap[..., None]) & (decay <= high_db) & (tap <= end)
    count = used.sum(-1)
    level_at_end = decay.gather(-1, end.clamp(max=taps - 1)).squeeze(-1)
    valid = (end.squeeze(-1) < taps) & torch.isfinite(level_at_end) & (count >= 3)
    x = torch.where(used, (tap - end).to(decay.dtype), 0.0)
    centred = torch.where(used, x - (x.sum(-1) / count.clamp(min=1))[..., None], 0.0)
    rise = (centred * torch.where(used, decay, 0.0)).sum(-1)
    slope = torch.where(valid, rise, -1.0) / torch.where(valid, centred.square().sum(-1), 1.0)
    return torch.where(valid, -60 / (slope * sample_rate), torch.nan)


def _interpolated_peak(signal: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Offset from tap `peak` [...] to the maximum of |signal| between the samples, in samples, and the value there.

    A windowed sinc (cos^2, 32 taps to each side) at 32 points per sample, and a parabola through the highest three.
    """
    fine = torch.arange(-round(FINE_REACH * FINE), round(FINE_REACH * FINE) + 1, device=signal.device) / FINE
    near = torch.arange(-SINC_TAPS - 1, SINC_TAPS + 2, device=signal.device)
    lag = fine.to(torch.float64) - near[:, None]
    window = torch.where(lag.abs() < SINC_TAPS, torch.cos(lag * (0.5 * math.pi / SINC_TAPS)).square(), 0.0)
    around = _samples_at(signal, peak[..., None] + near).to(torch.float64)
    value = (around @ (torch.sinc(lag) * window)).abs()                # [..., fine]
    best = value.argmax(-1, keepdim=True)
    left, middle, right = (value.gather(-1, (best + step).clamp(0, len(fine) - 1)).squeeze(-1) for step in (-1, 0, 1))
    curvature = left - 2 * middle + right
    inner = (curvature < 0) & (best.squeeze(-1) > 0) & (best.squeeze(-1) < len(fine) - 1)
    step = torch.where(inner, 0.5 * (left - right) / torch.where(inner, curvature, 1.0), 0.0)
    there = middle > 0
    offset = fine.to(torch.float64)[best.squeeze(-1)] + step / FINE
    return torch.where(there, offset, torch.nan), torch.where(there, middle - 0.25 * (left - right) * step, torch.nan)


def direct_path(rir: Tensor, expected_delay: Tensor, sample_rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the direct path: its tap [...] int64, and its delay in s and height, both interpolated between the samples.

    The tap is that of the largest |rir| within 3 samples of expected_delay [...] s, where the geometry puts it.
    Delay and height are NaN where there is nothing, as when a pattern's null faces the source; the tap is then the
    first of those searched.
    """
    search = torch.arange(-PEAK_SEARCH, PEAK_SEARCH + 1, device=rir.device)
    index = (expected_delay * sample_rate).round().to(torch.int64)[..., None] + search
    index = index.clamp(0, rir.shape[-1] - 1)
    largest = _samples_at(rir, index).abs().argmax(-1, keepdim=True)
    tap = index.gather(-1, largest).squeeze(-1)
    offset, height = _interpolated_peak(rir, tap)
    return tap, (tap + offset) / sample_rate, height


def drr_db(rir: Tensor, direct_tap: Tensor, sample_rate: int) -> Tensor:
    """Direct-to-reverberant ratio, dB, [...]: energy within 2.5 ms of direct_tap over all other energy."""
    energy, reach = _energy(rir), round(DRR_S * sample_rate)
    direct = _within(energy, direct_tap - reach, direct_tap + reach)
    return _db(direct) - _db(_within(energy, 0, direct_tap - reach - 1) +
                             _within(energy, direct_tap + reach + 1, torch.full_like(direct_tap, rir.shape[-1])))


def clarity_db(rir: Tensor, direct_tap: Tensor, sample_rate: int) -> Tensor:
    """C50, dB, [...]: energy up to 50 ms after direct_tap over the energy later than that (ISO 3382-1)."""
    energy, split = _energy(rir), direct_tap + round(CLARITY_S * sample_rate)
    return _db(_within(energy, 0, split)) - _db(_within(energy, split + 1, torch.full_like(split, rir.shape[-1])))


def echo_density(rir: Tensor, length: Tensor, centre: Tensor, sample_rate: int) -> Tensor:
    """Normalised echo density (Abel and Huang, AES 121, 2006) in a rectangular window of 20 ms about tap `centre`
    [...] int64: the share of samples beyond one rms, 1 for Gaussian noise.

    length [batch] taps. NaN where the window is silent or leaves the RIR.
    """
    half = round(0.5 * DENSITY_WINDOW_S * sample_rate)
    index = centre[..., None] + torch.arange(-half, half, device=rir.device)
    energy = _energy(_samples_at(rir, index))
    power = energy.mean(-1, keepdim=True)
    share = (energy > power).to(torch.float64).mean(-1) / OUTSIDE_ONE_RMS
    length = length.view(-1, *(1,) * (centre.ndim - 1))
    inside = (centre >= half) & (centre + half <= length) & (power.squeeze(-1) > 0)
    return torch.where(inside, share, torch.nan)


def spectral_tilt_db(rir: Tensor, sample_rate: int) -> Tensor:
    """Slope of the power density in third octaves from 250 Hz to 6.3 kHz against frequency, dB per octave, [...].

    White is 0. Bands that pass 0.4 of the sample rate, where a decimator rolls off, are left out.
    """
    n_fft = max(8192, 1 << (rir.shape[-1] - 1).bit_length())
    centres = [TILT_FROM_HZ * 2 ** (k / 3) for k in range(TILT_BANDS)]
    centres = [centre for centre in centres if centre * 2 ** (1 / 6) <= TILT_TO * sample_rate]
    octave = torch.tensor(centres, dtype=torch.float64, device=rir.device).log2()
    freq = torch.arange(n_fft // 2 + 1, device=rir.device, dtype=torch.float64) * (sample_rate / n_fft)
    position = (freq.clamp(min=1).log2()[:, None] - octave) * 6         # [freq, band], -1..1 inside the band
    member = ((position >= -1) & (position < 1)).to(torch.float64)
    level = _db(_rfft(rir.to(torch.float64), n_fft).abs().square() @ (member / member.sum(0)))
    weight = octave - octave.mean()
    return (level @ weight) / weight.square().sum()


def last_significant_tap(rir: Tensor) -> Tensor:
    """The last tap [...] int64 with |rir| above a thousandth (-60 dB) of its maximum; -1 for silence."""
    size = rir.abs()
    tap = torch.arange(rir.shape[-1], device=rir.device)
    return torch.where(size > 1e-3 * size.amax(-1, keepdim=True), tap, -1).amax(-1)


def _outer_mics(of_mics: Tensor) -> Tensor:
    """[batch, mic, src, ...] -> [batch, 2, src, ...]: the first and the last microphone, the ends of the array."""
    return torch.stack((of_mics[:, 0], of_mics[:, -1]), 1)


def time_difference(rir: Tensor, direct_tap: Tensor, travel_time: Tensor, sample_rate: int) -> Tensor:
    """Seconds by which the direct sound of rir [batch, mic, src, tap] reaches the last microphone after the first,
    [batch, src]: the interpolated peak of the plain cross-correlation from 16 samples before the earlier direct path
    to 24 after the later.

    It is sought up to a sample beyond travel_time [batch] s from one to the other, which no direct sound exceeds:
    reflections correlate at any lag. NaN where a microphone hears nothing.
    """
    direct_tap = _outer_mics(direct_tap)
    tap = torch.arange(rir.shape[-1], device=rir.device)
    start, stop = direct_tap.amin(1) - 16, direct_tap.amax(1) + 24
    inside = (tap >= start[..., None]) & (tap < stop[..., None])        # [batch, src, tap]
    early = torch.where(inside[:, None], _outer_mics(rir).to(torch.float64), 0.0)
    n_fft = fast_length(2 * rir.shape[-1])
    first, last = _rfft(early, n_fft).unbind(1)
    correlation = _irfft(last * first.conj(), n_fft).roll(n_fft // 2, -1)
    lag = torch.arange(n_fft, device=rir.device) - n_fft // 2
    possible = lag.abs() <= travel_time[:, None, None] * sample_rate + 1
    peak = torch.where(possible, correlation, -torch.inf).argmax(-1)
    offset, _ = _interpolated_peak(correlation, peak)
    return (peak - n_fft // 2 + offset) / sample_rate


def late_spectra(rir: Tensor, length: Tensor, direct_tap: Tensor, sample_rate: int) -> Tensor:
    """Of the late part of rir [batch, mic, src, tap], summed over its frames: [batch, src, 3, freq].

    The three are the real part of the cross-spectrum of the first and the last microphone and their auto-spectra
    (256 samples, Hann, half overlapping). Frames count alike, whatever is left of the decay: each is divided by its
    energy. The late part begins 50 ms after the later direct path and ends before the cut at length [batch] less the
    travel to the nearer microphone, beyond which there are no images. The auto-spectra of a frame sum to 1 each on
    average, so their sum over freq counts the frames.
    """
    direct_tap, rir = _outer_mics(direct_tap), _outer_mics(rir)
    start = direct_tap.amax(1) + round(CLARITY_S * sample_rate)        # [batch, src]
    stop = length[:, None] - direct_tap.amin(1) - 10
    hop = FRAME // 2
    frame = torch.arange(max((rir.shape[-1] - FRAME) // hop + 1, 1), device=rir.device) * hop
    within = torch.arange(FRAME, device=rir.device)
    whole = start[..., None] + frame + FRAME <= stop[..., None]         # [batch, src, frame]
    window = 0.5 - 0.5 * torch.cos(within * (2 * math.pi / FRAME))
    index = (start[:, None, :, None, None] + frame[:, None] + within).expand(-1, 2, -1, -1, -1)
    frames = _samples_at(rir.to(torch.float64), index.flatten(-2)).unflatten(-1, index.shape[-2:])
    first, last = _rfft(frames * window, FRAME).unbind(1)                # [batch, src, frame, freq]
    spectra = torch.stack(((first * last.conj()).real, first.abs().square(), last.abs().square()), 2)
    total = 0.5 * spectra[:, :, 1:].sum((2, 4))                         # [batch, src, frame]
    counts = whole & (total > 0)
    share = torch.where(counts, 1 / torch.where(counts, total, 1.0), 0.0)
    return (spectra * share[:, :, None, :, None]).sum(3)


def late_coherence(spectra: Tensor) -> Tensor:
    """late_spectra [..., 3, freq] -> real part of the coherence [..., band] in eight equal bands up to half the
    sample rate. NaN for fewer than 4 frames, whose coherence means nothing, and where a microphone hears nothing."""
    cross, first, last = spectra[..., :-1].unflatten(-1, (NUM_BANDS, -1)).sum(-1).unbind(-2)
    enough = (0.5 * spectra[..., 1:, :].sum((-2, -1)) > MIN_FRAMES - 0.5)[..., None]
    power = first * last
    defined = enough & (power > 0)  # before the root: its gradient at 0 is infinite
    return torch.where(defined, cross / torch.where(defined, power, 1.0).sqrt(), torch.nan)


@dataclass(frozen=True, eq=False)
class RirMeasures:
    """Measures of a RirBatch, float64 [batch, mic, src] unless stated, NaN where undefined.

    t20, t30, edt s; drr_db, c50_db, energy_db; early_ratio_db: energy of the early RIR in that of the whole, None
    without early RIRs; direct_tap int64; direct_delay s and direct_height: interpolated; echo_density
    [batch, mic, src, 4]: 20, 50, 100 and 200 ms after the direct path; echo_density_half: about rt60 / 2;
    tilt_db: per octave; last_tap int64: the last within 60 dB of the peak.
    Between the first and the last microphone, None for a single one: itd [batch, src] s, positive when the last hears
    later; late_coherence [batch, src, band].
    """

    t20: Tensor
    t30: Tensor
    edt: Tensor
    drr_db: Tensor
    c50_db: Tensor
    energy_db: Tensor
    early_ratio_db: Tensor | None
    direct_tap: Tensor
    direct_delay: Tensor
    direct_height: Tensor
    echo_density: Tensor
    echo_density_half: Tensor
    tilt_db: Tensor
    last_tap: Tensor
    itd: Tensor | None
    late_coherence: Tensor | None

    @classmethod
    def concatenate(cls, parts: list["RirMeasures"]) -> "RirMeasures":
        """Measures of several batches as those of one."""
        columns = ([getattr(part, f.name) for part in parts] for f in fields(cls))
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


def measure_rirs(rirs: RirBatch, scenes: SceneBatch) -> RirMeasures:
    """Every measure of every RIR; the scenes say where the direct paths lie, and what rt60 was asked for. Of a batch of
    nothing they are empty."""
    rir, rate, length = rirs.full, rirs.sample_rate, rirs.length
    expected = distance(scenes.src_pos[:, None] - scenes.mic_pos[:, :, None]) / SPEED_OF_SOUND
    tap, delay, height = direct_path(rir, expected, rate)
    decay = energy_decay(rir, tap)
    t20, t30, edt = (decay_time(decay, tap, rate, *span) for span in ((-5, -25), (-5, -35), (0, -10)))
    energy = energy_db(rir)
    early_ratio = None if rirs.early is None else energy_db(rirs.early) - energy
    density = torch.stack([echo_density(rir, length, tap + round(s * rate), rate) for s in ECHO_DENSITY_S], -1)
    middle = (0.5 * scenes.rt60 * rate).round().to(torch.int64)[:, None, None].expand_as(tap)
    itd = coherence = None
    if rir.shape[1] > 1:
        aperture = torch.linalg.vector_norm(scenes.mic_pos[:, -1] - scenes.mic_pos[:, 0], dim=-1)
        itd = time_difference(rir, tap, aperture / SPEED_OF_SOUND, rate)
        coherence = late_coherence(late_spectra(rir, length, tap, rate))
    return RirMeasures(t20, t30, edt, drr_db(rir, tap, rate), clarity_db(rir, tap, rate), energy, early_ratio, tap,
                       delay, height, density, echo_density(rir, length, middle, rate), spectral_tilt_db(rir, rate),
                       last_significant_tap(rir), itd, coherence)
