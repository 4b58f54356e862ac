"""frame_embed on a GPU: one kernel from the bytes of a picture to tokens.

Letters: b streams, n tokens of a frame (cls first, where there is one), c channels of a token, p patch size,
K = 3 p p values of a patch.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import AotCase, meta, on_device
from .._triton_math import sin_cos
from .reference import periods

# Bytes of a weight -> of a program: tokens, channels, values of a patch in one step of the product; warps.  Taken is
# the first that makes PROGRAMS programs, or the last.  One frame of EndoMamba tiny, small, middle in bf16: 84, 84, 126
# programs, and at p = 16 three steps, whose loads are all under way before the first product.  64 x 64 in four warps
# would spill (sm_90).  fp32 has no tensor cores here: a thread holds a step of all its rows in registers.
TILES = {
    2: ((64, 64, 64, 8), (32, 32, 256, 4), (32, 16, 256, 4)),
    4: ((32, 32, 32, 4), (32, 16, 32, 4)),
}
PROGRAMS = 80
STAGES = 3


# Grid (b cdiv(n, BLOCK_M), cdiv(c, BLOCK_N)): a program owns BLOCK_M tokens of a stream and BLOCK_N of their channels;
#   cls goes along as a patch whose product is thrown away.
# Order of K: that of weight's memory, so that a row of weight is read as it lies: channel, y, x as published, or y, x,
#   channel.  The latter is a picture's own too (PACKED): then 3 p bytes lie together, else each byte is its own load.
# Traffic: weight from L2 for every BLOCK_M tokens (7 times 0.6 MB at c = 384, bf16), the picture for every BLOCK_N
#   channels (12 times 0.15 MB), positions once, tokens written once (0.3 MB in fp32).
# Numerics: x * scale + shift in fp32, rounded to weight's dtype; products summed in fp32 (fp32 weights: no tf32); bias
#   and positions added in fp32.  The temporal angle, its sin and cos in fp64, for frame numbers to 2^53.
@triton.jit(do_not_specialize=["n", "columns"])
def _frame_embed_kernel(
    frames_ptr,
    weight_ptr,
    bias_ptr,
    positions_ptr,
    cls_ptr,
    scale_ptr,
    shift_ptr,
    frame_ptr,
    periods_ptr,
    out_ptr,
    n,
    columns,  # of patches
    c,
    stride_b,
    stride_y,
    stride_x,
    stride_channel,
    stride_frame,
    CHANNELS: tl.constexpr,
    P: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = CHANNELS * P * P
    CLS: tl.constexpr = cls_ptr is not None
    tiles = tl.cdiv(n, BLOCK_M)
    stream = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    patch = tl.minimum(tl.maximum(token - CLS, 0), n - CLS - 1)  # a patch for every row: those not wanted are dropped
    corner = (patch // columns * P).to(tl.int64) * stride_y + (patch % columns * P).to(tl.int64) * stride_x
    x_ptr = frames_ptr + stream * stride_b + corner[:, None]  # [BLOCK_M, 1]
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < c
    w_ptr = weight_ptr + tl.minimum(offs_n, c - 1).to(tl.int64)[None, :] * K

    # What the end needs is under way before the product begins; used only there, so that nothing waits for it here.
    bias = tl.load(bias_ptr + offs_n, mask_n)
    mask = (token < n)[:, None] & mask_n[None, :]
    position = tl.load(positions_ptr + token[:, None] * c + offs_n[None, :], mask)
    if CLS:
        cls = tl.load(cls_ptr + offs_n, mask_n)
    offs_pair = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    period = tl.load(periods_ptr + offs_pair, offs_pair < c // 2, 1.0)
    # Up to here parameters; from here on what the kernel before may have written: frame number and pictures.
    frame = tl.load(frame_ptr + stream * stride_frame)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        if CHANNELS_LAST:
            y, x, channel = k // (CHANNELS * P), k // CHANNELS % P, k % CHANNELS
        else:
            y, x, channel = k // P % P, k % P, k // (P * P)
        offs_k = y * stride_y + (k % (CHANNELS * P) if PACKED else x * stride_x + channel * stride_channel)
        mask_k = k < K
        weight = tl.load(w_ptr + k[:, None], mask_k[:, None], 0.0)  # [BLOCK_K, BLOCK_N]
        pixel = tl.load(x_ptr + offs_k[None, :], mask_k[None, :], 0).to(tl.float32)  # [BLOCK_M, BLOCK_K]
        if scale_ptr is not None:
            scale, shift = tl.load(scale_ptr + channel, mask_k, 0.0), tl.load(shift_ptr + channel, mask_k, 0.0)
            pixel = pixel * scale[None, :] + shift[None, :]
        acc = tl.dot(pixel.to(weight.dtype), weight, acc, input_precision="ieee")

    sin, cos = sin_cos(frame.to(tl.float64) / period)
    temporal = tl.interleave(sin.to(tl.float32), cos.to(tl.float32))  # [BLOCK_N]
    position = position.to(tl.float32)
    out = acc + bias.to(tl.float32)[None, :] + position + temporal[None, :]
    if CLS:
        out = tl.where((token == 0)[:, None], cls.to(tl.float32)[None, :] + position, out)
    offs_out = (stream * n + token[:, None]) * c + offs_n[None, :]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask)


@functools.cache  # not one that forgets: CUDA graphs hold the address
def _periods(channels: int, device: torch.device) -> Tensor:
    """As a CPU rounds them: beyond 2^50 frames the last bit of a period turns the angle."""
    with torch.inference_mode(False):
        return periods(channels, torch.device("cpu")).to(device)


def frame_embed(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor,
    positions: Tensor,
    frame: Tensor,
    cls_token: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    if out_dtype == torch.float64 or frames.dtype == torch.float64:
        raise NotImplementedError("frame_embed: backend 'triton' has no float64; use backend='reference'")
    c, channels, p, _ = weight.shape
    n, b = len(positions), len(frames)
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    if not channels_last:
        weight = weight.contiguous()
    frames = frames.movedim(-1, 1) if frames.dtype == torch.uint8 else frames  # a view: (b, channels, h, w)
    stride_b, stride_channel, stride_y, stride_x = frames.stride()
    packed = channels_last and (stride_channel, stride_x) == (1, channels)
    out = torch.empty(b, n, c, dtype=out_dtype, device=frames.device)
    if not b * c:
        return out
    bias, positions, cls_token, scale, shift = (
        None if t is None else t.contiguous() for t in (bias, positions, cls_token, scale, shift)
    )
    block_m, block_n, block_k, warps = _tile(TILES[weight.element_size()], b, n, c)
    block_k = min(block_k, 32) if torch.version.hip else block_k  # gfx942 has too few registers for longer steps
    grid = (b * triton.cdiv(n, block_m), triton.cdiv(c, block_n))
    with on_device(frames):
        _frame_embed_kernel[grid](
            frames, weight, bias, positions, cls_token, scale, shift, frame, _periods(c, frames.device), out,
            n, frames.shape[3] // p, c, stride_b, stride_y, stride_x, stride_channel, frame.stride(0),
            channels, p, channels_last, packed, block_m, block_n, block_k, num_warps=warps, num_stages=STAGES,
        )  # fmt: skip
    return out


def _tile(tiles: tuple, b: int, n: int, c: int) -> tuple[int, int, int, int]:
    enough = (tile for tile in tiles if b * triton.cdiv(n, tile[0]) * triton.cdiv(c, tile[1]) >= PROGRAMS)
    return next(enough, tiles[-1])


def aot_cases() -> list[AotCase]:
    cases = []
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for name, b, c, dtype, form in (
        ("c192-bf16", 1, 192, bf16, "packed"),
        ("c384-bf16", 1, 384, bf16, "packed"),
        ("b16-c384-bf16", 16, 384, bf16, "packed"),
        ("c384-fp32", 1, 384, fp32, "packed"),
        ("c384-bf16-published", 1, 384, bf16, "published"),  # the order of weight in a checkpoint
        ("c384-bf16-float", 1, 384, bf16, "float"),
        ("c384-fp16", 1, 384, fp16, "packed"),
        ("c192-fp32", 1, 192, fp32, "packed"),
    ):
        weight, vector = meta(c, 3, 16, 16, dtype=dtype), meta(c, dtype=dtype)
        if form == "packed":
            weight = weight.to(memory_format=torch.channels_last)
        frames, norm = meta(b, 224, 224, 3, dtype=torch.uint8), (meta(3), meta(3))
        if form == "float":
            frames, norm = meta(b, 3, 224, 224, dtype=dtype), (None, None)
        args = (frames, weight, vector, meta(197, c, dtype=dtype), meta(b, dtype=torch.int64), vector, *norm, fp32)
        cases.append(AotCase(name, frame_embed, args, slow=name != "c384-bf16"))
    return cases
