"""What every converter needs to list the clips of a folder."""

from __future__ import annotations

import csv
import itertools
import os
import re
from pathlib import Path

import numpy as np

from ..clips import count_frames
from ..sources import PICTURES
from ..video import VideoError
from .errors import DataError
from .manifest import VIDEOS, Entry

Listed = tuple[tuple[str, ...], list[Entry]]  # names of the classes, and the clips
Folder = str | os.PathLike


def run_lengths(labels: np.ndarray) -> tuple[tuple[int | None, int], ...]:
    """(frames,) -> runs (class, frames); below 0 the class is None."""
    edges = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1, append=labels[-1] - 1))
    return tuple(
        (int(labels[at]) if labels[at] >= 0 else None, int(until - at)) for at, until in itertools.pairwise(edges)
    )


def open_folder(folder: Folder) -> Path:
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: is not a folder")
    return Path(folder)


def videos_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in VIDEOS)


def read_rows(path: Path, delimiter: str = ",") -> list[list[str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # spreadsheets begin a file with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return list(csv.reader(lines, delimiter=delimiter))


def last_number(name: str) -> int:
    """The last number in a name, -1 without one."""
    return int(next(iter(reversed(re.findall(r"\d+", name))), -1))


def at_least_one(entries: list[Entry], root: Path, what: str) -> list[Entry]:
    if not entries:
        raise DataError(f"{root}: holds no {what}")
    return entries


def frames_of(path: Path) -> int:
    try:
        if not path.is_dir():
            return count_frames(path)
        return sum(1 for file in path.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith("."))
    except VideoError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def whole_clip(root: Path, path: Path, label: int | None, split: str) -> Entry:
    if not path.is_relative_to(root) or ".." in path.parts[len(root.parts) :]:
        raise DataError(f"{path}: a list below {root} must name files below it")
    return Entry(path.relative_to(root).as_posix(), 0, frames_of(path), label, split=split)
