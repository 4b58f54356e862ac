"""What stays fp32 when a model is cast to bf16 or fp16."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)


class KeepsFp32(nn.Module):
    """Casts to bf16 or fp16 (`to`, `bfloat16`, `half`) pass the parameters named in `fp32_parameters` by.

    They are the vectors that the ops read in fp32 whatever the activations are: decays, dt bias, skip, conv taps, norm
    weights.  In bf16 a step of an optimizer below 1/512 of their value would be lost: A_log starts at up to 2.8, D and
    the norm weights at 1.  What they take is under 1 % of the memory of a model.
    """

    fp32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsFp32:
        parameters = [self.get_parameter(name) for name in self.fp32_parameters]
        kept = {id(t) for p in parameters for t in (p, p.grad) if t is not None}

        def convert(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device, torch.float32) if id(t) in kept and out.dtype in HALVES else out

        return super()._apply(convert, recurse)
