"""What the generator can be told: frozen parameters, named variants, the hash that freezes both, and seeds.

Lengths are in radii of the colon, angles in radians, durations in frames at 25 a second.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

VERSION = 1  # of the generator: raised by every change of what it draws; part of the hash
SPLITS = ("train", "val", "test")
POLYP_TYPES = ("sessile", "pedunculated", "flat")  # Paris 0-Is, 0-Ip, 0-IIa

Range = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Params:
    """Everything that decides how videos look and move, apart from seed, size and number of frames.

    A pair is the range a value is drawn from, evenly; a triple of numbers is a linear RGB colour or one weight a type.
    """

    variant: str = "base"
    held_out: bool = False  # true: only the split "test" exists
    fps: int = 25
    # anatomy
    fold_spacing: Range = (0.8, 1.5)
    fold_height: Range = (0.25, 0.55)
    fold_width: Range = (0.10, 0.17)
    triangularity: Range = (0.04, 0.12)
    bend: Range = (0.16, 0.34)
    # mucosa
    mucosa: tuple[float, float, float] = (1.0, 0.35, 0.26)
    vessel: tuple[float, float, float] = (0.42, 0.06, 0.06)
    hue_jitter: float = 0.10
    vessel_trees: int = 26
    vessel_contrast: Range = (0.45, 0.80)
    mottle: Range = (0.10, 0.20)
    grain: Range = (0.05, 0.09)  # the finest mottling: pits of the mucosa
    bump: Range = (0.055, 0.10)
    wetness: Range = (0.6, 1.2)
    # optics
    field_of_view: float = 2.5  # from the left edge of the picture to the right
    opening: str = "octagon"  # of the black frame: "octagon" or "circle"
    noise: Range = (1.2, 2.6)  # of the sensor, in grey levels
    # motion
    speed: float = 0.065  # of insertion, radii a frame
    wander: Range = (0.10, 0.20)  # of the gaze
    sway: Range = (0.05, 0.14)  # of the position, across the colon
    wander_period: Range = (40.0, 140.0)
    # lesions
    polyp_radius: Range = (0.22, 0.40)
    polyp_weights: tuple[float, float, float] = (0.4, 0.3, 0.3)  # of POLYP_TYPES
    polyp_tint: tuple[float, float, float] = (1.08, 0.78, 0.80)
    polyp_lobes: Range = (0.0, 0.05)
    visits_per_1000: float = 2.6  # polyps that are visited on the way out
    unvisited: int = 2  # at most so many more are only passed
    # fluids
    foam: Range = (0.0, 1.5)
    bubbles: int = 36
    # the grammar of phases
    look: Range = (26.0, 60.0)
    treat: Range = (30.0, 60.0)
    biopsy_probability: float = 0.85
    resection_probability: float = 0.75

    def __post_init__(self) -> None:
        if self.variant in VARIANTS and VARIANTS[self.variant] != self:
            raise ValueError(f"the variant {self.variant!r} is fixed: changed parameters need a name of their own")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "Range" and not 0 <= value[0] <= value[1]:
                raise ValueError(f"{field.name} must be a pair 0 <= low <= high, got {value}")
        if self.opening not in ("octagon", "circle"):
            raise ValueError(f"opening must be 'octagon' or 'circle', got {self.opening!r}")
        for name in ("biopsy_probability", "resection_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    def canonical(self) -> str:
        """The text that is hashed: JSON with sorted keys and no spaces."""
        return json.dumps({"generator": VERSION, **asdict(self)}, sort_keys=True, separators=(",", ":"))

    def digest(self) -> str:
        """sha256 of the parameters and the generator's version, 64 hexadecimal digits."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


VARIANTS: dict[str, Params] = {}


def _variant(name: str, **changes: Any) -> None:
    VARIANTS[name] = replace(VARIANTS["base"], variant=name, **changes) if VARIANTS else Params(**changes)


_variant("base")
# Of another make throughout: what a teacher may be trained on without having seen a student's videos.
_variant(
    "teacher",
    mucosa=(1.0, 0.42, 0.30),
    mottle=(0.06, 0.12),
    vessel_trees=14,
    fold_spacing=(1.0, 1.9),
    polyp_weights=(0.5, 0.2, 0.3),
    wander=(0.08, 0.14),
)
# Held out: each changes one thing, the last all three.
_TEXTURES = {
    "mucosa": (0.95, 0.44, 0.36),
    "vessel": (0.30, 0.08, 0.14),
    "vessel_trees": 60,
    "vessel_contrast": (0.25, 0.45),
    "mottle": (0.24, 0.34),
    "grain": (0.10, 0.15),
    "bump": (0.11, 0.16),
    "opening": "circle",
}
_MOTION = {"speed": 0.10, "wander": (0.24, 0.34), "sway": (0.14, 0.22), "wander_period": (22.0, 60.0)}
_POLYPS = {
    "polyp_radius": (0.14, 0.24),
    "polyp_weights": (0.2, 0.2, 0.6),
    "polyp_tint": (1.04, 0.88, 0.66),
    "polyp_lobes": (0.06, 0.12),
}
_variant("other-textures", held_out=True, **_TEXTURES)
_variant("other-motion", held_out=True, **_MOTION)
_variant("other-polyps", held_out=True, **_POLYPS)
_variant("all-other", held_out=True, **_TEXTURES, **_MOTION, **_POLYPS)


def uniform(rng: np.random.Generator, bounds: Range) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()


def generator(params: Params, split: str, seed: int, stream: str) -> np.random.Generator:
    """Random numbers for one purpose (`stream`) of one video.

    The stream is keyed by sha256 of a text that names variant, split and seed, so videos of different splits or
    variants share no numbers whatever their seeds.  Only its plainest methods are used, `random` and `integers`.
    """
    key = f"endomamba synthetic {VERSION} {params.variant} {split} {seed} {stream}"
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest(), "little")))


def check_split(params: Params, split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if params.held_out and split != "test":
        raise ValueError(f"the variant {params.variant!r} is held out: it has only the split 'test', got {split!r}")


def find_variant(name: str) -> Params:
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {name!r}")
    return VARIANTS[name]
