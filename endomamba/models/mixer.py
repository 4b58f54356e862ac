"""The Mamba mixer: two projections around one op.  Published names of parameters, `_b` for the second direction."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from endomamba.ops import frame_step, mixer_inner

from .config import EndoMambaConfig


class Mixer(nn.Module):
    """(b, l, c) -> (b, l, c); bidirectional over the tokens of a frame, or causal over a stream with carried states."""

    def __init__(self, config: EndoMambaConfig, bidirectional: bool) -> None:
        super().__init__()
        c, d, n, r, w = config.embed_dim, config.d_inner, config.d_state, config.dt_rank, config.d_conv
        self.bidirectional = bidirectional
        self.backend, self.plan = config.backend, config.plan
        self.in_proj = nn.Linear(c, 2 * d, bias=False)
        for side in ("", "_b") if bidirectional else ("",):
            setattr(self, f"conv1d{side}", nn.Conv1d(d, d, w, groups=d, padding=w - 1))
            setattr(self, f"x_proj{side}", nn.Linear(d, r + 2 * n, bias=False))
            setattr(self, f"dt_proj{side}", nn.Linear(r, d))
            A_log = torch.log(torch.arange(1, n + 1, dtype=torch.float32)).repeat(d, 1)
            setattr(self, "A_b_log" if side else "A_log", nn.Parameter(A_log))
            setattr(self, f"D{side}", nn.Parameter(torch.ones(d)))
        self.out_proj = nn.Linear(d, c, bias=False)

    def _side(self, side: str) -> tuple[Tensor, ...]:
        """One direction's parameters in the order of mixer_inner; A = -exp(A_log) in fp32."""
        conv, x_proj = getattr(self, f"conv1d{side}"), getattr(self, f"x_proj{side}")
        dt_proj, A_log = getattr(self, f"dt_proj{side}"), getattr(self, "A_b_log" if side else "A_log")
        A = -torch.exp(A_log.float() if A_log.dtype != torch.float64 else A_log)
        return conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A, getattr(self, f"D{side}")

    def forward(self, x: Tensor) -> Tensor:
        """Without states: a frame both ways, or a whole stream from its start."""
        sides = (*self._side(""), *self._side("_b")) if self.bidirectional else self._side("")
        y, _, _ = mixer_inner(self.in_proj(x), *sides, plan=self.plan, backend=self.backend)
        return self.out_proj(y)

    def step(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next tokens of a stream -> y and the new conv (b, w-1, d) and ssm (b, d, n) states; differentiable."""
        y, conv_state, ssm_state = mixer_inner(
            self.in_proj(x), *self._side(""), initial_conv_state=conv_state, initial_ssm_state=ssm_state,
            return_final_state=True, plan=self.plan, backend=self.backend,
        )  # fmt: skip
        return self.out_proj(y), conv_state, ssm_state

    def step_(self, x: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """`step` with the states overwritten; inference only."""
        return self.out_proj(frame_step(self.in_proj(x), conv_state, ssm_state, *self._side(""), backend=self.backend))

    def reset_dt(self, config: EndoMambaConfig) -> None:
        """Mamba's own dt init: dt log-uniform in [dt_min, dt_max], its inverse softplus as bias (Mamba, section 3.6)."""
        for side in ("", "_b") if self.bidirectional else ("",):
            dt_proj = getattr(self, f"dt_proj{side}")
            nn.init.uniform_(dt_proj.weight, -(config.dt_rank**-0.5), config.dt_rank**-0.5)
            low, high = math.log(config.dt_min), math.log(config.dt_max)
            dt = torch.exp(torch.rand_like(dt_proj.bias) * (high - low) + low)
            with torch.no_grad():
                dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def init_out_proj(linear: nn.Linear, depth: int) -> None:
    """Residual branches start smaller the deeper the model (published init)."""
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    with torch.no_grad():
        linear.weight /= math.sqrt(depth)


