"""The public frame_step: the causal mixer for the tokens of one frame, its two states updated in place."""

from __future__ import annotations

from torch import Tensor

from .._backend import check_backend, direct
from .._checks import check_device, check_float, check_ndim, check_shape, full_precision, needs_grad
from ..mixer_inner.api import _check_side
from .op import frame_step_op


def frame_step(
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
    *,
    backend: str = "auto",
) -> Tensor:
    """`mixer_inner` for the next l >= 1 tokens of each stream; conv_state and ssm_state are overwritten.

    xz: (b, l, 2d)  conv_state: (b, w - 1, d) fp32, newest last  ssm_state: (b, d, n) fp32; parameters as in mixer_inner
    -> y (b, l, d) in the dtype of xz.

    Inference only: where a gradient would be needed it raises RuntimeError; mixer_inner returns states instead.
    """
    op = "frame_step"
    check_ndim(op, "xz", xz, 3, "(b, l, 2d)")
    check_float(op, "xz", xz)
    check_backend(op, backend)
    parameters = (conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D)
    if needs_grad(xz, conv_state, ssm_state, *parameters):
        raise RuntimeError(
            f"{op} overwrites its states and has no gradient: call it under torch.inference_mode() or torch.no_grad(), "
            "or use mixer_inner, which returns the states"
        )
    if xz.shape[1] < 1:
        raise ValueError(f"{op}: needs at least one token, got xz of shape {tuple(xz.shape)}")
    w, n = _check_side(op, "", xz, *parameters, xz.shape[2])
    b, d = xz.shape[0], A.shape[0]
    check_shape(op, "conv_state", conv_state, (b, w - 1, d), "(b, w - 1, d) = ")
    check_shape(op, "ssm_state", ssm_state, (b, d, n), "(b, d, n) = ")
    check_device(op, xz.device, conv_state=conv_state, ssm_state=ssm_state)
    conv_weight, conv_bias, dt_bias, A, D = full_precision(conv_weight, conv_bias, dt_bias, A, D, dtype=xz.dtype)
    for name, state in (("conv_state", conv_state), ("ssm_state", ssm_state)):
        if state.dtype != A.dtype:
            raise ValueError(f"{op}: {name} is updated in place and must be {A.dtype}, got {state.dtype}")
    return direct(frame_step_op)(
        xz, conv_state, ssm_state, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D, backend
    )
