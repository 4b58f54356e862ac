"""Registers endomamba::frame_blocks: it mutates, and has no backward on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _native, _triton
from .._backend import Backend, choose, register
from .._triton import lazy
from ..mixer_inner.op import mixer_flops
from . import cuda, reference
from .cuda import WEIGHTS

PRODUCTS = {torch.bfloat16, torch.float32}


def _by_kernels(residual: Tensor, weights: Sequence[Tensor] = (), *_: object) -> list[str]:
    why = _triton.unsupported(residual)
    if torch.version.hip:
        why.append("the frame kernels do not compile for AMD GPUs yet")
    if len(weights):
        in_proj, conv, A = weights[0], weights[1], weights[6]
        taps, d, n = conv.shape[2] - 1, A.shape[1], A.shape[2]
        if in_proj.dtype not in PRODUCTS:  # a residual that is not normed may be beyond fp16
            why.append(f"weights must be bfloat16 or float32, they are {in_proj.dtype}")
        if n != 16:
            why.append(f"the frame kernels are for 16 states, not {n}")
        if d % 16:
            why.append(f"the inner channels must be a multiple of 16, not {d}")
        if not 1 <= taps <= 7:
            why.append(f"the conv must be 2 to 8 wide, not {taps + 1}")
    return why


def _by(backend: str, unsupported) -> Backend:
    return Backend(partial(reference.frame_blocks, backend), None, lambda residual, *_: unsupported(residual))


register(
    "frame_blocks",
    {
        "triton": Backend(lazy("endomamba.ops.frame_blocks", "triton_fwd", "frame_blocks"), None, _by_kernels),
        "cuda": Backend(cuda.frame_blocks, None, cuda.unsupported, cuda.faster),
        "cpu": _by("cpu", _native.unsupported),
        "reference": _by("reference", lambda _: []),
    },
)


@torch.library.custom_op("endomamba::frame_blocks", mutates_args=("residual", "conv_state", "ssm_state"))
def frame_blocks_op(
    residual: Tensor,
    weights: Sequence[Tensor],
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    eps: float,
    backend: str,
) -> None:
    run = choose("frame_blocks", backend, residual, weights, phase="forward").fwd
    run(
        residual, [tuple(weights[i : i + WEIGHTS]) for i in range(0, len(weights), WEIGHTS)], conv_state, ssm_state, eps
    )


@frame_blocks_op.register_fake
def _(residual, weights, conv_state, ssm_state, eps, backend):
    return None


@register_flop_formula(torch.ops.endomamba.frame_blocks)
def _(residual_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    """Of every block both projections and the mixer between them."""
    b, l, c = residual_shape
    total = 0
    for i in range(0, len(weight_shapes), WEIGHTS):
        _, conv, _, x_proj, dt_proj, _, A, D, _ = weight_shapes[i : i + WEIGHTS]
        d = A[1]
        sides = [(conv[1:], x_proj[1:], dt_proj[1:], A[1:], D[1:])] * A[0]
        total += 2 * b * l * c * 3 * d + mixer_flops((b, l, 2 * d), sides)
    return total
