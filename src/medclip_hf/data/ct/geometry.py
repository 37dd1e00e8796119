"""The geometry contract of CT volumes: orientation, spacing and Hounsfield units, enforced when a scan is read.

A network sees only an array. Fed a flipped scan, or one whose rescale slope and intercept were applied twice or not at
all, it answers all the same, and wrongly: with the released weights the mean AUC falls from .778 to .627 that way. So
whatever cannot be shown to keep the contract is refused here, with the reason and the cure.

Two index orders occur. Files and affine matrices speak of (x, y, z); arrays are (depth, height, width) = (z, y, x)
everywhere inside. World coordinates are NIfTI's: millimetres, growing to the patient's right, front and head (RAS+).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

# Outside of these a header is damaged or speaks of another unit (micrometres, metres).
SPACING_LIMITS_MM = (0.05, 20.0)
# CT axes are those of the table. A larger angle means a tilted gantry or a reformatted volume.
MAX_OBLIQUE_DEGREES = 10.0
# Of the largest displacement between the corners of two grids, against the finest voxel, to call the grids the same.
MAX_GRID_OFFSET_VOXELS = 0.25
# Stored volumes keep what 12-bit scanners resolve above the lower end of the published window; below it is only air
# and the padding outside of the reconstruction circle (-2000, -2048, -3024, -8192 by vendor).
STORED_HU_RANGE = (-1150, 3071)

_STATISTICS_VOXELS = 2_000_000
_AXIS_OF_LETTER = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}


class UnusableScan(ValueError):
    """A scan that does not keep the contract.

    Args:
        reason: short and countable, fit for `data.stages.Drop`.
        detail: which file, what was found, what to do.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[UnusableScan], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class GeometryContract:
    """What an array must be before a CT model may see it; the defaults are those of the released fVLM weights.

    Args:
        orientation: where x, y and z grow to, as letters of R/L, A/P and S/I. "LPS": the last array axis to the
            patient's left, the middle one to the back, the first one to the head.
        spacing_mm_dhw: voxel size in mm along (depth, height, width).
        hu_min: lower end of the Hounsfield window, becomes 0.
        hu_max: upper end of the Hounsfield window, becomes 1.
        rescale_applied: values are Hounsfield units; slope and intercept were applied once and must not be again.
    """

    orientation: str = "LPS"
    spacing_mm_dhw: tuple[float, float, float] = (3.0, 1.0, 1.0)
    hu_min: float = -1150.0
    hu_max: float = 350.0
    rescale_applied: bool = True

    def __post_init__(self) -> None:
        check_orientation_code(self.orientation)
        object.__setattr__(self, "spacing_mm_dhw", tuple(float(step) for step in self.spacing_mm_dhw))
        if len(self.spacing_mm_dhw) != 3 or min(self.spacing_mm_dhw) <= 0:
            raise ValueError(
                f"spacing_mm_dhw needs three positive numbers (depth, height, width), got {self.spacing_mm_dhw}"
            )
        if not self.hu_min < self.hu_max:
            raise ValueError(f"hu_min must lie below hu_max, got {self.hu_min} and {self.hu_max}")
        if not self.rescale_applied:
            raise ValueError(
                "the contract is about Hounsfield units: rescale_applied must be true. "
                "Raw stored values are converted on reading, see data.ct.reading.Rescale."
            )

    def to_dict(self) -> dict[str, Any]:
        """The contract as JSON-able values."""
        return asdict(self) | {"spacing_mm_dhw": list(self.spacing_mm_dhw)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The contract that `to_dict` wrote.

        Raises:
            ValueError: for keys that a contract does not have.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"a geometry contract has no {unknown}; it has {[field.name for field in fields(cls)]}")
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or label array with its place in the patient.

    Args:
        values: (D, H, W).
        affine: (4, 4), from the index (x, y, z) = (W, H, D) to RAS+ millimetres.
        source: the file or folder it came from, for messages.
    """

    values: NDArray[Any]
    affine: NDArray[np.float64]
    source: str

    @property
    def spacing_mm_dhw(self) -> tuple[float, float, float]:
        """Distance between voxels in mm along (depth, height, width)."""
        width, height, depth = (float(step) for step in np.linalg.norm(self.affine[:3, :3], axis=0))
        return depth, height, width

    @property
    def orientation(self) -> str:
        """Where x, y and z grow to, as three letters."""
        from nibabel.orientations import aff2axcodes

        return "".join(aff2axcodes(self.affine))


def check_orientation_code(code: str) -> None:
    """Raise ValueError unless `code` names one direction of each of the three body axes."""
    if sorted(_AXIS_OF_LETTER.get(letter, -1) for letter in code) != [0, 1, 2]:
        raise ValueError(f'orientation needs one letter each of R/L, A/P and S/I, such as "LPS"; got {code!r}')


def oriented_volume(
    values_xyz: NDArray[Any], affine: NDArray[np.float64], source: str, orientation: str = "LPS"
) -> Volume:
    """The volume with axes (D, H, W) that grow as `orientation` says; a view where possible, never interpolated.

    Args:
        values_xyz: (X, Y, Z), as the file has it.
        affine: (4, 4), from (x, y, z) to RAS+ millimetres.
        source: the file or folder, for messages.
        orientation: see `GeometryContract`.

    Raises:
        UnusableScan: where the array is not three-dimensional or the affine describes no CT grid.
    """
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

    if values_xyz.ndim != 3 or min(values_xyz.shape) < 2:
        raise UnusableScan(
            "not a 3-D volume",
            f"{source}: shape {values_xyz.shape}; expected three axes of at least two voxels. "
            "Split a 4-D file (phases, time points) and choose one volume.",
        )
    check_affine(affine, source)
    change = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(orientation)))
    turned = apply_orientation(values_xyz, change)
    return Volume(turned.transpose(2, 1, 0), affine @ inv_ornt_aff(change, values_xyz.shape), source)


def check_affine(affine: NDArray[np.float64], source: str) -> None:
    """Refuse a matrix that is no plausible grid of a CT: not finite, singular, wrong unit, sheared or oblique.

    Raises:
        UnusableScan: with the reason.
    """
    axes = np.asarray(affine, dtype=np.float64)[:3, :3]
    spacing = np.linalg.norm(axes, axis=0)
    if not np.isfinite(affine).all() or (spacing == 0).any():
        raise UnusableScan("geometry damaged", f"{source}: the affine is not finite or singular:\n{affine}")
    low, high = SPACING_LIMITS_MM
    if spacing.min() < low or spacing.max() > high:
        raise UnusableScan(
            "spacing implausible",
            f"{source}: voxels of {np.round(spacing, 4).tolist()} mm; expected {low} to {high} mm. "
            "Check the unit of the header.",
        )
    cosines = np.abs(axes / spacing)
    skew = np.degrees(np.arcsin(np.clip(np.abs(np.triu((axes / spacing).T @ (axes / spacing), 1)).max(), 0, 1)))
    if skew > 0.5:
        raise UnusableScan(
            "gantry tilt",
            f"{source}: the axes are {skew:.1f} degrees away from perpendicular. "
            "Resample the series to a rectangular grid first (dcm2niix does).",
        )
    oblique = float(np.degrees(np.arccos(np.clip(cosines.max(axis=0).min(), 0, 1))))
    if oblique > MAX_OBLIQUE_DEGREES:
        raise UnusableScan(
            "oblique volume",
            f"{source}: the axes are {oblique:.0f} degrees away from those of the patient; at most "
            f"{MAX_OBLIQUE_DEGREES:.0f} are accepted. Take the axial series or resample to patient axes.",
        )


def check_same_grid(image: Volume, labels: Volume) -> None:
    """Refuse labels that do not lie on the grid of the image; both are to be in the same orientation.

    Raises:
        UnusableScan: naming the difference.
    """
    if image.values.shape != labels.values.shape:
        raise UnusableScan(
            "mask on another grid",
            f"{labels.source} has {labels.values.shape} voxels (D, H, W), {image.source} has {image.values.shape}. "
            "Segment this very volume, or resample the labels to it with nearest neighbours.",
        )
    depth, height, width = image.values.shape
    corners = np.array([(x, y, z, 1) for x in (0, width - 1) for y in (0, height - 1) for z in (0, depth - 1)]).T
    offset = float(np.linalg.norm(((image.affine - labels.affine) @ corners)[:3], axis=0).max())
    if offset > MAX_GRID_OFFSET_VOXELS * min(image.spacing_mm_dhw):
        raise UnusableScan(
            "mask on another grid",
            f"{labels.source} lies up to {offset:.1f} mm away from {image.source}. "
            "Segment this very volume, or repair the header that is wrong.",
        )


def check_hounsfield(values: NDArray[Any], source: str) -> None:
    """Refuse values that cannot be Hounsfield units of a body in air.

    A CT of a body holds air (about -1000, lung about -850) and soft tissue (-100 fat to 100 muscle), and nothing below
    air but one constant that fills the space outside of the reconstruction circle. Rescaled twice, tissue itself sinks
    below air (minimum near -2048 or -8192); raw, windowed or MR values have no air.

    Args:
        values: (D, H, W), believed to be Hounsfield units.
        source: the file or folder, for messages.

    Raises:
        UnusableScan: with what was found and its likely cause.
    """
    if values.dtype.kind not in "iuf":
        raise UnusableScan("wrong dtype", f"{source}: values are {values.dtype}; expected integers or floats")
    lowest, highest = float(values.min()), float(values.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise UnusableScan("not a number", f"{source}: holds NaN or infinite voxels. Restore it from its source.")
    if lowest == highest:
        raise UnusableScan("constant volume", f"{source}: every voxel is {lowest:g}")
    step = math.ceil((values.size / _STATISTICS_VOXELS) ** (1 / 3))
    sample = values[::step, ::step, ::step].ravel()
    body = sample[sample != lowest] if lowest < -1100 else sample
    if body.size == 0:
        raise UnusableScan("constant volume", f"{source}: hardly any voxel differs from {lowest:g}")
    found = f"{source}: values from {lowest:g} to {highest:g}"
    below_air = _share(body < -1300)
    if below_air > 0.01:
        raise UnusableScan(
            "rescaled twice",
            f"{found}, {below_air:.0%} of the voxels below -1300 HU, where neither tissue nor air lies. Slope and "
            "intercept were probably applied to values that were Hounsfield units already; do not apply them again.",
        )
    if _share(body <= -600) < 0.001:
        raise UnusableScan(
            "not Hounsfield units",
            f"{found}, without any air (0.1 % of the voxels lie below {np.quantile(body, 0.001):g}; air is -1000 HU). "
            "Raw values whose slope and intercept are still to be applied, a windowed copy, or not CT at all (MR).",
        )
    dense = _share(body > 1000)
    if dense > 0.1:
        raise UnusableScan(
            "not Hounsfield units",
            f"{found}, {dense:.0%} of the voxels above 1000 HU, as dense as cortical bone. Raw or inverted values?",
        )
    tissue = _share((body > -300) & (body < 300))
    if tissue < 0.03:
        raise UnusableScan(
            "not Hounsfield units",
            f"{found}, but only {tissue:.1%} of the voxels between -300 and 300 HU, where soft tissue lies. "
            "Check slope and intercept (applied twice?) and that the scan shows a patient.",
        )


def _share(flags: NDArray[np.bool_]) -> float:
    return np.count_nonzero(flags) / flags.size


def check_slices(values: NDArray[Any], source: str) -> None:
    """Refuse a volume in which a slice is repeated: two slices with noise are never equal by chance.

    Constant slices (padding) and drawn ones (without noise) may repeat.

    Args:
        values: (D, H, W).
        source: the file or folder, for messages.

    Raises:
        UnusableScan: naming the first place.
    """
    coarse = values[:, ::8, ::8]
    repeated = [
        int(slice_)
        for slice_ in np.flatnonzero((coarse[1:] == coarse[:-1]).all(axis=(1, 2)))
        if _is_noisy(values[slice_]) and np.array_equal(values[slice_], values[slice_ + 1])
    ]
    if repeated:
        raise UnusableScan(
            "repeated slices",
            f"{source}: {len(repeated)} slices equal the one before, first number {repeated[0] + 1} from the feet. "
            "Convert the scan again from DICOM.",
        )


def _is_noisy(image: NDArray[Any]) -> bool:
    return float((image[:, 1:] != image[:, :-1]).mean()) > 0.2


def resampled_size(
    shape_dhw: tuple[int, ...], spacing_mm_dhw: tuple[float, ...], target_mm_dhw: tuple[float, ...]
) -> tuple[int, int, int]:
    """Voxels after resampling: extent over the new spacing, cut down to whole voxels as published."""
    sizes = (
        int(count * old / new + 1e-6) for count, old, new in zip(shape_dhw, spacing_mm_dhw, target_mm_dhw, strict=True)
    )
    depth, height, width = (max(1, size) for size in sizes)
    return depth, height, width


def resample(volume: Volume, target_mm_dhw: tuple[float, ...], mode: Literal["trilinear", "nearest"]) -> Volume:
    """The volume on a grid of (nearly) the target spacing over the same extent.

    The published recipe: trilinear without anti-aliasing for images, nearest for labels, sizes cut down to whole
    voxels. The spacing of the result is the extent over that size, hence a trace above the target. One departure:
    labels are read at voxel centres ("nearest-exact"), so that they lie on the image; the published call shifts them
    by half an output voxel.

    Args:
        volume: to resample.
        target_mm_dhw: wanted spacing in mm.
        mode: "trilinear" gives float32, "nearest" keeps the dtype.
    """
    size = resampled_size(volume.values.shape, volume.spacing_mm_dhw, target_mm_dhw)
    if mode == "trilinear":
        values = _interpolate(volume.values, size)
    else:
        values = volume.values[np.ix_(*map(_nearest_indices, volume.values.shape, size))]
    return Volume(values, _rescaled_affine(volume, size), volume.source)


def _interpolate(values: NDArray[Any], size: tuple[int, int, int]) -> NDArray[np.float32]:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.shape == size:
        return values
    import torch
    from monai.transforms import Resize  # takes seconds to import

    resize = Resize(size, mode="trilinear", align_corners=False, anti_aliasing=False)
    return torch.as_tensor(resize(torch.from_numpy(values)[None]))[0].numpy()


def _nearest_indices(old: int, new: int) -> NDArray[np.intp]:
    return np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(np.intp), old - 1)


def _rescaled_affine(volume: Volume, size: tuple[int, int, int]) -> NDArray[np.float64]:
    ratio = np.array(volume.values.shape[::-1]) / np.array(size[::-1])  # old voxels per new one, (x, y, z)
    change = np.diag([*ratio, 1.0])
    change[:3, 3] = (ratio - 1) / 2  # centres: the outer faces of both grids coincide
    return volume.affine @ change


def stored_hounsfield(values: NDArray[Any]) -> NDArray[np.int16]:
    """Hounsfield units as whole numbers within `STORED_HU_RANGE`, int16."""
    rounded = np.rint(values)
    return np.clip(rounded, *STORED_HU_RANGE, out=rounded).astype(np.int16)
