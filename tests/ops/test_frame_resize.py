"""frame_resize: torch's uint8 filter to the bit, from every back end."""

import pytest
import torch
import torch.nn.functional as F

from endomamba.ops import frame_resize
from endomamba.ops.frame_resize.op import frame_resize_op
from endomamba.ops.frame_resize.reference import taps
from tests.ops import backends as on
from tests.ops.backends import DEVICE, INTERPRET, Random

SHAPES = [
    ((37, 64), (24, 20)),  # smaller, two or three rows of tiles
    ((20, 9), (33, 31)),  # larger
    ((30, 50), (30, 3)),  # one side stays
    ((90, 5), (3, 47)),  # more rows under a tile than fit at once; larger the other way, past a block of cells
    ((5, 6), (5, 6)),  # the same
    ((1, 1), (3, 2)),  # the least there is
    ((64, 64), (1, 1)),  # all of it into one
]
REAL = [((1080, 1920), (224, 224)), ((720, 1280), (224, 224)), ((480, 640), (224, 224)), ((100, 90), (224, 224))]


def ids(shapes):
    return "-".join("x".join(map(str, shape)) for shape in shapes)


def pictures(b, h, w, seed=0):
    return Random(seed).randint(256, b, h, w, 3).to(torch.uint8)


def by_torch(x, size):
    """On the CPU, where torch has the filter in integers."""
    planes = x.cpu().contiguous().permute(0, 3, 1, 2)
    small = F.interpolate(planes, size, mode="bilinear", antialias=True, align_corners=False)
    return small.permute(0, 2, 3, 1).to(x.device)


def check(x, size, backend):
    got = frame_resize(x, size, backend=backend)
    assert got.shape == (len(x), *size, 3) and got.dtype == torch.uint8 and got.is_contiguous()
    assert torch.equal(got, by_torch(x, size))


@on.backends("frame_resize")
@pytest.mark.parametrize("shapes", SHAPES, ids=ids)
def test_the_bits_of_torch(shapes, backend):
    (h, w), size = shapes
    check(pictures(2, h, w), size, backend)


@on.too_large_interpreted
@on.backends("frame_resize")
@pytest.mark.parametrize("shapes", REAL, ids=ids)
def test_the_bits_of_torch_at_real_sizes(shapes, backend):
    (h, w), size = shapes
    check(pictures(3 if DEVICE == "cuda" else 1, h, w), size, backend)


@on.backends("frame_resize")
def test_the_largest_sums_do_not_overflow(backend):
    """White, and black beside white: what the rounded weights are too much or too little in sum shows here."""
    for h, w, size in ((50, 47, (11, 13)), (4, 5, (9, 7))):
        white = torch.full((1, h, w, 3), 255, dtype=torch.uint8)
        assert (frame_resize(white, size, backend=backend) == 255).all()
        edges = white.clone()
        edges[:, : h // 2, ::2] = 0
        check(edges, size, backend)


@on.backends("frame_resize")
def test_any_strides(backend):
    x = pictures(3, 21, 18)
    planar = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    for view in (planar, x[:, 3:, 2:16], x[:, ::2], x[1:2].expand(2, -1, -1, -1), x.transpose(1, 2)):
        check(view, (8, 10), backend)


@on.backends("frame_resize")
def test_no_picture_and_a_fresh_result(backend):
    assert frame_resize(pictures(0, 8, 9), (4, 4), backend=backend).shape == (0, 4, 4, 3)
    x = pictures(1, 4, 4)
    same = frame_resize(x, (4, 4), backend=backend)
    assert torch.equal(same, x) and same.data_ptr() != x.data_ptr()


@on.backends("frame_resize")
def test_half_the_size_by_hand(backend):
    """The triangle of 4 rows, (1, 3, 3, 1) / 8, cut off and scaled up again at the border."""
    row = torch.tensor([0, 80, 160, 240], dtype=torch.uint8)
    small = frame_resize(row.view(1, 4, 1, 1).repeat(1, 1, 4, 3), (2, 2), backend=backend)
    by_hand = [round((3 * 0 + 3 * 80 + 160) / 7), round((80 + 3 * 160 + 3 * 240) / 7)]
    assert small[0, :, 1, 2].tolist() == by_hand


def test_tables_stay_where_they_are():
    """A CUDA graph holds their addresses, however many other sizes come after it."""
    device = torch.device("cpu")
    begins, weights, _ = taps(40, 7, device)
    for old in range(8, 300):
        taps(old, 7, device)
    again = taps(40, 7, device)
    assert again[0].data_ptr() == begins.data_ptr() and again[1].data_ptr() == weights.data_ptr()


@on.backends("frame_resize")
def test_opcheck(backend):
    for x in (pictures(2, 9, 7), pictures(1, 4, 5)):
        torch.library.opcheck(frame_resize_op, (x, 4, 5, backend))


@pytest.mark.skipif(INTERPRET, reason="the interpreter has no compiler")
@on.backends("frame_resize")
def test_compiles_whole(backend):
    x = pictures(1, 9, 7)
    compiled = torch.compile(lambda x: frame_resize(x, (4, 5), backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), by_torch(x, (4, 5)))


def test_one_sentence_for_what_does_not_fit():
    x = pictures(1, 8, 8)
    for frames, size, sentence in (
        (x.float(), (4, 4), r"frames must be uint8 \(b, h, w, 3\), got torch.float32 \(1, 8, 8, 3\)"),
        (x[0], (4, 4), r"frames must be uint8 \(b, h, w, 3\), got torch.uint8 \(8, 8, 3\)"),
        (x[..., :2], (4, 4), r"frames must be uint8 \(b, h, w, 3\), got torch.uint8 \(1, 8, 8, 2\)"),
        (x, (0, 4), r"sizes must be positive, got \(8, 8\) to \(0, 4\)"),
        (x[:, :0], (4, 4), r"sizes must be positive, got \(0, 8\) to \(4, 4\)"),
    ):
        with pytest.raises(ValueError, match=f"^frame_resize: {sentence}"):
            frame_resize(frames, size)
    with pytest.raises(ValueError, match="frame_resize: backend must be 'auto' or one of"):
        frame_resize(x, (4, 4), backend="gpu")
