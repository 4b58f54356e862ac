"""Registers endomamba::add_rms_norm, which is the LayerNorm too: forward, backward, fakes, FLOPs, back ends.

An output that was not asked for is an empty tensor.  stats is what backward needs of every row, fp32: (1, rows) with
1 / root mean square, or (2, rows) with the mean before it.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._backend import Backend, choose, register
from .._triton import backend as triton_backend
from . import native, reference

register(
    "add_rms_norm",
    {
        "triton": triton_backend("endomamba.ops.add_rms_norm", "add_norm_fwd", "add_norm_bwd"),
        "cpu": Backend(native.add_norm_fwd, native.add_norm_bwd, native.unsupported),
        "reference": Backend(reference.add_norm_fwd, reference.add_norm_bwd, reference.unsupported),
    },
)


@torch.library.custom_op("endomamba::add_rms_norm", mutates_args=())
def add_norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    row_scale: Tensor | None,
    eps: float,
    layer_norm: bool,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return choose("add_rms_norm", backend, x).fwd(x, weight, bias, residual, row_scale, eps, layer_norm)


@add_norm_op.register_fake
def _(x, weight, bias, residual, row_scale, eps, layer_norm, plan, backend):
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty(x.shape), weight.new_empty(x.shape), weight.new_empty(1 + layer_norm, rows)


@torch.library.custom_op("endomamba::add_rms_norm_backward", mutates_args=())
def add_norm_backward_op(
    dnormed: Tensor | None,
    dnew_residual: Tensor | None,
    x: Tensor | None,
    new_residual: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_scale: Tensor | None,
    dtype: torch.dtype,
    has_residual: bool,
    layer_norm: bool,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx (of dtype), dweight, dbias, dresidual, drow_scale (where x is given); what has no owner is empty."""
    return choose("add_rms_norm", backend, new_residual if x is None else x).bwd(
        dnormed, dnew_residual, x, new_residual, stats, weight, bias, row_scale, dtype, has_residual, layer_norm
    )


@add_norm_backward_op.register_fake
def _(
    dnormed,
    dnew_residual,
    x,
    new_residual,
    stats,
    weight,
    bias,
    row_scale,
    dtype,
    has_residual,
    layer_norm,
    plan,
    backend,
):
    dx = new_residual.new_empty(new_residual.shape, dtype=dtype)
    dbias = weight.new_empty(0 if bias is None else bias.shape)
    dresidual = weight.new_empty(new_residual.shape if has_residual else 0)
    return dx, weight.new_empty(weight.shape), dbias, dresidual, weight.new_empty(0 if x is None else row_scale.shape)


def _setup(ctx, inputs, output):
    x, weight, bias, residual, row_scale, _, layer_norm, plan, backend = inputs
    _, new_residual, stats = output
    # x itself is needed for the gradient of the row scale only: DropPath's mask has none.
    needs_x = row_scale is not None and ctx.needs_input_grad[4]
    ctx.save_for_backward(x if needs_x else None, new_residual, stats, weight, bias, row_scale)
    ctx.options = (x.dtype, residual is not None, layer_norm, plan, backend)
    ctx.set_materialize_grads(False)


def _backward(ctx, dnormed, dnew_residual, dstats):
    if dnormed is None and dnew_residual is None:
        return (None,) * 9
    x, new_residual, stats, weight, bias, row_scale = ctx.saved_tensors
    dx, dweight, dbias, dresidual, drow_scale = add_norm_backward_op(
        dnormed, dnew_residual, x, new_residual, stats, weight, bias, row_scale, *ctx.options
    )
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        dresidual if ctx.options[1] else None,
        None if x is None else drow_scale,
        *(None,) * 4,
    )


def _no_double_backward(ctx, *grads):
    raise NotImplementedError("add_rms_norm: no double backward; its backward is not differentiable")


add_norm_op.register_autograd(_backward, setup_context=_setup)
add_norm_backward_op.register_autograd(_no_double_backward)


# FLOPs an element: add and scale 2, sum of squares 2, norm 2, and for the LayerNorm mean 1, centring 1, bias 1.


def _elements(shape) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@register_flop_formula(torch.ops.endomamba.add_rms_norm)
def _(x, weight, bias, residual, row_scale, eps, layer_norm, *args, out_shape=None, **kwargs) -> int:
    return (9 if layer_norm else 6) * _elements(x)


@register_flop_formula(torch.ops.endomamba.add_rms_norm_backward)
def _(dnormed, dnew_residual, x, new_residual, *args, out_shape=None, **kwargs) -> int:
    return 14 * _elements(new_residual)  # rhat 2, w * dnormed 1, two sums 4, dweight 2, dr 4, the residual's gradient 1
