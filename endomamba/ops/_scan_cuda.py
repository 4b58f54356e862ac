"""The CUDA C++ scan of one or two directions, as both scan ops call it: what it takes, where it is the faster one, and
which of its kernels runs.

Letters: b sequences, l tokens, d channels, n state size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _cuda
from . import _cuda_table as table
from ._scan import Direction, aligned_states, laid_out, lanes
from ._scan_native import backward_arguments, forward_arguments
from ._triton import on_device

# One frame or a few: time across the lanes of a block, where the other kernel's warps (16 channels of a sequence and
# direction each) would leave most of the GPU idle.  Not under plan="invariant", whose choice may not look at the number
# of sequences.
FRAME = {"least": 17, "warps": 4}  # tokens; at most so many warps of the other kernel a multiprocessor

BACK_BLOCKS = 6  # of the backward, that a multiprocessor holds: csrc/cuda/scan_back.cu


def unsupported_scan(
    x: Tensor, dt=None, A=None, B=None, C=None, D=None, z=None, dt_bias=None, initial_state=None,
    cu_seqlens=None, mask=None,
) -> list[str]:  # fmt: skip
    """selective_scan's tensors, as many as the caller has."""
    return _cuda.unsupported(x) + unsupported_operands(A, B, C) + _packing(cu_seqlens, mask)


def unsupported_both(
    x: Tensor, dt=None, A=None, B=None, C=None, x_b=None, dt_b=None, A_b=None, B_b=None, C_b=None, D=None, D_b=None,
    z=None, dt_bias=None, dt_bias_b=None, initial_state=None, initial_state_b=None, cu_seqlens=None, mask=None,
) -> list[str]:  # fmt: skip
    """bidirectional_scan's tensors, as many as the caller has."""
    both = unsupported_operands(A, B, C) + unsupported_operands(None, B_b, C_b, "_b")
    return _cuda.unsupported(x) + both + _packing(cu_seqlens, mask)


def faster(phase: str, *tensors: Tensor | None) -> bool:
    """Whether selective_scan's tensors can run here and were measured faster; see `_cuda_table`."""
    return _measured(f"causal {phase}", tensors[0]) and not unsupported_scan(*tensors) and _cuda.usable()


def faster_both(phase: str, *tensors: Tensor | None) -> bool:
    return _measured(f"both ways {phase}", tensors[0]) and not unsupported_both(*tensors) and _cuda.usable()


def _measured(case: str, x: Tensor) -> bool:
    if not _cuda.on_gpu(x) or x.dtype != torch.bfloat16 or x.ndim != 3 or x.shape[2] != table.SCAN_CHANNELS:
        return False
    return table.faster("scans", case, x.shape[0], x.shape[1], _cuda.chip(x.device))


def unsupported_operands(A: Tensor | None, B: Tensor | None, C: Tensor | None, side: str = "") -> list[str]:
    why = []
    if A is not None and A.shape[1] != _cuda.STATES:
        why.append(f"n={A.shape[1]}, the kernels have n={_cuda.STATES}")
    for name, t in (("B" + side, B), ("C" + side, C)):
        if t is not None and t.ndim == 2:
            why.append(f"{name} is constant over tokens")
        elif t is not None and t.shape[2] != 1:
            why.append(f"{name} has {t.shape[2]} groups, the kernels take one")
    return why


def _packing(cu_seqlens: Tensor | None, mask: Tensor | None) -> list[str]:
    given = {"cu_seqlens": cu_seqlens, "mask": mask}
    return [f"{name} is not supported" for name, t in given.items() if t is not None]


def _as_frame(cuda, x: Tensor, directions: int, frames: int, save_states: bool, plan: str) -> bool:
    """`scan_frame` runs, not `scan_walk`."""
    b, l, d = x.shape
    if plan == "invariant" or frames or save_states or not FRAME["least"] <= l <= cuda.frame_tokens():
        return False
    many = _cuda.processors(x.device)
    if b * ((d + 15) // 16) * directions > FRAME["warps"] * many:
        return False
    return cuda.frame_bytes(b, l, d, directions, many) <= _cuda.shared_memory(x.device)


def scan_fwd(
    sides: tuple[Direction, ...],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    *,
    max_seqlen: int,
    plan: str,
    **options: bool | int | float,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """-> y, final state of each side, chunk states of each side; options as in `_scan_native.forward_arguments`."""
    sides, z = tuple(laid_out(side) for side in sides), lanes(z)
    cuda = _cuda.load()
    args, y, finals, chunks = forward_arguments(cuda, sides, z, cu_seqlens, mask, **options)
    x = sides[0].x
    if x.numel() == 0:
        for side, final in zip(sides, finals, strict=True):
            final.copy_(side.initial_state) if side.initial_state is not None and final.numel() else final.zero_()
        return y, finals, chunks
    frame = _as_frame(cuda, x, len(sides), options["frames"], options["save_states"], plan)
    with on_device(x):
        queue = _cuda.stream(x.device)
        if frame:
            cuda.scan_frame(args, _cuda.processors(x.device), queue)
        else:
            park = None
            if len(sides) == 2 and not cuda.walk_shared(x.shape[1]):
                park = y if y.dtype == torch.float32 else torch.empty(x.shape, dtype=torch.float32, device=x.device)
            cuda.scan_walk(args, 0 if park is None else park.data_ptr(), queue)
    return y, finals, chunks


def _workers(x: Tensor, blocks: int, plan: str) -> int:
    """How many blocks of the backward share the sequences: as many as fill the GPU, each the same number of them."""
    b = x.shape[0]
    if plan == "invariant":
        return b
    rounds = -(-b * blocks // (BACK_BLOCKS * max(_cuda.processors(x.device), 1)))
    return -(-b // rounds)


def scan_bwd(
    dy: Tensor | None,
    dfinal_states: tuple[Tensor | None, ...],
    sides: tuple[Direction, ...],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_states: tuple[Tensor, ...],
    *,
    scale: float,
    dt_softplus: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """As `_scan_native.scan_bwd`.  Two directions are two launches, the first one's y waits in fp32."""
    x = sides[0].x
    b, l, d = x.shape
    sides, z = tuple(laid_out(side) for side in sides), lanes(z)
    dy = torch.zeros_like(x) if dy is None else lanes(dy)
    dfinal_states = tuple(aligned_states(t) for t in dfinal_states)
    cuda = _cuda.load()
    args, dz, grads = backward_arguments(
        cuda, dy, dfinal_states, sides, z, cu_seqlens, mask, chunk_states,
        scale=scale, dt_softplus=dt_softplus, frames=frames, dz=dz, y=y,
    )  # fmt: skip
    if x.numel() == 0:
        for side, dfinal, grad in zip(sides, dfinal_states, grads, strict=True):
            for t in grad:
                t.zero_()
            if side.initial_state is not None and dfinal is not None:
                grad[7].copy_(dfinal)
        return dz, grads
    workers = _workers(x, cuda.scan_back_sizes(b, l, d, 1)[0], plan)
    scratch, sums, parts = (x.new_empty(n, dtype=torch.float32) for n in cuda.scan_back_sizes(b, l, d, workers)[1:])
    park = x.new_empty(x.shape, dtype=torch.float32) if len(sides) == 2 and z is not None else None
    with on_device(x):
        for i, (side, grad) in enumerate(zip(sides, grads, strict=True)):
            cuda.scan_back(
                args, i, scratch.data_ptr(), sums.data_ptr(), parts.data_ptr(), 0 if park is None else park.data_ptr(),
                i == 0, workers, _cuda.stream(x.device),
            )  # fmt: skip
            total = parts.view(workers, -1).sum(0)
            grad[2].copy_(total[: d * _cuda.STATES].view(d, _cuda.STATES))
            if side.D is not None:
                grad[5].copy_(total[d * _cuda.STATES : d * _cuda.STATES + d])
            if side.dt_bias is not None:
                grad[6].copy_(total[d * _cuda.STATES + d : d * _cuda.STATES + 2 * d])
    return dz, grads
