"""Built-in synthetic voices: many talkers saying nothing in particular, as batched tensor operations on any device.

The classical source-filter account of speech (Fant 1960; Klatt 1980). A glottal pulse train with a moving pitch and
white noise are the excitation; a short-time spectral envelope of four moving formants, or of a fricative's hiss, shapes
it; syllables, stop closures and pauses give it the rhythm of speech. It is there so that everything runs with no data:
what matters is pitch, a falling spectrum, onsets and pauses, since those decide what a microphone array can hear.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

CONTROL_RATE = 200  # Hz, of pitch, formants and levels: 5 ms, finer than any movement of the mouth
ROWS_SAMPLES = 1 << 21  # samples rendered at once: 8 MB of audio, about 0.4 GB with all intermediates
LEVEL = 0.05  # RMS re full scale, -26 dB: the usual level of read speech
PEAK = 0.9

# Voices by kind: male, female, child. Pitch ranges after Baken & Orlikoff (2000); tract scales after Peterson & Barney.
KIND_PROBABILITY = (0.45, 0.45, 0.10)
PITCH_LOW_HZ = (85.0, 165.0, 230.0)
PITCH_HIGH_HZ = (155.0, 255.0, 320.0)
FORMANT_SCALE = (1.0, 1.17, 1.35)
PITCH_SPREAD = 1.35  # no voiced frame leaves [pitch / PITCH_SPREAD, pitch * PITCH_SPREAD]

# F1, F2, F3 of ten American English vowels said by men (Peterson & Barney 1952, table II); F4 is the same for all.
VOWELS_HZ = (
    (270, 2290, 3010), (390, 1990, 2550), (530, 1840, 2480), (660, 1720, 2410), (730, 1090, 2440),
    (570, 840, 2410), (440, 1020, 2240), (300, 870, 2240), (640, 1190, 2390), (490, 1350, 1690),
)
F4_HZ = 3500.0

# What the fifth and higher resonances add (Fant 1960): 0.54 (f / 500 Hz)^2 dB below F4, here up to 12 dB, and above it
# whatever keeps the tract's response level rather than falling by the four formants' 48 dB per octave.
HIGHER_POLES_DB = 12.0
HIGHER_POLES_HZ = 4500.0
BANDWIDTH_HZ = (70.0, 100.0, 150.0, 250.0)


@dataclass(frozen=True, eq=False)
class Talkers:
    """What one voice keeps from utterance to utterance; every tensor is [row] float32, on one device.

    pitch_hz: mean fundamental. formant_scale: 1 for an average man, larger for a shorter vocal tract. open_quotient:
    share of the glottal cycle with the folds apart. return_phase: time constant of their closing, in cycles; longer is
    duller. breath: noise through the open folds, re the pulse. syllable_hz: speaking rate.
    """

    pitch_hz: Tensor
    formant_scale: Tensor
    open_quotient: Tensor
    return_phase: Tensor
    breath: Tensor
    syllable_hz: Tensor

    def rows(self, index: Tensor | slice) -> "Talkers":
        """The talkers at `index`, in its order."""
        return replace(self, **{field.name: getattr(self, field.name)[index] for field in fields(self)})


@dataclass(frozen=True, eq=False)
class VoiceParameters:
    """The random part of a batch of utterances: render_voices adds nothing of its own.

    Tensors over slots [row, slot] float32; a slot is a syllable (an onset, then a vowel) or a pause.
    end_s: when it ends, from the start of the utterance. onset_s: how long its consonant lasts. pause, fricative,
    plosive: 1 or 0. gain: level of the vowel. hiss_hz: centre of the fricative's noise. accent: pitch factor.
    formant_hz: [row, slot, 4] vowel targets. vibrato_hz, vibrato_phase (cycles), lead_s (how far into the first slot
    the utterance starts): [row]. jitter: [row, control] pitch factor at CONTROL_RATE. noise: [row, sample] white.
    """

    talkers: Talkers
    end_s: Tensor
    onset_s: Tensor
    pause: Tensor
    fricative: Tensor
    plosive: Tensor
    gain: Tensor
    hiss_hz: Tensor
    accent: Tensor
    formant_hz: Tensor
    vibrato_hz: Tensor
    vibrato_phase: Tensor
    lead_s: Tensor
    jitter: Tensor
    noise: Tensor
    sample_rate: int


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def draw_talkers(num_talkers: int, *, generator: torch.Generator) -> Talkers:
    """`num_talkers` voices on the generator's device: men and women equally often, some children."""
    device = generator.device
    shape = (num_talkers,)
    kind = torch.bucketize(
        torch.rand(shape, generator=generator, device=device),
        torch.tensor(KIND_PROBABILITY, device=device).cumsum(0)[:-1],
        right=True,
    )
    low, high = (torch.tensor(table, device=device)[kind] for table in (PITCH_LOW_HZ, PITCH_HIGH_HZ))
    return Talkers(
        pitch_hz=low * (high / low) ** _uniform(0, 1, shape, generator),
        formant_scale=torch.tensor(FORMANT_SCALE, device=device)[kind] * _uniform(0.93, 1.07, shape, generator),
        open_quotient=_uniform(0.5, 0.75, shape, generator),
        return_phase=_uniform(0.02, 0.07, shape, generator),
        breath=_uniform(0.02, 0.12, shape, generator),
        syllable_hz=_uniform(3.5, 5.5, shape, generator),
    )


def draw_voices(talkers: Talkers, num_samples: int, sample_rate: int, *, generator: torch.Generator) -> VoiceParameters:
    """One utterance of `num_samples` samples at `sample_rate` (Hz) for each row of `talkers`."""
    device, rows = generator.device, len(talkers.pitch_hz)
    # the shortest slot is 0.7 / 5.5 s, so that this many outlast the utterance and its lead-in
    slots = 2 + math.ceil(num_samples / sample_rate / (0.7 / 5.5))
    shape = (rows, slots)
    pause = torch.rand(shape, generator=generator, device=device) < 0.12
    pause = (pause & ~F.pad(pause[:, :-1], (1, 0), value=True)).float()  # none first and none twice: 0.7 s at most
    syllable_s = _uniform(0.7, 1.4, shape, generator) / talkers.syllable_hz[:, None]
    slot_s = torch.where(pause > 0, _uniform(0.2, 0.7, shape, generator), syllable_s)
    onset = torch.rand(shape, generator=generator, device=device)
    vowels = torch.tensor(VOWELS_HZ, device=device, dtype=torch.float32)
    vowel = torch.randint(len(VOWELS_HZ), shape, generator=generator, device=device)
    formant_hz = F.pad(vowels[vowel], (0, 1), value=F4_HZ)
    scatter = 1 + 0.05 * torch.randn((*shape, 4), generator=generator, device=device).clamp(-2, 2)
    controls = 2 + math.ceil(num_samples / sample_rate * CONTROL_RATE)
    return VoiceParameters(
        talkers=talkers,
        end_s=slot_s.double().cumsum(-1).float(),
        onset_s=_uniform(0.05, 0.11, shape, generator),
        pause=pause,
        fricative=(onset < 0.35).float(),
        plosive=((onset >= 0.35) & (onset < 0.65)).float(),
        gain=10 ** _uniform(-0.5, 0, shape, generator),
        hiss_hz=_uniform(2500, 6500, shape, generator),
        accent=2 ** _uniform(-2 / 12, 2 / 12, shape, generator),
        formant_hz=formant_hz * scatter * talkers.formant_scale[:, None, None],
        vibrato_hz=_uniform(4, 6, (rows,), generator),
        vibrato_phase=_uniform(0, 1, (rows,), generator),
        lead_s=_uniform(0, 0.7 / 5.5, (rows,), generator),
        jitter=1 + 0.006 * torch.randn((rows, controls), generator=generator, device=device).clamp(-3, 3),
        noise=torch.randn((rows, num_samples), generator=generator, device=device),
        sample_rate=sample_rate,
    )


def render_voices(params: VoiceParameters) -> Tensor:
    """The utterances as float32 [row, sample] in (-1, 1), at RMS LEVEL unless that would exceed PEAK."""
    num_samples, sample_rate = params.noise.shape[-1], params.sample_rate
    time_s = torch.arange(params.jitter.shape[-1], device=params.noise.device) / CONTROL_RATE
    pitch_hz, voiced, hiss = (
        _at_samples(track, num_samples, sample_rate)
        for track in (_pitch(params, time_s) * params.jitter, *_levels(params, time_s)[:2])
    )
    talkers = params.talkers
    cycles = (pitch_hz.double() / sample_rate).cumsum(-1)
    pulse = glottal_pulse((cycles - cycles.floor()).float(), talkers.open_quotient, talkers.return_phase)
    excitation = voiced * (pulse + talkers.breath[:, None] * params.noise) + hiss * params.noise
    audio = _shape(params, excitation)
    rms = audio.square().mean(-1, keepdim=True).sqrt()
    peak = audio.abs().amax(-1, keepdim=True)
    return audio * torch.minimum(LEVEL / rms.clamp_min(1e-9), PEAK / peak.clamp_min(1e-9))


def synthesize_voices(
    num_talkers: int, num_utterances: int, num_samples: int, sample_rate: int, *, generator: torch.Generator
) -> Tensor:
    """int16 [talker, utterance, sample] at `sample_rate` (Hz) on the generator's device, ROWS_SAMPLES at a time."""
    talkers = draw_talkers(num_talkers, generator=generator)
    row = torch.arange(num_talkers, device=generator.device).repeat_interleave(num_utterances)
    voices = torch.empty((len(row), num_samples), dtype=torch.int16, device=generator.device)
    for part in torch.arange(len(row)).split(max(1, ROWS_SAMPLES // num_samples)):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        params = draw_voices(talkers.rows(row[rows]), num_samples, sample_rate, generator=generator)
        voices[rows] = (render_voices(params) * 32768).round().to(torch.int16)
    return voices.view(num_talkers, num_utterances, num_samples)


def glottal_pulse(phase: Tensor, open_quotient: Tensor, return_phase: Tensor) -> Tensor:
    """The derivative of glottal flow at `phase` in [0, 1) [row, sample]: Rosenberg's pulse with a gradual closure.

    The flow rises as a cosine over two thirds of the open phase and falls faster over the rest; the abrupt end, -1
    here, excites the formants, and decays with time constant `return_phase` (cycles), which sets the spectral tilt.
    """
    end = open_quotient[:, None]
    top = end * (2 / 3)
    fall = end - top
    opening = fall / top * torch.sin(math.pi * phase / top)
    closing = -torch.sin(math.pi / 2 * (phase - top) / fall)
    closed = -((end - phase) / return_phase[:, None]).exp()
    return torch.where(phase < top, opening, torch.where(phase < end, closing, closed))


def _smoothstep(x: Tensor) -> Tensor:
    x = x.clamp(0, 1)
    return x * x * (3 - 2 * x)


def _slot_at(params: VoiceParameters, time_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At each time [time] of the utterance: the slot [row, time], seconds since its start, seconds until its end."""
    clock = time_s + params.lead_s[:, None]
    slot = torch.searchsorted(params.end_s, clock, right=True).clamp_max(params.end_s.shape[-1] - 1)
    start_s = F.pad(params.end_s, (1, -1))
    return slot, clock - start_s.gather(-1, slot), params.end_s.gather(-1, slot) - clock


def _glide(target: Tensor, slot: Tensor, since_s: Tensor) -> Tensor:
    """A track [row, time] that moves to each slot's target [row, slot], from the last, in the slot's first 0.12 s."""
    before = torch.cat([target[:, :1], target[:, :-1]], -1)
    return torch.lerp(before.gather(-1, slot), target.gather(-1, slot), _smoothstep(since_s / 0.12))


def _pitch(params: VoiceParameters, time_s: Tensor) -> Tensor:
    """Pitch in Hz [row, time]: falls after each breath, moves with the accents, trembles."""
    slot, since_s, _ = _slot_at(params, time_s)
    breath_end_s = (params.end_s * params.pause).cummax(-1).values.gather(-1, slot)
    since_breath_s = (time_s + params.lead_s[:, None] - breath_end_s).clamp_min(0)
    declination = 0.9 + 0.2 * (-since_breath_s / 1.5).exp()
    vibrato = 1 + 0.012 * torch.sin(2 * math.pi * (params.vibrato_hz[:, None] * time_s + params.vibrato_phase[:, None]))
    return params.talkers.pitch_hz[:, None] * declination * vibrato * _glide(params.accent, slot, since_s)


def _levels(params: VoiceParameters, time_s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels of voice and hiss, and how far the hiss rather than the vowel shapes the spectrum; each [row, time]."""
    slot, since_s, until_s = _slot_at(params, time_s)
    onset_s, pause, fricative, plosive, gain = (
        track.gather(-1, slot)
        for track in (params.onset_s, params.pause, params.fricative, params.plosive, params.gain)
    )
    speaking, unvoiced = 1 - pause, fricative + plosive
    since_vowel_s = since_s - unvoiced * onset_s
    attack = torch.where(unvoiced > 0, _smoothstep(since_vowel_s / 0.03), 0.3 + 0.7 * _smoothstep(since_s / 0.06))
    voiced = speaking * gain * attack * _smoothstep(until_s / 0.06)
    # a fricative hisses through its onset; a plosive is a silent closure with a burst in its last 20 ms
    hissing = _smoothstep(since_s / 0.03) * _smoothstep((onset_s - since_s) / 0.03 + 0.5)
    burst = _smoothstep((since_s - onset_s + 0.02) / 0.002) * _smoothstep((onset_s - since_s) / 0.02 + 0.2)
    hiss = speaking * gain * (0.4 * fricative * hissing + 0.6 * plosive * burst)
    return voiced, hiss, speaking * unvoiced * _smoothstep((onset_s - since_s) / 0.01 + 0.5)


def _at_samples(track: Tensor, num_samples: int, sample_rate: int) -> Tensor:
    """A track [row, control] at CONTROL_RATE, linearly interpolated to [row, sample] at `sample_rate` (Hz)."""
    position = torch.arange(num_samples, device=track.device, dtype=torch.float64) * (CONTROL_RATE / sample_rate)
    left = position.long()
    return torch.lerp(track[:, left], track[:, left + 1], (position - left).to(track.dtype))


def _shape(params: VoiceParameters, excitation: Tensor) -> Tensor:
    """Filter [row, sample] by a spectral envelope that follows the formants, by short-time Fourier transform.

    Each formant is the resonance 1 / (1 - (f / F)^2 + j f B / F^2) (Fant 1960), with its phase, so that it rings after
    the pulse and not before; 32 ms frames at 16 kHz hold the ringing of the narrowest (70 Hz: -60 dB in 31 ms).
    """
    n_fft = 2 ** math.ceil(math.log2(0.025 * params.sample_rate))
    hop = n_fft // 4
    window = torch.hann_window(n_fft, device=excitation.device)
    # zeros at the ends, so that there is a frame before the first sample and utterances shorter than a frame work
    padded = F.pad(excitation, (0, n_fft))
    spectrum = torch.stft(padded, n_fft, hop, window=window, pad_mode="constant", return_complex=True)
    time_s = torch.arange(spectrum.shape[-1], device=excitation.device) * (hop / params.sample_rate)
    freq_hz = torch.linspace(0, params.sample_rate / 2, n_fft // 2 + 1, device=excitation.device)[:, None]
    slot, since_s, _ = _slot_at(params, time_s)
    resonance = None
    for index, bandwidth_hz in enumerate(BANDWIDTH_HZ):
        formant_hz = _glide(params.formant_hz[..., index], slot, since_s)[:, None]
        ratio = freq_hz / formant_hz
        term = torch.complex(1 - ratio.square(), ratio * (bandwidth_hz / formant_hz))
        resonance = term if resonance is None else resonance.mul_(term)
    hiss_hz = params.hiss_hz.gather(-1, slot)[:, None]
    hiss = 1 / (1 + ((freq_hz - hiss_hz) / 1200).square())
    mix = _levels(params, time_s)[2][:, None]
    higher_poles = 10 ** ((0.54 * (freq_hz / 500).square()).clamp_max(HIGHER_POLES_DB) / 20)
    resonance /= higher_poles * (1 + (freq_hz / HIGHER_POLES_HZ) ** 8)
    above_mains = freq_hz.square() / (freq_hz.square() + 60.0**2)
    spectrum *= above_mains * (resonance.reciprocal_() * (1 - mix) + hiss * mix)
    audio = torch.istft(spectrum, n_fft, hop, window=window, length=padded.shape[-1])
    return audio[:, : excitation.shape[-1]]
