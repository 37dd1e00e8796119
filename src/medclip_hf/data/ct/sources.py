"""What scans there are: the trees of CT-RATE and Rad-ChestCT, or a table of a hospital's own files."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.ct.reading import Rescale
from medclip_hf.data.records import AnatomyText

# CT-RATE's words for the two splits, by table.
_CT_RATE_SPLITS = {"train": "train", "validation": "valid"}
_CT_RATE_TABLES = {
    "metadata": ("metadata", "{table}_metadata.csv"),
    "reports": ("radiology_text_reports", "{table}_reports.csv"),
    "labels": ("multi_abnormality_labels", "{split}_predicted_labels.csv"),
}
_RAD_CHESTCT_SPLITS = {
    "train": ("trn", "imgtrain"),
    "validation": ("val", "imgvalid"),
    "test": ("tst", "imgtest"),
}
_RAD_CHESTCT_ID = "NoteAcc_DEID"
_TABLE_COLUMNS = (
    *("image", "labels", "scan_id", "study_id", "patient_id"),
    *("series_uid", "findings", "impression"),
)
_LABEL_COLUMN = "label:"


@dataclass(frozen=True, eq=False)
class ScanSource:
    """Where a scan comes from and what is known of it besides its voxels.

    Args:
        scan_id: unique in the data set; letters, digits, ``.``, ``_`` and ``-``, since files are named after it.
        study_id: the examination; its reconstructions share it.
        patient_id: a pseudonym. It is written into the index and must not identify anyone.
        image_path: NIfTI, DICOM or npz.
        labels_path: label volume of TotalSegmentator, if there is one.
        rescale: where the file holds raw values; without it they are Hounsfield units.
        affine: (4, 4) from (x, y, z) to RAS+ mm, where the header is known to be wrong.
        series_uid: which DICOM series.
        findings: section of the report.
        impression: section of the report.
        labels: (finding, present).
        anatomy_texts: of a report decomposed already (`with_texts`), taken instead of findings and impression.
        problem: why the scan cannot be used, where its tables already tell; refused without being read.
    """

    scan_id: str
    study_id: str
    patient_id: str
    image_path: Path
    labels_path: Path | None = None
    rescale: Rescale | None = None
    affine: NDArray[np.float64] | None = None
    series_uid: str | None = None
    findings: str = ""
    impression: str = ""
    labels: tuple[tuple[str, bool], ...] = ()
    anatomy_texts: tuple[AnatomyText, ...] | None = None
    problem: str = ""


def ct_rate_sources(root: Path, split: str, tree: Literal["fixed", "older"] | None = None) -> list[ScanSource]:
    """The scans of CT-RATE as downloaded, ordered by name.

    Two trees exist. In ``train_fixed``/``valid_fixed`` headers are right and values are Hounsfield units; the slope and
    intercept of the metadata table must not be applied again. In the older ``train``/``valid`` both stand in that table
    alone. Label files (`ts_seg`) were made on the fixed volumes, whose voxels are the same.

    Args:
        root: the folder that holds ``dataset``, or that folder itself.
        split: "train" or "validation".
        tree: which one; the fixed one where it is there, by default.

    Raises:
        ValueError: where the tree, or the metadata table that the older one needs, is missing.
    """
    if split not in _CT_RATE_SPLITS:
        raise ValueError(f"CT-RATE has the splits {list(_CT_RATE_SPLITS)}, not {split!r}")
    base = root / "dataset" if (root / "dataset").is_dir() else root
    name = _CT_RATE_SPLITS[split]
    folders = {"fixed": base / f"{name}_fixed", "older": base / name}
    tree = tree or ("fixed" if folders["fixed"].is_dir() else "older")
    if not folders[tree].is_dir():
        raise ValueError(f"no CT-RATE volumes at {folders[tree]}. Name the folder that holds its 'dataset' folder.")
    reports = _ct_rate_table(base, "reports", split)
    labels = _ct_rate_table(base, "labels", split)
    metadata = _ct_rate_table(base, "metadata", split) if tree == "older" else {}
    if tree == "older" and not metadata:
        raise ValueError(
            f"{folders[tree]} needs the metadata table below {base / 'metadata'}, which alone has spacing, slope and "
            "intercept of these files. Download it, or the fixed tree."
        )
    sources = []
    for path in sorted(folders[tree].rglob("*.nii.gz")):
        rescale, affine, problem = _ct_rate_geometry(metadata.get(path.name)) if tree == "older" else (None, None, "")
        report = reports.get(path.name, {})
        segmentation = base / "ts_seg" / "ts_total" / f"{name}_fixed" / path.relative_to(folders[tree])
        scan_id = path.name.removesuffix(".nii.gz")
        study_id = scan_id.rpartition("_")[0]
        sources.append(
            ScanSource(
                scan_id=scan_id,
                study_id=study_id,
                patient_id=study_id.rpartition("_")[0],
                image_path=path,
                labels_path=segmentation if segmentation.is_file() else None,
                rescale=rescale,
                affine=affine,
                findings=report.get("Findings_EN", ""),
                impression=report.get("Impressions_EN", ""),
                labels=_flags({key: value for key, value in labels.get(path.name, {}).items() if key != "VolumeName"}),
                problem=problem,
            )
        )
    return sources


def _ct_rate_table(base: Path, kind: str, split: str) -> dict[str, dict[str, str]]:
    folder, pattern = _CT_RATE_TABLES[kind]
    name = pattern.format(split=_CT_RATE_SPLITS[split], table=split)
    for path in (base / folder / name, base / f"dataset_{folder}_{name}"):  # as a tree, as flat downloads
        if path.is_file():
            return {row["VolumeName"]: row for row in _read_csv(path, ["VolumeName"])}
    return {}


def _ct_rate_geometry(row: dict[str, str] | None) -> tuple[Rescale | None, NDArray[np.float64] | None, str]:
    """Rescale and affine out of a row of the metadata table, or why there are none."""
    if row is None:
        return None, None, "not in the metadata table, which alone has its slope, intercept and spacing"
    try:
        rescale = Rescale(float(row["RescaleSlope"]), float(row["RescaleIntercept"]))
        width_mm, height_mm = _numbers(row["XYSpacing"], 2)
        position = _numbers(row["ImagePositionPatient"], 3)
        cosines = np.array(_numbers(row["ImageOrientationPatient"], 6))
        depth_mm = float(row["ZSpacing"])
    except (KeyError, TypeError, ValueError) as error:
        return None, None, f"its row of the metadata table cannot be used: {error!r}"
    affine = np.eye(4)
    affine[:3, 0] = cosines[:3] * width_mm
    affine[:3, 1] = cosines[3:] * height_mm
    affine[:3, 2] = np.cross(cosines[:3], cosines[3:]) * depth_mm
    affine[:3, 3] = position
    return rescale, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, ""  # the table speaks DICOM's LPS


def _numbers(text: str, count: int) -> list[float]:
    """The numbers of "[0.7, 0.7]" or "['0.7', '0.7']"."""
    found = [float(match) for match in re.findall(r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?", text)]
    if len(found) != count:
        raise ValueError(f"expected {count} numbers, got {text!r}")
    return found


def rad_chestct_sources(root: Path, split: str, segmentations: Path | None = None) -> list[ScanSource]:
    """The scans of Rad-ChestCT as downloaded, ordered by name; a finding is present where any location has it.

    The data set has no masks. Make them with ``scripts/prepare_ct.py --segment``, or name a folder of label files
    called ``<scan>.nii.gz``.

    Args:
        root: folder of the ``.npz`` files and tables.
        split: "train", "validation" or "test".
        segmentations: folder of label files.

    Raises:
        ValueError: where there are no volumes of the split.
    """
    if split not in _RAD_CHESTCT_SPLITS:
        raise ValueError(f"Rad-ChestCT has the splits {list(_RAD_CHESTCT_SPLITS)}, not {split!r}")
    prefix, table = _RAD_CHESTCT_SPLITS[split]
    paths = sorted(root.rglob(f"{prefix}*.npz"))
    if not paths:
        raise ValueError(f"no {prefix}*.npz below {root}. Name the folder of the unpacked archive.")
    label_table, summary = root / f"{table}_Abnormality_and_Location_Labels.csv", root / "Summary_3630.csv"
    findings = rad_chestct_labels(label_table) if label_table.is_file() else {}
    patients = rad_chestct_patients(summary) if summary.is_file() else {}
    sources = []
    for path in paths:
        scan_id = path.stem
        segmentation = segmentations / f"{scan_id}.nii.gz" if segmentations else None
        sources.append(
            ScanSource(
                scan_id=scan_id,
                study_id=scan_id,
                patient_id=patients.get(scan_id, scan_id),
                image_path=path,
                labels_path=segmentation if segmentation and segmentation.is_file() else None,
                labels=tuple(sorted(findings.get(scan_id, {}).items())),
            )
        )
    return sources


def rad_chestct_labels(path: Path) -> dict[str, dict[str, bool]]:
    """Per scan, which findings are present at any location, from the columns "<finding>*<location>" of one table.

    Raises:
        ValueError: no such table, no column of scans, a cell that is not 0 or 1, or a scan that occurs twice.
    """
    found: dict[str, dict[str, bool]] = {}
    for row in _read_csv(path, [_RAD_CHESTCT_ID]):
        scan_id = Path(row[_RAD_CHESTCT_ID]).stem
        if scan_id in found:
            raise ValueError(f"{path} labels the scan {scan_id} twice")
        present: dict[str, bool] = {}
        for column, cell in row.items():
            if column == _RAD_CHESTCT_ID:
                continue
            if cell.strip() not in ("0", "1", "0.0", "1.0"):
                raise ValueError(f"{path}, {scan_id}, {column}: expected 0 or 1, got {cell!r}")
            finding = column.partition("*")[0]
            present[finding] = present.get(finding, False) or _is_true(cell)
        found[scan_id] = present
    return found


def rad_chestct_patients(path: Path) -> dict[str, str]:
    """Per scan, the pseudonym of its patient, from ``Summary_3630.csv``.

    Raises:
        ValueError: no such table, or it lacks a column.
    """
    rows = _read_csv(path, [_RAD_CHESTCT_ID, "MRN_DEID"])
    return {Path(row[_RAD_CHESTCT_ID]).stem: row["MRN_DEID"] for row in rows}


def table_sources(path: Path) -> list[ScanSource]:
    """The scans of a CSV table, in its order: how a hospital names its own files.

    Columns: ``image`` (required; relative to the table), ``labels`` (label volume), ``scan_id``, ``study_id``,
    ``patient_id`` (pseudonyms), ``series_uid``, ``findings``, ``impression``, and ``label:<finding>`` with 0 or 1.
    Where an identifier is missing, a hash of the image path stands for it, since paths may carry names.

    Raises:
        ValueError: for a missing or unknown column.
    """
    rows = _read_csv(path, ["image"])
    columns = list(rows[0]) if rows else []
    unknown = [name for name in columns if name not in _TABLE_COLUMNS and not name.startswith(_LABEL_COLUMN)]
    if unknown:
        raise ValueError(
            f"{path}: unknown columns {unknown}. Known are {list(_TABLE_COLUMNS)} and '{_LABEL_COLUMN}<finding>'."
        )
    return list(_rows_to_sources(rows, path.parent))


def _rows_to_sources(rows: Sequence[dict[str, str]], folder: Path) -> Iterator[ScanSource]:
    for row in rows:
        scan_id = row.get("scan_id") or hashlib.blake2b(row["image"].encode(), digest_size=8).hexdigest()
        study_id = row.get("study_id") or scan_id
        yield ScanSource(
            scan_id=scan_id,
            study_id=study_id,
            patient_id=row.get("patient_id") or study_id,
            image_path=folder / row["image"],
            labels_path=folder / row["labels"] if row.get("labels") else None,
            series_uid=row.get("series_uid") or None,
            findings=row.get("findings", ""),
            impression=row.get("impression", ""),
            labels=_flags(
                {
                    name.removeprefix(_LABEL_COLUMN): value
                    for name, value in row.items()
                    if name.startswith(_LABEL_COLUMN) and value != ""
                }
            ),
        )


def with_texts(sources: Sequence[ScanSource], path: Path) -> list[ScanSource]:
    """The sources with the texts of ``anatomy_texts.jsonl``, which scripts/decompose_reports.py writes for each study.

    A study that the file does not hold was set aside there: its scans have no texts.

    Raises:
        ValueError: where the file is missing, damaged, or holds none of the studies.
    """
    texts: dict[str, tuple[AnatomyText, ...]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                record = json.loads(line)
                texts[record["study_id"]] = tuple(AnatomyText(**text) for text in record["anatomy_texts"])
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no anatomy_texts.jsonl of scripts/decompose_reports.py: {error!r}") from error
    if not any(source.study_id in texts for source in sources):
        raise ValueError(f"{path} holds none of the {len({source.study_id for source in sources})} studies")
    return [replace(source, anatomy_texts=texts.get(source.study_id, ())) for source in sources]


def _flags(values: dict[str, str]) -> tuple[tuple[str, bool], ...]:
    return tuple((name, _is_true(value)) for name, value in values.items())


def _is_true(value: str) -> bool:
    return value.strip() not in ("", "0", "0.0", "False", "false")


def _read_csv(path: Path, required: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a table that has the required columns, missing cells as empty strings."""
    if not path.is_file():
        raise ValueError(f"no table at {path}")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="")
        missing = [name for name in required if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} lacks the columns {missing}; it has {reader.fieldnames}")
        return [{key: value for key, value in row.items() if key is not None} for row in reader]
