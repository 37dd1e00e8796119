"""Drawn torsos as files: the folders, tables and label volumes of CT-RATE, so that a CT engine can run on them."""

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.phantoms.torso_findings import FINDINGS
from medclip_hf.data.phantoms.torso_reports import write_report
from medclip_hf.data.phantoms.torsos import Torso, TorsoPlan, TorsoSettings, draw_torso, plan_patient
from medclip_hf.data.stages import map_in_order

logger = logging.getLogger(__name__)

# The columns of CT-RATE's label tables, in their order.
CT_RATE_LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)
FIRST_PATIENT = {"train": 0, "valid": 10_000_000}  # no patient is in both splits, whatever their sizes
TABLE_NAMES = {"train": "train", "valid": "validation"}


@dataclass(frozen=True)
class _Rows:
    """What one volume adds to the tables."""

    metadata: dict[str, Any]
    report: dict[str, str]
    labels: dict[str, Any]


def write_ct_rate(
    folder: Path | str,
    num_patients: int,
    *,
    split: str = "train",
    seed: int = 0,
    layout: str = "fixed",
    orientations: Sequence[str] = ("LPS", "LPS", "RAS", "LAS", "LPI"),
    settings: TorsoSettings | None = None,
    num_workers: int = 0,
) -> list[Path]:
    """Paths of the volumes written: a tree in CT-RATE's layout under `folder`/dataset.

    Beside the volumes stand their TotalSegmentator v2 label files (`ts_seg/ts_total`), the metadata, report and label
    tables, and, which CT-RATE has not, the truth: `phantom_truth`, uint16 volumes whose bit i tells whether the voxel
    belongs to finding i of `phantom_truth/findings.json`. The files do not depend on `num_workers`.

    Args:
        folder: created where absent; files of the same names are overwritten.
        num_patients: patients are numbered from 1, as in `train_1_a_1.nii.gz`.
        split: "train" or "valid": different patients.
        seed: of everything drawn.
        layout: "fixed": voxels in HU, affine right (`train_fixed`); the metadata table still names the intercept, which
            must not be applied again. "original": stored values and an identity affine, slope, intercept, spacing and
            position in the metadata table alone (`train`).
        orientations: axis codes of the NIfTI arrays, one drawn for each volume; layout "original" is always LPS.
        settings: how torsos are drawn.
        num_workers: processes (0: this one).

    Raises:
        ValueError: on an unknown split, layout or orientation.
    """
    settings = settings or TorsoSettings()
    if split not in FIRST_PATIENT:
        raise ValueError(f"split must be one of {list(FIRST_PATIENT)}, got {split!r}.")
    if layout not in ("fixed", "original"):
        raise ValueError(f"layout must be 'fixed' or 'original', got {layout!r}.")
    _check_orientations(orientations)
    root = Path(folder) / "dataset"
    work = partial(_write_patient, root, split, seed, layout, tuple(orientations), settings)
    written = [volume for patient in map_in_order(work, range(num_patients), num_workers, 4) for volume in patient]
    _write_tables(root, split, [rows for _, rows in written])
    truth = root / "phantom_truth" / "findings.json"
    truth.parent.mkdir(parents=True, exist_ok=True)
    truth.write_text(json.dumps(list(FINDINGS)), encoding="utf-8")
    logger.info("wrote %d volumes of %d phantom patients under %s", len(written), num_patients, root)
    return [path for path, _ in written]


def finding_bits(finding_masks: dict[str, NDArray[np.bool_]], shape: tuple[int, ...]) -> NDArray[np.uint16]:
    """Volume whose bit i tells whether a voxel belongs to the i-th of `FINDINGS`."""
    bits = np.zeros(shape, dtype=np.uint16)
    for i, name in enumerate(FINDINGS):
        if name in finding_masks:
            bits |= finding_masks[name] * np.uint16(1 << i)
    return bits


def _check_orientations(orientations: Sequence[str]) -> None:
    if not orientations:
        raise ValueError("orientations is empty; give at least one code, as ('LPS',).")
    axis_of = {"L": 0, "R": 0, "A": 1, "P": 1, "I": 2, "S": 2}
    for code in orientations:
        if sorted(axis_of.get(letter, -1) for letter in code) != [0, 1, 2]:
            raise ValueError(f"orientations holds {code!r}; expected one letter of each of L/R, A/P and I/S, as 'LPS'.")


def _write_patient(
    root: Path,
    split: str,
    seed: int,
    layout: str,
    orientations: tuple[str, ...],
    settings: TorsoSettings,
    index: int,
) -> list[tuple[Path, _Rows]]:
    written = []
    for plan in plan_patient(seed, FIRST_PATIENT[split] + index, settings):
        patient, study = f"{split}_{index + 1}", f"{split}_{index + 1}_{_letters(plan.study)}"
        name = f"{study}_{plan.reconstruction + 1}.nii.gz"
        place = Path(patient) / study / name
        rng = np.random.default_rng([plan.seed, plan.patient, 701, plan.study, plan.reconstruction])
        orientation = "LPS" if layout == "original" else str(rng.choice(orientations))
        intercept = -8192 if rng.random() < 0.28 else -1024  # the share of CT-RATE's validation split
        torso = draw_torso(plan, settings)
        path = root / (split if layout == "original" else f"{split}_fixed") / place
        if layout == "original":
            _save(path, torso.image_hu - np.int16(intercept), None, "LPS")
        else:
            _save(path, torso.image_hu, torso.spacing_mm_dhw, orientation)
        _save(root / "ts_seg" / "ts_total" / f"{split}_fixed" / place, torso.labels, torso.spacing_mm_dhw, orientation)
        bits = finding_bits(torso.finding_masks, torso.labels.shape)
        _save(root / "phantom_truth" / f"{split}_fixed" / place, bits, torso.spacing_mm_dhw, orientation)
        written.append((path, _rows(name, torso, settings, intercept)))
    return written


def _letters(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else _letters(number // 26 - 1) + chr(ord("a") + number % 26)


def _origin_lps_mm(shape_dhw: Sequence[int], spacing_mm_dhw: tuple[float, float, float]) -> list[float]:
    """Where the first voxel (x, y, z) lies: the table's zero is the middle of the volume."""
    return [-(n - 1) / 2 * mm for n, mm in zip(shape_dhw[::-1], spacing_mm_dhw[::-1], strict=True)]


def _save(
    path: Path, volume_dhw: NDArray[Any], spacing_mm_dhw: tuple[float, float, float] | None, orientation: str
) -> None:
    """Write a (D, H, W) volume as NIfTI with the given axis codes; without a spacing, with an identity affine."""
    import nibabel as nib

    affine = np.eye(4)
    if spacing_mm_dhw is not None:
        x, y, z = _origin_lps_mm(volume_dhw.shape, spacing_mm_dhw)
        depth, height, width = spacing_mm_dhw
        affine = np.diag([-width, -height, depth, 1.0])  # NIfTI's world has x to the right and y to the front
        affine[:3, 3] = -x, -y, z
    image = nib.Nifti1Image(volume_dhw.transpose(2, 1, 0), affine)
    if spacing_mm_dhw is not None and orientation != "LPS":
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt(tuple("LPS")), nib.orientations.axcodes2ornt(tuple(orientation))
        )
        image = image.as_reoriented(turn)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def _rows(name: str, torso: Torso, settings: TorsoSettings, intercept: int) -> _Rows:
    depth, height, width = torso.spacing_mm_dhw
    plan = torso.plan
    report = write_report(plan, settings)
    present = {FINDINGS[finding].ct_rate_name for finding in plan.findings}
    return _Rows(
        metadata={
            "VolumeName": name,
            "Manufacturer": "phantom",
            "PatientSex": plan.sex,
            "PatientAge": f"{plan.age + plan.study:03d}Y",
            "XYSpacing": f"[{width}, {height}]",
            "ZSpacing": depth,
            "ImagePositionPatient": str(_origin_lps_mm(torso.image_hu.shape, torso.spacing_mm_dhw)),
            "ImageOrientationPatient": "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]",
            "RescaleIntercept": intercept,
            "RescaleSlope": 1,
            "Rows": torso.image_hu.shape[1],
            "Columns": torso.image_hu.shape[2],
            "NumberofSlices": torso.image_hu.shape[0],
        },
        report={
            "VolumeName": name,
            "ClinicalInformation_EN": report.clinical_information,
            "Technique_EN": report.technique,
            "Findings_EN": report.findings,
            "Impressions_EN": report.impression,
        },
        labels={"VolumeName": name, **{label: int(label in present) for label in CT_RATE_LABELS}},
    )


def _write_tables(root: Path, split: str, rows: list[_Rows]) -> None:
    table = TABLE_NAMES[split]
    _write_csv(root / "metadata" / f"{table}_metadata.csv", [row.metadata for row in rows])
    _write_csv(root / "radiology_text_reports" / f"{table}_reports.csv", [row.report for row in rows])
    _write_csv(root / "multi_abnormality_labels" / f"{split}_predicted_labels.csv", [row.labels for row in rows])


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)


def plans_of_split(
    num_patients: int, *, split: str = "train", seed: int = 0, settings: TorsoSettings | None = None
) -> list[TorsoPlan]:
    """Plans of the volumes that `write_ct_rate` writes with the same arguments, in the same order."""
    return [plan for i in range(num_patients) for plan in plan_patient(seed, FIRST_PATIENT[split] + i, settings)]
