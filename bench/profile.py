"""One call's kernels in one table: registers, spills, occupancy, the bound that applies; with ncu what was measured.

    python -m bench profile selective_scan 768x49
    python -m bench profile bidirectional_scan_backward small-l197-bf16
    python -m bench profile causal_conv1d 'one frame, small' --dtype fp32

Without a GPU everything that the compiler knows: the op's own host code runs on tensors without memory and its Triton
kernels are compiled for an H200 (sm_90), not launched.  With a GPU and ncu on PATH the call runs once more under ncu,
inside an NVTX range: microseconds, percent of the bound, issue and MUFU (XU) utilisation, bytes.

OP: selective_scan, bidirectional_scan, causal_conv1d or add_rms_norm, each with _backward too.  SHAPE:
SEQUENCESxTOKENS[xCHANNELS[xSTATES]], or a name of bench/cases.py; channels are those of the scan, the norm has half.

The bound is the largest of three times (bench/chip.py has the numbers and where they are from): operands and results
moved once at 4.23 TB/s, exponentials at 4.06 T/s, a scan's instructions at 1.045 T warp instructions/s.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.ahead import Skipped, kernels
from bench.calls import DTYPES, Unknown, call_of, parse_op, parse_shape
from bench.chip import GPU, TARGET, Work
from bench.ncu import measure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("op", metavar="OP")
    parser.add_argument("shape", metavar="SHAPE")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the activations (default bf16)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="where ncu's report goes, with source lines")
    parser.add_argument("--no-ncu", action="store_true", help="the ahead-of-time half alone")


def main(args: argparse.Namespace) -> int:
    try:
        parse_op(args.op)
        shape = parse_shape(args.shape, args.dtype)
        _, _, work = call_of(args.op, shape, "meta")
        ahead = kernels(args.op, args.shape, args.dtype)
    except (Unknown, Skipped) as error:
        print(str(error) if isinstance(error, Unknown) else f"profile: {error}", file=sys.stderr)
        return 2
    print(f"{args.op} {shape}, {GPU} ({TARGET})")
    print(predicted(work))
    measured, why = [], "--no-ncu was given"
    if not args.no_ncu:
        try:
            measured = measure(args.op, args.shape, args.dtype, args.keep)
        except Skipped as error:
            why = str(error)
    print(table(merge(ahead, measured)))
    for row in ahead:
        print(loop_line(row))
    print(summary(work, measured, gpu_name()) if measured else f"not measured: {why}")
    return 0


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def predicted(work: Work) -> str:
    parts = [f"{name} {us:.1f} us" for name, us in work.bounds().items()]
    name, us = work.bound()
    return (
        f"predicted: {work.bytes:,} bytes, {work.exponentials:,} exponentials, {work.slots:,.0f} warp instructions\n"
        f"bounds: {', '.join(parts)}; the one that applies: {name}, {us:.1f} us"
    )


def merge(ahead: list[dict], measured: list[dict]) -> list[dict]:
    """Each launch with what ncu saw of it, by name and order; kernels that are not Triton's come last."""
    left, rows = list(measured), []
    for row in ahead:
        seen = next((m for m in left if m["kernel"] == row["kernel"]), {})
        if seen:
            left.remove(seen)
        rows.append(row | seen)
    return rows + left


COLUMNS = (  # title, what of a row
    ("kernel", lambda r: r["kernel"]),
    ("blocks", lambda r: f"{r['blocks']:,}"),
    ("warps", lambda r: f"{r['warps']}"),
    ("registers", lambda r: f"{r['registers']}"),
    ("stack", lambda r: f"{r['stack']}"),
    ("spills", lambda r: f"{r['spill_bytes']}"),
    ("shared", lambda r: f"{r['shared']:,}"),
    ("occupancy", lambda r: f"{100 * r['occupancy']:.0f} % ({r['limit']})"),
    ("SASS", lambda r: f"{r['instructions']:,}"),
    ("us", lambda r: f"{r['ns'] / 1e3:.1f}"),
    ("issue", lambda r: f"{100 * r['issue']:.0f} %"),
    ("MUFU", lambda r: f"{r['xu_percent']:.0f} %"),
    ("warps active", lambda r: f"{r['warps_percent']:.0f} %"),
    ("bytes", lambda r: f"{r['read'] + r['written']:,.0f}"),
)


def cell(tell, row: dict) -> str:
    try:
        return tell(row)
    except KeyError:
        return "-"


def table(rows: list[dict]) -> str:
    """Columns that no row fills are left out."""
    columns = [[title, *(cell(tell, row) for row in rows)] for title, tell in COLUMNS]
    columns = [column for column in columns if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for line in zip(*columns):
        first, *rest = (text.ljust(w) if not i else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths)))
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)


def loop_line(row: dict) -> str:
    loop = row["loop"]
    what = "hottest loop" if loop["is_loop"] else "no loop, all of it"
    parts = ", ".join(f"{kind} {n}" for kind, n in loop["kinds"].items())
    return f"{row['kernel']}: {what}: {loop['instructions']} instructions: {parts}"


def summary(work: Work, measured: list[dict], gpu: str) -> str:
    """All kernels of the call together, by the bound and by the bytes predicted."""
    us = sum(row["ns"] for row in measured) / 1e3
    moved = sum(row["read"] + row["written"] for row in measured)
    name, bound = work.bound()
    percent = f"{100 * bound / us:.0f} % of the bound ({name})"
    if GPU not in gpu:
        percent = f"no percentage: the bounds are those of an {GPU}, this is {gpu}"
    return f"measured: {us:.1f} us, {percent}; {moved:,.0f} bytes, {moved / work.bytes:.2f} of those predicted"
