"""Weights from every container in which those of EndoMamba, VideoMamba and Endo-FM were published, and safetensors.

    report = load_checkpoint(model, "checkpoint-499.pth")
    print(report)

A checkpoint loads whole or not at all: whatever is wrong with it, the model keeps the weights it had.
Pickles are opened with weights_only=True: they can hold tensors, numbers and an argparse.Namespace, and run no code.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .config import MambaConfig
from .endofm import EndoFM, resize_nearest
from .endomamba import EndoMamba
from .framewise import FrameWise
from .layers import resize_positions
from .pretrain import PretrainEndoMamba
from .videomamba import VideoMamba

# The prefixes that wrappers put before each name.
WRAPPERS = ("module.", "_orig_mod.")
# What stands beside `encoder.` in the published pre-training and segmentation files: no part of this model.
BESIDE_ENCODER = ("mask_token", "encoder_to_decoder.", "encoder_to_teacher.", "decoder.", "segmentation_head.")
# What a pre-trained encoder does not bring: the published rule leaves these as they were initialised.
NOT_PRETRAINED = ("cls_token", "pos_embed", "head.")


class CheckpointError(ValueError):
    """This file cannot be loaded into this model.  The message is one sentence; the model is as it was."""


@dataclass(frozen=True)
class LoadReport:
    """What load_checkpoint did.  Names on the left of a mapping are those in the file."""

    path: str
    container: str  # where in the file the weights were
    loaded: tuple[str, ...]  # parameters of the model that have new values
    remapped: Mapping[str, str] = field(default_factory=dict)  # loaded under another name or in another shape: how
    missing: tuple[str, ...] = ()  # parameters of the model that keep their values
    unexpected: tuple[str, ...] = ()  # names in the file for which the model has no parameter
    skipped: Mapping[str, str] = field(default_factory=dict)  # names in the file that were left out: why

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.container}): {len(self.loaded)} tensors loaded"]
        lines += [f"  remapped    {name}: {how}" for name, how in _shortened(self.remapped).items()]
        lines += [f"  missing     {name}: kept as initialised" for name in _families(self.missing)]
        lines += [f"  unexpected  {name}" for name in _families(self.unexpected)]
        for why in dict.fromkeys(self.skipped.values()):
            names = _families(name for name in self.skipped if self.skipped[name] == why)
            lines += [f"  skipped     {name}: {why}" for name in names]
        return "\n".join(lines)


def load_checkpoint(
    model: EndoMamba | VideoMamba | EndoFM | FrameWise | PretrainEndoMamba,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    map_pos_embed: bool = False,
    drop_head: bool = False,
) -> LoadReport:
    """Loads `path` into a model (EndoMamba, its attention twin, VideoMamba, Endo-FM) and says what went where.

    Files, EndoMamba: pre-training ({'model': ...} or bare, names under `encoder.`), phase ({'model': ...}),
    classification ({'backbone_state_dict': ...}, names under `module.`), segmentation (bare, names under `encoder.`,
    `decoder.` and `segmentation_head.`); a PretrainEndoMamba takes the first of them whole, decoder and all.
    VideoMamba: for clips and for pictures ({'model': ...} or bare).  Endo-FM: pre-training ({'teacher': ...} or bare,
    names under `backbone.`, SVT's too), classification ({'backbone_state_dict': ..., 'state_dict': the head}),
    TimeSformer ({'model_state': ...}, names under `model.`), a ViT for pictures, whose attention and norm1 over a frame
    are taken for time too.  Any: a bare state dict, safetensors.

    strict: every name and shape must match, except that an `encoder.` file may lack cls_token, pos_embed and head, and
        hold decoders, a `backbone.` file may lack a head and hold that of pre-training, a ViT has no time_embed and
        temporal_fc, and a VideoMamba for pictures no positions in time.  False: what does not match is left out and
        reported.
    map_pos_embed: EndoMamba's pre-trained positions have no row for cls, and the published rule discards them.  True
        puts them in rows 1..; row 0 stays as the model has it.  Zeros there would be a cls token of zeros, as none is
        pre-trained: its gate is 0 in every block, so it stays 0, and every norm multiplies its gradient by 300.
    drop_head: leave the model's head as it is, whatever the file has.

    Positions of another image size or number of frames are interpolated (bicubic, linear in time; Endo-FM: nearest),
    as each was published.
    CheckpointError: the file is not loadable, or would load nothing.
    """
    path = os.fspath(path)
    layout = _layout(model)
    if map_pos_embed and layout is not ENDOMAMBA:
        raise ValueError(
            f"load_checkpoint: map_pos_embed is for EndoMamba; positions of {layout.name} have the rows of the model"
        )
    source, container = _unwrap(path, _read(path), layout)
    weights, remapped, skipped, optional = layout.rename(path, source)
    target = model.state_dict()
    _leave_head(weights, remapped, skipped, target)

    if drop_head:
        for name in [name for name in weights if name.startswith("head.")]:
            skipped[name] = "drop_head=True"
            del weights[name]
    _check_head(path, weights, target)
    if isinstance(model, FrameWise):
        pass  # only files of its own, which fit as they are
    elif isinstance(model, EndoFM):
        _fit_tables(model, weights, remapped)
    elif "pos_embed" in weights:
        cls = target["pos_embed"][:, :1] if getattr(model.config, "with_cls_token", True) else None
        _fit_positions(model.config, cls, weights, remapped, skipped, map_pos_embed)
    if isinstance(model, VideoMamba):
        _fit_time(model.config.num_frames, weights, remapped)

    missing = tuple(name for name in target if name not in weights)
    unexpected = tuple(name for name in weights if name not in target)
    shared = [name for name in weights if name in target]
    mismatched = {name: _mismatch(weights[name], target[name]) for name in shared}
    mismatched = {name: why for name, why in mismatched.items() if why}
    loaded = {name: weights[name] for name in shared if name not in mismatched}
    if not any(name.startswith(layout.layers) for name in (shared if strict else loaded)):
        held = ", ".join(_families(source)[:4])
        raise CheckpointError(f"{path}: nothing in it fits this model, it would load nothing (the file holds {held})")
    if strict:
        optional += ("head.",) if drop_head else ()
        _check_size(path, weights, target, layout)
        _check_strict(path, mismatched, [n for n in missing if not n.startswith(optional)], unexpected)
    skipped.update(mismatched)

    model.load_state_dict(loaded, strict=False)
    return LoadReport(
        path=path,
        container=container,
        loaded=tuple(loaded),
        remapped={old: how for old, how in remapped.items() if how.split(" ")[0] in loaded},
        missing=(*missing, *mismatched),
        unexpected=unexpected,
        skipped=skipped,
    )


# ---- from a file to a dict


def _read(path: str) -> Any:
    """The content of a safetensors file or of a pickle of torch.save."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened ({error.strerror})") from None
    if head[8:9] == b"{" and not head.startswith(b"PK"):
        return _read_safetensors(path)
    if not head.startswith((b"PK", b"\x80")):
        why = "is empty" if size == 0 else f"is neither a PyTorch nor a safetensors file (it begins with {head!r})"
        raise CheckpointError(f"{path}: {why}")
    try:
        with _safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise CheckpointError(
                f"{path}: holds a {found[1]} beside its tensors, which is not loaded because it could run code"
            ) from None
        raise CheckpointError(f"{path}: is damaged, or no file of torch.save") from None
    except Exception as error:  # a damaged pickle can raise anything
        first = str(error).split("\n")[0]
        raise CheckpointError(f"{path}: is damaged or truncated ({type(error).__name__}: {first[:120]})") from None


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is a damaged or truncated safetensors file ({error})") from None


@contextlib.contextmanager
def _safe_globals() -> Iterator[None]:
    """Lets training arguments and numpy numbers through weights_only=True for the time of one load."""
    allowed = [argparse.Namespace, np.dtype, *{type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}, *_SCALARS]
    if hasattr(torch.serialization, "safe_globals"):
        with torch.serialization.safe_globals(allowed):
            yield
        return
    before = torch.serialization.get_safe_globals()  # torch 2.4 has only the list of the process
    torch.serialization.add_safe_globals(allowed)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _scalar(dtype: np.dtype, raw: bytes | str) -> np.generic:
    """Stands for numpy's scalar(), under both names that numpy gave it; numbers only, never objects."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw
    return np.frombuffer(raw, dtype=dtype, count=1)[0]


def _named(module: str) -> Any:
    def scalar(dtype: np.dtype, raw: bytes | str) -> np.generic:
        return _scalar(dtype, raw)

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


_SCALARS = (_named("numpy.core.multiarray"), _named("numpy._core.multiarray"))


# ---- from a dict to names of the model


def _unwrap(path: str, content: Any, layout: _Layout) -> tuple[dict[str, Tensor], str]:
    """-> the state dict and where it was."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    found = next((keys for keys in layout.containers if all(isinstance(content.get(k), Mapping) for k in keys)), ())
    if found:
        content = {name: t for key in found for name, t in content[key].items()}
    where = " and ".join(f"['{key}']" for key in found) or "bare"
    weights = {name: t for name, t in content.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if not weights:
        keys = ", ".join(repr(key) for key in list(content)[:5]) or "nothing"
        raise CheckpointError(f"{path}: holds no tensors by name, it would load nothing (the file holds {keys})")
    return weights, where


def _strip_wrappers(source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """-> weights without the prefixes of wrappers, and those prefixes."""
    weights, prefix = dict(source), ""
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in weights):
            weights = {name.removeprefix(wrapper): t for name, t in weights.items()}
            prefix += wrapper
    return weights, prefix


def _of_backbone(source: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    """`_strip_wrappers`, and of a `FrameWise` the backbone alone -> also what is left out: why."""
    weights, prefix = _strip_wrappers(source)
    if not all(name.startswith(("encoder.", "head.")) for name in weights):
        return weights, prefix, {}
    left = {prefix + name: "not part of the backbone" for name in weights if not name.startswith("encoder.")}
    inner = {name.removeprefix("encoder."): t for name, t in weights.items() if name.startswith("encoder.")}
    return inner, f"{prefix}encoder.", left


# Weights by their names in the model; {name in the file: name in the model}; {name in the file: why it is left out};
# beginnings of names that the file need not have.
Renamed = tuple[dict[str, Tensor], dict[str, str], dict[str, str], tuple[str, ...]]


def _rename_endomamba(path: str, source: Mapping[str, Tensor]) -> Renamed:
    """Takes `encoder.` off and puts `head.` before the parts of a head."""
    weights, prefix = _strip_wrappers(source)
    skipped: dict[str, str] = {}
    segments = any(name.startswith("segmentation_head.") for name in weights)  # else a decoder is that of pre-training
    parts = ("vis_head.", "pos_head.", *(("decoder.", "segmentation_head.") if segments else ()))
    pretrained = any(name.startswith("encoder.layers.") for name in weights)
    if pretrained:
        beside = [name for name in weights if name.startswith(BESIDE_ENCODER) and not name.startswith(parts)]
        skipped = dict.fromkeys(beside, "not part of the encoder")
        weights = {name: t for name, t in weights.items() if name not in skipped}
        clash = [name for name in weights if f"encoder.{name}" in weights]
        if clash:
            raise CheckpointError(f"{path}: holds both {clash[0]} and encoder.{clash[0]}")
    renamed = {name: name.removeprefix("encoder.") if pretrained else name for name in weights}
    renamed = {old: f"head.{new}" if new.startswith(parts) else new for old, new in renamed.items()}
    remapped = {prefix + old: new for old, new in renamed.items() if prefix + old != new}
    optional = NOT_PRETRAINED if pretrained else ()
    return {renamed[old]: t for old, t in weights.items()}, remapped, skipped, optional


def _rename_endofm(path: str, source: Mapping[str, Tensor]) -> Renamed:
    """Takes `model.` and `backbone.` off, calls `linear` the head, and makes a ViT for pictures one for clips.

    Beside `backbone.` there is the head of pre-training, which is no part of this model.
    """
    weights, prefix, skipped = _of_backbone(source)
    inner = next((p for p in ("backbone.", "model.") if any(name.startswith(f"{p}blocks.") for name in weights)), "")
    if inner == "backbone.":
        skipped |= {prefix + name: "not part of the backbone" for name in weights if not name.startswith(inner)}
    renamed = {name: name.removeprefix(inner) for name in weights if prefix + name not in skipped}
    renamed = {old: re.sub(r"^linear\.", "head.", new) for old, new in renamed.items()}
    if len(set(renamed.values())) < len(renamed):
        names = list(renamed.values())
        raise CheckpointError(f"{path}: holds {next(name for name in names if names.count(name) > 1)} twice")
    remapped = {prefix + old: new for old, new in renamed.items() if prefix + old != new}
    optional: tuple[str, ...] = ("head.",) if skipped else ()
    result = {new: weights[old] for old, new in renamed.items()}
    if not any("temporal_" in name or name == "time_embed" for name in result):
        for old, new in renamed.items():
            over_time = re.sub(r"^(blocks\.\d+\.)(attn|norm1)\.", r"\1temporal_\2.", new)
            if over_time != new:
                result[over_time] = result[new]
                remapped[prefix + old] = f"{over_time} too"
        blocks = {found[0] for found in (re.match(r"blocks\.\d+\.", name) for name in result) if found}
        optional += ("time_embed", *(f"{block}temporal_fc." for block in blocks))
    return result, remapped, skipped, optional


def _rename_videomamba(path: str, source: Mapping[str, Tensor]) -> Renamed:
    """A file for pictures has a Conv2d where the model has a Conv3d over one frame, and no positions in time."""
    weights, prefix, skipped = _of_backbone(source)
    optional = ("head.",) if skipped else ()
    remapped = {prefix + name: name for name in weights} if prefix else {}
    patches = weights.get("patch_embed.proj.weight")
    if patches is None or patches.ndim != 4:
        return weights, remapped, skipped, optional
    name = "patch_embed.proj.weight"
    remapped[prefix + name] = f"{name} as a kernel over one frame"
    return {**weights, name: patches.unsqueeze(2)}, remapped, skipped, (*optional, "temporal_pos_embedding")


def _rename_nothing(path: str, source: Mapping[str, Tensor]) -> Renamed:
    weights, prefix = _strip_wrappers(source)
    return weights, {prefix + name: name for name in weights} if prefix else {}, {}, ()


@dataclass(frozen=True)
class _Layout:
    """How the files of a kind of model are made."""

    name: str
    containers: tuple[tuple[str, ...], ...]  # keys under which a training script put the weights; the first found
    rename: Callable[[str, Mapping[str, Tensor]], Renamed]
    layers: str
    norm: str  # a vector of embed_dim


ENDOMAMBA = _Layout(
    name="EndoMamba",
    containers=(("model",), ("backbone_state_dict",), ("state_dict",)),
    rename=_rename_endomamba,
    layers="layers.",
    norm="norm_f",
)
VIDEOMAMBA = _Layout(
    name="VideoMamba",
    containers=(("model",), ("module",), ("state_dict",)),
    rename=_rename_videomamba,
    layers="layers.",
    norm="norm_f",
)
PRETRAIN = _Layout(
    name="PretrainEndoMamba",
    containers=(("model",), ("state_dict",)),
    rename=_rename_nothing,
    layers="encoder.layers.",
    norm="encoder.norm_f",
)
ENDOFM = _Layout(
    name="Endo-FM",
    containers=(("teacher",), ("model_state",), ("backbone_state_dict", "state_dict"), *ENDOMAMBA.containers),
    rename=_rename_endofm,
    layers="blocks.",
    norm="norm",
)


LAYOUTS: dict[type[nn.Module], _Layout] = {EndoFM: ENDOFM, VideoMamba: VIDEOMAMBA, PretrainEndoMamba: PRETRAIN}


def _layout(model: nn.Module) -> _Layout:
    if isinstance(model, FrameWise):
        inner = _layout(model.encoder)
        names = {"layers": f"encoder.{inner.layers}", "norm": f"encoder.{inner.norm}"}
        return replace(inner, containers=(), rename=_rename_nothing, **names)
    return next((layout for kind, layout in LAYOUTS.items() if isinstance(model, kind)), ENDOMAMBA)


def _leave_head(
    weights: dict[str, Tensor], remapped: dict[str, str], skipped: dict[str, str], target: Mapping[str, Tensor]
) -> None:
    """Of a published file whose head this model does not have, the encoder loads.  In place."""
    for old, new in list(remapped.items()):
        part = ".".join(new.split(".")[:2]) + "."
        if new == f"head.{old}" and new in weights and not any(name.startswith(part) for name in target):
            skipped[old] = "not part of the encoder"
            del weights[new], remapped[old]


def _fit_tables(model: EndoFM, weights: dict[str, Tensor], remapped: dict[str, str]) -> None:
    """Brings Endo-FM's positions to the model's grid and frames by the published rule, nearest.  In place."""
    config, c = model.config, model.config.embed_dim
    origin = {new: old for old, new in remapped.items()}
    pos, time = weights.get("pos_embed"), weights.get("time_embed")
    if pos is not None and pos.ndim == 3 and pos.shape[::2] == (1, c) and pos.shape[1] > 1:
        side = math.isqrt(pos.shape[1] - 1)
        if pos.shape[1] - 1 == side * side and side * side != math.prod(config.grid):
            places = resize_nearest(pos[:, 1:].unflatten(1, (side, side)), config.grid).flatten(1, 2)
            weights["pos_embed"] = torch.cat((pos[:, :1], places), 1)
            how = f"pos_embed resized from {side}x{side} to {config.grid[0]}x{config.grid[1]} patches"
            remapped[origin.get("pos_embed", "pos_embed")] = how
    if time is not None and time.ndim == 3 and time.shape[::2] == (1, c) and time.shape[1] != config.num_frames:
        weights["time_embed"] = resize_nearest(time, config.num_frames)
        how = f"time_embed resized from {time.shape[1]} to {config.num_frames} frames"
        remapped[origin.get("time_embed", "time_embed")] = how


def _fit_positions(
    config: MambaConfig,
    cls: Tensor | None,
    weights: dict[str, Tensor],
    remapped: dict[str, str],
    skipped: dict[str, str],
    map_pos_embed: bool,
) -> None:
    """Brings weights["pos_embed"] to the model's grid, or takes it out and says why.  cls: the model's own position of
    its cls, (1, 1, c), if it has one.

    The file's grid is the model's where the number of patches is, else a square.  A file without cls_token has
    positions of patches only.
    """
    pos = weights["pos_embed"]
    if pos.ndim != 3 or pos.shape[0] != 1 or pos.shape[2] != config.embed_dim:
        return  # an ordinary mismatch
    name = next((old for old, new in remapped.items() if new == "pos_embed"), "pos_embed")
    has_cls = "cls_token" in weights
    patches = pos.shape[1] - has_cls
    side = math.isqrt(patches)
    grid = config.grid if patches == math.prod(config.grid) else (side, side)
    why = ""
    if patches < 1 or patches != math.prod(grid):
        why = f"{patches} patches are no square grid"
    elif has_cls and cls is None:
        why = "has a row for cls, which this model does not have"
    elif cls is not None and not has_cls and not map_pos_embed:
        why = f"{patches} rows have none for cls; the published rule discards them (map_pos_embed=True keeps them)"
    if why:
        skipped[name] = why
        del weights["pos_embed"]
        return
    done = []
    if grid != config.grid:
        done.append(f"interpolated from {grid[0]}x{grid[1]} to {config.grid[0]}x{config.grid[1]} patches")
    pos = resize_positions(pos, grid, config.grid)
    if cls is not None and not has_cls:
        done.append("put in rows 1.. behind the model's own row 0")
        pos = torch.cat((cls.to(pos), pos), dim=1)
    weights["pos_embed"] = pos
    if done:
        remapped[name] = "pos_embed " + ", ".join(done)


def _fit_time(frames: int, weights: dict[str, Tensor], remapped: dict[str, str]) -> None:
    """Brings VideoMamba's positions in time to another number of frames, linearly, as it is fine-tuned.  In place."""
    name = "temporal_pos_embedding"
    time = weights.get(name)
    if time is None or time.ndim != 3 or time.shape[0] != 1 or time.shape[1] in (0, frames):
        return
    weights[name] = F.interpolate(time.float().mT, size=frames, mode="linear", align_corners=False).mT.to(time.dtype)
    origin = next((old for old, new in remapped.items() if new == name), name)
    remapped[origin] = f"{name} interpolated from {time.shape[1]} to {frames} frames"


# ---- checks, all before the model is touched


def _check_head(path: str, weights: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    if "head.weight" not in weights or weights["head.weight"].ndim != 2:
        return
    classes = weights["head.weight"].shape[0]
    if "head.weight" not in target:
        raise CheckpointError(
            f"{path}: has a head for {classes} classes and this model none: "
            f"create it with num_classes={classes}, or pass drop_head=True"
        )
    if target["head.weight"].shape[0] != classes:
        raise CheckpointError(
            f"{path}: has a head for {classes} classes and this model one for {target['head.weight'].shape[0]}: "
            f"create it with num_classes={classes}, or pass drop_head=True"
        )


def _check_size(path: str, weights: Mapping[str, Tensor], target: Mapping[str, Tensor], layout: _Layout) -> None:
    """Says in two numbers what would otherwise be a list of every layer."""

    def size(names: Mapping[str, Tensor]) -> tuple[int, int]:
        layers = {int(found[1]) for found in (re.match(rf"{layout.layers}(\d+)\.", name) for name in names) if found}
        norm = names.get(f"{layout.norm}.weight")
        width = 0 if norm is None else norm.numel()
        return width, max(layers, default=-1) + 1

    got, expected = size(weights), size(target)
    if got != expected:
        raise CheckpointError(
            f"{path}: does not fit this model: it is for embed_dim {got[0]}, depth {got[1]}, "
            f"the model has {expected[0]}, {expected[1]}"
        )


def _mismatch(got: Tensor, expected: Tensor) -> str:
    if got.shape != expected.shape:
        return f"shape {tuple(got.shape)} in the file, {tuple(expected.shape)} in the model"
    if got.is_floating_point() != expected.is_floating_point():
        return f"{got.dtype} in the file, {expected.dtype} in the model"
    return ""


def _check_strict(path: str, mismatched: Mapping[str, str], missing: list[str], unexpected: tuple[str, ...]) -> None:
    problems = []
    if mismatched:
        name, why = next(iter(mismatched.items()))
        problems.append(f"{name} has {why}" + (f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""))
    for names, what in ((missing, "missing"), (unexpected, "unknown to the model")):
        if names:
            families = _families(names)
            problems.append(f"{what}: {', '.join(families[:4])}" + (" and more" if len(families) > 4 else ""))
    if problems:
        raise CheckpointError(f"{path}: does not fit this model: {'; '.join(problems)}")


def _family(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _families(names: Iterable[str]) -> list[str]:
    """Names with the number of a layer replaced by *, each once: short enough for a sentence.

    >>> _families(["decoder.blocks.0.norm1.weight", "decoder.blocks.1.norm1.weight"])
    ['decoder.blocks.*.norm1.weight (2)']
    """
    counts: dict[str, int] = {}
    for name in names:
        family = _family(name)
        counts[family] = counts.get(family, 0) + 1
    return [name if count == 1 else f"{name} ({count})" for name, count in counts.items()]


def _shortened(remapped: Mapping[str, str]) -> dict[str, str]:
    """One line for all names that lost or got a prefix only, one for what differs in the number of a layer only."""
    prefixes: dict[str, int] = {}
    added: dict[str, int] = {}
    lines = {}
    for old, new in remapped.items():
        if old.endswith(new):
            prefix = old.removesuffix(new)
            prefixes[prefix] = prefixes.get(prefix, 0) + 1
        elif new.endswith(old):
            added[new.removesuffix(old)] = added.get(new.removesuffix(old), 0) + 1
        else:
            lines[_family(old)] = _family(new)
    short = {f"{prefix}*": f"* ({count} names)" for prefix, count in prefixes.items()}
    short |= {f"* to {prefix}*": f"{count} names" for prefix, count in added.items()}
    return short | lines
