"""Polar patterns of sources and microphones, and the direction they look in."""
from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor


class Pattern(Enum):
    """First-order polar patterns of the reference, w + (1 - w) cos(angle), and the hard half space."""

    OMNI = "omni"
    SUB_CARDIOID = "sub_cardioid"
    CARDIOID = "cardioid"
    HYPER_CARDIOID = "hyper_cardioid"
    BIDIRECTIONAL = "bidirectional"
    HALF_OMNI = "half_omni"


OMNI_SHARE = {
    Pattern.SUB_CARDIOID: 0.75,
    Pattern.CARDIOID: 0.5,
    Pattern.HYPER_CARDIOID: 0.25,
    Pattern.BIDIRECTIONAL: 0.0,
}


def pattern_gain(pattern: Pattern, cosine: Tensor) -> Tensor:
    """Gain [...] at the cosine [...] of the angle to the look direction; the sign of a rear lobe is kept."""
    if pattern is Pattern.OMNI:
        return torch.ones_like(cosine)
    if pattern is Pattern.HALF_OMNI:
        return (cosine > 0).to(cosine.dtype)
    share = OMNI_SHARE[pattern]
    return share + (1 - share) * cosine


class LookVector(Enum):
    """Orientation to direction: as the reference has it, or as it is meant. See look_vector."""

    REFERENCE = "reference"
    EXACT = "exact"


def look_vector(orientation: Tensor, law: LookVector = LookVector.REFERENCE) -> Tensor:
    """Orientation [..., 2] rad, (azimuth, polar angle from +z) -> unit look vector [..., 3].

    The reference writes cos(azimuth sin(polar)) where cos(azimuth) sin(polar) is meant, and normalises: exact only
    at polar = pi/2, 15 degrees off on average, and (0, 0), "up", looks along (1, 0, 1).
    """
    azimuth, polar = orientation.unbind(-1)
    sin, cos = torch.sin(polar), torch.cos(polar)
    if law is LookVector.EXACT:
        return torch.stack((torch.cos(azimuth) * sin, torch.sin(azimuth) * sin, cos), -1)
    bent = azimuth * sin
    vector = torch.stack((torch.cos(bent), torch.sin(bent), cos), -1)
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
