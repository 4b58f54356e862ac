"""Tasks that need each other, on a few processes, until the time is up: what is left undone is said by name."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Task:
    """call: no argument, can be pickled.  needs: names of tasks that come before.  size: its time grows with it, among
    those of its kind."""

    name: str
    call: Callable[[], Any]
    needs: tuple[str, ...] = ()
    kind: str = ""
    size: float = 1.0


class Result(NamedTuple):
    """problem: in words, why there is no answer; "" where there is one."""

    task: Task
    answer: Any
    problem: str


def carry_out(tasks: Sequence[Task], workers: int, seconds: float, logs: Path) -> Iterator[Result]:
    """A result a task, as they end; of those that can start, the one listed first does.

    Nothing starts that would not end within `seconds`, by the slowest of its kind so far; what runs then is killed.
    Each process writes its standard error into logs/worker-N.txt.
    """
    until = time.monotonic() + seconds
    left, done, lost = list(tasks), set(), set()
    slowest: dict[str, float] = defaultdict(float)  # seconds for a size of 1, by kind
    pool = [_Worker(logs / f"worker-{number}.txt") for number in range(workers)]
    try:
        while left or any(worker.task for worker in pool):
            for task in [task for task in left if lost.intersection(task.needs)]:
                left.remove(task)
                lost.add(task.name)
                yield Result(task, None, f"needs {next(name for name in task.needs if name in lost)}, which failed")
            for worker in (worker for worker in pool if worker.task is None):
                rest = until - time.monotonic()
                can = (t for t in left if done.issuperset(t.needs) and t.size * slowest[t.kind] < rest)
                ready = next(can, None)
                if ready:
                    left.remove(ready)
                    worker.give(ready)
            busy = [worker for worker in pool if worker.task]
            if not busy:
                break
            answered = wait([worker.pipe for worker in busy], max(0.0, until - time.monotonic()))
            for worker in [worker for worker in busy if worker.pipe in answered]:
                took, result = time.monotonic() - worker.began, worker.take()
                if not result.problem:
                    slowest[result.task.kind] = max(slowest[result.task.kind], took / result.task.size)
                (lost if result.problem else done).add(result.task.name)
                yield result
            if not answered:
                break
        for worker in pool:
            if worker.task:
                yield Result(worker.task, None, "was not done when the time was up")
        for task in left:
            yield Result(task, None, "was not started: there was no time left")
    finally:
        for worker in pool:
            worker.pipe.close()  # the idle ones end by themselves, all at the same time
        limit = time.monotonic() + 5
        for worker in pool:
            worker.end(0 if worker.task else limit - time.monotonic())


class _Worker:
    """A process that stays for many tasks: imports and the GPU's context are paid for once."""

    def __init__(self, log: Path):
        self.log = log
        self.task: Task | None = None
        self.began = 0.0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, str(self.log)), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        self.task, self.began = task, time.monotonic()
        self.pipe.send(task.call)

    def take(self) -> Result:
        """What came back; a process that died gets a successor."""
        task, self.task = self.task, None
        assert task is not None
        try:
            return Result(task, *self.pipe.recv())
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self._start()
            return Result(task, None, f"its process died (exit code {code}); see {self.log.name}")

    def end(self, patience: float) -> None:
        self.process.join(max(0.0, patience))
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, log: str) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((call(), ""))
        except Exception as error:
            traceback.print_exc()
            pipe.send((None, f"{type(error).__name__}: {error}"))
