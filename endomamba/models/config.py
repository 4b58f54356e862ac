"""What an EndoMamba is made of: one frozen dataclass that checks itself."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass

HEADS = ("phase", "classification")
DT_INITS = ("published", "mamba")


@dataclass(frozen=True)
class EndoMambaConfig:
    """Sizes and options; the published architecture where nothing is said.

    num_classes 0: no head, the model returns the pooled features.
    head "phase": per-frame logits from the mean over all tokens (pool "mean") or from the class token (pool "cls").
    head "classification": one prediction for a clip, the class token averaged over frames (pool "cls").
    dt_init "published": softplus(dt) starts at 0.69 and a state fades within a frame; "mamba": log-uniform between dt_min
    and dt_max as in Mamba, so that the state reaches far back.
    """

    embed_dim: int = 384
    depth: int = 24
    img_size: int | tuple[int, int] = 224
    patch_size: int = 16
    in_chans: int = 3
    num_classes: int = 0
    head: str = "phase"
    pool: str | None = None  # None: "mean" for phase, "cls" for classification
    num_spatial_layers: int | None = None  # None: the first half
    d_state: int = 16
    d_conv: int = 4
    expand: int = 2
    dt_rank: int | None = None  # None: ceil(embed_dim / 16)
    with_cls_token: bool = True
    drop_rate: float = 0.0
    head_drop_rate: float = 0.0
    drop_path_rate: float = 0.1
    norm_eps: float = 1e-5
    dt_init: str = "published"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    use_checkpoint: bool = False  # recompute each block in backward
    hold_position: bool = False  # temporal position 0 for every frame of a stream, as the published test script does
    plan: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        size = (self.img_size, self.img_size) if isinstance(self.img_size, int) else tuple(self.img_size)
        set_field = object.__setattr__  # a frozen dataclass normalises itself here only
        set_field(self, "img_size", size)
        if self.dt_rank is None:
            set_field(self, "dt_rank", math.ceil(self.embed_dim / 16))
        if self.num_spatial_layers is None:
            set_field(self, "num_spatial_layers", self.depth // 2)
        if self.pool is None:
            set_field(self, "pool", "mean" if self.head == "phase" else "cls")
        for name in ("embed_dim", "depth", "patch_size", "in_chans", "d_state", "d_conv", "expand", "dt_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"EndoMambaConfig: {name} must be at least 1, got {getattr(self, name)}")
        if len(size) != 2 or any(s < self.patch_size or s % self.patch_size for s in size):
            raise ValueError(
                f"EndoMambaConfig: img_size must be multiples of patch_size={self.patch_size} (height, width), got {size}"
            )
        if self.embed_dim % 2:
            raise ValueError(f"EndoMambaConfig: embed_dim must be even (sine and cosine positions), got {self.embed_dim}")
        if not 0 <= self.num_spatial_layers <= self.depth:
            raise ValueError(
                f"EndoMambaConfig: num_spatial_layers must be in 0..depth={self.depth}, got {self.num_spatial_layers}"
            )
        for name, known in (("head", HEADS), ("pool", ("mean", "cls")), ("dt_init", DT_INITS)):
            if getattr(self, name) not in known:
                raise ValueError(f"EndoMambaConfig: {name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.pool == "cls" and not self.with_cls_token:
            raise ValueError("EndoMambaConfig: pool='cls' needs with_cls_token=True")
        for name in ("drop_rate", "head_drop_rate", "drop_path_rate"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"EndoMambaConfig: {name} must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 < self.dt_min <= self.dt_max:
            raise ValueError(f"EndoMambaConfig: needs 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}")
        if self.num_classes < 0:
            raise ValueError(f"EndoMambaConfig: num_classes must be at least 0, got {self.num_classes}")

    @property
    def d_inner(self) -> int:
        return self.expand * self.embed_dim

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (height, width)."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def tokens(self) -> int:
        """Tokens of a frame, the class token included."""
        return self.grid[0] * self.grid[1] + self.with_cls_token

    @property
    def temporal_layers(self) -> int:
        return self.depth - self.num_spatial_layers

    @property
    def taps(self) -> tuple[int, int, int]:
        """Blocks whose mixer output `forward_intermediates` returns: a third, two thirds, the last."""
        return self.depth // 3, 2 * self.depth // 3, self.depth - 1

    def fingerprint(self) -> str:
        """Names the models that can share a stream's state: same sizes, whatever the head, back end or training options."""
        names = ("embed_dim", "depth", "img_size", "patch_size", "num_spatial_layers", "d_state", "d_conv", "expand")
        fields = dataclasses.asdict(self)
        told = json.dumps([[name, fields[name]] for name in (*names, "with_cls_token", "dt_rank", "in_chans")])
        return f"endomamba-d{self.embed_dim}-l{self.depth}-" + hashlib.sha256(told.encode()).hexdigest()[:12]
