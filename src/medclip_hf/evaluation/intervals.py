"""Figures with bootstrap intervals: patients are drawn with replacement, and all samples of a patient come along.

A figure that does not exist (a class without positives, say) is None: never NaN, never a number that a mean swallows.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
_CHUNK_ELEMENTS = 500_000  # of a (resamples, samples) block: 4 MB of float64, so that it stays in the cache


@dataclass(frozen=True)
class Interval:
    """A figure with its bootstrap percentile interval.

    Args:
        value: on the sample itself; None where it is undefined.
        low: lower end; None where no resample defines the figure.
        high: upper end.
        num_undefined: resamples that left a class empty and were left out of the interval.
    """

    value: float | None
    low: float | None
    high: float | None
    num_undefined: int = 0

    def as_dict(self) -> dict[str, float | int | None]:
        """The fields, ready for JSON."""
        return asdict(self)

    def as_text(self, form: str = "{:.3f}") -> str:
        """The figure and its interval for a reader, as in "0.905 (0.894 to 0.915)"."""
        if self.value is None:
            return "undefined"
        if self.low is None or self.high is None:
            return form.format(self.value)
        return f"{form.format(self.value)} ({form.format(self.low)} to {form.format(self.high)})"


def mean_with_interval(
    values: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of one figure per sample (a hit, an overlap) with its interval.

    Args:
        values: (N,), finite; N may be 0, the mean is None then.
        groups: (N,) patient of each sample; None: every sample is its own.
        num_resamples: 0: no interval.
        confidence: share of resamples inside the interval.
        seed: of the resampling.

    Raises:
        ValueError: values of another shape or not finite.
    """
    samples = np.asarray(values, dtype=np.float64)
    if samples.ndim != 1:
        raise ValueError(f"values must be one a sample, (N,), got shape {samples.shape}")
    options: dict[str, Any] = {"groups": groups, "num_resamples": num_resamples, "confidence": confidence, "seed": seed}
    return means_with_intervals(samples[:, None], **options)[0]


def means_with_intervals(
    values: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """`mean_with_interval` of each of F figures (N, F), all of them on the same resamples."""
    samples = np.asarray(values, dtype=np.float64)
    if samples.ndim != 2:
        raise ValueError(f"values must be one row a sample, (N, F), got shape {samples.shape}")
    if num_bad := int((~np.isfinite(samples)).sum()):
        raise ValueError(f"values must be finite, but {num_bad} of {samples.size} are not: leave their samples out")
    if not len(samples):
        return [Interval(None, None, None)] * samples.shape[1]
    drawn = np.concatenate([np.zeros((0, samples.shape[1])), *resampled_means(samples, groups, num_resamples, seed)])
    return [percentile_interval(float(samples[:, f].mean()), drawn[:, f], confidence) for f in range(samples.shape[1])]


def resampled_means(samples: Floats, groups: ArrayLike | None, num_resamples: int, seed: int) -> Iterator[Floats]:
    """Means (resamples, F) of the resamples of `bootstrap_weights` of samples (N, F), block by block."""
    sums, sizes = group_sums(samples, groups)
    columns = np.ascontiguousarray(sums.T)
    for weights in bootstrap_weights(len(sums), None, num_resamples, seed):
        yield np.stack([weights @ column for column in columns], axis=1) / (weights @ sizes)[:, None]


def group_sums(samples: Floats, groups: ArrayLike | None) -> tuple[Floats, Floats]:
    """Sums (G, F) of the samples (N, F) of each group, and its number of samples (G,).

    A resample of groups gives each of them one weight: what is a sum over samples needs no more than these sums, and
    `bootstrap_weights(G, None, …)` draws the very groups that it draws for the samples.
    """
    if groups is None:
        return samples, np.ones(len(samples))
    group_of = group_index(groups, len(samples))
    sums = np.stack([np.bincount(group_of, weights=column) for column in samples.T], axis=1)
    return np.asarray(sums, dtype=np.float64), np.bincount(group_of).astype(np.float64)


def bootstrap_weights(num_samples: int, groups: ArrayLike | None, num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each sample occurs in each resample: blocks (resamples, num_samples) that together are `num_resamples`.

    As many groups as there are are drawn with replacement; all samples of a group come along together.

    Raises:
        ValueError: negative number of resamples, groups as in `group_index`.
    """
    if num_resamples < 0:
        raise ValueError(f"num_resamples must not be negative, got {num_resamples}")
    if not num_samples:
        return
    group_of = group_index(groups, num_samples)
    num_groups = int(group_of.max()) + 1
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // num_samples)
    for first in range(0, num_resamples, rows):
        block = np.empty((min(rows, num_resamples - first), num_samples))
        for weights in block:  # one by one: the counts of a resample stay near the processor
            counts = np.bincount(rng.integers(num_groups, size=num_groups), minlength=num_groups)
            weights[:] = counts if groups is None else counts[group_of]
        yield block


def group_index(groups: ArrayLike | None, num_samples: int) -> NDArray[np.intp]:
    """Number (N,) of each sample's group, from 0 on; without groups every sample is its own.

    Raises:
        ValueError: another number of groups than samples, samples whose group is missing.
    """
    if groups is None:
        return np.arange(num_samples)
    names = np.asarray(groups)
    if names.shape != (num_samples,):
        raise ValueError(f"expected one group per sample, shape ({num_samples},), got shape {names.shape}")
    is_missing = np.array([name is None or name != name for name in names.tolist()], dtype=bool)  # NaN is not itself
    if is_missing.any():
        raise ValueError(f"{int(is_missing.sum())} of {num_samples} samples have no group (None or NaN): name them all")
    if names.dtype == object:
        names = names.astype(str)  # a column of numbers and texts: 7 and "7" are one patient
    return np.asarray(np.unique(names, return_inverse=True)[1])


def percentile_interval(value: float | None, resampled: ArrayLike, confidence: float = 0.95) -> Interval:
    """`value` with the percentiles of its resampled figures; NaN among them means undefined, and is counted.

    Raises:
        ValueError: confidence outside (0, 1).
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    figures = np.asarray(resampled, dtype=np.float64)
    kept = figures[~np.isnan(figures)]
    if value is None or not len(kept):
        return Interval(value, None, None, len(figures))
    tail = 0.5 * (1.0 - confidence)
    low, high = np.quantile(kept, [tail, 1.0 - tail])
    return Interval(value, float(low), float(high), len(figures) - len(kept))
