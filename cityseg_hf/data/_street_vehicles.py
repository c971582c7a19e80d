"""Cars, trucks, buses, trams, bicycles and motorcycles of the synthetic streets."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cityseg_hf.data._street_canvas import CAMERA_HEIGHT, Canvas, Color, convex_hull, radial_union

GLASS: Color = (38, 46, 54)
RUBBER: Color = (24, 24, 26)
PAINTS: tuple[Color, ...] = (
    (28, 29, 32), (36, 38, 44), (150, 153, 156), (182, 184, 186), (214, 214, 212), (92, 96, 101), (60, 64, 70),
    (24, 42, 92), (40, 78, 132), (132, 24, 26), (168, 40, 34), (44, 70, 52), (122, 102, 76), (196, 160, 60),
)  # fmt: skip
BUS_PAINTS: tuple[Color, ...] = ((206, 160, 34), (176, 34, 36), (216, 214, 208), (46, 96, 160), (90, 140, 70))


class Pose(NamedTuple):
    """Where an object stands: ground point and heading (0: we see its back, pi: its front)."""

    x: float
    z: float
    heading: float

    def world(self, local: np.ndarray) -> np.ndarray:
        """Local metres ``float[..., 3]`` (u across, v up, w ahead) -> world metres ``float[..., 3]``."""
        cos, sin = np.cos(self.heading), np.sin(self.heading)
        u, v, w = local[..., 0], local[..., 1], local[..., 2]
        return np.stack([self.x + u * cos + w * sin, v, self.z + w * cos - u * sin], axis=-1)


class Box(NamedTuple):
    """A box with sloping walls: (half width, rear w, front w) at the bottom and at the top; heights of the two."""

    bottom: tuple[float, float, float]
    top: tuple[float, float, float]
    low: float
    high: float

    def corners(self) -> np.ndarray:
        """``float64[8, 3]``: rear left, rear right, front right, front left, below and then above."""
        rings = [
            [(-half, level, rear), (half, level, rear), (half, level, front), (-half, level, front)]
            for (half, rear, front), level in ((self.bottom, self.low), (self.top, self.high))
        ]
        return np.array(rings, dtype=np.float64).reshape(8, 3)


_FACES = {"rear": (0, 1, 5, 4), "right": (1, 2, 6, 5), "front": (2, 3, 7, 6), "left": (3, 0, 4, 7), "top": (4, 5, 6, 7)}
"""Corners of a box's faces, counter-clockwise from the lower left as seen from outside."""


class Face(NamedTuple):
    """A face of a box that the camera sees."""

    name: str
    corners: np.ndarray
    """``float64[4, 3]``, world."""
    shade: float

    def panels(self, spots: np.ndarray) -> np.ndarray:
        """World corners of rectangles on the face.

        Args:
            spots: ``float[N, 4]``: u0, v0, u1, v1 of each, from (0, 0), the lower left of the face, to (1, 1).

        Returns:
            ``float64[N, 4, 3]``.
        """
        u, v = spots[:, [0, 2, 2, 0], None], spots[:, [1, 1, 3, 3], None]
        a, b, c, d = self.corners
        return (1 - v) * (a + u * (b - a)) + v * (d + u * (c - d))


def visible_faces(box: Box, pose: Pose, sun_side: int) -> list[Face]:
    """The faces turned to the camera, the farthest first."""
    quads = pose.world(box.corners())[list(_FACES.values())]
    normals = np.cross(quads[:, 3] - quads[:, 0], quads[:, 1] - quads[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    middles = quads.mean(axis=1)
    turned = (normals * (np.array([0.0, CAMERA_HEIGHT, 0.0]) - middles)).sum(axis=1) > 0
    shades = (0.8 + 0.35 * normals @ np.array([sun_side * 0.5, 0.75, -0.35])).tolist()
    faces = zip(_FACES, quads, shades, turned, middles[:, 2], strict=True)
    seen = sorted((face for face in faces if face[3]), key=lambda face: -face[4])
    return [Face(name, quad, shade) for name, quad, shade, _, _ in seen]


def _panels(canvas: Canvas, face: Face, depth: float, spots: Sequence[tuple[Color, tuple[float, ...]]]) -> None:
    """Paints coloured rectangles on a face."""
    if spots:
        corners = canvas.camera.project(face.panels(np.array([spot for _, spot in spots], dtype=np.float64)))
        for (color, _), points in zip(spots, corners, strict=True):
            canvas.paint(points, color, depth, face.shade)


_TURN = np.linspace(0, 2 * np.pi, 14, endpoint=False)
_TYRE, _RIM = 1.05, 0.6


def _wheels(canvas: Canvas, pose: Pose, face: Face, half: float, axles: Sequence[float], radius: float) -> None:
    """Paints the wheels on a side face."""
    rings = np.empty((len(axles), 2, 14, 3))
    rings[..., 0] = half if face.name == "right" else -half
    size = np.array([_TYRE, _RIM])[:, None]
    rings[..., 1] = np.maximum(radius * (1 + size * np.sin(_TURN)), 0.0)
    rings[..., 2] = np.asarray(axles)[:, None, None] + radius * size * np.cos(_TURN)
    for tyre, rim in canvas.camera.project(pose.world(rings)):
        canvas.paint(tyre, RUBBER, pose.z)
        canvas.paint(rim, (128, 130, 134), pose.z)


_OVAL = np.stack([np.cos(_TURN), 0 * _TURN, np.sin(_TURN)], axis=1)
_OVAL = np.sign(_OVAL) * np.abs(_OVAL) ** 0.8


def ground_shadow(canvas: Canvas, pose: Pose, half: float, length: float) -> None:
    """The dark patch below an object, longer on the side away from the sun."""
    wide = half * canvas.metres(pose.z)
    if wide < 1:
        return
    rings = ((1.25, 60), (1.1, 90), (1.0, 110)) if wide > 12 else ((1.15, 150),)
    for grow, alpha in rings:
        points = pose.world(_OVAL * np.array([half * 1.2, 0.0, length / 2]) * grow)
        points[:, 0] -= canvas.light.sun_side * canvas.light.contrast * 1.4 * (grow - 1)
        canvas.paint(canvas.camera.project(points), (16, 16, 20), 0.0, alpha=alpha)


def _car_boxes(rng: np.random.Generator) -> tuple[Box, Box]:
    """Body and cabin of a hatchback, saloon, estate or van."""
    style = int(rng.integers(4))
    half = rng.uniform(0.86, 0.94)
    rear, front = -rng.uniform(1.9, 2.25), rng.uniform(1.95, 2.3)
    belt = (0.9, 0.88, 0.92, 1.05)[style] + rng.uniform(-0.04, 0.06)
    roof = (1.48, 1.43, 1.5, 1.9)[style] + rng.uniform(-0.04, 0.06)
    tail = (0.05, 0.75, 0.05, 0.02)[style]
    nose = (1.15, 1.2, 1.2, 0.7)[style]
    body = Box((half - 0.05, rear + 0.06, front - 0.06), (half, rear, front), 0.08, belt)
    cabin = Box(
        (half - 0.03, rear + tail, front - nose),
        (half - 0.2, rear + tail + (0.4, 0.5, 0.25, 0.12)[style], front - nose - (0.75, 0.75, 0.8, 0.5)[style]),
        belt,
        roof,
    )
    return body, cabin


def _car_details(canvas: Canvas, rng: np.random.Generator, face: Face, depth: float) -> None:
    """Lamps, bumpers, number plate and sills on one face of a car's body."""
    dark = (34, 35, 38)
    lamp = (230, 40, 32) if rng.random() < 0.4 else (142, 22, 24)
    if face.name == "rear":
        spots = [(dark, (0.02, 0.0, 0.98, 0.27)), (lamp, (0.01, 0.58, 0.19, 0.86)), (lamp, (0.81, 0.58, 0.99, 0.86)),
                 (dark, (0.32, 0.4, 0.68, 0.6)), ((222, 222, 216), (0.35, 0.43, 0.65, 0.57))]  # fmt: skip
    elif face.name == "front":
        light = (246, 244, 224) if rng.random() < 0.4 else (206, 210, 214)
        spots = [(dark, (0.05, 0.0, 0.95, 0.22)), (dark, (0.24, 0.36, 0.76, 0.68)), (light, (0.03, 0.55, 0.22, 0.78)),
                 (light, (0.78, 0.55, 0.97, 0.78)), ((222, 222, 216), (0.37, 0.26, 0.63, 0.38))]  # fmt: skip
    elif face.name in ("left", "right"):
        spots = [(dark, (0.02, 0.0, 0.98, 0.16)), (dark, (0.485, 0.16, 0.492, 0.95)), (dark, (0.7, 0.16, 0.705, 0.95))]
    else:
        spots = []
    _panels(canvas, face, depth, spots)


def car(canvas: Canvas, rng: np.random.Generator, pose: Pose, *, crowd: bool = False) -> bool:
    """A passenger car, parked or driving; with ``crowd`` as part of an unnumbered group."""
    paint = np.array(PAINTS[int(rng.integers(len(PAINTS)))]) + rng.uniform(-10, 10)
    if not canvas.sees(pose.x, max(1.0, pose.z - 2.4), 2.5):
        return False
    near = canvas.metres(pose.z) > 7
    body, cabin = _car_boxes(rng)
    project = canvas.camera.project
    hulls = [convex_hull(project(pose.world(box.corners()))) for box in (body, cabin)]
    wheel_box = Box((body.bottom[0], -1.7, 1.75), (body.bottom[0], -1.7, 1.75), 0.0, 0.3)
    hulls.append(convex_hull(project(pose.world(wheel_box.corners()))))
    center = project(pose.world(np.array([0.0, body.high, (cabin.bottom[1] + cabin.bottom[2]) / 2])))
    ground_shadow(canvas, pose, body.top[0], 4.4)
    if not canvas.stamp("cargroup" if crowd else "car", radial_union(hulls, center), (18, 18, 20), pose.z):
        return False
    for face in visible_faces(body, pose, canvas.light.sun_side):
        canvas.paint(project(face.corners), paint, pose.z, face.shade)
        if near:
            _car_details(canvas, rng, face, pose.z)
        if near and face.name in ("left", "right"):
            _wheels(canvas, pose, face, body.top[0], (-1.35, 1.4), 0.32)
    for face in visible_faces(cabin, pose, canvas.light.sun_side):
        canvas.paint(project(face.corners), paint, pose.z, face.shade)
        side = face.name in ("left", "right")
        panes = ((0.06, 0.1, 0.47, 0.88), (0.52, 0.1, 0.93, 0.88)) if side else ((0.06, 0.1, 0.94, 0.9),)
        if face.name != "top":
            spots: list[tuple[Color, tuple[float, ...]]] = [(GLASS, pane) for pane in panes]
            if near and not side:
                spots.append(((96, 108, 118), (0.1, 0.62, 0.9, 0.86)))  # the sky in the glass
            _panels(canvas, face, pose.z, spots)
    return True


class _Big(NamedTuple):
    half: float
    length: float
    high: float
    low: float


_BIG = {
    "truck": _Big(1.22, 8.5, 3.4, 0.9),
    "bus": _Big(1.26, 11.5, 3.05, 0.3),
    "train": _Big(1.25, 24.0, 3.45, 0.3),
    "caravan": _Big(1.1, 5.2, 2.55, 0.45),
    "trailer": _Big(1.1, 5.0, 1.5, 0.5),
}


def _big_details(canvas: Canvas, kind: str, face: Face, depth: float, trim: Color) -> None:
    """Windows, lamps and stripes on one face of a long vehicle."""
    pane = (46, 54, 62)
    spots: list[tuple[Color, tuple[float, ...]]] = []
    if face.name in ("left", "right"):
        if kind in ("bus", "train"):
            count = 7 if kind == "bus" else 12
            spots.append((GLASS, (0.02, 0.44, 0.98, 0.86)))
            spots += [(pane, ((i + 0.14) / count, 0.48, (i + 0.86) / count, 0.83)) for i in range(count)]
            spots += [((28, 30, 34), (door, 0.06, door + 0.08, 0.84)) for door in (0.12, 0.46, 0.8)]
            spots.append((trim, (0.0, 0.2, 1.0, 0.28)))
        elif kind == "truck":
            spots.append((trim, (0.08, 0.3, 0.92, 0.7)))
            spots += [((120, 122, 124), (i / 9, 0.0, i / 9 + 0.006, 1.0)) for i in range(1, 9)]
        elif kind == "caravan":
            spots += [(GLASS, (0.14, 0.5, 0.38, 0.78)), (GLASS, (0.6, 0.5, 0.86, 0.78)), (trim, (0, 0.3, 1, 0.36))]
    elif face.name in ("rear", "front"):
        lamp = (190, 30, 26) if face.name == "rear" else (240, 238, 214)
        spots += [(lamp, (0.03, 0.06, 0.15, 0.16)), (lamp, (0.85, 0.06, 0.97, 0.16))]
        if kind in ("bus", "train"):
            low = 0.5 if face.name == "rear" else 0.34
            spots += [(GLASS, (0.06, low, 0.94, 0.86)), (pane, (0.1, low + 0.2, 0.9, 0.84)),
                      ((16, 16, 16), (0.15, 0.88, 0.85, 0.98)), ((232, 150, 40), (0.3, 0.9, 0.7, 0.96))]  # fmt: skip
        elif kind == "truck" and face.name == "rear":
            spots += [(trim, (0.06, 0.22, 0.485, 0.95)), (trim, (0.515, 0.22, 0.94, 0.95))]
        elif kind == "truck":
            spots += [(GLASS, (0.08, 0.46, 0.92, 0.86)), ((40, 42, 44), (0.2, 0.14, 0.8, 0.36))]
        elif kind == "caravan":
            spots += [(GLASS, (0.2, 0.5, 0.8, 0.78)), (trim, (0, 0.3, 1, 0.36))]
    _panels(canvas, face, depth, spots)


def big_vehicle(canvas: Canvas, rng: np.random.Generator, kind: str, pose: Pose) -> bool:
    """A truck, bus, train (a tram), caravan or trailer; ``pose`` is the middle of its near end."""
    spec = _BIG[kind]
    paint = np.array(BUS_PAINTS[int(rng.integers(len(BUS_PAINTS)))]) * rng.uniform(0.8, 1.05)
    if kind in ("caravan", "trailer"):
        paint = np.array((220, 218, 210)) * rng.uniform(0.55, 1.0)
    trim = np.array(PAINTS[int(rng.integers(len(PAINTS)))])
    rear = 0.0 if abs(pose.heading) < 1 else -spec.length  # the near end is the rear one or the front one
    ends = (rear, rear + spec.length)
    boxes = [Box((spec.half, *ends), (spec.half, *ends), spec.low, spec.high)]
    if kind == "truck":
        boxes = [
            Box((1.2, ends[0], ends[1] - 2.4), (1.2, ends[0], ends[1] - 2.4), spec.low, spec.high),
            Box((1.15, ends[1] - 2.2, ends[1]), (1.1, ends[1] - 2.2, ends[1] - 0.3), 0.4, 2.7),
        ]
        if abs(pose.heading) < 1:
            boxes.reverse()
    under = Box((spec.half - 0.08, ends[0] + 0.3, ends[1] - 0.3), (spec.half - 0.08, ends[0] + 0.3, ends[1]), 0.0, 1.0)
    project = canvas.camera.project
    points = np.concatenate([pose.world(box.corners()) for box in (*boxes, under)])
    middle = pose.world(np.array([0.0, 0.0, sum(ends) / 2]))
    ground_shadow(canvas, Pose(middle[0], middle[2], pose.heading), 1.2, spec.length)
    if not canvas.stamp(kind, convex_hull(project(points)), (26, 26, 29), pose.z):
        return False
    axles = [ends[0] + 0.5 * spec.length]
    if kind in ("truck", "bus"):
        axles = [ends[0] + part * spec.length for part in (0.18, 0.3, 0.8)]
    for box in boxes:
        color = paint if kind != "truck" or box.low < 0.5 else np.array((196, 196, 192)) * (0.7 + 0.3 * trim[0] / 255)
        for face in visible_faces(box, pose, canvas.light.sun_side):
            canvas.paint(project(face.corners), color, pose.z, face.shade)
            _big_details(canvas, kind, face, pose.z, trim)
            if kind != "train" and face.name in ("left", "right"):
                inside = [axle for axle in axles if box.bottom[1] <= axle <= box.bottom[2]]
                _wheels(canvas, pose, face, spec.half, inside, 0.46)
    return True
