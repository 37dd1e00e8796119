"""How well a map shows where something is, against true masks: pointing game, overlap, average precision and energy.

Most functions take one map per case, at any resolution, and give one figure per case; `localization_figures` takes all
of them at once and gives means per concept with intervals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medclip_hf.evaluation.intervals import Interval, bootstrap_weights, percentile_interval

FLAT_TOLERANCE = 1e-6  # of the largest value: what interpolation leaves of a constant in float32
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))  # of a map scaled to [0, 1]
_PIXELS_AT_ONCE = 8_000_000  # of upsampled maps: 32 MB of float32 and a few times that while they are sorted


@dataclass(frozen=True)
class LocalizationFigures:
    """What a set of maps reached, each figure with its interval.

    Args:
        num_cases: per concept.
        per_concept: concept → figure → interval. Figures: ``pointing`` (peak inside), ``iou_fixed`` (at
            `fixed_threshold`), ``iou_chosen`` (at `chosen_threshold`, if one was given), ``iou_oracle`` (at the best
            threshold of each single case, which nobody knows beforehand: an upper bound), ``auprc`` (of pixels),
            ``energy`` (share inside) and ``mask_share`` (of the picture: what a blind guess hits).
        mean: the same, averaged over concepts.
        fixed_threshold: of the scaled map, set beforehand.
        chosen_threshold: of the scaled map, chosen on other cases; None: none.
    """

    num_cases: dict[str, int]
    per_concept: dict[str, dict[str, Interval]]
    mean: dict[str, Interval]
    fixed_threshold: float
    chosen_threshold: float | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def localization_figures(
    maps: Tensor,
    masks: Tensor,
    concept_names: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    fixed_threshold: float = 0.5,
    chosen_threshold: float | None = None,
    tolerance_pixels: int = 0,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> LocalizationFigures:
    """Every figure per concept and averaged over concepts, with intervals by bootstrap over groups.

    Args:
        maps: (N, rows, columns), one per case: a picture and a concept that is in it.
        masks: (N, H, W) bool, none empty.
        concept_names: of each case.
        groups: (N,) patient or picture of each case; None: every case is its own.
        fixed_threshold: in (0, 1].
        chosen_threshold: what `best_threshold` found on the validation cases; None: leave ``iou_chosen`` out.
        tolerance_pixels: see `pointing_game`.
        num_resamples: 0: no intervals.
        confidence: share of resamples inside the interval.
        seed: of the resampling.

    Raises:
        ValueError: as `pointing_game` and `overlap`; no case; a number of names or groups that does not fit.
    """
    if not len(maps) or len(concept_names) != len(maps):
        raise ValueError(f"expected at least one case and a concept for each, got {len(maps)}, {len(concept_names)}")
    values = case_figures(
        maps,
        masks,
        fixed_threshold=fixed_threshold,
        chosen_threshold=chosen_threshold,
        tolerance_pixels=tolerance_pixels,
    )
    per_concept, mean = summarise_cases(
        values, concept_names, groups=groups, num_resamples=num_resamples, confidence=confidence, seed=seed
    )
    num_cases = {concept: list(concept_names).count(concept) for concept in per_concept}
    return LocalizationFigures(num_cases, per_concept, mean, fixed_threshold, chosen_threshold)


def summarise_cases(
    values: Mapping[str, Tensor],
    concept_names: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Interval]], dict[str, Interval]]:
    """Means of case figures: concept → figure → interval, and figure → interval of the mean over concepts.

    A resample without a case of a concept is left out for that concept and for the mean, and counted.

    Args:
        values: figure → (N,), as `case_figures` gives them; average over seeds first where there are several.
        concept_names: see `localization_figures`, as the rest.
        groups: as there.
        num_resamples: as there.
        confidence: as there.
        seed: as there.
    """
    concepts = list(dict.fromkeys(concept_names))
    names = np.asarray(concept_names, dtype=object)
    member = np.stack([names == concept for concept in concepts], axis=1).astype(np.float64)  # (N, C)
    table = np.stack([figure.numpy() for figure in values.values()], axis=1)  # (N, F)
    points = (member.T @ table) / member.sum(axis=0)[:, None]  # (C, F)
    blocks = [_resampled_means(w, member, table) for w in bootstrap_weights(len(table), groups, num_resamples, seed)]
    resampled = np.concatenate([np.zeros((0, *points.shape)), *blocks])  # (R, C, F)
    per_concept = {
        concept: {
            name: percentile_interval(float(points[c, f]), resampled[:, c, f], confidence)
            for f, name in enumerate(values)
        }
        for c, concept in enumerate(concepts)
    }
    mean = {
        name: percentile_interval(float(points[:, f].mean()), resampled[:, :, f].mean(axis=1), confidence)
        for f, name in enumerate(values)
    }
    return per_concept, mean


def case_figures(
    maps: Tensor,
    masks: Tensor,
    *,
    fixed_threshold: float = 0.5,
    chosen_threshold: float | None = None,
    tolerance_pixels: int = 0,
) -> dict[str, Tensor]:
    """Figures (N,), float64, of every case by the names of `LocalizationFigures`; arguments as there."""
    _checked_masks(maps, masks)
    step = max(1, _PIXELS_AT_ONCE // (masks.shape[1] * masks.shape[2]))
    parts: list[dict[str, Tensor]] = []
    for first in range(0, len(maps), step):
        some, truth = maps[first : first + step], masks[first : first + step]
        truth = truth.bool()
        upsampled = upsample_maps(some, _size(truth))
        scaled = _scaled(upsampled)
        chosen = () if chosen_threshold is None else (chosen_threshold,)
        overlaps = _overlaps(scaled, truth, (*THRESHOLDS, fixed_threshold, *chosen))
        figures = {
            "pointing": _pointing_game(upsampled, truth, tolerance_pixels),
            "iou_fixed": overlaps[:, len(THRESHOLDS)],
            "iou_oracle": overlaps[:, : len(THRESHOLDS)].amax(dim=1),
            "auprc": _average_precision(scaled, truth),
            "energy": _energy_inside(scaled, truth),
            "mask_share": mask_share(truth),
        }
        if chosen_threshold is not None:
            figures["iou_chosen"] = overlaps[:, -1]
        parts.append(figures)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def best_threshold(maps: Tensor, masks: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> float:
    """The threshold with the greatest mean IoU over these cases; choose it on validation, never on the test cases.

    Args:
        maps: (N, rows, columns), finite; cases of one concept, or of all.
        masks: (N, H, W) bool, none empty.
        thresholds: to choose from, each in (0, 1].

    Raises:
        ValueError: as `overlap`; no case.
    """
    if not len(maps):
        raise ValueError("a threshold cannot be chosen without a case.")
    step = max(1, _PIXELS_AT_ONCE // max(1, masks.shape[1] * masks.shape[2]))
    total = torch.zeros(len(thresholds), dtype=torch.float64)
    for first in range(0, len(maps), step):
        total += overlap_at_thresholds(maps[first : first + step], masks[first : first + step], thresholds).sum(dim=0)
    return thresholds[int(total.argmax())]


def centre_prior(num_maps: int, size_rc: tuple[int, int]) -> Tensor:
    """Maps (N, rows, columns) that know nothing but that things are photographed in the middle: a centred Gaussian.

    Its standard deviation is a quarter of each side.
    """
    rows, columns = (torch.arange(side) - 0.5 * (side - 1) for side in size_rc)
    height, width = (0.25 * side for side in size_rc)
    prior = torch.exp(-0.5 * ((rows / height) ** 2)[:, None] - 0.5 * ((columns / width) ** 2)[None])
    return prior.expand(num_maps, -1, -1)


def random_maps(num_maps: int, size_rc: tuple[int, int], seed: int = 0) -> Tensor:
    """Maps (N, rows, columns) of independent uniform noise, as many cells as the model has patches."""
    return torch.rand(num_maps, *size_rc, generator=torch.Generator().manual_seed(seed))


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
    return _pointing_game(upsample_maps(maps, _size(truth)), truth, tolerance_pixels)


def _pointing_game(upsampled: Tensor, truth: Tensor, tolerance_pixels: int) -> Tensor:
    if tolerance_pixels < 0:
        raise ValueError(f"tolerance_pixels must not be negative, got {tolerance_pixels}")
    if tolerance_pixels:
        grown = truth.float()[:, None]
        for reach in ((tolerance_pixels, 0), (0, tolerance_pixels)):  # along rows, then columns
            size = [2 * side + 1 for side in reach]
            grown = torch.nn.functional.max_pool2d(grown, size, stride=1, padding=reach)
        truth = grown.squeeze(1).bool()
    is_peak = upsampled >= upsampled.amax(dim=(1, 2), keepdim=True) - _noise(upsampled)
    return _counts(is_peak & truth).double() / _counts(is_peak)


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
    return overlap_at_thresholds(maps, masks, (threshold,))[:, 0]


def overlap_at_thresholds(maps: Tensor, masks: Tensor, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """Intersection over union (N, T) at every threshold; the greatest of a row is the oracle's. See `overlap`."""
    truth = _checked_masks(maps, masks)
    return _overlaps(_scaled(upsample_maps(maps, _size(truth))), truth, thresholds)


def _overlaps(scaled: Tensor, truth: Tensor, thresholds: Sequence[float]) -> Tensor:
    """The same of maps that were scaled: each pixel is counted once, by how many thresholds it reaches."""
    if not thresholds or not all(0.0 < threshold <= 1.0 for threshold in thresholds):
        raise ValueError(f"every threshold must lie in (0, 1], got {list(thresholds)}")
    levels, place_of = torch.tensor(thresholds, device=scaled.device).unique(return_inverse=True)  # rising, float32
    reached = torch.bucketize(scaled.flatten(1), levels, right=True, out_int32=True)
    keys = reached + (len(levels) + 1) * truth.flatten(1)
    counts = torch.stack([case.bincount(minlength=2 * len(levels) + 2) for case in keys]).unflatten(1, (2, -1))
    outside, both = counts.flip(2).cumsum(dim=2).flip(2)[..., 1:].unbind(dim=1)  # pixels that reach each level, (N, L)
    return (both.double() / (outside + counts[:, 1].sum(dim=1, keepdim=True)))[:, place_of]


def average_precision(maps: Tensor, masks: Tensor) -> Tensor:
    """Area (N,) under the precision-recall curve of the pixels, AP = Σ (Rₙ − Rₙ₋₁) Pₙ over distinct values of the map.

    The same as scikit-learn's `average_precision_score`, all cases at once. A flat map gets the mask's share.

    Args:
        maps: (N, rows, columns), finite.
        masks: (N, H, W) bool, none empty.

    Raises:
        ValueError: as `pointing_game`.
    """
    truth = _checked_masks(maps, masks)
    return _average_precision(_scaled(upsample_maps(maps, _size(truth))), truth)


def _average_precision(scaled: Tensor, truth: Tensor) -> Tensor:
    # The bits of a float in [0, 1] rise with it and leave two free: with the truth in the last one, sorting numbers
    # does what sorting places and gathering would, in a tenth of the time.
    keys = scaled.flatten(1).view(torch.int32) * 2 + truth.flatten(1)
    areas = [_area_of_sorted(np.sort(case)[::-1]) for case in keys.cpu().numpy()]
    return torch.tensor(areas, dtype=torch.float64, device=scaled.device)


def _area_of_sorted(keys: NDArray[np.int32]) -> float:
    """Area under the precision-recall curve of pixels from the highest value down, value · 2 + truth each."""
    last = np.append(np.flatnonzero(np.diff(keys >> 1)), len(keys) - 1)  # of the pixels that share a value
    found = np.cumsum(keys & 1)[last]  # true pixels at or above it
    return float((found / (last + 1) * np.diff(found, prepend=0)).sum() / found[-1])


def energy_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Share (N,) of the map's energy that lies in the mask, the upsampled map scaled to [0, 1]; 0 for a flat map.

    Args:
        maps: (N, rows, columns), finite.
        masks: (N, H, W) bool, none empty.

    Raises:
        ValueError: as `pointing_game`.
    """
    truth = _checked_masks(maps, masks)
    return _energy_inside(_scaled(upsample_maps(maps, _size(truth))), truth)


def _energy_inside(scaled: Tensor, truth: Tensor) -> Tensor:
    energy = scaled.double()
    return (energy * truth).sum(dim=(1, 2)) / energy.sum(dim=(1, 2)).clamp(min=torch.finfo(torch.float64).tiny)


def mask_share(masks: Tensor) -> Tensor:
    """Share (N,) of the picture that each mask covers: what a blind guess hits in the pointing game."""
    return _counts(masks.bool()).double() / (masks.shape[1] * masks.shape[2])


def _counts(flags: Tensor) -> Tensor:
    """How many are set of each case, (N,); numpy counts bools in a tenth of torch's time."""
    rows = flags.flatten(1).cpu().numpy()
    return torch.tensor([np.count_nonzero(row) for row in rows], dtype=torch.int64, device=flags.device)


def _resampled_means(
    weights: NDArray[np.float64], member: NDArray[np.float64], table: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Means (R, C, F) of each concept's figures in each resample; NaN where a resample lacks the concept."""
    sums = np.einsum("rn,nc,nf->rcf", weights, member, table, optimize=True)
    counts = (weights @ member)[..., None]
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


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
