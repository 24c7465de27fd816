"""Waveforms to network input: where, frame by frame and band by band, the two microphones say that sound comes from."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.checks import check_fields
from ssl_gpu.masks import true_mask
from ssl_gpu.patches import HEADS as PATCH_HEADS

LEAST_SHARE = 0.01  # beside the mean of a mask in a band: where it is as small, a map fades


@dataclass(frozen=True)
class FeatureConfig:
    """The front end of the conformer model.

    window, hop: of the Hann STFT, in samples.
    num_bands: overlapping triangular bands, evenly spaced on the mel scale of O'Shaughnessy.
    band_hz: lowest and highest frequency used.
    num_delays: points of the delay grid, from -1.1 to 1.1 times the travel time between the microphones.
    gate_bands: likewise spaced bands whose levels the network's gate hears, to weigh the maps of the num_bands at every
        frame; 0: no gate.
    mask_width: channels of a network that learns which bins hold direct sound (ssl_gpu.masks), for num_bands further
        maps in which bins count by that; 0: none.
    mask_layers: number of its convolutions over frames, which reach 1, 2, 4 and 8 frames to either side, in turn; with
        patch_width, which has none, it must stay 4.
    patch_width: channels of another network for these masks (ssl_gpu.patches), which keeps patches of 2 frames x 2 bins
        apart; mask_width is then the width of what it makes of a whole frame; 0: none.
    patch_blocks: number of its blocks, which reach 1, 2, 4 and 8 patches in time, in turn.
    free_masks: number of further masks that it makes, of which the truth says nothing: the angles teach them, and the
        rest of that network through them, and as many times num_bands further maps are made. 0: it is taught by the
        truth alone.

    Raises ValueError naming the field, its value and the rule.
    """

    window: int = 512
    hop: int = 256
    num_bands: int = 8
    band_hz: tuple[float, float] = (100.0, 7900.0)
    num_delays: int = 33
    gate_bands: int = 0
    mask_width: int = 0
    mask_layers: int = 4
    patch_width: int = 0
    patch_blocks: int = 4
    free_masks: int = 0

    def __post_init__(self):
        check_fields(self, "features")
        for name, least in (("window", 2), ("hop", 1), ("num_bands", 1), ("mask_layers", 1), ("patch_blocks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"features.{name} must be >= {least}, got {getattr(self, name)}")
        if self.num_delays < 8:
            raise ValueError(f"features.num_delays must be >= 8, got {self.num_delays}")
        for name in ("gate_bands", "mask_width", "patch_width", "free_masks"):
            if getattr(self, name) < 0:
                raise ValueError(f"features.{name} must be >= 0, got {getattr(self, name)}")
        if self.patch_width % PATCH_HEADS:
            raise ValueError(f"features.patch_width must be divisible by {PATCH_HEADS}, got {self.patch_width}")
        if self.patch_width and not self.mask_width:
            raise ValueError(f"features.patch_width must be 0 where features.mask_width is 0, got {self.patch_width}")
        if self.patch_width and self.mask_layers != FeatureConfig.mask_layers:
            raise ValueError(f"features.mask_layers must be {FeatureConfig.mask_layers} where features.patch_width is "
                             f"not 0, whose network has features.patch_blocks instead, got {self.mask_layers}")
        if self.free_masks and not self.patch_width:
            raise ValueError(f"features.free_masks must be 0 where features.patch_width is 0, got {self.free_masks}")
        if not 0 < self.band_hz[0] < self.band_hz[1]:
            raise ValueError(f"features.band_hz must satisfy 0 < low < high, got {self.band_hz}")


def mel_bands(num_bands: int, band_hz: tuple[float, float], freq: Tensor, name: str = "num_bands") -> Tensor:
    """Triangular weights [band, freq] of overlapping bands evenly spaced on the mel scale, at freq [freq] Hz.

    Raises ValueError, that names the field of FeatureConfig and how many would do, for a band that no frequency falls
    into.
    """
    weight = _triangles(num_bands, band_hz, freq)
    if weight is None:
        most = next(number for number in range(1, num_bands + 1) if _triangles(number, band_hz, freq) is None) - 1
        raise ValueError(f"features.{name} must leave an STFT bin to every band, got {num_bands} for {len(freq)} bins "
                         f"of {float(freq[0]):.4g} Hz, {f'enough for {most}' if most else f'none within {band_hz}'}")
    return weight


def _triangles(num_bands: int, band_hz: tuple[float, float], freq: Tensor) -> Tensor | None:
    """The weights, None where a band has no frequency."""
    if num_bands > 2 * len(freq):  # a frequency is in two bands at most
        return None
    low, high = (2595 * math.log10(1 + hz / 700) for hz in band_hz)
    edges = torch.linspace(low, high, num_bands + 2, dtype=torch.float64)
    mel = 2595 * torch.log10(1 + freq.double() / 700)
    rising = (mel - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - mel) / (edges[2:] - edges[1:-1])[:, None]
    weight = torch.minimum(rising, falling).clamp(min=0)
    return weight if (weight.sum(-1) > 0).all() else None


class Heard(NamedTuple):
    """What DelayMap makes of a clip: maps and levels, as of its forward; and, of the bins in its bands, spectra [batch,
    mic, frame, freq] complex at a mean power of 1, and phat [batch, frame, freq] complex, their normalised
    cross-spectrum."""

    maps: Tensor
    levels: Tensor
    spectra: Tensor
    phat: Tensor


class DelayMap(nn.Module):
    """Two microphones to a generalised cross-correlation per frame and band, on a grid of delays.

    audio [batch, mic=2, sample] -> maps [batch, 2 * band, frame, delay] and levels [batch, band + gate band, frame].
    The first half of the maps is GCC-PHAT (Knapp and Carter 1976), every bin of a band with equal weight; in the second
    a bin counts by its magnitude, so that the harmonics that hold speech speak. Both are in [-1, 1] and independent of
    the signal's level. Delay index d means a lag of (d / (delays - 1) * 2 - 1) * 1.1 * spacing / c by which
    microphone 1 hears earlier than microphone 0. levels are log powers relative to the mean over the clip, in bels,
    first those of the bands of the maps, then those of the cfg.gate_bands.
    The network that follows does not have to learn what a phase means, nor what the spacing of the array is.

    Raises ValueError for bands above half the sample rate or without an STFT bin, for mic_spacing <= 0, and in forward
    for anything but [batch, 2, sample] with sample >= window.
    """

    def __init__(self, cfg: FeatureConfig, sample_rate: int, mic_spacing: float):
        super().__init__()
        if cfg.band_hz[1] > sample_rate / 2:
            raise ValueError(f"features.band_hz must end at or below half the sample rate of {sample_rate} Hz, "
                             f"got {cfg.band_hz}")
        if not mic_spacing > 0:
            raise ValueError(f"mic_spacing must be > 0 m, got {mic_spacing}")
        self.cfg = cfg
        freq = torch.arange(1, cfg.window // 2 + 1, dtype=torch.float64) * (sample_rate / cfg.window)
        bands = mel_bands(cfg.num_bands, cfg.band_hz, freq)
        reach = 1.1 * mic_spacing / SPEED_OF_SOUND
        delay = torch.linspace(-reach, reach, cfg.num_delays, dtype=torch.float64)
        phase = 2 * math.pi * freq[:, None] * delay                      # [freq, delay]
        steering = torch.stack((torch.cos(phase), torch.sin(phase)), 1)  # of the real and of the imaginary part
        used = bands.sum(0) > 0
        self.first_bin, self.last_bin = int(used.nonzero()[0]) + 1, int(used.nonzero()[-1]) + 2
        bins = slice(self.first_bin - 1, self.last_bin - 1)
        weighted = torch.einsum("bf,frd->frbd", bands / bands.sum(-1, keepdim=True), steering)[bins]
        self.register_buffer("steering", weighted.flatten(2).flatten(0, 1).float(), persistent=False)
        self.register_buffer("bands", bands[:, bins].float(), persistent=False)
        self.register_buffer("means", (bands / bands.sum(-1, keepdim=True))[:, bins].T.float(), persistent=False)
        if cfg.gate_bands:
            gate = mel_bands(cfg.gate_bands, cfg.band_hz, freq, "gate_bands")[:, bins]
            self.register_buffer("gate_levels", (gate / gate.sum(-1, keepdim=True)).float(), persistent=False)
        self.register_buffer("window", torch.hann_window(cfg.window), persistent=False)

    @property
    def num_bins(self) -> int:
        """Frequencies of the transform in the bands."""
        return self.last_bin - self.first_bin

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        return self.hear(audio)[:2]

    @torch.no_grad()
    def hear(self, audio: Tensor) -> Heard:
        """What forward does, with the spectra that it has on the way."""
        if audio.ndim != 3 or audio.shape[1] != 2 or audio.shape[-1] < self.cfg.window:
            raise ValueError(f"audio must be [batch, mic=2, sample >= {self.cfg.window}], got {list(audio.shape)}")
        spectra = self.spectra(audio / root_mean_square(audio))
        first, second = spectra.unbind(1)                                # [batch, frame, freq]
        cross = second * first.conj()
        magnitude = cross.abs()
        level = magnitude @ self.bands.T                                 # [batch, frame, band]
        phat = cross * (1 / magnitude.clamp(min=1e-7))
        maps = []
        # Times the magnitude it is `cross` again, but for silence, below the 1e-7, which counts for less than that.
        for weighted in (phat, phat * magnitude):
            mean = torch.view_as_real(weighted).flatten(-2) @ self.steering
            maps.append(mean.unflatten(-1, (-1, self.cfg.num_delays)))
        mean_magnitude = (level.clamp(min=1e-7) / self.bands.sum(-1)).to(level.dtype)  # which autocast may have chosen
        maps[1] = maps[1] / mean_magnitude[..., None]
        levels = relative_levels(level)
        if self.cfg.gate_bands:
            levels = torch.cat((levels, relative_levels(magnitude @ self.gate_levels.T)), 1)
        return Heard(torch.cat(maps, 2).transpose(1, 2), levels, spectra, phat)

    def spectra(self, audio: Tensor) -> Tensor:
        """audio [batch, mic, sample] -> [batch, mic, frame, freq] complex, the frequencies of the bands."""
        spectrum = torch.stft(audio.flatten(0, 1), self.cfg.window, self.cfg.hop, window=self.window, center=False,
                              return_complex=True)[:, self.first_bin:self.last_bin]
        return spectrum.unflatten(0, audio.shape[:2]).transpose(-1, -2)

    def masked(self, phat: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """GCC-PHAT in which every bin counts by mask [batch, frame, freq], in 0..1: maps [batch, band, frame, delay] in
        [-1, 1], and the mean of the mask in the bands, [batch, band, frame]. Differentiable in the mask."""
        share = mask @ self.means                                        # [batch, frame, band]
        weighted = torch.view_as_real(phat) * mask[..., None]
        maps = (weighted.flatten(-2) @ self.steering).unflatten(-1, (-1, self.cfg.num_delays))
        # Without the quotient a map would be as faint as its mask is small, and that has a mean of 0.02 in noise.
        maps = maps / (share + LEAST_SHARE)[..., None]
        return maps.transpose(1, 2), share.transpose(1, 2)

    @torch.no_grad()
    def true_mask(self, audio: Tensor, direct: Tensor) -> Tensor:
        """What a mask of audio [batch, mic, sample] is to be, [batch, frame, freq], from the direct sound in it, of the
        same shape."""
        level = root_mean_square(audio)                                  # far below 1, in which 1e-20 is no silence
        return true_mask(self.spectra(audio / level), self.spectra(direct / level))


def root_mean_square(audio: Tensor) -> Tensor:
    """Of clips [batch, mic, sample], [batch, 1, 1]; of silence 1e-8."""
    return audio.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-8)


def relative_levels(level: Tensor) -> Tensor:
    """Levels [batch, frame, band], sums or means over bins of |X0 X1|, to their logarithms, in bels, less the mean of
    these over frames and bands, [batch, band, frame]. DelayMap scales clips to a mean power of 1; the 1e-4 is more than
    a silent bin then has, so that silence has one level."""
    levels = torch.log10(level + 1e-4)
    return (levels - levels.mean((1, 2), keepdim=True)).transpose(1, 2)
