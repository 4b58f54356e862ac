"""csrc/cuda compiles for every architecture a wheel has, within bounds of registers and spills.

In bf16 alone, which has every path of the others; the slow run compiles all dtypes.  Without nvcc they are skipped.
"""

import re
import subprocess
from pathlib import Path

import pytest

from endomamba import _nvcc

ROOT = Path(__file__).resolve().parents[1]
NVCC = _nvcc.find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)")
# By kernel: (registers, bytes of spill stores) at most.  The walk's 96 registers leave room for 20 warps a
# multiprocessor, the backward's 168 for 12; a frame's block of 19 warps cannot have more than 96 each, and both ways
# keep some of what only its end needs elsewhere.
BOUNDS = {
    "scan_walk_kernel": (96, 32),
    "scan_frame_kernel": (96, 96),
    "scan_back_kernel": (168, 96),
    "scan_sums_kernel": (40, 0),
    "conv_forward_kernel": (96, 0),
    "conv_backward_kernel": (160, 32),
    "frame_blocks_kernel": (168, 320),
}
ON = {("scan_walk_kernel", "86"): (128, 32)}  # whose multiprocessors hold 16 blocks of one warp, not 20


def resources(source: str, flags: tuple[str, ...], target: Path) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """(kernel, architecture) -> (registers, bytes of spill stores) of each of its instances, from ptxas."""
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in _nvcc.WHEEL_ARCHS]
    command = [NVCC, *_nvcc.FLAGS, *flags, *archs, "-Xptxas", "-v", "-fatbin", source, "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for part in done.stderr.split("Compiling entry function")[1:]:
        name, arch = re.match(r" '(\w+)' for 'sm_(\d+)'", part).groups()
        kernel = next((kernel for kernel in BOUNDS if kernel in name), None)
        assert kernel, f"{source} has a kernel without bounds: {name}"
        registers, spilled = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes spill stores", part)
        found.setdefault((kernel, arch), []).append((int(registers[1]), int(spilled[1])))
    return found


@pytest.mark.parametrize("dtypes", ["bf16", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("source", _nvcc.kernels(ROOT))
def test_registers_and_spills(source, dtypes, tmp_path):
    found = resources(source, ("-DENDOMAMBA_BF16_ONLY",) if dtypes == "bf16" else (), tmp_path / "kernels.fatbin")
    assert {arch for _, arch in found} == {*_nvcc.WHEEL_ARCHS}
    over = {
        (kernel, arch): most
        for (kernel, arch), instances in found.items()
        for most in [tuple(map(max, zip(*instances, strict=True)))]
        if any(have > bound for have, bound in zip(most, ON.get((kernel, arch), BOUNDS[kernel]), strict=True))
    }
    assert not over, f"(registers, spilled bytes) over {BOUNDS}: {over}"
