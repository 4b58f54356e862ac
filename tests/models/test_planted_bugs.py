"""The parity check, turned on broken models: every back end, both kinds of step, and far beyond the bars."""

import re

import pytest
import torch
from safetensors.torch import load_file

from endomamba.models import mixer
from tests.models.common import BACKENDS, ROUNDING
from tests.models.test_parity import (
    GOLDEN,
    assert_parity,
    golden_model,
    plant_A_for_A_b,
    plant_conv_state_dropped,
    plant_norm_eps,
    plant_position_not_advanced,
    plant_ssm_state_dropped,
)
from tests.ops.backends import DEVICE


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN, device=DEVICE)


def frame_step_without(index):
    """frame_step that forgets the state at `index` of its arguments: 1 conv, 2 ssm."""
    original = mixer.frame_step

    def forgetful(*args, **kwargs):
        args[index].zero_()
        return original(*args, **kwargs)

    return forgetful


def mixer_of_modules_without(index):
    """The same for what stands for frame_step in eager inference on a CPU: states are its last argument."""
    original = mixer.mixer_of_modules

    def forgetful(*args):
        state = args[-1][index]
        if state is not None:
            state.zero_()
        return original(*args)

    return forgetful


def plant_conv_state_dropped_in_place(monkeypatch):
    monkeypatch.setattr(mixer, "frame_step", frame_step_without(1))
    monkeypatch.setattr(mixer, "mixer_of_modules", mixer_of_modules_without(0))


def plant_ssm_state_dropped_in_place(monkeypatch):
    monkeypatch.setattr(mixer, "frame_step", frame_step_without(2))
    monkeypatch.setattr(mixer, "mixer_of_modules", mixer_of_modules_without(1))


PLANTS = [
    (plant_ssm_state_dropped, False),
    (plant_ssm_state_dropped_in_place, True),
    (plant_conv_state_dropped, False),
    (plant_conv_state_dropped_in_place, True),
    (plant_A_for_A_b, False),
    (plant_A_for_A_b, True),
    (plant_position_not_advanced, False),
    (plant_position_not_advanced, True),
    (plant_norm_eps, False),
    (plant_norm_eps, True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "plant, in_place", PLANTS, ids=[f"{p.__name__[6:]}-{'step_' if in_place else 'step'}" for p, in_place in PLANTS]
)
def test_each_bug_is_far_over_the_bar(golden, monkeypatch, plant, in_place, backend):
    plant(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        assert_parity(golden_model(golden, backend), golden, in_place=in_place)
    error, bar = map(float, re.search(r"off by (\S+), the bar is (\S+)", str(caught.value)).groups())
    assert error > 20 * bar / ROUNDING, "the bar would let half of this bug through"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_gradient_is_caught_too(golden, monkeypatch, backend):
    """Outputs alone would pass: the state's way back is cut."""
    original = mixer._direction

    def cut(*args):
        *rest, A, D = original(*args)
        return (*rest, A.detach(), D)

    monkeypatch.setattr(mixer, "_direction", cut)
    model = golden_model(golden, backend)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(AssertionError, match=r"^gradient of layers\.0\.mixer\.A_log: off by 1\.00e\+00 of its norm"):
        assert_parity(model, golden)
