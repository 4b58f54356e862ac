"""Distances between the surfaces of masks, for which torchmetrics has no percentile and no third dimension.

As medpy's `hd95` (github.com/loli/medpy, read for its definition): a voxel belongs to the surface where one of its
direct neighbours does not belong to the mask, and what is outside of the picture never does; distances are Euclidean,
from every voxel of either surface to the nearest of the other, all of both in one list.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from torch import Tensor


def hausdorff(a: Tensor, b: Tensor, percent: float = 95.0) -> float:
    """Masks (t, h, w) bool -> the percentile of the distances between their surfaces in pixels, a frame being as far
    from the next one as a pixel; 100 is the Hausdorff distance.  NaN where one of them is empty."""
    ours, theirs = surface(a), surface(b)
    if not ours.any() or not theirs.any():
        return float("nan")
    (box,) = ndimage.find_objects((ours | theirs).view(np.uint8))  # elsewhere nothing is measured
    ours, theirs = ours[box], theirs[box]
    to_ours, to_theirs = (ndimage.distance_transform_edt(~there) for there in (ours, theirs))
    return float(np.percentile(np.concatenate((to_theirs[ours], to_ours[theirs])), percent))


def surface(mask: Tensor) -> np.ndarray:
    """(t, h, w) bool -> those of its voxels that have a direct neighbour outside of it."""
    there = mask.cpu().numpy()
    return there & ~ndimage.binary_erosion(there)
