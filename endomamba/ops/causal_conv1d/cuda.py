"""The CUDA C++ convolutions: which calls they take, and their launches.  Outputs are contiguous."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _cuda
from .._native import view
from .._scan import lanes
from .._triton import on_device
from .native import arguments, forward_direction

TAPS = 4  # csrc/cuda/conv.cu
WARPS = 16  # of the backward, that a multiprocessor holds: 128 registers a thread


def unsupported(x: Tensor, weight: Tensor | None = None, cu_seqlens: Tensor | None = None) -> list[str]:
    why = _cuda.unsupported(x)
    if weight is not None and weight.shape[1] != TAPS:
        why.append(f"{weight.shape[1]} taps, the kernels have {TAPS}")
    if cu_seqlens is not None:
        why.append("cu_seqlens is not supported")
    return why


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def causal_conv1d_fwd(x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, return_final_state):
    y = x.new_empty(x.shape)
    state = weight.new_empty(x.shape[0], TAPS - 1, x.shape[2]) if return_final_state else None
    _forward(x, ((weight, bias, y),), silu, frames, reverse, initial_state, state)
    return y, weight.new_empty(0) if state is None else state


def bidirectional_conv1d_fwd(x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames):
    y, y_b = x.new_empty(x.shape), x.new_empty(x.shape)
    _forward(x, ((weight, bias, y), (weight_b, bias_b, y_b)), silu, frames)
    return y, y_b


def _forward(x, sides, silu, frames, reverse=False, initial_state=None, final_state=None):
    if x.numel() == 0:
        if final_state is not None and final_state.numel():
            final_state.zero_() if initial_state is None else final_state.copy_(initial_state)
        return
    cuda, x = _cuda.load(), lanes(x)
    sides = [(*_contiguous(weight, bias), y) for weight, bias, y in sides]
    (initial_state,) = _contiguous(initial_state)
    args = arguments(x, sides[0][0], None, silu, frames, cuda)
    args.reverse, args.initial_state, args.final_state = reverse, view(initial_state), view(final_state)
    for side in sides:
        args.add_direction(forward_direction(*side, cuda))
    with on_device(x):
        cuda.conv_forward(args, _cuda.stream(x.device))


def causal_conv1d_bwd(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, dx=None):
    dx = x.new_empty(x.shape) if dx is None else dx
    dstate = None if initial_state is None else weight.new_empty(initial_state.shape)
    states = (initial_state, dfinal_state, dstate)
    ((dweight, dbias),) = _backward(x, ((weight, bias, dy),), dx, silu, frames, reverse, states)
    return dx, dweight, dbias, weight.new_empty(0) if dstate is None else dstate


def bidirectional_conv1d_bwd(dy, dy_b, x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames, dx=None):
    dx = x.new_empty(x.shape) if dx is None else dx
    sides = ((weight, bias, dy), (weight_b, bias_b, dy_b))
    gradients = _backward(x, sides, dx, silu, frames)
    return dx, *gradients[0], *gradients[1]


def _backward(x, sides, dx, silu, frames, reverse=False, states=(None, None, None)):
    """dweight and dbias of each side; dx and the gradient of the initial state are written."""
    initial_state, dfinal_state, dstate = states
    b, l, d = x.shape
    if x.numel() == 0:
        if dstate is not None and dstate.numel():
            dstate.zero_() if dfinal_state is None else dstate.copy_(dfinal_state)
        return [(torch.zeros_like(w), w.new_zeros(0 if bias is None else bias.shape)) for w, bias, _ in sides]
    cuda, x = _cuda.load(), lanes(x)
    sides = [(*_contiguous(weight, bias), lanes(dy)) for weight, bias, dy in sides]
    initial_state, dfinal_state = _contiguous(initial_state, dfinal_state)
    args = arguments(x, sides[0][0], None, silu, frames, cuda)
    args.reverse, args.dx, args.initial_state = reverse, view(dx), view(initial_state)
    args.dfinal_state, args.dinitial_state = view(dfinal_state), view(dstate)
    for weight, bias, dy in sides:
        dir = cuda.ConvDirection()
        dir.weight, dir.bias, dir.dy = view(weight), view(bias), view(dy)
        args.add_direction(dir)
    most = max(1, WARPS * _cuda.processors(x.device) // ((d + 63) // 64))
    workers = min(cuda.conv_pieces(b, l), most)
    parts = x.new_empty((workers, len(sides), TAPS + 1, d), dtype=torch.float32)
    with on_device(x):
        cuda.conv_backward(args, workers, parts.data_ptr(), _cuda.stream(x.device))
    gradients = []
    for (_, bias, _), total in zip(sides, parts.sum(0), strict=True):
        dweight = total[:TAPS].T.clone(memory_format=torch.contiguous_format)
        gradients.append((dweight, x.new_empty(0, dtype=torch.float32) if bias is None else total[TAPS].clone()))
    return gradients
