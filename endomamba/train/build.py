"""Clips for pre-training out of long videos and folders of pictures, as the published collections were made.

Five seconds at 30 frames a second, the shorter side 256, frames that show next to nothing left out; a clip never goes
on over a frame that was left out, over a gap in time or over damage.  Of what remains at such a place half a clip and
more is kept as it is.

    OUT/SOURCE/00000.mp4 ...   one folder a source
    OUT/train_list.txt         `relative.mp4 0`, as published
    OUT/manifest.jsonl         the same for this package
    OUT/build.jsonl            what was made of which source: where a build goes on that was stopped

Files get their names when they are whole.  OUT is a folder of its own: what is there is this module's to replace.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import threading
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

    The same call goes on where one was stopped; a source that changed, or could not be read, is done again.  Nothing
    but clips of earlier builds is ever deleted.
    progress: called after each source with the number of all.  A source that cannot be read is named in the log,
    counted and left out.  DataError where there is nothing to cut, or `out` was built with another config, holds other
    files, or `folder` itself.
    """
    root, out = Path(folder), Path(out)
    sources = find_sources(root, out)
    _check_out(root, out)
    if not sources:
        raise DataError(f"{root}: holds no videos and no folders of pictures")
    out.mkdir(parents=True, exist_ok=True)
    done = _read_journal(out, config)
    _write_journal(out, config, done)
    results, stop = [], threading.Event()

    def one(source: Path) -> tuple[Built, str]:
        name, stamp = source.relative_to(root).as_posix(), _stamp(source)
        known = done.get(name)
        if known and known[1] == stamp:
            return known
        return _cut_source(source, name, out, config, stop), stamp

    pool = ThreadPoolExecutor(workers)
    try:
        for built, stamp in pool.map(one, sources):
            if built.error or built.damage:
                log.warning("%s: %s", built.source, built.error or f"damaged: {built.damage}")
            before = done.pop(built.source, None)
            if not built.error:
                done[built.source] = (built, stamp)
            if before != (built, stamp):
                _add_to_journal(out, built, stamp)
            results.append(built)
            progress(built, len(sources))
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    _write_journal(out, config, done)
    _write_lists(out, results)
    return results


def find_sources(root: Path, out: Path) -> list[Path]:
    """Videos, and folders that hold pictures, below `root` in the order of their names; nothing below `out`."""
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder")
    found = []
    for base, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if (Path(base) / name).resolve() != out.resolve())
        shown = [Path(base) / name for name in files if not name.startswith(".")]
        found += [path for path in shown if path.suffix.lower() in VIDEOS]
        if any(path.suffix.lower() in PICTURES for path in shown):
            found.append(Path(base))
    return sorted(found)


def _check_out(root: Path, out: Path) -> None:
    """DataError where clips would go between files that are not of a build."""
    if root.resolve().is_relative_to(out.resolve()):
        raise DataError(f"{out}: holds {root}, which is to be cut; choose another --out, a folder for the clips alone")
    if out.exists() and not (out / "build.jsonl").exists() and any(out.iterdir()):
        raise DataError(f"{out}: holds files that `data build` did not write; choose another --out, new or empty")


# ---- a source


def _cut_source(source: Path, name: str, out: Path, config: BuildConfig, stop: threading.Event) -> Built:
    """stop: set, it ends as soon as it can; what it returns then is not of the whole source."""
    place = out / name
    _remove_clips(place)  # of what the source was before, or of a build that was stopped
    counts: list[int] = []
    clip: list[Tensor] = []
    left_out = 0
    try:
        with FolderReader(source) if source.is_dir() else open_video(source, threads=1) as reader:
            reader.show(_size(reader.info, config.side))
            for frame in itertools.chain(_at_rate(reader, config), [None]):
                if stop.is_set():
                    break
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
        _remove_clips(place)
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


def _remove_clips(place: Path) -> None:
    """Of this source alone: the folder may hold those of sources below it."""
    for path in place.glob("*.mp4"):
        if path.is_file() and re.fullmatch(r"\d{5,}(\.part)?", path.stem):
            path.unlink()


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
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # without a line that was being written
        header, *rows = [json.loads(line) for line in whole.splitlines()]
        before = BuildConfig(**header["config"])
        stamps = [row.pop("stamp") for row in rows]
        made = [Built(**{**row, "clips": tuple(row["clips"])}) for row in rows]
        last = {built.source: (built, stamp) for built, stamp in zip(made, stamps)}
        done = {name: pair for name, pair in last.items() if not pair[0].error}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: cannot be read ({error}); choose another --out") from None
    if before != config:
        raise DataError(f"{path}: was made with {before}, now it is {config}: choose another --out")
    return done


def _write_journal(out: Path, config: BuildConfig, done: dict[str, tuple[Built, str]]) -> None:
    rows = [_row(built, stamp) for built, stamp in done.values()]
    _write_lines(out / "build.jsonl", [json.dumps({"config": asdict(config)}), *rows])


def _add_to_journal(out: Path, built: Built, stamp: str) -> None:
    """A line at the end, as there may be tens of thousands; the last one of a source holds."""
    with (out / "build.jsonl").open("a", encoding="utf-8") as file:
        file.write(_row(built, stamp) + "\n")


def _row(built: Built, stamp: str) -> str:
    return json.dumps({**built._asdict(), "stamp": stamp})


def _write_lists(out: Path, results: list[Built]) -> None:
    """Of the sources that are there now."""
    clips = [
        (Path(built.source, f"{i:05d}.mp4").as_posix(), frames)
        for built in results
        for i, frames in enumerate(built.clips)
    ]
    if clips:
        _write_lines(out / "train_list.txt", [f"{path} 0" for path, _ in clips])
        manifest.write(out / "manifest.jsonl", [], [Entry(path, 0, frames) for path, frames in clips])


def _write_lines(path: Path, lines: list[str]) -> None:
    write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
