"""torch.compile without a graph break, without recompiling for every frame, and torch.export."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from tests.models.common import assert_close, long_memory, make_video


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("layer", [0, 3], ids=["spatial", "temporal"])
def test_compile_block(layer):
    block = long_memory().layers[layer]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    hidden, residual = (torch.randn(2, 3, 5, 16, requires_grad=True) for _ in range(2))
    for got, expected in zip(compiled(hidden, residual), block(hidden, residual)):
        assert_close("output", got, expected, 1e-6)
    for got, expected in zip(
        *(torch.autograd.grad(f(hidden, residual)[0].sum(), (hidden, residual)) for f in (compiled, block))
    ):
        assert_close("gradient", got, expected, 1e-6)


def test_compile_model():
    model = long_memory()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    video = make_video(model, b=2)
    assert_close("logits", compiled(video), model(video), 1e-6)
    got = torch.autograd.grad(compiled(video).square().sum(), model.parameters())
    for g, expected in zip(got, torch.autograd.grad(model(video).square().sum(), model.parameters())):
        assert_close("gradient", g, expected, 1e-5 * expected.abs().max().item())


def test_compile_training_with_checkpointing():
    model = long_memory(use_checkpoint=True, drop_path_rate=0.2).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(make_video(model)).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiled_checkpointing_gives_the_same_gradients():
    model = long_memory(drop_path_rate=0.0).train()
    video = make_video(model, b=2)
    expected = torch.autograd.grad(model(video).square().sum(), (*model.parameters(),))
    model.gradient_checkpointing = True
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(video).square().sum(), (*model.parameters(),)), expected):
        assert_close("gradient", got, want, 1e-5 * want.abs().max().item())


def test_compile_steps_without_recompiling():
    """One graph serves every frame after the first; the frame number is data, not a constant of the graph."""
    model = long_memory()
    counter = CompileCounter()
    step = torch.compile(model.step, fullgraph=True, backend=counter)
    state = expected_state = model.init_state(1)
    with torch.no_grad():
        for frames in make_video(model, t=5).split(1, dim=2):
            out, state = step(frames, state)
            expected, expected_state = model.step(frames, expected_state)
            assert_close("logits", out, expected, 1e-6)
    assert torch.equal(state.frame, torch.tensor([5])) and state.model == model.config.fingerprint
    assert counter.frame_count == 1


def test_compile_step_in_place():
    model = long_memory()
    step_ = torch.compile(model.step_, fullgraph=True, backend="aot_eager")
    state, expected_state = model.init_state(1), model.init_state(1)
    with torch.no_grad():
        for frames in make_video(model, t=3).split(1, dim=2):
            assert_close("logits", step_(frames, state), model.step_(frames, expected_state), 1e-6)
    assert torch.equal(state.ssm, expected_state.ssm) and state.frame.item() == 3


def test_compile_any_clip_length():
    model = long_memory()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for t in (2, 3, 4, 6):
            video = make_video(model, t=t)
            assert_close(f"{t} frames", compiled(video), model(video), 1e-6)
    assert counter.frame_count <= 2, "recompiled beyond the first change of length"


def test_inductor_block():
    block = long_memory(depth=1, num_spatial_layers=0).layers[0]
    compiled = torch.compile(block, fullgraph=True)
    hidden, residual = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    with torch.no_grad():
        for got, expected in zip(compiled(hidden, residual), block(hidden, residual)):
            assert_close("output", got, expected, 1e-6)


@pytest.mark.slow
def test_inductor_model():
    model = long_memory()
    compiled = torch.compile(model, fullgraph=True)
    video = make_video(model)
    assert_close("logits", compiled(video), model(video), 1e-5)
    compiled(video).sum().backward()


def test_export():
    model = long_memory()
    video = make_video(model, b=2)
    with torch.no_grad():
        exported = torch.export.export(model, (video,))
        assert_close("logits", exported.module()(video), model(video), 1e-6)
    names = {str(node.target) for node in exported.graph.nodes}
    assert "endomamba.mixer_inner.default" in names and "endomamba.add_rms_norm.default" in names


def test_export_step():
    class Step(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, frames, state):
            return self.model.step(frames, state)

    model = long_memory()
    frames, state = make_video(model, t=1), model.init_state(1)
    with torch.no_grad():
        exported = torch.export.export(Step(model), (frames, state)).module()
        for _ in range(3):
            expected, expected_state = model.step(frames, state)
            out, state = exported(frames, state)
            assert_close("logits", out, expected, 1e-6)
            assert_close("ssm state", state.ssm, expected_state.ssm, 1e-6)
    assert state.frame.item() == 3
