"""What paired times say: a ratio, its bootstrap interval, and a verdict that may ask for more rounds.

A round gives each side several calls in turn, A B B A, so that what disturbs the machine disturbs both.  A side's time
in a round is a low quantile of its calls: a neighbour on the machine only ever adds time.  What is left is judged by
the ratio of each round, never by the times of one side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOW = 0.25  # the quantile of a round's calls: below most disturbances, and not the one luckiest call
RESAMPLES = 10_000


@dataclass(frozen=True)
class Ratio:
    """Head by base: the middle and the ends of the interval."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} [{self.low:.3f}, {self.high:.3f}]"


def paired_ratios(base: Sequence[Sequence[float]], head: Sequence[Sequence[float]]) -> np.ndarray:
    """Head by base of each round, from the times of its calls."""
    return np.array([np.quantile(h, LOW) / np.quantile(b, LOW) for b, h in zip(base, head, strict=True)])


def bootstrap(ratios: np.ndarray, alpha: float, seed: int = 0) -> Ratio:
    """The median of the ratios of rounds with the interval that misses the truth with probability alpha."""
    drawn = np.random.default_rng(seed).choice(ratios, (RESAMPLES, len(ratios)))
    return _interval(np.median(ratios), np.median(drawn, axis=1), alpha)


def unpaired(base: Sequence[float], head: Sequence[float], alpha: float, seed: int = 0) -> Ratio:
    """The same of two runs that were not interleaved: how the machine differed between them is in it, unseen."""
    random = np.random.default_rng(seed)

    def resampled(times):
        return np.quantile(random.choice(np.asarray(times), (RESAMPLES, len(times))), LOW, axis=1)

    return _interval(np.quantile(head, LOW) / np.quantile(base, LOW), resampled(head) / resampled(base), alpha)


def _interval(middle: float, drawn: np.ndarray, alpha: float) -> Ratio:
    low, high = np.quantile(drawn, [alpha / 2, 1 - alpha / 2])
    return Ratio(float(middle), float(low), float(high))


def verdict(ratio: Ratio, threshold: float) -> str:
    """ "slower": surely by more than the threshold.  "fine": surely not.  "undecided": more rounds may tell."""
    return "slower" if ratio.low > threshold else "fine" if ratio.high < threshold else "undecided"


def looks(rounds: int, first: int = 30) -> list[int]:
    """After how many rounds a verdict is tried: doubling, up to `rounds`."""
    steps = max(0, math.ceil(math.log2(max(1, rounds / first))))
    return sorted({min(rounds, first * 2**i) for i in range(steps + 1)})


def low(rounds: Sequence[Sequence[float]]) -> float:
    """The time of one side, for reading: the low quantile of all its calls."""
    return round(float(np.quantile(np.concatenate([np.asarray(calls) for calls in rounds]), LOW)), 2)


def ratio_of_medians(base: Sequence[float], head: Sequence[float], alpha: float, seed: int = 0) -> Ratio:
    """Of two sides timed in the same rounds; a round is drawn with both its times."""
    sides = np.stack([np.asarray(head), np.asarray(base)])
    rounds = np.random.default_rng(seed).integers(0, sides.shape[1], (RESAMPLES, sides.shape[1]))
    drawn, middle = np.median(sides[:, rounds], axis=2), np.median(sides, axis=1)
    return _interval(middle[0] / middle[1], drawn[0] / drawn[1], alpha)
