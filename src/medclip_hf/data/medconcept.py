"""The published MedConcept JSON lines (figure, caption, UMLS concepts) to Parquet shards of figure rows.

One line is one figure: `caption`, `image` (a path below the image folder) and `umls_meta_info`, a list of concepts,
each with `umls_cui`, `umls_similarity`, `tokens` and `start_char`, `end_char` that count characters of a decoded
caption (`data.offsets`), or, in the release's training files, just such a pair. Every line is either a row or a counted
drop.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from medclip_hf.data.images import UnreadableImage, decode_image, open_image, path_inside, read_file
from medclip_hf.data.offsets import DecodedCaption
from medclip_hf.data.parquet import (
    FigureShardWriter,
    import_lock,
    manifest_path,
    read_shard_metadata,
    require_writable,
    shard_path,
    write_manifest,
)
from medclip_hf.data.records import ConceptMention, FigureRow
from medclip_hf.data.stages import Drop, Tally, map_in_order, run_stages

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 4 * 2**20  # published lines have some 2 kB
SIMILARITY_SLACK = 1e-3  # cosines of float32 vectors exceed 1 by rounding


@dataclass(frozen=True)
class ImportPlan:
    """What an import is asked to do; a run can only go on from shards that the same plan wrote.

    Args:
        source: the JSON lines file.
        image_folder: where the `image` of every line is looked up.
        output: folder of the shards.
        split: ``train``, ``validation`` or ``test``.
        rows_per_shard: rows kept in each shard but the last.
        embed_images: put the files' bytes into the shards; otherwise the rows keep paths relative to `output`, below
            which the images must lie then.
    """

    source: Path
    image_folder: Path
    output: Path
    split: str = "train"
    rows_per_shard: int = 10_000
    embed_images: bool = True

    def identity(self) -> dict[str, Any]:
        """What must agree between a run and the shards that it finds: the settings and the content of the source."""
        with self.source.open("rb") as file:
            beginning = hashlib.blake2b(file.read(2**20), digest_size=16).hexdigest()
        return {
            "source": self.source.name,
            "source_bytes": self.source.stat().st_size,
            "source_beginning": beginning,
            "rows_per_shard": self.rows_per_shard,
            "embed_images": self.embed_images,
        }


@dataclass
class ImportState:
    """How far an import has come: everything before `end_byte` of the source is in finished shards."""

    end_byte: int = 0
    num_lines: int = 0
    num_shards: int = 0
    rows: Tally = field(default_factory=Tally)
    concepts: Tally = field(default_factory=Tally)
    is_complete: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"rows": self.rows.as_dict(), "concepts": self.concepts.as_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ImportState:
        """The state that `as_dict` wrote."""
        tallies = {name: Tally.from_dict(values[name]) for name in ("rows", "concepts")}
        return cls(**(values | tallies))


@dataclass(frozen=True)
class SourceLine:
    """A line of the source: its number from 1, where it ends, and its bytes (None: too long to be a row)."""

    number: int
    end_byte: int
    content: bytes | None


@dataclass(frozen=True)
class ParsedLine:
    """What became of a line: a row or a drop, and the concepts that were set aside in a row."""

    number: int
    end_byte: int
    row: FigureRow | Drop
    concept_drops: tuple[Drop, ...] = ()


def import_medconcept(
    plan: ImportPlan, num_workers: int = 0, on_progress: Callable[[ImportState], None] = lambda state: None
) -> ImportState:
    """The final counts of an import that streams the source into shards; started again, it goes on after the last one.

    The output does not depend on interruptions or on `num_workers`. Dropped rows and concepts lie in
    `<split>.dropped.jsonl`, each with its reason; the manifest, written last, repeats the counts.

    Args:
        plan: what to do.
        num_workers: processes that parse lines and check images; 0 does it in this one.
        on_progress: called after every line.

    Raises:
        ValueError: where the source is missing, the output cannot be written, or it holds shards of another plan.
    """
    _check_plan(plan)
    require_writable(plan.output)
    with import_lock(plan.output, plan.split):
        state = load_state(plan)
        if state.is_complete:
            logger.info("%s is complete already", manifest_path(plan.output, plan.split))
        else:
            if state.num_shards:
                logger.info("going on after %d finished shards (line %d)", state.num_shards, state.num_lines)
            for part in _drop_parts(plan)[state.num_shards :]:  # of the shard that was not finished
                part.unlink()
            _run(plan, state, num_workers, on_progress)
        for part in _drop_parts(plan):
            part.unlink()
    return state


def load_state(plan: ImportPlan) -> ImportState:
    """How far earlier runs of this plan have come.

    Raises:
        ValueError: where the output holds shards that are none of this plan's.
    """
    shards = sorted(plan.output.glob(f"{plan.split}-*.parquet"))
    if not shards:
        return ImportState()
    stored = read_shard_metadata(shards[-1])
    expected = [shard_path(plan.output, plan.split, number) for number in range(len(shards))]
    if stored.get("plan") != plan.identity() or shards != expected:
        raise ValueError(
            f"{plan.output} holds shards of the split {plan.split!r} that were made from another source or with other "
            "settings. Name another output folder, or remove them to start anew."
        )
    manifest = manifest_path(plan.output, plan.split)
    if manifest.exists():
        return ImportState.from_dict(json.loads(manifest.read_text(encoding="utf-8"))["state"])
    return ImportState.from_dict(stored["state"])


def iter_lines(path: Path, start_byte: int = 0, num_lines_before: int = 0) -> Iterator[SourceLine]:
    """The lines of a file from a byte on, none of them held in memory beyond `MAX_LINE_BYTES`."""
    with path.open("rb") as file:
        file.seek(start_byte)
        number = num_lines_before
        while content := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            is_too_long = len(content) > MAX_LINE_BYTES
            while is_too_long and content and not content.endswith(b"\n"):
                content = file.readline(MAX_LINE_BYTES)
            if number == 1:
                content = content.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
            yield SourceLine(number, file.tell(), None if is_too_long else content)


def parse_line(line: SourceLine, plan: ImportPlan) -> ParsedLine:
    """The row of a line, its concepts on the raw caption and its image checked, or the reason why there is none."""
    row_id = f"{plan.source.stem}:{line.number}"
    concept_drops: list[Drop] = []
    row = run_stages(
        line,
        [
            _parse_json,
            _check_fields,
            partial(_build_row, row_id=row_id, concept_drops=concept_drops),
            partial(_attach_image, plan=plan),
        ],
    )
    if isinstance(row, Drop):
        return ParsedLine(line.number, line.end_byte, replace(row, row_id=row_id))
    return ParsedLine(line.number, line.end_byte, row, tuple(concept_drops))


# --- stages -----------------------------------------------------------------------------------------------------------


def _parse_json(line: SourceLine) -> Any:
    if line.content is None:
        return Drop("line too long", f"more than {MAX_LINE_BYTES:,} bytes")
    try:
        text = line.content.decode("utf-8")
    except UnicodeDecodeError as error:
        return Drop("line not UTF-8", f"byte {error.start} of the line: {error.reason}")
    if not text.strip():
        return Drop("line empty")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Drop("line not JSON", str(error)[:200])


def _check_fields(record: Any) -> dict[str, Any] | Drop:
    if not isinstance(record, dict):
        return Drop("line not a JSON object", f"it is a {type(record).__name__}")
    for key, kind in (("caption", str), ("image", str), ("umls_meta_info", list)):
        if key not in record:
            return Drop("key missing", key)
        if not isinstance(record[key], kind) and not (key == "umls_meta_info" and record[key] is None):
            return Drop("value of the wrong type", f"{key} is {type(record[key]).__name__}, expected {kind.__name__}")
    if not record["caption"].strip():
        return Drop("caption empty")
    if _has_lone_surrogate(record["caption"]) or _has_lone_surrogate(record["image"]):
        return Drop("text not valid Unicode", "a surrogate without its partner")
    return record


def _build_row(record: dict[str, Any], row_id: str, concept_drops: list[Drop]) -> FigureRow:
    caption = record["caption"]
    decoded = DecodedCaption(caption)
    concepts: list[ConceptMention] = []
    for entry in record["umls_meta_info"] or ():
        concept = _repair_concept(entry, decoded)
        if isinstance(concept, Drop):
            concept_drops.append(replace(concept, row_id=row_id))
        else:
            concepts.append(concept)
    pmc = _identifier(record.get("pmc")).upper().removeprefix("PMC")
    return FigureRow(
        row_id=row_id,
        caption=caption,
        concepts=tuple(sorted(concepts, key=lambda concept: (concept.start_char, concept.end_char))),
        image_path=record["image"],
        pmcid=f"PMC{pmc}" if pmc else "",
        pmid=_identifier(record.get("pmid")),
        figure_id=_identifier(record.get("fig_id")),
    )


def _attach_image(row: FigureRow, plan: ImportPlan) -> FigureRow | Drop:
    """The row with its image's bytes, or with its path from the output folder on; the image is decoded to prove it."""
    assert row.image_path is not None
    try:
        path = path_inside(plan.image_folder, row.image_path)
        content = read_file(path)
        decode_image(open_image(content, row.image_path), row.image_path)
    except UnreadableImage as error:
        return Drop(error.reason, error.detail)
    if plan.embed_images:
        return replace(row, image_path=None, image_bytes=content)
    below_output = plan.image_folder.resolve().relative_to(plan.output.resolve()) / row.image_path
    return replace(row, image_path=below_output.as_posix())


# --- concepts ---------------------------------------------------------------------------------------------------------


def _repair_concept(entry: Any, decoded: DecodedCaption) -> ConceptMention | Drop:
    """The concept at its place in the raw caption. Published rows have no names: the words of the caption serve."""
    fields = _concept_fields(entry)
    if isinstance(fields, Drop):
        return fields
    cui, similarity, start, end, tokens = fields
    span = decoded.raw_span(start, end, tokens)
    if isinstance(span, Drop):
        return replace(span, detail=f"{cui} at {span.detail}")
    return ConceptMention(cui, decoded.caption[span[0] : span[1]], span[0], span[1], similarity)


def _concept_fields(entry: Any) -> tuple[str, float, int, int, list[str] | None] | Drop:
    """(cui, similarity, start, end, tokens) of either published form, their types checked."""
    if isinstance(entry, list) and len(entry) == 2:
        entry = {"umls_cui": "", "umls_similarity": 1.0, "start_char": entry[0], "end_char": entry[1]}
    if not isinstance(entry, dict):
        return Drop("concept malformed", f"{type(entry).__name__}, expected an object or a pair of offsets")
    cui, similarity, tokens = entry.get("umls_cui"), entry.get("umls_similarity", 1.0), entry.get("tokens")
    start, end = entry.get("start_char"), entry.get("end_char")
    if not isinstance(cui, str) or _has_lone_surrogate(cui):
        return Drop("concept malformed", "umls_cui is no text")
    if not isinstance(start, int) or not isinstance(end, int) or bool in (type(start), type(end)):
        return Drop("concept malformed", f"{cui}: start_char and end_char must be integers")
    if isinstance(similarity, bool) or not isinstance(similarity, int | float):
        return Drop("concept malformed", f"{cui}: umls_similarity is no number")
    if not -SIMILARITY_SLACK <= similarity <= 1 + SIMILARITY_SLACK:  # NaN is refused here as well
        return Drop("concept malformed", f"{cui}: umls_similarity {similarity} is outside [0, 1]")
    if tokens is not None and not (isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)):
        return Drop("concept malformed", f"{cui}: tokens is no list of texts")
    return cui, min(max(float(similarity), 0.0), 1.0), start, end, tokens


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _identifier(value: Any) -> str:
    text = str(value) if _is_integer(value) or isinstance(value, str) else ""
    return "" if _has_lone_surrogate(text) else text


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text) if not text.isascii() else False


# --- the run ----------------------------------------------------------------------------------------------------------


def _check_plan(plan: ImportPlan) -> None:
    if not plan.source.is_file():
        raise ValueError(f"no file {plan.source}: name the JSON lines file of the published rows")
    if not plan.image_folder.is_dir():
        raise ValueError(f"no folder {plan.image_folder}: name the folder that the rows' image paths start from")
    if plan.rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {plan.rows_per_shard}")
    if not plan.embed_images and not plan.image_folder.resolve().is_relative_to(plan.output.resolve()):
        raise ValueError(
            f"rows that keep image paths need the images below the output folder, but {plan.image_folder} is not below "
            f"{plan.output}. Choose the output folder so, or embed the images."
        )


def _run(plan: ImportPlan, state: ImportState, num_workers: int, on_progress: Callable[[ImportState], None]) -> None:
    """Bring `state` from where it is to the end of the source."""
    lines = iter_lines(plan.source, state.end_byte, state.num_lines)
    parsed_lines = map_in_order(partial(parse_line, plan=plan), lines, num_workers)
    identity = plan.identity()
    has_more = True
    while has_more:
        has_more = _write_segment(plan, state, parsed_lines, identity, on_progress)
    _join_drops(plan)
    state.is_complete = True
    shards = [shard_path(plan.output, plan.split, number) for number in range(state.num_shards)]
    write_manifest(plan.output, plan.split, shards, plan=identity, state=state.as_dict())


def _write_segment(
    plan: ImportPlan,
    state: ImportState,
    parsed_lines: Iterator[ParsedLine],
    identity: dict[str, Any],
    on_progress: Callable[[ImportState], None],
) -> bool:
    """Write the next shard and the drops among its lines; whether it was filled, so that more lines may follow."""
    number = state.num_shards
    writer = FigureShardWriter(shard_path(plan.output, plan.split, number))
    part = plan.output / f".{plan.split}-{number:05d}.dropped.jsonl"
    try:
        with part.open("w", encoding="utf-8") as drops:
            for parsed in parsed_lines:
                _count(parsed, state, writer, drops)
                on_progress(state)
                if writer.num_rows == plan.rows_per_shard:
                    break
            drops.flush()
            os.fsync(drops.fileno())  # before the shard that makes these lines past
        if writer.num_rows:
            state.num_shards += 1
            writer.commit({"is_resumable": True, "plan": identity, "state": state.as_dict()})
    finally:
        writer.discard()
    return writer.num_rows == plan.rows_per_shard


def _count(parsed: ParsedLine, state: ImportState, writer: FigureShardWriter, drops: Any) -> None:
    state.end_byte, state.num_lines = parsed.end_byte, parsed.number
    if isinstance(parsed.row, Drop):
        state.rows.dropped[parsed.row.reason] += 1
        drops.write(_drop_line("row", parsed.row))
        return
    writer.write(parsed.row)
    state.rows.kept += 1
    state.concepts.kept += len(parsed.row.concepts)
    for drop in parsed.concept_drops:
        state.concepts.dropped[drop.reason] += 1
        drops.write(_drop_line("concept", drop))


def _drop_line(what: str, drop: Drop) -> str:
    return json.dumps({"row_id": drop.row_id, "dropped": what, "reason": drop.reason, "detail": drop.detail}) + "\n"


def _drop_parts(plan: ImportPlan) -> list[Path]:
    return sorted(plan.output.glob(f".{plan.split}-*.dropped.jsonl"))


def _join_drops(plan: ImportPlan) -> None:
    """The drops of all segments in one file, put in place whole."""
    target = plan.output / f"{plan.split}.dropped.jsonl"
    temporary = target.with_name(f".{target.name}.tmp")
    with temporary.open("wb") as joined:
        for part in _drop_parts(plan):
            with part.open("rb") as file:
                while block := file.read(2**20):
                    joined.write(block)
    temporary.replace(target)
