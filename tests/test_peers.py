"""Against other simulators, where they are installed: the image-source method of pyroomacoustics (extra "eval").

How the conventions were matched, pyroomacoustics 0.10 to ours:
  speed of sound   its constant "c" is set to our 340 m/s (it has 343)
  absorption       its inverse_sabine has our Sabine formula, and by "c" our constant; both return the energy's share
  amplitude        coefficient^order / distance in both; our RIRs carry 1/64 from the 64x grid of FRA-RIR
  delay            its fractional delay filters put every arrival 40 samples late, which are cut off here
  high-pass        its own is switched off and FRA-RIR's 80 Hz, Q 0.707 is applied here, at the sample rate
  band             our decimators roll off near half the sample rate (-2.4 dB at 0.45), its delays do not: RIRs are
                   compared below 6.5 kHz at 16 kHz; over the full band decays differ by up to 0.7 dB
  length           it goes on until its last image; cut at ours, ceil(rt60 sample_rate)
"""
import math

import numpy as np
import pytest
import torch
from torchaudio.functional import highpass_biquad

from ssl_gpu.directivity import Pattern
from ssl_gpu.ism import IsmConfig, Shoebox, image_table, render_ism, trace_images
from ssl_gpu.rir import Method, RirConfig
from ssl_gpu.rooms import draw_rooms, render_rooms
from ssl_gpu.scene import SceneConfig, make_scenes, sample_scenes

pra = pytest.importorskip("pyroomacoustics", minversion="0.10")
RATE, LATE = 16000, 40
FULL = RirConfig(early=False)
LAW = SceneConfig(room_max_m=(7.0, 5.0, 3.5), rt60_s=(0.2, 0.4), rotate=True)


@pytest.fixture(scope="module", autouse=True)
def conventions():
    """The speed of sound and no high-pass, and both as they were afterwards."""
    before = {key: pra.constants.get(key) for key in ("c", "rir_hpf_enable")}
    pra.constants.set("c", 340.0)
    pra.constants.set("rir_hpf_enable", False)
    assert pra.constants.get("frac_delay_length") // 2 == LATE
    yield
    for key, value in before.items():
        pra.constants.set(key, value)


@pytest.fixture(scope="module")
def scenes():
    return sample_scenes(LAW, 5, generator=torch.Generator().manual_seed(5))


def their_room(scenes, index, order=None, directivity=(None, None)):
    """The same room, not yet simulated; `order` of its images None: as inverse_sabine says, and some more."""
    dim = scenes.room_dim[index].numpy()
    absorption, enough = pra.inverse_sabine(float(scenes.rt60[index]), dim)
    room = pra.ShoeBox(dim, fs=RATE, materials=pra.Material(absorption), air_absorption=False,
                       max_order=enough + 3 if order is None else order)
    for src in scenes.src_pos[index].numpy():
        room.add_source(src, directivity=directivity[0])
    room.add_microphone_array(scenes.mic_pos[index].numpy().T, directivity=directivity[1])
    return room


def their_rirs(room, length):
    """[mic, src, tap], in our conventions but for the decimators."""
    room.compute_rir()
    rirs = np.zeros((len(room.rir), len(room.rir[0]), length))
    for m, row in enumerate(room.rir):
        for s, rir in enumerate(row):
            part = rir[LATE:LATE + length]
            rirs[m, s, :len(part)] = part
    return highpass_biquad(torch.from_numpy(rirs / 64), RATE, 80.0, 0.707).numpy()


def below(rirs, cutoff=6500.0, taps=129):
    """A linear-phase low-pass, the same for both."""
    n = np.arange(taps) - taps // 2
    low = 2 * cutoff / RATE * np.sinc(2 * cutoff / RATE * n) * np.hamming(taps)
    return np.apply_along_axis(np.convolve, -1, rirs, low)


def decay_db(rirs):
    """Schroeder's integral in dB, not normalised: levels are compared as well."""
    return 10 * np.log10(np.cumsum(rirs[..., ::-1] ** 2, -1)[..., ::-1] + 1e-30)


def largest_decay_error(ours, theirs, down_to=-50.0):
    """dB, of all RIRs and all times until the decay has fallen by down_to dB."""
    ours, theirs = decay_db(ours), decay_db(theirs)
    return np.abs(ours - theirs)[ours > ours[..., :1] + down_to].max()


def test_direct_and_early_arrivals_are_theirs(scenes):
    """All 63 images up to order 3 of every pair: 0.0078 sample, half a slot, by rounding; amplitudes by float32."""
    box = Shoebox.of(IsmConfig(), scenes)
    slot, amplitude = trace_images(FULL, box, torch.tensor(image_table(3)).T[:, None, None, None])
    for index in range(len(scenes)):
        room = their_room(scenes, index, order=3)
        room.image_source_model()
        for m, mic in enumerate(scenes.mic_pos[index].numpy()):
            for s, source in enumerate(room.sources):
                dist = np.linalg.norm(source.images - mic[:, None], axis=0)
                theirs = np.sort(dist * RATE / 340)
                ours = np.sort(slot[index, m, s].numpy() / 64)
                assert len(theirs) == len(ours) == 63
                assert np.abs(theirs - ours).max() < 0.01
                # two images may lie within one slot and then come in either order: compare amplitudes by size
                np.testing.assert_allclose(np.sort(amplitude[index, m, s].numpy()),
                                           np.sort(source.damping[0] / dist), rtol=2e-6)


def peak_near(rir, around):
    """Position of the highest point of the interpolated RIR within 2 samples of `around`."""
    at, near = around + np.arange(-256, 257) / 128, int(around) + np.arange(-36, 37)
    offset = at[:, None] - near
    window = np.where(np.abs(offset) < 32, np.cos(np.pi * np.clip(offset, -32, 32) / 64) ** 2, 0)
    return at[((np.sinc(offset) * window) @ rir[near]).argmax()]


def test_peaks_of_the_rirs_are_theirs(scenes):
    """As heard in the waveforms: the direct path, and the first reflections where they stand alone, to 0.05 sample."""
    few = IsmConfig(max_order=1)
    ours, compared = render_ism(few, FULL, scenes), 0
    slot, _ = trace_images(FULL, Shoebox.of(few, scenes), torch.tensor(image_table(1)).T[:, None, None, None])
    for index in range(len(scenes)):
        length = int(ours.length[index])
        theirs = below(their_rirs(their_room(scenes, index, order=1), length))
        mine = below(ours.full[index, ..., :length].double().numpy())
        for m, s in np.ndindex(2, 2):
            at = np.sort(slot[index, m, s].numpy() / 64)
            for place in at[(np.diff(at, prepend=-99) > 20) & (np.diff(at, append=9e9) > 20)]:
                compared += 1
                assert abs(peak_near(mine[m, s], place + 64) - peak_near(theirs[m, s], place + 64)) < 0.05
    assert compared > 40


def test_energy_decays_as_theirs(scenes):
    """Within 0.1 dB, level and all, until -50 dB; RIRs within 3 %, what is left of the different band edges."""
    ours = render_ism(IsmConfig(), FULL, scenes)
    for index in range(len(scenes)):
        length = int(ours.length[index])
        theirs = below(their_rirs(their_room(scenes, index), length))
        mine = below(ours.full[index, ..., :length].double().numpy())
        assert largest_decay_error(mine, theirs) < 0.1
        assert np.linalg.norm(mine - theirs) < 0.03 * np.linalg.norm(theirs)


def test_first_part_of_hybrid_rooms_is_theirs(scenes):
    """Until the tail begins, a mean free path after the direct path of the farther microphone."""
    hybrid = RirConfig(method=Method.HYBRID, early=False)
    drawn = draw_rooms(IsmConfig(), hybrid, scenes, generator=torch.Generator().manual_seed(0))
    ours = render_rooms(IsmConfig(), hybrid, scenes, drawn)
    for index in range(len(scenes)):
        free_path = 2 / float((1 / scenes.room_dim[index]).sum())
        for s in range(2):
            direct = float((scenes.mic_pos[index] - scenes.src_pos[index, s]).norm(dim=-1).max())
            clean = int((direct + free_path - 0.1) / 340 * RATE) - 10
            theirs = their_rirs(their_room(scenes, index, order=3), int(ours.length[index]))[:, s, :clean]
            mine = ours.full[index, :, s, :clean].double().numpy()
            assert np.linalg.norm(below(mine) - below(theirs)) < 0.03 * np.linalg.norm(below(theirs))


def test_source_and_microphone_patterns_are_mirrored_as_theirs():
    """Looking horizontally, where the reference's look vector is exact; down to the signs of rear lobes."""
    one = make_scenes([[5.0, 4.0, 3.0]], [0.25], [[[3.1, 2.2, 1.4], [3.2, 2.2, 1.5]]], [[[1.2, 1.1, 1.7]]],
                      [[[2.0, math.pi / 2]] * 2], [[[0.6, math.pi / 2]]])
    cfg = RirConfig(early=False, src_pattern=Pattern.CARDIOID, mic_pattern=Pattern.HYPER_CARDIOID)
    ours = render_ism(IsmConfig(), cfg, one).full[0].double().numpy()

    def looking(kind, azimuth):
        return kind(orientation=pra.directivities.DirectionVector(azimuth=azimuth, colatitude=math.pi / 2,
                                                                  degrees=False))

    room = their_room(one, 0, directivity=(looking(pra.directivities.Cardioid, 0.6),
                                           looking(pra.directivities.HyperCardioid, 2.0)))
    theirs = their_rirs(room, ours.shape[-1])
    assert largest_decay_error(below(ours), below(theirs)) < 0.2
    assert np.linalg.norm(below(ours) - below(theirs)) < 0.05 * np.linalg.norm(below(theirs))
