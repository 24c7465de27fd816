"""Speech as one int16 tensor on the device, and batches of it as random crops gathered there: no data loader.

    python -m ssl_gpu.speech download dev-clean     fetch a LibriSpeech subset
    python -m ssl_gpu.speech info FOLDER            what is in a folder; decodes it into the cache
"""

import logging
import math
import os
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace
from enum import Enum

if __name__ == "__main__":
    from ssl_gpu.commandline import begin_command
    begin_command()                                                    # before torch is loaded

import torch
from torch import Tensor

from ssl_gpu.checks import check_fields
from ssl_gpu.commandline import Parser, end_with
from ssl_gpu.corpus import SpeechError, download_librispeech, load_corpus
from ssl_gpu.voices import synthesize_voices

log = logging.getLogger("ssl_gpu")


class Crop(Enum):
    """Where in an utterance a crop starts: anywhere it fits, or at its first sample."""

    RANDOM = "random"
    FIRST = "first"


@dataclass(frozen=True)
class SpeechConfig:
    """Which speech to use.

    train, eval: folders of audio in any layout; without one, the synthetic voices speak.
    clip_s: length of a crop, and so of every mixture, in seconds; an utterance that is shorter is followed by silence.
    crop: where crops start.
    cache_dir: where decoded folders are kept; by default $XDG_CACHE_HOME/ssl_gpu or ~/.cache/ssl_gpu.
    min_duration_s: files shorter than this are skipped.
    voices_speakers, voices_utterances, voices_duration_s: how many synthetic talkers, how many utterances each, and how
    long an utterance is.
    """

    train: str | None = None
    eval: str | None = None
    clip_s: float = 3.0
    crop: Crop = Crop.RANDOM
    cache_dir: str | None = None
    min_duration_s: float = 0.5
    voices_speakers: int = 64
    voices_utterances: int = 8
    voices_duration_s: float = 4.0

    def __post_init__(self) -> None:
        folder, number = "a folder name", "an integer >= 1"
        check_fields(self, "speech", train=folder, eval=folder, cache_dir=folder, voices_speakers=number,
                     voices_utterances=number)
        for name in ("train", "eval", "cache_dir"):
            if getattr(self, name) == "":
                raise ValueError(f"speech.{name} must be {folder} or null, got ''")
        for name in ("voices_speakers", "voices_utterances"):
            if getattr(self, name) < 1:
                raise ValueError(f"speech.{name} must be {number}, got {getattr(self, name)}")
        if not 0 <= self.min_duration_s < math.inf:
            raise ValueError(f"speech.min_duration_s must be >= 0, got {self.min_duration_s!r}")
        for name in ("clip_s", "voices_duration_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"speech.{name} must be > 0, got {getattr(self, name)!r}")


@dataclass(frozen=True, eq=False)
class SpeechBank:
    """Utterances one behind the other, sorted by speaker.

    samples: [total] int16, full scale 32768. start, length: [utterance] int64, in samples; between utterances may lie
    some that nobody is to hear. speaker: [utterance] int64,
    0 and up without gaps. speaker_start, speaker_count: [speaker] int64, each speaker's first utterance and how many
    follow. names: one per utterance. sample_rate: Hz. talkers: a label per speaker, by which banks are compared, of a
    file that is its own talker a digest of its bytes; empty for synthetic voices, which are nobody's.
    device: where gather_crops delivers; the tensors are there too, or else in pinned host memory when the bank was too
    large. draw_crops wants its generator on `samples.device`.
    """

    samples: Tensor
    start: Tensor
    length: Tensor
    speaker: Tensor
    speaker_start: Tensor
    speaker_count: Tensor
    names: tuple[str, ...]
    sample_rate: int
    device: torch.device
    talkers: tuple[str, ...] = ()

    @property
    def num_speakers(self) -> int:
        """How many talkers the bank tells apart."""
        return len(self.speaker_count)

    @property
    def duration_s(self) -> float:
        """Total length of the speech in seconds."""
        return int(self.length.sum()) / self.sample_rate

    def to(self, device: torch.device | str) -> "SpeechBank":
        """The same bank with all tensors on `device`."""
        device = torch.device(device)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
        return replace(self, **moved, device=device)


@dataclass(frozen=True, eq=False)
class CropBatch:
    """Which stretches of a bank to use: utterance and its first sample, each [batch, src] int64."""

    utterance: Tensor
    offset: Tensor


def make_bank(
    samples: Tensor, length: Tensor, speaker: Tensor, names: tuple[str, ...], sample_rate: int,
    talkers: tuple[str, ...] = (), start: Tensor | None = None,
) -> SpeechBank:
    """A bank on the device of `samples` [total] int16; length and speaker [utterance] int64 are sorted by speaker.
    start [utterance] int64: where utterances begin, None where they lie end to end."""
    speaker_count = torch.bincount(speaker)
    return SpeechBank(
        samples=samples,
        start=length.cumsum(0) - length if start is None else start,
        length=length,
        speaker=speaker,
        speaker_start=speaker_count.cumsum(0) - speaker_count,
        speaker_count=speaker_count,
        names=names,
        sample_rate=sample_rate,
        device=samples.device,
        talkers=talkers,
    )


def load_bank(
    folder: str | os.PathLike,
    cfg: SpeechConfig,
    *,
    sample_rate: int,
    device: torch.device | str,
    free_bytes: int | None = None,
    progress: bool = True,
    called: str = "speech folder",
    held_out: Collection[str] = (),
) -> SpeechBank:
    """The folder's speech at `sample_rate` (Hz), decoded or from the cache, ready to be cropped onto `device`.

    Speakers are those of LibriSpeech's layout, `<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac`; any other file
    counts as a speaker of its own, so two crops of a batch then differ in file but perhaps not in voice.
    free_bytes: what the device has left (None: plenty). A bank of more than half of it stays in pinned host memory.
    called: what errors call the folder. held_out: labels of talkers (SpeechBank.talkers) who are left out, with one
    warning for all of them.
    Raises SpeechError when the folder is missing, holds no audio, no usable audio, or only talkers who are left out.
    """
    device = torch.device(device)
    corpus = load_corpus(
        folder,
        sample_rate=sample_rate,
        min_duration_s=cfg.min_duration_s,
        cache_dir=cfg.cache_dir,
        progress=progress,
        called=called,
    )
    # A file that is its own talker is known by what is in it, wherever it lies and whatever it is called.
    by_content = {name: f"blake2b:{digest[:16]}" for name, digest in zip(corpus.names, corpus.digests)}
    talkers = {label: by_content.get(label, label) for label in dict.fromkeys(corpus.talker)}
    unwanted = set(held_out)
    out = {label for label, talker in talkers.items() if talker in unwanted}
    if len(out) == len(talkers):
        raise SpeechError(f"{called} must hold talkers who are not in speech.eval, got {len(out)}, all of whom are")
    if out:
        log.warning("warning: %d of the %d talkers of %s are in speech.eval, %s for one, and are left out of training",
                    len(out), len(talkers), called, min(out))
    keep = [row for row, label in enumerate(corpus.talker) if label not in out]
    order = {label: index for index, label in enumerate(label for label in talkers if label not in out)}
    speaker = torch.tensor([order[corpus.talker[row]] for row in keep])
    length = torch.tensor(corpus.length)
    # Samples of who is left out stay where they are: to close up would hold the corpus twice.
    bank = make_bank(corpus.samples, length[keep], speaker, tuple(corpus.names[row] for row in keep), sample_rate,
                     tuple(talkers[label] for label in order), start=(length.cumsum(0) - length)[keep])
    if device == bank.device or fits_on_device(corpus.samples.nbytes, free_bytes):
        return bank.to(device)
    return replace(bank, samples=bank.samples.pin_memory(), device=device)


def fits_on_device(num_bytes: int, free_bytes: int | None) -> bool:
    """Whether a bank may live on a device with `free_bytes` left: half of it stays free for training; None: always."""
    return free_bytes is None or num_bytes <= free_bytes // 2


def voices_bank(cfg: SpeechConfig, *, sample_rate: int, generator: torch.Generator) -> SpeechBank:
    """Synthetic voices at `sample_rate` (Hz), on the generator's device."""
    num_samples = math.ceil(cfg.voices_duration_s * sample_rate)
    shape = (cfg.voices_speakers, cfg.voices_utterances)
    voices = synthesize_voices(*shape, num_samples, sample_rate, generator=generator)
    index = torch.arange(math.prod(shape), device=voices.device)
    names = tuple(f"voice-{row // shape[1]:04d}-{row % shape[1]:04d}" for row in range(len(index)))
    return make_bank(voices.flatten(), torch.full_like(index, num_samples), index // shape[1], names, sample_rate)


def draw_crops(
    bank: SpeechBank, batch: int, num_src: int, num_samples: int, crop: Crop, *, generator: torch.Generator
) -> CropBatch:
    """Crops of `num_samples` for `batch` scenes of `num_src` different speakers, on the bank's device.

    Speakers come without replacement, with probability proportional to their number of utterances, so that the first
    is that of an utterance drawn uniformly; then an utterance of the speaker and, for Crop.RANDOM, an offset at which
    the crop fits, all uniform. An utterance shorter than the crop is taken from its start.
    Raises ValueError when the bank has fewer than `num_src` speakers or the generator is not where its tensors are.
    """
    if bank.num_speakers < num_src:
        raise SpeechError(f"speech must have at least {num_src} speakers, one per source, got {bank.num_speakers}")
    device = bank.samples.device
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on the speech bank's {device}, got {generator.device}")
    # a race of exponential clocks, each as fast as its speaker has utterances; the same law as Gumbel top-k
    share = torch.rand((batch, bank.num_speakers), dtype=torch.float32, device=device, generator=generator)
    clock = -torch.log1p(-share)
    speaker = (clock / bank.speaker_count).topk(num_src, largest=False).indices
    # float64: a float32 uniform has 2^24 values, coarser than the samples of a 20 minute file
    uniform = torch.rand((2, batch, num_src), dtype=torch.float64, device=device, generator=generator)
    utterance = bank.speaker_start[speaker] + (uniform[0] * bank.speaker_count[speaker]).long()
    if crop is Crop.FIRST:
        return CropBatch(utterance, torch.zeros_like(utterance))
    choices = (bank.length[utterance] - num_samples).clamp_min(0) + 1
    return CropBatch(utterance, (uniform[1] * choices).long())


def gather_crops(bank: SpeechBank, crops: CropBatch, num_samples: int) -> Tensor:
    """The crops as float32 [batch, src, sample] in [-1, 1) on the bank's device, zero after the utterance's end."""
    sample = torch.arange(num_samples, device=crops.offset.device)
    start = bank.start[crops.utterance] + crops.offset
    position = (start[..., None] + sample).clamp_(max=len(bank.samples) - 1)
    left = bank.length[crops.utterance] - crops.offset
    audio = bank.samples[position].masked_fill_(sample >= left[..., None], 0)
    if bank.device != audio.device:  # a bank in host memory: the copy must be pinned too, or it would not overlap
        audio = audio.pin_memory().to(bank.device, non_blocking=True)
    return audio.float() / 32768


def main(arguments: Iterable[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = Parser(prog="python -m ssl_gpu.speech", description="Fetch and inspect speech.")
    commands = parser.add_subparsers(dest="command", metavar="download|info", required=True)
    download = commands.add_parser("download", help="fetch a subset of LibriSpeech")
    download.add_argument("subset", help="dev-clean (338 MB, 5.4 hours), train-clean-100 (6.4 GB), ...")
    download.add_argument("--out", default="data/librispeech", help="folder to put it in (default: %(default)s)")
    about = "count a folder's utterances, speakers and hours, and how many files are of no use; fills the cache"
    info = commands.add_parser("info", help=about, description=about)
    info.add_argument("folder", help="audio in any layout; several channels of a file are mixed to one")
    info.add_argument("--sample-rate", type=int, default=16000, metavar="HZ",
                      help="that it is decoded to, and kept in the cache at (default: %(default)s)")
    info.add_argument("--cache-dir", help="default: $XDG_CACHE_HOME/ssl_gpu or ~/.cache/ssl_gpu")
    args = parser.parse_args(arguments)
    try:
        if args.command == "info" and args.sample_rate < 1:
            raise ValueError(f"--sample-rate must be >= 1 Hz, got {args.sample_rate}")
        if args.command == "download":
            print(download_librispeech(args.subset, args.out))
            return 0
        cfg = SpeechConfig(cache_dir=args.cache_dir)
        corpus = load_corpus(
            args.folder,
            sample_rate=args.sample_rate,
            min_duration_s=cfg.min_duration_s,
            cache_dir=cfg.cache_dir,
            progress=True,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    hours = len(corpus.samples) / args.sample_rate / 3600
    counts = {"utterance": len(corpus.names), "speaker": len(set(corpus.talker)), "file": corpus.skipped}
    utterances, speakers, files = (f"{count} {what}{'s' * (count != 1)}" for what, count in counts.items())
    megabytes = corpus.samples.nbytes / 1e6
    print(f"{utterances}, {speakers}, {hours:.2f} hours, {megabytes:.1f} MB at {args.sample_rate} Hz, {files} skipped")
    return 0


if __name__ == "__main__":
    end_with(main)
