"""What is learned from a clip: for each task the head, the loss, and how a video's answers are judged.

Letters: b clips or streams, t frames, k classes, K landmarks.  An answer is what the head gives: a tensor, or a dict
with "mask" or "landmarks" (models/heads.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .data import IGNORE
from .metrics import landmark_scores, mask_scores, means, scores, set_scores, video_scores
from .targets import IGNORED

Batch = dict[str, Any]
Answer = Any  # Tensor | dict[str, Tensor]


class Output(NamedTuple):
    """Of the tasks with one class a clip or frame."""

    loss: Tensor
    accuracy: Tensor
    carry: Any = None


class SetOutput(NamedTuple):
    loss: Tensor
    carry: Any = None


class MaskOutput(NamedTuple):
    """dice: of what is above 0 in the whole batch, against the truth."""

    loss: Tensor
    dice: Tensor
    carry: Any = None


class PointOutput(NamedTuple):
    """visibility: the share that is right.  distance: of the visible landmarks, 1 being the width of the picture."""

    loss: Tensor
    visibility: Tensor
    distance: Tensor
    carry: Any = None


class Task(NamedTuple):
    """head: of models/heads.py.  targets: what a clip must bring beside labels.  truth: the name in a batch of what is
    judged.  loss: (answer, batch, config) -> one of the outputs.  predict: answer -> (b, t, ...), what is kept of it.
    judge: (videos, names of classes, config) -> numbers, a video being a pair of predicted and true, (t, ...) each.
    best: the number whose best weights are kept.
    """

    head: str
    targets: tuple[str, ...]
    truth: str
    loss: Callable[[Answer, Batch, Any], Any]
    predict: Callable[[Answer], Tensor]
    judge: Callable[[Sequence[tuple[Tensor, Tensor]], Sequence[str], Any], dict[str, float]]
    best: str


# ---- losses
#
# Each is a sum over what counts by the number of all, or a mean over clips: its mean over processes is that of the
# whole batch, however what counts is spread.


def clip_loss(answer: Tensor, batch: Batch, config: Any) -> Output:
    """A class a clip: the mean of its frames' logits where the model answers frame by frame."""
    logits, label = clip_logits(answer), batch["label"][:, 0]
    loss = F.cross_entropy(logits, label, label_smoothing=config.label_smoothing)
    return Output(loss, (logits.argmax(1) == label).float().mean())


def clip_logits(answer: Tensor) -> Tensor:
    """(b, t, k) or (b, k) -> (b, k) fp32."""
    return answer.float().mean(1) if answer.ndim == 3 else answer.float()


def frame_loss(answer: Tensor, batch: Batch, config: Any) -> Output:
    """A class a frame."""
    logits, label = answer.float().flatten(0, 1), batch["label"].flatten()
    loss = F.cross_entropy(logits, label, ignore_index=IGNORE, label_smoothing=config.label_smoothing, reduction="sum")
    return Output(loss / len(label), (logits.argmax(1) == label).float().sum() / (label != IGNORE).sum().clamp(min=1))


def set_loss(answer: Tensor, batch: Batch, config: Any) -> SetOutput:
    """Any number of classes a frame: binary cross-entropy, averaged over classes."""
    label = batch["label"]
    each = F.binary_cross_entropy_with_logits(answer.float(), label.clamp(min=0).float(), reduction="none")
    return SetOutput((each * (label != IGNORE)).mean())


def mask_loss(answer: dict[str, Tensor], batch: Batch, config: Any) -> MaskOutput:
    """Half cross-entropy, half 1 - Dice of both classes, of each clip: soft, with squares below, 1e-5 on both sides."""
    logits, true = answer["mask"].float(), batch["mask"]
    counts, real = (true != IGNORED).float(), (true == 1).float()
    cross = F.binary_cross_entropy_with_logits(logits, real, reduction="none")
    cross = (cross * counts).sum((1, 2, 3)) / counts.sum((1, 2, 3)).clamp(min=1)
    share = logits.sigmoid()
    dice = [_soft_dice(p * counts, y * counts) for p, y in ((share, real), (1 - share, 1 - real))]
    loss = 0.5 * cross + 0.5 * (1 - (dice[0] + dice[1]) / 2)
    said = (logits > 0) * counts
    return MaskOutput(loss.mean(), 2 * (said * real).sum() / (said.sum() + real.sum()).clamp(min=1))


def _soft_dice(p: Tensor, y: Tensor) -> Tensor:
    """(b, t, h, w) each -> (b,)."""
    both, squares = (p * y).sum((1, 2, 3)), (p * p + y * y).sum((1, 2, 3))
    return (2 * both + 1e-5) / (squares + 1e-5)


def point_loss(answer: dict[str, Tensor], batch: Batch, config: Any) -> PointOutput:
    """Binary cross-entropy of being visible, and position_weight times smooth L1 of the place of what is.

    Ours: how the published model was trained is not known.
    """
    got, true = answer["landmarks"].float(), batch["landmarks"]
    counts, seen = (~true[..., 0].isnan()).float(), (true[..., 0] > 0).float()
    visible = F.binary_cross_entropy_with_logits(got[..., 0], seen, reduction="none") * counts
    place = true[..., 1:].nan_to_num()
    away = F.smooth_l1_loss(got[..., 1:], place, reduction="none", beta=0.05).sum(-1) * seen
    right = ((got[..., 0] > 0) == (seen > 0)).float() * counts
    distance = (got[..., 1:] - place).detach().norm(dim=-1) * seen
    return PointOutput(
        visible.mean() + config.position_weight * away.mean(),
        right.sum() / counts.sum().clamp(min=1),
        distance.sum() / seen.sum().clamp(min=1),
    )


# ---- judges


def _judge_clips(videos: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], config: Any) -> dict[str, float]:
    predicted, true = (torch.cat(column) for column in zip(*videos))
    return scores(predicted, true, len(names))


def _judge_phases(videos: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], config: Any) -> dict[str, float]:
    return video_scores(videos, len(names), config.relaxed, config.published_relaxed)


def _judge_sets(videos: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], config: Any) -> dict[str, float]:
    return set_scores(videos, names)


def _judge_masks(videos: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], config: Any) -> dict[str, float]:
    return means([mask_scores(predicted, true, config.published_empty) for predicted, true in videos])


def _judge_points(videos: Sequence[tuple[Tensor, Tensor]], names: Sequence[str], config: Any) -> dict[str, float]:
    predicted, true = (torch.cat(column) for column in zip(*videos))
    return landmark_scores(predicted, true)


TASKS = {
    "classification": Task(
        "classification", (), "label", clip_loss, lambda answer: clip_logits(answer).argmax(1), _judge_clips, "f1",
    ),
    "phase": Task("mean", (), "label", frame_loss, lambda answer: answer.argmax(2), _judge_phases, "accuracy"),
    "sets": Task("mean", (), "label", set_loss, lambda answer: answer.float().sigmoid(), _judge_sets, "ap"),
    "segmentation": Task(
        "segmentation", ("mask",), "mask", mask_loss, lambda answer: answer["mask"] > 0, _judge_masks, "dice"
    ),
    "localisation": Task(
        "localisation", ("landmarks",), "landmarks", point_loss, lambda answer: answer["landmarks"].float(),
        _judge_points, "pck_10",
    ),
}  # fmt: skip


def known(truth: str, true: Tensor) -> Tensor:
    """Of a video's truth (t, ...) the frames of which anything counts, (t,) bool."""
    if truth == "mask":
        return (true != IGNORED).flatten(1).any(1)
    if truth == "landmarks":
        return ~true[..., 0].isnan().all(1)
    return (true != IGNORE).flatten(1).any(1) if true.ndim > 1 else true != IGNORE
