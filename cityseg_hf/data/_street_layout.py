"""Composes a synthetic street: where the road runs, what stands and drives along it, in which order it is painted."""

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from cityseg_hf.data import _street_parts as parts
from cityseg_hf.data import _street_people as people
from cityseg_hf.data import _street_vehicles as vehicles
from cityseg_hf.data._street_canvas import Camera, Canvas, Light, Street, Surface, smooth_noise
from cityseg_hf.data._street_parts import ground_points
from cityseg_hf.data._street_vehicles import Pose

_GUESTS: tuple[tuple[str, ...], ...] = (
    ("truck", "light", "wall"),
    ("bicyclist", "fence", "motorcycle"),
    ("bus", "light", "bicycle"),
    ("motorcyclist", "wall", "sign"),
    ("train", "fence", "bicyclist"),
    ("motorcycle", "light", "persons"),
    ("bicyclist", "wall", "sign"),
    ("motorcyclist", "fence", "bicycle"),
)
"""Rare objects by rotation: every eight scenes show each of them, as chance alone would not."""


class _Street:
    """One scene under construction: the plan of its ground and a list of things to paint, with their distances."""

    def __init__(self, canvas: Canvas, rng: np.random.Generator) -> None:
        self.canvas = canvas
        self.rng = rng
        self.edge = {-1: -rng.uniform(4.4, 7.0), 1: rng.uniform(2.2, 4.2)}
        """X of the kerbs, left and right of the camera's lane."""
        self.strip = {side: str(rng.choice(["", "", "parking", "terrain", "terrain"])) for side in (-1, 1)}
        self.house: dict[int, float] = {}
        """X of the line where houses begin."""
        for side in (-1, 1):
            wide = rng.uniform(2.8, 5.4) + (2.1 if self.strip[side] else 0.0)
            self.house[side] = self.edge[side] + side * wide
        self.lane = {"ahead": rng.uniform(-0.3, 0.4), "oncoming": self.edge[-1] / 2 - rng.uniform(0.8, 1.2)}
        self.things: list[tuple[float, Callable[[], object]]] = []
        self.free: dict[str, float] = {"ahead": 0.0, "oncoming": 0.0}
        """How far, in metres, each lane must stay free of cars so that none hides a guest."""

    def add(self, distance: float, paint: Callable[..., object], *args: object, **kwargs: object) -> None:
        """Queues ``paint(canvas, rng, ...)``; farther things come first.

        Each gets a generator of its own: how much detail one needs at this size must not change the next one.
        """
        rng = np.random.default_rng(int(self.rng.integers(2**62)))
        self.things.append((distance, partial(paint, self.canvas, rng, *args, **kwargs)))


def compose(size: tuple[int, int], entropy: np.random.SeedSequence, rotation: int) -> Street:
    """Plans and paints one scene of ``size`` (height, width) with the guests of ``rotation`` (0..7)."""
    plan_seed, cloud_seed, grain_seed = entropy.spawn(3)
    rng = np.random.default_rng(plan_seed)
    camera = _camera(rng, size)
    light = _light(rng)
    street = _Street(Canvas(size, camera, light), rng)
    shadow_edge = street.house[light.sun_side] - light.sun_side * rng.uniform(0.5, 7.0)
    _sky(street.canvas, np.random.default_rng(cloud_seed))
    _skyline(street)
    _paint(street)
    _ground(street)
    _frontage(street, -1, rotation)
    _frontage(street, 1, rotation)
    _paint(street)  # nothing behind the line of the houses can hide what stands in the street
    _guests(street, rotation)
    _traffic(street)
    for side in (-1, 1):
        _roadside(street, side)
    _paint(street)
    _hood(street)
    materials = np.array(street.canvas.labels)
    _border(street.canvas)
    return street.canvas.finish(
        np.random.default_rng(grain_seed), materials, Surface(rng.uniform(0.5, 1.0), shadow_edge)
    )


def _camera(rng: np.random.Generator, size: tuple[int, int]) -> Camera:
    height, width = size
    return Camera(
        focal=1.1 * (width / 2 + height) * rng.uniform(0.95, 1.05),
        center_x=width * rng.uniform(0.44, 0.56),
        horizon=height * rng.uniform(0.39, 0.45),
    )


def _light(rng: np.random.Generator) -> Light:
    warmth = rng.uniform(-0.06, 0.07)
    gain = rng.uniform(0.84, 1.22) * np.array([1 + warmth, 1.0, 1 - warmth])
    haze = rng.uniform(175, 215) * np.array([1.0, 1.02, 1.05])
    return Light(
        sun_side=int(rng.choice([-1, 1])),
        contrast=float(rng.uniform(0.0, 1.0)),
        haze=tuple(haze.tolist()),
        haze_distance=float(rng.uniform(90, 320)),
        gain=tuple(gain.tolist()),
    )


def _paint(street: _Street) -> None:
    """Paints what is queued, far to near, and empties the queue."""
    for _, paint in sorted(street.things, key=lambda thing: -thing[0]):
        paint()
    street.things.clear()


def _sky(canvas: Canvas, rng: np.random.Generator) -> None:
    """Stamps the sky over everything and paints its gradient and clouds."""
    canvas.stamp("sky", np.array([(0, 0), (canvas.width, 0), (canvas.width, canvas.height), (0, canvas.height)]), None)
    rows = 48
    noise = smooth_noise(rng, (rows, 96), 12) + 0.5 * smooth_noise(rng, (rows, 96), 5)
    cloud = np.clip((noise + rng.uniform(-0.8, 1.2)) * 0.7, 0, 1)[..., None]
    fall = np.linspace(0, 1, rows)[:, None, None] ** 0.7
    zenith = np.array([[rng.uniform([96, 140, 190], [150, 180, 222])]])
    colors = zenith * (1 - fall) + np.array(canvas.light.haze) * 1.1 * fall
    colors = colors * (1 - cloud) + np.array([222, 224, 228]) * (1 - 0.14 * cloud * fall) * cloud
    patch = Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8))
    high = int(canvas.camera.horizon * canvas.scale) + 2
    canvas.image.paste(patch.resize((canvas.image.width, high), Image.Resampling.BICUBIC), (0, 0))


def _skyline(street: _Street) -> None:
    """What closes the street in the distance: houses and trees without detail."""
    canvas, rng = street.canvas, street.rng
    for x in np.arange(-110, 110, 16.0):
        z = rng.uniform(150, 200)
        points = parts.front_points(x, x + rng.uniform(13, 22), z, -0.5, rng.uniform(6, 15))
        canvas.stamp("building", canvas.camera.project(points), parts.FACADES[int(rng.integers(12))], z)
    for x in np.arange(-80, 80, 11.0):
        if rng.random() < 0.8:
            street.add(140, parts.tree, x + rng.uniform(-3, 3), rng.uniform(120, 145), rng.uniform(7, 14))


def _ground(street: _Street) -> None:
    """Terrain everywhere, on it pavements and strips, on these the road with its markings."""
    canvas, rng, edge = street.canvas, street.rng, street.edge
    project = canvas.camera.project

    def lay(name: str, color: np.ndarray | tuple[float, ...], x0: float, x1: float, z0: float, z1: float) -> None:
        canvas.stamp(name, project(ground_points(x0, x1, z0, z1)), color)

    asphalt = np.array([1.0, 1.0, 1.03]) * rng.uniform(72, 112)
    stone = np.array([1.0, 0.97, 0.93]) * rng.uniform(112, 160)
    grass = np.array((92, 112, 58)) * rng.uniform(0.75, 1.1)
    lay("terrain", grass, -400, 400, 1.5, 400)
    for side in (-1, 1):
        lay("sidewalk", stone, edge[side], street.house[side] + side * 0.5, 1.5, 300)
        if street.strip[side] == "parking":
            lay("parking", asphalt * 1.12, edge[side], edge[side] + side * 2.0, 1.5, 120)
        elif street.strip[side] == "terrain":
            start = rng.uniform(2, 12)
            lay("terrain", grass, edge[side] + side * 0.15, edge[side] + side * 1.9, start, start + rng.uniform(20, 90))
    lay("road", asphalt, edge[-1], edge[1], 1.5, 400)
    for side in (-1, 1):
        kerb = project(ground_points(edge[side] - side * 0.02, edge[side] + side * 0.13, 1.5, 120))
        canvas.paint(kerb, stone * 1.15)
        canvas.paint(
            project(ground_points(edge[side] - side * 0.25, edge[side] - side * 0.02, 1.5, 120)), asphalt * 0.75
        )
    _markings(street, asphalt)


def _markings(street: _Street, asphalt: np.ndarray) -> None:
    """Lane markings, patches of newer asphalt, manhole covers, sometimes a zebra crossing."""
    canvas, rng, edge = street.canvas, street.rng, street.edge
    project = canvas.camera.project
    white = np.array((214, 214, 208)) * rng.uniform(0.8, 1.05)
    for _ in range(int(rng.integers(1, 5))):
        x, z = rng.uniform(edge[-1], edge[1] - 1.5), rng.uniform(4, 30)
        patch = ground_points(x, x + rng.uniform(0.8, 2.5), z, z + rng.uniform(2, 12))
        canvas.paint(project(patch), asphalt * rng.uniform(0.8, 1.15), alpha=150)
    for _ in range(2):
        x, z, turn = rng.uniform(edge[-1] + 1, edge[1] - 1), rng.uniform(7, 25), np.linspace(0, 2 * np.pi, 14)
        canvas.paint(
            project(np.stack([x + 0.35 * np.cos(turn), 0 * turn, z + 0.35 * np.sin(turn)], axis=1)), asphalt * 0.6
        )
    middle = street.lane["ahead"] - rng.uniform(1.6, 1.9)
    period, dash = ((6.0, 3.0), (9.0, 4.5), (4.0, 4.0))[int(rng.integers(3))]
    if rng.random() < 0.8:
        for z in np.arange(rng.uniform(1.5, 4.0), 110, period):
            canvas.paint(project(ground_points(middle - 0.07, middle + 0.07, z, z + dash)), white)
    if rng.random() < 0.4:
        x = edge[1] - rng.uniform(0.3, 0.9)
        canvas.paint(project(ground_points(x - 0.06, x + 0.06, 1.5, 110)), white)
    if rng.random() < 0.3:
        z = rng.uniform(9, 26)
        for x in np.arange(edge[-1] + 0.4, edge[1] - 0.5, 1.0):
            canvas.paint(project(ground_points(x, x + 0.5, z, z + 3.5)), white)


def _frontage(street: _Street, side: int, rotation: int) -> None:
    """Fills the line of the houses on one side with houses, gardens, walls, fences, gaps and cross streets."""
    rng = street.rng
    guests = _GUESTS[rotation]
    line = street.house[side]
    z = rng.uniform(2.5, 5.0)
    guest_side = 1 if rotation % 3 else -1
    guest_from = rng.uniform(12, 16)
    tall = rng.uniform(11, 21)
    greenery = rng.random() * 0.4
    placed = False
    while z < 140:
        length = rng.uniform(9, 22)
        wanted = next((kind for kind in ("wall", "fence") if kind in guests), None)
        kind = str(rng.choice(["house", "garden", "gap"], p=[0.87 - greenery, greenery, 0.13]))
        if wanted and side == guest_side and not placed and z + length > guest_from:
            placed, kind = True, wanted
        elif kind == "garden" and rng.random() < 0.45:
            kind = str(rng.choice(["wall", "fence", "guard rail"], p=[0.52, 0.4, 0.08]))
        if kind == "house":
            setback = side * rng.uniform(0.0, 1.2)
            high = float(np.clip(tall + rng.normal(0, 2.5), 5, 26))
            street.add(z, parts.building, line + setback, z, z + length, high)
        elif kind == "gap":
            length = rng.uniform(5, 11)
            _gap(street, side, z, length)
        else:
            if kind != "garden":
                street.add(z, parts.barrier, kind, line + side * 0.1, z, z + length)
            elif rng.random() < 0.6:
                street.add(z, parts.hedge, line + side * 0.8, z + 0.5, z + length, rng.uniform(0.8, 2.2))
            _garden(street, side, z, length)
        z += length


def _garden(street: _Street, side: int, z: float, length: float) -> None:
    """Trees behind the line of the houses, and perhaps a house behind the trees."""
    rng, line = street.rng, street.house[side]
    for _ in range(int(length / (3.5 if z < 60 else 7.0))):
        at = rng.uniform(z + 1, z + length)
        street.add(at + length, parts.tree, line + side * rng.uniform(2.5, 9), at, rng.uniform(5, 13))
    if rng.random() < 0.6:
        street.add(z + 2 * length, parts.building, line + side * 13, z + 1, z + length, rng.uniform(6, 12))


def _gap(street: _Street, side: int, z: float, length: float) -> None:
    """A cross street, a yard or waste ground between two houses."""
    canvas, rng = street.canvas, street.rng
    name = str(rng.choice(["road", "parking", "ground"], p=[0.6, 0.2, 0.2]))
    start = street.edge[side] if name == "road" else street.house[side]
    points = canvas.camera.project(ground_points(start, side * 80, z, z + length))
    canvas.stamp(name, points, np.array([1.0, 1.0, 1.02]) * rng.uniform(78, 112))
    if name != "road" and rng.random() < 0.7:
        pose = Pose(
            street.house[side] + side * rng.uniform(2, 5), z + length / 2, float(rng.choice([-1, 1])) * np.pi / 2
        )
        street.add(z + length / 2, vehicles.car, pose)
    street.add(
        z + length + 30,
        parts.tree,
        street.house[side] + side * 8,
        z + length,
        rng.uniform(6, 11),
    )


def _guests(street: _Street, rotation: int) -> None:
    """Puts the scene's rare objects where nothing hides them."""
    canvas, rng, edge = street.canvas, street.rng, street.edge
    for guest in _GUESTS[rotation]:
        side = int(rng.choice([-1, 1]))
        beside = edge[side] + side * rng.uniform(0.6, 1.6)
        near = rng.uniform(15, 25)
        if guest in ("truck", "bus", "train"):
            lane = "oncoming" if guest == "train" or rng.random() < 0.5 else "ahead"
            z, heading = rng.uniform(25, 42), np.pi if lane == "oncoming" else 0.0
            street.free[lane] = 60.0
            if guest == "train":
                for rail in (-0.72, 0.72):
                    x = street.lane[lane] + rail
                    points = canvas.camera.project(ground_points(x - 0.12, x + 0.12, 1.5, z + 30))
                    canvas.stamp("rail track", points, (84, 82, 80))
            street.add(z, vehicles.big_vehicle, guest, Pose(street.lane[lane], z, heading))
        elif guest in ("bicyclist", "motorcyclist"):
            kind = "bicycle" if guest == "bicyclist" else "motorcycle"
            lane = "ahead" if rng.random() < 0.6 else "oncoming"
            z, x = rng.uniform(12, 22), street.lane[lane] + rng.uniform(-0.3, 0.8)
            street.free[lane] = max(street.free[lane], z + 5)
            street.add(z, people.two_wheeler, kind, x, z, ridden=True)
        elif guest in ("bicycle", "motorcycle"):
            street.add(near - 5, people.two_wheeler, guest, beside, near, ridden=False)
        elif guest == "light":
            overhead = bool(rng.random() < 0.4)
            z = rng.uniform(13, 22)
            street.add(z, parts.traffic_light, edge[1] + 0.5, z, overhead=overhead)
            street.add(z + 1, parts.traffic_light, edge[-1] - 0.5, z + 1, overhead=False)
        elif guest == "sign":
            street.add(near, parts.traffic_sign, edge[1] + 0.5, near)
        elif guest == "persons":
            for _ in range(6):
                street.add(
                    near,
                    people.person,
                    beside + side * rng.uniform(0, 1.5),
                    near + rng.uniform(0, 3),
                )


def _traffic(street: _Street) -> None:
    """Cars on the lanes that no guest has taken, a rare trailer or caravan among them."""
    rng = street.rng
    for lane, heading in (("ahead", 0.0), ("oncoming", np.pi)):
        z = max(street.free[lane], 11.0) + rng.uniform(0, 25)
        while z < 110 and rng.random() < 0.75:
            pose = Pose(street.lane[lane] + rng.uniform(-0.25, 0.25), z, heading + rng.normal(0, 0.02))
            if rng.random() < 0.04 and heading == 0.0:
                street.add(z, vehicles.big_vehicle, str(rng.choice(["caravan", "trailer"])), pose)
            else:
                street.add(z, vehicles.car, pose)
            z += rng.uniform(8, 28)


def _roadside(street: _Street, side: int) -> None:
    """Parked cars, trees, lamps, signs, people, bicycles and litter bins along one kerb."""
    rng = street.rng
    kerb, house, strip = street.edge[side], street.house[side], street.strip[side]
    inner = kerb + side * (2.1 if strip else 0.5)
    heading = 0.0 if side > 0 else np.pi
    if strip == "parking" or rng.random() < 0.5:
        at = kerb + side * 1.0 if strip == "parking" else kerb - side * 1.0
        if side > 0:
            at = max(at, street.lane["ahead"] + 2.3)  # half on the pavement where the road is narrow
        z, end = rng.uniform(8, 30), rng.uniform(40, 100)
        while z < end:
            if rng.random() < 0.6:
                street.add(z, vehicles.car, Pose(at, z, heading + rng.normal(0, 0.03)), crowd=z > 70)
            z += rng.uniform(5.2, 6.5)
    if strip == "terrain" or rng.random() < 0.2:
        for z in np.arange(rng.uniform(9, 16), 90, rng.uniform(8, 15)):
            street.add(z, parts.tree, kerb + side * 1.0, z, rng.uniform(5, 10))
    for z in np.arange(rng.uniform(12, 30), 80, rng.uniform(20, 32)):
        street.add(z, parts.lamp_post, inner, z)
    for _ in range(int(rng.integers(0, 4))):
        z = rng.uniform(13, 60)
        street.add(z, parts.traffic_sign, kerb + side * 0.45, z)
    if rng.random() < 0.15:  # a row of bollards
        for z in np.arange(rng.uniform(9, 16), 30, 2.2):
            street.add(z, parts.bollard, kerb + side * 0.3, z)
    for _ in range(int(rng.integers(1, 8))):
        z, x = 9 + 50 * rng.random() ** 1.4, inner + (house - side * 0.4 - inner) * rng.random()
        street.add(z, people.person, x, z, crowd=z > 50)
    if rng.random() < 0.3:
        start = rng.uniform(11, 30)
        for index in range(int(rng.integers(1, 4))):
            z = start + index * 1.2
            street.add(z, people.two_wheeler, "bicycle", house - side * 0.9, z, ridden=False)
    for _ in range(int(rng.integers(0, 3))):
        z = rng.uniform(9, 40)
        street.add(z, parts.clutter, house - side * rng.uniform(0.3, 0.8), z)


def _hood(street: _Street) -> None:
    """The hood of the car that carries the camera."""
    canvas, rng = street.canvas, street.rng
    width, height = canvas.width, canvas.height
    x = np.linspace(-0.12, 1.12, 15)
    top = 1 - rng.uniform(0.07, 0.11) + 0.09 * np.abs(2 * x - 1) ** 2.6
    hood = np.concatenate([np.stack([x, top], axis=1), [(1.12, 1.3), (-0.12, 1.3)]]) * (width, height)
    paint = np.array((58, 60, 64)) * rng.uniform(0.5, 1.6)
    canvas.stamp("ego vehicle", hood, paint)
    shine = np.stack([x, top + 0.012], axis=1)
    canvas.paint(np.concatenate([shine, np.stack([x, top + 0.03], axis=1)[::-1]]) * (width, height), paint * 1.5)


def _border(canvas: Canvas) -> None:
    """The rim of the image that Cityscapes leaves out of the region of interest; void in the labels only."""
    width, height = canvas.width, canvas.height
    rim = max(1, round(5 * height / 1024)) - 1
    right, bottom = width - 1, height - 1
    outer = [(0, 0), (right, 0), (right, bottom), (0, bottom), (0, 0)]
    inner = [(rim, rim), (rim, bottom - rim), (right - rim, bottom - rim), (right - rim, rim), (rim, rim)]
    for start in range(4):  # four bars: a ring is no simple polygon
        a, b = outer[start], outer[start + 1]
        c, d = [inner[0], inner[3], inner[2], inner[1], inner[0]][start : start + 2]
        canvas.stamp("out of roi", np.array([a, b, d, c]), None)
