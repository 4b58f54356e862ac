"""From a folder to a manifest: a converter a layout, `endomamba data manifest --layout NAME`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import published
from .errors import DataError
from .listing import Folder, Listed, open_folder, read_rows, run_lengths, videos_in, whole_clip
from .manifest import SPLITS, Entry


def from_synthetic(folder: Folder) -> Listed:
    """What `endomamba synth` wrote: phases as labels, and the truth files for masks, boxes and landmarks."""
    from ..synthetic import PHASES

    return tuple(PHASES), [_synthetic(name, truth, run_lengths(truth.phase)) for name, truth in _truths(folder)]


def from_synthetic_polyps(folder: Folder, frames: int = 16) -> Listed:
    """The same cut into clips, with the type of the one polyp that is seen in at least half of the frames, or none.

    What lies between, a polyp that comes or goes and two types at a time, is left out.
    """
    from ..synthetic.params import POLYP_TYPES

    entries = []
    for name, truth in _truths(folder):
        for start in range(0, len(truth) - frames + 1, frames):
            seen = [{polyp.kind for polyp in polyps} for polyps in truth.polyps[start : start + frames]]
            kinds = set().union(*seen)
            if not kinds:
                entries.append(_synthetic(name, truth, 0, start, start + frames))
            elif len(kinds) == 1 and 2 * sum(map(bool, seen)) >= frames:
                label = 1 + POLYP_TYPES.index(kinds.pop())
                entries.append(_synthetic(name, truth, label, start, start + frames))
    return ("no polyp", *POLYP_TYPES), entries


def _truths(folder: Folder) -> Iterator[tuple[str, Any]]:
    from ..synthetic import load_truth

    paths = sorted(open_folder(folder).glob("*.truth.jsonl"))
    if not paths:
        raise DataError(f"{folder}: holds no *.truth.jsonl of `endomamba synth`")
    return ((path.name, load_truth(path)) for path in paths)


def _synthetic(name: str, truth: Any, label: Any, start: int = 0, stop: int | None = None) -> Entry:
    header = truth.header
    return Entry(header["video"], start, stop or len(truth), label, name, name, name, header["split"])


def from_folders(folder: Folder, split: str = "train") -> Listed:
    """folder/CLASS/*.mp4, or folder/{train,val,test}/CLASS/*.mp4: a clip a video, its class the folder's name."""
    root = open_folder(folder)
    splits = {name: root / name for name in SPLITS if (root / name).is_dir()} or {split: root}
    classes = tuple(sorted({child.name for base in splits.values() for child in base.iterdir() if child.is_dir()}))
    entries = []
    for name, base in splits.items():
        for label, of_class in enumerate(classes):
            entries += [whole_clip(root, path, label, name) for path in videos_in(base / of_class)]
    if not entries:
        raise DataError(f"{root}: holds no videos in sub-folders named after classes")
    return classes, entries


def from_lists(folder: Folder) -> Listed:
    """folder/videos/* and folder/splits/{train,val,test}.{csv,txt}, lines `file,label` (PolypDiag), labels 0, 1, ..."""
    root, entries, largest = open_folder(folder), [], 0
    for split in SPLITS:
        lists = [path for path in (root / "splits" / f"{split}{end}" for end in (".csv", ".txt")) if path.exists()]
        if len(lists) > 1:
            raise DataError(f"{lists[0]}: stands beside {lists[1].name}; keep one of them")
        for path in lists:
            for number, row in enumerate(read_rows(path), 1):
                if not row:
                    continue
                if len(row) != 2 or not row[1].strip().isdecimal():
                    raise DataError(f"{path}, line {number}: must be `file,label`, got {','.join(row)!r}")
                largest = max(largest, int(row[1]))
                entries.append(whole_clip(root, root / "videos" / row[0].strip(), int(row[1]), split))
    if not entries:
        raise DataError(f"{root}: holds no splits/train.csv (or val, test) with lines `file,label`")
    return tuple(f"class {label}" for label in range(largest + 1)), entries


def from_pretraining(folder: Folder) -> Listed:
    """The published collections for pre-training, SET/train_list.txt with lines `relative.mp4 0`, or Endo-FM's
    train.csv with lines `path,-1`; no labels."""
    root = open_folder(folder)
    lists = sorted([*root.rglob("train_list.txt"), *root.rglob("train.csv")])
    entries = []
    for path in lists:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = re.fullmatch(r"\s*(.+?)[\s,]+-?\d+\s*", line)
            if line.strip() and not found:
                raise DataError(f"{path}, line {number}: must be a file and a number, got {line!r}")
            entries += [whole_clip(root, path.parent / found[1], None, "train")] if found else []
    if not entries:
        raise DataError(f"{root}: holds no train_list.txt or train.csv that lists a clip")
    return (), entries


class Layout(NamedTuple):
    """convert: folder -> names of the classes, and the clips.  what: in words, for the help."""

    convert: Callable[[Folder], Listed]
    what: str


LAYOUTS = {
    "synth": Layout(from_synthetic, "what `endomamba synth` wrote, a phase a frame"),
    "synth-polyps": Layout(from_synthetic_polyps, "the same in clips, a type of polyp each"),
    "folders": Layout(from_folders, "[train/] CLASS/*.mp4"),
    "lists": Layout(from_lists, "videos/ and splits/train.csv of file,label: PolypDiag"),
    "pretraining": Layout(from_pretraining, "train_list.txt or train.csv, without labels"),
    "cvc": Layout(published.from_cvc, "CVC-ClinicDB in its published split, which leaks"),
    "cvc-clean": Layout(published.from_cvc_clean, "the same, no video in two splits"),
    "cholec80": Layout(published.from_cholec80, "Cholec80"),
    "m2cai16": Layout(published.from_m2cai16, "M2CAI16-workflow"),
    "autolaparo": Layout(published.from_autolaparo, "AutoLaparo"),
    "ophnet": Layout(published.from_ophnet, "OphNet, whole videos"),
    "ophnet-trimmed": Layout(published.from_ophnet_trimmed, "OphNet, a clip a phase"),
    "cholect50": Layout(published.from_cholect50, "CholecT50, triplets"),
    "surgical-actions160": Layout(published.from_surgical_actions, "SurgicalActions160"),
}
