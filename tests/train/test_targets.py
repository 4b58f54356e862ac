"""Masks, boxes and landmarks: read as they are, and changed as the pictures are."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from endomamba import cli, synthetic
from endomamba.train import manifest
from endomamba.train.augment import centre, draw
from endomamba.train.data import ClipConfig, ClipDataset
from endomamba.train.listing import run_lengths
from endomamba.train.manifest import DataError, Entry
from endomamba.train.plan import Sample, generator
from endomamba.train.targets import BOXES, IGNORED, read_boxes, read_landmarks, read_masks, read_target
from endomamba.video import write_video

H, W, SIZE = 48, 64, 32


def disc(x, y, radius=6, h=H, w=W):
    """(h, w) bool, and where its middle is from 0 to 1."""
    ys, xs = np.mgrid[:h, :w]
    return (xs - x) ** 2 + (ys - y) ** 2 <= radius**2, ((x + 0.5) / w, (y + 0.5) / h)


WHOLE = centre(SIZE, SIZE, SIZE)


@pytest.mark.parametrize("crop", ["none", "random", "multi_scale", "resized"])
@pytest.mark.parametrize("turn", [0.0, 20.0])
def test_targets_go_where_the_picture_goes(crop, turn):
    """A white disc in the picture, its mask, its box and its middle: after any change they still are the disc's."""
    seen = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        mask, middle = disc(int(rng.integers(10, W - 10)), int(rng.integers(10, H - 10)))
        clip = torch.from_numpy(np.repeat(mask[None, :, :, None] * np.uint8(255), 3, axis=3))
        change = draw(H, W, SIZE, crop, 0.5, 0.0, turn, generator(seed))
        shown = change.pictures(clip)[0, 0] > 127
        moved = change.masks(torch.from_numpy(mask.astype(np.uint8))[None], outside=0)[0] > 0
        union = (shown | moved).sum()
        assert (shown ^ moved).sum() <= 0.25 * union + 4, (seed, change)
        point = change.points(torch.tensor(middle))
        box = change.boxes(torch.from_numpy(read_boxes_of(mask)))
        if shown.sum() < 20:
            continue
        seen += 1
        ys, xs = torch.nonzero(shown, as_tuple=True)
        if xs.min() > 2 and xs.max() < SIZE - 3 and ys.min() > 2 and ys.max() < SIZE - 3:  # not cut off
            found = torch.stack((xs.double().mean() + 0.5, ys.double().mean() + 0.5)) / SIZE
            assert (point - found).abs().max() < 0.03, (seed, change)
        edges = torch.stack((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)) / SIZE
        slack = 0.05 if not turn else 0.2  # the box around a turned box is larger
        assert (box - edges).abs().max() < slack, (seed, box, edges)
    assert seen >= 6


def read_boxes_of(mask):
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([xs[0] / W, ys[0] / H, (xs[-1] + 1) / W, (ys[-1] + 1) / H], np.float32)


def test_masks_at_another_size_than_the_picture():
    """The mask has three times the pixels of the decoded picture: one nearest sampling, of the middle of each pixel."""
    big = torch.arange(9 * SIZE * SIZE).reshape(1, 3 * SIZE, 3 * SIZE)
    assert torch.equal(WHOLE.masks(big, 0)[0], big[0, 1::3, 1::3])
    flipped = draw(SIZE, SIZE, SIZE, "none", 1.0, 0.0, 0.0, generator(0))
    assert torch.equal(flipped.masks(big, 0)[0], big[0, 1::3, 1::3].flip(1))


def test_a_turn_by_hand():
    change = draw(4, 4, 4, "none", 0.0, 0.0, 180.0, generator(0))
    quarter = type(change)(4, 4, (0, 0, 4, 4), 4, turn=90.0)
    # Anticlockwise: what was at the right is on top.
    mask = torch.zeros(1, 4, 4, dtype=torch.uint8)
    mask[0, 1, 3] = 1
    assert torch.nonzero(quarter.masks(mask, 0)[0]).tolist() == [[0, 1]]
    point = quarter.points(torch.tensor([3.5 / 4, 1.5 / 4]))
    torch.testing.assert_close(point, torch.tensor([1.5 / 4, 0.5 / 4]))
    clip = (mask.permute(1, 2, 0) * 255)[None].expand(-1, -1, -1, 3)
    assert torch.nonzero(quarter.pictures(clip)[0, 0] > 127).tolist() == [[0, 1]]
    eighth = type(change)(4, 4, (0, 0, 4, 4), 4, turn=45.0)
    assert eighth.masks(torch.ones(1, 4, 4, dtype=torch.uint8), 0)[0, 0, 0] == 0  # from outside


def test_what_is_cropped_away():
    change = type(WHOLE)(10, 10, (0, 0, 5, 5), 5)  # the left upper quarter
    points = change.points(torch.tensor([[0.25, 0.25], [0.75, 0.25], [0.5, 0.1]]))
    torch.testing.assert_close(points, torch.tensor([[0.5, 0.5], [1.5, 0.5], [1.0, 0.2]]))
    boxes = change.boxes(torch.tensor([[0.4, 0.1, 0.6, 0.2], [0.6, 0.6, 0.8, 0.8], [float("nan")] * 4]))
    torch.testing.assert_close(boxes[0], torch.tensor([0.8, 0.2, 1.0, 0.4]))
    assert boxes[1:].isnan().all()


# ---- files


@pytest.fixture(scope="module")
def synth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth")
    video = synthetic.SyntheticVideo("base", split="train", seed=1, frames=80, size=SIZE)
    movie, lines = synthetic.write(video, folder)
    return folder, movie, lines, synthetic.load_truth(lines)


def test_truth_files(synth):
    _, _, lines, truth = synth
    numbers = [70, 71, 78]
    assert np.array_equal(read_masks(lines, numbers), truth.masks()[numbers])
    marks = read_landmarks(lines, numbers)
    want = truth.landmarks[numbers]
    np.testing.assert_allclose(marks[..., 1:] * SIZE - 0.5, want[..., 1:], atol=1e-4)
    assert np.array_equal(marks[..., 0], want[..., 0])
    shown = next(t for t in range(80) if truth.polyps[t])
    boxes = read_boxes(lines, [shown])[0]
    np.testing.assert_allclose(boxes[0] * SIZE, truth.polyps[shown][0].box)
    assert boxes.shape == (BOXES, 4) and np.isnan(boxes[len(truth.polyps[shown]) :]).all()
    repeated = read_target("landmarks", lines, [3, 3, 2], WHOLE)
    np.testing.assert_allclose(repeated, np.concatenate([read_landmarks(lines, [n]) for n in (3, 3, 2)]))


def make_pictures(folder, masks, bright=255):
    from PIL import Image

    folder.mkdir()
    for i, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * bright).save(folder / f"mask{i}.png")


def test_folders_of_masks_and_places(tmp_path):
    masks = [disc(10 + 3 * i, 20)[0] for i in range(12)] + [np.zeros((H, W), bool)]
    make_pictures(tmp_path / "masks", masks)
    got = read_masks(tmp_path / "masks", [2, 10, 12])  # mask2 before mask10
    assert np.array_equal(got, np.stack([masks[2], masks[10], masks[12]]))
    boxes = read_boxes(tmp_path / "masks", [2, 12])
    np.testing.assert_allclose(boxes[0, 0], read_boxes_of(masks[2]))
    assert np.isnan(boxes[0, 1:]).all() and np.isnan(boxes[1]).all()
    path = tmp_path / "own.places.jsonl"
    header = {"kind": "endomamba places", "size": [H, W], "landmarks": ["tip", "papilla"]}
    rows = [{"frame": 3, "landmarks": [[1, 31.5, 23.5], [0, 0, 0]], "boxes": [[0, 0, 8, 8], [0, 0, 32, 24]]}]
    path.write_text("\n".join(json.dumps(row) for row in [header, *rows]))
    marks = read_landmarks(path, [2, 3])
    assert (marks[0, :, 0] == 0).all() and marks[1, 0].tolist() == [1, 0.5, 0.5] and np.isnan(marks[1, 1, 1])
    assert read_boxes(path, [3])[0, :2].tolist() == [[0, 0, 0.5, 0.5], [0, 0, 0.125, pytest.approx(8 / H)]]
    for text, why in (("{}", "header of kind"), (json.dumps(header) + '\n{"frame": 1, "landmarks": [[1, 2, 3]]}',
                      "frame 1 must have 2 landmarks"), ("x", "is no list of places")):  # fmt: skip
        path.write_text(text)
        with pytest.raises(DataError, match=why):
            read_landmarks(path, [3])
    with pytest.raises(DataError, match="masks are read from"):
        read_masks(path, [3])


# ---- clips


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A white disc that moves over a black video, and its masks."""
    folder = tmp_path_factory.mktemp("clips")
    masks = [disc(10 + 2 * i, 14 + i)[0] for i in range(20)]
    write_video(folder / "a.mp4", [np.repeat(m[:, :, None] * np.uint8(235), 3, 2) for m in masks],
                options={"crf": "5"})  # fmt: skip
    make_pictures(folder / "masks", masks)
    entry = Entry("a.mp4", 0, 20, 0, mask="masks", box="masks")
    manifest.write(folder / "m.jsonl", ["a", "b"], [entry])
    return folder, manifest.read(folder / "m.jsonl")


@pytest.mark.parametrize("fields", [{}, {"consistent": False}, {"stretch": True}], ids=str)
def test_clips_with_masks(clips, fields):
    _, listed = clips
    config = ClipConfig(frames=6, decode=(36, 44), crop="random", flip=0.5, turn=10, jitter=0.2, **fields)
    data = ClipDataset(listed, listed.entries, config, SIZE, 0, ("mask", "box"))
    worst = 0.0
    for number in range(8):
        item = data[Sample(0, 0, number)]
        assert item["mask"].dtype == torch.uint8 and item["box"].shape == (6, BOXES, 4)
        shown, mask = item["video"].float().mean(0) > 127, item["mask"] > 0
        worst = max(worst, float((shown ^ mask).sum() / (shown | mask).sum().clamp(min=30)))
        assert torch.equal(item["mask"], data[Sample(0, 0, number)]["mask"])
    assert worst < 0.3
    still = ClipDataset(listed, [Entry("a.mp4", 5, 6, 0, mask="masks")], config, SIZE, 0, ("mask",))
    frames = still[Sample(0, 0, 3)]["mask"]
    assert len(frames.flatten(1).unique(dim=0)) == (1 if config.consistent else 6)


def test_whole_entries_and_what_is_behind_them(clips):
    _, listed = clips
    short = [Entry("a.mp4", 4, 9, 0, mask="masks"), Entry("a.mp4", 2, 20, 0, mask="masks")]
    data = ClipDataset(listed, short, ClipConfig(frames=0), SIZE, 0, ("mask",))
    assert [data[Sample(i, 0, i)]["mask"].shape[0] for i in (0, 1)] == [5, 18]
    window = ClipDataset(listed, short, ClipConfig(frames=4), SIZE, 0, ("mask",))
    item = window[Sample(0, 0, 0, start=4, fresh=False, tail=True)]
    assert (item["mask"][0] < 2).all() and (item["mask"][1:] == IGNORED).all()
    assert torch.equal(item["mask"][0], data[Sample(0, 0, 0)]["mask"][4])


def test_steps_of_random_length(clips):
    _, listed = clips
    data = ClipDataset(listed, listed.entries, ClipConfig(frames=5, most_stride=3), SIZE, 0, ("box",))
    rows = [data[Sample(0, 0, number)]["box"][:, 0, 0] * W for number in range(12)]
    steps = torch.stack([row.diff() / 2 for row in rows])  # the disc moves by 2 pixels a frame
    assert set(steps.round().int().flatten().tolist()) == {1, 2, 3}
    data.train = False
    assert (data[Sample(0, 0, 0, start=0)]["box"][:, 0, 0].diff() * W / 2).round().tolist() == [1] * 4
    with pytest.raises(ValueError, match="most_stride must be at least stride"):
        ClipConfig(stride=4, most_stride=3)


def test_evaluation_of_the_whole_picture(clips):
    _, listed = clips
    config = ClipConfig(frames=2, decode=(40, 40), crop="random")
    whole = ClipDataset(listed, listed.entries, replace(config, centre=False), SIZE, 0, ("mask",))
    middle = ClipDataset(listed, listed.entries, config, SIZE, 0, ("mask",))
    whole.train = middle.train = False
    a, b = (data[Sample(0, 0, 0, start=0)]["mask"] for data in (whole, middle))
    want = torch.from_numpy(read_masks(listed.file("masks"), [0, 1]))
    assert torch.equal(a, WHOLE.masks(want, 0)) and not torch.equal(a, b)


def test_missing_and_damaged_targets(clips, synth, tmp_path):
    _, listed = clips
    bare = [Entry("a.mp4", 0, 20, 0)]
    with pytest.raises(DataError, match=r"a\.mp4\[0:20\] names no file for mask"):
        ClipDataset(listed, bare, ClipConfig(), SIZE, 0, ("mask",))
    with pytest.raises(DataError, match="gone does not exist"):
        ClipDataset(listed, [Entry("a.mp4", 0, 20, 0, mask="gone")], ClipConfig(), SIZE, 0, ("mask",))
    _, movie, lines, _ = synth
    (tmp_path / "x.truth.jsonl").write_text(lines.read_text()[:-400])
    own = manifest.write(tmp_path / "m.jsonl", ["a", "b"], [Entry(str(movie), 0, 80, 0, landmarks="x.truth.jsonl")])
    data = ClipDataset(own, own.entries, ClipConfig(frames=4), SIZE, 0, ("landmarks",))
    assert "x.truth.jsonl" in data[Sample(0, 0, 0, start=76)]["fatal"]
    assert data[Sample(0, 0, 0, start=0)]["landmarks"].shape == (4, 6, 3)


def test_check_looks_at_targets(clips, synth, capsys):
    folder, listed = clips
    good = listed.entries[0]
    make_pictures(folder / "few", [np.zeros((H, W))] * 3)
    make_pictures(folder / "torn", [np.zeros((H, W))] * 20)
    (folder / "torn" / "mask7.png").write_bytes(b"no picture")
    (folder / "x.places.jsonl").write_text("{}\n")
    make_pictures(folder / "ones", [np.ones((H, W))] * 20, bright=1)
    header = '{"kind": "endomamba places", "size": [48, 64], "landmarks": ["tip"]}'
    (folder / "word.places.jsonl").write_text(header + '\n{"frame": 0, "landmarks": [["yes", 1, 1]]}\n')
    bad = {"ones": "what is brighter than 127 of 255 is marked, its masks hold 1 at most",
           "word.places.jsonl": "is no list of places",
           "few": "few holds 3 masks, the video 20 frames", "torn": "mask7.png could not be read",
           "x.places.jsonl": "is no list of places"}  # fmt: skip
    entries = [good, *(Entry("a.mp4", 0, 20, mask=name) for name in bad)]
    path = manifest.write(folder / "bad.jsonl", ["a", "b"], entries).path
    assert cli.main(["data", "check", str(path)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", *["BAD"] * 5, "6"]
    for line, why in zip(lines[1:], bad.values()):
        assert why in line, line


def test_runs_of_unknown_frames():
    assert run_lengths(np.array([-1, -1, 2, 2, 0, -1])) == ((None, 2), (2, 2), (0, 1), (None, 1))
