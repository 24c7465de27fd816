"""Kernels for a GPU, in Triton: what patches tell their frames' vectors and their clip, and what they are told.

Importing this needs Triton. The sums are those of patches.Block, which is their reference: tests/test_fused_pooling.py
compares them in Triton's interpreter. A tensor of the patches of 128 clips is 199 MB in bfloat16, so what counts is how
often it is read and written. A program has all frames of a frequency of a clip at once, a column, so that a softmax
over time is its own affair; nothing is kept but what goes in and comes out, the rest is computed again: `listen` and
its gradient read such a tensor twice and write one, `tell` and its gradient read two and write one.

What layer norm ends with, gain and shift, is left to the layer behind it: weights times gain, the bias plus weights
times shift. A softmax has the sum 1, so pooling, too, can leave both to its outcome. And weights less their mean over
the channels say the same of numbers whose mean is 0, while gradients that come back through them have the mean 0 that
layer norm's gradient asks for. So no patch is ever made, and sums over channels or time are products of matrices, or
of the few numbers for each frame that the layer makes, all but those of the layer norm itself.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ssl_gpu import runtime
from ssl_gpu.fused_beside import standard

OUTS = 16             # columns of a product at least: of passage + heads outputs of a layer, and zeros
# Programs that share all columns, each of which makes its tables once and adds up gradients of parameters by itself: as
# many as an H200 with 132 multiprocessors has room for. Those of listen's gradient have twice the threads.
LISTENING, LEARNING, TELLING = 132 * 4, 132 * 2, 132 * 4
NUMBERS = 128 * 128   # of a column at most
REGISTERS = 128       # of a thread: left to itself the compiler takes what leaves room for half as many programs


def fits(time: int, width: int, passage: int, heads: int) -> bool:
    """Whether there are kernels for so many frames and channels: products want 16 channels at least, and there is room
    for so many numbers, in float32, in the memory that the threads of a program share."""
    return (16 <= width <= 128 and width & (width - 1) == 0 and 1 <= time <= 256 and _tile(time) * width <= NUMBERS
            and passage >= 1 and heads >= 1 and passage + heads <= OUTS and width % heads == 0)


@triton.jit
def _less_mean(table, width: tl.constexpr):
    """Rows with mean 0."""
    return table - (tl.sum(table, 1) / width)[:, None]


@triton.jit
def _softmax(logit, inside):
    """Over the frames, dim 0, that are inside."""
    logit = tl.where(inside[:, None], logit, float("-inf"))
    share = tl.exp(logit - tl.max(logit, 0)[None, :])
    return share * (1.0 / tl.sum(share, 0))[None, :]


@triton.jit
def listen_program(squeezed, pooled, x, gain, shift, weight, bias, time, freq, columns, turns: tl.constexpr,
                   passage: tl.constexpr, heads: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
                   outs: tl.constexpr):
    """squeezed [batch, time, freq, passage] and pooled [batch, freq, width] of this program's columns, at most `turns`,
    of x [batch, time, freq, width]; weight [passage + heads, width]; tile: a power of two, at least `time`."""
    channel, frame, out = tl.arange(0, width), tl.arange(0, tile), tl.arange(0, outs)
    inside, known = frame < time, out < passage + heads
    scale, offset = tl.load(gain + channel), tl.load(shift + channel)
    table = tl.load(weight + out[:, None] * width + channel[None, :], mask=known[:, None], other=0.0)
    add = tl.load(bias + out, mask=known, other=0.0) + tl.sum(table * offset[None, :], 1)
    table = tl.trans(_less_mean(table * scale[None, :], width)).to(x.dtype.element_ty)
    own = out[:, None] == passage + channel[None, :] // (width // heads)
    patch = frame[:, None] * (freq * width) + channel[None, :]
    squeeze = frame[:, None] * (freq * passage) + out[None, :]
    squeezing = inside[:, None] & (out < passage)[None, :]
    for turn in range(turns):
        column = tl.program_id(0) + turn * tl.num_programs(0)
        first = (column // freq).to(tl.int64) * time * freq + column % freq
        here = column < columns                                         # else zeros, which add nothing
        numbers = tl.load(x + first * width + patch, mask=inside[:, None] & here, other=0.0).to(tl.float32)
        numbers, _ = standard(numbers, width)
        kept = numbers.to(x.dtype.element_ty)
        logit = tl.dot(kept, table, input_precision="ieee") + add[None, :]
        tl.store(squeezed + first * passage + squeeze, logit.to(squeezed.dtype.element_ty), mask=squeezing & here)
        share = _softmax(logit, inside).to(x.dtype.element_ty)
        mean = tl.dot(tl.trans(share), kept, input_precision="ieee")    # of all channels by all weights
        mean = tl.sum(tl.where(own, mean, 0.0), 0) * scale + offset
        tl.store(pooled + column.to(tl.int64) * width + channel, mean.to(pooled.dtype.element_ty),
                 mask=(channel < width) & here)


@triton.jit
def listen_backward_program(grad_x, grad_gain, grad_shift, grad_weight, grad_bias, grad_squeezed, grad_pooled, x, gain,
                            shift, weight, bias, time, freq, columns, turns: tl.constexpr, passage: tl.constexpr,
                            heads: tl.constexpr, width: tl.constexpr, tile: tl.constexpr, outs: tl.constexpr):
    """grad_x of this program's columns, and its part of the gradients of gain and shift, [program, width] each, weight
    [program, passage + heads, width] and bias [program, passage + heads]."""
    channel, frame, out = tl.arange(0, width), tl.arange(0, tile), tl.arange(0, outs)
    inside, known = frame < time, out < passage + heads
    scale, offset = tl.load(gain + channel), tl.load(shift + channel)
    table = tl.load(weight + out[:, None] * width + channel[None, :], mask=known[:, None], other=0.0)
    add = tl.load(bias + out, mask=known, other=0.0) + tl.sum(table * offset[None, :], 1)
    table = _less_mean(table * scale[None, :], width).to(x.dtype.element_ty)
    own = out[:, None] == passage + channel[None, :] // (width // heads)
    patch = frame[:, None] * (freq * width) + channel[None, :]
    squeeze = frame[:, None] * (freq * passage) + out[None, :]
    squeezing = inside[:, None] & (out < passage)[None, :]
    of_table = tl.full((outs, width), 0.0, tl.float32)
    of_scale = tl.full((outs, width), 0.0, tl.float32)
    of_offset = tl.full((width,), 0.0, tl.float32)
    of_squeezed = tl.full((tile, outs), 0.0, tl.float32)
    for turn in range(turns):
        column = tl.program_id(0) + turn * tl.num_programs(0)
        first = (column // freq).to(tl.int64) * time * freq + column % freq
        here = column < columns                                         # else zeros, which add nothing
        numbers = tl.load(x + first * width + patch, mask=inside[:, None] & here, other=0.0).to(tl.float32)
        given = tl.load(grad_squeezed + first * passage + squeeze, mask=squeezing & here, other=0.0).to(tl.float32)
        wanted = tl.load(grad_pooled + column.to(tl.int64) * width + channel, mask=(channel < width) & here,
                         other=0.0).to(tl.float32)
        numbers, rate = standard(numbers, width)
        kept = numbers.to(x.dtype.element_ty)
        logit = tl.dot(kept, tl.trans(table), input_precision="ieee")
        share = _softmax(logit + add[None, :], inside)
        # Of the outputs only heads have channels to weigh, in the other rows of these tables is nothing.
        asked = tl.where(own, wanted[None, :], 0.0)
        asking = _less_mean(asked * scale[None, :], width).to(x.dtype.element_ty)
        of_share = tl.dot(kept, tl.trans(asking), input_precision="ieee")
        of_logit = given + share * (of_share - tl.sum(share * of_share, 0)[None, :])
        # The mean of the gradient times the numbers, without a look at either.
        along = tl.sum(of_logit * logit + share * of_share, 1) / width
        of_squeezed += given
        of_offset += wanted
        low, share_low = of_logit.to(x.dtype.element_ty), share.to(x.dtype.element_ty)
        of_table = tl.dot(tl.trans(low), kept, of_table, input_precision="ieee")
        of_scale += tl.dot(tl.trans(share_low), kept, input_precision="ieee") * asked
        grad = tl.dot(low, table, input_precision="ieee")
        grad = tl.dot(share_low, asking, grad, input_precision="ieee")
        grad = (grad - kept.to(tl.float32) * along[:, None]) * rate[:, None]
        tl.store(grad_x + first * width + patch, grad.to(grad_x.dtype.element_ty), mask=inside[:, None] & here)
    part = tl.program_id(0)
    of_add = tl.sum(of_squeezed, 0)                                     # a softmax is the same for any bias
    place = out[:, None] * width + channel[None, :]
    table = tl.load(weight + place, mask=known[:, None], other=0.0)     # as it was given
    tl.store(grad_weight + part * (passage + heads) * width + place,
             of_table * scale[None, :] + of_add[:, None] * offset[None, :], mask=known[:, None])
    tl.store(grad_bias + part * (passage + heads) + out, of_add, mask=known)
    tl.store(grad_gain + part * width + channel, tl.sum(table * of_table + of_scale, 0))
    tl.store(grad_shift + part * width + channel, tl.sum(table * of_add[:, None], 0) + of_offset)


@triton.jit
def tell_program(result, x, back, weight, bias, clip, time, freq, passage: tl.constexpr, held: tl.constexpr,
                 width: tl.constexpr, tile: tl.constexpr):
    """result [batch, time, freq, width] = x + layer of gelu(back) + clip, of one column; back [batch, time, freq,
    passage], weight [width, passage], clip [batch, freq, width]; held: a power of two, at least passage."""
    channel, frame, part = tl.arange(0, width), tl.arange(0, tile), tl.arange(0, held)
    inside = frame < time
    column = tl.program_id(0)
    first = (column // freq).to(tl.int64) * time * freq + column % freq
    patch = frame[:, None] * (freq * width) + channel[None, :]
    place = frame[:, None] * (freq * passage) + part[None, :]
    # Before x, since what is loaded last decides which thread has which numbers: those of x side by side in each.
    z = tl.load(back + first * passage + place, mask=inside[:, None] & (part < passage)[None, :], other=0.0)
    numbers = tl.load(x + first * width + patch, mask=inside[:, None], other=0.0).to(tl.float32)
    z = z.to(tl.float32)
    z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    told = tl.load(bias + channel) + tl.load(clip + column.to(tl.int64) * width + channel).to(tl.float32)
    numbers += told[None, :]
    for j in tl.static_range(passage):
        # Picked from all, since GELU of one column beside 64 channels each of their threads would compute again.
        one = tl.sum(tl.where((part == j)[None, :], z, 0.0), 1)
        numbers += one[:, None] * tl.load(weight + channel * passage + j)[None, :]
    tl.store(result + first * width + patch, numbers.to(result.dtype.element_ty), mask=inside[:, None])


@triton.jit
def tell_backward_program(grad_back, grad_weight, grad_bias, grad_clip, grad, back, weight, time, freq, columns,
                          turns: tl.constexpr, passage: tl.constexpr, held: tl.constexpr, width: tl.constexpr,
                          tile: tl.constexpr, outs: tl.constexpr):
    """From grad [batch, time, freq, width] grad_back and grad_clip of this program's columns, and its part of the
    gradients of weight, [program, width, passage], and bias, [program, width]."""
    channel, frame, part, out = tl.arange(0, width), tl.arange(0, tile), tl.arange(0, held), tl.arange(0, outs)
    inside = frame < time
    told = out < passage
    table = tl.load(weight + channel[:, None] * passage + out[None, :], mask=told[None, :], other=0.0)
    table = table.to(grad.dtype.element_ty)
    patch = frame[:, None] * (freq * width) + channel[None, :]
    place = frame[:, None] * (freq * passage) + part[None, :]
    present = inside[:, None] & (part < passage)[None, :]
    total = tl.full((outs, width), 0.0, tl.float32)
    for turn in range(turns):
        column = tl.program_id(0) + turn * tl.num_programs(0)
        first = (column // freq).to(tl.int64) * time * freq + column % freq
        here = column < columns                                         # else zeros, which add nothing
        near = tl.load(grad + first * width + patch, mask=inside[:, None] & here, other=0.0)
        z = tl.load(back + first * passage + place, mask=present & here, other=0.0).to(tl.float32)
        below = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        of_gelu = tl.dot(near, table, input_precision="ieee")           # [frame, out]
        # One output more than there are, 1 throughout: the gradient of its weights is a sum over time, clip's and
        # bias's.
        wide = tl.full((tile, outs), 0.0, tl.float32) + tl.where(out == passage, 1.0, 0.0)[None, :]
        of_z = tl.full((tile, held), 0.0, tl.float32)
        for j in tl.static_range(passage):
            one = tl.sum(tl.where((part == j)[None, :], z * below, 0.0), 1)
            wide += tl.where((out == j)[None, :], one[:, None], 0.0)
            one = tl.sum(tl.where((out == j)[None, :], of_gelu, 0.0), 1)
            of_z += tl.where((part == j)[None, :], one[:, None], 0.0)
        of_z *= below + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
        tl.store(grad_back + first * passage + place, of_z.to(grad_back.dtype.element_ty), mask=present & here)
        sums = tl.dot(tl.trans(wide.to(near.dtype)), near, input_precision="ieee")
        total += sums
        of_clip = tl.sum(tl.where((out == passage)[:, None], sums, 0.0), 0)
        tl.store(grad_clip + column.to(tl.int64) * width + channel, of_clip.to(grad_clip.dtype.element_ty),
                 mask=(channel < width) & here)
    program = tl.program_id(0)
    tl.store(grad_weight + program * width * passage + channel[None, :] * passage + out[:, None], total,
             mask=told[:, None])
    tl.store(grad_bias + program * width + channel, tl.sum(tl.where((out == passage)[:, None], total, 0.0), 0))


def _tile(time: int) -> int:
    """Frames to a program: products want 16 at least."""
    return max(16, triton.next_power_of_2(time))


def _warps(tile: int, width: int, numbers: int) -> int:
    """Warps for a column with so many of its numbers to a thread, if there may be that many."""
    return min(16, max(4, tile * width // (32 * numbers)))


def _shared(x: Tensor, most: int, numbers: int) -> tuple[int, dict[str, int]]:
    """How many programs share the columns of x, `most` at most, and how they are run, with `numbers` to a thread. Loads
    of the next turn are not begun ahead (num_stages): the matrix units would then read what cp.async has copied
    without the fence that PTX wants, which Triton 3.6 leaves out (its issue 9610; entry 61 of docs/performance.md)."""
    columns, tile, width = x.shape[0] * x.shape[2], _tile(x.shape[1]), x.shape[3]
    programs = min(most, columns)
    return programs, dict(turns=triton.cdiv(columns, programs), width=width, tile=tile, outs=OUTS,
                          num_warps=_warps(tile, width, numbers), num_stages=1, maxnreg=REGISTERS)


def launch_listen(squeezed: Tensor, pooled: Tensor, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor,
                  bias: Tensor, heads: int) -> None:
    """Runs listen_program over all columns; all tensors contiguous."""
    batch, time, freq, _ = x.shape
    programs, how = _shared(x, LISTENING, 64)
    listen_program[(programs,)](squeezed, pooled, x, gain, shift, weight, bias, time, freq, batch * freq,
                                passage=len(weight) - heads, heads=heads, **how)


def launch_listen_backward(grad_x: Tensor, grad_squeezed: Tensor, grad_pooled: Tensor, x: Tensor, gain: Tensor,
                           shift: Tensor, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, ...]:
    """Runs listen_backward_program over all columns; all tensors contiguous. Returns the gradients of gain, shift,
    weight and bias, float32."""
    batch, time, freq, _ = x.shape
    programs, how = _shared(x, LEARNING, 32)
    parts = [torch.empty(programs, *tensor.shape, dtype=torch.float32, device=x.device)
             for tensor in (gain, shift, weight, bias)]
    listen_backward_program[(programs,)](grad_x, *parts, grad_squeezed, grad_pooled, x, gain, shift, weight, bias, time,
                                         freq, batch * freq, passage=len(weight) - heads, heads=heads, **how)
    return tuple(part.sum(0) for part in parts)


def launch_tell(result: Tensor, x: Tensor, back: Tensor, weight: Tensor, bias: Tensor, clip: Tensor) -> None:
    """Runs tell_program over all columns; all tensors contiguous."""
    (batch, time, freq, width), passage = x.shape, back.shape[-1]
    tile = _tile(time)
    tell_program[(batch * freq,)](result, x, back, weight, bias, clip, time, freq, passage=passage,
                                  held=triton.next_power_of_2(passage), width=width, tile=tile,
                                  num_warps=_warps(tile, width, 32))


def launch_tell_backward(grad_back: Tensor, grad_clip: Tensor, grad: Tensor, back: Tensor,
                         weight: Tensor) -> tuple[Tensor, Tensor]:
    """Runs tell_backward_program over all columns; all tensors contiguous. Returns the gradients of weight and bias,
    float32."""
    (batch, time, freq, width), passage = grad.shape, back.shape[-1]
    programs, how = _shared(grad, TELLING, 64)
    of_weight, of_bias = (torch.empty(programs, *shape, dtype=torch.float32, device=grad.device)
                          for shape in ((width, passage), (width,)))
    tell_backward_program[(programs,)](grad_back, of_weight, of_bias, grad_clip, grad, back, weight, time, freq,
                                       batch * freq, passage=passage, held=triton.next_power_of_2(passage), **how)
    return of_weight.sum(0), of_bias.sum(0)


def _parameters(*tensors: Tensor) -> list[Tensor]:
    """As programs read them."""
    return [tensor.to(torch.float32).contiguous() for tensor in tensors]


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _heard(x: Tensor, weight: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Room for what listen returns."""
    batch, time, freq, width = x.shape
    return x.new_empty(batch, time, freq, weight.shape[0] - heads), x.new_empty(batch, freq, width)


@library.custom_op("ssl_gpu::listen", mutates_args=())
def listen(x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Of the layer norm of x [batch, time, freq, width], patch: squeezed [batch, time, freq, passage], and means of
    patch over time, pooled [batch, freq, width], in `heads` equal parts of the channels, by a softmax each; with
    gradients.

    gain, shift [width]: of the layer norm. weight [passage + heads, width], bias [passage + heads]: of the layer of
    patch that makes squeezed and the logits of the softmax, in this order; the gradient of the bias of logits is 0.
    Products are of numbers in the precision of x, sums in float32. Shapes: as `fits` has them.
    """
    (squeezed, pooled), x = _heard(x, weight, heads), x.contiguous()
    with runtime.current_device(x.device):  # Triton launches there, wherever its pointers belong
        launch_listen(squeezed, pooled, x, *_parameters(gain, shift, weight, bias), heads)
    return squeezed, pooled


@library.custom_op("ssl_gpu::listen_backward", mutates_args=())
def listen_backward(grad_squeezed: Tensor, grad_pooled: Tensor, x: Tensor, gain: Tensor, shift: Tensor, weight: Tensor,
                    bias: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gain, shift, weight and bias."""
    grad_x = _like(x)
    with runtime.current_device(x.device):
        return (grad_x, *launch_listen_backward(
            grad_x, grad_squeezed.contiguous(), grad_pooled.contiguous(), x.contiguous(),
            *_parameters(gain, shift, weight, bias), heads))


@library.custom_op("ssl_gpu::tell", mutates_args=())
def tell(x: Tensor, back: Tensor, weight: Tensor, bias: Tensor, clip: Tensor) -> Tensor:
    """x + layer of gelu(back) + clip[:, None], x [batch, time, freq, width], back [batch, time, freq, passage], clip
    [batch, freq, width]; with gradients.

    weight [width, passage], bias [width]: of the layer. Sums in float32. Shapes: as `fits` has them.
    """
    result = _like(x)
    with runtime.current_device(x.device):
        launch_tell(result, x.contiguous(), back.contiguous(), *_parameters(weight, bias), clip.contiguous())
    return result


@library.custom_op("ssl_gpu::tell_backward", mutates_args=())
def tell_backward(grad: Tensor, back: Tensor, weight: Tensor, clip: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of back, weight, bias and clip; that of x is grad."""
    grad_back, grad_clip = _like(back), _like(clip)
    with runtime.current_device(grad.device):
        of_weight, of_bias = launch_tell_backward(grad_back, grad_clip, grad.contiguous(), back.contiguous(),
                                                  *_parameters(weight))
    return grad_back, of_weight, of_bias, grad_clip


@listen.register_fake
def _(x, gain, shift, weight, bias, heads):
    return _heard(x, weight, heads)


@listen_backward.register_fake
def _(grad_squeezed, grad_pooled, x, gain, shift, weight, bias, heads):
    return _like(x), *(_like(tensor).to(torch.float32) for tensor in (gain, shift, weight, bias))


@tell.register_fake
def _(x, back, weight, bias, clip):
    return _like(x)


@tell_backward.register_fake
def _(grad, back, weight, clip):
    return _like(back), _like(weight).float(), weight.new_empty(len(weight), dtype=torch.float32), _like(clip)


def _keep_listening(ctx, inputs, output):
    *tensors, ctx.heads = inputs
    ctx.save_for_backward(*tensors)


def _back_from_listening(ctx, grad_squeezed, grad_pooled):
    return *listen_backward(grad_squeezed, grad_pooled, *ctx.saved_tensors, ctx.heads), None


def _keep_telling(ctx, inputs, output):
    _, back, weight, _, clip = inputs
    ctx.save_for_backward(back, weight, clip)


def _back_from_telling(ctx, grad):
    return grad, *tell_backward(grad, *ctx.saved_tensors)


listen.register_autograd(_back_from_listening, setup_context=_keep_listening)
tell.register_autograd(_back_from_telling, setup_context=_keep_telling)
