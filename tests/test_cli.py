"""The command as a user meets it: whole runs are real processes, what fails before the first frame runs in this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("pydicom")

import endomamba
from endomamba import cli, synthetic
from endomamba.models import create_model
from endomamba.synthetic import load_truth
from endomamba.video import open_video, write_video

ENV = {**os.environ, "PYTHONPATH": str(Path(endomamba.__file__).parents[1]), "OMP_NUM_THREADS": "1"}


def clip(path, frames, gop=5):
    y, x = np.mgrid[0:64, 0:96]
    pictures = (np.stack([x + 5 * i, y + 3 * i, x + y + i], -1).astype(np.uint8) for i in range(frames))
    write_video(path, pictures, gop=gop)
    return path


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return clip(tmp_path_factory.mktemp("clips") / "short.mp4", 6)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return clip(tmp_path_factory.mktemp("clips") / "long.mp4", 900, gop=50)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    from safetensors.torch import save_file

    torch.manual_seed(1)
    save_file(create_model("endomamba_tiny", num_classes=4).state_dict(), path)
    return path


def start(*args, cwd, **options):
    command = [sys.executable, "-m", "endomamba", *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=ENV, stdout=pipe, stderr=pipe, text=True, **options)


def run(*args, cwd):
    process = start(*args, cwd=cwd)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err and "Traceback" not in out
    return process.returncode, out, err


def here(capsys, *args):
    """`main` in this process -> exit code and stderr, which must be one sentence."""
    code = cli.main([str(arg) for arg in args])
    err = capsys.readouterr().err
    assert err.startswith("endomamba: ") and err.count("\n") == 1, err
    return code, err


def records(path):
    text = Path(path).read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def wait_for_lines(path, count, process):
    limit = time.monotonic() + 90
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()
        time.sleep(0.02)


# ---- whole runs


def test_stream_with_weights(short, weights, tmp_path):
    code, out, err = run("stream", short, "--weights", weights, "--out", "run", "--verify", cwd=tmp_path)
    assert code == 0, err
    lines = records(tmp_path / "run" / "predictions.jsonl")
    assert [line["frame"] for line in lines] == list(range(6))
    assert [line["time"] for line in lines] == pytest.approx([i / 25 for i in range(6)])
    for line in lines:
        assert sorted(line["labels"]) == [0, 1, 2, 3], "the number of classes came from the weights"
        assert sum(line["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert line["probabilities"] == sorted(line["probabilities"], reverse=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["frames"] == 6 and summary["verify"]["passed"] and summary["damage"] is None
    for word in ("frames/s", "p50", "p99", "bytes carried", "verify   passed", "run/predictions.jsonl"):
        assert word in out
    assert "mean nothing" not in out


def test_demo_streams_the_ultrasound_clip(tmp_path):
    code, out, err = run("demo", "--clip", "ultrasound", "--max-frames", 18, cwd=tmp_path)
    assert code == 0, err
    assert out.startswith("This streams a medical video")
    assert "ultrasound" in out and "labels mean nothing yet" in out and "verify   passed" in out
    assert "so it was carried" in out, "and the check could have failed"
    assert len(records(tmp_path / "endomamba-demo" / "predictions.jsonl")) == 18
    for name in ("annotated.mp4", "timeline.png", "summary.json"):
        assert f"\n  {name} " in out and f"endomamba-demo/{name}" in out
        assert (tmp_path / "endomamba-demo" / name).stat().st_size > 500


def test_demo_draws_a_colonoscopy(tmp_path, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_stream", lambda args: seen.append(args) or 0)
    monkeypatch.setattr(cli, "DEMO_FRAMES", 2)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 0
    assert "a synthetic colonoscopy of 2 frames" in capsys.readouterr().out
    with open_video(seen[0].video) as reader:
        assert len(list(reader)) == 2


def test_demo_shows_the_truth_and_a_foreign_truth_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "DEMO_FRAMES", 20)
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    agreement, lines = summary["agreement"], records(tmp_path / "out" / "predictions.jsonl")
    truth = load_truth(next((tmp_path / "out" / "clip").glob("*.truth.jsonl")))
    right = sum(line["labels"][0] == true for line, true in zip(lines, truth.phase, strict=True))
    assert agreement["frames"] == 20 and agreement["right"] == right
    assert f"the true one in {right} of 20 frames" in out and "verify   passed" in out
    other = synthetic.write(synthetic.SyntheticVideo(frames=8, size=32), tmp_path / "other")[1]
    movie = next((tmp_path / "out" / "clip").glob("*.mp4"))
    command = ["stream", movie, "--out", tmp_path / "second", "--truth"]
    _, err = here(capsys, *command, other, "--weights", "nano-phases")
    assert "it is of a video of 8 frames, this one has 20" in err
    _, err = here(capsys, *command, other, "--num-classes", 2)
    assert "the model's classes are class 0 (random), class 1 (random)" in err


def test_killed_in_the_middle_leaves_whole_lines(long, tmp_path):
    process = start("stream", long, "--out", "run", "--threads", 1, cwd=tmp_path)
    path = tmp_path / "run" / "predictions.jsonl"
    wait_for_lines(path, 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = records(path)
    assert process.returncode == -signal.SIGKILL
    assert 5 <= len(lines) < 900 and [line["frame"] for line in lines] == list(range(len(lines)))


def test_ctrl_c_keeps_the_lines_and_says_what_was_done(long, tmp_path):
    process = start("stream", long, "--out", "run", "--verify", "--threads", 1, cwd=tmp_path)
    path = tmp_path / "run" / "predictions.jsonl"
    wait_for_lines(path, 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    lines = records(path)
    assert process.returncode == 130 and "Traceback" not in err and "stopped by Ctrl-C" in err
    assert 5 <= len(lines) < 900 and f"stopped  by Ctrl-C, {len(lines)} frames" in out
    summary = json.loads((path.parent / "summary.json").read_text())
    assert summary["frames"] == len(lines) and summary["stopped"] == "by Ctrl-C"


def test_lines_on_standard_output_into_a_pipe_that_closes(long, tmp_path):
    process = start("stream", long, "--out", "-", "--threads", 1, cwd=tmp_path)
    first = process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 141 and "Traceback" not in err and "Exception ignored" not in err
    assert json.loads(first)["frame"] == 0, "standard output carries lines alone"
    assert "labels mean nothing yet" in err and not list(tmp_path.iterdir())


def test_quiet_prints_nothing(short, tmp_path):
    assert run("stream", short, "--out", "a.jsonl", "--max-frames", 2, "--quiet", cwd=tmp_path) == (0, "", "")
    assert len(records(tmp_path / "a.jsonl")) == 2


# ---- exit codes


def test_a_damaged_video_is_3_and_what_could_be_read_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = clip(tmp_path / "whole.mkv", 40)
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    code, err = here(capsys, "stream", cut, "--quiet")
    lines = records("cut.predictions.jsonl")
    assert code == 3 and "ends early" in err and f"{len(lines)} frames were processed and written" in err
    assert 3 < len(lines) < 38
    assert "ends early" in json.loads(Path("cut.predictions.summary.json").read_text())["damage"]


def test_verify_that_fails_is_4(short, tmp_path, capsys, monkeypatch):
    from endomamba.stream import FrameStream

    honest = FrameStream.__call__
    monkeypatch.setattr(FrameStream, "__call__", lambda self, frame: honest(self, frame) + 1e-3)
    code, err = here(capsys, "stream", short, "--out", tmp_path, "--verify", "--quiet")
    assert code == 4 and "verify failed" in err
    assert len(records(tmp_path / "predictions.jsonl")) == 6


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["missing.mp4"], "does not exist"),
        (["."], "is a folder"),
        (["text.mp4"], "is not a video"),
        (["{short}", "--model", "endomamba_huge"], "no model is named 'endomamba_huge'; there are"),
        (["{short}", "--model", "endofm"], "streams EndoMamba; attention_twin* and endofm stream from Python, with"),
        (["{short}", "--weights", "missing.pth"], "missing.pth: cannot be opened"),
        (["{short}", "--weights", "text.mp4"], "neither a PyTorch nor a safetensors file"),
        (["{short}", "--weights", "{weights}", "--model", "endomamba_small"], "does not fit this model"),
        (["{short}", "--weights", "{weights}", "--num-classes", "7"], "head for 4 classes"),
        (["{short}", "--backend", "cuda"], "backend 'cuda' cannot run"),
        (["{short}", "--verify", "--positions", "elapsed"], "without gaps: it needs --positions processed"),
        (["{short}", "--out", "old.jsonl"], "exists already"),
        (["{short}", "--out", "text.mp4"], "is in the way"),
    ],
)
def test_bad_input_is_2_and_one_sentence(args, sentence, short, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.mp4").write_text("not a video\n" * 100)
    Path("old.jsonl").write_text("kept\n")
    code, err = here(capsys, "stream", *(arg.format(short=short, weights=weights) for arg in args), "--quiet")
    assert code == 2 and sentence in err
    assert Path("old.jsonl").read_text() == "kept\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(short, capsys):
    code, err = here(capsys, "stream", short, "--device", "cuda")
    assert code == 2 and "torch sees no CUDA device" in err


@pytest.mark.parametrize(
    "args", [[], ["stream"], ["stream", "a", "--max-frames", "0"], ["stream", "a", "--frobnicate"]]
)
def test_bad_usage_is_2(args, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2 and "usage: endomamba" in capsys.readouterr().err


def test_a_bug_is_1_without_a_traceback_unless_asked_for(short, capsys, monkeypatch):
    def broken(*args):
        raise KeyError("planted")

    monkeypatch.setattr(cli, "_device", broken)
    code, err = here(capsys, "stream", short)
    assert code == 1 and "KeyError" in err and "--debug" in err
    with pytest.raises(KeyError):
        cli.main(["stream", str(short), "--debug"])


def test_a_full_disk_is_2_and_the_summary_says_so(short, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from endomamba.stream import JsonLines

    def to_full(args, kind):
        lines = JsonLines.__new__(JsonLines)
        lines.path, lines._fd, lines._end = None, os.open("/dev/full", os.O_WRONLY), 0
        return lines

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_lines", to_full)
        code, err = here(capsys, "stream", short, "--quiet")
    assert code == 2 and "No space left" in err


# ---- output files, progress, info


def test_names_of_the_predictions(tmp_path, monkeypatch):
    from endomamba.stream import JsonLines

    monkeypatch.chdir(tmp_path)
    names = []
    for out in ([], [], ["--out", "d"], ["--out", "d/e/f.jsonl"], ["--out", "d", "--overwrite"]):
        with cli._lines(cli.build_parser().parse_args(["stream", "x/my.clip.mp4", *out]), JsonLines) as lines:
            names.append(str(lines.path))
    plain = ["my.clip.predictions.jsonl", "my.clip.predictions-2.jsonl"]
    assert names == [*plain, "d/predictions.jsonl", "d/e/f.jsonl", "d/predictions.jsonl"]


def test_progress_without_a_terminal_is_a_line_now_and_then(capsys, monkeypatch):
    args = cli.build_parser().parse_args(["stream", "a.mp4"])
    monkeypatch.setattr(cli._Progress, "EVERY", 0.0)
    with cli._Progress(args, 3) as progress:
        for _ in range(3):
            progress({})
    assert capsys.readouterr().err == "frame 1 of 3\nframe 2 of 3\nframe 3 of 3\n"


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["endomamba"] == endomamba.__version__ and facts["torch"] == torch.__version__
    assert set(facts["backends"]["cpu"]["selective_scan"]) == {"triton", "cuda", "cpu", "reference"}
    assert facts["backends"]["cpu"]["frame_step"]["reference"] == []
    assert facts["cpu_kernels"]["built"] or facts["cpu_kernels"]["why_not"]
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for op, names in facts["backends"]["cpu"].items():
        assert f"\n  {op}\n" in text
        assert all(reason in text for reasons in names.values() for reason in reasons)


def test_version_and_console_entry():
    out = subprocess.run([sys.executable, "-m", "endomamba", "--version"], env=ENV, capture_output=True, text=True)
    assert (out.returncode, out.stdout) == (0, f"endomamba {endomamba.__version__}\n")
