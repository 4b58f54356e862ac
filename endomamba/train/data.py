"""Clips out of videos, and which of them step k trains on.

Everything random is drawn from a generator keyed by (seed, epoch, number of the sample), so a clip does not depend on
the worker, the rank or the moment it is read in.  A plan is a function of the step alone: a run that is resumed at step
k asks for step k, however many batches the workers of the killed run had read ahead.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..clips import read_frames
from ..video import NORMALISATIONS, VideoError, VideoInfo, normalisation
from .augment import CROPS, augment, centre
from .manifest import DataError, Entry, Manifest

log = logging.getLogger("endomamba")

IGNORE = -100  # the label of a frame that counts in no loss and no metric
ATTEMPTS = 10  # other clips tried where one cannot be decoded


class Sample(NamedTuple):
    """Which clip to read.  number: of the sample within its epoch.  start: first frame within the entry; None: drawn.

    fresh: a stream begins with it.  tail: frames behind the end of the entry are ignored, not repeated.
    """

    entry: int
    epoch: int
    number: int
    start: int | None = None
    fresh: bool = True
    tail: bool = False


@dataclass(frozen=True)
class ClipConfig:
    """How a clip is cut out of a video and what is done to its pictures."""

    frames: int = 16
    stride: int = 1  # frames of the video from one frame of the clip to the next
    resize: str = "squash"  # to a square, or "short": the shorter side, in proportion
    decode: tuple[int, int] | None = None  # that side, drawn from this range; None: the model's; the first to evaluate
    crop: str = "none"
    flip: float = 0.0
    jitter: float = 0.0
    normalise: str = "imagenet"

    def __post_init__(self) -> None:
        for name in ("frames", "stride"):
            check_number(self, name, int, 1)
        for name in ("flip", "jitter"):
            check_number(self, name, float, 0, 1)
        for name, names in (("resize", ("squash", "short")), ("crop", CROPS), ("normalise", tuple(NORMALISATIONS))):
            if getattr(self, name) not in names:
                raise ValueError(f"ClipConfig: {name} must be one of {names}, got {getattr(self, name)!r}")
        if self.decode is not None:
            object.__setattr__(self, "decode", tuple(self.decode))
            if len(self.decode) != 2 or not 1 <= self.decode[0] <= self.decode[1]:
                raise ValueError(f"ClipConfig: decode must be (least, most) pixels, got {self.decode}")
        if self.crop == "none" and (self.resize == "short" or self.decode is not None):
            raise ValueError("ClipConfig: resize='short' and decode need a crop; crop='none' squashes to the model")


def check_number(config: Any, name: str, kind: type, least: float, most: float = float("inf")) -> None:
    """ValueError where a field of a config is no number of this kind and range."""
    value = getattr(config, name)
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if isinstance(value, bool) or not right or not least <= value <= most:
        upto = "" if most == float("inf") else f" and at most {most}"
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{type(config).__name__}: {name} must be {what} of at least {least}{upto}, got {value!r}")


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(_seed(*key))


# ---- a clip


class ClipDataset(Dataset):
    """dataset[Sample] -> video (3, t, size, size) uint8, label (t,) int64, fresh () bool, key () int64, sample, faults.

    key: a seed of its own for each sample, for what else is drawn for it (masks).  faults: in words, the clips that
    could not be decoded; another one is there in their place, or, with `tail`, a clip without labels.
    """

    def __init__(self, manifest: Manifest, entries: Sequence[Entry], clip: ClipConfig, size: int, seed: int):
        self.files = [manifest.file(entry.path) for entry in entries]
        self.entries, self.clip, self.size, self.seed = tuple(entries), clip, size, seed
        gone = next((file for file in self.files if not file.exists()), None)
        if gone is not None:
            raise DataError(f"{manifest.path}: {gone} does not exist; `endomamba data check` looks at all files")
        if clip.decode is not None and clip.decode[0] < size:
            raise ValueError(f"ClipDataset: decode must be at least the model's {size} pixels, got {clip.decode}")
        self.train = True  # False: nothing is drawn, the middle is cut out

    def __len__(self) -> int:
        return len(self.entries)

    def describe(self, sample: Sample) -> str:
        entry = self.entries[sample.entry]
        return f"{entry}" if sample.start is None else f"{entry} from frame {entry.start + sample.start}"

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        faults: list[str] = []
        again = generator(self.seed, sample.epoch, sample.number, 1)
        asked = sample
        for _ in range(ATTEMPTS):
            try:
                video, label = self._read(sample)
                return self._item(asked, video, label, faults)
            except VideoError as error:
                faults.append(str(error))
                if asked.tail or not self.train:
                    empty = torch.zeros(3, self.clip.frames, self.size, self.size, dtype=torch.uint8)
                    return self._item(asked, empty, torch.full((self.clip.frames,), IGNORE), faults)
                other = 1 + int(torch.randint(max(1, len(self.entries) - 1), (), generator=again))
                sample = sample._replace(entry=(sample.entry + other) % len(self.entries), start=None)
        # An exception would leave a worker with its traceback instead of its message.
        return {"fatal": f"{ATTEMPTS} clips in a row could not be decoded, the last: {faults[-1]}"}

    def _item(self, sample: Sample, video: Tensor, label: Tensor, faults: list[str]) -> dict[str, Any]:
        key = _seed(self.seed, sample.epoch, sample.number, sample.start or 0, 2)
        fresh = torch.tensor(sample.fresh)
        return {"video": video, "label": label, "fresh": fresh, "key": torch.tensor(key), "sample": sample,
                "faults": faults}  # fmt: skip

    def _read(self, sample: Sample) -> tuple[Tensor, Tensor]:
        clip, entry = self.clip, self.entries[sample.entry]
        # One draw for all windows of a stream: the picture must not jump where one window ends.
        rng = generator(self.seed, sample.epoch, sample.entry if sample.tail else sample.number)
        span = (clip.frames - 1) * clip.stride + 1
        drawn = int(torch.randint(max(1, len(entry) - span + 1), (), generator=rng))
        start = drawn if sample.start is None else sample.start
        numbers = entry.start + start + clip.stride * np.arange(clip.frames)
        inside = numbers < entry.stop
        numbers = np.where(inside, numbers, numbers[inside][-1])
        pictures = read_frames(self.files[sample.entry], [int(n) for n in numbers], self._side(rng))
        label = torch.full((clip.frames,), IGNORE)
        if entry.label is not None:
            label = torch.from_numpy(entry.labels()[numbers - entry.start])
        if sample.tail:
            label = label.masked_fill(~torch.from_numpy(inside), IGNORE)
        if self.train:
            return augment(pictures, self.size, clip.crop, clip.flip, clip.jitter, rng), label
        return centre(pictures, self.size), label

    def _side(self, rng: torch.Generator) -> Callable[[VideoInfo], tuple[int, int]]:
        least, most = self.clip.decode or (self.size, self.size)
        side = int(torch.randint(least, most + 1, (), generator=rng)) if self.train else least

        def size(info: VideoInfo) -> tuple[int, int]:
            if self.clip.resize == "squash":
                return side, side
            shorter = min(info.height, info.width)
            return round(info.height * side / shorter), round(info.width * side / shorter)

        return size


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors are stacked, the rest becomes lists: `samples`, and `faults` of all."""
    for item in items:
        if "fatal" in item:
            return {"fatal": item["fatal"]}
    tensors = [name for name, value in items[0].items() if isinstance(value, Tensor)]
    batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in tensors}
    return batch | {
        "samples": [item["sample"] for item in items],
        "faults": [fault for item in items for fault in item["faults"]],
    }


def left_out(batch: dict[str, Any]) -> None:
    """Names in the log the clips that an evaluation goes without."""
    for fault in batch["faults"]:
        log.warning("a clip could not be decoded and is left out: %s", fault)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


class Normalise:
    """(b, 3, t, h, w) uint8 -> fp32 as the model wants it, on the device that the clip is on."""

    def __init__(self, name: str, device: torch.device):
        self.scale, self.shift = (t.unsqueeze(-1).to(device) for t in normalisation(**NORMALISATIONS[name]))

    def __call__(self, video: Tensor) -> Tensor:
        return torch.addcmul(self.shift, video.float(), self.scale)


# ---- which clips


class Plan(Protocol):
    """plan(step): the samples of that step over all processes, always the same ones."""

    per_epoch: float  # steps

    def __call__(self, step: int) -> list[Sample]: ...


class ClipPlan:
    """Every clip of every entry once an epoch, in a new order each time.

    A batch may begin in one epoch and end in the next, so that none is dropped.
    """

    def __init__(self, entries: int, batch_size: int, seed: int, clips_per_entry: int = 1):
        self.entries, self.batch_size, self.seed = entries, batch_size, seed
        self.epoch_size = entries * clips_per_entry
        self.per_epoch = self.epoch_size / batch_size
        self._order = functools.lru_cache(maxsize=2)(self._shuffle)

    def __call__(self, step: int) -> list[Sample]:
        samples = []
        for i in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(i, self.epoch_size)
            number = self._order(epoch)[place]
            samples.append(Sample(number % self.entries, epoch, number))
        return samples

    def _shuffle(self, epoch: int) -> list[int]:
        return torch.randperm(self.epoch_size, generator=generator(self.seed, epoch, -1 % 2**32)).tolist()


class StreamPlan:
    """`batch_size` streams walk through whole videos, a window a step; one that has ended goes on with the next video.

    Row i of step k + 1 continues row i of step k, or is `fresh`.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, window: int, seed: int):
        self.lengths, self.batch_size, self.window, self.seed = list(lengths), batch_size, window, seed
        self.per_epoch = sum(-(-length // window) for length in lengths) / batch_size
        self._restart()

    def _restart(self) -> None:
        self._step, self._drawn = -1, 0
        self._rows: list[Sample] = []
        self._order: list[int] = []

    def _next_video(self) -> Sample:
        epoch, place = divmod(self._drawn, len(self.lengths))
        if place == 0:
            self._order = torch.randperm(len(self.lengths), generator=generator(self.seed, epoch, -1 % 2**32)).tolist()
        self._drawn += 1
        return Sample(self._order[place], epoch, self._drawn - 1, start=0, fresh=True, tail=True)

    def _continue(self, row: Sample) -> Sample:
        start = (row.start or 0) + self.window
        return row._replace(start=start, fresh=False) if start < self.lengths[row.entry] else self._next_video()

    def __call__(self, step: int) -> list[Sample]:
        """A step behind the last one is a few additions a row; one before it begins anew."""
        if step < self._step:
            self._restart()
        while self._step < step:
            rows = self._rows
            self._rows = [self._continue(rows[i]) if rows else self._next_video() for i in range(self.batch_size)]
            self._step += 1
        return list(self._rows)


def share(samples: list[Sample], rank: int, ranks: int, part: int, parts: int) -> list[Sample]:
    """What one process reads for one of the parts it computes a step in; all shares together are the batch in order."""
    size = len(samples) // (ranks * parts)
    at = (rank * parts + part) * size
    return samples[at : at + size]


@dataclass(frozen=True)
class Shares:
    """Iterates over the batches of one process, from a step on: what a DataLoader asks for."""

    plan: Plan
    first: int
    last: int
    rank: int
    ranks: int
    parts: int

    def __iter__(self) -> Iterator[list[Sample]]:
        for step in range(self.first, self.last):
            samples = self.plan(step)
            for part in range(self.parts):
                yield share(samples, self.rank, self.ranks, part, self.parts)


def load(dataset: ClipDataset, batches: Any, workers: int, pin: bool) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
