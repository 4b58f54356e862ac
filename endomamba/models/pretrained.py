"""Small weights that come with the package: a trained model to look at, without a download.

weights/README.md says what they were trained on and how well they do; so does each file, see `provenance`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from ._registry import create_model
from .checkpoint import load_checkpoint
from .described import described

FOLDER = Path(__file__).resolve().parent.parent / "weights"


def list_pretrained() -> list[str]:
    """Names that `load_pretrained` knows, sorted.

    >>> list_pretrained()
    ['nano-phases']
    """
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def pretrained_path(name: str) -> Path:
    """The file of these weights; ValueError for a name that there is not."""
    if name not in list_pretrained():
        raise ValueError(f"there are no weights {name!r} in the package; there are {', '.join(list_pretrained())}")
    return FOLDER / f"{name}.safetensors"


def load_pretrained(name: str, **options: Any) -> nn.Module:
    """The model with these weights, fp32, in eval mode; options: of `create_model`, to change what the file says.

    `described(pretrained_path(name)).classes` are the names of its classes.
    """
    path = pretrained_path(name)
    found = described(path)
    assert found is not None  # a file of the package
    model = create_model(found.model, **{**found.options, **options})
    load_checkpoint(model, path)  # type: ignore[arg-type]
    return model.eval()


def provenance(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file of the package says of its training: recipe, updates, seed, data, hash of the generator, commit, and
    accuracy on videos that it was not trained on."""
    with safe_open(os.fspath(path), framework="pt") as file:
        facts: dict[str, Any] = json.loads(json.loads(file.metadata()["endomamba"])["trained"])
    return facts
