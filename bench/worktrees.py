"""Both commits checked out and built, each in a git worktree of its own that is gone afterwards.

What a build leaves is kept beside the repository's objects, by tree, command and Python, so the second run of a commit
builds nothing.  The working tree as it is ("."), files that git does not know yet included, becomes a commit through an
index of its own: no branch, no index and no file of the user is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KEEP = 16  # builds
BUILD = "{python} setup.py build_ext --inplace"
# setup.py of endomamba names its objects by the digest of all that went in: those of another commit may be offered.
DIGEST_NAMED = Path("build", "objects")
AUTHOR = {f"GIT_{who}_{what}": "bench" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


class UsageError(Exception):
    """What the caller asked for cannot be done: why, in one sentence."""


@dataclass(frozen=True)
class Side:
    """One commit, ready to run."""

    name: str  # "base" or "head"
    revision: str  # as the caller said it
    commit: str
    tree: str
    path: Path

    def __str__(self) -> str:
        return f"{self.name} {self.revision} ({self.commit[:10]})"


def git(repo: Path, *words: str, env: dict | None = None) -> str:
    done = subprocess.run(["git", *words], cwd=repo, env=os.environ | (env or {}), text=True, capture_output=True)
    if done.returncode:
        told = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UsageError(f"git {words[0]}: {told}")
    return done.stdout.strip()


def toplevel(folder: Path) -> Path:
    return Path(git(folder, "rev-parse", "--show-toplevel"))


def common_dir(repo: Path) -> Path:
    return (repo / git(repo, "rev-parse", "--git-common-dir")).resolve()


def resolve(repo: Path, revision: str) -> str:
    """The commit; of "." one that holds the working tree as it is."""
    if revision == ".":
        return commit_of(repo, "HEAD", lambda index: git(repo, "add", "--all", env=index))
    try:
        return git(repo, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except UsageError:
        raise UsageError(f"{revision!r} is no revision of {repo.name}; the working tree is '.'") from None


def commit_with(repo: Path, revision: str, files: dict[str, str]) -> str:
    """A commit on no branch: `revision` with these texts in place of its own."""

    def change(index):
        for name, text in files.items():
            command = ["git", "hash-object", "-w", "--stdin"]
            blob = subprocess.run(command, cwd=repo, input=text, text=True, capture_output=True, check=True)
            git(repo, "update-index", "--add", "--cacheinfo", f"100644,{blob.stdout.strip()},{name}", env=index)

    return commit_of(repo, revision, change)


def commit_of(repo: Path, parent: str, change) -> str:
    """Reads `parent` into an index of its own, lets `change` change that, commits it."""
    with tempfile.TemporaryDirectory() as folder:
        index = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        git(repo, "read-tree", parent, env=index)
        change(index)
        tree = git(repo, "write-tree", env=index)
        return git(repo, "commit-tree", tree, "-p", parent, "-m", "as compared", env=AUTHOR)


@contextlib.contextmanager
def checkouts(repo: Path, base: str, head: str, build: str | None, cache: Path | None) -> Iterator[tuple[Side, Side]]:
    """(base, head), built; build: a command, "" for none, None for what the repository's own setup.py does."""
    commits = {"base": (base, resolve(repo, base)), "head": (head, resolve(repo, head))}
    with termination_is_an_exception(), tempfile.TemporaryDirectory(prefix="bench-ab-") as folder:
        sides = []
        try:
            for name, (revision, commit) in commits.items():
                path = Path(folder).resolve() / name
                git(repo, "worktree", "add", "--detach", "--quiet", str(path), commit)
                side = Side(name, revision, commit, git(path, "rev-parse", "HEAD^{tree}"), path)
                sides.append(side)
                ensure_built(side, repo, build, cache or common_dir(repo) / "bench-ab")
            yield tuple(sides)
        finally:
            with not_interrupted():
                for name in commits:
                    shutil.rmtree(Path(folder) / name, ignore_errors=True)
                git(repo, "worktree", "prune")


@contextlib.contextmanager
def termination_is_an_exception() -> Iterator[None]:
    """SIGTERM unwinds the stack as Ctrl-C does."""

    def stop(number, frame):
        raise KeyboardInterrupt

    with handled(signal.SIGTERM, stop):
        yield


@contextlib.contextmanager
def interrupted_afterwards() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of this, so that what is started here is known to those who end it."""
    came = []

    def later(number, frame):
        came.append(number)

    with handled(signal.SIGTERM, later), handled(signal.SIGINT, later):
        yield
    if came:
        raise KeyboardInterrupt


@contextlib.contextmanager
def not_interrupted() -> Iterator[None]:
    with handled(signal.SIGTERM, signal.SIG_IGN), handled(signal.SIGINT, signal.SIG_IGN):
        yield


@contextlib.contextmanager
def handled(number: int, handler) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


# ---- building ----------------------------------------------------------------------------------------------------


def ensure_built(side: Side, repo: Path, build: str | None, cache: Path) -> None:
    command = BUILD if build is None else build
    if not command or (build is None and not (side.path / "setup.py").exists()):
        return
    words = [word.format(python=sys.executable) for word in shlex.split(command)]
    told = "\0".join([side.tree, *words, sysconfig.get_config_var("SOABI") or "", os.environ.get("CXX", "")])
    kept = cache / "builds" / hashlib.sha256(told.encode()).hexdigest()[:20]
    if kept.exists():
        os.utime(kept)
        copy(kept, side.path)
        return
    offer_objects(side.path, [repo, *newest(cache / "builds")])
    print(f"building {side}: {shlex.join(words)}", file=sys.stderr, flush=True)
    run_build(words, side)
    keep(side.path, kept)


def run_build(words: list[str], side: Side) -> None:
    with tempfile.TemporaryFile("w+") as log:
        with contextlib.ExitStack() as stack:
            with interrupted_afterwards():
                try:
                    process = subprocess.Popen(words, cwd=side.path, stdout=log, stderr=log, start_new_session=True)
                except OSError as error:
                    raise UsageError(f"{side} cannot be built: {words[0]}: {error.strerror}") from error
                stack.callback(end_group, process)
            status = process.wait()
        if status:
            log.seek(0)
            told = (log.read().strip().splitlines() or ["it said nothing"])[-1]
            raise UsageError(f"{side} does not build, exit status {status}: {told}")


def end_group(process: subprocess.Popen) -> None:
    """A process started in a session of its own, and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def newest(builds: Path) -> list[Path]:
    return sorted(builds.glob("*"), key=lambda path: path.stat().st_mtime, reverse=True) if builds.exists() else []


def offer_objects(path: Path, sources: list[Path]) -> None:
    for source in sources:
        if (source / DIGEST_NAMED).is_dir():
            copy(source / DIGEST_NAMED, path / DIGEST_NAMED)
            return


def keep(path: Path, kept: Path) -> None:
    """What the build made: all that git does not have.  In place at once, so an interrupted run leaves no half."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent, prefix=".") as folder:
        for name in git(path, "ls-files", "--others", "-z").split("\0"):
            if name:
                target = Path(folder, "new", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path / name, target)
        Path(folder, "new").mkdir(exist_ok=True)
        with contextlib.suppress(OSError):  # another run was faster
            os.replace(Path(folder, "new"), kept)
    for old in newest(kept.parent)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)
