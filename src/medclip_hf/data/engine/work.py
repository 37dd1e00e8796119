"""The files of a run of the MedConcept engine: which exist says how far it has come.

    train-00000.parquet …, train.manifest.json, report.json, README.md …   the data set
    dropped/<step>-00000.jsonl                    what was dropped, and why
    work/settings.json                            of the run, compared when it goes on
    work/items.jsonl, items.json                  the listed source, cut into units
    work/collected/00000.parquet, 00000.npy       figures and fingerprints of a unit
    work/annotated/00000.parquet                  their modality and concepts
    work/assigned/train.npy                       the rows of a split, in order

Every file appears under its name when it is complete, that of a task last of all it writes.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.engine.settings import EngineSettings
from medclip_hf.data.parquet import SPLITS, manifest_path, write_text_atomically
from medclip_hf.data.stages import Drop

ASSIGNED = np.dtype([("unit", "<u4"), ("row", "<u4")])


@dataclass(frozen=True)
class Listing:
    """Items as JSON lines, cut into units of equal numbers of items.

    Args:
        path: of the lines; beside it, with the suffix ``.json``, lies where each unit starts.
    """

    path: Path

    @property
    def is_complete(self) -> bool:
        """Whether all items have been listed."""
        return self._index_path.exists()

    def write(self, items: Iterable[dict[str, Any]], items_per_unit: int) -> None:
        """List all items, in memory that their number does not change."""
        starts, counts, position = [], [], 0
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with temporary.open("wb") as file:
            for number, item in enumerate(items):
                if number % items_per_unit == 0:
                    starts.append(position)
                    counts.append(0)
                counts[-1] += 1
                position += file.write(json.dumps(item).encode("ascii") + b"\n")
        temporary.replace(self.path)
        write_text_atomically(self._index_path, json.dumps({"starts": starts, "counts": counts}))

    def counts(self) -> list[int]:
        """Number of items of each unit."""
        return json.loads(self._index_path.read_text("utf-8"))["counts"]

    def items(self, unit: int) -> Iterator[dict[str, Any]]:
        """The items of one unit."""
        index = json.loads(self._index_path.read_text("utf-8"))
        with self.path.open("rb") as file:
            file.seek(index["starts"][unit])
            for line in itertools.islice(file, index["counts"][unit]):
                yield json.loads(line)

    @property
    def _index_path(self) -> Path:
        return self.path.with_suffix(".json")


class Workspace:
    """Where the files of a run lie.

    Args:
        settings: of the run.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.folder = settings.folder
        self.work = self.folder / "work"
        self.dropped = self.folder / "dropped"
        self.items = Listing(self.work / "items.jsonl")
        self.evaluation_items = Listing(self.work / "evaluation.jsonl")
        self.duplicates_path = self.work / "duplicates.npz"  # counts; written after the rows
        self.duplicate_rows_path = self.work / "duplicates.npy"
        self.report_path = self.folder / "report.json"

    def open(self) -> None:
        """Make the folders, and see that what lies there belongs to this run.

        Raises:
            ValueError: where the folder holds a data set that was made with other settings.
        """
        settings_path = self.work / "settings.json"
        identity = self.settings.identity()
        stored = settings_path if settings_path.exists() else self.report_path
        if stored.exists():
            earlier = json.loads(stored.read_text("utf-8"))
            earlier = earlier["settings"] if stored == self.report_path else earlier
            _require_same(earlier, identity, self.folder)
        elif any(self.folder.glob("*.parquet")):
            raise ValueError(f"{self.folder} holds Parquet files that this engine did not write. Name another folder.")
        if self.is_complete:
            return
        for name in ("collected", "annotated", "assigned", "evaluation"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        self.dropped.mkdir(exist_ok=True)
        write_text_atomically(settings_path, json.dumps(identity, indent=2) + "\n")
        for folder in (self.folder, self.dropped, self.work, *self.work.iterdir()):
            if folder.is_dir():
                for leftover in folder.glob(".*.tmp"):
                    leftover.unlink()

    @property
    def is_complete(self) -> bool:
        """Whether the data set is finished."""
        return self.report_path.exists()

    def collected(self, unit: int) -> Path:
        """The figures of a unit."""
        return self.work / "collected" / f"{unit:05d}.parquet"

    def fingerprints(self, unit: int) -> Path:
        """Of the figures of a unit, in their order."""
        return self.work / "collected" / f"{unit:05d}.npy"

    def annotated(self, unit: int) -> Path:
        """Modality and concepts of those figures of a unit that are kept."""
        return self.work / "annotated" / f"{unit:05d}.parquet"

    def evaluation(self, unit: int, suffix: str = ".npy") -> Path:
        """Fingerprints (``.npy``), names (``.json``) or embeddings (``.embeddings.npy``) of evaluation images."""
        return self.work / "evaluation" / f"{unit:05d}{suffix}"

    def assigned(self, split: str) -> Path:
        """Which rows of which units make a split."""
        return self.work / "assigned" / f"{split}.npy"

    def write_drops(self, name: str, drops: Iterable[Drop]) -> None:
        """Write dropped records, one JSON line each, to `dropped/<name>.jsonl`."""
        path = self.dropped / f"{name}.jsonl"
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for drop in drops:
                values = {"row_id": drop.row_id, "reason": drop.reason, "detail": drop.detail[:1000]}
                file.write(json.dumps(values) + "\n")
        temporary.replace(path)

    def duplicates_of(self, unit: int) -> NDArray[np.int64]:
        """Numbers of those rows of a unit that repeat another picture."""
        with np.load(self.duplicates_path, allow_pickle=False) as stored:
            start, end = stored["starts"][unit], stored["starts"][unit + 1]
        rows = np.load(self.duplicate_rows_path, mmap_mode="r", allow_pickle=False)
        return rows[np.searchsorted(rows, start) : np.searchsorted(rows, end)] - start

    def remove_work(self) -> None:
        """Delete the intermediate files of a finished run."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finished_splits(self) -> list[str]:
        """Splits that have a manifest."""
        return [split for split in SPLITS if manifest_path(self.folder, split).exists()]


def _require_same(earlier: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    before, after = _flat(earlier), _flat(now)
    changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    if changed:
        changes = "; ".join(f"{key}: {before.get(key)!r}, now {after.get(key)!r}" for key in changed[:5])
        raise ValueError(
            f"{folder} belongs to a run with other settings ({changes}). Name another output.folder, or remove it to "
            "start anew."
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
