"""No wait for the GPU in the hot path: audited without one, and under torch's own alarm where there is one.

The audit runs the code on fake tensors that claim to be on a GPU: they have shapes and no values, so whatever needs a
value (item, bool, int, tolist, nonzero, a mask as an index) raises, as does a tensor left on the CPU; and copies
between CPU and GPU are watched, which wait unless they are to a GPU and non_blocking.
"""
import contextlib
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # for those who call pytest without python -m

from benchmarks import bench_train  # noqa: E402
from ssl_gpu import rng  # noqa: E402
from ssl_gpu.config import RunConfig, load_config  # noqa: E402
from ssl_gpu.directivity import Pattern  # noqa: E402
from ssl_gpu.ism import IsmConfig  # noqa: E402
from ssl_gpu.laws import Decay, ImageDirections, ImageRange, SrcDirections  # noqa: E402
from ssl_gpu.mixture import MixtureConfig  # noqa: E402
from ssl_gpu.optim import Averaged, build_optimizer, rate_on_device  # noqa: E402
from ssl_gpu.pretrained import build_localizer  # noqa: E402
from ssl_gpu.rir import RirConfig  # noqa: E402
from ssl_gpu.scene import SceneConfig  # noqa: E402
from ssl_gpu.simulator import Simulator, SimulatorConfig  # noqa: E402
from ssl_gpu.speech import Crop, SpeechConfig, draw_crops, gather_crops, voices_bank  # noqa: E402
from ssl_gpu.train import update  # noqa: E402

if find_spec("triton") is not None:  # or it would be imported, with its tables, when something asks for it
    import ssl_gpu.fused_convolve  # noqa: F401

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
NOISY = MixtureConfig(level_difference_db=(-5.0, 5.0), sensor_snr_db=(0.0, 30.0), diffuse_snr_db=(0.0, 30.0),
                      noise_probability=0.5)
LAWS = {
    "default": {},
    "early": dict(rir=RirConfig()),
    "noise, rotated jittered arrays": dict(mixture=NOISY, scene=SceneConfig(rotate=True, spacing_jitter_m=0.003)),
    "microphones that differ": dict(mixture=replace(NOISY, mic_gain_db=3.0, mic_phase_deg=20.0)),
    "random arrays": dict(scene=SceneConfig(array_radius_m=0.2, num_mics=4, num_src=3)),
    "given arrays": dict(scene=SceneConfig(mic_array_m=((0, 0, 0), (0.1, 0, 0)), src_orientation_deg=(0, 90))),
    "patterns": dict(rir=RirConfig(src_pattern=Pattern.CARDIOID, mic_pattern=Pattern.HALF_OMNI)),
    "choices": dict(rir=RirConfig(decay=Decay.MEASURED, image_range=ImageRange.FULL, images_per_s=(2000, 6000),
                                  image_directions=ImageDirections.SPHERE, src_directions=SrcDirections.SPHERE,
                                  src_pattern=Pattern.CARDIOID)),
    "octaves": dict(rir=RirConfig(band_rt60_ratio=((0.5, 1.0),) * 7, air=(20.0, 50.0))),
    "hybrid": dict(rir=RirConfig(method="hybrid"), ism=IsmConfig("eyring")),
    "mixed": dict(rir=RirConfig(hybrid_share=0.5), ism=IsmConfig("eyring"), mixture=NOISY),
    **{f"fused, {name}": dict(config=SimulatorConfig(2, fused=find_spec("triton") is not None), **law)
       for name, law in {"early": dict(rir=RirConfig()), "reference": {}, "mixed": dict(
           rir=RirConfig(early=False, hybrid_share=0.5), ism=IsmConfig("eyring"), mixture=NOISY)}.items()},
}


class FakeGenerator(torch.Generator):
    """A CPU's generator that says it is a GPU's, which torch makes only where there is a GPU."""

    device = GPU


class Copies(TorchDispatchMode):
    """Raises where a copy between CPU and GPU would wait."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = arguments[0] if name == "_to_copy" else arguments[1]
            target = keywords.get("device") or source.device if name == "_to_copy" else arguments[0].device
            non_blocking = keywords.get("non_blocking", name == "copy_" and arguments[2:3] == (True,))
            if source.device.type != target.type and not (target.type == "cuda" and non_blocking):
                raise AssertionError(f"a copy from {source.device} to {target} waits for the GPU")
        return function(*arguments, **keywords)


class Literals(TorchFunctionMode):
    """Raises where Python's numbers become a tensor on the GPU, which torch copies there and waits for."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = keywords or {}
        if getattr(function, "__name__", "") in ("tensor", "as_tensor", "asarray", "new_tensor"):
            on_gpu = isinstance(arguments[0], torch.Tensor) and arguments[0].device.type == "cuda"
            device = torch.device(keywords.get("device") or "cpu")
            if device.type == "cuda" or function.__name__ == "new_tensor" and on_gpu:
                raise AssertionError(f"torch.{function.__name__} on a GPU waits for it")
        return function(*arguments, **keywords)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Within it, GPU tensors are fake and waiting raises. Tables that runtime.constant keeps are made once in a
    process, so they may wait; here they are not kept, as fakes must not outlive the test."""
    modes = contextlib.ExitStack()

    def unwatched(make):
        def look_up(*arguments):
            with torch.utils._python_dispatch._disable_current_modes(), torch._C.DisableTorchFunction():
                made = make(*(torch.device("cpu") if argument == GPU else argument for argument in arguments))
            return tuple(map(on_gpu, made)) if isinstance(made, tuple) else on_gpu(made)

        return look_up

    def on_gpu(value):
        return torch.empty(value.shape, dtype=value.dtype, device=GPU) if isinstance(value, torch.Tensor) else value

    for module in [module for name, module in sys.modules.items() if name.startswith("ssl_gpu.")]:
        for name, value in vars(module).items():
            if hasattr(value, "is_constant"):
                monkeypatch.setattr(module, name, unwatched(value.__wrapped__))
    monkeypatch.setattr(rng, "generator", lambda *_, **__: FakeGenerator())
    for mode in (FakeTensorMode(allow_non_fake_inputs=True), Copies(), Literals()):
        modes.enter_context(mode)
    with modes:
        yield


@pytest.mark.parametrize("waits", [
    lambda x: x.sum().item(), lambda x: bool(x[0] > 0), lambda x: int(x[0]), lambda x: x.tolist(), lambda x: x.cpu(),
    lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x.numpy(), lambda x: torch.unique(x), lambda x: float(x.max()),
    lambda x: torch.repeat_interleave(x.long()), lambda x: torch.bincount(x.long()), lambda x: torch.ones(3).to(GPU),
    lambda x: torch.tensor([1.0, 2.0], device=GPU), lambda x: x.new_tensor([1.0]), lambda x: x.copy_(torch.ones(3)),
    lambda x: x + torch.ones(3), lambda x: torch.equal(x, x)], ids=range(18))
def test_audit_notices_whatever_waits(fake_gpu, waits):
    with pytest.raises(Exception, match="aten[.]|waits for|numpy|two different devices"):
        waits(torch.zeros(3, device=GPU))


def test_audit_lets_pass_what_does_not_wait(fake_gpu):
    x = torch.zeros(3, device=GPU)
    x = torch.where(x > 0, x, 0.0) + torch.ones(3).to(GPU, non_blocking=True)
    assert x[x.argmax()[None]].device == GPU
    assert torch.rand(3, generator=FakeGenerator(), device=GPU).shape == (3,)


def simulator_of(law):
    return Simulator(**{"rir": RirConfig(early=False), "config": SimulatorConfig(2), **LAWS[law]})


@pytest.mark.parametrize("law", LAWS)
def test_simulation_never_waits_for_the_gpu(law, request):
    simulator = simulator_of(law)                      # which checks its law with numbers, once and on the CPU
    request.getfixturevalue("fake_gpu")
    mixture = simulator(torch.zeros(4, simulator.scene.num_src, 4000, device=GPU), generator=FakeGenerator())
    assert mixture.audio.shape == (4, simulator.scene.mic_count, 4000) and mixture.audio.device == GPU
    assert mixture.scenes.cone_angle.device == GPU


class Launches(TorchDispatchMode):
    """Counts operations, but for those that only look at memory or ask for some."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.overloadpacket.__name__
        if not (function.is_view or function.namespace == "prim" or "empty" in name or name == "scalar_tensor"):
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_a_batch_is_few_launches(request):
    """With our own kernels, of a batch of the default law, FFTs included: what a small batch on a GPU waits for."""
    simulator = Simulator(rir=RirConfig(early=False), config=SimulatorConfig(fused=True))
    request.getfixturevalue("fake_gpu")
    dry = torch.zeros(256, 2, 48000, device=GPU)
    simulator(dry, generator=FakeGenerator())                           # finds out that Triton works
    with Launches() as launches:
        simulator(dry, generator=FakeGenerator())
    assert launches.names.count("image_tables") == launches.names.count("add_images") == 1
    assert len(launches.names) <= 80, launches.names                   # of docs/performance.md, entry 55


def test_exact_rooms_wait_as_they_say(request):
    simulator = Simulator(rir=RirConfig(method="ism"), ism=IsmConfig("eyring"))
    request.getfixturevalue("fake_gpu")
    with pytest.raises(Exception, match="aten._local_scalar_dense"):
        simulator(torch.zeros(4, 2, 4000, device=GPU), generator=FakeGenerator())


@pytest.mark.parametrize("crop", Crop)
def test_drawing_and_cutting_speech_never_waits_for_the_gpu(crop, request):
    cfg = SpeechConfig(voices_speakers=3, voices_utterances=1, voices_duration_s=0.5)
    bank = voices_bank(cfg, sample_rate=16000, generator=torch.Generator().manual_seed(0))
    request.getfixturevalue("fake_gpu")
    bank = replace(bank, **{name: torch.empty_like(getattr(bank, name), device=GPU) for name in
                            ("samples", "start", "length", "speaker", "speaker_start", "speaker_count")}, device=GPU)
    crops = draw_crops(bank, 4, 2, 4000, crop, generator=FakeGenerator())
    assert gather_crops(bank, crops, 4000).shape == (4, 2, 4000)


@pytest.mark.parametrize("name, overrides", [
    ("librispeech", ["features.mask_width=0"]), ("librispeech", []), ("patches", []), ("original", [])],
    ids=["small", "masks", "patches", "original"])
def test_networks_and_losses_never_wait_for_the_gpu(name, overrides, request):
    """From dry speech to the loss, the network being built on the CPU before. The way back needs a GPU, see below."""
    cfg = load_config(RunConfig, ROOT / "configs" / f"{name}.yaml", overrides)
    simulator, localizer = Simulator(rir=RirConfig(early=False)), build_localizer(cfg).train().to("meta")
    request.getfixturevalue("fake_gpu")
    localizer.to_empty(device=GPU)
    dry = torch.zeros(2, 2, 16000, device=GPU)
    draw = simulator.draw(2, 16000, generator=FakeGenerator())
    mixture = replace(simulator.render(dry, draw), direct=simulator.render_direct(dry, draw))
    losses = localizer.training_losses(localizer(mixture.audio), mixture)
    assert losses.shape == ((2,) if localizer.masks else (1,)) and losses.device == GPU


@pytest.mark.parametrize("overrides", [[], ["model.symmetric=true"]], ids=["plain", "symmetric"])
def test_updates_that_a_graph_captures_never_wait_for_the_gpu(overrides, request):
    """Symmetry, clipping, Muon with its rate on the GPU (torch's fused AdamW takes no fake tensors), averages; and the
    draws with their share of noise there."""
    cfg = load_config(RunConfig, ROOT / "configs" / "librispeech.yaml", overrides)
    localizer = build_localizer(cfg).to("meta")
    simulator, averaged = simulator_of("mixed"), Averaged(localizer, 0.9)
    request.getfixturevalue("fake_gpu")
    for module in (localizer, averaged.model):
        module.to_empty(device=GPU)
    run = SimpleNamespace(cfg=cfg, localizer=localizer, averaged=averaged,
                          optimizer=build_optimizer(cfg.train, localizer).parts["muon"])
    rate_on_device(run.optimizer, GPU).fill_(1e-3)
    assert (localizer.mirror is not None) == bool(overrides)
    for _ in range(2):
        for weight in localizer.parameters():
            weight.grad = torch.empty_like(weight)
        update(run, torch.ones((), device=GPU))
    noise = torch.ones((), dtype=torch.float64, device=GPU)
    drawn = simulator.draw(4, 4000, generator=FakeGenerator(), noise_share=noise)
    assert drawn.mixture.sensor_snr.device == GPU


# ---- on a GPU ----


@contextlib.contextmanager
def alarm():
    """torch's own: raises where the CPU waits for the GPU."""
    torch.cuda.synchronize(GPU)
    try:
        with warnings.catch_warnings():
            # The first call of a process warns that this is a prototype, after it has set the mode; pytest raises that.
            warnings.simplefilter("ignore", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_alarm_is_set_despite_its_warning_and_never_left_on(monkeypatch):
    """On a stand-in that warns as torch does: once, with the mode set."""
    modes = []

    def set_mode(mode):
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature", UserWarning)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with alarm():
        assert modes == ["error"]
    with pytest.raises(KeyError), alarm():
        raise KeyError
    assert modes == ["error", "default"] * 2


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("law", LAWS)
def test_simulation_sets_off_no_alarm(law):
    simulator, generator = simulator_of(law), torch.Generator(GPU).manual_seed(0)
    dry = torch.randn(4, simulator.scene.num_src, 4000, device=GPU)
    simulator(dry, generator=generator)  # tables are made once
    with alarm():
        mixture = simulator(dry, generator=generator)
    assert mixture.audio.isfinite().all()
    with alarm(), pytest.raises(RuntimeError, match="synchroniz"):
        mixture.audio.sum().item()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("overlap", ["true", "false"])
@pytest.mark.parametrize("name", ["librispeech", "original"])
def test_training_steps_set_off_no_alarm(name, overlap):
    """Speech, rooms, network, loss, gradients, clipping, update and average, simulated ahead or not."""
    run = bench_train.prepare(name, 4, GPU, [f"train.overlap={overlap}", "train.graph=false", "train.clip_norm=1.0"])
    steps = bench_train.Steps(run, run.localizer)
    steps.take(3)
    with alarm():
        steps.take(2)
    assert all(parameter.isfinite().all() for parameter in run.localizer.parameters())
