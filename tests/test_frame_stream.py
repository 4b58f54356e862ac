"""FrameStream: who goes on, who stays, what is carried, and that a GPU could capture what a CPU runs here.

With ENDOMAMBA_TEST_DEVICE=cuda the same tests run on a GPU, where every stream replays graphs.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import subprocess
import sys
import threading
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.worker import CountDispatched
from endomamba.models import create_model
from endomamba.ops.frame_embed import temporal_positions
from endomamba.stream import FrameQueue, FrameStream, StreamSession
from endomamba.video import IMAGENET_MEAN, IMAGENET_STD, Damage, Frame, VideoInfo, normalisation, preprocess
from tests.models.common import ROUNDING, assert_state_matters, awake, long_memory
from tests.ops.backends import DEVICE

SIZE = 16  # of the tiny model's frames: 2 x 2 patches and cls
TOLERANCE = 2e-6 * ROUNDING
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def model():
    return long_memory()


def picture(number: int, height: int = SIZE, width: int = SIZE) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(number)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator, device="cpu")


def batch(*numbers: int) -> torch.Tensor:
    return torch.stack([picture(number) for number in numbers])


def normalised(*numbers: int) -> torch.Tensor:
    return preprocess(batch(*numbers), SIZE).to(DEVICE)


def alone(model, numbers, **options) -> torch.Tensor:
    camera = FrameStream(model, **options)
    return torch.cat([camera(picture(number)) for number in numbers])


def row(state, i: int) -> list[torch.Tensor]:
    return [state.conv[:, i].clone(), state.ssm[:, i].clone(), state.frame[i].clone()]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_state_of_these_weights_matters(model):
    camera = FrameStream(model, 2)
    for i in range(5):
        camera(batch(i, 100 + i))
    assert_state_matters(model, normalised(5, 105).unsqueeze(2), camera.snapshot(), TOLERANCE)


# ---- streams in a batch


def test_streams_in_a_batch_are_those_alone(model):
    camera = FrameStream(model, 3)
    together = torch.stack([camera(batch(i, 100 + i, 200 + i)) for i in range(6)], 1)
    for stream, first in enumerate((0, 100, 200)):
        expected = alone(model, range(first, first + 6))
        torch.testing.assert_close(together[stream], expected, rtol=0, atol=TOLERANCE)


def test_an_idle_stream_keeps_its_bits_and_answers_nothing(model):
    camera, got = FrameStream(model, 3), [[], [], []]
    turns = [(1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 0, 0), (1, 1, 0), (1, 1, 1)]
    read = [0, 0, 0]
    for active in turns:
        before = camera.snapshot()
        frames = [picture(100 * i + read[i]) if on else None for i, on in enumerate(active)]
        answer = camera(frames)
        for i, on in enumerate(active):
            read[i] += on
            if on:
                got[i].append(answer[i])
            else:
                assert same(row(before, i), row(camera.snapshot(), i)) and answer[i].isnan().all()
    assert camera.frames == read == [4, 3, 4] and camera.not_finite == [0, 0, 0]
    for i, n in enumerate(read):
        expected = alone(model, range(100 * i, 100 * i + n))
        torch.testing.assert_close(torch.stack(got[i]), expected, rtol=0, atol=TOLERANCE)


def test_reset_of_one_stream_leaves_the_others_their_bits(model):
    camera, other = FrameStream(model, 3), FrameStream(model, 3)
    for i in range(4):
        camera(batch(i, 100 + i, 200 + i)), other(batch(i, 100 + i, 200 + i))
    other.reset(1)
    assert other.frames == [4, 0, 4] and not any(part.any() for part in row(other.snapshot(), 1))
    for i in range(4, 7):
        one, two = camera(batch(i, 100 + i, 200 + i)), other(batch(i, 100 + i, 200 + i))
        assert torch.equal(one[0], two[0]) and torch.equal(one[2], two[2])
        assert (one[1] - two[1]).abs().max() > 100 * TOLERANCE
    for i in (0, 2):
        assert same(row(camera.snapshot(), i), row(other.snapshot(), i))
    torch.testing.assert_close(two[1:2], alone(model, (104, 105, 106))[-1:], rtol=0, atol=TOLERANCE)
    other.reset()
    assert other.frames == [0, 0, 0]


# ---- frames that must not be taken in


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_frame_that_is_not_finite_leaves_no_trace(model, value):
    """Not in its own stream, and not in its neighbours'."""
    camera, spared = FrameStream(model, 3), FrameStream(model, 3)
    frames = [normalised(i, 100 + i, 200 + i) for i in range(6)]
    for i in range(3):
        camera(frames[i]), spared(frames[i])
    bad = frames[3].clone()
    bad[1, 2, -1, -1] = value
    before = camera.snapshot()
    answer, clean = camera(bad), spared([frames[3][0], None, frames[3][2]])
    assert answer[1].isnan().all() and torch.equal(answer[::2], clean[::2]) and answer[::2].isfinite().all()
    assert same(row(before, 1), row(camera.snapshot(), 1))
    assert camera.not_finite == [0, 1, 0] and camera.frames == [4, 3, 4]
    for i in (4, 5):
        assert torch.equal(camera(frames[i]), spared(frames[i]))
    assert spared.not_finite == [0, 0, 0]


def test_a_state_that_is_not_finite_is_seen_behind_a_finite_answer():
    """cls is the first token of a frame: what its last patch does to the state does not reach this frame's answer."""
    model = long_memory(head="cls")
    bad = normalised(3)
    bad[0, :, -1, -1] = NAN
    with torch.no_grad():  # or this would prove nothing: only temporal layers read forwards, so no spatial ones here
        model = awake(create_model("endomamba", **{**vars(model.config), "num_spatial_layers": 0})).to(DEVICE)
        state = model.init_state(1)
        assert model.step_(bad.unsqueeze(2), state).isfinite().all() and not state.ssm.isfinite().all()
    camera = FrameStream(model)
    before = [camera(picture(i)) for i in range(3)] and camera.snapshot()
    assert camera(bad).isnan().all() and camera.not_finite == [1]
    assert same(row(before, 0), row(camera.snapshot(), 0))
    assert camera(picture(4)).isfinite().all()


def test_a_frame_that_is_cut_short_leaves_no_trace(model, monkeypatch):
    camera = FrameStream(model, 2, graph=False, packed=False)
    camera(batch(0, 100))
    before, expected = camera.snapshot(), camera.clone()(batch(1, 101))

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(model.head, "forward", interrupted)
        camera(batch(7, 107))
    assert all(same(row(before, i), row(camera.snapshot(), i)) for i in range(2))
    assert torch.equal(camera(batch(1, 101)), expected)


# ---- positions


def test_elapsed_positions_leave_gaps(model):
    """Dropped and not finite frames move time on, idle streams' time stands still until `elapsed` says otherwise."""
    camera, state = FrameStream(model, 2, positions="elapsed"), model.init_state(2)
    x = [normalised(i, 100 + i) for i in range(4)]
    bad = x[1].clone()
    bad[1] = NAN
    camera(x[0], 1)
    camera(bad, [3, 2])
    assert camera.frames == [4, 3] and camera.not_finite == [0, 1]
    camera([None, x[2][1]], [0, 5])
    assert camera.frames == [4, 8]
    answer = camera(x[3], [2, 1])
    assert camera.frames == [6, 9]
    with torch.no_grad():  # the same by hand: the numbers that the frames had
        for stream, numbers, frames in ((0, (0, 3, 5), (0, 1, 3)), (1, (0, 7, 8), (0, 2, 3))):
            state = model.init_state(1)
            for number, frame in zip(numbers, frames):
                state.frame.fill_(number)
                expected = model.step_(x[frame][stream : stream + 1].unsqueeze(2), state)
            torch.testing.assert_close(answer[stream], expected[0, 0], rtol=0, atol=TOLERANCE)
        processed = alone(model, (0, 1, 3))[-1]
    assert (answer[0] - processed).abs().max() > 100 * TOLERANCE, "gaps do not show in the output"


def test_elapsed_is_asked_for_where_it_counts_and_refused_elsewhere(model):
    with pytest.raises(ValueError, match="elapsed is counted by a stream made with positions='elapsed'"):
        FrameStream(model)(picture(0), 2)
    camera = FrameStream(model, 2, positions="elapsed")
    for wrong in (None, 0, [1], [1, 0]):
        with pytest.raises(ValueError, match="a number of at least 1 for each of 2 streams, got"):
            camera(batch(0, 1), wrong)
    assert camera.frames == [0, 0]
    with pytest.raises(ValueError, match="positions must be one of"):
        FrameStream(model, positions="seconds")


@pytest.mark.parametrize("position", [8_190, 100_000, 2**31 - 2, 2**40])
def test_no_stream_is_too_long(model, position):
    """Beyond the published table of 8,192 rows and beyond 32 bits the position is exact and read."""
    camera = FrameStream(model, 2)
    for i in range(3):
        camera(batch(i, 100 + i))
    state = camera.snapshot()
    state.frame.copy_(torch.tensor([position, 3]))
    camera.restore(state)
    x = torch.stack([normalised(i, 100 + i) for i in range(3, 7)], 2)
    streamed = torch.stack([camera(x[:, :, i]) for i in range(4)], 1)
    assert camera.frames == [position + 4, 7] and camera.frames_seen == position + 4
    with torch.no_grad():
        whole, _ = model.step(x, state)
        folded = state.clone()
        folded.frame.remainder_(8_190)
        assert (model.step(x, folded)[0] - whole)[0].abs().max() > 100 * TOLERANCE, "the position is not read"
    torch.testing.assert_close(streamed, whole, rtol=0, atol=TOLERANCE)
    by_hand = [f(position / 10_000 ** (2 * i / 16)) for i in range(8) for f in (math.sin, math.cos)]
    assert temporal_positions(torch.tensor([position]), 16)[0].tolist() == pytest.approx(by_hand, rel=0, abs=1e-6)


# ---- what is carried


def test_a_stream_that_was_reset_or_restored_can_be_idle_at_once(model):
    """What a stream goes back to is where it was put, not where it had been."""
    camera = FrameStream(model, 2)
    for i in range(3):
        camera(batch(i, 100 + i))
    kept = camera.snapshot()
    camera.reset(0)
    camera([None, picture(103)])
    assert camera.frames == [0, 4] and not any(part.any() for part in row(camera.snapshot(), 0))
    camera.restore(kept)
    camera([None, None])
    assert camera.frames == [3, 3] and all(same(row(kept, i), row(camera.snapshot(), i)) for i in range(2))


CONTINUE = """
import sys, torch
from endomamba.stream import FrameStream
from tests.test_frame_stream import batch, long_memory
torch.set_num_threads(int(sys.argv[3]))  # a library's products have the same bits with as many threads
camera = FrameStream(long_memory(), 2)
camera.load(sys.argv[1])
torch.save(torch.stack([camera(batch(i, 100 + i)) for i in range(5, 12)]).cpu(), sys.argv[2])
camera.save(sys.argv[1])
"""


def test_saved_and_loaded_in_a_new_process_is_never_having_stopped(model, tmp_path):
    camera = FrameStream(model, 2)
    for i in range(5):
        camera(batch(i, 100 + i))
    saved, answers = tmp_path / "state.safetensors", tmp_path / "answers.pt"
    camera.save(saved)
    expected = torch.stack([camera(batch(i, 100 + i)) for i in range(5, 12)])
    forgot = FrameStream(model, 2)(batch(5, 105))
    assert (forgot - expected[0]).abs().max() > 100 * TOLERANCE
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", CONTINUE, str(saved), str(answers), str(torch.get_num_threads())]
    subprocess.run(command, check=True, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, timeout=120)
    assert torch.equal(torch.load(answers), expected.cpu())
    end = camera.snapshot()
    camera.load(saved)
    assert all(same(row(end, i), row(camera.snapshot(), i)) for i in range(2))
    with pytest.raises(ValueError, match=r"FrameStream\.restore: state holds 2 streams, the frames are 1"):
        FrameStream(model).load(saved)


def test_a_clone_goes_its_own_way(model):
    camera = FrameStream(model, sizes=[(24, 40)], positions="elapsed")
    for i in range(3):
        camera(picture(i), 2)
    twin = camera.clone()
    assert twin.frames == [6] and torch.equal(twin(picture(3, 24, 40), 1), camera(picture(3, 24, 40), 1))
    kept = camera.snapshot()
    twin(picture(9), 1)
    assert same(row(kept, 0), row(camera.snapshot(), 0)) and not same(row(kept, 0), row(twin.snapshot(), 0))


def test_an_answer_is_ones_own_but_for_that_of_step(model):
    camera = FrameStream(model)
    first = camera(picture(0))
    kept = first.clone()
    buffer = camera.step(picture(1))
    assert torch.equal(first, kept) and camera.step(picture(2)) is buffer


# ---- what comes in


@pytest.mark.parametrize("shape", [(40, 56), (9, 90), (16, 48)], ids=["larger", "wide and low", "one side fits"])
def test_frames_of_any_size_are_resized_as_in_training(model, shape):
    camera = FrameStream(model, sizes=[shape])
    frames = [picture(i, *shape) for i in range(3)]
    inside = torch.cat([camera(frame) for frame in frames])
    outside = FrameStream(model)
    expected = torch.cat([outside(preprocess(frame, SIZE)) for frame in frames])
    torch.testing.assert_close(inside, expected, rtol=0, atol=TOLERANCE)
    with torch.inference_mode():
        read = camera._normalised(camera._input(shape, True))[0].cpu()
    read = preprocess(read, None) if read.dtype == torch.uint8 else read[:, 0]
    torch.testing.assert_close(read, preprocess(frames[-1], SIZE), rtol=0, atol=1e-3)
    plain = torch.nn.functional.interpolate(
        frames[-1].permute(2, 0, 1)[None].double() / 255, (SIZE, SIZE), mode="bilinear", antialias=True
    )[0]
    like = dict(dtype=torch.float64, device="cpu")
    mean, std = (torch.tensor(v, **like).view(3, 1, 1) for v in (camera.mean, camera.std))
    level = 1.01 / 255 / min(camera.std)  # the resize rounds to uint8, as the training's does
    torch.testing.assert_close(read.double(), (plain - mean) / std, rtol=0, atol=level)


def test_sizes_are_told_beforehand_and_do_not_mix_in_a_call(model):
    camera = FrameStream(model, 2, sizes=[(20, 30)])
    with pytest.raises(ValueError, match=r"are resized inside if the stream is made with sizes=\[\(h, w\)\]"):
        camera([picture(0, 30, 20), picture(1, 30, 20)])
    with pytest.raises(ValueError, match="must have one size and kind, got"):
        camera([picture(0), picture(1, 20, 30)])
    with pytest.raises(ValueError, match="a list with a tensor or None for each of 2 streams, got list of 3"):
        camera([None, None, None])
    with pytest.raises(ValueError, match=r"a size must be \(height, width\) in pixels"):
        camera.prepare((0, 4))
    assert camera.frames == [0, 0]
    camera.prepare((30, 20))
    camera([picture(0, 30, 20), picture(1, 30, 20)])
    camera([picture(0, 20, 30), picture(1, 20, 30)])
    assert camera.frames == [2, 2]


def test_a_model_of_any_size_reads_frames_as_they_are():
    model = long_memory(dynamic_img_size=True)
    camera = FrameStream(model)
    streamed = torch.cat([camera(picture(i, 24, 32)) for i in range(4)])
    clip = torch.stack([preprocess(picture(i, 24, 32), None) for i in range(4)], 1).unsqueeze(0).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(streamed, model(clip)[0], rtol=0, atol=TOLERANCE)


# ---- what a GPU captures


class Replays(FrameStream):
    """A stream on a GPU, as far as it can be had without one: a graph holds what was captured and nothing else."""

    def _may_capture(self, graph):
        return True

    def _captured(self, entry):
        class Graph:
            replay = lambda _: self._advance(self._normalised(entry))  # noqa: E731

        return Graph()


def test_a_replay_finds_all_that_a_call_depends_on_in_buffers(model):
    """Frames, idle streams and gaps reach a captured frame through memory alone."""
    eager = FrameStream(model, 2, sizes=[(20, 30)], positions="elapsed")
    graphed = Replays(model, 2, sizes=[(20, 30)], positions="elapsed")
    x = normalised(7, 8)
    calls = [(batch(0, 1), 1), ([None, picture(2)], [0, 3]), ([picture(3, 20, 30), picture(4, 20, 30)], 2)]
    calls += [(x * NAN, 1), (x, [4, 2]), (batch(0, 1), 1)]
    for frames, elapsed in calls:
        assert torch.equal(eager(frames, elapsed).nan_to_num(9), graphed(frames, elapsed).nan_to_num(9))
    assert eager.frames == graphed.frames == [9, 10] and eager.not_finite == graphed.not_finite == [1, 1]


@pytest.mark.parametrize("streams", [1, 3])
def test_every_layout_of_a_frame_is_the_same_frame(model, streams):
    """As (h, w, 3), (3, h, w) and views of them, one kind after the other, in a batch and each by itself."""
    camera, expected = FrameStream(model, streams, sizes=[(20, 30)]), FrameStream(model, streams)
    for size in ((SIZE, SIZE), (20, 30)):
        pictures = torch.stack([picture(i, *size) for i in range(streams)]).to(DEVICE)
        first, whole = pictures.permute(0, 3, 1, 2), preprocess(pictures, SIZE)
        kinds = [pictures, first, first.contiguous(), torch.cat((pictures, pictures), 2)[:, :, : size[1]]]
        kinds += [pictures.cpu(), first.cpu().contiguous(), whole, whole.permute(0, 2, 3, 1)]
        for _ in "ab":
            for frames in kinds:
                want = expected(whole)
                given = [frames, list(frames)] if streams > 1 else [frames, frames[0], [frames[0]]]
                before = camera.snapshot()
                for one in given:
                    camera.restore(before)
                    torch.testing.assert_close(camera(one), want, rtol=0, atol=TOLERANCE)
    refused = [pictures[:, :, :-1], [pictures] * streams, pictures[0] if streams > 1 else pictures[:0]]
    for frames in refused:  # though many like them were taken
        with pytest.raises(ValueError, match="a frame must be uint8 or normalised floating point"):
            camera(frames)


def test_a_frame_written_into_the_buffer_is_not_copied(model):
    camera, other = FrameStream(model, 2, sizes=[(20, 30)]), FrameStream(model, 2, sizes=[(20, 30)])
    camera.warm_up(), other.warm_up()
    buffers = camera.buffer(), camera.buffer((20, 30))
    for i in range(4):
        for buffer in buffers:
            assert buffer.dtype == torch.uint8 and buffer.device == camera.device
            frames = torch.stack([picture(i, *buffer.shape[1:3]), picture(9 + i, *buffer.shape[1:3])])
            buffer.copy_(frames)
            with CountDispatched() as written:
                answer = camera(buffer)
            with CountDispatched() as copied:
                assert torch.equal(answer, other(frames.to(DEVICE)))
            assert torch.equal(buffer.cpu(), frames)
            assert copied.names["aten.copy_.default"] == 1 + written.names["aten.copy_.default"]
    camera([None, buffers[0][1]]), other([None, buffers[0][1]])
    assert all(same(row(camera.snapshot(), i), row(other.snapshot(), i)) for i in range(2))
    assert camera.buffer((8, 8)).shape == (2, 8, 8, 3)
    with pytest.raises(ValueError, match=r"a size must be \(height, width\) in pixels"):
        camera.buffer((0, 4))


@pytest.mark.parametrize("streams", [1, 16])
def test_what_the_host_does_for_a_replayed_frame(model, streams):
    """Beside the copy and the launch: some calls of Python's, as many for any number of streams."""

    class Counts(Replays):
        def _captured(self, entry):
            return type("Graph", (), {"replay": lambda _: None})()

    camera, frames, calls = Counts(model, streams), batch(*range(streams)).to(DEVICE), []
    camera._answer = torch.empty(streams, 3)
    camera.step(frames)
    sys.setprofile(lambda frame, event, what: calls.append(event) if event in ("call", "c_call") else None)
    try:
        camera.step(frames)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 25
    with CountDispatched() as counted:
        camera.step(frames)
    assert counted.names == {"aten.copy_.default": 1}


@pytest.mark.parametrize("state", [16, 2], ids=["kernels", "other states"])
def test_packed_weights_give_the_same_answers(state):
    """Up to the order of sums; with two states the kernels of a GPU do not take the model, which is said."""
    model = long_memory(d_state=state)
    if DEVICE == "cuda" and state == 2:
        with pytest.raises(ValueError, match=r"needs the kernels of frame_blocks: .* for 16 states, not 2"):
            FrameStream(model, packed=True)
        assert not FrameStream(model).packed
        return
    packed, plain = FrameStream(model, 2, packed=True), FrameStream(model, 2, packed=False)
    assert packed.packed and not plain.packed and FrameStream(model).packed == (DEVICE == "cuda")
    for i in range(5):
        frames = batch(i, 100 + i)
        torch.testing.assert_close(packed(frames), plain(frames), rtol=0, atol=5 * TOLERANCE)
    for one, other in zip(row(packed.snapshot(), 1), row(plain.snapshot(), 1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_packed_weights_are_a_copy(model):
    camera = FrameStream(copy.deepcopy(model), packed=True)
    before = camera(picture(0))
    with torch.no_grad():
        for block in camera.model.layers:
            block.mixer.out_proj.weight.zero_()
    camera.reset()
    assert torch.equal(camera(picture(0)), before)


def test_packed_is_for_endomamba():
    twin = create_model(
        "attention_twin", img_size=SIZE, patch_size=8, embed_dim=16, depth=2, num_classes=3, num_heads=2
    ).eval()
    with pytest.raises(ValueError, match="packed=True needs the kernels of frame_blocks: the model is no EndoMamba"):
        FrameStream(twin.to(DEVICE), packed=True)


def test_a_frame_asks_the_host_for_nothing():
    """Under fake tensors whatever the host would have to wait for (item, nonzero, a size from data) is an error."""
    model = create_model("endomamba", img_size=16, embed_dim=16, depth=4, num_classes=3).eval()
    with FakeTensorMode():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(torch.empty(p.shape), requires_grad=False))
        camera = FrameStream(model, 2, sizes=[(40, 30)], positions="elapsed")
        with torch.inference_mode():
            for size in ((SIZE, SIZE), (40, 30)):
                camera._advance(camera._normalised(camera._input(size, True)))
            assert camera._answer.shape == (2, 3)
            with pytest.raises(Exception, match="_local_scalar_dense"):
                camera.frames_seen  # noqa: B018  it waits, and says so


def test_what_a_frame_costs_beside_the_model(model):
    """On a GPU a copy, and frame_settle, which is two kernels; the model's own first kernel normalises."""
    camera, frame = FrameStream(model, graph=False), picture(0).to(DEVICE)
    camera.warm_up()
    x, state = normalised(0).unsqueeze(2), model.init_state(1)
    with CountDispatched() as whole:
        camera.step(frame)
    with torch.inference_mode(), CountDispatched() as alone:
        model.step_(x, state)
    names = ("copy_", "addcmul", "frame_settle", "where", "linalg", "add_", "mul", "fill", "empty", "zeros", "item")
    ours = {name: n for name, n in (whole.names - alone.names).items() if any(word in name for word in names)}
    normalises = {} if DEVICE == "cuda" else {"aten.addcmul.default": 1}
    assert ours == {"aten.copy_.default": 1, "endomamba.frame_settle.default": 1, **normalises}


@pytest.mark.parametrize("name", ["endomamba", "attention_twin"])
@pytest.mark.parametrize("options", [{}, {"with_cls_token": False}, {"hold_position": True}], ids=str)
def test_pictures_as_they_are_or_normalised_before(name, options):
    """Both ways into the model, on any device: what a GPU does and what a CPU does."""
    heads = {"num_heads": 2} if name == "attention_twin" else {}
    model = create_model(name, img_size=SIZE, patch_size=8, embed_dim=16, depth=2, num_classes=3, **heads, **options)
    torch.nn.init.normal_(model.patch_embed.proj.bias)
    straight, apart = (FrameStream(model.to(DEVICE).eval(), 2, sizes=[(20, 30)], graph=False) for _ in "ab")
    straight._gives_pictures, apart._gives_pictures = True, False
    for i in range(3):
        for frames in (batch(i, 9 + i), torch.stack([picture(i, 20, 30), picture(5 + i, 20, 30)])):
            torch.testing.assert_close(straight(frames), apart(frames), rtol=0, atol=TOLERANCE)
    assert straight.frames == apart.frames == [6, 6]


def test_pictures_that_the_model_does_not_take(model):
    scale, shift = (t.to(DEVICE) for t in normalisation(IMAGENET_MEAN, IMAGENET_STD))
    pictures, state = batch(0).to(DEVICE), model.init_state(1)
    with torch.inference_mode():
        with pytest.raises(ValueError, match=r"EndoMamba: video must be \(b, 3, t, 16, 16\).* got \(1, 3, 1, 8, 16\)"):
            model.step_(pictures[:, :8], state, (scale, shift))
        with pytest.raises(ValueError, match="must be uint8 pictures, as normalisation is given, got"):
            model.step_(pictures.float(), state, (scale, shift))
        assert state.frame.tolist() == [0]
        model.step_(pictures, state, (scale, shift))
    assert state.frame.tolist() == [1]


@pytest.mark.skipif(DEVICE != "cpu", reason="there is one")
def test_graphs_need_a_gpu(model):
    with pytest.raises(
        ValueError, match="graph=True needs a model with a state of fixed size on a GPU: the model is on"
    ):
        FrameStream(model, graph=True)
    assert not FrameStream(model, graph=False).graph


def test_memory_does_not_grow():
    """2,000 frames: the process takes no more than the noise of its allocator, and Python comes to rest.

    Its free lists fill up first; a leak of one object a frame would be 4 KB in each round of 80.
    """
    camera = FrameStream(long_memory(embed_dim=8, depth=2, d_state=2), 2)
    frames = [batch(i, 100 + i) for i in range(4)]

    def read(count):
        for i in range(count):
            camera.step(frames[i % 4] if i % 3 else [frames[0][0], None])
        gc.collect()

    read(300)
    resident, on_device = resident_bytes(), torch.cuda.memory_reserved()
    read(2_000)
    resident = resident_bytes() - resident
    assert torch.cuda.memory_reserved() == on_device, "0 without a GPU"
    assert resident < 4 << 20, f"{resident / 2000:.0f} bytes a frame"
    tracemalloc.start()
    try:
        held = [read(80) or tracemalloc.get_traced_memory()[0] for _ in range(10)]
    finally:
        tracemalloc.stop()
    least = min(after - before for before, after in pairwise(held))
    assert least < (1 << 10 if DEVICE == "cpu" else 4 << 10), f"{least / 80:.1f} bytes a frame"
    assert camera.frames == [3100, 2063]


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_a_replay_is_the_eager_frame_to_the_bit_and_never_waits(model):
    eager = FrameStream(model, 2, sizes=[(40, 56)], graph=False, positions="elapsed")
    graphed = FrameStream(model, 2, sizes=[(40, 56)], positions="elapsed")
    assert graphed.graph and not eager.graph
    large = torch.stack([picture(i, 40, 56) for i in (5, 6)])
    strided = picture(7, 80, 56)[::2]
    calls = [(batch(0, 1).cuda(), 1), (large, 2), (large.pin_memory(), 1), ([None, strided], [0, 3]), (batch(8, 9), 1)]
    calls += [(normalised(3, 4) * NAN, 1), (normalised(3, 4), 1), ([None, None], [0, 0]), (large.cuda(), [2, 5])]
    for camera in (eager, graphed):  # what is made at a first time is made here
        for frames, elapsed in calls:
            camera(frames, elapsed)
        camera.reset()
    held = torch.cuda.memory_allocated()
    for frames, elapsed in calls:
        torch.cuda.set_sync_debug_mode("error")
        try:
            answer = graphed.step(frames, elapsed)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_allocated() == held
        assert torch.equal(eager(frames, elapsed).nan_to_num(9), answer.nan_to_num(9))
    for i in range(2):
        assert same(row(eager.snapshot(), i), row(graphed.snapshot(), i))


# ---- the models to compare with


def test_what_the_twin_cannot_do_it_says():
    twin = create_model("attention_twin", img_size=16, patch_size=8, embed_dim=64, depth=2).eval()
    camera = FrameStream(twin, 2)
    camera(batch(0, 1))
    with pytest.raises(NotImplementedError, match="are all at the same frame: give it one tensor"):
        camera([picture(0), None])
    with pytest.raises(NotImplementedError, match="reset all, rows=None"):
        camera.reset(1)
    with pytest.raises(NotImplementedError, match="positions='elapsed' is not for the state of AttentionTwin"):
        FrameStream(twin, positions="elapsed")
    with pytest.raises(NotImplementedError, match=r"FrameStream\.save: CacheState has no file format"):
        camera.save("unused")


def test_endofm_in_a_batch_idle_reset_and_not_finite():
    endofm = create_model("endofm", img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
    camera = FrameStream(endofm.eval(), 2)
    for i in range(3):
        camera(batch(i, 100 + i))
    before = camera.snapshot()
    bad = preprocess(batch(3, 103), SIZE)
    bad[0] = NAN
    assert camera(bad)[0].isnan().all() and torch.equal(camera.snapshot().window[0], before.window[0])
    assert camera([None, picture(104)])[0].isnan().all() and camera.frames == [3, 5] and camera.not_finite == [1, 0]
    camera.reset(0)
    expected = FrameStream(endofm)(picture(7))
    torch.testing.assert_close(camera([picture(7), None])[:1], expected, rtol=0, atol=TOLERANCE)


# ---- cameras that are faster


def test_drop_oldest_keeps_the_newest_and_counts():
    queue = FrameQueue(2, policy="drop oldest", depth=3)
    for i in range(10):
        queue.put(i)
    queue.put("a", camera=1)
    assert queue.dropped == [7, 0] and queue.waits == [0, 0]
    taken = [queue.take(0) for _ in range(3)]
    assert [ready.frames for ready in taken] == [[7, "a"], [8, None], [9, None]]
    assert [ready.elapsed for ready in taken] == [[8, 1], [1, 0], [1, 0]]
    assert queue.take(0.01) is None and not queue.ended
    queue.put(10), queue.end(0), queue.end(1), queue.put(11)
    assert not queue.ended and queue.take().frames == [10, None] and queue.take() is None and queue.ended


def test_block_loses_nothing_and_lets_the_camera_wait():
    queue, got = FrameQueue(policy="block", depth=2), []
    thread = threading.Thread(target=lambda: ([queue.put(i) for i in range(50)], queue.end()))
    thread.start()
    while (ready := queue.take()) is not None:
        got.append(ready.frames[0])
        time.sleep(0.001)
    thread.join(5)
    assert got == list(range(50)) and queue.dropped == [0] and 10 < queue.waits[0] <= 48
    queue = FrameQueue(policy="block", depth=1)
    thread = threading.Thread(target=lambda: [queue.put(i) for i in range(5)])
    thread.start()
    time.sleep(0.05)
    queue.close()
    thread.join(5)
    assert not thread.is_alive() and queue.ended and queue.take() is None, "a camera waits for a reader that went away"
    for wrong in ({"policy": "panic"}, {"cameras": 0}, {"depth": 0}):
        with pytest.raises(ValueError, match="FrameQueue:"):
            FrameQueue(**wrong)


def test_cameras_of_different_speed_into_one_batch(model):
    """Each stream gives the answers of its own frames, whoever else had one at that moment."""
    queue, camera, got = FrameQueue(3, policy="block"), FrameStream(model, 3), [[], [], []]

    def film(stream, frames):
        for i in range(frames):
            queue.put(picture(100 * stream + i), stream)
            time.sleep(0.001 * stream)
        queue.end(stream)

    threads = [threading.Thread(target=film, args=(stream, 12 - 3 * stream)) for stream in range(3)]
    for thread in threads:
        thread.start()
    while (ready := queue.take()) is not None:
        answer = camera(ready.frames)
        for stream, frame in enumerate(ready.frames):
            if frame is not None:
                got[stream].append(answer[stream])
    assert camera.frames == [12, 9, 6]
    for stream in range(3):
        expected = alone(model, range(100 * stream, 100 * stream + 12 - 3 * stream))
        torch.testing.assert_close(torch.stack(got[stream]), expected, rtol=0, atol=TOLERANCE)


class Camera:
    """A live source of `frames` pictures, one each `period` seconds."""

    live = True

    def __init__(self, frames: int, period: float, size: int = SIZE):
        self.frames, self.period, self.size = frames, period, size
        self.damage, self.notices = Damage(), []
        self.info = VideoInfo("camera", "none", "none", size, size, 25.0, None)

    def __iter__(self):
        for i in range(self.frames):
            time.sleep(self.period)
            yield Frame(i, None, picture(i, self.size, self.size))


@pytest.mark.parametrize("policy", [None, "block"])
@pytest.mark.parametrize("positions", ["processed", "elapsed"])
def test_a_session_says_what_it_lost_and_counts_time_as_told(model, policy, positions):
    camera, lines = FrameStream(model, positions=positions), []

    def slow(record):
        lines.append(record)
        time.sleep(0.01)

    session = StreamSession(camera, Camera(40, 0.001), slow, back_pressure=policy)
    session.run()
    summary = session.summary()
    assert summary["back_pressure"] == (policy or "drop oldest") and summary["positions"] == positions
    read = [line["frame"] for line in lines]
    if policy == "block":
        assert read == list(range(40)) and summary["dropped"] == 0 and summary["waits"] > 10
    else:
        assert summary["dropped"] == 40 - len(read) > 10 and summary["waits"] == 0 and summary["decoded"] == 40
    assert camera.frames == [40 if positions == "elapsed" else len(read)] and read[-1] == 39


def test_a_session_takes_pictures_of_any_size(model):
    lines = []
    StreamSession(FrameStream(model), Camera(3, 0.0, size=40), lines.append, back_pressure="block").run()
    expected = torch.cat([FrameStream(model)(preprocess(picture(0, 40, 40), SIZE))]).softmax(-1)[0]
    assert lines[0]["probabilities"] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=2e-5)
