"""Where the CUDA C++ scans were measured faster than the Triton ones: what "auto" takes on a GPU.

MEASURED and RATIO are written by `python -m bench.tune_cuda --write`, which keeps the times in
bench/results/h200_cuda_scan.json.  Another GPU, another dtype than bf16 and shapes outside of what was measured are
Triton's.
"""

from __future__ import annotations

import functools
from bisect import bisect_left

# Time of Triton over time of CUDA must be at least this, in the nearest shapes on every side.
LEAST = 1.03
CHANNELS = 768  # of the sequences counted below
MEASURED = {"capability": "9.0"}
# phase -> tokens -> sequences -> time of Triton / time of CUDA; "saving" is a forward that a backward will follow
RATIO = {}


def around(measured: list[int], value: float) -> list[int]:
    """The nearest ones on both sides, or the one that it is; none for what lies outside."""
    at = bisect_left(measured, value)
    if at < len(measured) and measured[at] == value:
        return [measured[at]]
    return measured[at - 1 : at + 1] if 0 < at < len(measured) else []


@functools.cache
def faster(phase: str, b: int, l: int, d: int) -> bool:
    """Whether CUDA is, for b sequences of l tokens and d channels: all corners of its cell in RATIO say so."""
    rows = RATIO.get(phase, {})
    lengths = around(sorted(rows), l)
    if not lengths:
        return False
    for length in lengths:
        row = rows[length]
        sequences = around(sorted(row), b * d / CHANNELS)
        if not sequences or any(row[s] < LEAST for s in sequences):
            return False
    return True
