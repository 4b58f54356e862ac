"""Registers endomamba::frame_embed: the first kernel of a streamed frame, so it has no backward."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._backend import Backend, choose, plain_dtypes, register
from .._triton import backend as triton_backend
from . import reference

register(
    "frame_embed",
    {
        "triton": triton_backend("endomamba.ops.frame_embed", "frame_embed"),
        "cpu": Backend(reference.frame_embed, None, reference.unsupported_by_cpu),  # a matrix product, PyTorch's
        "reference": Backend(reference.frame_embed, None, lambda *_: []),
    },
)


@torch.library.custom_op("endomamba::frame_embed", mutates_args=())
def frame_embed_op(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    frame: Tensor,
    cls_token: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    run = choose("frame_embed", backend, weight).fwd
    with plain_dtypes(frames.device):
        return run(frames, weight, bias, positions, frame, cls_token, scale, shift, out_dtype)


@frame_embed_op.register_fake
def _(frames, weight, bias, positions, frame, cls_token, scale, shift, out_dtype, backend):
    return positions.new_empty(frames.shape[0], *positions.shape, dtype=out_dtype)


@register_flop_formula(torch.ops.endomamba.frame_embed)
def _(frames, weight, bias, positions, *args, out_shape=None, **kwargs) -> int:
    values = 1  # every channel of a pixel, for every channel of a token: a multiply and an add
    for size in frames:
        values *= size
    return 2 * weight[0] * values
