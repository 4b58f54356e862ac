"""frame_head: norm, pool and Linear of a frame's last residual, against fp64."""

import pytest
import torch
from torch.library import opcheck

from endomamba.ops import frame_head
from endomamba.ops.frame_head.op import frame_head_op
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops.backends import DEVICE, DTYPES, HALF, Random

ROWS = [
    {},
    {"l": 1},
    {"c": 24, "l": 40},  # channels that are no power of 2, more tokens than a step takes
    {"k": 19},  # more classes than a step takes
    {"k": 75, "l": 3},  # more than a program takes
    {"k": 0},
    {"b": 0},
    {"pool": "cls"},
    {"pool": "cls", "c": 24, "k": 19},
    {"dtype": HALF},
    {"out": HALF},
]
ON_GPU = [*ROWS, *({"b": b, "l": 197, "c": c, "k": 7, "pool": p} for b, c, p in
                   ((1, 192, "mean"), (16, 384, "mean"), (1, 576, "mean"), (2, 384, "cls")))]  # fmt: skip


def ids(row):
    return "-".join(f"{k}{v}" for k, v in row.items()) or "base"


def make(row, seed=0):
    row, random = {"b": 3, "l": 9, "c": 16, "k": 5, "dtype": "fp32"} | row, Random(seed)
    b, l, c, k = (row[name] for name in "blck")
    residual = 3 * random.randn(b, l, c).to(DTYPES[row["dtype"]])
    options = {"pool": row.get("pool", "mean"), "out_dtype": DTYPES[row["out"]] if "out" in row else None}
    return (residual, random.randn(k, c), random.randn(k)), options


@on.backends("frame_head")
@pytest.mark.parametrize("row", on.few(ROWS, *ROWS, on_gpu=ON_GPU) if DEVICE == "cpu" else ON_GPU, ids=ids)
def test_as_accurate_as_eager(row, backend):
    tensors, options = make(row)
    got = frame_head(*tensors, **options, backend=backend)
    eager = frame_head(*tensors, **options, backend="reference")
    wide = tuple(t.double() for t in tensors)
    truth = frame_head(*wide, pool=options["pool"], backend="reference")
    x = wide[0] / (wide[0].square().mean(2, keepdim=True) + 1e-5).sqrt()
    pooled = x.mean(1) if options["pool"] == "mean" else x[:, 0]
    torch.testing.assert_close(truth, pooled @ wide[1].T + wide[2], rtol=1e-12, atol=1e-12)
    assert got.dtype == (options["out_dtype"] or tensors[0].dtype) and got.shape == truth.shape
    assert_as_accurate_as_eager("logits", got, eager, truth, 2.0 * on.slack(backend))


@on.backends("frame_head")
def test_a_frame_is_by_itself(backend):
    (residual, weight, bias), _ = make({"l": 40})
    together = frame_head(residual, weight, bias, backend=backend)
    spoilt = residual.clone()
    spoilt[1, 39, 3] = float("nan")
    answer = frame_head(spoilt, weight, bias, backend=backend)
    assert answer[1].isnan().all() and torch.equal(answer[::2], together[::2])
    assert frame_head(spoilt, weight, bias, pool="cls", backend=backend).isfinite().all()
    if backend == "triton":  # a product of MKL may look at how many rows there are
        assert torch.equal(frame_head(residual[2:], weight, bias, backend=backend), together[2:])


@on.backends("frame_head")
def test_layouts(backend):
    (residual, weight, bias), _ = make({})
    before = residual.clone()
    expected = frame_head(residual, weight, bias, backend=backend)
    assert torch.equal(residual, before)
    got = frame_head(residual.mT.contiguous().mT, weight.T.contiguous().T, bias, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_opcheck():
    (residual, weight, bias), _ = make({})
    args = (residual, weight, bias, True, 1e-5, torch.float32, "reference")
    opcheck(frame_head_op, args, test_utils=("test_schema", "test_faketensor"))


def test_refusals():
    (residual, weight, bias), _ = make({})

    def refused(error, message, *args, **options):
        with pytest.raises(error, match=message):
            frame_head(*args, **options)

    refused(ValueError, r"residual must be \(b, l, c\)", residual[0], weight, bias)
    refused(ValueError, r"pool must be one of \('mean', 'cls'\), got 'max'", residual, weight, bias, pool="max")
    refused(ValueError, r"weight must have shape \(k, c\) = \(5, 16\)", residual, weight[:, :3], bias)
    refused(ValueError, r"bias must have shape \(k,\) = \(5,\)", residual, weight, bias[:2])
    refused(ValueError, "a frame must have tokens", residual[:, :0], weight, bias)
    grown = weight.clone().requires_grad_()
    refused(RuntimeError, "has no gradient", residual, grown, bias)
