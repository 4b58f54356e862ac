"""The backward scan in Triton.  One launch walks one direction; what follows adds to what it parked.

Letters: b sequences, l tokens, d channels, n state size, g groups of B and C.
"""

import triton
import triton.language as tl

from ._triton_math import LN2, LOG2E, exp2, sigmoid, softplus
from ._triton_scan import (
    advance,
    decays,
    dot,
    get_row,
    load4,
    load_each,
    load_fp32,
    load_raw,
    load_rows,
    load_states,
    load_words,
    own_at,
    own_total,
    pair_rows,
    prefetch,
    put_rows,
    row_states,
    scaled,
    store4,
    store_states,
    store_values,
    swap,
    to_both,
    value,
    values,
    zeros,
)
from ._triton_shared import get1, get2, get4, pinned, program_sync, put1, put2, put4, reserve, warp_sync


def _sum_asm(exact: bool) -> str:
    """PTX that sums 16 values over the 16 lanes of each half: 4 tf32 matrix products with ones, then 3 shuffles.

    Value v of lane L is element (L / 4, L % 4) of an 8 x 4 matrix; m16n8k8 adds its four columns.  Value 4i + m is sent
    to column 2i + (m >> 1) of the accumulator (the one-hot operand), rows 0-7 for even m and 8-15 for odd m, so one
    accumulator takes all 16 values and lane L is left with four: 4 (L % 4) + {0, 2, 1, 3}, summed over its quad.
    exact: value = high + low, each cut to 11 bits: 22 in all.  Otherwise the matrix unit cuts a value to 11 bits.
    """
    lines = [
        "{.reg .f32 c0, c1, c2, c3, s0, s1, t0, t1; .reg .b32 h0, h1, h2, h3, l0, l1, l2, l3; .reg .pred p, q;",
        "mov.f32 c0, 0f00000000; mov.f32 c1, 0f00000000; mov.f32 c2, 0f00000000; mov.f32 c3, 0f00000000;",
    ]
    mma = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{c0, c1, c2, c3}}, {{{a}}}, {{{b}}}, {{c0, c1, c2, c3}};"
    for i in range(4):
        ones = f"${17 + 2 * i}, ${18 + 2 * i}"
        for k in range(4):
            lines.append(f"mov.b32 h{k}, ${1 + 4 * i + k};")
            if exact:
                lines.append(f"and.b32 h{k}, h{k}, 0xffffe000; mov.b32 t0, h{k}; sub.f32 t0, ${1 + 4 * i + k}, t0;")
                lines.append(f"mov.b32 l{k}, t0;")
        if exact:
            lines.append(mma.format(a="l0, l1, l2, l3", b=ones))
        lines.append(mma.format(a="h0, h1, h2, h3", b=ones))
    lines += [
        "and.b32 h0, $25, 8; setp.ne.b32 p, h0, 0; and.b32 h0, $25, 4; setp.ne.b32 q, h0, 0;",
        "selp.f32 s0, c2, c0, p; selp.f32 s1, c3, c1, p; selp.f32 t0, c0, c2, p; selp.f32 t1, c1, c3, p;",
        "shfl.sync.bfly.b32 t0, t0, 8, 31, 0xffffffff; shfl.sync.bfly.b32 t1, t1, 8, 31, 0xffffffff;",
        "add.f32 s0, s0, t0; add.f32 s1, s1, t1;",
        "selp.f32 t0, s0, s1, q; selp.f32 s0, s1, s0, q;",
        "shfl.sync.bfly.b32 t0, t0, 4, 31, 0xffffffff; add.f32 $0, s0, t0;}",
    ]
    return "\n".join(lines)


_SUM = tl.constexpr(_sum_asm(False))
_SUM_EXACT = tl.constexpr(_sum_asm(True))
_SUM_OPERANDS = tl.constexpr("=f," + ",".join(["f"] * 16 + ["r"] * 9))
# Cutting a mantissa to 11 bits takes 2^-11 * 0.72 off a value on average: given back to the sums, they have no bias.
CUT = 1.0 + 3.52e-4


@triton.jit
def _one_hots(lane):
    out = ()
    for i in tl.static_range(8):
        out = out + (pinned(tl.where((lane % 32) // 4 == i, 0x3F800000, 0).to(tl.int32)),)
    return out


@triton.jit
def _lane_sums(u, v, e, lane, EXACT: tl.constexpr):
    # u, v: 8 values a lane of a pair's first and second token -> lane: one sum, at _place
    if EXACT:
        return tl.inline_asm_elementwise(
            _SUM_EXACT, _SUM_OPERANDS,
            [u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7],
             e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7], lane],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _SUM, _SUM_OPERANDS,
            [u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7],
             e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7], lane],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _pad(v, NH: tl.constexpr, TO: tl.constexpr):
    for _ in tl.static_range(NH, TO):
        v = v + (v[0] * 0.0,)
    return v


@triton.jit
def _save(p, slot, h, half, NH: tl.constexpr, CH: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr):
    # the states into a slot of the program's scratch
    Q: tl.constexpr = (NH + 3) // 4
    for c in tl.static_range(CH):
        if ASM:
            v = _pad(h[c], NH, 4 * Q)
            for i in tl.static_range(Q):
                at = p + ((slot * CH + c) * Q + i) * 128 * W
                store4(at, v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3], half < 2)
        else:
            for i in tl.static_range(NH):
                tl.store(p + ((slot * CH + c) * 4 * Q + i) * 32 * W, h[c][i])


@triton.jit
def _restore(p, slot, half, NH: tl.constexpr, CH: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr):
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
def _park(p, low_p, v, mask, CH: tl.constexpr, ASM: tl.constexpr):
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
def _load_parked(p, low_p, mask, CH: tl.constexpr, ASM: tl.constexpr):
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
def _parked(words, TYPE: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):
    # what `_park` was given, from the last of the words
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


@triton.jit
def _state_inputs(
    x_p, dt_p, m_p, offs, k, end, l, frames, half, mask_d, T: tl.constexpr, SX: tl.constexpr, SDT: tl.constexpr,
    MASK: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr, EVEN: tl.constexpr, CH: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    # x, dt and mask of the lane's own token of each pair of the T tokens from k
    out = ()
    for j in tl.static_range(0, T, 2):
        live = k + j + half < end
        ok = live if EVEN else live & mask_d
        x = load_words(own_at(x_p, offs, k, j, l, frames, half, SX, REVERSE, TIME), ok, CH, ASM)
        dt = load_words(own_at(dt_p, offs, k, j, l, frames, half, SDT, REVERSE, TIME), ok, CH, ASM)
        if MASK:
            m = tl.load(own_at(m_p, half * 0, k, j, l, frames, half, 1, REVERSE, TIME), mask=live, other=0)
        else:
            m = dt[0]
        out = out + (x + dt + (m,),)
    return out


@triton.jit
def _output_inputs(
    z_p, dy_p, s_p, t_p, offs, k, end, l, frames, half, mask_d, T: tl.constexpr, SZ: tl.constexpr, SDY: tl.constexpr,
    SY: tl.constexpr, HAS_Z: tl.constexpr, ADD: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr,
    EVEN: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # likewise dy, z and the parked s
    out = ()
    for j in tl.static_range(0, T, 2):
        live = k + j + half < end
        ok = live if EVEN else live & mask_d
        words = load_words(own_at(dy_p, offs, k, j, l, frames, half, SDY, REVERSE, TIME), ok, CH, ASM)
        if HAS_Z:
            words = words + load_words(own_at(z_p, offs, k, j, l, frames, half, SZ, REVERSE, TIME), ok, CH, ASM)
        if ADD:
            high = own_at(s_p, offs, k, j, l, frames, half, SY, REVERSE, TIME)
            low = own_at(t_p, offs, k, j, l, frames, half, SY, REVERSE, TIME)
            words = words + _load_parked(high, low, ok, CH, ASM)
        out = out + (words,)
    return out


@triton.jit
def _own_dt(
    q, live, bias, X: tl.constexpr, DT: tl.constexpr, MASK: tl.constexpr, SOFTPLUS: tl.constexpr, CH: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    # of the own token: x, dt, dt before softplus, each of CH channels, and whether it counts
    real = live & (q[len(q) - 1] != 0) if MASK else live
    out_x = ()
    out_dt = ()
    out_raw = ()
    xs = values(q, 0, X, CH, ASM)
    dts = values(q, 1, DT, CH, ASM)
    for c in tl.static_range(CH):
        raw = dts[c] + bias[c]
        dt = softplus(raw, ASM) if SOFTPLUS else raw
        out_x = out_x + (tl.where(real, xs[c], 0.0) if MASK else xs[c],)
        out_dt = out_dt + (tl.where(real, dt, 0.0),)
        out_raw = out_raw + (raw,)
    return out_x, out_dt, out_raw, real


@triton.jit
def _own_ds(
    r, scale, DY: tl.constexpr, Z: tl.constexpr, PARKED: tl.constexpr, HAS_Z: tl.constexpr, ADD: tl.constexpr,
    CH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # of the own token, each of CH channels: ds; what y is multiplied by for dz, and for the gated y; the parked s
    dys = values(r, 0, DY, CH, ASM)
    out_ds = ()
    gate = ()
    act = ()
    parked = _parked(r, PARKED, CH, ASM) if ADD else ()
    for c in tl.static_range(CH):
        ds = dys[c] * scale
        if HAS_Z:
            z = values(r, 1, Z, CH, ASM)[c]
            sig = sigmoid(z, ASM)
            gate = gate + (ds * (sig * (1.0 + z * (1.0 - sig))),)
            out_ds = out_ds + (ds * (z * sig),)
            act = act + (scale * z * sig,)
        else:
            out_ds = out_ds + (ds,)
    return out_ds, gate, act, parked


@triton.jit
def _choose(first, a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.where(first, a[i], b[i]),)
    return out


@triton.jit
def _either(first, a, b):
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (_choose(first, a[i], b[i]),)
    return out


@triton.jit
def _rewalk(
    h, q, rB, scr, s, live, kb, ahead, A, Bc, bias, x_p, dt_p, B_p, m_p, offs_d, sB_n, end, walk, frames, lane, half,
    mask_d, both, put_B, get_B,
    SX: tl.constexpr, SDT: tl.constexpr, SB: tl.constexpr, NH: tl.constexpr, NS: tl.constexpr, X: tl.constexpr,
    DT: tl.constexpr, TYPE: tl.constexpr, CONST_B: tl.constexpr, MASK: tl.constexpr, SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr, TIME: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr, CH: tl.constexpr,
    W: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # h, the state before the T tokens from kb, to slot s of the scratch -> the state after them, and the inputs of the
    # T tokens from `ahead`
    HT: tl.constexpr = T // 2
    _save(scr, s, h, half, NH, CH, W, ASM)
    own = ()
    for p in tl.static_range(HT):
        x, dt, _, real = _own_dt(q[p], live, bias, X, DT, MASK, SOFTPLUS, CH, ASM)
        _put_dt(both, p, x, dt, half, CH, ASM)
        own = own + ((x, dt, real),)
    put_rows(put_B, rB, T, TYPE, CONST_B, ASM)
    if ASM:
        warp_sync(lane)
    q = _state_inputs(
        x_p, dt_p, m_p, offs_d, ahead, end, walk, frames, half, mask_d, T,
        SX, SDT, MASK, REVERSE, TIME, EVEN, CH, ASM,
    )  # fmt: skip
    rB = load_rows(B_p, m_p, sB_n, ahead, end, walk, frames, lane, T, SB, NH, NS, CONST_B, MASK, REVERSE, TIME, ASM)
    for p in tl.static_range(HT):
        x, dt, real = own[p]
        dt0, u0, dt1, u1 = _both_dt(both, p, x, dt, lane, CH, ASM)
        b0, b1 = _channel_rows(
            get_B, Bc, B_p, sB_n, kb + 2 * p, end, walk, frames, half, real, lane, 2 * p,
            SB, NH, NS, CONST_B, MASK, REVERSE, TIME, CH, ASM,
        )  # fmt: skip
        h = _step(h, _decays(A, dt0, NH, CH, ASM), b0, u0, NH, CH)
        h = _step(h, _decays(A, dt1, NH, CH, ASM), b1, u1, NH, CH)
    if ASM:
        warp_sync(lane)
    return h, q, rB


@triton.jit
def _step(h, a, B, u, NH: tl.constexpr, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (advance(h[c], a[c], B[c], u[c], NH),)
    return out


@triton.jit
def _channel_rows(
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


# Shared memory of a pair of tokens: 16 bytes a channel pair or channel and what is below.  CH = 1: (dt, u) of both
# tokens, and (ds) of both; CH = 2: (dt, u) of both channels of the first token, then of the second, and (ds) of both
# channels of the first token, then the second.  u = dt x.
@triton.jit
def _put_dt(both, p, x, dt, half, CH: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if CH == 1:
            put2(both + p * 256 + half * 8, dt[0], dt[0] * x[0])
        else:
            put4(both + p * 512 + half * 256, dt[0], dt[0] * x[0], dt[1], dt[1] * x[1])


@triton.jit
def _both_dt(both, p, x, dt, lane, CH: tl.constexpr, ASM: tl.constexpr):
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
def _put_ds(both_ds, p, ds, half, CH: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        if CH == 1:
            put1(both_ds + p * 128 + half * 4, ds[0])
        else:
            put2(both_ds + p * 256 + half * 8, ds[0], ds[1])


@triton.jit
def _both_ds(both_ds, p, ds, lane, CH: tl.constexpr, ASM: tl.constexpr):
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
def _products(h, ds, NH: tl.constexpr, CH: tl.constexpr):
    # h ds of each state, summed over the lane's channels
    out = scaled(h[0], ds[0], NH)
    for c in tl.static_range(1, CH):
        out = _add(out, h[c], ds[c], NH)
    return out


@triton.jit
def _add(acc, h, ds, NH: tl.constexpr):
    out = ()
    for i in tl.static_range(NH):
        out = out + (tl.fma(h[i], ds, acc[i]),)
    return out


@triton.jit
def _plus(u, v, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (u[c] + v[c],)
    return out


@triton.jit
def _plus_product(acc, u, v, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (tl.fma(u[c], v[c], acc[c]),)
    return out


@triton.jit
def _add_each(acc, h, ds, NH: tl.constexpr, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (_add(acc[c], h[c], ds[c], NH),)
    return out


@triton.jit
def _zeros(like, NH: tl.constexpr, CH: tl.constexpr):
    out = ()
    for _ in tl.static_range(CH):
        out = out + (zeros(like, NH),)
    return out


@triton.jit
def _load_states(
    p, mask, NH: tl.constexpr, NS: tl.constexpr, half, N: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr
):
    out = ()
    for c in tl.static_range(CH):
        out = out + (load_states(p + c * N, mask, NH, NS, half, N, ASM),)
    return out


@triton.jit
def _store_states(
    p, h, mask, NH: tl.constexpr, NS: tl.constexpr, half, N: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr
):
    for c in tl.static_range(CH):
        store_states(p + c * N, h[c], mask, NH, NS, half, N, ASM)


@triton.jit
def _keep(area, J: tl.constexpr, a, NH: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):
    # the decays of token J, for `_kept`
    Q: tl.constexpr = (NH + 3) // 4
    if ASM:
        for c in tl.static_range(CH):
            v = _pad(a[c], NH, 4 * Q)
            for i in tl.static_range(Q):
                put4(area + ((J * CH + c) * Q + i) * 512, v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3])


@triton.jit
def _kept(area, J: tl.constexpr, A, dt, NH: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        out = ()
        for c in tl.static_range(CH):
            out = out + (get_row(area + (J * CH + c) * ((NH + 3) // 4) * 512, 512, NH),)
        return out
    else:
        return _decays(A, dt, NH, CH, ASM)


@triton.jit
def _decays(A, dt, NH: tl.constexpr, CH: tl.constexpr, ASM: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (decays(A[c], dt[c], NH, ASM),)
    return out


@triton.jit
def _load_const(p, mask, s_d, s_n, NH: tl.constexpr, NS: tl.constexpr, half, CONST: tl.constexpr, CH: tl.constexpr):
    out = ()
    if CONST:
        for c in tl.static_range(CH):
            out = out + (load_each(p + c * s_d, mask, s_n, NH, NS, half),)
    return out


@triton.jit
def _load_parameter(p, offs, mask, absent, HAS: tl.constexpr, CH: tl.constexpr):
    out = ()
    for c in tl.static_range(CH):
        out = out + (tl.load(p + offs + c, mask=mask, other=0.0) if HAS else absent,)
    return out


@triton.jit
def _token_back(
    dh, dA, dBc, A, a, B, C, h, dt, u, ds, NH: tl.constexpr, CONST_B: tl.constexpr, CH: tl.constexpr
):  # fmt: skip
    # One token of the adjoint walk; h: the states before the token.  -> dh before it, dA, dBc, products for dB summed
    # over the lane's channels, and of each channel the lane's sums <dh, B> and <dh decay h, A>.
    pB = ()
    all_d = ()
    all_A = ()
    all_B = ()
    all_gB = ()
    all_gA = ()
    for c in tl.static_range(CH):
        nB = ()
        nd = ()
        nA = ()
        pC = ()
        gB = dt[c] * 0.0
        gA = dt[c] * 0.0
        for i in tl.static_range(NH):
            g = dh[c][i] + C[c][i] * ds[c]
            gB += g * B[c][i]
            if CONST_B:
                nB = nB + (dBc[c][i] + g * u[c],)
            elif c == 0:
                pC = pC + (g * u[c],)
            else:
                pC = pC + (tl.fma(g, u[c], pB[i]),)
            g *= a[c][i]
            nd = nd + (g,)
            g *= h[c][i]
            nA = nA + (dA[c][i] + g * dt[c],)
            gA += g * A[c][i]
        pB = pC
        all_d = all_d + (nd,)
        all_A = all_A + (nA,)
        all_B = all_B + (nB,)
        all_gB = all_gB + (gB,)
        all_gA = all_gA + (gA,)
    return all_d, all_A, all_B, pB, all_gB, all_gA


@triton.jit
def _store_sums(p, u, v, live, half, NH: tl.constexpr):
    # not ASM: the sums over the program's channels of u (first token) and v (second) to their row in global memory
    for i in tl.static_range(NH):
        tl.store(p + i, tl.sum(tl.where(half == 0, u[i], 0.0), axis=0), mask=live)
        tl.store(p + 8 + i, tl.sum(tl.where(half == 1, u[i], 0.0), axis=0), mask=live)
        tl.store(p + 16 + i, tl.sum(tl.where(half == 0, v[i], 0.0), axis=0), mask=live)
        tl.store(p + 24 + i, tl.sum(tl.where(half == 1, v[i], 0.0), axis=0), mask=live)


@triton.jit
def _share_start(worker, workers, seqs, l, every, CHUNK: tl.constexpr):
    # The first item of a worker in the list (sequence, its `every` chunks from the last one, which is shorter): the
    # chunk that starts nearest to where equal numbers of tokens would part.
    token = (worker + tl.zeros([], tl.int64)) * seqs * l // workers
    within = token % l
    chunk = tl.where(within > 0, (within + every * CHUNK - l + CHUNK // 2) // CHUNK, 0)
    return (token // l * every + chunk).to(tl.int32)


@triton.jit(do_not_specialize=["l", "frames", "seqs", "splits", "sm_b"])
def _scan_bwd_kernel(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, cs_ptr, dhl_ptr, s_ptr, t_ptr, gB_ptr, gA_ptr,
    cu_ptr, mask_ptr, dx_ptr, ddt_ptr, dz_ptr, y_ptr, dBC_ptr, dA_ptr, dBc_ptr, dCc_ptr, dD_ptr, dbias_ptr, dh0_ptr,
    scratch_ptr, carry_ptr, ready_ptr, scale, l, d, seqs, splits, frames, sdy_b, sx_b, sdt_b, sz_b, sB_b, sC_b, sB_g,
    sC_g, sB_n, sC_n, sm_b,
    SDY: tl.constexpr, SX: tl.constexpr, SDT: tl.constexpr, SZ: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr,
    SY: tl.constexpr, SDZ: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, NS: tl.constexpr,
    CONST_B: tl.constexpr, CONST_C: tl.constexpr, HAS_Z: tl.constexpr, OUT: tl.constexpr, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_H0: tl.constexpr, HAS_DHL: tl.constexpr, HAS_DH0: tl.constexpr, ADD: tl.constexpr,
    PARK: tl.constexpr, ADD_G: tl.constexpr, PARK_G: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr,
    REVERSE: tl.constexpr, TIME: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, LS: tl.constexpr,
    SHARE: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr, CH: tl.constexpr, W: tl.constexpr, SHARED: tl.constexpr,
    ASM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # Grid (P * g * cdiv(d / g, 16 CH W),): a program owns 16 CH W channels and every P-th sequence (LS > 0: piece of LS
    #   tokens), so dA, dD, ddt_bias stay in registers over all of them; lanes as in _triton_scan.
    #   SHARE: the P programs of the same channels share the chunks of all sequences evenly.  Program p takes the p-th
    #   part of the list (sequence, chunks last first), its last sequence first: where that is not finished, the state
    #   goes to program p + 1, which finishes it at its own end, when it has long been there (stream-K: Osama et al.,
    #   arXiv 2301.03598).  It waits for a program of a lower number only, so it cannot wait in vain.
    # A chunk of 64 tokens, last first: (1) from its saved state, the states every T tokens, to a scratch that stays in
    #   L2; then, T tokens at a time, (2) forward: the states of every token, in registers, y for dz, h ds for dC,
    #   OUT: the gated y itself;
    #   (3) backward: dh, and with it everything else.
    # CH channels a lane: two, which are neighbours in memory and one word in 16 bits, share a row of B and of C, the
    #   loads and the sums over channels; they need twice the registers and sequences enough for half the warps.
    # Shared memory, a warp: T rows of B and of C in fp32, what a token has one of a channel (dt, dt x, ds), worked out
    #   once by the lane that owns it and read by both halves, and the decays of T tokens, from (2) for (3).
    # Sums over channels (dB, dC): one tf32 matrix product with ones a pair, the program's warps added in a fixed order,
    #   one fp32 row a program and pair of tokens to global memory; a second kernel adds the rows.
    # Traffic: x, dt twice, z, dy once, dx, ddt, dz written: 9 * b*l*d elements, OUT 10; 128 bytes a token and program
    #   for sums.
    # Numerics: fp32; in a fp32 call the sums split values in two, else products are cut to 11 bits, without bias (CUT).
    # Bound: issue slots.
    NH: tl.constexpr = (NS + 1) // 2
    Q: tl.constexpr = (NH + 3) // 4
    BD: tl.constexpr = 16 * CH * W
    NB1: tl.constexpr = CHUNK // T
    HT: tl.constexpr = T // 2
    TYPE: tl.constexpr = B_ptr.dtype.element_ty
    C_TYPE: tl.constexpr = C_ptr.dtype.element_ty
    X: tl.constexpr = x_ptr.dtype.element_ty
    DT: tl.constexpr = dt_ptr.dtype.element_ty
    DY: tl.constexpr = dy_ptr.dtype.element_ty
    Z: tl.constexpr = z_ptr.dtype.element_ty if HAS_Z else X
    PARKED: tl.constexpr = s_ptr.dtype.element_ty if ADD or PARK else X
    lane = tl.arange(0, 32 * W)
    half = (lane // 16) % 2
    dg = d // GROUPS
    nblk = tl.cdiv(dg, BD) * GROUPS
    pid = tl.program_id(0)
    blk = pid % nblk
    group = blk // (nblk // GROUPS)
    in_group = (blk % (nblk // GROUPS)) * BD + ((lane // 32) * 16 + lane % 16) * CH
    mask_d = in_group < dg
    offs_d = group * dg + in_group
    state = FIRST + half * NH
    row_state = FIRST + row_states(lane, half, NH, ASM)
    none = tl.zeros([32 * W], tl.float32)
    A = ()
    for c in tl.static_range(CH):
        at = A_ptr + (offs_d + c) * N + state
        A = A + (scaled(load_states(at, mask_d, NH, NS, half, N, ASM), LOG2E, NH),)
    D = _load_parameter(D_ptr, offs_d, mask_d, none, HAS_D, CH)
    bias = _load_parameter(bias_ptr, offs_d, mask_d, none, HAS_BIAS, CH)
    Bc = _load_const(B_ptr + offs_d * SB + state * sB_n, mask_d, SB, sB_n, NH, NS, half, CONST_B, CH)
    Cc = _load_const(C_ptr + offs_d * SC + state * sC_n, mask_d, SC, sC_n, NH, NS, half, CONST_C, CH)
    # where lane's sum lies in a row of 32: (token of the pair, half, 8 states)
    v = 4 * (lane & 3) + ((lane >> 3) & 1) + 2 * ((lane >> 2) & 1)
    place = (v // 8) * 16 + ((lane >> 4) & 1) * 8 + v % 8
    if ASM:
        e = _one_hots(lane)
        warp = lane // 32
        shared = reserve(lane * 0, SHARED)
        own_shared = shared + warp * (192 * CH + 128) * T
        both = own_shared + (lane % 16) * 16
        both_ds = own_shared + 128 * CH * T + (lane % 16) * 8 * CH
        put_B = own_shared + 192 * CH * T + (lane % 32) * 8
        get_B = own_shared + 192 * CH * T + half * 32
        sums = shared + (192 * CH + 128) * T * W
        kept = sums + (256 * T * W if W > 1 else 0) + warp * (T * CH * Q * 512) + (lane % 32) * 16
        scr = scratch_ptr + pid.to(tl.int64) * (NB1 * CH * 4 * Q * 32 * W) + lane * 4
    else:
        e = ()
        warp = lane
        both = lane
        both_ds = lane
        put_B = lane
        get_B = lane
        sums = lane
        kept = lane
        scr = scratch_ptr + pid.to(tl.int64) * (NB1 * CH * 4 * Q * 32 * W) + lane
    put_C = put_B + 64 * T
    get_C = get_B + 64 * T
    dA = _zeros(none, NH, CH)
    dBc = _zeros(none, NH if CONST_B else 0, CH)
    dCc = _zeros(none, NH, CH) if CONST_C else ()
    dD = zeros(none, CH)
    dbias = zeros(none, CH)
    turn = 0
    worker = pid // nblk
    workers = tl.num_programs(0) // nblk
    if SHARE:
        every = tl.cdiv(l, CHUNK)
        item = _share_start(worker, workers, seqs, l, every, CHUNK)
        items_end = _share_start(worker + 1, workers, seqs, l, every, CHUNK)
        works = (items_end - 1) // every - item // every + 1
    else:
        works = tl.cdiv(seqs * splits - worker, workers)
    for nth in range(0, works):
        if SHARE:
            work = (items_end - 1) // every - nth
        else:
            work = worker + nth * workers
        seq = work // splits + tl.zeros([], tl.int64)
        slot = work + tl.zeros([], tl.int64)
        if PACKED:
            before = tl.load(cu_ptr + seq).to(tl.int64)
            walk = (tl.load(cu_ptr + seq + 1).to(tl.int64) - before).to(tl.int32)
            chunk0 = before // CHUNK + seq
            pair0 = before // 2 + seq
            base = seq * 0
        else:
            before = seq * 0
            chunk0 = seq * tl.cdiv(l, CHUNK)
            pair0 = seq * tl.cdiv(l, 2)
            base = seq
            walk = l
        if LS > 0:
            begin = (work % splits) * LS
            end = tl.minimum(begin + LS, walk)
        else:
            begin = 0
            end = walk
        x_p = x_ptr + (base * sx_b + before * SX)
        dt_p = dt_ptr + (base * sdt_b + before * SDT)
        z_p = (z_ptr + (base * sz_b + before * SZ)) if HAS_Z else x_p
        dy_p = dy_ptr + (base * sdy_b + before * SDY)
        row = base * walk * SY + before * SY
        row_dz = (base * walk + before) * SDZ
        s_p = (s_ptr + row) if ADD or PARK else x_p
        t_p = (t_ptr + row) if (ADD or PARK) and s_ptr.dtype.element_ty != tl.float32 else s_p
        m_p = (mask_ptr + (base * sm_b + before)) if MASK else x_ptr
        B_p = (B_ptr + (base * sB_b + before * SB + group * sB_g)) + row_state * sB_n
        C_p = (C_ptr + (base * sC_b + before * SC + group * sC_g)) + row_state * sC_n
        if HAS_DHL:
            dh = _load_states(dhl_ptr + (slot * d + offs_d) * N + state, mask_d, NH, NS, half, N, CH, ASM)
        else:
            dh = _zeros(none, NH, CH)
        chunks = tl.cdiv(end - begin, CHUNK)
        if SHARE:
            skip = tl.maximum(item - work * every, 0)
            stop = tl.minimum(items_end - work * every, every)
            waiting = skip > 0
            while waiting:
                waiting = tl.atomic_add(ready_ptr + pid - nblk, 0, sem="acquire") == 0
            tl.debug_barrier()
            at = carry_ptr + ((worker - 1).to(tl.int64) * d + offs_d) * NS + half * NH
            dh = _either(skip > 0, _load_states(at, mask_d & (skip > 0), NH, NS, half, NS, CH, ASM), dh)
        else:
            skip = 0
            stop = chunks
        for later in range(skip, stop):
            k0 = begin + (chunks - 1 - later) * CHUNK
            blocks = tl.cdiv(tl.minimum(CHUNK, end - k0), T)
            at = cs_ptr + ((chunk0 + k0 // CHUNK) * d + offs_d) * N + state
            h = _load_states(at, mask_d & (HAS_H0 | (k0 > 0)), NH, NS, half, N, CH, ASM)
            # (1) states every T tokens, two blocks a turn, the inputs of the next two under way.  The last block is
            # not walked: where it is the second of a turn, nothing of it is `live`, and its inputs come again.
            q = _state_inputs(
                x_p, dt_p, m_p, offs_d, k0, end, walk, frames, half, mask_d, T,
                SX, SDT, MASK, REVERSE, TIME, EVEN, CH, ASM,
            )  # fmt: skip
            rB = load_rows(
                B_p, m_p, sB_n, k0, end, walk, frames, lane, T, SB, NH, NS, CONST_B, MASK, REVERSE, TIME, ASM
            )
            odd_q = _state_inputs(
                x_p, dt_p, m_p, offs_d, k0 + T, end, walk, frames, half, mask_d, T,
                SX, SDT, MASK, REVERSE, TIME, EVEN, CH, ASM,
            )  # fmt: skip
            odd_rB = load_rows(
                B_p, m_p, sB_n, k0 + T, end, walk, frames, lane, T, SB, NH, NS, CONST_B, MASK, REVERSE, TIME, ASM
            )
            for s in range(0, blocks - 1, 2):
                kb = k0 + s * T
                h, q, rB = _rewalk(
                    h, q, rB, scr, s, half < 2, kb, kb + 2 * T, A, Bc, bias, x_p, dt_p, B_p, m_p, offs_d, sB_n, end,
                    walk, frames, lane, half, mask_d, both, put_B, get_B,
                    SX, SDT, SB, NH, NS, X, DT, TYPE, CONST_B, MASK, SOFTPLUS, REVERSE, TIME, EVEN, T, CH, W, ASM,
                )  # fmt: skip
                more = s + 2 < blocks
                h, odd_q, odd_rB = _rewalk(
                    h, odd_q, odd_rB, scr, s + 1, (half < 2) & more, kb + T, tl.where(more, kb + 3 * T, kb + T), A, Bc,
                    bias, x_p, dt_p, B_p, m_p, offs_d, sB_n, end, walk, frames, lane, half, mask_d, both, put_B, get_B,
                    SX, SDT, SB, NH, NS, X, DT, TYPE, CONST_B, MASK, SOFTPLUS, REVERSE, TIME, EVEN, T, CH, W, ASM,
                )  # fmt: skip
            even = blocks % 2 == 1
            q = _either(even, q, odd_q)
            rB = _choose(even, rB, odd_rB)
            # the inputs of the last T tokens: some are here already
            kb = k0 + (blocks - 1) * T
            rC = load_rows(
                C_p, m_p, sC_n, kb, end, walk, frames, lane, T, SC, NH, NS, CONST_C, False, REVERSE, TIME, ASM
            )
            r = _output_inputs(
                z_p, dy_p, s_p, t_p, offs_d, kb, end, walk, frames, half, mask_d, T, SZ, SDY, SY, HAS_Z, ADD,
                REVERSE, TIME, EVEN, CH, ASM,
            )  # fmt: skip
            for ss in range(0, blocks):
                s = blocks - 1 - ss
                kb = k0 + s * T
                # what a token has one of
                own = ()
                for p in tl.static_range(HT):
                    live = kb + 2 * p + half < end
                    x, dt, raw, real = _own_dt(q[p], live, bias, X, DT, MASK, SOFTPLUS, CH, ASM)
                    ds, gate, act, parked = _own_ds(r[p], scale, DY, Z, PARKED, HAS_Z, ADD, CH, ASM)
                    _put_dt(both, p, x, dt, half, CH, ASM)
                    _put_ds(both_ds, p, ds, half, CH, ASM)
                    own = own + ((x, dt, raw, real, ds, gate, act, parked),)
                put_rows(put_B, rB, T, TYPE, CONST_B, ASM)
                put_rows(put_C, rC, T, C_TYPE, CONST_C, ASM)
                if ASM:
                    warp_sync(lane)
                # (2) forward
                states = ()
                sums_B = ()
                sums_C = ()
                for p in tl.static_range(HT):
                    k = kb + 2 * p
                    live = k + half < end
                    x, dt, raw, real, ds, gate, act, parked = own[p]
                    dt0, u0, dt1, u1 = _both_dt(both, p, x, dt, lane, CH, ASM)
                    ds0, ds1 = _both_ds(both_ds, p, ds, lane, CH, ASM)
                    b0, b1 = _channel_rows(
                        get_B, Bc, B_p, sB_n, k, end, walk, frames, half, real, lane, 2 * p,
                        SB, NH, NS, CONST_B, MASK, REVERSE, TIME, CH, ASM,
                    )  # fmt: skip
                    c0, c1 = _channel_rows(
                        get_C, Cc, C_p, sC_n, k, end, walk, frames, half, real, lane, 2 * p,
                        SC, NH, NS, CONST_C, False, REVERSE, TIME, CH, ASM,
                    )  # fmt: skip
                    a0 = _decays(A, dt0, NH, CH, ASM)
                    a1 = _decays(A, dt1, NH, CH, ASM)
                    _keep(kept, 2 * p, a0, NH, CH, ASM)
                    _keep(kept, 2 * p + 1, a1, NH, CH, ASM)
                    h0 = _step(h, a0, b0, u0, NH, CH)
                    states = states + ((h, h0),)
                    h = _step(h0, a1, b1, u1, NH, CH)
                    if HAS_Z or PARK:
                        y = ()
                        dz = ()
                        gated = ()
                        for c in tl.static_range(CH):
                            s_c = own_total(dot(h0[c], c0[c], NH), dot(h[c], c1[c], NH), lane, ASM)
                            if FIRST == 0 and HAS_D:
                                s_c = tl.fma(D[c], x[c], s_c)
                            if ADD:
                                s_c += parked[c]
                            y = y + (s_c,)
                            if HAS_Z:
                                dz = dz + (gate[c] * s_c,)
                                gated = gated + (act[c] * s_c,)
                        ok = live if EVEN else live & mask_d
                        if PARK:
                            to = own_at(s_p, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                            low = own_at(t_p, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                            _park(to, low, y, ok, CH, ASM)
                        elif HAS_Z:
                            to = own_at(dz_ptr + row_dz, offs_d, kb, 2 * p, walk, frames, half, SDZ, REVERSE, TIME)
                            store_values(to, dz, ok, CH, ASM)
                            if OUT:
                                to = own_at(y_ptr + row, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                                store_values(to, gated, ok, CH, ASM)
                    if CONST_C:
                        dCc = _add_each(_add_each(dCc, h0, ds0, NH, CH), h, ds1, NH, CH)
                    else:
                        pC0 = _products(h0, ds0, NH, CH)
                        pC1 = _products(h, ds1, NH, CH)
                        if ASM:
                            sums_C = sums_C + (_lane_sums(_pad(pC0, NH, 8), _pad(pC1, NH, 8), e, lane, EXACT),)
                        else:
                            _store_sums(
                                dBC_ptr + ((pair0 + k // 2) * nblk + blk) * 64 + 32, pC0, pC1, k < end, half, NH
                            )
                # (3) backward; the inputs of the T tokens before come under way.  The sync keeps the compiler from
                # holding in registers what (2) read of shared memory.
                if ASM:
                    warp_sync(lane)
                before_s = tl.maximum(s - 1, 0)
                if ASM:
                    for i in tl.static_range(Q * CH):
                        prefetch(scr + (before_s * Q * CH + i) * 128 * W)
                k = k0 + before_s * T
                q = _state_inputs(
                    x_p, dt_p, m_p, offs_d, k, end, walk, frames, half, mask_d, T,
                    SX, SDT, MASK, REVERSE, TIME, EVEN, CH, ASM,
                )  # fmt: skip
                r = _output_inputs(
                    z_p, dy_p, s_p, t_p, offs_d, k, end, walk, frames, half, mask_d, T, SZ, SDY, SY, HAS_Z, ADD,
                    REVERSE, TIME, EVEN, CH, ASM,
                )  # fmt: skip
                rB = load_rows(
                    B_p, m_p, sB_n, k, end, walk, frames, lane, T, SB, NH, NS, CONST_B, MASK, REVERSE, TIME, ASM
                )
                rC = load_rows(
                    C_p, m_p, sC_n, k, end, walk, frames, lane, T, SC, NH, NS, CONST_C, False, REVERSE, TIME, ASM
                )
                for p in tl.static_range(HT - 1, -1, -1):
                    if p == 0:
                        h = _restore(scr, before_s, half, NH, CH, W, ASM)
                    k = kb + 2 * p
                    live = k + half < end
                    ok = live if EVEN else live & mask_d
                    x, dt, raw, real, ds, _, _, _ = own[p]
                    if not MASK:
                        real = live
                    dt0, u0, dt1, u1 = _both_dt(both, p, x, dt, lane, CH, ASM)
                    ds0, ds1 = _both_ds(both_ds, p, ds, lane, CH, ASM)
                    b0, b1 = _channel_rows(
                        get_B, Bc, B_p, sB_n, k, end, walk, frames, half, real, lane, 2 * p,
                        SB, NH, NS, CONST_B, MASK, REVERSE, TIME, CH, ASM,
                    )  # fmt: skip
                    c0, c1 = _channel_rows(
                        get_C, Cc, C_p, sC_n, k, end, walk, frames, half, real, lane, 2 * p,
                        SC, NH, NS, CONST_C, False, REVERSE, TIME, CH, ASM,
                    )  # fmt: skip
                    ha, hb = states[p]
                    a1 = _kept(kept, 2 * p + 1, A, dt1, NH, CH, ASM)
                    dh, dA, dBc, pB1, gB1, gA1 = _token_back(
                        dh, dA, dBc, A, a1, b1, c1, hb, dt1, u1, ds1, NH, CONST_B, CH
                    )
                    a0 = _kept(kept, 2 * p, A, dt0, NH, CH, ASM)
                    dh, dA, dBc, pB0, gB0, gA0 = _token_back(
                        dh, dA, dBc, A, a0, b0, c0, ha, dt0, u0, ds0, NH, CONST_B, CH
                    )
                    gB = ()
                    gA = ()
                    for c in tl.static_range(CH):
                        gB = gB + (own_total(gB0[c], gB1[c], lane, ASM),)
                        gA = gA + (own_total(gA0[c], gA1[c], lane, ASM),)
                    to_gB = (
                        own_at(gB_ptr + row, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                        if ADD_G or PARK_G
                        else x_p
                    )
                    to_gA = (
                        own_at(gA_ptr + row, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                        if ADD_G or PARK_G
                        else x_p
                    )
                    if ADD_G:
                        gB = _plus(gB, load_fp32(to_gB, ok, CH, ASM), CH)
                        gA = _plus(gA, load_fp32(to_gA, ok, CH, ASM), CH)
                    if PARK_G:
                        store_values(to_gB, gB, ok, CH, ASM)
                        store_values(to_gA, gA, ok, CH, ASM)
                    else:
                        ddt = ()
                        dx = ()
                        for c in tl.static_range(CH):
                            g = gA[c] * LN2 + gB[c] * x[c]
                            if SOFTPLUS:
                                g *= sigmoid(raw[c], ASM)
                            ddt = ddt + (tl.where(real, g, 0.0),)
                            g = gB[c] * dt[c] + D[c] * ds[c]
                            dx = dx + (tl.where(real, g, 0.0) if MASK else g,)
                        dD = _plus_product(dD, ds, x, CH)
                        dbias = _plus(dbias, ddt, CH)
                        to = own_at(dx_ptr + row, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                        store_values(to, dx, ok, CH, ASM)
                        to = own_at(ddt_ptr + row, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                        store_values(to, ddt, ok, CH, ASM)
                    if not CONST_B:
                        if ASM:
                            sums_B = (_lane_sums(_pad(pB0, NH, 8), _pad(pB1, NH, 8), e, lane, EXACT),) + sums_B
                        else:
                            _store_sums(dBC_ptr + ((pair0 + k // 2) * nblk + blk) * 64, pB0, pB1, k < end, half, NH)
                # The sums leave last: nothing waits for the way to them.
                if ASM:
                    for p in tl.static_range(HT):
                        live = kb + 2 * p < end
                        to = dBC_ptr + ((pair0 + kb // 2 + p) * nblk + blk) * 64 + place
                        to_shared = sums + (turn * HT + p) * 2 * 128 * W + warp * 128 + place * 4
                        if not CONST_B:
                            if W == 1:
                                tl.store(to, sums_B[p], mask=live)
                            else:
                                put1(to_shared, sums_B[p])
                        if not CONST_C:
                            if W == 1:
                                tl.store(to + 32, sums_C[p], mask=live)
                            else:
                                put1(to_shared + 128 * W, sums_C[p])
                if ASM:
                    if W > 1:
                        program_sync(lane)
                        # the program's T * 32 sums, a few a thread, warp by warp
                        to = dBC_ptr + ((pair0 + kb // 2) * nblk + blk) * 64
                        for i in tl.static_range(T // W):
                            j = lane + i * 32 * W  # (pair, dB or dC, 32)
                            a = sums + turn * HT * 2 * 128 * W + (j // 32) * 128 * W + (j % 32) * 4
                            total = get1(a)
                            for w in tl.static_range(1, W):
                                total += get1(a + w * 128)
                            tl.store(to + (j // 64 * nblk * 64 + j % 64), total, mask=kb + j // 64 * 2 < end)
                    else:
                        warp_sync(lane)
                    turn = 1 - turn
        if SHARE:
            at = carry_ptr + (worker.to(tl.int64) * d + offs_d) * NS + half * NH
            _store_states(at, dh, mask_d & (stop < every), NH, NS, half, NS, CH, ASM)
            tl.debug_barrier()
            if stop < every:
                tl.atomic_xchg(ready_ptr + pid, 1, sem="release")
        if HAS_DH0:
            whole = mask_d & (stop == chunks)
            _store_states(dh0_ptr + (seq * d + offs_d) * N + state, dh, whole, NH, NS, half, N, CH, ASM)
    part = worker.to(tl.int64)
    at = (part * d + offs_d) * NS + half * NH
    _store_states(dA_ptr + at, dA, mask_d, NH, NS, half, NS, CH, ASM)
    if CONST_B:
        _store_states(dBc_ptr + at, dBc, mask_d, NH, NS, half, NS, CH, ASM)
    if CONST_C:
        _store_states(dCc_ptr + at, dCc, mask_d, NH, NS, half, NS, CH, ASM)
    if not PARK_G:
        for c in tl.static_range(CH):
            at = part * d + offs_d + c
            if HAS_D:
                tl.store(dD_ptr + at, dD[c] + swap(dD[c], lane, ASM), mask=mask_d & (half == 0))
            if HAS_BIAS:
                tl.store(dbias_ptr + at, dbias[c] + swap(dbias[c], lane, ASM), mask=mask_d & (half == 0))


@triton.jit(do_not_specialize=["l", "frames", "splits", "sm_b"])
def _scan_adjoint_kernel(
    dy_ptr, dt_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, mask_ptr, dh_ptr, sum_ptr, scale, l, d, splits, frames,
    sdy_b, sdt_b, sz_b, sC_b, sC_g, sC_n, sm_b,
    SDY: tl.constexpr, SDT: tl.constexpr, SZ: tl.constexpr, SC: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
    CONST_C: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, MASK: tl.constexpr, REVERSE: tl.constexpr,
    TIME: tl.constexpr, SOFTPLUS: tl.constexpr, LS: tl.constexpr, EVEN: tl.constexpr, W: tl.constexpr,
    SHARED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # Grid (sequences * splits * g * cdiv(d / g, 16 W),): what LS tokens send to their left when nothing comes from
    # their right, (sequences * splits, d, n), and their sum of dt: the first of the two sweeps of a split backward.
    # Shared memory, a warp: the 4 rows of C and the pairs of dt and ds of 4 tokens, as in the backward itself.
    # Traffic: dt, dy, z once, C.  Bound: exponentials.
    NH: tl.constexpr = (N + 1) // 2
    BD: tl.constexpr = 16 * W
    C_TYPE: tl.constexpr = C_ptr.dtype.element_ty
    lane = tl.arange(0, 32 * W)
    half = (lane // 16) % 2
    dg = d // GROUPS
    nblk = tl.cdiv(dg, BD)
    pid = tl.program_id(0)
    blk = pid % (nblk * GROUPS)
    slot = pid // (nblk * GROUPS) + tl.zeros([], tl.int64)
    seq = slot // splits
    begin = ((slot % splits) * LS).to(tl.int32)
    end = tl.minimum(begin + LS, l)
    group = blk // nblk
    in_group = (blk % nblk) * BD + (lane // 32) * 16 + lane % 16
    mask_d = in_group < dg
    offs_d = group * dg + in_group
    state = half * NH
    none = tl.zeros([32 * W], tl.float32)
    A = scaled(load_states(A_ptr + offs_d * N + state, mask_d, NH, N, half, N, ASM), LOG2E, NH)
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0) if HAS_BIAS else none
    Cc = load_each(C_ptr + offs_d * SC + state * sC_n, mask_d, sC_n, NH, N, half) if CONST_C else ()
    dt_p = dt_ptr + seq * sdt_b
    dy_p = dy_ptr + seq * sdy_b
    z_p = (z_ptr + seq * sz_b) if HAS_Z else dt_p
    m_p = (mask_ptr + seq * sm_b) if MASK else dt_ptr
    C_p = (C_ptr + (seq * sC_b + group * sC_g)) + row_states(lane, half, NH, ASM) * sC_n
    if ASM:
        shared = reserve(lane // 32 * 768, SHARED)
        both = shared + (lane % 16) * 16
        put_C = shared + 512 + (lane % 32) * 8
        get_C = shared + 512 + half * 32
    else:
        both = lane
        put_C = lane
        get_C = lane
    dh = zeros(none, NH)
    total = none
    blocks = tl.cdiv(end - begin, 4)
    k = begin + 4 * (blocks - 1)
    q = _adjoint_inputs(
        dt_p, dy_p, z_p, m_p, offs_d, k, end, l, frames, half, mask_d,
        SDT, SDY, SZ, HAS_Z, MASK, REVERSE, TIME, EVEN, ASM,
    )  # fmt: skip
    rC = load_rows(C_p, m_p, sC_n, k, end, l, frames, lane, 4, SC, NH, N, CONST_C, False, REVERSE, TIME, ASM)
    for i in range(0, blocks):
        kb = begin + 4 * (blocks - 1 - i)
        own = ()
        for p in tl.static_range(2):
            live = kb + 2 * p + half < end
            raw = value(q[p][0], dt_ptr.dtype.element_ty, ASM) + bias
            dt = softplus(raw, ASM) if SOFTPLUS else raw
            dt = tl.where(live & (q[p][3] != 0) if MASK else live, dt, 0.0)
            ds = value(q[p][1], dy_ptr.dtype.element_ty, ASM) * scale
            if HAS_Z:
                z = value(q[p][2], z_ptr.dtype.element_ty, ASM)
                ds *= z * sigmoid(z, ASM)
            if ASM:
                put2(both + p * 256 + half * 8, dt, ds)
            own = own + ((dt, ds),)
            total += dt
        put_rows(put_C, rC, 4, C_TYPE, CONST_C, ASM)
        if ASM:
            warp_sync(lane)
        k = tl.maximum(kb - 4, begin)
        q = _adjoint_inputs(
            dt_p, dy_p, z_p, m_p, offs_d, k, end, l, frames, half, mask_d,
            SDT, SDY, SZ, HAS_Z, MASK, REVERSE, TIME, EVEN, ASM,
        )  # fmt: skip
        rC = load_rows(C_p, m_p, sC_n, k, end, l, frames, lane, 4, SC, NH, N, CONST_C, False, REVERSE, TIME, ASM)
        for p in tl.static_range(1, -1, -1):
            dt, ds = own[p]
            if ASM:
                dt0, ds0, dt1, ds1 = get4(both + p * 256)
            else:
                dt0, dt1 = to_both(dt, lane, ASM)
                ds0, ds1 = to_both(ds, lane, ASM)
            c0, c1 = pair_rows(
                get_C, Cc, C_p, sC_n, kb + 2 * p, end, l, frames, half, half < 2, lane, 2 * p,
                SC, NH, N, CONST_C, False, REVERSE, TIME, ASM,
            )  # fmt: skip
            dh = _adjoint_step(dh, A, c1, dt1, ds1, NH, ASM)
            dh = _adjoint_step(dh, A, c0, dt0, ds0, NH, ASM)
        if ASM:
            warp_sync(lane)
    store_states(dh_ptr + (slot * d + offs_d) * N + state, dh, mask_d, NH, N, half, N, ASM)
    tl.store(sum_ptr + slot * d + offs_d, total + swap(total, lane, ASM), mask=mask_d & (half == 0))


@triton.jit
def _adjoint_step(dh, A, C, dt, ds, NH: tl.constexpr, ASM: tl.constexpr):
    out = ()
    for i in tl.static_range(NH):
        out = out + ((dh[i] + C[i] * ds) * exp2(A[i] * dt, ASM),)
    return out


@triton.jit
def _adjoint_inputs(
    dt_p, dy_p, z_p, m_p, offs, k, end, l, frames, half, mask_d, SDT: tl.constexpr, SDY: tl.constexpr,
    SZ: tl.constexpr, HAS_Z: tl.constexpr, MASK: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # dt, dy, z and mask of the lane's own token of each pair of the 4 tokens from k
    out = ()
    for j in tl.static_range(0, 4, 2):
        live = k + j + half < end
        ok = live if EVEN else live & mask_d
        dt = load_raw(own_at(dt_p, offs, k, j, l, frames, half, SDT, REVERSE, TIME), ok, ASM)
        dy = load_raw(own_at(dy_p, offs, k, j, l, frames, half, SDY, REVERSE, TIME), ok, ASM)
        z = load_raw(own_at(z_p, offs, k, j, l, frames, half, SZ, REVERSE, TIME), ok, ASM) if HAS_Z else dt
        if MASK:
            m = tl.load(own_at(m_p, half * 0, k, j, l, frames, half, 1, REVERSE, TIME), mask=live, other=0)
        else:
            m = dt
        out = out + ((dt, dy, z, m),)
    return out
