"""The public frame_embed: the tokens of one frame of each stream, from its picture."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backend import check_backend, direct
from .._checks import FLOATS, check_device, check_float, check_ndim, check_shape
from .op import frame_embed_op


def frame_embed(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    frame: Tensor,
    *,
    cls_token: Tensor | None = None,
    normalisation: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """One frame of each of b streams -> its tokens (b, n, c): cls, where there is one, then the patches row by row.

    A patch becomes  weight . x + bias + position + temporal position;  cls: cls_token + position.

    frames: (b, 3, h, w) normalised floating point; or with `normalisation` uint8 pictures (b, h, w, 3), and
    x * scale + shift is formed here.  h and w are multiples of the patch size p.
    weight: (c, 3, p, p), fastest in torch.channels_last, the order of a picture's bytes  bias, cls_token: (c,)
    positions: (n, c)  frame: (b,) int64, each stream's frame number, see `temporal_positions`
    normalisation: scale and shift, fp32 with 3 values each, as `endomamba.preprocess.normalisation` gives them.

    x is rounded to weight's dtype (under autocast both to the autocast dtype); sums are fp32, and the only rounding
    after that is the last, to out_dtype: a bf16 model that adds bias and positions in bf16 rounds twice more.
    No gradient: inference only.
    """
    op = "frame_embed"
    check_backend(op, backend)
    check_ndim(op, "weight", weight, 4, "(c, channels, p, p)")
    c, channels, p, _ = weight.shape
    check_shape(op, "weight", weight, (c, channels, p, p))
    if c % 2 or p < 1:
        raise ValueError(f"{op}: weight must have an even c and p >= 1, got {tuple(weight.shape)}")
    check_ndim(op, "frames", frames, 4, "(b, channels, h, w) or uint8 (b, h, w, channels)")
    height, width = _picture_size(op, frames, channels, normalisation)
    if height % p or width % p:
        raise ValueError(f"{op}: height and width must be multiples of the patch size {p}, got {(height, width)}")
    n = (cls_token is not None) + (height // p) * (width // p)
    scale, shift = (None, None) if normalisation is None else normalisation
    for name, tensor, shape, meaning in (
        ("bias", bias, (c,), "(c,) = "),
        ("positions", positions, (n, c), "(n, c) = "),
        ("cls_token", cls_token, (c,), "(c,) = "),
    ):
        if tensor is not None:
            check_float(op, name, tensor)
            check_shape(op, name, tensor, shape, meaning)
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.numel() != channels):
            raise ValueError(
                f"{op}: {name} must be float32 with {channels} values, got {tensor.dtype} {tuple(tensor.shape)}"
            )
    check_float(op, "weight", weight)
    check_shape(op, "frame", frame, frames.shape[:1], "(b,) = ")
    if frame.dtype != torch.int64:
        raise ValueError(f"{op}: frame must be int64, got {frame.dtype}")
    if out_dtype not in FLOATS:
        raise ValueError(f"{op}: out_dtype must be floating point, got {out_dtype}")
    check_device(
        op, frames.device, weight=weight, bias=bias, positions=positions, cls_token=cls_token, frame=frame,
        scale=scale, shift=shift,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (frames, weight, bias, positions, cls_token)
    ):
        raise RuntimeError(f"{op}: has no gradient: call it under torch.inference_mode() or torch.no_grad()")
    if torch.is_autocast_enabled(frames.device.type) and weight.dtype != torch.float64:
        weight = weight.to(torch.get_autocast_dtype(frames.device.type))
    return direct(frame_embed_op)(frames, weight, bias, positions, frame, cls_token, scale, shift, out_dtype, backend)


def _picture_size(
    op: str, frames: Tensor, channels: int, normalisation: tuple[Tensor, Tensor] | None
) -> tuple[int, int]:
    """Height and width of frames in the layout that belongs to their dtype."""
    uint8 = frames.dtype == torch.uint8
    expected = f"uint8 (b, h, w, {channels})" if uint8 else f"floating point (b, {channels}, h, w)"
    if frames.shape[3 if uint8 else 1] != channels or not (uint8 or frames.dtype in FLOATS):
        raise ValueError(f"{op}: frames must be {expected}, got {frames.dtype} {tuple(frames.shape)}")
    if uint8 != (normalisation is not None):
        told = "need" if uint8 else "are normalised and take no"
        raise ValueError(f"{op}: {frames.dtype} frames {told} normalisation=(scale, shift)")
    height, width = frames.shape[1:3] if uint8 else frames.shape[2:]
    if min(height, width) < 1:
        raise ValueError(f"{op}: frames must have at least one patch, got {tuple(frames.shape)}")
    return height, width
