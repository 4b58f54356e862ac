"""frame_blocks by the ops it fuses, of any back end: what the kernels are compared with, and what runs on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..frame_step import frame_step
from ..mixer_inner import mixer_inner


def frame_blocks(
    backend: str,
    residual: Tensor,
    blocks: Sequence[Sequence[Tensor]],
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    eps: float,
) -> None:
    for i, (in_proj, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj) in enumerate(blocks):
        normed = residual * torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)  # its weight is in in_proj
        normed = normed.to(in_proj.dtype)
        sides = list(zip(conv, conv_bias, x_proj, dt_proj, dt_bias, A, D))
        if conv_state is None or ssm_state is None:
            both = (*sides[0], *sides[1])
            mixed = mixer_inner(normed, *both, in_proj_weight=in_proj, out_proj_weight=out_proj, backend=backend)[0]
        else:
            xz = torch.nn.functional.linear(normed, in_proj)
            y = frame_step(xz, conv_state[i], ssm_state[i], *sides[0], backend=backend)
            mixed = torch.nn.functional.linear(y, out_proj)
        residual.add_(mixed)
