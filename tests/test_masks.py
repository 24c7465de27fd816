"""Errors by true masks are of the sets' own clips, and small."""
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for those who call pytest without python -m

from benchmarks import accuracy_tables, masks  # noqa: E402
from ssl_gpu.baselines import srp_phat  # noqa: E402
from ssl_gpu.config import RunConfig, apply_overrides, from_mapping  # noqa: E402
from ssl_gpu.evaluate import NO_RUN, eval_speech  # noqa: E402
from ssl_gpu.mixture import mix  # noqa: E402
from ssl_gpu.protocol import LAW, SAMPLE_RATE, SetOptions, clips_of  # noqa: E402
from ssl_gpu.rir import render_rir  # noqa: E402

FEW_VOICES = ["speech.voices_speakers=4", "speech.voices_utterances=2"]


@pytest.fixture(scope="module")
def options():
    """Six clips with synthetic voices."""
    return SetOptions(eval_speech(from_mapping(RunConfig, apply_overrides(NO_RUN, FEW_VOICES))), torch.device("cpu"), 6)


@pytest.mark.parametrize("name", ["e1", "e1p", "e1n5"])
def test_clips_are_those_of_the_set(name, options):
    clips, = clips_of(name, options)
    drawn, = masks.draws_of(name, options)
    mixture = mix(drawn.dry, render_rir(masks.DIRECT, drawn.rooms, drawn.images), drawn.rooms, drawn.mixture)
    torch.testing.assert_close(mixture.audio, clips.audio, rtol=0, atol=1e-5 * float(clips.audio.abs().max()))
    assert torch.equal(drawn.rooms.cone_angle, clips.cone)


def test_true_masks_hear_more_than_none(options):
    drawn, = masks.draws_of("e1n5", options)
    clips, = clips_of("e1n5", options)
    true = drawn.rooms.cone_angle.rad2deg()
    error = {name: float((angle.rad2deg() - true).abs().mean()) for name, angle in
             masks.angles(drawn, torch.device("cpu")).items()}
    blind = srp_phat(clips.audio, clips.mic_pos, SAMPLE_RATE, LAW.num_src).rad2deg()
    blind = float((blind - true.sort(-1).values).abs().mean())
    assert error["its fourth power"] < error["its square"] < error["ideal ratio mask"] < 0.7 * blind
    assert max(error["its fourth power"], error["ideal binary mask"], error["likelihood"]) < 8


def test_file_and_table(tmp_path, capsys):
    path = tmp_path / "masks.json"
    assert masks.main([*FEW_VOICES, "--clips", "3", "--sets", "e1", "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    assert content["command"] == shlex.join(["python", "-m", "benchmarks.masks", *FEW_VOICES, "--clips", "3", "--sets",
                                             "e1"])
    assert capsys.readouterr().out.count("\n") == len(masks.WEIGHTINGS) == len(content["sets"]["e1"])
    lines = accuracy_tables.masks(path, {"e1": content["sets"]["e1"]["likelihood"]}).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["the packaged weights", *masks.WEIGHTINGS]
    assert masks.main(["--clips", "0"]) == 2
    assert capsys.readouterr().err.endswith("error: --clips must be >= 1, got 0\n")
