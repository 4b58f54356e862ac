"""frame_settle in PyTorch: what runs on a CPU, and what the kernels are compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frame_settle(
    logits: Tensor,
    active: Tensor,
    frame: Tensor,
    frame_before: Tensor,
    a: Tensor,
    a_before: Tensor,
    b: Tensor | None,
    b_before: Tensor | None,
    answer: Tensor,
    not_finite: Tensor,
    elapsed: bool,
) -> None:
    finite = torch.linalg.vector_norm(logits, math.inf, 1) < math.inf  # the largest magnitude keeps NaN
    pairs = [(a, a_before)] if b is None else [(a, a_before), (b, b_before)]
    for after, _ in pairs:
        if after.numel():
            finite &= torch.linalg.vector_norm(after, math.inf, (0, 2)) < math.inf
    taken = active & finite
    for after, before in pairs:
        torch.where(taken.unsqueeze(1), after, before, out=after)
        before.copy_(after)
    torch.where(active if elapsed else taken, frame, frame_before, out=frame)
    frame_before.copy_(frame)
    torch.where(taken.unsqueeze(1), logits, logits.new_full((), math.nan), out=answer)
    not_finite.add_(active > finite)


def unsupported_by_cpu(x: Tensor, *_: Tensor | None) -> list[str]:
    return [] if x.device.type == "cpu" else [f"it runs on the CPU, x is on {x.device}"]
