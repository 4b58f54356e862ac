"""The gates without a clock, with a spill, a kernel more and 5 % more instructions planted: found each time."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import exact
from bench.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
DATA = json.loads((ROOT / "tests" / "data" / "triton_resources.json").read_text())
TARGET = "sm_90"
NOW = {"columns": DATA["columns"], "rows": DATA["targets"][TARGET]}


def planted(row: str, **changes: int) -> list[str]:
    """What the gate says of data in which one row takes more."""
    head = copy.deepcopy(NOW)
    for column, more in changes.items():
        head["rows"][row][head["columns"].index(column)] += more
    return [str(finding) for finding in exact.compare_triton(NOW, head, TARGET)]


def test_equal_kernels_are_no_finding():
    assert exact.compare_triton(NOW, copy.deepcopy(NOW), TARGET) == []


@pytest.mark.parametrize("column", exact.RESOURCES)
def test_more_of_anything_in_any_kernel_is_found(column):
    for row in NOW["rows"]:
        (told,) = planted(row, **{column: 8})
        was = NOW["rows"][row][NOW["columns"].index(column)]
        assert f"{column} {was} -> {was + 8}" in told and f"op={row.split('/')[0]}" in told


def test_less_is_no_finding():
    for row, numbers in NOW["rows"].items():
        if numbers[0] > 8:
            assert planted(row, registers=-8) == []


def test_a_kernel_more_in_a_call_is_found():
    for row in NOW["rows"]:
        head = copy.deepcopy(NOW)
        head["rows"][f"{row}#9"] = head["rows"][row]
        (told,) = exact.compare_triton(NOW, head, TARGET)
        assert told.op == row.split("/")[0] and "kernels" in told.says


def test_a_kernel_that_no_longer_compiles_is_found():
    row, head = next(iter(NOW["rows"])), copy.deepcopy(NOW)
    head["rows"][row] = "CompilationError: planted"
    (told,) = exact.compare_triton(NOW, head, TARGET)
    assert "does not compile: CompilationError: planted" in told.says


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_spill_by_fewer_registers_is_found(tmp_path, monkeypatch):
    """One case compiled for real, from a tree whose launch table leaves the backward scan 64 registers."""
    for name in ("endomamba", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    case = "_scan_triton/bwd-n3-fp32"
    table = tmp_path / "endomamba" / "ops" / "_scan_triton_table.py"
    lines = table.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("BWD = "))
    choice = json.loads(lines[at].removeprefix("BWD = "))
    lines[at] = f"BWD = {choice | {'maxnreg': 64}}"
    table.write_text("\n".join(lines) + "\n")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "tools/triton_resources.py", "--target", TARGET, "--only", case, "--jobs", "1"]
    subprocess.run([*command, "--out", str(tmp_path / "rows.json")], cwd=tmp_path, check=True)
    head = json.loads((tmp_path / "rows.json").read_text())
    found = exact.compare_triton(NOW, {"columns": head["columns"], "rows": head["targets"][TARGET]}, TARGET)
    assert any("_scan_bwd_kernel" in told.shape and "spill_bytes" in told.says for told in found), found


# ---- launches ----------------------------------------------------------------------------------------------------


def test_one_operator_more_in_a_frame_is_found(monkeypatch):
    from endomamba.models.endomamba import EndoMamba

    name = "frame tiny-l197-fp32 cpu"
    worker = Worker(str(ROOT / "bench" / "cases.py"), "cpu", threads=1)
    before, again = (dict(worker.count(name)["names"]) for _ in range(2))
    assert sum(before.values()) > 100 and exact.more_launched(before, again, "operators") is None
    step = EndoMamba.step
    monkeypatch.setattr(EndoMamba, "step", lambda self, frames, state: step(self, frames.clone(), state))
    told = exact.more_launched(before, worker.count(name)["names"], "operators")
    total = sum(before.values())
    assert told.startswith(f"operators {total} -> {total + 1}") and told.endswith("aten.clone.default +1")


def test_fewer_launches_are_no_finding():
    assert exact.more_launched({"a": 2, "b": 1}, {"a": 1, "c": 1}, "kernels") is None
    assert exact.more_launched({"a": 2}, {"c": 3}, "kernels") == "kernels 2 -> 3 (ratio=1.500): c +3"


# ---- instructions ------------------------------------------------------------------------------------------------

CALLGRIND = """\
version: 1
desc: Trigger: Client Request: scan one
events: Ir
ob=(1) /side/pkg/_C.so
fl=(1) ???
fn=(1) forward_task(long)
0 {loop}
cfn=(2) load(float*)
calls=10 0
0 999999
+3 50
fn=(2)
0 200
cob=(2) /usr/lib/libgomp.so.1
cfn=(3) spin
calls=1 0
0 888888
ob=(2)
fn=(3)
0 888888
ob=(3) /elsewhere/_C.so
fn=(4) not ours
0 777
ob=(1)
fn=(1)
* 7
"""


def counts(loop: int) -> dict[str, int]:
    return exact.self_costs(CALLGRIND.format(loop=loop), "/side")


def test_only_the_own_instructions_of_own_objects_count():
    assert counts(1000) == {"forward_task(long)": 1057, "load(float*)": 200}


@pytest.mark.parametrize("loop", [1000, 10**6, 123_456_789])
def test_five_percent_more_instructions_are_found(loop):
    base, head = counts(loop), counts(loop + (loop + 257) // 20 + 1)
    told = exact.more_instructions(base, head)
    assert told.startswith("ratio=1.05") and told.endswith("most of it in forward_task(long)")
    assert exact.more_instructions(base, base) is None and exact.more_instructions(head, base) is None


def test_new_compiled_code_is_found():
    assert "ratio=inf" in exact.more_instructions({}, counts(10))


def test_without_valgrind_it_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(exact.Skipped, match="valgrind is not installed"):
        exact.require_callgrind()


def test_exact_counts_are_kept(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"count": len(made)}

    assert [exact.kept(tmp_path, ["a"], make) for _ in range(2)] == [{"count": 1}] * 2
    assert exact.kept(tmp_path, ["b"], make) == {"count": 2}


# ---- the accuracy that comes before time -------------------------------------------------------------------------


def test_errors_see_nan_and_other_shapes():
    from bench.worker import relative_error

    truth = [torch.tensor([3.0, 4.0], dtype=torch.float64), torch.ones(2, dtype=torch.float64)]
    good = {"y": truth[0].float(), "state": None, "h": truth[1].float()}
    assert relative_error(good, truth) == 0
    assert relative_error((truth[0] * 1.1, truth[1]), truth) == pytest.approx(0.1)
    assert not relative_error((truth[0] * float("nan"), truth[1]), truth) <= 1
    assert relative_error(truth[:1], truth) == float("inf")
