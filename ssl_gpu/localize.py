"""Where the talkers of a recording are: python -m ssl_gpu.localize RECORDING [CHECKPOINT].

RECORDING is any file that soundfile reads, with two channels, one per microphone, or more and --channels to choose two.
CHECKPOINT is a run, its checkpoint.pt or a folder of ssl_gpu.pretrained; without it the weights in the package listen.

Each window of the recording (all of it if it is at most two training clips long, else clips that overlap by half) gets
one angle per talker, with half of what the central 80 % of its distribution spans as its spread. The number of talkers
is not found out: it is the one of the training, two by default, and all are assumed to speak in every window. An angle
is a cone angle, between the talker's direction and the line through the microphones: 0 degrees lie on the line beyond
the second of the two channels, 180 beyond the first, 90 across. Front and back, above and below sound the same to two
microphones. The labels of the training are Gaussians (target.sigma_deg), which the spread never gets much below.

--json has for every window start_s and end_s, level_db (relative to full scale, of the sum of both channels' powers
without their offsets), angle_deg and spread_deg of each talker, and counts, which is false where the window is 40 dB
quieter than the loudest: it is then left out of median_deg.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

if __name__ == "__main__":
    from ssl_gpu.commandline import begin_command
    begin_command()                                                    # before torch is loaded

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.checkpoint import write_json
from ssl_gpu.commandline import Parser, bar_interval, end_with
from ssl_gpu.config import RunConfig, is_override
from ssl_gpu.corpus import resample, resample_problem
from ssl_gpu.doa import cell_edges, decode, quantile
from ssl_gpu.localizer import Localizer, Target
from ssl_gpu.model import ModelKind, shortest_clip
from ssl_gpu.outputs import output_file, write_each
from ssl_gpu.pretrained import load_pretrained, spacing_text, tell_spacing

REAL_SPEED_OF_SOUND = 343.0  # m/s, in air of 20 degrees C; the rooms of the training have acoustics.SPEED_OF_SOUND
SPACING_M = (0.001, 10.0)    # from a MEMS pair to two ends of a hall; beyond it a unit was mistaken
SPEEDS = (100.0, 2000.0)     # m/s; sulphur hexafluoride has 134, sea water 1,500
TRAINED_M = (0.0031, 1.4)    # spacings that configs/patches.yaml has rooms for, and more than its jitter
SPREAD_SHARE = 0.8           # of a distribution, in its middle
MAX_CLIPS = 10               # of a window: the memory of the attention grows with the square of its length
FORWARD_S = 15.0             # how much audio is in the network at a time
BLOCK = 1 << 18              # samples of a file in float64, or in all its channels, at a time
# Relative; beyond these a line advises to train. The packaged weights, told of the spacing, have 2.1 / 2.1 degrees at
# 20 % less than that of their training, 1.5 / 1.3 at it, 2.3 / 1.7 at half as much more, the widest tried; but 2.9 and
# 2.7 at 30 % less, 4.0 / 4.4 at half of it (python -m benchmarks.localize_windows). 343 m/s for 340 are another 1 %.
SPACING_TOLERANCE = (-0.21, 0.51)
BAR_S = 2.0                  # of work without a progress bar
LEAST_S = 0.1                # of a recording or a window: in 0.5 s the error is five to six times that in 3 s
SAME_CHANNELS = 1e-5         # share of a channel's energy that the other one, scaled, does not explain: -50 dB
SILENT = 1e-3                # amplitude of a dead channel relative to the other: -60 dB
FULL_SCALE = (0.999, 1.001)  # amplitudes of samples that clip; a file of floats may have louder ones, which do not
# Codecs, as soundfile has them, that store what two channels share. At soundfile's own rates Vorbis and Opus made
# 16.2 / 90.2 and 14.1 / 87.0 degrees of 10.9 / 16.4 in wav, and missed 12.0 / 107.9 by 4 at most; MP3 of 35 kbit/s
# missed by 10 (mixtures of ssl_gpu.simulate --wav and two noises, heard by the packaged weights; no file).
TOGETHER = {"VORBIS": "Vorbis", "OPUS": "Opus", "MPEG_LAYER_II": "MP2", "MPEG_LAYER_III": "MP3"}
QUIET_DB = 40.0              # a window this far below the loudest one does not count in the median


@dataclass(frozen=True, eq=False)
class Recording:
    """Two channels of a file: audio [mic=2, sample] float32 at sample_rate (Hz), the rate of the model; channels are
    their numbers in the file, from 1. warnings: what may spoil the result, one line each."""

    audio: Tensor
    sample_rate: int
    file_rate: int
    channels: tuple[int, int]
    warnings: tuple[str, ...]

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return self.audio.shape[-1] / self.sample_rate


@dataclass(frozen=True, eq=False)
class Estimates:
    """What was heard, window by window: start_s, end_s and level_db (of the sum of both channels' powers without their
    offsets, relative to full scale) [window]; angle_deg, ascending, and spread_deg [window, track]; counts [window]
    bool, False for what is too quiet to count; median_deg [track] over the windows that count."""

    start_s: Tensor
    end_s: Tensor
    level_db: Tensor
    counts: Tensor
    angle_deg: Tensor
    spread_deg: Tensor
    median_deg: Tensor


def read_recording(path: str, channels: Sequence[int] | None, sample_rate: int) -> Recording:
    """Two channels of an audio file, resampled to `sample_rate` (Hz).

    channels: their numbers from 1, first and second microphone; None for the two that a file of two has.
    Raises ValueError, in one line, for what is no audio, has no samples, not these channels, samples that are not
    finite or nothing but silence, and for a rate that cannot be turned into the model's.
    """
    try:
        with open(path, "rb"):                                          # soundfile's error does not say why
            pass
        with soundfile.SoundFile(path) as file:
            pair, file_rate, codec = _choose(path, channels, file.channels), file.samplerate, file.subtype
            index = [number - 1 for number in pair]
            # Block by block: of an hour of eight channels, only the two are held.
            blocks = [block.T[index] for block in file.blocks(BLOCK, dtype="float32", always_2d=True)]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (RuntimeError, TypeError) as error:                          # TypeError: a .raw file, which says no rate
        raise ValueError(f"{path} is no audio that can be read (wav, flac, ogg, opus, mp3): "
                         f"{' '.join(str(error).split())}") from error
    if not blocks:
        raise ValueError(f"{path} holds no samples")
    audio = np.concatenate(blocks, 1)                                   # [mic, sample]
    del blocks                                                          # hundreds of MB of a long file
    finite = np.isfinite(audio).all(1)
    if not finite.all():
        raise ValueError(f"{path} holds samples that are not finite, in channel {pair[int(finite.argmin())]}")
    if audio.shape[1] > 1 and (audio == audio[:, :1]).all():
        what = "a constant offset" if audio.any() else "silence"
        raise ValueError(f"{path} holds nothing but {what} in channels {pair[0]} and {pair[1]}")
    if (problem := resample_problem(file_rate, sample_rate)) is not None:
        raise ValueError(f"{path}: {problem}")
    warnings = _clipping(audio) + _alike(audio, pair)
    if codec in TOGETHER:
        warnings.append(f"the recording is {TOGETHER[codec]}, which codes two channels together and may move talkers, "
                        f"or put one near 90 degrees, the more so the fewer bits it has: use wav or flac")
    if file_rate < sample_rate:
        warnings.append(f"the recording ends at {file_rate / 2:g} Hz, the model was trained up to {sample_rate / 2:g}")
    if file_rate != sample_rate:
        audio = resample(audio, file_rate, sample_rate)
    return Recording(torch.from_numpy(audio), sample_rate, file_rate, pair, tuple(warnings))


def _choose(path: str, channels: Sequence[int] | None, available: int) -> tuple[int, int]:
    """The two channels to use, from 1. Raises ValueError where there are not these two."""
    if available < 2:
        raise ValueError(f"{path} must have two channels, one per microphone, it has one")
    if channels is None:
        if available > 2:
            raise ValueError(f"{path} has {available} channels, say by --channels I J which two are the microphones")
        return 1, 2
    first, second = channels
    for number in channels:
        if not 1 <= number <= available:
            raise ValueError(f"--channels must be from 1 to {available}, the channels of {path}, got {number}")
    if first == second:
        raise ValueError(f"--channels must be two different ones, got {first} twice")
    return first, second


def _clipping(audio: np.ndarray) -> list[str]:
    """A line where audio [mic=2, sample] stays at full scale for two samples or more; a peak only touches it, and
    floats of which more are beyond it have another."""
    low, high = FULL_SCALE
    at_full, beyond, stuck = 0, 0, False
    for block in np.array_split(audio, audio.shape[1] // BLOCK + 1, 1):
        size = np.abs(block)
        full = (size >= low) & (size <= high)
        at_full, beyond = at_full + int(full.sum()), beyond + int((size > high).sum())
        stuck |= bool((full[:, 1:] & (block[:, 1:] == block[:, :-1])).any())
    share = 100 * at_full / audio.size
    return [f"the recording clips: {f'{share:.2g}' if share < 10 else f'{share:.0f}'} % of its samples are at full "
            f"scale"] if stuck and at_full > beyond else []


def _alike(audio: np.ndarray, pair: tuple[int, int]) -> list[str]:
    """A line where there are not two different channels in audio [mic=2, sample], offsets apart, which some converters
    have and the network does not hear."""
    gram, offset = np.zeros((2, 2)), audio.mean(1, dtype=np.float64, keepdims=True)
    for block in np.array_split(audio, audio.shape[1] // BLOCK + 1, 1):
        block = block - offset
        gram += block @ block.T
    power = np.diag(gram)
    dead = int(power.argmin())
    if power[dead] <= SILENT ** 2 * power.max():
        return [f"channel {pair[dead]} is silent"]
    if 1 - gram[0, 1] ** 2 / power.prod() >= SAME_CHANNELS:
        return []
    if gram[0, 1] < 0:
        return [f"channel {pair[1]} is channel {pair[0]} with its polarity reversed: there is no direction in them"]
    return ["the two channels are identical: there is no direction in them"]


def tune(localizer: Localizer, cfg: RunConfig, spacing_m: float, speed_of_sound: float) -> list[str]:
    """Tells the localiser how far apart the microphones are (m), and how fast sound is there (m/s); in place.

    All that matters to the front end is the travel time, so its grid of delays is built anew, for the spacing that at
    the simulator's speed of sound takes as long. Returns warnings, in terms of that time and that spacing. The original
    model has no such grid, it has learned the spacing of its training: it is left as it is.
    Raises ValueError for a spacing that is not from 1 mm to 10 m and a speed that is not from 100 to 2,000 m/s.
    """
    for name, value, (low, high), unit in (("--spacing", spacing_m, SPACING_M, "m"),
                                           ("--speed-of-sound", speed_of_sound, SPEEDS, "m/s")):
        if not low <= value <= high:
            raise ValueError(f"{name} must be from {low:g} to {high:g} {unit}, got {value:g}")
    heard, trained = spacing_m * SPEED_OF_SOUND / speed_of_sound, cfg.scene.aperture
    tell_spacing(localizer, cfg, heard)
    told = (f"--spacing {spacing_m:g} at --speed-of-sound {speed_of_sound:g} is {1e3 * spacing_m / speed_of_sound:.3g} "
            f"ms from microphone to microphone, as {heard:.3g} m are at the {SPEED_OF_SOUND:g} m/s of the training")
    if cfg.model.kind is ModelKind.ORIGINAL and abs(heard / trained - 1) > 0.02:
        return [f"{told}: model.kind=original has learned {trained:.3g} m and cannot be told of another spacing, its "
                f"angles are wrong"]
    if not SPACING_TOLERANCE[0] <= heard / trained - 1 <= SPACING_TOLERANCE[1]:
        low, high = TRAINED_M
        advice = f"training reaches from {low:g} to {high:g} m; is it in metres?" if not low <= heard <= high else (
            f"for better angles: python -m ssl_gpu.train configs/patches.yaml speech.train=DIR "
            f"speech.eval=OTHER_DIR scene.mic_spacing_m={heard:.3g} train.init=packaged train.lr=1e-3 "
            f"train.noise_warmup=0 train.evaluations=1 eval.num_clips=100 train.max_minutes=10")
        return [f"{told}, far from its {trained:.3g} m; {advice}"]
    return []


def windows(num_samples: int, clip: int, length: int | None, hop: int | None) -> tuple[list[int], int]:
    """The first sample of each window, and how many samples a window has.

    clip: samples in a clip of the training. length, hop: those asked for; without either, all is one window if it is
    at most two clips long, else windows of a clip; hop, at most a window, is half of it. What the last full window
    leaves over gets one more that ends with the recording: every sample is heard.
    """
    if length is None:
        length = num_samples if hop is None and num_samples <= 2 * clip else clip
    length = min(length, num_samples)
    hop = max(1, length // 2) if hop is None else hop
    starts = list(range(0, num_samples - length + 1, hop))
    if starts[-1] + length < num_samples:
        starts.append(num_samples - length)
    return starts, length


@torch.no_grad()
def estimate(localizer: Localizer, recording: Recording, starts: Sequence[int], length: int,
             shortest: int) -> Estimates:
    """The angles in every window of `length` samples, filled up with zeros to the `shortest` that the network takes.

    Not to a clip of the training, which costs accuracy; how much, and what short windows cost by themselves, is
    measured by python -m benchmarks.localize_windows WEIGHTS.
    The localiser must be in eval mode and on the CPU.
    Raises FloatingPointError when the network gives a NaN or an infinity.
    """
    rate, audio = recording.sample_rate, recording.audio
    padding = max(shortest - length, 0)
    batch = max(1, int(FORWARD_S * rate / (length + padding)))
    power, logits = [], []
    # Of what takes longer than BAR_S, as two minutes do, which took 41 s of a busy core.
    with tqdm(desc="listening", total=len(starts), unit="window", delay=BAR_S, mininterval=bar_interval()) as bar:
        for index in range(0, len(starts), batch):
            part = torch.stack([audio[:, start:start + length] for start in starts[index:index + batch]])
            part = part - part.mean(-1, keepdim=True)  # an offset of -60 dB is louder than pauses, and ends in a step
            power.append(part.double().square().mean(-1).sum(-1))
            logits.append(localizer.hear(torch.nn.functional.pad(part, (0, padding))))
            bar.update(len(part))
    logits, level_db = torch.cat(logits), 10 * torch.log10(torch.cat(power).clamp(min=1e-12))
    if not torch.isfinite(logits).all():
        raise FloatingPointError("the network's output is not finite: these weights cannot be used")
    angle, spread = read_tracks(localizer, logits)
    start_s = torch.tensor(starts, dtype=torch.float64) / rate
    counts = level_db >= level_db.max() - QUIET_DB
    return Estimates(start_s, start_s + length / rate, level_db, counts, angle.rad2deg(), spread.rad2deg(),
                     angle[counts].quantile(0.5, 0).rad2deg())


def read_tracks(localizer: Localizer, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [window, track, angle] -> angle, ascending, and spread, each [window, track] rad."""
    angle = decode(logits.flatten(0, 1)[:, None], localizer.grid, localizer.target.decoding).view(logits.shape[:2])
    probability, edges = torch.softmax(logits.float(), -1), cell_edges(localizer.grid)
    low, high = (quantile(probability, edges, 0.5 + side * SPREAD_SHARE / 2) for side in (-1, 1))
    order = angle.argsort(-1)                                           # a spread stays with its angle
    return angle.gather(-1, order), ((high - low) / 2).gather(-1, order)


def localize(args: argparse.Namespace) -> dict[str, Any]:
    """Does what the command line says; the content of --json. Raises ValueError with a line for the user."""
    for word in (args.recording, args.checkpoint):
        if word is not None and is_override(word):
            raise ValueError(f"recording and checkpoint must be paths, no section.key=value, got {word}; a spacing is "
                             f"told by --spacing, how weights are read by ssl_gpu.pretrained, which exports them")
    localizer, cfg, about = load_pretrained(args.checkpoint)
    rate, clip = cfg.rir.sample_rate, round(cfg.speech.clip_s * cfg.rir.sample_rate)
    spacing = cfg.scene.aperture if args.spacing is None else args.spacing
    warnings = tune(localizer, cfg, spacing, args.speed_of_sound)
    window, hop = (_in_samples(name, seconds, low, MAX_CLIPS * cfg.speech.clip_s, rate)
                   for name, seconds, low in (("--window", args.window, LEAST_S), ("--hop", args.hop, 0.01)))
    longest = clip if window is None else window
    if hop is not None and hop > longest:
        raise ValueError(f"--hop must be at most the window of {longest / rate:g} s, or what is between two windows is "
                         f"not heard, got {args.hop:g}")
    recording = read_recording(args.recording, args.channels, rate)
    if recording.duration_s < LEAST_S:
        raise ValueError(f"{args.recording} must be at least {LEAST_S:g} s long, got {recording.duration_s:.2g} s")
    warnings += recording.warnings
    starts, length = windows(recording.audio.shape[-1], clip, window, hop)
    if length < clip:
        what = "recording" if length == recording.audio.shape[-1] else "window"
        warnings.append(f"the {what} of {length / rate:.3g} s is shorter than the {cfg.speech.clip_s:g} s of the "
                        f"training: expect larger errors")
    found = estimate(localizer, recording, starts, length, shortest_clip(cfg.model, cfg.features))
    keys = ("start_s", "end_s", "level_db", "counts", "angle_deg", "spread_deg")
    rows = zip(*(getattr(found, key).tolist() for key in keys))
    return {"recording": args.recording, "duration_s": recording.duration_s, "file_rate_hz": recording.file_rate,
            "channels": list(recording.channels), "model": about, "spacing_m": spacing,
            "trained_spacing_m": cfg.scene.aperture, "speed_of_sound_m_s": args.speed_of_sound,
            "talkers": cfg.scene.num_src, "angle": cfg.target.angle.value,
            "convention": convention(cfg.target.angle, recording.channels),
            "windows": [dict(zip(keys, row)) for row in rows], "median_deg": found.median_deg.tolist(),
            "warnings": warnings}


def _in_samples(name: str, seconds: float | None, low: float, high: float, rate: int) -> int | None:
    """Seconds of the command line as samples, None as None. Raises ValueError for what is not from low to high."""
    if seconds is None:
        return None
    if not low <= seconds <= high:
        raise ValueError(f"{name} must be from {low:g} to {high:g} s, got {seconds:g}")
    return round(seconds * rate)


def convention(angle: Target, channels: tuple[int, int]) -> str:
    """What the numbers mean, in one line; channels are those of the first and the second microphone."""
    ends = (f"0 = on the line of the microphones beyond that of channel {channels[1]}, 180 = beyond channel "
            f"{channels[0]}, 90 = across")
    if angle is Target.CONE:
        return f"cone angles in degrees, {ends}; front and back, above and below sound the same"
    return f"azimuths in degrees, of talkers at the heights of the training, {ends}; front and back sound the same"


def report(result: dict[str, Any]) -> str:
    """The result of `localize` as text."""
    first, second = result["channels"]
    tracks = range(1, result["talkers"] + 1)
    lines = [f"{result['recording']}: {result['duration_s']:.2f} s at {result['file_rate_hz']} Hz, microphones: "
             f"channels {first} and {second}, {spacing_text(result['spacing_m'])} apart, c = "
             f"{result['speed_of_sound_m_s']:g} m/s",
             result["model"],
             f"{result['talkers']} talkers are assumed, the spread is half of the central {100 * SPREAD_SHARE:.0f} %",
             *result["convention"].split("; "),
             f"{'from s':>9}{'to s':>9}" + "".join(f"{f'talker {track}':>16}" for track in tracks)]
    for row in result["windows"]:
        cells = (f"{f'{angle:.1f} +- {spread:.1f}':>16}"
                 for angle, spread in zip(row["angle_deg"], row["spread_deg"]))
        lines.append(f"{row['start_s']:9.2f}{row['end_s']:9.2f}" + "".join(cells)
                     + ("" if row["counts"] else "  quiet, not counted"))
    counted = sum(row["counts"] for row in result["windows"])
    lines.append(f"{f'median of {counted}':>18}" + "".join(f"{angle:>16.1f}" for angle in result["median_deg"]))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m ssl_gpu.localize", description=__doc__)
    parser.add_argument("recording", help="an audio file of two or more channels")
    parser.add_argument("checkpoint", nargs="?",
                        help="a run, its checkpoint.pt, or a folder of ssl_gpu.pretrained (default: the weights in the "
                             "package)")
    parser.add_argument("--spacing", type=float, metavar="M",
                        help=f"distance of the two microphones in m, {SPACING_M[0]:g} to {SPACING_M[1]:g} (default: "
                             "that of the training)")
    parser.add_argument("--channels", type=int, nargs=2, metavar=("I", "J"),
                        help="the channels, counted from 1, of the first and the second microphone (default: 1 2, of a "
                             "file with two channels)")
    parser.add_argument("--speed-of-sound", type=float, metavar="C", default=REAL_SPEED_OF_SOUND,
                        help=f"in m/s, {SPEEDS[0]:g} to {SPEEDS[1]:g} (default: %(default)g, of air at 20 degrees C; "
                             f"the rooms of ssl_gpu.simulate have {SPEED_OF_SOUND:g})")
    parser.add_argument("--window", type=float, metavar="S",
                        help=f"length of a window in s, 0.1 to {MAX_CLIPS} training clips (default: without "
                             "--hop all of a recording of at most two training clips, else one clip)")
    parser.add_argument("--hop", type=float, metavar="S",
                        help="from the start of a window to that of the next in s, at least 0.01 and at most a window "
                             "(default: half of it)")
    parser.add_argument("--json", metavar="FILE", help="write the result there as well")
    args = parser.parse_intermixed_args(arguments)
    try:
        target = output_file("--json", args.json)                       # before the work
        result = localize(args)
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the results", file=sys.stderr)
        return 130
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    outputs = [("the result", lambda: print(report(result), flush=True))]
    if target is not None:
        outputs.append((args.json, partial(write_json, target, result)))
    return write_each(outputs)


if __name__ == "__main__":
    end_with(main)
