"""Clips out of videos, with what is known of them.

Everything random is drawn from a generator keyed by (seed, epoch, number of the sample), so a clip does not depend on
the worker, the rank or the moment it is read in.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..clips import read_frames, read_kept
from ..video import NORMALISATIONS, VideoError, VideoInfo, normalisation
from .augment import CROPS, Change, centre, draw, stretch
from .errors import DataError
from .manifest import UNKNOWN, Entry, Manifest
from .plan import Sample, generator, seed_of
from .targets import BOXES, IGNORED, landmark_names, read_target

log = logging.getLogger("endomamba")

IGNORE = UNKNOWN  # the label of a frame that counts in no loss and no metric
ATTEMPTS = 10  # other clips tried where one cannot be decoded


@dataclass(frozen=True)
class ClipConfig:
    """How a clip is cut out of a video and what is done to its pictures."""

    frames: int = 16  # 0: all of an entry; such clips cannot share a batch
    stride: int = 1  # frames of the video from one frame of the clip to the next
    most_stride: int = 0  # training: each step is drawn from stride to this; 0: all are stride
    resize: str = "squash"  # to a square, or "short": the shorter side, in proportion
    decode: tuple[int, int] | None = None  # that side, drawn from this range; None: the model's; the first to evaluate
    crop: str = "none"
    centre: bool = True  # evaluating: the middle is cut out; False: the whole picture is squashed to the model
    flip: float = 0.0
    jitter: float = 0.0
    turn: float = 0.0  # degrees either way
    consistent: bool = True  # False: drawn anew for each frame, as some published recipes do
    stretch: bool = False  # each frame to the full range of grey levels
    normalise: str = "imagenet"

    def __post_init__(self) -> None:
        check_number(self, "frames", int, 0)
        check_number(self, "stride", int, 1)
        check_number(self, "most_stride", int, 0)
        if self.most_stride and (self.most_stride < self.stride or not self.frames):
            raise ValueError(
                f"ClipConfig: most_stride must be at least stride, of clips with frames >= 1, got {self.most_stride}, "
                f"{self.stride} and {self.frames}"
            )
        check_number(self, "turn", float, 0, 180)
        for name in ("centre", "consistent", "stretch"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"ClipConfig: {name} must be True or False, got {getattr(self, name)!r}")
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


class ClipDataset(Dataset):
    """dataset[Sample] -> video (3, t, size, size) uint8, label (t,) int64, fresh () bool, key () int64, sample, faults.

    targets: what else comes with a clip, of "mask" (t, size, size) uint8 of 0, 1, 255 (ignored), "box" (t, BOXES, 4),
    "landmarks" (t, K, 3), see targets.py.  sets: 0, or so many classes of which several may hold: label is (t, sets)
    then.  keep: GiB of decoded videos that stay in memory.  key: a seed of its own for each sample, for what else is
    drawn for it (masks of pre-training).  faults: in words, the clips that could not be decoded; another one is there
    in their place, or, with `tail`, a clip without labels.
    """

    def __init__(
        self,
        manifest: Manifest,
        entries: Sequence[Entry],
        clip: ClipConfig,
        size: int,
        seed: int,
        targets: Sequence[str] = (),
        sets: int = 0,
        keep: float = 0.0,
    ):
        self.files = [manifest.file(entry.path) for entry in entries]
        self.entries, self.clip, self.size, self.seed = tuple(entries), clip, size, seed
        self.sets, self.keep = sets, keep
        self.targets = {name: [_beside(manifest, entry, name) for entry in entries] for name in targets}
        for file in itertools.chain(self.files, *self.targets.values()):
            if not file.exists():
                raise DataError(f"{manifest.path}: {file} does not exist; `endomamba data check` looks at all files")
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
                return self._item(asked, self._read(sample), faults)
            except VideoError as error:
                faults.append(str(error))
                if asked.tail or not self.train:
                    return self._item(asked, self._unreadable(asked), faults)
                other = 1 + int(torch.randint(max(1, len(self.entries) - 1), (), generator=again))
                sample = sample._replace(entry=(sample.entry + other) % len(self.entries), start=None)
            except DataError as error:  # an exception would leave a worker with its traceback instead of its message
                return {"fatal": str(error)}
        return {"fatal": f"{ATTEMPTS} clips in a row could not be decoded, the last: {faults[-1]}"}

    def _item(self, sample: Sample, read: dict[str, Tensor], faults: list[str]) -> dict[str, Any]:
        key = seed_of(self.seed, sample.epoch, sample.number, sample.start or 0, 2)
        facts = {"fresh": torch.tensor(sample.fresh), "key": torch.tensor(key)}
        return read | facts | {"sample": sample, "faults": faults}

    def _unreadable(self, sample: Sample) -> dict[str, Tensor]:
        """A black clip of which nothing counts."""
        t = self.clip.frames or len(self.entries[sample.entry])
        shapes = {"mask": (self.size, self.size), "box": (BOXES, 4)}
        if "landmarks" in self.targets:
            shapes["landmarks"] = (len(landmark_names(self.targets["landmarks"][sample.entry])), 3)
        clip = {"video": torch.zeros(3, t, self.size, self.size, dtype=torch.uint8), "label": self._no_label(t)}
        return clip | {name: _ignored(name, torch.zeros(t, *shapes[name])) for name in self.targets}

    def _no_label(self, t: int) -> Tensor:
        return torch.full((t, self.sets) if self.sets else (t,), IGNORE)

    def _read(self, sample: Sample) -> dict[str, Tensor]:
        clip, entry = self.clip, self.entries[sample.entry]
        # One draw for all windows of a stream: the picture must not jump where one window ends.
        rng = generator(self.seed, sample.epoch, sample.entry if sample.tail else sample.number)
        count = clip.frames or -(-len(entry) // clip.stride)
        offsets = clip.stride * np.arange(count)
        if clip.most_stride and self.train and not sample.tail:
            steps = torch.randint(clip.stride, clip.most_stride + 1, (count - 1,), generator=rng)
            offsets[1:] = steps.cumsum(0).numpy()
        drawn = int(torch.randint(max(1, len(entry) - int(offsets[-1])), (), generator=rng))
        start = drawn if sample.start is None else sample.start
        numbers = entry.start + start + offsets
        inside = numbers < entry.stop
        numbers = np.where(inside, numbers, numbers[inside][-1])
        pictures = self._pictures(self.files[sample.entry], [int(n) for n in numbers], rng)
        changes = self._changes(*pictures.shape[:3], rng)
        if clip.stretch:
            pictures = stretch(pictures)
        parts = zip(changes, pictures.split(count // len(changes)))
        read = {"video": torch.cat([change.pictures(part) for change, part in parts], 1)}
        read["label"] = self._label(entry, numbers - entry.start)
        for name, paths in self.targets.items():
            places = np.split(numbers, len(changes))
            read[name] = torch.cat(
                [read_target(name, paths[sample.entry], [int(n) for n in at], c) for c, at in zip(changes, places)]
            )
        if sample.tail:
            behind = ~torch.from_numpy(inside)
            read["label"][behind] = IGNORE
            for name in self.targets:
                read[name][behind] = _ignored(name, read[name][behind])
        return read

    def _changes(self, t: int, h: int, w: int, rng: torch.Generator) -> list[Change]:
        """One for all frames, or, where they need not be consistent, one for each."""
        clip = self.clip
        if not self.train:
            return [centre(h, w, self.size)]
        of = (h, w, self.size, clip.crop, clip.flip, clip.jitter, clip.turn)
        return [draw(*of, rng) for _ in range(1 if clip.consistent else t)]

    def _label(self, entry: Entry, places: np.ndarray) -> Tensor:
        """places: of frames within the entry -> (t,) or (t, sets) int64."""
        if entry.label is None:
            return self._no_label(len(places))
        labels = entry.label_sets(self.sets) if self.sets else entry.labels()
        return torch.from_numpy(labels[places])

    def _pictures(self, file: Path, numbers: list[int], rng: torch.Generator) -> Tensor:
        """(t, h, w, 3) uint8, of the size that the changes begin with."""
        least, most = self.clip.decode or (self.size, self.size)
        whole = not self.train and not self.clip.centre
        side = int(torch.randint(least, most + 1, (), generator=rng)) if self.train else least
        squashed = self.size if whole else side if self.clip.resize == "squash" else 0

        def size(info: VideoInfo) -> tuple[int, int]:
            if squashed:
                return squashed, squashed
            shorter = min(info.height, info.width)
            return round(info.height * side / shorter), round(info.width * side / shorter)

        if self.keep:
            return read_kept(file, numbers, size, (squashed, side), self.keep * 2**30)
        return read_frames(file, numbers, size)


def _beside(manifest: Manifest, entry: Entry, name: str) -> Path:
    beside = getattr(entry, name)
    if beside is None:
        raise DataError(f"{manifest.path}: {entry} names no file for {name}")
    return manifest.file(beside)


def _ignored(name: str, target: Tensor) -> Tensor:
    """A target of which nothing counts: pixels of 255, no box, landmarks whose visibility is NaN."""
    return torch.full_like(target, IGNORED, dtype=torch.uint8) if name == "mask" else torch.full_like(target, np.nan)


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
    """Names in the log the clips that an evaluation goes without; DataError where it cannot go on."""
    if "fatal" in batch:
        raise DataError(batch["fatal"])
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


def load(dataset: ClipDataset, batches: Any, workers: int, pin: bool) -> Iterator[dict[str, Any]]:
    loader: DataLoader = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    return _handed_over(iter(loader))  # made here: it draws a seed, which is none of the first step's random numbers


def _handed_over(batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The batches.  A worker that dies just while it hands one over is told of as one that dies at any other time."""
    try:
        yield from batches
    except (EOFError, ConnectionError) as error:
        raise RuntimeError(f"DataLoader worker went away with a batch: {error}") from error
