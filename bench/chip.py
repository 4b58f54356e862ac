"""What an H200 can do, measured, and how many warps a kernel keeps on it: the bounds that `profile` compares with."""

from __future__ import annotations

from dataclasses import dataclass

GPU, TARGET = "H200", "sm_90"
COPY = 4.23e12  # bytes/s that a device copy moves, read and written; measured
EX2 = 4.06e12  # exponentials/s (fp32 MUFU.EX2); measured
ISSUE = 1.045e12  # warp instructions/s: 528 schedulers at 1.98 GHz, one a clock; arithmetic
# Issue slots that 32 (channel, state, token) elements of a scan need, counted in the SASS of prototypes.
SLOTS = {"forward": 6.9, "backward": 19.5}

MULTIPROCESSORS, WARPS, BLOCKS = 132, 64, 32  # warps and blocks at most on one multiprocessor
REGISTERS = 65536  # on one multiprocessor, a quarter with each scheduler
SHARED = 228 * 1024  # bytes on one multiprocessor


def occupancy(registers: int, shared: int, warps: int) -> tuple[int, str]:
    """-> blocks on one multiprocessor and what limits them.  registers: of a thread; shared: bytes, warps: of a block.

    The rules of compute capability 9.0 in NVIDIA's occupancy calculator: registers are given out by 256 a warp; warps
    spread over four schedulers, each with a quarter of the registers; shared memory is given out by 128 bytes, 1 KiB
    of a block's is the system's, and cuobjdump counts that in.
    """
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    room = {
        "blocks": BLOCKS,
        "warps": WARPS // warps,
        "registers": 4 * (REGISTERS // 4 // per_warp) // warps,
    }
    if shared:
        room["shared memory"] = SHARED // (-(-shared // 128) * 128)
    limit = min(room, key=lambda name: room[name])
    return room[limit], limit


@dataclass(frozen=True)
class Work:
    """What a call cannot do without."""

    bytes: int  # every operand read once, every result written once
    exponentials: int  # ex2 and lg2 on the MUFU
    slots: float = 0.0  # warp instructions of the scan; 0 where nobody counted them

    def bounds(self) -> dict[str, float]:
        """name -> microseconds."""
        return {
            "memory": 1e6 * self.bytes / COPY,
            "exponentials": 1e6 * self.exponentials / EX2,
            "issue": 1e6 * self.slots / ISSUE,
        }

    def bound(self) -> tuple[str, float]:
        """The one that applies: the largest, in microseconds."""
        return max(self.bounds().items(), key=lambda item: item[1])
