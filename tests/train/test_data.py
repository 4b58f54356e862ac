"""The manifest, frames by their numbers, and clips that depend on nothing but seed, epoch and sample."""

from __future__ import annotations

import json

import pytest
import torch

from endomamba import cli, clips, synthetic
from endomamba.clips import count_frames, read_frames
from endomamba.train import manifest
from endomamba.train.augment import draw as draw_change
from endomamba.train.data import (
    IGNORE,
    ClipConfig,
    ClipDataset,
    collate,
    load,
)
from endomamba.train.manifest import DataError, Entry
from endomamba.train.plan import ClipPlan, Sample, StreamPlan, generator, share
from endomamba.video import VideoError, open_video, write_video

from .common import SIZE, draw, make_data, number


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"), frames=(14, 9, 40, 11))


# ---- frames by their numbers

ENCODERS = {
    "h264-b-frames.mp4": {"codec": "libx264", "gop": 12, "options": {"bf": "3", "crf": "10"}},
    "h264-open-gop.mkv": {
        "codec": "libx264",
        "gop": 8,
        "options": {"bf": "2", "x264-params": "open-gop=1", "crf": "10"},
    },
    "mpeg4.avi": {"codec": "mpeg4", "gop": 6, "options": {"bf": "2", "qscale": "2"}},
    "h264.ts": {"codec": "libx264", "gop": 10, "options": {"crf": "10"}},
    "vp9.webm": {"codec": "libvpx-vp9", "gop": 16, "options": {"cpu-used": "8", "deadline": "realtime"}},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_frames_are_those_of_open_video(tmp_path, name):
    path = tmp_path / name
    pictures = torch.randint(0, 255, (1, 48, 64, 3), dtype=torch.uint8).repeat(45, 1, 1, 1)
    for i, picture in enumerate(pictures):
        picture[:, : i + 5] = 5 * i
    write_video(path, pictures, **ENCODERS[name])
    with open_video(path) as reader:
        all_frames = torch.stack([frame.rgb for frame in reader])
    assert count_frames(path) == len(all_frames) == 45
    for wanted in ([0], [44], [20, 21, 22], [43, 3, 30, 3], range(7, 45, 9)):
        assert torch.equal(read_frames(path, wanted), all_frames[list(wanted)]), wanted
    with pytest.raises(VideoError, match="frame 45"):
        read_frames(path, [45])


def test_frames_of_a_folder(tmp_path):
    from PIL import Image

    for i in range(12):
        Image.new("RGB", (40, 32), (20 * i, 0, 0)).save(tmp_path / f"frame{i}.png")
    frames = read_frames(tmp_path, [11, 2], size=16)
    assert frames.shape == (2, 16, 16, 3) and frames[:, 0, 0, 0].tolist() == [220, 40]
    assert count_frames(tmp_path) == 12


def test_damage_elsewhere_does_not_matter_and_here_is_said(tmp_path):
    draw(tmp_path / "a.mp4", 60, 0)
    raw = bytearray((tmp_path / "a.mp4").read_bytes())
    with open_video(tmp_path / "a.mp4") as reader:
        import av

        packets = [(p.pos, p.size) for p in av.open(str(tmp_path / "a.mp4")).demux() if p.size]
        assert reader.info.frames == 60
    at, size = packets[30]  # gop 6: a keyframe
    raw[at + 5 : at + size] = bytes(size - 5)
    (tmp_path / "b.mp4").write_bytes(raw)
    assert number(read_frames(tmp_path / "b.mp4", [11])[0]) == 11
    assert number(read_frames(tmp_path / "b.mp4", [50])[0]) == 50
    with pytest.raises(VideoError, match=r"b\.mp4"):
        read_frames(tmp_path / "b.mp4", [31])


# ---- the manifest


def test_manifest_round_trip(data):
    listed = manifest.read(data / "phases.jsonl")
    assert listed.classes == ("a", "b") and len(listed.entries) == 4
    assert listed.entries[1].labels().tolist() == [0] * 4 + [1] * 5
    assert manifest.write(data / "copy.jsonl", listed.classes, listed.entries).entries == listed.entries
    assert manifest.digest(listed.entries) != manifest.digest(listed.entries[1:])


@pytest.mark.parametrize(
    "row, why",
    [
        ({"stop": 9, "label": 2}, "label 2 is not one of the 2 classes"),
        ({"stop": 9, "label": [[0, 4], [1, 4]]}, "covers 8 frames, the clip has 9"),
        ({"stop": 9, "label": True}, "label True is not"),
        ({"stop": 0}, "0 <= start < stop"),
        ({"start": -1, "stop": 9}, "0 <= start < stop"),
        ({"stop": "9"}, "frame numbers"),
        ({"stop": 9, "split": "dev"}, "split must be one of train, val, test"),
        ({"stop": 9, "labels": 1}, "unexpected keyword argument 'labels'"),
        ({"stop": 9, "mask": 5}, "mask must be a path"),
        ([], "must be an object"),
        ("{", "is no JSON"),
    ],
)
def test_wrong_lines_are_named(tmp_path, row, why):
    path = tmp_path / "m.jsonl"
    good = {"path": "a.mp4", "start": 0, "stop": 9}
    row = row if isinstance(row, str) else json.dumps({**good, **row} if isinstance(row, dict) else row)
    header = {"kind": "endomamba manifest", "version": 1, "classes": ["a", "b"]}
    path.write_text("\n".join([json.dumps(header), json.dumps(good), row]) + "\n")
    with pytest.raises(DataError, match=why) as error:
        manifest.read(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and "\n" not in str(error.value)


def test_no_manifest(tmp_path):
    for text, why in (("", "first line"), ('{"kind": "x"}\n', "first line"), (None, "No such file")):
        if text is not None:
            (tmp_path / "m.jsonl").write_text(text)
        with pytest.raises(DataError, match=why):
            manifest.read(tmp_path / ("m.jsonl" if text is not None else "gone.jsonl"))
    with pytest.raises(DataError, match="lists no clip"):
        manifest.write(tmp_path / "m.jsonl", ["a", "b"], [])
    with pytest.raises(DataError, match="no clip of split 'test'"):
        manifest.write(tmp_path / "m.jsonl", ["a"], [Entry("a.mp4", 0, 1)]).split("test")


def test_what_synth_wrote_and_check(tmp_path, capsys):
    for split in ("train", "val"):
        synthetic.write(synthetic.SyntheticVideo("base", split=split, seed=1, frames=12, size=32), tmp_path)
    assert cli.main(["data", "manifest", str(tmp_path), "--layout", "synth"]) == 0
    path = tmp_path / "manifest.jsonl"
    assert cli.main(["data", "manifest", str(tmp_path), "--layout", "synth"]) == 2  # there already
    listed = manifest.read(path)
    truth = synthetic.load_truth(tmp_path / listed.entries[0].mask)
    assert listed.entries[0].labels().tolist() == truth.phase.tolist() and listed.classes == tuple(synthetic.PHASES)
    assert cli.main(["data", "check", str(path)]) == 0
    # Each with one thing wrong: cut off, too long, gone, no truth, damaged truth.
    (tmp_path / "cut.mp4").write_bytes((tmp_path / listed.entries[0].path).read_bytes()[:-900])
    (tmp_path / "bad.truth.jsonl").write_text("{}\n")
    good = listed.entries[0].path
    bad = [Entry("cut.mp4", 0, 12), Entry(good, 0, 13), Entry("gone.mp4", 0, 1), Entry(good, 0, 12, mask="gone.jsonl"),
           Entry(good, 0, 12, box="bad.truth.jsonl")]  # fmt: skip
    manifest.write(path, listed.classes, [listed.entries[0], *bad])
    capsys.readouterr()
    assert cli.main(["data", "check", str(path)]) == 3
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in out] == ["ok", "BAD", "BAD", "BAD", "BAD", "BAD", "6"]
    for line, why in zip(out[1:], ("cut.mp4", "holds 12", "does not exist", "gone.jsonl", "not a truth file")):
        assert why in line, line


# ---- clips


def dataset(data, name="phases.jsonl", clip=None, seed=3):
    listed = manifest.read(data / name)
    return ClipDataset(listed, listed.entries, clip or ClipConfig(frames=4), SIZE, seed)


def test_a_clip_holds_the_frames_and_labels_that_it_says(data):
    clips = dataset(data, clip=ClipConfig(frames=4, stride=3))
    seen = set()
    for epoch in range(12):
        item = clips[Sample(2, epoch, 2)]
        numbers = [number(frame) for frame in item["video"].permute(1, 2, 3, 0)]
        assert [n - numbers[0] for n in numbers] == [0, 3, 6, 9]
        assert item["label"].tolist() == clips.entries[2].labels()[numbers].tolist()
        seen.add(numbers[0])
    assert len(seen) > 5 and max(seen) <= 30
    short = clips[Sample(1, 0, 1)]  # 9 frames for a span of 10: the last that it reaches is repeated
    assert [number(frame) for frame in short["video"].permute(1, 2, 3, 0)] == [0, 3, 6, 6]


def test_a_window_behind_the_end_is_ignored(data):
    item = dataset(data)[Sample(1, 0, 0, start=8, fresh=False, tail=True)]
    assert item["label"].tolist() == [1, IGNORE, IGNORE, IGNORE]


AUGMENTED = ClipConfig(frames=3, crop="resized", decode=(36, 44), resize="short", flip=0.5, jitter=0.3)


def test_workers_change_nothing(data):
    clips, plan = dataset(data, clip=AUGMENTED), ClipPlan(4, 2, seed=7, clips_per_entry=2)
    batches = [plan(step) for step in range(5)]
    alone = list(load(clips, batches, 0, False))
    for a, b in zip(alone, load(clips, batches, 2, False)):
        assert all(torch.equal(a[name], b[name]) for name in ("video", "label", "fresh", "key"))
    videos = torch.cat([batch["video"] for batch in alone])
    assert len(videos.flatten(1).unique(dim=0)) == len(videos)
    assert len({int(key) for batch in alone for key in batch["key"]}) == len(videos)


def augment(clip, size, crop, flip, jitter, rng):
    return draw_change(*clip.shape[1:3], size, crop, flip, jitter, 0.0, rng).pictures(clip)


def test_kept_videos_are_the_same_and_leave_when_there_is_no_room(data, monkeypatch):
    listed = manifest.read(data / "phases.jsonl")
    clip = ClipConfig(frames=4, stride=2, decode=(SIZE, SIZE + 8), crop="random", flip=0.5)
    samples = [Sample(i % 3, 0, i) for i in range(6)]
    plain = [ClipDataset(listed, listed.split("train"), clip, SIZE, 0)[sample] for sample in samples]
    one_video = 14 * 3 * (SIZE + 8) ** 2
    for room in (1.0, 1.5 * one_video / 2**30):
        clips._kept.clear()
        kept = ClipDataset(listed, listed.split("train"), clip, SIZE, 0, keep=room)
        for sample, alone in zip(samples, plain):
            again = kept[sample]
            assert all(torch.equal(again[name], alone[name]) for name in ("video", "label"))
        held = sum(video.nbytes for video in clips._kept.values())
        assert (held > one_video) if room == 1.0 else (held <= 1.5 * one_video or len(clips._kept) == 1)
    with monkeypatch.context() as patch:  # what is kept is not read again, but what lies there anew is
        patch.setattr(clips, "read_frames", lambda *_: pytest.fail("the file was read again"))
        kept[samples[-1]]
    kept = ClipDataset(listed, listed.split("train"), ClipConfig(frames=4), SIZE, 0, keep=1.0)
    for hue in (0, 1):  # red, then green
        draw(data / "0.mp4", 14, hue)
        assert float(kept[Sample(0, 0, 0)]["video"][hue, :, :, SIZE // 2 :].float().mean()) > 150
    with pytest.raises(VideoError, match="holds 14"):
        clips.read_kept(data / "0.mp4", [3, 14], SIZE, 0, 2**30)


def test_augmentation_is_the_same_for_all_frames():
    still = torch.randint(0, 255, (1, 40, 48, 3), dtype=torch.uint8).expand(5, -1, -1, -1)
    for crop in ("none", "random", "multi_scale", "resized"):
        out = [augment(still, 32, crop, 0.5, 0.4, generator(seed)) for seed in range(6)]
        assert all(x.shape == (3, 5, 32, 32) and (x == x[:, :1]).all() for x in out)
        assert any(not torch.equal(out[0], other) for other in out[1:])
        assert torch.equal(out[3], augment(still, 32, crop, 0.5, 0.4, generator(3)))


@pytest.mark.parametrize("batch, each", [(4, 1), (3, 2), (7, 1)])
def test_every_clip_once_an_epoch(batch, each):
    plan = ClipPlan(5, batch, seed=1, clips_per_entry=each)
    samples = [sample for step in range(40) for sample in plan(step)]
    size = 5 * each
    orders = [[s.number for s in samples[i : i + size]] for i in range(0, len(samples) - size, size)]
    assert all(sorted(order) == list(range(size)) for order in orders) and orders[0] != orders[1]
    assert [s.epoch for s in samples[: 2 * size]] == [0] * size + [1] * size
    fresh = ClipPlan(5, batch, seed=1, clips_per_entry=each)
    assert [s for step in (33, 2, 39) for s in fresh(step)] == [s for step in (33, 2, 39) for s in plan(step)]


def test_streams_walk_through_whole_videos():
    lengths = [10, 3, 8, 21]
    plan = StreamPlan(lengths, batch_size=2, window=4, seed=0)
    before, walked = None, []
    for step in range(60):
        rows = plan(step)
        for i, row in enumerate(rows):
            assert row.fresh == (row.start == 0)
            if not row.fresh:
                assert row == before[i]._replace(start=before[i].start + 4, fresh=False)
            elif before is not None:
                assert before[i].start + 4 >= lengths[before[i].entry]  # only a finished video is left
            if row.fresh:
                walked.append(row.entry)
        before = rows
    assert sorted(walked[:4]) == sorted(walked[4:8]) == [0, 1, 2, 3]
    assert plan(17) == StreamPlan(lengths, 2, 4, 0)(17) and plan(3) == StreamPlan(lengths, 2, 4, 0)(3)
    assert plan.per_epoch == (3 + 1 + 2 + 6) / 2


def test_shares_are_the_batch_in_order():
    samples = list(range(12))
    parts = [share(samples, rank, 3, part, 2) for rank in range(3) for part in range(2)]
    assert [s for part in parts for s in part] == samples


def test_what_cannot_be_decoded_is_named_and_replaced(tmp_path):
    make_data(tmp_path, frames=(9, 9, 9, 9))
    (tmp_path / "1.mp4").write_bytes((tmp_path / "1.mp4").read_bytes()[:700])
    clips = dataset(tmp_path)
    item = clips[Sample(1, 0, 1)]
    assert len(item["faults"]) == 1 and "1.mp4" in item["faults"][0]
    assert torch.equal(item["video"], clips[Sample(1, 0, 1)]["video"]) and item["video"].any()
    streamed = clips[Sample(1, 0, 1, start=4, fresh=False, tail=True)]
    assert streamed["label"].tolist() == [IGNORE] * 4 and streamed["faults"]
    for name in ("0", "2", "3"):
        (tmp_path / f"{name}.mp4").write_bytes(b"x" * 700)
    batch = collate([clips[Sample(1, 0, 1)]])
    assert "10 clips in a row could not be decoded" in batch["fatal"]


def test_missing_files_are_found_before_the_first_step(tmp_path):
    make_data(tmp_path)
    (tmp_path / "2.mp4").unlink()
    with pytest.raises(DataError, match=r"2\.mp4 does not exist"):
        dataset(tmp_path)


@pytest.mark.parametrize(
    "fields, why",
    [
        ({"frames": -1}, "frames must be"),
        ({"turn": 200}, "turn must be"),
        ({"consistent": 1}, "consistent must be True or False"),
        ({"crop": "centre"}, "crop must be one of"),
        ({"flip": 2}, "flip must be"),
        ({"decode": (64, 32), "crop": "random"}, "decode must be"),
        ({"decode": (32, 64)}, "need a crop"),
        ({"normalise": "none"}, "normalise must be one of"),
    ],
)
def test_wrong_clip_configs(fields, why):
    with pytest.raises(ValueError, match=why):
        ClipConfig(**fields)
