"""What a stream carries from frame to frame.  The caller holds it; the model holds nothing.

Letters: b streams, layers temporal layers, w conv width, d inner channels, n state size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils import _pytree

from ..ops import frame_settle

FORMAT = "endomamba.StreamState"

Rows = int | Sequence[int] | Tensor
State = TypeVar("State", bound="CarriedState")


class CarriedState:
    """What the state of every model has; a subclass is a dataclass whose tensors are named in TENSORS.

    `model` is the fingerprint of the config it belongs to; another model refuses it.
    ROWS: tensor -> its dimension of streams, where a state keeps each stream apart and its shapes never change; else
    None, and `settle_` and `reset_` of single streams are not for it.
    """

    TENSORS: ClassVar[tuple[str, ...]]
    ROWS: ClassVar[dict[str, int] | None] = None
    frame: Tensor  # (b,) int64, frames seen so far
    model: str

    @property
    def batch_size(self) -> int:
        return self.frame.shape[0]

    @property
    def device(self) -> torch.device:
        return self.frame.device

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).numel() * getattr(self, name).element_size() for name in self.TENSORS)

    def clone(self: State) -> State:
        """A snapshot: `step_` on one leaves the other as it was."""
        return self._map(Tensor.clone)

    def detach(self: State) -> State:
        """Shares memory; gradients stop here (truncated back-propagation through time)."""
        return self._map(Tensor.detach)

    def to(self: State, device: torch.device | str) -> State:
        return self._map(lambda tensor: tensor.to(device))

    @torch.no_grad()
    def copy_(self: State, other: CarriedState) -> State:
        """Takes over what `other` holds; ValueError if it belongs to another model, batch, device or dtype."""
        shapes = {name: getattr(self, name).shape for name in self.TENSORS}
        other.check(self.model, shapes, getattr(self, self.TENSORS[0]).dtype, self.device)
        for name in self.TENSORS:
            getattr(self, name).copy_(getattr(other, name))
        return self

    def settle_(
        self: State,
        before: State,
        logits: Tensor,
        active: Tensor,
        answer: Tensor,
        not_finite: Tensor,
        *,
        elapsed: bool = False,
        backend: str = "auto",
    ) -> None:
        """After a step tried on this state: `frame_settle` with its streams and those of `before`, a copy from before
        the step.  Both are equal afterwards."""
        pairs = []
        for name, dim in self._rows().items():
            if name != "frame":
                shape = getattr(self, name).shape
                view = (shape[:dim].numel(), shape[dim], shape[dim + 1 :].numel())
                pairs.append((getattr(self, name).view(view), getattr(before, name).view(view)))
        frame_settle(
            logits, active, (self.frame, before.frame), pairs, answer, not_finite, elapsed=elapsed, backend=backend
        )

    def _rows(self) -> dict[str, int]:
        if self.ROWS is None:
            raise NotImplementedError(f"{type(self).__name__} does not keep its streams apart")
        return self.ROWS

    def check(self, model: str, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> None:
        """Refuses what does not belong to this model, batch, device and dtype, in one sentence."""
        if self.model != model:
            raise ValueError(f"state belongs to another model: this one is [{model}], the state's is [{self.model}]")
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor.shape != shape:
                batch = shapes["frame"][0]
                if tensor.ndim == len(shape) and self.batch_size != batch:
                    raise ValueError(f"state holds {self.batch_size} streams, the frames are {batch}")
                raise ValueError(f"state.{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
            if tensor.device != device:
                raise ValueError(
                    f"state.{name} is on {tensor.device}, the model on {device}: call state.to('{device}')"
                )
            expected = torch.int64 if name == "frame" else dtype
            if tensor.dtype != expected:
                raise ValueError(f"state.{name} must be {expected}, got {tensor.dtype}")

    def _index(self, rows: Rows | None) -> Tensor:
        """Row numbers as an int64 tensor on the state's device; numbers given on the host are checked."""
        who = type(self).__name__
        if rows is None:
            return torch.arange(self.batch_size, device=self.device)
        if isinstance(rows, Tensor):
            if rows.dtype == torch.bool:
                if rows.shape != (self.batch_size,):
                    raise ValueError(f"{who}: a row mask must have shape ({self.batch_size},), got {tuple(rows.shape)}")
                return rows.to(self.device).nonzero().flatten()
            return rows.to(self.device, torch.int64).reshape(-1)
        numbers = [rows] if isinstance(rows, int) else list(rows)
        for row in numbers:
            if not -self.batch_size <= row < self.batch_size:
                raise ValueError(f"{who}: there is no row {row} among {self.batch_size} streams")
        return torch.tensor([row % self.batch_size for row in numbers], dtype=torch.int64, device=self.device)

    def _map(self: State, function: Callable[[Tensor], Tensor]) -> State:
        changes: dict[str, Any] = {name: function(getattr(self, name)) for name in self.TENSORS}
        return replace(self, **changes)  # type: ignore[type-var]  # every subclass is a dataclass


@dataclass(frozen=True, eq=False)
class StreamState(CarriedState):
    """conv: (layers, b, w - 1, d), newest last  ssm: (layers, b, d, n)  frame: (b,) int64, frames seen so far.

    Both states are fp32 whatever the model's dtype (fp64 for an fp64 model).  Row i of every tensor is stream i; rows
    may be at different frames.
    """

    TENSORS = ("conv", "ssm", "frame")
    ROWS: ClassVar = {"conv": 1, "ssm": 1, "frame": 0}

    conv: Tensor
    ssm: Tensor
    frame: Tensor
    model: str

    def select(self, rows: Rows) -> StreamState:
        """The streams `rows`, in that order; a row may come twice."""
        index = self._index(rows)
        return self._with(self.conv.index_select(1, index), self.ssm.index_select(1, index), self.frame[index])

    def reset(self, rows: Rows | None = None) -> StreamState:
        """A state in which the streams `rows` (None: all) start anew, whatever they held, NaN too."""
        index = self._index(rows)
        return self._with(
            self.conv.index_fill(1, index, 0), self.ssm.index_fill(1, index, 0), self.frame.index_fill(0, index, 0)
        )

    @torch.no_grad()
    def reset_(self, rows: Rows | None = None) -> StreamState:
        """`reset` in place."""
        index = self._index(rows)
        self.conv.index_fill_(1, index, 0)
        self.ssm.index_fill_(1, index, 0)
        self.frame.index_fill_(0, index, 0)
        return self

    @staticmethod
    def cat(states: Iterable[StreamState]) -> StreamState:
        """The streams of several states in one batch."""
        states = list(states)
        models = sorted({state.model for state in states})
        if len(models) != 1:
            raise ValueError(f"StreamState.cat: states must come from one model, got {models or 'none'}")
        return states[0]._with(
            torch.cat([s.conv for s in states], 1),
            torch.cat([s.ssm for s in states], 1),
            torch.cat([s.frame for s in states]),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file that names the model; whole or not at all."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in StreamState.TENSORS}
        part = f"{os.fspath(path)}.part"
        save_file(tensors, part, metadata={"format": FORMAT, "version": "1", "model": self.model})
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> StreamState:
        path = os.fspath(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        except (OSError, SafetensorError) as error:
            raise ValueError(f"StreamState.load: {path} cannot be read as a safetensors file ({error})") from None
        if metadata.get("format") != FORMAT or metadata.get("version") != "1" or sorted(tensors) != sorted(cls.TENSORS):
            raise ValueError(f"StreamState.load: {path} is not a stream state written by this version")
        state = cls(**tensors, model=metadata.get("model", ""))
        state._check_itself(path)
        return state.to(device)

    def _check_itself(self, path: str) -> None:
        conv, ssm, frame = self.conv, self.ssm, self.frame
        agree = conv.ndim == ssm.ndim == 4 and frame.ndim == 1
        agree = agree and conv.shape[:2] == ssm.shape[:2] and conv.shape[3] == ssm.shape[2]
        if not agree or ssm.shape[1] != frame.shape[0]:
            shapes = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in StreamState.TENSORS)
            raise ValueError(f"StreamState.load: the tensors in {path} do not fit together: {shapes}")

    def _with(self, conv: Tensor, ssm: Tensor, frame: Tensor) -> StreamState:
        return replace(self, conv=conv, ssm=ssm, frame=frame)


# torch.compile and torch.export take a state as an argument and return one.
_pytree.register_pytree_node(
    StreamState,
    lambda state: ([state.conv, state.ssm, state.frame], state.model),
    lambda tensors, model: StreamState(**dict(zip(StreamState.TENSORS, tensors)), model=model),
    serialized_type_name="endomamba.models.StreamState",
    flatten_with_keys_fn=lambda state: (
        [(_pytree.GetAttrKey(name), getattr(state, name)) for name in StreamState.TENSORS],
        state.model,
    ),
)
