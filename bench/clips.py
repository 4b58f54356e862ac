"""What `python -m bench run` times of clips: two blocks, whole models, and a training step.

A mark is a number of clips of 16 frames; blocks and models as in `frames`.  A ViT reads each frame alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bench import cases
from bench.providers import Alone, EndoMamba, Options, Prepared, Provider, Published, Subject, Twin, provider, reasons
from bench.worker import relative_error
from endomamba.models.layers import DropPath

FRAMES = 16


Kind = Callable[[Options], Subject]


def block_providers(options: Options) -> list[Provider]:
    """A spatial and a temporal block, one after the other."""
    kinds = [*endomambas(options), ("attention twin", Twin, "")]
    return [provider(name, partial(Blocks, kind, options), why) for name, kind, why in kinds]


def clip_providers(options: Options) -> list[Provider]:
    kinds = [*endomambas(options), ("attention twin", Twin, ""), ("ViT, each frame alone", Alone, "")]
    return [provider(name, partial(Clips, kind, options), why) for name, kind, why in kinds]


def training_providers(options: Options) -> list[Provider]:
    """Forward and backward of the mean square of the answers; on a GPU fp32 weights under bf16 autocast."""
    options = replace(options, weights=torch.float32)
    kinds = [*endomambas(options), ("attention twin", Twin, ""), ("ViT, each frame alone", Alone, "")]
    return [provider(name, partial(Training, kind, options), why) for name, kind, why in kinds]


def endomambas(options: Options) -> Iterator[tuple[str, Kind, str]]:
    for backend, why in reasons(options, "mixer_inner"):
        yield f"EndoMamba, {backend}", partial(EndoMamba, backend=backend), why
    yield "mamba-ssm, eager", Published, Published.missing()


class Blocks:
    """The first of the spatial and of the temporal blocks, on tokens of a normal distribution."""

    def __init__(self, kind: Kind, options: Options):
        self.subject, self.options = kind(options), options

    def run(self, model: nn.Module, hidden: Tensor) -> Tensor:
        hidden, residual = model.spatial_blocks[0](hidden, None)
        hidden, residual = model.temporal_blocks[0](hidden, residual)
        return hidden

    def tokens(self, clips: int, frames: int) -> Tensor:
        config = self.subject.model.config
        n = config.grid[0] * config.grid[1] + config.with_cls_token
        random = cases.Random(self.options.device)
        return random.normal(clips, frames, n, config.embed_dim).to(self.options.dtype)

    def error(self) -> float:
        hidden = self.tokens(1, 2)
        with torch.inference_mode():
            truth = self.run(self.subject.wide, hidden.double()).cpu()
            return relative_error(self.run(self.subject.model, hidden), [truth])

    def prepare(self, mark: int) -> Prepared:
        return Prepared(partial(self.run, self.subject.model, self.tokens(mark, FRAMES)), lambda: None, 0)


class Clips:
    """Logits of every frame of clips of 16 frames."""

    def __init__(self, kind: Kind, options: Options):
        self.subject, self.options = kind(options), options
        self.alone = isinstance(self.subject, Alone)

    def run(self, model: nn.Module, video: Tensor) -> Tensor:
        """video: (b, 3, t, h, w) -> (b, t, k)."""
        if not self.alone:
            return model(video)
        frames = video.transpose(1, 2).flatten(0, 1).unsqueeze(2)
        return model(frames).view(len(video), video.shape[2], -1)

    def videos(self, clips: int, frames: int = FRAMES) -> Tensor:
        size = self.options.size
        return cases.Random(self.options.device).normal(clips, 3, frames, size, size).to(self.options.dtype)

    def error(self) -> float:
        video = torch.cat(self.subject.frames, 2)
        with torch.inference_mode():
            return relative_error(
                self.run(self.subject.model, video), [self.run(self.subject.wide, video.double()).cpu()]
            )

    def prepare(self, mark: int) -> Prepared:
        return Prepared(partial(self.run, self.subject.model, self.videos(mark)), lambda: None, 0)


class Training(Clips):
    """Its error is that of all parameters' gradients together, for two frames of 64 pixels and four layers: in fp64,
    token by token, a whole model takes minutes.
    """

    slack = 5.0  # times the error of an answer: a gradient has gone twice the way

    def __init__(self, kind: Kind, options: Options):
        super().__init__(kind, options)
        self.small = kind(replace(options, size=64, depth=4))
        for model in (self.subject.model, self.small.model, self.small.wide):
            for module in model.modules():
                module.training = True
                if isinstance(module, DropPath):
                    module.rate = 0.0  # or each would drop rows of its own

    def gradients(self, model: nn.Module, video: Tensor) -> tuple[Tensor | None, ...]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        device = self.options.device.split(":")[0]
        half = device == "cuda" and video.dtype == torch.float32
        with torch.inference_mode(False), torch.enable_grad():
            with torch.autocast(device, torch.bfloat16, enabled=half):
                answers = self.run(model, video)
            loss = (answers.float() if half else answers).square().mean()
            return torch.autograd.grad(loss, parameters, allow_unused=True)

    def error(self) -> float:
        video = torch.cat(self.small.frames, 2)
        got = self.gradients(self.small.model, video)
        truth = self.gradients(self.small.wide, video.double())
        return relative_error(joined(got), [joined(truth)])

    def prepare(self, mark: int) -> Prepared:
        with torch.inference_mode(False):
            video = self.videos(mark)
        return Prepared(partial(self.gradients, self.subject.model, video), lambda: None, 0)


def joined(gradients: tuple[Tensor | None, ...]) -> Tensor:
    return torch.cat([g.double().flatten().cpu() for g in gradients if g is not None])
