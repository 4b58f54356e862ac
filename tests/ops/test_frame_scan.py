"""The Triton scan of few short sequences, one state a lane, against the scans' reference."""

import pytest
import torch

from endomamba.ops import bidirectional_scan, selective_scan
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops.backends import DEVICE, DTYPES, INTERPRET, Random

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not INTERPRET and DEVICE == "cpu", reason="needs the Triton back end"),
]
ROWS = [
    {},
    {"both": True},
    {"reverse": True},
    {"softplus": True, "bias": True},
    {"softplus": True, "bias": True, "both": True, "scale": 0.5},
    {"D": False, "z": False},
    {"state": True, "l": 33},
    {"d": 5, "b": 2, "both": True},  # fewer channels than a program has
]
ON_GPU = [
    *({"b": b, "l": l, "d": 768, "both": both, "softplus": True, "bias": True, "dtype": dtype}
      for b, l in ((1, 197), (3, 49), (1, 784)) for both in (False, True) for dtype in ("bf16", "fp32", "fp16")),
    {"l": 784, "d": 768, "state": True, "dtype": "bf16"},
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS if DEVICE == "cpu" else ROWS + ON_GPU, ids=str)
def test_against_the_reference(row):
    from endomamba.ops._scan_triton_frame import FrameSide, frame_scan

    usual = {"b": 1, "l": 9, "d": 6, "both": False, "reverse": False, "softplus": False, "bias": False, "D": True,
             "z": True, "state": False, "scale": 1.0, "dtype": "fp32"}  # fmt: skip
    row = usual | row
    b, l, d, dtype, random = row["b"], row["l"], row["d"], DTYPES[row["dtype"]], Random(0)

    def side():
        dt = random.randn(b, l, d) if row["softplus"] else 0.1 * random.rand(b, l, d)
        A = -torch.arange(1.0, 17).repeat(d, 1) * (0.5 + random.rand(d, 16))
        rows = random.randn(b, l, 40).to(dtype)  # B and C lie in one tensor, 16 bytes from its rows' beginning
        return {
            "x": random.randn(b, l, d).to(dtype), "dt": dt.to(dtype), "A": A, "B": rows[..., 8:24], "C": rows[..., 24:],
            "D": random.randn(d) if row["D"] else None, "dt_bias": random.randn(d) - 2 if row["bias"] else None,
        }  # fmt: skip

    sides = [side() for _ in range(1 + row["both"])]
    z = random.randn(b, l, d).to(dtype) if row["z"] else None
    start = random.randn(b, d, 16) if row["state"] else None

    def reference(wide):
        cast = lambda t: None if t is None else t.to(wide or t.dtype)  # noqa: E731
        values = [{name: cast(t) for name, t in side.items()} for side in sides]
        if row["both"]:
            second = {f"{name}_b": t for name, t in values[1].items()}
            more = {"scale": row["scale"], "dt_softplus": row["softplus"], "backend": "reference"}
            return bidirectional_scan(**values[0], **second, z=cast(z), **more)[0], None
        return selective_scan(
            **values[0], z=cast(z), initial_state=cast(start), return_final_state=row["state"],
            reverse=row["reverse"], dt_softplus=row["softplus"], backend="reference",
        )  # fmt: skip

    y = torch.full((b, l, d), float("nan"), dtype=dtype)
    final = None if start is None else torch.full_like(start, float("nan"))
    order = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    given = [FrameSide(*(side[name] for name in order)) for side in sides] + [None]
    frame_scan(
        *given[:2], z, y, start, final, softplus=row["softplus"], warps=2, scale=row["scale"], reverse=row["reverse"]
    )
    (eager, eager_final), (truth, true_final) = reference(None), reference(torch.float64)
    assert_as_accurate_as_eager("y", y, eager, truth)
    if final is not None:
        assert_as_accurate_as_eager("final state", final, eager_final, true_final)
