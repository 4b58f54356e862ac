"""Where frames come from besides a file: a folder of pictures, a camera, an address, a pipe; and reading them ahead.

`open_source` takes what a person types after `endomamba stream` and gives a reader like `open_video`'s.
"""

from __future__ import annotations

import re
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from .video import Frame, TimedFrame, VideoError, VideoInfo, VideoReader, import_av, open_video

PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LIVE_SCHEMES = ("rtmp", "rtp", "rtsp", "rtsps", "srt", "udp")
PATIENCE = 10.0  # seconds that an address or a camera may be silent


def open_source(name: str) -> VideoReader:
    """name: a file, a DICOM clip, a folder of pictures, `-` or a pipe, a camera's number, or a URL.

    Raises VideoError with one clear sentence.
    """
    path = Path(name)
    if name == "-":
        return VideoReader("standard input", source=sys.stdin.buffer)
    if name.isdecimal() and not path.exists():
        return LiveReader(f"camera {name}", source=f"/dev/video{name}", format="video4linux2,v4l2")
    if "://" in name:
        address = urlsplit(name)
        shown = name.replace(f"{address.netloc.rpartition('@')[0]}@", "", 1) if "@" in address.netloc else name
        if address.scheme.lower() not in LIVE_SCHEMES:
            return VideoReader(shown, source=name, timeout=PATIENCE)
        options = {"rtsp_transport": "tcp"} if address.scheme.lower().startswith("rtsp") else {}
        return LiveReader(shown, source=name, options=options, timeout=PATIENCE)
    if path.is_dir():
        return FolderReader(path)
    if path.exists() and stat.S_ISFIFO(path.stat().st_mode):
        return VideoReader(path, source=path.open("rb"))  # opened once: what was read from a pipe is gone
    return open_video(path)


class LiveReader(VideoReader):
    """A camera or a broadcast: whoever is slow loses frames."""

    live = True


class FolderReader(VideoReader):
    """The pictures in a folder in the order of the numbers in their names (frame2 before frame10), without a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = None
        self._start(None)
        files = (file for file in path.iterdir() if file.suffix.lower() in PICTURES and not file.name.startswith("."))
        self._files = sorted(files, key=_natural)
        if not self._files:
            raise VideoError(f"{path} is a folder without pictures ({', '.join(PICTURES)})")
        height, width = self._size_of_first()
        kinds = {file.suffix.lower().lstrip(".") for file in self._files}
        self.info = VideoInfo(str(path), "folder", "/".join(sorted(kinds)), height, width, None, len(self._files))

    def _size_of_first(self) -> tuple[int, int]:
        for file in self._files:
            try:
                return _read_picture(file).shape[:2]
            except ValueError:
                continue
        raise VideoError(f"{self.path} holds {len(self._files)} files with names of pictures, none can be read as one")

    def pick(self, numbers: Iterable[int]) -> None:
        """From now on only these pictures are handed out, in this order."""
        self._files = [self._files[number] for number in numbers]

    def close(self) -> None:
        pass

    def _decode(self) -> Iterator[TimedFrame]:
        av = import_av()
        for file in self._files:
            try:
                rgb = _read_picture(file)
            except ValueError as error:
                self.damage.add(f"{file.name} could not be read ({error})", 1)
                continue
            yield None, av.VideoFrame.from_ndarray(rgb, format="rgb24")


def _natural(file: Path) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _read_picture(file: Path) -> np.ndarray:
    """-> (h, w, 3) uint8, upright.  ValueError where it is no whole picture."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise VideoError(f"pillow is needed to read pictures: pip install endomamba[video]  ({error})") from error
    try:
        with Image.open(file) as picture:
            return np.ascontiguousarray(ImageOps.exif_transpose(picture).convert("RGB"))
    except Exception as error:  # pillow raises many kinds, SyntaxError for a damaged PNG: the picture is not readable
        raise ValueError(str(error).split(" <")[0].split(" '")[0]) from error


class SourceStalled(VideoError):
    """A live source went silent."""


POLICIES = ("drop oldest", "block")


class Ready(NamedTuple):
    """What waited for a `FrameQueue`'s reader: a frame, or None, of each camera, and how many each gave since its last
    one, this one included (0 where there is none)."""

    frames: list[Any]
    elapsed: list[int]


class FrameQueue:
    """Frames on their way from cameras to one reader, at most `depth` of each camera waiting.

    policy, where a camera is faster than the reader: "drop oldest" loses the frame that waited longest, so answers stay
    fresh; "block" lets `put` wait, so nothing is lost.
    dropped: frames lost, by camera.  waits: how often `put` had to wait, by camera.

    Cameras put from threads of their own; one reader takes, and gives what it got to a `FrameStream`:

        while (ready := queue.take()) is not None:
            logits = camera(ready.frames)
    """

    def __init__(self, cameras: int = 1, *, policy: str = "drop oldest", depth: int = 4) -> None:
        if policy not in POLICIES:
            raise ValueError(f"FrameQueue: policy must be one of {POLICIES}, got {policy!r}")
        if cameras < 1 or depth < 1:
            raise ValueError(f"FrameQueue: cameras and depth must be at least 1, got {cameras} and {depth}")
        self.policy, self.depth = policy, depth
        self.dropped, self.waits = [0] * cameras, [0] * cameras
        self._waiting: list[deque[Any]] = [deque() for _ in range(cameras)]
        self._lost = [0] * cameras  # since the last one taken
        self._open = set(range(cameras))
        self._changed = threading.Condition()

    def put(self, frame: Any, camera: int = 0) -> None:
        """Nothing happens once the camera's end, or the reader's, was told."""
        waiting = self._waiting[camera]
        with self._changed:
            if len(waiting) == self.depth and camera in self._open:
                if self.policy == "block":
                    self.waits[camera] += 1
                    self._changed.wait_for(lambda: len(waiting) < self.depth or camera not in self._open)
                else:
                    waiting.popleft()
                    self.dropped[camera] += 1
                    self._lost[camera] += 1
            if camera in self._open:
                waiting.append(frame)
                self._changed.notify_all()

    def take(self, seconds: float | None = None) -> Ready | None:
        """The oldest frame of each camera, as soon as one has any; None at the end of all, or after `seconds`."""
        with self._changed:
            self._changed.wait_for(lambda: any(self._waiting) or not self._open, seconds)
            if not any(self._waiting):
                return None
            frames = [waiting.popleft() if waiting else None for waiting in self._waiting]
            elapsed = [0 if frame is None else 1 + lost for frame, lost in zip(frames, self._lost, strict=True)]
            self._lost = [lost if frame is None else 0 for frame, lost in zip(frames, self._lost, strict=True)]
            self._changed.notify_all()
            return Ready(frames, elapsed)

    def end(self, camera: int = 0) -> None:
        """No more frames come from this camera; those that wait are still handed out."""
        with self._changed:
            self._open.discard(camera)
            self._changed.notify_all()

    @property
    def ended(self) -> bool:
        """No frame waits and none will come."""
        with self._changed:
            return not self._open and not any(self._waiting)

    def close(self) -> None:
        """The reader has gone: nothing waits any more, for anybody."""
        with self._changed:
            self._open.clear()
            for waiting in self._waiting:
                waiting.clear()
            self._changed.notify_all()


class ReadAhead:
    """Decodes in a thread of its own, at most `depth` frames ahead.  Iterate, then `close`.

    An item is (frame, seconds it took to decode).  live: the source may go silent, which ends it after `patience`.
    policy: of its `FrameQueue`, where the reader of this object is slow; None: "drop oldest" for a live source, else
    "block".  What goes wrong in the thread is raised here, after the frames before it.  `stop` ends the iteration from
    anywhere, a signal handler too.
    """

    def __init__(
        self,
        frames: Iterable[Frame],
        depth: int = 4,
        policy: str | None = None,
        *,
        live: bool = False,
        patience: float = PATIENCE,
    ) -> None:
        self.frames, self.live, self.patience = frames, live, patience
        self.queue = FrameQueue(policy=policy or ("drop oldest" if live else "block"), depth=depth)
        self.stopped = False
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self.queue.dropped[0]

    def _work(self) -> None:
        try:
            frames = iter(self.frames)
            while not self._closed:
                begin = time.perf_counter()
                frame = next(frames, None)
                if frame is None:
                    break
                self.queue.put((frame, time.perf_counter() - begin))
        except BaseException as error:
            self._error = error
        self.queue.end()

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        while not self.stopped:
            item = self._take()
            if item is None:
                return
            yield item

    def _take(self) -> tuple[Frame, float] | None:
        limit = time.monotonic() + self.patience
        while not self.stopped and not self.queue.ended:
            ready = self.queue.take(0.1)  # not for ever: a signal handler cannot take the lock to wake us
            if ready is not None:
                return None if self.stopped else ready.frames[0]
            if self.live and time.monotonic() > limit:
                raise SourceStalled(f"no frame came for {self.patience:g} s")
        if self._error is not None and not self.stopped:
            raise self._error
        return None

    def stop(self) -> None:
        self.stopped = True

    def close(self, seconds: float = 5.0) -> bool:
        """Ends the thread; false where it hangs in its source, which then must not be closed under it."""
        self.stopped = self._closed = True
        self.queue.close()
        self._thread.join(seconds)
        return not self._thread.is_alive()
