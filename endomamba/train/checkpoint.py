"""Checkpoints that are whole or not there, whenever the process is killed and however full the disk is.

    DIR/step-00000500.pt            everything a run needs to go on to the bit
    DIR/step-00000500.safetensors   the weights alone, for `endomamba.models.load_checkpoint`

A file is written under the name of a part, synchronised to the disk and renamed; the .pt comes last, so where it lies,
both are complete.  Older ones go when the newest is there.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from .errors import chain

log = logging.getLogger("endomamba")

NAME = re.compile(r"step-(\d{8})\.pt")


class SaveError(OSError):
    """A checkpoint could not be written.  The message is one sentence; those written before are as they were."""


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """SaveError where the disk is full, a limit is reached or the folder is gone; `path` is then as it was before."""
    part = path.with_name(f"{path.name}.part")
    try:
        try:
            with part.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync(path.parent)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        hidden = next((e for e in chain(error) if isinstance(e, OSError | KeyboardInterrupt)), error)
        if not isinstance(hidden, OSError):
            raise hidden from None
        last = latest_path(path.parent)
        kept = f"the last complete checkpoint is {last.name}, " if last else ""
        raise SaveError(
            f"{path}: cannot be written ({hidden.strerror}); {kept}make room and start the command again"
        ) from None


def _sync(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    folder: Path,
    step: int,
    content: dict[str, Any],
    weights: dict[str, Tensor],
    keep: int,
    facts: Mapping[str, str] | None = None,
) -> Path:
    """-> the path of the .pt.  Of all checkpoints in the folder the newest `keep` stay.  facts: for the weights."""
    path = _path(folder, step)
    save_weights(path.with_suffix(".safetensors"), weights, {"step": str(step), **(facts or {})})
    write_atomically(path, lambda file: torch.save(content, file))
    for old in _all(folder)[:-keep]:
        for name in (old, old.with_suffix(".safetensors")):
            name.unlink(missing_ok=True)
    return path


def save_weights(path: Path, weights: dict[str, Tensor], facts: dict[str, str]) -> None:
    """facts: go under one name, as safetensors writes several in an order of the moment."""
    metadata = {"endomamba": json.dumps(facts)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda file: file.write(safetensors_bytes(tensors, metadata)))


def load_latest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; one that cannot be is named in the log.  None where there is none.

    ValueError where there are some and none can be read.
    """
    paths = _all(folder)
    for path in reversed(paths):
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle can raise anything
            log.warning("%s cannot be read (%s: %s)", path, type(error).__name__, str(error).split("\n")[0][:120])
    if paths:
        raise ValueError(f"{folder}: none of its {len(paths)} checkpoints can be read; move them away to start anew")
    return None


def latest_path(folder: Path) -> Path | None:
    return max(_all(folder), default=None)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}.pt"


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if NAME.fullmatch(path.name))
