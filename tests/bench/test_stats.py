"""The statistics of the gate on made-up times: of a quiet machine, and of one that others use."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import pair, stats
from bench.pair import Options
from bench.stats import reach, trend


class MadeUp:
    """In place of a Pair: a machine in one of two states, 1.7 apart, that lasts a few calls; jitter; a rare hiccup.

    As times of one op on a virtual machine with two cores that others use too.
    """

    def __init__(self, slower: float, seed: int, drift: float = 0.0):
        self.slower, self.random, self.drift, self.calls = slower, np.random.default_rng(seed), drift, 0

    def slice(self, calls: int, factor: float) -> list[float]:
        state = 1.7 if self.random.random() < 0.6 else 1.0
        times = 450 * factor * state * np.exp(0.08 * self.random.standard_normal(calls))
        self.calls += calls
        return list((times + 4000 * (self.random.random(calls) < 0.02)) * (1 + self.drift) ** self.calls)

    def both(self, do: str, name: str, calls: int) -> tuple:
        return {"us": self.slice(calls, 1.0)}, {"us": self.slice(calls, self.slower)}

    def round(self, name: str, calls: int, warm: bool) -> tuple[list[float], list[float]]:
        one = self.slice(calls, 1.0)
        two = self.slice(calls, self.slower) + self.slice(calls, self.slower)
        return one + self.slice(calls, 1.0), two


def verdicts(slower: float, runs: int, **more) -> list[dict]:
    options = Options(Path("no cases"))
    return [pair.measure(MadeUp(slower, seed, **more), "made up", options, cases=3) for seed in range(runs)]


def test_unchanged_code_is_hardly_ever_slower():
    found = verdicts(1.0, 40)
    assert sum(row["verdict"] == "slower" for row in found) == 0
    assert sum(row["verdict"] == "fine" for row in found) >= 38


def test_a_quarter_slower_is_found():
    found = verdicts(1.25, 40)
    assert sum(row["verdict"] == "slower" for row in found) >= 38
    assert 1.2 < np.median([row["ratio"] for row in found]) < 1.3
    assert sum(row["interval"][0] <= 1.25 <= row["interval"][1] for row in found) >= 36


def test_a_machine_that_slows_down_is_no_finding():
    """Both sides drift alike; a base measured first and a head measured last would differ by 2.7 times here."""
    found = verdicts(1.0, 15, drift=2e-4)
    assert not [row for row in found if row["verdict"] == "slower"]


def test_a_case_near_the_threshold_gets_all_rounds_and_stays_undecided():
    row = pair.measure(MadeUp(1.10, 0), "made up", Options(Path("no cases"), rounds=120), cases=1)
    assert row["verdict"] == "undecided" and row["rounds"] == 120


def test_long_cases_stop_after_their_seconds():
    row = pair.measure(MadeUp(1.10, 0), "made up", Options(Path("no cases"), seconds=0.0), cases=1)
    assert row["rounds"] == 30


def test_throttling_is_refused(monkeypatch):
    from bench import machine

    monkeypatch.setattr(machine, "slowed_down", lambda device: ["too hot (driver)"])
    with pytest.raises(machine.Refused, match="too hot"):
        pair.measure(MadeUp(1.0, 0), "made up", Options(Path("no cases"), device="cuda"), cases=1)


def test_the_same_numbers_every_time():
    ratios = np.random.default_rng(3).lognormal(0.1, 0.2, 40)
    assert stats.bootstrap(ratios, 0.01) == stats.bootstrap(ratios, 0.01)
    assert stats.bootstrap(ratios, 0.01) != stats.bootstrap(ratios, 0.01, seed=1)


def test_interval_narrows_and_widens():
    ratios = np.random.default_rng(3).lognormal(0.0, 0.1, 400)
    wide, narrow = stats.bootstrap(ratios[:40], 0.01), stats.bootstrap(ratios, 0.01)
    assert wide.low < narrow.low < 1 < narrow.high < wide.high
    surer = stats.bootstrap(ratios, 0.001)
    assert surer.low < narrow.low and narrow.high < surer.high


def test_pairs_cancel_what_both_sides_see():
    speed = np.random.default_rng(0).uniform(1, 3, 50)
    base = [[100 * s, 101 * s, 99 * s, 400 * s] for s in speed]  # the last call was disturbed
    head = [[125 * s, 126.25 * s, 123.75 * s, 130 * s] for s in speed]
    np.testing.assert_allclose(stats.paired_ratios(base, head), 1.25, rtol=1e-2)
    with pytest.raises(ValueError, match="shorter"):
        stats.paired_ratios(base, head[:-1])


@pytest.mark.parametrize(
    ("low", "high", "says"), [(1.11, 1.3, "slower"), (0.9, 1.09, "fine"), (1.05, 1.2, "undecided")]
)
def test_verdict(low, high, says):
    assert stats.verdict(SimpleNamespace(low=low, high=high), 1.10) == says


@pytest.mark.parametrize(
    ("rounds", "says"), [(480, [30, 60, 120, 240, 480]), (100, [30, 60, 100]), (30, [30]), (7, [7])]
)
def test_looks_double(rounds, says):
    assert stats.looks(rounds) == says


def test_ratio_of_medians_by_hand_and_its_interval():
    base, head = [1.0, 2.0, 3.0, 100.0, 2.5], [4.0, 5.0, 6.0, 5.0, 400.0]
    ratio = stats.ratio_of_medians(base, head, 0.05)
    assert ratio.middle == 5.0 / 2.5 and ratio.low <= ratio.middle <= ratio.high
    steady = stats.ratio_of_medians([2.0] * 9, [3.0] * 9, 0.05)
    assert (steady.low, steady.middle, steady.high) == (1.5, 1.5, 1.5)


def noise(rho: float, n: int, seed: int) -> np.ndarray:
    """Neighbours that hang together: rho of the one before, and something new."""
    new, values = np.random.default_rng(seed).normal(size=n + 300), np.zeros(n + 300)
    for i in range(1, len(values)):
        values[i] = rho * values[i - 1] + new[i]
    return values[300:]


@pytest.mark.parametrize("rho", [0.0, 0.95])
def test_a_trend_that_is_not_there_is_seldom_found(rho):
    """Of 40 series 2 are expected outside of the interval; least squares alone would call half of the second trends."""
    found = [trend(noise(rho, 800, seed), resamples=300) for seed in range(40)]
    assert sum(each.low <= 0 <= each.high for each in found) >= 33
    assert all(each.low < each.middle < each.high for each in found)
    plain = [
        abs(each.middle) < 1.96 * noise(rho, 800, seed).std() * (12 / 800**3) ** 0.5 for seed, each in enumerate(found)
    ]
    assert sum(plain) >= 33 if rho == 0 else sum(plain) <= 25


def test_a_trend_that_is_there_is_found():
    line = 0.01 * np.arange(800)
    for rho in (0.0, 0.9):
        each = trend(noise(rho, 800, 7) + line)
        assert 0 < each.low < 0.01 < each.high < 0.02
    exact = trend(line)
    assert exact.middle == pytest.approx(0.01) and exact.high - exact.low < 1e-9


def test_how_far_neighbours_reach():
    assert reach(noise(0.0, 4000, 1)) == pytest.approx(1, abs=0.3)
    assert reach(noise(0.9, 4000, 1)) == pytest.approx(19, rel=0.3)
    assert reach(np.ones(50)) == 1
