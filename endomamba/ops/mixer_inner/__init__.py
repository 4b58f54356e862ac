from .api import mixer_inner

__all__ = ["mixer_inner"]
