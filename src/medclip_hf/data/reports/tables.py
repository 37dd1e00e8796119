"""Tables of radiology reports, read and decomposed: CT-RATE's CSV files, or any CSV with the columns it takes."""

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

from medclip_hf.data.records import AnatomyText
from medclip_hf.data.reports.decomposition import Statement, check_report
from medclip_hf.data.reports.quality import CorpusQuality, QualityCounter
from medclip_hf.data.stages import Drop

REPORTS_AT_ONCE = 64

# Reports (findings, impression) -> for each the statements of both sections and the texts of each anatomy.
Decompose = Callable[[Sequence[tuple[str, str]]], list[tuple[list[Statement], tuple[AnatomyText, ...]]]]

# train_1_a_1.nii.gz: split, patient, study and reconstruction; the report is the study's.
_CT_RATE_VOLUME = re.compile(r"^(?:.*/)?(?P<study>(?:train|valid)_\d+_[a-z]+)_\d+(?:\.nii(?:\.gz)?)?$")


@dataclass(frozen=True)
class ReportColumns:
    """Names of the columns of a table; the defaults are CT-RATE's."""

    study: str = "VolumeName"
    findings: str = "Findings_EN"
    impression: str = "Impressions_EN"


@dataclass(frozen=True)
class ReportRow:
    """The report of a study; `line` is where its row ends in the table, for messages.

    `is_ragged` tells a row with more or fewer fields than the header: a comma outside of quotes has cut its texts.
    """

    study_id: str
    findings: str
    impression: str
    line: int
    is_ragged: bool = False


def study_of_volume(name: str) -> str:
    """The study of a CT-RATE volume ("train_1_a" of "train_1_a_1.nii.gz"); other names are given back as they are."""
    found = _CT_RATE_VOLUME.match(name.strip())
    return found.group("study") if found else name.strip()


def read_reports(path: Path | str, columns: ReportColumns | None = None) -> Iterator[ReportRow]:
    """Rows of a CSV table, one after the other.

    Args:
        path: UTF-8, with a header; texts may hold line breaks in quotes.
        columns: their names.

    Raises:
        ValueError: where the file is missing, is no UTF-8 text, lacks a column, or breaks the rules of CSV, as by a
            quote that is never closed.
    """
    path, columns = Path(path), columns or ReportColumns()
    wanted = (columns.study, columns.findings, columns.impression)
    if not path.is_file():
        raise ValueError(f"There is no table of reports at {path}.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            missing = [name for name in wanted if name not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(
                    f"{path} has no column {missing}; it has {list(reader.fieldnames or ())}. "
                    "Name the columns of study, findings and impression."
                )
            for row in reader:
                study, findings, impression = (row[name] or "" for name in wanted)
                is_ragged = None in row or None in row.values()  # fields beyond the header; missing ones
                yield ReportRow(study_of_volume(study), findings, impression, reader.line_num, is_ragged)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}). Convert it first.") from error
        except csv.Error as error:
            raise ValueError(f"{path}, after line {reader.line_num}: {error}.") from error


def decompose_table(
    rows: Iterable[ReportRow], output: Path, anatomies: Sequence[str], decompose: Decompose
) -> CorpusQuality:
    """The figures of a corpus; its texts are in `output`/anatomy_texts.jsonl then, a line a study.

    Reports that are empty, in another language or a second, different one of their study are set aside with the reason
    in `output`/set_aside.jsonl. Both files appear when the whole table is read.

    Args:
        rows: of the table; a further row of a study with the same report, which CT-RATE has for every reconstruction,
            is passed over.
        output: a folder.
        anatomies: that `decompose` gives texts of.
        decompose: reads reports, some at a time.
    """
    output.mkdir(parents=True, exist_ok=True)
    counter = QualityCounter(anatomies)
    kept, aside = output / "anatomy_texts.jsonl", output / "set_aside.jsonl"
    with (
        _part_of(kept).open("w", encoding="utf-8") as kept_file,
        _part_of(aside).open("w", encoding="utf-8") as aside_file,
    ):
        judged = _judge_rows(rows)
        while chunk := list(islice(judged, REPORTS_AT_ONCE)):
            for row, drop in chunk:
                if drop is not None:
                    counter.set_aside(drop)
                    _write_line(aside_file, {"study_id": row.study_id, "line": row.line, **_plain(drop)})
            good = [row for row, drop in chunk if drop is None]
            results = decompose([(row.findings, row.impression) for row in good])
            for row, (statements, texts) in zip(good, results, strict=True):
                counter.add(statements, texts)
                _write_line(kept_file, {"study_id": row.study_id, "anatomy_texts": [asdict(text) for text in texts]})
    for path in (kept, aside):
        _part_of(path).replace(path)
    return counter.result()


def _judge_rows(rows: Iterable[ReportRow]) -> Iterator[tuple[ReportRow, Drop | None]]:
    """Each study's report once, with the reason where it cannot be used."""
    known: dict[str, int] = {}
    for row in rows:
        report = hash((row.findings, row.impression))
        if row.study_id in known:
            if known[row.study_id] != report:
                yield row, Drop("another report of the same study")
            continue
        known[row.study_id] = report
        yield row, _fault(row)


def _fault(row: ReportRow) -> Drop | None:
    if not row.study_id:
        return Drop("study without a name")
    if row.is_ragged:
        return Drop("another number of fields than the header", "put texts that hold commas in quotes")
    return check_report(row.findings, row.impression)


def _plain(drop: Drop) -> dict[str, str]:
    return {"reason": drop.reason, "detail": drop.detail}


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _write_line(file: TextIO, values: dict[str, object]) -> None:
    file.write(json.dumps(values, ensure_ascii=False) + "\n")
