"""Convolutions as products of matrices, for the matrix units of a GPU; the same numbers but for roundings.

For few channels, or few tokens, cuDNN has no kernel that fills them: of 226 ms of a training step of the original
(1024 clips of 3 s, H200, bfloat16) its convolutions of 2 to 8 channels took 75 and its depthwise ones 45. Here the
windows are copied side by side, which a compiler does while it computes them, and the rest is a product.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

ALIGN = 8  # values of bfloat16 in the 16 bytes in which matrix units want rows to begin
SMALL_WEIGHT = 2**14  # entries: at most 4 tiles of 64 x 64


def banded(filters: Tensor, rows: int, columns: int, start: int) -> Tensor:
    """Toeplitz matrices of filters [..., tap]: [..., row, column], tap column - row - start, 0 where there is none."""
    # Rows of a matrix that has the same row throughout, cut one entry shorter, each begin one entry earlier. Unlike an
    # unfolded view, whose gradient compilers add up by atomic operations, this has a plain sum over rows as gradient.
    length = rows + columns
    line = F.pad(filters, (rows - 1 + start, columns + 1 - start - filters.shape[-1]))
    lines = line[..., None, :].expand(*line.shape[:-1], rows, length).flatten(-2)
    return lines[..., rows - 1:rows * length - 1].unflatten(-1, (rows, length - 1))[..., :columns]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x [batch, ..., in], weight [out, in] -> [batch, ..., out]: F.linear, the weight's gradient summed clip by clip.

    The gradient of a small weight is one or two tiles, each a sum over all rows of the batch, and keeps as many of
    an H200's 132 multiprocessors busy unless the library splits that sum. cuDNN's convolutions did not: 2.9 ms for
    24 x 216 entries and some 400,000 rows. By clip it is split from the start, and the parts are added in float32.
    A large weight has tiles enough, and copies for every clip would be large too.
    """
    if weight.numel() > SMALL_WEIGHT:
        return F.linear(x, weight, bias)
    out = torch.bmm(x.flatten(1, -2), weight.T.expand(len(x), -1, -1))
    return (out + bias.to(out.dtype)).unflatten(1, x.shape[1:-1])


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, before: int) -> Tensor:
    """One filter per channel over few tokens, zeros around them: x [batch, token, channel], weight [channel, 1, tap]
    -> [batch, token, channel]; `before` taps come before the token itself.

    One matrix [token, token] per channel, times the channel's tokens of the whole batch. So the work is tokens / taps
    times that of a convolution, and the weight's gradient sums over the batch in matrix units.
    """
    tokens = x.shape[1]
    filler = -tokens % ALIGN
    matrix = banded(weight.squeeze(1), tokens, tokens + filler, -before)
    x = F.pad(x.permute(2, 1, 0), (0, 0, 0, filler))                     # [channel, token, batch]
    out = torch.bmm(matrix, x).permute(2, 1, 0)
    return out + bias.to(out.dtype)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, pack: int) -> Tensor:
    """3 x 3 convolution, padded by 1: x [batch, in, height, width], weight [out, in, 3, 3] -> [batch, out, height,
    width], channels last in memory, with gaps between lines where pack does not divide width. `pack` >= 2 neighbours in
    width are one row; what is missing to a whole pack, or to rows that ALIGN divides, is filled with zeros.

    A row is a pack with its neighbours in the lines before, at and after it, its product the pack's outputs of all
    channels, by a banded matrix. A window per output would be copied 9-fold, this is 3.75-fold with a pack of 8.
    """
    channels, height, width = x.shape[1:]
    reach, filler = 1, 0                                                # neighbours on either side, 1 of them used
    if 3 * (pack + 2) * channels % ALIGN:
        if 3 * (pack + 4) * channels % ALIGN == 0:
            reach = 2
        else:
            filler = -channels % (ALIGN // math.gcd(3 * (pack + 2), ALIGN))
    if width % pack or filler:                                          # or it would be copied for nothing
        x = F.pad(x, (0, -width % pack, 0, 0, 0, filler))
        weight = F.pad(weight, (0, 0, 0, 0, 0, filler))
        channels += filler
    x = rearrange(x, "b c t (f p) -> b t f (p c)", p=pack)
    left = F.pad(x[..., -reach * channels:], (0, 0, 1, -1))              # the end of the pack before
    right = F.pad(x[..., :reach * channels], (0, 0, -1, 1))
    x = F.pad(torch.cat((left, x, right), -1), (0, 0, 0, 0, 1, 1))
    x = torch.cat([x[:, line:line + height] for line in range(3)], -1)
    weight = rearrange(banded(weight, pack, pack + 2 * reach, reach - 1), "o c t p s -> (p o) (t s c)")
    out = linear(x, weight, bias.repeat(pack))
    return rearrange(out, "b t f (p o) -> b o t (f p)", p=pack)[..., :width]


def strided3x3(x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, int]) -> Tensor:
    """3 x 3 convolution, padded by 1: x [batch, in, height, width], weight [out, in, 3, 3] -> [batch, out, ceil(height
    / stride), ceil(width / stride)], channels last in memory."""
    (height, width), (down, right) = x.shape[2:], stride
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    # In two steps: what torch compiles computes up to 8 parts where they go, and copies more.
    x = torch.cat([x[:, :, place:place + width:right] for place in range(3)], -1)
    x = torch.cat([x[:, line:line + height:down] for line in range(3)], -1)
    return linear(x, rearrange(weight, "o c i j -> o (i j c)"), bias).permute(0, 3, 1, 2)


def patches(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolution whose stride is its kernel: x [batch, in, height, width], weight [out, in, i, j] -> [batch, out,
    height // i, width // j], channels last in memory; what fills no patch is dropped."""
    down, right = weight.shape[2:]
    height, width = (size // step * step for size, step in zip(x.shape[2:], (down, right)))
    x = rearrange(x[:, :, :height, :width], "b c (t i) (f j) -> b t f (i j c)", i=down, j=right)
    return linear(x, rearrange(weight, "o c i j -> o (i j c)"), bias).permute(0, 3, 1, 2)
