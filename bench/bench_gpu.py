"""The scans on one GPU beside mamba-ssm's: accuracy first, then time, kernels, bytes, host time, memory, whole models.

    python -m bench.bench_gpu [--mamba selective_scan_cuda.so] [--state-update selective_state_update.py]
                              [--only PATTERN] [--compile-first 8] [--graph]

Each case writes its rows to bench/results/h200_scan.json as it ends, so a run can be cut short and taken up by case.
mamba-ssm takes its own layout, (b, d, l), made before the clock starts; both ways it is two calls, three flips and an
add.  Median of interleaved rounds; before each call a 128 MiB buffer is written, so L2 holds nothing of its inputs, and
the GPU is kept busy until the host has launched everything.  --graph: calls captured in CUDA graphs instead.
--dry-run: tiny shapes on a CPU, to see that every case runs (with TRITON_INTERPRET=1 through the Triton kernels).
"""

import argparse
import fnmatch
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

import endomamba
from bench import cases as shapes
from bench.worker import cold_events
from endomamba.models import create_model
from endomamba.ops import bidirectional_scan, selective_scan
from endomamba.ops._triton import INTERPRET

HERE = Path(__file__).parent
RESULT = HERE / "results" / "h200_scan.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {"bf16": 5e-3, "fp16": 1e-3, "fp32": 2e-5}  # relative error of every output and gradient, in norm
SIDE = ("x", "dt", "A", "B", "C", "D", "dt_bias")
FLAGS = {
    "frames": 0, "max_seqlen": 0, "dt_softplus": True, "reverse": False, "return_final_state": False,
    "save_states": False, "out_fp32": False, "scale": 1.0, "plan": "auto",
}  # fmt: skip

# (b, l): bar of the forward, of the backward, as a ratio to mamba-ssm's time; None: not asked for
BOTH = dict(zip(shapes.BOTH_WAYS, ((11, 10), (5, 5), (4, 4), (2.5, 2.5), (4, None)), strict=True))
CAUSAL = dict(zip(shapes.CAUSAL, ((3.9, 4.5), (4.5, 4.5), (2, 3)), strict=True))
D, N = shapes.CHANNELS["small"], shapes.STATES


class Bench:
    """What every case needs: the device, how to time there, and the other library."""

    def __init__(self, args):
        self.dry, self.compiling = args.dry_run, args.compile_only
        self.device = "cpu" if self.dry else "cuda"
        self.backend = ("triton" if INTERPRET else "reference") if self.dry else "triton"
        self.rounds = 1 if self.dry else args.rounds
        self.graph = args.graph and not self.dry
        self.mamba = MambaSSM(args.mamba, self)
        self.state_update, self.no_state_update = load_state_update(args.state_update)
        if not self.dry and not self.compiling:
            self.flush = torch.empty(128 * 2**20, dtype=torch.uint8, device="cuda")
            self.copy_rate = self.measure_copy()

    def measure_copy(self) -> float:
        """Bytes a second that a device copy moves: what "percent" of a row refers to."""
        a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        b = torch.empty_like(a)
        took = self.time({"copy": lambda: b.copy_(a)})["copy"]["median_us"]
        return 2 * a.numel() / took * 1e6

    def shrink(self, b, l, d, n, dtype):
        """The same case, small enough for the reference or the interpreter."""
        if not self.dry:
            return b, l, d, n, dtype
        return min(b, 2), min(l, 9), min(d, 16), min(n, 4), "fp32"

    def time(self, variants: dict[str, Callable], repeat: int = 1, rounds: int = 0) -> dict[str, dict]:
        """name -> microseconds a call.  repeat: calls in one graph, back to back with a warm L2."""
        rounds = min(rounds or self.rounds, self.rounds)
        for call in variants.values():
            call()
        if self.compiling:
            return dict.fromkeys(variants, summary([1.0]))
        if self.dry:
            return {name: summary([host_us(call)]) for name, call in variants.items()}
        host = {name: host_us(call) for name, call in variants.items()}
        torch.cuda.synchronize()
        if self.graph or repeat > 1:
            variants = {name: captured(call, repeat) for name, call in variants.items()}
            host = dict.fromkeys(variants, 50)
        for call in variants.values():
            call()
        events = {name: [] for name in variants}
        for _ in range(rounds):
            for name, call in variants.items():
                cycles = int(3000 * host[name]) + 20_000  # at least 1.5 times what the host needs
                events[name].append(cold_events(call, self.flush if repeat == 1 else None, cycles))
            torch.cuda.synchronize()
        return {
            name: summary([1e3 * begin.elapsed_time(end) / repeat for begin, end in pairs])
            for name, pairs in events.items()
        }


def summary(times: list[float]) -> dict:
    return {"median_us": statistics.median(times), "min_us": min(times), "max_us": max(times), "rounds": len(times)}


def host_us(call: Callable, calls: int = 3) -> float:
    """Microseconds until the call has returned, the GPU idle at its start."""
    times = []
    for _ in range(calls):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return statistics.median(times)


def captured(call: Callable, repeat: int) -> Callable:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            call()
    return graph.replay


# ---- inputs and our calls ----------------------------------------------------------------------------------------


def make(bench: Bench, b, l, d, n, dtype, both: bool) -> dict:
    """Arguments of the private op by name.  Time steps of 0.002 to 0.13, so that a state outlives many tokens."""
    random = torch.Generator(bench.device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, device=bench.device)

    half = DTYPES[dtype]
    values = {"z": normal(b, l, d).to(half), "dy": normal(b, l, d).to(half)}
    for side in ("", "_b")[: 1 + both]:
        rates = torch.arange(1, n + 1, device=bench.device).float().log()
        values |= {
            "x" + side: normal(b, l, d).to(half),
            "dt" + side: (0.5 * normal(b, l, d)).to(half),
            "A" + side: -torch.exp(0.3 * normal(d, n) + rates),
            "B" + side: normal(b, l, 1, n).to(half),
            "C" + side: normal(b, l, 1, n).to(half),
            "D" + side: normal(d),
            "dt_bias" + side: 4 * torch.rand(d, generator=random, device=bench.device) - 6,
        }
    return values


def op(name: str, values: dict, **flags) -> tuple:
    """A private op, its arguments found by name; an absent tensor is None."""
    function = getattr(torch.ops.endomamba, name).default
    values = FLAGS | values | flags
    return function(*(values.get(argument.name) for argument in function._schema.arguments))


def scan_name(values: dict) -> str:
    return "bidirectional_scan" if "x_b" in values else "selective_scan"


def prepared(values: dict, **flags) -> tuple[Callable, Callable, Callable]:
    """The forward of inference, that of training, and the backward after it."""
    name = scan_name(values)
    saved = op(name, values, save_states=True, **flags)
    states = dict(zip(("chunk_states", "chunk_states_b"), saved[-2:] if "x_b" in values else saved[-1:]))
    return (
        lambda: op(name, values, **flags),
        lambda: op(name, values, save_states=True, **flags),
        lambda: op(name + "_backward", values | states, **flags),
    )


def gradients(values: dict) -> list[str]:
    """The names of what the backward op returns, in its order."""
    schema = getattr(torch.ops.endomamba, scan_name(values) + "_backward").default._schema
    names = [argument.name for argument in schema.arguments]
    start = names.index("x")
    return [name for name in names[start : names.index("cu_seqlens")]]


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


def truth_of(values: dict) -> dict[str, torch.Tensor]:
    """The fp64 reference: y and every gradient."""
    wide = {k: v.double() for k, v in values.items()}
    forward, _, backward = prepared(wide, backend="reference")
    return {"y": forward()[0]} | dict(zip(gradients(values), backward()))


def errors_of(bench: Bench, values: dict, dtype: str) -> dict:
    """Relative errors of the first rows of the batch; no time is given for a wrong result."""
    few = {k: v[:2] if v.ndim > 2 else v for k, v in values.items()}
    truth = truth_of(few) if not bench.compiling else {}
    found = {}
    for plan in ("auto", "invariant"):
        forward, _, backward = prepared(few, backend=bench.backend, plan=plan)
        got = {"y": forward()[0]} | dict(zip(gradients(few), backward()))
        if bench.compiling:
            continue
        errors = {name: relative(got[name], truth[name]) for name in got if name in few or name == "y"}
        wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtype]}
        if wrong:
            raise AssertionError(f"plan {plan}: relative error {wrong}, no time is given for a wrong result")
        found[plan] = max(errors.values())
    theirs = bench.mamba.errors(few, truth) if bench.mamba.why(dtype) is None else None
    if bench.compiling:
        return {}
    # The whole batch runs another plan than two rows of it: its first and last row too.
    whole = op(scan_name(values), values, backend=bench.backend)[0]
    ends = {k: v[[0, -1]] if v.ndim > 2 else v for k, v in values.items()}
    y = op(scan_name(values), {k: v.double() for k, v in ends.items()}, backend="reference")[0]
    found["whole batch"] = relative(whole[[0, -1]], y)
    if not found["whole batch"] <= TOLERANCE[dtype]:
        raise AssertionError(f"whole batch: relative error {found}, no time is given for a wrong result")
    return {"endomamba": found, "mamba_ssm": theirs}


def operand_bytes(values: dict, outputs) -> int:
    """Every input read once, every output written once."""
    tensors = [v for v in values.values() if isinstance(v, torch.Tensor)] + [v for v in outputs if v is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def kernels_of(bench: Bench, call: Callable) -> dict | None:
    """How many kernels a call launches, by name."""
    if bench.dry or bench.compiling:
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    counts = {}
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name[:80]] = counts.get(event.name[:80], 0) + 1
    return {"count": sum(counts.values()), "names": counts}


# ---- mamba-ssm ---------------------------------------------------------------------------------------------------


class MambaSSM:
    """Its compiled selective_scan_cuda, from a file or as installed; `why` says what speaks against a dtype."""

    def __init__(self, path: str | None, bench: Bench):
        self.bench, self.module, self.absent, self.known = bench, None, "not asked for on a CPU", {}
        if bench.dry or bench.compiling:
            return
        try:
            if path:
                name = Path(path).name.split(".")[0]  # the name of its init function
                spec = importlib.util.spec_from_file_location(name, path)
                self.module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(self.module)
            else:
                import selective_scan_cuda

                self.module = selective_scan_cuda
        except Exception as error:
            self.absent = f"{type(error).__name__}: {error}"

    def why(self, dtype: str) -> str | None:
        """None: it runs.  Tried on a small case, since a build for one dtype takes the others' bits for its own."""
        if self.module is None:
            return self.absent
        if dtype not in self.known:
            values = make(self.bench, 2, 64, 64, 16, dtype, both=False)
            try:
                error = max(self.errors(values, truth_of(values)).values())
                self.known[dtype] = None if error < 0.1 else f"not compiled for {dtype}"
            except RuntimeError as error:
                self.known[dtype] = str(error).splitlines()[0]
        return self.known[dtype]

    def inputs(self, values: dict, side: str = "") -> tuple:
        def swapped(t):
            return t.transpose(1, 2).contiguous()

        B, C = (values[k + side].permute(0, 2, 3, 1).contiguous() for k in ("B", "C"))
        x, dt, z = (swapped(values[k]) for k in ("x" + side, "dt" + side, "z"))
        return x, dt, values["A" + side], B, C, values["D" + side], z, values["dt_bias" + side]

    def calls(self, values: dict) -> tuple[Callable, Callable]:
        """Forward and backward."""
        sides = [self.inputs(values, side) for side in (("", "_b") if "x_b" in values else ("",))]
        dy = values["dy"].transpose(1, 2).contiguous()
        fwd, bwd = self.module.fwd, self.module.bwd

        def one_back(args, saved, dy):
            return bwd(*args, dy, saved[1], saved[0], torch.empty_like(args[6]), True, False)

        if len(sides) == 1:
            saved = fwd(*sides[0], True)
            return lambda: fwd(*sides[0], True), lambda: one_back(sides[0], saved, dy)
        first, second = sides

        def flipped():
            return (second[0].flip(-1), *second[1:6], second[6].flip(-1), second[7])

        def forward():
            return fwd(*first, True)[2] + fwd(*flipped(), True)[2].flip(-1)

        # What a caller keeps from its forward: the flipped operands (here of x and z; dt, B and C come flipped).
        second_args = flipped()
        saved, saved_b = fwd(*first, True), fwd(*second_args, True)

        def backward():
            grads, grads_b = one_back(first, saved, dy), one_back(second_args, saved_b, dy.flip(-1))
            return grads[-1] + grads_b[-1].flip(-1), grads, grads_b[0].flip(-1), grads_b

        return forward, backward

    def errors(self, values: dict, truth: dict) -> dict[str, float]:
        """Of y and dx, one way; both ways only of what a flip does not move."""
        if "x_b" in values:
            values = {k: v for k, v in values.items() if not k.endswith("_b")}
            truth = truth_of(values)
        forward, backward = self.calls(values)
        found = {"y": forward()[2], "x": backward()[0]}
        return {name: relative(t.transpose(1, 2), truth[name]) for name, t in found.items()}


class MambaScan(torch.autograd.Function):
    """What mamba-ssm's own autograd function keeps and computes, for its memory."""

    @staticmethod
    def forward(ctx, module, x, dt, A, B, C, D, z, dt_bias):
        out, states, gated = module.fwd(x, dt, A, B, C, D, z, dt_bias, True)
        ctx.module = module
        ctx.save_for_backward(x, dt, A, B, C, D, z, dt_bias, states, out)
        return gated

    @staticmethod
    def backward(ctx, dy):
        *args, states, out = ctx.saved_tensors
        dx, ddt, dA, dB, dC, dD, dbias, dz = ctx.module.bwd(
            *args, dy.contiguous(), states, out, torch.empty_like(args[6]), True, False
        )
        return None, dx, ddt, dA, dB.to(args[3].dtype), dC.to(args[4].dtype), dD, dz, dbias


def load_state_update(path: str | None):
    """selective_state_update of mamba-ssm, from a file beside which its softplus.py lies, or as installed."""
    try:
        if path is None:
            from mamba_ssm.ops.triton.selective_state_update import selective_state_update

            return selective_state_update, None
        if importlib.util.find_spec("einops") is None:  # its reference alone needs it
            stub = sys.modules.setdefault("einops", types.ModuleType("einops"))
            stub.rearrange = stub.repeat = None
        names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.softplus")
        for name in names[:3]:
            sys.modules.setdefault(name, types.ModuleType(name)).__path__ = []
        sys.modules[names[3]] = from_file(names[3], Path(path).with_name("softplus.py"))
        return from_file("selective_state_update", Path(path)).selective_state_update, None
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def from_file(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- cases -------------------------------------------------------------------------------------------------------


def row(part: str, ours: dict, theirs: dict | str | None, bar=None, **more) -> dict:
    """ratio: their time by ours, so a bar says "at least"; a bar that says "at most" compares ours by theirs."""
    ratio = theirs["median_us"] / ours["median_us"] if isinstance(theirs, dict) else None
    return {"part": part, "ours": ours, "theirs": theirs, "ratio": ratio, "at_least": bar} | more


def at_most(part: str, ours: float, theirs: float | str | None, bar: float | None, unit: str, **more) -> dict:
    """ratio: ours by theirs; without another side the bar is ours itself."""
    compared = isinstance(theirs, (int, float)) and theirs > 0
    ratio = ours / theirs if compared else None
    return {"part": part, "value": ours, "unit": unit, "theirs": theirs, "ratio": ratio, "at_most": bar} | more


def timed(bench: Bench, b, l, d, n, dtype, both, bars=(None, None), two_calls=False) -> list[dict]:
    """Forward and backward beside mamba-ssm, with the cost of the invariant plan and of saving states."""
    b, l, d, n, dtype = bench.shrink(b, l, d, n, dtype)
    values = make(bench, b, l, d, n, dtype, both)
    errors = errors_of(bench, values, dtype)
    forward, training, backward = prepared(values, backend=bench.backend)
    variants = {"forward": {"ours": forward, "saving states": training}, "backward": {"ours": backward}}
    plan = {"backend": bench.backend, "plan": "invariant"}
    variants["forward"]["invariant"], _, variants["backward"]["invariant"] = prepared(values, **plan)
    no_mamba = bench.mamba.why(dtype)
    if no_mamba is None:
        variants["forward"]["mamba"], variants["backward"]["mamba"] = bench.mamba.calls(values)
    if two_calls:
        two, two_bytes = our_two_calls(bench, values)
        for part in variants:
            variants[part]["two calls"] = two[part]
    rows = []
    for (part, calls), bar in zip(variants.items(), bars):
        if part == "backward" and bars != (None, None) and bar is None:
            continue
        times = bench.time(calls)
        given = {k: v for k, v in values.items() if part == "backward" or k != "dy"}
        moved = operand_bytes(given, calls["ours"]())
        rate = None if bench.dry or bench.compiling else moved / times["ours"]["median_us"] * 1e6 / bench.copy_rate
        more = {"bytes": moved, "of_copy_rate": rate, "errors": errors, "shape": [b, l, d, n], "dtype": dtype}
        rows.append(row(part, times["ours"], times.get("mamba", no_mamba), bar, **more))
        ours = times["ours"]["median_us"]
        cost = times["invariant"]["median_us"]
        rows.append(at_most(f"{part}, plan invariant by auto", cost, ours, None, "us"))
        if part == "forward":
            rows.append(at_most("forward saving states by not", times["saving states"]["median_us"], ours, None, "us"))
        if two_calls:
            cost = times["two calls"]["median_us"]
            counts = {name: kernels_of(bench, calls[name]) for name in ("ours", "two calls")}
            extra = {"kernels": counts, "bytes": {"ours": moved, "two calls": two_bytes[part]}}
            rows.append(at_most(f"{part}, fused by two calls and an add", ours, cost, 1.0, "us", **extra))
    return rows


def one_side(values: dict, side: str) -> dict:
    return {k: values[k + side] for k in SIDE} | {k: values[k] for k in ("z", "dy") if k in values}


def our_two_calls(bench: Bench, values: dict) -> tuple[dict[str, Callable], dict[str, int]]:
    """Both ways by our own one-way op: two calls and an add (of y; in the backward of dz); and the bytes they move."""
    sides = one_side(values, ""), one_side(values, "_b")
    first, _, first_back = prepared(sides[0], backend=bench.backend)
    second, _, second_back = prepared(sides[1], backend=bench.backend, reverse=True)
    dz = gradients(sides[0]).index("z")

    def forward():
        return first()[0] + second()[0]

    def backward():
        found, other = first_back(), second_back()
        return found[dz] + other[dz]

    added = 3 * values["z"].numel() * values["z"].element_size()
    inputs = [{k: v for k, v in side.items() if k != "dy"} for side in sides]
    moved = {
        "forward": added + operand_bytes(inputs[0], first()) + operand_bytes(inputs[1], second()),
        "backward": added + operand_bytes(sides[0], first_back()) + operand_bytes(sides[1], second_back()),
    }
    return {"forward": forward, "backward": backward}, moved


def one_token(bench: Bench, b: int) -> list[dict]:
    """One step of a stream, its state handed over, 20 calls in a graph (warm: so are a stream's weights)."""
    b, _, d, n, dtype = bench.shrink(b, 1, D, N, "bf16")
    values = make(bench, b, 1, d, n, dtype, both=False)
    state = torch.randn(b, d, n, device=bench.device)
    args = {k: v.squeeze(2) if k in "BC" else v for k, v in values.items() if k != "dy"}
    given = {"initial_state": state, "return_final_state": True, "backend": bench.backend}

    def ours():
        return selective_scan(**args, **given)

    wide = {k: v.double() for k, v in args.items()} | {"initial_state": state.double()}
    y, final = selective_scan(**wide, return_final_state=True, backend="reference")
    errors = {"y": relative(ours()[0], y), "state": relative(ours()[1], final)}
    assert max(errors.values()) <= TOLERANCE[dtype], f"relative error {errors}"
    variants = {"ours": ours}
    if bench.state_update is not None and not bench.dry:
        x, dt, B, C, z = (args[k].squeeze(1) for k in ("x", "dt", "B", "C", "z"))

        def theirs():
            return bench.state_update(
                kept, x, dt, args["A"], B, C, args["D"], z=z, dt_bias=args["dt_bias"], dt_softplus=True
            )

        kept = state.clone()
        assert relative(theirs(), y.squeeze(1)) <= TOLERANCE[dtype]
        variants["theirs"] = theirs
    times = bench.time(variants, repeat=20)
    why = bench.no_state_update or "not asked for on a CPU"
    theirs = times["theirs"]["median_us"] if "theirs" in times else why
    return [at_most("one token", times["ours"]["median_us"], theirs, 1.03, "us", errors=errors, shape=[b, 1, d, n])]


def public(values: dict, backend: str) -> tuple[Callable, dict, list]:
    """The public op on leaves, the leaves, and its call without gradients."""
    call = bidirectional_scan if "x_b" in values else selective_scan
    inputs = {k: v for k, v in values.items() if k != "dy"}
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}

    def train():
        return torch.autograd.grad(call(**leaves, backend=backend)[0], list(leaves.values()), values["dy"])

    def infer():
        with torch.inference_mode():
            return call(**inputs, backend=backend)

    return train, leaves, infer


def host_time(bench: Bench) -> list[dict]:
    """What the host does in one eager call, on one frame: 100 calls that the GPU finishes sooner than the host."""
    rows, calls = [], 2 if bench.dry else 100
    for both in (False, True):
        b, l, d, n, dtype = bench.shrink(1, 49, D, N, "bf16")
        values = make(bench, b, l, d, n, dtype, both)
        train, _, infer = public(values, bench.backend)
        name = scan_name(values)
        variants = {f"{name} inference": infer, f"{name} forward+backward": train}
        if not both and bench.mamba.why(dtype) is None:
            variants["mamba-ssm's extension, forward alone"] = bench.mamba.calls(values)[0]
        for part, call in variants.items():
            for _ in range(3):
                call()
            if not bench.dry:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            took = 1e6 * (time.perf_counter() - start) / calls
            rows.append(at_most(part, took, None, None, "us of the host", shape=[b, l, d, n]))
    return rows


def peak_bytes(bench: Bench, call: Callable) -> int:
    """Memory on top of what is held before the call."""
    if bench.dry:
        call()
        return 0
    call()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def memory(bench: Bench) -> list[dict]:
    """Peak bytes per token of forward+backward, the inputs not counted."""
    rows = []
    for both, (b, l) in ((True, (128, 197)), (False, (48, 784))):
        b, l, d, n, dtype = bench.shrink(b, l, D, N, "bf16")
        values = make(bench, b, l, d, n, dtype, both)
        train, _, _ = public(values, bench.backend)
        ours = peak_bytes(bench, train) / (b * l)
        theirs = bench.mamba.why(dtype)
        if theirs is None:
            sides = [bench.mamba.inputs(values, side) for side in ("", "_b")[: 1 + both]]
            sides = [list(side[:6]) + [sides[0][6], side[7]] for side in sides]  # one z
            sides = [[t.requires_grad_() for t in side] for side in sides]
            dy = values["dy"].transpose(1, 2).contiguous()

            def train_theirs(sides=sides, dy=dy):
                y = MambaScan.apply(bench.mamba.module, *sides[0])
                if len(sides) == 2:
                    x, *rest, z, bias = sides[1]
                    y = y + MambaScan.apply(bench.mamba.module, x.flip(-1), *rest, z.flip(-1), bias).flip(-1)
                return torch.autograd.grad(y, list({id(t): t for side in sides for t in side}.values()), dy)

            theirs = peak_bytes(bench, train_theirs) / (b * l)
        rows.append(at_most(f"{scan_name(values)} {b}x{l}", ours, theirs, 1.0, "bytes a token", shape=[b, l, d, n]))
    return rows


def model_rows(bench: Bench, part: str) -> list[dict]:
    """EndoMamba-small on 32 clips of 16 frames, bf16 autocast: milliseconds and GiB in all."""
    name, clips, frames, size = "endomamba_small", 32, 16, 224
    options = {"backend": bench.backend}
    if bench.dry:
        name, clips, frames, size = "endomamba_tiny", 1, 2, 32
        options |= {"depth": 2, "embed_dim": 16, "d_state": 4}
    bars = {"training": (150, 16), "training with checkpoints": (None, None), "inference": (45, None)}[part]
    torch.manual_seed(0)
    options |= {"num_classes": 7, "img_size": size, "use_checkpoint": part == "training with checkpoints"}
    model = create_model(name, **options).to(bench.device).train(part != "inference")
    video = torch.randn(clips, 3, frames, size, size, device=bench.device)
    labels = torch.randint(7, (clips * frames,), device=bench.device)

    def autocast():
        return torch.autocast(bench.device, torch.bfloat16, enabled=not (bench.dry and INTERPRET))

    def train():
        model.zero_grad(set_to_none=True)
        with autocast():
            logits = model(video)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels)
        loss.backward()
        return loss

    def infer():
        with torch.inference_mode(), autocast():
            return model(video)

    call = infer if part == "inference" else train
    assert call().isfinite().all()
    times = bench.time({"ours": call}, rounds=5)["ours"]
    if not bench.dry:
        torch.cuda.reset_peak_memory_stats()
    call()
    peak = 0 if bench.dry else torch.cuda.max_memory_allocated() / 2**30
    return [
        at_most("time", times["median_us"] / 1e3, None, bars[0], "ms", spread=times),
        at_most("peak memory", peak, None, bars[1], "GiB"),
    ]


def cases() -> dict[str, Callable[[Bench], list[dict]]]:
    found: dict[str, Callable] = {}
    for (b, l), bars in BOTH.items():
        found[f"both-{b}x{l}"] = lambda bench, b=b, l=l, bars=bars: timed(
            bench, b, l, D, N, "bf16", True, bars, two_calls=True
        )
    for (b, l), bars in CAUSAL.items():
        found[f"causal-{b}x{l}"] = lambda bench, b=b, l=l, bars=bars: timed(bench, b, l, D, N, "bf16", False, bars)
    for d, n, dtype in shapes.OTHER:
        for both, b, l in ((True, 128, 197), (False, 48, 784)):
            name = f"{'both' if both else 'causal'}-{b}x{l}-d{d}-n{n}-{dtype}"
            found[name] = lambda bench, b=b, l=l, d=d, n=n, dtype=dtype, both=both: timed(
                bench, b, l, d, n, dtype, both, bars=(1.0, 1.0)
            )
    for b in (1, 16, 256):
        found[f"one-token-b{b}"] = lambda bench, b=b: one_token(bench, b)
    found |= {"host-time": host_time, "memory": memory}
    for part in ("training", "training with checkpoints", "inference"):
        found[f"model-{part.replace(' ', '-')}"] = lambda bench, part=part: model_rows(bench, part)
    return found


# ---- the run -----------------------------------------------------------------------------------------------------


def about(args) -> dict:
    def said(*command):
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=HERE).stdout.strip()
        except OSError:
            return ""

    triton = importlib.util.find_spec("triton") and __import__("triton").__version__
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    flags = [f"--rounds {args.rounds}", "--graph" if args.graph else "", "--mamba" if args.mamba else ""]
    return {
        "command": " ".join(["python -m bench.bench_gpu", *filter(None, flags)]),
        "commit": args.commit or said("git", "rev-parse", "HEAD"), "date": time.strftime("%Y-%m-%d"), "gpu": gpu,
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "endomamba": endomamba.__version__, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton,
        "timing": "CUDA graphs" if args.graph else "events", "rounds": args.rounds,
    }  # fmt: skip


def save(path: Path, meta: dict, name: str, rows: list[dict]) -> None:
    data = json.loads(path.read_text()) if path.exists() else {"rows": []}
    kept = [r for r in data["rows"] if r["case"] != name]
    stamp = {"case": name, "commit": meta["commit"]}
    order = list(cases())
    kept = sorted(kept + [stamp | r for r in rows], key=lambda r: order.index(r["case"]))
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "rows": kept}, indent=1) + "\n")


def line(r: dict) -> str:
    name = f"{r['case']:34} "
    if "error" in r:
        return f"{name}{r['error']}"
    if "ours" in r:
        theirs = f"{r['theirs']['median_us']:10.1f}" if isinstance(r["theirs"], dict) else f"{'-':>10}"
        text = f"{r['part']:44} {r['ours']['median_us']:10.1f} {theirs} us "
        met = r["ratio"] is not None and r["at_least"] is not None and r["ratio"] >= r["at_least"]
        bar = "" if r["at_least"] is None else f">= {r['at_least']}x"
    else:
        theirs = f"{r['theirs']:10.1f}" if isinstance(r["theirs"], (int, float)) else f"{'-':>10}"
        text = f"{r['part']:44} {r['value']:10.1f} {theirs} {r['unit']} "
        judged = r["ratio"] if r["ratio"] is not None else r["value"]
        met = r["at_most"] is not None and judged <= r["at_most"] and not isinstance(r["theirs"], str)
        bar = "" if r["at_most"] is None else f"<= {r['at_most']}"
    ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}x"
    absent = f"({r['theirs']})" if isinstance(r["theirs"], str) else ""
    verdict = "" if not bar or absent else "met" if met else "MISSED"
    return f"{name}{text} {ratio:>8} {bar:>8} {verdict} {absent[:60]}"


def compile_first(chosen: list[str], args) -> None:
    """Fills Triton's cache from several processes: each kernel takes the compiler seconds, on one core."""
    start, jobs = time.perf_counter(), []
    for i in range(args.compile_first):
        command = [sys.executable, "-m", "bench.bench_gpu", "--compile-only"]
        command += [f"--state-update={args.state_update}"] if args.state_update else []
        jobs.append(subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
        jobs[-1].stdin.write(" ".join(chosen[i :: args.compile_first]))
        jobs[-1].stdin.close()
    for job in jobs:
        job.wait()
    print(f"compiled by {len(jobs)} processes in {time.perf_counter() - start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mamba", metavar="SO", help="mamba-ssm's compiled selective_scan_cuda; else as installed")
    parser.add_argument("--state-update", metavar="PY", help="mamba-ssm's selective_state_update.py; else as installed")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="cases whose name has it, * and ? allowed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--graph", action="store_true", help="time calls captured in CUDA graphs")
    parser.add_argument("--compile-first", type=int, default=0, metavar="JOBS", help="so many processes compile first")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--commit", default="", help="of the tree that runs; else what git says")
    parser.add_argument("--list", action="store_true", help="the names of the cases")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, nothing written but to --out")
    parser.add_argument("--after", default="", help=argparse.SUPPRESS)  # a run taken up by itself
    args = parser.parse_args()
    chosen = [name for name in cases() if fnmatch.fnmatch(name, f"*{args.only}*")]
    if args.list:
        print(*chosen, sep="\n")
        return
    if args.after:
        chosen = chosen[chosen.index(args.after) + 1 :]
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("bench_gpu: there is no GPU here; --dry-run shows that the cases run")
    if args.compile_first and not args.after:
        compile_first(chosen, args)
    bench, meta = Bench(args), about(args)
    if args.compile_only:
        for name in sys.stdin.read().split():
            try:
                cases()[name](bench)
            except Exception as error:  # it is reported where it counts, in the measured run
                print(f"{name}: {type(error).__name__}", file=sys.stderr)
        return
    print(f"{'case':34} {'part':44} {'ours':>10} {'theirs':>10} {'ratio':>11} {'bar':>8}", flush=True)
    for name in chosen:
        start = time.perf_counter()
        try:
            rows = cases()[name](bench)
            if not bench.dry:
                torch.cuda.synchronize()
        except Exception as error:
            rows = [{"part": "all", "error": f"{type(error).__name__}: {str(error)[:500]}"}]
        rows[0]["seconds"] = round(time.perf_counter() - start, 1)
        if not bench.dry or args.out != RESULT:
            save(args.out, meta, name, rows)
        for r in rows:
            print(line({"case": name} | r), flush=True)
        if not bench.dry and "error" in rows[0]:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # the context is lost: another process goes on after this case
                sys.stdout.flush()
                again = [word for word in sys.argv[1:] if not word.startswith("--after=")]
                os.execv(sys.executable, [sys.executable, "-m", "bench.bench_gpu", *again, f"--after={name}"])
    if not bench.dry or args.out != RESULT:
        print(f"written to {args.out}")


if __name__ == "__main__":
    main()
