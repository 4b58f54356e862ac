"""frame_head in PyTorch: what runs on a CPU, and what the kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def frame_head(residual: Tensor, weight: Tensor, bias: Tensor, mean: bool, eps: float, dtype: torch.dtype) -> Tensor:
    wide = torch.float64 if residual.dtype == torch.float64 else torch.float32
    x = (residual if mean else residual[:, :1]).to(wide)
    x = x * torch.rsqrt(x.square().mean(2, keepdim=True) + eps)
    return torch.nn.functional.linear(x.mean(1), weight.to(wide), bias.to(wide)).to(dtype)


def unsupported_by_cpu(x: Tensor, *_: Tensor | None) -> list[str]:
    return [] if x.device.type == "cpu" else [f"it runs on the CPU, x is on {x.device}"]
