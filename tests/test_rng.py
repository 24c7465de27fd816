"""Generators: each belongs to its five numbers alone, and the numbers mean the same for ever."""
import itertools

import pytest
import torch

from ssl_gpu.rng import Split, Stream, generator


def test_ten_thousand_generators_differ():
    keys = list(itertools.product((0, 1), Split, Stream, range(60), range(4)))
    assert len(keys) >= 10_000
    generators = [generator(*key) for key in keys]
    assert len({one.initial_seed() for one in generators}) == len(keys)
    assert len({int(torch.randint(2**62, (), generator=one)) for one in generators}) == len(keys)


# A changed value here means that no run can be reproduced or resumed any more: do not update it, find the cause.
@pytest.mark.parametrize("key, seed, draw", [
    ((0, Split.TRAIN, Stream.SCENE, 0, 0), 3783394973971166492, 0.6509097886013645),
    ((0, Split.TRAIN, Stream.SCENE, 1, 0), 3965842509116638433, 0.8845771402983584),
    ((0, Split.TRAIN, Stream.SCENE, 0, 1), 15913867636890793270, 0.805780840692148),
    ((1, Split.TRAIN, Stream.SCENE, 0, 0), 18327241906910440994, 0.16429843798805555),
    ((0, Split.TEST, Stream.MIXTURE, 0, 0), 395761842987679385, 0.19506420588828122),
    ((2**64 - 1, Split.VALIDATION, Stream.ANGLE_MAP, 2**32 - 1, 7), 4042455848114406085, 0.4449756509179239),
])
def test_seeds_are_what_they_always_were(key, seed, draw):
    assert generator(*key).initial_seed() == seed
    torch.testing.assert_close(torch.rand((), generator=generator(*key), dtype=torch.float64).item(), draw,
                               rtol=0, atol=1e-15)


def test_numbers_of_splits_and_streams_never_change():
    assert {split.name: split.value for split in Split} == {"TRAIN": 0, "VALIDATION": 1, "TEST": 2}
    assert {stream.name: stream.value for stream in Stream} == {
        "SCENE": 0, "IMAGES": 1, "SPEECH": 2, "MIXTURE": 3, "VOICES": 4, "MODEL": 5, "ANGLE_MAP": 6,
        "DROPOUT": 7}


def test_same_numbers_give_the_same_draws_whatever_was_drawn_before():
    first = torch.randn(100, generator=generator(3, Split.TRAIN, Stream.SPEECH, 5, 1))
    torch.rand(7)
    generator(3, Split.TRAIN, Stream.SPEECH, 4, 1)
    assert torch.equal(first, torch.randn(100, generator=generator(3, Split.TRAIN, Stream.SPEECH, 5, 1)))


def test_neighbouring_generators_are_uncorrelated():
    count = 2000
    keys = list(itertools.product((0, 1), (Split.TRAIN, Split.TEST), (Stream.SCENE, Stream.IMAGES), range(8), range(4)))
    draws = torch.stack([torch.randn(count, generator=generator(*key)) for key in keys])
    correlation = torch.corrcoef(draws) - torch.eye(len(keys))
    # The largest of 32,640 normal deviates of standard deviation count^-1/2 is about 4.2 of them.
    assert 3 < correlation.abs().max() * count**0.5 < 5.5
    assert abs(correlation.sum() / (len(keys) * (len(keys) - 1))) * count**0.5 < 0.1


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    torch.rand(3, generator=generator(0, Split.TRAIN, Stream.SCENE, 0))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("changed, message", [
    ({"seed": -1}, "seed must be an int with 0 <= seed <= 18446744073709551615, got -1"),
    ({"seed": 2**64}, "seed must be an int with 0 <= seed <= 18446744073709551615, got 18446744073709551616"),
    ({"seed": 1.0}, "seed must be an int with 0 <= seed <= 18446744073709551615, got 1.0"),
    ({"seed": None}, "seed must be an int with 0 <= seed <= 18446744073709551615, got None"),
    ({"step": -1}, "step must be an int with 0 <= step <= 4294967295, got -1"),
    ({"step": 2**32}, "step must be an int with 0 <= step <= 4294967295, got 4294967296"),
    ({"step": True}, "step must be an int with 0 <= step <= 4294967295, got True"),
    ({"rank": "0"}, "rank must be an int with 0 <= rank <= 4294967295, got '0'"),
    ({"split": 0}, "split must be a Split (TRAIN, VALIDATION, TEST), got 0"),
    ({"split": Stream.SCENE}, "split must be a Split (TRAIN, VALIDATION, TEST), got <Stream.SCENE: 0>"),
    ({"stream": 9}, "stream must be a Stream (SCENE, IMAGES, SPEECH, MIXTURE, VOICES, MODEL, ANGLE_MAP, DROPOUT), "
     "got 9"),
])
def test_impossible_number_is_refused_in_one_line(changed, message):
    numbers = {"seed": 0, "split": Split.TRAIN, "stream": Stream.SCENE, "step": 0, "rank": 0}
    with pytest.raises(ValueError) as refusal:
        generator(**numbers | changed)
    assert str(refusal.value) == message
