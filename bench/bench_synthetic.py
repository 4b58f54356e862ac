"""Frames of synthetic endoscopy a second on one core: drawn with their truth, and written as mp4 and truth file.

    OMP_NUM_THREADS=1 python -m bench.bench_synthetic [--frames 1000] [--size 224] [--save]

Wall time is what a user waits; CPU time of the process is what it costs where other processes share the cores.  A wall
time below the CPU time would say that more than one core worked.
--save writes bench/results/cpu_synthetic.json.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np

import endomamba
from endomamba.synthetic import VARIANTS, SyntheticVideo, write

RESULT = Path(__file__).parent / "results" / "cpu_synthetic.json"


def clocks() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time()])


def timed(function) -> tuple[object, np.ndarray]:
    """-> what it returns; wall and CPU seconds."""
    before = clocks()
    result = function()
    return result, clocks() - before


def row(variant: str, frames: int, size: int) -> dict:
    video, setup = timed(lambda: SyntheticVideo(variant, split="test", frames=frames, size=size))
    video[0]
    drawn = np.array([timed(lambda t=t: video[t])[1] for t in range(frames)])
    with tempfile.TemporaryDirectory() as folder:
        paths, written = timed(lambda: write(video, folder))
        sizes = [path.stat().st_size for path in paths]
    wall, cpu = drawn.sum(0)
    return {
        "variant": variant,
        "frames": frames,
        "size": size,
        "setup_s": round(float(setup[0]), 3),
        "draw_ms_median": round(1e3 * statistics.median(drawn[:, 0]), 2),
        "draw_ms_p95": round(1e3 * float(np.percentile(drawn[:, 0], 95)), 2),
        "draw_frames_per_s": round(frames / wall, 1),
        "draw_frames_per_cpu_s": round(frames / cpu, 1),
        "write_frames_per_s": round(frames / float(written[0]), 1),
        "write_frames_per_cpu_s": round(frames / float(written[1]), 1),
        "mp4_bytes_per_frame": sizes[0] // frames,
        "truth_bytes_per_frame": sizes[1] // frames,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    rows = []
    for variant in ("base", "all-other"):
        rows.append(row(variant, args.frames, args.size))
        print(json.dumps(rows[-1], indent=1), flush=True)
    if args.save:
        meta = {
            "command": f"python -m bench.bench_synthetic --frames {args.frames} --size {args.size} --save",
            "endomamba": endomamba.__version__,
            "parameters": VARIANTS["base"].digest(),
            "numpy": np.__version__,
            "av": av.__version__,
            "python": platform.python_version(),
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_average": round(os.getloadavg()[0], 1),
            "system": platform.system(),
        }
        RESULT.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
        print(f"written: {RESULT}")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
