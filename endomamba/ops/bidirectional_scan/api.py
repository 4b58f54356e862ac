"""The public bidirectional scan: shapes, checks, one call to the op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import check_backend
from .._checks import check_packed, check_plan, check_shape, needs_grad, walk_frames
from .._scan import check_common, common_dtype, effective_plan, operands, output_dtype
from .op import bidirectional_scan_op


def bidirectional_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    x_b: Tensor,
    dt_b: Tensor,
    A_b: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    *,
    D: Tensor | None = None,
    D_b: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_bias_b: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    initial_state_b: Tensor | None = None,
    return_final_state: bool = False,
    dt_softplus: bool = True,
    order: str = "frame",
    frames: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    plan: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Two scans over the same tokens, the second from the last token to the first, in one pass and without flips.

        y = scale * (scan(x, dt, A, B, C, D) + reverse scan(x_b, dt_b, A_b, B_b, C_b, D_b)) * silu(z)

    x, dt, x_b, dt_b, z: (b, l, d)  A, A_b: (d, n)  D, D_b, dt_bias, dt_bias_b: (d,)  initial states: (b, d, n)
    B, C, B_b, C_b: (b, l, n), or (b, l, g, n) with g groups of d / g channels, or, constant over tokens, (d, n)
    -> y (b, l, d) and the two final states (b, d, n), which are None unless return_final_state.

    All tensors keep the order of the tokens, those of the second direction too: its initial state enters at the last
    token (with order="time": the last one visited) and its final state leaves at the first.
    A scale of 0.5 keeps the sum in the range of one direction, which fp16 may need.
    Everything else is as in `selective_scan`: order and frames, cu_seqlens, mask, dtypes, plan.
    """
    op = "bidirectional_scan"
    check_common(op, x, z, cu_seqlens, mask)
    check_plan(op, plan)
    check_backend(op, backend)
    num_seqs = check_packed(op, cu_seqlens, max_seqlen, x.shape[0])
    walk = walk_frames(op, x.shape[1], order, frames, cu_seqlens is not None)
    y_dtype = output_dtype(op, x, out_dtype)
    if A_b.shape != A.shape:
        check_shape(op, "A_b", A_b, A.shape, "like A, ")
    dtype = common_dtype(op, x, dt=dt, B=B, C=C, x_b=x_b, dt_b=dt_b, B_b=B_b, C_b=C_b, z=z)
    common = op, x.shape, num_seqs, dtype, x.device
    x, dt, A, B, C, D, dt_bias, initial_state = operands("", *common, x, dt, A, B, C, D, dt_bias, initial_state)
    x_b, dt_b, A_b, B_b, C_b, D_b, dt_bias_b, initial_state_b = operands(
        "_b", *common, x_b, dt_b, A_b, B_b, C_b, D_b, dt_bias_b, initial_state_b
    )
    groups = {t.shape[2] for t in (B, C, B_b, C_b) if t.ndim == 4}
    if len(groups) > 1:
        raise ValueError(f"{op}: B, C, B_b, C_b must share their groups g, got {sorted(groups)}")
    y, final_state, final_state_b, _, _ = bidirectional_scan_op(
        x,
        dt,
        A,
        B,
        C,
        x_b,
        dt_b,
        A_b,
        B_b,
        C_b,
        D,
        D_b,
        z if z is None or z.dtype == dtype else z.to(dtype),
        dt_bias,
        dt_bias_b,
        initial_state,
        initial_state_b,
        cu_seqlens,
        mask,
        scale,
        dt_softplus,
        walk,
        max_seqlen or 0,
        return_final_state,
        needs_grad(
            x, dt, A, B, C, x_b, dt_b, A_b, B_b, C_b, D, D_b, z, dt_bias, dt_bias_b, initial_state, initial_state_b
        ),
        y_dtype == torch.float32 and dtype != torch.float64,
        effective_plan(plan),
        backend,
    )
    if y.dtype != y_dtype:
        y = y.to(y_dtype)
    return (y, final_state, final_state_b) if return_final_state else (y, None, None)
