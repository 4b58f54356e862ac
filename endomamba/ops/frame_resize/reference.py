"""frame_resize in PyTorch's operators: the integer sums written out, and the same by PyTorch where it has them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def frame_resize(frames: Tensor, height: int, width: int) -> Tensor:
    """On any device."""
    return _filtered(_filtered(frames, 2, width), 1, height).contiguous()


def _filtered(x: Tensor, dim: int, new: int) -> Tensor:
    """uint8 with `new` elements along dim."""
    old = x.shape[dim]
    begins, weights, shift = taps(old, new, x.device)
    x = x.movedim(dim, -1)
    total = torch.full((*x.shape[:-1], new), 1 << (shift - 1), dtype=torch.int32, device=x.device)
    for k, weight in enumerate(weights):
        total += x.index_select(-1, (begins + k).clamp(max=old - 1)) * weight
    return (total >> shift).clamp(0, 255).to(torch.uint8).movedim(-1, dim)


# Not a cache that forgets: CUDA graphs hold the addresses.  One entry for each length of a side that ever came.
@functools.cache
def taps(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """-> begins (new,) int32, the first input that an output sees; weights (taps, new) int32 of that one and those
    after it, 0 where there are fewer; and the shift by which a sum is divided.

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
    count = max(map(len, rows))
    whole = [[int(weight * (1 << shift) + 0.5) for weight in row] + [0] * (count - len(row)) for row in rows]
    with torch.inference_mode(False):
        weights = torch.tensor(whole, dtype=torch.int32, device="cpu").T.contiguous()
        return torch.tensor(begins, dtype=torch.int32, device="cpu").to(device), weights.to(device), shift


def interpolated(frames: Tensor, height: int, width: int) -> Tensor:
    """PyTorch's own kernel, which has the filter in integers on a CPU alone."""
    if frames.shape[1:3] == (height, width):
        return frames.clone(memory_format=torch.contiguous_format)
    if not frames.shape[0]:
        return frames.new_empty(0, height, width, 3)
    planes = frames.contiguous().permute(0, 3, 1, 2)  # channels last: from planes to 1 x 1 torch 2.13 fails an assert
    small = F.interpolate(planes, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return small.permute(0, 2, 3, 1).contiguous()


def unsupported_by_cpu(x: Tensor, *_: Tensor | None) -> list[str]:
    return [] if x.device.type == "cpu" else [f"it runs on the CPU, x is on {x.device}"]
