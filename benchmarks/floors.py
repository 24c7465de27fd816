"""How low the class error in azimuth can be, on fresh scenes of the law, and how much that depends on the scenes.

    python -m benchmarks.floors [--draws 8] [--json FILE]

For every draw of 2,000 scenes, as many as e1 has: the error of a listener who knows every cone angle exactly, and of
one who also knows the distances (ssl_gpu.scoring.bayes_azimuth).
"""
from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch

from benchmarks import common
from ssl_gpu import rng
from ssl_gpu.checkpoint import write_json
from ssl_gpu.clips import Truth
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.doa import sorted_angles
from ssl_gpu.localizer import scene_law
from ssl_gpu.outputs import output_file, write_each
from ssl_gpu.protocol import LAW, NUM_CLIPS
from ssl_gpu.scene import sample_scenes
from ssl_gpu.scoring import bayes_azimuth, score_angles

FIRST_SEED = 2000  # of rng, apart from those of ssl_gpu.protocol


def truth_of(seed: int) -> Truth:
    """NUM_CLIPS fresh scenes of the law."""
    generator = rng.generator(seed, rng.Split.TEST, rng.Stream.SCENE, 0)
    scenes = sample_scenes(LAW, NUM_CLIPS, generator=generator)
    order = scenes.cone_angle.argsort(-1)
    distance = scenes.distance.double().gather(-1, order)
    return Truth(sorted_angles(scenes.azimuth.double()), sorted_angles(scenes.cone_angle.double()),
                 torch.arange(len(scenes)), {"distance_m": distance})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m benchmarks.floors", description=__doc__)
    parser.add_argument("--draws", type=common.positive, default=8)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args(arguments)
    try:
        target = output_file("--json", args.json)                       # before minutes of work
    except ValueError as error:
        common.refuse(str(error))
    law, found = scene_law(LAW, 0), {"exact_cone": [], "exact_cone_and_distance": []}
    for seed in range(FIRST_SEED, FIRST_SEED + args.draws):
        truth = truth_of(seed)
        for name, azimuth in (("exact_cone", law.angle_map.cone_to_azimuth(truth.cone)),
                              ("exact_cone_and_distance", bayes_azimuth(LAW, truth))):
            found[name].append(score_angles(azimuth, truth.cone, truth)["azimuth_class_mae_deg"])
        print(f"draw {seed - FIRST_SEED}: " + ", ".join(
            f"{name} {values[-1][0]:.2f} / {values[-1][1]:.2f}" for name, values in found.items()), flush=True)
    for name, values in found.items():
        print(f"{name}: mean " + " / ".join(f"{statistics.mean(v):.2f} (SD {statistics.stdev(v):.2f})" if len(v) > 1
                                            else f"{v[0]:.2f}" for v in zip(*values)))
    if target is None:
        return 0
    content = {"command": common.told_command("floors", arguments), "azimuth_class_mae_deg": found,
               "scenes_per_draw": NUM_CLIPS}
    return write_each([(args.json, partial(write_json, target, content))])


if __name__ == "__main__":
    end_with(main)
