"""A network with model.symmetric answers the mirror image of a clip by the mirror image of its answer."""
import copy
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ssl_gpu import symmetry
from ssl_gpu import train as train_cli
from ssl_gpu.checkpoint import load_checkpoint
from ssl_gpu.config import RunConfig, load_config
from ssl_gpu.localizer import Localizer
from ssl_gpu.muon import Muon
from ssl_gpu.pretrained import build_localizer, load_localizer, read_weights
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
    assert (straight - mirrored).abs().max() > 0.01 and plain.mirror is None


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "masks" in kind and kind != "no masks"])
def test_the_mask_that_the_truth_teaches_is_its_own_image(kind):
    localizer = localizer_of(*KINDS[kind]).train()
    with torch.no_grad():
        mask, mirrored = localizer(clip())[1], localizer(clip().flip(1))[1]
    assert_close(mask, mirrored, rtol=0, atol=2e-6)
    assert mask.std() > 1e-3


@every_kind
def test_every_weight_is_held_to_it_but_the_gate(kind):
    """And what the heads share; each is drawn as wide as without."""
    network, plain = localizer_of(*KINDS[kind]).network, localizer_of(*KINDS[kind], "model.symmetric=false").network
    names, mirror = {name for name, _ in network.named_parameters()}, network.mirror
    assert names - set(mirror.names) == {name for name in names if name.startswith("gate.") or "rel_pos" in name}
    for name, weight, image in zip(mirror.names, mirror.of(network), mirror.image(mirror.of(network))):
        before = plain.get_parameter(name)
        assert weight.shape == before.shape and torch.equal(weight, image)
        if weight.numel() > 2000:
            assert_close(weight.std(), before.std(), rtol=0.1, atol=0)
        if "norm" in name:
            assert torch.equal(weight, before)
    free = [(weight - image).abs().max() > 1e-6 for weight, image in
            zip(mirror.of(plain), mirror.image(mirror.of(plain)))]
    assert sum(free) > 20                                               # without, it is not so by itself


@every_kind
def test_kept_gradients_are_those_of_a_clip_and_of_its_mirror_image(kind):
    """The mean of both, so that a step by them keeps the symmetry; without, it would be lost."""
    localizer = localizer_of(*KINDS[kind]).train()
    network, mirror, found = localizer.network, localizer.mirror, []
    for audio, back in ((clip(), False), (clip().flip(1), True)):
        heard = localizer(audio)
        logits, mask = heard if localizer.masks else (heard, torch.zeros(()))
        network.zero_grad()
        loss = (logits.flip(1, 2) if back else logits).log_softmax(-1)[:, :, 3].sum() + mask.square().sum()
        loss.backward()
        found.append([weight.grad.clone() for weight in mirror.of(network)])
    kept = [gradient.clone() for gradient in found[0]]
    mirror.keep(kept)
    for name, *gradients, mine in zip(mirror.names, *found, kept):
        both = (gradients[0] + gradients[1]) / 2
        if (scale := both.abs().max()) > 1e-5:                          # or it is of what a softmax does not hear
            assert_close(mine / scale, both / scale, rtol=0, atol=5e-4, msg=name)
    assert sum((one - mine).abs().max() > 1e-6 for one, mine in zip(found[0], kept)) > 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run by Muon and one of the same without symmetry."""
    folder = tmp_path_factory.mktemp("symmetric")
    for name in ("true", "false"):
        assert train(arguments(folder / name, f"model.symmetric={name}")) == 0
    return folder


def arguments(out, *more):
    return [str(CONFIG), *SMALL, *VOICES, "train.steps=6", "train.lr=5e-3", "train.optimizer=muon",
            "train.batch_size=4", "train.max_minutes=null", "train.evaluations=1", "eval.num_clips=4",
            "features.mask_width=16", "features.patch_width=16", "features.free_masks=3", f"train.out={out}", *more]


def loaded(folder):
    weights = read_weights(folder)
    cfg = load_config(RunConfig, folder / "config.yaml", [])
    return load_localizer(weights, cfg, folder).eval(), cfg


def test_training_keeps_it(trained):
    """In averaged weights, which are those that are read, and in those that training goes on with."""
    localizer, cfg = loaded(trained / "true")
    straight, mirrored = answers(localizer)
    assert_close(straight, mirrored, rtol=0, atol=2e-5)
    untrained = build_localizer(cfg).eval()
    assert (straight - answers(untrained)[0]).abs().max() > 0.05
    straight, mirrored = answers(loaded(trained / "false")[0])
    assert (straight - mirrored).abs().max() > 0.05
    saved = load_checkpoint(trained / "true" / "checkpoint.pt")
    weights = [saved.model[f"network.{name}"] for name in localizer.mirror.names]
    assert all(map(torch.equal, weights, localizer.mirror.image(weights)))


def test_a_step_is_taken_by_symmetric_gradients(trained, monkeypatch):
    """Muon's step by the mean of two gradients is not the mean of two steps."""
    seen = []

    def step(self):
        mirror, network = found[0].localizer.mirror, found[0].localizer.network
        gradients = [weight.grad for weight in mirror.of(network)]
        seen.append(max(float((one - two).abs().max()) for one, two in zip(gradients, mirror.image(gradients))))

    found, update = [], train_cli.update
    monkeypatch.setattr(train_cli, "update", lambda run, *rest: (found.append(run), update(run, *rest)))
    monkeypatch.setattr(Muon, "step", step)
    assert train(arguments(trained / "seen", "train.steps=2")) == 0
    assert len(seen) == 2 and max(seen) == 0


def test_hearing_both_sides_is_hearing_one(trained):
    localizer, _ = loaded(trained / "true")
    localizer.target = replace(localizer.target, mirror=True)
    with torch.no_grad():
        straight, mirrored = (logits.log_softmax(-1) for logits in answers(localizer))
        assert_close(localizer.hear(clip()).log_softmax(-1), (straight + mirrored) / 2, rtol=0, atol=2e-5)


def test_weights_without_it_are_refused(trained, capsys):
    """By evaluation and by --resume; those with it may lose it, which is told where training goes on from them."""
    weights = read_weights(trained / "false")
    cfg = load_config(RunConfig, trained / "false" / "config.yaml", ["model.symmetric=true"])
    rule = r"model.symmetric=true \(was false\), and weights trained without it are not symmetric"
    with pytest.raises(ValueError, match="there does not fit the configuration: " + rule):
        load_localizer(weights, cfg, "there")
    assert train([str(CONFIG), "--resume", "model.symmetric=true", "train.steps=8",
                  f"train.out={trained / 'false'}"]) == 2
    assert "model.symmetric=true (was false)" in capsys.readouterr().err
    assert train(arguments(trained / "on", f"train.init={trained / 'true'}", "train.steps=1",
                           "model.symmetric=false")) == 0
    assert "are symmetric and will not stay so: model.symmetric=true keeps them" in capsys.readouterr().err


def test_copies_and_pickles_keep_it():
    localizer = localizer_of("features.mask_width=16").eval()
    for copied in (copy.deepcopy(localizer), pickle.loads(pickle.dumps(localizer))):
        straight, mirrored = answers(copied)
        assert_close(straight, mirrored, rtol=0, atol=2e-6)
        assert copied.mirror is not localizer.mirror and not any("mirror" in name for name in copied.state_dict())


@pytest.mark.parametrize("overrides, rule", [
    (["model.kind=original"], "model.symmetric must be false unless model.kind is conformer, got true with original"),
    (["model.channels=9"], "model.channels must be even with model.symmetric=true, got 9"),
    (["model.heads=1"], "model.heads must be even with model.symmetric=true, got 1"),
    (["features.num_delays=32"], "features.num_delays must be odd and .* with model.symmetric=true, got 32 and 0"),
    (["features.mask_width=17"], "features.mask_width even with model.symmetric=true, got 33 and 17")])
def test_what_cannot_be_symmetric_is_one_line(overrides, rule):
    with pytest.raises(ValueError, match=rule):
        localizer_of(*overrides)


def test_an_odd_size_has_no_halves():
    with pytest.raises(ValueError, match="what has halves must have an even size, got 3"):
        symmetry.halves(torch.zeros(2, 3), 1)
