"""A video through a model, frame by frame: `FrameStream` is the runner, `StreamSession` a whole run, measured.

camera = FrameStream(model.eval())            # one per stream; any number of them may share one model, one thread each
logits = camera(frame)                        # uint8 (h, w, 3) or (3, h, w) -> (1, classes)

with open_video(path, size=224) as reader, JsonLines("predictions.jsonl") as lines:
    session = StreamSession(camera, reader, lines.write)
    session.run()
print(session.summary())
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .frame_stream import FrameStream
from .models import Packed, StreamState
from .sources import FrameQueue, ReadAhead, SourceStalled
from .video import Frame, VideoReader, preprocess

__all__ = [
    "CameraWatch",
    "FrameQueue",
    "FrameStream",
    "JsonLines",
    "Latency",
    "NonFiniteOutput",
    "StreamSession",
    "Trace",
    "Verifier",
    "write_summary",
    "write_whole",
]


class NonFiniteOutput(Exception):
    """The model gave NaN or infinity at so many frames in a row that its weights must be at fault."""


class Latency:
    """Percentiles of any number of durations in constant memory: bins 1 % wide from 1 us to 1,000 s."""

    FIRST, STEP = 1e-6, math.log(1.01)

    def __init__(self) -> None:
        self.bins = [0] * 2100
        self.count = 0
        self.total = self.largest = 0.0

    def add(self, seconds: float) -> None:
        self.largest = max(self.largest, seconds)
        place = int(math.log(max(seconds, self.FIRST) / self.FIRST) / self.STEP)
        self.bins[min(place, len(self.bins) - 1)] += 1
        self.count += 1
        self.total += seconds

    def percentile(self, percent: float) -> float:
        """In seconds, within half a percent; 0 while nothing was measured."""
        rank, seen = max(1, math.ceil(self.count * percent / 100)), 0
        for place, count in enumerate(self.bins):
            seen += count
            if seen >= rank:
                return self.FIRST * math.exp((place + 0.5) * self.STEP)
        return 0.0

    def summary(self) -> dict[str, float]:
        mean = self.total / self.count if self.count else 0.0
        values = {"mean": mean} | {f"p{percent}": self.percentile(percent) for percent in (50, 95, 99)}
        values["max"] = self.largest
        return {f"{name}_ms": round(1e3 * value, 3) for name, value in values.items()}


class Verifier:
    """Runs the same frames through the parallel pass, window by window, and compares.

    The parallel pass keeps a state of its own from window to window: nothing of the stream enters it, so an error of
    the stream at any frame stays visible, with the memory of one window.  The first window is read a second time by
    `model(video)`, which knows of no state at all.
    """

    RELATIVE = 3e-6  # of the largest output, at least 1; fp32 rounding gives about 2e-7
    STATE = 2e-5  # of the largest element of the state, at least 1

    def __init__(self, model: nn.Module, window: int = 16) -> None:
        self.model = model
        self.window = window
        self.state: StreamState = model.init_state(1)
        if not isinstance(self.state, StreamState):
            raise ValueError(
                f"Verifier: it compares the states of EndoMamba, this model has {type(self.state).__name__}"
            )
        self.frames = 0
        self.difference = self.state_difference = 0.0
        self.largest = 0.0
        self.without_state: float | None = None
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []

    def add(self, x: Tensor, output: Tensor, camera: FrameStream) -> None:
        """x: (3, h, w) normalised, output: (1, k) as streamed; camera has just read it."""
        self._inputs.append(x)
        self._outputs.append(output)
        if len(self._inputs) == self.window:
            self.flush(camera)

    @torch.inference_mode()
    def flush(self, camera: FrameStream) -> None:
        if not self._inputs:
            return
        video = torch.stack(self._inputs, 1).unsqueeze(0).to(self.state.device)  # (1, 3, t, h, w)
        streamed = torch.stack(self._outputs, 1)  # (1, t, k)
        self._inputs, self._outputs = [], []
        start = self.state
        parallel, self.state = self.model.step(video, start)
        self._compare(streamed, parallel)
        if self.frames == 0:
            self._compare(streamed, self.model(video))
        elif self.without_state is None:
            empty = replace(start, conv=torch.zeros_like(start.conv), ssm=torch.zeros_like(start.ssm))
            self.without_state = float((self.model.step(video, empty)[0] - parallel).abs().max())
        self.frames += video.shape[2]
        carried = camera.snapshot()
        for ours, theirs in ((carried.conv, self.state.conv), (carried.ssm, self.state.ssm)):
            if ours.numel():
                scale = max(1.0, float(theirs.abs().max()))
                self.state_difference = _worst(self.state_difference, float((ours - theirs).abs().max()) / scale)

    def _compare(self, streamed: Tensor, parallel: Tensor) -> None:
        self.difference = _worst(self.difference, float((streamed - parallel).abs().max()))
        self.largest = _worst(self.largest, float(parallel.abs().max()))

    @property
    def tolerance(self) -> float:
        return self.RELATIVE * max(1.0, self.largest)

    @property
    def passed(self) -> bool:
        """False for NaN too.  State differences are relative to the largest element, hence no scale there."""
        return self.difference <= self.tolerance and self.state_difference <= self.STATE

    def summary(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "frames": self.frames,
            "window": self.window,
            "max_difference": _finite(self.difference),
            "tolerance": _finite(self.tolerance),
            "max_state_difference": _finite(self.state_difference),
            "difference_without_state": self.without_state
            if self.without_state is None
            else _finite(self.without_state),
        }


def _worst(a: float, b: float) -> float:
    """max that does not lose NaN."""
    return b if math.isnan(b) or b > a else a


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class JsonLines:
    """One JSON object a line, each handed to the system whole as it comes: a killed process leaves whole lines only.

    path: a file, or None for standard output.
    """

    def __init__(self, path: str | os.PathLike | None, *, overwrite: bool = False) -> None:
        self.path = None if path is None else Path(path)
        if self.path is None:
            self._fd = os.dup(sys.stdout.fileno())
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL), 0o644)
        self._end = 0

    def write(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        done = 0
        try:
            while done < len(line):
                done += os.write(self._fd, line[done:])
        except OSError:
            if done and self.path is not None:  # a full disk took a part of the line
                os.ftruncate(self._fd, self._end)
            raise
        self._end += len(line)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(summary, indent=2) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all; an OSError names the file."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


class CameraWatch:
    """Tells a picture that stays black or stays the same: `limit` frames of it in a row are an event.

    events: what (black, frozen), first and last frame, from and to in seconds, frames.  The first KEEP are kept, all
    are counted.
    """

    BLACK, KEEP = 24, 100  # brightest level of a black picture

    def __init__(self, limit: int = 25) -> None:
        self.limit = limit
        self.count = 0
        self.events: list[dict[str, Any]] = []
        self._event: dict[str, Any] = {}
        self._run = 0
        self._before: Tensor | None = None

    def add(self, frame: Frame) -> dict[str, Any] | None:
        """-> the event where one begins with this frame."""
        rgb = frame.rgb
        what = "black" if int(rgb.max()) < self.BLACK else "frozen"
        same = self._run > 0 and what == self._event["what"]
        if what == "frozen":
            same = same and self._before is not None and torch.equal(rgb, self._before)
        self._before = rgb
        if not same:
            self._event = {"what": what, "first": frame.index, "from": frame.time}
            self._run = 0
        self._run += 1
        self._event |= {"last": frame.index, "to": frame.time, "frames": self._run}
        if self._run != self.limit:
            return None
        self.count += 1
        if len(self.events) < self.KEEP:
            self.events.append(self._event)
        return self._event


class StreamSession:
    """Decode ahead, preprocess, model, one line a frame.  `summary` tells what was done, however `run` ended.

    write: takes one record a frame, see `record`.  outputs: each is called with record, frame, the model's output (k,)
    and its mask (h, w) or None, see `models.Packed`.  report: takes a sentence on what a person should know at once.
    Memory does not grow with the video.
    back_pressure: of a `FrameQueue`, where frames come faster than the model reads them; None: "drop oldest" for a live
    source, else "block".
    """

    TOP = 10  # labels in a record
    LOST = 25  # frames in a row with an output that is not finite: the weights, not the picture

    def __init__(
        self,
        camera: FrameStream,
        reader: VideoReader,
        write: Callable[[dict[str, Any]], None],
        *,
        verifier: Verifier | None = None,
        outputs: Sequence[Callable[[dict[str, Any], Frame, Tensor, Tensor | None], None]] = (),
        report: Callable[[str], None] = lambda sentence: None,
        back_pressure: str | None = None,
    ) -> None:
        if camera.batch_size != 1:
            raise ValueError(f"StreamSession: one video needs a FrameStream of batch_size 1, got {camera.batch_size}")
        if verifier is not None and camera.positions != "processed":
            raise ValueError("StreamSession: a Verifier reads frames without gaps: it needs positions='processed'")
        self.camera, self.reader, self.write, self.verifier = camera, reader, write, verifier
        self.outputs, self.report = outputs, report
        self.frames = self.not_finite = 0
        self.stopped = "not started"
        self.decode, self.preprocess, self.model, self.whole = Latency(), Latency(), Latency(), Latency()
        self.writing = Latency()
        self.seconds = 0.0
        self.changes = Trace()
        self.watch = CameraWatch()
        self.back_pressure = back_pressure or ("drop oldest" if reader.live else "block")
        self._before: Tensor | None = None
        self._last = -1  # number of the frame before
        self._in_a_row = 0
        self._ahead: ReadAhead | None = None
        self._asked = ""

    @property
    def dropped(self) -> int:
        """Frames that came while the model was busy, and were lost."""
        return self._ahead.dropped if self._ahead is not None else 0

    @property
    def waits(self) -> int:
        """Frames for which the source had to wait until the model had read an earlier one."""
        return self._ahead.queue.waits[0] if self._ahead is not None else 0

    def stop(self, why: str) -> None:
        """Ends `run` after the frame it is at; a signal handler may call it."""
        self._asked = why
        if self._ahead is not None:
            self._ahead.stop()

    def run(self, max_frames: int | None = None, on_frame: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Streams to the end, to `max_frames`, to `stop`, or to an exception, passed on after `stopped` names it."""
        self.stopped = "at the end of the video"
        self._ahead = ReadAhead(self.reader, policy=self.back_pressure, live=self.reader.live)
        begin = time.perf_counter()
        try:
            for frame, seconds in self._ahead:
                if self._asked:
                    break
                record = self._read(frame, seconds)
                if on_frame is not None:
                    on_frame(record)
                if self.frames + self.not_finite == max_frames:
                    self.stopped = f"after the {max_frames} frames asked for"
                    break
            if self.verifier is not None:
                self.verifier.flush(self.camera)
            self.stopped = self._asked or self.stopped
        except SourceStalled as error:
            self.reader.damage.add(str(error))
            self.stopped = f"as {error}"
        except BaseException as error:
            known = {KeyboardInterrupt: "by Ctrl-C", BrokenPipeError: "as whoever read the output went away"}
            self.stopped = known.get(type(error), f"by an error: {error}")
            raise
        finally:
            self.seconds = time.perf_counter() - begin
            self.reader.abandoned = not self._ahead.close()

    def _read(self, frame: Frame, decoding: float) -> dict[str, Any]:
        """One frame through the model and into the outputs.  One that the model cannot digest leaves no trace in the
        state: the camera did not take it in, and answers NaN."""
        camera = self.camera
        camera.prepare(tuple(frame.rgb.shape[:2]))  # nothing, but for a source that changes its size
        t0 = time.perf_counter()
        if camera.positions == "elapsed":
            output = camera(frame.rgb, frame.index - self._last)
        else:
            output = camera(frame.rgb)
        self._last = frame.index
        values = output[0].float().cpu()  # waits for the device
        t2 = time.perf_counter()
        spans = (decoding, camera.preprocess_seconds, t2 - t0 - camera.preprocess_seconds)
        for latency, span in zip((self.decode, self.preprocess, self.model), spans, strict=True):
            latency.add(span)
        self.whole.add(sum(spans))
        event = self.watch.add(frame)
        if event is not None:
            where = f"frame {event['first']}" if event["from"] is None else f"{event['from']:.3f} s"
            self.report(f"the picture is {event['what']} since {where}, for {event['frames']} frames now")
        finite = bool(values.isfinite().all())
        values, mask, marks, has_labels = _parts(camera.model, values)
        record = self.record(frame, values if finite else None, spans, has_labels=has_labels)
        if marks is not None:
            record["landmarks"] = _landmarks(marks) if finite else None
        record["mask_share"] = round(float((mask > 0).float().mean()), 6) if finite and mask is not None else None
        self.write(record)
        for add in self.outputs:
            add(record, frame, values, mask if finite else None)
        self.writing.add(time.perf_counter() - t2)
        if finite:
            self.frames += 1
            self._in_a_row = 0
            if self.verifier is not None:
                rgb = frame.rgb.to(camera.device)
                x = preprocess(rgb, camera.model.config.img_size, mean=camera.mean, std=camera.std)
                self.verifier.add(x, output, camera)
        else:
            self._count_not_finite(frame)
        return record

    def _count_not_finite(self, frame: Frame) -> None:
        self.not_finite += 1
        self._in_a_row += 1
        if self.not_finite == 1:
            self.report(
                f"the model's output at frame {frame.index} is not finite; the stream goes on without the frame"
            )
        if self._in_a_row == self.LOST:
            raise NonFiniteOutput(
                f"the model's output was not finite at {self.LOST} frames in a row up to frame {frame.index}: "
                "its weights are damaged or unfit"
            )

    def record(
        self, frame: Frame, values: Tensor | None, spans: tuple[float, float, float], *, has_labels: bool
    ) -> dict[str, Any]:
        """One line of the predictions.

        time: the frame's own timestamp in seconds.  labels, probabilities: best first, empty without a head.
        change: 1 - cosine of this output and the one before, null at the first frame.
        fault: "not finite" where the model could not digest the frame (values None), else null.
        latency_ms: decode + preprocess + model, each beside it; on a GPU resize and normalisation are a part of model.
        """
        change, labels, probabilities = None, [], []
        if values is not None:
            if self._before is not None:
                change = 1.0 - float(torch.cosine_similarity(values, self._before, dim=0, eps=1e-12))
                self.changes.add(max(0.0, change))
            self._before = values
            if has_labels:
                best = torch.topk(values.softmax(0), min(self.TOP, len(values)))
                labels, probabilities = best.indices.tolist(), [round(p, 6) for p in best.values.tolist()]
        parts = zip(("decode_ms", "preprocess_ms", "model_ms"), spans, strict=True)
        return {
            "frame": frame.index,
            "time": None if frame.time is None else round(frame.time, 6),
            "labels": labels,
            "probabilities": probabilities,
            "change": None if change is None else round(max(0.0, change), 9),
            "fault": "not finite" if values is None else None,
            "latency_ms": round(1e3 * sum(spans), 3),
            **{name: round(1e3 * span, 3) for name, span in parts},
        }

    def summary(self) -> dict[str, Any]:
        damage = self.reader.damage
        return {
            "video": self.reader.info.path,
            "frames": self.frames,
            "decoded": self.frames + self.not_finite + self.dropped,
            "dropped": self.dropped,
            "waits": self.waits,
            "back_pressure": self.back_pressure,
            "positions": self.camera.positions,
            "not_finite": self.not_finite,
            "lost_to_damage": damage.lost,
            "notices": self.reader.notices,
            "stopped": self.stopped,
            "damage": str(damage) or None,
            "events": self.watch.events,
            "event_count": self.watch.count,
            "seconds": round(self.seconds, 3),
            "frames_per_second": round((self.frames + self.not_finite) / self.seconds, 3) if self.seconds else 0.0,
            "latency": {
                "frame": self.whole.summary(),
                "decode": self.decode.summary(),
                "preprocess": self.preprocess.summary(),
                "model": self.model.summary(),
                "write": self.writing.summary(),
            },
            "state_bytes": self.camera.state_bytes,
            "change": self.changes.summary(),
            "verify": self.verifier.summary() if self.verifier is not None else None,
        }


def _parts(model: nn.Module, values: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, bool]:
    """-> the output (k,), the mask (h, w) and the landmarks (K, 3) or None, whether the output is logits.

    A mask alone is the output too, and so are landmarks.
    """
    if not isinstance(model, Packed):
        return values, None, None, bool(model.config.num_classes)
    parts = model.unpack(values)
    output = next(parts[name] for name in ("logits", "features", "mask", "landmarks") if name in parts)
    return output.flatten(), parts.get("mask"), parts.get("landmarks"), "logits" in parts


def _landmarks(marks: Tensor) -> list[list[float]]:
    """(K, 3), logit of being visible, x, y -> probability, x and y from 0 to 1 across the picture."""
    return [[round(float(v), 6) for v in (logit.sigmoid(), x, y)] for logit, x, y in marks]


class Trace:
    """A curve of any length in at most 64 points: neighbours are averaged when there are more."""

    POINTS = 64

    def __init__(self) -> None:
        self.points: list[float] = []
        self.each = 1  # values a point stands for
        self.largest = 0.0
        self._sum, self._held = 0.0, 0

    def add(self, value: float) -> None:
        self.largest = max(self.largest, value)
        self._sum += value
        self._held += 1
        if self._held == self.each:
            self.points.append(self._sum / self.each)
            self._sum, self._held = 0.0, 0
        if len(self.points) == self.POINTS:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2], strict=True)]
            self.each *= 2

    def sparkline(self) -> str:
        """As characters, from 0 to the largest point."""
        top = max(self.points, default=0.0)
        return "".join("▁▂▃▄▅▆▇█"[min(7, int(8 * point / top))] if top > 0 else "▁" for point in self.points)

    def summary(self) -> dict[str, float]:
        mean = sum(self.points) / len(self.points) if self.points else 0.0
        return {"mean": round(mean, 9), "max": round(self.largest, 9)}
