"""Which bins of a spectrogram hold direct sound: a small network that is told by the simulator while it learns.

A bin in which a talker's direct sound is louder than reverberation and noise has the phase of the talker's direction,
and most bins are not such ones. Localisers by masks estimate which are and weigh the phases by that (Wang, Zhang and
Wang 2019, "Robust speaker localization guided by deep learning-based time-frequency masking", IEEE/ACM TASLP 27(1)).
What a mask is to be, no recording tells; a simulator does, bin by bin: Simulator.render_direct.
"""
from __future__ import annotations

from itertools import cycle

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_gpu import products, runtime

DILATIONS = (1, 2, 4, 8)  # of the convolutions over frames, in turn: four reach 15 frames, 0.24 s, to either side
POWER = 4                 # of the share of direct sound: most bins are mostly something else, and weigh next to nothing
NEIGHBOURS = (3, 5)       # frames and bins over which the coherence of the microphones is measured
PER_BIN = 5               # numbers that the network is told of every bin
OF_FRAME = 2              # numbers that the convolutions over frames give every bin
NEAR_WIDTH = 8            # channels of the convolution over a bin and its neighbours
PACK = 8                  # bins of it that are one row where it is a product


class MaskNetwork(nn.Module):
    """Spectra of two microphones to logits of the POWER-th power of the direct sound's share of every bin.

    spectra [batch, mic=2, frame, freq] complex, of clips of one level, phat [batch, frame, freq] their normalised
    cross-spectrum -> logits [batch, frame, freq]. Every frame's bins are told together, so that harmonics and what a
    fricative sounds like can be learned, and convolutions over frames, `layers` of them, tell an onset from a decay;
    what these say of every bin is joined to what it and its neighbours were.
    """

    def __init__(self, num_bins: int, width: int, layers: int = len(DILATIONS)):
        super().__init__()
        self.first = nn.Linear(PER_BIN * num_bins, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.convs = nn.ModuleList(nn.Linear(3 * width, width) for _ in range(layers))
        self.said = nn.Linear(width, OF_FRAME * num_bins)
        self.near = nn.Conv2d(PER_BIN + OF_FRAME, NEAR_WIDTH, 3, padding=1)
        self.last = nn.Linear(NEAR_WIDTH, 1)

    def forward(self, spectra: Tensor, phat: Tensor) -> Tensor:
        bins = told(spectra, phat)
        x = self.first(bins.transpose(1, 2).flatten(2))                  # [batch, frame, width]
        for reach, norm, conv in zip(cycle(DILATIONS), self.norms, self.convs):
            x = x + F.gelu(conv(neighbours(norm(x), reach)))
        said = self.said(x).unflatten(-1, (OF_FRAME, -1)).transpose(1, 2)
        x = torch.cat((bins.to(said.dtype), said), 1)
        if torch.is_grad_enabled() and runtime.prefers_products(x.device):
            # Forward and back this took a quarter of a training step on an H200, much of it for the gradients of two
            # small weights: entry 54 of docs/performance.md. Under autocast its logits are float32, as the weight is.
            x = products.conv3x3(x, self.near.weight, self.near.bias, PACK).relu()
            logits = (x * self.last.weight.view(1, -1, 1, 1)).sum(1) + self.last.bias
        else:
            logits = self.last(self.near(x).relu().permute(0, 2, 3, 1)).squeeze(-1)
        return logits + said[:, 0]


def neighbours(x: Tensor, reach: int, dim: int = 1) -> Tensor:
    """What stands along dim (frames, where x is [batch, frame, width]) side by side with what is `reach` before and
    after, zeros beyond the ends: [batch, ..., width] -> [batch, ..., 3 width]. A product with these is a dilated
    convolution, of matrices on any device."""
    size = x.shape[dim]
    beside = F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (reach, reach))
    return torch.cat((beside.narrow(dim, 0, size), x, beside.narrow(dim, 2 * reach, size)), -1)


@torch.no_grad()
def told(spectra: Tensor, phat: Tensor) -> Tensor:
    """What MaskNetwork and patches.PatchNetwork are told of every bin, [batch, PER_BIN, frame, freq] float32: its
    level, in bels, less the mean of the clip, and less that of its frequency; the cosine and sine of the phase
    difference; and the coherence of the microphones around it, 1 where one wave is alone (symmetry.TOLD has what the
    mirror makes of each)."""
    first, second = spectra.unbind(1)
    cross = second * first.conj()
    level = torch.log10(cross.abs() + 1e-4)                             # as features.relative_levels
    real, imag, *powers = map(around, (cross.real, cross.imag, *(x.real.square() + x.imag.square()
                                                                 for x in (first, second))))
    coherence = ((real.square() + imag.square()) / (powers[0] * powers[1]).clamp(min=1e-14)).sqrt()
    return torch.stack((level - level.mean((1, 2), keepdim=True), level - level.mean(1, keepdim=True),
                        phat.real, phat.imag, coherence), 1)


def around(x: Tensor) -> Tensor:
    """Of [batch, frame, freq] the sum over every bin's NEIGHBOURS, as many as there are. avg_pool2d takes ten times as
    long on a CPU."""
    for dim, size in zip((1, 2), NEIGHBOURS):
        total = x.clone()
        for shift in range(1, min(size // 2, x.shape[dim] - 1) + 1):
            length = x.shape[dim] - shift
            total.narrow(dim, shift, length).add_(x.narrow(dim, 0, length))
            total.narrow(dim, 0, length).add_(x.narrow(dim, shift, length))
        x = total
    return x


def true_mask(spectra: Tensor, direct: Tensor) -> Tensor:
    """What the logits of MaskNetwork are taught: the POWER-th power of the share of direct sound, in 0..1, [batch,
    frame, freq]. spectra, direct [batch, mic, frame, freq] complex: of what the microphones hear, and of the direct
    sound in it."""
    powers = (x.real.square() + x.imag.square() for x in (direct, spectra - direct))
    direct, rest = (power.mean(1) for power in powers)
    return (direct / (direct + rest).clamp(min=1e-20)) ** POWER


def mask_loss(logits: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy of logits against a mask, both [batch, frame, freq], in nats a bin, a scalar; clips weigh `weight`
    [batch]."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), mask, reduction="none").mean((1, 2))
    return (loss * weight).sum() / weight.sum().clamp(min=1)
