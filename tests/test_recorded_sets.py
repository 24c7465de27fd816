"""The evaluation sets are those that results were published of: to the digest, and waveforms to 1e-5 of their peak."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
from torch.testing import assert_close

from ssl_gpu import protocol, rng
from ssl_gpu.clips import Digest
from ssl_gpu.measured import read_measured
from ssl_gpu.protocol import NUM_SAMPLES, SetOptions, clips_of
from ssl_gpu.speech import make_bank

CPU = torch.device("cpu")
# Digest of the first three clips, and samples 1000, 20000, 40000 of the third at the second microphone, of version 1,
# on an AMD EPYC. Those of e0, e0b, e1, e1p and e1n5 are the same at commit ce98950, before versions had a number.
RECORDED = {
    "e0": ("b5164f2a7c94b1f5", [-0.00242613, -0.00506106, 0.00049262]),
    "e1": ("d8712368da8d6884", [0.00669616, -0.01694367, -0.00486259]),
    "e1p": ("b0a9b6d8c882c1db", [-0.01468207, -0.00235771, 0.00652045]),
    "e1n0": ("6f83cbfbf719e418", [0.02353015, -0.02566647, -0.00547246]),
    "e1n5": ("98534a94a3963c60", [0.01616261, -0.02184886, -0.00520555]),
    "e1n10": ("e893da64d9ccc3a0", [0.01201954, -0.01970206, -0.00505545]),
    "e1n20": ("a80cb737885cfcdb", [0.00837956, -0.01781595, -0.00492358]),
    "e1w0": ("a411450c08e1984b", [0.02470049, -0.0187151, 0.00368834]),
    "e1w5": ("008734e4dc6f0b7d", [0.01682074, -0.01793982, -5.405e-05]),
    "e1w10": ("47d73b1c86eef7d2", [0.01238963, -0.01750385, -0.00215855]),
    "e1w20": ("bf9c3d06f10f18df", [0.00849659, -0.01712082, -0.0040075]),
}
RECORDED_E3 = "4afd1e6c4396f0ca"  # of 20 clips in the RIRs of `measured` below


@pytest.fixture(scope="module")
def speech():
    """Whole random numbers, which are the same everywhere: 5 speakers, 4 utterances each."""
    length = torch.tensor([NUM_SAMPLES + 1000 * (k % 4) - 1500 for k in range(20)])
    samples = torch.randint(-20000, 20000, (int(length.sum()),), generator=torch.Generator().manual_seed(0))
    return make_bank(samples.to(torch.int16), length, torch.arange(20) // 4,
                     tuple(f"{k // 4}/{k}.flac" for k in range(20)), 16000)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Three RIRs of whole random numbers that decay by 60 dB in 0.3 s, behind a direct sound that stands out."""
    folder = tmp_path_factory.mktemp("measured")
    generator, rirs = torch.Generator().manual_seed(1), []
    for index in range(3):
        tail = torch.randint(-1000, 1000, (6000, 2), generator=generator).double() / 1000
        decay = 10 ** (-3 * torch.arange(6000, dtype=torch.float64) / 16000 / 0.3)
        rir = 0.25 * tail * decay[:, None]
        rir[0] = 1.0
        rir = torch.cat((torch.zeros(100, 2), rir * 0.5)).float().numpy()
        soundfile.write(folder / f"{index}.wav", rir, 16000, subtype="FLOAT")
        rirs.append({"file": f"{index}.wav", "cone_deg": 40.0 + 50 * index, "configuration": "a",
                     "distance_m": 1.0 + index, "rt60_s": 0.3})
    (folder / "index.json").write_text(json.dumps({"mic_spacing_m": 0.09, "speed_of_sound": 343.0, "rirs": rirs}))
    return read_measured(folder)


@pytest.mark.parametrize("name", RECORDED)
def test_sets_are_the_recorded_ones(name, speech):
    """Whoever changes one has to raise protocol.VERSION, and to say so where results are published."""
    assert protocol.VERSION == 1
    [clips] = clips_of(name, SetOptions(speech, CPU, 3))
    digest = Digest()
    digest.add(clips)
    expected, samples = RECORDED[name]
    assert str(digest) == expected
    peak = float(clips.audio[2].abs().max())
    assert_close(clips.audio[2, 1, [1000, 20000, 40000]], torch.tensor(samples), rtol=0, atol=1e-5 * peak)


@pytest.mark.parametrize("letter, key", [("n", "diffuse_snr_db"), ("w", "sensor_snr_db")])
def test_noise_is_of_its_kind_and_level_and_the_same_at_every_level(letter, key, speech):
    [clean] = clips_of("e1", SetOptions(speech, CPU, 3))
    heard = {}
    for snr in protocol.SNRS_DB:
        [noisy] = clips_of(f"e1{letter}{snr:.0f}", SetOptions(speech, CPU, 3))
        heard[snr] = noisy.audio - clean.audio
        level = 10 * torch.log10(clean.audio.square().mean((1, 2)) / heard[snr].square().mean((1, 2)))
        assert_close(level, torch.full((3,), snr), rtol=0, atol=0.01)
        assert (noisy.conditions["snr_db"] == snr).all()
        assert all(entry[key] == snr and entry["noise_seed"] == [protocol.SEEDS["e1"], 0] for entry in noisy.entries)
    assert_close(heard[0.0] * 10 ** -0.5, heard[10.0], rtol=0, atol=1e-6)
    low = torch.fft.rfft(heard[0.0])[..., 300:1500]                     # 100 to 500 Hz, where diffuse noise is coherent
    coherence = ((low[:, 0] * low[:, 1].conj()).mean(-1).abs()
                 / low.abs().square().mean(-1).prod(-1).sqrt())
    assert (coherence > 0.9).all() if letter == "n" else (coherence < 0.15).all()


KEYS = {"clip", "mic_pos", "array_pos", "utterances", "offsets", "gains", "diffuse_snr_db", "noise_seed", "measured"}
ROOM = {"room_dim", "rt60", "src_pos", "azimuth_deg", "cone_angle_deg", "num_images", "direction"}


@pytest.mark.parametrize("name, keys", [
    ("e0", KEYS | ROOM | {"image_seed"}), ("e1", KEYS | ROOM | {"image_seed"}),
    ("e1w5", KEYS | ROOM | {"image_seed", "sensor_snr_db"}), ("e2", KEYS | ROOM | {"simulator"}),
    ("e3", KEYS - {"mic_pos", "array_pos"} | {"rirs", "cone_deg", "distance_m", "rt60_s", "configuration"}
     | {"mic_spacing_m", "speed_of_sound"})])
def test_a_line_of_a_manifest_says_what_its_clip_is_made_of(name, keys, speech, measured):
    if name == "e2":
        pytest.importorskip("pyroomacoustics")
    parts = list(clips_of(name, SetOptions(speech, CPU, 52 if name == "e3" else 3, measured)))
    entries = [entry for part in parts for entry in part.entries]
    assert [entry["clip"] for entry in entries] == list(range(len(entries)))
    assert all(keys <= set(entry) for entry in entries), keys - set(entries[0])
    assert json.loads(json.dumps(entries)) == entries
    assert len(entries[0]["gains"]) == len(entries[0]["offsets"]) == len(entries[0]["measured"]["drr_db"]) == 2


def test_measured_rooms_are_measured(speech, measured):
    """T20 and direct-to-reverberant ratio of the RIRs themselves; gains make the utterances equally loud; and none of
    it is in the digest, which is the recorded one, of index and draws."""
    [clips] = clips_of("e3", SetOptions(speech, CPU, 20, measured))
    assert_close(clips.conditions["t20_s"], torch.full((20, 2), 0.3, dtype=torch.float64), rtol=0, atol=0.02)
    ratio = {}
    for index in range(3):
        energy = measured[0][index, 0].double().square()
        ratio[f"{index}.wav"] = float(10 * torch.log10(energy[:141].sum() / energy[141:].sum()))  # 2.5 ms on both sides
    for row, (entry, drr) in enumerate(zip(clips.entries, clips.conditions["drr_db"].tolist())):
        assert drr == pytest.approx([ratio[file] for file in entry["rirs"]], abs=1e-3)
        assert entry["measured"]["drr_db"] == drr
        power = clips.draws[0][row].square().mean(-1)
        np.testing.assert_allclose(torch.tensor(entry["gains"]).square() * power, [1, 1], rtol=1e-5)
    digest, other = Digest(), Digest()
    digest.add(clips)
    assert str(digest) == RECORDED_E3
    other.add(replace(clips, entries=[entry | {"rt60_s": None, "gains": [1, 2], "measured": None}
                                      for entry in clips.entries]))
    assert str(other) == RECORDED_E3


def test_choosing_has_sets_of_the_same_kinds_in_other_scenes(speech):
    for name in ("e1n20", "e1w0"):
        [test], [choice] = (clips_of(name, SetOptions(speech, CPU, 3, split=split))
                            for split in (rng.Split.TEST, rng.Split.VALIDATION))
        assert not torch.equal(test.cone, choice.cone) and math.isfinite(float(choice.conditions["snr_db"][0]))
