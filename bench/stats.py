"""What paired times say: a ratio, its bootstrap interval, and a verdict that may ask for more rounds.

A round gives each side several calls in turn, A B B A, so that what disturbs the machine disturbs both.  A side's time
in a round is a low quantile of its calls: a neighbour on the machine only ever adds time.  What is left is judged by
the ratio of each round, never by the times of one side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

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


@dataclass(frozen=True)
class Trend(Ratio):
    """A slope and the ends of its interval; block: how many neighbours were drawn together."""

    block: int


def trend(values: Sequence[float], alpha: float = 0.05, seed: int = 0, resamples: int = 2000) -> Trend:
    """The least-squares slope of values on their number, and the interval that misses the truth with probability alpha.

    Neighbours may hang together: what is left beside the line is drawn again in blocks (Kunsch 1989), three times as
    long as its autocorrelation reaches, but there are eight at least.  So few are widened as Student would.
    """
    y = np.asarray(values, dtype=float)
    n, t = len(y), np.arange(len(y)) - (len(y) - 1) / 2
    slope = t @ y / (t @ t)
    rest = y - y.mean() - slope * t
    block = min(max(1, n // 8), max(round(n ** (1 / 3)), math.ceil(3 * reach(rest))))
    starts = np.random.default_rng(seed).integers(0, n, (resamples, -(-n // block)))
    places = (starts[:, :, None] + np.arange(block)).reshape(resamples, -1)[:, :n] % n
    low, high = np.quantile(rest[places] @ t / (t @ t), [alpha / 2, 1 - alpha / 2])
    free = max(1.0, n / block - 2)
    wider = math.sqrt((free + 2) / free) * (1 + (NormalDist().inv_cdf(1 - alpha / 2) ** 2 + 1) / (4 * free))
    return Trend(float(slope), float(slope - wider * high), float(slope - wider * low), block)


def reach(rest: np.ndarray) -> float:
    """Integrated autocorrelation time, 1 where neighbours know nothing of each other: summed up to where it is lost in
    noise."""
    n = len(rest)
    spectrum = np.fft.rfft(rest - rest.mean(), 2 * n)
    covariance = np.fft.irfft(spectrum * spectrum.conj())[:n]
    if covariance[0] <= 0:
        return 1.0
    correlation = covariance / covariance[0]
    lost = np.flatnonzero(correlation < 2 / math.sqrt(n))
    return float(1 + 2 * correlation[1 : lost[0] if len(lost) else n].sum())
