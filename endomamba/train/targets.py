"""Masks, boxes and landmarks of the frames of a clip, read from the files that a manifest names beside its video.

    *.truth.jsonl         of `endomamba synth`: masks and boxes of polyps, landmarks
    a folder of pictures  masks: picture i (by the numbers in the names) belongs to frame i; what is bright is marked.
                          As boxes: around each mask
    *.places.jsonl        landmarks and boxes of one's own: a header, then a line for each frame that has any,
                          {"kind": "endomamba places", "size": [h, w], "landmarks": ["tip", "papilla"]}
                          {"frame": 7, "landmarks": [[1, 31.5, 40.0], [0, 0, 0]], "boxes": [[10, 12, 50, 60]]}

Pixels are counted from the middle of the first one, a box ends before x1 and y1, as in the truth of the generator.
What is read is given from 0 to 1 across the picture.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..clips import read_frames
from ..sources import FolderReader
from ..synthetic import LANDMARKS, TruthError, load_truth
from ..video import VideoError
from .augment import Change
from .errors import DataError

IGNORED = 255  # a pixel of a mask that counts in no loss and no metric
BOXES = 8  # boxes of a frame at most, the largest
BRIGHT = 127  # grey level; what is above it is marked
KIND = "endomamba places"
TARGETS = ("mask", "box", "landmarks")


def read_target(name: str, path: Path, numbers: Sequence[int], change: Change) -> Tensor:
    """A target of the frames `numbers`, changed as their pictures are.

    "mask": (t, size, size) uint8, 1 where marked.  "box": (t, BOXES, 4), x0, y0, x1, y1, NaN where there is none.
    "landmarks": (t, K, 3), visible (0 or 1), x, y; one that is cropped away is not visible, and NaN there.
    DataError, a VideoError for a picture that cannot be read.
    """
    unique = sorted(set(numbers))
    rows = [unique.index(number) for number in numbers]
    if name == "mask":
        return change.masks(torch.from_numpy(read_masks(path, unique)), outside=0)[rows]
    if name == "box":
        return change.boxes(torch.from_numpy(read_boxes(path, unique)))[rows]
    return _visible(torch.from_numpy(read_landmarks(path, unique)), change)[rows]


def _visible(landmarks: Tensor, change: Change) -> Tensor:
    xy = change.points(landmarks[..., 1:])
    seen = (landmarks[..., 0] > 0) & ((xy >= 0) & (xy < 1)).all(-1)
    return torch.cat((seen[..., None].float(), xy.masked_fill(~seen[..., None], float("nan"))), -1)


def read_masks(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """(t, h, w) uint8 of 0 and 1, of the size that the file has."""
    if _is_truth(path):
        truth, at = _truth(path, numbers)
        return truth.masks()[at].view(np.uint8)
    if path.is_dir():
        return (read_frames(path, numbers).float().mean(-1) > BRIGHT).numpy().view(np.uint8)
    raise DataError(f"{path}: masks are read from a folder of pictures or a *.truth.jsonl")


def read_boxes(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """(t, BOXES, 4) fp32 from 0 to 1, the largest first, NaN where there are fewer."""
    if _is_truth(path):
        truth, at = _truth(path, numbers)
        h = w = truth.header["size"]
        found = [[polyp.box for polyp in truth.polyps[i]] for i in at]
    elif path.is_dir():
        masks = read_masks(path, numbers)
        (h, w), found = masks.shape[1:], [_around(mask) for mask in masks]
    else:
        (h, w), _, lines = _places(path)
        found = [lines.get(number, {}).get("boxes", []) for number in numbers]
    out = np.full((len(found), BOXES, 4), np.nan, np.float32)
    for row, boxes in zip(out, found):
        largest = sorted(boxes, key=lambda box: -(box[2] - box[0]) * (box[3] - box[1]))[:BOXES]
        for place, box in zip(row, largest):
            place[:] = np.array(box) / (w, h, w, h)
    return out


def read_landmarks(path: Path, numbers: Sequence[int]) -> np.ndarray:
    """(t, K, 3) fp32: visible, x and y from 0 to 1, NaN where not visible."""
    if _is_truth(path):
        truth, at = _truth(path, numbers)
        h = w = truth.header["size"]
        out = truth.landmarks[at].copy()
    else:
        (h, w), names, lines = _places(path)
        hidden = [[0, 0, 0]] * len(names)
        found = [lines.get(number, {}).get("landmarks", hidden) for number in numbers]
        out = np.array(found, np.float32)
        out[..., 1:][out[..., 0] == 0] = np.nan
    out[..., 1:] = (out[..., 1:] + 0.5) / (w, h)
    return out


def landmark_names(path: Path) -> tuple[str, ...]:
    return tuple(LANDMARKS) if _is_truth(path) else _places(path)[1]


def check_targets(name: str, path: Path, frames: int, start: int, stop: int) -> str:
    """In words what is wrong with a target for frames start <= t < stop of a video of `frames`, "" where nothing is."""
    try:
        if _is_truth(path):
            load_truth(path, start, stop)
        elif path.is_dir():
            with FolderReader(path) as reader:
                brightest = [float(frame.rgb.float().mean(-1).max()) for frame in reader]
            count, most = len(brightest), max(brightest, default=0)
            if 0 < most <= BRIGHT:
                return f"{path.name}: what is brighter than {BRIGHT} of 255 is marked, its masks hold {most:g} at most"
            if reader.damage:
                return f"{path.name}: {reader.damage}"
            if count != frames:
                return f"{path.name} holds {count} masks, the video {frames} frames"
        else:
            _places(path)
            if name == "mask":
                return f"{path.name}: masks are read from a folder of pictures or a *.truth.jsonl"
    except (ValueError, VideoError) as error:
        return str(error)
    return ""


# ---- files


def _is_truth(path: Path) -> bool:
    return path.name.endswith(".truth.jsonl")


def _truth(path: Path, numbers: Sequence[int]) -> tuple[Any, list[int]]:
    """The part of a truth file that holds the frames `numbers`, and where they are in it."""
    try:
        truth = load_truth(path, numbers[0], numbers[-1] + 1)
    except TruthError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return truth, [number - numbers[0] for number in numbers]


def _around(mask: np.ndarray) -> list[tuple[int, int, int, int]]:
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [(xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)] if len(ys) else []


def _places(path: Path) -> tuple[tuple[int, int], tuple[str, ...], dict[int, dict[str, Any]]]:
    """A places file -> size, names of the landmarks, and the lines by their frames, checked."""
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    return _read_places(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=64)
def _read_places(
    path: Path, modified: int, size: int
) -> tuple[tuple[int, int], tuple[str, ...], dict[int, dict[str, Any]]]:
    """Once a process and state of the file: every clip of a video asks for it."""
    try:
        header, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if header.get("kind") != KIND:
            raise ValueError(f"its first line must be a header of kind {KIND!r}")
        (h, w), names = header["size"], tuple(header.get("landmarks", ()))
        if not (h > 0 and w > 0):
            raise ValueError(f"size must be [height, width] in pixels, got {header['size']}")
        for row in rows:
            marks, boxes = (np.array(row.get(part, []), np.float32) for part in ("landmarks", "boxes"))
            if "landmarks" in row and marks.shape != (len(names), 3):
                raise ValueError(f"frame {row['frame']} must have {len(names)} landmarks of [visible, x, y]")
            if boxes.size and boxes.shape[1:] != (4,):
                raise ValueError(f"frame {row['frame']} must have boxes of [x0, y0, x1, y1]")
        return (h, w), names, {row["frame"]: row for row in rows}
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: is no list of places ({what})") from None
