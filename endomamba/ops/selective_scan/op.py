"""endomamba::selective_scan and its backward: custom ops, fakes, autograd, FLOP formulas, table of back ends.

The op takes one operand form (see api.py): x, dt, z, B, C of one dtype, A, D, dt_bias, states fp32; B, C (b, l, g, n),
or (d, n) where constant.  An absent output is an empty tensor.  Outputs are contiguous and alias nothing.
Gradients: dx, ddt, dz and the grouped dB, dC in their input's dtype; all others, constant dB and dC too, fp32 (fp64).
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
from . import reference, rows

SHARED = "endomamba.ops"
BACKENDS = register(
    "selective_scan",
    {
        "triton": Backend(
            partial(
                rows.fwd,
                _triton.lazy(SHARED, "_scan_triton", "scan_fwd"),
                step=_triton.lazy(SHARED, "_scan_triton_step", "scan_step"),
            ),
            partial(rows.bwd, _triton.lazy(SHARED, "_scan_triton", "scan_bwd")),
            _triton.unsupported,
        ),
        "cuda": Backend(
            partial(rows.fwd, _scan_cuda.scan_fwd),
            partial(rows.bwd, _scan_cuda.scan_bwd),
            _scan_cuda.unsupported_scan,
            _scan_cuda.faster,
        ),
        "cpu": Backend(partial(rows.fwd, scan_fwd), partial(rows.bwd, scan_bwd), unsupported),
        "reference": Backend(reference.fwd, reference.bwd, lambda *tensors: []),
    },
)


@torch.library.custom_op("endomamba::selective_scan", mutates_args=())
def selective_scan_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    dt_softplus: bool,
    reverse: bool,
    frames: int,
    max_seqlen: int,
    return_final_state: bool,
    save_states: bool,
    out_fp32: bool,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y (b, l, d), final_state (sequences, d, n), chunk_states (see `_scan.chunk_states_shape`)."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, mask)
    phase = measured_phase("saving" if save_states else "forward", frames, plan)
    return choose("selective_scan", backend, *tensors, phase=phase).fwd(
        *tensors,
        dt_softplus, reverse, frames, max_seqlen, return_final_state, save_states, out_fp32, plan,
    )  # fmt: skip


@selective_scan_op.register_fake
def _(
    x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, mask,
    dt_softplus, reverse, frames, max_seqlen, return_final_state, save_states, out_fp32, plan, backend,
):  # fmt: skip
    wide = state_dtype(x)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y = empty(x, *x.shape, dtype=torch.float32 if out_fp32 else x.dtype)
    final_state = empty(x, *((sequences, *A.shape) if return_final_state else ()), dtype=wide)
    chunk_states = empty(x, *(chunk_states_shape(x, A, cu_seqlens) if save_states else ()), dtype=wide)
    return y, final_state, chunk_states


@torch.library.custom_op("endomamba::selective_scan_backward", mutates_args=())
def selective_scan_backward_op(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_states: Tensor,
    dt_softplus: bool,
    reverse: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state.  dy or dfinal_state may be absent: zero."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, mask)
    phase = measured_phase("backward", frames, plan)
    return choose("selective_scan", backend, *tensors, phase=phase).bwd(
        dy, dfinal_state, *tensors, chunk_states,
        dt_softplus, reverse, frames, max_seqlen, plan,
    )  # fmt: skip


@selective_scan_backward_op.register_fake
def _(
    dy, dfinal_state, x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens, mask, chunk_states,
    dt_softplus, reverse, frames, max_seqlen, plan, backend,
):  # fmt: skip
    dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_state = fake_gradients(x, dt, A, B, C, D, dt_bias, initial_state)
    dz = empty(x, *(() if z is None else z.shape), dtype=x.dtype)
    return dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state


def fake_gradients(x, dt, A, B, C, D, dt_bias, initial_state):
    """The gradients of one direction as the backward ops return them, without values."""
    wide = state_dtype(x)

    def like(t: Tensor | None, dtype: torch.dtype) -> Tensor:
        return empty(x, *(() if t is None else t.shape), dtype=dtype)

    activations = [like(t, x.dtype) for t in (x, dt)]
    dB, dC = (like(t, wide if t.ndim == 2 else x.dtype) for t in (B, C))
    return *activations, like(A, wide), dB, dC, like(D, wide), like(dt_bias, wide), like(initial_state, wide)


def check_saved(op: str, x: Tensor, chunk_states: Tensor) -> None:
    if chunk_states.ndim != 4:
        raise RuntimeError(f"{op}: backward needs the chunk states; the private op was called with save_states=False")


def gradient(value: Tensor, t: Tensor | None) -> Tensor | None:
    """What autograd gets for input t: None where it was absent, a constant B or C in its own dtype."""
    return None if t is None else value.to(t.dtype)


def _setup_context(ctx, inputs, output):
    *tensors, dt_softplus, reverse, frames, max_seqlen, return_final_state, _, _, plan, backend = inputs
    _, final_state, chunk_states = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(chunk_states, *(() if return_final_state else (final_state,)))
    ctx.save_for_backward(*tensors, chunk_states)
    ctx.flags = dt_softplus, reverse, frames, max_seqlen, plan, backend


def _backward(ctx, dy, dfinal_state, _):
    *tensors, chunk_states = ctx.saved_tensors
    x, dt, A, B, C, D, z, dt_bias, initial_state, *_ = tensors
    check_saved("selective_scan", x, chunk_states)
    gradients = selective_scan_backward_op(dy, dfinal_state, *tensors, chunk_states, *ctx.flags)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return *(gradient(value, t) for value, t in zip(gradients, inputs, strict=True)), *(None,) * 11


selective_scan_op.register_autograd(_backward, setup_context=_setup_context)


def _double_backward(ctx, *gradients):
    raise NotImplementedError("selective_scan: no double backward")


selective_scan_backward_op.register_autograd(_double_backward)


def direction_flops(x_shape, A_shape, D_shape) -> int:
    """Forward of one direction without its gate, counted as the authors of Mamba do (9 a token, channel and state):

    dt*A, exp, dt*x*B (2), its add to decay*h (2), <C,h> (2) and one for softplus; D*x is counted once.
    """
    b, l, d = x_shape
    return 9 * b * l * d * A_shape[1] + (b * l * d if D_shape is not None else 0)


def direction_backward_flops(x_shape, A_shape, D_shape, gated: bool) -> int:
    """Backward of one direction, a token, channel and state:

    h again (dt*A, exp, decay*h, +dt*x*B: 5), dh += ds*C (2), dB and its sum (2), dC and its sum (2), sum of dh*B (2),
    dlog = dh*h*decay (2), sum of dlog*A (2), dA += dlog*dt (2), dh *= decay (1): 20; <C,h> again for dz (2).
    A token and channel: dx, ddt and the input dt*x (4); D: dx += D*ds, dD += ds*x (4).
    """
    b, l, d = x_shape
    per_state = 22 if gated else 20
    return b * l * d * (per_state * A_shape[1] + 4 + (4 if D_shape is not None else 0))


@register_flop_formula(torch.ops.endomamba.selective_scan)
def _(x_shape, dt_shape, A_shape, B_shape, C_shape, D_shape, z_shape, *args, out_shape=None, **kwargs) -> int:
    b, l, d = x_shape
    return direction_flops(x_shape, A_shape, D_shape) + (b * l * d if z_shape is not None else 0)


@register_flop_formula(torch.ops.endomamba.selective_scan_backward)
def _(
    dy_shape, dfinal_shape, x_shape, dt_shape, A_shape, B_shape, C_shape, D_shape, z_shape,
    *args, out_shape=None, **kwargs,
) -> int:  # fmt: skip
    """With z also ds = dy*silu(z) (1) and dz = dy*s*silu'(z) (6), a token and channel."""
    b, l, d = x_shape
    gated = z_shape is not None
    return direction_backward_flops(x_shape, A_shape, D_shape, gated) + (7 * b * l * d if gated else 0)
