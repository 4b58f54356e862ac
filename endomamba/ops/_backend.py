"""One dispatch point for every op: a back end says in words why it cannot run, and nothing falls back in silence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger("endomamba")

NAMES = ("triton", "cuda", "cpu", "reference")
# What "auto" may take, best first.  The reference runs on a GPU only by name: it would be silently 100x slower.
AUTO = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda")}

TABLES: dict[str, dict[str, Backend]] = {}
_warned: set[str] = set()


@dataclass(frozen=True)
class Backend:
    """fwd and bwd take the op's arguments; `unsupported(*tensors)` returns every reason why they cannot run.

    `faster(phase, *tensors)`: it can run them and was measured faster there than those before it in `AUTO`.
    """

    fwd: Callable
    bwd: Callable | None
    unsupported: Callable[..., list[str]]
    faster: Callable[..., bool] | None = None


def register(op: str, table: dict[str, Backend]) -> dict[str, Backend]:
    TABLES[op] = table
    return table


def reasons(op: str, name: str, *tensors: Tensor | None) -> list[str]:
    """Why back end `name` cannot run `op` on these tensors; an empty list means that it can."""
    table = TABLES[op]
    if name not in table:
        return [f"this version has no {name} kernel for {op}"]
    return table[name].unsupported(*tensors)


def choose(op: str, backend: str, *tensors: Tensor | None, phase: str = "") -> Backend:
    """The back end that runs this call.  "auto" walks `AUTO`; a named one runs or raises with its reasons.

    phase: "forward", "saving" (a forward with a backward to come) or "backward", for back ends that were measured
    faster in some; empty where the choice may not look at the shape.
    An op's row "auto", where it has one, is Triton's with the back end of each of its parts chosen by itself.
    """
    table = TABLES[op]
    if backend != "auto":
        check_backend(op, backend)
        why = reasons(op, backend, *tensors)
        if why:
            raise NotImplementedError(f"{op}: backend {backend!r} cannot run this call: " + "; ".join(why))
        return table[backend]
    order = AUTO.get(tensors[0].device.type, ())
    for name in order:
        row = table.get(name)
        if phase and row and row.faster and row.faster(phase, *tensors):
            return row
    seen: dict[str, list[str]] = {}
    for name in order:
        seen[name] = reasons(op, name, *tensors)
        if not seen[name]:
            if name == "reference":
                _warn_once(op, seen)
            return table.get("auto", table[name]) if name == "triton" else table[name]
    if not order:
        seen = {name: reasons(op, name, *tensors) for name in NAMES if name != "reference"}
    seen["reference"] = ["runs here by name only: backend='reference'"]
    lines = "".join(f"\n  {name}: {'; '.join(why)}" for name, why in seen.items())
    raise NotImplementedError(f"{op}: no backend can run this call on {tensors[0].device}{lines}")


def measured_phase(phase: str, frames: int, plan: str) -> str:
    """`choose`'s phase for a scan: a table of shapes may decide, but no walk other than the measured one was measured,
    and plan="invariant" forbids to look at the number of sequences."""
    return "" if frames or plan == "invariant" else phase


def named_or_auto(op: str, backend: str) -> str:
    """What a model made for `backend` asks of `op`: "auto" where it has no such row, as the norm has none in CUDA."""
    return backend if backend in TABLES[op] else "auto"


def check_backend(op: str, backend: str) -> None:
    if backend != "auto" and backend not in NAMES:
        raise ValueError(f"{op}: backend must be 'auto' or one of {', '.join(NAMES)}, got {backend!r}")


def _warn_once(op: str, seen: dict[str, list[str]]) -> None:
    if seen.get("cpu") == [FP64]:
        return  # fp64 is the reference's own purpose, nothing was lost
    if op not in _warned:
        _warned.add(op)
        why = "; ".join(f"{name}: {', '.join(r)}" for name, r in seen.items() if r)
        log.warning("%s runs on the slow PyTorch reference (%s)", op, why)


_DIRECT = all(
    hasattr(owner, name)
    for owner, name in (
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_len_torch_function_stack"),
        (torch.autograd, "_profiler_enabled"),
    )
)


def direct(op: Callable) -> Callable:
    """The custom op, or in eager inference, while nothing looks at the dispatcher, the plain function under it.

    A small op on a CPU is not much longer than its way through the dispatcher.  A profile, a FLOP counter,
    torch.compile, torch.export and fake tensors see the op as before.  A torch without these private names: the op.
    """
    return getattr(op, "_init_fn", op) if undisturbed() else op


def undisturbed() -> bool:
    """Eager inference while nothing looks at the dispatcher; see `direct`."""
    if torch.compiler.is_compiling() or not _DIRECT:  # first: Dynamo cannot trace what follows
        return False
    return (
        torch.is_inference_mode_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch.autograd._profiler_enabled()
    )


def plain_dtypes(device: torch.device) -> AbstractContextManager:
    """Inside an op the projections have their dtype: no autocast."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


FP64 = "float64 runs on the reference only"


def explain(op: str, *tensors: Tensor | None, phase: str = "forward") -> str:
    """Which back end `op` would take for these tensors, and what speaks against each of the others.

    phase: "forward" (inference), "saving" (a forward with a backward to come) or "backward".

    >>> print(explain("selective_scan", x))
    """
    if op not in TABLES:
        raise ValueError(f"explain: op must be one of {', '.join(sorted(TABLES))}, got {op!r}")
    device = tensors[0].device.type
    order = AUTO.get(device, ())
    able = [name for name in order if not reasons(op, name, *tensors)]
    rows = {name: TABLES[op][name] for name in able}
    fast = [name for name, row in rows.items() if row.faster and row.faster(phase, *tensors)]
    chosen = next(iter((*fast, *able)), None)
    lines = [f"{op} on {device}, {str(tensors[0].dtype).removeprefix('torch.')}: {chosen or 'no backend'}"]
    for name in NAMES:
        why = reasons(op, name, *tensors)
        lines.append(f"  {name}: {'; '.join(why) if why else 'can run' if name in order else 'can run by name'}")
    return "\n".join(lines)


def backend_info(device: str = "cpu") -> dict[str, dict[str, list[str]]]:
    """For every op and back end the reasons why it cannot run fp32 tensors on `device`; an empty list: it can."""
    import torch

    probe = torch.empty(0, device=device)
    return {op: {name: reasons(op, name, probe) for name in NAMES} for op in sorted(TABLES)}
