"""Arrivals added up at the sample rate: of each, the short kernel that its place within a sample selects."""
from __future__ import annotations

import torch
from torch import Tensor

from ssl_gpu import runtime


def add_kernels(table: Tensor, slot: Tensor, amplitude: Tensor, early: Tensor | None, lengths: tuple[int, ...],
                main_taps: int, fused: bool = False) -> tuple[Tensor, ...]:
    """Adds up the kernels of arrivals: one in slot `phases` b + p brings amplitude table[:, p], from sample b on.

    table [tap, phase] float32, slot [batch, mic, src, arrival] int64 on a grid of `phases` slots per sample, a power of
    two; amplitude likewise float32. early likewise bool: an early arrival goes to the second of two parts, there is one
    part where it is None. Returns of every part the sums of the first main_taps taps and of the others, [2, batch, mic,
    src, length] float32, a length for each part; it must have room for all, start + tap.
    fused: on a GPU by one Triton kernel (ssl_gpu.fused), which reads every arrival once, instead of three passes for
    each tap. The same to a few roundings: on a GPU either adds in any order. On a CPU it changes nothing. It wants
    parts of one length.
    """
    phases = table.shape[1]
    total = torch.zeros(2, *slot.shape[:3], sum(lengths), dtype=torch.float32, device=slot.device)
    parts = tuple(total.narrow(-1, sum(lengths[:part]), length) for part, length in enumerate(lengths))
    if fused and runtime.is_gpu(slot.device):
        from ssl_gpu.fused import add_kernels_fused  # Triton is not everywhere where torch is
        add_kernels_fused(total, table.T.contiguous(), slot, amplitude, early, main_taps)
        return parts
    # slot % 64 and slot // 64, but divisions of int64 take ten times as long.
    phase, start = (slot & (phases - 1)).flatten(), slot >> (phases.bit_length() - 1)
    if early is not None:
        start = start + early * lengths[0]
    for tap in range(len(table)):
        room = total[int(tap >= main_taps)].narrow(-1, tap, sum(lengths) - tap)
        weight = table[tap].index_select(0, phase).view_as(start)      # on a CPU five times as fast as [phase]
        room.scatter_add_(-1, start, weight.mul_(amplitude))
    return parts
