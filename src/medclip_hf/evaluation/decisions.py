"""Decisions on several findings: thresholds chosen elsewhere than where they are judged, and all figures at them.

Thresholds come from validation scores of other patients where there are any, else from the other patients of the tested
split, in five folds. A score that is not known (an uncertain label, an anatomy that does not occur) is NaN.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_hf.evaluation.classification import classification_figures

NUM_FOLDS = 5


@dataclass(frozen=True)
class ScoredFindings:
    """Scores and labels of K findings of N samples.

    Args:
        scores: (N, K) probabilities, NaN where score or label is not known.
        labels: (N, K) bool.
        patients: (N,) whose each is.
        finding_names: K names.
    """

    scores: NDArray[np.float64]
    labels: NDArray[np.bool_]
    patients: NDArray[Any]
    finding_names: tuple[str, ...]


def nearest_corner_threshold(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    """The threshold whose point lies nearest to the corner (0, 1) of the ROC plane; a score above it is positive.

    The same aim as fVLM's published rule, but among the midpoints between scores instead of 100 fixed values, since
    probabilities of a trained model may all lie within a hundredth. 0.5 where one class is missing.

    Args:
        scores: (N,), NaN where not known.
        labels: (N,).
    """
    known = ~np.isnan(scores)
    values, truth = scores[known], labels[known]
    if not truth.any() or truth.all():
        return 0.5
    levels = np.unique(values)
    candidates = np.concatenate([[levels[0] - 1e-12], 0.5 * (levels[1:] + levels[:-1]), levels[-1:]])
    ordered_positive, ordered_negative = np.sort(values[truth]), np.sort(values[~truth])
    sensitivity = 1.0 - np.searchsorted(ordered_positive, candidates, side="right") / len(ordered_positive)
    false_alarms = 1.0 - np.searchsorted(ordered_negative, candidates, side="right") / len(ordered_negative)
    return float(candidates[np.argmin(np.hypot(1.0 - sensitivity, false_alarms))])


def figures_with_chosen_thresholds(
    tested: ScoredFindings,
    validation: ScoredFindings | None = None,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """`classification_figures` as a dict, decisions at thresholds that the tested labels did not choose.

    Args:
        tested: what is judged.
        validation: to choose thresholds on; None: cross-fitted on the other patients.
        num_resamples: of the bootstrap by patient; 0: no intervals.
        confidence: of intervals.
        seed: of the bootstrap and of the folds.

    Returns:
        The figures, and "thresholds": how they were chosen and their values (means over folds).

    Raises:
        ValueError: validation and test share a patient, or their findings differ.
    """
    thresholds, how = _chosen_thresholds(tested, validation, seed)
    known = ~np.isnan(tested.scores)
    figures = classification_figures(
        np.where(known, tested.scores, 0.0),
        tested.labels,
        tested.finding_names,
        groups=tested.patients,
        known=known,
        thresholds=np.nextafter(thresholds, np.inf),  # a score above its threshold is positive
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )
    return {**figures.as_dict(), "thresholds": how}


def _chosen_thresholds(
    tested: ScoredFindings, validation: ScoredFindings | None, seed: int
) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """A threshold for each finding (K,) or for each score (N, K), and how they were chosen."""
    if validation is not None:
        shared = set(validation.patients.tolist()) & set(tested.patients.tolist())
        if shared or validation.finding_names != tested.finding_names:
            raise ValueError(
                f"validation and test share {len(shared)} patients; thresholds need other patients, and the same "
                "findings"
            )
        chosen = _per_finding(validation.scores, validation.labels)
        how = {
            "chosen_on": f"validation scores of {len(validation.scores)} rows",
            "values": dict(zip(tested.finding_names, chosen.tolist(), strict=True)),
        }
        return chosen, how
    patients, owner = np.unique(tested.patients, return_inverse=True)
    num_folds = min(NUM_FOLDS, len(patients))
    fold = np.random.default_rng(seed).permutation(len(patients))[owner] % max(num_folds, 1)
    thresholds = np.full(tested.scores.shape, 0.5)
    for number in range(num_folds if num_folds > 1 else 0):
        others = fold != number
        thresholds[~others] = _per_finding(tested.scores[others], tested.labels[others])
    means = dict(zip(tested.finding_names, thresholds.mean(axis=0).tolist(), strict=True))
    return thresholds, {"chosen_on": f"the other patients, {num_folds} folds", "means": means}


def _per_finding(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> NDArray[np.float64]:
    return np.array([nearest_corner_threshold(scores[:, k], labels[:, k]) for k in range(scores.shape[1])])
