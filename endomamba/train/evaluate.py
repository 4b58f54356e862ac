"""Metrics of a model over a split: its videos read through, and what it answered judged.

A model that can stream reads each video once, window by window, its state carried on (reset: anew after so many
frames); another one reads windows of clip.frames.  Where a clip has one class, its first frames are read.

kNN: no head is trained; what the model gives for the split "train" is the bank, and what is asked for is decided by the
nearest in it, as in DINO (https://arxiv.org/abs/2104.14294): by cosine, weighted with exp(cosine / 0.07).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import IGNORE, ClipDataset, Normalise, left_out, load, to_device
from .errors import DataError
from .manifest import Manifest
from .plan import Sample
from .tasks import TASKS, Answer, clip_logits, known
from .world import World

TEMPERATURE = 0.07
Pair = tuple[Tensor, Tensor]  # what was predicted for a video's frames, or its clip, and what is true; on the CPU
Read = tuple[Tensor, Tensor, int]  # the same, and how many frames, or clips, were not decoded


@torch.no_grad()
def evaluate(config: Any, model: Any, manifest: Manifest, split: str, world: World) -> dict[str, float]:
    """Metrics over a split, shared out among the processes; `unreadable`: frames or clips that were not decoded."""
    model.eval()
    task, names = TASKS[config.task], manifest.classes
    if config.probe == "knn":
        features = partial(_features, clip=config.task == "classification")
        bank = _kept(config, _videos(config, model, manifest, "train", world, features), world)[0]
        if not bank:
            raise DataError(f"{manifest.path}: no clip of split 'train' could be decoded")
        decide = Neighbours(bank, config, len(names), world.device)

        def predict(answer: Answer) -> Tensor:
            return decide(features(answer))

    else:
        predict = task.predict
    videos, lost = _kept(config, _videos(config, model, manifest, split, world, predict), world)
    if not videos:
        raise DataError(f"{manifest.path}: no clip of split {split!r} could be decoded")
    return task.judge(videos, names, config) | {"unreadable": float(lost)}


def _kept(config: Any, videos: Iterator[Read], world: World) -> tuple[list[Pair], int]:
    """What counts of the videos of all processes, and how many frames or clips were not decoded."""
    truth, lost, mine = TASKS[config.task].truth, 0, []
    for predicted, true, of_video in videos:
        rows = known(truth, true)
        lost += of_video
        if rows.any():
            mine.append((predicted[rows], true[rows]))
    everyone = world.gather((mine, lost))
    return [pair for pairs, _ in everyone for pair in pairs], sum(count for _, count in everyone)


def _videos(
    config: Any, model: Any, manifest: Manifest, split: str, world: World, predict: Callable[[Answer], Tensor]
) -> Iterator[Read]:
    """Of this process's share of a split."""
    dataset = open_split(config, manifest, split, model.config.size[0])
    dataset.train = False
    mine = range(world.rank, len(dataset), world.size)
    read = read_clips if config.task == "classification" else read_videos
    return read(config, model, dataset, mine, world, predict)


def open_split(config: Any, manifest: Manifest, split: str, size: int) -> ClipDataset:
    """The clips of a split with what the task needs."""
    sets = len(manifest.classes) if config.task == "sets" else 0
    targets, keep = TASKS[config.task].targets, config.keep_decoded
    return ClipDataset(manifest, manifest.split(split), config.clip, size, config.seed, targets, sets, keep)


def read_clips(
    config: Any, model: Any, dataset: ClipDataset, mine: range, world: World, predict: Callable[[Answer], Tensor]
) -> Iterator[Read]:
    """Each clip's prediction (1, ...) and class (1,), from its first frames; -100 where not decoded."""
    samples = [Sample(i, 0, i, start=0) for i in mine]
    size = max(1, config.batch_size // (world.size * config.accumulate))
    normalise = Normalise(config.clip.normalise, world.device)
    for batch in load(dataset, [samples[i : i + size] for i in range(0, len(samples), size)], config.workers, False):
        left_out(batch)
        moved = to_device(batch, world.device)
        with config.autocast(world.device):
            answer = model(normalise(moved["video"]))
        for predicted, true in zip(predict(answer).cpu().split(1), batch["label"][:, :1]):
            yield predicted, true, int(true == IGNORE)  # check_data: in the manifest all have one


def read_videos(
    config: Any, model: Any, dataset: ClipDataset, mine: range, world: World, predict: Callable[[Answer], Tensor]
) -> Iterator[Read]:
    """Each video's predictions (t, ...) and truth (t, ...)."""
    normalise, truth = Normalise(config.clip.normalise, world.device), TASKS[config.task].truth
    streams = hasattr(model, "step")
    windows = [(i, at) for i in mine for at in range(0, len(dataset.entries[i]), _span(config, dataset, i))]
    samples = [[Sample(i, 0, i, at, at == 0, tail=True)] for i, at in windows]
    parts: list[Pair] = []
    lost = 0
    for number, batch in enumerate(load(dataset, samples, config.workers, False)):
        left_out(batch)
        i, start = windows[number]
        frames = normalise(batch["video"].to(world.device))
        inside = min(frames.shape[2], -(-(len(dataset.entries[i]) - start) // config.clip.stride))
        lost += inside if batch["faults"] else 0
        first = start // config.clip.stride
        for at, until in _cuts(first, inside, config.reset) if streams else [(0, inside)]:
            if streams and (first + at == 0 or (config.reset and (first + at) % config.reset == 0)):
                state = model.init_state(1)
            with config.autocast(world.device):
                if streams:
                    answer, state = model.step(frames[:, :, at:until], state)
                else:
                    answer = model(frames)
            parts.append((predict(answer)[0, : until - at].cpu(), batch[truth][0, at:until]))
        if number + 1 == len(windows) or windows[number + 1][0] != i:
            predicted, true = (torch.cat(column) for column in zip(*parts))
            yield predicted, true, lost
            parts, lost = [], 0


def _span(config: Any, dataset: ClipDataset, i: int) -> int:
    """Frames of the video that a window spans."""
    return config.clip.frames * config.clip.stride or len(dataset.entries[i])


def _cuts(first: int, frames: int, every: int) -> list[tuple[int, int]]:
    """The pieces of a window that begins at frame `first` of a video, cut where a multiple of `every` lies in it.

    >>> _cuts(6, 8, 5)
    [(0, 4), (4, 8)]
    """
    edges = [at for at in range(1, frames) if every and (first + at) % every == 0]
    return list(zip([0, *edges], [*edges, frames]))


# ---- nearest neighbours


def _features(answer: Tensor, clip: bool) -> Tensor:
    """What a model without a head gives, (b, t, c) or (b, c), as vectors of length 1; clip: (b, c), one a clip."""
    return F.normalize(clip_logits(answer) if clip else answer.float(), dim=-1)


class Neighbours:
    """Calls: vectors (..., c) of length 1 -> the class of each (...), or with task="sets" the share of its neighbours
    that each class holds in (..., k).

    bank: vectors (n, c) and labels of each video or clip.
    """

    def __init__(self, bank: list[Pair], config: Any, classes: int, device: torch.device | str = "cpu"):
        vectors, labels = (torch.cat(column).to(device) for column in zip(*bank))
        self.bank, self.sets = vectors, config.task == "sets"
        self.rows = labels.float() if self.sets else F.one_hot(labels, classes).float()
        self.near = min(config.neighbours, len(vectors))

    def __call__(self, vectors: Tensor) -> Tensor:
        cosine, place = (vectors @ self.bank.T).topk(self.near, dim=-1)
        weight = (cosine / TEMPERATURE).softmax(-1)
        share = (weight.unsqueeze(-1) * self.rows[place]).sum(-2)
        return share if self.sets else share.argmax(-1)
