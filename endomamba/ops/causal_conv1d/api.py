"""Causal depthwise convolution over tokens, with a state that can be carried on, and its two-direction form.

Letters: b sequences, l tokens, d channels, w taps of the window.
"""

from __future__ import annotations

from torch import Tensor

from .._checks import (
    check_device,
    check_float,
    check_ndim,
    check_packed,
    check_plan,
    check_shape,
    full_precision,
    walk_frames,
)
from .op import bidirectional_conv1d_op, causal_conv1d_op


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    order: str = "frame",
    frames: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    plan: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Each token of a channel becomes bias + the weighted sum of itself and the w - 1 tokens walked before it.

    x: (b, l, d) in any strides, weight: (d, w) with the newest token's tap last, bias: (d,).
    activation: None or "silu".
    initial_state: (b, w - 1, d), the tokens before the first one, newest last (None: zeros).
    reverse: the walk starts at the last token, and so does the initial state.
    order="time" with `frames`: tokens lie frame by frame and are walked time-fastest.
    cu_seqlens: (num_seqs + 1,) packs sequences into one row, b = 1; states are then (num_seqs, w - 1, d).

    Returns y (b, l, d) in x's dtype, and the final state in fp32, or None if it was not asked for.  Everything has a
    gradient, both states included.
    """
    name = "causal_conv1d"
    silu = _check(name, x, activation, plan)
    width = _check_parameters(name, x, ("weight", weight), ("bias", bias))
    walk = walk_frames(name, x.shape[1], order, frames, cu_seqlens is not None)
    sequences = check_packed(name, cu_seqlens, max_seqlen, x.shape[0])
    check_device(name, x.device, weight=weight, bias=bias, initial_state=initial_state, cu_seqlens=cu_seqlens)
    if initial_state is not None:
        check_float(name, "initial_state", initial_state)
        check_shape(name, "initial_state", initial_state, (sequences, width - 1, x.shape[2]), "(b, w - 1, d) = ")
    weight, bias, initial_state = full_precision(weight, bias, initial_state, dtype=x.dtype)
    y, final_state = causal_conv1d_op(
        x,
        weight,
        bias,
        initial_state,
        cu_seqlens,
        silu,
        reverse,
        walk,
        max_seqlen or 0,
        return_final_state,
        plan,
        backend,
    )
    return y, final_state if return_final_state else None


def bidirectional_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    *,
    activation: str | None = None,
    order: str = "frame",
    frames: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    plan: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` with (weight, bias) and, walking backwards, with (weight_b, bias_b); x is read once.

    x: (b, l, d), weights: (d, w), biases: (d,).  Returns y and y_b, both (b, l, d) in x's dtype and x's token order.
    """
    name = "bidirectional_conv1d"
    silu = _check(name, x, activation, plan)
    width = _check_parameters(name, x, ("weight", weight), ("bias", bias))
    _check_parameters(name, x, ("weight_b", weight_b), ("bias_b", bias_b))
    check_shape(name, "weight_b", weight_b, (x.shape[2], width), "of weight, (d, w) = ")
    walk = walk_frames(name, x.shape[1], order, frames, cu_seqlens is not None)
    check_packed(name, cu_seqlens, max_seqlen, x.shape[0])
    check_device(name, x.device, weight=weight, bias=bias, weight_b=weight_b, bias_b=bias_b, cu_seqlens=cu_seqlens)
    weight, bias, weight_b, bias_b = full_precision(weight, bias, weight_b, bias_b, dtype=x.dtype)
    return bidirectional_conv1d_op(
        x, weight, bias, weight_b, bias_b, cu_seqlens, silu, walk, max_seqlen or 0, plan, backend
    )


def _check(name: str, x: Tensor, activation: str | None, plan: str) -> bool:
    """Checks what both forms share; returns whether silu follows."""
    check_plan(name, plan)
    check_float(name, "x", x)
    check_ndim(name, "x", x, 3, "(b, l, d)")
    if activation not in (None, "silu"):
        raise ValueError(f"{name}: activation must be None or 'silu', got {activation!r}")
    return activation == "silu"


def _check_parameters(name: str, x: Tensor, weight: tuple[str, Tensor], bias: tuple[str, Tensor | None]) -> int:
    """Checks one direction's taps and bias; returns the window's width."""
    channels = x.shape[2]
    check_float(name, *weight)
    check_ndim(name, *weight, 2, "(d, w)")
    if weight[1].shape[0] != channels or weight[1].shape[1] < 1:
        raise ValueError(
            f"{name}: {weight[0]} must have shape (d, w) with d = {channels} and w >= 1, got {tuple(weight[1].shape)}"
        )
    if bias[1] is not None:
        check_float(name, *bias)
        check_shape(name, *bias, (channels,), "(d,) = ")
    return weight[1].shape[1]
