from .api import bidirectional_conv1d, causal_conv1d

__all__ = ["bidirectional_conv1d", "causal_conv1d"]
