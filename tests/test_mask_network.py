"""Direct sound, the masks made of it, the network that learns them, and the maps of delays that they make."""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1]))  # for those who call pytest without python -m

from ssl_gpu import runtime  # noqa: E402
from ssl_gpu.config import RunConfig, load_config  # noqa: E402
from ssl_gpu.directivity import Pattern  # noqa: E402
from ssl_gpu.features import LEAST_SHARE, DelayMap, FeatureConfig  # noqa: E402
from ssl_gpu.ism import IsmConfig  # noqa: E402
from ssl_gpu.localizer import Localizer, TargetConfig  # noqa: E402
from ssl_gpu.masks import NEIGHBOURS, MaskNetwork, around, mask_loss, told, true_mask  # noqa: E402
from ssl_gpu.mixture import MixtureConfig  # noqa: E402
from ssl_gpu.model import ConformerLocalizer, ModelConfig  # noqa: E402
from ssl_gpu.rir import RirConfig  # noqa: E402
from ssl_gpu.scene import SceneConfig  # noqa: E402
from ssl_gpu.simulator import Simulator, SimulatorConfig  # noqa: E402

SCENE, EYRING = SceneConfig(rt60_s=(0.1, 0.3), rotate=True), IsmConfig("eyring", tail_arrivals=64)
NOISY = MixtureConfig(level_difference_db=(-5.0, 5.0), sensor_snr_db=(0.0, 10.0), diffuse_snr_db=(0.0, 10.0))
SMALL = ModelConfig(channels=4, dim=16, depth=1, heads=2)
FEATURES = FeatureConfig(num_bands=4, num_delays=17, mask_width=8)
RATE = 16000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def speech(batch=6, samples=4000):
    return torch.randn(batch, 2, samples, generator=seeded(1))


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


def localizer(features=FEATURES, **target):
    torch.manual_seed(0)
    return Localizer(SMALL, features, TargetConfig(**target), SceneConfig(), RATE)


# ---- direct sound ----


@pytest.mark.parametrize("mixing", [NOISY, replace(NOISY, mic_gain_db=3.0, mic_phase_deg=20.0)],
                         ids=["alike", "unlike"])
@pytest.mark.parametrize("rir", [
    {}, dict(hybrid_share=0.5), dict(method="hybrid"), dict(method="ism"), dict(hybrid_share=0.3, ism_share=0.3),
    dict(src_pattern=Pattern.CARDIOID, mic_pattern=Pattern.CARDIOID)],
    ids=["fra", "mixed", "hybrid", "exact", "exact too", "patterns"])
def test_direct_sound_is_the_early_part_without_reflections(rir, mixing):
    """Of RIRs whose early window is 1 ms around the direct path: in one of six scenes a reflection comes as soon."""
    few = {} if "method" in rir else dict(num_images=(20, 40))
    cfg, dry = RirConfig(early_window_ms=(-1, 1), **few, **rir), speech()
    simulator = Simulator(SCENE, cfg, mixing, SimulatorConfig(chunk=4), EYRING)
    draw = simulator.draw(len(dry), dry.shape[-1], generator=seeded(5))
    mixture, direct = simulator.render(dry, draw), simulator.render_direct(dry, draw)
    early = mixture.early.sum(2)
    errors = ((early - direct).square().sum((1, 2)) / early.square().sum((1, 2))).sqrt()
    assert direct.shape == mixture.audio.shape and (errors < 2e-6).sum() >= 5
    assert relative(direct, mixture.audio) > 0.1                        # the rest is there


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_direct_sound_is_all_that_is_left_without_images(share):
    """In every scene, by either method."""
    cfg, dry = RirConfig(num_images=(20, 40), early=False, hybrid_share=share), speech()
    simulator = Simulator(SCENE, cfg, MixtureConfig(), SimulatorConfig(), replace(EYRING, hybrid_order=0))
    draw = simulator.draw(len(dry), dry.shape[-1], generator=seeded(5))
    images, tail = draw.rooms.images, draw.rooms.tail
    silent = None if tail is None else replace(tail, sign=torch.zeros_like(tail.sign))
    alone = replace(draw, rooms=replace(draw.rooms, images=replace(images, active=torch.zeros_like(images.active)),
                                        tail=silent))
    assert_close(simulator.render_direct(dry, draw), simulator.render(dry, alone).audio, rtol=0, atol=1e-7)


def test_direct_sound_of_a_bank_and_of_scenes_that_break_their_law():
    """Each room by its own method, whose slots differ: by another one it is 0.02 to 0.06 off."""
    dry, cfg = speech(), RirConfig(num_images=(20, 40), early_window_ms=(-1, 1), hybrid_share=0.5)
    banked = Simulator(replace(SCENE, bank=4), cfg, NOISY, ism=EYRING)
    banked.fill_bank(generator=seeded(2))
    assert len(banked.bank_method.unique()) == 2
    draw = banked.draw(len(dry), dry.shape[-1], generator=seeded(5))
    early = banked.render(dry, draw).early.sum(2)
    errors = (early - banked.render_direct(dry, draw)).norm(dim=(1, 2)) / early.norm(dim=(1, 2))
    assert (errors < 2e-6).all()
    banked.bank_method = None
    assert (early - banked.render_direct(dry, draw)).norm() > 1e-3 * early.norm()
    broken = replace(draw, scenes=replace(draw.scenes, valid=torch.arange(len(dry)) != 2))
    direct = banked.render_direct(dry, broken)
    assert (direct[2] == 0).all() and torch.equal(direct[3], banked.render_direct(dry, draw)[3])


def test_direct_sound_of_other_speech_is_one_line():
    simulator = Simulator(SCENE, RirConfig(num_images=(20, 40)), NOISY)
    draw = simulator.draw(6, 4000, generator=seeded(5))
    with pytest.raises(ValueError, match=r"^dry speech must be \[batch=6, src, sample=4000\] for this draw, got \[5,"):
        simulator.render_direct(speech(5), draw)
    with pytest.raises(ValueError, match="^dry speech must be a torch tensor, got numpy.ndarray$"):
        simulator.render_direct(speech().numpy(), draw)
    other = Simulator(SCENE, RirConfig(num_images=(20, 40), perturbation=(-1.0, 1.0)), NOISY)
    with pytest.raises(ValueError, match="^rir.perturbation must be .*, by which these rooms were drawn"):
        other.render_direct(speech(), draw)
    banks = [Simulator(replace(SCENE, bank=2), RirConfig(num_images=(20, 40))) for _ in range(2)]
    for seed, bank in enumerate(banks):
        bank.fill_bank(generator=seeded(seed))
    with pytest.raises(ValueError, match="^this draw must be of the rooms of the bank that this simulator holds"):
        banks[0].render_direct(speech(), banks[1].draw(6, 4000, generator=seeded(5)))


# ---- masks ----


def test_true_masks_are_the_fourth_power_of_the_share_of_direct_sound():
    direct = torch.randn(2, 2, 5, 7, dtype=torch.complex64, generator=seeded(1))
    rest = 2 * torch.randn(2, 2, 5, 7, dtype=torch.complex64, generator=seeded(2))
    powers = [x.abs().square().sum(1) for x in (direct, rest)]
    assert_close(true_mask(direct + rest, direct), (powers[0] / (powers[0] + powers[1])) ** 4, rtol=1e-4, atol=1e-6)
    assert_close(true_mask(direct, direct), torch.ones(2, 5, 7))
    assert_close(true_mask(rest, torch.zeros_like(rest)), torch.zeros(2, 5, 7))
    assert_close(true_mask(torch.zeros_like(rest), torch.zeros_like(rest)), torch.zeros(2, 5, 7))


def test_true_masks_of_audio_do_not_depend_on_its_level():
    front, audio, direct = DelayMap(FEATURES, RATE, 0.1), *torch.randn(2, 3, 2, 4000, generator=seeded(1))
    mask = front.true_mask(audio + direct, direct)
    spectra = [front.spectra(x) for x in (audio + direct, direct)]
    assert mask.shape == (3, 14, front.num_bins) and 0.03 < mask.mean() < 0.5
    assert_close(mask, true_mask(*spectra), rtol=1e-4, atol=1e-6)
    assert_close(front.true_mask(1e-4 * (audio + direct), 1e-4 * direct), mask, rtol=1e-3, atol=1e-5)


def test_loss_is_the_cross_entropy_of_clips_that_count():
    logits, mask = torch.randn(3, 5, 7, generator=seeded(1)), torch.rand(3, 5, 7, generator=seeded(2))
    p = logits.sigmoid()
    by_clip = -(mask * p.log() + (1 - mask) * (1 - p).log()).mean((1, 2))
    assert_close(mask_loss(logits, mask, torch.tensor([1.0, 0.0, 1.0])), (by_clip[0] + by_clip[2]) / 2)
    assert mask_loss(logits, mask, torch.zeros(3)) == 0


def test_maps_of_a_mask_are_those_of_its_bins():
    """Of a wave in noise: with the wave's bins alone the map peaks as that of the wave; with all, it is GCC-PHAT."""
    front = DelayMap(FEATURES, RATE, 0.1)
    noise, wave = torch.randn(2, 1, 2, 8000, generator=seeded(1)), torch.randn(1, 1, 8000, generator=seeded(2))
    wave = torch.cat((wave, wave), 1)                                   # from broadside
    heard = front.hear(wave + 2 * noise[0])
    maps, share = front.masked(heard.phat, torch.ones(heard.phat.shape))
    assert maps.shape == (1, 4, 30, 17) and share.shape == (1, 4, 30)
    assert_close(maps * (1 + LEAST_SHARE), heard.maps[:, :4], rtol=1e-4, atol=1e-5)
    assert_close(share, torch.ones(1, 4, 30))
    told_so, less = front.masked(heard.phat, front.true_mask(wave + 2 * noise[0], wave))
    peaks = [x.mean(2)[..., 8].mean() for x in (heard.maps[:, :4], told_so)]
    assert peaks[1] > 1.5 * peaks[0] > 0.1 and less.amax() < 1
    assert (front.masked(heard.phat, torch.zeros(heard.phat.shape))[0] == 0).all()


# ---- the network ----


def test_what_a_bin_is_told():
    front, audio = DelayMap(FEATURES, RATE, 0.1), torch.randn(2, 2, 8000, generator=seeded(1))
    audio[1, 1] = audio[1, 0]                                           # one wave, alone
    heard = front.hear(audio)
    found = told(heard.spectra, heard.phat)
    assert found.shape == (2, 5, 30, front.num_bins) and found.dtype == torch.float32
    assert_close(found[:, 0].mean((1, 2)), torch.zeros(2), rtol=0, atol=1e-5)
    assert_close(found[:, 1].mean(1), torch.zeros(2, front.num_bins), rtol=0, atol=1e-5)
    assert_close(found[:, 2].square() + found[:, 3].square(), torch.ones(2, 30, front.num_bins))
    assert_close(found[1, 4], torch.ones(30, front.num_bins), rtol=0, atol=1e-4)
    assert 0.1 < found[0, 4].mean() < 0.5
    first, second = heard.spectra.unbind(1)
    cross = second * first.conj()
    real, imag, *powers = (torch.nn.functional.avg_pool2d(x[:, None], NEIGHBOURS, 1, (1, 2))[:, 0] for x in (
        cross.real, cross.imag, first.abs().square(), second.abs().square()))
    coherence = (real.square() + imag.square()).sqrt() / (powers[0] * powers[1]).sqrt()
    assert_close(found[:, 4], coherence, rtol=1e-3, atol=1e-4)
    louder = front.hear(10 * audio)
    assert_close(told(louder.spectra, louder.phat), found, rtol=1e-3, atol=1e-3)


def test_a_band_of_few_bins_has_few_neighbours():
    assert_close(around(torch.ones(1, 3, 1))[0, :, 0], torch.tensor([2.0, 3.0, 2.0]))
    assert_close(around(torch.ones(1, 1, 3))[0, 0], torch.tensor([3.0, 3.0, 3.0]))


@pytest.mark.parametrize("layers, reach", [(4, 15), (6, 18), (7, 22)])
def test_masks_move_with_the_sound_and_reach_as_far_as_they_say(layers, reach):
    """1 + 2 + 4 + 8 frames in turn, and a neighbour's one."""
    torch.manual_seed(0)
    network = MaskNetwork(20, 16, layers)
    spectra = torch.randn(1, 2, 64, 20, dtype=torch.complex64, generator=seeded(1))
    phat = torch.polar(torch.ones(1, 64, 20), torch.zeros(1, 64, 20))
    moved = phat.clone()
    moved[:, 30, 3] = -1
    with torch.no_grad():
        change = (network(spectra, moved) - network(spectra, phat)).abs().amax((0, 2)).nonzero().flatten()
    assert (int(change[0]), int(change[-1])) == (30 - reach - 1, 30 + reach + 1)
    assert network(spectra, phat).shape == (1, 64, 20)


def test_products_are_the_convolutions(monkeypatch):
    """In training on a GPU: the same logits and gradients."""
    network, heard = MaskNetwork(20, 16), torch.randn(2, 2, 12, 20, dtype=torch.complex64, generator=seeded(1))
    results, phat = [], heard[:, 0] / heard[:, 0].abs()
    for on in (False, True):
        monkeypatch.setattr(runtime, "prefers_products", lambda device: on)
        network.zero_grad()
        logits = network(heard, phat)
        logits.square().sum().backward()
        results.append((logits, *(weight.grad for weight in network.parameters())))
    for plain, product in zip(*results):
        assert_close(product, plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(heard, phat)
    assert logits.dtype == torch.float32
    assert (logits - results[1][0]).norm() < 0.02 * results[1][0].norm()


def test_masks_are_told_beside_logits_in_training_alone():
    network, audio = localizer(), torch.randn(2, 2, 8000, generator=seeded(1))
    logits, mask = network(audio)
    assert network.masks and logits.shape == (2, 2, 91) and mask.shape == (2, 30, network.network.front.num_bins)
    network.eval()
    assert_close(network(audio), logits)
    assert network.hear(audio).shape == (2, 2, 91)
    assert not localizer(replace(FEATURES, mask_width=0)).masks


def test_masks_shape_the_answer():
    """The maps of a mask, and how much of each band it kept, reach the network: with another mask it says otherwise."""
    network, audio = localizer().eval(), torch.randn(2, 2, 8000, generator=seeded(1))
    before, seen = network(audio), []
    network.network.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.network.level.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    torch.nn.init.constant_(network.network.mask.last.bias, -3.0)
    assert not torch.allclose(network(audio), before, atol=1e-3)
    maps, levels = seen
    assert maps.shape == (2, 12, 30, 17) and levels.shape == (2, 8, 30) and (levels[:, 4:] < 0.5).all()


def test_masks_learn_from_the_truth_alone():
    """The loss is the sum of both, and that of angles moves no weight of the masks."""
    simulator = Simulator(SCENE, RirConfig(num_images=(20, 40), early=False), NOISY)
    dry = speech(3, 8000)
    draw = simulator.draw(3, 8000, generator=seeded(5))
    direct = simulator.render_direct(dry, draw)
    mixture = replace(simulator.render(dry, draw), direct=direct)
    network = localizer()
    heard = network(mixture.audio)
    mask = network.network.front.true_mask(mixture.audio, direct)
    of_angles, of_masks = network.loss(heard[0], mixture.scenes), mask_loss(heard[1], mask, torch.ones(3))
    assert_close(network.training_losses(heard, mixture), torch.stack((of_angles, of_masks)))
    weights = list(network.network.mask.parameters())
    assert all(x is None for x in torch.autograd.grad(of_angles, weights, retain_graph=True, allow_unused=True))
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(of_masks, weights))


def test_masks_are_not_learned_without_the_truth():
    simulator, network = Simulator(SCENE, RirConfig(num_images=(20, 40), early=False)), localizer()
    mixture = simulator(speech(2, 8000), generator=seeded(5))
    rule = "^a localiser that learns masks must be in train mode and have MixtureBatch.direct"
    with pytest.raises(ValueError, match=rule):
        network.training_losses(network(mixture.audio), mixture)
    network.eval()
    with pytest.raises(ValueError, match=rule):
        network.training_losses(network(mixture.audio), replace(mixture, direct=mixture.audio))


def test_masks_are_learned():
    """In 60 steps from the same few mixtures of noises, each louder in some bins: from the cross-entropy of a constant
    to less than two thirds of it."""
    simulator = Simulator(SCENE, RirConfig(num_images=(20, 40), early=False), MixtureConfig())
    dry = speech(8, 8000) * (torch.rand(8, 2, 80, generator=seeded(3)) ** 4).repeat_interleave(100, -1)
    draw = simulator.draw(8, 8000, generator=seeded(5))
    mixture, direct = simulator.render(dry, draw), simulator.render_direct(dry, draw)
    torch.manual_seed(0)
    network = ConformerLocalizer(SMALL, replace(FEATURES, mask_width=32), RATE, 0.1, 2, 91)
    optimizer, losses = torch.optim.AdamW(network.mask.parameters(), lr=1e-2), []
    mask = network.front.true_mask(mixture.audio, direct)
    constant = mask_loss(torch.logit(mask.mean()).expand_as(mask), mask, torch.ones(8))
    heard = network.front.hear(mixture.audio)
    for _ in range(60):
        loss = mask_loss(network.mask(heard.spectra, heard.phat), mask, torch.ones(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.66 * constant < losses[0]


def test_settings_that_cannot_be_are_one_line():
    with pytest.raises(ValueError, match="^features.mask_layers must be >= 1, got 0$"):
        load_config(RunConfig, None, ["train.steps=1", "features.mask_layers=0"])
    with pytest.raises(ValueError, match="^features.mask_width must be >= 0, got -1$"):
        load_config(RunConfig, None, ["train.steps=1", "features.mask_width=-1"])
    with pytest.raises(ValueError, match="^features.mask_width must be 0 for model.kind=original, which has no masks, "
                                         "got 8$"):
        Localizer(ModelConfig(kind="original"), FEATURES, TargetConfig(), SceneConfig(), RATE)
    with pytest.raises(ValueError, match="^target.mask_weight must be 1 where features.mask_width is 0, as there are "
                                         "no masks, got 10.0$"):
        Localizer(ModelConfig(), FeatureConfig(), TargetConfig(mask_weight=10.0), SceneConfig(), RATE)
