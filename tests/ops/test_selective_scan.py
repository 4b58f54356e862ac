"""selective_scan: the reference against hand, closed form and autograd; every back end against the reference.

The bugs of other scan kernels that these tests answer (A1 to A16 of the list kept with the plan):

| bug | test |
|---|---|
| A1 32-bit chunk-state offsets | test_a01_chunk_state_offsets |
| A2 32-bit operand offsets | test_a02_offsets_beyond_32_bits |
| A3 last state wrong for constant B | test_a03_final_state_with_constant_operands |
| A4 no gradient through the last state | test_a04_loss_on_the_final_state_only |
| A5 padded tail decays | test_a05_odd_lengths_with_a_gradient_at_the_end |
| A6, A7 no training with carried state | test_a06_a07_training_over_clips |
| A8 atomics | test_a08_repeated_calls_give_the_same_bits |
| A9 more than 65,535 channels | test_a09_seventy_thousand_channels |
| A10 all-zero gradients | test_a10_no_gradient_is_zero |
| A11 lengths 0 to 4 | test_as_accurate_as_eager[l0 .. l4] |
| A12 dtype mixes, autocast | test_a12_dtype_mixes |
| A13 narrow parametrisation | test_as_accurate_as_eager, test_a13_four_thousand_channels |
| A14 loose tolerances | test_a14_the_accuracy_rule_sees_three_percent |
| A15 combine order, complex input | test_split_anywhere, test_a15_complex_is_refused |
| A16 training path differs | test_a16_training_and_inference_agree |
"""

import math
import os
from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from endomamba.ops._scan import CHUNK, chunk_slot, chunk_states_shape, effective_plan, token_order
from endomamba.ops.selective_scan import reference, selective_scan
from endomamba.ops.selective_scan.op import selective_scan_backward_op, selective_scan_op
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops.backends import Random
from tests.ops.scan_cases import (
    DTYPES,
    HALF,
    INTERPRETED,
    ONE_WAY_ROWS,
    ROW_DTYPES,
    ROWS,
    assert_bitwise,
    assert_close,
    assert_same,
    cast,
    check_accuracy,
    drawn_sizes,
    dtype_id,
    exact,
    make,
    one_way,
    run,
    scan,
    tensors,
    weights,
)

ALL_ROWS = ROWS | ONE_WAY_ROWS
backends = on.backends("selective_scan")
compiled = on.compiled("selective_scan")
native = on.native("selective_scan")
OUTPUTS_OF_A_ROW = ("y", "final_state", "dx", "ddt", "dz", "dB", "dC", "dinitial_state")


# ---- what the op means ------------------------------------------------------------------------------------------


@backends
def test_worked_by_hand(backend):
    """One channel, two states, two tokens; dt = ln 2 and ln 4, so decays are powers of two."""
    x = torch.tensor([3.0, 5.0]).view(1, 2, 1)
    dt = torch.tensor([math.log(2), math.log(4)]).view(1, 2, 1)
    A = torch.tensor([[-1.0, -2.0]])
    B = torch.tensor([[[1.0, 2.0], [1.0, 0.0]]])
    C = torch.tensor([[[1.0, 1.0], [2.0, 4.0]]])
    h0 = torch.tensor([[[8.0, 16.0]]])
    y, h = selective_scan(
        x, dt, A, B, C, D=torch.tensor([10.0]), initial_state=h0, return_final_state=True, dt_softplus=False,
        backend=backend,
    )  # fmt: skip
    ln2 = math.log(2)
    h1 = (8 / 2 + 3 * ln2, 16 / 4 + 2 * 3 * ln2)
    h2 = (h1[0] / 4 + 5 * 2 * ln2, h1[1] / 16)
    expected = [h1[0] + h1[1] + 30, 2 * h2[0] + 4 * h2[1] + 50]
    torch.testing.assert_close(y.flatten(), torch.tensor(expected))
    torch.testing.assert_close(h.flatten(), torch.tensor(h2))


@backends
def test_constant_decay_is_a_geometric_series(backend):
    """x = B = C = 1 and constant dt: h_k = dt * (1 - a^k) / (1 - a) with a = exp(dt * A)."""
    l, raw, rate = 200, -3.0, -0.5
    one = torch.ones(1, l, 1)
    y, _ = selective_scan(one, raw * one, torch.tensor([[rate]]), one, one, backend=backend)
    dt = math.log1p(math.exp(raw))
    a = math.exp(dt * rate)
    expected = torch.tensor([dt * (1 - a**k) / (1 - a) for k in range(1, l + 1)], dtype=torch.float64)
    torch.testing.assert_close(y.flatten().double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("row", ALL_ROWS)
def test_backward_by_hand_is_autograd_of_the_forward(row):
    inputs = one_way(row, dtype=torch.float64)
    got = run(inputs, backend="reference")
    leaves = {k: v.clone().requires_grad_() for k, v in tensors(inputs).items()}
    args = inputs | leaves
    grouped = {k: args[k].unsqueeze(2) if args[k].ndim == 3 else args[k] for k in ("B", "C")}
    y, final_state, _ = reference.fwd(
        args["x"], args["dt"], args["A"], grouped["B"], grouped["C"], args.get("D"), args.get("z"),
        args.get("dt_bias"), args.get("initial_state"), args.get("cu_seqlens"), args.get("mask"),
        args.get("dt_softplus", True), args.get("reverse", False), args.get("frames", 0), 0, True, True, False, "auto",
    )  # fmt: skip
    found = torch.autograd.grad(
        (y, final_state), list(leaves.values()), weights((y, final_state)), allow_unused=True, materialize_grads=True
    )
    want = {"y": y.to(got["y"].dtype), "final_state": final_state} | {
        "d" + k: v for k, v in zip(leaves, found, strict=True)
    }
    if got["y"].dtype == torch.float32:  # out_dtype: the incoming gradient was rounded on its way
        assert_close(got, want, tolerance=1e-6)
    else:
        assert_close(got, want)


GRADCHECK = {
    "all": {},
    "reverse-time": {"reverse": True, "order": "time", "frames": 2},
    "constant": {"constant": "BC"},
    "groups": {"g": 2},
    "packed": {"b": 1, "seqs": 3, "cu_seqlens": torch.tensor([0, 1, 1, 4]), "max_seqlen": 3},
    "mask": {"mask": torch.tensor([[True, False, True, True]])},
}


@pytest.mark.parametrize("form", GRADCHECK)
def test_gradcheck(form):
    inputs = make(**({"b": 1, "l": 4, "d": 2, "n": 2, "dtype": torch.float64} | GRADCHECK[form]), seed=5)
    leaves = {k: v.requires_grad_() for k, v in tensors(inputs).items()}

    def call(*values):
        return scan(inputs | dict(zip(leaves, values, strict=True)), backend="reference")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("row", ["base", "g2", "constant-BC", "mask", "packed", "reverse-time"])
def test_reference_rounds_once(row, dtype):
    """In low precision the reference is the fp32 reference on the same rounded inputs, rounded at the end."""
    inputs = one_way(row, dtype=dtype)
    low = run(inputs, backend="reference")
    wide = run(cast(inputs, torch.float32), weights((low["y"], low["final_state"])), backend="reference")
    assert_bitwise(low, {k: v.to(low[k].dtype) for k, v in wide.items()})


# ---- every back end against the reference ------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("row", on.few(ALL_ROWS, *INTERPRETED, "l65"))
def test_as_accurate_as_eager(row, dtype, backend):
    check_accuracy(one_way(row, dtype=dtype), backend)


@pytest.mark.slow
@on.too_large_interpreted
@compiled
@pytest.mark.parametrize("n", [1, 3, 16, 33])
@pytest.mark.parametrize("d", [5, 16, 48, 70])
@pytest.mark.parametrize("l", [1, 5, 64, 130])
@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
@pytest.mark.parametrize("reverse", [False, True])
def test_as_accurate_as_eager_everywhere(n, d, l, constant, reverse, backend):
    # 500 draws of few channels: the largest error of eager varies more than in the rows above.
    check_accuracy(make(b=9, l=l, d=d, n=n, constant=constant, reverse=reverse), backend, slack=4.0)


@native
@pytest.mark.parametrize("row", ["l129", "n3", "d70", "g2-d70", "constant-BC-d70", "packed", "mask", "reverse-time"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_every_instruction_set(row, dtype, backend):
    from endomamba import _C

    level = _C.level()
    try:
        for name in _C.levels():
            _C.set_level(name)
            check_accuracy(one_way(row, dtype=dtype), backend)
    finally:
        _C.set_level(level)


@pytest.mark.slow
@on.too_large_interpreted
@compiled
def test_a01_chunk_state_offsets(backend):
    """b * chunks * d * n beyond 2^31: 8 GiB of saved states; the last row's results are those of the row alone."""
    if on.DEVICE == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free memory, there are {free / 2**30:.0f}")
    b, d, n = 2**17 + 1, 1024, 16
    random = Random(0)
    row = [random.randn(1, 1, size).half() for size in (d, d, n, n)]  # x, dt, B, C
    A, state = -random.rand(d, n), random.randn(1, d, n)

    def last_row(b):
        x, dt, B, C = (t.expand(b, -1, -1).contiguous().requires_grad_() for t in row)
        states = state.expand(b, -1, -1)
        y, _ = selective_scan(x, dt, A, B, C, initial_state=states, plan="invariant", backend=backend)
        y.backward(torch.ones(1, dtype=y.dtype).expand_as(y))
        return [t[-1].clone() for t in (y.detach(), x.grad, dt.grad, B.grad, C.grad)]

    for far, alone in zip(last_row(b), last_row(1), strict=True):
        assert torch.equal(far, alone)


@on.too_large_interpreted
@compiled
def test_a02_offsets_beyond_32_bits(backend):
    """Two rows that lie 2^31 elements apart in (mostly untouched) memory."""
    inputs = make(b=2, l=3, d=4, dtype=torch.float16)
    far = torch.UntypedStorage(2 * (2**31 + 1024), device=on.DEVICE)
    stride = 2**31 + 64
    x = torch.tensor([], dtype=torch.float16).set_(far, 0, (2, 3, 4), (stride, 4, 1))
    x.copy_(inputs["x"])
    assert_same(run(inputs | {"x": x}, backend=backend), run(inputs, backend=backend), backend)


@on.slow_interpreted
@backends
@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
def test_a03_final_state_with_constant_operands(constant, backend):
    """The constant form equals the same operand repeated for every token; its gradient is (d, n), summed."""
    inputs = make(g=12, constant=constant, dtype=torch.float64 if backend == "reference" else torch.float32)
    b, l, d = inputs["x"].shape
    wide = {k: inputs[k].expand(b, l, d, -1).contiguous() for k in constant}
    got, want = run(inputs, backend=backend), run(inputs | wide, backend=backend)
    for name in constant:
        want["d" + name] = want["d" + name].sum((0, 1))
    assert_close(got, want, tolerance=1e-11 if backend == "reference" else 1e-5)


@on.slow_interpreted
@backends
def test_a04_loss_on_the_final_state_only(backend):
    inputs = make(l=67)
    leaves = {k: v.requires_grad_() for k, v in tensors(inputs).items()}
    _, final_state = scan(inputs | leaves, backend=backend)
    found = torch.autograd.grad(final_state.square().sum(), list(leaves.values()), allow_unused=True)
    gradients = dict(zip(leaves, found, strict=True))
    for name in ("C", "D", "z"):  # they do not reach the state
        assert gradients[name] is None or not gradients[name].any()
    doubles = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    _, final_state = scan(inputs | doubles, backend="reference")
    names = ("x", "dt", "A", "B", "dt_bias", "initial_state")
    truth = torch.autograd.grad(final_state.square().sum(), [doubles[k] for k in names])
    for name, want in zip(names, truth, strict=True):
        assert gradients[name].abs().max() > 0
        torch.testing.assert_close(gradients[name].double(), want, rtol=2e-4, atol=1e-5 * float(want.abs().max()))


@compiled
@pytest.mark.parametrize("l", on.few([1, 7, 61, 127], 7))
def test_a05_odd_lengths_with_a_gradient_at_the_end(l, backend):
    """Past the end the scan must be the identity: the gradient of the final state starts there."""
    inputs = make(l=l, d=7, n=5)
    dy = torch.zeros_like(inputs["x"])
    dfinal = Random(0).randn(2, 7, 5)
    got, eager = (run(inputs, [dy, dfinal], backend=k) for k in (backend, "reference"))
    truth = run(cast(inputs, torch.float64), [dy, dfinal], backend="reference")
    for name in truth:
        running_sum = name in ("dA", "dD", "ddt_bias")  # of ex2.approx errors, token after token
        slack = 2.0 * on.slack(backend) * (on.slack(backend) if running_sum else 1.0)
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name], slack)


@on.slow_interpreted
@backends
def test_a06_a07_training_over_clips(backend):
    """The state carried over three clips: the gradients are those of one call, and none is lost by the hand-over."""
    inputs = make(l=150, d=6, n=4)
    eager, truth = run(inputs, backend="reference"), run(cast(inputs, torch.float64), backend="reference")
    got = run_split(inputs, (40, 104), backend=backend)
    for name in truth:
        slack = 8.0 * on.slack(backend)  # sums in another order
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name], slack)
    detached = run_split(inputs, (40, 104), backend=backend, detach=True)
    assert (detached["dA"] - truth["dA"]).abs().max() > 1e-2 * truth["dA"].abs().max()


@on.slow_interpreted
@backends
def test_a08_repeated_calls_give_the_same_bits(backend):
    inputs = make(b=9, l=65, d=70, g=2)
    first = run(inputs, backend=backend)
    for _ in range(3):
        assert_bitwise(run(inputs, backend=backend), first)


@on.too_large_interpreted
@compiled
@pytest.mark.parametrize("constant", ["", "BC"])
def test_a09_seventy_thousand_channels(constant, backend):
    check_accuracy(make(b=1, l=2, d=70_000, n=2, constant=constant), backend)


@backends
def test_a10_no_gradient_is_zero(backend):
    for name, gradient in run(make(), backend=backend).items():
        assert gradient.abs().max() > 0, name


MIXES = {
    "x-half": {"x": HALF},
    "dt-fp32": {"x": HALF, "B": HALF, "C": HALF, "z": HALF},
    "z-fp16": {"z": torch.float16},
    "bf16-and-fp16": {"x": HALF, "dt": torch.float16, "B": torch.float16, "C": torch.float16},
    "all-half-parameters-too": dict.fromkeys(("x", "dt", "A", "B", "C", "D", "z", "dt_bias"), HALF),
    "state-half": {"initial_state": HALF},
    "x-fp64": {"x": torch.float64},
    "constant-B-fp32": {"x": HALF, "dt": HALF, "C": HALF, "z": HALF},
}


@backends
@pytest.mark.parametrize("autocast", on.few([False, True], False), ids=["plain", "autocast"])
@pytest.mark.parametrize("mix", on.few(MIXES, "dt-fp32", "all-half-parameters-too", "constant-B-fp32"))
def test_a12_dtype_mixes(mix, autocast, backend):
    """Mixed activations run in their common dtype, y has the dtype of x, each gradient that of its input."""
    inputs = make(constant="B" if mix.startswith("constant") else "")
    inputs |= {k: inputs[k].to(dtype) for k, dtype in MIXES[mix].items()}
    if mix == "x-fp64":
        backend = "reference"
    with torch.autocast(on.DEVICE, dtype=HALF, enabled=autocast):
        got = run(inputs, backend=backend)
    assert got["y"].dtype == inputs["x"].dtype
    for name, tensor in tensors(inputs).items():
        assert got["d" + name].dtype == tensor.dtype, name
    common = torch.promote_types(inputs["x"].dtype, inputs["dt"].dtype)
    for name in ("B", "C", "z"):
        common = torch.promote_types(common, inputs[name].dtype)
    promoted = inputs | {k: inputs[k].to(common) for k in ("x", "dt", "B", "C", "z")}
    y, final_state = scan(promoted, backend=backend)
    assert torch.equal(got["y"], y.to(got["y"].dtype))
    assert torch.equal(got["final_state"], final_state)


@on.slow_interpreted
@compiled
def test_a13_four_thousand_channels(backend):
    """A realistic width: sums over 4,096 channels in dB and dC, relative error of every gradient by the rule."""
    check_accuracy(make(b=1, l=5, d=4096, n=16), backend)


def test_a14_the_accuracy_rule_sees_three_percent():
    inputs = make(dtype=torch.bfloat16)
    eager = run(inputs, backend="reference")
    grads = weights((eager["y"], eager["final_state"]))
    truth = run(cast(inputs, torch.float64), grads, backend="reference")
    for name in truth:
        assert_as_accurate_as_eager(name, eager[name], eager[name], truth[name])
        with pytest.raises(AssertionError, match=name):
            assert_as_accurate_as_eager(name, 1.03 * eager[name], eager[name], truth[name])


def test_a15_complex_is_refused():
    inputs = make()
    for name in ("x", "B", "A"):
        with pytest.raises(ValueError, match=f"{name} must be float32"):
            scan(inputs | {name: inputs[name].to(torch.complex64)})


@on.slow_interpreted
@backends
def test_a16_training_and_inference_agree(backend):
    """Saving states for the backward changes no bit of the outputs.

    CUDA C++ has a kernel of its own for a frame or two without gradients, which plan="invariant" does without.
    """
    inputs = make(l=130, **({"plan": "invariant"} if backend == "cuda" else {}))
    trained = run(inputs, backend=backend)
    with torch.no_grad():
        y, final_state = scan(inputs, backend=backend)
    assert_bitwise({"y": y, "final_state": final_state}, trained, ("y", "final_state"))


# ---- equalities between calls ------------------------------------------------------------------------------------


def run_split(inputs: dict, cuts, backend: str, detach=False) -> dict:
    """`run` on pieces of the sequence, the state carried on; gradients through the whole chain."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors(inputs).items()}
    args = inputs | leaves
    bounds = (0, *cuts, inputs["x"].shape[1])
    pieces = list(pairwise(bounds))
    if inputs.get("reverse"):
        pieces.reverse()
    state, outputs = args["initial_state"], {}
    for start, stop in pieces:
        part = {k: args[k][:, start:stop] for k in ("x", "dt", "B", "C", "z")}
        y, state = scan(args | part | {"initial_state": state}, backend=backend)
        outputs[start] = y
        if detach:
            state = state.detach().requires_grad_()
    y = torch.cat([outputs[start] for start in sorted(outputs)], 1)
    if detach:
        (found,) = (torch.autograd.grad(y, list(leaves.values()), weights((y, state))[0]),)
    else:
        found = torch.autograd.grad((y, state), list(leaves.values()), weights((y, state)))
    return {"y": y.detach(), "final_state": state.detach()} | {"d" + k: v for k, v in zip(leaves, found, strict=True)}


@backends
@pytest.mark.parametrize("reverse", on.few([False, True], True), ids=["forward", "reverse"])
@pytest.mark.parametrize("cuts", on.few([(1,), (37,), (64,), (69,), (20, 40, 41)], (37,)), ids=str)
def test_split_anywhere(cuts, reverse, backend):
    """Pieces with the state carried equal the whole, outputs and gradients; the state must matter for that to count."""
    inputs = make(l=70, d=6, reverse=reverse)
    eager, truth = run(inputs, backend="reference"), run(cast(inputs, torch.float64), backend="reference")
    tolerance = 4 * (eager["y"] - truth["y"]).abs().max()
    without, _ = scan(inputs | {"initial_state": None}, backend=backend)
    assert (without - truth["y"])[:, -1 if not reverse else 0].abs().max() > 100 * tolerance
    got = run_split(inputs, cuts, backend)
    for name in truth:
        slack = 8.0 * on.slack(backend)  # sums in another order
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name], slack)


@on.slow_interpreted
@backends
@pytest.mark.parametrize("plan", ["auto", "invariant"] if on.PLAIN else ["invariant"])
def test_split_at_a_chunk_is_the_whole_to_the_bit(plan, backend):
    inputs = make(l=150, d=37, plan=plan)
    whole = run(inputs, backend=backend)
    assert_bitwise(run_split(inputs, (64, 128), backend), whole, OUTPUTS_OF_A_ROW)


@on.slow_interpreted
@compiled
def test_a_row_alone_has_the_same_bits(backend):
    inputs = make(b=11, l=66, d=37, g=None, plan="invariant")
    grads = weights((inputs["x"], inputs["initial_state"]))
    batch = run(inputs, grads, backend=backend)
    for i in (0, 4, 10):
        row = slice(i, i + 1)
        alone = {k: inputs[k][row] for k in ("x", "dt", "B", "C", "z", "initial_state")}
        got = run(inputs | alone, [w[row] for w in grads], backend=backend)
        assert_bitwise(got, {k: batch[k][row] for k in OUTPUTS_OF_A_ROW})


@native
def test_any_thread_count_gives_the_same_bits(backend):
    inputs = make(b=9, l=66, d=150, n=5, constant="C")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(inputs, backend=backend)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert_bitwise(run(inputs, backend=backend), one)
    finally:
        torch.set_num_threads(threads)


def test_deterministic_algorithms_imply_the_invariant_plan():
    assert effective_plan("auto") == "auto"
    torch.use_deterministic_algorithms(True)
    try:
        assert effective_plan("auto") == "invariant"
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_packed_equals_a_loop_over_sequences(reverse):
    lengths = [3, 0, 1, 66, 5]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make(b=1, l=75, seqs=5, dtype=torch.float64, reverse=reverse)
    packed = run(inputs | {"cu_seqlens": bounds, "max_seqlen": 66}, backend="reference")
    grads = weights((inputs["x"], inputs["initial_state"]))
    looped = {k: torch.zeros_like(v) for k, v in packed.items()}
    for s, (start, stop) in enumerate(pairwise(bounds)):
        part = {k: inputs[k][:, start:stop] for k in ("x", "dt", "B", "C", "z")}
        part["initial_state"] = inputs["initial_state"][s : s + 1]
        got = run(inputs | part, [grads[0][:, start:stop], grads[1][s : s + 1]], backend="reference")
        for name in ("y", "dx", "ddt", "dB", "dC", "dz"):
            looped[name][:, start:stop] = got[name]
        for name in ("final_state", "dinitial_state"):
            looped[name][s : s + 1] = got[name]
        for name in ("dA", "dD", "ddt_bias"):
            looped[name] += got[name]
    assert_close(packed, looped)


@compiled
def test_packed_has_the_bits_of_a_loop(backend):
    lengths = [3, 0, 1, 66, 5]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make(b=1, l=75, seqs=5, d=37, plan="invariant")
    y, final_state = scan(inputs | {"cu_seqlens": bounds, "max_seqlen": 66}, backend=backend)
    for s, (start, stop) in enumerate(pairwise(bounds)):
        part = {k: inputs[k][:, start:stop] for k in ("x", "dt", "B", "C", "z")}
        part["initial_state"] = inputs["initial_state"][s : s + 1]
        y_part, state_part = scan(inputs | part, backend=backend)
        assert torch.equal(y[:, start:stop], y_part)
        assert torch.equal(final_state[s : s + 1], state_part)


PADDING = {"left": (3, 7), "right": (0, 5), "both": (2, 6), "none": (0, 7), "all": (4, 4)}


@backends
@pytest.mark.parametrize("b", on.few([1, 3], 3))
@pytest.mark.parametrize("side", on.few(PADDING, "both", "all"))
def test_mask_equals_the_tokens_cut_out(side, b, backend):
    """Padding holds NaN in x, dt and B; everything else is as if the tokens were not there."""
    start, stop = PADDING[side]
    inputs = make(b=b, l=7)
    real = torch.zeros(b, 7, dtype=torch.bool)
    real[:, start:stop] = True
    padded = {k: inputs[k].masked_fill(~real[..., None], float("nan")) for k in ("x", "dt", "B")}
    grads = weights((inputs["x"], inputs["initial_state"]))
    grads[0][~real] = 0
    got = run(inputs | padded | {"mask": real}, grads, backend=backend)
    cut = {k: inputs[k][:, start:stop] for k in ("x", "dt", "B", "C", "z")}
    want = run(inputs | cut, [grads[0][:, start:stop], grads[1]], backend=backend)
    for name in ("dx", "ddt", "dB"):
        assert not got[name][~real].any()
    for name in ("y", "dx", "ddt", "dB", "dC", "dz"):
        got[name] = got[name][:, start:stop]
    assert_close(got, want, tolerance=1e-5)


@backends
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_mask_in_the_middle(reverse, backend):
    """A masked token in the middle: others as without it, y there <C, h> gated, and its gradient reaches h and C."""
    inputs = make(l=7, reverse=reverse)
    keep = torch.tensor([0, 1, 3, 4, 6])
    mask = torch.zeros(2, 7, dtype=torch.bool).index_fill_(1, keep, True)
    poison = {k: inputs[k].masked_fill(~mask[..., None], float("inf")) for k in ("x", "dt", "B")}
    got = run(inputs | poison | {"mask": mask}, backend=backend)
    neutral = {k: inputs[k].masked_fill(~mask[..., None], 0) for k in ("x", "B")}
    neutral["dt"] = inputs["dt"].masked_fill(~mask[..., None], -1e4)  # softplus: exactly 0
    want = run(inputs | neutral, backend=backend)
    for name in ("dx", "ddt", "dB"):
        want[name] = want[name] * mask[..., None]
    assert_close(got, want, tolerance=1e-5)
    y, _ = scan({k: (v[:, keep] if k in ("x", "dt", "B", "C", "z") else v) for k, v in inputs.items()}, backend=backend)
    torch.testing.assert_close(got["y"][:, keep], y)


@backends
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("frames", on.few([1, 2, 3, 6], 3))
def test_time_order_is_a_permutation(frames, reverse, backend):
    """Frame-major memory, time-fastest walk, the permutation written out."""
    inputs = make(l=6, reverse=reverse, dtype=exact(backend))
    order = [frame * (6 // frames) + token for token in range(6 // frames) for frame in range(frames)]
    assert order == token_order(0, 6, frames, reverse=False)
    permuted = {k: inputs[k][:, order] for k in ("x", "dt", "B", "C", "z")}
    grads = weights((inputs["x"], inputs["initial_state"]))
    want = run(inputs | permuted, [grads[0][:, order], grads[1]], backend=backend)
    got = run(inputs | {"order": "time", "frames": frames}, grads, backend=backend)
    for name in ("y", "dx", "ddt", "dB", "dC", "dz"):
        got[name] = got[name][:, order]
    assert_same(got, want, backend)


@on.slow_interpreted
@backends
def test_reverse_is_a_flip(backend):
    inputs = make(l=67, dtype=exact(backend))
    flipped = {k: inputs[k].flip(1) for k in ("x", "dt", "B", "C", "z")}
    grads = weights((inputs["x"], inputs["initial_state"]))
    want = run(inputs | flipped, [grads[0].flip(1), grads[1]], backend=backend)
    got = run(inputs | {"reverse": True}, grads, backend=backend)
    for name in ("y", "dx", "ddt", "dB", "dC", "dz"):
        got[name] = got[name].flip(1)
    assert_same(got, want, backend)


# ---- layouts -----------------------------------------------------------------------------------------------------


def expanded(t):
    return t[:1].expand_as(t)


def sliced(t):
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def stepped(t):
    return t.repeat_interleave(2, -1)[..., ::2]


LAYOUTS = (torch.Tensor.contiguous, expanded, sliced, transposed, stepped)


@backends
@given(data=st.data())
@settings(max_examples=on.examples(30), deadline=None, derandomize=True, database=None)
def test_strides_change_no_bit(backend, data):
    """Any shape and any strides, inputs and gradients: the result is that of contiguous copies."""
    sizes = drawn_sizes(data)
    dtype = exact(backend) if backend == "reference" else data.draw(st.sampled_from(DTYPES))
    inputs = make(**sizes, dtype=dtype, reverse=data.draw(st.booleans()))
    laid = {k: data.draw(st.sampled_from(LAYOUTS), label=k)(v) for k, v in tensors(inputs).items()}
    grads = weights((laid["x"], laid["initial_state"]))
    laid_grads = [data.draw(st.sampled_from(LAYOUTS))(w) for w in grads]
    got = run(inputs | laid, laid_grads, backend=backend)
    plain = {k: v.contiguous() for k, v in laid.items()}
    assert_same(got, run(inputs | plain, [w.contiguous() for w in laid_grads], backend=backend), backend)


@backends
def test_gradient_of_a_sum_has_stride_zero(backend):
    inputs = make()
    leaf = inputs["x"].requires_grad_()
    (got,) = torch.autograd.grad(scan(inputs, backend=backend)[0].sum(), leaf)
    y = scan(inputs, backend=backend)[0]
    (want,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    assert_same({"dx": got}, {"dx": want}, backend)


# ---- numbers at the edge -----------------------------------------------------------------------------------------


@backends
def test_softplus_sweep(backend):
    """One token with B = C = x = 1: y is softplus itself and its gradient the sigmoid, to a few ulp."""
    raw = torch.linspace(-30, 30, 601).view(1, 1, -1).requires_grad_()
    one = torch.ones(1, 1, 1)
    y, _ = selective_scan(one.expand(1, 1, 601), raw, torch.zeros(601, 1), one, one, backend=backend)
    (slope,) = torch.autograd.grad(y.sum(), raw)
    exact = raw.detach().double()
    want, want_slope = F.softplus(exact, threshold=100), torch.sigmoid(exact)
    ulps = torch.full_like(exact, 8)
    if backend == "triton":  # its exp(v) is exp2(v * log2 e) with one rounding of the product: v / 2 ulp of the result
        ulps += exact.abs()
    bound = torch.finfo(torch.float32).eps * ulps
    assert (((y - want) / want).abs() < bound).all()
    assert (((slope - want_slope) / want_slope).abs() < bound).all()


def test_softplus_is_the_identity_above_twenty():
    raw = torch.tensor([20.5, 25.0], dtype=torch.float64).view(2, 1, 1).requires_grad_()
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    y, _ = selective_scan(one, raw, torch.zeros(1, 1), one, one)
    (slope,) = torch.autograd.grad(y.sum(), raw)
    assert torch.equal(y, raw)
    assert torch.equal(slope, one)


@backends
@pytest.mark.parametrize("dtype", on.few(DTYPES, torch.float16), ids=dtype_id)
def test_extreme_inputs_stay_finite(dtype, backend):
    """dt from -30 to 50 before softplus, fp16 x as large as its sums over n allow."""
    inputs = make(b=1, l=81, d=3, n=4, dtype=dtype, absent=("D", "dt_bias", "z"))
    inputs["dt"] = torch.linspace(-30, 50, 81).view(1, 81, 1).expand(1, 81, 3).to(dtype)
    inputs["x"] = (6e4 * torch.sign(inputs["x"])).to(dtype)
    inputs["B"], inputs["C"] = inputs["B"].clamp(-1, 1) / 50, inputs["C"].clamp(-1, 1) / 50
    inputs["out_dtype"] = torch.float32
    grads = [1e-3 * w for w in weights(scan(inputs, backend=backend))]  # dB grows with dt * x, which is 3e6 here
    for name, value in run(inputs, grads, backend=backend).items():
        assert value.isfinite().all(), name


@backends
def test_empty_final_state_is_a_copy(backend):
    inputs = make(l=0)
    _, final_state = scan(inputs, backend=backend)
    assert torch.equal(final_state, inputs["initial_state"])
    assert final_state.data_ptr() != inputs["initial_state"].data_ptr()
    _, zeros = scan(inputs | {"initial_state": None}, backend=backend)
    assert not zeros.any()


# ---- the saved states --------------------------------------------------------------------------------------------


def test_chunk_layout():
    A = torch.empty(12, 4)
    assert chunk_states_shape(torch.empty(2, 129, 12), A, None) == (2, 3, 12, 4)
    bounds = [0, 0, 1, 65, 65, 193, 200]
    assert chunk_states_shape(torch.empty(1, 200, 12), A, torch.tensor(bounds)) == (1, 200 // 64 + 6, 12, 4)
    slots = [
        chunk_slot(start, s) + c
        for s, (start, stop) in enumerate(pairwise(bounds))
        for c in range(-(-(stop - start) // CHUNK))
    ]
    assert len(set(slots)) == len(slots)
    assert max(slots) < 200 // 64 + 6


def private(inputs: dict, **flags) -> tuple:
    """Arguments of the private op in its order."""
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "cu_seqlens", "mask")
    args = [inputs.get(name) for name in names]
    args[3:5] = (t.unsqueeze(2) if t.ndim == 3 else t for t in args[3:5])
    defaults = {
        "dt_softplus": True, "reverse": False, "frames": 0, "max_seqlen": 0, "return_final_state": True,
        "save_states": True, "out_fp32": False, "plan": "auto", "backend": "reference",
    }  # fmt: skip
    return *args, *(defaults | {k: v for k, v in (inputs | flags).items() if k in defaults}).values()


@compiled
@pytest.mark.parametrize(
    "row", on.few(["l0", "l64", "l129", "time-chunks", "packed", "reverse-packed"], "l0", "packed")
)
def test_back_ends_save_the_same_states(row, backend):
    """So that a backward may run on another back end than its forward."""
    inputs = one_way(row)
    inputs.pop("order", None)
    want, got = (selective_scan_op(*private(inputs, backend=name))[2] for name in ("reference", backend))
    assert got.shape == want.shape
    if "cu_seqlens" in inputs:
        bounds = inputs["cu_seqlens"].tolist()
        slots = [
            chunk_slot(start, s) + c
            for s, (start, stop) in enumerate(pairwise(bounds))
            for c in range(-(-(stop - start) // CHUNK))
        ]
        got, want = got[:, slots], want[:, slots]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_no_double_backward():
    inputs = make()
    leaf = inputs["x"].requires_grad_()
    y, _ = scan(inputs)
    (gradient,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        gradient.sum().backward()


def test_backward_without_saved_states_says_so():
    inputs = make(absent=("z",))
    inputs["x"].requires_grad_()
    y, _, _ = selective_scan_op(*private(inputs, save_states=False))
    with pytest.raises(RuntimeError, match="save_states"):
        y.sum().backward()


# ---- the op as PyTorch sees it -----------------------------------------------------------------------------------

# Every optional argument absent and present, every flag both ways.  Packed: lengths that leave no slot unowned.
FORMS = {
    "all": {},
    "bare": {"absent": ("D", "z", "dt_bias", "initial_state")},
    "D": {"absent": ("z", "dt_bias", "initial_state")},
    "z": {"absent": ("D", "dt_bias", "initial_state")},
    "dt-bias": {"absent": ("D", "z", "initial_state")},
    "initial-state": {"absent": ("D", "z", "dt_bias")},
    "no-final-state": {"return_final_state": False},
    "reverse": {"reverse": True},
    "time": {"frames": 3},
    "no-softplus": {"dt_softplus": False},
    "constant-B": {"constant": "B"},
    "constant-C": {"constant": "C"},
    "groups": {"g": 3},
    "mask": {"mask": torch.tensor([[True, False, True] * 3] * 2)},
    "packed": {"b": 1, "seqs": 2, "cu_seqlens": torch.tensor([0, 4, 9]), "max_seqlen": 5},
    "half": {"dtype": HALF},
    "half-out-fp32": {"dtype": HALF, "out_fp32": True},
    "invariant": {"plan": "invariant"},
    "empty": {"l": 0},
}


@backends
@pytest.mark.parametrize("form", on.few(FORMS, "all", "bare", "packed", "empty"))
def test_opcheck(form, backend):
    inputs = make(**FORMS[form])
    if form == "no-softplus":
        inputs["dt"], inputs["dt_bias"] = inputs["dt"].exp() / 10, inputs["dt_bias"].exp()
    inputs |= {k: v.requires_grad_() for k, v in tensors(inputs).items()}
    torch.library.opcheck(selective_scan_op, private(inputs, backend=backend))


@on.slow_interpreted
@backends
def test_opcheck_inference_and_backward(backend):
    inputs = make()
    torch.library.opcheck(selective_scan_op, private(inputs, save_states=False, backend=backend))
    args = private(inputs, backend=backend)
    y, final_state, chunk_states = selective_scan_op(*args)
    flags = args[11:15] + args[18:]
    for dy, dfinal in ((y, final_state), (y, None), (None, final_state), (None, None)):
        torch.library.opcheck(selective_scan_backward_op, (dy, dfinal, *args[:11], chunk_states, *flags))


@on.slow_interpreted
@backends
def test_compiles_whole_with_few_graphs(backend):
    """Lengths 20, 30, 40, 50: one static graph and one dynamic one, forward and backward, same bits."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    step = torch.compile(scan, fullgraph=True, backend=counter)
    for l in (20, 30, 40, 50):
        inputs = make(l=l)
        want = run(inputs, backend=backend)
        leaves = {k: v.requires_grad_() for k, v in tensors(inputs).items()}
        y, final_state = step(inputs | leaves, backend=backend)
        found = torch.autograd.grad((y, final_state), list(leaves.values()), weights((y, final_state)))
        got = {"y": y, "final_state": final_state} | {"d" + k: v for k, v in zip(leaves, found, strict=True)}
        assert_bitwise(got, want)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_flops_by_hand():
    inputs = make(b=2, l=3, d=4, n=5)
    leaf = inputs["x"].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y, _ = scan(inputs)
    # 24 token channels: 9 each of 5 states, D, z
    assert forward.get_total_flops() == 24 * (9 * 5 + 1 + 1) == 1128
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), leaf)
    # 22 each of 5 states, 4 for dx and ddt, 4 for D, 7 for z
    assert backward.get_total_flops() == 24 * (22 * 5 + 4 + 4 + 7) == 3000


# ---- messages ----------------------------------------------------------------------------------------------------

MISTAKES = {
    "x-ndim": ({"x": torch.zeros(9, 12)}, r"x must be \(b, l, d\), got shape \(9, 12\)"),
    "dt-shape": ({"dt": torch.zeros(2, 8, 12)}, r"dt must have shape of x, \(2, 9, 12\), got \(2, 8, 12\)"),
    "z-shape": ({"z": torch.zeros(2, 9, 11)}, r"z must have shape like x, \(2, 9, 12\), got \(2, 9, 11\)"),
    "A-shape": ({"A": torch.zeros(11, 4)}, r"A must have shape \(d, n\) = \(12, n >= 1\), got \(11, 4\)"),
    "A-no-state": ({"A": torch.zeros(12, 0)}, r"n >= 1"),
    "B-shape": ({"B": torch.zeros(2, 9, 5)}, r"B must have shape \(b, l, n\) = \(2, 9, 4\).*got \(2, 9, 5\)"),
    "C-groups": ({"C": torch.zeros(2, 9, 5, 4)}, r"g dividing d = 12.*got \(2, 9, 5, 4\)"),
    "groups-differ": ({"B": torch.zeros(2, 9, 2, 4)}, r"B and C must share their groups g, got 2 and 1"),
    "D-shape": ({"D": torch.zeros(11)}, r"D must have shape \(d,\) = \(12,\), got \(11,\)"),
    "dt-bias-shape": ({"dt_bias": torch.zeros(12, 1)}, r"dt_bias must have shape"),
    "state-shape": ({"initial_state": torch.zeros(1, 12, 4)}, r"initial_state must have shape.*\(2, 12, 4\)"),
    "mask-dtype": ({"mask": torch.ones(2, 9)}, r"mask must be bool of shape \(b, l\) = \(2, 9\)"),
    "mask-shape": ({"mask": torch.ones(9, 2, dtype=torch.bool)}, r"mask must be bool.*got torch.bool \(9, 2\)"),
    "int-x": ({"x": torch.zeros(2, 9, 12, dtype=torch.int64)}, r"x must be float32.*got torch.int64"),
    "int-D": ({"D": torch.zeros(12, dtype=torch.int64)}, r"D must be float32.*got torch.int64"),
    "out-dtype": ({"out_dtype": torch.float16}, r"out_dtype must be None \(the dtype of x\) or torch.float32"),
    "plan": ({"plan": "fast"}, r"plan must be 'auto' or 'invariant', got 'fast'"),
    "backend": ({"backend": "gpu"}, r"backend must be 'auto' or one of triton, cuda, cpu, reference, got 'gpu'"),
    "order": ({"order": "space"}, r"order must be 'frame' or 'time'"),
    "frames-alone": ({"frames": 3}, r"frames=3 has a meaning only with order='time'"),
    "frames-uneven": ({"order": "time", "frames": 4}, r"9 tokens do not divide into frames=4"),
    "max-seqlen-alone": ({"max_seqlen": 9}, r"max_seqlen=9 has a meaning only with cu_seqlens"),
    "packed-batch": ({"cu_seqlens": torch.tensor([0, 9]), "max_seqlen": 9}, r"one row, b = 1, got b = 2"),
    "device": ({"D": torch.zeros(12, device="meta")}, r"D must be on cpu like the first argument, got meta"),
    "device-dt": ({"dt": torch.zeros(2, 9, 12, device="meta")}, r"dt must be on cpu"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    change, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match="^selective_scan: .*" + message):
        scan(make() | change)


def test_time_order_of_packed_sequences_is_not_there():
    inputs = make(b=1, seqs=2)
    with pytest.raises(NotImplementedError, match="order='time' with cu_seqlens"):
        scan(inputs | {"cu_seqlens": torch.tensor([0, 4, 9]), "max_seqlen": 5, "order": "time", "frames": 3})


def test_a_named_back_end_runs_or_raises():
    inputs = make(dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="backend 'cpu' cannot run this call"):
        scan(inputs, backend="cpu")
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this call"):
        scan(inputs, backend="triton")


# ---- one token, nothing saved: Triton has a kernel for it --------------------------------------------------------

ONE_TOKEN = {
    "base": {},
    **{f"n{n}": {"n": n} for n in (1, 3, 8, 13, 16, 32, 40, 300)},
    "b9-d70-n16": {"b": 9, "d": 70, "n": 16},
    "d768-n16": {"d": 768, "n": 16},
    "g2-d70-n16": {"g": 2, "d": 70, "n": 16},
    "g-d": {"g": 12},
    "constant-B-n16": {"constant": "B", "n": 16},
    "constant-C-g2-n16": {"constant": "C", "g": 2, "n": 16},
    "constant-BC": {"constant": "BC", "b": 5},
    "bare": {"absent": ("D", "z", "dt_bias", "initial_state")},
    "mask": {"b": 3, "n": 16, "mask": torch.tensor([[True], [False], [True]])},
    "mask-constant-B": {"mask": torch.tensor([[True], [False]]), "constant": "B"},
    "out-fp32": {"out_dtype": torch.float32},
    "no-softplus": {"dt_softplus": False},
    "reverse-time": {"reverse": True, "order": "time", "frames": 1},
}


def one_token(row: str, dtype=torch.float32) -> dict:
    inputs = make(l=1, dtype=dtype, **ONE_TOKEN[row])
    if row == "no-softplus":
        inputs |= {"dt": 0.05 * F.softplus(inputs["dt"]), "dt_bias": torch.exp(inputs["dt_bias"])}
    return inputs


def saving(inputs: dict, backend: str, save_states: bool) -> dict:
    """Outputs of the private op."""
    out_fp32 = inputs.get("out_dtype") == torch.float32
    names = tensors(inputs).keys() | {"mask", "dt_softplus", "reverse", "frames", "plan"}
    args = private({k: v for k, v in inputs.items() if k in names}, backend=backend, save_states=save_states)
    y, final_state, _ = selective_scan_op(*args[:-3], out_fp32, *args[-2:])
    return {"y": y, "final_state": final_state}


@compiled
@pytest.mark.parametrize("dtype", on.few(DTYPES, torch.float32), ids=dtype_id)
@pytest.mark.parametrize("row", on.few(ONE_TOKEN, *(row for row in ONE_TOKEN if row != "d768-n16")))
def test_one_token(row, dtype, backend):
    """As accurate as eager, and the bits of a call that saves states, which walks one token like any number."""
    inputs = one_token(row, dtype)
    got = dict(zip(("y", "final_state"), scan(inputs, backend=backend), strict=True))
    eager = scan(inputs, backend="reference")
    truth = scan(cast(inputs, torch.float64) | {"out_dtype": None}, backend="reference")
    for name, low, exactly in zip(got, eager, truth, strict=True):
        assert got[name].dtype == low.dtype
        assert_as_accurate_as_eager(name, got[name], low, exactly, 2.0 * on.slack(backend))
    assert_bitwise(saving(inputs, backend, False), saving(inputs, backend, True))


@compiled
def test_one_token_of_any_strides(backend):
    inputs = make(b=3, l=1, d=12, n=16)
    plain = scan(inputs, backend=backend)
    for layout in LAYOUTS[2:]:
        laid = {k: layout(v) for k, v in tensors(inputs).items()}
        for got, want in zip(scan(inputs | laid, backend=backend), plain, strict=True):
            assert torch.equal(got, want)
    y, absent = scan(inputs, backend=backend, return_final_state=False)
    assert absent is None
    assert torch.equal(y, plain[0])


@pytest.mark.parametrize("backend", on.SPLITTING)
@pytest.mark.parametrize("rows, warps", [(1, 2), (2, 1), (4, 4)])
def test_one_token_launched_in_any_way_has_the_same_bits(rows, warps, backend, monkeypatch):
    from endomamba.ops import _scan_triton_step

    inputs = make(b=5, l=1, d=70, n=16, mask=torch.tensor([[True], [True], [False], [True], [True]]))
    kernel, seen = _scan_triton_step._scan_step_kernel, []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: (seen.append(options["num_warps"]), kernel[grid](*args, **options))

    monkeypatch.setattr(_scan_triton_step, "_scan_step_kernel", Spy())
    monkeypatch.setattr(_scan_triton_step, "STEP", ((0, 1, 1),))
    want = scan(inputs, backend=backend)
    monkeypatch.setattr(_scan_triton_step, "STEP", ((0, rows, warps),))
    got = scan(inputs, backend=backend)
    assert seen == [1, warps], "the kernel for one token did not run"
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    for i in range(5):
        row = {k: inputs[k][i : i + 1] for k in ("x", "dt", "B", "C", "z", "initial_state", "mask")}
        for one, other in zip(scan(inputs | row, backend=backend), want, strict=True):
            assert torch.equal(one, other[i : i + 1])


# ---- few long sequences, split in time ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", on.SPLITTING)
@pytest.mark.parametrize(("reverse", "back", "pieces_back"), [(True, 64, 3), (False, 32, 5)])
def test_split_in_time_equals_the_walk(reverse, back, pieces_back, backend, monkeypatch):
    """Pieces of 64 tokens, carried over, against one walk: outputs, states, every gradient, and what is saved.

    Backward in pieces of 32, every other one begins in the middle of what the forward saved.
    """
    from endomamba.ops import _scan_triton

    inputs = make(b=1, l=150, d=6, n=4, reverse=reverse)
    eager, truth = run(inputs, backend="reference"), run(cast(inputs, torch.float64), backend="reference")
    monkeypatch.setattr(_scan_triton, "SPLIT", {"least": 64, "warps": 1 << 20})
    halves = _scan_triton._backward_piece
    monkeypatch.setattr(_scan_triton, "_backward_piece", lambda *args: halves(*args) and back)
    pieces = []
    carry = _scan_triton._carry
    monkeypatch.setattr(_scan_triton, "_carry", lambda *args, **kw: (pieces.append(args[6]), carry(*args, **kw)))
    got = run(inputs, backend=backend)
    assert pieces == [3, pieces_back], "the walk was not split"
    for name in truth:
        slack = 8.0 * on.slack(backend)  # one more product for each piece
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name], slack)
    whole = run(inputs | {"plan": "invariant"}, backend=backend)
    assert pieces == [3, pieces_back], "the invariant plan was split"
    for name in truth:
        assert_as_accurate_as_eager(name, whole[name], eager[name], truth[name], slack)


@pytest.mark.parametrize("backend", on.SPLITTING)
@pytest.mark.parametrize("reverse", on.few([False, True], True), ids=["forward", "reverse"])
def test_programs_share_the_chunks_of_all_sequences(reverse, backend, monkeypatch):
    """Three sequences of two chunks on two programs: the second is begun by one and finished by the other."""
    from endomamba.ops import _scan_triton

    inputs = make(b=3, l=70, d=20, n=4, reverse=reverse)
    eager, truth = run(inputs, backend="reference"), run(cast(inputs, torch.float64), backend="reference")
    monkeypatch.setattr(_scan_triton, "_processors", lambda device: 1)
    monkeypatch.setitem(_scan_triton.BWD, "per_sm", 2)
    monkeypatch.setattr(_scan_triton, "_piece", lambda call, plan: 0)
    programs, sharing = _scan_triton._programs, []
    monkeypatch.setattr(_scan_triton, "_programs", lambda *args: sharing.append(programs(*args)) or sharing[-1])
    got = run(inputs, backend=backend)
    assert sharing == [(2, True)], "no program shared its sequences"
    for name in truth:
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name], 8.0 * on.slack(backend))
    monkeypatch.setattr(_scan_triton, "_programs", lambda *args: (1, False))
    alone = run(inputs, backend=backend)
    assert_bitwise(got, alone, OUTPUTS_OF_A_ROW)


TWO_CHANNELS = {
    "reverse-mask": dict(l=7, reverse=True, mask=[[True, False, True, True, True, True, False], 7 * [True]]),
    "packed": dict(b=1, l=9, seqs=2, cu_seqlens=[0, 4, 9], max_seqlen=5, absent=("z",)),
    "constant-odd-states": dict(l=6, constant="BC", n=3),
    "two-launches": dict(l=3, n=17),
    "groups-in-time": dict(d=128, l=6, g=2, order="time", frames=3),
    "both-ways": dict(l=6, directions=2),
}


@pytest.mark.parametrize("backend", on.SPLITTING)
@pytest.mark.parametrize("form", TWO_CHANNELS)
def test_two_channels_a_lane(form, backend, monkeypatch):
    """As accurate as with one, which odd strides still have."""
    from endomamba.ops import _scan_triton

    monkeypatch.setitem(_scan_triton.BWD_TWO, "least", 0)
    table, seen = _scan_triton._backward_table, []
    monkeypatch.setattr(_scan_triton, "_backward_table", lambda *args: seen.append(table(*args)) or seen[-1])
    inputs = make(**({"d": 64, "dtype": torch.float16} | TWO_CHANNELS[form]))
    inputs |= {k: torch.tensor(v, device=on.DEVICE) for k, v in inputs.items() if isinstance(v, list)}
    check_accuracy(inputs, backend)
    assert {found["CH"] for found in seen} == {2}, "a lane had one channel"
    if form == "constant-odd-states":
        seen.clear()
        odd = torch.empty(2, 6, 65, dtype=torch.float16, device=inputs["x"].device)[..., 1:].copy_(inputs["x"])
        check_accuracy(inputs | {"x": odd}, backend)
        assert {found["CH"] for found in seen} == {1}, "a word of two channels is not aligned"


@pytest.mark.parametrize("backend", on.SPLITTING)
def test_the_invariant_plan_has_one_channel_a_lane(backend, monkeypatch):
    """Two add up dB and dC in another order, and are chosen by the number of sequences."""
    from endomamba.ops import _scan_triton

    monkeypatch.setitem(_scan_triton.BWD_TWO, "least", 0)
    table, seen = _scan_triton._backward_table, []
    monkeypatch.setattr(_scan_triton, "_backward_table", lambda *args: seen.append(table(*args)) or seen[-1])
    inputs = make(b=3, l=3, d=64, dtype=torch.float16, g=None, plan="invariant")
    grads = weights((inputs["x"], inputs["initial_state"]))
    batch = run(inputs, grads, backend=backend)
    alone = {k: inputs[k][2:] for k in ("x", "dt", "B", "C", "z", "initial_state")}
    got = run(inputs | alone, [w[2:] for w in grads], backend=backend)
    assert [found["CH"] for found in seen] == [1, 1]
    assert_bitwise(got, {k: batch[k][2:] for k in OUTPUTS_OF_A_ROW})
