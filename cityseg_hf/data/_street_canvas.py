"""The drawing board of the synthetic streets: camera, light, polygons that are picture and label at once, textures.

World coordinates are metres: X to the right, Y up, Z ahead of the camera, which hangs ``CAMERA_HEIGHT`` above the
ground at X = Z = 0. Image points are (x, y) with y downwards. Everything is painted far to near.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from cityseg_hf.labels import LABELS

CAMERA_HEIGHT = 1.25
LABEL_BY_NAME = {label.name: label for label in LABELS}

Color = Sequence[float] | np.ndarray
"""RGB, 0..255."""


class Street(NamedTuple):
    """One rendered scene."""

    image: np.ndarray
    """``uint8[H, W, 3]``, RGB."""
    label_ids: np.ndarray
    """``uint8[H, W]``, the 34-id table."""
    instance_ids: np.ndarray
    """``int32[H, W]``: ``id * 1000 + k`` for numbered objects, the bare label id for everything else."""
    polygons: list[tuple[str, list[tuple[int, int]]]]
    """Label names and vertices in painting order; drawn one over the other they give ``label_ids``."""


class Camera(NamedTuple):
    """A pinhole camera that looks along Z."""

    focal: float
    center_x: float
    horizon: float

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points ``float[..., 3]`` -> image points ``float[..., 2]``."""
        points = np.asarray(points, dtype=np.float64)
        scale = self.focal / np.maximum(points[..., 2], 0.5)
        image = np.empty((*points.shape[:-1], 2))
        image[..., 0] = self.center_x + points[..., 0] * scale
        image[..., 1] = self.horizon + (CAMERA_HEIGHT - points[..., 1]) * scale
        return image


class Light(NamedTuple):
    """What the weather does to a scene."""

    sun_side: int
    """-1: the sun stands on the left, +1: on the right."""
    contrast: float
    """0: overcast, 1: hard sun."""
    haze: tuple[float, float, float]
    haze_distance: float
    """Metres after which 63 % of a colour is haze."""
    gain: Color
    """Exposure and warmth: one factor per RGB channel."""


def polygon_label(name: str) -> str:
    """``cargroup`` -> ``car``; names of the label table (``polegroup`` too) stay as they are."""
    return name if name in LABEL_BY_NAME else name.removesuffix("group")


def convex_hull(points: np.ndarray) -> np.ndarray:
    """The hull of ``float[N, 2]`` (Andrew's monotone chain)."""
    ordered = sorted(map(tuple, np.asarray(points).reshape(-1, 2).tolist()))

    def chain(vertices: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        hull: list[tuple[float, float]] = []
        for px, py in vertices:
            while len(hull) > 1:
                (ax, ay), (bx, by) = hull[-2], hull[-1]
                if (bx - ax) * (py - ay) - (by - ay) * (px - ax) > 0:
                    break
                hull.pop()
            hull.append((px, py))
        return hull[:-1]

    return np.array(chain(ordered) + chain(ordered[::-1]))


def radial_union(parts: Sequence[np.ndarray], center: np.ndarray) -> np.ndarray:
    """One outline ``float[M, 2]`` around polygons ``float[N, 2]``: the farthest edge in every direction of center.

    Cityscapes knows one polygon per object, so a car's body and cabin, say, have to share one.
    """
    starts = np.concatenate(parts) - center
    edges = np.concatenate([np.roll(part, -1, axis=0) - part for part in parts])
    angles = np.arctan2(starts[:, 1], starts[:, 0])
    angles = np.unique(np.concatenate([angles - 1e-4, angles + 1e-4, np.linspace(-np.pi, np.pi, 48, endpoint=False)]))
    rays = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    cross = rays[:, :1] * edges[:, 1] - rays[:, 1:] * edges[:, 0]
    cross = np.where(np.abs(cross) < 1e-9, 1e-9, cross)
    radius = (starts[:, 0] * edges[:, 1] - starts[:, 1] * edges[:, 0]) / cross
    along = (starts[:, 0] * rays[:, 1:] - starts[:, 1] * rays[:, :1]) / cross
    hit = (along >= 0) & (along <= 1) & (radius >= 0)
    return center + rays * np.where(hit, radius, 0).max(axis=1)[:, None]


def clip_polygon(points: Sequence[Sequence[float]], width: int, height: int) -> list[tuple[float, float]]:
    """Cuts a polygon at the borders of the image (Sutherland-Hodgman): what is left lies in [0, W-1] x [0, H-1]."""
    polygon = [(float(x), float(y)) for x, y in points]
    if all(0 <= x <= width - 1 and 0 <= y <= height - 1 for x, y in polygon):
        return polygon
    for axis, bound, sign in ((0, 0.0, 1), (0, width - 1.0, -1), (1, 0.0, 1), (1, height - 1.0, -1)):
        source, polygon = polygon, []
        for before, point in zip(source[-1:] + source[:-1], source, strict=True):
            inside, was_inside = sign * (point[axis] - bound) >= 0, sign * (before[axis] - bound) >= 0
            if inside != was_inside:
                t = (bound - before[axis]) / (point[axis] - before[axis])
                cut = [before[0] + t * (point[0] - before[0]), before[1] + t * (point[1] - before[1])]
                cut[axis] = bound
                polygon.append((cut[0], cut[1]))
            if inside:
                polygon.append(point)
    return polygon


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int], cell: float) -> np.ndarray:
    """Noise ``float32[H, W]`` of about zero mean and unit deviation with grains of ``cell`` pixels."""
    height, width = shape
    if cell <= 1:
        return rng.standard_normal(shape, dtype=np.float32)
    grid = rng.standard_normal((int(height / cell) + 2, int(width / cell) + 2), dtype=np.float32)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC))


class Canvas:
    """Picture, label map, instance map and polygon list of one scene, painted together.

    ``stamp`` paints an object into all four, ``paint`` adds detail to the picture only. Small pictures are painted at
    twice their size, for smooth edges.
    """

    def __init__(self, size: tuple[int, int], camera: Camera, light: Light) -> None:
        self.height, self.width = size
        self.camera = camera
        self.light = light
        self.scale = 2 if self.height <= 320 else 1
        self.image = Image.new("RGB", (self.width * self.scale, self.height * self.scale))
        self.labels = Image.new("L", (self.width, self.height), 0)
        self.instances = Image.new("I", (self.width, self.height), 0)
        self.polygons: list[tuple[str, list[tuple[int, int]]]] = []
        self._draw = ImageDraw.Draw(self.image, "RGBA")
        self._draw_label = ImageDraw.Draw(self.labels)
        self._draw_instance = ImageDraw.Draw(self.instances)
        self._counts: dict[str, int] = {}

    def metres(self, depth: float) -> float:
        """Pixels of the label map that a metre takes at a depth."""
        return self.camera.focal / max(depth, 0.5)

    def sees(self, x: float, depth: float, half: float) -> bool:
        """Whether something between ``x - half`` and ``x + half`` metres can be in the image at a depth."""
        middle, reach = self.camera.center_x + x * self.metres(depth), half * self.metres(depth)
        return -reach < middle < self.width + reach

    def tone(self, color: Color, depth: float, shade: float = 1.0) -> tuple[int, int, int]:
        """A colour as it arrives at the camera: times shade, then dimmed by the haze of ``depth`` metres."""
        clear = math.exp(-depth / self.light.haze_distance)
        red, green, blue = color.tolist() if isinstance(color, np.ndarray) else color
        haze = self.light.haze
        return (
            min(255, max(0, int(red * shade * clear + haze[0] * (1 - clear)))),
            min(255, max(0, int(green * shade * clear + haze[1] * (1 - clear)))),
            min(255, max(0, int(blue * shade * clear + haze[2] * (1 - clear)))),
        )

    def paint(self, points: np.ndarray, color: Color, depth: float = 0.0, shade: float = 1.0, alpha: int = 255) -> None:
        """Fills image points ``float[N, 2]`` in the picture only."""
        vertices = (np.asarray(points) * self.scale).ravel().tolist()
        self._draw.polygon(vertices, fill=(*self.tone(color, depth, shade), alpha))

    def line(self, points: np.ndarray, color: Color, depth: float, metres: float, alpha: int = 255) -> None:
        """Draws a stroke of a thickness in metres along image points ``float[N, 2]`` in the picture only."""
        vertices = (np.asarray(points) * self.scale).ravel().tolist()
        thickness = max(1, round(metres * self.metres(depth) * self.scale))
        self._draw.line(vertices, fill=(*self.tone(color, depth), alpha), width=thickness, joint="curve")

    def stamp(self, name: str, points: np.ndarray, color: Color | None, depth: float = 0.0, shade: float = 1.0) -> bool:
        """Puts one object on the canvas; without a colour into the label maps only.

        Args:
            name: a class name, or that plus ``group`` for a crowd without instance numbers.
            points: image points ``float[N, 2]``.

        Returns:
            Whether any of it lies in the image; if not, nothing was recorded.
        """
        clipped = clip_polygon(np.asarray(points).tolist(), self.width, self.height)
        vertices = list(dict.fromkeys((round(x), round(y)) for x, y in clipped))
        if len(vertices) < 2:
            return False
        if len(vertices) == 2:  # a far pole, one pixel wide: still a polygon, of no area
            vertices.append(vertices[0])
        label = LABEL_BY_NAME[polygon_label(name)]
        value = label.id
        if label.has_instances and name == label.name:
            count = self._counts.get(name, 0)
            self._counts[name] = count + 1
            value = label.id * 1000 + count
        self.polygons.append((name, vertices))
        self._draw_label.polygon(vertices, fill=label.id)
        self._draw_instance.polygon(vertices, fill=value)
        if color is not None:
            self.paint(points, color, depth, shade)
        return True

    def finish(self, rng: np.random.Generator, materials: np.ndarray, surface: "Surface") -> Street:
        """Adds texture, exposure, blur and camera noise, and hands the scene over.

        ``materials``, ``uint8[H, W]``, are the label ids that choose the texture: those before the void border.
        """
        image = self.image.reduce(self.scale) if self.scale > 1 else self.image
        label_ids = np.array(self.labels)
        pixels = np.asarray(image).astype(np.float32)
        surface.texture(rng, pixels, materials, self.camera, self.light)
        height, width = label_ids.shape
        y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
        vignette = 1 - 0.1 * (x * x + y * y)
        pixels *= vignette[..., None] * np.asarray(self.light.gain, dtype=np.float32)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.5) * (1 + height / 1024)))
        noise = rng.standard_normal((height, width, 1), dtype=np.float32) * np.float32(rng.uniform(1.5, 4.0))
        pixels = np.asarray(image) + noise
        return Street(
            np.clip(pixels, 0, 255).astype(np.uint8),
            label_ids,
            np.array(self.instances, dtype=np.int32),
            self.polygons,
        )


class Surface(NamedTuple):
    """How the ground and the materials of a scene look close up."""

    slab: float
    """Edge of the pavement's slabs, in metres."""
    shadow_edge: float
    """X, in metres, of the line that the shadow of the houses on the sunny side draws on the ground."""

    def texture(
        self, rng: np.random.Generator, pixels: np.ndarray, label_ids: np.ndarray, camera: Camera, light: Light
    ) -> None:
        """Multiplies grain into ``pixels`` (``float32[H, W, 3]``, in place), by class and in perspective."""
        height = pixels.shape[0]
        grains = [smooth_noise(rng, label_ids.shape, height / cells) for cells in (256, 96, 20)]
        factor = np.ones_like(label_ids, dtype=np.float32)
        for grain, amounts in zip(grains, _GRAIN, strict=True):
            factor += amounts[label_ids] * grain
        pixels *= np.clip(factor, 0.35, 1.7)[..., None]
        # Leaves and grass vary in hue, not only in brightness: dry, fresh and shaded patches.
        green = np.isin(label_ids, [LABEL_BY_NAME["vegetation"].id, LABEL_BY_NAME["terrain"].id])
        pixels[..., 0] += green * grains[1] * 9
        pixels[..., 2] -= green * grains[2] * 6
        top = max(0, int(camera.horizon) + 1)
        if top < height:
            self._ground(rng, pixels[top:], label_ids[top:], top, camera, light)

    def _ground(
        self,
        rng: np.random.Generator,
        pixels: np.ndarray,
        label_ids: np.ndarray,
        top: int,
        camera: Camera,
        light: Light,
    ) -> None:
        """Gives flat ground below the horizon its grain, slabs, shadow and haze, at their places in the world."""
        rows, columns = label_ids.shape
        z = camera.focal * CAMERA_HEIGHT / (np.arange(top, top + rows) + 0.5 - camera.horizon)
        z = np.minimum(z, 400.0).astype(np.float32)[:, None]
        x = (np.arange(columns, dtype=np.float32) + 0.5 - camera.center_x)[None, :] * (z / camera.focal)
        fade = np.exp(-z / 14)
        fine = smooth_noise(rng, (256, 256), 1)
        coarse = smooth_noise(rng, (256, 256), 8)
        xi, zi = (x * 32).astype(np.int32), (z * 16).astype(np.int32)
        factor = 1 + 0.11 * fade * fine[zi & 255, xi & 255]
        factor += 0.08 * coarse[(zi >> 3) & 255, (xi >> 3) & 255]
        seam = ((x / self.slab) % 1 < 0.06) | ((z / self.slab) % 1 < 0.08)
        factor -= 0.22 * fade * (seam & (label_ids == LABEL_BY_NAME["sidewalk"].id))
        shade = np.clip((x - self.shadow_edge) * light.sun_side / 0.5 + 0.5, 0, 1)
        factor *= 1 - 0.5 * light.contrast * shade
        clear = np.exp(-z / light.haze_distance)
        flat = _IS_FLAT[label_ids][..., None]
        lit = pixels * (factor * clear)[..., None] + np.asarray(light.haze, dtype=np.float32) * (1 - clear)[..., None]
        np.copyto(pixels, lit, where=flat)


def _by_name(amounts: dict[str, float], default: float) -> np.ndarray:
    """``float32[256]``, by label id."""
    table = np.full(256, default, dtype=np.float32)
    for name, amount in amounts.items():
        table[LABEL_BY_NAME[name].id] = amount
    return table


_GRAIN = (
    _by_name({"vegetation": 0.26, "terrain": 0.14, "building": 0.05, "wall": 0.07, "sky": 0, "ego vehicle": 0}, 0.025),
    _by_name({"vegetation": 0.2, "terrain": 0.1, "building": 0.04, "wall": 0.06, "sky": 0, "ego vehicle": 0}, 0.02),
    _by_name({"vegetation": 0.1, "terrain": 0.08, "building": 0.06, "wall": 0.05, "sky": 0, "ego vehicle": 0}, 0.02),
)
"""Strength of the fine, middle and coarse grain."""

_IS_FLAT = (
    _by_name({label.name: 1.0 for label in LABELS if label.category == "flat"} | {"terrain": 1.0, "ground": 1.0}, 0.0)
    > 0
)
