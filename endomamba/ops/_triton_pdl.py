"""Programmatic dependent launch: a kernel gets going while the one before it ends."""

import triton
import triton.language as tl


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    # In a kernel launched with launch_pdl=True each program must come by here: behind it is what earlier kernels of the
    # stream wrote, before it are weights alone.  No kernel lets the next one in early: waiting programs take the places
    # of working ones (24 blocks of a frame, H200: 602 us like this, 622 without, 698 where each lets in the next).
    if PDL:
        tl.extra.cuda.gdc_wait()
