"""The public selective scan: shapes, checks, one call to the op."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import check_backend
from .._checks import check_packed, check_plan, needs_grad, walk_frames
from .._scan import check_common, common_dtype, effective_plan, operands, output_dtype
from .op import selective_scan_op


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    dt_softplus: bool = True,
    reverse: bool = False,
    order: str = "frame",
    frames: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    mask: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    plan: str = "auto",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Mamba's scan over the tokens of each sequence, differentiable in every tensor, the states included.

        dt = softplus(dt + dt_bias)        (without dt_softplus: dt + dt_bias)
        h  = exp(dt * A) * h + dt * B * x  (h starts at initial_state, or zero)
        y  = (<C, h> + D * x) * silu(z)

    x, dt, z: (b, l, d)  A: (d, n)  D, dt_bias: (d,)  initial_state: (b, d, n)
    B, C: (b, l, n), or (b, l, g, n) with g groups of d / g channels, or, constant over tokens, (d, n)
    -> y (b, l, d) and the final state (b, d, n), which is None unless return_final_state.

    reverse: the scan starts at the last token; the initial state enters there, the final one leaves at token 0.
    order="time": the tokens lie frame by frame, `frames` frames in all, and the scan visits the first token of every
        frame, then the second of every frame, and so on.
    cu_seqlens: (sequences + 1,) int, sequences packed into one row (b = 1): sequence s owns the tokens
        cu_seqlens[s] to cu_seqlens[s+1]; states are then (sequences, d, n).  max_seqlen: the longest.
    mask: (b, l) bool, False where a token is padding: the state stays as it was, y is (<C, h>) * silu(z), dx, ddt and
        dB are zero, and x, dt, B may hold anything there, NaN too.

    dtype: x, dt, z, B, C in fp32, bf16 or fp16; mixed ones are promoted to their common dtype, so an fp32 constant B
    beside bf16 activations makes it an fp32 scan.  y has the dtype of x, or fp32 with out_dtype=torch.float32.  State,
    parameters and sums are fp32 always; with an fp64 activation all is fp64, on the reference back end.
    plan="invariant": bits that depend neither on the batch nor on where a sequence was split (at multiples of 64).
    """
    op = "selective_scan"
    check_common(op, x, z, cu_seqlens, mask)
    check_plan(op, plan)
    check_backend(op, backend)
    num_seqs = check_packed(op, cu_seqlens, max_seqlen, x.shape[0])
    walk = walk_frames(op, x.shape[1], order, frames, cu_seqlens is not None)
    y_dtype = output_dtype(op, x, out_dtype)
    dtype = common_dtype(op, x, dt=dt, B=B, C=C, z=z)
    x, dt, A, B, C, D, dt_bias, initial_state = operands(
        "", op, x.shape, num_seqs, dtype, x.device, x, dt, A, B, C, D, dt_bias, initial_state
    )
    y, final_state, _ = selective_scan_op(
        x,
        dt,
        A,
        B,
        C,
        D,
        z if z is None or z.dtype == dtype else z.to(dtype),
        dt_bias,
        initial_state,
        cu_seqlens,
        mask,
        dt_softplus,
        reverse,
        walk,
        max_seqlen or 0,
        return_final_state,
        needs_grad(x, dt, A, B, C, D, z, dt_bias, initial_state),
        y_dtype == torch.float32 and dtype != torch.float64,
        effective_plan(plan),
        backend,
    )
    if y.dtype != y_dtype:
        y = y.to(y_dtype)
    return y, final_state if return_final_state else None
