"""The list of what to train and evaluate on: a JSON-lines file that layouts.py writes and every task reads.

    {"kind": "endomamba manifest", "version": 1, "classes": ["insertion", "withdrawal"]}
    {"path": "a.mp4", "start": 0, "stop": 900, "label": [[0, 400], [1, 500]], "split": "train"}
    {"path": "b.mp4", "start": 0, "stop": 150, "label": 1, "mask": "b.truth.jsonl", "split": "val"}

A line is a clip: frames start <= t < stop of a video file, a DICOM clip or a folder of pictures.  label: a class for
the whole clip, or runs [class, frames] that add up to it (class null: not known), or null; where several classes may
hold at a time, as for surgical triplets, a run is [[class, ...], frames].  mask, box and landmarks: a file or folder
that holds them, or null; targets.py says of which kinds.  Paths are relative to the manifest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..sources import FolderReader
from ..video import VideoError, open_video
from .errors import DataError
from .targets import TARGETS, check_targets

KIND = "endomamba manifest"
VERSION = 1
SPLITS = ("train", "val", "test")
VIDEOS = (".avi", ".dcm", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv")

Class = int | tuple[int, ...] | None
Label = int | tuple[tuple[Class, int], ...] | None
UNKNOWN = -100  # the class of a frame of which it is not known; it counts in no loss and no metric


@dataclass(frozen=True, slots=True)
class Entry:
    """Frames start <= t < stop of `path`.  label: a class, or runs (class, frames) or (classes, frames)."""

    path: str
    start: int
    stop: int
    label: Label = None
    mask: str | None = None
    box: str | None = None
    landmarks: str | None = None
    split: str = "train"

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.path}[{self.start}:{self.stop}]"

    def check(self, classes: int) -> None:
        """ValueError, without a file name, for what cannot be."""
        if not isinstance(self.path, str) or not self.path:
            raise ValueError(f"path must be a file name, got {self.path!r}")
        for value in (self.start, self.stop):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"start and stop must be frame numbers, got {self.start!r} and {self.stop!r}")
        if not 0 <= self.start < self.stop:
            raise ValueError(f"needs 0 <= start < stop, got start {self.start} and stop {self.stop}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        for label in itertools.chain.from_iterable(_sets(label) for label, _ in self._runs()):
            if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < classes:
                raise ValueError(f"label {label!r} is not one of the {classes} classes (0 to {classes - 1})")
        frames = sum(run for _, run in self._runs())
        if self.label is not None and frames != len(self):
            raise ValueError(f"its label covers {frames} frames, the clip has {len(self)}")
        for name in ("mask", "box", "landmarks"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} must be a path or null, got {getattr(self, name)!r}")

    def labels(self) -> np.ndarray:
        """(frames,) int64, the class of each, or UNKNOWN."""
        values, runs = zip(*((UNKNOWN if label is None else label, run) for label, run in self._runs()))
        return np.repeat(np.array(values, np.int64), runs)

    def label_sets(self, classes: int) -> np.ndarray:
        """(frames, classes) int64: 1 for those that hold in each, or UNKNOWN."""
        values, runs = zip(*self._runs())
        rows = np.zeros((len(values), classes), np.int64)
        for row, label in zip(rows, values):
            row[list(_sets(label)) if label is not None else slice(None)] = UNKNOWN if label is None else 1
        return np.repeat(rows, runs, axis=0)

    @property
    def has_sets(self) -> bool:
        """Whether its label names several classes a frame."""
        return any(isinstance(label, tuple) for label, _ in self._runs())

    def _runs(self) -> Sequence[tuple[Class, int]]:
        if self.label is None:
            return ()
        return ((self.label, len(self)),) if isinstance(self.label, int) else self.label


def _sets(label: Class) -> tuple[int, ...]:
    return label if isinstance(label, tuple) else () if label is None else (label,)


@dataclass(frozen=True)
class Manifest:
    path: Path
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]

    def split(self, name: str) -> tuple[Entry, ...]:
        """Its entries; DataError where there are none."""
        found = tuple(entry for entry in self.entries if entry.split == name)
        if not found:
            raise DataError(f"{self.path}: has no clip of split {name!r}")
        return found

    def file(self, name: str) -> Path:
        return self.path.parent / name


def digest(entries: Iterable[Entry]) -> str:
    """Tells whether a run goes on with the data it began with."""
    text = json.dumps([asdict(entry) for entry in entries], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---- reading and writing


def read(path: str | os.PathLike) -> Manifest:
    """Checked line by line; opens no video.  DataError with file and line."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    header = _json(path, 1, lines[0]) if lines else {}
    if header.get("kind") != KIND or header.get("version") != VERSION:
        raise DataError(f"{path}: is no manifest: its first line must be a header of kind {KIND!r}, version {VERSION}")
    classes = header.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise DataError(f"{path}: its header must list the names of the classes, got {classes!r}")
    entries = []
    for number, line in enumerate(lines[1:], 2):
        if line.strip():
            entries.append(_entry(path, number, _json(path, number, line), len(classes)))
    if not entries:
        raise DataError(f"{path}: lists no clip")
    return Manifest(path, tuple(classes), tuple(entries))


def _json(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number}: is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: must be an object, got {line[:40]}")
    return row


def _entry(path: Path, number: int, row: dict[str, Any], classes: int) -> Entry:
    try:
        if isinstance(row.get("label"), list):
            runs = ((tuple(label) if isinstance(label, list) else label, run) for label, run in row["label"])
            row["label"] = tuple(runs)
        entry = Entry(**row)
        entry.check(classes)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}, line {number}: {str(error).removeprefix('Entry.__init__() ')}") from None
    return entry


def write(path: str | os.PathLike, classes: Sequence[str], entries: Iterable[Entry]) -> Manifest:
    """Whole or not at all."""
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    lines = [{"kind": KIND, "version": VERSION, "classes": list(classes)}]
    for entry in entries:
        lines.append({name: value for name, value in asdict(entry).items() if value is not None})
    try:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return read(path)


# ---- check


def check(manifest: Manifest) -> Iterator[tuple[Entry, str]]:
    """Decodes every file once -> each entry with what is wrong with it, "" where nothing is."""
    known: dict[str, tuple[int, str]] = {}
    for entry in manifest.entries:
        if entry.path not in known:
            known[entry.path] = _decode_all(manifest.file(entry.path))
        frames, why = known[entry.path]
        if not why and frames < entry.stop:
            why = f"frames up to {entry.stop} are listed, the file holds {frames}"
        yield entry, why or _check_beside(manifest, entry, frames)


def _decode_all(path: Path) -> tuple[int, str]:
    """-> how many frames came out, and in words what was wrong."""
    try:
        with FolderReader(path) if path.is_dir() else open_video(path, size=32) as reader:
            frames = sum(1 for _ in reader)
    except VideoError as error:
        return 0, str(error).removeprefix(f"{path} ")
    return frames, str(reader.damage)


def _check_beside(manifest: Manifest, entry: Entry, frames: int) -> str:
    for target in TARGETS:
        name = getattr(entry, target)
        if name is None:
            continue
        path = manifest.file(name)
        if not path.exists():
            return f"{name} does not exist"
        why = check_targets(target, path, frames, entry.start, entry.stop)
        if why:
            return why
    return ""
