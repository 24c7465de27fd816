"""Our rooms against the reference's: the same scenes, other draws, compared as populations.

stats_random.npz holds measures of 840 random scenes as the reference rendered them, stats_grid.npz of 16 scenes with
64 draws each. One RIR per scene is compared, microphone 0 and source 0: the four of a scene share their geometry and
their number of images. Every bound is five standard deviations of what the reference (or, where it gives no figure, a
run of ours) differs by from itself on the same scenes with other seeds; and the tests are tested: each law that is
perturbed pushes the statistics named beside it out of their bounds.
"""
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import ks

from ssl_gpu import acoustics, rir
from ssl_gpu.measure import direct_path, energy_decay, late_coherence, late_spectra, measure_rirs
from ssl_gpu.rir import RirConfig, draw_images, nearest_mic, render_rir
from ssl_gpu.scene import make_scenes

GOLDEN = Path(__file__).parent / "golden"
RATE = 16000
CHUNK = 20  # scenes rendered at a time, sorted by rt60 so that they are of about one length

# name: (standard error of the mean paired difference, KS distance no two runs reach)
# The standard errors are the reference's against itself (840 scenes), the last four from 30 runs of ours. The KS
# distances are mean + 5 standard deviations over the 435 pairs of those runs; the reference's against itself are 0.02
# to 0.05. Runs share their scenes, so this is stricter than the 5 sigma of independent samples, 0.134.
BOUNDS = {
    "T20/RT60": (0.0026, 0.052), "T30/RT60": (0.0017, 0.047), "EDT/RT60": (0.015, 0.078),
    "DRR, dB": (0.09, 0.071), "C50, dB": (0.06, 0.059), "energy, dB": (0.06, 0.059), "early/total, dB": (0.011, 0.059),
    "echo density at 20 ms": (0.005, 0.065), "echo density at 50 ms": (0.005, 0.073),
    "echo density at 100 ms": (0.005, 0.070), "echo density at 200 ms": (0.005, 0.092),
    "echo density at RT60/2": (0.005, 0.091), "tilt, dB/octave": (0.0105, 0.107),
    "direct height, 1/m": (0.0008, 0.023), "direct delay error, samples": (0.0010, 0.022),
    "ITD error, samples": (0.0019, 0.038), "last significant sample": (0.00027, 0.072),
}
# Largest deviation of the pooled coherence in any of the bins 2..127: five times 0.0052, the largest standard
# deviation of a bin over 30 runs, and 0.009 by which bins near the Nyquist frequency lie below the formula.
COHERENCE_BOUND = 0.035
MIC_SPACING = 0.1  # m


def reference():
    """Statistics of the reference by name, [scene], in order of rt60; the scenes; and its pooled coherence."""
    data = dict(np.load(GOLDEN / "stats_random.npz"))
    pool = data.pop("late_cross_spectrum_pool")
    order = np.argsort(data["scene_T60"], kind="stable")
    data = {key: value[order] for key, value in data.items()}
    of = {key: value[:, 0, 0] for key, value in data.items() if value.shape[1:3] == (2, 2)}
    statistics = {f"{key}/RT60": of[key] / data["scene_T60"] for key in ("T20", "T30", "EDT")}
    statistics |= {"DRR, dB": of["DRR"], "C50, dB": of["C50"], "energy, dB": of["energy_db"],
                   "early/total, dB": of["early_ratio_db"], "echo density at RT60/2": of["ned_halfT60"],
                   "tilt, dB/octave": of["tilt_db_oct"],
                   "direct height, 1/m": of["direct_peak_interp"] * of["direct_delay_true"],
                   "direct delay error, samples": of["direct_delay"] - of["direct_delay_true"],
                   "ITD error, samples": data["itd_gcc"][:, 0] - data["itd_true"][:, 0],
                   "last significant sample": of["last_sig_index"] / data["N"]}
    statistics |= {f"echo density at {ms} ms": of[f"ned{ms}"] for ms in (20, 50, 100, 200)}
    return finished(statistics), data, pool[0] / np.sqrt(pool[1] * pool[2])


def finished(statistics):
    """Rounded to the float32 of the reference's file, or the few values that echo densities can take would not meet.
    Delays are clipped: 3 peaks in 1000 belong to an image next to the direct path and would rule the mean."""
    return {name: np.clip(value, -0.5, 0.5) if name.endswith("error, samples") else value
            for name, value in ((name, np.asarray(value, np.float32)) for name, value in statistics.items())}


REFERENCE, SCENES, REFERENCE_COHERENCE = reference()


def simulate(cfg=RirConfig(), images_of=draw_images, seed=7):
    """Statistics of ours by name, [scene]; lengths [scene]; pooled coherence [freq]."""
    generator = torch.Generator().manual_seed(seed)
    parts, pool = [], 0
    for start in range(0, len(SCENES["scene_T60"]), CHUNK):
        room_dim, rt60, mic_pos, src_pos, delay, itd = (
            torch.from_numpy(SCENES[key][start:start + CHUNK]) for key in
            ("scene_room", "scene_T60", "scene_mic_pos", "scene_src_pos", "direct_delay_true", "itd_true"))
        scenes = make_scenes(room_dim, rt60, mic_pos, src_pos[:, :1])
        rirs = render_rir(cfg, scenes, images_of(cfg, scenes, generator=generator))
        m = measure_rirs(rirs, scenes)
        spectra = late_spectra(rirs.full, rirs.length, m.direct_tap, RATE)
        enough = torch.isfinite(late_coherence(spectra)[..., :1, None])
        pool = pool + torch.where(enough, spectra, 0.0).sum((0, 1))
        one = {"T20/RT60": m.t20, "T30/RT60": m.t30, "EDT/RT60": m.edt, "DRR, dB": m.drr_db, "C50, dB": m.c50_db,
               "energy, dB": m.energy_db, "early/total, dB": m.early_ratio_db,
               "echo density at RT60/2": m.echo_density_half, "tilt, dB/octave": m.tilt_db,
               "direct height, 1/m": m.direct_height, "direct delay error, samples": m.direct_delay * RATE,
               "last significant sample": m.last_tap}
        one |= {f"echo density at {ms} ms": m.echo_density[..., k] for k, ms in enumerate((20, 50, 100, 200))}
        one = {name: value[:, 0, 0] for name, value in one.items()}
        for key in ("T20/RT60", "T30/RT60", "EDT/RT60"):
            one[key] = one[key] / rt60
        one["direct height, 1/m"] = one["direct height, 1/m"] * delay[:, 0, 0]
        one["direct delay error, samples"] = one["direct delay error, samples"] - delay[:, 0, 0]
        one["ITD error, samples"] = m.itd[:, 0] * RATE - itd[:, 0]
        one["last significant sample"] = one["last significant sample"] / rirs.length
        parts.append({**one, "length": rirs.length})
    statistics = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    length = statistics.pop("length")
    return finished(statistics), length, (pool[0] / (pool[1] * pool[2]).sqrt()).numpy()


def mean_difference(ours, name):
    difference = (ours[name] - REFERENCE[name]).astype(np.float64)
    assert np.isfinite(difference).sum() >= 600
    return float(np.nanmean(difference))


def ks_distance(ours, name):
    first, second = (statistics[name][np.isfinite(statistics[name])] for statistics in (ours, REFERENCE))
    return ks(first, second) * math.sqrt(1 / len(first) + 1 / len(second))


def expected_coherence():
    """J0(pi f d / c)^2, of images in the upper half space whose polar angle is uniform; a diffuse field has a sinc."""
    freq = torch.arange(129, dtype=torch.float64) * (RATE / 256)
    return torch.special.bessel_j0(math.pi * freq * MIC_SPACING / 340).square().numpy()


def coherence_deviation(coherence):
    return float(np.abs(coherence - expected_coherence())[2:128].max())


@pytest.fixture(scope="module")
def ours():
    return simulate()


def test_lengths_are_the_references(ours):
    np.testing.assert_array_equal(ours[1], SCENES["N"])


@pytest.mark.parametrize("name", BOUNDS)
def test_mean_over_the_same_scenes_is_the_references(ours, name):
    assert abs(mean_difference(ours[0], name)) <= 5 * BOUNDS[name][0]


@pytest.mark.parametrize("name", BOUNDS)
def test_distribution_is_the_references(ours, name):
    assert ks_distance(ours[0], name) <= BOUNDS[name][1]


def test_late_coherence_is_that_of_images_from_above(ours):
    assert coherence_deviation(ours[2]) <= COHERENCE_BOUND
    assert coherence_deviation(REFERENCE_COHERENCE) <= COHERENCE_BOUND


# The tests of the tests: a law that is not the reference's, and which of the statistics must notice.

def linear_range(cfg, scenes, *, generator):
    """Ratios 1 + span U in place of 1 + span sqrt(U)."""
    images = draw_images(cfg, scenes, generator=generator)
    _, direct, nearest = nearest_mic(scenes)
    closest = direct.gather(1, nearest[:, None]).squeeze(1)
    span = (340 * scenes.rt60[:, None] / closest - 2).to(torch.float32)[..., None]
    return replace(images, ratio=1 + (images.ratio - 1).square() / span)


def whole_sphere(cfg, scenes, *, generator):
    """Images from all directions alike in place of those above."""
    images = draw_images(cfg, scenes, generator=generator)
    direction = torch.randn(images.direction.shape, generator=generator)
    return replace(images, direction=direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True))


def eyring(room_dim, rt60):
    """sqrt(1 - alpha) in place of sqrt(1 - alpha^2)."""
    return torch.exp(-0.04 / room_dim.reciprocal().sum(-1) / rt60)


find_arrivals = rir.find_arrivals


def whole_samples(cfg, scenes, images):
    """Arrivals on whole samples in place of 64ths."""
    arrivals = find_arrivals(cfg, scenes, images)
    return replace(arrivals, slot=(arrivals.slot + 32).div(64, rounding_mode="floor") * 64)


NO_PATCH = (rir, "draw_images", draw_images)
PERTURBED = {
    "range linear in U": (RirConfig(), linear_range, NO_PATCH,
                          ["T20/RT60", "T30/RT60", "EDT/RT60", "C50, dB", "energy, dB", "early/total, dB", "DRR, dB",
                           "echo density at 20 ms", "echo density at 50 ms", "echo density at 100 ms",
                           "tilt, dB/octave", "direct delay error, samples", "ITD error, samples", "direct height, 1/m",
                           "last significant sample"]),
    "Eyring's coefficient": (RirConfig(), draw_images, (rir, "reflection_coefficient", eyring),
                             ["T20/RT60", "T30/RT60", "EDT/RT60", "C50, dB", "energy, dB", "early/total, dB",
                              "echo density at 200 ms", "echo density at RT60/2", "last significant sample"]),
    "images from all round": (RirConfig(), whole_sphere, NO_PATCH, ["coherence"]),
    "twice the perturbation exponent": (RirConfig(perturbation_exponent=0.5), draw_images, NO_PATCH,
                                        ["T20/RT60", "T30/RT60", "EDT/RT60", "C50, dB", "echo density at RT60/2"]),
    "half as many images": (RirConfig(num_images=(512, 2048)), draw_images, NO_PATCH,
                            ["DRR, dB", "C50, dB", "energy, dB", "early/total, dB", "echo density at 20 ms",
                             "echo density at 50 ms", "echo density at 100 ms", "echo density at 200 ms",
                             "echo density at RT60/2", "last significant sample"]),
    "a shorter early part": (RirConfig(early_window_ms=(-6, 45)), draw_images, NO_PATCH, ["early/total, dB"]),
    "343 m/s": (RirConfig(), draw_images, (rir, "SPEED_OF_SOUND", 343.0), ["direct delay error, samples"]),
    "no epsilon in a distance": (RirConfig(), draw_images, (acoustics, "DISTANCE_EPSILON", 0.0),
                                 ["direct delay error, samples"]),
    "arrivals on whole samples": (RirConfig(), draw_images, (rir, "find_arrivals", whole_samples),
                                  ["direct delay error, samples", "ITD error, samples", "direct height, 1/m"]),
}


# Three seconds each; the others make every statistic fail as well.
LEFT_FOR_LATER = {"twice the perturbation exponent", "a shorter early part", "343 m/s", "no epsilon in a distance"}


def test_every_statistic_is_seen_to_fail():
    assert {name for law, (*_, names) in PERTURBED.items() if law not in LEFT_FOR_LATER for name in names} == {
        *BOUNDS, "coherence"}


@pytest.mark.parametrize("law", [pytest.param(law, marks=[pytest.mark.slow] * (law in LEFT_FOR_LATER))
                                 for law in PERTURBED])
def test_perturbed_law_leaves_the_bounds(law, monkeypatch):
    cfg, images_of, patch, names = PERTURBED[law]
    monkeypatch.setattr(*patch)
    statistics, _, coherence = simulate(cfg, images_of)
    out = {name for name, (error, distance) in BOUNDS.items()
           if abs(mean_difference(statistics, name)) > 5 * error or ks_distance(statistics, name) > distance}
    out |= {"coherence"} if coherence_deviation(coherence) > COHERENCE_BOUND else set()
    assert out >= set(names)


# The grid: 16 scenes, 64 draws of each. Its files give the mean energy per 5 ms and the mean decay.

GRID = np.load(GOLDEN / "stats_grid.npz")
# Of 16 cells and up to 120 bins or 58 points of the decay, largest |z| in 20 runs: 4.3 and 3.2.
GRID_BOUND = 5.0
DRAWS = 64


def grid_deviation(cfg=RirConfig(), images_of=draw_images, seed=7):
    """Largest |z| over cells and bins: of the energy in 5 ms bins, and of the energy decay."""
    generator = torch.Generator().manual_seed(seed)
    worst_energy = worst_decay = 0.0
    for cell, rt60 in enumerate(GRID["cell_T60"]):
        room_dim, times, mic_pos, src_pos = (np.repeat(GRID[key][cell][None], DRAWS, 0) for key in
                                             ("cell_room", "cell_T60", "cell_mic_pos", "cell_src_pos"))
        scenes = make_scenes(room_dim, times, mic_pos, src_pos)
        full = render_rir(replace(cfg, early=False), scenes, images_of(cfg, scenes, generator=generator)).full[:, :, 0]
        delay = torch.from_numpy(GRID["direct_delay_true"][cell, 0, :, 0])
        width = RATE // 200
        binned = torch.nn.functional.pad(full, (0, -full.shape[-1] % width)).unflatten(-1, (-1, width))
        energy = binned.double().square().sum(-1).mean(1)               # [draw, bin], over the microphones
        expected = torch.from_numpy(GRID["energy_env_5ms"][cell])[:energy.shape[1]]
        error = energy.std(0) * math.sqrt(2 / DRAWS)                    # two means of as many draws
        z = (energy.mean(0) - expected) / error
        # Rare images rule the first 15 ms after the direct path, none come in the last d / c before the end.
        dense = slice(math.ceil(delay.max() / width) + 3, int((rt60 * RATE - delay.max()) / width))
        worst_energy = max(worst_energy, float(z[dense].abs().max()))

        tap, _, _ = direct_path(full[:, 0], delay[:1].expand(DRAWS) / RATE, RATE)
        decay = energy_decay(full[:, 0], tap)
        points = torch.arange(1, 59)                                    # the last five may lie behind the RIR's end
        at = decay.gather(-1, tap[:, None] + (points * (rt60 * RATE / 64)).round().to(torch.int64))
        mean, std = (torch.from_numpy(GRID[key][cell]).double()[points] for key in ("edc_db_mean", "edc_db_std"))
        z = (at.mean(0) - mean) / torch.sqrt((at.std(0).square() + std.square()) / DRAWS)
        worst_decay = max(worst_decay, float(z.abs().max()))
    return worst_energy, worst_decay


def test_energy_and_decay_on_the_grid_are_the_references():
    assert max(grid_deviation()) <= GRID_BOUND


@pytest.mark.parametrize("law, cfg, images_of, patch", [
    ("range linear in U", RirConfig(), linear_range, NO_PATCH),
    ("Eyring's coefficient", RirConfig(), draw_images, (rir, "reflection_coefficient", eyring)),
    ("no perturbation exponent", RirConfig(perturbation_exponent=0.0), draw_images, NO_PATCH),
    ("half as many images", RirConfig(num_images=(512, 2048)), draw_images, NO_PATCH)])
def test_perturbed_law_leaves_the_grid(law, cfg, images_of, patch, monkeypatch):
    monkeypatch.setattr(*patch)
    assert min(grid_deviation(cfg, images_of)) > 2 * GRID_BOUND
