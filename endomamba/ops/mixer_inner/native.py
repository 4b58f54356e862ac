"""The C++ mixer: conv, x_proj, dt_proj, scan and gate in one call."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._backend import undisturbed
from .._extension import C as _C
from .._native import DTYPES, unsupported, view
from .._scan import chunk_states_shape, empty
from . import compose
from .compose import IDENTITY, Linear, Side, Walk

__all__ = ["fwd", "mixer_of_modules", "runs_modules", "step", "unsupported"]


def _run(
    xz: Tensor,
    sides: tuple[Side, ...],
    scale: float,
    states: tuple[Tensor | None, Tensor | None],
    finals: tuple[Tensor | None, Tensor | None],
    chunks: tuple[Tensor | None, ...] = (None, None),
    log_A: bool = False,
) -> Tensor:
    """-> y (b, l, d).  The conv weight may be (d, 1, w); log_A: A is log(-A).

    States: conv (b, w - 1, d) and ssm (b, d, n), fp32; the final ones are written, in place of the initial ones where
    they are the same tensors.  chunks: of each side, gets the states that a backward reads.
    """
    dtype, (b, l, _) = xz.dtype, xz.shape
    (d, n), w, r = sides[0].A.shape, sides[0].conv_weight.shape[-1], sides[0].dt_proj_weight.shape[1]
    y = xz.new_empty(b, l, d)
    start, *strides = view(xz)
    # What the kernel reads must live until it has returned.
    kept = [t for side, to in zip(sides, chunks, strict=False) for t in (*_in_dtype(side, dtype), to)]
    kept = [t if t is None or t.is_contiguous() else t.contiguous() for t in kept]
    initial = tuple(map(view, states))
    _C.mixer_fwd(
        (b, l, d, n, w, r), DTYPES[dtype], torch.get_num_threads(), scale, log_A,
        (start, *strides), (start + d * strides[2] * xz.element_size(), *strides), y.data_ptr(),
        *initial, *(initial if finals is states else map(view, finals)),
        [0 if t is None else t.data_ptr() for t in kept],
    )  # fmt: skip
    return y


def _in_dtype(side: Side, dtype: torch.dtype) -> Side:
    """With both matrices in `dtype`."""
    if side.x_proj_weight.dtype == dtype == side.dt_proj_weight.dtype:
        return side
    return side._replace(x_proj_weight=side.x_proj_weight.to(dtype), dt_proj_weight=side.dt_proj_weight.to(dtype))


def fwd(
    xz: Tensor,
    side: Side,
    side_b: Side | None,
    initial_conv_state: Tensor | None,
    initial_ssm_state: Tensor | None,
    walk: Walk,
    scale: float,
    return_final_state: bool,
    save_states: bool,
    out_proj: Linear = IDENTITY,
    in_proj: Linear = IDENTITY,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`compose.fwd`, and that itself for other walks than frame by frame, forwards."""
    if walk.cu_seqlens is not None or walk.reverse or walk.frames:
        return compose.fwd(
            "cpu", xz, side, side_b, initial_conv_state, initial_ssm_state, walk, scale, return_final_state,
            save_states, out_proj, in_proj,
        )  # fmt: skip
    xz = compose.linear(xz, in_proj)
    b, (d, n), w = xz.shape[0], side.A.shape, side.conv_weight.shape[1]
    shapes = ((b, w - 1, d), (b, d, n)) if return_final_state else ((), ())
    finals = tuple(empty(xz, *shape, dtype=torch.float32) for shape in shapes)
    sides = (side,) if side_b is None else (side, side_b)
    written = finals if return_final_state else (None, None)
    chunks = [empty(xz, dtype=torch.float32) for _ in range(2)]
    if save_states:
        shape = chunk_states_shape(xz[..., :d], side.A, None)
        chunks[: len(sides)] = [empty(xz, *shape, dtype=torch.float32) for _ in sides]
    saved = chunks if save_states else (None, None)
    y = _run(xz, sides, scale, (initial_conv_state, initial_ssm_state), written, saved)
    return compose.linear(y, out_proj), *finals, *chunks


def step(xz: Tensor, side: Side, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
    """-> y; both states are overwritten."""
    states = (conv_state, ssm_state)
    return _run(xz, (side,), 1.0, states, states)


# --- a mixer's own parameters, in eager inference --------------------------------------------------------------------
# The op's checks and a tensor for -exp(A_log) take longer than Python may for a small frame: only sizes are compared.


def runs_modules(u: Tensor, side: Side, backend: str) -> bool:
    """Whether `mixer_of_modules` may stand for the ops here: on a CPU, with nobody looking at the dispatcher."""
    return (
        u.device.type == "cpu"
        and backend in ("auto", "cpu")
        and u.dtype == side.x_proj_weight.dtype
        and side.A.dtype == side.conv_weight.dtype == torch.float32
        and undisturbed()
        and not unsupported(u)
        and not torch.is_autocast_enabled("cpu")
    )


def mixer_of_modules(
    u: Tensor, in_proj: Linear, sides: tuple[Side, ...], out_proj: Linear, states: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """A mixer from in_proj's input to out_proj's output; the states are overwritten.

    sides: as the modules hold them, the conv weight (d, 1, w), and A_log for A.
    """
    xz = F.linear(u, *in_proj)
    for side in sides:
        _check_sizes(xz, side)
    return F.linear(_run(xz, sides, 1.0, states, states, log_A=True), *out_proj)


def _check_sizes(xz: Tensor, side: Side) -> None:
    """The kernel reads what A and dt_proj say; a parameter that was replaced by one of another size: ValueError."""
    (d, n), r, conv = side.A.shape, side.dt_proj_weight.shape[-1], side.conv_weight
    expected = (2 * d, d * conv.shape[-1], d, (r + 2 * n) * d, d * r, d, d)
    rest = (side.conv_bias, side.x_proj_weight, side.dt_proj_weight, side.dt_bias, side.D)
    sizes = (e if t is None else t.numel() for e, t in zip(expected[2:], rest, strict=True))
    found = (xz.shape[-1], conv.numel(), *sizes)
    if found != expected:
        names = ("channels of in_proj", *(name for name in Side._fields if name != "A"))
        each = zip(names, expected, found, strict=True)
        wrong = ", ".join(f"{e} {name}, got {f}" for name, e, f in each if e != f)
        raise ValueError(f"mixer_inner: with A of {d} x {n} and a dt rank of {r} there must be {wrong}")
