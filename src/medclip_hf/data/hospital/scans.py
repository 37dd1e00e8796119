"""The CT way: each scan becomes a bare NIfTI file under its pseudonym, which the CT engine then prepares.

The engine names files in what it writes and logs. It never sees the hospital's: geometry is read and checked here from
DICOM or NIfTI, and handed on as voxels and an affine alone, under a name that is a keyed hash.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medclip_hf.data.ct.dicom import is_dicom
from medclip_hf.data.ct.engine import EngineSettings, prepare_scan
from medclip_hf.data.ct.geometry import UnusableScan, Volume
from medclip_hf.data.ct.reading import read_volume
from medclip_hf.data.ct.segmenters import Segmenter
from medclip_hf.data.ct.sources import ScanSource
from medclip_hf.data.hospital.free_text import TextDeidentifier
from medclip_hf.data.hospital.grey_levels import UnusablePicture
from medclip_hf.data.hospital.headers import groups_of_header, identifying_values, shows_head
from medclip_hf.data.hospital.pseudonyms import Pseudonyms
from medclip_hf.data.hospital.quiet import quiet_libraries
from medclip_hf.data.hospital.rows import PatientGroups
from medclip_hf.data.hospital.search_set import SearchSet
from medclip_hf.data.hospital.table import TableRow
from medclip_hf.data.hospital.work import PartReport, PrepareSettings, deidentified, file_of, groups_of_row
from medclip_hf.data.stages import Tally
from medclip_hf.data.workers import Task, TaskReport

logger = logging.getLogger(__name__)

STORE = "scans"  # where the engine keeps arrays and rows: the split is drawn when it is known which scans are usable


@dataclass(frozen=True)
class MakeScanStep:
    """Makes a `ScanStep` in each worker."""

    rows: tuple[TableRow, ...]
    digests: tuple[str, ...]
    root: Path
    output: Path
    folder: Path
    pseudonyms: Pseudonyms
    settings: PrepareSettings
    engine: EngineSettings
    segmenter: Segmenter | None = None

    def __call__(self) -> ScanStep:
        """The step, with its recognisers loaded and one thread."""
        import torch

        torch.set_num_threads(1)
        return ScanStep(self, self.settings.deidentifier())


@dataclass(frozen=True)
class ScanStep:
    """Prepares one scan."""

    make: MakeScanStep
    deidentify: TextDeidentifier

    def __call__(self, task: Task) -> TaskReport:
        """Put the scan's arrays into the store, then write its report."""
        make = self.make
        row = make.rows[task.number]
        report = PartReport(make.digests[task.number])
        seen = SearchSet(make.pseudonyms)
        seen.add(row.identifying)
        try:
            with quiet_libraries():
                self._prepare(row, report, seen)
        except (UnusablePicture, UnusableScan) as error:
            report.drops.append((row.number, error.reason))  # without its detail, which names files
        except MemoryError:
            report.drops.append((row.number, "not enough memory"))
        except Exception as error:  # a fault nobody has thought of; its words may quote the file
            logger.warning("row %d met an unexpected %s and is set aside", row.number, type(error).__name__)
            report.drops.append((row.number, f"unexpected {type(error).__name__}"))
        report.remember(seen)
        return self._finish(task, report)

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """Drop a scan that kills its process."""
        report = PartReport(self.make.digests[task.number])
        seen = SearchSet(self.make.pseudonyms)
        seen.add(self.make.rows[task.number].identifying)
        report.remember(seen)
        report.drops.append((self.make.rows[task.number].number, reason))
        return self._finish(task, report)

    def _finish(self, task: Task, report: PartReport) -> TaskReport:
        report.write(self.make.folder / f"scan-{task.number:06d}.json")
        tally = Tally(kept=1 - len(report.drops))
        tally.dropped.update(reason for _, reason in report.drops)
        return TaskReport(task, 1, tally)

    def _prepare(self, row: TableRow, report: PartReport, seen: SearchSet) -> None:
        make = self.make
        path = file_of(make.root, row.path)
        groups, from_header = _facts_of_file(path)
        seen.add(from_header)
        identifying = (*row.identifying, *from_header)
        scan_id = make.pseudonyms.of("row", row.path, row.series)
        # Of a file that changed, the engine would take the arrays of before.
        (make.output / "rows" / STORE / f"{scan_id}.json").unlink(missing_ok=True)
        bare = [make.folder / f"{scan_id}{ending}" for ending in (".nii", "-labels.nii")]
        try:
            _write_bare(read_volume(path, series_uid=row.series or None), bare[0])
            if row.segmentation:
                _write_bare(read_volume(file_of(make.root, row.segmentation)), bare[1])
            source = ScanSource(
                scan_id=scan_id,
                study_id=make.pseudonyms.of("study", row.patient, row.study) if row.study else scan_id,
                patient_id=make.pseudonyms.patient(row.patient),
                image_path=bare[0],
                labels_path=bare[1] if row.segmentation else None,
                findings=deidentified(row.text, identifying, self.deidentify, report),
                impression=deidentified(row.impression, identifying, self.deidentify, report),
                labels=row.labels,
            )
            _, drop = prepare_scan(
                source, folder=make.output, split=STORE, settings=make.engine, segmenter=make.segmenter
            )
        finally:
            for file in bare:
                file.unlink(missing_ok=True)
        if drop is not None:
            raise UnusablePicture(drop.reason)
        groups = groups_of_row(row, replace(groups, modality=groups.modality or "CT"), identifying)
        report.num_heads += shows_head(groups)
        report.scans[scan_id] = {
            "patient_id": source.patient_id,
            "study_id": source.study_id,
            "groups": {name: getattr(groups, name) for name in groups.__dataclass_fields__},
        }


def _facts_of_file(path: Path) -> tuple[PatientGroups, tuple[str, ...]]:
    """Groups of the first slice's header, and what identifies in it; nothing for files that are not DICOM."""
    from pydicom import dcmread

    if not path.exists():
        raise UnusablePicture("file missing")
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    identifying: dict[str, None] = {}
    groups = PatientGroups()
    for file in files:
        try:
            if not is_dicom(file):
                continue
            header = dcmread(file, stop_before_pixels=True)
        except Exception:  # noqa: S112 - whether the file can be used is judged when its voxels are read
            continue
        groups = groups if groups != PatientGroups() else groups_of_header(header)
        identifying.update(dict.fromkeys(identifying_values(header)))
    return groups, tuple(identifying)


def _write_bare(volume: Volume, path: Path) -> None:
    """Voxels and affine, and nothing else, as NIfTI."""
    import nibabel

    values: Any = volume.values.transpose(2, 1, 0)
    if values.dtype.kind in "iu" and np.iinfo(np.int16).min <= values.min() and values.max() <= np.iinfo(np.int16).max:
        values = values.astype(np.int16)
    elif values.dtype.kind in "iu":
        values = values.astype(np.int32)
    image = nibabel.Nifti1Image(values, volume.affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.affine, code=1)
    image.set_qform(volume.affine, code=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
