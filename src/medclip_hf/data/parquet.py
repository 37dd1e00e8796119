"""Figure rows on disk: Parquet shards written atomically, and a manifest that appears when a split is complete.

A split is `<split>-00000.parquet`, `<split>-00001.parquet`, … and, written last, `<split>.manifest.json` with the rows
of every shard. The number of shards is unknown while rows stream in, so it does not stand in the names; sets that
others wrote as `<split>-00000-of-00012.parquet` are read as well.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from filelock import FileLock, Timeout

from medclip_hf.data.records import ConceptMention, FigureRow

SPLITS = ("train", "validation", "test")
ROWS_PER_GROUP = 1000  # or what fills BYTES_PER_GROUP first, which bounds the memory of writer and readers
BYTES_PER_GROUP = 32 * 2**20

FIGURE_FEATURES = Features(
    {
        "row_id": Value("string"),
        "image": Image(),
        "caption": Value("string"),
        "concepts": List(
            {
                "cui": Value("string"),
                "name": Value("string"),
                "start_char": Value("int32"),
                "end_char": Value("int32"),
                "similarity": Value("float32"),
                "semantic_type": Value("string"),
                "is_negated": Value("bool"),
                "is_uncertain": Value("bool"),
            }
        ),
        "pmcid": Value("string"),
        "pmid": Value("string"),
        "figure_id": Value("string"),
        "license": Value("string"),
        "modality": Value("string"),
        "panel": Value("string"),
        "is_compound": Value("bool"),
        "cited_in": List(Value("string")),
    }
)

_CONCEPT_LEAVES = [f"concepts.list.element.{field.name}" for field in fields(ConceptMention)]
# Encoded images do not shrink; a dictionary of values that are all distinct only costs.
_TEXT_COLUMNS = ["row_id", "caption", "pmcid", "pmid", "figure_id", "license", "modality", "panel"]
_COMPRESSION = dict.fromkeys(
    [*_TEXT_COLUMNS, "image.path", *_CONCEPT_LEAVES, "is_compound", "cited_in.list.element"], "ZSTD"
) | {"image.bytes": "NONE"}
_DICTIONARY_COLUMNS = [
    "license",
    "modality",
    "panel",
    "cited_in.list.element",
    "concepts.list.element.cui",
    "concepts.list.element.semantic_type",
]


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where shard `number` of a split lies."""
    return folder / f"{split}-{number:05d}.parquet"


def manifest_path(folder: Path, split: str) -> Path:
    """Where the manifest of a complete split lies."""
    return folder / f"{split}.manifest.json"


def require_writable(folder: Path) -> None:
    """Create `folder` and prove that files can be written there, before any work is done.

    Raises:
        ValueError: where the folder cannot be created or written.
    """
    probe = folder / f".write-test-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to the folder {folder}: {error.strerror}. Name another one or change its permissions."
        ) from error


def write_text_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # another process may write the same file
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextmanager
def import_lock(folder: Path, split: str) -> Iterator[None]:
    """Holds a split for this process alone; a crash lets it go.

    Raises:
        ValueError: where another process holds it.
    """
    try:
        with FileLock(folder / f".{split}.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"another process is writing the split {split!r} in {folder}. Wait for it or stop it."
        ) from error


class FigureShardWriter:
    """Writes one shard row by row; the file appears under its name only when `commit` is called.

    Args:
        path: of the finished shard.
        bytes_per_group: images of a row group, which is what a reader of single rows must read at least.
    """

    def __init__(self, path: Path, bytes_per_group: int = BYTES_PER_GROUP) -> None:
        self.path = path
        self.bytes_per_group = bytes_per_group
        self.num_rows = 0
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._writer: pq.ParquetWriter | None = None
        self._group: list[dict[str, Any]] = []
        self._group_bytes = 0

    def write(self, row: FigureRow) -> None:
        """Add a row; at most one row group is held in memory."""
        self._group.append(_row_to_record(row))
        self._group_bytes += len(row.image_bytes or b"")
        self.num_rows += 1
        if len(self._group) >= ROWS_PER_GROUP or self._group_bytes >= self.bytes_per_group:
            self._flush()

    def commit(self, metadata: dict[str, Any] | None = None) -> None:
        """Finish the file, with `metadata` as JSON in its footer, and put it under its name."""
        self._flush()
        writer = self._open()
        writer.add_key_value_metadata({"medclip_hf": json.dumps(metadata or {}, ensure_ascii=False)})
        writer.close()
        with self._temporary.open("rb") as file:
            os.fsync(file.fileno())
        self._temporary.replace(self.path)

    def discard(self) -> None:
        """Leave no trace."""
        if self._writer is not None:
            self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._writer = pq.ParquetWriter(
                self._temporary,
                FIGURE_FEATURES.arrow_schema,
                compression=_COMPRESSION,
                use_dictionary=_DICTIONARY_COLUMNS,
                write_page_index=True,
            )
        return self._writer

    def _flush(self) -> None:
        if self._group:
            self._open().write_table(pa.Table.from_pylist(self._group, schema=FIGURE_FEATURES.arrow_schema))
            self._group, self._group_bytes = [], 0


def read_shard_metadata(path: Path) -> dict[str, Any]:
    """What `FigureShardWriter.commit` put into the footer; empty for shards of other writers.

    Raises:
        ValueError: it is no readable Parquet file.
    """
    try:
        stored = pq.read_metadata(path).metadata or {}
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no readable Parquet file: {error}. Download or build it again.") from error
    return json.loads(stored.get(b"medclip_hf", b"{}"))


def write_manifest(folder: Path, split: str, shards: list[Path], **more: Any) -> None:
    """Declare a split complete: the rows of every shard and whatever else is worth keeping about its making."""
    rows = {path.name: pq.read_metadata(path).num_rows for path in shards}
    manifest = {"split": split, "num_rows": sum(rows.values()), "shards": rows, **more}
    write_text_atomically(manifest_path(folder, split), json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def write_figure_rows(rows: Iterable[FigureRow], folder: Path, split: str, rows_per_shard: int = 10_000) -> list[Path]:
    """The shards of a split written from `rows` in one go, with their manifest.

    Raises:
        ValueError: where the split exists already, a row is not valid, or the folder cannot be written.
    """
    require_writable(folder)
    if list(folder.glob(f"{split}-*.parquet")):
        raise ValueError(f"{folder} already holds shards of the split {split!r}. Remove them or name another folder.")
    shards: list[Path] = []
    writer: FigureShardWriter | None = None
    try:
        for row in rows:
            if writer is None:
                writer = FigureShardWriter(shard_path(folder, split, len(shards)))
            writer.write(row)
            if writer.num_rows >= rows_per_shard:
                writer.commit()
                shards.append(writer.path)
                writer = None
        if writer is not None:
            writer.commit()
            shards.append(writer.path)
            writer = None
    finally:
        if writer is not None:
            writer.discard()
    write_manifest(folder, split, shards)
    return shards


def find_shards(folder: Path, split: str) -> list[Path]:
    """The Parquet files of a split, in order.

    Raises:
        ValueError: where there are none, where some are missing by their own names (``-of-00012``) or by the manifest,
            or where an import has not finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no data set at {folder}: the folder does not exist")
    shards = sorted(folder.glob(f"{split}-*.parquet"))
    if not shards:
        others = sorted({path.name.split("-")[0] for path in folder.glob("*-*.parquet")})
        raise ValueError(
            f"no shard {split}-*.parquet in {folder}; "
            + (f"it holds the splits {others}" if others else "it holds none")
        )
    _check_counted_names(folder, split, shards)
    _check_manifest(folder, split, shards)
    return shards


def read_figure_rows(shards: Iterable[Path]) -> Iterator[FigureRow]:
    """The rows of shards, in order, one row group in memory at a time.

    Raises:
        ValueError: a shard is no readable Parquet file, or lacks what a row needs.
    """
    for path in shards:
        read_shard_metadata(path)
        if missing := sorted({"row_id", "caption", "image", "concepts"} - set(pq.read_schema(path).names)):
            raise ValueError(f"{path} lacks the columns {missing}, which a row of a figure needs.")
        for batch in pq.ParquetFile(path).iter_batches(batch_size=ROWS_PER_GROUP):
            yield from map(record_to_row, batch.to_pylist())


def record_to_row(record: dict[str, Any]) -> FigureRow:
    """The row that a Parquet record stands for; columns that a row does not have are ignored."""
    image = record["image"] or {}
    content, path = image.get("bytes"), image.get("path")
    return FigureRow(
        row_id=record["row_id"],
        caption=record["caption"],
        concepts=tuple(ConceptMention(**concept) for concept in record["concepts"] or ()),
        image_path=path if content is None else None,
        image_bytes=content,
        **{name: record.get(name) or "" for name in ("pmcid", "pmid", "figure_id", "license", "modality", "panel")},
        is_compound=bool(record.get("is_compound")),
        cited_in=tuple(record.get("cited_in") or ()),
    )


def _row_to_record(row: FigureRow) -> dict[str, Any]:
    if (row.image_path is None) == (row.image_bytes is None):
        raise ValueError(f"row {row.row_id!r} needs exactly one of image_path and image_bytes")
    # Not `dataclasses.asdict`, whose deep copies took 1 ms a row.
    record = {name: value for name, value in vars(row).items() if name not in ("image_path", "image_bytes")}
    concepts = [vars(concept).copy() for concept in row.concepts]
    return record | {"concepts": concepts, "image": {"bytes": row.image_bytes, "path": row.image_path}}


def _check_counted_names(folder: Path, split: str, shards: list[Path]) -> None:
    counted = [re.fullmatch(rf"{re.escape(split)}-(\d+)-of-(\d+)\.parquet", path.name) for path in shards]
    totals = {int(match[2]) for match in counted if match}
    if not totals:
        return
    if len(totals) > 1 or not all(counted):
        raise ValueError(f"{folder} mixes shards of several versions of the split {split!r}. Keep one of them.")
    missing = sorted(set(range(totals.pop())) - {int(match[1]) for match in counted if match})
    if missing:
        raise ValueError(f"the split {split!r} in {folder} lacks the shards {missing}. Download or build them again.")


def _check_manifest(folder: Path, split: str, shards: list[Path]) -> None:
    manifest = manifest_path(folder, split)
    if not manifest.exists():
        if read_shard_metadata(shards[0]).get("is_resumable"):
            raise ValueError(
                f"the import of {split!r} into {folder} has not finished. Run it again: it goes on from there."
            )
        return
    expected = set(json.loads(manifest.read_text(encoding="utf-8"))["shards"])
    found = {path.name for path in shards}
    if expected != found:
        raise ValueError(
            f"{manifest} does not match the folder: missing {sorted(expected - found)}, "
            f"unknown {sorted(found - expected)}"
        )
