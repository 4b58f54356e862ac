"""Files that are broken in every way: no traceback, no hang, no silent loss, and what could be decoded is written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from endomamba import cli
from endomamba.models import create_model
from endomamba.video import open_video

from .test_video import encode

FRAMES = 40
CLIPS = {
    "a.mp4": {},
    "b.mkv": {},
    "c.avi": {"codec": "mpeg4"},
    "d.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "e.ts": {},
    "f.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none"}},
    "g.avi": {"codec": "mjpeg"},
    "h.mov": {"rough": True},
}
KINDS = ("truncated", "flipped", "hole", "extension", "empty", "text", "noise", "pipe")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return [encode(folder / name, FRAMES, gop=10, **options) for name, options in CLIPS.items()]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    torch.manual_seed(0)
    model = create_model("endomamba", embed_dim=16, depth=2, img_size=16, num_classes=2).eval()
    monkeypatch.setattr(cli, "_model", lambda args, text: (model, True))


def damage(source: Path, target: Path, kind: str, rng: np.random.Generator) -> Path:
    """Writes a damaged copy of `source`; -> its path, which may end otherwise than `target`."""
    data = bytearray(source.read_bytes())
    size = len(data)
    if kind == "truncated":
        data = data[: rng.integers(1, size)]
    elif kind == "flipped":
        for place in rng.integers(0, size, int(rng.integers(1, 30))):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == "hole":
        begin, length = int(rng.integers(size)), int(rng.integers(1, 5000))
        data[begin : begin + length] = bytes(len(data[begin : begin + length]))
    elif kind == "extension":
        target = target.with_suffix(str(rng.choice([".jpg", ".dcm", ".wav", ".nfo", ".avi", ".mp4", ".png", ".mpg"])))
    elif kind == "empty":
        data = bytearray()
    elif kind == "text":
        data = bytearray(b"frame, label\n1, polyp\n" * int(rng.integers(1, 2000)))
    elif kind == "noise":
        data = bytearray(rng.bytes(int(rng.integers(1, 100_000))))
    target.write_bytes(data)
    return target


def run_one(number: int, clips: list[Path], folder: Path, capsys) -> tuple[str, int, int]:
    """-> kind, exit code, frames written; asserts what must hold for every file."""
    rng = np.random.default_rng(number)
    kind, source = KINDS[number % len(KINDS)], clips[number // len(KINDS) % len(clips)]
    path = damage(source, folder / f"{number}{source.suffix}", kind, rng)
    if kind == "pipe":
        os.mkfifo(pipe := folder / "pipe")
        threading.Thread(target=feed, args=(pipe, path.read_bytes()), daemon=True).start()
        path = pipe
    out = folder / ("run" if number % 5 == 0 else "run/lines.jsonl")
    code = cli.main(["stream", str(path), "--out", str(out), "--quiet", "--threads", "1"])
    err = capsys.readouterr().err
    what = f"{kind} {source.name} (number {number}): exit code {code}, {err!r}"
    lines = folder / "run" / ("predictions.jsonl" if number % 5 == 0 else "lines.jsonl")
    text = lines.read_text() if lines.exists() else ""
    written = [json.loads(line)["frame"] for line in text.splitlines()]
    assert text == "" or text.endswith("\n"), what
    assert written == list(range(len(written))), what
    assert "Traceback" not in err and "bug" not in err, what
    if code == 0:
        notice = "by its times" in err or "its times go back" in err or "its edit list hides" in err
        assert notice or len(written) == FRAMES, f"a silent loss of {FRAMES - len(written)} frames: {what}"
        assert notice or err == "", what
        assert all(line.startswith(f"endomamba: {path}: ") for line in err.splitlines()), what
    else:
        assert code in (2, 3) and err.startswith("endomamba: ") and err.count("\n") == 1, what
        assert code == 3 or not written, what
    if code == 3:
        assert f"{len(written)} frames were processed and written" in err, what
        summary = next((folder / "run").glob("*summary.json"))
        assert json.loads(summary.read_text())["frames"] == len(written), what
    annotated = folder / "run" / "annotated.mp4"
    if annotated.exists():
        with open_video(annotated) as reader:
            assert sum(1 for _ in reader) == len(written) and "could not" not in str(reader.damage), what
    return kind, code, len(written)


def feed(pipe: Path, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError):
        pipe.write_bytes(data)


@contextlib.contextmanager
def limit(seconds: int):
    def late(*args):
        raise AssertionError(f"hangs: no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_all(numbers, clips, tmp_path, capsys):
    results = {kind: [] for kind in KINDS}
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        with limit(60):
            kind, code, frames = run_one(number, clips, folder, capsys)
        results[kind].append((code, frames))
    return results


def test_twenty_damaged_files(clips, tmp_path, capsys):
    subtle = [1056, 1114, 1120, 1304, 1314, 1498, 2969, 3594]  # FFmpeg is silent about these,
    subtle += [1058, 1305, 1321, 2553, 7713]  # and in these only times or an edit list tell,
    subtle += [1769]  # and here a stream appears in the middle
    results = run_all([*subtle, *range(0, 6 * 27, 27)], clips, tmp_path, capsys)
    codes = [code for runs in results.values() for code, _ in runs]
    assert len(codes) == 20 and {0, 2, 3} <= set(codes)
    assert any(0 < frames < FRAMES for runs in results.values() for _, frames in runs)


@pytest.mark.slow
def test_five_hundred_damaged_files(clips, tmp_path, capsys):
    results = run_all(range(1000, 1512), clips, tmp_path, capsys)
    for kind, runs in results.items():
        codes = [code for code, _ in runs]
        counts = ", ".join(f"{codes.count(code)} with exit code {code}" for code in sorted(set(codes)))
        with capsys.disabled():
            print(f"\n{kind:<10} {counts}; {sum(frames for _, frames in runs)} frames written", end="")
    assert sum(map(len, results.values())) == 512
