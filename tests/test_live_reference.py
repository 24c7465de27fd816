"""Side by side with the reference itself: FRA_RIR_PATH=<checkout of github.com/tencent-ailab/FRA-RIR> pytest -s ...

Its random functions are watched while it runs, so that its own draws can be rendered here, too.
"""
import importlib.util
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import ks

from ssl_gpu.acoustics import SPEED_OF_SOUND
from ssl_gpu.directivity import Pattern
from ssl_gpu.measure import measure_rirs
from ssl_gpu.rir import ImageBatch, RirConfig, draw_images, nearest_mic, render_rir, unit_from_polar
from ssl_gpu.scene import SceneConfig, original_scenes, sample_scenes
from ssl_gpu.synthesis import RirBatch

CHECKOUT = os.environ.get("FRA_RIR_PATH")
pytestmark = [
    pytest.mark.skipif(not CHECKOUT, reason="set FRA_RIR_PATH to a checkout of github.com/tencent-ailab/FRA-RIR"),
    pytest.mark.filterwarnings("ignore"),  # the reference's are not ours
]
CHANCE = 2.43  # KS distance, in its standard scale, exceeded by chance in 0.0015 % of the cases


@pytest.fixture(scope="module")
def reference():
    """The reference's function. A path without it is an error, not a reason to skip."""
    source = Path(CHECKOUT) / "FRAM_RIR.py"
    assert source.is_file(), f"FRA_RIR_PATH={CHECKOUT} holds no FRAM_RIR.py"
    spec = importlib.util.spec_from_file_location("FRAM_RIR", source)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        spec.loader.exec_module(module)
    return module.FRAM_RIR


@pytest.fixture(autouse=True)
def seeded():
    """The reference draws from the global generators: seeded for every test, and put back as they were."""
    state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        np.random.seed(1)
        yield
    np.random.set_state(state)


@dataclass
class Draws:
    """What the watched functions returned, each in the order of the calls."""

    choice: list = field(default_factory=list)
    multinomial: list = field(default_factory=list)
    uniform: list = field(default_factory=list)
    grid: list = field(default_factory=list)


@contextmanager
def watched():
    """Records the draws that are made inside, and the grids that indices are drawn from."""
    draws = Draws()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, kept in ((np.random, "choice", draws.choice), (torch, "linspace", draws.grid),
                                  (torch.Tensor, "multinomial", draws.multinomial),
                                  (torch.Tensor, "uniform_", draws.uniform)):
            def spy(*args, original=getattr(owner, name), kept=kept, **kwargs):
                result = original(*args, **kwargs)
                kept.append(result.clone() if isinstance(result, torch.Tensor) else result)
                return result
            patch.setattr(owner, name, spy)
        yield draws


def arguments(cfg, scenes, index=0):
    """The reference's arguments for one scene."""
    low, high = cfg.num_images
    return dict(mic_pos=scenes.mic_pos[index].numpy(), sr=cfg.sample_rate, T60=float(scenes.rt60[index]),
                room_dim=scenes.room_dim[index].numpy(), src_pos=scenes.src_pos[index].numpy(),
                direct_range=cfg.early_window_ms, n_image=(low, high + 1), a=cfg.perturbation[0], b=cfg.perturbation[1],
                tau=cfg.perturbation_exponent, src_pattern=cfg.src_pattern.value, mic_pattern=cfg.mic_pattern.value)


def images_of(draws, num_src):
    """What the reference drew for one scene, as an ImageBatch of one."""
    [count], [chosen] = draws.choice, draws.multinomial
    azimuth, polar, perturbation, *others = draws.uniform
    chosen = chosen.view(num_src, count)
    ratio = torch.stack([grid[row] for grid, row in zip(draws.grid, chosen)])  # a grid per source comes first
    cosine = others[0].cos().prod(-1)[None] if others else None
    return ImageBatch(unit_from_polar(azimuth, polar)[None], ratio[None], perturbation[None], cosine,
                      torch.ones(1, count, dtype=torch.bool))


def relative_l2(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def own_rooms():
    return original_scenes()[:6]


def drawn(seed, batch=2, **change):
    return lambda: sample_scenes(SceneConfig(**change), batch, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make, change", [
    (own_rooms, {}),
    (drawn(1, num_mics=1, num_src=1), {}),
    (drawn(2, num_mics=4, num_src=3, array_radius_m=0.3), {"num_images": (64, 300), "perturbation": (-1.0, 3.0)}),
    (drawn(3, rt60_s=(0.1, 0.2), num_src=1), {"sample_rate": 48000, "early_window_ms": (-2, 20)}),
    (drawn(4), {"src_pattern": Pattern.CARDIOID, "perturbation_exponent": 0.5}),
    (drawn(5), {"mic_pattern": Pattern.HYPER_CARDIOID}),
    (drawn(6), {"src_pattern": Pattern.BIDIRECTIONAL, "mic_pattern": Pattern.SUB_CARDIOID}),
    (drawn(7), {"src_pattern": Pattern.HALF_OMNI, "mic_pattern": Pattern.HALF_OMNI}),
], ids=["original rooms", "1x1", "4x3", "48 kHz", "src cardioid", "mic hyper", "both", "half omni"])
def test_same_draws_give_the_same_rirs(reference, make, change, capsys):
    """Relative L2 of the whole RIR and of its early part; 5e-3 is the float32 rounding in the reference's high-pass."""
    cfg, scenes, errors = RirConfig(**change), make(), []
    for index in range(len(scenes)):
        given = arguments(cfg, scenes, index)
        if cfg.src_pattern is not Pattern.OMNI and index:  # drawn by the reference in the first scene, given in others
            given["src_orientation_rad"] = scenes.src_orientation[index].numpy()
        with watched() as draws:
            full, early = reference(**given)
        scene = scenes[index:index + 1]
        if cfg.src_pattern is not Pattern.OMNI and not index:
            scene = replace(scene, src_orientation=torch.stack(draws.uniform[-2:], -1)[None].double())
        rirs = render_rir(cfg, replace(scene, max_rt60=float(scene.rt60)), images_of(draws, scene.src_pos.shape[1]))
        assert rirs.full.shape[1:] == full.shape and rirs.length.tolist() == [full.shape[-1]]
        errors += [relative_l2(rirs.full[0], full), relative_l2(rirs.early[0], early)]
    with capsys.disabled():
        print(f"\nrelative L2 to the reference: median {np.median(errors):.1e}, largest {max(errors):.1e}")
    assert max(errors) <= 5e-3
    assert len(errors) == 2 * len(scenes)


def batch_of(rirs, sample_rate):
    """[mic, src, tap] arrays of the reference as one RirBatch."""
    length = [rir.shape[-1] for rir in rirs]
    full = torch.zeros(len(rirs), *rirs[0].shape[:2], max(length))
    for row, rir in zip(full, rirs):
        row[..., :rir.shape[-1]] = torch.from_numpy(rir)
    return RirBatch(full, None, torch.tensor(length), sample_rate)


def test_same_statistics_in_the_same_rooms(reference, capsys):
    """Each with its own draws: no distribution differs, and no mean over the rooms by more than 4 standard errors."""
    cfg = RirConfig(early=False)
    scenes = sample_scenes(SceneConfig(), 60, generator=torch.Generator().manual_seed(8))
    theirs = [reference(**arguments(cfg, scenes, index))[0] for index in range(len(scenes))]
    theirs = batch_of(theirs, cfg.sample_rate)
    ours = render_rir(cfg, scenes, draw_images(cfg, scenes, generator=torch.Generator().manual_seed(9)))
    ours, theirs = measure_rirs(ours, scenes), measure_rirs(theirs, scenes)
    lines = []
    for name, enough in (("t20", 0.02), ("t30", 0.02), ("drr_db", 0.4), ("c50_db", 0.4), ("energy_db", 0.4)):
        pair = [getattr(measures, name).flatten(1) for measures in (ours, theirs)]
        gap = (pair[0] - pair[1]).nanmean(1)                            # by room: its four RIRs are alike
        gap = gap[torch.isfinite(gap)]
        mean, error = float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
        first, second = (values[torch.isfinite(values)] for values in pair)
        distance = ks(first, second)
        lines.append(f"{name}: {float(first.mean()):.3f} here, {float(second.mean()):.3f} there, paired difference "
                     f"{mean:+.4f} +- {error:.4f}, KS {distance:.2f}")
        assert len(gap) > 50 and distance < CHANCE, lines[-1]
        assert abs(mean) < 4 * error < 4 * enough, lines[-1]
    with capsys.disabled():
        print("\n" + "\n".join(lines))


def test_same_law_of_the_draws(reference):
    """Two-sample KS over 40 rooms: the number of images, and what is drawn for each of some 200,000 of them."""
    cfg = RirConfig(early=False)
    scenes = sample_scenes(SceneConfig(), 40, generator=torch.Generator().manual_seed(11))
    theirs = []
    for index in range(len(scenes)):
        with watched() as draws:
            reference(**arguments(cfg, scenes, index))
        theirs.append(images_of(draws, 2))
    images = draw_images(cfg, scenes, generator=torch.Generator().manual_seed(12))
    ours = [images[index:index + 1] for index in range(len(scenes))]
    closest = nearest_mic(scenes)[1].amin(1)
    span = SPEED_OF_SOUND * scenes.rt60[:, None] / closest - 2

    def pooled(batches, value):
        return torch.cat([value(index, batch)[..., batch.active[0]].flatten() for index, batch in enumerate(batches)])

    values = {
        "share of the way": lambda index, batch: (batch.ratio[0] - 1) / span[index][:, None],
        "azimuth": lambda index, batch: torch.atan2(batch.direction[0, ..., 1], batch.direction[0, ..., 0]),
        "height": lambda index, batch: batch.direction[0, ..., 2],
        "perturbation": lambda index, batch: batch.perturbation[0],
    }
    found = {name: ks(pooled(ours, value), pooled(theirs, value)) for name, value in values.items()}
    found["count"] = ks(*([int(batch.active.sum()) for batch in batches] for batches in (ours, theirs)))
    assert max(found.values()) < CHANCE, found


def test_time_on_one_thread(reference, capsys):
    """The original's first rooms, whole and early RIRs, in turns: CPU time, which other programs do not add to."""
    cfg, scenes, spent = RirConfig(), original_scenes()[:24], np.zeros(2)
    generator, threads = torch.Generator().manual_seed(10), torch.get_num_threads()

    def render(part):
        return render_rir(cfg, part, draw_images(cfg, part, generator=generator))

    torch.set_num_threads(1)
    try:
        for index in range(-2, len(scenes)):                            # the first two of each to warm up
            one = scenes[index % len(scenes):][:1]
            one = replace(one, max_rt60=float(one.rt60))
            for which, call in enumerate((lambda: reference(**arguments(cfg, one)), lambda: render(one))):
                begin = time.process_time()
                call()
                spent[which] += (index >= 0) * (time.process_time() - begin)
        begin = time.process_time()
        for start in range(0, len(scenes), 8):
            render(scenes[start:start + 8])
        in_batches = time.process_time() - begin
    finally:
        torch.set_num_threads(threads)
    times = np.array([*spent, in_batches]) * 1e3 / len(scenes)
    with capsys.disabled():
        print(f"\nms a scene, 2 mics x 2 sources, one thread: reference {times[0]:.1f}, here one by one {times[1]:.1f} "
              f"({times[0] / times[1]:.1f} x), in batches of 8 {times[2]:.1f} ({times[0] / times[2]:.1f} x)")
    assert times[1] < times[0] and times[2] < times[0]
