"""Area under the ROC curve, and intervals by bootstrap over patients: arrays in, floats out.

A figure that does not exist (a class without positives, say) is None: never NaN, never a number that a mean swallows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from medclip_hf.evaluation.curves import RankedClass, area_under_roc
from medclip_hf.evaluation.intervals import (
    Floats,
    Interval,
    bootstrap_weights,
    mean_with_interval,
    percentile_interval,
)

__all__ = [
    "ClassAUROC",
    "Interval",
    "auroc",
    "auroc_per_class",
    "auroc_with_interval",
    "bootstrap_weights",
    "mean_with_interval",
    "percentile_interval",
]


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
    ranked = {k: RankedClass(values[:, k], truth[:, k]) for k in defined}
    first = 0
    for weights in bootstrap_weights(len(values), groups, num_resamples, seed):
        by_sample = np.ascontiguousarray(weights.T)
        for k in defined:
            resampled[k, first : first + len(weights)] = area_under_roc(*ranked[k].counts(by_sample))
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
        undefined=tuple(name for k, name in enumerate(class_names) if k not in ranked),
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
