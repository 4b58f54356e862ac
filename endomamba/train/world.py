"""The processes of a run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import TrainError


@dataclass(frozen=True)
class World:
    """The processes of a run as torchrun set them up: this is `rank` of `size`, on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """`value` of every process, in order."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.size > 1:
            dist.all_reduce(tensor, op)
        return tensor


@contextlib.contextmanager
def start_world(device: str = "auto") -> Iterator[World]:
    """One process, or those of torchrun: gloo between CPUs, nccl between GPUs."""
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and local >= torch.cuda.device_count():
        raise TrainError(f"process {local} of this machine needs a GPU of its own, it has {torch.cuda.device_count()}")
    place = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(place)
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    yield World(place, int(os.environ.get("RANK", 0)), size)
    if size > 1:  # not after an error: the others hang in a collective then, and torchrun ends them
        dist.destroy_process_group()
