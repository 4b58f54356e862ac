"""Crops, flips, turns and colours, drawn from a generator keyed by the caller: the same for all frames of a clip, for
its pictures as for its masks, boxes and landmarks.

A `Change` is what was drawn.  Places are given from 0 to 1 across the picture, x to the right, so they need no size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CROPS = ("none", "random", "multi_scale", "resized")

Box = tuple[int, int, int, int]  # top, left, height, width


@dataclass(frozen=True)
class Change:
    """What is done to a picture of (h, w): cut out `box`, mirror, resize to size x size, turn, change the colours."""

    h: int
    w: int
    box: Box
    size: int
    flip: bool = False
    colours: tuple[float, ...] = ()  # factors of brightness, contrast, saturation
    turn: float = 0.0  # degrees, anticlockwise

    def pictures(self, clip: Tensor) -> Tensor:
        """(t, h, w, 3) uint8 -> (3, t, size, size) uint8, bilinear."""
        top, left, height, width = self.box
        video = clip.permute(3, 0, 1, 2)[:, :, top : top + height, left : left + width]
        video = resize(video.flip(3) if self.flip else video, self.size)
        if self.turn:
            frames = video.transpose(0, 1).float()
            frames = F.grid_sample(frames, self._grid().expand(len(frames), -1, -1, -1), align_corners=False)
            video = frames.round_().to(torch.uint8).transpose(0, 1)
        if self.colours:
            video = _colours(video, self.colours)
        return video.contiguous()

    def masks(self, masks: Tensor, outside: int) -> Tensor:
        """(t, H, W) of the same picture at any size -> (t, size, size), each pixel that of its middle.

        outside: what a turn brings in.
        """
        top, left, height, width = self.box
        middles = (torch.arange(self.size, dtype=torch.float64) + 0.5) / self.size
        y, x = (top + middles * height) / self.h, (left + (1 - middles if self.flip else middles) * width) / self.w
        rows, columns = ((z * n).long().clamp(max=n - 1) for z, n in zip((y, x), masks.shape[1:]))
        out = masks[:, rows][:, :, columns]
        if self.turn:
            grid = (self._grid()[0] + 1) * self.size / 2  # pixels, from the border of the first one
            inside = ((grid >= 0) & (grid < self.size)).all(-1)
            at = grid.floor().long().clamp(0, self.size - 1)
            out = torch.where(inside, out[:, at[..., 1], at[..., 0]], torch.tensor(outside, dtype=out.dtype))
        return out.contiguous()

    def points(self, xy: Tensor) -> Tensor:
        """Places (..., 2) before -> after; outside of [0, 1) they are not in the picture any more."""
        top, left, height, width = self.box
        x, y = (xy[..., 0] * self.w - left) / width, (xy[..., 1] * self.h - top) / height
        x = 1 - x if self.flip else x
        if self.turn:
            cos, sin = math.cos(math.radians(self.turn)), math.sin(math.radians(self.turn))
            dx, dy = x - 0.5, y - 0.5
            x, y = 0.5 + cos * dx + sin * dy, 0.5 - sin * dx + cos * dy
        return torch.stack((x, y), -1)

    def boxes(self, boxes: Tensor) -> Tensor:
        """(..., 4), x0, y0, x1, y1 -> the same, cut off at the border; NaN where nothing is left of one."""
        corners = self.points(boxes[..., [0, 1, 2, 1, 2, 3, 0, 3]].unflatten(-1, (4, 2)))
        low, high = corners.amin(-2).clamp(0, 1), corners.amax(-2).clamp(0, 1)
        found = torch.cat((low, high), -1)
        gone = ~(high > low).all(-1, keepdim=True)
        return found.masked_fill(gone, float("nan"))

    def _grid(self) -> Tensor:
        """(1, size, size, 2): where, from -1 to 1, each pixel of the turned picture was before."""
        angle = math.radians(self.turn)
        cos, sin = math.cos(angle), math.sin(angle)
        shape = [1, 1, self.size, self.size]
        return F.affine_grid(torch.tensor([[[cos, -sin, 0.0], [sin, cos, 0.0]]]), shape, align_corners=False)


def draw(h: int, w: int, size: int, crop: str, flip: float, jitter: float, turn: float, rng: torch.Generator) -> Change:
    """crop: one of CROPS.  flip: how likely the picture is mirrored.  jitter: brightness, contrast and saturation are
    each changed by a factor of up to 1 +- jitter.  turn: by up to so many degrees either way."""
    box = (0, 0, h, w) if crop == "none" else _draw_box(crop, h, w, size, rng)
    mirrored = _uniform(rng) < flip
    colours = tuple(1 + jitter * (2 * _uniform(rng) - 1) for _ in range(3)) if jitter else ()
    angle = turn * (2 * _uniform(rng) - 1) if turn else 0.0
    return Change(h, w, box, size, mirrored, colours, angle)


def centre(h: int, w: int, size: int) -> Change:
    """The middle, size x size; nothing is drawn."""
    return Change(h, w, ((h - size) // 2, (w - size) // 2, size, size), size)


def stretch(clip: Tensor) -> Tensor:
    """(t, h, w, 3) uint8 -> the same, the least value of each frame 0 and the largest 255."""
    x = clip.float()
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    return ((x - low) * (255 / (high - low).clamp(min=1))).round_().to(torch.uint8)


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


def _colours(video: Tensor, factors: tuple[float, ...]) -> Tensor:
    brightness, contrast, saturation = factors
    x = video.float() * brightness
    x = (x - x.mean()) * contrast + x.mean()
    grey = x.mean(0, keepdim=True)
    return ((x - grey) * saturation + grey).round_().clamp_(0, 255).to(torch.uint8)


def _uniform(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))


def _below(limit: int, rng: torch.Generator) -> int:
    return int(torch.randint(limit, (), generator=rng))
