"""What the two ways of preparing (pictures, CT) share: settings, the text of a row, and what a finished part says."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from medclip_hf.data.hospital.burned_in import BurnedIn
from medclip_hf.data.hospital.free_text import PHONE_REGIONS, TextDeidentifier
from medclip_hf.data.hospital.grey_levels import UnusablePicture
from medclip_hf.data.hospital.headers import age_band_of, scanner_of, sex_of
from medclip_hf.data.hospital.pictures import PictureSettings
from medclip_hf.data.hospital.pseudonyms import Pseudonyms
from medclip_hf.data.hospital.rows import Kind, PatientGroups
from medclip_hf.data.hospital.search_set import SearchSet
from medclip_hf.data.hospital.split import SplitShares
from medclip_hf.data.hospital.table import TableRow
from medclip_hf.data.images import UnreadableImage, path_inside
from medclip_hf.data.parquet import write_text_atomically

WORK_FOLDER = ".work"


@dataclass(frozen=True)
class PrepareSettings:
    """What decides how a prepared data set looks.

    Args:
        kind: "figures", "scans", or None to tell from the files.
        mixed: "refuse" stops where pictures and volumes, or several DICOM modalities, lie in one table; "report" takes
            the files of `kind`, of all modalities, and counts the others.
        modalities: DICOM modalities to take; all where empty.
        pictures: how pictures are made.
        burned_in: what becomes of pictures with text in them.
        shares: of the splits.
        duplicates: whether the copy in the larger split of a picture that stands in two is reported or dropped.
        use_presidio: see `free_text.TextDeidentifier`.
        ner_model: the same.
        phone_regions: the same.
        allowed_words: in names of classes, though a patient has that name ("baker" of a cyst).
        min_group: a scanner or body part of fewer patients becomes "other", since it could point to one.
    """

    kind: Kind | None = None
    mixed: Literal["refuse", "report"] = "refuse"
    modalities: tuple[str, ...] = ()
    pictures: PictureSettings = field(default_factory=PictureSettings)
    burned_in: BurnedIn = "refuse"
    shares: SplitShares = field(default_factory=SplitShares)
    duplicates: Literal["report", "drop"] = "report"
    use_presidio: bool = True
    ner_model: str | None = None
    phone_regions: tuple[str, ...] = PHONE_REGIONS
    allowed_words: tuple[str, ...] = ()
    min_group: int = 5

    def deidentifier(self) -> TextDeidentifier:
        """As these settings ask for."""
        return TextDeidentifier(self.use_presidio, self.ner_model, self.phone_regions)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able values; a model that is a folder is not named, since its path may name a user."""
        values = json.loads(json.dumps(asdict(self)))
        del values["allowed_words"]  # they are patients' names as well
        return values | {"ner_model": Path(self.ner_model).name if self.ner_model else None}


@dataclass
class PartReport:
    """What came of one part of the table; all of it may be written down.

    Args:
        digest: of the rows, files and settings it was made from.
        drops: (row number, reason).
        replaced: kind → places in texts.
        num_texts_changed: texts with at least one replacement.
        num_masked: pictures in which text was masked.
        num_heads: examinations that may show a face.
        hashes: of the identifiers that were seen, and the lengths of their forms.
        num_identifiers: how many were seen, and how many are too short to be searched for.
        scans: of CT: scan id → study id, groups.
    """

    digest: str
    drops: list[tuple[int, str]] = field(default_factory=list)
    replaced: Counter[str] = field(default_factory=Counter)
    num_texts_changed: int = 0
    num_masked: int = 0
    num_heads: int = 0
    hashes: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_identifiers: tuple[int, int] = (0, 0)
    scans: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """As JSON, atomically: a part that has it is done."""
        write_text_atomically(path, json.dumps(vars(self), ensure_ascii=False))  # asdict breaks a Counter

    @classmethod
    def read(cls, path: Path, digest: str | None = None) -> PartReport | None:
        """The report of a finished part; None where there is none, or it was made from something else."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            report = cls(**values)
        except (OSError, TypeError, json.JSONDecodeError):
            return None
        report.replaced = Counter(report.replaced)
        report.drops = [(int(number), str(reason)) for number, reason in report.drops]
        return report if digest is None or report.digest == digest else None

    def remember(self, search_set: SearchSet) -> None:
        """Keep what a set of identifiers holds."""
        self.hashes = sorted(value.hex() for value in search_set.hashes)
        self.lengths = search_set.lengths()
        self.num_identifiers = (search_set.num_values, search_set.num_too_short)


def file_of(root: Path, name: str) -> Path:
    """The file or folder that a cell of the table names.

    Raises:
        UnusablePicture: where it lies outside of `root`.
    """
    try:
        if Path(name).is_absolute():
            name = str(Path(name).relative_to(root.absolute()))
        return path_inside(root, name.replace("\\", "/") if not (root / name).exists() else name)
    except (UnreadableImage, ValueError, OSError):
        raise UnusablePicture("path outside the folder of the data") from None


def digest_of_part(
    rows: Sequence[TableRow], root: Path, pseudonyms: Pseudonyms, settings: PrepareSettings, more: Mapping[str, Any]
) -> str:
    """A keyed digest that changes with the cells, the files (size and time) and the settings, and tells nothing."""
    states = []
    for row in rows:
        try:
            status = file_of(root, row.path).stat()
            states.append([status.st_size, status.st_mtime_ns])
        except (UnusablePicture, OSError, ValueError):
            states.append([])
    cells = [asdict(row) for row in rows]
    return pseudonyms.of("part", json.dumps([cells, states, settings.as_dict(), settings.ner_model, dict(more)]))


def groups_of_row(row: TableRow, groups: PatientGroups, identifying: Sequence[str]) -> PatientGroups:
    """The groups of the header, over which the table's own columns go; a scanner's name that holds an identifier goes.

    Args:
        row: of the table.
        groups: of the header.
        identifying: of the patient.
    """
    scanner = scanner_of(row.scanner) or groups.scanner
    if scanner and TextDeidentifier(use_presidio=False)(scanner, identifying).counts:
        scanner = ""
    return replace(
        groups, sex=sex_of(row.sex) or groups.sex, age_band=age_band_of(row.age) or groups.age_band, scanner=scanner
    )


def deidentified(text: str, identifying: Sequence[str], deidentify: TextDeidentifier, report: PartReport) -> str:
    """A text without what identifies, counted in `report`."""
    if not text.strip():
        return ""
    result = deidentify(text, identifying)
    report.replaced.update(result.counts)
    report.num_texts_changed += bool(result.counts)
    return result.text.strip()
