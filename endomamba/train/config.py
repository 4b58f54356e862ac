"""What every training is configured by, and how a field is changed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from ..models import create_model
from .data import ClipConfig, check_number
from .optim import SCHEDULES

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainConfig:
    """What every training is configured by; a task adds its own fields.  Steps are updates."""

    model: str = "endomamba_small"
    model_options: dict[str, Any] = field(default_factory=dict)
    clip: ClipConfig = field(default_factory=ClipConfig)
    seed: int = 0

    epochs: float = 50
    warmup: float = 0  # epochs
    batch_size: int = 32  # clips or streams an update, over all processes
    accumulate: int = 1  # parts in which each process computes its share
    optimizer: str = "adamw"
    lr: float = 1e-4
    min_lr: float = 0.0
    schedule: str = "cosine"  # or "poly"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)  # "sgd": the first is its momentum
    no_decay: tuple[str, ...] = ("pos_embed", "cls_token", "mask_token", "A_log", "A_b_log")
    layer_decay: float = 1.0
    layer_decay_only: tuple[str, ...] = ()
    clip_norm: float = 0.0  # 0: gradients are not clipped

    precision: str = "bf16"
    deterministic: bool = False  # the same bits on a GPU too, at a price; a CPU gives them anyway
    workers: int = 4
    keep_decoded: float = 0.0  # GiB of decoded videos that each worker keeps in memory
    log_every: int = 10
    save_every: int = 500
    eval_every: int = 0  # 0: at the end
    keep: int = 3  # checkpoints
    max_bad_share: float = 0.05  # clips that may be undecodable, of an epoch

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "log_every", "save_every", "keep"):
            check_number(self, name, int, 1)
        for name in ("workers", "eval_every", "seed"):
            check_number(self, name, int, 0)
        for name in ("epochs", "warmup", "lr", "min_lr", "weight_decay", "clip_norm", "keep_decoded"):
            check_number(self, name, float, 0)
        for name in ("layer_decay", "max_bad_share"):
            check_number(self, name, float, 0, 1)
        choices = {"precision": tuple(PRECISIONS), "optimizer": ("adamw", "sgd"), "schedule": SCHEDULES}
        for name, names in choices.items():
            if getattr(self, name) not in names:
                raise ValueError(f"{type(self).__name__}: {name} must be one of {names}, got {getattr(self, name)!r}")
        for name in ("betas", "no_decay", "layer_decay_only"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.epochs <= 0 or self.warmup > self.epochs:
            raise ValueError(f"{type(self).__name__}: needs 0 < epochs and warmup <= epochs, "
                             f"got {self.epochs} and {self.warmup}")  # fmt: skip

    def autocast(self, device: torch.device) -> torch.autocast:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# What may differ between a run and its continuation.
FREE = ("workers", "keep_decoded", "log_every", "save_every", "eval_every", "keep", "max_bad_share")


def create(name: str, options: dict[str, Any]) -> Any:
    """`create_model` for square frames; ValueError for an option it does not have."""
    try:
        model: Any = create_model(name, **options)
    except TypeError as error:
        raise ValueError(f"model_options: {str(error).partition(' ')[2]}") from None
    height, width = model.config.size
    if height != width:
        raise ValueError(f"training needs square frames, the model's are {height} x {width}")
    return model


def with_changes(config: Any, changes: dict[str, Any]) -> Any:
    """config with fields replaced, "clip.frames" style names too; ValueError for a field it does not have."""
    known = [f.name for f in fields(config)]
    new: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if head not in known:
            raise ValueError(f"{type(config).__name__} has no field {head!r}; it has {', '.join(known)}")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            new[head] = value
    for head, values in inner.items():
        old = new.get(head, getattr(config, head))
        if not isinstance(old, dict | ClipConfig):
            raise ValueError(
                f"{type(config).__name__}: {head} has no fields of its own, got {head}.{next(iter(values))}"
            )
        new[head] = {**old, **values} if isinstance(old, dict) else with_changes(old, values)
    return replace(config, **new)
