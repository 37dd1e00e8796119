"""The sources of the MedConcept engine in one shape: small items that are listed once, each read into figure rows."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq

from medclip_hf.data.engine_settings import SourceSettings
from medclip_hf.data.images import UnreadableImage, path_inside, read_file
from medclip_hf.data.pmc import ArticleSource, open_store
from medclip_hf.data.records import FigureRow
from medclip_hf.data.stages import Drop

Item = dict[str, Any]  # of plain values: the list of items is kept as JSON lines

IMAGE_KEYS = ("image", "image_path", "file_name", "filename")
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
        return TableSource(Path(settings.path), Path(settings.images) if settings.images else None)
    return ArticleSource(
        open_store(settings.kind, settings.path),
        licenses=settings.licenses,
        keep_retracted=settings.keep_retracted,
        split_panels=settings.split_panels,
    )


class TableSource:
    """Image–caption pairs of a CSV, JSON lines or Parquet file.

    Args:
        path: of the table, with a column for the image (a path below `images`; in Parquet also the bytes) and one for
            the caption.
        images: folder that image paths start from; that of the table by default.

    Raises:
        ValueError: where there is no such file or folder.
    """

    def __init__(self, path: Path, images: Path | None = None) -> None:
        self.path = path
        self.images = images or path.parent
        if not path.is_file():
            raise ValueError(f"no table at {path}: name a CSV, JSON lines or Parquet file")
        if not self.images.is_dir():
            raise ValueError(f"no folder {self.images}: name the folder that the table's image paths start from")

    def list_items(self) -> Iterator[Item]:
        """The lines of the table, each with its number."""
        for number, line in enumerate(self._lines(), 1):
            yield {"number": number, "line": line}

    def read(self, item: Item) -> Iterator[FigureRow | Drop]:
        """The figure of one line."""
        line, number = item["line"], item["number"]
        if not isinstance(line, dict):
            yield Drop("line not readable", str(line)[:200], f"{self.path.stem}:{number}")
            return
        row_id = _first(line, ("row_id", "id")) or f"{self.path.stem}:{number}"
        image, caption = _first(line, IMAGE_KEYS), _first(line, CAPTION_KEYS)
        if not image or not caption:
            yield Drop("caption empty" if image else "image missing", f"line {number}", row_id)
            return
        try:
            content = read_file(path_inside(self.images, image))
        except UnreadableImage as error:
            yield Drop(error.reason, error.detail, row_id)
            return
        texts: dict[str, Any] = {name: _first(line, keys) for name, keys in TEXT_FIELDS.items()}
        yield FigureRow(row_id, caption, image_bytes=content, **texts)

    def _lines(self) -> Iterator[Any]:
        if self.path.suffix == ".parquet":
            for batch in pq.ParquetFile(self.path).iter_batches(batch_size=256):
                yield from batch.to_pylist()
        elif self.path.suffix in (".csv", ".tsv"):
            csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
            with self.path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
                yield from csv.DictReader(file, delimiter="\t" if self.path.suffix == ".tsv" else ",")
        else:
            with self.path.open(encoding="utf-8-sig", errors="replace") as file:
                yield from map(_json_or_text, file)


def _json_or_text(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line[:200]


def _first(line: dict[str, Any], keys: tuple[str, ...]) -> str:
    values = (line.get(key) for key in keys)
    return next((str(value) for value in values if isinstance(value, str | int) and str(value).strip()), "")
