"""What a user's environment meets: a light import, an install that survives without a compiler, pins that agree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import endomamba

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {
    "triton",
    "av",
    "timm",
    "torchvision",
    "torchmetrics",
    "einops",
    "tqdm",
    "pydicom",
    "PIL",
    "cv2",
    "pandas",
    "tensorboard",
}


def python(code: str, cwd: Path, path: str = "") -> str:
    env = {**os.environ, "PYTHONPATH": path or str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "endomamba",
        "endomamba.ops",
        "endomamba.models",
        "endomamba.stream",
        "endomamba.synthetic",
        "endomamba.train.recipes",
    ],
)
def test_import_needs_torch_alone(module, tmp_path):
    code = (
        f"import sys, torch.utils.flop_counter; old = set(sys.modules); import {module}; print(*set(sys.modules) - old)"
    )
    imported = {name.split(".")[0] for name in python(code, tmp_path).split()}  # flop_counter imports Triton itself
    assert "endomamba" in imported
    assert not imported & HEAVY


def test_import_needs_no_triton(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None; import endomamba.ops, endomamba.models, endomamba.stream; "
        "print(sorted(endomamba.ops.backend_info('cpu')['selective_scan']))"
    )
    assert "triton" in python(code, tmp_path)  # known, and said to be missing, not imported


def test_no_torch_header_in_csrc():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".hpp", ".cpp", ".cu", ".cuh")]
    assert files
    header = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10)[/"]', re.MULTILINE)
    assert [path.name for path in files if header.search(path.read_text())] == []


def test_version_stands_in_one_place():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "endomamba.__version__" }' in pyproject
    assert 'dynamic = ["version"]' in pyproject
    assert f"## [{endomamba.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_formatters_are_pinned_alike():
    for tool in ("ruff", "clang-format"):
        pins = {
            name: set(re.findall(rf"^[^#\n]*?\b{tool}==([\d.]+)", (ROOT / name).read_text(), re.MULTILINE))
            for name in ("pyproject.toml", ".pre-commit-config.yaml", "constraints.txt")
        }
        assert len(set.union(*pins.values())) == 1, (tool, pins)
        assert all(pins.values()), (tool, pins)


def test_kernels_are_compiled_where_there_is_a_compiler():
    """A kernel file that no longer compiles must not hide behind the install that succeeds all the same."""
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler on this machine")
    info = json.loads((ROOT / "endomamba" / "_build_info.json").read_text())
    assert "error" not in info
    assert info["version"] == endomamba.__version__
    assert info["levels"][0] == "baseline"
    python("import torch; from endomamba import _C", ROOT)


def checkout(folder: Path) -> Path:
    """What a source distribution holds, so that a build leaves this checkout alone."""
    for name in ("csrc", "endomamba"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "*.pyc", "_build_info.json"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def install(source: Path, target: Path, **env: str) -> dict:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    command = [*pip, "--target", str(target), str(source)]
    done = subprocess.run(command, env={**os.environ, **env}, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert not list(target.glob("endomamba/_C*")), "no extension can have been built"
    text = (target / "endomamba" / "_build_info.json").read_text()
    assert not re.search(r"(?<![\w.])/\w", text), f"a path of this machine: {text}"
    return json.loads(text)


def test_install_without_a_compiler(tmp_path):
    (tmp_path / "source").mkdir()
    target = tmp_path / "target"
    info = install(checkout(tmp_path / "source"), target, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert info == {"version": endomamba.__version__, "error": "no C++ compiler: CXX=c++ was not found"}
    assert (target / "endomamba" / "py.typed").exists()
    carried, own = (
        sorted(path.relative_to(root) for path in (root / "csrc").rglob("*") if path.suffix in (".cu", ".cuh"))
        for root in (target / "endomamba" / "_src", ROOT)
    )
    assert carried == own  # what the CUDA kernels are built from at first use
    assert (target / "endomamba" / "weights" / "nano-phases.safetensors").stat().st_size > 2**20

    code = """if True:
        import sys  # an editable install beside it would lend its own _C
        sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
        import torch
        from endomamba.ops import selective_scan
        x, dt, A, B = torch.randn(1, 3, 2), torch.rand(1, 3, 2), -torch.ones(2, 4), torch.randn(1, 3, 4)
        print(selective_scan(x, dt, A, B, B)[0].isfinite().all().item())
        try:
            selective_scan(x, dt, A, B, B, backend="cpu")
        except NotImplementedError as error:
            print(error)
    """
    works, why = python(code, tmp_path, path=str(target)).splitlines()
    assert works == "True"
    assert "no C++ compiler: CXX=c++ was not found" in why


def test_install_with_a_source_that_does_not_compile(tmp_path):
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler on this machine")
    (tmp_path / "source").mkdir()
    source = checkout(tmp_path / "source")
    shutil.rmtree(source / "csrc")
    (source / "csrc" / "cpu").mkdir(parents=True)
    (source / "csrc" / "bindings.cpp").write_text("int main() {}\n")
    (source / "csrc" / "cpu" / "dispatch.cpp").write_text("#error planted\n")
    info = install(source, tmp_path / "target")
    assert info["error"].startswith("compiling csrc/cpu/dispatch.cpp failed: csrc/cpu/dispatch.cpp:1:2: error:")
    assert "planted" in info["error"]
