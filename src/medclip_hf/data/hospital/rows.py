"""What a prepared hospital data set looks like on disk: rows, labels, groups of patients, and `dataset.json`.

Pictures (``"kind": "figures"``) are the Parquet shards of `data.parquet`, so `FigureDataset` reads them as they are,
with the columns of `HospitalRow` beside them. CT scans (``"kind": "scans"``) are the store and index of
`data.ct.engine`, so `ScanDataset` reads them, with ``subgroups.parquet`` beside the index. Labels are pairs (finding,
is_present) in both; a finding that is not known for a row is not among them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from numpy.typing import NDArray

from medclip_hf.data.ct.scan_index import read_scan_rows
from medclip_hf.data.parquet import (
    BYTES_PER_GROUP,
    FIGURE_FEATURES,
    ROWS_PER_GROUP,
    find_shards,
    record_to_row,
    shard_path,
    write_manifest,
    write_text_atomically,
)
from medclip_hf.data.records import FigureRow

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
SUBGROUPS_FILE = "subgroups.parquet"
GROUP_COLUMNS = ("sex", "age_band", "scanner", "modality", "body_part", "view")

Kind = Literal["figures", "scans"]
Task = Literal["none", "single_label", "multi_label"]
Labels = tuple[tuple[str, bool], ...]

_OWN_FEATURES = {
    "patient_id": Value("string"),
    "study_id": Value("string"),
    "labels": List({"finding": Value("string"), "is_present": Value("bool")}),
    "sex": Value("string"),
    "age_band": Value("string"),
    "scanner": Value("string"),
    "body_part": Value("string"),
    "view": Value("string"),
}
HOSPITAL_FEATURES = Features({**FIGURE_FEATURES, **_OWN_FEATURES})
_SUBGROUP_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("split", "row_id", "patient_id", "study_id", *GROUP_COLUMNS)]
)


@dataclass(frozen=True)
class PatientGroups:
    """What is kept of a header, by an allow list: coarse facts that many patients share; empty where unknown.

    Args:
        sex: "F", "M" or "O".
        age_band: ten years, "60-69"; everyone from 90 on is "90+".
        scanner: model name.
        modality: DICOM's code, "DX".
        body_part: DICOM's word, "CHEST".
        view: "PA", "LATERAL", ...
    """

    sex: str = ""
    age_band: str = ""
    scanner: str = ""
    modality: str = ""
    body_part: str = ""
    view: str = ""


@dataclass(frozen=True)
class HospitalRow:
    """A picture with its text, labels and pseudonyms: one row of a hospital's data set.

    Args:
        figure: row id (a keyed hash), picture as PNG bytes, caption (the de-identified text; may be empty).
        patient_id: keyed hash.
        study_id: keyed hash.
        labels: (finding, is_present); what is unknown is left out.
        groups: of the patient and the examination.
    """

    figure: FigureRow
    patient_id: str
    study_id: str
    labels: Labels = ()
    groups: PatientGroups = field(default_factory=PatientGroups)


@dataclass(frozen=True)
class DatasetFacts:
    """What `dataset.json` says of a prepared set; it names no patient and no file of the hospital.

    Args:
        kind: "figures" or "scans".
        task: "none" (texts alone), "single_label" (exactly one class a row) or "multi_label".
        classes: names of the labels, in the order in which a classifier counts them.
        counts: split → rows, patients, and rows with each class.
        pseudonyms: how identifiers were hashed; never the key.
        settings: what decided how the rows look.
        report: what was replaced, set aside and found; counts alone.
        format_version: of this layout.
    """

    kind: Kind
    task: Task
    classes: tuple[str, ...]
    counts: dict[str, dict[str, Any]]
    pseudonyms: dict[str, Any]
    settings: dict[str, Any]
    report: dict[str, Any]
    format_version: int = FORMAT_VERSION


def write_hospital_rows(
    rows: Iterable[HospitalRow], folder: Path, split: str, rows_per_shard: int = 10_000, **manifest: Any
) -> int:
    """How many rows were written; the shards of the split replace older ones, the manifest comes last.

    At most one row group is held in memory.
    """
    for old in [*folder.glob(f"{split}-*.parquet"), *folder.glob(f"{split}.manifest.json")]:
        old.unlink()
    shards: list[Path] = []
    num_rows = 0
    for shard_rows in _shards_of(rows, rows_per_shard):
        path = shard_path(folder, split, len(shards))
        num_rows += _write_shard(shard_rows, path)
        shards.append(path)
    write_manifest(folder, split, shards, **manifest)
    return num_rows


def read_hospital_rows(folder: Path | str, split: str) -> Iterator[HospitalRow]:
    """The rows of a split, in order, one row group in memory at a time.

    Raises:
        ValueError: where there is no such split, or its rows were not written by `scripts/prepare_hospital.py`.
    """
    for path in find_shards(Path(folder), split):
        file = pq.ParquetFile(path)
        if missing := sorted(_OWN_FEATURES.keys() - set(file.schema_arrow.names)):
            raise ValueError(f"{path} lacks the columns {missing}. Prepare the data with scripts/prepare_hospital.py.")
        for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
            yield from map(record_to_hospital_row, batch.to_pylist())


def record_to_hospital_row(record: Mapping[str, Any]) -> HospitalRow:
    """The row that a Parquet record stands for."""
    return HospitalRow(
        figure=record_to_row(dict(record)),
        patient_id=record["patient_id"],
        study_id=record["study_id"] or "",
        labels=tuple((label["finding"], label["is_present"]) for label in record["labels"] or ()),
        groups=PatientGroups(**{name: record.get(name) or "" for name in GROUP_COLUMNS}),
    )


def hospital_row_to_record(row: HospitalRow) -> dict[str, Any]:
    """A row as the values of its Parquet columns."""
    figure = asdict(row.figure)
    image = {"bytes": figure.pop("image_bytes"), "path": figure.pop("image_path")}
    labels = [{"finding": finding, "is_present": is_present} for finding, is_present in row.labels]
    own = {"patient_id": row.patient_id, "study_id": row.study_id, "labels": labels}
    return figure | {"image": image} | own | asdict(row.groups)


def write_subgroups(rows: Iterable[tuple[str, str, str, str, PatientGroups]], folder: Path) -> Path:
    """The file of groups beside a scan index, written atomically.

    Args:
        rows: (split, row id, patient id, study id, groups).
        folder: of the data set.
    """
    names = _SUBGROUP_SCHEMA.names[:4]
    records = [dict(zip(names, row[:4], strict=True)) | asdict(row[4]) for row in sorted(rows, key=lambda row: row[:2])]
    path = folder / SUBGROUPS_FILE
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(records, schema=_SUBGROUP_SCHEMA), temporary, compression="zstd")
    temporary.replace(path)
    return path


def read_subgroups(folder: Path | str, split: str) -> dict[str, PatientGroups]:
    """Row id (of a picture) or scan id → its groups; of either kind of data set.

    Raises:
        ValueError: where the folder holds no prepared hospital data.
    """
    folder = Path(folder)
    if (folder / SUBGROUPS_FILE).is_file():
        records = pq.read_table(folder / SUBGROUPS_FILE, filters=[("split", "=", split)]).to_pylist()
    else:
        columns = ["row_id", *GROUP_COLUMNS]
        try:
            tables = [pq.read_table(path, columns=columns) for path in find_shards(folder, split)]
        except (pa.ArrowInvalid, KeyError) as error:
            raise ValueError(f"{folder} was not written by scripts/prepare_hospital.py: {error}") from error
        records = [record for table in tables for record in table.to_pylist()]
    return {
        record["row_id"]: PatientGroups(**{name: record.get(name) or "" for name in GROUP_COLUMNS})
        for record in records
    }


def read_labels(folder: Path | str, split: str) -> dict[str, tuple[str, Labels]]:
    """Row id (of a picture) or scan id → (patient id, labels); of either kind of data set, without reading pictures."""
    if read_dataset_facts(folder).kind == "scans":
        return {row.scan_id: (row.patient_id, row.labels) for row in read_scan_rows(folder, split)}
    found: dict[str, tuple[str, Labels]] = {}
    for path in find_shards(Path(folder), split):
        for record in pq.read_table(path, columns=["row_id", "patient_id", "labels"]).to_pylist():
            labels = tuple((label["finding"], label["is_present"]) for label in record["labels"] or ())
            found[record["row_id"]] = (record["patient_id"], labels)
    return found


def label_vector(labels: Labels, classes: Sequence[str]) -> NDArray[np.float32]:
    """(num_classes,): 1 where present, 0 where absent, NaN where it is not known."""
    known = dict(labels)
    return np.array([float(known[name]) if name in known else np.nan for name in classes], dtype=np.float32)


def write_dataset_facts(facts: DatasetFacts, folder: Path) -> Path:
    """`dataset.json`, written last and atomically: a folder that has it is complete."""
    path = folder / DATASET_FILE
    write_text_atomically(path, json.dumps(asdict(facts), indent=2, ensure_ascii=False) + "\n")
    return path


def read_dataset_facts(folder: Path | str) -> DatasetFacts:
    """What `dataset.json` says.

    Raises:
        ValueError: where there is none, it is damaged, or of another version.
    """
    path = Path(folder) / DATASET_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"{path} has version {version}, this code reads {FORMAT_VERSION}. Prepare the data again.")
        return DatasetFacts(**values | {"classes": tuple(values["classes"])})
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is no description of prepared hospital data ({type(error).__name__}). Run "
            "scripts/prepare_hospital.py to its end."
        ) from error


def _shards_of(rows: Iterable[HospitalRow], rows_per_shard: int) -> Iterator[Iterator[HospitalRow]]:
    """The rows as consecutive iterators of a shard each; an empty split has none."""
    remaining = iter(rows)
    for first in remaining:

        def shard(first: HospitalRow = first) -> Iterator[HospitalRow]:
            yield first
            for _, row in zip(range(rows_per_shard - 1), remaining, strict=False):
                yield row

        yield shard()


def _write_shard(rows: Iterable[HospitalRow], path: Path) -> int:
    temporary = path.with_name(f".{path.name}.tmp")
    schema = HOSPITAL_FEATURES.arrow_schema
    group: list[dict[str, Any]] = []
    num_rows = group_bytes = 0
    # Pictures are compressed already: the codec of the whole file would only cost time on them.
    compression = dict.fromkeys(_leaf_columns(schema), "ZSTD") | {"image.bytes": "NONE"}
    with pq.ParquetWriter(temporary, schema, compression=compression) as writer:
        for row in rows:
            group.append(hospital_row_to_record(row))
            num_rows += 1
            group_bytes += len(row.figure.image_bytes or b"")
            if len(group) >= ROWS_PER_GROUP or group_bytes >= BYTES_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group, group_bytes = [], 0
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    temporary.replace(path)
    return num_rows


def _leaf_columns(schema: pa.Schema) -> list[str]:
    """The dotted names of Parquet's leaf columns."""
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    parquet_schema = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet_schema.column(number).path for number in range(len(parquet_schema))]
