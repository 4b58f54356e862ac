"""Crops, flips and colours, the same for all frames of a clip, drawn from a generator keyed by the caller."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CROPS = ("none", "random", "multi_scale", "resized")

Box = tuple[int, int, int, int]  # top, left, height, width


def augment(clip: Tensor, size: int, crop: str, flip: float, jitter: float, rng: torch.Generator) -> Tensor:
    """clip: (t, h, w, 3) uint8 -> (3, t, size, size) uint8.

    crop: one of CROPS.  flip: how likely the picture is mirrored.  jitter: brightness, contrast and saturation are
    each changed by a factor of up to 1 +- jitter.
    """
    video = clip.permute(3, 0, 1, 2)
    if crop != "none":
        top, left, height, width = _draw_box(crop, video.shape[2], video.shape[3], size, rng)
        video = video[:, :, top : top + height, left : left + width]
    if _uniform(rng) < flip:
        video = video.flip(3)
    video = resize(video, size)
    if jitter:
        video = _colours(video, [1 + jitter * (2 * _uniform(rng) - 1) for _ in range(3)])
    return video.contiguous()


def centre(clip: Tensor, size: int) -> Tensor:
    """(t, h, w, 3) uint8 -> (3, t, size, size), the middle; nothing is drawn."""
    top, left = ((side - size) // 2 for side in clip.shape[1:3])
    return clip.permute(3, 0, 1, 2)[:, :, top : top + size, left : left + size].contiguous()


def resize(video: Tensor, size: int) -> Tensor:
    """(3, t, h, w) uint8 -> (3, t, size, size) uint8, bilinear."""
    if video.shape[2:] == (size, size):
        return video
    frames = F.interpolate(video.transpose(0, 1).float(), (size, size), mode="bilinear", align_corners=False)
    return frames.round_().to(torch.uint8).transpose(0, 1)


def _draw_box(crop: str, h: int, w: int, size: int, rng: torch.Generator) -> Box:
    if crop == "random":
        height = width = size
    elif crop == "multi_scale":  # published pre-training: sides of {1, .875, .75, .66} of the shorter one, alike
        scales, base = (1.0, 0.875, 0.75, 0.66), min(h, w)
        pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
        tall, wide = pairs[_below(len(pairs), rng)]
        height, width = int(base * tall), int(base * wide)
    else:  # 0.7 to 1 of the area, sides from 3:4 to 4:3
        area, ratio = h * w * (0.7 + 0.3 * _uniform(rng)), (4 / 3) ** (2 * _uniform(rng) - 1)
        height, width = min(h, round((area / ratio) ** 0.5)), min(w, round((area * ratio) ** 0.5))
    return _below(h - height + 1, rng), _below(w - width + 1, rng), height, width


def _colours(video: Tensor, factors: list[float]) -> Tensor:
    brightness, contrast, saturation = factors
    x = video.float() * brightness
    x = (x - x.mean()) * contrast + x.mean()
    grey = x.mean(0, keepdim=True)
    return ((x - grey) * saturation + grey).round_().clamp_(0, 255).to(torch.uint8)


def _uniform(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))


def _below(limit: int, rng: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=rng))
