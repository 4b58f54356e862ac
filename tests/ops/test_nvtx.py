"""NVTX ranges: around every op and what it calls, gone afterwards, invisible to torch.compile and opcheck."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.library import opcheck

from endomamba.ops import _backend, _nvtx, add_rms_norm, mixer_inner, nvtx_ranges, selective_scan
from endomamba.ops.selective_scan.op import selective_scan_op


@pytest.fixture
def said(monkeypatch):
    """What NVTX is told; a push is its label, a pop is "."."""
    words: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "mark", lambda text: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda text: words.append(text))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: words.append("."))
    return words


def scan_inputs(requires_grad=False):
    torch.manual_seed(0)
    x, dt = (torch.randn(1, 3, 4, requires_grad=requires_grad) for _ in range(2))
    return x, dt, -torch.rand(4, 2), torch.randn(1, 3, 2), torch.randn(1, 3, 2)


def test_forward_and_backward_have_ranges(said):
    with nvtx_ranges():
        selective_scan(*scan_inputs(True), backend="reference")[0].sum().backward()
    assert said == ["endomamba::selective_scan reference", ".", "endomamba::selective_scan_backward reference", "."]


def test_ranges_within_a_mixer(said):
    d, n, r = 4, 2, 1
    values = (torch.randn(1, 3, 2 * d), torch.randn(d, 4), None, torch.randn(r + 2 * n, d), torch.randn(d, r))
    with nvtx_ranges(), torch.inference_mode():
        mixer_inner(*values, None, -torch.rand(d, n), None, backend="reference")
    inner = ["endomamba::causal_conv1d reference", ".", "endomamba::selective_scan reference", "."]
    assert said == ["endomamba::mixer_inner reference", *inner, "."]


def test_a_range_of_ones_own(said):
    with _nvtx.nvtx_range("forward"):
        pass
    with nvtx_ranges(), _nvtx.nvtx_range("forward"):
        selective_scan(*scan_inputs(), backend="reference")
    assert said == ["forward", "endomamba::selective_scan reference", ".", "."]


def test_off_is_the_plain_function(said):
    """The very object that is called without this module, so off costs 0 ns, not little."""
    before = {op: dict(table) for op, table in _backend.TABLES.items()}
    with nvtx_ranges():
        assert all(_backend.TABLES[op][name] is not row for op, table in before.items() for name, row in table.items())
    assert before == _backend.TABLES
    selective_scan(*scan_inputs(), backend="reference")
    assert said == []


def test_an_error_closes_its_range(said, monkeypatch):
    def fails(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        _nvtx.ranged("label", fails)()
    assert said == ["label", "."]
    before = dict(_backend.TABLES["add_rms_norm"])
    with pytest.raises(ZeroDivisionError), nvtx_ranges():
        fails()
    assert before == _backend.TABLES["add_rms_norm"]


def test_compile_and_opcheck_see_nothing(said):
    with nvtx_ranges():
        call = torch.compile(partial(selective_scan, backend="reference"), fullgraph=True, backend="eager")
        assert torch.equal(call(*scan_inputs())[0], selective_scan(*scan_inputs(), backend="reference")[0])
        assert said.count("endomamba::selective_scan reference") == 2
        x, dt, A, B, C = scan_inputs()
        args = (x, dt, A, B[:, :, None], C[:, :, None], *[None] * 6)
        flags = (True, False, 0, 0, False, False, False, "auto", "reference")
        opcheck(selective_scan_op, (*args, *flags), test_utils=("test_schema", "test_faketensor"))


def test_without_nvtx_it_says_so(monkeypatch):
    def missing(text):
        raise RuntimeError("NVTX functions not installed.")

    monkeypatch.setattr(torch.cuda.nvtx, "mark", missing)
    with pytest.raises(RuntimeError, match="nvtx_ranges: this torch has no NVTX"), nvtx_ranges():
        pass


def test_the_variable():
    """In a process of its own, since it is read once; NVTX is a stand-in, as above."""
    code = (
        "import torch; n = torch.cuda.nvtx; n.mark, n.range_push, n.range_pop = str, print, int\n"
        "import endomamba.ops as ops; ops.add_rms_norm(torch.ones(2, 4), torch.ones(4), backend='reference')"
    )
    env = os.environ | {_nvtx.VARIABLE: "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines() == ["endomamba::add_rms_norm reference"]


@pytest.mark.parametrize("value", ["", "0"])
def test_the_variable_off(value, monkeypatch):
    monkeypatch.setenv(_nvtx.VARIABLE, value)
    monkeypatch.setattr(_nvtx, "start", lambda: pytest.fail("ranges are on"))
    _nvtx.start_if_asked()


def test_a_wrong_variable_is_refused(monkeypatch):
    monkeypatch.setenv(_nvtx.VARIABLE, "yes")
    with pytest.raises(ValueError, match="must be 0 or 1, got 'yes'"):
        _nvtx.start_if_asked()


def test_ranges_do_not_double(said):
    with nvtx_ranges():
        with nvtx_ranges():
            pass
        add_rms_norm(torch.ones(2, 4), torch.ones(4), backend="reference")
    assert said == ["endomamba::add_rms_norm reference", "."]
