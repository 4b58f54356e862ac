"""Under test fresh memory holds NaN, so a half-written output cannot pass."""

import pytest
import torch


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if out.dtype.is_floating_point and not out.requires_grad:
            out.fill_(float("nan"))
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
