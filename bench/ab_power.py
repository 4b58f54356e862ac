"""How often the gate is wrong on this machine: unchanged code against itself, and against a kernel made slower.

    python -m bench.ab_power [--runs 50] [--planted 25] [--only PATTERNS]
    python -m bench.ab_power --device cuda --runs 50 --planted 10 --planted-runs 20 --share 10 \\
        --only 'selective_scan small-l3152'

Every run is the gate of `python -m bench ab` with processes of its own, or of --share runs; what looks slower is
measured again in other ones, as there.  The worktrees are built once.  Writes bench/results/{cpu,cuda}_ab_power.json
after each run, alarms and misses of a noisy minute included.  What that file has of a run cut short is kept and counted
with --resume: a GPU lent for ten minutes has no time for 50 and 20 runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
import statistics
import sys
import time
from pathlib import Path

from bench import machine
from bench.ab import CASES
from bench.gate import Gate
from bench.pair import Options, Pair, opened
from bench.process import WorkerFailed
from bench.worktrees import Side, checkouts, commit_with, common_dir, git, toplevel

HERE = Path(__file__).parent
KERNEL = "csrc/cpu/scan_fwd.cpp"
WHOLE = "[&](int64_t task) { forward_task(a, task / blocks, task % blocks * kForwardBlock); });"
AGAIN = """[&](int64_t task) {{
                 forward_task(a, task / blocks, task % blocks * kForwardBlock);
                 if (task * {percent} / 100 != (task + 1) * {percent} / 100)
                   forward_task(a, task / blocks, task % blocks * kForwardBlock);
               }});"""


GPU_KERNEL = "endomamba/ops/_scan_triton_fwd.py"
GPU_LINE = "    lane = tl.arange(0, 32 * W)\n"
SPIN = """    if Y:
        tl.inline_asm_elementwise(
            "{{ .reg .u32 s, n; .reg .pred p; mov.u32 s, %clock; AGAIN: mov.u32 n, %clock; sub.u32 n, n, s; "
            "setp.lt.u32 p, n, {cycles}; @p bra AGAIN; mov.b32 $0, n; }}",
            "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1,
        )
"""


def planted(repo: Path, base: str, percent: int) -> str:
    """A commit whose forward scan does `percent` more work on a CPU: it walks so many channel blocks twice."""
    text = git(repo, "show", f"{base}:{KERNEL}") + "\n"
    if text.count(WHOLE) != 1:
        raise SystemExit(f"ab_power: {KERNEL} no longer has the line to plant at: {WHOLE}")
    return commit_with(repo, base, {KERNEL: text.replace(WHOLE, AGAIN.format(percent=percent))})


def planted_on_gpu(repo: Path, base: str, percent: int, run: dict, device: str) -> str:
    """A commit whose forward kernel holds every program `percent` of the first measured case longer, at full clock."""
    if "error" in run:
        raise SystemExit(f"ab_power: {run['error']}")
    (clock,) = machine.gpu_query(("clocks.max.sm",), device).values()
    cycles = int(run["cases"][0]["base_us"] * percent / 100 * float(clock.split()[0]))
    text = git(repo, "show", f"{base}:{GPU_KERNEL}") + "\n"
    if text.count(GPU_LINE) != 1:
        raise SystemExit(f"ab_power: {GPU_KERNEL} no longer has the line to plant behind: {GPU_LINE.strip()}")
    return commit_with(repo, base, {GPU_KERNEL: text.replace(GPU_LINE, GPU_LINE + SPIN.format(cycles=cycles))})


class Processes:
    """Those of one pair of sides: new ones for every so many runs, and after a failure."""

    def __init__(self, sides: tuple[Side, Side], options: Options, runs: int):
        self.sides, self.options, self.runs = sides, options, runs
        self.stack, self.used, self.pair = contextlib.ExitStack(), 0, None

    def next(self) -> Pair:
        if self.pair is None or self.used == self.runs or not self.pair.alive:
            self.close()
            self.pair, self.used = self.stack.enter_context(opened(self.sides, self.options)), 0
        self.used += 1
        return self.pair

    def close(self) -> None:
        self.stack.close()
        self.pair = None


def one_run(processes: Processes, again: Processes, only: str, repo: Path) -> dict:
    start, load = time.perf_counter(), os.getloadavg()[0]
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            cache = common_dir(repo) / "bench-ab"
            gate = Gate(
                processes.sides, processes.options, repo, cache, ("time",), only, pair=processes.next(),
                fresh=lambda *_: contextlib.nullcontext(again.next()),
            )  # fmt: skip
            gate.run()
        except (machine.Refused, WorkerFailed) as error:
            return {"error": str(error)}
    keys = ("case", "ratio", "interval", "verdict", "rounds", "base_us", "again")
    return {
        "alarms": [finding.op for finding in gate.report.findings],
        "seconds": round(time.perf_counter() - start, 1), "load": round(load, 2),
        "cases": [{key: row[key] for key in keys if key in row} for row in gate.report.rows],
    }  # fmt: skip


def summary(runs: list[dict], op: str) -> dict:
    valid = [run for run in runs if "alarms" in run]
    ratios = [case["ratio"] for run in valid for case in run["cases"] if case["case"].startswith(f"{op} ")]
    return {
        "runs": len(runs), "refused": len(runs) - len(valid), "alarmed": sum(bool(run["alarms"]) for run in valid),
        f"caught_{op}": sum(op in run["alarms"] for run in valid),
        "ratio_median": round(statistics.median(ratios), 3) if ratios else None,
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)] if ratios else None,
        "seconds_median": statistics.median(run["seconds"] for run in valid) if valid else None,
        "load_range": [min(run["load"] for run in valid), max(run["load"] for run in valid)] if valid else None,
        "first_alarms_not_confirmed": sum(
            case["verdict"] == "not confirmed" for run in valid for case in run["cases"]
        ),
    }  # fmt: skip


def resumed(path: Path, meta: dict, experiments: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The runs that `path` has of these experiments; SystemExit where they are of another commit, machine or setting.

    Another GPU of the same kind may go on: meta["before"] keeps what was said of the earlier ones.
    """
    earlier = json.loads(path.read_text())
    kept = earlier["meta"].pop("before", [])
    own = ("command", "date", "uuid")
    other = [key for key in meta if key not in own and earlier["meta"].get(key) != meta[key]]
    if other or set(earlier["runs"]) != set(experiments):
        what = "the experiments" if not other else ", ".join(other)
        raise SystemExit(f"ab_power: {path.name} cannot be resumed: {what} would not be the same")
    meta["before"] = [*kept, {key: earlier["meta"][key] for key in own if key in earlier["meta"]}]
    return {name: earlier["runs"][name] for name in experiments}


def write(path: Path, meta: dict, found: dict, experiments: dict[str, list[dict]]) -> None:
    """One run a line."""
    head = json.dumps({"meta": meta, "summary": found}, indent=1).removesuffix("\n}")
    lines = [
        f"  {json.dumps(name)}: [\n   " + ",\n   ".join(map(json.dumps, runs)) + "\n  ]"
        for name, runs in experiments.items()
    ]
    path.write_text(f'{head},\n "runs": {{\n' + ",\n".join(lines) + "\n }\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--planted", type=int, default=25, metavar="PERCENT")
    parser.add_argument("--planted-runs", type=int, metavar="RUNS", help="of the slower commit; default: --runs")
    parser.add_argument("--share", type=int, default=1, metavar="RUNS", help="so many in the same processes")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="selective_scan small-l197", metavar="PATTERNS", help="cases, as for ab")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="go on with the runs that the file already has")
    args = parser.parse_args()
    kind = args.device.partition(":")[0]
    out = args.out or HERE / "results" / f"{kind}_ab_power.json"
    repo, options = toplevel(Path.cwd()), Options(CASES, device=args.device)
    base = git(repo, "rev-parse", "HEAD")
    experiments = {"A against A": [], f"A against A with {args.planted} % more in the forward scan": []}
    meta = {
        "command": shlex.join(["python", "-m", "bench.ab_power", *sys.argv[1:]]), "commit": base,
        "date": time.strftime("%Y-%m-%d"), "threshold": options.limit, "alpha": options.alpha,
        "rounds": options.rounds, **machine.describe(args.device),
    }  # fmt: skip
    if args.resume and out.exists():
        experiments = resumed(out, meta, experiments)
    with contextlib.ExitStack() as stack:
        same = stack.enter_context(checkouts(repo, base, base, None, None))
        if kind == "cpu":
            slow = planted(repo, base, args.planted)
        else:
            first = Processes(same, options, 1)
            slow = planted_on_gpu(repo, base, args.planted, one_run(first, first, args.only, repo), args.device)
            first.close()
        other = stack.enter_context(checkouts(repo, base, slow, None, None))
        both = [[Processes(sides, options, args.share) for _ in range(2)] for sides in (same, other)]
        for processes in (*both[0], *both[1]):
            stack.callback(processes.close)
        planted_runs = args.runs if args.planted_runs is None else args.planted_runs
        for number in range(max(args.runs, planted_runs)):
            for (name, runs), processes, wanted in zip(experiments.items(), both, (args.runs, planted_runs)):
                if number >= wanted or number < len(runs):
                    continue
                runs.append(one_run(*processes, args.only, repo))
                print(f"{number + 1:3} {name}: {runs[-1]}", flush=True)
            found = {name: summary(runs, "selective_scan") for name, runs in experiments.items()}
            write(out, meta, found, experiments)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
