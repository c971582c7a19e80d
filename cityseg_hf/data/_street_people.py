"""People of the synthetic streets, on foot, on bicycles and on motorcycles."""

from collections.abc import Callable

import numpy as np

from cityseg_hf.data._street_canvas import Canvas, Color, radial_union
from cityseg_hf.data._street_vehicles import PAINTS, RUBBER, Pose, ground_shadow

CLOTHES: tuple[Color, ...] = (
    (32, 34, 40), (44, 52, 74), (96, 98, 104), (138, 44, 42), (60, 84, 62), (176, 168, 150), (52, 92, 140),
    (206, 204, 198), (112, 80, 56), (190, 120, 40), (84, 50, 92),
)  # fmt: skip
SKINS: tuple[Color, ...] = ((224, 178, 148), (200, 150, 116), (146, 100, 72), (96, 64, 48))

HAND = np.array([(0.0, 0.0), (0.0, 0.0), (0.0, 0.035), (0.0, 0.035)])
"""What makes the lower end of an arm a hand, in units of the height."""


def person(canvas: Canvas, rng: np.random.Generator, x: float, z: float, *, crowd: bool = False) -> bool:
    """Somebody who stands or walks; with ``crowd`` as part of an unnumbered group."""
    high = rng.uniform(1.55, 1.9) if rng.random() < 0.85 else rng.uniform(1.0, 1.4)
    stride, swing, fat = rng.uniform(0.0, 0.14), rng.uniform(0.0, 0.05), rng.uniform(0.9, 1.25)
    colors = [np.array(CLOTHES[int(i)]) * rng.uniform(0.8, 1.1) for i in rng.integers(len(CLOTHES), size=4)]
    top, trousers, hair, bag = colors
    skin = np.array(SKINS[int(rng.integers(len(SKINS)))])
    hip, shoulder = 0.09 * fat, 0.12 * fat
    turn = np.linspace(-0.4 * np.pi, 1.4 * np.pi, 10)
    head = np.stack([0.062 * np.cos(turn), 0.925 + 0.075 * np.sin(turn)], axis=1)
    # The right half in units of the height, from the crotch over foot, hip, armpit and hand to the shoulder.
    leg = np.array(
        [(0.01, 0.45), (stride, 0.03), (stride, 0.0), (stride + 0.09, 0.0), (stride + 0.08, 0.06), (hip, 0.48)]
    )
    hand = shoulder + 0.02 + swing
    arm = np.array(
        [(hip + 0.015, 0.7), (hand - 0.02, 0.42), (hand + 0.03, 0.43), (shoulder + 0.035, 0.74), (shoulder, 0.815)]
    )
    mirror = np.array([-1.0, 1.0])
    outline = np.concatenate([leg, arm, head, arm[::-1] * mirror, leg[::-1] * mirror])

    def place(points: np.ndarray) -> np.ndarray:
        flat = points * high
        return canvas.camera.project(np.column_stack([x + flat[:, 0], flat[:, 1], np.full(len(flat), z)]))

    ground_shadow(canvas, Pose(x, z, 0.0), 0.28, 0.35)
    if not canvas.stamp("persongroup" if crowd else "person", place(outline), top, z):
        return False
    for sign, shade in ((1.0, 1.0), (-1.0, 0.88)):
        side = np.array([sign, 1.0])
        canvas.paint(place(leg * side), trousers, z, shade)
        canvas.paint(place(leg[1:5] * side * (1, 0.6)), (36, 32, 30), z)
        canvas.paint(place(arm * side), top, z, 0.86 * shade)
        canvas.paint(place(arm[[1, 2, 2, 1]] * side + HAND), skin, z)
    canvas.paint(place(head), skin, z)
    canvas.paint(place(head[head[:, 1] > 0.94]), hair, z, 0.7)
    if rng.random() < 0.3:  # a bag across the chest
        canvas.paint(place(np.array([(-hip, 0.5), (-hip * 0.2, 0.5), (-hip * 0.2, 0.62), (-hip, 0.62)])), bag, z)
    return True


def _limb(a: tuple[float, float], b: tuple[float, float], width: float) -> np.ndarray:
    """A thick stroke ``float64[4, 2]`` between two points."""
    start, end = np.array(a), np.array(b)
    normal = np.array([start[1] - end[1], end[0] - start[0]])
    normal = normal / (np.linalg.norm(normal) + 1e-9) * width / 2
    return np.array([start - normal, start + normal, end + normal, end - normal])


def _disc(center: tuple[float, float], radius: float, squash: float = 1.0) -> np.ndarray:
    turn = np.linspace(0, 2 * np.pi, 18, endpoint=False)
    return np.stack([center[0] + radius * squash * np.cos(turn), center[1] + radius * np.sin(turn)], axis=1)


def two_wheeler(canvas: Canvas, rng: np.random.Generator, kind: str, x: float, z: float, *, ridden: bool) -> bool:
    """A bicycle or motorcycle, seen from the side or more from behind, and its rider if it is ridden."""
    squash = float(rng.uniform(0.35, 0.6) if ridden and rng.random() < 0.6 else rng.uniform(0.8, 1.0))
    facing = 1 if rng.random() < 0.5 else -1
    paint = np.array(PAINTS[int(rng.integers(len(PAINTS)))])
    motor = kind == "motorcycle"
    base, radius = (0.7, 0.32) if motor else (0.53, 0.34)
    thick = max(squash, 0.5)

    def place(points: np.ndarray) -> np.ndarray:
        """Local (along, up) metres -> image points, foreshortened."""
        flat = np.asarray(points, dtype=np.float64)
        world = np.stack([x + facing * squash * flat[:, 0], flat[:, 1], np.full(len(flat), z)], axis=1)
        return canvas.camera.project(world)

    wheels = [_disc((-base, radius), radius), _disc((base, radius), radius)]
    frame = np.array([(-base, radius), (-0.25, 0.95), (0.45, 1.05), (base, radius), (0.0, 0.25)])
    if motor:
        frame = np.array([(-0.85, 0.8), (-0.2, 0.85), (0.3, 1.0), (0.55, 1.1), (0.75, 0.55), (0.3, 0.2), (-0.4, 0.2)])
    ground_shadow(canvas, Pose(x, z, 0.0), base * squash * 1.2, 0.5)
    outline = radial_union([place(part) for part in (*wheels, frame)], place(np.array([(0.0, 0.5)]))[0])
    if not canvas.stamp(kind, outline, None, z):
        return False
    for wheel in wheels:
        if motor:
            canvas.paint(place(wheel), RUBBER, z)
            canvas.paint(place(wheel * 0.5 + wheel.mean(axis=0) * 0.5), (120, 122, 126), z)
        else:
            canvas.paint(place(wheel), (70, 72, 76), z, alpha=70)
            canvas.line(place(np.vstack([wheel, wheel[:1]])), RUBBER, z, 0.05)
    if motor:
        canvas.paint(place(frame), paint, z)
        canvas.paint(place(np.array([(-0.4, 0.2), (0.3, 0.2), (0.3, 0.6), (-0.4, 0.6)])), (52, 53, 56), z)
        canvas.paint(place(np.array([(-0.85, 0.8), (0.0, 0.8), (0.0, 0.93), (-0.85, 0.95)])), (26, 26, 28), z)
    else:
        for stroke in (((-base, radius), (0.0, 0.28), (0.42, 0.85), (-0.2, 0.82), (-base, radius)),
                       ((-0.26, 0.95), (0.0, 0.28)), ((base, radius), (0.4, 1.0), (0.3, 1.05))):  # fmt: skip
            canvas.line(place(np.array(stroke)), paint, z, 0.06)
        canvas.line(place(np.array([(-0.36, 0.97), (-0.14, 0.96)])), RUBBER, z, 0.09)
    if ridden:
        _rider(canvas, rng, place, z, motor, thick, paint)
    return True


def _rider(
    canvas: Canvas,
    rng: np.random.Generator,
    place: Callable[[np.ndarray], np.ndarray],
    z: float,
    motor: bool,
    thick: float,
    paint: Color,
) -> None:
    """Whoever rides; ``place`` takes (along, up) metres to the image, ``thick`` undoes what it squashes."""
    jacket, trousers = (np.array(CLOTHES[int(i)]) for i in rng.integers(len(CLOTHES), size=2))
    skin = np.array(SKINS[int(rng.integers(len(SKINS)))])
    hip, shoulder = (-0.22, 0.88 if motor else 0.98), (0.1, 1.42 if motor else 1.5)
    head = (0.2, shoulder[1] + 0.2)
    parts: list[tuple[np.ndarray, Color, float]] = [
        (_limb(hip, (0.22, 0.72), 0.2 / thick), trousers, 1.0),
        (_limb((0.22, 0.76), (0.04, 0.24), 0.15 / thick), trousers, 0.92),
        (_limb(hip, (shoulder[0] + 0.02, shoulder[1] + 0.06), 0.34 / thick), jacket, 1.0),
        (_limb(shoulder, (0.42, 1.06), 0.12 / thick), jacket, 0.84),
        (_disc(head, 0.14, 0.9 / thick), skin, 1.0),
    ]
    center = place(np.array([(0.0, 1.05)]))[0]
    canvas.stamp("rider", radial_union([place(part) for part, _, _ in parts], center), None, z)
    for part, color, shade in parts:
        canvas.paint(place(part), color, z, shade)
    helmet = _disc(head, 0.15, 0.9 / thick)
    canvas.paint(place(helmet[helmet[:, 1] >= head[1]]), paint, z, 0.9)
