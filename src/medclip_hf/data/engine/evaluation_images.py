"""Images of evaluation sets, listed and read for decontamination: files in folders, and Parquet files with images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from medclip_hf.data.engine.figure_images import prepare_image
from medclip_hf.data.engine.settings import ImageRules
from medclip_hf.data.images import UnreadableImage, read_file
from medclip_hf.data.stages import Drop

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".ppm"}
ANY_SIZE = ImageRules(min_side=1, max_aspect=1e6)


@dataclass(frozen=True)
class EvaluationImage:
    """An image that must not be trained on; `name` says which file, and which row of it."""

    name: str
    content: bytes
    pixels: Image.Image


def list_evaluation_images(folders: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Items to read: image files, and row groups of Parquet files that have an `image` column.

    Raises:
        ValueError: where a folder does not exist or holds no image.
    """
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise ValueError(f"decontamination.folders names {folder}, but there is no such folder")
        num_items = 0
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                num_items += 1
                yield {"path": str(path)}
            elif path.suffix == ".parquet":
                file = pq.ParquetFile(path)
                if "image" in file.schema_arrow.names:
                    num_items += file.num_row_groups
                    yield from ({"path": str(path), "row_group": group} for group in range(file.num_row_groups))
        if not num_items:
            raise ValueError(f"decontamination.folders names {folder}, but it holds no image: nothing would be checked")


def read_evaluation_images(item: dict[str, Any]) -> Iterator[EvaluationImage | Drop]:
    """The images of an item that was listed, or why they cannot be looked at."""
    path = Path(item["path"])
    if "row_group" in item:
        yield from _read_row_group(path, item["row_group"])
        return
    try:
        yield _image(str(path), read_file(path))
    except UnreadableImage as error:
        yield Drop(error.reason, error.detail, str(path))


def _read_row_group(path: Path, group: int) -> Iterator[EvaluationImage | Drop]:
    try:
        for batch_number, batch in enumerate(pq.ParquetFile(path).iter_batches(64, [group], columns=["image"])):
            for place, record in enumerate(batch.to_pylist()):
                name = f"{path}, row group {group}, row {64 * batch_number + place}"
                image = record["image"] or {}
                try:
                    content = image.get("bytes") or read_file(path.parent / str(image.get("path")))
                    yield _image(name, content)
                except UnreadableImage as error:
                    yield Drop(error.reason, error.detail, name)
    except pa.ArrowInvalid as error:
        yield Drop("evaluation file damaged", str(error), str(path))


def _image(name: str, content: bytes) -> EvaluationImage:
    return EvaluationImage(name, content, prepare_image(content, name, ANY_SIZE)[1])
