"""bidirectional_scan: two selective scans and their sum in one op; every back end against the reference.

What one direction means is tested in test_selective_scan.py; here is what the second one adds.
"""

from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from endomamba.ops.bidirectional_scan.op import bidirectional_scan_backward_op, bidirectional_scan_op
from endomamba.ops.selective_scan import selective_scan
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops.scan_cases import (
    HALF,
    INTERPRETED,
    ROW_DTYPES,
    ROWS,
    TWO_WAY_ROWS,
    assert_bitwise,
    assert_close,
    assert_same,
    cast,
    check_accuracy,
    drawn_sizes,
    dtype_id,
    exact,
    make,
    run,
    scan,
    tensors,
    two_way,
    weights,
)

ALL_ROWS = ROWS | TWO_WAY_ROWS
backends = on.backends("bidirectional_scan")
compiled = on.compiled("bidirectional_scan")
native = on.native("bidirectional_scan")
SIDES = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
SEQUENCES = ("x", "dt", "B", "C", "x_b", "dt_b", "B_b", "C_b", "z")  # they have a token axis


def one_side(inputs: dict, side: str) -> dict:
    """The arguments of one direction as a selective_scan without gate."""
    shared = {k: inputs[k] for k in ("order", "frames", "cu_seqlens", "max_seqlen", "mask") if k in inputs}
    return {k: inputs[k + side] for k in SIDES if k + side in inputs} | shared


def two_scans(inputs: dict) -> tuple:
    y, final_state = selective_scan(**one_side(inputs, ""), return_final_state=True, backend="reference")
    y_b, final_state_b = selective_scan(
        **one_side(inputs, "_b"), return_final_state=True, reverse=True, backend="reference"
    )
    y = inputs.get("scale", 1.0) * (y + y_b)
    return y * torch.nn.functional.silu(inputs["z"]) if "z" in inputs else y, final_state, final_state_b


@pytest.mark.parametrize("row", ALL_ROWS)
def test_reference_is_two_scans(row):
    inputs = two_way(row, dtype=torch.float64)
    inputs.pop("out_dtype", None)
    leaves = {k: v.clone().requires_grad_() for k, v in tensors(inputs).items()}
    outputs = two_scans(inputs | leaves)
    found = torch.autograd.grad(outputs, list(leaves.values()), weights(outputs))
    names = ("y", "final_state", "final_state_b")
    want = dict(zip(names, outputs, strict=True)) | {"d" + k: v for k, v in zip(leaves, found, strict=True)}
    assert_close(run(inputs, backend="reference"), want)


@pytest.mark.parametrize("form", [{}, {"constant": "BC"}, {"g": 2, "order": "time", "frames": 2}], ids=str)
def test_gradcheck(form):
    inputs = make(**({"b": 1, "l": 4, "d": 2, "n": 2, "dtype": torch.float64, "directions": 2} | form), seed=5)
    leaves = {k: v.requires_grad_() for k, v in tensors(inputs).items()}

    def call(*values):
        return scan(inputs | dict(zip(leaves, values, strict=True)) | {"scale": 0.7}, backend="reference")

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@compiled
@pytest.mark.parametrize("dtype", ROW_DTYPES, ids=dtype_id)
@pytest.mark.parametrize("row", on.few(ALL_ROWS, *INTERPRETED))
def test_as_accurate_as_eager(row, dtype, backend):
    check_accuracy(two_way(row, dtype=dtype), backend)


@backends
def test_equals_the_forward_scan_and_a_flipped_one(backend):
    """y = f(x) + flip(g(flip(x))), with the flips that the op does not make."""
    inputs = make(l=67, directions=2, absent=("z",), dtype=exact(backend))
    y, final_state, final_state_b = scan(inputs, backend=backend)
    forward, state = scan(one_side(inputs, ""), backend=backend)
    flipped = {k: v.flip(1) if k in ("x", "dt", "B", "C") else v for k, v in one_side(inputs, "_b").items()}
    backward, state_b = scan(flipped, backend=backend)
    torch.testing.assert_close(y, forward + backward.flip(1))
    assert_same({"f": final_state, "b": final_state_b}, {"f": state, "b": state_b}, backend)


@backends
def test_reversing_tokens_and_swapping_directions_reverses_the_output(backend):
    inputs = make(l=67, directions=2)
    swapped = {}
    for name, value in tensors(inputs).items():
        other = name if name == "z" else name.removesuffix("_b") if name.endswith("_b") else name + "_b"
        swapped[other] = value.flip(1) if name in SEQUENCES else value
    y, final_state, final_state_b = scan(inputs, backend=backend)
    y_swapped, state, state_b = scan(swapped, backend=backend)
    torch.testing.assert_close(y_swapped.flip(1), y)
    torch.testing.assert_close((state_b, state), (final_state, final_state_b))


@backends
def test_every_output_sees_every_token(backend):
    """The first output depends on the last token and the last on the first: no direction is dropped or repeated."""
    inputs = make(b=1, l=70, directions=2)
    y, _, _ = scan(inputs, backend=backend)
    for token, far in ((0, 69), (69, 0)):
        for side, reaches in (("x", token < far), ("x_b", token > far)):
            moved = {side: inputs[side].clone()}
            moved[side][:, token] += 1
            changed = (scan(inputs | moved, backend=backend)[0] - y)[:, far].abs().max()
            assert (changed > 1e-3) == reaches, (token, side, float(changed))


@backends
@pytest.mark.parametrize("only", on.few([0, 1, 2]))
def test_loss_on_one_output_only(only, backend):
    inputs = make(l=67, directions=2)

    def gradients(inputs, backend):
        leaves = {k: v.detach().requires_grad_() for k, v in tensors(inputs).items()}
        output = scan(inputs | leaves, backend=backend)[only]
        found = torch.autograd.grad(
            output, list(leaves.values()), weights((output,))[0], allow_unused=True, materialize_grads=True
        )
        return dict(zip(leaves, found, strict=True))

    got, eager = gradients(inputs, backend), gradients(inputs, "reference")
    with torch.no_grad():
        output = scan(inputs, backend="reference")[only]
    doubles = cast(inputs, torch.float64)
    leaves = {k: v.requires_grad_() for k, v in tensors(doubles).items()}
    found = torch.autograd.grad(
        scan(doubles, backend="reference")[only], list(leaves.values()), weights((output,))[0].double(),
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    for name, truth in zip(leaves, found, strict=True):
        slack = 8.0 * on.slack(backend)  # sums in another order
        assert_as_accurate_as_eager(name, got[name], eager[name], truth, slack)
    other = "x" if only == 2 else "x_b"
    assert (only == 0) == bool(got[other].any())


@on.slow_interpreted
@backends
def test_repeated_calls_give_the_same_bits(backend):
    inputs = make(b=9, l=65, d=70, directions=2)
    first = run(inputs, backend=backend)
    for _ in range(3):
        assert_bitwise(run(inputs, backend=backend), first)


@native
def test_any_thread_count_gives_the_same_bits(backend):
    inputs = make(b=9, l=66, d=150, n=5, directions=2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(inputs, backend=backend)
        torch.set_num_threads(2)
        assert_bitwise(run(inputs, backend=backend), one)
    finally:
        torch.set_num_threads(threads)


@on.slow_interpreted
@compiled
def test_a_row_alone_has_the_same_bits(backend):
    inputs = make(b=9, l=66, d=150, n=5, directions=2, plan="invariant")
    states = (inputs["initial_state"], inputs["initial_state_b"])
    grads = weights((inputs["x"], *states))
    whole = run(inputs, grads, backend=backend)
    row = slice(8, 9)
    names = (*SEQUENCES, "initial_state", "initial_state_b")
    alone = run(inputs | {k: inputs[k][row] for k in names}, [w[row] for w in grads], backend=backend)
    for name in ("y", "final_state", "final_state_b", *("d" + k for k in names)):
        assert torch.equal(alone[name], whole[name][row]), name


def test_packed_equals_a_loop_over_sequences():
    lengths = [3, 0, 1, 66, 5]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    inputs = make(b=1, l=75, seqs=5, dtype=torch.float64, directions=2)
    states = ("initial_state", "initial_state_b")
    grads = weights((inputs["x"], *(inputs[k] for k in states)))
    packed = run(inputs | {"cu_seqlens": bounds, "max_seqlen": 66}, grads, backend="reference")
    looped = {k: torch.zeros_like(v) for k, v in packed.items()}
    for s, (start, stop) in enumerate(pairwise(bounds)):
        part = {k: inputs[k][:, start:stop] for k in SEQUENCES} | {k: inputs[k][s : s + 1] for k in states}
        part_grads = [grads[0][:, start:stop], grads[1][s : s + 1], grads[2][s : s + 1]]
        for name, value in run(inputs | part, part_grads, backend="reference").items():
            if name == "y" or name[1:] in SEQUENCES:
                looped[name][:, start:stop] = value
            elif "state" in name:
                looped[name][s : s + 1] = value
            else:
                looped[name] += value
    assert_close(packed, looped)


@backends
@pytest.mark.parametrize("b", on.few([1, 2], 2))
@pytest.mark.parametrize("real", on.few([(3, 7), (0, 5), (2, 6)], (2, 6)), ids=["left", "right", "both"])
def test_mask_equals_the_tokens_cut_out(real, b, backend):
    start, stop = real
    inputs = make(b=b, l=7, directions=2)
    mask = torch.zeros(b, 7, dtype=torch.bool)
    mask[:, start:stop] = True
    poison = {
        k + side: inputs[k + side].masked_fill(~mask[..., None], float("nan"))
        for k in ("x", "dt", "B")
        for side in ("", "_b")
    }
    grads = weights((inputs["x"], inputs["initial_state"], inputs["initial_state_b"]))
    grads[0][~mask] = 0
    got = run(inputs | poison | {"mask": mask}, grads, backend=backend)
    cut = {k: inputs[k][:, start:stop] for k in SEQUENCES}
    want = run(inputs | cut, [grads[0][:, start:stop], *grads[1:]], backend=backend)
    for name in ("y", *("d" + k for k in SEQUENCES)):
        got[name] = got[name][:, start:stop]
    assert_close(got, want, tolerance=1e-5)


@backends
@pytest.mark.parametrize("frames", on.few([1, 2, 3], 3))
def test_time_order_is_a_permutation(frames, backend):
    inputs = make(l=6, directions=2, dtype=exact(backend))
    order = [frame * (6 // frames) + token for token in range(6 // frames) for frame in range(frames)]
    grads = weights((inputs["x"], inputs["initial_state"], inputs["initial_state_b"]))
    permuted = {k: inputs[k][:, order] for k in SEQUENCES}
    want = run(inputs | permuted, [grads[0][:, order], *grads[1:]], backend=backend)
    got = run(inputs | {"order": "time", "frames": frames}, grads, backend=backend)
    for name in ("y", *("d" + k for k in SEQUENCES)):
        got[name] = got[name][:, order]
    assert_same(got, want, backend)


@backends
@given(data=st.data())
@settings(max_examples=on.examples(15), deadline=None, derandomize=True, database=None)
def test_strides_change_no_bit(backend, data):
    inputs = make(**drawn_sizes(data), directions=2, dtype=exact(backend))
    layouts = st.sampled_from(
        [
            torch.Tensor.contiguous,
            lambda t: t[:1].expand_as(t),
            lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
            lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        ]
    )
    laid = {k: data.draw(layouts)(v) for k, v in tensors(inputs).items()}
    grads = [data.draw(layouts)(w) for w in weights((laid["x"], laid["initial_state"], laid["initial_state_b"]))]
    got = run(inputs | laid, grads, backend=backend)
    plain = {k: v.contiguous() for k, v in laid.items()}
    assert_same(got, run(inputs | plain, [w.contiguous() for w in grads], backend=backend), backend)


@backends
@pytest.mark.parametrize("autocast", on.few([False, True], True), ids=["plain", "autocast"])
def test_dtype_mixes(autocast, backend):
    inputs = make(directions=2)
    inputs |= {k: inputs[k].to(HALF) for k in ("x", "dt", "B", "C", "A_b", "D_b")}
    with torch.autocast(on.DEVICE, dtype=HALF, enabled=autocast):
        got = run(inputs, backend=backend)
    assert got["y"].dtype == HALF
    for name, tensor in tensors(inputs).items():
        assert got["d" + name].dtype == tensor.dtype, name
    wide, _, _ = scan(cast(inputs, torch.float32), backend=backend)
    assert torch.equal(got["y"], wide.to(HALF))


# ---- the op as PyTorch sees it -----------------------------------------------------------------------------------

NAMES = (
    "x", "dt", "A", "B", "C", "x_b", "dt_b", "A_b", "B_b", "C_b", "D", "D_b", "z", "dt_bias", "dt_bias_b",
    "initial_state", "initial_state_b", "cu_seqlens", "mask",
)  # fmt: skip
OPTIONAL = ("D", "D_b", "z", "dt_bias", "dt_bias_b", "initial_state", "initial_state_b")
FORMS = {
    "all": {},
    "bare": {"absent": OPTIONAL},
    **{f"only-{name}": {"absent": tuple(set(OPTIONAL) - {name})} for name in OPTIONAL},
    "no-final-state": {"return_final_state": False},
    "time": {"frames": 3},
    "constant-B": {"constant": "B"},
    "constant-C": {"constant": "C"},
    "groups": {"g": 3},
    "mask": {"mask": torch.tensor([[True, False, True] * 3] * 2)},
    "packed": {"b": 1, "seqs": 2, "cu_seqlens": torch.tensor([0, 4, 9]), "max_seqlen": 5},
    "half-out-fp32": {"dtype": HALF, "out_fp32": True},
    "scale-invariant": {"scale": 0.5, "plan": "invariant"},
    "empty": {"l": 0},
}


def private(inputs: dict, **flags) -> tuple:
    """Arguments of the private op in its order."""
    args = [inputs.get(name) for name in NAMES]
    for i in (3, 4, 8, 9):
        args[i] = args[i].unsqueeze(2) if args[i].ndim == 3 else args[i]
    defaults = {
        "scale": 1.0, "dt_softplus": True, "frames": 0, "max_seqlen": 0, "return_final_state": True,
        "save_states": True, "out_fp32": False, "plan": "auto", "backend": "reference",
    }  # fmt: skip
    return *args, *(defaults | {k: v for k, v in (inputs | flags).items() if k in defaults}).values()


@backends
@pytest.mark.parametrize("form", on.few(FORMS, "all", "packed", "empty"))
def test_opcheck(form, backend):
    inputs = make(directions=2, **FORMS[form])
    inputs |= {k: v.requires_grad_() for k, v in tensors(inputs).items()}
    torch.library.opcheck(bidirectional_scan_op, private(inputs, backend=backend))


@on.slow_interpreted
@backends
def test_opcheck_inference_and_backward(backend):
    inputs = make(directions=2)
    torch.library.opcheck(bidirectional_scan_op, private(inputs, save_states=False, backend=backend))
    args = private(inputs, backend=backend)
    y, *states, chunk_states, chunk_states_b = bidirectional_scan_op(*args)
    flags = args[19:23] + args[26:]
    for grads in ((y, *states), (y, None, None), (None, None, states[1])):
        torch.library.opcheck(
            bidirectional_scan_backward_op, (*grads, *args[:19], chunk_states, chunk_states_b, *flags)
        )


@on.slow_interpreted
@backends
def test_compiles_whole_with_few_graphs(backend):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    step = torch.compile(scan, fullgraph=True, backend=counter)
    for l in (20, 30, 40, 50):
        inputs = make(l=l, directions=2)
        want = run(inputs, backend=backend)
        leaves = {k: v.requires_grad_() for k, v in tensors(inputs).items()}
        outputs = step(inputs | leaves, backend=backend)
        found = torch.autograd.grad(outputs, list(leaves.values()), weights(outputs))
        names = ("y", "final_state", "final_state_b")
        got = dict(zip(names, outputs, strict=True)) | {"d" + k: v for k, v in zip(leaves, found, strict=True)}
        assert_bitwise(got, want)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_flops_by_hand():
    inputs = make(b=2, l=3, d=4, n=5, directions=2)
    leaf = inputs["x"].requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y, _, _ = scan(inputs)
    # 24 token channels, twice: 9 each of 5 states, D; once: the scaled sum (2), the gate
    assert forward.get_total_flops() == 24 * (2 * (9 * 5 + 1) + 3) == 2280
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), leaf)
    # twice: 22 each of 5 states, 4 for dx and ddt, 4 for D; once: 10
    assert backward.get_total_flops() == 24 * (2 * (22 * 5 + 4 + 4) + 10) == 5904


def test_no_double_backward():
    inputs = make(directions=2)
    leaf = inputs["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(scan(inputs)[0].sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        gradient.sum().backward()


MISTAKES = {
    "x-b-shape": ({"x_b": torch.zeros(2, 8, 12)}, r"x_b must have shape of x, \(2, 9, 12\), got \(2, 8, 12\)"),
    "dt-b-shape": ({"dt_b": torch.zeros(2, 9, 1)}, r"dt_b must have shape of x"),
    "A-b-shape": ({"A_b": torch.zeros(12, 5)}, r"A_b must have shape like A, \(12, 4\), got \(12, 5\)"),
    "B-b-shape": ({"B_b": torch.zeros(2, 9, 5)}, r"B_b must have shape \(b, l, n\)"),
    "groups-differ": (
        {"B_b": torch.zeros(2, 9, 2, 4), "C_b": torch.zeros(2, 9, 2, 4)}, r"must share their groups g, got \[1, 2\]",
    ),
    "D-b-shape": ({"D_b": torch.zeros(11)}, r"D_b must have shape \(d,\) = \(12,\), got \(11,\)"),
    "state-b-shape": ({"initial_state_b": torch.zeros(1, 12, 4)}, r"initial_state_b must have shape"),
    "complex-B-b": ({"B_b": torch.zeros(2, 9, 4, dtype=torch.complex64)}, r"B_b must be float32"),
    "device-b": ({"dt_bias_b": torch.zeros(12, device="meta")}, r"dt_bias_b must be on cpu"),
    "plan": ({"plan": "fast"}, r"plan must be"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(mistake):
    change, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match="^bidirectional_scan: .*" + message):
        scan(make(directions=2) | change)


@pytest.mark.parametrize("backend", on.SPLITTING)
def test_directions_at_the_same_time_equal_one_after_the_other(backend, monkeypatch):
    from endomamba.ops import _scan_triton

    inputs = make(l=21, directions=2, scale=0.5)
    combined = []
    combine = _scan_triton._combine
    monkeypatch.setattr(_scan_triton, "_combine", lambda *args: (combined.append(args[2] is None), combine(*args)))
    monkeypatch.setattr(_scan_triton, "APART", {"waves": 1e9, "warps": 1})
    together = run(inputs, backend=backend)
    assert combined == [True, False]
    alone = run(inputs | {"plan": "invariant"}, backend=backend)
    assert combined == [True, False], "the invariant plan looked at the number of sequences"
    assert_same(together, alone, backend)
