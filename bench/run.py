"""Latency, memory and launches beside other models: one more frame of a video, a layer's core by its tokens, clips.

    python -m bench run                    # tiny models, this CPU: minutes; writes bench/results/cpu_run.json
    python -m bench run frames --model small --marks 1,8,32,128,1000 --out small.json
    python -m bench run --quick            # small frames, few of them, seconds; writes nothing without --out

Part "frames": the time to read frame 1, 8, 32, ... of a video and the bytes carried to the next.  Part "tokens": the
scan and attention alone on one sequence of 1, 49, ... tokens.  Parts "blocks" (one spatial, one temporal), "clips"
(whole models) and "training" (forward and backward): so many clips of 16 frames at once.  Accuracy comes first: a
provider whose relative error by an fp64 reference is above the tolerance gets no time.  All providers take turns of a
few calls, after one that is not counted.  What is not there, or does not fit into memory, is listed with its reason.  A
run that was cut short goes on where it was.  The tables are printed at the end.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

from bench import cases
from bench.machine import describe

HERE = Path(__file__).parent
PARTS = {"frames": (1, 8, 32, 128), "tokens": cases.TOKENS, "blocks": (1,), "clips": (1,), "training": (1,)}
ON_A_GPU = {"frames": (1, 8, 32, 128, 1000), "blocks": (1, 8, 32), "clips": (1, 8, 32), "training": (1, 8, 32)}
QUICK = {"frames": (1, 4), "tokens": (1, 49), "blocks": (1,), "clips": (1,), "training": (1,)}
TURN = 3  # calls of a provider in its turn, after one that is not counted
LEAST = 2  # turns at a mark, however long they take


class Wrong(Exception):
    """What was asked for cannot be done: one sentence."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", nargs="?", choices=PARTS, help="only this one")
    parser.add_argument("--model", choices=cases.WIDTH, default="tiny")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N")
    parser.add_argument("--marks", metavar="N,N,...", help="frames, tokens or clips to time at")
    parser.add_argument("--only", default="", metavar="PATTERN", help="providers whose name has it, * and ? allowed")
    parser.add_argument(
        "--rounds", type=int, default=10, help=f"turns of {TURN} calls of each provider at a mark (default 10)"
    )
    parser.add_argument("--seconds", type=float, default=10, help="after which it sits out at a mark (default 10)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="frames of 112 pixels, 4 layers, two marks, one turn")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default bench/results/DEVICE_run.json")
    parser.add_argument("--commit", metavar="SHA", help="to be written down where there is no git repository")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of going on with the file")


def main(args: argparse.Namespace) -> int:
    try:
        run(args)
    except Wrong as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    import torch

    from bench import clips, providers
    from bench.report import tables

    marks = marks_of(args)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise Wrong(f"--device {args.device}: there is no GPU here")
    if args.device == "cuda":
        args.device = f"cuda:{torch.cuda.current_device()}"
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # its profiler would tell stderr of every start
    torch.set_num_threads(args.threads)
    options = providers.Options(args.device, args.model, *((112, 4) if args.quick else (224, None)))
    out = args.out or (
        None if args.quick else HERE / "results" / f"{'gpu' if 'cuda' in args.device else 'cpu'}_run.json"
    )
    settings = {
        "model": args.model,
        "size": options.size,
        "depth": options.depth,
        "threads": args.threads,
        "dtype": str(options.dtype)[6:],
    }
    result = opened(out, about(args.device, args.commit) | settings, args.fresh)
    makers = {
        "frames": providers.frame_providers, "tokens": providers.token_providers, "blocks": clips.block_providers,
        "clips": clips.clip_providers, "training": clips.training_providers,
    }  # fmt: skip
    for part in marks:
        wanted = [p for p in makers[part](options) if fnmatch.fnmatch(p.name, f"*{args.only}*")]
        if not wanted:
            raise Wrong(f"--only {args.only}: no provider of part {part} has that in its name")
        subjects = checked(part, wanted, options.tolerance, result)
        for row in measured(part, marks[part], subjects, args, result, out):
            print(line(row), flush=True)
    if result["rows"]:
        print(f"\n{tables(out.name if out else 'Not kept', result)}")
    if out:
        print(f"\nwritten to {out}; plots: python -m bench report {out}")


def marks_of(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """part -> where to measure."""
    chosen = dict(QUICK if args.quick else PARTS | (ON_A_GPU if args.device.startswith("cuda") else {}))
    if args.part:
        chosen = {args.part: chosen[args.part]}
    if args.quick:
        args.rounds = 1
    if args.marks:
        if not all(word.isdigit() and int(word) for word in args.marks.split(",")):
            raise Wrong(f"--marks must be numbers of at least 1 with commas between, got {args.marks!r}")
        if not args.part:
            raise Wrong("--marks belongs to one part: run frames --marks ..., or run tokens --marks ...")
        chosen[args.part] = tuple(int(word) for word in args.marks.split(","))
    return chosen


# ---- the file ----------------------------------------------------------------------------------------------------


def about(device: str, commit: str | None = None) -> dict:
    """What must be the same for rows to stand in one file."""
    import torch

    import endomamba

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=HERE, text=True, capture_output=True).stdout.strip()
        except FileNotFoundError:  # no git here
            return ""

    if commit is None:
        changed = git("status", "--porcelain", "--", "endomamba", "csrc", "bench/*.py", ":!bench/results")
        commit = (git("rev-parse", "HEAD") or "unknown") + (" with changes" if changed else "")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "endomamba": endomamba.__version__}
    return {"device": describe(device), "versions": versions, "commit": commit, "about": cases.about()}


def opened(out: Path | None, meta: dict, fresh: bool) -> dict:
    """The result in `out`, to be added to, or an empty one."""
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    if out and out.exists() and not fresh:
        result = json.loads(out.read_text())
        differs = [key for key in meta if result["meta"].get(key) != meta[key]]
        if differs:
            raise Wrong(f"{out} was measured with another {', '.join(differs)}: --fresh overwrites it, or choose --out")
        if command not in result["commands"]:
            result["commands"].append(command)
        return result
    return {"meta": meta, "commands": [command], "missing": [], "rows": []}


def save(out: Path | None, result: dict) -> None:
    """A row a line.  Written beside and moved there, so that a run that is cut short leaves the last whole file."""
    if not out:
        return
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    rest = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(out.name + ".new")
    beside.write_text(f'{rest[:-2]},\n "rows": [\n{rows}\n]}}\n')
    beside.replace(out)


# ---- measuring ---------------------------------------------------------------------------------------------------


def checked(part: str, providers: list, tolerance: float, result: dict) -> dict:
    """name -> (subject, error) of those that are there and right; the others go into result["missing"]."""
    result["missing"] = [m for m in result["missing"] if m["part"] != part]
    subjects = {}
    for provider in providers:
        why = provider.why
        if provider.make:
            subject = provider.make()
            error = subject.error()
            allowed = tolerance * getattr(subject, "slack", 1.0)
            if error <= allowed:  # NaN is not
                subjects[provider.name] = subject, error
                continue
            why = f"relative error {error:.1e}, allowed is {allowed:.0e}: no time is given for a wrong result"
        result["missing"].append({"part": part, "provider": provider.name, "why": why})
        print(f"{part:7} {provider.name:28} not measured: {why}", flush=True)
    return subjects


def measured(
    part: str, marks: tuple[int, ...], subjects: dict, args: argparse.Namespace, result: dict, out: Path | None
) -> list[dict]:
    """The rows of a part.  Every provider at every mark has its turn before any has its next, so that what disturbs the
    machine disturbs all; the file is whole after each turn.
    """
    import torch

    clock = GpuClock(args.device) if args.device.startswith("cuda") else CpuClock()
    known = {(row["mark"], row["provider"]): row for row in result["rows"] if row["part"] == part}
    ready = []
    with torch.inference_mode():
        for mark in marks:
            for name, (subject, error) in subjects.items():
                row = known.get((mark, name))
                if row and finished(row, args):
                    continue
                try:
                    prepared = subject.prepare(mark)
                except MemoryError as why:
                    result["missing"].append({"part": part, "provider": name, "mark": mark, "why": str(why)})
                    print(f"{part:7} {mark:5} {name:28} not measured: {why}", flush=True)
                    continue
                if row is None:
                    row = {"part": part, "mark": mark, "provider": name, "error": error, "times_ms": [], "host_ms": []}
                    row |= {"state_bytes": prepared.nbytes} | clock.costs(prepared)
                ready.append((prepared, row))
                print(f"{part:7} {mark:5} {name:28} ready", file=sys.stderr, flush=True)
        gc.collect()
        gc.disable()  # a full collection walks all of torch and would be counted as the model's
        while ready := [(prepared, row) for prepared, row in ready if not finished(row, args)]:
            for prepared, row in ready:
                turn(clock, prepared, row)
                known[row["mark"], row["provider"]] = row
                others = [row for row in result["rows"] if row["part"] != part]
                result["rows"] = others + [known[key] for key in sorted(known, key=lambda key: key[0])]
                save(out, result)
        gc.enable()
    return [row for row in result["rows"] if row["part"] == part]


def finished(row: dict, args: argparse.Namespace) -> bool:
    turns = len(row["times_ms"]) // TURN
    return turns >= args.rounds or (turns >= LEAST and sum(row["times_ms"]) > 1e3 * args.seconds)


def turn(clock, prepared, row: dict) -> None:
    prepared.rewind()
    clock.time(
        prepared.call
    )  # not counted: it fetches back its caches, which a stream keeps, and tells the host's part
    for _ in range(TURN):
        prepared.rewind()
        took, of_host = clock.time(prepared.call)
        row["times_ms"].append(round(took, 5))
        row["host_ms"].append(round(of_host, 5))
    row |= {"ms": spread(row["times_ms"]), "host": spread(row["host_ms"]), "load": round(os.getloadavg()[0], 1)}


def spread(times: list[float]) -> dict[str, float]:
    import numpy as np

    low, middle, high = np.quantile(times, (0.05, 0.5, 0.95))
    return {"median": float(middle), "p5": float(low), "p95": float(high), "calls": len(times)}


class CpuClock:
    """The host's time is all the time there is."""

    def time(self, call) -> tuple[float, float]:
        """Milliseconds, and those of them until the call returned."""
        start = time.perf_counter()
        call()
        took = 1e3 * (time.perf_counter() - start)
        return took, took

    def costs(self, prepared) -> dict[str, int]:
        """Operators that reach the dispatcher in a call, and the most memory it holds on top of what was there."""
        import torch

        from bench.worker import CountDispatched

        prepared.rewind()
        with CountDispatched() as counted:
            prepared.call()
        prepared.rewind()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            prepared.call()
        held = peak = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return {"launches": sum(counted.names.values()), "peak_bytes": peak}


class GpuClock:
    """L2 overwritten before each call, events around it, the GPU kept busy until the host has launched everything."""

    def __init__(self, device: str):
        import torch

        from bench.worker import FLUSH_BYTES

        torch.cuda.set_device(device)
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
        self.host = 0.0

    def time(self, call) -> tuple[float, float]:
        import torch

        from bench.worker import cold_events

        torch.cuda.synchronize()
        cycles = int(3e6 * self.host) + 20_000
        start = time.perf_counter()
        begin, end = cold_events(call, self.flush, cycles)
        self.host = 1e3 * (time.perf_counter() - start)
        torch.cuda.synchronize()
        return begin.elapsed_time(end), self.host

    def costs(self, prepared) -> dict[str, int]:
        """Kernels of a call, and the most memory it holds on top of what was there."""
        import torch

        prepared.rewind()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            prepared.call()
            torch.cuda.synchronize()
        gpu = torch.autograd.DeviceType.CUDA
        kernels = sum(event.device_type == gpu for event in profile.events())
        return {"launches": kernels, "peak_bytes": torch.cuda.max_memory_allocated() - held}


def line(row: dict) -> str:
    ms, name = row["ms"], f"{row['part']:7} {row['mark']:5} {row['provider']:28}"
    return (
        f"{name} {ms['median']:9.3f} ms [{ms['p5']:.3f}, {ms['p95']:.3f}] "
        f"x{ms['calls']}  {row['state_bytes']:>13,} bytes carried, {row['launches']} launches"
    )
