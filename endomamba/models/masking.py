"""Which patches of a clip masked pre-training hides.

A mask depends on a seed and the key of its sample alone: not on the batch, the rank, the worker, or what was drawn
before, so a run that is resumed or spread over other machines hides the same patches.

Letters: t frames, n patches of a frame; a clip's patches are flat, (t n), frame by frame and row by row.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

# tube: the same places in every frame.  frame: as many places, drawn for each frame.  random: drawn over the clip, so
# that frames show different numbers of patches; the encoder then splits the visible ones into t equal runs that do not
# begin and end with frames, as the published code does.
MASKS = ("tube", "frame", "random")


def visible_tokens(kind: str, ratio: float, frames: int, patches: int) -> int:
    """How many of a clip's t n patches stay visible.  ValueError where no encoder could read them as t equal frames."""
    groups, size = (1, frames * patches) if kind == "random" else (frames, patches)
    masked = int(ratio * size)
    visible = groups * (size - masked)
    if not 0 < masked < size:
        raise ValueError(f"mask_ratio={ratio} masks {masked} of {size} patches: some must be masked and some visible")
    if visible % frames:
        raise ValueError(
            f"mask='random' with mask_ratio={ratio} leaves {visible} patches, not a multiple of {frames} frames: "
            "change mask_ratio or the number of frames, or use mask='frame'"
        )
    return visible


def draw_mask(kind: str, ratio: float, frames: int, patches: int, *, seed: int, key: str | int) -> Tensor:
    """-> (t n,) bool, True is masked; always the same for a seed and key (which names the sample, and the epoch if it
    should differ by epoch).

    The patches with the least random bits are masked: bits of numpy's Philox never change, its shuffles may.
    """
    visible_tokens(kind, ratio, frames, patches)
    rows, size = {"tube": (1, patches), "frame": (frames, patches), "random": (1, frames * patches)}[kind]
    digest = blake2b(f"{seed} {key}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(rows * size).reshape(rows, size)
    masked = np.argsort(bits, axis=1, kind="stable")[:, : int(ratio * size)]
    mask = np.zeros((rows, size), dtype=bool)
    np.put_along_axis(mask, masked, True, axis=1)
    return torch.from_numpy(np.tile(mask, (frames, 1)) if kind == "tube" else mask).flatten()


def split_places(mask: Tensor, visible: int) -> tuple[Tensor, Tensor]:
    """mask: (b, l) bool with `visible` False in each row -> their places (b, visible) and the others, in order.

    No host synchronisation: `mask.nonzero()` would wait for the GPU to say how many there are.
    """
    places = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return places[:, :visible], places[:, visible:]
