import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import arrivals as oracle_arrivals, fra_rir, gcc_delay, ks, ks_uniform
from torch.testing import assert_close

from ssl_gpu import rir, runtime
from ssl_gpu.directivity import LookVector, Pattern
from ssl_gpu.laws import Decay, ImageDirections, ImageRange, SrcDirections
from ssl_gpu.rir import RirConfig, closest_mic, draw_images, find_arrivals, nearest_mic, render_rir
from ssl_gpu.scene import SceneConfig, make_scenes, sample_scenes
from ssl_gpu.synthesis import slots_in_rir

ROOT = Path(__file__).parents[1]
FEW = RirConfig(num_images=(40, 80))
CUT = 7  # taps at the end that the reference's own truncation spoils: 6, by method; 7 to be clear of rounding up twice


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(cfg=FEW, scene=SceneConfig(), batch=4, seed=0):
    generator = seeded(seed)
    scenes = sample_scenes(scene, batch, generator=generator)
    return scenes, draw_images(cfg, scenes, generator=generator)


def oracle_inputs(cfg, scenes, images, index):
    """What the oracle takes, for scene `index` of a batch: plain numpy, padding taken off."""
    row, active = index, images.active[index].numpy()
    args = [scenes.room_dim[row].tolist(), float(scenes.rt60[row]), scenes.mic_pos[row].numpy(),
            scenes.src_pos[row].numpy(), images.direction[row].numpy()[:, active], images.ratio[row].numpy()[:, active],
            images.perturbation[row].numpy()[:, active]]
    if images.src_cosine is not None:
        args.append(images.src_cosine[row].numpy()[:, active])
    return args, dict(sample_rate=cfg.sample_rate, exponent=cfg.perturbation_exponent, early_ms=cfg.early_window_ms,
                      src_pattern=cfg.src_pattern.value, mic_pattern=cfg.mic_pattern.value,
                      mic_orientation=scenes.mic_orientation[row].tolist(),
                      src_orientation=scenes.src_orientation[row].tolist())


def relative_l2(actual, expected):
    """Of the whole array, in float64."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


P = Pattern
CASES = {
    "defaults": (RirConfig(num_images=(200, 300)), SceneConfig()),
    "one mic, 8 kHz": (RirConfig(sample_rate=8000, num_images=(100, 100)), SceneConfig(num_mics=1, num_src=3)),
    "rotated, 22.05 kHz": (RirConfig(sample_rate=22050, num_images=(50, 90), early_window_ms=(-2, 20),
                                     perturbation=(-1.0, 3.0), perturbation_exponent=0.4),
                           SceneConfig(num_mics=3, rotate=True, src_orientation_deg=(30, 70))),
    "44.1 kHz, 1.2 s": (RirConfig(sample_rate=44100, num_images=(300, 300)),
                        SceneConfig(num_mics=1, num_src=1, rt60_s=(1.2, 1.2))),
    "1.1 s": (RirConfig(num_images=(64, 400)),
              SceneConfig(rt60_s=(1.1, 1.2), num_src=1, array_radius_m=0.2, num_mics=3)),
    "wide array, images clamped": (RirConfig(num_images=(400, 400), early_window_ms=(0, 500)),
                                   SceneConfig(num_mics=2, mic_spacing_m=3.0, room_min_m=(5, 5, 4), wall_dist_m=0.4,
                                               room_max_m=(10, 6, 4), rt60_s=(0.05, 0.1))),
    "late window": (RirConfig(num_images=(99, 99), early_window_ms=(20, 60)), SceneConfig()),
}
for src_pattern, mic_pattern in zip(Pattern, [P.CARDIOID, P.BIDIRECTIONAL, P.HALF_OMNI, P.OMNI, P.SUB_CARDIOID,
                                              P.HYPER_CARDIOID]):
    CASES[f"{src_pattern.value} source, {mic_pattern.value} mics"] = (
        RirConfig(num_images=(60, 120), src_pattern=src_pattern, mic_pattern=mic_pattern),
        SceneConfig(num_mics=4, num_src=2, array_radius_m=0.3, mic_orientation_deg=(100, 50), rotate=True,
                    rt60_s=(0.1, 0.4)))


@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name):
    """Slots and early flags exactly, amplitudes to float32 rounding, RIRs to 5e-7 (2.2e-7 or less is seen)."""
    cfg, scene = CASES[name]
    scenes, images = draw(cfg, scene, batch=2, seed=len(name))
    found, rirs = find_arrivals(cfg, scenes, images), render_rir(cfg, scenes, images)
    for index in range(2):
        args, options = oracle_inputs(cfg, scenes, images, index)
        paths, slots = oracle_arrivals(*args, **options)
        count = len(paths[0][0])
        slot, amplitude, early = np.moveaxis(np.array(paths), -1, 0)  # each [mic, src, 1 + image]
        np.testing.assert_array_equal(found.slot[index, ..., :count], slot)
        np.testing.assert_array_equal(found.early[index, ..., :count], early)
        np.testing.assert_allclose(found.amplitude[index, ..., :count], amplitude, rtol=1e-6,
                                   atol=3e-7 * np.abs(amplitude).max())
        full, early = fra_rir(*args, **options)
        length = int(rirs.length[index])
        assert length == full.shape[-1] == -(-slots // 64)
        assert relative_l2(rirs.full[index, ..., :length - CUT], full[..., :-CUT]) < 5e-7
        assert np.abs(early[..., :-CUT]).max() > 0
        assert relative_l2(rirs.early[index, ..., :length - CUT], early[..., :-CUT]) < 5e-7
        if "clamped" not in name:  # else strong images lie in the last slot, where the reference cuts its 8x signal
            assert np.abs(rirs.full[index, ..., :length].numpy() - full).max() < 5e-5 * np.abs(full).max()
        assert (rirs.full[index, ..., length:] == 0).all() and (rirs.early[index, ..., length:] == 0).all()


def test_some_cases_have_clamped_images_and_early_arrivals_before_the_direct_path():
    """The special cases above are really there."""
    cfg, scene = CASES["wide array, images clamped"]
    scenes, images = draw(cfg, scene, batch=2, seed=len("wide array, images clamped"))
    found = find_arrivals(cfg, scenes, images)
    assert (found.slot == slots_in_rir(cfg.sample_rate, scenes.rt60)[:, None, None, None] - 1).sum() > 3
    assert found.early.any() and not found.early.all()


# ---- batches ----


def assert_rir_close(actual, expected):
    assert_close(actual, expected, rtol=0, atol=2e-7 * float(expected.abs().max()))


def test_every_row_of_a_ragged_batch_is_the_scene_alone():
    """RT60 from 0.1 to 0.9 s and 1 to 80 images in one batch: each equals the scene on its own, short and unpadded."""
    cfg = replace(FEW, num_images=(1, 80), src_pattern=P.CARDIOID, mic_pattern=P.HYPER_CARDIOID)
    scenes, images = draw(cfg, SceneConfig(rt60_s=(0.1, 0.9)), batch=6)
    batch = render_rir(cfg, scenes, images)
    assert len(set(images.active.sum(-1).tolist())) > 3 and len(set(batch.length.tolist())) == 6
    for index in range(6):
        one = slice(index, index + 1)
        alone = make_scenes(*(getattr(scenes, name)[one] for name in
                              ("room_dim", "rt60", "mic_pos", "src_pos", "mic_orientation", "src_orientation")),
                            max_dist=scenes.max_dist)
        assert alone.max_rt60 == float(scenes.rt60[index])
        keep = images.active[index]
        short = rir.ImageBatch(*(getattr(images, name)[one][:, :, keep] for name in
                                 ("direction", "ratio", "perturbation", "src_cosine")), images.active[one][:, keep])
        expected = render_rir(cfg, alone, short)
        length = int(expected.length)
        assert expected.full.shape == (1, 2, 2, length) and int(batch.length[index]) == length
        for kind in ("full", "early"):
            assert_rir_close(getattr(batch, kind)[one, ..., :length], getattr(expected, kind))
            assert (getattr(batch, kind)[index, ..., length:] == 0).all()


def test_slices_of_a_batch_render_to_slices_of_its_rirs():
    scenes, images = draw()
    whole, picked = render_rir(FEW, scenes, images), torch.tensor([2, 0])
    part = render_rir(FEW, scenes[picked], images[picked].to("cpu"))
    assert_rir_close(part.full, whole[picked].full)
    assert_rir_close(part.early, whole[picked].early)
    assert part.length.tolist() == whole[picked].length.tolist() == [int(whole.length[2]), int(whole.length[0])]
    assert whole[1:3].full.shape[0] == whole[1:3].early.shape[0] == whole[1:3].length.shape[0] == 2


@pytest.mark.parametrize("num_mics", [1, 3])
def test_fewer_kernels_draw_the_same(num_mics, monkeypatch):
    """As a GPU does it, from the numbers of a CPU's generator: rooms to roundings of float64, images of float32."""
    scene = SceneConfig(num_mics=num_mics, rotate=True, spacing_jitter_m=0.004 if num_mics > 1 else 0.0)
    called = []
    for name in ("addcmul", "cdist"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, _real=real, _name=name, **more: called.append(_name)
                            or _real(*args, **more))
    scenes, images = draw(scene=scene, batch=50)
    assert not called
    monkeypatch.setattr(runtime, "is_gpu", lambda device: True)
    others, again = draw(scene=scene, batch=50)
    assert set(called) == {"addcmul", "cdist"}
    assert_close(closest_mic(scenes), nearest_mic(scenes)[1].amin(1), rtol=1e-12, atol=0)
    for one, other, most in ((scenes, others, 1e-12), (images, again, 1e-6)):
        for name in (field.name for field in fields(one) if isinstance(getattr(one, field.name), torch.Tensor)):
            assert_close(getattr(other, name), getattr(one, name), rtol=most, atol=most)


def test_padded_images_contribute_nothing():
    """Bit for bit, whatever stands in the padding."""
    cfg = replace(FEW, num_images=(20, 60), src_pattern=P.CARDIOID)
    scenes, images = draw(cfg)
    hidden = ~images.active[:, None]
    assert hidden.any()
    spoilt = replace(images, ratio=torch.where(hidden, 1.0, images.ratio),
                     perturbation=torch.where(hidden, -1e3, images.perturbation),
                     src_cosine=torch.where(hidden, 1e6, images.src_cosine),
                     direction=torch.where(hidden[..., None], -images.direction, images.direction))
    first, second = render_rir(cfg, scenes, images), render_rir(cfg, scenes, spoilt)
    assert torch.equal(first.full, second.full) and torch.equal(first.early, second.early)


def test_no_early_rir_unless_asked_and_the_full_one_is_the_same():
    scenes, images = draw()
    with_early, without = render_rir(FEW, scenes, images), render_rir(replace(FEW, early=False), scenes, images)
    assert without.early is None and without[1:].early is None
    assert_rir_close(without.full, with_early.full)


def test_early_window_selects():
    """All images in the window: early is full. None, and not the direct path: early is zero. Else in between."""
    scenes, images = draw()
    everything = render_rir(replace(FEW, early_window_ms=(-1000, 1000)), scenes, images)
    assert_rir_close(everything.early, everything.full)
    nothing = render_rir(replace(FEW, early_window_ms=(1000, 2000)), scenes, images)
    assert (nothing.early == 0).all()
    part = render_rir(FEW, scenes, images)
    energy, early = part.full.square().sum(-1), part.early.square().sum(-1)
    assert ((early > 0) & (early < 1.2 * energy)).all() and (early < 0.99 * energy).any()


def test_early_is_full_where_only_early_images_exist():
    scenes, images = draw(batch=8)
    near = replace(images, ratio=images.ratio.clamp(max=1.05))  # at most 5 % of 5 m, 0.7 ms, after the direct path
    rirs = render_rir(FEW, scenes, near)
    assert_rir_close(rirs.early, rirs.full)
    # A window of 0..1 ms has the direct path and no image of more than 1 ms later.
    far = replace(images, ratio=images.ratio.clamp(min=4))
    direct = render_rir(FEW, scenes, replace(images, active=torch.zeros_like(images.active)))
    only = render_rir(replace(FEW, early_window_ms=(0, 1)), scenes, far)
    assert_rir_close(only.early, direct.full)


def test_early_window_has_its_start_and_not_its_end():
    """An arrival in the direct path's own slot is 0 ms after it."""
    scenes, images = draw()
    starts, ends = (find_arrivals(replace(FEW, early_window_ms=window), scenes, images).early[..., 0]
                    for window in ((0, 5), (-5, 0)))
    assert starts.all() and not ends.any()


# ---- physics ----


def direct_only(cfg, scenes):
    images = draw_images(cfg, scenes, generator=seeded(0))
    return render_rir(cfg, scenes, replace(images, active=torch.zeros_like(images.active))).full


def interpolated_peak(signal, around):
    """Position and height of the peak near `around`, by a windowed sinc of 32 taps each side on a grid of 1/64."""
    at = np.round(around) + np.arange(-128, 129) / 64
    k = np.arange(max(int(around) - 40, 0), int(around) + 41)
    offset = at[:, None] - k
    window = np.where(np.abs(offset) < 32, np.cos(np.pi * np.clip(offset, -32, 32) / 64) ** 2, 0)
    values = (np.sinc(offset) * window * signal[k]).sum(1)
    return at[values.argmax()], values.max()


@pytest.mark.parametrize("sample_rate", [8000, 16000, 44100])
def test_direct_path_arrives_on_time_and_at_its_level(sample_rate):
    """At d sample_rate / 340 within 0.15 sample; 0.0155 / d high, up to 15 % less by its phase within a sample."""
    cfg = replace(FEW, sample_rate=sample_rate)
    scenes, _ = draw(cfg, SceneConfig(src_dist_m=(0.4, 5.0)), batch=30)
    rirs = direct_only(cfg, scenes).double().numpy()
    dist = torch.cdist(scenes.mic_pos, scenes.src_pos).square().add(1e-3).sqrt().numpy()
    for place in np.ndindex(dist.shape):
        time = dist[place] * sample_rate / 340
        position, height = interpolated_peak(rirs[place], time)
        assert abs(position - time) < 0.15
        assert 0.85 < height * dist[place] / 0.0155 < 1.0


def test_nearer_mic_hears_first():
    scenes, _ = draw(scene=SceneConfig(rotate=True), batch=40)
    rirs = direct_only(FEW, scenes).double().numpy()
    dist = torch.cdist(scenes.mic_pos, scenes.src_pos)
    lag = ((dist[:, 1] - dist[:, 0]) * 16000 / 340).numpy()
    found = np.array([[gcc_delay(rirs[b, 0, s], rirs[b, 1, s]) for s in range(2)] for b in range(40)])
    assert np.abs(found - lag).max() < 0.15 and np.abs(lag).max() > 4
    clear = np.abs(lag) > 0.3
    assert (np.sign(found[clear]) == np.sign(lag[clear])).all()


def test_sources_do_not_hear_each_other():
    """Moving the second source changes its own RIR and not the first one's."""
    scenes, images = draw()
    moved = replace(scenes, src_pos=torch.stack((scenes.src_pos[:, 0], scenes.src_pos[:, 1] * 0.9), 1))
    first, second = render_rir(FEW, scenes, images).full, render_rir(FEW, moved, images).full
    assert torch.equal(first[:, :, 0], second[:, :, 0])
    assert not torch.equal(first[:, :, 1], second[:, :, 1])


def test_longer_reverberation_and_more_images_mean_more_late_energy():
    scenes = sample_scenes(SceneConfig(rt60_s=(0.3, 0.3)), 16, generator=seeded(0))
    dead = replace(scenes, rt60=scenes.rt60 / 2)
    few, many = RirConfig(num_images=(500, 500)), RirConfig(num_images=(2000, 2000))

    def late(cfg, scenes):
        full = render_rir(cfg, scenes, draw_images(cfg, scenes, generator=seeded(1))).full
        return float(full[..., 1200:2300].square().sum())  # 75 to 144 ms

    assert late(few, dead) < 0.5 * late(few, scenes)
    assert 3 < late(many, scenes) / late(few, scenes) < 5.5


def test_no_nan_in_300_scenes():
    for seed, (src, mic) in enumerate([(P.OMNI, P.OMNI), (P.CARDIOID, P.HALF_OMNI), (P.BIDIRECTIONAL, P.CARDIOID)]):
        cfg = RirConfig(num_images=(1, 64), src_pattern=src, mic_pattern=mic)
        scenes, images = draw(cfg, SceneConfig(rt60_s=(0.02, 0.7), num_mics=3, rotate=True), batch=100, seed=seed)
        rirs = render_rir(cfg, scenes, images)
        assert torch.isfinite(rirs.full).all() and torch.isfinite(rirs.early).all()
        assert (rirs.full.abs().amax((-1, -2)) > 0).all()


def test_no_nan_for_a_source_as_far_as_sound_goes_in_an_rt60():
    """There the images are nearer than the source, down to the microphone itself."""
    dist = 3.4 - 1.5e-4  # reads 3.399997 m
    scenes = make_scenes([[6, 5, 4]], [0.01], [[[1, 1, 1]]], [[[1 + dist, 1, 1]]])
    for seed in range(5):
        images = draw_images(RirConfig(), scenes, generator=seeded(seed))
        assert (images.ratio > 0).all() and (images.ratio <= 1).all() and images.ratio.min() < 0.02
        assert torch.isfinite(render_rir(RirConfig(), scenes, images).full).all()


def test_float32_positions_would_move_arrivals():
    """Why positions are float64: rounded to float32 some percent of the slots move, always by one."""
    cfg = RirConfig(num_images=(2000, 2000))
    scenes, images = draw(cfg)
    rounded = replace(scenes, mic_pos=scenes.mic_pos.float().double(), src_pos=scenes.src_pos.float().double())
    moved = find_arrivals(cfg, rounded, images).slot - find_arrivals(cfg, scenes, images).slot
    assert scenes.mic_pos.dtype == torch.float64
    assert 1e-5 < float((moved != 0).double().mean()) < 0.08 and int(moved.abs().max()) == 1


# ---- draws ----


def test_draws_follow_their_laws():
    """One-sample KS; by chance above 2.43 in 0.0015 % of the cases."""
    cfg = RirConfig(num_images=(500, 500), perturbation=(-1.0, 3.0), src_pattern=P.CARDIOID)
    scenes, images = draw(cfg, batch=8)
    dist = torch.cdist(scenes.src_pos, scenes.mic_pos).amin(-1).square().add(1e-3).sqrt()  # to the nearest mic
    span = 340 * scenes.rt60[:, None] / dist - 2
    share = (images.ratio.double() - 1) / span[..., None]
    x, y, z = images.direction.double().unbind(-1)
    assert (z >= -1e-7).all()  # only from above
    # arccos loses digits at 1, hence hypot
    laws = {
        "ratio": ks_uniform(share.square().clamp(max=1), 0, 1),  # sqrt(U)
        "azimuth": ks_uniform(torch.atan2(y, x), -math.pi - 1e-6, math.pi + 1e-6),
        "polar": ks_uniform(torch.atan2(torch.hypot(x, y), z), 0, math.pi / 2 + 1e-6),
        "perturbation": ks_uniform(images.perturbation, -1, 3),
    }
    rng = np.random.default_rng(0)
    cosine = np.cos(rng.uniform(-np.pi, np.pi, (2, 8000))).prod(0)
    laws["source cosine"] = ks(images.src_cosine.numpy(), cosine)
    assert max(laws.values()) < 2.43, laws
    assert_close(torch.linalg.vector_norm(images.direction, dim=-1), torch.ones(8, 2, 500))
    assert all(getattr(images, name).dtype == torch.float32 for name in
               ("direction", "ratio", "perturbation", "src_cosine"))


def test_draws_are_independent_of_each_other():
    cfg = RirConfig(num_images=(5000, 5000), src_pattern=P.CARDIOID)
    _, images = draw(cfg, batch=1)
    columns = torch.stack([values[0, src].double() for src in range(2) for values in
                           (images.ratio, images.perturbation, images.src_cosine, *images.direction.unbind(-1)[:2])])
    correlation = torch.corrcoef(columns) - torch.eye(len(columns))
    assert float(correlation.abs().max()) < 0.06  # 4.2 standard deviations


def test_number_of_images_is_uniform_over_its_range_with_both_ends():
    _, images = draw(replace(FEW, num_images=(3, 6)), batch=4000)
    count = images.active.sum(-1)
    share = torch.bincount(count, minlength=7)[3:] / 4000
    assert len(share) == 4 and count.min() == 3
    assert (share - 0.25).abs().max() < 0.03  # 4.4 standard deviations
    assert torch.equal(images.active, torch.arange(6) < count[:, None])  # the first ones, and of every source alike
    assert images.ratio.shape == (4000, 2, 6) and images.src_cosine is None


def test_same_generator_same_images():
    scenes, first = draw(seed=3)
    again, other = draw(seed=3)[1], draw(seed=4)[1]
    for name in ("direction", "ratio", "perturbation", "active"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.direction, other.direction)
    state = torch.get_rng_state()
    draw_images(FEW, scenes, generator=seeded(0))
    assert torch.equal(state, torch.get_rng_state())


# ---- configuration ----


CHANGES = dict(sample_rate=8000, num_images=(41, 80), perturbation=(-1.0, 2.0), perturbation_exponent=0.5,
               src_pattern=P.CARDIOID, mic_pattern=P.CARDIOID, early=False, early_window_ms=(-6, 10),
               image_directions=ImageDirections.SPHERE, src_directions=SrcDirections.SPHERE,
               look_vector=LookVector.EXACT, image_range=ImageRange.FULL, images_per_s=(40, 80), decay=Decay.MEASURED,
               band_rt60_ratio=((0.5, 1.0),) * 7, air=(20.0, 50.0))
WITH = {"src_directions": dict(src_pattern=P.CARDIOID), "look_vector": dict(mic_pattern=P.CARDIOID)}


@pytest.mark.parametrize("name", [f.name for f in fields(RirConfig)
                                  if f.name not in ("method", "hybrid_share", "ism_share")])
def test_every_field_changes_the_rir(name):
    def outcome(cfg):
        scenes, images = draw(cfg)
        rirs = render_rir(cfg, scenes, images)
        return rirs.full, rirs.early

    base = replace(FEW, **WITH.get(name, {}))
    plain, changed = outcome(base), outcome(replace(base, **{name: CHANGES[name]}))
    assert not all(b is not None and a.shape == b.shape and torch.equal(a, b) for a, b in zip(plain, changed))


NAN = float("nan")


@pytest.mark.parametrize("change, message", [
    (dict(sample_rate=999), "rir.sample_rate must be >= 1000 Hz, got 999"),
    (dict(sample_rate=16000.5), "rir.sample_rate must be whole, got 16000.5"),
    (dict(num_images=(0, 10)), "rir.num_images must satisfy 1 <= low <= high, got (0, 10)"),
    (dict(num_images=(11, 10)), "rir.num_images must satisfy 1 <= low <= high, got (11, 10)"),
    (dict(num_images=(1.5, 10)), "rir.num_images must be whole, got (1.5, 10)"),
    (dict(perturbation=(2.0, -2.0)), "rir.perturbation must satisfy -inf < low <= high < inf, got (2.0, -2.0)"),
    (dict(perturbation=(0.0, NAN)), "rir.perturbation must satisfy -inf < low <= high < inf, got (0.0, nan)"),
    (dict(perturbation=(-math.inf, 0.0)), "rir.perturbation must satisfy -inf < low <= high < inf, got (-inf, 0.0)"),
    (dict(perturbation_exponent=NAN), "rir.perturbation_exponent must be finite, got nan"),
    (dict(early_window_ms=(50, 50)), "rir.early_window_ms must satisfy low < high, got (50, 50)"),
    (dict(early_window_ms=(-6.5, 50)), "rir.early_window_ms must be whole, got (-6.5, 50)"),
])
def test_a_configuration_that_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError) as error:
        RirConfig(**change)
    assert str(error.value) == message


MAKE = """
import hashlib, torch
from ssl_gpu.rir import RirConfig, draw_images
from ssl_gpu.scene import SceneConfig, sample_scenes
generator = torch.Generator().manual_seed(0)
images = draw_images(RirConfig(), sample_scenes(SceneConfig(), 64, generator=generator), generator=generator)
print(hashlib.blake2b(images.ratio.numpy().tobytes() + images.perturbation.numpy().tobytes()).hexdigest())
"""


def test_images_are_the_same_on_another_cpu(capsys):
    """As far as MKL can be told to act as on one: distances and perturbations are what digests are taken of."""
    found = {name: subprocess.run([sys.executable, "-c", MAKE], env={**os.environ, **change, "PYTHONPATH": str(ROOT)},
                                  capture_output=True, text=True, check=True).stdout
             for name, change in (("without AVX-512", {"MKL_ENABLE_INSTRUCTIONS": "AVX2",
                                                       "ATEN_CPU_CAPABILITY": "avx2"}),
                                  ("old", {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default"}))}
    exec(MAKE, {})                                                      # this one
    found["this"] = capsys.readouterr().out
    assert len(set(found.values())) == 1 and len(found["this"]) == 129, found


def test_roots_are_correctly_rounded():
    x = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0))
    assert_close(rir.rounded_root(x), torch.from_numpy(np.sqrt(x.numpy())), rtol=0, atol=0)
