"""Drawn endoscopy for `bench frame`, and a film of it from its mp4 to the answers, as `endomamba stream` reads it."""

from __future__ import annotations

import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from bench.frame_setting import Setting

DRAWN = 24  # pictures, played forth and back
KEPT = 64  # decoded frames that the model is timed with alone
ROUNDS = 3
FPS = 25


def missing() -> str:
    return "" if importlib.util.find_spec("av") else "FFmpeg's Python package av is not installed"


def pictures(count: int, size: tuple[int, int], drawn: int = DRAWN, smooth: bool = True) -> Iterator[Tensor]:
    """uint8 (h, w, 3) of the synthetic generator, each shifted by some pixels, so that none comes twice soon.

    smooth: as a film moves; else picture and shift are by chance, so that what is shown does not change with time.
    """
    import torch

    from endomamba.preprocess import resize
    from endomamba.synthetic import SyntheticVideo

    side = max(32, min(size[0], size[1], 224))  # larger ones take seconds a picture
    video = SyntheticVideo("base", split="test", frames=drawn, size=side)
    few = [resize(torch.from_numpy(video[i][0]), size).contiguous() for i in range(drawn)]
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        place = i % (2 * drawn - 2)
        number, down, right = min(place, 2 * drawn - 2 - place), 3 * i, 5 * i
        if not smooth:
            number, down, right = (int(torch.randint(n, (), generator=generator)) for n in (drawn, *size))
        yield torch.roll(few[number], (down, right), (0, 1))


def film(setting: Setting, size: tuple[int, int], frames: int) -> dict:
    """Frames a second from the mp4 to one written line a frame, of the decoder alone, and of the model alone; in turns.

    The model alone reads decoded frames in ordinary memory and waits for each answer on the host, as a session does.
    decoder_waited: share of the frames for which the decoder had to wait, as four lay before the model.  From a half on
    the model's thread sets the pace.  difference: between probabilities in the lines and of the model alone.
    """
    from endomamba.video import open_video, write_video

    camera = setting.stream(size=size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "film.mp4"
        drawn = 4 if setting.args.quick else DRAWN
        write_video(path, pictures(frames, size, drawn), fps=FPS, options={"preset": "veryfast"})
        megabits = 8e-6 * path.stat().st_size * FPS / frames
        with open_video(path) as reader:
            kept = [frame.rgb for frame, _ in zip(reader, range(KEPT))]
        camera.warm_up()
        turns = [
            (played(camera, path), decoded(path), read(camera, kept, frames))
            for _ in range(1 if setting.args.quick else ROUNDS)
        ]
        session, lines = turns[0][0]
        for line in lines:
            line["probabilities"] = dict(zip(line["labels"], line["probabilities"]))
        difference = differs(camera, kept, lines)
    waited = statistics.median(session.waits / frames for (session, _), _, _ in turns)
    return {
        "frames": frames, "frames_per_second": median(session.frames / session.seconds for (session, _), _, _ in turns),
        "decode_frames_per_second": median(rate for _, rate, _ in turns),
        "model_frames_per_second": median(rate for _, _, rate in turns), "decoder_waited": round(waited, 3),
        "limit": "model and lines" if waited >= 0.5 else "decoder", "difference": difference,
        "lost": frames - session.frames, "codec": session.reader.info.codec, "megabits_per_second": round(megabits, 2),
        "latency_ms": session.summary()["latency"],
    }  # fmt: skip


def median(rates) -> float:
    return round(statistics.median(rates), 1)


def played(camera, path: Path):
    """-> a whole session, and its lines."""
    from endomamba.stream import JsonLines, StreamSession
    from endomamba.video import open_video

    camera.reset()
    out = path.with_suffix(".jsonl")
    with open_video(path) as reader, JsonLines(out, overwrite=True) as lines:
        session = StreamSession(camera, reader, lines.write)
        session.run()
    return session, [json.loads(line) for line in out.read_text().splitlines()]


def decoded(path: Path) -> float:
    """Frames a second of the decoder, as far as frames on the host."""
    from endomamba.video import open_video

    with open_video(path) as reader:
        return rate(lambda: sum(1 for _ in reader))


def read(camera, kept: list[Tensor], frames: int) -> float:
    """Frames a second of the model, each answer awaited on the host."""

    def call() -> int:
        for i in range(frames):
            camera(kept[i % len(kept)])[0].float().cpu()
        return frames

    return rate(call)


def rate(call: Callable[[], int]) -> float:
    start = time.perf_counter()
    return call() / (time.perf_counter() - start)


def differs(camera, kept: list[Tensor], lines: list[dict]) -> float:
    camera.reset()
    worst = 0.0
    for rgb, line in zip(kept, lines, strict=False):
        expected = camera(rgb)[0].float().softmax(0).cpu()
        worst = max(worst, *(abs(float(expected[k]) - p) for k, p in line["probabilities"].items()))
    return worst


def told(row: dict) -> str:
    return (
        f"{row['case']:44} {row['frames_per_second']:,.0f} frames/s, decoder alone "
        f"{row['decode_frames_per_second']:,.0f}, model alone {row['model_frames_per_second']:,.0f}; limited by the "
        f"{row['limit']}: the decoder waited for {100 * row['decoder_waited']:.0f} % of the frames"
    )
