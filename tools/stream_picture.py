"""Draws docs/stream.jpg from the files of a run: a frame of annotated.mp4 beside timeline.png.

endomamba demo --out endomamba-demo
python tools/stream_picture.py endomamba-demo --frame 107
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

from PIL import Image

from endomamba.video import open_video

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--frame", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DOCS / "stream.jpg")
    args = parser.parse_args()
    with open_video(args.folder / "annotated.mp4") as reader:
        frame = Image.fromarray(next(islice(reader, args.frame, None)).rgb.numpy())
    timeline = Image.open(args.folder / "timeline.png").convert("RGB")
    timeline = timeline.resize((round(timeline.width * frame.height / timeline.height), frame.height))
    sheet = Image.new("RGB", (frame.width + timeline.width, frame.height))
    sheet.paste(frame, (0, 0))
    sheet.paste(timeline, (frame.width, 0))
    sheet.save(args.out, quality=80, optimize=True)
    print(f"{args.out}: {sheet.width} x {sheet.height}, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
