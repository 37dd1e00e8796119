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
import json
import logging
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tqdm import tqdm
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

import medclip_hf  # noqa: F401 - makes the Auto classes know our models
from medclip_hf.data.parquet import write_text_atomically
from medclip_hf.evaluation.ct_protocols import find_labels, with_findings_of
from medclip_hf.evaluation.ct_results import ct_result, validation_scans
from medclip_hf.evaluation.encoders import OPEN_CLIP_PREFIX, Encoder, check_model_place, load_encoder
from medclip_hf.evaluation.intervals import Interval
from medclip_hf.evaluation.result_curves import reliability_curves, roc_curves
from medclip_hf.evaluation.results import (
    StoredResult,
    compare_models,
    data_fingerprint,
    describe,
    load_result,
    result_paths,
    save_result,
)
from medclip_hf.evaluation.run import EvaluationSettings, evaluate_task
from medclip_hf.evaluation.task_data import read_task_data, read_validation_data
from medclip_hf.evaluation.task_layouts import DATASETS_PREFIX
from medclip_hf.evaluation.tasks import TASKS, Task, read_task, task, with_split
from medclip_hf.explain.evaluation_pictures import bars_by_modality, summary_table, task_pictures, write_task_page
from medclip_hf.explain.evaluation_report import figure_table
from medclip_hf.explain.plots import MAX_BANDS
from medclip_hf.explain.report import Table

logger = logging.getLogger("evaluate")

SCORE_CT = Path(__file__).resolve().parent / "score_ct.py"
RUNS_HERE = ("zero_shot_classification", "retrieval", "ct_zero_shot")
FVLM = "fvlm"


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
    write_all(options.output, results, comparisons, patients)
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
    row, folder = work.task, Path(work.source)
    scores = options.scores or score_scans(model, work, options)
    labels = with_findings_of(find_labels(row, folder), scores)
    validation = None
    if options.validation_scores:
        validation = validation_scans(options.validation_scores, row, folder, labels.findings)
    stored = ct_result(options.output, row, model.name, scores, labels, settings, validation)
    return stored, labels.patient_ids


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


# What can be read ------------------------------------------------------------------------------------------------


def write_all(
    folder: Path,
    results: Mapping[str, Sequence[StoredResult]],
    comparisons: Mapping[str, Mapping[str, Any]],
    patients: Mapping[str, NDArray[Any] | None],
) -> None:
    """Table, comparisons, and a page with pictures for each task."""
    records = {name: [stored.record for stored in of_models] for name, of_models in results.items()}
    table = summary_table(records)
    print(f"\n{table.as_text()}")
    lines = [f"| {' | '.join(row)} |" for row in (table.header, ["---"] * len(table.header), *table.rows)]
    write_text_atomically(folder / "summary.md", "\n".join(lines) + "\n")
    write_text_atomically(folder / "comparisons.json", json.dumps(comparisons, indent=2, ensure_ascii=False) + "\n")
    for name, comparison in comparisons.items():
        difference = Interval(**comparison["difference"]).as_text("{:+.3f}")
        print(f"{name}: {difference}, p = {p_text(comparison['p_value'])}, Holm {p_text(comparison['p_holm'])}")
    for name, of_models in results.items():
        has_curves = records[name][0]["task_type"] != "retrieval"
        roc = roc_curves(of_models, patients[name], max_bands=MAX_BANDS) if has_curves else {}
        reliability = reliability_curves(of_models, patients[name]) if has_curves else {}
        pictures = task_pictures(records[name], roc, reliability)
        for picture_name, picture in pictures.items():
            (folder / name / f"{picture_name}.png").write_bytes(picture.content)
        write_task_page(folder / name / "report.html", records[name], comparisons, pictures)
    for name, task_type in (("by_modality", "zero_shot_classification"), ("by_modality_ct", "ct_zero_shot")):
        bars = bars_by_modality(records, task_type)  # apart: no model does both
        if bars is not None:
            (folder / f"{name}.png").write_bytes(bars)


def p_text(value: float | None) -> str:
    """A p-value for a reader."""
    return "undefined" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
