"""Gates that need no clock: what a call launches, what a Triton kernel takes from the chip, what C++ code executes.

Each compares counts that are the same in every run, so one more is a finding and none is noise.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.process import Process, WorkerFailed
from bench.worktrees import Side, git, interrupted_afterwards

MORE_INSTRUCTIONS = 1.01  # head by base: counts are exact, this only lets a few instructions outside the loops pass
RESOURCES = ("registers", "stack", "static_shared", "shared", "spill_bytes")
PACKAGE = "endomamba"
TRITON_TOOL = Path("tools", "triton_resources.py")
SWITCH = Path(__file__).with_name("callgrind_switch.c")


@dataclass(frozen=True)
class Finding:
    """One thing that got worse."""

    gate: str
    op: str
    shape: str
    backend: str
    says: str

    def __str__(self) -> str:
        return f"WORSE {self.gate}: op={self.op} shape={self.shape} backend={self.backend} {self.says}"


class Skipped(Exception):
    """A gate that cannot run here: why."""


# ---- launches ----------------------------------------------------------------------------------------------------


def more_launched(base: dict[str, int], head: dict[str, int], what: str) -> str | None:
    """None, or what a call launches more of."""
    before, now = sum(base.values()), sum(head.values())
    if now <= before:
        return None
    more = Counter(head) - Counter(base)
    names = ", ".join(f"{name} +{n}" for name, n in more.most_common(4))
    return f"{what} {before} -> {now} (ratio={now / max(before, 1):.3f}): {names}"


# ---- Triton kernels, compiled ahead of time ----------------------------------------------------------------------


def triton_resources(side: Side, target: str, cache: Path) -> dict[str, list[int] | str]:
    """row -> numbers, in the order of the tool's columns, from the side's own tool; kept by what goes in."""
    if not (side.path / TRITON_TOOL).exists() or not (side.path / PACKAGE).is_dir():
        raise Skipped(f"{side} has no {TRITON_TOOL}")
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise Skipped("Triton is not installed") from None
    inputs = git(side.path, "rev-parse", f"HEAD:{PACKAGE}", f"HEAD:{TRITON_TOOL}")
    return kept(cache / "triton", [inputs, version, target], lambda: compile_triton(side, target))


def compile_triton(side: Side, target: str) -> dict:
    print(f"compiling the Triton kernels of {side} for {target}", file=sys.stderr, flush=True)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "rows.json")
        command = [sys.executable, str(TRITON_TOOL), "--quick", "--target", target, "--out", str(out)]
        done = subprocess.run(command, cwd=side.path, env=env, text=True, capture_output=True)
        if not out.exists():
            told = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise Skipped(f"{TRITON_TOOL} of {side} failed: {told}")
        written = json.loads(out.read_text())
        return {"columns": written["columns"], "rows": written["targets"].get(target, {})}


def compare_triton(base: dict, head: dict, target: str) -> list[Finding]:
    """Growth of anything a kernel takes, kernels that no longer compile, and calls that launch more of them."""
    found = []
    columns = head["columns"]

    def finding(row: str, says: str) -> None:
        op, _, rest = row.partition("/")
        found.append(Finding("triton", op, rest, f"triton {target}", says))

    for row, now in head["rows"].items():
        before = base["rows"].get(row)
        if isinstance(now, str):
            if not isinstance(before, str):
                finding(row, f"does not compile: {now}")
        elif isinstance(before, list):
            was = dict(zip(base["columns"], before, strict=True))
            grown = [
                f"{name} {was[name]} -> {value}"
                for name, value in zip(columns, now, strict=True)
                if name in RESOURCES and value > was.get(name, value)
            ]
            if grown:
                finding(row, ", ".join(grown))
    kernels = {
        side: Counter(row.partition(":")[0] for row in rows["rows"]) for side, rows in (("b", base), ("h", head))
    }
    for call, count in kernels["h"].items():
        if 0 < kernels["b"][call] < count:
            finding(call, f"launches {kernels['b'][call]} -> {count} kernels")
    return found


# ---- instructions of compiled code -------------------------------------------------------------------------------


def require_callgrind() -> str:
    """valgrind's version."""
    if not shutil.which("valgrind"):
        raise Skipped("valgrind is not installed (Debian: apt-get install valgrind)")
    if not shutil.which("cc"):
        raise Skipped("there is no C compiler (cc) for the switch that valgrind needs")
    return subprocess.run(["valgrind", "--version"], text=True, capture_output=True, check=True).stdout.strip()


def instructions(side: Side, cases: Path, names: list[str], timeout: float, cache: Path) -> dict:
    """case -> function -> instructions of one call on one thread, of the compiled code in the side's worktree alone.

    valgrind 3.19 knows no AVX-512, so code that chooses at run time is counted in its AVX2 form.
    """
    key = [side.tree, require_callgrind(), sys.version, importlib.metadata.version("torch"), cases.read_text(), *names]
    return kept(cache / "instructions", key, lambda: count_instructions(side, cases, names, timeout))


def count_instructions(side: Side, cases: Path, names: list[str], timeout: float) -> dict:
    print(f"counting the instructions of {side}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        switch, out = Path(folder, "switch.so"), Path(folder, "counts")
        built = subprocess.run(["cc", "-O1", "-shared", "-fPIC", SWITCH, "-o", switch], text=True, capture_output=True)
        if built.returncode:
            raise Skipped(f"the switch for valgrind does not compile: {built.stderr.strip().splitlines()[0]}")
        valgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        failed = {}
        with contextlib.ExitStack() as stack:
            with interrupted_afterwards():
                process = stack.enter_context(Process(side, cases, "cpu", 1, timeout, prefix=valgrind))
            about = process.ask("hello")["about"]
            for name in names:
                try:
                    process.ask("instructions", name=name, switch=str(switch))
                except WorkerFailed as error:
                    failed[name] = str(error)
            process.finish()
        counts = {}
        for file in sorted(Path(folder).glob("counts.*")):
            text = file.read_text()
            trigger = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
            if trigger:
                counts[trigger.group(1)] = self_costs(text, str(side.path))
        return {"counts": counts, "failed": failed, "about": about}


def self_costs(text: str, folder: str) -> dict[str, int]:
    """function -> instructions it executed itself, from a callgrind file, for code of objects below `folder`."""
    names: dict[str, dict[str, str]] = defaultdict(dict)  # "(12) name" once, "(12)" afterwards
    costs: Counter[str] = Counter()
    current, inclusive = {"ob": "", "fn": ""}, False
    for line in text.splitlines():
        spec = re.match(r"(c?)(ob|fn)=\((\d+)\)(?: (.*))?$", line)
        if spec:
            callee, kind, number, name = spec.groups()
            if name is not None:
                names[kind][number] = name
            if not callee:
                current[kind] = names[kind][number]
        elif line.startswith("calls="):
            inclusive = True  # the next line is the callee's, counted there
        elif re.match(r"[+\-*\d]", line):
            if not inclusive and current["ob"].startswith(folder):
                costs[current["fn"]] += int(line.split()[1])
            inclusive = False
    return dict(costs)


def more_instructions(base: dict[str, int], head: dict[str, int]) -> str | None:
    before, now = sum(base.values()), sum(head.values())
    if now <= before * MORE_INSTRUCTIONS:
        return None
    most = max(head, key=lambda name: head[name] - base.get(name, 0))
    ratio = now / before if before else float("inf")
    return f"ratio={ratio:.4f} instructions {before:,} -> {now:,}, most of it in {most[:100]}"


# ---- what is exact need not be counted twice ---------------------------------------------------------------------


def kept(folder: Path, key: list[str], make: Callable[[], dict]) -> dict:
    path = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:20]}.json"
    if path.exists():
        return json.loads(path.read_text())
    made = make()
    folder.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps(made))
    os.replace(fresh, path)
    return made
