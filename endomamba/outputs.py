"""What a person gets from a stream: an annotated video, a timeline of the run, features in a file.

Each takes record, frame, output and mask of every frame as `StreamSession` hands them out, holds memory that does not
grow with the video (features: 4 bytes a channel and frame), and leaves complete files however the run ends.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont
from torch import Tensor

from .stream import write_summary, write_whole
from .video import Frame, import_av

# Told apart by people who do not see red or green too (Okabe and Ito), on dark grounds.
COLOURS = ("#56b4e9", "#e69f00", "#2fb38a", "#f0e442", "#cc79a7", "#d55e00", "#8c9eff", "#b0bec5", "#a1887f", "#aed581")
GROUND, PANEL, LINE, DIM, TEXT = "#14181c", "#1d2329", "#39424b", "#9aa7b2", "#eef2f5"
FAULT = "#ff5252"
MASK = "#7df9ff"  # on red and pink seen by all; no class has it
PARTS = {"decode": "#5c7d9a", "preprocess": "#93b48b", "model": "#d8a25e"}


def colour(label: int) -> str:
    return COLOURS[label % len(COLOURS)]


def font(size: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def seconds_text(seconds: float) -> str:
    """75.25 -> 1:15.25"""
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}:{rest:05.2f}" if minutes else f"{rest:.2f} s"


# ---- annotated video


class AnnotatedVideo:
    """The pictures with a band below them: label, confidence, time, latency, and a ribbon of the last labels.

    Where the model gives a mask, it is drawn into the picture: its outline, and a veil over what it holds.
    truth: the true class of each frame by its number; its name and a second ribbon are drawn below.

    Every frame keeps its own time.  The mp4 is written in fragments of a second: a killed process loses the last one,
    and where the disk fills, the file is cut back to whole ones.  Sound is left out.
    """

    WIDTH, TICKS = 480, 90_000  # pixels, at least; time base of the file

    def __init__(self, path: Path, names: list[str], fps: float | None, truth: Sequence[int] | None = None) -> None:
        self.path, self.names, self.fps, self.truth = path, names, fps or 25.0, truth
        self.frames = 0
        self._container: Any = None
        self._stream: Any = None
        self._last = -1
        self._ribbon: deque[str] = deque()
        self._true_ribbon: deque[str] = deque()

    def __call__(self, record: dict[str, Any], frame: Frame, values: Tensor, mask: Tensor | None = None) -> None:
        if frame.picture is None:
            raise ValueError("AnnotatedVideo: the frames carry no picture: ask the reader to show(size, picture=...)")
        image = self.draw(record, frame.picture, mask)
        with self._disk_errors():
            if self._stream is None:
                self._open(*image.size)
            elif image.size != (self._stream.width, self._stream.height):  # the source changed its size on the way
                image = image.resize((self._stream.width, self._stream.height))
            self._encode(image, self._ticks(record))
        self.frames += 1

    def _open(self, width: int, height: int) -> None:
        av = import_av()
        options = {"movflags": "frag_keyframe+delay_moov+default_base_moof", "flush_packets": "1"}
        self._container = av.open(os.path.abspath(self.path), "w", format="mp4", options=options)
        self._stream = self._container.add_stream("libx264", rate=Fraction(self.fps).limit_denominator(1001))
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        self._stream.options = {"preset": "veryfast", "crf": "22", "tune": "zerolatency"}
        context = self._stream.codec_context
        context.time_base, context.gop_size = Fraction(1, self.TICKS), max(1, round(self.fps))
        context.thread_count = 1  # the model needs the cores

    def _ticks(self, record: dict[str, Any]) -> int:
        time = record["frame"] / self.fps if record["time"] is None else record["time"]
        self._last = max(self._last + 1, round(time * self.TICKS))
        return self._last

    def _encode(self, image: Image.Image | None, ticks: int = 0) -> None:
        picture = None
        if image is not None:
            picture = import_av().VideoFrame.from_image(image)
            picture.pts, picture.time_base = ticks, Fraction(1, self.TICKS)
        for packet in self._stream.encode(picture):
            self._container.mux(packet)

    @contextlib.contextmanager
    def _disk_errors(self) -> Any:
        """What FFmpeg says about the disk, as the OSError it is; the file then ends with its last whole fragment."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):
                if self._container is not None:
                    self._container.close()
            self._container = None
            if self.path.exists():
                keep_whole_fragments(self.path)
            number = error.errno or errno.EIO
            raise OSError(number, os.strerror(number), str(self.path)) from error

    def close(self) -> None:
        """Finishes the file; nothing where no frame came."""
        if self._container is None:
            return
        with self._disk_errors():
            self._encode(None)
            self._container.close()
            self._container = None

    def draw(self, record: dict[str, Any], picture: Tensor, mask: Tensor | None = None) -> Image.Image:
        """picture: (h, w, 3) uint8, mask: logits (h, w) of any size -> the picture, not too narrow, and the band."""
        image = Image.fromarray(picture.numpy())
        scale = min(self.WIDTH / image.width, 2 * self.WIDTH / image.height)
        if scale > 1:
            image = image.resize([max(2, 2 * round(side * scale / 2)) for side in image.size], Image.Resampling.BICUBIC)
        if mask is not None:
            image = draw_mask(image, mask)
        draw_landmarks(image, record.get("landmarks") or [])
        width, top = max(self.WIDTH, image.width), image.height
        unit = round(width / 42)
        canvas = Image.new("RGB", (width, top + 2 * (7 * unit // 2)), GROUND)
        canvas.paste(image, ((width - image.width) // 2, 0))
        pen = ImageDraw.Draw(canvas)
        tint, label, confidence = self._verdict(record)
        y = top + unit // 2
        pen.rectangle((unit, y, unit + unit // 2, y + 2 * unit), fill=tint)
        pen.text((2 * unit, y + unit), label, TEXT, font(1.5 * unit), anchor="lm")
        if confidence is not None:
            left, right = width * 11 // 24, width * 16 // 24
            pen.rectangle((left, y + unit // 2, right, y + 3 * unit // 2), fill=LINE)
            pen.rectangle(
                (left, y + unit // 2, left + round((right - left) * confidence), y + 3 * unit // 2), fill=tint
            )
            pen.text((right + unit, y + unit), f"{confidence:.0%}", TEXT, font(1.3 * unit), anchor="lm")
        when = f"frame {record['frame']}" if record["time"] is None else seconds_text(record["time"])
        pen.text((width - unit, y + unit // 2), when, TEXT, font(unit), anchor="rm")
        pen.text((width - unit, y + 2 * unit), f"{record['latency_ms']:.1f} ms", DIM, font(unit), anchor="rm")
        upper, lower = top + 7 * unit // 2 + unit, top + 6 * unit
        if self.truth is not None:
            true = self.truth[record["frame"]]
            pen.text((2 * unit, top + 7 * unit // 2), f"truth: {self.names[true]}", DIM, font(unit), anchor="lm")
            middle = (upper + lower) // 2
            self._draw_ribbon(pen, self._true_ribbon, colour(true), (unit, middle + 2, width - unit, lower), unit)
            lower = middle
        self._draw_ribbon(pen, self._ribbon, tint, (unit, upper, width - unit, lower), unit)
        return canvas

    def _verdict(self, record: dict[str, Any]) -> tuple[str, str, float | None]:
        """-> colour, label, confidence."""
        if record["fault"]:
            return FAULT, f"output {record['fault']}: frame skipped", None
        if record["labels"]:
            return colour(record["labels"][0]), self.names[record["labels"][0]], record["probabilities"][0]
        if record.get("mask_share") is not None:
            return COLOURS[0], f"mask: {record['mask_share']:.1%} of the picture", None
        if record.get("landmarks"):
            return COLOURS[0], f"{sum(seen > 0.5 for seen, _, _ in record['landmarks'])} landmarks in sight", None
        change = record["change"]
        return COLOURS[0], "no head" if change is None else f"no head; change {change:.1e}", None

    def _draw_ribbon(
        self, pen: ImageDraw.ImageDraw, ribbon: deque[str], tint: str, box: tuple[int, ...], unit: int
    ) -> None:
        """One stripe a frame, the newest at the right."""
        left, top, right, bottom = box
        step = max(2, unit // 4)
        ribbon.append(tint)
        while len(ribbon) > (right - left) // step:
            ribbon.popleft()
        pen.rectangle(box, fill=PANEL)
        for back, past in enumerate(reversed(ribbon)):
            pen.rectangle((right - (back + 1) * step, top, right - back * step - 1, bottom), fill=past)


def draw_landmarks(image: Image.Image, landmarks: list[list[float]]) -> None:
    """A ring around each that is likelier in sight than not, in a colour of its own; in place."""
    pen, radius = ImageDraw.Draw(image), max(3, max(image.size) // 60)
    for number, (seen, x, y) in enumerate(landmarks):
        if seen > 0.5:
            left, top = x * image.width - radius, y * image.height - radius
            pen.ellipse((left, top, left + 2 * radius, top + 2 * radius), outline=colour(number), width=radius // 3)


def draw_mask(image: Image.Image, mask: Tensor, veil: float = 0.3) -> Image.Image:
    """mask: logits (h, w), stretched over the image; what is above 0 gets a veil and an outline inside its border."""
    logits = F.interpolate(mask[None, None].float(), image.size[::-1], mode="bilinear", align_corners=False)[0, 0]
    inside = logits > 0
    line = max(1, round(max(image.size) / 320))  # pixels
    deep = -F.max_pool2d(-inside[None].float(), 2 * line + 1, 1, line)[0] > 0  # the picture's edge is no border
    share = torch.where(inside & ~deep, 1.0, inside * veil).unsqueeze(2)
    tint = torch.tensor(ImageColor.getrgb(MASK), dtype=torch.float32)
    pixels = torch.from_numpy(np.array(image)).float()
    return Image.fromarray(torch.lerp(pixels, tint.expand_as(pixels), share).round().to(torch.uint8).numpy())


def keep_whole_fragments(path: Path) -> None:
    """Cuts a fragmented mp4 off behind its last complete fragment; removes it where it has none."""
    size = path.stat().st_size
    place = whole = 0
    with path.open("r+b") as file:
        while place + 8 <= size:
            file.seek(place)
            head = file.read(8)
            place += int.from_bytes(head[:4], "big") or size
            if place > size:
                break
            if head[4:] == b"mdat":
                whole = place
        file.truncate(whole)
    if not whole:
        path.unlink()


# ---- timeline


@dataclass
class Column:
    """Some frames in a row: sums over them, and the largest latency.  true: the class of the first, where known."""

    begin: float
    frames: int = 0
    faults: int = 0
    change: float = 0.0
    probabilities: dict[int, float] = field(default_factory=dict)
    parts: list[float] = field(default_factory=lambda: [0.0] * len(PARTS))
    slowest: float = 0.0
    true: int | None = None

    def add(self, other: Column) -> None:
        self.frames += other.frames
        self.faults += other.faults
        self.change += other.change
        for label, value in other.probabilities.items():
            self.probabilities[label] = self.probabilities.get(label, 0.0) + value
        self.parts = [a + b for a, b in zip(self.parts, other.parts, strict=True)]
        self.slowest = max(self.slowest, other.slowest)

    @property
    def label(self) -> int | None:
        return max(self.probabilities, key=self.probabilities.__getitem__, default=None)


class Timeline:
    """A run as one picture: labels, probabilities (without a head: how much the output changes), latency.

    truth: the true class of each frame by its number, drawn below the labels.
    A video of any length becomes at most COLUMNS columns: neighbours are added up when there are more.
    """

    COLUMNS, CURVES = 1024, 6
    WIDTH, LEFT, RIGHT = 1280, 76, 28

    def __init__(self, names: list[str], fps: float | None, truth: Sequence[int] | None = None) -> None:
        self.names, self.fps, self.truth = names, fps, truth
        self.columns: list[Column] = []
        self.each = 1
        self.end = 0.0
        self.timed = True

    def __call__(self, record: dict[str, Any], frame: Frame, values: Tensor, mask: Tensor | None = None) -> None:
        self.timed = self.timed and record["time"] is not None
        place = record["time"] if record["time"] is not None else float(record["frame"])
        one = Column(place, 1, int(record["fault"] is not None), record["change"] or 0.0)
        one.probabilities = dict(zip(record["labels"], record["probabilities"], strict=True))
        one.parts = [record[f"{name}_ms"] for name in PARTS]
        one.slowest = record["latency_ms"]
        one.true = None if self.truth is None else self.truth[record["frame"]]
        if self.columns and self.columns[-1].frames < self.each:
            self.columns[-1].add(one)
        else:
            if len(self.columns) == self.COLUMNS:
                self._merge()
            self.columns.append(one)
        self.end = max(self.end, place)

    def _merge(self) -> None:
        for left, right in zip(self.columns[::2], self.columns[1::2], strict=True):
            left.add(right)
        self.columns = self.columns[::2]
        self.each *= 2

    def draw(self, summary: dict[str, Any]) -> Image.Image:
        """summary: of the session, for the title and the events."""
        canvas = Image.new("RGB", (self.WIDTH, 720), GROUND)
        pen = ImageDraw.Draw(canvas)
        self._title(pen, summary)
        if self.columns:
            self._labels(pen, (116, 156), summary)
            self._curves(pen, (206, 402))
            self._latency(pen, (452, 644), summary)
            self._time_axis(pen, 644)
        return canvas

    def save(self, path: Path, summary: dict[str, Any]) -> None:
        """Whole or not at all."""
        file = io.BytesIO()
        self.draw(summary).save(file, format="PNG", optimize=True)
        write_whole(path, file.getvalue())

    # -- parts of the picture; a box is (top, bottom)

    def _x(self, place: float) -> float:
        first = self.columns[0].begin
        share = (place - first) / (self.end - first) if self.end > first else 0.0
        return self.LEFT + (self.WIDTH - self.LEFT - self.RIGHT) * min(1.0, max(0.0, share))

    def _spans(self) -> list[tuple[float, float, Column]]:
        """Left and right edge of every column; each reaches to the next one."""
        edges = [self._x(column.begin) for column in self.columns] + [float(self.WIDTH - self.RIGHT)]
        return [(a, max(b, a + 1), column) for a, b, column in zip(edges, edges[1:], self.columns)]

    def _title(self, pen: ImageDraw.ImageDraw, summary: dict[str, Any]) -> None:
        name = Path(summary["video"]).name
        pen.text((self.LEFT, 30), name if len(name) < 60 else f"{name[:57]}...", TEXT, font(24), anchor="lm")
        pieces = [f"{summary['frames']} frames", f"{summary['frames_per_second']:.1f} frames/s"]
        pieces += [
            f"{summary[key]} {key.replace('_', ' ')}"
            for key in ("dropped", "not_finite", "lost_to_damage")
            if summary[key]
        ]
        pen.text(
            (self.LEFT, 58), f"{', '.join(pieces)}; stopped {summary['stopped']}"[:150], DIM, font(15), anchor="lm"
        )

    def _heading(self, pen: ImageDraw.ImageDraw, y: float, text: str, legend: list[tuple[str, str]]) -> None:
        pen.text((self.LEFT, y), text, TEXT, font(16), anchor="ls")
        x = float(self.WIDTH - self.RIGHT)
        for words, tint in reversed(legend):
            x -= pen.textlength(words, font(14))
            pen.text((x, y), words, TEXT, font(14), anchor="ls")
            pen.rectangle((x - 20, y - 12, x - 8, y), fill=tint)
            x -= 40

    def _labels(self, pen: ImageDraw.ImageDraw, box: tuple[int, int], summary: dict[str, Any]) -> None:
        top, bottom = box
        kinds = {"black": "#000000", "frozen": "#6d7780", "not finite": FAULT}
        seen = [event["what"] for event in summary["events"]] + ["not finite"] * bool(summary["not_finite"])
        title = "most probable class" if self._has_labels else "frames"
        if self.truth is not None:
            title, bottom = f"{title}, and below it the truth", (top + bottom) // 2
            for left, right, column in self._spans():
                pen.rectangle((left, bottom + 3, right, box[1]), fill=colour(column.true or 0))
        self._heading(pen, top - 10, title, [(what, kinds[what]) for what in kinds if what in seen])
        pen.rectangle((self.LEFT, top, self.WIDTH - self.RIGHT, bottom), fill=PANEL)
        for left, right, column in self._spans():
            tint = colour(column.label) if column.label is not None else LINE
            pen.rectangle((left, top, right, bottom), fill=tint)
        for event in summary["events"]:
            first, last = ("from", "to") if self.timed else ("first", "last")
            left, right = self._x(event[first]), self._x(event[last])
            pen.rectangle((left, bottom - 12, max(right, left + 2), bottom), fill=kinds[event["what"]])
        for left, right, column in self._spans():
            if column.faults:
                pen.rectangle((left, top, max(right, left + 2), top + 12), fill=FAULT)

    @property
    def _has_labels(self) -> bool:
        return any(column.probabilities for column in self.columns)

    def _curves(self, pen: ImageDraw.ImageDraw, box: tuple[int, int]) -> None:
        if not self._has_labels:
            curves = {0: [column.change / column.frames for column in self.columns]}
            limit = _nice(max(curves[0])) or 1.0
            self._heading(pen, box[0] - 10, "change of the output from frame to frame (1 - cosine)", [])
        else:
            total: dict[int, float] = {}
            for column in self.columns:
                for label, value in column.probabilities.items():
                    total[label] = total.get(label, 0.0) + value
            best = sorted(sorted(total, key=total.__getitem__, reverse=True)[: self.CURVES])
            curves = {
                label: [column.probabilities.get(label, 0.0) / column.frames for column in self.columns]
                for label in best
            }
            limit = min(1.0, _nice(max(map(max, curves.values()))))
            more = f" (the {len(best)} largest of {len(total)})" if len(total) > len(best) else ""
            legend = [(_short(self.names[label]), colour(label)) for label in best]
            self._heading(pen, box[0] - 10, f"probability{more}", legend)
        self._grid(pen, box, limit, "")
        for label, values in curves.items():
            self._curve(pen, box, [value / limit for value in values], colour(label))

    def _latency(self, pen: ImageDraw.ImageDraw, box: tuple[int, int], summary: dict[str, Any]) -> None:
        """Means of the parts, stacked, and above them the slowest frame of each column."""
        top, bottom = box
        whole = summary["latency"]["frame"]
        limit = _nice(1.25 * max(whole["p99_ms"], whole["p50_ms"])) or 1.0
        text = "latency of a frame: median {p50_ms:.1f}, p95 {p95_ms:.1f}, p99 {p99_ms:.1f}, max {max_ms:.1f} ms"
        self._heading(pen, top - 10, text.format(**whole), [*PARTS.items(), ("slowest frame", TEXT)])
        self._grid(pen, box, limit, " ms")
        for left, right, column in self._spans():
            level = float(bottom)
            for value, tint in zip(column.parts, PARTS.values(), strict=True):
                rise = min(value / column.frames / limit * (bottom - top), level - top)
                if rise > 0:
                    pen.rectangle((left, level - rise, right - 1, level), fill=tint)
                level -= rise
        self._curve(pen, box, [min(1.0, column.slowest / limit) for column in self.columns], TEXT, 1)
        if self.fps and 1000 / self.fps < limit:
            y = bottom - 1000 / self.fps / limit * (bottom - top)
            for x in range(self.LEFT, self.WIDTH - self.RIGHT, 14):
                pen.line((x, y, x + 7, y), FAULT, 2)
            place, words = (self.WIDTH - self.RIGHT - 6, y - 5), f"the video plays at {self.fps:.4g} frames/s"
            pen.text(place, words, TEXT, font(14), anchor="rs", stroke_width=3, stroke_fill=GROUND)

    def _grid(self, pen: ImageDraw.ImageDraw, box: tuple[int, int], limit: float, unit: str) -> None:
        top, bottom = box
        pen.rectangle((self.LEFT, top, self.WIDTH - self.RIGHT, bottom), fill=PANEL)
        for step in range(5):
            y = bottom - step * (bottom - top) / 4
            pen.line((self.LEFT, y, self.WIDTH - self.RIGHT, y), LINE)
            pen.text((self.LEFT - 8, y), f"{limit * step / 4:.3g}{unit}", DIM, font(14), anchor="rm")

    def _curve(
        self, pen: ImageDraw.ImageDraw, box: tuple[int, int], shares: list[float], tint: str, width: int = 2
    ) -> None:
        """shares: of the height, one a column; a single column becomes a level line."""
        top, bottom = box
        points = []
        for (left, right, _), share in zip(self._spans(), shares, strict=True):
            points += [(left if len(shares) == 1 else (left + right) / 2, bottom - share * (bottom - top))]
        if len(points) == 1:
            points.append((self.WIDTH - self.RIGHT, points[0][1]))
        pen.line(points, tint, width, joint="curve")

    def _time_axis(self, pen: ImageDraw.ImageDraw, bottom: int) -> None:
        first = self.columns[0].begin
        step = _nice((self.end - first) / 8) or 1.0
        if not self.timed:
            step = max(1.0, float(round(step)))
        tick = np.ceil(first / step) * step
        while tick <= self.end + 1e-9:
            x = self._x(tick)
            pen.line((x, bottom, x, bottom + 6), DIM)
            pen.text((x, bottom + 10), f"{round(tick, 6):g}", DIM, font(14), anchor="mt")
            tick += step
        words = "time in the video, in seconds" if self.timed else "frame"
        pen.text(((self.LEFT + self.WIDTH - self.RIGHT) / 2, bottom + 36), words, TEXT, font(15), anchor="mt")


def _nice(value: float) -> float:
    """The next of 1, 2, 4, 5, 10, 20, ... at or above; 0 for 0."""
    if value <= 0:
        return 0.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 2, 4, 5, 10) if step * power >= value * (1 - 1e-9)))


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}\u2026"


# ---- features


class Features:
    """What the model says of every frame, (frames, k) fp32, and its time, (frames,) fp64 in seconds, NaN where unknown.

    A frame with an output that is not finite keeps its row, of NaN.
    """

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []
        self._index: list[int] = []
        self._times: list[float] = []

    def __call__(self, record: dict[str, Any], frame: Frame, values: Tensor, mask: Tensor | None = None) -> None:
        row = values.numpy().astype(np.float32)
        self._rows.append(row if record["fault"] is None else np.full_like(row, np.nan))
        self._index.append(record["frame"])
        self._times.append(np.nan if record["time"] is None else record["time"])

    def __len__(self) -> int:
        return len(self._rows)

    def save(self, folder: Path, kind: str, metadata: dict[str, str]) -> list[Path]:
        """kind: safetensors (one file: features, time, frame) or npy (one file each); each is whole or not there."""
        arrays = {
            "features": np.stack(self._rows),
            "time": np.array(self._times, np.float64),
            "frame": np.array(self._index, np.int64),
        }
        if kind == "safetensors":
            from safetensors.torch import save

            data = save({name: torch.from_numpy(array) for name, array in arrays.items()}, metadata)
            write_whole(folder / "features.safetensors", data)
            return [folder / "features.safetensors"]
        paths = [folder / f"{name}.npy" for name in arrays]
        for path, array in zip(paths, arrays.values(), strict=True):
            file = io.BytesIO()
            np.save(file, array)
            write_whole(path, file.getvalue())
        return paths


# ---- what is true


class Agreement:
    """How often the most probable class is the true one; truth: the class of each frame by its number."""

    def __init__(self, truth: Sequence[int]) -> None:
        self.truth = truth
        self.right: Counter[int] = Counter()
        self.frames: Counter[int] = Counter()

    def __call__(self, record: dict[str, Any], frame: Frame, values: Tensor, mask: Tensor | None = None) -> None:
        if record["labels"]:
            true = self.truth[record["frame"]]
            self.frames[true] += 1
            self.right[true] += record["labels"][0] == true

    def summary(self, names: Sequence[str]) -> dict[str, Any]:
        """frames, right; commonest: how many the class has that most of them have; by class the same two."""
        each = {names[label]: {"frames": n, "right": self.right[label]} for label, n in sorted(self.frames.items())}
        total, commonest = self.frames.total(), max(self.frames.values(), default=0)
        return {"frames": total, "right": self.right.total(), "commonest": commonest, "classes": each}


# ---- a folder of all of them


class FolderOutputs:
    """timeline.png, annotated.mp4 and summary.json in a folder, beside the predictions."""

    FILES = ("summary.json", "timeline.png", "annotated.mp4")

    def __init__(
        self,
        folder: Path,
        names: list[str],
        fps: float | None,
        *,
        video: bool = True,
        truth: Sequence[int] | None = None,
    ) -> None:
        self.folder = folder
        self.timeline = Timeline(names, fps, truth)
        self.video = AnnotatedVideo(folder / "annotated.mp4", names, fps, truth) if video else None

    @property
    def outputs(self) -> list[Any]:
        return [self.timeline, self.video] if self.video is not None else [self.timeline]

    def finish(self, summary: dict[str, Any]) -> tuple[list[str], list[OSError]]:
        """-> names of the files that are complete, and what kept others from being so.

        Nothing is written for a run without a frame but its summary.
        """
        steps = {"summary.json": lambda: write_summary(self.folder / "summary.json", summary)}
        if self.timeline.columns:
            steps["timeline.png"] = lambda: self.timeline.save(self.folder / "timeline.png", summary)
        if self.video is not None and self.video.frames:
            steps["annotated.mp4"] = self.video.close
        written, problems = [], []
        for name, step in steps.items():
            try:
                step()
                written.append(name)
            except OSError as error:
                problems.append(error)
        return written, problems
