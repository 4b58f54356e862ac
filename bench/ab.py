"""Did HEAD get slower than BASE?  Exit code 0: no.  1: yes, or wrong; each case is named.  2: that cannot be said; why.

BASE and HEAD are git revisions of the repository around the current directory, HEAD also "." for the working tree as it
is; each is checked out, built and run by itself.  Or both are JSON files of pytest-benchmark, which allow less: they
were not measured side by side.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

from bench import files
from bench.gate import GATES, Gate, Report
from bench.machine import Refused
from bench.pair import Options
from bench.process import WorkerFailed
from bench.worktrees import UsageError, checkouts, common_dir, toplevel

CASES = Path(__file__).resolve().with_name("cases.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    usual = Options(CASES)
    parser.add_argument("base", metavar="BASE", help="a git revision, or a JSON file of pytest-benchmark")
    parser.add_argument("head", metavar="HEAD", help="the same, or . for the working tree as it is")
    parser.add_argument("--cases", type=Path, default=CASES, metavar="PY", help="a case file (bench/README.md)")
    parser.add_argument(
        "--only", default="*", metavar="PATTERNS", help="cases that have one; commas between, * allowed"
    )
    parser.add_argument("--gates", default=",".join(GATES), help=f"which, with commas between; all: {','.join(GATES)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=usual.threads, help="of each side")
    parser.add_argument("--threshold", type=float, help="of head by base; 1.10 on a CPU, 1.04 on a GPU, 1.25 of files")
    parser.add_argument("--alpha", type=float, default=usual.alpha, help="chance of a false verdict among all cases")
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="at most so many for a case")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="after so many a case gets no more rounds")
    parser.add_argument("--timeout", type=float, default=usual.timeout, metavar="S", help="of one answer of a worker")
    parser.add_argument("--target", default=Gate.target, help="the chip Triton compiles for in the exact gate")
    parser.add_argument("--build", metavar="COMMAND", help="in each worktree; default: setup.py's, if there is one")
    parser.add_argument("--cache", type=Path, help="where builds and exact counts are kept; default: in .git")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write everything that was measured")


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    try:
        report, about = compare(args)
    except (UsageError, Refused, WorkerFailed) as error:
        print(f"bench ab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench ab: interrupted; no worktree and no process is left", file=sys.stderr)
        return 130
    if args.out:
        meta = {
            "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d"),
            **about,
        }
        found = {"findings": [vars(finding) for finding in report.findings], "notes": report.notes}
        args.out.write_text(json.dumps({"meta": meta, "rows": report.rows, **found}, indent=1) + "\n")
    print(f"{len(report.findings)} worse, {len(report.rows)} compared, {time.perf_counter() - start:.0f} s")
    return 1 if report.findings else 0


def compare(args: argparse.Namespace) -> tuple[Report, dict]:
    check(args)
    named_json = [name.endswith(".json") for name in (args.base, args.head)]
    if all(named_json):
        return files.compare(Path(args.base), Path(args.head), args.alpha, args.threshold)
    if any(named_json):
        raise UsageError(f"BASE and HEAD must both be revisions or both JSON files, got {args.base} and {args.head}")
    names = ("device", "threads", "threshold", "alpha", "rounds", "seconds", "timeout")
    options = Options(args.cases.resolve(), **{name: getattr(args, name) for name in names})
    repo = toplevel(Path.cwd())
    cache = args.cache.resolve() if args.cache else common_dir(repo) / "bench-ab"
    with checkouts(repo, args.base, args.head, args.build, cache) as sides:
        print(f"{sides[0]} and {sides[1]}, {options.device}, {options.threads} threads", flush=True)
        gate = Gate(sides, options, repo, cache, tuple(args.gates.split(",")), args.only, args.target)
        about = gate.run()
    return gate.report, {side.name: side.commit for side in sides} | about


def check(args: argparse.Namespace) -> None:
    for wrong, says in (
        (not {*args.gates.split(",")} <= {*GATES}, f"--gates takes {', '.join(GATES)}, got {args.gates}"),
        (args.device.partition(":")[0] not in ("cpu", "cuda"), f"--device takes cpu or cuda:N, got {args.device}"),
        (not args.cases.is_file(), f"--cases: there is no file {args.cases}"),
        (args.rounds < 1 or args.threads < 1, "--rounds and --threads start at 1"),
        (not 0 < args.alpha < 1, f"--alpha lies between 0 and 1, got {args.alpha}"),
        (args.threshold is not None and args.threshold <= 1, f"--threshold is above 1, got {args.threshold}"),
    ):
        if wrong:
            raise UsageError(says)
