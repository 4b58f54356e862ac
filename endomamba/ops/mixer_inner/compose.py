"""mixer_inner from the conv and scan kernels of one back end, forward and its backward by hand.

Back end "auto": each kernel's own choice, as if it were called by itself.

Letters: b sequences, l tokens, d channels, n state size, r dt rank, w conv width, c channels of the model.
u is the convolved input, y the gated sum of the scans.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import TABLES, Backend, choose, measured_phase
from .._scan import empty


class Side(NamedTuple):
    """The parameters of one direction; see mixer_inner."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    x_proj_weight: Tensor
    dt_proj_weight: Tensor
    dt_bias: Tensor | None
    A: Tensor
    D: Tensor | None


class Linear(NamedTuple):
    """in_proj, (2d, c) and (2d,), or out_proj, (c, d) and (c,); without a weight it does nothing."""

    weight: Tensor | None
    bias: Tensor | None


IDENTITY = Linear(None, None)


class Walk(NamedTuple):
    """How the tokens are visited."""

    cu_seqlens: Tensor | None
    reverse: bool
    frames: int
    max_seqlen: int
    plan: str


class Projected(NamedTuple):
    """What the scan reads besides u, and what the backward of the projections needs."""

    dt: Tensor  # (b, l, d)
    B: Tensor  # (b, l, 1, n)
    C: Tensor  # (b, l, 1, n)
    dt_low: Tensor  # (b, l, r)


def project(u: Tensor, side: Side) -> Projected:
    """dt, B, C of every token, in the dtype of u."""
    r, n = side.dt_proj_weight.shape[1], side.A.shape[1]
    projected = F.linear(u, side.x_proj_weight.to(u.dtype))
    dt_low, B, C = projected.split((r, n, n), dim=-1)
    return Projected(F.linear(dt_low, side.dt_proj_weight.to(u.dtype)), B.unsqueeze(2), C.unsqueeze(2), dt_low)


def project_backward(
    u: Tensor, side: Side, projected: Projected, du: Tensor, ddt: Tensor, dB: Tensor, dC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """-> du with what comes through the projections, dx_proj_weight, ddt_proj_weight, both in their weight's dtype."""
    ddt_rows, low_rows = ddt.flatten(0, 1), projected.dt_low.flatten(0, 1)
    ddt_proj = ddt_rows.mT @ low_rows
    ddt_low = ddt @ side.dt_proj_weight.to(u.dtype)
    dprojected = torch.cat((ddt_low, dB.squeeze(2), dC.squeeze(2)), dim=-1)
    dx_proj = dprojected.flatten(0, 1).mT @ u.flatten(0, 1)
    # in place, du is the scan's own output: out of place it would be copied first
    du = du.flatten(0, 1).addmm_(dprojected.flatten(0, 1), side.x_proj_weight.to(u.dtype)).view_as(u)
    return du, dx_proj.to(side.x_proj_weight.dtype), ddt_proj.to(side.dt_proj_weight.dtype)


def fwd(
    backend: str,
    xz: Tensor,
    side: Side,
    side_b: Side | None,
    initial_conv_state: Tensor | None,
    initial_ssm_state: Tensor | None,
    walk: Walk,
    scale: float,
    return_final_state: bool,
    save_states: bool,
    out_proj: Linear = IDENTITY,
    in_proj: Linear = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> out, final conv state, final ssm state, chunk states of both directions; empty where not asked for.

    xz is the input of in_proj where that is given.
    """
    x, z = linear(xz, in_proj).chunk(2, dim=-1)
    phase = "saving" if save_states else "forward"
    if side_b is None:
        u, conv_state = _conv(backend, x, side, initial_conv_state, walk, return_final_state)
        dt, B, C, _ = project(u, side)
        tensors = (u, dt, side.A, B, C, side.D, z, side.dt_bias, initial_ssm_state, walk.cu_seqlens, None)
        y, ssm_state, chunks = _scan("selective_scan", backend, phase, walk, tensors).fwd(
            *tensors,
            True, walk.reverse, walk.frames, walk.max_seqlen, return_final_state, save_states, False, walk.plan,
        )  # fmt: skip
        return linear(y, out_proj), conv_state, ssm_state, chunks, empty(xz, dtype=chunks.dtype)
    u, u_b = _conv_both(backend, x, side, side_b, walk)
    dt, B, C, _ = project(u, side)
    dt_b, B_b, C_b, _ = project(u_b, side_b)
    tensors = (
        u, dt, side.A, B, C, u_b, dt_b, side_b.A, B_b, C_b, side.D, side_b.D, z, side.dt_bias, side_b.dt_bias,
        None, None, walk.cu_seqlens, None,
    )  # fmt: skip
    y, _, _, chunks, chunks_b = _scan("bidirectional_scan", backend, phase, walk, tensors).fwd(
        *tensors, scale, True, walk.frames, walk.max_seqlen, False, save_states, False, walk.plan,
    )  # fmt: skip
    absent = (empty(xz, dtype=chunks.dtype) for _ in range(2))
    return linear(y, out_proj), *absent, chunks, chunks_b


def bwd(
    backend: str,
    dout: Tensor | None,
    dconv_state: Tensor | None,
    dssm_state: Tensor | None,
    xz: Tensor,
    side: Side,
    side_b: Side | None,
    initial_conv_state: Tensor | None,
    initial_ssm_state: Tensor | None,
    chunks: Tensor,
    chunks_b: Tensor,
    walk: Walk,
    scale: float,
    out_proj: Linear,
    in_proj: Linear,
) -> tuple[Tensor, Side, Side | None, Tensor, Tensor, Linear, Linear]:
    """-> dxz, the gradients of both sides, dinitial_conv_state, dinitial_ssm_state, those of out_proj, in_proj; empty
    for absent inputs.
    """
    hidden, xz = xz, linear(xz, in_proj)
    dxz = empty(xz, *xz.shape, dtype=xz.dtype)
    x, z = xz.chunk(2, dim=-1)
    dx, dz = dxz.chunk(2, dim=-1)
    dy = _linear_dx(dout, out_proj)
    y = None if dout is None or out_proj.weight is None else empty(x, *x.shape, dtype=x.dtype)
    if side_b is None:
        u, _ = _conv(backend, x, side, initial_conv_state, walk, False)
        projected = project(u, side)
        tensors = (
            u, *projected[:1], side.A, *projected[1:3], side.D, z, side.dt_bias, initial_ssm_state, walk.cu_seqlens,
            None,
        )  # fmt: skip
        du, ddt, dA, dB, dC, dD, _, ddt_bias, dssm = _scan("selective_scan", backend, "backward", walk, tensors).bwd(
            dy, dssm_state, *tensors, chunks, True, walk.reverse, walk.frames, walk.max_seqlen, walk.plan,
            dz, y,
        )  # fmt: skip
        du, dx_proj, ddt_proj = project_backward(u, side, projected, du, ddt, dB, dC)
        _, dweight, dbias, dconv = _row("causal_conv1d", backend, x).bwd(
            du, dconv_state, x, side.conv_weight, side.conv_bias, initial_conv_state,
            walk.cu_seqlens, True, walk.reverse, walk.frames, dx,
        )  # fmt: skip
        dside = Side(dweight, dbias, dx_proj, ddt_proj, ddt_bias, dA, dD)
        dside_b = None
    else:
        u, u_b = _conv_both(backend, x, side, side_b, walk)
        projected, projected_b = project(u, side), project(u_b, side_b)
        dt, B, C, _ = projected
        dt_b, B_b, C_b, _ = projected_b
        tensors = (
            u, dt, side.A, B, C, u_b, dt_b, side_b.A, B_b, C_b, side.D, side_b.D, z, side.dt_bias, side_b.dt_bias,
            None, None, walk.cu_seqlens, None,
        )  # fmt: skip
        (
            du, ddt, dA, dB, dC, du_b, ddt_b, dA_b, dB_b, dC_b, dD, dD_b, _, ddt_bias, ddt_bias_b, *_,
        ) = _scan("bidirectional_scan", backend, "backward", walk, tensors).bwd(
            dy, None, None, *tensors, chunks, chunks_b,
            scale, True, walk.frames, walk.max_seqlen, walk.plan, dz, y,
        )  # fmt: skip
        du, dx_proj, ddt_proj = project_backward(u, side, projected, du, ddt, dB, dC)
        du_b, dx_proj_b, ddt_proj_b = project_backward(u_b, side_b, projected_b, du_b, ddt_b, dB_b, dC_b)
        _, dweight, dbias, dweight_b, dbias_b = _row("bidirectional_conv1d", backend, x).bwd(
            du, du_b, x, side.conv_weight, side.conv_bias,
            side_b.conv_weight, side_b.conv_bias, walk.cu_seqlens, True, walk.frames, dx,
        )  # fmt: skip
        dside = Side(dweight, dbias, dx_proj, ddt_proj, ddt_bias, dA, dD)
        dside_b = Side(dweight_b, dbias_b, dx_proj_b, ddt_proj_b, ddt_bias_b, dA_b, dD_b)
        dconv, dssm = (empty(xz, dtype=dA.dtype) for _ in range(2))
    dout_proj = _linear_dweight(xz, dout, y, out_proj)
    din_proj = _linear_dweight(xz, dxz, hidden, in_proj)
    return _linear_dx(dxz, in_proj), dside, dside_b, dconv, dssm, dout_proj, din_proj


def linear(x: Tensor, by: Linear) -> Tensor:
    """In the dtype of x."""
    if by.weight is None:
        return x
    return F.linear(x, by.weight.to(x.dtype), None if by.bias is None else by.bias.to(x.dtype))


def _linear_dx(dout: Tensor | None, by: Linear) -> Tensor | None:
    return dout if by.weight is None or dout is None else dout @ by.weight.to(dout.dtype)


def _linear_dweight(beside: Tensor, dout: Tensor | None, x: Tensor | None, by: Linear) -> Linear:
    """The gradients, in the dtypes of weight and bias; empty where those are absent."""
    if by.weight is None or dout is None:
        return Linear(*(empty(beside, dtype=torch.float32) if t is None else torch.zeros_like(t) for t in by))
    rows = dout.flatten(0, 1)
    dweight = (rows.mT @ x.flatten(0, 1)).to(by.weight.dtype)
    dbias = empty(beside, dtype=torch.float32) if by.bias is None else rows.sum(0, dtype=by.bias.dtype)
    return Linear(dweight, dbias)


def _row(op: str, backend: str, *tensors: Tensor | None, phase: str = "") -> Backend:
    """A named back end was asked for the whole mixer, and said that it can."""
    return choose(op, backend, *tensors, phase=phase) if backend == "auto" else TABLES[op][backend]


def _scan(op: str, backend: str, phase: str, walk: Walk, tensors: tuple[Tensor | None, ...]) -> Backend:
    return _row(op, backend, *tensors, phase=measured_phase(phase, walk.frames, walk.plan))


def _conv(
    backend: str, x: Tensor, side: Side, state: Tensor | None, walk: Walk, return_final_state: bool
) -> tuple[Tensor, Tensor]:
    return _row("causal_conv1d", backend, x).fwd(
        x, side.conv_weight, side.conv_bias, state, walk.cu_seqlens, True, walk.reverse, walk.frames, return_final_state
    )


def _conv_both(backend: str, x: Tensor, side: Side, side_b: Side, walk: Walk) -> tuple[Tensor, Tensor]:
    return _row("bidirectional_conv1d", backend, x).fwd(
        x, side.conv_weight, side.conv_bias, side_b.conv_weight, side_b.conv_bias, walk.cu_seqlens, True, walk.frames
    )
