"""Inputs and runs for the tests of both scan ops.

Weights have a long memory (dt between 1e-3 and 1e-1, as Mamba's own init): with the published init of dt = 0.69 a state
fades within a few tokens and no test of carried state could fail.
"""

import torch
from hypothesis import strategies as st

from endomamba.ops.bidirectional_scan import bidirectional_scan
from endomamba.ops.selective_scan import selective_scan
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops.backends import Random

DTYPES = list(on.DTYPES.values())
HALF = on.DTYPES[on.HALF]
# Of each row on a GPU; every dtype has kernels of its own, and fp16 has tests enough beside the rows.
ROW_DTYPES = on.few(DTYPES, torch.float32, on_gpu=(torch.float32, torch.bfloat16))
ACTIVATIONS = {"x", "dt", "B", "C", "z", "x_b", "dt_b", "B_b", "C_b"}


def dtype_id(dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


# The CUDA kernels have one state size.
STATES = 16 if on.DEVICE == "cuda" else 4


def make(
    b=2,
    l=9,
    d=12,
    n=STATES,
    g=None,
    dtype=torch.float32,
    constant="",
    absent=(),
    seqs=None,
    directions=1,
    seed=0,
    **flags,
) -> dict:
    """Arguments of a scan in the public form.  constant: "B", "C" or "BC"; absent: names left out; the rest: flags."""
    random = Random(seed)

    def normal(*shape):
        return random.randn(*shape, dtype=torch.float64)

    def uniform(low, high, *shape):
        return low + (high - low) * random.rand(*shape, dtype=torch.float64)

    inputs = {"z": normal(b, l, d)}
    for side in ("", "_b")[:directions]:
        step = torch.exp(uniform(-6.9, -2.3, d))
        grouped = (b, l, n) if g is None else (b, l, g, n)
        inputs |= {
            "x" + side: normal(b, l, d),
            "dt" + side: 0.5 * normal(b, l, d),
            "A" + side: -uniform(0.5, 1.5, d, n) * torch.arange(1, n + 1),
            "B" + side: normal(d, n) if "B" in constant else normal(*grouped),
            "C" + side: normal(d, n) if "C" in constant else normal(*grouped),
            "D" + side: normal(d),
            "dt_bias" + side: torch.log(torch.expm1(step)),  # softplus(dt_bias) = step
            "initial_state" + side: normal(seqs or b, d, n),
        }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {
        name: value.to(dtype if name in ACTIVATIONS else wide) for name, value in inputs.items() if name not in absent
    }
    return inputs | flags


def drawn_sizes(data) -> dict:
    """Up to a few of each; on a GPU, which compiles anew for other sizes, one choice that allows every kind of load."""
    if on.DEVICE == "cuda":
        return {"b": 3, "l": 6, "d": 9, "n": STATES}
    return {k: data.draw(st.integers(1, high), label=k) for k, high in (("b", 3), ("l", 6), ("d", 9), ("n", 5))}


def tensors(inputs: dict) -> dict:
    """The differentiable ones."""
    return {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.dtype.is_floating_point}


def cast(inputs: dict, dtype) -> dict:
    return inputs | {k: v.to(dtype) for k, v in tensors(inputs).items()}


def scan(inputs: dict, **flags) -> tuple:
    """(y, final state, ...) of the op that the inputs are made for, final states included."""
    call = bidirectional_scan if "x_b" in inputs else selective_scan
    return call(**({"return_final_state": True} | inputs | flags))


def run(inputs: dict, grads: list | None = None, **flags) -> dict:
    """Outputs, and the gradients of a random weighting of all outputs (`grads`: those weights), by name."""
    leaves = {k: v.detach().requires_grad_() for k, v in tensors(inputs).items()}
    outputs = scan(inputs | leaves, **flags)
    if grads is None:
        grads = weights(outputs)
    grads = [w.to(o.dtype) for w, o in zip(grads, outputs, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), grads)
    names = ("y", "final_state", "final_state_b")[: len(outputs)]
    return {k: v.detach() for k, v in zip(names, outputs, strict=True)} | {
        "d" + k: v for k, v in zip(leaves, found, strict=True)
    }


def weights(outputs, seed=1) -> list:
    """Incoming gradients, already rounded to the outputs' dtypes."""
    random = Random(seed)
    return [random.randn(*o.shape, dtype=torch.float64).to(o.dtype) for o in outputs]


def check_accuracy(inputs: dict, backend: str, slack: float = 2.0) -> dict:
    """The accuracy rule on outputs, states and every gradient; returns the truth."""
    with torch.no_grad():
        grads = weights(scan(inputs, backend="reference"))
    got = run(inputs, grads, backend=backend)
    eager = run(inputs, grads, backend="reference")
    truth = run(cast(inputs, torch.float64) | {"out_dtype": None}, grads, backend="reference")
    slack *= on.slack(backend)
    for name in truth:
        # Parameters: a running sum over tokens whose terms cancel, beside the cascade sums of PyTorch.
        summed = name[1:] in inputs and inputs[name[1:]].ndim < 3
        assert_as_accurate_as_eager(name, got[name], eager[name], truth[name], 4 * slack if summed else slack)
    return truth


def assert_close(got: dict, want: dict, tolerance=1e-11) -> None:
    """Equality of two fp64 runs up to the order of their sums."""
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


def assert_same(got: dict, want: dict, backend: str) -> None:
    """The same bits; on the reference, in fp64 (`exact`), and on a GPU the same up to rounding.

    PyTorch's vectorised loops take the end of a tensor another way, so the reference's bits move with shape and stride.
    A GPU kernel may sum in an order that moves with them too.
    """
    if backend in ("triton", "cuda"):
        for name, value in want.items():
            eps = max(8 * torch.finfo(value.dtype).eps, 1e-5)
            atol = eps * float(value.abs().max()) if value.numel() else 0
            torch.testing.assert_close(got[name], value, rtol=eps, atol=atol, msg=lambda m: f"{name}: {m}")  # noqa: B023
    else:
        assert_close(got, want) if backend == "reference" else assert_bitwise(got, want)


def exact(backend: str) -> torch.dtype:
    return torch.float64 if backend == "reference" else torch.float32


def assert_bitwise(got: dict, want: dict, names=None) -> None:
    for name in names or want:
        assert got[name].dtype == want[name].dtype, name
        assert torch.equal(got[name], want[name]), f"{name}: bits differ"


# Each row changes one thing of the base case (b2 l9 d12 n4, all options): id -> arguments of `make`.
ROWS = {
    "base": {},
    # lengths: nothing, the first tokens, both sides of a chunk of 64, two chunks and one token
    **{f"l{l}": {"l": l} for l in (0, 1, 2, 3, 4, 63, 64, 65, 129)},
    "b0": {"b": 0},
    "b9": {"b": 9, "l": 3},  # more sequences than one partial sum of dA takes (8)
    # state sizes: one, odd, the published 16, more than any register file
    **{f"n{n}": {"n": n} for n in (1, 3, 16)},
    # a GPU compiles kernels for every 16 states: a first, a middle and a last part are enough there
    "n300" if on.DEVICE == "cpu" else "n35": {"n": 300 if on.DEVICE == "cpu" else 35, "b": 1, "l": 3, "d": 3},
    # channels: one, odd, around the kernels' blocks of 32 and 64, a published width
    **{f"d{d}": {"d": d} for d in (1, 5, 48, 70)},
    "d768": {"d": 768, "l": 3, "n": 16},
    "g2": {"g": 2},
    "g-d": {"g": 12},
    "g2-d70": {"g": 2, "d": 70},  # a group that ends inside a block
    "g35-d140": {"g": 35, "d": 140},
    "constant-B": {"constant": "B"},
    "constant-C": {"constant": "C"},
    "constant-BC": {"constant": "BC", "b": 9},
    "constant-B-g2": {"constant": "B", "g": 2},
    "constant-BC-d70": {"constant": "BC", "d": 70, "l": 66},
    "bare": {"absent": ("D", "z", "dt_bias", "initial_state", "D_b", "dt_bias_b", "initial_state_b")},
    "no-z": {"absent": ("z",)},
    "no-D": {"absent": ("D",)},
    "no-dt-bias": {"absent": ("dt_bias",)},
    "no-initial-state": {"absent": ("initial_state",)},
    "time": {"order": "time", "frames": 3},
    "time-chunks": {"order": "time", "frames": 7, "l": 70},
    "out-fp32": {"out_dtype": torch.float32},
    "mask": {"mask": torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 0], [0] * 9], dtype=torch.bool)},
    "mask-constant-B": {"mask": torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1, 1]] * 2, dtype=torch.bool), "constant": "B"},
    "packed": {"b": 1, "l": 70, "seqs": 5, "cu_seqlens": torch.tensor([0, 0, 1, 68, 68, 70]), "max_seqlen": 67},
    "packed-int32": {"b": 1, "seqs": 2, "cu_seqlens": torch.tensor([0, 4, 9], dtype=torch.int32), "max_seqlen": 5},
    "packed-none": {"b": 1, "l": 0, "seqs": 2, "cu_seqlens": torch.tensor([0, 0, 0]), "max_seqlen": 0},
}
ONE_WAY_ROWS = {
    "reverse": {"reverse": True},
    "reverse-time": {"reverse": True, "order": "time", "frames": 3},
    "reverse-chunks": {"reverse": True, "l": 66},
    "reverse-packed": {
        "b": 1, "l": 70, "seqs": 3, "cu_seqlens": torch.tensor([0, 2, 2, 70]), "max_seqlen": 68, "reverse": True,
    },
    "no-softplus": {"dt_softplus": False},
}  # fmt: skip
TWO_WAY_ROWS = {
    "scale": {"scale": 0.5},
    "no-D-b": {"absent": ("D_b",)},
    "no-dt-bias-b": {"absent": ("dt_bias_b",)},
    "no-initial-state-b": {"absent": ("initial_state_b",)},
}


# What the interpreter, at a second or so for nine tokens both forward and backward, does in every run.
INTERPRETED = (
    "base", "l0", "l1", "l3", "b0", "n1", "n3", "d5", "g2", "constant-BC", "bare", "time", "out-fp32", "mask",
    "packed-int32", "packed-none", "reverse", "reverse-time", "no-softplus", "scale",
)  # fmt: skip


def one_way(row: str, **more) -> dict:
    inputs = make(**((ROWS | ONE_WAY_ROWS)[row] | more))
    if not inputs.get("dt_softplus", True):
        inputs["dt"] = 0.05 * torch.nn.functional.softplus(inputs["dt"])
        inputs["dt_bias"] = torch.exp(inputs["dt_bias"])
    return inputs


def two_way(row: str, **more) -> dict:
    return make(directions=2, **((ROWS | TWO_WAY_ROWS)[row] | more))
