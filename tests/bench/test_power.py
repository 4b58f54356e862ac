"""The driver that counts the gate's errors: what it plants, and how it counts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import ab_power

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("percent", [5, 10, 25])
def test_the_planted_line_is_there_and_repeats_that_much(percent):
    assert (ROOT / ab_power.KERNEL).read_text().count(ab_power.WHOLE) == 1
    assert f"task * {percent} / 100 != (task + 1) * {percent} / 100" in ab_power.AGAIN.format(percent=percent)
    assert sum(task * percent // 100 != (task + 1) * percent // 100 for task in range(2000)) == 20 * percent


def test_the_kernel_planted_in_on_a_gpu_still_has_its_line():
    """And the planted text is Python: it is inside the function."""
    text = (ROOT / ab_power.GPU_KERNEL).read_text()
    assert text.count(ab_power.GPU_LINE) == 1
    planted = text.replace(ab_power.GPU_LINE, ab_power.GPU_LINE + ab_power.SPIN.format(cycles=1000))
    compile(planted, "planted", "exec")
    assert "setp.lt.u32 p, n, 1000;" in planted and "{ .reg" in planted


def test_runs_share_processes_and_those_that_measure_again_are_others(monkeypatch):
    made, used = [], []

    @contextlib.contextmanager
    def opened(sides, options):
        made.append(pair := SimpleNamespace(alive=True, number=len(made)))
        yield pair
        pair.alive = False

    class Gate:
        def __init__(self, sides, options, repo, cache, gates, only, pair, fresh):
            self.pair, self.fresh, self.report = pair, fresh, SimpleNamespace(findings=[], rows=[])

        def run(self):
            with self.fresh(None, None) as again:
                used.append((self.pair.number, again.number))
                assert self.pair.alive and again.alive

    monkeypatch.setattr(ab_power, "opened", opened)
    monkeypatch.setattr(ab_power, "Gate", Gate)
    monkeypatch.setattr(ab_power, "common_dir", lambda repo: repo)
    both = [ab_power.Processes(None, None, 2) for _ in range(2)]
    for _ in range(3):
        assert "error" not in ab_power.one_run(*both, "*", ROOT)
    assert used == [(0, 1), (0, 1), (2, 3)]
    assert [pair.alive for pair in made] == [False, False, True, True]


def test_runs_are_counted():
    case = {"case": "scan small cpu", "ratio": 1.2, "verdict": "slower"}
    found = ab_power.summary(
        [
            {"alarms": ["scan"], "seconds": 9.0, "load": 2.0, "cases": [case]},
            {
                "alarms": ["conv"],
                "seconds": 11.0,
                "load": 1.0,
                "cases": [case | {"verdict": "not confirmed", "ratio": 1.1}],
            },
            {"alarms": [], "seconds": 10.0, "load": 3.0, "cases": [case | {"verdict": "fine", "ratio": 1.0}]},
            {"error": "refused"},
        ],
        "scan",
    )
    assert found == {
        "runs": 4, "refused": 1, "alarmed": 2, "caught_scan": 1, "ratio_median": 1.1, "ratio_range": [1.0, 1.2],
        "seconds_median": 10.0, "load_range": [1.0, 3.0], "first_alarms_not_confirmed": 1,
    }  # fmt: skip


def test_a_run_cut_short_goes_on(tmp_path):
    path, meta = tmp_path / "power.json", {"commit": "abc", "driver": "1", "uuid": "A", "date": "d", "command": "c"}
    experiments, runs = {"same": [], "slower": []}, {"same": [{"alarms": []}], "slower": []}
    ab_power.write(path, meta, {}, runs)
    second = meta | {"uuid": "B"}
    assert ab_power.resumed(path, second, experiments) == runs
    assert second["before"] == [{"command": "c", "date": "d", "uuid": "A"}]
    ab_power.write(path, second, {}, runs)
    third = meta | {"uuid": "C"}
    ab_power.resumed(path, third, experiments)
    assert [entry["uuid"] for entry in third["before"]] == ["A", "B"]
    with pytest.raises(SystemExit, match=r"power.json cannot be resumed: commit, driver would not be the same"):
        ab_power.resumed(path, meta | {"commit": "abd", "driver": "2"}, experiments)
    with pytest.raises(SystemExit, match="the experiments would not be the same"):
        ab_power.resumed(path, dict(meta), {"same": []})
