"""Models: thin, without knowledge of kernels."""

from .checkpoint import CheckpointError, LoadReport, load_checkpoint
from .config import EndoMambaConfig
from .endomamba import EndoMamba, endomamba, endomamba_middle, endomamba_small, endomamba_tiny
from .registry import create_model, list_models, register_model
from .state import StateError, StreamState

__all__ = [
    "CheckpointError",
    "EndoMamba",
    "EndoMambaConfig",
    "LoadReport",
    "StateError",
    "StreamState",
    "create_model",
    "endomamba",
    "endomamba_middle",
    "endomamba_small",
    "endomamba_tiny",
    "list_models",
    "load_checkpoint",
    "register_model",
]
