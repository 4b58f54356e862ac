"""`python -m bench frame`: accuracy before time, tails, turns, what is missing."""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import pytest
import torch

from bench import drift, film, frame
from bench.__main__ import main as command
from endomamba.models import EndoMamba
from endomamba.stream import FrameStream, StreamSession
from endomamba.video import VideoReader

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
    whole = {"mp4 32", "mp4 64x48", "24 frames by the fp32 parallel pass"}
    buffers = {"resident 32 in the stream's buffer", "resident 64x48 in the stream's buffer"}
    turns = {"resident 32", "resident 64x48", "pageable 64x48 to host", "3 streams resident 32"} | buffers
    assert set(rows) == turns | whole
    for row in (rows[name] for name in turns):
        host = row["host"]
        assert host["frames"] == 6 and 0 < host["median"] <= host["p99"] <= host["p99.9"] <= host["max"]
        assert 0 < row["error"] <= 2e-5 and row["device"] is None and row["copies"] == 0 and row["launches"] > 50
        assert sum(part["count"] for part in row["budget"]) == row["launches"]
        assert row["frames_per_second"] == pytest.approx(1e3 * row["streams"] / host["median"], rel=1e-3)
    assert rows["3 streams resident 32"]["streams"] == 3
    for name in ("resident 32", "resident 64x48"):
        assert rows[name]["launches"] == rows[f"{name} in the stream's buffer"]["launches"] + 1
    assert any(part["name"] == "endomamba.frame_settle.default" for part in rows["resident 32"]["budget"])
    why = {missing["case"]: missing["why"] for missing in result["missing"]}
    assert why["ViT/16 bf16, compiled, graph"] == why["eager resident 32"] == "there is no GPU here"
    assert why["published kernels bf16, graph"] == "there is no GPU here"
    told = capsys.readouterr().out
    assert "pinned 64x48 to host" in why and "copies busy" in told and "; limited by the " in told
    for row in (rows[name] for name in whole):
        assert 0 < row["error"] <= 2e-5

    assert command([*QUICK, "--out", str(out), "--only", "3 streams"]) == 0
    again = json.loads(out.read_text())
    kept = [row for row in result["rows"] if row["case"] != "3 streams resident 32"]
    assert again["rows"][:-1] == kept and len(again["missing"]) == len(result["missing"])
    assert again["rows"][-1]["case"] == "3 streams resident 32" and again["rows"][-1] != rows["3 streams resident 32"]
    assert len(rows) == len(kept) + 1

    assert command([*QUICK, "--out", str(out), "--only", "3 streams", "--model", "small"]) == 0
    of_two = json.loads(out.read_text())["rows"]
    assert of_two[:-1] == again["rows"] and of_two[-1]["model"] == "small"


def test_a_whole_name_is_that_case_alone():
    cases = [argparse.Namespace(name=name) for name in ("resident 32", "resident 32, copies busy", "pinned 32 to host")]
    names = lambda *words: [case.name[:12] for case in frame.chosen(cases, list(words))]  # noqa: E731
    assert names("resident 32") == ["resident 32"] and names("resident") == ["resident 32", "resident 32,"]
    assert names("resident 32", "busy") == ["resident 32", "resident 32,"] and len(names("")) == 3 and not names("mp4")


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


def setting():
    args = argparse.Namespace(device="cpu", model="tiny", dtype="fp32", backend="auto", quick=True)
    return frame.Setting(args, (32, 4), (48, 64))


def test_a_film_says_who_sets_the_pace(monkeypatch):
    """A slow decoder, then a slow model; what is played is what the model alone answers."""
    honest, row = VideoReader.__iter__, {}

    def slow(self):
        for each in honest(self):
            time.sleep(0.02)
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(VideoReader, "__iter__", slow)
        row = film.film(setting(), (32, 32), 12)
        assert row["limit"] == "decoder" and row["decoder_waited"] < 0.5
        assert 20 < row["decode_frames_per_second"] < 50 and row["frames_per_second"] < 50
        assert row["model_frames_per_second"] > 60
    step = FrameStream.step
    monkeypatch.setattr(FrameStream, "step", lambda *args: time.sleep(0.02) or step(*args))
    row = film.film(setting(), (48, 64), 12)
    assert row["limit"] == "model and lines" and row["decoder_waited"] >= 0.5 and row["lost"] == 0
    assert 15 < row["model_frames_per_second"] < 50 < row["decode_frames_per_second"] and row["codec"] == "h264"
    assert row["difference"] <= 1e-6


def test_the_films_lines_are_compared(monkeypatch):
    honest = StreamSession.record

    def wrong(self, *args, **more):
        record = honest(self, *args, **more)
        return record | {"probabilities": record["probabilities"][::-1]}

    monkeypatch.setattr(StreamSession, "record", wrong)
    assert film.film(setting(), (32, 32), 6)["difference"] > 1e-3


def test_pictures_of_a_film_change():
    for smooth in (True, False):
        shown = list(film.pictures(30, (40, 64), 4, smooth))
        assert {(each.shape, each.dtype) for each in shown} == {((40, 64, 3), torch.uint8)}
        assert all(not torch.equal(one, other) for i, one in enumerate(shown) for other in shown[:i])


def test_a_stream_that_drifts_is_seen(monkeypatch):
    at, restore = [], FrameStream.restore
    monkeypatch.setattr(FrameStream, "restore", lambda self, state: at.append(int(state.frame)) or restore(self, state))
    row = drift.drift(setting(), 60)
    assert at == [0, 40]
    assert 0 < row["mean_error"] < 1e-6 and abs(row["slope_per_1000_frames"]) < 1e-5 and row["left_out"] == 6
    assert 0 < row["restarted"]["mean_error"] < 1e-6
    assert len(row["by_time"]) == 10 and row["without_past"] > 1e3 * row["mean_error"]
    low, high = row["interval_per_1000_frames"]
    assert low < row["slope_per_1000_frames"] < high
    assert row["without_past"] == pytest.approx(forgotten(60), rel=1e-4)
    honest, seen = EndoMamba.step_, []

    def drifts(self, frames, state, *args, **more):
        seen.append(1)
        return honest(self, frames, state, *args, **more) * (1 + 1e-6 * len(seen))

    monkeypatch.setattr(EndoMamba, "step_", drifts)
    row = drift.drift(setting(), 60)
    assert row["grows"] and row["slope_per_1000_frames"] == pytest.approx(2e-3, rel=0.05), "two streams take turns"


def forgotten(frames: int) -> float:
    """Relative difference of the last answer, when the stream is emptied before it, but not its frame number."""
    made = setting()
    camera = made.stream()
    *before, last = film.pictures(frames, made.own, 4, smooth=False)
    for each in before:
        camera(each)
    state = camera.snapshot()
    whole = camera(last)
    state.conv.zero_(), state.ssm.zero_()
    camera.restore(state)
    return float((camera(last) - whole).norm() / whole.norm())


@pytest.mark.parametrize("restarted", [False, True], ids=["adds up", "as with what is seen"])
def test_what_adds_up_is_told_from_what_changes(monkeypatch, restarted):
    parallel = np.random.default_rng(0).normal(size=(500, 7)) + 3
    grown = parallel * (1 + 1e-6 * np.arange(500))[:, None]
    made_up = grown, grown if restarted else parallel * (1 + 1e-6), parallel, parallel[-1] * 1.5
    monkeypatch.setattr(drift, "answers", lambda *_: made_up)
    row = drift.drift(None, 500) | {"case": "made up"}
    assert row["grows"] and row["slope_per_1000_frames"] == pytest.approx(1e-3)
    beside = row["beside_restarted"]
    assert beside["grows"] != restarted and beside["slope_per_1000_frames"] == pytest.approx(0 if restarted else 1e-3)
    assert row["without_past"] == pytest.approx(0.5) and row["mean_error"] == pytest.approx(1e-6 * 274.5)
    assert drift.told(row).count("it grows") == (1 if restarted else 2)


def test_a_stream_that_is_not_finite_has_no_slope(monkeypatch):
    honest = EndoMamba.step_
    monkeypatch.setattr(EndoMamba, "step_", lambda self, *args, **more: honest(self, *args, **more) * float("nan"))
    with pytest.raises(ArithmeticError, match="20 of 20 answers are not finite"):
        drift.drift(setting(), 20)


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
