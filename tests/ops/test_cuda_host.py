"""The CUDA kernels' arithmetic without a GPU: compiled for the host (cuda_host.h), beside the fp64 reference.

It proves which element every lane reads, sums and writes, and that no barrier is missing between two lanes; not speed,
not ex2.approx.
"""

from dataclasses import replace

import pytest
import torch

from endomamba.ops import _cuda, _scan_cuda
from endomamba.ops._scan import CHUNK
from endomamba.ops.bidirectional_scan.op import bidirectional_scan_op
from endomamba.ops.frame_step import frame_step
from endomamba.ops.selective_scan.op import selective_scan_op
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops import test_causal_conv1d as conv
from tests.ops import test_mixer_inner as mixer
from tests.ops.cuda_on_host import needs_compiler
from tests.ops.scan_cases import cast, check_accuracy, dtype_id, make, run, scan

pytestmark = needs_compiler

# What changes one thing of b2 l9 d12: lengths around tiles of 8 and chunks of 64, channels around a warp's 32,
# alignment (d = 12 copies 8 bytes wide in 16 bits, d = 5 one element at a time), absent operands, the walks.
ROWS = {
    "base": {},
    **{f"l{l}": {"l": l} for l in (1, 2, 8, 17)},
    "l65": {"l": 65, "b": 1},
    "d5": {"d": 5},
    "d40": {"d": 40, "b": 1},
    "bare": {"absent": ("D", "z", "dt_bias", "initial_state", "D_b", "dt_bias_b", "initial_state_b")},
    "time": {"order": "time", "frames": 3},
    "out-fp32": {"out_dtype": torch.float32},
    "no-softplus": {"dt_softplus": False},
    "scale": {"scale": 0.5},
    "reverse": {"reverse": True},
    "reverse-time": {"reverse": True, "order": "time", "frames": 3},
}  # fmt: skip
BACK_ROWS = ROWS | {"b9": {"b": 9, "l": 3}}  # more sequences than workers
ONE_WAY, TWO_WAY = ("reverse", "reverse-time"), ("scale",)


@pytest.fixture(params=["walk", "frame"])
def kernel(request, host_module, monkeypatch):
    """The CUDA back end runs here, on one of its two kernels wherever that can."""
    monkeypatch.setattr(_cuda, "load", lambda: host_module)
    monkeypatch.setattr(_cuda, "missing", lambda: "")
    monkeypatch.setattr(_cuda, "elsewhere", lambda x: [])
    monkeypatch.setattr(_cuda, "stream", lambda device: 0)
    monkeypatch.setattr(_cuda, "processors", lambda device: 7 if request.param == "frame" else 0)
    monkeypatch.setattr(_cuda, "shared_memory", lambda device: 99 * 1024)
    monkeypatch.setattr(_scan_cuda, "FRAME", _scan_cuda.FRAME | {"least": 1, "warps": 100})
    return request.param


def inputs_of(row: str, directions: int, dtype: torch.dtype) -> dict:
    inputs = make(**({"n": 16, "dtype": dtype, "directions": directions} | BACK_ROWS[row]))
    if not inputs.get("dt_softplus", True):  # then dt itself must be positive
        for side in ("", "_b")[:directions]:
            inputs["dt" + side] = 0.05 * torch.nn.functional.softplus(inputs["dt" + side])
            inputs["dt_bias" + side] = torch.exp(inputs["dt_bias" + side])
    return inputs


CASES = [
    (row, directions, dtype)
    for row in BACK_ROWS
    for directions in (1, 2)
    for dtype in on.DTYPES.values()
    if row not in (TWO_WAY if directions == 1 else ONE_WAY) and (row == "base" or dtype != torch.float16)
]


def case_id(value) -> str:
    return dtype_id(value) if isinstance(value, torch.dtype) else str(value)


@pytest.mark.parametrize("row, directions, dtype", [case for case in CASES if case[0] in ROWS], ids=case_id)
def test_forward(kernel, row, directions, dtype):
    inputs = inputs_of(row, directions, dtype)
    with torch.no_grad():
        got = scan(inputs, backend="cuda")
        eager = scan(inputs, backend="reference")
        truth = scan(cast(inputs, torch.float64) | {"out_dtype": None}, backend="reference")
    for name, *values in zip(("y", "final_state", "final_state_b"), got, eager, truth):
        assert_as_accurate_as_eager(name, *values)


@pytest.mark.parametrize("directions", [1, 2])
def test_the_order_of_lanes_changes_no_bit(kernel, host_module, directions):
    inputs = inputs_of("base", directions, torch.float32)
    found = []
    for descending in (False, True):
        host_module.descending(descending)
        with torch.no_grad():
            found.append(scan(inputs, backend="cuda"))
    host_module.descending(False)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("reverse", [False, True])
def test_chunk_states(kernel, reverse):
    """Those of the reference: the state before every 64th token, in walking order."""
    inputs = make(b=2, l=2 * CHUNK + 1, d=5, n=16)
    args = [inputs[k] for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")]
    args[3], args[4] = args[3].unsqueeze(2), args[4].unsqueeze(2)
    flags = (None, None, True, reverse, 0, 0, False, True, False, "auto")
    got, want = (selective_scan_op(*args, *flags, backend)[2] for backend in ("cuda", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_chunk_states_both_ways(kernel):
    inputs = make(b=1, l=CHUNK + 3, d=5, n=16, directions=2)
    names = ("x", "dt", "A", "B", "C", "x_b", "dt_b", "A_b", "B_b", "C_b", "D", "D_b", "z", "dt_bias", "dt_bias_b")
    values = inputs | {k: inputs[k].unsqueeze(2) for k in ("B", "C", "B_b", "C_b")}
    args = [values[k] for k in (*names, "initial_state", "initial_state_b")]
    flags = (None, None, 1.0, True, 0, 0, False, True, False, "auto")
    got, want = (bidirectional_scan_op(*args, *flags, backend)[3:] for backend in ("cuda", "reference"))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


walk = pytest.mark.parametrize("kernel", ["walk"], indirect=True)  # the backward is one kernel


@walk
@pytest.mark.parametrize("row, directions, dtype", CASES, ids=case_id)
def test_backward(kernel, row, directions, dtype):
    check_accuracy(inputs_of(row, directions, dtype), "cuda")


@walk
@pytest.mark.parametrize("directions", [1, 2])
def test_the_order_of_lanes_changes_no_bit_of_a_gradient(kernel, host_module, directions):
    inputs = inputs_of("b9", directions, torch.float32)
    found = []
    for descending in (False, True):
        host_module.descending(descending)
        found.append(run(inputs, backend="cuda"))
    host_module.descending(False)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


# a piece is 32 steps, a lane two channels, a warp 64
CONV_CASES = [
    case for case in (*conv.CASES, *(replace(conv.BASE, b=1, l=l) for l in (1, 2, 32, 35, 66)))
    if case.w == 4 and not case.lengths and case.b < 300
]  # fmt: skip


@walk
@pytest.mark.parametrize("both", [False, True], ids=["causal", "both"])
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_convolution(kernel, case, both):
    if not (both and case.reverse):
        conv.assert_accurate(case, "cuda", both)


@walk
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "strided"])
def test_convolution_of_any_layout(kernel, layout):
    conv.assert_accurate(replace(conv.BASE, dtype="bf16", layout=layout), "cuda")


def test_what_the_convolution_refuses(kernel):
    for case in (replace(conv.BASE, w=3), replace(conv.BASE, lengths=(4, 5))):
        with pytest.raises(NotImplementedError, match=r"taps, the kernels have 4|cu_seqlens is not supported"):
            conv.run(case, conv.make(case), "cuda")


@walk
@pytest.mark.parametrize("both", [False, True], ids=["causal", "both"])
def test_mixer(kernel, both):
    """mixer_inner is its parts in every gradient, through the strided views that it hands to the kernels."""
    if both:
        mixer.test_bidirectional_equals_its_parts_in_every_gradient("base", "cuda")
    else:
        mixer.test_causal_equals_its_parts_in_every_gradient("base", "cuda")


def test_frame_step(kernel):
    p = mixer.parameters(24, 16, 3)
    xz, *states = mixer.inputs(2, 5, 24, 16)
    found = []
    for backend in ("cuda", "reference"):
        own = [state.clone() for state in states]
        found.append((frame_step(xz, *own, *p, backend=backend), *own))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
