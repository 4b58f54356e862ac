"""From what is true and what is predicted to the numbers that papers report; the counting is torchmetrics', but for
distances between surfaces (surface.py), relaxed phases (relaxed.py) and the few lines here.

A number that does not exist (no positive example of a class, an empty mask) is NaN and counts in no mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import TrainError
from .relaxed import relaxed_scores
from .surface import hausdorff

SCORES = ("precision", "recall", "jaccard", "f1")
Pair = tuple[Tensor, Tensor]  # predicted, true


def scores(predicted: Tensor, label: Tensor, classes: int) -> dict[str, float]:
    """(n,) int64 each -> accuracy, and macro precision, recall, Jaccard and F1 with their spread over classes (_std).

    A class that neither occurs nor is predicted counts in none of the means.  Of two classes also f1_positive, that of
    class 1 alone.
    """
    functional = _functional()
    options: dict[str, Any] = {"num_classes": classes, "average": "none"}
    each = {
        "precision": functional.multiclass_precision(predicted, label, **options),
        "recall": functional.multiclass_recall(predicted, label, **options),
        "jaccard": functional.multiclass_jaccard_index(predicted, label, **options),
        "f1": functional.multiclass_f1_score(predicted, label, **options),
    }
    there = torch.bincount(torch.cat((predicted, label)), minlength=classes) > 0
    result = {"accuracy": (predicted == label).double().mean().item()}
    for name in SCORES:
        values = each[name].double()[there]
        result[name], result[f"{name}_std"] = values.mean().item(), values.std(correction=0).item()
    if classes == 2:
        result["f1_positive"] = each["f1"][1].item()
    return result


def video_scores(videos: Sequence[Pair], classes: int, relaxed: int = 0, published: bool = False) -> dict[str, float]:
    """Predicted and true labels of each video's frames -> `scores` over all frames (frame-wise), and video-wise: the
    mean over videos of each, and its spread (video_accuracy, video_accuracy_std, ...), and of the accuracy averaged
    over the classes that a video has.

    relaxed: frames around each change of phase in which either phase is right; 0: none.  published: see relaxed.py.
    """
    result = scores(torch.cat([p for p, _ in videos]), torch.cat([t for _, t in videos]), classes)
    each = [scores(predicted, true, classes) for predicted, true in videos]
    for name in ("accuracy", *SCORES):
        values = torch.tensor([of_video[name] for of_video in each], dtype=torch.float64)
        result[f"video_{name}"], result[f"video_{name}_std"] = values.mean().item(), values.std(correction=0).item()
    balanced = [torch.stack([(p[t == k] == k).double().mean() for k in t.unique()]).mean() for p, t in videos]
    result["video_balanced_accuracy"] = torch.stack(balanced).mean().item()
    if relaxed:
        result |= relaxed_scores(videos, classes, relaxed, published)
    return result


# ---- masks


def mask_scores(predicted: Tensor, true: Tensor, published_empty: bool = False) -> dict[str, float]:
    """`overlap`, and HD95 of the whole stack: NaN where one of the masks is empty.

    published_empty: as the published evaluation has it, Dice 0 where nothing was predicted and 1 where something was
    and nothing is there, HD95 0 in both.
    """
    counts = true != 255
    ours, theirs = predicted & counts, (true == 1)
    found, there = bool(ours.any()), bool(theirs.any())
    result, distance = overlap(predicted, true), hausdorff(ours, theirs)
    if published_empty and not (found and there):
        result["dice"], distance = float(found), 0.0
    return result | {"hd95": distance}


def overlap(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """Masks of a video (t, h, w), bool and uint8 with 255 where nothing counts -> Dice and Jaccard of the whole stack,
    and frame_dice, the mean Dice of its frames that have something in either mask.

    Where both are empty Dice is 1, where one is 0.
    """
    ours, theirs = predicted & (true != 255), (true == 1)
    both, either = (ours & theirs).sum((1, 2)).double(), (ours.sum((1, 2)) + theirs.sum((1, 2))).double()
    size, hit = either.sum().item(), both.sum().item()
    frames = (2 * both / either)[either > 0]
    return {
        "dice": 2 * hit / size if size else 1.0,
        "jaccard": hit / (size - hit) if size else 1.0,
        "frame_dice": frames.mean().item() if len(frames) else float("nan"),
    }


def means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each number over the rows that have it, and its spread (_std)."""
    result = {}
    for name in rows[0]:
        values = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        values = values[~values.isnan()]
        spread = values.std(correction=0).item() if len(values) else float("nan")
        result[name], result[f"{name}_std"] = values.mean().item(), spread
    return result


# ---- landmarks


def landmark_scores(predicted: Tensor, true: Tensor) -> dict[str, float]:
    """(n, K, 3) each: logit of being visible, x, y; and visible (0 or 1), x, y, from 0 to 1 across the picture.

    -> visibility_ap (mean over landmarks of the average precision), visibility_accuracy; over the landmarks that are
    visible, whatever was said of it: distance (mean) and pck_5, pck_10, the share nearer than 0.05 and 0.1.
    """
    seen = true[..., 0] > 0
    away = (predicted[..., 1:] - true[..., 1:]).norm(dim=-1)[seen].double()
    precision = average_precision(predicted[..., 0].sigmoid(), seen)
    return {
        "visibility_ap": precision[~precision.isnan()].mean().item(),
        "visibility_accuracy": ((predicted[..., 0] > 0) == seen).double().mean().item(),
        "distance": away.mean().item(),
        "pck_5": (away < 0.05).double().mean().item() if len(away) else float("nan"),
        "pck_10": (away < 0.1).double().mean().item() if len(away) else float("nan"),
    }


# ---- several classes at a time


def set_scores(videos: Sequence[Pair], classes: Sequence[str]) -> dict[str, float]:
    """Scores (t, k) and truth (t, k) of each video -> average precision: ap (mean over the classes that occur), "ap:"
    and the name for each, and video_ap: for each class the mean over the videos that have it, then over classes."""
    each = average_precision(torch.cat([p for p, _ in videos]), torch.cat([t for _, t in videos]) == 1)
    by_video = torch.stack([average_precision(p, t == 1) for p, t in videos]).nanmean(0)
    result = {"ap": each.nanmean().item(), "video_ap": by_video.nanmean().item()}
    return result | {f"ap:{name}": value for name, value in zip(classes, each.tolist())}


def average_precision(score: Tensor, true: Tensor) -> Tensor:
    """(n, k) fp32 and bool -> (k,), NaN for a class without a positive."""
    functional, there = _functional(), true.any(0)
    out = torch.full((true.shape[1],), float("nan"), dtype=torch.float64)
    for k in torch.nonzero(there)[:, 0].tolist():
        out[k] = functional.binary_average_precision(score[:, k], true[:, k].long()).double()
    return out


def _functional() -> Any:
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise TrainError(f"metrics need torchmetrics: pip install endomamba[train]  ({error})") from None
    return classification
