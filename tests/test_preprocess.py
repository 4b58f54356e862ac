"""One resize and one normalisation: what a stream feeds to the model is what training feeds to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from endomamba.models import create_model
from endomamba.ops import frame_resize
from endomamba.preprocess import IMAGENET_MEAN, IMAGENET_STD, NORMALISATIONS, preprocess, resize

SIZES = [(1080, 1920), (480, 640), (111, 191), (37, 64), (333, 77), (224, 224), (223, 225), (5, 300), (1, 1)]


def frames(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


def composed(x, size, mean, std, dtype=torch.uint8):
    """torch's own resize, written down once more, in uint8 or in floating point; then (x / 255 - mean) / std."""
    x = F.interpolate(x.permute(0, 3, 1, 2).contiguous().to(dtype), size, mode="bilinear", antialias=True)
    return (x.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("stored", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("size", [(224, 224), (112, 96), (256, 256)], ids=lambda size: "x".join(map(str, size)))
def test_it_is_torchs_antialiased_filter_and_a_normalisation(stored, size):
    """To rounding with the uint8 filter.  From the one in floating point it is one of 255 levels away at most: two
    roundings to uint8, one a direction."""
    x = frames(2, *stored)
    for name, norm in NORMALISATIONS.items():
        got = preprocess(x, size, **norm)
        assert got.shape == (2, 3, *size) and got.dtype == torch.float32
        torch.testing.assert_close(got.double(), composed(x, size, **norm), rtol=0, atol=2e-6, msg=name)
        exact = composed(x, size, **norm, dtype=torch.float64)
        assert (got - exact).abs().max() <= 1.01 / 255 / min(norm["std"])


def test_by_hand():
    """Half the size: the triangle of 4 rows, (1, 3, 3, 1) / 8, cut off and scaled up again at the border."""
    row = torch.tensor([0, 80, 160, 240], dtype=torch.uint8)
    x = row.view(4, 1, 1).expand(4, 4, 3)
    small = resize(x, 2)
    assert small[:, 0, 0].tolist() == [round((3 * 0 + 3 * 80 + 160) / 7), round((80 + 3 * 160 + 3 * 240) / 7)]
    white = preprocess(torch.full((1, 2, 2, 3), 255, dtype=torch.uint8), None)
    torch.testing.assert_close(white[0, :, 0, 0], (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD))


@pytest.mark.parametrize("stored", [(480, 640), (111, 191), (64, 35)])
def test_neither_batch_nor_layout_nor_place_in_between_changes_a_bit(stored):
    x = frames(3, *stored)
    all_at_once = preprocess(x, 96)
    assert torch.equal(preprocess(x[1], 96), all_at_once[1])
    assert torch.equal(preprocess(x.view(1, 3, *stored, 3), 96)[0], all_at_once)
    assert torch.equal(preprocess(resize(x, 96), 96), all_at_once)
    planar = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert torch.equal(preprocess(planar, 96), all_at_once)


@pytest.mark.parametrize("size", [(224, 224), (77, 81), (300, 5)], ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("stored", SIZES[1:], ids=lambda size: "x".join(map(str, size)))
def test_other_devices_get_the_same_bits(stored, size):
    """The filter written out in integers, in PyTorch's operators."""
    x = frames(2, *stored)
    assert torch.equal(frame_resize(x, size, backend="reference"), resize(x, size))


def test_other_devices_do_not_ask_the_cpu():
    on_meta = torch.empty(2, 40, 50, 3, dtype=torch.uint8, device="meta")
    assert preprocess(on_meta, 24).shape == (2, 3, 24, 24) and resize(on_meta, 24).device.type == "meta"


def test_same_size_is_no_change_and_no_copy():
    x = frames(2, 56, 64)
    assert resize(x, (56, 64)).data_ptr() == x.data_ptr()
    assert resize(frames(0, 56, 64), 32).shape == (0, 32, 32, 3)


def test_mistakes_are_named():
    for bad in (frames(1, 8, 8).float(), frames(1, 8, 8)[..., :2], frames(1, 8, 8)[0, 0]):
        with pytest.raises(ValueError, match=r"preprocess: frames must be uint8 \(\.\.\., h, w, 3\), got"):
            preprocess(bad)
    with pytest.raises(ValueError, match="resize: sizes must be positive"):
        resize(frames(1, 8, 8), 0)


# ---- the stream and training


@pytest.mark.parametrize(("height", "width"), [(360, 480), (97, 131), (24, 40), (64, 64)])
@pytest.mark.parametrize("codec", ["ffv1", "libx264"])
def test_the_stream_feeds_the_model_what_training_does(tmp_path, monkeypatch, height, width, codec):
    """Training decodes whole pictures and calls `preprocess` on a clip of them; the stream is looked at where the model
    gets its input."""
    pytest.importorskip("av")
    from endomamba.stream import FrameStream, StreamSession
    from endomamba.video import open_video, write_video

    y, x = np.mgrid[0:height, 0:width]
    rough = np.random.default_rng(0).integers(0, 64, (5, height, width, 3))
    pictures = [np.stack([x + 9 * i, y + 3 * i, x + y], -1) % 192 + rough[i] for i in range(5)]
    path = tmp_path / "a.mkv"
    pix_fmt = {"ffv1": "bgr0", "libx264": "yuv444p"}[codec]
    write_video(path, [p.astype(np.uint8) for p in pictures], codec=codec, pix_fmt=pix_fmt)
    with open_video(path) as reader:
        clip = torch.stack([frame.rgb for frame in reader])
    expected = preprocess(clip, 64)

    model = create_model("endomamba", embed_dim=16, depth=2, img_size=64, num_classes=2).eval()
    seen = []
    step_ = model.step_
    monkeypatch.setattr(model, "step_", lambda video, state: (seen.append(video.clone()), step_(video, state))[1])
    for shown in (64, None):  # resized while it is decoded, or by the session
        seen.clear()
        with open_video(path) as reader:
            reader.show(shown)
            StreamSession(FrameStream(model), reader, lambda record: None).run()
        assert len(seen) == 5
        got = torch.cat(seen, 2)[0].movedim(1, 0)
        assert (got - expected).abs().max() <= 1e-3, "the bar"
        assert (got - expected).abs().max() <= 1e-6, "what it is: the same numbers"
