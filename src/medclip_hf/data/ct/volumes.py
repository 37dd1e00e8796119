"""The array store of CT scans: written once, read as random crops many times.

A scan is one folder in plain Zarr v3 that any Zarr library opens: the arrays ``image`` (int16, HU) and
``anatomy_mask`` (uint8), each a single file (a shard) of slabs of a few whole slices, compressed by Blosc (shuffle,
LZ4HC: slower to write than LZ4, but smaller and faster to read). `read_crop` takes a shorter way through the same bytes
than zarr-python: one small JSON file, the index at the end of the shard, one slab after the other into the same scratch
memory. `benchmarks/ct_store.py` compares it with other formats.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.ct.geometry import STORED_HU_RANGE, GeometryContract, UnusableScan

FORMAT_VERSION = 1
SLAB_DEPTH = 16  # slices that are compressed together
PADDING_HU = STORED_HU_RANGE[0]  # what lies outside of a scan: at or below every window, so it becomes 0

_ATTRIBUTES = "medclip_hf"
_DTYPES: dict[str, np.dtype[Any]] = {"image": np.dtype("<i2"), "anatomy_mask": np.dtype("u1")}
_FILL_VALUES = {"image": PADDING_HU, "anatomy_mask": 0}
_DECIMALS = 6  # of mm: headers keep single precision, and the same scan by two ways should give the same files
_ABSENT_SLAB = 2**64 - 1  # how a shard's index marks a slab that holds the fill value alone


@dataclass(frozen=True)
class StoredScan:
    """What the store knows of a scan beside its arrays.

    Args:
        shape_dhw: voxels.
        spacing_mm_dhw: voxel size.
        affine: (4, 4) nested tuples, from (x, y, z) to RAS+ mm of the patient.
        anatomies: names of the mask ids 1, 2, ...
        contract: what the arrays keep.
        slab_depth: slices compressed together.
        format_version: of this layout.
    """

    shape_dhw: tuple[int, int, int]
    spacing_mm_dhw: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]
    anatomies: tuple[str, ...]
    contract: GeometryContract
    slab_depth: int = SLAB_DEPTH
    format_version: int = FORMAT_VERSION


def write_scan(
    path: Path,
    image: NDArray[np.int16],
    anatomy_mask: NDArray[np.uint8],
    *,
    spacing_mm_dhw: Sequence[float],
    affine: NDArray[np.float64],
    anatomies: Sequence[str],
    contract: GeometryContract | None = None,
) -> StoredScan:
    """What was written; the folder appears whole or not at all, and replaces an older one.

    Args:
        path: the folder of this scan, by custom ending in ``.zarr``.
        image: (D, H, W) in HU, int16.
        anatomy_mask: (D, H, W), uint8, ids 1 to len(anatomies), 0 elsewhere.
        spacing_mm_dhw: voxel size.
        affine: (4, 4), from (x, y, z) to RAS+ mm.
        anatomies: names of the ids.
        contract: what the arrays keep.

    Raises:
        ValueError: for arrays of another kind or of different shapes.
    """
    _check_arrays(image, anatomy_mask, len(anatomies))
    depth, height, width = image.shape
    depth_mm, height_mm, width_mm = (round(float(step), _DECIMALS) for step in spacing_mm_dhw)
    scan = StoredScan(
        shape_dhw=(depth, height, width),
        spacing_mm_dhw=(depth_mm, height_mm, width_mm),
        affine=tuple(tuple(round(float(x), _DECIMALS) for x in row) for row in np.asarray(affine)),
        anatomies=tuple(anatomies),
        contract=contract or GeometryContract(),
    )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        _write_group(temporary, scan, {"image": image, "anatomy_mask": anatomy_mask})
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return scan


def _check_arrays(image: NDArray[Any], anatomy_mask: NDArray[Any], num_anatomies: int) -> None:
    if image.ndim != 3 or image.dtype != np.int16:
        raise ValueError(f"expected an int16 image (D, H, W), got {image.dtype} {image.shape}")
    if anatomy_mask.shape != image.shape or anatomy_mask.dtype != np.uint8:
        raise ValueError(f"expected a uint8 mask {image.shape}, got {anatomy_mask.dtype} {anatomy_mask.shape}")
    if (top := int(anatomy_mask.max())) > num_anatomies:
        raise ValueError(f"the mask holds id {top}, but {num_anatomies} anatomies are named")
    if top == 0 or image.min() == image.max():  # Zarr writes no file for such an array: it would look like a loss
        raise ValueError("the mask names no anatomy, or the image is constant: there is nothing to store")


def _write_group(folder: Path, scan: StoredScan, arrays: dict[str, NDArray[Any]]) -> None:
    import zarr
    from zarr.codecs import BloscCodec

    depth, height, width = scan.shape_dhw
    slabs = -(-depth // scan.slab_depth)
    group = zarr.create_group(folder, attributes={_ATTRIBUTES: asdict(scan)})
    for name, values in arrays.items():
        is_image = values.dtype == np.int16
        array = group.create_array(
            name,
            shape=scan.shape_dhw,
            chunks=(scan.slab_depth, height, width),
            shards=(slabs * scan.slab_depth, height, width),
            dtype=_DTYPES[name],
            compressors=BloscCodec(cname="lz4hc", clevel=5, shuffle="shuffle" if is_image else "noshuffle"),
            fill_value=_FILL_VALUES[name],
            dimension_names=("depth", "height", "width"),
        )
        array[...] = values


def read_scan(path: Path) -> StoredScan:
    """What the store knows of a scan, without its arrays.

    Raises:
        UnusableScan: where there is no scan, or one of another layout.
    """
    try:
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"][_ATTRIBUTES]
        if attributes["format_version"] != FORMAT_VERSION:
            raise UnusableScan(
                "store of another version",
                f"{path}: version {attributes['format_version']}, this code reads {FORMAT_VERSION}. Prepare it again.",
            )
        return StoredScan(
            shape_dhw=tuple(attributes["shape_dhw"]),
            spacing_mm_dhw=tuple(attributes["spacing_mm_dhw"]),
            affine=tuple(tuple(row) for row in attributes["affine"]),
            anatomies=tuple(attributes["anatomies"]),
            contract=GeometryContract.from_dict(attributes["contract"]),
            slab_depth=attributes["slab_depth"],
        )
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UnusableScan(
            "store damaged", f"{path}: {error!r}. Remove the folder and prepare the scan again."
        ) from error


def read_crop(
    path: Path, start_dhw: Sequence[int] | None = None, size_dhw: Sequence[int] | None = None
) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Image (HU) and anatomy mask of a box, which may reach beyond the scan: there is `PADDING_HU` and background.

    Args:
        path: the folder of the scan.
        start_dhw: first voxel, may be negative; the first one of the scan by default.
        size_dhw: voxels of the box; all from the start to the end of the scan by default.

    Raises:
        UnusableScan: for a missing, damaged or truncated store.
    """
    scan = read_scan(path)
    start = (0, 0, 0) if start_dhw is None else tuple(int(x) for x in start_dhw)
    if size_dhw is None:
        size_dhw = [full - first for full, first in zip(scan.shape_dhw, start, strict=True)]
    size = tuple(int(x) for x in size_dhw)
    if len(start) != 3 or len(size) != 3 or min(size) < 1:
        raise ValueError(f"expected a box of three positive sizes, got start {start} and size {size}")
    return _read_box(path, "image", scan, start, size), _read_box(path, "anatomy_mask", scan, start, size)


def _read_box(path: Path, name: str, scan: StoredScan, start: tuple[int, ...], size: tuple[int, ...]) -> NDArray[Any]:
    """The box of one array, slab by slab through one scratch array that stays in the cache of the processor."""
    dtype, fill = _DTYPES[name], _FILL_VALUES[name]
    inside = [(max(0, s), min(full, s + n)) for s, n, full in zip(start, size, scan.shape_dhw, strict=True)]
    (first, last), (top, bottom), (left, right) = inside
    is_padded = any(high - low != n for (low, high), n in zip(inside, size, strict=True))
    box = np.full(size, fill, dtype) if is_padded else np.empty(size, dtype)
    if any(high <= low for low, high in inside):
        return box
    target = box[first - start[0] :, top - start[1] :, left - start[2] :]
    step = scan.slab_depth
    scratch = np.empty((step, *scan.shape_dhw[1:]), dtype)
    shard = _Shard(path / name / "c" / "0" / "0" / "0", num_slabs=-(-scan.shape_dhw[0] // step))
    with shard:
        for slab in range(first // step, -(-last // step)):
            low, high = max(first, slab * step), min(last, (slab + 1) * step)
            part = target[low - first : high - first, : bottom - top, : right - left]
            if shard.decode(slab, scratch):
                part[...] = scratch[low - slab * step : high - slab * step, top:bottom, left:right]
            else:
                part[...] = fill
    return box


class _Shard:
    """One array's file: compressed slabs, then the index (offset and length of each, uint64), then its checksum."""

    def __init__(self, path: Path, num_slabs: int) -> None:
        self.path = path
        self.num_slabs = num_slabs

    def __enter__(self) -> Self:
        try:
            self._file = self.path.open("rb", buffering=0)
            self._file.seek(-(16 * self.num_slabs + 4), os.SEEK_END)
            self._index = np.frombuffer(self._file.read(16 * self.num_slabs), "<u8").reshape(self.num_slabs, 2)
        except (OSError, ValueError) as error:
            raise self._damaged(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def decode(self, slab: int, out: NDArray[Any]) -> bool:
        """Fill `out` with a slab; False, and `out` untouched, where the slab holds the fill value alone."""
        offset, length = (int(x) for x in self._index[slab])
        if offset == _ABSENT_SLAB:
            return False
        try:
            self._file.seek(offset)
            frame = self._file.read(length)
            if len(frame) != length:
                raise EOFError(f"{len(frame)} of {length} bytes")
            _blosc().decode(frame, out=out)
        except (EOFError, OSError, OverflowError, RuntimeError, ValueError) as error:
            raise self._damaged(error) from error
        return True

    def _damaged(self, error: Exception) -> UnusableScan:
        return UnusableScan(
            "store damaged", f"{self.path}: {error}. Remove the folder of the scan and prepare it again."
        )


@functools.cache
def _blosc() -> Any:
    """The decoder, in this thread alone: a data loader has one process a core already."""
    from numcodecs import blosc

    blosc.use_threads = False
    return blosc.Blosc()


def crop_start(
    shape_dhw: Sequence[int], size_dhw: Sequence[int], rng: np.random.Generator | None = None
) -> tuple[int, int, int]:
    """Where a crop begins: at random along axes on which the scan is larger, centred with even padding on the others.

    Args:
        shape_dhw: of the scan.
        size_dhw: of the crop.
        rng: without it, the crop is centred on every axis.
    """
    starts = []
    for full, size in zip(shape_dhw, size_dhw, strict=True):
        if full <= size:
            starts.append(-((size - full) // 2))
        else:
            starts.append((full - size) // 2 if rng is None else int(rng.integers(0, full - size + 1)))
    depth, height, width = starts
    return depth, height, width


def present_ids(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(256,): which values occur in a mask.

    Neighbours are mostly alike: eight voxels at a time are compared with the eight before, and only where they differ
    are values looked at, in pairs.
    """
    flat = np.ascontiguousarray(mask).reshape(-1)
    whole = flat.size // 8 * 8
    words = flat[:whole].view(np.uint64)
    changes = words[np.flatnonzero(words[1:] != words[:-1])]
    pairs = np.zeros(256 * 256, dtype=bool)
    pairs[changes.view(np.uint16)] = True
    pairs[words[-1:].view(np.uint16)] = True
    square = pairs.reshape(256, 256)
    seen = square.any(axis=0) | square.any(axis=1)
    seen[flat[whole:]] = True
    return seen


def is_complete(mask: NDArray[np.uint8], num_anatomies: int) -> NDArray[np.bool_]:
    """(num_anatomies,): which anatomies occur in a crop and touch none of its six faces.

    Args:
        mask: (D, H, W), ids 1 to num_anatomies, 0 elsewhere.
        num_anatomies: of the model.

    Raises:
        ValueError: for a mask of another kind or ids above num_anatomies.
    """
    if mask.ndim != 3 or mask.dtype != np.uint8:
        raise ValueError(f"expected a uint8 mask (D, H, W), got {mask.dtype} {mask.shape}")
    present = present_ids(mask)
    if present[num_anatomies + 1 :].any():
        top = int(np.flatnonzero(present)[-1])
        raise ValueError(
            f"the mask holds id {top}, but there are {num_anatomies} anatomies. Map the labels with merge_labels first."
        )
    faces = np.zeros(256, dtype=bool)
    for face in (mask[0], mask[-1], mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]):
        faces |= present_ids(face)
    return (present & ~faces)[1 : num_anatomies + 1]
