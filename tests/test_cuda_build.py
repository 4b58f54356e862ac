"""csrc/cuda compiles for every architecture a wheel has, within bounds of registers and spills."""

import re
import subprocess
from pathlib import Path

import pytest

from endomamba import _nvcc

ROOT = Path(__file__).resolve().parents[1]
NVCC = _nvcc.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)")
ARCHS = [arch if arch == "90" else pytest.param(arch, marks=pytest.mark.slow) for arch in _nvcc.WHEEL_ARCHS]
# By kernel: (registers, bytes of spill stores) at most.  The walk's 96 registers leave room for 20 warps a
# multiprocessor; two directions in one block of 25 warps or 16 cannot have more than 80 or 128 each.  The backward's
# 168 leave room for 12 warps.
BOUNDS = {
    "scan_walk_kernel": (96, 32),
    "scan_frame_kernel": (128, 64),
    "scan_back_kernel": (168, 96),
    "scan_sums_kernel": (40, 0),
    "conv_forward_kernel": (96, 0),
    "conv_backward_kernel": (160, 32),
}


def resources(source: str, arch: str, tmp_path: Path) -> dict[str, list[tuple[int, int]]]:
    """kernel -> (registers, bytes of spill stores) of each of its instances, from ptxas."""
    flags = [*_nvcc.FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v", "-cubin"]
    done = subprocess.run(
        [NVCC, *flags, source, "-o", str(tmp_path / "kernel.cubin")], cwd=ROOT, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for part in done.stderr.split("Compiling entry function")[1:]:
        name = next(name for name in BOUNDS if name in part)
        registers, spilled = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes spill stores", part)
        found.setdefault(name, []).append((int(registers[1]), int(spilled[1])))
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", _nvcc.kernels(ROOT))
def test_registers_and_spills(source, arch, tmp_path):
    found = resources(source, arch, tmp_path)
    assert found
    for name, instances in found.items():
        most = tuple(max(values) for values in zip(*instances, strict=True))
        assert all(have <= bound for have, bound in zip(most, BOUNDS[name], strict=True)), f"{name}: {most}"
