import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch.testing import assert_close

from ssl_gpu import geometry

ANGLE = st.floats(-50, 50)
UNIT = st.tuples(st.floats(-math.pi, math.pi), st.floats(-1.5, 1.5))


def unit_vector(azimuth, elevation):
    """The convention written out: azimuth from +x counter-clockwise, elevation from the horizontal plane."""
    horizontal = torch.cos(elevation)
    return torch.stack((horizontal * torch.cos(azimuth), horizontal * torch.sin(azimuth), torch.sin(elevation)), -1)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


@given(ANGLE)
def test_wrapped_angle_is_the_same_angle_within_half_a_turn(angle):
    wrapped = float(geometry.wrap_angle(tensor(angle)))
    assert -math.pi <= wrapped <= math.pi
    assert abs(math.cos(wrapped) - math.cos(angle)) < 1e-13 and abs(math.sin(wrapped) - math.sin(angle)) < 1e-13


def test_half_a_turn_wraps_to_minus_pi():
    assert_close(geometry.wrap_angle(tensor(math.pi, -math.pi, 0.0)), tensor(-math.pi, -math.pi, 0.0))


@given(UNIT, st.floats(0.01, 100))
def test_direction_and_angles_are_inverse(angles, length):
    vector = unit_vector(*tensor(*angles))
    assert_close(torch.linalg.vector_norm(vector), torch.tensor(1.0, dtype=torch.float64))
    assert_close(geometry.azimuth(length * vector), tensor(angles[0])[0], atol=1e-12, rtol=0)
    assert_close(geometry.elevation(length * vector), tensor(angles[1])[0], atol=1e-12, rtol=0)


def test_azimuth_runs_counter_clockwise_from_x_and_elevation_up_from_the_horizon():
    vectors = tensor((1, 0, 0), (0, 1, 0), (-1, 0, 0), (0, -1, 0), (0, 0, 1), (1, 0, -1))
    quarter = math.pi / 2
    assert_close(geometry.azimuth(vectors), tensor(0, quarter, math.pi, -quarter, 0, 0))
    assert_close(geometry.elevation(vectors), tensor(0, 0, 0, 0, quarter, -quarter / 2))


@given(UNIT, UNIT, st.floats(0.01, 100))
def test_angle_between_has_the_cosine_of_the_dot_product(first, second, length):
    a, b = unit_vector(*tensor(*first)), unit_vector(*tensor(*second))
    angle = geometry.angle_between(length * a, b)
    assert_close(torch.cos(angle), (a * b).sum(), atol=1e-12, rtol=0)
    assert_close(angle, geometry.angle_between(b, a))


def test_angle_between_keeps_its_digits_where_arccos_loses_them():
    offset = tensor(1e-9, 1e-6)
    ahead = torch.stack((torch.ones(2, dtype=torch.float64), offset, torch.zeros(2, dtype=torch.float64)), -1)
    axis = tensor(1, 0, 0)
    assert_close(geometry.angle_between(ahead, axis), offset, rtol=1e-9, atol=0)
    assert_close(math.pi - geometry.angle_between(-ahead, axis), offset, rtol=1e-6, atol=0)


@given(UNIT)
def test_cosine_of_the_cone_is_that_of_azimuth_times_that_of_elevation(angles):
    azimuth, elevation = tensor(*angles)
    cone = geometry.angle_between(unit_vector(azimuth, elevation), tensor(1, 0, 0))
    assert_close(torch.cos(cone), torch.cos(azimuth) * torch.cos(elevation), atol=1e-12, rtol=0)


@pytest.mark.parametrize("num_mics", [1, 2, 5])
def test_linear_array_is_centred_on_x_with_its_spacing(num_mics):
    array = geometry.linear_array(num_mics, 0.03)
    assert array.shape == (num_mics, 3) and array.dtype == torch.float64
    assert_close(array.sum(0), tensor(0, 0, 0), atol=1e-15, rtol=0)
    assert_close(array[1:, 0] - array[:-1, 0], torch.full((num_mics - 1,), 0.03, dtype=torch.float64))
    assert (array[:, 1:] == 0).all()


def test_rotation_about_the_vertical_is_counter_clockwise_and_per_scene():
    points = tensor(((1, 0, 2), (0, 1, 3)), ((1, 0, 2), (0, 1, 3)))
    turned = geometry.rotate_z(points, tensor(math.pi / 2, 0.3))
    cos, sin = math.cos(0.3), math.sin(0.3)
    assert_close(turned, tensor(((0, 1, 2), (-1, 0, 3)), ((cos, sin, 2), (-sin, cos, 3))))


def test_axis_runs_from_the_first_to_the_last_microphone():
    mic_pos = tensor(((1, 1, 1), (5, 5, 5), (2, 3, 4)))
    assert_close(geometry.array_axis(mic_pos), tensor((1, 2, 3)))
    with pytest.raises(ValueError, match="^mic_pos must hold at least 2 microphones to define an array axis, got 1$"):
        geometry.array_axis(mic_pos[:, :1])
