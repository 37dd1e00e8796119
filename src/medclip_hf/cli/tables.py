"""Rows to CSV, JSON, JSON lines or Parquet: to a file that appears when it is complete, or to standard output."""

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import numpy as np

Format = Literal["csv", "json", "jsonl", "parquet"]
Kind = Literal["text", "texts", "number", "integer", "vector"]

FORMATS: tuple[Format, ...] = ("csv", "json", "jsonl", "parquet")
STANDARD_OUTPUT = "-"
_ROWS_AT_ONCE = 256  # of a Parquet row group


class Writer(Protocol):
    """What takes rows."""

    def write(self, row: Mapping[str, Any]) -> None:
        """Take a row with all columns."""

    def finish(self) -> None:
        """Write what is left."""


def format_of(output: str, asked: str | None) -> Format:
    """The format that was asked for, else that of the file's ending, else CSV.

    Raises:
        ValueError: it is none of `FORMATS`, the output is a folder, or Parquet is to go to standard output.
    """
    if output != STANDARD_OUTPUT and Path(output).is_dir():
        raise ValueError(f"{output} is a folder: name a file to write.")
    ending = Path(output).suffix.removeprefix(".").lower() if output != STANDARD_OUTPUT else "csv"
    chosen = asked or ending
    for known in FORMATS:
        if chosen == known:
            if known == "parquet" and output == STANDARD_OUTPUT:
                raise ValueError("Parquet is a file: name it with --output.")
            return known
    raise ValueError(
        f"{output}: the format {chosen!r} is not known; end the name in .{', .'.join(FORMATS)}, or say --format."
    )


@contextmanager
def open_table(output: str, chosen: Format, columns: Mapping[str, Kind]) -> Iterator[Writer]:
    """A writer of rows; the file appears, or is replaced, when all is written, and not at all after an error.

    Args:
        output: path, or "-" for standard output.
        chosen: see `format_of`.
        columns: name -> kind of each column.
    """
    if output == STANDARD_OUTPUT:
        writer = _WRITERS[chosen](sys.stdout, columns)
        yield writer
        writer.finish()
        sys.stdout.flush()
        return
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if chosen == "parquet":
            parquet = _ParquetWriter(partial, columns)
            try:
                yield parquet
            finally:
                parquet.finish()
        else:
            with partial.open("w", encoding="utf-8", newline="") as file:
                writer = _WRITERS[chosen](file, columns)
                yield writer
                writer.finish()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _CSVWriter:
    """A vector gets a column for each of its numbers; texts are joined by semicolons.

    Rows wait until the width of every vector is known: the first ones may have none.
    """

    def __init__(self, file: IO[str], columns: Mapping[str, Kind]) -> None:
        self._csv = csv.writer(file, lineterminator="\n")
        self._columns = columns
        self._widths = dict.fromkeys((name for name, kind in columns.items() if kind == "vector"), 0)
        self._waiting: list[Mapping[str, Any]] | None = []

    def write(self, row: Mapping[str, Any]) -> None:
        for name, width in self._widths.items():
            self._widths[name] = width or len(row[name] if row[name] is not None else ())
        if self._waiting is None:
            self._csv.writerow(self._cells(row))
            return
        self._waiting.append(row)
        if all(self._widths.values()):
            self._start()

    def finish(self) -> None:
        if self._waiting is not None:
            self._start()

    def _start(self) -> None:
        """The header, and the rows that waited for it."""
        header: list[str] = []
        for name in self._columns:
            width = self._widths.get(name)
            header += [f"{name}_{place}" for place in range(width)] if width else [name]
        self._csv.writerow(header)
        self._csv.writerows(map(self._cells, self._waiting or ()))
        self._waiting = None

    def _cells(self, row: Mapping[str, Any]) -> list[Any]:
        cells: list[Any] = []
        for name, kind in self._columns.items():
            value = row[name]
            if value is None:
                cells += [""] * (self._widths.get(name) or 1)
            elif kind == "vector":
                cells += [f"{number:.7g}" for number in value]
            elif kind == "texts":
                cells.append("; ".join(value))
            else:
                cells.append(f"{value:.6g}" if kind == "number" else value)
        return cells


class _JSONWriter:
    """One array, or one object a line."""

    def __init__(self, file: IO[str], columns: Mapping[str, Kind], *, lines: bool = False) -> None:
        self._file, self._columns, self._lines = file, columns, lines
        self._count = 0

    def write(self, row: Mapping[str, Any]) -> None:
        text = json.dumps({name: _plain(row[name]) for name in self._columns}, ensure_ascii=False)
        if self._lines:
            self._file.write(text + "\n")
        else:
            self._file.write((",\n " if self._count else "[\n ") + text)
        self._count += 1

    def finish(self) -> None:
        if not self._lines:
            self._file.write("\n]\n" if self._count else "[]\n")


class _JSONLinesWriter(_JSONWriter):
    def __init__(self, file: IO[str], columns: Mapping[str, Kind]) -> None:
        super().__init__(file, columns, lines=True)


class _ParquetWriter:
    def __init__(self, path: Path, columns: Mapping[str, Kind]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        types = {
            "text": pa.string(),
            "texts": pa.list_(pa.string()),
            "number": pa.float64(),
            "integer": pa.int64(),
            "vector": pa.list_(pa.float32()),
        }
        self._schema = pa.schema([(name, types[kind]) for name, kind in columns.items()])
        self._file = parquet.ParquetWriter(path, self._schema)
        self._table = pa.Table
        self._rows: list[dict[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self._rows.append({name: _plain(row[name]) for name in self._schema.names})
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(self._table.from_pylist(self._rows, schema=self._schema))
            self._rows = []


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


_WRITERS: dict[Format, Any] = {"csv": _CSVWriter, "json": _JSONWriter, "jsonl": _JSONLinesWriter}
