"""Every Triton kernel compiled ahead of time: exactly what tests/data/triton_resources.json says, and within the chips.

A number that moved on purpose: python tools/triton_resources.py writes the file again.  No GPU is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "triton_resources.py"
DATA = json.loads((ROOT / "tests" / "data" / "triton_resources.json").read_text())
KIB = 1024
SHARED = {
    "sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB, "sm_100": 227 * KIB,
    "sm_120": 99 * KIB, "gfx942": 64 * KIB,
}  # fmt: skip
# Bytes a launch's system part takes on top of what a kernel may have, in `static_shared` of these.
RESERVED = {"sm_90": KIB, "sm_100": KIB, "sm_120": KIB}
REGISTERS = {"gfx942": 512}
# Rows that may have a stack frame: pattern of "target row" -> (bytes, why).
STACK: dict[str, tuple[int, str]] = {
    "sm_* _scan_triton/bwd-*_scan_bwd_kernel*": (
        240,
        "kept to 168 registers for 12 warps a multiprocessor, or to 255 for 8: a few words, measured to win on sm_90",
    ),
    "sm_80 _scan_triton/bwd-*_scan_bwd_kernel*": (512, "two channels a lane: the launch table is measured on sm_90"),
    "sm_1?0 _scan_triton/bwd-*_scan_bwd_kernel*": (416, "the same"),
    "sm_* causal_conv1d/bwd/both-uneven-*": (
        1344,
        "strides that allow no vector load, both directions in one program: right, and slower than it need be",
    ),
    "sm_* _scan_triton/bwd-*_combine_kernel": (16, "64-bit divisions hold registers; memory bound all the same"),
    "sm_1?0 frame_embed/fwd/*": (16, "two to four words, no spills: beside the calls of the fp64 division"),
    "sm_* frame_blocks/fwd/many-*_in_conv_kernel*": (144, "many streams, packed only where that is asked for"),
    "gfx942 _scan_triton/bwd-*_scan_bwd_kernel*": (320, "no shared memory and no mma there: right, not fast"),
}

# Kernels that a target does not get: their op refuses it.
FRAME_BLOCKS = {"_begin_kernel", "_in_conv_kernel", "_x_proj_kernel", "_scan_frame_kernel", "_out_proj_kernel"}
NOT_FOR = {"gfx942": FRAME_BLOCKS}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def compile_now(target: str, path: Path, *options: str) -> dict:
    """row -> numbers, by a process without TRITON_INTERPRET."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL), "--target", target, "--out", str(path), "--jobs=1", *options]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert path.exists(), done.stderr
    written = json.loads(path.read_text())
    assert written["columns"] == DATA["columns"]
    return written["targets"].get(target, {})


def check(target: str, rows: dict) -> None:
    for row, numbers in rows.items():
        assert not isinstance(numbers, str), f"{target} {row}: {numbers}"
        used = dict(zip(DATA["columns"], numbers, strict=True))
        name = f"{target} {row}"
        allowed = max((size for pattern, (size, _) in STACK.items() if fnmatch(name, pattern)), default=0)
        assert used["stack"] <= allowed and used["spill_bytes"] <= allowed, f"{name}: spills, {used}"
        assert used["registers"] <= REGISTERS.get(target, 255), f"{name}: {used}"
        shared = used["shared"] + max(0, used["static_shared"] - RESERVED.get(target, 0))
        assert shared <= SHARED[target], f"{name}: {shared} bytes of shared memory, the chip has {SHARED[target]}"


def compare(target: str, rows: dict, whole: bool) -> None:
    check(target, rows)
    if importlib.metadata.version("triton") != DATA["triton"]:
        pytest.skip(f"within the bounds; the exact numbers are those of Triton {DATA['triton']}")
    want = DATA["targets"][target]
    changed = {row: (want.get(row), now) for row, now in rows.items() if want.get(row) != now}
    if whole:
        changed |= {row: (then, None) for row, then in want.items() if row not in rows}
    lines = "".join(f"\n  {row}: {then} -> {now}" for row, (then, now) in changed.items())
    assert not changed, f"{target}: {', '.join(DATA['columns'])} changed (python tools/triton_resources.py):{lines}"


@pytest.mark.parametrize("target", SHARED)
def test_data_is_within_the_chips(target):
    assert DATA["targets"][target]
    check(target, DATA["targets"][target])


@needs_triton
@pytest.mark.parametrize("target", SHARED)
def test_compiled_again(target, tmp_path):
    compare(target, compile_now(target, tmp_path / "now.json", "--quick"), whole=False)


@needs_triton
def test_training_both_ways_compiled_again(tmp_path):
    """The largest kernels, and the slowest to compile: on one chip, the one that their launch table is of."""
    rows = compile_now("sm_90", tmp_path / "now.json", "--only=_scan_triton/bwd-both-shared")
    assert len(rows) == 4
    compare("sm_90", rows, whole=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@needs_triton
@pytest.mark.parametrize("target", SHARED)
def test_every_configuration_compiled_again(target, tmp_path):
    compare(target, compile_now(target, tmp_path / "now.json"), whole=True)


@needs_triton
def test_every_kernel_has_a_case():
    """Each kernel is in the data of each target, by a case that is not slow."""
    script = (
        "import json, sys; sys.path[:0] = ['tools', '.']; import triton_resources as t; "
        "print(json.dumps([sorted(t.kernels()), [n for n, c in t.cases().items() if not c.slow]]))"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    every, quick = json.loads(done.stdout)
    for target, rows in DATA["targets"].items():
        seen = {row.split(":")[1].split("#")[0] for row in rows if row.split(":")[0] in quick}
        kernels = {*every} - NOT_FOR.get(target, set())
        assert kernels <= seen, f"{target}: no quick case launches {', '.join(sorted(kernels - seen))}"
