"""A video in pieces equals the video at once: any split, gradients, rows at different frames, very long streams."""

import copy
import math
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.utils.parametrize

from endomamba.models import StreamState
from endomamba.ops.frame_embed import temporal_positions
from tests.models.common import BACKENDS, assert_close, assert_state_matters, long_memory, make_video
from tests.ops.backends import Random

TOLERANCE = 2e-6  # logits are of order 1


def stream(model, video, sizes, state=None):
    state = model.init_state(video.shape[0]) if state is None else state
    outputs = []
    for frames in video.split(sizes, dim=2):
        out, state = model.step(frames, state)
        outputs.append(out)
    return torch.cat(outputs, 1), state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (2, 1, 4), (6, 1)], ids=str)
def test_any_split_equals_the_whole(backend, sizes):
    """One token a frame is shorter than the conv: 8 x 8 frames of one patch, no cls."""
    for options in ({}, {"img_size": 8, "with_cls_token": False}):
        model = long_memory(backend=backend, **options)
        video = make_video(model, b=2, t=7)
        with torch.no_grad():
            _, before = model.step(video[:, :, :6], model.init_state(2))
            assert_state_matters(model, video[:, :, 6:], before, TOLERANCE)
            whole, state = model.step(video, model.init_state(2))
            assert_close("step against forward", whole, model(video), TOLERANCE)
            streamed, streamed_state = stream(model, video, sizes)
        assert_close("logits", streamed, whole, TOLERANCE)
        assert_close("conv state", streamed_state.conv, state.conv, TOLERANCE)
        assert_close("ssm state", streamed_state.ssm, state.ssm, TOLERANCE)
        assert streamed_state.frame.tolist() == [7, 7]


@pytest.mark.parametrize("use_checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_pass_through_the_state(backend, use_checkpoint):
    model = long_memory(backend=backend, use_checkpoint=use_checkpoint)
    video = make_video(model, t=5)

    def gradients(sizes, loss_on_last_frame_only=True):
        pixels = video.clone().requires_grad_()
        out, _ = stream(model, pixels, sizes)
        loss = (out[:, -1:] if loss_on_last_frame_only else out).square().sum()
        return torch.autograd.grad(loss, (pixels, *model.parameters()))

    whole, split = gradients((5,)), gradients((2, 1, 2))
    assert whole[0][:, :, :2].abs().max() > 1e-4, "the last frame's loss hardly depends on the first frames"
    for name, got, expected in zip(("video", *dict(model.named_parameters())), split, whole):
        assert_close(f"gradient of {name}", got, expected, 1e-5 * expected.abs().max().item())


def test_detach_cuts_the_gradient():
    model = long_memory()
    video = make_video(model, t=3).requires_grad_()
    _, state = model.step(video[:, :, :2], model.init_state(1))
    out, _ = model.step(video[:, :, 2:], state.detach())
    (grad,) = torch.autograd.grad(out.sum(), video)
    assert grad[:, :, :2].abs().max() == 0
    assert grad[:, :, 2].abs().max() > 0


def test_gradient_of_a_state():
    """What step computes from a given state has a gradient with respect to that state, equal to finite differences."""
    model = long_memory(backend="reference").double()
    frames = make_video(model, t=1).double()
    _, state = model.step(make_video(model, t=2, seed=3).double(), model.init_state(1))
    conv, ssm = (t.detach().requires_grad_() for t in (state.conv, state.ssm))

    def loss(conv, ssm):
        out, after = model.step(frames, StreamState(conv, ssm, state.frame, state.model))
        return out.sum() + after.ssm.square().sum() + after.conv.square().sum()

    for name, tensor, grad in zip(("conv", "ssm"), (conv, ssm), torch.autograd.grad(loss(conv, ssm), (conv, ssm))):
        direction = Random(5).randn(*tensor.shape, dtype=torch.float64)
        with torch.no_grad():
            up, down = (
                loss(*(t + sign * 1e-5 * direction if t is tensor else t for t in (conv, ssm))) for sign in (1, -1)
            )
        expected = (up - down) / 2e-5
        assert_close(f"gradient of {name}", (grad * direction).sum(), expected, 1e-6 * expected.abs().item())


def test_step_leaves_its_state_alone_and_shares_nothing():
    model = long_memory()
    video = make_video(model, b=2, t=2)
    with torch.no_grad():
        _, state = model.step(video, model.init_state(2))
        kept = state.clone()
        _, after = model.step(video, state)
    for name in ("conv", "ssm", "frame"):
        assert torch.equal(getattr(state, name), getattr(kept, name))
        assert getattr(after, name).untyped_storage().data_ptr() != getattr(state, name).untyped_storage().data_ptr()
    assert len({t.untyped_storage().data_ptr() for t in (after.conv, after.ssm, after.frame)}) == 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_in_place_equals_step(backend):
    model = long_memory(backend=backend)
    video = make_video(model, b=2, t=5)
    state = model.init_state(2)
    pointers = [t.data_ptr() for t in (state.conv, state.ssm, state.frame)]
    with torch.inference_mode():
        got = torch.cat([model.step_(frames, state) for frames in video.split((1, 3, 1), dim=2)], 1)
        expected, after = stream(model, video, (1, 3, 1))
    assert_close("logits", got, expected, 1e-7)
    assert_close("ssm", state.ssm, after.ssm, 1e-7)
    assert_close("conv", state.conv, after.conv, 1e-7)
    assert torch.equal(state.frame, after.frame)
    assert [t.data_ptr() for t in (state.conv, state.ssm, state.frame)] == pointers


def test_step_in_place_refuses_gradients():
    model = long_memory()
    state = model.init_state(1)
    with pytest.raises(RuntimeError, match=r"step_ overwrites its state and has no gradient: call it under"):
        model.step_(make_video(model), state)
    assert state.frame.item() == 0


def test_a_state_made_in_inference_mode_serves_outside():
    model = long_memory()
    with torch.inference_mode():
        state = model.init_state(1)
    with torch.no_grad():
        model.step_(make_video(model, t=1), state)
    assert state.frame.item() == 1


def test_rows_are_streams_of_their_own():
    """Two streams, one three frames ahead, in one batch: each row gives what it gives alone."""
    model = long_memory()
    a, b = make_video(model, t=5, seed=1), make_video(model, t=2, seed=2)
    with torch.no_grad():
        alone_a, _ = stream(model, a, (5,))
        alone_b, _ = stream(model, b, (2,))
        _, ahead = model.step(a[:, :, :3], model.init_state(1))
        both = StreamState.cat([model.init_state(1), ahead])
        assert both.frame.tolist() == [0, 3]
        out, both = model.step(torch.cat((b, a[:, :, 3:])), both)
    assert_close("the late row", out[:1], alone_b, TOLERANCE)
    assert_close("the row ahead", out[1:], alone_a[:, 3:], TOLERANCE)
    assert both.frame.tolist() == [2, 5]
    swapped = both.select([1, 0])
    assert swapped.frame.tolist() == [5, 2]
    with torch.no_grad():
        frames = torch.cat((a[:, :, :1], b[:, :, :1]))
        assert_close(
            "swapped rows", model.step(frames, swapped)[0], model.step(frames.flip(0), both)[0].flip(0), TOLERANCE
        )


def test_reset_row_starts_anew():
    """A poisoned row does not leak, and starts from nothing once it is reset."""
    model = long_memory()
    video = make_video(model, b=2, t=3)
    with torch.no_grad():
        _, state = model.step(video, model.init_state(2))
        state.ssm[:, 1] = state.conv[:, 1] = float("nan")
        poisoned, _ = model.step(video, state)
        assert poisoned[0].isfinite().all() and poisoned[1].isnan().all()
        fresh, _ = model.step(video, state.reset(rows=1))
        expected, _ = model.step(video[1:], model.init_state(1))
    assert_close("the reset row", fresh[1:], expected, TOLERANCE)
    assert_close("the other row", fresh[:1], poisoned[:1], TOLERANCE)


def test_a_frame_never_sees_later_frames():
    model = long_memory()
    video = make_video(model, t=4)
    changed = video.clone()
    changed[:, :, 3] += 1
    with torch.no_grad():
        out, other = model(video), model(changed)
    assert torch.equal(out[:, :3], other[:, :3])
    assert (out[:, 3] - other[:, 3]).abs().max() > 1e-3


# ---- positions


def test_temporal_positions_follow_their_formula_at_any_frame():
    frames = torch.tensor([0, 1, 8191, 8192, 30_000_001])  # the last has no fp32
    rows = temporal_positions(frames, 48)
    assert rows.dtype == torch.float32
    for row, frame in zip(rows, frames.tolist()):
        expected = [f(frame / 10000 ** (2 * i / 48)) for i in range(24) for f in (math.sin, math.cos)]
        assert_close(f"frame {frame}", row.double(), torch.tensor(expected, dtype=torch.float64), 1e-7)


@pytest.mark.parametrize("start", [8190, 3_000_000])
def test_no_frame_limit(start):
    """The published table ended at 8,192 frames.  Two streams over that border agree however they are cut."""
    model = long_memory()
    video = make_video(model, t=4)
    state = model.init_state(1)
    state.frame.fill_(start)
    with torch.no_grad():
        whole, _ = model.step(video, state)
        split, after = stream(model, video, (1, 2, 1), state)
        early, _ = model.step(video, model.init_state(1))
    assert_close("logits", split, whole, TOLERANCE)
    assert (whole - early).abs().max() > 1e-3, "the frame number has no effect"
    assert after.frame.item() == start + 4


def test_hold_position():
    """The published phase test never advances the offset: every step then starts at position 0."""
    model, held = long_memory(), long_memory(hold_position=True)
    video = make_video(model, t=2)
    with torch.no_grad():
        state = held.step(video[:, :, :1], held.init_state(1))[1]
        assert state.frame.item() == 1  # frames are counted all the same
        out, _ = held.step(video[:, :, 1:], state)
        advanced = StreamState(state.conv, state.ssm, torch.zeros(1, dtype=torch.int64), model.config.fingerprint)
        expected, _ = model.step(video[:, :, 1:], advanced)
        streamed, _ = stream(model, video, (1, 1))
    assert_close("second frame at position 0", out, expected, TOLERANCE)
    assert (streamed[:, 1:] - out).abs().max() > 1e-3


# ---- long, and many at once

STREAM = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2}
FRAMES, WINDOW = 20_000, 16


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
def test_long_stream():
    """20,000 frames, one by one: memory stays flat, and the end equals one pass over the last frames from the state."""
    model = long_memory(**STREAM)
    pool = make_video(model, t=61)  # a prime number of frames, so that no chunk meets the same sequence twice
    frames = [pool[:, :, i : i + 1].contiguous() for i in range(61)]
    state, last = model.init_state(1), []
    with torch.inference_mode():
        for i in range(FRAMES):
            if i == 2000:
                memory = resident_bytes()
            if i == FRAMES - WINDOW:
                before = state.clone()
            out = model.step_(frames[i % 61], state)
            if i >= FRAMES - WINDOW:
                last.append(out)
        grown = resident_bytes() - memory
        window = torch.cat([frames[i % 61] for i in range(FRAMES - WINDOW, FRAMES)], 2)
        assert_state_matters(model, window, before, TOLERANCE)
        expected, after = model.step(window, before)
    assert state.frame.item() == FRAMES
    assert grown < 8 * 2**20, f"memory grew by {grown / 2**20:.1f} MiB over {FRAMES - 2000} frames"
    assert_close("last window", torch.cat(last, 1), expected, TOLERANCE)
    assert_close("ssm state", state.ssm, after.ssm, TOLERANCE * max(1, after.ssm.abs().max().item()))


def test_long_stream_does_not_drift():
    """2,000 frames in fp32, with rounding at each, against the same stream in fp64: the error stays where it began."""
    model, truth = long_memory(**STREAM), long_memory(**STREAM, backend="reference").double()
    video = make_video(model, t=50)
    state, exact, errors = model.init_state(1), truth.init_state(1), []
    with torch.inference_mode():
        for _ in range(40):
            out = model.step_(video, state)
            errors.append((out - truth.step_(video.double(), exact)).abs().max().item())
    assert max(errors[-5:]) < TOLERANCE, f"errors over the stream: {errors}"


def test_two_threads_two_streams_one_model():
    model = long_memory()
    videos = [make_video(model, t=60, seed=seed) for seed in (1, 2)]

    def run(video, results, key):
        state = model.init_state(1)
        with torch.inference_mode():
            outs = []
            for i, frames in enumerate(video.split(1, dim=2)):
                if i % 2:
                    outs.append(model.step_(frames, state))
                else:
                    out, state = model.step(frames, state)
                    outs.append(out)
        results[key] = torch.cat(outs, 1)

    alone, together = {}, {}
    for key, video in enumerate(videos):
        run(video, alone, key)
    threads = [threading.Thread(target=run, args=(video, together, key)) for key, video in enumerate(videos)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (alone[0] - alone[1]).abs().max() > 0.1
    for key in (0, 1):
        assert torch.equal(together[key], alone[key])


def test_nothing_on_the_model_changes():
    """No attribute, buffer or parameter is written by forward, step or step_."""
    model = long_memory()

    def everything():
        return {
            (name, key): value if isinstance(value, (int, float, str, bool)) else id(value)
            for name, module in model.named_modules()
            for key, value in vars(module).items()
        }

    before, weights = everything(), {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        video = make_video(model)
        model(video)
        _, state = model.step(video, model.init_state(1))
        model.step_(video, state)
    assert everything() == before
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_weight_is_seen_by_the_next_frame(backend):
    """However it was changed: nothing of a parameter is kept from frame to frame."""
    model = long_memory(backend=backend)
    video = make_video(model, b=1, t=1)

    def frame():
        with torch.inference_mode():
            return model.step_(video, model.init_state(1))

    for name, p in model.named_parameters():
        if ".mixer." not in name:
            continue
        before = frame()
        if p.ndim == 1:
            p.data.mul_(1.5).add_(0.1)  # the version counter of p stays as it was
        elif "x_proj" in name:
            p.data = p.data * 1.5  # another address
        else:
            with torch.no_grad():
                p.mul_(1.5)
        assert not torch.equal(frame(), before), name


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("part", ["in_proj", "x_proj", "dt_proj", "conv1d", "D"])
def test_a_replaced_part_of_another_size_is_refused(part):
    """Also where eager inference goes past the op's checks: the kernel would read beyond it."""
    model = long_memory(backend="cpu")
    video, mixer = make_video(model, b=1, t=1), model.layers[-1].mixer
    owner, name = (mixer, part) if part == "D" else (getattr(mixer, part), "weight")
    setattr(owner, name, torch.nn.Parameter(getattr(owner, name).detach()[:-1]))
    with torch.inference_mode(), pytest.raises((ValueError, RuntimeError), match=r"must|size|shape"):
        model.step_(video, model.init_state(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("part", ["in_proj", "x_proj", "dt_proj", "out_proj", "conv1d", "A_log", "D"])
@pytest.mark.parametrize("block", [0, -1], ids=["spatial", "temporal"])
def test_a_replaced_part_is_the_one_that_runs(part, block, backend):
    """Another module or parameter in the place of a mixer's own, and then a parametrization of it."""
    model = long_memory(backend=backend)
    video, mixer = make_video(model, b=1, t=1), model.layers[block].mixer

    def frame():
        with torch.no_grad():
            expected = model.step(video, model.init_state(1))[0]  # by the ops, which get what `mixer.part.weight` gives
        with torch.inference_mode():
            got = model.step_(video, model.init_state(1))
        assert_close(part, got, expected, 2e-6)
        return got

    before = frame()
    if part in ("A_log", "D"):
        setattr(mixer, part, torch.nn.Parameter(getattr(mixer, part).detach() + 0.5))
        owner, name = mixer, part
    else:
        other = copy.deepcopy(getattr(mixer, part))
        other.weight = torch.nn.Parameter(1.5 * other.weight.detach())
        setattr(mixer, part, other)
        owner, name = other, "weight"
    replaced = frame()
    assert not torch.equal(replaced, before)
    torch.nn.utils.parametrize.register_parametrization(owner, name, Doubled())
    assert not torch.equal(frame(), replaced)
