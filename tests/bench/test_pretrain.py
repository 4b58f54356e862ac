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
        assert row["clips_per_second"] == pytest.approx(2e3 / row["ms"], rel=1e-2, abs=0.1)
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
    assert row["processes"] == 2 and row["clips_per_second"] == pytest.approx(4e3 / row["ms"], rel=1e-2, abs=0.1)


def test_an_update_of_parts_reads_as_many_clips_in_each(tmp_path):
    out = tmp_path / "pretrain.json"
    assert command(["pretrain", "--quick", "--only", "update", "--set", "accumulate=2", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["clips_per_second"] == pytest.approx(4e3 / row["ms"], rel=1e-2, abs=0.1)


@pytest.mark.parametrize(
    "field, why",
    [("batch_size=3", "--clips sets it"), ("clip.frames=3", "--frames sets it"), ("mask", "it must be FIELD=VALUE")],
)
def test_fields_that_have_a_flag_or_no_value_are_refused(field, why):
    with pytest.raises(SystemExit, match=f"--set {field}: {why}"):
        command(["pretrain", "--quick", "--only", "teacher", "--set", field])


def test_an_unknown_part_is_said():
    with pytest.raises(SystemExit, match="there is no part 'student2'; there are update, student, teacher, loading"):
        command(["pretrain", "--quick", "--only", "student2"])
