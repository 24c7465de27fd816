"""What each choice of RirConfig changes against the reference's law: one function per choice.

Each draws on the axes it is given and returns lines of numbers; ssl_gpu.fidelity is the command.
"""
from __future__ import annotations

import math
from dataclasses import replace
from typing import Callable, Sequence

import torch
from torch import Tensor

from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.bands import air_absorption_db, octave_centres
from ssl_gpu.directivity import OMNI_SHARE, LookVector, Pattern, look_vector
from ssl_gpu.laws import MAX_DIRECT_DB, Decay, ImageDirections, ImageRange, SrcDirections
from ssl_gpu.measure import decay_time, energy_decay
from ssl_gpu.original import RT60_S
from ssl_gpu.plots import GREY
from ssl_gpu.rir import RirConfig, draw_images, find_arrivals
from ssl_gpu.scene import make_scenes
from ssl_gpu.synthesis import LEAD
from ssl_gpu.trials import (AFTER, BEFORE, CHUNK, MEASURED, REFERENCE, decibels, diffuse_coherence, direct_tap,
                            late_coherence, measured, off_diffuse, one_room, random_rooms, rendered)

AIR = (20.0, 50.0)
ROOMS = ((2, 2, 2), (3, 3, 2.5), (6, 5, 3), (20, 2, 2.5), (10, 6, 4), (30, 20, 10))  # m
DISTANCES = (0.2, 0.3, 1.0, 3.0, 8.0)                                                   # m
BAND_RATIO = (0.5, 0.6, 0.8, 1.0, 0.9, 0.8, 0.6)
UNEVEN_RATIO = (0.5, 1.0, 0.5, 1.0, 0.5, 1.0, 0.5)


def image_directions(axes: Sequence, rooms: int, seed: int) -> list[str]:
    """Coherence of the late sound at two microphones 0.1 m apart."""
    lines, frequency = [], torch.arange(129).double() * 62.5
    for panel, name, apart in ((axes[0], "side by side", (0.05, 0, 0)), (axes[1], "one above the other", (0, 0, 0.05))):
        mics = [[centre + sign * step for centre, step in zip((2.0, 2.0, 1.2), apart)] for sign in (-1, 1)]
        for law, colour in ((ImageDirections.UPPER, BEFORE), (ImageDirections.SPHERE, AFTER)):
            cfg = replace(REFERENCE, image_directions=law)
            coherence = late_coherence(rendered(cfg, one_room(rooms, 0.6, mics), seed))
            panel.plot(frequency / 1e3, coherence, color=colour, label=law.value)
            lines.append(f"{law.value}, microphones {name}: coherence off sin(kd)/(kd) by "
                         f"{off_diffuse(coherence):.3f} rms")
        panel.plot(frequency / 1e3, diffuse_coherence(), ":", color="black", label="sin(kd) / (kd)")
        panel.set(title=f"late sound, 0.1 m {name}", xlabel="frequency (kHz)", ylabel="coherence (real part)")
        panel.legend(frameon=False)
    return lines


def src_directions(axes: Sequence, rooms: int, seed: int) -> list[str]:
    """Late level of patterned sources relative to an omnidirectional one."""
    def late(pattern: Pattern, law: SrcDirections) -> float:
        cfg = replace(MEASURED, src_pattern=pattern, src_directions=law)
        return sum(float(rirs.full[..., 1600:].double().square().sum())
                   for _, rirs in rendered(cfg, one_room(rooms, 0.4), seed))

    omni, lines = late(Pattern.OMNI, SrcDirections.SPHERE), []
    for place, (pattern, share) in enumerate(OMNI_SHARE.items()):
        diffuse = 10 * math.log10(share ** 2 + (1 - share) ** 2 / 3)
        level = {law: 10 * math.log10(late(pattern, law) / omni) for law in SrcDirections}
        for law, shift, colour in ((SrcDirections.PRODUCT, -0.2, BEFORE), (SrcDirections.SPHERE, 0.2, AFTER)):
            axes[0].bar(place + shift, level[law], 0.38, color=colour, label=None if place else law.value)
        axes[0].hlines(diffuse, place - 0.45, place + 0.45, color="black", label=None if place else "isotropic")
        lines.append(f"{pattern.value}: late level {level[SrcDirections.PRODUCT]:.2f} -> "
                     f"{level[SrcDirections.SPHERE]:.2f} dB (isotropic: {diffuse:.2f})")
    axes[0].set(title="late energy of patterned sources", ylabel="re omni (dB)")
    axes[0].set_xticks(range(len(OMNI_SHARE)), [pattern.value.replace("_", "\n") for pattern in OMNI_SHARE])
    axes[0].legend(frameon=False, loc="lower left")
    return lines


def look(axes: Sequence, rooms: int, seed: int) -> list[str]:
    """Angle between the vector that a pattern looks along and its orientation."""
    azimuth = (torch.arange(180, dtype=torch.float64) + 0.5) * 2 - 180
    height = (torch.arange(100, dtype=torch.float64) + 0.5) / 50 - 1    # cos(polar): equal areas of the sphere
    orientation = torch.stack(torch.meshgrid(torch.deg2rad(azimuth), torch.acos(height), indexing="ij"), -1)
    exact = look_vector(orientation, LookVector.EXACT)
    error = torch.rad2deg(torch.acos((exact * look_vector(orientation)).sum(-1).clamp(-1, 1)))
    polar = torch.rad2deg(torch.acos(height))
    filled = axes[0].contourf(azimuth, polar, error.T, range(0, 61, 10), cmap="viridis")
    axes[0].figure.colorbar(filled, ax=axes[0], label="degrees off")
    axes[0].set(title="reference", xlabel="azimuth (degrees)", ylabel="polar angle (degrees)")
    axes[0].invert_yaxis()
    share = (torch.arange(error.numel()) + 1) / error.numel()
    axes[1].plot(error.flatten().sort().values, share, color=BEFORE, label="reference")
    axes[1].plot((0, 0, 60), (0, 1, 1), color=AFTER, label="exact")
    axes[1].set(title="over the sphere", xlabel="at most so many degrees off", ylabel="share of orientations")
    axes[1].legend(frameon=False)
    return [f"reference: {float(error.mean()):.1f} degrees off on average, {float(error.median()):.1f} in the median, "
            f"{float(error.quantile(0.95)):.1f} for 1 of 20, {float(error.max()):.1f} at most; exact: 0"]


def decay(axes: Sequence, rooms: int, seed: int) -> list[str]:
    """T20 of random rooms, and the mean decay."""
    scenes, lines = random_rooms(4 * rooms, seed, 0.15, 1.0), []
    for law, colour in ((Decay.NOMINAL, BEFORE), (Decay.MEASURED, AFTER)):
        measures = measured(replace(REFERENCE, decay=law), scenes, seed)
        t20, t30, edt = (x[:, 0, 0] / scenes.rt60 for x in (measures.t20, measures.t30, measures.edt))
        error = torch.where(t20.isfinite(), (t20 - 1).abs(), torch.inf)
        axes[0].plot(scenes.rt60, t20, ".", color=colour, markersize=3, label=law.value)
        lines.append(f"{law.value}: T20/rt60 {float(t20.nanmean()):.3f}, T30/rt60 {float(t30.nanmean()):.3f}, "
                     f"EDT/rt60 {float(edt.nanmedian()):.3f} (median), DRR {float(measures.drr_db.mean()):.1f} dB; "
                     f"|T20/rt60 - 1| median {100 * float(error.median()):.1f} %, 9 of 10 below "
                     f"{100 * float(error.quantile(0.9)):.1f} %, all below {100 * float(error.max()):.1f} %")
        for rt60, style in ((0.15, "-"), (0.4, "--"), (1.0, ":")):
            power, room = 0, one_room(rooms, rt60)
            for _, rirs in rendered(replace(REFERENCE, decay=law), room, seed):
                power = power + rirs.full[:, 0].double().square().sum(0)
            curve = energy_decay(power.sqrt(), direct_tap(room, 16000)[0, 0])[0]
            time = torch.arange(len(curve)) / 16000 / rt60
            axes[1].plot(time[::8], curve[::8], style, color=colour, linewidth=1.2,
                         label=f"rt60 {rt60} s" if law is Decay.MEASURED else None)
    axes[0].axhline(1, color=GREY, linewidth=0.8)
    axes[0].set(title=f"{len(scenes)} random rooms", xlabel="rt60 (s)", ylabel="T20 / rt60", ylim=(0, 3.2))
    axes[0].legend(frameon=False, markerscale=3)
    axes[1].plot((0, 1), (0, -60), color=GREY, linewidth=0.8)
    axes[1].set(title="mean decay in 6 x 5 x 3 m, 2.4 m apart", xlabel="time / rt60", ylabel="energy left (dB)",
                xlim=(0, 1), ylim=(-60, 3))
    axes[1].legend(frameon=False)
    return [*lines, _raised(rooms, seed), *_decay_by_room(max(2, rooms // 2), seed)]


def _decay_by_room(rooms: int, seed: int) -> list[str]:
    """T20 where it is hardest to have: near sources, in dead and in large rooms. The worst distance of every room."""
    lines = []
    for room in ROOMS:
        for times in ((0.15,), (0.25, 0.5, 1.0)):
            found = {dist: _t20_errors(room, times, dist, rooms, seed) for dist in DISTANCES
                     if dist < 0.6 * math.hypot(*room)}
            median, most = (max(found, key=lambda dist: found[dist][which]) for which in (0, 1))
            lines.append(f"measured, {' x '.join(f'{side:g}' for side in room)} m, rt60 "
                         f"{' to '.join(f'{time:g}' for time in sorted({times[0], times[-1]}))} s, "
                         f"{min(found)} to {max(found)} m apart: |T20/rt60 - 1| at worst {found[median][0]:.1f} % in "
                         f"the median (at {median} m), 9 of 10 below {found[most][1]:.1f} % (at {most} m)")
    return lines


def _raised(rooms: int, seed: int) -> str:
    """In how many rooms of the original law, near a source, the reverberation is raised above a diffuse field's."""
    scenes, count = random_rooms(20 * rooms, seed, *RT60_S), 0
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(scenes), CHUNK):
        part = scenes[start:start + CHUNK]
        energy = find_arrivals(MEASURED, part, draw_images(MEASURED, part, generator=generator)).amplitude.square()
        level = decibels(energy[..., 0] / energy[..., 1:].sum(-1))
        count += int((level > MAX_DIRECT_DB - 1e-3).sum())
    return f"measured: reverberation raised in {count} of {len(scenes)} rooms of the original law"


def _t20_errors(room: Sequence[float], times: Sequence[float], dist: float, rooms: int,
                seed: int) -> tuple[float, float]:
    """Median and ninth tenth of |T20 / rt60 - 1| in percent, `dist` m apart in any direction, anywhere in a room."""
    scenes = _apart(room, dist, rooms, seed)
    errors = []
    for rt60 in times:
        same = make_scenes([room] * rooms, [rt60] * rooms, *scenes)
        error = (measured(MEASURED, same, seed).t20 / rt60 - 1).abs().flatten()
        errors.append(torch.where(error.isfinite(), error, torch.inf))
    errors = torch.cat(errors)
    return 100 * float(errors.median()), 100 * float(errors.quantile(0.9))


def _apart(room: Sequence[float], dist: float, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions [count, 1, 3] m of a microphone, anywhere 0.1 m off the walls, and of a source in a random direction
    from it, likewise."""
    generator, side = torch.Generator().manual_seed(seed), torch.tensor(room, dtype=torch.float64)
    mic = 0.1 + torch.rand(1000 * count, 3, generator=generator, dtype=torch.float64) * (side - 0.2)
    step = torch.randn(1000 * count, 3, generator=generator, dtype=torch.float64)
    src = mic + dist * step / torch.linalg.vector_norm(step, dim=-1, keepdim=True)
    inside = ((src > 0.1) & (src < side - 0.1)).all(-1).nonzero().squeeze(-1)[:count]
    return mic[inside, None], src[inside, None]


def images_per_s(axes: Sequence, rooms: int, seed: int) -> list[str]:
    """Images per second, and how dense they sound in the middle of the RIR."""
    scenes, lines = random_rooms(4 * rooms, seed, 0.1, 1.0), []
    for name, cfg, colour in (("num_images", REFERENCE, BEFORE),
                              ("images_per_s", replace(REFERENCE, images_per_s=(5000, 10000)), AFTER)):
        generator = torch.Generator().manual_seed(seed)
        rate = draw_images(cfg, scenes, generator=generator).active.sum(-1) / scenes.rt60
        density = measured(cfg, scenes, seed).echo_density_half[:, 0, 0]
        axes[0].semilogy(scenes.rt60, rate, ".", color=colour, markersize=3, label=name)
        axes[1].plot(scenes.rt60, density, ".", color=colour, markersize=3, label=name)
        for low, high in ((0.1, 0.2), (0.8, 1.0)):
            inside = (scenes.rt60 >= low) & (scenes.rt60 < high)
            lines.append(f"{name}, rt60 {low} to {high} s: {float(rate[inside].mean()):.0f} images/s, echo density at "
                         f"rt60/2 {float(density[inside].nanmean()):.2f}")
    axes[0].set(title="images", xlabel="rt60 (s)", ylabel="per second")
    axes[1].set(title="echo density at rt60 / 2", xlabel="rt60 (s)", ylabel="1: Gaussian noise", ylim=(0, 1.2))
    for panel in axes:
        panel.legend(frameon=False, markerscale=3)
    return lines


def image_range(axes: Sequence, rooms: int, seed: int) -> list[str]:
    """Mean energy at the end of RIRs of 0.3 s, the source 4 m away: 12 ms."""
    scenes, lines = one_room(2 * rooms, 0.3, ((1.0, 1.0, 1.2),), (4.2, 3.4, 1.2)), []
    for law, colour in ((ImageRange.REFERENCE, BEFORE), (ImageRange.FULL, AFTER)):
        power = torch.cat([rirs.full for _, rirs in rendered(replace(REFERENCE, image_range=law), scenes, seed)])
        power = power.double().square().mean((0, 1, 2))[:4800].unflatten(0, (-1, 16)).mean(-1)
        level = decibels(power / power.max())
        axes[0].plot(torch.arange(len(level)) + 0.5, level, color=colour, label=law.value)
        last, before = (float(decibels(power[part].mean() / power.max()))
                        for part in (slice(-10, None), slice(-25, -15)))
        lines.append(f"{law.value}: mean level of the last 10 ms {last:.1f} dB, of the 10 ms that end 15 ms before "
                     f"{before:.1f} dB (re the loudest ms)")
    axes[0].set(title="end of an RIR of 0.3 s, source at 4 m", xlabel="time (ms)", ylabel="mean level (dB)",
                xlim=(220, 300), ylim=(-110, -20))
    axes[0].legend(frameon=False)
    return lines


def bands(axes: Sequence, rooms: int, seed: int) -> list[str]:
    """T20 through octave filters, of the mean energy of many draws in one room."""
    centres, rt60, lines = octave_centres(REFERENCE.sample_rate)[:-1], 0.8, []
    scenes, plain = one_room(rooms, rt60), replace(MEASURED, images_per_s=(8000, 8000))
    tap = direct_tap(scenes, plain.sample_rate)[0, 0]
    air = [rt60 / (1 + air_absorption_db(centre, *AIR) * SPEED_OF_SOUND * rt60 / 60) for centre in centres]

    def render(cfg: RirConfig) -> Tensor:
        return torch.cat([rirs.full[:, 0, 0] for _, rirs in rendered(cfg, scenes, seed)]).double()

    def walls(ratios: Sequence[float]) -> tuple[RirConfig, list[float]]:
        cfg = replace(plain, band_rt60_ratio=tuple((ratio, ratio) for ratio in ratios))
        return cfg, [rt60 * ratio for ratio in ratios[:-1]]

    before = _t20_by_octave(render(plain), tap, plain.sample_rate)
    for panel, name, (cfg, given) in (
            (axes[0], "band_rt60_ratio", walls(BAND_RATIO)),
            (axes[1], "band_rt60_ratio, every other octave half", walls(UNEVEN_RATIO)),
            (axes[2], f"air of {AIR[0]:g} C and {AIR[1]:g} %", (replace(plain, air=AIR), air))):
        full = render(cfg)
        after, early = _t20_by_octave(full, tap, cfg.sample_rate), full[:, :tap - LEAD - 1]
        panel.semilogx(centres, before, "o", color=BEFORE, label="off")
        panel.semilogx(centres, after, "o", color=AFTER, label="on")
        panel.semilogx(centres, given, "_", color="black", markersize=14, label="asked for")
        panel.set(title=name, xlabel="octave (Hz)", ylabel="T20 (s)", ylim=(0, 1.1))
        panel.set_xticks(centres, [f"{centre:g}" for centre in centres])
        panel.minorticks_off()
        panel.legend(frameon=False, loc="lower left")
        lines += [f"{name}, {centre:g} Hz: T20 {off:.3f} -> {on:.3f} s (asked for: {asked:.3f})"
                  for centre, off, on, asked in zip(centres, before, after, given)]
        before_direct = float(decibels(early.square().sum() / full.square().sum()))
        lines.append(f"{name}: {before_direct:.0f} dB of the energy comes "
                     "before the direct sound")
    return lines


def _t20_by_octave(full: Tensor, tap: Tensor, sample_rate: int) -> list[float]:
    """T20 in s of the mean energy of RIRs [draw, tap] with their direct path at tap, int64, through zero-phase
    Butterworth band-pass filters of order 6, their -3 dB points an octave apart."""
    taps, found = full.shape[-1], []
    spectrum = torch.fft.rfft(full, 2 * taps)
    freq = torch.fft.rfftfreq(2 * taps, 1 / sample_rate, dtype=torch.float64).clamp(min=1)
    for centre in octave_centres(sample_rate)[:-1]:
        gain = (1 + ((freq / centre - centre / freq) / (2 ** 0.5 - 2 ** -0.5)) ** 6) ** -0.5
        power = torch.fft.irfft(spectrum * gain)[:, :taps].square().mean(0, keepdim=True)
        found.append(float(decay_time(energy_decay(power.sqrt(), tap), tap, sample_rate, -5, -25)))
    return found


CHOICES: dict[str, tuple[int, Callable[[Sequence, int, int], list[str]]]] = {  # panels of the figure, function
    "image_directions": (2, image_directions), "src_directions": (1, src_directions), "look_vector": (2, look),
    "decay": (2, decay), "images_per_s": (2, images_per_s), "image_range": (1, image_range), "bands": (3, bands)}
