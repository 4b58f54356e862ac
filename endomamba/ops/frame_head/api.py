"""The public frame_head: from a frame's last residual to its logits, in one kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import check_backend
from .._checks import check_device, check_float, check_ndim, check_shape
from .op import POOLS, frame_head_op


def frame_head(
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    pool: str = "mean",
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """weight pool(rms_norm(residual)) + bias of one frame of each stream: (b, l, c) -> logits (b, k).  Inference only.

    weight: (k, c), times the norm's own weight, column by column; bias: (k,).  Sums are fp32, of float64 float64.
    pool: "mean" of a frame's l tokens, or "cls", its first.
    out_dtype: None: the residual's.
    """
    op = "frame_head"
    check_ndim(op, "residual", residual, 3, "(b, l, c)")
    check_float(op, "residual", residual)
    check_backend(op, backend)
    if pool not in POOLS:
        raise ValueError(f"{op}: pool must be one of {POOLS}, got {pool!r}")
    if not residual.shape[1] or not residual.shape[2]:
        raise ValueError(f"{op}: a frame must have tokens and channels, got {tuple(residual.shape)}")
    check_ndim(op, "weight", weight, 2, "(k, c)")
    check_shape(op, "weight", weight, (weight.shape[0], residual.shape[2]), "(k, c) = ")
    check_shape(op, "bias", bias, weight.shape[:1], "(k,) = ")
    check_device(op, residual.device, weight=weight, bias=bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (residual, weight, bias)):
        raise RuntimeError(f"{op}: has no gradient: call it under torch.inference_mode() or torch.no_grad()")
    dtype = residual.dtype if out_dtype is None else out_dtype
    return frame_head_op(residual, weight, bias, pool == "mean", eps, dtype, backend)
