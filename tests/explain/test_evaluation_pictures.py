"""Pictures and page of several models on a task, from what the JSON of their results holds."""

import io

import numpy as np
import pytest
from PIL import Image

from medclip_hf.evaluation.curves import roc_curve_band
from medclip_hf.explain.evaluation_pictures import bars_by_modality, summary_table, task_pictures, write_task_page
from medclip_hf.explain.plots import MAX_CURVES

FIGURE = {"value": 0.75, "low": 0.5, "high": 1.0, "num_undefined": 0}


def record(model, **changes):
    values = {
        "task": "colours",
        "title": "Colours",
        "task_type": "zero_shot_classification",
        "modality": "X-ray",
        "split": "test",
        "model": model,
        "data": {"counts": {"in use": 4, "no label": 1}, "warnings": ["classes without an image: blue"]},
        "figures": {"overall": {"auroc": FIGURE}, "per_class": {"red": {"auroc": FIGURE}}},
        "published": [{"model": "old", "metric": "AUROC", "source": "paper", "value": 0.7, "protocol": "zero-shot"}],
    }
    values["published"][0]["class_name"] = None
    return values | changes


@pytest.fixture(scope="module")
def curve():
    return roc_curve_band([0.9, 0.1, 0.8, 0.3], [1, 0, 0, 1], num_resamples=0)


def test_more_curves_than_can_be_told_apart_are_cut_and_the_caption_says_so(curve):
    pictures = task_pictures([record("a")], {f"class {k}": curve for k in range(MAX_CURVES + 3)}, {})
    assert pictures["roc"].caption == f"ROC curves, the first {MAX_CURVES} of {MAX_CURVES + 3}"
    assert task_pictures([record("a")], {"red": curve}, {})["roc"].caption == "ROC curves"


def test_a_model_without_the_task_has_an_empty_cell():
    table = summary_table({"colours": [record("a"), record("b")], "captions": [record("b", modality=None)]})
    assert table.header == ["task", "modality", "figure", "a", "b"]
    assert table.rows[1] == ["captions", "", "auroc", "", "0.750 (0.500 to 1.000)"]


def test_bars_are_of_one_type_of_task_and_none_without_one():
    tasks = {"colours": [record("a"), record("b")]}
    picture = Image.open(io.BytesIO(bars_by_modality(tasks, "zero_shot_classification")))
    assert np.asarray(picture).std() > 0
    assert bars_by_modality(tasks, "ct_zero_shot") is None


def test_the_page_names_what_was_set_aside_and_what_was_published(tmp_path, curve):
    records = [record("a")]
    page = write_task_page(tmp_path / "page.html", records, {}, task_pictures(records, {"red": curve}, {})).read_text()
    for part in ("1 no label", "classes without an image: blue", "Published: old, AUROC", "ROC curves"):
        assert part in page
