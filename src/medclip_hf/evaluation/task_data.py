"""The data of a task, checked: images with labels or captions of one split, and what was set aside and why.

A row that cannot be used is named, counted and left out. What would make the figures wrong as a whole (a split that is
missing, an image in two splits) is refused.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.hospital.grey_levels import UnusablePicture
from medclip_hf.data.hospital.pictures import PictureSettings, encode_picture, read_pictures
from medclip_hf.data.images import UnreadableImage, path_inside, read_file
from medclip_hf.evaluation.task_layouts import (
    DATASETS_PREFIX,
    BrokenRow,
    MissingSplit,
    RawRow,
    canonical_split,
    read_dataset_rows,
    read_rows,
)
from medclip_hf.evaluation.tasks import Task

logger = logging.getLogger(__name__)

ALL_SPLITS = "all"
VALIDATION = "validation"
Uncertain = Literal["unknown", "negative", "positive"]
_NAMED_IN_ERRORS = 5
_TRUE, _FALSE, _UNCERTAIN = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no"), ("-1", "-1.0")
_NOTHING_FOUND = ("no finding", "none", "normal")  # words of a label column for: none of the classes


@dataclass(frozen=True)
class SetAside:
    """A row that was left out.

    Args:
        where: file and line, or the image.
        reason: short and countable.
        detail: what exactly.
    """

    where: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class ImageItem:
    """An image that can be read.

    Args:
        item_id: names it in messages and tables.
        fingerprint: changes when the image may have changed.
        read: its encoded bytes.
    """

    item_id: str
    fingerprint: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class TaskData:
    """One split of a task's data, N images.

    Args:
        items: N images.
        split: which.
        class_names: K classes; empty for retrieval.
        labels: (N,) int64 places of classes, or (N, K) bool if multi-label; None for retrieval.
        known: (N, K) bool, labels that count; None where all do.
        captions: texts of each image; None for classification.
        patients: (N,) whose image each is; None where the data do not say.
        set_aside: rows that were left out.
        warnings: what a reader of the figures must know.
    """

    items: tuple[ImageItem, ...]
    split: str
    class_names: tuple[str, ...] = ()
    labels: NDArray[Any] | None = None
    known: NDArray[np.bool_] | None = None
    captions: tuple[tuple[str, ...], ...] | None = None
    patients: NDArray[np.str_] | None = None
    set_aside: tuple[SetAside, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def identity(self) -> str:
        """Hash of the list of images and of each file's size and time: what cached image embeddings depend on."""
        digest = hashlib.blake2b(digest_size=16)
        for item in self.items:
            digest.update(f"{item.item_id}\0{item.fingerprint}\n".encode(errors="surrogatepass"))
        return digest.hexdigest()

    @property
    def label_identity(self) -> str:
        """Hash of labels, captions and groups: what figures depend on besides the embeddings."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.class_names, self.captions)).encode(errors="surrogatepass"))
        for part in (self.labels, self.known, self.patients):
            digest.update(b"none" if part is None else np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Images in use and set aside, by reason."""
        reasons = Counter(entry.reason for entry in self.set_aside)
        return {"in use": len(self.items), **dict(sorted(reasons.items()))}

    @property
    def empty_classes(self) -> tuple[str, ...]:
        """Classes without one positive image."""
        if self.labels is None:
            return ()
        if self.labels.ndim == 1:
            present = np.bincount(self.labels, minlength=len(self.class_names)) > 0
        else:
            present = (self.labels & (True if self.known is None else self.known)).any(axis=0)
        return tuple(name for name, is_present in zip(self.class_names, present, strict=True) if not is_present)


def read_task_data(
    task: Task,
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    uncertain: Uncertain = "unknown",
) -> TaskData:
    """The data of a task from a folder or from `datasets`.

    Args:
        task: says layout, classes and split; ``split="all"`` takes every row there is.
        source: folder, or ``datasets:<repository or folder of save_to_disk>``.
        columns: see `task_layouts.read_rows`.
        uncertain: what a cell of −1 (CheXpert's "uncertain") becomes; an empty cell is always unknown.

    Raises:
        MissingSplit: the data have no row of the split.
        ValueError: an image is in two splits, nothing is left, or as `read_rows`.
    """
    rows, broken, declared = _rows_of(task, source, columns or {})
    if task.class_names is None and declared is not None:
        task = replace(task, class_names=declared)
    split = canonical_split(task.split)
    chosen = rows if split == ALL_SPLITS else [row for row in rows if row.split == split]
    if not rows:
        why = f"; the first of {len(broken)} lines, {broken[0].where}: {broken[0].reason}" if broken else ""
        raise ValueError(f"{task.name}: {source} has no row that can be used{why}")
    if not chosen:
        found = sorted({row.split for row in rows if row.split is not None})
        there = f"the splits there are {', '.join(found)}" if found else "its rows name no split"
        raise MissingSplit(
            f"{task.name}: no row of the split {task.split!r} in {source}; {there}. Name one of them, or "
            f"{ALL_SPLITS!r} for every row."
        )
    folder = None if str(source).startswith(DATASETS_PREFIX) else Path(source)
    if split != ALL_SPLITS:
        _refuse_leaks(rows, split, folder, task)
    of_split = [row for row in broken if split == ALL_SPLITS or row.split in (None, split)]
    build = _Builder(task, folder, uncertain, [SetAside(row.where, row.reason) for row in of_split])
    data = build.retrieval(chosen) if task.task_type == "retrieval" else build.classification(chosen, rows)
    if not data.items:
        first = data.set_aside[0]
        raise ValueError(
            f"{task.name}: none of {len(chosen)} rows can be used; the first, {first.where}: {first.reason} "
            f"({first.detail}). Counts: {data.counts}"
        )
    for reason, count in data.counts.items():
        if reason != "in use":
            logger.warning("%s, %s: %d set aside: %s", task.name, split, count, reason)
    return data


def read_validation_data(
    task: Task,
    source: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    uncertain: Uncertain = "unknown",
) -> TaskData | None:
    """The validation split of a task, to choose thresholds on; None where there is none beside the tested split.

    Raises:
        ValueError: as `read_task_data`.
    """
    if canonical_split(task.split) in (VALIDATION, ALL_SPLITS):
        return None
    try:
        return read_task_data(replace(task, split=VALIDATION), source, columns=columns, uncertain=uncertain)
    except MissingSplit:
        return None


def _rows_of(
    task: Task, source: str | Path, columns: Mapping[str, str]
) -> tuple[list[RawRow], list[BrokenRow], tuple[str, ...] | None]:
    """Rows, lines that are none, and the class names that the data declare."""
    if str(source).startswith(DATASETS_PREFIX):
        rows, class_names = read_dataset_rows(str(source).removeprefix(DATASETS_PREFIX), task, columns)
        return rows, [], class_names
    entries = list(read_rows(Path(source), task, columns))
    rows = [row for row in entries if isinstance(row, RawRow)]
    return rows, [row for row in entries if isinstance(row, BrokenRow)], None


def _refuse_leaks(rows: Sequence[RawRow], split: str, folder: Path | None, task: Task) -> None:
    """Refuse an image that is in the tested split and in another, by its identifier or byte for byte."""
    tested = [row for row in rows if row.split == split]
    others = [row for row in rows if row.split is not None and row.split != split]
    other_ids = {row.item_id for row in others}
    leaks = sorted({row.item_id for row in tested if row.item_id in other_ids})
    leaks = leaks or _equal_images(tested, others, folder)
    if leaks:
        raise ValueError(
            f"{task.name}: {len(leaks)} images of the split {split!r} are in another split too, among them "
            f"{leaks[:_NAMED_IN_ERRORS]}. Figures would be too good: repair the splits, or test the split "
            f"{ALL_SPLITS!r} of a folder that holds this one alone."
        )


def _equal_images(tested: Sequence[RawRow], others: Sequence[RawRow], folder: Path | None) -> list[str]:
    """Ids of tested images that equal one of another split byte for byte; only those of equal size are read."""
    by_size: dict[int, list[RawRow]] = {}
    for row in others:
        if size := _num_bytes(row, folder):
            by_size.setdefault(size, []).append(row)
    hashes: dict[int, set[bytes]] = {}
    leaks = []
    for row in tested:
        size = _num_bytes(row, folder)
        if size not in by_size:
            continue
        if size not in hashes:
            hashes[size] = {_hash_of(other, folder) for other in by_size[size]}
        if _hash_of(row, folder) in hashes[size]:
            leaks.append(row.item_id)
    return sorted(leaks)


def _num_bytes(row: RawRow, folder: Path | None) -> int:
    """Bytes of an encoded image; 0 where it is not there."""
    if folder is None:
        return row.num_bytes
    try:
        return _find_image(folder, row.path or "").stat().st_size
    except UnreadableImage:
        return 0


def _hash_of(row: RawRow, folder: Path | None) -> bytes:
    if folder is None:
        assert row.read is not None  # rows without a folder bring their images
        return hashlib.blake2b(row.read(), digest_size=16).digest()
    with _find_image(folder, row.path or "").open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()


def _find_image(folder: Path, relative: str) -> Path:
    """The file of an image: below the folder, or below its folder `images`.

    Raises:
        UnreadableImage: there is none, or it lies outside.
    """
    for path in (path_inside(folder, relative), path_inside(folder, f"images/{relative}")):
        if path.is_file():
            return path
    raise UnreadableImage("image listed but absent", f"{path_inside(folder, relative)} is no file")


def _read_picture(path: Path) -> bytes:
    """An encoded picture; of a DICOM file its middle frame as its own window shows it, as PNG without its header."""
    content = read_file(path)
    if content[128:132] != b"DICM":
        return content
    try:
        (picture,) = read_pictures(path, PictureSettings(frames="middle"))
    except UnusablePicture as error:
        raise UnreadableImage(f"DICOM: {error.reason}", path.name) from error
    return encode_picture(picture.image, max_side=0)


class _Builder:
    """Turns rows into data, setting aside what cannot be used."""

    def __init__(self, task: Task, folder: Path | None, uncertain: Uncertain, set_aside: list[SetAside]) -> None:
        self.task = task
        self.folder = folder
        self.uncertain = uncertain
        self.set_aside = set_aside

    def classification(self, rows: Sequence[RawRow], of_all_splits: Sequence[RawRow]) -> TaskData:
        """Images with labels; a class that another split alone has is a class, without an image."""
        names = self.task.class_names or self._names_in(of_all_splits)
        usable: list[tuple[RawRow, ImageItem, Any]] = []
        label_of = self._flags_of if self.task.is_multi_label else self._place_of
        # Labels may be places in the class list: then each place, as a word, stands for its class.
        written = [str(k) for k in range(len(names))] if _are_places(of_all_splits, names) else names
        for row, item in self._distinct(rows):
            label = label_of(row, names if self.task.is_multi_label else written)
            if isinstance(label, SetAside):
                self.set_aside.append(label)
            else:
                usable.append((row, item, label))
        labels, known = self._arrays([label for _, _, label in usable], len(names))
        return self._data(
            [item for _, item, _ in usable],
            [row for row, _, _ in usable],
            class_names=names,
            labels=labels,
            known=known,
        )

    def retrieval(self, rows: Sequence[RawRow]) -> TaskData:
        """Images with captions; rows of one image are one image with several captions."""
        merged: dict[str, RawRow] = {}
        captions: dict[str, list[str]] = {}
        for row in rows:
            if not row.captions:
                self.set_aside.append(SetAside(row.where, "no caption"))
                continue
            key = row.path or row.item_id
            merged.setdefault(key, row)
            captions.setdefault(key, []).extend(text for text in row.captions if text not in captions.get(key, ()))
        usable = [(row, item) for row in merged.values() if (item := self._item(row)) is not None]
        return self._data(
            [item for _, item in usable],
            [row for row, _ in usable],
            captions=tuple(tuple(captions[row.path or row.item_id]) for row, _ in usable),
        )

    def _data(self, items: list[ImageItem], rows: list[RawRow], **more: Any) -> TaskData:
        patients = [row.patient for row in rows]
        warnings = []
        if any(patients) and not all(patients):
            count = sum(patient is None for patient in patients)
            warnings.append(f"{count} of {len(patients)} images name no patient; each counts as a patient of its own")
        named = [patient or f"\0{self.task.split} {place}" for place, patient in enumerate(patients)]
        data = TaskData(
            tuple(items),
            canonical_split(self.task.split),
            patients=np.array(named) if any(patients) else None,
            set_aside=tuple(self.set_aside),
            warnings=tuple(warnings),
            **more,
        )
        if data.empty_classes:
            data = replace(data, warnings=(*warnings, f"classes without an image: {', '.join(data.empty_classes)}"))
        return data

    def _distinct(self, rows: Iterable[RawRow]) -> Iterable[tuple[RawRow, ImageItem]]:
        seen: set[str] = set()
        for row in rows:
            if row.item_id in seen:
                self.set_aside.append(SetAside(row.where, "duplicate id", row.item_id))
                continue
            seen.add(row.item_id)
            item = self._item(row)
            if item is not None:
                yield row, item

    def _item(self, row: RawRow) -> ImageItem | None:
        """The image of a row, or None once it is set aside."""
        if row.read is not None:
            return ImageItem(row.item_id, row.fingerprint, row.read)
        assert self.folder is not None  # rows without `read` come from a folder
        try:
            path = _find_image(self.folder, row.path or "")
        except UnreadableImage as error:
            self.set_aside.append(SetAside(row.where, error.reason, error.detail))
            return None
        status = path.stat()
        return ImageItem(row.item_id, f"{status.st_size}:{status.st_mtime_ns}", partial(_read_picture, path))

    def _names_in(self, rows: Sequence[RawRow]) -> tuple[str, ...]:
        if rows and rows[0].cells is not None:
            return tuple(name for name, _ in rows[0].cells)
        names = sorted({label for row in rows for label in row.labels or ()})
        if self.task.is_multi_label:
            names = [name for name in names if name.lower() not in _NOTHING_FOUND]
        if len(names) < (1 if self.task.is_multi_label else 2):
            raise ValueError(f"{self.task.name}: the labels name {names}; expected at least two classes")
        return tuple(names)

    def _place_of(self, row: RawRow, names: Sequence[str]) -> int | SetAside:
        labels = row.labels or ()
        if len(labels) != 1:
            return SetAside(
                row.where, "no label" if not labels else "several labels in a single-label task", str(labels)
            )
        if labels[0] not in names:
            return SetAside(row.where, "label outside the class list", repr(labels[0]))
        return list(names).index(labels[0])

    def _flags_of(self, row: RawRow, names: Sequence[str]) -> tuple[list[bool], list[bool]] | SetAside:
        """Flags and which of them are known."""
        if row.cells is None and row.labels is None:
            return SetAside(row.where, "no label")
        if row.cells is None:
            outside = [
                label for label in row.labels or () if label not in names and label.lower() not in _NOTHING_FOUND
            ]
            if outside:
                return SetAside(row.where, "label outside the class list", repr(outside[0]))
            return [name in (row.labels or ()) for name in names], [True] * len(names)
        flags, known = [], []
        for name, cell in row.cells:
            lowered = cell.lower()
            if lowered in _UNCERTAIN:
                lowered = {"unknown": "", "negative": "0", "positive": "1"}[self.uncertain]
            if lowered not in (*_TRUE, *_FALSE, "", "nan"):
                return SetAside(row.where, "label is not 0, 1, -1 or empty", f"{name}: {cell!r}")
            flags.append(lowered in _TRUE)
            known.append(lowered not in ("", "nan"))
        if not any(known):
            return SetAside(row.where, "no label")
        return flags, known

    def _arrays(self, labels: Sequence[Any], num_classes: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        if not self.task.is_multi_label:
            return np.array(labels, dtype=np.int64), None
        flags = np.array([flag for flag, _ in labels], dtype=bool).reshape(len(labels), num_classes)
        known = np.array([mask for _, mask in labels], dtype=bool).reshape(len(labels), num_classes)
        return flags, None if known.all() else known


def _are_places(rows: Sequence[RawRow], names: Sequence[str]) -> bool:
    """Whether the labels are places in the class list: none is a name, and some are whole numbers below its length.

    Raises:
        ValueError: they seem to count from 1, which would give every image the next class.
    """
    values = {label for row in rows for label in row.labels or ()}
    if not values & {*names, "0"} and str(len(names)) in values:
        raise ValueError(f"labels count the classes from 1 to {len(names)}: write their names, or places from 0 on.")
    return not values & set(names) and any(value.isdecimal() and int(value) < len(names) for value in values)
