"""What pipelines read from disk: pictures of any kind, CT scans with their masks, the shipped vocabulary."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from medclip_hf.data.ct.anatomy import LabelVersion
from medclip_hf.data.ct.dicom import is_dicom
from medclip_hf.data.ct.geometry import GeometryContract
from medclip_hf.data.ct.reading import Rescale, load_ct, read_volume
from medclip_hf.data.ct.segmenters import Segmenter, segment
from medclip_hf.processing.conceptclip import to_rgb


def read_picture(image: Any) -> Image.Image:
    """A picture of any kind as 8-bit RGB, upright, as a viewer shows it: see `to_rgb`, and DICOM files.

    Raises:
        ValueError: it cannot be read or decoded, or is a DICOM file that is no single picture.
    """
    if isinstance(image, str | Path) and _is_dicom_file(Path(image)):
        image = _read_dicom_picture(Path(image))
    return to_rgb(image)


def _is_dicom_file(path: Path) -> bool:
    try:
        return path.is_file() and is_dicom(path)
    except OSError:  # a data URL is too long for a name; what else is wrong with a file `to_rgb` tells
        return False


def _read_dicom_picture(path: Path) -> Image.Image:
    """The picture as a viewer shows it, without anything else of the file; of several frames the middle one."""
    try:
        import pydicom  # noqa: F401 - asked for here, so that its absence is not taken for a damaged file
    except ImportError as error:
        raise ValueError(f"{path} is a DICOM file: reading it needs pip install 'medclip-hf[ct]'.") from error
    from medclip_hf.data.hospital.grey_levels import UnusablePicture
    from medclip_hf.data.hospital.pictures import PictureSettings, read_pictures

    try:
        return read_pictures(path, PictureSettings(frames="middle"))[0].image
    except UnusablePicture as error:
        raise ValueError(
            f"{path} cannot be shown as a picture: {error}. It may be truncated, hold no image, or need a decoder "
            "(python-gdcm; `medclip-hf doctor` tells)."
        ) from error


@lru_cache(maxsize=1)
def shipped_vocabulary() -> tuple[tuple[str, str], ...]:
    """(name, CUI) of the medical concepts that come with the package."""
    from medclip_hf.data.concepts.index import read_vocabulary

    resource = files("medclip_hf.data.concepts").joinpath("vocabulary", "shipped.jsonl")
    return tuple((concept.name, concept.concept_id) for concept in read_vocabulary(Path(str(resource))))


@dataclass(frozen=True)
class ScanFile:
    """A scan on disk as `load_ct` gives it, and what the user should know about its origin.

    Args:
        values: (D, H, W) int16, Hounsfield units.
        mask: (D, H, W) uint8, i + 1 = anatomy i; None where there is none.
        affine: (4, 4), from the index (x, y, z) to RAS+ millimetres.
        slice_distance_mm: of the file, before resampling; None where it is not known.
        segmenter: what made the mask; empty for a mask that was given.
    """

    values: NDArray[np.int16]
    mask: NDArray[np.uint8] | None
    affine: NDArray[np.float64]
    slice_distance_mm: float | None = None
    segmenter: str = ""


def read_scan_file(
    path: Path,
    mask: Path | None,
    contract: GeometryContract,
    anatomies: Sequence[str],
    *,
    label_version: LabelVersion = "v2",
    segmenter: str | None = None,
    series_uid: str | None = None,
    rescale: tuple[float, float] | None = None,
) -> ScanFile:
    """A CT from a NIfTI file, DICOM folder or Rad-ChestCT file, on the grid of the contract, with its mask.

    Args:
        path: of the scan.
        mask: label volume of TotalSegmentator on the scan's grid.
        contract: geometry to bring the scan to.
        anatomies: of the model.
        label_version: of TotalSegmentator that wrote the mask.
        segmenter: "totalsegmentator" or "bundle:<folder>", run where `mask` is None.
        series_uid: which DICOM series, where a folder holds several.
        rescale: (slope, intercept), only where a NIfTI file holds raw values.

    Raises:
        ValueError: the scan cannot be used (`UnusableScan`), or the segmenter is not there.
        ImportError: the readers of CT files are not installed.
    """
    if missing := [name for name in ("nibabel", "pydicom", "monai") if find_spec(name) is None]:
        raise ImportError(f"reading CT scans needs {', '.join(missing)}: pip install 'medclip-hf[ct]'.")
    options: dict[str, Any] = {"series_uid": series_uid, "rescale": Rescale(*rescale) if rescale else None}
    made_by = ""
    with tempfile.TemporaryDirectory() as folder:
        if mask is None and segmenter is not None:
            chosen = Segmenter.from_text(segmenter)
            stored = read_volume(path, orientation=contract.orientation, **options)
            mask, label_version = segment(stored, chosen, Path(folder) / "labels.nii.gz"), chosen.label_version
            made_by = chosen.name
        scan = load_ct(path, contract, labels_path=mask, label_version=label_version, anatomies=anatomies, **options)
    mask_values = None if scan.anatomy_mask is None else scan.anatomy_mask.values
    return ScanFile(scan.image.values, mask_values, scan.image.affine, _slice_distance_mm(path), made_by)


def _slice_distance_mm(path: Path) -> float | None:
    """Distance of the slices of a NIfTI file, from its header alone; None for other files."""
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return None
    import nibabel
    from nibabel.affines import voxel_sizes

    affine = nibabel.load(path).affine  # type: ignore[attr-defined]
    along_body = int(np.abs(affine[2, :3]).argmax())
    return float(voxel_sizes(affine)[along_body])
