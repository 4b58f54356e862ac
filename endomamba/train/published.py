"""From folders as data sets are published to lists of clips; layouts.py has their names.

They were read from the data sets' own descriptions and loaders; none of the data could be had where this was written,
so tests build small folders of the same layout.

    PolypDiag           github.com/med-air/Endo-FM
    CVC-ClinicDB        polyp.grand-challenge.org/CVCClinicDB, as cut into videos by github.com/med-air/Endo-FM
    Cholec80, M2CAI16   camma.unistra.fr/datasets
    AutoLaparo          autolaparo.github.io
    CholecT50           github.com/CAMMA-public/cholect50
    OphNet              github.com/minghu0830/OphNet-benchmark
    SurgicalActions160  ftp.itec.aau.at/datasets/SurgicalActions160
"""

from __future__ import annotations

import csv
import itertools
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..sources import open_source
from .errors import DataError
from .listing import (
    Folder,
    Listed,
    at_least_one,
    frames_of,
    last_number,
    open_folder,
    read_rows,
    run_lengths,
    videos_in,
    whole_clip,
)
from .manifest import Entry

CHOLEC80 = ("Preparation", "CalotTriangleDissection", "ClippingCutting", "GallbladderDissection",
            "GallbladderPackaging", "CleaningCoagulation", "GallbladderRetraction")  # fmt: skip
M2CAI16 = ("TrocarPlacement", *CHOLEC80)
AUTOLAPARO = ("Preparation", "Dividing Ligament and Peritoneum", "Dividing Uterine Vessels and Ligament",
              "Transecting the Vagina", "Specimen Removal", "Suturing", "Washing")  # fmt: skip
# Frames of CVC-ClinicDB that are one video: the first and how many; the published lists.
CVC_TRAIN = ((104, 23), (529, 18), (448, 19), (26, 25), (343, 21), (178, 22), (429, 19), (200, 6), (127, 25), (253, 25),
             (364, 20), (592, 21), (228, 25), (68, 11), (467, 12), (206, 22), (79, 25), (479, 25), (51, 17),
             (572, 20))  # fmt: skip
CVC_TEST = ((51, 17), (318, 25), (429, 19), (1, 25), (178, 22), (253, 25), (343, 21), (68, 11), (200, 6))
# The published split of CholecT50 in its first paper; the rest is for training.
CHOLECT50 = {"val": (8, 12, 29, 50, 78), "test": (6, 51, 10, 73, 14, 74, 32, 80, 42, 111)}
FPS = 25  # of the videos of Cholec80 and M2CAI16, at which their phases are written down


# ---- masks


def from_cvc(folder: Folder) -> Listed:
    """folder/CVC-ClinicDB/{Original,Ground Truth}/N.tif in the published videos and split.

    Of its 9 test videos 7 are in train too: for comparison with published numbers alone.
    """
    return _cvc(folder, {"train": CVC_TRAIN, "val": CVC_TEST, "test": CVC_TEST})


def from_cvc_clean(folder: Folder) -> Listed:
    """The same frames, no video in two splits: the published test videos, and of the published training videos those
    that are not among them, every fifth of these for validation."""
    rest = [video for video in CVC_TRAIN if video not in CVC_TEST]
    train = [video for i, video in enumerate(rest) if i % 5 != 4]
    return _cvc(folder, {"train": train, "val": rest[4::5], "test": CVC_TEST})


def _cvc(folder: Folder, splits: dict[str, Sequence[tuple[int, int]]]) -> Listed:
    root = open_folder(folder)
    base = root if (root / "Original").is_dir() else root / "CVC-ClinicDB"
    pictures, masks = base / "Original", base / "Ground Truth"
    names = {part: sorted((path.stem for path in part.glob("*.tif")), key=last_number) for part in (pictures, masks)}
    wanted = [str(number) for number in range(1, 613)]
    for part, found in names.items():
        lacking = sorted(set(wanted) - set(found), key=int)
        if lacking or len(found) != len(wanted):
            raise DataError(
                f"{part}: must hold 1.tif to 612.tif and nothing else, "
                + (f"{lacking[0]}.tif is missing" if lacking else f"it holds {len(found)} pictures")
            )
    path, mask = (part.relative_to(root).as_posix() for part in (pictures, masks))
    entries = [
        Entry(path, first - 1, first - 1 + count, mask=mask, box=mask, split=split)
        for split, videos in splits.items()
        for first, count in videos
    ]
    return ("background", "polyp"), entries


# ---- phases


def from_cholec80(folder: Folder) -> Listed:
    """folder/phase_annotations/videoNN-phase.txt, 25 lines a second, with folder/frames/videoNN/, one picture a second,
    or folder/videos/videoNN.mp4; the first 40 for training, the others for the test."""
    root = open_folder(folder)
    entries = []
    for path in sorted((root / "phase_annotations").glob("video*-phase.txt")):
        name = path.name.removesuffix("-phase.txt")
        split = "train" if last_number(name) <= 40 else "test"
        entries.append(_phases(root, name, path, CHOLEC80, split, ("frames", "videos")))
    return CHOLEC80, at_least_one(entries, root, "phase_annotations/videoNN-phase.txt")


def from_m2cai16(folder: Folder) -> Listed:
    """folder/{train,test}_dataset/workflow_video_NN.txt, 25 lines a second, the videos beside them, or folder/frames/
    workflow_video_NN/ with one picture a second."""
    root, entries = open_folder(folder), []
    for split in ("train", "test"):
        part = f"{split}_dataset"
        for path in sorted((root / part).glob("*.txt")):
            if not path.stem.endswith(("_timestamp", "_pred")):
                entries.append(_phases(root, path.stem, path, M2CAI16, split, ("frames", part)))
    return M2CAI16, at_least_one(entries, root, "train_dataset/*.txt")


def _phases(root: Path, name: str, path: Path, classes: tuple[str, ...], split: str, places: Sequence[str]) -> Entry:
    """A video whose phases are written down as `frame<tab>phase` 25 times a second."""
    labels: list[int] = []
    for number, row in enumerate(read_rows(path, "\t")[1:], 2):
        if len(row) != 2 or row[1] not in classes or not row[0].isdecimal():
            raise DataError(f"{path}, line {number}: must be a frame and one of {', '.join(classes)}, got {row}")
        labels.append(classes.index(row[1]))
    found = [root / place / name for place in places if (root / place / name).is_dir()]
    found += [file for place in places for file in videos_in(root / place) if file.stem == name]
    if not found:
        raise DataError(f"{path}: there is no {name} in {' or '.join(str(root / place) for place in places)}")
    by_second = found[0].is_dir()
    return _labelled(root, found[0], np.array(labels)[:: FPS if by_second else 1], split, 1 if by_second else FPS)


def from_autolaparo(folder: Folder) -> Listed:
    """folder/{frames_resized,frames}/NN/, one picture a second, or folder/videos/NN.mp4, with
    folder/labels/label_NN.txt (`frame<tab>phase`, phases from 1) or the folder/labels_pkl/SPLIT/1fps*.pickle of the
    published code.

    1 to 10 for training, 11 to 14 for validation, 15 to 21 for the test.  A label is for a second.
    """
    root = open_folder(folder)
    entries = []
    for name, labels in sorted(_autolaparo_labels(root).items()):
        split = "train" if int(name) <= 10 else "val" if int(name) <= 14 else "test"
        found = [root / place / name for place in ("frames_resized", "frames", ".") if (root / place / name).is_dir()]
        found += [file for file in videos_in(root / "videos") if file.stem == name]
        if not found:
            raise DataError(f"{root}: there are labels of video {name}, but neither its frames nor videos/{name}.mp4")
        wrong = [label for label in labels if not 0 <= label < len(AUTOLAPARO)]
        if wrong:
            raise DataError(f"{root}: the labels of video {name} hold phase {wrong[0]}, there are 0 to 6")
        rate = 1 if found[0].is_dir() else FPS
        entries.append(_labelled(root, found[0], np.repeat(labels, rate), split, rate))
    return AUTOLAPARO, at_least_one(entries, root, "labels/label_NN.txt or labels_pkl/*/1fps*.pickle")


def _autolaparo_labels(root: Path) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in sorted((root / "labels").glob("label_*.txt")):
        rows = read_rows(path, "\t")[1:]
        if not all(len(row) == 2 and row[1].strip().isdecimal() for row in rows):
            raise DataError(f"{path}: each line behind the first must be a frame and a phase")
        found[path.stem.removeprefix("label_")] = [int(row[1]) - 1 for row in rows]
    for path in sorted((root / "labels_pkl").glob("*/1fps*.pickle")):
        for name, rows in _plain_pickle(path).items():
            found[f"{int(name):02d}"] = [int(row["phase_gt"]) for row in rows]
    return found


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, which is not loaded because it could run code")


def _plain_pickle(path: Path) -> dict[str, Any]:
    """A pickle of dicts, lists, texts and numbers, and of nothing else."""
    try:
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
        return {str(name): [{"phase_gt": row["phase_gt"]} for row in rows] for name, rows in content.items()}
    except Exception as error:  # a damaged pickle can raise anything
        raise DataError(f"{path}: is no pickle of labels by video ({error})") from None


def from_ophnet(folder: Folder) -> Listed:
    """folder/OphNet2024_loca_challenge_phase.csv (or in annotation/) and OphNet2024_all/case_NNNN.mp4: whole videos
    with a phase a frame, none where nothing is written down."""
    root, path = _ophnet(folder, "OphNet2024_loca_challenge_phase.csv")
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    names = _ophnet_classes(path, rows)
    entries = []
    for name, of_video in itertools.groupby(sorted(rows, key=lambda row: row["video_id"]), lambda row: row["video_id"]):
        file = root / "OphNet2024_all" / f"{name}.mp4"
        frames, fps = frames_of(file), _fps(file)
        labels, split = np.full(frames, -1), ""
        for row in of_video:
            start, stop = (round(float(row[edge]) * fps) for edge in ("start", "end"))
            labels[start:stop] = names.index(f"phase {int(row['phase_id'])}")
            split = row["split"]
        entries.append(Entry(file.relative_to(root).as_posix(), 0, frames, run_lengths(labels), split=split))
    return names, at_least_one(entries, root, "rows in its list of phases")


def from_ophnet_trimmed(folder: Folder) -> Listed:
    """folder/OphNet2024_loca_challenge_phase_trimmed.csv (or in annotation/) and the clips that it names: a phase a
    clip."""
    root, path = _ophnet(folder, "OphNet2024_loca_challenge_phase_trimmed.csv")
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    names, entries = _ophnet_classes(path, rows), []
    for row in rows:
        file = root / row["segment_path"].removeprefix("./")
        entries.append(whole_clip(root, file, names.index(f"phase {int(row['phase_id'])}"), row["split"]))
    return names, at_least_one(entries, root, "rows in its list of clips")


def _ophnet(folder: Folder, name: str) -> tuple[Path, Path]:
    root = open_folder(folder)
    path = next((path for path in (root / name, root / "annotation" / name) if path.exists()), None)
    if path is None:
        raise DataError(f"{root}: holds no {name}, nor does its folder annotation")
    return root, path


def _ophnet_classes(path: Path, rows: list[dict[str, str]]) -> tuple[str, ...]:
    needed = {"video_id", "start", "end", "split", "phase_id"} - (rows[0].keys() if rows else set())
    if needed:
        raise DataError(f"{path}: its columns must hold {', '.join(sorted(needed))}")
    return tuple(f"phase {number}" for number in sorted({int(row["phase_id"]) for row in rows}))


# ---- triplets and actions


def from_cholect50(folder: Folder) -> Listed:
    """folder/labels/VIDNN.json and folder/videos/VIDNN/000000.png, one a second: all triplets of a frame, with the
    split of the first paper."""
    root, entries = open_folder(folder), []
    names: tuple[str, ...] = ()
    for path in sorted((root / "labels").glob("VID*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            triplets = content["categories"]["triplet"]
            names = tuple(triplets[str(i)] for i in range(len(triplets)))
            frames = [content["annotations"].get(str(i), []) for i in range(int(content["num_frames"]))]
            sets = [tuple(sorted({int(row[0]) for row in rows if int(row[0]) >= 0})) for rows in frames]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path}: is no list of triplets ({type(error).__name__}: {error})") from None
        place = root / "videos" / path.stem
        count = _count(place, len(sets), 1)
        runs = tuple((triplets, len(list(same))) for triplets, same in itertools.groupby(sets[:count]))
        split = next((split for split, videos in CHOLECT50.items() if last_number(path.stem) in videos), "train")
        entries.append(Entry(place.relative_to(root).as_posix(), 0, count, runs, split=split))
    return names, at_least_one(entries, root, "labels/VIDNN.json")


def from_surgical_actions(folder: Folder, folds: int = 4) -> Listed:
    """folder/ACTION/*.mp4, 16 actions of 10 clips; no split was published: of each action every fourth clip by name is
    for the test."""
    root = open_folder(folder)
    classes = tuple(sorted(child.name for child in root.iterdir() if child.is_dir() and videos_in(child)))
    entries = [
        whole_clip(root, path, label, "test" if i % folds == folds - 1 else "train")
        for label, name in enumerate(classes)
        for i, path in enumerate(videos_in(root / name))
    ]
    return classes, at_least_one(entries, root, "ACTION/*.mp4")


def _fps(path: Path) -> float:
    with open_source(str(path)) as reader:
        if not reader.info.fps:
            raise DataError(f"{path}: has no frame rate, its phases are given in seconds")
        return reader.info.fps


def _labelled(root: Path, path: Path, labels: np.ndarray, split: str, rate: int) -> Entry:
    count = _count(path, len(labels), rate)
    return Entry(path.relative_to(root).as_posix(), 0, count, run_lengths(labels[:count]), split=split)


def _count(path: Path, labels: int, rate: int) -> int:
    """As far as there are both frames, `rate` a second, and labels, which may differ by a second or a hundredth."""
    frames = frames_of(path)
    count = min(frames, labels)
    if not count or abs(frames - labels) > max(rate, count // 100):
        raise DataError(f"{path}: holds {frames} frames, there are labels for {labels}")
    return count
