"""Streaming with weights whose state matters, on a model small enough for a test, with every part of the real one."""

from __future__ import annotations

import json
import os
import threading

import pytest
import torch

from endomamba.models import create_model
from endomamba.stream import (
    CameraWatch,
    FrameStream,
    JsonLines,
    Latency,
    NonFiniteOutput,
    StreamSession,
    Trace,
    Verifier,
)
from endomamba.video import Damage, Frame, VideoInfo, normalisation

SIZE = 32
TINY = {"embed_dim": 32, "depth": 4, "img_size": SIZE, "num_classes": 5}
LONG_MEMORY = {"dt_init": "mamba", "dt_min": 1e-4, "dt_max": 1e-1}
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = create_model("endomamba", **TINY, **LONG_MEMORY).eval()
    with torch.no_grad():  # the published scale of 0.02 makes outputs, and with them every difference, tiny
        for name, p in model.named_parameters():
            if p.ndim == 2 and not name.endswith("A_log"):
                p.mul_(8.0)
    return model


def picture(number: int) -> torch.Tensor:
    return torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))


def normalised(number: int) -> torch.Tensor:
    scale, shift = normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return picture(number).permute(2, 0, 1) * scale + shift


class Source:
    """Stands for a video file: the pictures `first`, `first` + 1, ..."""

    live = False

    def __init__(self, frames: int, first: int = 0):
        self.frames, self.first = frames, first
        self.damage, self.notices = Damage(), []
        self.info = VideoInfo("source", "none", "none", SIZE, SIZE, 25.0, frames)

    def __iter__(self):
        for i in range(self.frames):
            yield Frame(i, i / 25, picture(self.first + i))


@torch.inference_mode()
def parallel(model, numbers):
    return model(torch.stack([normalised(i) for i in numbers], 1).unsqueeze(0))[0]


def test_the_state_of_these_weights_matters(model):
    """Or nothing below would prove anything."""
    whole, late = parallel(model, range(8)), parallel(model, range(4, 8))
    camera = FrameStream(model)
    for i in range(4):
        camera(picture(i))
    state = camera.snapshot()
    with torch.inference_mode():
        state.ssm.zero_()
        state.conv.zero_()
    camera.restore(state)  # right frame number, no memory
    forgot = torch.cat([camera(picture(i)) for i in range(4, 8)])
    assert (forgot - whole[4:]).abs().max() > 100 * TOLERANCE and (late - whole[4:]).abs().max() > 100 * TOLERANCE


def test_streamed_is_parallel(model):
    camera = FrameStream(model)
    streamed = torch.cat([camera(picture(i)) for i in range(12)])
    assert streamed.shape == (12, 5) and camera.frames_seen == 12
    torch.testing.assert_close(streamed, parallel(model, range(12)), rtol=0, atol=TOLERANCE)


def test_every_form_of_a_frame_means_the_same(model):
    forms = [
        picture(0),
        picture(0).permute(2, 0, 1),
        picture(0)[None],
        picture(0).permute(2, 0, 1)[None],
        normalised(0),
    ]
    outputs = [FrameStream(model)(form) for form in forms]
    for output in outputs:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=TOLERANCE)


def test_streams_in_one_batch_do_not_meet(model):
    camera = FrameStream(model, batch_size=2)
    both = torch.stack([camera(torch.stack((picture(i), picture(100 + i)))) for i in range(4)], 1)
    for row, first in enumerate((0, 100)):
        torch.testing.assert_close(both[row], parallel(model, range(first, first + 4)), rtol=0, atol=TOLERANCE)


def test_reset_snapshot_restore_warm_up(model):
    camera = FrameStream(model)
    camera.warm_up()
    assert camera.frames_seen == 0
    first = [camera(picture(i)) for i in range(4)]
    kept, seen = camera.snapshot(), camera.state_bytes
    fifth = camera(picture(4))
    camera.warm_up()
    camera.restore(kept)
    assert camera.frames_seen == 4 and torch.equal(camera(picture(4)), fifth) and camera.state_bytes == seen
    camera.reset()
    assert all(torch.equal(camera(picture(i)), first[i]) for i in range(4))


def test_one_sentence_for_what_does_not_fit(model):
    camera = FrameStream(model)
    for frame in (picture(0)[:16], picture(0).int(), picture(0)[..., :2], torch.stack([picture(0)] * 2), picture(0)[0]):
        with pytest.raises(
            ValueError, match=r"a frame must be uint8 or normalised floating point \(3, 32, 32\)"
        ) as error:
            camera(frame)
        assert "\n" not in str(error.value)
    assert camera.frames_seen == 0
    with pytest.raises(ValueError, match="holds 2 streams, the frames are 1"):
        camera.restore(model.init_state(2))
    with pytest.raises(ValueError, match="another model"):
        camera.restore(create_model("endomamba", **{**TINY, "depth": 2}).init_state(1))
    with pytest.raises(ValueError, match="is on meta"):
        camera.restore(model.init_state(1).to("meta"))
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        FrameStream(create_model("endomamba", **TINY))
    with pytest.raises(ValueError, match="batch_size 1"):
        StreamSession(FrameStream(model, 2), Source(1), print)


def test_two_threads_with_two_streams_on_one_model(model):
    """Each thread gets the bits that it gets alone."""
    alone = {first: FrameStreamRun(model, first).all(60) for first in (0, 500)}
    got, start = {}, threading.Barrier(2)

    def work(first):
        run = FrameStreamRun(model, first)
        start.wait()
        got[first] = run.all(60)

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(got[0], alone[0]) and torch.equal(got[500], alone[500])


class FrameStreamRun:
    def __init__(self, model, first):
        self.camera, self.first = FrameStream(model), first

    def all(self, frames):
        return torch.cat([self.camera(picture(self.first + i)) for i in range(frames)])


# ---- the check itself


@pytest.mark.parametrize("window", [1, 5, 16])
def test_verifier_passes_what_is_right(model, window):
    camera, verifier = FrameStream(model), Verifier(model, window)
    for i in range(21):
        verifier.add(normalised(i), camera(picture(i)), camera)
    verifier.flush(camera)
    summary = verifier.summary()
    assert summary["passed"] and summary["frames"] == 21, summary
    if window > 1:
        assert summary["difference_without_state"] > 20 * summary["tolerance"]


@pytest.mark.parametrize(
    "fault", ["ssm lost once", "conv lost once", "position not advanced", "one output wrong", "NaN"]
)
def test_verifier_fails_what_is_wrong(model, fault):
    camera, verifier = FrameStream(model), Verifier(model, 8)
    for i in range(24):
        if i == 5:
            state = camera.snapshot()
            if fault == "ssm lost once":
                state.ssm.zero_()
            elif fault == "conv lost once":
                state.conv.zero_()
            elif fault == "position not advanced":
                state.frame.sub_(1)
            camera.restore(state)
        output = camera(picture(i))
        if i == 20 and fault == "one output wrong":
            output = output + 1e-4
        if i == 20 and fault == "NaN":
            output = output * float("nan")
        verifier.add(normalised(i), output, camera)
    verifier.flush(camera)
    assert not verifier.passed and not verifier.summary()["passed"]
    json.dumps(verifier.summary(), allow_nan=False)


# ---- a session


def test_session_writes_a_line_a_frame_and_measures(model):
    lines, verifier = [], Verifier(model)
    session = StreamSession(FrameStream(model), Source(20), lines.append, verifier=verifier)
    session.run()
    truth = parallel(model, range(20)).softmax(-1)
    assert [line["frame"] for line in lines] == list(range(20))
    assert [line["time"] for line in lines] == pytest.approx([i / 25 for i in range(20)])
    for line, row in zip(lines, truth, strict=True):
        assert line["labels"] == row.argsort(descending=True).tolist()
        assert line["probabilities"] == pytest.approx(sorted(row.tolist(), reverse=True), abs=2e-5)
    assert lines[0]["change"] is None and all(0 < line["change"] < 2 for line in lines[1:])
    summary = session.summary()
    assert summary["frames"] == 20 and summary["verify"]["passed"] and summary["stopped"] == "at the end of the video"
    assert summary["latency"]["model"]["p99_ms"] >= summary["latency"]["model"]["p50_ms"] > 0
    assert summary["state_bytes"] == model.init_state(1).nbytes and summary["frames_per_second"] > 0
    json.dumps(summary, allow_nan=False)


def test_session_without_a_head_has_no_labels(model):
    headless, lines = create_model("endomamba", **{**TINY, "num_classes": 0}).eval(), []
    StreamSession(FrameStream(headless), Source(3), lines.append).run()
    assert [line["labels"] for line in lines] == [[], [], []] and lines[2]["change"] is not None


def test_session_stops_where_it_is_told_and_says_so(model):
    session = StreamSession(FrameStream(model), Source(9), lambda line: None)
    session.run(max_frames=4)
    assert session.summary()["stopped"] == "after the 4 frames asked for" and session.frames == 4

    def full(line):
        raise OSError(28, "No space left on device")

    session = StreamSession(FrameStream(model), Source(9), full)
    with pytest.raises(OSError):
        session.run()
    assert "No space left" in session.summary()["stopped"] and session.frames == 0


class Blinking(Source):
    """The pictures whose numbers are in `bad` are black."""

    def __init__(self, frames, bad):
        super().__init__(frames)
        self.bad = set(bad)

    def __iter__(self):
        for frame in super().__iter__():
            if frame.index in self.bad:
                frame.rgb.zero_()
            yield frame


def poisoned_by_black(model, monkeypatch):
    """The model gives NaN for a black picture, and its state is NaN from then on."""
    honest = model.step_

    def step_(frames, state):
        output = honest(frames, state)
        if float(frames.std(dim=(2, 3, 4)).max()) == 0:
            state.ssm.fill_(float("nan"))
            return output * float("nan")
        return output

    monkeypatch.setattr(model, "step_", step_)
    return FrameStream(model)


def test_a_frame_the_model_cannot_digest_leaves_no_trace(model, monkeypatch):
    lines, said, bad = [], [], {0, 7, 8}
    camera = poisoned_by_black(model, monkeypatch)
    session = StreamSession(camera, Blinking(20, bad), lines.append, report=said.append)
    session.run()
    assert [line["frame"] for line in lines] == list(range(20))
    assert {line["frame"] for line in lines if line["fault"] == "not finite"} == bad
    assert all(line["labels"] == [] for line in lines if line["frame"] in bad)
    good = [line for line in lines if line["fault"] is None]
    truth = parallel(model, [line["frame"] for line in good]).softmax(-1)
    for line, row in zip(good, truth, strict=True):
        assert line["probabilities"] == pytest.approx(sorted(row.tolist(), reverse=True), abs=2e-5)
    summary = session.summary()
    assert (summary["frames"], summary["not_finite"], summary["decoded"]) == (17, 3, 20)
    assert said == ["the model's output at frame 0 is not finite; the stream goes on without the frame"]


def test_weights_that_are_broken_end_the_stream(model):
    broken = create_model("endomamba", **TINY).eval()
    with torch.no_grad():
        broken.head.weight.fill_(float("nan"))
    lines = []
    with pytest.raises(NonFiniteOutput, match="at 25 frames in a row up to frame 24: its weights are damaged"):
        StreamSession(FrameStream(broken), Source(60), lines.append).run()
    assert len(lines) == 25 and all(line["fault"] for line in lines)


def test_black_and_frozen_pictures_are_reported():
    watch, started = CameraWatch(limit=5), []
    black, still = torch.full((4, 4, 3), 9, dtype=torch.uint8), torch.full((4, 4, 3), 99, dtype=torch.uint8)
    rolls = [still + i for i in range(10)] + [black + i % 3 for i in range(7)] + [still] * 4 + [still + 1] * 6
    for i, rgb in enumerate(rolls):
        if (event := watch.add(Frame(i, i / 10, rgb))) is not None:
            started.append((i, event["what"]))
    assert started == [(14, "black"), (25, "frozen")], "four equal frames are none"
    assert watch.events[0] == {"what": "black", "first": 10, "last": 16, "from": 1.0, "to": 1.6, "frames": 7}
    assert (watch.events[1]["first"], watch.events[1]["last"]) == (21, 26) and watch.count == 2


def test_stop_ends_at_a_frame(model):
    lines = []
    session = StreamSession(FrameStream(model), Source(10_000), lines.append)
    session.run(on_frame=lambda record: session.stop("by SIGTERM") if record["frame"] == 6 else None)
    assert len(lines) == 7 and session.summary()["stopped"] == "by SIGTERM"


def test_long_stream_has_flat_memory_and_stays_equal():
    """20,000 frames; then one parallel pass over the last 32 that gets the state before them."""
    torch.manual_seed(0)
    options = {"embed_dim": 16, "depth": 2, "img_size": 16, "num_classes": 3, "d_state": 4}
    model = create_model("endomamba", **options, **LONG_MEMORY).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and not name.endswith("A_log"):
                p.mul_(8.0)
    frames = torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8)
    scale, shift = normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    camera, total, tail = FrameStream(model), 20_000, 32
    for i in range(total - tail):
        if i == 2_000:
            before = resident_bytes()
        camera(frames[i % 64])
    grown = resident_bytes() - before
    state = camera.snapshot()
    numbers = [i % 64 for i in range(total - tail, total)]
    streamed = torch.cat([camera(frames[i]) for i in numbers])
    window = torch.stack([frames[i].permute(2, 0, 1) * scale + shift for i in numbers], 1).unsqueeze(0)
    with torch.inference_mode():
        whole, after = model.step(window, state)
        forgot, _ = model.step(window, state.reset())
    assert camera.frames_seen == total == int(after.frame)
    assert (forgot - whole[0]).abs().max() > 100 * TOLERANCE
    torch.testing.assert_close(streamed, whole[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(camera.snapshot().ssm, after.ssm, rtol=1e-5, atol=1e-5)
    assert grown < 8 << 20, f"{grown / 2**20:.1f} MiB more after 18,000 frames"


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- parts


def test_latency_percentiles():
    latency = Latency()
    for i in range(1, 1001):
        latency.add(i / 1000)
    assert latency.percentile(50) == pytest.approx(0.5, rel=0.01)
    assert latency.percentile(99) == pytest.approx(0.99, rel=0.01)
    assert latency.summary()["mean_ms"] == pytest.approx(500.5)
    assert latency.summary()["max_ms"] == 1000
    assert Latency().summary() == dict.fromkeys(("mean_ms", "p50_ms", "p95_ms", "p99_ms", "max_ms"), 0.0)
    latency.add(0.0)
    latency.add(1e9)


def test_trace_keeps_its_shape_in_constant_memory():
    trace = Trace()
    for i in range(10_000):
        trace.add(float(i))
    assert len(trace.points) <= 64 and trace.points == sorted(trace.points) and trace.largest == 9999
    assert trace.summary()["mean"] == pytest.approx(5000, rel=0.05) and trace.sparkline()[0] == "▁"
    assert Trace().sparkline() == "" and Trace().summary() == {"mean": 0.0, "max": 0.0}


def test_json_lines_never_replaces_a_file_unasked_and_refuses_nan(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    with JsonLines(path) as lines:
        lines.write({"frame": 0})
        with pytest.raises(ValueError):
            lines.write({"frame": float("nan")})
        assert path.read_text() == '{"frame": 0}\n', "written as it comes, not at the end"
    with pytest.raises(FileExistsError):
        JsonLines(path)
    with JsonLines(path, overwrite=True) as lines:
        lines.write({"frame": 1})
    assert path.read_text() == '{"frame": 1}\n'


def test_json_lines_takes_back_the_part_of_a_line_that_fitted(tmp_path, monkeypatch):
    path, real = tmp_path / "lines.jsonl", os.write
    with JsonLines(path) as lines:
        lines.write({"frame": 0})
        left = iter([7])

        def short(fd, data):
            room = next(left, 0)
            if not room:
                raise OSError(28, "No space left on device")
            return real(fd, data[:room])

        monkeypatch.setattr(os, "write", short)
        with pytest.raises(OSError, match="No space"):
            lines.write({"frame": 1})
        monkeypatch.undo()
    assert path.read_text() == '{"frame": 0}\n'
