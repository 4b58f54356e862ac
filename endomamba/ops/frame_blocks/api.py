"""The public frame_blocks: all blocks of one kind, of one frame of every stream, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._backend import check_backend
from .._checks import check_device, check_ndim, check_shape, needs_grad
from .op import frame_blocks_op

STEP = 16  # what the products of the kernels take: the dt rank is padded to this or a power of 2 above


class BlockWeights(NamedTuple):
    """A block as its kernels read it: see `pack_block`.  s: 1 direction or 2; r: the padded dt rank."""

    in_proj: Tensor  # (2 d, c), times the norm's weight
    conv: Tensor  # (s, d, w) fp32
    conv_bias: Tensor  # (s, d) fp32
    x_proj: Tensor  # (s, r + 2 n, d)
    dt_proj: Tensor  # (s, d, r)
    dt_bias: Tensor  # (s, d) fp32
    A: Tensor  # (s, d, n) fp32
    D: Tensor  # (s, d) fp32
    out_proj: Tensor  # (c, d)


@torch.no_grad()
def pack_block(norm: Tensor, in_proj: Tensor, directions: Sequence[Sequence[Tensor]], out_proj: Tensor) -> BlockWeights:
    """Weights of a block with an RMS norm, in the dtype of in_proj where they are of products, else fp32.

    norm: (c,)  in_proj: (2 d, c)  out_proj: (c, d)
    directions: one or two of (conv weight (d, w), conv bias (d,), x_proj (r + 2 n, d), dt_proj (d, r), dt_bias (d,),
    A (d, n), D (d,)), as mixer_inner takes them.  A copy: what the weights become later is not seen.
    """
    dtype = in_proj.dtype
    wide = torch.promote_types(dtype, torch.float32)
    conv, conv_bias, x_proj, dt_proj, dt_bias, A, D = (
        torch.stack([side[i].detach() for side in directions]) for i in range(7)
    )
    rank = dt_proj.shape[2]
    more = max(STEP, 1 << (rank - 1).bit_length()) - rank
    low, rest = x_proj.split((rank, x_proj.shape[1] - rank), dim=1)
    x_proj = torch.cat((low, low.new_zeros(len(low), more, low.shape[2]), rest), 1)
    dt_proj = torch.nn.functional.pad(dt_proj, (0, more))
    return BlockWeights(
        (in_proj.to(wide) * norm.to(wide)).to(dtype).contiguous(),
        *(conv.to(wide), conv_bias.to(wide), x_proj.to(dtype), dt_proj.to(dtype), dt_bias.to(wide)),
        *(A.to(wide), D.to(wide), out_proj.detach().to(dtype, copy=True).contiguous()),
    )


def frame_blocks(
    residual: Tensor,
    blocks: Sequence[BlockWeights],
    conv_state: Tensor | None = None,
    ssm_state: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str = "auto",
) -> None:
    """residual += mixer(rms_norm(residual)), block after block, in place; inference only.

    residual: (b, l, c) fp32, contiguous: the sum that the next norm reads, all that goes from block to block.
    blocks: of `pack_block`, all of two directions (which read the l tokens by themselves), or all of one, which go on
    from conv_state (layers, b, w - 1, d) and ssm_state (layers, b, d, n), fp32, contiguous; both are overwritten.

    The same sums as add_rms_norm and mixer_inner make, with two roundings less: the norm and what a block adds are
    never rounded to the products' dtype (README.md).  RuntimeError where a gradient would be needed.
    """
    op = "frame_blocks"
    check_ndim(op, "residual", residual, 3, "(b, l, c)")
    check_backend(op, backend)
    if not blocks:
        return
    first = blocks[0]
    sides, d, n = first.A.shape
    wide = first.A.dtype
    if residual.dtype != wide or not residual.is_contiguous():
        raise ValueError(f"{op}: residual must be contiguous and {wide}, got {residual.dtype}")
    if needs_grad(residual, *(t for block in blocks for t in block)):
        raise RuntimeError(
            f"{op} works in place and has no gradient: call it under torch.inference_mode() or torch.no_grad()"
        )
    shapes = [tuple(t.shape) for t in first]
    for i, block in enumerate(blocks):
        if [tuple(t.shape) for t in block] != shapes:
            raise ValueError(f"{op}: all blocks must have the shapes of the first, block {i} has not")
    check_shape(op, "in_proj", first.in_proj, (2 * d, residual.shape[2]), "(2 d, c) = ")
    states = {"conv_state": conv_state, "ssm_state": ssm_state}
    if sides == 2:
        if any(state is not None for state in states.values()):
            raise ValueError(f"{op}: blocks of two directions read a frame by itself and take no state")
    else:
        b, w = residual.shape[0], first.conv.shape[2]
        expected = {"conv_state": (len(blocks), b, w - 1, d), "ssm_state": (len(blocks), b, d, n)}
        for name, state in states.items():
            if state is None:
                raise ValueError(f"{op}: blocks of one direction need {name} {expected[name]}")
            check_shape(op, name, state, expected[name])
            if state.dtype != wide or not state.is_contiguous():
                raise ValueError(f"{op}: {name} is updated in place and must be contiguous {wide}, got {state.dtype}")
    check_device(op, residual.device, **states, blocks=first.in_proj)
    if residual.numel():
        frame_blocks_op(residual, [t for block in blocks for t in block], conv_state, ssm_state, eps, backend)
