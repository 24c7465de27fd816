"""Kernels for a GPU, in Triton: what would take many passes over memory in one. Importing this needs Triton."""
from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ssl_gpu import runtime

BLOCK = 64  # arrivals to a program: with 16 taps each 1,024 additions, eight for each of its threads


@triton.jit
def add_kernels_program(total, table, slot, amplitude, early, arrivals, row_length, parts_apart,
                        has_early: tl.constexpr, phase_bits: tl.constexpr, taps: tl.constexpr, main_taps: tl.constexpr,
                        block: tl.constexpr):
    """`block` arrivals of one RIR, program_id(0). The two sums in total [2, row, row_length] lie parts_apart elements
    apart; table [2^phase_bits, tap]; slot, amplitude, early [row, arrival]. The taps of an arrival lie side by side in
    both, so that the threads of a warp add to neighbouring addresses. Left out are arrivals of amplitude 0, as those
    that pad a batch, and any that would leave its row, so that it cannot write into another's."""
    row = tl.program_id(0).to(tl.int64)
    arrival = tl.program_id(1) * block + tl.arange(0, block)
    inside = arrival < arrivals
    place = tl.load(slot + row * arrivals + arrival, mask=inside, other=0)
    strength = tl.load(amplitude + row * arrivals + arrival, mask=inside, other=0.0)
    start = place >> phase_bits
    if has_early:
        flag = tl.load(early + row * arrivals + arrival, mask=inside, other=0)
        start += flag.to(tl.int64) * (row_length // 2)
    tap = tl.arange(0, taps)[None, :]
    weight = tl.load(table + (place & ((1 << phase_bits) - 1))[:, None] * taps + tap)
    target = total + row * row_length + start[:, None] + tap + tl.where(tap < main_taps, 0, parts_apart)
    counts = (strength != 0) & (start >= 0) & (start + taps <= row_length)
    tl.atomic_add(target, weight * strength[:, None], mask=counts[:, None], sem="relaxed")


@library.triton_op("ssl_gpu::add_kernels", mutates_args={"total"})
def add_kernels_fused(total: Tensor, table: Tensor, slot: Tensor, amplitude: Tensor, early: Optional[Tensor],
                      main_taps: int) -> None:
    """What scatter.add_kernels does, in place: total [2, batch, mic, src, part * length] float32, table [phase, tap].

    The number of taps must be a power of two, that of phases, too.
    """
    with runtime.current_device(total.device):  # Triton launches there, wherever its pointers belong
        launch(library.wrap_triton(add_kernels_program), total, table, slot, amplitude, early, main_taps)


def launch(program, total: Tensor, table: Tensor, slot: Tensor, amplitude: Tensor, early: Optional[Tensor],
           main_taps: int) -> None:
    """Runs add_kernels_program, or the same in Triton's interpreter, over all arrivals."""
    arrivals, (phases, taps) = slot.shape[-1], table.shape
    # Never read where there is none. A view as bytes would do, but the compiler cannot lower it for bool.
    flags = slot if early is None else early.to(torch.uint8).contiguous()
    grid = (slot.shape[:-1].numel(), triton.cdiv(arrivals, BLOCK))
    program[grid](total, table, slot.contiguous(), amplitude.contiguous(), flags, arrivals, total.shape[-1],
                  total.stride(0), has_early=early is not None, phase_bits=phases.bit_length() - 1, taps=taps,
                  main_taps=main_taps, block=BLOCK)
