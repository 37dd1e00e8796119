"""Scores of scans against label tables: figures that the construction predicts, by volume, study and patient."""

import csv

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from medclip_hf.evaluation.ct_protocols import (
    LabelTable,
    ScoredScans,
    by_unit,
    ct_figures,
    read_ct_rate_labels,
    read_rad_chestct_labels,
    read_scores,
)
from medclip_hf.evaluation.ct_zero_shot import RAD_CHESTCT_TO_CT_RATE, published_operating_point

FINDINGS = ("Emphysema", "Lung nodule")


def write_csv(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def scans(scores, labels, patients=None):
    labels = np.asarray(labels, dtype=bool)
    ids = tuple(f"valid_{k}_a_1" for k in range(len(labels)))
    names = np.array([f"p{k}" for k in range(len(labels))] if patients is None else patients)
    return ScoredScans(
        LabelTable(ids, names, names, FINDINGS[: labels.shape[1]], labels), np.asarray(scores, float), {}
    )


def random_scans(num=200, seed=0, shift=0.3):
    rng = np.random.default_rng(seed)
    labels = rng.random((num, 2)) < 0.3
    return scans(np.clip(rng.random((num, 2)) * 0.6 + shift * labels, 0, 1), labels)


def test_the_tables_of_ct_rate_are_joined_by_volume(tmp_path):
    names = ["valid_1_a_1", "valid_1_a_2", "valid_1_b_1", "valid_2_a_1"]
    rows = [[f"{name}.nii.gz", k % 2, 1] for k, name in enumerate(names)]
    table = read_ct_rate_labels(write_csv(tmp_path / "labels.csv", ["VolumeName", *FINDINGS], rows), FINDINGS)
    assert table.study_ids.tolist() == ["valid_1_a", "valid_1_a", "valid_1_b", "valid_2_a"]
    assert table.patient_ids.tolist() == ["valid_1"] * 3 + ["valid_2"]
    rows = [
        [names[0], "", 0.25, ""],
        [names[1], "too short", "", ""],
        [names[3], "", 0.5, 1],
        ["valid_9_a_1", "", 1, 1],
    ]
    found = read_scores(write_csv(tmp_path / "s.csv", ["scan_id", "refused", *FINDINGS], rows), table)
    assert found.table.scan_ids == (names[0], names[3])
    assert np.array_equal(found.scores, [[0.25, np.nan], [0.5, 1.0]], equal_nan=True)
    assert found.counts == {"scored": 2, "refused": 1, "without scores": 1, "without labels": 1}


def test_rad_chestct_has_a_finding_wherever_it_is_located_and_calcification_counts_twice(tmp_path):
    columns = [f"{name}*{place}" for name in RAD_CHESTCT_TO_CT_RATE for place in ("left", "right")]
    flags = ["1" if column == "calcification*right" else "0" for column in columns]
    path = write_csv(tmp_path / "t.csv", ["NoteAcc_DEID", *columns], [["trn00001.npz", *flags]])
    summary = write_csv(tmp_path / "summary.csv", ["NoteAcc_DEID", "MRN_DEID"], [["trn00001", "patient7"]])
    table = read_rad_chestct_labels([path], summary)
    present = [name for name, flag in zip(table.findings, table.labels[0], strict=True) if flag]
    assert present == ["Coronary artery wall calcification", "Arterial wall calcification"]
    assert (len(table.findings), table.patient_ids.tolist()) == (15, ["patient7"])


def test_perfect_scores_reach_1_and_random_ones_one_half():
    labels = np.array([[1, 0], [0, 1]] * 10)
    perfect = ct_figures(scans(0.2 + 0.6 * labels, labels), num_resamples=20)
    assert perfect["overall"]["auroc"]["value"] == perfect["overall"]["balanced_accuracy"]["value"] == 1.0
    assert perfect["published"]["overall"]["weighted_f1"] == 1.0
    blind = ct_figures(random_scans(2000, shift=0.0), num_resamples=20)["overall"]
    assert blind["auroc"]["value"] == pytest.approx(0.5, abs=0.03)
    assert blind["balanced_accuracy"]["value"] == pytest.approx(0.5, abs=0.03)


def test_figures_are_scikit_learn_s():
    data = random_scans()
    figures = ct_figures(data, validation=_others(random_scans(seed=1)), num_resamples=0)
    thresholds = figures["thresholds"]["values"]
    for column, name in enumerate(FINDINGS):
        truth, values = data.table.labels[:, column], data.scores[:, column]
        own = figures["per_class"][name]
        assert own["auroc"]["value"] == pytest.approx(roc_auc_score(truth, values))
        expected = balanced_accuracy_score(truth, values > thresholds[name])
        assert own["balanced_accuracy"]["value"] == pytest.approx(expected)


def _others(data):
    names = np.array([f"other{k}" for k in range(len(data.scores))])
    return ScoredScans(
        LabelTable(data.table.scan_ids, names, names, data.table.findings, data.table.labels), data.scores, {}
    )


def test_the_published_rule_stands_beside_and_is_marked():
    data = random_scans()
    published = ct_figures(data, num_resamples=0)["published"]
    assert "chosen on the test labels" in published["threshold"]
    point = published_operating_point(data.scores[:, 0], data.table.labels[:, 0])
    assert published["per_class"]["Emphysema"]["accuracy"] == point.accuracy


def test_cross_fitted_thresholds_never_see_their_own_patient():
    """Scores that mean nothing: a threshold chosen on the test labels beats chance, a cross-fitted one does not."""
    gains = []
    for seed in range(30):
        data = random_scans(40, seed=seed, shift=0.0)
        figures = ct_figures(data, num_resamples=0, seed=seed)
        own = figures["published"]["overall"]
        gains.append(
            [0.5 * (own["sensitivity"] + own["specificity"]), figures["overall"]["balanced_accuracy"]["value"]]
        )
    on_test, cross_fitted = np.mean(gains, axis=0)
    assert on_test > 0.55
    assert cross_fitted == pytest.approx(0.5, abs=0.04)


def test_probabilities_within_a_hundredth_still_get_a_threshold_between_them():
    labels = np.array([[1], [0]] * 10)
    squeezed = ct_figures(scans(0.501 + 0.001 * labels, labels), num_resamples=0)
    assert squeezed["overall"]["balanced_accuracy"]["value"] == 1.0
    assert squeezed["published"]["overall"]["accuracy"] == 0.5  # its hundred thresholds pass them by


def test_volumes_are_joined_to_studies_and_studies_to_patients():
    table = LabelTable(
        ("v1", "v2", "v3", "v4"),
        np.array(["s1", "s1", "s2", "s3"]),
        np.array(["p1", "p1", "p1", "p2"]),
        FINDINGS,
        np.array([[1, 0], [1, 0], [0, 0], [0, 1]], dtype=bool),
    )
    given = ScoredScans(table, np.array([[0.2, 0.0], [0.4, np.nan], [0.1, np.nan], [np.nan, 0.5]]), {})
    studies, scores = by_unit(given, "study")
    assert studies.scan_ids == ("s1", "s2", "s3")
    assert np.allclose(scores, [[0.3, 0.0], [0.1, np.nan], [np.nan, 0.5]], equal_nan=True)
    patients, scores = by_unit(given, "patient")
    assert patients.labels.tolist() == [[True, False], [False, True]]
    assert np.allclose(scores, [[0.3, 0.0], [np.nan, 0.5]], equal_nan=True)
    with pytest.raises(ValueError, match="unit is one of"):
        by_unit(given, "ward")


def test_missing_scores_are_counted_and_left_out_but_0_in_the_published_figures():
    labels = np.array([[1, 1], [0, 0]] * 10)
    scores = 0.2 + 0.6 * labels
    scores[0, 0] = np.nan
    figures = ct_figures(scans(scores, labels), num_resamples=0)
    assert figures["counts"]["scores missing"] == 1
    assert figures["overall"]["auroc"]["value"] == 1.0
    published = figures["published"]["per_class"]["Emphysema"]
    assert published["sensitivity"] == pytest.approx(0.9)
    assert published["auroc"] == pytest.approx(0.9)  # one of ten positives below every negative
    assert figures["published"]["overall"]["auroc"] == pytest.approx(0.95)


def test_thresholds_of_the_same_patients_are_refused():
    with pytest.raises(ValueError, match="share 200 patients"):
        ct_figures(random_scans(), validation=random_scans(seed=1))


def test_a_finding_nobody_has_is_named_and_left_out_of_means():
    data = random_scans()
    data.table.labels[:, 1] = False
    figures = ct_figures(data, num_resamples=0)
    assert list(figures["undefined"]) == ["Lung nodule"]
    assert figures["published"]["undefined"] == ["Lung nodule"]
    assert figures["overall"]["auroc"]["value"] == figures["per_class"]["Emphysema"]["auroc"]["value"]


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        (["VolumeName", "Emphysema"], ["v", "1"], "lacks the columns"),
        (["VolumeName", *FINDINGS], ["v", "1", "2"], "expected 0 or 1"),
        (["scan", *FINDINGS], ["v", "1", "0"], "lacks the columns"),
    ],
)
def test_label_tables_that_are_wrong_are_refused(tmp_path, header, row, message):
    with pytest.raises(ValueError, match=message):
        read_ct_rate_labels(write_csv(tmp_path / "t.csv", header, [row]), FINDINGS)


def test_tables_without_rows_or_with_a_scan_twice_are_refused(tmp_path):
    header = ["VolumeName", *FINDINGS]
    with pytest.raises(ValueError, match="no table"):
        read_ct_rate_labels(tmp_path / "absent.csv", FINDINGS)
    with pytest.raises(ValueError, match="no rows"):
        read_ct_rate_labels(write_csv(tmp_path / "t.csv", header, []), FINDINGS)
    with pytest.raises(ValueError, match="labels 1 scans twice"):
        read_ct_rate_labels(write_csv(tmp_path / "t.csv", header, [["v", 0, 1]] * 2), FINDINGS)
    with pytest.raises(ValueError, match="has no columns for"):
        read_rad_chestct_labels([write_csv(tmp_path / "t.csv", ["NoteAcc_DEID"], [["a"]])])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["v_1_a_1", "", "1.5", "0"]], "probability"),
        ([["v_1_a_1", "", "high", "0"]], "probability"),
        ([["v_1_a_1", "", "nan", "0"]], "probability"),
        ([["v_1_a_1", "", "1", "0"]] * 2, "twice"),
        ([["other", "", "1", "0"]], "no scored scan in common"),
        ([["v_1_a_1", "damaged", "", ""]], "no scored scan in common"),
    ],
)
def test_score_tables_that_are_wrong_are_refused(tmp_path, rows, message):
    table = read_ct_rate_labels(write_csv(tmp_path / "t.csv", ["VolumeName", *FINDINGS], [["v_1_a_1", 0, 1]]), FINDINGS)
    with pytest.raises(ValueError, match=message):
        read_scores(write_csv(tmp_path / "s.csv", ["scan_id", "refused", *FINDINGS], rows), table)
