"""The Triton scan of one or two directions, as both scan ops call it: launches, their table, and the sums after them.

Letters: b sequences, l tokens, d channels, n state size, g groups of B and C.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ._scan import CHUNK, Direction, aligned_states, chunk_states_shape, empty, laid_out, lanes
from ._scan_triton_adjoint import _scan_adjoint_kernel
from ._scan_triton_bwd import _scan_bwd_kernel
from ._scan_triton_fwd import _scan_carry_kernel, _scan_fwd_kernel
from ._scan_triton_sums import _combine_kernel, _scan_sums_kernel
from ._scan_triton_table import APART, BWD, BWD_TWO, FWD, SPLIT
from ._triton import ASM, INTERPRET, AotCase, meta, on_device
from ._triton_lane_sums import CUT
from ._triton_scan import LANE_CHANNELS
from ._triton_shared import shared_asm

STATES = 16  # a launch walks at most this many; more are walked one launch after the other


@functools.cache
def _processors(device: torch.device) -> int:
    """Without a GPU: those of an H200 where only compiled, one where interpreted."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else 132


def _piece(call: _Call, plan: str) -> int:
    """Tokens of a piece, 0: not split.  The invariant plan never looks at the number of sequences."""
    if plan == "invariant" or call.cu_seqlens is not None or call.n > STATES or call.l < SPLIT["least"]:
        return 0
    room = _processors(call.device) * SPLIT["warps"]
    warps = call.seqs * triton.cdiv(call.d, LANE_CHANNELS)
    return 0 if 4 * warps > room else CHUNK * max(1, call.l * warps // (CHUNK * 2 * room))


def _backward_piece(call: _Call, plan: str, blocks: int) -> int:
    """Tokens of a piece of the backward: half a chunk where whole chunks would leave more programs idle.

    The second half of a chunk walks through the first one to its states: a half takes 0.55 of a chunk's time.
    """
    piece = _piece(call, plan)
    if piece != CHUNK:
        return piece
    most = _most(BWD, blocks, call.device)
    rounds, halves = (triton.cdiv(call.seqs * triton.cdiv(call.l, p), most) for p in (CHUNK, CHUNK // 2))
    return CHUNK // 2 if 0.55 * halves < rounds else CHUNK


def _apart(call: _Call, plan: str) -> bool:
    """Whether the two directions run at the same time; the invariant plan never looks at the number of sequences."""
    if plan == "invariant" or call.n > STATES:
        return False
    warps = call.seqs * triton.cdiv(call.d, LANE_CHANNELS)
    return warps <= APART["waves"] * APART["warps"] * _processors(call.device)


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _beside(device: torch.device) -> Iterator[None]:
    """Launches inside run at the same time as what is launched on the current stream until `_join`."""
    if device.type != "cuda":
        yield
        return
    second = _second_stream(device)
    second.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(second):
        yield


def _join(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_second_stream(device))


class _Call(NamedTuple):
    """What is the same for every launch of a call."""

    seqs: int
    l: int
    d: int
    n: int
    z: Tensor | None
    cu_seqlens: Tensor | None
    mask: Tensor | None
    softplus: bool
    frames: int
    device: torch.device


def _call(x: Tensor, n: int, z: Tensor | None, cu_seqlens, mask, softplus: bool, frames: int) -> _Call:
    seqs = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    return _Call(seqs, x.shape[1], x.shape[2], n, lanes(z), cu_seqlens, mask, softplus, frames, x.device)


def _row_strides(t: Tensor) -> tuple[int, int, int, int]:
    """b, l, g, n strides; of a constant (d, n): 0, d, 0, n."""
    return (0, t.stride(0), 0, t.stride(1)) if t.ndim == 2 else t.stride()


def _parts(n: int) -> list[tuple[int, int]]:
    """(first, number) of the states of each launch."""
    return [(first, min(STATES, n - first)) for first in range(0, n, STATES)]


def _shared_arguments(call: _Call, side: Direction, first: int, states: int, warps: int) -> dict:
    B, C = side.B, side.C
    sB, sC = _row_strides(B), _row_strides(C)
    groups = next((t.shape[2] for t in (B, C) if t.ndim == 4), 1)
    return dict(
        sx_b=side.x.stride(0), sdt_b=side.dt.stride(0), sz_b=0 if call.z is None else call.z.stride(0),
        sB_b=sB[0], sC_b=sC[0], sB_g=sB[2], sC_g=sC[2], sB_n=sB[3], sC_n=sC[3],
        sm_b=0 if call.mask is None else call.mask.stride(0),
        SX=side.x.stride(1), SDT=side.dt.stride(1), SZ=0 if call.z is None else call.z.stride(1),
        SB=sB[1], SC=sC[1], SY=call.d, GROUPS=groups, N=call.n, FIRST=first, NS=states,
        EVEN=call.d // groups % (LANE_CHANNELS * warps) == 0, CONST_B=B.ndim == 2, CONST_C=C.ndim == 2,
        HAS_BIAS=side.dt_bias is not None, PACKED=call.cu_seqlens is not None, MASK=call.mask is not None,
        REVERSE=side.reverse, TIME=call.frames > 0, SOFTPLUS=call.softplus, ASM=ASM, CHUNK=CHUNK,
    )  # fmt: skip


def _forward_launch(
    call: _Call, side: Direction, first: int, states: int, y: Tensor | None, parked: Tensor | None, scale: float,
    gated: bool, final: Tensor | None, chunk: Tensor | None, piece: int,
) -> None:  # fmt: skip
    W = FWD["W"]
    few = call.l > 4 and call.seqs * triton.cdiv(call.d, LANE_CHANNELS) <= FWD["few"] * _processors(call.device)
    T = FWD["T_few"] if few else FWD["T"]
    args = _shared_arguments(call, side, first, states, W)
    channels = call.d // args["GROUPS"]
    blocks = args["GROUPS"] * triton.cdiv(channels, LANE_CHANNELS * W)
    splits = triton.cdiv(call.l, piece) if piece else 1
    common = dict(LS=piece, T=T, W=W, SHARED=shared_asm(256 * T * W), num_warps=W)
    start = side.initial_state
    if piece:
        start, sums = _edges(call, splits)
        _scan_fwd_kernel[(call.seqs * splits * blocks,)](
            side.x, side.dt, side.A, side.B, side.C, None, None, side.dt_bias, None, None, None, start, None, sums,
            None, call.mask, 1.0, call.l, call.d, splits, call.frames, **args, HAS_Z=False, HAS_D=False, HAS_H0=False,
            ADD=False, FINAL=True, SAVE=False, Y=False, **common,
        )  # fmt: skip
        _carry(call, side.A, side.initial_state, start, sums, final, splits, back=False)
        final = None
    _scan_fwd_kernel[(call.seqs * splits * blocks,)](
        side.x, side.dt, side.A, side.B, side.C, side.D, call.z, side.dt_bias, start, parked, y, final,
        chunk, None, call.cu_seqlens, call.mask, scale, call.l, call.d, splits, call.frames, **args,
        HAS_Z=gated, HAS_D=side.D is not None and first == 0, HAS_H0=start is not None,
        ADD=parked is not None, FINAL=final is not None, SAVE=chunk is not None, Y=True, **common,
    )  # fmt: skip


def _forward_apart(
    call: _Call, sides: tuple[Direction, ...], y: Tensor, scale: float, finals: list[Tensor], chunks: list[Tensor],
    return_final_state: bool, save_states: bool, plan: str,
) -> None:  # fmt: skip
    """A direction a stream, each to an fp32 output of its own; what adds and gates them comes after."""
    parked = torch.empty(2, *y.shape, dtype=torch.float32, device=y.device)
    where = (_beside(call.device), contextlib.nullcontext())
    for i, place in enumerate(where):
        with place:
            _forward_launch(
                call, sides[i], 0, call.n, parked[i], None, 1.0, False, finals[i] if return_final_state else None,
                chunks[i] if save_states else None, _piece(call, plan),
            )  # fmt: skip
    _join(call.device)
    _combine(call, parked, None, y, scale, None)


def _combine(
    call: _Call, parked: Tensor, dy: Tensor | None, out: Tensor, scale: float, y: Tensor | None
) -> None:  # fmt: skip
    z, total = call.z, out.numel()
    _combine_kernel[(triton.cdiv(total, 1024),)](
        parked, z, dy, out, y, scale, total, call.l, call.d, 0 if z is None else z.stride(0),
        0 if dy is None else dy.stride(0), SZ=0 if z is None else z.stride(1), SDY=0 if dy is None else dy.stride(1),
        SO=out.stride(1), HAS_Z=z is not None, BACK=dy is not None, OUT=y is not None, BLOCK=1024, ASM=ASM,
        num_warps=4,
    )  # fmt: skip


def _edges(call: _Call, splits: int) -> tuple[Tensor, Tensor]:
    """Of every piece: a state (d, n), and its sum of dt."""
    shapes = (call.seqs, splits, call.d, call.n), (call.seqs, splits, call.d)
    return tuple(torch.empty(shape, dtype=torch.float32, device=call.device) for shape in shapes)


def _carry(
    call: _Call,
    A: Tensor,
    edge: Tensor | None,
    local: Tensor,
    sums: Tensor,
    out: Tensor | None,
    splits: int,
    back: bool,
) -> None:
    _scan_carry_kernel[(call.seqs * triton.cdiv(call.d * call.n, 64),)](
        A, edge, local, sums, out, splits, call.d, HAS_EDGE=edge is not None, OUT=out is not None, BACK=back, N=call.n,
        BLOCK=64, U=16, ASM=ASM, num_warps=1,
    )  # fmt: skip


def scan_fwd(
    sides: tuple[Direction, ...],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    *,
    scale: float,
    dt_softplus: bool,
    frames: int,
    max_seqlen: int,
    return_final_state: bool,
    save_states: bool,
    out_fp32: bool,
    plan: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """-> y, final state of each side, chunk states of each side; empty where not asked for."""
    x, n = sides[0].x, sides[0].A.shape[1]
    f32 = torch.float32
    y = empty(x, *x.shape, dtype=f32 if out_fp32 else x.dtype)
    call = _call(x, n, z, cu_seqlens, mask, dt_softplus, frames)
    launches = [(i, *part) for i in range(len(sides)) for part in _parts(n)]
    parked = None
    if len(launches) > 1:
        parked = y if y.dtype == f32 else empty(x, *x.shape, dtype=f32)
    finals, chunks = [], []
    for side in sides:
        state, saved = (call.seqs, *side.A.shape), chunk_states_shape(x, side.A, cu_seqlens)
        finals.append(empty(x, *(state if return_final_state else ()), dtype=f32))
        chunks.append(empty(x, *(saved if save_states else ()), dtype=f32))
        if save_states and cu_seqlens is not None:
            chunks[-1].zero_()  # slots that no chunk owns: an op's output must not be what memory happened to hold
    if call.seqs * call.d * call.l == 0:
        for side, final in zip(sides, finals, strict=True):
            if return_final_state:
                final.copy_(side.initial_state) if side.initial_state is not None else final.zero_()
        return y, finals, chunks
    sides = tuple(laid_out(side) for side in sides)
    with on_device(x):
        if len(sides) == 2 and _apart(call, plan):
            _forward_apart(call, sides, y, scale, finals, chunks, return_final_state, save_states, plan)
            return y, finals, chunks
        for turn, (i, first, states) in enumerate(launches):
            last = turn == len(launches) - 1
            _forward_launch(
                call, sides[i], first, states, y if last else parked, parked if turn else None, scale if last else 1.0,
                last and z is not None, finals[i] if return_final_state else None, chunks[i] if save_states else None,
                _piece(call, plan),
            )  # fmt: skip
    return y, finals, chunks


def _most(table: dict, blocks: int, device: torch.device) -> int:
    """Programs of one channel block that are resident."""
    return max(1, table["per_sm"] * _processors(device) // blocks) if not INTERPRET else 2


def _programs(seqs: int, tokens: int, blocks: int, device: torch.device, table: dict) -> tuple[int, bool]:
    """Programs of one channel block, at most as many as are resident, and whether they share sequences.

    They do where that shortens the longest share of the `tokens` of each sequence (0: their number is not known), which
    are shared chunk by chunk.
    """
    most = _most(table, blocks, device)
    whole = triton.cdiv(seqs, most)
    if seqs > most and tokens > CHUNK and seqs * tokens / most + CHUNK / 2 < 0.985 * whole * tokens:
        return most, True
    return triton.cdiv(seqs, whole), False


def _backward_table(call: _Call, side: Direction, dy: Tensor, dz: Tensor, plan: str) -> dict:
    """BWD_TWO where a lane can have two channels, which are loaded as one 32-bit word, and all lanes have work.

    That adds the channels' parts of dB and dC in another order, so the invariant plan never has it.
    """
    two = BWD_TWO
    warps = call.seqs * (call.d // (2 * LANE_CHANNELS))
    if plan == "invariant" or _piece(call, plan) or not (ASM or INTERPRET):  # AMD: five minutes did not compile it
        return BWD
    if side.x.dtype == torch.float32 or warps < two["least"] * _processors(call.device):
        return BWD
    groups = next((t.shape[2] for t in (side.B, side.C) if t.ndim == 4), 1)
    if call.d // groups % (2 * LANE_CHANNELS * two["W"]):
        return BWD
    for t in (side.x, side.dt, dy) if call.z is None else (side.x, side.dt, dy, call.z, dz):
        if t.data_ptr() % 4 or t.stride(0) % 2 or t.stride(1) % 2:
            return BWD
    return two


def _backward_shared(T: int, CH: int, W: int, quads: int) -> int:
    """Bytes of shared memory of a program of the backward; the head of its kernel says of what."""
    return W * (T * (192 * CH + 128 + (256 if W > 1 else 0)) + (T - 1) * 512 * CH * quads)


def _backward_launch(
    call: _Call, side: Direction, first: int, states: int, dy: Tensor, grads: tuple[Tensor, ...], dz: Tensor,
    y: Tensor | None, chunk: Tensor, dfinal: Tensor | None, parked: tuple, add: bool, park: bool,
    sums: tuple | None, scale: float, plan: str, max_seqlen: int,
) -> None:  # fmt: skip
    x = side.x
    f32, device = torch.float32, x.device
    dx, ddt, dA, dB, dC, dD, ddt_bias, dstate = grads
    table = _backward_table(call, side, dy, dz, plan)
    T, CH, W = table["T"], table["CH"], table["W"]
    args = _shared_arguments(call, side, first, states, CH * W)
    groups = args["GROUPS"]
    blocks = groups * triton.cdiv(call.d // groups, LANE_CHANNELS * CH * W)
    piece = _backward_piece(call, plan, blocks)
    splits = triton.cdiv(call.l, piece) if piece else 1
    has_D, has_bias, has_dstate = side.D is not None, side.dt_bias is not None, dstate is not None
    exact = x.dtype == f32
    if piece:
        edge, dfinal = dfinal, None
        dfinal, total = _edges(call, splits)
        names = ("sdt_b", "sz_b", "sC_b", "sC_g", "sC_n", "sm_b", "SDT", "SZ", "SC", "GROUPS", "N", "CONST_C")
        names += ("EVEN", "HAS_BIAS", "MASK", "REVERSE", "TIME", "SOFTPLUS", "ASM")
        _scan_adjoint_kernel[(call.seqs * splits * blocks,)](
            dy, side.dt, side.A, side.C, call.z, side.dt_bias, call.mask, dfinal, total, scale, call.l, call.d, splits,
            call.frames, sdy_b=dy.stride(0), SDY=dy.stride(1), **{name: args[name] for name in names},
            HAS_Z=call.z is not None, LS=piece, W=W, SHARED=shared_asm(768 * W), num_warps=W,
        )  # fmt: skip
        _carry(call, side.A, edge, dfinal, total, dstate, splits, back=True)
        has_dstate = False
    alike = 0 if piece or call.cu_seqlens is not None else call.l
    programs, share = _programs(call.seqs * splits, alike, blocks, device, table)
    carry = ready = None
    if share:
        carry = torch.empty(programs, call.d, states, dtype=f32, device=device)
        ready = torch.zeros(programs * blocks, dtype=torch.int32, device=device)
    quads = triton.cdiv(triton.cdiv(states, 2), 4)
    scratch = torch.empty(programs * blocks * (CHUNK // T) * CH * quads * 128 * W, dtype=f32, device=device)
    longest = call.l if call.cu_seqlens is None else max_seqlen
    pairs = call.seqs * triton.cdiv(call.l, 2) if call.cu_seqlens is None else call.l // 2 + call.seqs
    rows = torch.empty(pairs, blocks, 64, dtype=f32, device=device)
    const_B, const_C = args["CONST_B"], args["CONST_C"]

    def partial(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(programs, *shape, dtype=f32, device=device) if wanted else None

    pA, pB, pC = (partial(w, call.d, states) for w in (True, const_B, const_C))
    pD, pbias = partial(has_D, call.d), partial(has_bias, call.d)
    gB, gA, add_g, park_g = sums if sums is not None else (None, None, False, False)
    options = {"maxnreg": table["maxnreg"], "num_stages": 1} if ASM else {}
    _scan_bwd_kernel[(programs * blocks,)](
        dy, x, side.dt, side.A, side.B, side.C, side.D, call.z, side.dt_bias, chunk, dfinal, *parked, gB, gA,
        call.cu_seqlens, call.mask, dx, ddt, dz, y, rows, pA, pB, pC, pD, pbias, dstate, scratch, carry, ready, scale,
        call.l, call.d, call.seqs, splits, call.frames, sdy_b=dy.stride(0), SDY=dy.stride(1),
        SDZ=0 if call.z is None else dz.stride(1), **args, HAS_Z=call.z is not None, OUT=y is not None and not park,
        HAS_D=has_D, HAS_H0=side.initial_state is not None, HAS_DHL=dfinal is not None, HAS_DH0=has_dstate, ADD=add,
        PARK=park, ADD_G=add_g, PARK_G=park_g, EXACT=exact, LS=piece, SHARE=share, T=T, CH=CH, W=W,
        SHARED=shared_asm(_backward_shared(T, CH, W, quads)), num_warps=W, **options,
    )  # fmt: skip
    TP, block = 8, 128  # pairs of tokens, parameters a program
    tiles = 0 if const_B and const_C else triton.cdiv(triton.cdiv(longest, 2), TP)
    first_pid = triton.cdiv(call.d * states, block)
    _scan_sums_kernel[(first_pid + call.seqs * tiles * groups,)](
        rows, dB, dC, call.cu_seqlens, pA, pB, pC, pD, pbias, dA, dD, ddt_bias, call.l, max(tiles, 1), blocks,
        call.frames, programs, call.d, first_pid, GROUPS=groups, N=call.n, FIRST=first, NS=states, CONST_B=const_B,
        CONST_C=const_C, HAS_D=has_D and not park_g, HAS_BIAS=has_bias and not park_g,
        PACKED=call.cu_seqlens is not None, REVERSE=side.reverse, TIME=call.frames > 0,
        UP=1.0 if exact or not ASM else CUT, TP=TP, BLOCK=block, num_warps=4,
    )  # fmt: skip


def scan_bwd(
    dy: Tensor | None,
    dfinal_states: tuple[Tensor | None, ...],
    sides: tuple[Direction, ...],
    z: Tensor | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    chunk_states: tuple[Tensor, ...],
    *,
    scale: float,
    dt_softplus: bool,
    frames: int,
    max_seqlen: int,
    plan: str,
    dz: Tensor | None = None,
    y: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """-> dz, and for each side dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial_state; empty for absent inputs.

    dz: half of a contiguous (b, l, 2d) to write it to.  y, contiguous, with z: gets the output of the forward again.
    """
    x, n = sides[0].x, sides[0].A.shape[1]
    f32 = torch.float32
    call = _call(x, n, z, cu_seqlens, mask, dt_softplus, frames)
    if dz is None:
        dz = empty(x, *(() if z is None else x.shape), dtype=x.dtype)
    grads = []
    for side in sides:
        dx, ddt = (empty(x, *x.shape, dtype=x.dtype) for _ in range(2))
        dA, dD, ddt_bias, dinitial = (
            empty(x, *(t.shape if t is not None else ()), dtype=f32)
            for t in (side.A, side.D, side.dt_bias, side.initial_state)
        )
        dB, dC = (empty(x, *t.shape, dtype=f32 if t.ndim == 2 else x.dtype) for t in (side.B, side.C))
        grads.append((dx, ddt, dA, dB, dC, dD, ddt_bias, dinitial))
    if call.seqs * call.d * call.l == 0:
        for side, dfinal, grad in zip(sides, dfinal_states, grads, strict=True):
            for t in grad:
                t.zero_()
            if side.initial_state is not None and dfinal is not None:
                grad[7].copy_(dfinal)
        return dz, grads
    dy = torch.zeros_like(x) if dy is None else lanes(dy)
    sides = tuple(laid_out(side) for side in sides)
    parts = _parts(n)
    launches = len(sides) * len(parts)
    apart = len(sides) == 2 and _apart(call, plan)
    parked = None, None
    both = None
    if z is not None and apart:
        both = torch.empty(2, *x.shape, dtype=f32, device=x.device)
    elif z is not None and launches > 1:
        last_dx, last_ddt = grads[-1][:2]
        parked = (last_dx, None) if x.dtype == f32 else (last_dx.view(torch.int16), last_ddt.view(torch.int16))
    turn = 0
    with on_device(x):
        for side, dfinal, chunk, grad in zip(sides, dfinal_states, chunk_states, grads, strict=True):
            sums = [empty(x, *x.shape, dtype=f32) for _ in range(2)] if len(parts) > 1 else None
            present = (*grad[:7], grad[7] if side.initial_state is not None else None)
            for i, (first, states) in enumerate(parts):
                with _beside(call.device) if apart and turn == 0 else contextlib.nullcontext():
                    _backward_launch(
                        call, side, first, states, dy, present, dz, y, chunk, aligned_states(dfinal),
                        parked if both is None else (both[turn], None), parked[0] is not None and turn > 0,
                        both is not None or (parked[0] is not None and turn < launches - 1),
                        None if sums is None else (*sums, i > 0, i < len(parts) - 1), scale, plan,
                        max_seqlen,
                    )  # fmt: skip
                turn += 1
        if apart:
            _join(call.device)
            if both is not None:
                _combine(call, both, dy, dz, scale, y)
    return dz, grads


def aot_cases() -> list[AotCase]:
    """dtype, states, and what else makes another kernel; d = 768 as in the small model.  quick: parts in every test."""
    cases = []
    options = dict(scale=1.0, dt_softplus=True, max_seqlen=0)

    def case(
        name: str,
        dtype=torch.bfloat16,
        l=49,
        b=768,
        n=16,
        sides=1,
        z=True,
        state=False,
        mixer=False,
        quick="",
        **more,
    ) -> None:
        d, r = 768, 24
        flags = options | {"frames": 0, "plan": "auto"} | more
        projected = meta(b, l, r + 2 * n, dtype=dtype)[:, :, None]
        B, C = projected[..., r : r + n], projected[..., r + n :]
        x, xz, f = meta(b, l, d, dtype=dtype), meta(b, l, 2 * d, dtype=dtype), meta(d)
        gate = xz[..., d:] if z else None
        start = meta(b, d, n) if state else None
        walks = tuple(Direction(x, x, meta(d, n), B, C, f, f, start, bool(i)) for i in range(sides))
        forward = partial(scan_fwd, return_final_state=state, save_states=True, out_fp32=False, **flags)
        chunks = tuple(meta(*chunk_states_shape(x, walks[0].A, None)) for _ in walks)
        finals = tuple(start for _ in walks)
        backward = partial(scan_bwd, **(dict(dz=gate, y=x) if mixer else {}), **flags)
        if not mixer:
            cases.append(AotCase(f"fwd-{name}", forward, (walks, gate, None, None), "fwd" not in quick))
        cases.append(AotCase(f"bwd-{name}", backward, (x, finals, walks, gate, None, None, chunks), "bwd" not in quick))

    case("bf16", quick="fwd")
    case("both-bf16", sides=2)
    case("both-shared-bf16", sides=2, l=197)
    case("fp16", dtype=torch.float16)
    case("fp32", dtype=torch.float32)
    case("state-bf16", state=True, b=48, l=784)
    case("split-bf16", b=1, l=3152, state=True, quick="fwd bwd")
    case("apart-bf16", sides=2, b=16, l=197, quick="fwd")
    case("plain-bf16", z=False)
    case("mixer-bf16", mixer=True)
    case("both-mixer-bf16", sides=2, mixer=True)
    case("apart-mixer-bf16", sides=2, b=16, l=197, mixer=True)
    case("n8-bf16", n=8)
    case("n3-fp32", n=3, dtype=torch.float32)
    case("n64-bf16", n=64)
    case("time-bf16", frames=7)
    return cases
