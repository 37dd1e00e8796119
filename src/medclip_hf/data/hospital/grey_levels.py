"""From the values in a DICOM file to the picture a reader would see: 8-bit grey levels or colours.

The order is that of PS3.3 C.11 and PS3.4 N.2: modality transform (rescale or table), then values of interest (table or
window), then the photometric interpretation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pydicom import Dataset

# Where a file names no window: all but the darkest and brightest half percent of the pixels.
PERCENTILES = (0.5, 99.5)

Window = tuple[float, float]  # centre, width


class UnusablePicture(ValueError):
    """A picture that cannot be used; the reason is countable and tells nothing of the file."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnusablePicture], tuple[str]]:
        return type(self), (self.reason,)


def dicom_frame(dataset: Dataset, index: int, window: Window | None = None) -> NDArray[np.uint8]:
    """(H, W) or (H, W, 3): one frame of a DICOM picture as it is to be seen.

    Args:
        dataset: with its pixel data.
        index: of the frame.
        window: centre and width in the units after the modality transform, instead of what the file names.

    Raises:
        UnusablePicture: pixels that cannot be decoded, an unknown photometric interpretation.
    """
    from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array

    try:
        stored = pixel_array(dataset, index=index)  # YBR becomes RGB here
    except Exception as error:  # decoders raise any type on hostile bytes; each is the file's fault
        raise UnusablePicture("pixels cannot be decoded") from error
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    try:
        if photometric == "PALETTE COLOR":
            return _eight_bits(apply_color_lut(stored, dataset))
        if stored.ndim == 3:
            return _eight_bits(stored)
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise UnusablePicture("photometric interpretation unknown")
        stored = _significant_bits(stored, dataset)
        transforms = _transforms_of_frame(dataset, index)
        values = np.asarray(apply_modality_lut(stored, transforms), np.float64)
        is_padding = _padding(stored, dataset)
        levels = _values_of_interest(values, ~is_padding, transforms, window)
    except UnusablePicture:
        raise
    except Exception as error:  # damaged tables and sequences
        raise UnusablePicture("grey levels cannot be told") from error
    if photometric == "MONOCHROME1":
        levels = 1.0 - levels
    levels[is_padding] = 0.0
    return to_eight_bits(levels)


def to_eight_bits(levels: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Levels in [0, 1] as 0 to 255."""
    return np.rint(np.clip(levels, 0.0, 1.0) * 255.0).astype(np.uint8)


def stretched(values: NDArray[Any], is_valid: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Values in [0, 1] between the percentiles of those that are valid; a picture of one value becomes black."""
    values = np.asarray(values, np.float64)
    chosen = values if is_valid is None else values[is_valid]
    chosen = chosen[np.isfinite(chosen)]
    if not chosen.size:
        return np.zeros_like(values)
    low, high = np.percentile(chosen[:: max(1, chosen.size // 1_000_000)], PERCENTILES)
    if high <= low:
        low, high = float(chosen.min()), float(chosen.max())
    if high <= low:
        return np.zeros_like(values)
    return np.clip(np.nan_to_num((values - low) / (high - low)), 0.0, 1.0)


def windowed(values: NDArray[Any], window: Window, function: str = "LINEAR") -> NDArray[np.float64]:
    """Values in [0, 1] through a window (PS3.3 C.11.2.1.2 and C.11.2.1.3).

    Args:
        values: after the modality transform.
        window: centre and width.
        function: "LINEAR", "LINEAR_EXACT" or "SIGMOID".

    Raises:
        UnusablePicture: a width that a window of this kind cannot have.
    """
    values = np.asarray(values, np.float64)
    center, width = window
    if not (np.isfinite([center, width]).all() and (width >= 1 if function == "LINEAR" else width > 0)):
        raise UnusablePicture("window without width")
    if function == "SIGMOID":
        return 1.0 / (1.0 + np.exp(-4.0 * (values - center) / width))
    if function == "LINEAR_EXACT":
        return np.clip((values - center) / width + 0.5, 0.0, 1.0)
    if width == 1:  # the standard's formula divides by width - 1: a threshold
        return (values > center - 0.5).astype(np.float64)
    return np.clip((values - (center - 0.5)) / (width - 1.0) + 0.5, 0.0, 1.0)


def _values_of_interest(
    values: NDArray[np.float64], is_valid: NDArray[np.bool_], transforms: Dataset, window: Window | None
) -> NDArray[np.float64]:
    from pydicom.pixels import apply_voi

    if window is not None:
        return windowed(values, window)
    if transforms.get("VOILUTSequence"):
        table = transforms.VOILUTSequence[0]
        bits = int(table.LUTDescriptor[2])
        levels = apply_voi(np.rint(values).astype(np.int64), transforms, 0)
        return np.asarray(levels, np.float64) / (2**bits - 1)
    centers, widths = transforms.get("WindowCenter"), transforms.get("WindowWidth")
    if centers is None or widths is None or centers == "" or widths == "":
        return stretched(values, is_valid)
    first = (_first(centers), _first(widths))
    function = str(transforms.get("VOILUTFunction") or "LINEAR").upper()
    if first[1] <= 0:  # written by some exports in place of "none"
        return stretched(values, is_valid)
    return windowed(values, first, function if function in ("LINEAR_EXACT", "SIGMOID") else "LINEAR")


def _first(value: Any) -> float:
    return float(value if isinstance(value, int | float | str) else value[0])


def _transforms_of_frame(dataset: Dataset, index: int) -> Dataset:
    """The elements that transform values, which an enhanced object keeps in groups for all frames or for each."""
    if "PerFrameFunctionalGroupsSequence" not in dataset and "SharedFunctionalGroupsSequence" not in dataset:
        return dataset
    from pydicom import Dataset as NewDataset

    groups = [*(dataset.get("SharedFunctionalGroupsSequence") or ())[:1]]
    frames = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    groups += [frames[index]] if index < len(frames) else []
    transforms = NewDataset()
    for source in (dataset, *_inner_groups(groups)):
        for keyword in (
            *("RescaleSlope", "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth", "VOILUTFunction"),
            *("PixelRepresentation", "BitsStored", "BitsAllocated", "VOILUTSequence", "ModalityLUTSequence"),
            *("PhotometricInterpretation", "SamplesPerPixel"),
        ):
            if keyword in source:
                transforms[keyword] = source[keyword]
    return transforms


def _inner_groups(groups: list[Any]) -> list[Any]:
    names = ("PixelValueTransformationSequence", "FrameVOILUTSequence")
    return [group.get(name)[0] for group in groups for name in names if group.get(name)]


def _significant_bits(stored: NDArray[Any], dataset: Dataset) -> NDArray[Any]:
    """The values without what older scanners kept in the unused high bits (overlays with a patient's name, for one)."""
    bits = int(dataset.get("BitsStored", 8 * stored.dtype.itemsize))
    if stored.dtype.kind not in "iu" or not 0 < bits < 8 * stored.dtype.itemsize:
        return stored
    low = stored.astype(np.int64) & (2**bits - 1)
    if stored.dtype.kind == "i":
        low = (low ^ 2 ** (bits - 1)) - 2 ** (bits - 1)
    return low.astype(stored.dtype)


def _padding(stored: NDArray[Any], dataset: Dataset) -> NDArray[np.bool_]:
    """Where the file says that there is no picture."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, bool)
    low, high = sorted((int(value), int(dataset.get("PixelPaddingRangeLimit", value))))
    if int(dataset.get("PixelRepresentation", 0)) and low >= 2**15:  # a signed value read as unsigned
        low, high = low - 2**16, high - 2**16
    is_padding = (stored >= low) & (stored <= high)
    return is_padding if not is_padding.all() else np.zeros(stored.shape, bool)


def _eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Colours as 8 bits, whatever number of bits they have."""
    if values.ndim != 3 or values.shape[-1] not in (3, 4):
        raise UnusablePicture("photometric interpretation unknown")
    values = values[..., :3]
    if values.dtype == np.uint8:
        return values
    top = 65535.0 if values.max(initial=0) > 255 else 255.0
    return to_eight_bits(values / top)
