"""The original project's scenes, drawn again, against what it kept and what was recovered from it.

golden/original_scenes.json: a digest of all 3,000 scenes, six of them in plain numbers, and the positions in the
original's published list of its 200 evaluation scenes, as [mic_pos, src_pos].
"""
import hashlib
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ssl_gpu import original
from ssl_gpu.rir import RirConfig, draw_images, render_rir
from ssl_gpu.scene import SceneBatch, SceneConfig, make_scenes, original_scenes

GOLDEN = json.loads((Path(__file__).parent / "golden/original_scenes.json").read_text())


@pytest.fixture(scope="module")
def scenes():
    return original_scenes()


def digest(columns):
    found = hashlib.blake2b(digest_size=16)
    for column, kind in zip(columns, ("<f8", "<f8", "<f8", "<f8", "<i8")):
        assert column.dtype == np.dtype(kind[1:])
        found.update(np.ascontiguousarray(column, kind).tobytes())
    return found.hexdigest()


def test_all_scenes_equal_the_original_to_the_last_bit():
    """Rooms, times, array centres, sources and image counts, in that order."""
    assert digest(original.replay()) == GOLDEN["digest"]


def test_digest_notices_one_bit():
    columns = original.replay()
    columns[3][2999, 1, 2] = np.nextafter(columns[3][2999, 1, 2], 9)
    assert digest(columns) != GOLDEN["digest"]


@pytest.mark.parametrize("known", GOLDEN["scenes"], ids=lambda known: str(known["index"]))
def test_scenes_equal_known_numbers(scenes, known):
    index = known["index"]
    assert scenes.room_dim[index].tolist() == known["room_dim"]
    assert float(scenes.rt60[index]) == known["rt60"]
    assert scenes.src_pos[index].tolist() == known["src_pos"]
    assert int(scenes.num_images[index]) == known["num_images"]
    x, y, z = known["centre"]
    assert scenes.mic_pos[index].tolist() == [[x - 0.05, y, z], [x + 0.05, y, z]]
    assert scenes.array_centre[index].tolist() == known["centre"]


def test_first_scenes_are_the_published_evaluation_list(scenes):
    assert len(GOLDEN["eval"]) == 200
    for index, (mic_pos, src_pos) in enumerate(GOLDEN["eval"]):
        assert scenes.mic_pos[index].tolist() == mic_pos and scenes.src_pos[index].tolist() == src_pos


def test_scenes_are_a_batch_like_any_other(scenes):
    """3,000 usable scenes of the law that SceneConfig describes by default; slices keep their image counts."""
    assert isinstance(scenes, SceneBatch) and len(scenes) == 3000 and scenes.valid.all()
    made = make_scenes(scenes.room_dim, scenes.rt60, scenes.mic_pos, scenes.src_pos)  # which checks every one of them
    assert torch.equal(made.mic_orientation, scenes.mic_orientation)
    assert torch.equal(made.src_orientation, scenes.src_orientation)
    law = SceneConfig()
    assert scenes.max_rt60 == law.rt60_s[1] >= float(scenes.rt60.max())
    assert (scenes.distance >= law.src_dist_m[0]).all() and (scenes.distance <= law.src_dist_m[1]).all()
    assert (scenes.num_images >= 1024).all() and (scenes.num_images <= 4096).all()
    part = scenes[200:300]
    assert torch.equal(part.num_images, scenes.num_images[200:300]) and len(part) == 100
    assert scenes.num_images.dtype == torch.int64 and part.room_dim.dtype == torch.float64


def test_scenes_render_with_their_own_number_of_images(scenes):
    cfg, scenes = RirConfig(early=False), scenes[:3]
    images = draw_images(cfg, scenes, generator=torch.Generator().manual_seed(0))
    rirs = render_rir(cfg, scenes, images)
    assert images.active.sum(1).tolist() == [s["num_images"] for s in GOLDEN["scenes"][:3]]
    anyhow = draw_images(cfg, replace(scenes, num_images=None), generator=torch.Generator().manual_seed(0))
    assert torch.equal(images.ratio, anyhow.ratio) and not torch.equal(images.active, anyhow.active)
    assert rirs.full.shape[:3] == (3, 2, 2) and torch.isfinite(rirs.full).all()
    lengths = [np.ceil(np.float32(s["rt60"]) * np.float32(16000)) for s in GOLDEN["scenes"][:3]]
    assert rirs.length.tolist() == lengths


def test_replay_is_quick_and_leaves_global_generators_alone():
    numpy_state, torch_state = np.random.get_state()[1].tolist(), torch.get_rng_state()
    begin = time.process_time()
    first, again = original_scenes(), original_scenes()
    assert time.process_time() - begin < 2  # less than a second each; 0.04 s here
    assert np.random.get_state()[1].tolist() == numpy_state and torch.equal(torch.get_rng_state(), torch_state)
    assert torch.equal(first.src_pos, again.src_pos)
