"""A backbone that reads whole clips, with a head that answers every frame.

Letters: b clips, t frames, n patches of a frame, c channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .heads import frame_head


class FrameWise(nn.Module):
    """One of heads.py on the patches of any model with `patch_tokens`: VideoMamba and Endo-FM, which have no cls a
    frame, answer frame by frame as EndoMamba does of its own.

    model: without a head.  kind, classes, width: of `frame_head`.  config: the model's.
    """

    def __init__(self, model: nn.Module, kind: str, classes: int, width: int = 512):
        super().__init__()
        self.config: Any = model.config
        if kind in ("cls", "classification"):
            raise ValueError(
                f"FrameWise: {type(model).__name__} has no cls token of each frame, head={kind!r} needs one"
            )
        self.encoder: Any = model
        self.head = frame_head(
            kind, self.config.embed_dim, classes, self.config.grid, width, self.config.patch_size
        )  # fmt: skip
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, video: Tensor) -> Tensor | dict[str, Tensor]:
        """(b, 3, t, h, w), normalised -> the head's answer for every frame, see heads.py."""
        return self.head(self.encoder.patch_tokens(video))
