"""The op's flat arguments, grouped for a back end's scan of both directions."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._scan import Direction


def fwd(
    scan_fwd: Callable,
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
    D: Tensor | None,
    D_b: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_bias_b: Tensor | None,
    initial_state: Tensor | None,
    initial_state_b: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    scale: float,
    dt_softplus: bool,
    frames: int,
    max_seqlen: int,
    return_final_state: bool,
    save_states: bool,
    out_fp32: bool,
    plan: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sides = (
        Direction(x, dt, A, B, C, D, dt_bias, initial_state, False),
        Direction(x_b, dt_b, A_b, B_b, C_b, D_b, dt_bias_b, initial_state_b, True),
    )
    y, states, saved = scan_fwd(
        sides, z, cu_seqlens, mask, scale=scale, dt_softplus=dt_softplus, frames=frames,
        return_final_state=return_final_state, save_states=save_states, out_fp32=out_fp32,
        max_seqlen=max_seqlen, plan=plan,
    )  # fmt: skip
    return y, *states, *saved


def bwd(
    scan_bwd: Callable,
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    dfinal_state_b: Tensor | None,
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
    D: Tensor | None,
    D_b: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_bias_b: Tensor | None,
    initial_state: Tensor | None,
    initial_state_b: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_states: Tensor,
    chunk_states_b: Tensor,
    scale: float,
    dt_softplus: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, ...]:
    sides = (
        Direction(x, dt, A, B, C, D, dt_bias, initial_state, False),
        Direction(x_b, dt_b, A_b, B_b, C_b, D_b, dt_bias_b, initial_state_b, True),
    )
    dz, (first, second) = scan_bwd(
        dy, (dfinal_state, dfinal_state_b), sides, z, cu_seqlens, mask, (chunk_states, chunk_states_b),
        scale=scale, dt_softplus=dt_softplus, frames=frames, max_seqlen=max_seqlen, plan=plan,
        dz=dz, y=y,
    )  # fmt: skip
    dx, ddt, dA, dB, dC, dD, ddt_bias, dstate = first
    dx_b, ddt_b, dA_b, dB_b, dC_b, dD_b, ddt_bias_b, dstate_b = second
    return (
        dx, ddt, dA, dB, dC, dx_b, ddt_b, dA_b, dB_b, dC_b,
        dD, dD_b, dz, ddt_bias, ddt_bias_b, dstate, dstate_b,
    )  # fmt: skip
