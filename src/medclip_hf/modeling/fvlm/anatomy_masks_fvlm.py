"""Anatomy masks as bits: which patches of a volume hold which anatomy, and which anatomies lie wholly inside a crop."""

from collections.abc import Sequence

import torch
from torch import Tensor


def anatomy_token_mask(anatomy_mask: Tensor, num_anatomies: int, patch_size_dhw: Sequence[int]) -> Tensor:
    """Which patches belong to which anatomy: (B, A, P) bool; a patch belongs if it holds one voxel of the anatomy.

    Args:
        anatomy_mask: (B, D, H, W) integer ids, 0 = background, i + 1 = anatomy i. Ids beyond A are background here:
            finding them would stop the device. The processor refuses them.
        num_anatomies: A.
        patch_size_dhw: voxels (depth, height, width) of a patch.

    Raises:
        ValueError: the mask is not of integers, has other axes, or its size is no multiple of the patch.
    """
    _check_anatomy_mask(anatomy_mask)
    batch, *size_dhw = anatomy_mask.shape
    depth, height, width = count_patches(size_dhw, patch_size_dhw, "anatomy_mask")
    patch_depth, patch_height, patch_width = patch_size_dhw
    bits = _anatomy_bits(anatomy_mask, num_anatomies)
    bits = bits.reshape(batch, depth, patch_depth, height, patch_height, width, patch_width)
    bits = _or_reduce(_or_reduce(_or_reduce(bits, 2), 3), 4)  # slices first: contiguous and the largest step
    return _bits_to_flags(bits.flatten(1), num_anatomies).transpose(1, 2)


def complete_anatomies(anatomy_mask: Tensor, num_anatomies: int) -> Tensor:
    """Which anatomies occur in a crop and touch none of its six faces: (B, A) bool.

    Only these enter the loss: a text tells of the whole anatomy, and one that reaches a face is probably cut.

    Args:
        anatomy_mask: (B, D, H, W) integer ids, 0 = background, i + 1 = anatomy i.
        num_anatomies: A.

    Raises:
        ValueError: the mask is not of integers or has other axes.
    """
    _check_anatomy_mask(anatomy_mask)
    bits = _anatomy_bits(anatomy_mask, num_anatomies)
    is_present = _bits_to_flags(_or_reduce(bits.flatten(1), 1), num_anatomies)
    return is_present & ~touching_anatomies(anatomy_mask, num_anatomies)


def touching_anatomies(anatomy_mask: Tensor, num_anatomies: int) -> Tensor:
    """Which anatomies reach one of the six faces: (B, A) bool, of a mask (B, D, H, W) as in `complete_anatomies`."""
    faces = [anatomy_mask.select(dim, index).flatten(1) for dim in (1, 2, 3) for index in (0, -1)]
    bits = _anatomy_bits(torch.cat(faces, dim=1), num_anatomies)
    return _bits_to_flags(_or_reduce(bits, 1), num_anatomies)


def count_patches(size_dhw: Sequence[int], patch_size_dhw: Sequence[int], name: str) -> tuple[int, int, int]:
    """Patches along (depth, height, width) of a volume.

    Args:
        size_dhw: voxels of the volume.
        patch_size_dhw: voxels of a patch.
        name: of the volume, for the message.

    Raises:
        ValueError: the volume is no whole number of patches.
    """
    if any(size < patch or size % patch for size, patch in zip(size_dhw, patch_size_dhw, strict=True)):
        raise ValueError(
            f"{name} has {tuple(size_dhw)} voxels (depth, height, width), which is no multiple of the patch "
            f"{tuple(patch_size_dhw)}. Pad it with zeros; FVLMImageProcessor does."
        )
    depth, height, width = (size // patch for size, patch in zip(size_dhw, patch_size_dhw, strict=True))
    return depth, height, width


def _check_anatomy_mask(anatomy_mask: Tensor) -> None:
    if anatomy_mask.ndim != 4 or anatomy_mask.is_floating_point() or anatomy_mask.is_complex():
        raise ValueError(
            "anatomy_mask holds integer ids of shape (batch, depth, height, width), but "
            f"{anatomy_mask.dtype} of shape {tuple(anatomy_mask.shape)} came. Drop the channel axis and convert it "
            "to uint8."
        )


def _anatomy_bits(anatomy_mask: Tensor, num_anatomies: int) -> Tensor:
    """A voxel of anatomy i as an integer in which bit i + 1 is set; background is bit 0, unknown ids the bit after A.

    As bits, "which anatomies occur in this patch" is one bitwise OR for any number of anatomies, and no one-hot copy of
    the volume is made.
    """
    if num_anatomies <= 6:
        dtype = torch.uint8
    else:
        dtype = torch.int32 if num_anatomies <= 29 else torch.int64
    ids = anatomy_mask.clamp(0, num_anatomies + 1).to(dtype)
    return torch.ones((), dtype=dtype, device=ids.device).bitwise_left_shift(ids)


def _or_reduce(bits: Tensor, dim: int) -> Tensor:
    """Bitwise OR over an axis, which is dropped, by repeated halving."""
    while (size := bits.shape[dim]) > 1:
        half = size // 2
        folded = bits.narrow(dim, 0, half) | bits.narrow(dim, half, half)
        if size % 2:
            folded = torch.cat((folded, bits.narrow(dim, size - 1, 1)), dim=dim)
        bits = folded
    return bits.squeeze(dim)


def _bits_to_flags(bits: Tensor, num_anatomies: int) -> Tensor:
    """Bits 1 to A as bools on a new last axis: (...) -> (..., A)."""
    places = torch.arange(1, num_anatomies + 1, device=bits.device)
    return (bits.unsqueeze(-1).long() >> places & 1).bool()


__all__ = ["anatomy_token_mask", "complete_anatomies", "count_patches", "touching_anatomies"]
