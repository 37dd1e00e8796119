"""The index of a prepared CT data set: one Parquet file a split, one row a scan."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from medclip_hf.data.records import AnatomyText, ScanRow

_TEXT = pa.struct(
    [
        ("anatomy", pa.string()),
        ("findings", pa.string()),
        ("impression", pa.string()),
        ("is_abnormal", pa.bool_()),
    ]
)
_LABEL = pa.struct([("finding", pa.string()), ("is_present", pa.bool_())])

SCAN_SCHEMA = pa.schema(
    [
        ("scan_id", pa.string()),
        ("study_id", pa.string()),
        ("patient_id", pa.string()),
        ("store_path", pa.string()),
        ("shape_dhw", pa.list_(pa.int32(), 3)),
        ("spacing_mm_dhw", pa.list_(pa.float64(), 3)),
        ("anatomies_present", pa.list_(pa.string())),
        ("anatomy_texts", pa.list_(_TEXT)),
        ("labels", pa.list_(_LABEL)),
    ]
)


def index_path(folder: Path, split: str) -> Path:
    """Where the index of a split lies."""
    return Path(folder) / f"{split}-00000-of-00001.parquet"


def write_scan_rows(rows: Iterable[ScanRow], folder: Path, split: str) -> Path:
    """The index file, written atomically, rows ordered by scan: its bytes depend on the rows alone."""
    path = index_path(folder, split)
    records = [row_to_record(row) for row in sorted(rows, key=lambda row: row.scan_id)]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records, schema=SCAN_SCHEMA), temporary, compression="zstd")
    temporary.replace(path)
    return path


def read_scan_rows(folder: Path | str, split: str) -> list[ScanRow]:
    """The rows of a split, ordered by scan.

    Raises:
        ValueError: where the folder holds no index of the split, or one of another kind.
    """
    path = index_path(Path(folder), split)
    if not path.is_file():
        found = sorted(file.name.split("-")[0] for file in Path(folder).glob("*-00000-of-00001.parquet"))
        raise ValueError(
            f"{path} does not exist; the folder holds "
            + (f"the splits {found}" if found else "no index: run scripts/prepare_ct.py to its end")
        )
    try:
        table = pq.read_table(path, columns=SCAN_SCHEMA.names)
    except (pa.ArrowInvalid, KeyError, OSError) as error:
        raise ValueError(f"{path} is no index of scans: {error}") from error
    if missing := sorted(set(SCAN_SCHEMA.names) - set(table.column_names)):
        raise ValueError(f"{path} is no index of scans: it lacks the columns {missing}")
    return [record_to_row(record) for record in table.to_pylist()]


def row_to_record(row: ScanRow) -> dict[str, Any]:
    """A row as JSON-able values, the columns of the index."""
    record = asdict(row)
    record["labels"] = [{"finding": finding, "is_present": is_present} for finding, is_present in row.labels]
    return record | {name: list(record[name]) for name in ("shape_dhw", "spacing_mm_dhw", "anatomies_present")}


def record_to_row(record: dict[str, Any]) -> ScanRow:
    """The row that `row_to_record` described."""
    texts: Sequence[dict[str, Any]] = record["anatomy_texts"] or ()
    labels: Sequence[dict[str, Any]] = record["labels"] or ()
    return ScanRow(
        **{name: record[name] for name in ("scan_id", "study_id", "patient_id", "store_path")},
        shape_dhw=tuple(record["shape_dhw"]),
        spacing_mm_dhw=tuple(record["spacing_mm_dhw"]),
        anatomies_present=tuple(record["anatomies_present"] or ()),
        anatomy_texts=tuple(AnatomyText(**text) for text in texts),
        labels=tuple((label["finding"], label["is_present"]) for label in labels),
    )
