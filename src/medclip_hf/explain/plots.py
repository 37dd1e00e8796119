"""Figures of an evaluation as pictures: ROC, precision-recall and reliability with bands, bars with intervals; PNG.

What is drawn is described by its fields alone (the protocols below), so figures of any origin fit.
"""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Okabe and Ito's colours without yellow: told apart by colour-blind readers, and on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("solid", "dashed", "dotted")
MAX_CURVES = len(COLOURS) * len(_STYLES)
MAX_BANDS = 4  # more of them hide each other
_DPI, _LABEL_WIDTH = 130, 30
_BAR_INCHES, _BAR_WIDTH = 0.22, 0.8
_LEGEND_LINE_INCHES = 0.135


class CurveWithBand(Protocol):
    """x, y, low and high, (P,) each."""

    @property
    def x(self) -> Floats:
        """(P,)."""

    @property
    def y(self) -> Floats:
        """(P,)."""

    @property
    def low(self) -> Floats:
        """(P,) lower edge of the band."""

    @property
    def high(self) -> Floats:
        """(P,) upper edge of the band."""


class Reliability(Protocol):
    """Predicted and observed shares, their interval and the number of samples of each bin, (B,) each."""

    @property
    def predicted(self) -> Floats:
        """(B,)."""

    @property
    def observed(self) -> Floats:
        """(B,)."""

    @property
    def low(self) -> Floats:
        """(B,) lower end of the interval of `observed`."""

    @property
    def high(self) -> Floats:
        """(B,) upper end."""

    @property
    def count(self) -> NDArray[np.int64]:
        """(B,)."""


class FigureWithInterval(Protocol):
    """A value with the ends of its interval; None where undefined."""

    @property
    def value(self) -> float | None:
        """The figure."""

    @property
    def low(self) -> float | None:
        """Lower end."""

    @property
    def high(self) -> float | None:
        """Upper end."""


def roc_plot(curves: Mapping[str, CurveWithBand], *, title: str = "") -> bytes:
    """The PNG of ROC curves with their bands and the diagonal of chance.

    Args:
        curves: name, as it shall stand in the legend, to curve (x: 1 − specificity, y: sensitivity).
        title: above; may be empty.

    Raises:
        ValueError: no curve, or more than can be told apart.
    """
    figure, tile = _square(title)
    tile.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=(0, (2, 3)), label="chance")
    _draw_curves(tile, curves)
    tile.set_xlabel("1 − specificity")
    tile.set_ylabel("sensitivity")
    return _finished(figure, tile)


def precision_recall_plot(
    curves: Mapping[str, CurveWithBand], *, prevalence: float | None = None, title: str = ""
) -> bytes:
    """The PNG of precision-recall curves with their bands, and the precision of chance.

    Args:
        curves: name to curve (x: recall, y: precision).
        prevalence: share of positives, a dotted line; None where curves differ in it.
        title: above; may be empty.

    Raises:
        ValueError: as `roc_plot`.
    """
    figure, tile = _square(title)
    if prevalence is not None:
        label = f"chance (prevalence {prevalence:.3f})"
        tile.axhline(prevalence, color="#888888", linewidth=1, linestyle=(0, (2, 3)), label=label)
    _draw_curves(tile, curves)
    tile.set_xlabel("recall (sensitivity)")
    tile.set_ylabel("precision (positive predictive value)")
    return _finished(figure, tile)


def reliability_plot(curves: Mapping[str, Reliability], *, title: str = "") -> bytes:
    """The PNG of observed shares over predicted probabilities with intervals; below, how many samples say so.

    Args:
        curves: name to curve.
        title: above; may be empty.

    Raises:
        ValueError: as `roc_plot`.
    """
    _check_number(curves)
    figure = Figure(figsize=(7.4, 6.4), dpi=_DPI, layout="constrained")
    tile, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _head(figure, title)
    tile.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle=(0, (2, 3)), label="perfectly calibrated")
    for index, (name, curve) in enumerate(curves.items()):
        style = _style(index)
        if len(curves) <= MAX_BANDS:
            tile.fill_between(curve.predicted, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
        tile.plot(curve.predicted, curve.observed, marker="o", markersize=4, label=_wrapped(name), **style)
        below.plot(curve.predicted, curve.count, marker="o", markersize=3, **style)
    _unit_square(tile, is_square=False)  # so that it stays above the counts
    tile.set_ylabel("observed share of positives")
    below.set_xlabel("predicted probability")
    below.set_ylabel("samples")
    below.set_yscale("log")
    most = max(int(curve.count.max()) for curve in curves.values())
    below.set_ylim(0.8, 1.3 * 10.0 ** np.ceil(np.log10(max(most, 10))))  # whole decades, so that ticks stand apart
    below.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    below.yaxis.set_minor_formatter(NullFormatter())
    below.grid(visible=True, color="#dddddd", linewidth=0.6)
    return _finished(figure, tile)


def bar_chart_with_intervals(
    rows: Mapping[str, Mapping[str, FigureWithInterval]],
    *,
    axis_label: str,
    title: str = "",
    reference: float | None = None,
    limits: tuple[float, float] | None = (0.0, 1.0),
) -> bytes:
    """The PNG of horizontal bars with their intervals: one group a row (a modality), one bar a series (a model).

    A figure that is undefined or missing has the word "undefined" instead of a bar.

    Args:
        rows: row name to series name to figure.
        axis_label: what is measured.
        title: above; may be empty.
        reference: a dotted line, 0.5 for an AUROC.
        limits: of the axis; None: as the figures need.

    Raises:
        ValueError: no row or no series, or more series than can be told apart.
    """
    series = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    _check_number(series)
    height = len(rows) * (len(series) * _BAR_INCHES + 0.16) + 1.3 + 0.2 * bool(title)
    figure = Figure(figsize=(8.0, max(height, 2.2)), dpi=_DPI, layout="constrained")
    tile = figure.subplots()
    _head(figure, title)
    for index, name in enumerate(series):
        _draw_bars(tile, [figures.get(name) for figures in rows.values()], index, len(series), name)
    tile.set_yticks(range(len(rows)), [_wrapped(name) for name in rows], parse_math=False)
    tile.set_ylim(len(rows) - 0.45, -0.55)
    tile.set_xlabel(axis_label, parse_math=False)
    if limits is not None:
        tile.set_xlim(*limits)
    if reference is not None:
        tile.axvline(reference, color="#444444", linewidth=1, linestyle=(0, (2, 3)))
    tile.grid(visible=True, axis="x", color="#dddddd", linewidth=0.6)
    tile.set_axisbelow(True)
    tile.spines[["top", "right"]].set_visible(False)
    return _finished(figure, tile, has_legend=len(series) > 1)


def _draw_bars(
    tile: Axes, figures: Sequence[FigureWithInterval | None], index: int, num_series: int, name: str
) -> None:
    thickness = _BAR_WIDTH / num_series
    places = np.arange(len(figures)) + (index - 0.5 * (num_series - 1)) * thickness
    colour = COLOURS[index % len(COLOURS)]
    values = [figure.value if figure is not None else None for figure in figures]
    tile.barh(
        places,
        [value or 0.0 for value in values],
        height=0.86 * thickness,
        color=colour,
        hatch=("", "//", "..")[index // len(COLOURS)],
        alpha=0.75,
        label=_wrapped(name),
    )
    for place, figure in zip(places, figures, strict=True):
        if figure is None or figure.value is None:
            tile.text(0.01, place, "undefined", transform=tile.get_yaxis_transform(), va="center", fontsize=7)
        elif figure.low is not None and figure.high is not None:
            tile.plot([figure.low, figure.high], [place, place], color="#222222", linewidth=1.2, solid_capstyle="butt")


def _draw_curves(tile: Axes, curves: Mapping[str, CurveWithBand]) -> None:
    _check_number(curves)
    for index, (name, curve) in enumerate(curves.items()):
        style = _style(index)
        if len(curves) <= MAX_BANDS:
            tile.fill_between(curve.x, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
        tile.plot(curve.x, curve.y, label=_wrapped(name), **style)
    _unit_square(tile)


def _style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _STYLES[index // len(COLOURS)]}


def _check_number(named: Sequence[str] | Mapping[str, object]) -> None:
    if not 1 <= len(named) <= MAX_CURVES:
        raise ValueError(f"one picture shows 1 to {MAX_CURVES} curves or series, got {len(named)}: draw several")


def _square(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.8, 5.2), dpi=_DPI, layout="constrained")
    tile = figure.subplots()
    _head(figure, title)
    return figure, tile


def _unit_square(tile: Axes, *, is_square: bool = True) -> None:
    tile.set_xlim(-0.01, 1.01)
    tile.set_ylim(-0.01, 1.01)
    if is_square:
        tile.set_box_aspect(1.0)
    tile.grid(visible=True, color="#dddddd", linewidth=0.6)


def _head(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(textwrap.fill(title, 70), fontsize=12, parse_math=False)


def _wrapped(name: str) -> str:
    return textwrap.fill(name, _LABEL_WIDTH) or " "


def _finished(figure: Figure, tile: Axes, *, has_legend: bool = True) -> bytes:
    if has_legend:
        entries = tile.get_legend_handles_labels()
        legend = figure.legend(*entries, loc="outside right center", fontsize=8, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
        needed = _LEGEND_LINE_INCHES * sum(text.get_text().count("\n") + 1.4 for text in legend.get_texts())
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, max(height, needed + 0.6))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; tables and JSON hold the name.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
