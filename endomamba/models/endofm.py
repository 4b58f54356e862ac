"""Endo-FM: a video transformer with divided attention, over time and then over each frame; the model to compare with.

Source: Wang et al., "Foundation Model for Endoscopy Video Analysis via Large-scale Self-supervised Pre-train", MICCAI
2023, arXiv 2306.16741, code at github.com/med-air/Endo-FM (Apache-2.0); a TimeSformer (arXiv 2102.05095) ViT-B/16 over
8 frames.  Written anew; names of parameters, order of tokens, nearest resizing of both tables of positions and places
of DropPath are the published ones.

It has no streaming form, and none can be exact: attention over time reads both ways and positions in time count from
the start of the window, so a new frame changes every token of every block.  What a frame keeps is its embedding, before
positions in time; `step` carries those of the last frames and runs all blocks on the whole window again.

Letters: b clips or streams, t frames, n patches of a frame, c channels, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._registry import register_model
from .attention import Mlp, SelfAttention
from .config import check_frame, check_int
from .layers import DropPath, PatchEmbed, check_video
from .state import CarriedState, Rows

NORM_EPS = 1e-6


@dataclass(frozen=True)
class EndoFMConfig:
    """The defaults are the published model without a head."""

    img_size: int | tuple[int, int] = 224  # (height, width) once built; an int is a square
    patch_size: int = 16
    in_channels: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: int = 4
    num_frames: int = 8  # rows of the table of positions in time; frames of the window of a stream

    num_classes: int = 0  # 0: no head, model(video) gives the cls token (b, embed_dim)
    drop_path_rate: float = 0.1
    dynamic_img_size: bool = False  # resize the positions (nearest) for any frame size, instead of refusing it

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_frame(who, self)
        for name in ("embed_dim", "depth", "num_heads", "mlp_ratio", "num_frames"):
            check_int(who, name, getattr(self, name), 1)
        check_int(who, "num_classes", self.num_classes, 0)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"{who}: num_heads must divide embed_dim={self.embed_dim}, got {self.num_heads}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"{who}: drop_path_rate must be in [0, 1), got {self.drop_path_rate}")

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
    def fingerprint(self) -> str:
        """Two models that share it can read each other's stream states.  Weights are not part of it."""
        height, width = self.size
        return f"endofm {height}x{width} patch {self.patch_size} dim {self.embed_dim} window {self.num_frames}"


@dataclass(frozen=True, eq=False)
class WindowState(CarriedState):
    """window: (b, t, n, c), embedded patches of the last num_frames frames, newest last, in the dtype of the weights.

    frame: (b,) int64, frames seen so far; rows may be at different frames.
    """

    TENSORS = ("window", "frame")
    ROWS: ClassVar = {"window": 0, "frame": 0}

    window: Tensor
    frame: Tensor
    model: str

    @torch.no_grad()
    def reset_(self, rows: Rows | None = None) -> WindowState:
        """The streams `rows` (None: all) start anew."""
        index = self._index(rows)
        self.window.index_fill_(0, index, 0)
        self.frame.index_fill_(0, index, 0)
        return self


def resize_nearest(table: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Rows of positions (1, rows..., c) for another number of rows, each the nearest below; one or two dimensions."""
    rows = (size,) if isinstance(size, int) else tuple(size)
    if tuple(table.shape[1:-1]) == rows:
        return table
    return F.interpolate(table.movedim(-1, 1), size=rows, mode="nearest").movedim(1, -1)


class FramePatchEmbed(PatchEmbed):
    """The weights as those of the Conv2d that they were published as."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int):
        nn.Module.__init__(self)
        self.proj = nn.Conv2d(in_channels, embed_dim, patch_size, stride=patch_size)


class DividedBlock(nn.Module):
    """Attention over time at each place, attention over each frame with cls, MLP; a residual around each."""

    def __init__(self, config: EndoFMConfig, drop_path: float):
        super().__init__()
        c, heads = config.embed_dim, config.num_heads
        self.temporal_norm1 = nn.LayerNorm(c, NORM_EPS)
        self.temporal_attn = SelfAttention(c, heads, bias=True)
        self.temporal_fc = nn.Linear(c, c)
        self.norm1 = nn.LayerNorm(c, NORM_EPS)
        self.attn = SelfAttention(c, heads, bias=True)
        self.norm2 = nn.LayerNorm(c, NORM_EPS)
        self.mlp = Mlp(c, config.mlp_ratio * c, bias=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """cls: (b, 1, c), patches: (b, n, t, c) -> the same."""
        b, n, t, c = patches.shape
        places = patches.flatten(0, 1)
        over_time = self._drop(self.temporal_attn(self.temporal_norm1(places)))
        patches = patches + self.temporal_fc(over_time).view(b, n, t, c)  # its bias is added to dropped rows too

        frames = torch.cat((cls.expand(b, t, c).unsqueeze(2), patches.transpose(1, 2)), 2).flatten(0, 1)
        over_frame = torch.unflatten(self._drop(self.attn(self.norm1(frames))), 0, (b, t))
        cls = cls + over_frame[:, :, 0].mean(1, keepdim=True)
        patches = patches + over_frame[:, :, 1:].transpose(1, 2)

        tokens = torch.cat((cls, patches.flatten(1, 2)), 1)
        tokens = tokens + self._drop(self.mlp(self.norm2(tokens)))
        return tokens[:, :1], torch.unflatten(tokens[:, 1:], 1, (n, t))

    def _drop(self, branch: Tensor) -> Tensor:
        factors = self.drop_path(branch)
        return branch if factors is None else branch * factors.view(-1, 1, 1).to(branch.dtype)


class EndoFM(nn.Module):
    """`model(video)` answers once for a clip; `step` for every new frame, from the window that it ends."""

    def __init__(self, config: EndoFMConfig):
        super().__init__()
        self.config = config
        c, (rows, columns) = config.embed_dim, config.grid
        self.patch_embed = FramePatchEmbed(config.in_channels, c, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, c))
        self.time_embed = nn.Parameter(torch.zeros(1, config.num_frames, c))
        rates = [config.drop_path_rate * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(DividedBlock(config, rate) for rate in rates)
        self.norm = nn.LayerNorm(c, NORM_EPS)
        self.head = nn.Linear(c, config.num_classes) if config.num_classes else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        """The published one: with temporal_fc at zero, each frame is at first read by a plain ViT."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for table in (self.pos_embed, self.cls_token):
            nn.init.trunc_normal_(table, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.temporal_fc.weight)

    # ---- a clip at once

    def forward(self, video: Tensor) -> Tensor:
        """video: (b, 3, t, h, w), normalised -> one vector a clip: logits (b, k), or the cls token (b, c) with k = 0.

        Any t; other than num_frames resizes the table of positions in time.
        """
        return self._answer(self._embed(video))

    def forward_features(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> the normalised tokens (b, 1 + n t, c): cls, then place by place the frames of each."""
        cls, patches = self._read(self._embed(video))
        return self.norm(torch.cat((cls, patches.flatten(1, 2)), 1))

    def patch_tokens(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> the normalised tokens of the patches, frame by frame (b, t, n, c), as of a teacher."""
        return torch.unflatten(self.forward_features(video)[:, 1:], 1, (-1, video.shape[2])).transpose(1, 2)

    # ---- a stream, as a sliding window

    def init_state(self, batch_size: int = 1, device: torch.device | str | None = None) -> WindowState:
        """The state of `batch_size` streams before their first frame."""
        if batch_size < 1:
            raise ValueError(f"EndoFM.init_state: batch_size must be at least 1, got {batch_size}")
        device = self.pos_embed.device if device is None else torch.device(device)
        shapes = self._state_shapes(batch_size)
        with torch.inference_mode(False):  # or `step_` could not change it outside of the caller's inference mode
            return WindowState(
                window=torch.zeros(shapes["window"], dtype=self.pos_embed.dtype, device=device),
                frame=torch.zeros(shapes["frame"], dtype=torch.int64, device=device),
                model=self.config.fingerprint,
            )

    def step(self, frames: Tensor, state: WindowState) -> tuple[Tensor, WindowState]:
        """The next t >= 1 frames of each stream, (b, 3, t, h, w) -> (b, t, k or c), and the new state.

        The answer for a frame is that of `forward` to the num_frames frames that end with it, all blocks run anew.
        Before the first frame of a stream the window is that frame repeated, so a frame costs the same from the first
        on.  Functional and differentiable; `state` stays as it was.
        """
        self._check_state(frames, state)
        window, answers = state.window, []
        for i, embedded in enumerate(self._embed(frames).unbind(1)):
            first = (state.frame + i == 0).view(-1, 1, 1, 1)
            newest = embedded.to(window.dtype).unsqueeze(1)
            window = torch.where(first, newest, torch.cat((window[:, 1:], newest), 1))
            answers.append(self._answer(window))
        after = WindowState(window, state.frame + frames.shape[2], state.model)
        return torch.stack(answers, 1), after

    def step_(self, frames: Tensor, state: WindowState) -> Tensor:
        """`step` for inference: returns what it returns and overwrites `state`.

        No host synchronisation, so a CUDA graph can hold it.  RuntimeError where gradients are enabled.
        """
        if torch.is_grad_enabled():
            raise RuntimeError(
                "EndoFM.step_ overwrites its state and has no gradient: call it under torch.inference_mode() or "
                "torch.no_grad(), or use step, which returns the state"
            )
        answers, after = self.step(frames, state)
        state.window.copy_(after.window)
        state.frame.copy_(after.frame)
        return answers

    # ---- shared

    def _embed(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> patches with their places (b, t, n, c): all that a frame has of its own."""
        check_video("EndoFM", video, self.config, self.pos_embed.device)
        p = self.config.patch_size
        places = torch.unflatten(self.pos_embed[:, 1:], 1, self.config.grid)
        places = resize_nearest(places, (video.shape[3] // p, video.shape[4] // p)).flatten(1, 2)
        return self.patch_embed(video) + places

    def _read(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """(b, t, n, c) -> what the last block gives for cls (b, 1, c) and patches (b, n, t, c)."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(embedded.shape[0], -1, -1)
        patches = embedded.transpose(1, 2) + resize_nearest(self.time_embed, embedded.shape[1])
        for block in self.blocks:
            cls, patches = block(cls, patches)
        return cls, patches

    def _answer(self, embedded: Tensor) -> Tensor:
        """(b, t, n, c) -> (b, k or c)."""
        cls, _ = self._read(embedded)
        return self.head(self.norm(cls[:, 0]))

    def _state_shapes(self, b: int) -> dict[str, tuple[int, ...]]:
        rows, columns = self.config.grid
        return {"window": (b, self.config.num_frames, rows * columns, self.config.embed_dim), "frame": (b,)}

    def _check_state(self, frames: Tensor, state: WindowState) -> None:
        if not isinstance(state, WindowState):
            raise ValueError(f"EndoFM: state must be a WindowState (see init_state), got {type(state).__name__}")
        if tuple(frames.shape[3:]) != self.config.size:
            size = "{}, {}".format(*self.config.size)
            raise ValueError(f"EndoFM: the frames of a stream must be (b, 3, t, {size}), got {tuple(frames.shape)}")
        try:
            state.check(
                self.config.fingerprint,
                self._state_shapes(frames.shape[0]),
                self.pos_embed.dtype,
                self.pos_embed.device,
            )
        except ValueError as error:
            raise ValueError(f"EndoFM: {error}") from None


@register_model
def endofm(**options: Any) -> EndoFM:
    """121.3 M parameters, published weights; every field of EndoFMConfig is an option."""
    return EndoFM(EndoFMConfig(**options))
