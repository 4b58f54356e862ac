"""Models by name."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

Build = TypeVar("Build", bound=Callable[..., nn.Module])

_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register_model(build: Build) -> Build:
    """Decorator: `create_model(build.__name__, **options)` calls `build(**options)`."""
    name = build.__name__
    if name in _MODELS:
        raise ValueError(f"register_model: there is a model named {name!r} already")
    _MODELS[name] = build
    return build


def list_models(pattern: str = "*") -> list[str]:
    """Names that create_model knows, sorted; `pattern` as in a shell.

    >>> list_models("endomamba_*")
    ['endomamba_middle', 'endomamba_small', 'endomamba_tiny']
    """
    return sorted(name for name in _MODELS if fnmatchcase(name, pattern))


def create_model(name: str, **options: Any) -> nn.Module:
    """A new, randomly initialised model; options are the fields of its config.

    `EndoMambaConfig` for endomamba*, `AttentionTwinConfig` for attention_twin*, `EndoFMConfig` for endofm,
    `VideoMambaConfig` for videomamba*, `PretrainConfig` for pretrain_endomamba*.

    >>> model = create_model("endomamba_tiny", num_classes=7, img_size=(256, 320))
    """
    if name not in _MODELS:
        raise ValueError(f"create_model: no model is named {name!r}; there are {', '.join(list_models())}")
    return _MODELS[name](**options)
