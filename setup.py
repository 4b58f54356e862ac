"""Builds endomamba._C, the CPU kernels: pybind11 and OpenMP, no torch header, never a reason for an install to fail.

endomamba._C_cuda is built at first use, from the sources that a wheel carries in endomamba/_src.  With
ENDOMAMBA_BUILD_CUDA=1 it is built here, for all of _nvcc.WHEEL_ARCHS, and the build fails where it cannot be.

csrc/bindings.cpp and csrc/cpu/dispatch.cpp are compiled once, every other csrc/cpu/*.cpp once per instruction-set
level.  Where that cannot be done the package installs without _C, and endomamba/_build_info.json holds the compiler's
own words, which `endomamba info` shows.  Everything else about the package stands in pyproject.toml.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ONCE = ("csrc/bindings.cpp", "csrc/cpu/dispatch.cpp")

# Numbers must not depend on the machine that compiled: no -march=native, no -ffast-math.
FLAGS = ["-O3", "-g0", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
LEVELS = {"baseline": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", *LEVELS["avx2"]]
    LEVELS["avx512bf16"] = ["-mavx512bf16", *LEVELS["avx512"]]


CUDA = "endomamba._C_cuda"


def load_nvcc():
    """endomamba/_nvcc.py alone: the package itself needs torch."""
    spec = importlib.util.spec_from_file_location("_nvcc", ROOT / "endomamba" / "_nvcc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildError(Exception):
    """Why there is no _C, in one short sentence without a path of this machine."""


def run(command: list[str], what: str) -> str:
    try:
        plain = {**os.environ, "LC_ALL": "C"}  # messages in English and ASCII
        done = subprocess.run(command, cwd=ROOT, env=plain, text=True, errors="replace", capture_output=True)
    except OSError as error:
        raise BuildError(f"{Path(command[0]).name}: {error.strerror}") from error
    if done.returncode:
        sys.stderr.write(done.stderr)
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        told = " | ".join([line.strip() for line in lines if "error" in line.lower()][:3] or lines[-1:])
        told = re.sub(r"""(?<![\w.])/(?:[^\s:'"()]*/)""", "", told)  # absolute paths keep their last part only
        raise BuildError(f"{what} failed: {told[:400]}")
    return done.stdout


def program(command: list[str]) -> list[str]:
    """The leading words that name the compiler: ["ccache", "g++", "-pthread"] -> ["ccache", "g++"]."""
    return command[: next((i for i, word in enumerate(command) if word.startswith("-")), len(command))]


def compiler_command(compiler) -> list[str]:
    command = list(getattr(compiler, "compiler_so_cxx", None) or [])
    if not command:  # MSVC, or a setuptools that pyproject.toml would not have taken
        raise BuildError("the kernels need GCC or Clang, driven by setuptools 77 or newer")
    name = program(command)
    if "CXX" not in os.environ and not shutil.which(name[0]):  # Python's own build compiler is not on this machine
        found = next((other for other in ("c++", "g++", "clang++") if shutil.which(other)), None)
        if found is None:
            raise BuildError(f"no C++ compiler: none of {name[0]}, c++, g++, clang++ was found")
        command[: len(name)] = [found]
    elif not shutil.which(name[0]):
        raise BuildError(f"no C++ compiler: CXX={Path(name[0]).name} was not found")
    return command


def accepts(command: list[str], flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() { return 0; }\n")
        try:
            run([*command, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))], "probe")
        except BuildError:
            return False
    return True


def headers_digest() -> bytes:
    files = sorted(path for ending in ("*.h", "*.hpp") for path in (ROOT / "csrc").rglob(ending))
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)


def compile_one(command: list[str], source: str, folder: Path, shared: bytes) -> Path:
    """Compiles unless the same command on the same text has an object already: its digest is in the object's name."""
    key = hashlib.sha256(shared + (ROOT / source).read_bytes() + "\0".join(command).encode()).hexdigest()[:16]
    target = folder / f"{Path(source).stem}.{key}.o"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(f".{os.getpid()}.tmp")
        run([*command, "-c", source, "-o", str(fresh)], f"compiling {source}")
        os.replace(fresh, target)  # two builds at once never see half an object
    os.utime(target)
    return target


def drop_old(objects: Path, days: float = 2.0) -> None:
    for path in objects.rglob("*.o"):
        if path.stat().st_mtime < time.time() - days * 86400:
            path.unlink(missing_ok=True)


class BuildKernels(build_ext):
    def run(self) -> None:
        super().run()
        if not self.inplace:
            self.copy_cuda_sources()
        if self.inplace:
            shutil.copyfile(self.info_path(), ROOT / "endomamba" / "_build_info.json")
            for file in map(Path, self.get_outputs()):  # no older _C stays behind: these sources, or nothing
                if not Path(self.build_lib, "endomamba", file.name).exists():
                    (ROOT / "endomamba" / file.name).unlink(missing_ok=True)

    def copy_cuda_sources(self) -> None:
        """What `endomamba.ops._extension_cuda` builds from: an installed package has no csrc/ beside it."""
        nvcc, target = load_nvcc(), Path(self.build_lib, "endomamba", "_src")
        shutil.rmtree(target, ignore_errors=True)
        for source in (*nvcc.headers(ROOT), *(ROOT / name for name in (*nvcc.kernels(ROOT), nvcc.BINDINGS))):
            if source.is_file():
                copy = target / source.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)

    def build_cuda(self, target: Path) -> None:
        nvcc = load_nvcc()
        compiler = nvcc.find_nvcc()
        if compiler is None:
            raise SystemExit("ENDOMAMBA_BUILD_CUDA=1: no nvcc was found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)")
        import pybind11

        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            built = nvcc.build(ROOT, target, nvcc.archs_named() or nvcc.WHEEL_ARCHS, pybind11.get_include(), compiler)
        except nvcc.BuildError as error:
            raise SystemExit(f"ENDOMAMBA_BUILD_CUDA=1: {error}") from error
        print(f"endomamba: {target.name} for sm_{', sm_'.join(built['archs'])} with nvcc {built['nvcc']}")

    def info_path(self) -> Path:
        return Path(self.build_lib, "endomamba", "_build_info.json")

    def build_extension(self, ext: Extension) -> None:
        info = {"version": self.distribution.get_version()}
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        if ext.name == CUDA:
            return self.build_cuda(target)
        try:
            info |= self.build_kernels(target)
        except BuildError as error:
            info["error"] = str(error)
            print(f"endomamba: installed without its compiled CPU kernels: {error}", file=sys.stderr)
        self.info_path().parent.mkdir(parents=True, exist_ok=True)
        self.info_path().write_text(json.dumps(info, indent=2) + "\n")

    def build_kernels(self, target: Path) -> dict:
        try:
            import pybind11
        except ImportError as error:
            raise BuildError("pybind11 is not installed (--no-build-isolation leaves that to you)") from error
        command = compiler_command(self.compiler)
        name = run([*program(command), "--version"], "asking the compiler for its version").splitlines()[0]
        openmp = ["-fopenmp"] if accepts(command, ["-fopenmp"]) else []
        levels = {level: flags for level, flags in LEVELS.items() if accepts(command, flags)}

        base = [*command, *FLAGS, *openmp]
        include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-Icsrc"]
        have = [f"-DENDOMAMBA_HAS_{level.upper()}" for level in levels if level != "baseline"]
        repeated = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
        objects = ROOT / "build" / "objects"
        jobs = [([*base, *include, *have], source, objects / "once") for source in ONCE]
        jobs += [
            ([*base, *flags, *have, f"-DENDOMAMBA_LEVEL={level}"], source, objects / level)
            for level, flags in levels.items()
            for source in repeated
            if source not in ONCE
        ]
        shared = headers_digest() + f"{name} pybind11 {pybind11.__version__}".encode()
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(1, workers)) as pool:
            started = [pool.submit(compile_one, *job, shared) for job in jobs]
            try:
                built = [one.result() for one in started]
            except BuildError:
                pool.shutdown(cancel_futures=True)  # the first failure is reason enough
                raise

        # Baseline objects come first: of an inline function that several levels emit the linker keeps the first, which
        # every machine can run.
        linker = list(self.compiler.linker_so_cxx)
        linker[: len(program(linker))] = program(command)
        target.parent.mkdir(parents=True, exist_ok=True)
        run([*linker, *map(str, built), *openmp, "-o", str(target)], "linking")
        drop_old(objects)
        return {"compiler": name, "levels": list(levels), "openmp": bool(openmp)}


# `optional` tells setuptools that the file may be missing afterwards.
extensions = [Extension("endomamba._C", list(ONCE), optional=True)]
if os.environ.get("ENDOMAMBA_BUILD_CUDA") == "1":
    extensions.append(Extension(CUDA, [load_nvcc().BINDINGS]))
setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
