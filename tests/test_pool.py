"""The original's pool: its rooms' images are the same wherever they are heard, and nothing else may be heard in it."""
import hashlib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_scene import CHANGES as SCENE_CHANGES

from ssl_gpu import rng
from ssl_gpu.config import RunConfig, load_config
from ssl_gpu.pool import check_pool, draw_original_images, eval_rooms_in
from ssl_gpu.rir import RirConfig, draw_images
from ssl_gpu.scene import SceneConfig, original_scenes

CONFIGS = Path(__file__).parents[1] / "configs"
TENSORS = ("direction", "ratio", "perturbation", "active")


@pytest.fixture(scope="module")
def scenes():
    return original_scenes()


def test_images_of_a_room_depend_on_its_number_alone(scenes):
    """Not on the rooms beside it, nor on their order, nor on how many rooms there are."""
    many, few, turned = (draw_original_images(pool, rooms) for pool, rooms in (
        (scenes, range(12)), (scenes[:12], range(5, 9)), (scenes, [8, 5, 8])))
    for name in TENSORS:
        column = getattr(many, name)
        assert torch.equal(getattr(few, name), column[5:9]) and torch.equal(getattr(turned, name), column[[8, 5, 8]])
    assert many.src_cosine is None and many.band_ratio is None
    assert len(many.perturbation[:, 0, 0].unique()) == 12                # no room has another's
    assert torch.equal(many.active.sum(-1), scenes.num_images[:12])


def test_images_are_by_the_law_of_the_reference(scenes):
    """Of a stream that belongs to the room, in the split of the evaluation sets."""
    generator = rng.generator(20231, rng.Split.TEST, rng.Stream.IMAGES, 7)
    expected = draw_images(RirConfig(early=False), scenes[7:8], generator=generator)
    images = draw_original_images(scenes, [7])
    for name in TENSORS:
        assert torch.equal(getattr(images, name), getattr(expected, name))


def test_images_will_always_be_these(scenes):
    """A change would be another e0, and old results on it could not be repeated."""
    images = draw_original_images(scenes, [0, 199, 2999])
    assert images.perturbation.shape == (3, 2, 4096)
    digest = hashlib.blake2b(images.perturbation.numpy().tobytes(), digest_size=8).hexdigest()
    assert digest == "5f39395db8522a3d"


RIR_CHANGES = dict(
    method="ism", hybrid_share=0.5, ism_share=0.5, sample_rate=8000, num_images=(64, 128), perturbation=(-1.0, 1.0),
    perturbation_exponent=0.5, src_pattern="cardioid", mic_pattern="cardioid", image_directions="sphere",
    src_directions="sphere", look_vector="exact", image_range="full", images_per_s=(100, 200), decay="measured",
    band_rt60_ratio=((0.5, 1.0),) * 7, air=(20.0, 50.0))


LAW = "scene.pool=original has rooms and RIRs by the original's law"


@pytest.mark.parametrize("name", [f.name for f in fields(RirConfig) if not f.name.startswith("early")])
def test_rirs_by_another_law_are_refused(name):
    changed = RirConfig(**{name: RIR_CHANGES[name]})
    with pytest.raises(ValueError) as error:
        check_pool(SceneConfig(pool="original", bank=3), changed)
    assert str(error.value).startswith(f"{LAW}: rir.{name} must be ") and str(error.value).count(" must be ") == 1
    check_pool(SceneConfig(bank=3), changed)


@pytest.mark.parametrize("name", SCENE_CHANGES)
def test_scenes_by_another_law_are_refused(name):
    value, law = SCENE_CHANGES[name], getattr(SceneConfig(), name)
    with pytest.raises(ValueError) as error:
        check_pool(SceneConfig(**{name: value}, bank=3, pool="original"), RirConfig())
    assert str(error.value) == f"{LAW}: scene.{name} must be {law}, got {value}"


@pytest.mark.parametrize("bank, shown", [(None, "null"), (3001, "3001")])
def test_its_rooms_are_as_many_as_there_are(bank, shown):
    with pytest.raises(ValueError, match=f"^{LAW}: scene.bank must be in 1..3000 rooms, got {shown}$"):
        check_pool(SceneConfig(pool="original", bank=bank), RirConfig())
    check_pool(SceneConfig(pool="original", bank=3000), RirConfig())


def test_all_that_is_wrong_is_named_at_once():
    with pytest.raises(ValueError) as error:
        load_config(RunConfig, CONFIGS / "librispeech.yaml", ["scene.pool=original", "scene.num_src=3"])
    assert str(error.value) == (
        f"{LAW}: scene.bank must be in 1..3000 rooms, got null; scene.rt60_s must be (0.1, 0.7), got "
        "(0.1, 0.8); scene.num_src must be 2, got 3; scene.spacing_jitter_m must be 0.0, got 0.003; "
        "rir.hybrid_share must be 0.0, got 0.5")


def test_early_parts_may_be_asked_for():
    for early in (True, False):
        check_pool(SceneConfig(pool="original", bank=3), RirConfig(early=early, early_window_ms=(-3, 20)))


def test_rooms_of_the_evaluation_are_counted():
    banks = {1: 1, 199: 199, 200: 200, 201: 200, 3000: 200}
    assert {bank: eval_rooms_in(SceneConfig(pool="original", bank=bank)) for bank in banks} == banks
    assert eval_rooms_in(SceneConfig(pool="original")) == 200  # which check_pool refuses
    assert eval_rooms_in(SceneConfig()) == eval_rooms_in(SceneConfig(bank=3000)) == 0
