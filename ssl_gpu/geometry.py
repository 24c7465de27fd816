"""The angle convention, and the little geometry that everything else is built on.

Azimuth runs from +x, counter-clockwise, in the horizontal plane; elevation from the horizontal plane, up positive.
The cone angle of a source is the angle between its direction and the axis of the array (first to last microphone):
0 beyond the last microphone, pi beyond the first. cos(cone) = cos(azimuth) cos(elevation) for an array along +x.
An array that is no line has no such axis: the one above then depends on the order of its microphones.
All angles are in radians.
"""
from __future__ import annotations

import math

import torch
from torch import Tensor


def wrap_angle(angle: Tensor) -> Tensor:
    """Angle [...] rad, any value -> the same angle in [-pi, pi), or pi itself by rounding."""
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


def azimuth(vector: Tensor) -> Tensor:
    """Vector [..., 3] -> azimuth [...] rad in [-pi, pi]; 0 for a vertical vector."""
    return torch.atan2(vector[..., 1], vector[..., 0])


def elevation(vector: Tensor) -> Tensor:
    """Vector [..., 3] -> elevation [...] rad in [-pi/2, pi/2]."""
    return torch.atan2(vector[..., 2], torch.hypot(vector[..., 0], vector[..., 1]))


def angle_between(first: Tensor, second: Tensor) -> Tensor:
    """Angle [...] rad in [0, pi] between two vectors [..., 3] of any length.

    atan2 of cross and dot product: arccos of the normalised dot product loses half the digits near 0 and pi, which
    is where two microphones need them.
    """
    cross = torch.linalg.vector_norm(torch.linalg.cross(*torch.broadcast_tensors(first, second)), dim=-1)
    return torch.atan2(cross, (first * second).sum(-1))


def linear_array(num_mics: int, spacing: float) -> Tensor:
    """Microphones on the x axis, `spacing` m apart and centred on the origin: [mic, 3] m, float64."""
    position = torch.zeros(num_mics, 3, dtype=torch.float64)
    position[:, 0] = (torch.arange(num_mics, dtype=torch.float64) - (num_mics - 1) / 2) * spacing
    return position


def rotate_z(points: Tensor, angle: Tensor) -> Tensor:
    """Turn points [batch, point, 3] counter-clockwise about the vertical by angle [batch] rad."""
    cos, sin = torch.cos(angle)[:, None], torch.sin(angle)[:, None]
    x, y, z = points.unbind(-1)
    return torch.stack((cos * x - sin * y, sin * x + cos * y, z.expand_as(cos * x)), -1)


def array_axis(mic_pos: Tensor) -> Tensor:
    """mic_pos [batch, mic, 3] m -> vector [batch, 3] from the first to the last microphone, not normalised.

    Raises ValueError for a single microphone, which has no axis.
    """
    if mic_pos.shape[-2] < 2:
        raise ValueError(f"mic_pos must hold at least 2 microphones to define an array axis, got {mic_pos.shape[-2]}")
    return mic_pos[..., -1, :] - mic_pos[..., 0, :]
