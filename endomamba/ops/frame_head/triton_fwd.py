"""frame_head on a GPU: norm, pool and Linear of a frame in one kernel, where PyTorch's operators are four."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import INTERPRET, AotCase, meta, on_device

# Values of a step over tokens, and its warps: few steps, as each waits for its loads.
TILE = 256 if INTERPRET else 32768
WARPS = 16
CLASSES = 16  # of a step over them
SHARE = 32 if INTERPRET else 64  # classes of a program: with more of them others make the same mean again, meanwhile


# Grid (b, shares of the classes): a program sums a frame's normed tokens, then takes the product of that one row with
# its share of the weights.
# Traffic: the tokens once, 303 KB of EndoMamba small, from L2 where the last block has just written them; the weights.
# Numerics: fp32; a frame's bits do not depend on the others.
@triton.jit(do_not_specialize=["l", "tokens", "k"])
def _frame_head_kernel(
    out_ptr,  # (b, k)
    residual_ptr,  # (b, l, c)
    weight_ptr,  # (k, c)
    bias_ptr,  # (k,)
    l,
    tokens,  # that are pooled, from the first on
    k,
    eps,
    c: tl.constexpr,
    BL: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    SHARE: tl.constexpr,
):
    frame, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * SHARE
    channel = tl.arange(0, BC)
    pooled = tl.zeros([BC], tl.float32)
    residual_ptr += frame * l * c
    for start in range(0, tokens, BL):
        token = start + tl.arange(0, BL)
        mask = (token < tokens)[:, None] & (channel < c)[None, :]
        x = tl.load(residual_ptr + token[:, None].to(tl.int64) * c + channel[None, :], mask, 0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(x * x, 1) / c + eps)
        pooled += tl.sum(x * factor[:, None], 0)
    pooled = pooled / tokens
    for start in range(first, min(first + SHARE, k), BK):
        of = start + tl.arange(0, BK)
        mask = (of < k)[:, None] & (channel < c)[None, :]
        w = tl.load(weight_ptr + of[:, None].to(tl.int64) * c + channel[None, :], mask, 0.0).to(tl.float32)
        logits = tl.sum(w * pooled[None, :], 1) + tl.load(bias_ptr + of, of < k, 0.0).to(tl.float32)
        tl.store(out_ptr + frame * k + of, logits.to(out_ptr.dtype.element_ty), of < k)


def frame_head(residual: Tensor, weight: Tensor, bias: Tensor, mean: bool, eps: float, dtype: torch.dtype) -> Tensor:
    (b, l, c), k = residual.shape, weight.shape[0]
    out = torch.empty(b, k, dtype=dtype, device=residual.device)
    if out.numel():
        width = triton.next_power_of_2(c)
        rows = max(1, TILE // width) if mean else 1
        with on_device(residual):
            _frame_head_kernel[(b, triton.cdiv(k, SHARE))](
                out, residual.contiguous(), weight.contiguous(), bias, l, l if mean else 1, k, eps,
                c, rows, width, min(CLASSES, max(1, TILE // width)), SHARE, num_warps=WARPS if mean else 4,
            )  # fmt: skip
    return out


def aot_cases() -> list[AotCase]:
    cases = []
    for name, c, mean, dtype in (
        ("small", 384, True, torch.bfloat16), ("middle", 576, True, torch.float32), ("cls", 384, False, torch.bfloat16)
    ):  # fmt: skip
        args = (meta(4, 197, c), meta(7, c), meta(7), mean, 1e-5, dtype)
        cases.append(AotCase(name, frame_head, args, slow=name != "small"))
    return cases
