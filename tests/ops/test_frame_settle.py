"""frame_settle: each stream goes on or back by itself, to the bit, wherever the one bad value is."""

import math

import pytest
import torch

from endomamba.ops import frame_settle
from endomamba.ops.frame_settle.op import frame_settle_op
from tests.ops import backends as on
from tests.ops.backends import DTYPES, Random

NAN, INF = math.nan, math.inf
ROWS = 5  # fine, idle, bad logits, bad state, idle and bad


def make(g=3, m=(6, 40), k=7, dtype=torch.float32, seed=0):
    """Arguments by name; states differ before and after, everywhere."""
    random = Random(seed)

    def pair(*shape):
        return random.randn(*shape), random.randn(*shape)

    logits = random.randn(ROWS, k).to(dtype)
    return {
        "logits": logits,
        "active": torch.tensor([True, False, True, True, False]),
        "frame": (torch.arange(ROWS) + 2**40 + 1, torch.arange(ROWS) + 2**40),
        "states": [pair(g, ROWS, n) for n in m],
        "answer": torch.empty_like(logits),
        "not_finite": torch.tensor([0, 1, 2, 3, 4]),
    }


def spoil(values, place, value):
    values["logits"][2, place % values["logits"].shape[1]] = value
    after = values["states"][-1][0]
    after[place % after.shape[0], 3, place % after.shape[2]] = -value
    values["states"][0][0][-1, 4, -1] = value


def copied(values):
    clone = lambda v: v.clone() if isinstance(v, torch.Tensor) else type(v)(clone(part) for part in v)  # noqa: E731
    return {name: clone(value) for name, value in values.items()}


def check(values, elapsed, backend):
    given = copied(values)
    frame_settle(**values, elapsed=elapsed, backend=backend)
    taken = torch.tensor([True, False, False, False, False])
    for (after, before), (was_after, was_before) in zip(values["states"], given["states"], strict=True):
        expected = torch.where(taken.view(1, -1, 1), was_after, was_before)
        assert torch.equal(after, expected) and torch.equal(before, expected)
    number = torch.where(given["active"] if elapsed else taken, *given["frame"])
    assert torch.equal(values["frame"][0], number) and torch.equal(values["frame"][1], number)
    assert torch.equal(values["answer"][0], given["logits"][0]) and values["answer"][1:].isnan().all()
    assert values["not_finite"].tolist() == [0, 1, 3, 4, 4]


@on.backends("frame_settle")
@pytest.mark.parametrize("elapsed", [False, True], ids=["processed", "elapsed"])
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
def test_each_stream_by_itself(value, elapsed, backend):
    values = make()
    spoil(values, 0, value)
    check(values, elapsed, backend)


@on.backends("frame_settle")
@pytest.mark.parametrize(
    "shape",
    [
        {"g": 1, "m": (1,), "k": 1},  # the least there is
        {"g": 2, "m": (33,)},  # one state: a window of frames
        {"g": 2, "m": (0, 5)},  # a conv of width 1 carries nothing
        {"g": 67, "m": (1030, 3)},  # more blocks than programs
        {"k": 1100},  # logits beyond a block
    ],
    ids=str,
)
def test_any_shape_and_the_last_value_of_it(shape, backend):
    values = make(**shape)
    spoil_last = (values["states"][-1][0][-1, 3], values["logits"][2])
    for row in spoil_last:
        row[-1] = NAN
    check(values, False, backend)


@on.backends("frame_settle")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_logits_of_any_dtype_and_stride(dtype, backend):
    values = make(dtype=dtype)
    values["logits"] = values["logits"].T.contiguous().T
    spoil(values, 3, NAN)
    check(values, False, backend)


@on.backends("frame_settle")
def test_the_largest_numbers_are_finite(backend):
    values, largest = make(), torch.finfo(torch.float32).max
    values["active"][:] = True
    values["logits"].fill_(-largest)
    for after, _ in values["states"]:
        after.fill_(largest)
    frame_settle(**values, backend=backend)
    assert (values["answer"] == -largest).all() and values["not_finite"].tolist() == [0, 1, 2, 3, 4]


@on.backends("frame_settle")
@pytest.mark.parametrize("states", [1, 2])
def test_opcheck(states, backend):
    values = make(m=(6, 40)[:states])
    pairs = [t for pair in values["states"] for t in pair] + [None] * (4 - 2 * states)
    arguments = (values["logits"], values["active"], *values["frame"], *pairs, values["answer"], values["not_finite"])
    torch.library.opcheck(frame_settle_op, (*arguments, False, backend))


def test_one_sentence_for_what_does_not_fit():
    for change, error, sentence in (
        ({"active": torch.ones(ROWS)}, ValueError, "active must be torch.bool, got torch.float32"),
        ({"answer": torch.empty(ROWS, 1)}, ValueError, r"answer must have shape \(b, k\) = \(5, 7\), got \(5, 1\)"),
        ({"states": []}, NotImplementedError, "one or two pairs of states, got 0"),
        ({"states": [(torch.ones(5, 2), torch.ones(5, 2))]}, ValueError, r"states\[0\] must be \(g, b, m\)"),
        ({"states": [(torch.ones(2, 4, 2), torch.ones(2, 4, 2))]}, ValueError, r"= \(2, 5, 2\), got \(2, 4, 2\)"),
        (
            {"states": [(torch.ones(3, 5, 2).mT.contiguous().mT,) * 2]},
            ValueError,
            "two contiguous tensors of one dtype",
        ),
    ):
        with pytest.raises(error, match=f"frame_settle: .*{sentence}"):
            frame_settle(**(make() | change))
