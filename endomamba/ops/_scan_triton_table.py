"""How the Triton scan is launched.  FWD, BWD and BWD_TWO are written by `python -m bench.tune_scan --write`, which
keeps what it measured in bench/results/h200_scan_tuning.json (not yet of BWD_TWO: its four choices were timed on an
H200 by hand); the table holds for every GPU until another is measured.
"""

# Forward, warps a program and tokens at a time (which changes no bit): more of them where warps are few.
FWD = {"W": 1, "T": 4, "T_few": 8, "few": 64}
# Backward: tokens whose states are in registers, warps, programs a multiprocessor, and the register limit that makes
# room for them (a quarter of its registers must hold a quarter of its warps).
BWD = {"T": 4, "CH": 1, "W": 4, "per_sm": 3, "maxnreg": 168}
# The same with two channels a lane, where that makes at least so many warps a multiprocessor.
BWD_TWO = {"T": 4, "CH": 2, "W": 2, "per_sm": 4, "maxnreg": 255, "least": 8}
# Sequences that leave three quarters of a multiprocessor's 16 warps without work, and of at least so many tokens, are
# split in time, in pieces of a multiple of 64 tokens: three launches instead of one, twice the exponentials.
SPLIT = {"least": 256, "warps": 16}
# Both ways, sequences that fill the warps of a GPU less than this many times: a direction a stream, at the same time.
APART = {"waves": 1.5, "warps": 16}
