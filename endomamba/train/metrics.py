"""From labels and predictions to the numbers that papers report; the counting is torchmetrics'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import TrainError

SCORES = ("precision", "recall", "jaccard", "f1")


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


def video_scores(videos: Sequence[tuple[Tensor, Tensor]], classes: int) -> dict[str, float]:
    """Predicted and true labels of each video's frames -> `scores` over all frames, and by video the mean accuracy,
    its spread, and the mean over videos of the accuracy averaged over the classes that a video has."""
    result = scores(torch.cat([p for p, _ in videos]), torch.cat([t for _, t in videos]), classes)
    accuracy = torch.tensor([(p == t).double().mean() for p, t in videos], dtype=torch.float64)
    balanced = [torch.stack([(p[t == k] == k).double().mean() for k in t.unique()]).mean() for p, t in videos]
    return result | {
        "video_accuracy": accuracy.mean().item(),
        "video_accuracy_std": accuracy.std(correction=0).item(),
        "video_balanced_accuracy": torch.stack(balanced).mean().item(),
    }


def _functional() -> Any:
    try:
        from torchmetrics.functional import classification
    except ImportError as error:
        raise TrainError(f"metrics need torchmetrics: pip install endomamba[train]  ({error})") from None
    return classification
