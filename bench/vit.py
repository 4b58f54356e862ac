"""A plain ViT, frame by frame without memory: what a streamed frame costs a model that forgets the video.

Dosovitskiy et al., An Image is Worth 16x16 Words; sizes of DeiT (Touvron et al.): 12 blocks, heads of 64 channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from endomamba.models.attention import Mlp, SelfAttention
from endomamba.models.layers import PatchEmbed


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=1e-6), nn.LayerNorm(channels, eps=1e-6)
        self.attn = SelfAttention(channels, channels // 64, bias=True)
        self.mlp = Mlp(channels, 4 * channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """ViT-Ti/16 with 192 channels, ViT-S/16 with 384, ViT-B/16 with 768."""

    def __init__(self, channels: int, img_size: int, num_classes: int, depth: int = 12):
        super().__init__()
        self.patch_embed = PatchEmbed(3, channels, 16)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (img_size // 16) ** 2, channels))
        self.blocks = nn.Sequential(*(Block(channels) for _ in range(depth)))
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, frame: Tensor) -> Tensor:
        """(b, 3, 1, h, w) -> logits (b, k)."""
        patches = self.patch_embed(frame)[:, 0]
        x = torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])
