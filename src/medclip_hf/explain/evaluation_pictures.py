"""The pictures, the table and the page of several models on several tasks, from the records of their results.

A record is what the JSON of a result holds, so all this is drawn again without a model or an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medclip_hf.explain.evaluation_report import interval_text, write_evaluation_report
from medclip_hf.explain.plots import (
    MAX_CURVES,
    CurveWithBand,
    Reliability,
    bar_chart_with_intervals,
    reliability_plot,
    roc_plot,
)
from medclip_hf.explain.report import Picture, Table

Record = Mapping[str, Any]


@dataclass(frozen=True)
class _Bar:
    """A figure of a record, which has them as dicts."""

    value: float | None
    low: float | None
    high: float | None


def main_figure(record: Record) -> str:
    """The name of the figure that stands for a task."""
    return "image_to_text_recall@1" if record["task_type"] == "retrieval" else "auroc"


def summary_table(tasks: Mapping[str, Sequence[Record]]) -> Table:
    """The main figure of every task: one row a task, one column a model.

    Args:
        tasks: name of each task to the records of its models.
    """
    models = list(dict.fromkeys(record["model"] for records in tasks.values() for record in records))
    rows = []
    for task_name, records in tasks.items():
        of_model = {record["model"]: record for record in records}
        figure = main_figure(records[0])
        cells = [
            interval_text(of_model[model]["figures"]["overall"].get(figure)) if model in of_model else ""
            for model in models
        ]
        rows.append([task_name, records[0]["modality"] or "", figure, *cells])
    return Table(["task", "modality", "figure", *models], rows)


def task_pictures(
    records: Sequence[Record], roc: Mapping[str, CurveWithBand], reliability: Mapping[str, Reliability]
) -> dict[str, Picture]:
    """File name to picture of one task: AUROC by class, ROC and reliability curves; or recall.

    Args:
        records: of the task's models.
        roc: name to curve; of more than one picture can tell apart the first are drawn, and the caption says so.
        reliability: model to curve.
    """
    title = records[0]["title"]
    if records[0]["task_type"] == "retrieval":
        return {"recall": Picture(_recall_bars(records), "Recall at k, both ways, with intervals")}
    pictures = {"auroc": Picture(_auroc_bars(records), "AUROC of every class and of their mean, with intervals")}
    if roc:
        shown = dict(list(roc.items())[:MAX_CURVES])
        caption = "ROC curves" if len(shown) == len(roc) else f"ROC curves, the first {len(shown)} of {len(roc)}"
        pictures["roc"] = Picture(roc_plot(shown, title=title), caption)
    if reliability:
        drawn = reliability_plot(reliability, title=f"{title}, all classes")
        pictures["reliability"] = Picture(drawn, "Observed shares over probabilities, all classes together")
    return pictures


def bars_by_modality(tasks: Mapping[str, Sequence[Record]], task_type: str) -> bytes | None:
    """The PNG of the AUROC of every task of a type, by modality and name; None where there is none."""
    rows: dict[str, dict[str, _Bar]] = {}
    for task_name, records in tasks.items():
        for record in records:
            if record["task_type"] == task_type:
                name = f"{record['modality'] or 'other'}: {task_name}"
                rows.setdefault(name, {})[record["model"]] = _bar(record["figures"]["overall"]["auroc"])
    if not rows:
        return None
    return bar_chart_with_intervals(dict(sorted(rows.items())), axis_label="AUROC, mean over classes", reference=0.5)


def write_task_page(
    path: Path,
    records: Sequence[Record],
    comparisons: Mapping[str, Mapping[str, Any]],
    pictures: Mapping[str, Picture],
) -> Path:
    """Path of the page about one task: setting, figures, comparisons, pictures.

    Args:
        path: of the HTML file.
        records: of the task's models.
        comparisons: of all tasks, as `evaluation.results.compare_models` names them.
        pictures: from `task_pictures`.
    """
    first = records[0]
    return write_evaluation_report(
        path,
        first["title"],
        {record["model"]: record["figures"] for record in records},
        facts=_facts(records),
        comparisons={name: entry for name, entry in comparisons.items() if name.startswith(f"{first['task']}: ")},
        pictures=list(pictures.values()),
    )


def _facts(records: Sequence[Record]) -> dict[str, str]:
    first = records[0]
    facts = {"Task": first["title"], "Split": first["split"], "Protocol": first["task_type"].replace("_", " ")}
    for record in records:
        if chosen_on := record["figures"].get("thresholds", {}).get("chosen_on"):
            facts[f"Thresholds of {record['model']}"] = f"chosen on {chosen_on}"
        counts = ", ".join(f"{count} {reason}" for reason, count in record["data"]["counts"].items())
        facts[f"Data of {record['model']}"] = "; ".join([counts, *record["data"]["warnings"]])
    for figure in first["published"]:
        if figure["class_name"] is None:
            name = f"Published: {figure['model']}, {figure['metric']}, source: {figure['source']}"
            facts[name] = f"{figure['value']} ({figure['protocol']})"
    return facts


def _auroc_bars(records: Sequence[Record]) -> bytes:
    rows: dict[str, dict[str, _Bar]] = {}
    for record in records:
        figures = record["figures"]
        named = {"mean over classes": figures["overall"]["auroc"]}
        named |= {name: own["auroc"] for name, own in figures["per_class"].items()}
        for name, figure in named.items():
            rows.setdefault(name, {})[record["model"]] = _bar(figure)
    return bar_chart_with_intervals(rows, axis_label="AUROC", title=records[0]["title"], reference=0.5)


def _recall_bars(records: Sequence[Record]) -> bytes:
    rows: dict[str, dict[str, _Bar]] = {}
    for record in records:
        for name, figure in record["figures"]["overall"].items():
            rows.setdefault(name.replace("_", " "), {})[record["model"]] = _bar(figure)
    return bar_chart_with_intervals(rows, axis_label="recall", title=records[0]["title"])


def _bar(figure: Mapping[str, Any]) -> _Bar:
    return _Bar(figure["value"], figure["low"], figure["high"])
