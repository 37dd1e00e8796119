"""Calibration error, reliability and temperature: by hand, against scikit-learn, and what must be refused."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from medclip_hf.evaluation.calibration import (
    brier_score,
    expected_calibration_error,
    fit_temperature,
    reliability_curve,
)


def test_the_calibration_error_by_hand():
    # bin [0, ½): two samples, mean 0.2, none came true; bin [½, 1]: two, mean 0.8, one came true
    assert expected_calibration_error([0.1, 0.3, 0.7, 0.9], [0, 0, 0, 1], num_bins=2) == pytest.approx(
        0.5 * 0.2 + 0.5 * 0.3
    )
    assert brier_score([0.1, 0.9], [0, 1]) == pytest.approx(0.01)


def test_a_probability_of_one_is_in_the_last_bin():
    assert expected_calibration_error([1.0, 0.0], [1, 0]) == 0.0


def test_the_reliability_curve_equals_scikit_learn_and_its_interval_holds_it():
    rng = np.random.default_rng(0)
    said = rng.random(500)
    came = rng.random(500) < said**2
    curve = reliability_curve(said, came, num_bins=10, num_resamples=200)
    observed, predicted = calibration_curve(came, said, n_bins=10)
    assert curve.observed == pytest.approx(observed)
    assert curve.predicted == pytest.approx(predicted)
    assert curve.count.sum() == 500
    assert ((curve.low <= curve.observed) & (curve.observed <= curve.high)).all()


def test_bins_without_samples_are_left_out():
    assert len(reliability_curve([0.05, 0.95], [0, 1], num_resamples=0).count) == 2


@pytest.mark.parametrize("is_single", [True, False])
def test_logits_multiplied_by_three_get_three_times_the_temperature(is_single):
    rng = np.random.default_rng(0)
    logits = 2.0 * rng.normal(size=(400, 4))
    if is_single:
        said = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        labels = np.array([rng.choice(4, p=row) for row in said])
    else:
        labels = rng.random(logits.shape) < 1.0 / (1.0 + np.exp(-logits))
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(1.0, abs=0.2)  # they were drawn from these logits
    assert fit_temperature(3.0 * logits, labels) == pytest.approx(3.0 * temperature, rel=1e-4)


@pytest.mark.parametrize("logits", [[[2.0, -2.0], [-2.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]]])
def test_logits_that_no_temperature_calibrates_are_refused(logits):
    with pytest.raises(ValueError, match="no temperature"):
        fit_temperature(logits, [0, 1])


@pytest.mark.parametrize(
    ("probabilities", "outcomes", "message"),
    [
        ([0.5, 1.2], [0, 1], "1 do not"),
        ([0.5, np.nan], [0, 1], "1 do not"),
        ([0.5], [0, 1], r"\(1,\) and \(2,\)"),
        ([], [], "N > 0"),
        ([0.5], [2], "0 or 1"),
    ],
)
def test_bad_probabilities_are_refused(probabilities, outcomes, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(probabilities, outcomes)


def test_bad_logits_and_labels_are_refused():
    with pytest.raises(ValueError, match="finite"):
        fit_temperature([[np.inf, 0.0]], [0])
    with pytest.raises(ValueError, match="0 to 1"):
        fit_temperature([[0.0, 1.0]], [2])
    with pytest.raises(ValueError, match="integers or"):
        fit_temperature([[0.0, 1.0]], [[0.5, 1.0]])
