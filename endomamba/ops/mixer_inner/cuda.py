"""What the CUDA C++ scan and convolution of a mixer do not take."""

from __future__ import annotations

from torch import Tensor

from .._scan_cuda import unsupported_operands
from ..causal_conv1d import cuda as conv


def unsupported(
    xz: Tensor, A: Tensor | None = None, conv_weight: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> list[str]:
    """As many tensors as the caller has."""
    return conv.unsupported(xz, conv_weight, cu_seqlens) + unsupported_operands(A, None, None)
