"""Formulas that every Triton kernel shares, all in fp32.  ASM: PTX is available (see _triton.ASM)."""

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
