"""Triton kernels, backward: dx in one pass that makes the pre-activations again, parameter gradients in a second.

Letters: b sequences, l tokens, d channels, w taps; k counts steps of the walk, not tokens in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton import ASM, AotCase, meta, on_device
from .._triton_math import sigmoid
from .triton_fwd import (
    advance,
    aot_options,
    aot_tensors,
    at,
    begin,
    column_mask,
    contiguous,
    convolve,
    cut,
    load,
    load_before,
    locate,
    parameters,
    rows,
    strides,
)

# both directions? -> tokens that a walker loads at once, channels of a lane (at most 16 bytes), walkers of a program.
# bf16, w = 4: 128 and 244 registers a thread, no spills; one direction with 8 channels a lane takes 240.
LAUNCH = {False: (4, 4, 4), True: (4, 4, 4)}
BLOCK_GROUPS, BLOCK_CHANNELS = 128, 32  # tile of the second kernel


@triton.jit
def slope(dy, bias, taps, window, W: tl.constexpr, MIRROR: tl.constexpr, SILU: tl.constexpr, ASM: tl.constexpr):
    """dy times the activation's slope, s * (1 + p * (1 - s)) at p = the pre-activation, s = sigmoid(p)."""
    if SILU:
        p = convolve(bias, taps, window, W, MIRROR)
        s = sigmoid(p, ASM)
        dy *= s * tl.fma(p, 1.0 - s, 1.0)
    return dy


@triton.jit
def accumulate(sums, g, window, W: tl.constexpr, MIRROR: tl.constexpr):
    """Adds one step to the sums of dweight, oldest tap first, and of dbias."""
    new = ()
    for j in tl.static_range(W):
        new = new + (tl.fma(g, window[W - 1 - j if MIRROR else j], sums[j]),)
    return new + (sums[W] + g,)


@triton.jit
def write(partial, sums, offset, mask, d, W: tl.constexpr):
    for j in tl.static_range(W + 1):
        tl.store(partial + (offset + j) * d, tl.sum(sums[j], 0), mask=mask)


# Grid (groups * cdiv(d, BLOCK_D),), channel blocks fastest, walkers as in the forward kernel.
# At step k the window is x[k-W+1 .. k] and g holds the slopes of steps k-W+1 .. k, so that dx of step k-W+1 is
#   complete: dx[m] = sum_j taps[j] * g[m+W-1-j].  A walker goes W - 1 steps past its end, for dx but not for dweight.
# Both: the same window makes g_b[k-W+1]; dx[m] += sum_j taps_b[j] * g_b[m-W+1+j].
# Registers: taps, window, g and W + 1 sums, in fp32, of every direction.
# Traffic: x and each dy read once, dx written once: 3 * b*l*d elements, both directions 4; partial sums of a program
#   of ROWS walkers: (W + 1) * d * 4 bytes a direction.
# Numerics: fp32; the bits of dx depend on nothing but the row; sums over steps, walkers, programs always in this order.
@triton.jit(do_not_specialize=["l", "sequences", "chunk", "chunks", "search", "frames"])
def _conv1d_bwd_kernel(
    x_ptr,
    dx_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,  # None: no gradient came
    weight_b_ptr,  # None: one direction
    bias_b_ptr,
    dy_b_ptr,
    initial_ptr,
    dinitial_ptr,
    dfinal_ptr,
    partial_ptr,
    cu_ptr,
    stride_x_b,
    stride_x_l,
    stride_x_d,
    stride_dx,  # between its tokens
    stride_dy_b,
    stride_dy_l,
    stride_dy_d,
    stride_dy_b_b,
    stride_dy_b_l,
    stride_dy_b_d,
    l,
    d,
    sequences,
    chunk,
    chunks,
    search,
    frames,
    W: tl.constexpr,
    SILU: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    TOKENS: tl.constexpr,
    ASM: tl.constexpr,
):
    blocks = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    walker = (pid // blocks) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    channel = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    active, sequence, row, start, length, first = locate(walker, cu_ptr, l, sequences, chunk, chunks, search)
    rest = length - first  # steps to the sequence's end
    own = tl.minimum(rest, chunk)
    mask = column_mask(channel, d, EVEN_D)
    x_walk = begin(x_ptr, row, start, first, length, channel, stride_x_b, stride_x_l, stride_x_d, frames, REVERSE)
    dx_walk = begin(
        dx_ptr, row, start, first, length, channel, l.to(tl.int64) * stride_dx, stride_dx, 1, frames, REVERSE
    )
    taps, bias = parameters(weight_ptr, bias_ptr, channel, d, W)
    if dy_ptr is not None:
        dy_walk = begin(
            dy_ptr, row, start, first, length, channel, stride_dy_b, stride_dy_l, stride_dy_d, frames, REVERSE
        )
    if weight_b_ptr is not None:
        taps_b, bias_b = parameters(weight_b_ptr, bias_b_ptr, channel, d, W)
    if dy_b_ptr is not None:
        dy_b_walk = begin(
            dy_b_ptr, row, start, first, length, channel, stride_dy_b_b, stride_dy_b_l, stride_dy_b_d, frames, REVERSE
        )
    initial = None
    if initial_ptr is not None:
        initial = rows(initial_ptr, sequence, channel, (W - 1) * d, 1)
        dinitial = rows(dinitial_ptr, sequence, channel, (W - 1) * d, 1)
    if dfinal_ptr is not None:
        dfinal = rows(dfinal_ptr, sequence, channel, (W - 1) * d, 1)
    steps = tl.max(own) + W - 1

    zero = tl.zeros((ROWS, BLOCK_D), tl.float32)
    window, g, g_b, sums, sums_b = (), (), (), (zero,), (zero,)  # [ROWS, BLOCK_D] each
    for j in tl.static_range(-W + 1, 0):
        x = load_before(x_walk, j, first + j, length, frames, mask & active, initial, d, REVERSE, W)
        window, g, g_b = window + (x,), g + (zero,), g_b + (zero,)
    for _ in tl.static_range(W):
        sums, sums_b = sums + (zero,), sums_b + (zero,)
    for i in range(0, steps, TOKENS):
        xs, dys, dys_b = (), (), ()
        for t in tl.static_range(TOKENS):
            k = first + i + t
            inside = mask & (i + t < rest)
            xs = xs + (load(at(x_walk, t, k, length, frames, REVERSE), inside),)
            if dy_ptr is not None:
                dys = dys + (load(at(dy_walk, t, k, length, frames, REVERSE), inside),)
            if dy_b_ptr is not None:
                k -= W - 1
                inside = mask & (k >= 0) & (k < length)
                dys_b = dys_b + (load(at(dy_b_walk, t - (W - 1), k, length, frames, REVERSE), inside),)
        for t in tl.static_range(TOKENS):
            k = first + i + t
            done = i + t - (W - 1)
            complete = (done >= 0) & (done < own)
            window = window + (xs[t],)
            dx = zero
            if dy_ptr is not None:
                now = slope(dys[t], bias, taps, window, W, False, SILU, ASM)
                sums = accumulate(sums, tl.where(i + t < own, now, 0.0), window, W, False)
                g = g + (now,)
                for j in tl.static_range(W):
                    dx = tl.fma(taps[j], g[W - 1 - j], dx)
                g = g[1:]
            if dy_b_ptr is not None:
                now = slope(dys_b[t], bias_b, taps_b, window, W, True, SILU, ASM)
                sums_b = accumulate(sums_b, tl.where(complete, now, 0.0), window, W, True)
                g_b = g_b + (now,)
                for j in tl.static_range(W):
                    dx = tl.fma(taps_b[j], g_b[j], dx)
                g_b = g_b[1:]
            if dfinal_ptr is not None:
                after = mask & active & (k >= length) & (k < length + W - 1)
                dx += tl.load(dfinal + (k - length).to(tl.int64) * d, mask=after, other=0.0)
            tl.store(at(dx_walk, t - (W - 1), k - (W - 1), length, frames, REVERSE), dx, mask=mask & complete)
            if initial_ptr is not None:
                before = mask & active & (first == 0) & (k < W - 1)
                tl.store(dinitial + k.to(tl.int64) * d, dx, mask=before)
            window = window[1:]
        x_walk, dx_walk = advance(x_walk, TOKENS, frames), advance(dx_walk, TOKENS, frames)
        if dy_ptr is not None:
            dy_walk = advance(dy_walk, TOKENS, frames)
        if dy_b_ptr is not None:
            dy_b_walk = advance(dy_b_walk, TOKENS, frames)

    # [groups, direction, W + 1, d]
    offset = (pid // blocks).to(tl.int64) * (W + 1)
    if weight_b_ptr is not None:
        offset *= 2
        write(partial_ptr + channel, sums_b, offset + W + 1, channel < d, d, W)
    write(partial_ptr + channel, sums, offset, channel < d, d, W)


# Grid (rows * cdiv(d, BLOCK_D),): one program adds BLOCK_D channels of one row of all groups, always in the same order.
# Traffic: partial read once.
@triton.jit(do_not_specialize=["groups"])
def _conv1d_sum_kernel(
    partial_ptr,  # (groups, rows, d), rows = W + 1 a direction: taps, bias
    dweight_ptr,
    dbias_ptr,
    dweight_b_ptr,
    dbias_b_ptr,
    groups,
    d,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0)
    row = pid % ROWS
    channel = (pid // ROWS) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = channel < d
    group = tl.arange(0, BLOCK_G)[:, None]
    acc = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for i in range(0, groups, BLOCK_G):
        here = (i + group).to(tl.int64)
        acc += tl.load(partial_ptr + (here * ROWS + row) * d + channel[None, :], mask=(here < groups) & mask, other=0.0)
    total = tl.sum(acc, 0)
    if row < W:
        tl.store(dweight_ptr + channel.to(tl.int64) * W + row, total, mask=mask)
    elif dbias_ptr is not None and row == W:
        tl.store(dbias_ptr + channel, total, mask=mask)
    if dweight_b_ptr is not None:
        row -= W + 1
        if row >= 0 and row < W:
            tl.store(dweight_b_ptr + channel.to(tl.int64) * W + row, total, mask=mask)
        elif dbias_b_ptr is not None and row == W:
            tl.store(dbias_b_ptr + channel, total, mask=mask)


def _strides(dy):
    return (0, 0, 0) if dy is None else strides(dy)


def _launch(x, dx, direction, direction_b, gradients, gradients_b, states, cu_seqlens, silu, reverse, frames):
    weight, _, dy = direction
    weight_b, _, dy_b = direction_b
    width, both = weight.shape[1], weight_b is not None
    tokens, _, walkers = LAUNCH[both]
    sizes, groups, block = cut(x, cu_seqlens, width, width - 1, *LAUNCH[both])
    _, l, d = x.shape
    if d == 0:
        return
    rows = (width + 1) * (2 if both else 1)
    partial = weight.new_empty(groups, rows, d)
    with on_device(x):
        if groups:
            _conv1d_bwd_kernel[(groups * triton.cdiv(d, block),)](
                x,
                dx,
                *direction,
                *direction_b,
                *states,
                partial,
                cu_seqlens,
                *strides(x),
                dx.stride(1),
                *_strides(dy),
                *_strides(dy_b),
                l,
                d,
                *sizes,
                frames or None,
                W=width,
                SILU=silu,
                REVERSE=reverse,
                ROWS=walkers,
                BLOCK_D=block,
                EVEN_D=d % block == 0,
                TOKENS=tokens,
                ASM=ASM,
                num_warps=walkers,
            )
        _conv1d_sum_kernel[(rows * triton.cdiv(d, BLOCK_CHANNELS),)](
            partial,
            *gradients,
            *gradients_b,
            groups,
            d,
            W=width,
            ROWS=rows,
            BLOCK_G=BLOCK_GROUPS,
            BLOCK_D=BLOCK_CHANNELS,
            num_warps=4,
        )


def _gradients(weight, bias):
    return weight.new_empty(weight.shape), None if bias is None else weight.new_empty(bias.shape)


def _or_empty(gradient, weight):
    return weight.new_empty(0) if gradient is None else gradient


def causal_conv1d_bwd(dy, dfinal_state, x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, dx=None):
    weight, bias, initial_state, dfinal_state, cu_seqlens = contiguous(
        weight, bias, initial_state, dfinal_state, cu_seqlens
    )
    dx = x.new_empty(x.shape) if dx is None else dx
    gradients = _gradients(weight, bias)
    dstate = None if initial_state is None else weight.new_empty(initial_state.shape)
    states = (initial_state, dstate, dfinal_state)
    none = (None, None, None)
    _launch(x, dx, (weight, bias, dy), none, gradients, none[:2], states, cu_seqlens, silu, reverse, frames)
    return dx, gradients[0], _or_empty(gradients[1], weight), _or_empty(dstate, weight)


def bidirectional_conv1d_bwd(dy, dy_b, x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames, dx=None):
    weight, bias, weight_b, bias_b, cu_seqlens = contiguous(weight, bias, weight_b, bias_b, cu_seqlens)
    dx = x.new_empty(x.shape) if dx is None else dx
    gradients, gradients_b = _gradients(weight, bias), _gradients(weight_b, bias_b)
    _launch(
        x,
        dx,
        (weight, bias, dy),
        (weight_b, bias_b, dy_b),
        gradients,
        gradients_b,
        (None, None, None),
        cu_seqlens,
        silu,
        False,
        frames,
    )
    dbias, dbias_b = _or_empty(gradients[1], weight), _or_empty(gradients_b[1], weight_b)
    return dx, gradients[0], dbias, gradients_b[0], dbias_b


def aot_cases() -> list[AotCase]:
    cases = []
    for name, both, slow, changes in aot_options():
        (x, weight, bias, state, cu_seqlens), reverse, frames = aot_tensors(**changes)
        dy = meta(*x.shape, dtype=x.dtype)
        if both:
            args = (dy, dy, x, weight, bias, weight, bias, cu_seqlens, True, frames)
            cases.append(AotCase(name, bidirectional_conv1d_bwd, args, slow))
        else:
            args = (dy, state, x, weight, bias, state, cu_seqlens, True, reverse, frames)
            cases.append(AotCase(name, causal_conv1d_bwd, args, slow))
    return cases
