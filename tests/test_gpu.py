"""On a GPU: the numbers of the CPU, of the plain path, and of no overlap. `python -m benchmarks.all` runs these."""
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

sys.path.insert(0, str(Path(__file__).parents[1]))  # for those who call pytest without python -m

from benchmarks import bench_train  # noqa: E402
from ssl_gpu import runtime  # noqa: E402
from ssl_gpu.conformer import Attention, DepthWiseConv1d  # noqa: E402
from ssl_gpu.features import FeatureConfig  # noqa: E402
from ssl_gpu.ism import IsmConfig  # noqa: E402
from ssl_gpu.mixture import MixtureConfig  # noqa: E402
from ssl_gpu.model import STFT, ConformerLocalizer, ModelConfig, SSLModel  # noqa: E402
from ssl_gpu.optim import TrainConfig, build_optimizer, learning_rate, restore_optimizer  # noqa: E402
from ssl_gpu.rir import RirConfig  # noqa: E402
from ssl_gpu.scene import SceneConfig  # noqa: E402
from ssl_gpu.simulator import Simulator, SimulatorConfig  # noqa: E402
from ssl_gpu.train import CapturedStep, draw_batch, gradients, update  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
GPU = torch.device("cuda", 0)
NOISY = MixtureConfig(level_difference_db=(-5.0, 5.0), sensor_snr_db=(0.0, 30.0), diffuse_snr_db=(0.0, 30.0))
UNLIKE = replace(NOISY, mic_gain_db=3.0, mic_phase_deg=20.0)  # microphones
RIRS = {"fra": RirConfig(), "hybrid": RirConfig(method="hybrid"), "mixed": RirConfig(hybrid_share=0.5),
        "exact": RirConfig(method="ism")}
# Those that our own kernels find the images of, and convolve.
OURS = {"fra alone": RirConfig(early=False), "mixed alone": RirConfig(early=False, hybrid_share=0.5),
        "full": RirConfig(early=False, image_range="full", perturbation_exponent=0.5)}


def seeded(seed, device="cpu"):
    return torch.Generator(device).manual_seed(seed)


def relative(actual, expected):
    """L2 error over L2."""
    return float((actual.double().cpu() - expected.double().cpu()).norm() / expected.double().cpu().norm())


def check_alike(found, expected, most):
    """Mixtures, and their early parts where there are some."""
    assert relative(found.audio, expected.audio) < most and (found.early is None) == (expected.early is None)
    assert found.early is None or relative(found.early, expected.early) < most


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scene", [SceneConfig(), SceneConfig(num_mics=3, num_src=1)], ids=["2x2", "3x1"])
@pytest.mark.parametrize("name", [*RIRS, *OURS])
def test_rooms_drawn_on_the_cpu_sound_the_same(name, scene, fused):
    """Slots are found in float64, so no arrival moves; what is left are roundings and the order of additions. In two
    chunks."""
    simulator = Simulator(scene, {**RIRS, **OURS}[name], NOISY, SimulatorConfig(4, fused=fused), IsmConfig("eyring"))
    dry = torch.randn(6, scene.num_src, 16000, generator=seeded(0))
    draw = simulator.draw(6, 16000, generator=seeded(1))
    check_alike(simulator.render(dry.to(GPU), draw.to(GPU)), simulator.render(dry, draw), 1e-5)
    direct = simulator.render_direct(dry, draw)
    assert relative(simulator.render_direct(dry.to(GPU), draw.to(GPU)), direct) < 1e-5


def test_draws_follow_the_generator_of_the_gpu():
    simulator, dry = Simulator(rir=RirConfig(early=False)), torch.randn(6, 2, 16000, generator=seeded(0)).to(GPU)
    first, again, other = (simulator(dry, generator=seeded(seed, GPU)) for seed in (1, 1, 2))
    assert torch.equal(first.scenes.src_pos, again.scenes.src_pos) and relative(again.audio, first.audio) < 1e-5
    assert relative(other.audio, first.audio) > 0.1


@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["fra", "mixed", "mixed alone"])
def test_compiled_simulator_gives_the_same_mixtures(name, fused):
    """In two chunks, whose mixtures go to their places within the graph."""
    torch.compiler.reset()
    plain, compiled = (Simulator(rir={**RIRS, **OURS}[name], mixture=NOISY, ism=IsmConfig("eyring"), config=config)
                       for config in (SimulatorConfig(4, fused=False), SimulatorConfig(4, compile=True, fused=fused)))
    dry, draw = torch.randn(8, 2, 16000, device=GPU), plain.draw(8, 16000, generator=seeded(1, GPU))
    check_alike(compiled.render(dry, draw), plain.render(dry, draw), 1e-4)


@pytest.mark.parametrize("drop", [True, False])
def test_batches_made_ahead_are_those_made_in_turn(drop):
    """Beside a busy stream; also where each is dropped while the GPU still reads it, which would let the next one
    write into its memory were it not held until that one is taken."""
    runs = [bench_train.prepare("librispeech", 64, GPU, [f"train.overlap={on}", "train.graph=false"])
            for on in ("false", "true")]
    plain, ahead = (bench_train.Steps(run, run.localizer).batches for run in runs)
    expected = [plain.take(step).audio.square().sum() for step in range(8)]
    work, sums, kept = torch.randn(4096, 4096, device=GPU), [], []
    for step in range(8):
        mixture = ahead.take(step)
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
        sums.append(mixture.audio.square().sum())  # queued behind the work
        if not drop:
            kept.append(mixture)
        del mixture
        ahead.prefetch()
    assert_close(torch.stack(sums), torch.stack(expected), rtol=1e-5, atol=0)


STEP = ["train.precision=float32", "speech.clip_s=1.0", "train.steps=100", "train.clip_norm=1.0", "train.ema=0.9",
        "train.noise_warmup=0.2"]  # of the recipe, with mixed rooms and noise


def steps_of(network, overrides, count, compile=False):
    """Losses of `count` steps, and the run: by CapturedStep or the loop, as train.graph says."""
    torch.manual_seed(0)
    run = bench_train.prepare(network, 8, GPU, [*STEP, *overrides])
    steps, losses = bench_train.Steps(run, runtime.compiled(run.localizer, compile)), []
    for step in range(count):
        rate = learning_rate(run.cfg.train, step, step / 100)
        if run.graph:
            losses.append(steps.captured.take(step, rate).clone())     # the next one overwrites it
            continue
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        losses.append(gradients(run, steps.network, steps.batches.take(step)))
        update(run)
    return torch.stack(losses), run


@pytest.mark.parametrize("network, overrides", [
    ("librispeech", []), ("librispeech", ["features.mask_width=0"]), ("librispeech", ["train.optimizer=adamw"]),
    ("patches", []), ("patches", ["model.symmetric=true"]),
    ("librispeech", ["train.ema=null", "train.clip_norm=null"]),
    ("original", ["train.precision=bfloat16", "train.warmup=0.1"])],
    ids=["muon", "no masks", "adamw", "patches", "symmetric", "bare", "original"])
def test_captured_steps_are_those_of_the_loop(network, overrides):
    """Eight: three plain on the stream that captures, then the capture, and replays with other draws, rates and noise.
    Rooms are added up in any order, and eight steps make more of it."""
    expected, plain = steps_of(network, [*overrides, "train.graph=false"], 8)
    found, run = steps_of(network, [*overrides, "train.graph=true"], 8)
    assert run.graph and not plain.graph and len(expected.unique(dim=0)) == 8
    assert_close(found, expected, rtol=1e-2 if network == "original" else 1e-3, atol=0)
    begin = bench_train.prepare(network, 8, GPU, [*STEP, *overrides]).localizer  # from the same seed
    start, there, here = (torch.cat([weight.detach().flatten() for weight in one.parameters()])
                          for one in (begin, plain.localizer, run.localizer))
    # As a whole, by how far they have gone: where a gradient is zero, Adam makes a step of its rounding error. Those
    # without clipping have been 0.1005 of it apart, once.
    most = 0.2 if network == "original" or "train.clip_norm=null" in overrides else 0.1
    assert (here - there).norm() < most * (there - start).norm()
    if run.averaged is not None:
        there, here = (torch.cat([weight.flatten() for weight in one.averaged.model.parameters()])
                       for one in (plain, run))
        assert (here - there).norm() < 1e-2 * there.norm() and run.averaged.updates == 8


def test_captured_draws_are_those_of_their_steps():
    """The very mixtures, in a step that trains nothing; also those of a step that was there before."""
    run = bench_train.prepare("librispeech", 8, GPU, [*STEP, "train.graph=true"])
    captured = CapturedStep(run, run.localizer, torch.zeros((), dtype=torch.int64, device=GPU))
    captured.graphed = runtime.Graphed(lambda: captured.mixtures().audio, GPU, captured.generators)
    for step in (0, 1, 2, 3, 4, 30, 4):
        found, expected = captured.take(step, 1e-3), draw_batch(run, step).audio
        assert relative(found, expected) < 1e-5


@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
def test_compiled_network_and_simulator_may_be_captured():
    torch.compiler.reset()
    expected, _ = steps_of("librispeech", ["train.graph=false"], 6)
    found, _ = steps_of("librispeech", ["train.graph=true", "simulator.compile=true"], 6, compile=True)
    assert_close(found, expected, rtol=1e-2, atol=0)


def test_captured_run_goes_on_from_its_state():
    """Three steps more, in the graph that follows, from the state dicts after five."""
    expected, _ = steps_of("librispeech", ["train.graph=true"], 8)
    _, half = steps_of("librispeech", ["train.graph=true"], 5)
    run = bench_train.prepare("librispeech", 8, GPU, [*STEP, "train.graph=true"])
    run.localizer.load_state_dict(half.localizer.state_dict())
    restore_optimizer(run.optimizer, half.optimizer.state_dict())
    run.averaged.updates = 5
    captured = CapturedStep(run, run.localizer, torch.zeros((), dtype=torch.int64, device=GPU))
    found = [captured.take(step, learning_rate(run.cfg.train, step, step / 100)).clone() for step in (5, 6, 7)]
    assert_close(torch.stack(found), expected[5:], rtol=1e-3, atol=0)


def test_layout_and_frozen_transform_change_roundings_alone():
    torch.manual_seed(0)
    plain = SSLModel(channels_last=False).to(GPU)
    audio = torch.randn(4, 2, 16000, device=GPU)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert_close(STFT(frozen=True).to(GPU)(audio), STFT().to(GPU)(audio), rtol=0, atol=1e-4)
        results = []
        for changes in ({"channels_last": False}, {}, {"freeze_stft": True}):
            other = SSLModel(**changes).to(GPU)
            other.load_state_dict(plain.state_dict())
            logits = torch.stack(other(audio))
            logits.sin().sum().backward()
            results.append((logits.detach(), torch.cat([p.grad.flatten() for p in other.backbone.parameters()])))
        assert other.stft.by_fft
    for logits, gradient in results[1:]:
        assert relative(logits, results[0][0]) < 1e-3 and relative(gradient, results[0][1]) < 1e-2


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_attention_with_its_bias_is_that_of_the_cpu(dtype, most):
    """The output and the gradient of the table, which reaches it through the bias alone."""
    torch.manual_seed(0)
    here, x = Attention(64, heads=4, dim_head=32), torch.randn(3, 50, 64)
    there = Attention(64, heads=4, dim_head=32).to(GPU)
    there.load_state_dict(here.state_dict())
    expected = here(x)
    with runtime.autocast(GPU, dtype is torch.bfloat16):
        found = there(x.to(GPU))
    assert found.dtype == dtype and relative(found.detach(), expected.detach()) < most
    expected.sin().sum().backward()
    found.float().sin().sum().backward()
    assert relative(there.rel_pos_emb.weight.grad, here.rel_pos_emb.weight.grad) < 2 * most


def trained(network, audio, bfloat16=False):
    """Outputs, and the gradients of all weights, by name and on the CPU, after one pass in training."""
    network.zero_grad()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        with runtime.autocast(audio.device, bfloat16):
            out = network(audio)
        out = torch.cat([part.flatten() for part in out]) if isinstance(out, tuple) else out
        out.float().sin().sum().backward()
    return out.detach(), {name: p.grad.cpu() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("bfloat16, most", [(False, 1e-4), (True, 3e-2)])
@pytest.mark.parametrize("tokens", [18, 62, 63])                        # the last by a convolution
def test_depthwise_filters_are_those_of_the_cpu(tokens, bfloat16, most):
    torch.manual_seed(0)
    here, x = DepthWiseConv1d(64, 31), torch.randn(40, tokens, 64)
    there = DepthWiseConv1d(64, 31).to(GPU)
    there.load_state_dict(here.state_dict())
    (expected, gradients), (found, others) = trained(here, x), trained(there, x.to(GPU), bfloat16)
    assert found.dtype == (torch.bfloat16 if bfloat16 else torch.float32) and relative(found, expected) < most
    for name, gradient in gradients.items():
        assert relative(others[name], gradient) < 2 * most


@pytest.mark.parametrize("samples", [10_080, 16_000, 48_000])
def test_transform_is_that_of_the_cpu(samples):
    here, there, audio = STFT(), STFT().to(GPU), torch.randn(4, 2, samples, generator=seeded(0))
    (expected, gradients), (found, others) = trained(here, audio), trained(there, audio.to(GPU))
    assert relative(found, expected) < 1e-5
    for name, gradient in gradients.items():
        assert relative(others[name], gradient) < 1e-3                  # of sin(), whose arguments reach a hundred


@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
@pytest.mark.parametrize("compile, bfloat16", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("kind", ["original", "small", "masks", "patches"])
def test_network_in_training_is_that_of_the_cpu(kind, compile, bfloat16):
    """Logits, gradients of all weights, and what batch norms keep."""
    torch.compiler.reset()
    torch.manual_seed(0)
    features = {"masks": dict(mask_width=64),
                "patches": dict(mask_width=64, patch_width=32, free_masks=2)}.get(kind, {})
    networks = [SSLModel() if kind == "original" else
                ConformerLocalizer(ModelConfig(), FeatureConfig(**features), 16_000, 0.08, 2, 36) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    networks[1].to(GPU)
    audio = torch.randn(4, 2, 16_000)
    (expected, gradients) = trained(networks[0], audio)
    (found, others) = trained(runtime.compiled(networks[1], compile), audio.to(GPU), bfloat16)
    # On a CPU bfloat16 moves logits by 2 % and gradients by 4, by products and by convolutions.
    assert relative(found, expected) < (0.06 if bfloat16 else 1e-3)
    assert others.keys() == gradients.keys()
    # All of them, as those of a bias before a norm are 0 but for roundings.
    assert relative(*(torch.cat([part[name].flatten() for name in gradients]) for part in (others, gradients))) < (
        0.15 if bfloat16 else 1e-2)
    for (name, buffer), other in zip(networks[0].named_buffers(), networks[1].buffers()):
        assert relative(other, buffer) < (0.05 if bfloat16 else 1e-3), name


@pytest.mark.parametrize("kind", ["adam", "adamw", "muon"])
def test_update_is_that_of_the_cpu(kind):
    cfg = TrainConfig(steps=1, optimizer=kind, weight_decay=0.3, lr=0.01)
    sizes = (80, 96, 256, 70)                                           # two of them wide enough to go by their rows
    layers = [torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in zip(sizes, sizes[1:]))) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    layers[1].to(GPU)
    optimizers = [build_optimizer(cfg, layer) for layer in layers]
    for step in range(10):
        for layer, optimizer in zip(layers, optimizers):
            for index, parameter in enumerate(layer.parameters()):
                gradient = torch.randn(parameter.shape, generator=seeded(10 * step + index))
                parameter.grad = gradient.to(parameter.device)
            optimizer.step()
    assert_close(layers[1].cpu().state_dict(), layers[0].state_dict(), rtol=1e-5, atol=1e-5)  # of updates of 1e-2


@pytest.mark.parametrize("rir, mixture, bank", [
    (RIRS["mixed"], NOISY, None), (OURS["mixed alone"], NOISY, None), (OURS["fra alone"], UNLIKE, None),
    (OURS["fra alone"], NOISY, 5)], ids=["early", "alone", "microphones", "bank"])
def test_captured_simulator_gives_the_same_mixtures(rir, mixture, bank):
    """Of a generator that was seeded before the call: of plain calls, of the capture and of replays."""
    simulator = Simulator(SceneConfig(bank=bank), rir, mixture, SimulatorConfig(4), IsmConfig("eyring"))
    if bank is not None:
        simulator.fill_bank(generator=seeded(9, GPU))
    generator, dry = torch.Generator(GPU), torch.randn(7, 6, 2, 16000, generator=seeded(0)).to(GPU)
    captured = simulator.captured(6, 16000, generator=generator)
    for step in (0, 1, 2, 3, 4, 5, 4):
        generator.manual_seed(step)
        found = captured(dry[step])
        expected = simulator(dry[step], generator=seeded(step, GPU))
        check_alike(found, expected, 1e-5)
        assert torch.equal(found.scenes.src_pos, expected.scenes.src_pos)
        for snr in ("sensor_snr_db", "diffuse_snr_db"):
            assert torch.equal(getattr(found, snr), getattr(expected, snr))


def test_convolution_by_triton_is_that_of_the_cpu():
    """As long as a recipe's, and odd numbers of microphones and sources."""
    from ssl_gpu.convolve import convolve_sources
    from ssl_gpu.fused_convolve import convolve_fused
    for mics, srcs, samples in ((2, 2, 48000), (3, 1, 20000), (1, 3, 5000)):
        signal, gain = torch.randn(3, srcs, samples, generator=seeded(0)), torch.rand(3, srcs, generator=seeded(1))
        rir, keep = torch.randn(3, mics, srcs, 3000, generator=seeded(2)), torch.tensor([True, True, False])
        expected = convolve_sources(signal * gain[..., None], rir, samples)
        expected[2] = 0
        found = convolve_fused(*(x.to(GPU) for x in (signal, gain, rir)), samples, keep.to(GPU))
        assert relative(found, expected) < 1e-6
