"""What the hottest loop of a compiled kernel is made of, read from its SASS."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
KINDS = (  # the first that fits
    ("MUFU", r"MUFU"),
    ("MMA", r"[HIQDW]?G?MMA"),
    ("fp32", r"F(FMA|MUL|ADD|SETP|SEL|MNMX|SET|CHK)|FFMA|FSWZADD"),
    ("fp64", r"D(FMA|MUL|ADD|SETP)"),
    ("half", r"H(FMA2|MUL2|ADD2|SETP2|MNMX2)|HFMA2"),
    ("convert", r"(F2F|F2I|I2F|F2FP|I2FP|FRND|PRMT)"),
    ("shuffle", r"(SHFL|REDUX|VOTE|MATCH)"),
    ("shared", r"(LDS|STS|LDSM|STSM|ATOMS)"),
    ("global", r"(LDG|STG|LDGSTS|ATOMG?|RED|UTMA\w*|CCTL|LD|ST)"),
    ("local", r"(LDL|STL)"),
    ("control", r"(BRA|BAR|BSSY|BSYNC|EXIT|CALL|RET|WARPSYNC|DEPBAR|LDGDEPBAR|SYNCS|NOP|YIELD|MEMBAR|NANOSLEEP)"),
    ("constant", r"(LDC|LDCU|ULDC)"),
)  # fmt: skip


class Instruction(NamedTuple):
    address: int
    name: str
    rest: str


class Loop(NamedTuple):
    instructions: int
    kinds: dict[str, int]  # most frequent first


def instructions(text: str) -> list[Instruction]:
    """Those of one kernel, from cuobjdump -sass."""
    return [Instruction(int(at, 16), name, rest) for at, name, rest in LINE.findall(text)]


def kind(name: str) -> str:
    stem = name.split(".")[0]
    return next((label for label, pattern in KINDS if re.fullmatch(pattern, stem)), "integer")


def loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """(first, last) address of every loop: a branch backwards; one to itself is the trap after the end."""
    found = []
    for at in code:
        target = re.search(r"0x([0-9a-f]+)\s*$", at.rest) if at.name.startswith("BRA") else None
        if target and int(target[1], 16) < at.address:
            found.append((int(target[1], 16), at.address))
    return found


def hottest(code: list[Instruction]) -> Loop | None:
    """The innermost loop with the most MUFU, then the most instructions: SASS does not say how often one turns.

    None where there is no loop: Triton unrolls a short one.
    """
    spans = loops(code)
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    bodies = [[at for at in code if first <= at.address <= last] for first, last in inner]
    if not bodies:
        return None
    body = max(bodies, key=lambda body: (sum(at.name.startswith("MUFU") for at in body), len(body)))
    return mix(body)


def mix(body: list[Instruction]) -> Loop:
    return Loop(len(body), dict(Counter(kind(at.name) for at in body).most_common()))
