"""Draws one frame: geometry on a half-resolution grid (scene.py), colour and light at full size.

Colour and fine relief are looked up in a texture that repeats along the colon.  Light comes from the tip of the
endoscope and falls off with the distance; the wet surface throws it back where it faces the camera.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .anatomy import TEXTURE, make_texture
from .overlays import draw_bubbles, draw_tool, scatter_bubbles
from .params import Params, generator, uniform
from .procedure import Procedure, View
from .scene import Lens, Scene

SIGHT = 4.2  # what is farther away is too dark and small to be called visible
SPECK = 24  # a polyp of fewer pixels, in a picture of 224, counts as not visible
CREASE = np.float32(0.22)  # how far from the surface nearness of another part of it counts as shadow
SPARE = 64  # pixels by which the sheet of sensor noise is larger than a frame
BLOOD = (0.34, 0.004, 0.006)
FIBRIN = (1.0, 0.52, 0.38)  # the pale ground of a fresh wound


@dataclass(frozen=True, slots=True)
class Picture:
    """rgb: (h, w, 3) uint8.  polyps: (h, w) uint8, 0 or 1 + the index of the polyp that is seen there.

    distance: (h, w) float32, from the camera to the wall or a polyp, in radii.  opening: (h, w) bool, inside the black
    frame; clear: and no tool covers it.  tool_tip: its pixel, x first, inside the picture or not; None without a tool.
    """

    rgb: np.ndarray
    polyps: np.ndarray
    distance: np.ndarray
    clear: np.ndarray
    opening: np.ndarray
    tool_tip: tuple[float, float] | None
    scene: Scene


class Renderer:
    """Of one video.  `draw` is a pure function of the view: frames may be drawn in any order, by any process."""

    def __init__(self, params: Params, split: str, seed: int, procedure: Procedure, size: int) -> None:
        self.params, self.procedure, self.anatomy, self.size = params, procedure, procedure.anatomy, size
        texels = make_texture(params, generator(params, split, seed, "texture"))
        self.texels = texels.reshape(-1, 4).view(np.uint32).ravel()  # one gather fetches all four channels
        rng = generator(params, split, seed, "look")
        self.mucosa, self.vessel = (
            (np.array(colour) * (1 + params.hue_jitter * (2 * rng.random(3) - 1))).astype(np.float32)
            for colour in (params.mucosa, params.vessel)
        )
        self.bump, self.wetness = np.float32(uniform(rng, params.bump)), np.float32(uniform(rng, params.wetness))
        self.noise = _sensor_noise(rng, uniform(rng, params.noise), size + SPARE)
        self.bubbles = scatter_bubbles(params, rng, self.anatomy)
        self.lens = Lens(params.field_of_view, size)
        self.half = size // 2 + 1  # the coarse grid lies on the even pixels and one beyond
        grid = np.meshgrid(*[2.0 * np.arange(self.half)] * 2)
        self.rays = self.lens.rays(grid[0].ravel(), grid[1].ravel())
        self.opening = _opening(params, size)
        self.open = self.opening > 0.5
        self.lit = np.hypot(grid[0] - self.lens.middle, grid[1] - self.lens.middle).ravel() < 0.95 * size / 2

    def draw(self, view: View) -> Picture:
        scene = Scene(self.anatomy, view, self.lens)
        fields, overlaps = self._surface(scene)
        exposure = _exposure(fields[:, self.lit])
        full = _double(np.concatenate([fields, overlaps]), self.half, self.size)
        fields, overlaps = full[: len(fields)], full[len(fields) :]
        rgb = self._shade(scene, view, fields, overlaps, exposure)
        draw_bubbles(rgb, scene, self.bubbles, fields[0], exposure)
        cover, tip = draw_tool(rgb, scene, view, self.procedure.tool_kind, exposure)
        polyps = np.zeros((self.size, self.size), np.uint8)
        for i, overlap in zip(scene.polyps, overlaps):
            polyps[(overlap > 0) & (fields[0] < SIGHT)] = 1 + i
        clear = self.open if cover is None else self.open & ~cover
        polyps *= clear
        seen = np.bincount(polyps.ravel(), minlength=256)
        polyps[(seen < SPECK * (self.size / 224) ** 2)[polyps]] = 0
        return Picture(self._develop(view, rgb), polyps, fields[0], clear, self.open, tip, scene)

    def _surface(self, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
        """-> fields (7, n): distance, facing, ray along e_theta and s, cos and sin of theta, place along the texture;
        overlaps (polyps, n): above 0 where the polyp lies over everything else."""
        rays = scene.aim(self.rays)
        near = scene.near_polyps(rays)
        t = scene.march(rays, near)
        near = np.flatnonzero(near)
        p = rays * t + scene.eye.astype(np.float32)[:, None]
        wall, c, s, r = scene.wall(p)
        normals = scene.normals(p, near)
        facing = np.maximum(-(normals * rays).sum(0), np.float32(0.12))  # a grazed edge is not black
        crease = np.clip(scene.distance(p + CREASE * normals, near) / CREASE, 0, 1)  # less than 1 at the foot of a fold
        facing *= np.float32(0.45) + np.float32(0.55) * crease
        fields = np.stack([t, facing, s * rays[0] - c * rays[1], -rays[2], c, s, p[2] - r])
        lumps = [wall[near], *scene.lumps(p[:, near])]
        overlaps = np.full((len(scene.polyps), len(t)), -0.05, np.float32)
        for k, overlap in enumerate(overlaps):
            rest = np.minimum.reduce([lump for j, lump in enumerate(lumps) if j != k + 1])
            overlap[near] = np.clip(rest - lumps[k + 1], -0.05, 0.05)
            inside = np.flatnonzero(overlap > 0)
            fields[4:, inside] = scene.chart(k, p[:, inside])
        return fields, overlaps

    def _shade(
        self, scene: Scene, view: View, fields: np.ndarray, overlaps: np.ndarray, exposure: np.float32
    ) -> np.ndarray:
        """-> linear light (3, h, w)."""
        t, facing, around, along, c, s, v = fields
        theta = np.arctan2(s, c)
        texel = self._texel(v, theta)
        fade = 1 / (1 + (t * np.float32(0.45)) ** 2)  # of detail, with the distance
        tone = (texel[..., 0].astype(np.float32) - 128) * (fade * np.float32(1 / 160))
        vessels = texel[..., 1] * (np.float32(1 / 255) * np.sqrt(fade))
        on = np.zeros_like(t)
        for overlap in overlaps:
            np.maximum(on, np.clip(overlap * 33 + np.float32(0.5), 0, 1), out=on)
        vessels *= 1 - np.float32(0.75) * on
        bump = self.bump / 30 * fade
        x = (texel[..., 2].astype(np.float32) - 128) * bump
        y = (texel[..., 3].astype(np.float32) - 128) * bump
        facing = (facing + x * around + y * along) * (1 - np.float32(0.5) * (x * x + y * y))
        np.clip(facing, 0, 1, out=facing)
        fall = exposure * _fall(t)
        light = fall * (np.float32(0.08) + np.float32(0.92) * facing) * (1 + tone)
        gloss = facing**2
        for _ in range(3):
            gloss *= gloss
        sharp = gloss**2
        for _ in range(3):
            sharp *= sharp
        gleam = (np.float32(0.05) * gloss + np.float32(1.5) * sharp) * (fall / (1 + np.float32(0.4) * fall))
        gleam *= self.wetness
        rgb = np.empty((3, *t.shape), np.float32)
        for i in range(3):
            rgb[i] = self.mucosa[i] + vessels * (self.vessel[i] - self.mucosa[i])
            rgb[i] *= 1 + np.float32(self.params.polyp_tint[i] - 1) * on
        for i in scene.wounds:
            self._wound(rgb, i, view.blood[i], v, theta, tone)
        for i in range(3):
            rgb[i] *= light
            if i:
                rgb[i] /= 1 + np.float32(0.11 * i) * t  # tissue scatters red light farther
            rgb[i] += gleam
        return rgb

    def _texel(self, v: np.ndarray, theta: np.ndarray) -> np.ndarray:
        """-> (h, w, 4) uint8; see make_texture."""
        turn, last = np.float32(TEXTURE / (2 * np.pi)), TEXTURE - 1
        at = ((v * turn).astype(np.int32) & last) * TEXTURE + ((theta * turn).astype(np.int32) & last)
        return self.texels.take(at).view(np.uint8).reshape(*at.shape, 4)

    def _wound(
        self, rgb: np.ndarray, index: int, blood: float, v: np.ndarray, theta: np.ndarray, tone: np.ndarray
    ) -> None:
        """Where a polyp was: pale ground, blood over it and around it, its edge ragged by the mottling."""
        polyp = self.anatomy.polyps[index]
        side = theta - np.float32(polyp.theta)
        side -= np.float32(2 * np.pi) * np.rint(side * np.float32(0.5 / np.pi))
        away = v - np.float32(polyp.s - self.anatomy.radius(polyp.s, polyp.theta))
        d = np.sqrt(side * side + away * away) + np.float32(0.35) * tone
        size = polyp.radius * (0.45 if polyp.stalk else 0.7)
        ground = np.clip((size - d) * 16 + np.float32(0.5), 0, 1)
        spread = np.clip((size * (0.75 + 1.3 * blood) - d) * 9, 0, 1) * np.float32(min(0.97, 1.6 * blood))
        spread *= np.clip(np.float32(1.2) + 3 * tone, 0.4, 1)
        for i in range(3):
            rgb[i] += np.float32(0.6) * ground * (np.float32(FIBRIN[i]) - rgb[i])
            rgb[i] += spread * (np.float32(BLOOD[i]) - rgb[i])

    def _develop(self, view: View, rgb: np.ndarray) -> np.ndarray:
        """Linear light -> (h, w, 3) uint8: film curve, motion blur, the black frame, sensor noise."""
        np.negative(rgb, out=rgb)
        np.exp(rgb, out=rgb)
        np.subtract(1, rgb, out=rgb)
        np.sqrt(rgb, out=rgb)
        rgb *= np.float32(0.58) + np.float32(0.42) * rgb  # a camera's contrast: the far lumen sinks into the dark
        rgb = _smear(rgb, *(round(shake * self.size / 224 / 2) for shake in view.shake))
        rgb *= 255 * self.opening
        top, left = view.grain % SPARE, view.grain // SPARE % SPARE
        out = rgb.transpose(1, 2, 0) + self.noise[top : top + self.size, left : left + self.size]
        np.clip(out, 0, 255, out=out)
        return out.astype(np.uint8)


def _fall(t: np.ndarray) -> np.ndarray:
    """Light at a distance: the inverse square, blunt close to the lamp, a little steeper far away."""
    return 1 / (np.float32(0.12) + t * t * (1 + np.float32(0.14) * t))


def _exposure(fields: np.ndarray) -> np.float32:
    """What the camera's automatic exposure would choose: a set mean brightness of the lit part."""
    t, facing = fields[:2]
    light = (np.float32(0.08) + np.float32(0.92) * facing) * _fall(t)
    return np.float32(0.68) / (light / (np.float32(0.6) + light)).mean()


def _smear(rgb: np.ndarray, dx: int, dy: int) -> np.ndarray:
    """The mean of the picture and itself moved by (dx, dy) pixels: what a moving camera sees in one exposure."""
    if not dx and not dy:
        return rgb
    size = rgb.shape[1]
    dx, dy = (max(-size // 8, min(size // 8, d)) for d in (dx, dy))
    to = slice(max(0, dy), size + min(0, dy)), slice(max(0, dx), size + min(0, dx))
    of = slice(max(0, -dy), size + min(0, -dy)), slice(max(0, -dx), size + min(0, -dx))
    out = rgb.copy()
    out[:, to[0], to[1]] += rgb[:, of[0], of[1]]
    out[:, to[0], to[1]] *= np.float32(0.5)
    return out


def _double(fields: np.ndarray, half: int, size: int) -> np.ndarray:
    """(k, half * half) on the even pixels -> (k, size, size), linear in between."""
    small = fields.reshape(-1, half, half)
    out = np.empty((len(small), 2 * half - 1, 2 * half - 1), np.float32)
    out[:, ::2, ::2] = small
    out[:, 1::2, ::2] = (small[:, :-1] + small[:, 1:]) * np.float32(0.5)
    out[:, :, 1::2] = (out[:, :, :-1:2] + out[:, :, 2::2]) * np.float32(0.5)
    return out[:, :size, :size]


def _opening(params: Params, size: int) -> np.ndarray:
    """(h, w) float32: 1 where the endoscope's frame lets the picture through, 0 where it is black."""
    x = (np.arange(size) - (size - 1) / 2) / (size / 2)
    x, y = np.abs(np.meshgrid(x, x))
    if params.opening == "circle":
        outside = np.hypot(x, y) - 0.97
    else:
        outside = np.maximum(np.maximum(x, y) - 0.97, (x + y) / 2**0.5 - 1.10)
    return np.clip(0.5 - outside * size / 4, 0, 1).astype(np.float32)


def _sensor_noise(rng: np.random.Generator, level: float, size: int) -> np.ndarray:
    """(size, size, 3) float32 of deviation `level`: the sum of two even distributions, a triangle."""
    pair = rng.random((2, size, size, 3), dtype=np.float32)
    return (pair[0] + pair[1] - 1) * np.float32(6**0.5 * level)
