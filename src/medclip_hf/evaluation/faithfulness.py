"""Whether a map names the patches a score rests on: take them away, or bring them back, in the map's order, and watch.

Deletion and insertion curves of Petsiuk et al. ("RISE", 2018): patches of the picture are replaced by a baseline from
the hottest to the coldest (deletion), or put back into the baseline picture in that order (insertion). A faithful map
makes the score fall early and rise early; a random order is the thing to compare with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medclip_hf.evaluation.intervals import Interval, mean_with_interval

Baseline = Literal["blur", "mean"]
_BLUR_SHARE = 0.1  # standard deviation of the blur over the picture's shorter side


@dataclass(frozen=True)
class FaithfulnessCurves:
    """Scores along the way and the areas under them.

    Args:
        shares: (S + 1,), share of the patches replaced or put back, 0 to 1.
        deletion: (N, S + 1), scores while patches are taken away; column 0 is the whole picture.
        insertion: (N, S + 1), scores while patches are put back; the last column is the whole picture.
    """

    shares: Tensor
    deletion: Tensor
    insertion: Tensor

    @property
    def deletion_area(self) -> Tensor:
        """(N,), float64; the smaller, the more faithful."""
        return torch.trapezoid(self.deletion.double(), self.shares.double(), dim=1)

    @property
    def insertion_area(self) -> Tensor:
        """(N,), float64; the greater, the more faithful."""
        return torch.trapezoid(self.insertion.double(), self.shares.double(), dim=1)


@dataclass(frozen=True)
class FaithfulnessFigures:
    """Areas of a map and of a random order, and their paired differences; scores as they came, not rescaled.

    Args:
        deletion: mean area of the map; lower is better.
        insertion: mean area of the map; higher is better.
        deletion_gain: mean of random − map, case by case; above 0 the map is better than chance.
        insertion_gain: mean of map − random.
    """

    deletion: Interval
    insertion: Interval
    deletion_gain: Interval
    insertion_gain: Interval


@torch.no_grad()
def faithfulness_curves(
    score_fn: Callable[[Tensor, Tensor], Tensor],
    pixel_values: Tensor,
    maps: Tensor,
    *,
    num_steps: int = 16,
    baseline: Baseline = "blur",
    batch_size: int = 64,
) -> FaithfulnessCurves:
    """Deletion and insertion curves of N pictures, all steps of several pictures in one forward pass.

    Args:
        score_fn: (pixel_values (B, 3, H, W), case numbers (B,)) -> scores (B,), for instance the cosine of each
            picture with the concept of its case.
        pixel_values: (N, 3, H, W), normalised.
        maps: (N, rows, columns), finite; one cell is taken away at a time as a block of pixels.
        num_steps: S, points of the curve after the first; at most the number of cells.
        baseline: what stands where a patch was taken away: the picture "blur"red (Gaussian, a tenth of the shorter
            side), or its "mean" colour.
        batch_size: pictures a forward pass.

    Raises:
        ValueError: shapes that do not fit, a map that is not finite, a picture that cells do not divide, steps out of
            range, unknown baseline.
    """
    _check(pixel_values, maps, num_steps)
    replacement = _replacement(pixel_values, baseline)
    num_cells = maps.shape[1] * maps.shape[2]
    counts = torch.linspace(0, num_cells, num_steps + 1).round().long()  # cells gone at each step
    # Where cells tie, a fixed random order: neither corner may come first because it is a corner.
    shuffle = torch.randperm(num_cells, generator=torch.Generator().manual_seed(0))
    order = shuffle[maps.flatten(1).cpu()[:, shuffle].argsort(dim=1, descending=True, stable=True)]
    rank = order.argsort(dim=1).view_as(maps)
    scores = torch.empty(2, len(maps), num_steps + 1)
    jobs = torch.cartesian_prod(torch.arange(2), torch.arange(len(maps)), torch.arange(num_steps + 1))
    cell = (pixel_values.shape[2] // maps.shape[1], pixel_values.shape[3] // maps.shape[2])
    for chunk in jobs.split(batch_size):
        is_insertion, case, step = chunk.unbind(dim=1)
        is_hot = rank[case] < counts[step][:, None, None]
        keeps_picture = (is_hot == is_insertion.bool()[:, None, None]).to(pixel_values.device)
        mask = keeps_picture.repeat_interleave(cell[0], dim=1).repeat_interleave(cell[1], dim=2)[:, None]
        mixed = torch.where(mask, pixel_values[case], replacement[case])
        scores[is_insertion, case, step] = score_fn(mixed, case).detach().float().cpu()
    return FaithfulnessCurves(counts / num_cells, scores[0], scores[1])


def faithfulness_figures(
    curves: FaithfulnessCurves,
    random_curves: FaithfulnessCurves,
    *,
    groups: object = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> FaithfulnessFigures:
    """Mean areas with intervals, and what the map gains over a random order on the same cases.

    Args:
        curves: of the map.
        random_curves: of random maps (`localization.random_maps`) on the same pictures.
        groups: (N,) patient or picture of each case.
        num_resamples: 0: no intervals.
        seed: of the resampling.

    Raises:
        ValueError: different numbers of cases.
    """
    if curves.deletion.shape != random_curves.deletion.shape:
        raise ValueError(
            f"expected curves of the same cases and steps, got {tuple(curves.deletion.shape)} and "
            f"{tuple(random_curves.deletion.shape)}"
        )
    areas = {
        "deletion": curves.deletion_area,
        "insertion": curves.insertion_area,
        "deletion_gain": random_curves.deletion_area - curves.deletion_area,
        "insertion_gain": curves.insertion_area - random_curves.insertion_area,
    }
    return FaithfulnessFigures(
        **{
            name: mean_with_interval(values.numpy(), groups=groups, num_resamples=num_resamples, seed=seed)  # type: ignore[arg-type]
            for name, values in areas.items()
        }
    )


def _replacement(pixel_values: Tensor, baseline: Baseline) -> Tensor:
    """What stands where a patch was taken away, (N, 3, H, W)."""
    if baseline == "mean":
        return pixel_values.mean(dim=(2, 3), keepdim=True).expand_as(pixel_values)
    if baseline != "blur":
        raise ValueError(f"baseline must be 'blur' or 'mean', got {baseline!r}")
    sigma = _BLUR_SHARE * min(pixel_values.shape[2:])
    reach = min(round(3 * sigma), min(pixel_values.shape[2:]) - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=pixel_values.dtype, device=pixel_values.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = torch.nn.functional.pad(pixel_values, (reach, reach, reach, reach), mode="reflect")
    along_rows = torch.nn.functional.conv2d(padded, kernel, groups=3)
    return torch.nn.functional.conv2d(along_rows, kernel.transpose(2, 3), groups=3)


def _check(pixel_values: Tensor, maps: Tensor, num_steps: int) -> None:
    if pixel_values.ndim != 4 or pixel_values.shape[1] != 3 or maps.ndim != 3 or len(maps) != len(pixel_values):
        raise ValueError(
            "expected pictures (N, 3, H, W) and as many maps (N, rows, columns), got "
            f"{tuple(pixel_values.shape)} and {tuple(maps.shape)}"
        )
    if not len(maps) or not torch.isfinite(maps).all():
        raise ValueError("expected at least one map, all values finite")
    if pixel_values.shape[2] % maps.shape[1] or pixel_values.shape[3] % maps.shape[2]:
        raise ValueError(
            f"cells of maps {tuple(maps.shape[1:])} do not divide pictures of {tuple(pixel_values.shape[2:])} pixels"
        )
    if not 1 <= num_steps <= maps.shape[1] * maps.shape[2]:
        raise ValueError(f"num_steps must lie in 1..{maps.shape[1] * maps.shape[2]}, got {num_steps}")
