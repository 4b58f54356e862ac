"""The compiled CUDA kernels, `endomamba._C_cuda`: from the wheel, or built once at first use, or why they are missing.

ENDOMAMBA_CUDA=0: neither loaded nor built, for any call.
ENDOMAMBA_CUDA_CACHE: the folder that keeps what was built (default: endomamba in $XDG_CACHE_HOME or ~/.cache).
ENDOMAMBA_CUDA_ARCHS: the compute capabilities to build for, as "80 90" (default: that of the present GPU).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from .. import _nvcc

log = logging.getLogger("endomamba")
NAME = "endomamba._C_cuda"
PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def _bundled() -> ModuleType | None:
    try:
        from endomamba import _C_cuda
    except ImportError:
        return None
    return _C_cuda


def _root() -> Path | None:
    """The folder with csrc/: the package's own copy of it, or that of a checkout."""
    return next((root for root in (PACKAGE / "_src", PACKAGE.parent) if (root / _nvcc.BINDINGS).is_file()), None)


def _pybind11() -> str | None:
    """pybind11's headers: those of the package of that name, or those that torch brings."""
    found = importlib.util.find_spec("pybind11")
    if found is not None:
        import pybind11

        return pybind11.get_include()
    torch = importlib.util.find_spec("torch")
    folder = Path(torch.origin).parent / "include" if torch is not None and torch.origin else None
    return str(folder) if folder is not None and (folder / "pybind11" / "pybind11.h").is_file() else None


@functools.cache
def missing() -> str:
    """Why there are no CUDA kernels and none can be built; empty where there are or can be."""
    if os.environ.get("ENDOMAMBA_CUDA") == "0":
        return "switched off by ENDOMAMBA_CUDA=0"
    if _bundled() is not None:
        return ""
    wants = [] if _nvcc.find_nvcc() else ["no nvcc was found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"]
    if _root() is None:
        wants.append("the sources (csrc/) are not installed")
    if _pybind11() is None:
        wants.append("no headers of pybind11 (pip install pybind11)")
    return f"{NAME} is not built and cannot be: {', '.join(wants)}" if wants else ""


def cache_folder() -> Path:
    named = os.environ.get("ENDOMAMBA_CUDA_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "endomamba"


def _present() -> tuple[str, ...]:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return (f"{major}{minor}",)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process builds, the others wait for it."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(root: Path, nvcc: str, archs: tuple[str, ...]) -> str:
    files = [*_nvcc.headers(root), *(root / source for source in (*_nvcc.kernels(root), _nvcc.BINDINGS))]
    text = b"".join(hashlib.sha256(path.read_bytes()).digest() for path in (*files, Path(_nvcc.__file__)))
    about = (_nvcc.run([nvcc, "--version"], root, "asking nvcc for its version"), *archs, *_nvcc.FLAGS)
    return hashlib.sha256(text + "\0".join(about).encode()).hexdigest()[:16]


def built() -> Path:
    """The extension for this Python and GPU in the cache folder, compiled where it is not there yet."""
    why = missing()
    if why:
        raise RuntimeError(why)
    root, nvcc, archs = _root(), _nvcc.find_nvcc(), _nvcc.archs_named() or _present()
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        target = folder / f"_C_cuda.{_digest(root, nvcc, archs)}{suffix}"
        with _locked(folder / f"{target.name}.lock"):
            if not target.is_file():
                log.warning("building %s for sm_%s with %s, once, into %s", NAME, ", sm_".join(archs), nvcc, folder)
                fresh = target.with_name(f"{target.name}.{os.getpid()}.tmp")
                try:
                    _nvcc.build(root, fresh, archs, _pybind11(), nvcc)
                    os.replace(fresh, target)  # nobody ever sees half of it
                finally:
                    fresh.unlink(missing_ok=True)
    except OSError as error:
        raise RuntimeError(
            f"{NAME} cannot be built into {folder} ({error}): name a folder in ENDOMAMBA_CUDA_CACHE"
        ) from error
    except _nvcc.BuildError as error:
        raise RuntimeError(f"{NAME} could not be built: {error}") from error
    return target


@functools.cache
def load() -> ModuleType:
    """The module; the first call in a fresh cache takes the time of a compilation."""
    bundled = _bundled()
    if bundled is not None:
        return bundled
    spec = importlib.util.spec_from_file_location(NAME, built())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


@functools.cache
def usable() -> bool:
    """The module is there, or was built just now.  Where that fails, a warning says why, once."""
    try:
        load()
    except (RuntimeError, ImportError, OSError) as error:
        log.warning("the CUDA C++ kernels are not used: %s", error)
        return False
    return True
