"""Frames out of a video, one at a time, at the size a model wants; and frames into a video.

`open_video` reads any container FFmpeg reads (PyAV) and DICOM clips (pydicom), one packet at a time, so that damage in
the middle of a file costs the frames up to the next keyframe and no more.  `reader.damage` says in words what was lost.

    with open_video("clip.mp4", size=224) as reader:
        for frame in reader:                      # Frame: index, time in seconds, rgb (224, 224, 3) uint8
            x = preprocess(frame.rgb, size=224)   # (3, 224, 224) float32, normalised
    print(reader.damage or "nothing lost")

Neither library is imported before a video is opened.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What the published weights were trained with: all but the PolypDiag classifier use ImageNet's.
NORMALISATIONS = {
    "imagenet": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    "polypdiag": {"mean": (0.45, 0.45, 0.45), "std": (0.225, 0.225, 0.225)},
}

# DICOM transfer syntaxes whose pixel data is a whole MPEG-2, H.264 or HEVC stream, as endoscopy recorders write it.
_DICOM_VIDEO = tuple(f"1.2.840.10008.1.2.4.{number}" for number in range(100, 109))


class VideoError(Exception):
    """This file cannot be read as a video.  The message is one sentence for the person who named the file."""


@dataclass(frozen=True, slots=True)
class Frame:
    """index: 0, 1, 2, ... in the order handed out.  time: the frame's own timestamp in seconds, None where it has none.

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


def open_video(path: str | os.PathLike, size: int | tuple[int, int] | None = None, *, threads: int = 0) -> VideoReader:
    """Opens a video file or a DICOM clip.

    size: (height, width) of the frames handed out, an int for a square, None as stored.
    The picture is squashed to `size`, as the published evaluation does: nothing is cut off, nothing padded.
    threads: decoder threads, 0 lets FFmpeg choose.  Raises VideoError with one clear sentence.
    """
    path = Path(path)
    if size is not None:
        size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(size) < 1:
            raise ValueError(f"open_video: size must be positive, got {size}")
    _check_file(path)
    if _is_dicom(path):
        return DicomReader(path, size, threads=threads)
    return VideoReader(path, size, threads=threads)


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


def _import(name: str, purpose: str) -> Any:
    try:
        return __import__(name)
    except ImportError as error:
        raise VideoError(f"{name} is needed to {purpose}: pip install endomamba[video]  ({error})") from error


class VideoReader:
    """Iterates over the frames of one file.  `damage` grows while it does; `done` is true once the end was reached.

    One pass: a second one opens the file again.  Use as a context manager, or call `close`.
    path: what messages call it.  source: what `av.open` gets, by default the file of that name; options: its others.
    """

    live = False  # true where frames go on coming whether somebody reads them or not
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
        av = import_av()
        self.path = path
        self._is_file = source is None
        self._start(size)
        try:
            # An absolute path cannot be mistaken for one of FFmpeg's protocols, whatever the file is called.
            self._container = av.open(os.path.abspath(path) if source is None else source, **options)
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{path} is not a video that FFmpeg can read ({_words(error)})") from error
        try:
            self._stream = self._pick_stream(av)
            # SLICE, not FRAME: an error then belongs to the packet that was sent, and the delay is the codec's own.
            self._stream.thread_type = "SLICE"
            self._stream.codec_context.thread_count = threads
            self.info = self._read_info()
        except Exception:
            self._container.close()
            raise

    def _start(self, size: tuple[int, int] | None) -> None:
        self.damage = Damage()
        self.done = False
        self._count = self._given = 0
        self._interlaced = False
        self.show(size)

    def show(self, size: int | tuple[int, int] | None, picture: int | None = None) -> None:
        """Sets the size of the frames handed out, and asks for a `picture` with sides of at most so many pixels.

        The sides of a picture are even, as encoders want them.
        """
        self.size = (size, size) if isinstance(size, int) else size
        self._scaler = _Scaler(self.size, picture)

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
            codec=context.name,
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
        for time, (rgb, picture) in self._decode():
            yield Frame(self._count, time, rgb, picture)
            self._count += 1
        self.done = True

    def _decode(self) -> Iterator[tuple[float | None, Pictures]]:
        """Packet by packet.  After a bad one: what the decoder still holds, then on from the next keyframe.

        Going straight on shows repeated and smeared pictures in the wrong order (seen with H.264: frame 88 handed out
        between 66 and 67), and a model with a memory would carry them along.
        """
        av = import_av()
        context = self._stream.codec_context
        clock = _Clock(self._stream.average_rate, self.damage, gaps=self.info.frames is None)
        wait_for_key, skipped, packets, hidden = False, 0, 0, 0
        for packet in self._demux(av, clock):
            flush = packet.size == 0  # the end: the decoder gives what it still holds
            packets += not flush
            hidden += packet.is_discard  # before the start of an edit list
            if flush and wait_for_key:
                break
            if not flush:
                clock.tick(packet)
                if wait_for_key and not packet.is_keyframe:
                    skipped += 1
                    continue
            if wait_for_key and skipped:
                self.damage.add(
                    f"{skipped} frames up to the next keyframe, at {clock.describe(packet)}, were left out", skipped
                )
            wait_for_key, skipped = False, 0
            try:
                if packet.is_corrupt:
                    raise av.InvalidDataError(0, "incomplete packet")
                yield from self._convert(av, packet.decode())
            except av.FFmpegError as error:
                where = "at the end" if flush else f"at {clock.describe(packet)}"
                self.damage.add(f"a packet {where} could not be decoded ({_words(error)})", 1)
                if flush:
                    break
                yield from self._drain(av, context, packet.pts)
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
        one_each = self.info.codec in _A_FRAME_A_PACKET and not self._interlaced  # a packet may be a field
        if one_each and self._given < expected:
            self.damage.add(f"the decoder gave {self._given} frames for {expected} packets", expected - self._given)
        if self._is_file and (why := _broken_off(self.path, self._container.format.name)):
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
            except (av.FFmpegError, OSError) as error:
                hint = ""
                if not self._is_file and clock.before is None and "mov" in self._container.format.name:
                    hint = "; an MP4 with its index at its end cannot be read from a pipe"
                self.damage.add(f"the file could not be read {clock.last()} ({_words(error)}{hint})")
                if not progress:
                    return

    def _drain(self, av: Any, context: Any, bad: int | None) -> Iterator[tuple[float | None, Pictures]]:
        """What the decoder still holds, but for the frame of the bad packet; then it starts anew."""
        with contextlib.suppress(av.FFmpegError):  # the damage itself was recorded by the caller
            frames = context.decode(None)
            yield from self._convert(av, [frame for frame in frames if frame.pts != bad and not frame.is_corrupt])
        context.flush_buffers()

    def _convert(self, av: Any, frames: list[Any]) -> Iterator[tuple[float | None, Pictures]]:
        """A frame that the decoder itself calls corrupt (patched up from its neighbours) counts as a bad packet."""
        base = self._stream.time_base  # frames out of a drained decoder carry no time base of their own
        for frame in frames:
            if frame.is_corrupt:
                raise av.InvalidDataError(0, "its frame is corrupt")
            self._given += 1
            self._interlaced = self._interlaced or frame.interlaced_frame
            yield float(frame.pts * base) if frame.pts is not None and base else None, self._scaler(frame)


Pictures = tuple[Tensor, "Tensor | None"]  # for the model, and for a person where one was asked for


class _Scaler:
    """FFmpeg frame -> (h, w, 3) uint8, upright.  One swscale context for each size: one a frame costs more than
    decoding."""

    def __init__(self, size: tuple[int, int] | None, picture: int | None = None) -> None:
        from av.video.reformatter import VideoReformatter

        self.size, self.picture = size, picture
        self.for_model, self.for_person = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: Any) -> Pictures:
        turns = round(frame.rotation / 90) % 4  # a quarter to the left each
        height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
        rgb = self._scale(self.for_model, frame, self.size or (height, width), turns)
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


_A_FRAME_A_PACKET = ("h264", "hevc", "vp9", "av1", "mjpeg")  # MPEG-4 in AVI has packets that stand for nothing


def _broken_off(path: str | os.PathLike, container: str) -> str:
    """Why this file is not as long or not as whole as its container demands, where FFmpeg is silent about it."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_LOOK)
        file.seek(max(0, size - _LOOK))
        tail = file.read()
    if "matroska" in container:
        place = head.find(b"\x18\x53\x80\x67") + 4  # the segment, which holds everything
        first = head[place] if 4 <= place < len(head) else 0
        width = 9 - first.bit_length()
        length = int.from_bytes(head[place : place + width], "big") - (1 << 7 * width)
        unknown = length == (1 << 7 * width) - 1  # a live recording
        if first and not unknown and place + width + length > size:
            return f"the file ends early: it declares {place + width + length} bytes and holds {size}"
    if container == "mpegts":
        for unit, offset in ((188, 0), (192, 4), (204, 0)):
            marks = head[offset::unit]
            if marks.count(b"G") < 0.5 * len(marks):
                continue
            begin = -(size - len(tail)) % unit + offset
            if size % unit:
                return "the file ends in the middle of a transport packet"
            if len(marks) != marks.count(b"G") or set(tail[begin::unit]) != {71}:
                return "transport packets at its start or its end are broken"
            break
    return ""


_LOOK = 1 << 18  # bytes at either end


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

    def _decode(self) -> Iterator[tuple[float | None, Pictures]]:
        if self._video:
            yield from super()._decode()
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
                    yield times[here], self._scaler(av.VideoFrame.from_ndarray(rgb, format="rgb24"))
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


def preprocess(
    frames: Tensor,
    size: int | tuple[int, int] | None = 224,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """uint8 RGB (..., h, w, 3) -> float32 (..., 3, size, size): squashed to the size, scaled to [0, 1], normalised.

    Frames that have the size already, as `open_video(size=...)` hands them out, are only normalised.
    A resize here is torch's antialiased bilinear filter; the one in `open_video` is swscale's, the same triangle.
    """
    if frames.dtype != torch.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise ValueError(f"preprocess: frames must be uint8 (..., h, w, 3), got {frames.dtype} {tuple(frames.shape)}")
    if size is None:
        size = frames.shape[-3:-1]
    scale, shift = (t.to(frames.device) for t in normalisation(mean, std))
    return to_input(frames, (size, size) if isinstance(size, int) else tuple(size), scale, shift)


def to_input(frames: Tensor, size: tuple[int, ...], scale: Tensor, shift: Tensor) -> Tensor:
    """`preprocess` without its checks: nothing here waits for a device, so a CUDA graph can hold it.

    frames: uint8 (..., h, w, 3).  size: (height, width).  scale, shift: of `normalisation`, on the frames' device.
    """
    x = frames.movedim(-1, -3).to(torch.float32)
    if tuple(x.shape[-2:]) != tuple(size):
        flat = x.reshape(-1, *x.shape[-3:])
        flat = F.interpolate(flat, size, mode="bilinear", antialias=True, align_corners=False)
        x = flat.reshape(*x.shape[:-2], *size)
    return torch.addcmul(shift, x, scale)


def normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """scale, shift, each (3, 1, 1), so that x * scale + shift = (x / 255 - mean) / std."""
    scale = torch.tensor([1.0 / (255.0 * s) for s in std]).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)
    return scale, shift


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
