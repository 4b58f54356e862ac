"""Selective-scan kernels with gradients and streaming state, and the EndoMamba video models built on them.

`endomamba.ops` holds the operations, `endomamba.models` the networks, `endomamba.stream` the frame-by-frame runner.
Importing this package alone is light; each of those is imported when it is named.
"""

__version__ = "0.1.0"
