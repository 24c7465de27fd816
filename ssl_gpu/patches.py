"""Which bins of a spectrogram hold direct sound, by a network that keeps every part of it apart until the end.

masks.MaskNetwork makes one vector of all bins of a frame, and what that says of a bin is all the bin is told. Here a
spectrogram is cut into patches of FRAMES x BINS bins, each with channels of its own throughout: one block looks at a
patch beside its neighbours in time and in frequency, at all frequencies of its frame through a narrow passage, and at
its own frequency in the whole clip. That narrow-band and full-band layers take turns is the idea of FN-SSL (Wang, Yang
and Li 2023, "FN-SSL: full-band and narrow-band fusion for sound source localization", Interspeech) and SpatialNet (Quan
and Li 2024, "SpatialNet: extensively learning spatial information for multichannel joint speech separation, denoising
and dereverberation", IEEE/ACM TASLP 32), which have recurrent and attention layers where here are convolutions and
attentive pooling (means by learned weights, as of Okabe, Koshinaka and Shinoda 2018, "Attentive statistics pooling for
deep speaker embedding", Interspeech).
"""
from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssl_gpu import products, runtime
from ssl_gpu.masks import DILATIONS, PER_BIN, neighbours, told

FRAMES, BINS = 2, 2  # of a patch
PASSAGE = 4          # channels that a patch sends to the vector of its frame, and gets back
HEADS = 8            # weightings of the frames of a frequency


class PatchNetwork(nn.Module):
    """As masks.MaskNetwork, spectra [batch, mic=2, frame, freq] complex and phat [batch, frame, freq] to logits of
    masks, [batch, mask, frame, freq], and beside these what it made of all bins of every FRAMES frames, [batch,
    ceil(frame / FRAMES), frame_width].

    num_bins: freq of the spectra. width: channels of a patch. blocks: how many, which look 1, 2, 4 and 8 patches before
    and behind, in turn. frame_width: of the vector of a frame. num_masks: the first is for the truth to teach, the
    others are what whoever trains the network makes of them.
    Raises ValueError for a width that HEADS does not divide.
    """

    def __init__(self, num_bins: int, width: int, blocks: int, frame_width: int, num_masks: int = 1):
        super().__init__()
        if width % HEADS:
            raise ValueError(f"width must be divisible by {HEADS}, got {width}")
        num_freq, self.num_masks = -(-num_bins // BINS), num_masks
        self.first = nn.Linear(PER_BIN * FRAMES * BINS, width)
        self.place = nn.Parameter(0.02 * torch.randn(num_freq, width))   # what a phase means, frequency tells
        self.blocks = nn.ModuleList(Block(num_freq, width, frame_width, DILATIONS[i % len(DILATIONS)])
                                    for i in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Linear(width, num_masks * FRAMES * BINS)

    def forward(self, spectra: Tensor, phat: Tensor) -> tuple[Tensor, Tensor]:
        x, frames = linear(self.first, cut(told(spectra, phat))), None
        x = x + self.place.to(x.dtype)
        for block in self.blocks:
            x, frames = block(x, frames)
        logits = linear(self.last, self.norm(x)).unflatten(-1, (self.num_masks, FRAMES, BINS))
        logits = logits.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
        return logits[..., :phat.shape[1], :phat.shape[2]].to(phat.real.dtype), frames  # not bfloat16, by autocast


class Block(nn.Module):
    """Patches [batch, time, freq, width], and the vectors of their frames [batch, time, frame_width] or None at first,
    to both as they are after it.

    reach: how far in time it looks to either side, in patches.
    """

    def __init__(self, num_freq: int, width: int, frame_width: int, reach: int):
        super().__init__()
        self.reach = reach
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.in_time, self.in_freq = nn.Linear(3 * width, width), nn.Linear(3 * width, width)
        self.squeeze, self.to_frame = nn.Linear(width, PASSAGE), nn.Linear(PASSAGE * num_freq, frame_width)
        self.frame_norms = nn.ModuleList(nn.LayerNorm(frame_width) for _ in range(2))
        self.frame = nn.Linear(3 * frame_width, frame_width)
        self.from_frame, self.widen = nn.Linear(frame_width, PASSAGE * num_freq), nn.Linear(PASSAGE, width)
        self.weigh, self.clip = nn.Linear(width, HEADS), nn.Linear(width, width)

    def forward(self, x: Tensor, frames: Tensor | None) -> tuple[Tensor, Tensor]:
        x = x + F.gelu(beside(self.in_time, self.norms[0](x), 1, self.reach))
        x = x + F.gelu(beside(self.in_freq, self.norms[1](x), 2, 1))
        patch = self.norms[2](x)
        heard = self.to_frame(linear(self.squeeze, patch).flatten(2))    # [batch, time, frame_width]
        frames = heard if frames is None else frames + heard
        frames = frames + F.gelu(self.frame(neighbours(self.frame_norms[0](frames), self.reach)))
        back = self.from_frame(self.frame_norms[1](frames)).unflatten(-1, (-1, PASSAGE))
        x = x + linear(self.widen, F.gelu(back)) + linear(self.clip, self.of_clip(patch))
        return x, frames

    def of_clip(self, patch: Tensor) -> Tensor:
        """Attentive pooling: means of patch [batch, time, freq, width] over time, at every frequency, HEADS equal parts
        of the channels each by weights of its own, [batch, 1, freq, width]."""
        weight = linear(self.weigh, patch).softmax(1)                    # over time: [batch, time, freq, HEADS]
        parts = patch.unflatten(-1, (HEADS, -1))
        if runtime.prefers_products(patch.device):                       # what is compiled makes one pass of it
            return (parts * weight[..., None]).sum(1, keepdim=True).flatten(-2)
        return torch.einsum("btfh,btfhc->bfhc", weight.to(parts.dtype), parts).flatten(-2)[:, None]


def cut(bins: Tensor) -> Tensor:
    """What is told of bins, [batch, number, frame, freq], to patches [batch, time, freq, FRAMES * BINS * number]; what
    is missing to the last is zero."""
    frames, freqs = bins.shape[2:]
    bins = F.pad(bins, (0, -freqs % BINS, 0, -frames % FRAMES))
    bins = bins.unflatten(2, (-1, FRAMES)).unflatten(4, (-1, BINS))      # b c time FRAMES freq BINS
    return bins.permute(0, 2, 4, 3, 5, 1).flatten(3)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """layer(x) of [batch, ..., channel], which a GPU in training computes clip by clip (products.linear)."""
    if torch.is_grad_enabled() and runtime.prefers_products(x.device):
        return products.linear(x, layer.weight, layer.bias)
    return layer(x)


def beside(layer: nn.Linear, x: Tensor, dim: int, reach: int) -> Tensor:
    """A convolution of three taps, `reach` apart, along dim 1 or 2 of x [batch, time, freq, channel], zeros beyond the
    ends: layer of every patch between its neighbours, [batch, time, freq, out]."""
    if runtime.prefers_products(x.device):
        return linear(layer, neighbours(x, reach, dim))
    # On a CPU more than half of the time of the network went into putting neighbours side by side.
    weight = layer.weight.unflatten(1, (3, -1)).transpose(1, 2)          # [out, channel, tap]
    weight, step = (weight[..., None], (reach, 1)) if dim == 1 else (weight[:, :, None], (1, reach))
    padding = (reach, 0) if dim == 1 else (0, reach)
    return F.conv2d(x.permute(0, 3, 1, 2), weight, layer.bias, padding=padding, dilation=step).permute(0, 2, 3, 1)
