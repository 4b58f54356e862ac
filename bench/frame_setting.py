"""What the cases of `bench frame` share: the model, streams of it, pictures, and the fp64 truth."""

from __future__ import annotations

import argparse
import copy
from functools import cached_property, partial


class Setting:
    """The model, the same in fp64, and pictures; the model is made when the first case asks."""

    def __init__(self, args: argparse.Namespace, frames: tuple[int, int | None], large: tuple[int, int]):
        import torch

        from bench.providers import Options

        self.args, self.gpu, self.large = args, args.device.startswith("cuda"), large
        self.options = Options(args.device, args.model, *frames)
        self.dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype]
        self._truths = {}
        self.lengths = (12, 12, 24) if args.quick else (1000, 200, 2000)  # of the films, and of the long stream

    @cached_property
    def model(self):
        more = dict(dt_init="mamba", dt_min=1e-4, dt_max=1e-1, backend=self.args.backend)
        made = self.options.create(f"endomamba_{self.args.model}", **more)
        return made.eval().to(self.args.device, self.dtype)

    @cached_property
    def vit(self):
        from bench.providers import Compiled, Graphed

        return Graphed(partial(Compiled, self.options))

    @cached_property
    def published(self):
        from bench.providers import Graphed, Published

        return Graphed(partial(Published, self.options))

    def picture(self, size: tuple[int, int], number: int = 0, pinned: bool = False):
        import torch

        generator = torch.Generator().manual_seed(number)
        rgb = torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=generator)
        return rgb.pin_memory() if pinned and self.gpu else rgb

    @property
    def own(self) -> tuple[int, int]:
        return (self.options.size, self.options.size)

    def stream(self, streams: int = 1, size: tuple[int, int] | None = None, graph: bool | None = None):
        from endomamba.stream import FrameStream

        return FrameStream(self.model, streams, sizes=[size] if size else (), graph=graph)

    def error(self, streams: int = 1, size: tuple[int, int] | None = None, graph: bool | None = None) -> float:
        """Of the third of three frames, read one by one: relative, in norm, by the fp64 parallel pass."""
        from bench.worker import relative_error

        camera, size = self.stream(streams, size, graph), size or self.own
        for number in range(3):
            got = camera([self.picture(size, number)] * streams)
        if size not in self._truths:
            self._truths[size] = self.truth(size)
        return max(relative_error(row.unsqueeze(0), [self._truths[size]]) for row in got)

    def truth(self, size: tuple[int, int]):
        """(1, k) in fp64, on the CPU."""
        import torch

        from endomamba.video import preprocess

        wide = copy.deepcopy(self.model).double()
        for module in wide.modules():
            if hasattr(module, "backend"):
                module.backend = "reference"
        clip = torch.stack([preprocess(self.picture(size, number), self.options.size) for number in range(3)], 1)
        with torch.inference_mode():
            return wide(clip.unsqueeze(0).double().to(self.args.device))[:, -1].cpu()
