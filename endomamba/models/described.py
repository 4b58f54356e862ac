"""What a safetensors file of weights says of the model that they belong to, so that nobody has to say it again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import nn

from .attention_twin import AttentionTwin
from .endofm import EndoFM
from .endomamba import EndoMamba
from .videomamba import VideoMamba

NAMES: dict[type[nn.Module], str] = {
    EndoMamba: "endomamba",
    AttentionTwin: "attention_twin",
    EndoFM: "endofm",
    VideoMamba: "videomamba",
}
OF_THE_MACHINE = ("backend", "use_checkpoint")  # options that change nothing of what is computed


class Described(NamedTuple):
    """`create_model(model, **options)` is the model; classes: the names of its labels, where it has any."""

    model: str
    options: dict[str, Any]
    classes: tuple[str, ...]


def describe(model: nn.Module, classes: Sequence[str] = ()) -> dict[str, str]:
    """Goes as JSON under "endomamba" into the metadata of a safetensors file; nothing for a model that `create_model`
    does not make."""
    name = NAMES.get(type(model))
    if name is None:
        return {}
    config: Any = model.config
    options = {key: value for key, value in asdict(config).items() if key not in OF_THE_MACHINE}
    return {"model": name, "options": json.dumps(options), "classes": json.dumps(list(classes))}


def described(path: str | os.PathLike[str]) -> Described | None:
    """What `describe` wrote into this file; None where there is nothing of it."""
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            facts = json.loads((file.metadata() or {})["endomamba"])
        return Described(facts["model"], json.loads(facts["options"]), tuple(json.loads(facts["classes"])))
    except (KeyError, TypeError, ValueError, OSError, SafetensorError):
        return None
