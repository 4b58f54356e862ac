"""What a lane of the backward scan holds, keeps and exchanges: CH neighbouring channels, half the states of each.

Values of several channels are tuples of one value a channel; a state is a tuple of NH vectors, of several channels a
tuple of those.  Letters: l tokens, d channels, n states; u = dt x, s the output before the gate, ds its gradient.
"""

import triton
import triton.language as tl

from ._triton_lane_sums import pad
from ._triton_scan import (
    advance,
    decays,
    get_row,
    load4,
    load_each,
    load_fp32,
    load_states,
    pair_rows,
    scaled,
    store4,
    store_states,
    store_values,
    to_both,
    zeros,
)
from ._triton_shared import get2, get4, put1, put2, put4


@triton.jit
def choose(first, a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.where(first, a[i], b[i]),)
    return out


@triton.jit
def choose_each(first, a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (choose(first, a[i], b[i]),)
    return out


@triton.jit
def save_states(p, slot, h, half, NH: tl.constexpr, CH: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr):
    # the states into a slot of the program's scratch
    Q: tl.constexpr = (NH + 3) // 4
    for c in tl.static_range(CH):
        if ASM:
            v = pad(h[c], NH, 4 * Q)
            for i in tl.static_range(Q):
                at = p + ((slot * CH + c) * Q + i) * 128 * W
                store4(at, v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3], half < 2)
        else:
            for i in tl.static_range(NH):
                tl.store(p + ((slot * CH + c) * 4 * Q + i) * 32 * W, h[c][i])


@triton.jit
def restore_states(p, slot, half, NH: tl.constexpr, CH: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr):
    Q: tl.constexpr = (NH + 3) // 4
    h = ()
    for c in tl.static_range(CH):
        out = ()
        if ASM:
            for i in tl.static_range(Q):
                four = load4(p + ((slot * CH + c) * Q + i) * 128 * W, half < 2)
                for j in tl.static_range(4):
                    if 4 * i + j < NH:
                        out = out + (four[j],)
        else:
            for i in tl.static_range(NH):
                out = out + (tl.load(p + ((slot * CH + c) * 4 * Q + i) * 32 * W),)
        h = h + (out,)
    return h


# s of the directions walked so far, fp32, waits for the others where the last launch writes its dx and ddt: in 16 bits
# the upper halves in dx, the lower ones in ddt, else (p is fp32) all of it in dx or in memory of its own.
@triton.jit
def park(p, low_p, v, mask, CH: tl.constexpr, ASM: tl.constexpr):
    if tl.float32 == p.dtype.element_ty:
        store_values(p, v, mask, CH, ASM)
    elif CH == 2 and ASM:
        tl.inline_asm_elementwise(
            """{.reg .pred p; .reg .b32 h, w; setp.ne.s32 p, $5, 0; prmt.b32 h, $3, $4, 0x7632;
            prmt.b32 w, $3, $4, 0x5410; @p st.global.b32 [$1], h; @p st.global.b32 [$2], w; mov.u32 $0, 0;}""",
            "=r,l,l,f,f,r", [p.to(tl.int64), low_p.to(tl.int64), v[0], v[1], mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        for c in tl.static_range(CH):
            bits = v[c].to(tl.int32, bitcast=True)
            tl.store(p + c, (bits >> 16).to(tl.int16), mask=mask)
            tl.store(low_p + c, bits.to(tl.int16), mask=mask)


@triton.jit
def load_parked(p, low_p, mask, CH: tl.constexpr, ASM: tl.constexpr):
    if tl.float32 == p.dtype.element_ty:
        return load_fp32(p, mask, CH, ASM)
    elif CH == 2 and ASM:
        return tl.inline_asm_elementwise(
            """{.reg .pred p; setp.ne.s32 p, $4, 0; mov.u32 $0, 0; mov.u32 $1, 0; @p ld.global.b32 $0, [$2];
            @p ld.global.b32 $1, [$3];}""",
            "=&r,=&r,l,l,r", [p.to(tl.int64), low_p.to(tl.int64), mask.to(tl.int32)],
            dtype=(tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        words = ()
        for c in tl.static_range(CH):
            words = words + (tl.load(p + c, mask=mask, other=0), tl.load(low_p + c, mask=mask, other=0))
        return words


@triton.jit
def parked_values(words, TYPE: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):
    # what `park` was given, from the last of the words
    out = ()
    if tl.float32 == TYPE:
        for c in tl.static_range(CH):
            out = out + (words[len(words) - CH + c],)
    elif CH == 2 and ASM:
        out = tl.inline_asm_elementwise(
            "{prmt.b32 $0, $3, $2, 0x5410; prmt.b32 $1, $3, $2, 0x7632;}",
            "=&r,=&r,r,r", [words[len(words) - 2], words[len(words) - 1]],
            dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        for c in tl.static_range(CH):
            high = words[len(words) - 2 * CH + 2 * c].to(tl.int32)
            low = words[len(words) - 2 * CH + 2 * c + 1].to(tl.int32)
            out = out + (((high << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True),)
    return out


# Shared memory of a pair of tokens: 16 bytes a channel pair or channel and what is below.  CH = 1: (dt, u) of both
# tokens, and (ds) of both; CH = 2: (dt, u) of both channels of the first token, then of the second, and (ds) of both
# channels of the first token, then the second.  u = dt x.
@triton.jit
def put_dt(both, p, x, dt, half, CH: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if CH == 1:
            put2(both + p * 256 + half * 8, dt[0], dt[0] * x[0])
        else:
            put4(both + p * 512 + half * 256, dt[0], dt[0] * x[0], dt[1], dt[1] * x[1])


@triton.jit
def get_dt(both, p, x, dt, lane, CH: tl.constexpr, ASM: tl.constexpr):
    # dt and u of the first token of pair p, then of the second, each of CH channels, in every lane
    if not ASM:
        dt0 = ()
        dt1 = ()
        u0 = ()
        u1 = ()
        for c in tl.static_range(CH):
            first, second = to_both(dt[c], lane, ASM)
            dt0 = dt0 + (first,)
            dt1 = dt1 + (second,)
            first, second = to_both(dt[c] * x[c], lane, ASM)
            u0 = u0 + (first,)
            u1 = u1 + (second,)
        return dt0, u0, dt1, u1
    elif CH == 1:
        dt0, u0, dt1, u1 = get4(both + p * 256)
        return (dt0,), (u0,), (dt1,), (u1,)
    else:
        dt00, u00, dt01, u01 = get4(both + p * 512)
        dt10, u10, dt11, u11 = get4(both + p * 512 + 256)
        return (dt00, dt01), (u00, u01), (dt10, dt11), (u10, u11)


@triton.jit
def put_ds(both_ds, p, ds, half, CH: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if CH == 1:
            put1(both_ds + p * 128 + half * 4, ds[0])
        else:
            put2(both_ds + p * 256 + half * 8, ds[0], ds[1])


@triton.jit
def get_ds(both_ds, p, ds, lane, CH: tl.constexpr, ASM: tl.constexpr):
    if not ASM:
        ds0 = ()
        ds1 = ()
        for c in tl.static_range(CH):
            first, second = to_both(ds[c], lane, ASM)
            ds0 = ds0 + (first,)
            ds1 = ds1 + (second,)
        return ds0, ds1
    elif CH == 1:
        ds0, ds1 = get2(both_ds + p * 128)
        return (ds0,), (ds1,)
    else:
        ds00, ds01, ds10, ds11 = get4(both_ds + p * 256)
        return (ds00, ds01), (ds10, ds11)


@triton.jit
def channel_rows(
    area, const, p, s_n, k, end, l, frames, half, real, lane, J: tl.constexpr, S: tl.constexpr, NH: tl.constexpr,
    NS: tl.constexpr, CONST: tl.constexpr, MASK: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr,
    CH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # `pair_rows` of each channel: they share them unless constant
    if CONST:
        return const, const
    else:
        row0, row1 = pair_rows(
            area, const, p, s_n, k, end, l, frames, half, real, lane, J, S, NH, NS, CONST, MASK, REVERSE, TIME, ASM
        )
        rows0 = ()
        rows1 = ()
        for _ in tl.static_range(CH):
            rows0 = rows0 + (row0,)
            rows1 = rows1 + (row1,)
        return rows0, rows1


@triton.jit
def channel_decays(A, dt, NH: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (decays(A[c], dt[c], NH, ASM),)
    return out


@triton.jit
def steps(h, a, B, u, NH: tl.constexpr, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (advance(h[c], a[c], B[c], u[c], NH),)
    return out


@triton.jit
def keep(area, J: tl.constexpr, a, NH: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):
    # the decays of token J, for `kept_decays`
    Q: tl.constexpr = (NH + 3) // 4
    if ASM:
        for c in tl.static_range(CH):
            v = pad(a[c], NH, 4 * Q)
            for i in tl.static_range(Q):
                put4(area + ((J * CH + c) * Q + i) * 512, v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3])


@triton.jit
def kept_decays(area, J: tl.constexpr, A, dt, NH: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        out = ()
        for c in tl.static_range(CH):
            out = out + (get_row(area + (J * CH + c) * ((NH + 3) // 4) * 512, 512, NH),)
        return out
    else:
        return channel_decays(A, dt, NH, CH, ASM)


@triton.jit
def products(h, ds, NH: tl.constexpr, CH: tl.constexpr):
    # h ds of each state, summed over the lane's channels
    out = scaled(h[0], ds[0], NH)
    for c in tl.static_range(1, CH):
        out = add_product(out, h[c], ds[c], NH)
    return out


@triton.jit
def add_product(acc, h, ds, NH: tl.constexpr):
    out = ()
    for i in tl.static_range(NH):
        out = out + (tl.fma(h[i], ds, acc[i]),)
    return out


@triton.jit
def plus(u, v, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (u[c] + v[c],)
    return out


@triton.jit
def plus_product(acc, u, v, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (tl.fma(u[c], v[c], acc[c]),)
    return out


@triton.jit
def add_products(acc, h, ds, NH: tl.constexpr, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (add_product(acc[c], h[c], ds[c], NH),)
    return out


@triton.jit
def channel_zeros(like, NH: tl.constexpr, CH: tl.constexpr):
    out = ()
    for _ in tl.static_range(CH):
        out = out + (zeros(like, NH),)
    return out


@triton.jit
def load_channels(
    p, mask, NH: tl.constexpr, NS: tl.constexpr, half, N: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr
):
    out = ()
    for c in tl.static_range(CH):
        out = out + (load_states(p + c * N, mask, NH, NS, half, N, ASM),)
    return out


@triton.jit
def store_channels(
    p, h, mask, NH: tl.constexpr, NS: tl.constexpr, half, N: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr
):
    for c in tl.static_range(CH):
        store_states(p + c * N, h[c], mask, NH, NS, half, N, ASM)


@triton.jit
def load_constant(p, mask, s_d, s_n, NH: tl.constexpr, NS: tl.constexpr, half, CONST: tl.constexpr, CH: tl.constexpr):
    out = ()
    if CONST:
        for c in tl.static_range(CH):
            out = out + (load_each(p + c * s_d, mask, s_n, NH, NS, half),)
    return out


@triton.jit
def load_parameter(p, offs, mask, absent, HAS: tl.constexpr, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (tl.load(p + offs + c, mask=mask, other=0.0) if HAS else absent,)
    return out
