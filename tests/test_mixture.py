import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from oracle import coherence, ks_uniform, mixture
from torch.testing import assert_close

from ssl_gpu.geometry import linear_array
from ssl_gpu.microphones import Microphones
from ssl_gpu.mixture import MixtureConfig, MixtureDraw, diffuse_noise, draw_mixture, mix
from ssl_gpu.scene import SceneConfig, sample_scenes
from ssl_gpu.synthesis import RirBatch

BATCH, MICS, SRCS, SAMPLES, TAPS = 3, 2, 2, 900, 300
NOISY = MixtureConfig(level_difference_db=(-5.0, 5.0), sensor_snr_db=(10.0, 20.0), diffuse_snr_db=(0.0, 10.0))

MISMATCHED = replace(NOISY, mic_gain_db=3.0, mic_phase_deg=20.0)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def setup(seed=0, early=True):
    """Dry speech, RIRs of random taps, scenes: all independent of each other."""
    generator = seeded(seed)
    dry = torch.randn(BATCH, SRCS, SAMPLES, generator=generator)
    full, part = (torch.randn(BATCH, MICS, SRCS, TAPS, generator=generator) for _ in range(2))
    scenes = sample_scenes(SceneConfig(), BATCH, generator=generator)
    return dry, RirBatch(full, part if early else None, torch.full((BATCH,), TAPS), 16000), scenes


def draw(cfg, batch=BATCH, srcs=SRCS, mics=MICS, samples=SAMPLES, seed=0):
    return draw_mixture(cfg, batch, srcs, mics, samples, generator=seeded(seed))


def mixed(cfg, seed=0, **kwargs):
    dry, rirs, scenes = setup(**kwargs)
    return mix(dry, rirs, scenes, draw(cfg, seed=seed))


def test_clean_mixture_equals_the_oracle():
    dry, rirs, scenes = setup()
    drawn = draw(MixtureConfig(level_difference_db=(-5.0, 5.0)))
    batch = mix(dry, rirs, scenes, drawn)
    assert batch.audio.shape == (BATCH, MICS, SAMPLES) and batch.audio.dtype == torch.float32
    assert batch.sample_rate == 16000 and batch.scenes is scenes
    for row in range(BATCH):
        expected = mixture(dry[row].double().numpy(), rirs.full[row].double().numpy(), drawn.gain[row].double().numpy())
        assert_close(batch.audio[row].double(), torch.from_numpy(expected), rtol=0, atol=1e-6 * np.abs(expected).max())


def test_early_target_is_each_talker_alone_through_the_early_rir():
    dry, rirs, scenes = setup()
    drawn = draw(NOISY)
    early = mix(dry, rirs, scenes, drawn).early
    assert early.shape == (BATCH, MICS, SRCS, SAMPLES)
    for row in range(BATCH):
        for src in range(SRCS):
            one = mixture(dry[row, [src]].double().numpy(), rirs.early[row][:, [src]].double().numpy(),
                          drawn.gain[row, [src]].double().numpy())
            assert_close(early[row, :, src].double(), torch.from_numpy(one), rtol=0, atol=1e-6 * np.abs(one).max())
    assert mixed(NOISY, early=False).early is None


def test_original_mixture_is_a_plain_sum():
    drawn = draw(MixtureConfig())
    assert (drawn.gain == 1).all() and drawn.sensor is None and drawn.diffuse is None
    assert torch.isinf(drawn.sensor_snr).all() and torch.isinf(drawn.diffuse_snr).all()


# ---- levels ----


def test_level_differences_are_relative_to_the_first_talker_and_uniform_in_db():
    gain = draw(MixtureConfig(level_difference_db=(-5.0, 3.0)), batch=3000, srcs=3, samples=1).gain
    assert (gain[:, 0] == 1).all()
    for src in (1, 2):
        assert ks_uniform(20 * torch.log10(gain[:, src].double()), -5 - 1e-5, 3 + 1e-5) < 2
    assert abs(float(torch.corrcoef(gain[:, 1:].T)[0, 1])) < 0.08


def test_gain_is_applied_to_its_own_talker_before_the_room():
    dry, rirs, scenes = setup()
    drawn = draw(MixtureConfig())
    audio = {}
    for src in range(SRCS):
        solo = dry * torch.eye(SRCS)[src][:, None]
        audio[src] = mix(solo, rirs, scenes, drawn).audio
    gain = torch.tensor([[1, 0.5], [1, 2], [1, 1.5]])
    both = mix(dry, rirs, scenes, replace(drawn, gain=gain)).audio
    assert_close(both, audio[0] + gain[:, 1, None, None] * audio[1], rtol=0, atol=1e-4)


# ---- noise ----


def noise_of(cfg, seed=0):
    """Mixture with noise minus the one without, and the latter."""
    clean = mixed(replace(cfg, sensor_snr_db=None, diffuse_snr_db=None), seed).audio.double()
    return mixed(cfg, seed).audio.double() - clean, clean


def db(power):
    return 10 * torch.log10(power)


@pytest.mark.parametrize("kind", ["sensor_snr_db", "diffuse_snr_db"])
@pytest.mark.parametrize("snr", [-10.0, 0.0, 17.5])
def test_snr_is_as_asked(kind, snr):
    noise, clean = noise_of(MixtureConfig(**{kind: (snr, snr)}))
    ratio = db(clean.square().mean((1, 2)) / noise.square().mean((1, 2)))
    assert_close(ratio, torch.full((BATCH,), snr, dtype=torch.float64), rtol=0, atol=1e-3)


def test_each_noise_has_its_own_snr_relative_to_the_clean_mixture():
    dry, rirs, scenes = setup()
    drawn = draw(replace(NOISY, sensor_snr_db=(5.0, 5.0), diffuse_snr_db=(-5.0, -5.0)))
    both, sensor, diffuse, none = (mix(dry, rirs, scenes, replace(drawn, **off)).audio.double() for off in (
        {}, dict(diffuse=None), dict(sensor=None), dict(sensor=None, diffuse=None)))
    assert_close(both - none, (sensor - none) + (diffuse - none), rtol=0, atol=1e-3)
    for noisy, snr in ((sensor, 5.0), (diffuse, -5.0)):
        ratio = db(none.square().mean((1, 2)) / (noisy - none).square().mean((1, 2)))
        assert_close(ratio, torch.full((BATCH,), snr, dtype=torch.float64), rtol=0, atol=1e-3)


def test_snr_is_drawn_per_example_and_uniform():
    drawn = draw(NOISY, batch=3000, mics=1, samples=1)
    assert ks_uniform(drawn.sensor_snr, 10, 20) < 2 and ks_uniform(drawn.diffuse_snr, 0, 10) < 2
    assert abs(float(torch.corrcoef(torch.stack((drawn.sensor_snr, drawn.diffuse_snr)))[0, 1])) < 0.08


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_noise_probability_is_the_share_of_examples_with_each_noise_independently(probability):
    drawn = draw(replace(NOISY, noise_probability=probability), batch=4000, mics=1, samples=1)
    sensor, diffuse = torch.isfinite(drawn.sensor_snr), torch.isfinite(drawn.diffuse_snr)
    spread = 4 * math.sqrt(probability * (1 - probability) / 4000)
    for share, expected in ((sensor, probability), (diffuse, probability), (sensor & diffuse, probability ** 2)):
        assert abs(float(share.double().mean()) - expected) <= spread


def test_infinite_snr_leaves_the_example_clean():
    dry, rirs, scenes = setup()
    drawn = draw(NOISY)
    some = replace(drawn, sensor_snr=torch.tensor([math.inf, 10, math.inf]),
                   diffuse_snr=torch.tensor([math.inf, math.inf, 10]))
    clean = mix(dry, rirs, scenes, replace(drawn, sensor=None, diffuse=None)).audio
    equal = (mix(dry, rirs, scenes, some).audio == clean).all(-1).all(-1)
    assert equal.tolist() == [True, False, False]


def test_a_mixture_says_which_snrs_were_drawn():
    """Measured on the audio; infinite for an example that stays free of the noise, by chance or by configuration."""
    dry, rirs, scenes = setup()
    drawn = draw(replace(NOISY, noise_probability=0.5), seed=1)
    assert 0 < torch.isfinite(drawn.sensor_snr).sum() < BATCH  # or nothing is tested
    for name, other in (("sensor", "diffuse"), ("diffuse", "sensor")):
        heard = mix(dry, rirs, scenes, replace(drawn, **{other: None}))
        clean = mix(dry, rirs, scenes, replace(drawn, sensor=None, diffuse=None))
        noise = (heard.audio - clean.audio).double()
        found = db(clean.audio.double().square().mean((1, 2)) / noise.square().mean((1, 2)))
        assert_close(getattr(heard, f"{name}_snr_db").double(), found, rtol=0, atol=1e-3)
    batch = mixed(MixtureConfig())
    assert batch.sensor_snr_db.tolist() == batch.diffuse_snr_db.tolist() == [math.inf] * BATCH


def test_silence_stays_silent_and_finite():
    dry, rirs, scenes = setup()
    batch = mix(torch.zeros_like(dry), rirs, scenes, draw(NOISY))
    assert (batch.audio == 0).all() and (batch.early == 0).all()


def test_sensor_noise_is_white_and_independent_between_microphones():
    drawn = draw(NOISY, batch=1, mics=2, samples=2 ** 16)
    estimate, auto = coherence(drawn.sensor[0].numpy())  # 511 half overlapping frames: a standard deviation of 0.05
    assert np.abs(estimate[0, 1]).max() < 0.2
    assert np.abs(auto - 1).max() < 0.25


ARRAYS = {"2 mics": linear_array(2, 0.1), "4 mics": linear_array(4, 0.1),
          "4 mics in space": torch.tensor([[0, 0, 0], [0.2, 0, 0], [0, 0.1, 0], [0.05, 0, 0.15]], dtype=torch.float64)}


@pytest.mark.parametrize("name", ARRAYS)
def test_diffuse_noise_has_the_coherence_of_a_spherically_isotropic_field(name):
    """Welch, 255 half overlapping frames of 1024 in each of 8 clips, whose standard deviation is 0.02."""
    mic_pos = ARRAYS[name]
    mics = len(mic_pos)
    white = torch.randn(8, mics, 2 ** 17, generator=seeded(0))
    noise = diffuse_noise(white, mic_pos.expand(8, mics, 3), 16000)
    assert noise.shape == white.shape and noise.dtype == torch.float32
    parts = [coherence(clip, 1024) for clip in noise.numpy()]
    estimate, auto = (np.mean([part[i] for part in parts], 0) for i in range(2))
    dist = torch.cdist(mic_pos, mic_pos).numpy()[..., None]
    freq = np.arange(513) * 16000 / 1024
    expected = np.sinc(2 * freq * dist / 340)
    inner = slice(2, -1)  # the window's main lobe mixes the first bins with their mirror images
    assert np.abs(estimate - expected)[..., inner].max() < 0.12
    assert np.sqrt(np.square(np.abs(estimate - expected)[..., inner]).mean()) < 0.03
    assert np.abs(auto[:, inner] - 1).max() < 0.12


@pytest.mark.parametrize("mics, spacing", [(2, 0.1), (4, 0.02), (8, 0.02), (16, 0.01), (3, 0.0)])
def test_diffuse_filter_has_that_coherence_exactly(mics, spacing):
    """Impulse by impulse, so without estimation: to 2e-4 at every frequency, for dense arrays too, whose coherence
    matrix is all but singular."""
    samples = 2000
    impulses = torch.zeros(mics, mics, samples)
    impulses[torch.arange(mics), torch.arange(mics), 0] = 1
    mic_pos = linear_array(mics, spacing) + torch.tensor([3, 2, 1])
    factor = np.fft.rfft(diffuse_noise(impulses, mic_pos.expand(mics, mics, 3), 16000).double().numpy())
    found = np.einsum("kif,kjf->ijf", factor, factor.conj())
    dist = torch.cdist(mic_pos, mic_pos, compute_mode="donot_use_mm_for_euclid_dist").numpy()[..., None]
    expected = np.sinc(2 * np.fft.rfftfreq(samples, 1 / 16000) * dist / 340)
    assert np.abs(found - expected).max() < 2e-4


def test_diffuse_noise_uses_the_array_of_each_scene():
    white = torch.randn(2, 2, 999, generator=seeded(0))
    near, far = linear_array(2, 0.05), linear_array(2, 0.3)
    both = diffuse_noise(white, torch.stack((near, far)), 16000)
    assert both.shape == white.shape  # an odd length too
    for row, array in enumerate((near, far)):
        assert_close(both[row:row + 1], diffuse_noise(white[row:row + 1], array[None], 16000))
    assert not torch.allclose(both[:1], diffuse_noise(white[:1], far[None], 16000), atol=1e-2)


# ---- microphones ----


def test_alike_microphones_draw_nothing_and_change_nothing():
    """The default: what the generator gives next is what it would give if there were no such keys."""
    generator, by_hand = seeded(5), seeded(5)
    drawn = draw_mixture(MixtureConfig(sensor_snr_db=(0.0, 0.0)), BATCH, SRCS, MICS, SAMPLES, generator=generator)
    for shape in ((BATCH, SRCS), (BATCH,), (BATCH,)):
        torch.rand(shape, generator=by_hand)
    assert torch.equal(drawn.sensor, torch.randn(BATCH, MICS, SAMPLES, generator=by_hand))
    assert drawn.microphones is None
    assert torch.equal(torch.rand(4, generator=generator), torch.rand(4, generator=by_hand))


def test_microphones_are_drawn_last_so_that_levels_and_noises_stay():
    alike, different = draw(NOISY), draw(MISMATCHED)
    for field in fields(MixtureDraw):
        if field.name != "microphones":
            assert torch.equal(getattr(alike, field.name), getattr(different, field.name))


def heard(signal, response):
    """signal [..., sample] by a microphone of response(n_fft) [freq] in float64, much longer transforms: an oracle."""
    n_fft = 8 * SAMPLES
    spectrum = np.fft.rfft(signal.double().numpy(), n_fft)
    return np.fft.irfft(spectrum * response(n_fft), n_fft)[..., :signal.shape[-1]]


def test_speech_early_part_and_no_sensor_noise_pass_the_microphones():
    """Against clips longer than the RIRs' ends, so that nothing wraps round or is cut off too soon."""
    dry, rirs, scenes = setup()
    dry[..., -2 * TAPS:] = 0
    drawn = draw(replace(MISMATCHED, diffuse_snr_db=None))
    plain, different = (mix(dry, rirs, scenes, replace(drawn, sensor=None, microphones=mics))
                        for mics in (None, drawn.microphones))
    noisy = mix(dry, rirs, scenes, drawn)
    for row in range(BATCH):
        for mic in range(MICS):
            one = Microphones(*(part[row:row + 1, mic:mic + 1].double() for part in
                                (drawn.microphones.gain, drawn.microphones.phase)))
            for name in ("audio", "early"):
                expected = heard(getattr(plain, name)[row, mic], lambda n: one.response(n)[0, 0].numpy())
                found = getattr(different, name)[row, mic].double().numpy()
                np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    noise = noisy.audio - different.audio
    scale = (noise * drawn.sensor).sum((1, 2)) / drawn.sensor.square().sum((1, 2))
    assert_close(noise, scale[:, None, None] * drawn.sensor, rtol=0, atol=1e-4)


def test_diffuse_noise_passes_the_microphones():
    white = torch.randn(1, 2, 2 ** 12, generator=seeded(0))
    mics = draw(MISMATCHED, batch=1).microphones
    plain, different = (diffuse_noise(white, linear_array(2, 0.1)[None], 16000, m).double() for m in (None, mics))
    ratio = torch.fft.rfft(different) / torch.fft.rfft(plain)
    assert_close(ratio, mics.response(2 ** 12).to(ratio.dtype), rtol=0, atol=1e-3)
    assert float((ratio[0, 0] - ratio[0, 1]).abs().max()) > 0.1


def test_diffuse_noise_of_a_mixture_is_what_its_own_microphones_hear():
    dry, rirs, scenes = setup()
    drawn = draw(replace(MISMATCHED, sensor_snr_db=None))
    noise = mix(dry, rirs, scenes, drawn).audio - mix(dry, rirs, scenes, replace(drawn, diffuse=None)).audio
    expected = diffuse_noise(drawn.diffuse, scenes.mic_pos, 16000, drawn.microphones)
    scale = (noise * expected).sum((1, 2)) / expected.square().sum((1, 2))
    assert_close(noise, scale[:, None, None] * expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["sensor_snr_db", "diffuse_snr_db"])
def test_snr_is_as_asked_of_what_the_microphones_make_of_speech_and_noise(kind):
    dry, rirs, scenes = setup()
    drawn = draw(MixtureConfig(**{kind: (3.0, 3.0)}, mic_gain_db=12.0, mic_phase_deg=90.0))
    clean, noisy = (mix(dry, rirs, scenes, each).audio.double() for each in (
        replace(drawn, sensor=None, diffuse=None), drawn))
    noise = noisy - clean
    ratio = db(clean.square().mean((1, 2)) / noise.square().mean((1, 2)))
    assert_close(ratio, torch.full((BATCH,), 3.0, dtype=torch.float64), rtol=0, atol=1e-3)


# ---- the rest ----


def test_same_generator_same_draw():
    first, again, other = ({f.name: getattr(drawn, f.name) for f in fields(MixtureDraw)} for drawn in (
        draw(MISMATCHED, seed=seed) for seed in (1, 1, 2)))
    for each in (first, again, other):
        mics = each.pop("microphones")
        each |= {"mic_gain": mics.gain, "mic_phase": mics.phase}
    for name, value in first.items():
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name])
    part = draw(MISMATCHED, seed=1)[1:3].to("cpu")
    for found, name in ((part.diffuse, "diffuse"), (part.gain, "gain"), (part.microphones.gain, "mic_gain"),
                        (part.microphones.phase, "mic_phase")):
        assert torch.equal(found, first[name][1:3])
    assert draw(MixtureConfig())[:1].to("cpu").sensor is None
    state = torch.get_rng_state()
    draw(MISMATCHED)
    assert torch.equal(state, torch.get_rng_state())


def test_rows_do_not_hear_each_other():
    dry, rirs, scenes = setup()
    drawn = draw(MISMATCHED)
    whole, part = mix(dry, rirs, scenes, drawn), mix(dry[1:2], rirs[1:2], scenes[1:2], drawn[1:2])
    assert_close(part.audio, whole.audio[1:2], rtol=0, atol=1e-4)
    assert_close(part.early, whole.early[1:2], rtol=0, atol=1e-4)


CHANGES = dict(level_difference_db=(-6.0, 5.0), sensor_snr_db=None, diffuse_snr_db=(0.0, 11.0), noise_probability=0.0,
               mic_gain_db=1.0, mic_phase_deg=5.0)


@pytest.mark.parametrize("name", [f.name for f in fields(MixtureConfig)])
def test_every_field_changes_the_mixture(name):
    for base in (NOISY, MISMATCHED):
        assert not torch.equal(mixed(base).audio, mixed(replace(base, **{name: CHANGES[name]})).audio)


@pytest.mark.parametrize("change, message", [
    (dict(level_difference_db=(1.0, 0.0)), "mixture.level_difference_db must satisfy -inf < low <= high < inf, "
                                           "got (1.0, 0.0)"),
    (dict(sensor_snr_db=(20.0, 10.0)), "mixture.sensor_snr_db must satisfy -inf < low <= high < inf, got (20.0, 10.0)"),
    (dict(diffuse_snr_db=(math.inf,) * 2), "mixture.diffuse_snr_db must satisfy -inf < low <= high < inf, "
                                           "got (inf, inf)"),
    (dict(sensor_snr_db=(0.0, math.nan)), "mixture.sensor_snr_db must satisfy -inf < low <= high < inf, "
                                          "got (0.0, nan)"),
    (dict(noise_probability=1.1), "mixture.noise_probability must be in [0, 1], got 1.1"),
    (dict(noise_probability=-0.1), "mixture.noise_probability must be in [0, 1], got -0.1"),
    (dict(noise_probability=math.nan), "mixture.noise_probability must be in [0, 1], got nan"),
    (dict(mic_gain_db=-1.0), "mixture.mic_gain_db must satisfy 0 <= mic_gain_db < inf, got -1.0"),
    (dict(mic_gain_db=math.inf), "mixture.mic_gain_db must satisfy 0 <= mic_gain_db < inf, got inf"),
    (dict(mic_phase_deg=-0.1), "mixture.mic_phase_deg must be in [0, 180], got -0.1"),
    (dict(mic_phase_deg=181.0), "mixture.mic_phase_deg must be in [0, 180], got 181.0"),
    (dict(mic_phase_deg=math.nan), "mixture.mic_phase_deg must be in [0, 180], got nan"),
])
def test_a_configuration_that_cannot_be_is_refused_in_one_line(change, message):
    with pytest.raises(ValueError) as error:
        MixtureConfig(**change)
    assert str(error.value) == message


@pytest.mark.parametrize("shape", [(BATCH, SRCS + 1, SAMPLES), (BATCH + 1, SRCS, SAMPLES), (BATCH, SRCS)])
def test_speech_that_does_not_fit_the_rirs_is_refused(shape):
    _, rirs, scenes = setup()
    with pytest.raises(ValueError) as error:
        mix(torch.zeros(shape), rirs, scenes, draw(MixtureConfig()))
    assert str(error.value) == ("dry speech [batch, src, sample] must match RIRs [batch, mic, src, tap], "
                                f"got {list(shape)} and [3, 2, 2, 300]")
