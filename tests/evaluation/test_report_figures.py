"""Findings of generated reports: counted as scikit-learn counts them, by the package's own labeller or any other."""

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from medclip_hf.evaluation.report_generation import anatomy_labeller, clinical_figures

FINDINGS = ["effusion", "nodule", "fracture"]


def label_words(text: str) -> list[str]:
    return [finding for finding in FINDINGS if finding in text]


def test_the_figures_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    said, true = rng.random((60, 3)) < 0.4, rng.random((60, 3)) < 0.4
    texts = [[" ".join(np.array(FINDINGS)[row]) for row in labels] for labels in (said, true)]
    figures = clinical_figures(*texts, label_words, FINDINGS, num_resamples=50)
    for average in ("macro", "micro"):
        expected = precision_recall_fscore_support(true, said, average=average)
        for name, value in zip(("precision", "recall", "f1"), expected[:3], strict=True):
            interval = figures.overall[f"{average}_{name}"]
            assert interval.value == pytest.approx(value)
            assert interval.low <= interval.value <= interval.high
    by_finding = precision_recall_fscore_support(true, said)[2]
    assert [figures.per_finding[name]["f1"].value for name in FINDINGS] == pytest.approx(by_finding.tolist())


def test_a_finding_that_no_report_holds_is_named_and_stays_out_of_the_mean():
    figures = clinical_figures(["effusion", "fracture"], ["effusion", ""], label_words, FINDINGS, num_resamples=0)
    assert figures.undefined == ("nodule", "fracture")
    assert figures.overall["macro_f1"].value == 1.0
    assert figures.num_positive == {"effusion": 1, "nodule": 0, "fracture": 0}


def test_two_reports_that_agree_on_nothing_found_agree():
    figures = clinical_figures(["clear", "nodule"], ["clear", "effusion"], label_words, FINDINGS, num_resamples=0)
    assert figures.overall["example_f1"].value == 0.5


def test_the_package_s_own_labeller_reads_negations():
    label = anatomy_labeller(["lung", "heart"])
    assert label("The heart is enlarged. No nodule in the lungs.") == ["heart"]
    assert label("There is a nodule in the right lung. The heart is normal.") == ["lung"]
    assert label("") == []


@pytest.mark.parametrize(
    ("generated", "references", "told"),
    [(["a"], [], "each report needs its reference"), (["a"], ["other"], "none of the findings")],
)
def test_what_cannot_be_compared_is_refused(generated, references, told):
    with pytest.raises(ValueError, match=told):
        clinical_figures(generated, references, lambda text: [text] if text == "other" else [], FINDINGS)
