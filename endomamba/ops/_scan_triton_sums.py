"""What comes after the scan in Triton: sums over its programs, and the two directions put together.

Letters: b sequences, l tokens, d channels, n state size, g groups of B and C.
"""

import triton
import triton.language as tl

from ._triton_math import sigmoid
from ._triton_scan import offset


@triton.jit(do_not_specialize=["total", "l"])
def _combine_kernel(
    s_ptr, z_ptr, dy_ptr, out_ptr, y_ptr, scale, total, l, d, sz_b, sdy_b, SZ: tl.constexpr, SDY: tl.constexpr,
    SO: tl.constexpr, HAS_Z: tl.constexpr, BACK: tl.constexpr, OUT: tl.constexpr, BLOCK: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    # Grid (cdiv(b * l * d, BLOCK),): y = scale * (s_0 + s_1) * silu(z), or, BACK, dz, and, OUT, y too.  Memory bound:
    # 8 bytes an element of s, and z, y, dy once.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < total
    s = (tl.load(s_ptr + i, mask=mask, other=0.0) + tl.load(s_ptr + total + i, mask=mask, other=0.0)) * scale
    row = i // d
    at = row // l, row % l, i % d
    if HAS_Z:
        z = tl.load(z_ptr + at[0] * sz_b + at[1] * SZ + at[2], mask=mask, other=0.0).to(tl.float32)
        sig = sigmoid(z, ASM)
        if BACK:
            dy = tl.load(dy_ptr + at[0] * sdy_b + at[1] * SDY + at[2], mask=mask, other=0.0).to(tl.float32)
            if OUT:
                tl.store(y_ptr + i, (s * z * sig).to(y_ptr.dtype.element_ty), mask=mask)
            s *= dy * sig * (1.0 + z * (1.0 - sig))
        else:
            s *= z * sig
    tl.store(out_ptr + row * SO + at[2], s.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_rows(
    pid, in_ptr, dB_ptr, dC_ptr, cu_ptr, l, tiles, nblk, frames,
    GROUPS: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, NS: tl.constexpr, CONST_B: tl.constexpr,
    CONST_C: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr, UP: tl.constexpr,
    TP: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    # TP pairs of tokens of one sequence: the rows that the programs of a group's channel blocks left, (pairs, blocks,
    # dB | dC, token of the pair, half, 8), block by block, times UP.
    NH: tl.constexpr = (NS + 1) // 2
    group = pid % GROUPS
    seq = (pid // GROUPS // tiles).to(tl.int64)
    pair = (pid // GROUPS % tiles) * TP + tl.arange(0, TP)
    if PACKED:
        before = tl.load(cu_ptr + seq).to(tl.int64)
        count = (tl.load(cu_ptr + seq + 1).to(tl.int64) - before).to(tl.int32)
        pair0 = before // 2 + seq
        row0 = before
    else:
        count = l
        pair0 = seq * tl.cdiv(l, 2)
        row0 = seq * l
    v = tl.arange(0, 64)
    k = pair[:, None] * 2 + (v % 32 // 16)[None, :]
    state = (v % 16 // 8) * NH + v % 8
    live = (k < count) & ((v % 8 < NH) & (state < NS))[None, :]
    per = nblk // GROUPS
    total = tl.zeros([TP, 64], tl.float32)
    p = in_ptr + ((pair0 + pair)[:, None] * nblk + group * per) * 64 + v[None, :]
    for first in range(0, per, 32):  # 32 by 32: the error grows with the number of sums one after the other
        last = tl.minimum(first + 32, per)
        part = tl.zeros([TP, 64], tl.float32)
        for j in range(first, last, U):
            rows = ()
            for u in tl.static_range(U):  # U loads in flight, added in their order
                rows = rows + (tl.load(p + (j + u) * 64, mask=live & (j + u < last), other=0.0),)
            for u in tl.static_range(U):
                part += rows[u]
        total += part
    total *= UP
    token = offset(k, count, frames, 1, REVERSE, TIME)
    to = ((row0 + token) * GROUPS + group) * N + FIRST + state[None, :]
    if not CONST_B:
        tl.store(dB_ptr + to, total.to(dB_ptr.dtype.element_ty), mask=live & (v < 32)[None, :])
    if not CONST_C:
        tl.store(dC_ptr + to, total.to(dC_ptr.dtype.element_ty), mask=live & (v >= 32)[None, :])


@triton.jit
def _sum_parts(
    pid, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, parts, d,
    N: tl.constexpr, FIRST: tl.constexpr, NS: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    # BLOCK parameter gradients, part by part
    i = pid * BLOCK + tl.arange(0, BLOCK)
    ok = i < d * NS
    first = i < d
    a = tl.zeros([BLOCK], tl.float32)
    b = tl.zeros([BLOCK], tl.float32)
    c = tl.zeros([BLOCK], tl.float32)
    e = tl.zeros([BLOCK], tl.float32)
    f = tl.zeros([BLOCK], tl.float32)
    for p0 in range(0, parts, U):
        loaded = ()
        for u in tl.static_range(U):  # U parts in flight, added in their order
            p = p0 + u
            at = p * d * NS + i
            here = ok & (p < parts)
            f0 = first & (p < parts)
            va = tl.load(A_ptr + at, mask=here, other=0.0)
            vb = tl.load(B_ptr + at, mask=here, other=0.0) if CONST_B else va
            vc = tl.load(C_ptr + at, mask=here, other=0.0) if CONST_C else va
            ve = tl.load(D_ptr + p * d + i, mask=f0, other=0.0) if HAS_D else va
            vf = tl.load(bias_ptr + p * d + i, mask=f0, other=0.0) if HAS_BIAS else va
            loaded = loaded + ((va, vb, vc, ve, vf),)
        for u in tl.static_range(U):
            a += loaded[u][0]
            b += loaded[u][1]
            c += loaded[u][2]
            e += loaded[u][3]
            f += loaded[u][4]
    to = i // NS * N + FIRST + i % NS
    tl.store(dA_ptr + to, a, mask=ok)
    if CONST_B:
        tl.store(dB_ptr + to, b, mask=ok)
    if CONST_C:
        tl.store(dC_ptr + to, c, mask=ok)
    if HAS_D:
        tl.store(dD_ptr + i, e, mask=first)
    if HAS_BIAS:
        tl.store(dbias_ptr + i, f, mask=first)


@triton.jit(do_not_specialize=["l", "tiles", "frames", "parts", "first_pid"])
def _scan_sums_kernel(
    rows_ptr, dB_ptr, dC_ptr, cu_ptr, pA_ptr, pB_ptr, pC_ptr, pD_ptr, pbias_ptr, dA_ptr, dD_ptr, dbias_ptr,
    l, tiles, nblk, frames, parts, d, first_pid,
    GROUPS: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, NS: tl.constexpr, CONST_B: tl.constexpr,
    CONST_C: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
    TIME: tl.constexpr, UP: tl.constexpr, TP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Grid (cdiv(d * NS, BLOCK) + sequences * tiles * g,): what the programs of the backward scan left, added in a fixed
    #   order: of the parameters, one part a program, and of dB and dC, one row a pair of tokens and channel block.
    # Traffic: every part and row read once, several loads of a lane in flight.
    pid = tl.program_id(0)
    if pid < first_pid:
        _sum_parts(
            pid, pA_ptr, pB_ptr, pC_ptr, pD_ptr, pbias_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, parts, d,
            N, FIRST, NS, CONST_B, CONST_C, HAS_D, HAS_BIAS, BLOCK, 8,
        )  # fmt: skip
    else:
        if not (CONST_B and CONST_C):
            _sum_rows(
                pid - first_pid, rows_ptr, dB_ptr, dC_ptr, cu_ptr, l, tiles, nblk, frames,
                GROUPS, N, FIRST, NS, CONST_B, CONST_C, PACKED, REVERSE, TIME, UP, TP, 4,
            )  # fmt: skip
