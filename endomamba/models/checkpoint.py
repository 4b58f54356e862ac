"""Loading weights: every container of the published code and safetensors; strict, and never silently nothing.

Containers (reference code, Apache-2.0, github.com/TianCuteQY/EndoMamba): pre-training {'model': {'encoder.*', decoder}},
phase {'model': ...}, classification {'backbone_state_dict': {'module.*'}}, segmentation and others: a bare state dict.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from .layers import resize_positions

WRAPPERS = ("backbone_state_dict", "model", "state_dict", "module")
# Parts of a pre-training or segmentation file that an encoder has no use for.
DISCARDED = ("decoder.", "encoder_to_decoder.", "mask_token", "segmentation_head.", "clip_decoder.", "clip_projector.")


class CheckpointError(ValueError):
    """A file that cannot be loaded: one sentence, the model is as it was."""


@dataclass(frozen=True)
class LoadReport:
    """What happened to every key."""

    path: str
    loaded: int
    remapped: dict[str, str] = field(default_factory=dict)  # key in the file -> key in the model, or what was done
    missing: list[str] = field(default_factory=list)  # in the model, kept as they were
    unexpected: list[str] = field(default_factory=list)  # in the file, not used

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.loaded} tensors loaded"]
        for name in ("remapped", "missing", "unexpected"):
            keys = list(getattr(self, name))
            if keys:
                shown = ", ".join(keys[:4]) + (f", ... ({len(keys)} in all)" if len(keys) > 4 else "")
                lines.append(f"  {name}: {shown}")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module, path: str | Path, *, drop_head: bool = False, map_pos_embed: bool = False
) -> LoadReport:
    """Loads published or own weights into an EndoMamba and tells what it did with each key.

    Every key must fit, in both directions, except where the file is known to be of another stage: a pre-training file
    has no class token and no head, and its decoder is not used.  Its positions of (1, patches, c) are discarded, as the
    published loader does; map_pos_embed=True puts them on the patches instead (class token row zero).  Positions of
    another image size are interpolated.  drop_head=True leaves the model's own head, for another set of classes.

    Pickles are read with weights_only=True; argparse.Namespace and NumPy scalars are the only other types allowed.
    Raises CheckpointError (a ValueError) and changes nothing if the file does not fit.
    """
    source = Path(path)
    state, wrapped = _unwrap(_read(source), source)
    remapped: dict[str, str] = {}
    state, pretrained = _strip(state, remapped)
    unexpected = [key for key in state if key.startswith(DISCARDED)]
    state = {key: value for key, value in state.items() if not key.startswith(DISCARDED)}
    own = model.state_dict()
    allowed_missing: set[str] = set()
    if pretrained:
        allowed_missing |= {key for key in own if key.startswith("head.")} | {"cls_token", "pos_embed"}
    if drop_head:
        unexpected += [key for key in state if key.startswith("head.")]
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        allowed_missing |= {key for key in own if key.startswith("head.")}
    if "pos_embed" in state:
        _fit_positions(model, state, pretrained, map_pos_embed, remapped, unexpected)
    if not set(state) & set(own):
        theirs, ours = next(iter(state), next(iter(unexpected), "none")), next(iter(own))
        raise CheckpointError(
            f"{source}: no key fits this model (the file has {theirs!r}, the model {ours!r}); nothing was loaded"
        )
    wrong = [
        f"{key} is {tuple(value.shape)}, the model has {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    if wrong:
        hint = "; load with drop_head=True to keep the model's own head" if wrong[0].startswith("head.") else ""
        raise CheckpointError(f"{source}: {len(wrong)} tensor(s) have another shape, first {wrong[0]}{hint}")
    missing = [key for key in own if key not in state]
    lacking = [key for key in missing if key not in allowed_missing]
    foreign = [key for key in state if key not in own]
    if lacking or foreign:
        hint = "; drop_head=True ignores the head" if all(key.startswith("head.") for key in lacking + foreign) else ""
        raise CheckpointError(f"{source}: does not fit this model{_list('missing', lacking)}{_list('unexpected', foreign)}{hint}")
    model.load_state_dict(state, strict=False)
    return LoadReport(str(source), len(state), {**wrapped, **remapped}, missing, unexpected)


def _list(what: str, keys: list[str]) -> str:
    if not keys:
        return ""
    return f"; {what} {len(keys)} key(s): {', '.join(keys[:3])}" + (", ..." if len(keys) > 3 else "")


def _read(path: Path) -> object:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a .pth, .pt or .safetensors file")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a complete safetensors file ({error})") from error


def _read_pickle(path: Path) -> object:
    try:
        with _safe_globals():
            return torch.load(str(path), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, AttributeError) as error:
        if "Unsupported" in str(error) or "Weights only" in str(error):
            name = str(error).split("GLOBAL ")[-1].split(" ")[0] if "GLOBAL " in str(error) else "a type that is not allowed"
            raise CheckpointError(f"{path}: holds {name}, which weights-only loading refuses; save its state dict alone") from error
        raise CheckpointError(f"{path}: not a PyTorch checkpoint ({_first_line(error)})") from error
    except (RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: truncated, or not a PyTorch checkpoint ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _safe_globals() -> contextlib.AbstractContextManager:
    scalar = getattr(numpy, "_core", getattr(numpy, "core", None)).multiarray.scalar
    dtypes = [type(numpy.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool", "uint8")]
    return torch.serialization.safe_globals([argparse.Namespace, scalar, numpy.dtype, *dtypes])


def _unwrap(data: object, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict inside a training file."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds a {type(data).__name__}, expected a state dict or a dict that contains one")
    for name in WRAPPERS:
        if isinstance(data.get(name), dict):
            data, told = data[name], {f"[{name!r}]": "the state dict inside"}
            break
    else:
        told = {}
    state = {key: value for key, value in data.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path}: contains no tensors (keys: {', '.join(map(str, list(data)[:4])) or 'none'})")
    return state, told


def _strip(state: dict[str, Tensor], remapped: dict[str, str]) -> tuple[dict[str, Tensor], bool]:
    """Without DDP's `module.` and the pre-training `encoder.`; True if the latter was there."""
    for prefix in ("module.", "encoder."):
        if any(key.startswith(prefix) for key in state):
            out = {}
            for key, value in state.items():
                name = key.removeprefix(prefix)
                if name != key:
                    remapped[key] = name
                if name in out:
                    raise CheckpointError(f"two keys of the file become {name!r} without the prefix {prefix!r}")
                out[name] = value
            state, found = out, prefix
        else:
            found = ""
    return state, found == "encoder."


def _fit_positions(
    model: nn.Module,
    state: dict[str, Tensor],
    pretrained: bool,
    map_pos_embed: bool,
    remapped: dict[str, str],
    unexpected: list[str],
) -> None:
    """Brings the file's positions to the model's grid, in `state`."""
    config, positions = model.config, state["pos_embed"]
    if positions.ndim != 3 or positions.shape[2] != config.embed_dim:
        return  # reported as a wrong shape
    rows, cls = positions.shape[1], int(config.with_cls_token)
    h, w = config.grid
    if rows == h * w + cls:
        return
    has_cls = not pretrained
    side = math.isqrt(rows - has_cls)
    if side * side != rows - has_cls:
        return
    if pretrained and cls:
        if not map_pos_embed:
            unexpected.append("pos_embed")
            remapped.pop("encoder.pos_embed", None)
            del state["pos_embed"]
            return
        positions = torch.cat((torch.zeros_like(positions[:, :1]), positions), dim=1)
        remapped["pos_embed"] = "rows 1.. of pos_embed, row 0 zero"
        has_cls = True
    if has_cls == bool(cls):
        if side * side != h * w:
            remapped["pos_embed"] = f"interpolated from {side} x {side} to {h} x {w} patches"
        state["pos_embed"] = resize_positions(positions, (side, side), (h, w), bool(cls))
