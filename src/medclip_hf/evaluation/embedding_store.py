"""Embeddings of very many pictures or scans on disk: shards that appear whole, set-aside rows, a manifest at the end.

    settings.json                 what the embeddings depend on; compared when a run goes on
    embeddings-00000.parquet …    or .safetensors: the rows of unit 0, in order
    set_aside/00000.jsonl …       rows of the unit that have no embedding, and why
    manifest.json                 written last: shards, rows, counts of reasons

A unit is a fixed range of the source's rows. Its file depends on the unit alone and not on who made it, so any number
of processes, started and killed at any time, leave the same files. The processes need not know of each other: whoever
finds all shards there writes the manifest, which is the same whoever does.
"""

import json
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from medclip_hf.data.parquet import require_writable
from medclip_hf.data.stages import Drop, Tally
from medclip_hf.data.workers import Task, TaskReport

logger = logging.getLogger(__name__)

StoreFormat = Literal["parquet", "safetensors"]
Arrays = dict[str, NDArray[Any]]

FORMAT_VERSION = 1
_METADATA_KEY = "medclip_hf"
_BYTES_PER_GROUP = 32 * 2**20  # of a Parquet row group, which is what a reader of single rows must read at least


@dataclass(frozen=True)
class Shard:
    """The rows of a unit that have embeddings, in the order of the source.

    Args:
        row_ids: N names.
        arrays: by name, (N, …) each.
    """

    row_ids: tuple[str, ...]
    arrays: Arrays = field(repr=False)


class EmbeddingStore:
    """The folder of a run.

    Args:
        folder: of the output.
        settings: JSON-able; what the embeddings depend on.
        num_rows: of the source.
        rows_per_shard: of each unit but the last.
        store_format: of the shards.

    Raises:
        ValueError: `rows_per_shard` is below 1, or there is no row.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        num_rows: int,
        rows_per_shard: int,
        store_format: StoreFormat,
    ) -> None:
        if rows_per_shard < 1 or num_rows < 1:
            raise ValueError(
                f"expected at least 1 row and 1 row a shard, got {num_rows} rows and {rows_per_shard} rows a shard."
            )
        self.folder = folder
        self.num_rows = num_rows
        self.rows_per_shard = rows_per_shard
        self.store_format = store_format
        self.settings = dict(settings) | {
            "format_version": FORMAT_VERSION,
            "store_format": store_format,
            "num_rows": num_rows,
            "rows_per_shard": rows_per_shard,
        }

    @property
    def num_units(self) -> int:
        """How many shards there will be."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of(self, unit: int) -> range:
        """The rows of a unit, as numbers of the source."""
        first = unit * self.rows_per_shard
        return range(first, min(first + self.rows_per_shard, self.num_rows))

    def open(self) -> None:
        """Make the folder, or see that what lies there belongs to this run.

        Raises:
            ValueError: the folder cannot be written, or holds embeddings made with other settings.
        """
        require_writable(self.folder)
        path = self.folder / "settings.json"
        if path.exists():
            _require_same(json.loads(path.read_text(encoding="utf-8")), self.settings, self.folder)
        elif any(self.folder.glob("embeddings-*")):
            raise ValueError(f"{self.folder} holds embeddings without settings.json. Name another folder.")
        else:
            (self.folder / "set_aside").mkdir(exist_ok=True)
            _write_whole(path, lambda temporary: temporary.write_text(_as_json(self.settings), encoding="utf-8"))

    def shard_path(self, unit: int) -> Path:
        """Where the shard of a unit lies."""
        return self.folder / f"embeddings-{unit:05d}.{self.store_format}"

    def is_done(self, unit: int) -> bool:
        """Whether a unit has its shard, which is written last."""
        return self.shard_path(unit).exists()

    def write(self, unit: int, shard: Shard, drops: Sequence[Drop]) -> Tally:
        """Put what became of a unit under its names: set-aside rows first, then the shard; each whole or not at all.

        Raises:
            ValueError: there is no space, or the folder can no longer be written. What was finished before stays.
        """
        tally = Tally(len(shard.row_ids), Counter(drop.reason for drop in drops))
        lines = "".join(
            json.dumps({"row_id": drop.row_id, "reason": drop.reason, "detail": drop.detail[:1000]}) + "\n"
            for drop in drops
        )
        metadata = {"unit": unit, "tally": tally.as_dict(), "shapes": _shapes(shard.arrays)}
        try:
            aside = self.folder / "set_aside" / f"{unit:05d}.jsonl"
            if lines:
                _write_whole(aside, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
            write = _write_parquet if self.store_format == "parquet" else _write_safetensors
            _write_whole(self.shard_path(unit), lambda temporary: write(temporary, shard, metadata))
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"shard {unit} cannot be written to {self.folder}: {error}. Finished shards are whole; make room and "
                "start the same command again."
            ) from error
        return tally

    def finish(self) -> Tally | None:
        """Write the manifest if every shard is there; what became of all rows then, else None."""
        if not all(self.is_done(unit) for unit in range(self.num_units)):
            return None
        total = Tally()
        rows = {}
        for unit in range(self.num_units):
            found = _read_metadata(self.shard_path(unit))
            tally = Tally.from_dict(found["tally"])
            rows[self.shard_path(unit).name] = tally.kept
            total.add(tally)
        manifest = {"settings": self.settings, **total.as_dict(), "shards": rows}
        text = _as_json(manifest)
        _write_whole(self.folder / "manifest.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
        for leftover in (*self.folder.glob(".embeddings-*.tmp"), *self.folder.glob("set_aside/.*.tmp")):
            leftover.unlink(missing_ok=True)  # of processes that were killed
        return total


class ShardWriter:
    """Writes a shard in a thread while the next one is made; no more than these two are in memory.

    A context: whoever leaves it early leaves no half-written shard and no thread behind.

    Args:
        store: where shards go.
    """

    def __init__(self, store: EmbeddingStore) -> None:
        self.store = store
        self._thread = ThreadPoolExecutor(1, "shards")
        self._writing: tuple[Task, Future[Tally]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def write(self, task: Task, make_shard: Callable[[], Shard], drops: Sequence[Drop]) -> Iterator[TaskReport]:
        """Begin with a unit once the one before, whose report this gives, is on disk."""
        yield from self.finish()
        self._writing = (task, self._thread.submit(lambda: self.store.write(task.number, make_shard(), drops)))

    def finish(self) -> Iterator[TaskReport]:
        """The report of the unit that is being written, once it is on disk.

        Raises:
            ValueError: it cannot be written, see `EmbeddingStore.write`.
        """
        if self._writing is not None:
            (task, tally), self._writing = self._writing, None
            yield TaskReport(task, len(self.store.rows_of(task.number)), tally.result())

    def wait(self) -> None:
        """Until nothing is being written: a process must not be forked amid it, with locks that nobody will release."""
        if self._writing is not None:
            futures.wait([self._writing[1]])


def read_shards(folder: Path | str, names: Sequence[str] | None = None) -> Iterator[Shard]:
    """The shards of a finished run that have rows, in order, one in memory at a time.

    Args:
        folder: of the run.
        names: of the arrays wanted (``["image_embeds"]``); default: all.

    Raises:
        ValueError: the run is not finished, a shard is damaged, or an array is not there.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished embeddings: start scripts/embed.py again until it is done.")
    for name, num_rows in sorted(json.loads(path.read_text(encoding="utf-8"))["shards"].items()):
        if not num_rows:
            continue
        try:
            yield _read_shard(folder / name, names)
        except (OSError, pa.ArrowException, SafetensorError) as error:
            raise ValueError(f"{folder / name} cannot be read: {error}. Remove it and start the run again.") from error


# Files -----------------------------------------------------------------------------------------------------------


def _write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file under a name of this process alone, then put it under its own name."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(path: Path, shard: Shard, metadata: Mapping[str, Any]) -> None:
    """One column of fixed-size lists for each array; a row of more than one axis lies flat, its shape in the footer."""
    columns: dict[str, pa.Array] = {"row_id": pa.array(shard.row_ids, pa.string())}
    for name, values in shard.arrays.items():
        flat = pa.array(values.reshape(-1))
        width = int(np.prod(values.shape[1:]))
        columns[name] = flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, width)
    table = pa.table(columns).replace_schema_metadata({_METADATA_KEY: json.dumps(dict(metadata), sort_keys=True)})
    row_bytes = max(1, sum(values.nbytes for values in shard.arrays.values()) // max(1, len(shard.row_ids)))
    # Vectors neither shrink nor repeat, and nobody looks for one by its smallest number.
    pq.write_table(
        table,
        path,
        compression="none",
        use_dictionary=False,
        write_statistics=["row_id"],
        row_group_size=max(1, _BYTES_PER_GROUP // row_bytes),
    )


def _write_safetensors(path: Path, shard: Shard, metadata: Mapping[str, Any]) -> None:
    arrays = {name: np.ascontiguousarray(values) for name, values in shard.arrays.items()}
    save_file(arrays, path, metadata={_METADATA_KEY: json.dumps({**metadata, "row_ids": shard.row_ids})})


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:
                return json.loads((file.metadata() or {})[_METADATA_KEY])
        return json.loads((pq.read_schema(path).metadata or {})[_METADATA_KEY.encode()])
    except (OSError, KeyError, pa.ArrowException, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged or of another program: {error}. Remove it and start the run again."
        ) from error


def _read_shard(path: Path, names: Sequence[str] | None) -> Shard:
    metadata = _read_metadata(path)
    shapes: dict[str, list[int]] = metadata["shapes"]
    wanted = list(shapes) if names is None else list(names)
    if unknown := sorted(set(wanted) - set(shapes)):
        raise ValueError(f"{path} has no {unknown}; it holds {sorted(shapes)}.")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="np") as file:
            return Shard(tuple(metadata["row_ids"]), {name: file.get_tensor(name) for name in wanted})
    table = pq.read_table(path, columns=["row_id", *wanted]).combine_chunks()
    arrays = {name: _array_of(table.column(name)).reshape(-1, *shapes[name]) for name in wanted}
    return Shard(tuple(table.column("row_id").to_pylist()), arrays)


def _array_of(column: pa.ChunkedArray) -> NDArray[Any]:
    chunks = [chunk.flatten() if pa.types.is_fixed_size_list(chunk.type) else chunk for chunk in column.chunks]
    return np.concatenate([chunk.to_numpy(zero_copy_only=False) for chunk in chunks] or [np.zeros(0, np.float32)])


def _shapes(arrays: Mapping[str, NDArray[Any]]) -> dict[str, list[int]]:
    """Of one row of each array."""
    return {name: list(values.shape[1:]) for name, values in arrays.items()}


def _as_json(values: Mapping[str, Any]) -> str:
    return json.dumps(dict(values), indent=2, sort_keys=True) + "\n"


def _require_same(earlier: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    changed = sorted(key for key in earlier.keys() | now.keys() if earlier.get(key) != now.get(key))
    if changed:
        changes = "; ".join(f"{key} was {earlier.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise ValueError(
            f"{folder} belongs to a run of another model, source or setting ({changes}). Name another folder, or ask "
            "for the same."
        )
