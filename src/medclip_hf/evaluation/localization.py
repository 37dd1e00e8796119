"""How well a map shows where something is, against true masks: pointing game, overlap and energy.

All functions take one map per case, at any resolution, and give one figure per case, so that means and intervals by
patient are taken with `metrics.mean_with_interval`.
"""

import torch
from torch import Tensor

FLAT_TOLERANCE = 1e-6  # of the largest value: what interpolation leaves of a constant in float32


def upsample_maps(maps: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Maps (N, H, W) as seen on the picture: bilinear, cell centres kept in place (align_corners=False).

    Args:
        maps: (N, rows, columns), one value per patch.
        size_hw: of the picture, pixels.
    """
    return torch.nn.functional.interpolate(
        maps.float()[:, None], size=size_hw, mode="bilinear", align_corners=False
    ).squeeze(1)


def pointing_game(maps: Tensor, masks: Tensor, *, tolerance_pixels: int = 0) -> Tensor:
    """Hits (N,) in [0, 1]: 1 where the peak of the upsampled map lies in the mask.

    Where several pixels share the peak it is the share of them inside, so that a flat map scores what a blind guess
    would, not whatever lies in the corner.

    Args:
        maps: (N, rows, columns), finite.
        masks: (N, H, W) bool, none empty.
        tolerance_pixels: distance to the mask, along rows or columns, that still counts as inside.

    Raises:
        ValueError: shapes that do not fit, map not finite, empty mask, negative tolerance.
    """
    truth = _checked_masks(maps, masks)
    if tolerance_pixels < 0:
        raise ValueError(f"tolerance_pixels must not be negative, got {tolerance_pixels}")
    if tolerance_pixels:
        truth = (
            torch.nn.functional.max_pool2d(
                truth.float()[:, None], 2 * tolerance_pixels + 1, stride=1, padding=tolerance_pixels
            )
            .squeeze(1)
            .bool()
        )
    upsampled = upsample_maps(maps, _size(truth))
    is_peak = upsampled >= upsampled.amax(dim=(1, 2), keepdim=True) - _noise(upsampled)
    return (is_peak & truth).sum(dim=(1, 2)).double() / is_peak.sum(dim=(1, 2))


def overlap(maps: Tensor, masks: Tensor, *, threshold: float = 0.5) -> Tensor:
    """Intersection over union (N,) of mask and hot region: where the upsampled map, scaled to [0, 1], is ≥ `threshold`.

    A flat map has no hot region and scores 0.

    Args:
        maps: (N, rows, columns), finite; each is scaled by its own least and greatest value.
        masks: (N, H, W) bool, none empty.
        threshold: in (0, 1].

    Raises:
        ValueError: as `pointing_game`, and a threshold outside (0, 1].
    """
    truth = _checked_masks(maps, masks)
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"threshold must lie in (0, 1], got {threshold}")
    is_hot = _scaled(upsample_maps(maps, _size(truth))) >= threshold
    both, either = (is_hot & truth).sum(dim=(1, 2)), (is_hot | truth).sum(dim=(1, 2))
    return both.double() / either


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share (N,) of the map's energy that lies in the mask, the upsampled map scaled to [0, 1]; 0 for a flat map.

    Args:
        maps: (N, rows, columns), finite.
        masks: (N, H, W) bool, none empty.

    Raises:
        ValueError: as `pointing_game`.
    """
    truth = _checked_masks(maps, masks)
    energy = _scaled(upsample_maps(maps, _size(truth))).double()
    return (energy * truth).sum(dim=(1, 2)) / energy.sum(dim=(1, 2)).clamp(min=torch.finfo(torch.float64).tiny)


def mask_share(masks: Tensor) -> Tensor:
    """Share (N,) of the picture that each mask covers: what a blind guess hits in the pointing game."""
    return masks.bool().double().mean(dim=(1, 2))


def _scaled(maps: Tensor) -> Tensor:
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    is_flat = high - low <= _noise(maps)
    return torch.where(is_flat, 0.0, (maps - low) / torch.where(is_flat, 1.0, high - low))


def _noise(maps: Tensor) -> Tensor:
    return FLAT_TOLERANCE * maps.abs().amax(dim=(1, 2), keepdim=True)


def _size(masks: Tensor) -> tuple[int, int]:
    return masks.shape[1], masks.shape[2]


def _checked_masks(maps: Tensor, masks: Tensor) -> Tensor:
    if maps.ndim != 3 or masks.ndim != 3 or len(maps) != len(masks):
        raise ValueError(
            "expected as many maps (N, rows, columns) as masks (N, H, W), got "
            f"{tuple(maps.shape)} and {tuple(masks.shape)}"
        )
    if not torch.isfinite(maps).all():
        raise ValueError("maps hold values that are not finite")
    truth = masks.bool()
    num_empty = int((~truth.flatten(1).any(dim=1)).sum())
    if num_empty:
        raise ValueError(f"{num_empty} of {len(truth)} masks are empty: a case without its finding cannot be located")
    return truth
