"""Registers endomamba::frame_settle: it mutates, and has no backward on purpose."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._backend import Backend, choose, register
from .._triton import backend as triton_backend
from . import reference

BACKENDS = register(
    "frame_settle",
    {
        "triton": triton_backend("endomamba.ops.frame_settle", "frame_settle"),
        # A few passes over memory that PyTorch's own vectorised kernels make as fast as ours would.
        "cpu": Backend(reference.frame_settle, None, reference.unsupported_by_cpu),
        "reference": Backend(reference.frame_settle, None, lambda *_: []),
    },
)


@torch.library.custom_op(
    "endomamba::frame_settle",
    mutates_args=("frame", "frame_before", "a", "a_before", "b", "b_before", "answer", "not_finite"),
)
def frame_settle_op(
    logits: Tensor,
    active: Tensor,
    frame: Tensor,
    frame_before: Tensor,
    a: Tensor,
    a_before: Tensor,
    b: Tensor | None,
    b_before: Tensor | None,
    answer: Tensor,
    not_finite: Tensor,
    elapsed: bool,
    backend: str,
) -> None:
    choose("frame_settle", backend, logits).fwd(
        logits, active, frame, frame_before, a, a_before, b, b_before, answer, not_finite, elapsed
    )


@frame_settle_op.register_fake
def _(logits, active, frame, frame_before, a, a_before, b, b_before, answer, not_finite, elapsed, backend):
    return None


@register_flop_formula(torch.ops.endomamba.frame_settle)
def _(*args, **kwargs) -> int:
    return 0
