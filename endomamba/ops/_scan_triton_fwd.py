"""The forward scan in Triton.  One launch walks one direction; what follows adds to what it parked.

Letters: b sequences, l tokens, d channels, n state size, g groups of B and C.
"""

import triton
import triton.language as tl

from ._triton_math import LOG2E, exp2, sigmoid, softplus
from ._triton_scan import (
    advance,
    decays,
    dot,
    load_each,
    load_row,
    load_states,
    offset,
    own_total,
    scaled,
    select,
    store_states,
    swap,
    to_both,
    unpack,
    zeros,
)


@triton.jit
def _own(p, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=mask, other=0.0)


@triton.jit
def _pair_inputs(
    x_p, dt_p, z_p, s_p, m_p, mask_d, HAS_Z: tl.constexpr, ADD: tl.constexpr, MASK: tl.constexpr, EVEN: tl.constexpr
):
    # x, dt, z, parked s and mask of the lane's own token
    x = _own(x_p, mask_d, EVEN)
    dt = _own(dt_p, mask_d, EVEN)
    z = _own(z_p, mask_d, EVEN) if HAS_Z else x
    s = _own(s_p, mask_d, EVEN) if ADD else x
    m = tl.load(m_p) if MASK else x
    return x, dt, z, s, m


@triton.jit
def _pair_rows(
    B_p, C_p, o0B, o1B, o0C, o1C, sB_n, sC_n, half,
    NH: tl.constexpr, NS: tl.constexpr, VEC: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    Y: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    B0 = () if CONST_B else load_row(B_p + o0B, sB_n, NH, NS, half, VEC, ASM)
    B1 = () if CONST_B else load_row(B_p + o1B, sB_n, NH, NS, half, VEC, ASM)
    C0 = load_row(C_p + o0C, sC_n, NH, NS, half, VEC, ASM) if Y and not CONST_C else ()
    C1 = load_row(C_p + o1C, sC_n, NH, NS, half, VEC, ASM) if Y and not CONST_C else ()
    return B0, B1, C0, C1


@triton.jit
def _pair_step(
    h, total, A, Bc, Cc, own, rows, bias, D, y_p, store, live, scale, lane,
    NH: tl.constexpr, VEC: tl.constexpr, TYPE: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr,
    Y: tl.constexpr, HAS_Z: tl.constexpr, ADD: tl.constexpr, MASK: tl.constexpr, TAIL: tl.constexpr,
    SOFTPLUS: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    x = own[0].to(tl.float32)
    dt = own[1].to(tl.float32) + bias
    if SOFTPLUS:
        dt = softplus(dt, ASM)
    if MASK:
        real = own[4] != 0
        if TAIL:
            real = real & live
    else:
        real = live
    if MASK or TAIL:  # after softplus: decay 1 and input 0 leave the state as it was
        dt = tl.where(real, dt, 0.0)
        x = tl.where(real, x, 0.0)
    dt0, dt1 = to_both(dt, lane, ASM)
    u0, u1 = to_both(dt * x, lane, ASM)
    B0 = Bc if CONST_B else unpack(rows[0], NH, VEC, TYPE)
    B1 = Bc if CONST_B else unpack(rows[1], NH, VEC, TYPE)
    if MASK:
        r0, r1 = to_both(real.to(tl.float32), lane, ASM)
        B0 = select(r0 != 0.0, B0, NH)
        B1 = select(r1 != 0.0, B1, NH)
    h = advance(h, decays(A, dt0, NH, ASM), B0, u0, NH)
    if Y:
        s0 = dot(h, Cc if CONST_C else unpack(rows[2], NH, VEC, TYPE), NH)
    h = advance(h, decays(A, dt1, NH, ASM), B1, u1, NH)
    if Y:
        s1 = dot(h, Cc if CONST_C else unpack(rows[3], NH, VEC, TYPE), NH)
        y = own_total(s0, s1, lane, ASM) + D * x
        if ADD:
            y += own[3].to(tl.float32)
        y *= scale
        if HAS_Z:
            z = own[2].to(tl.float32)
            y *= z * sigmoid(z, ASM)
        if TAIL:
            tl.store(y_p, y.to(y_p.dtype.element_ty), mask=store & live)
        elif EVEN:
            tl.store(y_p, y.to(y_p.dtype.element_ty))
        else:
            tl.store(y_p, y.to(y_p.dtype.element_ty), mask=store)
    else:
        total += dt
    return h, total


@triton.jit(do_not_specialize=["l", "frames", "splits", "sm_b"])
def _scan_fwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, s_ptr, y_ptr, hl_ptr, cs_ptr, sum_ptr, cu_ptr,
    mask_ptr, scale, l, d, splits, frames, sx_b, sdt_b, sz_b, sB_b, sC_b, sB_g, sC_g, sB_n, sC_n, sm_b,
    SX: tl.constexpr, SDT: tl.constexpr, SZ: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, SY: tl.constexpr,
    GROUPS: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, NS: tl.constexpr, VEC: tl.constexpr,
    CONST_B: tl.constexpr, CONST_C: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_H0: tl.constexpr, ADD: tl.constexpr, FINAL: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr,
    MASK: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr, SOFTPLUS: tl.constexpr, Y: tl.constexpr,
    LS: tl.constexpr, EVEN: tl.constexpr, K: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # Grid (sequences * splits * g * cdiv(d / g, 16 W),): a program owns 16 W channels of one sequence (LS > 0: of LS
    # of its tokens) and states FIRST .. FIRST + NS - 1 of n; lanes as in _triton_scan.
    # Registers: A and h, the inputs of the next K pairs, B and C of the next pair, so that a load has a pair's time.
    # Traffic: x, dt, z read once, y written once, 4 * b*l*d elements; B, C: 2 * b*l*n for each channel block, from L2
    #   after the first.  The second direction adds an fp32 s that the first left: 8 bytes an element.
    # Numerics: A times log2(e), so a decay is one exp2; a token that is masked, or past the end, has dt = 0 after
    #   softplus and x = 0, the identity of the recurrence.  Every walk is strictly left to right.
    # Bound: exponentials; n + 3 a token and channel at 16 a clock and SM.
    NH: tl.constexpr = (NS + 1) // 2
    BD: tl.constexpr = 16 * W
    TYPE: tl.constexpr = B_ptr.dtype.element_ty
    lane = tl.arange(0, 32 * W)
    half = (lane // 16) % 2
    dg = d // GROUPS
    blocks = tl.cdiv(dg, BD)
    pid = tl.program_id(0)
    blk = pid % (blocks * GROUPS)
    work = pid // (blocks * GROUPS)
    group = blk // blocks
    in_group = (blk % blocks) * BD + (lane // 32) * 16 + lane % 16
    mask_d = in_group < dg
    offs_d = group * dg + in_group
    state = FIRST + half * NH
    if LS > 0:
        seq = (work // splits).to(tl.int64)
        start = (work % splits) * LS
        count = tl.minimum(LS, l - start)
        slot = work.to(tl.int64)
        chunk0 = seq * tl.cdiv(l, CHUNK) + start // CHUNK
        base = seq
        before = tl.zeros([], tl.int64)
    elif PACKED:
        seq = work.to(tl.int64)
        before = tl.load(cu_ptr + seq).to(tl.int64)
        count = (tl.load(cu_ptr + seq + 1).to(tl.int64) - before).to(tl.int32)
        chunk0 = before // CHUNK + seq
        before = tl.minimum(before, l - 1)  # an empty last sequence looks at a token that is there
        l = count
        start = 0
        slot = seq
        base = tl.zeros([], tl.int64)
    else:
        seq = work.to(tl.int64)
        start = 0
        count = l
        slot = seq
        chunk0 = seq * tl.cdiv(l, CHUNK)
        base = seq
        before = tl.zeros([], tl.int64)
    A = scaled(load_states(A_ptr + offs_d * N + state, mask_d, NH, NS, half, N, ASM), LOG2E, NH)
    none = tl.zeros([32 * W], tl.float32)
    wide = tl.zeros([], tl.int64)
    D = tl.load(D_ptr + offs_d, mask=mask_d, other=0.0) if HAS_D else none
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0) if HAS_BIAS else none
    if HAS_H0:
        h = load_states(h0_ptr + (slot * d + offs_d) * N + state, mask_d, NH, NS, half, N, ASM)
    else:
        h = zeros(none, NH)
    Bc = load_each(B_ptr + offs_d * SB + state * sB_n, mask_d, sB_n, NH, NS, half) if CONST_B else ()
    Cc = load_each(C_ptr + offs_d * SC + state * sC_n, mask_d, sC_n, NH, NS, half) if CONST_C and Y else ()
    x_p = x_ptr + base * sx_b + before * SX + offs_d
    dt_p = dt_ptr + base * sdt_b + before * SDT + offs_d
    z_p = (z_ptr + base * sz_b + before * SZ + offs_d) if HAS_Z else x_p
    out = base * l * SY + before * SY + offs_d
    s_p = (s_ptr + out) if ADD else x_p
    y_p = (y_ptr + out) if Y else x_p
    m_p = (mask_ptr + base * sm_b + before) if MASK else x_ptr
    if VEC > 0:  # the same row for every channel: one address a half
        B_p = B_ptr + base * sB_b + before * SB + group * sB_g + state
        C_p = (C_ptr + base * sC_b + before * SC + group * sC_g + state) if Y else B_p
    else:
        B_p = B_ptr + base * sB_b + before * SB + group * sB_g + state * sB_n
        C_p = (C_ptr + base * sC_b + before * SC + group * sC_g + state * sC_n) if Y else B_p
    cs_p = (cs_ptr + (chunk0 * d + offs_d) * N + state) if SAVE else A_ptr + offs_d

    TILE: tl.constexpr = 2 * K  # tokens
    tiles = count // TILE
    tail = count - tiles * TILE
    ahead = tl.where(tiles > 0, 0, count - TILE)
    q = ()
    for j in tl.static_range(K):
        k = start + tl.maximum(ahead + 2 * j + half, 0)
        q = q + (
            _pair_inputs(
                x_p + offset(k, l, frames, SX, REVERSE, TIME), dt_p + offset(k, l, frames, SDT, REVERSE, TIME),
                z_p + offset(k, l, frames, SZ, REVERSE, TIME), s_p + offset(k, l, frames, SY, REVERSE, TIME),
                m_p + offset(k, l, frames, 1, REVERSE, TIME), mask_d, HAS_Z, ADD, MASK, EVEN,
            ),
        )  # fmt: skip
    k0 = start + tl.maximum(ahead, 0)
    k1 = start + tl.maximum(ahead + 1, 0)
    rows = _pair_rows(
        B_p, C_p, offset(k0, l, frames, SB, REVERSE, TIME), offset(k1, l, frames, SB, REVERSE, TIME),
        offset(k0, l, frames, SC, REVERSE, TIME), offset(k1, l, frames, SC, REVERSE, TIME), sB_n, sC_n, half,
        NH, NS, VEC, CONST_B, CONST_C, Y, ASM,
    )  # fmt: skip
    G: tl.constexpr = -1 if REVERSE else 1
    total = none
    PER: tl.constexpr = CHUNK // TILE
    chunks = tl.cdiv(tiles, PER)
    for c in range(0, chunks):
        if SAVE:
            store_states(cs_p + (c + wide) * N * d, h, mask_d, NH, NS, half, N, ASM)
        for t in range(c * PER, tl.minimum((c + 1) * PER, tiles)):
            here = t * TILE
            ahead = tl.minimum(here + TILE, count - TILE)
            if TIME:
                xn, dtn, zn, sn, mn, yn = x_p, dt_p, z_p, s_p, m_p, y_p
            else:
                k = start + ahead + half
                xn = x_p + offset(k, l, frames, SX, REVERSE, TIME)
                dtn = dt_p + offset(k, l, frames, SDT, REVERSE, TIME)
                zn = z_p + offset(k, l, frames, SZ, REVERSE, TIME)
                sn = s_p + offset(k, l, frames, SY, REVERSE, TIME)
                mn = m_p + offset(k, l, frames, 1, REVERSE, TIME)
                yn = y_p + offset(start + here + half, l, frames, SY, REVERSE, TIME)
            for j in tl.static_range(K):
                if TIME:
                    k = start + ahead + 2 * j + half
                    new = _pair_inputs(
                        xn + offset(k, l, frames, SX, REVERSE, TIME), dtn + offset(k, l, frames, SDT, REVERSE, TIME),
                        zn + offset(k, l, frames, SZ, REVERSE, TIME), sn + offset(k, l, frames, SY, REVERSE, TIME),
                        mn + offset(k, l, frames, 1, REVERSE, TIME), mask_d, HAS_Z, ADD, MASK, EVEN,
                    )  # fmt: skip
                    y_at = y_p + offset(start + here + 2 * j + half, l, frames, SY, REVERSE, TIME)
                else:
                    new = _pair_inputs(
                        xn + 2 * G * j * SX, dtn + 2 * G * j * SDT, zn + 2 * G * j * SZ, sn + 2 * G * j * SY,
                        mn + 2 * G * j, mask_d, HAS_Z, ADD, MASK, EVEN,
                    )  # fmt: skip
                    y_at = yn + 2 * G * j * SY
                k0 = start + (here + 2 * (j + 1) if j + 1 < K else ahead)
                new_rows = _pair_rows(
                    B_p, C_p, offset(k0, l, frames, SB, REVERSE, TIME), offset(k0 + 1, l, frames, SB, REVERSE, TIME),
                    offset(k0, l, frames, SC, REVERSE, TIME), offset(k0 + 1, l, frames, SC, REVERSE, TIME),
                    sB_n, sC_n, half, NH, NS, VEC, CONST_B, CONST_C, Y, ASM,
                )  # fmt: skip
                h, total = _pair_step(
                    h, total, A, Bc, Cc, q[0], rows, bias, D, y_at, mask_d, mask_d, scale, lane,
                    NH, VEC, TYPE, CONST_B, CONST_C, Y, HAS_Z, ADD, MASK, False, SOFTPLUS, EVEN, ASM,
                )  # fmt: skip
                q = q[1:] + (new,)
                rows = new_rows
    if SAVE:  # noqa: SIM102  the first is decided when compiling
        if ((tiles * TILE) % CHUNK == 0) & (tail > 0):
            store_states(cs_p + (tiles * TILE // CHUNK + wide) * N * d, h, mask_d, NH, NS, half, N, ASM)
    for j in tl.static_range(K):  # q and rows hold the last TILE tokens, of which `tail` are left
        if 2 * j + 1 >= TILE - tail:
            k = start + tl.maximum(count - TILE + 2 * j + half, 0)
            k0 = start + tl.maximum(count - TILE + 2 * j, 0)
            k1 = start + tl.maximum(count - TILE + 2 * j + 1, 0)
            last = _pair_rows(
                B_p, C_p, offset(k0, l, frames, SB, REVERSE, TIME), offset(k1, l, frames, SB, REVERSE, TIME),
                offset(k0, l, frames, SC, REVERSE, TIME), offset(k1, l, frames, SC, REVERSE, TIME), sB_n, sC_n, half,
                NH, NS, VEC, CONST_B, CONST_C, Y, ASM,
            )  # fmt: skip
            h, total = _pair_step(
                h, total, A, Bc, Cc, q[j], last, bias, D, y_p + offset(k, l, frames, SY, REVERSE, TIME), mask_d,
                2 * j + half >= TILE - tail, scale, lane,
                NH, VEC, TYPE, CONST_B, CONST_C, Y, HAS_Z, ADD, MASK, True, SOFTPLUS, EVEN, ASM,
            )  # fmt: skip
    if FINAL:
        store_states(hl_ptr + (slot * d + offs_d) * N + state, h, mask_d, NH, NS, half, N, ASM)
    if not Y:
        tl.store(sum_ptr + slot * d + offs_d, total + swap(total, lane, ASM), mask=mask_d & (half == 0))


@triton.jit
def _scan_carry_kernel(
    A_ptr, edge_ptr, local_ptr, sum_ptr, out_ptr, splits, d, HAS_EDGE: tl.constexpr, OUT: tl.constexpr,
    BACK: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, U: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # Grid (sequences * cdiv(d * n, BLOCK),): what each piece leaves alone, (sequences, splits, d, n), becomes what it
    # starts from, in place: state = exp(A * sum of dt) * state + local, strictly left to right (BACK: right to left).
    # edge: what the first starts from, out: what the last leaves, (sequences, d, n).  U pieces are loaded at a time.
    blocks = tl.cdiv(d * N, BLOCK)
    pid = tl.program_id(0)
    offs = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    seq = pid // blocks + tl.zeros([], tl.int64)
    mask = offs < d * N
    A = tl.load(A_ptr + offs, mask=mask, other=0.0) * LOG2E
    if HAS_EDGE:
        h = tl.load(edge_ptr + seq * d * N + offs, mask=mask, other=0.0)
    else:
        h = tl.zeros([BLOCK], tl.float32)
    for s0 in range(0, splits, U):
        q = ()
        for j in tl.static_range(U):
            s = seq * splits + (splits - 1 - (s0 + j) if BACK else s0 + j)
            there = mask & (s0 + j < splits)
            local = tl.load(local_ptr + s * d * N + offs, mask=there, other=0.0)
            q = q + ((local, tl.load(sum_ptr + s * d + offs // N, mask=there, other=0.0)),)
        for j in tl.static_range(U):
            s = seq * splits + (splits - 1 - (s0 + j) if BACK else s0 + j)
            tl.store(local_ptr + s * d * N + offs, h, mask=mask & (s0 + j < splits))
            h = exp2(A * q[j][1], ASM) * h + q[j][0]
    if OUT:
        tl.store(out_ptr + seq * d * N + offs, h, mask=mask)
