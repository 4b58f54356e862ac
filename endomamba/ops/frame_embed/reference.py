"""frame_embed in PyTorch: what runs on a CPU, and what the kernel is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def temporal_positions(frame: Tensor, channels: int) -> Tensor:
    """frame: (...) int64 -> (..., c) fp32, channel 2i sin(frame / 10000^(2i/c)), channel 2i + 1 its cos.

    Computed in fp64, where a published table of 8,192 rows was: equal rows below, and no limit above.
    Not a buffer: `model.bfloat16()` would round it and `to_empty` would lose it.
    """
    angle = frame.double().unsqueeze(-1) / periods(channels, frame.device)
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2).float()


def periods(channels: int, device: torch.device) -> Tensor:
    """(c / 2,) fp64, 10000^(2i/c)."""
    i = torch.arange(channels // 2, dtype=torch.float64, device=device)
    return 10000 ** (2 * i / channels)


def frame_embed(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    frame: Tensor,
    cls_token: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    c, channels, p, _ = weight.shape
    if scale is not None:
        planes = frames.movedim(-1, -3).to(torch.float32)
        frames = torch.addcmul(shift.view(channels, 1, 1), planes, scale.view(channels, 1, 1))
    patches = frames.to(weight.dtype).unfold(2, p, p).unfold(3, p, p)  # (b, channels, h/p, w/p, p, p)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2).to(wide)
    tokens = F.linear(patches, weight.flatten(1).to(wide), bias.to(wide))
    positions = positions.to(wide)
    tokens = tokens + positions[-tokens.shape[1] :] + temporal_positions(frame, c).unsqueeze(1)
    if cls_token is not None:
        cls = cls_token.to(wide) + positions[:1]
        tokens = torch.cat((cls.expand(len(tokens), 1, -1), tokens), dim=1)
    return tokens.to(out_dtype)


def unsupported_by_cpu(x: Tensor, *_: Tensor | None) -> list[str]:
    return [] if x.device.type == "cpu" else [f"it runs on the CPU, x is on {x.device}"]
