"""Long videos and folders of pictures cut into clips."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from endomamba import cli
from endomamba.clips import count_frames, read_frames
from endomamba.train import build, manifest
from endomamba.train.build import BuildConfig
from endomamba.train.manifest import DataError
from endomamba.video import open_video, write_video

SMALL = BuildConfig(seconds=0.4, fps=20, side=32)  # clips of 8 frames


def picture(i, height=48, width=64):
    """Its number in eight blocks from left to right, on noise that no frame shares."""
    frame = np.random.default_rng(i).integers(90, 130, (height, width, 3)).astype(np.uint8)
    for bit in range(8):
        frame[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 255 * (i >> bit & 1)
    return frame


def number(frame):
    """(h, w, 3) -> the number that `picture` wrote into it."""
    h, w = frame.shape[:2]
    middles = [(2 * bit + 1) * w // 16 for bit in range(8)]
    return sum(int(frame[h // 4, x].float().mean() > 128) << bit for bit, x in enumerate(middles))


def video(path, frames, fps=20, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, fps=fps, gop=6, options={"crf": "5", "threads": "1"}, **options)


def numbers(path):
    return [number(frame) for frame in read_frames(path, range(count_frames(path)))]


def test_clips_hold_the_frames_in_order(tmp_path):
    video(tmp_path / "in" / "a" / "x.mp4", [picture(i) for i in range(21)])
    (built,) = build.build(tmp_path / "in", tmp_path / "out", SMALL)
    assert built == ("a/x.mp4", (8, 8, 5), 0, "", "")
    made = [tmp_path / "out" / "a" / "x.mp4" / f"0000{i}.mp4" for i in range(3)]
    assert [numbers(path) for path in made] == [[*range(8)], [*range(8, 16)], [*range(16, 21)]]
    with open_video(made[0]) as reader:
        assert (reader.info.height, reader.info.width, reader.info.fps) == (32, 42, 20)
    assert (tmp_path / "out" / "train_list.txt").read_text().splitlines()[1] == "a/x.mp4/00001.mp4 0"
    listed = manifest.read(tmp_path / "out" / "manifest.jsonl")
    assert [len(entry) for entry in listed.entries] == [8, 8, 5]
    assert cli.main(["data", "check", str(listed.path)]) == 0
    from endomamba.train.layouts import LAYOUTS

    assert LAYOUTS["pretraining"].convert(tmp_path / "out")[1] == list(listed.entries)


@pytest.mark.parametrize(
    "fps, want",
    [
        (20, [*range(10)]),
        (40, [*range(0, 20, 2)]),
        (10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        (30, [0, 1, 3, 4, 6, 7, 9, 10, 12, 13]),
    ],
)
def test_the_rate_is_changed_by_time(tmp_path, fps, want):
    """Each frame is the newest one of its time."""
    video(tmp_path / "in" / "x.mp4", [picture(i) for i in range(round(fps / 2))], fps=fps)
    config = BuildConfig(seconds=0.5, fps=20, side=32)
    (built,) = build.build(tmp_path / "in", tmp_path / "out", config)
    assert numbers(tmp_path / "out" / "x.mp4" / "00000.mp4") == want and built.clips == (10,)


def test_uniform_frames_are_left_out_and_clips_end_there(tmp_path):
    black = np.zeros((48, 64, 3), np.uint8)
    frames = [picture(i) for i in range(30)]
    for i in (5, 14, 15):
        frames[i] = black + i
    video(tmp_path / "in" / "x.mp4", frames)
    (built,) = build.build(tmp_path / "in", tmp_path / "out", SMALL)
    made = sorted((tmp_path / "out" / "x.mp4").glob("*.mp4"))
    # 0-4, 6-13, 16-23 and 24-29; nothing over a frame that is gone.
    assert [numbers(path) for path in made] == [[*range(5)], [*range(6, 14)], [*range(16, 24)], [*range(24, 30)]]
    assert built.left_out == 3
    (other,) = build.build(tmp_path / "in", tmp_path / "all", BuildConfig(0.4, 20, 32, least_std=0))
    assert sum(other.clips) == 30 and other.left_out == 0


def test_folders_of_pictures(tmp_path):
    from PIL import Image

    for case in ("case2", "case10"):
        (tmp_path / "in" / case).mkdir(parents=True)
        for i in range(9):
            Image.fromarray(picture(i)).save(tmp_path / "in" / case / f"{i}.png")
    config = BuildConfig(0.4, 20, 32, pictures_fps=10)  # each picture twice
    built = build.build(tmp_path / "in", tmp_path / "in" / "out", config)
    assert [one.source for one in built] == ["case10", "case2"] and built[0].clips == (8, 8)
    assert built[0].left_out == 2  # a rest shorter than half a clip
    assert numbers(tmp_path / "in" / "out" / "case2" / "00001.mp4") == [4, 4, 5, 5, 6, 6, 7, 7]
    again = build.build(tmp_path / "in", tmp_path / "in" / "out", config)  # what was made is no source
    assert again == built


def test_a_gap_in_time_ends_a_clip(tmp_path):
    import av

    path = tmp_path / "in" / "x.mkv"
    path.parent.mkdir()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=20, options={"crf": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 20)
        for i in range(16):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts = i + (100 if i >= 6 else 0)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    build.build(tmp_path / "in", tmp_path / "out", SMALL)
    made = sorted((tmp_path / "out" / "x.mkv").glob("*.mp4"))
    assert [numbers(path) for path in made] == [[*range(6)], [*range(6, 14)]]


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    for i in range(4):
        video(tmp_path / "in" / f"{i}.mp4", [picture(40 * i + k) for k in range(20)])
    whole = build.build(tmp_path / "in", tmp_path / "whole", SMALL)

    written = []
    write = build._write_clip

    def until(count):
        def write_some(path, clip, config):
            if len(written) == count:
                raise KeyboardInterrupt
            written.append(path)
            write(path, clip, config)

        return write_some

    for count in (1, 4):  # in the middle of the first source, and of a later one
        monkeypatch.setattr(build, "_write_clip", until(count))
        with pytest.raises(KeyboardInterrupt):
            build.build(tmp_path / "in", tmp_path / "out", SMALL)
        assert not (tmp_path / "out" / "train_list.txt").exists()
    monkeypatch.setattr(build, "_write_clip", until(10**9))
    before = len(written)
    assert build.build(tmp_path / "in", tmp_path / "out", SMALL) == whole
    assert 4 <= len(written) - before < 12 - 2  # of twelve clips, what was finished is not made again

    def content(folder):
        files = [p for p in sorted(folder.rglob("*.*")) if p.is_file()]
        read = {".mp4": numbers}  # not the bytes: the encoder has several ways to write the same
        return {p.relative_to(folder).as_posix(): read.get(p.suffix, type(p).read_bytes)(p) for p in files}

    assert content(tmp_path / "whole") == content(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.part*"))
    # A source that changed is done again, the others are not.
    video(tmp_path / "in" / "2.mp4", [picture(k) for k in range(9)])
    written.clear()
    changed = build.build(tmp_path / "in", tmp_path / "out", SMALL)
    assert {path.parent.name for path in written} == {"2.mp4"} and changed[2].clips == (8,)
    assert len(list((tmp_path / "out" / "2.mp4").iterdir())) == 1
    (tmp_path / "in" / "1.mp4").write_bytes(b"no video" * 100)
    assert build.build(tmp_path / "in", tmp_path / "out", SMALL)[1].error
    rows = [json.loads(line) for line in (tmp_path / "out" / "build.jsonl").read_text().splitlines()[1:]]
    assert [row["source"] for row in rows] == ["0.mp4", "2.mp4", "3.mp4"]
    with pytest.raises(DataError, match="choose another --out"):
        build.build(tmp_path / "in", tmp_path / "out", BuildConfig(0.4, 20, 64))


def folder_of_pictures(path, count=8, first=0):
    from PIL import Image

    path.mkdir(parents=True)
    for i in range(first, first + count):
        Image.fromarray(picture(i)).save(path / f"{i}.png")


@pytest.mark.parametrize("source, out", [("in", "in"), ("top/in", "top"), ("in", "other")])
def test_nothing_is_deleted_that_is_no_clip(tmp_path, source, out):
    """out is the folder itself, or above it, or holds something else."""
    folder_of_pictures(tmp_path / source / "x")
    (tmp_path / out / "x").mkdir(parents=True, exist_ok=True)
    (tmp_path / out / "x" / "notes.txt").write_text("not to be lost")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="choose another --out"):
        build.build(tmp_path / source, tmp_path / out, SMALL)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_inside_of_a_source(tmp_path):
    """Each is done again without the clips of the other; the folder itself can be one."""
    for i, name in enumerate((".", "x", "x/y")):
        folder_of_pictures(tmp_path / "in" / name, first=20 * i)
    (tmp_path / "in" / "x" / "._z.mp4").write_bytes(b"what some systems leave beside a file")
    build.build(tmp_path / "in", tmp_path / "out", SMALL)
    (tmp_path / "in" / "x" / "40.png").write_bytes((tmp_path / "in" / "x" / "20.png").read_bytes())
    built = build.build(tmp_path / "in", tmp_path / "out", SMALL)
    assert [(one.source, one.clips) for one in built] == [(".", (6,)), ("x", (6,)), ("x/y", (6,))]
    listed = manifest.read(tmp_path / "out" / "manifest.jsonl")
    assert [numbers(listed.file(entry.path))[0] for entry in listed.entries] == [0, 20, 40]


def test_a_line_that_was_being_written_is_no_harm(tmp_path, monkeypatch):
    for i in range(2):
        video(tmp_path / "in" / f"{i}.mp4", [picture(40 * i + k) for k in range(8)])
    made = build.build(tmp_path / "in", tmp_path / "out", SMALL)
    journal = tmp_path / "out" / "build.jsonl"
    text = journal.read_text()
    journal.write_text(text[:-20])
    cut = []
    monkeypatch.setattr(build, "_write_clip", lambda path, clip, config: cut.append(path.parent.name))
    assert build.build(tmp_path / "in", tmp_path / "out", SMALL) == made and cut == ["1.mp4"]
    assert journal.read_text() == text


def test_workers_make_the_same(tmp_path):
    for i in range(3):
        video(tmp_path / "in" / f"{i}.mp4", [picture(40 * i + k) for k in range(17)])
    alone = build.build(tmp_path / "in", tmp_path / "a", SMALL)
    assert build.build(tmp_path / "in", tmp_path / "b", SMALL, workers=3) == alone
    assert (tmp_path / "a" / "build.jsonl").read_bytes() == (tmp_path / "b" / "build.jsonl").read_bytes()


def test_what_cannot_be_read_is_named_counted_and_skipped(tmp_path, capsys, caplog):
    for name in ("a", "cut"):
        video(tmp_path / "in" / f"{name}.mp4", [picture(k) for k in range(60)])
    whole = (tmp_path / "in" / "cut.mp4").read_bytes()
    (tmp_path / "in" / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    raw = bytearray(whole)
    raw[len(raw) // 2 : len(raw) // 2 + 3000] = bytes(3000)
    (tmp_path / "in" / "cut.mp4").write_bytes(raw)
    given = ["data", "build", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--seconds", "0.4", "--fps", "20",
             "--side", "32"]  # fmt: skip
    assert cli.main(given) == 3
    assert "2 sources damaged or unreadable" in capsys.readouterr().out
    said = [record.getMessage() for record in caplog.records]
    assert any("noise.mp4" in text for text in said) and any("cut.mp4: damaged" in text for text in said)
    rows = [json.loads(line) for line in (tmp_path / "out" / "build.jsonl").read_text().splitlines()[1:]]
    assert {row["source"] for row in rows} == {"a.mp4", "cut.mp4"}  # what could not be read is tried again
    for path in (tmp_path / "out" / "cut.mp4").glob("*.mp4"):
        shown = torch.tensor(numbers(path))
        assert (shown.diff() == 1).all(), "a clip goes over damage"
    listed = (tmp_path / "out" / "train_list.txt").read_text()
    assert "a.mp4/00000.mp4 0" in listed and "noise" not in listed


@pytest.mark.parametrize(
    "options, why",
    [
        (["--side", "33"], "side must be even"),
        (["--fps", "0"], "fps must be a number of at least"),
        (["--seconds", "-1"], "seconds must be a number of at least"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, why):
    assert cli.main(["data", "build", str(tmp_path), "--out", str(tmp_path / "o"), *options]) == 2
    assert why in capsys.readouterr().err


def test_nothing_to_cut(tmp_path):
    with pytest.raises(DataError, match="holds no videos and no folders of pictures"):
        build.build(tmp_path, tmp_path / "out", SMALL)
    with pytest.raises(DataError, match="is not a folder"):
        build.build(tmp_path / "gone", tmp_path / "out", SMALL)
