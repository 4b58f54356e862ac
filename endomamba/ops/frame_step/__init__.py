from .api import frame_step

__all__ = ["frame_step"]
