"""The first sweep of a backward that is split in time, in Triton: what each piece sends to the one before it.

Letters: b sequences, l tokens, d channels, n state size, g groups of B and C.
"""

import triton
import triton.language as tl

from ._triton_math import LOG2E, exp2, sigmoid, softplus
from ._triton_scan import (
    load_each,
    load_raw,
    load_rows,
    load_states,
    own_at,
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
