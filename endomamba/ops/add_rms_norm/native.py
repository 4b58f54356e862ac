"""Hands the tensors to the C++ kernels: one struct of sizes and views, one call.  Outputs are contiguous."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from .._backend import undisturbed
from .._extension import C as _C
from .._native import DTYPES, unsupported, view

__all__ = ["add_norm_bwd", "add_norm_fwd", "norm_of_block", "runs_block", "unsupported"]


def _rows(tensor: Tensor | None, shape: tuple[int, int, int]) -> Tensor | None:
    """(b, m, c): a view where the strides between b and c allow one, else a copy."""
    return tensor if tensor is None or tensor.ndim == 3 else tensor.reshape(shape)


def _rows_view(tensor: Tensor | None, shape: tuple[int, int, int]) -> tuple[int, ...] | None:
    """`view` of _rows(tensor), without making a tensor of it where it is contiguous."""
    if tensor is None or not tensor.is_contiguous():
        return view(tensor)
    return tensor.data_ptr(), shape[1] * shape[2], shape[2], 1


def _arguments(shape: tuple[int, int, int], dtype: torch.dtype, layer_norm: bool, weight: Tensor, stats: Tensor):
    args = _C.NormArgs()
    args.b, args.m, args.c = shape
    args.dtype, args.threads = DTYPES[dtype], torch.get_num_threads()
    args.layer_norm = layer_norm
    args.weight = view(weight)
    start, step = stats.data_ptr(), stats.stride(0) * stats.element_size()
    args.rstd = (start + step, 1) if layer_norm else (start, 1)
    if layer_norm:
        args.mean = (start, 1)
    return args


def _shape(x: Tensor) -> tuple[int, int, int]:
    return (x.shape[0], prod(x.shape[1:-1]), x.shape[-1])


def add_norm_fwd(x, weight, bias, residual, row_scale, eps, layer_norm):
    stats = weight.new_empty(1 + layer_norm, prod(x.shape[:-1]))
    return *_forward(x, weight, bias, residual, row_scale, eps, layer_norm, stats.data_ptr()), stats


def _forward(x, weight, bias, residual, row_scale, eps, layer_norm, stats: int) -> tuple[Tensor, Tensor]:
    """-> normed and the new residual.  stats: where they go, 0: nowhere."""
    shape = _shape(x)
    normed, new_residual = x.new_empty(*x.shape), weight.new_empty(*x.shape)  # sizes as numbers: half as long
    rows, residual_rows = ((t if t is None or t.is_contiguous() else _rows(t, shape)) for t in (x, residual))
    _C.norm_fwd(
        shape, DTYPES[x.dtype], torch.get_num_threads(), layer_norm, eps,
        _rows_view(rows, shape), _rows_view(residual_rows, shape), view(weight), view(bias), view(row_scale),
        (normed.data_ptr(), new_residual.data_ptr(), stats),
    )  # fmt: skip
    return normed, new_residual


def add_norm_bwd(
    dnormed, dnew_residual, x, new_residual, stats, weight, bias, row_scale, dtype, has_residual, layer_norm
):
    shape = _shape(new_residual)
    dx = new_residual.new_empty(new_residual.shape, dtype=dtype)
    dweight, dbias = torch.empty_like(weight), weight.new_empty(0 if bias is None else bias.shape)
    dresidual = weight.new_empty(new_residual.shape if has_residual else 0)
    drow_scale = weight.new_empty(0 if x is None else row_scale.shape)
    operands = [_rows(t, shape) for t in (dnormed, dnew_residual, x, new_residual)]
    args = _arguments(shape, dtype, layer_norm, weight, stats)
    args.dnormed, args.dnew_residual, args.x, args.new_residual = (view(t) for t in operands)
    args.row_scale = view(row_scale)
    args.dx, args.dweight = view(_rows(dx, shape)), view(dweight)
    if bias is not None:
        args.dbias = view(dbias)
    if has_residual:
        args.dresidual = view(_rows(dresidual, shape))
    if x is not None:
        args.drow_scale = view(drow_scale)
    _C.norm_bwd(args)
    return dx, dweight, dbias, dresidual, drow_scale


# --- between the blocks of a frame, in eager inference ---------------------------------------------------------------
# The checks of the op and its way through the dispatcher take longer than the kernel needs for a frame.


def runs_block(x: Tensor, weight: Tensor, residual: Tensor | None) -> bool:
    """Whether `norm_of_block` may stand for the op here: on a CPU, with nobody looking at the dispatcher."""
    return (
        undisturbed()  # first: Dynamo need not trace the rest
        and _C is not None
        and x.is_cpu
        and x.dtype in DTYPES
        and x.ndim >= 2
        and weight.is_cpu
        and weight.dtype == torch.float32
        and weight.shape == x.shape[-1:]
        and (residual is None or (residual.is_cpu and residual.dtype == torch.float32 and residual.shape == x.shape))
    )


def norm_of_block(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` of what `runs_block` takes."""
    return _forward(x, weight, None, residual, None, eps, False, 0)
