"""frame_embed: tokens of a picture, against the reference and against sums in fp64."""

import importlib
import math

import pytest
import torch

from endomamba.ops import frame_embed
from endomamba.ops.frame_embed import temporal_positions
from endomamba.ops.frame_embed.op import frame_embed_op
from tests.accuracy import assert_as_accurate_as_eager
from tests.ops import backends as on
from tests.ops.backends import DEVICE, DTYPES, HALF, INTERPRET, Random

BASE = {"b": 2, "c": 40, "p": 4, "grid": (3, 5), "cls": True, "form": "packed", "dtype": "fp32", "channels": 3}
ROWS = [
    {},
    {"dtype": HALF},
    {"form": "published"},  # weight as a checkpoint has it
    {"form": "float"},  # normalised before
    {"form": "float", "dtype": HALF},
    {"form": "planar"},  # a picture with its channels apart
    {"form": "crop"},  # a part of a larger picture
    {"cls": False},
    {"b": 1, "grid": (1, 1), "cls": False},  # one token
    {"b": 3, "c": 2},  # fewer channels than a tile has
    {"c": 70, "grid": (6, 7)},  # more than one tile both ways, none of them full
    {"p": 7},  # 147 values: no whole step
    {"p": 16, "grid": (2, 1), "dtype": HALF},  # 768, three steps of the product
    {"p": 16, "grid": (2, 1)},
    {"p": 1, "channels": 1, "form": "float"},
    {"channels": 4},
]
REAL = [
    {"c": 384, "p": 16, "grid": (14, 14), "b": b, "dtype": dtype, "form": form}
    for b, dtype, form in (
        (1, "bf16", "packed"),
        (1, "fp32", "packed"),
        (16, "bf16", "packed"),
        (1, "bf16", "published"),
    )
]


def ids(row):
    return "-".join(f"{k}{v}" for k, v in row.items()) or "base"


def make(row, seed=0):
    """Arguments by name.  scale and shift are such that x * scale + shift has no rounding in fp32."""
    row, random = BASE | row, Random(seed)
    b, c, p, channels, dtype = row["b"], row["c"], row["p"], row["channels"], DTYPES[row["dtype"]]
    rows, columns = row["grid"]
    n = row["cls"] + rows * columns
    weight = (random.randn(c, channels, p, p) / (channels**0.5 * p)).to(dtype)
    if row["form"] != "published":
        weight = weight.to(memory_format=torch.channels_last)
    norm = torch.tensor([1 / 64, 1 / 128, 1 / 64, 1 / 32])[:channels], torch.tensor([-1.5, -1, 0.25, 3])[:channels]
    frames = random.randint(256, b, rows * p, columns * p, channels).to(torch.uint8)
    if row["form"] == "float":
        frames, norm = random.randn(b, channels, rows * p, columns * p).to(dtype), None
    elif row["form"] == "planar":
        frames = frames.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    elif row["form"] == "crop":
        whole = torch.zeros(b, rows * p + 3, columns * p + 5, channels, dtype=torch.uint8)
        whole[:, 2:-1, 1:-4] = frames
        frames = whole[:, 2:-1, 1:-4]
    return {
        "frames": frames,
        "weight": weight,
        "bias": random.randn(c).to(dtype),
        "positions": random.randn(n, c).to(dtype),
        "frame": torch.tensor([7, 2**40 + 3, 0][:b] if b <= 3 else range(b)),
        "cls_token": random.randn(c).to(dtype) if row["cls"] else None,
        "normalisation": norm,
    }


def in_fp64(values):
    """The same call with sums in fp64, of x as it was rounded to weight's dtype."""
    x, dtype, norm = values["frames"], values["weight"].dtype, values["normalisation"]
    if norm is not None:
        x = x.movedim(-1, 1).double() * norm[0].view(-1, 1, 1) + norm[1].view(-1, 1, 1)
    wide = {
        name: None if t is None else t.double() for name, t in values.items() if name not in ("normalisation", "frame")
    }
    wide |= {"frames": x.to(dtype).double(), "frame": values["frame"]}
    return frame_embed(**wide, out_dtype=torch.float64, backend="reference")


def check(values, backend, out_dtype=torch.float32):
    """Against a CPU, whose periods the kernel has: at frame 2^40 their last bit turns the angle by 1e-4."""
    if backend == "reference" and DEVICE != "cpu":
        values = {**values, "frame": values["frame"] % 2**20}
    got = frame_embed(**values, out_dtype=out_dtype, backend=backend)
    values = {name: on_cpu(value) for name, value in values.items()}
    eager = frame_embed(**values, out_dtype=out_dtype, backend="reference")
    assert got.is_contiguous()
    assert_as_accurate_as_eager("tokens", got.cpu(), eager, in_fp64(values))


def on_cpu(value):
    if isinstance(value, tuple):
        return tuple(t.cpu() for t in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value


@on.backends("frame_embed")
@pytest.mark.parametrize("row", ROWS, ids=ids)
def test_one_thing_at_a_time(row, backend):
    check(make(row), backend)


@on.too_large_interpreted
@on.backends("frame_embed")
@pytest.mark.parametrize("row", on.few(REAL, on_gpu=REAL), ids=ids)
def test_frames_of_a_model(row, backend):
    check(make(row), backend)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", range(3))
def test_every_tile_of_the_table(monkeypatch, tile, dtype):
    pytest.importorskip("triton")
    module = importlib.import_module("endomamba.ops.frame_embed.triton_fwd")
    tiles = module.TILES[DTYPES[dtype].itemsize]
    if tile >= len(tiles):
        pytest.skip("there is none")
    monkeypatch.setitem(module.TILES, DTYPES[dtype].itemsize, tiles[tile : tile + 1])
    check(make({"dtype": dtype, "c": 68, "grid": (7, 10)}), "triton")


@on.backends("frame_embed")
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "fp32"])
def test_the_only_rounding_after_the_sums_is_the_last(dtype, backend):
    values = make({"dtype": dtype})
    exact = frame_embed(**values, backend=backend)
    rounded = frame_embed(**values, out_dtype=DTYPES[dtype], backend=backend)
    assert exact.dtype == torch.float32 and torch.equal(rounded, exact.to(DTYPES[dtype]))


@on.backends("frame_embed")
def test_imagenets_normalisation_to_1e_6(backend):
    from endomamba.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalisation

    scale, shift = (t.to(DEVICE) for t in normalisation(IMAGENET_MEAN, IMAGENET_STD))
    values = make({"p": 16, "grid": (2, 2)}) | {"normalisation": (scale, shift)}
    with torch.backends.cudnn.flags(allow_tf32=False):  # of the reference's convolution on a GPU
        got = frame_embed(**values, backend=backend)
    x = values["frames"].movedim(-1, 1).double() / 255
    x = (x - torch.tensor(IMAGENET_MEAN).double().view(3, 1, 1)) / torch.tensor(IMAGENET_STD).double().view(3, 1, 1)
    given = values | {"frames": x.float(), "normalisation": None}
    expected = in_fp64({name: on_cpu(value) for name, value in given.items()}).to(DEVICE)
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


@on.backends("frame_embed")
def test_temporal_positions_at_any_frame(backend):
    """sin and cos of angles in fp64, of frame numbers up to what fp64 holds, far past where a fast sine ends."""
    numbers = [0, 1, 8_191, 104_729, 2**31 + 1, 2**40 + 5, 2**53 - 1]
    if backend == "reference" and DEVICE != "cpu":
        pytest.skip("its periods are those of the device, and turn the largest angles")
    numbers += [11 * 2**bits + i * 377 for bits in (10, 20, 30, 40, 49) for i in range(5)]
    values = make({"b": 1, "c": 48, "cls": True, "grid": (1, 1)})
    for name in ("weight", "bias", "positions", "cls_token"):
        values[name] = torch.zeros_like(values[name])
    values["frames"] = values["frames"].expand(len(numbers), -1, -1, -1)
    tokens = frame_embed(**values | {"frame": torch.tensor(numbers)}, backend=backend)
    expected = temporal_positions(torch.tensor(numbers, device="cpu"), 48).to(DEVICE)
    assert (tokens[:, 0] == 0).all(), "cls has no temporal position"
    assert (tokens[:, 1] - expected).abs().max() <= 1e-7
    near = [f(104_729 / 10_000 ** (2 * i / 48)) for i in range(24) for f in (math.sin, math.cos)]
    assert tokens[3, 1].tolist() == pytest.approx(near, rel=0, abs=1e-7)


@on.backends("frame_embed")
def test_a_stream_has_the_bits_it_has_alone(backend):
    values = make({"b": 3})
    together = frame_embed(**values, backend=backend)
    for i in range(3):
        one = frame_embed(
            **values | {"frames": values["frames"][i : i + 1], "frame": values["frame"][i : i + 1]}, backend=backend
        )
        torch.testing.assert_close(one[0], together[i], rtol=0, atol=2e-6)
    held = frame_embed(**values | {"frame": values["frame"][:1].expand(3)}, backend=backend)
    assert torch.equal(held[0], together[0]) and not torch.equal(held[1], together[1])


@on.backends("frame_embed")
def test_by_hand(backend):
    """One patch of 2 x 2 pixels, two channels of a token."""
    pictures = torch.tensor([[[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]], dtype=torch.uint8)
    weight = torch.zeros(2, 3, 2, 2)
    weight[0, 0, 0, 1], weight[1, 2, 1, 0] = 1.0, 10.0  # red above right, blue below left
    scale, shift = torch.tensor([2.0, 0, 1]), torch.tensor([0.5, 0, -1])
    got = frame_embed(
        pictures, weight, torch.tensor([0.25, 0]), torch.tensor([[5.0, 6], [100, 200]]), torch.tensor([3]),
        cls_token=torch.tensor([1.0, 2]), normalisation=(scale, shift), backend=backend,
    )  # fmt: skip
    patch = [4 * 2 + 0.5 + 0.25 + 100 + math.sin(3), 10 * (9 - 1) + 200 + math.cos(3)]
    assert got[0, 0].tolist() == [6, 8] and got[0, 1].tolist() == pytest.approx(patch, rel=1e-6)


@on.backends("frame_embed")
@pytest.mark.parametrize("row", [{}, {"form": "float"}, {"cls": False}, {"form": "published", "dtype": HALF}], ids=ids)
def test_opcheck(row, backend):
    values = make(row)
    norm = values.pop("normalisation") or (None, None)
    order = [values[name] for name in ("frames", "weight", "bias", "positions", "frame", "cls_token")]
    out_dtype = torch.float32 if row else DTYPES[HALF]
    torch.library.opcheck(frame_embed_op, (*order, *norm, out_dtype, backend))


@pytest.mark.skipif(INTERPRET, reason="the interpreter has no compiler")
@on.backends("frame_embed")
def test_compiles_whole(backend):
    values = make({})
    compiled = torch.compile(lambda v: frame_embed(**v, backend=backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), frame_embed(**values, backend=backend))


@on.backends("frame_embed")
def test_autocast_rounds_the_weight(backend):
    values = make({})
    if INTERPRET:
        pytest.skip("autocast on a CPU is in bf16, which the interpreter has wrong")
    with torch.autocast(DEVICE, torch.bfloat16):
        got = frame_embed(**values, backend=backend)
    expected = frame_embed(**values | {"weight": values["weight"].bfloat16()}, backend=backend)
    assert torch.equal(got, expected) and not torch.equal(got, frame_embed(**values, backend=backend))


@pytest.mark.triton
def test_fp64_is_the_references():
    values = make({})
    for change in ({"weight": values["weight"].double()}, {"out_dtype": torch.float64}):
        with pytest.raises(NotImplementedError, match=r"frame_embed: .*float64"):
            frame_embed(**values | change, backend="triton")


def test_one_sentence_for_what_does_not_fit():
    values = make({})
    frames, weight, norm = values["frames"], values["weight"], values["normalisation"]
    planes = frames.movedim(-1, 1).float()
    for change, sentence in (
        ({"weight": weight.flatten(1)}, r"weight must be \(c, channels, p, p\), got shape \(40, 48\)"),
        ({"weight": weight[..., :2]}, r"weight must have shape \(40, 3, 4, 4\), got \(40, 3, 4, 2\)"),
        ({"weight": weight[:39]}, r"weight must have an even c and p >= 1, got \(39, 3, 4, 4\)"),
        ({"weight": weight.to(torch.int32)}, "weight must be float32, .*got torch.int32"),
        ({"frames": frames[0]}, r"frames must be \(b, channels, h, w\) or uint8 \(b, h, w, channels\), got shape"),
        ({"frames": frames[..., :2]}, r"frames must be uint8 \(b, h, w, 3\), got torch.uint8 \(2, 12, 20, 2\)"),
        (
            {"frames": frames.float()},
            r"frames must be floating point \(b, 3, h, w\), got torch.float32 \(2, 12, 20, 3\)",
        ),
        ({"frames": frames.int()}, r"frames must be floating point \(b, 3, h, w\), got torch.int32"),
        ({"normalisation": None}, r"torch.uint8 frames need normalisation=\(scale, shift\)"),
        ({"frames": planes}, r"torch.float32 frames are normalised and take no normalisation=\(scale, shift\)"),
        ({"frames": frames[:, :0]}, r"frames must have at least one patch, got \(2, 0, 20, 3\)"),
        ({"frames": frames[:, :11]}, r"multiples of the patch size 4, got \(11, 20\)"),
        ({"bias": values["bias"][:3]}, r"bias must have shape \(c,\) = \(40,\), got \(3,\)"),
        ({"positions": values["positions"][1:]}, r"positions must have shape \(n, c\) = \(16, 40\), got \(15, 40\)"),
        ({"cls_token": None}, r"positions must have shape \(n, c\) = \(15, 40\), got \(16, 40\)"),
        ({"cls_token": weight[:1, 0]}, r"cls_token must have shape \(c,\) = \(40,\)"),
        ({"normalisation": (norm[0], norm[1][:2])}, r"shift must be float32 with 3 values, got torch.float32 \(2,\)"),
        ({"normalisation": (norm[0].double(), norm[1])}, "scale must be float32 with 3 values, got torch.float64"),
        ({"frame": values["frame"][:1]}, r"frame must have shape \(b,\) = \(2,\), got \(1,\)"),
        ({"frame": values["frame"].int()}, "frame must be int64, got torch.int32"),
        ({"out_dtype": torch.int32}, "out_dtype must be floating point, got torch.int32"),
        ({"bias": values["bias"].to("meta")}, "bias must be on .* like the first argument, got meta"),
        ({"backend": "gpu"}, "backend must be 'auto' or one of"),
    ):
        with pytest.raises(ValueError, match=f"^frame_embed: .*{sentence}"):
            frame_embed(**values | change)
    with pytest.raises(RuntimeError, match=r"^frame_embed: has no gradient: call it under torch\.inference_mode"):
        frame_embed(**values | {"weight": weight.requires_grad_()})
