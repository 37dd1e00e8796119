r"""Score a folder of CT scans zero-shot: one probability for each finding of each scan, as a CSV that can be continued.

    python scripts/score_ct.py --model runs/fvlm/final --images scans --labels segmentations --output scores.csv
    python scripts/score_ct.py --model runs/fvlm/final --table scans.csv --findings findings.csv --output scores.csv
    python scripts/score_ct.py --model runs/fvlm/final --prepared prepared --split validation --output scores.csv

Scans are NIfTI files, DICOM folders or npz, each with a label file of TotalSegmentator on its grid; they are brought to
the geometry that the model's processor demands. A scan that cannot be used has its reason in the column "refused".
Broken off, it goes on where it was when started again. For research only: no medical device.
"""

import argparse
import csv
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import medclip_hf  # noqa: F401 - makes the Auto classes know fVLM
from medclip_hf.data.ct.geometry import GeometryContract
from medclip_hf.data.ct.reading import load_ct
from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.ct.sources import ScanSource, ct_rate_sources, rad_chestct_sources, table_sources
from medclip_hf.evaluation.ct_zero_shot import (
    CT_RATE_FINDINGS,
    Finding,
    embed_findings,
    score_to_csv,
)
from medclip_hf.hub.loading import load_saved
from medclip_hf.modeling.fvlm import FVLMModel
from medclip_hf.pipelines.pipeline_ct import window_of
from medclip_hf.training.scan_datasets import stored_scan_inputs

logger = logging.getLogger("score_ct")

Scan = tuple[str, Callable[[], tuple[Tensor, Tensor]]]

FINDING_COLUMNS = ("name", "anatomy", "absent", "present")


def parse_command_line(command_line: list[str] | None) -> argparse.Namespace:
    """The command line, or what stands for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of an fVLM")
    parser.add_argument("--revision", help="of a model on the Hub")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", type=Path, help="folder of scans; --labels names the folder of label files")
    source.add_argument("--table", type=Path, help="CSV with the column 'image' and others, see data.ct.sources")
    source.add_argument("--ct-rate", type=Path, help="folder of CT-RATE as downloaded")
    source.add_argument("--rad-chestct", type=Path, help="folder of Rad-ChestCT as downloaded")
    source.add_argument("--prepared", type=Path, help="folder of scripts/prepare_ct.py")
    parser.add_argument("--labels", type=Path, help="label files <scan>.nii.gz of --images or --rad-chestct")
    parser.add_argument("--label-version", choices=("v1", "v2"), default="v2", help="of TotalSegmentator's ids")
    parser.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    parser.add_argument("--findings", type=Path, help=f"CSV with the columns {', '.join(FINDING_COLUMNS)}")
    parser.add_argument("--protocol", choices=("published", "shared"), default="published", help="of the windows")
    parser.add_argument("--window", type=int, nargs=3, metavar=("D", "H", "W"), help="smallest window, voxels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="CSV; rows that it holds are kept")
    return parser.parse_args(command_line)


def main(command_line: list[str] | None = None) -> int:
    """Score the scans; 0 if there are scores, 1 if all scans were refused, 2 for a mistake in what was asked."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = parse_command_line(command_line)
    try:
        counts = run(options)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"{counts['scored']} scored, {counts['found']} there already, {counts['refused']} refused: {options.output}")
    return 0 if counts["scored"] + counts["found"] else 1


def run(options: argparse.Namespace) -> dict[str, int]:
    """Load model and processor, find scans and findings, score."""
    model, processor = load_saved(options.model, revision=options.revision)
    if not isinstance(model, FVLMModel):
        raise ValueError(f"{options.model} is a {type(model).__name__}, but an FVLMModel is needed.")
    model.to(options.device)
    scans = list(find_scans(options, model, processor.image_processor))
    if not scans:
        raise ValueError("there is no scan to score: name a folder that holds NIfTI files, DICOM folders or npz files.")
    findings = read_findings(options.findings) if options.findings else published_findings(model)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return score_to_csv(
        options.output,
        scans,
        model,
        embed_findings(model, processor.tokenizer, findings),
        protocol=options.protocol,
        window_size_dhw=tuple(options.window) if options.window else window_of(model),
    )


def find_scans(options: argparse.Namespace, model: Any, image_processor: Any) -> Iterator[Scan]:
    """(scan_id, how to load it) of every scan of whichever source was named."""
    if options.prepared:
        for row in read_scan_rows(options.prepared, options.split):
            yield row.scan_id, partial(stored_scan_inputs, options.prepared / row.store_path, image_processor)
        return
    for source in find_sources(options):
        yield source.scan_id, partial(load_source, source, options.label_version, image_processor)


def find_sources(options: argparse.Namespace) -> list[ScanSource]:
    """The files of scans, before they are read."""
    if options.table:
        return table_sources(options.table)
    if options.ct_rate:
        return ct_rate_sources(options.ct_rate, options.split)
    if options.rad_chestct:
        return rad_chestct_sources(options.rad_chestct, options.split, options.labels)
    if options.labels is None:
        raise ValueError("--images needs --labels: the folder of label files, one <scan>.nii.gz for each scan.")
    if not options.images.is_dir():
        raise ValueError(f"--images {options.images} is no folder.")
    return [source_of(path, options.labels) for path in sorted(options.images.iterdir()) if is_scan(path)]


def is_scan(path: Path) -> bool:
    """Whether an entry of the folder can be a scan; hidden files and those of other kinds are passed over."""
    if path.name.startswith("."):
        return False
    return path.is_dir() or path.name.lower().endswith((".nii", ".nii.gz", ".npz", ".dcm"))


def source_of(path: Path, labels: Path) -> ScanSource:
    """The scan of a file or folder, named after it."""
    name = path.name
    for ending in (".nii.gz", ".nii", ".npz", ".dcm"):
        name = name[: -len(ending)] if name.lower().endswith(ending) else name
    return ScanSource(name, name, name, path, labels_path=labels / f"{name}.nii.gz")


def load_source(source: ScanSource, label_version: Any, image_processor: Any) -> tuple[Tensor, Tensor]:
    """Volume in [0, 1] and anatomy mask of a scan, as the model takes them.

    Raises:
        ValueError: the scan cannot be used, with the reason.
    """
    if source.problem or source.labels_path is None:
        raise ValueError(source.problem or f"{source.image_path}: no label file; segment it first")
    asked = {name: getattr(image_processor, name) for name in GeometryContract().to_dict()}
    scan = load_ct(
        source.image_path,
        GeometryContract.from_dict(asked),
        labels_path=source.labels_path,
        label_version=label_version,
        anatomies=image_processor.anatomies,
        rescale=source.rescale,
        affine=source.affine,
        series_uid=source.series_uid,
    )
    mask = scan.anatomy_mask
    assert mask is not None  # labels were named
    inputs = image_processor(scan.image.values, anatomy_mask=mask.values)
    return inputs["pixel_values"][0, 0], inputs["anatomy_mask"][0]


def read_findings(path: Path) -> list[Finding]:
    """The findings of a table, in its order.

    Raises:
        ValueError: the table lacks a column, a cell or every row, or repeats a name.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    findings = [Finding(*((row.get(column) or "").strip() for column in FINDING_COLUMNS)) for row in rows]
    if not findings or not all(all(vars(finding).values()) for finding in findings):
        raise ValueError(f"{path} must have rows with the columns {', '.join(FINDING_COLUMNS)}, no cell empty.")
    if len({finding.name for finding in findings}) < len(findings):
        raise ValueError(f"{path} names a finding twice; each needs a name, and a column, of its own.")
    return findings


def published_findings(model: Any) -> list[Finding]:
    """Those of the 16 CT-RATE findings whose anatomy the model knows.

    Raises:
        ValueError: there is none.
    """
    findings = [finding for finding in CT_RATE_FINDINGS if finding.anatomy in model.config.anatomies]
    if not findings:
        raise ValueError(
            f"the model knows {model.config.anatomies}, none of them an anatomy of the CT-RATE findings. Name your own "
            "with --findings."
        )
    return findings


if __name__ == "__main__":
    sys.exit(main())
