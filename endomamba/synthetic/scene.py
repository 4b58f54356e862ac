"""The geometry of one frame: a signed distance, rays that march to where it is zero, and the lens that aims them.

The distance is that of the wall (bends and folds included) and of the polyps, joined by a smooth minimum, so that a
polyp grows out of the mucosa (https://iquilezles.org/articles/smin).  Arrays of points are (3, n), float32.
"""

from __future__ import annotations

import numpy as np

from .anatomy import BEFORE, STEPS, Anatomy, Polyp
from .procedure import View

# Rays march in rounds; those that arrived leave after each.  A stride below 1: folds are steeper than 45 degrees.
ROUNDS, STRIDE, ARRIVED, FAR = (8, 6, 8, 8, 10), np.float32(0.65), 2e-3, np.float32(9.0)
BLEND = np.float32(0.07)  # radii over which a polyp and the wall flow into each other
LOOK_AHEAD = 5.5  # polyps farther away than this are not drawn: too dark


class Lens:
    """A fisheye: the angle from the axis grows evenly with the distance from the middle of the picture."""

    def __init__(self, field_of_view: float, size: int) -> None:
        self.size, self.middle = size, (size - 1) / 2
        self.pixels_a_radian = size / field_of_view

    def rays(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Pixel coordinates (n,) -> unit directions (3, n), float32, the axis being z."""
        x, y = x - self.middle, y - self.middle
        rho = np.hypot(x, y)
        angle = np.minimum(rho / self.pixels_a_radian, 2.6)
        scale = np.sin(angle) / np.maximum(rho, 1e-9)
        return np.stack([x * scale, y * scale, np.cos(angle)]).astype(np.float32)

    def pixels(self, directions: np.ndarray) -> np.ndarray:
        """Directions (n, 3) of any length -> pixels (n, 2), x first."""
        across = np.hypot(directions[:, 0], directions[:, 1])
        rho = np.arctan2(across, directions[:, 2]) * self.pixels_a_radian
        return directions[:, :2] * (rho / np.maximum(across, 1e-9))[:, None] + self.middle


class Scene:
    """The colon as one View has it.  polyps: the indices of those that are there and near enough to be drawn."""

    def __init__(self, anatomy: Anatomy, view: View, lens: Lens) -> None:
        self.anatomy, self.lens = anatomy, lens
        self.eye = np.array([view.x, view.y, view.depth])
        self.heading = anatomy.heading(view.depth)
        self.rotation = _rotation(view)
        near = [i for i, p in enumerate(anatomy.polyps) if -0.4 < p.s - view.depth < LOOK_AHEAD]
        self.polyps = [i for i in near if not view.removed[i]]
        self.wounds = [i for i in near if view.removed[i]]
        self._shapes = [_Shape(anatomy.polyps[i], anatomy) for i in self.polyps]

    def aim(self, rays: np.ndarray) -> np.ndarray:
        """Directions of the camera -> unit directions of the world."""
        r, (hx, hy) = self.rotation.astype(np.float32), (np.float32(slope) for slope in self.heading)
        x, y, z = (r[i, 0] * rays[0] + r[i, 1] * rays[1] + r[i, 2] * rays[2] for i in range(3))
        aimed = np.stack([x + z * hx, y + z * hy, z])
        aimed /= np.sqrt((aimed * aimed).sum(0))
        return aimed

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """World points (n, 3) -> the camera's coordinates; the inverse of `aim` and the eye."""
        v = np.asarray(points, float) - self.eye
        x, y = v[:, 0] - v[:, 2] * self.heading[0], v[:, 1] - v[:, 2] * self.heading[1]
        return np.stack([x, y, v[:, 2]], 1) @ self.rotation

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """World points (n, 3) -> pixels (n, 2), x first, and distances from the eye (n,)."""
        points = np.asarray(points, float)
        return self.lens.pixels(self.to_camera(points)), np.sqrt(((points - self.eye) ** 2).sum(1))

    def head(self, i: int) -> np.ndarray:
        """The middle of the head of polyp i, one of `polyps`."""
        return self._shapes[self.polyps.index(i)].centre.astype(float)

    def wall(self, p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """-> distance to the wall, cos and sin of theta, distance from the centre line."""
        at = ((p[2] + np.float32(BEFORE)) * np.float32(STEPS)).astype(np.intp)
        x, y, r0, r1, r2, r3, r4 = (row.take(at, mode="clip") for row in self.anatomy.table)
        x, y = p[0] - x, p[1] - y
        r = np.sqrt(x * x + y * y) + np.float32(1e-6)
        c, s = x / r, y / r
        radius = r0 + c * (r1 + r3 * (4 * (c * c) - 3)) + s * (r2 + r4 * (3 - 4 * (s * s)))
        return radius - r, c, s, r

    def lumps(self, p: np.ndarray) -> list[np.ndarray]:
        """Distances to each of `polyps`."""
        return [shape.distance(p) for shape in self._shapes]

    def near_polyps(self, rays: np.ndarray) -> np.ndarray:
        """(n,) bool: the rays that come close to a polyp; the others need not ask for its distance."""
        near = np.zeros(rays.shape[1], bool)
        for shape in self._shapes:
            v = (shape.middle - self.eye).astype(np.float32)
            along = v[0] * rays[0] + v[1] * rays[1] + v[2] * rays[2]
            near |= (v * v).sum() - along * np.abs(along) < shape.reach**2
        return near

    def chart(self, k: int, p: np.ndarray) -> np.ndarray:
        """Texture coordinates on the k-th of `polyps`, which the wall's would stretch: (3, n), cos, sin of theta, v."""
        shape = self._shapes[k]
        v = p - shape.base[:, None]
        up = shape.axis[0] * v[0] + shape.axis[1] * v[1]
        theta = np.float32(shape.polyp.theta) + shape.axis[1] * v[0] - shape.axis[0] * v[1]
        return np.stack([np.cos(theta), np.sin(theta), p[2] + up])

    def distance(self, p: np.ndarray, near: np.ndarray) -> np.ndarray:
        """From p to wall and polyps; near: the indices of the points for which polyps matter."""
        d = self.wall(p)[0]
        if not len(near):
            return d
        some, nearest = p[:, near], d[near]
        for lump in self.lumps(some):
            h = (lump - nearest) * (np.float32(0.5) / BLEND) + np.float32(0.5)
            np.clip(h, 0, 1, out=h)
            nearest = lump + (nearest - lump) * h - BLEND * (h * (1 - h))
        d[near] = nearest
        return d

    def march(self, rays: np.ndarray, near: np.ndarray) -> np.ndarray:
        """World directions (3, n), near_polyps of them -> how far each goes until it meets something, at most FAR."""
        t = np.full(rays.shape[1], 0.05, np.float32)
        left = np.arange(rays.shape[1])
        eye = self.eye.astype(np.float32)[:, None]
        for steps in ROUNDS:
            some, way, close = rays[:, left], t[left], np.flatnonzero(near[left])
            for _ in range(steps):
                gap = self.distance(some * way + eye, close)
                way += STRIDE * gap
                np.minimum(way, FAR, out=way)
            t[left] = way
            left = left[(gap > ARRIVED) & (way < FAR)]
            if not len(left):
                break
        return t

    def normals(self, p: np.ndarray, near: np.ndarray) -> np.ndarray:
        """Unit vectors away from the surface at p, by forward differences."""
        here = self.distance(p, near)
        step = np.float32(0.012)
        normal = np.empty_like(p)
        for axis in range(3):
            moved = p.copy()
            moved[axis] += step
            np.subtract(self.distance(moved, near), here, out=normal[axis])
        for shape in self._shapes:
            shape.roughen(p, normal, step)
        normal /= np.sqrt((normal * normal).sum(0)) + np.float32(1e-9)
        return normal


class _Shape:
    """A polyp: an ellipsoid, on a stalk where it has one.  base: where it leaves the wall; axis: into the lumen."""

    def __init__(self, polyp: Polyp, anatomy: Anatomy) -> None:
        self.polyp = polyp
        self.base = anatomy.wall(polyp.s, polyp.theta).astype(np.float32)
        self.axis = -np.array([np.cos(polyp.theta), np.sin(polyp.theta), 0], np.float32)
        lift = polyp.stalk + polyp.height if polyp.stalk else 0.15 * polyp.height
        self.centre = self.base + np.float32(lift) * self.axis
        self.centre[2] -= np.float32(0.5 * polyp.stalk)  # a stalk hangs towards the camera
        self.middle = 0.5 * (self.base + self.centre)  # of a sphere that holds the polyp and what flows into it
        self.reach = float(np.sqrt(((self.centre - self.base) ** 2).sum()) / 2 + polyp.radius + 0.1)
        r, h = np.float32(polyp.radius), np.float32(polyp.height)
        self._r2, self._h2, self._r4, self._h4 = 1 / r**2, 1 / h**2, 1 / r**4, 1 / h**4
        self._stalk = self.centre - self.base
        self._stalk_radius = np.float32(0.3) * r

    def distance(self, p: np.ndarray) -> np.ndarray:
        """Of the ellipsoid the usual first-order bound, |x| (|x| - 1) / |grad|, with x scaled by the half axes."""
        x, y, z = p[0] - self.centre[0], p[1] - self.centre[1], p[2] - self.centre[2]
        up = self.axis[0] * x + self.axis[1] * y
        up *= up
        side = x * x + y * y + z * z - up
        k = np.sqrt(side * self._r2 + up * self._h2)
        d = k * (k - 1) / (np.sqrt(side * self._r4 + up * self._h4) + np.float32(1e-6))
        if not self.polyp.stalk:
            return d
        b = self._stalk
        x, y, z = p[0] - self.base[0], p[1] - self.base[1], p[2] - self.base[2]
        u = np.clip((x * b[0] + y * b[1] + z * b[2]) / (b * b).sum(), 0, 1)
        x, y, z = x - b[0] * u, y - b[1] * u, z - b[2] * u
        return np.minimum(d, np.sqrt(x * x + y * y + z * z) - self._stalk_radius)

    def roughen(self, p: np.ndarray, normal: np.ndarray, step: np.float32) -> None:
        """Lobes of the head, in the normals alone: the slope of sin x sin y sin z, near the polyp."""
        if not self.polyp.lobes:
            return
        near = np.flatnonzero(np.abs(p - self.centre[:, None]).max(0) < 1.6 * self.polyp.radius)
        wave = np.float32(9.0 / self.polyp.radius / 2)
        v = (p[:, near] - self.centre[:, None]) * wave
        sines, cosines = np.sin(v), np.cos(v)
        height = step * np.float32(self.polyp.lobes) * wave * np.float32(self.polyp.radius)
        normal[0, near] -= height * cosines[0] * sines[1] * sines[2]
        normal[1, near] -= height * sines[0] * cosines[1] * sines[2]
        normal[2, near] -= height * sines[0] * sines[1] * cosines[2]


def _rotation(view: View) -> np.ndarray:
    """(3, 3): directions of the camera to directions along the colon."""
    cy, sy, cp, sp = np.cos(view.yaw), np.sin(view.yaw), np.cos(view.pitch), np.sin(view.pitch)
    cr, sr = np.cos(view.roll), np.sin(view.roll)
    yaw = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    roll = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return yaw @ pitch @ roll
