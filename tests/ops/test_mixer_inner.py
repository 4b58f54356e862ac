"""mixer_inner and frame_step: equal to the public ops they are made of, in every gradient; a carried state."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from endomamba.ops import (
    bidirectional_conv1d,
    bidirectional_scan,
    causal_conv1d,
    frame_step,
    mixer_inner,
    selective_scan,
)
from endomamba.ops._extension import C
from endomamba.ops.frame_step.op import frame_step_op
from endomamba.ops.mixer_inner.op import mixer_inner_op
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops.backends import HALF, Random

backends = on.backends("mixer_inner")
stepping = on.backends("frame_step")
NAMES = ("conv_weight", "conv_bias", "x_proj_weight", "dt_proj_weight", "dt_bias", "A", "D")


def parameters(d, n, r, w=4, dtype=torch.float32, seed=0):
    """Slow decays: dt around 0.03, so that a state outlives the sequences of these tests."""
    random = Random(seed)
    values = (
        random.randn(d, w) / 2,
        random.randn(d) / 2,
        random.randn(r + 2 * n, d) / d**0.5,
        random.randn(d, r) / 4,
        random.rand(d) - 4,
        -random.rand(d, n) - 0.5,
        random.randn(d),
    )
    return [v.to(dtype) for v in values]


def inputs(b, l, d, n, w=4, dtype=torch.float32, seed=1):
    random = Random(seed)
    xz = random.randn(b, l, 2 * d)
    return xz.to(dtype), random.randn(b, w - 1, d), random.randn(b, d, n)


def composed(xz, p, p_b=None, conv_state=None, ssm_state=None, scale=1.0, backend="reference", **walk):
    """What mixer_inner is by definition, out of public ops, differentiated by autograd."""
    x, z = xz.chunk(2, -1)

    def project(u, p):
        r, n = p[3].shape[1], p[5].shape[1]
        low, B, C = F.linear(u, p[2].to(u.dtype)).split((r, n, n), -1)
        return F.linear(low, p[3].to(u.dtype)), B, C

    if p_b is None:
        u, conv_state = causal_conv1d(
            x, p[0], p[1], activation="silu", initial_state=conv_state, return_final_state=True, backend=backend, **walk
        )
        dt, B, C = project(u, p)
        y, ssm_state = selective_scan(
            u, dt, p[5], B, C, p[6], z, p[4],
            initial_state=ssm_state, return_final_state=True, backend=backend, **walk,
        )  # fmt: skip
        return y, conv_state, ssm_state
    u, u_b = bidirectional_conv1d(x, *p[:2], *p_b[:2], activation="silu", backend=backend, **walk)
    (dt, B, C), (dt_b, B_b, C_b) = project(u, p), project(u_b, p_b)
    y, _, _ = bidirectional_scan(
        u, dt, p[5], B, C, u_b, dt_b, p_b[5], B_b, C_b,
        D=p[6], D_b=p_b[6], z=z, dt_bias=p[4], dt_bias_b=p_b[4], scale=scale, backend=backend, **walk,
    )  # fmt: skip
    return y, None, None


def gradients(outputs, tensors, seed=2):
    """Gradients of a fixed random projection of all outputs."""
    random = Random(seed)
    loss = sum((o * random.randn(*o.shape).to(o.dtype)).sum() for o in outputs if o is not None)
    return torch.autograd.grad(loss, tensors)


def leaves(tensors, dtype=None):
    return [t.detach().to(t.dtype if dtype is None else dtype).requires_grad_() for t in tensors]


CASES = {
    "base": dict(b=2, l=37, d=24, n=16, r=3),
    "one-token": dict(b=1, l=1, d=8, n=4, r=1),  # shorter than the window
    "two-tokens": dict(b=2, l=2, d=8, n=4, r=1),
    "chunks": dict(b=1, l=130, d=20, n=16, r=2),  # two chunk boundaries
    "odd": dict(b=3, l=9, d=17, n=3, r=2),
}
WALKS = {"frame": {}, "reverse": dict(reverse=True), "time": dict(order="time", frames=4)}


@backends
@pytest.mark.parametrize("case", on.few(CASES, "one-token", "two-tokens", "odd"))
def test_causal_equals_its_parts_in_every_gradient(case, backend):
    sizes = dict(CASES[case])
    r = sizes.pop("r")
    p = parameters(sizes["d"], sizes["n"], r)
    xz, conv_state, ssm_state = inputs(**sizes)
    tensors = [xz, *p, conv_state, ssm_state]

    def run(op, dtype, **kw):
        t = leaves(tensors, dtype)
        if op is mixer_inner:
            out = mixer_inner(
                t[0], *t[1:8], initial_conv_state=t[8], initial_ssm_state=t[9], return_final_state=True, **kw
            )
        else:
            out = composed(t[0], t[1:8], conv_state=t[8], ssm_state=t[9], **kw)
        return [o.detach() for o in out], gradients(out, t)

    got, eager, truth = run(mixer_inner, None, backend=backend), run(composed, None), run(composed, torch.float64)
    names = ("y", "conv_state", "ssm_state"), ("xz", *NAMES, "initial_conv_state", "initial_ssm_state")
    for group, values in zip(names, zip(got, eager, truth, strict=True), strict=True):
        for name, *triple in zip(group, *values, strict=True):
            # slack 4: another order of the products in the projections, each a sum over d
            assert_as_accurate_as_eager(name, *triple, slack=4.0)


@backends
@pytest.mark.parametrize("case", on.few(CASES, "one-token", "two-tokens", "odd"))
def test_bidirectional_equals_its_parts_in_every_gradient(case, backend):
    sizes = dict(CASES[case])
    r = sizes.pop("r")
    p, p_b = (parameters(sizes["d"], sizes["n"], r, seed=seed) for seed in (0, 5))
    tensors = [inputs(**sizes)[0], *p, *p_b]

    def run(op, dtype, **kw):
        t = leaves(tensors, dtype)
        out = op(t[0], *t[1:], **kw) if op is mixer_inner else op(t[0], t[1:8], t[8:], **kw)
        return [out[0].detach()], gradients(out, t)

    scale = dict(scale=0.5)
    got = run(mixer_inner, None, backend=backend, **scale)
    eager, truth = run(composed, None, **scale), run(composed, torch.float64, **scale)
    names = ("y",), ("xz", *NAMES, *(name + "_b" for name in NAMES))
    for group, values in zip(names, zip(got, eager, truth, strict=True), strict=True):
        for name, *triple in zip(group, *values, strict=True):
            assert_as_accurate_as_eager(name, *triple, slack=4.0)


@backends
@pytest.mark.parametrize(
    "walk, both", [("frame", False), ("reverse", False), ("time", False), ("frame", True), ("time", True)]
)
def test_walks(walk, both, backend):
    p, p_b = parameters(12, 4, 2), parameters(12, 4, 2, seed=5) if both else None
    xz = inputs(2, 20, 12, 4)[0]
    got = mixer_inner(xz, *p, *(p_b or ()), backend=backend, **WALKS[walk])[0]
    expected = composed(xz.double(), [t.double() for t in p], p_b and [t.double() for t in p_b], **WALKS[walk])[0]
    plain = composed(xz, p, p_b)[0]
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    if walk != "frame":
        assert (got - plain).abs().max() > 1e-2, "the walk changes nothing: this test shows nothing"


@pytest.mark.parametrize("both", [False, True], ids=["causal", "bidirectional"])
def test_gradcheck(both):
    p, p_b = parameters(3, 2, 1, w=3), parameters(3, 2, 1, w=3, seed=5)
    xz, conv_state, ssm_state = inputs(2, 5, 3, 2, w=3)
    if both:
        t = leaves([xz, *p, *p_b], torch.float64)
        assert torch.autograd.gradcheck(lambda *t: mixer_inner(*t, scale=0.5)[0], t)
    else:
        t = leaves([xz, *p, conv_state, ssm_state], torch.float64)
        assert torch.autograd.gradcheck(
            lambda *t: mixer_inner(*t[:8], initial_conv_state=t[8], initial_ssm_state=t[9], return_final_state=True), t
        )


def out_projection(c, d, dtype=torch.float32, seed=7):
    random = Random(seed)
    return [(random.randn(c, d) / d**0.5).to(dtype), random.randn(c).to(dtype)]


OUT_FORMS = {
    "causal": dict(),
    "states": dict(states=True),
    "reverse": dict(walk=dict(reverse=True), bias=False),
    "time": dict(walk=dict(order="time", frames=3)),
    "packed": dict(b=1, walk=dict(cu_seqlens=(0, 4, 4, 21), max_seqlen=17)),
    # More than one launch of the Triton scan.  With so few tokens eager happens to err by a third of an ulp in the
    # gradient of dt_proj, for other seeds by far more: 5 instead of 4 times as much.
    "n20": dict(b=1, l=9, n=20, slack=5.0),
    "both": dict(both=True),
    "both-no-bias": dict(both=True, bias=False),
    "both-in-turn": dict(both=True, plan="invariant"),
    "both-n20": dict(both=True, b=1, l=9, n=20, slack=5.0),
    "long": dict(b=1, l=130),
    "fp16": dict(dtype=torch.float16, both=True),
    "bf16": dict(dtype=torch.bfloat16),
}


@backends
@pytest.mark.parametrize("form", on.few(OUT_FORMS, "states", "both", "both-n20"))
def test_out_proj_equals_a_linear_after_it(form, backend):
    """The output, every gradient, and y itself: its gradient of the weight is dout' y, with the y of the backward."""
    o = dict(b=2, l=21, n=4, both=False, states=False, bias=True, plan="auto", walk={}, dtype=torch.float32, slack=4.0)
    o |= OUT_FORMS[form]
    if o["dtype"] not in on.DTYPES.values():
        pytest.skip("the interpreter has bf16 wrong")
    d, n, c = 12, o["n"], 7
    xz, *states = inputs(o["b"], o["l"], d, n, dtype=o["dtype"])
    p, p_b = parameters(d, n, 2), parameters(d, n, 2, seed=5) if o["both"] else []
    out_proj = out_projection(c, d)[: 2 if o["bias"] else 1]
    states = states if o["states"] else []
    tensors = [xz, *p, *p_b, *states, *out_proj]
    walk = {k: torch.tensor(v) if k == "cu_seqlens" else v for k, v in o["walk"].items()}
    scale = dict(scale=0.5) if o["both"] else {}

    def run(fused, dtype, **kw):
        t = leaves(tensors, dtype)
        first, second, weight, bias = t[1:8], t[8 : 8 + len(p_b)], t[-len(out_proj)], t[-1] if o["bias"] else None
        start = t[8 + len(p_b) : len(t) - len(out_proj)]
        if fused:
            carried = dict(zip(("initial_conv_state", "initial_ssm_state"), start, strict=False))
            carried |= dict(return_final_state=bool(start))
            outputs = mixer_inner(
                t[0], *first, *second, out_proj_weight=weight, out_proj_bias=bias, **carried, **scale, **walk, **kw
            )
        else:
            y, *after = composed(t[0], first, second or None, *start, **scale, **walk)
            out = F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))
            outputs = (out, *(after if start else ()))
        outputs = [x for x in outputs if x is not None]
        return [x.detach() for x in outputs], gradients(outputs, t)

    got, eager = run(True, None, backend=backend, plan=o["plan"]), run(False, None)
    truth = run(False, torch.float64)
    assert got[0][0].shape == (*xz.shape[:2], c)
    for values in zip(got, eager, truth, strict=True):
        for i, triple in enumerate(zip(*values, strict=True)):
            assert_as_accurate_as_eager(f"{i}", *triple, slack=o["slack"] * on.slack(backend))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("both", [False, True], ids=["causal", "bidirectional"])
def test_gradcheck_out_proj(both, bias):
    p, p_b = parameters(3, 2, 1, w=3), parameters(3, 2, 1, w=3, seed=5)
    xz, conv_state, ssm_state = inputs(2, 4, 3, 2, w=3)
    k = 2 if bias else 1

    def out_proj(t):
        return dict(zip(("out_proj_weight", "out_proj_bias"), t[-k:], strict=False))

    if both:
        t = leaves([xz, *p, *p_b, *out_projection(2, 3)[:k]], torch.float64)
        assert torch.autograd.gradcheck(lambda *t: mixer_inner(*t[:-k], scale=0.5, **out_proj(t))[0], t)
    else:
        t = leaves([xz, *p, conv_state, ssm_state, *out_projection(2, 3)[:k]], torch.float64)
        states = dict(return_final_state=True)
        assert torch.autograd.gradcheck(
            lambda *t: mixer_inner(*t[:8], initial_conv_state=t[8], initial_ssm_state=t[9], **states, **out_proj(t)), t
        )


@pytest.mark.parametrize("both", [False, True], ids=["causal", "bidirectional"])
def test_gradcheck_in_proj(both):
    """From the input of in_proj to the output of out_proj."""
    p, p_b = parameters(3, 2, 1, w=3), parameters(3, 2, 1, w=3, seed=5) if both else []
    hidden = inputs(2, 4, 1, 2)[0]  # two channels
    names = ("out_proj_weight", "out_proj_bias", "in_proj_weight", "in_proj_bias")
    t = leaves([hidden, *p, *p_b, *out_projection(2, 3), *out_projection(6, 2, seed=8)], torch.float64)
    assert torch.autograd.gradcheck(lambda *t: mixer_inner(*t[:-4], **dict(zip(names, t[-4:], strict=True)))[0], t)


@backends
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("bias", on.few([True, False], True))
def test_in_proj_equals_a_linear_before_it(bias, half, backend):
    c, d = 6, 12
    hidden = Random(3).randn(2, 9, c)
    in_proj = out_projection(2 * d, c, seed=8)[: 2 if bias else 1]
    t = leaves([hidden, *parameters(d, 4, 2), *out_projection(c, d)[:1], *in_proj])
    with torch.autocast(on.DEVICE, on.DTYPES[HALF], enabled=half):
        inside = mixer_inner(
            *t[:8], out_proj_weight=t[8], in_proj_weight=t[9], in_proj_bias=t[10] if bias else None, backend=backend
        )[0]
        outside = mixer_inner(F.linear(t[0], *t[9:]), *t[1:8], out_proj_weight=t[8], backend=backend)[0]
    assert inside.shape == hidden.shape and torch.equal(inside, outside)
    for got, want in zip(gradients([inside], t), gradients([outside], t), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if half else 1e-5, atol=2e-2 if half else 1e-5)


@backends
@pytest.mark.parametrize("wanted", on.few(["xz", "weight", "bias", "state", "not out"], "weight", "not out"))
def test_out_proj_when_few_gradients_are_wanted(wanted, backend):
    """What is asked for is what it is among all; `not out`: the loss sees the final state alone."""
    p, (xz, _, ssm_state) = parameters(8, 4, 2), inputs(2, 9, 8, 4)
    tensors = [xz, *p, ssm_state, *out_projection(5, 8)]
    which = dict(xz=[0], weight=[9], bias=[10], state=[8])

    def run(t, chosen):
        out, _, state = mixer_inner(
            *t[:8], initial_ssm_state=t[8], out_proj_weight=t[9], out_proj_bias=t[10], return_final_state=True,
            backend=backend,
        )  # fmt: skip
        if wanted == "not out":
            return gradients([state], chosen)
        return gradients([out] if wanted in ("weight", "bias") else [out, state], chosen)

    everything = leaves(tensors)
    if wanted == "not out":
        got = run(everything, everything)
        assert not got[9].any() and not got[10].any() and got[0].any() and got[8].any()
        return
    all_of_them = run(everything, [everything[i] for i in which[wanted]])
    few = [t.detach().clone().requires_grad_(i in which[wanted]) for i, t in enumerate(tensors)]
    for a, b in zip(run(few, [few[i] for i in which[wanted]]), all_of_them, strict=True):
        assert torch.equal(a, b)


@backends
@pytest.mark.parametrize("form", ["in_proj", "both-in_proj", "out_proj", "both-out_proj"])
def test_backward_keeps_the_arguments_and_chunk_states(form, backend):
    """Neither xz nor y are saved where their projections are the op's."""
    b, l, d, n, c = 2, 9, 8, 4, 5
    both, first = form.startswith("both"), form.endswith("in_proj")
    p, p_b = parameters(d, n, 2), parameters(d, n, 2, seed=5) if both else []
    hidden = Random(3).randn(b, l, c if first else 2 * d)
    tensors = [hidden, *p, *p_b, *out_projection(c, d), *out_projection(2 * d, c, seed=8)]

    def saved(inside):
        seen, t = [], leaves(tensors)
        inner, out_proj, in_proj = t[1:-4], t[-4:-2], t[-2:]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (seen.append(x.detach()), x)[1], lambda x: x):
            if inside:
                given = dict(out_proj_weight=out_proj[0], out_proj_bias=out_proj[1])
                given |= dict(in_proj_weight=in_proj[0], in_proj_bias=in_proj[1]) if first else {}
                mixer_inner(t[0], *inner, **given, backend=backend)
            else:
                xz = F.linear(t[0], *in_proj) if first else t[0]
                F.linear(mixer_inner(xz, *inner, backend=backend)[0], *out_proj)
        arguments = {x.data_ptr() for x in t}
        return sorted(tuple(x.shape) for x in seen if x.numel() and x.data_ptr() not in arguments)

    chunks = [(b, 1, d, n)] * (2 if both else 1)
    projections = [(b, l, d)] + [(b, l, 2 * d)] * first
    found = saved(False)
    assert len(found) == len(chunks) + len(projections), found  # else the search finds nothing and shows nothing
    assert saved(True) == chunks


@backends
@pytest.mark.parametrize("split", on.few([1, 2, 3, 20, 64, 69]))
def test_split_and_carried_state_equal_the_whole(split, backend):
    """Outputs and gradients, the gradient flowing back through both states (demand B2, B7: chunks shorter than w)."""
    p, (xz, conv_state, ssm_state) = parameters(16, 4, 2), inputs(2, 70, 16, 4)
    states = dict(return_final_state=True, backend=backend)

    def whole(t):
        return mixer_inner(t[0], *t[1:8], initial_conv_state=t[8], initial_ssm_state=t[9], **states)

    def parts(t, keep_state=1.0):
        y1, c, h = mixer_inner(t[0][:, :split], *t[1:8], initial_conv_state=t[8], initial_ssm_state=t[9], **states)
        y2, c, h = mixer_inner(
            t[0][:, split:], *t[1:8], initial_conv_state=c, initial_ssm_state=h * keep_state, **states
        )
        return torch.cat((y1, y2), 1), c, h

    tensors = [xz, *p, conv_state, ssm_state]
    t_whole, t_parts = leaves(tensors), leaves(tensors)
    out, split_out = whole(t_whole), parts(t_parts)
    tolerance = 2e-5
    lost = (parts(t_parts, keep_state=0.0)[0] - out[0]).abs().max()
    assert lost > 100 * tolerance, f"the state does not matter here ({lost:.1e})"
    for a, b in zip(split_out, out, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(gradients(split_out, t_parts), gradients(out, t_whole), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@backends
def test_packed_equals_a_loop(backend):
    p, lengths = parameters(8, 4, 2), [3, 0, 1, 17]
    xz = inputs(1, sum(lengths), 8, 4)[0]
    _, conv_state, ssm_state = inputs(len(lengths), 1, 8, 4)
    cu = torch.tensor([0, 3, 3, 4, 21], dtype=torch.int32)
    tensors = leaves([xz, *p, conv_state, ssm_state])
    states = dict(return_final_state=True, backend=backend)
    packed = mixer_inner(
        *tensors[:8],
        initial_conv_state=tensors[8],
        initial_ssm_state=tensors[9],
        cu_seqlens=cu,
        max_seqlen=17,
        **states,
    )
    loop_tensors = leaves([xz, *p, conv_state, ssm_state])
    rows = [
        mixer_inner(
            loop_tensors[0][:, start:stop], *loop_tensors[1:8], initial_conv_state=loop_tensors[8][i : i + 1],
            initial_ssm_state=loop_tensors[9][i : i + 1], **states,
        )
        for i, (start, stop) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False))
    ]  # fmt: skip
    loop = [torch.cat([row[k] for row in rows], 1 if k == 0 else 0) for k in range(3)]
    for a, b in zip(packed, loop, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(packed, tensors), gradients(loop, loop_tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@on.slow_interpreted
@pytest.mark.parametrize("dtype", [d for d in on.DTYPES if d != "fp32"])
@backends
def test_half_precision(dtype, backend):
    """Activations in half precision, parameters in fp32: gradients come in their tensor's dtype, y stays near fp64."""
    dtype = on.DTYPES[dtype]
    p, (xz, conv_state, ssm_state) = parameters(32, 16, 2), inputs(2, 50, 32, 16, dtype=dtype)
    t = leaves([xz, *p, conv_state, ssm_state])
    out = mixer_inner(*t[:8], initial_conv_state=t[8], initial_ssm_state=t[9], return_final_state=True, backend=backend)
    assert out[0].dtype == dtype and out[1].dtype == out[2].dtype == torch.float32
    truth_t = leaves([xz, *p, conv_state, ssm_state], torch.float64)
    truth = composed(truth_t[0], truth_t[1:8], conv_state=truth_t[8], ssm_state=truth_t[9])
    eager_t = leaves([xz, *p, conv_state, ssm_state])
    eager = composed(eager_t[0], eager_t[1:8], conv_state=eager_t[8], ssm_state=eager_t[9])
    for name, got, plain, exact in zip(("y", "conv", "ssm"), out, eager, truth, strict=True):
        assert_as_accurate_as_eager(name, got.detach(), plain.detach(), exact.detach())
    triples = zip(gradients(out, t), gradients(eager, eager_t), gradients(truth, truth_t), t, strict=True)
    for name, (got, plain, exact, tensor) in zip(("xz", *NAMES, "h_conv", "h_ssm"), triples, strict=True):
        assert got.dtype == tensor.dtype
        # slack 3: the gradient of u is added in half precision from two sources, here in another order
        assert_as_accurate_as_eager(name, got, plain, exact, slack=3.0)


@backends
def test_autocast_runs_the_projections_in_its_dtype(backend):
    half = on.DTYPES[HALF]
    p, (xz, *_) = parameters(16, 4, 2), inputs(1, 10, 16, 4)
    with torch.autocast(on.DEVICE, half):
        y, _, state = mixer_inner(xz, *p, return_final_state=True, backend=backend)
    plain, _, plain_state = mixer_inner(xz.to(half), *p, return_final_state=True, backend=backend)
    assert y.dtype == half and state.dtype == torch.float32
    assert torch.equal(y, plain) and torch.equal(state, plain_state)


@backends
def test_autocast_runs_out_proj_as_a_linear_would(backend):
    half = on.DTYPES[HALF]
    p, (xz, *_) = parameters(16, 4, 2), inputs(2, 10, 16, 4)
    t = leaves([xz, *p, *out_projection(6, 16)])
    with torch.autocast(on.DEVICE, half):
        out = mixer_inner(*t[:8], out_proj_weight=t[8], out_proj_bias=t[9], backend=backend)[0]
        expected = F.linear(mixer_inner(*t[:8], backend=backend)[0], *t[8:])
    assert out.dtype == half and torch.equal(out, expected)
    for got, want, leaf in zip(gradients([out], t), gradients([expected], t), t, strict=True):
        assert got.dtype == want.dtype == leaf.dtype
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@stepping
@pytest.mark.parametrize("l", on.few([1, 2, 5, 66], 1, 5))
def test_frame_step_is_mixer_inner_in_place(l, backend):
    p, (xz, conv_state, ssm_state) = parameters(16, 4, 2), inputs(2, l, 16, 4)
    expected = mixer_inner(
        xz, *p, initial_conv_state=conv_state, initial_ssm_state=ssm_state, return_final_state=True, backend=backend
    )
    conv, ssm = conv_state.clone(), ssm_state.clone()
    y = frame_step(xz, conv, ssm, *p, backend=backend)
    for got, want in zip((y, conv, ssm), expected, strict=True):
        if backend == "triton":  # a kernel of its own
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(got, want)
    assert not torch.equal(conv, conv_state) and not torch.equal(ssm, ssm_state)


@pytest.fixture
def level():
    """Sets an instruction set for a test; the best one is back afterwards."""
    best = C.level()
    yield C.set_level
    C.set_level(best)


@on.native("mixer_inner")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", C.levels() if C else [])
def test_every_instruction_set(name, dtype, level, backend):
    """Whole tiles of tokens and columns and what is left over; channels, states and ranks that fill no vector."""
    dtype = on.DTYPES[dtype]
    level(name)
    for b, l, d, n, r in ((2, 29, 48, 16, 3), (1, 70, 37, 5, 2)):
        p, p_b = parameters(d, n, r), parameters(d, n, r, seed=3)
        xz, *states = inputs(b, l, d, n, dtype=dtype)
        wide = [[t.double() for t in side] for side in (p, p_b)]
        options = dict(zip(("initial_conv_state", "initial_ssm_state"), states)) | dict(return_final_state=True)
        got = mixer_inner(xz, *p, **options, backend=backend)
        exact = composed(xz.double(), wide[0], None, *(s.double() for s in states))
        eager = composed(xz, p, None, *states)
        for label, *each in zip(("y", "conv", "ssm"), got, eager, exact, strict=True):
            assert_as_accurate_as_eager(label, *each, slack=4.0)
        got, exact = mixer_inner(xz, *p, *p_b, backend=backend)[0], composed(xz.double(), *wide)[0]
        assert_as_accurate_as_eager("both", got, composed(xz, p, p_b)[0], exact, slack=4.0)


@on.native("mixer_inner")
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", C.levels() if C else [])
def test_a_decay_is_off_by_a_millionth_of_dt_and_in_half_precision_by_1_5e_5(name, dtype, level, backend):
    """With u = 0 a state of one decays to exp(dt A) and nothing else; slow decays must not add up an error of their
    own, so that log(state) / (dt A) is what counts."""
    level(name)
    d, n, dtype = 48, 16, on.DTYPES[dtype]
    dt = torch.logspace(-4, 0.5, d, dtype=torch.float64)
    A = -torch.linspace(0.3, 25.0, d * n, dtype=torch.float64).view(n, d).T.float()
    zeros = [torch.zeros(shape) for shape in ((d, 4), (d,), (2 + 2 * n, d), (d, 2))]
    states = torch.zeros(1, 3, d), torch.ones(1, d, n)
    bias = torch.log(torch.expm1(dt)).float()
    xz = torch.zeros(1, 1, 2 * d, dtype=dtype)
    *_, ssm = mixer_inner(
        xz, *zeros, bias, A, None, initial_conv_state=states[0], initial_ssm_state=states[1],
        return_final_state=True, backend=backend,
    )  # fmt: skip
    exponent = torch.log1p(torch.exp(bias.double())).unsqueeze(1) * A.double()
    error = (ssm[0].double() - exponent.exp()).abs() / exponent.exp()
    rounding = 2e-7 + 2e-7 * exponent.abs()  # of the state itself; of dt, log2(e) A and their product
    allowed = rounding + (0.0 if dtype == torch.float32 else 1.5e-5) * exponent.abs()
    assert (error <= allowed).all(), f"off by {(error / allowed).max():.2f} of what is allowed"


@on.native("mixer_inner")
def test_threads_and_batch_change_no_bit(backend):
    d, n, l = 96, 16, 197
    p, p_b = parameters(d, n, 6), parameters(d, n, 6, seed=3)
    xz = inputs(3, l, d, n)[0]
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append((mixer_inner(xz, *p, *p_b, backend=backend)[0], mixer_inner(xz, *p, backend=backend)[0]))
    finally:
        torch.set_num_threads(threads)
    for both, one in runs[1:]:
        assert torch.equal(both, runs[0][0]) and torch.equal(one, runs[0][1])
    assert torch.equal(mixer_inner(xz[1:2], *p, *p_b, backend=backend)[0], runs[0][0][1:2])


def test_frame_step_refuses_gradients():
    p, (xz, conv_state, ssm_state) = parameters(8, 4, 2), inputs(1, 3, 8, 4)
    before = ssm_state.clone()
    with pytest.raises(RuntimeError, match="no gradient"):
        frame_step(xz.requires_grad_(), conv_state, ssm_state, *p)
    assert torch.equal(ssm_state, before)
    with torch.no_grad():
        assert frame_step(xz, conv_state, ssm_state, *p).isfinite().all()


def test_no_double_backward():
    p, (xz, *_) = parameters(4, 2, 1), inputs(1, 3, 4, 2)
    xz = xz.requires_grad_()
    (first,) = torch.autograd.grad(mixer_inner(xz, *p)[0].sum(), xz, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        first.sum().backward()


FORMS = {
    "causal": dict(),
    "causal-bare": dict(drop=("conv_bias", "dt_bias", "D")),
    "states": dict(states=True),
    "both": dict(both=True),
    "packed": dict(packed=True, states=True),
    "out_proj": dict(states=True, out_proj=2),
    "both-out_proj": dict(both=True, out_proj=1),
    "both-in_proj": dict(both=True, out_proj=1, in_proj=2),
}


@backends
@pytest.mark.parametrize("form", on.few(FORMS, "states", "both-out_proj"))
@pytest.mark.parametrize("save_states", on.few([True, False], True), ids=["train", "eval"])
def test_opcheck(form, save_states, backend):
    options = FORMS[form]
    sequences = 3 if options.get("packed") else 2
    p, p_b = parameters(6, 4, 2), parameters(6, 4, 2, seed=5)
    p = [None if name in options.get("drop", ()) else t for name, t in zip(NAMES, p, strict=True)]
    xz = inputs(1 if options.get("packed") else 2, 7, 6, 4)[0]
    _, conv_state, ssm_state = inputs(sequences, 1, 6, 4)
    tensors = [xz, *p, *(p_b if options.get("both") else [None] * 7)]
    tensors += [conv_state, ssm_state] if options.get("states") else [None, None]
    tensors += [*out_projection(5, 6)[: options.get("out_proj", 0)], None, None][:2]
    tensors += [*out_projection(12, 5)[: options.get("in_proj", 0)], None, None][:2]
    if options.get("in_proj"):
        tensors[0] = inputs(2, 7, 3, 4)[0][..., :5].contiguous()
    if save_states:
        tensors = [None if t is None else t.requires_grad_() for t in tensors]
    cu = torch.tensor([0, 3, 3, 7]) if options.get("packed") else None
    args = (
        *tensors,
        cu,
        1.0,
        False,
        0,
        4 if cu is not None else 0,
        not options.get("both"),
        save_states,
        "auto",
        backend,
    )
    opcheck(mixer_inner_op, args)


@stepping
def test_opcheck_frame_step(backend):
    p, (xz, conv_state, ssm_state) = parameters(6, 4, 2), inputs(2, 5, 6, 4)
    opcheck(frame_step_op, (xz, conv_state, ssm_state, *p, backend))


@on.slow_interpreted
@backends
def test_compile_fullgraph(backend):
    p, p_b = parameters(8, 4, 2), parameters(8, 4, 2, seed=5)

    def step(xz, conv_state, ssm_state):
        y, conv_state, ssm_state = mixer_inner(
            xz, *p, initial_conv_state=conv_state, initial_ssm_state=ssm_state, return_final_state=True, backend=backend
        )
        return mixer_inner(torch.cat((y, y), -1), *p, *p_b, backend=backend)[0], conv_state, ssm_state

    tensors = leaves(inputs(2, 9, 8, 4))
    compiled_tensors = leaves(inputs(2, 9, 8, 4))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out, compiled_out = step(*tensors), compiled(*compiled_tensors)
    for a, b in zip(compiled_out, out, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(compiled_out, compiled_tensors), gradients(out, tensors), strict=True):
        torch.testing.assert_close(a, b)


def test_flops_are_counted_by_hand():
    b, l, d, n, r, w = 2, 5, 8, 4, 2, 4
    p, (xz, *_) = parameters(d, n, r, w), inputs(b, l, d, n, w)
    with FlopCounterMode(display=False) as counter:
        mixer_inner(xz, *p)
    tokens = b * l
    conv, x_proj, dt_proj = 2 * tokens * d * w, 2 * tokens * d * (r + 2 * n), 2 * tokens * d * r
    scan, gate = 9 * tokens * d * n + tokens * d, tokens * d
    assert counter.get_total_flops() == conv + x_proj + dt_proj + scan + gate


def test_flops_of_out_proj():
    b, l, d, n, c = 2, 5, 8, 4, 3
    p, (xz, *_) = parameters(d, n, 2), inputs(b, l, d, n)
    weight, bias = out_projection(c, d)
    matrix, again = 2 * b * l * d * c, b * l * d

    def count(**out_proj):
        t = leaves([xz, *p])
        with FlopCounterMode(display=False) as forward:
            loss = mixer_inner(*t, **out_proj)[0].sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        return forward.get_total_flops(), backward.get_total_flops()

    plain, fused = count(), count(out_proj_weight=weight, out_proj_bias=bias)
    assert (fused[0] - plain[0], fused[1] - plain[1]) == (matrix, 2 * matrix + again)
    first = 2 * b * l * 2 * d * 2 * d  # xz stands for its own input: as many channels
    both = count(out_proj_weight=weight, in_proj_weight=torch.zeros(2 * d, 2 * d))
    assert (both[0] - fused[0], both[1] - fused[1]) == (first, 3 * first)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(xz=torch.zeros(2, 5, 15)), "odd last size"),
        (dict(A=torch.zeros(7, 4)), r"A must be \(d, n\) with d = 8"),
        (dict(x_proj_weight=torch.zeros(9, 8)), r"x_proj_weight must have shape"),
        (
            dict(initial_ssm_state=torch.zeros(1, 8, 4)),
            r"initial_ssm_state must have shape .*\(2, 8, 4\), got \(1, 8, 4\)",
        ),
        (dict(scale=0.5), "scale=0.5 weighs the sum of two directions"),
        (dict(conv_weight_b=torch.zeros(8, 4)), "needs x_proj_weight_b, A_b, dt_proj_weight_b too"),
        (dict(out_proj_weight=torch.zeros(5, 7)), r"out_proj_weight must be \(c, d\) with d = 8, got \(5, 7\)"),
        (dict(in_proj_weight=torch.zeros(16, 15)), r"in_proj_weight must be \(2d, c\) with c = 16, got \(16, 15\)"),
        (dict(out_proj_bias=torch.zeros(5)), "out_proj_bias needs out_proj_weight too"),
        (dict(out_proj_weight=torch.zeros(5, 8), out_proj_bias=torch.zeros(4)), r"out_proj_bias must have shape"),
        (dict(backend="gpu"), "backend must be 'auto' or one of"),
        (dict(plan="fast"), "plan must be 'auto' or 'invariant'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_gets_one_sentence(change, message):
    arguments = dict(zip(NAMES, parameters(8, 4, 2), strict=True), xz=torch.zeros(2, 5, 16)) | change
    with pytest.raises(ValueError, match=message) as error:
        mixer_inner(**arguments)
    assert "\n" not in str(error.value)


def test_named_backend_that_cannot_run_gives_its_reason():
    with pytest.raises(NotImplementedError, match="backend 'triton' cannot run this call"):
        mixer_inner(torch.zeros(2, 5, 16), *parameters(8, 4, 2), backend="triton")
