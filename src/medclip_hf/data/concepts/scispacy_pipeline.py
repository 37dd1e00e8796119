"""Names of similar spelling by scispaCy's own candidate generator and approximate index, as UMLS is published for it.

The folder holds the four files of scispaCy's linkers (nmslib index, tf-idf vectoriser, vectors, names). The vocabulary
itself need not be loaded a second time: names are looked up in our index of the same concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medclip_hf.data.concepts.index import ConceptIndex, normal_name
from medclip_hf.data.concepts.words import term_hash

NUM_CANDIDATES = 30  # scispaCy's default


class ScispacyNeighbours:
    """Stands for `NameNeighbours` where scispaCy's index is asked.

    The vectoriser is stored by joblib, a format that can run code when it is read: take it from a source you trust.

    Args:
        index: of the vocabulary that scispaCy's index was made of.
        folder: with the four files.
        num_candidates: nearest names to ask for.

    Raises:
        ValueError: where one of the files is missing; nothing is ever downloaded.
        ImportError: without scispaCy.
    """

    def __init__(self, index: ConceptIndex, folder: Path, num_candidates: int = NUM_CANDIDATES) -> None:
        try:
            from scispacy.candidate_generation import CandidateGenerator, LinkerPaths
        except ImportError as error:
            raise ImportError("scispaCy's index needs scispaCy: pip install 'medclip-hf[medconcept]'") from error
        paths = LinkerPaths(*(str(Path(folder) / Path(file).name) for file in LinkerPaths.from_directory(Path.cwd())))
        missing = [file for file in paths if not Path(file).is_file()]
        if missing:
            raise ValueError(f"scispaCy's index needs {', '.join(missing)}; put the four files of a linker there")
        names, vectorizer, ann_index = paths.load()
        self._generator = CandidateGenerator(
            ann_index=ann_index, tfidf_vectorizer=vectorizer, ann_concept_aliases_list=names, kb=_NamesOfIndex(index)
        )
        self._index = index
        self._num_candidates = num_candidates

    def nearest(
        self, mentions: Sequence[tuple[str, ...]], min_similarity: float, same_shape: bool
    ) -> list[list[tuple[int, float]]]:
        """As `NameNeighbours.nearest`, of the names that the approximate index comes upon."""
        texts = [" ".join(words) for words in mentions]
        found = []
        for words, candidates in zip(mentions, self._generator(texts, self._num_candidates), strict=True):
            near = [(int(candidate.concept_id), float(max(candidate.similarities))) for candidate in candidates]
            near = [(name, cosine) for name, cosine in near if cosine >= min_similarity - 1e-6]
            if same_shape:
                near = [(n, cosine) for n, cosine in near if self._index.neighbours.num_words[n] == len(words)]
            found.append(sorted(near, key=lambda hit: (-hit[1], hit[0])))
        return found


class _NamesOfIndex:
    """What scispaCy asks of a knowledge base: for an alias, whom it names; here numbers of names of our index."""

    def __init__(self, index: ConceptIndex) -> None:
        self._index = index

    @property
    def alias_to_cuis(self) -> _NamesOfIndex:
        return self

    def __getitem__(self, alias: str) -> list[Any]:
        return self._index.names_of(term_hash(normal_name(alias)))
