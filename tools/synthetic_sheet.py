"""Draws the picture of the synthetic endoscopy that the README shows.

    python tools/synthetic_sheet.py [docs/synthetic.jpg]

One frame from the middle of a phase each, 224 x 224, variant and phase written into the black corner.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from endomamba.synthetic import SyntheticVideo

FRAMES = 1000
# variant, seed, phase, which of its segments
SHOTS = (
    ("base", 6, "insertion", 2),
    ("base", 4, "insertion", 0),
    ("base", 5, "caecum", 0),
    ("base", 1, "withdrawal", 4),
    ("base", 6, "inspection", 0),
    ("base", 6, "biopsy", 0),
    ("base", 7, "resection", 0),
    ("base", 8, "stump_check", 0),
    ("teacher", 2, "inspection", 0),
    ("other-textures", 1, "inspection", 0),
    ("other-polyps", 5, "inspection", 0),
    ("all-other", 4, "insertion", 2),
)
COLUMNS = 4


def shot(variant: str, seed: int, phase: str, which: int) -> Image.Image:
    video = SyntheticVideo(variant, split="test", seed=seed, frames=FRAMES)
    segments = [segment for segment in video.procedure.segments if segment.phase == phase]
    segment = segments[which % len(segments)]
    picture = Image.fromarray(video[(segment.start + segment.stop) // 2][0])
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((4, 198), f"{variant}\n{phase}", fill=(200, 200, 200), font_size=9, spacing=1)
    return picture


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/synthetic.jpg")
    pictures = [np.asarray(shot(*which)) for which in SHOTS]
    rows = [np.concatenate(pictures[i : i + COLUMNS], 1) for i in range(0, len(pictures), COLUMNS)]
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path, quality=80, optimize=True)
    print(f"{path}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
