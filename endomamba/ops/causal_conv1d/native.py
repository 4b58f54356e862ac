"""Hands the tensors to the C++ kernels: one struct of sizes and views, one call.  Outputs are contiguous."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .._extension import C as _C
from .._native import DTYPES, unsupported, view

__all__ = [
    "bidirectional_conv1d_bwd",
    "bidirectional_conv1d_fwd",
    "causal_conv1d_bwd",
    "causal_conv1d_fwd",
    "unsupported",
]


def arguments(x: Tensor, weight: Tensor, cu_seqlens: Tensor | None, silu: bool, frames: int, module: ModuleType = _C):
    """The module's ConvArgs: endomamba._C, or endomamba._C_cuda, which has the same."""
    args = module.ConvArgs()
    args.b, args.l, args.d = x.shape
    args.w = weight.shape[1]
    if cu_seqlens is not None:
        args.b, args.cu_seqlens = cu_seqlens.shape[0] - 1, view(cu_seqlens)
    if frames:
        args.frames = frames
    args.dtype, args.threads = DTYPES[x.dtype], torch.get_num_threads()
    args.silu = silu
    args.x = view(x)
    return args


def forward_direction(weight: Tensor, bias: Tensor | None, y: Tensor, module: ModuleType = _C):
    dir = module.ConvDirection()
    dir.weight, dir.bias, dir.y = view(weight), view(bias), view(y)
    return dir


def _backward_direction(weight: Tensor, bias: Tensor | None, dy: Tensor | None):
    """The direction and its new dweight and dbias."""
    dir = _C.ConvDirection()
    dweight, dbias = weight.new_empty(weight.shape), weight.new_empty(0 if bias is None else bias.shape)
    dir.weight, dir.bias, dir.dy, dir.dweight = view(weight), view(bias), view(dy), view(dweight)
    dir.dbias = None if bias is None else view(dbias)
    return dir, dweight, dbias


def _int64(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def causal_conv1d_fwd(x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, return_final_state):
    cu_seqlens = _int64(cu_seqlens)
    y = x.new_empty(x.shape)
    args = arguments(x, weight, cu_seqlens, silu, frames)
    args.reverse = reverse
    if initial_state is not None:
        args.initial_state = view(initial_state)
    if return_final_state:
        final_state = weight.new_empty(args.b, args.w - 1, args.d)
        args.final_state = view(final_state)
    else:
        final_state = weight.new_empty(0)
    args.add_direction(forward_direction(weight, bias, y))
    _C.conv_fwd(args)
    return y, final_state


def causal_conv1d_bwd(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, dx=None):
    cu_seqlens = _int64(cu_seqlens)
    dx = x.new_empty(x.shape) if dx is None else dx
    dstate = weight.new_empty(0 if initial_state is None else initial_state.shape)
    args = arguments(x, weight, cu_seqlens, silu, frames)
    args.reverse = reverse
    args.dx, args.dfinal_state = view(dx), view(dfinal_state)
    if initial_state is not None:
        args.initial_state, args.dinitial_state = view(initial_state), view(dstate)
    dir, dweight, dbias = _backward_direction(weight, bias, dy)
    args.add_direction(dir)
    _C.conv_bwd(args)
    return dx, dweight, dbias, dstate


def bidirectional_conv1d_fwd(x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames):
    cu_seqlens = _int64(cu_seqlens)
    y, y_b = x.new_empty(x.shape), x.new_empty(x.shape)
    args = arguments(x, weight, cu_seqlens, silu, frames)
    args.add_direction(forward_direction(weight, bias, y))
    args.add_direction(forward_direction(weight_b, bias_b, y_b))
    _C.conv_fwd(args)
    return y, y_b


def bidirectional_conv1d_bwd(dy, dy_b, x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames, dx=None):
    cu_seqlens = _int64(cu_seqlens)
    dx = x.new_empty(x.shape) if dx is None else dx
    args = arguments(x, weight, cu_seqlens, silu, frames)
    args.dx = view(dx)
    dir, dweight, dbias = _backward_direction(weight, bias, dy)
    args.add_direction(dir)
    dir_b, dweight_b, dbias_b = _backward_direction(weight_b, bias_b, dy_b)
    args.add_direction(dir_b)
    _C.conv_bwd(args)
    return dx, dweight, dbias, dweight_b, dbias_b
