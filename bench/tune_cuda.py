"""Measures where the CUDA C++ kernels are faster than the Triton ones; with --write, rewrites their table.

    python -m bench.tune_cuda [scans] [frames] [--write]

Every call is captured in a CUDA graph, so that the host's time is in none; the two back ends run interleaved.  A result
that differs from Triton's by more than its dtype explains stops it.
scans: sequences x tokens of 768 channels in bf16, L2 cold.  One frame is also timed 20 times back to back in one graph,
as in a stream, with a warm L2.
frames: `frame_blocks`, 12 blocks of a kind, streams x tokens, tiny, small and middle; a graph of 4 frames, L2 warm.
Times go to bench/results/h200_cuda_{scan,frame}.json, their ratios to endomamba/ops/_cuda_table.py.
"""

import argparse
import json
import pprint
import runpy
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from bench.bench_gpu import Bench, about, make, op, prepared, relative, scan_name
from endomamba.ops import _cuda, _cuda_table, _extension_cuda, frame_blocks, pack_block
from endomamba.ops.frame_blocks.cuda import frame_name

HERE = Path(__file__).parent / "results"
RESULTS = {"scans": HERE / "h200_cuda_scan.json", "frames": HERE / "h200_cuda_frame.json"}
D, STATES = _cuda_table.SCAN_CHANNELS, 16
SEQUENCES, TOKENS, MOST = (1, 4, 16, 64, 256, 768), (49, 197, 784, 3152), 160_000  # tokens of all sequences
PHASES = ("forward", "saving", "backward")
BACKENDS = ("triton", "cuda")
TOLERANCE = 0.02
CHANNELS, BLOCKS, REPEAT = (192, 384, 576), 12, 4
STREAMS = {50: (1, 5, 20), 197: (1, 2, 5, 16)}  # by tokens: of frames of 112 and 224 pixels


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


def frame_case(c: int, sides: int, dtype: torch.dtype) -> list:
    """BLOCKS blocks; steps of 0.01 to 0.1, so that a state outlives many tokens."""
    random = torch.Generator("cuda").manual_seed(0)
    d, r = 2 * c, c // 16

    def normal(*shape, by=1):
        return torch.randn(*shape, generator=random, device="cuda") / by**0.5

    def direction():
        dt_bias = torch.log(torch.expm1(torch.rand(d, generator=random, device="cuda") * 0.09 + 0.01))
        A = -torch.arange(1.0, STATES + 1, device="cuda").repeat(d, 1)
        products = normal(r + 2 * STATES, d, by=d).to(dtype), normal(d, r, by=r).to(dtype)
        return normal(d, 4, by=4), normal(d), *products, dt_bias, A, normal(d)

    return [
        pack_block(
            torch.ones(c, device="cuda"),
            normal(2 * d, c, by=c).to(dtype),
            [direction() for _ in range(sides)],
            normal(c, d, by=d).to(dtype),
        )
        for _ in range(BLOCKS)
    ]


def frame_call(blocks: list, b: int, l: int, backend: str) -> tuple[Callable, list]:
    """The call, and the tensors that it changes."""
    random = torch.Generator("cuda").manual_seed(1)
    c, d, causal = blocks[0].in_proj.shape[1], blocks[0].A.shape[1], blocks[0].A.shape[0] == 1
    residual = torch.randn(b, l, c, generator=random, device="cuda")
    states = [torch.randn(BLOCKS, b, *size, generator=random, device="cuda") for size in ((3, d), (d, STATES))]
    states = states if causal else [None, None]
    changed = [t for t in (residual, *states) if t is not None]
    return partial(frame_blocks, residual, blocks, *states, backend=backend), changed


@torch.no_grad()
def measure_frames(bench: Bench, found: dict, save: Callable[[dict], None]) -> None:
    """Adds case -> tokens -> streams -> back end -> microseconds for what `found` has not; `save` after each case."""
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float32, 1e-4)):
        for c, sides in ((c, sides) for c in CHANNELS for sides in (2, 1)):
            case = frame_name(c, sides, dtype)
            left = [(l, b) for l, many in STREAMS.items() for b in many if b not in found.get(case, {}).get(l, {})]
            blocks = frame_case(c, sides, dtype) if left else []
            for l, b in left:
                calls = {backend: frame_call(blocks, b, l, backend) for backend in BACKENDS}
                for call, _ in calls.values():
                    call()
                far = max(relative(*pair) for pair in zip(*(changed for _, changed in calls.values()), strict=True))
                if not far < tolerance:
                    raise SystemExit(f"tune_cuda: frame_blocks {case} differs by {far:.1e} from Triton")
                took = bench.time({backend: call for backend, (call, _) in calls.items()}, repeat=REPEAT)
                row = {backend: round(t["median_us"], 1) for backend, t in took.items()}
                found.setdefault(case, {}).setdefault(l, {})[b] = row
                print(f"{case:20} {b:4} x {l:4}", *(f"{k} {v:9.1f}" for k, v in row.items()), flush=True)
            if left:
                save(found)


def before(file: Path, meta: dict) -> tuple[dict, list[dict]]:
    """The times of a file to go on with, and of which runs they are; refused where these would not be comparable."""
    old = json.loads(file.read_text())
    differs = [k for k in ("gpu", "driver", "torch", "triton", "rounds") if old["meta"].get(k) != meta.get(k)]
    if differs:
        sys.exit(f"tune_cuda: {file} was measured with another {', '.join(differs)}: leave --go-on out")
    cases = {case: sum(map(len, rows.values())) for case, rows in old["median_us"].items()}
    earlier = old.get("earlier", [])
    for run in earlier:
        cases = {case: count - run["cases"].get(case, 0) for case, count in cases.items()}
    own = {k: old["meta"][k] for k in ("command", "commit", "date")}
    return numbered(old["median_us"]), [*earlier, own | {"cases": {k: n for k, n in cases.items() if n}}]


def numbered(times: dict) -> dict:
    """Times out of a file, tokens and sequences numbers again."""
    return {
        case: {int(l): {int(b): us for b, us in row.items()} for l, row in lengths.items()}
        for case, lengths in times.items()
    }


def measured_by(meta: dict, more: dict) -> dict[str, str]:
    commits = dict.fromkeys(run["commit"] for run in (*more.get("earlier", []), meta))
    return {"gpu": meta["gpu"], "driver": meta["driver"], "commit": ", ".join(commits)}


def ratios(times: dict) -> dict[str, dict[int, dict[int, float]]]:
    return {
        case: {l: {b: round(us["triton"] / us["cuda"], 2) for b, us in row.items()} for l, row in rows.items()}
        for case, rows in times.items()
    }


def write_table(part: str, found: dict, measured: dict) -> None:
    """Rewrites one part of the table, the other stays."""
    path = Path(_cuda_table.__file__)
    text, old = path.read_text(), runpy.run_path(str(path))
    for name, new in (("MEASURED", measured), ("RATIO", found)):
        table = pprint.pformat(old[name] | {part: new}, width=100, sort_dicts=False).replace("'", '"')
        begin = text.index(f"{name} = ")
        end = text.index("  # fmt: skip", begin)
        text = text[:begin] + f"{name} = {table}" + text[end:]
    path.write_text(text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="scans, frames; default: both")
    parser.add_argument("--write", action="store_true", help="rewrite their part of the table")
    parser.add_argument("--go-on", action="store_true", help="what OUT's file of frames has need not come again")
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the times")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commit", default="", help="of the tree that runs; else what git says")
    args = parser.parse_args()
    if unknown := [part for part in args.parts if part not in RESULTS]:
        parser.error(f"there is no part {unknown[0]!r}; there are {', '.join(RESULTS)}")
    if args.go_on and args.parts != ["frames"]:
        parser.error("--go-on is for frames alone: tune_cuda frames --go-on")
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
    chip = list(_cuda.chip(torch.device("cuda", torch.cuda.current_device())))
    command = shlex.join(["python", "-m", "bench.tune_cuda", *sys.argv[1:]])
    for part in args.parts or RESULTS:
        meta, more, file = about(common) | {"command": command}, {}, args.out / RESULTS[part].name
        times: dict = {}
        if args.go_on and file.exists():
            times, more["earlier"] = before(file, meta)

        def save(times: dict, file=file, meta=meta, more=more) -> None:
            file.write_text(json.dumps({"meta": meta, **more, "median_us": times}, indent=1) + "\n")

        if part == "frames":
            measure_frames(bench, times, save)
        else:
            more["back_to_back_us"] = back_to_back(bench)
            for case, row in more["back_to_back_us"].items():
                print(case, *(f"{k} {v:7.2f}" for k, v in row.items()), flush=True)
            for both in (True, False):
                times |= measure(bench, both)
                save(times)
        if args.write:
            write_table(part, ratios(times), measured_by(meta, more) | {"chip": chip})


if __name__ == "__main__":
    main()
