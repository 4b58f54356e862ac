"""A worker process as its owner sees it: questions with a time limit, and a clear sentence when no answer comes."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.worktrees import Side, end_group

WORKER = Path(__file__).with_name("worker.py")
STARTING = 120.0  # seconds that imports may take, whatever the limit of an answer
START = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"  # sys.path starts with the worktree


class WorkerFailed(Exception):
    """A side could not do what it was asked: which, and one sentence."""

    def __init__(self, side: Side, why: str):
        super().__init__(f"{side}: {why}")
        self.side = side


class Process:
    """A worker of one side.  Use it with `with`: the process ends there, however that is left."""

    def __init__(
        self,
        side: Side,
        cases: Path,
        device: str,
        threads: int,
        timeout: float,
        prefix: list[str] | None = None,
    ):
        self.side, self.timeout = side, timeout
        paths = [str(side.path), str(side.path / "src"), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        env["PYTHONHASHSEED"] = "0"
        self.stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115  stop() closes it
        self.process = subprocess.Popen(
            [*(prefix or []), sys.executable, "-c", START, str(WORKER), str(cases), device, str(threads)],
            cwd=side.path, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.answers = b""

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def pin(self, cores: set[int]) -> None:
        """Keeps all its threads, and those that they start, on these cores."""
        for thread in os.listdir(f"/proc/{self.process.pid}/task"):
            os.sched_setaffinity(int(thread), cores)

    def stop(self) -> None:
        end_group(self.process)
        for stream in (self.process.stdin, self.process.stdout, self.stderr):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def finish(self) -> None:
        """No more questions: waits for the end, as valgrind needs to write its file."""
        self.process.stdin.close()
        try:
            self.process.wait(self.timeout)
        except subprocess.TimeoutExpired as error:
            raise WorkerFailed(self.side, f"the worker did not end within {self.timeout:.0f} s") from error

    def ask(self, do: str, **more):
        """Sends a command and returns its answer."""
        self.send(do, **more)
        return self.receive(do)

    def send(self, do: str, **more) -> None:
        try:
            self.process.stdin.write(json.dumps({"do": do} | more) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.ended(do) from None

    def receive(self, do: str):
        answer = json.loads(self.read_line(do))
        if "failed" in answer:
            raise WorkerFailed(self.side, answer["failed"])
        return answer["answer"]

    def read_line(self, do: str) -> bytes:
        limit = max(STARTING, self.timeout) if do == "hello" else self.timeout
        deadline = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.answers:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.stop()
                    raise WorkerFailed(self.side, f"no answer to {do!r} within {limit:.0f} s; it was stopped")
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise self.ended(do)
                self.answers += piece
        line, self.answers = self.answers.split(b"\n", 1)
        return line

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ended(self, do: str) -> WorkerFailed:
        status = self.process.wait()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        self.stderr.seek(0)
        told = self.stderr.read().strip().splitlines()
        return WorkerFailed(self.side, f"the worker ended {how} during {do!r}" + (f": {told[-1]}" if told else ""))
