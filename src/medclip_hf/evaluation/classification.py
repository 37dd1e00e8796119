"""All figures of one classifier on one test set, each with its bootstrap interval by patient.

Two kinds of labels: one class per sample, (N,) integers; or several findings per sample, (N, K) bool. A figure is a
function of weighted samples, the point estimate being the one with weights 1, so value and interval come from the same
code. A class without positives or without negatives has no figures: it is named, and left out of every mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from medclip_hf.evaluation.intervals import Floats, Interval, group_index, percentile_interval
from medclip_hf.evaluation.weighted_figures import ClassifiedSamples


@dataclass(frozen=True)
class ClassificationFigures:
    """The figures of one classifier on one test set.

    Args:
        kind: "single-label" or "multi-label".
        overall: figure name to interval: means over the classes (macro) unless the name says micro.
        per_class: class name to its figures; a class of `undefined` has none.
        undefined: class name to the reason why it has no figures.
        left_out: figure name to the reason why it was not computed.
        num_positive: samples of each class.
        num_samples: rows.
        num_groups: patients.
        settings: of the bootstrap and of the decisions, to print beside the figures.
    """

    kind: Literal["single-label", "multi-label"]
    overall: dict[str, Interval]
    per_class: dict[str, dict[str, Interval]]
    undefined: dict[str, str]
    left_out: dict[str, str]
    num_positive: dict[str, int]
    num_samples: int
    num_groups: int
    settings: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("overall", "per_class")},
            "overall": {name: interval.as_dict() for name, interval in self.overall.items()},
            "per_class": {
                name: {figure: interval.as_dict() for figure, interval in figures.items()}
                for name, figures in self.per_class.items()
            },
        }


def classification_figures(
    scores: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    known: ArrayLike | None = None,
    thresholds: ArrayLike | None = None,
    specificity: float = 0.9,
    num_bins: int = 15,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> ClassificationFigures:
    """Every figure of a classifier with its interval.

    From the ranking: AUROC, AUPRC (average precision), the highest sensitivity at no less than `specificity` (its
    threshold is chosen on these very labels; for an honest one choose `thresholds` on validation). From decisions:
    accuracy, balanced accuracy, sensitivity, specificity, precision and F1, macro and micro. From probabilities: Brier
    score and expected calibration error. With one class per sample the decision is the highest score, accuracy is the
    share of right decisions, balanced accuracy the mean sensitivity, ECE that of the chosen class, Brier the sum over
    classes; with several findings each is decided by its threshold, and overall figures are means over findings.

    All figures and classes share the same resamples. A resample that leaves a class empty is left out of that class's
    interval and of the means, and counted.

    Args:
        scores: (N, K), finite where known; the higher, the more likely.
        labels: (N,) integers below K, or (N, K) bool or 0 and 1.
        class_names: K names.
        groups: (N,) patient of each sample; None: every sample is its own.
        known: (N, K) bool, multi-label alone: labels and scores that count (an uncertain label, an anatomy that does
            not occur); None: all.
        thresholds: one for all findings, K of them or (N, K), multi-label alone: a score that reaches its threshold is
            positive; None: 0.5 if scores are probabilities, else figures of decisions are left out.
        specificity: of "sensitivity_at_specificity", in (0, 1].
        num_bins: of the calibration error.
        num_resamples: 0: no intervals.
        confidence: share of resamples inside an interval.
        seed: of the resampling.

    Raises:
        ValueError: shapes, names or groups that do not fit, scores that are not finite, labels out of range.
    """
    samples = ClassifiedSamples(
        scores,
        labels,
        class_names,
        known=known,
        thresholds=thresholds,
        specificity=specificity,
        num_bins=num_bins,
    )
    point = samples.point()
    drawn = samples.resampled(groups, num_resamples, seed)
    return ClassificationFigures(
        kind=samples.kind,
        overall={name: _interval(value[0], drawn.overall[name], confidence) for name, value in point.overall.items()},
        per_class={
            samples.class_names[k]: {
                name: _interval(values[0, column], drawn.per_class[name][:, column], confidence)
                for name, values in point.per_class.items()
            }
            for column, k in enumerate(samples.defined)
        },
        undefined=samples.undefined,
        left_out=samples.left_out,
        num_positive=dict(zip(samples.class_names, (samples.truth & samples.known).sum(axis=0).tolist(), strict=True)),
        num_samples=len(samples.scores),
        num_groups=int(group_index(groups, len(samples.scores)).max()) + 1,
        settings={
            "num_resamples": num_resamples,
            "confidence": confidence,
            "seed": seed,
            "specificity": specificity,
            "num_bins": num_bins,
            "thresholds": _listed(samples.thresholds),
        },
    )


def _listed(thresholds: Floats | None) -> list[float | str] | str | None:
    """Thresholds for JSON, which has no infinity ("never" and "always")."""
    if thresholds is None:
        return None
    if thresholds.ndim == 2:
        return "one for each score"
    return [float(value) if np.isfinite(value) else str(value) for value in thresholds]


def _interval(value: float, drawn: Floats, confidence: float) -> Interval:
    return percentile_interval(None if np.isnan(value) else float(value), drawn, confidence)
