"""Registers endomamba::frame_head; it has no backward on purpose."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._backend import Backend, choose, register
from .._triton import backend as triton_backend
from . import reference

POOLS = ("mean", "cls")

BACKENDS = register(
    "frame_head",
    {
        "triton": triton_backend("endomamba.ops.frame_head", "frame_head"),
        # A norm, a mean and a product of one row, which PyTorch has.
        "cpu": Backend(reference.frame_head, None, reference.unsupported_by_cpu),
        "reference": Backend(reference.frame_head, None, lambda *_: []),
    },
)


@torch.library.custom_op("endomamba::frame_head", mutates_args=())
def frame_head_op(
    residual: Tensor, weight: Tensor, bias: Tensor, mean: bool, eps: float, dtype: torch.dtype, backend: str
) -> Tensor:
    return choose("frame_head", backend, residual).fwd(residual, weight, bias, mean, eps, dtype)


@frame_head_op.register_fake
def _(residual, weight, bias, mean, eps, dtype, backend):
    return residual.new_empty(residual.shape[0], weight.shape[0], dtype=dtype)


@register_flop_formula(torch.ops.endomamba.frame_head)
def _(residual_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * residual_shape[0] * weight_shape[0] * weight_shape[1]
