"""Measures where the CUDA C++ scans are faster than the Triton ones; with --write, rewrites their table.

    python -m bench.tune_cuda [--write]

Shapes are sequences x tokens of 768 channels in bf16.  Every call is captured in a CUDA graph, so that the host's time
is in none; the two back ends run interleaved, L2 cold.  A result that differs from Triton's by more than bf16 explains
stops it.  One frame is also timed 20 times back to back in one graph, as in a stream, with a warm L2.
All times go to bench/results/h200_cuda_scan.json, their ratios to endomamba/ops/_scan_cuda_table.py.
"""

import argparse
import json
import pprint
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.bench_gpu import Bench, about, make, op, prepared, relative, scan_name
from endomamba.ops import _extension_cuda, _scan_cuda_table

RESULT = Path(__file__).parent / "results" / "h200_cuda_scan.json"
D, STATES = _scan_cuda_table.CHANNELS, 16
SEQUENCES, TOKENS, MOST = (1, 4, 16, 64, 256, 768), (49, 197, 784, 3152), 160_000  # tokens of all sequences
PHASES = ("forward", "saving", "backward")
BACKENDS = ("triton", "cuda")
TOLERANCE = 0.02


def shapes() -> list[tuple[int, int]]:
    return [(b, l) for l in TOKENS for b in SEQUENCES if b * l <= MOST]


def agree(values: dict) -> None:
    """Raises where the two back ends' outputs or gradients are not the same function."""
    for i, phase in enumerate(PHASES):
        want, got = (prepared(values, backend=backend)[i]() for backend in BACKENDS)
        far = max((relative(a, b) for a, b in zip(got, want, strict=True) if b.numel()), default=0.0)
        if not far < TOLERANCE:
            raise SystemExit(f"tune_cuda: {scan_name(values)} {phase} differs by {far:.1e} from Triton")


def measure(bench: Bench, both: bool) -> dict[str, dict[int, dict[int, dict[str, float]]]]:
    """phase -> tokens -> sequences -> back end -> microseconds."""
    way, found = "both ways" if both else "causal", {}
    for b, l in shapes():
        values = make(bench, b, l, D, STATES, "bf16", both)
        if b == 4:
            agree(values)
        calls = {backend: prepared(values, backend=backend) for backend in BACKENDS}
        for i, phase in enumerate(PHASES):
            took = bench.time({backend: calls[backend][i] for backend in BACKENDS})
            row = {backend: round(t["median_us"], 2) for backend, t in took.items()}
            found.setdefault(f"{way} {phase}", {}).setdefault(l, {})[b] = row
            print(f"{way:9} {phase:8} {b:4} x {l:4}", *(f"{k} {v:9.2f}" for k, v in row.items()), flush=True)
    return found


def back_to_back(bench: Bench) -> dict[str, dict[str, float]]:
    """One frame: microseconds of a call among 20 in one graph."""
    found = {}
    for both in (False, True):
        for dtype in ("bf16", "fp32"):
            values = make(bench, 1, 197, D, STATES, dtype, both)
            calls = {k: partial(op, scan_name(values), values, backend=k) for k in BACKENDS}
            took = bench.time(calls, repeat=20)
            found[f"1 x 197 {'both ways' if both else 'causal'} {dtype}"] = {
                k: round(t["median_us"], 2) for k, t in took.items()
            }
    return found


def ratios(times: dict) -> dict[str, dict[int, dict[int, float]]]:
    return {
        phase: {l: {b: round(us["triton"] / us["cuda"], 2) for b, us in row.items()} for l, row in rows.items()}
        for phase, rows in times.items()
    }


def write_table(found: dict, measured: dict) -> None:
    path = Path(_scan_cuda_table.__file__)
    head, rest = path.read_text().split("MEASURED = ", 1)
    between = rest[rest.index("# phase ->") : rest.index("RATIO = ")]
    tail = rest[rest.index("\n\n\n") :]
    table = pprint.pformat(found, width=110, sort_dicts=False).replace("'", '"')
    path.write_text(f"{head}MEASURED = {json.dumps(measured)}\n{between}RATIO = {table}  # fmt: skip{tail}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the table")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commit", default="", help="of the tree that runs; else what git says")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_cuda: there is no GPU here")
    begin = time.perf_counter()
    _extension_cuda.load()
    print(f"extension: {time.perf_counter() - begin:.1f} s", flush=True)
    common = SimpleNamespace(
        dry_run=False, compile_only=False, graph=True, rounds=args.rounds, mamba=None, state_update=None,
        commit=args.commit,
    )  # fmt: skip
    bench = Bench(common)
    meta = about(common) | {"command": "python -m bench.tune_cuda"}
    frame, times = back_to_back(bench), {}
    for case, row in frame.items():
        print(case, *(f"{k} {v:7.2f}" for k, v in row.items()), flush=True)
    for both in (True, False):
        times |= measure(bench, both)
        args.out.write_text(json.dumps({"meta": meta, "back_to_back_us": frame, "median_us": times}, indent=1) + "\n")
    if args.write:
        major, minor = torch.cuda.get_device_capability()
        write_table(
            ratios(times), {k: meta[k] for k in ("gpu", "driver", "commit")} | {"capability": f"{major}.{minor}"}
        )


if __name__ == "__main__":
    main()
