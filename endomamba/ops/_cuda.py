"""What the CUDA C++ back ends of all ops ask: is the extension there, what is the GPU like, where to queue."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ._backend import FP64
from ._extension_cuda import load, missing, usable
from ._native import DTYPES

__all__ = [
    "STATES", "capability", "chip", "elsewhere", "load", "missing", "on_gpu", "processors", "shared_memory", "stream",
    "unsupported", "usable",
]  # fmt: skip

STATES = 16  # csrc/cuda/device.cuh: kStates


def unsupported(x: Tensor, *_: Tensor | None) -> list[str]:
    """What holds for every op: the extension, the device, the dtype."""
    why = [missing()] if missing() else []
    why += elsewhere(x)
    if x.dtype not in DTYPES:
        why.append(FP64 if x.dtype == torch.float64 else f"{x.dtype} is not supported")
    return why


def on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda" and torch.version.hip is None


def elsewhere(x: Tensor) -> list[str]:
    return [] if on_gpu(x) else [f"CUDA kernels run on an NVIDIA GPU, x is on {x.device}"]


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def chip(device: torch.device) -> tuple[int, int, int]:
    """Compute capability and multiprocessors: what a table of times is of."""
    return (*capability(device), processors(device))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream
