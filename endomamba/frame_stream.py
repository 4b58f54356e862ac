"""`FrameStream`: cameras through a model, one frame of each a call, in buffers that never change.

On a GPU a call is one copy and one replay of a CUDA graph that holds all from the uint8 picture to the answer: resize,
normalisation, the model, and the decision which streams take their frame in.  On a CPU the same functions run without a
graph, so what is tested there is what a GPU captures.

A frame is tried on the state, then taken in or not (`endomamba.ops.frame_settle`): a stream that is idle, or whose
output or state became NaN or infinite, goes back to its bits before the frame.  The device decides; the host never
waits for it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .models import EndoMamba, Packed, StreamState
from .models.endomamba import FrameWeights
from .models.state import Rows
from .ops._backend import reasons
from .preprocess import IMAGENET_MEAN, IMAGENET_STD, normalisation, resize, to_input

POSITIONS = ("processed", "elapsed")
FUSED = ("triton", "cuda")  # back ends of frame_blocks that are fused kernels
PACKED_ROWS = 1000  # patches of all streams: from there on the products of a library are faster than the fused kernels
WARM_UP = 3  # frames before a capture: kernels are compiled, libraries choose theirs

Size = tuple[int, int]
Frames = Tensor | Sequence[Tensor | None]
Row = tuple[Tensor, Tensor]  # a part of a buffer, and the frame, or frames, that go there


class FrameStream:
    """Runs `batch_size` streams through `model`, one frame of each a call.  Inference only; the state changes in place.
    A model that answers with a dict, masks or landmarks, comes as `endomamba.models.packed(model)`.

    One object belongs to one thread.  The model is shared and never written to, so that two streams on it do not meet.

    sizes: (height, width) of uint8 frames besides the model's own size; they are resized inside.  Each has buffers and
    on a GPU a graph of its own, made here and not in front of a waiting frame.
    mean, std: of uint8 frames, in [0, 1]; floating-point frames are taken as normalised.
    positions: what a frame's temporal position counts: the frames that its stream took in ("processed"), or all that
    its camera gave ("elapsed", see `step`), where dropped and not finite ones leave a gap.
    graph: capture CUDA graphs; None: on a GPU, unless the model's state grows (the attention twin's does).  Replays
    read the model's weights where they were: after `model.to` or an assignment make a new FrameStream.
    packed: run the blocks in fused kernels, with a copy of the weights that is packed here and does not see what they
    become later; None: on a GPU, for a few streams, where the kernels take the model (`endomamba.ops.frame_blocks`).
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int = 1,
        *,
        sizes: Sequence[Size] = (),
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        positions: str = "processed",
        graph: bool | None = None,
        packed: bool | None = None,
    ) -> None:
        if model.training:
            raise ValueError(
                "FrameStream: the model is in training mode, its DropPath is random: call model.eval() first"
            )
        if positions not in POSITIONS:
            raise ValueError(f"FrameStream: positions must be one of {POSITIONS}, got {positions!r}")
        self.model, self.batch_size, self.positions = model, batch_size, positions
        self.mean, self.std = mean, std
        self.preprocess_seconds = 0.0  # of the last call; on a GPU the copy alone, as the rest is in the graph
        self._state = model.init_state(batch_size)
        self._apart = self._state.ROWS is not None  # each stream can go on or stay behind
        self._before = self._state.clone()
        self.graph = self._may_capture(graph)
        if positions == "elapsed" and not self._apart:
            raise NotImplementedError(
                f"FrameStream: positions='elapsed' is not for the state of {type(model).__name__}, which grows"
            )
        self._pool: tuple[int, int] | None = None  # memory that the graphs share
        self._scale, self._shift = (t.to(self.device) for t in normalisation(mean, std))
        # On a GPU the model's first kernel reads pictures; on a CPU normalising them apart costs as much.
        self._reads = model.model if isinstance(model, Packed) else model
        self._gives_pictures = self.device.type == "cuda" and isinstance(self._reads, EndoMamba)
        self._weights = self._may_pack(packed, sizes)
        self._answer: Tensor | None = None  # (b, k)
        self._all, self._no_gaps = [True] * batch_size, [0] * batch_size  # what most calls send
        self._active = _Mailbox(self._all, torch.bool, self.device)
        self._gap = _Mailbox(self._no_gaps, torch.int64, self.device)
        self._not_finite = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self._inputs: dict[tuple[int, int, bool], _Input] = {}
        self._kinds: dict[tuple[torch.Size, torch.dtype, bool], tuple[_Input, list[Tensor]]] = {}  # see `_places`
        self.prepare(model.config.img_size, *sizes)

    def _may_capture(self, graph: bool | None) -> bool:
        able = self.device.type == "cuda" and self._apart
        if graph and not able:
            why = f"the model is on {self.device}" if self._apart else "its state grows from frame to frame"
            raise ValueError(f"FrameStream: graph=True needs a model with a state of fixed size on a GPU: {why}")
        return able if graph is None else graph

    def _may_pack(self, packed: bool | None, sizes: Sequence[Size]) -> FrameWeights | None:
        if packed is False or (packed is None and self.device.type != "cuda"):
            return None
        if not isinstance(self._reads, EndoMamba) or not isinstance(self._state, StreamState):
            weights, why = None, ["the model is no EndoMamba"]
        elif packed is None and self.batch_size * math.prod(self.model.config.grid) > PACKED_ROWS:
            return None
        else:
            weights = self._reads.frame_weights()
            why = [] if self.device.type == "cpu" else self._speaks_against(weights, sizes)
        if packed and why:
            raise ValueError(f"FrameStream: packed=True needs the kernels of frame_blocks: {'; '.join(why)}")
        return None if why else weights

    def _speaks_against(self, weights: FrameWeights, sizes: Sequence[Size]) -> list[str]:
        """Why no fused kernels can run the blocks on frames of these sizes; empty: those of one back end can."""
        config = self.model.config
        if config.backend not in ("auto", *FUSED):
            return [f"the model was made with backend={config.backend!r}"]
        kinds = [[t for block in blocks for t in block] for blocks in (weights.spatial, weights.temporal) if blocks]
        patches = {math.prod(config.grid)}
        if self._any_size:  # else they are resized to the model's
            patches |= {(height // config.patch_size) * (width // config.patch_size) for height, width in sizes}
        shapes = [(self.batch_size, n + config.with_cls_token, config.embed_dim) for n in sorted(patches)]
        residuals = [torch.empty(shape, dtype=torch.float32, device=self.device) for shape in shapes]
        found = []
        for name in FUSED if config.backend == "auto" else (config.backend,):
            asked = (reasons("frame_blocks", name, x, kind) for x in residuals for kind in kinds)
            why = list(dict.fromkeys(reason for some in asked for reason in some))
            if not why:
                return []
            found += [f"{name}: {reason}" for reason in why]
        return found

    # ---- frames in, answers out

    def __call__(self, frames: Frames, elapsed: int | Sequence[int] | None = None) -> Tensor:
        """`step` with an answer of your own: logits (b, k), or features (b, c) of a model without a head."""
        return self.step(frames, elapsed).clone()

    def step(self, frames: Frames, elapsed: int | Sequence[int] | None = None) -> Tensor:
        """One frame of each stream -> (b, k) in a buffer that the next call overwrites; nothing is waited for.

        frames: (3, h, w), (h, w, 3), or with the streams in front (b, ...); uint8, or normalised floating point of the
        model's size.  Or a sequence with a frame or None for each stream: None is idle, its state stays bit by bit.
        elapsed: with positions="elapsed", frames that each camera gave since its last one here, this one included.

        A row is NaN where no frame was taken in: of an idle stream, or where the output or the state after the frame
        would not be finite (`not_finite` counts them).  A page-locked host frame is copied while the call returns:
        leave it as it is until the answer was read.
        """
        start = time.perf_counter()
        if isinstance(frames, Tensor):
            entry, (place, *_) = self._places(frames, True)
            rows, active = [(place, frames)], self._all
        else:
            entry, rows = self._rows(frames)
            active = [frame is not None for frame in frames]
        gaps = self._gaps(elapsed, active)
        self._active.send(active)
        self._gap.send(gaps)
        with torch.inference_mode():
            entry.fill(rows)
            if entry.graph is not None:
                self.preprocess_seconds = time.perf_counter() - start
                entry.graph.replay()
            else:
                x = self._normalised(entry)
                self.preprocess_seconds = time.perf_counter() - start
                self._advance_or_not(x)
        assert self._answer is not None
        return self._answer

    def _normalised(self, entry: _Input) -> Tensor:
        """The buffer of frames -> (b, 3, 1, h, w), or pictures (b, h, w, 3), as the model takes them."""
        x = entry.frames
        if x.dtype == torch.uint8:
            size = tuple(x.shape[1:3]) if self._any_size else self.model.config.img_size
            if self._gives_pictures:
                return resize(x, size)
            x = to_input(x, size, self._scale, self._shift)
        return x.to(self._dtype).unsqueeze(2)

    def _advance_or_not(self, x: Tensor) -> None:
        """What ends a frame half-way, Ctrl-C or a lack of memory, leaves no trace of it either."""
        try:
            self._advance(x)
        except BaseException:
            if self._apart:
                self._state.copy_(self._before)
            raise

    def _advance(self, x: Tensor) -> None:
        """Tries x on the state, decides, answers.  With `_normalised` all that a graph holds: no host in it."""
        state, before = self._state, self._before
        if self.positions == "elapsed":
            state.frame.add_(self._gap.buffer)
        options: dict[str, Any] = {}
        if x.dtype == torch.uint8:
            options["normalisation"] = (self._scale, self._shift)
        if self._weights is not None:
            options["weights"] = self._weights
        answer = self.model.step_(x, state, **options)
        if isinstance(answer, dict):
            raise ValueError(
                f"FrameStream: the model must answer with one tensor, it gives a dict of {', '.join(answer)}: "
                "stream endomamba.models.packed(model), whose `unpack` takes an answer apart"
            )
        logits = answer[:, 0]
        if self._answer is None:
            with torch.inference_mode(False):
                self._answer = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        if self._apart:
            backend = "reference" if logits.dtype == torch.float64 else "auto"
            elapsed, active = self.positions == "elapsed", self._active.buffer
            state.settle_(before, logits, active, self._answer, self._not_finite, elapsed=elapsed, backend=backend)
        else:
            self._answer.copy_(logits)

    # ---- what comes in

    def prepare(self, *sizes: Size) -> None:
        """Makes ready for uint8 frames of these (height, width): buffers, and on a GPU a graph.  The state stays."""
        for height, width in sizes:
            if min(height, width) < 1:
                raise ValueError(f"FrameStream: a size must be (height, width) in pixels, got {(height, width)}")
            self._input((int(height), int(width)), True)

    def buffer(self, size: Size | None = None) -> Tensor:
        """Where uint8 frames of this (height, width), None: the model's, are read from: (b, height, width, 3) on the
        model's device.  A producer on that device, a decoder say, may write its frames here, on the stream of the
        calls; `step(camera.buffer(size))` then copies nothing.  A call that is given other frames of the size
        overwrites them."""
        size = self.model.config.img_size if size is None else size
        self.prepare(size)
        return self._input((int(size[0]), int(size[1])), True).frames

    def _input(self, size: Size, is_uint8: bool) -> _Input:
        key = (*size, is_uint8)
        if key not in self._inputs:
            shape = (*size, self._channels) if is_uint8 else (self._channels, *size)
            dtype = torch.uint8 if is_uint8 else self._dtype
            with torch.inference_mode(False):
                entry = _Input(torch.zeros((self.batch_size, *shape), dtype=dtype, device=self.device))
            if self.graph:
                entry.graph = self._captured(entry)
            self._inputs[key] = entry
        return self._inputs[key]

    @torch.inference_mode()
    def _captured(self, entry: _Input) -> torch.cuda.CUDAGraph:
        """A frame as a graph, after some on a stream of their own; the state and the counter stay as they were."""
        kept, counted = self.snapshot(), self._not_finite.clone()
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._advance(self._normalised(entry))
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # thread_local: a decoder or another stream may use the GPU meanwhile.  One pool: replays take turns, and
            # what a frame leaves behind lies outside of it.
            with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                self._advance(self._normalised(entry))
            self._pool = graph.pool()
        self.restore(kept)
        self._not_finite.copy_(counted)
        return graph

    def _places(self, frames: Tensor, whole: bool) -> tuple[_Input, list[Tensor]]:
        """Where frames of all streams (whole), or those of single ones, go: the buffer seen in their layout, or its row
        of each stream.  What is asked of a frame is in its shape and dtype, so each kind is checked once; ValueError.
        """
        kind = (frames.shape, frames.dtype, whole)
        if kind not in self._kinds:
            x = frames if whole and frames.ndim == 4 else frames.unsqueeze(0)
            size, last = self._layout(x, frames, self.batch_size if whole else 1)
            entry = self._input(size, x.dtype == torch.uint8)
            seen = entry.seen(last)
            self._kinds[kind] = entry, [seen] if x is frames else [seen[i] for i in range(self.batch_size)]
        return self._kinds[kind]

    def _rows(self, frames: Sequence[Tensor | None]) -> tuple[_Input, list[Row]]:
        """The same for a frame or None of each stream."""
        if not self._apart:
            raise NotImplementedError(
                f"FrameStream: the streams of {type(self.model).__name__} are all at the same frame: "
                "give it one tensor with a frame of each"
            )
        given = [(i, frame) for i, frame in enumerate(frames) if frame is not None]
        if len(frames) != self.batch_size or not all(isinstance(frame, Tensor) for _, frame in given):
            raise ValueError(
                "FrameStream: frames must be a tensor, or a list with a tensor or None for each of "
                f"{self.batch_size} streams, got {type(frames).__name__} of {len(frames)}"
            )
        found = [self._places(frame, False) for _, frame in given]
        if not found:
            return self._input(self.model.config.img_size, True), []
        entry = found[0][0]
        if any(other is not entry for other, _ in found):
            raise ValueError(
                "FrameStream: the frames of one call must have one size and kind, got "
                + ", ".join(f"{frame.dtype} {tuple(frame.shape)}" for _, frame in given)
            )
        return entry, [(places[i], frame) for (i, frame), (_, places) in zip(given, found, strict=True)]

    def _layout(self, x: Tensor, given: Tensor, streams: int) -> tuple[Size, bool]:
        """(streams, ...) -> the (height, width) of its frames, whether channels come last; `given` is complained of."""
        channels, is_uint8 = self._channels, x.dtype == torch.uint8
        last = x.ndim == 4 and x.shape[1] != channels and x.shape[3] == channels
        good = x.ndim == 4 and (is_uint8 or x.is_floating_point())
        good = good and (x.shape[0], x.shape[3 if last else 1]) == (streams, channels)
        size = tuple(x.shape[1:3] if last else x.shape[2:4])
        if not good or not self._takes(size, is_uint8):
            height, width = self.model.config.img_size
            lead = "" if streams == 1 else f"{streams}, "
            shape = "h, w" if self._any_size else f"{height}, {width}"
            raise ValueError(
                f"FrameStream: a frame must be uint8 or normalised floating point ({lead}{channels}, {shape}) or "
                f"({lead}{shape}, {channels}), got {given.dtype} {tuple(given.shape)}; uint8 frames of another size "
                "are resized inside if the stream is made with sizes=[(h, w)]"
            )
        return size, last

    def _takes(self, size: Size, is_uint8: bool) -> bool:
        return self._any_size or size == self.model.config.img_size or (*size, is_uint8) in self._inputs

    def _gaps(self, elapsed: int | Sequence[int] | None, active: list[bool]) -> list[int]:
        """Frames of each camera that are not here, between its last one and this."""
        if self.positions == "processed":
            if elapsed is not None:
                raise ValueError("FrameStream: elapsed is counted by a stream made with positions='elapsed'")
            return self._no_gaps
        counts = [elapsed] * self.batch_size if isinstance(elapsed, int) else elapsed
        if counts is None or len(counts) != self.batch_size or any(n < 1 for n, a in zip(counts, active) if a):
            raise ValueError(
                "FrameStream: with positions='elapsed' each call needs elapsed, a number of at least 1 for each of "
                f"{self.batch_size} streams, got {elapsed}"
            )
        return [n - 1 if a else 0 for n, a in zip(counts, active, strict=True)]

    # ---- what is carried

    @property
    def device(self) -> torch.device:
        return self._state.device

    @property
    def packed(self) -> bool:
        """Whether the blocks run in the fused kernels, with the copy of the weights; if not, packed=True says why."""
        return self._weights is not None

    @property
    def frames_seen(self) -> int:
        """The position of the stream that is the furthest; waits for the device, as all below does."""
        return int(self._state.frame.max())

    @property
    def frames(self) -> list[int]:
        """Each stream's position, see `positions`.  int64: no stream is too long."""
        return self._state.frame.tolist()

    @property
    def not_finite(self) -> list[int]:
        """Frames that each stream did not take in, since this object was made: output or state was not finite."""
        return self._not_finite.tolist()

    @property
    def state_bytes(self) -> int:
        """All that is carried from frame to frame, whatever the length of the video."""
        return self._state.nbytes

    def warm_up(self) -> None:
        """Reads one black frame and forgets it: the first call of a process is far slower than the second."""
        kept, counted = self.snapshot(), self._not_finite.clone()
        elapsed = None if self.positions == "processed" else 1
        black = torch.zeros_like(self._input(self.model.config.img_size, True).frames)
        self.step(black, elapsed)
        self.restore(kept)
        self._not_finite.copy_(counted)

    def reset(self, rows: Rows | None = None) -> None:
        """The next frame of the streams `rows` (None: all) is the first of a video; the others are left alone."""
        self._state.reset_(rows)
        if self._apart:
            self._before.reset_(rows)

    def snapshot(self, into: StreamState | None = None) -> StreamState:
        """A copy of the state, for `restore`, for `StreamState.save`, or for `model.step`; `into` an earlier one."""
        return self._state.clone() if into is None else into.copy_(self._state)

    def restore(self, state: StreamState) -> None:
        """Goes on from `state`; ValueError in one sentence if it belongs to another model, batch, device or dtype."""
        try:
            self._state.copy_(state)
        except ValueError as error:
            raise ValueError(f"FrameStream.restore: {error}") from None
        if self._apart:
            self._before.copy_(state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the state of all streams as a safetensors file, whole or not at all; see `load`."""
        if not isinstance(self._state, StreamState):
            raise NotImplementedError(f"FrameStream.save: {type(self._state).__name__} has no file format yet")
        self._state.save(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on where a stream of the same model and batch was saved, in any process: bit by bit with the same back
        end (the model's `backend`; "auto" takes another where there is another GPU or no nvcc) and as many threads."""
        self.restore(StreamState.load(path, self.device))

    def clone(self) -> FrameStream:
        """Another stream on the same model, from here on on its own."""
        sizes = [(height, width) for height, width, is_uint8 in self._inputs if is_uint8]
        options = dict(mean=self.mean, std=self.std, positions=self.positions, graph=self.graph)
        options["packed"] = self.packed
        other = FrameStream(self.model, self.batch_size, sizes=sizes, **options)
        other.restore(self._state)
        return other

    @property
    def _any_size(self) -> bool:
        return self.model.config.dynamic_img_size

    @property
    def _channels(self) -> int:
        return self.model.config.in_channels

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype


class _Pinned:
    """Two page-locked copies of a buffer in turn: the host fills one while the copy out of the other may still run."""

    def __init__(self, buffer: Tensor) -> None:
        like = dict(dtype=buffer.dtype, device="cpu", pin_memory=True)  # also where the default device is a GPU
        self.slots = [(torch.empty(buffer.shape, **like), torch.cuda.Event()) for _ in "ab"]

    def next(self) -> tuple[Tensor, torch.cuda.Event]:
        """A slot, and the event to record behind the copies out of it."""
        self.slots.reverse()
        self.slots[0][1].synchronize()  # the copies of the call before the last: over long ago
        return self.slots[0]


class _Mailbox:
    """One number for each stream on the device; nothing is sent while they stay the same."""

    def __init__(self, numbers: list, dtype: torch.dtype, device: torch.device) -> None:
        self.buffer = torch.tensor(numbers, dtype=dtype, device=device)
        self.sent = numbers
        self._pinned: _Pinned | None = None

    def send(self, numbers: list) -> None:
        if numbers == self.sent:
            return
        self.sent = numbers
        values = torch.tensor(numbers, dtype=self.buffer.dtype, device="cpu")  # whatever the default device is
        if not self.buffer.is_cuda:
            self.buffer.copy_(values)
            return
        self._pinned = self._pinned or _Pinned(self.buffer)
        slot, copied = self._pinned.next()
        slot.copy_(values)
        self.buffer.copy_(slot, non_blocking=True)
        copied.record()


@dataclass
class _Input:
    """Where frames of one size arrive: (b, h, w, 3) uint8 or (b, 3, h, w) normalised; and what is done with them."""

    frames: Tensor
    graph: torch.cuda.CUDAGraph | None = None
    pinned: _Pinned | None = None

    def seen(self, channels_last: bool) -> Tensor:
        """The buffer as (b, h, w, 3) or as (b, 3, h, w), whichever way it lies."""
        if channels_last == (self.frames.dtype == torch.uint8):
            return self.frames
        return self.frames.permute(0, 2, 3, 1) if channels_last else self.frames.permute(0, 3, 1, 2)

    def fill(self, rows: list[Row]) -> None:
        """Nothing waits.  Pageable or strided host memory is copied to page-locked memory first, or the host would."""
        staged = []
        for place, frame in rows:
            if frame is place:  # of `FrameStream.buffer`
                continue
            straight = frame.is_cuda or not self.frames.is_cuda
            if straight or (frame.stride() == place.stride() and frame.is_pinned()):
                place.copy_(frame, non_blocking=True)
            else:
                staged.append((place, frame))
        if staged:
            self.pinned = self.pinned or _Pinned(self.frames)
            slot, copied = self.pinned.next()
            for place, frame in staged:
                row = slot.as_strided(place.shape, place.stride(), place.storage_offset())
                row.copy_(frame)
                place.copy_(row, non_blocking=True)
            copied.record()
