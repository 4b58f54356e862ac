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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .models import StreamState
from .video import IMAGENET_MEAN, IMAGENET_STD, VideoReader, normalisation, preprocess


class FrameStream:
    """Runs `batch_size` streams through `model`, one frame of each a call.  Inference only; the state changes in place.

    One object belongs to one thread.  The model is shared and never written to, so that two streams on it do not meet.
    mean, std: of uint8 frames, in [0, 1]; floating-point frames are taken as normalised.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int = 1,
        *,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        if model.training:
            raise ValueError(
                "FrameStream: the model is in training mode, its DropPath is random: call model.eval() first"
            )
        self.model = model
        self.batch_size = batch_size
        self.frames_seen = 0
        self._state = model.init_state(batch_size)
        self._dtype = next(model.parameters()).dtype
        self._scale, self._shift = (t.to(self._state.device) for t in normalisation(mean, std))
        self.mean, self.std = mean, std
        self._any_size = model.config.dynamic_img_size
        self._input = self._buffer(*model.config.img_size)

    def _buffer(self, height: int, width: int) -> Tensor:
        shape = (self.batch_size, self.model.config.in_channels, 1, height, width)
        return torch.empty(shape, dtype=self._dtype, device=self._state.device)

    def __call__(self, frame: Tensor) -> Tensor:
        """frame: (3, h, w), (h, w, 3), or with the streams in front (b, ...); uint8, or normalised floating point.

        -> what `model.step` gives for it: logits (b, classes), or features (b, c) of a model without a head.
        """
        x = self._channels_first(frame)
        with torch.inference_mode():
            if x.shape[-2:] != self._input.shape[-2:]:
                self._input = self._buffer(*x.shape[-2:])
            target = self._input[:, :, 0]
            target.copy_(x)
            if x.dtype == torch.uint8:
                target.mul_(self._scale).add_(self._shift)
            logits = self.model.step_(self._input, self._state)[:, 0]
        self.frames_seen += 1
        return logits

    def _channels_first(self, frame: Tensor) -> Tensor:
        """-> (b, 3, h, w) of the size the model takes, or a ValueError that names what was expected."""
        x = frame.unsqueeze(0) if frame.ndim == 3 else frame
        height, width = self.model.config.img_size
        channels, streams = self.model.config.in_channels, self.batch_size
        if x.ndim == 4 and x.shape[1] != channels and x.shape[3] == channels:
            x = x.permute(0, 3, 1, 2)
        good_type = x.dtype == torch.uint8 or x.is_floating_point()
        good_size = self._any_size or tuple(x.shape[2:]) == (height, width)
        if x.ndim != 4 or x.shape[:2] != (streams, channels) or not good_size or not good_type:
            lead = "" if streams == 1 else f"{streams}, "
            size = "h, w" if self._any_size else f"{height}, {width}"
            raise ValueError(
                f"FrameStream: a frame must be uint8 or normalised floating point ({lead}{channels}, {size}) or "
                f"({lead}{size}, {channels}), got {frame.dtype} {tuple(frame.shape)}; "
                "endomamba.video.preprocess brings frames to a size"
            )
        return x

    @property
    def state_bytes(self) -> int:
        """All that is carried from frame to frame, whatever the length of the video."""
        return self._state.nbytes

    def warm_up(self) -> None:
        """Reads one black frame and forgets it: the first call of a process is far slower than the second."""
        before = self.snapshot()
        seen = self.frames_seen
        self(torch.zeros_like(self._input[:, :, 0]))
        self.restore(before)
        self.frames_seen = seen

    def reset(self) -> None:
        """The next frame is the first of a video."""
        self._state.reset_()
        self.frames_seen = 0

    def snapshot(self) -> StreamState:
        """A copy of the state, for `restore`, for `StreamState.save`, or for `model.step`."""
        return self._state.clone()

    def restore(self, state: StreamState) -> None:
        """Goes on from `state`; ValueError in one sentence if it belongs to another model, batch, device or dtype."""
        try:
            self._state.copy_(state)
        except ValueError as error:
            raise ValueError(f"FrameStream.restore: {error}") from None
        self.frames_seen = int(self._state.frame.max())


class NonFiniteOutput(Exception):
    """The model gave NaN or infinity.  From here on its state is lost, so the stream stops."""


class Latency:
    """Percentiles of any number of durations in constant memory: bins 1 % wide from 1 us to 1,000 s."""

    FIRST, STEP = 1e-6, math.log(1.01)

    def __init__(self) -> None:
        self.bins = [0] * 2100
        self.count = 0
        self.total = 0.0

    def add(self, seconds: float) -> None:
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
        values = {"mean": mean, "p50": self.percentile(50), "p99": self.percentile(99)}
        return {f"{name}_ms": round(1e3 * value, 3) for name, value in values.items()}


class Verifier:
    """Runs the same frames through the parallel pass, window by window, and compares.

    The parallel pass keeps a state of its own from window to window: nothing of the stream enters it, so an error of
    the stream at any frame stays visible, with the memory of one window.  The first window is read a second time by
    `model(video)`, which knows of no state at all.
    """

    RELATIVE = 5e-6  # of the largest output, at least 1; fp32 rounding gives about 1e-7
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


class StreamSession:
    """Decode, preprocess, model, one line a frame.  `summary` tells what was done, however `run` ended.

    write: takes one record a frame, see `record`.  Memory does not grow with the video.
    """

    TOP = 10  # labels in a record

    def __init__(
        self,
        camera: FrameStream,
        reader: VideoReader,
        write: Callable[[dict[str, Any]], None],
        *,
        verifier: Verifier | None = None,
    ) -> None:
        if camera.batch_size != 1:
            raise ValueError(f"StreamSession: one video needs a FrameStream of batch_size 1, got {camera.batch_size}")
        self.camera, self.reader, self.write, self.verifier = camera, reader, write, verifier
        self.frames = 0
        self.stopped = "not started"
        self.decode, self.preprocess, self.model, self.whole = Latency(), Latency(), Latency(), Latency()
        self.changes = Trace()
        self._before: Tensor | None = None

    def run(self, max_frames: int | None = None, on_frame: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Streams to the end, to `max_frames`, or to an exception, which is passed on after `stopped` names it."""
        frames, camera = iter(self.reader), self.camera
        self.stopped = "at the end of the video"
        try:
            while max_frames is None or self.frames < max_frames:
                t0 = time.perf_counter()
                frame = next(frames, None)
                if frame is None:
                    break
                t1 = time.perf_counter()
                x = preprocess(frame.rgb, camera.model.config.img_size, mean=camera.mean, std=camera.std)
                t2 = time.perf_counter()
                output = camera(x)
                values = output[0].float().cpu()  # waits for the device
                t3 = time.perf_counter()
                spans = (t1 - t0, t2 - t1, t3 - t2, t3 - t0)
                for latency, span in zip((self.decode, self.preprocess, self.model, self.whole), spans, strict=True):
                    latency.add(span)
                record = self.record(frame.index, frame.time, values, 1e3 * spans[3])
                self.write(record)
                self.frames += 1
                if self.verifier is not None:
                    self.verifier.add(x, output, camera)
                if on_frame is not None:
                    on_frame(record)
            else:
                self.stopped = f"after the {max_frames} frames asked for"
            if self.verifier is not None:
                self.verifier.flush(camera)
        except BaseException as error:
            known = {KeyboardInterrupt: "by Ctrl-C", BrokenPipeError: "as whoever read the output went away"}
            self.stopped = known.get(type(error), f"by an error: {error}")
            raise

    def record(self, index: int, seconds: float | None, values: Tensor, latency_ms: float) -> dict[str, Any]:
        """One line of the predictions.

        time: the frame's own timestamp in seconds.  labels, probabilities: best first, empty without a head.
        change: 1 - cosine of this output and the one before, null at the first frame.
        """
        if not bool(values.isfinite().all()):
            raise NonFiniteOutput(
                f"the model's output at frame {index} is not finite: its weights are damaged or unfit"
            )
        change = None
        if self._before is not None:
            change = 1.0 - float(torch.cosine_similarity(values, self._before, dim=0, eps=1e-12))
            self.changes.add(max(0.0, change))
        self._before = values
        labels, probabilities = [], []
        if self.camera.model.config.num_classes:
            best = torch.topk(values.softmax(0), min(self.TOP, len(values)))
            labels, probabilities = best.indices.tolist(), [round(p, 6) for p in best.values.tolist()]
        return {
            "frame": index,
            "time": None if seconds is None else round(seconds, 6),
            "labels": labels,
            "probabilities": probabilities,
            "change": None if change is None else round(max(0.0, change), 9),
            "latency_ms": round(latency_ms, 3),
        }

    def summary(self) -> dict[str, Any]:
        busy = self.whole.total
        return {
            "video": self.reader.info.path,
            "frames": self.frames,
            "stopped": self.stopped,
            "damage": str(self.reader.damage) or None,
            "frames_per_second": round(self.frames / busy, 3) if busy else 0.0,
            "latency": {
                "frame": self.whole.summary(),
                "decode": self.decode.summary(),
                "preprocess": self.preprocess.summary(),
                "model": self.model.summary(),
            },
            "state_bytes": self.camera.state_bytes,
            "change": self.changes.summary(),
            "verify": self.verifier.summary() if self.verifier is not None else None,
        }


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
