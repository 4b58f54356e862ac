"""Measures the launch choices of the Triton scan on this GPU, and, with --write, rewrites their table.

    python -m bench.tune_scan [--write]

Every choice runs on every shape, interleaved, L2 cold; the one with the least sum of times relative to the best of each
shape wins.  All times go to bench/results/h200_scan_tuning.json, the choice to endomamba/ops/_scan_triton_table.py.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.bench_gpu import Bench, about
from endomamba.ops import _scan_triton, _scan_triton_table
from endomamba.ops._scan import Direction

RESULT = Path(__file__).parent / "results" / "h200_scan_tuning.json"
SHAPES = ((768, 49), (48, 784), (128, 197), (1, 3152))
D, N = 768, 16
CHOICES = {
    "FWD": [dict(K=K, W=W) for K, W in ((4, 1), (2, 1), (2, 2), (1, 2), (2, 4))],
    "BWD": [
        *(
            dict(T=4, W=2, KEEP=keep, per_sm=per_sm, maxnreg=registers)
            for keep in (False, True)
            for per_sm, registers in ((8, 128), (7, 144), (6, 168), (9, 112))
        ),
        dict(T=4, W=4, KEEP=False, per_sm=4, maxnreg=128),
        dict(T=8, W=2, KEEP=False, per_sm=7, maxnreg=144),
        dict(T=4, W=1, KEEP=False, per_sm=16, maxnreg=128),
        dict(T=2, W=2, KEEP=True, per_sm=8, maxnreg=128),
    ],
}
FLAGS = dict(scale=1.0, dt_softplus=True, frames=0, max_seqlen=0, plan="auto")


def name(choice: dict) -> str:
    return " ".join(f"{k}={v}" for k, v in choice.items())


def calls(b: int, l: int) -> dict:
    """(table, choice) -> a call on b sequences of l tokens, bf16, x, z and B, C as the small model cuts them."""
    device = "cuda"
    xz, dt = torch.randn(b, l, 2 * D, device=device).bfloat16(), torch.randn(b, l, D, device=device).bfloat16()
    projected = torch.randn(b, l, 1, 24 + 2 * N, device=device).bfloat16()
    A, bias = -torch.rand(D, N, device=device) * 16, torch.rand(D, device=device) * 4 - 6
    side = Direction(
        xz[..., :D].contiguous(), dt, A, projected[..., 24 : 24 + N], projected[..., 24 + N :],
        torch.ones(D, device=device), bias, None, False,
    )  # fmt: skip
    z, dy = xz[..., D:], torch.randn(b, l, D, device=device).bfloat16()

    def forward():
        return _scan_triton.scan_fwd(
            (side,), z, None, None, return_final_state=False, save_states=True, out_fp32=False, **FLAGS
        )

    saved = tuple(forward()[2])

    def backward():
        return _scan_triton.scan_bwd(dy, (None,), (side,), z, None, None, saved, **FLAGS)

    def with_choice(table: str, choice: dict, call):
        def run():
            kept = getattr(_scan_triton, table)
            setattr(_scan_triton, table, choice)
            try:
                call()
            finally:
                setattr(_scan_triton, table, kept)

        return run

    return {
        (table, name(choice)): with_choice(table, choice, forward if table == "FWD" else backward)
        for table, choices in CHOICES.items()
        for choice in choices
    }


def best(times: dict[str, dict[str, float]]) -> str:
    """choice of the least sum over shapes of its time by that shape's best."""
    least = {shape: min(t[shape] for t in times.values()) for shape in next(iter(times.values()))}
    return min(times, key=lambda choice: sum(t / least[shape] for shape, t in times[choice].items()))


def write_table(picked: dict[str, dict], gpu: str) -> None:
    path = Path(_scan_triton_table.__file__)
    lines = path.read_text().splitlines()
    for table, choice in picked.items():
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{table} = "))
        lines[at] = f"{table} = {json.dumps(choice).replace('true', 'True').replace('false', 'False')}"
    path.write_text("\n".join(lines) + "\n")
    print(f"{path.name}: written for {gpu}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the table with the choice")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commit", default="", help="of the tree that runs; else what git says")
    parser.add_argument(
        "--compile", type=int, default=None, help=argparse.SUPPRESS
    )  # fills the cache: every 8th choice
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_scan: there is no GPU here")
    if args.compile is not None:
        for call in list(calls(2, 49).values())[args.compile :: 8]:
            call()
        torch.cuda.synchronize()
        return
    for job in [subprocess.Popen([sys.executable, "-m", "bench.tune_scan", f"--compile={i}"]) for i in range(8)]:
        job.wait()
    common = SimpleNamespace(
        dry_run=False, compile_only=False, graph=False, rounds=args.rounds, mamba=None, state_update=None,
        commit=args.commit,
    )  # fmt: skip
    bench, times = Bench(common), {table: {} for table in CHOICES}
    for b, l in SHAPES:
        for (table, choice), took in bench.time(calls(b, l)).items():
            times[table].setdefault(choice, {})[f"{b}x{l}"] = round(took["median_us"], 1)
    picked = {table: next(c for c in CHOICES[table] if name(c) == best(times[table])) for table in CHOICES}
    meta = about(common) | {"command": "python -m bench.tune_scan"}
    args.out.write_text(json.dumps({"meta": meta, "picked": picked, "median_us": times}, indent=1) + "\n")
    for table, rows in times.items():
        for choice, shapes in rows.items():
            mark = "*" if choice == name(picked[table]) else " "
            print(f"{mark} {table} {choice:50}", *(f"{shape} {t:8.1f}" for shape, t in shapes.items()))
    if args.write:
        write_table(picked, meta["gpu"])


if __name__ == "__main__":
    main()
