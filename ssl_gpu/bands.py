"""Octave bands: sound that dies away faster in some, by the walls or by the air between them (ISO 9613-1).

Every arrival has a gain per band. The RIR of each band is rendered on its own, and zero-phase filters that add up to 1
join them, so that equal gains leave an RIR as it is. What an octave filter lets through of a slower neighbour outlasts
what is in the octave itself, so the slower of two bands gets less than its half of the way between their centres.
"""
from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ssl_gpu.convolve import fast_length
from ssl_gpu.runtime import constant

LOWEST_HZ = 125.0
CROSSFADE = 1 / 3     # octaves from one band to the next; 1/6 would ring twice as long and change T20 by 2 % at most
SHIFT = 0.3           # octaves towards the slower band, per doubling of its RT60 and at most, so as not to reach its
#                       centre; between octaves of RT60s 1:2:1:2 T20 is 10 % off either way, without it 60 % one way
BAND_RINGING_S = 0.1  # of padding: 4e-6 of the peak wraps round with RT60s 1:2, 1e-5 with 1:5; 6e-5 with 50 ms


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


def decay_rate(air_db: float, wall_ratio: Tensor | None, reach: Tensor) -> Tensor:
    """dB that the walls and the air of band_gain take in one RT60 of the scene: [batch]."""
    return air_db * reach + (60.0 if wall_ratio is None else 60 / wall_ratio)


@constant
def _octaves_on(sample_rate: int, n_fft: int, device: torch.device) -> Tensor:
    """Octaves above 125 Hz, where band k is at k, on the grid of an n_fft-point real FFT: [freq] float32."""
    freq = np.maximum(np.arange(n_fft // 2 + 1) * (sample_rate / n_fft), LOWEST_HZ)
    return torch.tensor(np.log2(freq / LOWEST_HZ), dtype=torch.float32, device=device)


def join_bands(parts: list[Tensor], rates: list[Tensor], sample_rate: int) -> Tensor:
    """RIRs [batch, mic, src, tap] rendered for each band -> one, that of each band about its centre.

    rates: decay_rate of each band, [batch]. The crossfades, sin^2 in the logarithm of frequency, never overlap: what is
    below one is the lower band's alone and what is above it the upper band's.
    """
    taps = parts[0].shape[-1]
    n_fft = fast_length(taps + math.ceil(BAND_RINGING_S * sample_rate))
    octave = _octaves_on(sample_rate, n_fft, parts[0].device)
    spectrum = torch.fft.rfft(parts[0], n_fft)
    for band in range(1, len(parts)):
        shift = SHIFT * torch.log2(rates[band - 1] / rates[band]).clamp(-1, 1).to(torch.float32)
        place = (octave - (band - 0.5 + shift)[:, None, None, None]) / CROSSFADE
        share = 0.5 + 0.5 * torch.sin(math.pi * place.clamp(-0.5, 0.5))
        spectrum = spectrum + share * (torch.fft.rfft(parts[band], n_fft) - spectrum)
    return torch.fft.irfft(spectrum, n_fft)[..., :taps]
