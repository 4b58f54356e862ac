"""What happens in a video: a grammar of phases in time, and from it where the camera is and what it does in each frame.

    procedure  ::=  insertion caecum withdrawal (visit withdrawal)*
    visit      ::=  inspection [biopsy reassessment [resection stump_check]]

A frame is drawn from its `View` alone, and no View holds a phase.  Three pairs of phases (SAME_LOOKS) have Views of one
distribution; what tells them apart is only what came before, often hundreds of frames before:

    insertion, withdrawal       while the camera hovers (motif "hover"): was the caecum seen already?  (Single frames of
                                "travel" do not tell either, but motion does.)
    inspection, reassessment    a camera holding still before a polyp (motif "look"): was a tool used on it already?
    biopsy, resection           a tool at a polyp (motif "treat"): is it the first tool used there, or the second?

Biopsies leave no trace; a resection does, when it is over: the polyp is gone and its stump bleeds.  A stump in sight
says therefore that this is not insertion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .anatomy import Anatomy
from .params import Params, generator, uniform

PHASES = (
    "insertion",
    "caecum",
    "withdrawal",
    "inspection",
    "biopsy",
    "reassessment",
    "resection",
    "stump_check",
)
SAME_LOOKS = (
    ("insertion", "withdrawal", "hover"),
    ("inspection", "reassessment", "look"),
    ("biopsy", "resection", "treat"),
)
MOTIFS = ("travel", "hover", "reach", "look", "treat", "leave")
TOOLS = ("forceps", "snare")
REACH = 16.0  # frames in which the camera turns to a polyp, or away from it


@dataclass(frozen=True, slots=True)
class Segment:
    """Frames start <= t < stop of one phase and one motif; polyp: the index of the one that is visited, or None."""

    phase: str
    motif: str
    start: int
    stop: int
    polyp: int | None


@dataclass(frozen=True, slots=True)
class View:
    """All that a frame is drawn from, beside the colon itself.

    depth, x, y: the camera, in radii.  yaw, pitch, roll: of its gaze against the axis of the colon, in radians.
    removed, blood: of each polyp, whether it is cut off and how much its stump bleeds (0 to 1).
    tool: how far the tool is out (0 to 1), at `polyp`.  shake: pixels of a 224 frame that the picture moves meanwhile.
    grain: which part of the sheet of sensor noise lies over the picture.
    """

    depth: float
    x: float
    y: float
    yaw: float
    pitch: float
    roll: float
    removed: tuple[bool, ...]
    blood: tuple[float, ...]
    tool: float
    polyp: int | None
    shake: tuple[float, float]
    grain: int


class Procedure:
    """One video's script.  `segments` in order; `view(t)` is what frame t is drawn from."""

    def __init__(self, params: Params, split: str, seed: int, frames: int) -> None:
        self.frames = frames
        rng = generator(params, split, seed, "procedure")
        visits, insertion, caecum, withdrawal = _durations(params, rng, frames)
        length = float(np.clip(params.speed * 0.7 * insertion, 7.0, 40.0))
        self.anatomy = Anatomy(params, generator(params, split, seed, "anatomy"), length, len(visits))
        script = _script(rng, self.anatomy, visits, insertion, caecum, withdrawal)
        edges = np.rint(np.cumsum([0.0, *(step[3] for step in script)])).astype(int)
        edges[-1] = frames
        self.segments, self._stops = [], []
        depth = 0.0
        for (phase, motif, polyp, _, end), start, stop in zip(script, edges[:-1], edges[1:]):
            if stop > start:
                self.segments.append(Segment(phase, motif, int(start), int(stop), polyp))
                self._stops.append((depth, end))
            depth = end
        self.tool_kind = TOOLS[int(rng.integers(len(TOOLS)))]
        self._track(params, rng)

    def segment(self, t: int) -> Segment:
        return self.segments[int(self._owner[t])]

    def view(self, t: int) -> View:
        removed = tuple(bool(t >= cut) for cut in self._cut)
        blood = tuple(float(_bleeding(t - cut)) if t >= cut else 0.0 for cut in self._cut)
        return View(
            depth=float(self._depth[t]),
            x=float(self._place[0, t]),
            y=float(self._place[1, t]),
            yaw=float(self._gaze[0, t]),
            pitch=float(self._gaze[1, t]),
            roll=float(self._gaze[2, t]),
            removed=removed,
            blood=blood,
            tool=float(self._tool[t]),
            polyp=self.segment(t).polyp,
            shake=(float(self._shake[0, t]), float(self._shake[1, t])),
            grain=int(self._grain[t]),
        )

    def _track(self, params: Params, rng: np.random.Generator) -> None:
        """Fills the arrays that `view` reads; the phase of a segment is not looked at."""
        n, anatomy = self.frames, self.anatomy
        self._owner = np.repeat(np.arange(len(self.segments)), [s.stop - s.start for s in self.segments])
        self._depth, self._tool = np.zeros(n), np.zeros(n)
        attention, restless, target = np.zeros(n), np.zeros(n), np.full(n, -1)
        self._cut = np.full(len(anatomy.polyps), n)
        for segment, (begin, end) in zip(self.segments, self._stops):
            at = slice(segment.start, segment.stop)
            u = (np.arange(segment.stop - segment.start) + 0.5) / (segment.stop - segment.start)
            self._depth[at] = begin + (end - begin) * _ease(u)
            restless[at] = {"travel": 1.0, "hover": 1.5, "look": 0.3, "treat": 0.3}.get(segment.motif, 0.6)
            if segment.polyp is not None:
                target[at] = segment.polyp
                attention[at] = {"reach": _ease(u), "leave": 1 - _ease(u)}.get(segment.motif, 1.0)
            if segment.motif == "treat":
                self._tool[at] = np.clip(np.minimum(u, 1 - u) / 0.22, 0, 1)
            if segment.phase == "resection":
                self._cut[segment.polyp] = segment.stop
        restless = _smooth(restless, 9)
        waves = [_wander(params, rng, n) for _ in range(5)]
        sway, wander = uniform(rng, params.sway), uniform(rng, params.wander)
        self._place = np.array(anatomy.centre(self._depth)) + sway * restless * np.array(waves[:2])
        ahead = np.array([*anatomy.centre(self._depth + 2.2), self._depth + 2.2])
        for t in np.flatnonzero(target >= 0):
            polyp = anatomy.polyps[target[t]]
            a = attention[t]
            self._place[:, t] -= 0.40 * a * np.array([np.cos(polyp.theta), np.sin(polyp.theta)])
            goal = anatomy.wall(polyp.s, polyp.theta, polyp.stalk * 0.7 + 0.1)
            ahead[:, t] += 0.9 * a * (goal - ahead[:, t])
        self._gaze = np.zeros((3, n))
        for t in range(n):
            hx, hy = anatomy.heading(self._depth[t])
            x, y, z = ahead[:, t] - [*self._place[:, t], self._depth[t]]
            x, y = x - z * hx, y - z * hy
            self._gaze[:2, t] = np.arctan2(x, z), np.arctan2(y, np.hypot(x, z))
        self._gaze[:2] += wander * restless * np.array(waves[2:4])
        self._gaze[2] = 0.35 * waves[4]
        self._shake = np.gradient(self._gaze[:2], axis=1) * 224 / params.field_of_view if n > 1 else np.zeros((2, n))
        self._grain = rng.integers(1 << 30, size=n)


def _durations(params: Params, rng: np.random.Generator, frames: int) -> tuple[list, float, float, float]:
    """-> the stages of every visit [(phase, motif, duration)], and how long insertion, caecum and withdrawal take."""
    visits = []
    for _ in range(max(1, round(frames * params.visits_per_1000 / 1000))):
        stages = [("inspection", "look", uniform(rng, params.look))]
        if rng.random() < params.biopsy_probability:
            stages.append(("biopsy", "treat", uniform(rng, params.treat)))
            stages.append(("reassessment", "look", uniform(rng, params.look)))
            if rng.random() < params.resection_probability:
                stages.append(("resection", "treat", uniform(rng, params.treat)))
                stages.append(("stump_check", "look", uniform(rng, params.look)))
        visits.append(stages)
    visiting = sum(duration for stages in visits for _, _, duration in stages)
    travelling = max(frames - visiting, 0.8 * visiting)
    scale = frames / (visiting + travelling)
    visits = [[(phase, motif, scale * duration) for phase, motif, duration in stages] for stages in visits]
    return visits, 0.43 * scale * travelling, 0.09 * scale * travelling, 0.48 * scale * travelling


def _script(
    rng: np.random.Generator, anatomy: Anatomy, visits: list, insertion: float, caecum: float, withdrawal: float
) -> list[tuple[str, str, int | None, float, float]]:
    """-> (phase, motif, polyp, duration, depth at the end) in order."""
    script: list[tuple[str, str, int | None, float, float]]
    script = [("insertion", motif, None, d, s) for motif, d, s in _journey(rng, 0.0, anatomy.length, insertion)]
    script.append(("caecum", "hover", None, caecum, anatomy.length))
    depth, legs = anatomy.length, []
    for index in sorted((i for i, p in enumerate(anatomy.polyps) if p.visited), key=lambda i: -anatomy.polyps[i].s):
        goal = min(depth, anatomy.polyps[index].s - 0.7 - 0.35 * rng.random())
        legs.append((depth, goal, index))
        depth = goal
    legs.append((depth, 0.0, None))
    weights = np.array([0.4 + begin - end for begin, end, _ in legs])
    before = None
    for (begin, end, index), time, stages in zip(legs, withdrawal * weights / weights.sum(), [*visits, []]):
        turn = min(REACH, time / 4)
        if before is not None:
            script.append(("withdrawal", "leave", before, turn, begin))
            time -= turn
        halfway = end + 0.25 * (begin - end) if index is not None else end
        way = _journey(rng, begin, halfway, time - turn if index is not None else time)
        script += [("withdrawal", motif, None, d, s) for motif, d, s in way]
        if index is not None:
            script.append(("withdrawal", "reach", index, turn, end))
        script += [(phase, motif, index, d, end) for phase, motif, d in stages]
        before = index
    return script


def _journey(rng: np.random.Generator, begin: float, end: float, time: float) -> list[tuple[str, float, float]]:
    """From one depth to another, halting on the way: -> (motif, duration, depth at its end)."""
    parts: list[tuple[str, float]] = []
    while not parts or sum(d for _, d in parts) < time:
        parts += [("travel", 25 + 35 * rng.random()), ("hover", 15 + 25 * rng.random())]
    scale, moving = time / sum(d for _, d in parts), sum(d for motif, d in parts if motif == "travel")
    way, depth = [], begin
    for motif, duration in parts:
        depth += (end - begin) * duration / moving if motif == "travel" else 0.0
        way.append((motif, scale * duration, depth))
    return way


def _ease(u: np.ndarray) -> np.ndarray:
    return u * u * (3 - 2 * u)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    padded = np.pad(values, width, mode="edge")
    sums = np.cumsum(padded)
    return (sums[2 * width :] - sums[: -2 * width]) / (2 * width)


def _wander(params: Params, rng: np.random.Generator, frames: int) -> np.ndarray:
    """A restless hand: three sines, so that every frame has the same distribution."""
    t = np.arange(frames)
    periods, phases = [uniform(rng, params.wander_period) for _ in range(3)], 2 * np.pi * rng.random(3)
    return sum(a * np.sin(2 * np.pi * t / p + q) for a, p, q in zip((0.8, 0.6, 0.4), periods, phases))


def _bleeding(since: int) -> float:
    """Blood of a stump, so many frames after the cut: quickly out, slowly gone."""
    return min(1.0, 0.25 + since / 30) * np.exp(-max(0, since - 60) / 500)
