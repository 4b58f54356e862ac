"""add_rms_norm on one GPU: time of the kernels, percent of a copy's bandwidth; --sweep tries other launches.

    python -m bench.bench_add_rms_norm [--sweep] [--rows 100864]

Median of interleaved rounds, L2 overwritten before each call.  Bytes are those that must move: forward x, residual,
normed, new residual; backward dnormed, r, its gradient, dx, dresidual.
"""

import argparse
import itertools
import statistics

import torch

from endomamba.ops.add_rms_norm import triton_bwd, triton_fwd


def timed(functions: dict, rounds: int) -> dict[str, float]:
    """Median microseconds of each, interleaved."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    for function in functions.values():
        function()
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)  # the host launches meanwhile
            start.record()
            function()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def calls(rows: int, c: int, dtype: torch.dtype, row_scale: bool = True) -> dict:
    b, m = (rows // 197, 197) if rows % 197 == 0 else (1, rows)
    x, dnormed = (torch.randn(b, m, c, device="cuda", dtype=dtype) for _ in range(2))
    residual, dnew = (torch.randn(b, m, c, device="cuda") for _ in range(2))
    weight, scale = torch.rand(c, device="cuda"), torch.ones(b, device="cuda") if row_scale else None
    _, r, stats = triton_fwd.add_norm_fwd(x, weight, None, residual, scale, 1e-5, False)
    backward = (dnormed, dnew, None, r, stats, weight, None, scale, dtype, True, False)
    return {
        "forward": (
            lambda: triton_fwd.add_norm_fwd(x, weight, None, residual, scale, 1e-5, False),
            rows * c * (8 + 2 * x.element_size()),
        ),
        "backward": (lambda: triton_bwd.add_norm_bwd(*backward), rows * c * (12 + 2 * x.element_size())),
        "copy": (lambda: r.clone(), rows * c * 8),
    }


def report(name: str, case: dict, rounds: int) -> None:
    times = timed({key: function for key, (function, _) in case.items()}, rounds)
    speed = {key: case[key][1] / times[key] / 1e6 for key in case}  # TB/s
    for key in ("forward", "backward"):
        share = 100 * speed[key] / speed["copy"]
        print(f"{name:28s} {key:8s} {times[key]:8.1f} us  {speed[key]:5.2f} TB/s  {share:4.0f} % of a copy", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rows", type=int, default=100_864)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    for c in (192, 384, 576):
        report(f"{args.rows} x {c} bf16", calls(args.rows, c, torch.bfloat16), args.rounds)
    for rows in (197, 3152, 12_608):
        report(f"{rows} x 384 bf16", calls(rows, 384, torch.bfloat16), args.rounds)
    if not args.sweep:
        return
    for c, width in ((192, 256), (384, 512), (576, 1024)):
        case = calls(args.rows, c, torch.bfloat16)
        for rows, warps in itertools.product((1, 2, 4), (1, 2, 4)):
            triton_fwd.LAUNCH[width] = (rows, warps)
            name, (function, moved) = f"{c} forward {rows} rows {warps} warps", case["forward"]
            time = timed({name: function}, args.rounds)[name]
            print(f"{name:44s} {time:8.1f} us  {moved / time / 1e6:5.2f} TB/s", flush=True)
        for rows, warps, programs in itertools.product((1, 2), (1, 2), (1024, 2048, 4096, 8192)):
            triton_bwd.LAUNCH[width] = (rows, warps, programs)
            name, (function, moved) = f"{c} backward {rows} rows {warps} warps {programs} programs", case["backward"]
            time = timed({name: function}, args.rounds)[name]
            print(f"{name:44s} {time:8.1f} us  {moved / time / 1e6:5.2f} TB/s", flush=True)


if __name__ == "__main__":
    main()
