"""Where the CUDA C++ kernels were measured faster than the Triton ones: what "auto" takes on a GPU.

MEASURED and RATIO are written by `python -m bench.tune_cuda --write`, which keeps the times in
bench/results/h200_cuda_scan.json and h200_cuda_frame.json.  Triton's is what was not measured: a GPU of another compute
capability or with other multiprocessors, scans of another dtype than bf16 or other channels, frames of 96 channels, and
shapes outside of the measured ones.
"""

from __future__ import annotations

import functools
from bisect import bisect_left

# Time of Triton over time of CUDA must be at least this, in the nearest shapes on every side.
LEAST = 1.03
SCAN_CHANNELS = 768
MEASURED = {"scans": {"gpu": "NVIDIA H200", "driver": "580.159.04", "commit": "075d76b", "chip": [9, 0, 132]},
 "frames": {"gpu": "NVIDIA H200",
            "driver": "580.159.04",
            "commit": "1e79d03, 9fcfc1a",
            "chip": [9, 0, 132]}}  # fmt: skip
# part -> case -> tokens -> sequences or streams -> time of Triton / time of CUDA; "saving" is a forward that a backward
# will follow
RATIO = {"scans": {"both ways forward": {49: {1: 1.88, 4: 1.0, 16: 1.24, 64: 1.21, 256: 1.07, 768: 1.04},
                                 197: {1: 2.48, 4: 0.9, 16: 1.06, 64: 1.12}},
           "both ways saving": {49: {1: 1.13, 4: 1.15, 16: 1.24, 64: 1.21, 256: 1.02, 768: 0.98},
                                197: {1: 0.71, 4: 0.73, 16: 1.08, 64: 1.14}},
           "both ways backward": {49: {1: 0.45, 4: 0.46, 16: 0.58, 64: 0.94, 256: 0.73, 768: 0.75},
                                  197: {1: 0.43, 4: 0.45, 16: 0.64}},
           "causal forward": {197: {1: 3.18}}},
 "frames": {"both ways bf16 576": {50: {1: 1.0, 5: 0.63, 20: 0.48},
                                   197: {1: 1.05, 2: 0.97, 5: 0.84, 16: 0.86}},
            "causal bf16 576": {50: {1: 1.18, 5: 0.71, 20: 0.5},
                                197: {1: 1.1, 2: 0.92, 5: 0.76, 16: 0.8}},
            "both ways fp32 192": {50: {1: 1.42, 5: 1.04, 20: 0.78},
                                   197: {1: 1.66, 2: 1.51, 5: 1.31, 16: 1.26}},
            "causal fp32 192": {50: {1: 1.46, 5: 1.16, 20: 0.79},
                                197: {1: 1.68, 2: 1.64, 5: 1.14, 16: 1.13}},
            "both ways fp32 384": {50: {1: 1.3, 5: 1.08, 20: 1.04},
                                   197: {1: 1.92, 2: 1.7, 5: 1.57, 16: 1.53}},
            "causal fp32 384": {50: {1: 1.34, 5: 1.05, 20: 1.01},
                                197: {1: 1.95, 2: 1.44, 5: 1.36, 16: 1.37}},
            "both ways fp32 576": {50: {1: 1.45, 5: 0.88, 20: 0.73}},
            "both ways bf16 192": {50: {1: 0.8, 5: 0.62, 20: 0.44},
                                   197: {1: 1.0, 2: 1.01, 5: 0.83, 16: 0.87}},
            "causal bf16 192": {50: {1: 0.89, 5: 0.62, 20: 0.42},
                                197: {1: 1.08, 2: 0.93, 5: 0.77, 16: 0.69}},
            "both ways bf16 384": {50: {1: 0.91, 5: 0.65, 20: 0.51},
                                   197: {1: 1.25, 2: 1.06, 5: 0.93, 16: 0.95}},
            "causal bf16 384": {50: {1: 0.92, 5: 0.65, 20: 0.45},
                                197: {1: 1.26, 2: 0.94, 5: 0.76, 16: 0.75}},
            "causal fp32 576": {50: {1: 1.77, 5: 1.21, 20: 0.99},
                                197: {1: 1.46, 2: 1.27, 5: 1.19, 16: 1.12}}}}  # fmt: skip


def around(measured: list[int], value: int) -> list[int]:
    """The nearest ones on both sides, or the one that it is; none for what lies outside."""
    at = bisect_left(measured, value)
    if at < len(measured) and measured[at] == value:
        return [measured[at]]
    return measured[at - 1 : at + 1] if 0 < at < len(measured) else []


@functools.cache
def faster(part: str, case: str, b: int, l: int, chip: tuple[int, int, int]) -> bool:
    """Whether CUDA is, for b sequences or streams of l tokens: all corners of their cell in RATIO say so.

    part, case: keys of RATIO.  chip: as in MEASURED.
    """
    if list(chip) != MEASURED[part]["chip"]:
        return False
    rows = RATIO[part].get(case, {})
    corners = [(row := rows[length], around(sorted(row), b)) for length in around(sorted(rows), l)]
    return bool(corners) and all(found and min(row[s] for s in found) >= LEAST for row, found in corners)
