"""What the optimizer is told: groups of parameters, and how far each step goes.

Layer decay as in BEiT and timm's param_groups_layer_decay: layer i of n learns with rate * decay ** (n + 1 - i).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def layer_of(name: str, depth: int) -> int:
    """0: embeddings and positions.  1 to depth: that block.  depth + 1: what comes after the blocks."""
    found = re.search(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.", name)
    if found and not name.startswith("decoder."):
        return int(found[1]) + 1
    embeddings = ("patch_embed", "pos_embed", "cls_token", "time_embed", "temporal_pos_embedding")
    return 0 if any(part in embeddings for part in name.split(".")) else depth + 1


def param_groups(
    model: nn.Module,
    weight_decay: float,
    no_decay: Sequence[str] = (),
    layer_decay: float = 1.0,
    layer_decay_only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Groups of equal decay and rate, each with its `scale` of the learning rate; frozen parameters are in none.

    Vectors and biases are never decayed, nor are parameters whose last name is in no_decay.
    layer_decay_only: names that layer decay is confined to (the published phase recipe: pos_embed alone).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depth = 0
    for name, _ in named:
        found = re.search(r"(?:^|\.)(?:layers|blocks)\.(\d+)\.", name)
        depth = max(depth, int(found[1]) + 1) if found and not name.startswith("decoder.") else depth
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in named:
        last = name.rpartition(".")[2]
        decay = 0.0 if parameter.ndim <= 1 or last == "bias" or last in no_decay else weight_decay
        scaled = not layer_decay_only or last in layer_decay_only
        scale = layer_decay ** (depth + 1 - layer_of(name, depth)) if scaled else 1.0
        group = groups.setdefault((scale, decay), {"params": [], "scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(kind: str, groups: list[dict[str, Any]], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Fused: the loss scaler then leaves an update out on the device, without asking the host.

    kind: "adamw", or "sgd", whose momentum is betas[0].
    """
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=betas[0], fused=True)


SCHEDULES = ("cosine", "poly")


def rate_at(step: int, steps: int, warmup: int, peak: float, least: float, schedule: str = "cosine") -> float:
    """Learning rate of update `step`: linear from 0 over `warmup` updates, then from peak to least.

    schedule: "cosine", or "poly": along (1 - progress) ** 0.9.
    """
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    if schedule == "poly":
        return least + (peak - least) * max(0.0, 1 - progress) ** 0.9
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
