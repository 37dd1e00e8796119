"""Reading a hospital's picture files: DICOM, NIfTI, PNG, JPEG, TIFF become bare 8-bit pixels and a few coarse facts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from medclip_hf.data.ct.dicom import is_dicom
from medclip_hf.data.hospital.grey_levels import (
    UnusablePicture,
    Window,
    dicom_frame,
    stretched,
    to_eight_bits,
    windowed,
)
from medclip_hf.data.hospital.headers import groups_of_header, identifying_values, modality_of
from medclip_hf.data.hospital.rows import PatientGroups
from medclip_hf.data.images import MAX_PIXELS, UnreadableImage, decode_image, open_image, read_file

if TYPE_CHECKING:
    from pydicom import Dataset

Frames = Literal["first", "middle", "all"]
FileKind = Literal["picture", "volume"]

MAX_DICOM_BYTES = 2 * 2**30
MAX_FRAMES = 2000  # of one file or folder
_NIFTI_ENDINGS = (".nii", ".nii.gz")
_ASPECT_TOLERANCE = 0.02


@dataclass(frozen=True)
class PictureSettings:
    """How pictures are made.

    Args:
        frames: which of several frames, files of a folder or pages become rows.
        window: centre and width for every picture, instead of what the files name.
        max_side: longest side in pixels of what is written; 0 keeps the size.
    """

    frames: Frames = "middle"
    window: Window | None = None
    max_side: int = 1024

    def __post_init__(self) -> None:
        if self.frames not in ("first", "middle", "all"):
            raise ValueError(f"frames must be 'first', 'middle' or 'all', got {self.frames!r}")
        if self.max_side < 0 or (self.window is not None and self.window[1] <= 0):
            raise ValueError("max_side must not be negative, and a window's width must be positive")


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture without its file.

    Args:
        image: mode L or RGB, full size.
        frame: its number in the file.
        groups: what the allow list let through.
        identifying: what must not stand in texts; never written.
        says_burned_in: the header says that names stand in the pixels.
    """

    image: Image.Image
    frame: int = 0
    groups: PatientGroups = field(default_factory=PatientGroups)
    identifying: tuple[str, ...] = field(default=(), repr=False)
    says_burned_in: bool = False


@dataclass(frozen=True)
class FileFacts:
    """What a header tells before the pixels are read.

    Args:
        kind: a picture, or a volume.
        modality: DICOM's code, see `headers.modality_of`; empty for other formats.
        identifying: what must not stand in the patient's texts; of a folder: of its first file.
    """

    kind: FileKind
    modality: str = ""
    identifying: tuple[str, ...] = field(default=(), repr=False)


def facts_of_file(path: Path) -> FileFacts:
    """Whether a file or folder is a picture or a volume, and what its DICOM header says.

    Raises:
        UnusablePicture: where there is no such file, or its header cannot be read.
    """
    try:
        if not path.exists():
            raise UnusablePicture("file missing")
        if path.is_dir():
            files = _dicom_files(path)
            header = _read_dicom(files[0], with_pixels=False)
            return _facts_of_header(header, len(files))
        if path.name.lower().endswith(_NIFTI_ENDINGS):
            return FileFacts("picture" if 1 in _nifti_shape(path) else "volume")
        if path.suffix.lower() == ".npz":
            return FileFacts("volume", "CT")
        if not is_dicom(path):
            return FileFacts("picture")
        header = _read_dicom(path, with_pixels=False)
        return _facts_of_header(header, int(header.get("NumberOfFrames") or 1))
    except UnusablePicture:
        raise
    except Exception as error:  # names that are too long, folders that may not be listed, damaged headers
        raise UnusablePicture("file unreadable") from error


def _facts_of_header(header: Dataset, num_slices: int) -> FileFacts:
    modality = modality_of(header)
    kind: FileKind = "volume" if modality == "CT" and num_slices > 1 else "picture"
    return FileFacts(kind, modality, identifying_values(header))


def read_pictures(path: Path, settings: PictureSettings) -> list[Picture]:
    """The pictures of a file or folder, as many as `settings.frames` asks for.

    Raises:
        UnusablePicture: with a reason that tells nothing of the file.
    """
    try:
        if path.is_dir():
            files = _in_order(_dicom_files(path))
            chosen = _chosen(len(files), settings.frames)
            return [_dicom_picture(_read_dicom(files[i]), 0, i, settings) for i in chosen]
        if path.name.lower().endswith(_NIFTI_ENDINGS):
            return [_nifti_picture(path, settings)]
        if is_dicom(path):
            dataset = _read_dicom(path)
            chosen = _chosen(int(dataset.get("NumberOfFrames") or 1), settings.frames)
            return [_dicom_picture(dataset, i, i, settings) for i in chosen]
        return _image_pictures(path, settings)
    except UnusablePicture:
        raise
    except UnreadableImage as error:
        raise UnusablePicture(error.reason) from None  # its detail names the file
    except MemoryError:
        raise
    except OSError as error:
        raise UnusablePicture("file missing" if isinstance(error, FileNotFoundError) else "file unreadable") from None
    except Exception as error:  # whatever else hostile bytes bring about; its words may quote the file
        raise UnusablePicture(f"unexpected {type(error).__name__}") from None


def encode_picture(image: Image.Image, max_side: int) -> bytes:
    """A PNG file of the pixels alone, at most `max_side` long (0: as it is)."""
    longest = max(image.size)
    if 0 < max_side < longest:
        size = (max(1, round(image.width * max_side / longest)), max(1, round(image.height * max_side / longest)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    bare = Image.fromarray(np.asarray(image))  # carries no text chunk, EXIF, profile or comment along
    sink = io.BytesIO()
    bare.save(sink, "PNG", compress_level=3)  # twice as fast as the usual 6, a few percent larger
    return sink.getvalue()


def _chosen(count: int, frames: Frames) -> list[int]:
    if count < 1:
        raise UnusablePicture("no frame")
    if frames == "all":
        if count > MAX_FRAMES:
            raise UnusablePicture("too many frames")
        return list(range(count))
    return [0 if frames == "first" else (count - 1) // 2]


def _dicom_files(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and is_dicom(file)]
    if not files:
        raise UnusablePicture("folder without DICOM files")
    return files


def _in_order(files: Sequence[Path]) -> list[Path]:
    """Files of a series by their instance number, of equal ones by name."""
    numbers = []
    for file in files:
        header = _read_dicom(file, with_pixels=False)
        number = header.get("InstanceNumber")
        numbers.append(int(number) if number not in (None, "") else 0)
    return [file for _, _, file in sorted(zip(numbers, range(len(files)), files, strict=True))]


def _read_dicom(path: Path, with_pixels: bool = True) -> Dataset:
    from pydicom import dcmread

    if path.stat().st_size > MAX_DICOM_BYTES:
        raise UnusablePicture("file too large")
    try:
        return dcmread(path, stop_before_pixels=not with_pixels)
    except Exception:  # the parser raises any type on damaged files, and quotes what stands in them
        raise UnusablePicture("DICOM cannot be read") from None


def _dicom_picture(dataset: Dataset, index: int, frame: int, settings: PictureSettings) -> Picture:
    if not any(name in dataset for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise UnusablePicture("DICOM without a picture")
    rows, columns = int(dataset.get("Rows") or 0), int(dataset.get("Columns") or 0)
    if rows < 1 or columns < 1:
        raise UnusablePicture("image has no pixels")
    if rows * columns > MAX_PIXELS:
        raise UnusablePicture("image has too many pixels")
    image = _square_pixels(Image.fromarray(dicom_frame(dataset, index, settings.window)), dataset)
    return Picture(
        image,
        frame,
        groups_of_header(dataset),
        identifying_values(dataset),
        says_burned_in=str(dataset.get("BurnedInAnnotation", "")).upper() == "YES",
    )


def _square_pixels(image: Image.Image, dataset: Dataset) -> Image.Image:
    """The picture with the proportions of what it shows: rows and columns may lie at different distances."""
    spacing: Any = dataset.get("PixelSpacing") or dataset.get("ImagerPixelSpacing") or dataset.get("PixelAspectRatio")
    try:
        between_rows, between_columns = (float(value) for value in spacing)
        ratio = between_rows / between_columns
    except (TypeError, ValueError, ZeroDivisionError):
        return image
    if not 0.1 < ratio < 10 or abs(ratio - 1) <= _ASPECT_TOLERANCE:
        return image
    size = (image.width, round(image.height * ratio)) if ratio > 1 else (round(image.width / ratio), image.height)
    if size[0] * size[1] > MAX_PIXELS:
        return image
    return image.resize(size, Image.Resampling.BICUBIC)


def _nifti_shape(path: Path) -> tuple[int, ...]:
    import nibabel

    image: Any = nibabel.load(path)
    shape = tuple(image.shape)
    return shape if len(shape) > 2 else (*shape, 1)


def _nifti_picture(path: Path, settings: PictureSettings) -> Picture:
    """A single slice as radiologists look at it: the patient's left on the right, front or head at the top."""
    import nibabel

    image: Any = nibabel.as_closest_canonical(nibabel.load(path))
    values = np.asarray(image.dataobj)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3 or 1 not in values.shape or values.dtype.kind not in "iuf":
        raise UnusablePicture("volume in a set of pictures")
    thin = max(axis for axis in range(3) if values.shape[axis] == 1)
    flat = np.squeeze(values[::-1, ::-1, ::-1], axis=thin).T
    if flat.size > MAX_PIXELS:
        raise UnusablePicture("image has too many pixels")
    levels = windowed(flat, settings.window) if settings.window else stretched(flat)
    return Picture(Image.fromarray(to_eight_bits(levels)))


def _image_pictures(path: Path, settings: PictureSettings) -> list[Picture]:
    image = open_image(read_file(path), "the file")
    pictures = []
    for page in _chosen(int(getattr(image, "n_frames", 1)), settings.frames):
        image.seek(page)
        if image.width * image.height > MAX_PIXELS:  # pages may differ in size
            raise UnusablePicture("image has too many pixels")
        pictures.append(Picture(_bare_pixels(decode_image(image, "the file"), settings.window), page))
    return pictures


def _bare_pixels(image: Image.Image, window: Window | None) -> Image.Image:
    """Mode L or RGB, upright, transparency on white; more than 8 bits are windowed or stretched."""
    is_white_zero = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(262) == 0
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values: NDArray[Any] = np.asarray(image)
        levels = windowed(values, window) if window else stretched(values)
        # Pillow turns 8-bit pictures of this kind around itself, deeper ones not.
        return Image.fromarray(to_eight_bits(1.0 - levels if is_white_zero else levels))
    if image.mode in ("L", "1"):
        return image.convert("L")
    if image.mode in ("LA", "RGBA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")
