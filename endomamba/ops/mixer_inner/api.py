"""The public mixer_inner: all of a Mamba mixer, with or without its two large projections, as one autograd op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import check_backend, direct
from .._checks import (
    check_device,
    check_float,
    check_ndim,
    check_packed,
    check_plan,
    check_shape,
    full_precision,
    needs_grad,
    walk_frames,
)
from .._scan import effective_plan
from .op import mixer_inner_op


def mixer_inner(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    conv_weight_b: Tensor | None = None,
    conv_bias_b: Tensor | None = None,
    x_proj_weight_b: Tensor | None = None,
    dt_proj_weight_b: Tensor | None = None,
    dt_bias_b: Tensor | None = None,
    A_b: Tensor | None = None,
    D_b: Tensor | None = None,
    *,
    out_proj_weight: Tensor | None = None,
    out_proj_bias: Tensor | None = None,
    in_proj_weight: Tensor | None = None,
    in_proj_bias: Tensor | None = None,
    initial_conv_state: Tensor | None = None,
    initial_ssm_state: Tensor | None = None,
    return_final_state: bool = False,
    scale: float = 1.0,
    reverse: bool = False,
    order: str = "frame",
    frames: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    plan: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From in_proj's output or input to out_proj's input or output; causal, or both ways if a second set (_b) is given.

        x, z      = xz = hidden @ in_proj_weight.T + in_proj_bias     (or given)
        u         = silu(conv(x))
        dt, B, C  = u @ x_proj_weight.T            (r + n + n columns), dt @ dt_proj_weight.T
        y         = scan(u, softplus(dt + dt_bias), A, B, C, D) * silu(z)
        out       = y @ out_proj_weight.T + out_proj_bias     (where given)

    Both ways (as in Vim): y = scale * (scan + reverse scan_b) * silu(z), each direction with its own u, dt, B, C.

    xz: (b, l, 2d), x first  conv_weight: (d, w)  conv_bias, dt_bias, D: (d,)
    x_proj_weight: (r + 2n, d)  dt_proj_weight: (d, r)  A: (d, n), negative
    initial_conv_state: (b, w - 1, d), newest last  initial_ssm_state: (b, d, n); causal only, both fp32
    out_proj_weight: (c, d)  out_proj_bias: (c,)  in_proj_weight: (2d, c)  in_proj_bias: (2d,)
    -> out (b, l, c), or without out_proj_weight y (b, l, d), in the dtype of xz, final conv state and final ssm state
    (None unless return_final_state).

    reverse, order, frames, cu_seqlens, max_seqlen, plan, backend: as in `selective_scan`.

    The projections run in the dtype of xz (under autocast: the autocast dtype), conv, softplus, scan, states in fp32.
    Saved for backward: the arguments and one state per 64 tokens; conv, projections, softplus and y are computed again.
    y is what an out_proj of its own would save; with out_proj_weight nobody does.  With in_proj_weight the first
    argument is in_proj's input (b, l, c), and xz, the largest of all, is computed again too: one more matrix product.
    Gradients for every tensor, states included; no double backward.
    """
    op = "mixer_inner"
    check_ndim(op, "xz", xz, 3, "(b, l, 2d)")
    check_float(op, "xz", xz)
    check_plan(op, plan)
    check_backend(op, backend)
    if torch.is_autocast_enabled(xz.device.type) and xz.dtype != torch.float64:
        xz = xz.to(torch.get_autocast_dtype(xz.device.type))
    sequences = check_packed(op, cu_seqlens, max_seqlen, xz.shape[0])
    walk = walk_frames(op, xz.shape[1], order, frames, cu_seqlens is not None)
    wide = _check_linear(op, "in_proj", xz, in_proj_weight, in_proj_bias, "(2d, c) with c", xz.shape[2])
    w, n = _check_side(op, "", xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, wide)
    side_b = (conv_weight_b, conv_bias_b, x_proj_weight_b, dt_proj_weight_b, dt_bias_b, A_b, D_b)
    states = (initial_conv_state, initial_ssm_state)
    bidirectional = any(t is not None for t in side_b)
    if bidirectional:
        required = {"conv_weight_b": conv_weight_b, "x_proj_weight_b": x_proj_weight_b, "A_b": A_b}
        missing = [name for name, t in {**required, "dt_proj_weight_b": dt_proj_weight_b}.items() if t is None]
        if missing:
            raise ValueError(f"{op}: the second direction needs {', '.join(missing)} too")
        w_b, n_b = _check_side(op, "_b", xz, *side_b, wide)
        if (w_b, n_b) != (w, n):
            raise ValueError(f"{op}: both directions must share (w, n) = {(w, n)}, got {(w_b, n_b)} for the second")
        if return_final_state or any(t is not None for t in states):
            raise ValueError(f"{op}: states are carried by the causal form only; call bidirectional_scan for both ways")
        if reverse:
            raise ValueError(f"{op}: reverse=True has no meaning both ways")
    elif scale != 1.0:
        raise ValueError(f"{op}: scale={scale} weighs the sum of two directions, the causal form has none")
    check_device(op, xz.device, cu_seqlens=cu_seqlens)
    d = wide // 2
    _check_linear(op, "out_proj", xz, out_proj_weight, out_proj_bias, "(c, d) with d", d)
    for name, state, shape in zip(_STATES, states, ((sequences, w - 1, d), (sequences, d, n)), strict=True):
        if state is not None:
            check_shape(op, name, state, shape, "(sequences, w - 1, d) or (sequences, d, n) = ")
            check_device(op, xz.device, **{name: state})
    conv_weight, conv_bias, dt_bias, A, D, initial_conv_state, initial_ssm_state = full_precision(
        conv_weight, conv_bias, dt_bias, A, D, *states, dtype=xz.dtype
    )
    conv_weight_b, conv_bias_b, dt_bias_b, A_b, D_b = full_precision(
        conv_weight_b, conv_bias_b, dt_bias_b, A_b, D_b, dtype=xz.dtype
    )
    tensors = (
        xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D,
        conv_weight_b, conv_bias_b, x_proj_weight_b, dt_proj_weight_b, dt_bias_b, A_b, D_b,
        initial_conv_state, initial_ssm_state, out_proj_weight, out_proj_bias,
        in_proj_weight, in_proj_bias,
    )  # fmt: skip
    out, conv_state, ssm_state, *_ = direct(mixer_inner_op)(
        *tensors, cu_seqlens, scale, reverse, walk, max_seqlen or 0, return_final_state,
        needs_grad(*tensors), effective_plan(plan), backend,
    )  # fmt: skip
    return (out, conv_state, ssm_state) if return_final_state else (out, None, None)


_STATES = ("initial_conv_state", "initial_ssm_state")


def _check_linear(op, name, xz, weight, bias, meaning, size) -> int:
    """Checks a projection of `size` inputs; returns the number of its outputs, without a weight `size`."""
    if weight is None:
        if bias is not None:
            raise ValueError(f"{op}: {name}_bias needs {name}_weight too")
        return size
    if weight.ndim != 2 or weight.shape[1] != size:
        raise ValueError(f"{op}: {name}_weight must be {meaning} = {size}, got {tuple(weight.shape)}")
    if bias is not None:
        check_shape(op, f"{name}_bias", bias, weight.shape[:1], "(outputs,) = ")
    check_device(op, xz.device, **{f"{name}_weight": weight, f"{name}_bias": bias})
    return weight.shape[0]


def _check_side(
    op, side, xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, wide
) -> tuple[int, int]:
    """Checks the parameters of one direction; returns (w, n).  wide: 2d."""
    if wide % 2:
        raise ValueError(f"{op}: xz must be (b, l, 2d), got an odd last size {wide}")
    d = wide // 2
    if conv_weight.ndim != 2 or conv_weight.shape[0] != d:
        raise ValueError(f"{op}: conv_weight{side} must be (d, w) with d = {d}, got {tuple(conv_weight.shape)}")
    if A.ndim != 2 or A.shape[0] != d:
        raise ValueError(f"{op}: A{side} must be (d, n) with d = {d}, got {tuple(A.shape)}")
    if dt_proj_weight.ndim != 2 or dt_proj_weight.shape[0] != d:
        raise ValueError(f"{op}: dt_proj_weight{side} must be (d, r) with d = {d}, got {tuple(dt_proj_weight.shape)}")
    r, n = dt_proj_weight.shape[1], A.shape[1]
    check_shape(op, f"x_proj_weight{side}", x_proj_weight, (r + 2 * n, d), "(r + 2n, d) = ")
    for name, vector in (("conv_bias", conv_bias), ("dt_bias", dt_bias), ("D", D)):
        if vector is not None:
            check_shape(op, name + side, vector, (d,), "(d,) = ")
    check_device(
        op, xz.device, conv_weight=conv_weight, conv_bias=conv_bias, x_proj_weight=x_proj_weight,
        dt_proj_weight=dt_proj_weight, dt_bias=dt_bias, A=A, D=D,
    )  # fmt: skip
    return conv_weight.shape[1], n
