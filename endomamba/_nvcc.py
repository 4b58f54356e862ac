"""Builds endomamba._C_cuda from csrc/: nvcc for csrc/cuda, the C++ compiler for the bindings, the CUDA runtime inside.

setup.py loads this file by its path, before torch or the package can be imported; endomamba.ops._extension_cuda builds
with it at first use.  So it imports the standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WHEEL_ARCHS = ("80", "86", "89", "90", "100", "120")
FLAGS = ("-std=c++17", "-O3", "-Icsrc")
BINDINGS = "csrc/bindings_cuda.cpp"


class BuildError(Exception):
    """Why there is no _C_cuda, in one sentence."""


def find_nvcc() -> str | None:
    """$CUDACXX, $CUDA_HOME, the path, /usr/local/cuda: the first that has one."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((found for place in places if place and (found := shutil.which(place))), None)


def archs_named() -> tuple[str, ...]:
    """$ENDOMAMBA_CUDA_ARCHS, as "80 90" or "80;90"; without it ()."""
    return tuple(re.findall(r"\d+a?", os.environ.get("ENDOMAMBA_CUDA_ARCHS", "")))


def gencode(archs: tuple[str, ...]) -> list[str]:
    """Machine code for each, and PTX of the last for what comes after."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def kernels(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in (root / "csrc/cuda").glob("*.cu"))


def headers(root: Path) -> list[Path]:
    return sorted(path for ending in ("*.h", "*.cuh") for path in (root / "csrc").rglob(ending))


def run(command: list[str], root: Path, what: str) -> str:
    try:
        done = subprocess.run(
            command, cwd=root, env={**os.environ, "LC_ALL": "C"}, text=True, errors="replace", capture_output=True
        )
    except OSError as error:
        raise BuildError(f"{Path(command[0]).name}: {error.strerror}") from error
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        told = " | ".join([line.strip() for line in lines if "error" in line.lower()][:3] or lines[-1:])
        raise BuildError(f"{what} failed: {told[:600]}")
    return done.stdout + done.stderr


def python_header() -> str:
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        raise BuildError("the headers of Python are missing (Python.h; Debian and Ubuntu: python3-dev)")
    return folder


def build(root: Path, target: Path, archs: tuple[str, ...], pybind11_include: str, nvcc: str) -> dict:
    """Compiles and links `target`, all sources at the same time; -> what to remember of the build.

    root: the folder that holds csrc/.
    """
    cxx = os.environ.get("CXX", "").split() or [next((c for c in ("g++", "c++", "clang++") if shutil.which(c)), "")]
    if not shutil.which(cxx[0]):
        raise BuildError(f"no C++ compiler: {'CXX=' + cxx[0] if cxx[0] else 'none of g++, c++, clang++'} was not found")
    host = ["-ccbin", cxx[0]] if os.environ.get("CXX") else []
    python = python_header()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            ([nvcc, *host, *FLAGS, *gencode(archs), "-Xcompiler", "-fPIC,-fvisibility=hidden"], source)
            for source in kernels(root)
        ]
        plain = [*cxx, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Icsrc"]
        jobs.append(([*plain, f"-I{pybind11_include}", f"-I{python}"], BINDINGS))
        objects = [str(Path(folder, f"{Path(source).stem}.o")) for _, source in jobs]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            started = [
                pool.submit(run, [*command, "-c", source, "-o", made], root, f"compiling {source}")
                for (command, source), made in zip(jobs, objects, strict=True)
            ]
            for one in started:
                one.result()
        run([nvcc, *host, "-shared", "-cudart", "static", *objects, "-o", str(target)], root, "linking _C_cuda")
    version = run([nvcc, "--version"], root, "asking nvcc for its version")
    found = re.search(r"V([\d.]+)", version)
    return {"nvcc": found[1] if found else "unknown", "archs": list(archs)}
