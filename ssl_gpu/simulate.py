"""Render rooms into files: python -m ssl_gpu.simulate CONFIG --num-scenes N --out DIR [section.key=value ...].

rir_<i>.npy   float32 [mic, src, tap], cut at the scene's own length, at rir.sample_rate, in the scale of FRA-RIR: a
              direct path over d m peaks at about 0.0155 / d
scenes.json   a list with, of every scene: positions, room_dim, rt60 (m, s); of each source azimuth_deg and
              cone_angle_deg from the line from the first to the last microphone (arbitrary in an array that is no
              line), and its direction, a unit vector in the room's axes; measured t20 (s), drr_db and c50_db
              [mic][src], seed, sample_rate; method (fra, ism or hybrid), num_images of fra, of the others the
              absorption of the walls and whether it was clamped, at what comes closest to an infeasible rt60;
              --scenes reads it, and with the same configuration and seed renders the same RIRs
config.yaml   the whole configuration; its scene is not what scenes of --scenes are of
mix_<i>.wav   with --wav: speech.clip_s of speech (speech.eval, or synthetic voices) at the microphones, 32-bit float,
              64 times as loud as the RIRs make it: a talker at 1 m comes out about as loud as the dry speech;
              scenes.json then has the utterances, the sample each begins at, its gain_db, and the SNRs of the noises
early_<i>_<src>.wav  with --wav --targets: talker src alone, without noise, through rir.early_window_ms of its RIR, at
              the microphones and as loud as in the mixture
scene_<i>.png with --plot, of the first 16 scenes: plan of the room, RIR, energy decay

The least that --scenes FILE may hold, in m and s, all scenes with the same numbers of microphones and sources:

[{"room_dim": [6, 5, 3], "rt60": 0.4, "mic_pos": [[2, 2, 1.2], [2.1, 2, 1.2]], "src_pos": [[4, 3, 1.6]]}]

A scene may also have mic_orientation and src_orientation, for each microphone or source [azimuth, polar angle from +z]
in rad that its polar pattern looks along, [0, 0] without; and num_images, how many fra renders it with.

Everything is drawn and rendered on the CPU, one scene at a time: scene i depends on configuration, seed and i only.
"""
from __future__ import annotations

import argparse
import math
import re
import signal
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterator, Sequence

if __name__ == "__main__":
    from ssl_gpu.commandline import begin_command
    begin_command()                                                    # before torch is loaded

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ssl_gpu import plots, rng, runtime
from ssl_gpu.checkpoint import check_replaceable, replacing_folder, write_json
from ssl_gpu.commandline import Parser, bar_interval, end_with
from ssl_gpu.config import RunConfig, load_config, save_yaml
from ssl_gpu.evaluate import eval_speech, warn_of_idle
from ssl_gpu.ism import check_feasible, check_law, shortest_rt60, wall_absorption
from ssl_gpu.measure import RirMeasures, measure_rirs
from ssl_gpu.mixture import MixtureBatch, draw_mixture, mix
from ssl_gpu.rir import Method
from ssl_gpu.rooms import METHODS, RoomDraw, draw_rooms, render_rooms
from ssl_gpu.scene import Pool, SceneBatch, farthest_pair, sample_scenes
from ssl_gpu.scenelist import OPTIONAL, REQUIRED, read_entries, read_scenes, scene_entries
from ssl_gpu.speech import SpeechBank, draw_crops, gather_crops
from ssl_gpu.synthesis import OVERSAMPLING, RirBatch

WAV_GAIN = float(OVERSAMPLING)  # undoes the 1/64 that the decimation from the 64x grid leaves in every RIR
MAX_PLOTS = 16
LONGEST_ROOM = 200.0  # m, of one that is not doubted; St Peter's is 186 m long
# What scenes.json says of a scene beside what is read again.
WRITTEN = {"array_pos", "direction", "azimuth_deg", "cone_angle_deg", "fname", "sample_rate", "method", "absorption",
           "clamped", "t20", "drr_db", "c50_db", "seed", "utterances", "offsets", "gain_db", "sensor_snr_db",
           "diffuse_snr_db"}
IDLE = (("train", "eval.num_clips", "speech.train", "model", "features", "target", "simulator", "rir.early"),
        "scenes are rendered one by one on a CPU, by --seed, --num-scenes and --targets, and nothing is trained")
OURS = re.compile(r"scenes\.json|config\.yaml|rir_\d+\.npy|mix_\d+\.wav|early_\d+_\d+\.wav|scene_\d+\.png")


def generator(seed: int, stream: rng.Stream, index: int) -> torch.Generator:
    """Of scene `index` alone. The split is one that neither training nor its evaluation set draws from, but the sets to
    choose by do, by seeds 1000 to 1003 (protocol.SetOptions.split)."""
    return rng.generator(seed, rng.Split.VALIDATION, stream, index)


def draw_scene(cfg: RunConfig, seed: int, index: int) -> SceneBatch:
    """Scene `index` of a seed. Raises ValueError when its room has no place for the sources."""
    scene = sample_scenes(cfg.scene, 1, generator=generator(seed, rng.Stream.SCENE, index))
    if not scene.valid.all():
        raise ValueError(f"scene {index}: its room has no place for the sources, widen "
                         f"scene.src_dist_m={cfg.scene.src_dist_m} or scene.room_min_m={cfg.scene.room_min_m}")
    return scene


def draw_rirs(cfg: RunConfig, scene: SceneBatch, seed: int, index: int,
              early: bool = False) -> tuple[RirBatch, RoomDraw]:
    """The RIRs of a single scene, which is scene `index` of its seed, with no tap too many; and what was drawn. early:
    with their early part, whole RIRs being the same to the last bit."""
    # Of this scene alone, or its draws would have the shapes of others' in a list.
    scene = replace(scene, max_rt60=float(scene.rt60[0]), max_dist=farthest_pair(scene.src_pos, scene.mic_pos),
                    max_images=None if scene.num_images is None else int(scene.num_images[0]))
    rir = replace(cfg.rir, early=False)
    drawn = draw_rooms(cfg.ism, rir, scene, generator=generator(seed, rng.Stream.IMAGES, index))
    rirs = render_rooms(cfg.ism, rir, scene, drawn)
    if early:
        both = render_rooms(cfg.ism, replace(cfg.rir, early=True), scene, drawn)
        rirs = replace(rirs, early=both.early, early_end=both.early_end)
    return rirs, drawn


def draw_audio(cfg: RunConfig, bank: SpeechBank, scene: SceneBatch, rirs: RirBatch, seed: int,
               index: int) -> tuple[MixtureBatch, dict[str, Any]]:
    """What the microphones hear in a single scene, with the levels and noises of the configuration, at the RIRs' scale;
    and of what it was made, as in scenes.json: utterances, offsets (samples), gain_db of each talker, the SNRs of the
    noises, None without."""
    num_mics, num_src = rirs.full.shape[1:3]
    num_samples = round(cfg.speech.clip_s * rirs.sample_rate)
    crops = draw_crops(bank, 1, num_src, num_samples, cfg.speech.crop,
                       generator=generator(seed, rng.Stream.SPEECH, index))
    noise = draw_mixture(cfg.mixture, 1, num_src, num_mics, num_samples,
                         generator=generator(seed, rng.Stream.MIXTURE, index))
    mixture = mix(gather_crops(bank, crops, num_samples), rirs, scene, noise)
    snrs = {name: float(getattr(mixture, name)[0]) for name in ("sensor_snr_db", "diffuse_snr_db")}
    return mixture, {"utterances": [bank.names[row] for row in crops.utterance[0].tolist()],
                     "offsets": crops.offset[0].tolist(), "gain_db": (20 * noise.gain[0].log10()).tolist(),
                     **{name: snr if math.isfinite(snr) else None for name, snr in snrs.items()}}


def write_wav(path: Path, audio: Tensor, sample_rate: int) -> None:
    """audio [channel, sample] float32 -> WAV of 32-bit floats, which do not clip.

    Written here because libsndfile puts the time of day into the header of such files.
    """
    data = audio.T.contiguous().numpy().astype("<f4").tobytes()
    channels, samples = audio.shape
    kind = struct.pack("<HHIIHHH", 3, channels, sample_rate, 4 * channels * sample_rate, 4 * channels, 32, 0)
    chunks = ((b"fmt ", kind), (b"fact", struct.pack("<I", samples)), (b"data", data))
    body = b"WAVE" + b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)


def describe_room(cfg: RunConfig, scene: SceneBatch, drawn: RoomDraw) -> dict[str, Any]:
    """How a single scene was rendered: method, and num_images, absorption and clamped, None where it has none."""
    method = cfg.rir.method if drawn.method is None else METHODS[int(drawn.method)]
    room = {"sample_rate": cfg.rir.sample_rate, "method": method.value, "num_images": None, "absorption": None,
            "clamped": None}
    if method is Method.FRA:
        room["num_images"] = int(drawn.images.active.sum())
    else:
        room["absorption"] = float(wall_absorption(cfg.ism, scene.room_dim, scene.rt60))
        room["clamped"] = bool(scene.rt60 < shortest_rt60(cfg.ism, scene.room_dim))
    return room


def describe(scene: SceneBatch, room: dict[str, Any], measures: RirMeasures, seed: int, index: int) -> dict[str, Any]:
    """The entry of a single scene, rendered as `room` says, in scenes.json; a measure that is undefined is None."""
    entry = scene_entries(scene)[0] | room
    found = {name: getattr(measures, name)[0].tolist() for name in ("t20", "drr_db", "c50_db")}
    found = {name: [[value if math.isfinite(value) else None for value in row] for row in rows]
             for name, rows in found.items()}
    first = {name: entry.pop(name) for name in ("mic_pos", "src_pos", "array_pos")}
    return {**first, "fname": f"rir_{index}.npy", **entry, **found, "seed": seed}


def each_scene(cfg: RunConfig, given: SceneBatch | None, num_scenes: int, seed: int) -> Iterator[SceneBatch]:
    """The scenes one by one: drawn, or those given."""
    for index in range(num_scenes):
        yield draw_scene(cfg, seed, index) if given is None else given[index:index + 1]


def write_set(cfg: RunConfig, folder: Path, given: SceneBatch | None, num_scenes: int, seed: int,
              bank: SpeechBank | None, targets: bool, plot: bool) -> list[dict[str, Any]]:
    """Fills a folder with everything, and returns what is in scenes.json; mixtures of the bank's speech if there is
    one, and what --targets writes then."""
    entries = []
    for index, scene in enumerate(tqdm(each_scene(cfg, given, num_scenes, seed), "simulating", num_scenes,
                                       unit="scene", mininterval=bar_interval())):
        rirs, drawn = draw_rirs(cfg, scene, seed, index, targets)
        np.save(folder / f"rir_{index}.npy", rirs.full[0].numpy().astype("<f4"), allow_pickle=False)
        measures = measure_rirs(rirs, scene)
        entries.append(describe(scene, describe_room(cfg, scene, drawn), measures, seed, index))
        if bank is not None:
            mixture, made_of = draw_audio(cfg, bank, scene, rirs, seed, index)
            entries[-1] |= made_of
            write_wav(folder / f"mix_{index}.wav", mixture.audio[0] * WAV_GAIN, rirs.sample_rate)
            for src in range(mixture.early.shape[2] if targets else 0):
                write_wav(folder / f"early_{index}_{src}.wav", mixture.early[0, :, src] * WAV_GAIN, rirs.sample_rate)
        if plot and index < MAX_PLOTS:
            title = f"scene {index}, seed {seed}, rir.method {entries[-1]['method']}"
            plots.draw_scene(folder / f"scene_{index}.png", scene, rirs, measures, title)
    save_yaml(folder / "config.yaml", cfg)
    write_json(folder / "scenes.json", entries)
    return entries


def given_scenes(cfg: RunConfig, path: str, count: int | None) -> SceneBatch:
    """The first `count` scenes of a list, or all; lines where a room looks like one in cm, and where a key of it means
    nothing here. Raises ValueError for fewer, or where rir.method refuses one."""
    warn_of_size(path, count)                                           # first: of rooms in cm it may be all that helps
    scenes = read_scenes(path)
    warn_of_keys(path)
    if count is not None and count > len(scenes):
        raise ValueError(f"--num-scenes must be <= {len(scenes)}, the scenes in {path}, got {count}")
    scenes = scenes[:count]
    if cfg.rir.uses_walls:
        try:
            check_feasible(cfg.ism, scenes)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return scenes


def warn_of_keys(path: str) -> None:
    """A line where scenes of a list have keys that are neither read nor written here, as misspelt ones are."""
    read = [*REQUIRED, *OPTIONAL]
    unknown = dict.fromkeys(key for entry in read_entries(path) for key in entry if key not in {*read, *WRITTEN})
    if unknown:
        print(f"warning: {path}: {', '.join(map(repr, unknown))} {'are' if len(unknown) > 1 else 'is'} ignored; of a "
              f"scene are read {', '.join(read)}", file=sys.stderr)


def warn_of_size(path: str, count: int | None) -> None:
    """A line where one of the first `count` rooms of a list is longer than almost any room is, as rooms in cm are.
    Entries that are none are read_scenes' to tell of."""
    rooms = [entry.get("room_dim") for entry in read_entries(path)[:count]]
    large = [index for index, room in enumerate(rooms) if isinstance(room, list) and len(room) == 3 and all(
        type(side) in (int, float) and 0 < side < 1e9 for side in room) and max(room) > LONGEST_ROOM]
    if large:
        size = " x ".join(f"{side:g}" for side in rooms[large[0]])
        print(f"warning: {path}: scene {large[0]}{f' and {len(large) - 1} more' if len(large) > 1 else ''}: a room of "
              f"{size} m; lengths are in m", file=sys.stderr)


def warn_of_methods(path: str, entries: list[dict[str, Any]]) -> None:
    """A line where a list names another method than its scenes were rendered by, which the configuration decides."""
    stored = [entry.get("method") for entry in read_entries(path)]
    other = sum(method not in (None, entry["method"]) for method, entry in zip(stored, entries))
    if other:
        print(f"warning: {other} of {len(entries)} scenes of {path} were rendered by another method there; rir.method, "
              f"rir.hybrid_share and rir.ism_share decide here", file=sys.stderr)


def simulate(args: argparse.Namespace) -> str:
    """Does what the command line says, and returns a line about it. Raises ValueError or OSError with a line, too."""
    out = Path(args.out).expanduser().resolve()
    if args.num_scenes is None and args.scenes is None:
        raise ValueError("--num-scenes N must say how many scenes to draw, unless --scenes FILE gives them")
    if args.num_scenes is not None and args.num_scenes < 1:
        raise ValueError(f"--num-scenes must be >= 1, got {args.num_scenes}")
    if not 0 <= args.seed <= rng.MAX_SEED:
        raise ValueError(f"--seed must satisfy 0 <= seed <= {rng.MAX_SEED}, got {args.seed}")
    if args.targets and not args.wav:
        raise ValueError("--targets needs --wav, the mixtures that they belong to")
    check_replaceable(out, OURS, args.force)
    cfg = load_config(RunConfig, args.config, args.overrides)
    given = None if args.scenes is None else given_scenes(cfg, args.scenes, args.num_scenes)
    if given is not None:
        warn_of_idle(args.overrides, ("scene",), "the scenes are those of --scenes")
    else:
        warn_of_idle(args.overrides, ("scene.bank",), "every scene is another room")
    warn_of_idle(args.overrides, *IDLE, read=("features.window",))    # the least that speech.clip_s may be
    if not args.wav:
        warn_of_idle(args.overrides, ("mixture", "speech", "eval.seed"), "there are mixtures with --wav only",
                     read=("speech.train",))                            # which has been told
    if given is None and cfg.rir.uses_walls:
        check_law(cfg.ism, cfg.scene)
    if given is None and cfg.scene.pool is not Pool.LAW:
        raise ValueError(f"scene.pool must be law, others are for training; give other rooms by --scenes FILE, "
                         f"got {cfg.scene.pool.value}")
    num_scenes = args.num_scenes or len(given)
    if args.plot:
        plots.require_matplotlib()
    num_src = cfg.scene.num_src if given is None else given.src_pos.shape[1]
    bank = eval_speech(cfg, num_src) if args.wav else None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), replacing_folder(out) as folder:
            entries = write_set(cfg, folder, given, num_scenes, args.seed, bank, args.targets, args.plot)
            megabytes = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
            check_replaceable(out, OURS, args.force)  # rendering takes a while
    except OSError as error:
        raise ValueError(f"cannot write {out}: {error.strerror or error}") from error
    if args.scenes is not None:
        warn_of_methods(args.scenes, entries)
    num_mics, num_src = len(entries[0]["mic_pos"]), len(entries[0]["src_pos"])
    decays = []
    for method in Method:                                              # each of which has a decay of its own
        ratios = [t20 / entry["rt60"] for entry in entries for row in entry["t20"] for t20 in row
                  if t20 is not None and entry["method"] == method.value]
        if ratios:
            by = f"fra, rir.decay={cfg.rir.decay.value}" if method is Method.FRA else method.value
            decays.append(f"{np.median(ratios):.2f} ({by})")
    decay = f", T20 {' and '.join(decays)} x rt60 in the median" if decays else ""
    return (f"{out}: {len(entries)} scene{'s' * (len(entries) > 1)}, {num_mics} mic x {num_src} src, at "
            f"{cfg.rir.sample_rate} Hz, {megabytes:.1f} MB{decay}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m ssl_gpu.simulate", description=__doc__)
    parser.add_argument("config", help="a YAML file, for example configs/quickstart.yaml")
    parser.add_overrides("for example scene.num_mics=4 rir.sample_rate=48000")
    parser.add_argument("--num-scenes", type=int, metavar="N",
                        help="how many scenes to draw; with --scenes, how many of them to render (default: all)")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder, filled when all is done")
    parser.add_argument("--scenes", metavar="FILE",
                        help="render the scenes of this JSON list, what it holds stands above, instead of drawing them")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is drawn (default: %(default)s)")
    parser.add_argument("--wav", action="store_true", help="write mixtures of speech as well")
    parser.add_argument("--targets", action="store_true", help="with --wav: each talker's early part alone as well")
    parser.add_argument("--plot", action="store_true", help=f"draw the first {MAX_PLOTS} scenes; needs matplotlib")
    parser.add_argument("--force", action="store_true", help="replace a folder that an earlier run wrote")
    args = parser.parse_intermixed_args(arguments)
    signal.signal(signal.SIGTERM, runtime.interrupt)
    try:
        print(simulate(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    end_with(main)
