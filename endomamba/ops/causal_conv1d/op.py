"""Registers endomamba::causal_conv1d and endomamba::bidirectional_conv1d: forward, backward, fakes, FLOPs, back ends.

An output that was not asked for is an empty tensor.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._backend import Backend, choose, register
from .._triton import backend as triton
from . import cuda, native, reference

register(
    "causal_conv1d",
    {
        "triton": triton(__package__, "causal_conv1d_fwd", "causal_conv1d_bwd"),
        "cuda": Backend(cuda.causal_conv1d_fwd, cuda.causal_conv1d_bwd, cuda.unsupported),
        "cpu": Backend(native.causal_conv1d_fwd, native.causal_conv1d_bwd, native.unsupported),
        "reference": Backend(reference.causal_conv1d_fwd, reference.causal_conv1d_bwd, reference.unsupported),
    },
)
register(
    "bidirectional_conv1d",
    {
        "triton": triton(__package__, "bidirectional_conv1d_fwd", "bidirectional_conv1d_bwd"),
        "cuda": Backend(cuda.bidirectional_conv1d_fwd, cuda.bidirectional_conv1d_bwd, cuda.unsupported),
        "cpu": Backend(native.bidirectional_conv1d_fwd, native.bidirectional_conv1d_bwd, native.unsupported),
        "reference": Backend(
            reference.bidirectional_conv1d_fwd, reference.bidirectional_conv1d_bwd, reference.unsupported
        ),
    },
)


def _absent(x: Tensor) -> Tensor:
    return x.new_empty(0)


# --- one direction -------------------------------------------------------------------------------------------------


@torch.library.custom_op("endomamba::causal_conv1d", mutates_args=())
def causal_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
    frames: int,
    max_seqlen: int,
    return_final_state: bool,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return choose("causal_conv1d", backend, x, weight, cu_seqlens).fwd(
        x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, return_final_state
    )


@causal_conv1d_op.register_fake
def _(x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, max_seqlen, return_final_state, plan, backend):
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = weight.new_empty(sequences, weight.shape[1] - 1, x.shape[2]) if return_final_state else _absent(weight)
    return x.new_empty(x.shape), state


@torch.library.custom_op("endomamba::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward_op(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    reverse: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dinitial_state; the last two are empty where there is no bias or no initial state."""
    return choose("causal_conv1d", backend, x, weight, cu_seqlens).bwd(
        dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames
    )


@causal_conv1d_backward_op.register_fake
def _(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, max_seqlen, plan, backend):
    dbias = _absent(weight) if bias is None else weight.new_empty(bias.shape)
    dstate = _absent(weight) if initial_state is None else weight.new_empty(initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dstate


def _causal_setup(ctx, inputs, output):
    x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, max_seqlen, asked, plan, backend = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)
    ctx.options = (silu, reverse, frames, max_seqlen, plan, backend)
    ctx.has_final_state = asked
    ctx.set_materialize_grads(False)


def _causal_backward(ctx, dy, dfinal_state):
    if not ctx.has_final_state:
        dfinal_state = None  # torch.compile sends one for the empty output too
    if dy is None and dfinal_state is None:
        return (None,) * 12
    x, weight, bias, initial_state, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dstate = causal_conv1d_backward_op(
        dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, *ctx.options
    )
    dbias = None if bias is None else dbias
    dstate = None if initial_state is None else dstate
    return dx, dweight, dbias, dstate, *(None,) * 8


causal_conv1d_op.register_autograd(_causal_backward, setup_context=_causal_setup)


# --- both directions -----------------------------------------------------------------------------------------------


@torch.library.custom_op("endomamba::bidirectional_conv1d", mutates_args=())
def bidirectional_conv1d_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return choose("bidirectional_conv1d", backend, x, weight, cu_seqlens).fwd(
        x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames
    )


@bidirectional_conv1d_op.register_fake
def _(x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames, max_seqlen, plan, backend):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@torch.library.custom_op("endomamba::bidirectional_conv1d_backward", mutates_args=())
def bidirectional_conv1d_backward_op(
    dy: Tensor | None,
    dy_b: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight_b: Tensor,
    bias_b: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dweight_b, dbias_b; a bias that is not there has an empty gradient."""
    return choose("bidirectional_conv1d", backend, x, weight, cu_seqlens).bwd(
        dy, dy_b, x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames
    )


@bidirectional_conv1d_backward_op.register_fake
def _(dy, dy_b, x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames, max_seqlen, plan, backend):
    dbias, dbias_b = (_absent(weight) if t is None else weight.new_empty(t.shape) for t in (bias, bias_b))
    dweight, dweight_b = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    return x.new_empty(x.shape), dweight, dbias, dweight_b, dbias_b


def _bidirectional_setup(ctx, inputs, output):
    x, weight, bias, weight_b, bias_b, cu_seqlens, *options = inputs
    ctx.save_for_backward(x, weight, bias, weight_b, bias_b, cu_seqlens)
    ctx.options = tuple(options)
    ctx.set_materialize_grads(False)


def _bidirectional_backward(ctx, dy, dy_b):
    if dy is None and dy_b is None:
        return (None,) * 11
    x, weight, bias, weight_b, bias_b, cu_seqlens = ctx.saved_tensors
    dx, dweight, dbias, dweight_b, dbias_b = bidirectional_conv1d_backward_op(
        dy, dy_b, x, weight, bias, weight_b, bias_b, cu_seqlens, *ctx.options
    )
    dbias = None if bias is None else dbias
    dbias_b = None if bias_b is None else dbias_b
    return dx, dweight, dbias, dweight_b, dbias_b, *(None,) * 6


bidirectional_conv1d_op.register_autograd(_bidirectional_backward, setup_context=_bidirectional_setup)


# --- no double backward --------------------------------------------------------------------------------------------


def _no_double_backward(ctx, *grads):
    raise NotImplementedError("causal_conv1d: no double backward; its backward is not differentiable")


causal_conv1d_backward_op.register_autograd(_no_double_backward)
bidirectional_conv1d_backward_op.register_autograd(_no_double_backward)


# --- FLOPs: w multiply-adds an element and direction; backward recomputes them, then makes dx and dweight ----------


def _flops(x_shape, weight_shape) -> int:
    b, l, d = x_shape
    return 2 * b * l * d * weight_shape[1]


@register_flop_formula(torch.ops.endomamba.causal_conv1d)
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return _flops(x, weight)


@register_flop_formula(torch.ops.endomamba.causal_conv1d_backward)
def _(dy, dfinal_state, x, weight, *args, out_shape=None, **kwargs) -> int:
    return 3 * _flops(x, weight)


@register_flop_formula(torch.ops.endomamba.bidirectional_conv1d)
def _(x, weight, *args, out_shape=None, **kwargs) -> int:
    return 2 * _flops(x, weight)


@register_flop_formula(torch.ops.endomamba.bidirectional_conv1d_backward)
def _(dy, dy_b, x, weight, *args, out_shape=None, **kwargs) -> int:
    return 6 * _flops(x, weight)
