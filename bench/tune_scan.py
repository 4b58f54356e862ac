"""Measures the launch choices of the Triton scan on this GPU, and, with --write, rewrites their table.

    python -m bench.tune_scan [--write]

Every choice runs on every shape, interleaved, L2 cold; the one with the least sum of times relative to the best of each
shape wins (forward: of the shapes with many sequences, and of those with few).  All times go to
bench/results/h200_scan_tuning.json, the choice to endomamba/ops/_scan_triton_table.py.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.bench_gpu import Bench, about
from bench.cases import CHANNELS, LAUNCH_CHOICES, STATES
from endomamba.ops import _scan_triton, _scan_triton_table
from endomamba.ops._scan import Direction

RESULT = Path(__file__).parent / "results" / "h200_scan_tuning.json"
SHAPES = LAUNCH_CHOICES
D, N = CHANNELS["small"], STATES
PROCESSORS = 132  # of the GPU whose shapes these are; only tells many sequences from few
CHOICES = {
    "FWD": [dict(W=W, T=T) for W in (1, 2, 4) for T in (4, 8)],
    # maxnreg is what a quarter of a multiprocessor's 65,536 registers leaves for a quarter of its per_sm * W warps.
    "BWD": [
        dict(T=4, CH=1, W=W, per_sm=warps // W, maxnreg=registers)
        for W in (1, 2, 4)
        for warps, registers in ((8, 255), (12, 168), (16, 128))
    ],
    "BWD_TWO": [dict(T=4, CH=2, W=W, per_sm=8 // W, maxnreg=255) for W in (1, 2, 4)],
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
        if table == "FWD":
            tables = {"FWD": choice | {"T_few": choice["T"], "few": 0}}
        elif table == "BWD":
            tables = {"BWD": choice, "BWD_TWO": _scan_triton_table.BWD_TWO | {"least": 1 << 30}}
        else:
            tables = {"BWD_TWO": choice | {"least": 0}}

        def run():
            kept = {name: getattr(_scan_triton, name) for name in tables}
            vars(_scan_triton).update(tables)
            try:
                call()
            finally:
                vars(_scan_triton).update(kept)

        return run

    return {
        (table, name(choice)): with_choice(table, choice, forward if table == "FWD" else backward)
        for table, choices in CHOICES.items()
        for choice in choices
    }


def best(times: dict[str, dict[str, float]], shapes: Iterable[str]) -> str:
    """choice of the least sum over shapes of its time by that shape's best."""
    least = {shape: min(t[shape] for t in times.values()) for shape in shapes}
    return min(
        times, key=lambda choice: sum(t[shape] / least[shape] for shape, t in ((s, times[choice]) for s in least))
    )


def pick(times: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict]:
    """table -> choice, from the times of each; forward, one T for many sequences and one for few; backward, one for two
    channels a lane, from the shapes that have them, and one for the rest, from all."""
    by_name = {table: {name(c): c for c in CHOICES[table]} for table in CHOICES}
    few = _scan_triton_table.FWD["few"]
    shapes = {f"{b}x{l}": b * D // 16 > few * PROCESSORS for b, l in SHAPES}
    many = by_name["FWD"][best(times["FWD"], (s for s in shapes if shapes[s]))]
    rest = {key: t for key, t in times["FWD"].items() if by_name["FWD"][key]["W"] == many["W"]}
    of_few = by_name["FWD"][best(rest, (s for s in shapes if not shapes[s]))]
    least = _scan_triton_table.BWD_TWO["least"]
    enough = (f"{b}x{l}" for b, l in SHAPES if b * D // 32 >= least * PROCESSORS)
    return {
        "FWD": many | {"T_few": of_few["T"], "few": few},
        "BWD": by_name["BWD"][best(times["BWD"], shapes)],
        "BWD_TWO": by_name["BWD_TWO"][best(times["BWD_TWO"], enough)] | {"least": least},
    }


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
    picked = pick(times)
    meta = about(common) | {"command": "python -m bench.tune_scan"}
    args.out.write_text(json.dumps({"meta": meta, "picked": picked, "median_us": times}, indent=1) + "\n")
    for table, rows in times.items():
        for choice, shapes in rows.items():
            print(f"{table} {choice:40}", *(f"{shape} {t:8.1f}" for shape, t in shapes.items()))
    print("picked:", *(f"{table} {name(choice)};" for table, choice in picked.items()))
    if args.write:
        write_table(picked, meta["gpu"])


if __name__ == "__main__":
    main()
