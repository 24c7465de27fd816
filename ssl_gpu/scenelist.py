"""Lists of scenes as JSON: the scenes.json beside rendered RIRs, and lists that others wrote, to be rendered."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from ssl_gpu.scene import SceneBatch, make_scenes

# What a scene must say, and what it may, with the shapes: a word is an axis that all scenes of a list share.
REQUIRED = {"room_dim": (3,), "rt60": (), "mic_pos": ("mic", 3), "src_pos": ("src", 3)}
OPTIONAL = {"mic_orientation": ("mic", 2), "src_orientation": ("src", 2), "num_images": ()}


class SceneListError(ValueError):
    """A scene list that cannot be used; the message is one line and names the file, the scene and the rule."""


def scene_entries(scenes: SceneBatch) -> list[dict[str, Any]]:
    """Each scene as a plain mapping, all of it that read_scenes needs to give it back to the last bit, and its labels.

    mic_pos, src_pos, array_pos (its centre): lists of [x, y, z] m; room_dim [x, y, z] m; rt60 s; mic_orientation,
    src_orientation: lists of (azimuth, polar angle) rad; num_images, None where it is left to RirConfig;
    direction: of each source, unit vector [x, y, z] in the room's axes from array_pos; azimuth_deg, cone_angle_deg: of
    each source, from the line from the first to the last microphone, None where these are one or at one place.
    """
    angles = {"azimuth_deg": None, "cone_angle_deg": None}
    if scenes.mic_pos.shape[1] > 1:
        angles = {"azimuth_deg": scenes.azimuth, "cone_angle_deg": scenes.cone_angle}
    apart = (scenes.mic_pos[:, 0] != scenes.mic_pos[:, -1]).any(-1).tolist()
    columns = {"mic_pos": scenes.mic_pos, "src_pos": scenes.src_pos, "array_pos": scenes.array_centre[:, None],
               "room_dim": scenes.room_dim, "rt60": scenes.rt60, "mic_orientation": scenes.mic_orientation,
               "src_orientation": scenes.src_orientation, "num_images": scenes.num_images,
               "direction": scenes.direction,
               **{name: None if angle is None else torch.rad2deg(angle) for name, angle in angles.items()}}
    rows = {name: [None] * len(scenes) if column is None else column.tolist() for name, column in columns.items()}
    rows["num_images"] = [count or None for count in rows["num_images"]]
    for name in angles:
        rows[name] = [value if line else None for value, line in zip(rows[name], apart)]
    return [{name: rows[name][index] for name in rows} for index in range(len(scenes))]


def read_scenes(path: str | Path) -> SceneBatch:
    """The scenes of a JSON file: a list of mappings with room_dim, rt60, mic_pos and src_pos, in m and s.

    mic_orientation and src_orientation may be there, (0, 0) in scenes where they are not or null, and num_images, drawn
    likewise; anything else is ignored. All scenes have the same numbers of microphones and sources. Raises
    SceneListError for all that make_scenes refuses, and for a file that cannot be read, is no such list, or lacks a
    number.
    """
    entries = read_entries(path)
    sizes, columns = {}, {}
    present = [*REQUIRED, *(name for name in OPTIONAL if any(entry.get(name) is not None for entry in entries))]
    for index, entry in enumerate(entries):
        for name in present:
            shape = (REQUIRED | OPTIONAL)[name]
            if name in OPTIONAL and entry.get(name) is None:            # 0 images: to be drawn
                columns.setdefault(name, []).append([[0.0] * shape[1]] * sizes[shape[0]] if shape else 0)
                continue
            if name not in entry:
                raise SceneListError(f"{path}: scene {index} has no {name}, it has {', '.join(entry) or 'nothing'}")
            if not _fits(entry[name], shape, sizes):
                words = ", ".join(f"{axis}={sizes[axis]}" if axis in sizes else str(axis) for axis in shape)
                rule = f"[{words}] finite numbers" if shape else "a finite number"
                alike = ", as many as in the scenes before" if index and set(shape) & set(sizes) else ""
                raise SceneListError(f"{path}: scene {index}: {name} must be {rule}{alike}, got "
                                     f"{shown_json(entry[name])}")
            columns.setdefault(name, []).append(entry[name])
    try:
        return make_scenes(**columns)
    except ValueError as error:
        raise SceneListError(f"{path}: {error}") from error


def read_entries(path: str | Path) -> list[dict[str, Any]]:
    """The mappings in a file. Raises SceneListError."""
    try:
        entries = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SceneListError(f"cannot read scene list {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise SceneListError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (UnicodeDecodeError, RecursionError, ValueError) as error:  # bytes of no encoding; lists in lists in lists
        raise SceneListError(f"{path} is not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(entries, list) or not entries:
        raise SceneListError(f"{path} must hold a list of scenes, got {shown_json(entries)}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise SceneListError(f"{path}: scene {index} must be a mapping of room_dim, rt60, mic_pos and src_pos, "
                                 f"got {shown_json(entry)}")
    return entries


def _fits(value: Any, shape: tuple[str | int, ...], sizes: dict[str, int]) -> bool:
    """Whether nested lists of finite numbers have this shape; an axis met for the first time gets its size."""
    if not shape:
        # float(10 ** 400) overflows; JSON in Python's reading knows NaN and Infinity.
        return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    if not isinstance(value, list) or not value:
        return False
    axis, *rest = shape
    if len(value) != (axis if isinstance(axis, int) else sizes.get(axis, len(value))):
        return False
    if not all(_fits(item, tuple(rest), sizes) for item in value):
        return False
    if not isinstance(axis, int):
        sizes[axis] = len(value)
    return True


def shown_json(value: Any) -> str:
    """A value of JSON in an error: not too long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
