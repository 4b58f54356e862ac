"""Manifests of small folders that are laid out as data sets are published."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from endomamba import cli, synthetic
from endomamba.train import layouts, manifest, published
from endomamba.train.layouts import LAYOUTS
from endomamba.train.listing import videos_in
from endomamba.train.manifest import UNKNOWN, DataError, Entry

from .common import draw


def pictures(folder, count, first=0, suffix="png", digits=6):
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(first, first + count):
        Image.new("RGB", (16, 16), (i % 256, 0, 0)).save(folder / f"{i:0{digits}d}.{suffix}")


def listed(folder, layout):
    """The manifest that the command writes, read back."""
    assert cli.main(["data", "manifest", str(folder), "--layout", layout, "--overwrite"]) == 0
    return manifest.read(folder / "manifest.jsonl")


def test_plain_folders_and_lists(tmp_path):
    for split, label in (("train", "normal"), ("train", "polyp"), ("val", "polyp")):
        (tmp_path / "f" / split / label).mkdir(parents=True)
        draw(tmp_path / "f" / split / label / "a.mp4", 6, 0)
    classes, entries = layouts.from_folders(tmp_path / "f")
    assert classes == ("normal", "polyp") and [e.label for e in entries] == [0, 1, 1]
    assert entries[2] == Entry("val/polyp/a.mp4", 0, 6, 1, split="val")

    (tmp_path / "l" / "splits").mkdir(parents=True)
    (tmp_path / "l" / "videos").mkdir()
    draw(tmp_path / "l" / "videos" / "x.mp4", 5, 0)
    (tmp_path / "l" / "splits" / "train.txt").write_text("x.mp4,1\n")
    assert layouts.from_lists(tmp_path / "l") == (("class 0", "class 1"), [Entry("videos/x.mp4", 0, 5, 1)])
    (tmp_path / "l" / "videos" / "._x.mp4").write_bytes(b"what some systems leave beside a file")
    assert [path.name for path in videos_in(tmp_path / "l" / "videos")] == ["x.mp4"]
    (tmp_path / "l" / "splits" / "train.txt").write_text("\ufeffx.mp4,1\n\n", encoding="utf-8")
    assert len(layouts.from_lists(tmp_path / "l")[1]) == 1
    (tmp_path / "l" / "splits" / "train.csv").write_text("x.mp4,1\n")
    with pytest.raises(DataError, match=r"train\.csv: stands beside train\.txt"):
        layouts.from_lists(tmp_path / "l")  # or each clip would be there twice
    (tmp_path / "l" / "splits" / "train.csv").unlink()
    for outside in ("/x.mp4", "../../f/val/polyp/a.mp4"):
        (tmp_path / "l" / "splits" / "train.txt").write_text(f"{outside},1\n")
        with pytest.raises(DataError, match="must name files below it"):
            layouts.from_lists(tmp_path / "l")
    (tmp_path / "l" / "splits" / "train.txt").write_text("x.mp4,yes\n")
    with pytest.raises(DataError, match="line 1: must be `file,label`"):
        layouts.from_lists(tmp_path / "l")
    for converter, why in zip(
        (layouts.from_synthetic, layouts.from_folders, layouts.from_lists), ("truth", "sub-folders", "splits/train")
    ):
        with pytest.raises(DataError, match=why):
            converter(tmp_path / "l" / "videos")
        with pytest.raises(DataError, match="is not a folder"):
            converter(tmp_path / "gone")


def test_pretraining_lists(tmp_path):
    for name in ("SetA/x", "SetB"):
        (tmp_path / name).mkdir(parents=True)
    draw(tmp_path / "SetA" / "x" / "a b.mp4", 5, 0)
    draw(tmp_path / "SetB" / "c.mp4", 6, 0)
    (tmp_path / "SetA" / "train_list.txt").write_text("x/a b.mp4 0\n\n")
    (tmp_path / "SetB" / "train.csv").write_text("c.mp4,-1\n")
    got = listed(tmp_path, "pretraining")
    assert got.entries == (Entry("SetA/x/a b.mp4", 0, 5), Entry("SetB/c.mp4", 0, 6)) and got.classes == ()
    (tmp_path / "SetB" / "train.csv").write_text("c.mp4\n")
    with pytest.raises(DataError, match=r"train\.csv, line 1: must be a file and a number"):
        layouts.from_pretraining(tmp_path)


def test_types_of_polyps(tmp_path):
    synthetic.write(synthetic.SyntheticVideo("base", split="test", seed=1, frames=130, size=32), tmp_path)
    got = listed(tmp_path, "synth-polyps")
    assert got.classes == ("no polyp", "sessile", "pedunculated", "flat")
    assert {e.split for e in got.entries} == {"test"} and {e.label > 0 for e in got.entries} == {True, False}
    for entry in got.entries:
        truth = synthetic.load_truth(tmp_path / entry.mask, entry.start, entry.stop)
        kinds = [polyp.kind for polyps in truth.polyps for polyp in polyps]
        assert set(kinds) == ({got.classes[entry.label]} if entry.label else set())
        assert len(entry) == 16 and (not kinds or sum(map(bool, truth.polyps)) >= 8)


@pytest.fixture(scope="module")
def cvc(tmp_path_factory):
    from PIL import Image

    root = tmp_path_factory.mktemp("cvc")
    for part in ("Original", "Ground Truth"):
        (root / "CVC-ClinicDB" / part).mkdir(parents=True)
        for i in range(1, 613):
            Image.new("L", (4, 4), i % 256).save(root / "CVC-ClinicDB" / part / f"{i}.tif")
    return root


def test_cvc_as_published_and_without_leaks(cvc):
    paper, clean = listed(cvc, "cvc"), listed(cvc, "cvc-clean")
    frames = {
        name: {
            split: [t for entry in got.entries if entry.split == split for t in range(entry.start, entry.stop)]
            for split in manifest.SPLITS
        }
        for name, got in (("published", paper), ("clean", clean))
    }
    assert [len(frames["published"][split]) for split in manifest.SPLITS] == [401, 171, 171]
    assert len(set(frames["published"]["train"]) & set(frames["published"]["test"])) == 121
    assert len(set(frames["published"]["test"]) - set(frames["published"]["train"])) == 50
    parts = frames["clean"]
    assert parts["test"] == frames["published"]["test"]
    together = [t for split in manifest.SPLITS for t in parts[split]]
    assert len(set(together)) == len(together)  # no frame twice
    assert set(parts["train"] + parts["val"]) == set(frames["published"]["train"]) - set(parts["test"])
    # Videos are cut where the lists of the data set cut them, so no video is in two splits either.
    edges = {(first - 1, first - 1 + count) for first, count in published.CVC_TRAIN + published.CVC_TEST}
    assert all((entry.start, entry.stop) in edges for entry in clean.entries)
    # Frame i of an entry is picture i + 1: natural order, 2.tif before 10.tif.
    from endomamba.clips import read_frames

    first = paper.entries[0]
    shown = read_frames(cvc / first.path, [first.start])[0, 0, 0, 0]
    assert int(shown) == 104 % 256 and first.mask.endswith("Ground Truth") and first.box == first.mask


def test_cvc_needs_every_picture(cvc, tmp_path):
    (tmp_path / "Original").mkdir()
    (tmp_path / "Ground Truth").mkdir()
    for i in range(1, 612):
        (tmp_path / "Original" / f"{i}.tif").write_bytes(b"")
    with pytest.raises(DataError, match=r"612\.tif is missing"):
        published.from_cvc(tmp_path)


def annotation(path, phases, per=25):
    """phases: names, each for one second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{per * i + j}\t{phase}" for i, phase in enumerate(phases) for j in range(per)]
    path.write_text("Frame\tPhase\n" + "\n".join(lines) + "\n")


def test_cholec80(tmp_path):
    for name, of in (("video01", published.CHOLEC80[:2]), ("video41", published.CHOLEC80[5:])):
        annotation(tmp_path / "phase_annotations" / f"{name}-phase.txt", of)
    pictures(tmp_path / "frames" / "video01", 2, digits=5)
    (tmp_path / "videos").mkdir()
    draw(tmp_path / "videos" / "video41.mp4", 48, 0)  # two frames less than are labelled
    got = listed(tmp_path, "cholec80")
    assert got.classes == published.CHOLEC80
    assert got.entries == (
        Entry("frames/video01", 0, 2, ((0, 1), (1, 1))),
        Entry("videos/video41.mp4", 0, 48, ((5, 25), (6, 23)), split="test"),
    )
    annotation(tmp_path / "phase_annotations" / "video02-phase.txt", ["Lunch"])
    with pytest.raises(DataError, match=r"video02-phase\.txt, line 2: must be a frame and one of Preparation"):
        published.from_cholec80(tmp_path)
    annotation(tmp_path / "phase_annotations" / "video02-phase.txt", published.CHOLEC80)
    with pytest.raises(DataError, match="there is no video02 in"):
        published.from_cholec80(tmp_path)
    pictures(tmp_path / "frames" / "video02", 60)
    with pytest.raises(DataError, match="holds 60 frames, there are labels for 7"):
        published.from_cholec80(tmp_path)


def test_m2cai16(tmp_path):
    annotation(tmp_path / "train_dataset" / "workflow_video_01.txt", published.M2CAI16[:2])
    annotation(tmp_path / "test_dataset" / "test_workflow_video_01.txt", published.M2CAI16[7:])
    (tmp_path / "train_dataset" / "workflow_video_01_timestamp.txt").write_text("0 00:00\n")
    draw(tmp_path / "train_dataset" / "workflow_video_01.mp4", 50, 0)
    pictures(tmp_path / "frames" / "test_workflow_video_01", 1)
    got = listed(tmp_path, "m2cai16")
    assert got.classes == published.M2CAI16 and len(published.M2CAI16) == 8
    assert got.entries == (
        Entry("train_dataset/workflow_video_01.mp4", 0, 50, ((0, 25), (1, 25))),
        Entry("frames/test_workflow_video_01", 0, 1, ((7, 1),), split="test"),
    )


def test_autolaparo(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "label_01.txt").write_text("Frame\tPhase\n00001\t1\n00002\t1\n00003\t7\n")
    pictures(tmp_path / "frames_resized" / "01", 3, first=1, suffix="jpg", digits=5)
    rows = {"11": [{"unique_id": i, "phase_gt": i // 2, "phase_name": "x"} for i in range(4)],
            "15": [{"phase_gt": 3}]}  # fmt: skip
    (tmp_path / "labels_pkl" / "val").mkdir(parents=True)
    (tmp_path / "labels_pkl" / "val" / "1fpsval.pickle").write_bytes(pickle.dumps(rows))
    pictures(tmp_path / "frames_resized" / "11", 4, first=1, suffix="jpg", digits=5)
    (tmp_path / "videos").mkdir()
    draw(tmp_path / "videos" / "15.mp4", 24, 0)
    got = listed(tmp_path, "autolaparo")
    assert got.classes == published.AUTOLAPARO
    assert got.entries == (
        Entry("frames_resized/01", 0, 3, ((0, 2), (6, 1))),
        Entry("frames_resized/11", 0, 4, ((0, 2), (1, 2)), split="val"),
        Entry("videos/15.mp4", 0, 24, ((3, 24),), split="test"),
    )
    (tmp_path / "labels_pkl" / "val" / "1fpsval.pickle").write_bytes(pickle.dumps({"11": np.ones(3)}))
    with pytest.raises(DataError, match="not loaded because it could run code"):
        published.from_autolaparo(tmp_path)


def test_ophnet(tmp_path):
    (tmp_path / "annotation").mkdir()
    (tmp_path / "OphNet2024_all").mkdir()
    draw(tmp_path / "OphNet2024_all" / "case_0002.mp4", 30, 0)  # 25 a second
    head = "video_id,start,end,split,surgery_id,phase_id"
    rows = ["case_0002,0,0.4,val,5,3", "case_0002,0.8,1.2,val,0,6"]
    (tmp_path / "annotation" / "OphNet2024_loca_challenge_phase.csv").write_text("\n".join([head, *rows]) + "\n")
    got = listed(tmp_path, "ophnet")
    assert got.classes == ("phase 3", "phase 6")
    (entry,) = got.entries
    assert entry.split == "val" and entry.label == ((0, 10), (None, 10), (1, 10))
    assert entry.labels().tolist() == [0] * 10 + [UNKNOWN] * 10 + [1] * 10
    clip = tmp_path / "OphNet2024_trimmed_phase" / "case_0002" / "case_0002_0.mp4"
    clip.parent.mkdir(parents=True)
    draw(clip, 9, 0)
    trimmed = f"{head},segment_path\n{rows[1]},./{clip.relative_to(tmp_path)}\n"
    (tmp_path / "annotation" / "OphNet2024_loca_challenge_phase_trimmed.csv").write_text(trimmed)
    got = listed(tmp_path, "ophnet-trimmed")
    assert got.classes == ("phase 6",) and got.entries[0].label == 0 and len(got.entries[0]) == 9
    (tmp_path / "annotation" / "OphNet2024_loca_challenge_phase.csv").write_text("video_id,start\n")
    with pytest.raises(DataError, match="its columns must hold end, phase_id, split"):
        published.from_ophnet(tmp_path)


def test_cholect50(tmp_path):
    names = {str(i): f"tool{i},verb,target" for i in range(5)}
    for name, frames in (("VID01", {"0": [[3] + [0] * 14, [1] + [0] * 14], "1": [[1] + [0] * 14, [3] + [0] * 14],
                                    "2": [[-1] + [0] * 14]}), ("VID111", {"0": []})):  # fmt: skip
        content = {"video": 1, "fps": 1, "num_frames": len(frames), "categories": {"triplet": names}}
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "labels" / f"{name}.json").write_text(json.dumps({**content, "annotations": frames}))
        pictures(tmp_path / "videos" / name, len(frames))
    got = listed(tmp_path, "cholect50")
    assert got.classes == tuple(names.values())
    assert got.entries == (
        Entry("videos/VID01", 0, 3, (((1, 3), 2), ((), 1))),
        Entry("videos/VID111", 0, 1, (((), 1),), split="test"),
    )
    assert got.entries[0].label_sets(5).tolist() == [[0, 1, 0, 1, 0]] * 2 + [[0] * 5]
    pictures(tmp_path / "more", 3)
    (tmp_path / "more").rename(tmp_path / "videos" / "VID112")
    (tmp_path / "labels" / "VID111.json").rename(tmp_path / "labels" / "VID112.json")
    with pytest.raises(DataError, match="VID112: holds 3 frames, there are labels for 1"):
        published.from_cholect50(tmp_path)
    (tmp_path / "labels" / "VID01.json").write_text("{}")
    with pytest.raises(DataError, match=r"VID01\.json: is no list of triplets \(KeyError"):
        published.from_cholect50(tmp_path)


def test_surgical_actions(tmp_path):
    for action in ("cutting", "suturing"):
        (tmp_path / action).mkdir()
        for i in range(5):
            draw(tmp_path / action / f"{i}.mp4", 4, i)
    got = listed(tmp_path, "surgical-actions160")
    assert got.classes == ("cutting", "suturing") and len(got.entries) == 10
    assert [entry.path for entry in got.entries if entry.split == "test"] == ["cutting/3.mp4", "suturing/3.mp4"]


def test_every_layout_refuses_an_empty_folder(tmp_path, capsys):
    for name, layout in LAYOUTS.items():
        with pytest.raises(DataError, match=str(tmp_path)):
            layout.convert(tmp_path)
        with pytest.raises(DataError, match="is not a folder"):
            layout.convert(tmp_path / "gone")
        assert layout.what, name
    for name in ("../up", "", "a/b"):
        assert cli.main(["data", "manifest", str(tmp_path), "--layout", "folders", "--name", name]) == 2
        assert "--name must be a name without a folder" in capsys.readouterr().err
    assert cli.main(["data", "manifest", str(tmp_path), "--layout", "x"]) == 2
    said = capsys.readouterr().err
    assert all(name in said for name in LAYOUTS)
