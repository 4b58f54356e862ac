"""Equal to the published code: its golden file (outputs, streamed outputs, taps, states, every gradient) and oracle."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from endomamba.models import EndoMamba, create_model, layers, mixer
from tests.models.common import BACKENDS, assert_close, published_fill, wave
from tests.ops.backends import DEVICE

GOLDEN = Path(__file__).parents[1] / "golden" / "endomamba_d48_depth6.safetensors"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN, device=DEVICE)


def golden_model(golden, backend):
    model = create_model("endomamba", img_size=64, embed_dim=48, depth=6, num_classes=7, backend=backend).eval()
    model.load_state_dict({name[6:]: t for name, t in golden.items() if name.startswith("param.")})
    return model


def golden_video():
    return torch.sin(0.0137 * torch.arange(2 * 3 * 5 * 64 * 64, dtype=torch.float64)).float().view(2, 3, 5, 64, 64)


def assert_parity(model: EndoMamba, golden, in_place: bool = False) -> None:
    video = golden_video()
    logits = model(video)
    _, taps = model.forward_intermediates(video)
    assert_close("logits", logits, golden["logits"], 5e-7)
    for i, tap in enumerate(taps):
        assert_close(f"tap {i}", tap, golden[f"intermediate.{i}"], 1e-6)

    state, streamed = model.init_state(2), []
    for frames in video.split((2, 1, 2), dim=2):
        if in_place:
            with torch.inference_mode():
                streamed.append(model.step_(frames, state))
        else:
            part, state = model.step(frames, state)
            streamed.append(part)
    assert_close("streamed logits", torch.cat(streamed, 1), golden["logits_streamed_2_1_2"], 5e-7)
    for i in range(3):
        assert_close(f"ssm state {i}", state.ssm[i], golden[f"state.layers.{i + 3}.ssm"], 5e-7)
        assert_close(f"conv state {i}", state.conv[i], golden[f"state.layers.{i + 3}.conv"], 3e-6)
    assert state.frame.tolist() == [5, 5]

    weights = torch.cos(0.7 * torch.arange(logits.numel(), dtype=torch.float64)).float().view_as(logits)
    (logits * weights).sum().backward()
    named = dict(model.named_parameters())
    assert sorted(named) == sorted(name[5:] for name in golden if name.startswith("grad."))
    for name, p in named.items():
        truth = golden[f"grad.{name}"]
        error = (p.grad - truth).norm() / truth.norm()
        assert error <= 2e-5, f"gradient of {name}: off by {error:.2e} of its norm, the bar is 2e-5"


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(golden, backend):
    assert_parity(golden_model(golden, backend), golden)


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden_in_place(golden, backend):
    assert_parity(golden_model(golden, backend), golden, in_place=True)


def test_golden_in_fp64(golden):
    """The reference in fp64 agrees with the goldens as far as fp32 goes: the back ends share no error."""
    model = golden_model(golden, "reference").double()
    with torch.no_grad():
        assert_close("logits", model(golden_video()).float(), golden["logits"], 5e-7)


# ---- five bugs, each planted, each caught


def without_initial(name):
    """mixer_inner that forgets one of its initial states, as a chunk boundary that resets it would."""
    original = mixer.mixer_inner

    def forgetful(*args, **kwargs):
        if kwargs.get(name) is not None:
            kwargs[name] = torch.zeros_like(kwargs[name])
        return original(*args, **kwargs)

    return forgetful


def plant_ssm_state_dropped(monkeypatch):
    monkeypatch.setattr(mixer, "mixer_inner", without_initial("initial_ssm_state"))


def plant_conv_state_dropped(monkeypatch):
    monkeypatch.setattr(mixer, "mixer_inner", without_initial("initial_conv_state"))


def plant_A_for_A_b(monkeypatch):
    original = mixer.BidirectionalMixer.parameters_backward

    def parameters_backward(self):
        *rest, _, D_b = original(self)
        return (*rest, self.parameters_forward()[-2], D_b)

    monkeypatch.setattr(mixer.BidirectionalMixer, "parameters_backward", parameters_backward)


def plant_position_not_advanced(monkeypatch):
    monkeypatch.setattr(EndoMamba, "_frame_numbers", lambda self, frames, state: torch.arange(frames.shape[2]))


def plant_norm_eps(monkeypatch):
    monkeypatch.setattr(layers, "NORM_EPS", 1e-6)


@pytest.mark.parametrize(
    "plant, caught_by",
    [
        (plant_ssm_state_dropped, "streamed logits"),
        (plant_conv_state_dropped, "streamed logits"),
        (plant_A_for_A_b, "logits"),
        (plant_position_not_advanced, "streamed logits"),
        (plant_norm_eps, "logits"),
    ],
)
def test_planted_bug_is_caught(golden, monkeypatch, plant, caught_by):
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=f"^{caught_by}: off by"):
        assert_parity(golden_model(golden, BACKENDS[0]), golden)


# ---- the oracle, from nothing but a formula


def oracle_model(backend):
    model = create_model("endomamba", img_size=32, embed_dim=32, depth=4, num_classes=3, backend=backend)
    assert len(model.state_dict()) == 61
    return published_fill(model, kept=("A_log", "A_b_log"))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_oracle(backend):
    model = oracle_model(backend)
    logits = [[0.636486, 0.415399, -1.146772], [0.168173, 0.271842, -0.346421], [-1.058043, -0.072795, 0.780602]]
    assert_close("logits", model(wave(1, 3, 3, 32, 32)), torch.tensor([logits]), 2e-6)
    features, taps = model.forward_intermediates(wave(1, 3, 3, 32, 32))
    assert_close("sum of features", features.sum(), torch.tensor(47.53337), 1e-4)
    patch = torch.tensor([-2.053553, -0.464557, -1.136048, -0.880823])
    assert_close("a patch of the last frame", features[0, 2, 0, :4], patch, 2e-6)
    assert_close(
        "the last patch", features[0, 0, 4, :4], torch.tensor([0.103045, -0.673986, 0.950315, -0.116885]), 2e-6
    )
    assert_close("taps", torch.stack([t.sum() for t in taps]), torch.tensor([1.18508, 0.66008, -0.88822]), 2e-5)
    for layer, total, values in (
        (0, 0.259056, [0.002915, 0.000587, -0.034342, -0.024073]),
        (3, 0.094551, [-0.036992, 0.012766, 0.007496, -0.009222]),
    ):
        out = model.layers[layer].mixer(wave(1, 6, 32))
        assert_close(f"mixer {layer}, sum", out.sum(), torch.tensor(total), 2e-6)
        assert_close(f"mixer {layer}", out[0, 3, :4], torch.tensor(values), 2e-6)
