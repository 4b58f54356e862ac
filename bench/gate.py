"""The gates over two built commits, case by case: accuracy, launches, time; then what is compiled, without a clock."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from bench import exact, machine
from bench.exact import Finding, Skipped
from bench.pair import Options, Pair, measure, opened, require_own_code
from bench.process import WorkerFailed
from bench.worktrees import Side, UsageError

GATES = ("time", "launches", "triton", "instructions")


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

    def row(self, name: str) -> dict:
        found = next((row for row in self.rows if row["case"] == name), None)
        if found is None:
            found = {"case": name}
            self.rows.append(found)
        return found


@dataclass
class Gate:
    """One comparison of two sides.  repo: the user's checkout, whose code must not run; only: patterns, with commas.

    pair: processes of both sides that are there already, None: new ones; fresh: makes those that measure again.
    """

    sides: tuple[Side, Side]
    options: Options
    repo: Path
    cache: Path
    gates: tuple[str, ...] = GATES
    only: str = "*"
    target: str = "sm_90"
    pair: Pair | None = None
    fresh: Callable[[tuple[Side, Side], Options], AbstractContextManager[Pair]] = opened
    report: Report = field(default_factory=Report)
    cases: dict[str, dict] = field(default_factory=dict)  # of this run, by name

    def run(self) -> dict:
        """Fills the report; returns what is known of the machine."""
        before, about = machine.describe(self.options.device), {}
        if {"time", "launches", "instructions"} & {*self.gates}:
            about = self.every_case()
            self.again([row["case"] for row in self.report.rows if row.get("verdict") == "slower"])
        if "instructions" in self.gates:
            self.unless_skipped("instruction counts", self.instructions)
        if "triton" in self.gates:
            self.unless_skipped("registers, stack and shared memory of the Triton kernels", self.triton)
        now = machine.describe(self.options.device)
        machine.require_equal("the machine changed while it was measured", before, now)
        return before | about

    def finding(self, gate: str, name: str, says: str) -> None:
        case = self.cases[name]
        self.report.find(Finding(gate, case["op"], case["shape"], case["backend"], says))

    # ---- in two processes ----

    def every_case(self) -> dict:
        with contextlib.ExitStack() as stack:
            pair, checked = self.pair or stack.enter_context(opened(self.sides, self.options)), False
            about, self.cases = pair.about, self.chosen(pair.cases)
            for name in self.cases:
                try:
                    self.one_case(pair, name, checked)
                    checked = True
                except WorkerFailed as error:
                    self.failed(name, error)
                    if not pair.alive:
                        stack.close()
                        pair = stack.enter_context(opened(self.sides, self.options))
        return about

    def chosen(self, cases: dict[str, dict]) -> dict[str, dict]:
        patterns = [f"*{pattern.strip()}*" for pattern in self.only.split(",")]
        found = {
            name: case for name, case in cases.items() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        }
        if not found:
            raise UsageError(f"no case has {self.only!r} in its name; there are: {', '.join(cases)}")
        return found

    def failed(self, name: str, error: WorkerFailed) -> None:
        if error.side.name == "base":  # of an op that HEAD brings there is nothing to compare
            self.report.note(f"not compared: {name}: {error}")
        else:
            self.finding("run", name, str(error))

    def one_case(self, pair: Pair, name: str, checked: bool) -> None:
        accurate = self.accuracy(name, pair.errors(name))
        if not checked:
            for process in (pair.base, pair.head):
                require_own_code(process, self.options.cases, self.repo)
        if not accurate:
            return
        if "launches" in self.gates:
            self.launches(name, *(answer["names"] for answer in pair.both("count", name=name)))
        if "time" in self.gates:
            found = measure(pair, name, self.options, len(self.cases))
            self.report.row(name).update(found)
            verdict, ratio, interval = found["verdict"], found["ratio"], found["interval"]
            print(f"{name:52} {found['base_us']:10.1f} us  {ratio:.3f} {interval} {verdict}", flush=True)

    def accuracy(self, name: str, errors: dict[str, float]) -> bool:
        """False: no time may be given."""
        tolerance = self.cases[name]["tolerance"]
        wrong = [f"{side} errs by {error:.1e}" for side, error in errors.items() if not error <= tolerance]
        if wrong:
            says = f"{', '.join(wrong)} of the fp64 reference, allowed is {tolerance:.0e}: no time for a wrong result"
            self.finding("accuracy", name, says)
            return False
        case = self.cases[name]
        self.report.row(name).update({key: case[key] for key in ("op", "shape", "backend")}, errors=errors)
        return True

    def launches(self, name: str, base: dict[str, int], head: dict[str, int]) -> None:
        self.report.row(name)["launches"] = {"base": sum(base.values()), "head": sum(head.values())}
        what = "kernels" if self.options.device.startswith("cuda") else "dispatched operators"
        says = exact.more_launched(base, head, what)
        if says:
            self.finding("launches", name, says)

    def again(self, suspects: list[str]) -> None:
        """Slow cases once more in fresh processes: how memory happened to lie in the first ones is not the commit's."""
        if not suspects:
            return
        with self.fresh(self.sides, self.options) as pair:
            for name in suspects:
                row, now = self.report.row(name), measure(pair, name, self.options, len(self.cases))
                row["again"] = now
                told = f"ratio={now['ratio']} interval={now['interval']} (before: {row['ratio']} {row['interval']})"
                if now["verdict"] == "slower":
                    took = f"{now['base_us']:.1f} us -> {now['head_us']:.1f} us"
                    self.finding("time", name, f"{told}, surely over {self.options.limit}: {took}")
                else:
                    row["verdict"] = "not confirmed"
                    self.report.note(f"not confirmed in fresh processes: {name}: {told}")

    # ---- without a clock ----

    def unless_skipped(self, what: str, run: Callable[[], None]) -> None:
        try:
            run()
        except Skipped as why:
            self.report.note(f"skipped: {what}: {why}")

    def instructions(self) -> None:
        if self.options.device != "cpu":
            raise Skipped("callgrind sees the code of a CPU alone")
        names = [name for name, case in self.cases.items() if case["instructions"]]
        timeout = 10 * self.options.timeout  # valgrind runs Python at a tenth of its speed
        base, head = (exact.instructions(side, self.options.cases, names, timeout, self.cache) for side in self.sides)
        if not any(base["counts"].values()) and not any(head["counts"].values()):
            raise Skipped("the cases run no compiled code of this repository")
        self.report.note(f"instructions: callgrind, one thread, {base['about']}")
        for name in names:
            if name in base["failed"] or name in head["failed"]:
                why = base["failed"].get(name) or head["failed"][name]
                self.report.note(f"instructions not counted: {name}: {why}")
                continue
            before, now = base["counts"][name], head["counts"][name]
            self.report.row(name)["instructions"] = {"base": sum(before.values()), "head": sum(now.values())}
            says = exact.more_instructions(before, now)
            if says:
                self.finding("instructions", name, says)

    def triton(self) -> None:
        base, head = (exact.triton_resources(side, self.target, self.cache) for side in self.sides)
        for worse in exact.compare_triton(base, head, self.target):
            self.report.find(worse)
        self.report.note(f"triton: {len(head['rows'])} kernels for {self.target} compared")
