"""frame_blocks in CUDA C++: all blocks in one cooperative kernel (csrc/cuda/frame_blocks.cu)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _cuda, _cuda_table
from .._triton import on_device

LEAST_TOKENS = 3  # what the conv keeps
WEIGHTS = 9  # tensors of a block
PRODUCTS = (0, 3, 4, 8)  # those of products
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/cuda/frame.h
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def unsupported(residual: Tensor, weights: Sequence[Tensor] = (), *_: object) -> list[str]:
    """Also of a probe that is no residual, (b, l, c): then nothing is said of its tokens."""
    why = _kinds(residual, weights)
    if why or not len(weights):
        return why
    if not _cuda.usable():
        return ["the CUDA extension could not be built, a warning says why"]
    return _limits(residual, weights)


def _kinds(residual: Tensor, weights: Sequence[Tensor]) -> list[str]:
    """What can be said without the extension."""
    why = [_cuda.missing()] if _cuda.missing() else []
    why += _cuda.elsewhere(residual)
    if why or not len(weights):
        return why
    in_proj, conv, A = weights[0], weights[1], weights[6]
    c = in_proj.shape[1]
    products = {weights[i].dtype for i in range(len(weights)) if i % WEIGHTS in PRODUCTS}
    if len(products) > 1:
        why.append(f"all blocks must be of one dtype, they are {', '.join(sorted(map(str, products)))}")
    if any(t.data_ptr() % 16 or not t.is_contiguous() for t in (residual, *weights)):
        why.append("the residual and the weights must be contiguous and begin at a multiple of 16 bytes")
    if in_proj.dtype not in DTYPES:
        why.append(f"weights must be bfloat16 or float32, they are {in_proj.dtype}")
    if A.shape[1:] != (2 * c, _cuda.STATES):
        why.append(
            f"the frame kernel is for 2 c inner channels and 16 states, not {tuple(A.shape[1:])} of {c} channels"
        )
    if conv.shape[2] != 4:
        why.append(f"the conv must be 4 wide, not {conv.shape[2]}")
    return why


def _limits(residual: Tensor, weights: Sequence[Tensor]) -> list[str]:
    cuda, blocks, c, sides = _cuda.load(), len(weights) // WEIGHTS, weights[0].shape[1], weights[6].shape[0]
    dtype = DTYPES[weights[0].dtype]
    most, shared = cuda.frame_most_tokens(dtype, c), cuda.frame_shared(dtype, c, sides)
    if not most:
        return [f"the frame kernel is for 96, 192, 384 or 576 channels, not {c}"]
    why, rank = [], weights[4].shape[2]
    if rank != cuda.frame_rank(c):
        why.append(f"of {c} channels the padded dt rank must be {cuda.frame_rank(c)}, not {rank}")
    if residual.ndim == 3 and not LEAST_TOKENS <= residual.shape[1] <= most:
        why.append(f"a frame must have {LEAST_TOKENS} to {most} tokens, not {residual.shape[1]}")
    if blocks > cuda.FRAME_BLOCKS:
        why.append(f"there can be {cuda.FRAME_BLOCKS} blocks, not {blocks}")
    if _cuda.capability(residual.device) < (8, 0):
        why.append("the frame kernel needs compute capability 8.0")
    elif shared > _cuda.shared_memory(residual.device):
        why.append(f"it needs {shared} bytes of shared memory, this GPU has {_cuda.shared_memory(residual.device)}")
    return why


def faster(_: str, residual: Tensor, weights: Sequence[Tensor] = ()) -> bool:
    """Whether it can run these and was measured faster than Triton's kernels; see `_cuda_table`."""
    if not len(weights) or not _cuda.on_gpu(residual) or weights[0].dtype not in NAMES:
        return False
    (b, l), chip = residual.shape[:2], _cuda.chip(residual.device)
    return _cuda_table.faster("frames", case_of(weights), b, l, chip) and not unsupported(residual, weights)


def case_of(weights: Sequence[Tensor]) -> str:
    """The key of `_cuda_table.RATIO["frames"]`."""
    return frame_name(weights[0].shape[1], weights[6].shape[0], weights[0].dtype)


def frame_name(c: int, sides: int, dtype: torch.dtype) -> str:
    return f"{'both ways' if sides == 2 else 'causal'} {NAMES[dtype]} {c}"


def frame_blocks(
    residual: Tensor,
    blocks: Sequence[tuple[Tensor, ...]],
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    eps: float,
) -> None:
    b, l, c = residual.shape
    cuda, sides, dtype = _cuda.load(), blocks[0][6].shape[0], DTYPES[blocks[0][0].dtype]
    with on_device(residual):
        memory = torch.empty(cuda.frame_memory(dtype, b, l, c, sides), dtype=torch.uint8, device=residual.device)
        memory[:4].zero_()  # the count of the grid's barrier
        addresses = [[t.data_ptr() for t in block] for block in blocks]
        states = [0 if t is None else t.data_ptr() for t in (conv_state, ssm_state)]
        cuda.frame_blocks(
            addresses, dtype, b, l, c, sides, eps, residual.data_ptr(), *states, memory.data_ptr(),
            _cuda.processors(residual.device), _cuda.stream(residual.device),
        )  # fmt: skip
