"""What defines a network: a frozen record that refuses what cannot be built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..ops._backend import NAMES

HEADS = ("mean", "cls", "classification", "segmentation", "localisation")
DT_INITS = ("published", "mamba")
BACKENDS = ("auto", *NAMES)


@dataclass(frozen=True)
class MambaConfig:
    """What every network of Mamba blocks over patches has; the defaults are the published small size."""

    img_size: int | tuple[int, int] = 224  # (height, width) once built; an int is a square
    patch_size: int = 16
    in_channels: int = 3
    embed_dim: int = 384
    depth: int = 24
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None  # None: embed_dim / 16, rounded up

    num_classes: int = 0  # 0: no head

    drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    dt_init: str = "published"  # or "mamba": dt log-uniform in [dt_min, dt_max], a state that outlives a frame
    dt_min: float = 1e-3
    dt_max: float = 1e-1

    dynamic_img_size: bool = False  # interpolate the positions for any frame size, instead of refusing it
    use_checkpoint: bool = False  # recompute each block in backward; model.gradient_checkpointing switches it later
    backend: str = "auto"  # of the ops; those without kernels of it, as the norm in "cuda", run as with "auto"

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_frame(who, self)
        for name in ("embed_dim", "depth", "d_state", "d_conv", "expand"):
            check_int(who, name, getattr(self, name), 1)
        check_int(who, "num_classes", self.num_classes, 0)
        if self.dt_rank is not None:
            check_int(who, "dt_rank", self.dt_rank, 1)
        for name in ("drop_rate", "drop_path_rate"):
            check_range(who, name, getattr(self, name), 0, 1)
        for name, names in (("dt_init", DT_INITS), ("backend", BACKENDS)):
            check_one_of(who, name, getattr(self, name), names)
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"{who}: needs 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of a frame in pixels."""
        return (self.img_size, self.img_size) if isinstance(self.img_size, int) else self.img_size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size

    @property
    def inner_dim(self) -> int:
        return self.expand * self.embed_dim

    @property
    def rank(self) -> int:
        return math.ceil(self.embed_dim / 16) if self.dt_rank is None else self.dt_rank

    def drop_path_of(self, i: int) -> float:
        """Block i drops the output of block i - 1, hence nothing in block 0; the published rates."""
        return 0.0 if i == 0 else self.drop_path_rate * (i - 1) / (self.depth - 1)


@dataclass(frozen=True)
class EndoMambaConfig(MambaConfig):
    """The defaults are the published small model without a head: model(video) gives pooled features (b, t, c)."""

    num_spatial_layers: int | None = None  # None: the first half; the rest are temporal
    with_cls_token: bool = True
    # What answers a frame: logits from the "mean" of its tokens, from "cls" or by "classification" (cls, clips too), a
    # mask ("segmentation", num_classes=2), or landmarks ("localisation", num_classes of them).
    head: str = "mean"
    head_width: int = 512  # of the decoder of masks and the MLPs of landmarks
    hold_position: bool = False  # the published phase test: temporal positions start at 0 in every step

    def __post_init__(self) -> None:
        super().__post_init__()
        who = type(self).__name__
        if self.embed_dim % 2:
            raise ValueError(
                f"{who}: embed_dim must be even (temporal positions are sin, cos pairs), got {self.embed_dim}"
            )
        if self.num_spatial_layers is not None:
            check_int(who, "num_spatial_layers", self.num_spatial_layers, 0)
            if self.num_spatial_layers > self.depth:
                raise ValueError(
                    f"{who}: num_spatial_layers must not exceed depth={self.depth}, got {self.num_spatial_layers}"
                )
        check_one_of(who, "head", self.head, HEADS)
        check_int(who, "head_width", self.head_width, 1)
        if not self.with_cls_token and self.head in ("cls", "classification"):
            raise ValueError(f"{who}: head={self.head!r} reads the cls token, which with_cls_token=False removes")
        if self.head == "segmentation" and self.dynamic_img_size:
            raise ValueError(f"{who}: head='segmentation' draws masks of one size, not with dynamic_img_size=True")

    @property
    def spatial_layers(self) -> int:
        return self.depth // 2 if self.num_spatial_layers is None else self.num_spatial_layers

    @property
    def temporal_layers(self) -> int:
        return self.depth - self.spatial_layers

    @property
    def taps(self) -> tuple[int, int, int]:
        """The blocks whose outputs `forward_intermediates` returns."""
        return self.depth // 3, 2 * self.depth // 3, self.depth - 1

    @property
    def fingerprint(self) -> str:
        """Two models that share it can read each other's stream states.  Weights are not part of it."""
        height, width = self.size
        size = "any size" if self.dynamic_img_size else f"{height}x{width}"
        return (
            f"endomamba {size} patch {self.patch_size} dim {self.embed_dim} depth {self.spatial_layers}+"
            f"{self.temporal_layers} state {self.d_state} conv {self.d_conv} expand {self.expand} "
            f"cls {int(self.with_cls_token)}"
        )


def check_int(who: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{who}: {name} must be an integer of at least {least}, got {value!r}")


def check_range(who: str, name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """ValueError unless low <= value < high, or low < value < high where `above`."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    if not low <= number < high or (above and number == low):
        raise ValueError(f"{who}: {name} must be in {'(' if above else '['}{low}, {high}), got {value!r}")


def check_one_of(who: str, name: str, value: object, names: tuple[str, ...]) -> None:
    if value not in names:
        raise ValueError(f"{who}: {name} must be one of {names}, got {value!r}")


def check_frame(who: str, config: Any) -> None:
    """Of any model's config: makes img_size a pair, and refuses frames that are not whole patches."""
    size = config.img_size
    if not isinstance(size, int) and not (isinstance(size, (tuple, list)) and len(size) == 2):
        raise ValueError(f"{who}: img_size must be an int or (height, width), got {size!r}")
    height, width = (size, size) if isinstance(size, int) else size
    for name, value in (("patch_size", config.patch_size), ("in_channels", config.in_channels),
                        ("img_size", height), ("img_size", width)):  # fmt: skip
        check_int(who, name, value, 1)
    if height % config.patch_size or width % config.patch_size:
        raise ValueError(
            f"{who}: img_size must be a multiple of patch_size={config.patch_size}, got {height} x {width}"
        )
    object.__setattr__(config, "img_size", (height, width))
