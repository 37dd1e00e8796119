"""The hospital's table: a CSV of files, patients, texts and labels, read so that no cell of it reaches a message.

Errors and drops name rows by their number as a spreadsheet shows it (the header is row 1) and columns by the name that
the user gave.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from medclip_hf.data.hospital.pseudonyms import normal_identifier
from medclip_hf.data.hospital.rows import Labels, Task
from medclip_hf.data.stages import Drop

MAX_CLASSES = 200  # a column of more values is no label, but an identifier or a text
LABEL_PREFIX = "label:"
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "holdout"), "test"),
}

_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
_PRESENT = {"1", "1.0", "true", "yes", "y", "positive", "present"}
_ABSENT = {"0", "0.0", "false", "no", "n", "negative", "absent"}
_UNKNOWN = {"", "nan", "na", "n/a", "none", "-1", "-1.0", "?", "unknown", "uncertain"}  # -1: CheXpert's uncertain


@dataclass(frozen=True)
class TableColumns:
    """Which column holds what; a name that is None is not read.

    Args:
        path: of the file or folder, relative to the root of the data.
        patient: identifier of the patient.
        study: identifier of the examination; without it every row is its own.
        text: caption or report. For CT: the findings.
        impression: of a CT report.
        label: one column that holds the name of the class, exactly one a row.
        labels: columns of one finding each, with 1, 0 or nothing; by default those that begin with ``label:``.
        split: "train", "validation" or "test"; without it patients are split here.
        sex, age, scanner: where the table knows better than the headers.
        series: SeriesInstanceUID, or its end, where a folder holds several series.
        segmentation: label volume of a CT, relative to the root of the data.
        identifying: further columns whose cells identify the patient (name, date of birth, address, phone). They are
            never copied; what stands in them is searched for in this patient's texts.
    """

    path: str = "path"
    patient: str = "patient_id"
    study: str | None = None
    text: str | None = None
    impression: str | None = None
    label: str | None = None
    labels: tuple[str, ...] | None = None
    split: str | None = None
    sex: str | None = None
    age: str | None = None
    scanner: str | None = None
    series: str | None = None
    segmentation: str | None = None
    identifying: tuple[str, ...] = ()

    def named(self) -> tuple[str, ...]:
        """All columns that the table must have, each once."""
        single = (self.path, self.patient, self.study, self.text, self.impression, self.label, self.split)
        more = (self.sex, self.age, self.scanner, self.series, self.segmentation)
        names = [name for name in (*single, *more) if name is not None]
        return tuple(dict.fromkeys([*names, *(self.labels or ()), *self.identifying]))


@dataclass(frozen=True)
class TableRow:
    """One row of the hospital's table, still with its identifiers: it stays in memory and is never shown.

    Args:
        number: as a spreadsheet counts, from 2.
        path: as it stands in the table.
        patient: identifier.
        identifying: every cell that identifies the patient, to be searched for in texts.
    """

    number: int
    path: str = field(repr=False)
    patient: str = field(repr=False)
    study: str = field(default="", repr=False)
    text: str = field(default="", repr=False)
    impression: str = field(default="", repr=False)
    labels: Labels = field(default=(), repr=False)
    split: str = ""
    sex: str = field(default="", repr=False)
    age: str = field(default="", repr=False)
    scanner: str = field(default="", repr=False)
    series: str = field(default="", repr=False)
    segmentation: str = field(default="", repr=False)
    identifying: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class HospitalTable:
    """A table that was read: its usable rows, and by row number why others are not.

    Args:
        rows: in the order of the table.
        drops: (row number, reason).
        task: what the labels are good for.
        classes: names of the labels: of a single column in alphabetical order, else in the order of the columns.
    """

    rows: tuple[TableRow, ...] = field(repr=False)
    drops: tuple[tuple[int, Drop], ...]
    task: Task
    classes: tuple[str, ...]


def read_table(
    path: Path, columns: TableColumns, *, separator: str | None = None, encoding: str | None = None
) -> HospitalTable:
    """The rows of a CSV; what is wrong with the table as a whole is an error, with one row a drop.

    Args:
        path: of the CSV.
        columns: which column holds what.
        separator: a comma where not given.
        encoding: UTF-8 (with or without a byte order mark) where not given.

    Raises:
        ValueError: wrong separator or encoding, missing or repeated columns, no rows, a label column with one class or
            with so many that it is none, an empty text column.
    """
    header, cells = _read_cells(path, separator or ",", encoding)
    if columns.labels is None and columns.label is None:
        columns = replace(columns, labels=tuple(name for name in header if name.startswith(LABEL_PREFIX)))
    _check_header(path, header, columns, separator or ",")
    places = {name: header.index(name) for name in columns.named()}
    rows: list[TableRow] = []
    drops: list[tuple[int, Drop]] = []
    for number, row_cells in enumerate(cells, start=2):
        if not any(cell.strip() for cell in row_cells):
            continue
        row = _row(number, row_cells, len(header), places, columns)
        drops.append((number, row)) if isinstance(row, Drop) else rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no usable row ({_counted(drops) or 'it has a header alone'})")
    rows = _knowing_their_patient(_without_repeats(rows, drops))
    _check_texts(path, rows, columns)
    task, classes = _task_and_classes(path, rows, columns)
    if task == "single_label":
        rows = [replace(row, labels=_one_hot(row.labels, classes)) for row in rows]
    return HospitalTable(tuple(rows), tuple(drops), task, classes)


def listed(text: str) -> list[str]:
    """The words between commas; a word with a comma of its own stands in double quotes.

    Examples:
        >>> listed('"Name, Vorname", born')
        ['Name, Vorname', 'born']
    """
    words = next(csv.reader([text], skipinitialspace=True), [])
    return [word.strip() for word in words if word.strip()]


def _read_cells(path: Path, separator: str, encoding: str | None) -> tuple[list[str], list[list[str]]]:
    text = _decoded(path, encoding)
    if "\0" in text:
        raise ValueError(f"{path} holds zero bytes: it is no CSV, or in another encoding. Save it as CSV in UTF-8.")
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True))
    except (csv.Error, TypeError) as error:
        raise ValueError(f"{path} cannot be read as CSV separated by {separator!r}: {error}") from error
    if not lines:
        raise ValueError(f"{path} is empty")
    return [name.strip() for name in lines[0]], lines[1:]


def _decoded(path: Path, encoding: str | None) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read the table {path}: {error.strerror}") from error
    if content[:4] == b"PK\x03\x04" or content[:4] == b"\xd0\xcf\x11\xe0":
        raise ValueError(f"{path} is a workbook or archive, not a CSV. Save the sheet as CSV in UTF-8.")
    if encoding is None and content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    try:
        return content.decode(encoding or "utf-8-sig")
    except LookupError as error:
        raise ValueError(f"there is no encoding {encoding!r}; common ones are utf-8, cp1252, latin-1") from error
    except UnicodeError as error:
        at = f" at byte {error.start:,}" if isinstance(error, UnicodeDecodeError) else ""
        # The exception itself carries the bytes: it must not be chained into a traceback.
        raise ValueError(
            f"{path} is not in {encoding or 'UTF-8'}{at}. Save it as UTF-8, or name its encoding "
            "(cp1252 for files of Excel on Windows)."
        ) from None


def _check_header(path: Path, header: Sequence[str], columns: TableColumns, separator: str) -> None:
    """Complain without showing the header: where a table lacks one, its first line is a patient."""
    missing = [name for name in columns.named() if name not in header]
    if missing:
        line = separator.join(header)
        for other, word in _SEPARATORS.items():
            if other != separator and line.count(other) > len(header) - 1:
                raise ValueError(
                    f"{path} does not look separated by {_SEPARATORS.get(separator, repr(separator))}, but by {word}. "
                    "Name the separator."
                )
    if missing:
        hints = []
        for name in missing:
            alike = difflib.get_close_matches(name.casefold(), [known.casefold() for known in header], 1, 0.75)
            hints.append(f"{name!r}" + (f" (there is {alike[0]!r})" if alike else ""))
        raise ValueError(
            f"{path} lacks the columns {', '.join(hints)} among its {len(header)}. Name them as the first line of the "
            "table does."
        )
    repeated = [name for name in columns.named() if list(header).count(name) > 1]
    if repeated:
        raise ValueError(f"{path} has the columns {repeated} more than once. Rename one of each.")
    if columns.label and columns.labels:
        raise ValueError("name either one label column (single label) or several (multi label), not both")


def _row(number: int, cells: list[str], width: int, places: dict[str, int], columns: TableColumns) -> TableRow | Drop:
    if len(cells) != width:
        return Drop("row has another number of cells than the header")

    def cell(name: str | None) -> str:
        return cells[places[name]].strip() if name is not None else ""

    if not cell(columns.path):
        return Drop("no path")
    if not cell(columns.patient):
        return Drop("no patient id")
    labels = _labels(cell(columns.label), [(name, cell(name)) for name in columns.labels or ()])
    if isinstance(labels, Drop):
        return labels
    split = cell(columns.split).casefold()
    if columns.split and split not in SPLIT_NAMES:
        return Drop("split is neither train, validation nor test" if split else "no split")
    return TableRow(
        number=number,
        path=cell(columns.path),
        patient=cell(columns.patient),
        study=cell(columns.study),
        text=cell(columns.text),
        impression=cell(columns.impression),
        labels=labels,
        split=SPLIT_NAMES.get(split, ""),
        sex=cell(columns.sex),
        age=cell(columns.age),
        scanner=cell(columns.scanner),
        series=cell(columns.series),
        segmentation=cell(columns.segmentation),
        identifying=tuple(filter(None, map(cell, (columns.patient, columns.study, *columns.identifying)))),
    )


def _labels(name: str, findings: list[tuple[str, str]]) -> Labels | Drop:
    """Labels of a row: the one name as present, or the findings that are known."""
    if name:
        return ((name, True),)
    labels = []
    for finding, value in findings:
        word = value.casefold()
        if word not in _PRESENT | _ABSENT | _UNKNOWN:
            return Drop("label is neither 1, 0 nor empty")
        if word not in _UNKNOWN:
            labels.append((finding.removeprefix(LABEL_PREFIX), word in _PRESENT))
    return tuple(labels)


def _without_repeats(rows: Sequence[TableRow], drops: list[tuple[int, Drop]]) -> list[TableRow]:
    """Each picture once: the first row that names it stays."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for row in rows:
        key = (row.path, row.series)
        if key in seen:
            drops.append((row.number, Drop("path repeated in the table")))
        else:
            seen.add(key)
            kept.append(row)
    drops.sort(key=lambda item: item[0])
    return kept


def _knowing_their_patient(rows: Sequence[TableRow]) -> list[TableRow]:
    """Rows that know what identifies their patient in any row: names are often filled in once."""
    known: dict[str, dict[str, None]] = defaultdict(dict)
    for row in rows:
        known[normal_identifier(row.patient)].update(dict.fromkeys(row.identifying))
    return [replace(row, identifying=tuple(known[normal_identifier(row.patient)])) for row in rows]


def _check_texts(path: Path, rows: Sequence[TableRow], columns: TableColumns) -> None:
    if columns.text and not any(row.text or row.impression for row in rows):
        raise ValueError(f"{path}: the text column {columns.text!r} is empty in all {len(rows)} rows. Name another.")


def _task_and_classes(path: Path, rows: Sequence[TableRow], columns: TableColumns) -> tuple[Task, tuple[str, ...]]:
    if columns.label:
        classes = tuple(sorted({name for row in rows for name, _ in row.labels}))
        if len(classes) < 2:
            raise ValueError(
                f"{path}: the label column {columns.label!r} holds {len(classes)} class; a classifier needs two or "
                "more. Name another column, or leave it out to prepare texts alone."
            )
        if len(classes) > MAX_CLASSES or 2 * len(classes) > len(rows) > 4:
            raise ValueError(
                f"{path}: the label column {columns.label!r} holds {len(classes)} different values in {len(rows)} rows:"
                " is it a text or an identifier? Class names are written into the data set as they are."
            )
        patients_of: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            for name, _ in row.labels:
                patients_of[name].add(normal_identifier(row.patient))
        if len(classes) > 2 and max(map(len, patients_of.values())) == 1:
            raise ValueError(
                f"{path}: each of the {len(classes)} values of the label column {columns.label!r} belongs to one "
                "patient alone: it is an identifier, or nothing that could be tested on other patients. Name another."
            )
        return "single_label", classes
    if not columns.labels:
        return "none", ()
    known = Counter((name, value) for row in rows for name, value in row.labels)
    classes = tuple(name.removeprefix(LABEL_PREFIX) for name in columns.labels)
    one_sided = [name for name in classes if not (known[name, True] and known[name, False])]
    if one_sided:
        raise ValueError(
            f"{path}: the label columns {one_sided} hold one class alone (all present, all absent or all unknown). "
            "Leave them out."
        )
    return "multi_label", classes


def _one_hot(labels: Labels, classes: Sequence[str]) -> Labels:
    return tuple((name, (name, True) in labels) for name in classes) if labels else ()


def _counted(drops: Sequence[tuple[int, Drop]]) -> str:
    counts = Counter(drop.reason for _, drop in drops)
    return ", ".join(f"{count} × {reason}" for reason, count in counts.most_common())
