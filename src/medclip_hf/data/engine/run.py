"""The MedConcept engine: articles or figure–caption pairs in, a data set of figures with captions and concepts out.

    list      the items of the source, once, cut into units
    collect   units → figures whose image and size are good, with fingerprints              (many processes)
    duplicates  all fingerprints → figures that repeat another one, or an evaluation image
    annotate  units → modality, caption check, concepts                                     (many processes)
    assign    all figures → train, validation and test, by article and modality
    write     shards of the final data set                                                  (many processes)

The tasks of a step write files of their own, so an interrupted run goes on with those that are missing, and the result
is the same for any number of workers and any runner. Memory does not grow with the figures, but for the global steps,
which take some tens of bytes a figure.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from medclip_hf.data.engine.data_card import write_data_card
from medclip_hf.data.engine.dedup import REASONS, find_duplicates, join_fingerprints
from medclip_hf.data.engine.evaluation_images import list_evaluation_images
from medclip_hf.data.engine.held_out import assign_splits
from medclip_hf.data.engine.settings import EngineSettings
from medclip_hf.data.engine.sources import open_source
from medclip_hf.data.engine.steps import AnnotateStep, CollectStep, EvaluationStep, WriteStep, read_task_report
from medclip_hf.data.engine.work import ASSIGNED, Workspace
from medclip_hf.data.parquet import (
    SPLITS,
    import_lock,
    require_writable,
    shard_path,
    write_manifest,
    write_text_atomically,
)
from medclip_hf.data.stages import Drop, Tally
from medclip_hf.data.workers import ProcessRunner, Runner, Task

logger = logging.getLogger(__name__)

EVALUATION_IMAGES_PER_UNIT = 500
CONTAMINATED = "evaluation"  # how the reasons begin for which a figure may not be trained on


@dataclass(frozen=True)
class Progress:
    """How far a step has come.

    Args:
        step: its name.
        num_done: items, rows or shards that are finished, those of earlier runs among them.
        num_items: that there are.
        num_resumed: that earlier runs finished.
        kept_share: of the records of this step, in [0, 1].
    """

    step: str
    num_done: int
    num_items: int
    num_resumed: int
    kept_share: float


@dataclass
class EngineReport:
    """What came of a run.

    Args:
        num_items: articles or table rows that the source listed.
        num_figures: rows of each split.
        tally: figures kept and dropped in all.
        num_evaluation_images: that figures were compared with.
        num_contaminated: figures that show one of them.
    """

    num_items: int
    num_figures: dict[str, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    num_evaluation_images: int = 0
    num_contaminated: int = 0

    @classmethod
    def read(cls, path: Path) -> EngineReport:
        """The report of a finished run."""
        values = json.loads(path.read_text("utf-8"))["report"]
        return cls(**(values | {"tally": Tally.from_dict(values["tally"])}))


OnProgress = Callable[[Progress], None]


def build_medconcept(
    settings: EngineSettings,
    runner: Runner | None = None,
    on_progress: OnProgress = lambda progress: None,
) -> EngineReport:
    """What came of building the data set; started again after an interruption, it does only what is missing.

    Args:
        settings: the recipe.
        runner: does the tasks: `ProcessRunner` for the processes of one machine (the default: this one),
            `engine_ray.RayRunner` for a cluster.
        on_progress: called after every task.

    Raises:
        ValueError: where the source is missing, the output cannot be written, or it holds a run with other settings.
    """
    runner = runner or ProcessRunner()
    require_writable(settings.folder)
    with import_lock(settings.folder, "engine"):
        workspace = Workspace(settings)
        workspace.open()
        if workspace.is_complete:
            logger.info("%s is complete already", settings.folder)
            if not settings.output.keep_work:
                workspace.remove_work()
            return EngineReport.read(workspace.report_path)
        run = _Run(settings, workspace, runner, on_progress)
        return run.run()


@dataclass
class _Run:
    """One run, step by step; each step looks for what earlier runs left."""

    settings: EngineSettings
    workspace: Workspace
    runner: Runner
    on_progress: OnProgress

    def run(self) -> EngineReport:
        workspace = self.workspace
        self._list()
        counts = workspace.items.counts()
        units = [Task(number) for number in range(len(counts))]
        collected = self._do("collect", CollectStep, units, counts, lambda task: workspace.collected(task.number))
        duplicates, num_evaluation = self._find_duplicates(units)
        rows = [pq.read_metadata(workspace.collected(task.number)).num_rows for task in units]
        annotated = self._do("annotate", AnnotateStep, units, rows, lambda task: workspace.annotated(task.number))
        num_figures = self._assign(units)
        self._write(num_figures)
        tally = Tally(annotated.kept, collected.dropped + duplicates + annotated.dropped)
        num_contaminated = sum(count for reason, count in tally.dropped.items() if reason.startswith(CONTAMINATED))
        report = EngineReport(sum(counts), num_figures, tally, num_evaluation, num_contaminated)
        self._finish(report)
        return report

    def _list(self) -> None:
        source = self.settings.source
        if not self.workspace.items.is_complete:
            logger.info("listing the source")
            items = open_source(source).list_items()
            self.workspace.items.write(islice(items, source.limit), source.items_per_unit)
        folders = self.settings.decontamination.folders
        if folders and not self.workspace.evaluation_items.is_complete:
            self.workspace.evaluation_items.write(list_evaluation_images(folders), EVALUATION_IMAGES_PER_UNIT)

    def _do(
        self, name: str, step: type, tasks: Sequence[Task], sizes: Sequence[int], result: Callable[[Task], Path]
    ) -> Tally:
        """Do those tasks of a step whose result is missing; the tally of all of them."""
        done = [task for task in tasks if result(task).exists()]
        total, tally = sum(sizes), Tally()
        size_of = dict(zip(tasks, sizes, strict=True))
        for task in done:
            tally.add(read_task_report(result(task), task).tally)
        num_resumed = num_done = sum(size_of[task] for task in done)
        missing = [task for task in tasks if not result(task).exists()]
        self.on_progress(Progress(name, num_done, total, num_resumed, tally.kept_share))
        for report in self.runner(partial(step, self.settings), missing) if missing else ():
            tally.add(report.tally)
            num_done += size_of[report.task]
            self.on_progress(Progress(name, num_done, total, num_resumed, tally.kept_share))
        return tally

    # --- global steps -------------------------------------------------------------------------------------------------

    def _find_duplicates(self, units: Sequence[Task]) -> tuple[Counter[str], int]:
        """Reasons of the duplicates with their counts, and the number of evaluation images."""
        path = self.workspace.duplicates_path
        evaluation = self._look_at_evaluation_images()
        if not path.exists():
            logger.info("looking for duplicates")
            _find_and_report_duplicates(self.workspace, [task.number for task in units], evaluation)
        with np.load(path, allow_pickle=False) as stored:
            counts = Counter(dict(zip(stored["reason_names"].tolist(), stored["reason_counts"].tolist(), strict=True)))
            return counts, int(stored["num_evaluation"])

    def _look_at_evaluation_images(self) -> list[int]:
        if not self.settings.decontamination.folders:
            return []
        counts = self.workspace.evaluation_items.counts()
        tasks = [Task(number) for number in range(len(counts))]
        missing = [task for task in tasks if not self.workspace.evaluation(task.number).exists()]
        num_done = sum(counts) - sum(counts[task.number] for task in missing)
        for report in self.runner(partial(EvaluationStep, self.settings), missing) if missing else ():
            num_done += report.num_items
            self.on_progress(Progress("evaluation images", num_done, sum(counts), 0, 1.0))
        return [task.number for task in tasks]

    def _assign(self, units: Sequence[Task]) -> dict[str, int]:
        """Rows of each split, once it is written down which they are."""
        if not all(self.workspace.assigned(split).exists() for split in SPLITS):
            rows, groups, strata = _light_columns(self.workspace, [task.number for task in units])
            shares = (self.settings.splits.validation_share, self.settings.splits.test_share)
            splits = assign_splits(groups, strata, shares, self.settings.splits.seed)
            for number, split in enumerate(SPLITS):
                path = self.workspace.assigned(split)
                temporary = path.with_name(f".{path.name}.tmp")
                with temporary.open("wb") as file:
                    np.save(file, rows[splits == number], allow_pickle=False)
                temporary.replace(path)
        return {
            split: len(np.load(self.workspace.assigned(split), mmap_mode="r", allow_pickle=False)) for split in SPLITS
        }

    def _write(self, num_figures: dict[str, int]) -> None:
        rows_per_shard = self.settings.output.rows_per_shard
        tasks, sizes = [], []
        for split, count in num_figures.items():
            for number, start in enumerate(range(0, count, rows_per_shard)):
                tasks.append(Task(number, split))
                sizes.append(min(rows_per_shard, count - start))
        total, num_resumed = sum(sizes), 0
        size_of, missing = dict(zip(tasks, sizes, strict=True)), []
        for task in tasks:
            if shard_path(self.settings.folder, task.name, task.number).exists():
                num_resumed += size_of[task]
            else:
                missing.append(task)
        num_done = num_resumed
        for report in self.runner(partial(WriteStep, self.settings), missing) if missing else ():
            num_done += size_of[report.task]
            self.on_progress(Progress("write", num_done, total, num_resumed, 1.0))

    def _finish(self, report: EngineReport) -> None:
        """Manifests, the card and, last of all, the report that declares the run complete."""
        folder, rows_per_shard = self.settings.folder, self.settings.output.rows_per_shard
        identity = self.settings.identity()
        for split, count in report.num_figures.items():
            shards = [shard_path(folder, split, number) for number in range(-(-count // rows_per_shard))]
            if shards:
                write_manifest(folder, split, shards, settings=self.settings.published())
        if self.settings.decontamination.folders:
            _write_contaminated(self.workspace)
        values = vars(report) | {"tally": report.tally.as_dict()}
        write_data_card(folder, self.settings.output.title, values, self.settings.published())
        text = json.dumps({"report": values, "settings": identity}, indent=2, ensure_ascii=False)
        write_text_atomically(self.workspace.report_path, text + "\n")
        if not self.settings.output.keep_work:
            self.workspace.remove_work()


def _find_and_report_duplicates(workspace: Workspace, units: list[int], evaluation: list[int]) -> None:
    """Write which rows are dropped (`duplicates.npz`), and their names with those of their originals.

    Evaluation images come first in the order of preference, so what repeats one of them goes.
    """
    paths = [workspace.evaluation(unit) for unit in evaluation] + [workspace.fingerprints(unit) for unit in units]
    joined = workspace.work / "fingerprints.npy"
    fingerprints = join_fingerprints(paths, joined)
    lengths = [len(np.load(path, mmap_mode="r", allow_pickle=False)) for path in paths]
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    num_evaluation = int(starts[len(evaluation)])
    found = find_duplicates(fingerprints, workspace.settings.duplicates)
    is_ours = found.rows >= num_evaluation
    rows, originals, reasons = found.rows[is_ours], found.originals[is_ours], found.reasons[is_ours]
    names = _names_of(workspace, units, evaluation, starts, np.union1d(rows, originals))
    drops = []
    for row, original, reason in zip(rows.tolist(), originals.tolist(), reasons, strict=True):
        text = REASONS[reason] if original >= num_evaluation else f"{CONTAMINATED} {REASONS[reason]}"
        drops.append(Drop(text, f"the same as {names[original]}", names[row]))
    workspace.write_drops("duplicates", drops)
    counts = Counter(drop.reason for drop in drops)
    with workspace.duplicate_rows_path.open("wb") as file:
        np.save(file, rows, allow_pickle=False)
    temporary = workspace.duplicates_path.with_name(".duplicates.npz.tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            starts=starts[len(evaluation) :],
            reason_names=np.array(list(counts), dtype=str),
            reason_counts=np.array(list(counts.values()), dtype=np.int64),
            num_evaluation=num_evaluation,
        )
    temporary.replace(workspace.duplicates_path)
    joined.unlink(missing_ok=True)


def _write_contaminated(workspace: Workspace) -> None:
    """The decontamination report: every figure that shows an evaluation image, which one, and how that was seen."""
    lines = []
    for path in sorted(workspace.dropped.glob("*.jsonl")):
        with path.open(encoding="utf-8") as file:
            lines += [line for line in file if json.loads(line)["reason"].startswith(CONTAMINATED)]
    write_text_atomically(workspace.folder / "decontamination.jsonl", "".join(lines))


def _names_of(
    workspace: Workspace, units: list[int], evaluation: list[int], starts: np.ndarray, wanted: np.ndarray
) -> dict[int, str]:
    """Names of the wanted rows, read file by file."""
    names: dict[int, str] = {}
    for place in range(len(starts) - 1):
        inside = wanted[np.searchsorted(wanted, starts[place]) : np.searchsorted(wanted, starts[place + 1])]
        if not len(inside):
            continue
        if place < len(evaluation):
            known = json.loads(workspace.evaluation(evaluation[place], ".json").read_text("utf-8"))
        else:
            path = workspace.collected(units[place - len(evaluation)])
            known = pq.read_table(path, columns=["row_id"])["row_id"].to_pylist()
        names |= {int(row): known[row - starts[place]] for row in inside}
    return names


def _light_columns(workspace: Workspace, units: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(unit, row), article and modality (as a number) of every figure that is kept, in order."""
    rows, groups, strata = [np.zeros(0, ASSIGNED)], [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    numbers: dict[str, int] = {}
    for unit in units:
        table = pq.read_table(workspace.annotated(unit), columns=["row", "group", "modality"])
        part = np.zeros(table.num_rows, ASSIGNED)
        part["unit"], part["row"] = unit, table["row"].to_numpy()
        rows.append(part)
        groups.append(table["group"].to_numpy())
        modalities = table["modality"].to_pylist()
        strata.append(np.array([numbers.setdefault(name, len(numbers)) for name in modalities], np.int64))
    return np.concatenate(rows), np.concatenate(groups), np.concatenate(strata)
