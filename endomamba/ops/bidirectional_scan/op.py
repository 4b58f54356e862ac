"""endomamba::bidirectional_scan and its backward: custom ops, fakes, autograd, FLOP formulas, table of back ends.

The operand form is that of selective_scan (see its op.py), twice; z, cu_seqlens and mask serve both directions.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _scan_cuda, _triton
from .._backend import Backend, choose, measured_phase, register
from .._native import unsupported
from .._scan import chunk_states_shape, empty, state_dtype
from .._scan_native import scan_bwd, scan_fwd
from ..selective_scan.op import (
    check_saved,
    direction_backward_flops,
    direction_flops,
    fake_gradients,
    gradient,
)
from . import reference, rows

SHARED = "endomamba.ops"
BACKENDS = register(
    "bidirectional_scan",
    {
        "triton": Backend(
            partial(rows.fwd, _triton.lazy(SHARED, "_scan_triton", "scan_fwd")),
            partial(rows.bwd, _triton.lazy(SHARED, "_scan_triton", "scan_bwd")),
            _triton.unsupported,
        ),
        "cuda": Backend(
            partial(rows.fwd, _scan_cuda.scan_fwd),
            partial(rows.bwd, _scan_cuda.scan_bwd),
            _scan_cuda.unsupported_both,
            _scan_cuda.faster_both,
        ),
        "cpu": Backend(partial(rows.fwd, scan_fwd), partial(rows.bwd, scan_bwd), unsupported),
        "reference": Backend(reference.fwd, reference.bwd, lambda *tensors: []),
    },
)


@torch.library.custom_op("endomamba::bidirectional_scan", mutates_args=())
def bidirectional_scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    x_b: Tensor,
    dt_b: Tensor,
    A_b: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Tensor | None,
    D_b: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_bias_b: Tensor | None,
    initial_state: Tensor | None,
    initial_state_b: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    scale: float,
    dt_softplus: bool,
    frames: int,
    max_seqlen: int,
    return_final_state: bool,
    save_states: bool,
    out_fp32: bool,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> y (b, l, d), two final states (sequences, d, n), two chunk_states, each in its own walking order."""
    tensors = (
        x, dt, A, B, C, x_b, dt_b, A_b, B_b, C_b, D, D_b, z, dt_bias, dt_bias_b, initial_state, initial_state_b,
        cu_seqlens, mask,
    )  # fmt: skip
    phase = measured_phase("saving" if save_states else "forward", frames, plan)
    return choose("bidirectional_scan", backend, *tensors, phase=phase).fwd(
        *tensors,
        scale, dt_softplus, frames, max_seqlen, return_final_state, save_states, out_fp32, plan,
    )  # fmt: skip


@bidirectional_scan_op.register_fake
def _(
    x, dt, A, B, C, x_b, dt_b, A_b, B_b, C_b, D, D_b, z, dt_bias, dt_bias_b, initial_state, initial_state_b,
    cu_seqlens, mask, scale, dt_softplus, frames, max_seqlen, return_final_state, save_states, out_fp32, plan, backend,
):  # fmt: skip
    wide = state_dtype(x)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (sequences, *A.shape) if return_final_state else ()
    saved = chunk_states_shape(x, A, cu_seqlens) if save_states else ()
    y = empty(x, *x.shape, dtype=torch.float32 if out_fp32 else x.dtype)
    return y, *(empty(x, *shape, dtype=wide) for shape in (state, state, saved, saved))


@torch.library.custom_op("endomamba::bidirectional_scan_backward", mutates_args=())
def bidirectional_scan_backward_op(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    dfinal_state_b: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    x_b: Tensor,
    dt_b: Tensor,
    A_b: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    D: Tensor | None,
    D_b: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_bias_b: Tensor | None,
    initial_state: Tensor | None,
    initial_state_b: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_states: Tensor,
    chunk_states_b: Tensor,
    scale: float,
    dt_softplus: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    backend: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """-> the gradients in the order of the inputs, dx to dinitial_state_b.  Absent incoming gradients are zero."""
    tensors = (
        x, dt, A, B, C, x_b, dt_b, A_b, B_b, C_b, D, D_b, z, dt_bias, dt_bias_b, initial_state, initial_state_b,
        cu_seqlens, mask,
    )  # fmt: skip
    phase = measured_phase("backward", frames, plan)
    return choose("bidirectional_scan", backend, *tensors, phase=phase).bwd(
        dy, dfinal_state, dfinal_state_b, *tensors, chunk_states, chunk_states_b,
        scale, dt_softplus, frames, max_seqlen, plan,
    )  # fmt: skip


@bidirectional_scan_backward_op.register_fake
def _(
    dy, dfinal_state, dfinal_state_b,
    x, dt, A, B, C, x_b, dt_b, A_b, B_b, C_b, D, D_b, z, dt_bias, dt_bias_b, initial_state, initial_state_b,
    cu_seqlens, mask, chunk_states, chunk_states_b, scale, dt_softplus, frames, max_seqlen, plan, backend,
):  # fmt: skip
    dx, ddt, dA, dB, dC, dD, ddt_bias, dstate = fake_gradients(x, dt, A, B, C, D, dt_bias, initial_state)
    dx_b, ddt_b, dA_b, dB_b, dC_b, dD_b, ddt_bias_b, dstate_b = fake_gradients(
        x_b, dt_b, A_b, B_b, C_b, D_b, dt_bias_b, initial_state_b
    )
    dz = empty(x, *(() if z is None else z.shape), dtype=x.dtype)
    return (
        dx, ddt, dA, dB, dC, dx_b, ddt_b, dA_b, dB_b, dC_b,
        dD, dD_b, dz, ddt_bias, ddt_bias_b, dstate, dstate_b,
    )  # fmt: skip


def _setup_context(ctx, inputs, output):
    *tensors, scale, dt_softplus, frames, max_seqlen, return_final_state, _, _, plan, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3 if return_final_state else 1 :])
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.flags = scale, dt_softplus, frames, max_seqlen, plan, backend


def _backward(ctx, dy, dfinal_state, dfinal_state_b, *_):
    *tensors, chunk_states, chunk_states_b = ctx.saved_tensors
    check_saved("bidirectional_scan", tensors[0], chunk_states)
    gradients = bidirectional_scan_backward_op(
        dy, dfinal_state, dfinal_state_b, *tensors, chunk_states, chunk_states_b, *ctx.flags
    )
    return *(gradient(value, t) for value, t in zip(gradients, tensors[:17], strict=True)), *(None,) * 11


bidirectional_scan_op.register_autograd(_backward, setup_context=_setup_context)


def _double_backward(ctx, *gradients):
    raise NotImplementedError("bidirectional_scan: no double backward")


bidirectional_scan_backward_op.register_autograd(_double_backward)


@register_flop_formula(torch.ops.endomamba.bidirectional_scan)
def _(
    x_shape, dt_shape, A_shape, B_shape, C_shape, x_b_shape, dt_b_shape, A_b_shape, B_b_shape, C_b_shape,
    D_shape, D_b_shape, z_shape, *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    """Two directions, their scaled sum (2) and one gate (1), a token and channel."""
    b, l, d = x_shape
    both = direction_flops(x_shape, A_shape, D_shape) + direction_flops(x_shape, A_shape, D_b_shape)
    return both + (3 if z_shape is not None else 2) * b * l * d


@register_flop_formula(torch.ops.endomamba.bidirectional_scan_backward)
def _(
    dy_shape, dfinal_shape, dfinal_b_shape,
    x_shape, dt_shape, A_shape, B_shape, C_shape, x_b_shape, dt_b_shape, A_b_shape, B_b_shape, C_b_shape,
    D_shape, D_b_shape, z_shape, *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    """Two directions, scale (1), and with z its gradient as in selective_scan (7) with the scaled sum again (2)."""
    b, l, d = x_shape
    gated = z_shape is not None
    both = sum(direction_backward_flops(x_shape, A_shape, skip, gated) for skip in (D_shape, D_b_shape))
    return both + (10 if gated else 1) * b * l * d
