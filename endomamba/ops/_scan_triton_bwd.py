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


def _sum_asm(exact: bool) -> str:
    """PTX that sums 16 values over the 16 lanes of each half: 4 tf32 matrix products with ones, then 3 shuffles.

    Value v of lane L is element (L / 4, L % 4) of an 8 x 4 matrix; m16n8k8 adds its four columns.  Value 4i + m is sent
    to column 2i + (m >> 1) of the accumulator (the one-hot operand), rows 0-7 for even m and 8-15 for odd m, so one
    accumulator takes all 16 values and lane L is left with four: 4 (L % 4) + {0, 2, 1, 3}, summed over its quad.
    exact: value = high + low, both exact in tf32.  Otherwise the matrix unit cuts a value to 11 bits.
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
# Cutting a mantissa to 11 bits takes 2^-11 * 0.72 off a value on average: given back, the error has no bias.
_CUT = tl.constexpr(1.0 + 3.52e-4)


@triton.jit
def _one_hots(lane):
    out = ()
    for i in tl.static_range(8):
        out = out + (tl.where((lane % 32) // 4 == i, 0x3F800000, 0).to(tl.int32),)
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
        return _CUT * tl.inline_asm_elementwise(
            _SUM, _SUM_OPERANDS,
            [u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7],
             e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7], lane],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


def shared_asm(size: int) -> str:
    """PTX that reserves `size` bytes of shared memory and gives their address plus $1."""
    return f"{{.shared .align 16 .b8 scan_states[{size}]; mov.u32 $0, scan_states; add.u32 $0, $0, $1;}}"


@triton.jit
def _shared(zero, SHARED: tl.constexpr):
    return tl.inline_asm_elementwise(SHARED, "=r,r", [zero], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _put4(p, a, b, c, d):
    tl.inline_asm_elementwise(
        "{st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;}",
        "=r,r,f,f,f,f", [p, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _get4(p):
    return tl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
        "=f,=f,=f,=f,r", [p], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _put1(p, a):
    tl.inline_asm_elementwise(
        "{st.shared.f32 [$1], $2; mov.u32 $0, 0;}", "=r,r,f", [p, a], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _get1(p):
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [p], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def _meet(i):
    # every warp of the program: all shared memory written before is visible after
    tl.inline_asm_elementwise(
        "{bar.sync 0; mov.b32 $0, $1;}", "=r,r,~{memory}", [i], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _pad(v, NH: tl.constexpr, TO: tl.constexpr):
    for _ in tl.static_range(NH, TO):
        v = v + (v[0] * 0.0,)
    return v


@triton.jit
def _put(p, slot, v, NH: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr):
    # v, NH values a lane, into slot `slot`; each lane reads only what it wrote
    Q: tl.constexpr = (NH + 3) // 4
    if ASM:
        a = p + slot * (Q * 512 * W)
        v = _pad(v, NH, 4 * Q)
        for i in tl.static_range(Q):
            _put4(a + i * 512 * W, v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3])
    else:
        for i in tl.static_range(NH):
            tl.store(p + (slot * 4 * Q + i) * 32 * W, v[i])


@triton.jit
def _get(p, slot, NH: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr):
    Q: tl.constexpr = (NH + 3) // 4
    out = ()
    if ASM:
        a = p + slot * (Q * 512 * W)
        for i in tl.static_range(Q):
            four = _get4(a + i * 512 * W)
            for j in tl.static_range(4):
                if 4 * i + j < NH:
                    out = out + (four[j],)
    else:
        for i in tl.static_range(NH):
            out = out + (tl.load(p + (slot * 4 * Q + i) * 32 * W),)
    return out


@triton.jit
def _state_inputs(
    x_p, dt_p, B_p, m_p, k, count, l, frames, sB_n, half, mask_d,
    SX: tl.constexpr, SDT: tl.constexpr, SB: tl.constexpr, NH: tl.constexpr, NS: tl.constexpr, VEC: tl.constexpr,
    CONST_B: tl.constexpr, MASK: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # what the state needs of the pair at k: x, dt, mask of the lane's own token, B of both
    own = tl.minimum(k + half, count - 1)
    k1 = tl.minimum(k + 1, count - 1)
    k0 = tl.minimum(k, count - 1)
    x = tl.load(x_p + offset(own, l, frames, SX, REVERSE, TIME), mask=mask_d, other=0.0)
    dt = tl.load(dt_p + offset(own, l, frames, SDT, REVERSE, TIME), mask=mask_d, other=0.0)
    m = tl.load(m_p + offset(own, l, frames, 1, REVERSE, TIME)) if MASK else x
    B0 = () if CONST_B else load_row(B_p + offset(k0, l, frames, SB, REVERSE, TIME), sB_n, NH, NS, half, VEC, ASM)
    B1 = () if CONST_B else load_row(B_p + offset(k1, l, frames, SB, REVERSE, TIME), sB_n, NH, NS, half, VEC, ASM)
    return x, dt, m, B0, B1


@triton.jit
def _output_inputs(
    z_p, dy_p, s_p, C_p, k, count, l, frames, sC_n, half, mask_d, like,
    SZ: tl.constexpr, SY: tl.constexpr, SC: tl.constexpr, NH: tl.constexpr, NS: tl.constexpr, VEC: tl.constexpr,
    CONST_C: tl.constexpr, HAS_Z: tl.constexpr, ADD: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    # what the output needs besides: z, dy, parked s of the own token, C of both
    own = tl.minimum(k + half, count - 1)
    k1 = tl.minimum(k + 1, count - 1)
    k0 = tl.minimum(k, count - 1)
    z = tl.load(z_p + offset(own, l, frames, SZ, REVERSE, TIME), mask=mask_d, other=0.0) if HAS_Z else like
    dy = tl.load(dy_p + offset(own, l, frames, SY, REVERSE, TIME), mask=mask_d, other=0.0)
    s = tl.load(s_p + offset(own, l, frames, SY, REVERSE, TIME), mask=mask_d, other=0.0) if ADD else like
    C0 = () if CONST_C else load_row(C_p + offset(k0, l, frames, SC, REVERSE, TIME), sC_n, NH, NS, half, VEC, ASM)
    C1 = () if CONST_C else load_row(C_p + offset(k1, l, frames, SC, REVERSE, TIME), sC_n, NH, NS, half, VEC, ASM)
    return z, dy, s, C0, C1


@triton.jit
def _pair_rows(
    R_p, k, count, l, frames, s_n, half, S: tl.constexpr, NH: tl.constexpr, NS: tl.constexpr, VEC: tl.constexpr,
    CONST: tl.constexpr, REVERSE: tl.constexpr, TIME: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # B or C of both tokens of the pair at k
    k1 = tl.minimum(k + 1, count - 1)
    k0 = tl.minimum(k, count - 1)
    first = () if CONST else load_row(R_p + offset(k0, l, frames, S, REVERSE, TIME), s_n, NH, NS, half, VEC, ASM)
    second = () if CONST else load_row(R_p + offset(k1, l, frames, S, REVERSE, TIME), s_n, NH, NS, half, VEC, ASM)
    return first, second


@triton.jit
def _pair_dt(x, dt, m, live, bias, lane, MASK: tl.constexpr, SOFTPLUS: tl.constexpr, ASM: tl.constexpr):
    # own x and dt in fp32, dt before softplus, and whether the token counts
    x = x.to(tl.float32)
    raw = dt.to(tl.float32) + bias
    dt = softplus(raw, ASM) if SOFTPLUS else raw
    real = live & (m != 0) if MASK else live
    return tl.where(real, x, 0.0), tl.where(real, dt, 0.0), raw, real


@triton.jit
def _pair_B(
    B0, B1, Bc, real, lane, NH: tl.constexpr, VEC: tl.constexpr, TYPE: tl.constexpr, CONST_B: tl.constexpr,
    MASK: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    b0 = Bc if CONST_B else unpack(B0, NH, VEC, TYPE)
    b1 = Bc if CONST_B else unpack(B1, NH, VEC, TYPE)
    if MASK:
        r0, r1 = to_both(real.to(tl.float32), lane, ASM)
        b0 = select(r0 != 0.0, b0, NH)
        b1 = select(r1 != 0.0, b1, NH)
    return b0, b1


@triton.jit
def _add_products(acc, h0, ds0, h1, ds1, NH: tl.constexpr):
    out = ()
    for i in tl.static_range(NH):
        out = out + (acc[i] + h0[i] * ds0 + h1[i] * ds1,)
    return out


@triton.jit
def _token_back(dh, dA, dBc, A, B, C, h, a, dt, u, ds, NH: tl.constexpr, CONST_B: tl.constexpr):
    # One token of the adjoint walk; h: the state before the token.  -> dh before it, dA, dBc, products for dB, and the
    # lane's sums <dh, B> and <dh decay h, A>.
    pB = ()
    nd = ()
    nA = ()
    nB = ()
    gB = dt * 0.0
    gA = dt * 0.0
    for i in tl.static_range(NH):
        g = dh[i] + C[i] * ds
        gB += g * B[i]
        if CONST_B:
            nB = nB + (dBc[i] + g * u,)
        else:
            pB = pB + (g * u,)
        g *= a[i]
        nd = nd + (g,)
        g *= h[i]
        nA = nA + (dA[i] + g * dt,)
        gA += g * A[i]
    return nd, nA, nB, pB, gB, gA


@triton.jit
def _emit(
    p, u, v, e, place, live, lane, half, NH: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr
):
    # The sums over the program's channels of u (first token) and v (second): to global memory, or, where several warps
    # must still be added up, to shared memory.
    if ASM:
        s = _lane_sums(_pad(u, NH, 8), _pad(v, NH, 8), e, lane, EXACT)
        if W == 1:
            tl.store(p + place, s, mask=live)
        else:
            _put1(p + place, s)
    else:
        for i in tl.static_range(NH):
            tl.store(p + i, tl.sum(tl.where(half == 0, u[i], 0.0), axis=0), mask=live)
            tl.store(p + 8 + i, tl.sum(tl.where(half == 1, u[i], 0.0), axis=0), mask=live)
            tl.store(p + 16 + i, tl.sum(tl.where(half == 0, v[i], 0.0), axis=0), mask=live)
            tl.store(p + 24 + i, tl.sum(tl.where(half == 1, v[i], 0.0), axis=0), mask=live)


@triton.jit(do_not_specialize=["l", "frames", "seqs", "splits", "sm_b"])
def _scan_bwd_kernel(
    dy_ptr, x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, cs_ptr, dhl_ptr, s_ptr, gB_ptr, gA_ptr, cu_ptr,
    mask_ptr, dx_ptr, ddt_ptr, dz_ptr, y_ptr, dBC_ptr, dA_ptr, dBc_ptr, dCc_ptr, dD_ptr, dbias_ptr, dh0_ptr,
    scratch_ptr, scale, l, d, seqs, splits, frames, sdy_b, sx_b, sdt_b, sz_b, sB_b, sC_b, sB_g, sC_g, sB_n, sC_n, sm_b,
    SDY: tl.constexpr, SX: tl.constexpr, SDT: tl.constexpr, SZ: tl.constexpr, SB: tl.constexpr, SC: tl.constexpr,
    SY: tl.constexpr, SDZ: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, FIRST: tl.constexpr, NS: tl.constexpr,
    VEC: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr, HAS_Z: tl.constexpr, OUT: tl.constexpr,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DHL: tl.constexpr, HAS_DH0: tl.constexpr, ADD: tl.constexpr,
    PARK: tl.constexpr, ADD_G: tl.constexpr, PARK_G: tl.constexpr, PACKED: tl.constexpr, MASK: tl.constexpr,
    REVERSE: tl.constexpr, TIME: tl.constexpr, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr, LS: tl.constexpr,
    T: tl.constexpr, W: tl.constexpr, KEEP: tl.constexpr, SHARED: tl.constexpr, ASM: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    # Grid (P * g * cdiv(d / g, 16 W),): a program owns 16 W channels and every P-th sequence (LS > 0: piece of LS
    #   tokens), so dA, dD, ddt_bias stay in registers over all of them; lanes as in _triton_scan.
    # A chunk of 64 tokens, last first: (1) from its saved state, the states every T tokens, to a scratch that stays in
    #   L2; then, T tokens at a time, (2) forward: the states of every token to shared memory, y for dz, h ds for dC,
    #   OUT: the gated y itself;
    #   (3) backward: dh, and with it everything else.
    # Sums over channels (dB, dC): one tf32 matrix product with ones a pair, the program's warps added in a fixed order,
    #   one fp32 row a program and pair of tokens to global memory; a second kernel adds the rows.
    # Traffic: x, dt twice, z, dy once, dx, ddt, dz written: 9 * b*l*d elements, OUT 10; 128 bytes a token and program
    #   for sums.
    # Numerics: fp32; in a fp32 call the sums split values in two, else products are cut to 11 bits, without bias.
    # Bound: issue slots.
    NH: tl.constexpr = (NS + 1) // 2
    Q: tl.constexpr = (NH + 3) // 4
    BD: tl.constexpr = 16 * W
    NB1: tl.constexpr = CHUNK // T
    HT: tl.constexpr = T // 2
    KEPT: tl.constexpr = 2 * T if KEEP else T  # slots
    TYPE: tl.constexpr = B_ptr.dtype.element_ty
    lane = tl.arange(0, 32 * W)
    half = (lane // 16) % 2
    dg = d // GROUPS
    nblk = tl.cdiv(dg, BD) * GROUPS
    pid = tl.program_id(0)
    blk = pid % nblk
    group = blk // (nblk // GROUPS)
    in_group = (blk % (nblk // GROUPS)) * BD + (lane // 32) * 16 + lane % 16
    mask_d = in_group < dg
    offs_d = group * dg + in_group
    state = FIRST + half * NH
    none = tl.zeros([32 * W], tl.float32)
    A = scaled(load_states(A_ptr + offs_d * N + state, mask_d, NH, NS, half, N, ASM), LOG2E, NH)
    D = tl.load(D_ptr + offs_d, mask=mask_d, other=0.0) if HAS_D else none
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0) if HAS_BIAS else none
    Bc = load_each(B_ptr + offs_d * SB + state * sB_n, mask_d, sB_n, NH, NS, half) if CONST_B else ()
    Cc = load_each(C_ptr + offs_d * SC + state * sC_n, mask_d, sC_n, NH, NS, half) if CONST_C else ()
    # where lane's sum lies in a row of 32: (token of the pair, half, 8 states)
    v = 4 * (lane & 3) + ((lane >> 3) & 1) + 2 * ((lane >> 2) & 1)
    place = (v // 8) * 16 + ((lane >> 4) & 1) * 8 + v % 8
    if ASM:
        e = _one_hots(lane)
        smem = _shared(lane * 16, SHARED)
        scalars = smem + KEPT * Q * 512 * W
        sums = smem + (KEPT * Q + HT) * 512 * W - lane * 16
        place *= 4 if W > 1 else 1
        warp = lane // 32
    else:
        e = ()
        smem = scratch_ptr + (tl.num_programs(0).to(tl.int64) * NB1 + pid * (KEPT + HT)) * 4 * Q * 32 * W + lane
        scalars = smem + KEPT * 4 * Q * 32 * W
        sums = smem
        warp = lane
    scr = scratch_ptr + pid.to(tl.int64) * NB1 * 4 * Q * 32 * W + lane
    dA = zeros(none, NH)
    dBc = zeros(none, NH) if CONST_B else ()
    dCc = zeros(none, NH) if CONST_C else ()
    dD = none
    dbias = none
    turn = 0
    for work in range(pid // nblk, seqs * splits, tl.num_programs(0) // nblk):
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
        x_p = x_ptr + base * sx_b + before * SX + offs_d
        dt_p = dt_ptr + base * sdt_b + before * SDT + offs_d
        z_p = (z_ptr + base * sz_b + before * SZ + offs_d) if HAS_Z else x_p
        dy_p = dy_ptr + base * sdy_b + before * SDY + offs_d
        row = base * walk * SY + before * SY + offs_d
        row_dz = (base * walk + before) * SDZ + offs_d
        s_p = (s_ptr + row) if ADD or PARK else x_p
        m_p = (mask_ptr + base * sm_b + before) if MASK else x_ptr
        if VEC > 0:
            B_p = B_ptr + base * sB_b + before * SB + group * sB_g + state
            C_p = C_ptr + base * sC_b + before * SC + group * sC_g + state
        else:
            B_p = B_ptr + base * sB_b + before * SB + group * sB_g + state * sB_n
            C_p = C_ptr + base * sC_b + before * SC + group * sC_g + state * sC_n
        if HAS_DHL:
            dh = load_states(dhl_ptr + (slot * d + offs_d) * N + state, mask_d, NH, NS, half, N, ASM)
        else:
            dh = zeros(none, NH)
        chunks = tl.cdiv(end - begin, CHUNK)
        for cc in range(0, chunks):
            c = chunks - 1 - cc
            k0 = begin + c * CHUNK
            blocks = tl.cdiv(tl.minimum(CHUNK, end - k0), T)
            h = load_states(cs_ptr + ((chunk0 + k0 // CHUNK) * d + offs_d) * N + state, mask_d, NH, NS, half, N, ASM)
            # (1) states every T tokens; the inputs of the next T are under way
            q = ()
            for p in tl.static_range(HT):
                q = q + (
                    _state_inputs(
                        x_p, dt_p, B_p, m_p, k0 + 2 * p, end, walk, frames, sB_n, half, mask_d,
                        SX, SDT, SB, NH, NS, VEC, CONST_B, MASK, REVERSE, TIME, ASM,
                    ),
                )  # fmt: skip
            for s in range(0, blocks - 1):
                _put(scr, s, h, NH, W, False)
                for p in tl.static_range(HT):
                    x, dt, raw, real = _pair_dt(q[0][0], q[0][1], q[0][2], half < 2, bias, lane, MASK, SOFTPLUS, ASM)
                    dt0, dt1 = to_both(dt, lane, ASM)
                    u0, u1 = to_both(dt * x, lane, ASM)
                    b0, b1 = _pair_B(q[0][3], q[0][4], Bc, real, lane, NH, VEC, TYPE, CONST_B, MASK, ASM)
                    q = q[1:] + (
                        _state_inputs(
                            x_p, dt_p, B_p, m_p, k0 + (s + 1) * T + 2 * p, end, walk, frames, sB_n, half, mask_d,
                            SX, SDT, SB, NH, NS, VEC, CONST_B, MASK, REVERSE, TIME, ASM,
                        ),
                    )  # fmt: skip
                    h = advance(h, decays(A, dt0, NH, ASM), b0, u0, NH)
                    h = advance(h, decays(A, dt1, NH, ASM), b1, u1, NH)
            kb = k0 + (blocks - 1) * T
            q2 = _state_inputs(
                x_p, dt_p, B_p, m_p, kb, end, walk, frames, sB_n, half, mask_d,
                SX, SDT, SB, NH, NS, VEC, CONST_B, MASK, REVERSE, TIME, ASM,
            )  # fmt: skip
            q3 = _output_inputs(
                z_p, dy_p, s_p, C_p, kb, end, walk, frames, sC_n, half, mask_d, none,
                SZ, SDY, SC, NH, NS, VEC, CONST_C, HAS_Z, ADD, REVERSE, TIME, ASM,
            )  # fmt: skip
            for ss in range(0, blocks):
                s = blocks - 1 - ss
                kb = k0 + s * T
                # (2) forward
                for p in tl.static_range(HT):
                    k = kb + 2 * p
                    live = k + half < end
                    if p + 1 < HT:
                        new2 = _state_inputs(
                            x_p, dt_p, B_p, m_p, k + 2, end, walk, frames, sB_n, half, mask_d,
                            SX, SDT, SB, NH, NS, VEC, CONST_B, MASK, REVERSE, TIME, ASM,
                        )  # fmt: skip
                        new3 = _output_inputs(
                            z_p, dy_p, s_p, C_p, k + 2, end, walk, frames, sC_n, half, mask_d, none,
                            SZ, SDY, SC, NH, NS, VEC, CONST_C, HAS_Z, ADD, REVERSE, TIME, ASM,
                        )  # fmt: skip
                    x, dt, raw, real = _pair_dt(q2[0], q2[1], q2[2], live, bias, lane, MASK, SOFTPLUS, ASM)
                    dt0, dt1 = to_both(dt, lane, ASM)
                    u0, u1 = to_both(dt * x, lane, ASM)
                    b0, b1 = _pair_B(q2[3], q2[4], Bc, real, lane, NH, VEC, TYPE, CONST_B, MASK, ASM)
                    c0 = Cc if CONST_C else unpack(q3[3], NH, VEC, TYPE)
                    c1 = Cc if CONST_C else unpack(q3[4], NH, VEC, TYPE)
                    _put(smem, 2 * p, h, NH, W, ASM)
                    a0 = decays(A, dt0, NH, ASM)
                    h0 = advance(h, a0, b0, u0, NH)
                    _put(smem, 2 * p + 1, h0, NH, W, ASM)
                    a1 = decays(A, dt1, NH, ASM)
                    h = advance(h0, a1, b1, u1, NH)
                    if KEEP:
                        _put(smem, T + 2 * p, a0, NH, W, ASM)
                        _put(smem, T + 2 * p + 1, a1, NH, W, ASM)
                    ds = tl.where(live, q3[1].to(tl.float32) * scale, 0.0)
                    at = row + offset(tl.minimum(k + half, end - 1), walk, frames, SY, REVERSE, TIME)
                    if HAS_Z or PARK:
                        y = own_total(dot(h0, c0, NH), dot(h, c1, NH), lane, ASM)
                        if FIRST == 0:
                            y += D * x
                        if ADD:
                            y += q3[2]
                        if PARK:
                            tl.store(s_ptr + at, y, mask=mask_d & live)
                    if HAS_Z:
                        z = q3[0].to(tl.float32)
                        sig = sigmoid(z, ASM)
                        if not PARK:
                            dz = ds * y * sig * (1.0 + z * (1.0 - sig))
                            to = row_dz + offset(tl.minimum(k + half, end - 1), walk, frames, SDZ, REVERSE, TIME)
                            tl.store(dz_ptr + to, dz.to(dz_ptr.dtype.element_ty), mask=mask_d & live)
                            if OUT:
                                y *= scale * z * sig
                                tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask_d & live)
                        ds *= z * sig
                    ds0, ds1 = to_both(ds, lane, ASM)
                    if CONST_C:
                        dCc = _add_products(dCc, h0, ds0, h, ds1, NH)
                    else:
                        pC0 = scaled(h0, ds0, NH)
                        pC1 = scaled(h, ds1, NH)
                        if W == 1 or not ASM:
                            to = dBC_ptr + ((pair0 + k // 2) * nblk + blk) * 64 + 32
                        else:
                            to = sums + ((turn * HT + p) * 2 + 1) * 128 * W + warp * 128
                        _emit(to, pC0, pC1, e, place, k < end, lane, half, NH, W, EXACT, ASM)
                    _put(scalars, p, (dt, x, ds, raw), 4, W, ASM)
                    if p + 1 < HT:
                        q2 = new2
                        q3 = new3
                # (3) backward; the rows of the last pair are still here, and the next T tokens come under way
                rB = (q2[3], q2[4])
                rC = (q3[3], q3[4])
                before_s = tl.maximum(s - 1, 0)
                h = _get(scr, before_s, NH, W, False)
                q2 = _state_inputs(
                    x_p, dt_p, B_p, m_p, k0 + before_s * T, end, walk, frames, sB_n, half, mask_d,
                    SX, SDT, SB, NH, NS, VEC, CONST_B, MASK, REVERSE, TIME, ASM,
                )  # fmt: skip
                q3 = _output_inputs(
                    z_p, dy_p, s_p, C_p, k0 + before_s * T, end, walk, frames, sC_n, half, mask_d, none,
                    SZ, SDY, SC, NH, NS, VEC, CONST_C, HAS_Z, ADD, REVERSE, TIME, ASM,
                )  # fmt: skip
                for p in tl.static_range(HT - 1, -1, -1):
                    k = kb + 2 * p
                    live = k + half < end
                    k_own = tl.minimum(k + half, end - 1)
                    sc = _get(scalars, p, 4, W, ASM)
                    ha = _get(smem, 2 * p, NH, W, ASM)
                    hb = _get(smem, 2 * p + 1, NH, W, ASM)
                    if p > 0:
                        new_B = _pair_rows(
                            B_p, k - 2, end, walk, frames, sB_n, half, SB, NH, NS, VEC, CONST_B, REVERSE, TIME, ASM
                        )
                        new_C = _pair_rows(
                            C_p, k - 2, end, walk, frames, sC_n, half, SC, NH, NS, VEC, CONST_C, REVERSE, TIME, ASM
                        )
                    dt = sc[0]
                    x = sc[1]
                    ds = sc[2]
                    raw = sc[3]
                    if MASK:
                        real = live & (tl.load(m_p + offset(k_own, walk, frames, 1, REVERSE, TIME)) != 0)
                    else:
                        real = live
                    dt0, dt1 = to_both(dt, lane, ASM)
                    u0, u1 = to_both(dt * x, lane, ASM)
                    ds0, ds1 = to_both(ds, lane, ASM)
                    b0, b1 = _pair_B(rB[0], rB[1], Bc, real, lane, NH, VEC, TYPE, CONST_B, MASK, ASM)
                    c0 = Cc if CONST_C else unpack(rC[0], NH, VEC, TYPE)
                    c1 = Cc if CONST_C else unpack(rC[1], NH, VEC, TYPE)
                    a1 = _get(smem, T + 2 * p + 1, NH, W, ASM) if KEEP else decays(A, dt1, NH, ASM)
                    dh, dA, dBc, pB1, gB1, gA1 = _token_back(dh, dA, dBc, A, b1, c1, hb, a1, dt1, u1, ds1, NH, CONST_B)
                    a0 = _get(smem, T + 2 * p, NH, W, ASM) if KEEP else decays(A, dt0, NH, ASM)
                    dh, dA, dBc, pB0, gB0, gA0 = _token_back(dh, dA, dBc, A, b0, c0, ha, a0, dt0, u0, ds0, NH, CONST_B)
                    gB = own_total(gB0, gB1, lane, ASM)
                    gA = own_total(gA0, gA1, lane, ASM)
                    at = row + offset(k_own, walk, frames, SY, REVERSE, TIME)
                    if ADD_G:
                        gB += tl.load(gB_ptr + at, mask=mask_d & live, other=0.0)
                        gA += tl.load(gA_ptr + at, mask=mask_d & live, other=0.0)
                    if PARK_G:
                        tl.store(gB_ptr + at, gB, mask=mask_d & live)
                        tl.store(gA_ptr + at, gA, mask=mask_d & live)
                    else:
                        ddt = gA * LN2 + gB * x
                        if SOFTPLUS:
                            ddt *= sigmoid(raw, ASM)
                        ddt = tl.where(real, ddt, 0.0)
                        dx = tl.where(real, gB * dt + D * ds, 0.0)
                        dD += ds * x
                        dbias += ddt
                        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask_d & live)
                        tl.store(ddt_ptr + at, ddt.to(ddt_ptr.dtype.element_ty), mask=mask_d & live)
                    if not CONST_B:
                        if W == 1 or not ASM:
                            to = dBC_ptr + ((pair0 + k // 2) * nblk + blk) * 64
                        else:
                            to = sums + (turn * HT + p) * 2 * 128 * W + warp * 128
                        _emit(to, pB0, pB1, e, place, k < end, lane, half, NH, W, EXACT, ASM)
                    if p > 0:
                        rB = new_B
                        rC = new_C
                if ASM and W > 1:
                    _meet(turn)
                    # the program's T * 32 sums, a few a thread, warp by warp
                    for i in tl.static_range(T // W):
                        j = lane + i * 32 * W  # (pair, dB or dC, 32)
                        a = sums + turn * HT * 2 * 128 * W + (j // 32) * 128 * W + (j % 32) * 4
                        total = _get1(a)
                        for w in tl.static_range(1, W):
                            total += _get1(a + w * 128)
                        pair = kb // 2 + j // 64
                        to = dBC_ptr + ((pair0 + pair) * nblk + blk) * 64 + j % 64
                        tl.store(to, total, mask=pair * 2 < end)
                    turn = 1 - turn
        if HAS_DH0:
            store_states(dh0_ptr + (seq * d + offs_d) * N + state, dh, mask_d, NH, NS, half, N, ASM)
    part = (pid // nblk).to(tl.int64)
    store_states(dA_ptr + (part * d + offs_d) * NS + half * NH, dA, mask_d, NH, NS, half, NS, ASM)
    if CONST_B:
        store_states(dBc_ptr + (part * d + offs_d) * NS + half * NH, dBc, mask_d, NH, NS, half, NS, ASM)
    if CONST_C:
        store_states(dCc_ptr + (part * d + offs_d) * NS + half * NH, dCc, mask_d, NH, NS, half, NS, ASM)
    if not PARK_G:
        if HAS_D:
            tl.store(dD_ptr + part * d + offs_d, dD + swap(dD, lane, ASM), mask=mask_d & (half == 0))
        if HAS_BIAS:
            tl.store(dbias_ptr + part * d + offs_d, dbias + swap(dbias, lane, ASM), mask=mask_d & (half == 0))


@triton.jit(do_not_specialize=["l", "frames", "splits", "sm_b"])
def _scan_adjoint_kernel(
    dy_ptr, dt_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, mask_ptr, dh_ptr, sum_ptr, scale, l, d, splits, frames,
    sdy_b, sdt_b, sz_b, sC_b, sC_g, sC_n, sm_b,
    SDY: tl.constexpr, SDT: tl.constexpr, SZ: tl.constexpr, SC: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr,
    VEC: tl.constexpr, CONST_C: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, MASK: tl.constexpr,
    REVERSE: tl.constexpr, TIME: tl.constexpr, SOFTPLUS: tl.constexpr, LS: tl.constexpr, W: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    # Grid (sequences * splits * g * cdiv(d / g, 16 W),): what LS tokens send to their left when nothing comes from
    # their right, (sequences * splits, d, n), and their sum of dt: the first of the two sweeps of a split backward.
    # Traffic: dt, dy, z once, C.  Bound: exponentials.
    NH: tl.constexpr = (N + 1) // 2
    BD: tl.constexpr = 16 * W
    TYPE: tl.constexpr = C_ptr.dtype.element_ty
    lane = tl.arange(0, 32 * W)
    half = (lane // 16) % 2
    dg = d // GROUPS
    blocks = tl.cdiv(dg, BD)
    pid = tl.program_id(0)
    blk = pid % (blocks * GROUPS)
    slot = pid // (blocks * GROUPS) + tl.zeros([], tl.int64)
    seq = slot // splits
    begin = ((slot % splits) * LS).to(tl.int32)
    end = tl.minimum(begin + LS, l)
    group = blk // blocks
    in_group = (blk % blocks) * BD + (lane // 32) * 16 + lane % 16
    mask_d = in_group < dg
    offs_d = group * dg + in_group
    state = half * NH
    none = tl.zeros([32 * W], tl.float32)
    A = scaled(load_states(A_ptr + offs_d * N + state, mask_d, NH, N, half, N, ASM), LOG2E, NH)
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0) if HAS_BIAS else none
    Cc = load_each(C_ptr + offs_d * SC + state * sC_n, mask_d, sC_n, NH, N, half) if CONST_C else ()
    dt_p = dt_ptr + seq * sdt_b + offs_d
    dy_p = dy_ptr + seq * sdy_b + offs_d
    z_p = (z_ptr + seq * sz_b + offs_d) if HAS_Z else dt_p
    m_p = (mask_ptr + seq * sm_b) if MASK else dt_ptr
    C_p = C_ptr + seq * sC_b + group * sC_g + state * (1 if VEC > 0 else sC_n)
    dh = zeros(none, NH)
    total = none
    pairs = tl.cdiv(end - begin, 2)
    k = begin + 2 * (pairs - 1)
    q = _adjoint_inputs(
        dt_p, dy_p, z_p, m_p, C_p, k, end, l, frames, sC_n, half, mask_d,
        SDT, SDY, SZ, SC, NH, N, VEC, CONST_C, HAS_Z, MASK, REVERSE, TIME, ASM,
    )  # fmt: skip
    for i in range(0, pairs):
        k = begin + 2 * (pairs - 1 - i)
        new = _adjoint_inputs(
            dt_p, dy_p, z_p, m_p, C_p, tl.maximum(k - 2, begin), end, l, frames, sC_n, half, mask_d,
            SDT, SDY, SZ, SC, NH, N, VEC, CONST_C, HAS_Z, MASK, REVERSE, TIME, ASM,
        )  # fmt: skip
        live = k + half < end
        _, dt, _, _ = _pair_dt(q[0], q[0], q[3], live, bias, lane, MASK, SOFTPLUS, ASM)
        ds = tl.where(live, q[1].to(tl.float32) * scale, 0.0)
        if HAS_Z:
            z = q[2].to(tl.float32)
            ds *= z * sigmoid(z, ASM)
        dt0, dt1 = to_both(dt, lane, ASM)
        ds0, ds1 = to_both(ds, lane, ASM)
        c0 = Cc if CONST_C else unpack(q[4], NH, VEC, TYPE)
        c1 = Cc if CONST_C else unpack(q[5], NH, VEC, TYPE)
        dh = _adjoint_step(dh, A, c1, dt1, ds1, NH, ASM)
        dh = _adjoint_step(dh, A, c0, dt0, ds0, NH, ASM)
        total += dt
        q = new
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
    dt_p, dy_p, z_p, m_p, C_p, k, end, l, frames, sC_n, half, mask_d,
    SDT: tl.constexpr, SDY: tl.constexpr, SZ: tl.constexpr, SC: tl.constexpr, NH: tl.constexpr, N: tl.constexpr,
    VEC: tl.constexpr, CONST_C: tl.constexpr, HAS_Z: tl.constexpr, MASK: tl.constexpr, REVERSE: tl.constexpr,
    TIME: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    own = tl.minimum(k + half, end - 1)
    dt = tl.load(dt_p + offset(own, l, frames, SDT, REVERSE, TIME), mask=mask_d, other=0.0)
    dy = tl.load(dy_p + offset(own, l, frames, SDY, REVERSE, TIME), mask=mask_d, other=0.0)
    z = tl.load(z_p + offset(own, l, frames, SZ, REVERSE, TIME), mask=mask_d, other=0.0) if HAS_Z else dt
    m = tl.load(m_p + offset(own, l, frames, 1, REVERSE, TIME)) if MASK else dt
    first, second = _pair_rows(C_p, k, end, l, frames, sC_n, half, SC, NH, N, VEC, CONST_C, REVERSE, TIME, ASM)
    return dt, dy, z, m, first, second
