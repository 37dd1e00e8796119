"""A voxel grid in a patient frame, and the shapes that torsos are drawn with."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Point = tuple[float, float, float] | NDArray[np.float64]  # (z, y, x), millimetres of the canonical patient
Course = Sequence[tuple[ArrayLike, float]]  # points along a tube with its radius there

HEART_CENTRE_ZYX = np.array((-38.0, -26.0, 17.0))
HEART_AXIS_ZYX = np.array((-0.36, -0.42, 0.83)) / np.linalg.norm((-0.36, -0.42, 0.83))  # base to apex
HEART_RADII_MM = (58.0, 43.0)  # along the axis, across it


def dome_height(y: NDArray[np.float32], x: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Height z of the diaphragm over (y, x), on the left (`side` 1) or the right (-1), where it stands higher."""
    top = -58.0 if side == 1 else -48.0
    return top - 68.0 * (((x - 55.0 * side) / 65.0) ** 2 + ((y + 5.0) / 90.0) ** 2)


def lung_depth(z: ArrayLike, y: ArrayLike, x: ArrayLike, side: int) -> NDArray[np.float32]:
    """How far inside the chest hull of a lung a point lies: positive inside, 1 in its middle, negative outside."""
    z, y, x = (np.asarray(axis, dtype=np.float32) for axis in (z, y, x))
    hull = 1 - ((z + 10.0) / 152.0) ** 2 - ((y - 1.0) / 89.0) ** 2 - ((x - 66.0 * side) / 61.0) ** 2
    above = (z - dome_height(y, x, side)) / 60.0
    return np.minimum(hull, above)


@dataclass(frozen=True)
class Heart:
    """Where a heart was drawn: centre, unit vector from base to apex, radii along and across it (mm)."""

    centre_zyx: NDArray[np.float64]
    axis_zyx: NDArray[np.float64]
    radii_mm: tuple[float, float]


class Canvas:
    """A volume in Hounsfield units, its organ labels, and coordinates in millimetres of the canonical patient.

    Args:
        size_dhw: voxels.
        spacing_mm_dhw: of the scan.
        scale_zyx: size of this patient against the canonical one; shapes are given for the latter.
        centre_zyx: canonical point in the middle of the volume.
    """

    def __init__(
        self,
        size_dhw: tuple[int, int, int],
        spacing_mm_dhw: tuple[float, float, float],
        scale_zyx: tuple[float, float, float],
        centre_zyx: tuple[float, float, float],
    ) -> None:
        self.spacing_mm_dhw = spacing_mm_dhw
        self.step = [mm / scale for mm, scale in zip(spacing_mm_dhw, scale_zyx, strict=True)]  # canonical mm
        axes = [
            ((np.arange(n) - (n - 1) / 2) * step + centre).astype(np.float32)
            for n, step, centre in zip(size_dhw, self.step, centre_zyx, strict=True)
        ]
        self.axes = axes
        self.z, self.y, self.x = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
        self.hu = np.full(size_dhw, -1000.0, dtype=np.float32)
        self.labels = np.zeros(size_dhw, dtype=np.uint8)
        self.lung_hull = np.zeros(size_dhw, dtype=bool)

    def dome(self, side: int) -> NDArray[np.float32]:
        """(1, H, W) height of the diaphragm."""
        return dome_height(self.y, self.x, side)

    def ellipse(self, centre_yx: tuple[float, float], radii_yx: tuple[float, float]) -> NDArray[np.float32]:
        """(1, H, W) squared distance from the centre in units of the radii: below 1 inside."""
        return ((self.y - centre_yx[0]) / radii_yx[0]) ** 2 + ((self.x - centre_yx[1]) / radii_yx[1]) ** 2

    def ellipsoid_value(self, centre: Point, radii: tuple[float, float, float]) -> NDArray[np.float32]:
        """(D, H, W) squared distance from the centre in units of the radii: below 1 inside."""
        return ((self.z - np.float32(centre[0])) / radii[0]) ** 2 + self.ellipse(
            (float(centre[1]), float(centre[2])), (radii[1], radii[2])
        )

    def paint(self, where: NDArray[np.bool_], hu: float, label: int | None = None) -> None:
        """Set intensity and, if given, label of the voxels `where` (D, H, W)."""
        self.hu[where] = hu
        if label is not None:
            self.labels[where] = label

    def window(self, low: ArrayLike, high: ArrayLike) -> tuple[slice, slice, slice]:
        """Slices of the voxels between two corners (z, y, x); empty where the box lies outside the volume."""
        bounds = zip(self.axes, np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64), strict=True)
        z, y, x = (
            slice(int(np.searchsorted(axis, a)), int(np.searchsorted(axis, b, side="right"))) for axis, a, b in bounds
        )
        return z, y, x

    def offsets(self, box: tuple[slice, slice, slice], origin: ArrayLike) -> tuple[NDArray[np.float32], ...]:
        """(dz, dy, dx) from `origin` to the voxels of a box, broadcastable against each other."""
        dz, dy, dx = (
            axis[part] - np.float32(start)
            for axis, part, start in zip(self.axes, box, np.asarray(origin, dtype=np.float64), strict=True)
        )
        return dz[:, None, None], dy[None, :, None], dx[None, None, :]

    def blend(
        self,
        box: tuple[slice, slice, slice],
        coverage: NDArray[np.float32],
        hu: float,
        label: int | None = None,
        within: NDArray[np.bool_] | None = None,
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """Mix `hu` into a box by the share of each voxel that the shape covers, so that thin shapes do not vanish.

        Args:
            box: slices as given by `window`.
            coverage: (d, h, w) in [0, 1], of the box.
            hu: intensity of the shape.
            label: given to voxels that are covered by half or more.
            within: (D, H, W), the shape is cut to it.
            mask: (D, H, W), set where the shape covers half or more.
        """
        if within is not None:
            coverage = coverage * within[box]
        self.hu[box] += coverage * (np.float32(hu) - self.hu[box])
        half = coverage >= 0.5
        if label is not None:
            self.labels[box][half] = label
        if mask is not None:
            mask[box] |= half

    def blob(
        self,
        centre: Point,
        radii: tuple[float, float, float],
        hu: float,
        label: int | None = None,
        within: NDArray[np.bool_] | None = None,
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """An ellipsoid along the axes; arguments as in `blend`."""
        middle, reach = np.asarray(centre, dtype=np.float64), np.asarray(radii) + np.asarray(self.step)
        box = self.window(middle - reach, middle + reach)
        dz, dy, dx = self.offsets(box, middle)
        radius = np.sqrt((dz / radii[0]) ** 2 + (dy / radii[1]) ** 2 + (dx / radii[2]) ** 2)
        self.blend(box, self._edge((1 - radius) * min(radii)), hu, label, within, mask)

    def tube(
        self,
        course: Course,
        hu: float,
        label: int | None = None,
        within: NDArray[np.bool_] | None = None,
        mask: NDArray[np.bool_] | None = None,
    ) -> None:
        """A tube along a course of points whose radius changes evenly between them; arguments as in `blend`."""
        for (start, start_radius), (end, end_radius) in pairwise(course):
            first, last = np.asarray(start, dtype=np.float64), np.asarray(end, dtype=np.float64)
            reach = max(start_radius, end_radius) + np.asarray(self.step)
            box = self.window(np.minimum(first, last) - reach, np.maximum(first, last) + reach)
            if min(part.stop - part.start for part in box) <= 0:
                continue
            depth = self.depth_in_segment(box, first, last, start_radius, end_radius)
            self.blend(box, self._edge(depth), hu, label, within, mask)

    def depth_in_segment(
        self,
        box: tuple[slice, slice, slice],
        first: NDArray[np.float64],
        last: NDArray[np.float64],
        start_radius: float,
        end_radius: float,
    ) -> NDArray[np.float32]:
        """How deep (mm) the voxels of a box lie under the surface of a straight tube; negative outside."""
        direction = (last - first).astype(np.float32)
        length_squared = max(float(direction @ direction), 1e-6)
        dz, dy, dx = self.offsets(box, first)
        share = np.clip((dz * direction[0] + dy * direction[1] + dx * direction[2]) / length_squared, 0, 1)
        distance = np.sqrt(
            (dz - share * direction[0]) ** 2 + (dy - share * direction[1]) ** 2 + (dx - share * direction[2]) ** 2
        )
        return start_radius + share * (end_radius - start_radius) - distance

    def _edge(self, depth: NDArray[np.float32]) -> NDArray[np.float32]:
        """Share of a voxel that is covered where the surface lies `depth` mm outside of its centre."""
        width = (self.step[0] * self.step[1] * self.step[2]) ** (1 / 3)
        return np.clip(depth / width + 0.5, 0, 1).astype(np.float32)

    def draw_heart(self, scale: float, label: int, blood_hu: float, muscle_hu: float) -> Heart:
        """Fat, muscle and blood of a heart `scale` times the usual size; gives back where it is."""
        # A larger heart grows to the left and the front; its back stays before the esophagus.
        centre = HEART_CENTRE_ZYX + (scale - 1) * np.array((-4.0, -22.0, 14.0))
        heart = Heart(centre, HEART_AXIS_ZYX, (HEART_RADII_MM[0] * scale, HEART_RADII_MM[1] * scale))
        box, depth = self.depth_in_heart(heart, margin_mm=6.0)
        self.blend(box, self._edge(depth + 4.0), -85.0)  # epicardial fat
        self.labels[box][depth > -4.0] = 0
        self.lung_hull[box] &= depth < -4.0
        self.blend(box, self._edge(depth), muscle_hu, label)
        self.blend(box, self._edge(depth - 9.0), blood_hu)
        return heart

    def depth_in_heart(self, heart: Heart, margin_mm: float) -> tuple[tuple[slice, slice, slice], NDArray[np.float32]]:
        """A box around the heart with a margin, and the depth of its voxels under the surface, mm, negative outside."""
        reach = heart.radii_mm[0] + margin_mm
        box = self.window(heart.centre_zyx - reach, heart.centre_zyx + reach)
        dz, dy, dx = self.offsets(box, heart.centre_zyx)
        along = dz * heart.axis_zyx[0] + dy * heart.axis_zyx[1] + dx * heart.axis_zyx[2]
        across_squared = np.maximum(dz**2 + dy**2 + dx**2 - along**2, 0)
        value = np.sqrt((along / heart.radii_mm[0]) ** 2 + across_squared / heart.radii_mm[1] ** 2)
        return box, ((1 - value) * heart.radii_mm[1]).astype(np.float32)
