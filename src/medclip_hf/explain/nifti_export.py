"""A map of a CT scan as a NIfTI file on the scan's own grid, so that a viewer lays it over the scan it came from.

Models see scans reoriented, resampled, cropped and in patches. Here a map finds back through world coordinates alone:
both grids have an affine matrix to the same RAS+ millimetres. The file has a header of its own: nothing of the source's
header beside its geometry comes along, no description, no extension, where patients' names may stand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import map_coordinates

Floats = NDArray[np.float64]

_EDGE_VOXELS = 0.5 + 1e-6  # from the centre of a voxel to its face
_PARALLEL_CELLS = 1e-4  # of the map that an axis may stray over the whole grid: what rounded headers leave
_ORTHOGONAL = 1e-5  # of the cosine between axes: what single precision in headers leaves


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of a file lie.

    Args:
        shape_xyz: voxels along the file's three axes.
        affine: (4, 4), from voxel index to RAS+ millimetres.

    Raises:
        ValueError: an affine that is singular, not finite or of another shape; an empty grid.
    """

    shape_xyz: tuple[int, int, int]
    affine: Floats

    def __post_init__(self) -> None:
        if len(self.shape_xyz) != 3 or min(self.shape_xyz) < 1:
            raise ValueError(f"a grid needs three positive numbers of voxels, got {self.shape_xyz}")
        _check_affine(self.affine)


def patch_grid_affine(affine: ArrayLike, patch_size_dhw: Sequence[int], start_dhw: Sequence[int] = (0, 0, 0)) -> Floats:
    """The affine (4, 4) of a map with one value a patch, from the index (x, y, z) of a patch to RAS+ millimetres.

    The centre of patch 0 lies (size − 1) / 2 voxels from the centre of the crop's first voxel.

    Args:
        affine: of the volume that was cut into patches, from (x, y, z) to RAS+, as `data.ct.geometry.Volume` has it.
        patch_size_dhw: voxels of a patch.
        start_dhw: first voxel of the crop that was cut into patches; negative where it was padded in front.

    Raises:
        ValueError: an affine of another shape or singular, a patch of no voxel.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    _check_affine(matrix)
    if len(patch_size_dhw) != 3 or min(patch_size_dhw) < 1 or len(start_dhw) != 3:
        raise ValueError(f"expected patch and start (depth, height, width), got {patch_size_dhw} and {start_dhw}")
    size_xyz, start_xyz = np.array(patch_size_dhw[::-1], float), np.array(start_dhw[::-1], float)
    change = np.diag([*size_xyz, 1.0])
    change[:3, 3] = start_xyz + (size_xyz - 1.0) / 2.0
    return np.asarray(matrix @ change)


def map_on_grid(
    values_dhw: ArrayLike, affine: ArrayLike, grid: Grid, *, outside: float = 0.0, nearest: bool = False
) -> NDArray[np.float32]:
    """The map on another grid, (X, Y, Z) as files have it: trilinear inside the map's box, `outside` elsewhere.

    Args:
        values_dhw: (D, H, W), finite.
        affine: (4, 4), from the map's index (x, y, z) = (W, H, D) to RAS+ millimetres.
        grid: of the scan.
        outside: value of voxels that the map does not cover.
        nearest: take the nearest value instead (for masks).

    Raises:
        ValueError: a map of another shape or not finite, an affine that is none, a map that misses the grid.
    """
    values, matrix = np.asarray(values_dhw, dtype=np.float32), np.asarray(affine, dtype=np.float64)
    if values.ndim != 3 or 0 in values.shape or not np.isfinite(values).all():
        raise ValueError(f"a map must be finite and (depth, height, width), got shape {values.shape}")
    _check_affine(matrix)
    to_map = np.linalg.inv(matrix) @ grid.affine  # voxel of the grid -> index (x, y, z) of the map
    filled = np.full(grid.shape_xyz[::-1], outside, dtype=np.float32).T  # slices end to end, as files have them
    fill = _fill_turned if (axes := _parallel_axes(to_map, grid.shape_xyz)) is None else partial(_fill_parallel, axes)
    if not fill(filled, values, to_map, nearest):
        raise ValueError("the map lies wholly outside of the scan: its affine belongs to another scan")
    return filled


def _parallel_axes(to_map: Floats, shape_xyz: tuple[int, int, int]) -> list[int] | None:
    """The axis of the grid along which each axis (x, y, z) of the map runs; None where they are turned."""
    reach = np.abs(to_map[:3, :3]) * shape_xyz  # how far each axis of the grid leads along each of the map, in cells
    axes = reach.argmax(axis=1)
    strays = reach.copy()
    strays[np.arange(3), axes] = 0.0
    return axes.tolist() if len(set(axes.tolist())) == 3 and strays.max() < _PARALLEL_CELLS else None


def _fill_parallel(
    axes: Sequence[int], filled: NDArray[np.float32], values: NDArray[np.float32], to_map: Floats, nearest: bool
) -> bool:
    """Put in a map whose axes run along those of the grid, one after the other; whether any of it lies there."""
    places = [to_map[axis, along] * np.arange(filled.shape[along]) + to_map[axis, 3] for axis, along in enumerate(axes)]
    covered = [_is_inside(one, limit) for one, limit in zip(places, values.shape[::-1], strict=True)]
    if not all(one.any() for one in covered):
        return False
    by_axis = values.T.astype(np.float64)
    first, second, last = np.argsort(axes)  # axes of the map that run along x, y and z of the grid
    for axis in (first, second):
        by_axis = _sampled(by_axis, axis, places[axis][covered[axis]], nearest)
    planes = np.ascontiguousarray(by_axis.transpose(last, second, first))  # (cells, y, x)
    x, y, z = (_as_slice(covered[axis]) for axis in (first, second, last))
    for number, place in zip(range(z.start, z.stop), places[last][covered[last]], strict=True):
        filled[x, y, number] = _sampled(planes, 0, place[None], nearest)[0].T
    return True


def _sampled(values: Floats, axis: int, places: Floats, nearest: bool) -> Floats:
    """Values at places along an axis, linear between cells, or of the nearest cell."""
    clipped = np.clip(places, 0.0, values.shape[axis] - 1.0)
    if nearest:
        return values.take(np.floor(clipped + 0.5).astype(np.intp), axis)
    low = np.minimum(clipped.astype(np.intp), max(values.shape[axis] - 2, 0))
    share = (clipped - low).reshape([-1 if one == axis else 1 for one in range(values.ndim)])
    high = np.minimum(low + 1, values.shape[axis] - 1)
    return values.take(low, axis) * (1.0 - share) + values.take(high, axis) * share


def _fill_turned(filled: NDArray[np.float32], values: NDArray[np.float32], to_map: Floats, nearest: bool) -> bool:
    """The same of a map that is turned against the grid, slice by slice: 512³ needs no coordinates of 512³."""
    x, y = (np.arange(size, dtype=np.float64) for size in filled.shape[:2])
    is_any = False
    for z in range(filled.shape[2]):
        places = [row[0] * x[:, None] + row[1] * y[None, :] + (row[2] * z + row[3]) for row in to_map[:3]]
        inside = [_is_inside(one, limit) for one, limit in zip(places, values.shape[::-1], strict=True)]
        covered = np.logical_and.reduce(inside)
        if covered.any():
            is_any = True
            index_dhw = np.stack([one[covered] for one in reversed(places)])
            filled[..., z][covered] = map_coordinates(values, index_dhw, order=0 if nearest else 1, mode="nearest")
    return is_any


def _is_inside(places: Floats, size: int) -> NDArray[np.bool_]:
    return (places >= -_EDGE_VOXELS) & (places <= size - 1 + _EDGE_VOXELS)


def _as_slice(flags: NDArray[np.bool_]) -> slice:
    """The run of what is set."""
    found = np.flatnonzero(flags)
    return slice(int(found[0]), int(found[-1]) + 1)


def write_map_nifti(
    path: str | Path,
    values_dhw: ArrayLike,
    affine: ArrayLike,
    *,
    like: str | Path | Grid,
    outside: float = 0.0,
    nearest: bool = False,
) -> Path:
    """Path of the NIfTI file (.nii or .nii.gz) of a map on the grid of a scan, written whole or not at all.

    Args:
        path: to write; its folder is made if missing.
        values_dhw: (D, H, W), finite.
        affine: (4, 4) of the map, see `map_on_grid` and `patch_grid_affine`.
        like: the NIfTI scan whose grid the map gets, or that grid (of a DICOM series).
        outside: value of voxels that the map does not cover.
        nearest: take the nearest value instead of interpolating (for masks).

    Raises:
        ValueError: as `map_on_grid`; a path that does not end in .nii or .nii.gz; a scan that cannot be read, has no
            orientation, or is the file that would be written.
    """
    import nibabel

    target = Path(path)
    ending = ".nii.gz" if target.name.endswith(".nii.gz") else target.suffix
    if ending not in (".nii", ".nii.gz"):
        raise ValueError(f"{target} must end in .nii or .nii.gz")
    if not isinstance(like, Grid) and target.resolve() == Path(like).resolve():
        raise ValueError(f"{target} is the scan itself: name another file for the map")
    grid = like if isinstance(like, Grid) else grid_of(like)
    values = map_on_grid(values_dhw, affine, grid, outside=outside, nearest=nearest)
    image = nibabel.Nifti1Image(values, grid.affine)
    image.set_sform(grid.affine, code=1)
    # A quaternion has no shears: a scan with a tilted gantry is placed by its sform alone.
    image.set_qform(grid.affine, code=1 if _is_orthogonal(grid.affine) else 0)
    image.header.set_xyzt_units("mm")
    image.header["cal_min"], image.header["cal_max"] = float(values.min()), float(values.max())
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".partial.{target.name.removesuffix(ending)}{ending}")
    nibabel.save(image, unfinished)
    unfinished.replace(target)
    return target


def grid_of(path: str | Path) -> Grid:
    """The grid of a NIfTI scan; only its header is read.

    Raises:
        ValueError: a file that is no NIfTI, has no three axes, or says nothing of its orientation.
    """
    import nibabel

    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as NIfTI: {error}") from error
    if not isinstance(image, nibabel.Nifti1Pair):
        raise ValueError(f"{path} is a {type(image).__name__}, not NIfTI")
    shape = image.shape
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise ValueError(f"{path} must hold one volume, got shape {shape}")
    if not int(image.header["sform_code"]) and not int(image.header["qform_code"]):
        raise ValueError(f"{path} says nothing of its orientation (sform and qform code 0): no map can be laid over it")
    x, y, z = shape[:3]
    return Grid((x, y, z), np.asarray(image.affine, dtype=np.float64))


def _check_affine(matrix: Floats) -> None:
    if np.shape(matrix) != (4, 4) or not np.isfinite(matrix).all() or not np.allclose(matrix[3], (0, 0, 0, 1)):
        raise ValueError(
            f"an affine must be a finite (4, 4) matrix that ends in 0 0 0 1, got {np.asarray(matrix).tolist()}"
        )
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-12:
        raise ValueError("the affine is singular: one of its axes has no length or lies in the plane of the others")


def _is_orthogonal(affine: Floats) -> bool:
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    return bool(np.allclose(axes.T @ axes, np.eye(3), atol=_ORTHOGONAL))
