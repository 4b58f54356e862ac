"""Under test fresh memory holds NaN, bytes 0xA5, so a half-written output cannot pass; which tests each run has."""

from pathlib import Path

import pytest
import torch

from tests.ops.backends import DEVICE, INTERPRET, NAMES, PLAIN
from tests.ops.cuda_on_host import host_module, whole_host_module  # noqa: F401

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


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """On a GPU: the CUDA kernels take less than the others and say so, which is no failure."""
    try:
        return (yield)
    except Exception as refused:  # NotImplementedError, or what opcheck makes of one
        if DEVICE == "cuda" and "backend 'cuda' cannot run this call" in str(refused):
            pytest.skip(str(refused))
        raise


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if out.dtype.is_floating_point and not out.requires_grad:
            out.fill_(float("nan"))
        elif out.dtype == torch.uint8:
            out.fill_(0xA5)
        return out

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


if INTERPRET:
    # Triton 3.7's interpreter patches triton.language anew at every call of a device function, half of its time; once a
    # kernel is enough.  Not needed where _patch_lang looks whether it has been there.
    from triton.runtime import interpreter

    def _call(self, *args, **kwargs):
        if not hasattr(self, "languages"):
            known = (interpreter.tl, interpreter.tl.core)
            self.languages = [m for m in known if any(m is value for value in self.fn.__globals__.values())]
        if any(interpreter.tl.core.is_builtin(m.load) for m in self.languages):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = _call
