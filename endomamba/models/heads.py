"""From the tokens of every frame to logits, a mask or landmarks.

Letters: b clips, t frames, n tokens of a frame (cls first), c channels, k classes, K landmarks.  A head for classes is
a Linear itself, so its weights have the published names, head.weight and head.bias; those of the other heads have the
published names behind `head.`.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import EndoMambaConfig


def pool_tokens(features: Tensor, pool: str) -> Tensor:
    """(b, t, n, c) -> (b, t, c): the mean of a frame's tokens, cls included, or its cls token."""
    return features.mean(2) if pool == "mean" else features[:, :, 0]


class FramePool(nn.Module):
    """No head: the vector that a head would have read."""

    def __init__(self, pool: str):
        super().__init__()
        self.pool = pool

    def forward(self, features: Tensor) -> Tensor:
        """(b, t, n, c) -> (b, t, c)."""
        return pool_tokens(features, self.pool)


class PhaseHead(nn.Linear):
    """Surgical phase: logits of every frame, from the mean of its tokens or from its cls token alone."""

    def __init__(self, channels: int, classes: int, pool: str = "mean"):
        super().__init__(channels, classes)
        self.pool = pool

    def forward(self, features: Tensor) -> Tensor:
        """(b, t, n, c) -> (b, t, k)."""
        return super().forward(pool_tokens(features, self.pool))


class ClassificationHead(PhaseHead):
    """PolypDiag classification: one Linear on the mean of the frames' cls tokens.

    `forward` gives every frame's logits as the other heads do, so a stream has an answer at every frame; their mean
    over the frames is `clip`, as the Linear and the mean commute.
    """

    def __init__(self, channels: int, classes: int):
        super().__init__(channels, classes, pool="cls")

    def clip(self, features: Tensor) -> Tensor:
        """(b, t, n, c) -> (b, k)."""
        return F.linear(features[:, :, 0].mean(1), self.weight, self.bias)


class ConvBNReLU(nn.Sequential):
    """3 x 3, with the names of weights in the published decoder."""

    def __init__(self, channels: int, out: int):
        conv = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out), nn.ReLU())


class UpBlock(nn.Module):
    """Twice the height and width, then two convolutions."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv1 = ConvBNReLU(channels, out)
        self.conv2 = ConvBNReLU(out, out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.conv2(self.conv1(x))


def decoder_widths(width: int) -> list[int]:
    """Channels from the patches to the pixels; published: 512, 256, 128, 64, 16.  Never less than 8: of one channel
    behind a ReLU nothing learns."""
    return [max(8, width // by) for by in (1, 2, 4, 8, 32)]


class PatchDecoder(nn.Module):
    """The decoder of TransUNet without skips: as many doublings as make a patch of 16 its pixels again."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        widths = decoder_widths(width)
        self.conv_more = ConvBNReLU(channels, width)
        self.blocks = nn.ModuleList(UpBlock(*pair) for pair in itertools.pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, widths[-1], 16 h, 16 w)."""
        x = self.conv_more(x)
        for block in self.blocks:
            x = block(x)
        return x


class SegmentationHead(nn.Module):
    """A mask of every frame, from its patches alone: the published decoder (n_skip=0) and its two logits a pixel.

    The answer is logit 1 - logit 0, of "this pixel belongs to it": all that a softmax of two depends on.
    """

    def __init__(self, channels: int, grid: tuple[int, int], width: int = 512):
        super().__init__()
        self.grid = grid
        self.decoder = PatchDecoder(channels, width)
        self.segmentation_head = nn.Sequential(nn.Conv2d(decoder_widths(width)[-1], 2, 3, padding=1))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """(b, t, n, c) -> mask (b, t, 16 rows, 16 columns)."""
        b, t, n = features.shape[:3]
        count = self.grid[0] * self.grid[1]
        if n not in (count, count + 1):
            raise ValueError(f"SegmentationHead: needs {count} patches a frame, {self.grid}, and at most cls, got {n}")
        patches = features[:, :, -count:].flatten(0, 1)
        logits = self.segmentation_head(self.decoder(torch.unflatten(patches.mT, 2, self.grid)))
        return {"mask": torch.unflatten(logits[:, 1] - logits[:, 0], 0, (b, t))}


class PointMlp(nn.Module):
    """Three Linears from a frame's vector to two numbers a landmark, with what lies between them."""

    def __init__(self, channels: int, landmarks: int, width: int, between: type[nn.Module]):
        super().__init__()
        last = nn.Linear(width, 2 * landmarks)
        self.head = nn.Sequential(
            nn.Linear(channels, width), between(), nn.Linear(width, width), between(), last
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, c) -> (b, t, K, 2)."""
        return torch.unflatten(self.head(x), -1, (-1, 2))


class LocalisationHead(nn.Module):
    """Whether and where K landmarks are seen in every frame, from the mean of its tokens: the two published MLPs.

    The published visibility is two numbers a landmark, of which nothing more is known; here their mean is its logit.
    """

    def __init__(self, channels: int, landmarks: int, width: int = 512):
        super().__init__()
        self.vis_head = PointMlp(channels, landmarks, width, nn.Dropout)  # 0.5, and no non-linearity, as published
        self.pos_head = PointMlp(channels, landmarks, width, nn.ReLU)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """(b, t, n, c) -> landmarks (b, t, K, 3): logit of being visible, x and y, from 0 to 1 across the picture."""
        frame = features.mean(2)
        return {"landmarks": torch.cat((self.vis_head(frame).mean(-1, keepdim=True), self.pos_head(frame)), -1)}


def build_head(config: EndoMambaConfig) -> nn.Module:
    return frame_head(
        config.head, config.embed_dim, config.num_classes, config.grid, config.head_width, config.patch_size
    )


def frame_head(
    kind: str, channels: int, classes: int, grid: tuple[int, int], width: int = 512, patch_size: int = 16
) -> nn.Module:
    """What answers every frame from tokens (b, t, n, c), of which the last are its patches, `grid` of them.

    kind: "mean", "cls", "classification", "segmentation" (classes 2) or "localisation" (a landmark a class).
    classes: 0 gives the pooled tokens.
    """
    if classes == 0:
        return FramePool("mean" if kind in ("mean", "segmentation", "localisation") else "cls")
    if kind == "classification":
        return ClassificationHead(channels, classes)
    if kind == "segmentation":
        if classes != 2 or patch_size != 16 or width < 8:
            raise ValueError(
                "head='segmentation' needs num_classes=2 (the rest, and what is looked for), patch_size=16 and "
                f"head_width >= 8, got {classes}, {patch_size} and {width}"
            )
        return SegmentationHead(channels, grid, width)
    if kind == "localisation":
        return LocalisationHead(channels, classes, width)
    return PhaseHead(channels, classes, kind)
