"""Formulas that Triton kernels share, in fp32 but for `sin_cos`.  ASM: PTX is available (see _triton.ASM)."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
NEG_LOG2E = tl.constexpr(-1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp2(x, ASM: tl.constexpr):
    # ex2.approx: 2 ulp, results below 2^-126 become 0.  tl.exp2 alone adds a test for subnormal results.
    if ASM:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _log1p01(u):
    # log1p on [0, 1] as u * P(u), P by Remez: relative error 2.1e-7
    p = u * 0.0051261018961668015 + -0.029074065387248993
    p = p * u + 0.0775160863995552
    p = p * u + -0.13602247834205627
    p = p * u + 0.19076880812644958
    p = p * u + -0.2483539879322052
    p = p * u + 0.3331812024116516
    p = p * u + -0.4999944567680359
    p = p * u + 0.9999999403953552
    return p * u


@triton.jit
def softplus(v, ASM: tl.constexpr):
    # max(v, 0) + log1p(exp(-|v|)): no overflow, no cancellation; above 20 it is v itself in fp32
    return tl.maximum(v, 0.0) + _log1p01(exp2(tl.abs(v) * NEG_LOG2E, ASM))


@triton.jit
def sigmoid(v, ASM: tl.constexpr):
    # 1 / (1 + exp(-v)); exp overflows to inf for v < -88 and the quotient is 0, as it should be
    if ASM:
        return tl.inline_asm_elementwise(
            "{.reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t;}",
            "=f,f",
            [v * NEG_LOG2E],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + tl.exp2(v * NEG_LOG2E))


# pi / 2 in three: 26 bits, 26 bits, the rest.
_TURN_A = tl.constexpr(float.fromhex("0x1.921fb5p+0"))
_TURN_B = tl.constexpr(float.fromhex("0x1.110b46p-26"))
_TURN_C = tl.constexpr(float.fromhex("0x1.1a62633145c07p-54"))


@triton.jit
def sin_cos(angle):
    """Both of fp64 angles from 0 to 2^53, to 1e-13.  libdevice's, one after the other, look into a table in memory.

    Quarter turns are taken off in products that are exact (27 bits or fewer times 26), with or without FMA; two of them
    are left at most where the count itself was rounded, and go in a second step.  Then Taylor, to pi / 4.
    """
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    high = tl.floor(quarters * 2.0**-27) * 2.0**27
    low = quarters - high
    r = angle - high * _TURN_A - low * _TURN_A - high * _TURN_B - low * _TURN_B - quarters * _TURN_C
    rest = tl.floor(r * 0.6366197723675814 + 0.5)
    r = r - rest * 1.5707963267948966
    turn = quarters.to(tl.int64) + rest.to(tl.int64)
    z = r * r
    sin = 1 / 362880 + z * (z * (1 / 6227020800) - 1 / 39916800)
    sin = r + r * z * (z * (1 / 120 + z * (z * sin - 1 / 5040)) - 1 / 6)
    cos = 1 / 40320 + z * (z * (1 / 479001600 - z * (1 / 87178291200)) - 1 / 3628800)
    cos = 1 + z * (z * (1 / 24 + z * (z * cos - 1 / 720)) - 1 / 2)
    odd = turn & 1 == 1
    sin, cos = tl.where(odd, cos, sin), tl.where(odd, sin, cos)
    return tl.where(turn & 2 == 2, -sin, sin), tl.where((turn + 1) & 2 == 2, -cos, cos)
