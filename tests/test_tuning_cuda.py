"""The table of shapes that "auto" gives to the CUDA scans: what it says at, between and outside of measured ones."""

import dataclasses
import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch

from endomamba.frame_stream import FrameStream
from endomamba.models import create_model
from endomamba.ops import _cuda, _extension_cuda
from endomamba.ops import _cuda_table as table
from endomamba.ops._backend import TABLES, Backend, choose
from endomamba.ops.frame_blocks import cuda as frame_cuda
from endomamba.ops.mixer_inner import compose
from tests.ops import test_mixer_inner as mixer

ROWS = {"causal forward": {49: {1: 2.0, 16: 1.5, 64: 1.01}, 197: {1: 3.0, 16: 1.2, 64: 1.4}}}
H200 = (9, 0, 132)
FRAMES = {"both ways bf16 384": {50: {1: 1.2, 5: 1.2}, 197: {1: 1.2, 5: 1.02}}}


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(table, "RATIO", {"scans": ROWS, "frames": FRAMES})
    table.faster.cache_clear()
    yield
    table.faster.cache_clear()


@pytest.mark.parametrize(
    "b, l, faster",
    [
        (1, 49, True), (7, 49, True), (7, 100, True), (16, 197, True), (40, 197, True),
        (64, 49, False), (40, 49, False), (40, 100, False),  # a corner is not
        (65, 197, False), (1, 48, False), (1, 198, False), (0, 49, False),  # outside
    ],
)  # fmt: skip
def test_every_corner_has_a_say(rows, b, l, faster):
    assert table.faster("scans", "causal forward", b, l, H200) is faster
    assert not table.faster("scans", "causal backward", b, l, H200)
    assert not table.faster("frames", "causal forward", b, l, H200)
    assert not table.faster("scans", "causal forward", b, l, (10, 0, 132))
    assert not table.faster("scans", "causal forward", b, l, (9, 0, 114))  # an H100 on a PCIe card


@pytest.mark.parametrize("part", ["scans", "frames"])
def test_the_table_is_of_the_results(part):
    """What is written in the table follows from the file of times."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from bench import tune_cuda

    data = json.loads(tune_cuda.RESULTS[part].read_text())
    assert tune_cuda.ratios(tune_cuda.numbered(data["median_us"])) == table.RATIO[part]
    assert table.MEASURED[part] == tune_cuda.measured_by(data["meta"], data) | {"chip": [9, 0, 132]}
    found = [ratio for rows in table.RATIO[part].values() for row in rows.values() for ratio in row.values()]
    assert min(found) < table.LEAST < max(found)


def test_the_tool_rewrites_its_part_of_the_table(tmp_path, monkeypatch):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from bench import tune_cuda

    copy = tmp_path / "table.py"
    copy.write_text(Path(table.__file__).read_text())
    monkeypatch.setattr(tune_cuda._cuda_table, "__file__", str(copy))
    measured = {"gpu": "a GPU", "driver": "1", "commit": "abc", "chip": [8, 0, 108]}
    tune_cuda.write_table("scans", ROWS, measured)
    new = runpy.run_path(str(copy))
    assert (new["RATIO"]["scans"], new["MEASURED"]["scans"]) == (ROWS, measured)
    assert (new["RATIO"]["frames"], new["MEASURED"]["frames"]) == (table.RATIO["frames"], table.MEASURED["frames"])
    assert new["faster"]("scans", "causal forward", 1, 49, (8, 0, 108))


@pytest.fixture
def gpu(rows, monkeypatch):
    """Tensors on the meta device are taken for an H200's."""
    monkeypatch.setattr("endomamba.ops._backend.AUTO", {"meta": ("triton", "cuda")})
    monkeypatch.setattr(_cuda, "on_gpu", lambda x: True)
    monkeypatch.setattr(_cuda, "elsewhere", lambda x: [])
    monkeypatch.setattr(_cuda, "missing", lambda: "")
    monkeypatch.setattr(_cuda, "usable", lambda: True)
    monkeypatch.setattr(_cuda, "chip", lambda device: H200)
    monkeypatch.setattr(_cuda, "capability", lambda device: (9, 0))
    for op in ("selective_scan", "bidirectional_scan", "mixer_inner", "frame_blocks"):
        row = TABLES[op]["triton"]
        monkeypatch.setitem(TABLES[op], "triton", type(row)(row.fwd, row.bwd, lambda *_: []))


def chosen(*shape, phase="forward", dtype=torch.bfloat16, **more) -> str:
    x = torch.empty(shape, dtype=dtype, device="meta")
    A, B = torch.empty(shape[2], 16, device="meta"), torch.empty(*shape[:2], 1, 16, dtype=dtype, device="meta")
    tensors = [x, x, A, B, B, None, None, None, None, more.get("cu_seqlens"), None]
    row = choose("selective_scan", "auto", *tensors, phase=phase)
    return next(name for name, own in TABLES["selective_scan"].items() if own is row)


def test_auto_takes_cuda_where_the_table_has_it(gpu):
    assert chosen(1, 197, 768) == "cuda"
    assert chosen(64, 49, 768) == "triton"
    assert chosen(1, 197, 768, phase="backward") == "triton"
    assert chosen(1, 197, 768, phase="") == "triton"  # plan="invariant", or frames
    assert chosen(1, 197, 768, dtype=torch.float32) == "triton"
    assert chosen(1, 197, 768, cu_seqlens=torch.empty(2, device="meta")) == "triton"


def chosen_frame(b, l, c=384, sides=2, dtype=torch.bfloat16, phase="forward") -> str:
    residual, d = torch.empty(b, l, c, device="meta"), 2 * c
    weights = [torch.empty(shape, device="meta", dtype=dtype) for shape in ((2 * d, c), (sides, 5, d))]
    weights += [torch.empty(1, device="meta")] * 4 + [torch.empty(sides, d, 16, device="meta")]
    row = choose("frame_blocks", "auto", residual, weights, phase=phase)
    return next(name for name, own in TABLES["frame_blocks"].items() if own is row)


def test_auto_takes_the_frame_kernel_where_the_table_has_it(gpu, monkeypatch):
    monkeypatch.setattr(frame_cuda, "unsupported", lambda *_: [])
    assert chosen_frame(1, 197) == chosen_frame(1, 100) == chosen_frame(3, 50) == "cuda"
    assert chosen_frame(2, 197) == "triton"  # a corner is not
    for other in ({"c": 192}, {"sides": 1}, {"dtype": torch.float32}, {"dtype": torch.float16}, {"phase": ""}):
        assert chosen_frame(1, 197, **other) == "triton"
    monkeypatch.setattr(frame_cuda, "unsupported", lambda *_: ["too little shared memory"])
    assert chosen_frame(1, 197) == "triton"


def test_what_speaks_against_packing_is_asked_for_every_size(gpu, monkeypatch):
    """Of both back ends under "auto", of the named one alone otherwise; the CUDA kernel takes few tokens."""
    few = lambda residual, weights=(), *_: ["too many tokens"] if residual.shape[1] > 200 else []  # noqa: E731
    rows = TABLES["frame_blocks"]
    monkeypatch.setitem(rows, "cuda", Backend(rows["cuda"].fwd, None, few))
    refuses = Backend(rows["triton"].fwd, None, lambda *_: ["no Triton"])
    options = dict(img_size=32, embed_dim=16, depth=2, num_classes=3, dynamic_img_size=True)
    against = {}
    for backend in ("auto", "cuda", "triton", "cpu"):
        camera = FrameStream(create_model("endomamba", **options).eval())  # on the CPU, where nothing is asked
        camera.model.config = dataclasses.replace(camera.model.config, backend=backend)
        ask = lambda *sizes: camera._speaks_against(camera.model.frame_weights(), sizes)  # noqa: B023, E731
        assert ask() == ([] if backend != "cpu" else ["the model was made with backend='cpu'"])
        with monkeypatch.context() as patch:
            patch.setitem(rows, "triton", refuses)
            against[backend] = ask((448, 448)), ask((48, 48))
    assert against["auto"] == (["triton: no Triton", "cuda: too many tokens"], [])
    assert against["cuda"] == (["cuda: too many tokens"], [])
    assert against["triton"] == (["triton: no Triton"],) * 2


def test_a_model_made_for_cuda_takes_what_has_no_such_kernel_from_auto():
    model = create_model("endomamba", img_size=16, embed_dim=16, depth=2, backend="cuda")
    assert model.norm_f.backend == "auto" and model.layers[0].mixer.backend == "cuda"
    model = create_model("endomamba", img_size=16, embed_dim=16, depth=2, backend="triton")
    assert model.norm_f.backend == "triton"


def test_auto_takes_triton_on_another_gpu_and_where_nothing_can_be_built(gpu, monkeypatch):
    monkeypatch.setattr(_cuda, "chip", lambda device: (8, 0, 108))
    assert chosen(1, 197, 768) == "triton"
    monkeypatch.setattr(_cuda, "chip", lambda device: H200)
    monkeypatch.setattr(_cuda, "missing", lambda: "no nvcc")
    assert chosen(1, 197, 768) == "triton"
    monkeypatch.setattr(_cuda, "missing", lambda: "")
    monkeypatch.setattr(_cuda, "usable", lambda: False)
    assert chosen(1, 197, 768) == "triton"


@pytest.mark.parametrize("both", [False, True], ids=["causal", "both"])
def test_a_mixer_chooses_for_each_of_its_kernels(both, monkeypatch):
    """Under "auto" on a GPU; here the parts find the CPU's.  Nothing but the choice is different."""
    row, asked = TABLES["mixer_inner"]["triton"], []

    def recorded(op, backend, *tensors, phase=""):
        asked.append((op, phase))
        return choose(op, backend, *tensors, phase=phase)

    monkeypatch.setattr("endomamba.ops._backend.AUTO", {"cpu": ("triton", "cpu", "reference")})
    monkeypatch.setattr(compose, "choose", recorded)
    monkeypatch.setitem(TABLES["mixer_inner"], "triton", type(row)(row.fwd, row.bwd, lambda *_: []))
    if both:
        mixer.test_bidirectional_equals_its_parts_in_every_gradient("base", "auto")
    else:
        mixer.test_causal_equals_its_parts_in_every_gradient("base", "auto")
    scan, conv = ("bidirectional_scan", "bidirectional_conv1d") if both else ("selective_scan", "causal_conv1d")
    assert {*asked} == {(scan, "saving"), (scan, "backward"), (conv, "")}


def test_a_build_that_fails_is_one_warning(monkeypatch, caplog):
    def fails():
        raise RuntimeError("no such arch")

    monkeypatch.setattr(_extension_cuda, "load", fails)
    _extension_cuda.usable.cache_clear()
    assert not _extension_cuda.usable() and not _extension_cuda.usable()
    _extension_cuda.usable.cache_clear()
    assert [r.getMessage() for r in caplog.records] == ["the CUDA C++ kernels are not used: no such arch"]
