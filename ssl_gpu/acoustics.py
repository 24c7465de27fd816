"""Acoustic constants, and what a requested reverberation time means to FRA-RIR."""
from __future__ import annotations

import torch
from torch import Tensor

SPEED_OF_SOUND = 340.0  # m/s, the reference's value; 343 would move every arrival by 0.9 %
DISTANCE_EPSILON = 1e-3  # m^2, added under the root of every distance by the reference: 0.2 m reads 0.2025 m
SABINE = 0.16  # s/m, the reference's rounding of 24 ln(10) / c

LEAST_COEFFICIENT = 1e-8  # the least but 0 that float64 leaves of sqrt(1 - alpha^2)


def distance(offset: Tensor) -> Tensor:
    """Offset vectors [..., 3] m -> distance [...] m as the reference measures it, sqrt(|offset|^2 + 1e-3)."""
    x, y, z = offset.unbind(-1)
    return torch.sqrt(x * x + y * y + z * z + DISTANCE_EPSILON)


def reflection_coefficient(room_dim: Tensor, rt60: Tensor) -> Tensor:
    """Amplitude kept at a reflection, sqrt(1 - alpha^2), with alpha = 1 - exp(-0.16 (V/S) / RT60).

    room_dim [batch, 3] m, rt60 [batch] s -> [batch], in their dtype.
    This is the reference's law (arXiv 2208.04101, code); Eyring's would be sqrt(1 - alpha). The reflection count is
    calibrated to -60 dB at RT60 whatever the coefficient, so it matters only through the perturbation. At least
    LEAST_COEFFICIENT: in a hall of 300 m with an RT60 of 0.15 s alpha rounds to 1, and the logarithm of 0 is no number.
    """
    volume_over_surface = 0.5 / room_dim.reciprocal().sum(-1)
    alpha = 1 - torch.exp(-SABINE * volume_over_surface / rt60)
    return torch.sqrt(1 - alpha * alpha).clamp(min=LEAST_COEFFICIENT)
