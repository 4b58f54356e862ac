"""From the picture of a decoder to the input of a model: one resize and one normalisation, for streams and training.

The resize is torch's antialiased bilinear filter on uint8, in integers and rounded to uint8, as `torchvision`'s
`Resize(antialias=True)` does it: the same bits for every layout, batch, device and instruction set.  A frame may be
kept at the model's size in between without changing anything.  From a resize in floating point it differs by at most
one of 255 levels, and on a CPU it is faster.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
# What the published weights were trained with: all but the PolypDiag classifier use ImageNet's.
NORMALISATIONS = {
    "imagenet": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    "polypdiag": {"mean": (0.45, 0.45, 0.45), "std": (0.225, 0.225, 0.225)},
}


def preprocess(
    frames: Tensor,
    size: int | tuple[int, int] | None = 224,
    *,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> Tensor:
    """uint8 RGB (..., h, w, 3) -> float32 (..., 3, size, size): squashed to the size, scaled to [0, 1], normalised.

    size: (height, width), an int for a square, None as it is.  mean, std: in [0, 1].
    `preprocess(frames, size)` equals `preprocess(resize(frames, size), None)` to the bit.
    """
    _check("preprocess", frames)
    size = frames.shape[-3:-1] if size is None else _pair(size)
    scale, shift = (t.to(frames.device) for t in normalisation(mean, std))
    return to_input(frames, size, scale, shift)


def to_input(frames: Tensor, size: tuple[int, ...], scale: Tensor, shift: Tensor) -> Tensor:
    """`preprocess` with its constants given: where frames of this size were seen before, nothing waits for a device.

    frames: uint8 (..., h, w, 3).  size: (height, width).  scale, shift: of `normalisation`, on the frames' device.
    """
    return torch.addcmul(shift, resize(frames, tuple(size)).movedim(-1, -3).to(torch.float32), scale)


def resize(frames: Tensor, size: int | tuple[int, int]) -> Tensor:
    """uint8 (..., h, w, 3) -> uint8 (..., height, width, 3), the whole picture squashed to the size.

    Frames of that size are returned as they are.
    """
    _check("resize", frames)
    height, width = _pair(size)
    if frames.shape[-3:-1] == (height, width):
        return frames
    if min(height, width, *frames.shape[-3:-1]) < 1:
        raise ValueError(f"resize: sizes must be positive, got {tuple(frames.shape[-3:-1])} to {(height, width)}")
    if frames.device.type != "cpu":  # torch has the filter in integers for the CPU alone
        return _filtered(_filtered(frames, -2, width), -3, height)
    flat = frames.reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2)
    small = F.interpolate(flat, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return small.permute(0, 2, 3, 1).reshape(*frames.shape[:-3], height, width, 3)


def _filtered(x: Tensor, dim: int, new: int) -> Tensor:
    """uint8 with `new` elements along dim: the integer sums of torch's CPU filter, on any device."""
    old = x.shape[dim]
    if old == new:
        return x
    places, weights, shift = _taps(old, new, x.device)
    x = x.movedim(dim, -1)
    total = torch.full((*x.shape[:-1], new), 1 << (shift - 1), dtype=torch.int32, device=x.device)
    for place, weight in zip(places, weights, strict=True):
        total += x.index_select(-1, place) * weight
    return (total >> shift).clamp(0, 255).to(torch.uint8).movedim(-1, dim)


@lru_cache(maxsize=64)
def _taps(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """-> places (taps, new) int64 and weights (taps, new) int32, both of every tap for every output, and the shift by
    which a sum is divided.

    A triangle as wide as the step from one output to the next, two inputs at least, cut off at the border and scaled to
    a sum of 1; then times 2^shift, the largest for which all weights fit into 16 bits.  As in ATen's UpSampleKernel.
    """
    step = old / new
    reach = max(step, 1.0)
    begins, rows = [], []
    for i in range(new):
        centre = step * (i + 0.5)
        begin, end = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), old)
        row = [max(0.0, 1 - abs((j - centre + 0.5) * (1 / reach))) for j in range(begin, end)]
        begins.append(begin)
        rows.append([weight / sum(row) for weight in row])
    shift, largest = 0, max(map(max, rows))
    while shift < 22 and int(0.5 + largest * (1 << (shift + 1))) < 1 << 15:
        shift += 1
    taps = max(map(len, rows))
    whole = [[int(weight * (1 << shift) + 0.5) for weight in row] + [0] * (taps - len(row)) for row in rows]
    with torch.inference_mode(False):
        places = torch.tensor(begins).unsqueeze(0) + torch.arange(taps).unsqueeze(1)
        weights = torch.tensor(whole, dtype=torch.int32).T.contiguous()
        return places.clamp(max=old - 1).to(device), weights.to(device), shift


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """scale, shift, each (3, 1, 1), so that x * scale + shift = (x / 255 - mean) / std."""
    scale = torch.tensor([1.0 / (255.0 * s) for s in std]).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)
    return scale, shift


def _check(name: str, frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise ValueError(f"{name}: frames must be uint8 (..., h, w, 3), got {frames.dtype} {tuple(frames.shape)}")
