"""Thresholds that the judged labels did not choose, and the figures of decisions at them."""

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_curve

from medclip_hf.evaluation.decisions import ScoredFindings, figures_with_chosen_thresholds, nearest_corner_threshold

NAMES = ("cyst", "mass")


def findings(seed, shift=0.0, word="test"):
    rng = np.random.default_rng(seed)
    labels = rng.random((200, 2)) < 0.3
    scores = 0.01 * (labels + rng.normal(size=labels.shape)) + 0.2 + shift
    return ScoredFindings(scores, labels, np.array([f"{word} {k // 2}" for k in range(200)]), NAMES)


def test_the_corner_is_found_among_scikit_learn_s_thresholds():
    rng = np.random.default_rng(0)
    values, truth = rng.random(50), rng.random(50) < 0.5
    false_alarms, sensitivity, _ = roc_curve(truth, values)
    positive = values > nearest_corner_threshold(values, truth)
    distance = np.hypot(1 - positive[truth].mean(), positive[~truth].mean())
    assert distance == pytest.approx(np.hypot(1 - sensitivity, false_alarms).min())
    assert nearest_corner_threshold(values, np.ones(50, bool)) == 0.5


def test_decisions_at_thresholds_of_validation_equal_scikit_learn_s():
    tested, validation = findings(0), findings(1, word="validation")
    figures = figures_with_chosen_thresholds(tested, validation, num_resamples=0)
    thresholds = [figures["thresholds"]["values"][name] for name in NAMES]
    assert figures["settings"]["thresholds"] == pytest.approx(thresholds)
    decided = tested.scores > thresholds
    for name, expected in (
        ("balanced_accuracy", np.mean([balanced_accuracy_score(tested.labels[:, k], decided[:, k]) for k in (0, 1)])),
        ("f1_macro", np.mean([f1_score(tested.labels[:, k], decided[:, k]) for k in (0, 1)])),
        ("f1_micro", f1_score(tested.labels, decided, average="micro")),
    ):
        assert figures["overall"][name]["value"] == pytest.approx(expected)
    assert figures["overall"]["balanced_accuracy"]["value"] > 0.6  # at 0.5 nothing would be called, and it were 0.5


def test_a_threshold_follows_validation_and_not_the_test():
    shifted = figures_with_chosen_thresholds(findings(0), findings(1, shift=0.5, word="validation"), num_resamples=0)
    assert shifted["overall"]["sensitivity"]["value"] == 0.0


def test_scores_that_are_not_known_count_neither_for_the_choice_nor_for_the_figures():
    tested = findings(0)
    scores = tested.scores.copy()
    scores[:100, 0] = np.nan
    part = figures_with_chosen_thresholds(
        ScoredFindings(scores, tested.labels, tested.patients, NAMES), num_resamples=0
    )
    assert part["num_positive"]["cyst"] == tested.labels[100:, 0].sum()
    assert part["thresholds"]["chosen_on"] == "the other patients, 5 folds"


def test_a_patient_of_both_splits_or_other_findings_are_refused():
    with pytest.raises(ValueError, match="share 100 patients"):
        figures_with_chosen_thresholds(findings(0), findings(1), num_resamples=0)
    other = findings(1, word="validation")
    with pytest.raises(ValueError, match="the same findings"):
        figures_with_chosen_thresholds(
            findings(0), ScoredFindings(other.scores, other.labels, other.patients, ("cyst", "scar")), num_resamples=0
        )
