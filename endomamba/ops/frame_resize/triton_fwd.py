"""frame_resize on a GPU: both directions in one kernel.

Letters: b pictures of h rows and w columns, to height x width; a cell is one channel of one column.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import AotCase, meta, on_device
from .reference import taps

# Of a program: output rows, cells of them, input rows at a time; warps.  A thread has a column of cells: sums over rows
# need no other thread.
OUT_ROWS, CELLS, IN_ROWS, WARPS = 4, 128, 16, 4


# Grid (b cdiv(height, OUT_ROWS), cdiv(3 width, CELLS)): a program owns a tile of the output.  It filters the input rows
#   under the tile along x, IN_ROWS at a time, rounds them to uint8 as a picture in between would, and adds each to the
#   output rows that see it: nothing in between goes to memory.
# Work: rows under two tiles are filtered twice; from 1080 rows to 224, 25 for every 4 instead of 19.3.
# Registers: [IN_ROWS, CELLS] int32, a sum of bytes for each tap; three neighbouring bytes of a pixel, then the next
#   output's, 8.6 pixels on for 1920 to 224: a warp's load of one tap lies in three lines, later taps find them in L1.
# Traffic: the picture once from memory and L2 (6.2 MB at 1920 x 1080), its tiles' overlaps from L2, 0.15 MB written.
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
    frames_ptr += picture * stride_b + (offs_cell % 3)[None, :].to(tl.int64) * stride_c
    top, bottom = tl.load(begins_y_ptr + first), min(tl.load(begins_y_ptr + last) + taps_y, h)
    total = tl.zeros([OUT_ROWS, CELLS], tl.int32) + (1 << (shift_y - 1))
    for start in range(top, bottom, IN_ROWS):
        row = start + tl.arange(0, IN_ROWS)
        mask_row = (row < bottom)[:, None]
        row_ptr = frames_ptr + row[:, None].to(tl.int64) * stride_h  # [IN_ROWS, CELLS]
        line = tl.zeros([IN_ROWS, CELLS], tl.int32) + (1 << (shift_x - 1))
        for k in range(taps_x):
            weight = tl.load(weights_x_ptr + k * width + column)
            place = tl.minimum(begin_x + k, w - 1).to(tl.int64)  # where there are fewer taps their weight is 0
            x = tl.load(row_ptr + place[None, :] * stride_w, mask_row, 0).to(tl.int32)
            line += x * weight[None, :]
        line = tl.minimum(tl.maximum(line >> shift_x, 0), 255)
        for i in tl.static_range(OUT_ROWS):
            out_row = tl.minimum(first + i, height - 1)
            k = row - tl.load(begins_y_ptr + out_row)
            weight = tl.load(weights_y_ptr + k * height + out_row, (k >= 0) & (k < taps_y), 0)
            seen = tl.sum(line * weight[:, None], 0)
            total += tl.where((offs_i == first + i)[:, None], seen[None, :], 0)
    total = tl.minimum(tl.maximum(total >> shift_y, 0), 255)
    offs_out = (picture * height + offs_i[:, None]) * (3 * width) + offs_cell[None, :]
    tl.store(out_ptr + offs_out, total.to(tl.uint8), (offs_i < height)[:, None] & mask_cell[None, :])


def frame_resize(frames: Tensor, height: int, width: int) -> Tensor:
    b, h, w, _ = frames.shape
    out = torch.empty(b, height, width, 3, dtype=torch.uint8, device=frames.device)
    if not b:
        return out
    begins_x, weights_x, shift_x = taps(w, width, frames.device)
    begins_y, weights_y, shift_y = taps(h, height, frames.device)
    grid = (b * triton.cdiv(height, OUT_ROWS), triton.cdiv(3 * width, CELLS))
    with on_device(frames):
        _frame_resize_kernel[grid](
            frames, begins_x, weights_x, begins_y, weights_y, out, h, w, height, width,
            len(weights_x), len(weights_y), shift_x, shift_y, *frames.stride(),
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
