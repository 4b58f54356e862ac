"""Which layer was the first to go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree


class Watch:
    """While it lasts: the first module whose output, and the first whose output's gradient, is not finite."""

    def __init__(self, model: nn.Module):
        self.first = self.first_gradient = ""
        self._model = model
        self._handles: list[Any] = []

    def __enter__(self) -> Watch:
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_hook(self._hook(name or type(module).__name__)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def gradient(grad: Tensor | None) -> None:  # None: of an output that nothing was made of
            if grad is not None and not self.first_gradient and not grad.isfinite().all():
                self.first_gradient = name

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _pytree.tree_leaves(output):
                if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                    continue
                if not self.first and not tensor.isfinite().all():
                    self.first = name
                if tensor.requires_grad:
                    tensor.register_hook(gradient)

        return hook
