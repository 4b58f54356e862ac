"""What a run tells while it goes on: metrics.jsonl, TensorBoard, and a bar or lines on standard error."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint
from .config import TrainConfig
from .errors import TrainError
from .world import World


class Progress:
    """metrics.jsonl, TensorBoard and progress, written by the first process; a resumed run continues all three."""

    def __init__(self, out: Path, first: int, steps: int, world: World, config: TrainConfig):
        self.out, self.first, self.steps, self.world, self.config = out, first, steps, world, config
        self.active = world.rank == 0
        self.at, self.clock = first, time.monotonic()

    def __enter__(self) -> Progress:
        if not self.active:
            return self
        try:
            from torch.utils.tensorboard import SummaryWriter
            from tqdm import tqdm
        except ImportError as error:
            raise TrainError(f"training needs tensorboard and tqdm: pip install endomamba[train]  ({error})") from None
        path = self.out / "metrics.jsonl"
        self._keep_lines(path)
        self.lines = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.first)
        tty = sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=self.first, unit="step", disable=not tty, dynamic_ncols=True)
        return self

    def __exit__(self, *exc: object) -> None:
        if self.active:
            self.bar.close()
            self.board.close()
            self.lines.close()

    def _keep_lines(self, path: Path) -> None:
        """Those up to the checkpoint; what a killed run wrote after it comes again."""
        if path.exists():
            whole = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
            kept = [line for line in whole if json.loads(line)["step"] <= self.first]
            checkpoint.write_atomically(path, lambda file: file.write("".join(f"{x}\n" for x in kept).encode()))

    def train(self, done: int, values: dict[str, float]) -> None:
        if not self.active:
            return
        now = time.monotonic()
        rate = (done - self.at) * self.config.batch_size / max(1e-9, now - self.clock)
        left = (self.steps - done) * (now - self.clock) / (done - self.at)
        self.at, self.clock = done, now
        memory = self._memory()
        self._write(done, "train", values | {"clips_per_second": rate, "memory_gib": memory})
        text = f"loss {values['loss']:.4g}, {rate:.4g} clips/s, {memory:.2f} GiB, {_clock(left)} left"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(done - self.bar.n)
        if self.bar.disable:
            print(f"step {done} of {self.steps}: {text}", file=sys.stderr, flush=True)

    def judged(self, done: int, values: Mapping[str, float | Tensor]) -> None:
        """Numbers go to the log, pictures (h, w, 3) uint8 to TensorBoard and OUT/NAME-STEP.png."""
        if not self.active:
            return
        self.at, self.clock = done, time.monotonic()
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._show(done, name, value)
        numbers = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        if numbers:
            self._write(done, "eval", numbers)
            text = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            self.bar.write(f"step {done}, evaluated: {text}", file=sys.stderr)

    def _show(self, done: int, name: str, picture: Tensor) -> None:
        from PIL import Image

        self.board.add_image(f"eval/{name}", picture.numpy(), done, dataformats="HWC")
        image = Image.fromarray(picture.numpy())
        checkpoint.write_atomically(self.out / f"{name}-{done:08d}.png", lambda file: image.save(file, "PNG"))

    def _write(self, done: int, kind: str, values: dict[str, float]) -> None:
        numbers = {name: None if value != value else value for name, value in values.items()}  # JSON has no NaN
        self.lines.write(json.dumps({"step": done, "kind": kind, **numbers}) + "\n")
        self.lines.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, done)

    def _memory(self) -> float:
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
