"""A vocabulary of concepts, indexed for finding its names in captions; saved as arrays that processes share.

A vocabulary is a JSON lines file with one concept a line, as scispaCy's knowledge bases have it:
`{"concept_id": "C0032326", "canonical_name": "Pneumothorax", "aliases": ["collapsed lung"], "types": ["T047"]}`;
`definition` may be there and is not used.

Terms are compared by hashes of their words in normal form. The hashes of all names and of all their beginnings lie in
one sorted array, so a search stops at the first word with which no name goes on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medclip_hf.data.concepts.neighbours import NameNeighbours
from medclip_hf.data.concepts.string_table import StringTable, load_array
from medclip_hf.data.concepts.words import (
    MAX_WORDS,
    Hashes,
    agrees_in_case,
    extend_hashes,
    is_acronym,
    normal_form,
    split_words,
    word_hashes,
)

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3
MAX_NAME_CHARS = 200  # of a vocabulary name; longer ones are sentences


@dataclass(frozen=True)
class Concept:
    """An entry of a vocabulary.

    Args:
        concept_id: a UMLS CUI, or an identifier of another vocabulary.
        name: preferred name.
        aliases: other names.
        types: semantic types, as the vocabulary writes them.
    """

    concept_id: str
    name: str
    aliases: tuple[str, ...] = ()
    types: tuple[str, ...] = ()


def read_vocabulary(path: Path) -> Iterator[Concept]:
    """The concepts of a JSON lines file, one after another.

    Raises:
        ValueError: where a line is no concept, naming file and line.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield _parse_concept(json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f'{path}, line {number}: {error}. Expected {{"concept_id": "…", "canonical_name": "…", '
                    '"aliases": ["…"], "types": ["…"]} on every line.'
                ) from error


def _parse_concept(values: Any) -> Concept:
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__} is no concept")
    for key in ("concept_id", "canonical_name"):
        if not isinstance(values.get(key), str) or not values[key].strip():
            raise ValueError(f"{key!r} is {values.get(key)!r}, not a name")
    lists = {key: values.get(key) or [] for key in ("aliases", "types")}
    for key, items in lists.items():
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise ValueError(f"{key!r} is no list of strings")
    return Concept(values["concept_id"].strip(), values["canonical_name"].strip(), *map(tuple, lists.values()))


@dataclass
class ConceptIndex:
    """Which concepts have a name, and which names begin with some words.

    Attributes:
        ids, labels, types: of each concept; types are joined by ``|``.
        names: all names that can be found, the better one first where several concepts share it.
        concept_of: (num_names,) the concept of each name.
        acronyms: (num_names,) whether the name must be met in capitals.
        hashes: (num_terms,) ascending: of names and of the beginnings of names.
        goes_on: (num_terms,) whether some name has these words and more.
        first, count: (num_terms,) where in `by_term` the names with just these words are.
        by_term: name numbers.
        words: (num_words,) ascending, hashes of all words of names.
        neighbours: names of similar spelling.
    """

    ids: StringTable
    labels: StringTable
    types: StringTable
    names: StringTable
    concept_of: NDArray[np.int32]
    acronyms: NDArray[np.bool_]
    hashes: Hashes
    goes_on: NDArray[np.bool_]
    first: NDArray[np.int64]
    count: NDArray[np.int32]
    by_term: NDArray[np.int32]
    words: Hashes
    neighbours: NameNeighbours
    meta: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def build(cls, concepts: Iterable[Concept], meta: dict[str, Any] | None = None) -> ConceptIndex:
        """The index of a vocabulary, in memory.

        Of concepts that share a name, the one is preferred that has it as its preferred name, then the one with more
        names, then the smaller identifier.

        Raises:
            ValueError: where no name can be found in a text, or an identifier comes twice.
        """
        tables = _Tables()
        for concept in concepts:
            tables.add(concept)
        if not tables.names:
            raise ValueError("the vocabulary has no name that could be found in a caption")
        order = tables.order_of_preference()
        names = StringTable.of(tables.names[number] for number in order)
        normal_names = [tables.normal_names[number] for number in order]
        hashes, goes_on, first, count, by_term = _index_terms(normal_names)
        return cls(
            ids=StringTable.of(tables.ids),
            labels=StringTable.of(tables.labels),
            types=StringTable.of(tables.types),
            names=names,
            concept_of=np.array([tables.concept_of[number] for number in order], np.int32),
            acronyms=np.array([is_acronym(name) for name in names], np.bool_),
            hashes=hashes,
            goes_on=goes_on,
            first=first,
            count=count,
            by_term=by_term,
            words=np.unique(word_hashes([word for name in normal_names for word in name])),
            neighbours=NameNeighbours.build(normal_names),
            meta={"format": FORMAT_VERSION, "num_skipped_names": tables.num_skipped} | (meta or {}),
        )

    def save(self, folder: Path) -> None:
        """Write the index into a new folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _TABLES:
            getattr(self, name).save(folder, name)
        for name in _ARRAYS:
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)
        self.neighbours.save(folder)
        (folder / "meta.json").write_text(json.dumps(self.meta, indent=1), encoding="utf-8")  # last: now it is whole

    @classmethod
    def load(cls, folder: Path) -> ConceptIndex:
        """The index of a folder, memory-mapped: processes of a machine hold it once.

        Raises:
            ValueError: where the folder holds no index of this version.
        """
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            if meta["format"] != FORMAT_VERSION:
                raise ValueError(f"its format is {meta['format']}, expected {FORMAT_VERSION}")
            values: dict[str, Any] = {name: StringTable.load(folder, name) for name in _TABLES}
            values |= {name: load_array(folder, name) for name in _ARRAYS}
            return cls(**values, neighbours=NameNeighbours.load(folder), meta=meta)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} holds no concept index ({error}). Build it again from the vocabulary."
            ) from error

    def names_of(self, term_hash: int) -> list[int]:
        """Numbers of the names with the words of that hash, the preferred first."""
        place = int(np.searchsorted(self.hashes, np.uint64(term_hash)))
        if place == len(self.hashes) or self.hashes[place] != term_hash:
            return []
        start = int(self.first[place])
        return self.by_term[start : start + int(self.count[place])].tolist()

    def may_be_meant(self, name: int, mention: str) -> bool:
        """Whether an acronym is written in the mention as it must be; true for other names."""
        return not self.acronyms[name] or agrees_in_case(self.names[name], mention)

    def knows_words(self, words: Hashes) -> NDArray[np.bool_]:
        """Which words stand in some name.

        Args:
            words: (n,) hashes.
        """
        place = np.searchsorted(self.words, words)
        place[place == len(self.words)] = 0
        return np.asarray(self.words[place] == words)

    def find_terms(self, words: Hashes, joins: NDArray[np.bool_]) -> Iterator[tuple[int, int, int]]:
        """Every place where the words of a name stand, as (first word, number of words, place in `hashes`).

        Args:
            words: (n,) hashes of the words of many captions, one after another.
            joins: (n,) whether the following word may belong to the same term.
        """
        places = np.arange(len(words))
        terms = words
        for length in range(1, MAX_WORDS + 1):
            found = np.searchsorted(self.hashes, terms)
            found[found == len(self.hashes)] = 0
            is_known = self.hashes[found] == terms
            places, found, terms = places[is_known], found[is_known], terms[is_known]
            is_name = self.count[found] > 0
            yield from ((int(p), length, int(f)) for p, f in zip(places[is_name], found[is_name], strict=True))
            last = places + length - 1
            can_grow = self.goes_on[found] & joins[last]
            places, terms = places[can_grow], terms[can_grow]
            if not len(places):
                return
            terms = extend_hashes(terms, words[places + length])


_TABLES = ("ids", "labels", "types", "names")
_ARRAYS = ("concept_of", "acronyms", "hashes", "goes_on", "first", "count", "by_term", "words")


class _Tables:
    """Columns of concepts and names while a vocabulary is read."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.labels: list[str] = []
        self.types: list[str] = []
        self.names: list[str] = []
        self.normal_names: list[tuple[str, ...]] = []
        self.concept_of: list[int] = []
        self.is_label: list[bool] = []
        self.num_names_of: list[int] = []
        self.num_skipped = 0
        self._known: set[str] = set()

    def add(self, concept: Concept) -> None:
        if concept.concept_id in self._known:
            raise ValueError(f"the concept {concept.concept_id!r} comes twice; join its names in one line")
        self._known.add(concept.concept_id)
        number = len(self.ids)
        self.ids.append(concept.concept_id)
        self.labels.append(concept.name)
        self.types.append("|".join(concept.types))
        seen: set[tuple[str, ...]] = set()
        for name in dict.fromkeys((concept.name, *concept.aliases)):
            normal = normal_name(name)
            key = (*normal, name if is_acronym(name) else "")
            if not normal or key in seen:
                self.num_skipped += not normal
                continue
            seen.add(key)
            self.names.append(name)
            self.normal_names.append(normal)
            self.concept_of.append(number)
            self.is_label.append(name == concept.name)
        self.num_names_of.append(len(seen))

    def order_of_preference(self) -> list[int]:
        def key(name: int) -> tuple[Any, ...]:
            concept = self.concept_of[name]
            return not self.is_label[name], -self.num_names_of[concept], self.ids[concept], self.names[name]

        return sorted(range(len(self.names)), key=key)


def normal_name(name: str) -> tuple[str, ...]:
    """The words of a vocabulary name in normal form; () for a name that would be found everywhere or nowhere."""
    if len(name) > MAX_NAME_CHARS:
        return ()
    words = split_words(name)
    has_sense = any(len(word) > 1 and not word.isdigit() for word in words.normal)
    if not has_sense or (all(word in stop_words() for word in words.normal) and not is_acronym(name)):
        return ()
    return words.normal


@lru_cache(maxsize=1)
def stop_words() -> frozenset[str]:
    """Words that name no concept by themselves."""
    path = files("medclip_hf.data.concepts").joinpath("vocabulary", "stop_words.json")
    words = json.loads(path.read_text(encoding="utf-8"))["words"].split()
    return frozenset(words) | frozenset(map(normal_form, words))


def _index_terms(
    names: list[tuple[str, ...]],
) -> tuple[Hashes, NDArray[np.bool_], NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]:
    """(hashes, goes_on, first, count, by_term) of `ConceptIndex`."""
    lengths = np.array([len(words) for words in names], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    words = word_hashes([word for name in names for word in name])
    terms, owners, are_whole = [], [], []
    numbers = np.flatnonzero(lengths <= MAX_WORDS)
    current = words[starts[numbers]]
    for length in range(1, MAX_WORDS + 1):
        terms.append(current)
        owners.append(numbers)
        are_whole.append(lengths[numbers] == length)
        is_longer = lengths[numbers] > length
        numbers, current = numbers[is_longer], current[is_longer]
        current = extend_hashes(current, words[starts[numbers] + length])
    all_terms, all_owners, whole = map(np.concatenate, (terms, owners, are_whole))
    hashes, place = np.unique(all_terms, return_inverse=True)
    goes_on = np.zeros(len(hashes), np.bool_)
    goes_on[place[~whole]] = True
    order = np.lexsort((all_owners[whole], place[whole]))  # names are numbered by preference
    count = np.bincount(place[whole], minlength=len(hashes))
    first = np.concatenate([[0], np.cumsum(count)])[:-1]
    return hashes, goes_on, first.astype(np.int64), count.astype(np.int32), all_owners[whole][order].astype(np.int32)
