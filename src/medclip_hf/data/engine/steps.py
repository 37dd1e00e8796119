"""The steps of the MedConcept engine that many processes do at once; each task reads and writes files of its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from medclip_hf.data.engine.dedup import fingerprint, save_fingerprints
from medclip_hf.data.engine.evaluation_images import EvaluationImage, read_evaluation_images
from medclip_hf.data.engine.figure_images import prepare_image
from medclip_hf.data.engine.figure_type import blank_share, named_modality
from medclip_hf.data.engine.language import check_caption, clean_caption
from medclip_hf.data.engine.settings import ConceptSettings, EngineSettings, short_digest
from medclip_hf.data.engine.sources import open_source
from medclip_hf.data.engine.work import Workspace
from medclip_hf.data.images import UnreadableImage
from medclip_hf.data.parquet import (
    FIGURE_FEATURES,
    FigureShardWriter,
    read_shard_metadata,
    record_to_row,
    shard_path,
    write_text_atomically,
)
from medclip_hf.data.records import ConceptMention, FigureRow
from medclip_hf.data.stages import Drop, Tally, run_stages
from medclip_hf.data.workers import Task, TaskReport

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 256  # of captions whose concepts are found together
EVALUATION_IMAGES_AT_ONCE = 64
BYTES_PER_GROUP = 4 * 2**20  # of collected figures: held-out ones are picked out one by one
READ_AHEAD = 2  # items under way for each thread that reads

_ANNOTATED_SCHEMA = pa.schema(
    [
        ("row", pa.uint32()),
        ("group", pa.uint64()),  # figures of one article stay in one split
        ("modality", pa.string()),
        FIGURE_FEATURES.arrow_schema.field("concepts"),
    ]
)
_TEXT_COLUMNS = [name for name in FIGURE_FEATURES if name not in ("image", "concepts")]

Collected = tuple[FigureRow, np.void]  # a figure and its fingerprint
ExtractConcepts = Callable[[Sequence[str]], list[tuple[ConceptMention, ...]]]


class CollectStep:
    """Reads the items of a unit; writes their figures, those fit to be looked at further, and their fingerprints."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.workspace = Workspace(settings)
        self.source = open_source(settings.source)

    def __call__(self, task: Task) -> TaskReport:
        """Collect one unit."""
        items = list(self.workspace.items.items(task.number))
        return self._write(task, len(items), self._outcomes(items))

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """A unit without figures, every item dropped."""
        items = list(self.workspace.items.items(task.number))
        drops: list[Collected | Drop] = [Drop(reason, f"unit {task.number}", _name_of(item)) for item in items]
        return self._write(task, len(items), iter(drops))

    def _outcomes(self, items: list[dict[str, Any]]) -> Iterator[Collected | Drop]:
        """What came of each figure, in the order of the items."""
        reads_at_once = self.settings.source.reads_at_once
        if reads_at_once == 1:
            for item in items:
                yield from self._read(item)
            return
        with ThreadPoolExecutor(reads_at_once) as pool:
            remaining = iter(items)
            under_way = [pool.submit(self._read, item) for item in islice(remaining, READ_AHEAD * reads_at_once)]
            while under_way:
                yield from under_way.pop(0).result()
                under_way += [pool.submit(self._read, item) for item in islice(remaining, 1)]

    def _read(self, item: dict[str, Any]) -> list[Collected | Drop]:
        outcomes: list[Collected | Drop] = []
        try:
            for row in self.source.read(item):
                outcomes.append(self._examine(row))
        except Exception as error:  # one hostile article must not end a run over millions
            logger.exception("item %s could not be read", _name_of(item))
            outcomes.append(Drop("unexpected error", f"{type(error).__name__}: {error}", _name_of(item)))
        return outcomes

    def _examine(self, row: FigureRow | Drop) -> Collected | Drop:
        if isinstance(row, Drop):
            return row
        try:
            content, image = prepare_image(row.image_bytes or b"", row.row_id, self.settings.images)
        except UnreadableImage as error:
            return Drop(error.reason, error.detail, row.row_id)
        rules = self.settings.figures
        if rules.keep != "all" and not self.settings.model.path:
            share = blank_share(image)
            if share > rules.max_blank_share:
                return Drop("figure is a drawing", f"{share:.0%} of it is blank", row.row_id)
        row = replace(row, caption=clean_caption(row.caption), image_bytes=content)
        return row, fingerprint(row.row_id, content, image)

    def _write(self, task: Task, num_items: int, outcomes: Iterator[Collected | Drop]) -> TaskReport:
        path = self.workspace.collected(task.number)
        writer, fingerprints, drops = FigureShardWriter(path, BYTES_PER_GROUP), [], []
        try:
            for outcome in outcomes:
                if isinstance(outcome, Drop):
                    drops.append(outcome)
                else:
                    writer.write(outcome[0])
                    fingerprints.append(outcome[1])
            report = TaskReport(task, num_items, _tally(len(fingerprints), drops))
            self.workspace.write_drops(f"collect-{task.number:05d}", drops)
            save_fingerprints(self.workspace.fingerprints(task.number), fingerprints)
            writer.commit({"num_items": num_items, "tally": report.tally.as_dict()})
        finally:
            writer.discard()
        return report


class EvaluationStep:
    """Fingerprints, and embeddings where there is a model, of images that must not be trained on."""

    def __init__(self, settings: EngineSettings) -> None:
        self.workspace = Workspace(settings)
        self.model = _image_text_model(settings)

    def __call__(self, task: Task) -> TaskReport:
        """Look at one unit of evaluation images."""
        items = list(self.workspace.evaluation_items.items(task.number))
        names: list[str] = []
        fingerprints, embeddings, drops = [], [], []
        images = chain.from_iterable(map(read_evaluation_images, items))
        while batch := list(islice(images, EVALUATION_IMAGES_AT_ONCE)):
            drops += [image for image in batch if isinstance(image, Drop)]
            readable = [image for image in batch if isinstance(image, EvaluationImage)]
            names += [image.name for image in readable]
            fingerprints += [fingerprint(f"evaluation {image.name}", image.content, image.pixels) for image in readable]
            if self.model and readable:
                embeddings.append(self.model.embed_images([image.pixels for image in readable]))
        return self._write(task, len(items), names, fingerprints, embeddings, drops)

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """A unit without images, every file dropped."""
        items = list(self.workspace.evaluation_items.items(task.number))
        return self._write(task, len(items), [], [], [], [Drop(reason, "", item["path"]) for item in items])

    def _write(
        self, task: Task, num_items: int, names: list[str], prints: list[Any], embeddings: list[Any], drops: list[Drop]
    ) -> TaskReport:
        self.workspace.write_drops(f"evaluation-{task.number:05d}", drops)
        write_text_atomically(self.workspace.evaluation(task.number, ".json"), json.dumps(names))
        if self.model:
            path = self.workspace.evaluation(task.number, ".embeddings.npy")
            joined = np.concatenate(embeddings) if embeddings else np.zeros((0, 0), np.float32)
            np.save(path, joined, allow_pickle=False)
        save_fingerprints(self.workspace.evaluation(task.number), prints)
        return TaskReport(task, num_items, _tally(len(prints), drops))


class AnnotateStep:
    """Finds modality and concepts of the figures of a unit, and drops those whose picture or caption is not fit."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.workspace = Workspace(settings)
        self.extract = concept_extractor(settings.concepts)
        self.model = _image_text_model(settings)
        self.judge = None
        if self.model:
            from medclip_hf.data.engine.image_text_model import FigureJudge

            self.judge = FigureJudge(self.model, settings, _evaluation_embeddings(self.workspace))
        captions = settings.captions
        self.stages: list[Callable[[Any], Any]] = [
            self._require_modality,
            partial(
                check_caption,
                min_words=captions.min_words,
                max_chars=captions.max_chars,
                language=captions.language,
            ),
        ]

    def __call__(self, task: Task) -> TaskReport:
        """Annotate one unit."""
        path = self.workspace.collected(task.number)
        duplicates = set(self.workspace.duplicates_of(task.number).tolist())
        columns = [*_TEXT_COLUMNS, "image"] if self.judge else _TEXT_COLUMNS
        records: list[dict[str, Any]] = []
        drops: list[Drop] = []
        first_row = 0
        for batch in pq.ParquetFile(path).iter_batches(ROWS_AT_ONCE, columns=columns):
            rows = [
                (first_row + place, record_to_row(record | {"image": record.get("image"), "concepts": ()}))
                for place, record in enumerate(batch.to_pylist())
                if first_row + place not in duplicates
            ]
            first_row += batch.num_rows
            records += self._annotate(rows, drops)
        return self._write(task, first_row, records, drops)

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """A unit without annotated figures, every figure dropped."""
        table = pq.read_table(self.workspace.collected(task.number), columns=["row_id"])
        drops = [Drop(reason, f"unit {task.number}", row_id) for row_id in table["row_id"].to_pylist()]
        return self._write(task, table.num_rows, [], drops)

    def _annotate(self, rows: list[tuple[int, FigureRow]], drops: list[Drop]) -> list[dict[str, Any]]:
        judged: list[FigureRow | Drop] = [row for _, row in rows]
        if self.judge:
            judged = self.judge([row for _, row in rows])
        outcomes = [run_stages(row, self.stages) for row in judged]
        found = iter(self.extract([row.caption for row in outcomes if isinstance(row, FigureRow)]))
        records = []
        for (number, _), row in zip(rows, outcomes, strict=True):
            concepts = () if isinstance(row, Drop) else next(found)
            if isinstance(row, Drop):
                drops.append(row)
            elif self.settings.concepts.needs_concepts and not concepts:
                drops.append(Drop("caption without concepts", "", row.row_id))
            else:
                records.append(
                    {
                        "row": number,
                        "group": short_digest(row.pmcid or row.row_id),
                        "modality": row.modality,
                        "concepts": [vars(concept) for concept in concepts],
                    }
                )
        return records

    def _require_modality(self, row: FigureRow) -> FigureRow | Drop:
        row = replace(row, modality=row.modality or named_modality(row.caption))
        if self.settings.figures.needs_modality and not row.modality:
            return Drop("modality unknown", "", row.row_id)
        return row

    def _write(self, task: Task, num_rows: int, records: list[dict[str, Any]], drops: list[Drop]) -> TaskReport:
        self.workspace.write_drops(f"annotate-{task.number:05d}", drops)
        report = TaskReport(task, num_rows, _tally(len(records), drops))
        table = pa.Table.from_pylist(records, schema=_ANNOTATED_SCHEMA)
        metadata = {"num_items": num_rows, "tally": report.tally.as_dict()}
        table = table.replace_schema_metadata({"medclip_hf": json.dumps(metadata)})
        path = self.workspace.annotated(task.number)
        temporary = path.with_name(f".{path.name}.tmp")
        pq.write_table(table, temporary, compression="ZSTD")
        temporary.replace(path)
        return report


class WriteStep:
    """Puts figures and annotations together into the final shards; a task is one shard of the split that it names."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.workspace = Workspace(settings)

    def __call__(self, task: Task) -> TaskReport:
        """Write one shard."""
        rows_per_shard = self.settings.output.rows_per_shard
        assigned = np.load(self.workspace.assigned(task.name), mmap_mode="r", allow_pickle=False)
        wanted = assigned[task.number * rows_per_shard : (task.number + 1) * rows_per_shard].tolist()
        writer = FigureShardWriter(shard_path(self.workspace.folder, task.name, task.number))
        try:
            for unit, pairs in groupby(wanted, key=lambda pair: pair[0]):
                for row in self._rows(unit, [row for _, row in pairs]):
                    writer.write(row)
            writer.commit({"is_resumable": True})
        finally:
            writer.discard()
        return TaskReport(task, len(wanted), Tally(kept=len(wanted)))

    def set_aside(self, task: Task, reason: str) -> TaskReport:
        """Never: rows that were kept so far are not lost quietly."""
        raise RuntimeError(f"shard {task.number} of {task.name} could not be written: {reason}. Run the engine again.")

    def _rows(self, unit: int, numbers: list[int]) -> Iterator[FigureRow]:
        """The given rows of a unit, in order; row groups that hold none of them are not read."""
        annotations = pq.read_table(self.workspace.annotated(unit), columns=["row", "modality", "concepts"])
        by_row = {record["row"]: record for record in _select(annotations, numbers).to_pylist()}
        with pq.ParquetFile(self.workspace.collected(unit)) as file:
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                inside = [number for number in numbers if start <= number < end]
                if inside:
                    for number, record in _records(file, group, start, set(inside)):
                        annotation = by_row[number]
                        concepts = tuple(ConceptMention(**concept) for concept in annotation["concepts"])
                        yield replace(record_to_row(record), modality=annotation["modality"], concepts=concepts)
                start = end


def concept_extractor(settings: ConceptSettings) -> ExtractConcepts:
    """Captions to concepts, by the vocabulary that the settings name."""
    if not settings.vocabulary:
        return lambda captions: [()] * len(captions)
    from medclip_hf.data.concepts.extraction import ConceptExtractor  # spaCy takes seconds to import

    extractor = ConceptExtractor.from_vocabulary(
        settings.vocabulary,
        min_similarity=settings.min_similarity,
        semantic_types=settings.semantic_types,
        similar_spelling=settings.similar_spelling,
        pipeline=settings.pipeline,
        scispacy_index=settings.scispacy_index,
    )
    if not settings.entailment_model:
        return extractor.extract
    from medclip_hf.data.concepts.entailment import EntailmentFilter

    keep_central = EntailmentFilter(settings.entailment_model, min_probability=settings.min_entailment)
    return lambda captions: keep_central(captions, extractor.extract(captions))


def read_task_report(path: Path, task: Task) -> TaskReport:
    """What the task said that wrote this file."""
    stored = read_shard_metadata(path)
    return TaskReport(task, int(stored["num_items"]), Tally.from_dict(stored["tally"]))


def _records(file: pq.ParquetFile, group: int, start: int, wanted: set[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of the wanted rows of a row group, a few decoded at a time."""
    for batch in file.iter_batches(64, row_groups=[group]):
        places = [place for place in range(batch.num_rows) if start + place in wanted]
        if places:
            yield from zip([start + place for place in places], batch.take(places).to_pylist(), strict=True)
        start += batch.num_rows


def _select(table: pa.Table, numbers: list[int]) -> pa.Table:
    """The rows of a table whose `row` is among the numbers; both ascend."""
    return table.take(np.searchsorted(table["row"].to_numpy(), numbers))


def _tally(num_kept: int, drops: list[Drop]) -> Tally:
    tally = Tally(kept=num_kept)
    tally.dropped.update(drop.reason for drop in drops)
    return tally


def _name_of(item: dict[str, Any]) -> str:
    return next((str(item[key]) for key in ("pmcid", "row_id", "name", "number", "path") if item.get(key)), "")


def _image_text_model(settings: EngineSettings) -> Any:
    if not settings.model.path:
        return None
    from medclip_hf.data.engine.image_text_model import ImageTextModel  # torch and transformers take seconds to import

    return ImageTextModel(settings.model.path, settings.model.device, settings.model.batch_size)


def _evaluation_embeddings(workspace: Workspace) -> tuple[list[str], np.ndarray]:
    """Names and embeddings of the evaluation images, (0, 0) where there are none."""
    if not workspace.evaluation_items.is_complete:
        return [], np.zeros((0, 0), np.float32)
    units = range(len(workspace.evaluation_items.counts()))
    names = [name for unit in units for name in json.loads(workspace.evaluation(unit, ".json").read_text("utf-8"))]
    parts = [np.load(workspace.evaluation(unit, ".embeddings.npy"), allow_pickle=False) for unit in units]
    parts = [part for part in parts if len(part)]
    return names, np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
