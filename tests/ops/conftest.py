"""Under test fresh memory holds NaN, so a half-written output cannot pass; and which tests each run has."""

from pathlib import Path

import pytest
import torch

from tests.ops.backends import DEVICE, NAMES, PLAIN

# Here, before the test modules are imported: their tables hold tensors.
if DEVICE != "cpu":
    torch.set_default_device(DEVICE)


def pytest_collection_modifyitems(config, items):
    """Off the plain run only what concerns its back ends: see backends.py."""

    def keep(item):
        if Path(__file__).parent not in item.path.parents:
            return True
        if item.get_closest_marker("triton"):
            return not PLAIN
        params = item.callspec.params if hasattr(item, "callspec") else {}
        return PLAIN or params.get("backend") in NAMES

    kept = [item for item in items if keep(item)]
    config.hook.pytest_deselected(items=[item for item in items if not keep(item)])
    items[:] = kept


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if out.dtype.is_floating_point and not out.requires_grad:
            out.fill_(float("nan"))
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
