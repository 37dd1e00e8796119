"""Concepts of captions: mentions found, expanded, linked to a vocabulary and judged as affirmed, doubted or denied.

    extractor = ConceptExtractor.from_vocabulary("shipped")
    extractor.extract(["CT of the chest: no pneumothorax."])

Mentions are the names of the vocabulary itself, words spelled nearly like them, and, where a spaCy pipeline such as
`en_core_sci_sm` is named, its entities. Abbreviations that a caption explains ("pneumothorax (PTX)") stand for their
long form throughout it. Where mentions overlap, exact ones go before similar ones and longer ones before shorter.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from medclip_hf.data.concepts.index import FORMAT_VERSION, ConceptIndex, read_vocabulary, stop_words
from medclip_hf.data.concepts.negation import Certainty, shipped_rules
from medclip_hf.data.concepts.neighbours import LOWEST_SIMILARITY, NameNeighbours
from medclip_hf.data.concepts.scispacy_pipeline import ScispacyNeighbours
from medclip_hf.data.concepts.words import Words, split_words, term_hash, word_hashes
from medclip_hf.data.records import ConceptMention

logger = logging.getLogger(__name__)

SHIPPED = ("shipped", "phantoms")  # vocabularies in the package
MAX_CAPTION_CHARS = 100_000  # what lies behind is not read; no real caption is that long
MAX_SIMILAR_WORDS = 4  # of a mention that is compared by spelling
MIN_SIMILAR_CHARS = 6
# A parenthesis that may hold an abbreviation, or the words of one that stands before it, with the words around it. All
# counts are bounded, so that the time grows with the length of the caption alone.
_MAY_EXPLAIN = re.compile(
    r"(?:[^\s()]{1,60}\s{1,3}){1,12}\((?:[A-Za-z][^\s()]{0,15}[A-Z][^\s()]{0,15}|[A-Z][^\s()]{1,15}|[^()]{12,80})\)"
)
_EXPLAINED_BEHIND = re.compile(r"(?<![\w-])([A-Z][\w-]{0,8}[A-Z]s?)\s?\(([^\s()][^()]{4,80})\)")
# Read by spaCy instead: it refuses halves of surrogate pairs, and scispaCy knows round brackets only.
_FOR_SPACY = {ord("["): "(", ord("]"): ")"} | dict.fromkeys(range(0xD800, 0xE000), "?")
_OPPOSITES = (  # prefixes that make words of similar spelling opposites
    *(("hyper", "hypo"), ("intra", "inter"), ("intra", "extra"), ("inter", "extra"), ("macro", "micro")),
    *(("pre", "post"), ("supra", "infra"), ("anti", "pro"), ("mono", "poly"), ("tachy", "brady"), ("endo", "exo")),
    *(("ab", "ad"), ("sub", "supra"), ("uni", "bi"), ("iso", "an"), ("hyper", "an"), ("hypo", "an"), ("ecto", "endo")),
)


@dataclass(frozen=True)
class ExtractorOptions:
    """How concepts are found.

    Args:
        min_similarity: of a mention and the name that it is linked to, at least 0.7. Names that differ only in case,
            hyphens, plural or British spelling count as 1.
        semantic_types: concepts of other types are left out; empty keeps all.
        similar_spelling: link also words of the caption that are spelled nearly like a name.
        abbreviations: read the abbreviations that a caption explains (scispaCy's detector).
        pipeline: a spaCy pipeline with entities whose entities are mentions too; "" takes the vocabulary alone.
        scispacy_index: folder with scispaCy's approximate index of the same vocabulary, asked for names of similar
            spelling in place of our exact search; see `data.concepts.scispacy_pipeline`.
    """

    min_similarity: float = 0.8
    semantic_types: tuple[str, ...] = ()
    similar_spelling: bool = True
    abbreviations: bool = True
    pipeline: str = ""
    scispacy_index: str = ""

    def __post_init__(self) -> None:
        if not LOWEST_SIMILARITY <= self.min_similarity <= 1:
            raise ValueError(f"min_similarity must lie in {LOWEST_SIMILARITY} to 1, got {self.min_similarity}")


@dataclass(frozen=True)
class _Link:
    """A mention that may become a concept: words [first, last] of a caption, and a name of the vocabulary."""

    first: int
    last: int
    name: int
    similarity: float
    is_given: bool = False  # by an explanation in the caption: goes before everything else

    def priority(self) -> tuple[Any, ...]:
        return not self.is_given, self.similarity < 1, self.first - self.last, -self.similarity, self.first


class ConceptExtractor:
    """Finds the concepts of captions.

    Pickled, it is a path and options where its index lies in a folder: another process maps the same files.

    Args:
        index: the vocabulary.
        options: how concepts are found.
        folder: where the index is saved, if it is.
        shipped: name of the package's vocabulary that it is, if it is one.

    Raises:
        ValueError: where the named spaCy pipeline is not installed, or the vocabulary has none of the semantic types.
    """

    def __init__(
        self,
        index: ConceptIndex,
        options: ExtractorOptions | None = None,
        folder: Path | None = None,
        shipped: str = "",
    ) -> None:
        self.index = index
        self.options = options or ExtractorOptions()
        self._folder = folder
        self._shipped = shipped
        self._rules = shipped_rules()
        self._is_wanted = _wanted_concepts(index, self.options.semantic_types)
        self._nlp = _load_pipeline(self.options)
        self._neighbours: NameNeighbours | ScispacyNeighbours = index.neighbours
        if self.options.scispacy_index:
            self._neighbours = ScispacyNeighbours(index, Path(self.options.scispacy_index))

    @classmethod
    def from_vocabulary(
        cls, vocabulary: str | Path = "shipped", *, index_folder: str | Path | None = None, **options: Any
    ) -> ConceptExtractor:
        """An extractor for a vocabulary.

        Args:
            vocabulary: ``"shipped"`` (medical concepts) or ``"phantoms"`` (findings of the drawn figures), a JSON lines
                file, or the folder of a saved index.
            index_folder: where the index of a JSON lines file is kept; by default beside it, as ``<name>.index``. It is
                built once and found again by other processes, until the file changes.
            options: as in `ExtractorOptions`.

        Raises:
            ValueError: where there is no such vocabulary, or it cannot be read.
        """
        chosen = ExtractorOptions(**options)
        if vocabulary in SHIPPED:
            resource = files("medclip_hf.data.concepts").joinpath("vocabulary", f"{vocabulary}.jsonl")
            with as_file(resource) as path:
                return cls(ConceptIndex.build(read_vocabulary(path)), chosen, shipped=str(vocabulary))
        path = Path(vocabulary)
        if path.is_dir():
            return cls(ConceptIndex.load(path), chosen, folder=path)
        if not path.is_file():
            raise ValueError(
                f"there is no vocabulary {vocabulary}. Name {' or '.join(map(repr, SHIPPED))}, a JSON lines file, or "
                "the folder of an index."
            )
        folder = Path(index_folder) if index_folder else path.with_name(f"{path.name}.index")
        folder = _current_index(path, folder)
        return cls(ConceptIndex.load(folder), chosen, folder=folder)

    def extract(self, captions: Sequence[str]) -> list[tuple[ConceptMention, ...]]:
        """The concepts of each caption in the order of its text, not overlapping; denied and doubted ones are marked.

        The result of a caption does not depend on the others.

        Args:
            captions: raw texts of any content; characters behind `MAX_CAPTION_CHARS` are not read.
        """
        captions = [caption[:MAX_CAPTION_CHARS] for caption in captions]
        words = [split_words(caption) for caption in captions]
        links = self._exact_links(words)
        with self._nlp.memory_zone():  # the strings of these captions are forgotten afterwards
            entities, definitions = self._read_with_spacy(captions, words)
        self._apply_definitions(words, links, definitions)
        if self.options.similar_spelling or self.options.pipeline:
            self._add_similar(words, links, entities)
        return [
            self._mentions(caption, split, _resolve_overlaps(found))
            for caption, split, found in zip(captions, words, links, strict=True)
        ]

    # --- the vocabulary's own names -------------------------------------------------------------------------------

    def _exact_links(self, words: Sequence[Words]) -> list[list[_Link]]:
        """For each caption, every place where a name stands."""
        links: list[list[_Link]] = [[] for _ in words]
        starts = np.cumsum([0, *map(len, words)])
        hashes = word_hashes([word for split in words for word in split.normal])
        joins = np.array([join for split in words if len(split) for join in (*split.joins, False)], np.bool_)
        found = list(self.index.find_terms(hashes, joins))
        owners = np.searchsorted(starts, [first for first, _, _ in found], side="right") - 1
        for (first, length, place), owner in zip(found, owners.tolist(), strict=True):
            first -= int(starts[owner])
            name = self._best_name(self._names_at(place), words[owner], first, length)
            if name is not None:
                links[owner].append(_Link(first, first + length - 1, name, 1.0))
        return links

    def _names_at(self, place: int) -> list[int]:
        start = int(self.index.first[place])
        return self.index.by_term[start : start + int(self.index.count[place])].tolist()

    def _best_name(self, names: Sequence[int], words: Words, first: int, length: int) -> int | None:
        """The preferred name that the words can mean, checked word by word; None where there is none."""
        normal = words.normal[first : first + length]
        mention = words.texts[first] if length == 1 else ""
        for name in names:
            if (
                self._is_wanted[self.index.concept_of[name]]
                and self.index.may_be_meant(name, mention)
                and split_words(self.index.names[name]).normal == normal
            ):
                return name
        return None

    # --- what spaCy reads -----------------------------------------------------------------------------------------

    def _read_with_spacy(
        self, captions: Sequence[str], words: Sequence[Words]
    ) -> tuple[list[list[tuple[int, int]]], list[list[tuple[str, str]]]]:
        """For each caption, (entities as [first, last] word, abbreviations as (short, long) texts)."""
        entities: list[list[tuple[int, int]]] = [[] for _ in captions]
        definitions: list[list[tuple[str, str]]] = [[] for _ in captions]
        detector = _abbreviation_detector(self._nlp) if self.options.abbreviations else None
        for number, caption in enumerate(captions):
            text = caption.translate(_FOR_SPACY)
            if self.options.pipeline:
                entities[number] = _entity_words(self._nlp(text), words[number])
            if detector is not None and "(" in text:
                # The detector's time grows with the square of the parentheses of a text: it reads one at a time.
                windows = [self._nlp.make_doc(found.group()) for found in _MAY_EXPLAIN.finditer(text)]
                pairs = [pair for doc in windows for pair in _definitions(detector, doc)]
                definitions[number] = list(dict.fromkeys(pairs + _explained_behind(self._nlp, text)))
        return entities, definitions

    def _apply_definitions(
        self,
        words: Sequence[Words],
        links: list[list[_Link]],
        definitions: Sequence[list[tuple[str, str]]],
    ) -> None:
        """Link explained abbreviations as their long forms; one whose long form is unknown means nothing we know."""
        terms = list(dict.fromkeys(split_words(long) for pairs in definitions for _, long in pairs))
        linked = dict(zip(terms, self._link_terms(terms), strict=True))
        for number, pairs in enumerate(definitions):
            for short, long in pairs:
                name, similarity = linked[split_words(long)]
                places = [place for place, word in enumerate(words[number].texts) if word in (short, f"{short}s")]
                links[number] = [
                    link for link in links[number] if not (link.first == link.last and link.first in places)
                ]
                if name is not None:
                    links[number] += [_Link(place, place, name, similarity, is_given=True) for place in places]

    def _link_terms(self, terms: Sequence[Words]) -> list[tuple[int | None, float]]:
        """(name, similarity) of whole terms, by their words or by their spelling; (None, 0) where nothing is near."""
        near = self._neighbours.nearest([term.normal for term in terms], self.options.min_similarity, True)
        linked = []
        for term, names in zip(terms, near, strict=True):
            exact = self._best_name(self.index.names_of(term_hash(term.normal)), term, 0, len(term))
            linked.append((exact, 1.0) if exact is not None else self._nearest_wanted(term.normal, names))
        return linked

    # --- similar spelling -----------------------------------------------------------------------------------------

    def _add_similar(
        self, words: Sequence[Words], links: list[list[_Link]], entities: Sequence[list[tuple[int, int]]]
    ) -> None:
        """Link words that no exact link covers to names of similar spelling."""
        asked: dict[tuple[tuple[str, ...], bool], list[tuple[int, int, int]]] = {}
        for number, split in enumerate(words):
            covered = {place for link in links[number] for place in range(link.first, link.last + 1)}
            known = {(link.first, link.last) for link in links[number]}
            for first, last in entities[number]:
                if (first, last) not in known:
                    asked.setdefault((split.normal[first : last + 1], False), []).append((number, first, last))
            if self.options.similar_spelling:
                is_known = self.index.knows_words(word_hashes(split.normal)).tolist()
                for first, last in _free_terms(split, covered, is_known):
                    asked.setdefault((split.normal[first : last + 1], True), []).append((number, first, last))
        for same_shape in (True, False):
            terms = [term for term, is_same in asked if is_same == same_shape]
            near = self._neighbours.nearest(terms, self.options.min_similarity, same_shape)
            for term, names in zip(terms, near, strict=True):
                name, similarity = self._nearest_wanted(term, names)
                if name is not None:
                    for number, first, last in asked[term, same_shape]:
                        links[number].append(_Link(first, last, name, similarity))

    def _nearest_wanted(self, term: tuple[str, ...], near: Sequence[tuple[int, float]]) -> tuple[int | None, float]:
        for name, similarity in near:
            if (
                self._is_wanted[self.index.concept_of[name]]
                and not self.index.acronyms[name]
                and not are_opposites(term, split_words(self.index.names[name]).normal)
            ):
                return name, min(similarity, 1.0)
        return None, 0.0

    # --- the result -----------------------------------------------------------------------------------------------

    def _mentions(self, caption: str, words: Words, links: Sequence[_Link]) -> tuple[ConceptMention, ...]:
        judged = self._rules.judge(caption, words, [(link.first, link.last) for link in links])
        found = []
        for link, certainty in zip(links, judged, strict=True):
            concept = int(self.index.concept_of[link.name])
            mention = ConceptMention(
                cui=self.index.ids[concept],
                name=self.index.labels[concept],
                start_char=words.spans[link.first][0],
                end_char=words.spans[link.last][1],
                similarity=round(link.similarity, 4),
                semantic_type=self.index.types[concept].split("|")[0],
                is_negated=certainty is Certainty.NEGATED,
                is_uncertain=certainty is Certainty.UNCERTAIN,
            )
            found.append(mention)
        return tuple(found)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._folder is not None:
            return _reload, (str(self._folder), asdict(self.options))
        if self._shipped:
            return _reload, (self._shipped, asdict(self.options))
        return ConceptExtractor, (self.index, self.options)


def are_opposites(words: Sequence[str], others: Sequence[str]) -> bool:
    """Whether terms of similar spelling mean opposites: "hyperechoic" and "hypoechoic"."""
    for word, other in zip(words, others, strict=False):
        for one, two in _OPPOSITES:
            for a, b in ((one, two), (two, one)):
                if word.startswith(a) and other.startswith(b) and word[len(a) :] == other[len(b) :]:
                    return True
    return False


def _reload(vocabulary: str, options: dict[str, Any]) -> ConceptExtractor:
    return ConceptExtractor.from_vocabulary(vocabulary, **options)


def _wanted_concepts(index: ConceptIndex, semantic_types: Sequence[str]) -> np.ndarray:
    """(num_concepts,) which concepts have one of the types; all of them where none is named."""
    if not semantic_types:
        return np.ones(len(index.ids), np.bool_)
    asked = set(semantic_types)
    wanted = np.fromiter((not asked.isdisjoint(types.split("|")) for types in index.types), np.bool_, len(index.ids))
    if not wanted.any():
        have = sorted({kind for types in index.types for kind in types.split("|")})[:20]
        raise ValueError(f"no concept has one of the semantic types {sorted(asked)}; the vocabulary has {have}")
    return wanted


def _current_index(vocabulary: Path, folder: Path) -> Path:
    """Where in a folder the index of a vocabulary file lies, built anew where the file has changed."""
    status = vocabulary.stat()
    source = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "format": FORMAT_VERSION}
    version = hashlib.blake2b(repr(source).encode(), digest_size=8).hexdigest()
    target = folder / version  # a folder of its own, so that processes which map an older one are not disturbed
    if (target / "meta.json").exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            if not (target / "meta.json").exists():
                logger.info("indexing %s, once", vocabulary)
                ConceptIndex.build(read_vocabulary(vocabulary), {"source": vocabulary.name} | source).save(target)
    except OSError as error:
        raise ValueError(
            f"cannot write the index {folder}: {error.strerror or error}. Name a folder that can be written as "
            "index_folder."
        ) from error
    return target


def _load_pipeline(options: ExtractorOptions) -> Any:
    """A spaCy pipeline: the one that is named, or one that only splits words."""
    try:
        import spacy
    except ImportError as error:
        raise ImportError("concepts need spaCy and scispaCy: pip install 'medclip-hf[medconcept]'") from error
    if not options.pipeline:
        return spacy.blank("en")
    try:
        nlp = spacy.load(options.pipeline)
    except OSError as error:
        raise ValueError(
            f"the spaCy pipeline {options.pipeline!r} is not installed. Install it, or leave `pipeline` empty to find "
            "mentions by the vocabulary alone."
        ) from error
    nlp.max_length = max(nlp.max_length, MAX_CAPTION_CHARS)
    return nlp


def _abbreviation_detector(nlp: Any) -> Any:
    """An abbreviation detector of scispaCy, new for each call: patterns learnt from captions do not pile up."""
    try:
        from scispacy.abbreviation import AbbreviationDetector
    except ImportError as error:
        raise ImportError(
            "abbreviations need scispaCy: pip install 'medclip-hf[medconcept]', or set abbreviations=False"
        ) from error
    return AbbreviationDetector(nlp)


def _definitions(detector: Any, doc: Any) -> list[tuple[str, str]]:
    """(short, long) of the abbreviations of a caption; "(arrow)" is none, an abbreviation has a capital."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # W036: it has learnt no pattern yet
        doc = detector(doc)
    inside = doc.text.partition("(")[2]  # what stands before it is read by `_explained_behind`
    pairs = {(short.text, short._.long_form.text) for short in doc._.abbreviations if short.text in inside}
    return sorted((short, long) for short, long in pairs if short != short.lower() and " " not in short)


def _explained_behind(nlp: Any, text: str) -> list[tuple[str, str]]:
    """(short, long) of abbreviations with their long form in parentheses: "PE (pulmonary embolism)".

    The detector reads these from four words on, and then takes the end of them alone for the long form: "CT (computed
    tomography of the chest)" would be a chest.
    """
    from scispacy.abbreviation import find_abbreviation

    pairs = []
    for found in _EXPLAINED_BEHIND.finditer(text):
        short, long = found.groups()
        words = nlp.make_doc(long)[:]
        _, explaining = find_abbreviation(words, nlp.make_doc(short)[:])
        if explaining is not None and explaining.start == 0:
            pairs.append((short, long))
    return pairs


def _entity_words(doc: Any, words: Words) -> list[tuple[int, int]]:
    """The entities of a document as [first, last] words of ours, without stop words at their ends."""
    found = []
    for entity in doc.ents:
        inside = [
            n for n, (start, end) in enumerate(words.spans) if start < entity.end_char and end > entity.start_char
        ]
        while inside and words.normal[inside[0]] in stop_words():
            inside = inside[1:]
        while inside and words.normal[inside[-1]] in stop_words():
            inside = inside[:-1]
        if inside:
            found.append((inside[0], inside[-1]))
    return found


def _free_terms(words: Words, covered: set[int], is_known: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """[first, last] of runs of joined words worth a comparison: none covered, a stop word or a number.

    One word at least must be unknown to the vocabulary: words that are all known, but no name together, are another
    term and not a misspelling.
    """
    stopped = stop_words()
    is_free = [
        place not in covered and len(word) > 2 and word not in stopped and not word[0].isdigit()
        for place, word in enumerate(words.normal)
    ]
    for first in range(len(words)):
        chars = 0
        for last in range(first, min(first + MAX_SIMILAR_WORDS, len(words))):
            if not is_free[last] or (last > first and not words.joins[last - 1]):
                break
            chars += len(words.normal[last])
            if chars >= MIN_SIMILAR_CHARS and not all(is_known[first : last + 1]):
                yield first, last


def _resolve_overlaps(links: Sequence[_Link]) -> list[_Link]:
    """The links that stay where some overlap, in the order of the text."""
    taken: set[int] = set()
    kept = []
    for link in sorted(links, key=_Link.priority):
        places = range(link.first, link.last + 1)
        if taken.isdisjoint(places):
            taken.update(places)
            kept.append(link)
    return sorted(kept, key=lambda link: link.first)
