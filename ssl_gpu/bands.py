"""Octave bands: sound that dies away faster in some, by the walls or by the air between them (ISO 9613-1).

Every arrival has a gain per band. The RIR of each band is rendered on its own, and zero-phase filters that add up to 1
join them, so that equal gains leave an RIR as it is.
"""
from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ssl_gpu.convolve import fast_length

LOWEST_HZ = 125.0
BAND_RINGING_S = 0.05  # of padding: how far before and after an arrival the filters reach; 20 ms wrap 1e-7 of the peak


def octave_centres(sample_rate: int) -> list[float]:
    """Hz, from 125 up to half the sample rate. The first band reaches down to 0, the last up to the end."""
    count = int(math.log2(0.5 * sample_rate / LOWEST_HZ)) + 1
    return [LOWEST_HZ * 2 ** k for k in range(count)]


def air_absorption_db(freq: float, temperature_c: float, humidity_percent: float) -> float:
    """Attenuation in dB per m of a pure tone of `freq` Hz in air at 101.325 kPa (ISO 9613-1:1993, equations 3 to 5)."""
    kelvin = temperature_c + 273.15
    warmth = kelvin / 293.15
    saturation = 10 ** (4.6151 - 6.8346 * (273.16 / kelvin) ** 1.261)   # vapour pressure over ambient
    vapour = humidity_percent * saturation                              # molar concentration of water, %
    oxygen = 24 + 4.04e4 * vapour * (0.02 + vapour) / (0.391 + vapour)  # relaxation frequencies, Hz
    nitrogen = warmth ** -0.5 * (9 + 280 * vapour * math.exp(-4.170 * (warmth ** (-1 / 3) - 1)))
    relaxation = (0.01275 * math.exp(-2239.1 / kelvin) / (oxygen + freq ** 2 / oxygen)
                  + 0.1068 * math.exp(-3352.0 / kelvin) / (nitrogen + freq ** 2 / nitrogen))
    return 8.686 * freq ** 2 * (1.84e-11 * warmth ** 0.5 + warmth ** -2.5 * relaxation)


def band_gain(air_db: float, wall_ratio: Tensor | None, travelled: Tensor, reach: Tensor) -> Tensor:
    """Of arrivals, the direct path first, in one band: [batch, mic, src, 1 + image] float32.

    air_db: attenuation in dB per m; wall_ratio [batch]: RT60 of the band over the scene's, which means nothing to the
    direct path; travelled, like the result: distance over reach; reach [batch] m: 340 m/s * RT60.
    """
    loss = travelled * (air_db * reach)[:, None, None, None]            # dB
    if wall_ratio is not None:
        walls = travelled[..., 1:] * (60 / wall_ratio - 60)[:, None, None, None]
        loss = loss + torch.nn.functional.pad(walls, (1, 0))
    return torch.exp2(loss.to(torch.float32) * (-math.log2(10) / 20))


@lru_cache(maxsize=32)
def _filters_on(sample_rate: int, n_fft: int, device: torch.device) -> Tensor:
    """Weights [band, freq] float32 on the grid of an n_fft-point real FFT: between two centres one band's falls as
    cos^2 of the logarithm of frequency and the next one's rises as sin^2."""
    freq = np.maximum(np.arange(n_fft // 2 + 1) * (sample_rate / n_fft), LOWEST_HZ)
    bands = len(octave_centres(sample_rate))
    place = np.minimum(np.log2(freq / LOWEST_HZ), bands - 1)            # in octaves: band k is at k
    apart = np.minimum(np.abs(place - np.arange(bands)[:, None]), 1)
    return torch.tensor(np.cos(0.5 * math.pi * apart) ** 2, dtype=torch.float32, device=device)


def join_bands(parts: list[Tensor], sample_rate: int) -> Tensor:
    """RIRs [..., tap] rendered for each band -> one, each filtered to its own band and added up."""
    taps = parts[0].shape[-1]
    n_fft = fast_length(taps + math.ceil(BAND_RINGING_S * sample_rate))
    filters = _filters_on(sample_rate, n_fft, parts[0].device)
    spectrum = sum(torch.fft.rfft(part, n_fft) * weight for part, weight in zip(parts, filters))
    return torch.fft.irfft(spectrum, n_fft)[..., :taps]
