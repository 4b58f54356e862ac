"""From the tokens of every frame to logits.

Letters: b clips, t frames, n tokens of a frame (cls first), c channels, k classes.  Each head is a Linear itself, so
its weights have the published names, head.weight and head.bias.
"""

from __future__ import annotations

from torch import Tensor, nn

from .config import EndoMambaConfig


def pool_tokens(features: Tensor, pool: str) -> Tensor:
    """(b, t, n, c) -> (b, t, c): the mean of a frame's tokens, cls included, or its cls token."""
    return features.mean(2) if pool == "mean" else features[:, :, 0]


class FramePool(nn.Module):
    """No head: the vector that a head would have read."""

    def __init__(self, pool: str):
        super().__init__()
        self.pool = pool

    def forward(self, features: Tensor) -> Tensor:
        """(b, t, n, c) -> (b, t, c)."""
        return pool_tokens(features, self.pool)


class PhaseHead(nn.Linear):
    """Surgical phase: logits of every frame, from the mean of its tokens or from its cls token alone."""

    def __init__(self, channels: int, classes: int, pool: str = "mean"):
        super().__init__(channels, classes)
        self.pool = pool

    def forward(self, features: Tensor) -> Tensor:
        """(b, t, n, c) -> (b, t, k)."""
        return super().forward(pool_tokens(features, self.pool))


class ClassificationHead(PhaseHead):
    """PolypDiag classification: one Linear on the mean of the frames' cls tokens.

    `forward` gives every frame's logits as the other heads do, so a stream has an answer at every frame; their mean
    over the frames is `clip`, as the Linear and the mean commute.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__(channels, classes, pool="cls")

    def clip(self, features: Tensor) -> Tensor:
        """(b, t, n, c) -> (b, k)."""
        return nn.functional.linear(features[:, :, 0].mean(1), self.weight, self.bias)


def build_head(config: EndoMambaConfig) -> nn.Module:
    pool = "mean" if config.head == "mean" else "cls"
    if config.num_classes == 0:
        return FramePool(pool)
    if config.head == "classification":
        return ClassificationHead(config.embed_dim, config.num_classes)
    return PhaseHead(config.embed_dim, config.num_classes, pool)
