"""Dry speech and RIRs to what the microphones hear: convolve, set the levels, add noise; microphones may differ."""
from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import reduce

import torch
from torch import Tensor

from ssl_gpu import rng, runtime
from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.checks import check_fields
from ssl_gpu.convolve import convolve_sources
from ssl_gpu.microphones import Microphones, draw_microphones
from ssl_gpu.scene import SceneBatch
from ssl_gpu.synthesis import RirBatch

# Added to the diagonal of the coherence matrix of diffuse noise. At low frequencies a small array is all but coherent
# and float32 loses the little that is not: four microphones 2 cm apart came out 1e8 times too loud, eight as NaN.
DIFFUSE_LOADING = 1e-4


@dataclass(frozen=True)
class MixtureConfig:
    """Levels and noise; the defaults are the original project's: a plain sum, no noise.

    level_difference_db: range of the uniform law of each further talker's gain relative to the first, before the room.
    sensor_snr_db: range of the SNR of white noise, independent at every microphone; None for no such noise.
    diffuse_snr_db: range of the SNR of spherically isotropic white noise, with the coherence sin(kd)/(kd) of the
        array; None for no such noise.
    noise_probability: each of the two noises is added to this share of the examples, independently.
    An SNR compares the mean power of the reverberant mixture over clip and microphones with that of one noise.
    mic_gain_db: half the width of the uniform law of each microphone's gain about 0 dB: two differ by up to twice that.
    mic_phase_deg: no two microphones' phases differ by more, at any frequency, and typically by a fifth of it: with 5
        by 1.0 degree (RMS) from 500 Hz up, 0.5 at 200 Hz. Each one's is a smooth curve over frequency
        (ssl_gpu.microphones), that is 0 at 0 Hz.
    Gain and phase shape all that reaches the microphone, speech and diffuse noise, but not its own sensor noise; SNRs
    are of what they make of it.

    Raises ValueError naming the field, its value and the rule.
    """

    level_difference_db: tuple[float, float] = (0.0, 0.0)
    sensor_snr_db: tuple[float, float] | None = None
    diffuse_snr_db: tuple[float, float] | None = None
    noise_probability: float = 1.0
    mic_gain_db: float = 0.0
    mic_phase_deg: float = 0.0

    def __post_init__(self):
        check_fields(self, "mixture")
        for name in ("level_difference_db", "sensor_snr_db", "diffuse_snr_db"):
            value = getattr(self, name)
            if value is not None and not -math.inf < value[0] <= value[1] < math.inf:
                raise ValueError(f"mixture.{name} must satisfy -inf < low <= high < inf, got {value}")
        if not 0 <= self.noise_probability <= 1:
            raise ValueError(f"mixture.noise_probability must be in [0, 1], got {self.noise_probability}")
        if not 0 <= self.mic_gain_db < math.inf:
            raise ValueError(f"mixture.mic_gain_db must satisfy 0 <= mic_gain_db < inf, got {self.mic_gain_db}")
        if not 0 <= self.mic_phase_deg <= 180:
            raise ValueError(f"mixture.mic_phase_deg must be in [0, 180], got {self.mic_phase_deg}")


@dataclass(frozen=True, eq=False)
class MixtureDraw:
    """The random part of mixing. gain [batch, src] (factor, not dB); sensor, diffuse [batch, mic, sample] white noise
    of unit power or None; sensor_snr, diffuse_snr [batch] dB, infinite where the example stays free of that noise;
    microphones, None where all are alike."""

    gain: Tensor
    sensor: Tensor | None
    diffuse: Tensor | None
    sensor_snr: Tensor
    diffuse_snr: Tensor
    microphones: Microphones | None = None

    def __getitem__(self, index: slice) -> "MixtureDraw":
        return MixtureDraw(*(None if (x := getattr(self, f.name)) is None else x[index] for f in fields(self)))

    def to(self, device: torch.device | str) -> "MixtureDraw":
        """The same draw on another device."""
        return MixtureDraw(*(None if (x := getattr(self, f.name)) is None else x.to(device) for f in fields(self)))


@dataclass(frozen=True, eq=False)
class MixtureBatch:
    """audio [batch, mic, sample] float32; early [batch, mic, src, sample], each talker through the early part of its
    RIR alone (a dereverberation or separation target) by the same microphones, None unless the RIRs have it; the
    scenes; sample_rate Hz; sensor_snr_db, diffuse_snr_db [batch]: the SNRs that were drawn, dB, infinite where an
    example stays free of that noise (None where whoever made the batch did not say). Where nothing of the speech
    reaches the microphones within the clip there is no noise either, whatever the SNR. direct [batch, mic, sample]: the
    direct sound of all talkers in audio, where whoever made the batch added it (Simulator.render_direct)."""

    audio: Tensor
    early: Tensor | None
    scenes: SceneBatch
    sample_rate: int
    sensor_snr_db: Tensor | None = None
    diffuse_snr_db: Tensor | None = None
    direct: Tensor | None = None


def draw_mixture(cfg: MixtureConfig, batch: int, num_src: int, num_mics: int, num_samples: int, *,
                 generator: torch.Generator, noise_share: float | Tensor = 1.0) -> MixtureDraw:
    """Draw the levels and noises of `batch` mixtures and their microphones, on the generator's device.

    noise_share: factor of mixture.noise_probability; or a tensor of it there, [] float64, whose value is not looked at.
    Raises ValueError for a number that makes no probability of it.
    """
    device, probability = generator.device, noise_share * cfg.noise_probability
    if not isinstance(probability, Tensor) and not 0 <= probability <= 1:
        raise ValueError(f"noise_share * mixture.noise_probability must be in [0, 1], got {noise_share} * "
                         f"{cfg.noise_probability}")

    gain_db = rng.uniform((batch, num_src), *cfg.level_difference_db, generator=generator)
    gain_db[:, 0] = 0
    noises, snrs = [], []
    for snr_db in (cfg.sensor_snr_db, cfg.diffuse_snr_db):
        if snr_db is None:
            noises.append(None)
            snrs.append(torch.full((batch,), torch.inf, dtype=torch.float32, device=device))
            continue
        snr = rng.uniform((batch,), *snr_db, generator=generator)
        noisy = torch.rand((batch,), generator=generator, dtype=torch.float32, device=device) < probability
        snrs.append(torch.where(noisy, snr, torch.inf))
        noises.append(torch.randn((batch, num_mics, num_samples), generator=generator, dtype=torch.float32,
                                  device=device))
    microphones = None
    if cfg.mic_gain_db or cfg.mic_phase_deg:  # without them nothing is drawn, and what is drawn next is what it was
        microphones = draw_microphones(cfg.mic_gain_db, cfg.mic_phase_deg, batch, num_mics, generator=generator)
    return MixtureDraw(10 ** (gain_db / 20), *noises, *snrs, microphones)


def diffuse_noise(white: Tensor, mic_pos: Tensor, sample_rate: int,
                  microphones: Microphones | None = None) -> Tensor:
    """White noise [batch, mic, sample], independent at every microphone -> spherically isotropic noise, likewise.

    Microphones i and j get the coherence sin(2 pi f d_ij / c) / (2 pi f d_ij / c): at every frequency the spectra are
    mixed by the Cholesky factor of the coherence matrix (Habets, Cohen and Gannot, JASA 124(5), 2008). The factor is
    written out for all scenes and frequencies at once; with few microphones that is a handful of products.
    mic_pos [batch, mic, 3] m, sample_rate Hz. microphones: what hears it; their filter goes round the clip's ends as
    the noise itself does.
    """
    num_samples, num_mics = white.shape[-1], white.shape[1]
    wave_number = torch.fft.rfftfreq(num_samples, 1 / sample_rate, dtype=torch.float32, device=white.device)
    wave_number = wave_number * (2 * math.pi / SPEED_OF_SOUND)
    spectrum = torch.fft.rfft(white)
    factor: list[list[Tensor | float]] = []
    for row in range(num_mics):
        factor.append([])
        for column in range(row):
            dist = torch.linalg.vector_norm(mic_pos[:, row] - mic_pos[:, column], dim=-1).to(torch.float32)
            rest = _coherence(dist, wave_number) - sum(factor[row][k] * factor[column][k] for k in range(column))
            factor[row].append(rest / factor[column][column])
        factor[row].append((1 + DIFFUSE_LOADING - sum(part * part for part in factor[row])) ** 0.5)
    # reduce, as sum() would begin with 0 and pass once more over a spectrum.
    mixed = torch.stack([reduce(torch.add, (part * spectrum[:, k] for k, part in enumerate(parts)))
                         for parts in factor], 1)
    if microphones is not None:
        mixed = mixed * microphones.response(num_samples)
    return torch.fft.irfft(mixed, num_samples)


def _coherence(dist: Tensor, wave_number: Tensor) -> Tensor:
    """sin(k d) / (k d) of dist [batch] m at wave_number [freq] rad/m, [batch, freq]."""
    # torch.sinc has no vector instructions on a CPU: this takes a fifth of its time, product and clamp included.
    phase = (dist[:, None] * wave_number).clamp(min=1e-6)              # at 0 Hz and in one place, where it is 1
    return phase.sin() / phase


def _valid(heard: Tensor, valid: Tensor, in_place: bool) -> Tensor:
    """What is heard in valid scenes. Those that break their law may render as NaN, and NaN times a weight of 0 is NaN:
    they fall silent. in_place: where it is; if not, a part of a longer transform gets a place of its own."""
    in_place = in_place or heard.is_contiguous()
    if in_place and runtime.prefers_parts(heard.device) and valid.all():
        return heard                                                    # nearly always, for one pass less
    return heard.masked_fill_(~valid, 0.0) if in_place else torch.where(valid, heard, 0.0)


def _noise_scale(noise: Tensor, power: Tensor, snr: Tensor) -> Tensor:
    """The factor [batch, 1, 1] that brings noise [batch, mic, sample] `snr` [batch] dB below power [batch]."""
    ratio = power / noise.square().mean((1, 2)).clamp(min=1e-20)
    return torch.sqrt(ratio * 10 ** (-snr / 10))[:, None, None]


def mix(dry: Tensor, rirs: RirBatch, scenes: SceneBatch, draw: MixtureDraw, fused: bool = False,
        out: Tensor | None = None, early_out: Tensor | None = None) -> MixtureBatch:
    """What the microphones hear, as long as the dry speech: dry [batch, src, sample] float32 through the RIRs; nothing
    in scenes that are not valid.

    fused: on a GPU with ssl_gpu.fused_convolve where that fits, which is for float32 without gradients, to a few
    roundings the same. out [batch, mic, sample], early_out [batch, mic, src, sample]: where audio and early are put, if
    there is such a place; without gradients.
    Raises ValueError when the shapes of dry speech, RIRs, scenes and draw do not belong together.
    """
    if dry.ndim != 3 or dry.shape[:2] != (rirs.full.shape[0], rirs.full.shape[2]):
        raise ValueError(f"dry speech [batch, src, sample] must match RIRs [batch, mic, src, tap], "
                         f"got {list(dry.shape)} and {list(rirs.full.shape)}")
    num_samples, heard = dry.shape[-1], [len(dry), rirs.full.shape[1], dry.shape[-1]]
    if len(scenes) != len(dry) or list(draw.gain.shape) != list(dry.shape[:2]):
        raise ValueError(f"scenes and draw must be of batch={len(dry)}, src={dry.shape[1]}, got {len(scenes)} scenes "
                         f"and gains {list(draw.gain.shape)}")
    for name in ("sensor", "diffuse"):                                  # which would be broadcast: noise heard twice
        noise = getattr(draw, name)
        if noise is not None and list(noise.shape) != heard:
            raise ValueError(f"the draw's {name} noise must be [batch, mic, sample] = {heard}, got {list(noise.shape)}")
    mics, speech, early = draw.microphones, None, None
    if scenes.mic_pos.shape[1] != heard[1] or (mics is not None and list(mics.gain.shape) != heard[:2]):
        raise ValueError(f"scenes and draw must be of mic={heard[1]} as the RIRs, got scenes of mic="
                         f"{scenes.mic_pos.shape[1]}"
                         + ("" if mics is None else f" and gains of microphones {list(mics.gain.shape)}"))
    valid = scenes.valid[:, None, None]
    fits = mics is None and rirs.early is None and dry.dtype == torch.float32
    fits = fits and not (dry.requires_grad or rirs.full.requires_grad or draw.gain.requires_grad)
    if fused and fits and runtime.is_gpu(dry.device):
        from ssl_gpu.fused_convolve import convolve_fused  # Triton is not everywhere where torch is
        speech = convolve_fused(dry, draw.gain, rirs.full[..., :rirs.full_end], num_samples, scenes.valid, out)
    if speech is None:
        dry = dry.to(torch.promote_types(dry.dtype, draw.gain.dtype))   # as their product would be
        speech = convolve_sources(dry, rirs.full[..., :rirs.full_end], num_samples, False, mics, None, out, draw.gain)
        speech = _valid(speech, valid, out is not None)
        if rirs.early is not None:
            early = rirs.early[..., :rirs.early_end]
            early = convolve_sources(dry, early, num_samples, True, mics, None, early_out, draw.gain)
            early = _valid(early, valid[..., None], early_out is not None)
    audio, noises = speech, []
    if draw.sensor is not None:
        noises.append((draw.sensor, draw.sensor_snr))
    if draw.diffuse is not None:
        noises.append((diffuse_noise(draw.diffuse, scenes.mic_pos, rirs.sample_rate, mics), draw.diffuse_snr))
    if noises:
        power = speech.square().mean((1, 2))
    for noise, snr in noises:
        audio = torch.addcmul(audio, noise, _noise_scale(noise, power, snr), out=out)
    return MixtureBatch(audio, early, scenes, rirs.sample_rate, draw.sensor_snr, draw.diffuse_snr)
