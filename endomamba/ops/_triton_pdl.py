"""Programmatic dependent launch: a kernel gets going while the one before it ends."""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    # In a kernel launched with launch_pdl=True each program must come by here: behind it is what the kernel before
    # wrote.  What the one before that wrote is there at once: no program lets the next kernel in before its own wait.
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_begin(PDL: tl.constexpr):
    # When all programs have come by, those of the next kernel get going, up to their wait.
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
