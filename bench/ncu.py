"""Nsight Compute on one call: what it measured of every kernel in the call's NVTX range.

python -m bench.ncu OP SHAPE DTYPE     # the call alone, inside the range; what ncu starts
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.ahead import ROOT, Skipped
from bench.calls import call_of, parse_shape

RANGE = "bench-profile"
METRICS = {  # our name -> ncu's, in base units: ns, bytes, warp instructions a clock, percent
    "ns": "gpu__time_duration.sum",
    "issue": "smsp__issue_active.avg.per_cycle_active",
    "xu_percent": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
}
TIMES = {"ns": 1.0, "nsecond": 1.0, "us": 1e3, "usecond": 1e3, "ms": 1e6, "msecond": 1e6, "s": 1e9, "second": 1e9}
BYTES = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}


def measure(op: str, shape: str, dtype: str, keep: Path | None = None) -> list[dict]:
    """A row for every kernel of the call, in order: `kernel` and the keys of METRICS; caches cold, clocks as they are.

    keep: where ncu's report goes, with source lines, for ncu-ui.
    """
    import torch

    if not torch.cuda.is_available():
        raise Skipped("there is no GPU here")
    if not shutil.which("ncu"):
        raise Skipped("ncu is not on PATH: it comes with NVIDIA Nsight Compute")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "call.ncu-rep")
        options = ["--nvtx", "--nvtx-include", f"{RANGE}/", "--clock-control", "none", "--import-source", "yes"]
        options += ["--section", "SourceCounters", "--metrics", ",".join(METRICS.values()), "--export", str(report)]
        tell(["ncu", *options, sys.executable, "-m", "bench.ncu", op, shape, dtype])
        if keep:
            shutil.copy(report, keep)
        return parse(tell(["ncu", "--import", str(report), "--page", "raw", "--csv", "--print-units", "base"]))


def tell(command: list[str]) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "ENDOMAMBA_NVTX")}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    told = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line]
    if done.returncode or told:
        lines = told or done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise Skipped(f"ncu failed: {lines[-1].removeprefix('==ERROR==').strip()}")
    return done.stdout


def parse(text: str) -> list[dict]:
    """The rows of `ncu --page raw --csv`: names, then units, then a line a kernel; lines before them are ncu's talk."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise Skipped("ncu saw no kernel in the call: its output has no table")
    names, units, *rows = csv.reader(io.StringIO("\n".join(lines[start:])))
    missing = [metric for metric in METRICS.values() if metric not in names]
    if missing:
        raise Skipped(f"ncu's table has no column {missing[0]}: another version of ncu counts it otherwise")
    column = {name: i for i, name in enumerate(names)}

    def value(row: list[str], metric: str) -> float:
        unit = units[column[metric]]
        scale = {**TIMES, **BYTES}.get(unit, 1.0)
        return float(row[column[metric]].replace(",", "")) * scale

    return [
        {"kernel": row[column["Kernel Name"]].split("(")[0]} | {key: value(row, m) for key, m in METRICS.items()}
        for row in rows
        if row
    ]


def run(op: str, shape: str, dtype: str) -> None:
    """The call, compiled and warm, inside the range."""
    import torch

    _, call, _ = call_of(op, parse_shape(shape, dtype), "cuda")
    with torch.inference_mode():
        for _ in range(3):
            call()
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_push(RANGE)
        call()
        torch.cuda.nvtx.range_pop()
        torch.cuda.synchronize()


if __name__ == "__main__":
    run(*sys.argv[1:])
