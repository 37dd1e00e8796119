"""The report of one evaluation as one HTML file: its setting, figures with intervals, comparisons, pictures.

It is made from what the JSON of an evaluation holds, so it can be drawn again without the models.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medclip_hf.explain.report import NOTICE, Paragraph, Picture, Section, Table, render_report, write_report

FIGURE_NAMES = {
    "auroc": "AUROC",
    "auprc": "AUPRC (average precision)",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "sensitivity_at_specificity": "Sensitivity at fixed specificity",
    "precision": "Precision",
    "f1": "F1",
    "f1_macro": "F1, macro",
    "f1_micro": "F1, micro",
    "brier": "Brier score",
    "ece": "Calibration error (ECE)",
}
_OF_A_CLASS = ("auroc", "auprc", "balanced_accuracy", "sensitivity", "specificity", "f1")
_SMALLEST_P = 0.001


def evaluation_sections(
    models: Mapping[str, Mapping[str, Any]],
    *,
    facts: Mapping[str, str] | None = None,
    comparisons: Mapping[str, Mapping[str, Any]] | None = None,
    pictures: Sequence[Picture] = (),
) -> list[Section]:
    """The sections of a report, for `render_report`.

    Args:
        models: name of each model to its figures: "overall" (name to value, low, high, num_undefined), and if it has
            them "per_class", "num_positive", "undefined", "left_out", "num_samples", "num_groups", "settings", as
            `ClassificationFigures.as_dict` gives them.
        facts: what was evaluated: data set, split, protocol, date; a line each.
        comparisons: what was compared to "first", "second", "difference", "p_value", and "p_holm" where it was
            corrected.
        pictures: at the end.

    Raises:
        ValueError: no model, or one without "overall".
    """
    lacking = [name for name, figures in models.items() if "overall" not in figures]
    if not models or lacking:
        raise ValueError(f"a report needs models with figures under 'overall'; without: {lacking or 'all, none given'}")
    sections = [_setting(models, facts or {}), _over_all_classes(models)]
    if comparisons:
        sections.append(_comparisons(comparisons))
    for name, figures in models.items():
        if figures.get("per_class"):
            sections.append(_by_class(name, figures))
    gaps = _gaps(models)
    if gaps:
        sections.append(Section("What has no figure, and why", gaps))
    if pictures:
        sections.append(Section("Pictures", pictures))
    return sections


def render_evaluation_report(title: str, models: Mapping[str, Mapping[str, Any]], **parts: Any) -> str:
    """The HTML of a report; `parts` and errors as in `evaluation_sections` and `report.render_report`."""
    return render_report(title, evaluation_sections(models, **parts))


def write_evaluation_report(
    path: str | Path, title: str, models: Mapping[str, Mapping[str, Any]], *, notice: str = NOTICE, **parts: Any
) -> Path:
    """Path of the report written, whole or not at all; `parts` and errors as in `evaluation_sections`."""
    return write_report(path, title, evaluation_sections(models, **parts), notice=notice)


def interval_text(figure: Mapping[str, Any] | None) -> str:
    """A figure and its interval for a reader, as in "0.905 (0.894 to 0.915)"; "undefined" where there is none."""
    if figure is None or figure.get("value") is None:
        return "undefined"
    if figure.get("low") is None or figure.get("high") is None:
        return f"{figure['value']:.3f}"
    return f"{figure['value']:.3f} ({figure['low']:.3f} to {figure['high']:.3f})"


def figure_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """Figures over all classes, one a row, one model a column; also for a terminal (`Table.as_text`)."""
    names = list(dict.fromkeys(name for figures in models.values() for name in figures["overall"]))
    rows = [
        [_figure_name(name), *(interval_text(figures["overall"].get(name)) for figures in models.values())]
        for name in names
    ]
    return Table(["Figure", *models], rows, _interval_caption(models))


def _setting(models: Mapping[str, Mapping[str, Any]], facts: Mapping[str, str]) -> Section:
    rows = [[name, str(value)] for name, value in facts.items()]
    for name, figures in models.items():
        if "num_samples" in figures:
            patients = figures.get("num_groups", figures["num_samples"])
            rows.append([f"Samples of {name}", f"{figures['num_samples']}, of {patients} patients"])
    parts: list[Paragraph | Table | Picture] = [Table(["What", "Value"], rows)] if rows else []
    return Section("What was evaluated", parts)


def _over_all_classes(models: Mapping[str, Mapping[str, Any]]) -> Section:
    parts: list[Paragraph | Table | Picture] = [figure_table(models)]
    settings = next(iter(models.values())).get("settings", {})
    if any("sensitivity_at_specificity" in figures["overall"] for figures in models.values()):
        wanted = settings.get("specificity")
        parts.append(
            Paragraph(
                f"Fixed specificity: {wanted if wanted is not None else 'not recorded'}. Its threshold is the best one "
                "on these same labels, so this figure flatters; sensitivity and specificity at thresholds chosen on "
                "other data do not."
            )
        )
    return Section("Figures", parts)


def _comparisons(comparisons: Mapping[str, Mapping[str, Any]]) -> Section:
    rows = [
        [
            _figure_name(name),
            interval_text({"value": entry.get("first")}),
            interval_text({"value": entry.get("second")}),
            interval_text(entry.get("difference")),
            _p_text(entry.get("p_value")),
            _p_text(entry.get("p_holm")),
        ]
        for name, entry in comparisons.items()
    ]
    header = ["Compared", "First", "Second", "Second − first", "p", "p, Holm"]
    caption = "Differences on the same samples. Holm's correction is for all rows that have one."
    return Section("Comparisons", [Table(header, rows, caption)])


def _by_class(model: str, figures: Mapping[str, Any]) -> Section:
    per_class = figures["per_class"]
    columns = [name for name in _OF_A_CLASS if any(name in of_class for of_class in per_class.values())]
    positives = figures.get("num_positive", {})
    rows = [
        [name, str(positives.get(name, "")), *(interval_text(of_class.get(column)) for column in columns)]
        for name, of_class in per_class.items()
    ]
    header = ["Class", "Positives", *(_figure_name(column) for column in columns)]
    return Section(f"Figures by class: {model}", [Table(header, rows)])


def _gaps(models: Mapping[str, Mapping[str, Any]]) -> list[Paragraph | Table | Picture]:
    rows = []
    for model, figures in models.items():
        rows += [[model, name, reason] for name, reason in figures.get("undefined", {}).items()]
        rows += [[model, _figure_name(name), reason] for name, reason in figures.get("left_out", {}).items()]
        rows += [
            [model, _figure_name(name), f"{figure['num_undefined']} resamples left a class empty and were left out"]
            for name, figure in figures["overall"].items()
            if figure.get("num_undefined")
        ]
    return [Table(["Model", "Class or figure", "Reason"], rows)] if rows else []


def _interval_caption(models: Mapping[str, Mapping[str, Any]]) -> str:
    settings = next(iter(models.values())).get("settings", {})
    if not settings.get("num_resamples"):
        return "Means over classes, unless the name says micro."
    return (
        f"Means over classes unless the name says micro, with {100 * settings['confidence']:.0f} % percentile "
        f"intervals of {settings['num_resamples']} bootstrap resamples by patient."
    )


def _figure_name(name: str) -> str:
    return FIGURE_NAMES.get(name, name.replace("_", " "))


def _p_text(value: float | None) -> str:
    if value is None:
        return ""
    return f"< {_SMALLEST_P}" if value < _SMALLEST_P else f"{value:.3f}"
