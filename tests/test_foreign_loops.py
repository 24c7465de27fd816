"""The simulator in somebody else's program: under autocast, other default dtypes, in worker processes, with speech that
wants gradients, with draws of other simulators."""
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from ssl_gpu import runtime
from ssl_gpu.convolve import convolve_sources
from ssl_gpu.ism import Absorption, IsmConfig
from ssl_gpu.mixture import MixtureConfig, draw_mixture, mix
from ssl_gpu.rir import Method, RirConfig
from ssl_gpu.scene import SceneConfig, make_scenes, sample_scenes
from ssl_gpu.simulator import Simulator, SimulatorConfig
from ssl_gpu.synthesis import RirBatch

LAW = SceneConfig(rt60_s=(0.1, 0.2), num_src=1, src_dist_m=(0.2, 3.0))
FEW = RirConfig(num_images=(16, 32), early=False)
NOISY = MixtureConfig(sensor_snr_db=(0.0, 10.0), diffuse_snr_db=(0.0, 10.0), mic_gain_db=1.0, mic_phase_deg=180.0)
EXACT = dict(rir=RirConfig(method=Method.ISM, early=False), ism=IsmConfig(Absorption.EYRING, max_order=3))
KINDS = {
    "fra": dict(rir=FEW), "exact": EXACT,
    "measured": dict(rir=replace(FEW, decay="measured", images_per_s=(500, 1000))),
    "hybrid": dict(rir=replace(FEW, hybrid_share=0.5), ism=IsmConfig(Absorption.EYRING)),
    "octaves": dict(rir=replace(FEW, band_rt60_ratio=((0.5, 1.0),) * 7)), "noise": dict(rir=FEW, mixture=NOISY)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def speech(batch=3, samples=2000):
    return torch.randn(batch, 1, samples, generator=seeded(9), dtype=torch.float32)


def heard(kind):
    return Simulator(LAW, **KINDS[kind])(speech(), generator=seeded()).audio


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_around_it_changes_nothing(kind):
    """Exact rooms were off by 3e-3: their arrivals, and phases of microphones, are products of matrices."""
    expected = heard(kind)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(heard(kind), expected)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_default_dtype_changes_nothing(dtype, tmp_path):
    """In a process of its own: tables made before would serve this one."""
    program = ("import sys, torch; torch.set_default_dtype(getattr(torch, sys.argv[1])); "
               "sys.path.insert(0, sys.argv[2]); import test_foreign_loops as loops; "
               "torch.set_num_threads(int(sys.argv[3])); "
               "torch.save({kind: loops.heard(kind) for kind in loops.KINDS}, sys.argv[4])")
    arguments = (dtype, str(Path(__file__).parent), str(torch.get_num_threads()), str(tmp_path / "heard.pt"))
    subprocess.run([sys.executable, "-c", program, *arguments], cwd=Path(__file__).parents[1], check=True)
    for kind, found in torch.load(tmp_path / "heard.pt").items():
        assert found.dtype == torch.float32 and torch.equal(found, heard(kind))


def bank_of(seed, law=LAW):
    simulator = Simulator(replace(law, bank=4), FEW)
    simulator.fill_bank(generator=seeded(seed))
    return simulator


def test_draw_of_another_bank_is_refused():
    """Its labels would be of other rooms than what is heard."""
    simulator, dry = bank_of(0), speech()
    draw = simulator.draw(3, 2000, generator=seeded(1))
    expected = simulator.render(dry, draw).audio
    assert torch.equal(bank_of(0).render(dry, draw.to("cpu")).audio, expected)  # the same rooms
    simulator.fill_bank(generator=seeded(2))
    # Where an orientation is given none is drawn: the same scenes, but for their looks, and other images.
    for other in (simulator, Simulator(LAW, FEW), bank_of(0, replace(LAW, src_orientation_deg=(0.0, 0.0)))):
        with pytest.raises(ValueError, match="^this draw must be of the rooms of the bank that this simulator holds, "):
            other.render(dry, draw[:3])
    simulator.fill_bank(generator=seeded(0))
    assert torch.equal(simulator.render(dry, draw).audio, expected)


@pytest.mark.parametrize("bank", [None, 4])
@pytest.mark.parametrize("compile", [False, True])
def test_simulator_goes_to_worker_processes(bank, compile):
    """What torch has compiled does not."""
    simulator = Simulator(replace(LAW, bank=bank), FEW, NOISY, SimulatorConfig(chunk=2, compile=compile))
    if bank:
        simulator.fill_bank(generator=seeded(0))
    there = pickle.loads(pickle.dumps(simulator))
    assert there.config == simulator.config and there.bank_name == simulator.bank_name
    if not compile:
        expected = simulator(speech(), generator=seeded(3)).audio
        assert torch.equal(there(speech(), generator=seeded(3)).audio, expected)


def test_captured_call_forgets_the_gradients_of_its_speech():
    """Every call's would hang on to that of the one before, and to its speech."""
    call, weight = Simulator(LAW, FEW).captured(3, 2000, generator=seeded()), torch.ones(1, requires_grad=True)
    audio = call(speech() * weight).audio
    own, = (cell.cell_contents for cell in call.__wrapped__.__closure__
            if isinstance(cell.cell_contents, torch.Tensor))
    assert own.grad_fn is None and not own.requires_grad and not audio.requires_grad


def test_captured_in_inference_mode_serves_outside_of_it():
    with torch.inference_mode():
        call = Simulator(LAW, FEW).captured(3, 2000, generator=seeded())
        first = call(speech()).audio
    assert torch.equal(first, Simulator(LAW, FEW)(speech(), generator=seeded()).audio)
    assert call(speech()).audio.shape == first.shape


@pytest.mark.parametrize("dry, got", [(speech(samples=1000), "3, 1, 1000"), (speech(2), "2, 1, 2000"),
                                      (speech()[:, 0], "3, 2000")])
def test_speech_of_another_shape_than_its_draw_is_refused(dry, got):
    simulator = Simulator(LAW, FEW, NOISY)
    draw = simulator.draw(3, 2000, generator=seeded())
    rule = r"dry speech must be \[batch=3, src, sample=2000\] for this draw, got"
    with pytest.raises(ValueError, match=rf"^{rule} \[{got}\]$"):
        simulator.render(dry, draw)


@pytest.mark.parametrize("changed, message", [
    (dict(num_mics=1), "the draw's sensor noise must be [batch, mic, sample] = [3, 2, 2000], got [3, 1, 2000]"),
    (dict(num_samples=1), "the draw's sensor noise must be [batch, mic, sample] = [3, 2, 2000], got [3, 2, 1]"),
    (dict(batch=1), "scenes and draw must be of batch=3, src=1, got 3 scenes and gains [1, 1]"),
    (dict(num_src=2), "scenes and draw must be of batch=3, src=1, got 3 scenes and gains [3, 2]")])
def test_draw_of_another_shape_is_not_spread_over_the_mixtures(changed, message):
    """One noise at both microphones, or in all examples, would pass for what it is not."""
    rirs = RirBatch(torch.rand(3, 2, 1, 50), None, torch.full((3,), 50), 16000)
    scenes = sample_scenes(LAW, 3, generator=seeded())
    shape = dict(batch=3, num_src=1, num_mics=2, num_samples=2000) | changed
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        mix(speech(), rirs, scenes, draw_mixture(NOISY, **shape, generator=seeded()))


@pytest.mark.parametrize("drawn, rendered, name", [("fra", "hybrid", "method"), ("exact", "fra", "images"),
                                                   ("exact", "hybrid", "images")])
def test_draw_of_another_method_is_refused(drawn, rendered, name):
    """Also where nobody says what it was drawn by."""
    first, second = (Simulator(LAW, **KINDS[kind]) for kind in (drawn, rendered))
    draw = first.draw(3, 2000, generator=seeded())
    draw = replace(draw, rooms=replace(draw.rooms, law=None))
    rule = "must be there for rir.method=fra, rir.hybrid_share=[0-9.]+, rir.ism_share=0, got a draw for others"
    with pytest.raises(ValueError, match=f"^RoomDraw.{name} {rule}$"):
        second.render(speech(), draw)


def test_simulator_of_an_older_version_names_its_bank():
    simulator, dry = bank_of(0), speech()
    draw, state = simulator.draw(3, 2000, generator=seeded(1)), simulator.__getstate__()
    del state["bank_name"]
    old = Simulator.__new__(Simulator)
    old.__setstate__(state)
    assert torch.equal(old.render(dry, draw).audio, simulator.render(dry, draw).audio)


def test_nothing_is_drawn_or_rendered_of_no_examples():
    simulator = Simulator(LAW, FEW)
    with pytest.raises(ValueError, match="^Simulator.draw needs batch >= 1 and num_samples >= 1, got 0 and 2000$"):
        simulator.draw(0, 2000, generator=seeded())
    with pytest.raises(ValueError, match=r"^dry speech must be \[batch=0, src, sample\] for this draw, got \[0, 1, "):
        simulator.render(speech()[:0], simulator.draw(3, 2000, generator=seeded())[:0])


def test_scenes_of_ones_own_do_not_change_with_the_callers_arrays():
    place = torch.tensor([[[4.0, 3.0, 1.6]]], dtype=torch.float64)
    scenes = make_scenes([[6, 5, 3]], [0.4], [[[2, 2, 1.2], [2.1, 2, 1.2]]], place)
    place[..., 0] = -50.0
    assert scenes.src_pos.tolist() == [[[4.0, 3.0, 1.6]]]


@pytest.mark.parametrize("decay", ["nominal", "measured"])
@pytest.mark.parametrize("room, rt60, near", [([300.0, 300.0, 300.0], 0.15, 1.0), ([6.0, 5.0, 3.0], 0.003, 0.05)])
def test_rooms_that_absorb_everything_render(room, rt60, near, decay):
    """Their coefficient rounded to 0, whose logarithm made every tap NaN where decay=measured."""
    middle = [axis / 2 for axis in room]
    scenes = make_scenes([room], [rt60], [[middle]], [[[middle[0] + near, *middle[1:]]]])
    audio = Simulator(LAW, replace(FEW, decay=decay))(speech(1), generator=seeded(), scenes=scenes).audio
    assert audio.isfinite().all() and audio.abs().max() > 0


def test_long_speech_may_be_whole_numbers():
    generator = seeded()
    dry, rir = torch.randint(-2000, 2000, (2, 1, 700), generator=generator, dtype=torch.int16), torch.rand(2, 2, 1, 50)
    assert_close(convolve_sources(dry, rir, block=256), convolve_sources(dry.float(), rir), rtol=0, atol=1e-2)


@pytest.mark.filterwarnings("ignore")  # the compiler's, of itself
def test_shapes_beyond_those_that_torch_compiles_run_plainly(monkeypatch):
    def twice(x):
        return 2 * x

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch.compiler.reset()
    function, said = runtime.compiled(twice), []
    for size in range(2, 12):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(function(torch.ones(size)), torch.full((size,), 2.0))
        said.append([str(warning.message) for warning in caught if "twice" in str(warning.message)])
    assert said == [[]] * 8 + [["twice is not compiled for more shapes than the first eight, others run plainly"], []]
    torch.compiler.reset()


@pytest.mark.parametrize("generator", [0, None])
def test_a_seed_is_no_generator(generator):
    with pytest.raises(ValueError, match=f"^generator must be a torch.Generator, got {generator}$"):
        Simulator(LAW, FEW)(speech(), generator=generator)
