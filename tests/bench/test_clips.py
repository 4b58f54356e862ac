"""Clips, blocks and training steps of `python -m bench run`, and the published kernels in our models."""

from __future__ import annotations

import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from bench import clips, published
from bench.providers import Alone, EndoMamba, Options, Twin
from tests.models.common import assert_state_matters, long_memory, make_video

SMALL = Options(size=32, depth=4)
KINDS = {"mamba": partial(EndoMamba, backend="cpu"), "twin": Twin, "alone": Alone}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("part", ["Blocks", "Clips", "Training"])
def test_right_by_its_reference_and_a_wrong_weight_is_seen(part, name):
    if (part, name) == ("Blocks", "alone"):
        pytest.skip("a ViT has no temporal block")
    case = getattr(clips, part)(KINDS[name], SMALL)
    allowed = SMALL.tolerance * getattr(case, "slack", 1.0)
    assert 0 < case.error() <= allowed
    with torch.inference_mode():
        prepared = case.prepare(2)
        first, again = prepared.call(), prepared.call()
    if part != "Training":
        first, again = [first], [again]
    for one, other in zip(first, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    model = case.small.model if part == "Training" else case.subject.model
    blocks = model.blocks if name == "alone" else model.layers
    weight = max(blocks[0].parameters(), key=torch.numel)
    with torch.no_grad():
        weight.mul_(1.01)
    assert not case.error() <= allowed


def fake_extensions(monkeypatch, state: bool) -> list[str]:
    """mamba-ssm's two extensions in plain PyTorch, by their documented layouts; -> what was called."""
    called = []

    def fwd(x, dt, A, B, C, D, z, dt_bias, softplus, carried=None):
        called.append("scan")
        assert softplus and x.stride(-1) == 1 and B.is_contiguous() and B.shape == (len(x), 1, A.shape[1], x.shape[-1])
        dt = F.softplus(dt + dt_bias[:, None])
        h = torch.zeros(*x.shape[:2], A.shape[1]) if carried is None else carried[:, :, 0, 1::2].clone()
        out = []
        for i in range(x.shape[-1]):
            h = torch.exp(dt[..., i, None] * A) * h + (dt * x)[..., i, None] * B[:, :, :, i]
            out.append((h * C[:, :, :, i]).sum(-1) + D * x[..., i])
        last = torch.zeros(*x.shape[:2], 1, 2 * A.shape[1])
        last[:, :, 0, 1::2] = h
        s = torch.stack(out, -1)
        return s, last, s * F.silu(z)

    fwd.__doc__ = "fwd(arg0: Tensor, ..., arg8: bool" + (", arg9: Optional[Tensor])" if state else ")")

    def causal_conv1d_fn(x, weight, bias, activation):
        called.append("conv")
        y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), bias, groups=len(weight))
        return F.silu(y)

    scan, conv = types.ModuleType("selective_scan_cuda"), types.ModuleType("causal_conv1d")
    scan.fwd, conv.causal_conv1d_fn = fwd, causal_conv1d_fn
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", scan)
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv)
    return called


def test_published_kernels_compute_the_model(monkeypatch):
    called = fake_extensions(monkeypatch, state=True)
    model, theirs = long_memory().eval(), published.with_published_kernels(long_memory().eval())
    video = make_video(model, b=2, t=3)
    blocks = model.config.depth - model.config.temporal_layers
    with torch.inference_mode():
        torch.testing.assert_close(theirs(video), model(video), rtol=1e-5, atol=1e-6)
        assert called.count("scan") == called.count("conv") == 2 * blocks + model.config.temporal_layers
        mine, other = model.init_state(2), theirs.init_state(2)
        for i in range(3):
            frame = video[:, :, i : i + 1]
            got, want = theirs.step_(frame, other), model.step_(frame, mine)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.ssm, mine.ssm, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.conv, mine.conv, rtol=1e-5, atol=1e-6)
        assert_state_matters(model, video[:, :, :1], mine, 1e-5)


def test_what_is_missing_is_said(monkeypatch):
    assert published.missing() == "mamba-ssm's kernels need a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    assert "not installed" in published.missing()
    fake_extensions(monkeypatch, state=False)
    assert published.missing() == "" and "takes no state" in published.missing(state=True)
    fake_extensions(monkeypatch, state=True)
    assert published.missing(state=True) == ""
