"""Running statistics of batch norms, which change in the forward pass already and in each process differently.

With an update that is left out they go back; before a checkpoint or an evaluation all processes take their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .world import World


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The buffers themselves, of every batch norm."""
    return [b for module in model.modules() if isinstance(module, _BatchNorm) for b in module.buffers(recurse=False)]


def restore(now: Sequence[Tensor], before: Sequence[Tensor], where: Tensor) -> None:
    """In place, as they were before, where `where`, () bool on the device."""
    for statistic, old in zip(now, before):
        statistic.copy_(torch.where(where, old, statistic))


def share_out(statistics: Sequence[Tensor], world: World) -> None:
    """In place, the mean over all processes."""
    if world.size > 1:
        for statistic in statistics:
            if statistic.is_floating_point():
                world.reduce(statistic)
                statistic /= world.size
