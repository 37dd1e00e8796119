"""Paired differences, DeLong and Holm: by hand, against a double loop and simulated truth, and what must be refused."""

import json

import numpy as np
import pytest
from scipy.stats import norm

from medclip_hf.evaluation.classification import classification_figures
from medclip_hf.evaluation.comparisons import (
    delong_test,
    holm,
    paired_difference,
    paired_differences,
    paired_mean_difference,
)


def two_models(num_samples=300, gain=0.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random((num_samples, 1)) < 0.3
    shared = rng.normal(size=labels.shape)
    first = shared + labels + 0.5 * rng.normal(size=labels.shape)
    return first, first + gain * labels + 0.5 * rng.normal(size=labels.shape), labels


def by_double_loop(scores, labels):
    """Areas and their covariance as DeLong's paper writes them: every pair of a positive and a negative."""
    areas, on_positives, on_negatives = [], [], []
    for values in scores:
        wins = np.array([[(p > n) + 0.5 * (p == n) for n in values[~labels]] for p in values[labels]])
        areas.append(wins.mean())
        on_positives.append(wins.mean(axis=1))
        on_negatives.append(wins.mean(axis=0))
    return areas, np.cov(on_positives) / labels.sum() + np.cov(on_negatives) / (~labels).sum()


def test_delong_equals_the_double_loop_with_ties():
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.4
    scores = (rng.normal(size=(2, 60)) + labels).round(1)
    areas, covariance = by_double_loop(scores, labels)
    result = delong_test(*scores, labels)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert (result.first, result.second) == pytest.approx(areas, abs=1e-12)
    assert result.standard_error == pytest.approx(np.sqrt(variance), abs=1e-12)
    assert result.z == pytest.approx((areas[1] - areas[0]) / np.sqrt(variance))
    assert result.p_value == pytest.approx(2 * norm.sf(abs(result.z)))


def test_delong_by_hand():
    # second model: positives 3 and 1 beat (2, 0) in 1 and ½ of the cases: area ¾, variance ⅛/2 + ⅛/2; the first: all 1
    result = delong_test([4, 3, 1, 0], [3, 1, 2, 0], [1, 1, 0, 0])
    assert (result.first, result.second) == (1.0, 0.75)
    assert result.standard_error == pytest.approx(np.sqrt(0.125))


def test_delong_of_a_model_with_itself_finds_nothing():
    result = delong_test([0.1, 0.4, 0.3, 0.9], [0.1, 0.4, 0.3, 0.9], [0, 1, 0, 1])
    assert (result.difference.value, result.p_value, result.z) == (0.0, 1.0, None)
    assert json.dumps(result.as_dict(), allow_nan=False)


def test_delong_p_values_are_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(300):
        labels = rng.random(80) < 0.5
        p_values.append(delong_test(rng.normal(size=80) + labels, rng.normal(size=80) + labels, labels).p_value)
    assert 0.02 <= np.mean(np.array(p_values) < 0.05) <= 0.09
    assert 0.42 <= np.mean(np.array(p_values) < 0.5) <= 0.58


def test_delong_by_patient_knows_that_copies_tell_nothing_new():
    first, second, labels = (column[:, 0] for column in two_models(100, gain=0.4))
    alone = delong_test(first, second, labels)
    copies = [np.repeat(column, 5) for column in (first, second, labels)]
    assert delong_test(*copies).p_value < alone.p_value
    by_patient = delong_test(*copies, groups=np.repeat(np.arange(100), 5))
    assert by_patient.standard_error == pytest.approx(alone.standard_error, rel=1e-9)


def test_the_paired_interval_agrees_with_delong():
    first, second, labels = two_models(400, gain=0.5)
    pair = paired_difference(first, second, labels, ["cyst"], num_resamples=1000)
    delong = delong_test(first[:, 0], second[:, 0], labels[:, 0])
    assert pair.difference.value == pytest.approx(delong.difference.value, abs=1e-12)
    width = delong.difference.high - delong.difference.low
    assert pair.difference.high - pair.difference.low == pytest.approx(width, rel=0.15)


def test_a_model_that_is_better_everywhere_gets_the_smallest_p_value_there_is():
    first, _, labels = two_models()
    pair = paired_difference(first, labels.astype(float), labels, ["cyst"], num_resamples=199)
    assert pair.second == 1.0
    assert pair.p_value == pytest.approx(2 / 200)


def test_a_model_against_itself_has_p_value_one():
    first, _, labels = two_models()
    pair = paired_difference(first, first, labels, ["cyst"], num_resamples=50)
    assert (pair.difference.value, pair.p_value) == (0.0, 1.0)


def test_pairing_makes_the_interval_narrower_than_two_separate_ones():
    first, second, labels = two_models(gain=0.3)
    pair = paired_difference(first, second, labels, ["cyst"])
    alone = classification_figures(second, labels, ["cyst"]).overall["auroc"]
    assert pair.difference.high - pair.difference.low < alone.high - alone.low


def test_figures_that_only_one_model_has_are_not_compared():
    first, second, labels = two_models()
    said = 1 / (1 + np.exp(-second))
    assert set(paired_differences(first, said, labels, ["cyst"], num_resamples=5)) == {
        "auroc",
        "auprc",
        "sensitivity_at_specificity",
    }
    with pytest.raises(ValueError, match="no figure 'f1_macro' of both"):
        paired_difference(first, said, labels, ["cyst"], figure="f1_macro", num_resamples=5)


def test_a_class_without_positives_gives_no_difference_and_no_p_value():
    pair = paired_difference([[0.1], [0.2]], [[0.3], [0.4]], [[0], [0]], ["cyst"], num_resamples=5)
    assert (pair.first, pair.difference.value, pair.p_value) == (None, None, None)


def test_the_mean_difference_of_hits_is_by_sample_and_by_patient():
    first, second = np.array([0, 1, 0, 1, 0, 1.0]), np.array([1, 1, 1, 1, 0, 1.0])
    pair = paired_mean_difference(first, second, groups=[0, 0, 1, 1, 2, 2])
    assert pair.difference.value == pytest.approx(2 / 6)
    assert pair.difference.low >= 0.0  # it never loses
    with pytest.raises(ValueError, match="finite"):
        paired_mean_difference([np.nan], [1.0])


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    with pytest.raises(ValueError, match="0, 1"):
        holm({"a": float("nan")})


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([0.1, 0.2, 0.3], [0, 1, 1], "two samples of each side"),
        ([0.1, 0.2], [0, 1, 1], r"\(2,\) and \(3,\)"),
        ([0.1, np.inf, 0.3, 0.4], [0, 1, 0, 1], "finite"),
        ([0.1, 0.2, 0.3, 0.4], [0, 1, 0, 2], "0 or 1"),
    ],
)
def test_what_delong_cannot_test_is_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        delong_test(scores, scores, labels)
