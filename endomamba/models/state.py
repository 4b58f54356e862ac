"""The state of one or more streams: an object the caller holds, and checks before it is used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .config import EndoMambaConfig


class StateError(ValueError):
    """A state that does not fit the call: one sentence, nothing was changed."""


@dataclass(eq=False)
class StreamState:
    """conv: (layers, b, w-1, d) fp32, newest token last  ssm: (layers, b, d, n) fp32  frame: (b,) int64, frames seen

    Layers are the temporal blocks.  `model` is the fingerprint of the models it belongs to.
    """

    conv: Tensor
    ssm: Tensor
    frame: Tensor
    model: str

    @classmethod
    def zeros(cls, config: EndoMambaConfig, batch_size: int, device: torch.device, dtype=torch.float32) -> StreamState:
        if batch_size < 1:
            raise StateError(f"init_state: batch_size must be at least 1, got {batch_size}")
        layers, d = config.temporal_layers, config.d_inner
        return cls(
            torch.zeros(layers, batch_size, config.d_conv - 1, d, dtype=dtype, device=device),
            torch.zeros(layers, batch_size, d, config.d_state, dtype=dtype, device=device),
            torch.zeros(batch_size, dtype=torch.int64, device=device),
            config.fingerprint(),
        )

    @property
    def batch_size(self) -> int:
        return self.frame.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.conv, self.ssm, self.frame))

    def check(self, model: str, batch_size: int, device: torch.device) -> None:
        """Raises StateError unless this is a state of such a model, for such a batch, on that device."""
        if self.model != model:
            raise StateError(f"step: the state belongs to model {self.model}, this model is {model}; use model.init_state")
        if self.batch_size != batch_size:
            raise StateError(f"step: the state is for {self.batch_size} stream(s), the frames for {batch_size}")
        for name in ("conv", "ssm", "frame"):
            got = getattr(self, name).device
            if got != device:
                raise StateError(f"step: the model is on {device} and the state's {name} on {got}; use state.to(device)")
        for name in ("conv", "ssm"):
            if getattr(self, name).dtype not in (torch.float32, torch.float64):
                raise StateError(f"step: the state's {name} must be float32, got {getattr(self, name).dtype}")

    def _map(self, f) -> StreamState:
        return dataclasses.replace(self, conv=f(self.conv), ssm=f(self.ssm), frame=f(self.frame))

    def clone(self) -> StreamState:
        return self._map(torch.clone)

    def detach(self) -> StreamState:
        """Cuts the gradient: the end of a truncated back-propagation window."""
        return self._map(Tensor.detach)

    def to(self, device: torch.device | str) -> StreamState:
        return self._map(lambda t: t.to(device))

    def rows(self, index: int | slice | list[int] | Tensor) -> StreamState:
        """The states of some streams, copied."""
        index = [index] if isinstance(index, int) else index
        pick = torch.arange(self.batch_size, device=self.frame.device)[index]
        return dataclasses.replace(self, conv=self.conv[:, pick], ssm=self.ssm[:, pick], frame=self.frame[pick])

    def reset(self, rows: list[int] | Tensor | None = None) -> StreamState:
        """A new state in which the given streams (None: all) start again at frame 0; the others go on."""
        keep = torch.ones(self.batch_size, dtype=torch.bool, device=self.frame.device)
        keep[slice(None) if rows is None else rows] = False
        select = keep.view(1, -1, 1, 1)
        return dataclasses.replace(
            self, conv=torch.where(select, self.conv, 0.0), ssm=torch.where(select, self.ssm, 0.0),
            frame=torch.where(keep, self.frame, 0),
        )  # fmt: skip

    def save(self, path: str | Path) -> None:
        from safetensors.torch import save_file

        tensors = {name: getattr(self, name).detach().contiguous() for name in ("conv", "ssm", "frame")}
        save_file(tensors, str(path), metadata={"model": self.model})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> StreamState:
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise StateError(f"{path}: no such file")
        try:
            with safe_open(str(path), framework="pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in ("conv", "ssm", "frame")}
                model = (file.metadata() or {})["model"]
        except (SafetensorError, KeyError) as error:
            raise StateError(f"{path}: not a saved StreamState ({error})") from error
        return cls(model=model, **tensors)


torch.utils._pytree.register_pytree_node(
    StreamState,
    lambda state: ([state.conv, state.ssm, state.frame], state.model),
    lambda tensors, model: StreamState(*tensors, model),
    serialized_type_name="endomamba.models.StreamState",
)
