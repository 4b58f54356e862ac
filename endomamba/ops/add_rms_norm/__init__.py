from .api import add_layer_norm, add_rms_norm

__all__ = ["add_layer_norm", "add_rms_norm"]
