"""The public frame_resize: pictures of any size to another, in integers."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import check_backend, direct
from .op import frame_resize_op


def frame_resize(frames: Tensor, size: tuple[int, int], *, backend: str = "auto") -> Tensor:
    """uint8 pictures (b, h, w, 3) in any strides -> uint8 (b, height, width, 3), squashed to size = (height, width).

    torch's antialiased bilinear filter on uint8: integer weights, first along rows, then along columns, rounded to
    uint8 after each.  The same bits from every back end.

    ValueError for another dtype or shape, or a size that is not positive.
    """
    op = "frame_resize"
    check_backend(op, backend)
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"{op}: frames must be uint8 (b, h, w, 3), got {frames.dtype} {tuple(frames.shape)}")
    height, width = size
    if min(height, width, *frames.shape[1:3]) < 1:
        raise ValueError(f"{op}: sizes must be positive, got {tuple(frames.shape[1:3])} to {(height, width)}")
    return direct(frame_resize_op)(frames, height, width, backend)
