"""Streams in chunks of any and changing length: random splits, gradients, in place, 20,000 frames."""

import random
from pathlib import Path

import pytest
import torch

from endomamba.models import EndoMamba
from tests.models.common import BACKENDS, assert_close, assert_state_matters, long_memory, make_video
from tests.models.test_streaming import FRAMES, STREAM, TOLERANCE, resident_bytes, stream

ONE_TOKEN = {"img_size": 8, "with_cls_token": False}  # a frame is one patch: chunks shorter than the conv


def random_split(frames: int, seed: int, longest: int = 5) -> tuple[int, ...]:
    rng, sizes = random.Random(seed), []
    while sum(sizes) < frames:
        sizes.append(rng.randint(1, min(longest, frames - sum(sizes))))
    return tuple(sizes)


def reads_its_memory(model: EndoMamba) -> EndoMamba:
    """What a frame writes into the state, and what a later one reads from it, nine times as much."""
    with torch.no_grad():
        for block in model.temporal_blocks:
            block.mixer.x_proj.weight[block.mixer.dt_proj.in_features :] *= 3
    return model


@pytest.mark.parametrize("options", [{}, ONE_TOKEN], ids=["5-tokens", "1-token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_splits_equal_the_whole(backend, options):
    model = long_memory(backend=backend, **options)
    video = make_video(model, b=2, t=24)  # 120 tokens: beyond one chunk of the kernels
    with torch.no_grad():
        _, before = model.step(video[:, :, :23], model.init_state(2))
        assert_state_matters(model, video[:, :, 23:], before, TOLERANCE)
        whole, state = model.step(video, model.init_state(2))
        for seed in range(8):
            sizes = random_split(24, seed)
            out, after = stream(model, video, sizes)
            assert_close(f"logits of {sizes}", out, whole, TOLERANCE)
            assert_close(f"conv state of {sizes}", after.conv, state.conv, TOLERANCE)
            assert_close(f"ssm state of {sizes}", after.ssm, state.ssm, TOLERANCE)


@pytest.mark.parametrize("options", [{}, ONE_TOKEN], ids=["5-tokens", "1-token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_random_splits(backend, options):
    """The loss is on the last frame, so the gradient of all others has come through states alone."""
    model = reads_its_memory(long_memory(backend=backend, **options))
    video = make_video(model, t=16)
    tolerance = 2e-5  # of the largest element of a parameter's gradient, or of one frame's

    def gradients(sizes, cut=False):
        pixels, state, out = video.clone().requires_grad_(), model.init_state(1), None
        for frames in pixels.split(sizes, dim=2):
            out, state = model.step(frames, state.detach() if cut else state)
        grad, *grads = torch.autograd.grad(out[:, -1:].square().sum(), (pixels, *model.parameters()))
        named = {f"frame {i}": grad[:, :, i] for i in range(16)}
        return named | dict(zip((name for name, _ in model.named_parameters()), grads))

    whole = gradients((16,))
    cut = gradients((1,) * 16, cut=True)
    for name in ("frame 0", "frame 14", "layers.0.mixer.out_proj.weight", "layers.2.mixer.x_proj.weight"):
        moved = (cut[name] - whole[name]).abs().max() / whole[name].abs().max()
        assert moved > 100 * tolerance, f"cutting the states' gradient moves that of {name} by {moved:.1e} only"
    for seed in range(3):
        for name, got in gradients(random_split(16, seed)).items():
            assert_close(f"gradient of {name}", got, whole[name], tolerance * whole[name].abs().max().item())


@pytest.mark.parametrize("options", [{}, ONE_TOKEN], ids=["5-tokens", "1-token"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_equals_step_to_the_bit(backend, options):
    model = long_memory(backend=backend, **options)
    video = make_video(model, b=2, t=24)
    state = functional = model.init_state(2)
    functional = functional.clone()
    with torch.inference_mode():
        for frames in video.split(random_split(24, seed=0), dim=2):
            out = model.step_(frames, state)
            expected, functional = model.step(frames, functional)
            assert torch.equal(out, expected)
            for name in ("conv", "ssm", "frame"):
                assert torch.equal(getattr(state, name), getattr(functional, name)), name


def test_poisoned_memory_does_not_enter_a_new_stream():
    """Slots that held NaN: `reset_` and `init_state` leave nothing of it, for chunks shorter than the conv too."""
    model = long_memory(**ONE_TOKEN)
    video = make_video(model, b=2, t=4)
    state = model.init_state(2)
    with torch.inference_mode():
        for name in ("conv", "ssm"):
            getattr(state, name).fill_(float("nan"))
        state.frame.fill_(77)
        state.reset_()
        got = torch.cat([model.step_(frames, state) for frames in video.split(1, dim=2)], 1)
    assert_close("logits", got, model(video).detach(), TOLERANCE)


def test_the_first_frame_is_in_the_state():
    """A change of the first frame shows 20 frames later, through the state and through nothing else."""
    model = reads_its_memory(long_memory())
    video = make_video(model, t=21)
    changed = video.clone()
    changed[:, :, 0] += 1
    with torch.no_grad():
        (out, _), (other, _) = (stream(model, v, (1,) * 21) for v in (video, changed))
        assert (other - out)[:, -1].abs().max() > 100 * TOLERANCE
        _, state = model.step(changed[:, :, :20], model.init_state(1))
        last, _ = model.step(video[:, :, 20:], state)
    assert_close("the last frame, from the state alone", last, other[:, -1:], TOLERANCE)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory of the process from /proc")
@pytest.mark.parametrize("in_place", [True, False], ids=["step_", "step"])
def test_long_stream_in_chunks(in_place):
    """20,000 frames in chunks of 1 to 24: memory flat from frame 2,000, the last window equal to one pass from before.

    24 frames of 4 + 1 tokens make 120 tokens, so that a chunk crosses a boundary of the kernels at times.
    """
    model = long_memory(**STREAM)
    pool = make_video(model, t=61 + 24)
    rng, state, memory, last = random.Random(0), model.init_state(1), None, []
    with torch.inference_mode():
        done = 0
        while done < FRAMES:
            size = min(rng.choice((1, 2, 5, 13, 24)), FRAMES - done)
            if memory is None and done >= 2000:
                memory = resident_bytes()
            if not last and done >= FRAMES - 64:
                before, start = state.clone(), done
            frames = pool[:, :, done % 61 : done % 61 + size]
            if in_place:
                out = model.step_(frames, state)
            else:
                out, state = model.step(frames, state)
            if done >= FRAMES - 64:
                last.append((frames, out))
            done += size
        grown = resident_bytes() - memory
        window = torch.cat([frames for frames, _ in last], 2)
        assert_state_matters(model, window, before, TOLERANCE)
        expected, after = model.step(window, before)
    assert len(last) > 1 and window.shape[2] == FRAMES - start and state.frame.item() == FRAMES
    assert grown < 8 * 2**20, f"memory grew by {grown / 2**20:.1f} MiB over {FRAMES - 2000} frames"
    assert_close("last window", torch.cat([out for _, out in last], 1), expected, TOLERANCE)
    assert_close("ssm state", state.ssm, after.ssm, TOLERANCE * max(1, after.ssm.abs().max().item()))
    assert_close("conv state", state.conv, after.conv, TOLERANCE * max(1, after.conv.abs().max().item()))
