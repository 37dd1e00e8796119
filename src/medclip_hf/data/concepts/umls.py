"""UMLS as its licensees download it (MRCONSO.RRF, MRSTY.RRF), turned into a vocabulary file.

    write_umls_vocabulary(Path("2025AB/META"), Path("umls.jsonl"))

Both files are read once, side by side; memory does not grow with them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

from medclip_hf.data.concepts.index import Concept

# Columns as the UMLS Reference Manual numbers them, from 0.
_CUI, _LANGUAGE, _TERM_STATUS, _STRING_TYPE, _IS_PREFERRED, _SOURCE, _STRING, _SUPPRESS = 0, 1, 2, 4, 6, 11, 14, 16
_NUM_COLUMNS = {"MRCONSO.RRF": 18, "MRSTY.RRF": 6}


def write_umls_vocabulary(folder: Path, output: Path, *, language: str = "ENG", sources: Collection[str] = ()) -> int:
    """How many concepts were written, one a line, in the format of `data.concepts.index.read_vocabulary`.

    Args:
        folder: ``META`` of a UMLS release, with MRCONSO.RRF and MRSTY.RRF.
        output: the JSON lines file.
        language: of the names, as UMLS abbreviates it.
        sources: keep names of these vocabularies alone (``SNOMEDCT_US``, ``MSH``); empty keeps all.

    Raises:
        ValueError: where a file is missing, not in UMLS's format or order, or no name is left.
    """
    temporary = output.with_name(f".{output.name}.tmp")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for concept in read_umls(folder, language, sources):
                line = {
                    "concept_id": concept.concept_id,
                    "canonical_name": concept.name,
                    "aliases": list(concept.aliases),
                    "types": list(concept.types),
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            chosen = sorted(sources) or "of UMLS"
            raise ValueError(f"{folder} has no name of language {language!r} in the sources {chosen}")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read_umls(folder: Path, language: str = "ENG", sources: Collection[str] = ()) -> Iterator[Concept]:
    """The concepts of a release with their names and semantic types (TUI), suppressed names left out."""
    types = _grouped(folder / "MRSTY.RRF")
    type_cui, type_rows = next(types, ("", []))
    for cui, rows in _grouped(folder / "MRCONSO.RRF"):
        while type_cui and type_cui < cui:
            type_cui, type_rows = next(types, ("", []))
        wanted = [
            row
            for row in rows
            if row[_LANGUAGE] == language
            and row[_SUPPRESS] not in ("O", "E", "Y")
            and (not sources or row[_SOURCE] in sources)
        ]
        if wanted:
            wanted.sort(
                key=lambda row: (row[_TERM_STATUS] != "P", row[_STRING_TYPE] != "PF", row[_IS_PREFERRED] != "Y")
            )
            name, *aliases = dict.fromkeys(row[_STRING] for row in wanted)
            yield Concept(cui, name, tuple(aliases), tuple(row[1] for row in type_rows) if type_cui == cui else ())


def _grouped(path: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """(CUI, its rows) of a file that is sorted by CUI."""
    last = ""
    for cui, rows in groupby(_rows(path), key=itemgetter(_CUI)):
        if cui <= last:
            raise ValueError(
                f"{path} is not sorted by concept: {cui} follows {last}. Sort it, or take the file as released."
            )
        last = cui
        yield cui, list(rows)


def _rows(path: Path) -> Iterator[list[str]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                row = line.rstrip("\n").split("|")
                if len(row) != _NUM_COLUMNS[path.name] + 1:  # every column ends with a bar
                    raise ValueError(
                        f"{path}, line {number}: {len(row) - 1} columns, expected {_NUM_COLUMNS[path.name]}. "
                        "Is it a file of UMLS in the rich release format?"
                    )
                yield row
    except OSError as error:
        raise ValueError(
            f"cannot read {path}: {error.strerror or error}. Name the META folder of a release."
        ) from error
