"""Houses, walls, fences, trees, poles, signs and traffic lights of the synthetic streets."""

from itertools import pairwise

import numpy as np

from cityseg_hf.data._street_canvas import Canvas, Color, convex_hull
from cityseg_hf.data._street_vehicles import GLASS, PAINTS, Pose, ground_shadow

FACADES: tuple[Color, ...] = (
    (186, 172, 146), (204, 194, 176), (150, 90, 70), (128, 74, 60), (170, 168, 164), (196, 164, 116), (176, 140, 122),
    (124, 126, 130), (212, 208, 198), (140, 152, 150), (164, 118, 84), (104, 96, 90),
)  # fmt: skip
METAL: Color = (112, 116, 118)


def wall_points(x: float, z0: float, z1: float, low: float, high: float) -> np.ndarray:
    """World corners ``float64[4, 3]`` of an upright rectangle along the street."""
    return np.array([(x, low, z0), (x, low, z1), (x, high, z1), (x, high, z0)])


def front_points(x0: float, x1: float, z: float, low: float, high: float) -> np.ndarray:
    """World corners ``float64[4, 3]`` of an upright rectangle that faces the camera."""
    return np.array([(x0, low, z), (x1, low, z), (x1, high, z), (x0, high, z)])


def ground_points(x0: float, x1: float, z0: float, z1: float) -> np.ndarray:
    """World corners ``float64[4, 3]`` of a patch of ground."""
    return np.array([(x0, 0.0, z0), (x1, 0.0, z0), (x1, 0.0, z1), (x0, 0.0, z1)])


def building(canvas: Canvas, rng: np.random.Generator, x: float, z0: float, z1: float, high: float) -> None:
    """A house whose front runs along the street at ``x`` from ``z0`` to ``z1``, ``high`` metres up to the eaves."""
    side = 1 if x > 0 else -1
    plaster = np.array(FACADES[int(rng.integers(len(FACADES)))]) * rng.uniform(0.75, 1.05)
    roof = np.array(((118, 62, 48), (74, 70, 72), (92, 84, 78))[int(rng.integers(3))])
    lit = 1.0 + canvas.light.contrast * (0.12 if side != canvas.light.sun_side else -0.3)
    ridge = high + (rng.uniform(1.5, 3.5) if rng.random() < 0.6 else 0.0)
    gable = np.array(
        [(x, 0, z0), (x, high, z0), (x + side * 4.5, ridge, z0), (x + side * 9, high, z0), (x + side * 9, 0, z0)]
    )
    front = wall_points(x, z0, z1, 0.0, high)
    slope = np.array([(x, high, z0), (x, high, z1), (x + side * 4.5, ridge, z1), (x + side * 4.5, ridge, z0)])
    project = canvas.camera.project
    hull = convex_hull(project(np.concatenate([gable, front, slope])))
    style = rng.random()
    if not canvas.stamp("building", hull, roof, z0, lit):
        return
    canvas.paint(project(gable), plaster, z0, 0.72 + 0.1 * canvas.light.contrast)
    # A long front fades into the haze in steps.
    for start, end in pairwise(np.linspace(z0, z1, 4).tolist()):
        canvas.paint(project(wall_points(x, start, end, 0, high)), plaster, (start + end) / 2, lit)
    inner, outer = project(np.array([(x, 0.0, z1), (x, 0.0, z0)]))[:, 0]
    if abs(outer - inner) < 6 or max(inner, outer) < 0 or min(inner, outer) > canvas.width:
        return  # too slanted or too far aside for any detail
    if style < 0.4:
        _courses(canvas, x, z0, z1, high, plaster * 0.82 * lit)
    _windows(canvas, rng, x, z0, z1, high, plaster, lit)
    _ground_floor(canvas, rng, x, z0, z1, plaster, lit)
    _gable_windows(canvas, rng, x, z0, high)


def _courses(canvas: Canvas, x: float, z0: float, z1: float, high: float, color: np.ndarray) -> None:
    """Courses of bricks or boards, as far as they can be told apart."""
    for level in np.arange(0.3, high, 0.3):
        reach = min(z1, canvas.camera.focal * 0.3 / 2.5)
        if reach <= z0:
            return
        canvas.line(canvas.camera.project(np.array([(x, level, z0), (x, level, reach)])), color, z0, 0.01, alpha=90)


def _panes(x: float, starts: np.ndarray, wide: float, lows: np.ndarray, tall: float) -> np.ndarray:
    """World corners ``float64[rows, columns, 4, 3]`` of a grid of rectangles along the street."""
    quads = np.empty((len(lows), len(starts), 4, 3))
    quads[..., 0] = x
    quads[..., 1] = lows[:, None, None] + np.array([0, 0, tall, tall])
    quads[..., 2] = starts[None, :, None] + np.array([0, wide, wide, 0])
    return quads


def _windows(
    canvas: Canvas, rng: np.random.Generator, x: float, z0: float, z1: float, high: float, wall: np.ndarray, lit: float
) -> None:
    """Rows of windows with frames, blinds, shutters and balconies, and cornices between the storeys."""
    storey, pitch = rng.uniform(2.9, 3.4), rng.uniform(1.9, 3.2)
    wide, tall = pitch * rng.uniform(0.42, 0.68), storey * rng.uniform(0.45, 0.62)
    frame = np.clip(wall * rng.uniform(0.6, 1.35), 0, 250)
    storeys, columns = max(1, int((high - 3.3) / storey)), max(1, int((z1 - z0) / pitch))
    glow = rng.random((storeys, columns))
    shutters, balcony = rng.random() < 0.25, rng.random() < 0.3
    project = canvas.camera.project
    lows = 3.7 + np.arange(storeys) * storey
    starts = z0 + (np.arange(columns) + 0.5) * (z1 - z0) / columns - wide / 2
    cornices = project(np.array([[(x, low - 0.45, z0), (x, low - 0.45, z1)] for low in lows]))
    for edge in cornices:
        canvas.line(edge, wall * 0.85, (z0 + z1) / 2, 0.08, alpha=150)
    outer = project(_panes(x, starts - 0.1, wide + 0.2, lows - 0.1, tall + 0.2))
    glass = project(_panes(x, starts, wide, lows, tall))
    bar = project(_panes(x, starts + wide / 2 - 0.04, 0.08, lows, tall))
    blind = project(_panes(x, starts, wide, lows + tall * 0.5, tall * 0.5))
    leaves = [project(_panes(x, starts + shift, 0.4, lows, tall)) for shift in (-0.5, wide + 0.1)] if shutters else []
    rail = project(_panes(x - np.sign(x) * 0.9, starts - 0.4, wide + 0.8, lows - 0.4, 1.0))
    left, right = outer[..., 0].min(axis=-1), outer[..., 0].max(axis=-1)
    seen = (right - left > 1) & (outer[..., 1].max(axis=-1) > 0) & (right > 0) & (left < canvas.width)
    for row, column in zip(*np.nonzero(seen), strict=True):
        at, depth, bright = (row, column), float(starts[column]), float(glow[row, column])
        canvas.paint(outer[at], frame, depth, lit)
        sky = 0.25 * max(0.0, bright - 0.6)
        canvas.paint(
            glass[at],
            [c * (0.8 + bright) + h * sky * 2.5 for c, h in zip(GLASS, canvas.light.haze, strict=True)],
            depth,
        )
        if right[at] - left[at] > 3:
            canvas.paint(bar[at], frame, depth, lit)
        if bright < 0.2:
            canvas.paint(blind[at], frame, depth, 0.9)
        for leaf in leaves:
            canvas.paint(leaf[at], wall * 0.5, depth, lit)
        if balcony and column % 3 == 1:
            canvas.paint(rail[at], wall * 0.65, depth, lit)


def _ground_floor(
    canvas: Canvas, rng: np.random.Generator, x: float, z0: float, z1: float, wall: np.ndarray, lit: float
) -> None:
    """Shop windows with signs and awnings, or doors and a plinth."""
    project = canvas.camera.project
    shop = rng.random() < 0.5
    canvas.paint(project(wall_points(x, z0, z1, 0, 0.5)), wall * 0.6, (z0 + z1) / 2, lit)
    bays = max(1, int((z1 - z0) / 3.6))
    for bay in range(bays):
        start = z0 + (bay + 0.15) * (z1 - z0) / bays
        wide = 0.7 * (z1 - z0) / bays
        accent = np.array(PAINTS[int(rng.integers(len(PAINTS)))]) * 0.8 + 40
        door = rng.random() < 0.35
        awning = rng.random() < 0.4
        if shop:
            canvas.paint(project(wall_points(x, start, start + wide, 0.45, 2.6)), (58, 62, 64), start)
            canvas.paint(project(wall_points(x, start + 0.1, start + wide - 0.1, 0.7, 1.5)), (98, 88, 70), start)
            canvas.paint(project(wall_points(x, start, start + wide, 2.65, 3.2)), accent, start, lit)
            if awning:
                out = x - np.sign(x) * 1.1
                cloth = [(x, 2.8, start), (x, 2.8, start + wide), (out, 2.3, start + wide), (out, 2.3, start)]
                canvas.paint(project(np.array(cloth)), accent, start, lit * 1.15)
        else:
            canvas.paint(project(wall_points(x, start, start + wide * 0.5, 0.95, 2.4)), np.array(GLASS) * 1.2, start)
        if door:
            canvas.paint(
                project(wall_points(x, start + wide * 0.6, start + wide * 0.6 + 1.0, 0, 2.2)), accent * 0.6, start
            )


def _gable_windows(canvas: Canvas, rng: np.random.Generator, x: float, z0: float, high: float) -> None:
    """A few windows in the wall that faces the camera."""
    side = 1 if x > 0 else -1
    bare = rng.random(16) < 0.6
    for index, level in enumerate(np.arange(1.2, high - 2, 3.1)[:8]):
        for column in range(2):
            if bare[index * 2 + column]:
                continue
            start = x + side * (2 + column * 3.2)
            pane = front_points(start, start + side * 1.3, z0, level, level + 1.5)
            canvas.paint(canvas.camera.project(pane), np.array(GLASS) * 1.3, z0)


def barrier(canvas: Canvas, rng: np.random.Generator, kind: str, x: float, z0: float, z1: float) -> None:
    """A wall, fence or guard rail along the street."""
    project = canvas.camera.project
    high = {"wall": rng.uniform(1.7, 3.0), "fence": rng.uniform(1.0, 1.7), "guard rail": 0.8}[kind]
    base = np.array(FACADES[int(rng.integers(len(FACADES)))]) * 0.8 if kind == "wall" else np.array(METAL)
    if kind == "fence":
        base = np.array(((96, 72, 52), (54, 70, 58), (120, 122, 122), (44, 46, 50))[int(rng.integers(4))])
    points = project(wall_points(x, z0, z1, 0, high))
    see_through = kind == "fence" and rng.random() < 0.6
    middle = (z0 + z1) / 2
    if not canvas.stamp(kind, points, None if see_through else base, middle):
        return
    if see_through:
        canvas.paint(points, base, middle, alpha=60)
    if kind == "wall":
        canvas.paint(project(wall_points(x, z0, z1, high - 0.12, high)), base * 1.2, middle)
        for level in np.arange(0.3, high - 0.2, 0.3):
            canvas.line(project(np.array([(x, level, z0), (x, level, z1)])), base * 0.75, middle, 0.02, alpha=130)
        return
    for level in (0.15, high - 0.1, high * 0.55):
        canvas.line(project(np.array([(x, level, z0), (x, level, z1)])), base, middle, 0.06)
    step = 2.0 if kind == "guard rail" else 0.28
    for z in np.arange(z0, z1, step):
        if canvas.metres(z) * step * abs(x) / z > 1.5:  # closer than that they run together
            canvas.line(project(np.array([(x, 0.0, z), (x, high, z)])), base, z, 0.05)


def _blobs(
    rng: np.random.Generator, middles: np.ndarray, radii: np.ndarray, z: float | np.ndarray, count: int
) -> np.ndarray:
    """Irregular leafy outlines that face the camera.

    Args:
        middles: ``float[N, 2]``, X and Y.
        radii: ``float[N, 2]``, half the width and half the height.
        z: distance of all or of each.
        count: vertices of an outline.

    Returns:
        World points ``float64[N, count, 3]``.
    """
    turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
    waves = np.array([2, 3, 5, 8])[:, None] * turn
    shift, swell = rng.uniform(0, 2 * np.pi, (len(middles), 4, 1)), rng.uniform(0.03, 0.08, (len(middles), 4, 1))
    radius = 1 + (swell * np.sin(waves + shift)).sum(axis=1) + rng.uniform(-0.07, 0.07, (len(middles), count))
    points = np.empty((len(middles), count, 3))
    points[..., 0] = middles[:, :1] + radii[:, :1] * radius * np.cos(turn)
    points[..., 1] = middles[:, 1:] + radii[:, 1:] * radius * np.sin(turn)
    points[..., 2] = np.broadcast_to(np.asarray(z, dtype=np.float64), len(middles))[:, None]
    return points


def _leaves(
    canvas: Canvas, rng: np.random.Generator, middle: np.ndarray, radii: np.ndarray, z: float, green: np.ndarray
) -> None:
    """Clumps of leaves inside a crown, light where the sun falls and dark below; fewer on far trees."""
    count = int(np.clip(radii[1] * canvas.metres(z) * 0.6, 4, 36))
    angle, reach = rng.uniform(0, 2 * np.pi, count), np.sqrt(rng.uniform(0, 0.6, count))
    spots = np.stack([np.cos(angle), np.sin(angle)], axis=1) * reach[:, None]
    shades = 0.85 + spots @ np.array([0.14 * canvas.light.sun_side, 0.28]) + rng.uniform(-0.14, 0.14, count)
    clumps = _blobs(rng, middle + spots * radii, radii * rng.uniform(0.12, 0.25, (count, 1)), z, 9)
    for clump, shade in zip(canvas.camera.project(clumps), shades.tolist(), strict=True):
        canvas.paint(clump, green, z, shade, alpha=190)


def tree(canvas: Canvas, rng: np.random.Generator, x: float, z: float, high: float) -> None:
    """A tree of a height in metres; its trunk counts as vegetation."""
    if not canvas.sees(x, z, 0.4 * high):
        return
    project = canvas.camera.project
    bark = np.array((78, 64, 52)) * rng.uniform(0.7, 1.2)
    green = np.array(((70, 96, 44), (88, 104, 42), (54, 84, 48), (104, 110, 52), (122, 104, 46))[int(rng.integers(5))])
    green = green * rng.uniform(0.75, 1.1)
    thick, lean = 0.02 * high + 0.04, rng.uniform(-0.3, 0.3)
    base = high * rng.uniform(0.25, 0.38)
    if z < 80:
        ground_shadow(canvas, Pose(x, z, 0.0), high * 0.22, high * 0.3)
    foot = [(x - thick, 0, z), (x + thick, 0, z)]
    fork = [(x + lean + thick * 0.6, base * 1.5, z), (x + lean - thick * 0.6, base * 1.5, z)]
    canvas.stamp("vegetation", project(np.array(foot + fork)), bark, z)
    middle = np.array([x + lean, (base + high) / 2])
    radii = np.array([high * rng.uniform(0.24, 0.36), (high - base) / 2])
    crown = _blobs(rng, middle[None], radii[None], z, 26)[0]
    if canvas.stamp("vegetation", project(crown), green, z, 0.8) and radii[1] * canvas.metres(z) > 5:
        _leaves(canvas, rng, middle, radii, z, green)


def hedge(canvas: Canvas, rng: np.random.Generator, x: float, z0: float, z1: float, high: float) -> None:
    """A hedge or a row of bushes along the street."""
    green = np.array((66, 88, 42)) * rng.uniform(0.7, 1.2)
    stations = np.linspace(z1, z0, max(3, int((z1 - z0) / 1.5)))
    middles = np.column_stack([np.full(len(stations), x), np.full(len(stations), high * 0.45)])
    radii = high * rng.uniform([0.6, 0.45], [0.9, 0.6], (len(stations), 2))
    bushes = _blobs(rng, middles, radii, stations, 14)
    bushes[..., 1] = np.maximum(bushes[..., 1], 0)
    for bush, middle, radius, z in zip(bushes, middles, radii, stations.tolist(), strict=True):
        if canvas.stamp("vegetation", canvas.camera.project(bush), green, z, rng.uniform(0.8, 1.1)):
            _leaves(canvas, rng, middle, radius * 0.85, z, green)


def pole(canvas: Canvas, x: float, z: float, high: float, radius: float, color: Color = METAL) -> bool:
    """An upright pole; at least one pixel wide."""
    half = max(radius, 0.5 / canvas.metres(z))
    points = canvas.camera.project(front_points(x - half, x + half, z, 0, high))
    if not canvas.stamp("pole", points, color, z):
        return False
    canvas.paint(canvas.camera.project(front_points(x, x + half, z, 0, high)), color, z, 0.75)
    return True


def bollard(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A low pole that keeps cars off the pavement."""
    pole(canvas, x, z, rng.uniform(0.8, 1.0), 0.07)


def clutter(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A bin or box (static) or something left behind (dynamic)."""
    name = "static" if rng.random() < 0.75 else "dynamic"
    wide, high = rng.uniform(0.2, 0.5), rng.uniform(0.6, 1.3)
    color = np.array(PAINTS[int(rng.integers(len(PAINTS)))]) * 0.8
    canvas.stamp(name, canvas.camera.project(front_points(x - wide, x + wide, z, 0, high)), color, z)


def lamp_post(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """A street lamp with an arm over the road."""
    high, reach = rng.uniform(5, 9), -np.sign(x) * rng.uniform(0.8, 2.0)
    shade = rng.uniform(0.5, 1.2)
    color = np.array(METAL) * shade
    if not pole(canvas, x, z, high, rng.uniform(0.05, 0.1), color):
        return
    thick = max(0.05, 0.5 / canvas.metres(z))
    arm = np.array(
        [(x, high, z), (x + reach, high + 0.3, z), (x + reach, high + 0.3 + 2 * thick, z), (x, high + 2 * thick, z)]
    )
    canvas.stamp("pole", canvas.camera.project(arm), color, z)
    lamp = front_points(x + reach * 0.7, x + reach * 1.25, z, high + 0.2, high + 0.42)
    canvas.stamp("static", canvas.camera.project(lamp), (190, 190, 176), z)


_ROUND = np.stack(
    [np.cos(np.linspace(0, 2 * np.pi, 16, endpoint=False)), np.sin(np.linspace(0, 2 * np.pi, 16, endpoint=False))],
    axis=1,
)
_SIGNS: tuple[tuple[np.ndarray, Color, Color], ...] = (
    (_ROUND, (186, 26, 30), (232, 232, 228)),
    (_ROUND, (28, 72, 156), (36, 84, 172)),
    (np.array([(-1, -0.8), (1, -0.8), (0, 0.95)]), (190, 28, 32), (234, 234, 228)),
    (np.array([(-1, 0.8), (1, 0.8), (0, -0.95)]), (190, 28, 32), (234, 234, 228)),
    (np.array([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]), (232, 232, 228), (30, 76, 160)),
    (np.array([(0, -1), (1, 0), (0, 1), (-1, 0)]), (236, 236, 230), (226, 176, 32)),
    (np.array([(-1.6, -0.5), (1.6, -0.5), (1.6, 0.5), (-1.6, 0.5)]), (226, 200, 44), (236, 214, 70)),
    (_ROUND[::2], (176, 24, 28), (196, 30, 34)),
    (_ROUND, (118, 120, 122), (132, 134, 136)),
)
"""Shape in units of the radius, colour of the rim, colour of the field; the last is a sign seen from behind."""


def traffic_sign(canvas: Canvas, rng: np.random.Generator, x: float, z: float) -> None:
    """One or two signs on a pole."""
    high = rng.uniform(2.2, 3.0)
    count = 2 if rng.random() < 0.35 else 1
    pole(canvas, x, z, high + 0.3, 0.04)
    for index in range(count):
        shape, rim, field = _SIGNS[int(rng.integers(len(_SIGNS)))]
        radius = rng.uniform(0.27, 0.4)
        middle = np.array([x, high - index * 0.95])
        for scale, color in ((1.0, rim), (0.72, field), (0.25, (40, 40, 44))):
            flat = middle + shape * radius * scale
            points = canvas.camera.project(np.column_stack([flat, np.full(len(flat), z - 0.05)]))
            if scale == 1.0:
                canvas.stamp("traffic sign", points, color, z)
            else:
                canvas.paint(points, color, z, alpha=255 if scale > 0.5 else 150)


def traffic_light(canvas: Canvas, rng: np.random.Generator, x: float, z: float, *, overhead: bool) -> None:
    """A box with three lamps, one of them lit, on a pole or on a mast's arm over the road."""
    high = 5.4 if overhead else rng.uniform(2.9, 3.4)
    project = canvas.camera.project
    pole(canvas, x, z, high + 0.1, 0.08 if overhead else 0.06, (92, 98, 94))
    at = x
    if overhead:
        at = x - np.sign(x) * 2.6
        thick = max(0.06, 0.5 / canvas.metres(z))
        canvas.stamp("pole", project(front_points(at, x, z, high - thick, high + thick)), (92, 98, 94), z)
    low = high - 0.95
    canvas.stamp("traffic light", project(front_points(at - 0.2, at + 0.2, z - 0.1, low, high)), (30, 33, 32), z)
    lit = int(rng.integers(3))
    for index, color in enumerate(((60, 220, 120), (250, 180, 40), (240, 50, 40))):
        disc = np.column_stack([at + _ROUND[:, 0] * 0.12, low + 0.17 + 0.305 * index + _ROUND[:, 1] * 0.12])
        points = project(np.column_stack([disc, np.full(len(disc), z - 0.1)]))
        canvas.paint(points, color, 0.0 if index == lit else z, 1.0 if index == lit else 0.22)
