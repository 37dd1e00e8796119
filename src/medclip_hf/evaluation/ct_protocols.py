"""CT-RATE and Rad-ChestCT: scores of scans against label tables, by the published rule and by a sound one.

The release counts volumes, takes a missing score for 0 and chooses each finding's threshold on the very labels that it
reports. Those figures are here to be compared with published ones, and are marked. Beside them stand figures whose
threshold was chosen elsewhere: on validation scores where they are given, else on the other patients (five folds), with
intervals by patient; by volume, by study and by patient.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.ct.sources import rad_chestct_labels, rad_chestct_patients
from medclip_hf.evaluation.csv_tables import open_csv
from medclip_hf.evaluation.ct_zero_shot import RAD_CHESTCT_TO_CT_RATE, published_operating_point
from medclip_hf.evaluation.decisions import ScoredFindings, figures_with_chosen_thresholds
from medclip_hf.evaluation.intervals import mean_with_interval
from medclip_hf.evaluation.metrics import auroc
from medclip_hf.evaluation.tasks import Task

logger = logging.getLogger(__name__)

Unit = Literal["volume", "study", "patient"]
UNITS: tuple[Unit, ...] = ("volume", "study", "patient")
_NIFTI = ".nii.gz"
_SCORE_COLUMNS = ("scan_id", "refused")
_CT_RATE_ID = "VolumeName"
_ON_TEST_LABELS = "chosen on the test labels, as published: too good as an estimate for new scans"


@dataclass(frozen=True)
class LabelTable:
    """Labels of N scans.

    Args:
        scan_ids: unique.
        study_ids: (N,) examination of each; its reconstructions share it.
        patient_ids: (N,).
        findings: F names.
        labels: (N, F) bool.
    """

    scan_ids: tuple[str, ...]
    study_ids: NDArray[np.str_]
    patient_ids: NDArray[np.str_]
    findings: tuple[str, ...]
    labels: NDArray[np.bool_]

    def rows(self, places: NDArray[np.int64]) -> "LabelTable":
        """Some of its scans."""
        ids = tuple(self.scan_ids[place] for place in places)
        return LabelTable(ids, self.study_ids[places], self.patient_ids[places], self.findings, self.labels[places])


@dataclass(frozen=True)
class ScoredScans:
    """Scores of the scans of a label table.

    Args:
        table: the scans that have a row of scores.
        scores: (N, F), NaN where a scan lacks the finding's anatomy.
        counts: scans with scores, refused ones, without scores, without labels.
    """

    table: LabelTable
    scores: NDArray[np.float64]
    counts: dict[str, int]


# Tables ----------------------------------------------------------------------------------------------------------


def read_ct_rate_labels(path: Path, findings: Sequence[str]) -> LabelTable:
    """Labels of CT-RATE's table ``{train,valid}_predicted_labels.csv``, or of any with the same columns.

    A volume's name is <split>_<patient>_<study>_<reconstruction>. Tables of other data sets may have the columns
    ``scan_id``, ``study_id`` and ``patient_id`` instead of ``VolumeName``.

    Args:
        path: of the table.
        findings: columns to take.

    Raises:
        ValueError: a column or every row is missing, a scan occurs twice, a label is not 0 or 1.
    """
    rows = _read_table(path)
    column = _CT_RATE_ID if _CT_RATE_ID in rows[0] else "scan_id"
    lacking = [name for name in (column, *findings) if name not in rows[0]]
    if lacking:
        raise ValueError(f"{path} lacks the columns {lacking}; it has {list(rows[0])}")
    scan_ids = [row[column].strip().removesuffix(_NIFTI) for row in rows]
    studies = [row.get("study_id") or _shorter(scan_id) for row, scan_id in zip(rows, scan_ids, strict=True)]
    patients = [row.get("patient_id") or _shorter(study) for row, study in zip(rows, studies, strict=True)]
    labels = [
        [_flag(row[name], f"{path}, {scan_id}, {name}") for name in findings]
        for row, scan_id in zip(rows, scan_ids, strict=True)
    ]
    return _label_table(path, scan_ids, studies, patients, findings, labels)


def read_rad_chestct_labels(paths: Sequence[Path], summary: Path | None = None) -> LabelTable:
    """Labels of Rad-ChestCT's tables, mapped to the findings of CT-RATE; a scan has a finding wherever it is located.

    Args:
        paths: ``img{train,valid}_Abnormality_and_Location_Labels.csv`` and the like; all are taken.
        summary: ``Summary_3630.csv``, which names patients; None: each scan is a patient of its own.

    Raises:
        ValueError: as `read_ct_rate_labels`.
    """
    findings = tuple(finding for names in RAD_CHESTCT_TO_CT_RATE.values() for finding in names)
    scan_ids: list[str] = []
    labels: list[list[bool]] = []
    for path in paths:
        for scan_id, present in rad_chestct_labels(path).items():
            lacking = [name for name in RAD_CHESTCT_TO_CT_RATE if name not in present]
            if lacking:
                raise ValueError(f"{path} has no columns for {lacking}: expected '<abnormality>*<location>'")
            scan_ids.append(scan_id)
            labels.append([present[name] for name, mapped in RAD_CHESTCT_TO_CT_RATE.items() for _ in mapped])
    patient_of = {} if summary is None else rad_chestct_patients(summary)
    patients = [patient_of.get(scan_id, scan_id) for scan_id in scan_ids]
    return _label_table(paths[0], scan_ids, scan_ids, patients, findings, labels)


def find_labels(task: Task, folder: Path) -> LabelTable:
    """The labels of a CT task from the folder of the data set as downloaded.

    Raises:
        ValueError: the tables are not there, or the task has another layout.
    """
    if task.layout == "ct_rate":
        word = {"validation": "valid", "train": "train"}.get(task.split)
        name = f"{word}_predicted_labels.csv"
        places = ("dataset/multi_abnormality_labels", "multi_abnormality_labels", ".")
        paths = [folder / place / name for place in places] + [folder / f"dataset_multi_abnormality_labels_{name}"]
        found = [path for path in paths if path.is_file()]
        if not found:
            raise ValueError(
                f"no label table of the split {task.split!r} of CT-RATE below {folder}: expected {paths[0]}"
            )
        return read_ct_rate_labels(found[0], task.class_names or ())
    if task.layout == "rad_chestct":
        words = {"train": "imgtrain", "validation": "imgvalid", "test": "imgtest"}
        chosen = [words[task.split]] if task.split in words else list(words.values())
        paths = [folder / f"{word}_Abnormality_and_Location_Labels.csv" for word in chosen]
        if not all(path.is_file() for path in paths):
            raise ValueError(f"no label tables of Rad-ChestCT in {folder}: expected {[path.name for path in paths]}")
        summary = folder / "Summary_3630.csv"
        return read_rad_chestct_labels(paths, summary if summary.is_file() else None)
    raise ValueError(f"{task.name} has the layout {task.layout}; CT labels are read of ct_rate and rad_chestct")


def with_findings_of(table: LabelTable, path: Path) -> LabelTable:
    """The labels of those findings that a table of scores has: a model scores those whose anatomy it knows.

    Raises:
        ValueError: there is none.
    """
    header = _read_table(path)[0]
    kept = [place for place, name in enumerate(table.findings) if name in header]
    if not kept:
        raise ValueError(f"{path} has none of the findings {list(table.findings)}")
    return replace(table, findings=tuple(table.findings[place] for place in kept), labels=table.labels[:, kept])


def read_scores(path: Path, table: LabelTable) -> ScoredScans:
    """Scores of ``scripts/score_ct.py`` joined with labels by scan.

    Raises:
        ValueError: the table lacks a finding, holds a scan twice or a value that is no probability, or has no scan in
            common with the labels.
    """
    rows = _read_table(path)
    lacking = [name for name in (*_SCORE_COLUMNS, *table.findings) if name not in rows[0]]
    if lacking:
        raise ValueError(f"{path} lacks the columns {lacking}; it has {list(rows[0])}")
    by_scan: dict[str, dict[str, str]] = {}
    for row in rows:
        scan_id = row["scan_id"].removesuffix(_NIFTI)
        if scan_id in by_scan:
            raise ValueError(f"{path} holds the scan {scan_id} twice. Score into a new file.")
        by_scan[scan_id] = row
    refused = {scan_id for scan_id, row in by_scan.items() if row["refused"]}
    places = [place for place, scan_id in enumerate(table.scan_ids) if scan_id in by_scan and scan_id not in refused]
    if not places:
        raise ValueError(f"{path} and the labels have no scored scan in common: check that they are of one split")
    scores = [[_probability(by_scan[table.scan_ids[place]][name], path) for name in table.findings] for place in places]
    labelled = set(table.scan_ids)
    counts = {
        "scored": len(places),
        "refused": len(refused & labelled),
        "without scores": len(labelled - set(by_scan)),
        "without labels": len(set(by_scan) - labelled),
    }
    for reason, count in counts.items():
        if reason != "scored" and count:
            logger.warning("%s: %d scans %s", path, count, reason)
    return ScoredScans(table.rows(np.array(places, dtype=np.int64)), np.array(scores, dtype=np.float64), counts)


def _read_table(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise ValueError(f"no table at {path}")
    with open_csv(path) as reader:
        rows = [{key: value or "" for key, value in row.items() if key is not None} for row in reader]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def _label_table(
    path: Path,
    scan_ids: Sequence[str],
    studies: Sequence[str],
    patients: Sequence[str],
    findings: Sequence[str],
    labels: Sequence[Sequence[bool]],
) -> LabelTable:
    if len(set(scan_ids)) != len(scan_ids):
        raise ValueError(f"{path} labels {len(scan_ids) - len(set(scan_ids))} scans twice")
    flags = np.array(labels, dtype=bool)
    return LabelTable(tuple(scan_ids), np.array(studies), np.array(patients), tuple(findings), flags)


def _shorter(name: str) -> str:
    """The study of a volume's name, the patient of a study's: without what follows the last underscore."""
    return name.rpartition("_")[0] or name


def _flag(cell: str, where: str) -> bool:
    value = cell.strip()
    if value not in ("0", "1", "0.0", "1.0"):
        raise ValueError(f"{where}: expected 0 or 1, got {cell!r}")
    return value.startswith("1")


def _probability(cell: str, path: Path) -> float:
    if not cell.strip():
        return np.nan
    try:
        value = float(cell)
    except ValueError as error:
        raise ValueError(f"{path} holds {cell!r} where a probability belongs") from error
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{path} holds {cell!r} where a probability belongs; an unknown score is an empty cell")
    return value


# Figures ---------------------------------------------------------------------------------------------------------


def ct_figures(
    scans: ScoredScans,
    *,
    unit: Unit = "volume",
    validation: ScoredScans | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of a model on a set of scans, for JSON.

    "overall", "per_class" … as `classification_figures` gives them, a missing score being unknown and counted, with
    decisions at the thresholds of "thresholds"; and "published", the release's own figures.

    Args:
        scans: scores and labels of the tested scans.
        unit: what is counted. A study has the mean score of its reconstructions; a patient the highest of its studies,
            since a label of any study counts.
        validation: scores and labels of other patients, to choose thresholds on; None: cross-fitted.
        num_resamples: of the bootstrap by patient; 0: no intervals.
        confidence: of intervals.
        seed: of the bootstrap and of the folds.

    Raises:
        ValueError: validation and test share a patient, or their findings differ.
    """
    tested = _scored_findings(scans, unit)
    resampling: dict[str, Any] = {"num_resamples": num_resamples, "confidence": confidence, "seed": seed}
    figures = figures_with_chosen_thresholds(
        tested, None if validation is None else _scored_findings(validation, unit), **resampling
    )
    return {
        **figures,
        "unit": unit,
        "counts": {
            **scans.counts,
            f"{unit} rows": len(tested.scores),
            "scores missing": int(np.isnan(tested.scores).sum()),
        },
        "published": _published(tested),
    }


def _scored_findings(scans: ScoredScans, unit: Unit) -> ScoredFindings:
    table, scores = by_unit(scans, unit)
    return ScoredFindings(scores, table.labels, table.patient_ids, table.findings)


def by_unit(scans: ScoredScans, unit: Unit) -> tuple[LabelTable, NDArray[np.float64]]:
    """Labels and scores of volumes, of studies (mean score of its volumes) or of patients (highest of its studies).

    Raises:
        ValueError: another unit.
    """
    if unit not in UNITS:
        raise ValueError(f"unit is one of {UNITS}, got {unit!r}")
    table, scores = scans.table, scans.scores
    if unit == "volume":
        return table, scores
    table, scores = _merged(table, scores, table.study_ids, _means)
    return (table, scores) if unit == "study" else _merged(table, scores, table.patient_ids, np.fmax.reduceat)


def _merged(
    table: LabelTable,
    scores: NDArray[np.float64],
    groups: NDArray[np.str_],
    join: Callable[[NDArray[np.float64], NDArray[np.intp]], NDArray[np.float64]],
) -> tuple[LabelTable, NDArray[np.float64]]:
    """One row a group; `join` makes it of the rows of each, which begin at the places given: NaN of NaN alone."""
    names, first, owner = np.unique(groups, return_index=True, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(len(names)))
    labels = np.logical_or.reduceat(table.labels[order], starts)
    merged = LabelTable(tuple(names.tolist()), table.study_ids[first], table.patient_ids[first], table.findings, labels)
    return merged, join(scores[order], starts)


def _means(scores: NDArray[np.float64], starts: NDArray[np.intp]) -> NDArray[np.float64]:
    known = ~np.isnan(scores)
    counts = np.add.reduceat(known.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(known, scores, 0.0), starts)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


# The release's figures -----------------------------------------------------------------------------------------------


def _published(tested: ScoredFindings) -> dict[str, Any]:
    """The release's figures: a missing score is 0, thresholds come from the test labels, means are over findings."""
    points: dict[str, dict[str, float]] = {}
    undefined = []
    for column, finding in enumerate(tested.finding_names):
        truth = tested.labels[:, column]
        if truth.all() or not truth.any():
            undefined.append(finding)
            continue
        scores = np.nan_to_num(tested.scores[:, column], nan=0.0)
        area = auroc(scores, truth)
        assert area is not None  # both classes occur
        points[finding] = {"auroc": area, **asdict(published_operating_point(scores, truth))}
    names = ("auroc", "accuracy", "sensitivity", "specificity", "precision", "weighted_f1")
    means = {
        name: mean_with_interval([point[name] for point in points.values()], num_resamples=0).value for name in names
    }
    return {"threshold": _ON_TEST_LABELS, "overall": means, "per_class": points, "undefined": undefined}
