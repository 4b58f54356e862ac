"""What the tests of the models share: tiny networks whose state matters, and videos for them."""

import torch
from torch import Tensor

from endomamba.models import EndoMamba, StreamState, create_model
from endomamba.ops import backend_info
from tests.ops.backends import DEVICE, NAMES, Random

BACKENDS = [name for name in NAMES if not backend_info(DEVICE)["mixer_inner"][name]]
# Frames, clips and streams give matrix products of other sizes, for which a GPU takes kernels that sum in other orders.
ROUNDING = 1 if DEVICE == "cpu" else 4
TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_classes": 3}


def seeded(**options) -> EndoMamba:
    """The same weights on every device: they are drawn on the CPU."""
    torch.manual_seed(0)
    with torch.device("cpu"):
        model = create_model("endomamba", **options)
    return model.to(DEVICE)


def awake(model: EndoMamba, seed: int = 0) -> EndoMamba:
    """Matrices at the scale of their width: with the published 0.02 a network this narrow hardly looks at its input.

    The dt projections stay as `dt_init` made them.
    """
    random = Random(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj.weight", "x_proj_b.weight", "out_proj.weight", "head.weight")):
                p.copy_(random.randn(*p.shape) / p.shape[1] ** 0.5)
    return model.eval()


def long_memory(**options) -> EndoMamba:
    """A tiny model with dt in [1e-4, 1e-1], so that what one frame leaves in the state is read many frames later."""
    return awake(seeded(**{**TINY, "dt_init": "mamba", "dt_min": 1e-4, "dt_max": 1e-1, **options}))


def make_video(model: EndoMamba, b: int = 1, t: int = 4, seed: int = 1) -> Tensor:
    return Random(seed).randn(b, model.config.in_channels, t, *model.config.size)


@torch.no_grad()
def assert_state_matters(model: EndoMamba, frames: Tensor, state: StreamState, tolerance: float) -> None:
    """Without this a streaming test proves nothing: forgetting either state must show far above the tolerance."""
    truth, _ = model.step(frames, state)
    for name in ("conv", "ssm"):
        forgetful = state.clone()
        getattr(forgetful, name).zero_()
        moved = (model.step(frames, forgetful)[0] - truth).abs().max()
        assert moved > 100 * tolerance, f"zeroing state.{name} moves the output by {moved:.1e} only"


def assert_close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, not {tuple(expected.shape)}"
    if got.numel():
        error = (got - expected).abs().max().item()
        bar = ROUNDING * tolerance
        assert error <= bar, f"{name}: off by {error:.2e}, the bar is {bar:.0e}"  # NaN fails too


def published_fill(model: torch.nn.Module, kept: tuple[str, ...] = ()) -> torch.nn.Module:
    """Weights from nothing but a formula, as the parity oracles of the specifications have them.

    kept: endings of names that keep their values, though they count.
    """
    weights = model.state_dict()
    for k, name in enumerate(sorted(weights)):
        if kept and name.endswith(kept):
            continue
        i = torch.arange(weights[name].numel(), dtype=torch.float64)
        s = torch.sin(12.9898 * i + 78.233 * k) * 43758.5453
        value = 0.6 * (s - s.floor() - 0.5) + ("norm" in name and name.endswith("weight"))
        weights[name].copy_(value.view_as(weights[name]))
    return model.eval()


def wave(*shape: int) -> Tensor:
    """The input of those oracles: sin(0.01 j), j the flat index."""
    return torch.sin(0.01 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64)).float().view(shape)


def wide_awake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every matrix at the scale of its width and every vector off its start, so that each one shows in the output."""
    random = Random(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(random.randn(*p.shape) / (p[0].numel() ** 0.5 if p.ndim > 1 else 4))
    return model.eval()
