"""The gradients of add_rms_norm and add_layer_norm on a GPU; README.md has the equations.

Letters: b rows of the batch, m rows of channels in each, c channels; a row below is one of the b * m.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import AotCase, meta, on_device
from .triton_fwd import WIDE, aot_options, as_rows, block, cdiv, row_offsets, row_strides

# BLOCK_C: (rows of one step, warps, programs at most).  Sums along a row are shuffles up to 512 channels, as forward.
# Each program has one partial sum of dweight and dbias.  Their number fits what 128 processors hold at once: 16 warps
# each at the 128 registers that a row of 512 channels needs, 32 with half of them.
LAUNCH = {
    16: (16, 1, 4096),
    32: (8, 1, 4096),
    64: (4, 1, 4096),
    128: (2, 1, 4096),
    256: (1, 1, 4096),
    512: (1, 1, 2048),  # c = 384, bf16, sm_90: 116 registers; in two warps each sum would wait at a barrier
    1024: (1, 2, 1024),
    2048: (1, 4, 512),
    4096: (1, 8, 256),
}
MIN_STEPS = 4  # below, partial sums would be as much traffic as the rows
SUM_BLOCK = (512, 8)  # partial sums x columns: 8 columns are one sector


@triton.jit
def _through_norm(g, r, mean, rstd, weight, c, mask, LAYER_NORM: tl.constexpr):
    """-> the gradient of r through the norm [ROWS, BLOCK_C], and rhat."""
    rhat = (r - mean[:, None]) * rstd[:, None] if LAYER_NORM else r * rstd[:, None]
    wg = g * weight[None, :]
    dr = wg - rhat * (tl.sum(wg * rhat, 1) / c)[:, None]  # wg is zero where masked
    if LAYER_NORM:
        dr -= (tl.sum(wg, 1) / c)[:, None]
    return dr * rstd[:, None], rhat


# Grid (programs,): program i owns rows [i * per_program, (i + 1) * per_program), ROWS of them a step.
# Registers: dweight and dbias of these rows [ROWS, BLOCK_C] and weight for the whole loop; a row from load to store.
# Traffic: dnormed, r and its gradient (and x for the row scale's) read once, dx and dresidual written once; partial
#   sums: programs * c, written here and read by _sum_kernel.
# Numerics: fp32.  dweight: rows of a program in order, then the programs in a fixed tree.
@triton.jit(do_not_specialize=["rows", "m", "per_program"])
def _add_norm_bwd_kernel(
    dnormed_ptr,
    dnew_ptr,
    x_ptr,
    r_ptr,
    stats_ptr,
    weight_ptr,
    row_scale_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dbias_ptr,
    dscale_ptr,
    rows,
    m,
    c,
    per_program,
    stride_g_b,
    stride_g_m,
    stride_g_c,
    stride_n_b,
    stride_n_m,
    stride_n_c,
    stride_x_b,
    stride_x_m,
    stride_x_c,
    LAYER_NORM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0).to(rows.dtype)
    begin = program * per_program
    end = tl.minimum(begin + per_program, rows)
    offs_c = tl.max_contiguous(tl.arange(0, BLOCK_C), 4)
    mask_c = offs_c < c
    wide_c = offs_c[None, :].to(tl.int64)
    if dweight_ptr is not None:
        weight = tl.load(weight_ptr + offs_c, mask_c, 0.0)
        dweight = tl.zeros([ROWS, BLOCK_C], tl.float32)
        dbias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for i in range(0, end - begin, ROWS):
        row = begin + i + tl.arange(0, ROWS)
        mask_row = row < end
        mask = mask_row[:, None] & mask_c[None, :]
        offs_out = row.to(tl.int64)[:, None] * c + offs_c[None, :]
        if dweight_ptr is not None:
            offs_g = row_offsets(row, m, stride_g_b, stride_g_m)[:, None] + wide_c * stride_g_c
            g = tl.load(dnormed_ptr + offs_g, mask, 0.0).to(tl.float32)  # [ROWS, BLOCK_C]
            r = tl.load(r_ptr + offs_out, mask, 0.0)
            rstd = tl.load(stats_ptr + (rows.to(tl.int64) + row if LAYER_NORM else row), mask_row, 0.0)
            mean = tl.load(stats_ptr + row, mask_row, 0.0) if LAYER_NORM else rstd
        if dnew_ptr is not None:
            offs_n = row_offsets(row, m, stride_n_b, stride_n_m)[:, None] + wide_c * stride_n_c
            dnew = tl.load(dnew_ptr + offs_n, mask, 0.0).to(tl.float32)
        if dweight_ptr is not None:
            dr, rhat = _through_norm(g, r, mean, rstd, weight, c, mask, LAYER_NORM)
            dweight += g * rhat
            if dbias_ptr is not None:
                dbias += g
            if dnew_ptr is not None:
                dr += dnew
        else:
            dr = dnew
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + offs_out, dr, mask)
        if dscale_ptr is not None:
            offs_x = row_offsets(row, m, stride_x_b, stride_x_m)[:, None] + wide_c * stride_x_c
            x = tl.load(x_ptr + offs_x, mask, 0.0).to(tl.float32)
            tl.store(dscale_ptr + row, tl.sum(tl.where(mask, dr * x, 0.0), 1), mask_row)
        if row_scale_ptr is not None:
            dr *= tl.load(row_scale_ptr + row // m, mask_row, 0.0)[:, None]
        tl.store(dx_ptr + offs_out, dr.to(dx_ptr.dtype.element_ty), mask)
    if dweight_ptr is not None:
        offs_part = program.to(tl.int64) * c + offs_c
        tl.store(dweight_ptr + offs_part, tl.sum(dweight, 0), mask_c)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + offs_part, tl.sum(dbias, 0), mask_c)


# Grid (rows,): one program owns a row too wide for registers and reads it twice.
@triton.jit(do_not_specialize=["rows", "m"])
def _add_norm_wide_bwd_kernel(
    dnormed_ptr,
    dnew_ptr,
    x_ptr,
    r_ptr,
    stats_ptr,
    weight_ptr,
    row_scale_ptr,
    dx_ptr,
    dresidual_ptr,
    dscale_ptr,
    rows,
    m,
    c,
    stride_g_b,
    stride_g_m,
    stride_g_c,
    stride_n_b,
    stride_n_m,
    stride_n_c,
    stride_x_b,
    stride_x_m,
    stride_x_c,
    LAYER_NORM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(rows.dtype)
    start_g = row_offsets(row, m, stride_g_b, stride_g_m)
    start_n = row_offsets(row, m, stride_n_b, stride_n_m)
    start_x = row_offsets(row, m, stride_x_b, stride_x_m)
    start_out = row.to(tl.int64) * c
    scale = 1.0
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + row // m)
    mean, rstd, along, shared = 0.0, 0.0, 0.0, 0.0
    if dnormed_ptr is not None:
        rstd = tl.load(stats_ptr + (rows.to(tl.int64) + row if LAYER_NORM else row))
        if LAYER_NORM:
            mean = tl.load(stats_ptr + row)
        along_c = tl.zeros([BLOCK_C], tl.float32)
        shared_c = tl.zeros([BLOCK_C], tl.float32)
        for start in range(0, c, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
            mask = offs_c < c
            g = tl.load(dnormed_ptr + start_g + offs_c * stride_g_c, mask, 0.0).to(tl.float32)
            wg = g * tl.load(weight_ptr + offs_c, mask, 0.0)
            along_c += wg * (tl.load(r_ptr + start_out + offs_c, mask, 0.0) - mean) * rstd
            shared_c += wg
        along = tl.sum(along_c, 0) / c
        if LAYER_NORM:
            shared = tl.sum(shared_c, 0) / c
    dscale = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, c, BLOCK_C):
        offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = offs_c < c
        dr = tl.zeros([BLOCK_C], tl.float32)
        if dnormed_ptr is not None:
            g = tl.load(dnormed_ptr + start_g + offs_c * stride_g_c, mask, 0.0).to(tl.float32)
            wg = g * tl.load(weight_ptr + offs_c, mask, 0.0)
            rhat = (tl.load(r_ptr + start_out + offs_c, mask, 0.0) - mean) * rstd
            dr = (wg - rhat * along - shared) * rstd
        if dnew_ptr is not None:
            dr += tl.load(dnew_ptr + start_n + offs_c * stride_n_c, mask, 0.0).to(tl.float32)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + start_out + offs_c, dr, mask)
        if dscale_ptr is not None:
            x = tl.load(x_ptr + start_x + offs_c * stride_x_c, mask, 0.0).to(tl.float32)
            dscale += tl.where(mask, dr * x, 0.0)
        tl.store(dx_ptr + start_out + offs_c, (dr * scale).to(dx_ptr.dtype.element_ty), mask)
    if dscale_ptr is not None:
        tl.store(dscale_ptr + row, tl.sum(dscale, 0))


# Grid (programs * cdiv(c, BLOCK_C),): dweight and dbias of per_program wide rows, one block of their channels.
@triton.jit(do_not_specialize=["rows", "m", "per_program"])
def _add_norm_wide_dweight_kernel(
    dnormed_ptr,
    r_ptr,
    stats_ptr,
    dweight_ptr,
    dbias_ptr,
    rows,
    m,
    c,
    per_program,
    stride_g_b,
    stride_g_m,
    stride_g_c,
    LAYER_NORM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks = tl.cdiv(c, BLOCK_C)
    program = (tl.program_id(0) // blocks).to(rows.dtype)
    offs_c = (tl.program_id(0) % blocks * BLOCK_C).to(tl.int64) + tl.arange(0, BLOCK_C)
    mask = offs_c < c
    dweight = tl.zeros([BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_C], tl.float32)
    begin = program * per_program
    for i in range(0, tl.minimum(per_program, rows - begin)):
        row = begin + i
        offs_g = row_offsets(row, m, stride_g_b, stride_g_m) + offs_c * stride_g_c
        g = tl.load(dnormed_ptr + offs_g, mask, 0.0).to(tl.float32)
        r = tl.load(r_ptr + row.to(tl.int64) * c + offs_c, mask, 0.0)
        if LAYER_NORM:
            r -= tl.load(stats_ptr + row)
        rstd = tl.load(stats_ptr + (rows.to(tl.int64) + row if LAYER_NORM else row))
        dweight += g * r * rstd
        dbias += g
    offs_part = program.to(tl.int64) * c + offs_c
    tl.store(dweight_ptr + offs_part, dweight, mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + offs_part, dbias, mask)


# Grid (cdiv(n, BLOCK_N),): out[j] = sum over i of part[i, j], in blocks of BLOCK_I terms, then a tree.
@triton.jit(do_not_specialize=["terms", "n", "stride_i", "stride_j"])
def _sum_kernel(part_ptr, out_ptr, terms, n, stride_i, stride_j, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr):
    offs_j = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_j = offs_j < n
    total = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
    for start in range(0, terms, BLOCK_I):
        offs_i = start + tl.arange(0, BLOCK_I).to(tl.int64)
        mask = (offs_i < terms)[:, None] & mask_j[None, :]
        total += tl.load(part_ptr + offs_i[:, None] * stride_i + offs_j[None, :] * stride_j, mask, 0.0)
    tl.store(out_ptr + offs_j, tl.sum(total, 0), mask_j)


def _sum(part: Tensor, out: Tensor, terms: int, stride_i: int, stride_j: int) -> None:
    n = out.numel()
    _sum_kernel[(cdiv(n, SUM_BLOCK[1]),)](part, out, terms, n, stride_i, stride_j, *SUM_BLOCK, num_warps=4)


def add_norm_bwd(
    dnormed, dnew_residual, x, new_residual, stats, weight, bias, row_scale, dtype, has_residual, layer_norm
):
    shape = b, m, c = as_rows(new_residual.shape)
    rows = b * m
    given = dnormed is not None and rows * c > 0
    dx = new_residual.new_empty(new_residual.shape, dtype=dtype)
    dresidual = weight.new_empty(new_residual.shape if has_residual else 0)
    dweight = weight.new_empty(c) if given else weight.new_zeros(c)
    absent = weight.new_empty(0)
    dbias = absent if bias is None else torch.empty_like(dweight) if given else weight.new_zeros(c)
    if not rows * c:
        return dx, dweight, dbias, dresidual, weight.new_zeros(0 if x is None else b)
    dscale = weight.new_empty(0 if x is None else b)
    width = block(c)
    step, warps, most = LAUNCH[width]
    per_program = cdiv(max(MIN_STEPS * step, cdiv(rows, most)), step) * step
    programs = cdiv(rows, per_program)
    dweight_part, dbias_part = dweight, dbias
    if given and programs > 1:
        dweight_part = weight.new_empty(programs, c)
        dbias_part = None if bias is None else torch.empty_like(dweight_part)
    dscale_rows = None if x is None else weight.new_empty(rows)
    dnormed, *strides_g = row_strides(dnormed, shape)
    dnew_residual, *strides_n = row_strides(dnew_residual, shape)
    x, *strides_x = row_strides(x, shape)
    r, stats, weight = new_residual.contiguous(), stats.contiguous(), weight.contiguous()
    row_scale = None if row_scale is None else row_scale.contiguous()
    outputs = dx, dresidual if has_residual else None
    sums = dweight_part if given else None, dbias_part if given and bias is not None else None
    strides = *strides_g, *strides_n, *strides_x
    with on_device(r):
        if c > WIDE:
            _add_norm_wide_bwd_kernel[(rows,)](
                dnormed, dnew_residual, x, r, stats, weight, row_scale, *outputs, dscale_rows, rows, m, c, *strides,
                layer_norm, width, num_warps=warps,
            )  # fmt: skip
            if given:
                _add_norm_wide_dweight_kernel[(programs * cdiv(c, 1024),)](
                    dnormed, r, stats, *sums, rows, m, c, per_program, *strides_g, layer_norm, 1024, num_warps=4
                )
        else:
            _add_norm_bwd_kernel[(programs,)](
                dnormed, dnew_residual, x, r, stats, weight, row_scale, *outputs, *sums, dscale_rows,
                rows, m, c, per_program, *strides, layer_norm, step, width, num_warps=warps,
            )  # fmt: skip
        if given and programs > 1:
            _sum(dweight_part, dweight, programs, c, 1)
            if bias is not None:
                _sum(dbias_part, dbias, programs, c, 1)
        if x is not None:
            _sum(dscale_rows, dscale, m, 1, m)
    return dx, dweight, dbias, dresidual, dscale


def aot_cases() -> list[AotCase]:
    """x is given, for the gradient of the row scale, in the cases of a LayerNorm only: most registers."""
    cases = []
    for name, c, dtype, layer, first, slow in aot_options():
        low, wide = meta(4, 197, c, dtype=dtype), meta(4, 197, c)
        stats, vectors = meta(1 + layer, 4 * 197), (meta(c), meta(c) if layer else None)
        args = (
            low,
            wide,
            low if layer else None,
            wide,
            stats,
            *vectors,
            None if first else meta(4),
            dtype,
            not first,
            layer,
        )
        cases.append(AotCase(name, add_norm_bwd, args, slow=slow))
    return cases
