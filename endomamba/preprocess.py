"""From the picture of a decoder to the input of a model: one resize and one normalisation, for streams and training.

The resize is torch's antialiased bilinear filter on uint8, in integers and rounded to uint8, as `torchvision`'s
`Resize(antialias=True)` does it: the same bits for every layout, batch, device and instruction set.  A frame may be
kept at the model's size in between without changing anything.  From a resize in floating point it differs by at most
one of 255 levels, and on a CPU it is faster.  It is the op `endomamba.ops.frame_resize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import frame_resize
from .ops._backend import AUTO

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
    # Where there is neither a CPU nor a GPU kernel the same integers are summed by PyTorch's operators.
    backend = "auto" if frames.device.type in AUTO else "reference"
    small = frame_resize(frames.reshape(-1, *frames.shape[-3:]), (height, width), backend=backend)
    return small.view(*frames.shape[:-3], height, width, 3)


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
