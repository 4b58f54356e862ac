"""NVTX ranges around the ops, to find them in Nsight Systems and Nsight Compute.

A range is put around the function of a back end, inside the custom op: torch.compile and the dispatcher see nothing of
it.  `mixer_inner` and `frame_step` call conv and scan through the same tables: those are ranges within theirs.
Without ranges the tables hold the plain functions: off costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from ._backend import TABLES, Backend

log = logging.getLogger("endomamba")
VARIABLE = "ENDOMAMBA_NVTX"


def ranged(label: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args, **kwargs):
        torch.cuda.nvtx.range_push(label)
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.nvtx.range_pop()

    return call


def with_ranges(op: str, name: str, backend: Backend) -> Backend:
    """Ranges "endomamba::OP BACKEND" and "endomamba::OP_backward BACKEND"."""
    bwd = None if backend.bwd is None else ranged(f"endomamba::{op}_backward {name}", backend.bwd)
    return replace(backend, fwd=ranged(f"endomamba::{op} {name}", backend.fwd), bwd=bwd)


_plain: dict[str, dict[str, Backend]] = {}  # while ranges are on: the tables as they were


def start() -> None:
    try:
        torch.cuda.nvtx.mark("endomamba")
    except (RuntimeError, AttributeError) as error:
        raise RuntimeError(f"nvtx_ranges: this torch has no NVTX ({error}): it needs a torch built for CUDA") from None
    for op, table in TABLES.items():
        _plain[op] = dict(table)
        table.update({name: with_ranges(op, name, backend) for name, backend in table.items()})


def stop() -> None:
    for op, table in _plain.items():
        TABLES[op].update(table)
    _plain.clear()


@contextlib.contextmanager
def nvtx_ranges() -> Iterator[None]:
    """Every op called inside, by any thread, is an NVTX range named after it and its back end.

    ENDOMAMBA_NVTX=1 at the import does the same for the whole process.  RuntimeError where torch has no NVTX.

    >>> with nvtx_ranges(), torch.inference_mode():
    ...     model(video)
    """
    if _plain:  # already on
        yield
        return
    start()
    try:
        yield
    finally:
        stop()


def start_if_asked() -> None:
    """What the environment variable wants, for the life of the process."""
    asked = os.environ.get(VARIABLE, "0")
    if asked in ("", "0"):
        return
    if asked != "1":
        raise ValueError(f"{VARIABLE} must be 0 or 1, got {asked!r}")
    try:
        start()
    except RuntimeError as error:
        log.warning("%s=1 has no effect: %s", VARIABLE, error)


@contextlib.contextmanager
def nvtx_range(label: str) -> Iterator[None]:
    """A range for something larger than an op; nothing while ranges are off."""
    if not _plain:
        yield
        return
    torch.cuda.nvtx.range_push(label)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()
