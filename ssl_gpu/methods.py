"""The same rooms by every method of RirConfig: FRA-RIR, exact images, and the hybrid of both ideas."""
from __future__ import annotations

from dataclasses import replace
from typing import Sequence

import torch
from torch import Tensor

from ssl_gpu.ism import Absorption, IsmConfig, shortest_rt60, wall_absorption
from ssl_gpu.measure import RirMeasures, energy_decay, measure_rirs
from ssl_gpu.original import RT60_S
from ssl_gpu.plots import COLOURS, GREY
from ssl_gpu.rir import Method
from ssl_gpu.scene import SceneBatch
from ssl_gpu.synthesis import RirBatch
from ssl_gpu.trials import (AFTER, BEFORE, MEASURED, REFERENCE, decibels, direct_tap, late_coherence, measured,
                            off_diffuse, random_rooms, rendered)

ISM, HYBRID = (replace(REFERENCE, method=method) for method in (Method.ISM, Method.HYBRID))
KINDS = {"fra, nominal": (REFERENCE, IsmConfig()), "fra, measured": (MEASURED, IsmConfig()), **{
    f"{cfg.method.value}, {formula.value}": (cfg, IsmConfig(formula))
    for cfg in (ISM, HYBRID) for formula in Absorption}}
SHARE = torch.arange(181) / 200  # of the time from the direct sound to the end of an RIR
EARLY_MS = (1, 2, 5, 50)         # after the direct sound


def method(axes: Sequence, rooms: int, seed: int) -> list[str]:
    """Mean decay, T20, balance, texture and late coherence of random rooms, two microphones 0.1 m apart along x."""
    scenes, lines, ratios, exact = random_rooms(rooms, seed, 0.2, 0.6, mics=2), [], [], {}
    direct = list(rendered(ISM, scenes, seed, IsmConfig(Absorption.EYRING, max_order=0)))
    for (name, (cfg, ism)), colour in zip(KINDS.items(), (BEFORE, AFTER, *COLOURS[2:])):
        rirs_of = list(rendered(cfg, scenes, seed, ism))
        found = RirMeasures.concatenate([measure_rirs(rirs, part) for part, rirs in rirs_of])
        t20, t30 = (time[:, 0, 0] / scenes.rt60 for time in (found.t20, found.t30))
        lines.append(f"{name}: T20/rt60 {float(t20.nanmean()):.2f} +- {float(t20[t20.isfinite()].std()):.2f}, T30/rt60 "
                     f"{float(t30.nanmean()):.2f}, DRR {float(found.drr_db.mean()):.1f} dB, C50 "
                     f"{float(found.c50_db.mean()):.1f} dB, echo density at rt60/2 "
                     f"{float(found.echo_density_half.nanmean()):.2f}, late coherence off sin(kd)/(kd) by "
                     f"{off_diffuse(late_coherence(rirs_of)):.3f} rms, energy up to "
                     f"{', '.join(map(str, EARLY_MS))} ms after the direct sound over its own "
                     f"{', '.join(f'{level:+.1f}' for level in early_energy(rirs_of, direct))} dB")
        ratios.append(t20[t20.isfinite()])
        axes[0].plot(SHARE, _mean_decay(rirs_of), "--" if cfg is HYBRID else "-", color=colour, label=name)
        if cfg is ISM:
            exact[ism.absorption] = [rirs.full for _, rirs in rirs_of]
    axes[0].plot((0, 0.9), (0, -54), ":", color="black", linewidth=0.8)
    axes[0].set(title=f"mean decay of {len(scenes)} random rooms", xlabel="time / rt60", ylabel="energy left (dB)",
                ylim=(-65, 3))
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].boxplot(ratios, showfliers=False)
    axes[1].axhline(1, color=GREY, linewidth=0.8)
    axes[1].set(title="reverberation time", ylabel="T20 / rt60")
    axes[1].set_xticks(range(1, len(KINDS) + 1), [name.replace(", ", "\n") for name in KINDS])
    return lines + _level_of_hybrid(exact, scenes, seed) + _infeasible(rooms, seed) + _dead_rooms(rooms, seed)


def _mean_decay(rirs_of: Sequence[tuple[SceneBatch, RirBatch]]) -> Tensor:
    """Mean over the rooms of the energy left, dB, at SHARE."""
    decays = []
    for scenes, rirs in rirs_of:
        tap = direct_tap(scenes, rirs.sample_rate)[:, 0, 0]
        at = tap[:, None] + ((rirs.length - tap)[:, None] * SHARE).long()
        decays.append(energy_decay(rirs.full[:, 0, 0], tap).gather(-1, at))
    return torch.cat(decays).mean(0)


def early_energy(rirs_of: Sequence[tuple[SceneBatch, RirBatch]],
                 direct: Sequence[tuple[SceneBatch, RirBatch]]) -> list[float]:
    """Energy up to each of EARLY_MS after the direct sound, over that of the direct sound alone, whose RIRs are
    `direct`, up to there: median over the rooms, dB, to a tenth. 0 where nothing has followed yet."""
    levels = []
    for (scenes, rirs), (_, alone) in zip(rirs_of, direct):
        tap = direct_tap(scenes, rirs.sample_rate)[:, 0, 0]
        last = tap[:, None] + torch.tensor([ms * rirs.sample_rate // 1000 for ms in EARLY_MS])
        found, own = (x.full[:, 0, 0].double().square().cumsum(-1).gather(-1, last.clamp(max=x.full.shape[-1] - 1))
                      for x in (rirs, alone))
        levels.append(decibels(found / own))
    return [round(level, 1) + 0.0 for level in torch.cat(levels).median(0).values.tolist()]  # + 0.0: no minus zero


def _level_of_hybrid(exact: dict[Absorption, list[Tensor]], scenes: SceneBatch, seed: int) -> list[str]:
    """All energy but the direct path's, relative to that of the exact RIRs by the same formula."""
    lines = []
    for formula in Absorption:
        direct = [rirs.full for _, rirs in rendered(ISM, scenes, seed, IsmConfig(formula, max_order=0))]
        for fade in ((1.0, 3.0), (2.0, 4.0)):
            hybrid = [rirs.full for _, rirs in rendered(HYBRID, scenes, seed, IsmConfig(formula, tail_fade=fade))]
            error = torch.cat([decibels((ours - d).double().square().sum(-1) / (theirs - d).double().square().sum(-1))
                               for ours, theirs, d in zip(hybrid, exact[formula], direct)])
            lines.append(f"hybrid, {formula.value}, tail_fade {fade}: reverberation {float(error.mean()):+.2f} +- "
                         f"{float(error.std()):.2f} dB re ism")
    return lines


def _infeasible(rooms: int, seed: int) -> list[str]:
    """What of the original law each formula cannot have."""
    scenes, lines = random_rooms(100 * rooms, seed, *RT60_S), []
    for formula in Absorption:
        shortest = shortest_rt60(IsmConfig(formula), scenes.room_dim)
        share = 100 * float((scenes.rt60 < shortest).double().mean())
        lines.append(f"{formula.value}: RT60 must be >= {float(shortest.min()):.3f} to {float(shortest.max()):.3f} s, "
                     f"by room; of the original law {share:.1f} % ask for less")
    return lines


def _dead_rooms(rooms: int, seed: int) -> list[str]:
    """T20 near and beyond what is feasible by Sabine's formula, which supposes that walls take little."""
    scenes, lines = random_rooms(rooms, seed, 0.1, 0.2), []
    sabine = wall_absorption(IsmConfig(), scenes.room_dim, scenes.rt60)
    for name, (cfg, ism) in KINDS.items():
        ratio = measured(cfg, scenes, seed, replace(ism, clamp_infeasible=True)).t20[:, 0, 0] / scenes.rt60
        found = ", ".join(f"{float(ratio[(sabine >= low) & (sabine < high)].nanmean()):.2f} at {low} to {high}"
                          for low, high in ((0.3, 0.6), (0.6, 0.9), (0.9, 1.0)))
        lines.append(f"{name}, rt60 0.1 to 0.2 s: T20/rt60 by Sabine's absorption {found}")
    return lines
