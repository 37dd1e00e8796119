"""Two models on the same test set: paired differences with p-values, DeLong's test, Holm's correction."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, rankdata

from medclip_hf.evaluation.intervals import Floats, Interval, group_index, percentile_interval, resampled_means
from medclip_hf.evaluation.weighted_figures import ClassifiedSamples


@dataclass(frozen=True)
class PairedDifference:
    """A figure of two models and what lies between them.

    Args:
        first, second: the figure of each; None where it is undefined.
        difference: second − first, with its interval.
        p_value: two-sided, of "there is no difference"; None where it is undefined or nothing was resampled.
    """

    first: float | None
    second: float | None
    difference: Interval
    p_value: float | None

    def as_dict(self) -> dict[str, object]:
        """The fields, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class DeLong:
    """DeLong's test of two areas under the ROC curve.

    Args:
        first, second: the areas.
        difference: second − first, with its normal interval.
        standard_error: of the difference.
        z: difference over standard error; None where that is 0.
        p_value: two-sided.
    """

    first: float
    second: float
    difference: Interval
    standard_error: float
    z: float | None
    p_value: float

    def as_dict(self) -> dict[str, object]:
        """The fields, ready for JSON."""
        return asdict(self)


def paired_differences(
    first_scores: ArrayLike,
    second_scores: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    known: ArrayLike | None = None,
    thresholds: ArrayLike | None = None,
    specificity: float = 0.9,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, PairedDifference]:
    """Second model minus first, for every overall figure that both have; both are resampled together.

    The p-value inverts the percentile interval: twice the smaller share of resamples on one side of 0, counted with
    one more (Davison and Hinkley 1997), so it is never below 2 / (num_resamples + 1).

    Arguments and errors as in `classification.classification_figures`; scores (N, K) of each model.
    """
    first, second = (
        resampled_figures(
            ClassifiedSamples(scores, labels, class_names, known=known, thresholds=thresholds, specificity=specificity),
            groups,
            num_resamples,
            seed,
        )
        for scores in (first_scores, second_scores)
    )
    return differences_of(first, second, confidence)


@dataclass(frozen=True)
class ResampledFigures:
    """Overall figures of a model by name.

    Args:
        point: (1,) of the samples as they are.
        drawn: (R,) of the resamples.
    """

    point: Mapping[str, Floats]
    drawn: Mapping[str, Floats]


def resampled_figures(
    samples: ClassifiedSamples, groups: ArrayLike | None, num_resamples: int, seed: int
) -> ResampledFigures:
    """A model's part of `paired_differences`: of several models each is resampled once, however many pairs they form.

    Args:
        samples: scores of the model.
        groups: (N,) patient of each sample.
        num_resamples: as there.
        seed: as there; the same for all models.
    """
    return ResampledFigures(samples.point().overall, samples.resampled(groups, num_resamples, seed).overall)


def differences_of(
    first: ResampledFigures, second: ResampledFigures, confidence: float = 0.95
) -> dict[str, PairedDifference]:
    """What `paired_differences` gives, of models that were resampled alike."""
    return {
        name: _paired(value[0], second.point[name][0], second.drawn[name] - first.drawn[name], confidence)
        for name, value in first.point.items()
        if name in second.point
    }


def paired_difference(
    first_scores: ArrayLike,
    second_scores: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    *,
    figure: str = "auroc",
    groups: ArrayLike | None = None,
    known: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """One of `paired_differences`, by name.

    Raises:
        ValueError: as there, and a figure that is not one of both.
    """
    differences = paired_differences(
        first_scores,
        second_scores,
        labels,
        class_names,
        groups=groups,
        known=known,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )
    if figure not in differences:
        raise ValueError(f"there is no figure {figure!r} of both models, but {', '.join(differences)}")
    return differences[figure]


def paired_mean_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedDifference:
    """Second mean minus first of one figure per sample (a hit, an overlap, a recall), sample by sample.

    Args:
        first: (N,), finite, N > 0.
        second: (N,) of the same samples.
        groups: (N,) patient of each sample; None: every sample is its own.
        num_resamples: 0: neither interval nor p-value.
        confidence: share of resamples inside the interval.
        seed: of the resampling.

    Raises:
        ValueError: values that differ in shape or are not finite.
    """
    before, after = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if before.ndim != 1 or before.shape != after.shape or not len(before):
        raise ValueError(f"expected two figures of the same samples (N,), got shapes {before.shape} and {after.shape}")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("the figures of the samples must be finite: leave undefined ones out of both")
    gains = after - before
    blocks = [means[:, 0] for means in resampled_means(gains[:, None], groups, num_resamples, seed)]
    return _paired(before.mean(), after.mean(), np.concatenate([np.zeros(0), *blocks]), confidence)


def delong_test(
    first_scores: ArrayLike,
    second_scores: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    confidence: float = 0.95,
) -> DeLong:
    """Whether two areas under the ROC curve of the same samples differ (DeLong, DeLong and Clarke-Pearson 1988).

    The structural components are read from midranks in O(N log N) (Sun and Xu 2014). With several samples of a patient
    the components are summed by patient first (Obuchowski 1997); without, samples must be independent.

    Args:
        first_scores: (N,), finite.
        second_scores: (N,) of the same samples.
        labels: (N,) bool or 0 and 1.
        groups: (N,) patient of each sample; None: every sample is its own.
        confidence: of the interval of the difference.

    Raises:
        ValueError: shapes that differ, scores that are not finite, other labels, fewer than two patients with a
            positive or with a negative.
    """
    truth = np.asarray(labels)
    scores = np.stack([np.asarray(one, dtype=np.float64) for one in (first_scores, second_scores)])
    if scores.ndim != 2 or truth.shape != scores.shape[1:] or not np.isfinite(scores).all():
        raise ValueError(f"scores must be finite and like labels (N,), got {scores.shape[1:]} and {truth.shape}")
    if truth.dtype != bool and not np.isin(truth, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {np.unique(truth)[:5].tolist()}; set unknown labels aside first")
    areas, covariance = _areas_and_covariance(scores, truth.astype(bool), groups)
    difference = float(areas[1] - areas[0])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2.0 * covariance[0, 1])
    error = float(np.sqrt(max(variance, 0.0)))
    z = difference / error if error > 0 else None
    reach = float(norm.ppf(0.5 + 0.5 * confidence)) * error
    return DeLong(
        first=float(areas[0]),
        second=float(areas[1]),
        difference=Interval(difference, difference - reach, difference + reach),
        standard_error=error,
        z=z,
        p_value=float(difference == 0) if z is None else float(2.0 * norm.sf(abs(z))),
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for their number, in the order given: the chance of one false alarm or more stays below each.

    The i-th smallest of m is multiplied by m − i + 1, never falls below a smaller one's, and ends at 1 (Holm 1979).

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    bad = {name: value for name, value in p_values.items() if not 0.0 <= value <= 1.0}
    if bad:
        raise ValueError(f"p-values must lie in [0, 1], got {bad}")
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def _paired(first: float, second: float, drawn: Floats, confidence: float) -> PairedDifference:
    kept = drawn[~np.isnan(drawn)]
    is_defined = not (np.isnan(first) or np.isnan(second))
    p_value = None
    if is_defined and len(kept):
        one_side = min((kept <= 0.0).sum(), (kept >= 0.0).sum())
        p_value = float(min(1.0, 2.0 * (1 + one_side) / (1 + len(kept))))
    return PairedDifference(
        first=None if np.isnan(first) else float(first),
        second=None if np.isnan(second) else float(second),
        difference=percentile_interval(float(second - first) if is_defined else None, drawn, confidence),
        p_value=p_value,
    )


def _areas_and_covariance(
    scores: Floats, is_positive: NDArray[np.bool_], groups: ArrayLike | None
) -> tuple[Floats, Floats]:
    """Areas (M,) of M models and their covariance (M, M)."""
    components, areas = _structural_components(scores, is_positive)
    group_of = group_index(groups, len(is_positive))
    sums = np.zeros((2, len(areas), int(group_of.max()) + 1))  # Σ of (component − area) by side, model and patient
    num_holding = []
    for side, rows in enumerate((is_positive, ~is_positive)):
        num_holding.append(len(np.unique(group_of[rows])))
        if num_holding[-1] < 2:
            raise ValueError("DeLong's test needs two patients with a positive sample and two with a negative one")
        for model in range(len(areas)):
            sums[side, model] = np.bincount(
                group_of[rows], components[model, rows] - areas[model], minlength=sums.shape[2]
            )
    num_groups = sums.shape[2]
    counts = (int(is_positive.sum()), int((~is_positive).sum()))
    covariance = np.zeros((len(areas), len(areas)))
    for side in (0, 1):
        factor = num_holding[side] / (num_holding[side] - 1)
        covariance += factor * (sums[side] @ sums[side].T) / counts[side] ** 2
    cross = sums[0] @ sums[1].T * (num_groups / (num_groups - 1)) / (counts[0] * counts[1])
    return areas, covariance + cross + cross.T


def _structural_components(scores: Floats, is_positive: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Share of the other side that each sample is ranked right against, (M, N), ties one half; and their means (M,)."""
    num_positive, num_negative = int(is_positive.sum()), int((~is_positive).sum())
    if num_positive < 2 or num_negative < 2:
        raise ValueError(f"DeLong's test needs two samples of each side, got {num_positive} and {num_negative}")
    components = np.empty_like(scores)
    for model, values in enumerate(scores):
        ranks = rankdata(values)
        positive, negative = values[is_positive], values[~is_positive]
        components[model, is_positive] = (ranks[is_positive] - rankdata(positive)) / num_negative
        components[model, ~is_positive] = 1.0 - (ranks[~is_positive] - rankdata(negative)) / num_positive
    return components, components[:, is_positive].mean(axis=1)
