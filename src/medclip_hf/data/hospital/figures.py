"""The 2-D way: a part of the table becomes rows with bare pictures and de-identified texts, in one Parquet file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medclip_hf.data.engine.dedup import FINGERPRINT, fingerprint
from medclip_hf.data.hospital.burned_in import find_text, masked
from medclip_hf.data.hospital.free_text import TextDeidentifier
from medclip_hf.data.hospital.grey_levels import UnusablePicture
from medclip_hf.data.hospital.headers import shows_head
from medclip_hf.data.hospital.pictures import Picture, encode_picture, read_pictures
from medclip_hf.data.hospital.pseudonyms import Pseudonyms
from medclip_hf.data.hospital.quiet import quiet_libraries
from medclip_hf.data.hospital.rows import (
    HOSPITAL_FEATURES,
    HospitalRow,
    hospital_row_to_record,
    record_to_hospital_row,
)
from medclip_hf.data.hospital.search_set import SearchSet
from medclip_hf.data.hospital.table import TableRow
from medclip_hf.data.hospital.work import (
    PartReport,
    PrepareSettings,
    deidentified,
    file_of,
    groups_of_row,
)
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Tally
from medclip_hf.data.workers import Task, TaskReport

logger = logging.getLogger(__name__)

ROWS_PER_PART = 32

_PART_SCHEMA = pa.schema([*HOSPITAL_FEATURES.arrow_schema, pa.field("fingerprint", pa.binary(FINGERPRINT.itemsize))])


@dataclass(frozen=True)
class MakeFigureStep:
    """Makes a `FigureStep` in each worker; it travels through a pipe and is never written."""

    parts: tuple[tuple[TableRow, ...], ...]
    digests: tuple[str, ...]
    root: Path
    folder: Path
    pseudonyms: Pseudonyms
    settings: PrepareSettings

    def __call__(self) -> FigureStep:
        """The step, with its recognisers loaded."""
        return FigureStep(self, self.settings.deidentifier())


@dataclass(frozen=True)
class FigureStep:
    """Prepares one part of the table."""

    make: MakeFigureStep
    deidentify: TextDeidentifier

    def __call__(self, task: Task) -> TaskReport:
        """Write the part's rows, then its report."""
        report = PartReport(self.make.digests[task.number])
        seen = SearchSet(self.make.pseudonyms)
        records: list[dict[str, Any]] = []
        for row in self.make.parts[task.number]:
            seen.add(row.identifying)
            try:
                with quiet_libraries():
                    records += self._records(row, report, seen)
            except UnusablePicture as error:
                report.drops.append((row.number, error.reason))
            except MemoryError:
                report.drops.append((row.number, "not enough memory"))
            except Exception as error:  # a fault nobody has thought of; its words may quote the file
                logger.warning("row %d met an unexpected %s and is set aside", row.number, type(error).__name__)
                report.drops.append((row.number, f"unexpected {type(error).__name__}"))
        report.remember(seen)
        return self._finish(task, report, records)

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """Drop the rows of a part that kills its process."""
        report = PartReport(self.make.digests[task.number])
        seen = SearchSet(self.make.pseudonyms)
        for row in self.make.parts[task.number]:
            seen.add(row.identifying)
            report.drops.append((row.number, reason))
        report.remember(seen)
        return self._finish(task, report, [])

    def _finish(self, task: Task, report: PartReport, records: list[dict[str, Any]]) -> TaskReport:
        path = rows_path(self.make.folder, task.number)
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(pa.Table.from_pylist(records, schema=_PART_SCHEMA), temporary, compression="none")
        temporary.replace(path)
        report.write(report_path(self.make.folder, task.number))
        tally = Tally(kept=len(records))
        tally.dropped.update(reason for _, reason in report.drops)
        return TaskReport(task, len(self.make.parts[task.number]), tally)

    def _records(self, row: TableRow, report: PartReport, seen: SearchSet) -> Iterator[dict[str, Any]]:
        settings, pseudonyms = self.make.settings, self.make.pseudonyms
        for picture in read_pictures(file_of(self.make.root, row.path), settings.pictures):
            identifying = (*row.identifying, *picture.identifying)
            seen.add(picture.identifying)
            if settings.modalities and picture.groups.modality not in settings.modalities:
                raise UnusablePicture("modality not asked for")
            image = _without_burned_in(picture, settings, report)
            content = encode_picture(image, settings.pictures.max_side)
            row_id = pseudonyms.of("row", row.path, str(picture.frame))
            text = deidentified(
                "\n".join(filter(None, (row.text, row.impression))), identifying, self.deidentify, report
            )
            groups = groups_of_row(row, picture.groups, identifying)
            report.num_heads += shows_head(groups)
            figure = FigureRow(row_id=row_id, caption=text, image_bytes=content, modality=groups.modality)
            study = pseudonyms.of("study", row.patient, row.study) if row.study else pseudonyms.of("study", row.path)
            own = HospitalRow(figure, pseudonyms.patient(row.patient), study, row.labels, groups)
            yield hospital_row_to_record(own) | {"fingerprint": fingerprint(row_id, content, image).tobytes()}


def rows_path(folder: Path, number: int) -> Path:
    """Where the rows of a part lie until the data set is put together."""
    return folder / f"part-{number:05d}.parquet"


def report_path(folder: Path, number: int) -> Path:
    """Where the report of a part lies."""
    return folder / f"part-{number:05d}.json"


def read_part_rows(folder: Path, number: int) -> Iterator[HospitalRow]:
    """The rows of a part, a few pictures in memory at a time."""
    for batch in pq.ParquetFile(rows_path(folder, number)).iter_batches(batch_size=8):
        yield from map(record_to_hospital_row, batch.to_pylist())


def read_part_facts(folder: Path, number: int, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Columns of a part without its pictures; the fingerprint is a `data.engine.dedup.FINGERPRINT`."""
    records = pq.read_table(rows_path(folder, number), columns=list(columns)).to_pylist()
    for record in records:
        if "fingerprint" in record:
            record["fingerprint"] = np.frombuffer(record["fingerprint"], FINGERPRINT)[0]
    return records


def _without_burned_in(picture: Picture, settings: PrepareSettings, report: PartReport) -> Any:
    """The image, with text masked where that was asked for."""
    if settings.burned_in == "keep":
        return picture.image
    try:
        found = find_text(picture.image)
    except RuntimeError:
        raise UnusablePicture("text in the picture could not be searched for") from None
    if settings.burned_in == "mask" and found:
        report.num_masked += 1
        return masked(picture.image, found)
    if found or picture.says_burned_in:
        raise UnusablePicture("text burned into the picture" if found else "header says that text is burned in")
    return picture.image
