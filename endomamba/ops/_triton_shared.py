"""Shared memory of a Triton program by PTX, where every address is the kernel's own business (ASM; see _triton.ASM).

A kernel reserves its bytes once (`reserve`) and hands addresses, int32 a lane, to `put*` and `get*`.  What one lane
wrote another of its warp may read after `warp_sync`, any lane of the program after `program_sync`.
"""

import triton
import triton.language as tl


def shared_asm(size: int) -> str:
    """PTX that reserves `size` bytes of shared memory and gives their address plus $1."""
    return f"{{.shared .align 16 .b8 scan_states[{size}]; mov.u32 $0, scan_states; add.u32 $0, $0, $1;}}"


@triton.jit
def reserve(lane_offset, SHARED: tl.constexpr):
    return tl.inline_asm_elementwise(SHARED, "=r,r", [lane_offset], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def put4(p, a, b, c, d):
    tl.inline_asm_elementwise(
        "{st.shared.v4.f32 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0;}",
        "=r,r,f,f,f,f", [p, a, b, c, d], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put2(p, a, b):
    tl.inline_asm_elementwise(
        "{st.shared.v2.f32 [$1], {$2, $3}; mov.u32 $0, 0;}",
        "=r,r,f,f", [p, a, b], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def put1(p, a):
    tl.inline_asm_elementwise(
        "{st.shared.f32 [$1], $2; mov.u32 $0, 0;}", "=r,r,f", [p, a], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def get4(p):
    return tl.inline_asm_elementwise(
        "ld.shared.v4.f32 {$0, $1, $2, $3}, [$4];",
        "=f,=f,=f,=f,r", [p], dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def get2(p):
    return tl.inline_asm_elementwise(
        "ld.shared.v2.f32 {$0, $1}, [$2];", "=f,=f,r", [p], dtype=(tl.float32, tl.float32), is_pure=False, pack=1
    )


@triton.jit
def get1(p):
    return tl.inline_asm_elementwise("ld.shared.f32 $0, [$1];", "=f,r", [p], dtype=tl.float32, is_pure=False, pack=1)


@triton.jit
def warp_sync(lane):
    tl.inline_asm_elementwise(
        "{bar.warp.sync 0xffffffff; mov.b32 $0, $1;}", "=r,r,~{memory}", [lane], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def program_sync(lane):
    tl.inline_asm_elementwise(
        "{bar.sync 0; mov.b32 $0, $1;}", "=r,r,~{memory}", [lane], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def pinned(v):
    # v in a register that the compiler cannot make again at every use
    return tl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [v], dtype=tl.int32, is_pure=False, pack=1
    )
