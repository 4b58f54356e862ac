"""What is true of each frame, as a text file beside the video: a header, then one JSON line a frame.

    {"kind": "endomamba synthetic truth", "generator": 1, "hash": ..., "variant": "base", "split": "train", ...}
    {"frame": 0, "time": 0.0, "phase": "insertion", "motif": "travel", "depth": 0.01, "position": [x, y, s],
     "polyps": [{"id": 2, "kind": "flat", "box": [x0, y0, x1, y1], "mask": {"size": [h, w], "counts": [...]}}],
     "landmarks": [[visible, x, y], ...]}

Lines, because a clip is read without the rest of the file, and any tool can.  Masks are COCO's run lengths (down the
columns, zeros first; pycocotools' `frPyObjects` takes them as they are): lossless and about 0.5 kB a polyp, where a
mask video would need a second decoder kept in step with the first, and PNGs would be some thousand files.

Pixels are counted from the middle of the first one, x to the right; a box ends before x1 and y1.  depth and position
are in radii of the colon; depth is the distance along it, position (x, y) across it and the depth once more.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .params import VERSION
from .procedure import MOTIFS, PHASES, View
from .render import SIGHT, Picture

KIND = "endomamba synthetic truth"
LANDMARKS = ("lumen", "polyp", "stump", "tool_tip", "fold_1", "fold_2")
_KEYS = ("frame", "time", "phase", "motif", "depth", "position", "polyps", "landmarks")


class TruthError(ValueError):
    """This file is not a truth file that can be trusted.  The message names file and line."""


@dataclass(frozen=True, slots=True)
class PolypTruth:
    """id: the polyp's, the same in all frames of the video.  box: (x0, y0, x1, y1), around mask, (h, w) bool."""

    id: int
    kind: str
    box: tuple[int, int, int, int]
    mask: np.ndarray


@dataclass(frozen=True, slots=True)
class Truth:
    """Frames start <= t < start + n of one video.

    phase: (n,) int64, indices of PHASES.  motif: of MOTIFS.  time: (n,) seconds.  landmarks: (n, K, 3) float32,
    visible (0 or 1), x, y, NaN where not visible.  depth: (n,), position: (n, 3) float32.  polyps: of each frame.
    """

    header: dict[str, Any]
    start: int
    time: np.ndarray
    phase: np.ndarray
    motif: tuple[str, ...]
    landmarks: np.ndarray
    depth: np.ndarray
    position: np.ndarray
    polyps: tuple[tuple[PolypTruth, ...], ...]

    def __len__(self) -> int:
        return len(self.phase)

    def masks(self) -> np.ndarray:
        """(n, h, w) bool: any polyp."""
        size = self.header["size"]
        masks = np.zeros((len(self), size, size), bool)
        for mask, polyps in zip(masks, self.polyps):
            for polyp in polyps:
                mask |= polyp.mask
        return masks


def frame_truth(t: int, fps: float, phase: str, motif: str, view: View, picture: Picture) -> dict[str, Any]:
    """The line of frame t."""
    anatomy, polyps = picture.scene.anatomy, []
    ids = np.unique(picture.polyps)
    for i in ids[ids > 0].astype(int):
        mask = picture.polyps == i
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box = [int(v) for v in (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)]
        polyps.append({"id": int(i) - 1, "kind": anatomy.polyps[i - 1].kind, "box": box, "mask": encode_mask(mask)})
    return {
        "frame": t,
        "time": round(t / fps, 6),
        "phase": phase,
        "motif": motif,
        "depth": round(view.depth, 5),
        "position": [round(value, 5) for value in (view.x, view.y, view.depth)],
        "polyps": polyps,
        "landmarks": _landmarks(view, picture),
    }


def _landmarks(view: View, picture: Picture) -> list[list[float]]:
    """[visible, x, y] for each of LANDMARKS.

    lumen: the farthest point of the centre line that is seen, up to 4 radii ahead.  polyp: the middle of the head of
    the polyp that fills most of the picture.  stump: of the nearest removed polyp.  fold_1, fold_2: the highest side
    of the next two folds.
    """
    scene = picture.scene
    found: dict[str, tuple[float, float] | None] = dict.fromkeys(LANDMARKS)
    ahead = view.depth + np.arange(0.6, 4.01, 0.2)
    pixels, far = scene.project(np.stack([*scene.anatomy.centre(ahead), ahead], 1))
    for pixel, distance in zip(pixels, far):
        if not _is_clear(picture, pixel) or picture.distance[_cell(pixel)] < distance - 0.05:
            break
        found["lumen"] = tuple(pixel)
    areas = np.bincount(picture.polyps.ravel())[1:]
    if areas.any():
        index = int(areas.argmax())
        pixel = scene.project(scene.head(index)[None])[0][0]
        if _is_clear(picture, pixel) and picture.polyps[_cell(pixel)] == index + 1:
            found["polyp"] = tuple(pixel)
    if scene.wounds:
        nearest = scene.anatomy.polyps[min(scene.wounds, key=lambda i: abs(scene.anatomy.polyps[i].s - view.depth))]
        found["stump"] = _on_wall(picture, nearest.s, nearest.theta)
    if picture.tool_tip is not None and _is_inside(picture, picture.tool_tip):
        found["tool_tip"] = picture.tool_tip
    folds = [fold for fold in scene.anatomy.folds if fold[0] > view.depth + 0.3]
    for name, fold in zip(("fold_1", "fold_2"), folds):
        found[name] = _on_wall(picture, *fold)
    places = (found[name] for name in LANDMARKS)
    return [[1, round(float(at[0]), 2), round(float(at[1]), 2)] if at else [0, 0.0, 0.0] for at in places]


def _on_wall(picture: Picture, s: float, theta: float) -> tuple[float, float] | None:
    """The pixel of a point of the wall, where the picture shows it and not something in front of it."""
    pixels, far = picture.scene.project(picture.scene.anatomy.wall(s, theta)[None])
    pixel = pixels[0]
    if not _is_clear(picture, pixel) or picture.polyps[_cell(pixel)] or far[0] > SIGHT:
        return None
    return tuple(pixel) if abs(picture.distance[_cell(pixel)] - far[0]) < 0.04 + 0.06 * far[0] else None


def _cell(pixel: Any) -> tuple[int, int]:
    return int(np.rint(pixel[1])), int(np.rint(pixel[0]))


def _is_inside(picture: Picture, pixel: Any) -> bool:
    (y, x), (h, w) = _cell(pixel), picture.clear.shape
    return 0 <= y < h and 0 <= x < w and bool(picture.opening[y, x])


def _is_clear(picture: Picture, pixel: Any) -> bool:
    return _is_inside(picture, pixel) and bool(picture.clear[_cell(pixel)])


def encode_mask(mask: np.ndarray) -> dict[str, list[int]]:
    """(h, w) bool -> COCO's uncompressed run lengths."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    if len(edges) and edges[-1] == mask.size:
        counts = counts[:-1]
    return {"size": [int(n) for n in mask.shape], "counts": [int(n) for n in counts]}


def decode_mask(rle: dict[str, list[int]]) -> np.ndarray:
    """The inverse of `encode_mask`; ValueError where the runs do not fill the picture."""
    (h, w), counts = rle["size"], np.asarray(rle["counts"])
    if counts.ndim != 1 or counts.dtype.kind != "i" or (counts < 0).any() or counts.sum() != h * w:
        raise ValueError(f"the runs of a mask must be counts that add up to {h} x {w} pixels, got {counts.sum()}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(h, w, order="F")


# ---- reading


def load_truth(path: str | os.PathLike, start: int = 0, stop: int | None = None) -> Truth:
    """Frames start <= t < stop of a truth file, checked; stop: None for all.

    Raises TruthError where the file is damaged, edited, or of another generator; FileNotFoundError as `open` does.
    """
    path = Path(path)
    with path.open(encoding="utf-8") as file:
        header = _header(path, file.readline())
        stop = header["frames"] if stop is None else stop
        if not 0 <= start < stop <= header["frames"]:
            raise TruthError(f"{path}: frames {start} to {stop} were asked for, it has 0 to {header['frames']}")
        rows = []
        for t, line in enumerate(file):
            if t >= stop:
                break
            if t >= start:
                rows.append(_row(path, t, line, header))
    if len(rows) != stop - start:
        raise TruthError(f"{path} is cut off: frame {start + len(rows)} of {header['frames']} is missing")
    return Truth(
        header=header,
        start=start,
        time=np.array([row["time"] for row in rows]),
        phase=np.array([PHASES.index(row["phase"]) for row in rows], np.int64),
        motif=tuple(row["motif"] for row in rows),
        landmarks=_hide([row["landmarks"] for row in rows]),
        depth=np.array([row["depth"] for row in rows], np.float32),
        position=np.array([row["position"] for row in rows], np.float32),
        polyps=tuple(row["polyps"] for row in rows),
    )


def _hide(landmarks: list) -> np.ndarray:
    """Where a landmark is not visible its place is NaN, so that nobody learns from it by mistake."""
    out = np.array(landmarks, np.float32)
    out[..., 1:][out[..., 0] == 0] = np.nan
    return out


def _header(path: Path, line: str) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("kind") != KIND:
        raise TruthError(f"{path} is not a truth file: its first line must be a header of kind {KIND!r}")
    if header.get("generator") != VERSION:
        theirs = header.get("generator")
        raise TruthError(f"{path} is of generator version {theirs}, this is version {VERSION}: make it again")
    wanted = {"hash", "variant", "split", "seed", "size", "frames", "fps", "params", "phases", "landmarks"}
    if wanted - header.keys():
        raise TruthError(f"{path}: its header lacks {', '.join(sorted(wanted - header.keys()))}")
    text = json.dumps({"generator": VERSION, **header["params"]}, sort_keys=True, separators=(",", ":"))
    if hashlib.sha256(text.encode()).hexdigest() != header["hash"]:
        raise TruthError(f"{path}: the hash of its header is not that of its parameters; one of them was changed")
    for name, ours in (("phases", PHASES), ("landmarks", LANDMARKS)):
        if tuple(header[name]) != ours:
            raise TruthError(f"{path}: its {name} must be {list(ours)}, got {header[name]}")
    return header


def _row(path: Path, t: int, line: str, header: dict[str, Any]) -> dict[str, Any]:
    try:
        row = json.loads(line)
        lacking = [key for key in _KEYS if key not in row]
        if lacking:
            raise ValueError(f"{', '.join(lacking)} is missing")
        if row["frame"] != t:
            raise ValueError(f"frame {t} was expected, got {row['frame']}")
        if row["phase"] not in PHASES or row["motif"] not in MOTIFS:
            raise ValueError(f"phase {row['phase']!r} or motif {row['motif']!r} is unknown")
        if np.shape(row["landmarks"]) != (len(LANDMARKS), 3) or np.shape(row["position"]) != (3,):
            raise ValueError(f"{len(LANDMARKS)} landmarks and a position of three numbers were expected")
        row["polyps"] = tuple(_polyp(polyp, header["size"]) for polyp in row["polyps"])
    except (ValueError, TypeError, KeyError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise TruthError(f"{path}, line {t + 2}: {what}") from error
    return row


def _polyp(polyp: dict[str, Any], size: int) -> PolypTruth:
    mask = decode_mask(polyp["mask"])
    if mask.shape != (size, size):
        raise ValueError(f"a mask must be {size} x {size}, got {mask.shape[0]} x {mask.shape[1]}")
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        raise ValueError(f"the mask of polyp {polyp['id']} is empty")
    box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1)
    if box != tuple(polyp["box"]):
        raise ValueError(f"the box of polyp {polyp['id']} must be that of its mask, {box}, got {tuple(polyp['box'])}")
    return PolypTruth(int(polyp["id"]), str(polyp["kind"]), box, mask)
