"""Do probabilities mean what they say: calibration error, reliability curves, temperature scaling.

The expected calibration error is Σ over bins of |mean probability − share of positives| · share of samples, on bins of
equal width (Naeini et al. 2015; Guo et al. 2017). It depends on the bins and is biased upwards on small samples: state
both beside it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_array
from scipy.special import log_expit, logsumexp

from medclip_hf.evaluation.intervals import Floats, bootstrap_weights, group_index, percentile_interval

_SUM_TOLERANCE = 1e-2  # of the probabilities of one sample, which bf16 rounds to three digits
_MAX_LOG_TEMPERATURE = 7.0  # e⁷ ≈ 1100: beyond it logits say nothing, below e⁻⁷ they are decisions


class BinnedGaps:
    """Probability minus outcome of each sample, by the bin of its probability.

    Args:
        probabilities: (N,), in [0, 1].
        outcomes: (N,) bool.
        num_bins: of equal width.
        weights: (N,), 0 for samples that do not count; None: 1.
    """

    def __init__(
        self, probabilities: Floats, outcomes: NDArray[np.bool_], num_bins: int, weights: Floats | None = None
    ) -> None:
        num_samples = len(probabilities)
        gaps = (probabilities - outcomes) * (1.0 if weights is None else weights)
        places = (bin_of(probabilities, num_bins), np.arange(num_samples))
        self._by_bin = csr_array((gaps, places), shape=(num_bins, num_samples))

    def total(self, weights: Floats) -> Floats:
        """Σ over bins of |Σ weight · gap|, (R,), of weightings (N, R): the calibration error times Σ weight."""
        return np.abs(self._by_bin @ weights).sum(axis=0)


@dataclass(frozen=True)
class ReliabilityCurve:
    """What was said and what came true, by bin; bins without samples are left out.

    Args:
        predicted: (B,) mean probability.
        observed: (B,) share of positives.
        count: (B,) samples.
        low, high: (B,) bootstrap percentiles of `observed`; equal to it without resamples.
    """

    predicted: Floats
    observed: Floats
    count: NDArray[np.int64]
    low: Floats
    high: Floats


def expected_calibration_error(probabilities: ArrayLike, outcomes: ArrayLike, *, num_bins: int = 15) -> float:
    """Mean gap between probability and frequency, in [0, 1]; formula in the head of this file.

    Args:
        probabilities: (N,), in [0, 1]: of the finding, or of the class that was chosen.
        outcomes: (N,) bool: whether it was there, or the choice right.
        num_bins: of equal width.

    Raises:
        ValueError: shapes that differ, nothing to measure, values outside [0, 1], outcomes other than 0 and 1.
    """
    values, truth = _checked(probabilities, outcomes, num_bins)
    return float(BinnedGaps(values, truth, num_bins).total(np.ones((len(values), 1)))[0] / len(values))


def brier_score(probabilities: ArrayLike, outcomes: ArrayLike) -> float:
    """Mean squared difference between probability and outcome, in [0, 1]; arguments and errors as above."""
    values, truth = _checked(probabilities, outcomes, 1)
    return float(np.mean((values - truth) ** 2))


def reliability_curve(
    probabilities: ArrayLike,
    outcomes: ArrayLike,
    *,
    num_bins: int = 10,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ReliabilityCurve:
    """Mean probability and share of positives of every bin that holds samples, with intervals by patient.

    Arguments and errors as in `expected_calibration_error` and `intervals.mean_with_interval`.
    """
    values, truth = _checked(probabilities, outcomes, num_bins)
    bins = bin_of(values, num_bins)
    count = np.bincount(bins, minlength=num_bins)
    held = np.flatnonzero(count)
    observed = np.bincount(bins, weights=truth, minlength=num_bins)[held] / count[held]
    group_of = group_index(groups, len(values))
    # Samples and positives of each bin by group: a patient may hold many samples, and is drawn with all of them.
    held_by, positive_by = (
        csr_array((side.astype(np.float64), (bins, group_of)), shape=(num_bins, int(group_of.max()) + 1))[held]
        for side in (np.ones_like(truth), truth)
    )
    drawn = [np.zeros((0, len(held)))]
    for weights in bootstrap_weights(held_by.shape[1], None, num_resamples, seed):
        by_group = np.ascontiguousarray(weights.T)
        total, positive = held_by @ by_group, positive_by @ by_group
        drawn.append(np.divide(positive, total, out=np.full_like(total, np.nan), where=total > 0).T)
    resampled = np.concatenate(drawn)
    intervals = [percentile_interval(float(value), resampled[:, k], confidence) for k, value in enumerate(observed)]
    return ReliabilityCurve(
        predicted=np.bincount(bins, weights=values, minlength=num_bins)[held] / count[held],
        observed=observed,
        count=count[held],
        low=np.array([value.low if value.low is not None else value.value for value in intervals], dtype=np.float64),
        high=np.array([value.high if value.high is not None else value.value for value in intervals], dtype=np.float64),
    )


def fit_temperature(logits: ArrayLike, labels: ArrayLike) -> float:
    """The temperature T > 0 with the least log loss of softmax(logits / T), or sigmoid: to be fitted on validation.

    The loss is convex in 1 / T. The order of the scores, and so AUROC and accuracy, stay as they are (Guo et al. 2017).

    Args:
        logits: (N, K), finite.
        labels: (N,) integers: softmax over the classes; or (N, K) bool or 0 and 1: a sigmoid for each finding.

    Raises:
        ValueError: shapes or labels that do not fit; logits that are not finite; logits that no temperature improves
            (all right, all wrong or all equal), where the best one is infinite or 0.
    """
    values, truth = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if values.ndim != 2 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"logits must be finite and of shape (N, K), got shape {values.shape}")
    is_single = truth.shape == values.shape[:1] and np.issubdtype(truth.dtype, np.integer)
    if is_single and not ((truth >= 0) & (truth < values.shape[1])).all():
        raise ValueError(f"labels must lie in 0 to {values.shape[1] - 1}, got {truth.min()} to {truth.max()}")
    if not is_single and (truth.shape != values.shape or not np.isin(truth, (0, 1)).all()):
        raise ValueError(f"labels must be (N,) integers or {values.shape} of 0 and 1, got {truth.dtype} {truth.shape}")

    def loss(log_temperature: float) -> float:
        scaled = values * np.exp(-log_temperature)
        if is_single:
            return float(np.mean(logsumexp(scaled, axis=1) - scaled[np.arange(len(scaled)), truth]))
        return float(-np.mean(log_expit(np.where(truth.astype(bool), scaled, -scaled))))

    bound = _MAX_LOG_TEMPERATURE
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-8})
    if found.fun > min(loss(-bound), loss(bound)) - 1e-9:
        raise ValueError("no temperature calibrates these logits: they are all right, all wrong or say nothing.")
    return float(np.exp(found.x))


def are_probabilities(scores: Floats, *, sum_to_one: bool) -> bool:
    """Whether values lie in [0, 1] and, where asked for, each row sums to 1 within what bf16 rounds."""
    if not len(scores) or scores.min() < 0.0 or scores.max() > 1.0:
        return False
    return not sum_to_one or bool((np.abs(scores.sum(axis=1) - 1.0) <= _SUM_TOLERANCE).all())


def bin_of(probabilities: Floats, num_bins: int) -> NDArray[np.int64]:
    """The bin (N,) of each probability: [0, 1/B), …, [(B − 1)/B, 1]."""
    return np.minimum((probabilities * num_bins).astype(np.int64), num_bins - 1)


def _checked(probabilities: ArrayLike, outcomes: ArrayLike, num_bins: int) -> tuple[Floats, NDArray[np.bool_]]:
    values, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(outcomes)
    if values.ndim != 1 or values.shape != truth.shape or not len(values):
        raise ValueError(f"probabilities and outcomes must both be (N,), N > 0, got {values.shape} and {truth.shape}")
    if not ((values >= 0.0) & (values <= 1.0)).all():
        raise ValueError(
            f"probabilities must lie in [0, 1], but {int((~((values >= 0) & (values <= 1))).sum())} do not"
        )
    if truth.dtype != bool and not np.isin(truth, (0, 1)).all():
        raise ValueError(f"outcomes must be 0 or 1, got {np.unique(truth)[:5].tolist()}")
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, got {num_bins}")
    return values, truth.astype(bool)
