"""fVLM's image processor: CT volumes in Hounsfield units, with their anatomy masks, to model inputs."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

Size = tuple[int, int, int]

_STATISTICS_VOXELS = 2_000_000  # enough for shares of 1 %; a torso at 1 x 1 x 3 mm has 15 million


class FVLMImageProcessor(BaseImageProcessor):
    """Model inputs from CT volumes that already lie on the grid the weights expect.

    It holds the contract between reader and network: orientation, spacing and unit of the arrays. The network cannot
    see a flipped or twice rescaled scan, it answers all the same, and wrongly. So arrays that cannot be Hounsfield
    units are refused here, and so is a spacing or an orientation that is told and is another. Reading files,
    reorienting and resampling are the reader's work.

    Steps: check, crop to the anatomies (where a mask is given), window to [0, 1], pad to the size of the training crops
    and to whole patches. A volume larger than that stays so: positions are interpolated.

    Args:
        anatomies: names of the mask's ids: voxels of `anatomies[i]` hold i + 1. The same as in the model's config.
        hu_min: lower end of the Hounsfield window, becomes 0; also what padding stands for.
        hu_max: upper end of the Hounsfield window, becomes 1.
        spacing_mm_dhw: voxel size in mm along (depth, height, width).
        orientation: where x, y and z grow to. Arrays are (z, y, x): with "LPS" the last axis runs to the patient's
            left, the middle one to the back and the first one to the head.
        rescale_applied: values are Hounsfield units: slope and intercept were applied once. Nothing else is accepted.
        size_dhw: smallest size after padding, voxels.
        patch_size_dhw: padding ends at a multiple of this, voxels; as in the model's config.
        crop_margin_dhw: voxels kept around the anatomies; at the upper end one less, as published.
        do_crop: crop to the anatomies.
        do_window: scale the window to [0, 1]. Switch it off for volumes that are scaled already.
        do_pad: pad; without it the sizes must fit already.
        **kwargs: what the base class keeps.

    Examples:
        >>> processor = FVLMImageProcessor()
        >>> inputs = processor(volume_hu, anatomy_mask=mask, spacing_mm_dhw=(3, 1, 1), orientation="LPS")
        >>> inputs["pixel_values"].shape
        torch.Size([1, 1, 112, 256, 352])
    """

    model_input_names = ["pixel_values", "anatomy_mask"]  # noqa: RUF012 - the base class has a list

    def __init__(
        self,
        anatomies: Sequence[str] = ("lung", "heart", "esophagus", "aorta"),
        hu_min: float = -1150.0,
        hu_max: float = 350.0,
        spacing_mm_dhw: Sequence[float] = (3.0, 1.0, 1.0),
        orientation: str = "LPS",
        rescale_applied: bool = True,
        size_dhw: Sequence[int] = (112, 256, 352),
        patch_size_dhw: Sequence[int] = (16, 16, 32),
        crop_margin_dhw: Sequence[int] = (5, 20, 20),
        do_crop: bool = True,
        do_window: bool = True,
        do_pad: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not hu_min < hu_max:
            raise ValueError(f"hu_min must lie below hu_max, but {hu_min} and {hu_max} came.")
        if not rescale_applied:
            raise ValueError("rescale_applied must be true: volumes come in Hounsfield units, not as raw values.")
        self.anatomies = list(anatomies)
        self.hu_min = hu_min
        self.hu_max = hu_max
        self.spacing_mm_dhw = [float(step) for step in spacing_mm_dhw]
        self.orientation = orientation
        self.rescale_applied = rescale_applied
        self.size_dhw = list(size_dhw)
        self.patch_size_dhw = list(patch_size_dhw)
        self.crop_margin_dhw = list(crop_margin_dhw)
        self.do_crop = do_crop
        self.do_window = do_window
        self.do_pad = do_pad
        self._check_contract()

    def __call__(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Model inputs of one volume or a list of volumes: see `preprocess`."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: Any,
        anatomy_mask: Any = None,
        *,
        spacing_mm_dhw: Sequence[float] | None = None,
        orientation: str | None = None,
        do_crop: bool | None = None,
        do_window: bool | None = None,
        do_pad: bool | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """`pixel_values` (B, 1, D, H, W) float32 in [0, 1] and, with masks, `anatomy_mask` (B, D, H, W) uint8.

        Volumes of different sizes are padded at their ends to the largest.

        Args:
            images: a volume (D, H, W) in Hounsfield units, array or tensor, or a list of them.
            anatomy_mask: a mask (D, H, W) of integer ids, 0 = background, or a list of them.
            spacing_mm_dhw: of the volumes, checked against the contract; leave it out only where the reader checked it.
            orientation: of the volumes, checked likewise.
            do_crop: see the class; by default as set there.
            do_window: likewise.
            do_pad: likewise.
            return_tensors: "pt" or "np".

        Raises:
            ValueError: an array is no CT volume in Hounsfield units, a mask does not fit its volume, or spacing or
                orientation is another. The message names the volume by its place in the list and says what to do.
        """
        self._check_orientation(orientation)
        do_crop = self.do_crop if do_crop is None else do_crop
        do_window = self.do_window if do_window is None else do_window
        do_pad = self.do_pad if do_pad is None else do_pad

        volumes = _as_list(images, "images")
        masks = [None] * len(volumes) if anatomy_mask is None else _as_list(anatomy_mask, "anatomy_mask")
        if len(masks) != len(volumes):
            raise ValueError(f"{len(volumes)} volumes came with {len(masks)} masks; give one for each.")
        pairs = []
        for index, (volume, mask) in enumerate(zip(volumes, masks, strict=True)):
            self._check_volume(volume, f"images[{index}]", in_hounsfield=do_window)
            self._check_spacing(spacing_mm_dhw, volume.shape, f"images[{index}]")
            if mask is not None:
                self._check_mask(mask, volume.shape, f"anatomy_mask[{index}]")
                if do_crop:
                    window = self._anatomy_window(mask)
                    volume, mask = volume[window], mask[window]
            pairs.append((volume, mask))
        return self._batch(pairs, return_tensors, do_window=do_window, do_pad=do_pad)

    def _check_contract(self) -> None:
        for name in ("spacing_mm_dhw", "size_dhw", "patch_size_dhw", "crop_margin_dhw"):
            values = getattr(self, name)
            lowest = min(values, default=-1)
            if len(values) != 3 or lowest < 0 or (lowest == 0 and name != "crop_margin_dhw"):
                raise ValueError(f"{name} holds a positive number for depth, height and width each, but {values} came.")
        if not self.anatomies or len(set(self.anatomies)) < len(self.anatomies):
            raise ValueError(f"anatomies must be distinct names, at least one, but {self.anatomies} came.")

    def _check_orientation(self, orientation: str | None) -> None:
        if orientation is not None and orientation != self.orientation:
            raise ValueError(
                f"The volume is in {orientation} orientation, but these weights expect {self.orientation}. Reorient "
                "the scan on reading; flipped organs are scored without any sign of error."
            )

    def _check_spacing(self, spacing_mm_dhw: Sequence[float] | None, shape: tuple[int, ...], name: str) -> None:
        """Refuse another spacing; resampling to whole voxels may leave less than one voxel over the whole length."""
        if spacing_mm_dhw is None:
            return
        wanted = np.asarray(self.spacing_mm_dhw)
        excess_voxels = np.abs(np.asarray(spacing_mm_dhw, dtype=np.float64) - wanted) * np.asarray(shape) / wanted
        if excess_voxels.shape != (3,) or not (excess_voxels <= 1).all():
            raise ValueError(
                f"{name} has voxels of {tuple(spacing_mm_dhw)} mm (depth, height, width), but these weights expect "
                f"{tuple(self.spacing_mm_dhw)}. Resample the scan on reading."
            )

    def _check_volume(self, volume: np.ndarray, name: str, *, in_hounsfield: bool) -> None:
        if volume.ndim != 3 or volume.size == 0:
            raise ValueError(
                f"{name} must be a volume (depth, height, width), but shape {volume.shape} came. Choose one phase of a "
                "4-D scan, and give several volumes as a list."
            )
        if volume.dtype.kind not in "iuf":
            raise ValueError(f"{name} must hold integers or floats, but {volume.dtype} came.")
        if in_hounsfield:
            check_hounsfield(volume, name)
        elif not (np.isfinite(volume).all() and volume.min() >= 0 and volume.max() <= 1):
            raise ValueError(f"{name} must lie in [0, 1] with do_window=False. Let the processor apply the window.")

    def _check_mask(self, mask: np.ndarray, shape: tuple[int, ...], name: str) -> None:
        if mask.shape != shape:
            raise ValueError(
                f"{name} has shape {mask.shape}, but its volume has {shape}: both must share one grid. Segment this "
                "very volume, or resample the mask to it with nearest neighbours."
            )
        if mask.dtype.kind not in "iu":
            raise ValueError(f"{name} must hold integer ids, but {mask.dtype} came.")
        lowest, highest = int(mask.min()), int(mask.max())
        if lowest < 0 or highest > len(self.anatomies):
            raise ValueError(
                f"{name} holds ids from {lowest} to {highest}, but 0 (background) to {len(self.anatomies)} "
                f"({', '.join(self.anatomies)}) are known. Map the labels of the segmentation to these anatomies first."
            )
        if highest == 0:
            raise ValueError(
                f"{name} holds no anatomy. Check that the segmentation belongs to the scan and that the scan shows one "
                f"of {', '.join(self.anatomies)}."
            )

    def _anatomy_window(self, mask: np.ndarray) -> tuple[slice, slice, slice]:
        """The box around all anatomies with the published margins, inside the volume."""
        plane = mask.max(axis=0)
        lines = (mask.max(axis=(1, 2)), plane.max(axis=1), plane.max(axis=0))
        slices = []
        for line, margin in zip(lines, self.crop_margin_dhw, strict=True):
            places = np.flatnonzero(line)
            slices.append(slice(max(0, places[0] - margin), min(len(line), places[-1] + max(margin, 1))))
        return slices[0], slices[1], slices[2]

    def _batch(
        self,
        pairs: list[tuple[np.ndarray, np.ndarray | None]],
        return_tensors: str | None,
        *,
        do_window: bool,
        do_pad: bool,
    ) -> BatchFeature:
        """Volumes and masks of one size, each voxel written once, where it stays."""
        padded = [self._padded_size(volume.shape) if do_pad else (volume.shape, (0, 0, 0)) for volume, _ in pairs]
        size = tuple(max(whole[axis] for whole, _ in padded) for axis in range(3))
        if any(length % patch for length, patch in zip(size, self.patch_size_dhw, strict=True)):
            raise ValueError(
                f"The volumes have {size} voxels, no multiple of the patch {tuple(self.patch_size_dhw)}. Leave do_pad "
                "on."
            )
        pixel_values = np.empty((len(pairs), 1, *size), dtype=np.float32)
        anatomy_mask = np.empty((len(pairs), *size), dtype=np.uint8)
        for index, ((volume, mask), (_, start)) in enumerate(zip(pairs, padded, strict=True)):
            place = tuple(slice(first, first + length) for first, length in zip(start, volume.shape, strict=True))
            if volume.shape != size:
                pixel_values[index], anatomy_mask[index] = 0, 0
            inside = pixel_values[index, 0][place]
            if do_window:
                self._window_into(inside, volume)
            else:
                inside[...] = volume
            if mask is not None:
                anatomy_mask[index][place] = mask
        data: dict[str, np.ndarray] = {"pixel_values": pixel_values}
        if pairs[0][1] is not None:
            data["anatomy_mask"] = anatomy_mask
        return BatchFeature(data, tensor_type=return_tensors)

    def _padded_size(self, shape: Sequence[int]) -> tuple[Size, Size]:
        """Size with zeros around up to that of the training crops, then at the end up to whole patches; first voxel."""
        missing = [max(0, smallest - size) for size, smallest in zip(shape, self.size_dhw, strict=True)]
        sizes = [size + more for size, more in zip(shape, missing, strict=True)]
        depth, height, width = (size + -size % patch for size, patch in zip(sizes, self.patch_size_dhw, strict=True))
        front, top, left = (more // 2 for more in missing)
        return (depth, height, width), (front, top, left)

    def _window_into(self, scaled: np.ndarray, volume: np.ndarray) -> None:
        """Hounsfield units to [0, 1], float32; all steps of a slice are done while it lies in the processor's cache."""
        for target, values, source in zip(scaled, torch.from_numpy(scaled), volume, strict=True):
            target[...] = source  # by NumPy, which takes any type, byte order and layout
            values.sub_(self.hu_min).div_(self.hu_max - self.hu_min).clamp_(0, 1)


# Same rule as in data/ct/geometry.py, which cannot be imported here: this file travels to the Hub.
def check_hounsfield(values: np.ndarray, name: str) -> None:
    """Refuse values that cannot be Hounsfield units of a body in air.

    A CT of a body holds air (about -1000, lung about -850) and soft tissue (-100 fat to 100 muscle), and nothing below
    air but one constant that fills the space outside of the reconstruction circle. Rescaled twice, tissue itself sinks
    below air (minimum near -2048 or -8192); raw, windowed, scaled or MR values have no air.

    Args:
        values: (D, H, W), believed to be Hounsfield units.
        name: of the volume, for messages.

    Raises:
        ValueError: with what was found, its likely cause and what to do.
    """
    lowest, highest = float(values.min()), float(values.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ValueError(f"{name} holds NaN or infinite voxels. Restore the scan from its source.")
    if lowest == highest:
        raise ValueError(f"{name} is constant: every voxel is {lowest:g}. Check what was read.")
    found = f"{name} holds values from {lowest:g} to {highest:g}"
    step = math.ceil((values.size / _STATISTICS_VOXELS) ** (1 / 3))
    sample = values[::step, ::step, ::step].ravel()
    body = sample[sample != lowest] if lowest < -1100 else sample
    below_air = _share(body < -1300) if body.size else 1.0
    if below_air > 0.01:
        raise ValueError(
            f"{found}, {below_air:.0%} of them below -1300 HU, where neither tissue nor air lies. Slope and intercept "
            "were probably applied to Hounsfield units once more; do not apply them again."
        )
    if _share(body <= -600) < 0.001:
        raise ValueError(
            f"{found} and no air (-1000 HU): not Hounsfield units. Raw values whose slope and intercept are still to "
            "be applied, a windowed or scaled copy (do_window=False takes volumes in [0, 1]), or not CT at all (MR)."
        )
    tissue = _share((body > -300) & (body < 300))
    if tissue < 0.03:
        raise ValueError(
            f"{found}, but only {tissue:.1%} of them between -300 and 300 HU, where soft tissue lies. Check slope and "
            "intercept (applied twice?) and that the scan shows a patient."
        )


def _share(flags: np.ndarray) -> float:
    return np.count_nonzero(flags) / flags.size


def _as_list(arrays: Any, name: str) -> list[np.ndarray]:
    """Arrays of one volume or of a (nested) list of volumes."""
    if isinstance(arrays, np.ndarray | torch.Tensor):
        arrays = [arrays]
    flat: list[np.ndarray] = []
    for array in arrays:
        if isinstance(array, list | tuple):
            flat += _as_list(array, name)
        elif isinstance(array, torch.Tensor):
            array = array.float() if array.dtype == torch.bfloat16 else array  # which NumPy does not know
            flat.append(array.detach().cpu().numpy())
        elif isinstance(array, np.ndarray):
            flat.append(array)
        else:
            raise ValueError(
                f"{name} must be an array, a tensor or a list of them, but {type(array).__name__} came. Read files "
                "with the reader of the package first."
            )
    if not flat:
        raise ValueError(f"{name} is an empty list; give at least one volume.")
    return flat


__all__ = ["FVLMImageProcessor"]
