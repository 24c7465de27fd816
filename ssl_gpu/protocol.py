"""The evaluation sets by name, the same for everybody: rooms, talkers, noise, down to the last draw.

    e0    the original's protocol: its 200 evaluation rooms with an RIR each per microphone and source, every utterance
          of the speech once as the first talker
    e0b   its law, 2,000 rooms of which none is in any training; e1 is the same mixtures
    e1p   the same law with the sources at the height of the array
    e1n5  e1 with diffuse noise at 5 dB; likewise e1n0, e1n10, e1n20
    e1w5  e1 with white noise, independent at either microphone, at 5 dB; likewise e1w0, e1w10, e1w20
    e2    the first 500 geometries and talkers of e1 in rooms by pyroomacoustics, an independent simulator (extra eval)
    e3    measured two-microphone RIRs of real rooms, in a folder of the user's

Two talkers of different voices, the first 3 s of an utterance each, at 16 kHz, levels as the utterances have them (e3:
alike). Everything is drawn on the CPU, in blocks of 50 clips, and rendered on any device: fewer clips of a set are its
first ones. VERSION stands for all of that, and tests hold all but e2 to recorded digests. No training draws from the
random streams of these scenes, nor does a run's own evaluation; but scene.pool=original trains in e0's rooms, as the
original did, and ssl_gpu.evaluate says so (`eval_rooms_trained_in`).
Which sets had a say in the choice of the packaged weights stands in docs/accuracy.md.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssl_gpu import rng
from ssl_gpu.clips import Clips
from ssl_gpu.convolve import convolve_sources
from ssl_gpu.measure import RirMeasures, measure_rirs
from ssl_gpu.measured import NO_RIRS, PLACE_OPTIONAL, SAMPLE_RATE, measure_alone, pairs_of
from ssl_gpu.mixture import MixtureConfig, MixtureDraw, draw_mixture, mix
from ssl_gpu.original import NUM_EVAL_SCENES, SEED
from ssl_gpu.pool import draw_original_images, eval_rooms_in
from ssl_gpu.rir import ImageBatch, RirConfig, draw_images, render_rir
from ssl_gpu.scene import SceneBatch, SceneConfig, original_scenes, sample_scenes
from ssl_gpu.scenelist import scene_entries
from ssl_gpu.speech import Crop, CropBatch, SpeechBank, draw_crops, gather_crops
from ssl_gpu.synthesis import RirBatch

VERSION = 1          # of the sets; to be raised with any change of a scene, talker, noise or draw of theirs
NUM_SAMPLES = 48000  # 3 s
BLOCK = 50           # clips drawn at a time, part of every set
NUM_CLIPS, NUM_CLIPS_E2, NUM_CLIPS_E3 = 2000, 500, 300
SEEDS = {"e0": 1000, "e1": 1001, "e1p": 1002, "e3": 1003}  # of rng, in Split.TEST or VALIDATION, never in TRAIN
LAW = SceneConfig()
REFERENCE = RirConfig(early=False)
SNRS_DB = (0.0, 5.0, 10.0, 20.0)
NOISES = {f"e1{letter}{snr:.0f}": MixtureConfig(**{f"{kind}_snr_db": (snr, snr)})
          for letter, kind in (("n", "diffuse"), ("w", "sensor")) for snr in SNRS_DB}
CANDIDATES = 16      # for the second talker of e0; of 40 talkers all are of the first one's voice in one of 40^16 draws
MAX_ORDER_E2 = 60    # of images; caps long reverberation in small rooms


@dataclass(frozen=True, eq=False)
class SetOptions:
    """What a set is made with: speech, its tensors on the CPU; device to render on; count: of clips, None for all;
    measured: of read_measured, for e3; split: TEST; or VALIDATION for sets of the same kinds e1, e1p, e1n5 and e2 that
    share no scene with these, to choose by; of e1n5 all of its kind."""

    speech: SpeechBank
    device: torch.device
    count: int | None = None
    measured: tuple[Tensor, list[dict[str, Any]]] | None = None
    split: rng.Split = rng.Split.TEST

    def limit(self, number: int) -> int:
        """Clips of a set that has `number`."""
        return number if self.count is None else min(number, self.count)


def measured_of(options: SetOptions) -> tuple[Tensor, list[dict[str, Any]]]:
    """Those of the options. Raises ValueError where there are none."""
    if options.measured is None:
        raise ValueError(NO_RIRS)
    return options.measured


def clips_of(name: str, options: SetOptions) -> Iterator[Clips]:
    """The clips of a set, some at a time. Raises ValueError for a name that is none, for speech at another rate, and
    for what a set needs and has not got."""
    if name not in SETS:
        raise ValueError(f"sets must be of {', '.join(SETS)}, got {name!r}")
    if options.split is not rng.Split.TEST and name not in FRESH:
        raise ValueError(f"only {', '.join(FRESH)} have a split of their own beside {rng.Split.TEST.name}, got {name}")
    if options.speech.sample_rate != SAMPLE_RATE:
        raise ValueError(f"the evaluation sets are made of speech at {SAMPLE_RATE} Hz, got "
                         f"{options.speech.sample_rate} Hz (rir.sample_rate)")
    return SETS[name](options)


def num_clips(name: str, options: SetOptions) -> int:
    """How many clips of a set are asked for: all, or options.count."""
    size = {"e0": len(options.speech.length), "e2": NUM_CLIPS_E2, "e3": NUM_CLIPS_E3}.get(name, NUM_CLIPS)
    return options.limit(size)


def eval_rooms_trained_in(name: str, scene: SceneConfig) -> int:
    """How many rooms of a set are rooms that a run with this configuration trained in: 0, but for e0 where
    scene.pool=original."""
    return eval_rooms_in(scene) if name == "e0" else 0


# ---- FRA-RIR rooms ----


def draw_original(options: SetOptions) -> tuple[SceneBatch, CropBatch, Tensor]:
    """e0: scenes and crops of every clip, and the number of each scene: every utterance in a random room, with a
    random other of another voice."""
    bank = options.speech
    if bank.num_speakers < 2:
        raise ValueError(f"e0 needs speech of at least 2 speakers, got {bank.num_speakers}")
    generator = rng.generator(SEEDS["e0"], rng.Split.TEST, rng.Stream.SPEECH, 0)
    first = torch.arange(len(bank.length))
    candidate = torch.randint(len(first), (len(first), CANDIDATES), generator=generator)
    other = (bank.speaker[candidate] != bank.speaker[first][:, None]).to(torch.uint8)
    second = candidate.gather(1, other.argmax(1, keepdim=True))
    room = torch.randint(NUM_EVAL_SCENES, (len(first),), generator=generator)
    if len(lonely := (other.sum(1) == 0).nonzero()[:, 0]):              # where one talker has nearly all utterances
        own, uniform = bank.speaker[lonely], torch.rand(len(lonely), dtype=torch.float64, generator=generator)
        own_start, own_count = bank.speaker_start[own], bank.speaker_count[own]
        chosen = (uniform * (len(first) - own_count)).long()            # of the others, which lie around the own ones
        second[lonely, 0] = torch.where(chosen < own_start, chosen, chosen + own_count)
    utterance = torch.cat((first[:, None], second), 1)
    return original_scenes()[room], CropBatch(utterance, torch.zeros_like(utterance)), room


def draw_fresh(options: SetOptions, planar: bool = False) -> tuple[SceneBatch, CropBatch, Tensor]:
    """e0b, e1, those of NOISES, and e2; planar: e1p. Scenes and crops of every clip, each in a room of its own."""
    seed = SEEDS["e1p" if planar else "e1"]
    generator = rng.generator(seed, options.split, rng.Stream.SCENE, 0)
    scenes = sample_scenes(LAW, 2 * NUM_CLIPS, generator=generator)
    if planar:
        height = scenes.array_centre[:, None, 2:].expand(-1, scenes.src_pos.shape[1], -1)
        scenes = replace(scenes, src_pos=torch.cat((scenes.src_pos[..., :2], height), -1))
    keep = scenes.valid & (scenes.distance >= LAW.src_dist_m[0]).all(-1)  # a source above the array may fall onto it
    scenes = scenes[keep.nonzero().squeeze(-1)[:NUM_CLIPS]]
    generator = rng.generator(seed, options.split, rng.Stream.SPEECH, 0)
    crops = draw_crops(options.speech, NUM_CLIPS, LAW.num_src, NUM_SAMPLES, Crop.FIRST, generator=generator)
    return scenes, crops, torch.arange(NUM_CLIPS)


@dataclass(frozen=True, eq=False)
class FraDraw:
    """What BLOCK clips in rooms of FRA-RIR, or fewer, are made of, on the CPU: rooms, their images and the seeds of
    these, what mixing draws, crops, and the dry speech that is there, [clip, src, sample]."""

    rooms: SceneBatch
    images: ImageBatch
    seeds: list[list[int]]
    mixture: MixtureDraw
    crops: CropBatch
    dry: Tensor


def fra_draws(options: SetOptions, seed: int, scenes: SceneBatch, crops: CropBatch, numbers: Tensor,
              mixture: MixtureConfig = MixtureConfig(), pool: SceneBatch | None = None) -> Iterator[FraDraw]:
    """All that fra_clips draws, block by block."""
    total = options.limit(len(scenes))
    for index, start in enumerate(range(0, total, BLOCK)):
        block, kept = slice(start, start + BLOCK), slice(0, min(BLOCK, total - start))
        rooms = scenes[block]
        image_stream, noise_stream = (rng.generator(seed, options.split, stream, index)
                                      for stream in (rng.Stream.IMAGES, rng.Stream.MIXTURE))
        if pool is None:
            images, seeds = draw_images(REFERENCE, rooms, generator=image_stream), [[seed, index]] * len(rooms)
        else:
            images = draw_original_images(pool, numbers[block].tolist())
            seeds = [[SEED, number] for number in numbers[block].tolist()]
        noise = draw_mixture(mixture, len(rooms), LAW.num_src, 2, NUM_SAMPLES, generator=noise_stream)
        used = CropBatch(crops.utterance[block][kept], crops.offset[block][kept])
        yield FraDraw(rooms[kept], images[kept], seeds[kept], noise[kept], used,
                      gather_crops(options.speech, used, NUM_SAMPLES))


def fra_clips(options: SetOptions, seed: int, scenes: SceneBatch, crops: CropBatch, numbers: Tensor,
              mixture: MixtureConfig = MixtureConfig(), pool: SceneBatch | None = None) -> Iterator[Clips]:
    """Clips in rooms of FRA-RIR by the reference's law.

    pool: original_scenes(), of which the scenes are those of the given numbers: the same RIRs whenever a room comes
    again, as the original has one file a room. None: other images for every clip.
    Entries have the number of the clip in its set, gains, the talkers' factors, the SNRs of its noise, None without,
    and noise_seed, from which the noise is drawn, block by block (as images are from image_seed, but those of a pool):
    that goes into the digest in place of the noise, whose normal numbers differ in the last bits from machine to
    machine.
    """
    for index, drawn in enumerate(fra_draws(options, seed, scenes, crops, numbers, mixture, pool)):
        there = drawn.rooms.to(options.device)
        # By the plain path: sets are not to depend on the order of a GPU's additions, nor on kernels of one GPU alone.
        rirs = render_rir(REFERENCE, there, drawn.images.to(options.device))
        audio = mix(drawn.dry.to(options.device), rirs, there, drawn.mixture.to(options.device)).audio
        measures = measure_rirs(rirs, there)
        clips = slice(index * BLOCK, index * BLOCK + len(drawn.dry))
        snr = torch.minimum(drawn.mixture.diffuse_snr, drawn.mixture.sensor_snr)  # one of them is infinite
        entries = [entry | {"num_images": count, "image_seed": image_seed, "gains": gains}
                   | _noise(diffuse, white, [seed, index]) for entry, count, image_seed, gains, diffuse, white in zip(
                       _entries(options.speech, drawn.rooms, drawn.crops, clips.start),
                       drawn.images.active.sum(-1).tolist(), drawn.seeds, drawn.mixture.gain.tolist(),
                       drawn.mixture.diffuse_snr.tolist(), drawn.mixture.sensor_snr.tolist())]
        draws = (drawn.dry, drawn.images.ratio, drawn.images.perturbation)
        yield _clips(audio, drawn.rooms, numbers[clips], drawn.dry, measures, snr, entries, draws)


def _noise(diffuse: float, white: float, seed: list[int]) -> dict[str, Any]:
    """What an entry says of noise at SNRs in dB, infinite without; of white noise where there is some."""
    none = math.isinf(diffuse) and math.isinf(white)
    return ({"diffuse_snr_db": None if math.isinf(diffuse) else diffuse, "noise_seed": None if none else seed}
            | ({} if math.isinf(white) else {"sensor_snr_db": white}))


def _entries(speech: SpeechBank, scenes: SceneBatch, crops: CropBatch, start: int) -> list[dict[str, Any]]:
    """What scenes and crops say of each clip, from number `start` of a set on."""
    return [{"clip": start + index} | entry | {"utterances": name, "offsets": offset} for index, (entry, name, offset)
            in enumerate(zip(scene_entries(scenes), _utterances(speech, crops), crops.offset.tolist()))]


def _utterances(speech: SpeechBank, crops: CropBatch) -> list[list[str]]:
    return [[speech.names[index] for index in row] for row in crops.utterance.tolist()]


def _clips(audio: Tensor, scenes: SceneBatch, numbers: Tensor, dry: Tensor, measures: RirMeasures, snr: Tensor,
           entries: list[dict[str, Any]], draws: tuple[Tensor, ...], derived: frozenset[str] = frozenset()) -> Clips:
    """With what was measured of the RIRs at the first microphone."""
    t20, drr, energy = (getattr(measures, name)[:, 0].cpu() for name in ("t20", "drr_db", "energy_db"))
    loudness = energy + 10 * torch.log10(dry.double().square().sum(-1).clamp(min=1e-20))
    conditions = {"distance_m": scenes.distance, "t20_s": t20, "drr_db": drr, "snr_db": snr.double(),
                  "level_gap_db": (loudness[:, 0] - loudness[:, 1]).abs(),
                  "separation_deg": torch.rad2deg((scenes.cone_angle[:, 0] - scenes.cone_angle[:, 1]).abs()),
                  "angle_deg": torch.rad2deg(scenes.cone_angle)}
    _tell_measured(entries, conditions)
    return Clips(audio, scenes.mic_pos, scenes.azimuth, scenes.cone_angle, numbers, conditions, entries, draws, derived)


def _tell_measured(entries: list[dict[str, Any]], conditions: dict[str, Tensor]) -> None:
    """Puts what was measured at the first microphone into the entries."""
    keys = ("t20_s", "drr_db")
    for entry, *values in zip(entries, *(conditions[key].tolist() for key in keys)):
        entry["measured"] = {key: [x if math.isfinite(x) else None for x in row] for key, row in zip(keys, values)}


def _original(options: SetOptions) -> Iterator[Clips]:
    return fra_clips(options, SEEDS["e0"], *draw_original(options), pool=original_scenes())


def _fresh(options: SetOptions) -> Iterator[Clips]:
    return fra_clips(options, SEEDS["e1"], *draw_fresh(options))


def _planar(options: SetOptions) -> Iterator[Clips]:
    return fra_clips(options, SEEDS["e1p"], *draw_fresh(options, planar=True))


def _noisy(mixture: MixtureConfig, options: SetOptions) -> Iterator[Clips]:
    return fra_clips(options, SEEDS["e1"], *draw_fresh(options), mixture)


# ---- another simulator ----


def import_pyroomacoustics() -> ModuleType:
    """Raises ValueError, in one line, where it is not installed."""
    try:
        import pyroomacoustics
    except ImportError as error:
        raise ValueError(f"e2 needs pyroomacoustics, install it with pip install 'pyroomacoustics>=0.10,<0.11': "
                         f"{error}") from error
    return pyroomacoustics


def _other_simulator(options: SetOptions) -> Iterator[Clips]:
    """e2: image-source RIRs by pyroomacoustics, with its own speed of sound, 343 m/s, and high-pass.

    Absorption by its inverse_sabine, and all images up to the order that it asks for, but to 60 at most. Of the 500
    rooms 268 stop below 60; 9 are so dead that it finds no absorption: they have 0.99, and order 60.
    """
    pyroomacoustics = import_pyroomacoustics()
    scenes, crops, numbers = draw_fresh(options)
    total = options.limit(NUM_CLIPS_E2)
    for start in range(0, total, BLOCK):
        part = slice(start, min(start + BLOCK, total))
        rooms = scenes[part]
        used = CropBatch(crops.utterance[part], crops.offset[part])
        dry = gather_crops(options.speech, used, NUM_SAMPLES)
        rirs = [_their_rirs(pyroomacoustics, rooms, index) for index in range(len(rooms))]
        full = torch.zeros(len(rirs), *rirs[0].shape[:2], max(rir.shape[-1] for rir in rirs))
        for row, rir in zip(full, rirs):
            row[..., :rir.shape[-1]] = torch.from_numpy(rir)
        length = torch.tensor([rir.shape[-1] for rir in rirs])
        audio = convolve_sources(dry.to(options.device), full.to(options.device), NUM_SAMPLES)
        measures = measure_rirs(RirBatch(full, None, length, SAMPLE_RATE), rooms)
        plain = {"gains": [1.0] * LAW.num_src, **_noise(math.inf, math.inf, [])}
        entries = [entry | {"simulator": f"pyroomacoustics {pyroomacoustics.__version__}"} | plain
                   for entry in _entries(options.speech, rooms, used, start)]
        clean = torch.full((len(rooms),), math.inf)
        yield _clips(audio, rooms, numbers[part], dry, measures, clean, entries, (dry,), frozenset(plain))


def _their_rirs(pyroomacoustics: ModuleType, scenes: SceneBatch, index: int) -> np.ndarray:
    """[mic, src, tap] float32 of one scene; the constant delay of its filters is cut off."""
    dim, rt60 = scenes.room_dim[index].numpy(), float(scenes.rt60[index])
    try:
        absorption, order = pyroomacoustics.inverse_sabine(rt60, dim)
    except ValueError:  # no absorption gives so short an RT60
        absorption, order = 0.99, MAX_ORDER_E2
    room = pyroomacoustics.ShoeBox(dim, fs=SAMPLE_RATE, materials=pyroomacoustics.Material(absorption),
                                   air_absorption=False, max_order=min(order, MAX_ORDER_E2))
    for src in scenes.src_pos[index].numpy():
        room.add_source(src)
    room.add_microphone_array(scenes.mic_pos[index].numpy().T)
    room.compute_rir()
    late = pyroomacoustics.constants.get("frac_delay_length") // 2
    length = max(len(rir) for row in room.rir for rir in row) - late
    rirs = np.zeros((len(room.rir), len(room.rir[0]), length), np.float32)
    for m, row in enumerate(room.rir):
        for s, rir in enumerate(row):
            rirs[m, s, :len(rir) - late] = rir[late:]
    return rirs


# ---- real rooms ----


def _real_rooms(options: SetOptions) -> Iterator[Clips]:
    """e3: two utterances of equal power through any two RIRs of one configuration, as they are.

    The clusters of a clip are its two loudspeaker positions. RIRs of one angle and distance are of one position,
    whatever the configuration of the room: what is hard about it may stay. Without distances, angles alone count.
    """
    rirs, places = measured_of(options)
    generator = rng.generator(SEEDS["e3"], rng.Split.TEST, rng.Stream.SCENE, 0)
    pairs = _draw_pairs(places, generator)
    generator = rng.generator(SEEDS["e3"], rng.Split.TEST, rng.Stream.SPEECH, 0)
    crops = draw_crops(options.speech, NUM_CLIPS_E3, 2, NUM_SAMPLES, Crop.FIRST, generator=generator)
    total, spacing = options.limit(NUM_CLIPS_E3), places[0]["mic_spacing_m"]
    t20, drr, energy = measure_alone(rirs[:, 0])
    distance = torch.tensor([place.get("distance_m", math.nan) for place in places], dtype=torch.float64)
    positions = [(place["cone_deg"], place.get("distance_m")) for place in places]
    position = torch.tensor([positions.index(key) for key in positions])
    cone = torch.deg2rad(torch.tensor([place["cone_deg"] for place in places], dtype=torch.float64))
    for start in range(0, total, BLOCK):
        part = slice(start, min(start + BLOCK, total))
        pair = pairs[part]
        used = CropBatch(crops.utterance[part], crops.offset[part])
        drawn = gather_crops(options.speech, used, NUM_SAMPLES)
        gains = 1 / drawn.square().mean(-1).sqrt().clamp(min=1e-6)      # [clip, src]
        dry = gains[..., None] * drawn
        response = rirs[pair].movedim(1, 2)                             # [clip, mic, src, tap]
        audio = convolve_sources(dry.to(options.device), response.to(options.device), NUM_SAMPLES)
        angle, loudness = cone[pair], energy[pair] + 10 * torch.log10(dry.double().square().sum(-1).clamp(min=1e-20))
        conditions = {"distance_m": distance[pair], "t20_s": t20[pair], "drr_db": drr[pair],
                      "snr_db": torch.full((len(pair),), math.inf, dtype=torch.float64),
                      "level_gap_db": (loudness[:, 0] - loudness[:, 1]).abs(),
                      "separation_deg": torch.rad2deg((angle[:, 0] - angle[:, 1]).abs()),
                      "angle_deg": torch.rad2deg(angle)}
        entries = [{"clip": start + index} | entry for index, entry in enumerate(
            _entries_of_measured([[places[place] for place in row] for row in pair.tolist()],
                                 _utterances(options.speech, used), used.offset.tolist(), gains.tolist()))]
        _tell_measured(entries, conditions)
        mic_pos = torch.tensor([[0.0, 0, 0], [spacing, 0, 0]], dtype=torch.float64).expand(len(pair), -1, -1)
        # In the plane of the array: the folded azimuth is the cone angle.
        yield Clips(audio, mic_pos, angle, angle, position[pair], conditions, entries, (drawn, response),
                    derived=frozenset(entries[0]) - {"rirs", "cone_deg", "utterances"})


def _entries_of_measured(pairs: list[list[dict[str, Any]]], utterances: list[list[str]], offsets: list[list[int]],
                         gains: list[list[float]]) -> list[dict[str, Any]]:
    """What is to be said of clips by what index.json says of their RIRs. gains: factors of the utterances."""
    return [{"rirs": [place["file"] for place in row],
             **{key: [place.get(key) for place in row] for key in ("cone_deg", *PLACE_OPTIONAL)},
             "mic_spacing_m": row[0]["mic_spacing_m"], "speed_of_sound": row[0]["speed_of_sound"],
             "utterances": names, "offsets": offset, "gains": gain, "diffuse_snr_db": None, "noise_seed": None}
            for row, names, offset, gain in zip(pairs, utterances, offsets, gains)]


def _draw_pairs(places: list[dict[str, Any]], generator: torch.Generator) -> Tensor:
    """[clip, 2] int64: two RIRs of one configuration, whatever their directions."""
    pairs = pairs_of(places)
    return torch.tensor(pairs)[torch.randint(len(pairs), (NUM_CLIPS_E3,), generator=generator)]


SETS: dict[str, Callable[[SetOptions], Iterator[Clips]]] = {
    "e0": _original, "e0b": _fresh, "e1": _fresh, "e1p": _planar,
    **{name: partial(_noisy, mixture) for name, mixture in NOISES.items()}, "e2": _other_simulator, "e3": _real_rooms}
SAME_CLIPS = {"e0b": "e1"}
FRESH = ("e0b", "e1", "e1p", *NOISES, "e2")  # scenes drawn from the law, any number of them
PLANAR = {"e1p", "e3"}  # sources at the height of the array, so that azimuth and cone angle are one
