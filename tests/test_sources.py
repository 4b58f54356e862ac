"""Frames that do not come out of a file by name, and reading them ahead."""

from __future__ import annotations

import http.server
import os
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from endomamba.sources import ReadAhead, SourceStalled, open_source  # noqa: E402
from endomamba.video import Frame, VideoError, write_video  # noqa: E402

from .test_video import encode, number_in, picture  # noqa: E402


def numbers(reader):
    with reader:
        return [number_in(frame.rgb) for frame in reader]


# ---- kinds of sources


def test_a_folder_of_pictures_in_the_order_of_their_numbers(tmp_path):
    for i in range(12):
        Image.fromarray(picture(i)).save(tmp_path / f"frame{i}.png")
    damaged = tmp_path / "frame5.png"
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    (tmp_path / "notes.txt").write_text("not a picture")
    reader = open_source(str(tmp_path))
    assert (reader.info.height, reader.info.width, reader.info.frames) == picture(0).shape[:2] + (12,)
    assert numbers(reader) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert reader.damage.lost == 1 and "frame5.png could not be read" in str(reader.damage)


def test_folders_without_a_readable_picture_are_refused(tmp_path):
    with pytest.raises(VideoError, match="is a folder without pictures"):
        open_source(str(tmp_path))
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(VideoError, match="none can be read"):
        open_source(str(tmp_path))


def test_a_pipe_is_read_once_and_to_its_end(tmp_path):
    video, pipe = encode(tmp_path / "a.mkv", 20), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(video.read_bytes()))
    writer.start()
    assert numbers(open_source(str(pipe))) == list(range(20))
    writer.join()


def test_an_mp4_with_its_index_at_the_end_on_a_pipe(tmp_path):
    """Its frames cannot be found without going back: all of them are lost, and counted."""
    data, pipe = encode(tmp_path / "a.mp4", 40, rough=True).read_bytes(), tmp_path / "pipe"
    assert data.rfind(b"moov") > data.find(b"mdat") and len(data) > 200_000
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(data))
    writer.start()
    reader = open_source(str(pipe))
    assert numbers(reader) == [] and reader.damage.lost == 40
    assert "an MP4 with its index at its end cannot be read from a pipe" in str(reader.damage)
    writer.join()


@pytest.fixture
def served(tmp_path):
    """A folder behind an address, files whose names begin with `cut` break off in the middle."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, output):
            data = source.read()
            output.write(data[: len(data) // 2] if self.path.startswith("/cut") else data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_an_address_that_goes_away_in_the_middle_is_damage(served, tmp_path):
    encode(tmp_path / "whole.ts", 60)
    (tmp_path / "cut.ts").write_bytes((tmp_path / "whole.ts").read_bytes())
    reader = open_source(f"http://somebody:secret@{served}/whole.ts")
    assert "secret" not in reader.info.path
    assert numbers(reader) == list(range(60)) and not reader.damage
    reader = open_source(f"http://{served}/cut.ts")
    got = numbers(reader)
    assert 10 < len(got) < 50 and reader.damage
    with pytest.raises(VideoError, match="is not a video that FFmpeg can read"):
        open_source(f"http://{served}/nothing.ts")


def test_a_camera_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VideoError, match="camera 97"):
        open_source("97")
    write_video("97.mp4", [np.zeros((16, 16, 3), np.uint8)])
    os.rename("97.mp4", "97")
    assert len(list(open_source("97"))) == 1, "a file of that name comes first"


# ---- reading ahead


def frames(count, pause=0.0, log=None):
    for i in range(count):
        time.sleep(pause)
        if log is not None:
            log.append(i)
        yield Frame(i, None, torch.zeros(1, 1, 3, dtype=torch.uint8))


def test_reading_ahead_keeps_order_bound_and_errors():
    log = []
    ahead = ReadAhead(frames(20, log=log), depth=4)
    time.sleep(0.2)
    assert len(log) == 5, "four wait and one is in its hands"
    assert [frame.index for frame, _ in ahead] == list(range(20)) and ahead.dropped == 0 and ahead.close()

    def breaks():
        yield from frames(3)
        raise VideoError("unplugged")

    ahead, seen = ReadAhead(breaks()), []
    with pytest.raises(VideoError, match="unplugged"):
        seen.extend(frame.index for frame, _ in ahead)
    assert seen == [0, 1, 2]


def test_a_live_source_drops_the_oldest_and_counts_them():
    ahead, got = ReadAhead(frames(40, 0.005), depth=4, live=True), []
    for frame, _ in ahead:
        got.append(frame.index)
        time.sleep(0.02)
    assert got == sorted(got) and got[-1] == 39 and ahead.dropped == 40 - len(got) > 10


def test_a_silent_source_and_one_that_is_stopped():
    def hangs():
        yield from frames(2)
        time.sleep(1.0)

    ahead = ReadAhead(hangs(), live=True, patience=0.2)
    with pytest.raises(SourceStalled, match=r"no frame came for 0\.2 s"):
        list(ahead)
    assert not ahead.close(0.05), "it hangs in its source"
    ahead = ReadAhead(hangs())
    threading.Timer(0.1, ahead.stop).start()
    begin = time.monotonic()
    assert len(list(ahead)) == 2 and time.monotonic() - begin < 0.6
    closed = ReadAhead(frames(100))
    assert closed.close() and list(closed) == []
