"""frame_resize on a GPU: both directions in one kernel.

Letters: b pictures of h rows and w columns, to height x width; a cell is one channel of one column.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import AotCase, meta, on_device
from .reference import taps

# Of a program: output rows, cells of them, input rows at a time; warps.  A thread has a column of cells: sums over rows
# need no other thread.  1080 x 1920 to 224 x 224: 588 programs of 44 input rows each.
OUT_ROWS, CELLS, IN_ROWS, WARPS = 8, 32, 16, 1


# Grid (b cdiv(height, OUT_ROWS), cdiv(3 width, CELLS)): a program owns a tile of the output.  It filters the input rows
#   under the tile along x, IN_ROWS at a time, rounds them to uint8 as a picture in between would be, and adds each to
#   the output rows that see it: nothing in between goes to memory.
# Work: rows under two tiles are filtered twice; from 1080 rows to 224, 44 for every 8 instead of 38.6.
# Registers: [IN_ROWS, CELLS] int32.  No masks in the loop over taps, which cost more than the loads they would save:
#   rows past the last are the last again, and their weights are 0.
# Traffic: the picture once from memory (6.2 MB at 1920 x 1080), the overlaps of tiles from L2, 0.15 MB written.  Bound
#   by single bytes from L1, 15 million of them: three of a pixel lie together, the next output's 8.6 pixels on.
# Numerics: int32; 255 times weights of a sum of 2^22 at most, so no sum overflows.
@triton.jit(do_not_specialize=["h", "w", "height", "width", "taps_x", "taps_y", "shift_x", "shift_y"])
def _frame_resize_kernel(
    frames_ptr,
    begins_x_ptr,
    weights_x_ptr,
    begins_y_ptr,
    weights_y_ptr,
    out_ptr,
    h,
    w,
    height,
    width,
    taps_x,
    taps_y,
    shift_x,
    shift_y,
    stride_b,
    stride_h,
    stride_w,
    stride_c,
    OUT_ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    IN_ROWS: tl.constexpr,
):
    tiles = tl.cdiv(height, OUT_ROWS)
    picture = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * OUT_ROWS
    last = min(first + OUT_ROWS, height) - 1
    offs_i = first + tl.arange(0, OUT_ROWS)
    offs_cell = tl.program_id(1) * CELLS + tl.arange(0, CELLS)
    mask_cell = offs_cell < 3 * width
    column = tl.minimum(offs_cell // 3, width - 1)
    begin_x = tl.load(begins_x_ptr + column)
    frames_ptr += picture * stride_b + (offs_cell % 3).to(tl.int64) * stride_c  # [CELLS]
    top, bottom = tl.load(begins_y_ptr + first), min(tl.load(begins_y_ptr + last) + taps_y, h)
    total = tl.zeros([OUT_ROWS, CELLS], tl.int32) + (1 << (shift_y - 1))
    for start in range(top, bottom, IN_ROWS):
        row = start + tl.arange(0, IN_ROWS)
        offs_row = tl.minimum(row, bottom - 1).to(tl.int64) * stride_h  # the same in all threads
        line = tl.zeros([IN_ROWS, CELLS], tl.int32) + (1 << (shift_x - 1))
        for k in range(taps_x):
            weight = tl.load(weights_x_ptr + k * width + column)
            place = tl.minimum(begin_x + k, w - 1).to(tl.int64)  # where there are fewer taps their weight is 0
            x_ptr = frames_ptr + place * stride_w
            x = tl.load(x_ptr[None, :] + offs_row[:, None]).to(tl.int32)  # [IN_ROWS, CELLS]
            line += x * weight[None, :]
        line = tl.minimum(tl.maximum(line >> shift_x, 0), 255)
        for i in tl.static_range(OUT_ROWS):
            out_row = tl.minimum(first + i, height - 1)
            k = row - tl.load(begins_y_ptr + out_row)
            weight = tl.load(weights_y_ptr + out_row * taps_y + k, (k >= 0) & (k < taps_y), 0)
            seen = tl.sum(line * weight[:, None], 0)
            total += tl.where((offs_i == first + i)[:, None], seen[None, :], 0)
    total = tl.minimum(tl.maximum(total >> shift_y, 0), 255)
    offs_out = (picture * height + offs_i[:, None]) * (3 * width) + offs_cell[None, :]
    tl.store(out_ptr + offs_out, total.to(tl.uint8), (offs_i < height)[:, None] & mask_cell[None, :])


@functools.cache  # not one that forgets, as that of `taps`
def _taps_by_output(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """`taps` with weights (new, taps): neighbouring rows are a constant apart."""
    begins, weights, shift = taps(old, new, device)
    with torch.inference_mode(False):
        return begins, weights.T.contiguous(), shift


def frame_resize(frames: Tensor, height: int, width: int) -> Tensor:
    b, h, w, _ = frames.shape
    out = torch.empty(b, height, width, 3, dtype=torch.uint8, device=frames.device)
    if not b:
        return out
    begins_x, weights_x, shift_x = taps(w, width, frames.device)
    begins_y, weights_y, shift_y = _taps_by_output(h, height, frames.device)
    grid = (b * triton.cdiv(height, OUT_ROWS), triton.cdiv(3 * width, CELLS))
    with on_device(frames):
        _frame_resize_kernel[grid](
            frames, begins_x, weights_x, begins_y, weights_y, out, h, w, height, width,
            len(weights_x), weights_y.shape[1], shift_x, shift_y, *frames.stride(),
            OUT_ROWS, CELLS, IN_ROWS, num_warps=WARPS,
        )  # fmt: skip
    return out


def aot_cases() -> list[AotCase]:
    frames = meta(1, 1080, 1920, 3, dtype=torch.uint8)
    planar = meta(1, 3, 1080, 1920, dtype=torch.uint8).permute(0, 2, 3, 1)
    return [
        AotCase("hd", frame_resize, (frames, 224, 224)),
        AotCase("hd-planar", frame_resize, (planar, 224, 224), slow=True),
    ]
