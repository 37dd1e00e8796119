"""Where millions of pictures come from: Parquet shards of figures, or a folder of files; any of them by its number."""

import hashlib
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medclip_hf.data.images import UnreadableImage, path_inside, read_file
from medclip_hf.data.parquet import find_shards

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".ppm", ".pgm")


class PictureSource(Protocol):
    """A numbered list of encoded pictures, the same in every process and after a restart."""

    @property
    def identity(self) -> str:
        """Hash of what is listed, in its order."""

    def __len__(self) -> int:
        """How many there are."""

    def row_id(self, index: int) -> str:
        """What to call a picture."""

    def read(self, index: int) -> bytes:
        """The encoded file of a picture; `UnreadableImage` where there is none."""


class PictureFolder:
    """The picture files of a folder and its subfolders, ordered by path; hidden ones are passed over.

    Paths lie end to end in one block of bytes: ten million of them take some hundred megabytes and are shared with
    loader workers, which a list of strings is not.

    Args:
        folder: where to look. Links are followed for files, not for folders.

    Raises:
        ValueError: there is no such folder, or no picture in it.
        OSError: a subfolder cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder: name one that holds pictures ({', '.join(PICTURE_ENDINGS)}).")
        self.folder = folder
        digest = hashlib.blake2b(digest_size=16)
        names, ends = bytearray(), array("q")
        for relative, size in _picture_files(str(folder), ""):
            name = os.fsencode(relative)
            names += name
            ends.append(len(names))
            digest.update(name + f"\0{size}\n".encode())
        if not names:
            raise ValueError(f"{folder} holds no picture: none of its files ends in {', '.join(PICTURE_ENDINGS)}.")
        self._names = names
        self._ends = np.frombuffer(ends, dtype=np.int64)
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._ends)

    def row_id(self, index: int) -> str:
        """Path below the folder, with forward slashes; bytes that are no UTF-8 as question marks."""
        return self._name(index).decode("utf-8", errors="replace").replace(os.sep, "/")

    def read(self, index: int) -> bytes:
        """The bytes of the file."""
        return read_file(self.folder / os.fsdecode(self._name(index)))

    def _name(self, index: int) -> bytes:
        return bytes(self._names[int(self._ends[index - 1]) if index else 0 : int(self._ends[index])])


class FigureShards:
    """The pictures of one split of figure rows, read where they lie, one row group in memory at a time.

    Args:
        folder: of the shards; pictures that are no bytes in them are paths below it.
        split: ``train``, ``validation`` or ``test``.

    Raises:
        ValueError: the split is missing or incomplete, or a shard is damaged or lacks a column.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder = folder
        self._shards = find_shards(folder, split)
        digest = hashlib.blake2b(digest_size=16)
        counts: list[int] = []
        self._places: list[tuple[int, int]] = []  # (shard, row group) of each row group
        for number, shard in enumerate(self._shards):
            groups = _row_groups(shard)
            digest.update(f"{shard.name}\0{shard.stat().st_size}\0{groups}\n".encode())
            counts += groups
            self._places += [(number, group) for group in range(len(groups))]
        self._ends = np.cumsum(counts, dtype=np.int64)
        if not counts or not self._ends[-1]:
            raise ValueError(f"the split {split!r} in {folder} has no rows.")
        self.identity = digest.hexdigest()
        self._held: tuple[int, pa.Table] | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row_id(self, index: int) -> str:
        """The row's name in the data set."""
        return str(self._record(index)["row_id"])

    def read(self, index: int) -> bytes:
        """The encoded picture of the row."""
        record = self._record(index)
        image: dict[str, Any] = record["image"] or {}
        if image.get("bytes") is not None:
            return image["bytes"]
        return read_file(path_inside(self.folder, image.get("path") or ""))

    def _record(self, index: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        if self._held is None or self._held[0] != number:
            self._held = None  # before the next group is read: never two in memory
            self._held = (number, self._read_group(number))
        start = int(self._ends[number - 1]) if number else 0
        return self._held[1].slice(index - start, 1).to_pylist()[0]

    def _read_group(self, number: int) -> pa.Table:
        shard, group = self._places[number]
        try:
            with pq.ParquetFile(self._shards[shard], memory_map=True) as file:
                # One thread: loader workers are many, and a fork has none of the threads of its parent.
                return file.read_row_group(group, columns=["row_id", "image"], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UnreadableImage("row group damaged", f"{self._shards[shard].name}, group {group}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}


def _picture_files(folder: str, below: str) -> Iterator[tuple[str, int]]:
    """(path below the first folder, bytes) of each file that can be a picture, by path.

    A folder stands where its name with a separator does, so what is sorted folder by folder is sorted as a whole.
    """
    with os.scandir(folder) as entries:
        names = sorted(name for entry in entries if (name := _listed_name(entry)))
    for name in names:
        path = os.path.join(folder, name)  # noqa: PTH118 - a Path for each of millions takes ten times as long
        if name.endswith(os.sep):
            yield from _picture_files(path, below + name)
        else:
            yield below + name, _size_of(path)


def _listed_name(entry: os.DirEntry[str]) -> str:
    """The name of a file that can be a picture, or of a folder with a separator; empty for what is passed over."""
    if entry.name.startswith("."):
        return ""
    if entry.is_dir():
        return "" if entry.is_symlink() else entry.name + os.sep
    return entry.name if entry.name.lower().endswith(PICTURE_ENDINGS) else ""


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - as above
    except OSError:  # a broken link: it is set aside when it is read
        return -1


def _row_groups(shard: Path) -> list[int]:
    """Rows of each row group."""
    try:
        with pq.ParquetFile(shard) as file:
            missing = sorted({"row_id", "image"} - set(file.schema_arrow.names))
            if missing:
                raise ValueError(f"{shard} lacks the columns {missing}: it holds no figure rows.")
            return [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shard} is no readable Parquet file: {error}. Download or build it again.") from error
