"""Figures of a classifier as functions of weighted samples: what point estimates, bootstraps and comparisons share."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from medclip_hf.evaluation.calibration import BinnedGaps, are_probabilities
from medclip_hf.evaluation.curves import RankedClass, area_under_roc, average_precision, sensitivity_at_specificity
from medclip_hf.evaluation.intervals import Floats, bootstrap_weights

Bools = NDArray[np.bool_]
Figures = dict[str, Floats]
Kind = Literal["single-label", "multi-label"]

OF_DECISIONS = ("accuracy", "balanced_accuracy", "sensitivity", "specificity", "precision", "f1")
OF_PROBABILITIES = ("brier", "ece")
_MEANS_OF_DECISIONS = ("f1_macro", "f1_micro")


@dataclass(frozen=True)
class WeightedFigures:
    """Figures of R weightings of the samples; NaN where a weighting leaves one undefined.

    Args:
        overall: name to (R,).
        per_class: name to (R, classes that have figures).
    """

    overall: Figures
    per_class: Figures


class ClassifiedSamples:
    """Scores and labels of a test set, checked and sorted once, so that a weighting of the samples is cheap.

    Arguments and errors as in `classification.classification_figures`; and `wanted`, names of the overall figures that
    are computed at least, None for all.
    """

    def __init__(
        self,
        scores: ArrayLike,
        labels: ArrayLike,
        class_names: Sequence[str],
        *,
        known: ArrayLike | None = None,
        thresholds: ArrayLike | None = None,
        specificity: float = 0.9,
        num_bins: int = 15,
        wanted: Collection[str] | None = None,
    ) -> None:
        if not 0.0 < specificity <= 1.0:
            raise ValueError(f"specificity must lie in (0, 1], got {specificity}")
        self.class_names = [str(name) for name in class_names]
        self.kind: Kind = "single-label" if np.ndim(labels) == 1 else "multi-label"
        self.scores = _checked_scores(scores, self.class_names)
        self.truth = _checked_truth(labels, self.scores.shape)
        self.known = self._checked_known(known)
        self.thresholds, self.left_out = self._checked_thresholds(thresholds)
        self.undefined = self._undefined_classes()
        self.defined = [k for k, name in enumerate(self.class_names) if name not in self.undefined]

        def is_wanted(*names: str) -> bool:
            return wanted is None or not set(names).isdisjoint(wanted)

        self._parts: list[_Ranking | _Decisions | _Findings | _Distributions] = [
            _Ranking(self, specificity, tuple(name for name in _Ranking.NAMES if is_wanted(name)))
        ]
        has_decisions = self.thresholds is not None or self.kind == "single-label"
        if has_decisions and is_wanted(*OF_DECISIONS, *_MEANS_OF_DECISIONS):
            self._parts.append(_Decisions(self))
        if is_wanted(*OF_PROBABILITIES) and not self.left_out.keys() & set(OF_PROBABILITIES):
            self._parts.append((_Distributions if self.kind == "single-label" else _Findings)(self, num_bins))

    def point(self) -> WeightedFigures:
        """The figures of the samples as they are: R = 1."""
        return self.figures(np.ones((1, len(self.scores))))

    def resampled(self, groups: ArrayLike | None, num_resamples: int, seed: int) -> WeightedFigures:
        """The figures of bootstrap resamples, whole groups being drawn."""
        blocks = [self.figures(weights) for weights in bootstrap_weights(len(self.scores), groups, num_resamples, seed)]
        blocks = blocks or [self.figures(np.zeros((0, len(self.scores))))]
        return WeightedFigures(
            {name: np.concatenate([block.overall[name] for block in blocks]) for name in blocks[0].overall},
            {name: np.concatenate([block.per_class[name] for block in blocks]) for name in blocks[0].per_class},
        )

    def figures(self, weights: Floats) -> WeightedFigures:
        """The figures of weightings (R, N) of the samples."""
        overall: Figures = {}
        per_class: Figures = {}
        by_sample = np.ascontiguousarray(weights.T)
        for part in self._parts:
            of_all, of_classes = part.figures(weights, by_sample)
            overall |= of_all
            per_class |= of_classes
        return WeightedFigures(overall, per_class)

    def _checked_known(self, known: ArrayLike | None) -> Bools:
        is_known = np.ones(self.scores.shape, bool) if known is None else np.asarray(known)
        if is_known.shape != self.scores.shape or is_known.dtype != bool:
            raise ValueError(
                f"known must be bool of the scores' shape {self.scores.shape}, got {is_known.dtype} {is_known.shape}"
            )
        if self.kind == "single-label" and not is_known.all():
            raise ValueError("known is for several findings per sample: leave samples of unknown class out instead")
        bad = int((~np.isfinite(self.scores) & is_known).sum())
        if bad:
            raise ValueError(f"scores must be finite, but {bad} of {self.scores.size} are not: mark them not known")
        return is_known

    def _checked_thresholds(self, thresholds: ArrayLike | None) -> tuple[Floats | None, dict[str, str]]:
        """Thresholds (K,) or (N, K) or None, and the figures that cannot be computed with the reason."""
        is_single = self.kind == "single-label"
        if is_single and thresholds is not None:
            raise ValueError("thresholds are for several findings per sample; one class each is the highest score")
        left_out: dict[str, str] = {}
        is_probability = are_probabilities(self.scores if is_single else self.scores[self.known], sum_to_one=is_single)
        if not is_probability:
            reason = "scores are not probabilities" + (" that sum to 1" if is_single else " in [0, 1]")
            left_out |= dict.fromkeys(OF_PROBABILITIES, reason)
            if thresholds is None and not is_single:
                left_out |= dict.fromkeys(
                    OF_DECISIONS, "scores are not probabilities in [0, 1] and no thresholds were given"
                )
        if is_single or (thresholds is None and not is_probability):
            return None, left_out
        values = np.asarray(0.5 if thresholds is None else thresholds, dtype=np.float64)
        if values.shape not in ((), (len(self.class_names),), self.scores.shape) or np.isnan(values).any():
            raise ValueError(
                f"expected one threshold, one for each of {len(self.class_names)} classes or one for each score, got "
                f"{values}"
            )
        return (np.full(len(self.class_names), values) if values.ndim == 0 else values), left_out

    def _undefined_classes(self) -> dict[str, str]:
        positive = (self.truth & self.known).sum(axis=0)
        negative = (~self.truth & self.known).sum(axis=0)
        return {
            name: "no positive sample" if not positive[k] else "no negative sample"
            for k, name in enumerate(self.class_names)
            if not positive[k] or not negative[k]
        }


class _Ranking:
    """AUROC, AUPRC and sensitivity at a specificity: each class against the rest."""

    NAMES = ("auroc", "auprc", "sensitivity_at_specificity")

    def __init__(self, samples: ClassifiedSamples, specificity: float, names: tuple[str, ...]) -> None:
        self.names = names
        self.specificity = specificity
        self.ranked = [
            RankedClass(samples.scores[:, k], samples.truth[:, k], samples.known[:, k]) for k in samples.defined
        ]

    def figures(self, weights: Floats, by_sample: Floats) -> tuple[Figures, Figures]:
        per_class = {name: np.empty((len(weights), len(self.ranked))) for name in self.names}
        for column, ranked in enumerate(self.ranked if self.names else ()):
            positive, negative = ranked.counts(by_sample)
            for name, values in per_class.items():
                values[:, column] = self._of_curve(name, positive, negative)
        return {name: _mean(values) for name, values in per_class.items()}, per_class

    def _of_curve(self, name: str, positive: Floats, negative: Floats) -> Floats:
        if name == "sensitivity_at_specificity":
            return sensitivity_at_specificity(positive, negative, self.specificity)
        return area_under_roc(positive, negative) if name == "auroc" else average_precision(positive, negative)


class _Decisions:
    """What follows from who was called what: the highest score, or each finding's threshold."""

    def __init__(self, samples: ClassifiedSamples) -> None:
        if samples.kind == "single-label":
            chosen = np.arange(len(samples.class_names)) == samples.scores.argmax(axis=1)[:, None]
        else:
            assert samples.thresholds is not None  # else the part is left out
            with np.errstate(invalid="ignore"):
                chosen = samples.scores >= samples.thresholds
        truth, known = samples.truth[:, samples.defined], samples.known[:, samples.defined]
        self.is_single = samples.kind == "single-label"
        self.right = (chosen & samples.truth).any(axis=1).astype(np.float64)
        chosen = chosen[:, samples.defined]
        self.true_positive = (chosen & truth & known).astype(np.float64)
        self.called = (chosen & known).astype(np.float64)
        self.positive = (truth & known).astype(np.float64)
        self.known = known.astype(np.float64)

    def figures(self, weights: Floats, _: Floats) -> tuple[Figures, Figures]:
        true_positive, called, positive = weights @ self.true_positive, weights @ self.called, weights @ self.positive
        total = weights @ self.known
        true_negative = total - called - positive + true_positive
        sensitivity = _ratio(true_positive, positive)
        specificity = _ratio(true_negative, total - positive)
        defined = np.where((positive > 0) & (positive < total), 1.0, np.nan)
        per_class = {
            "sensitivity": sensitivity,
            "specificity": specificity,
            "precision": _ratio(true_positive, called),
            "f1": _ratio(2.0 * true_positive, called + positive) * defined,
        }
        if not self.is_single:
            per_class["accuracy"] = _ratio(true_positive + true_negative, total)
            per_class["balanced_accuracy"] = 0.5 * (sensitivity + specificity)
        overall = {name: _mean(values) for name, values in per_class.items() if name != "f1"}
        overall["f1_macro"] = _mean(per_class["f1"])
        overall["f1_micro"] = _ratio(2.0 * true_positive.sum(axis=1), (called + positive).sum(axis=1))
        if self.is_single:
            overall["accuracy"] = _ratio(weights @ self.right, weights.sum(axis=1))
            overall["balanced_accuracy"] = overall["sensitivity"]
        return overall, per_class


class _Findings:
    """Brier score and calibration error of each finding's probability, and their means."""

    def __init__(self, samples: ClassifiedSamples, num_bins: int) -> None:
        known = samples.known[:, samples.defined]
        values = np.where(known, samples.scores[:, samples.defined], 0.0)
        truth = samples.truth[:, samples.defined] & known
        self.squared = (values - truth) ** 2
        self.known = known.astype(np.float64)
        self.gaps = [
            BinnedGaps(values[:, k], truth[:, k], num_bins, weights=self.known[:, k])
            for k in range(len(samples.defined))
        ]

    def figures(self, weights: Floats, by_sample: Floats) -> tuple[Figures, Figures]:
        total = weights @ self.known
        gaps = [gaps.total(by_sample) for gaps in self.gaps]
        per_class = {
            "brier": _ratio(weights @ self.squared, total),
            "ece": _ratio(np.stack(gaps, axis=1) if gaps else np.zeros_like(total), total),
        }
        return {name: _mean(values) for name, values in per_class.items()}, per_class


class _Distributions:
    """Brier score over all classes and calibration error of the class that was chosen."""

    def __init__(self, samples: ClassifiedSamples, num_bins: int) -> None:
        rows = np.arange(len(samples.scores))
        chosen = samples.scores.argmax(axis=1)
        self.squared = ((samples.scores - samples.truth) ** 2).sum(axis=1)
        self.gaps = BinnedGaps(samples.scores[rows, chosen], samples.truth[rows, chosen], num_bins)

    def figures(self, weights: Floats, by_sample: Floats) -> tuple[Figures, Figures]:
        total = weights.sum(axis=1)
        return {
            "brier": _ratio(weights @ self.squared, total),
            "ece": _ratio(self.gaps.total(by_sample), total),
        }, {}


def _checked_scores(scores: ArrayLike, class_names: Sequence[str]) -> Floats:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"scores must be (samples, classes) with at least one sample, got shape {values.shape}")
    if len(class_names) != values.shape[1] or len(set(class_names)) != len(class_names):
        raise ValueError(f"expected {values.shape[1]} different class names, one per column, got {list(class_names)}")
    return values


def _checked_truth(labels: ArrayLike, shape: tuple[int, ...]) -> Bools:
    truth = np.asarray(labels)
    num_samples, num_classes = shape
    if truth.ndim == 1:
        if truth.shape != (num_samples,) or not np.issubdtype(truth.dtype, np.integer):
            raise ValueError(
                f"labels of one class per sample must be {num_samples} integers, got {truth.dtype} {truth.shape}; "
                "yes or no for one finding is (N, 1)"
            )
        outside = np.flatnonzero((truth < 0) | (truth >= num_classes))
        if len(outside):
            raise ValueError(
                f"labels must lie in 0 to {num_classes - 1}, but {len(outside)} do not, the first in row {outside[0]}: "
                f"{truth[outside[0]]}"
            )
        return np.asarray(truth[:, None] == np.arange(num_classes))
    if truth.shape != shape:
        raise ValueError(f"labels must be (N,) integers or of the scores' shape {shape}, got {truth.shape}")
    if truth.dtype != bool and not np.isin(truth, (0, 1)).all():
        raise ValueError(
            f"labels must be 0 or 1, got {np.unique(truth)[:5].tolist()}; mark unknown ones in `known` and set them 0"
        )
    return truth.astype(bool)


def _mean(values: Floats) -> Floats:
    """Means (R,) over classes (R, K): NaN where one of them is, or where there is none."""
    return values.mean(axis=1) if values.shape[1] else np.full(len(values), np.nan)


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.full(above.shape, np.nan), where=below > 0)
