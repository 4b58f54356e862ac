"""`python -m bench pretrain`: an update is the trainer's own, and its parts are timed beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main as command

ROOT = Path(__file__).parent.parent.parent


def test_every_part_has_a_row(tmp_path, capsys):
    out = tmp_path / "pretrain.json"
    assert command(["pretrain", "--quick", "--out", str(out)]) == 0
    rows = {row["part"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == ["update", "student", "teacher", "loading"]
    for part in ("update", "student", "teacher"):
        row = rows[part]
        assert 0 < row["least"] <= row["ms"] <= row["most"]
        assert row["clips_per_second"] == pytest.approx(2e3 / row["ms"], rel=1e-2)
    assert rows["teacher"]["ms"] < rows["student"]["ms"] < rows["update"]["ms"]
    assert rows["loading"]["clips_per_second"] > 0 and "loading" in capsys.readouterr().out

    # A row of another setting stands beside the first, the same again replaces it.
    for masked in ("0.5", "0.5"):
        assert (
            command(["pretrain", "--quick", "--only", "teacher", "--set", f"mask_ratio={masked}", "--out", str(out)])
            == 0
        )
    assert [row["set"] for row in json.loads(out.read_text())["rows"]][-2:] == [[], ["mask_ratio=0.5"]]


def test_two_processes_are_one_row(tmp_path):
    out = tmp_path / "pretrain.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bench"]
    done = subprocess.run(
        [*torchrun, "pretrain", "--quick", "--only", "update", "--out", str(out)],
        cwd=ROOT, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert row["processes"] == 2 and row["clips_per_second"] == pytest.approx(4e3 / row["ms"], rel=1e-2)


def test_an_unknown_part_is_said():
    with pytest.raises(SystemExit, match="there is no part 'student2'; there are update, student, teacher, loading"):
        command(["pretrain", "--quick", "--only", "student2"])
