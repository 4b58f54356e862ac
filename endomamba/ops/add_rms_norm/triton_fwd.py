"""add_rms_norm and add_layer_norm on a GPU: one pass over memory.

Letters: b rows of the batch, m rows of channels in each, c channels; a row below is one of the b * m.
"""

from __future__ import annotations

import functools
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import AotCase, meta, on_device

# BLOCK_C: (rows of a program, warps).  Up to 512 channels a row stays inside a warp, 16 elements of a tensor in each
# thread: sums are shuffles, without a barrier.  Chosen by c alone, so a row's bits do not depend on the batch.
LAUNCH = {
    16: (16, 1),
    32: (8, 1),
    64: (8, 1),
    128: (4, 1),
    256: (2, 1),
    512: (1, 1),  # c = 384, bf16, sm_90: 46 registers; in two warps each sum would wait at a barrier
    1024: (1, 2),
    2048: (1, 4),
    4096: (1, 8),
}
# Above 4096 channels a row does not fit in registers; its blocks are read once more for every pass.
WIDE = 4096


@triton.jit
def row_offsets(row, m, stride_b, stride_m):
    """Where rows begin in a (b, m, c) tensor of any strides."""
    return (row // m).to(tl.int64) * stride_b + (row % m).to(tl.int64) * stride_m


@triton.jit
def _added(x_ptr, residual_ptr, offs_x, offs_r, scale, mask):
    """residual + scale * x in fp32; zero where masked."""
    r = tl.load(x_ptr + offs_x, mask, 0.0).to(tl.float32) * scale
    if residual_ptr is not None:
        r += tl.load(residual_ptr + offs_r, mask, 0.0).to(tl.float32)
    return r


# Grid (cdiv(rows, ROWS),): one program owns ROWS rows, each of them in registers from the first load to the last store.
# Traffic: x and residual read once, normed and the new residual written once; weight and bias from L1.
# Layout: four neighbouring channels a thread (16 bytes of fp32, 8 of bf16), forced by max_contiguous.  Triton alone
#   takes eight for bf16 and shuffles r to four for its store: 376 instructions a row instead of 264 (c = 384, sm_90).
# Numerics: fp32; the variance is that of the centred row; normed is made from r before any rounding.
@triton.jit(do_not_specialize=["rows", "m"])
def _add_norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    row_scale_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    new_residual_ptr,
    stats_ptr,
    rows,
    m,
    c,
    eps,
    stride_x_b,
    stride_x_m,
    stride_x_c,
    stride_r_b,
    stride_r_m,
    stride_r_c,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(rows.dtype) * ROWS + tl.arange(0, ROWS)
    mask_row = row < rows
    offs_c = tl.max_contiguous(tl.arange(0, BLOCK_C), 4)
    mask_c = offs_c < c
    mask = mask_row[:, None] & mask_c[None, :]
    scale = 1.0
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + row // m, mask_row, 0.0)[:, None]
    offs_x = row_offsets(row, m, stride_x_b, stride_x_m)[:, None] + offs_c[None, :].to(tl.int64) * stride_x_c
    offs_r = row_offsets(row, m, stride_r_b, stride_r_m)[:, None] + offs_c[None, :].to(tl.int64) * stride_r_c
    r = _added(x_ptr, residual_ptr, offs_x, offs_r, scale, mask)  # [ROWS, BLOCK_C]
    offs_out = row.to(tl.int64)[:, None] * c + offs_c[None, :]
    tl.store(new_residual_ptr + offs_out, r, mask)
    if LAYER_NORM:
        mean = tl.sum(r, 1) / c
        tl.store(stats_ptr + row, mean, mask_row)
        r = tl.where(mask, r - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(r * r, 1) / c + eps)
    tl.store(stats_ptr + (rows.to(tl.int64) + row if LAYER_NORM else row), rstd, mask_row)
    normed = r * rstd[:, None] * tl.load(weight_ptr + offs_c, mask_c, 0.0)[None, :]
    if bias_ptr is not None:
        normed += tl.load(bias_ptr + offs_c, mask_c, 0.0)[None, :]
    tl.store(normed_ptr + offs_out, normed.to(normed_ptr.dtype.element_ty), mask)


# Grid (rows,): one program owns a row too wide for registers.  r is computed again in each pass, its inputs from L2.
@triton.jit(do_not_specialize=["rows", "m"])
def _add_norm_wide_fwd_kernel(
    x_ptr,
    residual_ptr,
    row_scale_ptr,
    weight_ptr,
    bias_ptr,
    normed_ptr,
    new_residual_ptr,
    stats_ptr,
    rows,
    m,
    c,
    eps,
    stride_x_b,
    stride_x_m,
    stride_x_c,
    stride_r_b,
    stride_r_m,
    stride_r_c,
    LAYER_NORM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(rows.dtype)
    scale = 1.0
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + row // m)
    start_x = row_offsets(row, m, stride_x_b, stride_x_m)
    start_r = row_offsets(row, m, stride_r_b, stride_r_m)
    start_out = row.to(tl.int64) * c
    total = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, c, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = offs_c < c
        r = _added(x_ptr, residual_ptr, start_x + offs_c * stride_x_c, start_r + offs_c * stride_r_c, scale, mask)
        tl.store(new_residual_ptr + start_out + offs_c, r, mask)
        total += r if LAYER_NORM else r * r
    mean = 0.0
    if LAYER_NORM:
        mean = tl.sum(total, 0) / c
        tl.store(stats_ptr + row, mean)
        total = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, c, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
            mask = offs_c < c
            r = _added(x_ptr, residual_ptr, start_x + offs_c * stride_x_c, start_r + offs_c * stride_r_c, scale, mask)
            r = tl.where(mask, r - mean, 0.0)
            total += r * r
    rstd = tl.rsqrt(tl.sum(total, 0) / c + eps)
    tl.store(stats_ptr + (rows.to(tl.int64) + row if LAYER_NORM else row), rstd)
    for start in range(0, c, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = offs_c < c
        r = _added(x_ptr, residual_ptr, start_x + offs_c * stride_x_c, start_r + offs_c * stride_r_c, scale, mask)
        normed = (r - mean) * rstd * tl.load(weight_ptr + offs_c, mask, 0.0)
        if bias_ptr is not None:
            normed += tl.load(bias_ptr + offs_c, mask, 0.0)
        tl.store(normed_ptr + start_out + offs_c, normed.to(normed_ptr.dtype.element_ty), mask)


def as_rows(shape: torch.Size) -> tuple[int, int, int]:
    return shape[0], prod(shape[1:-1]), shape[-1]


def row_strides(tensor: Tensor | None, shape: tuple[int, int, int]) -> tuple[Tensor | None, int, int, int]:
    """(b, m, c): a view where the strides between b and c allow one, else a copy; and its strides.

    An axis of length 1 is given stride 0: one kernel less to compile, and no alignment lost.
    """
    if tensor is None:
        return None, 0, 0, 1
    if tensor.ndim != 3:
        tensor = tensor.reshape(shape)
    strides = tensor.stride()
    return tensor, strides[0] if shape[0] > 1 else 0, strides[1] if shape[1] > 1 else 0, strides[2]


def cdiv(a: int, b: int) -> int:
    """triton.cdiv takes microseconds on the host."""
    return -(-a // b)


@functools.cache
def block(c: int) -> int:
    return min(max(16, triton.next_power_of_2(c)), WIDE)


def add_norm_fwd(x, weight, bias, residual, row_scale, eps, layer_norm):
    shape = b, m, c = as_rows(x.shape)
    rows = b * m
    normed, new_residual = x.new_empty(x.shape), weight.new_empty(x.shape)
    stats = weight.new_empty(1 + layer_norm, rows)
    if not rows * c:
        return normed, new_residual, stats
    x, *strides_x = row_strides(x, shape)
    residual, *strides_r = row_strides(residual, shape)
    weight = weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    row_scale = None if row_scale is None else row_scale.contiguous()
    args = (
        x, residual, row_scale, weight, bias, normed, new_residual, stats, rows, m, c, eps,
        *strides_x, *strides_r, layer_norm,
    )  # fmt: skip
    width = block(c)
    per_program, warps = LAUNCH[width]
    with on_device(x):
        if c > WIDE:
            _add_norm_wide_fwd_kernel[(rows,)](*args, width, num_warps=warps)
        else:
            grid = (cdiv(rows, per_program),)
            _add_norm_fwd_kernel[grid](*args, per_program, width, num_warps=warps)
    return normed, new_residual, stats


AOT_WIDTHS = (192, 384, 576, 16, 24, 40, 96, 2048, 4096, 5120)  # one of each row of the table, and a wide one


def aot_options():
    """(name, c, dtype, layer_norm, first layer of a network, slow): every width in bf16, the others at 384 channels."""
    rows = [(f"c{c}-bf16", c, torch.bfloat16, False, False, c not in (192, 384, 576, 5120)) for c in AOT_WIDTHS]
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        rows.append((f"c384-{name}", 384, dtype, False, False, name != "fp32"))
    rows.append(("c384-bf16-first", 384, torch.bfloat16, False, True, False))
    return rows + [(f"c{c}-bf16-layer", c, torch.bfloat16, True, False, c != 384) for c in (384, 5120)]


def aot_cases() -> list[AotCase]:
    cases = []
    for name, c, dtype, layer, first, slow in aot_options():
        vectors = meta(c), meta(c) if layer else None
        residual, row_scale = (None, None) if first else (meta(4, 197, c), meta(4))
        args = (meta(4, 197, c, dtype=dtype), *vectors, residual, row_scale, 1e-5, layer)
        cases.append(AotCase(name, add_norm_fwd, args, slow=slow))
    return cases
