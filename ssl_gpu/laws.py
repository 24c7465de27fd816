"""What the reference of FRA-RIR gets wrong, as choices: its own laws are the defaults, each can be put right alone.

What every choice changes, before and after, is measured in docs/fidelity.md.
"""
from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

# Direct sound over the reverberation of decay=measured, in energy, at most. T20 is taken from 5 to 25 dB below what is
# left at its peak, and the more of that it takes itself, the more its own flank bends the line. Errors of T20 in the
# six rooms of ssl_gpu.choices, the worst median and ninth tenth: 3.8, 7.6 % with 10 dB, 4.1, 9.3 with 12, 6.0, 13.9
# with 14.
MAX_DIRECT_DB = 10.0


class ImageDirections(Enum):
    """Where images lie as seen from the microphones: above, with a polar angle uniform in +-90 degrees and so dense at
    the zenith, which leaves the late sound of a horizontal pair a coherence of J0(k d / 2)^2; or all round, which
    gives any pair that of a diffuse field, sin(k d) / (k d)."""

    UPPER = "upper"
    SPHERE = "sphere"


class SrcDirections(Enum):
    """Cosine at which images leave a source with a pattern: cos A cos B of two uniform angles, whose mean square is
    1/4; or uniform in +-1, that of a direction uniform over the sphere, 1/3."""

    PRODUCT = "product"
    SPHERE = "sphere"


class ImageRange(Enum):
    """Distance of the farthest image: 340 m/s * RT60 less the distance of the source, after which an RIR is silent; or
    all of it. What would reach a farther microphone after the end of the RIR is then left out, not put into its last
    slot."""

    REFERENCE = "reference"
    FULL = "full"


class Decay(Enum):
    """What RT60 is: nominal, a number that the measured T20 exceeds 1.8 to 2.4 times; or measured, the T20 of the RIRs.
    See diffuse_amplitude."""

    NOMINAL = "nominal"
    MEASURED = "measured"


def diffuse_amplitude(volume: Tensor, spacing: Tensor, travelled: Tensor) -> Tensor:
    """Root mean square amplitude [...] float32 of images whose sound decays by exactly 60 dB in one RT60.

    volume: of the room, m^3; spacing: mean step in distance from one image to the next, m; travelled: distance of the
    image over R = 340 m/s * RT60.

    The reference puts 2 I (x - d) / span^2 images per m at a distance of x m, each with an energy of E[c^2n] / x^2. It
    is 60 dB down at x = R by both factors together, but the growing number of images cancels one of the two x: what is
    left falls like 1 / x at first, then by 60 dB - 20 log10(R / 1 m) in an RT60, half of what was asked for.
    Here I images are uniform in distance, I / span per m. A shoebox has one image per V, so 4 pi x^2 / V per m, with an
    energy of 1 / x^2 less the losses at the walls: 4 pi / V 10^(-6 x / R) per m. An image gets this times the spacing
    span / I. The mean energy then decays exponentially from the direct sound on, so that T20, T30 and, unless the
    direct path dominates, EDT are RT60, and its level is that of a diffuse field, whatever the number of images.
    The RIR may end at RT60: d m of it are before the direct sound, so that it is cut 60 (1 - d / R) dB down
    (60 (1 - 2 d / R) with image_range=reference, whose images end d m earlier), and even 50 dB bend the decay by only
    0.014 dB where it is at -25 dB. A direct sound that leaves too little of T20 to all this is dealt with in
    reverberation_gain. Distances are not spread more evenly than at random: pulses of one sign in equal
    strata would lack energy below their rate.
    """
    level = (4 * math.pi * spacing / volume).sqrt().to(torch.float32)
    return level * torch.exp2(travelled.to(torch.float32) * (-3 * math.log2(10)))


def reverberation_gain(direct: Tensor, images: Tensor) -> Tensor:
    """Factor [...] of all images that leaves the direct sound at most 10 dB above them, 1 where it is not above.

    direct [...]: its amplitude at the source's nearest microphone; images [..., image]: those of the images there; both
    before any polar pattern, which would let a microphone that hears little speak for all. In a diffuse field the
    direct sound is that strong only nearer to the source than 0.3 critical distances (0.018 m sqrt(volume / RT60),
    volume in m^3 and RT60 in s), where ISO 3382 takes no T20: in 7 of 2,000 rooms of the original law.
    """
    needed = direct.square() * 10 ** (-0.1 * MAX_DIRECT_DB)
    return (needed / images.square().sum(-1)).clamp(min=1).sqrt()


def perturbation_gain(reflections: Tensor, low: Tensor, high: Tensor, log2_coefficient: Tensor) -> Tensor:
    """c^max(n, 1) [...] for a reflection count n = reflections that was drawn uniformly in low..high, divided by its
    root mean square over that law: the randomness of the count without its mean, which would change the decay.

    With g = -2 ln c and f = max(low, 1), the least max(n, 1) there can be,
    E[c^2max(n, 1)] / c^2f = (max(min(high, 1) - low, 0) + (1 - exp(-g max(high - f, 0))) / g) / (high - low).
    """
    rate = -2 * math.log(2) * log2_coefficient
    least, width = low.clamp(min=1), high - low
    above = -torch.expm1(-rate * (high - least).clamp(min=0)) / rate
    square = ((high.clamp(max=1) - low).clamp(min=0) + above) / width.clamp(min=1e-2)
    # A narrow law is taken at its middle, 1e-5 off at most: the differences above have lost too many digits there.
    middle = (0.5 * (low + high)).clamp(min=1)
    square = torch.where(width > 1e-2, square, torch.exp(-rate * (middle - least)))
    return torch.exp(-0.5 * rate * (reflections.clamp(min=1) - least)) * square.rsqrt()
