"""Teachers of pre-training: anything that turns a clip into a vector for each patch, frozen.

    teacher = load_teacher("videomamba_small", "videomamba_s16_k400_f16_res224.pth", device="cuda")
    teacher = load_teacher("teacher.pt2", device="cuda")       # a file of torch.export
    teacher = Teacher(module, reads="frame", extra_tokens=1)    # any module, here a ViT for pictures with a cls token
    losses = model(video, mask, teacher(video))

Letters: b clips, t frames, n patches of a frame, x tokens before the patches (cls, registers), c channels.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
from torch import Tensor, nn

from ._registry import create_model, list_models
from .checkpoint import LoadReport, load_checkpoint

READS = ("clip", "frame")


class Teacher(nn.Module):
    """`teacher(video)` gives (b, t n, c) without a gradient and without saving anything for one, always in eval mode.

    reads: "clip", the module takes (b, 3, t, h, w) and gives (b, x + t n, c) or (b, t, x + n, c); its `patch_tokens` is
        called where it has one, as every backbone of `create_model` does.  "frame": it takes (b t, 3, h, w) and gives
        (b t, x + n, c).
    extra_tokens: x, taken off.
    autocast: the dtype in which it runs, or None for that of its weights.

    Keep it apart from the student: whoever holds its parameters saves them in every checkpoint.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        reads: str = "clip",
        extra_tokens: int = 0,
        autocast: torch.dtype | None = torch.bfloat16,
    ):
        super().__init__()
        if reads not in READS:
            raise ValueError(f"Teacher: reads must be one of {READS}, got {reads!r}")
        if isinstance(extra_tokens, bool) or not isinstance(extra_tokens, int) or extra_tokens < 0:
            raise ValueError(f"Teacher: extra_tokens must be an integer of at least 0, got {extra_tokens!r}")
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"Teacher: autocast must be torch.bfloat16, torch.float16 or None, got {autocast}")
        self.module = module.requires_grad_(False)
        self.reads, self.extra_tokens, self.autocast = reads, extra_tokens, autocast
        self.report: LoadReport | None = None  # what load_teacher loaded
        with contextlib.suppress(NotImplementedError):  # a graph of torch.export stays as it was exported
            module.eval()
        self.training = False

    def train(self, mode: bool = True) -> Teacher:
        """Changes nothing: a teacher stays in eval mode."""
        return self

    @torch.no_grad()  # not inference_mode: the loss of the student saves what comes out
    def forward(self, video: Tensor) -> Tensor:
        """video: (b, 3, t, h, w), normalised as the teacher was trained -> (b, t n, c), in the dtype of `autocast`."""
        b, t = video.shape[0], video.shape[2]
        of_clips = getattr(self.module, "patch_tokens", self.module)
        with torch.autocast(video.device.type, self.autocast, enabled=self.autocast is not None):
            if self.reads == "clip":
                tokens = of_clips(video)
            else:
                tokens = self.module(video.transpose(1, 2).flatten(0, 1))
        return self._patches(tokens, b, t)

    def _patches(self, tokens: Any, b: int, t: int) -> Tensor:
        """Takes the extra tokens off, and refuses what cannot be the patches of b clips of t frames."""
        if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
            got = str(tokens.dtype) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"Teacher: the module must give a floating point tensor of tokens, got {got}; wrap it")
        x, shape = self.extra_tokens, tuple(tokens.shape)
        if self.reads == "clip":
            fits = (len(shape) == 3 and shape[0] == b) or (len(shape) == 4 and shape[:2] == (b, t))
            expected = f"({b}, {x} + {t} n, c) or ({b}, {t}, {x} + n, c)"
        else:
            fits = len(shape) == 3 and shape[0] == b * t
            expected = f"({b * t}, {x} + n, c)"
        patches = tokens[..., x:, :].reshape(b, -1, shape[-1]) if fits and shape[-2] > x else None
        if patches is None or patches.shape[1] % t:
            raise ValueError(
                f"Teacher: for {b} clips of {t} frames the module must give {expected} (reads={self.reads!r}, "
                f"extra_tokens={x}), got {shape}"
            )
        return patches


def load_teacher(
    source: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | None = None,
    reads: str = "clip",
    extra_tokens: int = 0,
    autocast: torch.dtype | None = torch.bfloat16,
    **options: Any,
) -> Teacher:
    """A teacher from a model's name and a checkpoint of it, or from a file of torch.export (.pt2).

    A name: options are those of `create_model`; `weights` is any file that `load_checkpoint` reads, a head in it is
        left out.  VideoMamba's files for clips (16 frames, the default) and for pictures both load; positions in time
        of a file for pictures are zero.  ValueError where the file leaves parameters as they were drawn.
    A file: it was exported in eval mode, for the device and the shapes of the training clips.
    `teacher.report` says what was loaded.
    """
    source = os.fspath(source)
    module: Any
    if source.endswith(".pt2"):
        if weights is not None or options:
            raise ValueError(f"load_teacher: {source} is a whole model: it takes no weights and no options of a model")
        if not os.path.isfile(source):
            raise ValueError(f"load_teacher: there is no file {source}")
        try:
            module = torch.export.load(source).module()
        except Exception as error:  # a damaged file can raise anything
            first = str(error).split("\n")[0][:120]
            raise ValueError(f"load_teacher: {source} is no file of torch.export ({first})") from None
        report = None
    else:
        if source not in list_models():
            raise ValueError(
                f"load_teacher: {source!r} is neither a .pt2 file of torch.export nor a model; "
                f"there are {', '.join(list_models())}"
            )
        if weights is None:
            raise ValueError(f"load_teacher: {source} without weights would teach noise: pass weights=")
        module = create_model(source, **options)
        if not hasattr(module, "patch_tokens"):
            raise ValueError(f"load_teacher: {source} gives no tokens of patches; take an encoder such as videomamba")
        report = load_checkpoint(module, weights, drop_head=True)
        drawn = [n for n in report.missing if not n.startswith("head.") and module.get_parameter(n).any()]
        if drawn:
            raise ValueError(
                f"load_teacher: {os.fspath(weights)} has no {', '.join(drawn)} for {source}, which would teach noise"
            )
    teacher = Teacher(module, reads=reads, extra_tokens=extra_tokens, autocast=autocast)
    teacher.report = report
    return teacher if device is None else teacher.to(device)
