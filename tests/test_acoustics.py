import math

import torch
from torch.testing import assert_close

from ssl_gpu.acoustics import DISTANCE_EPSILON, SPEED_OF_SOUND, distance, reflection_coefficient


def test_constants_are_the_references():
    assert SPEED_OF_SOUND == 340.0 and DISTANCE_EPSILON == 1e-3


def test_distance_has_the_references_epsilon_under_the_root():
    offset = torch.tensor([[0.0, 0, 0], [0.2, 0, 0], [0, -0.2, 0], [1, 2, -2]], dtype=torch.float64)
    expected = torch.tensor([math.sqrt(1e-3), 0.202484567, 0.202484567, math.sqrt(9.001)], dtype=torch.float64)
    assert_close(distance(offset), expected, rtol=1e-8, atol=0)


def test_reflection_coefficient_of_a_known_room():
    """6 x 5 x 3 m at 0.3 s: 0.949 by the reference's law, 0.827 by Eyring's."""
    room, rt60 = torch.tensor([[6.0, 5, 3]], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    assert abs(float(reflection_coefficient(room, rt60)) - 0.9485) < 1e-4


def test_every_room_has_its_own_coefficient():
    """V/S = 1 / (2 (1/4 + 1/4 + 1/2)) = 1/2 m in the first room, twice that in the second, twice as large."""
    room = torch.tensor([[4.0, 4, 2], [8, 8, 4], [4, 4, 2]], dtype=torch.float64)
    rt60 = torch.tensor([0.2, 0.4, 0.8], dtype=torch.float64)
    alpha = [1 - math.exp(-0.4), 1 - math.exp(-0.4), 1 - math.exp(-0.1)]
    expected = torch.tensor([math.sqrt(1 - a * a) for a in alpha], dtype=torch.float64)
    assert_close(reflection_coefficient(room, rt60), expected)
