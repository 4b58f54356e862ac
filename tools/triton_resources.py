"""What every Triton kernel takes from the chip, without one: compiles ahead of time and writes registers, stack, shared
memory, spills and instructions to tests/data/triton_resources.json, which tests/test_triton_resources.py compares with.

    python tools/triton_resources.py                                     # everything; rewrites the data
    python tools/triton_resources.py --only conv --target sm_90 --print  # a look, nothing written

How a kernel gets here: its module (any *triton*.py, as ops/<op>/triton_fwd.py) has a function `aot_cases()`.  It
returns a list of calls of its own host functions with meta tensors (shapes and dtypes, no memory).  Their launches are
compiled with the arguments, constants and options that the host function chose, so the table beside the kernel and what
is measured here cannot differ.  One case for every row of that table, dtype and option that makes another kernel; those
which need not be in every test run are `slow`, but each kernel has at least one that is not:

    from .._triton import AotCase, meta

    def aot_cases() -> list[AotCase]:
        cases = []
        for dtype in (torch.bfloat16, torch.float32):
            for c in LAUNCH:  # one row for each width
                x, residual = meta(2, 49, c, dtype=dtype), meta(2, 49, c)
                args = (x, meta(c), None, residual, None, 1e-5, False)  # as op.py passes them
                cases.append(AotCase(f"c{c}-{dtype_name(dtype)}", add_norm_fwd, args, slow=c not in (512, 1024)))
        return cases

A host function may launch several kernels; each gets a row.  Where it needs numbers of the device (its multiprocessors)
it must have an answer for meta tensors.  A kernel (JITFunction) may stand in place of the host function: it is launched
with `args`, the options as a dict in their last place.  Names are letters, digits, "-" and "_".

Runs without a GPU and without TRITON_INTERPRET; every case is compiled in a process of its own that may take --timeout.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "triton_resources.json"
CUDA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
HIP = ("gfx942",)
TARGETS = CUDA + HIP
COLUMNS = ("registers", "stack", "static_shared", "shared", "spill_bytes", "instructions")


class CompileOnly:
    """In place of Triton's driver: kernels are specialised and compiled for `name`, never launched."""

    def __init__(self, name: str):
        from triton.backends.compiler import GPUTarget

        cuda = name in CUDA
        self.target = GPUTarget("cuda", int(name[3:]), 32) if cuda else GPUTarget("hip", name, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def is_active(self):
        return True


def modules() -> list:
    files = sorted((ROOT / "endomamba").rglob("*triton*.py"))
    return [importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in files]


def kernels() -> set[str]:
    """The names of all launchable kernels (`_..._kernel`) of these modules."""
    from triton.runtime.jit import JITFunction

    found = (value for module in modules() for value in vars(module).values() if isinstance(value, JITFunction))
    return {fn.__name__ for fn in found if fn.__name__.endswith("_kernel")}


def cases() -> dict:
    """ "op/fwd/name" -> AotCase."""
    found = {}
    for module in modules():
        place = module.__name__.removeprefix("endomamba.ops.").replace(".triton_", "/").replace(".", "/")
        for case in module.aot_cases() if hasattr(module, "aot_cases") else ():
            name = f"{place}/{case.name}"
            assert re.fullmatch(r"[\w-]+", case.name) and name not in found, f"{name}: a bad name or there twice"
            found[name] = case
    return found


def launches(case) -> list:
    """(name, compiled kernel, grid) of every launch of a call."""
    from triton.runtime.jit import JITFunction

    compiled, run = [], JITFunction.run

    def record(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled.append((self.__name__, kernel, grid))
        return kernel

    JITFunction.run = record
    if isinstance(case.function, JITFunction):
        *args, options = case.args
        case.function[(1,)](*args, **options)
    else:
        case.function(*case.args)
    return compiled


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def disassembled(kernel) -> str:
    """The SASS of a kernel for CUDA."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        return output(tool("cuobjdump"), "-sass", str(cubin))


def resources(kernel) -> list[int]:
    """In the order of COLUMNS."""
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def field(name):
            return int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))

        spills = 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
        instructions = len(re.findall(r"^\t[sv]_\w+|^\t(?:global|buffer|ds|flat|scratch)_\w+", text, re.MULTILINE))
        stack, static = field("private_segment_fixed_size"), field("group_segment_fixed_size")
        return [field("vgpr_count") + field("agpr_count"), stack, static, shared, spills, instructions]
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = output(tool("cuobjdump"), "--dump-resource-usage", str(cubin))
        used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
        instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", disassembled(kernel), re.MULTILINE))
        spills = 0
        if used["STACK"] or used["LOCAL"]:
            ptx.write_text(kernel.asm["ptx"])
            arch = re.search(r"^\.target\s+(\w+)", kernel.asm["ptx"], re.MULTILINE).group(1)
            ptxas = tool("ptxas-blackwell" if int(re.sub(r"\D", "", arch)) >= 100 else "ptxas")
            command = [ptxas, "-v", f"--gpu-name={arch}", "-o", os.devnull, str(ptx)]
            told = subprocess.run(command, capture_output=True, text=True).stderr
            spills = sum(map(int, re.findall(r"(\d+) bytes spill", told)))
    return [used["REG"], used["STACK"], used["SHARED"], shared, spills, instructions]


def compile_case(name: str, target: str) -> dict[str, list[int]]:
    from triton.runtime import driver

    driver.set_active(CompileOnly(target))
    rows = {}
    for kernel_name, kernel, _ in launches(cases()[name]):
        row, twin = f"{name}:{kernel_name}", 2
        while row in rows:
            row, twin = f"{name}:{kernel_name}#{twin}", twin + 1
        rows[row] = resources(kernel)
    assert rows, "launches nothing"
    return rows


def in_child(name: str, target: str, path: Path, timeout: int) -> int:
    """Starts a process that writes its rows, or what went wrong, to `path`; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)  # the compiler it calls goes with it
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # not a Python handler: that would wait for the compiler
    signal.alarm(timeout)
    status = 1
    try:
        path.write_text(json.dumps(compile_case(name, target)))
        status = 0
    except BaseException as error:
        path.write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def compile_all(jobs: list[tuple[str, str]], parallel: int, timeout: int) -> dict[str, dict]:
    """target -> row -> numbers, for (case, target) pairs; a case that cannot be compiled has its error there."""
    found, running, waiting = {}, {}, list(reversed(jobs))
    with tempfile.TemporaryDirectory() as folder:
        while running or waiting:
            while waiting and len(running) < parallel:
                name, target = waiting.pop()
                path = Path(folder, f"{len(waiting)}")
                running[in_child(name, target, path, timeout)] = name, target, path, time.monotonic()
            pid, status = os.wait()
            name, target, path, start = running.pop(pid)
            rows = found.setdefault(target, {})
            if status:
                if os.WIFSIGNALED(status):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                    rows[name] = f"killed by signal {os.WTERMSIG(status)} after {time.monotonic() - start:.0f} s"
                else:
                    rows[name] = path.read_text()
                print(f"{target} {name}: {rows[name]}", file=sys.stderr)
            else:
                rows.update(json.loads(path.read_text()))
                if sys.stderr.isatty():
                    print(f"{target} {name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    return found


def write(found: dict, path: Path, whole: bool) -> None:
    """One row a line.  A partial run replaces its own rows only, and only those of the same Triton."""
    import triton

    old = json.loads(path.read_text()) if path.exists() and not whole else {}
    if old.get("triton", triton.__version__) != triton.__version__:
        sys.exit(f"{path} is of Triton {old['triton']}, this is {triton.__version__}: run everything again")
    targets = old.get("targets", {})
    for target, rows in found.items():
        targets[target] = targets.get(target, {}) | rows
    lines = []
    for target in [t for t in TARGETS if t in targets]:
        rows = ",\n".join(f"  {json.dumps(row)}: {json.dumps(value)}" for row, value in sorted(targets[target].items()))
        lines.append(f"{json.dumps(target)}: {{\n{rows}\n}}")
    head = f'"triton": {json.dumps(triton.__version__)},\n"columns": {json.dumps(COLUMNS)},\n"targets": {{\n'
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + head + ",\n".join(lines) + "\n}}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be given several times; all of them")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name contains it (* and ? allowed)")
    parser.add_argument("--quick", action="store_true", help="without the slow cases")
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--print", action="store_true", help="print the rows, write nothing")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--timeout", type=int, default=300, metavar="S", help="of one case on one target")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set: there is nothing to compile in the interpreter")
    targets = args.target or list(TARGETS)

    # endomamba asks once, at its import, whether torch is made for AMD: those targets have a process of their own.
    if set(targets) & set(HIP) and set(targets) & set(CUDA):
        with tempfile.TemporaryDirectory() as folder:
            parts = []
            for kind in (CUDA, HIP):
                parts.append(Path(folder, kind[0]))
                rest = [f"--only={args.only}", f"--jobs={args.jobs}", f"--timeout={args.timeout}"]
                rest += ["--quick"] * args.quick + [f"--target={t}" for t in targets if t in kind]
                done = subprocess.run([sys.executable, __file__, "--out", str(parts[-1]), *rest])
                if not parts[-1].exists():
                    sys.exit(done.returncode)
            found = {}
            for part in parts:
                found |= json.loads(part.read_text())["targets"]
    else:
        cache = tempfile.mkdtemp(prefix="endomamba-aot-")
        os.environ |= {"TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        sys.path.insert(0, str(ROOT))
        import torch

        if targets[0] in HIP:
            torch.version.hip = torch.version.hip or "compiled for it, not with it"
        try:
            chosen = {
                name: case
                for name, case in cases().items()
                if fnmatch.fnmatch(name, f"*{args.only}*") and not (args.quick and case.slow)
            }
            jobs = [(name, target) for target in targets for name in chosen]
            found = compile_all(jobs, args.jobs, args.timeout)
        finally:
            shutil.rmtree(cache, ignore_errors=True)
    failed = any(isinstance(value, str) for rows in found.values() for value in rows.values())
    if failed and args.out == DATA and not args.print:
        sys.exit("nothing written: the cases named above do not compile")
    if args.print:
        for target, rows in found.items():
            for row, value in sorted(rows.items()):
                text = value if isinstance(value, str) else "  ".join(f"{c} {v}" for c, v in zip(COLUMNS, value))
                print(f"{target} {row}: {text}")
    else:
        write(found, args.out, whole=args.out != DATA or not (args.target or args.only or args.quick))
    sys.exit(failed)


if __name__ == "__main__":
    main()
