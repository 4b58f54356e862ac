"""What turns features (b, t, n, c) into predictions."""

from __future__ import annotations

from torch import Tensor, nn

from .config import EndoMambaConfig


def pool_tokens(features: Tensor, pool: str) -> Tensor:
    """(b, t, n, c) -> (b, t, c): the mean over all tokens (AutoLaparo, 4.3) or the class token (PolypDiag, 4.1)."""
    return features[:, :, 0] if pool == "cls" else features.mean(dim=2)


def make_head(config: EndoMambaConfig) -> nn.Module:
    return nn.Linear(config.embed_dim, config.num_classes) if config.num_classes else nn.Identity()
