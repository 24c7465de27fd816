import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.testing import assert_close

from ssl_gpu.directivity import Pattern, look_vector, pattern_gain

COSINES = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])
GAINS = {  # at 0, 60, 90, 120 and 180 degrees
    Pattern.OMNI: [1, 1, 1, 1, 1],
    Pattern.SUB_CARDIOID: [1, 0.875, 0.75, 0.625, 0.5],
    Pattern.CARDIOID: [1, 0.75, 0.5, 0.25, 0],
    Pattern.HYPER_CARDIOID: [1, 0.625, 0.25, -0.125, -0.5],
    Pattern.BIDIRECTIONAL: [1, 0.5, 0, -0.5, -1],
    Pattern.HALF_OMNI: [1, 1, 0, 0, 0],
}


@pytest.mark.parametrize("pattern", Pattern)
def test_pattern_has_its_gain_in_front_aside_and_behind(pattern):
    """The rear lobes keep their sign."""
    assert_close(pattern_gain(pattern, COSINES), torch.tensor(GAINS[pattern], dtype=torch.float32))


def test_patterns_are_the_references():
    assert sorted(p.value for p in Pattern) == ["bidirectional", "cardioid", "half_omni", "hyper_cardioid", "omni",
                                                "sub_cardioid"]


@given(st.floats(-math.pi, math.pi))
def test_look_is_exact_in_the_horizontal_plane(azimuth):
    look = look_vector(torch.tensor([azimuth, math.pi / 2], dtype=torch.float64))
    assert_close(look, torch.tensor([math.cos(azimuth), math.sin(azimuth), 0], dtype=torch.float64), atol=1e-12, rtol=0)


def test_look_has_the_references_bend_elsewhere():
    """Up looks along (1, 0, 1) whatever the azimuth; azimuth 2 at polar angle 1 looks at (cos, sin)(2 sin 1)."""
    bent = 2 * math.sin(1.0)
    norm = math.sqrt(1 + math.cos(1.0) ** 2)
    expected = torch.tensor([[0.5 ** 0.5, 0, 0.5 ** 0.5], [0.5 ** 0.5, 0, 0.5 ** 0.5],
                             [math.cos(bent) / norm, math.sin(bent) / norm, math.cos(1.0) / norm]], dtype=torch.float64)
    assert_close(look_vector(torch.tensor([[0, 0], [1.5, 0], [2.0, 1.0]], dtype=torch.float64)), expected)


@given(st.floats(-10, 10), st.floats(-10, 10))
def test_look_is_a_unit_vector(azimuth, polar):
    look = look_vector(torch.tensor([[azimuth, polar]], dtype=torch.float64))
    assert_close(torch.linalg.vector_norm(look, dim=-1), torch.ones(1, dtype=torch.float64))
