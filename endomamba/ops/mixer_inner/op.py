"""endomamba::mixer_inner and its backward: custom ops, fakes, autograd, FLOP formulas, table of back ends.

An absent output is an empty tensor.  Parameter gradients come in their parameter's dtype.
"""

from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import _triton
from .._backend import Backend, choose, plain_dtypes, register
from .._scan import chunk_states_shape, empty, state_dtype
from ..causal_conv1d import op as _conv  # noqa: F401  the composition calls its kernels
from ..selective_scan.op import direction_backward_flops, direction_flops
from . import compose, cuda, native
from .compose import Linear, Side, Walk

TENSORS = 21  # from xz to in_proj_bias; cu_seqlens follows
BACKENDS = register(
    "mixer_inner",
    {
        "triton": Backend(partial(compose.fwd, "triton"), partial(compose.bwd, "triton"), _triton.unsupported),
        "cuda": Backend(partial(compose.fwd, "cuda"), partial(compose.bwd, "cuda"), cuda.unsupported),
        "auto": Backend(partial(compose.fwd, "auto"), partial(compose.bwd, "auto"), _triton.unsupported),
        "cpu": Backend(native.fwd, partial(compose.bwd, "cpu"), native.unsupported),
        "reference": Backend(partial(compose.fwd, "reference"), partial(compose.bwd, "reference"), lambda *_: []),
    },
)


@torch.library.custom_op("endomamba::mixer_inner", mutates_args=())
def mixer_inner_op(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    conv_weight_b: Tensor | None,
    conv_bias_b: Tensor | None,
    x_proj_weight_b: Tensor | None,
    dt_proj_weight_b: Tensor | None,
    dt_bias_b: Tensor | None,
    A_b: Tensor | None,
    D_b: Tensor | None,
    initial_conv_state: Tensor | None,
    initial_ssm_state: Tensor | None,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    reverse: bool,
    frames: int,
    max_seqlen: int,
    return_final_state: bool,
    save_states: bool,
    plan: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> out (b, l, c), or y (b, l, d) without out_proj, final conv and ssm state, chunk_states, chunk_states_b."""
    side = Side(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D)
    side_b = _side_b(conv_weight_b, conv_bias_b, x_proj_weight_b, dt_proj_weight_b, dt_bias_b, A_b, D_b)
    walk = Walk(cu_seqlens, reverse, frames, max_seqlen, plan)
    with plain_dtypes(xz.device):
        return choose("mixer_inner", backend, xz, A, conv_weight, cu_seqlens).fwd(
            xz, side, side_b, initial_conv_state, initial_ssm_state, walk, scale, return_final_state, save_states,
            Linear(out_proj_weight, out_proj_bias), Linear(in_proj_weight, in_proj_bias),
        )  # fmt: skip


def _side_b(*parameters: Tensor | None) -> Side | None:
    return None if parameters[0] is None else Side(*parameters)


@mixer_inner_op.register_fake
def _(
    xz, conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D,
    conv_weight_b, conv_bias_b, x_proj_weight_b, dt_proj_weight_b, dt_bias_b, A_b, D_b,
    initial_conv_state, initial_ssm_state, out_proj_weight, out_proj_bias,
    in_proj_weight, in_proj_bias, cu_seqlens,
    scale, reverse, frames, max_seqlen, return_final_state, save_states, plan, backend,
):  # fmt: skip
    wide = state_dtype(xz)
    sequences = xz.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    x = empty(xz, xz.shape[0], xz.shape[1], A.shape[0], dtype=xz.dtype)
    channels = (A if out_proj_weight is None else out_proj_weight).shape[0]
    out = empty(xz, xz.shape[0], xz.shape[1], channels, dtype=xz.dtype)
    conv_shape = (sequences, conv_weight.shape[1] - 1, A.shape[0]) if return_final_state else ()
    ssm_shape = (sequences, *A.shape) if return_final_state else ()
    chunks = chunk_states_shape(x, A, cu_seqlens) if save_states else ()
    chunks_b = chunks if conv_weight_b is not None else ()
    return out, *(empty(xz, *shape, dtype=wide) for shape in (conv_shape, ssm_shape, chunks, chunks_b))


@torch.library.custom_op("endomamba::mixer_inner_backward", mutates_args=())
def mixer_inner_backward_op(
    dout: Tensor | None,
    dconv_state: Tensor | None,
    dssm_state: Tensor | None,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    conv_weight_b: Tensor | None,
    conv_bias_b: Tensor | None,
    x_proj_weight_b: Tensor | None,
    dt_proj_weight_b: Tensor | None,
    dt_bias_b: Tensor | None,
    A_b: Tensor | None,
    D_b: Tensor | None,
    initial_conv_state: Tensor | None,
    initial_ssm_state: Tensor | None,
    out_proj_weight: Tensor | None,
    out_proj_bias: Tensor | None,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_states: Tensor,
    chunk_states_b: Tensor,
    scale: float,
    reverse: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    backend: str,
) -> list[Tensor]:
    """-> the gradients of the 21 tensors from xz to in_proj_bias, in their order."""
    side = Side(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_bias, A, D)
    side_b = _side_b(conv_weight_b, conv_bias_b, x_proj_weight_b, dt_proj_weight_b, dt_bias_b, A_b, D_b)
    walk = Walk(cu_seqlens, reverse, frames, max_seqlen, plan)
    with plain_dtypes(xz.device):
        chosen = choose("mixer_inner", backend, xz, A, conv_weight, cu_seqlens)
        dxz, dside, dside_b, dconv, dssm, dout_proj, din_proj = chosen.bwd(
            dout, dconv_state, dssm_state, xz, side, side_b, initial_conv_state, initial_ssm_state,
            chunk_states, chunk_states_b, walk, scale,
            Linear(out_proj_weight, out_proj_bias), Linear(in_proj_weight, in_proj_bias),
        )  # fmt: skip
    absent = [empty(xz, dtype=torch.float32) for _ in range(7)] if dside_b is None else dside_b
    return [dxz, *dside, *absent, dconv, dssm, *dout_proj, *din_proj]


@mixer_inner_backward_op.register_fake
def _(dout, dconv_state, dssm_state, *args):
    tensors = args[:TENSORS]
    return [empty(tensors[0], *(() if t is None else t.shape), dtype=_gradient_dtype(t)) for t in tensors]


def _gradient_dtype(t: Tensor | None) -> torch.dtype:
    return torch.float32 if t is None else t.dtype


def _setup_context(ctx, inputs, output):
    *tensors, scale, reverse, frames, max_seqlen, return_final_state, _, plan, backend = inputs
    ctx.set_materialize_grads(False)
    # A state that was not asked for is an empty tensor: its gradient, empty too, must not reach a kernel as a state's.
    ctx.mark_non_differentiable(*output[3 if return_final_state else 1 :])
    ctx.save_for_backward(*tensors, *output[3:])
    ctx.flags = scale, reverse, frames, max_seqlen, plan, backend


def _backward(ctx, dout, dconv_state, dssm_state, *_):
    tensors = ctx.saved_tensors
    if tensors[TENSORS + 1].ndim != 4:
        raise RuntimeError("mixer_inner: backward needs the chunk states; the private op ran with save_states=False")
    gradients = mixer_inner_backward_op(dout, dconv_state, dssm_state, *tensors, *ctx.flags)
    inputs = zip(gradients, tensors[:TENSORS], strict=True)
    return *(None if t is None else gradient for gradient, t in inputs), *(None,) * 9


mixer_inner_op.register_autograd(_backward, setup_context=_setup_context)


def _double_backward(ctx, *gradients):
    raise NotImplementedError("mixer_inner: no double backward")


mixer_inner_backward_op.register_autograd(_double_backward)


def _linear_flops(shape, weight_shape) -> int:
    return 0 if weight_shape is None else 2 * shape[0] * shape[1] * weight_shape[0] * weight_shape[1]


def _matrix_flops(xz_shape, conv_shape, x_proj_shape, dt_proj_shape) -> int:
    """Conv, x_proj and dt_proj of one direction, a multiply-add counted as two."""
    b, l, _ = xz_shape
    d, w = conv_shape
    return 2 * b * l * (d * w + x_proj_shape[0] * d + d * dt_proj_shape[1])


def _sides(shapes):
    """(conv_weight, x_proj_weight, dt_proj_weight, A, D) of each direction, from the shapes after xz."""
    for side in (shapes[:7], shapes[7:14]):
        if side[0] is not None:
            yield side[0], side[2], side[3], side[5], side[6]


def mixer_flops(xz_shape, sides) -> int:
    """Both matrices, the conv and the scan of each direction, and the gate (1 a token and channel)."""
    b, l, channels = xz_shape
    x_shape, total = (b, l, channels // 2), b * l * channels // 2
    for conv, x_proj, dt_proj, A, D in sides:
        total += _matrix_flops(xz_shape, conv, x_proj, dt_proj) + direction_flops(x_shape, A, D)
    return total


def _wide(shape, A_shape):
    """The shape of xz, which is not there where in_proj is."""
    return *shape[:2], 2 * A_shape[0]


@register_flop_formula(torch.ops.endomamba.mixer_inner)
def _(xz_shape, *args, out_shape=None, **kwargs) -> int:
    linear = _linear_flops(xz_shape, args[16]) + _linear_flops(xz_shape, args[18])
    return mixer_flops(_wide(xz_shape, args[5]), _sides(args)) + linear


@register_flop_formula(torch.ops.endomamba.mixer_inner_backward)
def _(dout_shape, dconv_shape, dssm_shape, xz_shape, *args, out_shape=None, **kwargs) -> int:
    """Each matrix product again and its two gradients; the scan as in its own backward; 7 a token and channel for z.

    Of out_proj the two gradients, and y again (1 a token and channel).
    """
    b, l, channels = xz_shape = _wide(xz_shape, args[5])
    x_shape, total = (b, l, channels // 2), 7 * b * l * channels // 2
    for conv, x_proj, dt_proj, A, D in _sides(args):
        total += 3 * _matrix_flops(xz_shape, conv, x_proj, dt_proj) + direction_backward_flops(x_shape, A, D, True)
    if args[16] is not None:
        total += 2 * _linear_flops(xz_shape, args[16]) + b * l * channels // 2
    return total + 3 * _linear_flops(xz_shape, args[18])
