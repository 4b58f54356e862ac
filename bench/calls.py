"""One call of an op by the names of the op and of the shape: its operands, on a GPU or without memory, and its work."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from bench import cases
from bench.chip import SLOTS, Work

OPS = ("selective_scan", "bidirectional_scan", "causal_conv1d", "add_rms_norm")
NAMES = tuple(op + suffix for op in OPS for suffix in ("", "_backward"))
DTYPES = ("bf16", "fp16", "fp32")
FLAGS = {
    "frames": 0, "max_seqlen": 0, "dt_softplus": True, "reverse": False, "return_final_state": False,
    "save_states": False, "out_fp32": False, "scale": 1.0, "plan": "auto", "backend": "triton", "silu": True,
    "eps": 1e-5, "layer_norm": False, "has_residual": True,
}  # fmt: skip


class Unknown(Exception):
    """What was expected, what came, in one sentence."""


@dataclass(frozen=True)
class Shape:
    sequences: int
    tokens: int
    channels: int  # of the scan: twice the model's width
    states: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.sequences}x{self.tokens}x{self.channels}x{self.states} {self.dtype}"


def parse_op(name: str) -> str:
    if name not in NAMES:
        raise Unknown(f"profile: OP must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def parse_shape(text: str, dtype: str = "bf16") -> Shape:
    """ "768x49", "768x49x1152", "768x49x768x8", a shape of the gate ("small-l197-bf16") or a name of ON_A_CPU."""
    numbers = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?(?:x(\d+))?", text)
    gate = re.fullmatch(rf"({'|'.join(cases.CHANNELS)})-l(\d+)-({'|'.join(DTYPES)})", text)
    if numbers:
        b, l, d, n = (int(part) if part else 0 for part in numbers.groups())
        shape = Shape(b, l, d or cases.CHANNELS["small"], n or cases.STATES, dtype)
    elif gate:
        shape = Shape(1, int(gate[2]), cases.CHANNELS[gate[1]], cases.STATES, gate[3])
    elif text in cases.ON_A_CPU:
        shape = Shape(*cases.ON_A_CPU[text], dtype)
    else:
        known = ", ".join(map(repr, cases.ON_A_CPU))
        raise Unknown(
            "profile: SHAPE must be SEQUENCESxTOKENS[xCHANNELS[xSTATES]] (768x49), MODEL-lTOKENS-DTYPE "
            f"(small-l197-bf16) or one of {known}, got {text!r}"
        )
    if min(shape.sequences, shape.tokens, shape.channels, shape.states) < 1 or shape.channels % 2:
        raise Unknown(f"profile: SHAPE needs numbers of at least 1 and an even number of channels, got {text!r}")
    return shape


def operands(op: str, shape: Shape, device: str) -> dict:
    """The op's tensors by argument name.  Time steps of 0.002 to 0.13, so that a state outlives many tokens."""
    import torch

    torch.manual_seed(0)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[shape.dtype]
    b, l, d, n = shape.sequences, shape.tokens, shape.channels, shape.states

    def normal(*size, dtype=torch.float32):
        return torch.randn(*size, device=device, dtype=dtype)

    if op == "causal_conv1d":
        return {"x": normal(b, l, d, dtype=half), "weight": normal(d, 4), "bias": normal(d)}
    if op == "add_rms_norm":
        return {"x": normal(b, l, d // 2, dtype=half), "weight": normal(d // 2), "residual": normal(b, l, d // 2)}
    values = {"z": normal(b, l, d, dtype=half)}
    for side in ("", "_b")[: 1 + (op == "bidirectional_scan")]:
        one = {
            "x": normal(b, l, d, dtype=half), "dt": 0.5 * normal(b, l, d, dtype=half),
            "A": -torch.arange(1, n + 1, device=device).float() * (0.5 + torch.rand(d, n, device=device)),
            "B": normal(b, l, 1, n, dtype=half), "C": normal(b, l, 1, n, dtype=half), "D": normal(d),
            "dt_bias": 4 * torch.rand(d, device=device) - 6,
        }  # fmt: skip
        values |= {key + side: value for key, value in one.items()}
    return values


def arguments(name: str, values: dict) -> list:
    """The private op's arguments in their order; what is not given is absent."""
    import torch

    import endomamba.ops  # noqa: F401  registers it

    schema = getattr(torch.ops.endomamba, name).default._schema
    values = FLAGS | values
    return [values.get(argument.name) for argument in schema.arguments]


def call_of(name: str, shape: Shape, device: str) -> tuple[list, Callable, Work]:
    """-> arguments of the private op, the call, what it must do.  device "meta": no memory, the call gives shapes."""
    import torch

    import endomamba.ops  # noqa: F401  registers it

    op, backward = name.removesuffix("_backward"), name.endswith("_backward")
    values = operands(op, shape, device)
    if backward:
        saved = getattr(torch.ops.endomamba, op).default(*arguments(op, values | {"save_states": True}))
        values |= given_to_backward(op, values, saved)
    function, args = getattr(torch.ops.endomamba, name).default, arguments(name, values)
    results = function(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    moved = sum(t.numel() * t.element_size() for t in (*args, *results) if isinstance(t, torch.Tensor))
    return args, lambda: function(*args), Work(moved, exponentials(name, shape), slots(name, shape))


def given_to_backward(op: str, values: dict, saved: tuple) -> dict:
    """What backward takes on top: the gradient that comes in and what forward kept."""
    import torch

    if op == "add_rms_norm":
        grad = torch.ones_like(values["x"])
        return {
            "x": None, "residual": None, "dnormed": grad, "dnew_residual": torch.ones_like(saved[1]),
            "new_residual": saved[1], "stats": saved[2], "dtype": values["x"].dtype,
        }  # fmt: skip
    given = {"dy": torch.ones_like(values["x"])}
    if op == "selective_scan":
        given["chunk_states"] = saved[-1]
    elif op == "bidirectional_scan":
        given |= {"chunk_states": saved[-2], "chunk_states_b": saved[-1]}
    return given


def directions(name: str) -> int:
    return {"selective_scan": 1, "bidirectional_scan": 2}.get(name.removesuffix("_backward"), 0)


def exponentials(name: str, shape: Shape) -> int:
    """MUFU operations of ex2 and lg2 that the arithmetic needs.

    Scan: a decay for each token, channel, state and direction (backward: once to walk forwards again, once to walk
    back), 2 a token, channel and direction for softplus, 1 a token and channel for the gate.  Conv: 1 an element, silu.
    """
    elements = shape.sequences * shape.tokens * shape.channels
    if not directions(name):
        return elements if name.startswith("causal_conv1d") else 0
    walks = 2 if name.endswith("_backward") else 1
    return elements * (directions(name) * (walks * shape.states + 2) + 1)


def slots(name: str, shape: Shape) -> float:
    """Warp instructions of a scan, by chip.SLOTS."""
    elements = shape.sequences * shape.tokens * shape.channels * shape.states * directions(name)
    return elements / 32 * SLOTS["backward" if name.endswith("_backward") else "forward"]
