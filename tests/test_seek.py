"""Parts of a video: the same frames to the bit, with the same numbers and times, as when it is read from its start."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pydicom = pytest.importorskip("pydicom")

from endomamba import cli, video  # noqa: E402
from endomamba.models import create_model  # noqa: E402
from endomamba.sources import open_source  # noqa: E402
from endomamba.video import VideoError, open_video  # noqa: E402

from .test_video import FAST, H, W, add_noise, encode, needs_encoder, number_in, picture  # noqa: E402

FRAMES = 60
X265 = "log-level=none:pools=1:"
SVT = FAST["libsvtav1"] | {"svtav1-params": "lp=1:keyint=12"}
CLIPS = {  # file: encoder, its options, whether a jump is possible
    "b-frames.mp4": ("libx264", {"bf": "3"}, True),
    "open-gop.mp4": ("libx264", {"x264-params": "open-gop=1:bframes=3:b-adapt=0"}, True),
    "open-gop.ts": ("libx264", {"x264-params": "open-gop=1:bframes=3:b-adapt=0"}, True),
    "intra-refresh.mkv": ("libx264", {"x264-params": "intra-refresh=1"}, False),
    "interlaced.ts": ("libx264", {"x264-params": "tff=1"}, False),
    "hevc.mp4": ("libx265", {"preset": "ultrafast", "x265-params": X265 + "open-gop=1:bframes=4"}, True),
    "hevc.mkv": ("libx265", {"preset": "ultrafast", "x265-params": X265 + "open-gop=0:bframes=2"}, True),
    "hidden-frames.webm": ("libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "8"}, True),
    "av1.mp4": ("libsvtav1", SVT, True),
    "av1.mkv": ("libsvtav1", SVT, True),
    "mpeg4.mp4": ("mpeg4", {"bf": "2"}, False),
    "mpeg4.avi": ("mpeg4", {}, False),
    "pictures.avi": ("mjpeg", {}, True),
    "no-index.h264": ("libx264", {}, False),
}


@pytest.fixture(scope="module", params=CLIPS)
def clip(request, tmp_path_factory):
    codec, options, jumps = CLIPS[request.param]
    needs_encoder(codec)
    path = tmp_path_factory.mktemp("seek") / request.param
    encode(path, FRAMES, gop=12, codec=codec, options=options)
    return path, all_of(path), jumps


def all_of(path, **options):
    with open_video(path, **options) as reader:
        frames = list(reader)
    assert not reader.damage, reader.damage
    return frames


def assert_same(got, expected):
    assert [(frame.index, frame.time) for frame in got] == [(frame.index, frame.time) for frame in expected]
    assert all(torch.equal(a.rgb, b.rgb) for a, b in zip(got, expected, strict=True))


def test_any_frame_can_be_the_first(clip):
    path, frames, _ = clip
    assert [number_in(frame.rgb) for frame in frames] == list(range(FRAMES))
    for start, stop in ((1, 3), (11, 13), (12, 13), (13, 14), (25, 50), (35, 36), (47, 48), (59, None)):
        assert_same(all_of(path, start=start, stop=stop), frames[start:stop])
    with pytest.raises(VideoError, match="ends before frame 60, after 60 frames"):
        all_of(path, start=FRAMES)


def test_any_time_can_be_the_first(clip):
    path, frames, _ = clip
    if frames[1].time is None:
        with pytest.raises(VideoError, match=r"frames without a time: name 0.5 s as the index of a frame"):
            all_of(path, start=0.5)
        return
    for start, stop in ((13, 15), (36, 40), (58, None)):
        end = None if stop is None else frames[stop].time
        assert_same(all_of(path, start=frames[start].time, stop=end), frames[start:stop])
        assert_same(all_of(path, start=frames[start].time - 0.01, stop=stop), frames[start:stop])
    with pytest.raises(VideoError, match="ends before 99 s"):
        all_of(path, start=99.0)


def test_a_jump_decodes_from_a_keyframe_on(clip, monkeypatch):
    path, _, jumps = clip
    seen = []
    monkeypatch.setattr(video._Clock, "tick", lambda self, packet: seen.append(packet.pts))
    all_of(path, start=50, stop=51)
    if jumps:
        assert len(seen) < 35, "packets that reached the decoder, of one group of frames and what it looks ahead"
    else:
        assert len(seen) > 40


def test_stop_alone_and_end_checks(clip):
    path, frames, _ = clip
    with open_video(path, stop=7) as reader:
        assert_same(list(reader), frames[:7])
    assert reader.done and not reader.gaps
    assert_same(all_of(path, stop=FRAMES + 10), frames)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_variable_frame_rate(tmp_path, name):
    ticks = np.cumsum(np.random.default_rng(0).integers(12, 300, 40))
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"bf": "2"})
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        stream.codec_context.gop_size = 8
        for i, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(i), "rgb24")
            frame.pts, frame.time_base = int(tick), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames = all_of(path)
    assert [number_in(frame.rgb) for frame in frames] == list(range(40))
    for first in (7, 8, 22, 39):
        assert_same(all_of(path, start=first), frames[first:])
        assert_same(all_of(path, start=frames[first].time), frames[first:])
        assert_same(all_of(path, start=frames[first - 1].time + 1e-3), frames[first:])


def test_a_matroska_without_its_index(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", options={"live": "1"}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        stream.codec_context.gop_size = 12
        for i in range(FRAMES):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), "rgb24")))
        container.mux(stream.encode())
    assert b"\x1c\x53\xbb\x6b" not in path.read_bytes(), "the mark of Cues"
    frames = all_of(path)
    for first in (5, 30, 59):
        assert_same(all_of(path, start=first), frames[first:])


def hide(path, frames):
    """Moves the beginning of the mp4's only edit so many frames later."""
    data = bytearray(path.read_bytes())
    place = data.find(b"elst") + 16  # version and flags, count, duration
    later = int.from_bytes(data[place : place + 4], "big") + frames * 512  # of 12,800 a second
    data[place : place + 4] = later.to_bytes(4, "big")
    path.write_bytes(data)
    return path


def test_frames_that_an_edit_list_hides_are_not_counted_and_told(tmp_path):
    path = hide(encode(tmp_path / "a.mp4", 50, gop=25), 10)
    with open_video(path) as reader:
        frames = list(reader)
    assert [number_in(frame.rgb) for frame in frames] == list(range(10, 50)) and not reader.damage
    assert reader.notices == ["its edit list hides 10 of the frames it holds"]
    for first in (3, 10, 25):
        assert_same(all_of(path, start=first), frames[first:])


def test_damage_behind_the_start_is_found_and_damage_before_it_is_not_met(tmp_path):
    path = encode(tmp_path / "a.mp4", 150, gop=25, rough=True)
    add_noise(path)
    with open_video(path, start=20) as reader:
        frames = list(reader)
    assert frames[0].index == 20 and number_in(frames[0].rgb) == 20 and reader.damage.lost > 0
    with open_video(path, start=130) as reader:
        assert [number_in(frame.rgb) for frame in reader] == list(range(130, 150))
    assert not reader.damage


def test_sources_that_cannot_jump_leave_out_what_lies_before(tmp_path):
    from PIL import Image

    for i in range(12):
        Image.fromarray(picture(i)).save(tmp_path / f"frame{i}.png")
    reader = open_source(str(tmp_path))
    reader.select(4, 9)
    assert reader.expected == 5
    assert [(frame.index, number_in(frame.rgb)) for frame in reader] == [(i, i) for i in range(4, 9)]
    clip = pydicom.examples.get_path("ybr_color")
    frames = all_of(clip)
    assert_same(all_of(clip, start=7, stop=9), frames[7:9])
    assert_same(all_of(clip, start=frames[20].time), frames[20:])


@pytest.mark.parametrize(
    ("start", "stop"), [(-1, None), (float("nan"), None), (5, 5), (2.0, 1.0), (None, float("inf"))]
)
def test_a_selection_that_means_nothing_is_refused(tmp_path, start, stop):
    path = encode(tmp_path / "a.mp4", 3)
    with pytest.raises(ValueError, match="select: "):
        open_video(path, start=start, stop=stop)


# ---- the command


@pytest.fixture
def small_model(monkeypatch):
    model = create_model("endomamba", embed_dim=16, depth=2, img_size=16, num_classes=2).eval()
    monkeypatch.setattr(cli, "_model", lambda args, text: (model, True))


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        (("--start", "30", "--stop", "33"), [30, 31, 32]),
        (("--start", "1.2s", "--stop", "1.28s"), [30, 31]),
        (("--start", "0:01.2", "--max-frames", "2"), [30, 31]),
        (("--stop", "2"), [0, 1]),
    ],
)
def test_stream_reads_what_lies_between(options, numbers, tmp_path, small_model, capsys):
    path = encode(tmp_path / "a.mp4", FRAMES, gop=12)
    assert cli.main(["stream", str(path), "--out", str(tmp_path / "a.jsonl"), "--threads", "1", *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == numbers
    assert [line["time"] for line in lines] == pytest.approx([number / 25 for number in numbers])
    assert "frames   from " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--start", "60"), "ends before frame 60, after 60 frames"),
        (("--start", "1:00"), "ends before 60 s, after 60 frames"),
        (("--start", "5", "--stop", "4"), "stop must lie behind start, got frame 5 to frame 4"),
        (("--start", "5", "--stop", "0.1s"), "holds no frame between --start and --stop"),
    ],
)
def test_stream_says_why_there_is_nothing(options, sentence, tmp_path, small_model, capsys):
    path = encode(tmp_path / "a.mp4", FRAMES)
    assert cli.main(["stream", str(path), "--out", str(tmp_path / "a.jsonl"), "--quiet", *options]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1


def test_a_place_is_a_number_or_a_time():
    places = {"0": 0, "250": 250, "10s": 10.0, "0.5": 0.5, "1:02": 62.0, "1:02:03.5": 3723.5, "7.s": 7.0}
    for text, place in places.items():
        assert (cli._place(text), type(cli._place(text))) == (place, type(place))
    for text in ("", "-1", "a", "1:2:3:4", "1e3", "s", "1.2.3"):
        with pytest.raises(Exception, match="must be a frame's number"):
            cli._place(text)
