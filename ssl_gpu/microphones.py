"""Microphones that are not quite alike: a gain and a smooth curve of phase over frequency, each microphone's own.

The phase is a sum of sines, phase(f) = sum_k c_k sin(2 pi k f / sample_rate), k = 1..PHASE_TERMS. It is 0 at 0 Hz and
at half the sample rate, so a real signal stays real. exp(j phase) has a short impulse response: by the expansion of
Jacobi and Anger one term is a train of taps J_n(c_k), k samples apart, before the main tap and after it. Of the worst
of 20,000 with mixture.mic_phase_deg = 5 (2.5 each), 2.5e-4 of the RMS lies further than 8 samples from the main tap,
1.5e-6 further than 16 and 1e-8 further than 24.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssl_gpu import runtime

# At 16 kHz ripples from 2 kHz (the last term, which is at its full phase at 500 Hz) to 16 kHz, a fractional delay.
PHASE_TERMS = 8
PHASE_GRID = 256  # frequencies between 0 and half the sample rate that the largest phase of a curve is looked for at
REACH = 128       # samples beyond which there is nothing left, before and after, even of 90 degrees


@dataclass(frozen=True, eq=False)
class Microphones:
    """gain [batch, mic] (factor); phase [batch, mic, term] rad, the c_k of above."""

    gain: Tensor
    phase: Tensor

    def __getitem__(self, index: slice) -> "Microphones":
        return Microphones(self.gain[index], self.phase[index])

    def to(self, device: torch.device | str) -> "Microphones":
        """The same microphones on another device."""
        return Microphones(self.gain.to(device), self.phase.to(device))

    def response(self, n_fft: int) -> Tensor:
        """What each does to the spectrum of n_fft real samples: [batch, mic, n_fft // 2 + 1] complex."""
        omega = torch.arange(n_fft // 2 + 1, dtype=self.phase.dtype, device=self.phase.device) * (2 * math.pi / n_fft)
        phase = runtime.exact_product(self.phase, _sines(omega))        # bfloat16 would be off by up to half a degree
        return torch.polar(self.gain[..., None].expand_as(phase), phase)


def _sines(omega: Tensor) -> Tensor:
    """omega [freq] rad per sample -> sin(k omega) [term, freq]."""
    return torch.sin(torch.arange(1, PHASE_TERMS + 1, dtype=omega.dtype, device=omega.device)[:, None] * omega)


def draw_microphones(gain_db: float, phase_deg: float, batch: int, num_mics: int, *,
                     generator: torch.Generator) -> Microphones:
    """Microphones independent of each other, on the generator's device.

    Each one's gain is uniform within +-gain_db, so that two are up to 2 gain_db apart. The c_k of its phase are
    uniform, scaled to a largest phase over frequency that is uniform in 0..phase_deg / 2: no two microphones are ever
    further apart than phase_deg, and typically by a fifth of it: for 5, 1.0 degree (RMS) from 500 Hz up, 0.5 at 200 Hz.
    """
    device = generator.device
    level = gain_db * (2 * torch.rand((batch, num_mics), generator=generator, dtype=torch.float32, device=device) - 1)
    curve = 2 * torch.rand((batch, num_mics, PHASE_TERMS), generator=generator, dtype=torch.float32, device=device) - 1
    largest = torch.rand((batch, num_mics, 1), generator=generator, dtype=torch.float32, device=device)
    largest = largest * math.radians(phase_deg / 2)
    omega = torch.arange(PHASE_GRID + 1, dtype=curve.dtype, device=device) * (math.pi / PHASE_GRID)
    # Between the points of the grid a sum of sines up to k is at most 1 / cos(k step / 2) times higher: 0.12 %.
    curves = runtime.exact_product(curve, _sines(omega))
    peak = curves.abs().amax(-1, keepdim=True) / math.cos(PHASE_TERMS * math.pi / PHASE_GRID / 2)
    return Microphones(10 ** (level / 20), curve * (largest / peak.clamp(min=1e-6)))
