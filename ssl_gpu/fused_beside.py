"""Kernels for a GPU, in Triton: layer norm, a convolution of three taps, GELU and what it is added to, in one pass.

Importing this needs Triton. The sums are those of patches.Block, which is their reference: tests/test_fused_beside.py
compares them in Triton's interpreter. A tensor of the patches of 128 clips is 199 MB in bfloat16, and a compiler that
makes one kernel of what lies between two products of matrices wrote and read it some forty times for one such branch
and its gradient. Here nothing is kept but what goes in and comes out, the rest is computed again: nine times.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ssl_gpu import runtime

ROWS = 64             # patches to a program, or to a turn of it
PROGRAMS = 132 * 2    # that share all patches where they add up gradients of parameters, each by itself
# Loads of the next turn are not begun ahead, for which Triton would set 106 and 131 kB of shared memory aside and leave
# out a fence (fused_pooling._shared).
HOW = dict(num_warps=4, num_stages=1)


def fits(width: int) -> bool:
    """Whether there are kernels for so many channels: products want 16 at least, registers 128 at most."""
    return 16 <= width <= 128 and width & (width - 1) == 0


@triton.jit
def _at(row, channel, width: tl.constexpr):
    """Where rows of a tensor [row, width] lie."""
    return row.to(tl.int64)[:, None] * width + channel[None, :]


@triton.jit
def _load(tensor, row, valid, channel, width: tl.constexpr):
    """Rows of tensor [row, width], zero where not valid, float32."""
    return tl.load(tensor + _at(row, channel, width), mask=valid[:, None], other=0.0).to(tl.float32)


@triton.jit
def standard(tile, width: tl.constexpr):
    """Rows with mean 0 and variance 1, and what they were divided by, inverted."""
    tile = tile - (tl.sum(tile, 1) / width)[:, None]
    rate = 1.0 / tl.sqrt(tl.sum(tile * tile, 1) / width + 1e-5)
    return tile * rate[:, None], rate


@triton.jit
def _tap(x, row, place, inside, offset, line, length, gain, shift, channel, width: tl.constexpr):
    """Layer norm of the patches `offset` places further, zero beyond the ends, in the precision of x."""
    there = place + offset
    valid = inside & (there >= 0) & (there < length)
    tile, _ = standard(_load(x, row + offset * line, valid, channel, width), width)
    tile = tile * gain[None, :] + shift[None, :]
    return tl.where(valid[:, None], tile, 0.0).to(x.dtype.element_ty)


@triton.jit
def _weight(weight, tap: tl.constexpr, channel, width: tl.constexpr):
    """[out, in] of a tap."""
    return tl.load(weight + channel[:, None] * (3 * width) + tap * width + channel[None, :])


@triton.jit
def beside_program(out, x, gain, shift, weight, bias, rows, line, length, reach, width: tl.constexpr,
                   block: tl.constexpr):
    """out [row, width] = x + gelu(convolution of layer norm of x) of `block` rows; a neighbour is reach * line rows
    away, and a row's place among `length` is row // line % length."""
    channel = tl.arange(0, width)
    scale, offset, add = tl.load(gain + channel), tl.load(shift + channel), tl.load(bias + channel)
    row = tl.program_id(0) * block + tl.arange(0, block)
    inside = row < rows
    place = row // line % length
    z = tl.full((block, width), 0.0, tl.float32) + add[None, :]
    for tap in tl.static_range(3):
        near = _tap(x, row, place, inside, (tap - 1) * reach, line, length, scale, offset, channel, width)
        z = tl.dot(near, tl.trans(_weight(weight, tap, channel, width)), z)
    z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    z += _load(x, row, inside, channel, width)
    tl.store(out + _at(row, channel, width), z.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def of_product_program(grad_z, grad_weight, grad_bias, x, grad, gain, shift, weight, bias, rows, line, length, reach,
                       turns: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """From grad, of beside_program's out, that of what GELU was given, grad_z [row, width], and this program's part of
    those of weight, grad_weight [program, tap, out, in], and bias, grad_bias [program, out]."""
    channel = tl.arange(0, width)
    scale, offset, add = tl.load(gain + channel), tl.load(shift + channel), tl.load(bias + channel)
    before = tl.full((width, width), 0.0, tl.float32)
    middle = tl.full((width, width), 0.0, tl.float32)
    after = tl.full((width, width), 0.0, tl.float32)
    of_bias = tl.full((width,), 0.0, tl.float32)
    for turn in range(turns):
        row = (tl.program_id(0) + turn * tl.num_programs(0)) * block + tl.arange(0, block)
        inside = row < rows
        place = row // line % length
        first = _tap(x, row, place, inside, -reach, line, length, scale, offset, channel, width)
        second = _tap(x, row, place, inside, 0, line, length, scale, offset, channel, width)
        third = _tap(x, row, place, inside, reach, line, length, scale, offset, channel, width)
        z = tl.full((block, width), 0.0, tl.float32) + add[None, :]
        z = tl.dot(first, tl.trans(_weight(weight, 0, channel, width)), z)
        z = tl.dot(second, tl.trans(_weight(weight, 1, channel, width)), z)
        z = tl.dot(third, tl.trans(_weight(weight, 2, channel, width)), z)
        slope = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        slope = slope * _load(grad, row, inside, channel, width)
        of_bias += tl.sum(slope, 0)
        kept = slope.to(grad_z.dtype.element_ty)
        tl.store(grad_z + _at(row, channel, width), kept, mask=inside[:, None])
        turned = tl.trans(kept)
        before = tl.dot(turned, first, before)
        middle = tl.dot(turned, second, middle)
        after = tl.dot(turned, third, after)
    at = grad_weight + tl.program_id(0) * 3 * width * width + channel[:, None] * width + channel[None, :]
    tl.store(at, before)
    tl.store(at + width * width, middle)
    tl.store(at + 2 * width * width, after)
    tl.store(grad_bias + tl.program_id(0) * width + channel, of_bias)


@triton.jit
def of_norm_program(grad_x, grad_gain, grad_shift, x, grad, grad_z, gain, weight, rows, line, length, reach,
                    turns: tl.constexpr, width: tl.constexpr, block: tl.constexpr):
    """From grad and of_product_program's grad_z that of x, grad_x [row, width], and this program's part of those of the
    layer norm's gain and shift, [program, width] each."""
    channel = tl.arange(0, width)
    scale = tl.load(gain + channel)
    of_gain = tl.full((width,), 0.0, tl.float32)
    of_shift = tl.full((width,), 0.0, tl.float32)
    for turn in range(turns):
        row = (tl.program_id(0) + turn * tl.num_programs(0)) * block + tl.arange(0, block)
        inside = row < rows
        place = row // line % length
        of_tile = tl.full((block, width), 0.0, tl.float32)
        for tap in tl.static_range(3):                                  # it is the neighbour of those it has
            there = place - (tap - 1) * reach
            valid = inside & (there >= 0) & (there < length)
            theirs = tl.load(grad_z + _at(row - (tap - 1) * reach * line, channel, width),
                             mask=valid[:, None], other=0.0)
            of_tile = tl.dot(theirs, _weight(weight, tap, channel, width), of_tile)
        tile, rate = standard(_load(x, row, inside, channel, width), width)
        of_gain += tl.sum(of_tile * tile, 0)
        of_shift += tl.sum(of_tile, 0)
        of_tile = of_tile * scale[None, :]
        of_tile -= (tl.sum(of_tile, 1) / width)[:, None] + tile * (tl.sum(of_tile * tile, 1) / width)[:, None]
        of_tile = of_tile * rate[:, None] + _load(grad, row, inside, channel, width)
        tl.store(grad_x + _at(row, channel, width), of_tile.to(grad_x.dtype.element_ty), mask=inside[:, None])
    tl.store(grad_gain + tl.program_id(0) * width + channel, of_gain)
    tl.store(grad_shift + tl.program_id(0) * width + channel, of_shift)


def _along(x: Tensor, dim: int) -> tuple[int, int, int]:
    """Rows of x [batch, time, freq, width], how many lie from one to the next along dim 1 or 2, and its size."""
    return x.shape[:-1].numel(), x.shape[2:-1].numel() if dim == 1 else 1, x.shape[dim]


@library.custom_op("ssl_gpu::beside", mutates_args=())
def beside_fused(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, dim: int, reach: int) -> Tensor:
    """x + gelu(patches.beside(layer, norm(x), dim, reach)) of x [batch, time, freq, width], dim 1 or 2; with gradients.

    gain, shift [width]: of the layer norm. weight [width, 3 width], bias [width]: of the layer. Products are of numbers
    in the precision of x, sums in float32. width: as `fits` has it.
    """
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, line, length = _along(x, dim)
    with runtime.current_device(x.device):  # Triton launches there, wherever its pointers belong
        beside_program[(triton.cdiv(rows, ROWS),)](
            out, x, gain, shift, weight.to(x.dtype), bias, rows, line, length, reach, width=x.shape[-1], block=ROWS,
            **HOW)
    return out


@library.custom_op("ssl_gpu::beside_backward", mutates_args=())
def beside_backward(grad: Tensor, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, dim: int,
                    reach: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gain, shift, weight and bias."""
    x, grad, weight = x.contiguous(), grad.contiguous(), weight.to(x.dtype)
    grad_z, grad_x = torch.empty_like(x), torch.empty_like(x)
    (rows, line, length), width = _along(x, dim), x.shape[-1]
    blocks = triton.cdiv(rows, ROWS)
    programs = min(PROGRAMS, blocks)
    of_weight = gain.new_empty(programs, 3, width, width, dtype=torch.float32)
    of_gain, of_shift, of_bias = gain.new_empty(3, programs, width, dtype=torch.float32)
    where = dict(turns=triton.cdiv(blocks, programs), width=width, block=ROWS, **HOW)
    with runtime.current_device(x.device):
        of_product_program[(programs,)](grad_z, of_weight, of_bias, x, grad, gain, shift, weight, bias, rows, line,
                                        length, reach, **where)
        of_norm_program[(programs,)](grad_x, of_gain, of_shift, x, grad, grad_z, gain, weight, rows, line, length,
                                     reach, **where)
    return grad_x, of_gain.sum(0), of_shift.sum(0), of_weight.sum(0).transpose(0, 1).flatten(1), of_bias.sum(0)


@beside_fused.register_fake
def _(x, gain, shift, weight, bias, dim, reach):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@beside_backward.register_fake
def _(grad, x, gain, shift, weight, bias, dim, reach):
    return (torch.empty_like(x, memory_format=torch.contiguous_format),
            *(torch.empty_like(tensor, dtype=torch.float32) for tensor in (gain, shift, weight, bias)))


def _keep(ctx, inputs, output):
    *tensors, ctx.dim, ctx.reach = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return *beside_backward(grad, *ctx.saved_tensors, ctx.dim, ctx.reach), None, None


beside_fused.register_autograd(_backward, setup_context=_keep)
