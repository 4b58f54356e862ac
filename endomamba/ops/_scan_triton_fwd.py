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
    load_raw,
    load_rows,
    load_states,
    own_at,
    own_total,
    pair_rows,
    put_rows,
    row_states,
    scaled,
    store_states,
    swap,
    to_both,
    value,
    zeros,
)
from ._triton_shared import get4, put2, reserve, warp_sync


@triton.jit
def _block_inputs(
    x_p, dt_p, z_p, s_p, m_p, offs, k, end, l, frames, half, mask_d, T: tl.constexpr, SX: tl.constexpr,
    SDT: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, HAS_Z: tl.constexpr, ADD: tl.constexpr, MASK: tl.constexpr,
    REVERSE: tl.constexpr, TIME: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # x, dt, z, parked s and mask of the lane's own token of each pair of the T tokens from k
    out = ()
    for j in tl.static_range(0, T, 2):
        live = k + j + half < end
        ok = live if EVEN else live & mask_d
        x = load_raw(own_at(x_p, offs, k, j, l, frames, half, SX, REVERSE, TIME), ok, ASM)
        dt = load_raw(own_at(dt_p, offs, k, j, l, frames, half, SDT, REVERSE, TIME), ok, ASM)
        z = load_raw(own_at(z_p, offs, k, j, l, frames, half, SZ, REVERSE, TIME), ok, ASM) if HAS_Z else x
        s = tl.load(own_at(s_p, offs, k, j, l, frames, half, SY, REVERSE, TIME), mask=ok, other=0.0) if ADD else x
        if MASK:
            m = tl.load(own_at(m_p, half * 0, k, j, l, frames, half, 1, REVERSE, TIME), mask=live, other=0)
        else:
            m = x
        out = out + ((x, dt, z, s, m),)
    return out


@triton.jit(do_not_specialize=["l", "frames", "splits", "sm_b"])
def _scan_fwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, s_ptr, y_ptr, hl_ptr, cs_ptr, sum_ptr, cu_ptr,
    mask_ptr, scale, l, d, splits, frames, sx_b, sdt_b, sz_b, sB_b, sC_b, sB_g, sC_g, sB_n, sC_n, sm_b,
    SX: tl.constexpr, SDT: tl.constexpr, SZ: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr, SY: tl.constexpr,
    GROUPS: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, NS: tl.constexpr,
    CONST_B: tl.constexpr, CONST_C: tl.constexpr, HAS_Z: tl.constexpr, HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_H0: tl.constexpr, ADD: tl.constexpr, FINAL: tl.constexpr, SAVE: tl.constexpr, PACKED: tl.constexpr,
    MASK: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr, SOFTPLUS: tl.constexpr, Y: tl.constexpr,
    LS: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr, W: tl.constexpr, SHARED: tl.constexpr, ASM: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    # Grid (sequences * splits * g * cdiv(d / g, 16 W),): a program owns 16 W channels of one sequence (LS > 0: of LS
    # of its tokens) and states FIRST .. FIRST + NS - 1 of n; lanes as in _triton_scan.
    # T tokens at a time: each lane works out what its own tokens have one of a channel (dt, dt x, gate) and brings its
    #   share of their rows of B and C; both meet in shared memory, 256 bytes a token and warp.  Meanwhile the inputs of
    #   the next T tokens are under way.
    # Traffic: x, dt, z read once, y written once, 4 * b*l*d elements; B, C: 2 * b*l*n for each channel block, from L2
    #   after the first.  The second direction adds an fp32 s that the first left: 8 bytes an element.
    # Numerics: A times log2(e), so a decay is one exp2; a token that is masked, or past the end, has dt = 0 after
    #   softplus and x = 0, the identity of the recurrence.  Every walk is strictly left to right.
    # Bound: exponentials; n + 3 a token and channel at 16 a clock and SM.
    NH: tl.constexpr = (NS + 1) // 2
    BD: tl.constexpr = 16 * W
    HT: tl.constexpr = T // 2
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
    x_p = x_ptr + (base * sx_b + before * SX)
    dt_p = dt_ptr + (base * sdt_b + before * SDT)
    z_p = (z_ptr + (base * sz_b + before * SZ)) if HAS_Z else x_p
    out = base * l * SY + before * SY
    s_p = (s_ptr + out) if ADD else x_p
    y_p = (y_ptr + out) if Y else x_p
    m_p = (mask_ptr + (base * sm_b + before)) if MASK else x_ptr
    row_state = FIRST + row_states(lane, half, NH, ASM)
    B_p = (B_ptr + (base * sB_b + before * SB + group * sB_g)) + row_state * sB_n
    C_p = ((C_ptr + (base * sC_b + before * SC + group * sC_g)) + row_state * sC_n) if Y else B_p
    cs_p = (cs_ptr + (chunk0 * d + offs_d) * N + state) if SAVE else A_ptr + offs_d
    if ASM:
        shared = reserve(lane // 32 * (256 * T), SHARED)
        both = shared + (lane % 16) * 16  # dt, dt x of a pair's two tokens
        put_B = shared + 128 * T + (lane % 32) * 8
        get_B = shared + 128 * T + half * 32
    else:
        both = lane
        put_B = lane
        get_B = lane
    put_C = put_B + 64 * T
    get_C = get_B + 64 * T

    end = start + count
    q = _block_inputs(
        x_p, dt_p, z_p, s_p, m_p, offs_d, start, end, l, frames, half, mask_d, T, SX, SDT, SZ, SY,
        HAS_Z, ADD, MASK, REVERSE, TIME, EVEN, ASM,
    )  # fmt: skip
    rB = load_rows(B_p, m_p, sB_n, start, end, l, frames, lane, T, SB, NH, NS, CONST_B, MASK, REVERSE, TIME, ASM)
    rC = load_rows(
        C_p, m_p, sC_n, start, end, l, frames, lane, T, SC, NH, NS, CONST_C or not Y, False, REVERSE, TIME, ASM
    )
    total = none
    for c in range(0, tl.cdiv(count, CHUNK)):
        k0 = start + c * CHUNK
        if SAVE:
            store_states(cs_p + (c + wide) * N * d, h, mask_d, NH, NS, half, N, ASM)
        for kb in range(k0, tl.minimum(k0 + CHUNK, end), T):
            own = ()
            for p in tl.static_range(HT):
                live = kb + 2 * p + half < end
                x = value(q[p][0], x_ptr.dtype.element_ty, ASM)
                dt = value(q[p][1], dt_ptr.dtype.element_ty, ASM) + bias
                if SOFTPLUS:
                    dt = softplus(dt, ASM)
                real = live & (q[p][4] != 0) if MASK else live
                # after softplus: decay 1 and input 0 leave the state as it was
                dt = tl.where(real, dt, 0.0)
                if MASK:
                    x = tl.where(real, x, 0.0)
                if not Y:
                    total += dt
                gate = scale
                if HAS_Z:
                    z = value(q[p][2], z_ptr.dtype.element_ty, ASM)
                    gate = scale * z * sigmoid(z, ASM)
                if ASM:
                    put2(both + p * 256 + half * 8, dt, dt * x)
                own = own + ((x, dt, real, gate, q[p][3]),)
            put_rows(put_B, rB, T, B_ptr.dtype.element_ty, CONST_B, ASM)
            put_rows(put_C, rC, T, C_ptr.dtype.element_ty, CONST_C or not Y, ASM)
            if ASM:
                warp_sync(lane)
            q = _block_inputs(
                x_p, dt_p, z_p, s_p, m_p, offs_d, kb + T, end, l, frames, half, mask_d, T, SX, SDT, SZ, SY,
                HAS_Z, ADD, MASK, REVERSE, TIME, EVEN, ASM,
            )  # fmt: skip
            rB = load_rows(
                B_p, m_p, sB_n, kb + T, end, l, frames, lane, T, SB, NH, NS, CONST_B, MASK, REVERSE, TIME, ASM
            )
            rC = load_rows(
                C_p, m_p, sC_n, kb + T, end, l, frames, lane, T, SC, NH, NS, CONST_C or not Y, False,
                REVERSE, TIME, ASM,
            )  # fmt: skip
            for p in tl.static_range(HT):
                k = kb + 2 * p
                x, dt, real, gate, parked = own[p]
                if ASM:
                    dt0, u0, dt1, u1 = get4(both + p * 256)
                else:
                    dt0, dt1 = to_both(dt, lane, ASM)
                    u0, u1 = to_both(dt * x, lane, ASM)
                b0, b1 = pair_rows(
                    get_B, Bc, B_p, sB_n, k, end, l, frames, half, real, lane, 2 * p,
                    SB, NH, NS, CONST_B, MASK, REVERSE, TIME, ASM,
                )  # fmt: skip
                h = advance(h, decays(A, dt0, NH, ASM), b0, u0, NH)
                h1 = advance(h, decays(A, dt1, NH, ASM), b1, u1, NH)
                if Y:
                    c0, c1 = pair_rows(
                        get_C, Cc, C_p, sC_n, k, end, l, frames, half, real, lane, 2 * p,
                        SC, NH, NS, CONST_C, False, REVERSE, TIME, ASM,
                    )  # fmt: skip
                    y = own_total(dot(h, c0, NH), dot(h1, c1, NH), lane, ASM)
                    if HAS_D:
                        y = tl.fma(D, x, y)
                    if ADD:
                        y += parked
                    y *= gate
                    ok = k + half < end if EVEN else (k + half < end) & mask_d
                    to = own_at(y_p, offs_d, kb, 2 * p, l, frames, half, SY, REVERSE, TIME)
                    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=ok)
                h = h1
            if ASM:
                warp_sync(lane)
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
