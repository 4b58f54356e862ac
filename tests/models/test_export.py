"""Programs that outlive the process: exported, saved, loaded, with the state as input and output; graphs for any t."""

import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from endomamba.models import StreamState
from tests.models.common import assert_close, long_memory, make_video

ANY_LENGTH = torch.export.Dim("t", min=1, max=512)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def through_a_file(program):
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()


class Step(nn.Module):
    """`step` with plain tensors in and out, as another runtime would call it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, frames, conv, ssm, frame):
        out, state = self.model.step(frames, StreamState(conv, ssm, frame, self.model.config.fingerprint))
        return out, state.conv, state.ssm, state.frame


@torch.no_grad()
def test_exported_clip_of_any_length():
    model = long_memory()
    video = make_video(model, t=3)
    loaded = through_a_file(torch.export.export(model, (video,), dynamic_shapes=({2: ANY_LENGTH},)))
    for t in (1, 2, 12, 13, 40):  # 13 frames of 5 tokens pass the 64 of a chunk of the kernels
        video = make_video(model, t=t)
        assert_close(f"{t} frames", loaded(video), model(video), 1e-6)


@pytest.mark.parametrize("any_length", [False, True], ids=["1 frame", "any number"])
@torch.no_grad()
def test_exported_step_from_a_file(any_length):
    model = long_memory()
    state = expected_state = model.init_state(1)
    example = (make_video(model, t=3 if any_length else 1), state.conv, state.ssm, state.frame)
    shapes = ({2: ANY_LENGTH}, None, None, None) if any_length else None
    loaded = through_a_file(torch.export.export(Step(model), example, dynamic_shapes=shapes))
    tensors = example[1:]
    for t in (3, 1, 17, 2) if any_length else (1,) * 4:
        frames = make_video(model, t=t, seed=t)
        out, *tensors = loaded(frames, *tensors)
        expected, expected_state = model.step(frames, expected_state)
        assert_close(f"{t} frames", out, expected, 1e-6)
    for name, got in zip(("conv", "ssm", "frame"), tensors):
        assert_close(name, got, getattr(expected_state, name), 1e-6)


def test_compiled_steps_of_changing_length():
    """One graph for the first length, one for all others: never one for each number of frames that a step brings."""
    model = long_memory()
    counter = CompileCounter()
    step = torch.compile(model.step, fullgraph=True, backend=counter)
    state = expected_state = model.init_state(1)
    with torch.no_grad():
        for t in (1, 3, 2, 14, 5, 1, 30):
            frames = make_video(model, t=t, seed=t)
            out, state = step(frames, state)
            expected, expected_state = model.step(frames, expected_state)
            assert_close(f"{t} frames", out, expected, 1e-6)
    assert counter.frame_count <= 2


def test_compiled_training_of_changing_length():
    """As above with a backward; one more graph for clips of at most 64 tokens, which save the state of one chunk."""
    model = long_memory()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    parameters = (*model.parameters(),)
    for t in (14, 15, 30, 17, 2, 3):
        video = make_video(model, t=t)
        got = torch.autograd.grad(compiled(video).square().sum(), parameters)
        for g, expected in zip(got, torch.autograd.grad(model(video).square().sum(), parameters)):
            assert_close(f"gradient for {t} frames", g, expected, 1e-5 * expected.abs().max().item())
    assert counter.frame_count <= 3


def test_compiled_stream_passes_gradients():
    """Two compiled steps, the loss on the second: its gradient reaches the frames of the first."""
    model = long_memory()
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    video = make_video(model, t=4)

    def gradient(function):
        pixels = video.clone().requires_grad_()
        _, state = function(pixels[:, :, :2], model.init_state(1))
        out, _ = function(pixels[:, :, 2:], state)
        return torch.autograd.grad(out.square().sum(), pixels)[0]

    expected = gradient(model.step)
    assert expected[:, :, :2].abs().max() > 100 * 1e-5 * expected.abs().max()
    assert_close("gradient of the frames", gradient(step), expected, 1e-5 * expected.abs().max().item())
