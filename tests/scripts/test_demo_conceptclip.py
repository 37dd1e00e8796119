"""The 2-D demo, shortened: it draws, trains both stages, loads in a new process, measures and reports."""

import json

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def demo(run_demo, tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "conceptclip"
    code, printed = run_demo("demo_conceptclip", output, launched="stage2")
    assert code == 0
    return output, printed


def test_it_ends_with_a_table_and_where_its_pictures_are(demo):
    output, printed = demo
    assert "published mixed score" in printed
    assert f"Report: {output / 'report.html'}" in printed
    pictures = sorted((output / "pictures").glob("*.png"))
    assert pictures
    with Image.open(pictures[0]) as picture:
        assert min(picture.size) > 200


def test_its_results_hold_every_model_and_finding(demo):
    results = json.loads((demo[0] / "results.json").read_text())
    for name in ("before training", "IT-Align alone", "with PC-Align"):
        assert len(results[name]["mixed"]["per_class"]) >= 8
        assert 0.0 <= results[name]["recall_at_1"] <= 1.0
        assert 0.0 <= results[name]["pointing"]["value"] <= 1.0


def test_its_report_is_self_contained(demo):
    page = (demo[0] / "report.html").read_text(encoding="utf-8")
    assert "not a medical device" in page
    assert "data:image/png;base64," in page
    assert "http://" not in page
    assert "https://" not in page


def test_both_stages_and_the_comparison_can_be_loaded(demo):
    has_heads = {}
    for name in ("stage1", "stage2", "it_align_alone"):
        config = json.loads((demo[0] / name / "final" / "config.json").read_text())
        has_heads[name] = config["use_patch_concept_alignment"]
    assert has_heads == {"stage1": False, "stage2": True, "it_align_alone": False}


def test_a_folder_of_somebody_else_is_not_touched(run_demo, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    code, _ = run_demo("demo_conceptclip", tmp_path, launched="stage2")
    assert code == 2
    assert "not empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "precious"
