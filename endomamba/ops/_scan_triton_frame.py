"""The scan of few short sequences in Triton, one frame of a stream: one state a lane.

Letters: b sequences, l tokens, d channels, n = 16 states.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._scan_triton_step import _words2
from ._triton import ASM
from ._triton_math import LOG2E, exp2, sigmoid, softplus
from ._triton_pdl import let_next_begin, wait_for_previous
from ._triton_scan import neighbour
from ._triton_shared import get1, get2, program_sync, put1, put2, reserve, shared_asm, warp_sync

STATES = 16
SHARED_BYTES = 47 * 1024  # of the 48 KB that need no asking; Triton wants a few bytes itself


@triton.jit
def _halve(p, lane, DISTANCE: tl.constexpr, ASM: tl.constexpr):
    # 2 DISTANCE values a lane -> DISTANCE: each pair of lanes shares them and adds
    upper = (lane & DISTANCE) != 0
    out = ()
    for i in tl.static_range(DISTANCE):
        kept = tl.where(upper, p[i + DISTANCE], p[i])
        given = tl.where(upper, p[i], p[i + DISTANCE])
        out = out + (kept + neighbour(given, lane, DISTANCE, ASM),)
    return out


@triton.jit
def _sums(p, lane, ASM: tl.constexpr):
    # 16 values a lane of 16 lanes -> lane i has the sum of all their i-th values
    p = _halve(p, lane, 8, ASM)
    p = _halve(p, lane, 4, ASM)
    p = _halve(p, lane, 2, ASM)
    return _halve(p, lane, 1, ASM)[0]


@triton.jit
def _get_word(p):
    return tl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [p], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _put_words(p, a, b, c, d):
    tl.inline_asm_elementwise(
        "{st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;}",
        "=r,r,r,r,r,r", [p, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _half_of(word, UPPER: tl.constexpr, TYPE: tl.constexpr):
    # one of the two numbers of 16 bits in a word, as fp32
    if tl.bfloat16 == TYPE:
        if UPPER:
            return (word & -65536).to(tl.float32, bitcast=True)
        else:
            return (word << 16).to(tl.float32, bitcast=True)
    elif UPPER:
        return (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _place(k, l, back):
    # where the k-th token of a walk lies; behind the end: the last one, which the caller makes the identity
    t = tl.minimum(k, l - 1)
    return tl.where(back, l - 1 - t, t).to(tl.int64)


@triton.jit
def _own(BOTH: tl.constexpr, second, p, q, offset):
    # a lane's place in what its direction has
    if BOTH:
        return tl.where(second, q + offset, p + offset)
    else:
        return p + offset


@triton.jit
def _time_step(x_p, dt_p, bias, inside, SOFTPLUS: tl.constexpr, ASM: tl.constexpr):
    # -> dt, x of a token; behind the end both 0, the identity
    x = tl.load(x_p).to(tl.float32)
    dt = tl.load(dt_p).to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt, ASM)
    return tl.where(inside, dt, 0.0), tl.where(inside, x, 0.0)


@triton.jit
def _gated(y, z, GATE: tl.constexpr, ASM: tl.constexpr):
    if GATE:
        z = z.to(tl.float32)
        y *= z * sigmoid(z, ASM)
    return y


@triton.jit
def _put_y(
    y, k, dx, park_p, real, k0, l, back, lane, T: tl.constexpr, BD: tl.constexpr, DIM: tl.constexpr, ASM: tl.constexpr
):
    # the y of a lane's token in the place of its dt, which all lanes have read; before the first block: nowhere
    if ASM:
        warp_sync(lane)
        put1(dx + tl.maximum(k, 0) * (BD * 8), y)
    else:
        t = _place(k0 + tl.maximum(k, 0), l, back)
        tl.store(park_p + t * DIM, y, mask=real & (k >= 0) & (k < T) & (k0 + k < l))


@triton.jit
def _block(
    dx, row, x_p, dt_p, B_p, C_p, bias, t0, k0, l, back, BD: tl.constexpr, SX: tl.constexpr, SDT: tl.constexpr,
    SB: tl.constexpr, SC: tl.constexpr, SOFTPLUS: tl.constexpr, PACKED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # dt, dt x, B and C of a lane for the 16 tokens from t0 of this round; PACKED: B is a word with both
    ds, us, Bs, Cs = (), (), (), ()
    for i in tl.static_range(16):
        t = _place(k0 + t0 + i, l, back)
        if PACKED:
            Bs = Bs + (_get_word(row + (t0 + i) * 64),)
        else:
            Bs = Bs + (tl.load(B_p + t * SB),)
            Cs = Cs + (tl.load(C_p + t * SC),)
        if ASM:
            dt, u = get2(dx + (t0 + i) * (BD * 8))
        else:
            dt, x = _time_step(x_p + t * SX, dt_p + t * SDT, bias, k0 + t0 + i < l, SOFTPLUS, ASM)
            u = dt * x
        ds = ds + (dt,)
        us = us + (u,)
    return ds, us, Bs, Cs


@triton.jit(do_not_specialize=["l", "rounds", "sx_b", "sdt_b", "sB_b", "sC_b", "sz_b"])
def _scan_frame_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, x_b_ptr, dt_b_ptr, A_b_ptr, B_b_ptr, C_b_ptr, D_b_ptr,
    bias_b_ptr, z_ptr, h0_ptr, hl_ptr, tail_ptr, conv_ptr, y_ptr, park_ptr,
    scale, l, rounds, sx_b, sdt_b, sB_b, sC_b, sz_b,
    DIM: tl.constexpr, SX: tl.constexpr, SDT: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, SZ: tl.constexpr,
    BOTH: tl.constexpr, REVERSE: tl.constexpr, SOFTPLUS: tl.constexpr, TAPS: tl.constexpr, T: tl.constexpr,
    PACKED: tl.constexpr, PARK: tl.constexpr, W: tl.constexpr, SHARED: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # Grid (b * cdiv(d, BD),): a program owns BD = 2 W channels of one sequence, or W in both directions (BOTH).  A lane
    #   has one state of one channel: lanes are [direction][channel][16 states], and walk all tokens, T of them a round.
    # A round: (1) all lanes together bring what its tokens need to shared memory: dt (with softplus) and x of each
    #   channel, and the rows of B and C, of half precision as one word a state; (2) every lane walks, 16 tokens at a
    #   time, whose 16 products with C are summed over the 16 lanes so that each lane has the y of one token, which
    #   takes the place of that token's dt; (3) all lanes together put the gate on and store y.
    # BOTH: (3) adds the two directions; PARK: by way of L2, where not all tokens fit into a round.
    # Traffic: x, dt, z, y once; B, C once a program, from L2; h0 read, hl written, which may be one tensor.
    # Numerics: fp32, strictly left to right, exponentials in units of 2; the sum over states is a tree.  conv: gets the
    #   last TAPS tokens, from `tail` and, of a frame shorter than that, from itself.
    # Bound: one exponential and about 15 instructions a state and token; few warps: the latency of (1).
    SIDES: tl.constexpr = 2 if BOTH else 1
    LANES: tl.constexpr = 32 * W
    BD: tl.constexpr = 2 * W // SIDES
    EVEN: tl.constexpr = DIM % BD == 0
    GATE: tl.constexpr = z_ptr is not None
    ROW: tl.constexpr = B_ptr.dtype.element_ty
    blocks: tl.constexpr = (DIM + BD - 1) // BD
    XD: tl.constexpr = SIDES * T * BD * 8  # bytes of dt and dt x, then those of B and C, then D x of a second direction
    SKIP: tl.constexpr = XD + (SIDES * T * 64 if PACKED else 0)
    pid = tl.program_id(0)
    seq = (pid // blocks).to(tl.int64)
    lane = tl.arange(0, LANES)
    state = lane % 16
    slot = lane // 16  # direction and channel
    second = slot // BD == 1
    back = second if BOTH else (slot < 0 if not REVERSE else slot >= 0)
    own = pid % blocks * BD + slot % BD
    real = own < DIM
    offs = own if EVEN else tl.minimum(own, DIM - 1)
    zero = lane * 0.0

    A = tl.load(_own(BOTH, second, A_ptr, A_b_ptr, offs * 16 + state)) * LOG2E
    # the part of each lane in (1) and (3): a channel of a token, of each direction in turn
    mine = lane % BD
    token = lane // BD
    PER: tl.constexpr = LANES // BD
    column = pid % blocks * BD + mine
    stores = column < DIM
    if not EVEN:
        column = tl.minimum(column, DIM - 1)
    D = tl.load(D_ptr + column) if D_ptr is not None else zero
    D_b = tl.load(D_b_ptr + column) if D_b_ptr is not None else zero
    if ASM:
        shared = reserve(lane * 0, SHARED)
    else:
        shared = lane
    wait_for_previous(PDL)
    h = tl.load(h0_ptr + (seq * DIM + offs) * 16 + state) if h0_ptr is not None else zero

    for turn in range(0, rounds):
        k0 = turn * T
        skips, zs = (), ()
        if ASM:
            for side in tl.static_range(SIDES):
                from_x = (x_b_ptr if side == 1 else x_ptr) + seq * sx_b + column
                from_dt = (dt_b_ptr if side == 1 else dt_ptr) + seq * sdt_b + column
                fed = zero
                if bias_ptr is not None:
                    fed = tl.load((bias_b_ptr if side == 1 else bias_ptr) + column)
                for i in tl.static_range((T + PER - 1) // PER):
                    k = tl.minimum(token + i * PER, T - 1)
                    t = _place(k0 + k, l, side == 1 or (REVERSE and not BOTH))
                    dt, x = _time_step(from_x + t * SX, from_dt + t * SDT, fed, k0 + k < l, SOFTPLUS, ASM)
                    put2(shared + ((side * T + k) * BD + mine) * 8, dt, dt * x)
                    if not PARK:
                        if side == 1:  # its tokens are in another order: to that of the first
                            there = tl.where(k < l, l - 1 - k, T)
                            put1(shared + (SKIP + (there * BD + mine) * 4), D_b * x)
                        else:
                            skips = skips + (D * x,)
                            zs = zs + (tl.load(z_ptr + seq * sz_b + t * SZ + column) if GATE else x,)
                if PACKED:
                    quad = lane % 4 * 4
                    from_B = (B_b_ptr if side == 1 else B_ptr) + seq * sB_b + quad
                    from_C = (C_b_ptr if side == 1 else C_ptr) + seq * sC_b + quad
                    for i in tl.static_range((T * 4 + LANES - 1) // LANES):
                        k = tl.minimum(lane // 4 + i * (LANES // 4), T - 1)
                        t = _place(k0 + k, l, side == 1 or (REVERSE and not BOTH))
                        b0, b1 = _words2((from_B + t * SB).to(tl.pointer_type(tl.int32)))
                        c0, c1 = _words2((from_C + t * SC).to(tl.pointer_type(tl.int32)))
                        _put_words(
                            shared + (XD + (side * T + k) * 64 + quad * 4), (b0 & 65535) | (c0 << 16),
                            ((b0 >> 16) & 65535) | (c0 & -65536), (b1 & 65535) | (c1 << 16),
                            ((b1 >> 16) & 65535) | (c1 & -65536),
                        )  # fmt: skip
            program_sync(lane)

        dx = shared + slot * 8 + second.to(tl.int32) * ((T - 1) * BD * 8)
        row = shared + XD + state * 4 + second.to(tl.int32) * (T * 64)
        B_p = _own(BOTH, second, B_ptr, B_b_ptr, seq * sB_b + state)
        C_p = _own(BOTH, second, C_ptr, C_b_ptr, seq * sC_b + state)
        x_p = _own(BOTH, second, x_ptr, x_b_ptr, seq * sx_b + offs)
        dt_p = _own(BOTH, second, dt_ptr, dt_b_ptr, seq * sdt_b + offs)
        bias = tl.load(_own(BOTH, second, bias_ptr, bias_b_ptr, offs)) if bias_ptr is not None else zero
        park_p = park_ptr + (seq * SIDES + second.to(tl.int64)) * l * DIM + offs if PARK else x_p
        count = tl.minimum(T, l - k0)
        q = _block(dx, row, x_p, dt_p, B_p, C_p, bias, 0, k0, l, back, BD, SX, SDT, SB, SC, SOFTPLUS, PACKED, ASM)
        p = ()
        for _ in tl.static_range(16):
            p = p + (zero,)
        # a block's inputs are on their way, and the sums of the one before, while a block is walked
        for t0 in range(0, (count + 15) // 16 * 16, 16):
            r = q
            q = _block(
                dx, row, x_p, dt_p, B_p, C_p, bias, tl.minimum(t0 + 16, T - 16), k0, l, back,
                BD, SX, SDT, SB, SC, SOFTPLUS, PACKED, ASM,
            )  # fmt: skip
            new = ()
            for i in tl.static_range(16):
                B = _half_of(r[2][i], False, ROW) if PACKED else r[2][i].to(tl.float32)
                C = _half_of(r[2][i], True, ROW) if PACKED else r[3][i].to(tl.float32)
                h = tl.fma(exp2(A * r[0][i], ASM), h, B * r[1][i])
                new = new + (h * C,)
            _put_y(_sums(p, lane, ASM), t0 - 16 + state, dx, park_p, real, k0, l, back, lane, T, BD, DIM, ASM)
            p = new
        _put_y(
            _sums(p, lane, ASM), (count + 15) // 16 * 16 - 16 + state, dx, park_p, real, k0, l, back, lane,
            T, BD, DIM, ASM,
        )  # fmt: skip

        let_next_begin(PDL)
        if ASM:
            program_sync(lane)
            for i in tl.static_range((T + PER - 1) // PER):
                k = token + i * PER
                ok = stores & (k < T) & (k0 + k < l)
                k = tl.minimum(k, T - 1)
                t = _place(k0 + k, l, REVERSE and not BOTH)
                if PARK:
                    for side in tl.static_range(SIDES):
                        t = _place(k0 + k, l, side == 1 or (REVERSE and not BOTH))
                        y = get1(shared + ((side * T + k) * BD + mine) * 8)
                        tl.store(park_ptr + ((seq * SIDES + side) * l + t) * DIM + column, y, mask=ok)
                else:
                    y = get1(shared + (k * BD + mine) * 8) + skips[i]
                    if BOTH:
                        y += get1(shared + ((T + tl.maximum(l - 1 - k, 0)) * BD + mine) * 8)
                        y += get1(shared + (SKIP + (k * BD + mine) * 4))
                    y = _gated(y * scale, zs[i], GATE, ASM)
                    tl.store(y_ptr + (seq * l + t) * DIM + column, y.to(y_ptr.dtype.element_ty), mask=ok)
            program_sync(lane)

    if PARK:
        if not ASM:
            tl.debug_barrier()
        for i in range(0, tl.cdiv(l, PER)):
            ok = stores & (token + i * PER < l)
            t = tl.minimum(token + i * PER, l - 1).to(tl.int64)
            at = park_ptr + (seq * SIDES * l + t) * DIM + column
            y = tl.load(at)
            if BOTH:
                y += tl.load(at + l * DIM)
            if D_ptr is not None:
                y = tl.fma(D, tl.load(x_ptr + seq * sx_b + t * SX + column).to(tl.float32), y)
                if BOTH:
                    y = tl.fma(D_b, tl.load(x_b_ptr + seq * sx_b + t * SX + column).to(tl.float32), y)
            z = tl.load(z_ptr + seq * sz_b + t * SZ + column) if GATE else y
            y = _gated(y * scale, z, GATE, ASM)
            tl.store(y_ptr + (seq * l + t) * DIM + column, y.to(y_ptr.dtype.element_ty), mask=ok)
    if hl_ptr is not None:
        tl.store(hl_ptr + (seq * DIM + offs) * 16 + state, h, mask=real)
    if conv_ptr is not None:
        ours = real & (state == 0)
        for j in tl.static_range(TAPS):
            place = (seq * TAPS + j) * DIM + offs
            kept = tl.load(conv_ptr + place + l * DIM, mask=ours & (j + l < TAPS), other=0.0)
            fresh = tl.load(tail_ptr + place, mask=ours & (j + l >= TAPS), other=0.0)
            tl.store(conv_ptr + place, tl.where(j + l < TAPS, kept, fresh), mask=ours)


class FrameSide(NamedTuple):
    """x, dt (b, l, d)  A (d, 16)  B, C (b, l, 16)  D, dt_bias (d,) or None; channels and states next to each other."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    dt_bias: Tensor | None


def _bytes_a_token(warps: int, both: bool, packed: bool) -> int:
    sides = 2 if both else 1
    channels = 2 * warps // sides
    return sides * (channels * 8 + (64 if packed else 0)) + (channels * 4 if both else 0)


def frame_scan(
    side: FrameSide,
    other: FrameSide | None,
    z: Tensor | None,
    y: Tensor,
    initial_state: Tensor | None,
    final_state: Tensor | None,
    *,
    softplus: bool,
    warps: int,
    scale: float = 1.0,
    reverse: bool = False,
    ahead: bool = False,
    tail: Tensor | None = None,
    conv_state: Tensor | None = None,
) -> None:
    """Writes y (b, l, d), contiguous, and the final state (b, d, 16), which may be the initial one.

    other: a second direction, of the same strides, that walks from the last token to the first.  ahead: see
    `_triton_pdl`.  tail (b, taps, d): the last tokens before the conv, for conv_state.
    """
    b, l, d = y.shape
    both, x = other is not None, side.x
    packed = ASM and side.B.dtype != torch.float32
    each = _bytes_a_token(warps, both, packed)
    T = min(triton.cdiv(l, 16) * 16, SHARED_BYTES // each // 16 * 16)  # tokens of a round
    rounds = triton.cdiv(l, T)
    parked = not ASM or (both and rounds > 1)
    park = torch.empty(b, 2 if both else 1, l, d, dtype=torch.float32, device=x.device) if parked else None
    shared = T * each + (4 * warps if both else 0)  # and a place for what is behind the end of a second direction
    taps = 0 if conv_state is None else conv_state.shape[1]
    strides = [t.stride(0) if t is not None else 0 for t in (x, side.dt, side.B, side.C, z)]
    _scan_frame_kernel[(b * triton.cdiv(d, 2 * warps // (2 if both else 1)),)](
        *side, *(other or (None,) * 7), z, initial_state, final_state, tail, conv_state, y, park,
        scale, l, rounds, *strides, DIM=d, SX=x.stride(1), SDT=side.dt.stride(1), SB=side.B.stride(1),
        SC=side.C.stride(1), SZ=0 if z is None else z.stride(1), BOTH=both, REVERSE=reverse, SOFTPLUS=softplus,
        TAPS=taps, T=T, PACKED=packed, PARK=parked, W=warps, SHARED=shared_asm(shared), ASM=ASM, PDL=ahead,
        num_warps=warps, **({"launch_pdl": True} if ahead else {}),
    )  # fmt: skip
