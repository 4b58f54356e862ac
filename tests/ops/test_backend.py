"""The dispatch point: a back end runs, or says in one message why not; nothing falls back in silence."""

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch._library.custom_ops import CustomOpDef

from endomamba import ops
from endomamba.ops import _backend, _extension, backend_info, causal_conv1d, explain, selective_scan
from endomamba.ops._backend import Backend, choose, register

needs_extension = pytest.mark.skipif(_extension.C is None, reason=_extension.MISSING)


def scan_inputs(b=1, l=70, d=40, n=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, dt = torch.randn(b, l, d, generator=g), torch.randn(b, l, d, generator=g) - 2
    return x, dt, -torch.rand(d, n, generator=g), torch.randn(b, l, n, generator=g), torch.randn(b, l, n, generator=g)


@pytest.fixture
def toy(monkeypatch):
    """An op with back ends whose answers the test sets."""
    monkeypatch.setattr(_backend, "TABLES", {})
    monkeypatch.setattr(_backend, "_warned", set())

    def make(**reasons):
        table = {
            name: Backend(lambda name=name: name, None, lambda *t, why=why: list(why)) for name, why in reasons.items()
        }
        return register("toy", table)

    return make


def test_auto_takes_the_first_that_can(toy):
    toy(cpu=[], reference=[])
    assert choose("toy", "auto", torch.zeros(1)).fwd() == "cpu"


def test_fallback_is_logged_once_with_the_reason(toy, caplog):
    toy(cpu=["it rains"], reference=[])
    with caplog.at_level(logging.WARNING, "endomamba"):
        for _ in range(3):
            assert choose("toy", "auto", torch.zeros(1)).fwd() == "reference"
    assert [r.getMessage() for r in caplog.records] == ["toy runs on the slow PyTorch reference (cpu: it rains)"]


def test_a_named_backend_runs_or_raises_every_reason(toy):
    toy(cpu=["it rains", "it is Monday"], reference=[])
    assert choose("toy", "reference", torch.zeros(1)).fwd() == "reference"
    with pytest.raises(NotImplementedError, match="toy: backend 'cpu' cannot run this call: it rains; it is Monday"):
        choose("toy", "cpu", torch.zeros(1))
    with pytest.raises(NotImplementedError, match="this version has no cuda kernel for toy"):
        choose("toy", "cuda", torch.zeros(1))
    with pytest.raises(ValueError, match="backend must be 'auto' or one of triton, cuda, cpu, reference, got 'gpu'"):
        choose("toy", "gpu", torch.zeros(1))


def test_no_backend_lists_all_reasons_and_never_takes_the_reference_off_the_cpu(toy):
    toy(cpu=["needs the CPU"], reference=[])
    with pytest.raises(NotImplementedError) as error:
        choose("toy", "auto", torch.zeros(1, device="meta"))
    message = str(error.value)
    for part in ("no triton kernel", "no cuda kernel", "cpu: needs the CPU", "reference: runs here by name only"):
        assert part in message


def test_explain_names_the_choice_and_the_obstacles():
    text = explain("selective_scan", torch.zeros(1, 2, 3, dtype=torch.float64))
    assert text.startswith("selective_scan on cpu, float64: reference")
    assert "cpu: " in text and "float64 runs on the reference only" in text and "triton: " in text
    with pytest.raises(ValueError, match="op must be one of"):
        explain("softmax", torch.zeros(1))


def test_backend_info_covers_every_op_and_backend():
    info = backend_info()
    expected = {
        "add_rms_norm", "bidirectional_conv1d", "bidirectional_scan", "causal_conv1d", "frame_blocks", "frame_embed",
        "frame_head", "frame_resize", "frame_settle", "frame_step", "mixer_inner", "selective_scan",
    }  # fmt: skip
    assert set(info) == expected
    assert all(set(row) == set(_backend.NAMES) and row["reference"] == [] for row in info.values())
    by_pytorch = ("frame_embed", "frame_head", "frame_resize", "frame_settle")  # on a CPU
    compiled = [row for op, row in info.items() if op not in by_pytorch]
    assert all(bool(row["cpu"]) == (_extension.C is None) for row in compiled)


def test_every_op_is_opchecked():
    """A rule worth having is a test: each forward op is passed to opcheck by some file beside this one."""
    modules = [m for name, m in sys.modules.items() if re.fullmatch(r"endomamba\.ops\.\w+\.op", name)]
    ops = {v._qualname: k for m in modules for k, v in vars(m).items() if isinstance(v, CustomOpDef)}
    assert len(ops) == 18
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    unchecked = [op for op, name in ops.items() if not op.endswith("_backward") and f"opcheck({name}," not in tests]
    assert not unchecked


@needs_extension
@pytest.mark.parametrize("level", _extension.C.levels() if _extension.C else [])
def test_every_level_of_this_machine_is_right(level):
    """The kernels are compiled once per instruction set; each must agree with fp64, not only the one that runs here."""
    tensors = scan_inputs(b=2, d=37, n=20)
    leaves = [t.clone().requires_grad_() for t in tensors]
    wide = [t.double().requires_grad_() for t in tensors]
    before = _extension.C.level()
    try:
        _extension.C.set_level(level)
        assert _extension.C.level() == level
        y, state = selective_scan(*leaves, return_final_state=True, backend="cpu")
        grads = torch.autograd.grad((y * y).sum() + state.sum(), leaves)
    finally:
        _extension.C.set_level(before)
    y64, state64 = selective_scan(*wide, return_final_state=True)
    grads64 = torch.autograd.grad((y64 * y64).sum() + state64.sum(), wide)
    for got, truth in zip((y, state, *grads), (y64, state64, *grads64), strict=True):
        assert (got - truth).norm() <= 1e-6 * truth.norm()


@needs_extension
def test_an_unknown_level_is_refused():
    with pytest.raises(ValueError, match=r"level must be one of .*baseline.* on this machine, got avx1024"):
        _extension.C.set_level("avx1024")


FORKED = """
import os, sys, torch
from endomamba.ops import selective_scan
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
x, dt = torch.randn(8, 70, 64, generator=g), torch.randn(8, 70, 64, generator=g)
A, B, C = -torch.rand(64, 16), torch.randn(8, 70, 16), torch.randn(8, 70, 16)
def bits():  # compared outside torch, whose own parallel loops hang in such a child
    return selective_scan(x, dt, A, B, C, backend="cpu")[0].numpy().tobytes()
parent = bits()
child = os.fork()
if child == 0:
    os._exit(0 if bits() == parent else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_extension
def test_an_op_in_a_forked_child_neither_hangs_nor_changes_a_bit():
    """libgomp's pool does not survive fork(): a forked DataLoader worker would wait for it for ever."""
    done = subprocess.run([sys.executable, "-c", FORKED], timeout=60)
    assert done.returncode == 0


@needs_extension
def test_without_the_extension_the_reference_runs_and_says_so():
    """A real process in which endomamba._C cannot be imported."""
    script = textwrap.dedent("""
        import sys
        sys.modules["endomamba._C"] = None
        import json, logging, torch
        logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
        from endomamba.ops import backend_info, selective_scan
        x = torch.ones(1, 3, 2)
        y, _ = selective_scan(x, x, -torch.ones(2, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 4))
        print(json.dumps({"why": backend_info()["selective_scan"]["cpu"], "finite": bool(y.isfinite().all())}))
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["finite"] and told["why"] and "endomamba._C" in told["why"][0]
    assert done.stderr.count("runs on the slow PyTorch reference") == 1


@needs_extension
@pytest.mark.parametrize("bounds", [[0, 9, 4, 20], [1, 4, 20], [0, 4, 19], [0, 4, 21]])
def test_packing_that_leaves_the_tensor_is_refused(bounds):
    """cu_seqlens is read by the CPU kernels before they trust it, in the scan and in the convolution."""
    x, dt, A, B, C = scan_inputs(l=20)
    cu = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall and end at l = 20"):
        selective_scan(x, dt, A, B, C, cu_seqlens=cu, max_seqlen=20, backend="cpu")
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never fall and end at l = 20"):
        causal_conv1d(x, torch.ones(40, 4), cu_seqlens=cu, max_seqlen=20, backend="cpu")


# ---- inference past the dispatcher


def _mixer_tensors():
    torch.manual_seed(0)
    b, l, d, n, r, w = 1, 5, 8, 4, 2, 4
    xz, conv_state, ssm_state = torch.randn(b, l, 2 * d), torch.randn(b, w - 1, d), torch.randn(b, d, n)
    side = (torch.randn(d, w), torch.randn(d), torch.randn(r + 2 * n, d), torch.randn(d, r), torch.randn(d))
    return xz, conv_state, ssm_state, (*side, -torch.rand(d, n), torch.randn(d))


def _all_three():
    """frame_step, mixer_inner and add_rms_norm on the same numbers -> everything they give or change."""
    xz, conv_state, ssm_state, side = _mixer_tensors()
    states = {"initial_conv_state": conv_state, "initial_ssm_state": ssm_state}
    whole = ops.mixer_inner(xz, *side, **states, return_final_state=True)
    y = ops.frame_step(xz, conv_state, ssm_state, *side)
    return [*whole, y, conv_state, ssm_state, *ops.add_rms_norm(xz, torch.ones(xz.shape[-1]), xz)]


def test_inference_calls_the_same_functions_without_the_dispatcher(monkeypatch):
    with torch.no_grad():
        through = _all_three()
    ops_called = []
    plain = CustomOpDef.__call__
    monkeypatch.setattr(CustomOpDef, "__call__", lambda self, *args: (ops_called.append(self), plain(self, *args))[1])
    with torch.inference_mode():
        past = _all_three()
    assert not ops_called, "an op went through the dispatcher"
    assert all(torch.equal(a, b) for a, b in zip(through, past, strict=True))
    with torch.no_grad():
        _all_three()
    assert len(ops_called) == 3


def test_whoever_looks_sees_the_ops_in_inference_too():
    from torch.utils.flop_counter import FlopCounterMode

    names = {"endomamba::frame_step", "endomamba::mixer_inner", "endomamba::add_rms_norm"}
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _all_three()
    assert names <= {row.key for row in profile.key_averages()}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        _all_three()
    assert counter.get_total_flops() > 0 and "endomamba.frame_step" in {str(op) for op in counter.flop_counts["Global"]}


def test_a_torch_without_the_private_names_takes_the_op(monkeypatch):
    from endomamba.ops.add_rms_norm.op import add_norm_op

    with torch.inference_mode():
        assert _backend.direct(add_norm_op) is not add_norm_op, "the shorter way is not taken here"
        monkeypatch.setattr(_backend, "_DIRECT", False)
        assert _backend.direct(add_norm_op) is add_norm_op
