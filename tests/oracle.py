"""Slow, float64, with loops, and independent of the package: what the fast code must agree with.

FRA-RIR is done as the reference does it, on a grid of 64 slots per sample through two decimators and a high-pass
between them (arXiv 2208.04101, arXiv 2304.08052). Plain numpy in, plain numpy out.
"""
import math

import numpy as np
import torch
from torchaudio.functional import lfilter

SPEED = 340.0
OMNI_SHARE = {"sub_cardioid": 0.75, "cardioid": 0.5, "hyper_cardioid": 0.25, "bidirectional": 0.0}


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)) + 1e-3)


def gain(pattern, cosine):
    if pattern == "omni":
        return 1.0
    if pattern == "half_omni":
        return float(cosine > 0)
    return OMNI_SHARE[pattern] + (1 - OMNI_SHARE[pattern]) * cosine


def look(orientation):
    """The reference's look vector, with the azimuth multiplied by sin(polar) inside the cosine and the sine."""
    azimuth, polar = orientation
    vector = np.array([math.cos(azimuth * math.sin(polar)), math.sin(azimuth * math.sin(polar)), math.cos(polar)])
    return vector / np.linalg.norm(vector)


def cosine_between(a, b):
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


def decimate(signal):
    """8:1 along the last axis, by definition: a zero-phase windowed sinc of 97 taps; ceil(length / 8) samples."""
    n = np.arange(-48, 49)
    taps = 0.99 / 8 * np.sinc(0.99 * n / 8) * np.cos(np.pi * 0.99 * n / 96) ** 2
    length = -(-signal.shape[-1] // 8)
    padded = np.zeros((*signal.shape[:-1], 8 * length + 97))
    padded[..., 48:48 + signal.shape[-1]] = signal
    return sum(tap * padded[..., k:k + 8 * length:8] for k, tap in enumerate(taps))


def high_pass(signal, rate):
    """80 Hz, Q 0.707, second order, by its recurrence."""
    omega = 2 * math.pi * 80.0 / rate
    alpha, cos = math.sin(omega) / (2 * 0.707), math.cos(omega)
    a = torch.tensor([1 + alpha, -2 * cos, 1 - alpha], dtype=torch.float64)
    b = torch.tensor([(1 + cos) / 2, -(1 + cos), (1 + cos) / 2], dtype=torch.float64)
    return lfilter(torch.from_numpy(signal), a, b, clamp=False).numpy()


def decimation_chain(train, sample_rate):
    """Arrivals on the 64x grid [..., slot] -> signal at the sample rate [..., tap]."""
    return decimate(high_pass(decimate(train), 8 * sample_rate))


def absorption_of(formula, room, rt60):
    """"sabine" or "eyring", from volume and surface; at most 0.99."""
    volume, surface = math.prod(room), 2 * (room[0] * room[1] + room[1] * room[2] + room[2] * room[0])
    sabine = 24 * math.log(10) * volume / (SPEED * surface * rt60)
    return min(sabine if formula == "sabine" else 1 - math.exp(-sabine), 0.99)


def mirror_images(room, src, mic, reach, max_order):
    """(offset from the microphone, signs of the mirrored axes, order) of images, as Allen and Berkley number them:
    at (1 - 2 q) src + 2 n room, after |n - q| + |n| reflections on each axis."""
    axes = []
    for length, s, m in zip(room, src, mic):
        count = math.ceil(reach / (2 * length)) + 1
        axes.append([((1 - 2 * q) * s + 2 * n * length - m, 1 - 2 * q, abs(n - q) + abs(n))
                     for q in (0, 1) for n in range(-count, count + 1)])
    for x, x_sign, x_order in axes[0]:
        for y, y_sign, y_order in axes[1]:
            for z, z_sign, z_order in axes[2]:
                order = x_order + y_order + z_order
                if x * x + y * y + z * z < (reach + 1) ** 2 and (max_order is None or order <= max_order):
                    yield np.array([x, y, z]), np.array([x_sign, y_sign, z_sign]), order


def arrivals(room_dim, rt60, mic_pos, src_pos, direction, ratio, perturbation, src_cosine=None, *, sample_rate,
             exponent=0.25, src_pattern="omni", mic_pattern="omni", mic_orientation=None, src_orientation=None,
             early_ms=(-6, 50)):
    """Of one scene: (slot, amplitude, is early) lists per [mic][src], the direct path first, and the length in slots.

    mic_pos [mic, 3], src_pos [src, 3] m; direction [src, image, 3], ratio, perturbation, src_cosine [src, image].
    """
    grid = 64 * sample_rate
    length = math.ceil(np.float32(rt60) * np.float32(grid))
    reach = SPEED * rt60
    volume_over_surface = 1 / (2 * sum(1 / side for side in room_dim))
    absorption = 1 - math.exp(-0.16 * volume_over_surface / rt60)
    coefficient = math.sqrt(1 - absorption ** 2)
    most = (math.log10(reach) - 3) / math.log10(coefficient)
    result = [[[] for _ in src_pos] for _ in mic_pos]
    for s, src in enumerate(src_pos):
        direct = [distance(mic, src) for mic in mic_pos]
        near = int(np.argmin(direct))
        for m, mic in enumerate(mic_pos):
            first = math.ceil(direct[m] * grid / SPEED)
            start = max(first + math.floor(grid * early_ms[0] / 1000), 0)
            stop = min(first + math.floor(grid * early_ms[1] / 1000), length)
            mic_look = None if mic_pattern == "omni" else look(mic_orientation[m])
            for i in range(-1, len(ratio[s])):
                if i < 0:
                    image, dist, count = src, direct[m], 0.0
                    factor = gain(src_pattern, cosine_between(look(src_orientation[s]), mic - src)
                                  if src_pattern != "omni" else 1.0)
                else:
                    image = mic_pos[near] + direct[near] * float(ratio[s, i]) * direction[s, i].astype(np.float64)
                    dist = distance(mic, image)
                    spread = float(perturbation[s, i]) * float(ratio[s, i]) ** exponent
                    count = max(dist / reach * (most - 1) + 1 + spread, 1.0)
                    factor = gain(src_pattern, float(src_cosine[s, i]) if src_pattern != "omni" else 1.0)
                if mic_look is not None:
                    factor *= gain(mic_pattern, cosine_between(mic_look, image - mic))
                slot = min(math.ceil(dist * grid / SPEED), length - 1)
                result[m][s].append((slot, factor * coefficient ** count / dist, start <= slot < stop))
    return result, length


def fra_rir(*args, sample_rate, **kwargs):
    """The RIRs and early RIRs [mic, src, tap] of one scene, from the arguments of `arrivals`."""
    found, length = arrivals(*args, sample_rate=sample_rate, **kwargs)
    train = np.zeros((2, len(found), len(found[0]), length))
    for m, row in enumerate(found):
        for s, paths in enumerate(row):
            for slot, amplitude, early in paths:
                train[0, m, s, slot] += amplitude
                train[1, m, s, slot] += amplitude * early
    return tuple(decimation_chain(train, sample_rate))


def mixture(dry, rir, gain_factor):
    """dry [src, sample], rir [mic, src, tap], gain_factor [src] -> [mic, sample], as long as the dry speech."""
    out = np.zeros((rir.shape[0], dry.shape[-1]))
    for m in range(rir.shape[0]):
        for s in range(rir.shape[1]):
            out[m] += gain_factor[s] * np.convolve(dry[s], rir[m, s])[:dry.shape[-1]]
    return out


def diffuse(white, mic_pos, rate, loading=1e-4, speed=340.0):
    """White noise [mic, sample] to spherically isotropic noise of the microphones mic_pos [mic, 3] m, likewise: bin by
    bin by a Cholesky factor of the coherence sin(kd)/(kd), whose diagonal is `loading` more than 1."""
    dist = np.linalg.norm(mic_pos[:, None] - mic_pos[None], axis=-1)
    spectrum, mixed = np.fft.rfft(white), np.zeros((len(white), white.shape[1] // 2 + 1), complex)
    for index, freq in enumerate(np.fft.rfftfreq(white.shape[1], 1 / rate)):
        coherent = np.sinc(2 * freq * dist / speed) + loading * np.eye(len(dist))
        mixed[:, index] = np.linalg.cholesky(coherent) @ spectrum[:, index]
    return np.fft.irfft(mixed, white.shape[1])


def at_snr(noise, speech, snr_db):
    """noise [mic, sample], snr_db below the speech in mean power over microphones and samples; infinite: nothing."""
    return noise * np.sqrt((speech ** 2).mean() / (noise ** 2).mean() * 10 ** (-snr_db / 10))


def gcc_delay(first, second, step=16):
    """Samples by which `second` lags `first`: the peak of the plain cross-correlation, on a grid of 1/step sample."""
    n = len(first) + len(second)
    cross = np.fft.rfft(second, n) * np.fft.rfft(first, n).conj()
    correlation = np.fft.irfft(cross, n * step)
    peak = int(np.argmax(correlation))
    return (peak if peak < n * step / 2 else peak - n * step) / step


def coherence(signal, frame=256):
    """Welch estimate of the complex coherence [mic, mic, freq] of signal [mic, sample], Hann, half overlapping; and
    the auto spectra [mic, freq], 1 for white noise of unit power."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(frame) / frame)
    cross, count = 0, 0
    for start in range(0, signal.shape[1] - frame + 1, frame // 2):
        spectrum = np.fft.rfft(signal[:, start:start + frame] * window)
        cross, count = cross + spectrum[:, None] * spectrum[None].conj(), count + 1
    cross = cross / (count * (window ** 2).sum())
    auto = np.einsum("iif->if", cross).real
    return cross / np.sqrt(auto[:, None] * auto[None]), auto


def delay_maps(audio, window_length, hop, bands, delays, sample_rate):
    """GCC-PHAT and magnitude-weighted GCC per frame and band: [2, band, frame, delay], of audio [2, sample].

    bands [band, freq] are weights of the STFT bins from 0 Hz on, delays [delay] s.
    """
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window_length) / window_length)
    starts = range(0, audio.shape[1] - window_length + 1, hop)
    maps = np.zeros((2, len(bands), len(starts), len(delays)))
    for t, start in enumerate(starts):
        first, second = np.fft.rfft(audio[:, start:start + window_length] * window)
        for b, weights in enumerate(bands):
            totals = np.zeros(2)
            for k in np.flatnonzero(weights):
                cross = second[k] * first[k].conjugate()
                wave = np.real(cross / abs(cross) * np.exp(-2j * np.pi * k * sample_rate / window_length * delays))
                for kind, weight in enumerate((1.0, abs(cross))):
                    maps[kind, b, t] += weights[k] * weight * wave
                    totals[kind] += weights[k] * weight
            maps[:, b, t] /= totals[:, None]
    return maps


def ks(first, second):
    """Two-sample Kolmogorov-Smirnov distance, in units of its standard scale sqrt((n + m) / (n m)).

    By chance above 1.36 in 5 %, 1.95 in 0.1 %, 2.43 in 0.0015 % of the cases.
    """
    first, second = np.sort(np.ravel(first)), np.sort(np.ravel(second))
    at = np.concatenate((first, second))
    one, other = (np.searchsorted(sample, at, side="right") / len(sample) for sample in (first, second))
    return np.abs(one - other).max() / math.sqrt(1 / len(first) + 1 / len(second))


def ks_uniform(sample, low, high):
    """One-sample Kolmogorov-Smirnov distance to the uniform law on [low, high], in units of 1 / sqrt(n)."""
    sample = (np.sort(np.ravel(sample)) - low) / (high - low)
    n = len(sample)
    assert 0 <= sample[0] and sample[-1] <= 1, f"outside of [{low}, {high}]"
    return max(np.abs(sample - np.arange(n) / n).max(), np.abs(np.arange(1, n + 1) / n - sample).max()) * math.sqrt(n)
