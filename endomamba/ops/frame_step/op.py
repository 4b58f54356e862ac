"""endomamba::frame_step: it mutates; no backward on purpose."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _triton
from .._backend import Backend, choose, plain_dtypes, register
from ..mixer_inner import compose, cuda, native
from ..mixer_inner.compose import Side, Walk
from ..mixer_inner.op import mixer_flops


def composed(backend: str, xz: Tensor, side: Side, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
    walk = Walk(None, False, 0, 0, "invariant")
    y, new_conv, new_ssm, *_ = compose.fwd(backend, xz, side, None, conv_state, ssm_state, walk, 1.0, True, False)
    conv_state.copy_(new_conv)
    ssm_state.copy_(new_ssm)
    return y


BACKENDS = register(
    "frame_step",
    {
        "triton": Backend(partial(composed, "triton"), None, _triton.unsupported),
        "cuda": Backend(partial(composed, "cuda"), None, cuda.unsupported),
        "cpu": Backend(native.step, None, native.unsupported),
        "reference": Backend(partial(composed, "reference"), None, lambda *_: []),
    },
)


@torch.library.custom_op("endomamba::frame_step", mutates_args=("conv_state", "ssm_state"))
def frame_step_op(
    xz: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    backend: str,
) -> Tensor:
    side = Side(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D)
    with plain_dtypes(xz.device):
        return choose("frame_step", backend, xz, A, conv_weight).fwd(xz, side, conv_state, ssm_state)


@frame_step_op.register_fake
def _(xz, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, backend):
    return xz.new_empty(xz.shape[0], xz.shape[1], A.shape[0])


@register_flop_formula(torch.ops.endomamba.frame_step)
def _(
    xz_shape, conv_state_shape, ssm_state_shape, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D,
    *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    return mixer_flops(xz_shape, [(conv, x_proj, dt_proj, A, D)])
