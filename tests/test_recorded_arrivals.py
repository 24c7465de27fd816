"""The reference's recorded arrivals, slot by slot, before any filtering can hide a difference."""
from pathlib import Path

import numpy as np
import pytest
from test_golden import load

from ssl_gpu.rir import find_arrivals
from ssl_gpu.synthesis import slots_in_rir

CASES = sorted((Path(__file__).parent / "golden").glob("case_[01]*.npz"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_slots_are_equal_and_amplitudes_within_float32(path):
    case, cfg, scenes, images = load(path)
    arrivals = find_arrivals(cfg, scenes, images)
    assert slots_in_rir(cfg.sample_rate, scenes.rt60).tolist() == [int(case["rir_length_64x"])]
    np.testing.assert_array_equal(arrivals.slot[0], case["delta_idx"])
    np.testing.assert_array_equal(arrivals.early[0], case["early_weight"])
    scale = np.abs(case["delta_decay"]).max(-1, keepdims=True)
    assert np.abs((arrivals.amplitude[0].numpy() - case["delta_decay"]) / scale).max() <= 2e-7


def test_all_nine_cases_are_here():
    assert len(CASES) == 9
