"""The plan of docs/evidence.md: that it runs, is fair, and says what its numbers say."""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("torchmetrics")

from bench import learns
from bench.pool import Task, carry_out
from endomamba.synthetic import VARIANTS
from endomamba.train import finetune, manifest, pretrain

ROOT = Path(__file__).parents[2]
RUNS = learns.plan(learns.Scale())


def test_tasks_that_fail_die_or_last_are_named(tmp_path):
    tasks = [
        Task("fine", partial(abs, -2)),
        Task("wrong", partial(divmod, 1, 0)),
        Task("behind", partial(abs, 1), ("wrong",)),
        Task("dies", partial(os._exit, 3)),
        Task("slow", partial(time.sleep, 0.2), ("fine",), "sleep"),
        Task("too long", partial(abs, 1), ("slow",), "sleep", 1000.0),
        Task("endless", partial(time.sleep, 60), ("slow",), "endless"),
    ]
    began = time.monotonic()
    results = {result.task.name: result for result in carry_out(tasks, 2, 5, tmp_path)}
    assert time.monotonic() - began < 20
    assert results["fine"].answer == 2 and not results["fine"].problem
    assert not results["slow"].problem
    for name, words in {
        "wrong": "ZeroDivisionError",
        "behind": "needs wrong, which failed",
        "dies": "its process died (exit code 3)",
        "too long": "was not started",
        "endless": "was not done when the time was up",
    }.items():
        assert results[name].problem.startswith(words), results[name]
    assert "ZeroDivisionError" in "".join(path.read_text() for path in tmp_path.iterdir())


def test_the_plan_is_fair():
    names = [run.name for run in RUNS]
    assert len(set(names)) == len(names) == 85
    trained_on = {name for run in RUNS for name in run.videos}
    assert not trained_on & set(learns.test_videos(learns.Scale()))
    assert not [name for name in trained_on if VARIANTS[name.rsplit("-", 2)[0]].held_out]
    students = {name for run in RUNS if run.name != "teacher" for name in run.videos}
    assert {name.rsplit("-", 2)[0] for name in students} == {"base"}
    known = {run.name: run for run in RUNS}
    for _, task, one, other in learns.QUESTIONS:
        for seed in range(3):
            a, b = (known[f"{task}/{arm}/{seed}"] for arm in (one, other))
            assert a.videos == b.videos and a.config.seed == b.config.seed
            assert a.steps == b.steps or "streamed" in a.name
            assert a.config.batch_size * a.config.clip.frames == b.config.batch_size * b.config.clip.frames
            assert a.config.lr == b.config.lr


def test_every_model_has_less_than_a_million_parameters(tmp_path):
    entry = manifest.Entry("a.mp4", 0, 9, 0, landmarks="a.places.jsonl")
    (tmp_path / "a.places.jsonl").write_text(
        '{"kind": "endomamba places", "size": [9, 9], "landmarks": ["1", "2", "3", "4", "5", "6"]}\n'
    )
    listed = manifest.Manifest(tmp_path / "m.jsonl", tuple("abcdefgh"), (entry,))
    for run in RUNS:
        if run.name.endswith("/0") and "10" not in run.name:
            trains = isinstance(run.config, pretrain.PretrainConfig)
            model = pretrain.build(run.config) if trains else finetune.build(run.config, listed, "", head=False)
            assert sum(p.numel() for p in model.parameters()) < 1_000_000, run.name


def test_an_effect_is_found_and_none_is_not():
    random = np.random.default_rng(1)
    names = [name for name in learns.test_videos(learns.Scale()) if not name.startswith("base")]
    rows = {}
    for seed in range(3):
        of_video = random.normal(0.5, 0.2, len(names))
        for arm, better in (("scratch-10", 0.0), ("plain-10", 0.1), ("aligned-10", 0.1)):
            noisy = of_video + better + random.normal(0, 0.05, len(names))
            rows[f"phase/{arm}/{seed}"] = {"videos": {n: [v, 0.0] for n, v in zip(names, noisy)}}
    found = {(r["task"], *r["arms"]): r for r in learns.effects(rows)}
    helps, nothing = found["phase", "plain-10", "scratch-10"], found["phase", "aligned-10", "plain-10"]
    assert helps["seeds"] == 3 and helps["videos"] == 24
    assert helps["effect"] == pytest.approx(0.1, abs=0.03) and 0 < helps["interval"][0] < helps["effect"]
    assert nothing["interval"][0] < 0 < nothing["interval"][1]
    assert found["segmentation", "plain-10", "scratch-10"]["seeds"] == 0


def test_what_is_committed_says_what_the_document_says():
    result = json.loads((ROOT / "bench" / "results" / "learns.json").read_text())
    assert learns.table(result["effects"]) in (ROOT / "docs" / "evidence.md").read_text()
    assert result["meta"]["generator"] == {name: params.digest() for name, params in VARIANTS.items()}
    assert json.loads(json.dumps(list(learns.effects(learns.rows_of(result))))) == result["effects"]


def test_quick_runs_and_goes_on(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    learns.add_arguments(parser)
    command = ["--quick", "--out", str(tmp_path), "--workers", "1", "--only", "segmentation/aligned,phase/carried"]
    assert learns.main(parser.parse_args(command)) == 0
    rows = learns.read_rows(tmp_path / "runs.jsonl")
    assert list(rows) == ["teacher", "pretrain/aligned/0", "segmentation/aligned-10/0", "phase/carried/0"]
    assert len(rows["phase/carried/0"]["videos"]) == 5
    report = json.loads((tmp_path / "learns.json").read_text())
    assert report["meta"]["scale"]["steps"] == learns.QUICK.steps and not report["meta"]["not_done"]
    before = (tmp_path / "runs.jsonl").read_text()
    capsys.readouterr()
    assert learns.main(parser.parse_args(command)) == 0
    assert "done" not in capsys.readouterr().out and (tmp_path / "runs.jsonl").read_text() == before
    again = ["--go-on", str(tmp_path / "learns.json"), *command[:2], str(tmp_path / "again"), *command[3:]]
    assert learns.main(parser.parse_args(again)) == 0  # weights are missing there, but no result needs them
    (before,) = json.loads((tmp_path / "again" / "learns.json").read_text())["meta"]["earlier"]
    tested = [row["run"] for row in report["runs"] if "numbers" in row]
    assert before["commit"] == report["meta"]["commit"] and before["runs"] == sorted(tested)
    assert "done" not in capsys.readouterr().out
