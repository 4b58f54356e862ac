"""The scan as a loop over tokens: what the op means, its fp64 truth, and the last resort where nothing is compiled.

Letters: b sequences, l tokens, d channels, n state size, g groups of B and C.  Constant B or C is (d, n).
State, decays and every sum are fp32 (fp64 for fp64 inputs) whatever the dtype of the activations.
No matrix product on purpose: under autocast it would run in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .._scan import CHUNK, chunk_slot, chunk_states_shape, empty, state_dtype, token_order


def fwd(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y (b, l, d), final_state (sequences, d, n) or empty, chunk_states or empty."""
    s, final_state, chunk_states = scan_fwd(
        x, dt, A, B, C, D, dt_bias, initial_state, cu_seqlens, mask, dt_softplus, reverse, frames
    )
    absent = empty(x, dtype=s.dtype)
    y = gate(s, z).to(torch.float32 if out_fp32 else x.dtype).contiguous()
    return y, final_state if return_final_state else absent, chunk_states if save_states else absent.clone()


def bwd(
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
    """-> dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state; an empty tensor for each absent input.

    dz: where to write it.  y: gets the output of the forward again.
    """
    ds = gate_ds(dy, x, z)
    s, dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_state = scan_bwd(
        ds, dfinal_state, x, dt, A, B, C, D, dt_bias, initial_state,
        cu_seqlens, mask, chunk_states, dt_softplus, reverse, frames,
    )  # fmt: skip
    if y is not None:
        y.copy_(gate(s, z))
    return dx, ddt, dA, dB, dC, dD, gate_dz(dy, s, x, z, dz), ddt_bias, dinitial_state


def gate(s: Tensor, z: Tensor | None) -> Tensor:
    return s if z is None else s * F.silu(z.to(s.dtype))


def gate_ds(dy: Tensor | None, x: Tensor, z: Tensor | None) -> Tensor:
    """Gradient of the scan's ungated output s."""
    wide = state_dtype(x)
    if dy is None:
        return torch.zeros(x.shape, dtype=wide, device=x.device)
    return gate(dy.to(wide), z)


def gate_dz(dy: Tensor | None, s: Tensor, x: Tensor, z: Tensor | None, dz: Tensor | None) -> Tensor:
    if z is None:
        return empty(x, dtype=x.dtype)
    if dz is None:
        dz = empty(x, *z.shape, dtype=z.dtype)
    if dy is None:
        return dz.zero_()
    wide = z.to(s.dtype)
    sigma = torch.sigmoid(wide)
    return dz.copy_(dy.to(s.dtype) * s * sigma * (1 + wide * (1 - sigma)))


def scan_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    frames: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction without its gate -> s (b, l, d), final_state, chunk_states, all in fp32 (fp64)."""
    shape = chunk_states_shape(x, A, cu_seqlens)
    x, dt, B, C, _ = _widen(x, dt, B, C, dt_bias, mask, dt_softplus)
    s = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chunk_states = torch.zeros(shape, dtype=x.dtype, device=x.device)
    finals = []
    for rows, tokens, slot in _sequences(x, cu_seqlens, reverse, frames):
        h = _start(initial_state, rows, x, A)
        for k, i in enumerate(tokens):
            if k % CHUNK == 0:
                chunk_states[:, slot + k // CHUNK] = h
            h = _step(h, x[:, i], dt[:, i], A, B[:, i])
            s[:, i] = (h * _per_channel(C[:, i], x)).sum(-1)
        finals.append(h)
    # cat copies: the final state of an empty sequence must not alias the initial one
    final_state = torch.cat(finals) if finals else empty(x, 0, *shape[2:], dtype=x.dtype)
    return s if D is None else s + D * x, final_state, chunk_states


def scan_bwd(
    ds: Tensor,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_states: Tensor,
    dt_softplus: bool,
    reverse: bool,
    frames: int,
) -> tuple[Tensor, ...]:
    """-> s again, then dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_state.  README: backward by hand."""
    narrow, constant_B, constant_C = x.dtype, B.ndim == 2, C.ndim == 2
    x, dt, B, C, raw_dt = _widen(x, dt, B, C, dt_bias, mask, dt_softplus)
    wide = x.dtype
    s, dx, ddt = (torch.empty(x.shape, dtype=wide, device=x.device) for _ in range(3))
    dA = torch.zeros_like(A)
    dB = torch.zeros_like(A) if constant_B else torch.empty(B.shape, dtype=wide, device=B.device)
    dC = torch.zeros_like(A) if constant_C else torch.empty(C.shape, dtype=wide, device=C.device)
    dstarts = []
    for rows, tokens, slot in _sequences(x, cu_seqlens, reverse, frames):
        dh = _start(dfinal_state, rows, x, A)  # gradient of the state after token i, in (b, d, n)
        for first in reversed(range(0, len(tokens), CHUNK)):
            chunk = tokens[first : first + CHUNK]
            h = [chunk_states[:, slot + first // CHUNK]]
            for i in chunk:
                h.append(_step(h[-1], x[:, i], dt[:, i], A, B[:, i]))
            for i, before, after in reversed(list(zip(chunk, h, h[1:], strict=False))):
                x_i, dt_i, ds_i = x[:, i, :, None], dt[:, i, :, None], ds[:, i, :, None]  # (b, d, 1)
                B_i, C_i = _per_channel(B[:, i], x), _per_channel(C[:, i], x)
                s[:, i] = (after * C_i).sum(-1)
                dh = dh + ds_i * C_i
                dB_i, dC_i = dh * (dt_i * x_i), ds_i * after
                dinput = (dh * B_i).sum(-1)  # of dt * x
                decay = torch.exp(dt_i * A)
                dlog = dh * before * decay  # of dt * A
                dx[:, i] = dinput * dt[:, i]
                ddt[:, i] = dinput * x[:, i] + (dlog * A).sum(-1)
                dA += (dlog * dt_i).sum(0)
                if constant_B:
                    dB += dB_i.sum(0)
                else:
                    dB[:, i] = _per_group(dB_i, B)
                if constant_C:
                    dC += dC_i.sum(0)
                else:
                    dC[:, i] = _per_group(dC_i, C)
                dh = dh * decay
        dstarts.append(dh)

    dD = empty(x, dtype=wide)
    if D is not None:
        s, dx, dD = s + D * x, dx + D * ds, (ds * x).sum((0, 1))
    if dt_softplus:
        ddt = ddt * torch.where(raw_dt > 20, 1.0, torch.sigmoid(raw_dt))
    if mask is not None:
        dx, ddt = torch.where(mask[..., None], dx, 0), torch.where(mask[..., None], ddt, 0)
    ddt_bias = empty(x, dtype=wide) if dt_bias is None else ddt.sum((0, 1))
    dinitial_state = empty(x, dtype=wide)
    if initial_state is not None:
        dinitial_state = torch.cat(dstarts) if dstarts else torch.zeros_like(initial_state)
    dB = dB if constant_B else dB.to(narrow)
    dC = dC if constant_C else dC.to(narrow)
    return s, dx.to(narrow).contiguous(), ddt.to(narrow).contiguous(), dA, dB, dC, dD, ddt_bias, dinitial_state


def _widen(
    x: Tensor, dt: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor | None, mask: Tensor | None, dt_softplus: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """fp32 (fp64) x, dt after its softplus, B and C as (b, l, g, n), then dt before its softplus."""
    wide = state_dtype(x)
    b, l, _ = x.shape
    x, raw_dt, B, C = x.to(wide), dt.to(wide), B.to(wide), C.to(wide)
    B, C = (t.expand(b, l, *t.shape) if t.ndim == 2 else t for t in (B, C))
    if dt_bias is not None:
        raw_dt = raw_dt + dt_bias
    dt = F.softplus(raw_dt) if dt_softplus else raw_dt  # the identity above 20
    if mask is not None:  # select, do not multiply: a masked token may hold NaN
        dt, x = torch.where(mask[..., None], dt, 0), torch.where(mask[..., None], x, 0)
        B = torch.where(mask[..., None, None], B, 0)
    return x, dt, B, C, raw_dt


def _sequences(x: Tensor, cu_seqlens: Tensor | None, reverse: bool, frames: int) -> Iterator[tuple]:
    """(rows of the state, tokens in walking order, slot of the first chunk): all rows at once; packed, one by one."""
    if cu_seqlens is None:
        yield slice(None), token_order(0, x.shape[1], frames, reverse), 0
        return
    bounds = cu_seqlens.tolist()
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        rows = slice(sequence, sequence + 1)
        yield rows, token_order(start, stop, frames, reverse), chunk_slot(start, sequence)


def _start(state: Tensor | None, rows: slice, x: Tensor, A: Tensor) -> Tensor:
    if state is not None:
        return state[rows].to(x.dtype)
    return torch.zeros(x.shape[0], *A.shape, dtype=x.dtype, device=x.device)


def _step(h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """h (b, d, n) after one token; x, dt (b, d), B (b, g, n)."""
    return torch.exp(dt[..., None] * A) * h + (dt * x)[..., None] * _per_channel(B, x)


def _per_channel(B: Tensor, x: Tensor) -> Tensor:
    """(b, g, n) -> (b, d, n): channel c belongs to group c // (d / g)."""
    return B.repeat_interleave(x.shape[-1] // B.shape[1], dim=1)


def _per_group(dB: Tensor, B: Tensor) -> Tensor:
    """(b, d, n) -> (b, g, n): the transpose of `_per_channel`."""
    return dB.unflatten(1, (B.shape[2], -1)).sum(2)
