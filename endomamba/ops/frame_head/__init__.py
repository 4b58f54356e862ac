from .api import frame_head

__all__ = ["frame_head"]
