"""add_rms_norm and add_layer_norm: torch's own norms, fp64 truth, every option, every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.utils.flop_counter import FlopCounterMode

from endomamba.ops._backend import reasons
from endomamba.ops._extension import C
from endomamba.ops.add_rms_norm import add_layer_norm, add_rms_norm
from endomamba.ops.add_rms_norm.op import add_norm_backward_op, add_norm_op
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops.backends import DTYPES, HALF, Random

backends = on.backends("add_rms_norm")
compiled = on.compiled("add_rms_norm")
native = on.native("add_rms_norm")


@dataclass(frozen=True)
class Case:
    """shape (b, ..., c); layer: LayerNorm; layout: how x and the upstream gradients lie in memory."""

    shape: tuple[int, ...] = (2, 5, 48)
    dtype: str = "fp32"
    layer: bool = False
    bias: bool = True
    residual: bool = True
    row_scale: bool = True
    layout: str = "plain"

    def __str__(self) -> str:
        flags = ["x".join(map(str, self.shape)), "layer" if self.layer else "rms", self.dtype]
        flags += [f"no_{name}" for name in ("bias", "residual", "row_scale") if not getattr(self, name)]
        return "-".join(flags + ([] if self.layout == "plain" else [self.layout]))


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return torch.cat([tensor, tensor.new_full(tensor.shape, float("nan"))], -1)[..., : tensor.shape[-1]]
    if layout == "expanded":
        return tensor[:, :1].expand(tensor.shape)
    return tensor


def make(case: Case) -> dict[str, Tensor | None]:
    randn = Random(sum(case.shape)).randn

    dtype, c = DTYPES[case.dtype], case.shape[-1]
    return {
        "x": lay_out(randn(*case.shape).to(dtype), case.layout),
        "weight": randn(c) + 1,
        "bias": randn(c) if case.layer and case.bias else None,
        "residual": lay_out(randn(*case.shape) + 0.5, case.layout) if case.residual else None,
        "row_scale": randn(case.shape[0]).abs() + 0.1 if case.row_scale else None,
        "dnormed": lay_out(randn(*case.shape).to(dtype), case.layout),
        "dnew": lay_out(randn(*case.shape), case.layout),
    }


def call(layer: bool, x, weight, bias=None, residual=None, row_scale=None, **options):
    if layer:
        return add_layer_norm(x, weight, bias, residual, row_scale=row_scale, **options)
    return add_rms_norm(x, weight, residual, row_scale=row_scale, **options)


def run(case: Case, tensors: dict[str, Tensor | None], backend: str, plan: str = "auto") -> dict[str, Tensor]:
    """Outputs and every gradient by name."""
    inputs = {k: t.detach().requires_grad_() for k, t in tensors.items() if t is not None and not k.startswith("d")}
    normed, new = call(case.layer, **inputs, backend=backend, plan=plan)
    grads = torch.autograd.grad([normed, new], list(inputs.values()), [tensors["dnormed"], tensors["dnew"]])
    results = {"normed": normed.detach(), "new": new.detach()}
    return results | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def assert_accurate(case: Case, backend: str) -> None:
    tensors = make(case)
    got, eager = run(case, tensors, backend), run(case, tensors, "reference")
    truth = run(case, {k: None if t is None else t.double() for k, t in tensors.items()}, "reference")
    for name in got:
        # A handful of numbers, each the rest of a sum that nearly cancels: eager's worst error is a matter of luck.
        slack = 10.0 if name == "drow_scale" else 2.0
        assert_as_accurate_as_eager(f"{case} {name}", got[name], eager[name], truth[name], slack)


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor], backend: str = "cpu") -> None:
    """Triton may sum a row in an order that moves with the layout: equal up to that, one rounding of the dtype."""
    for name in expected:
        if backend == "triton":
            eps = max(torch.finfo(got[name].dtype).eps, 1e-5)
            atol = eps * max(1.0, expected[name].abs().max().item()) if expected[name].numel() else 0.0  # sums cancel
            torch.testing.assert_close(got[name], expected[name], rtol=eps, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023
        else:
            assert torch.equal(got[name], expected[name]), name


# --- the reference itself ------------------------------------------------------------------------------------------


@backends
def test_case_worked_by_hand(backend):
    x, residual = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]])
    normed, new = add_rms_norm(
        x, torch.tensor([5.0, 10.0]), residual, row_scale=torch.tensor([2.0]), eps=7 / 18, backend=backend
    )
    assert new.tolist() == [[3.0, 8.0]]  # mean square 36.5
    torch.testing.assert_close(normed, torch.tensor([[15.0, 80.0]]) / (36.5 + 7 / 18) ** 0.5)
    normed, new = add_layer_norm(x, torch.ones(2), torch.tensor([1.0, 2.0]), 3 * x, eps=12.0, backend=backend)
    assert new.tolist() == [[4.0, 8.0]]  # mean 6, variance 4
    torch.testing.assert_close(normed, torch.tensor([[0.5, 2.5]]))


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_is_torch_layer_norm(backend, dtype):
    t = make(Case(layer=True, dtype=dtype))
    normed, new = add_layer_norm(t["x"], t["weight"], t["bias"], t["residual"], eps=1e-3, backend=backend)
    torch.testing.assert_close(new, t["x"].float() + t["residual"])
    expected = layer_norm(new, (48,), t["weight"], t["bias"], 1e-3)
    torch.testing.assert_close(normed, expected.to(normed.dtype))


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_torch_rms_norm(backend, dtype):
    t = make(Case(dtype=dtype))
    normed, new = add_rms_norm(t["x"], t["weight"], t["residual"], eps=1e-3, backend=backend)
    rms_norm = getattr(torch.nn.functional, "rms_norm", None)
    if rms_norm is None:
        pytest.skip("this torch has no rms_norm")
    torch.testing.assert_close(normed, rms_norm(new, (48,), t["weight"], 1e-3).to(normed.dtype))


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("given", ["all", "no_bias", "no_residual", "no_row_scale"])
def test_gradcheck(layer, given):
    names = ["x", "weight", "bias", "residual", "row_scale"]
    absent = {given.removeprefix("no_")} | (set() if layer else {"bias"})
    t = make(Case((2, 3, 4), layer=layer))
    present = [n for n in names if n not in absent]
    inputs = [t[n].double().requires_grad_() for n in present]
    assert torch.autograd.gradcheck(lambda *a: call(layer, **dict(zip(present, a, strict=True)), eps=0.1), inputs)


# --- kernels against the truth -------------------------------------------------------------------------------------

BASE = Case()
ROWS = [
    BASE,
    *(replace(BASE, dtype=dtype) for dtype in ("bf16", "fp16")),
    replace(BASE, residual=False),
    replace(BASE, residual=False, row_scale=False, dtype="bf16"),
    replace(BASE, row_scale=False),
    replace(BASE, shape=(2, 5, 1)),
    replace(BASE, shape=(2, 5, 7)),  # shorter than any vector but SSE's
    replace(BASE, shape=(3, 4, 197)),  # whole vectors, chains and a rest
    replace(BASE, shape=(1, 1, 1024), dtype="bf16"),
    replace(BASE, shape=(7, 16)),
    replace(BASE, shape=(2, 3, 2, 5, 24)),
    replace(BASE, shape=(2, 0, 8)),
    replace(BASE, shape=(0, 3, 8)),
    replace(BASE, shape=(41, 2, 33)),  # eleven groups of rows in the sums of dweight
    replace(BASE, shape=(20, 70, 3)),  # more rows than groups of eight
    replace(BASE, shape=(2, 3, 4100)),  # wider than the registers of a GPU's program
]
MANY_ROWS = replace(
    BASE, shape=(16, 600, 384), dtype=HALF
)  # on a GPU the partial sums of dweight are at their most, of five rows each
CASES = ROWS + [replace(case, layer=True) for case in ROWS] + [replace(BASE, layer=True, bias=False)]
CASES = [case for case in CASES if case.dtype in DTYPES] + ([] if on.INTERPRET else [MANY_ROWS])  # two minutes there


@compiled
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case, backend):
    # One channel: a LayerNorm's rhat is zero, its gradient rounding noise around zero in both.
    if case.layer and case.shape[-1] == 1:
        tensors = make(case)
        got = run(case, tensors, backend)
        assert not (got["normed"] - tensors["bias"]).any() and not got["dweight"].any()
        torch.testing.assert_close(got["dresidual"], tensors["dnew"], rtol=1e-5, atol=1e-3)
        return
    assert_accurate(case, backend)


@compiled
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_large_mean_and_tiny_rows(layer, backend):
    """The variance is that of the centred row: a mean of 1000 costs no digits.  Rows of zeros stay finite."""
    t = make(Case((2, 4, 96), layer=layer))
    x = t["x"] * (0.01 if layer else 1) + 1000
    x[0, 0] = 0
    args = (t["weight"], t["bias"]) if layer else (t["weight"],)
    wide = [a.double() for a in args]
    norm = add_layer_norm if layer else add_rms_norm
    got, truth = norm(x, *args, backend=backend)[0], norm(x.double(), *wide, backend="reference")[0]
    assert_as_accurate_as_eager("normed", got, norm(x, *args, backend="reference")[0], truth)


@pytest.mark.slow
@native
@pytest.mark.parametrize("level", C.levels() if C else [])
def test_every_option_on_every_instruction_set(level, backend):
    best = C.level()
    C.set_level(level)
    try:
        for layer in (False, True):
            for dtype in DTYPES:
                for layout in ("plain", "transposed", "sliced", "expanded"):
                    for c in (2, 5, 16, 67, 384):
                        for residual in (False, True):
                            for row_scale in (False, True):
                                case = Case((3, 11, c), dtype, layer, True, residual, row_scale, layout)
                                assert_accurate(case, backend)
    finally:
        C.set_level(best)


# --- layouts -------------------------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
@pytest.mark.parametrize("shape", [(3, 21), (3, 4, 21), (3, 2, 2, 21)], ids=str)
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_layouts_change_no_bit(layout, shape, layer, backend):
    case = Case(shape, HALF, layer, layout=layout)
    tensors = make(case)
    dense = {k: None if t is None else t.contiguous() for k, t in tensors.items()}
    assert_same_bits(run(case, tensors, backend), run(case, dense, backend), backend)


@compiled
@settings(max_examples=on.examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    c=st.integers(1, 40),
    random=st.randoms(use_true_random=False),
    dtype=st.sampled_from(sorted(DTYPES)),
    layer=st.booleans(),
)
def test_any_shape_and_strides(leading, c, random, dtype, layer, backend):
    shape = (*leading, c)
    order = list(range(len(shape)))
    random.shuffle(order)
    case = Case(shape, dtype, layer)
    tensors = make(case)
    for name in ("x", "residual", "dnormed", "dnew"):
        base = tensors[name].permute(order).contiguous().permute([order.index(i) for i in range(len(shape))])
        tensors[name] = base[:1].expand(shape) if shape[0] and random.random() < 0.3 else base
    dense = {k: None if t is None else t.contiguous() for k, t in tensors.items()}
    got = run(case, tensors, backend)
    assert_same_bits(got, run(case, dense, backend), backend)
    for name in ("normed", "new"):
        tolerance = 1e-4 if dtype == "fp32" or name == "new" else 3e-2
        torch.testing.assert_close(got[name], run(case, dense, "reference")[name], rtol=tolerance, atol=tolerance)


# --- identities ----------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_row_scale_of_ones_and_zeros(backend, layer):
    case = Case(layer=layer, row_scale=False)
    t = make(case)
    ones, zeros = torch.ones(2), torch.tensor([1.0, 0.0])
    plain = run(case, t, backend)
    scaled = run(case, {**t, "row_scale": ones}, backend)
    assert_same_bits(scaled, plain, backend)
    dropped = run(case, {**t, "row_scale": zeros}, backend)
    assert torch.equal(dropped["new"][1], t["residual"][1]) and not dropped["dx"][1].any()
    assert torch.equal(dropped["new"][0], plain["new"][0]) and torch.equal(dropped["dx"][0], plain["dx"][0])
    # its gradient is that of the loss along x, at zero too
    torch.testing.assert_close(dropped["drow_scale"], (dropped["dresidual"] * t["x"]).sum((1, 2)), rtol=1e-4, atol=1e-4)


@backends
def test_outputs_never_alias_inputs(backend):
    x = torch.randn(2, 3, 8)
    normed, new = add_rms_norm(x, torch.ones(8), backend=backend)
    assert torch.equal(new, x) and len({t.data_ptr() for t in (x, normed, new)}) == 3
    residual = torch.randn(2, 3, 8)
    normed, new = add_rms_norm(torch.zeros(2, 3, 8), torch.ones(8), residual, backend=backend)
    assert torch.equal(new, residual) and new.data_ptr() != residual.data_ptr()
    x.requires_grad_(), residual.requires_grad_()
    normed, new = add_rms_norm(x, torch.ones(8), residual, backend=backend)
    dx, dresidual = torch.autograd.grad(new.sum(), [x, residual])
    assert torch.equal(dx, dresidual) and dx.data_ptr() != dresidual.data_ptr()


@compiled
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_of_a_batch_is_the_row_alone(layer, dtype, backend):
    case = Case((11, 40, 100), dtype, layer)
    t = make(case)
    batch = run(case, t, backend, plan="invariant")
    row = {k: v if v is None or k in ("weight", "bias") else v[5:6] for k, v in t.items()}
    one = run(case, row, backend, plan="invariant")
    for name in ("normed", "new", "dx", "dresidual", "drow_scale"):
        assert torch.equal(batch[name][5:6], one[name]), name


@native
@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_thread_count_changes_no_bit(layer, backend):
    case = Case((11, 40, 100), "fp32", layer)
    t = make(case)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results += [run(case, t, backend), run(case, t, backend)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


# --- the op as torch sees it ---------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize(
    "case",
    [
        Case((2, 3, 4)),
        Case((2, 4), residual=False, row_scale=False),
        Case((2, 3, 4), HALF, layer=True),
        Case((2, 3, 2, 4), layer=True, bias=False, row_scale=False),
        Case((2, 3, 4), residual=False, layout="transposed"),
        Case((2, 0, 4)),
    ],
    ids=str,
)
def test_opcheck(case, backend):
    t = {k: v if v is None else v.detach().requires_grad_() for k, v in make(case).items()}
    names = ("x", "weight", "bias", "residual", "row_scale")
    torch.library.opcheck(add_norm_op, (*(t[k] for k in names), 1e-5, case.layer, "auto", backend))
    t = {k: v if v is None else v.detach() for k, v in t.items()}
    _, new, stats = add_norm_op(*(t[k] for k in names), 1e-5, case.layer, "auto", backend)
    x = t["x"] if case.row_scale else None
    rest = (t["weight"], t["bias"], t["row_scale"], t["x"].dtype, case.residual, case.layer, "auto", backend)
    for dnormed, dnew in ((t["dnormed"], t["dnew"]), (None, t["dnew"]), (t["dnormed"], None)):
        torch.library.opcheck(add_norm_backward_op, (dnormed, dnew, x, new, stats, *rest))


@backends
def test_only_one_output_has_a_gradient(backend):
    t = make(BASE)
    x = t["x"].clone().requires_grad_()
    _, new = add_rms_norm(x, t["weight"], t["residual"], row_scale=t["row_scale"], backend=backend)
    (dx,) = torch.autograd.grad(new.sum(), x)
    torch.testing.assert_close(dx, t["row_scale"].view(2, 1, 1).expand_as(dx))
    weight = t["weight"].clone().requires_grad_()
    normed, new = add_rms_norm(x, weight, t["residual"], backend=backend)
    dx, dweight = torch.autograd.grad(normed.sum(), [x, weight])
    torch.testing.assert_close(dweight, (new * torch.rsqrt(new.square().mean(-1, keepdim=True) + 1e-5)).sum((0, 1)))


@backends
def test_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    t = make(Case(layer=True, dtype=HALF))
    names = ("x", "weight", "bias", "residual", "row_scale")
    inputs = [t[k].requires_grad_() for k in names]

    def f(x, weight, bias, residual, row_scale):
        normed, new = add_layer_norm(x * 2, weight, bias, residual, row_scale=row_scale, backend=backend)
        normed, new = add_rms_norm(normed, weight, new, backend=backend)
        return normed.float().sum() + new.square().sum()

    expected = torch.autograd.grad(f(*inputs), inputs)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


@backends
def test_lower_precision_residual_weight_and_autocast(backend):
    half = DTYPES[HALF]
    t = make(BASE)
    x, weight, residual = (t[k].to(half).requires_grad_() for k in ("x", "weight", "residual"))
    with torch.autocast(on.DEVICE, half):
        normed, new = add_rms_norm(x, weight, residual, backend=backend)
    assert normed.dtype == half and new.dtype == torch.float32
    assert torch.equal(new, x.float() + residual.float())
    torch.autograd.backward([normed.sum(), new.sum()])
    assert x.grad.dtype == weight.grad.dtype == residual.grad.dtype == half


def test_no_double_backward():
    t = make(BASE)
    x = t["x"].clone().requires_grad_()
    (dx,) = torch.autograd.grad(add_rms_norm(x, t["weight"])[0].sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        dx.sum().backward()


def test_flops():
    x = torch.randn(2, 5, 8, requires_grad=True)
    with FlopCounterMode(display=False) as count:
        normed, _ = add_rms_norm(x, torch.ones(8))
        assert count.get_total_flops() == 6 * 80
        normed.sum().backward()
    assert count.get_total_flops() == 20 * 80


@backends
@pytest.mark.parametrize("shape", [(3, 21), (2, 5, 48), (0, 48), (1, 2, 3, 21)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_changes_no_bit(dtype, shape, backend):
    """In inference mode a CPU goes past the checks and the dispatcher."""
    random = Random(5)
    x, residual, weight = random.randn(*shape).to(DTYPES[dtype]), random.randn(*shape), random.randn(shape[-1])
    for added in (x, x.mT.contiguous().mT):
        for before in (None, residual, residual.mT.contiguous().mT, residual.bfloat16()):
            expected = add_rms_norm(added, weight, before, backend=backend)
            with torch.inference_mode():
                got = add_rms_norm(added, weight, before, backend=backend)
            for one, other in zip(got, expected, strict=True):
                assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(48)}, ValueError, r"x must be \(b, ..., c\), got shape \(48,\)"),
        ({"x": torch.zeros(2, 5, 48, dtype=torch.int32)}, ValueError, "x must be float32"),
        ({"weight": torch.ones(47)}, ValueError, r"weight must have shape \(c,\) = \(48,\), got \(47,\)"),
        (
            {"residual": torch.ones(2, 1, 48)},
            ValueError,
            r"residual must have shape of x, \(2, 5, 48\), got \(2, 1, 48\)",
        ),
        ({"row_scale": torch.ones(5)}, ValueError, r"row_scale must have shape \(b,\) = \(2,\), got \(5,\)"),
        ({"eps": -1.0}, ValueError, "eps must not be negative"),
        ({"plan": "fast"}, ValueError, "plan must be"),
        ({"backend": "fast"}, ValueError, "backend must be"),
        ({"backend": "cuda"}, NotImplementedError, "cannot run this call"),
        ({"weight": torch.ones(48, device="meta")}, ValueError, "weight must be on cpu"),
    ],
)
def test_bad_inputs(change, error, message):
    for inference in (False, True):  # where a CPU has a way without the op
        with torch.inference_mode(inference), pytest.raises(error, match=message):
            add_rms_norm(**{"x": torch.zeros(2, 5, 48), "weight": torch.ones(48), **change})
    if "x" not in change and "residual" not in change:
        with pytest.raises(error, match=message):
            add_layer_norm(**{"x": torch.zeros(2, 5, 48), "weight": torch.ones(48), "bias": None, **change})


def test_fp64_runs_the_reference_only():
    assert reasons("add_rms_norm", "reference", torch.zeros(1, dtype=torch.float64)) == []
    if C is not None:
        assert reasons("add_rms_norm", "cpu", torch.zeros(1, dtype=torch.float64)) != []
