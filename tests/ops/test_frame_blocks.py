"""frame_blocks: blocks of a frame in fused kernels, against the ops they are made of and against fp64."""

import pytest
import torch
from torch.library import opcheck

from endomamba.ops import BlockWeights, frame_blocks, pack_block
from endomamba.ops.frame_blocks.op import frame_blocks_op
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops.backends import DEVICE, DTYPES, INTERPRET, Random

BASE = {"b": 1, "l": 7, "c": 16, "d": 32, "w": 4, "r": 1, "layers": 2, "dtype": "fp32"}
ROWS = [
    {},
    {"b": 2, "l": 19},  # more than one tile of rows, a batch
    {"l": 2},  # shorter than the conv: a part of the old state stays
    {"l": 1},
    {"w": 2},
    {"c": 24, "d": 48, "r": 3},  # no whole step of a sum, a padded rank
    {"l": 225, "layers": 1},  # more tokens than a round has
    {"layers": 3},
]
ON_GPU = [
    *ROWS,
    *({"b": b, "l": 197, "c": c, "d": 2 * c, "r": c // 16, "dtype": dtype, "layers": 2}
      for b, c, dtype in ((1, 384, "bf16"), (1, 384, "fp32"), (3, 192, "bf16"), (16, 384, "bf16"), (1, 576, "bf16"))),
    {"l": 784, "c": 192, "d": 384, "r": 12, "dtype": "bf16"},
    {"l": 784, "c": 192, "d": 384, "r": 12},
    {"dtype": "bf16"},
]  # fmt: skip


def ids(row):
    return "-".join(f"{k}{v}" for k, v in row.items()) or "base"


def make(row, sides, seed=0):
    """Arguments: residual, blocks, conv_state, ssm_state."""
    row, random = BASE | row, Random(seed)
    b, l, c, d, w, r, layers = (row[name] for name in ("b", "l", "c", "d", "w", "r", "layers"))
    dtype, n = DTYPES[row["dtype"]], 16

    def direction():
        dt_bias = torch.log(torch.expm1(random.rand(d) * 0.1 + 0.01))  # so that a state outlives many tokens
        A = -torch.arange(1.0, n + 1).repeat(d, 1) * (0.5 + random.rand(d, n))
        x_proj, dt_proj = random.randn(r + 2 * n, d) / d**0.5, random.randn(d, r) / r**0.5
        conv, products = random.randn(d, w) / w**0.5, (x_proj.to(dtype), dt_proj.to(dtype))
        return conv, random.randn(d), *products, dt_bias, A, random.randn(d)

    blocks = []
    for _ in range(layers):
        in_proj, out_proj = random.randn(2 * d, c) / c**0.5, random.randn(c, d) / d**0.5
        norm = 0.5 + random.rand(c)
        blocks.append(pack_block(norm, in_proj.to(dtype), [direction() for _ in range(sides)], out_proj.to(dtype)))
    states = (None, None)
    if sides == 1:
        states = random.randn(layers, b, w - 1, d), random.randn(layers, b, d, n)
    return random.randn(b, l, c), blocks, *states


def sized(row, backend):
    """The row, of channels that the CUDA kernel takes where it is that one's turn."""
    return {"c": 96, "d": 192, "r": 6} | row if backend == "cuda" else row


def run(residual, blocks, conv_state, ssm_state, backend, dtype=None):
    """-> residual and states afterwards, in copies; in another dtype if asked."""
    cast = lambda t: None if t is None else t.to(dtype or t.dtype, copy=True)  # noqa: E731
    residual, conv_state, ssm_state = cast(residual), cast(conv_state), cast(ssm_state)
    if dtype:
        blocks = [BlockWeights(*(t.to(dtype) for t in block)) for block in blocks]
    with torch.no_grad():
        frame_blocks(residual, blocks, conv_state, ssm_state, backend=backend)
    return [t for t in (residual, conv_state, ssm_state) if t is not None]


def _products_look_at_rows() -> bool:
    """Whether a row of a library's product has other bits beside other rows: numpy's, and MKL's on an AMD."""
    x, w = torch.randn(14, 16), torch.randn(64, 16)
    return not torch.equal((x @ w.T)[7:], x[7:] @ w.T)


PRODUCTS_LOOK_AT_ROWS = _products_look_at_rows()
needs_triton = pytest.mark.skipif(not INTERPRET and DEVICE == "cpu", reason="needs the Triton back end")


@on.compiled("frame_blocks")
@pytest.mark.parametrize("sides", [2, 1], ids=["both", "causal"])
@pytest.mark.parametrize("row", on.few(ROWS if DEVICE == "cpu" else ON_GPU, ROWS[0], ROWS[2], on_gpu=ON_GPU), ids=ids)
def test_against_the_ops_it_fuses(row, sides, backend):
    values = make(sized(row, backend), sides)
    got, eager, truth = (run(*values, name, dtype) for name, dtype in
                         ((backend, None), ("reference", None), ("reference", torch.float64)))  # fmt: skip
    for name, one, other, exact in zip(("residual", "conv state", "ssm state"), got, eager, truth, strict=False):
        slack = 2.0 if row.get("dtype", "fp32") == "fp32" else 3.0  # of bf16 in a tensor of a thousand elements
        assert_as_accurate_as_eager(name, one, other, exact, slack)


@on.backends("frame_blocks")
def test_the_state_matters(backend):
    """What this file says of states is worth something: without it the residual moves by far more than the bounds."""
    residual, blocks, conv_state, ssm_state = make(sized({"layers": 1}, backend), 1)
    with_state = run(residual, blocks, conv_state, ssm_state, backend)[0]
    for states in ((conv_state * 0, ssm_state), (conv_state, ssm_state * 0)):
        assert (run(residual, blocks, *states, backend)[0] - with_state).abs().max() > 1e-2


@on.compiled("frame_blocks")
def test_a_frame_in_two_parts_goes_on_where_the_first_ended(backend):
    residual, blocks, conv_state, ssm_state = make(sized({"l": 11, "layers": 1}, backend), 1)
    whole = run(residual, blocks, conv_state, ssm_state, backend)
    first = run(residual[:, :4].contiguous(), blocks, conv_state, ssm_state, backend)
    second = run(residual[:, 4:].contiguous(), blocks, *first[1:], backend)
    torch.testing.assert_close(torch.cat((first[0], second[0]), 1), whole[0], rtol=1e-5, atol=2e-5)
    for one, other in zip(second[1:], whole[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@on.compiled("frame_blocks")
@pytest.mark.parametrize("sides", [2, 1], ids=["both", "causal"])
def test_streams_have_the_bits_they_have_alone(sides, backend):
    residual, blocks, *states = make(sized({"b": 2, "layers": 1}, backend), sides)
    together = run(residual, blocks, *states, backend)
    for i in range(2):
        alone = [None if t is None else t[:, i : i + 1].contiguous() for t in states]
        one = run(residual[i : i + 1].contiguous(), blocks, *alone, backend)
        pairs = [(one[0][0], together[0][i]), *((a[:, 0], t[:, i]) for a, t in zip(one[1:], together[1:], strict=True))]
        for got, expected in pairs:
            if INTERPRET or (DEVICE == "cpu" and PRODUCTS_LOOK_AT_ROWS):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
            else:
                assert torch.equal(got, expected)


@on.compiled("frame_blocks")
def test_what_is_not_finite_stays_in_its_stream(backend):
    residual, blocks, *states = make(sized({"b": 2, "layers": 1}, backend), 1)
    clean = run(residual, blocks, *states, backend)
    residual[0, 3, 1] = float("nan")
    spoilt = run(residual, blocks, *states, backend)
    assert spoilt[0][0].isnan().any() and torch.equal(spoilt[0][1], clean[0][1])
    assert all(torch.equal(a[:, 1], t[:, 1]) for a, t in zip(spoilt[1:], clean[1:], strict=True))


@pytest.mark.parametrize("sides", [2, 1], ids=["both", "causal"])
def test_opcheck(sides):
    residual, blocks, *states = make({"b": 2}, sides)
    args = (residual, [t for block in blocks for t in block], *states, 1e-5, "reference")
    opcheck(frame_blocks_op, args, test_utils=("test_schema", "test_faketensor"))


def test_pack_block_folds_the_norm_and_pads_the_rank():
    norm, in_proj = torch.rand(16), torch.randn(64, 16, dtype=torch.bfloat16)
    side = tuple(torch.randn(*shape) for shape in ((32, 4), (32,), (37, 32), (32, 5), (32,), (32, 16), (32,)))
    block = pack_block(norm, in_proj, [side, side], torch.randn(16, 32))
    assert block.x_proj.shape == (2, 48, 32) and block.dt_proj.shape == (2, 32, 16)
    assert (block.x_proj[:, 5:16] == 0).all() and (block.dt_proj[:, :, 5:] == 0).all()
    assert torch.equal(block.in_proj, (in_proj.float() * norm).bfloat16())
    assert block.out_proj.dtype == block.x_proj.dtype == torch.bfloat16 and block.A.dtype == torch.float32
    in_proj.zero_()
    assert block.in_proj.any(), "a copy"


def test_refusals():
    residual, blocks, conv_state, ssm_state = make({}, 1)
    both = make({}, 2)[1]

    def refused(error, message, *args, **options):
        with pytest.raises(error, match=message):
            frame_blocks(*args, **options)

    refused(ValueError, r"residual must be \(b, l, c\)", residual[0], blocks, conv_state, ssm_state)
    refused(ValueError, "residual must be contiguous and torch.float32, got torch.float64", residual.double(), blocks)
    refused(ValueError, "residual must be contiguous", residual.mT.contiguous().mT, blocks, conv_state, ssm_state)
    refused(ValueError, r"need conv_state \(2, 1, 3, 32\)", residual, blocks)
    refused(ValueError, r"ssm_state must have shape \(2, 1, 32, 16\)", residual, blocks, conv_state, ssm_state[:1])
    refused(ValueError, "blocks of two directions read a frame by itself", residual, both, conv_state, ssm_state)
    refused(ValueError, "all blocks must have the shapes of the first, block 1 has not", residual, [blocks[0], both[0]])
    refused(ValueError, r"in_proj must have shape \(2 d, c\) = \(64, 24\)", torch.zeros(1, 7, 24, device=DEVICE), both)
    grown = [blocks[0]._replace(D=blocks[0].D.clone().requires_grad_()), blocks[1]]
    refused(RuntimeError, "works in place and has no gradient", residual, grown, conv_state, ssm_state)
    frame_blocks(residual, [])  # nothing to do


@needs_triton
@pytest.mark.parametrize("sides", [2, 1], ids=["both", "causal"])
def test_four_kernels_a_block_and_one_before_them(sides, monkeypatch):
    from endomamba.ops import _scan_triton_frame
    from endomamba.ops.frame_blocks import triton_fwd

    launched = []

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for module in (triton_fwd, _scan_triton_frame):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Counted(name, getattr(module, name)))
    run(*make({"l": 3}, sides), "triton")
    block = ["_in_conv_kernel", "_x_proj_kernel", "_scan_frame_kernel", "_out_proj_kernel"]
    assert launched == ["_begin_kernel", *block, *block]


@needs_triton
def test_what_the_kernels_do_not_take_is_said():
    residual, blocks, *_ = make({}, 2)
    halves = [block._replace(in_proj=block.in_proj.half()) for block in blocks]
    with torch.no_grad(), pytest.raises(NotImplementedError, match="weights must be bfloat16 or float32"):
        frame_blocks(residual, halves, backend="triton")
    fewer = [block._replace(A=block.A[..., :8].contiguous()) for block in blocks]
    with torch.no_grad(), pytest.raises(NotImplementedError, match="for 16 states, not 8"):
        frame_blocks(residual, fewer, backend="triton")
