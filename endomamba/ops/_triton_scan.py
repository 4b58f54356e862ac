"""What the forward and the backward scan kernel share.  Letters: l tokens, d channels, n states.

Lanes.  A warp owns 16 channels.  Lanes 0-15 hold the first half of a channel's states, lanes 16-31 the second, so a
state is NH = ceil(n / 2) plain vectors and no tile ever changes its layout.  Tokens are walked in pairs: all lanes
advance their states by both tokens, and what a token costs besides (softplus, gate, loads, the store) is done once, by
the half that owns it: lanes 0-15 the first token of the pair, lanes 16-31 the second.  Halves exchange by one shuffle.
"""

import triton
import triton.language as tl

from ._triton_math import exp2

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
def _load4(p, mask):
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
def _store4(p, a, b, c, d, mask):
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
            out = out + _load4(p + 4 * i, mask)
    else:
        out = load_each(p, mask, 1, NH, NS, half)
    return out


@triton.jit
def store_states(p, h, mask, NH: tl.constexpr, NS: tl.constexpr, half, N: tl.constexpr, ASM: tl.constexpr):
    if ASM and NS == 2 * NH and NH % 4 == 0 and N % 4 == 0:
        for i in tl.static_range(NH // 4):
            _store4(p + 4 * i, h[4 * i], h[4 * i + 1], h[4 * i + 2], h[4 * i + 3], mask)
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
def _words4(p):
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [p.to(tl.int64)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _words2(p):
    return tl.inline_asm_elementwise(
        "ld.global.nc.v2.b32 {$0, $1}, [$2];",
        "=r,=r,l",
        [p.to(tl.int64)],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def load_row(p, stride, NH: tl.constexpr, NS: tl.constexpr, half, VEC: tl.constexpr, ASM: tl.constexpr):
    # The lane's half of a token's B or C.  VEC > 0: VEC 32-bit words a load, kept packed while in flight (16-bit values
    # would be pulled apart right after the load, which waits for it).  VEC 0: value by value, at any stride.
    row = ()
    if VEC == 0:
        for i in tl.static_range(NH):
            if NS == 2 * NH:
                row = row + (tl.load(p + i * stride),)
            else:
                row = row + (tl.load(p + i * stride, mask=half * NH + i < NS, other=0.0),)
    else:
        w = p.to(tl.pointer_type(tl.int32))
        for i in tl.static_range(NH * p.dtype.element_ty.primitive_bitwidth // 32 // VEC):
            if VEC == 4 and ASM:
                row = row + _words4(w + 4 * i)
            elif VEC == 2 and ASM:
                row = row + _words2(w + 2 * i)
            else:
                for j in tl.static_range(VEC):
                    row = row + (tl.load(w + (VEC * i + j)),)
    return row


@triton.jit
def unpack(row, NH: tl.constexpr, VEC: tl.constexpr, TYPE: tl.constexpr):
    # -> NH fp32 values
    out = ()
    if VEC == 0:
        for i in tl.static_range(NH):
            out = out + (row[i].to(tl.float32),)
    elif tl.float32 == TYPE:
        for i in tl.static_range(NH):
            out = out + (row[i].to(tl.float32, bitcast=True),)
    elif tl.bfloat16 == TYPE:
        for i in tl.static_range(NH // 2):
            out = out + ((row[i] << 16).to(tl.float32, bitcast=True), (row[i] & -65536).to(tl.float32, bitcast=True))
    else:
        for i in tl.static_range(NH // 2):
            low = row[i].to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (row[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            out = out + (low, high)
    return out


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
        out = out + (a[i] * h[i] + B[i] * dtx,)
    return out


@triton.jit
def dot(u, v, NH: tl.constexpr):
    # sum over the lane's states, in two chains
    s = u[0] * v[0]
    if NH > 1:
        r = u[1] * v[1]
        for i in tl.static_range(2, NH):
            if i % 2 == 0:
                s += u[i] * v[i]
            else:
                r += u[i] * v[i]
        s += r
    return s


@triton.jit
def offset(k, l, frames, STRIDE: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr):
    # Elements from token 0 to the k-th token of the walk.  TIME: time fastest, over frame-major tokens.
    token = l - 1 - k if REVERSE else k
    if TIME:
        token = (token % frames) * (l // frames) + token // frames
    return (token + tl.zeros([], tl.int64)) * STRIDE
