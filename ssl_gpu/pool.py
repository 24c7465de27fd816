"""The original project's pool: its 3,000 rooms, each with one RIR per microphone and source, wherever they are heard.

The original kept its RIRs as files; those of its 200 evaluation rooms are those of its first 200 training rooms. So the
images of a room are drawn from a stream of the room's own number: a bank of scene.pool=original and the evaluation set
e0 hear the same RIRs, and whoever was trained in that bank has been in e0's rooms before.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from enum import Enum

from ssl_gpu import rng
from ssl_gpu.original import NUM_EVAL_SCENES, NUM_SCENES, SEED
from ssl_gpu.rir import ImageBatch, RirConfig, draw_images
from ssl_gpu.scene import Pool, SceneBatch, SceneConfig

OF_OUTPUT = {"early", "early_window_ms"}  # fields of RirConfig that leave the full RIRs as they are


def draw_original_images(scenes: SceneBatch, rooms: Sequence[int]) -> ImageBatch:
    """The images of rooms of the original, on the CPU, by the reference's law and as many as the original had.

    scenes: original_scenes(), or its first ones; rooms [n]: their numbers in it. A room's images depend on its number
    alone, not on the rooms beside it; they are not the original's, whose draws are those of its simulator.
    """
    return ImageBatch.concatenate([
        draw_images(RirConfig(), scenes[room:room + 1],
                    generator=rng.generator(SEED, rng.Split.TEST, rng.Stream.IMAGES, room)) for room in rooms])


def check_pool(scene: SceneConfig, rir: RirConfig) -> None:
    """Raises ValueError, naming every field that is in the way, for scene.pool=original without a bank of its rooms, or
    with scenes or a simulator other than the original's, which would leave it rooms that are not those of e0."""
    if scene.pool is Pool.LAW:
        return
    wrong = []
    if scene.bank is None or scene.bank > NUM_SCENES:
        wrong.append(f"scene.bank must be in 1..{NUM_SCENES} rooms, got {'null' if scene.bank is None else scene.bank}")
    for section, cfg, free in (("scene", scene, {"bank", "pool"}), ("rir", rir, OF_OUTPUT)):
        for field in fields(cfg):
            value, law = (x.value if isinstance(x, Enum) else x for x in (getattr(cfg, field.name), field.default))
            if field.name not in free and value != law:
                wrong.append(f"{section}.{field.name} must be {law}, got {value}")
    if wrong:
        raise ValueError(f"scene.pool=original has rooms and RIRs by the original's law: {'; '.join(wrong)}")


def eval_rooms_in(scene: SceneConfig) -> int:
    """How many of the original's 200 evaluation rooms, those of e0, are rooms that this configuration trains in; all
    of them where no bank is given, which check_pool refuses."""
    return min(scene.bank or NUM_SCENES, NUM_EVAL_SCENES) if scene.pool is Pool.ORIGINAL else 0
