"""Small layers: norm weights, patches, positions.  Letters: b batch, t frames, n tokens of a frame, c channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Holds the weight that `add_rms_norm` reads; the block calls the op, which adds the residual too."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps


class PatchEmbed(nn.Module):
    """(b, 3, t, h, w) -> (b, t, patches, c), patches row by row.

    The published layer is a Conv3d with kernel = stride = (1, p, p); its weights are kept in that shape and applied as one
    matrix product, which reads the same numbers without a convolution's set-up.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        size = (1, patch_size, patch_size)
        self.proj = nn.Conv3d(in_chans, dim, kernel_size=size, stride=size)
        self.patch_size = patch_size

    def forward(self, video: Tensor) -> Tensor:
        b, c, t, h, w = video.shape
        p = self.patch_size
        patches = video.view(b, c, t, h // p, p, w // p, p) if video.is_contiguous() else video.reshape(
            b, c, t, h // p, p, w // p, p
        )
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, t, (h // p) * (w // p), c * p * p)
        weight = self.proj.weight
        return F.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


def temporal_position(frame: Tensor, dim: int) -> Tensor:
    """Sinusoid rows for frame indices of any size: (...) int64 -> (..., dim) fp32, sine and cosine interleaved.

    Angles are fp64: in fp32 they are off by 6e-2 at frame one million.  No table, so no last frame.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=frame.device) / dim
    angles = frame.to(torch.float64).unsqueeze(-1) * torch.exp(-math.log(10000.0) * exponent)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(torch.float32)


def resize_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int], with_cls: bool) -> Tensor:
    """Learned positions (1, cls + patches, c) of one grid for another one: bicubic, the class token's row kept."""
    if tuple(old) == tuple(new):
        return pos_embed
    cls, grid = pos_embed[:, :with_cls], pos_embed[:, with_cls:]
    grid = grid.reshape(1, *old, -1).permute(0, 3, 1, 2).float()
    grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=True)
    grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat((cls, grid), dim=1)


def drop_path_scale(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth as a factor for each row of x (rows, n, c): 0 with probability `rate`, else 1 / (1 - rate)."""
    keep = torch.full((x.shape[0],), 1.0 - rate, dtype=torch.float32, device=x.device)
    return torch.bernoulli(keep) / (1.0 - rate)
