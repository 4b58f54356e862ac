"""The process that runs one side's cases: a line of JSON in, a line of JSON out.

It is started in the worktree of its commit with this file's path, so it imports nothing of `bench`: what the cases
import comes from the worktree.  What the cases print goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import runpy
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FLUSH_BYTES = 128 * 2**20  # more than any L2


def cold_events(call, flush, cycles: int) -> tuple:
    """Starts a call on a GPU, L2 overwritten before; the events around it.  cycles: the host launches meanwhile."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush.fill_(1)
    torch.cuda._sleep(cycles)
    begin.record()
    call()
    end.record()
    return begin, end


def tensors(value) -> list[torch.Tensor]:
    """Those of a tensor, of a sequence or of a dict, None left out."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts if part is not None for tensor in tensors(part)]


def relative_error(got, truth) -> float:
    """The largest relative error, in norm, of corresponding tensors; NaN stays NaN, another shape gives infinity."""
    got, truth = tensors(got), tensors(truth)
    if [t.shape for t in got] != [t.shape for t in truth]:
        return float("inf")
    errors = [(g.detach().cpu().double() - t).norm() / t.norm().clamp_min(1e-30) for g, t in zip(got, truth)]
    return float(torch.stack(errors).max()) if errors else 0.0  # torch's max keeps NaN


class CountDispatched(TorchDispatchMode):
    """Operators that reach the dispatcher, views too."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Newer PyTorch would import all of its compiler, 1.6 s, to keep it out of here."""
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Worker:
    def __init__(self, cases: str, device: str, threads: int):
        torch.set_num_threads(threads)
        self.device, self.gpu = device, device.startswith("cuda")
        self.module = runpy.run_path(cases)
        self.cases = {f"{c['op']} {c['shape']} {c['backend']}": c for c in self.module["cases"](device)}
        self.name, self.call, self.truth = "", None, None
        if self.gpu:
            torch.cuda.set_device(int(device.partition(":")[2] or 0))
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def hello(self) -> dict:
        about = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        if self.gpu:
            about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        about |= self.module["about"]() if "about" in self.module else {}
        keys = ("op", "shape", "backend", "tolerance", "instructions")
        rows = {name: {key: case.get(key, True) for key in keys} for name, case in self.cases.items()}
        return {"cases": rows, "about": about}

    def files(self) -> list[str]:
        """Of everything imported so far."""
        return [file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))]

    def case(self, name: str) -> None:
        if self.name != name:
            self.name, self.call, self.truth = "", None, None
            gc.collect()
            self.call, self.truth = self.cases[name]["make"]()
            self.name = name

    def errors(self, name: str, truth: str, write: bool) -> dict:
        """This side's outputs by the fp64 truth in a file, which the side that may `write` makes with its reference."""
        self.case(name)
        if write:
            torch.save([t.detach().cpu() for t in tensors(self.truth())], truth)
        return {"error": relative_error(self.call(), torch.load(truth))}

    def run(self, name: str, calls: int, warm: bool = True) -> dict:
        """Microseconds of each of so many calls, after one that is not counted: it fetches code and data back.

        A call of many milliseconds does not need that one."""
        self.case(name)
        if warm:
            self.call()
        return {"us": self.gpu_times(calls) if self.gpu else self.cpu_times(calls)}

    def cpu_times(self, calls: int) -> list[float]:
        times, call, clock = [], self.call, time.perf_counter
        gc.disable()  # a full collection walks all of torch and would be counted as the op's time, as in timeit
        for _ in range(calls):
            start = clock()
            call()
            times.append(1e6 * (clock() - start))
        gc.enable()
        return times

    def gpu_times(self, calls: int) -> list[float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.call()
        cycles = int(3e9 * (time.perf_counter() - start)) + 20_000  # at least 1.5 times what the host needs
        torch.cuda.synchronize()
        events = [cold_events(self.call, self.flush, cycles) for _ in range(calls)]
        torch.cuda.synchronize()  # the other side's process finds the GPU idle
        return [1e3 * begin.elapsed_time(end) for begin, end in events]

    def count(self, name: str) -> dict:
        """What one call launches, by name: kernels on a GPU, operators elsewhere."""
        self.case(name)
        self.call()
        if not self.gpu:
            with CountDispatched() as counted:
                self.call()
            return {"names": counted.names}
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.call()
            torch.cuda.synchronize()
        gpu = torch.autograd.DeviceType.CUDA
        return {"names": Counter(event.name for event in profile.events() if event.device_type == gpu)}

    def instructions(self, name: str, switch: str) -> dict:
        """One call under callgrind, counted through the compiled `switch`; valgrind writes the counts to a file."""
        self.case(name)
        self.call()
        library = ctypes.PyDLL(switch)
        library.start()
        self.call()
        library.stop_and_dump(name.encode())
        return {}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _, cases, device, threads = sys.argv
    sys.argv = [str(Path(cases).name)]
    worker = None
    for line in sys.stdin:
        command = json.loads(line)
        try:
            worker = worker or Worker(cases, device, int(threads))
            answer = {"answer": getattr(worker, command.pop("do"))(**command)}
        except Exception as error:
            told = (str(error).splitlines() or [""])[0]
            answer = {"failed": f"{type(error).__name__}: {told}"}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
