"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register_model(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Makes `build` known to `create_model` under its own name."""
    _MODELS[build.__name__] = build
    return build


def list_models(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern, in order."""
    return sorted(name for name in _MODELS if fnmatchcase(name, pattern))


def create_model(name: str, **options) -> nn.Module:
    """Builds a registered model; options are fields of its config, such as num_classes, img_size, head, dt_init.

    >>> create_model("endomamba_small", num_classes=7)
    """
    if name not in _MODELS:
        raise ValueError(f"create_model: unknown model {name!r}; known are {', '.join(list_models())}")
    return _MODELS[name](**options)
