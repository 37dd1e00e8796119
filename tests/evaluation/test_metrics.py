"""Areas under the ROC curve and bootstrap intervals, against hand-made cases and scikit-learn."""

import math
import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medclip_hf.evaluation.metrics import (
    auroc,
    auroc_per_class,
    auroc_with_interval,
    bootstrap_weights,
    mean_with_interval,
    percentile_interval,
)


@pytest.mark.parametrize(
    ("scores", "labels", "expected"),
    [
        ([0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], 1.0),
        ([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1], 0.0),
        ([0.5, 0.5, 0.5, 0.5], [0, 1, 0, 1], 0.5),
        ([0.1, 0.3, 0.2, 0.4], [0, 0, 1, 1], 0.75),  # of 4 pairs one is the wrong way round
        ([0.2, 0.2, 0.9], [0, 1, 1], 0.75),  # one win, one tie
    ],
)
def test_auroc_counts_pairs_in_the_right_order(scores, labels, expected):
    assert auroc(scores, labels) == expected


@pytest.mark.parametrize("num_levels", [3, 1000])
def test_auroc_equals_scikit_learn_with_and_without_ties(num_levels):
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(num_levels, size=200) / num_levels, rng.random(200) < 0.3
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1]])
def test_auroc_of_one_sided_labels_is_none(labels):
    assert auroc([0.1, 0.2, 0.3], labels) is None


def test_a_class_without_positives_is_named_and_left_out_of_the_mean():
    scores = [[0.1, 0.5], [0.9, 0.4], [0.2, 0.3], [0.8, 0.2]]
    labels = [[0, 0], [1, 0], [0, 0], [1, 0]]
    result = auroc_per_class(scores, labels, ["cyst", "nodule"], num_resamples=20)
    assert result.undefined == ("nodule",)
    assert result.per_class["nodule"].value is None
    assert result.macro.value == 1.0
    assert not any(math.isnan(x) for x in (result.macro.low, result.macro.high))


def test_no_class_with_positives_gives_no_mean():
    result = auroc_per_class([[0.1], [0.2]], [[0], [0]], ["cyst"], num_resamples=5)
    assert result.macro.value is None
    assert result.macro.low is None


def test_each_resample_has_the_area_that_scikit_learn_finds_on_the_repeated_rows():
    rng = np.random.default_rng(1)
    scores, labels = np.round(rng.random(60), 1), rng.random(60) < 0.4
    patients = rng.integers(15, size=60)
    (weights,) = bootstrap_weights(60, patients, 40, seed=3)
    expected = []
    for row in weights.astype(int):
        chosen = np.repeat(np.arange(60), row)
        expected.append(roc_auc_score(labels[chosen], scores[chosen]))
    low, high = np.quantile(expected, [0.025, 0.975])
    interval = auroc_with_interval(scores, labels, groups=patients, num_resamples=40, seed=3)
    assert interval.low == pytest.approx(low, abs=1e-12)
    assert interval.high == pytest.approx(high, abs=1e-12)


def test_all_samples_of_a_patient_are_drawn_together():
    patients = np.array(["b", "a", "b", "c", "a", "b"])
    (weights,) = bootstrap_weights(6, patients, 50, seed=0)
    for patient in "abc":
        columns = weights[:, patients == patient]
        assert (columns == columns[:, :1]).all()
    drawn_patients = weights[:, [0, 1, 3]].sum(axis=1)
    assert (drawn_patients == 3).all()


def test_intervals_by_patient_are_wider_than_by_sample():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(20), 10)
    hits = (rng.random(20) < 0.5)[patients]
    by_patient = mean_with_interval(hits, groups=patients)
    by_sample = mean_with_interval(hits)
    assert by_patient.high - by_patient.low > 2 * (by_sample.high - by_sample.low)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        interval = mean_with_interval(rng.normal(1.0, 2.0, 40), num_resamples=200, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_resamples_without_positives_are_counted_not_averaged():
    interval = auroc_with_interval([0.1, 0.2, 0.3, 0.9], [0, 0, 0, 1], num_resamples=300)
    assert 50 < interval.num_undefined < 150  # (3/4)⁴ ≈ 0.32 of them lack the one positive
    assert interval.low == interval.high == 1.0


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(0)
    scores, labels = rng.random(50), rng.random(50) < 0.5
    assert auroc_with_interval(scores, labels, seed=5) == auroc_with_interval(scores, labels, seed=5)
    assert auroc_with_interval(scores, labels, seed=5) != auroc_with_interval(scores, labels, seed=6)


def test_without_resamples_there_is_a_value_and_no_interval():
    result = auroc_per_class([[0.1], [0.9]], [[0], [1]], ["cyst"], num_resamples=0)
    assert (result.macro.value, result.macro.low) == (1.0, None)


def test_the_mean_of_nothing_is_none():
    assert mean_with_interval([]).value is None


def test_a_thousand_resamples_of_ten_thousand_samples_take_seconds():
    rng = np.random.default_rng(0)
    start = time.process_time()
    auroc_with_interval(rng.random(10_000), rng.random(10_000) < 0.1, num_resamples=200)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, np.nan], [0, 1], "finite, but 1 of 2"),
        ([0.1, 0.2], [0, 2], "must be 0 or 1"),
        ([0.1, 0.2], [0, 1, 1], r"\(2,\) and \(3,\)"),
        ([[0.1]], [[1]], r"\(N,\)"),
    ],
)
def test_bad_scores_and_labels_are_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        auroc(scores, labels)


def test_groups_and_names_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="one group per sample"):
        auroc_with_interval([0.1, 0.2], [0, 1], groups=["a"])
    with pytest.raises(ValueError, match="different class names"):
        auroc_per_class([[0.1, 0.2]], [[0, 1]], ["cyst", "cyst"])
    with pytest.raises(ValueError, match="between 0 and 1"):
        percentile_interval(0.5, [0.4, 0.6], confidence=95)
    with pytest.raises(ValueError, match="must not be negative"):
        mean_with_interval([1.0], num_resamples=-1)
