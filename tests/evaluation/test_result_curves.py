"""Curves of stored results: what is drawn again with them, and which of them get a band."""

import numpy as np

from medclip_hf.evaluation.result_curves import reliability_curves, roc_curves
from medclip_hf.evaluation.results import StoredResult


def stored(scores, labels):
    record = {"model": "m", "figures": {"num_positive": dict.fromkeys([f"c{k}" for k in range(scores.shape[1])], 1)}}
    return StoredResult(record, {"scores": scores, "labels": labels, "rows": np.arange(len(scores))})


def test_classes_of_one_image_are_drawn_together_where_no_patient_is_named():
    # 30 findings that always agree are no more than one: the interval is that of 40 images, not of 1,200 cells.
    labels = np.random.default_rng(0).random((40, 1)) < 0.5
    one = reliability_curves([stored(np.full((40, 1), 0.5), labels)], None)["m"]
    thirty = reliability_curves([stored(np.full((40, 30), 0.5), labels.repeat(30, axis=1))], None)["m"]
    assert thirty.count.tolist() == [1200]
    assert (thirty.low, thirty.high) == (one.low, one.high)


def test_of_more_curves_than_get_a_band_none_is_resampled():
    rng = np.random.default_rng(0)
    results = [stored(rng.random((50, 3)), rng.random((50, 3)) < 0.4)]
    few, many = (roc_curves(results, None, 20, max_bands=most) for most in (3, 2))
    assert list(few) == list(many) == ["c0", "c1", "c2"]
    assert all((curve.high > curve.low).any() for curve in few.values())
    assert all((curve.high == curve.low).all() for curve in many.values())
