"""Random access to the rows of Parquet shards through memory-mapped Arrow files, with memory that no row count changes.

Parquet must decode a whole row group to give one row, so every shard is turned once into an Arrow file, which gives any
row in place and takes about the disk of the shard again. Of these files only a few are open at a time: opening all of
them, as `datasets` does, costs each process 1.9 GB of its own at 23 million rows (`benchmarks/dataset_startup.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

logger = logging.getLogger(__name__)

MAX_ROWS_PER_BATCH = 1000  # of a batch, only the headers and the row asked for are read from disk
TARGET_BATCH_BYTES = 32 * 2**20  # bounds the memory of the conversion where images are large
MAX_OPEN_FILES = 16  # opening one again takes 0.1 ms; pages of those that stay open count as resident memory
SHARDS_PER_INDEX_WRITE = 50  # what a kill during the first opening costs at most


class MappedRows:
    """A sequence of records (dicts of plain values) out of Parquet shards.

    Args:
        shards: Parquet files in one folder, in order.
        columns: those to keep; the others are not copied.
        cache_dir: of the Arrow files. A shard that changed is converted again, the others are not. Processes that start
            together wait for the one that converts.

    Raises:
        ValueError: where a shard is damaged or lacks a column, or the cache cannot be written.
    """

    def __init__(self, shards: Sequence[Path], columns: Sequence[str], cache_dir: Path) -> None:
        index = _convert_where_needed(shards, columns, cache_dir)
        self._files = [cache_dir / f"{shard.stem}.arrow" for shard in shards]
        self._batch_rows = [index[shard.name]["batch_rows"] for shard in shards]
        self._ends = np.cumsum([index[shard.name]["num_rows"] for shard in shards], dtype=np.int64)
        self._open_files: OrderedDict[int, _ArrowFile] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows")
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[number - 1]) if number else 0
        return self._file(number).row(index - start)

    def _file(self, number: int) -> _ArrowFile:
        file = self._open_files.pop(number, None) or _ArrowFile(self._files[number], self._batch_rows[number])
        self._open_files[number] = file  # now the one used last
        if len(self._open_files) > MAX_OPEN_FILES:
            self._open_files.popitem(last=False)
        return file

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open_files": OrderedDict()}  # a worker that is spawned maps the files itself


def cache_folder(folder: Path, cache_dir: Path | None) -> Path:
    """Where the Arrow files of the data set in `folder` lie.

    Beside the data by default: medical images should not leave copies in a cache of the home directory.
    """
    if cache_dir is None:
        return folder / ".cache"
    digest = hashlib.blake2b(str(folder.resolve()).encode("utf-8"), digest_size=6).hexdigest()
    return cache_dir / f"{folder.name}-{digest}"


class _ArrowFile:
    """One memory-mapped Arrow file; its batches are located, not read, when it is opened."""

    def __init__(self, path: Path, batch_rows: int) -> None:
        self._batch_rows = batch_rows
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))

    def row(self, index: int) -> dict[str, Any]:
        batch = self._reader.get_batch(index // self._batch_rows)
        return batch.slice(index % self._batch_rows, 1).to_pylist()[0]


def _convert_where_needed(shards: Sequence[Path], columns: Sequence[str], cache_dir: Path) -> dict[str, Any]:
    """The index of the cache (by shard: size, time of change, rows), once every shard has its Arrow file."""
    index_path = cache_dir / f"{shards[0].name.split('-')[0]}.index.json"
    index = _read_index(index_path)
    stale = [shard for shard in shards if not _is_current(shard, columns, index, cache_dir)]
    if not stale:
        return index
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / ".lock"):
            index = _read_index(index_path)  # another process may have done the work while this one waited
            stale = [shard for shard in stale if not _is_current(shard, columns, index, cache_dir)]
            (cache_dir / ".gitignore").write_text("*\n")
            for number, shard in enumerate(stale, 1):
                logger.info("preparing %s for random access (%d of %d)", shard.name, number, len(stale))
                identity = _identity(shard, columns)  # before reading: a change meanwhile is noticed next time
                index[shard.name] = identity | _convert(shard, columns, cache_dir / f"{shard.stem}.arrow")
                if number % SHARDS_PER_INDEX_WRITE == 0 or number == len(stale):
                    _write_index(index_path, index)
    except OSError as error:
        raise ValueError(
            f"cannot write the cache {cache_dir}: {error.strerror or error}. "
            "Make room, or name a folder that can be written as cache_dir."
        ) from error
    return index


def _convert(shard: Path, columns: Sequence[str], target: Path) -> dict[str, int]:
    """Write the Arrow file of a shard; its number of rows and of rows in each batch."""
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with pq.ParquetFile(shard) as parquet:
            missing = sorted(set(columns) - set(parquet.schema_arrow.names))
            if missing:
                raise ValueError(f"{shard} lacks the columns {missing}; needed are {list(columns)}")
            schema = pa.schema([parquet.schema_arrow.field(name) for name in columns])
            num_rows = parquet.metadata.num_rows
            batch_rows = TARGET_BATCH_BYTES * num_rows // max(shard.stat().st_size, 1)
            batch_rows = min(max(batch_rows, 1), MAX_ROWS_PER_BATCH)
            with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in _equal_batches(parquet, schema, batch_rows):
                    writer.write_batch(batch)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{shard} is no readable Parquet file: {error}. Download or build it again.") from error
    temporary.replace(target)
    return {"num_rows": num_rows, "batch_rows": batch_rows}


def _equal_batches(parquet: pq.ParquetFile, schema: pa.Schema, batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of `batch_rows` rows but for the last, so that a row's batch follows from its number."""
    held: list[pa.RecordBatch] = []  # together less than a batch: batches that are read end where a row group ends
    for batch in parquet.iter_batches(batch_size=batch_rows, columns=schema.names):
        held.append(batch.select(schema.names))
        if sum(part.num_rows for part in held) >= batch_rows:
            joined = pa.concat_batches(held)
            yield joined.slice(0, batch_rows)
            held = [joined.slice(batch_rows)] if joined.num_rows > batch_rows else []
    if held:
        yield pa.concat_batches(held)


def _identity(shard: Path, columns: Sequence[str]) -> dict[str, Any]:
    status = shard.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "columns": list(columns)}


def _is_current(shard: Path, columns: Sequence[str], index: dict[str, Any], cache_dir: Path) -> bool:
    known = index.get(shard.name, {})
    is_same = all(known.get(name) == value for name, value in _identity(shard, columns).items())
    return is_same and (cache_dir / f"{shard.stem}.arrow").exists()


def _read_index(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):  # none yet, or half written by a crash: convert
        return {}


def _write_index(path: Path, index: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(index), encoding="utf-8")
    temporary.replace(path)
