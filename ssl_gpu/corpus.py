"""A folder of audio in any layout, decoded once into int16 at one sample rate and kept in a cache keyed by content."""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import tarfile
import tempfile
import uuid
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar

import numpy as np
import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

from ssl_gpu.commandline import bar_interval

AUDIO_SUFFIXES = (".flac", ".ogg", ".opus", ".wav")
CACHE_VERSION = 2  # part of the cache key: raise it when decoding or the cache's layout changes
MAX_RESAMPLE_TAPS = 1 << 26  # 256 MB of float32; 22,255 Hz -> 16 kHz needs 14 M taps, 44,101 Hz -> 16 kHz 700 M
RESAMPLE_BLOCK = 1 << 20  # samples resampled at a time
LIBRISPEECH_SUBSETS = (
    "dev-clean", "dev-other", "test-clean", "test-other", "train-clean-100", "train-clean-360", "train-other-500",
)
# refused or broken connections and full disks; wrong checksums; archives that do not unpack; no torchaudio
DOWNLOAD_ERRORS = (
    OSError, HTTPException, RuntimeError, ValueError, EOFError, zlib.error, tarfile.TarError, ImportError,
)
LIBRISPEECH_STEM = re.compile(r"(\d+)-(\d+)-\d+")

T = TypeVar("T")
log = logging.getLogger("ssl_gpu")


class SpeechError(ValueError):
    """A corpus that cannot be used; the message is one line for the user."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Decoded utterances end to end, in host memory, sorted by talker and then by name.

    samples: [total] int16, full scale 32768. length: samples in each utterance. talker: one label per utterance.
    names: file names relative to the folder, with forward slashes. skipped: how many files were unusable, of which
    first_skipped names one and says why ("" when there are none). digests: one of each file's bytes.
    """

    samples: Tensor
    length: tuple[int, ...]
    talker: tuple[str, ...]
    names: tuple[str, ...]
    sample_rate: int
    skipped: int
    first_skipped: str
    digests: tuple[str, ...] = ()


def load_corpus(
    folder: str | os.PathLike, *, sample_rate: int, min_duration_s: float, cache_dir: str | None, progress: bool,
    called: str = "speech folder"
) -> Corpus:
    """Every audio file below `folder` as int16 at `sample_rate` (Hz), from the cache when the contents are unchanged.

    Files that are unreadable, empty, silent, shorter than `min_duration_s` (s) or not finite are skipped, with one
    warning for all of them. A cache that is damaged is rebuilt; one that cannot be written costs a warning.
    called: what errors call the folder.
    Raises SpeechError when the folder is missing, holds no audio or none that is usable, or has to be resampled without
    torchaudio.
    """
    if sample_rate < 1:
        raise SpeechError(f"sample rate must be >= 1 Hz, got {sample_rate}")
    root, names = find_audio(folder, called)
    files = sorted((talker_label(root, name), name) for name in names)
    with ThreadPoolExecutor(_workers()) as pool:
        digests = pool.map(lambda item: _file_digest(root / item[1]), files)
        digests = list(_bar(digests, "hashing speech", len(files), progress))
        key = json.dumps([CACHE_VERSION, sample_rate, float(min_duration_s), files, digests])
        path = cache_folder(cache_dir) / f"{hashlib.blake2b(key.encode(), digest_size=20).hexdigest()}.npz"
        corpus = _read_cache(path)
        if corpus is None:
            decoded = pool.map(lambda item: decode(root / item[1], sample_rate, min_duration_s), files)
            corpus = _join(files, _bar(decoded, "decoding speech", len(files), progress), sample_rate)
            _write_cache(path, corpus)
    digest_of = {name: digest for (_, name), digest in zip(files, digests)}
    corpus = replace(corpus, digests=tuple(map(digest_of.get, corpus.names)))
    if not corpus.names:
        raise SpeechError(
            f"{called} must hold usable audio, skipped all {corpus.skipped} files of {str(folder)!r}; "
            f"first: {corpus.first_skipped}"
        )
    if corpus.skipped:
        log.warning(
            "warning: skipped %d of %d speech files in %s; first: %s",
            corpus.skipped, len(files), folder, corpus.first_skipped,
        )
    return corpus


def find_audio(folder: str | os.PathLike, called: str = "speech folder") -> tuple[Path, list[str]]:
    """The folder's full path, and the names of its audio files below it. Raises SpeechError for a folder that is none,
    cannot be read, or holds no audio."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise SpeechError(f"{called} must be an existing folder, got {str(folder)!r}")
    root = root.resolve()
    names = audio_files(root, called)
    if not names:
        raise SpeechError(f"{called} must hold audio ({', '.join(AUDIO_SUFFIXES)}), found none in {str(folder)!r}")
    return root, names


def audio_files(root: Path, called: str = "speech folder") -> list[str]:
    """Relative names of the audio files below `root`, sorted; hidden names (and so macOS's "._x.flac") are left out.

    Links to folders are followed, since corpora are often linked together; a link back up is not entered twice.
    """

    def refuse(error: OSError) -> None:
        raise SpeechError(f"{called} must be readable, got {error.filename!r}: {error.strerror}")

    names, entered = [], set()
    for where, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        folders[:] = [folder for folder in sorted(folders) if not folder.startswith(".")]
        if os.path.realpath(where) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(where))
        for file in files:
            path = Path(where, file)
            if path.suffix.lower() in AUDIO_SUFFIXES and not file.startswith(".") and path.is_file():
                names.append(path.relative_to(root).as_posix())
    return sorted(names)


def talker_label(root: Path, name: str) -> str:
    """The speaker of `<speaker>/<chapter>/<speaker>-<chapter>-<number>.<suffix>`; any other file is its own talker."""
    path = root / name
    match = LIBRISPEECH_STEM.fullmatch(path.stem)
    if match and (path.parent.parent.name, path.parent.name) == match.groups():
        return match[1]
    return name


def decode(path: Path, sample_rate: int, min_duration_s: float) -> np.ndarray | str:
    """One file as mono int16 [sample] at `sample_rate` (Hz), or the reason for skipping it."""
    try:
        # float32, because libsndfile's own int16 reading wraps round where lossy audio overshoots full scale
        audio, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, ValueError) as error:
        return "unreadable: " + " ".join(str(error).split())
    if len(audio) == 0:
        return "no samples"
    if len(audio) < min_duration_s * file_rate:
        return f"{len(audio) / file_rate:.3g} s, shorter than speech.min_duration_s = {min_duration_s:g}"
    mono = audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1)
    if not np.isfinite(mono).all():
        return "samples that are not finite"
    if (problem := resample_problem(file_rate, sample_rate)) is not None:
        return problem
    if file_rate != sample_rate:
        mono = resample(mono, file_rate, sample_rate)
    samples = np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16)
    return samples if samples.any() else "nothing but silence"


def resample_problem(file_rate: int, sample_rate: int) -> str | None:
    """Why there is no filter between two rates in Hz, None where memory holds it."""
    step = math.gcd(file_rate, sample_rate)
    taps = file_rate // step * (sample_rate // step)
    if file_rate == sample_rate or taps <= MAX_RESAMPLE_TAPS:
        return None
    return (f"{file_rate} Hz has too small a common factor with {sample_rate} Hz, {step}: the filter must have at most "
            f"{MAX_RESAMPLE_TAPS / 1e6:.4g} million taps, has {taps / 1e6:.4g}; resample the audio beforehand")


def resample(audio: np.ndarray, file_rate: int, sample_rate: int) -> np.ndarray:
    """[..., sample] float32 at `file_rate` (Hz) -> [..., ceil(sample * sample_rate / file_rate)] at `sample_rate`.

    Block by block: torchaudio holds some forty values per sample, 1 GB for five minutes of 48 kHz in two channels.
    Raises SpeechError where torchaudio is not installed.
    """
    try:
        from torchaudio.functional import resample as to_rate  # here: the right rate needs no torchaudio
    except ImportError as error:
        raise SpeechError(f"audio at {file_rate} Hz needs torchaudio to become {sample_rate} Hz: {error}") from error
    whole = file_rate // math.gcd(file_rate, sample_rate)              # samples that become a whole number of new ones
    # torchaudio's filter reaches 6 / 0.99 zero crossings of the lower rate to each side.
    margin = whole * math.ceil(7 * max(1.0, file_rate / sample_rate) / whole)
    block = max(RESAMPLE_BLOCK // whole, 1) * whole
    parts = []
    for start in range(0, audio.shape[-1], block):
        first = max(start - margin, 0)
        part = torch.from_numpy(audio[..., first:start + block + margin])
        skip, size = ((count * sample_rate + file_rate - 1) // file_rate
                      for count in (start - first, min(block, audio.shape[-1] - start)))
        parts.append(to_rate(part, file_rate, sample_rate)[..., skip:skip + size])
    return torch.cat(parts, -1).numpy()


def cache_folder(cache_dir: str | None) -> Path:
    """`cache_dir`, else $XDG_CACHE_HOME/ssl_gpu, else ~/.cache/ssl_gpu."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_gpu"


def _bar(items: Iterable[T], title: str, total: int, progress: bool) -> Iterable[T]:
    return tqdm(items, title, total, unit="file", disable=not progress, mininterval=bar_interval())


def _workers() -> int:
    """One thread per core this process may use, and one more to cover waiting for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + 1


def _file_digest(path: Path) -> str:
    """blake2b of the file's bytes; a file that cannot be read gets the error instead, so its cache ends when it can."""
    digest = hashlib.blake2b(digest_size=20)
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return digest.hexdigest()


def _join(files: list[tuple[str, str]], decoded: Iterable[np.ndarray | str], sample_rate: int) -> Corpus:
    """Append each utterance to one growing buffer: a list joined at the end would hold the corpus twice."""
    buffer, length, talker, names, skipped = bytearray(), [], [], [], []
    for (label, name), audio in zip(files, decoded, strict=True):
        if isinstance(audio, str):
            skipped.append(f"{name} ({audio})")
            continue
        buffer += audio.data
        length.append(len(audio))
        talker.append(label)
        names.append(name)
    samples = torch.frombuffer(buffer, dtype=torch.int16) if buffer else torch.empty(0, dtype=torch.int16)
    first = skipped[0] if skipped else ""
    return Corpus(samples, tuple(length), tuple(talker), tuple(names), sample_rate, len(skipped), first)


def _read_cache(path: Path) -> Corpus | None:
    """The corpus in `path`, or None when there is none or it is damaged (the zip's checksums cover every byte)."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            samples, meta = torch.from_numpy(file["samples"]), json.loads(file["meta"].tobytes())
        rows = [tuple(meta.pop(field)) for field in ("length", "talker", "names")]
        if samples.dtype != torch.int16 or sum(rows[0]) != len(samples) or len({len(row) for row in rows}) != 1:
            raise ValueError("lengths and samples disagree")
        return Corpus(samples, *rows, **meta)
    except Exception as error:  # damage shows as whatever the zip, npy or JSON reader trips over; none is worth a halt
        log.warning("warning: rebuilding the damaged speech cache %s (%s)", path, " ".join(str(error).split()))
        return None


def _write_cache(path: Path, corpus: Corpus) -> None:
    """Write to a temporary name, then rename: no reader, and no other process, ever sees half a cache."""
    meta = {field: getattr(corpus, field) for field in Corpus.__dataclass_fields__
            if field not in ("samples", "digests")}
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            np.savez(file, samples=corpus.samples.numpy(), meta=np.frombuffer(json.dumps(meta).encode(), np.uint8))
        os.replace(temporary, path)
    except OSError as error:
        log.warning("warning: speech cache %s cannot be written (%s); the speech is decoded again next time", path,
                    error.strerror or error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def download_librispeech(subset: str, out: str | os.PathLike) -> Path:
    """Fetch a subset of LibriSpeech with torchaudio's data set class; its folder, `out`/LibriSpeech/`subset`.

    The archive is fetched, checked against torchaudio's SHA-256 and unpacked under a temporary name in `out`; the
    folder appears when it is complete, and one that is already there is left alone.
    Raises SpeechError for an unknown subset and for whatever goes wrong on the way.
    """
    if subset not in LIBRISPEECH_SUBSETS:
        raise SpeechError(f"LibriSpeech subset must be one of {', '.join(LIBRISPEECH_SUBSETS)}, got {subset!r}")
    folder = Path(out) / "LibriSpeech" / subset
    if folder.is_dir():
        return folder
    try:
        from torchaudio.datasets import LIBRISPEECH  # here, so that nothing else needs torchaudio

        os.makedirs(out, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{subset}.", suffix=".partial", dir=out) as temporary:
            if not len(LIBRISPEECH(temporary, url=subset, download=True)):
                raise ValueError("the archive holds no utterances")
            folder.parent.mkdir(exist_ok=True)
            os.replace(Path(temporary) / "LibriSpeech" / subset, folder)
    except DOWNLOAD_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SpeechError(f"LibriSpeech {subset} could not be fetched into {str(out)!r}: {reason}") from error
    return folder
