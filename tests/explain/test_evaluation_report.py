"""The report of an evaluation: every figure with its interval, every gap with its reason, every text escaped."""

import json

import numpy as np
import pytest

from medclip_hf.evaluation.classification import classification_figures
from medclip_hf.evaluation.comparisons import holm, paired_differences
from medclip_hf.explain.evaluation_report import (
    figure_table,
    interval_text,
    render_evaluation_report,
    write_evaluation_report,
)
from medclip_hf.explain.overlay import encode_png
from medclip_hf.explain.report import Picture

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def evaluation():
    rng = np.random.default_rng(0)
    labels = rng.random((80, 3)) < [0.4, 0.3, 0.0]
    first = np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1)
    second = np.clip(first + 0.1 * labels, 0, 1)
    names = ["cyst", HOSTILE, "absent one"]
    options = {"groups": np.arange(80) // 2, "num_resamples": 50}
    models = {
        "first": classification_figures(first, labels, names, **options).as_dict(),
        HOSTILE: classification_figures(second, labels, names, **options).as_dict(),
    }
    pairs = {name: pair.as_dict() for name, pair in paired_differences(first, second, labels, names, **options).items()}
    corrected = holm({name: pair["p_value"] for name, pair in pairs.items() if name in ("auroc", "auprc")})
    for name, value in corrected.items():
        pairs[name]["p_holm"] = value
    return json.loads(json.dumps({"models": models, "comparisons": pairs}, allow_nan=False))


def test_every_figure_stands_there_with_its_interval(evaluation):
    page = render_evaluation_report("t", **evaluation)
    for figure in evaluation["models"]["first"]["overall"].values():
        assert interval_text(figure) in page
    for name in ("auroc", "auprc", "sensitivity", "specificity", "f1"):
        assert interval_text(evaluation["models"]["first"]["per_class"]["cyst"][name]) in page
    assert interval_text(evaluation["comparisons"]["auroc"]["difference"]) in page
    assert "of 40 patients" in page
    assert "50 bootstrap resamples by patient" in page


def test_a_class_without_positives_is_said_with_its_reason(evaluation):
    assert '<th scope="row">first</th><td>absent one</td><td>no positive sample</td>' in render_evaluation_report(
        "t", **evaluation
    )


def test_no_text_becomes_markup_and_pictures_are_inlined(evaluation):
    picture = Picture(encode_png(np.zeros((2, 2, 3), np.uint8)), HOSTILE)
    page = render_evaluation_report(HOSTILE, **evaluation, facts={HOSTILE: HOSTILE}, pictures=[picture])
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "data:image/png;base64," in page


def test_figures_without_classes_or_intervals_make_a_report_too(tmp_path):
    models = {"ours": {"overall": {"image_to_text_recall@1": {"value": 0.25, "low": None, "high": None}}}}
    page = write_evaluation_report(tmp_path / "new" / "report.html", "Retrieval", models).read_text("utf-8")
    assert "image to text recall@1" in page
    assert "0.250" in page


def test_the_table_reads_in_a_terminal(evaluation):
    lines = figure_table(evaluation["models"]).as_text().splitlines()
    assert lines[0].split() == ["Figure", "first", HOSTILE]
    assert len(lines) == 1 + len(evaluation["models"]["first"]["overall"])


def test_small_p_values_are_not_written_as_zero():
    compared = {"auroc": {"first": 0.5, "second": 0.9, "difference": {"value": 0.4}, "p_value": 1e-9}}
    models = {"ours": {"overall": {}}}
    assert "&lt; 0.001" in render_evaluation_report("t", models, comparisons=compared)


def test_a_report_without_figures_is_refused():
    with pytest.raises(ValueError, match="under 'overall'"):
        render_evaluation_report("t", {})
    with pytest.raises(ValueError, match="ours"):
        render_evaluation_report("t", {"ours": {"auroc": 0.5}})
