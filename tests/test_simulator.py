from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from oracle import mixture
from torch.testing import assert_close

from ssl_gpu.ism import IsmConfig
from ssl_gpu.mixture import MixtureConfig, mix
from ssl_gpu.pool import draw_original_images
from ssl_gpu.rir import Method, RirConfig, draw_images, render_rir
from ssl_gpu.scene import SceneConfig, make_scenes, original_scenes, sample_scenes
from ssl_gpu.simulator import BANK_BLOCK, Simulator, SimulatorConfig

SCENE, RIR = SceneConfig(rt60_s=(0.05, 0.15), rotate=True), RirConfig(num_images=(20, 40))
MIX = MixtureConfig(level_difference_db=(-5.0, 5.0), sensor_snr_db=(20.0, 30.0), diffuse_snr_db=(10.0, 20.0))
TENSORS = ("room_dim", "rt60", "mic_pos", "src_pos", "mic_orientation", "src_orientation", "valid")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def simulator(scene=SCENE, rir=RIR, mixing=MIX, chunk=None):
    return Simulator(scene, rir, mixing, SimulatorConfig(chunk))


def speech(batch=5, srcs=2, samples=2000):
    return torch.randn(batch, srcs, samples, generator=seeded(99))


def same(first, second):
    assert torch.equal(first.audio, second.audio) and torch.equal(first.early, second.early)
    for name in TENSORS:
        assert torch.equal(getattr(first.scenes, name), getattr(second.scenes, name))


def test_same_seed_same_audio_and_no_global_randomness():
    state = torch.get_rng_state()
    first, again = (simulator()(speech(), generator=seeded(1)) for _ in range(2))
    same(first, again)
    assert torch.equal(state, torch.get_rng_state())
    other = simulator()(speech(), generator=seeded(2))
    assert not torch.equal(first.audio, other.audio)
    draws = [simulator().draw(5, 2000, generator=seeded(seed)) for seed in (1, 2)]
    for of in (lambda draw: draw.scenes.src_pos, lambda draw: draw.rooms.images.direction,
               lambda draw: draw.mixture.sensor):
        assert not torch.equal(*map(of, draws))
    generator, one = seeded(1), simulator()
    assert torch.equal(one(speech(), generator=generator).audio, first.audio)
    assert not torch.equal(one(speech(), generator=generator).audio, first.audio)  # and a new room at every call


def test_audio_is_dry_speech_through_the_rirs_of_its_scenes():
    """From the draw by hand: the labels, the RIRs and the audio belong together."""
    simulate, dry = simulator(mixing=MixtureConfig(level_difference_db=(-5.0, 5.0))), speech()
    drawn = simulate.draw(5, 2000, generator=seeded(1))
    batch = simulate.render(dry, drawn)
    assert batch.audio.shape == (5, 2, 2000) and batch.early.shape == (5, 2, 2, 2000) and batch.sample_rate == 16000
    rirs = render_rir(RIR, drawn.scenes, drawn.rooms.images)
    for row in range(5):
        expected = torch.from_numpy(mixture(dry[row].double().numpy(), rirs.full[row].double().numpy(),
                                            drawn.mixture.gain[row].double().numpy()))
        assert_close(batch.audio[row].double(), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))
    assert batch.scenes is drawn.scenes and drawn.bank_row is None


def test_draw_on_the_cpu_then_render_equals_the_call():
    """Bit for bit; moving the draw, as to another device, changes nothing."""
    simulate, dry = simulator(), speech()
    called = simulate(dry, generator=seeded(1))
    same(simulate.render(dry, simulate.draw(5, 2000, generator=seeded(1)).to("cpu")), called)


@pytest.mark.parametrize("bank", [None, 3])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_snrs_that_were_drawn_come_back(bank, chunk):
    """Of every example, however many are rendered at a time; in captured calls too."""
    simulate = simulator(replace(SCENE, bank=bank), mixing=replace(MIX, noise_probability=0.5), chunk=chunk)
    if bank:
        simulate.fill_bank(generator=seeded(0))
    drawn = simulate.draw(5, 2000, generator=seeded(1))
    captured = simulate.captured(5, 2000, generator=seeded(1))
    for heard in (simulate.render(speech(), drawn), captured(speech())):
        assert torch.equal(heard.sensor_snr_db, drawn.mixture.sensor_snr)
        assert torch.equal(heard.diffuse_snr_db, drawn.mixture.diffuse_snr)
    assert 0 < torch.isfinite(drawn.mixture.sensor_snr).sum() < 5
    clean = simulator(mixing=MixtureConfig(), chunk=chunk)(speech(), generator=seeded(1))
    assert clean.sensor_snr_db.tolist() == clean.diffuse_snr_db.tolist() == [float("inf")] * 5


@pytest.mark.parametrize("bank", [None, 3])
def test_chunk_does_not_change_the_result(bank):
    """To 1e-6 of the loudest sample; batched FFTs may round otherwise in another batch size."""
    def run(chunk):
        simulate = simulator(replace(SCENE, bank=bank), chunk=chunk)
        if bank:
            simulate.fill_bank(generator=seeded(0))
        return simulate(speech(), generator=seeded(1))

    whole = run(None)
    for chunk in (1, 2, 5, 100):
        part = run(chunk)
        for name in ("audio", "early"):
            expected = getattr(whole, name)
            assert_close(getattr(part, name), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        assert torch.equal(part.scenes.src_pos, whole.scenes.src_pos)


def test_rooms_of_a_bank_do_not_depend_on_the_chunk():
    """Their images are drawn in blocks of a fixed size."""
    few = replace(RIR, num_images=(4, 8), early=False)
    banks = []
    for chunk in (None, 50):
        simulate = simulator(replace(SCENE, bank=BANK_BLOCK + 6), few, chunk=chunk)
        simulate.fill_bank(generator=seeded(0))
        banks.append(simulate.bank[1])
    assert banks[0].full.shape[0] == BANK_BLOCK + 6 and banks[0].early is None
    assert_close(banks[0].full, banks[1].full, rtol=0, atol=1e-8)
    assert torch.equal(banks[0].length, banks[1].length)
    assert len(banks[0].full.abs().sum((1, 2, 3)).unique()) == BANK_BLOCK + 6  # no room twice


def test_only_rooms_of_the_bank_occur_and_every_one_does():
    simulate = simulator(replace(SCENE, bank=3), chunk=7)
    simulate.fill_bank(generator=seeded(0))
    scenes, rirs = simulate.bank
    dry = speech(60)
    drawn = simulate.draw(60, 2000, generator=seeded(1))
    assert drawn.rooms is None and torch.bincount(drawn.bank_row).min() >= 5 and drawn.bank_row.max() == 2
    batch = simulate.render(dry, drawn)
    for name in TENSORS:
        assert torch.equal(getattr(batch.scenes, name), getattr(scenes, name)[drawn.bank_row])
    expected = mix(dry, rirs[drawn.bank_row], batch.scenes, drawn.mixture)
    assert_close(batch.audio, expected.audio, rtol=0, atol=1e-6)
    assert_close(batch.early, expected.early, rtol=0, atol=1e-6)


def test_bank_is_drawn_like_any_other_room():
    simulate, generator = simulator(replace(SCENE, bank=3)), seeded(0)
    simulate.fill_bank(generator=seeded(0))
    scenes = sample_scenes(SCENE, 3, generator=generator)
    expected = render_rir(RIR, scenes, draw_images(RIR, scenes, generator=generator))
    assert torch.equal(simulate.bank[0].src_pos, scenes.src_pos)
    assert_close(simulate.bank[1].full, expected.full, rtol=0, atol=1e-8)
    assert_close(simulate.bank[1].early, expected.early, rtol=0, atol=1e-8)


def test_bank_is_filled_once_from_its_generator():
    first, again, other = (simulator(replace(SCENE, bank=2)) for _ in range(3))
    for simulate, seed in ((first, 0), (again, 0), (other, 1)):
        simulate.fill_bank(generator=seeded(seed))
    assert torch.equal(first.bank[1].full, again.bank[1].full)
    assert not torch.equal(first.bank[1].full, other.bank[1].full)
    before = first.bank[1].full
    first(speech(), generator=seeded(5))
    assert first.bank[1].full is before


def test_pool_of_the_original_is_its_rooms_whatever_the_chunk_and_the_seed():
    """Scenes to the last bit, images of draw_original_images; nothing is drawn from the generator."""
    law, rir, bank = SceneConfig(pool="original", bank=BANK_BLOCK + 6), RirConfig(early=False), {}
    for chunk, seed in ((None, 0), (50, 1)):
        bank[seed], generator = Simulator(law, rir, MIX, SimulatorConfig(chunk)), seeded(seed)
        before = generator.get_state()
        bank[seed].fill_bank(generator=generator)
        assert torch.equal(generator.get_state(), before)
    scenes, rirs = bank[0].bank
    original = original_scenes()
    for name in (*TENSORS, "num_images"):
        assert torch.equal(getattr(scenes, name), getattr(original, name)[:BANK_BLOCK + 6])
    expected = render_rir(rir, original[:3], draw_original_images(original, range(3)))
    assert torch.equal(rirs.full[:3], expected.full) and torch.equal(rirs.length[:3], expected.length)
    last = render_rir(rir, original[BANK_BLOCK + 5:BANK_BLOCK + 6], draw_original_images(original, [BANK_BLOCK + 5]))
    assert torch.equal(rirs.full[-1:], last.full)
    assert torch.equal(bank[1].bank[1].full, rirs.full)
    few = Simulator(replace(law, bank=2), rir, MIX)
    few.fill_bank(generator=seeded(0))
    assert torch.equal(few.bank[1].full, rirs.full[:2])
    assert set(few(speech(), generator=seeded(1)).scenes.rt60.tolist()) <= set(original.rt60[:2].tolist())


def test_pool_of_the_original_is_rendered_by_its_law_alone():
    with pytest.raises(ValueError, match="^scene.pool=original has rooms and RIRs by the original's law: "
                                         "rir.hybrid_share must be 0.0, got 0.5$"):
        Simulator(SceneConfig(pool="original", bank=2), RirConfig(hybrid_share=0.5))


def test_an_unfilled_bank_is_an_error_of_one_line():
    with pytest.raises(ValueError, match="^scene.bank=3 needs Simulator.fill_bank before the first draw$"):
        simulator(replace(SCENE, bank=3))(speech(), generator=seeded(0))
    with pytest.raises(ValueError, match="^Simulator.fill_bank needs scene.bank to be a number of rooms, got None$"):
        simulator().fill_bank(generator=seeded(0))


def test_a_bank_with_rooms_that_break_the_law_is_refused(monkeypatch):
    """Be it one: a law that leaves 1 % of its scenes without places passes the first check."""
    monkeypatch.setattr("ssl_gpu.simulator.check_places", lambda law: None)
    law = replace(SCENE, room_max_m=(3.0, 3.0, 2.5), src_dist_m=(1.5, 5.0), bank=100)
    with pytest.raises(ValueError, match=r"^scene: \d+ of scene.bank=100 rooms have no place for the sources, widen "
                                         r"scene.src_dist_m=\(1.5, 5.0\) or scene.room_min_m$"):
        simulator(law).fill_bank(generator=seeded(0))


def test_no_gradient_graph_is_attached():
    dry = speech().requires_grad_()
    for bank in (None, 2):
        simulate = simulator(replace(SCENE, bank=bank))
        if bank:
            simulate.fill_bank(generator=seeded(0))
        batch = simulate(dry, generator=seeded(0))
        assert not batch.audio.requires_grad and not batch.early.requires_grad
        assert not batch.audio.is_inference()  # such tensors could not enter a backward pass
        rendered = simulate.render(dry, simulate.draw(5, 2000, generator=seeded(0)))
        assert not rendered.audio.requires_grad


@pytest.mark.parametrize("scene", [SceneConfig(num_mics=1, num_src=1), SceneConfig(num_mics=5, num_src=4),
                                   SceneConfig(array_radius_m=0.2, num_mics=3),
                                   SceneConfig(mic_array_m=((0, 0, 0), (0.1, 0, 0), (0, 0.1, 0)), num_src=3)])
def test_any_number_of_microphones_and_sources(scene):
    batch = simulator(scene)(speech(2, scene.num_src), generator=seeded(0))
    assert batch.audio.shape == (2, scene.mic_count, 2000) and torch.isfinite(batch.audio).all()
    assert batch.early.shape == (2, scene.mic_count, scene.num_src, 2000)


@pytest.mark.parametrize("shape", [(5, 3, 2000), (5, 2000), (5, 2, 0), (0, 2, 2000)])
def test_speech_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError) as error:
        simulator()(torch.zeros(shape), generator=seeded(0))
    assert str(error.value) == f"dry speech must be [batch, src=2, sample], got {list(shape)}"


def test_speech_as_an_array_is_refused():
    simulate, dry = simulator(), speech(2).numpy()
    for call in (lambda: simulate(dry, generator=seeded(0)),
                 lambda: simulate.render(dry, simulate.draw(2, 2000, generator=seeded(0)))):
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == "dry speech must be a torch tensor, got numpy.ndarray"


def test_speech_of_another_batch_than_the_draw_is_refused():
    """With a chunk that divides both, labels of scenes nobody speaks in would come back."""
    simulate = simulator(chunk=2, mixing=MixtureConfig())
    drawn = simulate.draw(4, 2000, generator=seeded(0))
    with pytest.raises(ValueError) as error:
        simulate.render(speech(2), drawn)
    assert str(error.value) == "dry speech must be [batch=4, src, sample] for this draw, got [2, 2, 2000]"


def test_scenes_that_break_their_law_are_silent_and_leave_the_others_alone():
    simulate, dry = simulator(), speech()
    drawn = simulate.draw(5, 2000, generator=seeded(0))
    whole = simulate.render(dry, drawn)
    drawn.scenes.valid[1] = False
    drawn.rooms.images.ratio[1] = -0.5  # as at 340 m/s * RT60 below the distance of the source: the RIR is NaN
    part = simulate.render(dry, drawn)
    assert (part.audio[1] == 0).all() and (part.early[1] == 0).all()
    kept = [0, 2, 3, 4]
    assert torch.equal(part.audio[kept], whole.audio[kept]) and torch.equal(part.early[kept], whole.early[kept])


def test_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="^simulator.chunk must be >= 1 scene, got 0$"):
        SimulatorConfig(chunk=0)
    assert [SimulatorConfig().chunk_on(torch.device(device)) for device in ("cpu", "meta")] == [64, 1024]
    assert SimulatorConfig(7).chunk_on(torch.device("cpu")) == 7
    meta = torch.device("meta")
    assert [SimulatorConfig().chunk_on(meta, pairs) for pairs in (1, 8, 32, 9999)] == [4096, 512, 128, 1]
    assert SimulatorConfig(7).chunk_on(meta, 32) == 7 and SimulatorConfig().chunk_on(torch.device("cpu"), 32) == 8


def test_scenes_of_your_own_are_heard():
    """Other arrays and numbers of talkers than the law's, each by the method of the simulator; a bank has no say."""
    mics = [[[2 + 0.05 * k, 2, 1.2] for k in range(4)]] * 3
    scenes = make_scenes([[5, 4, 3]] * 3, [0.3, 0.2, 0.25], mics, [[[3, 3, 1.5]]] * 3)
    for cfg in (RIR, RirConfig(method="hybrid"), RirConfig(method="ism")):
        simulate = Simulator(replace(SCENE, bank=2), cfg, config=SimulatorConfig(2), ism=IsmConfig("eyring"))
        heard = simulate(speech(3)[:, :1], generator=seeded(0), scenes=scenes)
        assert heard.scenes is scenes and heard.audio.shape == (3, 4, 2000) and (heard.audio.abs().amax(-1) > 0).all()
        drawn = simulate.draw(3, 2000, generator=seeded(0), scenes=scenes)
        assert torch.equal(simulate.render(speech(3)[:, :1], drawn).audio, heard.audio)
    with pytest.raises(ValueError, match=r"^dry speech must be \[batch, src=1, sample\], got \[3, 2, 2000\]$"):
        simulate(speech(3), generator=seeded(0), scenes=scenes)
    dead = replace(scenes, rt60=torch.tensor([0.3, 0.02, 0.3]).double())
    for method in ("hybrid", "ism"):
        simulate = Simulator(SCENE, RirConfig(method=method), ism=IsmConfig("eyring"))
        with pytest.raises(ValueError, match=r"^scene 1: rt60 = 0.02 s is infeasible in a room of \[5.0, "):
            simulate(speech(3)[:, :1], generator=seeded(0), scenes=dead)
    with pytest.raises(ValueError, match=r"^scenes must be as many as the batch=2, got 3$"):
        simulate(speech(2)[:, :1], generator=seeded(0), scenes=scenes)


def test_a_law_that_finds_no_places_is_refused_at_once():
    """Sources at 1 to 1.1 m leave three of four scenes without; these are silent, which must not be a surprise."""
    with pytest.raises(ValueError, match=r"^scene: only \d+ of 1000 scenes found places for their sources among 32 "
                                         r"candidates each, at least 99 % must: widen scene.src_dist_m=\(1.0, 1.1\)$"):
        Simulator(SceneConfig(src_dist_m=(1.0, 1.1)))


def test_microphones_that_differ_do_not_depend_on_the_chunk():
    mixing = replace(MIX, mic_gain_db=3.0, mic_phase_deg=20.0)
    whole, parts = (simulator(mixing=mixing, chunk=chunk)(speech(), generator=seeded(0)) for chunk in (5, 2))
    for name in ("audio", "early"):
        found, expected = getattr(parts, name), getattr(whole, name)
        assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_noise_share_decides_which_examples_are_noisy_and_nothing_else():
    """None of them by 0, and by 0.4 some of those that are by 1; their rooms and noises are the same."""
    full, some, none = (simulator().draw(40, 500, generator=seeded(4), noise_share=share) for share in (1.0, 0.4, 0.0))
    for name in ("sensor_snr", "diffuse_snr"):
        noisy = {key: torch.isfinite(getattr(draw.mixture, name))
                 for key, draw in (("full", full), ("some", some), ("none", none))}
        assert noisy["full"].all() and 5 < noisy["some"].sum() < 30 and not noisy["none"].any()
        kept = noisy["some"]
        assert torch.equal(getattr(full.mixture, name)[kept], getattr(some.mixture, name)[kept])
    assert torch.equal(full.scenes.src_pos, none.scenes.src_pos)
    assert torch.equal(full.rooms.images.ratio, none.rooms.images.ratio)
    clean = simulator(mixing=replace(MIX, sensor_snr_db=None, diffuse_snr_db=None))
    audio = simulator()(speech(), generator=seeded(5), noise_share=0.0).audio
    gain = simulator().draw(5, 2000, generator=seeded(5), noise_share=0.0)
    expected = clean.render(speech(), replace(gain, mixture=replace(gain.mixture, sensor=None, diffuse=None))).audio
    assert_close(audio, expected, rtol=0, atol=1e-7)


def test_speech_on_another_device_than_its_draw_is_refused():
    drawn = simulator().draw(2, 2000, generator=seeded(0))
    with pytest.raises(ValueError, match="^dry speech must be on the draw's cpu, got meta$"):
        simulator().render(speech(2).to("meta"), drawn)


def test_every_section_reaches_the_mixture():
    plain = simulator()(speech(), generator=seeded(0))
    for change in (dict(scene=replace(SCENE, rotate=False)), dict(rir=replace(RIR, perturbation=(-1.0, 1.0))),
                   dict(mixing=MixtureConfig()), dict(mixing=replace(MIX, mic_phase_deg=5.0))):
        assert not torch.equal(simulator(**change)(speech(), generator=seeded(0)).audio, plain.audio)
    walls = replace(SCENE, rt60_s=(0.3, 0.4))
    plain = simulator(walls)(speech(), generator=seeded(0))
    for change in (dict(method=Method.HYBRID), dict(method=Method.ISM), dict(hybrid_share=1.0),
                   dict(ism_share=1.0)):
        cfg = replace(RIR, **change) if "method" not in change else RirConfig(**change, early=RIR.early)
        other = simulator(walls, cfg)(speech(), generator=seeded(0))
        assert torch.equal(other.scenes.src_pos, plain.scenes.src_pos) and not torch.equal(other.audio, plain.audio)
    # These do not change the sound: see above, test_compile and test_scatter.
    assert [f.name for f in fields(SimulatorConfig)] == ["chunk", "compile", "fused"]


def test_captured_calls_are_those_of_the_simulator_on_a_cpu():
    simulator, dry = Simulator(rir=RirConfig(early=False)), torch.randn(3, 2, 800)
    call = simulator.captured(3, 800, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        assert torch.equal(call(dry).audio, simulator(dry, generator=generator).audio)
    for wrong, got in ((dry[:2], r"float32 \[2, 2, 800\]"), (dry.double(), r"float64 \[3, 2, 800\]")):
        with pytest.raises(ValueError, match=rf"^dry speech must be float32 \[3, 2, 800\] on cpu for what was captured"
                                             rf", got {got} on cpu$"):
            call(wrong)
    with pytest.raises(ValueError, match="^Simulator.captured needs rooms that do not wait for the device, got rir.m"):
        Simulator(rir=RirConfig(method="ism"), ism=IsmConfig("eyring")).captured(1, 8, generator=generator)
    with pytest.raises(ValueError, match="^Simulator.captured needs batch >= 1 and num_samples >= 1, got 0 and 8$"):
        simulator.captured(0, 8, generator=generator)


def test_captured_bank_is_the_one_that_was_captured():
    simulator, generator = Simulator(SceneConfig(bank=2), RirConfig(early=False)), torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="^scene.bank=2 needs Simulator.fill_bank before it is captured$"):
        simulator.captured(3, 800, generator=generator)
    simulator.fill_bank(generator=generator)
    call, dry = simulator.captured(3, 800, generator=generator), torch.randn(3, 2, 800)
    assert call(dry).audio.isfinite().all()
    simulator.fill_bank(generator=generator)
    with pytest.raises(ValueError, match="^Simulator.captured must be called again after Simulator.fill_bank$"):
        call(dry)


@pytest.mark.parametrize("dtype, found", [(torch.int16, torch.float32), (torch.float16, torch.float32),
                                          (torch.float64, torch.float64)])
def test_dtype_of_mixtures_does_not_depend_on_the_chunk(dtype, found):
    dry = (300 * torch.randn(3, 2, 800, generator=torch.Generator().manual_seed(0))).to(dtype)
    whole, parts = (Simulator(rir=RirConfig(early=False), config=SimulatorConfig(chunk))(
        dry, generator=torch.Generator().manual_seed(1)).audio for chunk in (3, 2))
    assert whole.dtype == parts.dtype == found
    assert_close(parts, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


def test_dtype_of_long_mixtures_does_not_depend_on_the_chunk():
    """Of speech so long that a CPU convolves it block by block."""
    dry = torch.randn(2, 1, 2 * 65536 + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    law = SceneConfig(num_mics=1, num_src=1)
    whole, parts = (Simulator(law, RirConfig(early=False), config=SimulatorConfig(chunk))(
        dry, generator=torch.Generator().manual_seed(1)).audio for chunk in (2, 1))
    assert whole.dtype == parts.dtype == torch.float64
    assert_close(parts, whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


def test_speech_that_is_no_tensor_is_named():
    simulator = Simulator(rir=RirConfig(early=False))
    generator = torch.Generator().manual_seed(0)
    for call in (simulator.captured(1, 8, generator=generator), partial(simulator, generator=generator)):
        for wrong, name in (([[0.0]], "builtins.list"), (torch.zeros(1, 2, 8).numpy(), "numpy.ndarray")):
            with pytest.raises(ValueError, match=f"^dry speech must be a torch tensor, got {name}$"):
                call(wrong)


def test_one_draw_gives_several_targets():
    """As README says: rendered once more, by images of order 0 the direct path alone, after distance / 340 s and 1/64
    of 1 / distance high, which the early part begins with; with a window wider than the RIRs all but the noise."""
    law, eyring = SceneConfig(num_mics=1, num_src=2, src_dist_m=(1.0, 5.0)), IsmConfig("eyring")
    mixing = MixtureConfig(level_difference_db=(-5.0, 5.0), sensor_snr_db=(0.0, 20.0))
    rir, wide = RirConfig(method="hybrid"), (-1000, 1000)
    simulate = Simulator(law, rir, mixing, ism=eyring)
    draw = simulate.draw(20, 12000, generator=seeded(0))
    click = torch.zeros(20, 2, 12000)
    click[..., 0] = 1
    heard = simulate.render(click, draw)
    whole = Simulator(law, replace(rir, early_window_ms=wide), ism=eyring).render(click, draw).early
    clean = simulate.render(click, replace(draw, mixture=replace(draw.mixture, sensor=None))).audio
    assert_close(whole.sum(2), clean, rtol=0, atol=1e-6 * float(clean.abs().max()))
    assert not torch.allclose(heard.early.sum(2), clean, atol=0.1 * float(clean.abs().max()))

    exact = Simulator(law, RirConfig(method="ism", early_window_ms=wide), ism=replace(eyring, max_order=0))
    direct = exact.render(click, draw).early
    dist = heard.scenes.distance[:, None]
    peak, place = direct.abs().max(-1)
    assert ((place - dist * 16000 / 340).abs() <= 0.51).all()
    height = peak * 64 * dist / draw.mixture.gain[:, None]
    assert 0.58 < height.min() and height.max() < 1.1                    # 0.63: between two taps
    before = torch.arange(12000) <= place[..., None] + 7                 # the spread of an arrival
    gap = ((heard.early - direct).abs() * before).amax(-1) < 1e-5 * peak
    assert gap.float().mean() > 0.4                                      # elsewhere the first reflection is as near
    assert ((heard.early - direct).square().sum(-1) > 0.01 * direct.square().sum(-1)).all()


def test_noise_may_be_a_further_source():
    """As README says: its level is set before the room; the first source's early part does not know it; sensor noise
    is relative to both; and with a wide window it can be added at any SNR."""
    law, mixing = SceneConfig(num_mics=2, num_src=2), MixtureConfig((-6.0, -6.0), sensor_snr_db=(10.0, 10.0))
    simulate = Simulator(law, RirConfig(), mixing)
    loud = torch.randn(4, 2, 8000, generator=seeded(3))
    quiet = loud * torch.tensor([1.0, 0.1])[:, None]
    draw = simulate.draw(4, 8000, generator=seeded(0))
    first, second = (simulate.render(dry, draw) for dry in (loud, quiet))
    assert_close(first.early[:, :, 0], second.early[:, :, 0], rtol=0, atol=0)
    assert_close(first.early[:, :, 1], 10 * second.early[:, :, 1], rtol=1e-4, atol=1e-6)
    images = Simulator(law, RirConfig(early_window_ms=(-1000, 1000)), mixing).render(loud, draw).early
    assert_close(draw.mixture.gain[:, 1], torch.full((4,), 10 ** (-6 / 20)))
    both = images.sum(2)
    noise = first.audio - both
    snr = 10 * (both.square().mean((1, 2)) / noise.square().mean((1, 2))).log10()
    assert_close(snr, torch.full((4,), 10.0), rtol=0, atol=0.01)
