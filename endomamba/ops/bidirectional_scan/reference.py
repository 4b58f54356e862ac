"""Both directions as two runs of the selective scan's reference, one backwards, under one gate.  Letters as there."""

from __future__ import annotations

import torch
from torch import Tensor

from .._scan import empty
from ..selective_scan.reference import gate, gate_ds, gate_dz, scan_bwd, scan_fwd


def fwd(
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
    """-> y (b, l, d), the two final states (sequences, d, n) or empty, the two chunk_states or empty."""
    s, final_state, chunk_states = scan_fwd(
        x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, mask, dt_softplus, False, frames
    )
    s_b, final_state_b, chunk_states_b = scan_fwd(
        x_b, dt_b, A_b, B_b, C_b, D_b, dt_bias_b, initial_state_b, cu_seqlens, mask, dt_softplus, True, frames
    )
    y = gate(scale * (s + s_b), z).to(torch.float32 if out_fp32 else x.dtype).contiguous()
    states = (final_state, final_state_b) if return_final_state else (empty(x, dtype=s.dtype) for _ in range(2))
    saved = (chunk_states, chunk_states_b) if save_states else (empty(x, dtype=s.dtype) for _ in range(2))
    return y, *states, *saved


def bwd(
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
    """-> the gradients in the order of the inputs, dx to dinitial_state_b; an empty tensor for each absent input.

    dz: where to write it.  y: gets the output of the forward again.
    """
    ds = scale * gate_ds(dy, x, z)
    s, dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_state = scan_bwd(
        ds, dfinal_state, x, dt, A, B, C, D, dt_bias, initial_state,
        cu_seqlens, mask, chunk_states, dt_softplus, False, frames,
    )  # fmt: skip
    s_b, dx_b, ddt_b, dA_b, dB_b, dC_b, dD_b, ddt_bias_b, dinitial_state_b = scan_bwd(
        ds, dfinal_state_b, x_b, dt_b, A_b, B_b, C_b, D_b, dt_bias_b, initial_state_b,
        cu_seqlens, mask, chunk_states_b, dt_softplus, True, frames,
    )  # fmt: skip
    s = scale * (s + s_b)
    if y is not None:
        y.copy_(gate(s, z))
    dz = gate_dz(dy, s, x, z, dz)
    return (
        dx, ddt, dA, dB, dC, dx_b, ddt_b, dA_b, dB_b, dC_b,
        dD, dD_b, dz, ddt_bias, ddt_bias_b, dinitial_state, dinitial_state_b,
    )  # fmt: skip
