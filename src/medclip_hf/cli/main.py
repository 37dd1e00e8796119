"""The `medclip-hf` command: embeddings, scores and concepts of files, and what is installed.

Imports at the top are light: models and PyTorch are loaded by the command that needs them, so that `--help` is quick.
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

NOTHING_USABLE = 1
MISTAKE = 2

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Files = Annotated[list[str], typer.Argument(help="Files and folders; '-' reads paths from standard input.")]
Model = Annotated[str, typer.Option("--model", "-m", help="Folder or Hub name of a ConceptCLIP or an fVLM.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the Hub.")]
Output = Annotated[str, typer.Option("--output", "-o", help="File to write; '-' is standard output.")]
Format = Annotated[str | None, typer.Option(help="csv, json, jsonl or parquet; default: by the file's ending.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; default: the accelerator if there is one.")]
DType = Annotated[str, typer.Option(help="auto (that of the file), float32, bfloat16 or float16.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]
Masks = Annotated[Path | None, typer.Option(help="CT: label file, or folder of <scan>.nii.gz (TotalSegmentator).")]
LabelVersion = Annotated[str, typer.Option(help="CT: v1 or v2, of TotalSegmentator that wrote the labels.")]
Segmenter = Annotated[str | None, typer.Option(help="CT: totalsegmentator or bundle:<folder>, run without --masks.")]
WithoutMask = Annotated[
    str | None, typer.Option(help="CT: whole-volume takes scans without a mask all the same, and flags them.")
]
SeriesUID = Annotated[str | None, typer.Option(help="CT: which DICOM series, where a folder holds several.")]


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """A mistake of the caller ends with one sentence on standard error, not with a traceback."""

    @wraps(command)
    def told(*args: Any, **kwargs: Any) -> None:
        _show_warnings()
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # `medclip-hf ... | head`: the reader has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except KeyboardInterrupt:
            sys.stderr.write("\nstopped; nothing was written\n")
            raise typer.Exit(130) from None
        except (ValueError, OSError, ImportError) as error:
            sys.stderr.write(f"error: {error}\n")
            raise typer.Exit(MISTAKE) from error

    return told


def _show_warnings() -> None:
    """What this package warns of goes to standard error; other packages have handlers of their own."""
    logger = logging.getLogger("medclip_hf")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        typer.echo(version("medclip-hf"))
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Embed, classify and annotate medical images and CT scans. For research only: no medical device."""


@app.command()
@_told
def embed(
    files: Files,
    model: Model,
    output: Output = "-",
    format: Format = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = "auto",
    batch_size: BatchSize = 16,
    masks: Masks = None,
    label_version: LabelVersion = "v2",
    segmenter: Segmenter = None,
    without_mask: WithoutMask = None,
    series_uid: SeriesUID = None,
) -> None:
    """One vector for each image (ConceptCLIP), or for each anatomy of each CT scan (fVLM)."""
    job = _Job(files, model, output, format, revision)
    from medclip_hf.cli import work

    if job.model_type == "conceptclip":
        pipe = job.pipeline("image-feature-extraction", device, dtype)
        job.write(work.IMAGE_EMBEDDING, work.embed_images(pipe, job.paths, job.aside, batch_size))
        return
    reading = _reading(masks, label_version, segmenter, without_mask, series_uid)
    pipe = job.pipeline("ct-feature-extraction", device, dtype)
    job.write(work.CT_EMBEDDING, work.embed_scans(pipe, job.paths, job.aside, 1, reading))


@app.command()
@_told
def classify(
    files: Files,
    model: Model,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="Image: a class; repeat it.")] = None,
    template: Annotated[list[str] | None, typer.Option(help="Image: a prompt with one {}; repeat it.")] = None,
    activation: Annotated[
        str, typer.Option(help="Image: softmax (one is true) or sigmoid (each by itself).")
    ] = "softmax",
    findings: Annotated[Path | None, typer.Option(help="CT: CSV with name, anatomy, absent, present.")] = None,
    output: Output = "-",
    format: Format = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = "auto",
    batch_size: BatchSize = 16,
    masks: Masks = None,
    label_version: LabelVersion = "v2",
    segmenter: Segmenter = None,
    without_mask: WithoutMask = None,
    series_uid: SeriesUID = None,
) -> None:
    """Zero-shot scores: of labels for each image, or of findings for each CT scan."""
    job = _Job(files, model, output, format, revision)
    from medclip_hf.cli import work

    if job.model_type == "conceptclip":
        if not label:
            raise ValueError("name the classes, each with --label.")
        if activation not in ("softmax", "sigmoid"):
            raise ValueError(f"--activation is softmax or sigmoid, but {activation!r} came.")
        if activation == "softmax" and len(label) == 1:
            raise ValueError("softmax gives a single class 1 whatever the image: name others, or --activation sigmoid.")
        pipe = job.pipeline("zero-shot-image-classification", device, dtype)
        rows = work.classify_images(pipe, job.paths, job.aside, batch_size, label, template, activation)
        job.write(work.IMAGE_SCORES, rows)
        return
    if label:
        raise ValueError(
            f"{model} is an fVLM, which scores pairs of prompts in anatomies: use --findings, not --label."
        )
    reading = _reading(masks, label_version, segmenter, without_mask, series_uid)
    chosen = _read_findings(findings) if findings else None
    pipe = job.pipeline("ct-zero-shot-classification", device, dtype)
    job.write(work.CT_SCORES, work.classify_scans(pipe, job.paths, job.aside, 1, reading, chosen))


@app.command()
@_told
def annotate(
    files: Files,
    model: Model,
    concepts: Annotated[Path | None, typer.Option(help="JSON lines with canonical_name and concept_id.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Concepts of each image.")] = 10,
    threshold: Annotated[float, typer.Option(help="Least score.")] = 0.0,
    output: Output = "-",
    format: Format = None,
    revision: Revision = None,
    device: Device = None,
    dtype: DType = "auto",
    batch_size: BatchSize = 16,
) -> None:
    """Medical concepts of each image with identifier, score and box (ConceptCLIP)."""
    job = _Job(files, model, output, format, revision)
    from medclip_hf.cli import work

    if job.model_type != "conceptclip":
        raise ValueError(f"{model} is an {job.model_type}; annotate takes a ConceptCLIP.")
    pipe = job.pipeline("medical-concept-annotation", device, dtype)
    rows = work.annotate_images(
        pipe, job.paths, job.aside, batch_size, concepts=concepts, top_k=top_k, threshold=threshold
    )
    job.write(work.ANNOTATIONS, rows)


@app.command()
@_told
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Plain values instead of tables.")] = False,
) -> None:
    """Versions, devices, decoders for compressed DICOM, caches, and what is missing."""
    from medclip_hf.cli.doctor import examine, is_sound, print_tables

    found = examine()
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        print_tables(found)
    if not is_sound(found):
        raise typer.Exit(NOTHING_USABLE)


class _Job:
    """What three commands share: checked arguments first, then files, then the model, then rows."""

    def __init__(self, files: list[str], model: str, output: str, chosen: str | None, revision: str | None) -> None:
        from medclip_hf.cli.files import SetAside, named_paths, pictures, scans
        from medclip_hf.cli.tables import format_of
        from medclip_hf.hub.loading import model_type_of

        self.model, self.output, self.revision = model, output, revision
        self.format = format_of(output, chosen)
        self.model_type = model_type_of(model, revision)
        find = pictures if self.model_type == "conceptclip" else scans
        self.paths = list(find(named_paths(files)))
        self.aside = SetAside()

    def pipeline(self, task: str, device: str | None, dtype: str) -> Any:
        """The pipeline of the job's model."""
        from medclip_hf.cli.loading import load_pipeline

        return load_pipeline(task, self.model, revision=self.revision, device=device, dtype=dtype)

    def write(self, columns: Any, rows: Any) -> None:
        """All rows, then the files that were set aside; an exit code other than 0 where no file could be used."""
        from medclip_hf.cli.tables import STANDARD_OUTPUT, open_table

        with open_table(self.output, self.format, columns) as table:
            for row in rows:
                table.write(row)
        if self.output != STANDARD_OUTPUT:
            self.aside.write(Path(f"{self.output}.set_aside.csv"))
        sys.stderr.write(f"{self.aside.num_used} files used, {len(self.aside.reasons)} set aside\n")
        if not self.aside.num_used:
            raise typer.Exit(NOTHING_USABLE)


def _reading(
    masks: Path | None, label_version: str, segmenter: str | None, without_mask: str | None, series_uid: str | None
) -> dict[str, Any]:
    """How scans are read."""
    from medclip_hf.cli.work import masks_of

    if label_version not in ("v1", "v2"):
        raise ValueError(f"--label-version is v1 or v2, but {label_version!r} came.")
    if without_mask not in (None, "whole-volume"):
        raise ValueError(f"--without-mask is whole-volume, but {without_mask!r} came.")
    if segmenter is not None:
        from medclip_hf.data.ct.segmenters import Segmenter

        Segmenter.from_text(segmenter)
    if masks is None and segmenter is None and without_mask is None:
        raise ValueError(
            "fVLM scores anatomies inside their masks: name --masks, or --segmenter totalsegmentator, or accept "
            "--without-mask whole-volume."
        )
    return {
        "find_mask": masks_of(masks),
        "label_version": label_version,
        "segmenter": segmenter,
        "without_mask": without_mask,
        "series_uid": series_uid,
    }


def _read_findings(path: Path) -> list[dict[str, str]]:
    """The findings of a CSV table.

    Raises:
        ValueError: it lacks a column, or every row.
    """
    import csv

    columns = ("name", "anatomy", "absent", "present")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV table in UTF-8: {error}") from error
    if not rows or any(not (row.get(column) or "").strip() for row in rows for column in columns):
        raise ValueError(f"{path} must have rows with the columns {', '.join(columns)}, no cell empty.")
    return [{column: row[column].strip() for column in columns} for row in rows]


def run() -> None:
    """The entry point of the command."""
    app()


if __name__ == "__main__":
    run()
