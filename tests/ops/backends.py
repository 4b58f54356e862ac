"""What the op tests run on: every test file takes its back ends, dtypes and random numbers from here.

| run | tensors | back ends |
|---|---|---|
| plain | CPU | reference, cpu |
| TRITON_INTERPRET=1 | CPU, no bf16: the interpreter has it wrong | triton |
| ENDOMAMBA_TEST_DEVICE=cuda | GPU | reference, triton, cuda |

The plain run has every test.  The other two have those with a `backend` among theirs and those marked `triton`.
"""

import os

import pytest
import torch

from endomamba.ops._backend import reasons
from endomamba.ops._triton import INTERPRET

DEVICE = "cuda" if os.environ.get("ENDOMAMBA_TEST_DEVICE") == "cuda" else "cpu"
PLAIN = not INTERPRET and DEVICE == "cpu"
NAMES = ("triton",) if INTERPRET else ("reference", "triton", "cuda") if DEVICE == "cuda" else ("reference", "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
if INTERPRET:
    del DTYPES["bf16"]
HALF = "fp16" if INTERPRET else "bf16"  # where one low precision is enough


def _params(op: str, *names: str):
    found = {name: reasons(op, name, torch.zeros(0, device=DEVICE)) for name in names if name in NAMES}
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(name, marks=pytest.mark.skipif(bool(why), reason=f"{name}: {'; '.join(why)}"))
            for name, why in found.items()
        ],
    )


def backends(op: str):
    """Parametrises `backend` with all that this run has."""
    return _params(op, "reference", "cpu", "triton", "cuda")


def compiled(op: str):
    """Without the reference."""
    return _params(op, "cpu", "triton", "cuda")


def native(op: str):
    """The C++ kernels alone: instruction sets, thread counts, bits that Triton does not promise."""
    return _params(op, "cpu")


# What splits few long sequences in time.
SPLITTING = ["triton"] if "triton" in NAMES else []


def slack(backend: str) -> float:
    """A factor on the accuracy rule: ex2.approx of a GPU errs by 2 ulp, exp of PyTorch by half of one."""
    return 2.0 if backend in ("triton", "cuda") and DEVICE == "cuda" else 1.0


too_large_interpreted = pytest.mark.skipif(INTERPRET, reason="too large for the interpreter")


def slow_interpreted(test):
    """For a test that takes the interpreter more than a few seconds."""
    return pytest.mark.slow(test) if INTERPRET else test


def rows(table, slow=()):
    """All of a table; where it is interpreted, those in `slow` are marked so."""
    return few(table, *(row for row in table if row not in slow))


def few(values, *quick, on_gpu=None):
    """All of them; where they are interpreted, those not named are slow, on a GPU those not in `on_gpu`."""
    kept = quick if INTERPRET else on_gpu if DEVICE == "cuda" and on_gpu is not None else values
    return [v if v in kept else pytest.param(v, marks=pytest.mark.slow) for v in values]


def examples(count: int) -> int:
    """How many draws hypothesis makes.  On a GPU nearly every one has kernels of its own, compiled for seconds each."""
    return min(count, 5) if INTERPRET else count // 3 if DEVICE == "cuda" else count


class Random:
    """Numbers drawn on the CPU, so that every device gets the same ones."""

    def __init__(self, seed: int):
        self.generator = torch.Generator("cpu").manual_seed(seed)

    def _draw(self, draw, *args, dtype=None) -> torch.Tensor:
        return draw(*args, generator=self.generator, dtype=dtype, device="cpu").to(DEVICE)

    def randn(self, *shape: int, dtype=None) -> torch.Tensor:
        return self._draw(torch.randn, shape, dtype=dtype)

    def rand(self, *shape: int, dtype=None) -> torch.Tensor:
        return self._draw(torch.rand, shape, dtype=dtype)

    def randint(self, high: int, *shape: int) -> torch.Tensor:
        return self._draw(torch.randint, high, shape, dtype=torch.int64)
