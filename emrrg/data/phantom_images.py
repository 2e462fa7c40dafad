"""Frontal chest radiographs drawn from nothing: anatomy as curves, findings as changes to it.

The picture is a map of attenuation (0 air, about 1 metal) over body coordinates, x to the image's
right (the patient's left), y downwards, both in image sides from the centre; a turn, a shift and a
zoom take pixels there. Curves of one coordinate are tables that are looked up at every pixel,
blobs are products of two tables, and small things are drawn in a window, so that an image costs
few passes over its pixels.

Shapes: S pixels a side, N entries a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from emrrg.data.phantom_cases import SIDES, Case, Domain

Array = NDArray[np.floating[Any]]  # fp32 throughout
Window = tuple[slice, slice]
Box = tuple[float, float, float, float]

ENTRIES = 2048  # N
REACH = 0.85  # tables reach from -REACH to REACH
GRID = np.linspace(-REACH, REACH, ENTRIES, dtype=np.float32)
WHOLE: Window = (slice(None), slice(None))
SIGN = {"right": -1.0, "left": 1.0}
ZONE_Y = {"upper": -0.18, "mid": -0.03, "lower": 0.11}
RIBS = 9
RIB_SPACING = 0.068
RIB_TOP = -0.33  # where the first rib leaves the spine
HILUM_Y = -0.02


def edge(distance: Array, width: float) -> Array:
    """0 to 1 as `distance` goes from -width/2 to width/2."""
    out = distance * np.float32(1 / width)
    out += np.float32(0.5)
    return out.clip(0, 1, out=out)


def line(distance: Array, width: float) -> Array:
    """1 where `distance` is 0, falling to 0 at +-width."""
    out = np.abs(distance)
    out *= np.float32(-1 / width)
    out += 1
    return np.maximum(out, 0, out=out)


def bump(t: Array, centre: float, width: float) -> Array:
    """A Gaussian of height 1."""
    z = (t - np.float32(centre)) * np.float32(1 / width)
    return np.exp(-z * z)


def rib_fall(distance: Array) -> Array:
    """How far a posterior rib has come down at a distance from the spine."""
    r = np.abs(distance)
    return np.asarray(-0.10 * r + 1.15 * r**2 + 6.0 * np.maximum(r - 0.24, 0) ** 2, np.float32)


def clavicle_y(distance: Array) -> Array:
    """Height of the clavicle over the distance from the middle."""
    r = np.abs(distance)
    return np.asarray(-0.255 - 0.30 * r + 0.35 * r**2 + 0.012 * np.sin(r * 16), np.float32)


# Tables that every patient shares, (N,).
AWAY = np.abs(GRID)  # from the middle line
RIB_FALL = (RIB_TOP + rib_fall(GRID)).astype(np.float32)
CLAVICLE = clavicle_y(GRID)
CLAVICLE_STRENGTH = edge(AWAY - np.float32(0.035), 0.02) * edge(0.40 - AWAY, 0.05)
BESIDE_SPINE = edge(AWAY - np.float32(0.04), 0.03)  # where ribs are seen
FRONT_RIBS = 0.6 * edge(AWAY - np.float32(0.17), 0.06)
TRUNK = np.float32(0.60) - np.float32(0.30) * GRID * GRID
VERTEBRAE = (0.075 + 0.025 * np.cos(GRID * (2 * np.pi / 0.062))).astype(np.float32)
NECK = 0.12 + 0.10 * np.clip((GRID + 0.5) / 0.1, 0, 1) ** 2
SHOULDERS = 1 - (1 - np.clip((GRID + 0.43) / 0.13, 0, 1)) ** 2
WIDENING, KNOB, TRUNK_ARTERY = (
    bump(GRID, centre, width) for centre, width in ((-0.14, 0.14), (-0.145, 0.028), (-0.055, 0.035))
)
LOWER = np.clip((GRID + 0.10) / 0.2, 0, 1)


def draw(
    cases: Sequence[Case],
    domain: Domain,
    size: int,
    anatomy: np.random.Generator,
    placing: np.random.Generator,
    grain: np.random.Generator,
) -> tuple[NDArray[np.uint8], dict[str, tuple[Box, ...]]]:
    """Draw a radiograph.

    The three sources of chance are apart, so that the same patient can be drawn with and without
    a finding, or in another size.

    Args:
        cases: the findings, at most one an observation.
        domain: whose scanner.
        size: S, pixels a side.
        anatomy: source of chance for the patient, the position and the exposure.
        placing: source of chance for the findings.
        grain: source of chance for noise, which alone depends on S.
    Returns:
        (S, S) uint8, bone white; and for each observation the boxes (left, top, right, bottom, as
        fractions of the image) around what was drawn for it.
    """
    found = {case.observation: case for case in cases}
    view = View(size, anatomy)
    picture = Picture(view, Chest(found, anatomy), placing)
    boxes = {case.observation: picture.add(case) for case in cases}
    return develop(picture.compose(anatomy), domain, anatomy, grain), boxes


@lru_cache(maxsize=16)
def pixel_centres(size: int) -> Array:
    """(S,) positions of pixel centres, in image sides from the middle."""
    return ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)


@lru_cache(maxsize=64)
def stretching(coarse: int, size: int) -> Array:
    """(S, coarse): linear interpolation from a coarse row to a row of pixels."""
    at = (np.arange(size) + 0.5) / size * (coarse - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(coarse))).astype(np.float32)


def smooth_noise(rng: np.random.Generator, coarse: int, size: int) -> Array:
    """(S, S) noise of unit variance on a coarse grid, interpolated between its points."""
    stretch = stretching(coarse, size)
    return stretch @ rng.standard_normal((coarse, coarse), dtype=np.float32) @ stretch.T


@lru_cache(maxsize=64)
def gaussian(width: float, reach: float) -> NDArray[np.float64]:
    """A Gaussian's weights, as `scipy.ndimage.gaussian_filter` has them, up to reach widths."""
    radius = int(reach * width + 0.5)
    weights = np.exp(-0.5 / width**2 * np.arange(-radius, radius + 1) ** 2)
    return weights / weights.sum()


def blurred(x: Array, axis: int, width: float, reach: float) -> Array:
    """Blur along an axis. `scipy.ndimage.gaussian_filter` makes its weights anew each time."""
    return ndimage.correlate1d(x, gaussian(width, reach), axis, mode="nearest")


class View:
    """Body coordinates of every pixel under one turn, shift and zoom.

    Attributes:
        x, y: (S, S) body coordinates.
        distance: (S, S) from the middle line, |x|.
        left: (S, S) bool, the patient's left half.
        ix, iy: (S, S) entries of tables over x and y.
        side_y: (S, S) entries of tables over y, the patient's right side first, then the left.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        angle = np.radians(rng.uniform(-5, 5))
        zoom = rng.uniform(0.95, 1.06)
        cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
        shift = rng.uniform(-0.025, 0.025, 2)
        to_image = np.array([cos, -sin, sin, cos]) / zoom**2
        self._to_image = (*to_image.tolist(), *shift.tolist())
        self.size = size
        pixels = pixel_centres(size)
        a, b, c, d = (np.float32(v) for v in (cos, sin, -sin, cos))
        u, v = (pixels - np.float32(s) for s in shift)
        self.x = (a * u)[None, :] + (b * v)[:, None]
        self.y = (c * u)[None, :] + (d * v)[:, None]
        self.distance = np.abs(self.x)
        self.left = self.x > 0
        self.ix, self.iy = entry(self.x), entry(self.y)
        self.side_y = self.iy + self.left * np.intp(ENTRIES)

    def to_image(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Body coordinates (numbers or arrays) to image coordinates, from the middle."""
        a, b, c, d, u, v = self._to_image
        return a * x + b * y + u, c * x + d * y + v

    def window(self, left: float, top: float, right: float, bottom: float) -> Window:
        """The pixels of a box in body coordinates, and few more."""
        corners = [self.to_image(x, y) for x in (left, right) for y in (top, bottom)]
        columns, rows = (self._pixels(min(ends), max(ends)) for ends in zip(*corners, strict=True))
        return rows, columns

    def _pixels(self, low: float, high: float) -> slice:
        """The pixels of a range of image coordinates."""
        first, last = math.floor((low + 0.5) * self.size), math.ceil((high + 0.5) * self.size)
        return slice(min(max(first, 0), self.size), min(max(last, 0), self.size))

    def blobs(self, blobs: Sequence[tuple[float, float, float, float, float]]) -> Array:
        """(S, S) sum of upright Gaussians, each (x, y, half width, half height, strength)."""
        table = np.array(blobs).T[..., None]
        table[:2] = self.to_image(*table[:2])
        u, v, wide, high, strength = table.astype(np.float32)
        pixels = pixel_centres(self.size)
        columns, rows = (pixels - u) / wide, (pixels - v) / high
        rows = np.exp(-rows * rows) * strength
        return np.ascontiguousarray(rows.T) @ np.exp(-columns * columns)


def entry(t: Array) -> NDArray[np.intp]:
    """The table entry nearest to each coordinate."""
    at = t * np.float32((ENTRIES - 1) / (2 * REACH))
    at += np.float32((ENTRIES - 1) / 2 + 0.5)
    return np.clip(at, 0, ENTRIES - 1, out=at).astype(np.intp)


class Chest:
    """The outlines of one patient as tables, with the findings that change outlines.

    Attributes:
        half: widest distance of each lung's outer edge from the middle.
        outer, inner: (2N,) distances of the lungs' outer and inner edges from the middle, over y.
        mediastinum: (2N,) half width of what lies between the lungs.
        floor: (N,) y of the diaphragm, over x.
        bases: y of each dome's top.
        ratio: width of the heart over that of the chest.
        heart: its two ellipses, each (x, y, long half axis, short half axis, tilt in radians).
    """

    def __init__(self, cases: dict[str, Case], rng: np.random.Generator) -> None:
        t = GRID
        self.apex = rng.uniform(-0.375, -0.345)
        self.half = {side: rng.uniform(0.335, 0.37) for side in SIDES}
        self.bases = {"right": rng.uniform(0.20, 0.235)}
        self.bases["left"] = self.bases["right"] + rng.uniform(0.01, 0.025)
        case = cases.get("Atelectasis")
        for side in SIDES:
            if case is not None and case.side in (side, "bilateral"):
                self.bases[side] -= 0.025
        drop = rng.uniform(0.07, 0.09)
        self.floor = np.concatenate(
            [
                self.bases[side] + drop * ((np.abs(t[half]) - 0.15) / 0.2) ** 2
                for side, half in (("right", t <= 0), ("left", t > 0))
            ]
        ).astype(np.float32)
        narrow = rng.uniform(0.040, 0.050)
        widening = WIDENING * rng.uniform(0.048, 0.060)
        if "Enlarged Cardiomediastinum" not in cases:
            widening = np.zeros_like(t)
        knob = rng.uniform(0.014, 0.022) * KNOB
        knob += rng.uniform(0.010, 0.018) * TRUNK_ARTERY
        right = narrow + widening + 0.020 * LOWER
        self.sides = {"right": right, "left": narrow + widening * 1.1 + knob + 0.03 * LOWER}
        self.mediastinum = np.concatenate([self.sides[s] for s in SIDES]).astype(np.float32)
        outer, inner = zip(*(self.lung(side) for side in SIDES), strict=True)
        self.outer, self.inner = np.concatenate(outer), np.concatenate(inner)
        self._place_heart(cases, rng)

    def _place_heart(self, cases: dict[str, Case], rng: np.random.Generator) -> None:
        ranges = {"mild": (0.55, 0.60), "moderate": (0.61, 0.67), "severe": (0.68, 0.75)}
        case = cases.get("Cardiomegaly")
        low, high = (0.40, 0.47) if case is None else ranges[case.severity]
        ratio = low + (high - low) * rng.random()
        width = ratio * (self.half["right"] + self.half["left"])
        right = -width * rng.uniform(0.30, 0.35)
        left = right + width
        y = self.bases["left"] - 0.30 * width
        # The left ventricle, long axis towards the apex, and the rounder right atrium.
        tilt = rng.uniform(0.5, 0.65)
        reach = 0.39 * width
        long = reach / float(np.hypot(np.cos(tilt), 0.8 * np.sin(tilt)))
        ventricle = (left - reach, y + 0.01, long, 0.8 * long, tilt)
        atrium = (right + 0.30 * width, y - 0.01, 0.30 * width, 0.36 * width, 0.0)
        self.ratio = ratio
        self.heart = (ventricle, atrium)

    def lung(self, side: str, lift: float = 0.0) -> tuple[Array, Array]:
        """Outer and inner edge over y; `lift` moves the top downwards."""
        down = GRID - np.float32(self.apex + lift)
        rise = (1 - (1 - np.clip(down / 0.33, 0, 1)) ** 2.2) ** 0.6
        outer = self.half[side] * rise * (1 + 0.06 * np.maximum(GRID, 0))
        roof = 0.17 - 0.30 * np.sqrt(np.clip(down / 0.3, 0, 1))
        inner = np.maximum(self.sides[side], roof)
        return outer.astype(np.float32), inner.astype(np.float32)

    def zone(self, side: str, zone: str, rng: np.random.Generator) -> tuple[float, float]:
        """A place within a zone of a lung, clear of the heart as far as there is room."""
        y = ZONE_Y[zone] + rng.uniform(-0.02, 0.02)
        outer = self.half[side] * (0.85 if zone == "upper" else 0.96)
        near = 0.09
        if zone != "upper":
            x, _, long, *_ = self.heart[side == "right"]
            beside = abs(x + SIGN[side] * long) * (1.0 if zone == "lower" else 0.7)
            near = min(max(near, beside), outer - 0.09)
        return SIGN[side] * (near + (outer - near) * rng.uniform(0.4, 0.65)), y


class Picture:
    """Attenuation of one chest, built up layer by layer.

    Attributes:
        lung: (S, S) 0 to 1, within the lungs' outlines.
        air: (S, S) lung that neither heart nor mediastinum covers.
        haze: (S, S) share of the lung's air that findings replace.
        free: (S, S) air outside the lung (pneumothorax).
        over: (S, S) lines and solid things over everything.
    """

    def __init__(self, view: View, chest: Chest, rng: np.random.Generator) -> None:
        self.view, self.chest, self.rng = view, chest, rng
        self.inside = chest.outer[view.side_y]
        self.inside -= view.distance
        self.above = chest.floor[view.ix]
        self.above -= view.y
        self.lung = edge(self.inside, 0.012)
        self.lung *= edge(view.distance - chest.inner[view.side_y], 0.014)
        self.lung *= edge(self.above, 0.012)
        self.heart = np.zeros_like(view.x)
        for x, y, long, short, tilt in chest.heart:
            reach = max(long, short)
            area = view.window(x - reach, y - reach, x + reach, y + reach)
            cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
            dx, dy = view.x[area] - np.float32(x), view.y[area] - np.float32(y)
            along = (cos * dx + sin * dy) * np.float32(1 / long)
            across = (cos * dy - sin * dx) * np.float32(1 / short)
            shape = edge(1 - np.sqrt(along * along + across * across), 0.016 / short)
            np.maximum(self.heart[area], shape, out=self.heart[area])
        self.air = self.lung * (1 - self.heart)
        self.haze = np.zeros_like(view.x)
        self.free: Array | None = None
        self.over = np.zeros_like(view.x)
        self.markings = 1.0  # how strong the vessels are
        self.broken_rib: tuple[str, int, float] | None = None
        self.broken_clavicle: tuple[str, float] | None = None

    def add(self, case: Case) -> tuple[Box, ...]:
        """Draw one finding; the boxes around it, one a side."""
        marks = getattr(self, f"add_{case.kind}")(case)
        boxes = (surrounding_box(mark, area, self.view.size) for area, mark in marks)
        return tuple(box for box in boxes if box is not None)

    def half(self, side: str, area: Window = WHOLE) -> NDArray[np.bool_]:
        """The pixels of one side."""
        return self.view.left[area] if side == "left" else ~self.view.left[area]

    def cover(self, layer: Array, area: Window = WHOLE) -> tuple[Window, Array]:
        """Replace air; what two layers leave is the product of what each leaves.

        Returns:
            What is seen of the layer: where it replaces air.
        """
        haze = self.haze[area]
        haze += layer * (1 - haze)
        return area, layer * self.air[area]

    def lay_over(self, layer: Array, strength: float, area: Window = WHOLE) -> None:
        """Put something solid over everything else."""
        np.maximum(self.over[area], layer * np.float32(strength), out=self.over[area])

    def texture(self, strength: float) -> Array:
        """(S, S) uneven factor around 1."""
        noise = smooth_noise(self.rng, 40, self.view.size)
        noise *= np.float32(strength)
        noise += 1
        return np.clip(noise, 0, 1.25, out=noise)

    def add_heart(self, case: Case) -> list[tuple[Window, Array]]:
        return [(WHOLE, self.heart)]

    def add_mediastinum(self, case: Case) -> list[tuple[Window, Array]]:
        area = self.view.window(-0.2, -0.28, 0.2, 0.0)
        wide = self.chest.mediastinum[self.view.side_y[area]]
        return [(area, edge(wide - self.view.distance[area], 0.01))]

    def add_effusion(self, case: Case) -> list[tuple[Window, Array]]:
        marks = []
        heights = {"small": 0.055, "moderate": 0.13, "large": 0.25}
        for side in SIDES if case.side == "bilateral" else (case.side,):
            height = heights[case.severity] * self.rng.uniform(0.9, 1.15)
            lateral = np.clip((np.abs(GRID) - 0.08) / 0.26, 0, 1)
            level = self.chest.bases[side] + 0.05 - height * (0.55 + 0.75 * lateral**2.5)
            fluid = edge(self.view.y - level.astype(np.float32)[self.view.ix], 0.022)
            fluid *= self.half(side)
            marks.append(self.cover(fluid * np.float32(0.97)))
        return marks

    def add_consolidation(self, case: Case) -> list[tuple[Window, Array]]:
        x, y = self.chest.zone(case.side, case.zone, self.rng)
        blobs = [(x, y, 0.085, 0.06, 0.9)]
        for _ in range(5):
            dx, dy = self.rng.uniform(-0.055, 0.055, 2)
            wide, high = self.rng.uniform(0.03, 0.05, 2)
            blobs.append((x + dx, y + 0.7 * dy, wide, high, 0.7))
        layer = np.minimum(self.view.blobs(blobs), np.float32(0.9))
        layer *= self.texture(0.05)
        layer *= self.half(case.side)
        return [self.cover(np.minimum(layer, 1))]

    def add_opacity(self, case: Case) -> list[tuple[Window, Array]]:
        x, y = self.chest.zone(case.side, case.zone, self.rng)
        return [self._patches(case.side, x, y, 0.055, 9)]

    def add_pneumonia(self, case: Case) -> list[tuple[Window, Array]]:
        places = [(side, *self.chest.zone(side, "lower", self.rng)) for side in SIDES]
        return [self._patches(side, x, y - 0.06, 0.11, 24) for side, x, y in places]

    def _patches(
        self, side: str, x: float, y: float, spread: float, count: int
    ) -> tuple[Window, Array]:
        blobs = []
        for _ in range(count):
            dx, dy = self.rng.uniform(-spread, spread, 2)
            wide, high = self.rng.uniform(0.015, 0.027, 2)
            blobs.append((x + dx, y + dy, wide, high, self.rng.uniform(0.5, 0.75)))
        layer = np.minimum(self.view.blobs(blobs), np.float32(0.75))
        layer *= self.texture(0.15)
        layer *= self.half(side)
        return self.cover(layer)

    def add_nodule(self, case: Case) -> list[tuple[Window, Array]]:
        return [self._disc(case, self.rng.uniform(0.022, 0.030))]

    def add_mass(self, case: Case) -> list[tuple[Window, Array]]:
        return [self._disc(case, self.rng.uniform(0.046, 0.060))]

    def _disc(self, case: Case, radius: float) -> tuple[Window, Array]:
        x, y = self.chest.zone(case.side, case.zone, self.rng)
        r = radius + 0.02
        area = self.view.window(x - r, y - r, x + r, y + r)
        dx, dy = self.view.x[area] - np.float32(x), self.view.y[area] - np.float32(y)
        # Not a perfect circle: the radius wavers with the angle.
        wave = self.rng.uniform(0.02, 0.06) * radius / max(radius, 0.04)
        away = np.sqrt(dx * dx + dy * dy) + np.float32(wave) * dx * dy * np.float32(1 / radius)
        layer = edge(radius - away, 0.012)
        return self.cover(layer * np.float32(0.85), area)

    def add_edema(self, case: Case) -> list[tuple[Window, Array]]:
        strength = {"mild": 0.42, "moderate": 0.56, "severe": 0.70}[case.severity]
        self.markings = 2.0
        wings = self.view.blobs([(SIGN[s] * 0.14, 0.0, 0.11, 0.15, strength) for s in SIDES])
        wings *= self.texture(0.18)
        _, seen = self.cover(np.minimum(wings, 1))
        return [(WHOLE, seen * self.half(side)) for side in SIDES]

    def add_atelectasis(self, case: Case) -> list[tuple[Window, Array]]:
        marks = []
        for side in SIDES if case.side == "bilateral" else (case.side,):
            sign = SIGN[side]
            middle = sign * (0.22 + self.rng.uniform(-0.015, 0.02))
            low = self.chest.bases[side]
            area = self.view.window(middle - 0.12, low - 0.16, middle + 0.12, low + 0.03)
            dx = self.view.x[area] - np.float32(middle)
            layer = np.zeros_like(dx)
            for k in range(2):
                y = low - 0.035 - 0.05 * k
                slope = np.float32(sign * self.rng.uniform(-0.1, 0.3))
                band = edge(0.009 - np.abs(self.view.y[area] - np.float32(y) - slope * dx), 0.008)
                band *= edge(self.rng.uniform(0.06, 0.085) - np.abs(dx), 0.03)
                np.maximum(layer, band, out=layer)
            marks.append(self.cover(layer * np.float32(0.75), area))
        return marks

    def add_pneumothorax(self, case: Case) -> list[tuple[Window, Array]]:
        side = case.side
        depth = {"small": 0.035, "moderate": 0.065, "large": 0.11}[case.severity]
        depth *= self.rng.uniform(0.9, 1.15)
        # The lung sinks from the apex and comes away from the wall, less so further down.
        shrunk, _ = self.chest.lung(side, lift=depth * 1.5)
        shrunk = shrunk - depth * np.clip(1 - (GRID + 0.3) / (0.3 + 3 * depth), 0, 1)
        inside = shrunk.astype(np.float32)[self.view.iy]
        inside -= self.view.distance
        here = self.air * self.half(side)
        free = edge(-inside, 0.008)
        free *= here
        self.free = free
        pleura = line(inside, max(0.010, 1.2 / self.view.size))
        pleura *= here
        gap = self.inside - inside
        pleura *= gap > 0.006  # not where the lung still touches the wall
        self.lay_over(pleura, 0.24)
        return [(WHOLE, free * (gap > 0.015))]

    def add_thickening(self, case: Case) -> list[tuple[Window, Array]]:
        area = self.view.window(-0.4, -0.4, 0.4, 0.05)
        under, _ = self.chest.lung(case.side, lift=0.045)
        under = under - 0.035 * np.clip(-GRID / 0.12, 0, 1)
        cap = edge(self.view.distance[area] - under.astype(np.float32)[self.view.iy[area]], 0.012)
        cap *= edge(np.float32(-0.10) - self.view.y[area], 0.08)
        cap *= self.half(case.side, area)
        return [self.cover(cap * np.float32(0.95), area)]

    def add_rib(self, case: Case) -> list[tuple[Window, Array]]:
        number, at = int(self.rng.integers(3, 6)), self.rng.uniform(0.20, 0.26)
        self.broken_rib = (case.side, number, at)
        fall = float(rib_fall(np.array(at)))
        return self._spot(case.side, at, RIB_TOP + RIB_SPACING * number + fall, 0.05, 0.04)

    def add_clavicle(self, case: Case) -> list[tuple[Window, Array]]:
        at = self.rng.uniform(0.16, 0.22)
        self.broken_clavicle = (case.side, at)
        return self._spot(case.side, at, float(clavicle_y(np.array(at))) + 0.021, 0.055, 0.05)

    def _spot(
        self, side: str, distance: float, y: float, wide: float, high: float
    ) -> list[tuple[Window, Array]]:
        """A box in body coordinates as a mark."""
        x = SIGN[side] * distance
        area = self.view.window(x - wide, y - high, x + wide, y + high)
        return [(area, np.ones_like(self.view.x[area]))]

    def add_pacemaker(self, case: Case) -> list[tuple[Window, Array]]:
        x = SIGN[case.side] * (0.26 + self.rng.uniform(-0.015, 0.015))
        y = -0.20 + self.rng.uniform(-0.02, 0.02)
        area = self.view.window(x - 0.06, y - 0.05, x + 0.06, y + 0.05)
        radius = np.float32(0.018)  # of the box's rounded corners
        dx = np.maximum(np.abs(self.view.x[area] - np.float32(x)) - (np.float32(0.045) - radius), 0)
        dy = np.maximum(np.abs(self.view.y[area] - np.float32(y)) - (np.float32(0.036) - radius), 0)
        box = edge(radius - np.hypot(dx, dy), 0.006)
        self.lay_over(box, 0.42, area)
        # Two leads leave the box at its top, turn down beside the spine, and end in the heart.
        start = y - 0.04
        down = np.clip((GRID - start) / (0.19 - start), 0, 1)
        turn = x * (1 - down) ** 5 - 0.035 * (1 - (1 - down) ** 5)
        leads = self._wire(turn + 0.115 * down**3, start, 0.165, 0.007)
        other = self._wire(turn - 0.015 * down, start, 0.07, 0.007)
        mark = np.maximum(leads, other)
        mark[area] = np.maximum(mark[area], box)
        return [(WHOLE, mark)]

    def add_tube(self, case: Case) -> list[tuple[Window, Array]]:
        middle = np.full(ENTRIES, self.rng.uniform(-0.005, 0.005), np.float32)
        end = self.rng.uniform(-0.17, -0.13)
        walls = [self._wire(middle + d, -0.6, end, 0.006) for d in (-0.009, 0.009)]
        return [(WHOLE, np.maximum(*walls))]

    def add_feeding(self, case: Case) -> list[tuple[Window, Array]]:
        down = np.clip((GRID - 0.2) / 0.2, 0, 1)
        curve = 0.020 + 0.006 * np.sin(GRID * 12) + 0.10 * down**1.5
        return [(WHOLE, self._wire(curve, -0.6, 0.36, 0.008))]

    def add_tubes(self, case: Case) -> list[tuple[Window, Array]]:
        return [*self.add_tube(case), *self.add_feeding(case)]

    def add_catheter(self, case: Case) -> list[tuple[Window, Array]]:
        sign = SIGN[case.side]
        up = np.clip((-0.14 - GRID) / 0.27, 0, 1)
        cross = np.clip((-0.06 - GRID) / 0.14, 0, 1) if case.side == "left" else 0.0
        curve = -0.038 + sign * 0.11 * up**0.8 + 0.06 * cross
        end = self.rng.uniform(-0.02, 0.04)
        return [(WHOLE, self._wire(curve, -0.43, end, 0.008))]

    def _wire(self, curve: Array, top: float, bottom: float, width: float) -> Array:
        """(S, S) a bright line x = curve(y) between two heights, equally wide where it slants."""
        curve = curve.astype(np.float32)
        cosine = 1 / np.sqrt(1 + np.gradient(curve, GRID) ** 2)
        span = curve[(top < GRID) & (bottom > GRID)]
        area = self.view.window(span.min() - 0.02, top, span.max() + 0.02, bottom)
        rows = self.view.iy[area]
        away = self.view.x[area] - curve[rows]
        away *= cosine.astype(np.float32)[rows]
        wire = np.zeros_like(self.view.x)
        wire[area] = line(away, max(width, 1 / self.view.size))
        wire[area] *= (self.view.y[area] > top) & (self.view.y[area] < bottom)
        self.lay_over(wire[area], 0.36, area)
        return wire

    def ribs(self, area: Window) -> Array:
        """Posterior ribs and, fainter, anterior ones in a window; 0 to about 1.2."""
        columns, y, distance = (a[area] for a in (self.view.ix, self.view.y, self.view.distance))
        number = y - RIB_FALL[columns]
        number *= np.float32(1 / RIB_SPACING)
        if self.broken_rib is not None:
            side, broken, at = self.broken_rib
            there = self.half(side, area) & (np.abs(number - np.float32(broken)) < 0.5)
            from_break = distance - np.float32(at)
            number -= np.float32(0.55) * (there & (from_break > 0))
        ribs = rib_profile(number)
        if self.broken_rib is not None:
            # The ends stand out, bright, with a gap between them.
            ribs *= 1 + there * (1.5 * line(from_break, 0.05) - 2.7 * line(from_break, 0.014))
            np.maximum(ribs, 0, out=ribs)
        number = distance * np.float32(0.62)
        number += y
        number += np.float32(0.19)
        number *= np.float32(0.92 / RIB_SPACING)
        number -= 1
        front = rib_profile(number)
        front *= FRONT_RIBS[columns]
        ribs += front
        ribs *= BESIDE_SPINE[columns]
        ribs *= edge(self.inside[area] + np.float32(0.012), 0.02)
        return ribs

    def add_clavicles_to(self, out: Array) -> None:
        """Draw both clavicles."""
        curve, strength = CLAVICLE, CLAVICLE_STRENGTH
        if self.broken_clavicle is not None:
            side, at = self.broken_clavicle
            beyond = SIGN[side] * GRID - np.float32(at)
            curve = curve + np.float32(0.042) * (beyond > 0)
            ends = 1 + line(beyond, 0.05) - 2.2 * line(beyond, 0.016)
            strength = strength * np.maximum(ends, 0)
        area = self.view.window(-0.45, curve[AWAY < 0.45].min() - 0.02, 0.45, -0.2)
        columns = self.view.ix[area]
        away = np.abs(self.view.y[area] - curve[columns])
        bone = edge(0.013 - away, 0.008) * np.float32(0.75)
        bone += np.float32(0.4) * line(away - np.float32(0.011), 0.006)
        bone *= strength[columns]
        out[area] += np.float32(0.13) * bone

    def vessels(self, rng: np.random.Generator, area: Window) -> Array:
        """Branches in a window that fan out from the hila and fade towards the wall."""
        dx = self.view.distance[area] - np.float32(0.045)
        dy = self.view.y[area] - np.float32(HILUM_Y)
        span = np.abs(dx)
        span += np.abs(dy)
        span += np.float32(1e-4)
        turns, rings = 150, 14
        fan = rng.standard_normal((2, turns, rings), dtype=np.float32)
        fan = blurred(blurred(fan, 1, 0.9, 4), 2, 1.6, 4)
        fan = np.maximum(fan / fan.std() - np.float32(0.3), 0).ravel()
        dy /= span
        dy += 1
        dy *= np.float32(turns / 2 - 0.5)  # a turn's number: the angle, as a diamond has it
        at = dy.astype(np.intp)
        at += self.view.left[area] * np.intp(turns)
        at *= np.intp(rings)
        span *= np.float32(1 / 0.5)
        at += np.minimum(span * np.float32(rings), rings - 1).astype(np.intp)
        vessels = fan[at]
        span *= -1
        span += 1
        vessels *= np.maximum(span, 0, out=span)
        return vessels

    def compose(self, rng: np.random.Generator) -> Array:
        """(S, S) attenuation, from 0 (air) to about 1 (metal); `rng` gives the patient's rest."""
        view = self.view
        air = self.air * (1 - self.haze)
        out = TRUNK[view.ix]
        out += np.float32(0.012) * smooth_noise(rng, 28, view.size)
        below = edge(-self.above, 0.06)
        below *= 1 - self.lung
        out += np.float32(0.05) * below
        out += np.float32(0.05) * self.heart
        out -= np.float32(0.385) * air
        if self.free is not None:
            out -= np.float32(0.10) * self.free * air
        cage = view.window(-0.41, -0.42, 0.41, 0.5)  # holds lungs and ribs
        vessels = self.vessels(rng, cage)
        vessels *= air[cage] if self.free is None else air[cage] * (1 - self.free[cage])
        out[cage] += np.float32(0.075 * self.markings) * vessels
        hila = [
            (SIGN[s] * 0.085, HILUM_Y + (0.02 if s == "right" else 0), 0.032, 0.055, 0.17)
            for s in SIDES
        ]
        breasts = [(SIGN[s] * 0.19, 0.16, 0.13, 0.13, rng.uniform(0, 0.05)) for s in SIDES]
        out += self.view.blobs(hila + breasts) * self.air
        ribs = self.ribs(cage)
        ribs *= np.float32(0.045) + np.float32(0.07) * air[cage]  # they show best against air
        out[cage] += ribs
        self.add_clavicles_to(out)
        middle = view.window(-0.06, -0.6, 0.06, 0.6)
        spine = edge(np.float32(0.034) - view.distance[middle], 0.02)
        spine *= VERTEBRAE[view.iy[middle]]
        windpipe = edge(np.float32(0.019) - view.distance[middle], 0.012)
        windpipe *= edge(np.float32(-0.12) - view.y[middle], 0.04)
        out[middle] += spine - np.float32(0.14) * windpipe
        base = self.chest.bases["left"]
        low = view.window(0.02, base, 0.32, base + 0.2)
        dx, dy = view.x[low] - np.float32(0.17), view.y[low] - np.float32(base + 0.085)
        bubble = np.exp(-(dx * dx * np.float32(400) + dy * dy * np.float32(1600)))
        bubble *= edge(-self.above[low], 0.03)
        out[low] -= np.float32(rng.uniform(0.08, 0.3)) * bubble * (1 - self.heart[low])
        out += self.over
        out *= self._body(rng)
        return out

    def _body(self, rng: np.random.Generator) -> Array:
        """(S, S) 1 within neck, shoulders and trunk."""
        shoulder = rng.uniform(0.47, 0.53)
        width = NECK + (shoulder - NECK) * SHOULDERS
        return edge(width.astype(np.float32)[self.view.iy] - self.view.distance, 0.02)


def rib_profile(number: Array) -> Array:
    """Ribs 0 to RIBS - 1 over a continuous rib number, as bodies with brighter borders."""
    table, fine = _rib_table()
    at = (number + 1) * np.float32(fine)
    return table[np.clip(at, 0, len(table) - 1, out=at).astype(np.intp)]


@lru_cache(maxsize=1)
def _rib_table() -> tuple[Array, int]:
    fine = 64  # entries a rib
    number = np.arange(fine * (RIBS + 2)) / fine - 1
    away = np.abs(number - np.round(number)) * 2  # 0 in a rib's middle, 1 between two
    body = np.clip((0.48 - away) / 0.16 + 0.5, 0, 1)
    border = np.clip(1 - np.abs(away - 0.40) / 0.14, 0, 1)
    inside = (number > -0.4) & (number < RIBS - 0.4)
    return ((0.75 * body + 0.45 * border) * inside).astype(np.float32), fine


def surrounding_box(mark: Array, area: Window, size: int) -> Box | None:
    """The box around all that is at least a quarter as strong as the strongest.

    Args:
        mark: what was drawn, in a window of the image.
        area: the window.
        size: pixels a side of the image.
    Returns:
        (left, top, right, bottom) as fractions of the image; None where nothing is in it.
    """
    if not mark.size or not (peak := float(mark.max())) > 0:
        return None
    strong = mark > peak * 0.25
    top, bottom = _reach(np.atleast_1d(strong.any(1)), area[0])
    left, right = _reach(np.atleast_1d(strong.any(0)), area[1])
    return float(left) / size, float(top) / size, float(right) / size, float(bottom) / size


def _reach(there: NDArray[np.bool_], window: slice) -> tuple[int, int]:
    """The first pixel of a line of a window, and the one behind the last."""
    first = window.start or 0
    return first + int(there.argmax()), first + len(there) - int(there[::-1].argmax())


_LETTERS = {
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "R": ("####.", "#...#", "#...#", "####.", "#.#..", "#..#.", "#...#"),
}


def burn_letter(grey: Array, letter: str, x: float, y: float, strength: float) -> None:
    """Write a side marker at a place given in fractions of the image."""
    size = len(grey)
    height, width = max(3, round(size * 0.05)), max(2, round(size * 0.035))
    shape = np.array([[c == "#" for c in row] for row in _LETTERS[letter]])
    rows, columns = np.arange(height) * 7 // height, np.arange(width) * 5 // width
    top, left = int(y * size), int(x * size)
    part = grey[top : top + height, left : left + width]
    big = shape[rows][:, columns][: part.shape[0], : part.shape[1]]
    np.maximum(part, big * np.float32(strength), out=part)


def develop(
    out: Array, domain: Domain, anatomy: np.random.Generator, grain: np.random.Generator
) -> NDArray[np.uint8]:
    """Attenuation to grey levels, as one hospital's scanner has them.

    Args:
        out: (S, S) attenuation; may be written over.
        domain: source: straight contrast, sharp, little noise; target: curved contrast, blurred,
            noisy, collimated.
        anatomy: source of chance for exposure and collimation.
        grain: source of chance for noise.
    Returns:
        (S, S) uint8.
    """
    size = len(out)
    exposure, contrast = anatomy.uniform(-0.05, 0.05), anatomy.uniform(0.92, 1.08)
    borders = anatomy.uniform(0.0, 0.045, 4)
    noise = grain.standard_normal((size, size), dtype=np.float32)
    blur, roughness = (0.5, 0.012) if domain == "source" else (0.9, 0.020)
    grey = blurred(blurred(out, 0, blur * size / 224, 3), 1, blur * size / 224, 3)
    noise *= np.float32(roughness * min(1.0, size / 224) ** 0.5)  # a smaller image averages more
    grey += noise
    if domain == "source":
        grey -= np.float32(0.08 - exposure)
        grey *= np.float32(1.22 * contrast)
        burn_letter(grey, "L", 0.93, 0.03, 1.0)
    else:
        grey -= np.float32(0.06 - exposure)
        grey *= np.float32(1.12 * contrast)
        np.clip(grey, 0, 1, out=grey)
        grey *= grey * (3 - 2 * grey)
        grey *= np.float32(0.93)
        grey += np.float32(0.02)
        left, top, right, bottom = (int(size * b) for b in borders)
        for border in (grey[:top], grey[size - bottom :], grey[:, :left], grey[:, size - right :]):
            border[...] = 0
        burn_letter(grey, "R", 0.06, 0.06, 0.9)
    grey *= 255
    grey += np.float32(0.5)
    return np.clip(grey, 0, 255, out=grey).astype(np.uint8)
