"""Which clips step k trains on.

A plan is a function of the step alone: a run that is resumed at step k asks for step k, however many batches the
workers of the killed run had read ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch


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


def seed_of(*key: int) -> int:
    """A seed of its own for each key."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


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
