from .api import frame_settle

__all__ = ["frame_settle"]
