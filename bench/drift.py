"""Whether a stream's error grows with time: streamed in its dtype, by the fp32 parallel pass over the same weights."""

from __future__ import annotations

import copy
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from bench.film import pictures
from bench.stats import trend

if TYPE_CHECKING:
    from torch import Tensor

    from bench.frame import Setting

LEFT_OUT = 10  # in so many parts of the frames the first is left out: the state fills, and its error with it
WINDOW = 40  # frames of the parallel pass at once; the state goes from one window to the next


def drift(setting: Setting, frames: int) -> dict:
    """The slope of the answers' relative error on time, a thousand frames, and its 95 % interval.

    The weights are those of the stream, widened: what is compared is the arithmetic.  The interval is of blocks as long
    as the errors hang together.  by_time: means of tenths.  without_past: what the last answer differs by, relative,
    from that of a stream whose state was emptied before it: what there is to lose.
    """
    streamed, parallel, emptied = answers(setting, frames)
    errors = np.linalg.norm(streamed - parallel, axis=1) / np.linalg.norm(parallel, axis=1)
    if not np.isfinite(errors).all():
        raise ArithmeticError(f"{int((~np.isfinite(errors)).sum())} of {frames} answers are not finite")
    left_out = frames // LEFT_OUT
    found = trend(errors[left_out:])
    tenths = [float(part.mean()) for part in np.array_split(errors, 10)]
    return {
        "frames": frames, "left_out": left_out, "mean_error": float(errors[left_out:].mean()),
        "largest_error": float(errors.max()), "slope_per_1000_frames": 1e3 * found.middle,
        "interval_per_1000_frames": [1e3 * found.low, 1e3 * found.high], "block_frames": found.block,
        "grows": found.low > 0, "by_time": tenths,
        "without_past": float(np.linalg.norm(emptied - parallel[-1]) / np.linalg.norm(parallel[-1])),
    }  # fmt: skip


def answers(setting: Setting, frames: int) -> tuple[np.ndarray, ...]:
    """-> streamed (frames, k), in parallel (frames, k), and the last one of an emptied state (k,)."""
    import torch

    device, drawn = setting.args.device, 4 if setting.args.quick else 24
    camera, shown = setting.stream(), pictures(frames, setting.own, drawn)
    wide = copy.deepcopy(setting.model).float()
    streamed, parallel, state = [], [], wide.init_state(1)
    with torch.inference_mode():
        while window := list(islice(shown, WINDOW)):
            rgb = torch.stack(window).to(device)
            streamed += [camera(frame) for frame in rgb]
            before, (whole, state) = state, wide.step(video(rgb), state)
            parallel.append(whole[0])
        state = before.reset()
        state.frame.fill_(frames - 1)
        emptied, _ = wide.step(video(rgb[-1:]), state)
        tensors = torch.cat(streamed), torch.cat(parallel), emptied[0, 0]
    return tuple(tensor.double().cpu().numpy() for tensor in tensors)


def video(rgb: Tensor) -> Tensor:
    """uint8 (t, h, w, 3) -> (1, 3, t, h, w), normalised."""
    from endomamba.video import preprocess

    return preprocess(rgb, None).movedim(0, 1).unsqueeze(0)


def told(row: dict) -> str:
    low, high = row["interval_per_1000_frames"]
    return (
        f"{row['case']:44} error {row['mean_error']:.2e}, slope {row['slope_per_1000_frames']:+.1e} in 1,000 frames "
        f"[{low:+.1e}, {high:+.1e}] ({'it grows' if row['grows'] else 'it does not grow'}); without the past "
        f"{row['without_past']:.2f}"
    )
