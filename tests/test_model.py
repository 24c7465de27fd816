"""The original network: its print, its keys, its forward step by step, and its limits."""
import copy
import re
from itertools import product
from pathlib import Path

import conformer as package
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ssl_gpu.model import STFT, ModelConfig, SSLModel, phase_difference

PRINTED = (Path(__file__).parent / "golden" / "original_model.txt").read_text().rstrip("\n")
SHORTEST, LONGEST = 10_080, 1_310_559  # samples: 64 frames for one time step; 510 tokens and 2 CLS tokens


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def model():
    """A model in eval mode, no norm's scale, shift or statistics at 1 and 0. Tests leave its weights as they are."""
    torch.manual_seed(0)
    model = SSLModel().eval()
    for name, values in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")) or ".norm." in f".{name}":
            values.copy_(0.5 + 0.1 * noise(*values.shape, seed=len(name)))
    return model


def on_meta(**arguments):
    with torch.device("meta"):
        return SSLModel(**arguments)


def test_prints_as_the_original():
    assert str(on_meta()) == PRINTED


def test_parameter_count():
    assert sum(parameter.numel() for parameter in on_meta().parameters()) == 57_102_224


def leaf_shapes(module, description):
    """Parameter and buffer names and shapes of one printed module without children."""
    numbers = [int(number) for number in re.findall(r"\d+", description.replace("1e-05", ""))]
    keyword = {name: int(value) for name, value in re.findall(r"(\w+)=\(?(\d+)", description)}
    bias = {} if "bias=False" in description else {"bias": 1}
    if module in ("Conv1d", "Conv2d"):
        kernel = (keyword["kernel_size"],) * int(module[4])
        shapes = {"weight": (numbers[1], numbers[0] // keyword.get("groups", 1), *kernel)}
        return shapes | {name: (numbers[1],) for name in bias}
    if module == "Linear":
        shapes = {"weight": (keyword["out_features"], keyword["in_features"])}
        return shapes | {name: (keyword["out_features"],) for name in bias}
    if module in ("BatchNorm1d", "BatchNorm2d"):
        vectors = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (numbers[0],))
        return vectors | {"num_batches_tracked": ()}
    if module == "LayerNorm":
        return dict.fromkeys(("weight", "bias"), (numbers[0],))
    if module == "Embedding":
        return {"weight": (numbers[0], numbers[1])}
    return {}


def printed_shapes(text):
    """State-dict keys and shapes read off the printed model, (0-7) repeated, and the two tokens that a print omits."""
    shapes = {"cls_token": (1, 2, 512), "pos_embed": (1, 512, 512)}
    path = []
    for line in text.splitlines()[1:]:
        match = re.match(r"( +)\(([\w-]+)\): (?:\d+ x )?(\w+)\((.*)", line)
        if not match:
            continue
        indent, name, module, description = match.groups()
        first, _, last = name.partition("-")
        names = [str(i) for i in range(int(first), int(last) + 1)] if last else [name]
        path[len(indent) // 2 - 1:] = [names]
        for prefix, (key, shape) in product(product(*path), leaf_shapes(module, description).items()):
            shapes[".".join((*prefix, key))] = shape
    return shapes


def test_state_dict_of_the_original_loads():
    expected = printed_shapes(PRINTED)
    with torch.device("meta"):
        backbone = package.Conformer(512, depth=8).state_dict()
    of_package = {f"backbone.{key}": tuple(value.shape) for key, value in backbone.items()}
    assert {key: shape for key, shape in expected.items() if key.startswith("backbone.")} == of_package
    state = {key: torch.full((), 2.0).expand(shape) for key, shape in expected.items()}
    model = on_meta()
    model.load_state_dict(state, strict=True, assign=True)
    assert all((value == 2).all() for value in model.state_dict().values())


def described_forward(model, audio):
    """The forward pass as the original is described, by torch.stft, atan2 and the package's Conformer."""
    window = torch.hann_window(512)
    spectrum = torch.stft(audio.flatten(0, 1), 512, 160, window=window, pad_mode="reflect", return_complex=True)
    phase = spectrum.angle().unflatten(0, audio.shape[:2])[:, :, 1:]  # [batch, mic, freq, frame]
    difference = (phase[:, 1] - phase[:, 0]).transpose(1, 2)
    x = model.patch_embed(model.inter_conv(torch.stack((difference.cos(), difference.sin()), 1)))
    columns = [x[:, :, step, band] for step in range(x.shape[2]) for band in range(4)]
    columns = [model.cls_token[:, i].expand(len(audio), -1) for i in range(2)] + columns
    x = torch.stack([column + model.pos_embed[:, i] for i, column in enumerate(columns)], 1)
    with torch.device("meta"):
        backbone = package.Conformer(512, depth=8)
    backbone.load_state_dict(model.backbone.state_dict(), assign=True)
    x = backbone.eval()(x)
    x = F.layer_norm(x, (512,), model.norm.weight, model.norm.bias)
    return tuple(x[:, i] @ model.head.weight.T + model.head.bias for i in range(2))


def test_forward_is_the_described_one(model):
    audio = noise(2, 2, 3 * SHORTEST)
    with torch.no_grad():
        actual, expected = model(audio), described_forward(model, audio)
    assert [tuple(logits.shape) for logits in actual] == [(2, 36), (2, 36)]
    assert_close(actual, expected, rtol=1e-3, atol=2e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.01  # logits spread by 0.5: the tolerance sees each step


def test_stft_starts_as_a_centred_hann_transform():
    audio = noise(2, 2, 1_000)
    spectrum = torch.stft(
        audio.flatten(0, 1).double(), 512, 160, window=torch.hann_window(512, dtype=torch.float64), return_complex=True
    )
    spectrum = spectrum.unflatten(0, (2, 2)).transpose(2, 3)
    real, imag = STFT()(audio)
    # Sums of 512 products of size 1 in float32.
    assert_close(real, spectrum.real.float(), rtol=0, atol=1e-4)
    assert_close(imag, spectrum.imag.float(), rtol=0, atol=1e-4)


def test_frozen_transform_is_that_of_the_convolutions_by_fft():
    frozen, trained, audio = STFT(frozen=True), STFT(), noise(2, 2, 5_000)
    audio.requires_grad_()
    assert frozen.by_fft and not trained.by_fft and list(frozen.state_dict()) == list(trained.state_dict())
    found, expected = frozen(audio), trained(audio)
    # Sums of 512 products of size 1 in float32.
    assert_close(found, expected, rtol=0, atol=1e-4)
    weight = noise(*expected[0].shape, seed=1)
    gradients = [torch.autograd.grad((real * weight + imag).sum(), audio)[0] for real, imag in (found, expected)]
    assert_close(gradients[0], gradients[1], rtol=0, atol=1e-4 * float(gradients[1].abs().max()))


def test_frozen_network_has_the_logits_of_the_trained_one(model):
    frozen = SSLModel(freeze_stft=True).eval()
    frozen.load_state_dict(model.state_dict())
    assert frozen.stft.by_fft
    with torch.no_grad():
        assert_close(frozen(noise(1, 2, SHORTEST)), model(noise(1, 2, SHORTEST)), rtol=1e-3, atol=2e-5)


def test_trained_weights_in_a_frozen_transform_are_convolved_with():
    """An FFT knows nothing of them. Copies follow, and Hann weights that come back are seen too."""
    trained, frozen, audio = STFT(), STFT(frozen=True), noise(1, 2, 2_000)
    hann = {name: weight.clone() for name, weight in trained.state_dict().items()}
    with torch.no_grad():
        trained.conv_imag.weight[100, 0, 200] += 0.01
    frozen.load_state_dict(trained.state_dict())
    for stft in (frozen, copy.deepcopy(frozen)):
        assert not stft.by_fft
        assert_close(stft(audio), trained(audio), rtol=0, atol=0)
    frozen.load_state_dict(hann)
    assert frozen.by_fft
    trained.load_state_dict(hann)
    assert not trained.by_fft


def test_layout_of_the_maps_changes_roundings_alone():
    """Outputs and gradients of the original, its convolutions channels last or not."""
    results, seen = [], []
    for last in (False, True):
        torch.manual_seed(0)
        network = SSLModel(channels_last=last)
        network.patch_embed[3].register_forward_hook(lambda conv, _, out: seen.append(out.is_contiguous()))
        logits = network(noise(2, 2, SHORTEST))
        sum(part.sin().sum() for part in logits).backward()
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        results.append((logits, torch.cat(gradients)))
    assert seen == [True, False]
    (logits, gradients), (others, of_others) = results
    assert_close(others, logits, rtol=1e-3, atol=1e-5)
    assert (of_others - gradients).norm() < 1e-4 * gradients.norm()


@pytest.mark.parametrize("key, otherwise", [("freeze_stft", "false"), ("channels_last", "null")])
def test_transform_and_layout_are_choices_of_the_original_alone(key, otherwise):
    assert getattr(ModelConfig(kind="original", **{key: True}), key)
    with pytest.raises(ValueError, match=f"^model.{key} must be {otherwise} unless model.kind is original, got true "
                                         "with conformer$"):
        ModelConfig(**{key: True})


@pytest.mark.parametrize("scale", [1e-6, 1.0, 32_768.0])
def test_phase_difference_is_that_of_the_angles(scale):
    real, imag = scale * noise(3, 2, 50, 40), scale * noise(3, 2, 50, 40, seed=1)
    phase = torch.atan2(imag.double(), real.double())
    difference = phase[:, 1] - phase[:, 0]
    expected = torch.stack((difference.cos(), difference.sin()), 1).float()
    # A few roundings of products that may cancel: the error is absolute, on a circle of radius 1.
    assert_close(phase_difference(real, imag), expected, rtol=0, atol=1e-6)


def test_second_microphone_leads_by_a_positive_phase():
    real, imag = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])  # mic 0 at phase 0, mic 1 at 90 degrees
    cosine, sine = phase_difference(real.view(1, 2, 1, 1), imag.view(1, 2, 1, 1)).flatten()
    assert (cosine.item(), sine.item()) == (0.0, 1.0)


@pytest.mark.parametrize("silent", [slice(0, 1), slice(1, 2), slice(0, 2)], ids=["mic 0", "mic 1", "both"])
def test_digital_silence_has_no_phase_difference_and_finite_gradients(silent):
    stft, audio = STFT(), noise(1, 2, 4_000)
    audio[:, silent, 1_500:3_000] = 0
    audio.requires_grad_()
    features = phase_difference(*stft(audio))
    quiet = features[:, :, 12:17]  # frames of samples 1664..2816
    assert_close(quiet, torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand_as(quiet), rtol=0, atol=0)
    assert (features[:, 1, :8].abs() > 0.01).any()
    (features * noise(*features.shape, seed=1)).sum().backward()
    for gradient in (audio.grad, stft.conv_real.weight.grad, stft.conv_imag.weight.grad):
        assert gradient.isfinite().all() and gradient.abs().max() > 0


@pytest.mark.parametrize("power_of_ten", range(-20, -3))
def test_gradients_stay_finite_however_quiet_the_clip(power_of_ten):
    """The tail of a padded utterance fades through every level: rsqrt gave an infinite derivative near 1e-9."""
    stft, audio = STFT(), (noise(1, 2, 2_000) * 10.0**power_of_ten).requires_grad_()
    features = phase_difference(*stft(audio))
    (features * noise(*features.shape, seed=1)).sum().backward()
    for gradient in (audio.grad, stft.conv_real.weight.grad, stft.conv_imag.weight.grad):
        assert gradient.isfinite().all()


def test_silent_clip_gives_finite_logits(model):
    with torch.no_grad():
        low, high = model(torch.zeros(1, 2, SHORTEST))
    assert low.isfinite().all() and high.isfinite().all()


def test_features_stay_float32_under_autocast(model):
    audio = noise(1, 2, SHORTEST)
    with torch.no_grad():
        exact = model.features(audio)
        with torch.autocast("cpu", torch.bfloat16):
            features, (low, high) = model.features(audio), model(audio)
        reference = torch.stack(model(audio))
    assert_close(features, exact, rtol=0, atol=0)
    assert (torch.stack((low, high)) - reference).abs().max() < 0.05 * reference.abs().max()


def test_frames_after_the_last_full_64_have_no_influence(model):
    audio = noise(1, 2, SHORTEST + 4_000)
    last = (64 + 1) * 160 + 256  # two 3 x 3 convolutions let frames 64 and 65 in; a frame ends 256 after its centre
    outputs = []
    with torch.no_grad():
        for changed in (audio.shape[-1], last, last - 60):
            outputs.append(torch.stack(model(torch.cat((audio[..., :changed], -audio[..., changed:].flip(1)), -1))))
    assert_close(outputs[1], outputs[0], rtol=0, atol=0)
    assert not torch.equal(outputs[2], outputs[0])


def test_initial_weights_are_the_originals(model):
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert len(linears) == 8 * 7 + 1
    assert not any(linear.bias.any() for linear in linears.values() if linear.bias is not None)
    weights = {name: linear.weight for name, linear in linears.items()}
    for name, weight in (weights | {"cls_token": model.cls_token, "pos_embed": model.pos_embed}).items():
        spread = 0.02 / (2 * weight.numel()) ** 0.5  # standard error of a standard deviation
        assert abs(weight.std().item() - 0.02) < 5 * spread, name
        assert weight.abs().max() <= 0.1, name


@pytest.mark.parametrize("argument", ["attn_dropout", "ff_dropout", "conv_dropout"])
def test_dropout_arguments_arrive(argument):
    place = {"attn_dropout": ".attn.fn.dropout", "ff_dropout": ".net.2 .net.4", "conv_dropout": ".conv.net.9"}[argument]
    dropouts = {n: m.p for n, m in on_meta(**{argument: 0.25}).named_modules() if isinstance(m, torch.nn.Dropout)}
    assert len(dropouts) == 8 * 6
    assert {n: p for n, p in dropouts.items() if n.endswith(tuple(place.split()))} == {
        n: 0.25 for n, p in dropouts.items() if p > 0
    }
    assert any(dropouts.values())


def test_num_classes_and_freeze_stft_arrive():
    model = on_meta(num_classes=10, freeze_stft=True)
    assert model.head.weight.shape == (10, 512)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["stft.conv_real.weight", "stft.conv_imag.weight"]
    assert all(parameter.requires_grad for parameter in on_meta().parameters())


@pytest.mark.parametrize(
    "shape, message",
    [
        ((2, 16_000), "audio must be [batch, mic=2, sample], got shape [2, 16000]"),
        ((1, 3, 16_000), "audio must be [batch, mic=2, sample], got shape [1, 3, 16000]"),
        ((1, 2, 2, 16_000), "audio must be [batch, mic=2, sample], got shape [1, 2, 2, 16000]"),
        ((1, 2, SHORTEST - 1), "audio must have at least 10080 samples (64 frames), got 10079"),
        ((1, 2, LONGEST + 1), "audio must give at most 512 tokens (1310559 samples), got 514 (1310560)"),
    ],
)
def test_wrong_audio_is_named(shape, message):
    with pytest.raises(ValueError) as error:
        on_meta()(torch.empty(shape, device="meta"))
    assert str(error.value) == message


def test_shortest_clip_is_taken(model):
    with torch.no_grad():
        low, high = model(noise(1, 2, SHORTEST))
    assert low.shape == high.shape == (1, 36)


def test_longest_clip_fills_the_position_table(model):
    ten_rows = {"pos_embed": model.pos_embed[:, :10]}  # two time steps; the real limit of 82 s takes 3 s to run
    longest = (3 * 64 - 1) * 160 - 1
    with torch.no_grad():
        low, high = torch.func.functional_call(model, ten_rows, (noise(1, 2, longest),))
        assert low.shape == high.shape == (1, 36)
        with pytest.raises(ValueError, match=rf"at most 10 tokens \({longest} samples\), got 14"):
            torch.func.functional_call(model, ten_rows, (noise(1, 2, longest + 1),))
