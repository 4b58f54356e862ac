"""The attention twin: the size and order of what it is the twin of, and a cache that changes nothing but the work."""

import functools

import pytest
import torch
from torch import nn

from endomamba.models import (
    AttentionTwin,
    AttentionTwinConfig,
    CacheState,
    CheckpointError,
    create_model,
    load_checkpoint,
)
from endomamba.models.attention import windowed_attention
from endomamba.stream import FrameStream, Verifier
from tests.models.common import assert_close, long_memory, make_video, wide_awake
from tests.ops.backends import DEVICE, Random

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 3}
N = 5  # tokens of its frames
TOLERANCE = 2e-6  # logits are of order 1
SIZES = ["tiny", "small", "middle"]


def tiny(**options) -> AttentionTwin:
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = create_model("attention_twin", **{**TINY, **options})
    return wide_awake(model.to(DEVICE))


@pytest.fixture(autouse=True)
def poisoned_cache(monkeypatch):
    """Room that nothing was written to holds NaN, so reading it shows."""
    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args, original=original, **kwargs):
            out = original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() and not out.requires_grad else out

        monkeypatch.setattr(owner, name, poisoned)


# ---- a twin in size


@functools.cache
def pair(size):
    with torch.device("meta"):
        return create_model(f"attention_twin_{size}"), create_model(f"endomamba_{size}")


def count(module):
    return sum(p.numel() for p in module.parameters())


def products(model):
    """Multiply-adds a token in the blocks' matrix products and convs (whose taps are as many as their weights)."""
    return sum(m.weight.numel() for m in model.layers.modules() if isinstance(m, (nn.Linear, nn.Conv1d)))


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_endomamba(size):
    """0.5 % is what the documentation claims, of every block and of the whole."""
    twin, mamba = pair(size)
    assert len(twin.layers) == len(mamba.layers) and twin.config.embed_dim == mamba.config.embed_dim
    assert [len(twin.spatial_blocks), len(twin.temporal_blocks)] == [len(mamba.layers) // 2] * 2
    assert count(twin) == pytest.approx(count(mamba), rel=5e-3)
    for ours, theirs in zip(twin.layers, mamba.layers):
        assert count(ours) == pytest.approx(count(theirs), rel=5e-3)
    around = {"layers", "head"}
    for (name, ours), (_, theirs) in zip(twin.named_children(), mamba.named_children()):
        assert name in around or count(ours) == count(theirs), name


@pytest.mark.parametrize("size, more", zip(SIZES, (0.045, 0.024, 0.016)), ids=SIZES)
def test_multiply_adds_are_near_those_of_endomamba(size, more):
    twin, mamba = pair(size)
    assert products(twin) / products(mamba) - 1 == pytest.approx(more, abs=1e-3)


@pytest.mark.parametrize("size, heads", zip(SIZES, (3, 6, 9)), ids=SIZES)
def test_heads_of_64(size, heads):
    twin, _ = pair(size)
    assert twin.config.heads == heads and all(block.attn.heads == heads for block in twin.layers)
    assert twin.init_state(1).keys.shape == (len(twin.layers) // 2, 1, heads, 0, 64)


# ---- a twin in order: what each token reads


def reads(model, frames=3):
    """[i, j]: token i of the last block depends on token j of the first, all (frames * N) of a clip."""
    hidden = Random(3).randn(1, frames, N, model.config.embed_dim).requires_grad_()
    out, residual = hidden, None
    for block in model.layers:
        out, residual = block(out, residual)
    rows = []
    for token in out.flatten(1, 2)[0]:
        (grad,) = torch.autograd.grad(token.square().sum(), hidden, retain_graph=True)
        rows.append(grad.flatten(1, 2)[0].abs().sum(-1) > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("spatial", [0, 1], ids=["temporal", "spatial"])
def test_a_token_reads_what_endomambas_reads(spatial):
    """A temporal layer all tokens up to it, one by one, also within its frame; a spatial one its frame."""
    options = {"depth": 1, "num_spatial_layers": spatial}
    twin, mamba = reads(tiny(**options)), reads(long_memory(**options))
    tokens = torch.arange(3 * N)
    frames = tokens // N
    expected = frames[:, None] == frames if spatial else tokens[:, None] >= tokens
    assert torch.equal(twin, expected) and torch.equal(twin, mamba)


def test_max_frames_is_what_a_frame_reads():
    tokens = torch.arange(3 * N)
    frames = tokens // N
    expected = (tokens[:, None] >= tokens) & (frames[:, None] - frames < 2)
    assert torch.equal(reads(tiny(depth=1, num_spatial_layers=0, max_frames=2)), expected)


@pytest.mark.parametrize("max_frames", [None, 1, 2, 3, 9])
@pytest.mark.parametrize("new, held", [(1, 1), (1, 4), (2, 4), (4, 4), (3, 3)], ids=str)
def test_attention_against_its_formula(new, held, max_frames):
    """In fp64 with the mask written out, for frames of 3 tokens."""
    n, random = 3, Random(0)
    q = random.randn(2, 2, new * n, 4, dtype=torch.float64)
    k, v = (random.randn(2, 2, held * n, 4, dtype=torch.float64) for _ in range(2))
    i, j = torch.arange(held * n)[-new * n :, None], torch.arange(held * n)
    allowed = (j <= i) & (i // n - j // n < (max_frames or held))
    scores = (q @ k.mT / 2).masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(-1) @ v
    assert_close("attention", windowed_attention(q, k, v, n, max_frames), expected, 1e-12)


# ---- a video in pieces equals the video at once


@pytest.mark.parametrize("max_frames", [None, 1, 3, 7, 20], ids=lambda m: f"max_frames={m}")
@pytest.mark.parametrize("sizes", [(7,), (1,) * 7, (2, 1, 4), (6, 1)], ids=str)
@torch.no_grad()
def test_any_split_equals_the_whole(sizes, max_frames):
    model = tiny(max_frames=max_frames)
    video = make_video(model, b=2, t=7)
    whole = model(video)
    state, in_place = model.init_state(2), model.init_state(2)
    outputs, outputs_in_place = [], []
    for frames in video.split(sizes, dim=2):
        out, state = model.step(frames, state)
        outputs.append(out)
        outputs_in_place.append(model.step_(frames, in_place))
    assert_close("step", torch.cat(outputs, 1), whole, TOLERANCE)
    assert_close("step_", torch.cat(outputs_in_place, 1), whole, TOLERANCE)
    for name, a, b in zip(("keys", "values"), state.held(), in_place.held()):
        frames = 7 if max_frames is None else min(7, max_frames - 1)
        assert a.shape[3] == frames * N
        assert_close(name, b, a, 10 * TOLERANCE)
    assert state.frame.tolist() == in_place.frame.tolist() == [7, 7]


@pytest.mark.parametrize("name", ["keys", "values"])
@torch.no_grad()
def test_state_matters(name):
    """Otherwise the tests of splits prove nothing: old frames are read, all of them, and not with the bar's size."""
    model = tiny()
    video = make_video(model, t=9)
    _, state = model.step(video[:, :, :8], model.init_state(1))
    truth, _ = model.step(video[:, :, 8:], state)
    for first, last in ((0, 8), (0, 1), (7, 8)):
        forgetful = state.clone()
        getattr(forgetful, name)[:, :, :, first * N : last * N] = 0
        moved = (model.step(video[:, :, 8:], forgetful)[0] - truth).abs().max()
        assert moved > 100 * TOLERANCE, f"{name} of frames {first} to {last} move the output by {moved:.1e} only"


def test_planted_bugs_are_caught(monkeypatch):
    """Positions that stay at 0, and a cache that forgets a window's frames too early."""
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=r"^step: off by"):
        patch.setattr(AttentionTwin, "_frame_numbers", lambda self, frames, state: torch.arange(frames.shape[2]))
        test_any_split_equals_the_whole((2, 1, 4), None)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match=r"^step: off by"):
        patch.setattr(AttentionTwin, "_memory", property(lambda self: 0))
        test_any_split_equals_the_whole((2, 1, 4), 3)


def test_gradients_pass_through_the_cache():
    model = tiny()
    video = make_video(model, t=5)

    def gradients(sizes):
        pixels, state, outputs = video.clone().requires_grad_(), model.init_state(1), []
        for frames in pixels.split(sizes, dim=2):
            out, state = model.step(frames, state)
            outputs.append(out)
        return torch.autograd.grad(outputs[-1][:, -1].square().sum(), (pixels, *model.parameters()))

    whole, split = gradients((5,)), gradients((2, 1, 2))
    assert whole[0][:, :, :2].abs().max() > 1e-4, "the last frame's loss hardly depends on the first frames"
    for name, got, expected in zip(("video", *dict(model.named_parameters())), split, whole):
        assert_close(f"gradient of {name}", got, expected, 1e-5 * expected.abs().max().item())
    with pytest.raises(RuntimeError, match="step_ overwrites its state and has no gradient"):
        model.step_(video, model.init_state(1))


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny(drop_path_rate=0.0).train()
    video = make_video(model, b=2, t=3)
    plain = torch.autograd.grad(model(video).square().sum(), (*model.parameters(),))
    model.gradient_checkpointing = True
    for got, expected in zip(torch.autograd.grad(model(video).square().sum(), (*model.parameters(),)), plain):
        assert_close("gradient", got, expected, 1e-6 * expected.abs().max().item())


@torch.no_grad()
def test_two_futures_of_one_state():
    """`step` shares nothing: neither branch, nor a later step in place, reaches the state or the other branch."""
    model = tiny()
    video = make_video(model, b=2, t=4)
    _, state = model.step(video[:, :, :2], model.init_state(2))
    kept = state.clone()
    one, after = model.step(video[:, :, 2:3], state)
    model.step_(video[:, :, 3:], state.clone())
    other, _ = model.step(video[:, :, 3:], state)
    model.step_(video[:, :, 3:], after)
    assert torch.equal(state.keys, kept.keys) and state.stop == kept.stop == 2 * N and state.frame.tolist() == [2, 2]
    assert torch.equal(model.step(video[:, :, 2:3], state)[0], one)
    assert torch.equal(model.step(video[:, :, 3:], state)[0], other)


@torch.no_grad()
def test_streams_in_one_batch_do_not_meet():
    model = tiny()
    video = make_video(model, b=3, t=4)
    each = torch.cat([model(clip) for clip in video.split(1)])
    assert_close("logits", model(video), each, TOLERANCE)


# ---- the cache


@torch.no_grad()
def test_the_cache_doubles():
    """As many tensors as there are doublings, and never more than twice what is held, plus a frame."""
    model = tiny()
    state, video = model.init_state(1), make_video(model, t=1)
    capacities, per_token = [], 2 * 2 * 32 * 4  # keys and values, 2 temporal layers, 32 channels, fp32
    for i in range(40):
        model.step_(video, state)
        assert state.stop - state.start == (i + 1) * N and state.capacity <= 2 * state.stop
        assert state.held_nbytes == (i + 1) * N * per_token and state.nbytes == state.capacity * per_token + 8
        capacities.append(state.capacity // N)
    assert sorted(set(capacities)) == [2, 6, 14, 30, 62]


@torch.no_grad()
def test_a_window_takes_constant_memory():
    model = tiny(max_frames=4)
    state, video = model.init_state(1), make_video(model, t=1)
    seen = set()
    for _ in range(60):
        model.step_(video, state)
        seen.add(state.nbytes)
        assert state.stop - state.start <= 3 * N
    assert max(seen) <= 2 * 2 * 4 * N * 2 * 32 * 4 + 8 and len(seen) <= 3, "at most twice the window"
    assert state.frame.item() == 60


@torch.no_grad()
def test_reserved_room_is_not_taken_again():
    model = tiny()
    state = model.init_state(2, reserve_frames=5)
    where = state.keys.data_ptr()
    assert state.capacity == 5 * N and state.held_nbytes == 0
    video = make_video(model, b=2, t=6)
    model.step_(video[:, :, :5], state)
    assert state.keys.data_ptr() == where
    model.step_(video[:, :, 5:], state)
    assert state.keys.data_ptr() != where and state.capacity == 12 * N


@torch.no_grad()
def test_room_is_made_at_the_front_where_what_is_held_fits():
    """Not where it would be copied onto itself: the order of such a copy is nobody's promise."""
    for start, in_place in ((4, True), (3, True), (2, False)):
        state = tiny().init_state(1, reserve_frames=6)
        state.keys.copy_(torch.arange(6.0 * N).view(-1, 1).expand_as(state.keys))
        state.values.copy_(-state.keys)
        state.start, state.stop, where = start * N, 6 * N, state.keys.data_ptr()
        state.reserve_(N)
        assert (state.keys.data_ptr() == where) == in_place and state.start == 0
        for kept, sign in zip(state.held(), (1, -1)):
            assert torch.equal(kept[0, 0, 0, :, 0], sign * torch.arange(6.0 * N)[start * N :])


@torch.no_grad()
def test_a_long_stream_in_pieces_of_any_length():
    model = tiny(max_frames=4)
    video = make_video(model, t=40)
    whole, state, outputs, random = model(video), model.init_state(1), [], Random(7)
    while sum(out.shape[1] for out in outputs) < 40:
        seen = sum(out.shape[1] for out in outputs)
        outputs.append(model.step_(video[:, :, seen : seen + 1 + int(random.randint(6, 1))], state))
    assert_close("logits", torch.cat(outputs, 1), whole, TOLERANCE)


@torch.no_grad()
def test_reset_clone_detach():
    model = tiny()
    video = make_video(model, t=3)
    state = model.init_state(1)
    first = model.step_(video, state)
    kept = state.clone()
    model.step_(video, state)
    assert kept.stop == 3 * N and kept.keys.data_ptr() != state.keys.data_ptr()
    assert state.detach().keys.data_ptr() == state.keys.data_ptr()
    assert state.batch_size == 1 and state.device == state.keys.device
    state.reset_()
    assert state.frame.item() == 0 and state.held_nbytes == 0
    assert torch.equal(model.step_(video, state), first)


def test_frame_stream_drives_it():
    for max_frames in (None, 3):
        model = tiny(max_frames=max_frames)
        camera = FrameStream(model)
        camera.warm_up()
        video = make_video(model, t=9)
        outputs = [camera(video[0, :, i]) for i in range(5)]
        kept = camera.snapshot()
        outputs += [camera(video[0, :, i]) for i in range(5, 9)]
        with torch.no_grad():
            assert_close("logits", torch.stack(outputs, 1), model(video), TOLERANCE)
        camera.restore(kept)
        assert camera.frames_seen == 5 and camera.snapshot().held_nbytes == kept.held_nbytes
        assert_close("restored", camera(video[0, :, 5]), outputs[5], TOLERANCE)
        camera.reset()
        assert_close("reset", camera(video[0, :, 0]), outputs[0], TOLERANCE)
    with pytest.raises(ValueError, match=r"FrameStream\.restore: state belongs to another model"):
        camera.restore(tiny().init_state(1))
    with pytest.raises(ValueError, match=r"FrameStream\.restore: state must be a CacheState, got StreamState"):
        camera.restore(long_memory().init_state(1))
    with pytest.raises(ValueError, match="Verifier: it compares the states of EndoMamba, this model has CacheState"):
        Verifier(model)
    with torch.no_grad():
        model.step_(make_video(model), camera.snapshot())  # made in inference mode, used outside of it


# ---- like every model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_low_precision(dtype):
    """Autocast and weights in bf16 or fp16: a few roundings away from fp32, the norms' weights stay fp32."""
    model = tiny()
    video = make_video(model, t=4)
    exact = model(video)

    def assert_near(out):
        assert (out.float() - exact).norm() < 0.05 * exact.norm()

    with torch.autocast(DEVICE, dtype):
        assert_near(model(video))
        state = model.init_state(1)
        assert_near(torch.cat([model.step_(frames, state) for frames in video.split(1, dim=2)], 1))
        assert_near(torch.cat((model.step(video[:, :, :2], model.init_state(1))[0], exact[:, 2:]), 1))
    model.to(dtype)
    assert model.layers[0].norm2.weight.dtype == torch.float32 and model(video).dtype == dtype
    assert_near(model(video))
    state = model.init_state(1)
    assert_near(torch.cat([model.step_(frames, state) for frames in video.split(1, dim=2)], 1))
    assert state.keys.dtype == dtype


def test_compile():
    model = tiny()
    video = make_video(model, t=3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close("logits", compiled(video), model(video), TOLERANCE)
    torch.compiler.reset()


def test_drop_path_drops_both_branches():
    """A clip whose rows are all dropped passes a temporal block as it came, but for what the next norm will add."""
    model = tiny(drop_path_rate=0.5, num_spatial_layers=0).train()
    block = model.layers[3]
    assert [b.drop_path.rate for b in model.layers] == pytest.approx([0, 0, 0.5 / 3, 1 / 3])
    block.drop_path.forward = lambda rows: torch.zeros(rows.shape[0])
    hidden, residual = (Random(i).randn(2, 3, N, 32) for i in range(2))
    _, after = block(hidden, residual)
    assert torch.equal(after, residual)


def test_a_few_steps_of_training_learn():
    torch.manual_seed(0)
    model = create_model("attention_twin", **{**TINY, "drop_path_rate": 0.0}).train()
    video, labels = make_video(model, b=2), torch.tensor([[0, 1, 2, 0], [2, 2, 1, 0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(video).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3, losses


def test_its_weights_come_back(tmp_path):
    model, other = tiny(), create_model("attention_twin", **TINY)
    torch.save(model.state_dict(), tmp_path / "twin.pth")
    report = load_checkpoint(other, tmp_path / "twin.pth")
    assert set(report.loaded) == set(model.state_dict()) and not report.missing and not report.unexpected
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    mamba = create_model("endomamba", **{name: TINY[name] for name in TINY if name != "num_heads"})
    with pytest.raises(CheckpointError, match="nothing in it fits this model"):
        load_checkpoint(mamba, tmp_path / "twin.pth")


@torch.no_grad()
def test_features_taps_and_heads():
    model = tiny(head="classification")
    video = make_video(model, b=2, t=3)
    features, taps = model.forward_intermediates(video)
    assert features.shape == (2, 3, N, 32) and [tap.shape for tap in taps] == [features.shape] * 3
    assert_close("clip", model.classify(video), model(video).mean(1), TOLERANCE)
    held = tiny(hold_position=True)
    assert_close("held", held.step(video[:, :, :1], held.init_state(2))[0], held(video[:, :, :1]), TOLERANCE)
    only_spatial = tiny(num_spatial_layers=4)
    out, state = only_spatial.step(video, only_spatial.init_state(2))
    assert_close("no temporal layer", out, only_spatial(video), TOLERANCE)
    assert state.frame.tolist() == [3, 3] and state.held_nbytes == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, "AttentionTwinConfig: num_heads must divide embed_dim=32, got 3"),
        ({"max_frames": 0}, "AttentionTwinConfig: max_frames must be an integer of at least 1, got 0"),
        ({"img_size": 20}, "AttentionTwinConfig: img_size must be a multiple of patch_size=8"),
        ({"dt_init": "mamba"}, "dt_init belongs to the scan, attention has none"),
        ({"dt_max": 0.2}, "dt_max belongs to the scan, attention has none"),
        ({"dynamic_img_size": True}, "its cache holds frames of one size"),
        ({"embed_dim": 384, "expand": 1}, "expand=1 gives a mixer smaller than attention alone; use 2 or more"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionTwinConfig(**{**TINY, **options})


def test_refusals():
    model = tiny()
    video = make_video(model)
    with pytest.raises(ValueError, match="AttentionTwin: video must be"):
        model(video[0])
    with pytest.raises(ValueError, match=r"AttentionTwin: state must be a CacheState .*, got StreamState"):
        model.step(video, long_memory().init_state(1))
    with pytest.raises(ValueError, match="AttentionTwin: state holds 2 streams, the frames are 1"):
        model.step(video, model.init_state(2))
    with pytest.raises(ValueError, match="AttentionTwin: state belongs to another model"):
        model.step(video, tiny(max_frames=2).init_state(1))
    with pytest.raises(ValueError, match=r"AttentionTwin: state\.keys must be torch.float32, got torch.float64"):
        model.step(video, tiny().double().init_state(1))
    with pytest.raises(ValueError, match=r"AttentionTwin\.init_state: batch_size must be at least 1, got 0"):
        model.init_state(0)
    assert isinstance(model.init_state(1), CacheState)
