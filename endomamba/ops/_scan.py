"""What the two scan ops share: the chunk layout, the walk over the tokens, and the form their operands take.

Letters: b sequences, l tokens, d channels, n state size, g groups of B and C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_device, check_float, check_shape

CHUNK = 64  # tokens between two saved states; the same number as kChunk in csrc/cpu/scan.h
OPERANDS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")  # of one direction


class Direction(NamedTuple):
    """The operands of one direction: x, dt (b,l,d); A (d,n); B, C (b,l,g,n), or (d,n) where constant."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    reverse: bool


def lanes(t: Tensor | None) -> Tensor | None:
    """Lanes are channels: channels must be neighbours in memory.  Other layouts are copied, which is also faster."""
    return t if t is None or t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def aligned_states(t: Tensor | None) -> Tensor | None:
    """A (d, n) array that lanes read 16 bytes at a time."""
    if t is None:
        return None
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def laid_out(side: Direction) -> Direction:
    """As the kernels of a GPU read it."""
    return side._replace(
        x=lanes(side.x), dt=lanes(side.dt), A=aligned_states(side.A), initial_state=aligned_states(side.initial_state),
        D=None if side.D is None else side.D.contiguous(),
        dt_bias=None if side.dt_bias is None else side.dt_bias.contiguous(),
    )  # fmt: skip


def chunk_states_shape(x: Tensor, A: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """Shape of the saved states: one (d, n) at the start of every chunk of 64 tokens, in walking order.

    Packed, chunk c of sequence s lies at `chunk_slot`; slots that no chunk owns hold anything.
    """
    b, l, d = x.shape
    chunks = (l + CHUNK - 1) // CHUNK if cu_seqlens is None else l // CHUNK + cu_seqlens.shape[0] - 1
    return b, chunks, d, A.shape[1]


def chunk_slot(start: int, sequence: int) -> int:
    """Slot of the first chunk of a packed sequence that starts at token `start`: no two sequences share one."""
    return start // CHUNK + sequence


def token_order(start: int, stop: int, frames: int, reverse: bool) -> list[int]:
    """The tokens of one sequence in walking order.

    >>> token_order(0, 6, frames=2, reverse=False)  # two frames of three tokens, time fastest
    [0, 3, 1, 4, 2, 5]
    """
    order = list(range(start, stop))
    if frames:
        size = (stop - start) // frames
        order = [start + (k % frames) * size + k // frames for k in range(stop - start)]
    return order[::-1] if reverse else order


def empty(x: Tensor, *shape: int, dtype: torch.dtype) -> Tensor:
    """A contiguous output beside x; without a shape the one-dimensional empty tensor that stands for "absent"."""
    return x.new_empty(shape or (0,), dtype=dtype)


def state_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def common_dtype(op: str, x: Tensor, **activations: Tensor | None) -> torch.dtype:
    """The dtype all activations are promoted to."""
    dtype = x.dtype
    for name, tensor in activations.items():
        if tensor is not None and tensor.dtype != dtype:
            check_float(op, name, tensor)
            dtype = torch.promote_types(dtype, tensor.dtype)
    check_float(op, "x", x)
    return dtype


def check_common(op: str, x: Tensor, z: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None) -> None:
    """Checks the operands that both directions share; x itself sets b, l, d and the device."""
    if x.ndim != 3:
        raise ValueError(f"{op}: x must be (b, l, d), got shape {tuple(x.shape)}")
    if z is not None and z.shape != x.shape:
        check_shape(op, "z", z, x.shape, "like x, ")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
        raise ValueError(
            f"{op}: mask must be bool of shape (b, l) = {tuple(x.shape[:2])}, True for a real token, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    check_device(op, x.device, z=z, cu_seqlens=cu_seqlens, mask=mask)


def operands(
    side: str,
    op: str,
    shape: torch.Size,
    num_seqs: int,
    dtype: torch.dtype,
    device: torch.device,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Checks one direction and brings it to the op's form; `side` ends the names in messages ("" or "_b").

    x, dt, B, C in `dtype`; A, D, dt_bias and the state in fp32; B and C (b, l, g, n), or (d, n) where constant.
    """
    d = shape[2]
    if x.shape != shape:
        check_shape(op, f"x{side}", x, shape, "of x, ")
    if dt.shape != shape:
        check_shape(op, f"dt{side}", dt, shape, "of x, ")
    if A.ndim != 2 or A.shape[0] != d or A.shape[1] < 1:
        raise ValueError(f"{op}: A{side} must have shape (d, n) = ({d}, n >= 1), got {tuple(A.shape)}")
    n = A.shape[1]
    B = _grouped(op, f"B{side}", B, shape, n)
    C = _grouped(op, f"C{side}", C, shape, n)
    if B.ndim == 4 and C.ndim == 4 and B.shape[2] != C.shape[2]:
        raise ValueError(f"{op}: B{side} and C{side} must share their groups g, got {B.shape[2]} and {C.shape[2]}")
    if D is not None and D.shape != (d,):
        check_shape(op, f"D{side}", D, (d,), "(d,) = ")
    if dt_bias is not None and dt_bias.shape != (d,):
        check_shape(op, f"dt_bias{side}", dt_bias, (d,), "(d,) = ")
    if initial_state is not None and initial_state.shape != (num_seqs, d, n):
        check_shape(op, f"initial_state{side}", initial_state, (num_seqs, d, n), "(sequences, d, n) = ")
    if x.dtype != dtype or dt.dtype != dtype or B.dtype != dtype or C.dtype != dtype:
        x, dt, B, C = x.to(dtype), dt.to(dtype), B.to(dtype), C.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    A = _full_precision(op, side, "A", A, wide)
    D = _full_precision(op, side, "D", D, wide)
    dt_bias = _full_precision(op, side, "dt_bias", dt_bias, wide)
    initial_state = _full_precision(op, side, "initial_state", initial_state, wide)
    checked = (x, dt, A, B, C, D, dt_bias, initial_state)
    for i, tensor in enumerate(checked):
        if tensor is not None and tensor.device != device:
            check_device(op, device, **{OPERANDS[i] + side: tensor})
    return checked


def _full_precision(op: str, side: str, name: str, tensor: Tensor | None, wide: torch.dtype) -> Tensor | None:
    if tensor is None or tensor.dtype == wide:
        return tensor
    check_float(op, name + side, tensor)
    return tensor.to(wide)


def _grouped(op: str, name: str, B: Tensor, shape: torch.Size, n: int) -> Tensor:
    b, l, d = shape
    if B.ndim == 3 and B.shape == (b, l, n):
        return B.unsqueeze(2)
    if B.ndim == 4 and B.shape[:2] == shape[:2] and B.shape[3] == n and B.shape[2] >= 1 and d % B.shape[2] == 0:
        return B
    if B.ndim == 2 and B.shape == (d, n):
        return B
    raise ValueError(
        f"{op}: {name} must have shape (b, l, n) = ({b}, {l}, {n}), (b, l, g, n) with g dividing d = {d}, "
        f"or, constant, (d, n) = ({d}, {n}), got {tuple(B.shape)}"
    )


def output_dtype(op: str, x: Tensor, out_dtype: torch.dtype | None) -> torch.dtype:
    if out_dtype is None or out_dtype == x.dtype:
        return x.dtype
    if out_dtype != torch.float32:
        raise ValueError(f"{op}: out_dtype must be None (the dtype of x) or torch.float32, got {out_dtype}")
    return out_dtype


def effective_plan(plan: str) -> str:
    return "invariant" if torch.are_deterministic_algorithms_enabled() else plan
