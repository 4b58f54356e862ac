"""VideoMamba: all tokens of a clip as one sequence, read both ways by every block; the teacher of pre-training.

Source: Li et al., "VideoMamba: State Space Model for Efficient Video Understanding", ECCV 2024, arXiv 2403.06977, code
at github.com/OpenGVLab/VideoMamba (Apache-2.0).  Written anew; names of parameters, order of tokens and places of
DropPath are the published ones.

It answers for whole clips and has no streaming form: its last block reads the last frame first.

Letters: b clips, t frames, n patches of a frame, c channels, k classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._registry import register_model
from .config import MambaConfig, check_int
from .layers import DropPath, PatchEmbed, RMSNorm, SpatialBlock, check_video, init_weights, resize_positions, run_block
from .mixer import BidirectionalMixer


@dataclass(frozen=True)
class VideoMambaConfig(MambaConfig):
    """The defaults are the published small model for 16 frames without a head."""

    num_frames: int = 16  # rows of the learned positions in time; a clip has as many frames

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(type(self).__name__, "num_frames", self.num_frames, 1)


class VideoMamba(nn.Module):
    """`model(video)` answers once for a clip; `patch_tokens(video)` is what a student is aligned with."""

    def __init__(self, config: VideoMambaConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = config.use_checkpoint  # may be switched at any time
        c, backend, (rows, columns) = config.embed_dim, config.backend, config.grid
        sizes = (c, config.inner_dim, config.d_state, config.rank, config.d_conv, backend)
        self.patch_embed = PatchEmbed(config.in_channels, c, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows * columns, c))
        self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, config.num_frames, c))
        self.pos_drop = nn.Dropout(config.drop_rate)
        self.layers = nn.ModuleList(
            SpatialBlock(BidirectionalMixer(*sizes), c, config.drop_path_of(i), backend) for i in range(config.depth)
        )
        self.drop_path = DropPath(config.drop_path_rate)
        self.norm_f = RMSNorm(c, backend)
        self.head = nn.Linear(c, config.num_classes) if config.num_classes else nn.Identity()
        init_weights(self, config)

    def forward(self, video: Tensor) -> Tensor:
        """video: (b, 3, t, h, w), normalised, t = num_frames -> logits (b, k), or the cls token (b, c) with k = 0."""
        return self.head(self.forward_features(video)[:, 0])

    def patch_tokens(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> the normalised tokens of the patches (b, t, n, c).

        The published pre-training meant these; its code asks for cls alone, which does not fit its own mask.
        """
        return torch.unflatten(self.forward_features(video)[:, 1:], 1, (self.config.num_frames, -1))

    def forward_features(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> the normalised tokens (b, 1 + t n, c): cls, then frame by frame the patches of each."""
        check_video("VideoMamba", video, self.config, self.pos_embed.device)
        if video.shape[2] != self.config.num_frames:
            raise ValueError(
                f"VideoMamba: video must have num_frames={self.config.num_frames} frames, got {tuple(video.shape)}; "
                f"create the model with num_frames={video.shape[2]}, load_checkpoint interpolates positions in time"
            )
        hidden, residual = self._embed(video).unsqueeze(1), None  # one "frame" of 1 + t n tokens
        for block in self.layers:
            hidden, residual = run_block(self.gradient_checkpointing, block, hidden, residual)
        features, _ = self.norm_f(hidden, residual, self.drop_path(hidden))
        return features.squeeze(1)

    def _embed(self, video: Tensor) -> Tensor:
        """(b, 3, t, h, w) -> cls and patches, with positions, (b, 1 + t n, c)."""
        p = self.config.patch_size
        positions = resize_positions(self.pos_embed, self.config.grid, (video.shape[3] // p, video.shape[4] // p))
        patches = self.patch_embed(video) + positions[:, 1:] + self.temporal_pos_embedding.unsqueeze(2)
        cls = (self.cls_token + positions[:, :1]).expand(video.shape[0], -1, -1)
        tokens = torch.cat((cls.to(patches.dtype), patches.flatten(1, 2)), dim=1)
        return self.pos_drop(tokens.to(self.pos_embed.dtype))


@register_model
def videomamba(**options: Any) -> VideoMamba:
    """Any size: every field of VideoMambaConfig is an option."""
    return VideoMamba(VideoMambaConfig(**options))


@register_model
def videomamba_tiny(**options: Any) -> VideoMamba:
    """7.0 M parameters; published weights for pictures and for clips."""
    return videomamba(**{"embed_dim": 192, "depth": 24, **options})


@register_model
def videomamba_small(**options: Any) -> VideoMamba:
    """25.4 M parameters; published weights for pictures and for clips; the published teacher."""
    return videomamba(**{"embed_dim": 384, "depth": 24, **options})


@register_model
def videomamba_middle(**options: Any) -> VideoMamba:
    """73.6 M parameters; published weights for pictures and for clips."""
    return videomamba(**{"embed_dim": 576, "depth": 32, **options})
