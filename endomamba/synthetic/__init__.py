"""Synthetic endoscopy: colonoscopies with ground truth, seeded, to test with and to learn from.

    video = SyntheticVideo("base", split="train", seed=0, frames=1000, size=224)
    rgb, truth = video[17]                       # (224, 224, 3) uint8, and what is true of it
    movie, lines = write(video, "clips")         # clips/base-train-000000.mp4 and .truth.jsonl
    load_truth(lines, start=100, stop=200).phase

procedure.py has the grammar of phases, params.py the variants and what freezes them, truth.py the format.
It needs numpy alone; writing files needs PyAV.
"""

from .generate import SyntheticVideo, paths, write
from .params import SPLITS, VARIANTS, Params
from .procedure import PHASES, SAME_LOOKS
from .truth import LANDMARKS, PolypTruth, Truth, TruthError, load_truth

__all__ = [
    "LANDMARKS",
    "PHASES",
    "SAME_LOOKS",
    "SPLITS",
    "VARIANTS",
    "Params",
    "PolypTruth",
    "SyntheticVideo",
    "Truth",
    "TruthError",
    "load_truth",
    "paths",
    "write",
]
