"""The network that learns masks from patches of the spectrogram."""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1]))  # for those who call pytest without python -m

from ssl_gpu import patches, runtime  # noqa: E402
from ssl_gpu.config import RunConfig, load_config  # noqa: E402
from ssl_gpu.features import FeatureConfig  # noqa: E402
from ssl_gpu.localizer import Localizer, TargetConfig  # noqa: E402
from ssl_gpu.masks import mask_loss  # noqa: E402
from ssl_gpu.mixture import MixtureConfig  # noqa: E402
from ssl_gpu.model import ConformerLocalizer, ModelConfig  # noqa: E402
from ssl_gpu.patches import PatchNetwork, cut  # noqa: E402
from ssl_gpu.rir import RirConfig  # noqa: E402
from ssl_gpu.scene import SceneConfig  # noqa: E402
from ssl_gpu.simulator import Simulator  # noqa: E402

SMALL = ModelConfig(channels=4, dim=16, depth=1, heads=2)
FEATURES = FeatureConfig(num_bands=4, num_delays=17, mask_width=8, patch_width=8, patch_blocks=2)
RATE = 16000


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def sound(frames, freqs, batch=2):
    spectra = torch.randn(batch, 2, frames, freqs, dtype=torch.complex64, generator=seeded(1))
    return spectra, spectra[:, 0] / spectra[:, 0].abs()


def test_a_patch_is_two_frames_of_two_bins():
    bins = torch.arange(3 * 4 * 6.0).reshape(1, 3, 4, 6)
    found = cut(bins)
    assert found.shape == (1, 2, 3, 12)
    assert_close(found[0, 1, 2], bins[0, :, 2:4, 4:6].permute(1, 2, 0).flatten())
    ragged = cut(bins[:, :, :3, :5])
    assert ragged.shape == found.shape
    assert_close(ragged[0, 0, 0], found[0, 0, 0])
    assert_close(ragged[0, 1, 2], torch.nn.functional.pad(bins[:, :, :3, :5], (0, 1, 0, 1))[0, :, 2:, 4:].permute(
        1, 2, 0).flatten())


@pytest.mark.parametrize("frames, freqs", [(12, 20), (13, 21), (1, 3)])
def test_every_bin_gets_a_logit_and_every_two_frames_a_vector(frames, freqs):
    torch.manual_seed(0)
    logits, of_frames = PatchNetwork(freqs, 8, 2, 6, 3)(*sound(frames, freqs))
    assert logits.shape == (2, 3, frames, freqs) and of_frames.shape == (2, (frames + 1) // 2, 6)
    assert (logits.std((0, 2, 3)) > 0.01).all()


def test_logits_are_those_of_their_bins():
    """The last layer's outputs are told apart by mask, then by frame of a patch, then by bin of it."""
    network = PatchNetwork(6, 8, 1, 6, 3)
    torch.nn.init.zeros_(network.last.weight)
    with torch.no_grad():
        network.last.bias.copy_(torch.arange(12.0))
    logits = network(*sound(4, 6))[0]
    assert_close(logits[1], torch.arange(12.0).reshape(3, 2, 2).repeat(1, 2, 3))


def test_a_mask_hears_its_neighbours_its_frame_and_its_frequency_in_the_whole_clip():
    torch.manual_seed(0)
    network = PatchNetwork(20, 8, 1, 6)
    spectra, phat = sound(64, 20, 1)
    moved = phat.clone()
    moved[:, 30, 4] *= -1                                               # patch 15 in time, 2 in frequency
    with torch.no_grad():
        before, after = network(spectra, phat)[0], network(spectra, moved)[0]
    change = (after - before).abs()[0, 0].unflatten(0, (-1, 2)).amax(1).unflatten(1, (-1, 2)).amax(2)  # [time, freq]
    near, frame = change[14:17, 1:4].min(), change[15].min()
    line, elsewhere = change[:13, 2].min(), change[:13, 6:].max()
    assert near > 0 and frame > 0 and line > 0 and elsewhere == 0


def test_products_are_the_convolutions(monkeypatch):
    """On a GPU: the same logits, vectors and gradients."""
    torch.manual_seed(0)
    network, results = PatchNetwork(21, 8, 2, 6, 2), []
    for on in (False, True):
        monkeypatch.setattr(runtime, "prefers_products", lambda device: on)
        network.zero_grad()
        heard = network(*sound(13, 21))
        sum(part.square().sum() for part in heard).backward()
        results.append((*heard, *(weight.grad for weight in network.parameters())))
        with torch.no_grad():
            assert_close(network(*sound(13, 21)), heard)
    for plain, product in zip(*results):
        assert_close(product, plain, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = network(*sound(13, 21))
    assert logits.dtype == torch.float32
    assert (logits - results[1][0]).norm() < 0.05 * results[1][0].norm()


def test_taps_are_those_of_a_layer_of_neighbours(monkeypatch):
    """Three taps, reach apart, zeros beyond the ends."""
    layer, x = torch.nn.Linear(9, 4), torch.randn(2, 7, 6, 3, generator=seeded(2))
    for dim, reach in ((1, 1), (1, 4), (2, 1)):
        wide = torch.zeros(2, 7 + 2 * reach, 6, 3) if dim == 1 else torch.zeros(2, 7, 6 + 2 * reach, 3)
        wide.narrow(dim, reach, x.shape[dim]).copy_(x)
        expected = layer(torch.cat([wide.narrow(dim, k * reach, x.shape[dim]) for k in range(3)], -1))
        for on in (False, True):
            monkeypatch.setattr(runtime, "prefers_products", lambda device: on)
            assert_close(patches.beside(layer, x, dim, reach), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def mixture():
    simulator = Simulator(SceneConfig(rt60_s=(0.1, 0.3)), RirConfig(num_images=(20, 40), early=False))
    dry = torch.randn(3, 2, 8000, generator=seeded(1))
    draw = simulator.draw(3, 8000, generator=seeded(5))
    return replace(simulator.render(dry, draw), direct=simulator.render_direct(dry, draw))


def localizer(features=FEATURES, **target):
    torch.manual_seed(0)
    return Localizer(SMALL, features, TargetConfig(**target), SceneConfig(), RATE)


def test_masks_by_patches_learn_from_the_truth_alone(mixture):
    network = localizer()
    heard = network(mixture.audio)
    assert network.masks and heard[1].shape == (3, 30, network.network.front.num_bins)
    of_angles, of_masks = network.loss(heard[0], mixture.scenes), network.training_losses(heard, mixture)[1]
    weights = list(network.network.mask.parameters())
    assert all(x is None for x in torch.autograd.grad(of_angles, weights, retain_graph=True, allow_unused=True))
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(of_masks, weights))
    before = network.eval()(mixture.audio)
    torch.nn.init.zeros_(network.network.of_bins.weight)
    assert not torch.allclose(network(mixture.audio), before, atol=1e-4)  # what it made of frames had been heard


def test_free_masks_learn_from_the_angles(mixture):
    """They and what they are made of; not the layer of the mask that the truth teaches, which weighs as it is told."""
    network = localizer(replace(FEATURES, free_masks=2), mask_weight=10.0)
    seen = []
    network.network.level.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    heard = network(mixture.audio)
    of_angles, losses = network.loss(heard[0], mixture.scenes), network.training_losses(heard, mixture)
    assert seen[0].shape[1] == 4 * 4 and heard[1].shape == (3, 30, network.network.front.num_bins)  # levels, 3 shares
    weights = dict(network.network.mask.named_parameters())
    by_angles = dict(zip(weights, torch.autograd.grad(of_angles, list(weights.values()), retain_graph=True)))
    assert all(x.abs().sum() > 0 for x in by_angles.values())
    assert (by_angles["last.weight"].reshape(3, 4, 8)[0] == 0).all()
    assert (by_angles["last.weight"].reshape(3, 4, 8)[1:].abs().sum((1, 2)) > 0).all()
    truth = network.network.front.true_mask(mixture.audio, mixture.direct)
    assert_close(losses, torch.stack((of_angles, 10 * mask_loss(heard[1], truth, torch.ones(3)))))
    by_truth, = torch.autograd.grad(losses[1], [weights["last.weight"]])
    assert (by_truth.reshape(3, 4, 8)[1:] == 0).all() and by_truth.abs().sum() > 0


def test_with_free_masks_the_angles_teach_what_is_made_of_frames(mixture):
    """Though no map comes of them: the free masks are shut, in numbers that have no gradient."""
    network = localizer(replace(FEATURES, free_masks=2))
    torch.nn.init.zeros_(network.network.mask.last.weight)
    torch.nn.init.constant_(network.network.mask.last.bias, -200.0)
    loss = network.loss(network(mixture.audio)[0], mixture.scenes)
    gradient, = torch.autograd.grad(loss, [network.network.mask.blocks[-1].frame.weight])
    assert gradient.abs().sum() > 0
    torch.nn.init.zeros_(network.network.of_bins.weight)
    assert network.loss(network(mixture.audio)[0], mixture.scenes) != loss


def test_blocks_reach_twice_as_far_each():
    """1 and 2 patches in time by what is beside them, and as far again by the vectors of frames. Their own frequency in
    the whole clip is left out here."""
    network = PatchNetwork(12, 8, 2, 6)
    spectra, phat = sound(64, 12, 1)
    moved = phat.clone()
    moved[:, 30] *= -1                                                  # patch 15
    for part, reach in (("in_time", 3), ("frame", 3), ("in_freq", 0)):
        torch.manual_seed(0)
        for block in network.blocks:
            for name, layer in block.named_children():
                for weight in layer.parameters():
                    torch.nn.init.normal_(weight, std=0.5)
            torch.nn.init.zeros_(block.clip.weight)
            for other in {"in_time", "frame"} - {part}:                 # nothing but a bias, which is everywhere
                torch.nn.init.zeros_(getattr(block, other).weight)
        with torch.no_grad():
            change = (network(spectra, moved)[0] - network(spectra, phat)[0])[0, 0].abs().amax(-1)
        patches_apart = [abs(int(frame) // 2 - 15) for frame in (change > 0).nonzero()]
        assert max(patches_apart) == reach, part


def test_masks_by_patches_are_learned():
    """In 60 steps from the same few mixtures of noises, each louder in some bins: from the cross-entropy of a constant
    to less than two thirds of it."""
    simulator = Simulator(SceneConfig(rt60_s=(0.1, 0.3), rotate=True), RirConfig(num_images=(20, 40), early=False),
                          MixtureConfig())
    dry = torch.randn(4, 2, 8000, generator=seeded(1))
    dry = dry * (torch.rand(4, 2, 80, generator=seeded(3)) ** 4).repeat_interleave(100, -1)
    draw = simulator.draw(4, 8000, generator=seeded(5))
    mixture, direct = simulator.render(dry, draw), simulator.render_direct(dry, draw)
    torch.manual_seed(0)
    network = ConformerLocalizer(SMALL, replace(FEATURES, mask_width=32, patch_width=16), RATE, 0.1, 2, 91)
    optimizer, losses = torch.optim.AdamW(network.mask.parameters(), lr=5e-3), []
    mask = network.front.true_mask(mixture.audio, direct)
    constant = mask_loss(torch.logit(mask.mean()).expand_as(mask), mask, torch.ones(4))
    heard = network.front.hear(mixture.audio)
    for _ in range(60):
        loss = mask_loss(network.mask(heard.spectra, heard.phat)[0][:, 0], mask, torch.ones(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.66 * constant < losses[0]


@pytest.mark.parametrize("setting, rule", [
    ("features.patch_blocks=0", "features.patch_blocks must be >= 1, got 0"),
    ("features.patch_width=-8", "features.patch_width must be >= 0, got -8"),
    ("features.patch_width=12", "features.patch_width must be divisible by 8, got 12"),
    ("features.patch_width=16", "features.patch_width must be 0 where features.mask_width is 0, got 16"),
    ("features.free_masks=-1", "features.free_masks must be >= 0, got -1"),
    ("features.free_masks=1", "features.free_masks must be 0 where features.patch_width is 0, got 1"),
    ("target.mask_weight=0", "target.mask_weight must be > 0, got 0.0")])
def test_settings_that_cannot_be_are_one_line(setting, rule):
    with pytest.raises(ValueError, match=f"^{rule}$"):
        load_config(RunConfig, None, ["train.steps=1", setting])


def test_patches_have_no_layers_of_frames():
    with pytest.raises(ValueError, match="^features.mask_layers must be 4 where features.patch_width is not 0, whose "
                                         "network has features.patch_blocks instead, got 8$"):
        FeatureConfig(mask_width=8, patch_width=8, mask_layers=8)
