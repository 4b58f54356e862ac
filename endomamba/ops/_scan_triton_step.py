"""The selective scan of one token in Triton: state in, state out, nothing saved.

Letters: b sequences, d channels, n state size, g groups of B and C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import ASM, AotCase, meta, on_device
from ._triton_math import LOG2E, exp2, sigmoid, softplus
from ._triton_scan import neighbour, store4

STATES = 16  # the walk over many tokens sums at most this many at a time; so does this, for the same bits
WARP_CHANNELS = 8
# From so many warps of one sequence each (b * d / 8): sequences and warps a program, which change no bit.  Few: the
# shortest program, spread over the multiprocessors.  Many: sequences share A, D, dt_bias and addresses.
STEP = ((4096, 4, 4), (0, 1, 4))


@triton.jit
def _words4(p):
    # Neither pure nor of the read-only cache: either would let the compiler move it behind the stores of another row.
    return tl.inline_asm_elementwise(
        "ld.global.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [p.to(tl.int64)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _words2(p):
    return tl.inline_asm_elementwise(
        "ld.global.v2.b32 {$0, $1}, [$2];",
        "=r,=r,l",
        [p.to(tl.int64)],
        dtype=(tl.int32, tl.int32),
        is_pure=False,
        pack=1,
    )


@triton.jit
def _values(
    p, stride, index, half, P: tl.constexpr, NH: tl.constexpr, NS: tl.constexpr, VEC: tl.constexpr, ASM: tl.constexpr
):
    # P neighbours of a row from the half's index-th on, still packed where VEC (see `_unpack`); 0 where there are none
    row = ()
    if VEC:
        WORDS: tl.constexpr = P * p.dtype.element_ty.primitive_bitwidth // 32
        w = p.to(tl.pointer_type(tl.int32))
        if ASM and WORDS == 4:
            row = _words4(w)
        elif ASM and WORDS == 2:
            row = _words2(w)
        else:
            for i in tl.static_range(WORDS):
                row = row + (tl.load(w + i),)
    else:
        for i in tl.static_range(P):
            exists = (index + i < NH) & (half * NH + index + i < NS)
            row = row + (tl.load(p + i * stride, mask=exists, other=0.0),)
    return row


@triton.jit
def _unpack(row, P: tl.constexpr, VEC: tl.constexpr, TYPE: tl.constexpr):
    # -> P fp32 values
    out = ()
    if VEC == 0:
        for i in tl.static_range(P):
            out = out + (row[i].to(tl.float32),)
    elif tl.float32 == TYPE:
        for i in tl.static_range(P):
            out = out + (row[i].to(tl.float32, bitcast=True),)
    elif tl.bfloat16 == TYPE:
        for i in tl.static_range(P // 2):
            out = out + ((row[i] << 16).to(tl.float32, bitcast=True), (row[i] & -65536).to(tl.float32, bitcast=True))
    else:
        for i in tl.static_range(P // 2):
            low = row[i].to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            high = (row[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            out = out + (low, high)
    return out


@triton.jit
def _step(h, A, B, dt, u, real, P: tl.constexpr, H0: tl.constexpr, MASK: tl.constexpr, ASM: tl.constexpr):
    out = ()
    for i in tl.static_range(P):
        fed = tl.where(real, B[i], 0.0) if MASK else B[i]
        if H0:
            out = out + (tl.fma(exp2(A[i] * LOG2E * dt, ASM), h[i], fed * u),)
        else:
            out = out + (fed * u,)
    return out


@triton.jit
def _dot(h, C, lane, P: tl.constexpr, ASM: tl.constexpr):
    # A half's sum is one chain over its even states and one over its odd ones: the lane with the end of the half goes
    # on where that with its beginning stopped.  -> the sum of both halves, in the lanes with an end.
    even, odd = h[0] * C[0], h[1] * C[1]
    for i in tl.static_range(2, P, 2):
        even = tl.fma(h[i], C[i], even)
        odd = tl.fma(h[i + 1], C[i + 1], odd)
    even = neighbour(even, lane, 1, ASM)
    odd = neighbour(odd, lane, 1, ASM)
    for i in tl.static_range(0, P, 2):
        even = tl.fma(h[i], C[i], even)
        odd = tl.fma(h[i + 1], C[i + 1], odd)
    total = even + odd
    return total + neighbour(total, lane, 2, ASM)


@triton.jit(
    do_not_specialize=["b", "sx_b", "sdt_b", "sz_b", "sB_b", "sC_b", "sm_b"],
    do_not_specialize_on_alignment=["x_ptr", "dt_ptr", "z_ptr", "B_ptr", "C_ptr", "mask_ptr"],
)
def _scan_step_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, h0_ptr, mask_ptr, y_ptr, h_ptr,
    b, sx_b, sdt_b, sz_b, sB_b, sC_b, sm_b,
    DIM: tl.constexpr, N: tl.constexpr, GROUPS: tl.constexpr, SB: tl.constexpr, SB_N: tl.constexpr, SC: tl.constexpr,
    SC_N: tl.constexpr, VEC: tl.constexpr, CONST_B: tl.constexpr, CONST_C: tl.constexpr, SOFTPLUS: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # Grid (cdiv(b, R) * g * cdiv(d / g, 8 W),): a program owns 8 W channels of R sequences.  Four lanes hold a channel:
    #   two for the first half of each 16 states, two for the second; a lane's states are four neighbours, 16 bytes.
    # Traffic: the state read and written once, 8 * b*d*n bytes; x, dt, z, y once; A once for R sequences.
    # Numerics: the formulas of the walk over many tokens, and its order of every sum: per half of 16 states one chain
    #   over the even ones and one over the odd ones, so the lane that has a half's end carries on where the one with
    #   its beginning stopped.
    # Bound: one sequence: the latency of one load and the chain behind it, so every load comes before the first use.
    #   Many: memory.
    STATES: tl.constexpr = 16
    ROW: tl.constexpr = B_ptr.dtype.element_ty
    DG: tl.constexpr = DIM // GROUPS
    BLOCKS: tl.constexpr = (DG + 8 * W - 1) // (8 * W)
    EVEN: tl.constexpr = DG % (8 * W) == 0
    PARTS: tl.constexpr = (N + STATES - 1) // STATES
    NS: tl.constexpr = N if PARTS == 1 else STATES
    NH: tl.constexpr = (NS + 1) // 2
    P: tl.constexpr = (NH + 3) // 4 * 2
    WIDE: tl.constexpr = NS == STATES
    H0: tl.constexpr = h0_ptr is not None
    MASK: tl.constexpr = mask_ptr is not None
    FINAL: tl.constexpr = h_ptr is not None
    lane = tl.arange(0, 32 * W)
    pid = tl.program_id(0)
    blk = pid % (BLOCKS * GROUPS)
    seq0 = (pid // (BLOCKS * GROUPS)) * R
    in_group = blk % BLOCKS * (8 * W) + lane // 4
    real_d = in_group < DG
    if not EVEN:
        in_group = tl.minimum(in_group, DG - 1)
    offs_d = blk // BLOCKS * DG + in_group
    wide = tl.zeros([], tl.int64)
    group = blk // BLOCKS + wide if GROUPS > 1 else wide
    half = lane // 2 % 2
    index = lane % 2 * P  # in the half

    seqs, xs, dts, zs, ms = (), (), (), (), ()
    bias = tl.load(bias_ptr + offs_d) if bias_ptr is not None else 0.0
    for i in tl.static_range(R):
        seqs = seqs + ((tl.minimum(seq0 + i, b - 1) if R > 1 else seq0).to(tl.int64),)
        dts = dts + (tl.load(dt_ptr + seqs[i] * sdt_b + offs_d),)
        xs = xs + (tl.load(x_ptr + seqs[i] * sx_b + offs_d),)
        zs = zs + (tl.load(z_ptr + seqs[i] * sz_b + offs_d) if z_ptr is not None else offs_d,)
        ms = ms + (tl.load(mask_ptr + seqs[i] * sm_b) if MASK else offs_d,)
    D = tl.load(D_ptr + offs_d) if D_ptr is not None else 0.0
    As, hs, Bs, Cs = (), (), (), ()
    for part in tl.static_range(PARTS):
        state = part * STATES + half * NH + index
        As = As + (_values(A_ptr + offs_d * N + state, 1, index, half, P, NH, NS, WIDE, ASM),)
        for i in tl.static_range(R):
            if H0:
                h_p = h0_ptr + seqs[i] * (DIM * N) + (offs_d * N + state)
                hs = hs + (_values(h_p, 1, index, half, P, NH, NS, WIDE, ASM),)
            if i == 0 or not CONST_B:
                B_p = B_ptr + (seqs[i] * sB_b + (offs_d + wide if CONST_B else group) * SB) + (state + wide) * SB_N
                Bs = Bs + (_values(B_p, SB_N, index, half, P, NH, NS, VEC and WIDE, ASM),)
            if i == 0 or not CONST_C:
                C_p = C_ptr + (seqs[i] * sC_b + (offs_d + wide if CONST_C else group) * SC) + (state + wide) * SC_N
                Cs = Cs + (_values(C_p, SC_N, index, half, P, NH, NS, VEC and WIDE, ASM),)

    for i in tl.static_range(R):
        dt = dts[i].to(tl.float32) + bias
        x = xs[i].to(tl.float32)
        real = ms[i] != 0
        if SOFTPLUS:
            dt = softplus(dt, ASM)
        if MASK:  # after softplus: decay 1 and input 0 leave the state as it was
            dt = tl.where(real, dt, 0.0)
            x = tl.where(real, x, 0.0)
        store = (real_d & (seq0 + i < b)) if R > 1 else real_d
        y = x
        for part in tl.static_range(PARTS):
            h = _step(
                _unpack(hs[part * R + i], P, WIDE, tl.float32) if H0 else (),
                _unpack(As[part], P, WIDE, tl.float32),
                _unpack(Bs[part if CONST_B else part * R + i], P, VEC and WIDE, ROW),
                dt, dt * x, real, P, H0, MASK, ASM,
            )  # fmt: skip
            if FINAL:
                h_p = h_ptr + seqs[i] * (DIM * N) + (offs_d * N + part * STATES + half * NH + index)
                if ASM and WIDE:
                    store4(h_p, h[0], h[1], h[2], h[3], store)
                else:
                    for j in tl.static_range(P):
                        tl.store(h_p + j, h[j], mask=store & (index + j < NH) & (half * NH + index + j < NS))
            total = _dot(h, _unpack(Cs[part if CONST_C else part * R + i], P, VEC and WIDE, ROW), lane, P, ASM)
            if part > 0:
                y += total
            elif D_ptr is not None:
                y = tl.fma(D, x, total)
            else:
                y = total
        if z_ptr is not None:
            z = zs[i].to(tl.float32)
            y *= z * sigmoid(z, ASM)
        y_p = y_ptr + seqs[i] * DIM + offs_d
        tl.store(y_p, y.to(y_ptr.dtype.element_ty), mask=store & (lane % 4 == 1))


def _lanes(t: Tensor) -> Tensor:
    """Lanes are channels: channels must be neighbours in memory."""
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


def _aligned(t: Tensor | None) -> Tensor | None:
    """A (d, n) array that lanes read 16 bytes at a time."""
    if t is None:
        return None
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    dt_softplus: bool,
    return_final_state: bool,
    out_fp32: bool,
    rows: int = 0,
    warps: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """x: (b, 1, d) and the rest as in the op -> y and the final state.  rows, warps: a launch to measure."""
    b, _, d = x.shape
    n = A.shape[1]
    x, dt, A, initial_state = _lanes(x), _lanes(dt), _aligned(A), _aligned(initial_state)
    y = torch.empty((b, 1, d), dtype=torch.float32 if out_fp32 else x.dtype, device=x.device)
    final = torch.empty((b, d, n), dtype=torch.float32, device=x.device) if return_final_state else None
    sz_b = 0
    if z is not None:
        z = _lanes(z)
        sz_b = z.stride(0)
    const_B, const_C = B.ndim == 2, C.ndim == 2
    (sB_b, sB, sB_n) = (0, *B.stride()) if const_B else (B.stride(0), *B.stride()[2:])
    (sC_b, sC, sC_n) = (0, *C.stride()) if const_C else (C.stride(0), *C.stride()[2:])
    groups = 1 if const_B and const_C else C.shape[2] if const_B else B.shape[2]
    size = x.element_size()
    places = B.data_ptr() | C.data_ptr()
    strides = (
        (sB_b | sC_b if b > 1 else 0) | (sB if const_B or groups > 1 else 0) | (sC if const_C or groups > 1 else 0)
    )
    vector = sB_n == 1 and sC_n == 1 and (places | size * strides) % (4 * size) == 0
    if not rows:
        many = b * d // WARP_CHANNELS
        rows, warps = next((rows, warps) for least, rows, warps in STEP if many >= least)
    channels = d // groups
    grid = (-(-b // rows) * groups * -(-channels // (WARP_CHANNELS * warps)),)
    with on_device(x):
        _scan_step_kernel[grid](
            x, dt, A, B, C, D if D is None else D.contiguous(), z, dt_bias if dt_bias is None else dt_bias.contiguous(),
            initial_state, mask if mask is None else mask.view(torch.uint8), y, final,
            b, x.stride(0), dt.stride(0), sz_b, sB_b, sC_b, 0 if mask is None else mask.stride(0),
            d, n, groups, sB, sB_n, sC, sC_n, vector, const_B, const_C, dt_softplus, rows, warps, ASM,
            num_warps=warps,
        )  # fmt: skip
    return y, final


def aot_cases() -> list[AotCase]:
    """One token of the small model; each row of STEP, and what else makes another kernel."""
    cases = []

    def case(name: str, b=1, n=16, dtype=torch.bfloat16, z=True, slow=True) -> None:
        d, r = 768, 24
        projected = meta(b, 1, r + 2 * n, dtype=dtype)[:, :, None]
        B, C = projected[..., r : r + n], projected[..., r + n :]
        x, f = meta(b, 1, d, dtype=dtype), meta(d)
        gate = meta(b, 1, 2 * d, dtype=dtype)[..., d:] if z else None
        args = (x, x, meta(d, n), B, C, f, gate, f, meta(b, d, n), None, True, True, False)
        cases.append(AotCase(name, scan_step, args, slow))

    case("bf16", slow=False)
    case("many-bf16", b=256, slow=False)
    case("fp16", dtype=torch.float16)
    case("many-fp32", b=256, dtype=torch.float32)
    case("n8-bf16", n=8)
    case("n64-bf16", n=64)
    return cases
