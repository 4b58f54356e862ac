"""A process of each side, alive at once on one device, asked in turn."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench import machine, stats
from bench.process import WORKER, Process
from bench.worktrees import Side, UsageError, interrupted_afterwards

THRESHOLD = {"cpu": 1.10, "cuda": 1.04}  # head by base: a ratio surely above it is a finding
LONG = 20_000.0  # us: such a call fetches code and data back within itself


@dataclass(frozen=True)
class Options:
    """How times are compared; the command line's words."""

    cases: Path
    device: str = "cpu"
    threads: int = 1
    threshold: float | None = None
    alpha: float = 0.05
    rounds: int = 480
    seconds: float = 30.0
    slice_us: float = 2000.0
    timeout: float = 120.0

    @property
    def limit(self) -> float:
        return self.threshold or THRESHOLD[self.device.partition(":")[0]]


@dataclass
class Pair:
    base: Process
    head: Process
    cases: dict[str, dict]
    about: dict
    found: dict[str, dict[str, float]] = field(default_factory=dict)  # errors by case: the same code gives the same

    @property
    def alive(self) -> bool:
        return self.base.alive and self.head.alive

    def both(self, do: str, **more) -> tuple:
        return self.base.ask(do, **more), self.head.ask(do, **more)

    def errors(self, name: str) -> dict[str, float]:
        """Of each side, against the fp64 reference of base; worked out once."""
        if name not in self.found:
            self.found[name] = self._errors(name)
        return self.found[name]

    def _errors(self, name: str) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as folder:
            truth = str(Path(folder, "truth.pt"))
            base = self.base.ask("errors", name=name, truth=truth, write=True)["error"]
            return {"base": base, "head": self.head.ask("errors", name=name, truth=truth, write=False)["error"]}

    def round(self, name: str, calls: int, warm: bool) -> tuple[list[float], list[float]]:
        """Times of each side's calls: A B B A, so that a machine that slows down evenly favours neither."""
        times = {self.base: [], self.head: []}
        for process in (self.base, self.head, self.head, self.base):
            times[process] += process.ask("run", name=name, calls=calls, warm=warm)["us"]
        return times[self.base], times[self.head]


@contextlib.contextmanager
def opened(sides: tuple[Side, Side], options: Options) -> Iterator[Pair]:
    with contextlib.ExitStack() as stack:
        with interrupted_afterwards():
            every = [Process(side, options.cases, options.device, options.threads, options.timeout) for side in sides]
            processes = [stack.enter_context(process) for process in every]
        for process in processes:
            process.send("hello")
        said = [process.receive("hello") for process in processes]
        machine.require_equal("base and head do not run on the same things", *(s["about"] for s in said))
        if options.device == "cpu":
            # The same cores for both: what else runs there, and how fast they are just now, then concerns both.
            cores = machine.idlest_cores(options.threads)
            for process in processes:
                process.pin(cores)
        yield Pair(*processes, said[1]["cases"], said[1]["about"])


def require_own_code(process: Process, cases: Path, repo: Path) -> None:
    """Raises unless what the process imported comes from its worktree, and not from the repository beside it."""
    tree = process.side.path
    files = {Path(file) for file in process.ask("files")}
    foreign = [
        file
        for file in sorted(files - {cases, WORKER})
        if file.is_relative_to(repo) and not file.is_relative_to(tree) and not file.is_relative_to(sys.prefix)
    ]
    if foreign:
        raise UsageError(f"{process.side} runs {foreign[0]}, which is not of its commit: is PYTHONPATH set?")
    if not any(file.is_relative_to(tree) for file in files):
        raise UsageError(
            f"{process.side}: the cases import nothing of this repository, so there is nothing to compare; packages "
            "are looked for at its top and in src/, before what is installed"
        )


def measure(pair: Pair, name: str, options: Options, cases: int) -> dict:
    """Rounds until the interval lies on one side of the threshold.

    options.alpha, the chance of one false verdict, is shared by so many cases and by all looks at each.
    """
    probe = min(min(answer["us"]) for answer in pair.both("run", name=name, calls=3))
    calls = int(min(50, max(1, options.slice_us / probe)))
    looks = stats.looks(options.rounds)
    base, head, start = [], [], time.monotonic()
    for total in looks:
        while len(base) < total:
            times = pair.round(name, calls, probe < LONG)
            base.append(times[0])
            head.append(times[1])
        machine.require_full_speed(options.device)
        ratio = stats.bootstrap(stats.paired_ratios(base, head), options.alpha / cases / len(looks))
        verdict = stats.verdict(ratio, options.limit)
        if verdict != "undecided" or time.monotonic() - start > options.seconds:
            break
    return {
        "verdict": verdict, "ratio": round(ratio.middle, 4), "interval": [round(ratio.low, 4), round(ratio.high, 4)],
        "base_us": stats.low(base), "head_us": stats.low(head), "rounds": len(base), "calls": 2 * calls,
    }  # fmt: skip
