"""Whether a stream's error grows with time: streamed in its dtype, by the fp32 parallel pass over the same weights."""

from __future__ import annotations

import copy
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from bench.film import DRAWN, pictures
from bench.stats import Trend, trend

if TYPE_CHECKING:
    from torch import Tensor

    from bench.frame_setting import Setting

LEFT_OUT = 10  # in so many parts of the frames the first is left out: the state fills, and its error with it
WINDOW = 40  # frames of the parallel pass at once; the state goes from one window to the next


def drift(setting: Setting, frames: int) -> dict:
    """Slopes of the answers' relative error on time, a thousand frames, and their 95 % intervals.

    The weights are those of the stream, widened: what is compared is the arithmetic.  An interval is of blocks as long
    as the errors hang together.  Positions and what is seen change the error too, so a second stream reads the same
    frames and is put on the state of the parallel pass every WINDOW frames: by how much more the first one errs is what
    adds up.  by_time: mean errors of tenths.  without_past: what the last answer differs by, relative, from that of a
    stream whose state was emptied before it: what there is to lose.
    """
    streamed, restarted, parallel, emptied = answers(setting, frames)
    left_out = frames // LEFT_OUT
    errors, others = (relative(each, parallel) for each in (streamed, restarted))
    found, more = trend(errors[left_out:]), trend((errors - others)[left_out:])
    return {
        "frames": frames, "left_out": left_out, "mean_error": float(errors[left_out:].mean()),
        "largest_error": float(errors.max()), **slope(found), "block_frames": found.block, "grows": found.low > 0,
        "restarted": {"every": WINDOW, "mean_error": float(others[left_out:].mean())},
        "beside_restarted": slope(more) | {"block_frames": more.block, "grows": more.low > 0},
        "by_time": [float(part.mean()) for part in np.array_split(errors, 10)],
        "without_past": float(relative(emptied[None], parallel[-1:])[0]),
    }  # fmt: skip


def relative(got: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(n, k) by (n, k) -> (n,) in norm."""
    if not np.isfinite(got).all():
        raise ArithmeticError(f"{int((~np.isfinite(got)).any(1).sum())} of {len(got)} answers are not finite")
    return np.linalg.norm(got - truth, axis=1) / np.linalg.norm(truth, axis=1)


def slope(found: Trend) -> dict:
    return {
        "slope_per_1000_frames": 1e3 * found.middle,
        "interval_per_1000_frames": [1e3 * found.low, 1e3 * found.high],
    }


def answers(setting: Setting, frames: int) -> tuple[np.ndarray, ...]:
    """-> (frames, k) streamed, by the stream that is restarted, and in parallel; the last of an emptied state (k,)."""
    import torch

    device, drawn = setting.args.device, 4 if setting.args.quick else DRAWN
    camera, other, shown = setting.stream(), setting.stream(), pictures(frames, setting.own, drawn, smooth=False)
    wide = copy.deepcopy(setting.model).float()
    streamed, restarted, parallel, state = [], [], [], wide.init_state(1)
    with torch.inference_mode():
        while window := list(islice(shown, WINDOW)):
            rgb = torch.stack(window).to(device)
            streamed += [camera(frame) for frame in rgb]
            other.restore(state)
            restarted += [other(frame) for frame in rgb]
            before, (whole, state) = state, wide.step(video(rgb), state)
            parallel.append(whole[0])
        state = before.reset()
        state.frame.fill_(frames - 1)
        emptied, _ = wide.step(video(rgb[-1:]), state)
        tensors = torch.cat(streamed), torch.cat(restarted), torch.cat(parallel), emptied[0, 0]
    return tuple(tensor.double().cpu().numpy() for tensor in tensors)


def video(rgb: Tensor) -> Tensor:
    """uint8 (t, h, w, 3) -> (1, 3, t, h, w), normalised."""
    from endomamba.video import preprocess

    return preprocess(rgb, None).movedim(0, 1).unsqueeze(0)


def told(row: dict) -> str:
    beside = row["beside_restarted"]
    return (
        f"{row['case']:44} error {row['mean_error']:.2e}, slope in 1,000 frames {words(row)}; beside a stream "
        f"restarted every {row['restarted']['every']} frames, {row['restarted']['mean_error']:.2e}: {words(beside)}; "
        f"without the past {row['without_past']:.2f}"
    )


def words(found: dict) -> str:
    low, high = found["interval_per_1000_frames"]
    verdict = "it grows" if found["grows"] else "it does not grow"
    return f"{found['slope_per_1000_frames']:+.1e} [{low:+.1e}, {high:+.1e}] ({verdict})"
