"""Area under the ROC curve, and intervals by bootstrap over patients: arrays in, floats out.

A figure that does not exist (a class without positives, say) is None: never NaN, never a number that a mean swallows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
_CHUNK_ELEMENTS = 8_000_000  # of a (resamples, samples) block: 64 MB of float64


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

    def as_text(self, form: str = "{:.3f}") -> str:
        """The figure and its interval for a reader, as in "0.905 (0.894 to 0.915)"."""
        if self.value is None:
            return "undefined"
        if self.low is None or self.high is None:
            return form.format(self.value)
        return f"{form.format(self.value)} ({form.format(self.low)} to {form.format(self.high)})"


@dataclass(frozen=True)
class ClassAUROC:
    """Areas under the ROC curve of several classes and their mean.

    Args:
        macro: unweighted mean over the classes that have one.
        per_class: in the order given.
        undefined: classes without a positive or without a negative sample, left out of `macro`.
    """

    macro: Interval
    per_class: dict[str, Interval]
    undefined: tuple[str, ...]


def auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting one half.

    Args:
        scores: (N,), finite.
        labels: (N,), bool or 0 and 1.

    Returns:
        None where there is no positive or no negative.

    Raises:
        ValueError: shapes that differ, scores that are not finite, labels other than 0 and 1.
    """
    values, truth = _checked(scores, labels, ndim=1)
    return _by_ranks(values, truth)


def auroc_per_class(
    scores: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ClassAUROC:
    """Area under the ROC curve of every class and their mean, with intervals.

    All classes are resampled together, so the interval of the mean respects that they share patients. A resample
    without a positive or a negative of a class is left out for that class and counted; the mean of a resample is over
    the classes that are defined on the sample, and left out unless all of them are defined in the resample too.

    Args:
        scores: (N, K), finite.
        labels: (N, K), bool or 0 and 1.
        class_names: K names.
        groups: (N,) patient of each sample, any comparable type; None: every sample is its own.
        num_resamples: 0: no intervals.
        confidence: share of resamples inside the interval.
        seed: of the resampling.

    Raises:
        ValueError: as `auroc`, and a number of names or groups that does not fit.
    """
    values, truth = _checked(scores, labels, ndim=2)
    if len(class_names) != values.shape[1] or len(set(class_names)) != len(class_names):
        raise ValueError(f"expected {values.shape[1]} different class names, one per column, got {list(class_names)}")
    points = [_by_ranks(values[:, k], truth[:, k]) for k in range(values.shape[1])]
    defined = [k for k, point in enumerate(points) if point is not None]
    resampled = np.full((len(points), num_resamples), np.nan)
    sorters = {k: _SortedClass(values[:, k], truth[:, k]) for k in defined}
    first = 0
    for weights in bootstrap_weights(len(values), groups, num_resamples, seed):
        for k in defined:
            resampled[k, first : first + len(weights)] = sorters[k].auroc(weights)
        first += len(weights)
    known = [point for point in points if point is not None]
    macro = float(np.mean(known)) if known else None
    macro_resampled = resampled[defined].mean(axis=0) if defined else np.zeros(0)
    return ClassAUROC(
        macro=percentile_interval(macro, macro_resampled, confidence),
        per_class={
            name: percentile_interval(point, resampled[k] if point is not None else np.zeros(0), confidence)
            for k, (name, point) in enumerate(zip(class_names, points, strict=True))
        },
        undefined=tuple(name for k, name in enumerate(class_names) if k not in sorters),
    )


def auroc_with_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Area under the ROC curve of one class with its interval; arguments and errors as in `auroc_per_class`."""
    values, truth = _checked(scores, labels, ndim=1)
    result = auroc_per_class(
        values[:, None],
        truth[:, None],
        ["class"],
        groups=groups,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )
    return result.per_class["class"]


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
    if samples.ndim != 1 or not np.isfinite(samples).all():
        raise ValueError(f"values must be finite and of shape (N,), got shape {samples.shape}")
    if not len(samples):
        return Interval(None, None, None)
    blocks = [
        weights @ samples / weights.sum(axis=1)
        for weights in bootstrap_weights(len(samples), groups, num_resamples, seed)
    ]
    return percentile_interval(float(samples.mean()), np.concatenate([np.zeros(0), *blocks]), confidence)


def bootstrap_weights(num_samples: int, groups: ArrayLike | None, num_resamples: int, seed: int) -> Iterator[Floats]:
    """How often each sample occurs in each resample: blocks (resamples, num_samples) that together are `num_resamples`.

    As many groups as there are are drawn with replacement; all samples of a group come along together.

    Raises:
        ValueError: negative number of resamples, number of groups other than `num_samples`.
    """
    if num_resamples < 0:
        raise ValueError(f"num_resamples must not be negative, got {num_resamples}")
    group_of = np.arange(num_samples)
    if groups is not None:
        group_names = np.asarray(groups)
        if group_names.shape != (num_samples,):
            raise ValueError(f"expected one group per sample, shape ({num_samples},), got shape {group_names.shape}")
        group_of = np.unique(group_names, return_inverse=True)[1]
    num_groups = int(group_of.max()) + 1 if num_samples else 0
    if not num_groups:
        return
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // max(num_samples, 1))
    for first in range(0, num_resamples, rows):
        block = min(rows, num_resamples - first)
        drawn = rng.integers(num_groups, size=(block, num_groups)) + num_groups * np.arange(block)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=block * num_groups).reshape(block, num_groups)
        yield counts[:, group_of].astype(np.float64)


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


class _SortedClass:
    """One class sorted by score once, so that a resample costs two sums."""

    def __init__(self, scores: Floats, labels: NDArray[np.bool_]) -> None:
        self.order = np.argsort(scores, kind="stable")
        ordered = scores[self.order]
        self.is_positive = labels[self.order]
        self.tie_starts = np.flatnonzero(np.concatenate([[True], ordered[1:] > ordered[:-1]]))

    def auroc(self, weights: Floats) -> Floats:
        """Areas (R,) of weighted samples (R, N); NaN where a side has no weight.

        Σ over tied scores g of positive(g) · (negatives below g + ½ negative(g)), over positives · negatives.
        """
        ordered = weights[:, self.order]
        positive = np.add.reduceat(ordered * self.is_positive, self.tie_starts, axis=1)
        negative = np.add.reduceat(ordered, self.tie_starts, axis=1) - positive
        below = np.cumsum(negative, axis=1) - negative
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        wins = (positive * (below + 0.5 * negative)).sum(axis=1)
        return np.divide(wins, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)


def _by_ranks(scores: Floats, labels: NDArray[np.bool_]) -> float | None:
    num_positive = int(labels.sum())
    num_negative = len(labels) - num_positive
    if not num_positive or not num_negative:
        return None
    rank_sum = rankdata(scores)[labels].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2.0) / (num_positive * num_negative))


def _checked(scores: ArrayLike, labels: ArrayLike, ndim: int) -> tuple[Floats, NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    axes: Any = "(N,)" if ndim == 1 else "(N, K)"
    if values.ndim != ndim or values.shape != truth.shape:
        raise ValueError(f"scores and labels must both be {axes}, got {values.shape} and {truth.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"scores must be finite, but {int((~np.isfinite(values)).sum())} of {values.size} are not")
    if truth.dtype != bool and not np.isin(truth, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(truth)[:5].tolist()}; set unknown labels aside first")
    return values, truth.astype(bool)
