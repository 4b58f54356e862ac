"""python -m bench ab on a small repository of its own, as a project that has the gate's checkout beside it would."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import pytest

from bench.pair import require_own_code
from bench.process import Process, WorkerFailed
from bench.worktrees import Side, UsageError, checkouts

BENCH = Path(__file__).resolve().parents[2] / "bench"
CASES = """\
from functools import partial

OPS = ("same", "slow", "wrong", "more", "crash", "raises", "new", "hang")


def cases(device):
    return [
        {"op": op, "shape": "n100", "backend": "torch", "tolerance": 1e-6, "make": partial(make, op)} for op in OPS
    ]


def make(op):
    import torch

    from tiny import ops

    print("what a case prints is no answer")
    x = torch.arange(100.0)
    return lambda: getattr(ops, op)(x), lambda: x.double().sum()
"""
OPS = """\
import os
import sys
import time


def spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def same(x):
    spin(2e-4)
    return x.sum()


slow = wrong = more = crash = hang = raises = same
"""
WORSE = """

def slow(x):
    spin(3e-4)
    return x.sum()


def wrong(x):
    return 1.01 * x.sum()


def more(x):
    return x.clone().sum()


def crash(x):
    print("planted", file=sys.stderr, flush=True)
    os._exit(3)


def hang(x):
    time.sleep(600)


def raises(x):
    raise ValueError("planted")


new = same
"""
KERNEL = """\
#include <Python.h>

static PyObject* run(PyObject* self, PyObject* none) {
  volatile double y = 0;
  for (int i = 0; i < 100000; ++i) y = y + 1;
  return PyFloat_FromDouble(y);
}

static PyMethodDef methods[] = {{"run", run, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", "", -1, methods};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&module); }
"""


@pytest.fixture
def repo(tmp_path):
    """Two commits, the second worse in some ways; "src" for another layout, the gate's temporary files in tmp."""
    folder = tmp_path / "downstream"
    write(folder, {"tiny/__init__.py": "", "tiny/ops.py": OPS, "gate_cases.py": CASES, ".gitignore": "*.pyc\n"})
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder)
    git(folder, "tag", "good")
    write(folder, {"tiny/ops.py": OPS + WORSE})
    commit(folder)
    (tmp_path / "tmp").mkdir()
    yield folder
    assert len(git(folder, "worktree", "list").splitlines()) == 1, "a worktree is left"
    assert not list((tmp_path / "tmp").glob("bench-ab-*")), "temporary files are left"
    assert git(folder, "for-each-ref", "--format=%(refname)").split() == ["refs/heads/main", "refs/tags/good"]


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a"]
    return subprocess.run(["git", *who, *words], cwd=folder, text=True, capture_output=True, check=True).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "a commit")


def start(folder: Path, *words: str, env: dict | None = None) -> subprocess.Popen:
    usual = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = usual | {"TMPDIR": str(folder.parent / "tmp")} | (env or {})
    command = [sys.executable, str(BENCH), "ab", *words]
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, cwd=folder, env=env, preexec_fn=ctrl_c_counts, **pipes)


def ctrl_c_counts() -> None:
    """Also where the tests run in the background, whose processes inherit that it does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(folder: Path, *words: str, env: dict | None = None) -> tuple[int, str, str]:
    process = start(folder, *words, env=env)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def test_each_way_to_be_worse_is_named(repo, tmp_path):
    out = tmp_path / "out.json"
    words = ["--cases=gate_cases.py", "--gates=time,launches", "--only=e n,w,h n,s n", "--rounds=30", f"--out={out}"]
    code, told, err = run(repo, "good", "HEAD", *words)
    assert code == 1, told + err
    lines = {line.split("op=")[1].split()[0]: line for line in told.splitlines() if line.startswith("WORSE")}
    assert {*lines} == {"slow", "wrong", "more", "crash", "raises"}, told
    slow = lines["slow"]
    assert slow.startswith("WORSE time: op=slow shape=n100 backend=torch ratio=1.") and "interval=[" in slow
    assert "head errs by 1.0e-02 of the fp64 reference, allowed is 1e-06" in lines["wrong"]
    assert "dispatched operators 1 -> 2" in lines["more"] and "aten.clone" in lines["more"]
    assert "the worker ended with exit status 3 during 'errors': planted" in lines["crash"]
    assert "ValueError: planted" in lines["raises"]
    assert "not compared: new n100 torch: base good" in told
    written = json.loads(out.read_text())
    rows = {row["op"]: row for row in written["rows"]}
    assert (
        rows["same"]["verdict"] != "slower" and rows["slow"]["verdict"] == rows["slow"]["again"]["verdict"] == "slower"
    )
    assert 1.25 < rows["slow"]["ratio"] < 2
    assert written["meta"]["base"] == git(repo, "rev-parse", "good").strip() and written["meta"]["cpu"]
    assert len(written["findings"]) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(repo, number):
    process = start(repo, "good", "HEAD", "--cases=gate_cases.py", "--only=hang", "--gates=time")
    assert process.stdout.readline().startswith("base good")
    deadline = time.monotonic() + 30
    while not (workers := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "no worktree and no process is left" in err
    assert workers and not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_hangs_is_stopped(repo):
    side = Side("head", "HEAD", "0" * 40, "", repo)
    with Process(side, repo / "gate_cases.py", "cpu", threads=1, timeout=1.0) as process:
        process.ask("hello")
        with pytest.raises(
            WorkerFailed, match=r"head HEAD \(0000000000\): no answer to 'run' within 1 s; it was stopped"
        ):
            process.ask("run", name="hang n100 torch", calls=1)
        assert not process.alive


def test_a_build_is_kept_for_its_commit(repo, tmp_path, monkeypatch):
    """It runs once a tree, in the tree; what it leaves is there in the second run, which builds nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    log = tmp_path / "log"
    write(tmp_path, {"build.py": f"open({str(log)!r}, 'a').write('built '); open('tiny/made.pyc', 'w').close()"})
    for head, built in (("good", "built "), ("good", "built "), ("HEAD", "built built ")):
        command = f"{{python}} {tmp_path / 'build.py'}"
        with checkouts(repo, "good", head, command, tmp_path / "cache") as sides:
            assert all((side.path / "tiny" / "made.pyc").exists() for side in sides)
            assert sides[0].path != sides[1].path and log.read_text() == built
    assert not (repo / "tiny" / "made.pyc").exists()
    for command, says in (("false", "does not build, exit status 1"), ("no-such-command", "No such file")):
        with pytest.raises(UsageError, match=says), checkouts(repo, "good", "good", command, tmp_path / "cache"):
            pass


@pytest.mark.parametrize(
    ("imports", "says"),
    [("", "import nothing of this repository"), ("import beside", "runs .*/downstream/beside.py, which is not of its")],
)
def test_code_that_is_not_of_the_commits_is_refused(repo, tmp_path, imports, says):
    """Else both sides would run the same code and nothing could ever be found."""
    write(repo, {"beside.py": ""})
    cases = tmp_path / "cases.py"
    cases.write_text(f"import sys\nsys.path.append({str(repo)!r})\n{imports}\ndef cases(device): return []\n")
    side = Side("head", "HEAD", "0" * 40, "", tmp_path / "tmp")
    with Process(side, cases, "cpu", threads=1, timeout=60) as process:
        process.ask("hello")
        with pytest.raises(UsageError, match=says):
            require_own_code(process, cases, repo)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere", "HEAD"], "'nowhere' is no revision of downstream"),
        (["HEAD", "HEAD", "--gates=clock"], "--gates takes time, launches, triton, instructions, got clock"),
        (["HEAD", "HEAD", "--cases=missing.py"], "there is no file missing.py"),
        (["HEAD", "HEAD", "--device=tpu"], "--device takes cpu or cuda:N, got tpu"),
        (["HEAD", "HEAD", "--threshold=0.9"], "--threshold is above 1, got 0.9"),
        (["HEAD", "a.json"], "must both be revisions or both JSON files"),
        (["missing.json", "a.json"], "there is no file missing.json"),
    ],
)
def test_a_wrong_call_is_told_what_is_right(repo, words, says):
    code, out, err = run(repo, *words)
    assert code == 2 and says in err and "Traceback" not in err and not out


def test_the_example_of_a_downstream_repository(tmp_path):
    """Its files in a repository of their own, the workflow's words; with its op called twice the gate is closed.

    HEAD is the working tree as it is: the module in src/ now, a change and a file that git does not know."""
    folder = tmp_path / "project"
    shutil.copytree(BENCH.parent / "examples" / "regression_gate", folder)
    (tmp_path / "tmp").mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    commit(folder)
    text = (folder / "downstream.py").read_text()
    (folder / "downstream.py").unlink()
    twice = "\n\nonce = smooth\n\n\ndef smooth(x):\n    return (once(x) + once(x)) / 2\n"
    write(folder, {"src/downstream.py": "import unknown\n" + text + twice, "src/unknown.py": ""})
    before = git(folder, "status", "--porcelain")
    workflow = (folder / ".github" / "workflows" / "speed.yml").read_text()
    words = next(line for line in workflow.splitlines() if "bench ab" in line).partition("HEAD ")[2].split()
    installed = {"PYTHONPATH": str(BENCH.parent)}  # as pip install would
    code, told, err = run(folder, "HEAD", ".", *words[:2], "--gates=launches", env=installed)
    assert code == 1, told + err
    for tokens in (49, 197):
        assert f"WORSE launches: op=smooth shape=b1-l{tokens}-d64 backend=cpu dispatched operators" in told
    assert git(folder, "status", "--porcelain") == before


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("valgrind") and shutil.which("cc")), reason="valgrind or cc is not installed")
def test_five_percent_more_instructions_are_counted(repo):
    """An extension module of a downstream repository, built in the worktrees, one call under callgrind."""
    ops = "from . import _kernel\n\n\ndef same(x):\n    return x.sum() + 0 * _kernel.run()\n"
    write(repo, {"tiny/ops.py": ops, "tiny/kernel.c": KERNEL})
    commit(repo)
    write(repo, {"tiny/kernel.c": KERNEL.replace("100000", "105000")})
    words = ["--cases=gate_cases.py", "--only=same", "--gates=instructions"]
    include = sysconfig.get_path("include")
    words.append(f"--build=cc -O1 -shared -fPIC -I{include} tiny/kernel.c -o tiny/_kernel.so")
    for head, code_wanted in ((".", 1), ("HEAD", 0)):
        code, told, err = run(repo, "HEAD", head, *words)
        assert code == code_wanted, told + err
        assert ("WORSE instructions: op=same shape=n100 backend=torch ratio=1.05" in told) == bool(code_wanted)
