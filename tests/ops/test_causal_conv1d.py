"""causal_conv1d and bidirectional_conv1d: closed form, fp64 truth, every option, every gradient.

Names ending in _c1, _c2, ... guard against bugs that other conv kernels have shipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv1d, silu
from torch.utils.flop_counter import FlopCounterMode

from endomamba.ops._backend import reasons
from endomamba.ops._extension import C
from endomamba.ops.causal_conv1d import bidirectional_conv1d, causal_conv1d
from endomamba.ops.causal_conv1d.op import (
    bidirectional_conv1d_backward_op,
    bidirectional_conv1d_op,
    causal_conv1d_backward_op,
    causal_conv1d_op,
)
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops.backends import DTYPES, HALF, Random

backends = on.backends("causal_conv1d")
compiled = on.compiled("causal_conv1d")
native = on.native("causal_conv1d")


@dataclass(frozen=True)
class Case:
    """b sequences of l tokens, d channels, w taps.  lengths: packed instead.  layout: how x, dy lie in memory."""

    b: int = 2
    l: int = 9
    d: int = 24
    w: int = 4
    dtype: str = "fp32"
    silu: bool = True
    bias: bool = True
    states: bool = True
    reverse: bool = False
    frames: int | None = None
    lengths: tuple[int, ...] = ()
    layout: str = "plain"

    def __str__(self) -> str:
        size = f"packed{'-'.join(map(str, self.lengths))}" if self.lengths else f"b{self.b}-l{self.l}"
        flags = [f"d{self.d}", f"w{self.w}", self.dtype, self.layout if self.layout != "plain" else ""]
        flags += [name for name in ("reverse",) if getattr(self, name)]
        flags += [f"no_{name}" for name in ("silu", "bias", "states") if not getattr(self, name)]
        flags += [f"frames{self.frames}" if self.frames else ""]
        return "-".join([size, *filter(None, flags)])

    @property
    def sequences(self) -> int:
        return len(self.lengths) or self.b

    def options(self) -> dict:
        packed = {}
        if self.lengths:
            ends = torch.tensor((0, *self.lengths)).cumsum(0).int()
            packed = {"cu_seqlens": ends, "max_seqlen": max(self.lengths)}
        order = {"order": "time", "frames": self.frames} if self.frames else {}
        return {"activation": "silu" if self.silu else None, **packed, **order}


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers (expanded: fewer of them) in another place of memory."""
    if layout == "transposed":  # (b, d, l) in memory
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":  # the first half of in_proj's output
        return torch.cat([tensor, tensor.new_full(tensor.shape, float("nan"))], -1)[..., : tensor.shape[-1]]
    if layout == "expanded":  # what .sum() and .mean() send back
        return tensor[..., :1].expand(tensor.shape)
    if layout == "strided":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    return tensor


def make(case: Case, both: bool = False) -> dict[str, Tensor | None]:
    """Inputs and upstream gradients, rounded to the case's dtype; parameters and states fp32."""
    randn = Random(case.l + 31 * case.d + 7 * case.w).randn

    b, length = (1, sum(case.lengths)) if case.lengths else (case.b, case.l)
    dtype = DTYPES[case.dtype]
    tensors = {
        "x": lay_out(randn(b, length, case.d).to(dtype), case.layout),
        "weight": randn(case.d, case.w) / case.w**0.5,
        "bias": randn(case.d) if case.bias else None,
    }
    state = (case.sequences, case.w - 1, case.d)
    if both:
        tensors |= {"weight_b": randn(case.d, case.w) / case.w**0.5, "bias_b": randn(case.d) if case.bias else None}
    else:
        tensors["initial_state"] = randn(*state) if case.states else None
    tensors["dy"] = lay_out(randn(b, length, case.d).to(dtype), case.layout)
    tensors["dfinal"] = lay_out(randn(b, length, case.d).to(dtype), case.layout) if both else randn(*state)
    return tensors


def run(
    case: Case, tensors: dict[str, Tensor | None], backend: str, both: bool = False, plan: str = "auto"
) -> dict[str, Tensor]:
    """Outputs and every gradient by name."""
    inputs = {
        name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None and not name.startswith("d")
    }
    options = case.options() | {"backend": backend, "plan": plan}
    if both:
        op_inputs = {"bias": None, "bias_b": None, **inputs}
        y, final = bidirectional_conv1d(**op_inputs, **options)
    else:
        y, final = causal_conv1d(**inputs, **options, reverse=case.reverse, return_final_state=case.states)
    outputs, upstream = [y], [tensors["dy"]]
    if both or case.states:
        outputs.append(final)
        upstream.append(tensors["dfinal"])
    grads = torch.autograd.grad(outputs, list(inputs.values()), upstream)
    results = {"y": y.detach()} | ({"final": final.detach()} if final is not None else {})
    return results | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def assert_accurate(case: Case, backend: str, both: bool = False) -> dict[str, Tensor]:
    tensors = make(case, both)
    got = run(case, tensors, backend, both)
    eager = run(case, tensors, "reference", both)
    truth = run(case, {k: None if t is None else t.double() for k, t in tensors.items()}, "reference", both)
    for name in got:
        assert_as_accurate_as_eager(f"{case} {name}", got[name], eager[name], truth[name])
    return got


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor], backend: str = "cpu") -> None:
    """Triton may add the terms of a parameter's gradient in an order that moves with the layout."""
    for name in expected:
        if backend == "triton" and name.startswith(("dweight", "dbias")):
            torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-5, msg=name)
        else:
            assert torch.equal(got[name], expected[name]), name


def equal_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b)


# --- the reference itself ------------------------------------------------------------------------------------------


@backends
def test_case_worked_by_hand(backend):
    x = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1)
    weight, bias = torch.tensor([[10.0, 100.0]]), torch.tensor([1.0])
    state = torch.tensor([7.0]).view(1, 1, 1)
    y, final = causal_conv1d(x, weight, bias, initial_state=state, return_final_state=True, backend=backend)
    assert y.flatten().tolist() == [171.0, 211.0, 321.0] and final.item() == 3.0
    y, final = causal_conv1d(
        x, weight, bias, initial_state=state, return_final_state=True, reverse=True, backend=backend
    )
    assert y.flatten().tolist() == [121.0, 231.0, 371.0] and final.item() == 1.0
    y, y_b = bidirectional_conv1d(x, weight, bias, weight * 2, None, backend=backend)
    assert y.flatten().tolist() == [101.0, 211.0, 321.0] and y_b.flatten().tolist() == [240.0, 460.0, 600.0]


@pytest.mark.parametrize("w", [1, 2, 4, 7])
@pytest.mark.parametrize("length", [1, 3, 12])
def test_reference_is_torch_conv1d(w, length):
    t = make(Case(l=length, w=w))
    padded = torch.cat([t["initial_state"], t["x"]], 1).double()
    expected = conv1d(padded.transpose(1, 2), t["weight"].double()[:, None], t["bias"].double(), groups=24)
    y, final = causal_conv1d(
        *(t[k].double() for k in ("x", "weight", "bias")),
        activation="silu",
        initial_state=t["initial_state"].double(),
        return_final_state=True,
    )
    torch.testing.assert_close(y, silu(expected).transpose(1, 2))
    assert equal_bits(final, padded[:, length:])


@pytest.mark.parametrize(
    "case",
    [
        Case(l=5, d=3),
        Case(l=2, d=3),  # shorter than the window
        Case(l=0, d=3),
        Case(l=5, d=3, silu=False, bias=False, reverse=True),
        Case(l=6, d=2, frames=3),
        Case(d=2, lengths=(3, 0, 1, 5)),
        Case(l=4, d=2, w=1),
    ],
    ids=str,
)
def test_gradcheck(case):
    t = {k: None if v is None else v.double().requires_grad_() for k, v in make(case).items()}
    inputs = [t["x"], t["weight"], t["bias"], t["initial_state"]]

    def forward(x, weight, bias, state):
        return causal_conv1d(
            x, weight, bias, initial_state=state, return_final_state=True, reverse=case.reverse, **case.options()
        )

    assert torch.autograd.gradcheck(forward, inputs)


@pytest.mark.parametrize(
    "case",
    [Case(l=5, d=3), Case(l=6, d=2, frames=2), Case(d=2, lengths=(1, 0, 5)), Case(l=3, d=2, bias=False)],
    ids=str,
)
def test_gradcheck_both(case):
    t = {k: None if v is None else v.double().requires_grad_() for k, v in make(case, both=True).items()}
    inputs = [t[k] for k in ("x", "weight", "bias", "weight_b", "bias_b")]
    assert torch.autograd.gradcheck(lambda *args: bidirectional_conv1d(*args, **case.options()), inputs)


# --- kernels against the truth -------------------------------------------------------------------------------------

BASE = Case()
CASES = [
    BASE,
    *(replace(BASE, dtype=dtype) for dtype in ("bf16", "fp16")),
    replace(BASE, silu=False),
    replace(BASE, bias=False),
    replace(BASE, states=False),
    replace(BASE, reverse=True),
    replace(BASE, l=12, frames=3),
    replace(BASE, l=12, frames=4, reverse=True, dtype="bf16"),
    replace(BASE, d=1),
    replace(BASE, d=70),  # two tasks, the last vector cut short on every instruction set
    replace(BASE, b=19, l=3),  # three groups of sequences in the sums of dweight
    *([] if on.INTERPRET else [replace(BASE, b=300, l=2, d=3)]),  # more sequences than groups of eight
    replace(BASE, w=3, d=70, dtype="bf16"),
    replace(BASE, lengths=(0, 1, 2, 3, 9, 4)),
    replace(BASE, lengths=(5, 0, 1), reverse=True, dtype="fp16"),
]
CASES = [case for case in CASES if case.dtype in DTYPES]


@compiled
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case, backend):
    assert_accurate(case, backend)


@compiled
@pytest.mark.parametrize("case", [c for c in CASES if c.states and not c.reverse], ids=str)
def test_accuracy_both(case, backend):
    assert_accurate(case, backend, both=True)


@compiled
@pytest.mark.parametrize("w", on.few(range(1, 9), 1, 3, 8))
def test_every_width(w, backend):
    for length in (1, w - 1, w, 11):
        assert_accurate(Case(w=w, l=length), backend)
        assert_accurate(Case(w=w, l=length), backend, both=True)


@compiled
@pytest.mark.parametrize("length", on.few([0, 1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65], 0, 1, 2, 3, 4, 33))
@pytest.mark.parametrize("states", [True, False], ids=["states", "no_states"])
def test_every_length(length, states, backend):
    assert_accurate(Case(l=length, d=17, states=states), backend)
    assert_accurate(Case(l=length, d=17), backend, both=True)


@on.slow_interpreted
@compiled
@pytest.mark.parametrize("length", [1023, 1024, 1025, 1026])
@pytest.mark.parametrize("states", [True, False], ids=["states", "no_states"])
def test_long_lengths_c4(length, states, backend):
    assert_accurate(Case(b=1, l=length, d=17, states=states), backend)
    assert_accurate(Case(b=1, l=length, d=17, states=states, reverse=True, dtype=HALF), backend)
    assert_accurate(Case(b=1, l=length, d=17), backend, both=True)


@compiled
@pytest.mark.parametrize("d", on.few([1, 7, 8, 16, 24, 64, 65, 100], 7, 65))
def test_shapes_c3(d, backend):
    for b, length in ((1, 1), (3, 2), (1, 49), (9, 16)):
        assert_accurate(Case(b=b, l=length, d=d), backend)


@pytest.mark.slow
@native
@pytest.mark.parametrize("level", C.levels() if C else [])
def test_every_option_on_every_instruction_set(level, backend):
    best = C.level()
    C.set_level(level)
    try:
        for dtype in DTYPES:
            for layout in ("plain", "transposed", "sliced", "expanded", "strided"):
                for w in (1, 3, 4, 6):
                    for size in ({"l": 37}, {"l": 36, "frames": 9}, {"lengths": (1, 0, 2, 70, 3)}):
                        case = Case(d=35, w=w, dtype=dtype, layout=layout, **size)
                        assert_accurate(case, backend)
                        assert_accurate(replace(case, reverse=True, silu=False, bias=False), backend)
                        assert_accurate(case, backend, both=True)
    finally:
        C.set_level(best)


# --- layouts -------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "strided"])
@pytest.mark.parametrize("dtype", on.few(["fp32", HALF], "fp32"))
def test_layouts_change_no_bit_c9(layout, dtype, backend):
    """All layouts times all options: states, packing and order exclude nothing."""
    for case in (
        Case(d=21, dtype=dtype, layout=layout),
        Case(d=21, dtype=dtype, layout=layout, lengths=(3, 0, 7), reverse=True),
        Case(d=21, dtype=dtype, layout=layout, l=12, frames=3),
    ):
        for both in (False, True):
            tensors = make(case, both)
            dense = {k: None if t is None else t.contiguous() for k, t in tensors.items()}
            assert_same_bits(run(case, tensors, backend, both), run(case, dense, backend, both), backend)


@backends
def test_gradients_through_split_cat_expand_c1(backend):
    t = make(Case(d=12))
    xz = torch.cat([t["x"], t["x"] + 1], -1).requires_grad_()
    weight, bias = t["weight"], t["bias"]

    def loss(xz, backend):
        x, z = xz.split(12, -1)
        y, _ = causal_conv1d(x, weight.to(xz.dtype), bias.to(xz.dtype), activation="silu", backend=backend)
        first, second = y.split([5, 7], -1)
        joined = torch.cat([second, first * z[..., :5]], -1).transpose(1, 2)
        return joined.mean() + y.mean(1, keepdim=True).expand(-1, 4, -1).sum() + y[:, ::2].sum()

    (got,) = torch.autograd.grad(loss(xz, backend), xz)
    wide = xz.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(loss(wide, "reference"), wide)
    torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-6)


@st.composite
def strided_cases(draw):
    """(b, l, d) in any order of dimensions with gaps and repeats between elements."""
    shape = [draw(st.integers(1, 3)), draw(st.integers(0, 9)), draw(st.integers(1, 19))]
    order = draw(st.permutations(range(3)))
    steps = [draw(st.sampled_from([0, 1, 1, 2])) for _ in range(3)]
    return shape, order, steps, draw(st.integers(1, 6)), draw(st.sampled_from(sorted(DTYPES))), draw(st.booleans())


@compiled
@settings(max_examples=on.examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=strided_cases())
def test_any_shape_and_strides(drawn, backend):
    shape, order, steps, w, dtype, reverse = drawn
    case = Case(shape[0], shape[1], shape[2], w, dtype, reverse=reverse)
    tensors = make(case)
    for name in ("x", "dy"):
        full = [shape[i] * max(steps[i], 1) for i in order]
        base = torch.randn(full).to(DTYPES[dtype]).permute([order.index(i) for i in range(3)])
        t = base
        for i, step in enumerate(steps):
            t = t.narrow(i, 0, min(1, shape[i])).expand(*t.shape[:i], shape[i], *t.shape[i + 1 :]) if step == 0 else t
            t = t[(slice(None),) * i + (slice(None, None, step),)] if step else t
        tensors[name] = t
    dense = {k: None if t is None else t.contiguous() for k, t in tensors.items()}
    got = run(case, tensors, backend)
    assert_same_bits(got, run(case, dense, backend), backend)
    for name, value in run(case, dense, "reference").items():
        tolerance = 1e-5 if dtype == "fp32" else 2e-2
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)


# --- identities, exact on compiled kernels ---------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("split", on.few(range(8), 0, 2, 5))
@pytest.mark.parametrize("w", on.few([1, 2, 4, 6], 1, 4))
@pytest.mark.parametrize("dtype", on.few(["fp32", HALF], "fp32"))
def test_split_with_carried_state_is_the_whole(split, w, dtype, backend):
    t = make(Case(l=7, w=w, dtype=dtype))
    if w > 1:  # the state must matter
        args = (t["x"], t["weight"], t["bias"])
        first, carried = (
            causal_conv1d(*args, initial_state=state, backend=backend)[0][:, 0] for state in (None, t["initial_state"])
        )
        assert (first - carried).any()
    for reverse in (False, True):
        options = {"activation": "silu", "return_final_state": True, "reverse": reverse, "backend": backend}
        whole, final = causal_conv1d(t["x"], t["weight"], t["bias"], initial_state=t["initial_state"], **options)
        state, parts = t["initial_state"], {}
        order = [slice(0, split), slice(split, 7)]
        for part in reversed(order) if reverse else order:
            y, state = causal_conv1d(t["x"][:, part], t["weight"], t["bias"], initial_state=state, **options)
            parts[part.start, part.stop] = y
        assert equal_bits(torch.cat([parts[p.start, p.stop] for p in order], 1), whole)
        assert equal_bits(state, final)


@backends
def test_gradients_through_carried_state(backend):
    t = {k: v.double() if backend == "reference" else v for k, v in make(Case(l=7)).items()}

    def grads(parts):
        x, weight, state = (t[k].clone().requires_grad_() for k in ("x", "weight", "initial_state"))
        carried, ys = state, []
        for part in parts:
            y, carried = causal_conv1d(
                x[:, part], weight, t["bias"], initial_state=carried, return_final_state=True, backend=backend
            )
            ys.append(y)
        loss = (torch.cat(ys, 1) * t["dy"]).sum() + (carried * t["dfinal"]).sum()
        return torch.autograd.grad(loss, [x, weight, state])

    whole = grads([slice(0, 7)])
    for got, expected in zip(grads([slice(0, 2), slice(2, 3), slice(3, 7)]), whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_reverse_symmetry(both, backend):
    """Reversing tokens and swapping directions reverses everything."""
    case = Case(d=21)
    t = make(case, both)
    flipped = {**t, "x": t["x"].flip(1), "dy": t["dy"].flip(1)}
    if both:
        swap = {"weight": "weight_b", "bias": "bias_b", "dy": "dfinal"}
        swap |= {b: a for a, b in swap.items()}
        flipped = {k: t[swap.get(k, k)] for k in t}
        flipped |= {k: flipped[k].flip(1) for k in ("x", "dy", "dfinal")}
    got, expected = run(replace(case, reverse=not both), flipped, backend, both), run(case, t, backend, both)
    if both:
        assert equal_bits(got["y"].flip(1), expected["final"]) and equal_bits(got["final"].flip(1), expected["y"])
        torch.testing.assert_close(got["dx"].flip(1), expected["dx"])  # the directions are added in the other order
        torch.testing.assert_close(got["dweight"], expected["dweight_b"])
    else:
        assert_same_bits({**got, "y": got["y"].flip(1), "dx": got["dx"].flip(1)}, expected, backend)


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("w", [1, 3, 4])
def test_both_directions_are_two_calls(dtype, w, backend):
    t = make(Case(d=21, w=w, dtype=dtype), both=True)
    options = {"activation": "silu", "backend": backend}
    y, y_b = bidirectional_conv1d(*(t[k] for k in ("x", "weight", "bias", "weight_b", "bias_b")), **options)
    assert equal_bits(y, causal_conv1d(t["x"], t["weight"], t["bias"], **options)[0])
    assert equal_bits(y_b, causal_conv1d(t["x"], t["weight_b"], t["bias_b"], reverse=True, **options)[0])
    nudged = t["x"].clone()
    nudged[:, -1] += 1
    parameters = (t[k] for k in ("weight", "bias", "weight_b", "bias_b"))
    first = bidirectional_conv1d(nudged[:, :2], *parameters, backend=backend)
    assert first[0].shape == (2, 2, 21)


def test_directions_look_the_right_way():
    x = torch.zeros(1, 5, 1)
    x[0, 2] = 1
    weight = torch.tensor([[1.0, 2.0, 3.0]])
    y, y_b = bidirectional_conv1d(x, weight, None, weight, None)
    assert y.flatten().tolist() == [0, 0, 3, 2, 1] and y_b.flatten().tolist() == [1, 2, 3, 0, 0]


@compiled
@pytest.mark.parametrize("frames", on.few([1, 2, 3, 4, 6, 12], 3, 12))
@pytest.mark.parametrize("reverse", [False, True])
def test_time_order_is_a_permutation(frames, reverse, backend):
    case = Case(l=12, d=21, frames=frames, reverse=reverse)
    t = make(case)
    walk = torch.tensor([(k % frames) * (12 // frames) + k // frames for k in range(12)])
    permuted = run(replace(case, frames=None), {**t, "x": t["x"][:, walk], "dy": t["dy"][:, walk]}, backend)
    got = run(case, t, backend)
    assert_same_bits({**got, "y": got["y"][:, walk], "dx": got["dx"][:, walk]}, permuted, backend)
    t = make(replace(case, reverse=False), both=True)
    options = case.options() | {"backend": backend}
    got = bidirectional_conv1d(*(t[k] for k in ("x", "weight", "bias", "weight_b", "bias_b")), **options)
    one = causal_conv1d(t["x"], t["weight_b"], t["bias_b"], reverse=True, **options)[0]
    assert equal_bits(got[1], one)


@compiled
@pytest.mark.parametrize("dtype", on.few(DTYPES, "fp32"))
@pytest.mark.parametrize("directions", ["forward", "reverse", "both"])
def test_packed_is_the_loop_c2(dtype, directions, backend):
    reverse, both = directions == "reverse", directions == "both"
    case = Case(lengths=(0, 1, 2, 7, 3, 0, 5, 1, 2, 4), dtype=dtype, reverse=reverse)
    t = make(case, both)
    packed = run(case, t, backend, both, plan="invariant")
    sums, begin = {}, 0
    for i, length in enumerate(case.lengths):
        part = slice(begin, begin + length)
        begin += length
        cut = {
            k: v[:, part] if k in ("x", "dy") or (both and k == "dfinal") else v[i : i + 1] if v.ndim == 3 else v
            for k, v in t.items()
        }
        one = run(Case(1, length, dtype=dtype, reverse=reverse), cut, backend, both, plan="invariant")
        assert equal_bits(packed["y"][:, part], one["y"]) and equal_bits(packed["dx"][:, part], one["dx"])
        if both:
            assert equal_bits(packed["final"][:, part], one["final"])
        else:
            assert equal_bits(packed["final"][i], one["final"][0])
            assert equal_bits(packed["dinitial_state"][i], one["dinitial_state"][0])
        for name in one:
            if name.startswith(("dweight", "dbias")):
                sums[name] = sums.get(name, 0) + one[name].double()
    for name, total in sums.items():
        torch.testing.assert_close(packed[name].double(), total, rtol=1e-5, atol=1e-5)


@compiled
@pytest.mark.parametrize("dtype", on.few(DTYPES, "fp32"))
@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_row_of_a_batch_is_the_row_alone(dtype, both, backend):
    case = Case(b=11, l=40, d=70, dtype=dtype)
    t = make(case, both)
    batch = run(case, t, backend, both, plan="invariant")
    row = {k: v[5:6] if v.ndim == 3 else v for k, v in t.items()}
    one = run(replace(case, b=1), row, backend, both, plan="invariant")
    for name in ("y", "final", "dx") + (() if both else ("dinitial_state",)):
        assert equal_bits(batch[name][5:6], one[name]), name


@native
@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_thread_count_changes_no_bit(both, backend):
    case = Case(b=20, l=40, d=70)
    t = make(case, both)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [run(case, t, backend, both), run(case, t, backend, both)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


# --- how Triton cuts a call into walkers ---------------------------------------------------------------------------


@pytest.fixture
def longest(monkeypatch):
    """Sets the longest walker, and how many programs' sums are added at once, which tests are too small to reach."""
    fwd = pytest.importorskip("endomamba.ops.causal_conv1d.triton_fwd")
    bwd = pytest.importorskip("endomamba.ops.causal_conv1d.triton_bwd")

    def use(steps: int, groups: int) -> None:
        monkeypatch.setattr(fwd, "CHUNKS", (steps,))
        monkeypatch.setattr(bwd, "BLOCK_GROUPS", groups)
        fwd.split.cache_clear()

    yield use
    fwd.split.cache_clear()


@pytest.mark.triton
@pytest.mark.parametrize(
    "case",
    [Case(b=1, l=67), Case(b=1, l=70, reverse=True, frames=7, dtype=HALF), Case(lengths=(3, 0, 70, 16))],
    ids=str,
)
@pytest.mark.parametrize("both", [False, True], ids=["one", "both"])
def test_walkers_of_any_length(case, both, longest):
    if both:
        case = replace(case, reverse=False)
    tensors = make(case, both)
    longest(16, 1)
    short = run(case, tensors, "triton", both)
    longest(64, 128)
    long = assert_accurate(case, "triton", both)
    assert_same_bits(short, long, "triton")
    assert_same_bits(run(case, tensors, "triton", both), long)  # the same call: parameters' gradients too


@pytest.mark.triton
@pytest.mark.parametrize("halo", [0, 3, 40])
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_walkers_reach_every_step(halo, tokens):
    split = pytest.importorskip("endomamba.ops.causal_conv1d.triton_fwd").split
    for b in (1, 3, 5000):
        for l in (0, 1, 15, 16, 17, 197, 5000):
            (sequences, chunk, chunks, _), programs, _ = split(b, l, 768, None, 2, halo, tokens, 4, 4)
            assert sequences == b and chunk >= 1 and chunks * chunk >= l and programs * 4 >= b * chunks
            assert (chunk + halo) % tokens == 0
    for ends in ((0,), (0, 0), (0, 5, 5, 9), (0, 100, 101, 101, 300), (0, 16, 32, 64)):
        packed = len(ends) - 1
        (_, chunk, _, search), programs, _ = split(1, ends[-1], 768, packed, 2, halo, tokens, 4, 1)
        first = [end // chunk + s for s, end in enumerate(ends)]
        assert programs == (first[-1] if packed else 0) and 2**search >= packed
        for s in range(packed):
            assert first[s + 1] - first[s] >= max(1, -(-(ends[s + 1] - ends[s]) // chunk))


@pytest.mark.slow
@pytest.mark.triton
@pytest.mark.skipif(on.DEVICE != "cuda", reason="8 GB of a GPU")
def test_offsets_beyond_32_bits():
    far = 2**31 + 16
    wide = torch.zeros(far + 9 * 24, dtype=torch.bfloat16)
    t, t2 = make(Case(dtype="bf16")), make(Case(dtype="bf16"), both=True)
    x = wide.as_strided(t["x"].shape, (far, 24, 1)).copy_(t["x"])
    assert_same_bits(run(Case(), {**t, "x": x}, "triton"), run(Case(), t, "triton"))
    x.copy_(t2["x"])
    assert_same_bits(run(Case(), {**t2, "x": x}, "triton", True), run(Case(), t2, "triton", True))
    rows = torch.zeros(1, 3, far // 2, dtype=torch.bfloat16)
    x = rows[:, :, :24].copy_(t["x"][:1, :3])
    case = Case(b=1, l=3, dtype="bf16", reverse=True)
    t = {k: v[:1, :3] if k in ("x", "dy") else v[:1] if v is not None and v.ndim == 3 else v for k, v in t.items()}
    assert_same_bits(run(case, {**t, "x": x}, "triton"), run(case, t, "triton"))


# --- the op as torch sees it ---------------------------------------------------------------------------------------

FORMS = [
    Case(l=5, d=3),
    Case(l=5, d=3, bias=False, states=False),
    Case(l=0, d=3),
    Case(l=6, d=3, frames=3, dtype=HALF),
    Case(d=3, lengths=(2, 0, 3)),
    Case(l=5, d=3, layout="transposed"),
]


@backends
@pytest.mark.parametrize("case", on.few(FORMS, FORMS[0], FORMS[4]), ids=str)
def test_opcheck(case, backend):
    packed, frames = case.options().get("cu_seqlens"), case.frames or 0
    t = {k: v if v is None else v.detach().requires_grad_() for k, v in make(case).items()}
    one = (t["x"], t["weight"], t["bias"], t["initial_state"], packed)
    for final in (True, False):
        torch.library.opcheck(causal_conv1d_op, (*one, True, False, frames, 5, final, "auto", backend))
    grads = [(t["dy"].detach(), t["dfinal"]), (None, t["dfinal"]), (t["dy"].detach(), None)]
    plain = [v if v is None else v.detach() for v in one]
    for dy, dfinal in grads:
        arguments = (dy, None if dfinal is None else dfinal.detach(), *plain, True, False, frames, 5, "auto", backend)
        torch.library.opcheck(causal_conv1d_backward_op, arguments)
    t = {k: v if v is None else v.detach().requires_grad_() for k, v in make(case, both=True).items()}
    both = (*(t[k] for k in ("x", "weight", "bias", "weight_b", "bias_b")), packed)
    torch.library.opcheck(bidirectional_conv1d_op, (*both, True, frames, 5, "auto", backend))
    plain = [v if v is None else v.detach() for v in both]
    for dy, dy_b in ((t["dy"], t["dfinal"]), (None, t["dfinal"]), (t["dy"], None)):
        upstream = [None if g is None else g.detach() for g in (dy, dy_b)]
        torch.library.opcheck(bidirectional_conv1d_backward_op, (*upstream, *plain, True, frames, 5, "auto", backend))


@backends
def test_only_one_output_has_a_gradient(backend):
    t = make(Case())
    x, state = t["x"].clone().requires_grad_(), t["initial_state"].clone().requires_grad_()
    _, final = causal_conv1d(
        x, t["weight"], t["bias"], initial_state=state, return_final_state=True, activation="silu", backend=backend
    )
    dx, dstate = torch.autograd.grad((final * t["dfinal"]).sum(), [x, state])
    assert equal_bits(dx[:, -3:], t["dfinal"]) and not dx[:, :-3].any() and not dstate.any()
    t = make(Case(), both=True)
    x = t["x"].clone().requires_grad_()
    bias_b = t["bias_b"].clone().requires_grad_()
    _, y_b = bidirectional_conv1d(x, t["weight"], t["bias"], t["weight_b"], bias_b, backend=backend)
    dx, dbias_b = torch.autograd.grad(y_b.sum(), [x, bias_b])
    torch.testing.assert_close(dbias_b, torch.full((24,), 18.0))
    torch.testing.assert_close(dx[:, -1], t["weight_b"].sum(1).expand(2, -1))


@backends
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    t = make(Case())
    options = {"activation": "silu", "backend": backend}

    def f(x, weight, bias, state):
        y, final = causal_conv1d(
            x * 2, weight, bias, initial_state=state, return_final_state=True, reverse=True, **options
        )
        y, y_b = bidirectional_conv1d(y, weight, bias, weight, None, **options)
        return (y * y_b).sum() + final.sum()

    inputs = [t[k].requires_grad_() for k in ("x", "weight", "bias", "initial_state")]
    expected = torch.autograd.grad(f(*inputs), inputs)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


@backends
def test_parameters_of_lower_precision_and_autocast(backend):
    half = DTYPES[HALF]
    t = make(Case(dtype=HALF))
    weight, bias = t["weight"].to(half).requires_grad_(), t["bias"].to(half).requires_grad_()
    state = t["initial_state"].to(half)
    with torch.autocast(on.DEVICE, half):
        y, final = causal_conv1d(t["x"], weight, bias, initial_state=state, return_final_state=True, backend=backend)
    expected, _ = causal_conv1d(t["x"], weight.float(), bias.float(), initial_state=state.float(), backend=backend)
    assert y.dtype == half and final.dtype == torch.float32 and equal_bits(y, expected)
    y.sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == half


@backends
def test_state_not_asked_for_is_none_and_outputs_are_new(backend):
    t = make(Case(l=0))
    y, final = causal_conv1d(t["x"], t["weight"], t["bias"], backend=backend)
    assert final is None and y.shape == (2, 0, 24)
    _, final = causal_conv1d(
        t["x"], t["weight"], initial_state=t["initial_state"], return_final_state=True, backend=backend
    )
    assert equal_bits(final, t["initial_state"]) and final.data_ptr() != t["initial_state"].data_ptr()


def test_no_double_backward():
    t = make(Case())
    x = t["x"].clone().requires_grad_()
    y, _ = causal_conv1d(x, t["weight"], activation="silu")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        dx.sum().backward()


def test_flops():
    t = make(Case(b=2, l=9, d=24, w=4))
    with FlopCounterMode(display=False) as count:
        y, _ = causal_conv1d(t["x"].requires_grad_(), t["weight"])
        assert count.get_total_flops() == 2 * 2 * 9 * 24 * 4
        y.sum().backward()
    assert count.get_total_flops() == 4 * (2 * 2 * 9 * 24 * 4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 24)}, ValueError, r"x must be \(b, l, d\), got shape \(2, 24\)"),
        ({"x": torch.zeros(2, 9, 24, dtype=torch.int64)}, ValueError, "x must be float32"),
        (
            {"weight": torch.zeros(23, 4)},
            ValueError,
            r"weight must have shape \(d, w\) with d = 24 and w >= 1, got \(23, 4\)",
        ),
        ({"weight": torch.zeros(24, 0)}, ValueError, "w >= 1"),
        ({"weight": torch.zeros(24, 1, 4)}, ValueError, r"weight must be \(d, w\)"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(d,\) = \(24,\), got \(4,\)"),
        (
            {"initial_state": torch.zeros(2, 4, 24)},
            ValueError,
            r"initial_state must have shape .*\(2, 3, 24\), got \(2, 4, 24\)",
        ),
        ({"activation": "gelu"}, ValueError, "activation must be None or 'silu', got 'gelu'"),
        ({"plan": "fast"}, ValueError, "plan must be"),
        ({"backend": "fast"}, ValueError, "backend must be"),
        ({"backend": "triton"}, NotImplementedError, "cannot run this call"),
        ({"order": "time"}, ValueError, "needs frames"),
        ({"order": "time", "frames": 2}, ValueError, "9 tokens do not divide into frames=2"),
        ({"cu_seqlens": torch.tensor([0, 9]), "max_seqlen": 9}, ValueError, "b = 1, got b = 2"),
        ({"weight": torch.zeros(24, 4, device="meta")}, ValueError, "weight must be on cpu"),
    ],
)
def test_bad_inputs(change, error, message):
    t = make(Case())
    with pytest.raises(error, match=message):
        causal_conv1d(**{"x": t["x"], "weight": t["weight"], "bias": t["bias"], **change})


@pytest.mark.skipif(C is None, reason="endomamba._C is not built")
@pytest.mark.parametrize("ends", [[0, 5, 3, 9], [1, 9], [0, 8], [0, 10]])
def test_bad_packing_reads_no_foreign_memory(ends):
    t = make(Case(b=1))
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall and end at l = 9"):
        causal_conv1d(t["x"], t["weight"], cu_seqlens=torch.tensor(ends), max_seqlen=9)


def test_second_direction_is_checked():
    t = make(Case(), both=True)
    with pytest.raises(ValueError, match="weight_b must have shape of weight"):
        bidirectional_conv1d(t["x"], t["weight"], None, torch.zeros(24, 3), None)
    with pytest.raises(ValueError, match="bias_b must have shape"):
        bidirectional_conv1d(t["x"], t["weight"], None, t["weight_b"], torch.zeros(3))


def test_fp64_runs_the_reference_only():
    assert reasons("causal_conv1d", "reference", torch.zeros(1, dtype=torch.float64)) == []
    if C is not None:
        assert reasons("causal_conv1d", "cpu", torch.zeros(1, dtype=torch.float64)) != []
        assert reasons("bidirectional_conv1d", "cpu", torch.zeros(1)) == []
