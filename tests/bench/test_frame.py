"""`python -m bench frame`: accuracy before time, tails, turns, what is missing."""

from __future__ import annotations

import json

import pytest
import torch

from bench import frame
from bench.__main__ import main as command
from endomamba.models import EndoMamba

QUICK = ["frame", "--quick", "--model", "tiny", "--streams", "3"]


@pytest.fixture
def few(monkeypatch):
    """Two frames of a case."""
    monkeypatch.setattr(frame, "UNCOUNTED", 1)


def test_rows_and_what_is_missing(few, tmp_path, capsys):
    out = tmp_path / "frame.json"
    assert command([*QUICK, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = {row["case"]: row for row in result["rows"]}
    assert set(rows) == {"resident 32", "resident 64x48", "pageable 64x48 to host", "3 streams resident 32"}
    for row in rows.values():
        host = row["host"]
        assert host["frames"] == 6 and 0 < host["median"] <= host["p99"] <= host["p99.9"] <= host["max"]
        assert 0 < row["error"] <= 2e-5 and row["device"] is None and row["copies"] == 0 and row["launches"] > 100
        assert sum(part["count"] for part in row["budget"]) == row["launches"]
        assert row["frames_per_second"] == pytest.approx(1e3 * row["streams"] / host["median"], rel=1e-3)
    assert rows["3 streams resident 32"]["streams"] == 3
    assert any(part["name"] == "endomamba.frame_settle.default" for part in rows["resident 32"]["budget"])
    why = {missing["case"]: missing["why"] for missing in result["missing"]}
    assert why["ViT/16 bf16, compiled, graph"] == why["eager resident 32"] == "there is no GPU here"
    assert "pinned 64x48 to host" in why and "copies busy" in capsys.readouterr().out

    assert command([*QUICK, "--out", str(out), "--only", "3 streams"]) == 0
    again = json.loads(out.read_text())
    assert len(again["rows"]) == 4 and len(again["missing"]) == len(result["missing"])
    assert again["rows"][:3] == result["rows"][:3] and again["rows"][3] != result["rows"][3]


def test_a_stream_that_forgets_gets_no_time(few, tmp_path, monkeypatch, capsys):
    honest = EndoMamba.step_

    def forgets(self, frames, state):
        state.ssm.zero_()
        return honest(self, frames, state)

    monkeypatch.setattr(EndoMamba, "step_", forgets)
    out = tmp_path / "frame.json"
    assert command([*QUICK, "--only", "resident", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["rows"] == [] and "no time for a wrong result" in result["missing"][0]["why"]


def test_every_case_has_its_turn_and_the_slow_ones_a_short_one(monkeypatch):
    order = []
    monkeypatch.setattr(frame, "turn", lambda case, device, keep, frames: order.append((case.name, frames)))
    args = type("Args", (), {"frames": 50, "turn": 40})
    frame.measured([frame.Case("a", print), frame.Case("b", print, few=True)], frame.Cpu(), args)
    assert order == [("a", 40), ("b", 2), ("a", 10), ("b", 1)]


def test_the_tail():
    tail = frame.tail([1.0] * 989 + [2.0] * 10 + [30.0])
    assert (tail["median"], tail["p99"], tail["max"], tail["frames"]) == (1.0, 2.0, 30.0, 1000)
    assert 2 < tail["p99.9"] < 30 and tail["p99/p50"] == 2.0 and frame.tail([]) is None


@pytest.mark.parametrize(
    "words, told",
    [(["--device", "cuda:77"], "there is no GPU"), (["--only", "nothing"], "no case has that")],
)
def test_refused(words, told, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command([*QUICK, *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line
