"""StreamState: what it carries, what it refuses, and its way to disk and back."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.utils import _pytree

from endomamba.models import StreamState, create_model
from tests.models.common import long_memory, make_video
from tests.ops.backends import DEVICE


@pytest.fixture(scope="module")
def model():
    return long_memory()


@pytest.fixture
def state(model):
    """Two streams after three frames."""
    with torch.no_grad():
        return model.step(make_video(model, b=2, t=3), model.init_state(2))[1]


def tensors(state):
    return state.conv, state.ssm, state.frame


@pytest.mark.parametrize(
    "name, floats", [("endomamba_tiny", 92160), ("endomamba_small", 184320), ("endomamba_middle", 368640)]
)
def test_size(name, floats):
    """The published sizes hold four conv columns, of which three are ever read."""
    with torch.device("meta"):
        model = create_model(name)
        state = model.init_state(1)
    config = model.config
    assert state.conv.shape == (config.temporal_layers, 1, 3, config.inner_dim)
    assert state.ssm.shape == (config.temporal_layers, 1, config.inner_dim, 16)
    assert state.conv.numel() * 4 // 3 + state.ssm.numel() == floats
    assert state.conv.dtype == state.ssm.dtype == torch.float32
    assert state.nbytes == 4 * (state.conv.numel() + state.ssm.numel()) + 8


def test_low_precision_model_keeps_an_fp32_state():
    model = long_memory().bfloat16()
    with torch.no_grad():
        out, state = model.step(make_video(model), model.init_state(1))
    assert out.dtype == torch.bfloat16
    assert state.conv.dtype == state.ssm.dtype == torch.float32
    assert (state.ssm != state.ssm.bfloat16().float()).any()


def test_clone_is_a_snapshot(model, state):
    kept = state.clone()
    with torch.no_grad():
        model.step_(make_video(model, b=2), state)
    assert not any(torch.equal(a, b) for a, b in zip(tensors(kept), tensors(state)))
    assert kept.frame.tolist() == [3, 3]


def test_detach_shares_memory(model):
    _, state = model.step(make_video(model), model.init_state(1))
    assert state.ssm.requires_grad and state.conv.requires_grad
    detached = state.detach()
    assert not detached.ssm.requires_grad and not detached.conv.requires_grad
    assert detached.ssm.data_ptr() == state.ssm.data_ptr()


@pytest.mark.parametrize(
    "rows, zeroed", [(None, [0, 1]), (1, [1]), (-1, [1]), ([0], [0]), ([], []), ("mask", [1]), ("index", [0])]
)
@pytest.mark.parametrize("in_place", [False, True], ids=["reset", "reset_"])
def test_reset(state, rows, zeroed, in_place):
    rows = (
        {"mask": torch.tensor([False, True]), "index": torch.tensor([0])}.get(rows, rows)
        if isinstance(rows, str)
        else rows
    )
    kept = state.clone()
    fresh = (state.reset_ if in_place else state.reset)(rows)
    assert (fresh is state) == in_place
    if not in_place:
        assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(kept)))
    for row in range(2):
        got, expected = fresh.select(row), kept.select(row)
        if row in zeroed:
            assert all(not t.any() for t in tensors(got))
        else:
            assert all(torch.equal(a, b) for a, b in zip(tensors(got), tensors(expected)))


def test_select_and_cat(state):
    joined = StreamState.cat([state.select([1]), state])
    assert joined.batch_size == 3
    for got, expected in zip(tensors(joined.select([2, 1])), tensors(state.select([1, 0]))):
        assert torch.equal(got, expected)
    assert torch.equal(joined.ssm[:, 0], joined.ssm[:, 2])
    assert not torch.equal(joined.ssm[:, 0], joined.ssm[:, 1])


@pytest.mark.parametrize("rows", [2, -3, [0, 5]], ids=str)
def test_a_row_that_is_not_there(state, rows):
    for method in (state.reset, state.reset_, state.select):
        with pytest.raises(ValueError, match=r"there is no row -?\d among 2 streams"):
            method(rows)
    with pytest.raises(ValueError, match=r"row mask must have shape \(2,\), got \(3,\)"):
        state.reset(torch.ones(3, dtype=torch.bool))


def test_pytree_deepcopy_pickle(state):
    doubled = _pytree.tree_map(lambda t: t * 2, state)
    assert isinstance(doubled, StreamState) and doubled.model == state.model
    assert torch.equal(doubled.ssm, state.ssm * 2) and torch.equal(doubled.frame, state.frame * 2)
    for other in (copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        assert all(torch.equal(a, b) for a, b in zip(tensors(other), tensors(state)))


# ---- disk


def test_save_and_load(model, state, tmp_path):
    """A stream interrupted by a restart of the process goes on as if nothing had been."""
    path = tmp_path / "camera.safetensors"
    state.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["camera.safetensors"]
    loaded = StreamState.load(path, device=DEVICE)
    assert loaded.model == state.model
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(tensors(loaded), tensors(state)))
    with torch.no_grad():
        frames = make_video(model, b=2, seed=9)
        assert torch.equal(model.step(frames, loaded)[0], model.step(frames, state)[0])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data[:-40], "cannot be read as a safetensors file"),
        (lambda data: data[:20], "cannot be read as a safetensors file"),
        (lambda data: b"", "cannot be read as a safetensors file"),
        (None, "cannot be read as a safetensors file"),
    ],
    ids=["truncated", "header cut", "empty", "no file"],
)
def test_load_of_a_damaged_file(state, tmp_path, damage, message):
    path = tmp_path / "camera.safetensors"
    if damage:
        state.save(path)
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        StreamState.load(path)


def test_load_of_another_file(state, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"conv": state.conv, "ssm": state.ssm, "frame": state.frame}, path)
    with pytest.raises(ValueError, match="is not a stream state written by this version"):
        StreamState.load(path)
    StreamState(state.conv, state.ssm[:, :1], state.frame, state.model).save(path)
    with pytest.raises(ValueError, match="do not fit together: conv"):
        StreamState.load(path)


# ---- refusals: one sentence each, in step and in step_


def refusal(model, frames, state):
    """The message of step; step_ must say the same, and neither may touch the state."""
    messages = []
    for method in (model.step, model.step_):
        with torch.no_grad(), pytest.raises(ValueError) as error:
            method(frames, state)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "\n" not in messages[0]
    return messages[0]


def test_state_of_another_batch(model, state):
    assert refusal(model, make_video(model, b=3), state) == "EndoMamba: state holds 2 streams, the frames are 3"


def test_state_of_another_device(model):
    message = refusal(model, make_video(model), model.init_state(1, device="meta"))
    device = model.pos_embed.device
    assert message == f"EndoMamba: state.conv is on meta, the model on {device}: call state.to('{device}')"


@pytest.mark.parametrize("field", ["conv", "ssm"])
def test_state_of_another_dtype(model, field):
    state = model.init_state(1)
    changed = {name: getattr(state, name) for name in ("conv", "ssm", "frame")}
    changed[field] = changed[field].bfloat16()
    message = refusal(model, make_video(model), StreamState(**changed, model=state.model))
    assert message == f"EndoMamba: state.{field} must be torch.float32, got torch.bfloat16"


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 6},
        {"embed_dim": 32},
        {"d_state": 8},
        {"num_spatial_layers": 1},
        {"img_size": 32},
        {"with_cls_token": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_state_of_another_model(model, options):
    other = long_memory(**options)
    message = refusal(model, make_video(model), other.init_state(1))
    assert message.startswith("EndoMamba: state belongs to another model: this one is [endomamba 16x16 patch 8 dim 16")
    assert other.config.fingerprint in message


def test_state_with_a_wrong_shape(model):
    state = model.init_state(1)
    message = refusal(model, make_video(model), StreamState(state.conv, state.ssm[:, :, :1], state.frame, state.model))
    assert message == "EndoMamba: state.ssm must have shape (2, 1, 32, 16), got (2, 1, 1, 16)"


def test_something_else_than_a_state(model):
    assert "state must be a StreamState (see init_state), got NoneType" in refusal(model, make_video(model), None)


def test_a_head_or_backend_does_not_make_another_model(model, state):
    other = long_memory(num_classes=5, head="cls", backend="reference", drop_path_rate=0.3)
    with torch.no_grad():
        out, _ = other.step(make_video(other, b=2), state)
    assert out.shape == (2, 4, 5)


def test_batch_size_must_be_positive(model):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.init_state(0)


def test_cat_of_two_models(state):
    other = long_memory(d_state=8).init_state(1)
    with pytest.raises(ValueError, match="states must come from one model"):
        StreamState.cat([state, other])
    with pytest.raises(ValueError, match="states must come from one model, got none"):
        StreamState.cat([])
