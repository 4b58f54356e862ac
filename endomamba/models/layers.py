"""Embedding, positions, DropPath and the two kinds of block.

Letters: b clips, t frames, n tokens of a frame (cls first), c channels, p patch size.  Tokens are (b, t, n, c) from the
embedding to the head; ((b t), n, c) for a spatial block and (b, (t n), c) for a temporal one are views of that memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops import add_rms_norm
from ..ops._backend import named_or_auto
from .config import MambaConfig
from .mixer import BidirectionalMixer, CausalMixer
from .precision import KeepsFp32

NORM_EPS = 1e-5


class PatchEmbed(nn.Module):
    """One vector a patch: a Conv3d whose stride is its kernel, computed as the matrix product it is."""

    def __init__(self, in_channels: int, embed_dim: int, patch_size: int):
        super().__init__()
        kernel = (1, patch_size, patch_size)
        self.proj = nn.Conv3d(
            in_channels, embed_dim, kernel, stride=kernel
        )  # holds the weights in their published shape

    def forward(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> (b, t, patches, c), patches row by row."""
        weight, bias = self.proj.weight, self.proj.bias
        p, dtype = weight.shape[-1], weight.dtype
        if torch.is_autocast_enabled(video.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(video.device.type)
        patches = video.unfold(3, p, p).unfold(4, p, p)  # (b, 3, t, h/p, w/p, p, p)
        # Order and dtype in one copy: a clip is the largest tensor outside of the blocks.
        patches = patches.permute(0, 2, 3, 4, 1, 5, 6).to(dtype, memory_format=torch.contiguous_format)
        return F.linear(patches.flatten(4).flatten(2, 3), weight.flatten(1), bias)


def check_video(who: str, video: Tensor, config: MambaConfig, device: torch.device, pictures: bool = False) -> None:
    """ValueError, in one sentence that begins with `who`, for a video that this config does not take.

    pictures: of uint8, not normalised.
    """
    height, width = config.size
    size = "h, w" if config.dynamic_img_size else f"{height}, {width}"
    expected = f"video must be (b, {config.in_channels}, t, {size}) with t >= 1"
    if video.ndim != 5 or video.shape[1] != config.in_channels or video.shape[2] < 1:
        raise ValueError(f"{who}: {expected}, got {tuple(video.shape)}")
    if not config.dynamic_img_size and video.shape[3:] != (height, width):
        raise ValueError(
            f"{who}: {expected}, got {tuple(video.shape)}; resize the frames, "
            "or create the model with that img_size or with dynamic_img_size=True"
        )
    p = config.patch_size
    if video.shape[3] % p or video.shape[4] % p or 0 in video.shape[3:]:
        raise ValueError(f"{who}: height and width must be multiples of the patch size {p}, got {tuple(video.shape)}")
    if not (video.dtype == torch.uint8 if pictures else video.is_floating_point()):
        kind = "uint8 pictures, as normalisation is given" if pictures else "normalised floating point"
        raise ValueError(f"{who}: video must be {kind}, got {video.dtype}")
    if video.device != device:
        raise ValueError(f"{who}: video is on {video.device}, the model on {device}")


def resize_positions(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Spatial positions (1, extra + old patches, c) for another grid, bicubic; the extra rows (cls) stay."""
    if tuple(old) == tuple(new):
        return pos
    patches = old[0] * old[1]
    extra, grid = pos.split((pos.shape[1] - patches, patches), dim=1)
    image = torch.unflatten(grid.float(), 1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return torch.cat((extra, image.flatten(2).mT.to(pos.dtype)), dim=1)


class RMSNorm(KeepsFp32):
    """residual + row_scale * hidden, and its RMS norm."""

    fp32_parameters = ("weight",)

    def __init__(self, channels: int, backend: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.backend = named_or_auto("add_rms_norm", backend)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, row_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """-> the norm in hidden's dtype, the new residual in fp32, also under autocast."""
        return add_rms_norm(hidden, self.weight, residual, row_scale=row_scale, eps=NORM_EPS, backend=self.backend)


class DropPath(nn.Module):
    """Drops whole rows in training: the factors that the norm applies to what it adds."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, rows: Tensor) -> Tensor | None:
        """rows: (rows, ...) -> (rows,) of 0 or 1 / (1 - rate); None where nothing is dropped."""
        if not self.training or self.rate == 0:
            return None
        keep = 1 - self.rate
        return torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


class SpatialBlock(nn.Module):
    """Each frame on its own, its tokens read both ways."""

    def __init__(self, mixer: BidirectionalMixer, channels: int, drop_path: float, backend: str):
        super().__init__()
        self.norm = RMSNorm(channels, backend)
        self.drop_path = DropPath(drop_path)
        self.mixer = mixer

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """hidden, residual: (b, t, n, c) -> the same; `hidden` is what the next norm adds to the residual."""
        frames = hidden.flatten(0, 1)
        row_scale = self.drop_path(frames)
        if row_scale is None:  # then a row is a row, and views are not free in a small frame
            normed, residual = self.norm(hidden, residual)
            return self.mixer(normed.flatten(0, 1)).view_as(hidden), residual
        residual = None if residual is None else residual.flatten(0, 1)
        normed, residual = self.norm(frames, residual, row_scale)
        return self.mixer(normed).view_as(hidden), residual.view_as(hidden)


class TemporalBlock(nn.Module):
    """The whole clip as one sequence, frame by frame, read forwards; a state carries it on."""

    def __init__(self, mixer: CausalMixer, channels: int, drop_path: float, backend: str):
        super().__init__()
        self.norm = RMSNorm(channels, backend)
        self.drop_path = DropPath(drop_path)
        self.mixer = mixer

    def add_norm(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, residual = self.norm(hidden, residual, self.drop_path(hidden))
        return normed.flatten(1, 2), residual

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        normed, residual = self.add_norm(hidden, residual)
        return self.mixer(normed).view_as(hidden), residual

    def step(
        self, hidden: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`forward` that starts from a state and returns the next one: conv (b, w - 1, d), ssm (b, d, n)."""
        normed, residual = self.add_norm(hidden, residual)
        mixed, conv_state, ssm_state = self.mixer.step(normed, conv_state, ssm_state)
        return mixed.view_as(hidden), residual, conv_state, ssm_state

    def step_(
        self, hidden: Tensor, residual: Tensor | None, conv_state: Tensor, ssm_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`step` in place: the two states are overwritten.  No gradient."""
        normed, residual = self.add_norm(hidden, residual)
        return self.mixer.step_(normed, conv_state, ssm_state).view_as(hidden), residual


def run_block(checkpointing: bool, function: Any, *tensors: Tensor | None) -> Any:
    """function(*tensors), computed again in backward where `checkpointing`."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(function, *tensors, use_reentrant=False)
    return function(*tensors)


def take_tokens(tokens: Tensor, places: Tensor) -> Tensor:
    """tokens: (b or 1, l, c), places: (b, k) int64 -> (b, k, c).  The shape is known without reading a mask."""
    tokens = tokens.expand(places.shape[0], -1, -1)
    return tokens.gather(1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def init_weights(model: nn.Module, config: MambaConfig) -> None:
    """The published order; it leaves every dt at softplus(0) = 0.69, where a state fades within a frame."""
    mixers = [module for module in model.modules() if isinstance(module, (BidirectionalMixer, CausalMixer))]
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(model.get_parameter("pos_embed"), std=0.02)
    for mixer in mixers:
        nn.init.kaiming_uniform_(mixer.out_proj.weight, a=5**0.5)
        with torch.no_grad():
            mixer.out_proj.weight /= config.depth**0.5
    if config.dt_init == "mamba":
        for mixer in mixers:
            mixer.init_dt(config.dt_min, config.dt_max)
