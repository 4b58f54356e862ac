"""The public frame_settle: which streams take a frame in, decided on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._backend import check_backend
from .._checks import check_device, check_float, check_ndim, check_shape
from .op import frame_settle_op

Pair = tuple[Tensor, Tensor]  # after the frame, before it


def frame_settle(
    logits: Tensor,
    active: Tensor,
    frame: Pair,
    states: Sequence[Pair],
    answer: Tensor,
    not_finite: Tensor,
    *,
    elapsed: bool = False,
    backend: str = "auto",
) -> None:
    """After a step that was tried on the state of all streams: each stream goes on with it, or goes back, bit by bit.

    A stream takes its frame in where it is active, and its logits and states are finite.  Where it does, `before` takes
    over `after` and its row of `answer` its logits; where not, `after` takes over `before` and the row of `answer` is
    NaN.  Before the next step both are equal.  Nothing waits for the device.

    logits, answer: (b, k)  active: (b,) bool  not_finite: (b,) int64, counts active streams that were not finite
    frame: two (b,) int64  states: one or two pairs of (g, b, m), contiguous; each g groups of the m values of a stream.
    elapsed: the frame number goes on in every active stream.

    Written to: answer, not_finite, and both of each pair.
    """
    op = "frame_settle"
    check_ndim(op, "logits", logits, 2, "(b, k)")
    check_float(op, "logits", logits)
    check_backend(op, backend)
    b = logits.shape[0]
    check_shape(op, "answer", answer, logits.shape, "(b, k) = ")
    for name, tensor, dtype in (
        ("active", active, torch.bool),
        ("not_finite", not_finite, torch.int64),
        ("frame", frame[0], torch.int64),
        ("frame before", frame[1], torch.int64),
    ):
        check_shape(op, name, tensor, (b,), "(b,) = ")
        if tensor.dtype != dtype:
            raise ValueError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
    if not 1 <= len(states) <= 2:
        raise NotImplementedError(f"{op}: takes one or two pairs of states, got {len(states)}")
    for i, (after, before) in enumerate(states):
        check_ndim(op, f"states[{i}]", after, 3, "(g, b, m)")
        check_shape(op, f"states[{i}]", after, (after.shape[0], b, after.shape[2]), "(g, b, m) = ")
        check_shape(op, f"states[{i}] before", before, after.shape)
        if before.dtype != after.dtype or not (after.is_contiguous() and before.is_contiguous()):
            raise ValueError(f"{op}: states[{i}] must be two contiguous tensors of one dtype")
    tensors = {"active": active, "answer": answer, "not_finite": not_finite, "frame": frame[0]}
    check_device(op, logits.device, **tensors, states=states[0][0])
    second = states[1] if len(states) == 2 else (None, None)
    frame_settle_op(logits, active, *frame, *states[0], *second, answer, not_finite, elapsed, backend)
