r"""Linear probe of frozen features: figures with intervals at several shares of the training data, as JSON and a table.

    python scripts/linear_probe.py --features embeddings.safetensors --table labels.csv --label class \
        --patients patient_id --output probe.json
    python scripts/linear_probe.py --features embeddings.npz --table labels.csv --findings effusion,nodule \
        --fractions 0.1,1 --seeds 0,1,2,3,4 --output probe.json
    python scripts/linear_probe.py --features embeddings.npz --table labels.csv --label class --published-c \
        --output probe.json
    python scripts/linear_probe.py --model runs/stage2/final --task siim_acr --data data/siim \
        --cache results/embeddings --output probe.json

Features and labels come from two files, or from a task and a model as scripts/evaluate.py takes them, whose cache of
embeddings is shared. Row n of the table belongs to row n of the features; a column "split" says train, validation or
test. C is chosen on validation. `--published-c` fixes it to the value of ConceptCLIP's release, meant for features that
are not normalised.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from medclip_hf.evaluation.encoders import load_encoder
from medclip_hf.evaluation.probe import (
    C_GRID,
    FRACTIONS,
    PUBLISHED_C,
    ProbeFigure,
    ProbeRun,
    probe_figures,
    run_linear_probe,
)
from medclip_hf.evaluation.probe_data import ProbeData, load_probe_data
from medclip_hf.evaluation.probe_task import embed_probe_data
from medclip_hf.evaluation.tasks import read_task, task
from medclip_hf.explain.evaluation_report import FIGURE_NAMES, interval_text
from medclip_hf.explain.report import Table


def numbers(text: str) -> list[float]:
    """The numbers of a list with commas."""
    return [float(part) for part in text.split(",")]


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The options of one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=Path, help="safetensors or npz, (samples, width)")
    parser.add_argument("--table", type=Path, help="CSV with a row for each row of the features")
    parser.add_argument("--model", help="instead of features: folder, Hub name or open_clip:…")
    parser.add_argument("--task", help="with --model: name of the benchmark table, or a JSON file")
    parser.add_argument("--data", help="with --model: folder of the data set, or datasets:<repository>")
    parser.add_argument("--cache", type=Path, help="with --model: folder of embeddings, of evaluate.py too")
    parser.add_argument("--num-workers", type=int, default=0, help="with --model: processes that decode images")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument("--label", help="column of the class of each sample")
    labels.add_argument("--findings", help="columns of several findings, with commas; 0, 1 or empty for unknown")
    parser.add_argument("--split", default="split", help="column of the split")
    parser.add_argument("--patients", help="column of the patient; default: every row is its own")
    parser.add_argument("--fractions", type=numbers, default=list(FRACTIONS), help="of the training samples")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="of their draws")
    penalty = parser.add_mutually_exclusive_group()
    penalty.add_argument("--c", type=numbers, default=list(C_GRID), help="values of C to choose from on validation")
    penalty.add_argument("--published-c", action="store_true", help=f"fix C to {PUBLISHED_C}")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap by patient")
    parser.add_argument("--device", default="cpu", help="of the optimiser and the model")
    parser.add_argument("--output", type=Path, required=True, help="JSON")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Probe; 0, or 2 for a mistake in what was asked."""
    options = parse_command_line(command_line)
    try:
        data = probe_data(options)
        runs = run_linear_probe(
            data.splits["train"],
            data.splits.get("validation"),
            data.splits["test"],
            len(data.class_names),
            fractions=options.fractions,
            seeds=[int(seed) for seed in options.seeds],
            inverse_penalties=[PUBLISHED_C] if options.published_c else options.c,
            device=options.device,
        )
        figures = probe_figures(runs, data.splits["test"], data.class_names, num_resamples=options.resamples)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    write_json(options.output, {"data": described(data), "runs": [as_dict(run, data) for run in runs], **kept(figures)})
    print(as_table(figures).as_text())
    print(f"\nMeans over seeds with 95 % intervals by test patient; ± over seeds. {options.output}")
    for name, reasons in data.set_aside.items():
        for reason, count in reasons.items():
            sys.stderr.write(f"{name}: {count} set aside: {reason}\n")
    stopped = sum(not run.is_converged for run in runs)
    if stopped:
        sys.stderr.write(
            f"{stopped} of {len(runs)} fits were stopped before they met the tolerance; see is_converged\n"
        )
    return 0


def probe_data(options: argparse.Namespace) -> ProbeData:
    """The splits, from two files or from a model and a task.

    Raises:
        ValueError: neither pair is named whole, or both are; or as the readers of either.
    """
    of_files, of_task = (options.features, options.table), (options.model, options.task, options.data)
    if any(of_files) == any(of_task) or not (all(of_files) or all(of_task)):
        raise ValueError("name either --features and --table, or --model, --task and --data.")
    if options.features:
        return load_probe_data(
            options.features,
            options.table,
            label_column=options.label,
            finding_columns=options.findings.split(",") if options.findings else (),
            split_column=options.split,
            patient_column=options.patients,
        )
    if options.label or options.findings or options.patients:
        raise ValueError("a task has its own labels and patients: leave --label, --findings and --patients out.")
    named = read_task(Path(options.task)) if options.task.endswith(".json") else task(options.task)
    encoder = load_encoder(options.model, device=options.device)
    return embed_probe_data(encoder, named, options.data, options.cache, num_workers=options.num_workers)


def described(data: ProbeData) -> dict[str, Any]:
    """Classes, the samples and patients of each split, and what was set aside."""
    return {
        "class_names": list(data.class_names),
        "splits": {
            name: {
                "samples": len(split.features),
                "patients": len(split.features) if split.groups is None else len(set(split.groups.tolist())),
            }
            for name, split in data.splits.items()
        },
        "set_aside": data.set_aside,
    }


def as_dict(run: ProbeRun, data: ProbeData) -> dict[str, Any]:
    """A run without its probabilities."""
    return {
        "fraction": run.fraction,
        "seed": run.seed,
        "num_train": run.num_train,
        "inverse_penalty": run.inverse_penalty,
        "validation_log_loss": {str(c): loss for c, loss in run.validation_log_loss.items()},
        "undefined": [data.class_names[k] for k in run.undefined],
        "is_converged": run.is_converged,
    }


def kept(figures: dict[float, dict[str, ProbeFigure]]) -> dict[str, Any]:
    """The figures for JSON, by fraction."""
    return {
        "figures": {
            str(fraction): {name: figure.as_dict() for name, figure in of_fraction.items()}
            for fraction, of_fraction in figures.items()
        }
    }


def as_table(figures: dict[float, dict[str, ProbeFigure]]) -> Table:
    """A row for each figure, a column for each fraction."""
    names = list(next(iter(figures.values())))
    rows = [
        [FIGURE_NAMES.get(name, name), *(as_cell(of_fraction[name]) for of_fraction in figures.values())]
        for name in names
    ]
    return Table(["Figure", *(f"{100 * fraction:g} %" for fraction in figures)], rows)


def as_cell(figure: ProbeFigure) -> str:
    """Mean, interval and deviation over seeds."""
    text = interval_text(figure.mean.as_dict())
    return text if figure.deviation is None else f"{text} ± {figure.deviation:.3f}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
