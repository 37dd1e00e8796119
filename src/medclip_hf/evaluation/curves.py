"""ROC and precision-recall curves of weighted samples: what areas, operating points and bands are read from.

A resample of a bootstrap is a weight for each sample, so a class is sorted once and a resample costs two running sums.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from medclip_hf.evaluation.intervals import Floats, bootstrap_weights

_GRID = np.linspace(0.0, 1.0, 101)
_SLACK = 1e-9  # so that a specificity of 0.9 on 10 negatives allows one of them


class RankedClass:
    """The samples of one class from the highest score to the lowest, in steps of its curves.

    Equal scores are one step. So are neighbouring scores that only negatives have: between them no curve bends, and a
    resample of a rare class then costs little more than reading its weights.

    Args:
        scores: (N,), finite where known.
        labels: (N,) bool.
        known: (N,) bool, samples whose label and score count; None: all.
    """

    def __init__(self, scores: Floats, labels: NDArray[np.bool_], known: NDArray[np.bool_] | None = None) -> None:
        rows = np.arange(len(scores)) if known is None else np.flatnonzero(known)
        order = rows[np.argsort(-scores[rows], kind="stable")]
        ordered = scores[order]
        score_of = np.cumsum(np.append(False, ordered[1:] < ordered[:-1]))  # which distinct score, from the highest
        holds_positive = np.bincount(score_of, weights=labels[order]) > 0
        step_of_score = np.cumsum(np.append(True, holds_positive[1:] | holds_positive[:-1])) - 1
        steps = step_of_score[score_of]
        sides = (labels[order], ~labels[order])
        self._members = [
            csr_array((np.ones(side.sum()), (steps[side], order[side])), shape=(steps[-1] + 1, len(scores)))
            for side in sides
        ]

    def counts(self, weights: Floats) -> tuple[Floats, Floats]:
        """Weight of positives and of negatives (steps, R) at or above the lowest score of each step.

        Args:
            weights: (N, R): a column a resample, which lets a step be a row of the sum.
        """
        positive, negative = (np.asarray(members @ weights) for members in self._members)
        return np.cumsum(positive, axis=0, out=positive), np.cumsum(negative, axis=0, out=negative)


def area_under_roc(positive: Floats, negative: Floats) -> Floats:
    """Areas (R,) under the ROC curves, ties counting one half; NaN where a side has no weight.

    Args:
        positive: (steps, R), as `RankedClass.counts` gives it.
        negative: the same of the negatives.
    """
    # Σ Δnegative · (positive + positive before) / 2: the trapezoids
    doubled = positive.copy()
    doubled[1:] += positive[:-1]
    area = 0.5 * np.einsum("sr,sr->r", doubled, _gains(negative))
    return _ratio(area, positive[-1] * negative[-1])


def average_precision(positive: Floats, negative: Floats) -> Floats:
    """Areas (R,) under the precision-recall curves as Σ Δrecall · precision, without interpolation.

    This is scikit-learn's `average_precision_score`. NaN where there are no positives or no negatives.
    """
    total = positive + negative
    precision = np.divide(positive, total, out=np.zeros_like(total), where=total > 0)
    area = _ratio(np.einsum("sr,sr->r", _gains(positive), precision), positive[-1])
    area[negative[-1] == 0] = np.nan
    return area


def sensitivity_at_specificity(positive: Floats, negative: Floats, specificity: float) -> Floats:
    """Highest sensitivities (R,) that a threshold reaches at no less than this specificity; NaN as for the areas.

    "Score ≥ threshold" is called positive; there is no interpolation between thresholds, and none at all may be met
    (sensitivity 0).
    """
    allowed = (1.0 - specificity + _SLACK) * negative[-1]
    steps = (negative <= allowed).sum(axis=0)  # the curve never turns back, so these are its first steps
    reached = np.take_along_axis(positive, np.maximum(steps - 1, 0)[None], axis=0)[0]
    sensitivity = _ratio(np.where(steps > 0, reached, 0.0), positive[-1])
    sensitivity[negative[-1] == 0] = np.nan
    return sensitivity


def threshold_at_specificity(scores: ArrayLike, labels: ArrayLike, specificity: float) -> float:
    """The lowest score that, called positive at or above it, keeps this specificity: to be chosen on validation.

    Infinity where even the highest score does not keep it.

    Args:
        scores: (N,), finite.
        labels: (N,) bool.
        specificity: in (0, 1].

    Raises:
        ValueError: no negative, a specificity outside (0, 1], scores that are not finite or not like the labels.
    """
    values, truth = _checked(scores, labels)
    if not 0.0 < specificity <= 1.0:
        raise ValueError(f"specificity must lie in (0, 1], got {specificity}")
    if truth.all():
        raise ValueError("a threshold for a specificity needs negative samples, and there are none")
    thresholds, place = np.unique(-values, return_inverse=True)
    called = np.cumsum(np.bincount(place, weights=~truth))  # negatives at or above each distinct score
    steps = int((called <= (1.0 - specificity + _SLACK) * called[-1]).sum())
    return float(-thresholds[steps - 1]) if steps else float("inf")


@dataclass(frozen=True)
class CurveBand:
    """A curve with the band in which most of its resamples run.

    Args:
        x, y: (P,) the curve.
        low, high: (P,) percentiles of the resampled curves at each x; equal to y without resamples.
    """

    x: Floats
    y: Floats
    low: Floats
    high: Floats


def roc_curve_band(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> CurveBand | None:
    """Sensitivity over 1 − specificity with its pointwise band; None where a side is empty.

    Args:
        scores: (N,), finite.
        labels: (N,) bool.
        groups: (N,) patient of each sample; None: every sample is its own.
        num_resamples: 0: no band.
        confidence: share of resamples inside the band at each point.
        seed: of the resampling.
    """
    return _band(_roc_on_grid, scores, labels, groups, num_resamples, confidence, seed)


def precision_recall_band(
    scores: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> CurveBand | None:
    """Precision over recall with its pointwise band; arguments as in `roc_curve_band`.

    At each recall stands the precision of the highest threshold that reaches it.
    """
    return _band(_precision_on_grid, scores, labels, groups, num_resamples, confidence, seed)


def _band(
    on_grid: Callable[[Floats, Floats], Floats],
    scores: ArrayLike,
    labels: ArrayLike,
    groups: ArrayLike | None,
    num_resamples: int,
    confidence: float,
    seed: int,
) -> CurveBand | None:
    values, truth = _checked(scores, labels)
    if not truth.any() or truth.all():
        return None
    ranked = RankedClass(values, truth)
    curve = _on_grid(on_grid, ranked, np.ones((len(values), 1)))[0]
    blocks = [
        _on_grid(on_grid, ranked, np.ascontiguousarray(weights.T))
        for weights in bootstrap_weights(len(values), groups, num_resamples, seed)
    ]
    drawn = np.concatenate(blocks) if blocks else curve[None]
    if not len(drawn):
        drawn = curve[None]
    tail = 0.5 * (1.0 - confidence)
    low, high = np.quantile(drawn, [tail, 1.0 - tail], axis=0)
    return CurveBand(_GRID, curve, low, high)


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if values.ndim != 1 or values.shape != truth.shape or not np.isfinite(values).all():
        raise ValueError(f"scores must be finite and like labels (N,), got {values.shape} and {truth.shape}")
    if truth.dtype != bool and not np.isin(truth, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(truth)[:5].tolist()}; set unknown labels aside first")
    return values, truth.astype(bool)


def _on_grid(on_grid: Callable[[Floats, Floats], Floats], ranked: RankedClass, weights: Floats) -> Floats:
    pairs = zip(*(counts.T for counts in ranked.counts(weights)), strict=True)
    curves = [on_grid(positive, negative) for positive, negative in pairs if positive[-1] and negative[-1]]
    return np.stack(curves) if curves else np.zeros((0, len(_GRID)))


def _roc_on_grid(positive: Floats, negative: Floats) -> Floats:
    """Sensitivity at each 1 − specificity of the grid, on straight lines between thresholds."""
    x = np.append(0.0, negative / negative[-1])
    y = np.append(0.0, positive / positive[-1])
    at = np.searchsorted(x, _GRID + _SLACK, side="right") - 1  # where the curve rises steeply: its upper end
    after = np.minimum(at + 1, len(x) - 1)
    run = x[after] - x[at]
    share = np.divide(_GRID - x[at], run, out=np.zeros_like(_GRID), where=run > 0)
    return y[at] + np.clip(share, 0.0, 1.0) * (y[after] - y[at])


def _precision_on_grid(positive: Floats, negative: Floats) -> Floats:
    """Precision at each recall of the grid: that of the first threshold reaching it."""
    steps = np.searchsorted(positive / positive[-1], np.maximum(_GRID - _SLACK, _SLACK), side="left")
    return positive[steps] / (positive[steps] + negative[steps])


def _gains(running: Floats) -> Floats:
    """What each step adds to a running sum."""
    gains = running.copy()
    gains[1:] -= running[:-1]
    return gains


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
