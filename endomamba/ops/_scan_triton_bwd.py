"""The backward scan in Triton.  One launch walks one direction; what follows adds to what it parked.

Letters: b sequences, l tokens, d channels, n state size, g groups of B and C.
"""

import triton
import triton.language as tl

from ._scan_triton_lane import (
    add_products,
    channel_decays,
    channel_rows,
    channel_zeros,
    choose,
    choose_each,
    get_ds,
    get_dt,
    keep,
    kept_decays,
    load_channels,
    load_constant,
    load_parameter,
    load_parked,
    park,
    parked_values,
    plus,
    plus_product,
    products,
    put_ds,
    put_dt,
    restore_states,
    save_states,
    steps,
    store_channels,
)
from ._triton_lane_sums import lane_sums, one_hots, pad, store_sums
from ._triton_math import LN2, LOG2E, sigmoid, softplus
from ._triton_scan import (
    dot,
    load_fp32,
    load_rows,
    load_states,
    load_words,
    own_at,
    own_total,
    prefetch,
    put_rows,
    row_states,
    scaled,
    store_values,
    swap,
    values,
    zeros,
)
from ._triton_shared import get1, program_sync, put1, reserve, warp_sync


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
            words = words + load_parked(high, low, ok, CH, ASM)
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
    parked = parked_values(r, PARKED, CH, ASM) if ADD else ()
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
    save_states(scr, s, h, half, NH, CH, W, ASM)
    own = ()
    for p in tl.static_range(HT):
        x, dt, _, real = _own_dt(q[p], live, bias, X, DT, MASK, SOFTPLUS, CH, ASM)
        put_dt(both, p, x, dt, half, CH, ASM)
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
        dt0, u0, dt1, u1 = get_dt(both, p, x, dt, lane, CH, ASM)
        b0, b1 = channel_rows(
            get_B, Bc, B_p, sB_n, kb + 2 * p, end, walk, frames, half, real, lane, 2 * p,
            SB, NH, NS, CONST_B, MASK, REVERSE, TIME, CH, ASM,
        )  # fmt: skip
        h = steps(h, channel_decays(A, dt0, NH, CH, ASM), b0, u0, NH, CH)
        h = steps(h, channel_decays(A, dt1, NH, CH, ASM), b1, u1, NH, CH)
    if ASM:
        warp_sync(lane)
    return h, q, rB


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
    #   tokens; the second of two in a chunk walks through the first), so dA, dD, ddt_bias stay in registers over all of
    #   them; lanes as in _triton_scan.
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
    #   once by the lane that owns it and read by both halves, and the decays of all but the last of T tokens, from (2)
    #   for (3).
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
    D = load_parameter(D_ptr, offs_d, mask_d, none, HAS_D, CH)
    bias = load_parameter(bias_ptr, offs_d, mask_d, none, HAS_BIAS, CH)
    Bc = load_constant(B_ptr + offs_d * SB + state * sB_n, mask_d, SB, sB_n, NH, NS, half, CONST_B, CH)
    Cc = load_constant(C_ptr + offs_d * SC + state * sC_n, mask_d, SC, sC_n, NH, NS, half, CONST_C, CH)
    # where lane's sum lies in a row of 32: (token of the pair, half, 8 states)
    v = 4 * (lane & 3) + ((lane >> 3) & 1) + 2 * ((lane >> 2) & 1)
    place = (v // 8) * 16 + ((lane >> 4) & 1) * 8 + v % 8
    if ASM:
        e = one_hots(lane)
        warp = lane // 32
        shared = reserve(lane * 0, SHARED)
        own_shared = shared + warp * (192 * CH + 128) * T
        both = own_shared + (lane % 16) * 16
        both_ds = own_shared + 128 * CH * T + (lane % 16) * 8 * CH
        put_B = own_shared + 192 * CH * T + (lane % 32) * 8
        get_B = own_shared + 192 * CH * T + half * 32
        sums = shared + (192 * CH + 128) * T * W
        kept = sums + (256 * T * W if W > 1 else 0) + warp * ((T - 1) * CH * Q * 512) + (lane % 32) * 16
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
    dA = channel_zeros(none, NH, CH)
    dBc = channel_zeros(none, NH if CONST_B else 0, CH)
    dCc = channel_zeros(none, NH, CH) if CONST_C else ()
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
        start = begin - begin % CHUNK if LS > 0 and LS < CHUNK else begin  # of the chunk
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
            dh = load_channels(dhl_ptr + (slot * d + offs_d) * N + state, mask_d, NH, NS, half, N, CH, ASM)
        else:
            dh = channel_zeros(none, NH, CH)
        chunks = tl.cdiv(end - begin, CHUNK)
        if SHARE:
            skip = tl.maximum(item - work * every, 0)
            stop = tl.minimum(items_end - work * every, every)
            waiting = skip > 0
            while waiting:
                waiting = tl.atomic_add(ready_ptr + pid - nblk, 0, sem="acquire") == 0
            tl.debug_barrier()
            at = carry_ptr + ((worker - 1).to(tl.int64) * d + offs_d) * NS + half * NH
            dh = choose_each(skip > 0, load_channels(at, mask_d & (skip > 0), NH, NS, half, NS, CH, ASM), dh)
        else:
            skip = 0
            stop = chunks
        for later in range(skip, stop):
            k0 = start + (chunks - 1 - later) * CHUNK
            blocks = tl.cdiv(tl.minimum(CHUNK, end - k0), T)
            at = cs_ptr + ((chunk0 + k0 // CHUNK) * d + offs_d) * N + state
            h = load_channels(at, mask_d & (HAS_H0 | (k0 > 0)), NH, NS, half, N, CH, ASM)
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
            # what (2) begins with of the last T tokens is under way during the walk; the rest comes out of it
            kb = k0 + (blocks - 1) * T
            rC = load_rows(
                C_p, m_p, sC_n, kb, end, walk, frames, lane, T, SC, NH, NS, CONST_C, False, REVERSE, TIME, ASM
            )
            r = _output_inputs(
                z_p, dy_p, s_p, t_p, offs_d, kb, end, walk, frames, half, mask_d, T, SZ, SDY, SY, HAS_Z, ADD,
                REVERSE, TIME, EVEN, CH, ASM,
            )  # fmt: skip
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
            q = choose_each(even, q, odd_q)
            rB = choose(even, rB, odd_rB)
            for ss in range(0, blocks - (begin - start) // T):
                s = blocks - 1 - ss
                kb = k0 + s * T
                # what a token has one of
                own = ()
                for p in tl.static_range(HT):
                    live = kb + 2 * p + half < end
                    x, dt, raw, real = _own_dt(q[p], live, bias, X, DT, MASK, SOFTPLUS, CH, ASM)
                    ds, gate, act, parked = _own_ds(r[p], scale, DY, Z, PARKED, HAS_Z, ADD, CH, ASM)
                    put_dt(both, p, x, dt, half, CH, ASM)
                    put_ds(both_ds, p, ds, half, CH, ASM)
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
                    dt0, u0, dt1, u1 = get_dt(both, p, x, dt, lane, CH, ASM)
                    ds0, ds1 = get_ds(both_ds, p, ds, lane, CH, ASM)
                    b0, b1 = channel_rows(
                        get_B, Bc, B_p, sB_n, k, end, walk, frames, half, real, lane, 2 * p,
                        SB, NH, NS, CONST_B, MASK, REVERSE, TIME, CH, ASM,
                    )  # fmt: skip
                    c0, c1 = channel_rows(
                        get_C, Cc, C_p, sC_n, k, end, walk, frames, half, real, lane, 2 * p,
                        SC, NH, NS, CONST_C, False, REVERSE, TIME, CH, ASM,
                    )  # fmt: skip
                    a0 = channel_decays(A, dt0, NH, CH, ASM)
                    a1 = channel_decays(A, dt1, NH, CH, ASM)
                    keep(kept, 2 * p, a0, NH, CH, ASM)
                    if p < HT - 1:
                        keep(kept, 2 * p + 1, a1, NH, CH, ASM)
                    h0 = steps(h, a0, b0, u0, NH, CH)
                    states = states + ((h, h0),)
                    h = steps(h0, a1, b1, u1, NH, CH)
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
                            park(to, low, y, ok, CH, ASM)
                        elif HAS_Z:
                            to = own_at(dz_ptr + row_dz, offs_d, kb, 2 * p, walk, frames, half, SDZ, REVERSE, TIME)
                            store_values(to, dz, ok, CH, ASM)
                            if OUT:
                                to = own_at(y_ptr + row, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                                store_values(to, gated, ok, CH, ASM)
                    if CONST_C:
                        dCc = add_products(add_products(dCc, h0, ds0, NH, CH), h, ds1, NH, CH)
                    else:
                        pC0 = products(h0, ds0, NH, CH)
                        pC1 = products(h, ds1, NH, CH)
                        if ASM:
                            sums_C = sums_C + (lane_sums(pad(pC0, NH, 8), pad(pC1, NH, 8), e, lane, EXACT),)
                        else:
                            store_sums(dBC_ptr + ((pair0 + k // 2) * nblk + blk) * 64 + 32, pC0, pC1, k < end, half, NH)
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
                        h = restore_states(scr, before_s, half, NH, CH, W, ASM)
                    k = kb + 2 * p
                    live = k + half < end
                    ok = live if EVEN else live & mask_d
                    x, dt, raw, real, ds, _, _, _ = own[p]
                    if not MASK:
                        real = live
                    dt0, u0, dt1, u1 = get_dt(both, p, x, dt, lane, CH, ASM)
                    ds0, ds1 = get_ds(both_ds, p, ds, lane, CH, ASM)
                    b0, b1 = channel_rows(
                        get_B, Bc, B_p, sB_n, k, end, walk, frames, half, real, lane, 2 * p,
                        SB, NH, NS, CONST_B, MASK, REVERSE, TIME, CH, ASM,
                    )  # fmt: skip
                    c0, c1 = channel_rows(
                        get_C, Cc, C_p, sC_n, k, end, walk, frames, half, real, lane, 2 * p,
                        SC, NH, NS, CONST_C, False, REVERSE, TIME, CH, ASM,
                    )  # fmt: skip
                    ha, hb = states[p]
                    if p < HT - 1:
                        a1 = kept_decays(kept, 2 * p + 1, A, dt1, NH, CH, ASM)
                    dh, dA, dBc, pB1, gB1, gA1 = _token_back(
                        dh, dA, dBc, A, a1, b1, c1, hb, dt1, u1, ds1, NH, CONST_B, CH
                    )
                    a0 = kept_decays(kept, 2 * p, A, dt0, NH, CH, ASM)
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
                        gB = plus(gB, load_fp32(to_gB, ok, CH, ASM), CH)
                        gA = plus(gA, load_fp32(to_gA, ok, CH, ASM), CH)
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
                        dD = plus_product(dD, ds, x, CH)
                        dbias = plus(dbias, ddt, CH)
                        to = own_at(dx_ptr + row, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                        store_values(to, dx, ok, CH, ASM)
                        to = own_at(ddt_ptr + row, offs_d, kb, 2 * p, walk, frames, half, SY, REVERSE, TIME)
                        store_values(to, ddt, ok, CH, ASM)
                    if not CONST_B:
                        if ASM:
                            sums_B = (lane_sums(pad(pB0, NH, 8), pad(pB1, NH, 8), e, lane, EXACT),) + sums_B
                        else:
                            store_sums(dBC_ptr + ((pair0 + k // 2) * nblk + blk) * 64, pB0, pB1, k < end, half, NH)
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
            store_channels(at, dh, mask_d & (stop < every), NH, NS, half, NS, CH, ASM)
            tl.debug_barrier()
            if stop < every:
                tl.atomic_xchg(ready_ptr + pid, 1, sem="release")
        if HAS_DH0:
            whole = mask_d & (stop == chunks)
            store_channels(dh0_ptr + (seq * d + offs_d) * N + state, dh, whole, NH, NS, half, N, CH, ASM)
    part = worker.to(tl.int64)
    at = (part * d + offs_d) * NS + half * NH
    store_channels(dA_ptr + at, dA, mask_d, NH, NS, half, NS, CH, ASM)
    if CONST_B:
        store_channels(dBc_ptr + at, dBc, mask_d, NH, NS, half, NS, CH, ASM)
    if CONST_C:
        store_channels(dCc_ptr + at, dCc, mask_d, NH, NS, half, NS, CH, ASM)
    if not PARK_G:
        for c in tl.static_range(CH):
            at = part * d + offs_d + c
            if HAS_D:
                tl.store(dD_ptr + at, dD[c] + swap(dD[c], lane, ASM), mask=mask_d & (half == 0))
            if HAS_BIAS:
                tl.store(dbias_ptr + at, dbias[c] + swap(dbias[c], lane, ASM), mask=mask_d & (half == 0))
