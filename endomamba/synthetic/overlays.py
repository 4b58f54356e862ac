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
            jaw = np.stack([tip - 0.16 * way, tip - 0.06 * way + side * (0.025 + gape) * across, tip + side * 0.4 * gape * across])
            stroke(jaw, 0.020, METAL)
        stroke(_line(port, tip - 0.14 * way, 6), SHAFT, SHEATH)
    else:
        out = np.clip((view.tool - 0.45) / 0.55, 0, 1) * 1.15 * polyp.radius
        if out > 0.02:
            turn = np.linspace(0, 2 * np.pi, 15)[:, None]
            lift = np.cross(way, across)
            loop = tip + 0.5 * out * way + out * (0.75 * np.cos(turn) * way + np.sin(turn) * (0.8 * across + 0.3 * lift))
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
    pixels = scene.lens.pixels(points)
    far = np.sqrt((points**2).sum(1))
    widths = np.maximum(radius / far * scene.lens.pixels_a_radian, 0.7)
    for i in range(len(points) - 1):
        a, b = pixels[i], pixels[i + 1]
        margin = max(widths[i], widths[i + 1]) + 1
        left, top = (int(np.clip(low, 0, size)) for low in np.floor(np.minimum(a, b) - margin))
        right, bottom = (int(np.clip(high, 0, size)) for high in np.ceil(np.maximum(a, b) + margin) + 1)
        if right <= left or bottom <= top:
            continue
        x = (np.arange(left, right, dtype=np.float32) - np.float32(a[0]))[None]
        y = (np.arange(top, bottom, dtype=np.float32) - np.float32(a[1]))[:, None]
        dx, dy = np.float32(b - a)
        u = np.clip((x * dx + y * dy) / np.float32(dx * dx + dy * dy + 1e-6), 0, 1)
        off = np.sqrt((x - u * dx) ** 2 + (y - u * dy) ** 2)
        width = np.float32(widths[i]) + u * np.float32(widths[i + 1] - widths[i])
        alpha = np.clip(width - off + np.float32(0.5), 0, 1)
        bulge = np.clip(1 - (off / width) ** 2, 0, 1)
        light = np.float32(exposure) / (np.float32(0.45) + (np.float32(far[i]) + u * np.float32(far[i + 1] - far[i])) ** 2)
        lit = light * (np.float32(0.25) + np.float32(0.75) * np.sqrt(bulge))
        reflex = light * np.float32(0.5) * bulge**8
        for channel in range(3):
            part = rgb[channel, top:bottom, left:right]
            part += alpha * (np.float32(colour[channel]) * lit + reflex - part)
        cover[top:bottom, left:right] |= alpha > 0.5
