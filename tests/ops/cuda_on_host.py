"""The CUDA extension of fibers instead of threads, compiled by the host's compiler: see cuda_host.h."""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from endomamba import _nvcc
from endomamba.ops import _extension_cuda
from tests.ops import backends as on

ROOT = Path(__file__).resolve().parents[2]
needs_compiler = pytest.mark.skipif(
    not on.PLAIN or shutil.which("g++") is None or _extension_cuda._pybind11() is None,
    reason="needs g++ and pybind11, in the plain run",
)


@pytest.fixture(scope="module")
def host_module(tmp_path_factory):
    """endomamba._C_cuda of fibers instead of threads, its frame kernel for 96 channels; one for all workers."""
    return built("host", ["-DENDOMAMBA_96_ONLY"], tmp_path_factory)


@pytest.fixture(scope="module")
def whole_host_module(tmp_path_factory):
    """The same for every size."""
    return built("whole_host", [], tmp_path_factory)


def built(name: str, more: list[str], tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if os.environ.get("PYTEST_XDIST_WORKER") else folder
    target = folder / f"{name}_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    with _extension_cuda._locked(folder / f"{name}.lock"):
        if not target.exists():
            fresh = target.with_suffix(".tmp")
            flags = ["-std=c++17", "-O0", "-g0", "-shared", "-fPIC", "-DENDOMAMBA_HOST", "-Icsrc", "-Itests/ops"]
            flags += ["-fsanitize=alignment", *more]
            include = [f"-I{_extension_cuda._pybind11()}", f"-I{sysconfig.get_path('include')}"]
            sources = ["-x", "c++", "-include", "cuda_host.h", *_nvcc.kernels(ROOT), _nvcc.BINDINGS]
            subprocess.run(["g++", *flags, *include, *sources, "-o", str(fresh)], cwd=ROOT, check=True)
            fresh.rename(target)
    # pybind11 hands out the module that it has under a name, whatever the file
    spec = importlib.util.spec_from_file_location(f"{name}._C_cuda", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
