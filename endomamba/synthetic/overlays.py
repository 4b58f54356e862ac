"""What is drawn on top of the wall at full size: bubbles and instruments.  They work on linear light, (3, h, w)."""

from __future__ import annotations

import numpy as np

from .anatomy import Anatomy
from .params import Params, uniform
from .procedure import View
from .scene import Scene

PORT = (0.30, 0.26, 0.10)  # where a tool leaves the endoscope, in the camera's coordinates
SHAFT = 0.050  # radius of a tool's sheath
SHEATH, METAL = (0.62, 0.66, 0.74), (0.55, 0.56, 0.58)


def scatter_bubbles(params: Params, rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    """Foam in patches on the wall: (n, 4), place (x, y, s) and radius of each bubble."""
    foam, patches = uniform(rng, params.foam), max(1, round(anatomy.length / 1.6))
    bubbles = []
    for _ in range(patches):
        s, theta = anatomy.length * rng.random(), 2 * np.pi * rng.random()
        for _ in range(round(foam * params.bubbles * rng.random() ** 2)):
            spread = rng.random() ** 0.7 * 0.5, 2 * np.pi * rng.random()
            radius = 0.015 + 0.045 * rng.random() ** 3
            place = anatomy.wall(s + spread[0] * np.cos(spread[1]), theta + spread[0] * np.sin(spread[1]), radius)
            bubbles.append([*place, radius])
    return np.array(bubbles).reshape(-1, 4)


def draw_bubbles(
    rgb: np.ndarray, scene: Scene, bubbles: np.ndarray, distance: np.ndarray, exposure: np.float32
) -> None:
    """Each a bright rim, thinner on one side, and the light's reflex; hidden behind what is nearer."""
    ahead = bubbles[(bubbles[:, 2] > scene.eye[2] + 0.05) & (bubbles[:, 2] < scene.eye[2] + 2.6)]
    if not len(ahead):
        return
    size = rgb.shape[1]
    pixels, far = scene.project(ahead[:, :3])
    for (x, y), d, radius in zip(pixels, far, ahead[:, 3]):
        r = radius / d * scene.lens.pixels_a_radian
        if not (r < x < size - r and r < y < size - r) or r < 0.8 or distance[int(y), int(x)] < d - 0.12:
            continue
        reach = int(r) + 2
        top, left = max(0, int(y) - reach), max(0, int(x) - reach)
        part = rgb[:, top : int(y) + reach + 1, left : int(x) + reach + 1]
        v = (np.arange(top, top + part.shape[1], dtype=np.float32) - np.float32(y))[:, None] / np.float32(r)
        u = (np.arange(left, left + part.shape[2], dtype=np.float32) - np.float32(x))[None] / np.float32(r)
        q = np.sqrt(u * u + v * v)
        rim = np.exp(-(((q - np.float32(0.85)) * 5) ** 2)) * (np.float32(0.6) + np.float32(0.4) * (u + v) / (q + 1))
        reflex = np.exp(-(((u + np.float32(0.35)) ** 2 + (v + np.float32(0.35)) ** 2) * 22))
        glow = float(exposure / (0.3 + d * d))
        part *= 1 - np.float32(0.12) * (q < 1)
        part += glow * (np.float32(0.30) * rim + np.float32(0.8) * reflex)


def draw_tool(
    rgb: np.ndarray, scene: Scene, view: View, kind: str, exposure: np.float32
) -> tuple[np.ndarray | None, tuple[float, float] | None]:
    """Forceps or a snare on its way from the port to the polyp.  -> (h, w) bool, what it hides, and its tip's pixel."""
    if view.tool <= 0 or view.polyp is None or view.polyp not in scene.polyps:
        return None, None
    polyp = scene.anatomy.polyps[view.polyp]
    goal = scene.to_camera(scene.head(view.polyp)[None])[0]
    goal = goal * (1 - 0.8 * polyp.height / np.sqrt((goal**2).sum()))
    port = np.array(PORT)
    tip = port + view.tool * (goal - port)
    way = (tip - port) / np.sqrt(((tip - port) ** 2).sum())
    across = np.cross(way, [0.3, -0.8, 0.5])
    across /= np.sqrt((across**2).sum())
    cover = np.zeros(rgb.shape[1:], bool)

    def stroke(points: np.ndarray, radius: float, colour: tuple[float, float, float]) -> None:
        _stroke(rgb, cover, scene, points, radius, colour, exposure)

    if kind == "forceps":
        gape = 0.10 * (1.1 - view.tool)
        for side in (-1, 1):
            jaw = np.stack(
                [tip - 0.16 * way, tip - 0.06 * way + side * (0.025 + gape) * across, tip + side * 0.4 * gape * across]
            )
            stroke(jaw, 0.020, METAL)
        stroke(_line(port, tip - 0.14 * way, 6), SHAFT, SHEATH)
    else:
        out = np.clip((view.tool - 0.45) / 0.55, 0, 1) * 1.15 * polyp.radius
        if out > 0.02:
            turn = np.linspace(0, 2 * np.pi, 15)[:, None]
            lift = np.cross(way, across)
            loop = (
                tip + 0.5 * out * way + out * (0.75 * np.cos(turn) * way + np.sin(turn) * (0.8 * across + 0.3 * lift))
            )
            stroke(loop, 0.016, METAL)
        stroke(_line(port, tip - 0.10 * way - 0.25 * out * way, 6), SHAFT, SHEATH)
    x, y = scene.lens.pixels(tip[None])[0]
    return cover, (float(x), float(y))


def _line(begin: np.ndarray, end: np.ndarray, count: int) -> np.ndarray:
    return begin + np.linspace(0, 1, count)[:, None] * (end - begin)


def _stroke(
    rgb: np.ndarray,
    cover: np.ndarray,
    scene: Scene,
    points: np.ndarray,
    radius: float,
    colour: tuple[float, float, float],
    exposure: np.float32,
) -> None:
    """A round rod along points (n, 3) of the camera's coordinates: lit from the camera, with a reflex along it."""
    size = rgb.shape[1]
    pixels = scene.lens.pixels(points).astype(np.float32)
    far = np.sqrt((points**2).sum(1)).astype(np.float32)
    widths = np.maximum(np.float32(radius * scene.lens.pixels_a_radian) / far, np.float32(0.7))
    margin = widths.max() + 1
    left, top = (int(np.clip(low, 0, size)) for low in np.floor(pixels.min(0) - margin))
    right, bottom = (int(np.clip(high, 0, size)) for high in np.ceil(pixels.max(0) + margin) + 1)
    if right <= left or bottom <= top:
        return
    x, y = np.arange(left, right, dtype=np.float32)[None], np.arange(top, bottom, dtype=np.float32)[:, None]
    # Of the nearest piece: how far a pixel is outside the rod, in pixels, and in widths of the rod; and its distance.
    outside, across, depth = (np.full((bottom - top, right - left), 1e6, np.float32) for _ in range(3))
    for a, b, w0, w1, z0, z1 in zip(pixels, pixels[1:], widths, widths[1:], far, far[1:]):
        dx, dy = b - a
        u = np.clip(((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy + np.float32(1e-6)), 0, 1)
        off, width = np.sqrt((x - a[0] - u * dx) ** 2 + (y - a[1] - u * dy) ** 2), w0 + u * (w1 - w0)
        nearer = off - width < outside
        np.copyto(outside, off - width, where=nearer)
        np.copyto(across, off / width, where=nearer)
        np.copyto(depth, z0 + u * (z1 - z0), where=nearer)
    alpha = np.clip(np.float32(0.5) - outside, 0, 1)
    bulge = np.clip(1 - across * across, 0, 1)
    light = exposure / (np.float32(0.45) + depth * depth)
    lit = light * (np.float32(0.25) + np.float32(0.75) * np.sqrt(bulge))
    reflex = light * np.float32(0.5) * bulge**8
    for channel in range(3):
        part = rgb[channel, top:bottom, left:right]
        part += alpha * (np.float32(colour[channel]) * lit + reflex - part)
    cover[top:bottom, left:right] |= alpha > 0.5
