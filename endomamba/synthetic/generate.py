"""A whole synthetic video: frames with their truth, in any order, and as files that are complete or not there."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from .params import VERSION, Params, check_split, find_variant
from .procedure import PHASES, Procedure
from .render import Renderer
from .truth import KIND, LANDMARKS, frame_truth

# One x264 thread: the bits of the file do not depend on the machine's number of cores.
ENCODER = {"crf": "18", "preset": "veryfast", "threads": "1"}


class SyntheticVideo:
    """A colonoscopy of `frames` frames; `video[t]` is frame t and its truth, the same whatever was asked for before.

    variant: a name of VARIANTS, or Params.  split: "train", "val" or "test".  seed: any whole number >= 0.
    The number of frames belongs to the video: a longer one is a longer procedure, not this one continued.
    every: only each so-manieth of its frames is there, as of a slower camera; `len` and the numbers count those.
    """

    def __init__(
        self,
        variant: str | Params = "base",
        *,
        split: str = "train",
        seed: int = 0,
        frames: int = 1000,
        size: int = 224,
        every: int = 1,
    ) -> None:
        self.params = find_variant(variant) if isinstance(variant, str) else variant
        check_split(self.params, split)
        for name, value, least in (("seed", seed, 0), ("frames", frames, 1), ("size", size, 32), ("every", every, 1)):
            if value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value}")
        self.split, self.seed, self.size, self.every = split, seed, size, every
        self.fps = self.params.fps / every if every > 1 else self.params.fps
        self.procedure = Procedure(self.params, split, seed, frames)
        self.renderer = Renderer(self.params, split, seed, self.procedure, size)

    @property
    def name(self) -> str:
        return f"{self.params.variant}-{self.split}-{self.seed:06d}"

    def __len__(self) -> int:
        return -(-self.procedure.frames // self.every)

    def __getitem__(self, t: int) -> tuple[np.ndarray, dict[str, Any]]:
        """-> (size, size, 3) uint8 RGB, and the truth as truth.py describes a line."""
        if not 0 <= t < len(self):
            raise IndexError(f"frame {t} of a video of {len(self)}")
        view, segment = self.procedure.view(t * self.every), self.procedure.segment(t * self.every)
        picture = self.renderer.draw(view)
        return picture.rgb, frame_truth(t, self.fps, segment.phase, segment.motif, view, picture)

    def header(self) -> dict[str, Any]:
        """The first line of the truth file."""
        return {
            "kind": KIND,
            "generator": VERSION,
            "hash": self.params.digest(),
            "variant": self.params.variant,
            "split": self.split,
            "seed": self.seed,
            "size": self.size,
            "frames": len(self),
            "fps": self.fps,
            "video": f"{self.name}.mp4",
            "phases": PHASES,
            "landmarks": LANDMARKS,
            "polyps": [asdict(polyp) for polyp in self.procedure.anatomy.polyps],
            "params": asdict(self.params),
        }

    def stamp(self) -> str:
        """What the mp4 carries as its comment: which video this is, in JSON."""
        keys = ("kind", "generator", "hash", "variant", "split", "seed")
        return json.dumps({key: self.header()[key] for key in keys} | {"kind": "endomamba synthetic video"})


def paths(folder: str | os.PathLike, variant: str, split: str, seed: int) -> tuple[Path, Path]:
    """Where `write` puts the video and its truth."""
    name = f"{variant}-{split}-{seed:06d}"
    return Path(folder) / f"{name}.mp4", Path(folder) / f"{name}.truth.jsonl"


def write(
    video: SyntheticVideo,
    folder: str | os.PathLike,
    *,
    force: bool = False,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[Path, Path]:
    """Writes mp4 and truth; -> their paths.  progress: called with each frame's truth.

    Both are written under the name of a part and renamed when complete, the truth last: where it lies, all is there.
    Raises FileExistsError where one of them is there already and not `force`.
    """
    from ..video import write_video

    movie, truth = paths(folder, video.params.variant, video.split, video.seed)
    for path in (movie, truth):
        if path.exists() and not force:
            raise FileExistsError(f"{path} is there already")
    movie.parent.mkdir(parents=True, exist_ok=True)
    movie_part, truth_part = (path.with_name(f"{path.stem}.part{path.suffix}") for path in (movie, truth))
    try:
        with truth_part.open("w", encoding="utf-8") as lines:
            lines.write(json.dumps(video.header()) + "\n")

            def frames() -> Iterator[np.ndarray]:
                for t in range(len(video)):
                    rgb, row = video[t]
                    lines.write(json.dumps(row, separators=(",", ":")) + "\n")
                    yield rgb
                    if progress is not None:
                        progress(row)

            fps, gop = video.fps, max(1, round(video.fps))
            write_video(movie_part, frames(), fps=fps, gop=gop, options=ENCODER, metadata={"comment": video.stamp()})
        truth.unlink(missing_ok=True)
        movie_part.replace(movie)
        truth_part.replace(truth)
    finally:
        for part in (movie_part, truth_part):
            with contextlib.suppress(FileNotFoundError):
                part.unlink()
    return movie, truth
