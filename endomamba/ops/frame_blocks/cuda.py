"""frame_blocks in CUDA C++: all blocks in one cooperative kernel (csrc/cuda/frame_blocks.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _scan_cuda
from .._extension_cuda import load, missing
from .._triton import on_device

CHANNELS = (96, 192, 384, 576)
LEAST_TOKENS = 3  # what the conv keeps


def unsupported(residual: Tensor, weights: Sequence[Tensor] = (), *_: object) -> list[str]:
    why = [missing()] if missing() else []
    why += _scan_cuda._elsewhere(residual)
    if residual.is_cuda and torch.cuda.get_device_capability(residual.device) < (8, 0):
        why.append("the frame kernel needs compute capability 8.0")
    if not len(weights):
        return why
    in_proj, conv, A = weights[0], weights[1], weights[6]
    if in_proj.dtype != torch.bfloat16:
        why.append(f"weights must be bfloat16, they are {in_proj.dtype}")
    if in_proj.shape[1] not in CHANNELS:
        why.append(f"the frame kernel is for {', '.join(map(str, CHANNELS))} channels, not {in_proj.shape[1]}")
    if A.shape[1:] != (2 * in_proj.shape[1], 16):
        why.append(f"the frame kernel is for 2 c inner channels and 16 states, not {tuple(A.shape[1:])}")
    if conv.shape[2] != 4:
        why.append(f"the conv must be 4 wide, not {conv.shape[2]}")
    if not why and residual.ndim == 3:
        most = load().frame_most_tokens(in_proj.shape[1])
        if not LEAST_TOKENS <= residual.shape[1] <= most:
            why.append(f"a frame must have {LEAST_TOKENS} to {most} tokens, not {residual.shape[1]}")
        if len(weights) // 9 > load().FRAME_BLOCKS:
            why.append(f"there can be {load().FRAME_BLOCKS} blocks, not {len(weights) // 9}")
    return why


def frame_blocks(
    residual: Tensor,
    blocks: Sequence[tuple[Tensor, ...]],
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    eps: float,
) -> None:
    b, l, c = residual.shape
    cuda, sides = load(), blocks[0][6].shape[0]
    with on_device(residual):
        memory = torch.empty(cuda.frame_memory(b, l, c, sides), dtype=torch.uint8, device=residual.device)
        memory[:4].zero_()
        addresses = [[t.data_ptr() for t in block] for block in blocks]
        states = [0 if t is None else t.data_ptr() for t in (conv_state, ssm_state)]
        cuda.frame_blocks(
            addresses, b, l, c, sides, eps, residual.data_ptr(), *states, memory.data_ptr(),
            _scan_cuda.processors(residual.device), _scan_cuda.stream(residual.device),
        )  # fmt: skip
