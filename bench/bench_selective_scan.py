"""The CPU scan in state updates per second and core, beside the PyTorch reference and a scalar token-outer loop.

    python -m bench.bench_selective_scan [--threads 2] [--rounds 60] [--save]

One update is one token of one channel and one state.  Providers run interleaved on the same inputs; accuracy against
the fp64 reference is checked before time.  --save writes bench/results/cpu_selective_scan.json.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch

import endomamba
from bench.cases import ON_A_CPU
from endomamba.ops import selective_scan
from endomamba.ops._extension import C as _C

HERE = Path(__file__).parent
RESULT = HERE / "results" / "cpu_selective_scan.json"


def scalar_loop():
    """bench/scalar_scan.cpp at -O3 for this machine's ISA, the kindest a compiler can be to that shape."""
    library = Path(tempfile.mkdtemp()) / "scalar_scan.so"
    source = str(HERE / "scalar_scan.cpp")
    subprocess.run(["g++", "-O3", "-march=native", "-shared", "-fPIC", source, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).scalar_scan


def make_inputs(b, l, d, n):
    g = torch.Generator().manual_seed(0)
    x, dt = torch.randn(b, l, d, generator=g), torch.randn(b, l, d, generator=g) - 2
    A = -torch.arange(1.0, n + 1).repeat(d, 1) * (0.5 + torch.rand(d, n, generator=g))
    B, C = torch.randn(b, l, n, generator=g), torch.randn(b, l, n, generator=g)
    return x, dt, A, B, C


def check(got, truth, what):
    error = ((got.double() - truth).norm() / truth.norm()).item()
    assert error < 1e-5, f"{what}: relative error {error:.1e}, no time is reported for a wrong result"
    return error


def measure(providers, rounds):
    """Seconds a call.  A round gives each provider in turn a burst of calls, about 10 ms, after one that is not counted
    (it wakes the threads and warms the caches, as a stream does); at most 20 s in all for a slow one."""
    times = {name: [] for name in providers}
    bursts = {}
    for name, run in providers.items():
        run()
        start = time.perf_counter()
        run()
        bursts[name] = max(1, int(0.01 / (time.perf_counter() - start)))
    gc.collect()
    gc.disable()  # a full collection walks all of torch and would be counted as the op's time, as in timeit
    for _ in range(rounds):
        for name, run in providers.items():
            if sum(times[name]) * bursts[name] > 20:
                continue
            run()
            start = time.perf_counter()
            for _ in range(bursts[name]):
                run()
            times[name].append((time.perf_counter() - start) / bursts[name])
    gc.enable()
    return {
        name: {
            "min": min(t),
            "median": statistics.median(t),
            "p95": sorted(t)[int(0.95 * (len(t) - 1))],
            "rounds": len(t),
            "calls_a_round": bursts[name],
        }
        for name, t in times.items()
    }


def bench_shape(shape, rounds, loop):
    b, l, d, n = shape
    x, dt, A, B, C = make_inputs(*shape)
    leaves = [t.clone().requires_grad_() for t in (x, dt, A, B, C)]
    dy = torch.randn(b, l, d)
    h, y = torch.zeros(b, d, n), torch.empty(b, l, d)

    def pointer(t):
        return ctypes.c_void_p(t.data_ptr())

    def scalar():
        h.zero_()
        for i in range(b):
            loop(
                *(ctypes.c_int64(v) for v in (l, d, n)), *(pointer(t[i]) for t in (x, dt)), pointer(A),
                *(pointer(t[i]) for t in (B, C)), pointer(h[i]), pointer(y[i]),
            )  # fmt: skip

    def forward():
        with torch.inference_mode():
            return selective_scan(x, dt, A, B, C, backend="cpu")[0]

    def forward_backward():
        out = selective_scan(*leaves, backend="cpu")[0]
        return torch.autograd.grad(out, leaves, dy)

    def reference():
        with torch.inference_mode():
            return selective_scan(x, dt, A, B, C, backend="reference")[0]

    truth = selective_scan(*(t.double() for t in (x, dt, A, B, C)))[0]
    scalar()
    errors = {"cpu": check(forward(), truth, "cpu"), "scalar loop": check(y, truth, "scalar loop")}
    providers = {"cpu forward": forward, "cpu forward+backward": forward_backward}
    if b * l <= 400:  # the reference takes seconds where it adds nothing
        providers["PyTorch reference forward"] = reference
    providers["scalar loop forward, 1 thread"] = scalar
    return measure(providers, rounds), errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loop = scalar_loop()
    rows = []
    for name, shape in ON_A_CPU.items():
        b, l, d, n = shape
        times, errors = bench_shape(shape, args.rounds, loop)
        for provider, t in times.items():
            threads = 1 if provider.endswith("1 thread") else args.threads
            rate = b * l * d * n / t["median"] / threads / 1e9
            best = b * l * d * n / t["min"] / threads / 1e9
            rows.append(
                {"case": name, "shape": shape, "provider": provider, "threads": threads, **t,
                 "giga_updates_per_s_per_core": rate, "giga_updates_per_s_per_core_best": best}
            )  # fmt: skip
            print(
                f"{name:28} {provider:32} {t['median'] * 1e6:10.0f} us   {rate:6.2f} (best {best:.2f}) G updates/s/core"
            )
        print(f"{'':28} relative error: " + ", ".join(f"{k} {v:.0e}" for k, v in errors.items()))
    if args.save:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()
        cpu = next(
            (s.split(":")[1].strip() for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s), ""
        )
        meta = {
            "command": f"python -m bench.bench_selective_scan --threads {args.threads} --rounds {args.rounds} --save",
            "commit": commit, "endomamba": endomamba.__version__, "torch": torch.__version__, "cpu": cpu,
            "level": _C.level(), "system": platform.system(),
        }  # fmt: skip
        RESULT.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
        print(f"written to bench/results/{RESULT.name}")


if __name__ == "__main__":
    main()
