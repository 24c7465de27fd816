"""A network with model.symmetric answers the mirror image of a clip by the mirror image of its answer."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ssl_gpu import symmetry
from ssl_gpu.config import RunConfig, load_config
from ssl_gpu.localizer import Localizer
from ssl_gpu.pretrained import load_localizer, read_weights
from ssl_gpu.train import main as train

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SMALL = ("model.channels=8", "model.dim=64", "model.depth=1", "model.symmetric=true", "features.gate_bands=4")
VOICES = ("speech.voices_speakers=6", "speech.voices_utterances=2", "speech.voices_duration_s=1.2", "speech.clip_s=1",
          "rir.num_images=[64, 128]")
KINDS = {"no masks": (), "no gate": ("features.gate_bands=0",), "masks of frames": ("features.mask_width=16",),
         **{f"{free} free masks": ("features.mask_width=16", "features.patch_width=16", f"features.free_masks={free}")
            for free in (0, 1, 2, 3, 4)}, "azimuth, hard labels": ("target.labels=hard", "target.angle=azimuth")}
every_kind = pytest.mark.parametrize("kind", KINDS)


def localizer_of(*overrides):
    cfg = load_config(RunConfig, CONFIG, [*SMALL, *overrides])
    torch.manual_seed(0)
    return Localizer(cfg.model, cfg.features, cfg.target, cfg.scene, cfg.rir.sample_rate)


def clip(seed=1):
    return torch.randn(2, 2, 8000, generator=torch.Generator().manual_seed(seed))


def answers(localizer):
    """Logits of a clip, and what those of its mirror image say of it."""
    with torch.no_grad():
        return localizer(clip()), localizer(clip().flip(1)).flip(1, 2)


@every_kind
def test_a_mirrored_clip_has_the_mirrored_answer(kind):
    localizer = localizer_of(*KINDS[kind]).eval()
    straight, mirrored = answers(localizer)
    assert_close(straight, mirrored, rtol=0, atol=2e-6)
    assert (straight - straight.flip(1, 2)).abs().max() > 0.01          # and is not its own mirror image
    plain = localizer_of(*KINDS[kind], "model.symmetric=false").eval()
    straight, mirrored = answers(plain)
    assert (straight - mirrored).abs().max() > 0.01 and not plain.symmetric


@every_kind
def test_every_weight_is_held_to_it_but_the_gate(kind):
    """And what the heads share; each is drawn as wide as without."""
    network, plain = localizer_of(*KINDS[kind]).network, localizer_of(*KINDS[kind], "model.symmetric=false").network
    names = {name for name, _ in network.named_parameters()}
    assert names - set(network.actions) == {name for name in names if name.startswith("gate.") or "rel_pos" in name}
    for name, weight in network.named_parameters():
        before = plain.get_parameter(name)
        assert weight.shape == before.shape
        if weight.numel() > 2000:
            assert_close(weight.std(), before.std(), rtol=0.1, atol=0)
    free = sum((weight - symmetry.image(weight, network.actions[name])).abs().max() > 1e-6
               for name, weight in plain.named_parameters() if name in network.actions)
    assert free > 20                                                    # without, it is not so by itself


@every_kind
def test_kept_gradients_are_those_of_a_clip_and_of_its_mirror_image(kind):
    """The mean of both, so that a step by them keeps the symmetry; without, it would be lost."""
    localizer = localizer_of(*KINDS[kind]).train()
    network, found = localizer.network, []
    for audio, back in ((clip(), False), (clip().flip(1), True)):
        heard = localizer(audio)
        logits = heard[0] if localizer.masks else heard
        network.zero_grad()
        (logits.flip(1, 2) if back else logits).log_softmax(-1)[:, :, 3].sum().backward()
        found.append({name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None})
    for name, gradient in found[0].items():
        network.get_parameter(name).grad = gradient.clone()
    symmetry.keep(network, network.actions, gradients=True)
    for name in network.actions:
        if name not in found[0]:
            continue                                                    # as of masks that nothing has taught here
        both = (found[0][name] + found[1][name]) / 2
        scale = both.abs().max()
        if scale < 1e-5:
            continue                                                    # of what a softmax does not hear
        assert_close(network.get_parameter(name).grad / scale, both / scale, rtol=0, atol=2e-4, msg=name)
    asymmetric = sum((gradient - symmetry.image(gradient, network.actions[name])).abs().max() > 1e-6
                     for name, gradient in found[0].items() if name in network.actions)
    assert asymmetric > 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run by Muon and one of the same without symmetry."""
    folder = tmp_path_factory.mktemp("symmetric")
    for name in ("true", "false"):
        arguments = [str(CONFIG), *SMALL, *VOICES, f"model.symmetric={name}", "train.steps=6", "train.lr=5e-3",
                     "train.optimizer=muon", "train.max_minutes=null", "train.batch_size=4", "train.evaluations=1",
                     "eval.num_clips=4", "features.mask_width=16", "features.patch_width=16", "features.free_masks=3",
                     f"train.out={folder / name}"]
        assert train(arguments) == 0
    return folder


def loaded(folder):
    weights = read_weights(folder)
    cfg = load_config(RunConfig, folder / "config.yaml", [])
    return load_localizer(weights, cfg, folder), cfg


def test_training_keeps_it(trained):
    localizer, _ = loaded(trained / "true")
    straight, mirrored = answers(localizer.eval())
    assert_close(straight, mirrored, rtol=0, atol=2e-5)
    before = localizer_of("features.mask_width=16", "features.patch_width=16", "features.free_masks=3").eval()
    assert (straight - answers(before)[0]).abs().max() > 0.1            # it has learned something
    straight, mirrored = answers(loaded(trained / "false")[0].eval())
    assert (straight - mirrored).abs().max() > 0.1


def test_hearing_both_sides_is_hearing_one(trained):
    localizer, _ = loaded(trained / "true")
    one, both = (replace(localizer.target, mirror=mirror) for mirror in (False, True))
    localizer.eval()
    heard = []
    with torch.no_grad():
        for localizer.target in (one, both):
            heard.append(localizer.hear(clip()))
    assert torch.equal(*heard)


def test_weights_without_it_are_refused(trained):
    weights = read_weights(trained / "false")
    cfg = load_config(RunConfig, trained / "false" / "config.yaml", ["model.symmetric=true"])
    with pytest.raises(ValueError, match="does not fit the configuration: model.symmetric=true wants weights of such"):
        load_localizer(weights, cfg, "there")
    cfg = load_config(RunConfig, trained / "true" / "config.yaml", ["model.symmetric=false"])
    load_localizer(read_weights(trained / "true"), cfg, "there")        # which may then lose it


@pytest.mark.parametrize("overrides, rule", [
    (["model.kind=original"], "model.symmetric must be false unless model.kind is conformer, got true with original"),
    (["model.channels=9"], "model.channels must be even with model.symmetric=true, got 9"),
    (["model.heads=1"], "model.heads must be even with model.symmetric=true, got 1")])
def test_what_cannot_be_symmetric_is_one_line(overrides, rule):
    with pytest.raises(ValueError, match=rule):
        localizer_of(*overrides)
