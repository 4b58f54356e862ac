"""Sums over the lanes of a warp, 16 values at a time, by the matrix unit."""

import triton
import triton.language as tl

from ._triton_shared import pinned


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
def one_hots(lane):
    out = ()
    for i in tl.static_range(8):
        out = out + (pinned(tl.where((lane % 32) // 4 == i, 0x3F800000, 0).to(tl.int32)),)
    return out


@triton.jit
def lane_sums(u, v, e, lane, EXACT: tl.constexpr):
    # u, v: 8 values a lane of a pair's first and second token -> lane: one sum, at the kernel's `place`
    TEXT: tl.constexpr = _SUM_EXACT if EXACT else _SUM
    return tl.inline_asm_elementwise(
        TEXT, _SUM_OPERANDS,
        [u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7],
         e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7], lane],
        dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def pad(v, NH: tl.constexpr, TO: tl.constexpr):
    for _ in tl.static_range(NH, TO):
        v = v + (v[0] * 0.0,)
    return v


@triton.jit
def store_sums(p, u, v, live, half, NH: tl.constexpr):
    # not ASM: the sums over the program's channels of u (first token) and v (second) to their row in global memory
    for i in tl.static_range(NH):
        tl.store(p + i, tl.sum(tl.where(half == 0, u[i], 0.0), axis=0), mask=live)
        tl.store(p + 8 + i, tl.sum(tl.where(half == 1, u[i], 0.0), axis=0), mask=live)
        tl.store(p + 16 + i, tl.sum(tl.where(half == 0, v[i], 0.0), axis=0), mask=live)
        tl.store(p + 24 + i, tl.sum(tl.where(half == 1, v[i], 0.0), axis=0), mask=live)
