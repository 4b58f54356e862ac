"""frame_settle on a GPU: two kernels, one that looks and one that moves.

Letters: b streams, k logits, g groups of the m values that a stream has in a state tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import INTERPRET, AotCase, meta, on_device

# Programs of a stream: EndoMamba small has 175,104 values, 2.7 blocks each.  The interpreter has them one by one.
PARTS = 4 if INTERPRET else 64
BLOCK = 1024


@triton.jit
def _offsets(part, step, row, b, m, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a part's next values of stream `row` lie in (g, b, m), and which of them are there."""
    offs = (part + step * PARTS) * BLOCK + tl.arange(0, BLOCK)  # of the stream's own: 32 bits, divided sooner
    group = offs // m
    return (group.to(tl.int64) * b + row) * m + (offs - group * m), offs < size


@triton.jit
def _any_bad(ptr, part, row, b, m, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """1 where one of a part's values is NaN or infinite."""
    bad = tl.zeros([BLOCK], tl.int32)
    for step in range(tl.cdiv(size, PARTS * BLOCK)):
        offs, mask = _offsets(part, step, row, b, m, size, PARTS, BLOCK)
        x = tl.load(ptr + offs, mask, 0.0).to(tl.float32)
        bad |= (tl.abs(x) < float("inf")).to(tl.int32) ^ 1
    return tl.max(bad, 0)


@triton.jit
def _copy(target_ptr, source_ptr, part, row, b, m, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    for step in range(tl.cdiv(size, PARTS * BLOCK)):
        offs, mask = _offsets(part, step, row, b, m, size, PARTS, BLOCK)
        tl.store(target_ptr + offs, tl.load(source_ptr + offs, mask), mask)


# Grid (b, PARTS): a program looks at its share of one stream's states and of its logits.
# Each writes its own flag, so that nothing is cleared beforehand and nothing is added up: no atomics.
# Traffic: the states after the frame, read once, from L2 where the step has just written them.
@triton.jit(do_not_specialize=["b", "k", "size_0", "size_1"])
def _frame_look_kernel(
    bad_ptr,  # (b, PARTS) int32
    logits_ptr,
    stride_logits_b,
    after_0_ptr,
    after_1_ptr,
    b,
    k,
    m_0,
    m_1,
    size_0,  # g * m
    size_1,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    bad = _any_bad(after_0_ptr, part, row, b, m_0, size_0, PARTS, BLOCK)
    if after_1_ptr is not None:
        bad |= _any_bad(after_1_ptr, part, row, b, m_1, size_1, PARTS, BLOCK)
    bad |= _any_bad(logits_ptr + row.to(tl.int64) * stride_logits_b, part, 0, 1, k, k, PARTS, BLOCK)
    tl.store(bad_ptr + row * PARTS + part, bad)


# Grid (b, PARTS): a program reads all flags of its stream, then moves its share of the states one way or the other;
# the first part has the numbers and the answer.
# Traffic: each state read once and written once; both kernels move 3 times the states, 2 MB for EndoMamba small.
@triton.jit(do_not_specialize=["b", "k", "size_0", "size_1"])
def _frame_settle_kernel(
    bad_ptr,
    active_ptr,
    logits_ptr,
    stride_logits_b,
    answer_ptr,
    not_finite_ptr,
    frame_ptr,
    frame_before_ptr,
    after_0_ptr,
    before_0_ptr,
    after_1_ptr,
    before_1_ptr,
    b,
    k,
    m_0,
    m_1,
    size_0,
    size_1,
    ELAPSED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    bad = tl.max(tl.load(bad_ptr + row * PARTS + tl.arange(0, PARTS)), 0) != 0
    active = tl.load(active_ptr + row) != 0
    taken = active & (bad == 0)
    if taken:
        _copy(before_0_ptr, after_0_ptr, part, row, b, m_0, size_0, PARTS, BLOCK)
        if after_1_ptr is not None:
            _copy(before_1_ptr, after_1_ptr, part, row, b, m_1, size_1, PARTS, BLOCK)
    else:
        _copy(after_0_ptr, before_0_ptr, part, row, b, m_0, size_0, PARTS, BLOCK)
        if after_1_ptr is not None:
            _copy(after_1_ptr, before_1_ptr, part, row, b, m_1, size_1, PARTS, BLOCK)
    if part == 0:
        after, before = tl.load(frame_ptr + row), tl.load(frame_before_ptr + row)
        number = tl.where(active if ELAPSED else taken, after, before)
        tl.store(frame_ptr + row, number)
        tl.store(frame_before_ptr + row, number)
        tl.store(not_finite_ptr + row, tl.load(not_finite_ptr + row) + (active & bad).to(tl.int64))
        for start in range(0, k, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row.to(tl.int64) * stride_logits_b + offs, offs < k)
            x = tl.where(taken, x, float("nan"))
            tl.store(answer_ptr + row.to(tl.int64) * k + offs, x.to(answer_ptr.dtype.element_ty), offs < k)


def frame_settle(
    logits: Tensor,
    active: Tensor,
    frame: Tensor,
    frame_before: Tensor,
    a: Tensor,
    a_before: Tensor,
    b: Tensor | None,
    b_before: Tensor | None,
    answer: Tensor,
    not_finite: Tensor,
    elapsed: bool,
) -> None:
    rows, k = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    bad = torch.empty(rows, PARTS, dtype=torch.int32, device=logits.device)
    m_a, size_a = _sizes(a)
    m_b, size_b = (1, 0) if b is None else _sizes(b)
    sizes = (rows, k, m_a, m_b, size_a, size_b)
    grid = (rows, PARTS)
    with on_device(logits):
        _frame_look_kernel[grid](bad, logits, logits.stride(0), a, b, *sizes, PARTS, BLOCK)
        _frame_settle_kernel[grid](
            bad, active, logits, logits.stride(0), answer, not_finite, frame, frame_before,
            a, a_before, b, b_before, *sizes, elapsed, PARTS, BLOCK,
        )  # fmt: skip


def _sizes(state: Tensor) -> tuple[int, int]:
    """(g, b, m) -> m, g * m; m at least 1, as it divides."""
    size = state.shape[0] * state.shape[2]
    if size >= 2**30:
        raise NotImplementedError(f"frame_settle: a stream's state must have fewer than 2^30 values, got {size}")
    return max(1, state.shape[2]), size


def aot_cases() -> list[AotCase]:
    cases = []
    for name, second, elapsed in (("streams", True, False), ("elapsed", True, True), ("window", False, False)):
        rows = 4
        numbers = [meta(rows, dtype=torch.int64) for _ in range(3)]
        conv, ssm = (meta(12, rows, 2304), meta(12, rows, 2304)), (meta(12, rows, 12288), meta(12, rows, 12288))
        states = (*conv, *(ssm if second else (None, None)))
        logits, active = meta(rows, 7, dtype=torch.bfloat16), meta(rows, dtype=torch.bool)
        args = (logits, active, *numbers[:2], *states, meta(rows, 7, dtype=torch.bfloat16), numbers[2], elapsed)
        cases.append(AotCase(name, frame_settle, args, slow=name != "streams"))
    return cases
