"""Reading CT volumes and their labels: NIfTI, DICOM and npz files to arrays that keep the geometry contract."""

from __future__ import annotations

import logging
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.ct.anatomy import THORACIC_ANATOMIES, LabelVersion, check_lung_is_air, merge_labels
from medclip_hf.data.ct.dicom import is_dicom, read_series
from medclip_hf.data.ct.geometry import (
    GeometryContract,
    UnusableScan,
    Volume,
    check_hounsfield,
    check_same_grid,
    check_slices,
    oriented_volume,
    resample,
    stored_hounsfield,
)

logger = logging.getLogger(__name__)

# Rad-ChestCT: 0.8 mm isotropic. Its published preprocessing sorts the slices from head to feet and leaves rows and
# columns as the scanner writes them (to the left, to the back).
RAD_CHESTCT_SPACING_MM = 0.8
RAD_CHESTCT_ORIENTATION = "LPI"

_NIFTI_ENDINGS = (".nii", ".nii.gz")
_LARGEST_DEFLATION = 1032  # bytes that one byte of a gzip stream can stand for, https://zlib.net/zlib_tech.html


@dataclass(frozen=True)
class Rescale:
    """Slope and intercept that turn stored values into Hounsfield units, where a file does not apply them itself."""

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        if not (np.isfinite([self.slope, self.intercept]).all() and self.slope > 0):
            raise ValueError(f"expected a positive slope and a finite intercept, got {self.slope}, {self.intercept}")


@dataclass(frozen=True, eq=False)
class CTScan:
    """A scan that keeps the contract: oriented, resampled, in Hounsfield units, with its anatomy mask if it has one."""

    image: Volume  # int16
    anatomy_mask: Volume | None  # uint8, 0 = background, i + 1 = anatomy i


def load_ct(
    path: Path | str,
    contract: GeometryContract | None = None,
    *,
    labels_path: Path | str | None = None,
    label_version: LabelVersion = "v2",
    anatomies: Sequence[str] = THORACIC_ANATOMIES,
    rescale: Rescale | None = None,
    affine: NDArray[np.float64] | None = None,
    series_uid: str | None = None,
) -> CTScan:
    """A CT from disk, as a model may see it: the one door for engines, evaluation and demonstrations alike.

    Args:
        path: NIfTI file, DICOM folder or file, or Rad-ChestCT ``.npz``.
        contract: orientation and spacing to bring the scan to.
        labels_path: label volume of TotalSegmentator on the grid of the scan.
        label_version: of TotalSegmentator that wrote the labels.
        anatomies: of the mask, in the order of the model's config.
        rescale: given only where the file holds raw values; without it values are Hounsfield units already.
        affine: (4, 4) from (x, y, z) to RAS+ mm, overrides a header that is known to be wrong.
        series_uid: which DICOM series, where a folder holds several.

    Raises:
        UnusableScan: with a countable reason and, as detail, file, finding and cure.

    Examples:
        >>> scan = load_ct("chest.nii.gz", labels_path="chest_labels.nii.gz")
        >>> scan.image.values.shape, scan.image.spacing_mm_dhw
    """
    contract = contract or GeometryContract()
    image = read_volume(
        Path(path), rescale=rescale, affine=affine, series_uid=series_uid, orientation=contract.orientation
    )
    check_hounsfield(image.values, image.source)
    check_slices(image.values, image.source)
    labels = None
    if labels_path is not None:
        # A wrong header is wrong in the image alone: labels carry their own, written after it was repaired.
        labels = read_volume(Path(labels_path), orientation=contract.orientation)
        check_same_grid(image, labels)
        labels = resample(labels, contract.spacing_mm_dhw, "nearest")
    image = resample(image, contract.spacing_mm_dhw, "trilinear")
    image = Volume(stored_hounsfield(image.values), image.affine, image.source)
    if labels is None:
        return CTScan(image, None)
    mask = merge_labels(labels.values, label_version, anatomies, labels.source)
    check_lung_is_air(image.values, mask, anatomies, labels.source)
    return CTScan(image, Volume(mask, labels.affine, labels.source))


def read_volume(
    path: Path,
    *,
    rescale: Rescale | None = None,
    affine: NDArray[np.float64] | None = None,
    series_uid: str | None = None,
    orientation: str = "LPS",
) -> Volume:
    """A volume (image or labels) at its own spacing, oriented; what kind of file it is follows from name and content.

    Raises:
        UnusableScan: where there is no such file, it is of no known kind, or cannot be read.
    """
    if not path.exists():
        raise UnusableScan("file missing", f"{path} does not exist")
    if path.name.lower().endswith(_NIFTI_ENDINGS):
        return read_nifti(path, rescale=rescale, affine=affine, orientation=orientation)
    if rescale is not None or affine is not None:
        raise ValueError(f"{path}: rescale and affine are for NIfTI files whose headers lack them; this is none")
    if path.suffix.lower() == ".npz":
        return read_rad_chestct(path, orientation=orientation)
    try:
        has_slices = is_dicom(path)
    except OSError as error:
        raise UnusableScan("file unreadable", f"{path}: {error}") from error
    if has_slices:
        return read_series(path, series_uid, orientation)
    raise UnusableScan(
        "unknown file format", f"{path}: expected NIfTI (.nii, .nii.gz), DICOM (a folder or a file) or .npz"
    )


def read_nifti(
    path: Path,
    *,
    rescale: Rescale | None = None,
    affine: NDArray[np.float64] | None = None,
    orientation: str = "LPS",
) -> Volume:
    """A NIfTI volume, oriented; the header's own scaling is applied, `rescale` on top of it where given.

    Raises:
        UnusableScan: for a truncated file, a header without orientation (sform and qform code 0), another unit than
            mm, more than one volume, or values that are no plain numbers.
    """
    import nibabel

    try:
        image = nibabel.load(path)
        if not isinstance(image, nibabel.Nifti1Pair):
            raise UnusableScan("unreadable NIfTI", f"{path}: is a {type(image).__name__}, not NIfTI")
        _check_size(image, path)
        header_affine = _header_affine(image, path) if affine is None else affine
        if image.get_data_dtype().kind not in "iuf":
            raise UnusableScan("wrong dtype", f"{path}: values are {image.get_data_dtype()}; expected plain numbers")
        values = _stored_values(image)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise UnusableScan("unreadable NIfTI", f"{path}: {error}") from error
    except (EOFError, OSError, zlib.error, ValueError) as error:
        if isinstance(error, UnusableScan):
            raise
        raise UnusableScan("unreadable NIfTI", f"{path}: {error}. Is it truncated? Copy it again.") from error
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if rescale is not None:
        values = values * np.float32(rescale.slope) + np.float32(rescale.intercept)
    return oriented_volume(values, header_affine, str(path), orientation)


def _header_affine(image: Any, path: Path) -> NDArray[np.float64]:
    header = image.header
    if int(header["sform_code"]) == 0 and int(header["qform_code"]) == 0:
        raise UnusableScan(
            "orientation unknown",
            f"{path}: sform and qform code are 0, so left and right cannot be told. Convert the scan again from DICOM, "
            "or give its affine if you know it.",
        )
    if int(header["sform_code"]):
        _check_agreement(header, path)
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise UnusableScan("spacing implausible", f"{path}: lengths are in {unit!r}; expected mm. Repair the header.")
    return np.asarray(image.affine, dtype=np.float64)


def _check_agreement(header: Any, path: Path) -> None:
    """Refuse an sform, which is what counts, that the rest of the header contradicts."""
    from nibabel.orientations import aff2axcodes

    by_sform = np.linalg.norm(header.get_sform()[:3, :3], axis=0)
    by_pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    if np.isfinite(by_sform).all() and not np.allclose(by_sform, by_pixdim, rtol=0.01):
        told = " mm by its sform, ".join(str(np.round(steps, 4).tolist()) for steps in (by_sform, by_pixdim))
        raise UnusableScan(
            "spacing implausible", f"{path}: voxels of {told} by its pixdim. Convert the scan again from DICOM."
        )
    if int(header["qform_code"]):
        sides, others = ("".join(aff2axcodes(matrix)) for matrix in (header.get_sform(), header.get_qform()))
        if sides != others:
            raise UnusableScan(
                "orientation unknown",
                f"{path}: {sides} by its sform, {others} by its qform. Convert the scan again from DICOM.",
            )


def _check_size(image: Any, path: Path) -> None:
    """Refuse a header that claims more voxels than the file can hold, before memory is asked for them."""
    claimed = math.prod(int(count) for count in image.shape) * image.get_data_dtype().itemsize
    largest = Path(image.file_map["image"].filename).stat().st_size
    if path.name.lower().endswith(".gz"):
        largest *= _LARGEST_DEFLATION
    if min(image.shape, default=0) < 1 or claimed > largest:
        raise UnusableScan(
            "unreadable NIfTI",
            f"{path}: its header says {image.shape} voxels of {image.get_data_dtype()}, which the file cannot hold. Is "
            "it truncated or damaged? Copy it again.",
        )


def _stored_values(image: Any) -> NDArray[Any]:
    """The array as stored where the header scales nothing, float32 otherwise (nibabel alone would give float64)."""
    slope, intercept = image.header.get_slope_inter()
    if slope in (None, 1) and intercept in (None, 0):
        return np.asanyarray(image.dataobj)
    return image.get_fdata(dtype=np.float32, caching="unchanged")


def read_rad_chestct(path: Path, *, orientation: str = "LPS") -> Volume:
    """A volume of Rad-ChestCT: key "ct", axes (z, y, x) from head to feet, 0.8 mm, Hounsfield units cut to ±1000.

    The file has no place in the patient; the affine puts its first voxel at the origin.

    Raises:
        UnusableScan: where the file is no such archive.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            values = archive["ct"]
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UnusableScan("unreadable npz", f"{path}: {error}; expected a compressed array named 'ct'") from error
    if values.ndim != 3:
        raise UnusableScan("not a 3-D volume", f"{path}: shape {values.shape}; expected (z, y, x)")
    signs = [1.0 if letter in "RAS" else -1.0 for letter in RAD_CHESTCT_ORIENTATION]
    affine = np.diag([*(RAD_CHESTCT_SPACING_MM * np.array(signs)), 1.0])
    return oriented_volume(values.transpose(2, 1, 0), affine, str(path), orientation)
