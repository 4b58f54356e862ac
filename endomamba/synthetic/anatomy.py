"""The colon of one video: its centre line, folds and polyps, and the texture of its wall.

World coordinates: s along the colon, (x, y) across it, in radii.  The wall at s, theta lies at centre(s) + radius(s,
theta) (cos theta, sin theta); everything that depends on s alone is a table with STEPS entries a radius, so that a ray
looks it up instead of computing it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .params import POLYP_TYPES, Params, uniform

STEPS = 512
BEFORE, BEYOND = 1.5, 3.0  # the tables reach from -BEFORE to length + BEYOND
CAECUM = 1.2  # the closed end begins here, so far behind `length`, and is round
TEXTURE = 1024  # texels around the colon; the texture repeats after 2 pi radii along it
LOW_FOLD = 0.15  # a lower one is no landmark


@dataclass(frozen=True, slots=True)
class Polyp:
    """kind: one of POLYP_TYPES.  s, theta: where on the wall.  radius: of the head, along the wall.

    height: of the head's half axis across the wall.  stalk: its length, 0 without one.  visited: on the way out.
    """

    kind: str
    s: float
    theta: float
    radius: float
    height: float
    stalk: float
    lobes: float
    visited: bool


class Anatomy:
    def __init__(self, params: Params, rng: np.random.Generator, length: float, visited: int) -> None:
        """length: what the camera travels.  visited: how many polyps it stops at on the way out."""
        self.length = length
        self.polyps = _polyps(params, rng, length, visited)
        self._s = np.arange(round((length + BEFORE + BEYOND) * STEPS)) / STEPS - BEFORE
        self._waves = _waves(params, rng)
        self.folds, radius = _folds(params, rng, self._s, self.polyps)
        end = length + CAECUM
        closing = np.sqrt(np.clip(1 - np.clip((self._s - end) / 1.0, 0, None) ** 2, 0, None))
        radius[0] -= 1.3 * (1 - closing)
        # Rows: x and y of the centre, then the radius as 1, cos, sin, cos 3, sin 3 of theta.
        self.table = np.ascontiguousarray([*self.centre(self._s), *radius], dtype=np.float32)

    def centre(self, s: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        x, y = (sum(a * np.sin(k * np.asarray(s) + phase) for a, k, phase in waves) for waves in self._waves)
        return x, y

    def heading(self, s: float) -> tuple[float, float]:
        """d centre / d s."""
        x, y = (sum(a * k * np.cos(k * s + phase) for a, k, phase in waves) for waves in self._waves)
        return float(x), float(y)

    def radius(self, s: float, theta: float) -> float:
        row = self.table[2:, int(np.clip(round((s + BEFORE) * STEPS), 0, self.table.shape[1] - 1))].astype(float)
        angles = [1.0, np.cos(theta), np.sin(theta), np.cos(3 * theta), np.sin(3 * theta)]
        return float(np.dot(row, angles))

    def wall(self, s: float, theta: float, inwards: float = 0.0) -> np.ndarray:
        """-> (3,), the point `inwards` of the wall."""
        x, y = self.centre(s)
        r = self.radius(s, theta) - inwards
        return np.array([x + r * np.cos(theta), y + r * np.sin(theta), s])


def _waves(params: Params, rng: np.random.Generator) -> list[list[tuple[float, float, float]]]:
    """Three sines for x, three for y; each bends the centre line by a third of the curvature."""
    return [
        [
            (uniform(rng, params.bend) / 1.7 / k**2, k, 2 * np.pi * rng.random())
            for k in (2 * np.pi / wavelength for wavelength in (6 + 3 * rng.random(), 9 + 4 * rng.random(), 14.0))
        ]
        for _ in range(2)
    ]


def _polyps(params: Params, rng: np.random.Generator, length: float, visited: int) -> tuple[Polyp, ...]:
    """Evenly spread with a jitter, so that two are seldom in one picture; the deepest is visited first."""
    count = visited + int(rng.integers(params.unvisited + 1))
    edges = np.linspace(2.2, length - 0.6, count + 1)
    order = np.argsort(rng.random(count))
    weights = np.cumsum(params.polyp_weights) / sum(params.polyp_weights)
    polyps = []
    for i in range(count):
        kind = POLYP_TYPES[int(np.searchsorted(weights, rng.random(), side="right"))]
        radius = uniform(rng, params.polyp_radius)
        s = edges[i] + (edges[i + 1] - edges[i]) * (0.3 + 0.4 * rng.random())
        height, stalk = {
            "sessile": (radius * (0.75 + 0.25 * rng.random()), 0.0),
            "pedunculated": (radius * (0.8 + 0.2 * rng.random()), 0.20 + 0.15 * rng.random()),
            "flat": (radius * (0.28 + 0.1 * rng.random()), 0.0),
        }[kind]
        if kind == "flat":
            radius *= 1.25
        theta, lobes = 2 * np.pi * rng.random(), uniform(rng, params.polyp_lobes)
        polyps.append(Polyp(kind, float(s), theta, radius, height, stalk, lobes, bool(order[i] < visited)))
    return tuple(polyps)


def _folds(
    params: Params, rng: np.random.Generator, s: np.ndarray, polyps: tuple[Polyp, ...]
) -> tuple[list[tuple[float, float]], np.ndarray]:
    """-> (s, theta) of every fold's highest side, and (5, n), the radius as a Fourier series in theta."""
    radius = np.zeros((5, len(s)))
    tri, phase = uniform(rng, params.triangularity), 2 * np.pi * rng.random()
    radius[0] = 1 + 0.05 * np.sin(2.1 * s + 6 * rng.random())
    radius[3], radius[4] = tri * np.cos(phase), tri * np.sin(phase)
    folds = []
    where = s[0] + 0.2
    while where < s[-1]:
        where += uniform(rng, params.fold_spacing)
        height, width = uniform(rng, params.fold_height), uniform(rng, params.fold_width)
        theta, lean = 2 * np.pi * rng.random(), 0.2 + 0.35 * rng.random()
        for polyp in polyps:  # a fold just in front of a polyp would hide it
            height *= 1 - 0.85 * np.exp(-(((where - polyp.s + 0.35) / 0.6) ** 2))
        x = np.abs(s - where) / width
        ridge = height * (0.75 * np.exp(-(x**1.6)) + 0.25 / (1 + (x / 2.2) ** 2))
        for row, weight in enumerate((0.60, lean * np.cos(theta), lean * np.sin(theta))):
            radius[row] -= weight * ridge
        radius[3] -= 0.25 * ridge * np.cos(phase)
        radius[4] -= 0.25 * ridge * np.sin(phase)
        if height > LOW_FOLD:
            folds.append((float(where), theta))
    return folds, radius


# ---- texture


def make_texture(params: Params, rng: np.random.Generator) -> np.ndarray:
    """-> (TEXTURE, TEXTURE, 4) uint8, along the colon first: tone, vessels, slope of the surface around and along.

    128 is no deviation; vessels begin at 0.
    """
    size = TEXTURE
    k = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]) * size  # waves around the colon
    mottle = _noise(rng, k, lambda k: k / (1 + (k / 7) ** 3))
    grain = _noise(rng, k, lambda k: np.exp(-(((k - 130) / 60) ** 2)))
    relief = _noise(rng, k, lambda k: k / (1 + (k / 18) ** 5)) + 0.02 * _noise(
        rng, k, lambda k: np.exp(-(((k - 150) / 60) ** 2))
    )
    tone = uniform(rng, params.mottle) * mottle + uniform(rng, params.grain) * grain
    vessels = uniform(rng, params.vessel_contrast) * _vessels(params, rng, k)
    slopes = [np.roll(relief, -1, axis) - np.roll(relief, 1, axis) for axis in (1, 0)]
    slopes = [slope / slope.std() for slope in slopes]
    channels = [128 + 160 * tone, 255 * vessels, 128 + 30 * slopes[0], 128 + 30 * slopes[1]]
    return np.clip(np.rint(np.stack(channels, -1)), 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, k: np.ndarray, spectrum) -> np.ndarray:
    """Periodic noise with the amplitude `spectrum(k)`, mean 0 and deviation 1."""
    white = np.fft.rfft2(rng.random((TEXTURE, TEXTURE), dtype=np.float32) - 0.5)
    amplitude = spectrum(k)
    amplitude[0, 0] = 0
    noise = np.fft.irfft2(white * amplitude, s=(TEXTURE, TEXTURE))
    return (noise / noise.std()).astype(np.float32)


def _vessels(params: Params, rng: np.random.Generator, k: np.ndarray) -> np.ndarray:
    """Trees that walk over the wall and fork, thinner with every fork; -> (TEXTURE, TEXTURE) in [0, 1]."""
    widths = (2.6, 1.7, 1.0)  # deviation in texels, by generation
    drawn = np.zeros((len(widths), TEXTURE * TEXTURE), np.float32)
    count = params.vessel_trees
    place, angle = rng.random((2, count)) * TEXTURE, rng.random(count) * 2 * np.pi
    turn, generation = np.zeros(count), np.zeros(count, np.intp)
    left = 90 + 160 * rng.random(count)
    while count:
        turn += 0.012 * (rng.random(count) - 0.5) - 0.04 * turn
        angle += turn + 0.16 * (rng.random(count) - 0.5)
        place += np.stack([np.cos(angle), np.sin(angle)])
        cell = place.astype(np.intp) % TEXTURE
        np.add.at(drawn, (generation, cell[0] * TEXTURE + cell[1]), 1.0)
        left -= 1
        ended = left <= 0
        forks = (rng.random(count) < 0.016) | ended
        forks &= generation < len(widths) - 1
        side = np.where(rng.random(count) < 0.5, -1.0, 1.0)
        child_angle, child_left = angle + side * (0.45 + 0.5 * rng.random(count)), 40 + 120 * rng.random(count)
        stay = ~ended
        place = np.concatenate([place[:, stay], place[:, forks]], 1)
        angle = np.concatenate([angle[stay], child_angle[forks]])
        turn = np.concatenate([turn[stay], np.zeros(forks.sum())])
        left = np.concatenate([left[stay], child_left[forks]])
        generation = np.concatenate([generation[stay], generation[forks] + 1])
        count = len(angle)
    ink = np.zeros((TEXTURE, TEXTURE))
    for lines, width, strength in zip(drawn, widths, (1.0, 0.8, 0.6)):
        blur = np.exp(-2 * (np.pi * k * width / TEXTURE) ** 2)
        line = np.fft.irfft2(np.fft.rfft2(lines.reshape(TEXTURE, TEXTURE)) * blur, s=(TEXTURE, TEXTURE))
        ink += strength * line * width * 2.5
    return 1 - np.exp(-np.clip(ink, 0, None))
