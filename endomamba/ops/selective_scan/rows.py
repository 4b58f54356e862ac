"""The op's flat arguments, grouped for a back end's scan of one direction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._scan import Direction, empty

STEP_STATES = {*range(1, 17), *range(32, 129, 16)}  # the n of `step`: one part of up to 16, or parts of 16


def fwd(
    scan_fwd: Callable,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    frames: int,
    max_seqlen: int,
    return_final_state: bool,
    save_states: bool,
    out_fp32: bool,
    plan: str,
    *,
    step: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """step: the back end's kernel for one token a sequence, where it has one; it saves no states."""
    one = x.shape[1] == 1 and cu_seqlens is None and not save_states and x.numel() > 0
    if one and step is not None and A.shape[1] in STEP_STATES:
        y, final_state = step(
            x, dt, A, B, C, D, z, dt_bias, initial_state, mask, dt_softplus, return_final_state, out_fp32
        )
        absent = empty(x, dtype=torch.float32)
        return y, empty(x, dtype=torch.float32) if final_state is None else final_state, absent
    y, (final_state,), (chunk_states,) = scan_fwd(
        (Direction(x, dt, A, B, C, D, dt_bias, initial_state, reverse),), z, cu_seqlens, mask,
        scale=1.0, dt_softplus=dt_softplus, frames=frames, return_final_state=return_final_state,
        save_states=save_states, out_fp32=out_fp32, max_seqlen=max_seqlen, plan=plan,
    )  # fmt: skip
    return y, final_state, chunk_states


def bwd(
    scan_bwd: Callable,
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_states: Tensor,
    dt_softplus: bool,
    reverse: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, ...]:
    dz, (grads,) = scan_bwd(
        dy, (dfinal_state,), (Direction(x, dt, A, B, C, D, dt_bias, initial_state, reverse),), z, cu_seqlens, mask,
        (chunk_states,), scale=1.0, dt_softplus=dt_softplus, frames=frames, max_seqlen=max_seqlen, plan=plan,
        dz=dz, y=y,
    )  # fmt: skip
    dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_state = grads
    return dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state
