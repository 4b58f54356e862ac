"""The Mamba mixers: their parameters, and one op from input to output.

Letters: b sequences, l tokens, c channels, d inner channels, n state size, r dt rank, w conv width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import frame_step, mixer_inner
from ..ops.mixer_inner import Linear, Side, mixer_of_modules, runs_modules
from .precision import KeepsFp32

# A direction's parts in the order of the op.
FORWARD = ("conv1d", "x_proj", "dt_proj", "A_log", "D")
BACKWARD = ("conv1d_b", "x_proj_b", "dt_proj_b", "A_b_log", "D_b")


class CausalMixer(KeepsFp32):
    """out_proj(scan(conv(in_proj(u)))), forwards; may start from a state."""

    fp32_parameters = ("A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.bias")

    def __init__(self, channels: int, d: int, n: int, r: int, w: int, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        self.in_proj = nn.Linear(channels, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(d, d, w, groups=d)  # holds weight (d, 1, w) and bias (d,)
        self.x_proj = nn.Linear(d, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, d)
        self.A_log = nn.Parameter(initial_A_log(d, n))
        self.D = nn.Parameter(torch.ones(d))
        self.out_proj = nn.Linear(d, channels, bias=False)

    def parameters_forward(self) -> tuple[Any, ...]:
        """In the order of the op: conv weight and bias, x_proj, dt_proj weight and bias, A, D."""
        return _direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)

    def init_dt(self, dt_min: float, dt_max: float) -> None:
        _init_dt(self.dt_proj, dt_min, dt_max)

    def forward(self, u: Tensor) -> Tensor:
        """u: (b, l, c) -> (b, l, c)."""
        return mixer_inner(u, *self.parameters_forward(), **_projections(self))[0]

    def step(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> (b, l, c), conv state (b, w - 1, d) and ssm state (b, d, n) after the last token, all differentiable."""
        side = _held(self)
        if runs_modules(u, side, self.backend):
            states = conv_state.clone(), ssm_state.clone()
            return mixer_of_modules(u, *_linears(self, side), states), *states
        return mixer_inner(
            u,
            *self.parameters_forward(),
            initial_conv_state=conv_state,
            initial_ssm_state=ssm_state,
            return_final_state=True,
            **_projections(self),
        )

    def step_(self, u: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """`step` that overwrites both states; inference only."""
        side = _held(self)
        if runs_modules(u, side, self.backend):
            return mixer_of_modules(u, *_linears(self, side), (conv_state, ssm_state))
        y = frame_step(self.in_proj(u), conv_state, ssm_state, *self.parameters_forward(), backend=self.backend)
        return self.out_proj(y)


class BidirectionalMixer(KeepsFp32):
    """out_proj(scan(conv(in_proj(u))) + reversed scan_b(conv_b(in_proj(u)))): the sum of both ways, not its half."""

    fp32_parameters = (
        *("A_log", "D", "conv1d.weight", "conv1d.bias", "dt_proj.bias"),
        *("A_b_log", "D_b", "conv1d_b.weight", "conv1d_b.bias", "dt_proj_b.bias"),
    )

    def __init__(self, channels: int, d: int, n: int, r: int, w: int, backend: str = "auto"):
        super().__init__()
        self.backend = backend
        self.in_proj = nn.Linear(channels, 2 * d, bias=False)
        self.conv1d = nn.Conv1d(d, d, w, groups=d)
        self.x_proj = nn.Linear(d, r + 2 * n, bias=False)
        self.dt_proj = nn.Linear(r, d)
        self.A_log = nn.Parameter(initial_A_log(d, n))
        self.D = nn.Parameter(torch.ones(d))
        self.conv1d_b = nn.Conv1d(d, d, w, groups=d)
        self.x_proj_b = nn.Linear(d, r + 2 * n, bias=False)
        self.dt_proj_b = nn.Linear(r, d)
        self.A_b_log = nn.Parameter(initial_A_log(d, n))
        self.D_b = nn.Parameter(torch.ones(d))
        self.out_proj = nn.Linear(d, channels, bias=False)

    def parameters_forward(self) -> tuple[Any, ...]:
        return _direction(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)

    def parameters_backward(self) -> tuple[Any, ...]:
        return _direction(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)

    def init_dt(self, dt_min: float, dt_max: float) -> None:
        _init_dt(self.dt_proj, dt_min, dt_max)
        _init_dt(self.dt_proj_b, dt_min, dt_max)

    def forward(self, u: Tensor) -> Tensor:
        """u: (b, l, c) -> (b, l, c)."""
        side = _held(self)
        if runs_modules(u, side, self.backend):
            side_b = _held(self, BACKWARD)
            return mixer_of_modules(u, *_linears(self, side, side_b), (None, None))
        directions = (*self.parameters_forward(), *self.parameters_backward())
        return mixer_inner(u, *directions, **_projections(self))[0]


def _direction(conv1d: nn.Conv1d, x_proj: nn.Linear, dt_proj: nn.Linear, A_log: Tensor, D: Tensor) -> tuple[Any, ...]:
    wide = torch.float64 if A_log.dtype == torch.float64 else torch.float32
    A = -torch.exp(A_log.to(wide))
    return conv1d.weight.squeeze(1), conv1d.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A, D


def _own(module: nn.Module, *names: str) -> list[Any]:
    """Parameters of a module, None where it has no bias.

    `module.name` takes four times as long and a frame reads 400 of them; it is left to what provides a name in another
    way, such as a parametrization.
    """
    own = module._parameters
    return [own[name] if name in own else getattr(module, name) for name in names]


def _held(mixer: CausalMixer | BidirectionalMixer, names: tuple[str, ...] = FORWARD) -> Side:
    """The parameters of one direction as they are, for `mixer_of_modules`."""
    parts = mixer._modules
    conv1d, x_proj, dt_proj, A_log, D = names
    return Side(
        *_own(parts[conv1d], "weight", "bias"),
        *_own(parts[x_proj], "weight"),
        *_own(parts[dt_proj], "weight", "bias"),
        *_own(mixer, A_log, D),
    )


def _linears(mixer: CausalMixer | BidirectionalMixer, *sides: Side) -> tuple[Linear, tuple[Side, ...], Linear]:
    parts = mixer._modules
    ends = [Linear(*_own(parts[name], "weight", "bias")) for name in ("in_proj", "out_proj")]
    return ends[0], sides, ends[1]


def _projections(mixer: CausalMixer | BidirectionalMixer) -> dict[str, Any]:
    """The op does both, so that neither xz nor y is saved for backward.  Hooks on the two modules do not run."""
    return dict(
        in_proj_weight=mixer.in_proj.weight, in_proj_bias=mixer.in_proj.bias,
        out_proj_weight=mixer.out_proj.weight, out_proj_bias=mixer.out_proj.bias, backend=mixer.backend,
    )  # fmt: skip


def initial_A_log(d: int, n: int) -> Tensor:
    """log(1 .. n) for every channel."""
    return torch.arange(1, n + 1, dtype=torch.float32).log().repeat(d, 1)


@torch.no_grad()
def _init_dt(dt_proj: nn.Linear, dt_min: float, dt_max: float) -> None:
    """Mamba's own start of dt: log-uniform in [dt_min, dt_max] over the channels, with weights +- r^-0.5."""
    nn.init.uniform_(dt_proj.weight, -(dt_proj.in_features**-0.5), dt_proj.in_features**-0.5)
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand_like(dt_proj.bias) * (high - low) + low)
    dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
