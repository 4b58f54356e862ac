"""Triton kernel, forward: one direction with its states, or both directions from one reading of x.

Letters: b sequences, l tokens, d channels, w taps; k counts steps of the walk, not tokens in memory.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .._triton import ASM, AotCase, meta, on_device
from .._triton_math import sigmoid

# both directions? -> tokens that a walker loads at once, channels of a lane (at most 16 bytes), walkers of a program.
# bf16, w = 4: 128 and 96 registers a thread, no spills.
LAUNCH = {False: (8, 8, 1), True: (8, 4, 1)}
CHUNKS = (
    64,
    32,
    16,
)  # most steps of a walker: the first that makes WALKERS of them; each reads w - 1 tokens of the next
WALKERS = 4096  # 31 on each of 132 multiprocessors
BEGINNING = 4  # instructions before a walker's first step, in steps
WIDE = 4  # more taps than that need more registers: half the channels a lane


@triton.jit
def locate(walker, cu_ptr, l, sequences, chunk, chunks, search):
    """What each walker does: (has it work, its sequence, that one's row, first token, length; the walker's first step).

    Packed, the walkers of sequence s begin at cu[s] // chunk + s: at least one a sequence, and enough for its length.
    """
    if cu_ptr is not None:
        low = tl.zeros_like(walker)
        high = low + sequences
        for _ in range(search):
            middle = (low + high) // 2
            right = tl.load(cu_ptr + middle).to(tl.int32) // chunk + middle <= walker
            low = tl.where(right, middle, low)
            high = tl.where(right, high, middle)
        sequence = low
        row = tl.zeros_like(walker)
        start = tl.load(cu_ptr + sequence).to(tl.int32)
        length = tl.load(cu_ptr + sequence + 1).to(tl.int32) - start
        first = (walker - start // chunk - sequence) * chunk
    else:
        sequence = walker // chunks
        row = sequence
        start = tl.zeros_like(walker)
        length = start + l
        first = (walker % chunks) * chunk
    active = (sequence < sequences) & ((first < length) | (first == 0))
    return active, sequence, row, start, tl.where(active, length, 0), tl.where(active, first, 0)


@triton.jit
def rows(ptr, row, channel, stride, stride_d):
    return ptr + row.to(tl.int64) * stride + (channel.to(tl.int64) * stride_d)[None, :]


@triton.jit
def token_at(k, length, frames, REVERSE: tl.constexpr):
    """The token that step k visits, counted from the sequence's first."""
    if REVERSE:
        k = length - 1 - k
    if frames is not None:
        k = (k % frames) * (length // frames) + k // frames
    return k.to(tl.int64)


@triton.jit
def begin(ptr, row, start, first, length, channel, stride_b, stride_l, stride_d, frames, REVERSE: tl.constexpr):
    """A walk: (pointers to the token of step `first`, the way from a step to the next).

    In time order that way is no constant: (pointers to the sequence's token 0, the way from a token to the next).
    """
    tokens = rows(ptr, row, channel, stride_b, stride_d) + start.to(tl.int64) * stride_l
    way = tl.cast(stride_l, tl.int64)
    if frames is None:
        tokens += token_at(first, length, frames, REVERSE) * way
        if REVERSE:
            way = -way
    return tokens, way


@triton.jit
def at(walk, j, k, length, frames, REVERSE: tl.constexpr):
    """Pointers to the token of step k, which is j steps further than the walk."""
    if frames is None:
        return walk[0] + j * walk[1]
    else:
        return walk[0] + token_at(k, length, frames, REVERSE) * walk[1]


@triton.jit
def advance(walk, j, frames):
    if frames is None:
        return walk[0] + j * walk[1], walk[1]
    else:
        return walk


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_before(walk, j, k, length, frames, mask, state, d, REVERSE: tl.constexpr, W: tl.constexpr):
    """x of step k in fp32; steps -(W - 1) to -1 are the rows of `state`, or zero without one."""
    x = load(at(walk, j, k, length, frames, REVERSE), mask & (k >= 0))
    if state is not None:
        before = tl.load(state + (k + W - 1).to(tl.int64) * d, mask=mask & (k < 0), other=0.0)
        x = tl.where(k < 0, before, x)
    return x


@triton.jit
def column_mask(channel, d, EVEN_D: tl.constexpr):
    if EVEN_D:
        return tl.full((1, 1), 1, tl.int1)
    else:
        return (channel < d)[None, :]


@triton.jit
def parameters(weight_ptr, bias_ptr, channel, d, W: tl.constexpr):
    """The W taps, oldest first, and the bias, each [1, BLOCK_D].  weight is (d, W), read in whole rows."""
    column = tl.arange(0, triton.next_power_of_2(W))[None, :]
    mask = channel < d
    tile = tl.load(weight_ptr + channel[:, None] * W + column, mask=mask[:, None] & (column < W), other=0.0)
    taps = ()
    for j in tl.static_range(W):
        taps = taps + (tl.sum(tl.where(column == j, tile, 0.0), 1)[None, :],)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=mask, other=0.0)[None, :]
    else:
        bias = tl.zeros_like(taps[0])
    return taps, bias


@triton.jit
def convolve(bias, taps, window, W: tl.constexpr, MIRROR: tl.constexpr):
    """bias + the taps, from the oldest token of the walk to the newest.  MIRROR: the window lies backwards."""
    acc = bias
    for j in tl.static_range(W):
        acc = tl.fma(taps[j], window[W - 1 - j if MIRROR else j], acc)
    return acc


# Grid (cdiv(walkers, ROWS) * cdiv(d, BLOCK_D),), channel blocks fastest.  A walker is one warp: BLOCK_D channels of at
#   most `chunk` steps of one sequence, some adjacent channels a lane, so that no lane needs another's numbers.
# Registers: the taps and the last W - 1 tokens in fp32; TOKENS tokens are loaded before the first of them is used.
# Traffic: x read once (W - 1 tokens more a walker, from L2), y written once: 2 * b*l*d elements, both directions 3.
# Both: at step k the window x[k-W+1 .. k] makes y[k] and, mirrored, y_b[k-W+1]; the walk goes W - 1 steps further.
# Numerics: fp32, bias first, then the taps from the oldest: the bits of y depend on nothing but the row.
@triton.jit(do_not_specialize=["l", "sequences", "chunk", "chunks", "search", "frames"])
def _conv1d_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    weight_b_ptr,  # None: one direction
    bias_b_ptr,
    y_b_ptr,
    initial_ptr,
    final_ptr,
    cu_ptr,
    stride_x_b,
    stride_x_l,
    stride_x_d,
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
    y_walk = begin(y_ptr, row, start, first, length, channel, l.to(tl.int64) * d, d, 1, frames, REVERSE)
    taps, bias = parameters(weight_ptr, bias_ptr, channel, d, W)
    steps = tl.max(own)
    if weight_b_ptr is not None:
        taps_b, bias_b = parameters(weight_b_ptr, bias_b_ptr, channel, d, W)
        y_b_walk = begin(y_b_ptr, row, start, first, length, channel, l.to(tl.int64) * d, d, 1, frames, REVERSE)
        steps += W - 1
    initial = None
    if initial_ptr is not None:
        initial = rows(initial_ptr, sequence, channel, (W - 1) * d, 1)

    window = ()  # [ROWS, BLOCK_D] each
    for j in tl.static_range(-W + 1, 0):
        x = load_before(x_walk, j, first + j, length, frames, mask & active, initial, d, REVERSE, W)
        window = window + (x,)
    if final_ptr is not None:
        final = rows(final_ptr, sequence, channel, (W - 1) * d, 1)
        last = mask & active & (own == rest)
        for j in tl.static_range(W - 1):
            k = length - (W - 1) + j
            x = load_before(x_walk, k - first, k, length, frames, last, initial, d, REVERSE, W)
            tl.store(final + j * d, x, mask=last)

    for i in range(0, steps, TOKENS):
        coming = ()
        for t in tl.static_range(TOKENS):
            pointers = at(x_walk, t, first + i + t, length, frames, REVERSE)
            coming = coming + (load(pointers, mask & (i + t < rest)),)
        for t in tl.static_range(TOKENS):
            window = window + (coming[t],)
            y = convolve(bias, taps, window, W, False)
            if SILU:
                y *= sigmoid(y, ASM)
            tl.store(at(y_walk, t, first + i + t, length, frames, REVERSE), y, mask=mask & (i + t < own))
            if weight_b_ptr is not None:
                done = i + t - (W - 1)
                y = convolve(bias_b, taps_b, window, W, True)
                if SILU:
                    y *= sigmoid(y, ASM)
                y_b = at(y_b_walk, t - (W - 1), first + done, length, frames, REVERSE)
                tl.store(y_b, y, mask=mask & (done >= 0) & (done < own))
            window = window[1:]
        x_walk, y_walk = advance(x_walk, TOKENS, frames), advance(y_walk, TOKENS, frames)
        if weight_b_ptr is not None:
            y_b_walk = advance(y_b_walk, TOKENS, frames)


@functools.lru_cache(1024)
def split(b, l, d, packed, itemsize, halo, tokens, lane, walkers):
    """How a call is cut: the kernel's (sequences, chunk, chunks, search), programs a block of channels, that block.

    packed: the sequences in one row of l tokens, or None.  A walker goes chunk + halo steps, a multiple of `tokens`;
    of all such chunks the one with the least work.
    """
    block = 32 * min(lane, 16 // itemsize)
    if block > 128 and -d % block != -d % 128:
        block = 128  # fewer idle lanes
    for longest in CHUNKS:
        if b * triton.cdiv(l, longest) * triton.cdiv(d, block) >= WALKERS:
            break
    ends = [max(tokens, longest // tokens * tokens) - i * tokens for i in range(longest // tokens // 2 + 1)]
    chunks = [end - halo for end in ends if end > halo] or [tokens * triton.cdiv(halo + 1, tokens) - halo]
    chunk = min(chunks, key=lambda chunk: triton.cdiv(l, chunk) * (chunk + halo + BEGINNING))
    if packed is None:
        chunks = max(1, triton.cdiv(l, chunk))
        return (b, chunk, chunks, 0), triton.cdiv(b * chunks, walkers), block
    programs = triton.cdiv(l // chunk + packed, walkers) if packed else 0
    return (packed, chunk, 0, packed.bit_length()), programs, block


def strides(x):
    """The strides of (b, l, d); one that is never used becomes 0, so that it does not compile the kernel anew."""
    b, l, d = x.stride()
    return b if x.shape[0] > 1 else 0, l if x.shape[1] > 1 else 0, d


def contiguous(*tensors):
    """Parameters, states and cu_seqlens: small, and mostly so already."""
    return [t if t is None else t.contiguous() for t in tensors]


def cut(x, cu_seqlens, width, halo, tokens, lane, walkers):
    if width > WIDE:
        lane //= 2
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return split(*x.shape, packed, x.element_size(), halo, tokens, lane, walkers)


def _launch(x, direction, direction_b, states, cu_seqlens, silu, reverse, frames):
    _, l, d = x.shape
    width, both = direction[0].shape[1], direction_b[0] is not None
    tokens, _, walkers = LAUNCH[both]
    sizes, programs, block = cut(x, cu_seqlens, width, width - 1 if both else 0, *LAUNCH[both])
    if programs == 0 or d == 0:
        return
    with on_device(x):
        _conv1d_fwd_kernel[(programs * triton.cdiv(d, block),)](
            x,
            *direction,
            *direction_b,
            *states,
            cu_seqlens,
            *strides(x),
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


def causal_conv1d_fwd(x, weight, bias, initial_state, cu_seqlens, silu, reverse, frames, return_final_state):
    weight, bias, initial_state, cu_seqlens = contiguous(weight, bias, initial_state, cu_seqlens)
    y = x.new_empty(x.shape)
    if return_final_state:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        final_state = weight.new_empty(sequences, weight.shape[1] - 1, x.shape[2])
    else:
        final_state = None
    states = (initial_state, final_state)
    _launch(x, (weight, bias, y), (None, None, None), states, cu_seqlens, silu, reverse, frames)
    return y, weight.new_empty(0) if final_state is None else final_state


def bidirectional_conv1d_fwd(x, weight, bias, weight_b, bias_b, cu_seqlens, silu, frames):
    weight, bias, weight_b, bias_b, cu_seqlens = contiguous(weight, bias, weight_b, bias_b, cu_seqlens)
    y, y_b = x.new_empty(x.shape), x.new_empty(x.shape)
    _launch(x, (weight, bias, y), (weight_b, bias_b, y_b), (None, None), cu_seqlens, silu, False, frames)
    return y, y_b


def aot_options() -> list[tuple[str, bool, bool, dict]]:
    """name, both directions?, slow?, changes to a causal bf16 call of the small model's width."""
    return [
        ("bf16", False, False, {}),
        ("both-bf16", True, False, {}),
        ("fp32", False, False, {"dtype": torch.float32}),
        ("both-fp32", True, True, {"dtype": torch.float32}),
        ("fp16", False, True, {"dtype": torch.float16}),
        ("states-bf16", False, False, {"states": True}),
        ("reverse-bf16", False, True, {"reverse": True}),
        ("packed-bf16", False, True, {"packed": 5, "b": 1}),
        ("both-packed-bf16", True, True, {"packed": 5, "b": 1}),
        ("time-bf16", False, True, {"frames": 7}),
        ("both-time-bf16", True, True, {"frames": 7}),
        ("uneven-bf16", False, True, {"d": 200}),
        ("both-uneven-bf16", True, True, {"d": 200}),
        ("w3-bf16", False, True, {"w": 3}),
        ("w8-bf16", False, True, {"w": 8}),
        ("both-w8-fp32", True, True, {"w": 8, "dtype": torch.float32}),
    ]


def aot_tensors(b=16, l=196, d=768, w=4, dtype=torch.bfloat16, states=False, reverse=False, packed=0, frames=0):
    """x as the first half of in_proj's output, weight, bias, initial_state, cu_seqlens; reverse, frames."""
    x = meta(b, l, 2 * d, dtype=dtype)[..., :d]
    state = meta(b, w - 1, d) if states else None
    cu_seqlens = meta(packed + 1, dtype=torch.int32) if packed else None
    return (x, meta(d, w), meta(d), state, cu_seqlens), reverse, frames


def aot_cases() -> list[AotCase]:
    cases = []
    for name, both, slow, changes in aot_options():
        (x, weight, bias, state, cu_seqlens), reverse, frames = aot_tensors(**changes)
        if both:
            args = (x, weight, bias, weight, bias, cu_seqlens, True, frames)
            cases.append(AotCase(name, bidirectional_conv1d_fwd, args, slow))
        else:
            args = (x, weight, bias, state, cu_seqlens, True, reverse, frames, state is not None)
            cases.append(AotCase(name, causal_conv1d_fwd, args, slow))
    return cases
