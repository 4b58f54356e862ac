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


class ReadAhead:
    """Decodes in a thread of its own, at most `depth` frames ahead.  Iterate, then `close`.

    An item is (frame, seconds it took to decode).  live: where the reader of this object is slow, the oldest waiting
    frame is lost and counted in `dropped`; otherwise decoding waits.  What goes wrong in the thread is raised here,
    after the frames before it.  `stop` ends the iteration from anywhere, a signal handler too.
    """

    def __init__(
        self, frames: Iterable[Frame], depth: int = 4, *, live: bool = False, patience: float = PATIENCE
    ) -> None:
        self.frames, self.depth, self.live, self.patience = frames, depth, live, patience
        self.dropped = 0
        self.stopped = False
        self._waiting: deque[tuple[Frame, float]] = deque()
        self._changed = threading.Condition()
        self._ended, self._closed = False, False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="decoder", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            frames = iter(self.frames)
            while not self._closed:
                begin = time.perf_counter()
                frame = next(frames, None)
                if frame is None:
                    break
                self._put(frame, time.perf_counter() - begin)
        except BaseException as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, frame: Frame, seconds: float) -> None:
        with self._changed:
            if self.live and len(self._waiting) == self.depth:
                self._waiting.popleft()
                self.dropped += 1
            self._changed.wait_for(lambda: len(self._waiting) < self.depth or self._closed)
            self._waiting.append((frame, seconds))
            self._changed.notify_all()

    def __iter__(self) -> Iterator[tuple[Frame, float]]:
        while not self.stopped:
            item = self._take()
            if item is None:
                return
            yield item

    def _take(self) -> tuple[Frame, float] | None:
        limit = time.monotonic() + self.patience
        with self._changed:
            while not self._waiting and not self._ended and not self.stopped:
                self._changed.wait(0.1)  # not for ever: a signal handler cannot take the lock to wake us
                if self.live and time.monotonic() > limit:
                    raise SourceStalled(f"no frame came for {self.patience:g} s")
            if self._waiting and not self.stopped:
                item = self._waiting.popleft()
                self._changed.notify_all()
                return item
        if self._error is not None and not self.stopped:
            raise self._error
        return None

    def stop(self) -> None:
        self.stopped = True

    def close(self, seconds: float = 5.0) -> bool:
        """Ends the thread; false where it hangs in its source, which then must not be closed under it."""
        self.stopped = self._closed = True
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()
