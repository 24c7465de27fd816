"""Kernels for a GPU, in Triton: arrivals added up in one pass over memory, FRA-RIR's found on the way; their filter.

Importing this needs Triton. The sums are those of ssl_gpu.scatter, the physics that of ssl_gpu.rir, which are the
reference for both: tests/test_scatter.py compares them in Triton's interpreter.
"""
from __future__ import annotations

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor, library

from ssl_gpu import runtime

BLOCK = 64  # arrivals to a program: with 16 taps each 1,024 additions, eight for each of its threads
IMAGES = 128  # to a program that finds them: one for each thread. With 64 half of the threads did the same as others
PAIRS = 128  # of a source and a microphone to a program that makes the tables of their images
FREQS = 512  # to a program that filters


@triton.jit
def _add_taps(total, table, row, place, strength, early, row_length, parts_apart, phase_bits: tl.constexpr,
              taps: tl.constexpr, main_taps: tl.constexpr):
    """Adds the kernels of arrivals in slots place [arrival] int64, as strong as strength, to row `row`, from its middle
    on where early is 1. The taps of an arrival lie side by side in total and table, so that the threads of a warp add
    to neighbouring addresses. Left out are arrivals of amplitude 0, as those that pad a batch, and any that would leave
    its row, so that it cannot write into another's."""
    start = (place >> phase_bits) + early * (row_length // 2)
    tap = tl.arange(0, taps)[None, :]
    weight = tl.load(table + (place & ((1 << phase_bits) - 1))[:, None] * taps + tap)
    target = total + row * row_length + start[:, None] + tap + tl.where(tap < main_taps, 0, parts_apart)
    counts = (strength != 0) & (start >= 0) & (start + taps <= row_length)
    tl.atomic_add(target, weight * strength[:, None], mask=counts[:, None], sem="relaxed")


@triton.jit
def add_kernels_program(total, table, slot, amplitude, early, arrivals, blocks, row_length, parts_apart,
                        has_early: tl.constexpr, phase_bits: tl.constexpr, taps: tl.constexpr, main_taps: tl.constexpr,
                        block: tl.constexpr):
    """`block` arrivals of one RIR; all blocks of a row follow one another, so that its sums stay in the cache. The two
    sums in total [2, row, row_length] lie parts_apart elements apart; table [2^phase_bits, tap]; slot, amplitude, early
    [row, arrival]."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    arrival = (tl.program_id(0) % blocks) * block + tl.arange(0, block)
    inside = arrival < arrivals
    place = tl.load(slot + row * arrivals + arrival, mask=inside, other=0)
    strength = tl.load(amplitude + row * arrivals + arrival, mask=inside, other=0.0)
    flag = tl.full(place.shape, 0, tl.int64)
    if has_early:
        flag = tl.load(early + row * arrivals + arrival, mask=inside, other=0).to(tl.int64)
    _add_taps(total, table, row, place, strength, flag, row_length, parts_apart, phase_bits, taps, main_taps)


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
    blocks = triton.cdiv(arrivals, BLOCK)
    program[(slot.shape[:-1].numel() * blocks,)](
        total, table, slot.contiguous(), amplitude.contiguous(), flags, arrivals, blocks, total.shape[-1],
        total.stride(0), has_early=early is not None, phase_bits=phases.bit_length() - 1, taps=taps,
        main_taps=main_taps, block=BLOCK)


@triton.jit
def _distance(x, y, z, epsilon, one):
    """acoustics.distance of the offset x, y, z, to the bit. Compilers give a product and its sum one rounding (FMA),
    where torch has two, and of two microphones that are equally near another would then be the nearest, which moves all
    images. Times `one`, a 1 that they do not know, products are rounded before, and it changes nothing."""
    return tl.sqrt(x * x * one + y * y * one + z * z * one + epsilon)


@triton.jit
def image_tables_program(places, rooms, mic_pos, src_pos, room_dim, rt60, chosen, numbers, pairs, srcs, slots_per_s,
                         mics: tl.constexpr, has_chosen: tl.constexpr, block: tl.constexpr):
    """What images have in common, by `block` pairs [batch, mic, src] of a source and a microphone, in float64.

    places [batch, mic, src, 5] m: from the microphone to that nearest to the source, x, y, z, the distance of the
    source to that one, and to this one. rooms [batch, 5]: reflections per metre, less the first; log2 of the reflection
    coefficient; the last slot, -1 for scenes that are not chosen [batch] uint8; two of the numbers: DISTANCE_EPSILON,
    slots per metre. Their like in torch: rir.nearest_mic, rir.image_amplitude, acoustics.reflection_coefficient.

    numbers: rir.image_numbers, since as float64 Triton has numbers only from memory."""
    pair = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = pair < pairs
    pair = tl.where(inside, pair, 0)
    batch, mic, src = pair // (mics * srcs), pair // srcs % mics, pair % srcs
    epsilon, slots_per_m, speed, one = (tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2),
                                        tl.load(numbers + 3))
    at = src_pos + 3 * (batch * srcs + src)
    src_x, src_y, src_z = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    at = mic_pos + 3 * (batch * mics + mic)
    x, y, z = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    direct = _distance(src_x - x, src_y - y, src_z - z, epsilon, one)
    # The first microphone, and then whichever is nearer than those before it, so that of equals it is the first.
    at = mic_pos + 3 * batch * mics
    near_x, near_y, near_z = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    closest = _distance(src_x - near_x, src_y - near_y, src_z - near_z, epsilon, one)
    for other in range(1, mics):
        at = mic_pos + 3 * (batch * mics + other)
        to_x, to_y, to_z = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        dist = _distance(src_x - to_x, src_y - to_y, src_z - to_z, epsilon, one)
        nearer = dist < closest
        near_x, near_y, near_z = tl.where(nearer, to_x, near_x), tl.where(nearer, to_y, near_y), tl.where(
            nearer, to_z, near_z)
        closest = tl.where(nearer, dist, closest)
    place = places + pair * 5
    tl.store(place, near_x - x, mask=inside)
    tl.store(place + 1, near_y - y, mask=inside)
    tl.store(place + 2, near_z - z, mask=inside)
    tl.store(place + 3, closest, mask=inside)
    tl.store(place + 4, direct, mask=inside)

    # Of the room, by its first pair.
    first = inside & (mic == 0) & (src == 0)
    sabine, least, log2_1000 = tl.load(numbers + 4), tl.load(numbers + 5), tl.load(numbers + 6)
    seconds, at = tl.load(rt60 + batch), room_dim + 3 * batch
    reach = speed * seconds
    alpha = one - tl.exp(sabine / (one / tl.load(at) + one / tl.load(at + 1) + one / tl.load(at + 2)) / seconds)
    log2_coefficient = tl.log2(tl.maximum(tl.sqrt(one - alpha * alpha), least))
    reflections = (tl.log2(reach) - log2_1000) / log2_coefficient
    per_s = tl.full((block,), slots_per_s, tl.float32)                  # a compiler (inductor) hands it over as float64
    last = tl.ceil(seconds.to(tl.float32) * per_s).to(tl.float64) - one
    if has_chosen:
        last = tl.where(tl.load(chosen + batch) != 0, last, -one)
    room = rooms + batch * 5
    tl.store(room, (reflections - one) / reach, mask=first)
    tl.store(room + 1, log2_coefficient, mask=first)
    tl.store(room + 2, last, mask=first)
    tl.store(room + 3, epsilon, mask=first)
    tl.store(room + 4, slots_per_m, mask=first)


@library.triton_op("ssl_gpu::image_tables", mutates_args=())
def image_tables_fused(mic_pos: Tensor, src_pos: Tensor, room_dim: Tensor, rt60: Tensor, chosen: Optional[Tensor],
                       numbers: Tensor, slots_per_s: float) -> tuple[Tensor, Tensor]:
    """places [batch, mic, src, 5] and rooms [batch, 5] float64 as of image_tables_program, of scenes' mic_pos [batch,
    mic, 3], src_pos [batch, src, 3], room_dim [batch, 3] m and rt60 [batch] s, float64; chosen [batch] bool."""
    with runtime.current_device(rt60.device):
        return launch_tables(library.wrap_triton(image_tables_program), mic_pos, src_pos, room_dim, rt60, chosen,
                             numbers, slots_per_s)


def launch_tables(program, mic_pos: Tensor, src_pos: Tensor, room_dim: Tensor, rt60: Tensor, chosen: Optional[Tensor],
                  numbers: Tensor, slots_per_s: float) -> tuple[Tensor, Tensor]:
    """Runs image_tables_program, or the same in Triton's interpreter, over all pairs."""
    (batch, mics, _), srcs = mic_pos.shape, src_pos.shape[1]
    places, rooms = rt60.new_empty(batch, mics, srcs, 5), rt60.new_empty(batch, 5)
    flags = rt60 if chosen is None else chosen.to(torch.uint8).contiguous()  # never read where there is none
    pairs = batch * mics * srcs
    program[(triton.cdiv(pairs, PAIRS),)](
        places, rooms, mic_pos.contiguous(), src_pos.contiguous(), room_dim.contiguous(), rt60.contiguous(), flags,
        numbers, pairs, srcs, slots_per_s, mics=mics, has_chosen=chosen is not None, block=PAIRS)
    return places, rooms


@triton.jit
def add_images_program(total, table, places, rooms, direction, ratio, perturbation, active, images, blocks, mics, srcs,
                       axis_stride, row_length, parts_apart, perturbation_exponent, full_range: tl.constexpr,
                       phase_bits: tl.constexpr, taps: tl.constexpr, main_taps: tl.constexpr, block: tl.constexpr):
    """`block` images of one source at one microphone, the direct path the first of them: rir.find_arrivals and
    rir.image_amplitude, and add_kernels_program at once.

    places [batch, mic, src, 5] float64 and rooms [batch, 5] float64 as of image_tables_program; direction [3, batch,
    src, image], its axes axis_stride apart, ratio, perturbation [batch, src, image] float32; active [batch, image]
    uint8."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    image = (tl.program_id(0) % blocks) * block + tl.arange(0, block) - 1
    batch, src = row // (mics * srcs), row % srcs
    room, place = rooms + batch * 5, places + row * 5
    slope, log2_coefficient = tl.load(room).to(tl.float32), tl.load(room + 1).to(tl.float32)
    last, epsilon, slots_per_m = tl.load(room + 2), tl.load(room + 3), tl.load(room + 4)
    closest, direct = tl.load(place + 3), tl.load(place + 4)

    inside = (image >= 0) & (image < images)
    inside = inside & (tl.load(active + batch * images + image, mask=inside, other=0) != 0)
    at = (batch * srcs + src) * images + image
    near = tl.load(ratio + at, mask=inside, other=1.0)
    image_dist = closest * near.to(tl.float64)
    x = tl.load(place) + image_dist * tl.load(direction + at, mask=inside, other=0.0).to(tl.float64)
    y = tl.load(place + 1) + image_dist * tl.load(direction + axis_stride + at, mask=inside, other=0.0).to(tl.float64)
    third = direction + axis_stride + axis_stride + at                  # twice the stride may be more than an int32
    z = tl.load(place + 2) + image_dist * tl.load(third, mask=inside, other=0.0).to(tl.float64)
    dist = tl.where(image < 0, direct, tl.sqrt(x * x + y * y + z * z + epsilon))

    # Slots are found in float64, as in rir.find_arrivals; strengths in float32, which moves them by 1e-6 at most.
    metres = dist.to(tl.float32)
    exponent = tl.full((block,), perturbation_exponent, tl.float32)     # from inductor it is float64
    spread = tl.load(perturbation + at, mask=inside, other=0.0) * tl.exp2(exponent * tl.log2(near))
    strength = tl.exp2(tl.maximum(metres * slope + 1 + spread, 1.0) * log2_coefficient)
    strength = tl.where(image < 0, 1.0, strength) / metres
    slot = tl.ceil(dist * slots_per_m)
    # `last` is below 0 in scenes that another method renders.
    counts = ((image < 0) | inside) & (last + tl.full((block,), 0.0, tl.float64) >= 0)
    if full_range:
        counts = counts & ((image < 0) | (slot <= last))
    strength = tl.where(counts, strength, 0.0)
    slot = tl.where(counts, tl.minimum(slot, last), 0).to(tl.int64)
    no_flag = tl.full(slot.shape, 0, tl.int64)
    _add_taps(total, table, row, slot, strength, no_flag, row_length, parts_apart, phase_bits, taps, main_taps)


@library.triton_op("ssl_gpu::add_images", mutates_args={"total"})
def add_images_fused(total: Tensor, table: Tensor, places: Tensor, rooms: Tensor, direction: Tensor, ratio: Tensor,
                     perturbation: Tensor, active: Tensor, perturbation_exponent: float, full_range: bool,
                     main_taps: int) -> None:
    """FRA-RIR's direct paths and images added up in place: total [2, batch, mic, src, length] float32, table [phase,
    tap]; the others as add_images_program's, active bool."""
    with runtime.current_device(total.device):
        launch_images(library.wrap_triton(add_images_program), total, table, places, rooms, direction, ratio,
                      perturbation, active, perturbation_exponent, full_range, main_taps)


def launch_images(program, total: Tensor, table: Tensor, places: Tensor, rooms: Tensor, direction: Tensor,
                  ratio: Tensor, perturbation: Tensor, active: Tensor, perturbation_exponent: float, full_range: bool,
                  main_taps: int) -> None:
    """Runs add_images_program, or the same in Triton's interpreter, over all images."""
    (_, mics, srcs, _), images, (phases, taps) = places.shape, ratio.shape[-1], table.shape
    blocks, axes = triton.cdiv(1 + images, IMAGES), direction.movedim(-1, 0)
    if not axes[0].is_contiguous():
        axes = axes.contiguous()
    program[(places.shape[:-1].numel() * blocks,)](
        total, table, places.contiguous(), rooms.contiguous(), axes, ratio.contiguous(), perturbation.contiguous(),
        active.to(torch.uint8).contiguous(), images, blocks, mics, srcs, axes.stride(0), total.shape[-1],
        total.stride(0), perturbation_exponent, full_range=full_range, phase_bits=phases.bit_length() - 1, taps=taps,
        main_taps=main_taps, block=IMAGES)


@triton.jit
def filter_program(first, second, first_response, second_response, freqs, count, block: tl.constexpr):
    """first [row, freq, 2] times first_response [freq, 2] plus second times second_response, complex, into first;
    `count` elements of all rows."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    part, inside = tl.arange(0, 2)[None, :], (at < count)[:, None]
    place, freq = 2 * at[:, None] + part, 2 * (at % freqs)[:, None] + part
    a_re, a_im = tl.split(tl.load(first + place, mask=inside, other=0.0))
    b_re, b_im = tl.split(tl.load(second + place, mask=inside, other=0.0))
    c_re, c_im = tl.split(tl.load(first_response + freq, mask=inside, other=0.0))
    d_re, d_im = tl.split(tl.load(second_response + freq, mask=inside, other=0.0))
    value = tl.join(a_re * c_re - a_im * c_im + b_re * d_re - b_im * d_im,
                    a_re * c_im + a_im * c_re + b_re * d_im + b_im * d_re)
    tl.store(first + place, value, mask=inside)


@library.triton_op("ssl_gpu::filter_spectra", mutates_args={"first"})
def filter_spectra(first: Tensor, second: Tensor, first_response: Tensor, second_response: Tensor) -> None:
    """first [..., freq, 2] becomes first * first_response + second * second_response, as complex numbers; responses
    [freq, 2], all float32 and contiguous."""
    with runtime.current_device(first.device):
        launch_filter(library.wrap_triton(filter_program), first, second, first_response, second_response)


def launch_filter(program, first: Tensor, second: Tensor, first_response: Tensor, second_response: Tensor) -> None:
    """Runs filter_program, or the same in Triton's interpreter. Raises ValueError for spectra with gaps."""
    if not all(x.is_contiguous() for x in (first, second, first_response, second_response)):
        raise ValueError(f"filter_spectra needs spectra and responses without gaps, got strides {first.stride()}, "
                         f"{second.stride()}, {first_response.stride()} and {second_response.stride()}")
    count = first.numel() // 2
    program[(triton.cdiv(count, FREQS),)](first, second, first_response, second_response, first.shape[-2], count,
                                          block=FREQS)
