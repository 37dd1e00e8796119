"""Figures of a split follow from logits, labels and patients alone."""

import numpy as np
import pytest

from medclip_hf.data.hospital.rows import PatientGroups
from medclip_hf.evaluation.label_predictions import (
    MIN_PATIENTS,
    FigureOptions,
    LabelPredictions,
    best_temperature,
    groups_left_out,
    label_figures,
    subgroup_figures,
    thresholds_at_specificity,
)

FEW = FigureOptions(num_resamples=20)


def predictions(logits, labels, *, is_single_label=False) -> LabelPredictions:
    names = tuple(f"row {number}" for number in range(len(logits)))
    classes = tuple("abc"[: np.shape(logits)[1]])
    arrays = (np.array(logits, float), np.array(labels, float), np.array(names))
    return LabelPredictions(*arrays, names, classes, is_single_label)


def test_what_is_unknown_has_no_part_in_the_figures():
    said = predictions([[2.0], [-2.0], [np.nan], [5.0]], [[1], [0], [0], [np.nan]])
    assert said.known().tolist() == [[True], [True], [False], [False]]
    assert label_figures(said, 1.0, FEW).overall["auroc"].value == 1.0


def test_rows_without_exactly_one_class_are_counted_and_left_out():
    said = predictions([[1, 0], [0, 1], [0, 0]], [[1, 0], [0, 1], [0, 0]], is_single_label=True).usable()
    assert (len(said.logits), said.num_unreadable, said.truth().tolist()) == (2, 1, [0, 1])
    with pytest.raises(ValueError, match="exactly one"):
        predictions([[1, 0]], [[0, 0]], is_single_label=True).usable()


def test_a_threshold_keeps_the_specificity_and_a_label_without_negatives_gets_one_half():
    logits = [[value, 0.0] for value in (-3, -2, -1, 0, 1, 2)]
    labels = [[int(row > 2), 1] for row in range(6)]
    first, second = thresholds_at_specificity(predictions(logits, labels), 1.0, 0.9)
    assert 1 / (1 + np.exp(1)) < first <= 0.5
    assert second == 0.5


def test_a_temperature_makes_overconfident_logits_milder():
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.5
    logits = 8.0 * np.where(rng.random(400) < 0.8, truth, ~truth)[:, None] - 4.0
    assert best_temperature(predictions(logits, truth[:, None])) > 2.0


def test_groups_of_few_patients_are_named_and_not_measured():
    count = MIN_PATIENTS + 3
    said = predictions([[float(row % 2)] for row in range(count)], [[row % 2] for row in range(count)])
    groups = {row: PatientGroups(sex="F" if number < 3 else "M") for number, row in enumerate(said.row_ids)}
    found = subgroup_figures(said, groups, 1.0, FEW)
    assert list(found) == ["sex"]
    assert found["sex"]["M"]["overall"]["auroc"]["value"] == 1.0
    assert groups_left_out(found) == "sex F"
