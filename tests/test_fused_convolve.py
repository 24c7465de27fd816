"""The convolution of a GPU, its programs in Triton's interpreter, against the plain one; without a GPU."""
import pytest
import torch
from torch.testing import assert_close

from ssl_gpu import mixture as mixture_module
from ssl_gpu.convolve import convolve_sources, fast_length, transform_length
from ssl_gpu.mixture import MixtureConfig
from ssl_gpu.rir import RirConfig
from ssl_gpu.rooms import render_rooms
from ssl_gpu.scene import SceneConfig
from ssl_gpu.simulator import Simulator

GPU = torch.device("cuda", 0)


@pytest.fixture
def fused(monkeypatch):
    """ssl_gpu.fused_convolve with programs that run on a CPU, and outputs that show what is not written."""
    pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    from ssl_gpu import fused_convolve as module
    monkeypatch.setattr(module, "_turned", InterpretedFunction(module._turned.fn))
    for name in ("split", "multiply", "merge"):
        program, launch = InterpretedFunction(getattr(module, f"{name}_program").fn), getattr(module, f"launch_{name}")
        monkeypatch.setattr(module, name, lambda out, *rest, program=program, launch=launch: launch(
            program, out.fill_(torch.nan), *rest))
    return module


@pytest.mark.parametrize("mics, srcs, base", [
    (2, 2, 64), (1, 1, 64), (3, 3, 64), (4, 2, 64), (2, 4, 64), (1, 2, 64), (3, 3, 128), (3, 3, 256)])  # radix 4, 2, 1
def test_it_is_the_convolution_of_the_cpu(mics, srcs, base, fused, monkeypatch):
    """Gains, views, odd numbers of microphones and sources, silence where asked for."""
    monkeypatch.setattr(fused, "split_size", lambda length: (256 // base, base))
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(2, 190, srcs, generator=generator).mT
    gain, rir = torch.rand(2, srcs, generator=generator), torch.randn(2, srcs, mics, 50, generator=generator)
    rir, keep = rir.transpose(1, 2), torch.tensor([True, False])
    for given, samples in ((keep, 190), (None, 239)):
        expected = convolve_sources(signal * gain[..., None], rir, samples)
        if given is not None:
            expected[1] = 0
        found = fused.convolve_fused(signal, gain, rir, samples, given)
        assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_size_of_the_transforms(fused):
    assert [fused.split_size(length) for length in (1, 256, 257, 16384, 16385, 32768, 32769, 59199, 65536, 65537)] == [
        (1, 256), (1, 256), (1, 512), (1, 16384), (2, 16384), (2, 16384), (4, 16384), (4, 16384), (4, 16384), None]
    assert fused.convolve_fused(torch.zeros(1, 1, 65536), None, torch.zeros(1, 1, 1, 2), 65536) is None


@pytest.mark.parametrize("samples", [700, 70000])  # one that fits, one that is left to the plain path
@pytest.mark.parametrize("noisy", [False, True])
def test_fused_mixtures_are_those_of_the_plain_path(samples, noisy, fused, monkeypatch):
    """The way of a GPU through mix, also with a scene that broke its law and would come out as NaN."""
    noise = MixtureConfig(sensor_snr_db=(0.0, 10.0), diffuse_snr_db=(0.0, 10.0)) if noisy else MixtureConfig()
    simulator = Simulator(SceneConfig(rt60_s=(0.1, 0.12)), RirConfig(early=False, num_images=(8, 8)), noise)
    draw = simulator.draw(3, samples, generator=torch.Generator().manual_seed(0))
    dry, asked = torch.randn(3, 2, samples, generator=torch.Generator().manual_seed(1)), []
    rirs = render_rooms(simulator.ism, simulator.rir, draw.scenes, draw.rooms)
    rirs.full[1], draw.scenes.valid[1] = torch.nan, False
    expected = mixture_module.mix(dry, rirs, draw.scenes, draw.mixture).audio
    real = fused.convolve_fused
    monkeypatch.setattr(fused, "convolve_fused", lambda *a: asked.append(real(*a)) or asked[-1])
    monkeypatch.setattr(mixture_module.runtime, "is_gpu", lambda device: True)
    found = mixture_module.mix(dry, rirs, draw.scenes, draw.mixture, fused=True).audio
    assert len(asked) == 1 and (asked[0] is None) == (samples == 70000)
    assert not expected[1].any() and not found[1].any() and expected[0].any()
    assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("what", ["gradient", "float64", "early", "microphones that differ"])
def test_what_does_not_fit_is_left_to_the_plain_path(what, fused, monkeypatch):
    noise = MixtureConfig(mic_gain_db=1.0) if what.startswith("microphones") else MixtureConfig()
    simulator = Simulator(SceneConfig(rt60_s=(0.1, 0.12)), RirConfig(early=what == "early", num_images=(8, 8)), noise)
    draw = simulator.draw(2, 300, generator=torch.Generator().manual_seed(0))
    rirs = render_rooms(simulator.ism, simulator.rir, draw.scenes, draw.rooms)
    dry = torch.randn(2, 2, 300, dtype=torch.float64 if what == "float64" else torch.float32)
    dry.requires_grad_(what == "gradient")
    monkeypatch.setattr(fused, "convolve_fused", None)                  # not to be called
    monkeypatch.setattr(mixture_module.runtime, "is_gpu", lambda device: True)
    audio = mixture_module.mix(dry, rirs, draw.scenes, draw.mixture, fused=True).audio
    assert audio.requires_grad == (what == "gradient") and audio.shape == (2, 2, 300)


def test_lengths_of_a_gpu_are_powers_of_two_unless_much_shorter_ones_do():
    cpu = torch.device("cpu")
    assert [transform_length(length, cpu) for length in (11936, 59199)] == [fast_length(11936), fast_length(59199)]
    lengths = {1: 2, 2: 2, 3: 4, 700: 768, 11936: 12288, 12288: 12288, 12289: 16384, 20000: 20736, 25000: 32768,
               59199: 65536, 65536: 65536, 65537: 69984}
    assert {length: transform_length(length, GPU) for length in lengths} == lengths
    assert all(length <= transform_length(length, GPU) <= 2 * length for length in range(2, 5000, 7))
