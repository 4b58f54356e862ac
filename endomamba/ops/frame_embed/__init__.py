from .api import frame_embed
from .reference import temporal_positions

__all__ = ["frame_embed", "temporal_positions"]
