"""The C++ scan of one or two directions, as both scan ops call it, and the arguments that the CUDA one has too."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ._extension import C as _C
from ._native import DTYPES, view
from ._scan import Direction, chunk_states_shape, empty


def _operand(tensor: Tensor, channels: int) -> tuple[tuple[int, ...], int, bool]:
    """(view as (b,l,g,n), groups, constant?)"""
    if tensor.ndim == 2:
        return (tensor.data_ptr(), 0, 0, *tensor.stride()), channels, True
    return view(tensor), tensor.shape[2], False


def _arguments(
    module: ModuleType,
    first: Direction,
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    scale: float,
    dt_softplus: bool,
    frames: int,
    out_dtype: torch.dtype,
):
    args = module.ScanArgs()
    args.b = first.x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    args.l, args.d = first.x.shape[1:]
    args.n = first.A.shape[1]
    args.frames = frames
    args.cu_seqlens = view(cu_seqlens)
    args.dtype, args.out_dtype = DTYPES[first.x.dtype], DTYPES[out_dtype]
    args.threads = torch.get_num_threads()
    args.softplus, args.scale = dt_softplus, scale
    args.z, args.mask = view(z), view(mask)
    return args


def _direction(module: ModuleType, side: Direction):
    dir = module.ScanDirection()
    dir.x, dir.dt, dir.A = view(side.x), view(side.dt), view(side.A)
    dir.B, dir.groups_B, dir.constant_B = _operand(side.B, side.x.shape[2])
    dir.C, dir.groups_C, dir.constant_C = _operand(side.C, side.x.shape[2])
    dir.D, dir.dt_bias, dir.initial_state = view(side.D), view(side.dt_bias), view(side.initial_state)
    dir.reverse = side.reverse
    return dir


def _num_seqs(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def forward_arguments(
    module: ModuleType,
    sides: tuple[Direction, ...],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    dt_softplus: bool,
    frames: int,
    return_final_state: bool,
    save_states: bool,
    out_fp32: bool,
):
    """-> the module's ScanArgs, y, final state of each side, chunk states of each side; empty where not asked for."""
    x = sides[0].x
    y = empty(x, *x.shape, dtype=torch.float32 if out_fp32 else x.dtype)
    args = _arguments(module, sides[0], z, cu_seqlens, mask, scale, dt_softplus, frames, y.dtype)
    args.y = view(y)
    finals, chunks = [], []
    for side in sides:
        dir = _direction(module, side)
        final = chunk = None
        if return_final_state:
            final = empty(x, _num_seqs(x, cu_seqlens), *side.A.shape, dtype=torch.float32)
        if save_states:
            chunk = empty(x, *chunk_states_shape(x, side.A, cu_seqlens), dtype=torch.float32)
            if cu_seqlens is not None:
                chunk.zero_()  # slots that no chunk owns: an op's output must not be what memory happened to hold
        dir.final_state, dir.chunk_states = view(final), view(chunk)
        finals.append(empty(x, dtype=torch.float32) if final is None else final)
        chunks.append(empty(x, dtype=torch.float32) if chunk is None else chunk)
        args.add_direction(dir)
    return args, y, finals, chunks


def scan_fwd(
    sides: tuple[Direction, ...],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    *,
    max_seqlen: int,
    plan: str,
    **options: bool | int | float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """-> y, final state of each side, chunk states of each side; options as in `forward_arguments`.

    max_seqlen and plan change nothing here: lengths are read, and the kernel is invariant by itself.
    """
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    args, y, finals, chunks = forward_arguments(_C, sides, z, cu_seqlens, mask, **options)
    _C.scan_fwd(args)
    return y, finals, chunks


def backward_arguments(
    module: ModuleType,
    dy: Tensor | None,
    dfinal_states: tuple[Tensor | None, ...],
    sides: tuple[Direction, ...],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_states: tuple[Tensor, ...],
    *,
    scale: float,
    dt_softplus: bool,
    frames: int,
    dz: Tensor | None,
    y: Tensor | None,
):
    """-> the module's ScanArgs, dz, and for each side the gradients that `scan_bwd` returns, not yet filled."""
    x = sides[0].x
    args = _arguments(
        module, sides[0], z, cu_seqlens, mask, scale, dt_softplus, frames, x.dtype if dy is None else dy.dtype
    )
    if dz is None:
        dz = empty(x, *(() if z is None else x.shape), dtype=x.dtype)
    args.dy, args.dz, args.y = view(dy), view(dz if z is not None else None), view(y)
    grads = []
    for side, dfinal, chunks in zip(sides, dfinal_states, chunk_states, strict=True):
        dir = _direction(module, side)
        dx, ddt = (empty(x, *x.shape, dtype=x.dtype) for _ in range(2))
        dA, dD, ddt_bias, dinitial = (
            empty(x, *(t.shape if t is not None else ()), dtype=torch.float32)
            for t in (side.A, side.D, side.dt_bias, side.initial_state)
        )
        dB, dC = (empty(x, *t.shape, dtype=torch.float32 if t.ndim == 2 else x.dtype) for t in (side.B, side.C))
        dir.dfinal_state, dir.chunk_states = view(dfinal), view(chunks)
        dir.dx, dir.ddt, dir.dA = view(dx), view(ddt), view(dA)
        dir.dB = view(dB) if dB.ndim == 4 else (dB.data_ptr(),)
        dir.dC = view(dC) if dC.ndim == 4 else (dC.data_ptr(),)
        dir.dD = view(dD) if side.D is not None else None
        dir.ddt_bias = view(ddt_bias) if side.dt_bias is not None else None
        dir.dinitial_state = view(dinitial) if side.initial_state is not None else None
        args.add_direction(dir)
        grads.append((dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial))
    return args, dz, grads


def scan_bwd(
    dy: Tensor | None,
    dfinal_states: tuple[Tensor | None, ...],
    sides: tuple[Direction, ...],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_states: tuple[Tensor, ...],
    *,
    scale: float,
    dt_softplus: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """-> dz, and for each side dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_state; empty for absent inputs.

    dz: where to write it.  y, in the dtype of dy, with z: gets the output of the forward again.
    """
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
    args, dz, grads = backward_arguments(
        _C, dy, dfinal_states, sides, z, cu_seqlens, mask, chunk_states,
        scale=scale, dt_softplus=dt_softplus, frames=frames, dz=dz, y=y,
    )  # fmt: skip
    _C.scan_bwd(args)
    return dz, grads
