"""Classical localisers for a line of microphones: GCC-PHAT and SRP-PHAT, batched.

The phase of every pair's cross-spectrum is compared with the delay that a far source at each cone angle would cause
(Knapp and Carter 1976; DiBiase 2000). Pooling frames by their maximum instead of their mean halves the error in
reverberant rooms: a single frame in which one direct path stands alone is enough to place a talker.
"""
from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.doa import angle_grid
from ssl_gpu.geometry import array_axis

N_FFT = 1024
HOP = 256
BAND_HZ = (200.0, 7500.0)
GRID_STEP_DEG = 1.0
MIN_SEPARATION_DEG = 8.0  # two peaks closer than this count as one
POWER_FLOOR = 1e-12       # of the loudest bin of a clip: quieter bins hold rounding noise, whose phase means nothing
LINE_TOLERANCE = 1e-3     # m, how far a microphone may lie off the line


class Pooling(enum.Enum):
    """How the frames of a clip become one map."""

    MAX = "max"
    MEAN = "mean"


def gcc_phat(audio: Tensor, mic_pos: Tensor, sample_rate: int, num_src: int, *, pooling: Pooling = Pooling.MAX,
             speed_of_sound: float = SPEED_OF_SOUND, chunk: int = 32) -> Tensor:
    """srp_phat for exactly two microphones, under the name that it has for them; ValueError for any other number.

    The power of M microphones steered to an angle is, but for a factor and a constant, the sum of the M (M - 1) / 2
    pairs' GCC-PHAT at the angle's delays (DiBiase 2000). Two have one pair: SRP-PHAT is GCC-PHAT.
    """
    if mic_pos.shape[1] != 2:
        raise ValueError(f"gcc_phat needs exactly 2 microphones (srp_phat takes more), got {mic_pos.shape[1]}")
    return srp_phat(audio, mic_pos, sample_rate, num_src, pooling=pooling, speed_of_sound=speed_of_sound, chunk=chunk)


def srp_phat(audio: Tensor, mic_pos: Tensor, sample_rate: int, num_src: int, *, pooling: Pooling = Pooling.MAX,
             speed_of_sound: float = SPEED_OF_SOUND, chunk: int = 32) -> Tensor:
    """Cone angles of the `num_src` strongest directions: [batch, src] rad, ascending, on a 1-degree grid.

    audio [batch, mic, sample]; mic_pos [batch, mic, 3] m, on a line in any direction. A direction is a local maximum
    of the map (both ends may be one), at least 8 degrees from a stronger one; if there are fewer than `num_src`, the
    strongest is repeated. A silent clip gives 0, a batch of no clips [0, src]. `chunk` clips are worked on at a time
    (about 5 MB each for 3 s).
    Raises ValueError for fewer than two microphones, microphones off a line, or a sample rate below the band.
    """
    return srp_phat_by(audio, mic_pos, sample_rate, num_src, poolings=(pooling,), speed_of_sound=speed_of_sound,
                       chunk=chunk)[pooling]


def srp_phat_by(audio: Tensor, mic_pos: Tensor, sample_rate: int, num_src: int, *,
                poolings: Sequence[Pooling] = tuple(Pooling), speed_of_sound: float = SPEED_OF_SOUND,
                chunk: int = 32) -> dict[Pooling, Tensor]:
    """srp_phat by several poolings of the same frames, which take nearly all of the time."""
    if mic_pos.ndim != 3 or audio.ndim != 3 or audio.shape[:2] != mic_pos.shape[:2]:
        raise ValueError("audio must be [batch, mic, sample] and mic_pos [batch, mic, 3] of the same batch and mic, "
                         f"got {tuple(audio.shape)} and {tuple(mic_pos.shape)}")
    place = positions_on_line(mic_pos)
    grid = angle_grid(GRID_STEP_DEG).to(audio.device)
    if len(audio) == 0:  # which MKL refuses to transform
        return {pooling: grid.new_empty(0, num_src) for pooling in poolings}
    angles: dict[Pooling, list[Tensor]] = {pooling: [] for pooling in poolings}
    for part, part_place in zip(audio.split(chunk), place.split(chunk)):
        frames = srp_frames(part, part_place, grid, sample_rate, speed_of_sound=speed_of_sound)
        for pooling, found in angles.items():
            found.append(pick_peaks(pool(frames, pooling), grid, num_src))
    return {pooling: torch.cat(found) for pooling, found in angles.items()}


def positions_on_line(mic_pos: Tensor) -> Tensor:
    """mic_pos [batch, mic, 3] m -> coordinate [batch, mic] m along the array axis, 0 for the first microphone.

    Raises ValueError if there is one microphone only, or if one lies more than 1 mm off the line.
    """
    axis = array_axis(mic_pos)
    axis = axis / torch.linalg.vector_norm(axis, dim=-1, keepdim=True)
    offset = mic_pos - mic_pos[:, :1]
    place = (offset * axis[:, None]).sum(-1)  # [batch, mic]
    deviation = torch.linalg.vector_norm(offset - place[..., None] * axis[:, None], dim=-1)
    if not bool((deviation <= LINE_TOLERANCE).all()):
        raise ValueError(f"microphones must lie apart and on a line to within {LINE_TOLERANCE} m, "
                         f"one is {float(deviation.max()):.4f} m off")
    return place


def pool(frames: Tensor, pooling: Pooling) -> Tensor:
    """A response of every frame [batch, angle, frame] -> one of the clip [batch, angle]."""
    return frames.amax(-1) if pooling is Pooling.MAX else frames.mean(-1)


def srp_frames(audio: Tensor, place: Tensor, grid: Tensor, sample_rate: int, *,
               speed_of_sound: float = SPEED_OF_SOUND) -> Tensor:
    """Steered response of every frame [batch, angle, frame] in [-1, 1], averaged over the band and the pairs.

    audio [batch, mic, sample], place [batch, mic] m along the axis, grid [angle] rad.
    """
    spectrum, frequency = _band_spectrum(audio, sample_rate)  # [batch, mic, freq, frame], [freq] Hz
    lead = place.to(audio) / speed_of_sound  # [batch, mic] s, ahead of the first microphone at cone angle 0
    floor = POWER_FLOOR * spectrum.abs().amax((1, 2, 3)).square() + torch.finfo(audio.dtype).tiny  # [batch]
    response = 0.0
    pairs = list(combinations(range(place.shape[1]), 2))
    for first, second in pairs:
        cross = spectrum[:, second] * spectrum[:, first].conj()
        phat = cross / cross.abs().clamp(min=floor[:, None, None])  # [batch, freq, frame]
        # The second microphone lies nearer to a source at cone angle 0 and hears it earlier: its phase is ahead.
        delay = (lead[:, second] - lead[:, first])[:, None] * torch.cos(grid)  # [batch, angle] s
        phase = 2 * math.pi * delay[..., None] * frequency  # [batch, angle, freq]
        response = response + torch.cos(phase) @ phat.real + torch.sin(phase) @ phat.imag  # [batch, angle, frame]
    return response / (len(pairs) * len(frequency))


def _band_spectrum(audio: Tensor, sample_rate: int) -> tuple[Tensor, Tensor]:
    """STFT of whole frames within BAND_HZ: [batch, mic, freq, frame], and the frequencies [freq] Hz."""
    low, high = (math.ceil(BAND_HZ[0] * N_FFT / sample_rate), math.floor(BAND_HZ[1] * N_FFT / sample_rate))
    high = min(high, N_FFT // 2)
    if low > high:
        raise ValueError(f"sample_rate must be above {2 * BAND_HZ[0]:.0f} Hz, got {sample_rate}")
    audio = audio / audio.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(audio.dtype).tiny)
    audio = torch.nn.functional.pad(audio, (0, max(0, N_FFT - audio.shape[-1])))
    window = torch.hann_window(N_FFT, dtype=audio.dtype, device=audio.device)
    spectrum = torch.stft(audio.flatten(0, 1), N_FFT, HOP, window=window, center=False, return_complex=True)
    frequency = torch.arange(low, high + 1, dtype=audio.dtype, device=audio.device) * (sample_rate / N_FFT)
    return spectrum[:, low:high + 1].unflatten(0, audio.shape[:2]), frequency


def pick_peaks(response: Tensor, grid: Tensor, num_src: int) -> Tensor:
    """Angles of the highest local maxima of response [batch, angle]: [batch, src] rad, ascending.

    Each is at least MIN_SEPARATION_DEG from every higher one; where there is no further one, the highest repeats. NaN
    for a response that holds one.
    """
    outside = torch.full_like(response[:, :1], -math.inf)
    left, right = torch.cat((outside, response[:, :-1]), -1), torch.cat((response[:, 1:], outside), -1)
    candidate = torch.where((response > left) & (response >= right), response, -math.inf)
    separation = math.radians(MIN_SEPARATION_DEG) - 1e-4  # a distance of exactly 8 degrees is enough
    angles: list[Tensor] = []
    for _ in range(num_src):
        height, index = candidate.max(-1, keepdim=True)
        angle = grid[index]  # [batch, 1]
        angles.append(torch.where(torch.isfinite(height), angle, angles[0] if angles else angle))
        candidate = torch.where((grid - angle).abs() < separation, -math.inf, candidate)
    found = torch.cat(angles, -1).sort(-1).values
    return torch.where(response.isnan().any(-1, keepdim=True), torch.nan, found)
