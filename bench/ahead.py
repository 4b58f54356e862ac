"""The kernels of one call, compiled ahead of time for an H200: a process of its own, since it replaces Triton's driver.

python -m bench.ahead OP SHAPE DTYPE     # one line of JSON; what `profile` starts
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from bench import sass
from bench.calls import call_of, parse_shape
from bench.chip import TARGET, WARPS, occupancy

ROOT = Path(__file__).resolve().parents[1]


class Skipped(Exception):
    """Why nothing can be compiled here."""


def kernels(op: str, shape: str, dtype: str) -> list[dict]:
    """A row for every launch of the call, in its order; see `row`."""
    if importlib.util.find_spec("triton") is None:
        raise Skipped("Triton is not installed: pip install triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.ahead", op, shape, dtype]
    done = subprocess.run(command, cwd=ROOT, env=env | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    if done.returncode:
        raise Skipped((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def compiled(op: str, shape: str, dtype: str) -> list[dict]:
    """Runs the op's own host code on tensors without memory; its launches are compiled, not made."""
    sys.path.insert(0, str(ROOT / "tools"))
    import triton_resources as tool
    from triton.runtime import driver

    from endomamba.ops import _triton
    from endomamba.ops._triton import AotCase

    args, _, _ = call_of(op, parse_shape(shape, dtype), "meta")
    driver.set_active(tool.CompileOnly(TARGET))
    _triton._machine = lambda *_: ()  # tensors on "meta" have the kernels of a GPU here
    return [row(tool, *launch) for launch in tool.launches(AotCase(op, host_function(op), tuple(args)))]


def host_function(op: str):
    """The Python function behind torch.ops.endomamba.OP, past the dispatcher, which gives meta tensors to the fake."""
    from torch._library.custom_ops import OPDEFS

    return OPDEFS[f"endomamba::{op}"]._init_fn


def row(tool, name: str, kernel, grid: tuple[int, ...]) -> dict:
    """Numbers of one launch: shared in bytes a block, occupancy as a part of the warps that a multiprocessor holds."""
    used = dict(zip(tool.COLUMNS, tool.resources(kernel)))
    warps, shared = kernel.metadata.num_warps, used["static_shared"] + used["shared"]
    blocks, limit = occupancy(used["registers"], shared, warps)
    code = sass.instructions(tool.disassembled(kernel))
    loop = sass.hottest(code)
    programs = 1
    for size in grid:
        programs *= size
    return used | {
        "kernel": name, "blocks": programs, "warps": warps, "shared": shared, "occupancy": blocks * warps / WARPS,
        "limit": limit, "loop": (loop or sass.mix(code))._asdict() | {"is_loop": loop is not None},
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(compiled(*sys.argv[1:])))
