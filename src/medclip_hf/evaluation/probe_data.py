"""Features and a table of labels from disk to the three splits of a linear probe."""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medclip_hf.evaluation.csv_tables import open_csv
from medclip_hf.evaluation.intervals import Floats
from medclip_hf.evaluation.probe import ProbeSplit

FEATURE_NAMES = ("features", "image_embeds", "embeddings")
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}
_UNKNOWN = ("", "-1", "-1.0", "nan", "NaN", "u", "U")


@dataclass(frozen=True)
class ProbeData:
    """The splits of a probe and what its classes are called.

    Args:
        splits: "train", "test" and perhaps "validation".
        class_names: K names.
        set_aside: reason to number of samples that are in no split, by split; empty where none was looked at.
    """

    splits: dict[str, ProbeSplit]
    class_names: tuple[str, ...]
    set_aside: dict[str, dict[str, int]] = field(default_factory=dict)


def load_probe_data(
    features_path: Path,
    table_path: Path,
    *,
    label_column: str | None = None,
    finding_columns: Sequence[str] = (),
    split_column: str = "split",
    patient_column: str | None = None,
) -> ProbeData:
    """Features and labels, joined by row: row n of the table belongs to row n of the features.

    Args:
        features_path: safetensors or npz with an array "features", "image_embeds" or "embeddings", (N, D).
        table_path: CSV with a header and N rows.
        label_column: with one class per sample: its column; classes are numbered in alphabetical order.
        finding_columns: with several findings: their columns, 0 or 1; empty, -1, u and nan are unknown.
        split_column: train, validation (or val, valid) or test of each row.
        patient_column: of each row's patient; None: every row is its own.

    Raises:
        ValueError: files that do not fit together, a column that is absent, a value that is none of the above; the
            row is named.
    """
    if (label_column is None) == (not finding_columns):
        raise ValueError("name either the column of the label or the columns of the findings")
    if "" in finding_columns or len(set(finding_columns)) < len(finding_columns):
        raise ValueError(f"each finding needs a column of its own, got {list(finding_columns)}")
    features = read_features(features_path)
    rows = _read_table(table_path, [label_column or "", *finding_columns, split_column, patient_column or ""])
    if len(rows) != len(features):
        raise ValueError(f"{table_path} has {len(rows)} rows, {features_path} {len(features)}: row n belongs to row n")
    labels: NDArray[np.generic]
    if label_column is not None:
        class_names, labels = _classes(table_path, [row[label_column] for row in rows])
        known = None
    else:
        class_names = tuple(finding_columns)
        labels, known = _findings(table_path, rows, finding_columns)
    patients = None if patient_column is None else _patients(table_path, [row[patient_column] for row in rows])
    split_of = _splits(table_path, [row[split_column] for row in rows])
    splits = {}
    for name in ("train", "validation", "test"):
        chosen = np.flatnonzero(split_of == name)
        if len(chosen):
            whole = ProbeSplit(features, labels, patients, known)
            splits[name] = whole.taken(chosen)
    missing = [name for name in ("train", "test") if name not in splits]
    if missing:
        raise ValueError(f"{table_path}: no row of the split {' or '.join(missing)} in column {split_column!r}")
    return ProbeData(splits, class_names)


def read_features(path: Path) -> Floats:
    """The features (N, D) of a safetensors or npz file.

    Raises:
        ValueError: another kind of file, none of the known names in it, another shape.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            arrays = {name: tensor.float().numpy() for name, tensor in load_file(path).items()}
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    elif path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in FEATURE_NAMES if name in file}
        except (zipfile.BadZipFile, ValueError) as error:
            raise ValueError(f"{path} is no npz file of plain arrays: {error}") from error
    else:
        raise ValueError(f"{path}: features are read from .safetensors or .npz")
    names = [name for name in FEATURE_NAMES if name in arrays]
    if len(names) != 1:
        raise ValueError(f"{path} must hold one array named {', '.join(FEATURE_NAMES)}, got {sorted(arrays)}")
    features = np.asarray(arrays[names[0]], dtype=np.float64)
    if features.ndim != 2:
        raise ValueError(f"{path}: features must be (samples, width), got shape {features.shape}")
    return features


def _read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    with open_csv(path, strict=True) as reader:
        there = list(reader.fieldnames or [])
        missing = [column for column in columns if column and column not in there]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; it has {', '.join(there)}")
        return [{name: (row[name] or "").strip() for name in columns if name} for row in reader]


def _classes(path: Path, values: list[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    empty = [number for number, value in enumerate(values) if not value]
    if empty:
        raise ValueError(f"{path}: {len(empty)} rows have no label, the first is row {empty[0] + 1}; leave them out")
    names = tuple(sorted(set(values)))
    place = {name: k for k, name in enumerate(names)}
    return names, np.array([place[value] for value in values], dtype=np.int64)


def _findings(
    path: Path, rows: list[dict[str, str]], columns: Sequence[str]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    labels = np.zeros((len(rows), len(columns)), dtype=bool)
    known = np.ones_like(labels)
    for number, row in enumerate(rows):
        for k, column in enumerate(columns):
            value = row[column]
            if value in _UNKNOWN:
                known[number, k] = False
            elif value in ("0", "0.0", "1", "1.0"):
                labels[number, k] = value.startswith("1")
            else:
                raise ValueError(f"{path}, row {number + 1}, column {column!r}: {value!r} is neither 0, 1 nor unknown")
    return labels, known


def _patients(path: Path, values: list[str]) -> NDArray[np.str_]:
    empty = [number for number, value in enumerate(values) if not value]
    if empty:
        raise ValueError(f"{path}: {len(empty)} rows have no patient, the first is row {empty[0] + 1}")
    return np.array(values)


def _splits(path: Path, values: list[str]) -> NDArray[np.str_]:
    for number, value in enumerate(values):
        if value.lower() not in SPLIT_NAMES:
            raise ValueError(f"{path}, row {number + 1}: split {value!r} is none of {', '.join(SPLIT_NAMES)}")
    return np.array([SPLIT_NAMES[value.lower()] for value in values])
