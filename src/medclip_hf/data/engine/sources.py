"""The sources of the MedConcept engine in one shape: small items that are listed once, each read into figure rows."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from medclip_hf.data.articles.panels import take_apart
from medclip_hf.data.articles.pmc import ArticleSource, open_store
from medclip_hf.data.engine.language import clean_caption
from medclip_hf.data.engine.settings import SourceSettings
from medclip_hf.data.images import UnreadableImage, path_inside, read_file
from medclip_hf.data.medconcept import MAX_LINE_BYTES, iter_lines
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop

Item = dict[str, Any]  # of plain values: the list of items is kept as JSON lines

IMAGE_KEYS = ("image", "image_path", "file_name", "filename")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
CAPTION_KEYS = ("caption", "text", "fig_caption")
TEXT_FIELDS = {
    "pmcid": ("pmcid", "pmc"),
    "pmid": ("pmid",),
    "figure_id": ("figure_id", "fig_id"),
    "license": ("license",),
}


class ItemSource(Protocol):
    """What the engine asks of a source."""

    def list_items(self) -> Iterator[Item]:
        """All items, in an order that does not change while the engine runs."""

    def read(self, item: Item) -> Iterator[FigureRow | Drop]:
        """The figures of an item, each with its image's bytes, or the reasons why there are none."""


def open_source(settings: SourceSettings) -> ItemSource:
    """The source that the settings name.

    Raises:
        ValueError: where there is nothing at its path, or a licence has no such name.
    """
    if settings.kind == "table":
        images = Path(settings.images) if settings.images else None
        return TableSource(Path(settings.path), images, split_panels=settings.split_panels)
    return ArticleSource(
        open_store(settings.kind, settings.path),
        licenses=settings.licenses,
        keep_retracted=settings.keep_retracted,
        split_panels=settings.split_panels,
    )


class TableSource:
    """Image–caption pairs of a CSV, JSON lines or Parquet file.

    Args:
        path: of the table, with a column for the image (a path below `images`; in Parquet also the file's bytes, as
            `datasets` stores them) and one for the caption.
        images: folder that image paths start from; that of the table by default.
        split_panels: take compound figures apart where caption and picture agree on the panels.

    Raises:
        ValueError: where there is no such file or folder.
    """

    def __init__(self, path: Path, images: Path | None = None, split_panels: bool = True) -> None:
        self.path = path
        self.split_panels = split_panels
        self.images = images or path.parent
        if not path.is_file():
            raise ValueError(f"no table at {path}: name a CSV, JSON lines or Parquet file")
        if not self.images.is_dir():
            raise ValueError(f"no folder {self.images}: name the folder that the table's image paths start from")

        self._group: tuple[int, pa.Table] | None = None  # the row group of images that was read last
        self._lock = threading.Lock()

    def list_items(self) -> Iterator[Item]:
        """The lines of the table, each with its number; images in a Parquet file are read later."""
        for number, (line, place) in enumerate(self._lines(), 1):
            yield {"number": number, "line": line, **place}

    def read(self, item: Item) -> Iterator[FigureRow | Drop]:
        """The figure of one line."""
        line, number = item["line"], item["number"]
        if not isinstance(line, dict):
            yield Drop("line not readable", str(line)[:200], f"{self.path.stem}:{number}")
            return
        row_id = _first(line, ("row_id", "id")) or f"{self.path.stem}:{number}"
        caption = _first(line, CAPTION_KEYS)
        if not caption:
            yield Drop("caption empty", f"line {number}", row_id)
            return
        try:
            content = self._read_image(item)
        except UnreadableImage as error:
            yield Drop(error.reason, error.detail, row_id)
            return
        texts: dict[str, Any] = {name: _first(line, keys) for name, keys in TEXT_FIELDS.items()}
        row = FigureRow(row_id, caption, image_bytes=content, **texts)
        yield from take_apart(row) if self.split_panels else (row,)

    def _read_image(self, item: Item) -> bytes:
        name = _first(item["line"], IMAGE_KEYS)
        if "row_group" in item:
            stored = self._stored_image(item["row_group"], item["place"])
            if isinstance(stored, bytes):
                return stored
            name = stored or name
        if not name:
            raise UnreadableImage("image missing", f"line {item['number']} names none")
        return read_file(path_inside(self.images, name))

    def _stored_image(self, row_group: int, place: int) -> bytes | str | None:
        """The bytes, or the path, in the image column of a Parquet file."""
        with self._lock:
            if self._group is None or self._group[0] != row_group:
                with pq.ParquetFile(self.path) as file:
                    (column,) = _image_columns(file.schema_arrow)
                    self._group = (row_group, file.read_row_group(row_group, columns=[column]))
            value = self._group[1].column(0)[place].as_py()
        return value.get("bytes") or value.get("path") if isinstance(value, dict) else value

    def _lines(self) -> Iterator[tuple[Any, dict[str, int]]]:
        """Each line as plain values, and where its image is stored, if it is."""
        suffix = self.path.suffix.lower()
        if suffix == ".parquet":
            yield from self._parquet_lines()
        elif suffix in (".csv", ".tsv"):
            yield from ((line, {}) for line in self._csv_lines("\t" if suffix == ".tsv" else ","))
        elif suffix in JSON_SUFFIXES:
            for line in iter_lines(self.path):
                yield _json_or_text(line.content), {}
        else:
            raise ValueError(
                f"{self.path} is no table: .csv, .tsv, .parquet or {', '.join(JSON_SUFFIXES)} (JSON lines)"
            )

    def _csv_lines(self, delimiter: str) -> Iterator[Any]:
        csv.field_size_limit(MAX_LINE_BYTES)
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = csv.DictReader(file, delimiter=delimiter)
            self._require_columns(lines.fieldnames or ())
            while True:
                try:
                    line = next(lines)
                    "".join(value for value in line.values() if isinstance(value, str)).encode()
                    yield line
                except StopIteration:
                    return
                except (csv.Error, UnicodeEncodeError) as error:
                    yield "not UTF-8" if isinstance(error, UnicodeEncodeError) else str(error)

    def _require_columns(self, names: Sequence[str]) -> None:
        for keys in (IMAGE_KEYS, CAPTION_KEYS):
            if not set(keys) & set(names):
                have = ", ".join(repr(name[:50]) for name in names[:20])
                raise ValueError(f"{self.path} has no column {' or '.join(map(repr, keys))}; it has {have or 'none'}")

    def _parquet_lines(self) -> Iterator[tuple[Any, dict[str, int]]]:
        try:
            opened = pq.ParquetFile(self.path)
        except pa.ArrowException as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error
        with opened as file:
            schema = file.schema_arrow
            has_images = bool(_image_columns(schema))
            columns = [field.name for field in schema if _is_plain(field.type)]
            self._require_columns([*columns, *_image_columns(schema)])
            for row_group in range(file.num_row_groups):
                place = 0
                for batch in file.iter_batches(1000, [row_group], columns=columns):
                    for line in batch.to_pylist():
                        yield line, {"row_group": row_group, "place": place} if has_images else {}
                        place += 1


def _image_columns(schema: pa.Schema) -> list[str]:
    """The column that stores images, as `datasets` does (bytes and path) or as bytes alone; none where paths stand."""
    stored = (pa.types.is_struct, pa.types.is_binary, pa.types.is_large_binary)
    names = [name for name in IMAGE_KEYS if name in schema.names]
    return [name for name in names if any(is_of(schema.field(name).type) for is_of in stored)][:1]


def _is_plain(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_integer)
    return any(is_of(kind) for is_of in texts)


def _json_or_text(content: bytes | None) -> Any:
    """What a line of JSON holds, or, as text, what is wrong with it."""
    if content is None:
        return f"more than {MAX_LINE_BYTES:,} bytes"
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        return str(error)[:200]


def _first(line: dict[str, Any], keys: tuple[str, ...]) -> str:
    """The first of these values that is there, as text that every file can hold."""
    values = (line.get(key) for key in keys)
    found = next((str(value) for value in values if isinstance(value, str | int) and str(value).strip()), "")
    return found if keys in (CAPTION_KEYS, IMAGE_KEYS) else clean_caption(found)
