"""A CT series out of DICOM files: slices sorted by their place in the patient, and refused where they are no volume.

Only the elements that place and scale the pixels are read; names, dates and numbers of patients are never touched.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.ct.geometry import UnusableScan, Volume, oriented_volume

if TYPE_CHECKING:
    from pydicom import Dataset

    _File = tuple[Path, Dataset]  # with the elements that matter

logger = logging.getLogger(__name__)

# Distances between neighbours may differ by this much (positions are rounded in some exports).
SLICE_STEP_TOLERANCE = 0.05
SLICE_STEP_TOLERANCE_MM = 0.1
# "US" is "unspecified", which older scanners write beside Hounsfield units; the values are checked afterwards anyway.
_HOUNSFIELD_TYPES = ("", "HU", "HU_MOD", "US")
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_HEADER_ELEMENTS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "Modality",
    "ImageType",
    "NumberOfFrames",
    "SamplesPerPixel",
    "Rows",
    "Columns",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]

# Where an enhanced object keeps what a single slice has at the top.
_FUNCTIONAL_GROUPS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)


@dataclass(frozen=True, eq=False)
class _Frame:
    """One slice: where its pixels lie, in a file and in the patient (LPS millimetres)."""

    path: Path
    index: int  # of the frame in the file
    instance_uid: str
    shape: tuple[int, int]  # rows, columns
    position: NDArray[np.float64]  # of the first pixel
    row_cosine: NDArray[np.float64]  # direction in which the column index grows
    column_cosine: NDArray[np.float64]
    pixel_spacing: tuple[float, float]  # mm between rows, between columns
    slope: float
    intercept: float

    @property
    def normal(self) -> NDArray[np.float64]:
        return np.cross(self.row_cosine, self.column_cosine)


def is_dicom(path: Path) -> bool:
    """Whether a file carries the DICOM preamble, or a folder a file that does."""
    if path.is_dir():
        return any(is_dicom(file) for file in sorted(path.rglob("*")) if file.is_file())
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_series(path: Path, series_uid: str | None = None, orientation: str = "LPS") -> Volume:
    """The CT series in a folder (or a multi-frame file) in Hounsfield units, oriented, at its own spacing.

    Slices are sorted by their position along the normal of the slices, not by file name or instance number. Localizers,
    dose sheets and files that are not DICOM are left out.

    Args:
        path: a folder, searched with all below it, or one file.
        series_uid: SeriesInstanceUID, or its end, to choose by where several series lie in the folder.
        orientation: see `geometry.GeometryContract`.

    Raises:
        UnusableScan: no CT series or several, several geometries in one series, a tilted gantry, repeated or missing
            slices, missing rescale, pixel data that cannot be decoded.
    """
    files = _choose_series(_ct_series(path), series_uid, path)
    frames = [frame for file, header in files for frame in _frames(file, header)]
    frames = _sorted_frames(_without_copies(frames), path)
    values = _decode(frames)
    return oriented_volume(values.transpose(2, 1, 0), _affine(frames), str(path), orientation)


def _headers(path: Path) -> Iterator[tuple[Path, Dataset]]:
    """Every DICOM file with the elements that matter; directories (DICOMDIR) and other files are passed over."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError
    from pydicom.uid import MediaStorageDirectoryStorage

    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        try:
            header = dcmread(file, stop_before_pixels=True, specific_tags=_HEADER_ELEMENTS)
        except InvalidDicomError as error:
            if path.is_file():
                raise UnusableScan("not DICOM", f"{file}: {error}") from error
            logger.debug("%s is not DICOM and is left out", file)
            continue
        except (AttributeError, EOFError, KeyError, NotImplementedError, OSError, ValueError, struct.error) as error:
            raise _unreadable(file, error) from error
        if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            continue
        if "Modality" not in header or "SOPClassUID" not in header:
            raise _unreadable(file, "its header breaks off")
        yield file, header


def _unreadable(file: Path, error: object) -> UnusableScan:
    return UnusableScan("unreadable DICOM", f"{file}: {error}. Is it truncated? Copy it again.")


def _ct_series(path: Path) -> dict[str, list[_File]]:
    """The files of each series. Nothing else is asked of them yet: a series that is no volume bars no other one."""
    from pydicom.uid import CTImageStorage

    series: dict[str, list[_File]] = {}
    other: set[str] = set()
    for file, header in _headers(path):
        is_sheet = "ImagePositionPatient" not in header and "PerFrameFunctionalGroupsSequence" not in header
        if header.Modality != "CT":
            other.add(str(header.Modality))
        elif "LOCALIZER" in header.get("ImageType", []) or (is_sheet and header.SOPClassUID != CTImageStorage):
            other.add("CT localizers or sheets")
        elif "Rows" not in header:  # so its SeriesInstanceUID may be half of one
            raise _unreadable(file, "its header breaks off")
        else:
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((file, header))
    if not series:
        raise UnusableScan(
            "no CT series",
            f"{path}: {'holds only ' + ', '.join(sorted(other)) if other else 'holds no DICOM image'}. "
            "Name the folder of an axial CT series.",
        )
    return series


def _frames(file: Path, header: Dataset) -> list[_Frame]:
    """The slices of a file: one, or all frames of an enhanced (multi-frame) object."""
    if int(header.get("SamplesPerPixel", 1)) != 1:
        raise UnusableScan("not a CT image", f"{file}: a colour picture. Leave secondary captures out of the folder.")
    if "PerFrameFunctionalGroupsSequence" not in header:
        return [_frame(file, 0, header, dict.fromkeys(_FUNCTIONAL_GROUPS, header))]
    shared = (header.get("SharedFunctionalGroupsSequence") or [{}])[0]
    frames = []
    for index, own in enumerate(header.PerFrameFunctionalGroupsSequence):
        groups = {name: _functional_group(file, name, own, shared) for name in _FUNCTIONAL_GROUPS}
        frames.append(_frame(file, index, header, groups))
    return frames


def _functional_group(file: Path, name: str, frame_group: Dataset, shared_group: Dataset) -> Dataset:
    for group in (frame_group, shared_group):
        if group.get(name):
            return group.get(name)[0]
    if name == "PixelValueTransformationSequence":
        raise _missing_rescale(file)
    raise UnusableScan("geometry missing", f"{file}: no {name}, so the frames have no place in the patient")


def _missing_rescale(file: Path) -> UnusableScan:
    return UnusableScan(
        "rescale missing",
        f"{file}: no rescale slope and intercept, so its values are not known to be Hounsfield units. "
        "Export the series again from the archive.",
    )


def _frame(file: Path, index: int, header: Dataset, groups: dict[str, Dataset]) -> _Frame:
    transformation = groups["PixelValueTransformationSequence"]
    if transformation.get("RescaleSlope") is None or transformation.get("RescaleIntercept") is None:
        raise _missing_rescale(file)
    kind = str(transformation.get("RescaleType") or "")
    if kind not in _HOUNSFIELD_TYPES:
        raise UnusableScan("not Hounsfield units", f"{file}: the rescale type is {kind!r}; expected HU")
    try:
        cosines = np.array([float(x) for x in groups["PlaneOrientationSequence"].ImageOrientationPatient])
        between_rows, between_columns = (float(x) for x in groups["PixelMeasuresSequence"].PixelSpacing)
        return _Frame(
            path=file,
            index=index,
            instance_uid=str(header.get("SOPInstanceUID", file)),
            shape=(int(header.Rows), int(header.Columns)),
            position=np.array([float(x) for x in groups["PlanePositionSequence"].ImagePositionPatient]),
            row_cosine=cosines[:3],
            column_cosine=cosines[3:],
            pixel_spacing=(between_rows, between_columns),
            slope=float(transformation.RescaleSlope),
            intercept=float(transformation.RescaleIntercept),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise UnusableScan(
            "geometry missing",
            f"{file}: {error}. Position and orientation of the patient, pixel spacing, rows and columns are needed.",
        ) from error


def _choose_series(series: dict[str, list[_File]], series_uid: str | None, path: Path) -> list[_File]:
    chosen = {uid: files for uid, files in series.items() if series_uid is None or uid.endswith(series_uid)}
    if len(chosen) == 1:
        return next(iter(chosen.values()))
    listing = "; ".join(
        f"{uid} ({sum(int(header.get('NumberOfFrames') or 1) for _, header in files)} slices)"
        for uid, files in sorted(series.items())
    )
    if not chosen:
        raise UnusableScan("no CT series", f"{path}: no series ends in {series_uid!r}. There are: {listing}")
    raise UnusableScan("several series", f"{path}: choose one by series_uid (its end suffices): {listing}")


def _without_copies(frames: Sequence[_Frame]) -> list[_Frame]:
    """Frames of files that lie there twice under other names are one frame.

    The identifier alone does not tell: some anonymisers write the same one into every slice.
    """
    unique = list({(frame.instance_uid, frame.index, tuple(frame.position)): frame for frame in frames}.values())
    if len(unique) < len(frames):
        logger.warning("%s: %d copies of slices left out", frames[0].path.parent, len(frames) - len(unique))
    return unique


def _sorted_frames(frames: Sequence[_Frame], path: Path) -> list[_Frame]:
    _check_one_geometry(frames, path)
    normal = frames[0].normal
    heights = np.array([float(normal @ frame.position) for frame in frames])
    order = np.argsort(heights, kind="stable")
    _check_steps(heights[order], path)
    return [frames[place] for place in order]


def _check_one_geometry(frames: Sequence[_Frame], path: Path) -> None:
    if len(frames) < 2:
        raise UnusableScan("too few slices", f"{path}: one slice is no volume. Name the folder of the whole series.")
    first = frames[0]
    cosines = np.stack([first.row_cosine, first.column_cosine])
    if not np.allclose(cosines @ cosines.T, np.eye(2), atol=1e-3):
        raise UnusableScan("geometry damaged", f"{first.path}: the direction cosines are not orthonormal: {cosines}")
    for frame in frames[1:]:
        same = (
            frame.shape == first.shape
            and np.allclose(frame.pixel_spacing, first.pixel_spacing, rtol=1e-3)
            and np.allclose(frame.row_cosine, first.row_cosine, atol=1e-3)
            and np.allclose(frame.column_cosine, first.column_cosine, atol=1e-3)
        )
        if not same:
            raise UnusableScan(
                "mixed series",
                f"{path}: {frame.path.name} and {first.path.name} belong to one series, but differ in size, pixel "
                "spacing or orientation. Keep the slices of one reconstruction.",
            )


def _check_steps(heights: NDArray[np.float64], path: Path) -> None:
    steps = np.diff(heights)
    typical = float(np.median(steps))
    tolerance = max(SLICE_STEP_TOLERANCE_MM, SLICE_STEP_TOLERANCE * typical)
    same, odd = np.flatnonzero(steps < 0.01), np.flatnonzero(np.abs(steps - typical) > tolerance)
    if same.size:
        raise UnusableScan(
            "repeated slices",
            f"{path}: {same.size} slices lie where another one lies (first at {heights[same[0]]:.2f} mm). Several "
            "phases or reconstructions share the series; keep one of them.",
        )
    if not odd.size:
        return
    found = (
        f"{path}: slices are {typical:.2f} mm apart, but "
        f"{steps[odd[0]]:.2f} mm after the one at {heights[odd[0]]:.2f} mm"
    )
    missing = np.rint(steps[odd] / typical - 1)
    if (missing >= 1).all():
        raise UnusableScan("missing slices", f"{found}; about {int(missing.sum())} are missing. Copy the series again.")
    raise UnusableScan("uneven slices", f"{found}. Two reconstructions may share the series; keep one of them.")


def _decode(frames: Sequence[_Frame]) -> NDArray[Any]:
    """(slices, rows, columns) in Hounsfield units: int16 where slope and intercept are whole, float32 otherwise."""
    is_whole = all(frame.slope.is_integer() and frame.intercept.is_integer() for frame in frames)
    values = np.empty((len(frames), *frames[0].shape), np.int32 if is_whole else np.float32)
    places: dict[Path, list[int]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(frame.path, []).append(place)
    for path, slots in places.items():
        for place, pixels in zip(slots, _stored_pixels(path, [frames[slot].index for slot in slots]), strict=True):
            frame = frames[place]
            if pixels.shape != frame.shape:
                raise UnusableScan("pixels unreadable", f"{path}: {pixels.shape} pixels; the header says {frame.shape}")
            values[place] = pixels.astype(values.dtype) * values.dtype.type(frame.slope)
            values[place] += values.dtype.type(frame.intercept)
    return values


def _stored_pixels(path: Path, indices: list[int]) -> Iterator[NDArray[Any]]:
    """Frames of a file, in the order asked for; its header, which grows with the frames, is read once for all."""
    from pydicom.pixels import iter_pixels

    try:
        yield from iter_pixels(path, indices=indices)
    except (AttributeError, EOFError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        raise UnusableScan(
            "pixels unreadable",
            f"{path}: {error}. The file is truncated, or its transfer syntax needs a decoder (python-gdcm).",
        ) from error


def _affine(frames: Sequence[_Frame]) -> NDArray[np.float64]:
    """From the index (column, row, slice) to RAS+ millimetres."""
    first, last = frames[0], frames[-1]
    affine = np.eye(4)
    affine[:3, 0] = first.row_cosine * first.pixel_spacing[1]
    affine[:3, 1] = first.column_cosine * first.pixel_spacing[0]
    affine[:3, 2] = (last.position - first.position) / (len(frames) - 1)
    affine[:3, 3] = first.position
    return _LPS_TO_RAS @ affine
