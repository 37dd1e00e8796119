"""From the table of a hospital to a data set without identifiers: sort out, split, prepare in parts, put together."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medclip_hf.data.ct.engine import EngineSettings
from medclip_hf.data.ct.scan_index import record_to_row, write_scan_rows
from medclip_hf.data.ct.segmenters import Segmenter
from medclip_hf.data.hospital.burned_in import require_tesseract
from medclip_hf.data.hospital.duplicates import CrossSplitPair, pairs_across_splits
from medclip_hf.data.hospital.figures import (
    ROWS_PER_PART,
    MakeFigureStep,
    read_part_facts,
    read_part_rows,
    report_path,
)
from medclip_hf.data.hospital.grey_levels import UnusablePicture
from medclip_hf.data.hospital.pictures import facts_of_file
from medclip_hf.data.hospital.pseudonyms import Pseudonyms, normal_identifier
from medclip_hf.data.hospital.quiet import quiet_libraries
from medclip_hf.data.hospital.rows import (
    DATASET_FILE,
    FORMAT_VERSION,
    GROUP_COLUMNS,
    HOSPITAL_FEATURES,
    DatasetFacts,
    HospitalRow,
    Kind,
    Labels,
    PatientGroups,
    read_dataset_facts,
    write_dataset_facts,
    write_hospital_rows,
    write_subgroups,
)
from medclip_hf.data.hospital.scans import STORE, MakeScanStep
from medclip_hf.data.hospital.search_set import SearchSet
from medclip_hf.data.hospital.split import split_of_patients
from medclip_hf.data.hospital.table import HospitalTable, TableRow
from medclip_hf.data.hospital.work import WORK_FOLDER, PartReport, PrepareSettings, digest_of_part, file_of
from medclip_hf.data.parquet import SPLITS, import_lock, require_writable, write_text_atomically
from medclip_hf.data.records import ScanRow
from medclip_hf.data.workers import MakeStep, ProcessRunner, Task

logger = logging.getLogger(__name__)

_KIND_OF = {"picture": "figures", "volume": "scans"}
_OTHER_GROUP = "other"
_GROUPS_THAT_POINT = ("scanner", "body_part")


@dataclass(frozen=True)
class Job:
    """What is to be prepared, from where to where.

    Args:
        table: as `table.read_table` gives it.
        root: folder that the paths of the table are relative to.
        output: folder of the data set.
        pseudonyms: of the user's key.
        settings: how it is to look.
        engine: of CT scans.
        segmenter: labels CT scans that come without a label file.
        search_set: where the hashed identifiers go, for the check before a push; never inside `output`.
        num_workers: processes; 0 prepares in this one.
        show_progress: draw a progress bar.
    """

    table: HospitalTable
    root: Path
    output: Path
    pseudonyms: Pseudonyms
    settings: PrepareSettings = field(default_factory=PrepareSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    segmenter: Segmenter | None = None
    search_set: Path | None = None
    num_workers: int = 0
    show_progress: bool = True


@dataclass
class _Outcome:
    """What the parts of a run came to."""

    drops: list[tuple[int, str]]
    replaced: Counter[str] = field(default_factory=Counter)
    num_texts_changed: int = 0
    num_masked: int = 0
    num_heads: int = 0
    scans: dict[str, Any] = field(default_factory=dict)
    duplicates: list[CrossSplitPair] = field(default_factory=list)
    num_duplicates_dropped: int = 0

    def add(self, part: PartReport) -> None:
        self.drops += part.drops
        self.replaced.update(part.replaced)
        self.num_texts_changed += part.num_texts_changed
        self.num_masked += part.num_masked
        self.num_heads += part.num_heads
        self.scans.update(part.scans)


def prepare_hospital(job: Job) -> DatasetFacts:
    """What was prepared. Broken off, a run goes on where it was; a finished one is only read.

    Raises:
        ValueError: mixed kinds of files, a patient in two splits, an output folder of another run, no usable row.
    """
    if job.search_set is not None and job.search_set.resolve().is_relative_to(job.output.resolve()):
        raise ValueError(f"{job.search_set} lies inside {job.output}, which may be shared. Name a file outside of it.")
    require_writable(job.output)
    with import_lock(job.output, "hospital"):
        run = _digest_of_run(job)
        found = _finished(job, run)
        if found is not None:
            return found
        rows, kind, modalities, drops = _sorted_out(job)
        _check_class_names(job, rows)
        split_of_patients(rows, job.settings.shares, job.pseudonyms)  # its errors come before hours of work
        outcome = _Outcome([(number, drop.reason) for number, drop in job.table.drops] + drops)
        search_set = SearchSet(job.pseudonyms)
        if kind == "figures":
            counts = _prepare_figures(job, rows, outcome, search_set)
        else:
            counts = _prepare_volumes(job, rows, outcome, search_set)
        return _conclude(job, run, kind, counts, modalities, outcome, search_set)


def _digest_of_run(job: Job) -> str:
    """A keyed digest of everything that decides what the data set holds."""
    more = {
        "format": FORMAT_VERSION,
        "engine": job.engine.of_arrays() | {"normal_rule": job.engine.normal_rule},
        "segmenter": job.segmenter.name if job.segmenter else "",
        "task": job.table.task,
        "classes": job.table.classes,
        "drops": [(number, drop.reason) for number, drop in job.table.drops],
    }
    return digest_of_part(job.table.rows, job.root, job.pseudonyms, job.settings, more)


def _finished(job: Job, run: str) -> DatasetFacts | None:
    if not (job.output / DATASET_FILE).is_file():
        return None
    facts = read_dataset_facts(job.output)
    if facts.settings.get("run") == run:
        return facts
    raise ValueError(
        f"{job.output} holds a data set that was prepared from another table, other files, settings or another key. "
        "Name another folder, or remove it."
    )


# --- sorting out --------------------------------------------------------------------------------------------------


def _sorted_out(job: Job) -> tuple[list[TableRow], Kind, Counter[str], list[tuple[int, str]]]:
    """The rows of one kind, what kind that is, the modalities of their files, and the drops."""
    if job.settings.kind != "scans" and job.settings.burned_in != "keep":
        require_tesseract()  # before hours of work
    kinds: dict[str, list[TableRow]] = defaultdict(list)
    modality_of: dict[int, str] = {}
    identifying: dict[str, dict[str, None]] = defaultdict(dict)
    drops: list[tuple[int, str]] = []
    for row in tqdm(job.table.rows, desc="reading headers", unit="file", disable=not job.show_progress):
        try:
            with quiet_libraries():
                facts = facts_of_file(file_of(job.root, row.path))
        except UnusablePicture as error:
            drops.append((row.number, error.reason))
            continue
        patient = normal_identifier(row.patient)
        identifying[patient].update(dict.fromkeys(filter(None, map(_of_patient, facts.identifying))))
        if job.settings.modalities and facts.modality not in job.settings.modalities:
            drops.append((row.number, "modality not asked for"))
            continue
        kinds[_KIND_OF[facts.kind]].append(row)
        modality_of[row.number] = facts.modality
    kind = _chosen_kind(job, kinds, drops)
    other = [row for name, rows in kinds.items() if name != kind for row in rows]
    what = "volume in a set of pictures" if kind == "figures" else "picture in a set of CT volumes"
    drops += [(row.number, what) for row in other]
    rows = [_knowing(row, identifying[normal_identifier(row.patient)]) for row in kinds[kind]]
    modalities = Counter(modality_of[row.number] for row in rows)
    named = sorted(name for name in modalities if name)
    if job.settings.mixed == "refuse" and len(named) > 1:
        counts = ", ".join(f"{modalities[name]} × {name}" for name in named)
        raise ValueError(
            f"the table mixes modalities: {counts}. Name those you want (--modalities), or have all of them taken and "
            "counted (--mixed report)."
        )
    return rows, kind, modalities, drops


def _of_patient(value: str) -> str:
    """A header's value where it may stand in texts on other files of the patient; nothing for objects' own numbers."""
    return "" if re.fullmatch(r"\d+(?:\.\d+){4,}", value) else value


def _knowing(row: TableRow, identifying: Iterable[str]) -> TableRow:
    """A row that knows what the headers of all files of its patient say."""
    return replace(row, identifying=tuple(dict.fromkeys((*row.identifying, *identifying))))


def _check_class_names(job: Job, rows: Sequence[TableRow]) -> None:
    """Refuse classes that name a patient: they are written into data set, model and card as they are."""
    if not job.table.classes:
        return
    identifiers = SearchSet(job.pseudonyms)
    identifiers.add(dict.fromkeys(value for row in rows for value in row.identifying))
    allowed = {word.casefold() for word in job.settings.allowed_words}
    found = []
    for number, name in enumerate(job.table.classes, 1):
        words = [word for word in re.split(r"[\W_]+", name) if word.casefold() not in allowed]
        if any(identifiers.search(" ".join(words))):
            found.append(number)
    if found:
        raise ValueError(
            f"the names of the classes {found} of {len(job.table.classes)} (in the order of the label columns, or of "
            "the alphabet) hold an identifier of a patient, and would be written as they are. Rename them; a word that "
            "only looks like a name can be allowed (--allow-words)."
        )


def _chosen_kind(job: Job, kinds: dict[str, list[TableRow]], drops: Sequence[tuple[int, str]]) -> Kind:
    wanted = job.settings.kind
    if not any(kinds.values()) or (wanted is not None and not kinds[wanted]):
        reasons = ", ".join(f"{count} × {reason}" for reason, count in Counter(r for _, r in drops).most_common(5))
        raise ValueError(
            f"no row of the table names a usable {'CT volume' if wanted == 'scans' else 'file'}: "
            f"{reasons or 'all are of the other kind'}. Are the paths relative to {job.root}?"
        )
    if len([rows for rows in kinds.values() if rows]) > 1 and (wanted is None or job.settings.mixed == "refuse"):
        raise ValueError(
            f"the table mixes {len(kinds['figures'])} pictures and {len(kinds['scans'])} volumes, which are data for "
            "different models. Prepare them apart: name the kind you want (--kind), and with --mixed report the files "
            "of the other one are counted and left out."
        )
    return wanted or ("figures" if kinds["figures"] else "scans")


# --- pictures -----------------------------------------------------------------------------------------------------


def _prepare_figures(
    job: Job, rows: Sequence[TableRow], outcome: _Outcome, search_set: SearchSet
) -> dict[str, dict[str, Any]]:
    folder = job.output / WORK_FOLDER
    folder.mkdir(exist_ok=True)
    parts = tuple(tuple(rows[start : start + ROWS_PER_PART]) for start in range(0, len(rows), ROWS_PER_PART))
    digests = tuple(digest_of_part(part, job.root, job.pseudonyms, job.settings, {}) for part in parts)
    make = MakeFigureStep(parts, digests, job.root, folder, job.pseudonyms, job.settings)
    reports = [report_path(folder, number) for number in range(len(parts))]
    _run_parts(job, make, reports, digests, [len(part) for part in parts], outcome, search_set)
    splits = _splits_of_usable(job, rows, outcome)
    facts = _facts_of_rows(folder, len(parts), splits)
    left_out = _duplicates(job, facts, outcome)
    rare = _rare_groups([(record["patient_id"], record) for record in facts], job.settings.min_group)
    counts = {}
    for split in SPLITS:
        counter = _SplitCounter(job.table.classes)
        rows_of_split = _rows_of_split(folder, len(parts), splits, split, left_out, rare)
        counter.num_rows = write_hospital_rows(counter.each(rows_of_split), job.output, split)
        counts[split] = counter.as_dict()
    return counts


def _run_parts(
    job: Job,
    make: MakeStep,
    reports: Sequence[Path],
    digests: Sequence[str],
    sizes: Sequence[int],
    outcome: _Outcome,
    search_set: SearchSet,
) -> None:
    """Do the parts that an earlier run did not finish, then gather what all of them say."""
    todo = [
        Task(number)
        for number, (path, digest) in enumerate(zip(reports, digests, strict=True))
        if PartReport.read(path, digest) is None
    ]
    with tqdm(total=sum(sizes), desc="preparing", unit="row", disable=not job.show_progress) as bar:
        bar.update(sum(sizes) - sum(sizes[task.number] for task in todo))
        for done in ProcessRunner(job.num_workers)(make, todo) if todo else ():
            bar.update(sizes[done.task.number])
    for path, digest in zip(reports, digests, strict=True):
        part = PartReport.read(path, digest)
        if part is None:
            raise ValueError(f"{path} was changed while the run went on. Run again: it goes on from there.")
        outcome.add(part)
        search_set.merge(map(bytes.fromhex, part.hashes), part.lengths)
        search_set.num_values += part.num_identifiers[0]
        search_set.num_too_short += part.num_identifiers[1]


def _splits_of_usable(job: Job, rows: Sequence[TableRow], outcome: _Outcome) -> dict[str, str]:
    """Pseudonym → split, over the rows that could be prepared: the others would leave holes."""
    dropped = {number for number, _ in outcome.drops}
    usable = [row for row in rows if row.number not in dropped]
    if not usable:
        raise ValueError(f"no row could be prepared: {_counted(outcome.drops)}")
    return split_of_patients(usable, job.settings.shares, job.pseudonyms)


def _facts_of_rows(folder: Path, num_parts: int, splits: dict[str, str]) -> list[dict[str, Any]]:
    columns = ("row_id", "patient_id", "fingerprint", *GROUP_COLUMNS)
    facts = [record for number in range(num_parts) for record in read_part_facts(folder, number, columns)]
    return [record | {"split": splits[record["patient_id"]]} for record in facts]


def _duplicates(job: Job, facts: Sequence[dict[str, Any]], outcome: _Outcome) -> frozenset[str]:
    """The rows to leave out, once pairs across splits are known."""
    columns = [[record[name] for record in facts] for name in ("fingerprint", "row_id", "split", "patient_id")]
    outcome.duplicates = pairs_across_splits(*columns)
    if job.settings.duplicates == "report":
        return frozenset()
    left_out = frozenset(pair.second for pair in outcome.duplicates)
    outcome.num_duplicates_dropped = len(left_out)
    return left_out


def _rare_groups(patients: Iterable[tuple[str, dict[str, Any]]], min_group: int) -> frozenset[tuple[str, str]]:
    """(column, value) of scanners and body parts that too few patients share."""
    sharing: dict[tuple[str, str], set[str]] = defaultdict(set)
    for patient, record in patients:
        for column in _GROUPS_THAT_POINT:
            if record[column]:
                sharing[column, record[column]].add(patient)
    return frozenset(key for key, who in sharing.items() if len(who) < min_group)


def _coarse(groups: PatientGroups, rare: frozenset[tuple[str, str]]) -> PatientGroups:
    changes = {name: _OTHER_GROUP for name in _GROUPS_THAT_POINT if (name, getattr(groups, name)) in rare}
    return replace(groups, **changes)


def _rows_of_split(
    folder: Path,
    num_parts: int,
    splits: dict[str, str],
    split: str,
    left_out: frozenset[str],
    rare: frozenset[tuple[str, str]],
) -> Iterator[HospitalRow]:
    for number in range(num_parts):
        if not any(splits[r["patient_id"]] == split for r in read_part_facts(folder, number, ["patient_id"])):
            continue
        for row in read_part_rows(folder, number):
            if splits[row.patient_id] == split and row.figure.row_id not in left_out:
                yield replace(row, groups=_coarse(row.groups, rare))


@dataclass
class _SplitCounter:
    """Counts the rows, patients and labels of a split while they pass."""

    classes: Sequence[str]
    num_rows: int = 0
    patients: set[str] = field(default_factory=set)
    labels: Counter[str] = field(default_factory=Counter)
    num_texts: int = 0

    def each(self, rows: Iterable[HospitalRow]) -> Iterator[HospitalRow]:
        for row in rows:
            self.count(row.patient_id, row.labels, bool(row.figure.caption))
            yield row

    def count(self, patient: str, labels: Labels, has_text: bool) -> None:
        self.patients.add(patient)
        self.labels.update(name for name, is_present in labels if is_present)
        self.num_texts += has_text

    def as_dict(self) -> dict[str, Any]:
        present = {name: self.labels[name] for name in self.classes}
        return {"rows": self.num_rows, "patients": len(self.patients), "texts": self.num_texts, "present": present}


# --- CT -----------------------------------------------------------------------------------------------------------


def _prepare_volumes(
    job: Job, rows: Sequence[TableRow], outcome: _Outcome, search_set: SearchSet
) -> dict[str, dict[str, Any]]:
    folder = job.output / WORK_FOLDER
    folder.mkdir(exist_ok=True)
    more = {"engine": job.engine.of_arrays() | {"normal_rule": job.engine.normal_rule}}
    digests = tuple(digest_of_part([row], job.root, job.pseudonyms, job.settings, more) for row in rows)
    make = MakeScanStep(
        tuple(rows), digests, job.root, job.output, folder, job.pseudonyms, job.settings, job.engine, job.segmenter
    )
    reports = [folder / f"scan-{number:06d}.json" for number in range(len(rows))]
    _run_parts(job, make, reports, digests, [1] * len(rows), outcome, search_set)
    splits = _splits_of_usable(job, rows, outcome)
    for volume in (job.output / "volumes" / STORE).iterdir():  # of a run that was killed, or of rows that are gone
        if volume.name.removesuffix(".zarr") not in outcome.scans:
            shutil.rmtree(volume)
    for facts in outcome.scans.values():
        facts["split"] = splits[facts["patient_id"]]
    write_text_atomically(job.output / "engine.json", json.dumps(job.engine.of_arrays(), indent=2) + "\n")
    counts = {}
    for split in SPLITS:
        counter = _SplitCounter(job.table.classes)
        own = [_scan_row(job.output, scan_id) for scan_id, facts in outcome.scans.items() if facts["split"] == split]
        for row in own:
            counter.count(row.patient_id, row.labels, bool(row.anatomy_texts))
        counter.num_rows = len(own)
        counts[split] = counter.as_dict()
        if own:
            write_scan_rows(own, job.output, split)
    outcome.duplicates = _duplicate_scans(job.output, outcome.scans)
    groups = {scan_id: PatientGroups(**facts["groups"]) for scan_id, facts in outcome.scans.items()}
    rare = _rare_groups(
        [(facts["patient_id"], facts["groups"]) for facts in outcome.scans.values()], job.settings.min_group
    )
    write_subgroups(
        [
            (facts["split"], scan_id, facts["patient_id"], facts["study_id"], _coarse(groups[scan_id], rare))
            for scan_id, facts in outcome.scans.items()
        ],
        job.output,
    )
    return counts


def _scan_row(output: Path, scan_id: str) -> ScanRow:
    """What the engine says of a scan that it finished."""
    return record_to_row(json.loads((output / "rows" / STORE / f"{scan_id}.json").read_text(encoding="utf-8")))


def _duplicate_scans(output: Path, scans: dict[str, Any]) -> list[CrossSplitPair]:
    """Pairs of scans whose middle slices look the same."""
    import numpy as np
    from PIL import Image

    from medclip_hf.data.ct.volumes import read_crop, read_scan
    from medclip_hf.data.engine.dedup import fingerprint

    prints = []
    for scan_id in scans:
        path = output / "volumes" / STORE / f"{scan_id}.zarr"
        depth, height, width = read_scan(path).shape_dhw
        values, _ = read_crop(path, (depth // 2, 0, 0), (1, height, width))
        slice_image = Image.fromarray(
            np.clip((values[0].astype(np.float32) + 1000) / 1400 * 255, 0, 255).astype(np.uint8)
        )
        prints.append(fingerprint(scan_id, values.tobytes(), slice_image))
    splits = [facts["split"] for facts in scans.values()]
    return pairs_across_splits(prints, list(scans), splits, [facts["patient_id"] for facts in scans.values()])


# --- the end ------------------------------------------------------------------------------------------------------


def _conclude(
    job: Job,
    run: str,
    kind: Kind,
    counts: dict[str, dict[str, Any]],
    modalities: Counter[str],
    outcome: _Outcome,
    search_set: SearchSet,
) -> DatasetFacts:
    """Write what was set aside and found, then, last, the facts; the work folder goes."""
    folder = job.output / "dropped"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"row": number, "reason": reason}) + "\n" for number, reason in sorted(outcome.drops)]
    write_text_atomically(folder / "rows.jsonl", "".join(lines))
    pairs = [vars(pair) for pair in outcome.duplicates]
    write_text_atomically(folder / "duplicates_across_splits.json", json.dumps(pairs, indent=1) + "\n")
    if job.search_set is not None:
        search_set.save(job.search_set)
    facts = DatasetFacts(
        kind=kind,
        task=job.table.task,
        classes=job.table.classes,
        counts=counts,
        pseudonyms=job.pseudonyms.facts(),
        settings=_settings(job, kind) | {"run": run},
        report={
            "rows_in_table": len(job.table.rows) + len(job.table.drops),
            "dropped": dict(Counter(reason for _, reason in outcome.drops).most_common()),
            "modalities": {name or "none": count for name, count in modalities.most_common()},
            "replaced_in_texts": dict(outcome.replaced.most_common()),
            "texts_changed": outcome.num_texts_changed,
            "pictures_masked": outcome.num_masked,
            "may_show_a_face": outcome.num_heads,
            "duplicates_across_splits": len(outcome.duplicates),
            "duplicates_dropped": outcome.num_duplicates_dropped,
            "identifiers_to_search_for": search_set.num_values - search_set.num_too_short,
            "identifiers_too_short": search_set.num_too_short,
        },
    )
    write_dataset_facts(facts, job.output)
    for rest in (WORK_FOLDER, "rows"):
        shutil.rmtree(job.output / rest, ignore_errors=True)
    return facts


def _settings(job: Job, kind: Kind) -> dict[str, Any]:
    values = job.settings.as_dict()
    if kind == "scans":
        return values | {"engine": job.engine.of_arrays()}
    return values | {"columns": list(HOSPITAL_FEATURES)}


def _counted(drops: Sequence[tuple[int, str]]) -> str:
    return ", ".join(f"{count} × {reason}" for reason, count in Counter(r for _, r in drops).most_common())
