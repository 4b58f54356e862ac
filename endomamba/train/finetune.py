"""Fine-tuning: a model with a head for one of TASKS, its training and what it starts from.

memory="clip": every clip is read anew, as published.  memory="carried": streams walk through whole videos, window by
window, and the model's state goes with them; gradients flow through the state inside a window, from its last frame to
its first, and stop at its border (truncated back-propagation).  A state is worth carrying only in a model that
remembers: dt_init="mamba", or weights trained so.

probe="linear": the backbone is frozen and the head alone learns.  probe="knn": nothing does, see evaluate.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from ..models import CheckpointError, EndoMamba, FrameWise, StreamState, describe, load_checkpoint
from .config import TrainConfig, create
from .data import Normalise
from .data import check_number as _number
from .errors import DataError
from .evaluate import evaluate, open_split
from .loop import train
from .manifest import Entry, Manifest
from .plan import ClipPlan, Plan, StreamPlan
from .targets import landmark_names
from .tasks import TASKS, Batch
from .world import World

PROBES = ("", "linear", "knn")


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    task: str = "phase"  # of TASKS
    memory: str = "clip"
    chunk: int = 0  # carried: frames that go through the model at a time; 0: the window, clip.frames, at once
    weights: str = ""  # to start from; its head is left out
    map_pos_embed: bool = False  # keep the pre-trained positions, which the published rule discards
    probe: str = ""  # of PROBES
    neighbours: int = 20  # of probe="knn"
    clips_per_entry: int = 1
    label_smoothing: float = 0.0
    position_weight: float = 5.0  # of a landmark's place beside its visibility
    reset: int = 0  # evaluating: frames after which the memory starts anew; 0: never
    relaxed: int = 0  # evaluating phases: frames around a border in which either phase is right; 0: not looked at
    published_relaxed: bool = False  # with the slip of the published code, see relaxed.py
    published_empty: bool = False  # the published Dice of masks without anything in them, see metrics.py

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, names in (("task", tuple(TASKS)), ("memory", ("clip", "carried")), ("probe", PROBES)):
            if getattr(self, name) not in names:
                raise ValueError(f"FinetuneConfig: {name} must be one of {names}, got {getattr(self, name)!r}")
        for name in ("chunk", "reset", "relaxed"):
            _number(self, name, int, 0)
        for name in ("clips_per_entry", "neighbours"):
            _number(self, name, int, 1)
        for name in ("map_pos_embed", "published_relaxed", "published_empty"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"FinetuneConfig: {name} must be True or False, got {getattr(self, name)!r}")
        if "num_classes" in self.model_options:
            raise ValueError("FinetuneConfig: num_classes is that of the manifest, not one of model_options")
        head = self.model_options.get("head", "mean")
        if "head" in self.model_options and (TASKS[self.task].targets or head in ("segmentation", "localisation")):
            raise ValueError(
                f"FinetuneConfig: task={self.task!r} has a head of its own: leave out model_options.head={head!r}"
            )
        _number(self, "label_smoothing", float, 0, 1)
        _number(self, "position_weight", float, 0)
        if self.task == "classification" and (self.memory == "carried" or self.reset):
            raise ValueError("FinetuneConfig: memory='carried' and reset are for tasks by frame; clips carry nothing")
        if self.memory == "clip" and self.chunk:
            raise ValueError("FinetuneConfig: chunk is for memory='carried'")
        if self.memory == "carried" and self.clips_per_entry > 1:
            raise ValueError("FinetuneConfig: clips_per_entry is for memory='clip'; carried streams read all frames")
        if self.memory == "carried" and not self.clip.frames:
            raise ValueError("FinetuneConfig: memory='carried' needs clip.frames >= 1, the frames of a window")
        if self.probe == "knn" and TASKS[self.task].targets:
            raise ValueError(f"FinetuneConfig: probe='knn' is for tasks with labels, task={self.task!r} has none")
        for name, task in (("relaxed", "phase"), ("published_relaxed", "phase"), ("published_empty", "segmentation")):
            if getattr(self, name) and self.task != task:
                raise ValueError(f"FinetuneConfig: {name} is for task={task!r}, got task={self.task!r}")


# ---- steps


def clip_step(model: Any, config: FinetuneConfig, normalise: Normalise, batch: Batch) -> Any:
    """Every clip read anew."""
    return TASKS[config.task].loss(model(normalise(batch["video"])), batch, config)


def carried_step(model: EndoMamba, config: FinetuneConfig, normalise: Normalise, batch: Batch) -> Any:
    """The state enters from the step before and leaves for the next one, without its history."""
    state, answers = forget(batch["carry"], batch["fresh"]), []
    for frames in batch["video"].split(config.chunk or config.clip.frames, dim=2):
        answer, state = model.step(normalise(frames), state)
        answers.append(answer)
    joined = _pytree.tree_map(lambda *parts: torch.cat(parts, 1), *answers)
    return TASKS[config.task].loss(joined, batch, config)._replace(carry=state.detach())


def forget(state: StreamState, rows: Tensor) -> StreamState:
    """`state.reset` for rows known on the device only, (b,) bool: no sync."""
    where = rows.view(1, -1, 1, 1)
    return replace(
        state,
        conv=state.conv.masked_fill(where, 0),
        ssm=state.ssm.masked_fill(where, 0),
        frame=state.frame.masked_fill(rows, 0),
    )


# ---- training


def run(config: FinetuneConfig, manifest: Manifest, out: str | os.PathLike, world: World) -> dict[str, float]:
    """Trains on the split "train", evaluates on "val" where there is one; -> the last evaluation."""
    if config.probe == "knn":
        raise ValueError("probe='knn' has nothing to train: `endomamba eval` takes it, with the weights to look at")
    check_data(config, manifest, "train")
    torch.manual_seed(config.seed)
    model = build(config, manifest, config.weights, head=False).to(world.device)
    dataset = open_split(config, manifest, "train", model.config.size[0])
    judged = any(entry.split == "val" for entry in manifest.entries)
    if judged:
        check_data(config, manifest, "val")
    result: dict[str, float] = {}

    def judged_now() -> dict[str, float]:
        result.update(evaluate(config, model, manifest, "val", world))
        return result

    step: Callable[[Batch], Any] = partial(
        carried_step if config.memory == "carried" else clip_step,
        model,
        config,
        Normalise(config.clip.normalise, world.device),
    )
    train(
        config,
        model,
        step,
        dataset,
        _plan(config, dataset.entries),
        out,
        world,
        evaluate=judged_now if judged else None,
        best=TASKS[config.task].best,
        init_carry=model.init_state if config.memory == "carried" else None,
        facts=describe(model, () if TASKS[config.task].targets else manifest.classes),
    )
    return result


def judge(
    config: FinetuneConfig, manifest: Manifest, weights: str | os.PathLike, split: str, world: World
) -> dict[str, float]:
    """Metrics of weights over a split; with probe="knn" of a backbone's."""
    check_data(config, manifest, split)
    if config.probe == "knn":
        check_data(config, manifest, "train")
    model = build(config, manifest, weights, head=True).to(world.device)
    return evaluate(config, model, manifest, split, world)


def build(config: FinetuneConfig, manifest: Manifest, weights: str | os.PathLike, head: bool) -> Any:
    """The model with a head for what the manifest names; weights: to load, "" for none; head: with theirs.

    With probe="knn" it has no head.  EndoMamba and its twin have their heads themselves; VideoMamba and Endo-FM answer
    clips with theirs, and frames as `FrameWise`.
    """
    kind, classes = TASKS[config.task].head, 0 if config.probe == "knn" else _classes(config, manifest)
    options = dict(config.model_options)
    if config.probe:
        options["drop_path_rate"] = 0.0  # nothing below the head learns, so nothing of it is dropped
    takes_heads = not config.model.startswith(("videomamba", "endofm"))
    if takes_heads:
        model = create(config.model, {"head": kind, **options, "num_classes": classes})
    elif kind == "classification":
        model = create(config.model, {**options, "num_classes": classes})
    else:
        width = {"width": options.pop("head_width")} if "head_width" in options else {}
        model = FrameWise(create(config.model, options), kind, classes, **width)
    if config.reset not in (0, config.clip.frames) and not hasattr(model, "step"):
        raise ValueError(
            f"reset={config.reset} is for models that stream, {config.model} reads windows of "
            f"clip.frames={config.clip.frames}: set reset=0"
        )
    if config.memory == "carried" and not isinstance(_state(model), StreamState):
        raise ValueError(f"memory='carried' needs a state of fixed size (endomamba_*), {config.model} has none")
    if weights:
        if not Path(weights).exists():
            raise CheckpointError(f"{weights}: does not exist")
        keep = head and classes > 0
        inner = model.encoder if isinstance(model, FrameWise) and not keep else model
        options = {"map_pos_embed": config.map_pos_embed} if takes_heads else {}
        load_checkpoint(inner, weights, drop_head=not keep, **options)
    if config.probe == "linear":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("head."))
    return model


def _state(model: nn.Module) -> Any:
    return model.init_state(1) if hasattr(model, "init_state") else None


def _classes(config: FinetuneConfig, manifest: Manifest) -> int:
    """Outputs of the head: classes, 2 of a mask, or landmarks."""
    if config.task == "segmentation":
        return 2
    if config.task != "localisation":
        return len(manifest.classes)
    files = sorted({entry.landmarks for entry in manifest.entries if entry.landmarks})
    found = {landmark_names(manifest.file(name)): name for name in files}
    if len(found) != 1 or () in found:
        got = "; ".join(f"{name}: {', '.join(names) or 'none'}" for names, name in found.items())
        raise DataError(f"{manifest.path}: all clips must have the same landmarks, at least one, got {got or 'none'}")
    return len(next(iter(found)))


def check_data(config: FinetuneConfig, manifest: Manifest, split: str) -> None:
    """DataError where a clip lacks what the task learns from."""
    entries, targets = manifest.split(split), TASKS[config.task].targets
    for name in targets:
        for entry in entries:
            if getattr(entry, name) is None:
                raise DataError(f"{manifest.path}: {entry} names no file for {name}, {config.task} needs one")
    if targets:
        return
    if len(manifest.classes) < (1 if config.task == "sets" else 2):
        raise DataError(f"{manifest.path}: a task needs at least two classes, its header names {len(manifest.classes)}")
    for entry in entries:
        if entry.label is None:
            raise DataError(f"{manifest.path}: {entry} has no label, {config.task} needs one")
        if config.task == "classification" and not isinstance(entry.label, int):
            raise DataError(f"{manifest.path}: {entry} has labels by frame, classification needs one class a clip")
        if config.task == "phase" and entry.has_sets:
            raise DataError(
                f"{manifest.path}: {entry} has several labels a frame, phase needs one; task='sets' takes all"
            )


def _plan(config: FinetuneConfig, entries: Sequence[Entry]) -> Plan:
    if config.memory == "carried":
        window = config.clip.frames * config.clip.stride  # frames of the video
        return StreamPlan([len(e) for e in entries], config.batch_size, window, config.seed)
    return ClipPlan(len(entries), config.batch_size, config.seed, config.clips_per_entry)
