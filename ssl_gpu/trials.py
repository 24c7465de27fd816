"""Rooms in which choices and methods are measured, and what is measured of them more than once."""
from __future__ import annotations

from dataclasses import replace
from typing import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ssl_gpu.acoustics import SPEED_OF_SOUND, distance
from ssl_gpu.ism import IsmConfig
from ssl_gpu.laws import Decay
from ssl_gpu.measure import RirMeasures, late_spectra, measure_rirs
from ssl_gpu.plots import COLOURS
from ssl_gpu.rir import RirConfig
from ssl_gpu.rooms import draw_rooms, render_rooms
from ssl_gpu.scene import SceneBatch, SceneConfig, make_scenes, sample_scenes
from ssl_gpu.synthesis import RirBatch

BEFORE, AFTER = COLOURS[1], COLOURS[0]
REFERENCE = RirConfig(early=False)
MEASURED = replace(REFERENCE, decay=Decay.MEASURED)
CHUNK = 10


def one_room(count: int, rt60: float, mics: Sequence = ((2.0, 2.0, 1.2),),
             src: Sequence[float] = (4.0, 3.2, 1.6)) -> SceneBatch:
    """A room of 6 x 5 x 3 m, again and again."""
    return make_scenes([[6, 5, 3]] * count, [rt60] * count, [mics] * count, [[src]] * count)


def random_rooms(count: int, seed: int, low: float, high: float, mics: int = 1) -> SceneBatch:
    """One source per room of the original law, but for microphones and the range of rt60; in order of rt60."""
    law = SceneConfig(num_mics=mics, num_src=1, rt60_s=(low, high))
    scenes = sample_scenes(law, count, generator=torch.Generator().manual_seed(seed))
    return scenes[scenes.rt60.argsort()]


def rendered(cfg: RirConfig, scenes: SceneBatch, seed: int,
             ism: IsmConfig = IsmConfig()) -> Iterator[tuple[SceneBatch, RirBatch]]:
    """Some at a time, with no tap too many."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, len(scenes), CHUNK):
        part = scenes[start:start + CHUNK]
        part = replace(part, max_rt60=float(part.rt60.max()))
        yield part, render_rooms(ism, cfg, part, draw_rooms(ism, cfg, part, generator=generator))


def measured(cfg: RirConfig, scenes: SceneBatch, seed: int, ism: IsmConfig = IsmConfig()) -> RirMeasures:
    """Measures of every scene rendered once."""
    return RirMeasures.concatenate([measure_rirs(rirs, part) for part, rirs in rendered(cfg, scenes, seed, ism)])


def direct_tap(scenes: SceneBatch, sample_rate: int) -> Tensor:
    """Where geometry puts the direct path, [batch, mic, src] int64."""
    dist = distance(scenes.src_pos[:, None] - scenes.mic_pos[:, :, None])
    return (dist * (sample_rate / SPEED_OF_SOUND)).round().to(torch.int64)


def decibels(power: Tensor) -> Tensor:
    """Power [...] -> dB, likewise."""
    return 10 * torch.log10(power)


def late_coherence(rirs_of: Iterable[tuple[SceneBatch, RirBatch]]) -> Tensor:
    """Of the late sound at the first and the last microphone, all rooms pooled, [129]."""
    pool = sum(late_spectra(rirs.full, rirs.length, direct_tap(scenes, rirs.sample_rate), rirs.sample_rate).sum((0, 1))
               for scenes, rirs in rirs_of)
    return pool[0] / (pool[1] * pool[2]).sqrt()


def diffuse_coherence() -> Tensor:
    """sin(kd) / (kd), [129], of microphones 0.1 m apart at 16 kHz."""
    return torch.sinc(2 * 0.1 / SPEED_OF_SOUND * 62.5 * torch.arange(129).double())


def off_diffuse(coherence: Tensor) -> float:
    """Root mean square distance of a coherence [129] to that of a diffuse field."""
    return float((coherence - diffuse_coherence())[2:128].square().mean().sqrt())
