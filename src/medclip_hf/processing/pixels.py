"""Pixels that travel as they were read, in whole numbers, and become the model's input on its device.

A figure of 384 × 384 is 0.44 MB in bytes and 1.77 MB in float32, a CT crop of the published size 20 MB in int16 and 40
MB in float32: what workers write, pin and send shrinks by that much, and no worker spends time on the arithmetic.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from PIL import Image
from torch import Tensor
from torch.utils.data import get_worker_info

SCALING = "pixel_scaling"  # of the batch, beside `pixel_values`: (B, 2, channels), what to take away and to divide by


def scaled_pixels(batch: Mapping[str, Any]) -> Tensor:
    """`pixel_values` of the batch in float32 as the model takes them.

    Without `pixel_scaling` they are so already. With it, a pixel x of channel c becomes (x - shift_c) / divisor_c;
    Hounsfield units, which are int16, are cut to [0, 1] after that.

    Raises:
        ValueError: whole numbers came without their scaling.
    """
    pixels: Tensor = batch["pixel_values"]
    if SCALING not in batch:
        if not pixels.is_floating_point():
            raise ValueError(
                f"pixel_values came as {pixels.dtype} without {SCALING}. Let the collator give both (raw_pixels=True), "
                "or pixels that are scaled (raw_pixels=False)."
            )
        return pixels
    shift, divisor = batch[SCALING].view(*batch[SCALING].shape, *[1] * (pixels.ndim - 2)).unbind(1)
    scaled = pixels.to(torch.float32).sub_(shift).div_(divisor)
    return scaled.clamp_(0, 1) if pixels.dtype == torch.int16 else scaled


def figure_scaling(image_processor: Any, num_rows: int) -> Tensor:
    """(num_rows, 2, 3): the scaling of 8-bit RGB that an image processor of transformers would do itself."""
    factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
    mean, std = np.zeros(3), np.ones(3)
    if image_processor.do_normalize:
        mean, std = np.array(image_processor.image_mean), np.array(image_processor.image_std)
    return torch.tensor(np.stack([mean / factor, std / factor]), dtype=torch.float32).repeat(num_rows, 1, 1)


def scan_scaling(hu_min: float, hu_max: float, num_rows: int) -> Tensor:
    """(num_rows, 2, 1): the Hounsfield window."""
    return torch.tensor([[hu_min], [hu_max - hu_min]], dtype=torch.float32).repeat(num_rows, 1, 1)


def stacked_figures(images: Sequence[Image.Image]) -> Tensor:
    """(B, 3, H, W) uint8 of RGB images of one size."""
    width, height = images[0].size
    pixels = empty_batch((len(images), 3, height, width), np.uint8)
    for planes, image in zip(pixels.numpy(), images, strict=True):
        for plane, channel in zip(planes, image.split(), strict=True):  # Pillow parts them faster than NumPy
            plane[...] = np.asarray(channel)
    return pixels


def empty_batch(shape: Sequence[int], dtype: DTypeLike) -> Tensor:
    """A tensor to fill; in a data loader's worker it lies where the main process reads it, and is not copied there."""
    batch = torch.from_numpy(np.empty(shape, dtype))  # by NumPy, which asks for large pages
    if get_worker_info() is not None and batch.numel():
        shared = torch.UntypedStorage._new_shared(batch.nbytes)  # as PyTorch's own default_collate
        batch.set_(shared, 0, batch.shape, batch.stride())
    return batch
