"""Files of a data set to rows, one for each image mentioned: folders by class, label tables, caption lines, `datasets`.

Nothing is judged here but whether a file can be read at all; `task_data` checks the rows.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from medclip_hf.evaluation.csv_tables import open_csv
from medclip_hf.evaluation.tasks import Layout, Task

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".tif", ".tiff", ".bmp", ".webp", ".jp2", ".ppm", ".pgm", ".dcm")
# One word for each split, whatever a data set calls it.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
# What a column may be called; the first that a table has counts.
COLUMN_WORDS = {
    "image": ("image", "path", "file_name", "filename", "file", "image_path", "img"),
    "label": ("label", "labels", "class", "diagnosis"),
    "split": ("split", "set", "subset"),
    "patient": ("patient", "patient_id", "subject_id", "subject"),
    "id": ("id", "image_id", "item_id"),
    "caption": ("captions", "caption", "text", "report"),
}
LABEL_SEPARATOR = "|"
DATASETS_PREFIX = "datasets:"


class MissingSplit(ValueError):
    """The data set has no row of the split."""


@dataclass(frozen=True)
class RawRow:
    """What a data set says of one image.

    Args:
        item_id: names the image; its path where there is nothing else.
        where: file and line, for messages.
        path: of the image, relative to the folder; None where `read` gives it.
        read: the encoded image of a row that has no file.
        num_bytes: how many `read` gives.
        fingerprint: of what `read` gives.
        labels: names or numbers of its classes, as written, none of them being an answer too; None where the cell is
            empty, or the layout has a cell for each class.
        cells: (class, cell) of such a layout.
        captions: its texts.
        split: canonical word; None where the data set has none.
        patient: whose image it is; a group for resampling, never written anywhere.
    """

    item_id: str
    where: str
    path: str | None = None
    read: Callable[[], bytes] | None = None
    num_bytes: int = 0
    fingerprint: str = ""
    labels: tuple[str, ...] | None = None
    cells: tuple[tuple[str, str], ...] | None = None
    captions: tuple[str, ...] = ()
    split: str | None = None
    patient: str | None = None


@dataclass(frozen=True)
class BrokenRow:
    """A line that is no row, and why; `split` where its file or folder says which."""

    where: str
    reason: str
    split: str | None = None


Rows = Iterator[RawRow | BrokenRow]


def canonical_split(word: str) -> str:
    """One word for each split: validation for "val", and so on; other words stay as they are, in lower case."""
    lowered = word.strip().lower()
    return SPLIT_WORDS.get(lowered, lowered)


def detect_layout(folder: Path, task: Task) -> Layout:
    """The layout of a folder: the task's own, else by the files that lie in it.

    Raises:
        ValueError: it cannot be told.
    """
    if task.layout is not None:
        return task.layout
    if task.label_file is not None:
        return _layout_of_file(folder / task.label_file, task)
    for pattern in ("*.jsonl", "*.csv"):
        for path in sorted(folder.glob(pattern)):
            return _layout_of_file(path, task)
    if any(_class_folders(folder)) or any(
        canonical_split(child.name) in SPLIT_WORDS.values() for child in _folders(folder)
    ):
        return "image_folder"
    raise ValueError(
        f"cannot tell the layout of {folder}: expected a folder for each class, a CSV table or JSON lines. Name it as "
        "'layout' in a task file."
    )


def _layout_of_file(path: Path, task: Task) -> Layout:
    if path.suffix == ".jsonl":
        return "caption_lines"
    return "multi_label_table" if task.is_multi_label else "label_table"


def read_rows(folder: Path, task: Task, columns: Mapping[str, str] | None = None) -> Rows:
    """Every row of a data set, of all splits.

    Args:
        folder: where it lies.
        task: says layout, classes and file names.
        columns: what a table calls "image", "label", "split", "patient", "id", "caption", where that is unusual.

    Raises:
        ValueError: there is no such folder or file, or a table lacks a column.
    """
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: name the one that holds the data of {task.name}")
    layout = detect_layout(folder, task)
    if layout == "image_folder":
        return _folder_rows(folder)
    if layout == "caption_lines":
        return _line_rows(_files_of(folder, task, ".jsonl"), columns or {})
    if layout in ("label_table", "multi_label_table"):
        return _table_rows(_files_of(folder, task, ".csv"), task, layout, columns or {})
    raise ValueError(f"{task.name} is a task of CT scans ({layout}); see medclip_hf.evaluation.ct_protocols")


# Folders ---------------------------------------------------------------------------------------------------------


def _folder_rows(folder: Path) -> Rows:
    """<split>/<class>/<image> or <class>/<image>."""
    splits = [child for child in _folders(folder) if canonical_split(child.name) in SPLIT_WORDS.values()]
    for top in splits or [folder]:
        for class_folder in _folders(top):
            files = [path for path in sorted(class_folder.rglob("*")) if path.is_file() and path.name[0] != "."]
            split = canonical_split(top.name) if splits else None
            if not files:
                yield BrokenRow(class_folder.relative_to(folder).as_posix(), "class folder without a file", split)
            for path in files:
                relative = path.relative_to(folder).as_posix()
                if path.suffix.lower() not in IMAGE_ENDINGS:
                    yield BrokenRow(relative, "not an image file", split)
                    continue
                yield RawRow(
                    item_id=relative,
                    where=relative,
                    path=relative,
                    labels=(class_folder.name,),
                    split=split,
                )


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _class_folders(folder: Path) -> Iterator[Path]:
    for child in _folders(folder):
        if any(path.suffix.lower() in IMAGE_ENDINGS for path in child.rglob("*")):
            yield child


# Tables and lines ------------------------------------------------------------------------------------------------


def _files_of(folder: Path, task: Task, ending: str) -> list[Path]:
    if task.label_file is not None:
        path = folder / task.label_file
        if not path.is_file():
            raise ValueError(f"{task.name} expects the file {path}")
        return [path]
    files = sorted(path for path in folder.glob(f"*{ending}") if not path.name.startswith("."))
    by_split = [path for path in files if canonical_split(path.stem) in SPLIT_WORDS.values()]
    if by_split:
        return by_split
    if len(files) == 1:
        return files
    raise ValueError(
        f"{folder} holds {len(files)} files *{ending}: expected one, or one for each split named train{ending}, "
        f"validation{ending}, test{ending}; or name it as 'label_file' in a task file."
    )


def _table_rows(files: Sequence[Path], task: Task, layout: Layout, columns: Mapping[str, str]) -> Rows:
    for path in files:
        with open_csv(path) as reader:
            header = list(reader.fieldnames or ())
            names = _named_columns(path, header, columns)
            classes = _class_columns(path, header, names, task) if layout == "multi_label_table" else ()
            if not classes and "label" not in names:
                raise ValueError(f"{path} has no column for labels; its columns are {header}. Map one with columns.")
            for row in reader:
                yield _table_row(f"{path.name} line {reader.line_num}", row, names, classes, _split_of_file(path))


def _named_columns(path: Path, header: Sequence[str], columns: Mapping[str, str]) -> dict[str, str]:
    """The table's name of every column that is needed and there."""
    absent = sorted(set(columns.values()) - set(header))
    unknown = sorted(set(columns) - set(COLUMN_WORDS))
    if absent or unknown:
        raise ValueError(
            f"{path} has the columns {list(header)}, not {absent}; columns are mapped from {list(COLUMN_WORDS)}"
            + (f", not {unknown}" if unknown else "")
        )
    lowered = {name.lower(): name for name in reversed(header)}
    found = {key: next((lowered[word] for word in words if word in lowered), "") for key, words in COLUMN_WORDS.items()}
    named = {key: name for key, name in found.items() if name} | dict(columns)
    if "image" not in named:
        raise ValueError(f"{path} has no column for images; its columns are {list(header)}. Map one with columns.")
    return named


def _class_columns(path: Path, header: Sequence[str], names: Mapping[str, str], task: Task) -> tuple[str, ...]:
    """The columns of classes; empty where a label column names them."""
    if task.class_names is not None and not set(task.class_names) & set(header) and "label" in names:
        return ()
    if task.class_names is not None:
        absent = [name for name in task.class_names if name not in header]
        if absent:
            raise ValueError(f"{path} lacks the columns {absent} of {task.name}; it has {list(header)}")
        return task.class_names
    classes = tuple(name for name in header if name not in names.values() or name == names.get("label"))
    return () if classes == (names.get("label"),) else classes  # a label column alone names the classes itself


def _table_row(
    where: str, row: dict[str, Any], names: Mapping[str, str], classes: Sequence[str], split: str | None
) -> RawRow | BrokenRow:
    if None in row or any(value is None for value in row.values()):
        return BrokenRow(where, "another number of cells than the header", split)
    path = row[names["image"]].strip()
    if not path:
        return BrokenRow(where, "names no image", split)
    path = PurePosixPath(path).as_posix()  # ./a.png is a.png
    label = row.get(names.get("label", ""), "").strip()
    return RawRow(
        item_id=row.get(names.get("id", ""), "").strip() or path,
        where=where,
        path=path,
        labels=_labels_of_cell(label) if label and not classes else None,
        cells=tuple((name, row[name].strip()) for name in classes) if classes else None,
        split=_split_of_cell(row.get(names.get("split", ""), "")) or split,
        patient=row.get(names.get("patient", ""), "").strip() or None,
    )


def _labels_of_cell(cell: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in cell.split(LABEL_SEPARATOR) if part.strip())


def _line_rows(files: Sequence[Path], columns: Mapping[str, str]) -> Rows:
    for path in files:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _line_row(f"{path.name} line {number}", line, columns, _split_of_file(path))


def _line_row(where: str, line: bytes, columns: Mapping[str, str], split: str | None) -> RawRow | BrokenRow:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # of the encoding, of the syntax, brackets without an end
        return BrokenRow(where, "not JSON", split)
    if not isinstance(record, dict):
        return BrokenRow(where, "not a JSON object", split)
    values = {
        key: _first_of(record, (columns[key],) if key in columns else words) for key, words in COLUMN_WORDS.items()
    }
    path, captions = values["image"], values["caption"]
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(path, str) or not path.strip():
        return BrokenRow(where, "names no image", split)
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        return BrokenRow(where, "has no caption", split)
    path = PurePosixPath(path.strip()).as_posix()
    return RawRow(
        item_id=str(values["id"] or path),
        where=where,
        path=path,
        captions=tuple(caption.strip() for caption in captions if caption.strip()),
        split=_split_of_cell(str(values["split"] or "")) or split,
        patient=str(values["patient"]) if values["patient"] is not None else None,
    )


def _first_of(record: Mapping[str, Any], words: Sequence[str]) -> Any:
    return next((record[word] for word in words if word in record), None)


def _split_of_cell(cell: str) -> str | None:
    return canonical_split(cell) if cell and cell.strip() else None


def _split_of_file(path: Path) -> str | None:
    word = canonical_split(path.stem)
    return word if word in SPLIT_WORDS.values() else None


# Hugging Face datasets -------------------------------------------------------------------------------------------


def read_dataset_rows(
    name: str, task: Task, columns: Mapping[str, str] | None = None
) -> tuple[list[RawRow], tuple[str, ...] | None]:
    """The rows of every split of a data set on the Hub, or of a folder written by `save_to_disk`; and its class names.

    The names are those of a `ClassLabel`, None where the features name none. The rows of a single table that has no
    column for splits have none.

    Args:
        name: repository, or folder.
        task: names the classes where the features do not.
        columns: see `read_rows`.

    Raises:
        ValueError: the data set is not there, or it has no column of images.
    """
    rows: list[RawRow] = []
    class_names: tuple[str, ...] | None = None
    for split, table in _load_splits(name).items():
        names = _dataset_columns(table, columns or {}, name)
        table = table.cast_column(names["image"], _undecoded_image())
        label_names = _label_names(table.features.get(names.get("label", "")))
        class_names = class_names or (tuple(label_names) if label_names else None)
        rows += _dataset_rows(f"{name} {split or ''}".strip(), split, table, names, label_names, task)
    return rows, class_names


def _dataset_rows(
    where: str, split: str | None, table: Any, names: Mapping[str, str], label_names: Sequence[str] | None, task: Task
) -> Iterator[RawRow]:
    num_bytes = _image_sizes(table, names["image"])
    for place, record in enumerate(table.remove_columns([names["image"]])):
        values = {key: record.get(column) for key, column in names.items()}
        captions = [values["caption"]] if isinstance(values.get("caption"), str) else values.get("caption") or []
        yield RawRow(
            item_id=str(values["id"]) if values.get("id") is not None else f"{split or ''} {place}".strip(),
            where=f"{where} row {place}",
            read=_DatasetImage(table, place, names["image"]),
            num_bytes=num_bytes[place],
            fingerprint=f"{table._fingerprint}:{place}",
            labels=_dataset_labels(values.get("label"), label_names),
            cells=_dataset_cells(record, task),
            captions=tuple(str(caption) for caption in captions if str(caption).strip()),
            split=split or _split_of_cell(str(values.get("split") or "")),
            patient=str(values["patient"]) if values.get("patient") is not None else None,
        )


def _image_sizes(table: Any, column: str) -> list[int]:
    """Bytes of every encoded image; 0 where the table holds a path alone. No image is read for it."""
    import pyarrow.compute as pc

    sizes: list[int] = []
    for batch in table.select_columns([column]).with_format("arrow").iter(batch_size=1000):
        sizes += [size or 0 for size in pc.binary_length(pc.struct_field(batch.column(0), "bytes")).to_pylist()]
    return sizes


@dataclass(frozen=True)
class _DatasetImage:
    """Reads the encoded image of one row when it is needed."""

    table: Any
    place: int
    column: str

    def __call__(self) -> bytes:
        image = self.table[self.place][self.column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _load_splits(name: str) -> dict[str | None, Any]:
    """The tables by canonical split; one table alone has none."""
    import datasets

    try:
        if Path(name).is_dir() and (
            (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file()
        ):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name)
    except Exception as error:  # the builders of data sets raise any type; each is this data set's fault
        raise ValueError(f"datasets cannot load {name}: {type(error).__name__}: {error}") from error
    if isinstance(loaded, datasets.Dataset):
        return {None: loaded}
    return {canonical_split(split): table for split, table in loaded.items()}


def _undecoded_image() -> Any:
    import datasets

    return datasets.Image(decode=False)


def _dataset_columns(table: Any, columns: Mapping[str, str], name: str) -> dict[str, str]:
    import datasets

    names = _named_columns(Path(name), [*table.column_names, "image"], columns)
    if not isinstance(table.features.get(names["image"]), datasets.Image):
        images = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
        if not images:
            raise ValueError(f"{name} has no column of images; its columns are {table.column_names}")
        names["image"] = images[0]
    return names


def _label_names(feature: Any) -> list[str] | None:
    inner = getattr(feature, "feature", feature)  # a list of class labels, or one
    return list(inner.names) if hasattr(inner, "names") else None


def _dataset_labels(value: Any, label_names: Sequence[str] | None) -> tuple[str, ...] | None:
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    return tuple(
        label_names[item]
        if label_names is not None and isinstance(item, int) and 0 <= item < len(label_names)
        else str(item)
        for item in values
    )


def _dataset_cells(record: Mapping[str, Any], task: Task) -> tuple[tuple[str, str], ...] | None:
    """Cells of a data set that has a column for each class."""
    if not task.is_multi_label or task.class_names is None or not set(task.class_names) <= set(record):
        return None
    return tuple((name, "" if record[name] is None else str(record[name])) for name in task.class_names)
