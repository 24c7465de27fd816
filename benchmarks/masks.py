"""What true masks would bring: GCC-PHAT that is told, bin by bin, how much of the sound is a talker's direct sound.

    python -m benchmarks.masks speech.eval=DIR [--sets e1 e1n5 ...] [--clips N] [--json FILE]

Localisers by masks estimate, for every bin of a spectrogram, what belongs to a talker, and weigh the phases by that.
Here the masks are the true ones, of the talker's direct sound (and what follows it within 1 ms, which is seldom
anything) against everything else: reverberation, the other talker, noise. Nobody has them. Phases are averaged over the
clip. How the masks are applied decides, so none of these is a bound:

ideal ratio mask: phases weighed by direct / (direct + rest); by its square and fourth power, which leave less to the
    many bins that are mostly noise.
ideal binary mask: those bins alone in which the direct sound is the louder part.
likelihood: cross-spectra weighed by direct / (rest (2 direct + rest)): of direct sound and a rest that are independent,
    Gaussian, alike at both microphones, and of the power that they have in that very bin.
"""
from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import told_command
from ssl_gpu import runtime
from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.baselines import BAND_HZ, HOP, N_FFT
from ssl_gpu.checkpoint import write_json
from ssl_gpu.clips import Truth
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.config import RunConfig, apply_overrides, from_mapping
from ssl_gpu.doa import angle_grid, sorted_angles
from ssl_gpu.evaluate import NO_RUN, eval_speech
from ssl_gpu.localizer import scene_law
from ssl_gpu.mixture import MixtureConfig, mix
from ssl_gpu.outputs import output_file, write_each
from ssl_gpu.protocol import (LAW, NOISES, SAMPLE_RATE, SEEDS, FraDraw, SetOptions, draw_fresh, fra_draws, num_clips)
from ssl_gpu.rir import RirConfig, render_rir
from ssl_gpu.scoring import score_angles

DIRECT = RirConfig(early_window_ms=(-1, 1))
LEAST = 1e-20  # of a power
# Of a cross-spectrum [clip, freq, frame] and the powers of direct sound and rest: what the map of angles is made of.
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ideal ratio mask": lambda cross, direct, rest: phase(cross) * share(direct, rest),
    "its square": lambda cross, direct, rest: phase(cross) * share(direct, rest) ** 2,
    "its fourth power": lambda cross, direct, rest: phase(cross) * share(direct, rest) ** 4,
    "ideal binary mask": lambda cross, direct, rest: phase(cross) * (direct > rest),
    "likelihood": lambda cross, direct, rest: cross * direct / (rest * (2 * direct + rest)).clamp(min=LEAST)}
GRID_DEG = 0.25
KEYS = ("cone_mae_deg", "cone_median_deg", "acc_at_5", "acc_at_10")


def phase(cross: Tensor) -> Tensor:
    """Of a cross-spectrum, any shape, as complex numbers of magnitude 1, or 0 of silence."""
    return cross / cross.abs().clamp(min=LEAST)


def share(direct: Tensor, rest: Tensor) -> Tensor:
    """The ideal ratio mask, in 0..1, of two powers of one shape."""
    return direct / (direct + rest).clamp(min=LEAST)


def draws_of(name: str, options: SetOptions) -> Iterator[FraDraw]:
    """Of the sets e1, e1p and e1n5."""
    mixture = NOISES.get(name, MixtureConfig())
    return fra_draws(options, SEEDS["e1p" if name == "e1p" else "e1"], *draw_fresh(options, name == "e1p"), mixture)


def spectra(audio: Tensor) -> Tensor:
    """[..., sample] -> [..., freq, frame], the frequencies of BAND_HZ, as the baselines have them."""
    window = torch.hann_window(N_FFT, dtype=audio.dtype, device=audio.device)
    spectrum = torch.stft(audio.flatten(0, -2), N_FFT, HOP, window=window, center=False, return_complex=True)
    return spectrum[:, band(audio.device)].unflatten(0, audio.shape[:-1])


def band(device: torch.device) -> Tensor:
    """Indices of the frequencies of BAND_HZ."""
    low, high = math.ceil(BAND_HZ[0] * N_FFT / SAMPLE_RATE), math.floor(BAND_HZ[1] * N_FFT / SAMPLE_RATE)
    return torch.arange(low, high + 1, device=device)


def angles(drawn: FraDraw, device: torch.device) -> dict[str, Tensor]:
    """By every weighting the cone angle of each talker, [clip, src] rad."""
    rooms = drawn.rooms.to(device)
    mixture = mix(drawn.dry.to(device), render_rir(DIRECT, rooms, drawn.images.to(device)), rooms,
                  drawn.mixture.to(device))
    both = spectra(mixture.audio)                                       # [clip, mic, freq, frame]
    cross, grid = both[:, 1] * both[:, 0].conj(), angle_grid(GRID_DEG).to(device)
    steering = 2 * math.pi * SAMPLE_RATE / N_FFT * band(device)[:, None] * (LAW.aperture / SPEED_OF_SOUND * grid.cos())
    found: dict[str, list[Tensor]] = {name: [] for name in WEIGHTINGS}
    for src in range(drawn.dry.shape[1]):
        own = spectra(mixture.early[:, :, src])
        direct, rest = (part.abs().square().mean(1) for part in (own, both - own))
        for name, weigh in WEIGHTINGS.items():
            weighted = weigh(cross, direct, rest).sum(-1)
            response = weighted.real @ steering.cos() + weighted.imag @ steering.sin()
            found[name].append(grid[response.argmax(-1)])
    return {name: torch.stack(columns, -1).cpu() for name, columns in found.items()}


@torch.no_grad()
def measure(name: str, options: SetOptions) -> dict[str, dict[str, object]]:
    """By every weighting the errors on a set, as ssl_gpu.scoring has them."""
    parts, truth = [], []
    with tqdm(desc=name, total=num_clips(name, options), unit="clip") as bar:
        for drawn in draws_of(name, options):
            parts.append(angles(drawn, options.device))
            truth.append(drawn.rooms)
            bar.update(len(drawn.rooms))
    azimuth, cone = (torch.cat([getattr(rooms, key) for rooms in truth]).double() for key in ("azimuth", "cone_angle"))
    true, law = Truth(sorted_angles(azimuth), sorted_angles(cone), torch.arange(len(cone)), {}), scene_law(LAW, 0)
    rows = {}
    for weighting in WEIGHTINGS:
        heard = sorted_angles(torch.cat([part[weighting] for part in parts]).double())
        scores = score_angles(law.angle_map.cone_to_azimuth(heard), heard, true)
        interval = scores["interval_95"]
        rows[weighting] = {key: scores[key] for key in KEYS} | {"interval_95": interval and interval["cone_mae_deg"]}
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.masks", description=__doc__)
    parser.add_overrides("speech.eval=DIR, train.device=cuda")
    parser.add_argument("--sets", nargs="+", choices=("e1", "e1p", "e1n5"), default=["e1", "e1n5"])
    parser.add_argument("--clips", type=int, metavar="N", help="the first N of each set (default: all 2,000)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_intermixed_args(arguments)
    try:
        path = output_file("--json", args.json)
        cfg = from_mapping(RunConfig, apply_overrides(NO_RUN, args.overrides))
        if args.clips is not None and args.clips < 1:
            raise ValueError(f"--clips must be >= 1, got {args.clips}")
        options = SetOptions(eval_speech(cfg), runtime.pick_device(cfg.train.device, "train.device"), args.clips)
        sets = {name: measure(name, options) for name in args.sets}
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, rows in sets.items():
        for weighting, row in rows.items():
            print(f"{name}, {weighting}: cone MAE {' / '.join(f'{x:.2f}' for x in row['cone_mae_deg'])}, within 10 "
                  f"degrees {100 * row['acc_at_10']:.1f} %")
    content = {"command": told_command("masks", arguments), "sets": sets}
    return write_each([(str(path), lambda: write_json(path, content))] if path else [])


if __name__ == "__main__":
    end_with(main)
