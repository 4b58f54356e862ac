"""One streamed frame on a CPU against its own matrix products timed alone in the same run.

    python -m bench.bench_cpu_frame --threads 2 --save         # tiny and small, fp32 and bf16: two minutes
    python -m bench.bench_cpu_frame --model tiny --dtype fp32 --where

The products are recorded from a frame of the PyTorch reference, as the C++ mixer does the two small ones of a layer
itself: every call of `F.linear`, its shapes, strides and dtypes, and the weights; their FLOPs must be those that the
architecture has.  Alone they run one after the other on inputs that lie in
cache, as in a frame, into fresh outputs.  A round times the products, the frame, the frame, the products; the ratio is
that of the medians over all rounds, its interval (95 %) by bootstrap over rounds.  The frame's accuracy by the fp64
reference comes first.  --where: what a frame's time goes to, by torch's profiler.
--save writes bench/results/cpu_frame_gemms.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import cases
from bench.run import about
from bench.stats import ratio_of_medians
from bench.worker import relative_error
from endomamba.models import create_model
from endomamba.ops._backend import TABLES

RESULT = Path(__file__).parent / "results" / "cpu_frame_gemms.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BARS = {("fp32", "tiny"): 1.6, ("fp32", "small"): 1.4, ("bf16", "tiny"): 2.3, ("bf16", "small"): 1.7}
# At this depth bf16 gives 0.02 relative error to whoever computes it: weights and activations are rounded, not sums.
TOLERANCE = {"fp32": cases.TOLERANCE["fp32"], "bf16": 5e-2}

Product = Callable[[], Tensor]


def create(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(f"endomamba_{name}", num_classes=7, dt_init="mamba", **options).eval()


def checked(model: nn.Module, name: str, dtype: str, options: dict[str, Any]) -> float:
    """Relative error of the second frame by the fp64 reference; AssertionError above the tolerance."""
    exact = create(name, **options, backend="reference").double()
    exact.load_state_dict(model.state_dict())
    frames = torch.randn(1, 3, 2, *model.config.img_size)
    answers = []
    with torch.inference_mode():
        for each in (model, exact):
            state = each.init_state(1)
            for t in range(2):
                answer = each.step_(frames[:, :, t : t + 1].to(each.pos_embed.dtype), state)
            answers.append(answer)
    error = relative_error(answers[0], [answers[1]])
    assert error < TOLERANCE[dtype], f"{name} {dtype}: relative error {error:.1e}, a wrong result gets no time"
    return error


def products_of(model: nn.Module, x: Tensor) -> tuple[list[Product], int]:
    """-> the calls of F.linear in a frame of this reference, to be called again, and their FLOPs."""
    calls: list[tuple[Tensor, Tensor, Tensor | None]] = []
    linear = F.linear

    def note(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append((x, weight, bias))
        return linear(x, weight, bias)

    with torch.inference_mode(), mock.patch.object(F, "linear", note):
        model.step_(x, model.init_state(1))
    inputs: dict[Any, Tensor] = {}  # one of each kind: what a layer reads was written just before
    products, flops = [], 0
    for x, weight, bias in calls:
        key = (tuple(x.shape), x.stride(), x.dtype)
        if key not in inputs:
            inputs[key] = torch.empty_strided(*key[:2], dtype=x.dtype).normal_()
        products.append(lambda x=inputs[key], weight=weight, bias=bias: linear(x, weight, bias))
        flops += 2 * x.numel() * weight.shape[0]
    return products, flops


def expected_flops(model: nn.Module) -> int:
    """Of every Linear in the model, and of the patch embedding, for one frame; the head reads one vector."""
    rows, columns = model.config.grid
    patches, total = rows * columns, 2 * model.head.weight.numel()
    total += 2 * patches * model.patch_embed.proj.weight.numel()
    tokens = patches + model.config.with_cls_token
    for block in model.layers:
        sizes = [m.weight.numel() for m in block.modules() if isinstance(m, nn.Linear)]
        total += 2 * tokens * sum(sizes)
    return total


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, dtype: str, rounds: int, options: dict[str, Any]) -> dict[str, Any]:
    model = create(name, **options).to(DTYPES[dtype])
    error = checked(model, name, dtype, options)
    state = model.init_state(1)
    x = torch.randn(1, 3, 1, *model.config.img_size).to(DTYPES[dtype])

    def frame() -> None:
        with torch.inference_mode():
            model.step_(x, state)

    reference = create(name, **options, backend="reference").to(DTYPES[dtype])
    reference.load_state_dict(model.state_dict())
    products, flops = products_of(reference, x)
    assert flops == expected_flops(model), (
        f"{name}: {flops} FLOPs recorded, the architecture has {expected_flops(model)}"
    )

    def gemms() -> None:
        with torch.inference_mode():
            for product in products:
                product()

    for _ in range(3):
        gemms(), frame()
    alone, whole = [], []
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        first, *middle, last = timed(gemms), timed(frame), timed(frame), timed(gemms)
        alone.append((first + last) / 2)
        whole.append(sum(middle) / 2)
    gc.enable()
    ratio = ratio_of_medians(alone, whole, 0.05)
    gemm_ms = torch.tensor(alone).median().item()
    return {
        "model": name,
        "dtype": dtype,
        "products": len(products),
        "gflop": round(flops / 1e9, 3),
        "gemms_ms": round(gemm_ms, 3),
        "gemms_gflop_per_s": round(flops / gemm_ms / 1e6, 1),
        "frame_ms": round(torch.tensor(whole).median().item(), 3),
        "ratio": round(ratio.middle, 3),
        "interval": [round(ratio.low, 3), round(ratio.high, 3)],
        "bar": BARS.get((dtype, name)) if not options else None,
        "error": float(f"{error:.1e}"),
        "rounds": rounds,
    }


# ---- where the time goes


@contextmanager
def kernels_named():
    """The C++ kernels under their op's name in a profile."""
    before = {op: table["cpu"] for op, table in TABLES.items()}
    for op in ("mixer_inner", "frame_step", "add_rms_norm"):

        def named(*args, op=op):
            with torch.profiler.record_function(f"kernel {op}"):
                return before[op].fwd(*args)

        TABLES[op]["cpu"] = replace(before[op], fwd=named)
    try:
        yield
    finally:
        for op, backend in before.items():
            TABLES[op]["cpu"] = backend


def where(name: str, dtype: str, frames: int = 20) -> None:
    """Prints self time by operator, a frame's share of it, and calls; the profiler itself adds a few us a call."""
    model = create(name).to(DTYPES[dtype])
    state, x = model.init_state(1), torch.randn(1, 3, 1, *model.config.img_size).to(DTYPES[dtype])
    with torch.inference_mode(), kernels_named():
        for _ in range(3):
            model.step_(x, state)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(frames):
                model.step_(x, state)
    rows = sorted(profile.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    print(f"{name} {dtype}: {total / frames / 1e3:.2f} ms a frame under the profiler")
    for row in rows[:18]:
        ms, calls = row.self_cpu_time_total / frames / 1e3, row.count / frames
        print(f"  {100 * row.self_cpu_time_total / total:5.1f} %  {ms:8.3f} ms  {calls:7.0f} calls  {row.key}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "small", "middle"), action="append", help="default tiny and small")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--quick", action="store_true", help="frames of 32 pixels, 4 layers: does it run?")
    parser.add_argument("--where", action="store_true", help="a profile instead of the ratio")
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if args.quick and (args.save or args.where):
        parser.error("--quick measures nothing worth keeping: leave --save and --where out")
    torch.set_num_threads(args.threads)
    options = {"depth": 4, "img_size": 32} if args.quick else {}
    rows, missed = [], []
    with nullcontext() if args.where else _header():
        for dtype in args.dtype or DTYPES:
            for name in args.model or ("tiny", "small"):
                if args.where:
                    where(name, dtype)
                    continue
                row = measure(name, dtype, 3 if args.quick else args.rounds, options)
                rows.append(row)
                print(_line(row), flush=True)
                missed += [row] if row["bar"] and row["ratio"] > row["bar"] else []
    if args.save:
        meta = about("cpu") | {"threads": args.threads, "load_average": round(os.getloadavg()[0], 1)}
        command = f"python -m bench.bench_cpu_frame {' '.join(sys.argv[1:])}"
        RESULT.write_text(json.dumps({"meta": meta, "command": command, "rows": rows}, indent=1) + "\n")
        print(f"written: {RESULT}")
    return 1 if missed else 0


@contextmanager
def _header():
    print(f"{'model':<7}{'dtype':<6}{'products':>10}{'frame':>10}   ratio [95 % interval]      bar")
    yield


def _line(row: dict[str, Any]) -> str:
    interval = "{:.3f}, {:.3f}".format(*row["interval"])
    verdict = "" if row["bar"] is None else f"   {row['bar']} {'held' if row['ratio'] <= row['bar'] else 'MISSED'}"
    return (
        f"{row['model']:<7}{row['dtype']:<6}{row['gemms_ms']:>7.2f} ms{row['frame_ms']:>7.2f} ms"
        f"   {row['ratio']:.3f} [{interval}]{verdict}"
    )


if __name__ == "__main__":
    sys.exit(main())
