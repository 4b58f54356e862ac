"""Files of pytest-benchmark, written by pytest-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import files
from bench.machine import Refused
from bench.worktrees import UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict:
    """One of bench/test_cases.py's own."""
    pytest.importorskip("pytest_benchmark")
    path = tmp_path_factory.mktemp("written") / "base.json"
    chosen = ["bench/test_cases.py", "-k", "add_rms_norm and small-l1-", "--benchmark-max-time=0.02"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", *chosen, f"--benchmark-json={path}"]
    # Without what xdist told this process: pytest-benchmark would measure nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {
        "OMP_NUM_THREADS": "1"
    }
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
    return json.loads(path.read_text())


def compared(tmp_path: Path, base: dict, head: dict, threshold: float | None = None) -> tuple[list[str], list[str]]:
    paths = [tmp_path / "base.json", tmp_path / "head.json"]
    for path, data in zip(paths, (base, head)):
        path.write_text(json.dumps(data))
    report, _ = files.compare(*paths, 0.05, threshold)
    return [str(finding) for finding in report.findings], report.notes


def changed(data: dict, factor: float = 1.0, **machine) -> dict:
    data = json.loads(json.dumps(data))
    data["machine_info"] |= machine
    for row in data["benchmarks"]:
        row["stats"]["data"] = [factor * time for time in row["stats"]["data"]]
    return data


def test_a_slower_file_is_named_and_the_statement_is_weak(tmp_path, written):
    found, notes = compared(tmp_path, written, changed(written, 1.6))
    assert len(found) == 1 and found[0].startswith(
        "WORSE time: op=add_rms_norm shape=small-l1-fp32 backend=cpu ratio=1.600 interval=["
    )
    assert "not interleaved" in notes[0] and "1.25" in notes[0]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1])
def test_less_than_the_noise_of_two_runs_is_no_finding(tmp_path, written, factor):
    assert compared(tmp_path, written, changed(written, factor))[0] == []


def test_another_threshold(tmp_path, written):
    assert compared(tmp_path, written, changed(written, 1.6), threshold=2.0)[0] == []


@pytest.mark.parametrize("key", ["node", "machine", "python_version"])
def test_files_of_different_machines_are_refused(tmp_path, written, key):
    with pytest.raises(Refused, match=f"different machines: {key} is .* and 'other'"):
        compared(tmp_path, written, changed(written, **{key: "other"}))


def test_files_of_different_cpus_are_refused(tmp_path, written):
    with pytest.raises(Refused, match="cpu is"):
        compared(tmp_path, written, changed(written, cpu={"brand_raw": "other"}))


def test_what_cannot_be_read_is_told(tmp_path, written):
    without = changed(written)
    del without["benchmarks"][0]["stats"]["data"]
    with pytest.raises(UsageError, match="fewer than 5 times; pytest writes them with --benchmark-json"):
        compared(tmp_path, written, without)
    with pytest.raises(UsageError, match=r"base.json is no JSON file of pytest-benchmark: KeyError 'machine_info'"):
        compared(tmp_path, {}, written)
    other = changed(written)
    other["benchmarks"][0]["fullname"] = "another"
    with pytest.raises(UsageError, match="no benchmark in common"):
        compared(tmp_path, written, other)
