"""The 3,000 rooms that the original project trained in, drawn again: its generator, its seed, its order of draws.

The original kept positions only, and drew them from numpy's RandomState(20231), whose stream never changes. Its 200
evaluation rooms are the first 200 of these: it seeds the same generator with the same number for both sets.
"""
from __future__ import annotations

import math

import numpy as np

SEED = 20231
NUM_SCENES = 3000
NUM_EVAL_SCENES = 200  # the first ones
ROOM_M = ((3.0, 10.0), (3.0, 6.0), (2.5, 4.0))
RT60_S = (0.1, 0.7)
WALL_DIST, RADIUS = 0.5, 0.05  # m, from the walls to sources and microphones; of the array, two microphones along x
SRC_DIST = (0.2, 5.0)          # m, from the centre of the array
NUM_SRC = 2
NUM_IMAGES = (1024, 4097)      # upper end exclusive


def replay() -> tuple[np.ndarray, ...]:
    """room_dim [scene, 3], rt60 [scene], array centre [scene, 3], src_pos [scene, src, 3] float64 in m and s, and the
    number of images [scene] int64, of all scenes, equal to the original's to the last bit.

    A loop, since how far a scene advances the generator depends on what it draws. In Python's arithmetic, where
    low + (high - low) * u is rounded twice on every machine; some compilers of numpy fuse it into one rounding.
    """
    random = np.random.RandomState(SEED)
    columns = [], [], [], [], []
    for _ in range(NUM_SCENES):
        draw = random.random_sample(7).tolist()
        room = [low + (high - low) * u for (low, high), u in zip(ROOM_M, draw)]
        rt60 = RT60_S[0] + (RT60_S[1] - RT60_S[0]) * draw[3]
        # side - 0.5 - 0.05, from the left: side - 0.55 is another number.
        centre = [_between(WALL_DIST + RADIUS, side - WALL_DIST - RADIUS, u) for side, u in zip(room, draw[4:])]
        sources = []
        while len(sources) < NUM_SRC:
            draw = random.random_sample(3).tolist()
            source = [_between(WALL_DIST, side - WALL_DIST, u) for side, u in zip(room, draw)]
            if SRC_DIST[0] <= math.dist(source, centre) <= SRC_DIST[1]:
                sources.append(source)
        for column, value in zip(columns, (room, rt60, centre, sources, random.randint(*NUM_IMAGES))):
            column.append(value)
    return tuple(np.array(column, dtype) for column, dtype in zip(columns, [np.float64] * 4 + [np.int64]))


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u
