"""The CPU driver: pytest-benchmark over bench/cases.py, accuracy first.

OMP_NUM_THREADS=1 pytest bench/test_cases.py -k small-l197 --benchmark-json=base.json
python -m bench ab base.json head.json
"""

import pytest

from bench.cases import cases
from bench.worker import relative_error

pytest.importorskip("pytest_benchmark")


@pytest.mark.parametrize("case", cases("cpu"), ids=lambda case: f"{case['op']}-{case['shape']}-{case['backend']}")
def test_case(case, benchmark):
    call, truth = case["make"]()
    assert relative_error(call(), truth()) <= case["tolerance"], "no time is given for a wrong result"
    benchmark.extra_info.update({key: case[key] for key in ("op", "shape", "backend")})
    benchmark(call)
