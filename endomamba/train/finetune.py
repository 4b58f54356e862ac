"""Fine-tuning and evaluation: a class for each clip, or a phase for each frame.

memory="clip": every clip is read anew, as published.  memory="carried": streams walk through whole videos, window by
window, and the model's state goes with them; gradients flow through the state inside a window, from its last frame to
its first, and stop at its border (truncated back-propagation).  A state is worth carrying only in a model that
remembers: dt_init="mamba", or weights trained so.

Letters: b clips or streams, t frames, k classes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import CheckpointError, EndoFM, EndoMamba, StreamState, load_checkpoint
from .config import TrainConfig, create
from .data import IGNORE, ClipDataset, Normalise, left_out, load, to_device
from .data import check_number as _number
from .loop import train
from .manifest import DataError, Entry, Manifest
from .metrics import scores, video_scores
from .plan import ClipPlan, Plan, Sample, StreamPlan
from .world import World

TASKS = ("classification", "phase")


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    task: str = "phase"
    memory: str = "clip"
    chunk: int = 0  # carried: frames that go through the model at a time; 0: the window, clip.frames, at once
    weights: str = ""  # to start from; its head is left out
    map_pos_embed: bool = False  # keep the pre-trained positions, which the published rule discards
    clips_per_entry: int = 1
    label_smoothing: float = 0.0
    reset: int = 0  # evaluating phases: frames after which the memory starts anew; 0: never

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, names in (("task", TASKS), ("memory", ("clip", "carried"))):
            if getattr(self, name) not in names:
                raise ValueError(f"FinetuneConfig: {name} must be one of {names}, got {getattr(self, name)!r}")
        for name in ("chunk", "reset"):
            _number(self, name, int, 0)
        if "num_classes" in self.model_options:
            raise ValueError("FinetuneConfig: num_classes is that of the manifest, not one of model_options")
        _number(self, "clips_per_entry", int, 1)
        _number(self, "label_smoothing", float, 0, 1)
        if self.task == "classification" and (self.memory == "carried" or self.reset):
            raise ValueError("FinetuneConfig: memory='carried' and reset are for task='phase'; clips carry nothing")
        if self.memory == "clip" and self.chunk:
            raise ValueError("FinetuneConfig: chunk is for memory='carried'")
        if self.memory == "carried" and self.clips_per_entry > 1:
            raise ValueError("FinetuneConfig: clips_per_entry is for memory='clip'; carried streams read all frames")


Batch = dict[str, Any]


class Output(NamedTuple):
    loss: Tensor
    accuracy: Tensor
    carry: StreamState | None = None


# ---- steps


def classification_step(model: Any, config: FinetuneConfig, normalise: Normalise, batch: Batch) -> Output:
    """One class a clip: the mean of its frames' logits where the model answers frame by frame."""
    logits, label = clip_logits(model, normalise(batch["video"])), batch["label"][:, 0]
    loss = F.cross_entropy(logits, label, label_smoothing=config.label_smoothing)
    return Output(loss, (logits.argmax(1) == label).float().mean())


def clip_logits(model: nn.Module, video: Tensor) -> Tensor:
    """(b, 3, t, h, w) -> (b, k) fp32."""
    logits = model(video).float()
    return logits.mean(1) if logits.ndim == 3 else logits


def phase_step(model: Any, config: FinetuneConfig, normalise: Normalise, batch: Batch) -> Output:
    """A class a frame, every clip read anew."""
    return _frame_output(model(normalise(batch["video"])), batch["label"], config)


def carried_step(model: EndoMamba, config: FinetuneConfig, normalise: Normalise, batch: Batch) -> Output:
    """A class a frame; the state enters from the step before and leaves for the next one, without its history."""
    state, logits = forget(batch["carry"], batch["fresh"]), []
    for frames in batch["video"].split(config.chunk or config.clip.frames, dim=2):
        out, state = model.step(normalise(frames), state)
        logits.append(out)
    return _frame_output(torch.cat(logits, 1), batch["label"], config)._replace(carry=state.detach())


def forget(state: StreamState, rows: Tensor) -> StreamState:
    """`state.reset` for rows known on the device only, (b,) bool: no sync."""
    where = rows.view(1, -1, 1, 1)
    return replace(
        state,
        conv=state.conv.masked_fill(where, 0),
        ssm=state.ssm.masked_fill(where, 0),
        frame=state.frame.masked_fill(rows, 0),
    )


def _frame_output(logits: Tensor, label: Tensor, config: FinetuneConfig) -> Output:
    """The loss is a sum over labelled frames by the number of all: its mean over processes is that of the whole batch
    however the labels are spread."""
    logits, label = logits.float().flatten(0, 1), label.flatten()
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, label_smoothing=config.label_smoothing, reduction="sum")
    return Output(loss / len(label), (logits.argmax(1) == label).float().sum() / (label != IGNORE).sum().clamp(min=1))


# ---- training


def run(config: FinetuneConfig, manifest: Manifest, out: str | os.PathLike, world: World) -> dict[str, float]:
    """Trains on the split "train", evaluates on "val" where there is one; -> the last evaluation."""
    check_data(config, manifest, "train")
    torch.manual_seed(config.seed)
    model = build(config, manifest, config.weights, head=False).to(world.device)
    entries = manifest.split("train")
    dataset = ClipDataset(manifest, entries, config.clip, model.config.size[0], config.seed)
    judged = any(entry.split == "val" for entry in manifest.entries)
    result: dict[str, float] = {}

    def judge() -> dict[str, float]:
        result.update(evaluate(config, model, manifest, "val", world))
        return result

    step: Callable[[dict[str, Any]], Output] = partial(
        {"classification": classification_step, "phase": phase_step}[config.task] if config.memory == "clip"
        else carried_step, model, config, Normalise(config.clip.normalise, world.device),
    )  # fmt: skip
    train(
        config,
        model,
        step,
        dataset,
        _plan(config, entries),
        out,
        world,
        evaluate=judge if judged else None,
        best="f1" if config.task == "classification" else "accuracy",
        init_carry=model.init_state if config.memory == "carried" else None,
    )
    return result


def build(config: FinetuneConfig, manifest: Manifest, weights: str | os.PathLike, head: bool) -> Any:
    """The model with a head for the manifest's classes; weights: to load, "" for none; head: with theirs."""
    options = {"head": "classification"} if config.task == "classification" and config.model != "endofm" else {}
    model = create(config.model, {**options, **config.model_options, "num_classes": len(manifest.classes)})
    if config.memory == "carried" and not isinstance(model.init_state(1), StreamState):
        raise ValueError(f"memory='carried' needs a state of fixed size (endomamba_*), {config.model} has none")
    if config.task == "phase" and isinstance(model, EndoFM):
        raise ValueError(f"task='phase' needs a model that answers every frame of a clip, {config.model} does not")
    if weights:
        if not Path(weights).exists():
            raise CheckpointError(f"{weights}: does not exist")
        load_checkpoint(model, weights, map_pos_embed=config.map_pos_embed, drop_head=not head)
    return model


def check_data(config: FinetuneConfig, manifest: Manifest, split: str) -> None:
    """DataError where a clip lacks what the task learns from."""
    if len(manifest.classes) < 2:
        raise DataError(f"{manifest.path}: a task needs at least two classes, its header names {len(manifest.classes)}")
    for entry in manifest.split(split):
        if entry.label is None:
            raise DataError(f"{manifest.path}: {entry} has no label, {config.task} needs one")
        if config.task == "classification" and not isinstance(entry.label, int):
            raise DataError(f"{manifest.path}: {entry} has labels by frame, classification needs one class a clip")


def _plan(config: FinetuneConfig, entries: Sequence[Entry]) -> Plan:
    if config.memory == "carried":
        return StreamPlan([len(e) for e in entries], config.batch_size, _window(config), config.seed)
    return ClipPlan(len(entries), config.batch_size, config.seed, config.clips_per_entry)


def _window(config: FinetuneConfig) -> int:
    """Frames of the video that a clip spans."""
    return config.clip.frames * config.clip.stride


# ---- evaluation


@torch.no_grad()
def evaluate(config: FinetuneConfig, model: Any, manifest: Manifest, split: str, world: World) -> dict[str, float]:
    """Metrics over a split, shared out among the processes; `unreadable`: frames or clips that were not decoded."""
    check_data(config, manifest, split)
    entries = manifest.split(split)
    dataset = ClipDataset(manifest, entries, config.clip, model.config.size[0], config.seed)
    dataset.train = False
    mine = range(world.rank, len(entries), world.size)
    judge = _classify if config.task == "classification" else _phases
    model.eval()
    pairs = judge(config, model, dataset, mine, world)
    everyone = [pair for of_rank in world.gather(pairs) for pair in of_rank]
    known = [(predicted[true != IGNORE], true[true != IGNORE]) for predicted, true in everyone]
    lost = sum(len(true) for _, true in everyone) - sum(len(true) for _, true in known)
    known = [(predicted, true) for predicted, true in known if len(true)]
    if not known:
        raise DataError(f"{manifest.path}: no clip of split {split!r} could be decoded")
    if config.task == "phase":
        return video_scores(known, len(manifest.classes)) | {"unreadable": float(lost)}
    predicted, true = (torch.cat(column) for column in zip(*known))
    return scores(predicted, true, len(manifest.classes)) | {"unreadable": float(lost)}


Pairs = list[tuple[Tensor, Tensor]]


def _classify(config: FinetuneConfig, model: nn.Module, dataset: ClipDataset, mine: range, world: World) -> Pairs:
    """Predicted and true class of each clip, (1,) each, from its first frames."""
    samples = [Sample(i, 0, i, start=0) for i in mine]
    size = max(1, config.batch_size // (world.size * config.accumulate))
    pairs = []
    normalise = Normalise(config.clip.normalise, world.device)
    for batch in load(dataset, [samples[i : i + size] for i in range(0, len(samples), size)], config.workers, False):
        left_out(batch)
        moved = to_device(batch, world.device)
        with config.autocast(world.device):
            predicted = clip_logits(model, normalise(moved["video"])).argmax(1).cpu()
        pairs += list(zip(predicted.split(1), batch["label"][:, :1]))
    return pairs


def _phases(config: FinetuneConfig, model: Any, dataset: ClipDataset, mine: range, world: World) -> Pairs:
    """Predicted and true phase of each video's frames, (t,) each; the model reads a video once, as a stream."""
    window, stride, normalise = _window(config), config.clip.stride, Normalise(config.clip.normalise, world.device)
    starts = [(i, at) for i in mine for at in range(0, len(dataset.entries[i]), window)]
    samples = [Sample(i, 0, i, at, at == 0, tail=True) for i, at in starts]
    videos: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in mine}
    for (i, start), batch in zip(starts, load(dataset, [[sample] for sample in samples], config.workers, False)):
        left_out(batch)
        inside = min(config.clip.frames, -(-(len(dataset.entries[i]) - start) // stride))
        for at, until in _cuts(start // stride, inside, config.reset):
            if (start == 0 and at == 0) or (config.reset and (start // stride + at) % config.reset == 0):
                state = model.init_state(1)
            frames = normalise(batch["video"][:, :, at:until].to(world.device))
            with config.autocast(world.device):
                logits, state = model.step(frames, state)
            videos[i].append((logits[0].argmax(1).cpu(), batch["label"][0, at:until]))
    return [tuple(torch.cat(column) for column in zip(*parts)) for parts in videos.values()]  # type: ignore[misc]


def _cuts(first: int, frames: int, every: int) -> list[tuple[int, int]]:
    """The pieces of a window that begins at frame `first` of a video, cut where a multiple of `every` lies in it.

    >>> _cuts(6, 8, 5)
    [(0, 4), (4, 8)]
    """
    edges = [at for at in range(1, frames) if every and (first + at) % every == 0]
    return list(zip([0, *edges], [*edges, frames]))
