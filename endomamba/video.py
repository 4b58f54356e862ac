"""Frames out of a video, one at a time, at the size a model wants; and frames into a video.

`open_video` reads any container FFmpeg reads (PyAV) and DICOM clips (pydicom), one packet at a time, so that damage in
the middle of a file costs the frames up to the next keyframe and no more.  `reader.damage` says in words what was lost.

    with open_video("clip.mp4", size=224, start=250, stop=500) as reader:
        for frame in reader:                      # Frame: index, time in seconds, rgb (224, 224, 3) uint8
            x = preprocess(frame.rgb, size=224)   # (3, 224, 224) float32, normalised
    print(reader.damage or "nothing lost")

Neither library is imported before a video is opened.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .containers import fault_in
from .preprocess import (  # noqa: F401  who reads videos finds here what they need
    IMAGENET_MEAN,
    IMAGENET_STD,
    NORMALISATIONS,
    normalisation,
    preprocess,
    resize,
    to_input,
)

# DICOM transfer syntaxes whose pixel data is a whole MPEG-2, H.264 or HEVC stream, as endoscopy recorders write it.
_DICOM_VIDEO = tuple(f"1.2.840.10008.1.2.4.{number}" for number in range(100, 109))


class VideoError(Exception):
    """This file cannot be read as a video.  The message is one sentence for the person who named the file."""


@dataclass(frozen=True, slots=True)
class Frame:
    """index: 0, 1, 2, ... from the beginning of the source.  time: the frame's own, in seconds, None where it has none.

    rgb: (h, w, 3) uint8.  picture: the same frame for a person, in its own proportions, where `show` asked for it.
    """

    index: int
    time: float | None
    rgb: Tensor
    picture: Tensor | None = None


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What the file says about itself; None where it says nothing."""

    path: str
    container: str
    codec: str
    height: int
    width: int
    fps: float | None
    frames: int | None

    def __str__(self) -> str:
        fps = f", {self.fps:.4g} frames/s" if self.fps else ""
        frames = f", {self.frames} frames" if self.frames else ""
        return f"{self.codec} in {self.container}, {self.width} x {self.height}{fps}{frames}"


@dataclass(slots=True)
class Damage:
    """What could not be read; false while nothing was lost.  Only the first few notes are kept, all are counted.

    lost: frames that are gone, as far as they can be counted.
    """

    count: int = 0
    lost: int = 0
    notes: list[str] = field(default_factory=list)

    KEEP = 5

    def add(self, note: str, lost: int = 0) -> None:
        self.count += 1
        self.lost += lost
        if len(self.notes) < self.KEEP:
            self.notes.append(note)

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        more = f"; and {self.count - len(self.notes)} more" if self.count > len(self.notes) else ""
        return "; ".join(self.notes) + more


Place = int | float | None  # int: a frame's index.  float: seconds.  None: the beginning, or the end


def open_video(
    path: str | os.PathLike,
    size: int | tuple[int, int] | None = None,
    *,
    start: Place = None,
    stop: Place = None,
    threads: int = 0,
) -> VideoReader:
    """Opens a video file or a DICOM clip.

    size: (height, width) of the frames handed out, an int for a square, None as stored.
    The picture is squashed to `size`, as the published evaluation does: nothing is cut off, nothing padded.
    start, stop: the frames from `start` up to, not including, `stop`: see `VideoReader.select`.
    threads: decoder threads, 0 lets FFmpeg choose.  Raises VideoError with one clear sentence.
    """
    path = Path(path)
    if size is not None:
        size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(size) < 1:
            raise ValueError(f"open_video: size must be positive, got {size}")
    _check_file(path)
    reader = (DicomReader if _is_dicom(path) else VideoReader)(path, size, threads=threads)
    reader.select(start, stop)
    return reader


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise VideoError(f"{path} is a folder, not a video file")
        if not path.exists():
            raise VideoError(f"{path} does not exist")
        if path.is_file() and path.stat().st_size == 0:
            raise VideoError(f"{path} is empty (0 bytes)")
        with path.open("rb"):
            pass
    except OSError as error:
        raise VideoError(f"{path} cannot be opened: {error.strerror or error}") from error


def _is_dicom(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(132)
    return head[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")


def import_av() -> Any:
    return _import("av", "decode and encode video")


def open_container(source: Any, **options: Any) -> Any:
    """`av.open` for reading; titles may be damaged, which PyAV 19 always takes and those before where it is said."""
    av = import_av()
    if int(av.__version__.partition(".")[0]) < 19:
        options["metadata_errors"] = "replace"
    return av.open(source, **options)


def _import(name: str, purpose: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise VideoError(f"{name} is needed to {purpose}: pip install endomamba[video]  ({error})") from error


class VideoReader:
    """Iterates over the frames of one file.  `damage` and `gaps` grow while it does; `done` is true once it is through.

    One pass: a second one opens the file again.  Use as a context manager, or call `close`.
    path: what messages call it.  source: what `av.open` gets, by default the file of that name; options: its others.
    """

    live = False  # true where frames go on coming whether somebody reads them or not
    _is_file = False  # true where `path` can be opened again and read anywhere
    abandoned = False  # true where a thread hangs in it: it must not be closed under that

    def __init__(
        self,
        path: str | os.PathLike,
        size: tuple[int, int] | None = None,
        *,
        threads: int = 0,
        source: Any = None,
        **options: Any,
    ) -> None:
        import_av()
        self.path = path
        self._is_file = source is None
        self._threads = threads
        self._start(size)
        # An absolute path cannot be mistaken for one of FFmpeg's protocols, whatever the file is called.
        self._open(os.path.abspath(path) if source is None else source, options)

    def _open(self, source: Any, options: dict[str, Any]) -> None:
        av = import_av()
        try:
            self._container = open_container(source, **options)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{self.path} is not a video that FFmpeg can read ({_words(error)})") from error
        try:
            self._stream = self._pick_stream(av)
            # SLICE, not FRAME: an error then belongs to the packet that was sent, and the delay is the codec's own.
            self._stream.thread_type = "SLICE"
            self._stream.codec_context.thread_count = self._threads
            self.info = self._read_info()
        except Exception:
            self._container.close()
            raise

    def _start(self, size: tuple[int, int] | None) -> None:
        self.damage = Damage()
        self.gaps = Gaps(None)
        self.hidden = 0  # frames that the file has and by its edit list does not show
        self.done = False
        self.start: Place = None
        self.stop: Place = None
        self._given = 0
        self._interlaced = False
        self.show(size)

    def show(self, size: int | tuple[int, int] | None, picture: int | None = None) -> None:
        """Sets the size of the frames handed out, and asks for a `picture` with sides of at most so many pixels.

        The sides of a picture are even, as encoders want them.
        """
        self.size = (size, size) if isinstance(size, int) else size
        self._scaler = _Scaler(self.size, picture)

    def select(self, start: Place = None, stop: Place = None) -> None:
        """Hands out the frames from `start` up to, not including, `stop` only.  Call it before iterating.

        int: index of a frame.  float: seconds, as in `Frame.time`; the first frame at or after it.  A frame keeps the
        index and the time it has without a selection (in a file without damage), and is the same to the bit.  Where a
        file has a packet for every frame, those before `start` are read, but only decoded from the last keyframe on;
        of all other sources the frames before `start` are decoded and left out.
        """
        for name, place in (("start", start), ("stop", stop)):
            if place is not None and not 0 <= place < float("inf"):
                raise ValueError(f"select: {name} must be a frame's index or seconds, at least 0, got {place}")
        if type(start) is type(stop) and start is not None and stop <= start:
            raise ValueError(f"select: stop must lie behind start, got {_place_words(start)} to {_place_words(stop)}")
        self.start, self.stop = start, stop

    @property
    def expected(self) -> int | None:
        """Frames that the selection will hold by what the file says about itself, None where that is unknown."""
        frames = self.info.frames
        if isinstance(self.start, float) or isinstance(self.stop, float) or frames is None:
            return frames if self.start is None and self.stop is None else None
        return max(0, min(frames, frames if self.stop is None else self.stop) - (self.start or 0))

    def _pick_stream(self, av: Any) -> Any:
        if self._container.format.name == "tty":  # FFmpeg draws any .txt or .nfo file as a terminal
            raise VideoError(f"{self.path} is a text file, not a video")
        cover = av.stream.Disposition.attached_pic
        streams = [stream for stream in self._container.streams.video if not stream.disposition & cover]
        if not streams:
            others = sorted({stream.type for stream in self._container.streams if stream.type != "video"})
            has = f"it holds only {' and '.join(others)}" if others else "it holds no stream at all"
            raise VideoError(f"{self.path} has no video stream: {has}")
        stream = streams[0]
        context = stream.codec_context
        if context is None:
            raise VideoError(f"{self.path} holds video in a codec that this FFmpeg cannot decode")
        if not context.width or not context.height:
            raise VideoError(f"{self.path} is not a video that FFmpeg can read (its frames have no size)")
        return stream

    def _read_info(self) -> VideoInfo:
        stream, context = self._stream, self._stream.codec_context
        frames = stream.frames or None
        if frames and "mov" in self._container.format.name and len(stream.index_entries):
            frames = min(
                frames, len(stream.index_entries)
            )  # an edit list takes frames out of the index, not out of the count
        rate = stream.average_rate or stream.guessed_rate
        return VideoInfo(
            path=str(self.path),
            container=self._container.format.name.split(",")[0],
            codec=context.codec.canonical_name,  # av1, not libdav1d
            height=context.height,
            width=context.width,
            fps=float(rate) if rate else None,
            frames=frames,
        )

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if not self.abandoned:
            self._container.close()

    def __iter__(self) -> Iterator[Frame]:
        index, frames = self._from_start() if self.start else (0, self._decode())
        self.gaps = Gaps(None if self.live else self.info.fps)
        found = not self.start
        for time, frame in frames:
            if _reached(self.stop, index, time, self):
                break
            found = found or _reached(self.start, index, time, self)
            if found:
                self.gaps.add(time)
                yield Frame(index, time, *self._scaler(frame))
            index += 1
        else:
            if not found and not self.damage:
                raise VideoError(f"{self.path} ends before {_place_words(self.start)}, after {index} frames")
        self.done = True

    @property
    def notices(self) -> list[str]:
        """In words, what may be a loss and may be meant: only who made the file can tell.  Empty where it is damaged:
        then that is the reason.
        """
        if self.damage:
            return []
        hidden = f"its edit list hides {self.hidden} of the frames it holds" if self.hidden else ""
        return [words for words in (hidden, str(self.gaps)) if words]

    # -- from a place in the middle

    def _from_start(self) -> tuple[int, Iterator[TimedFrame]]:
        """-> index of the first frame, at `start` or before it, and the frames from there.

        Seeking lands where a container likes, and a decoder may be unable to begin there.  So the packets' times say
        which frame must come first; where another does, or damage is met, it is tried from earlier keyframes, and in
        the end from the beginning.
        """
        table = self._packet_table() if self._is_file and self.info.codec in _A_FRAME_A_PACKET else None
        if table is None:
            return 0, self._decode()
        table, hidden = [p for p in table if not p.is_hidden], sum(p.is_hidden for p in table)
        times = sorted(packet.pts for packet in table)
        base = self._stream.time_base
        index = self.start if isinstance(self.start, int) else _first_at(times, base, self.start)
        if index >= len(times):
            raise VideoError(f"{self.path} ends before {_place_words(self.start)}, after {len(times)} frames")
        keys = [packet for packet in table if packet.is_key and packet.pts <= times[index]]
        for back in (1, 2, 4, 8):
            if back > len(keys):
                break
            frames = self._seek(keys[-back], times[index], index, hidden)
            if frames is not None:
                return index, frames
        self._reopen()
        return 0, self._decode()

    def _packet_table(self) -> list[_Packet] | None:
        """The packets up to `start` and some more, in the file's order; None where they do not tell what is shown.

        REORDER: no codec shows a frame that many packets later than it stands in the file.
        """
        av = import_av()
        table: list[_Packet] = []
        shown = late = 0
        try:
            with open_container(os.path.abspath(self.path)) as container:
                for packet in container.demux(container.streams[self._stream.index]):
                    if not packet.size:  # the end
                        break
                    if packet.pts is None or packet.is_corrupt:
                        return None
                    table.append(_Packet(packet.pts, packet.dts, packet.is_keyframe, packet.is_discard))
                    shown += not packet.is_discard
                    late += _reached(self.start, shown - 1, float(packet.pts * packet.time_base))
                    if late > _REORDER:
                        break
        except (av.FFmpegError, OSError, IndexError):
            return None
        return table if len({packet.pts for packet in table}) == len(table) else None

    def _seek(self, key: _Packet, first: int, index: int, hidden: int) -> Iterator[TimedFrame] | None:
        """The frames from the one with timestamp `first` on, read from `key` on; None where it is not the first.

        index: frames before it; hidden: packets before it that an edit list hides.
        """
        av = import_av()
        self.damage = Damage()
        try:
            self._container.seek(key.pts if key.dts is None else key.dts, stream=self._stream, backward=True)
        except (av.FFmpegError, OSError):
            return None
        self._given = index
        frames = self._decode(first, index, hidden)
        frame = next(frames, None)
        if frame is None or frame[1].pts != first or self.damage or self._interlaced:
            return None
        return itertools.chain([frame], frames)

    def _reopen(self) -> None:
        """Only a file gets here: it is opened by its name."""
        self._container.close()
        self._open(os.path.abspath(self.path), {})
        self.damage, self._given = Damage(), 0

    # -- packets to frames

    def _decode(self, first: int | None = None, shown: int = 0, hidden: int = 0) -> Iterator[TimedFrame]:
        """Packet by packet.  After a bad one: what the decoder still holds, then on from the next keyframe.

        Going straight on shows repeated and smeared pictures in the wrong order (seen with H.264: frame 88 handed out
        between 66 and 67), and a model with a memory would carry them along.
        first: timestamp before which nothing counts, after a seek; shown, hidden: how many packets lie before it.
        """
        av = import_av()
        context = self._stream.codec_context
        clock = _Clock(self._stream.average_rate, self.damage, gaps=self.info.frames is None)
        wait_for_key, skipped, packets, small = first is not None, 0, shown + hidden, 0
        for packet in self._demux(av, clock):
            flush = packet.size == 0  # the end: the decoder gives what it still holds
            before = first is not None and packet.pts is not None and packet.pts < first
            packets += not flush and not before
            hidden += packet.is_discard and not before  # by an edit list
            small += not flush and packet.size <= _NOTHING
            if flush and wait_for_key:
                break
            if not flush:
                clock.tick(packet)
                if wait_for_key and not packet.is_keyframe:
                    skipped += not before
                    continue
            if wait_for_key and skipped:
                self.damage.add(
                    f"{skipped} frames up to the next keyframe, at {clock.describe(packet)}, were left out", skipped
                )
            wait_for_key, skipped = False, 0
            try:
                if packet.is_corrupt:
                    raise av.InvalidDataError(0, "incomplete packet")
                yield from self._convert(av, packet.decode(), first)
            except av.FFmpegError as error:
                where = "at the end" if flush else f"at {clock.describe(packet)}"
                self.damage.add(f"a packet {where} could not be decoded ({_words(error)})", 1)
                if flush:
                    break
                yield from self._drain(av, context, packet.pts, first)
                wait_for_key = True
        if skipped:
            self.damage.add(f"{skipped} frames up to the end were left out, as no keyframe came any more", skipped)
        declared = self.info.frames
        if declared and packets < declared:
            self.damage.add(
                f"the file ends early: it declares {declared} frames and holds {packets}", declared - packets
            )
        clock.check_end(self._container)
        if self.damage:
            return
        expected = packets - hidden
        if self.info.codec == "mpeg4":
            expected -= small
        elif self.info.codec not in _A_FRAME_A_PACKET or self._interlaced:  # a packet may be a field
            expected = 0
        if self._given < expected:
            self.damage.add(f"the decoder gave {self._given} frames for {expected} packets", expected - self._given)
        if first is None and "mov" in self._container.format.name:
            self.hidden = max(0, self._stream.frames - self._given)
        if self._is_file and (why := fault_in(self.path, self._container.format.name)):
            self.damage.add(why)

    def _demux(self, av: Any, clock: _Clock) -> Iterator[Any]:
        """Packets of the video stream.  A read error is damage; reading goes on for as long as packets still come."""
        while True:
            progress = False
            try:
                for packet in self._container.demux():
                    progress = progress or packet.size > 0
                    if packet.stream is self._stream or packet.stream.index == self._stream.index:
                        yield packet
                    clock.note_end(packet)
                return
            except IndexError:  # PyAV's word for a packet of a stream that nobody knew of when the file was opened
                continue
            except (av.FFmpegError, OSError) as error:
                hint = ""
                if not self._is_file and clock.before is None and "mov" in self._container.format.name:
                    hint = "; an MP4 with its index at its end cannot be read from a pipe"
                self.damage.add(f"the file could not be read {clock.last()} ({_words(error)}{hint})")
                if not progress:
                    return

    def _drain(self, av: Any, context: Any, bad: int | None, first: int | None) -> Iterator[TimedFrame]:
        """What the decoder still holds, but for the frame of the bad packet; then it starts anew."""
        with contextlib.suppress(av.FFmpegError):  # the damage itself was recorded by the caller
            frames = context.decode(None)
            whole = [frame for frame in frames if frame.pts != bad and not frame.is_corrupt]
            yield from self._convert(av, whole, first)
        context.flush_buffers()

    def _convert(self, av: Any, frames: list[Any], first: int | None) -> Iterator[TimedFrame]:
        """A frame that the decoder itself calls corrupt (patched up from its neighbours) counts as a bad packet."""
        base = self._stream.time_base  # frames out of a drained decoder carry no time base of their own
        for frame in frames:
            if first is not None and frame.pts is not None and frame.pts < first:
                continue
            if frame.is_corrupt:
                raise av.InvalidDataError(0, "its frame is corrupt")
            self._given += 1
            self._interlaced = self._interlaced or frame.interlaced_frame
            yield float(frame.pts * base) if frame.pts is not None and base else None, frame


TimedFrame = tuple["float | None", Any]  # seconds, and FFmpeg's frame
_REORDER = 64  # packets; the longest way is 16 frames


@dataclass(frozen=True, slots=True)
class _Packet:
    pts: int
    dts: int | None
    is_key: bool
    is_hidden: bool  # by an edit list


def _reached(place: Place, index: int, time: float | None, reader: VideoReader | None = None) -> bool:
    """Whether the frame lies at `place` or behind it; None lies behind all."""
    if place is None or isinstance(place, int):
        return place is not None and index >= place
    if time is None:
        path = "the source" if reader is None else reader.path
        raise VideoError(f"{path} has frames without a time: name {_place_words(place)} as the index of a frame")
    return time >= place - _TICK


def _first_at(times: list[int], base: Fraction, seconds: float) -> int:
    """Index of the first of sorted timestamps at or after `seconds`."""
    return bisect.bisect_left(times, seconds - _TICK, key=lambda stamp: float(stamp * base))


_TICK = 1e-6  # seconds: a time that was printed and typed in again still means its frame


def _place_words(place: Place) -> str:
    return f"{place:g} s" if isinstance(place, float) else f"frame {place}"


Pictures = tuple[Tensor, "Tensor | None"]  # for the model, and for a person where one was asked for


class _Scaler:
    """FFmpeg frame -> (h, w, 3) uint8, upright.  One swscale context for each size: one a frame costs more than
    decoding.

    What the model gets has its size from `resize`, the one that training uses; swscale only converts its colours
    (scaling too, it would filter the colours where the file stores them, at half the size, and be up to 2 of 255
    levels off).  The picture for a person is scaled by swscale.
    """

    def __init__(self, size: tuple[int, int] | None, picture: int | None = None) -> None:
        from av.video.reformatter import VideoReformatter

        self.size, self.picture = size, picture
        self.for_model, self.for_person = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: Any) -> Pictures:
        turns = round(frame.rotation / 90) % 4  # a quarter to the left each
        height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        rgb = self._scale(self.for_model, frame, (height, width), turns)
        if self.size is not None:
            rgb = resize(rgb, self.size)
        if self.picture is None:
            return rgb, None
        shrink = min(1.0, self.picture / max(height, width))
        even = tuple(max(2, 2 * round(side * shrink / 2)) for side in (height, width))
        return rgb, self._scale(self.for_person, frame, even, turns)

    @staticmethod
    def _scale(reformatter: Any, frame: Any, size: tuple[int, ...], turns: int) -> Tensor:
        height, width = size[::-1] if turns % 2 else size
        # threads=1: at these sizes a second swscale thread costs more than it saves.
        out = reformatter.reformat(
            frame,
            width,
            height,
            "rgb24",
            src_colorspace=frame.colorspace,
            src_color_range=frame.color_range,
            interpolation="BILINEAR",
            threads=1,
        )
        return torch.from_numpy(np.array(np.rot90(out.to_ndarray(), turns), order="C"))


class _Clock:
    """Follows the packets' times: where we are, whether packets vanished in silence, whether the end was reached."""

    def __init__(self, rate: Fraction | None, damage: Damage, gaps: bool) -> None:
        self.period = float(1 / rate) if rate else None
        self.damage = damage
        self.gaps = gaps and self.period is not None
        self.steps = self.regular = 0
        self.jumps: list[tuple[float, float]] = []
        self.before: float | None = None
        self.end = 0.0

    def tick(self, packet: Any) -> None:
        """A jump in a stream that is regular else: packets are gone (Matroska and TS skip damage in silence)."""
        if packet.dts is None:
            return
        now = float(packet.dts * packet.time_base)
        if self.before is not None and self.gaps:
            step = now - self.before
            if step > 3.5 * self.period:
                self.jumps.append((self.before, now))
            else:
                self.steps += 1
                self.regular += step < 1.5 * self.period
            self._judge_jumps()
        self.before = now

    def _judge_jumps(self) -> None:
        """Only what lies between tells a damaged stream from one with a rhythm of its own."""
        if self.steps < 10 or not self.jumps:
            return
        if self.regular >= 0.95 * self.steps:
            for before, now in self.jumps:
                missing = round((now - before) / self.period) - 1
                self.damage.add(f"about {missing} frames are missing between {before:.3f} s and {now:.3f} s", missing)
        else:
            self.steps += len(self.jumps)
        self.jumps.clear()

    def describe(self, packet: Any) -> str:
        stamp = packet.pts if packet.pts is not None else packet.dts
        return f"{float(stamp * packet.time_base):.3f} s" if stamp is not None else "an unknown time"

    def last(self) -> str:
        return f"after {self.before:.3f} s" if self.before is not None else "at its start"

    def note_end(self, packet: Any) -> None:
        if packet.pts is not None and packet.size:
            self.end = max(self.end, float((packet.pts + (packet.duration or 0)) * packet.time_base))

    def check_end(self, container: Any) -> None:
        """Matroska counts no frames, but a finished file says how long it is."""
        if "matroska" not in container.format.name or not container.duration or self.damage:
            return
        declared = container.duration / 1e6
        if self.end < declared - max(0.2, 2.5 * (self.period or 0.0)):
            lost = round((declared - self.end) / self.period) if self.period else 0
            self.damage.add(f"the file ends early: it declares {declared:.2f} s and holds {self.end:.2f} s", lost)


class Gaps:
    """Frames that a regular rhythm asks for and that did not come: lost to damage that left no other trace, or never
    recorded, which nobody can tell apart; and times that go back.  False where there is neither.

    lost: how many are missing.  first: the times in seconds between which the first of them would lie.
    back: the time of the first frame that is earlier than the one before.
    """

    def __init__(self, fps: float | None) -> None:
        self.period = 1.0 / fps if fps else None
        self.steps = self.regular = self.missing = 0
        self.first: tuple[float, float] | None = None
        self.before: float | None = None
        self.back: float | None = None

    def add(self, time: float | None) -> None:
        before, self.before = self.before, time
        if time is not None and before is not None and time < before and self.back is None:
            self.back = time
        if time is None or before is None or self.period is None:
            return
        periods = (time - before) / self.period
        self.steps += 1
        self.regular += 0.5 < periods < 1.5
        if periods >= 1.5:
            self.missing += round(periods) - 1
            self.first = self.first or (before, time)

    @property
    def lost(self) -> int:
        return self.missing if self.steps >= 10 and self.regular >= 0.95 * self.steps else 0

    def __bool__(self) -> bool:
        return self.lost > 0 or self.back is not None

    def __str__(self) -> str:
        if self.back is not None:
            return f"its times go back at {self.back:.3f} s: frames may be missing there"
        if not self.lost:
            return ""
        before, after = self.first
        where = f"between {before:.3f} s and {after:.3f} s"
        if self.lost == 1:
            return f"by its times one frame is missing, {where}: lost, or never recorded"
        return f"by its times about {self.lost} frames are missing, the first {where}: lost, or never recorded"


_A_FRAME_A_PACKET = ("h264", "hevc", "vp9", "av1", "mjpeg")
_NOTHING = 19  # bytes: MPEG-4 has packets that stand for nothing, at most so large (FFmpeg's MAX_NVOP_SIZE)


class DicomReader(VideoReader):
    """A DICOM clip: single pictures of any transfer syntax pydicom can decode, or a whole encapsulated video stream."""

    def __init__(self, path: Path, size: tuple[int, int] | None, *, threads: int = 0) -> None:
        pydicom = _import("pydicom", "read DICOM files")
        import_av()
        self._source = str(path)
        self._raw: Any = None
        try:
            # Encapsulated video has to be taken out whole; pictures are read one by one from the file.
            self._dataset = pydicom.dcmread(path, stop_before_pixels=True, force=False)
            syntax = str(self._dataset.file_meta.TransferSyntaxUID)
            self._video = syntax.startswith(_DICOM_VIDEO)
            if self._video:
                data = _encapsulated_stream(pydicom, path)
        except VideoError:
            raise
        except Exception as error:  # pydicom raises many kinds, and all of them mean that the file is not readable
            why = "its header is incomplete" if isinstance(error, AttributeError) else _words(error)
            raise VideoError(f"{path} is not a DICOM file that can be read ({why})") from error
        ds = self._dataset
        if self._video:
            super().__init__(path, size, threads=threads, source=io.BytesIO(data))
            declared = int(ds.get("NumberOfFrames") or 0) or self.info.frames
            self.info = replace(self.info, container="dicom", fps=self.info.fps or _dicom_fps(ds), frames=declared)
            return
        if not ds.get("Rows") or not ds.get("Columns"):
            raise VideoError(f"{path} is a DICOM file without pictures ({ds.get('Modality') or 'no modality'})")
        self.path = path
        self._start(size)
        name = pydicom.uid.UID(syntax).name
        self.info = VideoInfo(
            path=str(path),
            container="dicom",
            codec=name,
            height=int(ds.Rows),
            width=int(ds.Columns),
            fps=_dicom_fps(ds),
            frames=int(ds.get("NumberOfFrames") or 1),
        )

    def close(self) -> None:
        if self._video:
            super().close()

    def _decode(self, *after_seek: int) -> Iterator[TimedFrame]:
        if self._video:
            yield from super()._decode(*after_seek)
            return
        from pydicom.pixels import iter_pixels

        av = import_av()
        total = self.info.frames
        times = _dicom_times(self._dataset, total)
        here, lost = 0, 0
        while here < total:
            try:
                for pixels in iter_pixels(self._source, indices=range(here, total)):
                    rgb = _dicom_rgb(pixels, self._dataset)
                    yield times[here], av.VideoFrame.from_ndarray(rgb, format="rgb24")
                    here += 1
                break
            except Exception as error:  # pydicom and its plugins raise many kinds; the frame is lost, the next is tried
                if _lacks_decoder(error):
                    raise VideoError(f"{self.path} cannot be decoded here ({_words(error)})") from error
                lost += 1
                if lost == 1:
                    first = f"the first of them frame {here} ({_words(error)})"
                    self.damage.add("")
                    place = len(self.damage.notes) - 1
                self.damage.lost += 1
                self.damage.notes[place] = f"{lost} of {total} frames could not be decoded, {first}"
                here += 1


def _encapsulated_stream(pydicom: Any, path: Path) -> bytes:
    """The items of the pixel data after the offset table, joined; where the file is cut off, as much as there is."""
    parts = []
    with path.open("rb") as file:
        pydicom.dcmread(file, stop_before_pixels=True)
        header = file.read(
            12
        )  # tag, VR "OB", 2 reserved, length: compressed syntaxes are all explicit and little-endian
        if header[:4] != b"\xe0\x7f\x10\x00":
            raise VideoError(f"{path} is a DICOM file whose video is missing or cut off")
        while (item := file.read(8))[:4] == b"\xfe\xff\x00\xe0" and len(item) == 8:
            parts.append(file.read(int.from_bytes(item[4:], "little")))
    return b"".join(parts[1:])


def _dicom_fps(ds: Any) -> float | None:
    if ds.get("FrameTime"):
        return 1000.0 / float(ds.FrameTime)
    rate = ds.get("CineRate") or ds.get("RecommendedDisplayFrameRate")
    return float(rate) if rate else None


def _dicom_times(ds: Any, frames: int) -> list[float | None]:
    """Frame Time Vector: milliseconds since the frame before.  Else Frame Time or a rate.  Else nothing is known."""
    vector = ds.get("FrameTimeVector")
    if vector is not None and not isinstance(vector, (str, float, int)) and len(vector) == frames:
        return [float(time) / 1000.0 for time in np.cumsum([float(step) for step in vector])]
    fps = _dicom_fps(ds)
    return [index / fps if fps else None for index in range(frames)]


def _dicom_rgb(pixels: np.ndarray, ds: Any) -> np.ndarray:
    """(h, w) or (h, w, 3) as pydicom hands it out (YBR is RGB already) -> (h, w, 3) uint8."""
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    kind = ds.PhotometricInterpretation
    bits = int(ds.BitsStored)
    if kind == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, ds)
        bits = int(ds.RedPaletteColorLookupTableDescriptor[2])
    if pixels.ndim == 3:
        return pixels if pixels.dtype == np.uint8 and bits <= 8 else _to_uint8(pixels, 0, 2**bits - 1)
    has_window = ds.get("WindowCenter") is not None or "VOILUTSequence" in ds
    signed = bool(int(ds.get("PixelRepresentation") or 0))
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if has_window:
        slope, intercept = float(ds.get("RescaleSlope") or 1), float(ds.get("RescaleIntercept") or 0)
        pixels = apply_voi_lut(apply_modality_lut(pixels, ds), ds)
        low, high = sorted((low * slope + intercept, high * slope + intercept))
        if "VOILUTSequence" in ds:
            low, high = 0, 2 ** int(ds.VOILUTSequence[0].LUTDescriptor[2]) - 1
    grey = _to_uint8(pixels, low, high)
    if kind == "MONOCHROME1":
        grey = 255 - grey
    return np.repeat(grey[:, :, None], 3, axis=2)


def _to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    if (low, high) == (0, 255) and values.dtype == np.uint8:
        return values
    scaled = (values.astype(np.float32) - low) * (255.0 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _lacks_decoder(error: Exception) -> bool:
    return isinstance(error, ImportError | NotImplementedError) or "missing required dependencies" in str(error)


def _words(error: BaseException) -> str:
    """An error's own words without the path and number that FFmpeg wraps around them."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = " ".join(text.split()).replace(_PLUGINS, "").split(" <_io.")[0]
    return text.removesuffix(_FORCE)[:200]


_PLUGINS = "Unable to decode as exceptions were raised by all available plugins: "
_FORCE = ". Use force=True to force reading."


def write_video(
    path: str | os.PathLike,
    frames: Iterable[Tensor | np.ndarray],
    *,
    fps: float = 25.0,
    codec: str = "libx264",
    pix_fmt: str | None = None,
    gop: int | None = None,
    options: dict[str, str] | None = None,
    metadata: dict[str, str] | None = None,
) -> int:
    """Encodes uint8 RGB frames (h, w, 3) into the container that `path` ends with; returns how many there were.

    gop: frames from one keyframe to the next.  options: the encoder's own, such as {"crf": "18"}.
    metadata: the container's, such as {"comment": "..."}; mp4 drops keys it does not know.
    """
    av = import_av()
    pix_fmt = pix_fmt or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
    count, stream, shape = 0, None, None
    with av.open(os.path.abspath(path), "w") as container:
        container.metadata.update(metadata or {})
        for frame in frames:
            rgb = frame.detach().cpu().numpy() if isinstance(frame, Tensor) else np.asarray(frame)
            if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3 or (shape and rgb.shape != shape):
                want = shape or "(h, w, 3)"
                raise ValueError(f"write_video: frame {count} must be uint8 {want}, got {rgb.dtype} {rgb.shape}")
            if stream is None:
                shape = rgb.shape
                if "420" in pix_fmt and (shape[0] % 2 or shape[1] % 2):
                    raise ValueError(f"write_video: {pix_fmt} needs an even height and width, got {shape[:2]}")
                stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options or {})
                stream.height, stream.width, stream.pix_fmt = shape[0], shape[1], pix_fmt
                if gop is not None:
                    stream.codec_context.gop_size = gop
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            for packet in stream.encode(picture):
                container.mux(packet)
            count += 1
        if stream is None:
            raise ValueError("write_video: there is no frame to write")
        for packet in stream.encode():
            container.mux(packet)
    return count
