"""Distances between the surfaces of masks, for which torchmetrics has no percentile and no third dimension.

As medpy's `hd95` (github.com/loli/medpy, read for its definition): a voxel belongs to the surface where one of its
direct neighbours does not belong to the mask, and what is outside of the picture never does; distances are Euclidean,
from every voxel of either surface to the nearest of the other, all of both in one list.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**23  # distances at a time


def hausdorff(a: Tensor, b: Tensor, percent: float = 95.0) -> float:
    """Masks (t, h, w) bool -> the percentile of the distances between their surfaces in pixels, a frame being as far
    from the next one as a pixel; 100 is the Hausdorff distance.  NaN where one of them is empty."""
    ours, theirs = (torch.nonzero(surface(mask)) for mask in (a, b))
    if not len(ours) or not len(theirs):
        return float("nan")
    both = torch.cat((_to_nearest(ours, theirs), _to_nearest(theirs, ours)))
    return float(np.percentile(both.double().sqrt().numpy(), percent))


def surface(mask: Tensor) -> Tensor:
    """(t, h, w) bool -> those of its voxels that have a direct neighbour outside of it."""
    padded = torch.nn.functional.pad(mask, (1,) * 6)
    inner = mask.clone()
    for dim in range(3):
        for start in (0, 2):
            window = [slice(1, -1)] * 3
            window[dim] = slice(start, start + mask.shape[dim])
            inner &= padded[tuple(window)]
    return mask & ~inner


def _to_nearest(points: Tensor, others: Tensor) -> Tensor:
    """Both (n, 3) int64, sorted by frame -> (n,) int64, the squared distance from each point to the nearest other.

    Frame by frame, and from each outwards: frames farther away than the farthest nearest so far hold nothing nearer.
    """
    frames = {int(t): others[others[:, 0] == t, 1:] for t in others[:, 0].unique()}
    out = []
    for t in points[:, 0].unique():
        mine = points[points[:, 0] == t, 1:]
        best = torch.full((len(mine),), 2**62)
        for other in sorted(frames, key=lambda u: abs(u - int(t))):
            away = (other - int(t)) ** 2
            if away >= int(best.max()):
                break
            best = torch.minimum(best, away + _squared(mine, frames[other]))
        out.append(best)
    return torch.cat(out)


def _squared(points: Tensor, others: Tensor) -> Tensor:
    """(n, 2), (m, 2) int64 -> (n,), to the nearest."""
    parts = points.split(max(1, CHUNK // len(others)))
    return torch.cat([(part[:, None] - others).square().sum(-1).amin(1) for part in parts])
