"""Figures of a classifier against scikit-learn, hand-made cases, repeated rows, and input that must be refused."""

import json
import time

import numpy as np
import pytest
from sklearn import metrics as sk

from medclip_hf.evaluation.classification import classification_figures
from medclip_hf.evaluation.curves import (
    precision_recall_band,
    roc_curve_band,
    threshold_at_specificity,
)
from medclip_hf.evaluation.intervals import bootstrap_weights

NAMES = ["cyst", "nodule", "effusion"]


def findings(num_samples=120, seed=0, decimals=2):
    rng = np.random.default_rng(seed)
    labels = rng.random((num_samples, 3)) < [0.5, 0.2, 0.3]
    scores = np.clip(rng.normal(0.4 + 0.25 * labels, 0.2), 0.0, 1.0).round(decimals)
    return scores, labels


def classes(num_samples=150, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, size=num_samples, p=[0.6, 0.3, 0.1])
    logits = rng.normal(size=(num_samples, 3)) + 1.5 * np.eye(3)[labels]
    scores = np.exp(logits)
    return scores / scores.sum(axis=1, keepdims=True), labels


def values(figures):
    return {name: interval.value for name, interval in figures.overall.items()}


def test_figures_of_several_findings_equal_scikit_learn():
    scores, labels = findings()
    figures = values(classification_figures(scores, labels, NAMES, num_resamples=0))
    called = scores >= 0.5
    columns = range(3)
    expected = {
        "auroc": sk.roc_auc_score(labels, scores, average="macro"),
        "auprc": sk.average_precision_score(labels, scores, average="macro"),
        "accuracy": np.mean([sk.accuracy_score(labels[:, k], called[:, k]) for k in columns]),
        "balanced_accuracy": np.mean([sk.balanced_accuracy_score(labels[:, k], called[:, k]) for k in columns]),
        "sensitivity": sk.recall_score(labels, called, average="macro"),
        "precision": sk.precision_score(labels, called, average="macro"),
        "f1_macro": sk.f1_score(labels, called, average="macro"),
        "f1_micro": sk.f1_score(labels, called, average="micro"),
        "brier": np.mean([sk.brier_score_loss(labels[:, k], scores[:, k]) for k in columns]),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-12), name


def test_figures_of_one_class_per_sample_equal_scikit_learn():
    scores, labels = classes()
    figures = values(classification_figures(scores, labels, NAMES, num_resamples=0))
    called = scores.argmax(axis=1)
    expected = {
        "auroc": sk.roc_auc_score(labels, scores, multi_class="ovr", average="macro"),
        "auprc": sk.average_precision_score(np.eye(3)[labels], scores, average="macro"),
        "accuracy": sk.accuracy_score(labels, called),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, called),
        "f1_macro": sk.f1_score(labels, called, average="macro"),
        "f1_micro": sk.f1_score(labels, called, average="micro"),
        "precision": sk.precision_score(labels, called, average="macro"),
        "brier": np.mean(((scores - np.eye(3)[labels]) ** 2).sum(axis=1)),
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-12), name


def test_sensitivity_at_a_specificity_is_the_best_point_of_scikit_learns_curve():
    scores, labels = findings()
    figures = classification_figures(scores, labels, NAMES, specificity=0.8, num_resamples=0)
    for k, name in enumerate(NAMES):
        false_positive, sensitivity, _ = sk.roc_curve(labels[:, k], scores[:, k], drop_intermediate=False)
        expected = sensitivity[false_positive <= 0.2 + 1e-12].max()
        assert figures.per_class[name]["sensitivity_at_specificity"].value == pytest.approx(expected, abs=1e-12)


def test_every_resampled_figure_is_that_of_the_repeated_rows():
    scores, labels = findings(60)
    patients = np.random.default_rng(1).integers(20, size=60)
    result = classification_figures(scores, labels, NAMES, groups=patients, num_resamples=30, seed=3)
    (weights,) = bootstrap_weights(60, patients, 30, seed=3)
    repeated = []
    for row in weights.astype(int):
        chosen = np.repeat(np.arange(60), row)
        repeated.append(values(classification_figures(scores[chosen], labels[chosen], NAMES, num_resamples=0)))
    for name, interval in result.overall.items():
        low, high = np.quantile([figures[name] for figures in repeated], [0.025, 0.975])
        assert interval.low == pytest.approx(low, abs=1e-12), name
        assert interval.high == pytest.approx(high, abs=1e-12), name


def test_perfect_scores_give_one_and_constant_scores_one_half():
    labels = np.array([[0], [1], [0], [1]])
    perfect = values(classification_figures(labels.astype(float), labels, ["cyst"], num_resamples=0))
    for name in ("auroc", "auprc", "accuracy", "balanced_accuracy", "f1_macro", "sensitivity_at_specificity"):
        assert perfect[name] == 1.0, name
    assert (perfect["brier"], perfect["ece"]) == (0.0, 0.0)
    constant = values(classification_figures(np.full((4, 1), 0.5), labels, ["cyst"], num_resamples=0))
    assert (constant["auroc"], constant["auprc"], constant["sensitivity_at_specificity"]) == (0.5, 0.5, 0.0)


def test_a_class_without_positives_is_named_and_in_no_mean():
    scores, labels = findings()
    labels[:, 1] = False
    figures = classification_figures(scores, labels, NAMES, num_resamples=20)
    assert figures.undefined == {"nodule": "no positive sample"}
    assert "nodule" not in figures.per_class
    others = classification_figures(scores[:, [0, 2]], labels[:, [0, 2]], ["cyst", "effusion"], num_resamples=20)
    assert figures.overall == others.overall


def test_a_test_set_without_any_defined_class_has_figures_of_none():
    figures = classification_figures([[0.2], [0.3]], [[0], [0]], ["cyst"], num_resamples=5)
    assert figures.overall["auroc"].value is None
    assert json.dumps(figures.as_dict(), allow_nan=False)


def test_what_is_not_known_does_not_count():
    scores, labels = findings()
    known = np.random.default_rng(2).random(labels.shape) < 0.7
    hidden = np.where(known, scores, np.nan)
    figures = classification_figures(hidden, labels, NAMES, known=known, num_resamples=10)
    for k, name in enumerate(NAMES):
        rows = known[:, k]
        alone = classification_figures(scores[rows, k : k + 1], labels[rows, k : k + 1], [name], num_resamples=0)
        for figure, interval in alone.per_class[name].items():
            assert figures.per_class[name][figure].value == pytest.approx(interval.value, abs=1e-12), figure


def test_scores_that_are_no_probabilities_get_no_figures_of_probabilities_and_say_why():
    scores, labels = findings()
    figures = classification_figures(scores - 3.0, labels, NAMES, num_resamples=0)
    assert set(figures.overall) == {"auroc", "auprc", "sensitivity_at_specificity"}
    assert "no thresholds were given" in figures.left_out["f1"]
    assert "not probabilities" in figures.left_out["ece"]
    with_thresholds = classification_figures(scores - 3.0, labels, NAMES, thresholds=-2.5, num_resamples=0)
    assert with_thresholds.overall["f1_macro"].value == pytest.approx(
        sk.f1_score(labels, scores >= 0.5, average="macro"), abs=1e-12
    )


def test_logits_of_one_class_per_sample_have_decisions_but_no_calibration():
    scores, labels = classes()
    figures = classification_figures(np.log(scores), labels, NAMES, num_resamples=0)
    assert figures.overall["accuracy"].value == sk.accuracy_score(labels, scores.argmax(axis=1))
    assert "sum to 1" in figures.left_out["brier"]


def test_resamples_that_lose_the_only_positive_are_counted():
    figures = classification_figures([[0.1], [0.2], [0.3], [0.9]], [[0], [0], [0], [1]], ["cyst"], num_resamples=300)
    assert 50 < figures.overall["auroc"].num_undefined < 150
    assert figures.overall["auroc"].low == 1.0


def test_a_threshold_for_a_specificity_keeps_it_and_no_lower_one_does():
    scores, labels = findings()
    negatives = scores[~labels[:, 0], 0]
    threshold = threshold_at_specificity(scores[:, 0], labels[:, 0], 0.9)
    assert (negatives < threshold).mean() >= 0.9
    below = scores[:, 0][scores[:, 0] < threshold].max()
    assert (negatives < below).mean() < 0.9
    assert threshold_at_specificity([0.5, 0.5], [True, False], 0.9) == float("inf")


def test_the_area_under_the_drawn_roc_curve_is_the_auroc_and_the_band_holds_it():
    scores, labels = findings(2000, decimals=6)
    band = roc_curve_band(scores[:, 0], labels[:, 0], num_resamples=50)
    area = 0.5 * ((band.y[1:] + band.y[:-1]) * np.diff(band.x)).sum()
    assert area == pytest.approx(sk.roc_auc_score(labels[:, 0], scores[:, 0]), abs=0.003)
    assert (band.low <= band.y + 1e-9).mean() > 0.95
    assert (band.y <= band.high + 1e-9).mean() > 0.95


def test_the_drawn_precision_is_that_of_the_first_threshold_reaching_each_recall():
    scores, labels = [0.9, 0.8, 0.7, 0.6], [True, False, True, False]
    band = precision_recall_band(scores, labels, num_resamples=0)
    at = dict(zip(band.x.round(2), band.y, strict=True))
    assert (at[0.1], at[0.5], at[0.51], at[1.0]) == (1.0, 1.0, 2 / 3, 2 / 3)


def test_a_curve_of_one_sided_labels_is_none():
    assert roc_curve_band([0.1, 0.2], [False, False]) is None


def test_a_thousand_resamples_of_five_thousand_patients_take_seconds():
    scores, labels = findings(5000, decimals=6)
    start = time.process_time()
    classification_figures(scores, labels, NAMES, num_resamples=200)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("scores", "labels", "options", "message"),
    [
        ([[0.1, np.nan], [0.2, 0.3]], [[0, 1], [1, 0]], {}, "1 of 4 are not"),
        ([[0.1, 0.2]], [2], {}, "the first in row 0: 2"),
        ([[0.1, 0.2]], [0.0], {}, "integers"),
        ([[0.1, 0.2]], [[0, 2]], {}, "must be 0 or 1"),
        ([[0.1, 0.2]], [[0]], {}, "scores' shape"),
        ([0.1, 0.2], [0, 1], {}, r"\(samples, classes\)"),
        ([[0.1, 0.2]], [[0, 1]], {"thresholds": [0.5, 0.5, 0.5]}, "one for each of 2"),
        ([[0.1, 0.2]], [0], {"thresholds": 0.5}, "several findings"),
        ([[0.1, 0.2]], [[0, 1]], {"groups": ["a", "b"]}, "one group per sample"),
        ([[0.1, 0.2]], [[0, 1]], {"known": [[1, 1]]}, "known must be bool"),
        ([[0.1, 0.2]], [[0, 1]], {"specificity": 90}, "specificity"),
    ],
)
def test_bad_input_is_refused_with_what_is_wrong(scores, labels, options, message):
    with pytest.raises(ValueError, match=message):
        classification_figures(scores, labels, ["a", "b"], num_resamples=5, **options)


def test_names_that_repeat_are_refused():
    with pytest.raises(ValueError, match="different class names"):
        classification_figures([[0.1, 0.2]], [[0, 1]], ["a", "a"])


@pytest.mark.parametrize("groups", [["a", None, "b"], [1.0, float("nan"), 2.0]])
def test_samples_without_a_patient_are_refused(groups):
    with pytest.raises(ValueError, match="1 of 3 samples have no group"):
        classification_figures([[0.1], [0.2], [0.3]], [[0], [1], [0]], ["cyst"], groups=groups)


def test_numbers_and_texts_that_read_alike_are_one_patient():
    groups = np.array([7, "7", "p8"], dtype=object)
    figures = classification_figures([[0.1], [0.2], [0.3]], [[0], [1], [0]], ["cyst"], groups=groups, num_resamples=5)
    assert figures.num_groups == 2


def test_a_threshold_that_nothing_reaches_is_ready_for_json():
    figures = classification_figures([[0.1], [0.9]], [[0], [1]], ["cyst"], thresholds=float("inf"), num_resamples=0)
    assert figures.overall["sensitivity"].value == 0.0
    assert json.loads(json.dumps(figures.as_dict(), allow_nan=False))["settings"]["thresholds"] == ["inf"]


def test_curves_and_thresholds_refuse_what_is_no_score_or_label():
    for function in (roc_curve_band, precision_recall_band, lambda *given: threshold_at_specificity(*given, 0.9)):
        with pytest.raises(ValueError, match="finite"):
            function([0.1, np.nan], [0, 1])
        with pytest.raises(ValueError, match="0 or 1"):
            function([0.1, 0.2], [0, -1])
    with pytest.raises(ValueError, match="there are none"):
        threshold_at_specificity([0.1], [1], 0.9)
