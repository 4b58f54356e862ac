"""Models that answer with several things for a frame, as one vector a frame and back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

NAMES = {"logits": "(b, t, k)", "features": "(b, t, k)", "mask": "(b, t, h, w)", "landmarks": "(b, t, K, 3)"}


def packed(model: nn.Module) -> nn.Module:
    """The model itself where it answers with one tensor (b, t, k), else a `Packed` around it.  Reads a black frame."""
    device, config = next(model.parameters()).device, model.config
    frame = torch.zeros(1, config.in_channels, 1, *config.img_size, device=device, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        answer = model.step_(frame, model.init_state(1))
    return Packed(model, answer) if isinstance(answer, dict) else model


class Packed(nn.Module):
    """A model whose answer is a dict, as one whose answer is a tensor (b, t, k), so that whatever carries, compares or
    checks answers need not know.  `unpack` takes one frame's (k,) apart again.

    answer: one of the model's, with any b and t: logits (b, t, classes) or features (b, t, c), mask (b, t, h, w) logits
    of "this pixel belongs to it", landmarks (b, t, K, 3).  At least one of them, of the same size in every call.
    """

    def __init__(self, model: nn.Module, answer: dict[str, Tensor]) -> None:
        super().__init__()
        unknown = [name for name in answer if name not in NAMES]
        if unknown or not answer:
            raise ValueError(
                f"Packed: a model may answer with {', '.join(NAMES)}, got {', '.join(unknown) or 'nothing'}"
            )
        for name, value in answer.items():
            if value.ndim != NAMES[name].count(",") + 1:
                raise ValueError(f"Packed: {name} must be {NAMES[name]}, got {tuple(value.shape)}")
        self.model, self.config = model, model.config
        self.shapes = {name: tuple(answer[name].shape[2:]) for name in NAMES if name in answer}
        self.train(model.training)

    def forward(self, video: Tensor) -> Tensor:
        return self._pack(self.model(video))

    def init_state(self, *args: Any, **options: Any) -> Any:
        return self.model.init_state(*args, **options)

    def step(self, frames: Tensor, state: Any) -> tuple[Tensor, Any]:
        answer, state = self.model.step(frames, state)
        return self._pack(answer), state

    def step_(self, frames: Tensor, state: Any, **options: Any) -> Tensor:
        """options: of the model's own `step_`."""
        return self._pack(self.model.step_(frames, state, **options))

    def _pack(self, answer: dict[str, Tensor]) -> Tensor:
        got = {name: tuple(value.shape[2:]) for name, value in answer.items()}
        if got != self.shapes:
            raise ValueError(f"Packed: the model answered with {got} where it gave {self.shapes} before")
        return torch.cat([answer[name].flatten(2) for name in self.shapes], 2)

    def unpack(self, values: Tensor) -> dict[str, Tensor]:
        """(..., k) -> the parts with their own shapes, views."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), values.split(sizes, dim=-1), strict=True)
        return {name: part.unflatten(-1, shape) for (name, shape), part in parts}
