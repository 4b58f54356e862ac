"""The add and the norm between two layers of a residual network, in one pass.

Letters: b rows of the batch, c channels, anything between them.
"""

from __future__ import annotations

from torch import Tensor

from .._backend import direct
from .._checks import check_device, check_float, check_plan, check_shape, full_precision
from .native import norm_of_block, runs_block
from .op import add_norm_op


def add_rms_norm(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    eps: float = 1e-5,
    plan: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """new residual r = residual + row_scale * x; normed = r / sqrt(mean(r^2) + eps) * weight.

    x: (b, ..., c) in any strides, residual alike (None: zero), weight: (c,), row_scale: (b,), one factor for a row of
    the batch (DropPath; None: one).  Returns normed in x's dtype and the new residual, from which it is made, in fp32.
    """
    if (
        row_scale is None
        and eps >= 0
        and plan == "auto"
        and backend in ("auto", "cpu")
        and runs_block(x, weight, residual)
    ):
        return norm_of_block(x, weight, residual, eps)
    return _add_norm("add_rms_norm", x, weight, None, residual, row_scale, eps, False, plan, backend)


def add_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    row_scale: Tensor | None = None,
    eps: float = 1e-5,
    plan: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` with the LayerNorm: normed = (r - mean(r)) / sqrt(var(r) + eps) * weight + bias."""
    return _add_norm("add_layer_norm", x, weight, bias, residual, row_scale, eps, True, plan, backend)


def _add_norm(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    layer_norm: bool,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_plan(name, plan)
    check_float(name, "x", x)
    if x.ndim < 2:
        raise ValueError(f"{name}: x must be (b, ..., c), got shape {tuple(x.shape)}")
    if eps < 0:
        raise ValueError(f"{name}: eps must not be negative, got {eps}")
    channels = (x.shape[-1],)
    for label, tensor, expected, meaning in (
        ("weight", weight, channels, "(c,) = "),
        ("bias", bias, channels, "(c,) = "),
        ("residual", residual, x.shape, "of x, "),
        ("row_scale", row_scale, x.shape[:1], "(b,) = "),
    ):
        if tensor is not None:
            check_float(name, label, tensor)
            check_shape(name, label, tensor, expected, meaning)
    check_device(name, x.device, weight=weight, bias=bias, residual=residual, row_scale=row_scale)
    weight, bias, residual, row_scale = full_precision(weight, bias, residual, row_scale, dtype=x.dtype)
    normed, new_residual, _ = direct(add_norm_op)(x, weight, bias, residual, row_scale, eps, layer_norm, plan, backend)
    return normed, new_residual
