"""Checks shared by the ops: one sentence with what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLANS = ("auto", "invariant")


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int], meaning: str = "") -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} must have shape {meaning}{tuple(expected)}, got {tuple(tensor.shape)}")


def check_ndim(op: str, name: str, tensor: Tensor, ndim: int, meaning: str) -> None:
    if tensor.ndim != ndim:
        raise ValueError(f"{op}: {name} must be {meaning}, got shape {tuple(tensor.shape)}")


def check_float(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like the first argument, got {tensor.device}")


def check_plan(op: str, plan: str) -> None:
    if plan not in PLANS:
        raise ValueError(f"{op}: plan must be 'auto' or 'invariant', got {plan!r}")


def walk_frames(op: str, length: int, order: str, frames: int | None, packed: bool) -> int:
    """Number of frames for the time-fastest walk, 0 for the plain one.  Checks order=, frames= and cu_seqlens=."""
    if order not in ("frame", "time"):
        raise ValueError(f"{op}: order must be 'frame' or 'time', got {order!r}")
    if order == "frame":
        if frames is not None:
            raise ValueError(f"{op}: frames={frames} has a meaning only with order='time'")
        return 0
    if packed:
        raise NotImplementedError(f"{op}: order='time' with cu_seqlens is not supported; call it per sequence")
    if frames is None or frames < 1:
        raise ValueError(f"{op}: order='time' needs frames >= 1, got {frames}")
    if length % frames:
        raise ValueError(f"{op}: {length} tokens do not divide into frames={frames} frames of equal size")
    return frames


def check_packed(op: str, cu_seqlens: Tensor | None, max_seqlen: int | None, batch: int) -> int:
    """Checks the packed form and returns the number of sequences (the batch where nothing is packed).

    The content of cu_seqlens is trusted, as reading it would stop a GPU: it starts at 0, never falls, ends at l.
    """
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"{op}: max_seqlen={max_seqlen} has a meaning only with cu_seqlens")
        return batch
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(
            f"{op}: cu_seqlens must be int32 or int64 of shape (num_seqs + 1,), "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(f"{op}: packed sequences come as one row, b = 1, got b = {batch}")
    if max_seqlen is None:
        raise ValueError(
            f"{op}: cu_seqlens needs max_seqlen (the longest sequence), which cannot be read without a stop"
        )
    return cu_seqlens.numel() - 1


def full_precision(*tensors: Tensor | None, dtype: torch.dtype) -> list[Tensor | None]:
    """Parameters and states in fp32 (fp64 beside fp64 activations), differentiably."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [t if t is None or t.dtype == wide else t.to(wide) for t in tensors]


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
