"""What the native.py files share: how a tensor crosses to endomamba._C, and when it cannot."""

from __future__ import annotations

import torch
from torch import Tensor

from ._backend import FP64
from ._extension import MISSING, C

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # enum DType of csrc/cpu/simd.h


def view(tensor: Tensor | None) -> tuple[int, ...] | None:
    """(pointer, strides): the caller holds the tensor until the kernel has returned."""
    return None if tensor is None else (tensor.data_ptr(), *tensor.stride())


def unsupported(x: Tensor, *_: Tensor | None) -> list[str]:
    why = []
    if C is None:
        why.append(MISSING)
    if x.device.type != "cpu":
        why.append(f"the C++ kernels run on the CPU, x is on {x.device}")
    if x.dtype not in DTYPES:
        why.append(FP64 if x.dtype == torch.float64 else f"{x.dtype} is not supported")
    return why
