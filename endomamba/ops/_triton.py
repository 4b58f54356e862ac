"""What the Triton back ends share on the Python side.  Triton itself is imported at the first call of a kernel.

The interpreter (TRITON_INTERPRET=1 before the first import) runs the same kernels on CPU tensors: for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ._backend import FP64, Backend

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# PTX in the kernels (ex2.approx, mma) has a plain twin for AMD and for the interpreter.
ASM = not INTERPRET and torch.version.hip is None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)  # the first with bf16 and tf32


@functools.cache
def _machine(device_type: str, index: int | None) -> tuple[str, ...]:
    """What speaks against Triton on this device; it cannot change while the process lives."""
    if importlib.util.find_spec("triton") is None:
        return ("Triton is not installed: pip install triton",)
    if INTERPRET:
        return () if device_type == "cpu" else ("TRITON_INTERPRET=1 runs on CPU tensors",)
    if device_type != "cuda":
        return (f"Triton kernels run on a GPU, x is on {device_type} (TRITON_INTERPRET=1 interprets them, for tests)",)
    if torch.version.hip is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(index)
        if capability < MIN_CAPABILITY:
            return (f"needs compute capability 8.0 or newer, {torch.cuda.get_device_name(index)} has {capability}",)
    return ()


def no_device(x: Tensor, *_: Tensor | None) -> list[str]:
    """`unsupported` of an op that does not read floating point."""
    return list(_machine(x.device.type, x.device.index))


def unsupported(x: Tensor, *_: Tensor | None) -> list[str]:
    why = no_device(x)
    if x.dtype not in DTYPES:
        why.append(FP64 if x.dtype == torch.float64 else f"{x.dtype} is not supported")
    return why


def lazy(package: str, module: str, name: str) -> Callable:
    """The function `name` of `module` in `package`, imported at its first call.

    >>> lazy("endomamba.ops.causal_conv1d", "triton_fwd", "causal_conv1d_fwd")
    """
    function = None

    @functools.wraps(lazy)
    def call(*args, **kwargs):
        nonlocal function
        if function is None:
            function = getattr(importlib.import_module(f"{package}.{module}"), name)
        return function(*args, **kwargs)

    return call


def backend(
    package: str, fwd: str, bwd: str | None = None, unsupported: Callable[..., list[str]] = unsupported
) -> Backend:
    """The row of an op's table: `fwd` in triton_fwd.py, `bwd` in triton_bwd.py of its folder."""
    return Backend(
        lazy(package, "triton_fwd", fwd), None if bwd is None else lazy(package, "triton_bwd", bwd), unsupported
    )


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the device of x; costs nothing where that is the current one."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


class AotCase(NamedTuple):
    """function(*args) on meta tensors: its launches are compiled ahead of time, see tools/triton_resources.py."""

    name: str
    function: Callable
    args: tuple
    slow: bool = False  # not in every test run


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory for `AotCase`."""
    return torch.empty(shape, dtype=dtype, device="meta")
