"""What a localiser makes of a clip heard the other way round."""
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ssl_gpu.features import FeatureConfig
from ssl_gpu.localizer import Localizer, TargetConfig, scene_law
from ssl_gpu.model import ConformerLocalizer, ModelConfig, shortest_clip
from ssl_gpu.scene import SceneConfig

SMALL, BANDS = ModelConfig(channels=4, dim=16, depth=1, heads=2), FeatureConfig(num_bands=4, num_delays=17)


@pytest.fixture(scope="module")
def law():
    return scene_law(SceneConfig(), 0)


def test_a_law_that_is_kept_is_no_inference_tensor(monkeypatch):
    """Whoever asks for it first: one who trains may be the next."""
    monkeypatch.setattr("ssl_gpu.localizer.LAW_SAMPLES", 500)
    with torch.inference_mode():
        found = scene_law(SceneConfig(), 12345)
    assert found is scene_law(SceneConfig(), 12345)
    kept = [value for part in (found.angle_map, found.constants) for value in vars(part).values()]
    assert len(kept) == 4 and not any(value.is_inference() for value in kept)


def localizer(**target):
    torch.manual_seed(0)
    return Localizer(SMALL, BANDS, TargetConfig(**target), SceneConfig(), 16000).eval()


@pytest.mark.parametrize("model, features, samples", [
    (SMALL, BANDS, 512), (SMALL, replace(BANDS, window=400, hop=100), 400),
    (ModelConfig(kind="original"), replace(BANDS, window=400), 10_080)])
def test_shortest_clip_is_taken_and_none_that_is_shorter(model, features, samples):
    """By the small network a window; the original has one of its own."""
    assert shortest_clip(model, features) == samples
    network = Localizer(model, features, TargetConfig(), SceneConfig(), 16000).eval()
    assert network(torch.zeros(1, 2, samples)).isfinite().all()
    with pytest.raises(ValueError, match="^audio must "):
        network(torch.zeros(1, 2, samples - 1))


@pytest.mark.parametrize("target", [{}, {"angle": "azimuth"}, {"labels": "hard"}])
def test_mirrored_hearing_gives_mirrored_angles_for_exchanged_microphones(target, law):
    """Exactly, whatever the weights; and without it a network that nobody trained does not."""
    audio = torch.randn(6, 2, 16000, generator=torch.Generator().manual_seed(1))
    learned = 0 if target.get("angle") == "azimuth" else 1
    for mirror in (True, False):
        network = localizer(mirror=mirror, **target)
        angle, other = (network.estimate(x, law)[learned] for x in (audio, audio.flip(1)))
        mirrored = (math.pi - other).flip(-1)
        assert torch.allclose(angle, mirrored, atol=1e-4) == mirror
    assert_close(localizer(mirror=True, **target)(audio), localizer(**target)(audio))  # training is as it was


def test_mirroring_leaves_a_clip_that_is_its_own_mirror_image_as_it_is(law):
    """The same signal at both microphones: the two angles lie alike to both sides of 90 degrees."""
    audio = torch.randn(3, 1, 16000, generator=torch.Generator().manual_seed(1)).expand(-1, 2, -1)
    _, cone = localizer(mirror=True).estimate(audio, law)
    assert_close(cone.sum(-1), torch.full((3,), math.pi), rtol=0, atol=1e-4)


def test_a_gate_changes_nothing_at_first_and_learns():
    """A network that is given one speaks as before, to roundings; its last layer has a gradient, and then all have."""
    audio = torch.randn(3, 2, 8000, generator=torch.Generator().manual_seed(1))
    plain = localizer().network
    gated = ConformerLocalizer(SMALL, replace(BANDS, gate_bands=10), 16000, 0.1, 2, plain.head[-1].out_features // 2)
    missing = gated.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all(name.startswith("gate.") for name in missing)
    assert_close(gated(audio), plain(audio), rtol=1e-5, atol=1e-6)
    for empty in (True, False):
        gated.zero_grad()
        gated(audio)[..., 0].square().sum().backward()
        assert all(bool(weight.grad.any()) != (empty and not name.startswith("4."))
                   for name, weight in gated.gate.named_parameters())
        with torch.no_grad():
            gated.gate[-1].weight.sub_(0.1 * gated.gate[-1].weight.grad)


def test_a_gate_says_the_same_when_the_microphones_are_exchanged():
    audio = torch.randn(2, 2, 8000, generator=torch.Generator().manual_seed(1))
    network, said = ConformerLocalizer(SMALL, replace(BANDS, gate_bands=10), 16000, 0.1, 2, 10), []
    torch.nn.init.normal_(network.gate[-1].weight)
    network.gate.register_forward_hook(lambda module, inputs, output: said.append(output))
    network(audio), network(audio.flip(1))
    assert said[0].std() > 0.1
    assert_close(*said, rtol=1e-4, atol=1e-4)


def test_a_gate_weighs_each_map_at_each_frame():
    """By the levels and the peaks: one whose last layer has a bias for one map alone changes that one; and what it
    hears at one frame reaches five to either side."""
    audio = torch.randn(2, 2, 8000, generator=torch.Generator().manual_seed(1))
    network = ConformerLocalizer(SMALL, replace(BANDS, gate_bands=10), 16000, 0.1, 2, 10)
    maps, levels = network.front(audio)
    heard, seen = torch.cat((levels[:, 4:], maps.amax(-1)), 1), []
    network.gate.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network.gate[-1].bias.data[3] = -0.5
    network.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(audio)
    assert_close(seen[0], heard)
    assert_close(seen[1][:, 3], 0.5 * maps[:, 3])
    assert torch.equal(seen[1][:, [0, 1, 2, 4, 5, 6, 7]], maps[:, [0, 1, 2, 4, 5, 6, 7]])
    later = heard.clone()
    later[..., 20] += 1
    torch.nn.init.ones_(network.gate[-1].weight)
    moved = (network.gate(later) - network.gate(heard)).abs().amax((0, 1)).nonzero().flatten().tolist()
    assert moved == list(range(15, 26))


def test_a_gate_in_bfloat16_says_what_it_says_in_float32():
    audio = torch.randn(2, 2, 8000, generator=torch.Generator().manual_seed(1))
    network = ConformerLocalizer(SMALL, replace(BANDS, gate_bands=10), 16000, 0.1, 2, 10)
    plain = network(audio)
    torch.nn.init.normal_(network.gate[-1].weight)
    exact = network(audio)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = network(audio)
    assert (narrow - exact).norm() < 0.2 * (plain - exact).norm()


def test_a_clip_is_heard_in_several_framings():
    """With three: the mean of the log-probabilities of the clip, and of it one and two thirds of a frame later."""
    audio = torch.randn(2, 2, 8000, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        once = localizer()
        assert torch.equal(once.hear(audio), once(audio))
        clips = [torch.cat((torch.zeros(2, 2, later), audio[..., :8000 - later]), -1) for later in (0, 170, 341)]
        expected = [once(clip).log_softmax(-1) for clip in clips]
        assert not torch.allclose(expected[0], expected[1], atol=1e-3)
        assert_close(localizer(offsets=3).hear(audio), sum(expected) / 3)
        flipped = [once(clip.flip(1)).log_softmax(-1).flip(1, 2) for clip in clips]
        assert_close(localizer(offsets=3, mirror=True).hear(audio), sum(expected + flipped) / 6)


@pytest.mark.parametrize("num_src", [2, 3])
def test_no_clips_have_no_angles(num_src):
    scene = SceneConfig(num_src=num_src)
    network = Localizer(SMALL, BANDS, TargetConfig(), scene, 16000).eval()
    for clips in (0, 1):
        for angle in network.estimate(torch.zeros(clips, 2, 16000), scene_law(scene, 0)):
            assert angle.shape == (clips, num_src) and angle.dtype == torch.float32


def test_clips_are_heard_a_few_at_a_time(law, monkeypatch):
    """On a CPU 8, as 48 took 1.6 times the time; the angles do not depend on it."""
    audio = torch.randn(9, 2, 16000, generator=torch.Generator().manual_seed(1))
    network, sizes = localizer(), []
    monkeypatch.setattr(network, "hear", lambda part: sizes.append(len(part)) or Localizer.hear(network, part))
    expected = network.estimate(audio, law, chunk=9)
    for chunk in (None, 2):
        assert_close(network.estimate(audio, law, chunk), expected, rtol=0, atol=1e-4)
    assert sizes == [9, 8, 1, 2, 2, 2, 2, 1]
    for chunk in (0, 2.5):
        with pytest.raises(ValueError, match=f"^chunk must be a whole number >= 1, got {chunk}$"):
            network.estimate(audio, law, chunk)


def test_audio_of_another_dtype_is_heard_and_what_is_not_finite_named(law):
    audio, network = torch.randn(3, 2, 16000, generator=torch.Generator().manual_seed(1)), localizer()
    expected = network.estimate(audio, law)
    for other in (audio.double(), (1000 * audio).round().short()):      # as soundfile reads it; loudness is no matter
        assert_close(network.estimate(other, law), expected, rtol=0, atol=1e-3)
    assert (network.estimate(audio.flip(0), law)[1] - expected[1]).abs().max() > 5e-3
    for other in (audio, audio.double()):
        other[1, 0, 5] = math.nan if other is audio else 1e60           # which float32 does not hold
        with pytest.raises(ValueError, match="^audio must be finite, that of clip 1 is not$"):
            network.estimate(other, law)
        audio[1, 0, 5] = 0


def test_a_frame_of_the_original_is_that_of_its_transform():
    assert Localizer(ModelConfig(kind="original"), FeatureConfig(), TargetConfig(), SceneConfig(), 16000).frame == 160


def test_offsets_are_a_few_within_a_frame():
    for offsets in (0, 9):
        with pytest.raises(ValueError, match=f"^target.offsets must be from 1 to 8, got {offsets}$"):
            TargetConfig(offsets=offsets)
    with pytest.raises(ValueError, match="^target.offsets must be at most the 2 samples of a frame, got 3$"):
        Localizer(ModelConfig(), FeatureConfig(hop=1), TargetConfig(offsets=3), SceneConfig(), 16000)


def test_a_law_whose_sources_find_no_place_has_no_angles():
    with pytest.raises(ValueError, match="^scene: only .* widen scene.src_dist_m"):
        scene_law(SceneConfig(src_dist_m=(1.0, 1.1)), 0)
