from .api import frame_resize

__all__ = ["frame_resize"]
