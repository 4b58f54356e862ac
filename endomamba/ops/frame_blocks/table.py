"""How the kernels of frame_blocks are launched, by rows (b * l) at most: tiles, warps, stages.

Of few rows the smallest tiles that still fill the multiprocessors, measured on an H200 with 197 rows, small model; of
many, larger ones.  BM, BN rows and columns of a tile, BK of a step of its sum; of `x` BD channels of dt at a time and
PARTS programs that share them.  A tile that does not fit the model's sizes is halved until it does.
"""

_FEW = {
    "in": {"BM": 32, "BN": 64, "BK": 64, "warps": 4, "stages": 4},
    "x": {"BM": 16, "BK": 256, "BD": 256, "PARTS": 3, "warps": 4, "stages": 3},
    "scan": {"warps": 4},
    "both": {"warps": 4},
    "out": {"BM": 32, "BN": 32, "BK": 128, "warps": 4, "stages": 4},
}
_MANY = {
    **_FEW,
    "in": {"BM": 64, "BN": 64, "BK": 64, "warps": 8, "stages": 4},
    "x": {"BM": 32, "BK": 128, "BD": 128, "PARTS": 1, "warps": 4, "stages": 4},
    "out": {"BM": 64, "BN": 64, "BK": 64, "warps": 4, "stages": 4},
}
_FEW_FP32 = {
    **_FEW,
    "in": {"BM": 32, "BN": 32, "BK": 32, "warps": 4, "stages": 3},
    "x": {"BM": 16, "BK": 64, "BD": 128, "PARTS": 6, "warps": 4, "stages": 3},
    "out": {"BM": 32, "BN": 32, "BK": 64, "warps": 4, "stages": 3},
}
LAUNCH = {  # bytes of a weight -> rows at most, choices
    2: ((1024, _FEW), (float("inf"), _MANY)),
    4: ((float("inf"), _FEW_FP32),),
}
INTERPRETED = {  # small tiles, so that a test has several
    "in": {"BM": 16, "BN": 16, "BK": 16, "warps": 1, "stages": 1},
    "x": {"BM": 16, "BK": 16, "BD": 16, "PARTS": 2, "warps": 1, "stages": 1},
    "scan": {"warps": 1},
    "both": {"warps": 2},
    "out": {"BM": 16, "BN": 16, "BK": 16, "warps": 1, "stages": 1},
}
