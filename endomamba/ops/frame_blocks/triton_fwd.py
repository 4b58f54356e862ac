"""frame_blocks on a GPU: four kernels a block, each a dependent step of one frame.

Letters: b streams, l tokens, c channels, d inner channels, n states, s directions, r dt rank (padded), w conv width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._scan_triton_frame import STATES, FrameSide, frame_scan
from .._triton import ASM, INTERPRET, AotCase, meta, on_device
from .._triton_math import sigmoid, softplus
from .._triton_pdl import let_next_begin, wait_for_previous
from .table import INTERPRETED, LAUNCH


@triton.jit
def _dot(a, b, acc, EXACT: tl.constexpr):
    # fp32 operands as three tf32 products, which is nearly as exact as fp32; half precision as it is
    return tl.dot(a, b, acc, input_precision="tf32x3" if EXACT else None)


@triton.jit
def _product(a_p, w_p, acc, k, K: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr):
    # acc + a @ w.T; a_p, w_p: places of the first BK columns of their rows
    for k0 in range(0, K, BK):
        inside = (k + k0 < K)[None, :]
        a = tl.load(a_p + k0) if K % BK == 0 else tl.load(a_p + k0, mask=inside, other=0.0)
        w = tl.load(w_p + k0) if K % BK == 0 else tl.load(w_p + k0, mask=inside, other=0.0)
        acc = _dot(a, w.trans(), acc, EXACT)
    return acc


@triton.jit
def _begin_kernel(residual_ptr, copy_ptr, squares_ptr, C: tl.constexpr, BLOCK: tl.constexpr):
    # Grid (rows,): what _out_proj_kernel leaves for the next block, for the first one.
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    r = tl.load(residual_ptr + row * C + column, mask=column < C, other=0.0)
    tl.store(squares_ptr + row, tl.sum(r * r, 0))
    if copy_ptr is not None:
        tl.store(copy_ptr + row * C + column, r.to(copy_ptr.dtype.element_ty), mask=column < C)


@triton.jit(do_not_specialize=["l"])
def _in_conv_kernel(
    r_ptr, squares_ptr, weight_ptr, conv_ptr, conv_bias_ptr, state_ptr, u_ptr, z_ptr, tail_ptr, rows, l, eps,
    C: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, P2: tl.constexpr, TAPS: tl.constexpr, BOTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Grid (2 d / BN, cdiv(l, OWN), b): [x | z] = rms_norm(residual) @ weight.T, u = silu(conv(x)) of each direction.
    #   A program makes BM rows of one column tile and owns OWN of them: a conv looks TAPS tokens back, that of the
    #   second direction as many ahead, so neighbours make those rows twice.
    # The norm's weight lies in `weight`; 1 / rms is a factor of the row, from the squares that the block before summed.
    # The conv shifts rows by products with matrices of 0 and 1: exact, and no way through memory.
    # Traffic: the residual in the weight's dtype once a column of tiles, the weight once a row of them, from L2.
    # Numerics: products and conv in fp32; x is rounded to the model's dtype before the conv, as a tensor would be.
    OWN: tl.constexpr = BM - (2 * TAPS if BOTH else TAPS)
    DTYPE: tl.constexpr = weight_ptr.dtype.element_ty
    EXACT: tl.constexpr = weight_ptr.dtype.element_ty == tl.float32
    tile = tl.program_id(0)
    seq = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, BM)
    t = tl.program_id(1) * OWN - TAPS + i
    column = tile * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    there = (t >= 0) & (t < l)
    row = seq * l + tl.minimum(tl.maximum(t, 0), l - 1)
    r_p = r_ptr + row[:, None] * C + k[None, :]
    w_p = weight_ptr + column[:, None] * C + k[None, :]
    wait_for_previous(PDL)
    part = tl.arange(0, P2)
    squares = tl.load(squares_ptr + part[None, :] * rows + row[:, None], mask=(part < TILES)[None, :], other=0.0)
    acc = tl.zeros([BM, BN], tl.float32)
    acc = _product(r_p, w_p, acc, k, C, BK, EXACT)
    let_next_begin(PDL)
    factor = tl.where(there, tl.rsqrt(tl.sum(squares, 1) / C + eps), 0.0)
    xz = (acc * factor[:, None]).to(DTYPE)
    ours = (there & (i >= TAPS) & (i < TAPS + OWN))[:, None]
    if tile * BN >= D:
        tl.store(z_ptr + row[:, None] * D + (column - D)[None, :], xz, mask=ours)
    else:
        if state_ptr is not None:
            early = ((t < 0) & (t >= -TAPS))[:, None]
            place = (seq * TAPS + t + TAPS)[:, None] * D + column[None, :]
            xz = tl.where(early, tl.load(state_ptr + place, mask=early, other=0.0).to(DTYPE), xz)
            last = (t - l + TAPS)[:, None]
            at = (seq * TAPS + t - l + TAPS)[:, None] * D + column[None, :]
            tl.store(tail_ptr + at, xz.to(tl.float32), mask=ours & (last >= 0))
        for side in tl.static_range(2 if BOTH else 1):
            at = side * D + column
            v = (
                tl.load(conv_bias_ptr + at)[None, :]
                + xz.to(tl.float32) * tl.load(conv_ptr + at * (TAPS + 1) + TAPS)[None, :]
            )
            for j in tl.static_range(TAPS):
                shift = (i + (j - TAPS if side == 0 else TAPS - j))[:, None] == i[None, :]
                moved = _dot(shift.to(DTYPE), xz, tl.zeros([BM, BN], tl.float32), EXACT)
                v += moved * tl.load(conv_ptr + at * (TAPS + 1) + j)[None, :]
            u = v * sigmoid(v, ASM)
            tl.store(u_ptr + (side * rows + row)[:, None] * D + column[None, :], u.to(DTYPE), mask=ours)


@triton.jit
def _x_proj_kernel(
    u_ptr, x_weight_ptr, dt_weight_ptr, dt_bias_ptr, bc_ptr, dt_ptr, rows, D: tl.constexpr, N2: tl.constexpr,
    R: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # Grid (cdiv(rows, BM), s, PARTS): [dt | B | C] = x_proj(u), dt = softplus(dt_proj(dt) + bias) for BM rows of one
    #   direction.  Each part makes the low-rank dt again and owns D / PARTS channels of all, the first B and C.
    # Traffic: u and the low-rank rows of x_proj PARTS times, dt_proj once a row of programs, from L2; dt written, fp32.
    # Numerics: products and softplus fp32; the low-rank dt, B and C are rounded to the model's dtype.
    EVEN: tl.constexpr = D % BK == 0
    EXACT: tl.constexpr = u_ptr.dtype.element_ty == tl.float32
    side = tl.program_id(1)
    share = tl.program_id(2)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    there = (row < rows)[:, None]
    out_row = (side.to(tl.int64) * rows + row)[:, None]
    k = tl.arange(0, BK)
    rank = tl.arange(0, R)
    column = tl.arange(0, N2)
    x_weight_ptr += side * (R + N2) * D
    u_p = u_ptr + (side.to(tl.int64) * rows + tl.minimum(row, rows - 1))[:, None] * D + k[None, :]
    low_p = x_weight_ptr + rank[:, None] * D + k[None, :]
    bc_p = x_weight_ptr + (R + column)[:, None] * D + k[None, :]
    low = tl.zeros([BM, R], tl.float32)
    bc = tl.zeros([BM, N2], tl.float32)
    e = tl.arange(0, BD)
    ONE: tl.constexpr = PARTS * BD == D
    if ONE:
        w_dt = tl.load(dt_weight_ptr + (side * D + share * BD + e)[:, None] * R + rank[None, :])
        bias = tl.load(dt_bias_ptr + side * D + share * BD + e)
    wait_for_previous(PDL)
    if share == 0:
        for k0 in range(0, D, BK):
            inside = (k0 + k < D)[None, :]
            u = tl.load(u_p + k0) if EVEN else tl.load(u_p + k0, mask=inside, other=0.0)
            w_low = tl.load(low_p + k0) if EVEN else tl.load(low_p + k0, mask=inside, other=0.0)
            w_bc = tl.load(bc_p + k0) if EVEN else tl.load(bc_p + k0, mask=inside, other=0.0)
            low = _dot(u, w_low.trans(), low, EXACT)
            bc = _dot(u, w_bc.trans(), bc, EXACT)
        tl.store(bc_ptr + out_row * N2 + column[None, :], bc.to(bc_ptr.dtype.element_ty), mask=there)
    else:
        low = _product(u_p, low_p, low, k, D, BK, EXACT)
    let_next_begin(PDL)
    small = low.to(u_ptr.dtype.element_ty)
    if ONE:
        dt = softplus(_dot(small, w_dt.trans(), tl.zeros([BM, BD], tl.float32), EXACT) + bias[None, :], ASM)
        tl.store(dt_ptr + out_row * D + (share * BD + e)[None, :], dt, mask=there)
    else:
        for d0 in range(share * (D // PARTS), (share + 1) * (D // PARTS), BD):
            channel = d0 + e
            w = tl.load(dt_weight_ptr + (side * D + channel)[:, None] * R + rank[None, :])
            dt = _dot(small, w.trans(), tl.zeros([BM, BD], tl.float32), EXACT)
            dt = softplus(dt + tl.load(dt_bias_ptr + side * D + channel)[None, :], ASM)
            tl.store(dt_ptr + out_row * D + channel[None, :], dt, mask=there)


@triton.jit(do_not_specialize=["rows"])
def _out_proj_kernel(
    y_ptr, weight_ptr, residual_ptr, copy_ptr, squares_ptr, rows, D: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Grid (cdiv(C, BN), cdiv(rows, BM)): residual += y @ weight.T, in place; a program owns a BM x BN tile.
    # For the next block: the residual in the weight's dtype (copy), and the sum of squares of each row of the tile.
    # Traffic: y once for each column of tiles, the weight once for each row of them, from L2; the residual twice.
    # Numerics: summed in fp32 and added unrounded.
    EXACT: tl.constexpr = weight_ptr.dtype.element_ty == tl.float32
    tile = tl.program_id(0)
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    column = tile * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    there = (row < rows)[:, None]
    safe = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    a_p = y_ptr + safe * D + k[None, :]
    w_p = weight_ptr + tl.minimum(column, C - 1)[:, None] * D + k[None, :]
    own = there & (column < C)[None, :]
    at = safe * C + column[None, :]
    r = tl.load(residual_ptr + at, mask=own, other=0.0)  # the block before wrote it, three kernels ago
    wait_for_previous(PDL)
    acc = tl.zeros([BM, BN], tl.float32)
    acc = _product(a_p, w_p, acc, k, D, BK, EXACT)
    let_next_begin(PDL)
    r += tl.where(own, acc, 0.0)
    tl.store(residual_ptr + at, r, mask=own)
    if copy_ptr is not None:
        tl.store(copy_ptr + at, r.to(copy_ptr.dtype.element_ty), mask=own)
    tl.store(squares_ptr + tile * rows + row, tl.sum(r * r, 1), mask=row < rows)


def _launch(weight_bytes: int, rows: int) -> dict[str, dict[str, int]]:
    return INTERPRETED if INTERPRET else next(row for most, row in LAUNCH[weight_bytes] if rows <= most)


def _fitting(tile: int, size: int) -> int:
    """The largest tile, halved as often as need be, that divides the size."""
    return tile if size % tile == 0 else _fitting(tile // 2, size)


@functools.cache
def _ahead(device: torch.device) -> bool:
    """Programmatic dependent launch is for NVIDIA chips from Hopper on.  Called where the device is the current one."""
    if not ASM:
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 90


def frame_blocks(
    residual: Tensor,
    blocks: Sequence[tuple[Tensor, ...]],
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    eps: float,
    launch: dict[str, dict[str, int]] | None = None,
) -> None:
    """launch: a row of the table, to measure."""
    b, l, c = residual.shape
    rows, dtype = b * l, blocks[0][0].dtype
    launch = launch or _launch(dtype.itemsize, rows)
    copy = None if dtype == torch.float32 else torch.empty(rows, c, dtype=dtype, device=residual.device)
    squares = torch.empty(1, rows, device=residual.device)
    with on_device(residual):
        _begin_kernel[(rows,)](residual, copy, squares, c, triton.next_power_of_2(c), num_warps=2)
        for i, block in enumerate(blocks):
            state = (None, None) if conv_state is None or ssm_state is None else (conv_state[i], ssm_state[i])
            copy, squares = _block(residual, block, *state, copy, squares, eps, launch)


def _block(
    residual: Tensor,
    block: tuple[Tensor, ...],
    conv_state: Tensor | None,
    ssm_state: Tensor | None,
    copy: Tensor | None,
    squares: Tensor,
    eps: float,
    launch: dict[str, dict[str, int]],
) -> tuple[Tensor | None, Tensor]:
    """-> the residual in the weights' dtype and its sums of squares, (tiles, rows), for the next block."""
    in_proj, conv, conv_bias, x_proj, dt_proj, dt_bias, A, D, out_proj = block
    b, l, c = residual.shape
    sides, d, n = A.shape
    taps, rank, both, rows, dtype = conv.shape[2] - 1, dt_proj.shape[2], sides == 2, b * l, in_proj.dtype
    new = functools.partial(torch.empty, dtype=dtype, device=residual.device)
    wide = functools.partial(torch.empty, dtype=torch.float32, device=residual.device)
    u, z, bc, y = new(sides, b, l, d), new(rows, d), new(sides, b, l, 2 * n), new(rows, d)
    dt, tail = wide(sides, b, l, d), None if both else wide(b, taps, d)
    ahead = _ahead(residual.device)
    more = {"launch_pdl": True} if ahead else {}

    p = launch["in"]
    tile, own, tiles = _fitting(p["BN"], d), p["BM"] - taps * sides, squares.shape[0]
    _in_conv_kernel[(2 * d // tile, triton.cdiv(l, own), b)](
        residual if copy is None else copy, squares, in_proj, conv, conv_bias, conv_state, u, z, tail,
        rows, l, eps, c, d, tiles, triton.next_power_of_2(tiles), taps, both, p["BM"], tile, p["BK"], ASM, ahead,
        num_warps=p["warps"], num_stages=p["stages"], **more,
    )  # fmt: skip
    p = launch["x"]
    tile = _fitting(p["BD"], d)
    parts = p["PARTS"] if d % (p["PARTS"] * tile) == 0 else 1
    step = p["BK"] if rank <= 32 else p["BK"] // 2  # a consumer chip has 99 KB of shared memory
    _x_proj_kernel[(triton.cdiv(rows, p["BM"]), sides, parts)](
        u, x_proj, dt_proj, dt_bias, bc, dt, rows, d, 2 * n, rank, parts, p["BM"], step, tile, ASM, ahead,
        num_warps=p["warps"], num_stages=p["stages"], **more,
    )  # fmt: skip
    warps = launch["both" if both else "scan"]["warps"]
    first = FrameSide(u[0], dt[0], A[0], bc[0, ..., :n], bc[0, ..., n:], D[0], None)
    second = FrameSide(u[1], dt[1], A[1], bc[1, ..., :n], bc[1, ..., n:], D[1], None) if both else None
    frame_scan(
        first, second, z.view(b, l, d), y.view(b, l, d), ssm_state, ssm_state, softplus=False, warps=warps,
        ahead=ahead, tail=tail, conv_state=conv_state,
    )  # fmt: skip
    p = launch["out"]
    tiles = triton.cdiv(c, p["BN"])
    copy, squares = None if dtype == torch.float32 else new(rows, c), wide(tiles, rows)
    _out_proj_kernel[(tiles, triton.cdiv(rows, p["BM"]))](
        y, out_proj, residual, copy, squares, rows, d, c, p["BM"], p["BN"], p["BK"], ahead,
        num_warps=p["warps"], num_stages=p["stages"], **more,
    )  # fmt: skip
    return copy, squares


def aot_cases() -> list[AotCase]:
    cases: list[AotCase] = []
    if not ASM:  # op.py refuses AMD: Triton's compiler ends with an assertion of its own on the scan
        return cases
    for name, b, c, dtype in (
        ("small-bf16", 1, 384, torch.bfloat16), ("small-fp32", 1, 384, torch.float32),
        ("many-bf16", 16, 384, torch.bfloat16), ("middle-bf16", 1, 576, torch.bfloat16),
    ):  # fmt: skip
        for sides in (2, 1):
            d, r, l = 2 * c, 32 if c < 512 else 64, 197
            w = functools.partial(meta, dtype=dtype)
            states = (None, None) if sides == 2 else (meta(2, b, 3, d), meta(2, b, d, STATES))
            block = (
                w(2 * d, c), meta(sides, d, 4), meta(sides, d), w(sides, r + 2 * STATES, d), w(sides, d, r),
                meta(sides, d), meta(sides, d, STATES), meta(sides, d), w(c, d),
            )  # fmt: skip
            args = (meta(b, l, c), [block, block], *states, 1e-5)
            full = f"{name}-{'both' if sides == 2 else 'causal'}"
            cases.append(AotCase(full, frame_blocks, args, full != "small-bf16-both"))
    return cases
