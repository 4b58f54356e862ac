"""Registers endomamba::frame_resize.  Integers have no gradient."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._backend import Backend, choose, register
from .._triton import backend as triton_backend
from .._triton import no_device
from . import reference

register(
    "frame_resize",
    {
        "triton": triton_backend("endomamba.ops.frame_resize", "frame_resize", unsupported=no_device),
        "cpu": Backend(reference.interpolated, None, reference.unsupported_by_cpu),  # vectorised by PyTorch
        "reference": Backend(reference.frame_resize, None, lambda *_: []),
    },
)


@torch.library.custom_op("endomamba::frame_resize", mutates_args=())
def frame_resize_op(frames: Tensor, height: int, width: int, backend: str) -> Tensor:
    return choose("frame_resize", backend, frames).fwd(frames, height, width)


@frame_resize_op.register_fake
def _(frames, height, width, backend):
    return frames.new_empty(frames.shape[0], height, width, 3)


@register_flop_formula(torch.ops.endomamba.frame_resize)
def _(*args, **kwargs) -> int:
    return 0  # integers
