"""The CUDA extension is built once, at first use: what it says where it cannot be, and what two processes at once do.

A shell script stands in for nvcc and the C++ compiler: it counts its calls, and writes what it is asked for.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from endomamba import _nvcc
from endomamba.ops import _extension_cuda as extension

ROOT = Path(__file__).resolve().parents[1]
COMPILER = """#!/bin/sh
[ "$1" = --version ] && echo "release 13.0, V13.0.88" && exit 0
echo "$*" >> "{log}"
{body}
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done
"""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """use(body): a compiler that does `body` first; -> the file with its calls."""

    def use(body: str = "") -> Path:
        log, script = tmp_path / "calls", tmp_path / "nvcc"
        script.write_text(COMPILER.format(log=log, body=body))
        script.chmod(0o755)
        monkeypatch.setenv("CUDACXX", str(script))
        monkeypatch.setenv("CXX", str(script))
        return log

    monkeypatch.setattr(extension, "_bundled", lambda: None)
    monkeypatch.setattr(extension, "_pybind11", lambda: "include")
    monkeypatch.setenv("ENDOMAMBA_CUDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ENDOMAMBA_CUDA_ARCHS", "90")
    monkeypatch.setattr(extension, "_present", lambda: pytest.fail("the variable names what to build for"))
    extension.missing.cache_clear()
    yield use
    extension.missing.cache_clear()


def test_built_once(compiler, tmp_path):
    log = compiler()
    target = extension.built()
    calls = log.read_text().splitlines()
    assert target.parent == tmp_path / "cache"
    assert len(calls) == len(_nvcc.kernels(ROOT)) + 2  # the kernels, the bindings, the link
    assert sum("code=sm_90" in call for call in calls) == len(_nvcc.kernels(ROOT))
    assert extension.built() == target
    assert log.read_text().splitlines() == calls
    assert sorted(path.suffix for path in target.parent.iterdir()) == [".lock", ".so"]  # no half-made file


def test_another_arch_is_another_file(compiler, monkeypatch):
    compiler()
    first = extension.built()
    monkeypatch.setenv("ENDOMAMBA_CUDA_ARCHS", "80 90")
    assert extension.built() != first


def call_built(_) -> str:
    return str(extension.built())


def test_two_processes_build_once(compiler):
    """The second waits for the first one's lock, and finds its file."""
    log = compiler("sleep 0.2")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(call_built, range(2), chunksize=1).get(timeout=60)
    assert found[0] == found[1]
    assert len(log.read_text().splitlines()) == len(_nvcc.kernels(ROOT)) + 2


def test_the_compilers_own_words(compiler, tmp_path):
    compiler('echo "scan.cu(7): error: no such thing" >&2; exit 1')
    with pytest.raises(RuntimeError, match=r"could not be built: compiling csrc/.* failed: .*error: no such thing"):
        extension.built()
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]
    compiler()
    extension.built()  # a failure leaves nothing in the way


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written(compiler, tmp_path):
    compiler()
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(RuntimeError, match="name a folder in ENDOMAMBA_CUDA_CACHE"):
        extension.built()


def test_a_file_where_the_folder_should_be(compiler, tmp_path):
    compiler()
    (tmp_path / "cache").write_text("")
    with pytest.raises(RuntimeError, match="name a folder in ENDOMAMBA_CUDA_CACHE"):
        extension.built()


def test_switched_off(compiler, monkeypatch):
    monkeypatch.setenv("ENDOMAMBA_CUDA", "0")
    with pytest.raises(RuntimeError, match="switched off by ENDOMAMBA_CUDA=0"):
        extension.built()


def test_everything_missing_is_named(compiler, monkeypatch):
    monkeypatch.setattr(_nvcc, "find_nvcc", lambda: None)
    monkeypatch.setattr(extension, "_root", lambda: None)
    monkeypatch.setattr(extension, "_pybind11", lambda: None)
    why = extension.missing()
    assert all(words in why for words in ("no nvcc was found", "csrc/", "pip install pybind11"))
    with pytest.raises(RuntimeError, match="no nvcc was found"):
        extension.built()
