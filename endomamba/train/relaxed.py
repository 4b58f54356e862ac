"""Phases with relaxed borders, as the M2CAI challenge of 2016 introduced them and papers on Cholec80 report them.

Within so many frames of either end of a phase, the phase before (at its begin) or after it (at its end) is right too,
"before" and "after" by number.  For the seven phases of Cholec80 the published rule allows more, as phases 4 to 7
interleave: at the begin of the last two the last but one, at the end of the last four the next but one.

The published MATLAB code marks frames at the end of a phase by their places within the last frames, but applies the
marks from the first frame of the phase on; its numbers therefore are not what it says.  Here both ways are there: the
meant one, and `published=True`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

LATE, EARLY = (-1,), (1,)


def allowed(phase: int, classes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Differences from a phase that are right at its begin, and at its end."""
    if classes != 7 or phase < 3:
        return LATE, EARLY
    return (-1, -2) if phase >= 5 else LATE, (1, 2)


def relax(predicted: Tensor, true: Tensor, classes: int, frames: int, published: bool = False) -> Tensor:
    """(t,) int64 each -> (t,) bool: which predictions are right, within `frames` of a border relaxed."""
    right = predicted == true
    edges = [0, *(torch.nonzero(true[1:] != true[:-1])[:, 0] + 1).tolist(), len(true)]
    for start, stop in itertools.pairwise(edges):
        late, early = allowed(int(true[start]), classes)
        off, near = predicted[start:stop] - true[start:stop], min(frames, stop - start)
        begins, ends = torch.isin(off[:near], torch.tensor(late)), torch.isin(off[-near:], torch.tensor(early))
        right[start : start + near] |= begins
        first = start if published else stop - near
        right[first : first + near] |= ends
    return right


def relaxed_scores(
    videos: Sequence[tuple[Tensor, Tensor]], classes: int, frames: int, published: bool = False
) -> dict[str, float]:
    """-> relaxed_accuracy, _precision, _recall, _jaccard: by phase and video, averaged over the videos that have the
    phase, then over phases; accuracy over videos.

    All frames of a phase's union that are right count as its hits, as published, so precision and recall may exceed 1
    and are cut off there.
    """
    rows = [_of_video(predicted, true, classes, frames, published) for predicted, true in videos]
    accuracy = torch.tensor([value for value, _ in rows], dtype=torch.float64)
    each = torch.stack([table for _, table in rows]).clamp(max=1).nanmean(0).nanmean(0)  # NaN stays NaN in clamp
    names = ("relaxed_precision", "relaxed_recall", "relaxed_jaccard")
    return {"relaxed_accuracy": accuracy.mean().item()} | dict(zip(names, each.tolist()))


def _of_video(predicted: Tensor, true: Tensor, classes: int, frames: int, published: bool) -> tuple[float, Tensor]:
    """-> accuracy, and (classes, 3) precision, recall, Jaccard, NaN for a phase that the video does not have."""
    right = relax(predicted, true, classes, frames, published)
    table = torch.full((classes, 3), float("nan"), dtype=torch.float64)
    for k in true.unique().tolist():
        said, real = predicted == k, true == k
        hits = (right & (said | real)).sum().double()
        table[k] = torch.stack((hits / said.sum(), hits / real.sum(), hits / (said | real).sum()))
    return right.double().mean().item(), table
