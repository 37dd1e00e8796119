"""Plots: what is asked for is drawn, hostile names are text, undefined figures are said, too much is refused."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from medclip_hf.evaluation.calibration import reliability_curve
from medclip_hf.evaluation.curves import precision_recall_band, roc_curve_band
from medclip_hf.evaluation.intervals import Interval
from medclip_hf.explain.plots import (
    COLOURS,
    MAX_CURVES,
    bar_chart_with_intervals,
    precision_recall_plot,
    reliability_plot,
    roc_plot,
)

RNG = np.random.default_rng(0)
LABELS = RNG.random(200) < 0.3
SCORES = np.clip(RNG.normal(0.4 + 0.2 * LABELS, 0.15), 0, 1)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def num_of(png, colour):
    return int((np.abs(pixels(png).astype(int) - np.round(255 * np.array(to_rgb(colour)))).max(axis=-1) < 12).sum())


def bar(value, low=None, high=None):
    return Interval(value, low, high)


@pytest.mark.parametrize(
    ("plot", "curve"),
    [(roc_plot, roc_curve_band), (precision_recall_plot, precision_recall_band), (reliability_plot, reliability_curve)],
)
def test_every_curve_is_drawn_in_its_colour_with_its_band(plot, curve):
    first, second = curve(SCORES, LABELS, num_resamples=20), curve(SCORES**2, LABELS, num_resamples=20)
    one, two = plot({"a": first}), plot({"a": first, "b": second}, title="two")
    assert num_of(one, COLOURS[0]) > 100
    assert num_of(one, COLOURS[1]) == 0
    assert num_of(two, COLOURS[1]) > 100
    flat = SimpleNamespace(**(vars(first) | {"low": getattr(first, "y", None), "high": getattr(first, "y", None)}))
    if plot is not reliability_plot:
        assert (pixels(plot({"a": flat})) == 255).mean() > (pixels(one) == 255).mean()  # no band, more white


@pytest.mark.parametrize("name", ["$x_1$ & <b>", "\\frac{", "a" * 200, "  ", "名前"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_names_are_drawn_as_text(name):
    band = roc_curve_band(SCORES, LABELS, num_resamples=0)
    assert roc_plot({name: band}, title=name).startswith(b"\x89PNG")
    assert bar_chart_with_intervals({name: {name: bar(0.5), "b": bar(0.4)}}, axis_label=name).startswith(b"\x89PNG")


def test_a_longer_bar_has_more_pixels_and_an_undefined_one_none():
    def area(value):
        return num_of(bar_chart_with_intervals({"CT": {"ours": bar(value)}}, axis_label="AUROC"), "#4095C5")

    assert area(0.8) == pytest.approx(2 * area(0.4), rel=0.1)
    assert area(None) == 0


def test_a_chart_grows_with_its_rows():
    def height(num_rows):
        rows = {f"modality {k}": {"ours": bar(0.5, 0.4, 0.6)} for k in range(num_rows)}
        return pixels(bar_chart_with_intervals(rows, axis_label="AUROC")).shape[0]

    assert height(40) > 2 * height(10)


def test_a_long_legend_is_not_cut_off():
    curve = roc_curve_band(SCORES, LABELS, num_resamples=0)
    names = [f"coronary artery wall calcification {k}" for k in range(MAX_CURVES)]  # two lines each
    drawn = pixels(roc_plot(dict.fromkeys(names, curve)))
    assert drawn.shape[0] > pixels(roc_plot({"one": curve})).shape[0]
    edges = np.concatenate([drawn[:8], drawn[-8:]])
    assert (edges == 255).all()


def test_nothing_and_too_much_are_refused():
    band = roc_curve_band(SCORES, LABELS, num_resamples=0)
    for curves in ({}, {str(k): band for k in range(MAX_CURVES + 1)}):
        with pytest.raises(ValueError, match="draw several"):
            roc_plot(curves)
    with pytest.raises(ValueError, match="draw several"):
        bar_chart_with_intervals({}, axis_label="AUROC")
