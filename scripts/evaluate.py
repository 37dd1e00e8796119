r"""Evaluate one or several models on one or all tasks: JSON, a table, plots and a page to read.

    python scripts/evaluate.py --list
    python scripts/evaluate.py --model runs/stage2/final --task siim_acr --data data/siim --output results
    python scripts/evaluate.py --model runs/a/final --model openai/clip-vit-base-patch16 --task all --data data \
        --output results --num-workers 8
    python scripts/evaluate.py --model runs/fvlm/final --task ct_rate --data data/CT-RATE --output results

A task is a name of the benchmark table or a JSON file of your own. --data is the folder of the data set, a folder that
holds one folder for each task, or datasets:<repository>. With --task all every task is run whose folder is there, and
the missing ones are named. Several models are compared pair by pair on the same images, with Holm's correction over all
comparisons. Embeddings and results are kept: started again, it goes on where it was. For research only: no medical
device.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

import medclip_hf  # noqa: F401 - makes the Auto classes know our models
from medclip_hf.data.parquet import write_text_atomically
from medclip_hf.evaluation.calibration import reliability_curve
from medclip_hf.evaluation.ct_protocols import (
    UNITS,
    LabelTable,
    ScoredScans,
    ct_figures,
    find_labels,
    read_scores,
    with_findings_of,
)
from medclip_hf.evaluation.curves import roc_curve_band
from medclip_hf.evaluation.encoders import OPEN_CLIP_PREFIX, Encoder, check_model_place, load_encoder
from medclip_hf.evaluation.intervals import Interval
from medclip_hf.evaluation.results import (
    StoredResult,
    compare_models,
    data_fingerprint,
    describe,
    fingerprint,
    load_result,
    result_paths,
    save_result,
)
from medclip_hf.evaluation.run import EvaluationSettings, evaluate_task
from medclip_hf.evaluation.task_data import read_task_data, read_validation_data
from medclip_hf.evaluation.task_layouts import DATASETS_PREFIX
from medclip_hf.evaluation.tasks import TASKS, Task, read_task, task, with_split
from medclip_hf.explain.evaluation_report import figure_table, write_evaluation_report
from medclip_hf.explain.plots import MAX_CURVES, bar_chart_with_intervals, reliability_plot, roc_plot
from medclip_hf.explain.report import Picture, Table

logger = logging.getLogger("evaluate")

SCORE_CT = Path(__file__).resolve().parent / "score_ct.py"
RUNS_HERE = ("zero_shot_classification", "retrieval", "ct_zero_shot")
FVLM = "fvlm"
CURVE_RESAMPLES = 200  # bands of a picture


@dataclass(frozen=True)
class Work:
    """A task whose data are there.

    Args:
        task: on the split that is tested.
        source: folder, or ``datasets:…``.
    """

    task: Task
    source: str


@dataclass(frozen=True)
class Model:
    """A model to evaluate.

    Args:
        path: folder, Hub name or open_clip's.
        name: unique, in tables and file names.
        is_ct: fVLM.
    """

    path: str
    name: str
    is_ct: bool


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the benchmark table and leave")
    parser.add_argument(
        "--model", action="append", default=[], metavar="[NAME=]MODEL", help="folder, Hub name or open_clip:…"
    )
    parser.add_argument("--task", action="append", default=[], help="name, JSON file or all")
    parser.add_argument("--data", help="folder, or datasets:<repository>")
    parser.add_argument("--output", type=Path, help="folder of results")
    parser.add_argument("--cache", type=Path, help="folder of embeddings; default: embeddings below --output")
    parser.add_argument("--split", help="instead of the task's own; all: every row")
    parser.add_argument(
        "--columns", nargs="*", default=[], metavar="KEY=COLUMN", help="image, label, split, patient, id, caption"
    )
    parser.add_argument(
        "--uncertain", choices=("unknown", "negative", "positive"), default="unknown", help="labels of -1"
    )
    parser.add_argument(
        "--score", choices=("mixed", "global", "local"), default="mixed", help="of models with patch heads"
    )
    parser.add_argument(
        "--activation", choices=("softmax", "sigmoid"), help="default: sigmoid where several may be true"
    )
    parser.add_argument(
        "--use-bias", action="store_true", help="add the trained biases; the published protocol does not"
    )
    parser.add_argument("--top-patches", type=int, help="of the local score; default: the published share, 128 of 729")
    parser.add_argument("--scores", type=Path, help="CT: a table of score_ct.py instead of scoring now")
    parser.add_argument("--validation-scores", type=Path, help="CT: of the train split, to choose thresholds on")
    parser.add_argument("--num-resamples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch-size", type=int, default=64, help="to start with; halved where memory does not suffice"
    )
    parser.add_argument("--num-workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--device", help="default: the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on an accelerator, float32 on the CPU")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Evaluate; 0 if there are results, 1 if every task failed, 2 for a mistake in what was asked."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    disable_progress_bar()  # of loading weights
    options = parse_command_line(command_line)
    if options.list:
        print(benchmark_table().as_text())
        return 0
    try:
        return run(options)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def run(options: argparse.Namespace) -> int:
    """Find what is to be done, do it model by model, compare, and write what can be read."""
    models, works = find_models(options), find_works(options)
    check_that_something_fits(models, works)
    settings = settings_of(options)
    results: dict[str, list[StoredResult]] = {}
    patients: dict[str, NDArray[Any] | None] = {}
    failures = 0
    for model in models:
        encoder = (
            None
            if model.is_ct
            else load_encoder(model.path, device=options.device, dtype=options.dtype, name=model.name)
        )
        for work in works:
            if (work.task.task_type == "ct_zero_shot") != model.is_ct:
                continue
            try:
                stored, groups = evaluate(model, encoder, work, settings, options)
            except (ValueError, OSError) as error:
                if len(works) == 1:
                    raise
                sys.stderr.write(f"{work.task.name}, {model.name}: {error}\n")
                failures += 1
                continue
            results.setdefault(work.task.name, []).append(stored)
            patients[work.task.name] = groups
    if not results:
        return 1
    comparisons = compare_models(results, patients, settings)
    write_all(options.output, results, comparisons, patients, settings)
    print(f"\n{sum(map(len, results.values()))} results, {failures} failed: {options.output}")
    return 0


# What is to be done ----------------------------------------------------------------------------------------------


def benchmark_table() -> Table:
    """Every task of the table."""
    rows = [
        [row.name, row.paper, row.task_type, row.modality or "", row.split, row.layout or "", row.script]
        for row in TASKS.values()
    ]
    return Table(["task", "paper", "type", "modality", "split", "layout", "run by"], rows)


def find_models(options: argparse.Namespace) -> list[Model]:
    """The models, each with a name of its own.

    Raises:
        ValueError: none was named, or two have one name.
    """
    if not options.model or not options.task or not options.data or not options.output:
        raise ValueError("name --model, --task, --data and --output; --list prints the tasks.")
    models = []
    for text in options.model:
        name, sign, path = text.partition("=")
        if not sign or Path(text).exists():
            name, path = "", text
        models.append(Model(path, name or default_name(path), is_ct_model(path)))
    names = [model.name for model in models]
    stems = {result_paths(Path(), "task", name)[0] for name in names}
    if len(stems) < len(names):
        raise ValueError(f"the models are named {names}: give each a name of its own, --model name=folder")
    return models


def default_name(path: str) -> str:
    """The last part of a path that says something: not "final"."""
    parts = [part for part in Path(path).parts if part not in ("final", "/", ".", "..")]
    return parts[-1] if parts else path


def is_ct_model(path: str) -> bool:
    """Whether a model is fVLM.

    Raises:
        ValueError: it has no configuration.
    """
    if path.startswith(OPEN_CLIP_PREFIX):
        return False
    if (Path(path) / "adapter_config.json").is_file():
        path = json.loads((Path(path) / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    check_model_place(path)
    try:
        return AutoConfig.from_pretrained(path).model_type == FVLM
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is no model: {reason}") from error


def find_works(options: argparse.Namespace) -> list[Work]:
    """The tasks whose data are there; with "all", the others are named on stderr.

    Raises:
        ValueError: there is none.
    """
    rows: list[Task] = []
    for name in options.task:
        if name == "all":
            rows += [*TASKS.values(), *own_tasks(options.data)]
        else:
            rows.append(read_task(Path(name)) if name.endswith(".json") else task(name))
    works, missing, of_others = [], [], []
    for row in {row.name: row for row in rows}.values():
        source = source_of(row, options)
        if source is None:
            missing.append(row.name)
        elif row.task_type not in RUNS_HERE:
            of_others.append(f"{row.name} is a task of {row.task_type}: it is run by {row.script}")
        else:
            works.append(Work(with_split(row, options.split), source))
    if not works and of_others and not missing:
        raise ValueError("; ".join(of_others))
    sys.stderr.writelines(f"{sentence}\n" for sentence in of_others)
    if missing:
        sys.stderr.write(f"not there below {options.data}: {', '.join(missing)}\n")
    if not works:
        raise ValueError(f"no data of {', '.join(options.task)} at {options.data} that this script can evaluate.")
    return works


def own_tasks(data: str) -> list[Task]:
    """Tasks that a task.json describes beside its data."""
    return (
        [] if data.startswith(DATASETS_PREFIX) else [read_task(path) for path in sorted(Path(data).glob("*/task.json"))]
    )


def source_of(row: Task, options: argparse.Namespace) -> str | None:
    """Where the data of a task lie, or None: <data>/<task>, or <data> itself for a task asked for by name."""
    if options.data.startswith(DATASETS_PREFIX):
        return options.data
    folder = Path(options.data)
    if (folder / row.name).is_dir():
        return str(folder / row.name)
    return str(folder) if "all" not in options.task and folder.is_dir() else None


def check_that_something_fits(models: Sequence[Model], works: Sequence[Work]) -> None:
    """Refuse to run where no model can do any of the tasks."""
    kinds = {work.task.task_type == "ct_zero_shot" for work in works}
    for model in models:
        if model.is_ct not in kinds:
            kind = "of CT scans" if model.is_ct else "of 2-D images"
            raise ValueError(f"{model.path} is a model {kind}, but the tasks are {[work.task.name for work in works]}")


def settings_of(options: argparse.Namespace) -> EvaluationSettings:
    """The settings that the options name."""
    return EvaluationSettings(
        score=options.score,
        activation=options.activation,
        use_bias=options.use_bias,
        top_patches=options.top_patches,
        num_resamples=options.num_resamples,
        seed=options.seed,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )


# One model on one task -------------------------------------------------------------------------------------------


def evaluate(
    model: Model, encoder: Encoder | None, work: Work, settings: EvaluationSettings, options: argparse.Namespace
) -> tuple[StoredResult, NDArray[Any] | None]:
    """The result, computed or found, and whose image each of the data's is."""
    start = time.perf_counter()
    if encoder is None:
        stored, groups = evaluate_ct(model, work, settings, options)
    else:
        stored, groups = evaluate_images(encoder, work, settings, options)
    seconds = time.perf_counter() - start
    print(f"\n{work.task.title}, {stored.record['split']}: {model.name} ({seconds:.1f} s)")
    print(figure_table({model.name: stored.record["figures"]}).as_text())
    return stored, groups


def columns_named(options: argparse.Namespace) -> dict[str, str]:
    """What --columns says.

    Raises:
        ValueError: a part of it is no pair.
    """
    pairs = [text.partition("=") for text in options.columns]
    if not all(key and sign and column for key, sign, column in pairs):
        raise ValueError(f"--columns takes pairs such as image=file, got {' '.join(options.columns)}")
    return {key: column for key, _, column in pairs}


def evaluate_images(
    encoder: Encoder, work: Work, settings: EvaluationSettings, options: argparse.Namespace
) -> tuple[StoredResult, NDArray[Any] | None]:
    """The result of a 2-D model; thresholds of several findings come from the validation split, where there is one."""
    row, reading = work.task, {"columns": columns_named(options), "uncertain": options.uncertain}
    data = read_task_data(row, work.source, **reading)
    validation = read_validation_data(row, work.source, **reading) if row.is_multi_label else None
    wanted = data_fingerprint(encoder, row, data, settings, validation)
    stored = load_result(options.output, row.name, encoder.name, wanted)
    if stored is not None:
        return stored, data.patients
    with tqdm(total=len(data.items), desc=f"{encoder.name}, {row.name}", unit="image", disable=None) as bar:
        result = evaluate_task(
            encoder,
            row,
            data,
            settings,
            validation=validation,
            cache=options.cache or options.output / "embeddings",
            progress=lambda done, _: bar.update(done - bar.n),
        )
    for entry in result.set_aside:
        logger.warning("%s, %s: set aside: %s (%s)", row.name, entry.where, entry.reason, entry.detail)
    record = describe(encoder, row, data, settings, result, validation)
    save_result(options.output, record, result.arrays)
    return StoredResult(record, result.arrays), data.patients


def evaluate_ct(
    model: Model, work: Work, settings: EvaluationSettings, options: argparse.Namespace
) -> tuple[StoredResult, NDArray[Any]]:
    """The result of a CT model, from a table of scores that is continued or given."""
    path = options.scores or score_scans(model, work, options)
    labels = with_findings_of(find_labels(work.task, Path(work.source)), path)
    content = [path, *([options.validation_scores] if options.validation_scores else [])]
    identity = hashlib.blake2b(b"".join(file.read_bytes() for file in content), digest_size=16).hexdigest()
    data_identity = hashlib.blake2b(
        labels.labels.tobytes() + repr(labels.scan_ids).encode(), digest_size=16
    ).hexdigest()
    wanted = fingerprint(identity, work.task, data_identity, settings.identity)
    stored = load_result(options.output, work.task.name, model.name, wanted)
    if stored is None:
        scans = read_scores(path, labels)
        record = describe_ct(model, work.task, scans, settings, validation_scans(work, options, labels))
        record |= {"model_identity": identity, "fingerprint": wanted}
        place_of = {scan_id: place for place, scan_id in enumerate(labels.scan_ids)}
        known = ~np.isnan(scans.scores)
        arrays = {
            "scores": np.where(known, scans.scores, 0.0),
            "known": known,
            "labels": scans.table.labels,
            "rows": np.array([place_of[scan_id] for scan_id in scans.table.scan_ids]),
        }
        save_result(options.output, record, arrays)
        stored = StoredResult(record, arrays)
    return stored, labels.patient_ids


def describe_ct(
    model: Model, row: Task, scans: ScoredScans, settings: EvaluationSettings, validation: ScoredScans | None
) -> dict[str, Any]:
    """The record of a CT result: figures by volume, and those over all findings by study and patient."""
    resampling: dict[str, Any] = {
        "num_resamples": settings.num_resamples,
        "confidence": settings.confidence,
        "seed": settings.seed,
    }
    by_unit = {unit: ct_figures(scans, unit=unit, validation=validation, **resampling) for unit in UNITS}
    left_out = sorted(set(row.class_names or ()) - set(scans.table.findings))
    return {
        "task": row.name,
        "title": row.title,
        "task_type": row.task_type,
        "modality": row.modality,
        "split": row.split,
        "model": model.name,
        "settings": settings.identity,
        "data": {
            "counts": scans.counts,
            "warnings": [f"findings whose anatomy the model does not know: {', '.join(left_out)}"] if left_out else [],
            "set_aside": [],
        },
        "figures": by_unit["volume"],
        "by_unit": {unit: {key: by_unit[unit][key] for key in ("overall", "published", "counts")} for unit in UNITS},
        "published": [dataclasses.asdict(figure) for figure in row.published],
    }


def score_scans(model: Model, work: Work, options: argparse.Namespace) -> Path:
    """The table of scores that scripts/score_ct.py writes or continues.

    Raises:
        ValueError: it ended with an error, which it has said on stderr.
    """
    path = result_paths(options.output, work.task.name, model.name)[0].with_suffix(".scores.csv")
    option = "--ct-rate" if work.task.layout == "ct_rate" else "--rad-chestct"
    splits = ["train", "validation", "test"] if work.task.split == "all" else [work.task.split]
    for split in splits:
        command = [sys.executable, str(SCORE_CT), "--model", model.path, option, work.source, "--split", split]
        command += ["--output", str(path), *(["--device", options.device] if options.device else [])]
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
            raise ValueError(f"scripts/score_ct.py could not score {work.source}, split {split}")
    return path


def validation_scans(work: Work, options: argparse.Namespace, labels: LabelTable) -> ScoredScans | None:
    """Scores and labels of the train split, to choose thresholds on; None where no scores were given."""
    if options.validation_scores is None:
        return None
    of_train = find_labels(replace(work.task, split="train"), Path(work.source))
    kept = [of_train.findings.index(name) for name in labels.findings]
    return read_scores(
        options.validation_scores, replace(of_train, findings=labels.findings, labels=of_train.labels[:, kept])
    )


# What can be read ------------------------------------------------------------------------------------------------


def write_all(
    folder: Path,
    results: Mapping[str, Sequence[StoredResult]],
    comparisons: Mapping[str, Mapping[str, Any]],
    patients: Mapping[str, NDArray[Any] | None],
    settings: EvaluationSettings,
) -> None:
    """Table, comparisons, and a page with pictures for each task."""
    table = summary_table(results)
    print(f"\n{table.as_text()}")
    lines = [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]
    write_text_atomically(folder / "summary.md", "\n".join(lines) + "\n")
    write_text_atomically(folder / "comparisons.json", json.dumps(comparisons, indent=2, ensure_ascii=False) + "\n")
    for name, comparison in comparisons.items():
        difference = Interval(**comparison["difference"]).as_text("{:+.3f}")
        print(f"{name}: {difference}, p = {p_text(comparison['p_value'])}, Holm {p_text(comparison['p_holm'])}")
    for task_name, of_models in results.items():
        pictures = draw_pictures(of_models, patients[task_name], settings)
        for picture_name, content in pictures.items():
            (folder / task_name / f"{picture_name}.png").write_bytes(content)
        write_page(folder / task_name / "report.html", of_models, comparisons, pictures)
    for name, is_ct in (("by_modality", False), ("by_modality_ct", True)):  # no model does both
        bars = bars_by_modality(results, is_ct=is_ct)
        if bars is not None:
            (folder / f"{name}.png").write_bytes(bars)


def p_text(value: float | None) -> str:
    """A p-value for a reader."""
    return "undefined" if value is None else f"{value:.3g}"


def main_figure(record: Mapping[str, Any]) -> str:
    """The name of the figure that stands for a task."""
    return "image_to_text_recall@1" if record["task_type"] == "retrieval" else "auroc"


def summary_table(results: Mapping[str, Sequence[StoredResult]]) -> Table:
    """One row a task, one column a model."""
    models = list(dict.fromkeys(stored.model for of_models in results.values() for stored in of_models))
    rows = []
    for task_name, of_models in results.items():
        by_model = {stored.model: stored.record for stored in of_models}
        figure = main_figure(of_models[0].record)
        cells = [
            Interval(**by_model[model]["figures"]["overall"][figure]).as_text() if model in by_model else ""
            for model in models
        ]
        rows.append([task_name, of_models[0].record["modality"] or "", figure, *cells])
    return Table(["task", "modality", "figure", *models], rows)


def draw_pictures(
    of_models: Sequence[StoredResult], patients: NDArray[Any] | None, settings: EvaluationSettings
) -> dict[str, bytes]:
    """File name to PNG: ROC curves, reliability, AUROC by class."""
    first = of_models[0].record
    if first["task_type"] == "retrieval":
        return {"recall": recall_bars(of_models)}
    pictures = {"auroc": auroc_bars(of_models)}
    curves, reliability = {}, {}
    for stored in of_models:
        groups = None if patients is None else patients[stored.arrays["rows"]]
        resampling: dict[str, Any] = {"groups": groups, "num_resamples": min(CURVE_RESAMPLES, settings.num_resamples)}
        scores, truth, known = columns_of(stored)
        flat_groups = None if groups is None else np.repeat(groups, scores.shape[1])[known.ravel()]
        reliability[stored.model] = reliability_curve(
            np.clip(scores[known], 0.0, 1.0), truth[known], **(resampling | {"groups": flat_groups})
        )
        for column, name in enumerate(first["figures"]["num_positive"]):
            rows = known[:, column]
            own = resampling | {"groups": None if groups is None else groups[rows]}
            curve = roc_curve_band(scores[rows, column], truth[rows, column], **own)
            if curve is not None and len(curves) < MAX_CURVES:
                curves[f"{stored.model}: {name}" if len(of_models) > 1 else name] = curve
    if curves:
        pictures["roc"] = roc_plot(curves, title=first["title"])
    pictures["reliability"] = reliability_plot(reliability, title=f"{first['title']}, all classes")
    return pictures


def columns_of(stored: StoredResult) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_]]:
    """Scores, truth and known labels, (N, K) each."""
    scores, labels = stored.arrays["scores"], stored.arrays["labels"]
    truth = labels.astype(bool) if labels.ndim == 2 else labels[:, None] == np.arange(scores.shape[1])
    return scores, truth, stored.arrays.get("known", np.ones(scores.shape, dtype=bool))


def auroc_bars(of_models: Sequence[StoredResult]) -> bytes:
    """AUROC of every class and of their mean, one bar a model."""
    rows: dict[str, dict[str, Interval]] = {}
    for stored in of_models:
        figures = stored.record["figures"]
        named = {"mean over classes": figures["overall"]["auroc"]}
        named |= {name: own["auroc"] for name, own in figures["per_class"].items()}
        for name, figure in named.items():
            rows.setdefault(name, {})[stored.model] = Interval(**figure)
    return bar_chart_with_intervals(rows, axis_label="AUROC", title=of_models[0].record["title"], reference=0.5)


def recall_bars(of_models: Sequence[StoredResult]) -> bytes:
    """Recall at each k both ways, one bar a model."""
    rows: dict[str, dict[str, Interval]] = {}
    for stored in of_models:
        for name, figure in stored.record["figures"]["overall"].items():
            rows.setdefault(name.replace("_", " "), {})[stored.model] = Interval(**figure)
    return bar_chart_with_intervals(rows, axis_label="recall", title=of_models[0].record["title"])


def bars_by_modality(results: Mapping[str, Sequence[StoredResult]], *, is_ct: bool) -> bytes | None:
    """AUROC of every classification task, of CT scans or of images, by modality and name; None where there is none."""
    wanted = "ct_zero_shot" if is_ct else "zero_shot_classification"
    rows: dict[str, dict[str, Interval]] = {}
    for task_name, of_models in results.items():
        for stored in of_models:
            if stored.record["task_type"] == wanted:
                name = f"{stored.record['modality'] or 'other'}: {task_name}"
                rows.setdefault(name, {})[stored.model] = Interval(**stored.record["figures"]["overall"]["auroc"])
    if not rows:
        return None
    return bar_chart_with_intervals(dict(sorted(rows.items())), axis_label="AUROC, mean over classes", reference=0.5)


def write_page(
    path: Path,
    of_models: Sequence[StoredResult],
    comparisons: Mapping[str, Mapping[str, Any]],
    pictures: Mapping[str, bytes],
) -> None:
    """One page about one task."""
    first = of_models[0].record
    facts = {"Task": first["title"], "Split": first["split"], "Protocol": first["task_type"].replace("_", " ")}
    for stored in of_models:
        if chosen_on := stored.record["figures"].get("thresholds", {}).get("chosen_on"):
            facts[f"Thresholds of {stored.model}"] = f"chosen on {chosen_on}"
        counts = ", ".join(f"{count} {reason}" for reason, count in stored.record["data"]["counts"].items())
        facts[f"Data of {stored.model}"] = "; ".join([counts, *stored.record["data"]["warnings"]])
    for figure in first["published"]:
        if figure["class_name"] is None:
            name = f"Published: {figure['model']}, {figure['metric']}, source: {figure['source']}"
            facts[name] = f"{figure['value']} ({figure['protocol']})"
    write_evaluation_report(
        path,
        first["title"],
        {stored.model: stored.record["figures"] for stored in of_models},
        facts=facts,
        comparisons={name: entry for name, entry in comparisons.items() if name.startswith(f"{first['task']}: ")},
        pictures=[Picture(content, name.replace("_", " ")) for name, content in pictures.items()],
    )


if __name__ == "__main__":
    sys.exit(main())
