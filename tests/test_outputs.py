"""The files beside the predictions: what they show, and that they are whole however a run ends."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from safetensors.torch import load_file  # noqa: E402

from endomamba import cli  # noqa: E402
from endomamba.models import EndoMamba, Packed, create_model, packed  # noqa: E402
from endomamba.outputs import (  # noqa: E402
    COLOURS,
    FAULT,
    MASK,
    Agreement,
    AnnotatedVideo,
    Timeline,
    draw_mask,
    keep_whole_fragments,
)
from endomamba.stream import FrameStream  # noqa: E402
from endomamba.video import Frame, open_video  # noqa: E402

from .test_video import encode  # noqa: E402

FOLDER = ["annotated.mp4", "predictions.jsonl", "summary.json", "timeline.png"]


def tiny(classes=3):
    torch.manual_seed(0)
    return create_model("endomamba", embed_dim=32, depth=2, img_size=32, num_classes=classes).eval()


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    """The command with a model that is built in milliseconds."""
    monkeypatch.setattr(cli, "_model", lambda args, text: (tiny(), True))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("clips") / "clip.mp4", 40)


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    return encode(tmp_path_factory.mktemp("clips") / "long.mp4", 700, gop=50)


def stream(*args):
    return cli.main(["stream", *map(str, args), "--threads", "1"])


def check_folder(folder: Path, least: int = 1) -> int:
    """All there, all readable, all of the same number of frames -> that number."""
    assert sorted(path.name for path in folder.iterdir()) == FOLDER
    text = (folder / "predictions.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert text.endswith("\n")
    summary = json.loads((folder / "summary.json").read_text())
    with Image.open(folder / "timeline.png") as image:
        image.load()
    with open_video(folder / "annotated.mp4") as reader:
        times = [frame.time for frame in reader]
    assert not reader.damage
    assert len(lines) == summary["decoded"] - summary["dropped"] == len(times) >= least
    assert times == pytest.approx([line["time"] for line in lines], abs=1e-4)
    return len(lines)


# ---- whole runs


def test_a_folder_with_everything(clip, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("insertion\nwithdrawal\npolyp\n")
    assert stream(clip, "--out", tmp_path / "run", "--names", names) == 0
    assert check_folder(tmp_path / "run") == 40
    out = capsys.readouterr().out
    assert "40 decoded, 0 dropped, 0 not finite, 0 lost to damage" in out
    for word in ("p50", "p95", "p99", "max", "decode", "preprocess", "model", "write", *FOLDER):
        assert word in out
    latency = json.loads((tmp_path / "run" / "summary.json").read_text())["latency"]
    assert all({"p50_ms", "p95_ms", "p99_ms", "max_ms"} <= set(part) for part in latency.values())
    assert stream(clip, "--out", tmp_path / "run") == 2, "nothing is replaced unasked"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "annotated.mp4").write_text("mine")
    assert stream(clip, "--out", tmp_path / "other") == 2
    assert (tmp_path / "other" / "annotated.mp4").read_text() == "mine"
    assert stream(clip, "--out", tmp_path / "run", "--overwrite", "--no-video", "--max-frames", 3) == 0
    assert "annotated.mp4" not in capsys.readouterr().out.split("written")[-1]


@pytest.mark.parametrize("policy", ["block", "drop-oldest"])
def test_a_file_may_be_read_like_a_camera(policy, clip, tmp_path, capsys, monkeypatch):
    """What the model is too slow for is lost and counted, and with --positions elapsed its time goes by."""
    honest, positions = EndoMamba.step_, []

    def slow(self, frames, state):
        time.sleep(0.01)
        positions.append(int(state.frame))
        return honest(self, frames, state)

    monkeypatch.setattr(EndoMamba, "step_", slow)
    options = ("--back-pressure", policy, "--positions", "elapsed", "--no-video", "--quiet")
    assert stream(clip, "--out", tmp_path / "run", *options) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert summary["back_pressure"] == policy.replace("-", " ") and summary["positions"] == "elapsed"
    assert summary["decoded"] == 40 == len(lines) + summary["dropped"]
    assert positions[2:] == [line["frame"] for line in lines], "after the two that warm up"
    if policy == "block":
        assert summary["dropped"] == 0 and summary["waits"] > 10
    else:
        assert summary["dropped"] > 10 and summary["waits"] == 0


def test_names_must_be_as_many_as_classes(clip, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    assert stream(clip, "--out", tmp_path / "run", "--names", names) == 2
    assert "one line a class was expected, 3 in all, it has 2" in capsys.readouterr().err


def test_features_are_what_the_head_reads(clip, tmp_path, capsys):
    args = ["features", str(clip), "--threads", "1", "--model", "endomamba", "--out"]
    with pytest.MonkeyPatch.context() as patch:
        import endomamba.models

        build = lambda name, **options: create_model(name, embed_dim=32, depth=2, img_size=32, **options)  # noqa: E731
        patch.setattr(endomamba.models, "create_model", build)
        assert cli.main([*args, str(tmp_path / "a")]) == 0
        assert cli.main([*args, str(tmp_path / "b"), "--format", "npy"]) == 0
        assert cli.main([*args, str(tmp_path / "b"), "--format", "npy"]) == 2
        assert "exists already" in capsys.readouterr().err
    got = load_file(tmp_path / "a" / "features.safetensors")
    assert got["features"].shape == (40, 32) and got["features"].dtype == torch.float32
    assert got["time"].tolist() == pytest.approx([i / 25 for i in range(40)])
    model, logits = tiny(), []
    camera = FrameStream(model)
    with open_video(clip, 32) as reader:
        logits = torch.cat([camera(frame.rgb) for frame in reader])
    torch.testing.assert_close(
        model.head(load := got["features"][None, :, None])[0].detach(), logits, rtol=0, atol=1e-5
    )
    assert load.isfinite().all()
    for name, array in got.items():
        assert np.array_equal(np.load(tmp_path / "b" / f"{name}.npy"), array.numpy())


# ---- runs that end early


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_whole_files(number, long, tmp_path, capsys, monkeypatch):
    seen = []

    def interrupt(self, record):
        seen.append(record)
        if len(seen) == 60:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(cli._Progress, "__call__", interrupt)
    assert stream(long, "--out", tmp_path / "run", "--quiet") == 128 + number
    name = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}[number]
    assert capsys.readouterr().err == f"endomamba: stopped by {name}\n"
    assert 60 <= check_folder(tmp_path / "run") < 70
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handlers are gone with the run"


@pytest.mark.parametrize("room", [20_000, 100_000])
def test_a_full_disk_leaves_whole_files(room, long, tmp_path, capsys):
    """No file may grow over `room` bytes: the video hits it first."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        assert stream(long, "--out", tmp_path / "run", "--quiet") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert "annotated.mp4: File too large" in err and "Traceback" not in err
    folder = tmp_path / "run"
    text = (folder / "predictions.jsonl").read_text()
    assert text.endswith("\n") and [json.loads(line) for line in text.splitlines()]
    assert "File too large" in json.loads((folder / "summary.json").read_text())["stopped"]
    assert not list(folder.glob("*.part*"))
    if (folder / "annotated.mp4").exists():
        with open_video(folder / "annotated.mp4") as reader:
            count = sum(1 for _ in reader)
        assert count >= 25 and not reader.damage
    else:
        assert room < 50_000


def test_a_live_source_that_hangs_ends_the_run(clip, tmp_path, capsys, monkeypatch):
    """Its thread stays in the source: that is left open, and the run ends all the same."""
    from endomamba import sources

    class Hangs(sources.LiveReader):
        def _decode(self):
            for i, item in enumerate(super()._decode()):
                if i == 12:
                    time.sleep(3)
                yield item

        def close(self):
            assert self.abandoned
            super().close()

    monkeypatch.setattr(sources, "open_source", lambda name: Hangs(name))
    monkeypatch.setattr(sources.ReadAhead.__init__, "__kwdefaults__", {"live": False, "patience": 0.3})
    monkeypatch.setattr(sources.ReadAhead.close, "__defaults__", (0.1,))
    assert stream(clip, "--out", tmp_path / "run", "--quiet") == 3
    assert "went away: no frame came for 0.3 s" in capsys.readouterr().err
    assert check_folder(tmp_path / "run") <= 12


def test_a_source_that_goes_away_leaves_whole_files(long, tmp_path, capsys):
    """A pipe whose writer dies in the middle."""
    pipe, source = tmp_path / "pipe", encode(tmp_path / "a.mkv", 100)
    os.mkfifo(pipe)
    data = source.read_bytes()
    threading.Thread(target=lambda: pipe.write_bytes(data[: len(data) // 2])).start()
    assert stream(pipe, "--out", tmp_path / "run", "--quiet") == 3
    err = capsys.readouterr().err
    count = check_folder(tmp_path / "run", least=10)
    assert f"{count} frames were processed and written" in err and err.count("\n") == 1
    assert count < 90


def test_a_frame_that_is_not_finite_is_counted_and_shown(clip, tmp_path, capsys, monkeypatch):
    honest = EndoMamba.step_

    def sometimes(self, frames, state):
        output = honest(self, frames, state)
        return output * float("nan") if int(state.frame) == 11 else output

    monkeypatch.setattr(EndoMamba, "step_", sometimes)
    assert stream(clip, "--out", tmp_path / "run", "--max-frames", 20) == 3
    out, err = capsys.readouterr()
    assert "at frame 10 is not finite; the stream goes on" in err and "at 10 of 20 frames" in err
    assert "10 not finite" in out
    assert check_folder(tmp_path / "run") == 20
    timeline = np.asarray(Image.open(tmp_path / "run" / "timeline.png").convert("RGB")).reshape(-1, 3)
    assert (timeline == rgb(FAULT)).all(1).sum() > 500


def test_a_black_camera_is_reported(tmp_path, capsys):
    from endomamba.video import write_video

    path = tmp_path / "a.mp4"
    write_video(path, [np.full((32, 32, 3), 0 if 10 <= i < 50 else 100 + i, np.uint8) for i in range(70)])
    assert stream(path, "--out", tmp_path / "run", "--no-video") == 0
    out, err = capsys.readouterr()
    assert "the picture is black since 0.400 s" in err
    assert "black from 0.400 s to 1.960 s (40 frames)" in out
    event = json.loads((tmp_path / "run" / "summary.json").read_text())["events"][0]
    assert (event["what"], event["first"], event["last"]) == ("black", 10, 49)


# ---- pictures


def rgb(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def record(i, label=0, confidence=0.9, **changes):
    parts = {"decode_ms": 1.0, "preprocess_ms": 0.5, "model_ms": 8.5}
    labels = {"labels": [label, 1 - label], "probabilities": [confidence, 1 - confidence]}
    return {"frame": i, "time": i / 25, "change": 0.1, "fault": None, "latency_ms": 10.0, **parts, **labels, **changes}


SUMMARY = {
    "video": "a.mp4",
    "frames": 100,
    "frames_per_second": 20.0,
    "stopped": "at the end",
    "dropped": 0,
    "not_finite": 0,
    "lost_to_damage": 0,
    "events": [],
    "latency": {"frame": {"p50_ms": 10.0, "p95_ms": 10.0, "p99_ms": 10.0, "max_ms": 10.0}},
}


@pytest.mark.parametrize("frames", [1, 100, 5000])
def test_the_timeline_shows_where_the_label_changes(frames):
    timeline = Timeline(["none", "polyp"], 25.0)
    for i in range(frames):
        timeline(record(i, label=int(i >= frames // 2)), None, None)
    assert len(timeline.columns) <= Timeline.COLUMNS
    assert sum(column.frames for column in timeline.columns) == frames
    picture = np.asarray(timeline.draw(SUMMARY))
    ribbon = picture[136, Timeline.LEFT : -Timeline.RIGHT]
    second = (ribbon == rgb(COLOURS[1])).all(1)
    if frames == 1:
        assert second.all()
    else:
        assert second.mean() == pytest.approx(0.5, abs=0.02) and second[-1] and not second[0]


def test_the_truth_is_shown_and_counted(tmp_path):
    truth = [0] * 30 + [1] * 70
    timeline, agreement = Timeline(["none", "polyp"], 25.0, truth), Agreement(truth)
    video = AnnotatedVideo(tmp_path / "a.mp4", ["none", "polyp"], 25.0, truth)
    for i in range(100):
        for add in (timeline, agreement):
            add(record(i, label=int(i >= 50)), None, None)
        drawn = np.asarray(video.draw(record(i, label=int(i >= 50)), frame(i).picture))
    picture = np.asarray(timeline.draw(SUMMARY))[:, Timeline.LEFT : -Timeline.RIGHT]
    shares = [(picture[y] == rgb(COLOURS[1])).all(1).mean() for y in (125, 150)]
    assert shares == pytest.approx([0.5, 0.7], abs=0.02), "labels above, truth below"
    right = 480 - round(480 / 42)  # of both ribbons; the newest frame is there
    stripes = [(drawn[-up, :right][::-1] == rgb(COLOURS[1])).all(1) for up in (23, 14)]
    assert [int(row.argmin()) for row in stripes] == [50 * 2, 70 * 2]
    assert agreement.summary(["none", "polyp"]) == {
        "frames": 100,
        "right": 80,
        "commonest": 70,
        "classes": {"none": {"frames": 30, "right": 30}, "polyp": {"frames": 70, "right": 50}},
    }


def test_the_timeline_of_nothing_and_of_no_head():
    nothing = Timeline([], None).draw(SUMMARY)
    timeline = Timeline([], None)
    for i in range(10):
        timeline(record(i, time=None, labels=[], probabilities=[], change=None if i == 0 else 0.0), None, None)
    drawn = timeline.draw(SUMMARY)
    assert drawn.size == nothing.size and np.any(np.asarray(drawn) != np.asarray(nothing)), "the latencies are missing"


def frame(i, height=48, width=64):
    return Frame(i, i / 25, torch.zeros(1), torch.full((height, width, 3), 128, dtype=torch.uint8))


def test_the_annotation_shows_label_confidence_and_keeps_irregular_times(tmp_path):
    times = [0.1, 0.14, 0.5, 0.5, 0.51, 2.0]
    video = AnnotatedVideo(tmp_path / "a.mp4", ["none", "polyp"], 25.0)
    for i, when in enumerate(times):
        video(record(i, label=i % 2, time=when), frame(i), None)
    video.close()
    with open_video(tmp_path / "a.mp4") as reader:
        frames = list(reader)
    expected = [0.1, 0.14, 0.5, 0.5, 0.51, 2.0]
    assert [f.time for f in frames] == pytest.approx(expected, abs=1e-3)
    height = round(480 * 48 / 64)
    for i, got in enumerate(frames):
        assert got.rgb.shape[1] == 480 and got.rgb[:height].float().std() < 4, "the picture itself is left alone"
        tint = got.rgb[height + 10 : height + 24, 12:16].float().mean((0, 1)).numpy()
        assert np.abs(tint - rgb(COLOURS[i % 2])).max() < 40


class MaskHead(torch.nn.Module):
    """A logit a patch, of its features and its place: about +5 in the left half, -5 in the right one."""

    def __init__(self, channels, grid, classes):
        super().__init__()
        self.grid, self.pixel = grid, torch.nn.Linear(channels, 1)
        self.place = torch.nn.Parameter(torch.where(torch.arange(grid[1]) < grid[1] / 2, 5.0, -5.0))
        self.classes = torch.nn.Linear(channels, classes) if classes else None

    def forward(self, features):  # (b, t, n, c), cls first
        mask = self.pixel(features[:, :, 1:]).squeeze(-1).unflatten(2, self.grid) * 0.1 + self.place
        logits = {} if self.classes is None else {"logits": self.classes(features.mean(2))}
        return {"mask": mask} | logits


def masking(classes=0):
    torch.manual_seed(0)
    model = create_model("endomamba", embed_dim=32, depth=2, img_size=64, num_classes=classes)
    model.head = MaskHead(32, model.config.grid, classes)
    return model.eval()


@pytest.mark.parametrize("classes", [0, 3])
def test_a_mask_is_drawn_where_a_head_gives_one(classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_model", lambda args, text: (masking(classes), True))
    from endomamba.video import write_video

    path = tmp_path / "a.mp4"
    write_video(path, [np.full((240, 480, 3), 100 + i, np.uint8) for i in range(12)])
    assert stream(path, "--out", tmp_path / "run", "--verify") == 0, capsys.readouterr().err
    assert check_folder(tmp_path / "run") == 12
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert all(line["mask_share"] == 0.5 and len(line["labels"]) == classes for line in lines)
    with open_video(tmp_path / "run" / "annotated.mp4") as reader:
        for i, frame in enumerate(reader):
            veiled = (1 - 0.3) * (100 + i) + 0.3 * rgb(MASK)
            assert np.abs(frame.rgb[40:200, 40:180].float().mean((0, 1)).numpy() - veiled).max() < 6
            assert np.abs(frame.rgb[40:200, 300:440].float().mean((0, 1)).numpy() - (100 + i)).max() < 4
            border = frame.rgb[100:140, 234:244].float().mean(0).numpy()
            assert np.abs(border - rgb(MASK)).max(1).min() < 60, "an outline; the veil alone is 108 off"


def test_a_mask_that_is_not_finite_is_no_mask(tmp_path, monkeypatch, capsys):
    model = masking()
    with torch.no_grad():
        model.head.place[0] = float("nan")
    monkeypatch.setattr(cli, "_model", lambda args, text: (model, True))
    path = encode(tmp_path / "a.mp4", 5)
    assert stream(path, "--out", tmp_path / "run") == 3
    assert "not finite at 5 of 5 frames" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [line["mask_share"] for line in lines] == [None] * 5


def test_outline_and_veil_by_hand():
    mask = torch.full((4, 4), -1.0)
    mask[:2, :2] = 1.0
    drawn = np.asarray(draw_mask(Image.new("RGB", (320, 320)), mask, veil=0.5)).astype(int)
    assert (drawn[20, 20] == np.round(rgb(MASK) / 2)).all(), "inside a veil, at the edge of the picture too"
    assert (drawn[0, 0] == drawn[20, 20]).all() and (drawn[200:, 200:] == 0).all()
    row = (drawn[20] == rgb(MASK)).all(1).nonzero()[0]
    assert len(row) == 1 and 158 <= row[0] <= 160, "one pixel of outline, inside"


def test_models_that_answer_otherwise_are_refused():
    model = masking()
    model.head = torch.nn.Identity()
    assert packed(model) is model
    for answer, words in (
        ({"depth": torch.zeros(1, 1, 2)}, "got depth"),
        ({}, "got nothing"),
        ({"mask": torch.zeros(1, 1, 2)}, r"mask must be \(b, t, h, w\), got \(1, 1, 2\)"),
    ):
        with pytest.raises(ValueError, match=words):
            Packed(model, answer)
    both = masking(3)
    wrapped = packed(both)
    frames = torch.rand(2, 3, 3, 64, 64)
    assert wrapped.unpack(wrapped(frames))["mask"].equal(both(frames)["mask"])
    assert wrapped.unpack(wrapped(frames))["logits"].equal(both(frames)["logits"])
    with pytest.raises(ValueError, match="where it gave"):
        both.head.classes = None
        wrapped(frames)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (960, 2), (2, 960), (540, 960)])
def test_pictures_of_any_shape_and_of_changing_size(tmp_path, height, width):
    video = AnnotatedVideo(tmp_path / "a.mp4", ["none", "polyp"], 25.0)
    for i, side in enumerate((width, width, 64)):
        video(record(i), frame(i, height, side), None)
    video.close()
    with open_video(tmp_path / "a.mp4") as reader:
        shapes = [tuple(frame.rgb.shape) for frame in reader]
    assert len(shapes) == 3 and len(set(shapes)) == 1
    assert 480 <= shapes[0][1] <= 960 and shapes[0][0] <= 1100


def test_whole_fragments_survive_any_cut(tmp_path):
    video = AnnotatedVideo(tmp_path / "a.mp4", ["none", "polyp"], 5.0)
    for i in range(20):
        video(record(i, time=i / 5), frame(i), None)
    video.close()
    data = (tmp_path / "a.mp4").read_bytes()
    counts = set()
    for size in np.linspace(0, len(data), 40).astype(int):
        cut = tmp_path / "cut.mp4"
        cut.write_bytes(data[:size])
        keep_whole_fragments(cut)
        if not cut.exists():
            counts.add(0)
            continue
        with open_video(cut) as reader:
            counts.add(sum(1 for _ in reader))
        assert not reader.damage
    assert counts == {0, 5, 10, 15, 20}
