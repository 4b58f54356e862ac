"""What the forward and the backward scan kernel share.  Letters: l tokens, d channels, n states.

Lanes.  A warp owns 16 channels.  Lanes 0-15 hold the first half of a channel's states, lanes 16-31 the second, so a
state is NH = ceil(n / 2) plain vectors and no tile ever changes its layout.  Tokens are walked in pairs: all lanes
advance their states by both tokens, and what a token costs besides (softplus, gate, loads, the store) is done once, by
the half that owns it: lanes 0-15 the first token of the pair, lanes 16-31 the second.  Halves exchange by one
shuffle, or through shared memory where a value is read more than once.
"""

import triton
import triton.language as tl

from ._triton_math import exp2
from ._triton_shared import get4, put2

LANE_CHANNELS = 16  # channels a warp


@triton.jit
def swap(v, lane, ASM: tl.constexpr):
    # the value that the other half of the warp holds for this channel
    if ASM:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 16, 31, 0xffffffff;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.gather(v, lane ^ 16, 0)


@triton.jit
def neighbour(v, lane, DISTANCE: tl.constexpr, ASM: tl.constexpr):
    # the value of the lane whose number differs in bit DISTANCE, below 16
    if not ASM:
        return tl.gather(v, lane ^ DISTANCE, 0)
    elif DISTANCE == 8:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 8, 31, 0xffffffff;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    elif DISTANCE == 4:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 4, 31, 0xffffffff;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    elif DISTANCE == 2:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 2, 31, 0xffffffff;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 1, 31, 0xffffffff;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def to_both(own, lane, ASM: tl.constexpr):
    # a value of each half's own token -> that of the pair's first token, that of its second, in every lane
    other = swap(own, lane, ASM)
    first = (lane & 16) == 0
    return tl.where(first, own, other), tl.where(first, other, own)


@triton.jit
def own_total(s0, s1, lane, ASM: tl.constexpr):
    # partial sums over half the states, of both tokens -> the full sum of the half's own token
    first = (lane & 16) == 0
    return tl.where(first, s0, s1) + swap(tl.where(first, s1, s0), lane, ASM)


@triton.jit
def zeros(like, NH: tl.constexpr):
    out = ()
    for _ in tl.static_range(NH):
        out = out + (like * 0.0,)
    return out


@triton.jit
def prefetch(p):
    # the line of p to L1
    tl.inline_asm_elementwise(
        "{prefetch.global.L1 [$1]; mov.u32 $0, 0;}",
        "=r,l", [p.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def load4(p, mask):
    return tl.inline_asm_elementwise(
        """{.reg .pred p; setp.ne.s32 p, $5, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000;
        mov.f32 $3, 0f00000000; @p ld.global.v4.f32 {$0, $1, $2, $3}, [$4];}""",
        "=&f,=&f,=&f,=&f,l,r",
        [p.to(tl.int64), mask.to(tl.int32)],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def store4(p, a, b, c, d, mask):
    tl.inline_asm_elementwise(
        "{.reg .pred p; setp.ne.s32 p, $6, 0; @p st.global.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;}",
        "=r,l,f,f,f,f,r",
        [p.to(tl.int64), a, b, c, d, mask.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def load_states(p, mask, NH: tl.constexpr, NS: tl.constexpr, half, N: tl.constexpr, ASM: tl.constexpr):
    # The lane's NH states of its channel, of a row of N fp32 values from a base that torch allocated; NS of the 2 * NH
    # exist.  Four at a time where that is aligned: a lane by itself fills its sectors.
    out = ()
    if ASM and NS == 2 * NH and NH % 4 == 0 and N % 4 == 0:
        for i in tl.static_range(NH // 4):
            out = out + load4(p + 4 * i, mask)
    else:
        out = load_each(p, mask, 1, NH, NS, half)
    return out


@triton.jit
def store_states(p, h, mask, NH: tl.constexpr, NS: tl.constexpr, half, N: tl.constexpr, ASM: tl.constexpr):
    if ASM and NS == 2 * NH and NH % 4 == 0 and N % 4 == 0:
        for i in tl.static_range(NH // 4):
            store4(p + 4 * i, h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3], mask)
    else:
        for i in tl.static_range(NH):
            if NS == 2 * NH:
                tl.store(p + i, h[i], mask=mask)
            else:
                tl.store(p + i, h[i], mask=mask & (half * NH + i < NS))


@triton.jit
def load_each(p, mask, stride, NH: tl.constexpr, NS: tl.constexpr, half):
    # the lane's states one by one, at any stride and of any dtype
    out = ()
    for i in tl.static_range(NH):
        if NS == 2 * NH:
            out = out + (tl.load(p + i * stride, mask=mask, other=0.0).to(tl.float32),)
        else:
            out = out + (tl.load(p + i * stride, mask=mask & (half * NH + i < NS), other=0.0).to(tl.float32),)
    return out


@triton.jit
def load_raw(p, mask, ASM: tl.constexpr):
    # An element a lane in 32 bits, as it is in memory, for `value`.  A 16-bit value that stays in flight across a loop
    # would be packed right after its load, which waits for it.  For memory that the kernel does not write.
    if ASM:
        if p.dtype.element_ty.primitive_bitwidth == 16:
            return tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.u32 $0, 0; @p ld.global.nc.u16 $0, [$1];}",
                "=&r,l,r", [p.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.u32 $0, 0; @p ld.global.nc.b32 $0, [$1];}",
                "=&r,l,r", [p.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
            )  # fmt: skip
    else:
        return tl.load(p, mask=mask, other=0.0)


@triton.jit
def value(raw, TYPE: tl.constexpr, ASM: tl.constexpr):
    # what `load_raw` brought, in fp32
    if ASM:
        if tl.bfloat16 == TYPE:
            return (raw << 16).to(tl.float32, bitcast=True)
        elif tl.float16 == TYPE:
            return raw.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        else:
            return raw.to(tl.float32, bitcast=True)
    else:
        return raw.to(tl.float32)


@triton.jit
def load_words(p, mask, CH: tl.constexpr, ASM: tl.constexpr):
    # `load_raw` of CH neighbouring channels, as a tuple.  Two of them are 16 bits each (ASM: in one word).
    if CH == 1:
        return (load_raw(p, mask, ASM),)
    elif ASM:
        return (
            tl.inline_asm_elementwise(
                "{.reg .pred p; setp.ne.s32 p, $2, 0; mov.u32 $0, 0; @p ld.global.nc.b32 $0, [$1];}",
                "=&r,l,r", [p.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
            ),
        )  # fmt: skip
    else:
        return tl.load(p, mask=mask, other=0.0), tl.load(p + 1, mask=mask, other=0.0)


@triton.jit
def values(words, NTH: tl.constexpr, TYPE: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):
    # the NTH of several `load_words` in a row: CH channels in fp32
    if CH == 1:
        return (value(words[NTH], TYPE, ASM),)
    elif not ASM:
        return value(words[2 * NTH], TYPE, ASM), value(words[2 * NTH + 1], TYPE, ASM)
    elif tl.bfloat16 == TYPE:
        return value(words[NTH], TYPE, ASM), (words[NTH] & -65536).to(tl.float32, bitcast=True)
    else:
        return value(words[NTH], TYPE, ASM), value(words[NTH] >> 16, TYPE, ASM)


@triton.jit
def load_fp32(p, mask, CH: tl.constexpr, ASM: tl.constexpr):
    # fp32 of CH neighbouring channels
    if CH == 1:
        return (tl.load(p, mask=mask, other=0.0),)
    elif ASM:
        return tl.inline_asm_elementwise(
            """{.reg .pred p; setp.ne.s32 p, $3, 0; mov.f32 $0, 0f00000000; mov.f32 $1, 0f00000000;
            @p ld.global.v2.f32 {$0, $1}, [$2];}""",
            "=&f,=&f,l,r", [p.to(tl.int64), mask.to(tl.int32)], dtype=(tl.float32, tl.float32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return tl.load(p, mask=mask, other=0.0), tl.load(p + 1, mask=mask, other=0.0)


@triton.jit
def store_values(p, v, mask, CH: tl.constexpr, ASM: tl.constexpr):
    # CH neighbouring channels, rounded to what p points to
    TYPE: tl.constexpr = p.dtype.element_ty
    if CH == 1 or not ASM:
        for c in tl.static_range(CH):
            tl.store(p + c, v[c].to(TYPE), mask=mask)
    elif tl.float32 == TYPE:
        tl.inline_asm_elementwise(
            "{.reg .pred p; setp.ne.s32 p, $4, 0; @p st.global.v2.f32 [$1], {$2, $3}; mov.u32 $0, 0;}",
            "=r,l,f,f,r", [p.to(tl.int64), v[0], v[1], mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    elif tl.bfloat16 == TYPE:
        tl.inline_asm_elementwise(
            """{.reg .pred p; .reg .b32 w; setp.ne.s32 p, $4, 0; cvt.rn.bf16x2.f32 w, $3, $2; @p st.global.b32 [$1], w;
            mov.u32 $0, 0;}""",
            "=r,l,f,f,r", [p.to(tl.int64), v[0], v[1], mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.inline_asm_elementwise(
            """{.reg .pred p; .reg .b32 w; setp.ne.s32 p, $4, 0; cvt.rn.f16x2.f32 w, $3, $2; @p st.global.b32 [$1], w;
            mov.u32 $0, 0;}""",
            "=r,l,f,f,r", [p.to(tl.int64), v[0], v[1], mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def select(keep, row, NH: tl.constexpr):
    out = ()
    for i in tl.static_range(NH):
        out = out + (tl.where(keep, row[i], 0.0),)
    return out


@triton.jit
def scaled(v, f, NH: tl.constexpr):
    out = ()
    for i in tl.static_range(NH):
        out = out + (v[i] * f,)
    return out


@triton.jit
def decays(A, dt, NH: tl.constexpr, ASM: tl.constexpr):
    out = ()
    for i in tl.static_range(NH):
        out = out + (exp2(A[i] * dt, ASM),)
    return out


@triton.jit
def advance(h, a, B, dtx, NH: tl.constexpr):
    out = ()
    for i in tl.static_range(NH):
        out = out + (tl.fma(a[i], h[i], B[i] * dtx),)
    return out


@triton.jit
def dot(u, v, NH: tl.constexpr):
    # Sum over the lane's states, in two chains.  All are multiply-adds: else the compiler chooses which product the
    # last sum takes in, and one token would not have the bits of many.
    zero = tl.zeros_like(u[0])
    s = tl.fma(u[0], v[0], zero)
    if NH > 1:
        r = tl.fma(u[1], v[1], zero)
        for i in tl.static_range(2, NH):
            if i % 2 == 0:
                s = tl.fma(u[i], v[i], s)
            else:
                r = tl.fma(u[i], v[i], r)
        s += r
    return s


@triton.jit
def offset(k, l, frames, STRIDE: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr):
    # Elements from token 0 to the k-th token of the walk.  TIME: time fastest, over frame-major tokens.
    token = l - 1 - k if REVERSE else k
    if TIME:
        token = (token % frames) * (l // frames) + token // frames
    return (token + tl.zeros([], tl.int64)) * STRIDE


@triton.jit
def own_at(p, offs, k, J: tl.constexpr, l, frames, half, S: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr):
    # the lane's element of its own token of the pair at k + J; p: the sequence's first token
    if TIME:
        return p + offset(k + J + half, l, frames, S, REVERSE, TIME) + offs
    else:
        G: tl.constexpr = -1 if REVERSE else 1
        return p + (offset(k, l, frames, S, REVERSE, TIME) + G * J * S) + (offs + half * (G * S))


@triton.jit
def row_states(lane, half, NH: tl.constexpr, ASM: tl.constexpr):
    # The first state that a lane reads of a row of B or C: of its own half, or, ASM, of the two that it brings to
    # shared memory, where a row is 2 * 8 slots; lane / 8 is the token.
    if ASM:
        return (lane % 8) // 4 * NH + 2 * (lane % 4)
    else:
        return half * NH


@triton.jit
def load_rows(
    p, m_p, s_n, k, end, l, frames, lane, T: tl.constexpr, S: tl.constexpr, NH: tl.constexpr, NS: tl.constexpr,
    CONST: tl.constexpr, MASK: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # B or C of the T tokens from k, on their way to shared memory: two states a lane, four tokens a load
    out = ()
    if ASM and not CONST:
        i = 2 * (lane % 4)
        first = (lane % 8) // 4 * NH + i
        for g in tl.static_range(T // 4):
            at = k + 4 * g + (lane % 32) // 8
            live = at < end
            o = offset(at, l, frames, S, REVERSE, TIME)
            if MASK:
                live &= tl.load(m_p + offset(at, l, frames, 1, REVERSE, TIME), mask=live, other=0) != 0
            if NS == 16:
                out = out + (load_raw(p + o, live, ASM), load_raw(p + o + s_n, live, ASM))
            else:
                out = out + (
                    load_raw(p + o, live & (i < NH) & (first < NS), ASM),
                    load_raw(p + o + s_n, live & (i + 1 < NH) & (first + 1 < NS), ASM),
                )
    return out


@triton.jit
def put_rows(area, rows, T: tl.constexpr, TYPE: tl.constexpr, CONST: tl.constexpr, ASM: tl.constexpr):
    # area: where the lane's two states of the first token go; a token is 64 bytes
    if ASM and not CONST:
        for g in tl.static_range(T // 4):
            put2(area + 256 * g, value(rows[2 * g], TYPE, ASM), value(rows[2 * g + 1], TYPE, ASM))


@triton.jit
def get_row(area, STRIDE: tl.constexpr, NH: tl.constexpr):
    # NH values of shared memory, four at a time
    out = ()
    for i in tl.static_range((NH + 3) // 4):
        four = get4(area + STRIDE * i)
        for j in tl.static_range(4):
            if 4 * i + j < NH:
                out = out + (four[j],)
    return out


@triton.jit
def pair_rows(
    area, const, p, s_n, k, end, l, frames, half, real, lane, J: tl.constexpr, S: tl.constexpr, NH: tl.constexpr,
    NS: tl.constexpr, CONST: tl.constexpr, MASK: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    # B or C of the pair at k, tokens J and J + 1 of those in shared memory: each lane's half of both rows, in fp32.
    # MASK: rows of tokens that are not `real` are 0 (ASM: they came so).
    if CONST:
        return const, const
    elif ASM:
        return get_row(area + 64 * J, 16, NH), get_row(area + 64 * (J + 1), 16, NH)
    else:
        k0 = tl.minimum(k, end - 1)
        k1 = tl.minimum(k + 1, end - 1)
        row0 = load_each(p + offset(k0, l, frames, S, REVERSE, TIME), half < 2, s_n, NH, NS, half)
        row1 = load_each(p + offset(k1, l, frames, S, REVERSE, TIME), half < 2, s_n, NH, NS, half)
        if MASK:
            r0, r1 = to_both(real.to(tl.float32), lane, ASM)
            row0 = select(r0 != 0.0, row0, NH)
            row1 = select(r1 != 0.0, row1, NH)
        return row0, row1
