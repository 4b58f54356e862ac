"""Frames of a video by their numbers: what training reads, where `open_video` reads a file from end to end.

Frame i is the i-th that `open_video` hands out, exactly: numbers are turned into timestamps by an index of the file's
packets, decoding starts at the keyframe before the first one wanted, and only the timestamps asked for are kept.
"""

from __future__ import annotations

import bisect
import functools
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .sources import FolderReader
from .video import VideoError, VideoInfo, VideoReader, import_av, open_video

Size = int | tuple[int, int] | None


def read_frames(
    path: str | os.PathLike, numbers: Sequence[int], size: Size | Callable[[VideoInfo], Size] = None
) -> Tensor:
    """The frames `numbers` of a video file, a DICOM clip or a folder of pictures -> (n, h, w, 3) uint8.

    numbers: from 0, in any order, one may come twice.  size: as in `open_video`, or a function of what the file says
    about itself.  Decodes in one thread: data workers are many.
    VideoError where one of these frames is not there or damaged; damage elsewhere in the file does not matter.
    """
    path, wanted = Path(path), sorted(set(numbers))
    if not wanted or wanted[0] < 0:
        raise ValueError(f"read_frames: numbers must be at least one frame, from 0 on, got {list(numbers)[:5]}")
    found: dict[int, Tensor] | None = None
    for read in (_find, _in_order):
        with FolderReader(path) if path.is_dir() else open_video(path, threads=1) as reader:
            reader.show(size(reader.info) if callable(size) else size)
            found = read(reader, wanted)
        if found is not None:
            break
    assert found is not None  # reading in order finds what there is, or raises
    missing = [number for number in wanted if number not in found]
    if missing:
        raise VideoError(f"{path}: frame {missing[0]} could not be decoded ({len(missing)} of {len(wanted)} wanted)")
    return torch.stack([found[number] for number in numbers])


_kept: OrderedDict[Hashable, Tensor] = OrderedDict()  # videos as they were decoded, the one used last behind


def read_kept(
    path: Path, numbers: Sequence[int], size: Size | Callable[[VideoInfo], Size], key: Hashable, room: float
) -> Tensor:
    """`read_frames` out of memory: a process decodes a video once and whole, and keeps up to `room` bytes of them.

    key: what decides the size.  Those not used for longest leave first.  A video that is damaged somewhere is not kept.
    """
    name = (os.path.abspath(path), path.stat().st_mtime_ns, key)
    video = _kept.pop(name, None)
    if video is None:
        try:
            video = read_frames(path, range(count_frames(path)), size)
        except (VideoError, ValueError):
            return read_frames(path, numbers, size)
    _kept[name] = video
    while len(_kept) > 1 and sum(kept.nbytes for kept in _kept.values()) > room:
        _kept.popitem(last=False)
    return video[list(numbers)] if max(numbers) < len(video) else read_frames(path, numbers, size)


def _find(reader: VideoReader, wanted: list[int]) -> dict[int, Tensor] | None:
    """Without reading the file from its start; None where that cannot be done."""
    if isinstance(reader, FolderReader):
        return _from_folder(reader, wanted)
    times, keys = _index(reader) if type(reader) is VideoReader else (None, None)
    return None if times is None or keys is None else _by_time(reader, wanted, times, keys)


def count_frames(path: str | os.PathLike) -> int:
    """How many frames `open_video` would hand out, without decoding them where the container has timestamps."""
    path = Path(path)
    with FolderReader(path) if path.is_dir() else open_video(path, threads=1) as reader:
        times, _ = _index(reader) if type(reader) is VideoReader else (None, None)
        if times is not None:
            return len(times)
        if reader.info.container in ("folder", "dicom") and reader.info.frames:
            return reader.info.frames
        return sum(1 for _ in reader)


def _index(reader: VideoReader) -> tuple[np.ndarray | None, np.ndarray | None]:
    stat = os.stat(reader.path)
    return _packets(os.path.abspath(reader.path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=64)
def _packets(path: str, modified: int, size: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Timestamps of all frames and of the keyframes, sorted; (None, None) where packets have none (AVI, raw streams).

    Reads the whole file but decodes nothing; once a process.
    """
    av = import_av()
    with VideoReader(path, threads=1) as reader:
        times, keys = [], []
        try:
            for packet in reader._container.demux(reader._stream):
                if packet.size == 0 or packet.is_discard:
                    continue
                if packet.pts is None:
                    return None, None
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        except av.FFmpegError:
            pass  # whoever asks for a frame behind the damage is told that it is missing
    if len(set(times)) != len(times) or not keys:
        return None, None
    return np.sort(np.array(times, np.int64)), np.sort(np.array(keys, np.int64))


def _by_time(reader: VideoReader, wanted: list[int], times: np.ndarray, keys: np.ndarray) -> dict[int, Tensor] | None:
    """None where the container starts too late, as it seeks by the time of decoding, or roughly, or not to the end."""
    if wanted[-1] >= len(times):
        raise VideoError(f"{reader.path}: frame {wanted[-1]} was asked for, the file holds {len(times)}")
    av = import_av()
    numbers = {int(times[number]): number for number in wanted}
    first, last = int(times[wanted[0]]), int(times[wanted[-1]])
    found: dict[int, Tensor] = {}
    try:
        reader._container.seek(int(keys[max(0, bisect.bisect_right(keys, first) - 1)]), stream=reader._stream)
        for frame in reader._container.decode(reader._stream):
            if frame.is_corrupt:  # and so are those that are predicted from it
                raise VideoError(f"{reader.path}: damaged before or in frames {wanted[0]} to {wanted[-1]}")
            if frame.pts in numbers:
                found[numbers[frame.pts]] = reader._scaler(frame)[0]
            if frame.pts is not None and frame.pts >= last:
                break
    except (av.FFmpegError, OSError) as error:
        why = getattr(error, "strerror", None) or error
        raise VideoError(f"{reader.path}: frames {wanted[0]} to {wanted[-1]} could not be decoded ({why})") from error
    return found if len(found) == len(wanted) else None


def _in_order(reader: VideoReader, wanted: list[int]) -> dict[int, Tensor]:
    numbers, found = set(wanted), {}
    for frame in reader:
        if frame.index in numbers:
            found[frame.index] = frame.rgb
        if frame.index >= wanted[-1]:
            break
    if reader.damage:  # numbers behind it would be wrong
        raise VideoError(f"{reader.path}: {reader.damage}")
    return found


def _from_folder(reader: Any, wanted: list[int]) -> dict[int, Tensor]:
    if wanted[-1] >= reader.info.frames:
        raise VideoError(f"{reader.path}: frame {wanted[-1]} was asked for, the folder holds {reader.info.frames}")
    reader.pick(wanted)
    pictures = [frame.rgb for frame in reader]
    if reader.damage:
        raise VideoError(f"{reader.path}: {reader.damage}")
    return dict(zip(wanted, pictures))
