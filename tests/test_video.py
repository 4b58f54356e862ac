"""Decoding and encoding with real files: every frame carries its own number as ten 16 x 16 blocks, black or white."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402

from endomamba.video import VideoError, open_video, preprocess, write_video  # noqa: E402

H, W, FPS = 112, 192, 25
H264_TS = "1.2.840.10008.1.2.4.102"


def picture(number: int, rough: bool = False) -> np.ndarray:
    """rough: noise that compresses badly, for files in which 20 kB are a small part."""
    y, x = np.mgrid[0:H, 0:W]
    rgb = np.stack([x + 3 * number, 2 * y + number, (x + y) // 2 + 2 * number], -1).astype(np.uint8)
    if rough:
        rgb = np.random.default_rng(number).integers(0, 256, rgb.shape, np.uint8)
    for bit in range(10):
        rgb[8:24, 16 + 16 * bit : 32 + 16 * bit] = 255 * (number >> bit & 1)
    return rgb


def number_in(rgb: torch.Tensor) -> int:
    """Reads it back, at whatever size the frame has now."""
    h, w = rgb.shape[:2]
    marks = [rgb[16 * h // H, (24 + 16 * bit) * w // W].float().mean() > 127 for bit in range(10)]
    return sum(int(mark) << bit for bit, mark in enumerate(marks))


def encode(path, frames=75, gop=25, rough=False, **options):
    write_video(path, (picture(i, rough) for i in range(frames)), fps=FPS, gop=gop, **options)
    return path


def packets_of(path):
    """-> (position in the file, size, is keyframe, number of the frame) of each packet, in the file's order."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        return [(p.pos, p.size, p.is_keyframe, round(float(p.pts * p.time_base) * FPS)) for p in packets]


def add_noise(path, count=5):
    """Over so many whole packets in the middle; -> the numbers of the frames that nobody can decode any more.

    The first bytes, a length in MP4, become impossible: FFmpeg must notice, whatever x264 made of the pictures, which
    is not always the same (its output depends on what memory held before, with one thread too).
    """
    data, packets = bytearray(path.read_bytes()), packets_of(path)
    first = next(i for i in range(len(packets) // 2, len(packets)) if not packets[i][2])
    for place, size, _, _ in packets[first : first + count]:
        data[place : place + size] = b"\xff" * 4 + np.random.default_rng(0).bytes(size - 4)
    path.write_bytes(data)
    after = next(i for i in range(first + count, len(packets)) if packets[i][2])
    return sorted(number for _, _, _, number in packets[first:after])


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    """Index in front, so that a truncated copy still opens."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        stream.codec_context.gop_size = 25
        for i in range(150):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i), "rgb24")))
        container.mux(stream.encode())
    return path


def read(path, size=None):
    with open_video(path, size) as reader:
        frames = [(frame.index, frame.time, number_in(frame.rgb)) for frame in reader]
    assert [index for index, _, _ in frames] == list(range(len(frames)))
    return [(time, number) for _, time, number in frames], reader


# ---- frame accuracy


def needs_encoder(codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no encoder {codec}")


FAST = {
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "8", "crf": "15", "svtav1-params": "lp=1"},
}


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.ts", "libx264"),
        ("a.mp4", "libx265"),
        ("a.webm", "libvpx-vp9"),
        ("a.mp4", "libsvtav1"),
        ("a.mp4", "mpeg4"),
        ("a.avi", "mpeg4"),
        ("a.avi", "mjpeg"),
    ],
)
@pytest.mark.parametrize("size", [None, 224])
def test_every_frame_comes_once_in_order_with_its_own_time(tmp_path, name, codec, size):
    needs_encoder(codec)
    frames, reader = read(encode(tmp_path / name, 40, codec=codec, options=FAST.get(codec)), size)
    assert [number for _, number in frames] == list(range(40))
    begin = frames[0][0] if name == "a.ts" else 0.0  # a transport stream begins at any time
    assert [time - begin for time, _ in frames] == pytest.approx([i / FPS for i in range(40)], abs=2e-3)
    assert not reader.damage and reader.done
    assert (reader.info.height, reader.info.width, reader.info.fps) == (H, W, FPS)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_variable_frame_rate_keeps_every_time(tmp_path, name):
    """From 12 ms to 1.5 s between two frames; none is doubled, left out or moved."""
    rng = np.random.default_rng(0)
    ticks = np.cumsum(np.concatenate([[0], rng.integers(12, 100, 20), [1500], rng.integers(12, 100, 18)]))
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        for i, tick in enumerate(ticks):
            frame = av.VideoFrame.from_ndarray(picture(i), "rgb24")
            frame.pts, frame.time_base = int(tick), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    frames, reader = read(path)
    assert [number for _, number in frames] == list(range(40)) and not reader.damage
    assert [time for time, _ in frames] == pytest.approx(ticks / 1000, abs=1.1e-3)


def rotated(path, degrees):
    """Sets the display matrix of an mp4's track: so many degrees to the left on the screen."""
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = [cos << 16, -sin << 16, 0, sin << 16, cos << 16, 0, 0, 0, 1 << 30]
    data[place : place + 36] = np.array(matrix, ">i4").tobytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("size", [None, (112, 192), (64, 128)])
def test_a_rotation_flag_is_obeyed(tmp_path, degrees, size):
    path = rotated(encode(tmp_path / "a.mp4", 3, options={"crf": "8"}), degrees)
    upright = torch.from_numpy(np.rot90(picture(1), degrees // 90).copy())
    with open_video(path) as reader:
        reader.show(size, picture=100)
        frame = list(reader)[1]
    expected = preprocess(upright, size or upright.shape[:2], mean=(0, 0, 0), std=(1, 1, 1)).movedim(0, -1) * 255
    assert frame.rgb.shape == expected.shape
    assert (frame.rgb - expected).abs().mean() < 6, "turned the wrong way it is off by more than 40"
    height, width = upright.shape[:2]
    assert frame.picture.shape == ((100, 58, 3) if height > width else (58, 100, 3))


@pytest.mark.parametrize(("height", "width"), [(111, 191), (37, 64), (64, 35), (1, 1)])
def test_odd_sizes(tmp_path, height, width):
    path = tmp_path / "a.mkv"
    pictures = [np.full((height, width, 3), 60 * i, np.uint8) for i in range(4)]
    write_video(path, pictures, codec="ffv1", pix_fmt="yuv444p")
    with open_video(path) as reader, open_video(path) as small:
        small.show(32, picture=50)
        for i, (frame, other) in enumerate(zip(reader, small, strict=True)):
            assert frame.rgb.shape == (height, width, 3) and other.rgb.shape == (32, 32, 3)
            assert (frame.rgb.int() - 60 * i).abs().max() <= 3 and (other.rgb.int() - 60 * i).abs().max() <= 3
            assert all(side % 2 == 0 and 2 <= side <= 50 for side in other.picture.shape[:2])
    assert not reader.damage


def test_size_is_height_and_width_and_the_picture_is_squashed(tmp_path):
    path = encode(tmp_path / "a.mp4", 3)
    with open_video(path, (64, 320)) as reader:
        frame = next(iter(reader))
    assert frame.rgb.shape == (64, 320, 3) and frame.rgb.dtype == torch.uint8
    with pytest.raises(ValueError, match="size must be positive"):
        open_video(path, 0)


@pytest.mark.parametrize("tagged", ["bt709", "bt470bg", "full"])
def test_colours_follow_the_matrix_and_the_range_of_the_file(tmp_path, tagged):
    """Red, green and blue come back within 4 levels; the other matrix misses by up to 30, the other range by 16."""
    from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

    matrix = Colorspace.ITU709 if tagged == "bt709" else Colorspace.ITU601
    colour_range = ColorRange.JPEG if tagged == "full" else ColorRange.MPEG
    colours = np.repeat([[[200, 40, 40], [40, 200, 40], [40, 40, 200]]], 32, axis=1)
    rgb = np.repeat(colours, 64, axis=0).astype(np.uint8)
    path = tmp_path / "colour.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = int(matrix), int(colour_range)
        frame = VideoReformatter().reformat(
            av.VideoFrame.from_ndarray(rgb, "rgb24"),
            format="yuv420p",
            dst_colorspace=matrix,
            src_color_range=ColorRange.JPEG,
            dst_color_range=colour_range,
        )
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with open_video(path) as reader:
        got = next(iter(reader)).rgb[32, 16::32].int()
    assert (got - torch.from_numpy(rgb[32, 16::32]).int()).abs().max() <= 4


def test_trimmed_by_an_edit_list_is_not_damage(tmp_path):
    """Frames that the file itself hides are counted in its header but are no loss."""
    source, trimmed = encode(tmp_path / "a.mp4", 50), tmp_path / "trimmed.mp4"
    with av.open(str(source)) as a, av.open(str(trimmed), "w") as b:
        stream = b.add_stream_from_template(a.streams.video[0])
        for packet in a.demux(video=0):
            if packet.size:
                packet.pts -= int(0.4 / packet.time_base)
                packet.dts -= int(0.4 / packet.time_base)
                packet.stream = stream
                b.mux(packet)
    frames, reader = read(trimmed)
    assert not reader.damage
    numbers = [number for _, number in frames]
    assert numbers == list(range(numbers[0], 50)) and numbers[0] in (0, 10)


def test_threads_do_not_change_a_frame(mp4):
    with open_video(mp4, 224, threads=1) as one, open_video(mp4, 224, threads=4) as four:
        for a, b in zip(one, four, strict=True):
            assert a.time == b.time and torch.equal(a.rgb, b.rgb)


# ---- damage


def assert_right(frames):
    """Whatever came out is the right picture at the right time, in order."""
    assert all(round(time * FPS) == number for time, number in frames)
    assert [time for time, _ in frames] == sorted(time for time, _ in frames)


def assert_beginning(numbers):
    """0, 1, 2, ... but for frames that the last one overtook in the file (B frames)."""
    assert numbers[:-3] == list(range(len(numbers) - 3)) and numbers[-1] < len(numbers) + 3


def test_truncated_file_gives_the_frames_that_are_there(mp4, tmp_path):
    path = tmp_path / "cut.mp4"
    path.write_bytes(mp4.read_bytes()[: mp4.stat().st_size // 2])
    frames, reader = read(path)
    assert_right(frames)
    assert_beginning([number for _, number in frames])
    assert 40 < len(frames) < 110 and "ends early: it declares 150 frames" in str(reader.damage)


def test_truncated_matroska_is_noticed_though_it_counts_no_frames(tmp_path):
    whole, cut = encode(tmp_path / "a.mkv"), tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 2 // 3])
    frames, reader = read(cut)
    assert_right(frames)
    assert len(frames) > 25 and "it declares 3.00 s" in str(reader.damage)


def test_noise_in_the_middle_costs_the_frames_up_to_the_next_keyframe(tmp_path):
    path = encode(tmp_path / "a.mp4", 150, rough=True)
    gone = add_noise(path)
    frames, reader = read(path)
    assert_right(frames)
    assert sorted(set(range(150)) - {number for _, number in frames}) == gone and 5 <= len(gone) <= 30
    assert reader.damage.lost == len(gone) and "could not be decoded" in str(reader.damage)


def test_packets_that_vanish_without_an_error_are_noticed(tmp_path):
    path = encode(tmp_path / "a.mkv", 150, rough=True)
    add_noise(path)
    frames, reader = read(path)
    assert reader.damage and 60 < len(frames) < 150


def test_damage_counts_all_and_keeps_few():
    from endomamba.video import Damage

    damage = Damage()
    assert not damage
    for i in range(1000):
        damage.add(f"packet {i}")
    assert damage and damage.count == 1000 and len(damage.notes) == 5 and str(damage).endswith("and 995 more")


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ([i / 25 for i in range(30)], ""),
        ([i / 25 for i in range(30) if i != 17], "by its times one frame is missing, between 0.640 s and 0.720 s"),
        ([i / 25 for i in range(60) if i not in (17, 30, 31)], "by its times about 3 frames are missing, the first"),
        ([i / 25 for i in range(40) if i % 3], ""),  # no rhythm to miss a frame in
        ([0.0, 0.04, 0.2, 0.12, 0.28], "its times go back at 0.120 s"),
        ([None] * 30, ""),
    ],
)
def test_gaps_in_a_rhythm_are_told(times, words):
    from endomamba.video import Gaps

    gaps = Gaps(25.0)
    for time in times:
        gaps.add(time)
    assert str(gaps).startswith(words) and bool(gaps) == bool(str(gaps)) == bool(words)


# ---- not a video


def no_moov(path):
    data = encode(path, 10).read_bytes()
    path.write_bytes(data[: data.rfind(b"moov") - 4])


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, 1024 * i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "make", "sentence"),
    [
        ("missing.mp4", lambda path: None, "does not exist"),
        ("empty.mp4", lambda path: path.write_bytes(b""), "is empty"),
        ("folder.mp4", lambda path: path.mkdir(), "is a folder"),
        ("text.mp4", lambda path: path.write_text("not a video\n" * 100), "is not a video that FFmpeg can read"),
        ("text.txt", lambda path: path.write_text("not a video\n" * 100), "is a text file"),
        ("noise.mp4", lambda path: path.write_bytes(np.random.default_rng(0).bytes(50_000)), "is not a video"),
        ("moovless.mp4", no_moov, "is not a video that FFmpeg can read"),
        ("sound.m4a", audio_only, "has no video stream: it holds only audio"),
        ("text.dcm", lambda path: path.write_text("not a video\n" * 100), "is not a DICOM file"),
        ("a name: with %03d in it.mp4", lambda path: None, "does not exist"),
    ],
)
def test_one_sentence_for_what_is_no_video(tmp_path, name, make, sentence):
    path = tmp_path / name
    make(path)
    with pytest.raises(VideoError, match=sentence) as error:
        open_video(path)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_odd_file_names_are_names(tmp_path):
    path = encode(tmp_path / "file:100% pipe:0 %03d.mp4", 5)
    frames, _ = read(path)
    assert len(frames) == 5


def test_without_pyav_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['av'] = None\n"
        "import endomamba.video as v, pathlib\n"
        "p = pathlib.Path(sys.argv[1]); p.write_bytes(b'x')\n"
        "try: v.open_video(p)\n"
        "except v.VideoError as e: print(e)\n"
    )
    out = subprocess.run([sys.executable, "-c", code, tmp_path / "a.mp4"], capture_output=True, text=True, check=True)
    assert "pip install endomamba[video]" in out.stdout


def test_importing_the_module_imports_no_decoder():
    code = "import sys, endomamba.video; print([m for m in ('av', 'pydicom', 'PIL') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- DICOM


def write_dicom(path, pixels, kind="MONOCHROME2", bits=8, syntax=ExplicitVRLittleEndian, data=None, **elements):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.77.1.1.1", generate_uid()
    meta.TransferSyntaxUID = syntax
    ds = Dataset()
    ds.file_meta, ds.Modality = meta, "ES"
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.NumberOfFrames, ds.Rows, ds.Columns = pixels.shape[:3]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = (1 if pixels.ndim == 3 else 3), kind
    if pixels.ndim == 4:
        ds.PlanarConfiguration = 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8 if bits == 8 else 16, bits, bits - 1, 0
    for name, value in elements.items():
        setattr(ds, name, value)
    ds.PixelData = data if data is not None else pixels.tobytes()
    if data is not None:
        ds["PixelData"].VR, ds["PixelData"].is_undefined_length = "OB", True
    ds.save_as(path, enforce_file_format=True)
    return path


def first(path, size=None):
    with open_video(path, size) as reader:
        return next(iter(reader)).rgb


def test_the_bundled_ultrasound_clip():
    path = pydicom.examples.get_path("ybr_color")
    with open_video(path, 224) as reader:
        frames = list(reader)
    assert len(frames) == 30 and not reader.damage and frames[0].rgb.shape == (224, 224, 3)
    assert [frame.time for frame in frames] == pytest.approx([0.033333 * i for i in range(30)])
    assert (reader.info.container, reader.info.codec) == ("dicom", "JPEG Baseline (Process 1)")
    truth = pydicom.dcmread(path).pixel_array  # RGB already
    assert np.array_equal(first(path).numpy(), truth[0]), "YBR was converted once, not twice and not never"


def test_dicom_kinds_of_grey(tmp_path):
    grey = np.stack([picture(i)[..., 0] for i in range(4)])
    expected = np.repeat(grey[0][..., None], 3, 2).astype(int)
    plain = first(write_dicom(tmp_path / "a.dcm", grey)).int().numpy()
    inverse = first(write_dicom(tmp_path / "b.dcm", grey, "MONOCHROME1")).int().numpy()
    deep = first(write_dicom(tmp_path / "c.dcm", grey.astype(np.uint16) * 16, bits=12)).int().numpy()
    window = {"WindowCenter": 1024, "WindowWidth": 2048}  # the lower half of the range becomes all of it
    windowed = first(write_dicom(tmp_path / "d.dcm", grey.astype(np.uint16) * 16, bits=12, **window)).int().numpy()
    assert np.array_equal(plain, expected) and np.array_equal(inverse, 255 - expected)
    assert np.abs(deep - expected).max() <= 1
    assert np.abs(windowed - np.minimum(2 * expected, 255)).max() <= 2


def test_dicom_times(tmp_path):
    rgb = np.stack([picture(i) for i in range(4)])
    cases = {"FrameTimeVector": [0, 10, 20, 30], "FrameTime": "40", "CineRate": 10, "Manufacturer": "nobody"}
    expected = [[0, 0.01, 0.03, 0.06], [0, 0.04, 0.08, 0.12], [0, 0.1, 0.2, 0.3], [None] * 4]
    for (name, value), times in zip(cases.items(), expected, strict=True):
        frames, reader = read(write_dicom(tmp_path / f"{name}.dcm", rgb, "RGB", **{name: value}))
        assert [time for time, _ in frames] == (times if times[0] is None else pytest.approx(times))
        assert [number for _, number in frames] == [0, 1, 2, 3] and not reader.damage


def test_dicom_truncated(tmp_path):
    data = Path(pydicom.examples.get_path("ybr_color")).read_bytes()
    path = tmp_path / "cut.dcm"
    path.write_bytes(data[: len(data) // 2])
    with open_video(path) as reader:
        count = sum(1 for _ in reader)
    assert (
        8 <= count <= 16
        and f"{30 - count} of 30 frames could not be decoded, the first of them frame {count}" in str(reader.damage)
    )
    path.write_bytes(data[:1500])
    with pytest.raises(VideoError, match="without pictures"):
        open_video(path)


def test_dicom_that_holds_an_h264_stream(tmp_path):
    """How endoscopy recorders store video; pydicom hands out no frames of it."""
    video = encode(tmp_path / "a.ts", 50).read_bytes()
    path = tmp_path / "video.dcm"
    write_dicom(path, np.zeros((50, H, W, 3), np.uint8), "YBR_PARTIAL_420", syntax=H264_TS, data=encapsulate([video]))
    frames, reader = read(path)
    assert [number for _, number in frames] == list(range(50)) and not reader.damage
    cut = tmp_path / "cut.dcm"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    frames, reader = read(cut)
    assert_beginning([number for _, number in frames])
    assert 10 < len(frames) < 40
    assert "declares 50 frames" in str(reader.damage)


# ---- write_video


def test_write_video_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(ValueError, match="even height and width"):
        write_video(tmp_path / "a.mp4", [np.zeros((15, 16, 3), np.uint8)])
    with pytest.raises(ValueError, match="frame 1 must be uint8"):
        write_video(tmp_path / "b.mp4", [np.zeros((16, 16, 3), np.uint8), np.zeros((32, 16, 3), np.uint8)])
    with pytest.raises(ValueError, match="no frame"):
        write_video(tmp_path / "c.mp4", [])
