"""frame_blocks in one CUDA kernel, compiled for the host (cuda_host.h), whose blocks wait for each other."""

import pytest
import torch

from endomamba.ops import _cuda
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops.cuda_on_host import needs_compiler
from tests.ops.test_frame_blocks import ids, make, run

pytestmark = needs_compiler
SMALL = {"c": 96, "d": 192, "r": 6, "dtype": "bf16", "l": 20}
# More rows than a tile of `in` has, two streams, as few as the conv keeps
ROWS = [{}, {"l": 37, "b": 2}, {"l": 3, "layers": 1}, {"dtype": "fp32", "l": 37}]
WHOLE = [
    {"c": c, "d": 2 * c, "r": c // 16, "l": 197, "dtype": dtype} for dtype in ("bf16", "fp32") for c in (192, 384, 576)
]
both = pytest.mark.parametrize("sides", [2, 1], ids=["both", "causal"])


@pytest.fixture
def grid(host_module, monkeypatch):
    """Makes the CUDA back end run here, on so many blocks."""
    yield from runs_here(host_module, monkeypatch)


@pytest.fixture
def whole_grid(whole_host_module, monkeypatch):
    yield from runs_here(whole_host_module, monkeypatch)


def runs_here(compiled, monkeypatch):
    monkeypatch.setattr(_cuda, "load", lambda: compiled)
    monkeypatch.setattr(_cuda, "missing", lambda: "")
    monkeypatch.setattr(_cuda, "usable", lambda: True)
    monkeypatch.setattr(_cuda, "elsewhere", lambda x: [])
    monkeypatch.setattr(_cuda, "capability", lambda device: (9, 0))
    monkeypatch.setattr(_cuda, "shared_memory", lambda device: 227 * 1024)
    monkeypatch.setattr(_cuda, "stream", lambda device: 0)

    def of(blocks: int, descending: bool = False):
        monkeypatch.setattr(_cuda, "processors", lambda device: blocks)
        compiled.descending(descending)

    yield of
    compiled.descending(False)


def assert_right(row, sides):
    values = make(SMALL | row, sides)
    got, eager, truth = (run(*values, *how) for how in (("cuda",), ("reference",), ("reference", torch.float64)))
    for name, *three in zip(("residual", "conv state", "ssm state"), got, eager, truth, strict=False):
        assert_as_accurate_as_eager(name, *three, 2.0)


@both
@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_against_the_ops_it_fuses(grid, row, sides):
    grid(3)
    assert_right(row, sides)


@pytest.mark.slow
@both
@pytest.mark.parametrize("row", WHOLE, ids=ids)
def test_whole_frames_of_every_size(whole_grid, row, sides):
    whole_grid(5)
    assert_right(row, sides)


@both
def test_neither_the_order_of_lanes_nor_the_grid_changes_a_bit(grid, sides):
    values = make(SMALL | {"layers": 1}, sides)
    found = []
    for how in ((3, False), (3, True), (4, False)):
        grid(*how)
        found.append(run(*values, "cuda"))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_streams_have_the_bits_they_have_alone(grid):
    grid(3)
    residual, blocks, *states = make(SMALL | {"b": 2, "layers": 1}, 1)
    together = run(residual, blocks, *states, "cuda")
    alone = run(residual[1:].contiguous(), blocks, *(t[:, 1:].contiguous() for t in states), "cuda")
    assert torch.equal(alone[0][0], together[0][1])
    assert all(torch.equal(a[:, 0], t[:, 1]) for a, t in zip(alone[1:], together[1:], strict=True))


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"l": 2}, "3 to 240 tokens, not 2"),
        ({"l": 241}, "3 to 240 tokens, not 241"),
        ({"c": 80, "d": 160, "r": 5}, "96, 192, 384 or 576 channels, not 80"),
        ({"dtype": "fp16"}, "weights must be bfloat16 or float32, they are torch.float16"),
        ({"w": 3}, "the conv must be 4 wide, not 3"),
        ({"layers": 49, "l": 3}, "there can be 48 blocks, not 49"),
        ({"r": 20}, "of 96 channels the padded dt rank must be 16, not 32"),
    ],
    ids=["few", "many", "channels", "fp16", "conv", "blocks", "rank"],
)
def test_what_it_does_not_take_is_said(grid, row, expected):
    grid(3)
    with pytest.raises(NotImplementedError, match=expected):
        run(*make(SMALL | {"layers": 1} | row, 1), "cuda")


def test_too_little_shared_memory_is_said(grid, monkeypatch):
    grid(3)
    monkeypatch.setattr(_cuda, "shared_memory", lambda device: 48 * 1024)
    with pytest.raises(NotImplementedError, match="bytes of shared memory, this GPU has 49152"):
        run(*make(SMALL | {"layers": 1}, 1), "cuda")
