"""From the picture of a decoder to the input of a model: one resize and one normalisation, for streams and training.

The resize is torch's antialiased bilinear filter on uint8, in integers and rounded to uint8, as `torchvision`'s
`Resize(antialias=True)` does it: the same bits for every layout, batch and instruction set, 8 times as fast as in
floating point (from which it differs by at most one of 255 levels), and a frame may be kept at the model's size in
between without changing anything.
"""

from __future__ import annotations

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
    if size is not None:
        frames = resize(frames, size)
    scale, shift = (t.to(frames.device) for t in normalisation(mean, std))
    return torch.addcmul(shift, frames.movedim(-1, -3).to(torch.float32), scale)


def resize(frames: Tensor, size: int | tuple[int, int]) -> Tensor:
    """uint8 (..., h, w, 3) -> uint8 (..., height, width, 3), the whole picture squashed to the size.

    Frames of that size are returned as they are.  Others must be on the CPU: a GPU would round otherwise.
    """
    _check("resize", frames)
    height, width = (size, size) if isinstance(size, int) else size
    if frames.shape[-3:-1] == (height, width):
        return frames
    if min(height, width, *frames.shape[-3:-1]) < 1:
        raise ValueError(f"resize: sizes must be positive, got {tuple(frames.shape[-3:-1])} to {(height, width)}")
    if frames.device.type != "cpu":
        raise ValueError(f"resize: frames must be on the CPU, got {frames.device}: resize them before they are moved")
    flat = frames.reshape(-1, *frames.shape[-3:]).permute(0, 3, 1, 2)
    small = F.interpolate(flat, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return small.permute(0, 2, 3, 1).reshape(*frames.shape[:-3], height, width, 3)


def normalisation(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """scale, shift, each (3, 1, 1), so that x * scale + shift = (x / 255 - mean) / std."""
    scale = torch.tensor([1.0 / (255.0 * s) for s in std]).view(-1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)
    return scale, shift


def _check(name: str, frames: Tensor) -> None:
    if frames.dtype != torch.uint8 or frames.ndim < 3 or frames.shape[-1] != 3:
        raise ValueError(f"{name}: frames must be uint8 (..., h, w, 3), got {frames.dtype} {tuple(frames.shape)}")
