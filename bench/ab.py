"""Did HEAD get slower than BASE?  Exit code 0: no.  1: yes, or wrong, each case named.  2: it cannot be said, and why.

BASE and HEAD are git revisions of the repository around the current directory, HEAD also "." for the working tree as it
is; each is checked out, built and run by itself.  Or both are JSON files of pytest-benchmark, which allow less: they
were not measured side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import exact, machine, stats
from bench.exact import Finding, Skipped
from bench.machine import Refused
from bench.process import Process, WorkerFailed
from bench.worktrees import Side, UsageError, checkouts, common_dir, toplevel

GATES = ("time", "launches", "triton", "instructions")
THRESHOLD = {"cpu": 1.10, "cuda": 1.04, "files": 1.25}  # a ratio surely above it is a finding
LONG = 20_000.0  # us: such a call fetches code and data back within itself
CASES = Path(__file__).with_name("cases.py")


@dataclass
class Options:
    """How a comparison is made; the command line's words."""

    cases: Path = CASES
    device: str = "cpu"
    only: str = "*"
    gates: tuple[str, ...] = GATES
    threads: int = 1
    threshold: float | None = None
    alpha: float = 0.05
    rounds: int = 480
    seconds: float = 30.0
    slice_us: float = 2000.0
    timeout: float = 120.0
    target: str = "sm_90"

    @property
    def limit(self) -> float:
        return self.threshold or THRESHOLD[self.device.partition(":")[0]]


@dataclass
class Report:
    rows: list[dict] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def find(self, finding: Finding) -> None:
        self.findings.append(finding)
        print(finding, flush=True)


# ---- the command -------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    usual = Options()
    parser.add_argument("base", metavar="BASE", help="a git revision, or a JSON file of pytest-benchmark")
    parser.add_argument("head", metavar="HEAD", help="the same, or . for the working tree as it is")
    parser.add_argument("--cases", type=Path, default=CASES, metavar="PY", help="a case file (bench/README.md)")
    parser.add_argument(
        "--only", default="*", metavar="PATTERNS", help="cases that have one; commas between, * allowed"
    )
    parser.add_argument("--gates", default=",".join(GATES), help="which of them, with commas between")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=usual.threads, help="of each side")
    parser.add_argument("--threshold", type=float, help="of head by base; 1.10 on a CPU, 1.04 on a GPU, 1.25 of files")
    parser.add_argument("--alpha", type=float, default=usual.alpha, help="chance of one false alarm of all cases")
    parser.add_argument("--rounds", type=int, default=usual.rounds, help="at most so many for a case")
    parser.add_argument("--seconds", type=float, default=usual.seconds, help="after so many a case gets no more rounds")
    parser.add_argument("--timeout", type=float, default=usual.timeout, metavar="S", help="of one answer of a worker")
    parser.add_argument("--target", default=usual.target, help="the chip that Triton compiles for in the exact gate")
    parser.add_argument("--build", metavar="COMMAND", help="in each worktree; default: setup.py's, if there is one")
    parser.add_argument("--cache", type=Path, help="where builds and exact counts are kept; default: in .git")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write everything that was measured")


def main(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    try:
        report, about = compare_files(args) if are_files(args.base, args.head) else compare_revisions(args)
    except (UsageError, Refused, WorkerFailed) as error:
        print(f"bench ab: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench ab: interrupted; nothing is left behind", file=sys.stderr)
        return 130
    if args.out:
        findings = [vars(finding) for finding in report.findings]
        data = {"meta": about, "rows": report.rows, "findings": findings, "notes": report.notes}
        args.out.write_text(json.dumps(data, indent=1) + "\n")
    worse = len(report.findings)
    print(f"{worse} worse, {len(report.rows)} compared, {time.perf_counter() - start:.0f} s")
    return 1 if worse else 0


def are_files(*names: str) -> bool:
    if any(name.endswith(".json") for name in names) and not all(name.endswith(".json") for name in names):
        raise_usage = "BASE and HEAD must both be JSON files or both be revisions"
        raise UsageError(f"{raise_usage}, got {names[0]} and {names[1]}")
    return all(name.endswith(".json") for name in names)


def options_of(args: argparse.Namespace) -> Options:
    gates = tuple(args.gates.split(","))
    if not set(gates) <= set(GATES):
        raise UsageError(f"--gates takes {', '.join(GATES)}, got {args.gates}")
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device takes cpu, cuda or cuda:N, got {args.device}")
    if not args.cases.is_file():
        raise UsageError(f"--cases: there is no file {args.cases}")
    if args.rounds < 1 or args.threads < 1 or not 0 < args.alpha < 1:
        raise UsageError("--rounds and --threads start at 1, --alpha lies between 0 and 1")
    names = ("device", "only", "threads", "threshold", "alpha", "rounds", "seconds", "timeout", "target")
    return Options(cases=args.cases.resolve(), gates=gates, **{name: getattr(args, name) for name in names})


def compare_revisions(args: argparse.Namespace) -> tuple[Report, dict]:
    options = options_of(args)
    repo = toplevel(Path.cwd())
    cache = args.cache.resolve() if args.cache else common_dir(repo) / "bench-ab"
    with checkouts(repo, args.base, args.head, args.build, cache) as sides:
        print(f"{sides[0]} and {sides[1]}, {options.device}, {options.threads} threads", flush=True)
        report, machine_now = gate(sides, options, cache, repo)
    command = " ".join(["python -m bench ab", *sys.argv[2:]])
    commits = {side.name: side.commit for side in sides}
    return report, {"command": command, "date": time.strftime("%Y-%m-%d"), **commits, **machine_now}


def gate(sides: tuple[Side, Side], options: Options, cache: Path, repo: Path) -> tuple[Report, dict]:
    """Runs the gates over two built sides."""
    report, before = Report(), machine.describe(options.device)
    about = {}
    if {"time", "launches", "instructions"} & set(options.gates):
        about = run_cases(sides, options, cache, repo, report)
    if "triton" in options.gates:
        triton_gate(sides, options, cache, report)
    machine.require_equal("the machine changed while it was measured", before, machine.describe(options.device))
    return report, before | about


# ---- two processes, one device -----------------------------------------------------------------------------------


@dataclass
class Pair:
    """A process of each side, alive at once, asked in turn."""

    base: Process
    head: Process
    cases: dict[str, dict]
    about: dict

    def both(self, do: str, **more) -> tuple:
        return self.base.ask(do, **more), self.head.ask(do, **more)

    def round(self, name: str, calls: int, warm: bool) -> tuple[list[float], list[float]]:
        """Times of each side's calls: A B B A, so that a machine that slows down evenly favours neither."""
        times = {self.base: [], self.head: []}
        for process in (self.base, self.head, self.head, self.base):
            times[process] += process.ask("run", name=name, calls=calls, warm=warm)["us"]
        return times[self.base], times[self.head]


@contextlib.contextmanager
def opened(sides: tuple[Side, Side], options: Options) -> Iterator[Pair]:
    # The same cores for both: what else runs there, and how fast they are just now, then concerns both.
    cores = machine.idlest_cores(options.threads) if options.device == "cpu" else None
    start = partial(Process, timeout=options.timeout, cores=cores)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(start(side, options.cases, options.device, options.threads)) for side in sides]
        for process in processes:
            process.send("hello")
        said = [process.receive("hello") for process in processes]
        machine.require_equal("base and head do not run on the same things", *(s["about"] for s in said))
        yield Pair(*processes, said[1]["cases"], said[1]["about"])


def require_own_code(process: Process, options: Options, repo: Path) -> None:
    """Raises unless what the process imported comes from its worktree."""
    tree, ours = process.side.path, {options.cases, Path(exact.__file__).with_name("worker.py")}
    files = {Path(file) for file in process.ask("files")}
    foreign = [
        file
        for file in files
        if file.is_relative_to(repo) and not file.is_relative_to(tree) and not file.is_relative_to(sys.prefix)
    ]
    foreign = sorted(file for file in foreign if file not in ours)
    if foreign:
        raise UsageError(f"{process.side} runs {foreign[0]}, which is not of its commit: is PYTHONPATH set?")
    if not any(file.is_relative_to(tree) for file in files):
        raise UsageError(
            f"{process.side}: the cases import nothing of this repository, so there is nothing to compare; packages "
            "are looked for at its top and in src/, before what is installed"
        )


# ---- the gates of each case --------------------------------------------------------------------------------------


def run_cases(sides: tuple[Side, Side], options: Options, cache: Path, repo: Path, report: Report) -> dict:
    with contextlib.ExitStack() as stack:
        pair = stack.enter_context(opened(sides, options))
        about = pair.about
        patterns = [f"*{pattern.strip()}*" for pattern in options.only.split(",")]
        names = [name for name in pair.cases if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
        if not names:
            raise UsageError(f"no case has {options.only!r} in its name; there are: {', '.join(pair.cases)}")
        suspects = []
        for number, name in enumerate(names):
            try:
                if one_case(pair, name, options, repo, len(names), report, check_code=number == 0) == "slower":
                    suspects.append(name)
            except WorkerFailed as error:
                report.find(finding(pair, name, "run", str(error)))
                stack.close()  # whichever side is left, it starts anew
                pair = stack.enter_context(opened(sides, options))
        cases = pair.cases
    if suspects:
        with opened(sides, options) as pair:
            for name in suspects:
                confirm(pair, name, options, len(names), report)
    if "instructions" in options.gates:
        instructions_gate(sides, cases, names, options, cache, report)
    return about


def finding(pair: Pair, name: str, gate: str, says: str) -> Finding:
    case = pair.cases[name]
    return Finding(gate, case["op"], case["shape"], case["backend"], says)


def one_case(
    pair: Pair, name: str, options: Options, repo: Path, cases: int, report: Report, check_code: bool
) -> str | None:
    """Accuracy, then launches, then time; returns the verdict on time."""
    errors = accuracy(pair, name, report)
    if check_code:
        for process in (pair.base, pair.head):
            require_own_code(process, options, repo)
    if errors is None:
        return None
    row = {"case": name, **{key: pair.cases[name][key] for key in ("op", "shape", "backend")}, "errors": errors}
    report.rows.append(row)
    if "launches" in options.gates:
        base, head = (answer["names"] for answer in pair.both("count", name=name))
        row["launches"] = {"base": sum(base.values()), "head": sum(head.values())}
        what = "kernels" if options.device.startswith("cuda") else "dispatched operators"
        says = exact.more_launched(base, head, what)
        if says:
            report.find(finding(pair, name, "launches", says))
    if "time" not in options.gates:
        return None
    word, measured = measure(pair, name, options, cases)
    row |= {"verdict": word, **measured}
    print(
        f"{name:52} {measured['base_us']:10.1f} us  {measured['ratio']:.3f} {measured['interval']} {word}", flush=True
    )
    return word


def accuracy(pair: Pair, name: str, report: Report) -> dict[str, float] | None:
    """Both sides' errors against base's fp64 reference; None if no time may be given."""
    with tempfile.TemporaryDirectory() as folder:
        truth = str(Path(folder, "truth.pt"))
        try:
            base = pair.base.ask("errors", name=name, truth=truth, write=True)["error"]
        except WorkerFailed as error:
            if pair.base.process.poll() is not None:
                raise
            report.note(f"not compared: {name}: {error}")
            return None
        head = pair.head.ask("errors", name=name, truth=truth, write=False)["error"]
    errors, tolerance = {"base": base, "head": head}, pair.cases[name]["tolerance"]
    wrong = {side: error for side, error in errors.items() if not error <= tolerance}
    if wrong:
        told = ", ".join(f"{side} errs by {error:.1e}" for side, error in wrong.items())
        says = f"{told} of the fp64 reference, allowed is {tolerance:.0e}: no time is given for a wrong result"
        report.find(finding(pair, name, "accuracy", says))
    return None if wrong else errors


def measure(pair: Pair, name: str, options: Options, cases: int) -> tuple[str, dict]:
    """Rounds until the interval lies on one side of the threshold.  alpha is shared by all cases and all looks."""
    probe = min(min(answer["us"]) for answer in pair.both("run", name=name, calls=3))
    calls = int(min(50, max(1, options.slice_us / probe)))
    steps = stats.looks(options.rounds)
    base, head, start = [], [], time.monotonic()
    for total in steps:
        while len(base) < total:
            times = pair.round(name, calls, probe < LONG)
            base.append(times[0])
            head.append(times[1])
        machine.require_full_speed(options.device)
        ratio = stats.bootstrap(stats.paired_ratios(base, head), options.alpha / cases / len(steps))
        word = stats.verdict(ratio, options.limit)
        if word != "undecided" or time.monotonic() - start > options.seconds:
            break
    return word, {
        "ratio": round(ratio.middle, 4), "interval": [round(ratio.low, 4), round(ratio.high, 4)],
        "base_us": stats.low(base), "head_us": stats.low(head), "rounds": len(base), "calls": 2 * calls,
    }  # fmt: skip


def confirm(pair: Pair, name: str, options: Options, cases: int, report: Report) -> None:
    """A slow case once more in fresh processes: how memory happened to lie in the first ones is not the commit's."""
    row = next(row for row in report.rows if row["case"] == name)
    word, again = measure(pair, name, options, cases)
    row |= {"again": again | {"verdict": word}}
    if word != "slower":
        row["verdict"] = "not confirmed"
        report.note(f"not confirmed in fresh processes: {name}: {again['ratio']} {again['interval']}")
        return
    says = (
        f"ratio={again['ratio']} interval={again['interval']} (before: {row['ratio']} {row['interval']}), surely over "
        f"{options.limit}, {row['base_us']:.1f} us -> {row['head_us']:.1f} us"
    )
    report.find(finding(pair, name, "time", says))


# ---- the gates without a clock -----------------------------------------------------------------------------------


def skipping(what: str, report: Report, run: Callable[[], None]) -> None:
    try:
        run()
    except Skipped as why:
        report.note(f"skipped: {what}: {why}")


def instructions_gate(
    sides: tuple[Side, Side], cases: dict, names: list[str], options: Options, cache: Path, report: Report
) -> None:
    def run() -> None:
        if options.device != "cpu":
            raise Skipped("callgrind sees the code of a CPU alone")
        counted = [name for name in names if cases[name]["instructions"]]
        base, head = (exact.instructions(side, options.cases, counted, 10 * options.timeout, cache) for side in sides)
        if not any(base["counts"].values()) and not any(head["counts"].values()):
            raise Skipped("the cases run no compiled code of this repository")
        report.note(f"instructions: callgrind, one thread, {base['about']}")
        for name in counted:
            case = cases[name]
            if name in head["failed"]:
                raise Skipped(head["failed"][name])
            if name not in base["counts"]:
                report.note(f"not counted: {name}: {base['failed'].get(name, 'base has no count')}")
                continue
            says = exact.more_instructions(base["counts"][name], head["counts"][name])
            for row in report.rows:
                if row["case"] == name:
                    totals = {side: sum(of["counts"][name].values()) for side, of in (("base", base), ("head", head))}
                    row["instructions"] = totals
            if says:
                report.find(Finding("instructions", case["op"], case["shape"], case["backend"], says))

    skipping("instruction counts", report, run)


def triton_gate(sides: tuple[Side, Side], options: Options, cache: Path, report: Report) -> None:
    def run() -> None:
        base, head = (exact.triton_resources(side, options.target, cache) for side in sides)
        for worse in exact.compare_triton(base, head, options.target):
            report.find(worse)
        report.note(f"triton: {len(head['rows'])} kernels for {options.target} compared")

    skipping("registers, stack and shared memory of the Triton kernels", report, run)


# ---- files of pytest-benchmark -----------------------------------------------------------------------------------

MACHINE_KEYS = ("node", "machine", "processor", "system", "release", "python_implementation", "python_version")


def compare_files(args: argparse.Namespace) -> tuple[Report, dict]:
    base, head = (read_file(Path(name)) for name in (args.base, args.head))
    machine.require_equal("the files are of different machines", base["machine"], head["machine"])
    report, limit = Report(), args.threshold or THRESHOLD["files"]
    report.note(
        "two separate runs, not interleaved: what the machine did meanwhile is in the ratio and cannot be told apart, "
        f"so only a ratio surely over {limit} is a finding; revisions can be compared more closely"
    )
    names = [name for name in head["times"] if name in base["times"]]
    for name in sorted({*head["times"], *base["times"]} - {*names}):
        report.note(f"not compared: {name} is in one file only")
    if not names:
        raise UsageError("the files have no benchmark in common")
    for name in names:
        ratio = stats.unpaired(base["times"][name], head["times"][name], args.alpha / len(names))
        word = stats.verdict(ratio, limit)
        report.rows.append({"case": name, "ratio": ratio.middle, "interval": [ratio.low, ratio.high], "verdict": word})
        print(f"{name:52} {ratio} {word}", flush=True)
        if word == "slower":
            params = head["params"][name]
            says = f"ratio={ratio.middle:.3f} interval=[{ratio.low:.3f}, {ratio.high:.3f}], surely over {limit}"
            report.find(Finding("time", params["op"], params["shape"], params["backend"], says))
    return report, {"command": f"python -m bench ab {args.base} {args.head}", **base["machine"]}


def read_file(path: Path) -> dict:
    """times and parameters by benchmark, and what identifies the machine."""
    try:
        data = json.loads(path.read_text())
        info, rows = data["machine_info"], {row["fullname"]: row for row in data["benchmarks"]}
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no JSON file of pytest-benchmark: {type(error).__name__} {error}") from error
    without = [name for name, row in rows.items() if len(row["stats"].get("data") or ()) < 5]
    if without:
        raise UsageError(f"{path}: {without[0]} has fewer than 5 times; write it with --benchmark-json")
    return {
        "machine": {key: info.get(key) for key in MACHINE_KEYS} | {"cpu": info.get("cpu", {}).get("brand_raw")},
        "times": {name: row["stats"]["data"] for name, row in rows.items()},
        "params": {name: labels(row) for name, row in rows.items()},
    }


def labels(row: dict) -> dict[str, str]:
    """op, shape and back end, from extra_info as bench/test_cases.py writes it, or from the name."""
    extra = row.get("extra_info") or {}
    return {"op": extra.get("op", row["name"]), **{key: extra.get(key, "-") for key in ("shape", "backend")}}
