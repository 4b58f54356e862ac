"""Clips for pre-training out of long videos and folders of pictures, as the published collections were made.

Five seconds at 30 frames a second, the shorter side 256, frames that show next to nothing left out; a clip never goes
on over a frame that was left out, over a gap in time or over damage.  Of what remains at such a place half a clip and
more is kept as it is.

    OUT/SOURCE/00000.mp4 ...   one folder a source
    OUT/train_list.txt         `relative.mp4 0`, as published
    OUT/manifest.jsonl         the same for this package
    OUT/build.jsonl            what was made of which source: where a build goes on that was stopped

Files get their names when they are whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..sources import PICTURES, FolderReader
from ..video import VideoError, VideoInfo, VideoReader, open_video, write_video
from . import manifest
from .checkpoint import write_atomically
from .data import check_number
from .errors import DataError
from .manifest import VIDEOS, Entry

log = logging.getLogger("endomamba")

ENCODER = {"crf": "20", "preset": "veryfast", "threads": "1"}
GAP = 1.0  # seconds without a frame: what comes after is another scene


@dataclass(frozen=True)
class BuildConfig:
    seconds: float = 5.0
    fps: float = 30.0
    side: int = 256  # the shorter one, even; the other in proportion
    least_std: float = 1.0  # of a frame's grey levels; below it nothing is to be seen
    pictures_fps: float = 30.0  # of folders of pictures, which have no times

    def __post_init__(self) -> None:
        for name in ("seconds", "fps", "pictures_fps"):
            check_number(self, name, float, 1e-3)
        check_number(self, "least_std", float, 0)
        check_number(self, "side", int, 16)
        if self.side % 2:
            raise ValueError(f"BuildConfig: side must be even, got {self.side}")

    @property
    def frames(self) -> int:
        """Of a clip."""
        return max(1, round(self.seconds * self.fps))


class Built(NamedTuple):
    """What was made of a source: frames of each clip; frames left out as uniform or in too short a rest; damage and
    why the source could not be read, in words."""

    source: str
    clips: tuple[int, ...] = ()
    left_out: int = 0
    damage: str = ""
    error: str = ""


def build(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    config: BuildConfig,
    *,
    workers: int = 1,
    progress: Callable[[Built, int], None] = lambda built, total: None,
) -> list[Built]:
    """Cuts every video and folder of pictures below `folder` into clips below `out` -> what was made of each.

    The same call goes on where one was stopped; a source that changed, or could not be read, is done again.
    progress: called after each source with the number of all.  A source that cannot be read is named in the log,
    counted and left out.  DataError where there is nothing to cut, or `out` was built with another config.
    """
    root, out = Path(folder), Path(out)
    sources = find_sources(root, out)
    if not sources:
        raise DataError(f"{root}: holds no videos and no folders of pictures")
    out.mkdir(parents=True, exist_ok=True)
    done = _read_journal(out, config)
    results = []

    def one(source: Path) -> tuple[Built, str]:
        name, stamp = source.relative_to(root).as_posix(), _stamp(source)
        known = done.get(name)
        return (known[0], stamp) if known and known[1] == stamp else (_cut_source(source, name, out, config), stamp)

    pool = ThreadPoolExecutor(workers)
    try:
        for built, stamp in pool.map(one, sources):
            if built.error or built.damage:
                log.warning("%s: %s", built.source, built.error or f"damaged: {built.damage}")
            done.pop(built.source, None)
            if not built.error:
                done[built.source] = (built, stamp)
            _write_journal(out, config, done)
            results.append(built)
            progress(built, len(sources))
    finally:
        pool.shutdown(cancel_futures=True)
    _write_lists(out, results)
    return results


def find_sources(root: Path, out: Path) -> list[Path]:
    """Videos, and folders that hold pictures, below `root` in the order of their names; nothing below `out`."""
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder")
    found = []
    for base, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if (Path(base) / name).resolve() != out.resolve())
        kinds = {Path(name).suffix.lower() for name in files if not name.startswith(".")}
        found += [Path(base) / name for name in sorted(files) if Path(name).suffix.lower() in VIDEOS]
        if kinds & set(PICTURES):
            found.append(Path(base))
    return sorted(source for source in found if source != root or source.is_file())


# ---- a source


def _cut_source(source: Path, name: str, out: Path, config: BuildConfig) -> Built:
    place = out / name
    shutil.rmtree(place, ignore_errors=True)  # what a build that was stopped left of it
    counts: list[int] = []
    clip: list[Tensor] = []
    left_out = 0
    try:
        with FolderReader(source) if source.is_dir() else open_video(source, threads=1) as reader:
            reader.show(_size(reader.info, config.side))
            for frame in itertools.chain(_at_rate(reader, config), [None]):
                good = frame is not None and float(frame.float().mean(-1).std()) >= config.least_std
                if good:
                    clip.append(frame)
                elif frame is not None:
                    left_out += 1
                if len(clip) == config.frames or (clip and not good):
                    if 2 * len(clip) >= config.frames:
                        _write_clip(place / f"{len(counts):05d}.mp4", clip, config)
                        counts.append(len(clip))
                    else:
                        left_out += len(clip)
                    clip = []
            return Built(name, tuple(counts), left_out, str(reader.damage))
    except VideoError as error:
        shutil.rmtree(place, ignore_errors=True)
        return Built(name, error=str(error))


def _at_rate(reader: VideoReader, config: BuildConfig) -> Iterator[Tensor | None]:
    """(h, w, 3) uint8 at config.fps, each the newest frame of its time; None at a gap and where frames were lost."""
    native = config.pictures_fps if isinstance(reader, FolderReader) else reader.info.fps or config.fps
    due, time, shown = 0, 0.0, None
    for number, frame in enumerate(reader):
        before, time = time, number / native if frame.time is None else frame.time
        gap = 1.5 / native if reader.damage else GAP
        ends = shown is not None and not 0 <= time - before <= gap
        until = before + 1 / native if ends else time
        while shown is not None and due / config.fps < until - 1e-6:
            yield shown
            due += 1
        if ends:
            yield None
        if shown is None or ends:
            due = math.ceil(time * config.fps - 1e-6)
        shown = frame.rgb
    while shown is not None and due / config.fps < time + 1 / native - 1e-6:
        yield shown
        due += 1


def _size(info: VideoInfo, side: int) -> tuple[int, int]:
    """Even, the shorter one `side`."""
    shorter = min(info.height, info.width)
    height, width = (2 * round(length * side / shorter / 2) for length in (info.height, info.width))
    return height, width


def _write_clip(path: Path, clip: list[Tensor], config: BuildConfig) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.part.mp4")
    try:
        write_video(part, clip, fps=config.fps, gop=max(1, round(config.fps)), options=ENCODER)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---- what is written beside the clips


def _stamp(source: Path) -> str:
    """Changes where the source does."""
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.suffix.lower() in PICTURES)
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _read_journal(out: Path, config: BuildConfig) -> dict[str, tuple[Built, str]]:
    path = out / "build.jsonl"
    if not path.exists():
        return {}
    try:
        header, *rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        before = BuildConfig(**header["config"])
        stamps = [row.pop("stamp") for row in rows]
        made = [Built(**{**row, "clips": tuple(row["clips"])}) for row in rows]
        done = {built.source: (built, stamp) for built, stamp in zip(made, stamps)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}); choose another --out") from None
    if before != config:
        raise DataError(f"{path}: was made with {before}, now it is {config}: choose another --out")
    return done


def _write_journal(out: Path, config: BuildConfig, done: dict[str, tuple[Built, str]]) -> None:
    rows = [{"config": asdict(config)}, *({**built._asdict(), "stamp": stamp} for built, stamp in done.values())]
    _write_lines(out / "build.jsonl", [json.dumps(row) for row in rows])


def _write_lists(out: Path, results: list[Built]) -> None:
    """Of the sources that are there now."""
    clips = [(f"{built.source}/{i:05d}.mp4", frames) for built in results for i, frames in enumerate(built.clips)]
    if clips:
        _write_lines(out / "train_list.txt", [f"{path} 0" for path, _ in clips])
        manifest.write(out / "manifest.jsonl", [], [Entry(path, 0, frames) for path, frames in clips])


def _write_lines(path: Path, lines: list[str]) -> None:
    write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
